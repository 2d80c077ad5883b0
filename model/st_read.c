/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Reads safetensors files (huggingface/safetensors, README "Format"), and
 * trusts nothing in them: the length word is compared with the file's size
 * before anything is allocated, every key is known or the file is refused, and
 * the tensors must cover the data section exactly, without hole, overlap or
 * tail, so that no byte is read twice and none hides another file. Files are
 * read with pread: one that shrinks meanwhile gives an error, not a signal.
 */
#include "model/model.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define HEADER_BYTES_MAX 100000000u
#define CONVERT_BLOCK 8192u

/* Every type of the format with its bits; those we cannot turn into fp32 are legal all the same. */
static const struct {
	const char *name;
	unsigned bits;
	enum st_dtype dtype;
} dtypes[] = {
	{ "BOOL", 8, ST_OTHER },    { "F4", 4, ST_OTHER },          { "F6_E2M3", 6, ST_OTHER },
	{ "F6_E3M2", 6, ST_OTHER }, { "U8", 8, ST_OTHER },          { "I8", 8, ST_OTHER },
	{ "F8_E5M2", 8, ST_OTHER }, { "F8_E4M3", 8, ST_OTHER },     { "F8_E8M0", 8, ST_OTHER },
	{ "I16", 16, ST_OTHER },    { "F8_E4M3FNUZ", 8, ST_OTHER }, { "F8_E5M2FNUZ", 8, ST_OTHER },
	{ "U16", 16, ST_OTHER },    { "F16", 16, ST_F16 },          { "BF16", 16, ST_BF16 },
	{ "I32", 32, ST_OTHER },    { "U32", 32, ST_OTHER },        { "F32", 32, ST_F32 },
	{ "C64", 64, ST_OTHER },    { "F64", 64, ST_OTHER },        { "I64", 64, ST_OTHER },
	{ "U64", 64, ST_OTHER },
};

struct reader {
	struct st_file *f;
	uint64_t data_bytes;
	struct err *e;
};

static int fail(const struct reader *r, const char *tensor, const char *fmt, ...) PRINTF_LIKE(3, 4);

static int fail(const struct reader *r, const char *tensor, const char *fmt, ...)
{
	char text[512];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	if (tensor)
		return err_set(r->e, -EINVAL, "%s: tensor \"%.200s\": %s", r->f->path, tensor, text);
	return err_set(r->e, -EINVAL, "%s: %s", r->f->path, text);
}

/* --------------------------------------------------------------------- header */

/* The header's bytes, NUL-ended; malloced. Checks the length word first. */
static int read_header(struct reader *r, char **text)
{
	struct stat st;
	uint64_t n;
	int rc;

	if (fstat(r->f->fd, &st))
		return err_set(r->e, -errno, "%s: %s", r->f->path, strerror(errno));
	if (!S_ISREG(st.st_mode))
		return fail(r, NULL, "not a regular file");
	if (st.st_size < 8)
		return fail(r, NULL, "%lld bytes are too few for a safetensors file", (long long)st.st_size);
	rc = pread_full(r->f->fd, &n, sizeof(n), 0);
	if (rc)
		return err_set(r->e, rc, "%s: %s", r->f->path, strerror(-rc));
	if (n > HEADER_BYTES_MAX)
		return fail(r, NULL, "a header of %llu bytes; at most %u are allowed", (unsigned long long)n,
			    HEADER_BYTES_MAX);
	if (n > (uint64_t)st.st_size - 8)
		return fail(r, NULL,
			    "a header of %llu bytes in a file of %lld: the file is cut short or is no safetensors",
			    (unsigned long long)n, (long long)st.st_size);
	*text = malloc(n + 1);
	if (!*text)
		return err_set(r->e, -ENOMEM, "%s: out of memory for a header of %llu bytes", r->f->path,
			       (unsigned long long)n);
	rc = pread_full(r->f->fd, *text, n, 8);
	if (rc) {
		free(*text);
		return err_set(r->e, rc, "%s: %s", r->f->path, strerror(-rc));
	}
	(*text)[n] = '\0';
	r->f->data_offset = 8 + n;
	r->data_bytes = (uint64_t)st.st_size - 8 - n;
	return 0;
}

static int check_metadata(const struct reader *r, const json_t *o)
{
	const char *key;
	json_t *v;

	if (!json_is_object(o))
		return fail(r, NULL, "__metadata__ is not an object");
	json_object_foreach((json_t *)o, key, v) if (!json_is_string(v)) return fail(
		r, NULL, "__metadata__ \"%.100s\" is not a string", key);
	return 0;
}

