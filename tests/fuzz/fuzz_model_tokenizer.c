/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A tokenizer.json and a text, the second behind the first's last line. What is
 * accepted gives a text, or the same text again from the words it remembers, the
 * same ids, all of them tokens that stand for something.
 */
#include "model/model.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#define HEAD "{\"model\":{\"vocab\":{"

/* Most mutations lose a byte's token, without which nothing is accepted: so they are all written in front. */
static char *with_bytes(const char *text, size_t n, size_t *bytes)
{
	size_t room = n + 8192, at = sizeof(HEAD) - 1;
	char *out = malloc(room);
	uint32_t other = 256;

	assert(out);
	memcpy(out, HEAD, at);
	for (uint32_t b = 0; b < 256; b++) {
		bool itself = (b >= '!' && b <= '~') || (b >= 0xa1 && b != 0xad);
		uint32_t c = itself ? b : other++;

		at += (size_t)snprintf(out + at, room - at, "\"\\u%04x\":%u,", c, b);
	}
	memcpy(out + at, text, n);
	*bytes = at + n;
	return out;
}

static void encode(struct tokenizer *t, const uint8_t *text, size_t n)
{
	struct token_list l = { 0 };
	struct err e = { 0 };
	size_t once;

	if (tokenizer_encode(t, text, n, &l, &e)) {
		assert(e.text[0]);
		token_list_release(&l);
		return;
	}
	once = l.n;
	assert(!tokenizer_encode(t, text, n, &l, &e) && l.n == 2 * once);
	assert(!once || !memcmp(l.id, l.id + once, once * sizeof(*l.id)));
	for (size_t i = 0; i < l.n; i++) {
		size_t bytes;

		assert(l.id[i] < tokenizer_size(t) && tokenizer_bytes(t, l.id[i], &bytes) && bytes > 0);
	}
	token_list_release(&l);
}

static void try_file(const char *file, size_t bytes, const uint8_t *text, size_t n)
{
	struct tokenizer *t;
	struct err e = { 0 };

	if (tokenizer_parse(file, bytes, "fuzz", &t, &e)) {
		assert(e.text[0]);
		return;
	}
	encode(t, text, n);
	tokenizer_free(t);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
	const uint8_t *end = memrchr(data, '\n', bytes);
	size_t n = end ? (size_t)(end - data) : bytes, whole;
	char *file;

	try_file((const char *)data, n, end ? end + 1 : data, end ? bytes - n - 1 : 0);
	file = with_bytes((const char *)data, n, &whole);
	try_file(file, whole, end ? end + 1 : data, end ? bytes - n - 1 : bytes);
	free(file);
	return 0;
}
