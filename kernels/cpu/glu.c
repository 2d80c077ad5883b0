/* SPDX-License-Identifier: Apache-2.0 */
/* Gated linear units: element by element, in pieces of the flat tensor. */
#include "kernels/cpu/cpu.h"

#define PIECE 16384u

struct glu_job {
	struct k_stream *s;
	const struct k_glu *a;
	const struct k_glu_backward *back; /* NULL: forward */
	uint64_t n;
};

static void glu_task(void *ctx, unsigned thread, uint32_t task)
{
	const struct glu_job *j = ctx;
	const struct k_glu *a = j->a;
	const uint64_t at = (uint64_t)task * PIECE;
	const uint32_t n = j->n - at < PIECE ? (uint32_t)(j->n - at) : PIECE;

	(void)thread;
	if (j->back)
		j->s->isa->glu_back(a->gate + at, a->up + at, j->back->dy + at, j->back->dgate + at, j->back->dup + at,
				    n, a->act);
	else
		j->s->isa->glu(a->gate + at, a->up + at, a->y + at, n, a->act);
}

static void glu_run(struct k_stream *s, const struct k_glu *a, const struct k_glu_backward *back)
{
	struct glu_job j = { .s = s, .a = a, .back = back, .n = (uint64_t)a->n_mb * a->rows * a->cols };

	assert(j.n && a->gate && a->up);
	pool_run(s->pool, glu_task, &j, (uint32_t)ceil_div_u64(j.n, PIECE));
}

void cpu_glu(struct k_stream *s, const struct k_glu *a)
{
	assert(a->y && a->y != a->gate && a->y != a->up);
	glu_run(s, a, NULL);
}

void cpu_glu_backward(struct k_stream *s, const struct k_glu_backward *a)
{
	assert(a->dy && a->dgate && a->dup && a->dgate != a->dup);
	glu_run(s, &a->fwd, a);
}
