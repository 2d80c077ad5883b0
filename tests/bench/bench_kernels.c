/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How fast the kernels are on this machine, at the shapes of GPT-2 124M.
 *
 *   bench_kernels [PROFILE [THREADS [ROWS [SPAN]]]]
 *
 * PROFILE as in the config's "math" ("" for the table's choice), ROWS of a
 * micro-batch (its sequences are at most 256 long), SPAN micro-batches a call.
 * A line is operation, shape, median and best of several runs in ms, and for the
 * best GFLOP/s of products or GB/s, counting what has to be read and written once.
 */
#include <stdlib.h>
#include <string.h>

#include "kernels/kernels.h"

#define RUNS_MAX 64

struct bench {
	const struct k_ops *ops;
	struct k_stream *s;
	uint32_t rows, span, batch, seq;
	float *buf[8]; /* what operations read and write, each of buf_floats */
	size_t buf_floats;
	uint32_t *tokens;
	double *loss;
};

typedef void bench_call(struct bench *b, const void *args);

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;
	return (x > y) - (x < y);
}

struct timing {
	double median, best;
};

/* Runs for about half a second. */
static struct timing bench_time(struct bench *b, bench_call *call, const void *args)
{
	double ms[RUNS_MAX];
	int n = 0;

	call(b, args);
	for (uint64_t start = clock_now_ns(); n < RUNS_MAX && (n < 5 || clock_now_ns() - start < 500000000);) {
		struct k_event ev;
		uint64_t t0 = clock_now_ns();
		call(b, args);
		b->ops->event_record(b->s, &ev);
		b->ops->event_wait(b->s, &ev);
		ms[n++] = (double)(clock_now_ns() - t0) * 1e-6;
	}
	qsort(ms, (size_t)n, sizeof(ms[0]), by_value);
	return (struct timing){ ms[n / 2], ms[0] };
}

static void report(const char *name, const char *shape, struct timing t, double flops, double bytes)
{
	printf("%-20s %-26s %9.3f %9.3f ms %8.1f %s\n", name, shape, t.median, t.best, (flops + bytes) / t.best * 1e-6,
	       flops > 0.0 ? "GFLOP/s" : "GB/s");
	fflush(stdout);
}

/* ------------------------------------------------------------------- layers */

struct layer {
	uint32_t in, out;
	bool w_out_in;
	enum k_activation act;
	bool dx, dw;
};

static void call_linear(struct bench *b, const void *args)
{
	const struct layer *l = args;
	b->ops->linear(b->s, &(struct k_linear){ .n_mb = b->span,
						 .rows = b->rows,
						 .in = l->in,
						 .out = l->out,
						 .w_out_in = l->w_out_in,
						 .act = l->act,
						 .x = b->buf[0],
						 .w = b->buf[1],
						 .b = l->w_out_in ? NULL : b->buf[2],
						 .pre = l->act == K_ACT_NONE ? NULL : b->buf[3],
						 .y = b->buf[4] });
}

static void call_linear_backward(struct bench *b, const void *args)
{
	const struct layer *l = args;
	b->ops->linear_backward(b->s, &(struct k_linear_backward){ .n_mb = b->span,
								   .rows = b->rows,
								   .in = l->in,
								   .out = l->out,
								   .w_out_in = l->w_out_in,
								   .x = b->buf[0],
								   .w = b->buf[1],
								   .dy = b->buf[4],
								   .dx = l->dx ? b->buf[3] : NULL,
								   .dw = l->dw ? b->buf[5] : NULL,
								   .db = l->dw && !l->w_out_in ? b->buf[2] : NULL,
								   .act_in = l->act,
								   .pre_in = b->buf[6] });
}

static void bench_layers(struct bench *b)
{
	const struct layer layers[] = {
		{ 768, 2304, false, K_ACT_NONE, false, false },      { 768, 768, false, K_ACT_NONE, false, false },
		{ 768, 3072, false, K_ACT_GELU_TANH, false, false }, { 3072, 768, false, K_ACT_NONE, false, false },
		{ 768, 50304, true, K_ACT_NONE, false, false },
	};
	char shape[64];

	for (size_t i = 0; i < ARRAY_LEN(layers); i++) {
		struct layer l = layers[i];
		double flops = 2.0 * b->span * b->rows * l.in * l.out;
		snprintf(shape, sizeof(shape), "%ux%u x %u x %u", b->span, b->rows, l.in, l.out);
		report("linear", shape, bench_time(b, call_linear, &l), flops, 0.0);
		/* A layer's backward carries the activation of what comes before it: the second MLP product's. */
		l.act = l.in == 3072 ? K_ACT_GELU_TANH : K_ACT_NONE;
		l.dx = true;
		report("linear_backward dx", shape, bench_time(b, call_linear_backward, &l), flops, 0.0);
		l.dx = false;
		l.dw = true;
		report("linear_backward dw", shape, bench_time(b, call_linear_backward, &l), flops, 0.0);
		l.dx = true;
		report("linear_backward", shape, bench_time(b, call_linear_backward, &l), 2.0 * flops, 0.0);
	}
}

