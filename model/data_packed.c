/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Documents of JSONL files, packed into windows. A document is its text, or its
 * prompt and its completion, as UTF-8 bytes, each a token, and an end token
 * behind them; or what a tokenizer makes of them. A window has sequence_length inputs; documents lie in it side by
 * side and do not see each other, and what is left over is no input.
 *
 * A document is cut only when it is longer than a window: into full windows and
 * a rest, where no run of prompt without a target behind it is kept. Whole
 * documents and rests go, in the order of the file, each into the fullest of the
 * last OPEN_MAX windows that has room for it (Ding et al. 2024, "Fewer
 * truncations improve language modeling", with a bounded choice), so that the
 * windows follow from the files and sequence_length alone.
 *
 * Opening reads every line once and keeps one entry a run; the step path decodes
 * bytes from the mapped file again, and ids are made once and kept. A file that somebody shortens while it is mapped
 * ends the process with SIGBUS: data is not to be written to during a job.
 */
#include "model/data_source.h"
#include "model/jsonl.h"
#include "model/tokenizer.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define OPEN_MAX_WINDOWS 64u
#define END_BYTE 10u   /* a newline ends a document where the vocabulary has bytes alone */
#define END_TOKEN 256u /* and the first token behind the bytes where there is one */

struct bin {
	uint32_t window, used;
};

struct build {
	struct packed *p;
	uint64_t room; /* pieces allocated */
	struct bin open[OPEN_MAX_WINDOWS];
	uint32_t n_open;
	const struct data_text *text;
	uint8_t *decoded; /* a string without its escapes */
	uint64_t decoded_room;
	struct err *e;
};

/* -------------------------------------------------------------------- packing */

static int new_window(struct build *b, uint32_t *out)
{
	if (b->p->windows == UINT32_MAX - 1)
		return err_set(b->e, -EINVAL, "%s: more than 2^32 windows", b->p->file[b->p->n_files - 1].path);
	*out = b->p->windows++;
	return 0;
}

/* The fullest open window with room for n; NULL for none. */
static struct bin *best_fit(struct build *b, uint32_t n)
{
	struct bin *best = NULL;

	for (uint32_t i = 0; i < b->n_open; i++)
		if (b->open[i].used + n <= b->p->sequence_length && (!best || b->open[i].used > best->used))
			best = &b->open[i];
	return best;
}

static void close_bin(struct build *b, struct bin *x)
{
	*x = b->open[--b->n_open];
}

/* A window for n inputs. */
static int choose_window(struct build *b, uint32_t n, uint32_t *out)
{
	struct bin *x;
	int rc;

	if (n == b->p->sequence_length)
		return new_window(b, out);
	x = best_fit(b, n);
	if (!x) {
		if (b->n_open == OPEN_MAX_WINDOWS)
			close_bin(b, best_fit(b, 0));
		rc = new_window(b, out);
		if (rc)
			return rc;
		x = &b->open[b->n_open++];
		*x = (struct bin){ .window = *out };
	}
	*out = x->window;
	x->used += n;
	if (x->used == b->p->sequence_length)
		close_bin(b, x);
	return 0;
}

static int add_piece(struct build *b, struct piece *x)
{
	struct packed *p = b->p;
	int rc = choose_window(b, x->n, &x->window);

	if (rc)
		return rc;
	if (p->n_pieces == b->room) {
		uint64_t room = b->room ? 2 * b->room : 1024;
		struct piece *more = realloc(p->piece, room * sizeof(*more));

		if (!more)
			return err_set(b->e, -ENOMEM, "%s: out of memory for the index of its documents",
				       p->file[x->file].path);
		p->piece = more;
		b->room = room;
	}
	p->piece[p->n_pieces++] = *x;
	p->n += x->n;
	return 0;
}

/* ------------------------------------------------------------------ documents */

/* A place in a document: a character, and how much of it is behind us. */
struct place {
	const uint8_t *raw, *text;
	bool in_prompt;
	uint32_t skip;
};

static void enter_text(struct place *at)
{
	if (at->in_prompt && *at->raw == '"') {
		at->raw = at->text;
		at->in_prompt = false;
	}
}

static void advance(struct place *at, uint64_t bytes)
{
	while (bytes > 0) {
		const uint8_t *next = at->raw;
		uint8_t c[4];
		unsigned n = jsonl_next(&next, c) - at->skip;

		if (bytes < n) {
			at->skip += (uint32_t)bytes;
			return;
		}
		bytes -= n;
		at->raw = next;
		at->skip = 0;
		enter_text(at);
	}
}

static int add_document(struct build *b, const struct jsonl_line *l)
{
	struct packed *p = b->p;
	const struct data_file *f = &p->file[p->n_files - 1];
	uint64_t prompt = l->pair ? l->prompt.bytes : 0, inputs = prompt + l->text.bytes;
	struct place at = { .raw = l->pair ? l->prompt.raw : l->text.raw, .text = l->text.raw, .in_prompt = l->pair };
	int rc = 0;

	enter_text(&at);
	for (uint64_t begin = 0; begin < inputs && !rc;) {
		uint32_t n = inputs - begin < p->sequence_length ? (uint32_t)(inputs - begin) : p->sequence_length;
		uint64_t left = prompt > begin ? prompt - begin : 0;
		struct piece x = {
			.raw = (uint64_t)(at.raw - f->map),
			.text_raw = (uint64_t)(at.text - f->map),
			.file = p->n_files - 1,
			.n = n,
			.n_prompt = left < n ? (uint32_t)left : n,
			.skip = at.skip,
		};

		/* The last input's target is token n: where that is prompt too, nothing is learnt here. */
		if (left <= n)
			rc = add_piece(b, &x);
		begin += n;
		if (begin < inputs)
			advance(&at, n);
	}
	return rc;
}

/* The ids of a string, behind those that are made. */
static int make_tokens(struct build *b, const struct jsonl_string *s)
{
	const uint8_t *p = s->raw;
	uint64_t n = 0;
	uint8_t c[4];
	unsigned k;

	if (!b->decoded || s->bytes > b->decoded_room) {
		uint64_t room = 2 * s->bytes + 4096;
		uint8_t *more = realloc(b->decoded, room);

		if (!more)
			return err_set(b->e, -ENOMEM, "out of memory for a document");
		b->decoded = more;
		b->decoded_room = room;
	}
	for (; (k = jsonl_next(&p, c)); n += k)
		memcpy(b->decoded + n, c, k);
	assert(n == s->bytes);
	return data_encode(b->text, b->decoded, n, &b->p->made, b->e);
}

static int put_tokens(struct build *b, const uint32_t *id, size_t n)
{
	struct token_list *made = &b->p->made;

	if (!n)
		return 0;
	if (token_list_grow(made, n))
		return err_set(b->e, -ENOMEM, "out of memory for a document");
	memcpy(made->id + made->n, id, n * sizeof(*id));
	made->n += n;
	return 0;
}

/* Makes a document's tokens; *n_prompt of them are the prompt with what the template puts before it. */
static int make_document(struct build *b, const struct jsonl_line *l, uint64_t *n_prompt)
{
	struct token_list *made = &b->p->made;
	uint64_t begin = made->n;
	const uint32_t *prefix;
	size_t n;
	int rc;

	prefix = tokenizer_prefix(b->text->tokenizer, &n);
	rc = put_tokens(b, prefix, n);
	if (!rc && l->pair)
		rc = make_tokens(b, &l->prompt);
	*n_prompt = l->pair ? made->n - begin : 0;
	if (!rc)
		rc = make_tokens(b, &l->text);
	return rc ? rc : put_tokens(b, b->text->closing, b->text->n_closing);
}

static int add_made_document(struct build *b, const struct jsonl_line *l)
{
	uint64_t first = b->p->made.n, prompt, inputs;
	int rc = make_document(b, l, &prompt);

	if (rc)
		return rc;
	inputs = b->p->made.n - first - 1;
	for (uint64_t begin = 0, n; begin < inputs && !rc; begin += n) {
		uint64_t left = prompt > begin ? prompt - begin : 0;
		struct piece x = { .raw = first + begin, .file = b->p->n_files - 1 };

		n = inputs - begin < b->p->sequence_length ? inputs - begin : b->p->sequence_length;
		x.n = (uint32_t)n;
		x.n_prompt = (uint32_t)(left < n ? left : n);
		/* The last input's target is token n: where that is prompt too, nothing is learnt here. */
		if (left <= n)
			rc = add_piece(b, &x);
	}
	return rc;
}

static int read_lines(struct build *b, const struct data_file *f)
{
	const uint8_t *p = f->map, *end = f->map + f->bytes;
	uint64_t number = 1;

	if (f->bytes >= 3 && !memcmp(p, "\xef\xbb\xbf", 3))
		p += 3;
	for (; p < end; number++) {
		const uint8_t *newline = memchr(p, '\n', (size_t)(end - p));
		size_t n = (size_t)((newline ? newline : end) - p);
		struct jsonl_line l;
		char why[JSONL_WHY];
		int rc = jsonl_parse(p, n, &l, why);

		if (rc < 0)
			return err_set(b->e, rc, "%s:%llu: %s", f->path, (unsigned long long)number, why);
		if (!rc && b->p->is_made && add_made_document(b, &l))
			return err_prefix(b->e, "%s:%llu", f->path, (unsigned long long)number);
		if (!rc && !b->p->is_made)
			rc = add_document(b, &l);
		if (rc < 0)
			return rc;
		p = newline ? newline + 1 : end;
	}
	return 0;
}

/* From the order of the file to the order of the windows, which keeps the file's within one. */
static int sort_pieces(struct packed *p, struct err *e)
{
	struct piece *sorted = malloc(p->n_pieces * sizeof(*sorted) + 1);
	uint64_t at = 0;

	p->first_piece = calloc((size_t)p->windows + 1, sizeof(*p->first_piece));
	if (!sorted || !p->first_piece) {
		free(sorted);
		return err_set(e, -ENOMEM, "%s: out of memory for the index of its documents", p->file[0].path);
	}
	for (uint64_t i = 0; i < p->n_pieces; i++)
		p->first_piece[p->piece[i].window]++;
	for (uint32_t w = 0; w <= p->windows; w++) {
		uint64_t n = p->first_piece[w];

		p->first_piece[w] = at;
		at += n;
	}
	for (uint64_t i = 0; i < p->n_pieces; i++)
		sorted[p->first_piece[p->piece[i].window]++] = p->piece[i];
	/* Each window's entry has moved to the next one's begin. */
	for (uint32_t w = p->windows; w > 0; w--)
		p->first_piece[w] = p->first_piece[w - 1];
	p->first_piece[0] = 0;
	free(p->piece);
	p->piece = sorted;
	return 0;
}

int packed_open(struct packed *p, const struct data_source *c, uint32_t sequence_length, const struct data_text *x,
		struct err *e)
{
	struct build b = { .p = p, .text = x, .e = e };
	int rc = 0;

	*p = (struct packed){ .sequence_length = sequence_length,
			      .end_token = x->vocab > END_TOKEN ? END_TOKEN : END_BYTE,
			      .is_made = x->tokenizer != NULL,
			      .file = calloc(c->n_paths, sizeof(*p->file)) };
	if (!p->file)
		return err_set(e, -ENOMEM, "data: out of memory for %u files", c->n_paths);
	for (uint32_t i = 0; i < c->n_paths && !rc; i++) {
		struct data_file *f = &p->file[p->n_files++];

		rc = data_file_map(f, c->path[i], e);
		if (!rc)
			rc = read_lines(&b, f);
	}
	free(b.decoded);
	return rc ? rc : sort_pieces(p, e);
}

void packed_close(struct packed *p)
{
	for (uint32_t i = 0; i < p->n_files; i++)
		data_file_unmap(&p->file[i]);
	free(p->file);
	token_list_release(&p->made);
	free(p->piece);
	free(p->first_piece);
	*p = (struct packed){ 0 };
}

/* -------------------------------------------------------------------- reading */

struct reader {
	const uint8_t *p, *text;
	bool in_prompt;
	uint32_t end_token;
	uint8_t c[4];
	unsigned at, n; /* of c */
};

static uint32_t next_token(struct reader *r)
{
	while (r->at == r->n) {
		r->at = 0;
		r->n = jsonl_next(&r->p, r->c);
		if (!r->n && !r->in_prompt)
			return r->end_token;
		if (!r->n) {
			r->p = r->text;
			r->in_prompt = false;
		}
	}
	return r->c[r->at++];
}

static void read_made(const struct packed *p, const struct piece *x, uint32_t *tokens, uint32_t *targets)
{
	const uint32_t *id = p->made.id + x->raw;

	for (uint32_t i = 0; i < x->n; i++) {
		tokens[i] = id[i];
		targets[i] = i + 1 >= x->n_prompt ? id[i + 1] : DATA_NO_TARGET;
	}
}

static void read_piece(const struct packed *p, const struct piece *x, uint32_t *tokens, uint32_t *targets)
{
	const uint8_t *map = p->file[x->file].map;
	struct reader r = {
		.p = map + x->raw, .text = map + x->text_raw, .in_prompt = x->n_prompt > 0, .end_token = p->end_token
	};
	uint32_t t;

	for (uint32_t i = 0; i < x->skip; i++)
		next_token(&r);
	t = next_token(&r);
	for (uint32_t i = 0; i < x->n; i++) {
		tokens[i] = t;
		t = next_token(&r);
		targets[i] = i + 1 >= x->n_prompt ? t : DATA_NO_TARGET;
	}
}

void packed_read(const struct packed *p, uint64_t window, uint32_t *tokens, uint32_t *targets)
{
	uint32_t at = 0;

	assert(window < p->windows);
	for (uint64_t i = p->first_piece[window]; i < p->first_piece[window + 1]; i++) {
		(p->is_made ? read_made : read_piece)(p, &p->piece[i], tokens + at, targets + at);
		at += p->piece[i].n;
	}
	for (; at < p->sequence_length; at++) {
		tokens[at] = 0;
		targets[at] = DATA_NO_TARGET;
	}
}

void packed_first_keys(const struct packed *p, uint64_t window, uint32_t *out)
{
	uint32_t at = 0;

	assert(window < p->windows);
	for (uint64_t i = p->first_piece[window]; i < p->first_piece[window + 1]; i++) {
		for (uint32_t k = 0; k < p->piece[i].n; k++)
			out[at + k] = at;
		at += p->piece[i].n;
	}
	for (; at < p->sequence_length; at++)
		out[at] = at;
}

uint64_t packed_inputs(const struct packed *p, uint64_t first_window, uint64_t n)
{
	uint64_t inputs = 0;

	for (uint64_t i = p->first_piece[first_window]; i < p->first_piece[first_window + n]; i++)
		inputs += p->piece[i].n;
	return inputs;
}
