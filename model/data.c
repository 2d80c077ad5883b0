/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Token streams. The files of a list, one behind the other, are one stream;
 * each is mapped read-only and nothing is copied or kept. Everything that could
 * go wrong in the middle of training (a file too short, a token the model does
 * not have) is looked for when the stream is opened, which for 16-bit and
 * 32-bit tokens reads all of it once. A file that somebody shortens while it is
 * mapped ends the process with SIGBUS: data is not to be written to during a job.
 *
 * Formats
 *   bytes    each byte is a token; any file
 *   llmc     llm.c (dev/data/data_common.py): 256 int32, of them magic, version
 *            and number of tokens, then the tokens; magic 20240520 version 1:
 *            uint16 (GPT-2), magic 20240801 version 7: uint32 (Llama 3)
 *   nanogpt  nanoGPT (data/.../prepare.py): uint16 tokens and nothing else
 */
#include "model/model.h"

#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define LLMC_HEADER_BYTES 1024u
#define LLMC_MAGIC_U16 20240520u
#define LLMC_VERSION_U16 1u
#define LLMC_MAGIC_U32 20240801u
#define LLMC_VERSION_U32 7u

#define SCAN_BLOCK 65536u
#define SAMPLE_BYTES 4096u
#define SAMPLE_COUNT 64u

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "tokens are read in place, and are little-endian");

struct segment {
	const char *path; /* the config's */
	const uint8_t *map;
	uint64_t bytes;
	const void *token; /* in map */
	uint32_t width;    /* bytes a token */
	uint64_t first, n; /* tokens; first: in the stream */
};

struct stream {
	struct segment *segment;
	uint32_t n_segments;
	uint64_t n; /* tokens */
};

/* A run of windows in a stream. */
struct range {
	const struct stream *stream;
	uint64_t first, n; /* tokens */
	uint64_t windows;
};

struct data_set {
	struct stream train, validation;
	struct range range[2]; /* by enum data_split */
	uint32_t sequence_length;
	uint64_t seed, fingerprint;
};

/* ---------------------------------------------------------------------- files */

static void stream_close(struct stream *s)
{
	for (uint32_t i = 0; i < s->n_segments; i++)
		if (s->segment[i].map)
			munmap((void *)(uintptr_t)s->segment[i].map, s->segment[i].bytes);
	free(s->segment);
	*s = (struct stream){ 0 };
}

static int map_file(struct segment *g, struct err *e)
{
	int fd = open(g->path, O_RDONLY | O_CLOEXEC), rc = 0;
	struct stat st;
	void *map;

	if (fd < 0)
		return err_set(e, -errno, "%s: %s", g->path, strerror(errno));
	if (fstat(fd, &st))
		rc = err_set(e, -errno, "%s: %s", g->path, strerror(errno));
	else if (!S_ISREG(st.st_mode))
		rc = err_set(e, -EINVAL, "%s: training data must be a regular file", g->path);
	else if (!st.st_size)
		rc = err_set(e, -EINVAL, "%s: the file is empty", g->path);
	if (!rc) {
		map = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0);
		if (map == MAP_FAILED) {
			rc = err_set(e, -errno, "%s: cannot be mapped: %s", g->path, strerror(errno));
		} else {
			g->map = map;
			g->bytes = (uint64_t)st.st_size;
		}
	}
	close(fd);
	return rc;
}

static int read_llmc_header(struct segment *g, struct err *e)
{
	uint32_t header[3];
	uint64_t bytes;

	if (g->bytes < LLMC_HEADER_BYTES)
		return err_set(e, -EINVAL, "%s: %llu bytes are too few for llm.c's header of %u", g->path,
			       (unsigned long long)g->bytes, LLMC_HEADER_BYTES);
	memcpy(header, g->map, sizeof(header));
	if (header[0] == LLMC_MAGIC_U16 && header[1] == LLMC_VERSION_U16)
		g->width = sizeof(uint16_t);
	else if (header[0] == LLMC_MAGIC_U32 && header[1] == LLMC_VERSION_U32)
		g->width = sizeof(uint32_t);
	else
		return err_set(
			e, -EINVAL,
			"%s: not an llm.c token file: magic %u version %u; known are %u version %u and %u version %u",
			g->path, header[0], header[1], LLMC_MAGIC_U16, LLMC_VERSION_U16, LLMC_MAGIC_U32,
			LLMC_VERSION_U32);
	g->token = g->map + LLMC_HEADER_BYTES;
	g->n = header[2];
	bytes = LLMC_HEADER_BYTES + g->n * g->width;
	if (bytes != g->bytes)
		return err_set(e, -EINVAL, "%s: the header says %llu tokens, so %llu bytes; the file has %llu", g->path,
			       (unsigned long long)g->n, (unsigned long long)bytes, (unsigned long long)g->bytes);
	return 0;
}

static int find_tokens(struct segment *g, enum data_format format, struct err *e)
{
	if (format == DATA_LLMC)
		return read_llmc_header(g, e);
	g->width = format == DATA_BYTES ? 1 : sizeof(uint16_t);
	if (g->bytes % g->width)
		return err_set(e, -EINVAL, "%s: %llu bytes are no whole number of 16-bit tokens", g->path,
			       (unsigned long long)g->bytes);
	g->token = g->map;
	g->n = g->bytes / g->width;
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
		return err_set(e, -EINVAL, "%s: token %llu is %u, and the model's vocab_size is %u", g->path,
			       (unsigned long long)at, segment_token(g, at), vocab);
	}
	return 0;
}

static int stream_open(struct stream *s, char *const *path, uint32_t n, enum data_format format, uint32_t vocab,
		       struct err *e)
{
	int rc = 0;

