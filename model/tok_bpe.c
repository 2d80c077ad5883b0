/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Byte pair encoding of one word (Sennrich et al. 2016), as Hugging Face's
 * tokenizers do it: of all neighbours that have a merge the one of the lowest
 * rank, of equal ones the leftmost, is joined, until none is left. A heap holds
 * the candidates, so that a word of n bytes takes n log n and no word can be made
 * to take more. Entries that a merge has made stale stay in the heap; one is
 * stale when its place now stands for another pair than the one that makes its
 * token. Words are seldom long and mostly seen before: a table of the last ones
 * answers most.
 */
#include "model/tokenizer.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define CACHE_WORDS (1u << 15)
#define CACHE_BYTES 22
#define CACHE_IDS 10
#define NONE UINT32_MAX

struct tok_symbol {
	uint32_t id, prev, next;
	bool gone;
};

struct tok_candidate {
	uint64_t order; /* rank << 32 | pos */
	uint32_t id;
};

struct tok_cached {
	uint8_t n_bytes, n_ids, bytes[CACHE_BYTES];
	uint32_t id[CACHE_IDS];
};
static_assert(sizeof(struct tok_cached) == 64, "a word seen before costs one cache line");

static uint64_t slots_for(uint64_t n)
{
	uint64_t slots = 16;

	while (slots < 2 * n)
		slots *= 2;
	return slots;
}

int tok_bpe_init(struct tok_bpe *b, uint64_t n_merges)
{
	uint64_t slots = slots_for(n_merges);

	b->merge = malloc(slots * sizeof(*b->merge));
	b->cache = calloc(CACHE_WORDS, sizeof(*b->cache));
	if (!b->merge || !b->cache)
		return -ENOMEM;
	for (uint64_t i = 0; i < slots; i++)
		b->merge[i].id = TOKEN_ID_MAX;
	b->merge_mask = slots - 1;
	return 0;
}

void tok_bpe_release(struct tok_bpe *b)
{
	free(b->merge);
	free(b->word);
	free(b->symbol);
	free(b->heap);
	free(b->cache);
	*b = (struct tok_bpe){ 0 };
}

/* --------------------------------------------------------------------- tables */

/* The slot that holds a pair, or the empty one where it would go. */
static struct tok_merge *merge_slot(const struct tok_bpe *b, uint64_t pair)
{
	uint64_t i = pair * UINT64_C(0x9e3779b97f4a7c15);

	for (i ^= i >> 32;; i++) {
		struct tok_merge *m = &b->merge[i & b->merge_mask];

		if (m->id == TOKEN_ID_MAX || m->pair == pair)
			return m;
	}
}

void tok_bpe_add_merge(struct tok_bpe *b, uint32_t left, uint32_t right, uint32_t rank, uint32_t id)
{
	uint64_t pair = (uint64_t)left << 32 | right;

	*merge_slot(b, pair) = (struct tok_merge){ pair, rank, id };
}

static const struct tok_merge *find_merge(const struct tok_bpe *b, uint32_t left, uint32_t right)
{
	const struct tok_merge *m = merge_slot(b, (uint64_t)left << 32 | right);

	return m->id == TOKEN_ID_MAX ? NULL : m;
}

static uint32_t *word_slot(const struct tokenizer *t, const uint8_t *word, size_t n)
{
	for (uint64_t i = hash64(word, n, 0);; i++) {
		uint32_t *slot = &t->bpe.word[i & t->bpe.word_mask];

		if (*slot == TOKEN_ID_MAX || (t->length[*slot] == n && !memcmp(t->pool + t->begin[*slot], word, n)))
			return slot;
	}
}

int tok_bpe_index_words(struct tokenizer *t, const bool *is_bytes)
{
	uint64_t slots = slots_for(t->size);

	t->bpe.word = malloc(slots * sizeof(*t->bpe.word));
	if (!t->bpe.word)
		return -ENOMEM;
	for (uint64_t i = 0; i < slots; i++)
		t->bpe.word[i] = TOKEN_ID_MAX;
	t->bpe.word_mask = slots - 1;
	for (uint32_t id = 0; id < t->size; id++)
		if (is_bytes[id] && t->length[id])
			*word_slot(t, t->pool + t->begin[id], t->length[id]) = id;
	return 0;
}

/* ----------------------------------------------------------------------- heap */

