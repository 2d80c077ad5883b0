/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where a step's time goes.
 *
 *   where CONFIG STEPS THREADS
 *
 * Runs the bare loop on a table of kernels that wraps the CPU's: every call is
 * timed, counted as arithmetic and as bytes that have to be read or written
 * once, and charged to a part of the step. Prints one JSON object: what this
 * machine can do at most (multiply-adds in registers, passes over memory larger
 * than the caches, all threads), then for each part the median seconds of a
 * step and the least that its arithmetic or its bytes allow. Activations that
 * stay in a cache beat the memory, so a part may be faster than its bytes.
 */
#include "tests/bench/bare_loop.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { STEPS_MAX = 1000, THREADS_MAX = 256, PASSES = 10 };

enum part {
	PART_FORWARD,  /* the blocks' layers, with bias and activation */
	PART_BACKWARD, /* with bias gradients and the sum over micro-batches */
	PART_VOCAB_FORWARD,
	PART_VOCAB_BACKWARD,
	PART_ATTENTION,
	PART_NORMS,
	PART_LOSS,
	PART_EMBEDDING,
	PART_OPTIMIZER,
	PART_FOLD,
	PART_COPY,
	PARTS
};

static const char *const part_name[PARTS] = { "products, forward",
					      "products, backward",
					      "vocabulary, forward",
					      "vocabulary, backward",
					      "attention",
					      "norms and residuals",
					      "loss",
					      "embedding, gradient",
					      "optimizer",
					      "fold and norm",
					      "zeroing" };

/* ---------------------------------------------------------------- timed kernels */

struct part_sum {
	double seconds, flops, bytes;
};

struct timed {
	const struct k_ops *ops;
	struct k_stream *stream;
	uint64_t begin_ns;
	uint32_t vocab;
	struct part_sum part[PARTS];
};

/* Callers only hold a stream's address. */
static struct timed *timed_of(struct k_stream *s)
{
	return (struct timed *)(void *)s;
}

static struct k_stream *begin(struct timed *t)
{
	t->begin_ns = clock_now_ns();
	return t->stream;
}

static void charge(struct timed *t, enum part part, double flops, double bytes)
{
	struct k_event done;

	t->ops->event_record(t->stream, &done);
	t->ops->event_wait(t->stream, &done);
	t->part[part].seconds += clock_seconds(clock_now_ns() - t->begin_ns);
	t->part[part].flops += flops;
	t->part[part].bytes += bytes;
}

static int timed_open(const struct k_stream_config *cfg, struct k_stream **out, struct err *e)
{
	struct timed *t = calloc(1, sizeof(*t));
	int rc;

	if (!t)
		return err_set(e, -ENOMEM, "no memory for a stream");
	t->ops = k_cpu_ops();
	rc = t->ops->stream_open(cfg, &t->stream, e);
	if (rc)
		free(t);
	else
		*out = (struct k_stream *)(void *)t;
	return rc;
}

static void timed_close(struct k_stream *s)
{
	struct timed *t = timed_of(s);

	t->ops->stream_close(t->stream);
	free(t);
}

static int timed_error(struct k_stream *s)
{
	return timed_of(s)->ops->stream_error(timed_of(s)->stream);
}

/* Every call waits for its end. */
static void timed_record(struct k_stream *s, struct k_event *ev)
{
	timed_of(s)->ops->event_record(timed_of(s)->stream, ev);
}

static void timed_wait(struct k_stream *s, const struct k_event *ev)
{
	timed_of(s)->ops->event_wait(timed_of(s)->stream, ev);
}

static size_t timed_workspace(const struct k_dims *dims, unsigned threads)
{
	return k_cpu_ops()->workspace_bytes(dims, threads);
}

static void timed_zero(struct k_stream *s, void *dst, size_t bytes)
{
	struct timed *t = timed_of(s);

	t->ops->zero(begin(t), dst, bytes);
	charge(t, PART_COPY, 0, (double)bytes);
}

static void timed_embed(struct k_stream *s, const struct k_embed *a)
{
	struct timed *t = timed_of(s);

	t->ops->embed(begin(t), a);
	charge(t, PART_EMBEDDING, 0, 8.0 * a->n_mb * a->batch * a->seq * a->channels);
}

static void timed_embed_backward(struct k_stream *s, const struct k_embed_backward *a)
{
	struct timed *t = timed_of(s);

	t->ops->embed_backward(begin(t), a);
	charge(t, PART_EMBEDDING, 0,
	       4.0 * a->channels * ((double)a->vocab + a->positions + (double)a->n_mb * a->batch * a->seq));
}

