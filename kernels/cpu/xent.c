/* SPDX-License-Identifier: Apache-2.0 */
/* Cross-entropy and its gradient, row by row in place. */
#include "kernels/cpu/cpu.h"

struct xent_job {
	struct k_stream *s;
	const struct k_xent *a;
	double *row_loss;  /* [n_mb][rows] */
	uint32_t *counted; /* [n_mb] */
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
	uint32_t target = a->targets[row];
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

void cpu_xent(struct k_stream *s, const struct k_xent *a)
{
	assert(a->n_mb && a->rows && a->vocab && a->logits && a->targets && a->loss);
	const struct workspace ws = workspace_take(s, xent_scratch(a->n_mb, a->rows));
	struct xent_job j = {
		.s = s, .a = a, .row_loss = (double *)ws.shared, .rows_per_task = rows_per_task(a->vocab)
	};

	j.counted = (uint32_t *)(j.row_loss + (size_t)a->n_mb * a->rows);
	for (uint32_t k = 0; k < a->n_mb; k++) {
		j.counted[k] = 0;
		for (uint32_t r = 0; r < a->rows; r++)
			j.counted[k] += a->targets[(size_t)k * a->rows + r] != K_IGNORE_TARGET;
	}
	pool_run(s->pool, xent_task, &j, (uint32_t)ceil_div_u64((uint64_t)a->n_mb * a->rows, j.rows_per_task));
	for (uint32_t k = 0; k < a->n_mb; k++) {
		double sum = 0.0;
		for (uint32_t r = 0; r < a->rows; r++)
			sum += j.row_loss[(size_t)k * a->rows + r];
		a->loss[k] = j.counted[k] ? sum / j.counted[k] : 0.0;
	}
}
