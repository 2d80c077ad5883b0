/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The parts of a tokenizer. Private to model/. tok_file.c reads the file into
 * them, tok_split.c cuts a text into words, tok_bpe.c turns a word into tokens.
 */
#ifndef SHARDMESH_MODEL_TOKENIZER_H
#define SHARDMESH_MODEL_TOKENIZER_H

#define PCRE2_CODE_UNIT_WIDTH 8
#include "model/model.h"

#include <pcre2.h>

#define TOKEN_ID_MAX (1u << 22) /* ids are below it: a file must not choose how much is allocated */

/* Room for n more; -ENOMEM. */
int token_list_grow(struct token_list *l, size_t n);
static inline int token_list_push(struct token_list *l, uint32_t id)
{
	int rc = l->n < l->room ? 0 : token_list_grow(l, 1);

	if (!rc)
		l->id[l->n++] = id;
	return rc;
}

/* --------------------------------------------------------------- tok_bpe.c */

struct tok_merge {
	uint64_t pair; /* left id << 32 | right id */
	uint32_t rank; /* lower ones go first */
	uint32_t id;   /* of both joined */
};

struct tok_symbol;
struct tok_candidate;
struct tok_cached;

struct tok_bpe {
	struct tok_merge *merge; /* open addressing, merge_mask + 1 slots; id TOKEN_ID_MAX: empty */
	uint64_t merge_mask;
	uint32_t byte_id[256];
	/* Whole words that are tokens, looked up before any merge where the file says ignore_merges; else NULL. */
	uint32_t *word; /* open addressing, ids; TOKEN_ID_MAX: empty */
	uint64_t word_mask;
	/* scratch of one word, and the words seen last */
	struct tok_symbol *symbol;
	struct tok_candidate *heap;
	size_t n_heap, symbol_room, heap_room;
	struct tok_cached *cache;
};

int tok_bpe_init(struct tok_bpe *b, uint64_t n_merges);
void tok_bpe_release(struct tok_bpe *b);
/* A later merge of the same pair replaces the earlier one. */
void tok_bpe_add_merge(struct tok_bpe *b, uint32_t left, uint32_t right, uint32_t rank, uint32_t id);

/* ------------------------------------------------------------- tok_split.c */

/* A text that is a token wherever it stands. */
struct tok_added {
	char *text; /* as it is looked for */
	uint32_t bytes, id;
	bool normalized; /* looked for after normalisation */
};

/* One step of the pre-tokenizer. */
struct tok_stage {
	bool prefix_space; /* a piece that begins with no space gets one */
	bool drop_gaps;    /* what the expression does not match is thrown away */
	pcre2_code *re;    /* its matches are pieces; NULL: leaves pieces whole */
};
#define TOK_STAGES_MAX 16
#define TOK_TEMPLATE_MAX 8

struct tokenizer {
	char *name; /* in messages */
	uint32_t size;
	uint8_t *pool; /* the tokens' bytes */
	uint32_t *begin, *length;
	struct tok_added *added; /* by normalized, first byte, length falling */
	uint32_t n_added;
	uint32_t first_added[2][257]; /* [normalized][first byte] */
	bool nfc;
	struct tok_stage stage[TOK_STAGES_MAX];
	uint32_t n_stages;
	pcre2_match_data *match[TOK_STAGES_MAX];
	pcre2_match_context *match_context;
	pcre2_jit_stack *jit_stack;
	struct tok_bpe bpe;
	uint32_t prefix[TOK_TEMPLATE_MAX], suffix[TOK_TEMPLATE_MAX];
	uint32_t n_prefix, n_suffix;
};

/* A word's tokens, behind those in out. */
int tok_bpe_word(struct tokenizer *t, const uint8_t *word, size_t n, struct token_list *out);
/* The table of whole words, of the tokens that `is_bytes` says are made of bytes. */
int tok_bpe_index_words(struct tokenizer *t, const bool *is_bytes);

/* Adds a stage for a regular expression (or a plain string) in Oniguruma's dialect. -EINVAL: e says what is not there. */
int tok_stage_add(struct tokenizer *t, const char *pattern, size_t bytes, bool literal, bool drop_gaps, struct err *e);
/* Unicode normalisation form C, malloced. */
int tok_nfc(const uint8_t *text, size_t n, uint8_t **out, size_t *n_out);
/* Length of the valid beginning of a text. */
size_t tok_valid_utf8(const uint8_t *text, size_t n);
/* Puts the added tokens in the order that the search wants. */
void tok_added_sort(struct tokenizer *t);
int tok_split_init(struct tokenizer *t);

/* -------------------------------------------------------------- tok_file.c */

/* Fills what is in the file; t is cleaned up by the caller, also on failure. */
int tok_file_read(struct tokenizer *t, const char *text, size_t bytes, struct err *e);

#endif
