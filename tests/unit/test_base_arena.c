/* SPDX-License-Identifier: Apache-2.0 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/base.h"

#include <errno.h>

static void test_alloc(void **state)
{
	struct arena a;
	uint8_t *first, *second;

	(void)state;
	assert_int_equal(arena_init(&a, "parameters", 10000), 0);
	assert_string_equal(a.name, "parameters");
	first = arena_alloc(&a, 3, 1);
	second = arena_alloc(&a, 100, 64);
	assert_ptr_equal(first, a.base);
	assert_ptr_equal(second, a.base + 64);
	assert_int_equal(a.used, 164);
	for (size_t i = 0; i < 100; i++)
		assert_int_equal(second[i], 0);
	assert_ptr_equal(arena_alloc(&a, 0, 4096), a.base + 4096);
	arena_release(&a);
	assert_null(a.base);
	assert_int_equal(a.size, 0);
}

static void test_the_plan_is_the_limit(void **state)
{
	struct arena a;

	(void)state;
	assert_int_equal(arena_init(&a, "small", 4096), 0);
	assert_non_null(arena_alloc(&a, 4000, 1));
	assert_null(arena_alloc(&a, 97, 1));
	assert_null(arena_alloc(&a, SIZE_MAX, 1));
	assert_null(arena_alloc(&a, 1, 4096));
	assert_int_equal(a.used, 4000);
	assert_non_null(arena_alloc(&a, 96, 1));
	assert_null(arena_alloc(&a, 1, 1));
	arena_release(&a);
}

static void test_no_memory(void **state)
{
	struct arena a;

	(void)state;
	assert_int_equal(arena_init(&a, "huge", SIZE_MAX / 2), -ENOMEM);
}

static void test_clock(void **state)
{
	uint64_t before = clock_now_ns();

	(void)state;
	assert_true(clock_now_ns() >= before);
	/* 2020 is past, 2200 is not. */
	assert_in_range(clock_wall_ns() / 1000000000u, 1577836800u, 7258118400u);
	assert_true(clock_seconds(1500000000u) == 1.5);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_alloc),
		cmocka_unit_test(test_the_plan_is_the_limit),
		cmocka_unit_test(test_no_memory),
		cmocka_unit_test(test_clock),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
