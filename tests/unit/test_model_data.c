/* SPDX-License-Identifier: Apache-2.0 */
#include "model/model.h"

#include <errno.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

/* Files of a test, in a directory of its own. */
struct files {
	char dir[64];
	char path[4][96];
	char *list[4];
	struct data_source source[4];
};

/* The first n files as one source, in the fixture's slot `at`. */
static struct data_source *source(struct files *f, int at, int first, uint32_t n, enum data_format format)
{
	f->source[at] = (struct data_source){ .path = &f->list[first], .n_paths = n, .format = format };
	return &f->source[at];
}

static int setup(void **state)
{
	static struct files f;
	char dir[] = "/tmp/shardmesh_data_XXXXXX";

	if (!mkdtemp(dir))
		return -1;
	snprintf(f.dir, sizeof(f.dir), "%s", dir);
	for (int i = 0; i < 4; i++) {
		snprintf(f.path[i], sizeof(f.path[i]), "%s/%d", dir, i);
		f.list[i] = f.path[i];
	}
	*state = &f;
	return 0;
}

static int teardown(void **state)
{
	struct files *f = *state;

	for (int i = 0; i < 4; i++)
		unlink(f->path[i]);
	return rmdir(f->dir);
}

static void put(struct files *f, int i, const void *data, size_t bytes)
{
	assert_int_equal(file_write_atomic(f->path[i], data, bytes, 0600, NULL), 0);
}

static void put_bytes(struct files *f, int i, size_t n, unsigned first)
{
	uint8_t *b = malloc(n);

	for (size_t k = 0; k < n; k++)
		b[k] = (uint8_t)(first + k);
	put(f, i, b, n);
	free(b);
}

/* An llm.c file of n tokens k % modulus, `width` bytes each. */
static void put_llmc(struct files *f, int i, uint32_t magic, uint32_t version, uint32_t n, uint32_t width,
		     uint32_t modulus)
{
	size_t bytes = 1024 + (size_t)n * width;
	uint8_t *b = calloc(1, bytes);
	uint32_t header[3] = { magic, version, n };

	memcpy(b, header, sizeof(header));
	for (uint32_t k = 0; k < n; k++) {
		uint32_t t = k % modulus;

		memcpy(b + 1024 + (size_t)k * width, &t, width);
	}
	put(f, i, b, bytes);
	free(b);
}

static struct data_set *open_good(const struct data_config *c, uint64_t seed, uint32_t vocab)
{
	struct data_set *d;
	struct err e = { 0 };

	if (data_open(c, seed, vocab, &d, &e))
		fail_msg("%s", e.text);
	return d;
}

static void check_bad(const struct data_config *c, uint32_t vocab, const char *message)
{
	struct data_set *d;
	struct err e = { 0 };

	assert_int_equal(data_open(c, 1, vocab, &d, &e), -EINVAL);
	if (!strstr(e.text, message))
		fail_msg("\"%s\" does not hold \"%s\"", e.text, message);
}

/* Windows tile the stream across the borders of files, targets are one behind, and an epoch sees each window once. */
static void test_windows(void **state)
{
	struct files *f = *state;
	struct data_config c = { .train = source(f, 0, 0, 3, DATA_BYTES), .n_train = 1, .sequence_length = 5 };
	struct data_set *d;
	bool seen[20] = { false };
	uint32_t tokens[4 * 5], targets[4 * 5];

	put_bytes(f, 0, 3, 0);
	put_bytes(f, 1, 50, 3);
	put_bytes(f, 2, 48, 53);
	d = open_good(&c, 1, 256);
	assert_int_equal(data_tokens(d, DATA_TRAIN), 101);
	assert_int_equal(data_windows(d, DATA_TRAIN), 20);
	assert_int_equal(data_windows(d, DATA_VALIDATION), 0);
	for (uint32_t index = 0; index < 5; index++) {
		data_micro_batch(d, DATA_TRAIN, 1, 5, index, 4, tokens, targets);
		for (uint32_t j = 0; j < 4; j++) {
			assert_int_equal(tokens[j * 5] % 5, 0);
			assert_false(seen[tokens[j * 5] / 5]);
			seen[tokens[j * 5] / 5] = true;
			for (uint32_t k = 0; k < 5; k++) {
				assert_int_equal(tokens[j * 5 + k], tokens[j * 5] + k);
				assert_int_equal(targets[j * 5 + k], tokens[j * 5 + k] + 1);
			}
		}
	}
	data_close(d);
}

