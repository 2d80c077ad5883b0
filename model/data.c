/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which samples a job sees. Data are sources: streams of tokens, whose windows
 * tile them, or packed documents. Without weights all windows of all sources
 * are one list, seen once an epoch in an order of its own. With weights, every
 * SLOTS samples hold each source's share of them, in a random order, and each
 * source goes through its own windows at its own pace. Either way a sample is a
 * function of (seed, its number), whoever asks, and nothing is kept from one to
 * the next.
 */
#include "model/data_source.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define SLOTS 65536u

/* The windows of a source that a split has: consecutive ones. */
struct range {
	uint64_t tokens, windows;
	uint64_t first_token;  /* of a stream */
	uint64_t first_window; /* of packed documents */
};

struct source {
	const struct data_source *config;
	bool is_packed;
	struct stream stream;
	struct packed packed;
	uint64_t begin, slots; /* of SLOTS, where sources have weights */
};

/* A split's windows: of each source it is made of. */
struct part {
	struct source *source; /* [n] */
	struct range *range;   /* [n] */
	uint32_t n;
	uint64_t tokens, windows;
};

struct data_set {
	struct source *train, *validation;
	uint32_t n_train, n_validation;
	struct range *range; /* of both splits */
	struct part part[2]; /* by enum data_split */
	bool weighted;
	uint32_t sequence_length;
	uint64_t seed, fingerprint;
};

bool data_source_is_text(const struct data_config *c, const struct data_source *s)
{
	return s->format == DATA_TEXT || (s->format == DATA_JSONL && c->tokenizer);
}

const char *data_token_kind(const struct data_config *c)
{
	static const char *const names[] = { "bytes", "llmc", "nanogpt", "bytes", "tokenizer" };

	for (uint32_t i = 0; i < c->n_train; i++)
		if (data_source_is_text(c, &c->train[i]))
			return "tokenizer";
	return names[c->n_train ? c->train[0].format : c->format];
}

/* -------------------------------------------------------------------- sources */

static void source_close(struct source *s)
{
	if (s->is_packed)
		packed_close(&s->packed);
	else
		stream_close(&s->stream);
}

static int sources_open(struct source *s, uint32_t *n_open, const struct data_source *c, uint32_t n, uint32_t length,
			const struct data_text *x, struct err *e)
{
	int rc = 0;

	for (uint32_t i = 0; i < n && !rc; i++) {
		s[i] = (struct source){ .config = &c[i], .is_packed = c[i].format == DATA_JSONL };
		++*n_open;
		rc = s[i].is_packed ? packed_open(&s[i].packed, &c[i], length, x, e)
				    : stream_open(&s[i].stream, &c[i], x, e);
	}
	return rc;
}

/* Ids that were made are hashed whole: members may have other tokenizers, or libraries that know another Unicode. */
static uint64_t made_hash(const struct token_list *l, uint64_t h)
{
	return l->n ? hash64(l->id, l->n * sizeof(*l->id), h) : h;
}

static uint64_t source_hash(const struct source *s, uint64_t h)
{
	if (s->is_packed) {
		for (uint32_t i = 0; i < s->packed.n_files; i++)
			h = data_file_hash(&s->packed.file[i], h);
		return made_hash(&s->packed.made, h);
	}
	for (uint32_t i = 0; i < s->stream.n_segments; i++)
		h = made_hash(&s->stream.segment[i].made, data_file_hash(&s->stream.segment[i].file, h));
	return h;
}

/* One source without a weight hashes as its files do behind its format. */
static uint64_t sources_hash(const struct source *s, uint32_t n, uint64_t h)
{
	for (uint32_t i = 0; i < n; i++) {
		if (i > 0 || s[i].config->weight > 0) {
			h = hash64(&s[i].config->format, sizeof(s[i].config->format), h);
			h = hash64(&s[i].config->weight, sizeof(s[i].config->weight), h);
		}
		h = source_hash(&s[i], h);
	}
	return h;
}

