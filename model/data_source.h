/* SPDX-License-Identifier: Apache-2.0 */
/* The two kinds of data that a sample can come from: streams of tokens and packed documents. Private to model/. */
#ifndef SHARDMESH_MODEL_DATA_SOURCE_H
#define SHARDMESH_MODEL_DATA_SOURCE_H

#include "model/model.h"

/*
 * What makes tokens of text, or bytes are tokens: then tokenizer is NULL. Only
 * while data are opened.
 */
struct data_text {
	struct tokenizer *tokenizer;
	uint32_t vocab; /* of the model: no id is at or beyond it */
	uint32_t closing[16];
	uint32_t n_closing; /* what ends a document */
};
/* Opens the tokenizer, if the config has one, and finds what ends a document. x->tokenizer is the caller's to free. */
int data_text_open(struct data_text *x, const struct data_config *c, struct err *e);
/* Whether the tokenizer makes a source's tokens. */
bool data_source_is_text(const struct data_config *c, const struct data_source *s);
/* n bytes of text behind those in out. -EINVAL: e says what is wrong, not where. */
int data_encode(const struct data_text *x, const void *text, size_t n, struct token_list *out, struct err *e);

/* A file, mapped. */
struct data_file {
	const char *path; /* the config's */
	const uint8_t *map;
	uint64_t bytes;
};
/* A regular file that is not empty, else -EINVAL; -errno. */
int data_file_map(struct data_file *f, const char *path, struct err *e);
void data_file_unmap(struct data_file *f);
/* h with the size and a sample of the contents. */
uint64_t data_file_hash(const struct data_file *f, uint64_t h);

/* ------------------------------------------------------------- data_tokens.c */

/* The files of a list, one behind the other, are one stream of tokens. */
struct segment {
	struct data_file file;
	const void *token;      /* in the map, or made's */
	uint32_t width;         /* bytes a token */
	struct token_list made; /* of text */
	uint64_t first, n;      /* tokens; first: in the stream */
};
struct stream {
	struct segment *segment;
	uint32_t n_segments;
	uint64_t n; /* tokens */
};

/* Every token is looked at: none is at or beyond vocab. */
int stream_open(struct stream *s, const struct data_source *c, const struct data_text *x, struct err *e);
void stream_close(struct stream *s);
/* n tokens of the stream from `at` on. */
void stream_read(const struct stream *s, uint64_t at, uint64_t n, uint32_t *out);

/* ------------------------------------------------------------- data_packed.c */

/*
 * A run of a document's tokens in one window. Token 0 stands at raw; an input
 * and its target are neighbours, so that n inputs are n + 1 tokens.
 */
struct piece {
	uint64_t raw;      /* in the file: the character that token 0 belongs to; or in `made` */
	uint64_t text_raw; /* in the file: the first character of the text or completion */
	uint32_t file, window;
	uint32_t n;        /* inputs */
	uint32_t n_prompt; /* of the n + 1 tokens: leading ones that are prompt and no target */
	uint32_t skip;     /* bytes of the first character that belong to the piece before */
};

struct packed {
	struct data_file *file;
	uint32_t n_files;
	struct piece *piece; /* by window, in the order of the file within one */
	uint64_t n_pieces;
	uint64_t *first_piece; /* [windows + 1] */
	bool is_made;          /* the documents' tokens stand in `made`, one behind the other */
	struct token_list made;
	uint32_t windows, sequence_length;
	uint32_t end_token; /* closes a document */
	uint64_t n;         /* inputs */
};

/* Reads all of it once: every line is checked, and an error names its number. */
int packed_open(struct packed *p, const struct data_source *c, uint32_t sequence_length, const struct data_text *x,
		struct err *e);
void packed_close(struct packed *p);
/* Positions without a document: token 0, target DATA_NO_TARGET. */
void packed_read(const struct packed *p, uint64_t window, uint32_t *tokens, uint32_t *targets);
/* For each position the first one of its document; one without a document is its own. */
void packed_first_keys(const struct packed *p, uint64_t window, uint32_t *out);
uint64_t packed_inputs(const struct packed *p, uint64_t first_window, uint64_t n);

#endif
