/* SPDX-License-Identifier: Apache-2.0 */
#include "model/model.h"

#include <errno.h>
#include <math.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <cmocka.h>

static char path[] = "/tmp/shardmesh_st_XXXXXX";

static int setup(void **state)
{
	int fd = mkstemp(path);

	(void)state;
	return fd < 0 ? -1 : close(fd);
}

static int teardown(void **state)
{
	(void)state;
	return unlink(path);
}

/* A file of header length n (or the header's own), header and data. */
static int open_bytes(uint64_t n, const char *header, const void *data, size_t bytes, struct st_file *f, struct err *e)
{
	size_t length = strlen(header);
	char *file = malloc(8 + length + bytes + 1);
	int rc;

	memcpy(file, &n, 8);
	memcpy(file + 8, header, length);
	memcpy(file + 8 + length, data, bytes);
	assert_int_equal(file_write_atomic(path, file, 8 + length + bytes, 0600, NULL), 0);
	free(file);
	rc = st_open(path, f, e);
	return rc;
}

static const uint8_t zeros[64];

#define GOLDEN "{\"test\":{\"dtype\":\"I32\",\"shape\":[2,2],\"data_offsets\":[0,16]}}"

static void test_golden(void **state)
{
	struct st_file f;
	struct err e = { 0 };

	(void)state;
	assert_int_equal(strlen(GOLDEN), 0x3c);
	assert_int_equal(open_bytes(0x3c, GOLDEN, zeros, 16, &f, &e), 0);
	assert_int_equal(f.n_tensors, 1);
	assert_string_equal(f.tensor[0].name, "test");
	assert_int_equal(f.tensor[0].dtype, ST_OTHER);
	assert_int_equal(f.data_offset, 8 + 0x3c);
	assert_ptr_equal(st_find(&f, "test"), &f.tensor[0]);
	assert_null(st_find(&f, "tes"));
	assert_int_equal(st_read_f32(&f, &f.tensor[0], 0, 1, &(float){ 0 }, &e), -EINVAL);
	assert_non_null(strstr(e.text, "only F32, F16 and BF16"));
	st_close(&f);
	/* Blanks before and behind the object are legal. */
	assert_int_equal(open_bytes(6, "{}\r \t\n", zeros, 0, &f, &e), 0);
	assert_int_equal(f.n_tensors, 0);
	st_close(&f);
	assert_int_equal(open_bytes(6, "\t\n{}\r ", zeros, 0, &f, &e), 0);
	st_close(&f);
}

/* One tensor "t" of the given fields, and what must be said. */
#define T(fields) "{\"t\":{" fields "}}"
#define F32(shape, begin, end) "\"dtype\":\"F32\",\"shape\":" shape ",\"data_offsets\":[" #begin "," #end "]"

