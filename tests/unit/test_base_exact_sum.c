/* SPDX-License-Identifier: Apache-2.0 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/base.h"

#include <math.h>
#include <string.h>

#define BITS (EXACT_SUM_WORDS * 64)

/* The same sum by hand: one bit a byte, added with a ripple carry. */
struct reference {
	uint8_t bit[BITS];
};

static void reference_add(struct reference *r, double x)
{
	uint64_t u, mantissa;
	int at;

	memcpy(&u, &x, sizeof(u));
	mantissa = (u & 0xfffffffffffffu) | (u >> 52 ? 1ull << 52 : 0);
	at = (int)(u >> 52 ? u >> 52 : 1) - 1075 + EXACT_SUM_FRACTION_BITS;
	for (int i = 0; i < 53; i++) {
		if (at + i < 0 || !(mantissa >> i & 1))
			continue;
		for (int k = at + i;; k++) {
			assert_true(k < BITS);
			r->bit[k] ^= 1;
			if (r->bit[k])
				break;
		}
	}
}

static void assert_same(const struct exact_sum *s, const struct reference *r)
{
	for (int k = 0; k < BITS; k++)
		assert_int_equal(s->w[k / 64] >> (k % 64) & 1, r->bit[k]);
	assert_int_equal(s->non_finite, 0);
}

#define ADDENDS 3000

/* Over all exponents that fit, down to those that are cut off. */
static double addend(uint64_t i)
{
	return ldexp(rng_uniform(1, 1, i), (int)(rng_u64(1, 2, i) % 550) - 290);
}

static void test_against_the_reference(void **state)
{
	struct reference r = { { 0 } };
	struct exact_sum s;

	(void)state;
	exact_sum_clear(&s);
	for (uint64_t i = 0; i < ADDENDS; i++) {
		exact_sum_add(&s, addend(i));
		reference_add(&r, addend(i));
		if (i % 100 == 0)
			assert_same(&s, &r);
	}
	assert_same(&s, &r);
}

static void test_no_order_and_no_partition_shows(void **state)
{
	struct exact_sum whole, parts[7], merged;

	(void)state;
	exact_sum_clear(&whole);
	for (uint64_t i = 0; i < ADDENDS; i++)
		exact_sum_add(&whole, addend(i));
	for (uint64_t seed = 0; seed < 10; seed++) {
		exact_sum_clear(&merged);
		for (size_t p = 0; p < ARRAY_LEN(parts); p++)
			exact_sum_clear(&parts[p]);
		for (uint64_t i = 0; i < ADDENDS; i++)
			exact_sum_add(&parts[rng_u64(seed, 3, i) % ARRAY_LEN(parts)],
				      addend(rng_permute(seed, 4, ADDENDS, i)));
		for (size_t p = 0; p < ARRAY_LEN(parts); p++)
			exact_sum_merge(&merged, &parts[(p + seed) % ARRAY_LEN(parts)]);
		assert_memory_equal(&merged, &whole, sizeof(whole));
	}
}

static double sum_of(const double *x, size_t n)
{
	struct exact_sum s;

	exact_sum_clear(&s);
	for (size_t i = 0; i < n; i++)
		exact_sum_add(&s, x[i]);
	return exact_sum_value(&s);
}

#define SUM(...) sum_of((const double[]){ __VA_ARGS__ }, sizeof((const double[]){ __VA_ARGS__ }) / sizeof(double))

static void test_value(void **state)
{
	(void)state;
	assert_true(SUM(0.0) == 0);
	assert_true(SUM(-0.0) == 0 && !signbit(SUM(-0.0)));
	assert_true(SUM(1.0, 2.0, 0.5) == 3.5);
	assert_true(SUM(0x1p200, 0x1p-200) == 0x1p200);
	assert_true(SUM(0.1, 0.2) == 0x1.3333333333333p-2);
	/* Of what does not fit into 53 bits the rest is cut, not rounded. */
	assert_true(SUM(0x1p53, 1.0) == 0x1p53);
	assert_true(SUM(0x1p53, 1.0, 1.0) == 0x1p53 + 2);
	assert_true(SUM(0x1p53 + 2, 1.0) == 0x1p53 + 2);
	assert_true(SUM(0x1p64, 0x1p63, 0x1p11, 0x1.8p0) == 0x1.8p64 + 0x1p12 - 0x1p12);
	for (uint64_t i = 0; i < 1000; i++) {
		double x = ldexp(rng_uniform(2, 1, i), (int)(i % 400) - 180);

		assert_true(SUM(x) == x);
	}
}

static void test_addends_are_cut_at_the_last_bit(void **state)
{
	(void)state;
	assert_true(SUM(0x1p-240) == 0x1p-240);
	assert_true(SUM(0x1.fffffffffffffp-241) == 0);
	assert_true(SUM(0x1p-241, 0x1p-241) == 0);
	assert_true(SUM(0x1.8p-240, 0x1.8p-240) == 0x1p-239);
	assert_true(SUM(0x1.8p-188) == 0x1.8p-188);
	assert_true(SUM(0x1.0000000000001p-188) == 0x1.0000000000001p-188);
	assert_true(SUM(0x1.0000000000001p-189) == 0x1p-189);
	assert_true(SUM(0x1p-1074, 0x1p-1022) == 0);
}

static void test_what_is_no_sum(void **state)
{
	struct exact_sum bad, good;

	(void)state;
	assert_true(isinf(SUM(INFINITY, 1.0)));
	assert_true(isinf(SUM((double)NAN)));
	assert_true(isinf(SUM(-1.0, 1.0)));
	assert_true(isinf(SUM(0x1p272)));
	assert_true(isinf(SUM(1e308)));
	assert_true(isinf(SUM(0x1p271, 0x1p271)));
	assert_true(SUM(0x1.fffffffffffffp271) == 0x1.fffffffffffffp271);

	exact_sum_clear(&bad);
	exact_sum_add(&bad, INFINITY);
	exact_sum_clear(&good);
	exact_sum_add(&good, 1);
	exact_sum_merge(&good, &bad);
	assert_true(isinf(exact_sum_value(&good)));
	exact_sum_clear(&good);
	assert_true(exact_sum_value(&good) == 0);
}

static void test_a_merge_that_overflows_says_so(void **state)
{
	struct exact_sum a, b;

	(void)state;
	exact_sum_clear(&a);
	exact_sum_add(&a, 0x1p271);
	b = a;
	exact_sum_merge(&a, &b);
	assert_true(isinf(exact_sum_value(&a)));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_against_the_reference),
		cmocka_unit_test(test_no_order_and_no_partition_shows),
		cmocka_unit_test(test_value),
		cmocka_unit_test(test_addends_are_cut_at_the_last_bit),
		cmocka_unit_test(test_what_is_no_sum),
		cmocka_unit_test(test_a_merge_that_overflows_says_so),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