/* The order depends on seed and epoch, and on the sample's place alone: not on how a step is cut. */
static void test_order(void **state)
{
	struct files *f = *state;
	struct data_config c = { .train = source(f, 0, 0, 1, DATA_BYTES), .n_train = 1, .sequence_length = 2 };
	uint32_t a[24 * 2], b[24 * 2], targets[24 * 2];
	struct data_set *d, *other;

	put_bytes(f, 0, 49, 0); /* 24 windows */
	d = open_good(&c, 1, 256);
	data_micro_batch(d, DATA_TRAIN, 1, 1, 0, 24, a, targets);
	for (uint32_t i = 0; i < 12; i++)
		data_micro_batch(d, DATA_TRAIN, 1 + i / 3, 3, i % 3, 2, b + i * 4, targets);
	assert_memory_equal(a, b, sizeof(a));
	data_micro_batch(d, DATA_TRAIN, 2, 1, 0, 24, b, targets);
	assert_memory_not_equal(a, b, sizeof(a));
	other = open_good(&c, 2, 256);
	data_micro_batch(other, DATA_TRAIN, 1, 1, 0, 24, b, targets);
	assert_memory_not_equal(a, b, sizeof(a));
	data_close(other);
	data_close(d);
}

static void test_validation(void **state)
{
	struct files *f = *state;
	struct data_config c = {
		.train = source(f, 0, 0, 1, DATA_BYTES), .n_train = 1, .sequence_length = 3, .validation_fraction = 0.25
	};
	uint32_t tokens[8 * 3], again[8 * 3], targets[8 * 3];
	struct data_set *d;

	put_bytes(f, 0, 120, 0);
	d = open_good(&c, 1, 256);
	assert_int_equal(data_tokens(d, DATA_TRAIN), 90);
	assert_int_equal(data_tokens(d, DATA_VALIDATION), 30);
	assert_int_equal(data_windows(d, DATA_VALIDATION), 9);
	/* Every training window, and its target, is before the held-out tail. */
	for (uint64_t step = 1; step <= data_windows(d, DATA_TRAIN); step++) {
		data_micro_batch(d, DATA_TRAIN, step, 1, 0, 1, tokens, targets);
		assert_true(targets[2] < 90);
	}
	/* Evaluation: fixed windows at even distances, whatever the step. */
	data_micro_batch(d, DATA_VALIDATION, 1, 2, 0, 4, tokens, targets);
	data_micro_batch(d, DATA_VALIDATION, 1, 2, 1, 4, tokens + 12, targets + 12);
	for (uint32_t i = 0; i < 8; i++)
		assert_int_equal(tokens[i * 3], 90 + i * 9 / 8 * 3);
	data_micro_batch(d, DATA_VALIDATION, 99, 2, 0, 4, again, targets);
	assert_memory_equal(tokens, again, 12 * sizeof(*again));
	data_close(d);
	put_bytes(f, 1, 40, 7);
	c = (struct data_config){
		.train = source(f, 0, 0, 1, DATA_BYTES),
		.n_train = 1,
		.sequence_length = 3,
		.validation = source(f, 1, 1, 1, DATA_BYTES),
		.n_validation = 1,
	};
	d = open_good(&c, 1, 256);
	assert_int_equal(data_tokens(d, DATA_TRAIN), 120);
	assert_int_equal(data_tokens(d, DATA_VALIDATION), 40);
	data_micro_batch(d, DATA_VALIDATION, 1, 1, 0, 1, tokens, targets);
	assert_int_equal(tokens[0], 7);
	data_close(d);
}

static void test_token_files(void **state)
{
	struct files *f = *state;
	struct data_config c = { .train = source(f, 0, 0, 2, DATA_LLMC), .n_train = 1, .sequence_length = 4 };
	uint32_t tokens[4], targets[4];
	uint16_t raw[9] = { 300, 301, 302, 303, 304, 305, 306, 307, 308 };
	struct data_set *d;

	put_llmc(f, 0, 20240520, 1, 100, 2, 50000);
	put_llmc(f, 1, 20240801, 7, 101, 4, 70000);
	d = open_good(&c, 1, 100000);
	assert_int_equal(data_tokens(d, DATA_TRAIN), 201);
	data_micro_batch(d, DATA_TRAIN, 1, 1, 0, 1, tokens, targets);
	assert_int_equal(targets[0], tokens[1]);
	assert_int_equal(tokens[0] % 4, 0);
	data_close(d);
	put(f, 2, raw, sizeof(raw));
	c = (struct data_config){ .train = source(f, 0, 2, 1, DATA_NANOGPT), .n_train = 1, .sequence_length = 8 };
	d = open_good(&c, 1, 309);
	data_micro_batch(d, DATA_TRAIN, 1, 1, 0, 1, (uint32_t[8]){ 0 }, (uint32_t[8]){ 0 });
	assert_int_equal(data_tokens(d, DATA_TRAIN), 9);
	data_close(d);
}

