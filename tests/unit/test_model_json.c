/* SPDX-License-Identifier: Apache-2.0 */
#include "model/json_doc.h"

#include <errno.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

/* What the tolerant front takes out, and that jansson then sees plain JSON. */
static void test_tolerated(void **state)
{
	static const struct {
		const char *text, *plain;
	} good[] = {
		{ "{}", "{}" },
		{ "\xef\xbb\xbf{}", "{}" },
		{ "{\"a\": 1,}", "{\"a\": 1}" },
		{ "{\"a\": [1, 2, // two\n ],\n}", "{\"a\": [1, 2]}" },
		{ "{\"a\": 1 /* , */ , # last\n }", "{\"a\": 1}" },
		{ "{\"a\": \"// # /* ,] \\\" ,}\"}", "{\"a\": \"// # /* ,] \\\" ,}\"}" },
		{ "{\"a\": Infinity, \"b\": inf}", "{\"a\": \"inf\", \"b\": \"inf\"}" },
		{ "{\"a\": true, \"b\": null}", "{\"a\": true, \"b\": null}" },
		{ "/**/{/***/\"a\":1/*\n*/}//", "{\"a\": 1}" },
	};

	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(good); i++) {
		struct json_doc d;
		struct err e = { 0 };
		json_t *want = json_loads(good[i].plain, 0, NULL);

		if (json_doc_parse(&d, good[i].text, "x", &e))
			fail_msg("%s: %s", good[i].text, e.text);
		assert_true(json_equal(d.root, want));
		json_decref(want);
		json_doc_release(&d);
	}
}

static void test_refused(void **state)
{
	static const struct {
		const char *text, *message;
	} bad[] = {
		{ "", "x:1: '[' or '{' expected near end of file" },
		{ "1", "x:1: '[' or '{' expected near '1'" },
		{ "[]", "x: expected an object { … }" },
		{ "{\"a\": 1,,}", "x:1: string or '}' expected near ','" },
		{ "{,}", "x:1: string or '}' expected near ','" },
		{ "{\"a\": [,]}", "x:1: unexpected token near ','" },
		{ "{\"a\": -Infinity}", "x:1: invalid token near '-'" },
		{ "{\n\n\"a\": 1 \"b\": 2}", "x:3: '}' expected near '\"b\"'" },
		{ "{\"a\": 1} trailing", "x:1: end of file expected near 'trailing'" },
		{ "{\n\"a\": 1,\n\"a\": 2}", "x:3: duplicate object key near '\"a\"'" },
		{ "{\n/* never", "x:2: this comment does not end" },
		{ "{\"a", "x:1: premature end of input near '\"a'" },
	};

	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
		struct json_doc d;
		struct err e = { 0 };

		assert_int_equal(json_doc_parse(&d, bad[i].text, "x", &e), -EINVAL);
		assert_string_equal(e.text, bad[i].message);
	}
}

static unsigned line_of(const char *text, const char *a, const char *b, const char *c)
{
	struct json_path pa = { NULL, a }, pb = { &pa, b }, pc = { &pb, c };

	return json_pos_line(text, c ? &pc : b ? &pb : a ? &pa : NULL);
}

static void test_lines(void **state)
{
	static const char text[] = "\n{\n\"a\": {\"x\": \"}\\\"{\", \"y\":\n [ {\"z\": 1}, 2 ],\n"
				   "  \"b\": {\n   \"c\"\n : 1 } },\n\"bb\": 2, \"b\": 3}\n";

	(void)state;
	assert_int_equal(line_of(text, NULL, NULL, NULL), 2);
	assert_int_equal(line_of(text, "a", NULL, NULL), 3);
	assert_int_equal(line_of(text, "a", "y", NULL), 3);
	assert_int_equal(line_of(text, "a", "b", NULL), 5);
	assert_int_equal(line_of(text, "a", "b", "c"), 6);
	assert_int_equal(line_of(text, "b", NULL, NULL), 8);
	/* What is not there stands where its section does. */
	assert_int_equal(line_of(text, "a", "b", "d"), 5);
	assert_int_equal(line_of(text, "a", "q", NULL), 3);
	assert_int_equal(line_of(text, "a", "y", "z"), 3);
	assert_int_equal(line_of(text, "q", NULL, NULL), 2);
}

static void test_words(void **state)
{
	static const struct {
		const char *json, *words;
	} want[] = {
		{ "{}", "an object" },
		{ "[1]", "a list" },
		{ "\"x\"", "\"x\"" },
		{ "-3", "-3" },
		{ "0.5", "0.5" },
		{ "true", "true" },
		{ "false", "false" },
		{ "null", "null" },
		{ "\"01234567890123456789012345678901234567890123456789XYZ\"",
		  "\"01234567890123456789012345678901234567890123456789\"…" },
	};
	char words[64];

	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(want); i++) {
		json_t *v = json_loads(want[i].json, JSON_DECODE_ANY, NULL);

		assert_string_equal(json_words(v, words), want[i].words);
		json_decref(v);
	}
}

static void test_numbers(void **state)
{
	static const struct {
		const char *json;
		bool good;
		uint64_t value;
	} want[] = {
		{ "5e8", true, 500000000 }, { "3.0", true, 3 }, { "9223372036854775807", true, INT64_MAX },
		{ "3.5", false, 0 },        { "-1", false, 0 }, { "-1.0", false, 0 },
		{ "1e19", false, 0 },       { "2", false, 0 },  { "true", false, 0 },
	};
	struct json_doc d;
	struct json_path path = { NULL, "k" };
	struct err e = { 0 };

	(void)state;
	assert_int_equal(json_doc_parse(&d, "{\"k\": 1}", "x", &e), 0);
	for (size_t i = 0; i < ARRAY_LEN(want); i++) {
		json_t *v = json_loads(want[i].json, JSON_DECODE_ANY, NULL);
		uint64_t n = 0;
		int rc = json_read_u64(&d, &path, v, 3, INT64_MAX, &n, &e);

		assert_int_equal(rc, want[i].good ? 0 : -EINVAL);
		assert_int_equal(n, want[i].value);
		json_decref(v);
	}
	assert_string_equal(e.text, "x:1: k: expected an integer of at least 3, found true");
	json_doc_release(&d);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_tolerated), cmocka_unit_test(test_refused), cmocka_unit_test(test_lines),
		cmocka_unit_test(test_words),     cmocka_unit_test(test_numbers),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
