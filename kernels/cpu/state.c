/* SPDX-License-Identifier: Apache-2.0 */
/* Passes over state: fold, Adam, hash. Bound by memory, so tasks are runs of whole chunks. */
#include "kernels/cpu/cpu.h"

#define TASK_ELEMENTS (16ull * K_CHUNK)

/* What a thread keeps through a job, on cache lines of its own. */
struct state_thread {
	_Alignas(CACHE_LINE) struct exact_sum sum;
	struct hash128 hash;
	/* fold: the segment that this thread's last task was in, and that segment's first task. */
	uint32_t seg, seg_first_task;
};

struct scratch state_scratch(void)
{
	return (struct scratch){ .per_thread = sizeof(struct state_thread) };
}

static struct workspace state_threads(struct k_stream *s)
{
	struct workspace ws = workspace_take(s, state_scratch());

	for (unsigned t = 0; t < s->threads; t++)
		memset(workspace_thread(&ws, t), 0, sizeof(struct state_thread));
	return ws;
}

static uint32_t tasks_of(uint64_t n)
{
	return (uint32_t)ceil_div_u64(n, TASK_ELEMENTS);
}

/* --------------------------------------------------------------------- fold */

struct fold_job {
	struct k_stream *s;
	const struct k_fold *a;
	struct workspace ws;
};

static void fold_task(void *ctx, unsigned thread, uint32_t task)
{
	const struct fold_job *j = ctx;
	struct state_thread *t = workspace_thread(&j->ws, thread);
	const struct k_fold_seg *seg;

	/* A thread's tasks only grow, so it goes on where it was. */
	while (task - t->seg_first_task >= tasks_of(j->a->seg[t->seg].n))
		t->seg_first_task += tasks_of(j->a->seg[t->seg++].n);
	seg = &j->a->seg[t->seg];
	uint64_t at = (task - t->seg_first_task) * TASK_ELEMENTS;
	uint64_t n = seg->n - at < TASK_ELEMENTS ? seg->n - at : TASK_ELEMENTS;
	j->s->isa->fold(seg->dst + at, seg->a + at, seg->b ? seg->b + at : NULL, n, j->a->square_sum ? &t->sum : NULL);
}

void cpu_fold(struct k_stream *s, const struct k_fold *a)
{
	struct fold_job j = { .s = s, .a = a, .ws = state_threads(s) };
	uint32_t tasks = 0;

	for (uint32_t i = 0; i < a->n_seg; i++) {
		assert(a->seg[i].n % K_CHUNK == 0 && a->seg[i].dst && a->seg[i].a);
		tasks += tasks_of(a->seg[i].n);
	}
	pool_run(s->pool, fold_task, &j, tasks);
	for (unsigned t = 0; a->square_sum && t < s->threads; t++) {
		const struct state_thread *st = workspace_thread(&j.ws, t);
		exact_sum_merge(a->square_sum, &st->sum);
	}
}

/* --------------------------------------------------------------------- Adam */

struct adam_job {
	struct k_stream *s;
	const struct k_adam *a;
	struct adam_scalars scalars;
};

static void adam_task(void *ctx, unsigned thread, uint32_t task)
{
	const struct adam_job *j = ctx;
	const struct k_adam *a = j->a;
	uint64_t at = task * TASK_ELEMENTS, n = a->n - at < TASK_ELEMENTS ? a->n - at : TASK_ELEMENTS;

	(void)thread;
	j->s->isa->adam(a->p + at, a->m + at, a->v + at, a->grad + at, n, &j->scalars);
}

void cpu_adam(struct k_stream *s, const struct k_adam *a)
{
	struct adam_job j = { .s = s, .a = a };

	assert(a->n % K_CHUNK == 0 && a->p && a->m && a->v && a->grad);
	j.scalars = (struct adam_scalars){
		.grad_scale = (float)a->grad_scale,
		.beta1 = (float)a->beta1,
		.one_minus_beta1 = (float)(1.0 - a->beta1),
		.beta2 = (float)a->beta2,
		.one_minus_beta2 = (float)(1.0 - a->beta2),
		.decay = (float)(a->decoupled ? a->lr * a->weight_decay : a->weight_decay),
		.step = (float)(a->lr / a->bias1),
		.root_bias2 = (float)__builtin_sqrt(a->bias2),
		.eps = (float)a->eps,
		.decoupled = a->decoupled,
	};
	pool_run(s->pool, adam_task, &j, tasks_of(a->n));
}

/* --------------------------------------------------------------------- hash */

struct hash_job {
	const struct k_state_hash *a;
	struct workspace ws;
};

static void hash_task(void *ctx, unsigned thread, uint32_t task)
{
	const struct hash_job *j = ctx;
	const struct k_state_hash *a = j->a;
	struct state_thread *t = workspace_thread(&j->ws, thread);
	const float *const parts[] = { a->p, a->m, a->v };
	uint64_t seed = (uint64_t)a->unit << 40 | (a->first_chunk + task) << 2;

	for (uint32_t i = 0; i < ARRAY_LEN(parts); i++)
		t->hash = hash128_add(t->hash,
				      hash128(parts[i] + (size_t)task * K_CHUNK, K_CHUNK * sizeof(float), seed | i));
}

void cpu_state_hash(struct k_stream *s, const struct k_state_hash *a)
{
	struct hash_job j = { .a = a, .ws = state_threads(s) };

	assert(a->n % K_CHUNK == 0 && a->unit < 1u << 24 && a->first_chunk + a->n / K_CHUNK <= 1ull << 38);
	pool_run(s->pool, hash_task, &j, (uint32_t)(a->n / K_CHUNK));
	for (unsigned t = 0; t < s->threads; t++) {
		const struct state_thread *st = workspace_thread(&j.ws, t);
		*a->out = hash128_add(*a->out, st->hash);
	}
}