/* A non-negative JSON integer; jansson refuses those beyond 2^63 itself. */
static bool read_size(const json_t *v, uint64_t *out)
{
	if (!json_is_integer(v) || json_integer_value(v) < 0)
		return false;
	*out = (uint64_t)json_integer_value(v);
	return true;
}

static int read_shape(const struct reader *r, const json_t *v, struct st_tensor *t)
{
	if (!json_is_array(v))
		return fail(r, t->name, "shape is not a list");
	if (json_array_size(v) > ARRAY_LEN(t->shape))
		return fail(r, t->name, "%zu dimensions; at most %zu are supported", json_array_size(v),
			    ARRAY_LEN(t->shape));
	for (size_t i = 0; i < json_array_size(v); i++)
		if (!read_size(json_array_get(v, i), &t->shape[i]))
			return fail(r, t->name, "dimension %zu of shape is not a non-negative integer", i);
	t->n_dims = (uint32_t)json_array_size(v);
	return 0;
}

static int read_offsets(const struct reader *r, const json_t *v, struct st_tensor *t)
{
	if (!json_is_array(v) || json_array_size(v) != 2 || !read_size(json_array_get(v, 0), &t->begin) ||
	    !read_size(json_array_get(v, 1), &t->end))
		return fail(r, t->name, "data_offsets is not a list of two non-negative integers");
	if (t->end < t->begin)
		return fail(r, t->name, "data_offsets end before they begin");
	return 0;
}

/* Bytes of shape times the type's bits; own messages for overflow and for odd bits. */
static int check_size(const struct reader *r, const struct st_tensor *t, unsigned bits)
{
	uint64_t n = bits;

	for (uint32_t i = 0; i < t->n_dims; i++)
		if (__builtin_mul_overflow(n, t->shape[i], &n))
			return fail(r, t->name, "shape overflows 64 bits");
	if (n % 8)
		return fail(r, t->name, "%llu bits are no whole number of bytes", (unsigned long long)n);
	if (n / 8 != t->end - t->begin)
		return fail(r, t->name, "shape and dtype take %llu bytes and data_offsets give %llu",
			    (unsigned long long)(n / 8), (unsigned long long)(t->end - t->begin));
	return 0;
}

static int read_tensor(const struct reader *r, const char *name, const json_t *o, struct st_tensor *t)
{
	const char *dtype;
	size_t i;
	int rc;

	t->name = strdup(name);
	if (!t->name)
		return err_set(r->e, -ENOMEM, "%s: out of memory", r->f->path);
	if (!json_is_object(o) || json_object_size(o) != 3 || !json_object_get(o, "dtype") ||
	    !json_object_get(o, "shape") || !json_object_get(o, "data_offsets"))
		return fail(r, name, "expected exactly dtype, shape and data_offsets");
	dtype = json_string_value(json_object_get(o, "dtype"));
	for (i = 0; dtype && i < ARRAY_LEN(dtypes); i++)
		if (!strcmp(dtype, dtypes[i].name))
			break;
	if (!dtype || i == ARRAY_LEN(dtypes))
		return fail(r, name, "unknown dtype %.40s", dtype ? dtype : "(not a string)");
	t->dtype = dtypes[i].dtype;
	rc = read_shape(r, json_object_get(o, "shape"), t);
	if (!rc)
		rc = read_offsets(r, json_object_get(o, "data_offsets"), t);
	return rc ? rc : check_size(r, t, dtypes[i].bits);
}

static int compare_begin(const void *a, const void *b)
{
	const struct st_tensor *x = a, *y = b;

	if (x->begin != y->begin)
		return x->begin < y->begin ? -1 : 1;
	return x->end < y->end ? -1 : x->end > y->end;
}

/* Sorted by begin, each tensor must start where the one before it ended, and the last end with the file. */
static int check_cover(const struct reader *r)
{
	const struct st_file *f = r->f;
	uint64_t at = 0;

	for (uint32_t i = 0; i < f->n_tensors; i++) {
		const struct st_tensor *t = &f->tensor[i];

		if (t->begin != at)
			return fail(r, t->name, "begins at byte %llu, where %llu was expected: %s",
				    (unsigned long long)t->begin, (unsigned long long)at,
				    t->begin < at ? "tensors overlap" : "a hole in the data");
		at = t->end;
	}
	if (at != r->data_bytes)
		return fail(r, NULL, "the tensors take %llu bytes of data and the file has %llu: %s",
			    (unsigned long long)at, (unsigned long long)r->data_bytes,
			    at > r->data_bytes ? "it is cut short" : "something is behind them");
	return 0;
}

