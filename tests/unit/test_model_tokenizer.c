/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Ids against Hugging Face's tokenizers, by the files that
 * tests/peers/make_tokenizers.py wrote; what is refused; and data made of text.
 *
 * usage: test_model_tokenizer [directory of the files]
 */
#include "model/model.h"

#include <errno.h>
#include <jansson.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

static char directory[4096];

static char *read_file(const char *name, size_t *bytes)
{
	char path[4200], *text = NULL;
	struct err e = { 0 };

	snprintf(path, sizeof(path), "%s/%s", directory, name);
	if (file_read(path, 1u << 30, &text, bytes, &e))
		fail_msg("%s", e.text);
	return text;
}

static struct tokenizer *open_named(const char *name)
{
	struct tokenizer *t = NULL;
	struct err e = { 0 };
	char path[4200];

	snprintf(path, sizeof(path), "%s/%s.json", directory, name);
	if (tokenizer_open(path, &t, &e))
		fail_msg("%s", e.text);
	return t;
}

/* ------------------------------------------------------------------------ ids */

static void check_case(struct tokenizer *t, const char *name, const json_t *o, size_t number, bool keeps_text)
{
	const json_t *text = json_object_get(o, "text"), *ids = json_object_get(o, "ids");
	size_t bytes = json_string_length(text), at = 0, n;
	struct token_list got = { 0 };
	struct err e = { 0 };

	if (tokenizer_encode(t, json_string_value(text), bytes, &got, &e))
		fail_msg("%s, text %zu: %s", name, number, e.text);
	for (size_t i = 0; i < got.n || i < json_array_size(ids); i++) {
		long long want = i < json_array_size(ids) ? json_integer_value(json_array_get(ids, i)) : -1;
		const uint8_t *p;

		if (i >= got.n || got.id[i] != want)
			fail_msg("%s, text %zu, token %zu: %lld, expected %lld", name, number, i,
				 i < got.n ? (long long)got.id[i] : -1, want);
		p = tokenizer_bytes(t, got.id[i], &n);
		if (keeps_text)
			assert_true(p && at + n <= bytes && !memcmp(json_string_value(text) + at, p, n));
		at += n;
	}
	assert_true(!keeps_text || at == bytes);
	token_list_release(&got);
}

static void test_ids(void **state)
{
	static const struct {
		const char *name;
		bool keeps_text; /* nothing is put before it or composed */
	} of[] = { { "gpt2", true }, { "prefix", false }, { "llama3", true }, { "qwen2", false }, { "smollm", true } };

	(void)state;
	for (size_t k = 0; k < ARRAY_LEN(of); k++) {
		struct tokenizer *t = open_named(of[k].name);
		char name[64], *text;
		size_t bytes, i;
		json_t *cases, *o;

		snprintf(name, sizeof(name), "%s.cases.json", of[k].name);
		text = read_file(name, &bytes);
		cases = json_loadb(text, bytes, JSON_ALLOW_NUL, NULL);
		assert_true(json_array_size(cases) > 20);
		/* Twice: the second time words are known. */
		for (int turn = 0; turn < 2; turn++)
			json_array_foreach(cases, i, o) check_case(t, of[k].name, o, i, of[k].keeps_text);
		json_decref(cases);
		free(text);
		tokenizer_free(t);
	}
}

static void test_template(void **state)
{
	struct tokenizer *t = open_named("llama3");
	const uint32_t *prefix;
	size_t n;

	(void)state;
	prefix = tokenizer_prefix(t, &n);
	assert_int_equal(n, 1);
	assert_int_equal(prefix[0], tokenizer_find(t, "<|begin_of_text|>"));
	tokenizer_suffix(t, &n);
	assert_int_equal(n, 0);
	assert_int_equal(tokenizer_find(t, "<|nothing|>"), TOKENIZER_NONE);
	assert_null(tokenizer_bytes(t, tokenizer_size(t), &n));
	assert_null(tokenizer_bytes(t, UINT32_MAX, &n));
	tokenizer_free(t);
}