/* ---------------------------------------------------------------- attention */

static struct k_attention attention_of(const struct bench *b)
{
	return (struct k_attention){ .n_mb = b->span,
				     .batch = b->batch,
				     .q_len = b->seq,
				     .kv_len = b->seq,
				     .heads = 12,
				     .kv_heads = 12,
				     .head_dim = 64,
				     .scale = 0.125f,
				     .q = b->buf[0],
				     .k = b->buf[0] + 768,
				     .v = b->buf[0] + 1536,
				     .q_stride = 2304,
				     .k_stride = 2304,
				     .v_stride = 2304,
				     .out_stride = 768,
				     .out = b->buf[1],
				     .lse = b->buf[2] };
}

static void call_attention(struct bench *b, const void *args)
{
	const struct k_attention a = attention_of(b);
	(void)args;
	b->ops->attention(b->s, &a);
}

static void call_attention_backward(struct bench *b, const void *args)
{
	const struct k_attention_backward a = { attention_of(b), b->buf[3], b->buf[4], b->buf[4] + 768,
						b->buf[4] + 1536 };
	(void)args;
	b->ops->attention_backward(b->s, &a);
}

static void bench_attention(struct bench *b)
{
	char shape[64];
	/* The causal half only, which is what has to be done. */
	double flops = 4.0 * b->span * b->batch * 12 * 64 * b->seq * (b->seq + 1.0) / 2.0;

	snprintf(shape, sizeof(shape), "%ux%u x %u x 12 x 64", b->span, b->batch, b->seq);
	report("attention", shape, bench_time(b, call_attention, NULL), flops, 0.0);
	report("attention_backward", shape, bench_time(b, call_attention_backward, NULL), 2.5 * flops, 0.0);
}

/* ---------------------------------------------------------------- the rest */

static void call_norm(struct bench *b, const void *args)
{
	(void)args;
	b->ops->norm(b->s, &(struct k_norm){ .n_mb = b->span,
					     .rows = b->rows,
					     .cols = 768,
					     .eps = 1e-5f,
					     .x = b->buf[0],
					     .branch = b->buf[1],
					     .sum = b->buf[2],
					     .gamma = b->buf[3],
					     .beta = b->buf[3],
					     .y = b->buf[4],
					     .mean = b->buf[5],
					     .rstd = b->buf[5] + 65536 });
}

static void call_norm_backward(struct bench *b, const void *args)
{
	(void)args;
	b->ops->norm_backward(b->s, &(struct k_norm_backward){ .n_mb = b->span,
							       .rows = b->rows,
							       .cols = 768,
							       .x = b->buf[0],
							       .mean = b->buf[5],
							       .rstd = b->buf[5] + 65536,
							       .gamma = b->buf[3],
							       .dy = b->buf[4],
							       .dresidual = b->buf[1],
							       .dx = b->buf[1],
							       .dgamma = b->buf[6],
							       .dbeta = b->buf[6] + 768 });
}

static void call_residual_dropout(struct bench *b, const void *args)
{
	static const uint64_t streams[64];
	(void)args;
	b->ops->residual(b->s, &(struct k_residual){
				       b->span, b->rows, 768, b->buf[0], b->buf[1], b->buf[2], { 0.1f, 1, streams } });
}

static void call_embed_backward(struct bench *b, const void *args)
{
	(void)args;
	b->ops->embed_backward(b->s, &(struct k_embed_backward){ .n_mb = b->span,
								 .batch = b->batch,
								 .seq = b->seq,
								 .channels = 768,
								 .vocab = 50257,
								 .positions = 1024,
								 .tokens = b->tokens,
								 .dx = b->buf[0],
								 .dwte = b->buf[5],
								 .dwpe = b->buf[1] });
}

static void call_xent(struct bench *b, const void *args)
{
	(void)args;
	b->ops->xent(b->s, &(struct k_xent){ b->span, b->rows, 50257, false, b->buf[4], b->tokens, b->loss, 0, 0 });
}

static void call_fold(struct bench *b, const void *args)
{
	const struct k_fold_seg seg = { b->buf[0], b->buf[1], b->buf[2], b->buf_floats };
	struct exact_sum sum;
	(void)args;
	exact_sum_clear(&sum);
	b->ops->fold(b->s, &(struct k_fold){ &seg, 1, &sum });
}

static void call_adam(struct bench *b, const void *args)
{
	(void)args;
	b->ops->adam(b->s, &(struct k_adam){ .p = b->buf[0],
					     .m = b->buf[1],
					     .v = b->buf[2],
					     .grad = b->buf[3],
					     .n = b->buf_floats,
					     .grad_scale = 1.0,
					     .lr = 1e-4,
					     .beta1 = 0.9,
					     .beta2 = 0.999,
					     .eps = 1e-8,
					     .weight_decay = 0.01,
					     .bias1 = 1.0,
					     .bias2 = 1.0,
					     .decoupled = true });
}

