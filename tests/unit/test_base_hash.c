/* SPDX-License-Identifier: Apache-2.0 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/base.h"

#include <string.h>

/* The values that xxHash publishes for the empty input pin the algorithm and the order of the halves. */
static void test_known_values(void **state)
{
	char hex[33];

	(void)state;
	assert_true(hash64("", 0, 0) == 0x2d06800538d394c2u);
	hash128_hex(hash128("", 0, 0), hex);
	assert_string_equal(hex, "99aa06d3014798d86001c324468d497f");
}

static void test_every_byte_and_the_seed_count(void **state)
{
	uint8_t data[600] = { 0 };
	uint64_t h = hash64(data, sizeof(data), 1);
	struct hash128 wide = hash128(data, sizeof(data), 1);

	(void)state;
	assert_true(h != hash64(data, sizeof(data), 2));
	assert_true(h != hash64(data, sizeof(data) - 1, 1));
	assert_true(wide.lo != hash128(data, sizeof(data), 2).lo);
	for (size_t i = 0; i < sizeof(data); i++) {
		data[i] = 1;
		assert_true(h != hash64(data, sizeof(data), 1));
		assert_true(wide.hi != hash128(data, sizeof(data), 1).hi);
		data[i] = 0;
	}
}

static void test_add_carries(void **state)
{
	struct hash128 all = { UINT64_MAX, UINT64_MAX }, one = { 1, 0 }, half = { UINT64_MAX, 4 };
	struct hash128 sum = hash128_add(half, one);
	char hex[33];

	(void)state;
	assert_true(sum.lo == 0 && sum.hi == 5);
	sum = hash128_add(all, one);
	assert_true(sum.lo == 0 && sum.hi == 0);
	hash128_hex((struct hash128){ .lo = 0xabc, .hi = 0x12 }, hex);
	assert_string_equal(hex, "00000000000000120000000000000abc");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_known_values),
		cmocka_unit_test(test_every_byte_and_the_seed_count),
		cmocka_unit_test(test_add_carries),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