static void timed_norm(struct k_stream *s, const struct k_norm *a)
{
	struct timed *t = timed_of(s);

	t->ops->norm(begin(t), a);
	charge(t, PART_NORMS, 0, (a->branch ? 16.0 : 8.0) * a->n_mb * a->rows * a->cols);
}

static void timed_norm_backward(struct k_stream *s, const struct k_norm_backward *a)
{
	struct timed *t = timed_of(s);

	t->ops->norm_backward(begin(t), a);
	charge(t, PART_NORMS, 0, (a->dresidual ? 16.0 : 12.0) * a->n_mb * a->rows * a->cols);
}

static void timed_residual(struct k_stream *s, const struct k_residual *a)
{
	struct timed *t = timed_of(s);

	t->ops->residual(begin(t), a);
	charge(t, PART_NORMS, 0, 12.0 * a->n_mb * a->rows * a->cols);
}

/* A product reads its operands and writes its result once. */
static double product_bytes(double m, double n, double k)
{
	return 4.0 * (m * k + k * n + m * n);
}

static void timed_linear(struct k_stream *s, const struct k_linear *a)
{
	struct timed *t = timed_of(s);
	double rows = (double)a->n_mb * a->rows;

	t->ops->linear(begin(t), a);
	charge(t, a->out == t->vocab ? PART_VOCAB_FORWARD : PART_FORWARD, 2.0 * rows * a->in * a->out,
	       product_bytes(rows, a->out, a->in));
}

static void timed_linear_backward(struct k_stream *s, const struct k_linear_backward *a)
{
	struct timed *t = timed_of(s);
	double rows = (double)a->n_mb * a->rows;
	unsigned products = (a->dx != NULL) + (a->dw != NULL);

	t->ops->linear_backward(begin(t), a);
	charge(t, a->out == t->vocab ? PART_VOCAB_BACKWARD : PART_BACKWARD, products * 2.0 * rows * a->in * a->out,
	       products * product_bytes(rows, a->out, a->in));
}

/* Pairs of a query and a key it sees, in all samples and heads, times the head's size. */
static double attended(const struct k_attention *a)
{
	double pairs = (double)a->q_len * (a->kv_len - a->q_len) + 0.5 * a->q_len * (a->q_len + 1.0);

	return pairs * a->n_mb * a->batch * a->heads * a->head_dim;
}

static double attention_rows(const struct k_attention *a)
{
	return 4.0 * a->n_mb * a->batch * a->q_len * a->heads * a->head_dim;
}

/* Forward two products; backward the scores again, and four gradients. */
static void timed_attention(struct k_stream *s, const struct k_attention *a)
{
	struct timed *t = timed_of(s);

	t->ops->attention(begin(t), a);
	charge(t, PART_ATTENTION, 4.0 * attended(a), 4.0 * attention_rows(a));
}

static void timed_attention_backward(struct k_stream *s, const struct k_attention_backward *a)
{
	struct timed *t = timed_of(s);

	t->ops->attention_backward(begin(t), a);
	charge(t, PART_ATTENTION, 10.0 * attended(&a->fwd), 8.0 * attention_rows(&a->fwd));
}

static void timed_xent(struct k_stream *s, const struct k_xent *a)
{
	struct timed *t = timed_of(s);

	t->ops->xent(begin(t), a);
	charge(t, PART_LOSS, 0, 8.0 * a->n_mb * a->rows * a->vocab);
}

static void timed_fold(struct k_stream *s, const struct k_fold *a)
{
	struct timed *t = timed_of(s);
	double bytes = 0;

	for (uint32_t i = 0; i < a->n_seg; i++) {
		const struct k_fold_seg *g = &a->seg[i];

		bytes += 4.0 * (double)g->n * (1 + (g->b != NULL) + (g->b || g->dst != g->a));
	}
	t->ops->fold(begin(t), a);
	charge(t, PART_FOLD, 0, bytes);
}

static void timed_adam(struct k_stream *s, const struct k_adam *a)
{
	struct timed *t = timed_of(s);

	t->ops->adam(begin(t), a);
	charge(t, PART_OPTIMIZER, 0, 28.0 * (double)a->n);
}

/* What a step of GPT-2 calls. */
static const struct k_ops timed_ops = {
	.name = "timed cpu",
	.workspace_bytes = timed_workspace,
	.stream_open = timed_open,
	.stream_close = timed_close,
	.stream_error = timed_error,
	.event_record = timed_record,
	.event_wait = timed_wait,
	.zero = timed_zero,
	.embed = timed_embed,
	.embed_backward = timed_embed_backward,
	.norm = timed_norm,
	.norm_backward = timed_norm_backward,
	.residual = timed_residual,
	.linear = timed_linear,
	.linear_backward = timed_linear_backward,
	.attention = timed_attention,
	.attention_backward = timed_attention_backward,
	.xent = timed_xent,
	.fold = timed_fold,
	.adam = timed_adam,
};