static void call_hash(struct bench *b, const void *args)
{
	struct hash128 h = { 0 };
	(void)args;
	b->ops->state_hash(b->s, &(struct k_state_hash){ b->buf[0], b->buf[1], b->buf[2], b->buf_floats, 0, 1, &h });
}

static void call_short_job(struct bench *b, const void *args)
{
	(void)args;
	b->ops->zero(b->s, b->buf[0], 2u << 20);
}

static void bench_rest(struct bench *b)
{
	const double act = 4.0 * b->span * b->rows * 768, all = 4.0 * (double)b->buf_floats;
	char shape[64];

	snprintf(shape, sizeof(shape), "%ux%u x 768", b->span, b->rows);
	report("norm + residual", shape, bench_time(b, call_norm, NULL), 0.0, 4.0 * act);
	report("norm_backward", shape, bench_time(b, call_norm_backward, NULL), 0.0, 4.0 * act);
	report("residual, dropout", shape, bench_time(b, call_residual_dropout, NULL), 0.0, 3.0 * act);
	snprintf(shape, sizeof(shape), "%ux%u x 50257", b->span, b->rows);
	report("embed_backward", shape, bench_time(b, call_embed_backward, NULL), 0.0, 2.0 * act + 4.0 * 50257 * 768);
	report("xent", shape, bench_time(b, call_xent, NULL), 0.0, 2.0 * act / 768 * 50257);
	snprintf(shape, sizeof(shape), "%.1f M", (double)b->buf_floats * 1e-6);
	report("fold 2 + norm", shape, bench_time(b, call_fold, NULL), 0.0, 3.0 * all);
	report("adam", shape, bench_time(b, call_adam, NULL), 0.0, 7.0 * all);
	report("state_hash", shape, bench_time(b, call_hash, NULL), 0.0, 3.0 * all);
	report("zero", "2 MiB", bench_time(b, call_short_job, NULL), 0.0, 2u << 20);
}

static int bench_open(struct bench *b, const char *want, unsigned threads)
{
	const struct k_dims dims = { b->span, b->batch, b->seq, 768, 12, 12, 64, 3072, 50304 };
	struct k_profile profile;
	struct err e = { 0 };
	char reason[160];
	size_t bytes = b->ops->workspace_bytes(&dims, threads);

	b->buf_floats = round_up_u64((uint64_t)50304 * (b->rows * b->span > 768 ? b->rows * b->span : 768), K_CHUNK);
	for (size_t i = 0; i < ARRAY_LEN(b->buf); i++) {
		struct arena a;
		if (arena_init(&a, "bench", b->buf_floats * sizeof(float)))
			return -1;
		b->buf[i] = (float *)(void *)a.base;
		for (size_t k = 0; k < b->buf_floats; k++)
			b->buf[i][k] = (float)((k * 2654435761u >> 8) % 1000) * 1e-3f + 1e-3f;
	}
	b->tokens = calloc((size_t)b->span * b->rows, sizeof(uint32_t));
	b->loss = calloc(b->span, sizeof(double));
	for (uint32_t i = 0; i < b->span * b->rows; i++)
		b->tokens[i] = (uint32_t)(rng_u64(1, 1, i) % 50257);
	if (k_profile_detect(want, &profile, reason, &e)) {
		fprintf(stderr, "%s\n", e.text);
		return -1;
	}
	const struct k_stream_config cfg = { &profile, threads, aligned_alloc(64, bytes), bytes };
	if (b->ops->stream_open(&cfg, &b->s, &e)) {
		fprintf(stderr, "%s\n", e.text);
		return -1;
	}
	printf("%s (%s), %u threads, workspace %.1f MiB\n", profile.text, reason, threads, (double)bytes / 1048576.0);
	return 0;
}

int main(int argc, char **argv)
{
	const char *want = argc > 1 ? argv[1] : "";
	unsigned threads = argc > 2 ? (unsigned)strtoul(argv[2], NULL, 10) : 2;
	struct bench b = { .ops = k_cpu_ops() };

	b.rows = argc > 3 ? (uint32_t)strtoul(argv[3], NULL, 10) : 256;
	b.span = argc > 4 ? (uint32_t)strtoul(argv[4], NULL, 10) : 1;
	if (threads < 1 || threads > 1024 || b.rows < 1 || b.rows > 65536 || b.span < 1 || b.span > 64)
		return EXIT_USAGE;
	b.seq = b.rows < 256 ? b.rows : 256;
	b.batch = b.rows / b.seq;
	b.rows = b.batch * b.seq;
	if (bench_open(&b, want, threads))
		return EXIT_JOB_FAILED;
	bench_layers(&b);
	bench_attention(&b);
	bench_rest(&b);
	b.ops->stream_close(b.s);
	return EXIT_OK;
}
