/* SPDX-License-Identifier: Apache-2.0 */
/* Lines of JSONL, documents packed into windows, and sources with weights. */
#include "model/jsonl.h"
#include "model/model.h"

#include <errno.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

#define NO DATA_NO_TARGET

/* ---------------------------------------------------------------------- lines */

static size_t decode(const struct jsonl_string *s, uint8_t *out)
{
	const uint8_t *p = s->raw;
	size_t n = 0;
	unsigned k;

	while ((k = jsonl_next(&p, out + n)))
		n += k;
	assert_int_equal(n, s->bytes);
	return n;
}

static void test_lines(void **state)
{
	static const struct {
		const char *line, *text, *prompt;
	} good[] = {
		{ "{\"text\": \"abc\"}", "abc", NULL },
		{ "  { \"id\" : [1, {\"a\": -0.5e+3}, null, true, \"x\"], \"text\":\"\" } \r", "", NULL },
		{ "{\"text\": \"a\\n\\t\\\"\\\\\\/\\b\\f\\r\"}", "a\n\t\"\\/\b\f\r", NULL },
		{ "{\"text\": \"\\u00e9\\u20AC\\ud83d\\ude00\xc3\xa9\"}",
		  "\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\xc3\xa9", NULL },
		{ "{\"te\\u0078t\": \"escaped key\"}", "escaped key", NULL },
		{ "{\"completion\": \"out\", \"prompt\": \"in\"}", "out", "in" },
		{ "{\"prompt\": \"\", \"completion\": \"\"}", "", "" },
		{ "{\"text\": \"\x7f\xf4\x8f\xbf\xbf\"}", "\x7f\xf4\x8f\xbf\xbf", NULL },
	};
	uint8_t out[64];

	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(good); i++) {
		struct jsonl_line l;
		char why[JSONL_WHY] = "";

		if (jsonl_parse((const uint8_t *)good[i].line, strlen(good[i].line), &l, why))
			fail_msg("%s: %s", good[i].line, why);
		assert_int_equal(decode(&l.text, out), strlen(good[i].text));
		assert_memory_equal(out, good[i].text, strlen(good[i].text));
		assert_int_equal(l.pair, good[i].prompt != NULL);
		if (l.pair) {
			assert_int_equal(decode(&l.prompt, out), strlen(good[i].prompt));
			assert_memory_equal(out, good[i].prompt, strlen(good[i].prompt));
		}
	}
	assert_int_equal(jsonl_parse((const uint8_t *)" \t\r", 3, &(struct jsonl_line){ 0 }, (char[JSONL_WHY]){ 0 }),
			 1);
	assert_int_equal(jsonl_parse(NULL, 0, &(struct jsonl_line){ 0 }, (char[JSONL_WHY]){ 0 }), 1);
}

