/* SPDX-License-Identifier: Apache-2.0 */
/* Cross-entropy and its gradient, row by row in place. */
#include "kernels/cpu/cpu.h"

struct xent_job {
	struct k_stream *s;
	const struct k_xent *a;
	const uint32_t *targets; /* of the rows at hand */
	double *row_loss;        /* [n_mb][rows] */
	uint32_t *counted;       /* [n_mb] */
	uint32_t rows_per_task;
};

struct scratch xent_scratch(uint32_t n_mb, uint64_t rows)
{
	return (struct scratch){ .shared = n_mb * (rows * sizeof(double) + sizeof(uint32_t)) };
}

static void xent_one(const struct xent_job *j, uint64_t row)
{
	const struct k_xent *a = j->a;
	float *logits = a->logits + row * a->vocab;
	uint32_t target = j->targets[row];
	float sum;

	if (target == K_IGNORE_TARGET) {
		j->row_loss[row] = 0.0;
		if (!a->loss_only)
			memset(logits, 0, a->vocab * sizeof(float));
		return;
	}
	assert(target < a->vocab);
	uint64_t mb = row / a->rows;
	float inv_count = 1.0f / (float)j->counted[mb];
	double below_max = j->s->isa->xent_row(logits, a->vocab, target, inv_count, a->loss_only, &sum);
	/* A sum that is no number keeps being none; det_log is for numbers. */
	j->row_loss[row] = sum >= 1.0f ? below_max + det_log((double)sum) : (double)sum + below_max;
}

static void xent_task(void *ctx, unsigned thread, uint32_t task)
{
	const struct xent_job *j = ctx;
	uint64_t row = (uint64_t)task * j->rows_per_task, end = row + j->rows_per_task;

	(void)thread;
	if (end > (uint64_t)j->a->n_mb * j->a->rows)
		end = (uint64_t)j->a->n_mb * j->a->rows;
	for (; row < end; row++)
		xent_one(j, row);
}

/* Of the whole micro-batch, also when only a piece of it is at hand. */
static uint32_t count_rows(const struct k_xent *a, uint32_t mb)
{
	uint32_t rows = a->all_rows ? a->all_rows : a->rows, counted = 0;

	for (uint32_t r = 0; r < rows; r++)
		counted += a->targets[(size_t)mb * rows + r] != K_IGNORE_TARGET;
	return counted;
}

/* Rows are added one by one, so that pieces give the bits of the whole. */
static void add_loss(const struct xent_job *j, uint32_t mb)
{
	const struct k_xent *a = j->a;
	double sum = a->first_row ? a->loss[mb] : 0.0;

	for (uint32_t r = 0; r < a->rows; r++)
		sum += j->row_loss[(size_t)mb * a->rows + r];
	if (a->first_row + a->rows < a->all_rows)
		a->loss[mb] = sum;
	else
		a->loss[mb] = j->counted[mb] ? sum / j->counted[mb] : 0.0;
}

void cpu_xent(struct k_stream *s, const struct k_xent *a)
{
	assert(a->n_mb && a->rows && a->vocab && a->logits && a->targets && a->loss);
	assert(a->all_rows ? a->n_mb == 1 && a->first_row + a->rows <= a->all_rows : a->first_row == 0);
	const struct workspace ws = workspace_take(s, xent_scratch(a->n_mb, a->rows));
	struct xent_job j = { .s = s,
			      .a = a,
			      .targets = a->targets + a->first_row,
			      .row_loss = (double *)ws.shared,
			      .rows_per_task = rows_per_task(a->vocab) };

	j.counted = (uint32_t *)(j.row_loss + (size_t)a->n_mb * a->rows);
	for (uint32_t k = 0; k < a->n_mb; k++)
		j.counted[k] = count_rows(a, k);
	pool_run(s->pool, xent_task, &j, (uint32_t)ceil_div_u64((uint64_t)a->n_mb * a->rows, j.rows_per_task));
	for (uint32_t k = 0; k < a->n_mb; k++)
		add_loss(&j, k);
}