static void test_invalid_text(void **state)
{
	struct tokenizer *t = open_named("gpt2");
	struct token_list l = { 0 };
	struct err e = { 0 };

	(void)state;
	assert_int_equal(tokenizer_encode(t, "ab\xc3(", 4, &l, &e), -EINVAL);
	assert_string_equal(e.text, "byte 3 is not UTF-8");
	assert_int_equal(tokenizer_encode(t, "\xed\xa0\x80", 3, &l, &e), -EINVAL);
	assert_int_equal(tokenizer_encode(t, "ab\xc3", 3, &l, &e), -EINVAL);
	assert_int_equal(l.n, 0);
	assert_int_equal(tokenizer_encode(t, "", 0, &l, &e), 0);
	assert_int_equal(l.n, 0);
	tokenizer_free(t);
}

/* ------------------------------------------------------------------- refusals */

/* The file of GPT-2's kind with `json` for one part ("model.dropout"). */
static void expect_refused(const char *part, const char *json, const char *message)
{
	const char *dot = strchr(part, '.');
	json_t *root, *at;
	struct tokenizer *t = NULL;
	struct err e = { 0 };
	char *text;
	size_t bytes;

	text = read_file("gpt2.json", &bytes);
	root = json_loadb(text, bytes, 0, NULL);
	free(text);
	at = dot ? json_object_get(root, "model") : root;
	assert_int_equal(json_object_set_new(at, dot ? dot + 1 : part, json_loads(json, JSON_DECODE_ANY, NULL)), 0);
	text = json_dumps(root, 0);
	json_decref(root);
	assert_int_equal(tokenizer_parse(text, strlen(text), "t.json", &t, &e), -EINVAL);
	free(text);
	if (strncmp(e.text, "t.json", 6) != 0 || !strstr(e.text, message))
		fail_msg("\"%s\" does not hold \"%s\"", e.text, message);
}

static void test_parts_refused(void **state)
{
	static const struct {
		const char *part, *json, *message;
	} bad[] = {
		{ "model", "{\"type\":\"Unigram\",\"vocab\":[]}",
		  "model \"Unigram\" is not supported; only byte-level BPE is" },
		{ "model.type", "\"WordPiece\"", "model \"WordPiece\" is not supported" },
		{ "model.byte_fallback", "true", "model.byte_fallback (SentencePiece) is not supported" },
		{ "model.byte_fallback", "1", "byte_fallback is neither true nor false" },
		{ "model.dropout", "0.1", "model.dropout is not supported" },
		{ "model.end_of_word_suffix", "\"</w>\"", "model.end_of_word_suffix is not supported" },
		{ "model.continuing_subword_prefix", "\"##\"", "model.continuing_subword_prefix is not supported" },
		{ "model.vocab", "{\"a\": 0}", "it has no token for byte 0x00" },
		{ "model.vocab", "{\"a\": -1}", "the id of token \"a\" is not an integer from 0 to 4194303" },
		{ "model.vocab", "{\"a\": 4194304}", "the id of token \"a\" is not an integer" },
		{ "model.vocab", "{\"a\": 1.5}", "the id of token \"a\" is not an integer" },
		{ "model.vocab", "{\"a\": 1, \"b\": 1}", "two tokens have id 1" },
		{ "model.vocab", "[]", "model.vocab is not an object" },
		{ "model.merges", "7", "model.merges is not a list" },
		{ "model.merges", "[\"ab\"]", "merge 0 is no pair of tokens" },
		{ "model.merges", "[\"a b c\"]", "merge 0 is no pair of tokens" },
		{ "model.merges", "[[\"a\"]]", "merge 0 is no pair of tokens" },
		{ "model.merges", "[[\"a\", \"\"]]", "merge 0 is no pair of tokens" },
		{ "model.merges", "[3]", "merge 0 is no pair of tokens" },
		{ "model.merges", "[\"a \\u4e00\"]",
		  "merge 0: \"a\", \"\xe4\xb8\x80\" or both joined is not in the vocabulary" },
		{ "normalizer", "{\"type\":\"NFKC\"}", "normalizer \"NFKC\" is not supported; only NFC or none is" },
		{ "normalizer", "{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"NFC\"},{\"type\":\"Lowercase\"}]}",
		  "normalizer \"Lowercase\" is not supported" },
		{ "pre_tokenizer", "null", "pre_tokenizer \"\" is not supported" },
		{ "pre_tokenizer", "{\"type\":\"Metaspace\"}", "pre_tokenizer \"Metaspace\" is not supported" },
		{ "pre_tokenizer", "{\"type\":\"Digits\"}", "pre_tokenizer has no ByteLevel" },
		{ "pre_tokenizer",
		  "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"ByteLevel\"},{\"type\":\"Digits\"}]}",
		  "pre_tokenizer \"Digits\" behind ByteLevel is not supported" },
		{ "pre_tokenizer",
		  "{\"type\":\"Split\",\"pattern\":{\"String\":\" \"},\"behavior\":\"MergedWithNext\"}",
		  "behavior \"MergedWithNext\" is not supported" },
		{ "pre_tokenizer", "{\"type\":\"Split\",\"behavior\":\"Isolated\"}",
		  "pre_tokenizer Split: no pattern" },
		{ "decoder", "{\"type\":\"WordPiece\"}", "decoder \"WordPiece\" is not supported; only ByteLevel is" },
		{ "post_processor", "{\"type\":\"BertProcessing\"}",
		  "post_processor \"BertProcessing\" is not supported" },
		{ "post_processor", "{\"type\":\"TemplateProcessing\",\"single\":[]}",
		  "the template has no place for the text" },
		{ "post_processor",
		  "{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"x\"}},{\"Sequence\":{\"id\":\"A\"}}]}",
		  "\"x\" has no ids" },
		{ "post_processor",
		  "{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"x\"}}],"
		  "\"special_tokens\":{\"x\":{\"ids\":[70000]}}}",
		  "there is no token 70000" },
		{ "added_tokens", "{}", "added_tokens is not a list" },
		{ "added_tokens", "[{\"id\":500}]", "added token 0 has no content" },
		{ "added_tokens", "[{\"id\":500,\"content\":\"\"}]", "added token 0 has no content" },
		{ "added_tokens", "[{\"id\":500,\"content\":\"x!\",\"lstrip\":true}]",
		  "added token \"x!\": lstrip is not supported" },
		{ "added_tokens", "[{\"id\":500,\"content\":\"x!\",\"single_word\":true}]",
		  "single_word is not supported" },
		{ "added_tokens", "[{\"id\":3,\"content\":\"x!\"}]", "id 3 is another one's in the vocabulary" },
		{ "added_tokens", "[{\"id\":500,\"content\":\"a\"}]", "id 500 is another one's in the vocabulary" },
		{ "added_tokens", "[{\"id\":500,\"content\":\"x!\"},{\"id\":500,\"content\":\"y!\"}]",
		  "id 500 is another one's" },
	};

	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(bad); i++)
		expect_refused(bad[i].part, bad[i].json, bad[i].message);
}

