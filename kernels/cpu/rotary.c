/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rotary position embedding, behind the RMSNorm of each head where there is one.
 * A head is then a row of head_dim columns for the norm's own loops: forward
 * normalises a row of heads into the output and turns it there while it is in
 * the cache. Backward takes three passes, since dx may lie where dout is and
 * the gamma gradient needs what is between the two steps: turn back into dx;
 * from it sum gamma's gradient, each micro-batch's leaf in blocks of columns,
 * the leaves then along the tree; carry dx through the norm in place.
 */
#include "kernels/cpu/cpu.h"

/* Columns of a leaf that one task sums: a cache line, so that heads of usual sizes give enough tasks. */
#define GAMMA_COLS 16u
_Static_assert(GAMMA_COLS <= NORM_COLS, "a block of the norm's column loop");

struct rotary_job {
	struct k_stream *s;
	const struct k_rotary *a;
	const float *from; /* what is turned, unless it is normalised first */
	float *to;
	bool back;
	uint32_t rows_per_task;
	struct k_norm norm;          /* forward with gamma */
	struct k_norm_backward undo; /* backward with gamma */
	float *leaves;               /* [n_mb][head_dim] */
};

/* Leaves of gamma's gradient. */
struct scratch rotary_backward_scratch(uint32_t n_mb, uint32_t head_dim)
{
	return (struct scratch){ .shared = (size_t)n_mb * head_dim * sizeof(float) };
}

static struct rotary_job rotary_job(struct k_stream *s, const struct k_rotary *a)
{
	assert(a->n_mb && a->rows && a->seq && a->heads && a->head_dim);
	assert((uint64_t)a->rows * a->heads <= UINT32_MAX);
	assert(a->rot % 2 == 0 && a->rot <= a->head_dim && (!a->rot || (a->cos && a->sin)));
	return (struct rotary_job){ .s = s, .a = a, .rows_per_task = rows_per_task(a->heads * a->head_dim) };
}

static uint32_t row_tasks(const struct rotary_job *j)
{
	return (uint32_t)ceil_div_u64((uint64_t)j->a->n_mb * j->a->rows, j->rows_per_task);
}

/* The rows of one task: from its first up to *end. */
static uint64_t task_rows(const struct rotary_job *j, uint32_t task, uint64_t *end)
{
	uint64_t first = (uint64_t)task * j->rows_per_task, rows = (uint64_t)j->a->n_mb * j->a->rows;

	*end = rows - first < j->rows_per_task ? rows : first + j->rows_per_task;
	return first;
}

static void turn_row(const struct rotary_job *j, const float *from, uint64_t row)
{
	const struct k_rotary *a = j->a;
	const size_t width = (size_t)a->heads * a->head_dim, half = a->rot / 2;
	const size_t position = a->first_position + row % a->rows % a->seq;

	const struct turn t = {
		.x = from + row * width,
		.out = j->to + row * width,
		.heads = a->heads,
		.head_dim = a->head_dim,
		.rot = a->rot,
		.cos = a->rot ? a->cos + position * half : NULL,
		.sin = a->rot ? a->sin + position * half : NULL,
		.back = j->back,
	};
	j->s->isa->rotary_row(&t);
}

static void turn_task(void *ctx, unsigned thread, uint32_t task)
{
	const struct rotary_job *j = ctx;
	uint64_t end, row = task_rows(j, task, &end);

	(void)thread;
	for (; row < end; row++)
		turn_row(j, j->from, row);
}

static void normalise_task(void *ctx, unsigned thread, uint32_t task)
{
	const struct rotary_job *j = ctx;
	uint64_t end, row = task_rows(j, task, &end);

	(void)thread;
	for (; row < end; row++) {
		for (uint32_t h = 0; h < j->a->heads; h++)
			j->s->isa->norm_row(&j->norm, row * j->a->heads + h, NULL, 0);
		turn_row(j, j->to, row);
	}
}

void cpu_rotary(struct k_stream *s, const struct k_rotary *a)
{
	struct rotary_job j = rotary_job(s, a);

	assert(a->x && a->out && (!a->gamma || a->x != a->out));
	j.from = a->x;
	j.to = a->out;
	j.norm = (struct k_norm){
		.n_mb = a->n_mb,
		.rows = a->rows * a->heads,
		.cols = a->head_dim,
		.eps = a->eps,
		.rms = true,
		.x = a->x,
		.gamma = a->gamma,
		.y = a->out,
		.rstd = a->rstd,
	};
	pool_run(s->pool, a->gamma ? normalise_task : turn_task, &j, row_tasks(&j));
}

/* ----------------------------------------------------------------- backward */

static void leaf_task(void *ctx, unsigned thread, uint32_t task)
{
	const struct rotary_job *j = ctx;
	const uint32_t blocks = ceil_div_u32(j->a->head_dim, GAMMA_COLS), mb = task / blocks;
	const uint32_t first = task % blocks * GAMMA_COLS, left = j->a->head_dim - first;
	float no_beta[GAMMA_COLS];

	(void)thread;
	j->s->isa->norm_back_cols(&j->undo, mb, first, left < GAMMA_COLS ? left : GAMMA_COLS,
				  j->leaves + (size_t)mb * j->a->head_dim + first, no_beta);
}

static void undo_task(void *ctx, unsigned thread, uint32_t task)
{
	const struct rotary_job *j = ctx;
	uint64_t end, row = task_rows(j, task, &end);

	(void)thread;
	for (row *= j->a->heads; row < end * j->a->heads; row++)
		j->s->isa->norm_back_row(&j->undo, row);
}

/* Leaves are added where they lie: a slot of the tree's stack is a pointer to one. */
static void sum_leaves(const struct rotary_job *j, float *dgamma)
{
	const uint32_t n = j->a->n_mb, cols = j->a->head_dim;
	float *slot[TREE_SLOTS_MAX];

	for (uint32_t k = 0; k < n; k++) {
		uint32_t top = tree_slot(k);
		slot[top] = j->leaves + (size_t)k * cols;
		for (uint32_t m = tree_merges(k, n); m > 0; m--, top--) {
			const struct rect below = { .p = slot[top - 1], .rows = 1, .cols = cols };
			j->s->isa->add_rect(&below, slot[top], 0);
		}
	}
	/* Slot 0 is the first leaf. */
	memcpy(dgamma, j->leaves, cols * sizeof(float));
}

void cpu_rotary_backward(struct k_stream *s, const struct k_rotary_backward *a)
{
	const struct k_rotary *f = &a->fwd;
	struct rotary_job j = rotary_job(s, f);

	assert(a->dout && a->dx && (!f->gamma || (f->x && f->rstd && a->dgamma && a->dx != f->x)));
	j.from = a->dout;
	j.to = a->dx;
	j.back = true;
	pool_run(s->pool, turn_task, &j, row_tasks(&j));
	if (!f->gamma)
		return;
	j.undo = (struct k_norm_backward){
		.n_mb = f->n_mb,
		.rows = f->rows * f->heads,
		.cols = f->head_dim,
		.rms = true,
		.x = f->x,
		.rstd = f->rstd,
		.gamma = f->gamma,
		.dy = a->dx,
		.dx = a->dx,
	};
	j.leaves = (float *)workspace_take(s, rotary_backward_scratch(f->n_mb, f->head_dim)).shared;
	pool_run(s->pool, leaf_task, &j, f->n_mb * ceil_div_u32(f->head_dim, GAMMA_COLS));
	sum_leaves(&j, a->dgamma);
	pool_run(s->pool, undo_task, &j, row_tasks(&j));
}
