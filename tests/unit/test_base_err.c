/* SPDX-License-Identifier: Apache-2.0 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/base.h"

#include <errno.h>
#include <string.h>

static void test_set(void **state)
{
	struct err e;

	(void)state;
	assert_int_equal(err_set(&e, -EINVAL, "line %d: %s", 7, "bad"), -EINVAL);
	assert_int_equal(e.code, -EINVAL);
	assert_string_equal(e.text, "line 7: bad");
	assert_int_equal(err_set(NULL, -EIO, "nobody listens"), -EIO);
}

static void test_prefix(void **state)
{
	struct err e;

	(void)state;
	err_set(&e, -ENOENT, "no such key");
	assert_int_equal(err_prefix(&e, "%s:%d", "ds.json", 3), -ENOENT);
	assert_string_equal(e.text, "ds.json:3: no such key");
}

static void test_long_texts_are_cut(void **state)
{
	struct err e;
	char word[2 * sizeof(e.text)];

	(void)state;
	memset(word, 'x', sizeof(word) - 1);
	word[sizeof(word) - 1] = 0;
	err_set(&e, -EINVAL, "%s", word);
	assert_int_equal(strlen(e.text), sizeof(e.text) - 1);
	err_prefix(&e, "here");
	assert_int_equal(strlen(e.text), sizeof(e.text) - 1);
	assert_memory_equal(e.text, "here: xxx", 9);
	err_prefix(&e, "%s", word);
	assert_int_equal(strlen(e.text), sizeof(e.text) - 1);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_set),
		cmocka_unit_test(test_prefix),
		cmocka_unit_test(test_long_texts_are_cut),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