/* What the two dialects read differently, or one of them not at all. */
static void test_patterns_refused(void **state)
{
	static const struct {
		const char *pattern, *message;
	} bad[] = {
		{ "\\\\w+", "\\w is not supported in a regular expression" },
		{ "\\\\bx", "\\b is not supported" },
		{ "\\\\h", "\\h is not supported" },
		{ "a\\\\Kb", "\\K is not supported" },
		{ "[a[bc]]", "a bracket inside of brackets is not supported" },
		{ "[]a]", "a bracket inside of brackets is not supported" },
		{ "[a&&b]", "&& inside of brackets is not supported" },
		{ "[^\\\\S]", "\\S is not supported" },
		{ "a.b", "a dot is not supported" },
		{ "^a", "an anchor is not supported" },
		{ "a{2}+", "a + or ? behind {} is not supported" },
		{ "a{2}?", "a + or ? behind {} is not supported" },
		{ "a{,2}", "{, is not supported" },
		{ "(?i)a", "this kind of group (? is not supported" },
		{ "(?<n>a)", "this kind of group (? is not supported" },
		{ "(*UCP)a", "(* is not supported" },
		{ "\\\\pL", "\\p without {} is not supported" },
		{ "\\\\p{Nonsense}", "the regular expression is not understood: " },
		{ "(a", "the regular expression is not understood: " },
		{ "[a", "the regular expression is not understood: " },
		{ "a\\\\", "a backslash before what is no character is not supported" },
	};

	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
		char json[512];

		snprintf(json, sizeof(json),
			 "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"Regex\":\"%s\"},"
			 "\"behavior\":\"Isolated\"},{\"type\":\"ByteLevel\"}]}",
			 bad[i].pattern);
		expect_refused("pre_tokenizer", json, bad[i].message);
	}
}