static const struct {
	const char *header;
	size_t data;
	const char *message;
} hostile[] = {
	{ GOLDEN, 32, "something is behind them" },
	{ GOLDEN, 14, "it is cut short" },
	{ T(F32("[2,18446744073709551614]", 0, 16)), 16, "too big integer" },
	{ T(F32("[2,9223372036854775807]", 0, 16)), 16, "tensor \"t\": shape overflows 64 bits" },
	{ T(F32("[-1]", 0, 4)), 4, "dimension 0 of shape is not a non-negative integer" },
	{ T(F32("[1.0]", 0, 4)), 4, "dimension 0 of shape is not a non-negative integer" },
	{ T(F32("1", 0, 4)), 4, "shape is not a list" },
	{ T(F32("[1,1,1,1,1,1,1,1,1]", 0, 4)), 4, "9 dimensions; at most 8" },
	{ T(F32("[1]", 4, 0)), 4, "data_offsets end before they begin" },
	{ T(F32("[1]", -4, 0)), 4, "data_offsets is not a list of two non-negative integers" },
	{ T(F32("[1]", 0, 4.0)), 4, "data_offsets is not a list of two non-negative integers" },
	{ T(F32("[1]", 0, 1e1)), 4, "data_offsets is not a list of two non-negative integers" },
	{ T(F32("[1]", 0, 18446744073709551616)), 4, "too big integer" },
	{ T("\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,\"4\"]"), 4,
	  "data_offsets is not a list of two non-negative integers" },
	{ T("\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,2,4]"), 4, "data_offsets is not a list of two" },
	{ T("\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":{}"), 4, "data_offsets is not a list of two" },
	{ T("\"dtype\":\"F32\",\"shape\":[4611686018427387904,8],\"data_offsets\":[0,0]"), 0,
	  "tensor \"t\": shape overflows 64 bits" },
	{ T("\"shape\":[1],\"data_offsets\":[0,4],\"type\":\"F32\""), 4, "expected exactly dtype, shape and" },
	{ T("\"dtype\":null,\"shape\":[1],\"data_offsets\":[0,4]"), 4, "unknown dtype (not a string)" },
	{ T("\"dtype\":\"f32\",\"shape\":[1],\"data_offsets\":[0,4]"), 4, "unknown dtype f32" },
	{ T(F32("[1]", 4, 8)), 8, "begins at byte 4, where 0 was expected: a hole in the data" },
	{ T(F32("[2]", 0, 4)), 4, "shape and dtype take 8 bytes and data_offsets give 4" },
	{ T("\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0]"), 4, "data_offsets is not a list of two" },
	{ T("\"dtype\":\"F32\",\"shape\":[1]"), 4, "expected exactly dtype, shape and data_offsets" },
	{ T(F32("[1]", 0, 4) ",\"x\":1"), 4, "expected exactly dtype, shape and data_offsets" },
	{ T("\"dtype\":\"F31\",\"shape\":[1],\"data_offsets\":[0,4]"), 4, "unknown dtype F31" },
	{ T("\"dtype\":32,\"shape\":[1],\"data_offsets\":[0,4]"), 4, "unknown dtype (not a string)" },
	{ T("\"dtype\":\"F4\",\"shape\":[3],\"data_offsets\":[0,2]"), 2, "12 bits are no whole number of bytes" },
	{ "{\"t\":[]}", 0, "expected exactly dtype, shape and data_offsets" },
	{ "{\"a\":{" F32("[1]", 0, 4) "},\"b\":{" F32("[1]", 0, 4) "}}", 4, "tensors overlap" },
	{ "{\"a\":{" F32("[2]", 0, 8) "},\"b\":{" F32("[1]", 4, 8) "}}", 8, "tensors overlap" },
	{ "{\"a\":{" F32("[1]", 0, 4) "},\"b\":{" F32("[1]", 8, 12) "}}", 12, "a hole in the data" },
	{ "{\"a\":{" F32("[1]", 0, 4) "},\"a\":{" F32("[1]", 0, 4) "}}", 4, "duplicate object key" },
	{ "{\"a\":{" F32("[1]", 0, 4) ",\"dtype\":\"F32\"}}", 4, "duplicate object key" },
	{ "{\"a\":{" F32("[1]", 0, 4) "},\"\\u0061\":{" F32("[1]", 0, 4) "}}", 4, "duplicate object key" },
	{ "{\"__metadata__\":{\"x\":\"1\",\"x\":\"1\"}}", 0, "duplicate object key" },
	{ "{\"__metadata__\":{},\"__metadata__\":{}}", 0, "duplicate object key" },
	{ "{\"a\\u0000b\":{" F32("[1]", 0, 4) "}}", 4, "NUL byte in object key" },
	{ "{\"__metadata__\":{\"format\":1}}", 0, "__metadata__ \"format\" is not a string" },
	{ "{\"__metadata__\":[]}", 0, "__metadata__ is not an object" },
	{ "[]", 0, "the header is not a JSON object" },
	{ "{} x", 0, "end of file expected" },
	{ "{\"a\":NaN}", 0, "invalid token" },
	{ "{/**/}", 0, "string or '}' expected" },
	{ "{\"\xff\":{}}", 0, "unable to decode byte 0xff" },
	{ "{\"\xc0\xaf\":{}}", 0, "unable to decode byte 0xc0" },
	{ "\xef\xbb\xbf{}", 0, "header, byte" },
	{ "{\"a\":Infinity}", 0, "invalid token" },
	{ "{\"a\":{" F32("[1]", 0, 4) "},}", 4, "string or '}' expected" },
	{ "", 0, "header, byte" },
};

static void test_hostile(void **state)
{
	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(hostile); i++) {
		struct st_file f;
		struct err e = { 0 };

		assert_int_equal(
			open_bytes(strlen(hostile[i].header), hostile[i].header, zeros, hostile[i].data, &f, &e),
			-EINVAL);
		if (!strstr(e.text, hostile[i].message) || strncmp(e.text, path, strlen(path)))
			fail_msg("\"%s\" does not hold \"%s\"", e.text, hostile[i].message);
	}
}

/* The length word is checked before anything is allocated by it. */
static void test_length_word(void **state)
{
	struct st_file f;
	struct err e = { 0 };

	(void)state;
	assert_int_equal(file_write_atomic(path, "1234567", 7, 0600, NULL), 0);
	assert_int_equal(st_open(path, &f, &e), -EINVAL);
	assert_non_null(strstr(e.text, "7 bytes are too few"));
	assert_int_equal(open_bytes(100000001, "{}", zeros, 0, &f, &e), -EINVAL);
	assert_non_null(strstr(e.text, "at most 100000000 are allowed"));
	assert_int_equal(open_bytes(UINT64_MAX, "{}", zeros, 0, &f, &e), -EINVAL);
	assert_non_null(strstr(e.text, "at most 100000000 are allowed"));
	assert_int_equal(open_bytes(3, "{}", zeros, 0, &f, &e), -EINVAL);
	assert_non_null(strstr(e.text, "a header of 3 bytes in a file of 10"));
	assert_int_equal(st_open("/no/such/file", &f, &e), -ENOENT);
	assert_int_equal(st_open("/", &f, &e), -EINVAL);
	assert_non_null(strstr(e.text, "not a regular file"));
	/* A pipe that nobody writes to: refused, not waited for. */
	assert_int_equal(unlink(path), 0);
	assert_int_equal(mkfifo(path, 0600), 0);
	assert_int_equal(st_open(path, &f, &e), -EINVAL);
	assert_non_null(strstr(e.text, "not a regular file"));
	assert_int_equal(unlink(path), 0);
}

/* Zeros behind the object are no blanks, and no more of the header is read than its length says. */
static void test_tail_of_header(void **state)
{
	static const char padded[] = "{}\0\0\0\0\0\0";
	uint64_t n = 8;
	uint8_t file[16];
	struct st_file f;
	struct err e = { 0 };

	(void)state;
	memcpy(file, &n, 8);
	memcpy(file + 8, padded, 8);
	assert_int_equal(file_write_atomic(path, file, sizeof(file), 0600, NULL), 0);
	assert_int_equal(st_open(path, &f, &e), -EINVAL);
	assert_non_null(strstr(e.text, "header, byte"));
	n = 0;
	memcpy(file, &n, 8);
	assert_int_equal(file_write_atomic(path, file, 8, 0600, NULL), 0);
	assert_int_equal(st_open(path, &f, &e), -EINVAL);
	assert_non_null(strstr(e.text, "header, byte"));
	assert_int_equal(open_bytes(2, "{} ", zeros, 0, &f, &e), -EINVAL);
	assert_non_null(strstr(e.text, "something is behind them"));
}

/* Nesting beyond jansson's limit is an error, not a stack overflow. */
static void test_nesting(void **state)
{
	static char deep[100001];
	struct st_file f;
	struct err e = { 0 };

	(void)state;
	memset(deep, '[', sizeof(deep) - 1);
	assert_int_equal(open_bytes(sizeof(deep) - 1, deep, zeros, 0, &f, &e), -EINVAL);
	assert_non_null(strstr(e.text, "maximum parsing depth"));
	for (size_t i = 0; i + 5 < sizeof(deep); i += 5)
		memcpy(deep + i, "{\"a\":", 5);
	assert_int_equal(open_bytes(sizeof(deep) - 1, deep, zeros, 0, &f, &e), -EINVAL);
	assert_non_null(strstr(e.text, "maximum parsing depth"));
}

/* Scalars and tensors without elements are legal, in any order of keys. */
static void test_odd_shapes(void **state)
{
	struct st_file f;
	struct err e = { 0 };
	float x;

	(void)state;
	assert_int_equal(open_bytes(strlen("{\"s\":{" F32("[]", 0, 4) "},\"none\":{" F32("[3,0]", 0, 0) "}}"),
				    "{\"s\":{" F32("[]", 0, 4) "},\"none\":{" F32("[3,0]", 0, 0) "}}", zeros, 4, &f,
				    &e),
			 0);
	assert_int_equal(f.n_tensors, 2);
	assert_string_equal(f.tensor[0].name, "none");
	assert_int_equal(st_find(&f, "s")->n_dims, 0);
	assert_int_equal(st_read_f32(&f, st_find(&f, "s"), 0, 1, &x, &e), 0);
	assert_int_equal(st_read_f32(&f, st_find(&f, "none"), 0, 0, &x, &e), 0);
	st_close(&f);
}

static void test_values(void **state)
{
	static const struct {
		uint16_t half;
		float value;
	} halves[] = {
		{ 0x0000, 0.0f },     { 0x8000, -0.0f },     { 0x3c00, 1.0f },     { 0xc000, -2.0f },
		{ 0x7bff, 65504.0f }, { 0x0400, 0x1p-14f },  { 0x0001, 0x1p-24f }, { 0x83ff, -0x1.ff8p-15f },
		{ 0x7c00, INFINITY }, { 0xfc00, -INFINITY },
	};
	static const char header[] = "{\"b\":{\"dtype\":\"BF16\",\"shape\":[3],\"data_offsets\":[0,6]},"
				     "\"h\":{\"dtype\":\"F16\",\"shape\":[11],\"data_offsets\":[6,28]}}";
	uint16_t raw[14] = { 0x3f80, 0xc049, 0x7fc0 };
	struct st_file f;
	struct err e = { 0 };
	float x[11];

	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(halves); i++)
		raw[3 + i] = halves[i].half;
	raw[13] = 0x7e01;
	assert_int_equal(open_bytes(strlen(header), header, raw, sizeof(raw), &f, &e), 0);
	assert_int_equal(st_read_f32(&f, st_find(&f, "b"), 0, 3, x, &e), 0);
	assert_true(x[0] == 1.0f && x[1] == -3.140625f && isnan(x[2]));
	assert_int_equal(st_read_f32(&f, st_find(&f, "h"), 0, 11, x, &e), 0);
	for (size_t i = 0; i < ARRAY_LEN(halves); i++)
		assert_memory_equal(&x[i], &halves[i].value, sizeof(x[i]));
	assert_true(isnan(x[10]));
	assert_int_equal(st_read_f32(&f, st_find(&f, "h"), 2, 1, x, &e), 0);
	assert_true(x[0] == 1.0f);
	assert_int_equal(truncate(path, (off_t)f.data_offset + 10), 0);
	assert_int_equal(st_read_f32(&f, st_find(&f, "h"), 0, 11, x, &e), -ENODATA);
	st_close(&f);
}

