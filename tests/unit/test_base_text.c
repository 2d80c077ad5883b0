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

static void assert_bytes(uint64_t bytes, const char *want)
{
	char buf[24];

	assert_string_equal(bytes_text(bytes, buf), want);
}

static void test_bytes(void **state)
{
	(void)state;
	assert_bytes(0, "0 B");
	assert_bytes(1023, "1023 B");
	assert_bytes(1024, "1.0 KiB");
	assert_bytes(12897485, "12.3 MiB");
	assert_bytes((1ull << 30) - 1, "1.0 GiB");
	assert_bytes(UINT64_MAX, "16.0 EiB");
}

static void assert_double(double v, const char *want)
{
	char buf[32];

	assert_string_equal(double_text(v, buf), want);
}

static void test_doubles_read_back(void **state)
{
	char buf[32];

	(void)state;
	assert_double(0.1, "0.1");
	assert_double(3, "3");
	assert_double(1e23, "1e+23");
	assert_double(0x1p-1074, "5e-324");
	assert_double(1.0 / 3, "0.3333333333333333");
	assert_double(0.1 + 0.2, "0.30000000000000004");
	assert_double(-0.0, "-0");
	assert_double(INFINITY, "inf");
	for (uint64_t i = 0; i < 20000; i++) {
		uint64_t u = rng_u64(1, 2, i);
		double v, back;

		memcpy(&v, &u, sizeof(v));
		if (!isfinite(v))
			continue;
		back = strtod(double_text(v, buf), NULL);
		assert_memory_equal(&v, &back, sizeof(v));
	}
}

static void test_nearest(void **state)
{
	static const char *const names[] = { "train_batch_size", "steps", "fp16", "bf16", "zero_optimization", NULL };
	static const char *const none[] = { NULL };
	char word[500];

	(void)state;
	assert_string_equal(nearest_name("trian_batch_size", names), "train_batch_size");
	assert_string_equal(nearest_name("step", names), "steps");
	assert_string_equal(nearest_name("zero_optimisation", names), "zero_optimization");
	assert_string_equal(nearest_name("fp61", (const char *const[]){ "fp6", "fp1", NULL }), "fp6");
	assert_string_equal(nearest_name("bf16", names), "bf16");
	assert_null(nearest_name("scheduler", names));
	assert_null(nearest_name("q", names));
	assert_null(nearest_name("", names));
	assert_null(nearest_name("steps", none));
	memset(word, 'x', sizeof(word) - 1);
	word[sizeof(word) - 1] = 0;
	assert_null(nearest_name(word, names));
	assert_null(nearest_name("steps", (const char *const[]){ word, NULL }));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_bytes),
		cmocka_unit_test(test_doubles_read_back),
		cmocka_unit_test(test_nearest),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