static void test_bad_lines(void **state)
{
	static const struct {
		const char *line, *why;
	} bad[] = {
		{ "[]", "an object was expected at byte 1 of the line" },
		{ "{}", "expected {\"text\"} or {\"prompt\", \"completion\"}" },
		{ "{\"prompt\": \"a\"}", "expected {\"text\"} or" },
		{ "{\"text\": \"a\", \"prompt\": \"b\"}", "expected {\"text\"} or" },
		{ "{\"text\": 1}", "\"text\" is not a string" },
		{ "{\"text\": null}", "\"text\" is not a string" },
		{ "{\"text\":", "\"text\" is not a string" },
		{ "{\"text\": \"a\", \"text\": \"b\"}", "\"text\" is given twice" },
		{ "{\"text\": \"a}", "a string without end at byte 13" },
		{ "{\"text\": \"a\"", "a comma or } was expected at byte 13" },
		{ "{\"text\": \"a\",}", "a string was expected at byte 14" },
		{ "{\"text\" \"a\"}", "a colon was expected at byte 9" },
		{ "{\"text\": \"a\"} x", "something behind the object at byte 15" },
		{ "{\"text\": \"\x01\"}", "a control character in a string at byte 11" },
		{ "{\"text\": \"\xff\"}", "a byte that is not UTF-8 at byte 11" },
		{ "{\"text\": \"\xc0\xaf\"}", "a byte that is not UTF-8" },
		{ "{\"text\": \"\xed\xa0\x80\"}", "a byte that is not UTF-8" },
		{ "{\"text\": \"\xf4\x90\x80\x80\"}", "a byte that is not UTF-8" },
		{ "{\"text\": \"\xe2\x82\"}", "a byte that is not UTF-8" },
		{ "{\"text\": \"\\x\"}", "an unknown escape at byte 11" },
		{ "{\"text\": \"\\", "an unknown escape" },
		{ "{\"text\": \"\\u12g4\"}", "a \\u escape that is no character" },
		{ "{\"text\": \"\\u12", "a \\u escape that is no character" },
		{ "{\"text\": \"\\ud800\"}", "a \\u escape that is no character" },
		{ "{\"text\": \"\\ud800\\u0041\"}", "a \\u escape that is no character" },
		{ "{\"text\": \"\\udc00\"}", "a \\u escape that is no character" },
		{ "{\"a\": 01, \"text\": \"\"}", "a comma or } was expected at byte 8" },
		{ "{\"a\": +1, \"text\": \"\"}", "a value was expected" },
		{ "{\"a\": 1., \"text\": \"\"}", "a value was expected" },
		{ "{\"a\": nul, \"text\": \"\"}", "a value was expected" },
		{ "{\"a\": [1 2], \"text\": \"\"}", "a comma or ] was expected" },
		{ "{\"a\": {1: 2}, \"text\": \"\"}", "a string was expected" },
		{ "{\"a\": }", "a value was expected" },
	};
	struct jsonl_line l;
	char why[JSONL_WHY], deep[256] = "{\"a\": ";

	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
		/* A copy of its own size, so that a sanitizer sees a read behind it. */
		size_t n = strlen(bad[i].line);
		uint8_t *line = malloc(n);

		memcpy(line, bad[i].line, n);
		assert_int_equal(jsonl_parse(line, n, &l, why), -EINVAL);
		if (!strstr(why, bad[i].why))
			fail_msg("%s: \"%s\" does not hold \"%s\"", bad[i].line, why, bad[i].why);
		free(line);
	}
	memset(deep + 6, '[', 100);
	assert_int_equal(jsonl_parse((const uint8_t *)deep, 106, &l, why), -EINVAL);
	assert_non_null(strstr(why, "values too deep in each other"));
}

/* -------------------------------------------------------------------- windows */

struct files {
	char dir[64];
	char path[3][96];
	char *list[3];
	struct data_source source[3];
	struct data_config c;
};

static int setup(void **state)
{
	static struct files f;
	char dir[] = "/tmp/shardmesh_jsonl_XXXXXX";

	if (!mkdtemp(dir))
		return -1;
	f = (struct files){ 0 };
	snprintf(f.dir, sizeof(f.dir), "%s", dir);
	for (int i = 0; i < 3; i++) {
		snprintf(f.path[i], sizeof(f.path[i]), "%s/%d", dir, i);
		f.list[i] = f.path[i];
		f.source[i] = (struct data_source){ .path = &f.list[i], .n_paths = 1, .format = DATA_JSONL };
	}
	f.c = (struct data_config){ .train = f.source, .n_train = 1, .sequence_length = 8 };
	*state = &f;
	return 0;
}

static int teardown(void **state)
{
	struct files *f = *state;

	for (int i = 0; i < 3; i++)
		unlink(f->path[i]);
	return rmdir(f->dir);
}

static void put(struct files *f, int i, const char *text)
{
	assert_int_equal(file_write_atomic(f->path[i], text, strlen(text), 0600, NULL), 0);
}

static struct data_set *open_good(struct files *f, uint32_t vocab)
{
	struct data_set *d;
	struct err e = { 0 };

	if (data_open(&f->c, 3, vocab, &d, &e))
		fail_msg("%s", e.text);
	return d;
}

static void check_bad(struct files *f, const char *message)
{
	struct data_set *d;
	struct err e = { 0 };

	assert_int_equal(data_open(&f->c, 1, 300, &d, &e), -EINVAL);
	if (!strstr(e.text, message))
		fail_msg("\"%s\" does not hold \"%s\"", e.text, message);
}

