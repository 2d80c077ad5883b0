/* SPDX-License-Identifier: Apache-2.0 */
/* LayerNorm, RMSNorm and the residual stream. */
#include "kernels/cpu/cpu.h"

struct norm_job {
	struct k_stream *s;
	const struct k_norm *a;
	uint32_t rows_per_task;
};

static void norm_task(void *ctx, unsigned thread, uint32_t task)
{
	const struct norm_job *j = ctx;
	const struct k_norm *a = j->a;
	uint64_t row = (uint64_t)task * j->rows_per_task, end = row + j->rows_per_task;

	(void)thread;
	if (end > (uint64_t)a->n_mb * a->rows)
		end = (uint64_t)a->n_mb * a->rows;
	for (; row < end; row++) {
		const struct drop d = drop_of(&a->dropout, (uint32_t)(row / a->rows));
		j->s->isa->norm_row(a, row, &d, row % a->rows * a->cols);
	}
}

void cpu_norm(struct k_stream *s, const struct k_norm *a)
{
	struct norm_job j = { .s = s, .a = a, .rows_per_task = rows_per_task(a->cols) };

	assert(a->n_mb && a->rows && a->cols && a->x && a->gamma && (a->rms || a->beta) && a->y);
	assert(!a->branch == !a->sum);
	pool_run(s->pool, norm_task, &j, (uint32_t)ceil_div_u64((uint64_t)a->n_mb * a->rows, j.rows_per_task));
}

/* ----------------------------------------------------------------- backward */

struct norm_backward_job {
	struct k_stream *s;
	const struct k_norm_backward *a;
	uint32_t rows_per_task, row_tasks;
};

static void norm_rows(const struct norm_backward_job *j, uint32_t task)
{
	uint64_t row = (uint64_t)task * j->rows_per_task, end = row + j->rows_per_task;

	if (end > (uint64_t)j->a->n_mb * j->a->rows)
		end = (uint64_t)j->a->n_mb * j->a->rows;
	for (; row < end; row++)
		j->s->isa->norm_back_row(j->a, row);
}

/* dgamma and dbeta of a block of columns: each leaf in row order, leaves along the tree. */
static void norm_cols(const struct norm_backward_job *j, uint32_t task)
{
	const struct k_norm_backward *a = j->a;
	const uint32_t first = task * NORM_COLS, n = a->cols - first < NORM_COLS ? a->cols - first : NORM_COLS;
	float slot[TREE_SLOTS_MAX][2][NORM_COLS];

	for (uint32_t k = 0; k < a->n_mb; k++) {
		uint32_t top = tree_slot(k);
		j->s->isa->norm_back_cols(a, k, first, n, slot[top][0], slot[top][1]);
		for (uint32_t m = tree_merges(k, a->n_mb); m > 0; m--, top--) {
			const struct rect below = { .p = slot[top - 1][0], .ld = NORM_COLS, .rows = 2, .cols = n };
			j->s->isa->add_rect(&below, slot[top][0], NORM_COLS);
		}
	}
	memcpy(a->dgamma + first, slot[0][0], n * sizeof(float));
	if (!a->rms)
		memcpy(a->dbeta + first, slot[0][1], n * sizeof(float));
}

static void norm_backward_task(void *ctx, unsigned thread, uint32_t task)
{
	const struct norm_backward_job *j = ctx;

	(void)thread;
	if (task < j->row_tasks)
		norm_rows(j, task);
	else
		norm_cols(j, task - j->row_tasks);
}

void cpu_norm_backward(struct k_stream *s, const struct k_norm_backward *a)
{
	struct norm_backward_job j = { .s = s, .a = a, .rows_per_task = rows_per_task(a->cols) };

	assert(a->n_mb && a->rows && a->cols && a->x && a->rstd && a->gamma && a->dy && a->dgamma);
	assert(a->rms || (a->mean && a->dbeta));
	/* Rows and columns run beside each other, and both read x and dy. */
	assert(a->dx && a->dx != a->x && a->dx != a->dy);
	j.row_tasks = (uint32_t)ceil_div_u64((uint64_t)a->n_mb * a->rows, j.rows_per_task);
	pool_run(s->pool, norm_backward_task, &j, j.row_tasks + ceil_div_u32(a->cols, NORM_COLS));
}

/* ----------------------------------------------------------------- residual */

struct residual_job {
	struct k_stream *s;
	const struct k_residual *a;
	uint32_t rows_per_task, tasks_per_mb;
};

static void residual_task(void *ctx, unsigned thread, uint32_t task)
{
	const struct residual_job *j = ctx;
	const struct k_residual *a = j->a;
	uint32_t mb = task / j->tasks_per_mb, row = task % j->tasks_per_mb * j->rows_per_task;
	uint32_t rows = a->rows - row < j->rows_per_task ? a->rows - row : j->rows_per_task;
	uint64_t in_mb = (uint64_t)row * a->cols, at = (uint64_t)mb * a->rows * a->cols + in_mb;
	const struct drop d = drop_of(&a->dropout, mb);

	(void)thread;
	j->s->isa->residual(a->x ? a->x + at : NULL, a->branch + at, a->out + at, (uint64_t)rows * a->cols, &d, in_mb);
}

void cpu_residual(struct k_stream *s, const struct k_residual *a)
{
	struct residual_job j = { .s = s, .a = a, .rows_per_task = rows_per_task(a->cols) };

	assert(a->n_mb && a->rows && a->cols && a->branch && a->out);
	j.tasks_per_mb = ceil_div_u32(a->rows, j.rows_per_task);
	pool_run(s->pool, residual_task, &j, a->n_mb * j.tasks_per_mb);
}