/* Many elements of each type, across the blocks in which they are converted. */
static void test_long_tensor(void **state)
{
	enum { N = 20001 };
	static const char header[] = "{\"b\":{\"dtype\":\"BF16\",\"shape\":[20001],\"data_offsets\":[80004,120006]},"
				     "\"f\":{\"dtype\":\"F32\",\"shape\":[3,6667],\"data_offsets\":[0,80004]}}";
	static struct __attribute__((packed)) {
		float f[N];
		uint16_t b[N];
	} data;
	static float x[N];
	struct st_file f;
	struct err e = { 0 };

	(void)state;
	for (uint32_t i = 0; i < N; i++) {
		float whole = (float)(i % 256);
		uint32_t bits;

		memcpy(&bits, &whole, sizeof(bits));
		data.f[i] = (float)i;
		data.b[i] = (uint16_t)(bits >> 16);
	}
	assert_int_equal(open_bytes(strlen(header), header, &data, sizeof(data), &f, &e), 0);
	assert_int_equal(st_read_f32(&f, st_find(&f, "f"), 5, N - 5, x, &e), 0);
	for (uint32_t i = 5; i < N; i++)
		assert_true(x[i - 5] == (float)i);
	assert_int_equal(st_read_f32(&f, st_find(&f, "b"), 5, N - 5, x, &e), 0);
	for (uint32_t i = 5; i < N; i++)
		assert_true(x[i - 5] == (float)(i % 256));
	st_close(&f);
}