/* --------------------------------------------------------------------- splits */

/* The last `fraction` of a source if it is held out, else all but that. */
static struct range cut(const struct source *s, uint32_t length, double fraction, bool held_out)
{
	uint64_t all = s->is_packed ? s->packed.windows : s->stream.n, out = (uint64_t)((double)all * fraction);
	uint64_t n = held_out ? out : all - out, first = held_out ? all - out : 0;

	if (s->is_packed)
		return (struct range){ .tokens = packed_inputs(&s->packed, first, n),
				       .windows = n,
				       .first_window = first };
	return (struct range){ .tokens = n, .windows = n > length ? (n - 1) / length : 0, .first_token = first };
}

static int set_part(struct data_set *d, enum data_split split, struct source *s, uint32_t n, struct range *r,
		    double fraction, bool held_out, struct err *e)
{
	const char *what = split == DATA_TRAIN ? "training" : "validation";
	struct part *p = &d->part[split];

	*p = (struct part){ .source = s, .range = r, .n = n };
	for (uint32_t i = 0; i < n; i++) {
		r[i] = cut(&s[i], d->sequence_length, fraction, held_out);
		p->tokens += r[i].tokens;
		p->windows += r[i].windows;
		if (r[i].windows)
			continue;
		if (s[i].is_packed)
			return err_set(e, -EINVAL, "%s: %s data has no document for a sample", s[i].config->path[0],
				       what);
		return err_set(
			e, -EINVAL,
			"%s: %s data has %llu tokens, and a sample is %llu (sequence_length %u and the token behind it)",
			s[i].config->path[0], what, (unsigned long long)r[i].tokens,
			(unsigned long long)d->sequence_length + 1, d->sequence_length);
	}
	return 0;
}

static int set_parts(struct data_set *d, double fraction, struct err *e)
{
	struct range *held_out = d->range + d->n_train;
	int rc = 0;

	if (d->n_validation)
		rc = set_part(d, DATA_VALIDATION, d->validation, d->n_validation, held_out, 0, false, e);
	else if (fraction > 0)
		rc = set_part(d, DATA_VALIDATION, d->train, d->n_train, held_out, fraction, true, e);
	return rc ? rc : set_part(d, DATA_TRAIN, d->train, d->n_train, d->range, fraction, false, e);
}

/* Shares of SLOTS by weight: rounded down, and what is left to those that lost most, the first among equals. */
static int set_slots(struct data_set *d, struct err *e)
{
	double sum = 0, rest[DATA_SOURCES_MAX];
	uint64_t given = 0;

	for (uint32_t i = 0; i < d->n_train; i++)
		sum += d->train[i].config->weight;
	d->weighted = sum > 0;
	if (!d->weighted)
		return 0;
	for (uint32_t i = 0; i < d->n_train; i++) {
		double share = d->train[i].config->weight / sum * SLOTS;

		d->train[i].slots = (uint64_t)share;
		rest[i] = share - (double)d->train[i].slots;
		given += d->train[i].slots;
	}
	for (; given < SLOTS; given++) {
		uint32_t most = 0;

		for (uint32_t i = 1; i < d->n_train; i++)
			most = rest[i] > rest[most] ? i : most;
		d->train[most].slots++;
		rest[most] -= 1;
	}
	for (uint32_t i = 0; i < d->n_train; i++) {
		d->train[i].begin = i ? d->train[i - 1].begin + d->train[i - 1].slots : 0;
		if (!d->train[i].slots)
			return err_set(e, -EINVAL, "%s: its weight is less than 1 in %u", d->train[i].config->path[0],
				       SLOTS);
	}
	return 0;
}

/* ----------------------------------------------------------------------- open */

