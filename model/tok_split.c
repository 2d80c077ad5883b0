/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From a text to words, in the order of Hugging Face's tokenizers: added tokens
 * that stand in the raw text are cut out; what lies between is normalised; the
 * added tokens of the normalised text are cut out; what lies between them goes
 * through the steps of the pre-tokenizer, each of which cuts every piece of the
 * one before, and the last pieces are words. A piece is matched as if nothing
 * stood around it. Pieces are handed on as they are found, none are collected.
 */
#include "model/jsonl.h"
#include "model/tokenizer.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#define JIT_STACK_BYTES (8u << 20)
/* Text is normalised by so much, and then on to the end of the line: nothing composes across one. */
#define NFC_BLOCK (1u << 20)

struct text {
	const uint8_t *p;
	size_t n;
};

/* A text on its way. */
struct way {
	struct tokenizer *t;
	struct token_list *out;
	struct err *e;
};

static int no_memory(const struct way *w)
{
	return err_set(w->e, -ENOMEM, "out of memory for tokens");
}

/* --------------------------------------------------------------------- stages */

static int walk_stages(const struct way *w, uint32_t k, struct text x);

static int take_word(const struct way *w, struct text x)
{
	int rc = tok_bpe_word(w->t, x.p, x.n, w->out);

	if (rc == -EFBIG)
		return err_set(w->e, -EINVAL, "a word of %zu bytes", x.n);
	return rc ? no_memory(w) : 0;
}

static int walk_prefixed(const struct way *w, uint32_t k, struct text x)
{
	uint8_t *with = malloc(x.n + 1);
	int rc;

	if (!with)
		return no_memory(w);
	with[0] = ' ';
	memcpy(with + 1, x.p, x.n);
	rc = walk_stages(w, k + 1, (struct text){ with, x.n + 1 });
	free(with);
	return rc;
}

static size_t next_character(struct text x, size_t at)
{
	for (at++; at < x.n && (x.p[at] & 0xc0) == 0x80;)
		at++;
	return at;
}

static int walk_matches(const struct way *w, uint32_t k, struct text x)
{
	const struct tok_stage *s = &w->t->stage[k];
	PCRE2_SIZE *found = pcre2_get_ovector_pointer(w->t->match[k]), begin, end;
	size_t at = 0;
	int rc = 0;

	for (size_t from = 0; from < x.n && !rc;) {
		int n = pcre2_match(s->re, x.p, x.n, from, PCRE2_NO_UTF_CHECK, w->t->match[k], w->t->match_context);

		if (n == PCRE2_ERROR_NOMATCH)
			break;
		if (n < 0)
			return err_set(w->e, -EINVAL, "step %u of the pre-tokenizer gave up on a text (PCRE2 error %d)",
				       k + 1, n);
		begin = found[0];
		end = found[1];
		if (begin > at && !s->drop_gaps)
			rc = walk_stages(w, k + 1, (struct text){ x.p + at, begin - at });
		if (!rc && end > begin)
			rc = walk_stages(w, k + 1, (struct text){ x.p + begin, end - begin });
		at = end;
		/* A match of nothing is a cut, too; the search goes on behind the next character. */
		from = end > begin ? end : next_character(x, end);
	}
	if (!rc && at < x.n && !s->drop_gaps)
		rc = walk_stages(w, k + 1, (struct text){ x.p + at, x.n - at });
	return rc;
}

static int walk_stages(const struct way *w, uint32_t k, struct text x)
{
	const struct tok_stage *s = &w->t->stage[k];

	if (k == w->t->n_stages)
		return take_word(w, x);
	if (s->re)
		return walk_matches(w, k, x);
	if (s->prefix_space && x.p[0] != ' ')
		return walk_prefixed(w, k, x);
	return walk_stages(w, k + 1, x);
}

/* --------------------------------------------------------------- added tokens */

static int compare_added(const void *a, const void *b)
{
	const struct tok_added *x = a, *y = b;

	if (x->normalized != y->normalized)
		return x->normalized - y->normalized;
	if (x->text[0] != y->text[0])
		return (uint8_t)x->text[0] - (uint8_t)y->text[0];
	if (x->bytes != y->bytes)
		return x->bytes > y->bytes ? -1 : 1;
	return x->id < y->id ? -1 : x->id > y->id;
}

void tok_added_sort(struct tokenizer *t)
{
	uint32_t i = 0;

	if (t->n_added)
		qsort(t->added, t->n_added, sizeof(*t->added), compare_added);
	for (int class = 0; class < 2; class ++) {
		for (int c = 0; c < 256; c++) {
			t->first_added[class][c] = i;
			while (i < t->n_added && t->added[i].normalized == class && (uint8_t)t->added[i].text[0] == c)
				i++;
		}
		t->first_added[class][256] = i;
	}
}

