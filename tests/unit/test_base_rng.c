/* SPDX-License-Identifier: Apache-2.0 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/base.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* The known-answer vectors published with Random123 for philox4x32, 10 rounds. */
static void test_philox_known_answers(void **state)
{
	static const struct {
		uint32_t ctr[4], key[2], out[4];
	} known[] = {
		{ { 0, 0, 0, 0 }, { 0, 0 }, { 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8 } },
		{ { 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff },
		  { 0xffffffff, 0xffffffff },
		  { 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd } },
		{ { 0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344 },
		  { 0xa4093822, 0x299f31d0 },
		  { 0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1 } },
	};
	uint32_t out[4];

	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(known); i++) {
		rng_philox4x32(known[i].key, known[i].ctr, out);
		assert_memory_equal(out, known[i].out, sizeof(out));
	}
	/* Seed, stream and index fill key and counter low word first. */
	assert_true(rng_u64(0x299f31d0a4093822u, 0x0370734413198a2eu, 0x85a308d3243f6a88u) == 0x94fdccebd16cfe09u);
}

static void test_uniform(void **state)
{
	const uint64_t n = 200000;
	double sum = 0, square = 0;

	(void)state;
	for (uint64_t i = 0; i < n; i++) {
		double u = rng_uniform(5, 6, i);

		assert_true(u > 0 && u < 1);
		sum += u;
		square += u * u;
	}
	/* Five standard errors. */
	assert_true(fabs(sum / (double)n - 0.5) < 5 * sqrt(1.0 / 12 / (double)n));
	assert_true(fabs(square / (double)n - 1.0 / 3) < 5 * sqrt(4.0 / 45 / (double)n));
}

static void test_normal_moments(void **state)
{
	const uint64_t n = 400000;
	double sum = 0, square = 0, cube = 0, fourth = 0, neighbours = 0;
	uint64_t beyond_2 = 0;

	(void)state;
	for (uint64_t i = 0; i < n; i++) {
		double x = (double)rng_normal(9, 1, i);

		assert_true(fabs(x) < 9);
		sum += x;
		square += x * x;
		cube += x * x * x;
		fourth += x * x * x * x;
		neighbours += x * (double)rng_normal(9, 1, i + 1);
		beyond_2 += fabs(x) > 2;
	}
	assert_true(fabs(sum / (double)n) < 5 / sqrt((double)n));
	assert_true(fabs(square / (double)n - 1) < 5 * sqrt(2 / (double)n));
	assert_true(fabs(cube / (double)n) < 5 * sqrt(15 / (double)n));
	assert_true(fabs(fourth / (double)n - 3) < 5 * sqrt(96 / (double)n));
	assert_true(fabs(neighbours / (double)n) < 5 / sqrt((double)n));
	assert_true(fabs((double)beyond_2 / (double)n - 0.0455003) < 5 * sqrt(0.0455 / (double)n));
}

/* Every span of a stream is the stream's elements, wherever it begins and ends. */
static void test_fill_is_normal_element_for_element(void **state)
{
	static const uint64_t firsts[] = { 0, 1, 2, 255, 256, 257, (1ull << 33) - 3 };
	static const uint64_t lengths[] = { 0, 1, 2, 3, 255, 256, 257, 258, 1000 };
	const float mean = 0.25f, std = 0.02f;
	float out[1001];

	(void)state;
	for (size_t f = 0; f < ARRAY_LEN(firsts); f++) {
		for (size_t l = 0; l < ARRAY_LEN(lengths); l++) {
			out[lengths[l]] = 77;
			rng_fill_normal(out, lengths[l], 3, 4, firsts[f], mean, std);
			assert_true(out[lengths[l]] == 77);
			for (uint64_t k = 0; k < lengths[l]; k++) {
				float scaled = std * rng_normal(3, 4, firsts[f] + k);
				float want = mean + scaled;

				assert_memory_equal(&out[k], &want, sizeof(want));
			}
		}
	}
}

/* The bits belong to the format of a job: another compiler, option or machine must not change them. */
static void test_the_bits_are_fixed(void **state)
{
	const uint64_t n = 100000;
	float *out = malloc(n * sizeof(*out));
	char hex[33];

	(void)state;
	assert_non_null(out);
	rng_fill_normal(out, n, 1234, 5678, 0, 0, 1);
	hash128_hex(hash128(out, n * sizeof(*out), 0), hex);
	assert_string_equal(hex, "9a9852a009dd36054d6d123b6ef737c8");
	free(out);
}

static void check_is_permutation(uint64_t seed, uint64_t n)
{
	uint8_t *seen = calloc(n, 1);

	assert_non_null(seen);
	for (uint64_t i = 0; i < n; i++) {
		uint64_t at = rng_permute(seed, 11, n, i);

		assert_true(at < n);
		assert_false(seen[at]);
		seen[at] = 1;
	}
	free(seen);
}

static void test_permute_is_a_permutation(void **state)
{
	(void)state;
	for (uint64_t n = 1; n < 300; n++)
		check_is_permutation(n, n);
	check_is_permutation(1, 4096);
	check_is_permutation(2, 4097);
	check_is_permutation(3, 65536);
}

static void test_permute_spreads(void **state)
{
	const uint64_t n = 10000;
	uint64_t fixed = 0, same = 0;
	double product = 0;

	(void)state;
	for (uint64_t i = 0; i < n; i++) {
		uint64_t a = rng_permute(1, 0, n, i), b = rng_permute(2, 0, n, i);

		fixed += a == i;
		same += a == b;
		product += ((double)a / (double)n - 0.5) * ((double)i / (double)n - 0.5);
	}
	/* Both counts are about Poisson with mean 1. */
	assert_true(fixed < 10 && same < 10);
	assert_true(fabs(product / (double)n) < 5 / 12.0 / sqrt((double)n));
	/* The widest domain, where half a block is the whole word. */
	assert_true(rng_permute(1, 0, UINT64_MAX, UINT64_MAX - 1) < UINT64_MAX);
	assert_true(rng_permute(1, 0, UINT64_MAX, 0) != rng_permute(1, 0, UINT64_MAX, 1));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_philox_known_answers), cmocka_unit_test(test_uniform),
		cmocka_unit_test(test_normal_moments),       cmocka_unit_test(test_fill_is_normal_element_for_element),
		cmocka_unit_test(test_the_bits_are_fixed),   cmocka_unit_test(test_permute_is_a_permutation),
		cmocka_unit_test(test_permute_spreads),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