static void test_refusals(void **state)
{
	struct files *f = *state;
	struct data_config c = { .train = source(f, 0, 0, 1, DATA_BYTES), .n_train = 1, .sequence_length = 8 };
	struct data_set *d;
	struct err e = { 0 };
	uint16_t *many = calloc(200000, sizeof(*many));

	put_bytes(f, 0, 8, 0);
	check_bad(&c, 256, "training data has 8 tokens, and a sample is 9 (sequence_length 8 and the token behind it)");
	c.validation_fraction = 0.01;
	put_bytes(f, 0, 100, 0);
	check_bad(&c, 256, "validation data has 1 tokens, and a sample is 9");
	c.validation_fraction = 0;
	put(f, 0, "", 0);
	check_bad(&c, 256, "the file is empty");
	c.train->path = (char *[]){ f->dir };
	check_bad(&c, 256, "training data must be a regular file");
	c.train->path = (char *[]){ (char *)"/no/such/file" };
	assert_int_equal(data_open(&c, 1, 256, &d, &e), -ENOENT);
	assert_string_equal(e.text, "/no/such/file: No such file or directory");
	c.train = source(f, 0, 0, 1, DATA_NANOGPT);
	put_bytes(f, 0, 101, 0);
	check_bad(&c, 65536, "101 bytes are no whole number of 16-bit tokens");
	many[199999] = 50257;
	put(f, 0, many, 400000);
	check_bad(&c, 50257, "token 199999 is 50257, and the model's vocab_size is 50257");
	data_close(open_good(&c, 1, 50258));
	c.train->format = DATA_LLMC;
	check_bad(&c, 50257, "not an llm.c token file: magic 0 version 0");
	put_bytes(f, 0, 1023, 0);
	check_bad(&c, 50257, "1023 bytes are too few for llm.c's header of 1024");
	put_llmc(f, 0, 20240520, 1, 100, 2, 7);
	assert_int_equal(truncate(f->path[0], 1024 + 198), 0);
	check_bad(&c, 50257, "the header says 100 tokens, so 1224 bytes; the file has 1222");
	put_llmc(f, 0, 20240801, 1, 100, 4, 7);
	check_bad(&c, 50257, "magic 20240801 version 1; known are 20240520 version 1 and 20240801 version 7");
	put_llmc(f, 0, 20240801, 7, 100, 4, 100);
	check_bad(&c, 99, "token 99 is 99, and the model's vocab_size is 99");
	free(many);
}

/* Samples of files without weights stand where they always stood: a job that is resumed sees the same data. */
static void test_golden(void **state)
{
	struct files *f = *state;
	struct data_config c = {
		.train = source(f, 0, 0, 2, DATA_BYTES), .n_train = 1, .sequence_length = 7, .validation_fraction = 0.2
	};
	uint32_t tokens[4 * 7], targets[4 * 7];
	uint8_t a[1000], b[777];
	struct data_set *d;
	uint64_t h = 0;

	for (uint32_t i = 0; i < sizeof(a); i++)
		a[i] = (uint8_t)(i * i * 7 + i / 3);
	for (uint32_t i = 0; i < sizeof(b); i++)
		b[i] = (uint8_t)(i * 13 + 5);
	put(f, 0, a, sizeof(a));
	put(f, 1, b, sizeof(b));
	d = open_good(&c, 5, 256);
	for (uint32_t i = 0; i < 199 * 3; i++) {
		data_micro_batch(d, DATA_TRAIN, 1 + i / 3, 3, i % 3, 4, tokens, targets);
		h = hash64(targets, sizeof(targets), hash64(tokens, sizeof(tokens), h));
	}
	for (uint32_t i = 0; i < 5; i++) {
		data_micro_batch(d, DATA_VALIDATION, 0, 5, i, 4, tokens, targets);
		h = hash64(targets, sizeof(targets), hash64(tokens, sizeof(tokens), h));
	}
	assert_true(h == UINT64_C(0xf886aeba79fb95a0));
	assert_true(data_fingerprint(d) == UINT64_C(0x8e2d64278b597633));
	assert_false(data_packed(d));
	assert_int_equal(data_memory(d), 0);
	data_close(d);
}

static void test_fingerprint(void **state)
{
	struct files *f = *state;
	struct data_config c = { .train = source(f, 0, 0, 1, DATA_BYTES), .n_train = 1, .sequence_length = 8 };
	struct data_set *d;
	uint64_t first;

	put_bytes(f, 0, 100000, 0);
	d = open_good(&c, 1, 256);
	first = data_fingerprint(d);
	data_close(d);
	d = open_good(&c, 2, 256);
	assert_true(data_fingerprint(d) == first);
	data_close(d);
	put_bytes(f, 0, 100001, 0);
	d = open_good(&c, 1, 256);
	assert_true(data_fingerprint(d) != first);
	data_close(d);
	put_bytes(f, 0, 100000, 1);
	d = open_good(&c, 1, 256);
	assert_true(data_fingerprint(d) != first);
	data_close(d);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(test_windows, setup, teardown),
		cmocka_unit_test_setup_teardown(test_order, setup, teardown),
		cmocka_unit_test_setup_teardown(test_validation, setup, teardown),
		cmocka_unit_test_setup_teardown(test_token_files, setup, teardown),
		cmocka_unit_test_setup_teardown(test_refusals, setup, teardown),
		cmocka_unit_test_setup_teardown(test_golden, setup, teardown),
		cmocka_unit_test_setup_teardown(test_fingerprint, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