/* ------------------------------------------------------------------ the machine */

/*
 * Twelve chains of multiply-adds hide the latency of two units. What comes out
 * is stored, so that nothing is left out. A pass takes milliseconds, and the best
 * of many counts, so that what else the machine does stays out.
 */
enum { CHAINS = 12, ROUNDS = 1 << 22 };

#if defined(__x86_64__)
#define FMA_LOOP(type, set, fma, store)               \
	type x[CHAINS], k = set(0.999f);              \
	for (unsigned i = 0; i < CHAINS; i++)         \
		x[i] = set(1.0f + (float)i);          \
	for (unsigned r = 0; r < ROUNDS; r++)         \
		for (unsigned i = 0; i < CHAINS; i++) \
			x[i] = fma(x[i], k, k);       \
	for (unsigned i = 0; i < CHAINS; i++)         \
		store(out + i * (sizeof(type) / 4), x[i]);

__attribute__((target("avx512f"))) static void fma_avx512(float *out)
{
	FMA_LOOP(__m512, _mm512_set1_ps, _mm512_fmadd_ps, _mm512_storeu_ps)
}

__attribute__((target("avx2,fma"))) static void fma_avx2(float *out)
{
	FMA_LOOP(__m256, _mm256_set1_ps, _mm256_fmadd_ps, _mm256_storeu_ps)
}
#endif

static void fma_portable(float *out)
{
	float x[CHAINS] = { 0 };

	for (unsigned r = 0; r < ROUNDS; r++)
		for (unsigned i = 0; i < CHAINS; i++)
			x[i] = x[i] * 0.999f + 0.999f;
	memcpy(out, x, sizeof(x));
}

/* Floats a register, and the loop that fills them. */
static unsigned widest(void (**loop)(float *out))
{
#if defined(__x86_64__)
	__builtin_cpu_init();
	if (__builtin_cpu_supports("avx512f")) {
		*loop = fma_avx512;
		return 16;
	}
	if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
		*loop = fma_avx2;
		return 8;
	}
#endif
	*loop = fma_portable;
	return 1;
}

enum pass { PASS_FMA, PASS_COPY, PASS_TRIAD, PASS_UPDATE, PASS_KINDS };

struct pass_job {
	enum pass pass;
	void (*fma)(float *out);
	float *a, *b, *c; /* this thread's */
	size_t n;
};

static void *pass_main(void *arg)
{
	struct pass_job *j = arg;
	float *restrict a = j->a, *restrict b = j->b, *restrict c = j->c;

	switch (j->pass) {
	case PASS_FMA:
		j->fma(a);
		break;
	case PASS_COPY:
		memcpy(a, b, j->n * sizeof(*a));
		break;
	case PASS_TRIAD:
		for (size_t i = 0; i < j->n; i++)
			a[i] = b[i] + 0.5f * c[i];
		break;
	case PASS_UPDATE:
		for (size_t i = 0; i < j->n; i++) {
			a[i] = a[i] * 0.5f + c[i];
			b[i] = b[i] * 0.5f + c[i];
		}
		break;
	case PASS_KINDS:
		assert(false);
	}
	return NULL;
}

/* Seconds of one pass of all threads. */
static double pass_time(enum pass pass, struct pass_job *jobs, unsigned threads)
{
	pthread_t thread[THREADS_MAX];
	uint64_t start = clock_now_ns();

	for (unsigned i = 0; i < threads; i++) {
		jobs[i].pass = pass;
		if (pthread_create(&thread[i], NULL, pass_main, &jobs[i]))
			abort();
	}
	for (unsigned i = 0; i < threads; i++)
		pthread_join(thread[i], NULL);
	return clock_seconds(clock_now_ns() - start);
}

/* Floating-point operations a second, and bytes a second of the passes: read and written, counted once. */
struct machine {
	double rate[PASS_KINDS];
};

static int measure_machine(struct machine *m, unsigned threads, size_t n, struct err *e)
{
	static const double bytes[PASS_KINDS] = { [PASS_COPY] = 8, [PASS_TRIAD] = 12, [PASS_UPDATE] = 20 };
	struct pass_job jobs[THREADS_MAX];
	void (*fma)(float *out);
	unsigned width = widest(&fma);
	size_t share = n / threads / 16 * 16;
	struct arena a;
	float *at;

	if (arena_init(&a, "passes", 3 * n * sizeof(float)))
		return err_set(e, -ENOMEM, "no memory to measure the memory");
	memset(a.base, 0, a.size);
	at = (float *)(void *)a.base;
	for (unsigned i = 0; i < threads; i++, at += 3 * share)
		jobs[i] = (struct pass_job){ .fma = fma, .a = at, .b = at + share, .c = at + 2 * share, .n = share };
	*m = (struct machine){ 0 };
	for (unsigned kind = 0; kind < PASS_KINDS; kind++) {
		double work = kind == PASS_FMA ? 2.0 * CHAINS * ROUNDS * width * threads
					       : bytes[kind] * (double)share * threads;

		for (unsigned i = 0; i < PASSES; i++) {
			double rate = work / pass_time((enum pass)kind, jobs, threads);

			m->rate[kind] = rate > m->rate[kind] ? rate : m->rate[kind];
		}
	}
	arena_release(&a);
	return 0;
}

