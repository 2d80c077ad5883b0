/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Files of tokens, mapped read-only, nothing copied or kept, but for the tokens
 * that are made of text. A token the model does not have is looked for when the
 * stream is opened, which for 16-bit and 32-bit tokens reads all of it once.
 *
 * Formats
 *   bytes    each byte is a token; any file
 *   llmc     llm.c (dev/data/data_common.py): 256 int32, of them magic, version
 *            and number of tokens, then the tokens; magic 20240520 version 1:
 *            uint16 (GPT-2), magic 20240801 version 7: uint32 (Llama 3)
 *   nanogpt  nanoGPT (data/.../prepare.py): uint16 tokens and nothing else
 *   text     UTF-8, made into tokens by the tokenizer as one text
 */
#include "model/data_source.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define LLMC_HEADER_BYTES 1024u
#define LLMC_MAGIC_U16 20240520u
#define LLMC_VERSION_U16 1u
#define LLMC_MAGIC_U32 20240801u
#define LLMC_VERSION_U32 7u

#define SCAN_BLOCK 65536u

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "tokens are read in place, and are little-endian");

static int read_llmc_header(struct segment *g, struct err *e)
{
	uint32_t header[3];
	uint64_t bytes;

	if (g->file.bytes < LLMC_HEADER_BYTES)
		return err_set(e, -EINVAL, "%s: %llu bytes are too few for llm.c's header of %u", g->file.path,
			       (unsigned long long)g->file.bytes, LLMC_HEADER_BYTES);
	memcpy(header, g->file.map, sizeof(header));
	if (header[0] == LLMC_MAGIC_U16 && header[1] == LLMC_VERSION_U16)
		g->width = sizeof(uint16_t);
	else if (header[0] == LLMC_MAGIC_U32 && header[1] == LLMC_VERSION_U32)
		g->width = sizeof(uint32_t);
	else
		return err_set(
			e, -EINVAL,
			"%s: not an llm.c token file: magic %u version %u; known are %u version %u and %u version %u",
			g->file.path, header[0], header[1], LLMC_MAGIC_U16, LLMC_VERSION_U16, LLMC_MAGIC_U32,
			LLMC_VERSION_U32);
	g->token = g->file.map + LLMC_HEADER_BYTES;
	g->n = header[2];
	bytes = LLMC_HEADER_BYTES + g->n * g->width;
	if (bytes != g->file.bytes)
		return err_set(e, -EINVAL, "%s: the header says %llu tokens, so %llu bytes; the file has %llu",
			       g->file.path, (unsigned long long)g->n, (unsigned long long)bytes,
			       (unsigned long long)g->file.bytes);
	return 0;
}

static int make_tokens(struct segment *g, const struct data_text *x, struct err *e)
{
	int rc = data_encode(x, g->file.map, g->file.bytes, &g->made, e);

	if (rc)
		return err_prefix(e, "%s", g->file.path);
	g->width = sizeof(*g->made.id);
	g->token = g->made.id;
	g->n = g->made.n;
	return 0;
}

static int find_tokens(struct segment *g, enum data_format format, const struct data_text *x, struct err *e)
{
	if (format == DATA_TEXT)
		return make_tokens(g, x, e);
	if (format == DATA_LLMC)
		return read_llmc_header(g, e);
	g->width = format == DATA_BYTES ? 1 : sizeof(uint16_t);
	if (g->file.bytes % g->width)
		return err_set(e, -EINVAL, "%s: %llu bytes are no whole number of 16-bit tokens", g->file.path,
			       (unsigned long long)g->file.bytes);
	g->token = g->file.map;
	g->n = g->file.bytes / g->width;
	return 0;
}

/* Whether any of n tokens is at or beyond vocab: plain loops that the compiler makes wide. */
static bool any_beyond(const struct segment *g, uint64_t at, uint64_t n, uint32_t vocab)
{
	uint32_t most = 0;

	if (g->width == sizeof(uint16_t)) {
		const uint16_t *t = (const uint16_t *)g->token + at;
		uint16_t m = 0;

		for (uint64_t i = 0; i < n; i++)
			m = t[i] > m ? t[i] : m;
		most = m;
	} else {
		const uint32_t *t = (const uint32_t *)g->token + at;

		for (uint64_t i = 0; i < n; i++)
			most = t[i] > most ? t[i] : most;
	}
	return most >= vocab;
}

static uint32_t segment_token(const struct segment *g, uint64_t i)
{
	switch (g->width) {
	case 1:
		return ((const uint8_t *)g->token)[i];
	case 2:
		return ((const uint16_t *)g->token)[i];
	default:
		return ((const uint32_t *)g->token)[i];
	}
}

static int check_tokens(const struct segment *g, uint32_t vocab, struct err *e)
{
	if (g->width == 1 || (g->width == 2 && vocab > UINT16_MAX))
		return 0;
	for (uint64_t at = 0; at < g->n; at += SCAN_BLOCK) {
		uint64_t n = g->n - at < SCAN_BLOCK ? g->n - at : SCAN_BLOCK;

		if (!any_beyond(g, at, n, vocab))
			continue;
		while (segment_token(g, at) < vocab)
			at++;
		return err_set(e, -EINVAL, "%s: token %llu is %u, and the model's vocab_size is %u", g->file.path,
			       (unsigned long long)at, segment_token(g, at), vocab);
	}
	return 0;
}

int stream_open(struct stream *s, const struct data_source *c, const struct data_text *x, struct err *e)
{
	int rc = 0;

	*s = (struct stream){ .segment = calloc(c->n_paths, sizeof(*s->segment)) };
	if (!s->segment)
		return err_set(e, -ENOMEM, "data: out of memory for %u files", c->n_paths);
	for (uint32_t i = 0; i < c->n_paths && !rc; i++) {
		struct segment *g = &s->segment[s->n_segments++];

		*g = (struct segment){ .first = s->n };
		rc = data_file_map(&g->file, c->path[i], e);
		if (!rc)
			rc = find_tokens(g, c->format, x, e);
		if (!rc && c->format != DATA_TEXT)
			rc = check_tokens(g, x->vocab, e);
		s->n += g->n;
	}
	return rc;
}

void stream_close(struct stream *s)
{
	for (uint32_t i = 0; i < s->n_segments; i++) {
		data_file_unmap(&s->segment[i].file);
		token_list_release(&s->segment[i].made);
	}
	free(s->segment);
	*s = (struct stream){ 0 };
}

void stream_read(const struct stream *s, uint64_t at, uint64_t n, uint32_t *out)
{
	const struct segment *g = s->segment;

	while (at >= g->first + g->n)
		g++;
	for (; n > 0; g++) {
		uint64_t from = at - g->first, count = g->n - from < n ? g->n - from : n;

		for (uint64_t i = 0; i < count; i++)
			out[i] = segment_token(g, from + i);
		out += count;
		at += count;
		n -= count;
	}
}