static void test_files_refused(void **state)
{
	struct tokenizer *t;
	struct err e = { 0 };

	(void)state;
	assert_int_equal(tokenizer_parse("[]", 2, "t.json", &t, &e), -EINVAL);
	assert_string_equal(e.text, "t.json: not a tokenizer.json: expected an object");
	assert_int_equal(tokenizer_parse("{\n\"a\": }", 8, "t.json", &t, &e), -EINVAL);
	assert_int_equal(strncmp(e.text, "t.json:2: ", 10), 0);
	assert_int_equal(tokenizer_parse("{}", 2, "t.json", &t, &e), -EINVAL);
	assert_int_equal(tokenizer_open("/no/such", &t, &e), -ENOENT);
	assert_int_equal(tokenizer_open("/", &t, &e), -ENOENT);
	assert_non_null(strstr(e.text, "/tokenizer.json: No such file"));
}

/* A pattern that takes too long on a text is an error, not a hang. */
static void test_slow_pattern(void **state)
{
	char *text, *with, slow[61];
	struct tokenizer *t = NULL;
	struct token_list l = { 0 };
	struct err e = { 0 };
	json_t *root;
	size_t bytes;

	(void)state;
	text = read_file("gpt2.json", &bytes);
	root = json_loadb(text, bytes, 0, NULL);
	json_object_set_new(
		root, "pre_tokenizer",
		json_loads("{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"Regex\":"
			   "\"(?:(?:a|aa)+)+[bd]\"},\"behavior\":\"Isolated\"},{\"type\":\"ByteLevel\"}]}",
			   0, NULL));
	with = json_dumps(root, 0);
	assert_int_equal(tokenizer_parse(with, strlen(with), "t.json", &t, &e), 0);
	memset(slow, 'a', 60);
	slow[60] = 'c';
	assert_int_equal(tokenizer_encode(t, slow, sizeof(slow), &l, &e), -EINVAL);
	assert_non_null(strstr(e.text, "step 1 of the pre-tokenizer gave up on a text"));
	assert_int_equal(tokenizer_encode(t, "caab", 4, &l, &e), 0);
	token_list_release(&l);
	tokenizer_free(t);
	json_decref(root);
	free(with);
	free(text);
}

/* ----------------------------------------------------------------------- data */

#define LENGTH 12u

struct fixture {
	char file[2][64], tokenizer[4200], *path[2];
	struct data_source source[2];
	struct data_config c;
};

static void write_file(const char *path, const char *text, size_t n)
{
	assert_int_equal(file_write_atomic(path, text, n, 0600, NULL), 0);
}

static int setup(void **state)
{
	struct fixture *f = calloc(1, sizeof(*f));

	for (int i = 0; i < 2; i++) {
		snprintf(f->file[i], sizeof(f->file[i]), "/tmp/shardmesh_tok_%d_XXXXXX", i);
		close(mkstemp(f->file[i]));
		f->path[i] = f->file[i];
		f->source[i] = (struct data_source){ .path = &f->path[i], .n_paths = 1, .format = DATA_JSONL };
	}
	snprintf(f->tokenizer, sizeof(f->tokenizer), "%s/llama3.json", directory);
	f->c = (struct data_config){ .train = f->source,
				     .n_train = 1,
				     .sequence_length = LENGTH,
				     .tokenizer = f->tokenizer,
				     .eos_token = TOKENIZER_NONE };
	*state = f;
	return 0;
}

static int teardown(void **state)
{
	struct fixture *f = *state;

	unlink(f->file[0]);
	unlink(f->file[1]);
	free(f);
	return 0;
}

static void expect_bad_data(struct fixture *f, uint32_t vocab, const char *message)
{
	struct data_set *d;
	struct err e = { 0 };

	assert_int_equal(data_open(&f->c, 1, vocab, &d, &e), -EINVAL);
	if (!strstr(e.text, message))
		fail_msg("\"%s\" does not hold \"%s\"", e.text, message);
}

static struct data_set *open_data(struct fixture *f)
{
	struct data_set *d = NULL;
	struct err e = { 0 };

	if (data_open(&f->c, 1, 1000, &d, &e))
		fail_msg("%s", e.text);
	return d;
}