/* All windows of the training split, found by the first two tokens of the one wanted. */
static void check_window(struct files *f, uint32_t vocab, const uint32_t *tokens, const uint32_t *targets,
			 const uint32_t *first_key)
{
	struct data_set *d = open_good(f, vocab);
	uint32_t n = f->c.sequence_length, got[3][64];
	bool found = false;

	for (uint64_t step = 1; step <= data_windows(d, DATA_TRAIN) && !found; step++) {
		data_micro_batch(d, DATA_TRAIN, step, 1, 0, 1, got[0], got[1]);
		data_first_keys(d, DATA_TRAIN, step, 1, 0, 1, got[2]);
		found = !memcmp(got[0], tokens, n * sizeof(*tokens));
	}
	assert_true(found);
	assert_memory_equal(got[1], targets, n * sizeof(*targets));
	assert_memory_equal(got[2], first_key, n * sizeof(*first_key));
	data_close(d);
}

/* Three short documents in one window; the end token is a target and no input. */
static void test_packing(void **state)
{
	struct files *f = *state;
	const uint32_t tokens[] = { 'a', 'b', 'c', 'x', 'p', 'p', 'q', 0 };
	const uint32_t targets[] = { 'b', 'c', 256, 256, NO, 'q', 256, NO };
	const uint32_t keys[] = { 0, 0, 0, 3, 4, 4, 4, 7 };
	const uint32_t bytes[] = { 'b', 'c', '\n', '\n', NO, 'q', '\n', NO };
	struct data_set *d;

	put(f, 0,
	    "{\"text\": \"abc\"}\n\n{\"text\": \"x\"}\n{\"text\": \"\"}\n"
	    "{\"prompt\": \"pp\", \"completion\": \"q\"}");
	check_window(f, 300, tokens, targets, keys);
	/* A vocabulary of bytes alone has a newline for the end. */
	check_window(f, 256, tokens, bytes, keys);
	d = open_good(f, 300);
	assert_int_equal(data_windows(d, DATA_TRAIN), 1);
	assert_int_equal(data_tokens(d, DATA_TRAIN), 7);
	assert_true(data_packed(d));
	assert_true(data_memory(d) > 0);
	data_close(d);
}

/* A document longer than a window is cut; characters of several bytes may be cut too. */
static void test_long_documents(void **state)
{
	struct files *f = *state;
	const uint32_t t0[] = { 'a', 'b', 'c', 'd', 'e', 'f', 'g', 0xe2 };
	const uint32_t g0[] = { 'b', 'c', 'd', 'e', 'f', 'g', 0xe2, 0x82 };
	const uint32_t t1[] = { 0x82, 0xac, 'h', 'x', 'y', 0, 0, 0 };
	const uint32_t g1[] = { 0xac, 'h', 256, 'y', 256, NO, NO, NO };
	const uint32_t k0[] = { 0, 0, 0, 0, 0, 0, 0, 0 }, k1[] = { 0, 0, 0, 3, 3, 5, 6, 7 };

	put(f, 0, "{\"text\": \"abcdefg\\u20ach\"}\n{\"text\": \"xy\"}\n");
	check_window(f, 300, t0, g0, k0);
	check_window(f, 300, t1, g1, k1);
	put(f, 0, "{\"text\": \"abcdefg\xe2\x82\xach\"}\n{\"text\": \"xy\"}\n");
	check_window(f, 300, t0, g0, k0);
	check_window(f, 300, t1, g1, k1);
}

/* Of a long prompt only the run before the completion is kept. */
static void test_long_prompts(void **state)
{
	struct files *f = *state;
	const uint32_t tokens[] = { '8', '9', 'a', 'b', 'c', 'd', 'e', 'f' };
	const uint32_t targets[] = { NO, NO, NO, NO, NO, NO, NO, 'X' };
	const uint32_t rest[] = { 'X', 'Y', 0, 0, 0, 0, 0, 0 }, rest_targets[] = { 'Y', 256, NO, NO, NO, NO, NO, NO };
	const uint32_t k0[8] = { 0 }, k1[] = { 0, 0, 2, 3, 4, 5, 6, 7 };
	struct data_set *d;

	put(f, 0, "{\"completion\": \"XY\", \"prompt\": \"0123456789abcdef\"}\n");
	d = open_good(f, 300);
	assert_int_equal(data_windows(d, DATA_TRAIN), 2);
	data_close(d);
	check_window(f, 300, tokens, targets, k0);
	check_window(f, 300, rest, rest_targets, k1);
}