static int open_sources(struct data_set *d, const struct data_config *c, const struct data_text *x, struct err *e)
{
	int rc;

	d->train = calloc(c->n_train, sizeof(*d->train));
	d->validation = calloc(c->n_validation ? c->n_validation : 1, sizeof(*d->validation));
	d->range = calloc(2 * (size_t)c->n_train + c->n_validation, sizeof(*d->range));
	if (!d->train || !d->validation || !d->range)
		return err_set(e, -ENOMEM, "data: out of memory");
	rc = sources_open(d->train, &d->n_train, c->train, c->n_train, c->sequence_length, x, e);
	if (!rc)
		rc = sources_open(d->validation, &d->n_validation, c->validation, c->n_validation, c->sequence_length,
				  x, e);
	return rc;
}

static int open_all(struct data_set *d, const struct data_config *c, uint32_t vocab, struct err *e)
{
	struct data_text x = { .vocab = vocab };
	int rc = data_text_open(&x, c, e);

	if (!rc)
		rc = open_sources(d, c, &x, e);
	tokenizer_free(x.tokenizer);
	if (!rc)
		rc = set_parts(d, c->n_validation ? 0 : c->validation_fraction, e);
	return rc ? rc : set_slots(d, e);
}

int data_open(const struct data_config *c, uint64_t seed, uint32_t vocab, struct data_set **out, struct err *e)
{
	struct data_set *d = calloc(1, sizeof(*d));
	uint64_t h;
	int rc;

	assert(c->sequence_length > 0 && c->n_train > 0 && c->n_train <= DATA_SOURCES_MAX);
	if (!d)
		return err_set(e, -ENOMEM, "data: out of memory");
	d->sequence_length = c->sequence_length;
	d->seed = seed;
	rc = open_all(d, c, vocab, e);
	if (rc) {
		data_close(d);
		return rc;
	}
	h = sources_hash(d->train, d->n_train, c->train[0].format);
	d->fingerprint = sources_hash(d->validation, d->n_validation, h);
	*out = d;
	return 0;
}

void data_close(struct data_set *d)
{
	if (!d)
		return;
	for (uint32_t i = 0; i < d->n_train; i++)
		source_close(&d->train[i]);
	for (uint32_t i = 0; i < d->n_validation; i++)
		source_close(&d->validation[i]);
	free(d->train);
	free(d->validation);
	free(d->range);
	free(d);
}

uint64_t data_tokens(const struct data_set *d, enum data_split split)
{
	return d->part[split].tokens;
}

uint64_t data_windows(const struct data_set *d, enum data_split split)
{
	return d->part[split].windows;
}

uint64_t data_fingerprint(const struct data_set *d)
{
	return d->fingerprint;
}

bool data_packed(const struct data_set *d)
{
	bool packed = false;

	for (uint32_t i = 0; i < d->n_train; i++)
		packed |= d->train[i].is_packed;
	for (uint32_t i = 0; i < d->n_validation; i++)
		packed |= d->validation[i].is_packed;
	return packed;
}

uint64_t data_memory(const struct data_set *d)
{
	uint64_t bytes = 0;

	for (uint32_t i = 0; i < d->n_train + d->n_validation; i++) {
		const struct source *s = i < d->n_train ? &d->train[i] : &d->validation[i - d->n_train];

		if (s->is_packed)
			bytes += s->packed.n_pieces * sizeof(*s->packed.piece) +
				 ((uint64_t)s->packed.windows + 1) * sizeof(*s->packed.first_piece) +
				 s->packed.made.room * sizeof(*s->packed.made.id);
		for (uint32_t k = 0; k < s->stream.n_segments; k++)
			bytes += s->stream.segment[k].made.room * sizeof(*s->stream.segment[k].made.id);
	}
	return bytes;
}

/* -------------------------------------------------------------------- samples */

/* A window of a source. */
struct sample {
	const struct source *source;
	const struct range *range;
	uint64_t window; /* of the range */
};

/* Window w of all the part's windows, source by source. */
static struct sample part_window(const struct part *p, uint64_t w)
{
	uint32_t i = 0;