static int heap_push(struct tok_bpe *b, uint32_t pos, const struct tok_merge *m)
{
	struct tok_candidate c = { (uint64_t)m->rank << 32 | pos, m->id };
	size_t i = b->n_heap;

	if (i == b->heap_room) {
		size_t room = i ? 2 * i : 64;
		struct tok_candidate *more = realloc(b->heap, room * sizeof(*more));

		if (!more)
			return -ENOMEM;
		b->heap = more;
		b->heap_room = room;
	}
	b->n_heap++;
	for (; i > 0 && b->heap[(i - 1) / 2].order > c.order; i = (i - 1) / 2)
		b->heap[i] = b->heap[(i - 1) / 2];
	b->heap[i] = c;
	return 0;
}

static struct tok_candidate heap_pop(struct tok_bpe *b)
{
	struct tok_candidate top = b->heap[0], last = b->heap[--b->n_heap];
	size_t i = 0;

	for (;;) {
		size_t child = 2 * i + 1;

		if (child >= b->n_heap)
			break;
		child += child + 1 < b->n_heap && b->heap[child + 1].order < b->heap[child].order;
		if (b->heap[child].order >= last.order)
			break;
		b->heap[i] = b->heap[child];
		i = child;
	}
	b->heap[i] = last;
	return top;
}

/* ---------------------------------------------------------------------- words */

static int push_pair(struct tok_bpe *b, uint32_t left)
{
	const struct tok_symbol *s = b->symbol;
	const struct tok_merge *m = find_merge(b, s[left].id, s[s[left].next].id);

	return m ? heap_push(b, left, m) : 0;
}

static int start_word(struct tok_bpe *b, const uint8_t *word, size_t n)
{
	int rc = 0;

	if (n > b->symbol_room) {
		struct tok_symbol *more = realloc(b->symbol, n * sizeof(*more));

		if (!more)
			return -ENOMEM;
		b->symbol = more;
		b->symbol_room = n;
	}
	b->n_heap = 0;
	for (uint32_t i = 0; i < n; i++)
		b->symbol[i] = (struct tok_symbol){ b->byte_id[word[i]], i ? i - 1 : NONE, i + 1 < n ? i + 1 : NONE,
						    false };
	for (uint32_t i = 0; i + 1 < n && !rc; i++)
		rc = push_pair(b, i);
	return rc;
}

static int join(struct tok_bpe *b, struct tok_candidate c)
{
	struct tok_symbol *s = b->symbol;
	uint32_t at = (uint32_t)c.order, next = s[at].next;
	const struct tok_merge *m;
	int rc = 0;

	if (s[at].gone || next == NONE)
		return 0;
	m = find_merge(b, s[at].id, s[next].id);
	if (!m || m->id != c.id)
		return 0;
	s[at].id = c.id;
	s[at].next = s[next].next;
	s[next].gone = true;
	if (s[at].next != NONE)
		s[s[at].next].prev = at;
	if (s[at].prev != NONE)
		rc = push_pair(b, s[at].prev);
	if (!rc && s[at].next != NONE)
		rc = push_pair(b, at);
	return rc;
}

static int merge_word(struct tok_bpe *b, const uint8_t *word, size_t n, struct token_list *out)
{
	int rc = start_word(b, word, n);

	while (b->n_heap && !rc)
		rc = join(b, heap_pop(b));
	for (uint32_t i = 0; i != NONE && !rc; i = b->symbol[i].next)
		rc = token_list_push(out, b->symbol[i].id);
	return rc;
}

static void remember(struct tok_cached *c, const uint8_t *word, size_t n, const uint32_t *id, size_t n_ids)
{
	if (n_ids > CACHE_IDS)
		return;
	c->n_bytes = (uint8_t)n;
	c->n_ids = (uint8_t)n_ids;
	memcpy(c->bytes, word, n);
	memcpy(c->id, id, n_ids * sizeof(*id));
}

int tok_bpe_word(struct tokenizer *t, const uint8_t *word, size_t n, struct token_list *out)
{
	struct tok_bpe *b = &t->bpe;
	size_t before = out->n;
	struct tok_cached *c;
	int rc;

	assert(n > 0);
	if (n >= NONE)
		return -EFBIG;
	if (b->word && *word_slot(t, word, n) != TOKEN_ID_MAX)
		return token_list_push(out, *word_slot(t, word, n));
	if (n > CACHE_BYTES)
		return merge_word(b, word, n, out);
	c = &b->cache[hash64(word, n, 0) % CACHE_WORDS];
	if (c->n_bytes == n && !memcmp(c->bytes, word, n)) {
		rc = token_list_grow(out, c->n_ids);
		if (rc)
			return rc;
		memcpy(out->id + out->n, c->id, c->n_ids * sizeof(*c->id));
		out->n += c->n_ids;
		return 0;
	}
	rc = merge_word(b, word, n, out);
	if (!rc)
		remember(c, word, n, out->id + before, out->n - before);
	return rc;
}
