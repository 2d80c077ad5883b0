/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The header of a safetensors file, byte for byte as the reference writer makes
 * it for tensors of one type: sorted by name, densely packed, no blanks, padded
 * with spaces to a multiple of 8 so that the data behind it is aligned.
 */
#include "model/model.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct text {
	char *data;
	size_t n, room;
	bool failed;
};

static void text_add(struct text *t, const char *fmt, ...) PRINTF_LIKE(2, 3);

static void text_add(struct text *t, const char *fmt, ...)
{
	char piece[512];
	va_list ap;
	int n;

	va_start(ap, fmt);
	n = vsnprintf(piece, sizeof(piece), fmt, ap);
	va_end(ap);
	assert(n >= 0 && (size_t)n < sizeof(piece));
	if (t->n + (size_t)n + 1 > t->room) {
		size_t room = 2 * t->room + sizeof(piece);
		char *data = realloc(t->data, room);

		if (!data) {
			t->failed = true;
			return;
		}
		t->data = data;
		t->room = room;
	}
	memcpy(t->data + t->n, piece, (size_t)n + 1);
	t->n += (size_t)n;
}

static int compare_name(const void *a, const void *b, void *ctx)
{
	const struct unit_table *t = ctx;

	return strcmp(t->tensor[*(const uint32_t *)a].name, t->tensor[*(const uint32_t *)b].name);
}

static void add_tensor(struct text *out, const struct tensor_info *x, uint64_t begin)
{
	text_add(out, ",\"%s\":{\"dtype\":\"F32\",\"shape\":[", x->name);
	for (uint32_t i = 0; i < x->n_dims; i++)
		text_add(out, "%s%llu", i ? "," : "", (unsigned long long)x->shape[i]);
	text_add(out, "],\"data_offsets\":[%llu,%llu]}", (unsigned long long)begin,
		 (unsigned long long)(begin + x->n * sizeof(float)));
}

int st_header_for(const struct unit_table *t, char **header, size_t *bytes, uint32_t *order, struct err *e)
{
	struct text out = { 0 };
	uint64_t at = 0, length;

	for (uint32_t i = 0; i < t->n_tensors; i++)
		order[i] = i;
	qsort_r(order, t->n_tensors, sizeof(*order), compare_name, (void *)(uintptr_t)t);
	text_add(&out, "%8s{\"__metadata__\":{\"format\":\"pt\"}", "");
	for (uint32_t i = 0; i < t->n_tensors; i++) {
		const struct tensor_info *x = &t->tensor[order[i]];

		add_tensor(&out, x, at);
		at += x->n * sizeof(float);
	}
	text_add(&out, "}");
	while (!out.failed && out.n % 8)
		text_add(&out, " ");
	if (out.failed) {
		free(out.data);
		return err_set(e, -ENOMEM, "safetensors header: out of memory");
	}
	length = out.n - sizeof(length);
	memcpy(out.data, &length, sizeof(length)); /* little-endian, as all machines we build for */
	*header = out.data;
	*bytes = out.n;
	return 0;
}