/* The longest added token that the text begins with, or NULL. */
static const struct tok_added *added_at(const struct tokenizer *t, bool normalized, struct text x)
{
	const uint32_t *first = &t->first_added[normalized][x.p[0]];

	for (uint32_t i = first[0]; i < first[1]; i++)
		if (t->added[i].bytes <= x.n && !memcmp(t->added[i].text, x.p, t->added[i].bytes))
			return &t->added[i];
	return NULL;
}

static int between_added(const struct way *w, bool normalized, struct text x);

static int cut_added(const struct way *w, bool normalized, struct text x)
{
	size_t at = 0;
	int rc = 0;

	if (w->t->first_added[normalized][0] == w->t->first_added[normalized][256])
		return between_added(w, normalized, x);
	for (size_t i = 0; i < x.n && !rc;) {
		const struct tok_added *a = added_at(w->t, normalized, (struct text){ x.p + i, x.n - i });

		if (!a) {
			i++;
			continue;
		}
		rc = between_added(w, normalized, (struct text){ x.p + at, i - at });
		if (!rc && token_list_push(w->out, a->id))
			rc = no_memory(w);
		at = i += a->bytes;
	}
	return rc ? rc : between_added(w, normalized, (struct text){ x.p + at, x.n - at });
}

static bool is_ascii(struct text x)
{
	uint8_t any = 0;

	for (size_t i = 0; i < x.n; i++)
		any |= x.p[i];
	return any < 0x80;
}

static int between_added(const struct way *w, bool normalized, struct text x)
{
	struct text c = { 0 };
	uint8_t *composed;
	int rc;

	if (!x.n)
		return 0;
	if (normalized)
		return walk_stages(w, 0, x);
	if (!w->t->nfc || is_ascii(x))
		return cut_added(w, true, x);
	if (tok_nfc(x.p, x.n, &composed, &c.n))
		return no_memory(w);
	c.p = composed;
	rc = cut_added(w, true, c);
	free(composed);
	return rc;
}

/* ------------------------------------------------------------------------ text */

int tok_nfc(const uint8_t *text, size_t n, uint8_t **out, size_t *n_out)
{
	/* Composition takes nothing longer than its parts but for a few characters, which triple at most (U+1D160). */
	uint8_t *to = malloc(3 * n + 1);
	size_t at = 0;

	for (size_t from = 0, cut; from < n && to; from = cut) {
		const uint8_t *line;
		utf8proc_uint8_t *block;
		utf8proc_ssize_t bytes;

		cut = n - from > NFC_BLOCK ? from + NFC_BLOCK : n;
		line = memchr(text + cut - 1, '\n', n - cut + 1);
		cut = line ? (size_t)(line - text) + 1 : n;
		bytes = utf8proc_map(text + from, (utf8proc_ssize_t)(cut - from), &block,
				     UTF8PROC_STABLE | UTF8PROC_COMPOSE);
		if (bytes < 0) {
			free(to);
			return -ENOMEM;
		}
		assert((size_t)bytes <= 3 * (cut - from));
		memcpy(to + at, block, (size_t)bytes);
		at += (size_t)bytes;
		free(block);
	}
	if (!to)
		return -ENOMEM;
	*out = to;
	*n_out = at;
	return 0;
}

size_t tok_valid_utf8(const uint8_t *text, size_t n)
{
	size_t at = 0;

	while (at < n) {
		unsigned length = text[at] < 0x80 ? 1 : jsonl_utf8_length(text + at, text + n);

		if (!length)
			break;
		at += length;
	}
	return at;
}

int tok_split_init(struct tokenizer *t)
{
	t->match_context = pcre2_match_context_create(NULL);
	t->jit_stack = pcre2_jit_stack_create(1u << 15, JIT_STACK_BYTES, NULL);
	if (!t->match_context || !t->jit_stack)
		return -ENOMEM;
	pcre2_jit_stack_assign(t->match_context, NULL, t->jit_stack);
	return 0;
}

int tokenizer_encode(struct tokenizer *t, const void *text, size_t bytes, struct token_list *out, struct err *e)
{
	struct way w = { t, out, e };
	size_t valid = tok_valid_utf8(text, bytes);

	if (valid < bytes)
		return err_set(e, -EINVAL, "byte %zu is not UTF-8", valid + 1);
	return bytes ? cut_added(&w, false, (struct text){ text, bytes }) : 0;
}