/* A document as the window should hold it: the template, the prompt, the text, the end. */
static size_t expected_document(uint32_t *out, const char *prompt, const char *text, const char *end, size_t *n_prompt)
{
	struct tokenizer *t = open_named("llama3");
	struct token_list l = { 0 };
	struct err e = { 0 };
	size_t n = 0;

	out[n++] = tokenizer_find(t, "<|begin_of_text|>");
	assert_int_equal(tokenizer_encode(t, prompt, strlen(prompt), &l, &e), 0);
	*n_prompt = 1 + l.n;
	assert_int_equal(tokenizer_encode(t, text, strlen(text), &l, &e), 0);
	memcpy(out + n, l.id, l.n * sizeof(*out));
	n += l.n;
	out[n++] = tokenizer_find(t, end);
	token_list_release(&l);
	tokenizer_free(t);
	return n;
}

static void test_documents(void **state)
{
	static const char line[] = "{\"prompt\": \"the \\u00e9\", \"completion\": \" the t\"}\n";
	struct fixture *f = *state;
	uint32_t want[64], tokens[LENGTH], targets[LENGTH], keys[LENGTH];
	struct data_set *d;
	size_t n, n_prompt;

	write_file(f->file[0], line, strlen(line));
	expect_bad_data(f, 1000, "nothing says which token ends a document: give end_token, or eos_token_id");
	f->c.end_token = (char *)"<|nothing|>";
	expect_bad_data(f, 1000, "end_token \"<|nothing|>\" is none of its added tokens");
	f->c.end_token = (char *)"<|end_of_text|>";
	d = open_data(f);
	n = expected_document(want, "the \xc3\xa9", " the t", f->c.end_token, &n_prompt);
	assert_true(n_prompt >= 3 && n > n_prompt + 1 && n - 1 <= LENGTH);
	assert_int_equal(data_windows(d, DATA_TRAIN), 1);
	assert_int_equal(data_tokens(d, DATA_TRAIN), n - 1);
	assert_true(data_memory(d) >= n * sizeof(uint32_t));
	data_micro_batch(d, DATA_TRAIN, 1, 1, 0, 1, tokens, targets);
	data_first_keys(d, DATA_TRAIN, 1, 1, 0, 1, keys);
	for (size_t i = 0; i < n - 1; i++) {
		assert_int_equal(tokens[i], want[i]);
		assert_int_equal(targets[i], i + 1 < n_prompt ? DATA_NO_TARGET : want[i + 1]);
		assert_int_equal(keys[i], 0);
	}
	for (size_t i = n - 1; i < LENGTH; i++)
		assert_true(tokens[i] == 0 && targets[i] == DATA_NO_TARGET && keys[i] == i);
	data_close(d);
	/* The model's own end of text, where none is named. */
	f->c.end_token = NULL;
	f->c.eos_token = 7;
	d = open_data(f);
	data_micro_batch(d, DATA_TRAIN, 1, 1, 0, 1, tokens, targets);
	assert_int_equal(targets[n - 2], 7);
	data_close(d);
	f->c.eos_token = 1000;
	expect_bad_data(f, 1000, "the tokenizer's token 1000 (\"\") is beyond the model's vocab_size 1000");
}

/* A long document is cut into windows that go on where the one before ended: every token once a target. */
static void test_long_document(void **state)
{
	struct fixture *f = *state;
	uint32_t tokens[LENGTH], targets[LENGTH], want[600], counted[1000] = { 0 };
	char text[460] = "", line[512];
	struct data_set *d;
	size_t n, n_prompt;

	for (int i = 0; i < 90; i++)
		memcpy(text + 5 * i, "q z7 ", 5);
	snprintf(line, sizeof(line), "{\"text\": \"%s\"}\n", text);
	write_file(f->file[0], line, strlen(line));
	f->c.end_token = (char *)"<|end_of_text|>";
	n = expected_document(want, "", text, f->c.end_token, &n_prompt);
	assert_true(n > 20 * LENGTH);
	d = open_data(f);
	assert_int_equal(data_windows(d, DATA_TRAIN), (n - 1 + LENGTH - 1) / LENGTH);
	for (size_t i = 1; i < n; i++)
		counted[want[i]]++;
	for (uint64_t step = 1; step <= data_windows(d, DATA_TRAIN); step++) {
		data_micro_batch(d, DATA_TRAIN, step, 1, 0, 1, tokens, targets);
		for (uint32_t i = 0; i < LENGTH && targets[i] != DATA_NO_TARGET; i++) {
			assert_true(i + 1 == LENGTH || targets[i + 1] == DATA_NO_TARGET || targets[i] == tokens[i + 1]);
			assert_true(counted[targets[i]]-- > 0);
		}
	}
	for (size_t i = 0; i < ARRAY_LEN(counted); i++)
		assert_int_equal(counted[i], 0);
	data_close(d);
}

