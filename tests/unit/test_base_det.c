/* SPDX-License-Identifier: Apache-2.0 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/base.h"

#include <math.h>

/*
 * The reference is libm in long double, whose own error is far below an ulp of
 * double; the bound is the contract's.
 */
#define ULPS_MAX 2.0
#define POINTS 300000

static double ulps(double got, long double want)
{
	double near = fabs((double)want);

	return (double)(fabsl((long double)got - want) / (long double)(nextafter(near, INFINITY) - near));
}

/* Uniform in (-1, 1). */
static double spread(uint64_t stream, uint64_t i)
{
	return 2 * rng_uniform(77, stream, i) - 1;
}

static void test_log(void **state)
{
	(void)state;
	for (uint64_t i = 0; i < POINTS; i++) {
		double anywhere = exp(700 * spread(1, i));
		double near_one = 1 + spread(2, i) * 1e-3;
		double below_one = rng_uniform(77, 3, i);

		assert_true(ulps(det_log(anywhere), logl((long double)anywhere)) < ULPS_MAX);
		assert_true(ulps(det_log(near_one), logl((long double)near_one)) < ULPS_MAX);
		assert_true(ulps(det_log(below_one), logl((long double)below_one)) < ULPS_MAX);
	}
	assert_true(det_log(1) == 0);
	assert_true(ulps(det_log(0x1p-1022), logl(0x1p-1022L)) < ULPS_MAX);
	assert_true(ulps(det_log(0x1.fffffffffffffp+1023), logl(0x1.fffffffffffffp+1023L)) < ULPS_MAX);
	assert_true(ulps(det_log(M_SQRT2), logl((long double)M_SQRT2)) < ULPS_MAX);
	assert_true(ulps(det_log(1 - 0x1p-53), logl(1 - 0x1p-53L)) < ULPS_MAX);
}

static void test_exp(void **state)
{
	(void)state;
	for (uint64_t i = 0; i < POINTS; i++) {
		double wide = 699.9 * spread(4, i), narrow = spread(5, i);

		assert_true(ulps(det_exp(wide), expl((long double)wide)) < ULPS_MAX);
		assert_true(ulps(det_exp(narrow), expl((long double)narrow)) < ULPS_MAX);
	}
	assert_true(det_exp(0) == 1);
}

static void test_pow(void **state)
{
	(void)state;
	for (uint64_t i = 0; i < POINTS; i++) {
		double x = i % 2 ? exp(600 * spread(6, i)) : 1 + spread(6, i) * 0.5;
		double y = 699 * spread(7, i) / fabs(log(x));

		if (isfinite(y))
			assert_true(ulps(det_pow(x, y), powl((long double)x, (long double)y)) < ULPS_MAX);
	}
	assert_true(det_pow(3, 0) == 1);
	assert_true(det_pow(1, 1e300) == 1);
	assert_true(det_pow(2, 10) == 1024);
	assert_true(ulps(det_pow(0.999, 0.5), powl((long double)0.999, 0.5L)) < ULPS_MAX);
}

static void test_pow_u64(void **state)
{
	static const double bases[] = { 0.5, 0.9, 0.95, 0.98, 0.999, 0.9999, 1.0001, -0.9 };

	(void)state;
	for (size_t b = 0; b < ARRAY_LEN(bases); b++) {
		for (uint64_t n = 0; n < 1000000; n += 1 + n / 50) {
			long double want = powl((long double)bases[b], (long double)n);

			if (fabsl(want) > 1e-280L && fabsl(want) < 1e280L)
				assert_true(ulps(det_pow_u64(bases[b], n), want) < ULPS_MAX);
		}
	}
	assert_true(det_pow_u64(7, 0) == 1);
	assert_true(det_pow_u64(-3, 3) == -27);
	assert_true(det_pow_u64(0, 5) == 0);
	assert_true(det_pow_u64(0.9, 100000000) == 0);
}

static void check_sincos(double x)
{
	double s, c;

	det_sincos(x, &s, &c);
	assert_true(ulps(s, sinl((long double)x)) < ULPS_MAX);
	assert_true(ulps(c, cosl((long double)x)) < ULPS_MAX);
}

static void test_sincos(void **state)
{
	double s, c;

	(void)state;
	for (uint64_t i = 0; i < POINTS; i++) {
		check_sincos(1e5 * spread(8, i));
		check_sincos(7 * spread(9, i));
	}
	/* The doubles nearest to multiples of pi/2, where almost everything cancels. */
	for (int n = -63661; n <= 63661; n++)
		check_sincos(n * M_PI_2);
	det_sincos(0, &s, &c);
	assert_true(s == 0 && c == 1);
}

/* Same bits with every compiler, option and machine. */
static void test_the_bits_are_fixed(void **state)
{
	static double out[5 * 20000];
	double *p = out;
	char hex[33];

	(void)state;
	for (uint64_t i = 0; i < 20000; i++, p += 5) {
		double x = rng_uniform(1, 2, i);

		p[0] = det_log(x);
		p[1] = det_exp(1000 * (x - 0.5));
		p[2] = det_pow(1 + x, 100 * x);
		det_sincos(1e4 * x, &p[3], &p[4]);
	}
	hash128_hex(hash128(out, sizeof(out), 0), hex);
	assert_string_equal(hex, "21c871250bcc77eeaaa7ea4943b9c8ce");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_log),    cmocka_unit_test(test_exp),
		cmocka_unit_test(test_pow),    cmocka_unit_test(test_pow_u64),
		cmocka_unit_test(test_sincos), cmocka_unit_test(test_the_bits_are_fixed),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