/* What we write, the reader takes, and it stands as the reference writer would have it. */
static void test_writer(void **state)
{
	static const char begin[] = "{\"__metadata__\":{\"format\":\"pt\"},"
				    "\"lm_head.weight\":{\"dtype\":\"F32\",\"shape\":[16,8],\"data_offsets\":[0,512]},"
				    "\"transformer.h.0.attn.c_attn.bias\":{\"dtype\":\"F32\",\"shape\":[24],"
				    "\"data_offsets\":[512,608]},";
	struct model_config m = { .vocab_size = 16, .n_positions = 4, .n_embd = 8, .n_layer = 11, .n_inner = 32 };
	uint32_t order[200];
	struct unit_table t;
	struct st_file f;
	struct err e = { 0 };
	char *header;
	size_t bytes;
	FILE *out;

	(void)state;
	assert_int_equal(unit_table_init(&t, &m, &e), 0);
	assert_true(t.n_tensors <= ARRAY_LEN(order));
	assert_int_equal(st_header_for(&t, &header, &bytes, order, &e), 0);
	assert_int_equal(bytes % 8, 0);
	assert_int_equal(strncmp(header + 8, begin, strlen(begin)), 0);
	out = fopen(path, "w");
	assert_int_equal(fwrite(header, 1, bytes, out), bytes);
	fclose(out);
	assert_int_equal(truncate(path, (off_t)(bytes + t.n_parameters * 4)), 0);
	if (st_open(path, &f, &e))
		fail_msg("%s", e.text);
	assert_int_equal(f.n_tensors, t.n_tensors);
	assert_int_equal(f.data_offset, bytes);
	for (uint32_t i = 0; i < t.n_tensors; i++) {
		const struct tensor_info *x = &t.tensor[order[i]];
		const struct st_tensor *s = &f.tensor[i];

		assert_string_equal(s->name, x->name);
		assert_int_equal(s->dtype, ST_F32);
		assert_int_equal(s->n_dims, x->n_dims);
		assert_memory_equal(s->shape, x->shape, x->n_dims * sizeof(*s->shape));
		assert_int_equal(s->end - s->begin, x->n * 4);
		/* By name: h.10 stands before h.2, as strings are sorted. */
		assert_true(!i || strcmp(f.tensor[i - 1].name, s->name) < 0);
	}
	st_close(&f);
	free(header);
	unit_table_release(&t);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_golden),         cmocka_unit_test(test_hostile),
		cmocka_unit_test(test_length_word),    cmocka_unit_test(test_nesting),
		cmocka_unit_test(test_tail_of_header), cmocka_unit_test(test_odd_shapes),
		cmocka_unit_test(test_values),         cmocka_unit_test(test_long_tensor),
		cmocka_unit_test(test_writer),
	};

	return cmocka_run_group_tests(tests, setup, teardown);
}