static int read_tensors(struct reader *r, const json_t *root)
{
	struct st_file *f = r->f;
	const char *key;
	json_t *v;
	int rc;

	f->tensor = calloc(json_object_size(root) + 1, sizeof(*f->tensor));
	if (!f->tensor)
		return err_set(r->e, -ENOMEM, "%s: out of memory", f->path);
	json_object_foreach((json_t *)root, key, v)
	{
		if (!strcmp(key, "__metadata__"))
			rc = check_metadata(r, v);
		else
			rc = read_tensor(r, key, v, &f->tensor[f->n_tensors++]);
		if (rc)
			return rc;
	}
	qsort(f->tensor, f->n_tensors, sizeof(*f->tensor), compare_begin);
	return check_cover(r);
}

static int parse_header(struct reader *r, const char *text, size_t bytes)
{
	json_error_t je;
	json_t *root;
	int rc;

	root = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &je);
	if (!root)
		return fail(r, NULL, "header, byte %d: %s", je.position, je.text);
	rc = json_is_object(root) ? read_tensors(r, root) : fail(r, NULL, "the header is not a JSON object");
	json_decref(root);
	return rc;
}

int st_open(const char *path, struct st_file *out, struct err *e)
{
	struct st_file f = { .fd = -1 };
	struct reader r = { .f = &f, .e = e };
	char *text = NULL;
	int rc;

	f.path = strdup(path);
	if (!f.path)
		return err_set(e, -ENOMEM, "%s: out of memory", path);
	/* A pipe under the name would wait for a writer before it could be refused. */
	f.fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	if (f.fd < 0) {
		rc = err_set(e, -errno, "%s: %s", path, strerror(errno));
		goto close_file;
	}
	rc = read_header(&r, &text);
	if (rc)
		goto close_file;
	rc = parse_header(&r, text, f.data_offset - 8);
	free(text);
	if (rc)
		goto close_file;
	*out = f;
	return 0;

close_file:
	st_close(&f);
	return rc;
}

void st_close(struct st_file *f)
{
	if (f->fd >= 0)
		close(f->fd);
	for (uint32_t i = 0; i < f->n_tensors; i++)
		free(f->tensor[i].name);
	free(f->tensor);
	free(f->path);
	*f = (struct st_file){ .fd = -1 };
}

const struct st_tensor *st_find(const struct st_file *f, const char *name)
{
	for (uint32_t i = 0; i < f->n_tensors; i++)
		if (!strcmp(f->tensor[i].name, name))
			return &f->tensor[i];
	return NULL;
}

/* ------------------------------------------------------------------------ data */

static float bits_to_float(uint32_t bits)
{
	float x;

	memcpy(&x, &bits, sizeof(x));
	return x;
}

/* IEEE binary16: exact, NaN payloads kept. */
static float half_to_float(uint16_t h)
{
	uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;

	if (exponent == 31)
		return bits_to_float(sign | 0x7f800000 | fraction << 13);
	if (exponent)
		return bits_to_float(sign | (exponent + 112) << 23 | fraction << 13);
	/* Subnormal: fraction * 2^-24, which a float holds exactly. */
	return (sign ? -1.0f : 1.0f) * (float)fraction * 0x1p-24f;
}

static int read_half(const struct st_file *f, const struct st_tensor *t, uint64_t first, uint64_t n, float *out)
{
	uint16_t block[CONVERT_BLOCK];
	uint64_t at = f->data_offset + t->begin + first * sizeof(*block);

	while (n > 0) {
		uint64_t count = n < CONVERT_BLOCK ? n : CONVERT_BLOCK;
		int rc = pread_full(f->fd, block, count * sizeof(*block), at);

		if (rc)
			return rc;
		for (uint64_t i = 0; i < count; i++)
			out[i] = t->dtype == ST_F16 ? half_to_float(block[i]) : bits_to_float((uint32_t)block[i] << 16);
		at += count * sizeof(*block);
		out += count;
		n -= count;
	}
	return 0;
}

int st_read_f32(const struct st_file *f, const struct st_tensor *t, uint64_t first, uint64_t n, float *out,
		struct err *e)
{
	uint64_t width = t->dtype == ST_F32 ? sizeof(float) : sizeof(uint16_t);
	int rc;

	if (t->dtype == ST_OTHER)
		return err_set(e, -EINVAL, "%s: tensor \"%.200s\": only F32, F16 and BF16 can be read as fp32", f->path,
			       t->name);
	assert(first <= (t->end - t->begin) / width && n <= (t->end - t->begin) / width - first);
	if (t->dtype == ST_F32)
		rc = pread_full(f->fd, out, n * sizeof(*out), f->data_offset + t->begin + first * sizeof(*out));
	else
		rc = read_half(f, t, first, n, out);
	if (rc)
		return err_set(e, rc, "%s: tensor \"%.200s\": %s", f->path, t->name, strerror(-rc));
	return 0;
}