	s->segment = calloc(n ? n : 1, sizeof(*s->segment));
	if (!s->segment)
		return err_set(e, -ENOMEM, "data: out of memory for %u files", n);
	for (uint32_t i = 0; i < n && !rc; i++) {
		struct segment *g = &s->segment[s->n_segments++];

		*g = (struct segment){ .path = path[i], .first = s->n };
		rc = map_file(g, e);
		if (!rc)
			rc = find_tokens(g, format, e);
		if (!rc)
			rc = check_tokens(g, vocab, e);
		s->n += g->n;
	}
	return rc;
}

/* --------------------------------------------------------------- fingerprint */

static uint64_t stream_hash(const struct stream *s, uint64_t h)
{
	for (uint32_t i = 0; i < s->n_segments; i++) {
		const struct segment *g = &s->segment[i];
		uint64_t bytes = g->bytes < SAMPLE_BYTES ? g->bytes : SAMPLE_BYTES, room = g->bytes - bytes;

		h = hash64(&g->bytes, sizeof(g->bytes), h);
		for (uint64_t k = 0; k < SAMPLE_COUNT; k++)
			h = hash64(g->map + room / (SAMPLE_COUNT - 1) * k, bytes, h);
		h = hash64(g->map + room, bytes, h);
	}
	return h;
}

/* -------------------------------------------------------------------- data set */

static int set_range(struct data_set *d, enum data_split split, const struct stream *s, uint64_t first, uint64_t n,
		     struct err *e)
{
	if (n <= d->sequence_length)
		return err_set(
			e, -EINVAL,
			"%s data has %llu tokens, and a sample is %llu (sequence_length %u and the token behind it)",
			split == DATA_TRAIN ? "training" : "validation", (unsigned long long)n,
			(unsigned long long)d->sequence_length + 1, d->sequence_length);
	d->range[split] = (struct range){ s, first, n, (n - 1) / d->sequence_length };
	return 0;
}

static int set_ranges(struct data_set *d, const struct data_config *c, struct err *e)
{
	uint64_t held_out = (uint64_t)((double)d->train.n * c->validation_fraction);
	int rc = 0;

	if (c->n_validation)
		rc = set_range(d, DATA_VALIDATION, &d->validation, 0, d->validation.n, e);
	else if (c->validation_fraction > 0)
		rc = set_range(d, DATA_VALIDATION, &d->train, d->train.n - held_out, held_out, e);
	return rc ? rc : set_range(d, DATA_TRAIN, &d->train, 0, d->train.n - held_out, e);
}

int data_open(const struct data_config *c, uint64_t seed, uint32_t vocab, struct data_set **out, struct err *e)
{
	struct data_set *d = calloc(1, sizeof(*d));
	int rc;

	assert(c->sequence_length > 0 && c->n_train > 0);
	if (!d)
		return err_set(e, -ENOMEM, "data: out of memory");
	d->sequence_length = c->sequence_length;
	d->seed = seed;
	rc = stream_open(&d->train, c->train, c->n_train, c->format, vocab, e);
	if (!rc)
		rc = stream_open(&d->validation, c->validation, c->n_validation, c->format, vocab, e);
	if (!rc)
		rc = set_ranges(d, c, e);
	if (rc) {
		data_close(d);
		return rc;
	}
	d->fingerprint = stream_hash(&d->validation, stream_hash(&d->train, c->format));
	*out = d;
	return 0;
}

void data_close(struct data_set *d)
{
	if (!d)
		return;
	stream_close(&d->train);
	stream_close(&d->validation);
	free(d);
}

uint64_t data_tokens(const struct data_set *d, enum data_split split)
{
	return d->range[split].n;
}

uint64_t data_windows(const struct data_set *d, enum data_split split)
{
	return d->range[split].windows;
}

uint64_t data_fingerprint(const struct data_set *d)
{
	return d->fingerprint;
}

/* n tokens of the stream from `at` on. */
static void stream_read(const struct stream *s, uint64_t at, uint64_t n, uint32_t *out)
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

/* An epoch is a permutation of all windows, its own each time; the last sample of one is followed by the next's first. */
static uint64_t train_window(const struct data_set *d, uint64_t sample)
{
	static const char name[] = "training order";
	uint64_t windows = d->range[DATA_TRAIN].windows, epoch = sample / windows;
	uint64_t stream = hash64(name, sizeof(name), epoch);

	return rng_permute(d->seed, stream, windows, sample % windows);
}

/* Samples of an evaluation stand at even distances, the same in every evaluation. */
static uint64_t evaluation_window(const struct data_set *d, uint64_t sample, uint64_t n_samples)
{
	return (uint64_t)((unsigned __int128)sample * d->range[DATA_VALIDATION].windows / n_samples);
}

void data_micro_batch(const struct data_set *d, enum data_split split, uint64_t step, uint32_t n_micro, uint32_t index,
		      uint32_t micro_batch, uint32_t *tokens, uint32_t *targets)
{
	const struct range *r = &d->range[split];
	uint64_t per_step = (uint64_t)n_micro * micro_batch, seq = d->sequence_length;

	assert(r->windows > 0 && index < n_micro && (split == DATA_VALIDATION || step > 0));
	for (uint32_t j = 0; j < micro_batch; j++) {
		uint64_t in_step = (uint64_t)index * micro_batch + j;
		uint64_t w = split == DATA_TRAIN ? train_window(d, (step - 1) * per_step + in_step)
						 : evaluation_window(d, in_step, per_step);
		uint64_t at = r->first + w * seq;

		stream_read(r->stream, at, seq, tokens + j * seq);
		stream_read(r->stream, at + 1, seq, targets + j * seq);
	}
}