static void test_text(void **state)
{
	static const char text[] =
		"the training of\nthe language model, \xe4\xb8\x80\xe4\xba\x8c! the training of the model";
	struct fixture *f = *state;
	struct tokenizer *t = open_named("llama3");
	struct token_list want = { 0 };
	uint32_t tokens[LENGTH], targets[LENGTH];
	struct data_set *d;
	struct err e = { 0 };
	uint64_t fingerprint;

	assert_int_equal(tokenizer_encode(t, text, strlen(text), &want, &e), 0);
	write_file(f->file[0], text, strlen(text));
	f->source[0].format = DATA_TEXT;
	d = open_data(f);
	assert_false(data_packed(d));
	assert_int_equal(data_tokens(d, DATA_TRAIN), want.n);
	assert_true(data_windows(d, DATA_TRAIN) == (want.n - 1) / LENGTH);
	for (uint64_t step = 1; step <= data_windows(d, DATA_TRAIN); step++) {
		size_t at = 0;

		data_micro_batch(d, DATA_TRAIN, step, 1, 0, 1, tokens, targets);
		while (at + LENGTH < want.n && (memcmp(want.id + at, tokens, sizeof(tokens)) != 0 ||
						memcmp(want.id + at + 1, targets, sizeof(targets)) != 0))
			at += LENGTH;
		assert_true(at + LENGTH < want.n);
	}
	fingerprint = data_fingerprint(d);
	data_close(d);
	/* Another tokenizer over the same file is other data. */
	snprintf(f->tokenizer, sizeof(f->tokenizer), "%s/gpt2.json", directory);
	d = open_data(f);
	assert_true(data_fingerprint(d) != fingerprint);
	data_close(d);
	token_list_release(&want);
	tokenizer_free(t);
}

static void test_bad_data(void **state)
{
	struct fixture *f = *state;

	f->c.eos_token = 3;
	f->source[0].format = DATA_TEXT;
	write_file(f->file[0], "abc\xff", 4);
	expect_bad_data(f, 1000, "byte 4 is not UTF-8");
	write_file(f->file[0], "the training of the language model", 34);
	expect_bad_data(f, 100, " is beyond the model's vocab_size 100");
	write_file(f->file[0], "short", 5);
	expect_bad_data(f, 1000, " tokens, and a sample is 13");
	f->source[0].format = DATA_JSONL;
	write_file(f->file[0], "{\"text\": \"a\"}\n{\"text\": \"<|late|>\"}\n", 36);
	expect_bad_data(f, 420, ":2: the tokenizer's token 420 (\"<|late|>\") is beyond the model's vocab_size 420");
	snprintf(f->tokenizer, sizeof(f->tokenizer), "%s/gpt2.cases.json", directory);
	expect_bad_data(f, 1000, "gpt2.cases.json:");
}

int main(int argc, char **argv)
{
	const char *source = getenv("SHARDMESH_SOURCE");
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_ids),
		cmocka_unit_test(test_template),
		cmocka_unit_test(test_invalid_text),
		cmocka_unit_test(test_parts_refused),
		cmocka_unit_test(test_patterns_refused),
		cmocka_unit_test(test_files_refused),
		cmocka_unit_test(test_slow_pattern),
		cmocka_unit_test_setup_teardown(test_documents, setup, teardown),
		cmocka_unit_test_setup_teardown(test_long_document, setup, teardown),
		cmocka_unit_test_setup_teardown(test_text, setup, teardown),
		cmocka_unit_test_setup_teardown(test_bad_data, setup, teardown),
	};

	snprintf(directory, sizeof(directory), "%s/tests/peers/tokenizers", source ? source : ".");
	/* Files made again hold other vocabularies, so only their ids are compared. */
	if (argc > 1) {
		snprintf(directory, sizeof(directory), "%s", argv[1]);
		return cmocka_run_group_tests_name("ids", ((const struct CMUnitTest[]){ cmocka_unit_test(test_ids) }),
						   NULL, NULL);
	}
	return cmocka_run_group_tests(tests, NULL, NULL);
}