/* Whatever the lengths: every document is there once, whole windows overflow nowhere, and little is left over. */
static void test_every_document(void **state)
{
	struct files *f = *state;
	const size_t room = 1 << 20;
	char *text = malloc(room);
	uint32_t tokens[32], targets[32], keys[32], seen[2000] = { 0 };
	uint64_t inputs = 0;
	struct data_set *d;
	size_t at = 0;

	for (uint32_t i = 0; i < 2000; i++) {
		uint32_t n = 2 + (uint32_t)(rng_u64(9, 9, i) % 29);

		/* Two bytes say which document it is; no byte needs an escape. */
		at += (size_t)snprintf(text + at, room - at, "{\"text\": \"%c%c", (char)(48 + i / 40),
				       (char)(48 + i % 40));
		memset(text + at, '~', n - 2);
		at += n - 2;
		at += (size_t)snprintf(text + at, room - at, "\"}\n");
		inputs += n;
	}
	/* The characters from 48 on hold a backslash, which is escaped to a byte of its own. */
	for (size_t k = 0; k < at; k++)
		text[k] = text[k] == '\\' ? '!' : text[k];
	put(f, 0, text);
	free(text);
	f->c.sequence_length = 32;
	d = open_good(f, 300);
	assert_int_equal(data_tokens(d, DATA_TRAIN), inputs);
	assert_true(data_windows(d, DATA_TRAIN) * 32 <= inputs + inputs / 20);
	for (uint64_t step = 1; step <= data_windows(d, DATA_TRAIN); step++) {
		data_micro_batch(d, DATA_TRAIN, step, 1, 0, 1, tokens, targets);
		data_first_keys(d, DATA_TRAIN, step, 1, 0, 1, keys);
		for (uint32_t k = 0; k < 32; k++) {
			assert_true(keys[k] <= k && (k == 0 || keys[k] >= keys[k - 1]));
			if (keys[k] != k || targets[k] == NO)
				continue;
			tokens[k] = tokens[k] == '!' ? '\\' : tokens[k];
			tokens[k + 1] = tokens[k + 1] == '!' ? '\\' : tokens[k + 1];
			seen[(tokens[k] - 48) * 40 + tokens[k + 1] - 48]++;
		}
	}
	for (uint32_t i = 0; i < 2000; i++)
		assert_int_equal(seen[i], 1);
	data_close(d);
}

static void test_refusals(void **state)
{
	struct files *f = *state;

	put(f, 0, "{\"text\": \"a\"}\n\n{\"text\": 7}\n");
	check_bad(f, "/0:3: \"text\" is not a string");
	put(f, 0, "{\"text\": \"a\"}\n{\"text\": \"b\"");
	check_bad(f, "/0:2: a comma or } was expected at byte 13 of the line");
	put(f, 0, "\n{\"text\": \"\"}\n");
	check_bad(f, "/0: training data has no document for a sample");
	put(f, 0, "{\"text\": \"abc\"}\n");
	f->c.validation_fraction = 0.5;
	check_bad(f, "/0: validation data has no document for a sample");
	f->c.validation_fraction = 0;
	put(f, 0, "\xef\xbb\xbf{\"text\": \"abc\"}\r\n");
	data_close(open_good(f, 300));
}

/* -------------------------------------------------------------------- sources */

static void put_bytes(struct files *f, int i, size_t n, char c)
{
	char *b = malloc(n + 1);

	memset(b, c, n);
	b[n] = '\0';
	put(f, i, b);
	free(b);
	f->source[i].format = DATA_BYTES;
}