	while (w >= p->range[i].windows)
		w -= p->range[i++].windows;
	return (struct sample){ &p->source[i], &p->range[i], w };
}

static const char order_name[] = "training order";

/* An epoch is a permutation of the windows, its own each time; the last sample of one is followed by the next's first. */
static uint64_t permuted(const struct data_set *d, uint64_t windows, uint64_t sample, uint64_t salt)
{
	uint64_t stream = hash64(order_name, sizeof(order_name), sample / windows + salt);

	return rng_permute(d->seed, stream, windows, sample % windows);
}

static struct sample weighted_sample(const struct data_set *d, uint64_t sample)
{
	static const char name[] = "order of sources";
	const struct part *p = &d->part[DATA_TRAIN];
	uint64_t block = sample / SLOTS, slot;
	uint32_t i = 0;

	slot = rng_permute(d->seed, hash64(name, sizeof(name), block), SLOTS, sample % SLOTS);
	while (slot >= p->source[i].begin + p->source[i].slots)
		i++;
	sample = block * p->source[i].slots + (slot - p->source[i].begin);
	/* Sources that happen to have the same number of windows do not go through them in the same order. */
	return (struct sample){ &p->source[i], &p->range[i],
				permuted(d, p->range[i].windows, sample, hash64(&i, sizeof(i), 0)) };
}

static struct sample train_sample(const struct data_set *d, uint64_t sample)
{
	const struct part *p = &d->part[DATA_TRAIN];

	return d->weighted ? weighted_sample(d, sample) : part_window(p, permuted(d, p->windows, sample, 0));
}

/* Samples of an evaluation stand at even distances, the same in every evaluation. */
static struct sample evaluation_sample(const struct data_set *d, uint64_t sample, uint64_t n_samples)
{
	const struct part *p = &d->part[DATA_VALIDATION];

	return part_window(p, (uint64_t)((unsigned __int128)sample * p->windows / n_samples));
}

/* Sample j of a micro-batch. */
static struct sample find_sample(const struct data_set *d, enum data_split split, uint64_t step, uint32_t n_micro,
				 uint32_t index, uint32_t micro_batch, uint32_t j)
{
	uint64_t per_step = (uint64_t)n_micro * micro_batch, in_step = (uint64_t)index * micro_batch + j;

	assert(d->part[split].windows > 0 && index < n_micro && (split == DATA_VALIDATION || step > 0));
	return split == DATA_TRAIN ? train_sample(d, (step - 1) * per_step + in_step)
				   : evaluation_sample(d, in_step, per_step);
}

void data_micro_batch(const struct data_set *d, enum data_split split, uint64_t step, uint32_t n_micro, uint32_t index,
		      uint32_t micro_batch, uint32_t *tokens, uint32_t *targets)
{
	uint64_t seq = d->sequence_length;

	for (uint32_t j = 0; j < micro_batch; j++, tokens += seq, targets += seq) {
		struct sample s = find_sample(d, split, step, n_micro, index, micro_batch, j);
		uint64_t at = s.range->first_token + s.window * seq;

		if (s.source->is_packed) {
			packed_read(&s.source->packed, s.range->first_window + s.window, tokens, targets);
			continue;
		}
		stream_read(&s.source->stream, at, seq, tokens);
		stream_read(&s.source->stream, at + 1, seq, targets);
	}
}

void data_first_keys(const struct data_set *d, enum data_split split, uint64_t step, uint32_t n_micro, uint32_t index,
		     uint32_t micro_batch, uint32_t *first_key)
{
	uint64_t seq = d->sequence_length;

	for (uint32_t j = 0; j < micro_batch; j++, first_key += seq) {
		struct sample s = find_sample(d, split, step, n_micro, index, micro_batch, j);

		if (s.source->is_packed)
			packed_first_keys(&s.source->packed, s.range->first_window + s.window, first_key);
		else
			memset(first_key, 0, seq * sizeof(*first_key));
	}
}
