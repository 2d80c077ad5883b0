/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The CPU stream: a call runs on the pool and has taken effect when it returns,
 * so that an event is always done. Callers must not rely on it; the deferred
 * backend shows whether they do.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cpu/cpu.h"

#define COPY_PIECE (1u << 20)

const struct isa_ops *isa_table(enum k_isa isa)
{
#if defined(__x86_64__)
	if (isa == K_ISA_AVX512)
		return &isa_ops_avx512;
	if (isa == K_ISA_AVX2)
		return &isa_ops_avx2;
#endif
	assert(isa == K_ISA_PORTABLE);
	return &isa_ops_portable;
}

/* ---------------------------------------------------------------- workspace */

size_t scratch_bytes(struct scratch need, unsigned threads)
{
	return round_up_u64(need.shared, CACHE_LINE) + threads * round_up_u64(need.per_thread, CACHE_LINE);
}

struct workspace workspace_take(const struct k_stream *s, struct scratch need)
{
	assert(scratch_bytes(need, s->threads) <= s->workspace_bytes);
	return (struct workspace){
		.shared = s->workspace,
		.threads = s->workspace + round_up_u64(need.shared, CACHE_LINE),
		.per_thread = round_up_u64(need.per_thread, CACHE_LINE),
	};
}

/* ------------------------------------------------------------------- stream */

static void thread_init(void *arg)
{
	blas_thread_init(arg);
}

int cpu_stream_open(const struct k_stream_config *cfg, struct k_stream **out, struct err *e)
{
	assert(cfg->threads >= 1 && (uintptr_t)cfg->workspace % CACHE_LINE == 0);
	int rc = k_profile_check(cfg->profile, e);
	if (rc)
		return rc;
	struct k_stream *s = malloc(sizeof(*s));
	if (!s)
		return err_set(e, -ENOMEM, "no memory for a compute stream");
	*s = (struct k_stream){
		.isa = isa_table(cfg->profile->isa),
		.threads = cfg->threads,
		.workspace = cfg->workspace,
		.workspace_bytes = cfg->workspace_bytes,
	};
	rc = blas_open(cfg->profile->library, cfg->profile->isa, &s->blas, e);
	if (rc)
		goto free_stream;
	blas_thread_init(&s->blas);
	rc = pool_open(cfg->threads, thread_init, &s->blas, &s->pool);
	if (rc) {
		err_set(e, rc, "cannot start %u compute threads: %s", cfg->threads, strerror(-rc));
		goto free_stream;
	}
	*out = s;
	return 0;

free_stream:
	free(s);
	return rc;
}

void cpu_stream_close(struct k_stream *s)
{
	pool_close(s->pool);
	free(s);
}

int cpu_stream_error(struct k_stream *s)
{
	(void)s;
	return 0;
}

void cpu_event_record(struct k_stream *s, struct k_event *ev)
{
	ev->ticket = ++s->ticket;
}

bool cpu_event_done(struct k_stream *s, const struct k_event *ev)
{
	assert(ev->ticket <= s->ticket);
	return true;
}

void cpu_event_wait(struct k_stream *s, const struct k_event *ev)
{
	assert(ev->ticket <= s->ticket);
}

/* ------------------------------------------------------------------ helpers */

struct drop drop_of(const struct k_dropout *d, uint32_t mb)
{
	assert(d->rate >= 0.0f && d->rate < 1.0f);
	if (d->rate == 0.0f)
		return (struct drop){ 0 };
	/* u < rate for u a multiple of 2^-24, in integers. */
	double limit = (double)d->rate * 16777216.0;
	uint32_t threshold = (uint32_t)limit;
	return (struct drop){
		.threshold = threshold + ((double)threshold < limit),
		.scale = 1.0f / (1.0f - d->rate),
		.seed = d->seed,
		.stream = d->stream[mb],
	};
}

void stream_gemm(const struct k_stream *s, struct gemm *g, float *scratch)
{
	if (s->blas.library == K_LIB_PORTABLE) {
		g->scratch = scratch;
		s->isa->gemm(g);
	} else {
		blas_gemm(&s->blas, g);
	}
}

struct copy_job {
	uint8_t *dst;
	const uint8_t *src; /* NULL: zero */
	size_t bytes;
};

static void copy_task(void *ctx, unsigned thread, uint32_t task)
{
	const struct copy_job *j = ctx;
	size_t at = (size_t)task * COPY_PIECE, n = j->bytes - at < COPY_PIECE ? j->bytes - at : COPY_PIECE;

	(void)thread;
	if (j->src)
		memcpy(j->dst + at, j->src + at, n);
	else
		memset(j->dst + at, 0, n);
}

void cpu_copy(struct k_stream *s, void *dst, const void *src, size_t bytes)
{
	struct copy_job j = { .dst = dst, .src = src, .bytes = bytes };
	pool_run(s->pool, copy_task, &j, (uint32_t)ceil_div_u64(bytes, COPY_PIECE));
}

void cpu_zero(struct k_stream *s, void *dst, size_t bytes)
{
	struct copy_job j = { .dst = dst, .bytes = bytes };
	pool_run(s->pool, copy_task, &j, (uint32_t)ceil_div_u64(bytes, COPY_PIECE));
}