/* ------------------------------------------------------------------------- main */

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static double median(double *v, size_t n)
{
	qsort(v, n, sizeof(*v), by_value);
	return v[n / 2];
}

/* Seconds of each step: of each part, and in all. */
struct measured {
	double part[PARTS][STEPS_MAX], step[STEPS_MAX];
	struct part_sum work[PARTS]; /* of one step */
	size_t n;
};

/* The first steps warm up: caches, pages, threads. */
enum { WARM_UP = 2 };

static int measure(struct bare *b, uint64_t steps, struct measured *m, struct err *e)
{
	struct timed *t = timed_of(b->net.stream);
	struct msg_step done;

	t->vocab = b->config.model.vocab_size;
	for (uint64_t step = 1; step <= WARM_UP + steps; step++) {
		uint64_t start = clock_now_ns();
		int rc;

		memset(t->part, 0, sizeof(t->part));
		rc = bare_step(b, step, &done, e);
		if (rc)
			return rc;
		if (step <= WARM_UP)
			continue;
		m->step[m->n] = clock_seconds(clock_now_ns() - start);
		for (unsigned p = 0; p < PARTS; p++)
			m->part[p][m->n] = t->part[p].seconds;
		m->n++;
	}
	memcpy(m->work, t->part, sizeof(m->work));
	return 0;
}

static void print(struct measured *m, const struct machine *machine)
{
	const double *r = machine->rate;
	double memory = 0;

	for (unsigned kind = PASS_COPY; kind < PASS_KINDS; kind++)
		memory = r[kind] > memory ? r[kind] : memory;
	printf("{\"fma_flops\": %.4g, \"copy_bytes\": %.4g, \"triad_bytes\": %.4g, \"update_bytes\": %.4g,\n",
	       r[PASS_FMA], r[PASS_COPY], r[PASS_TRIAD], r[PASS_UPDATE]);
	printf(" \"step_seconds\": %.6f, \"parts\": [\n", median(m->step, m->n));
	for (unsigned p = 0; p < PARTS; p++) {
		double arithmetic = m->work[p].flops / r[PASS_FMA], traffic = m->work[p].bytes / memory;

		printf("  {\"name\": \"%s\", \"seconds\": %.6f, \"allowed_seconds\": %.6f, \"limit\": \"%s\"}%s\n",
		       part_name[p], median(m->part[p], m->n), arithmetic > traffic ? arithmetic : traffic,
		       arithmetic > traffic ? "arithmetic" : "memory", p + 1 < PARTS ? "," : "");
	}
	printf(" ]}\n");
}

static int run(const char *config, uint64_t steps, unsigned threads, struct measured *m, struct err *e)
{
	struct machine machine;
	struct bare b;
	int rc = measure_machine(&machine, threads, 1u << 27, e);

	if (rc)
		return rc;
	rc = bare_open(&b, config, threads, &timed_ops, e);
	if (!rc && b.config.model.family != FAMILY_GPT2)
		rc = err_set(e, -ENOTSUP, "only a step of GPT-2 is taken apart");
	if (!rc)
		rc = measure(&b, steps, m, e);
	bare_close(&b);
	if (!rc)
		print(m, &machine);
	return rc;
}

int main(int argc, char **argv)
{
	uint64_t steps = argc == 4 ? strtoull(argv[2], NULL, 10) : 0;
	unsigned threads = argc == 4 ? (unsigned)strtoul(argv[3], NULL, 10) : 0;
	struct measured *m = calloc(1, sizeof(*m));
	struct err e = { 0 };
	int rc;

	if (!m || !steps || steps > STEPS_MAX || !threads || threads > THREADS_MAX) {
		fprintf(stderr, "usage: where CONFIG STEPS THREADS\n");
		free(m);
		return EXIT_USAGE;
	}
	rc = run(argv[1], steps, threads, m, &e);
	if (rc)
		fprintf(stderr, "where: %s\n", e.text);
	free(m);
	return rc ? EXIT_JOB_FAILED : EXIT_OK;
}