/* Without weights all windows are seen once an epoch; streams and documents may stand side by side. */
static void test_unweighted(void **state)
{
	struct files *f = *state;
	uint32_t tokens[8], targets[8], keys[8], count[256] = { 0 };
	struct data_set *d;

	put_bytes(f, 0, 8 * 5 + 1, 'a');
	put(f, 1, "{\"text\": \"bbbbbbbb\"}\n{\"text\": \"bbbbbbbb\"}\n");
	put_bytes(f, 2, 8 * 3 + 1, 'c');
	f->c.n_train = 3;
	d = open_good(f, 300);
	assert_int_equal(data_windows(d, DATA_TRAIN), 10);
	for (uint64_t step = 1; step <= 10; step++) {
		data_micro_batch(d, DATA_TRAIN, step, 1, 0, 1, tokens, targets);
		data_first_keys(d, DATA_TRAIN, step, 1, 0, 1, keys);
		assert_int_equal(keys[7], 0);
		count[tokens[0]]++;
	}
	assert_true(count['a'] == 5 && count['b'] == 2 && count['c'] == 3);
	data_close(d);
	/* A tail of each is held out. */
	f->c.validation_fraction = 0.5;
	d = open_good(f, 300);
	assert_int_equal(data_windows(d, DATA_TRAIN), 2 + 1 + 1);
	assert_int_equal(data_windows(d, DATA_VALIDATION), 2 + 1 + 1);
	data_micro_batch(d, DATA_VALIDATION, 1, 4, 2, 1, tokens, targets);
	assert_int_equal(tokens[0], 'b');
	data_close(d);
}

/* Shares of 65,536 samples are exact, in every block of them, and close to it over much fewer. */
static void test_weights(void **state)
{
	struct files *f = *state;
	uint32_t tokens[64 * 8], targets[64 * 8], count[2][256] = { 0 };
	struct data_set *d, *other;
	uint64_t h[2] = { 0 };

	put_bytes(f, 0, 8 * 5 + 1, 'a');
	put_bytes(f, 1, 8 * 1000 + 1, 'b');
	put_bytes(f, 2, 8 * 30 + 1, 'c');
	f->source[0].weight = 1;
	f->source[1].weight = 2;
	f->source[2].weight = 5;
	f->c.n_train = 3;
	d = open_good(f, 300);
	for (uint64_t step = 1; step <= 2048; step++) {
		data_micro_batch(d, DATA_TRAIN, step, 1, 0, 64, tokens, targets);
		for (uint32_t j = 0; j < 64; j++)
			count[(step - 1) / 1024][tokens[j * 8]]++;
		if (step == 8)
			assert_true(count[0]['c'] > 512 * 5 / 8 - 60 && count[0]['c'] < 512 * 5 / 8 + 60);
	}
	for (int i = 0; i < 2; i++)
		assert_true(count[i]['a'] == 8192 && count[i]['b'] == 16384 && count[i]['c'] == 40960);
	/* A sample's place alone decides, not how a step is cut. */
	data_micro_batch(d, DATA_TRAIN, 3, 1, 0, 64, tokens, targets);
	h[0] = hash64(tokens, sizeof(tokens), 0);
	for (uint32_t i = 0; i < 16; i++)
		data_micro_batch(d, DATA_TRAIN, 3, 16, i, 4, tokens + i * 32, targets);
	assert_true(hash64(tokens, sizeof(tokens), 0) == h[0]);
	f->source[0].weight = 2;
	other = open_good(f, 300);
	assert_true(data_fingerprint(other) != data_fingerprint(d));
	data_close(other);
	data_close(d);
	f->source[0].weight = 1e-6;
	check_bad(f, "/0: its weight is less than 1 in 65536");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_lines),
		cmocka_unit_test(test_bad_lines),
		cmocka_unit_test_setup_teardown(test_packing, setup, teardown),
		cmocka_unit_test_setup_teardown(test_long_documents, setup, teardown),
		cmocka_unit_test_setup_teardown(test_long_prompts, setup, teardown),
		cmocka_unit_test_setup_teardown(test_every_document, setup, teardown),
		cmocka_unit_test_setup_teardown(test_refusals, setup, teardown),
		cmocka_unit_test_setup_teardown(test_unweighted, setup, teardown),
		cmocka_unit_test_setup_teardown(test_weights, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
