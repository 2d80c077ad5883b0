/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Linear layers. Forward and data gradient are tiles of each micro-batch; a tile
 * of the weight's gradient goes through all micro-batches of the span, adding
 * their leaves along the tree while the tile is in the cache. Backward is one
 * job of three kinds of tasks: weight tiles (the longest, so first), data tiles,
 * column blocks of the bias gradient.
 */
#include "kernels/cpu/cpu.h"

#define BIAS_COLS 256u

struct linear_job {
	struct k_stream *s;
	const struct k_linear *a;
	struct grid grid;
	struct workspace ws;
};

struct scratch linear_scratch(void)
{
	return (struct scratch){ .per_thread = GEMM_SCRATCH_FLOATS * sizeof(float) };
}

static void linear_task(void *ctx, unsigned thread, uint32_t task)
{
	const struct linear_job *j = ctx;
	const struct k_linear *a = j->a;
	const uint32_t tiles = grid_tiles(&j->grid);
	const struct tile t = grid_tile(&j->grid, task % tiles);
	const size_t row = (size_t)(task / tiles) * a->rows + t.row;
	float *product = (a->pre ? a->pre : a->y) + row * a->out + t.col;

	struct gemm g = {
		.tb = a->w_out_in,
		.m = t.rows,
		.n = t.cols,
		.k = a->in,
		.a = a->x + row * a->in,
		.lda = a->in,
		.b = a->w_out_in ? a->w + (size_t)t.col * a->in : a->w + t.col,
		.ldb = a->w_out_in ? a->in : a->out,
		.c = product,
		.ldc = a->out,
	};
	stream_gemm(j->s, &g, workspace_thread(&j->ws, thread));
	if (a->b || a->act != K_ACT_NONE || a->pre) {
		const struct rect r = { .p = product, .ld = a->out, .rows = t.rows, .cols = t.cols };
		j->s->isa->bias_act(&r, a->y + row * a->out + t.col, a->b ? a->b + t.col : NULL, a->act);
	}
}

void cpu_linear(struct k_stream *s, const struct k_linear *a)
{
	assert(a->n_mb && a->rows && a->in && a->out && a->x && a->w && a->y && a->pre != a->y);
	struct linear_job j = {
		.s = s,
		.a = a,
		.grid = grid_activation(a->rows, a->out, a->in),
		.ws = workspace_take(s, linear_scratch()),
	};
	pool_run(s->pool, linear_task, &j, a->n_mb * grid_tiles(&j.grid));
}

/* ----------------------------------------------------------------- backward */

struct linear_backward_job {
	struct k_stream *s;
	const struct k_linear_backward *a;
	struct grid data, weight;
	uint32_t weight_tasks, data_tasks, bias_tasks;
	struct workspace ws;
	size_t tile_floats; /* of one slot of the tree's stack */
};

static uint64_t weight_tile_floats(uint32_t rows, uint64_t weights)
{
	return round_up_u64(grid_weight_tile_max(weights, rows), 16);
}

struct scratch linear_backward_scratch(uint32_t n_mb, uint32_t rows, uint64_t weights)
{
	/* Slot 0 of the stack is the gradient itself. */
	uint64_t floats = GEMM_SCRATCH_FLOATS + (tree_slots(n_mb) - 1) * weight_tile_floats(rows, weights);
	return (struct scratch){ .per_thread = floats * sizeof(float) };
}

static void data_task(const struct linear_backward_job *j, uint32_t task, float *scratch)
{
	const struct k_linear_backward *a = j->a;
	const uint32_t tiles = grid_tiles(&j->data);
	const struct tile t = grid_tile(&j->data, task % tiles);
	const size_t row = (size_t)(task / tiles) * a->rows + t.row, at = row * a->in + t.col;

	struct gemm g = {
		.tb = !a->w_out_in,
		.m = t.rows,
		.n = t.cols,
		.k = a->out,
		.a = a->dy + row * a->out,
		.lda = a->out,
		.b = a->w_out_in ? a->w + t.col : a->w + (size_t)t.col * a->out,
		.ldb = a->w_out_in ? a->in : a->out,
		.beta = a->dx_add ? 1.0f : 0.0f,
		.c = a->dx + at,
		.ldc = a->in,
	};
	stream_gemm(j->s, &g, scratch);
	if (a->act_in != K_ACT_NONE) {
		const struct rect r = { .p = a->dx + at, .ld = a->in, .rows = t.rows, .cols = t.cols };
		j->s->isa->act_grad(&r, a->pre_in + at, a->act_in);
	}
}

/* One leaf of a weight tile into c, or added to it. W is [in][out]: x^T dy; [out][in]: dy^T x. */
static void weight_leaf(const struct linear_backward_job *j, uint32_t mb, const struct tile *t, const struct rect *c,
			bool add, float *scratch)
{
	const struct k_linear_backward *a = j->a;
	const float *x = a->x + (size_t)mb * a->rows * a->in, *dy = a->dy + (size_t)mb * a->rows * a->out;

	struct gemm g = {
		.ta = true,
		.m = t->rows,
		.n = t->cols,
		.k = a->rows,
		.a = (a->w_out_in ? dy : x) + t->row,
		.lda = a->w_out_in ? a->out : a->in,
		.b = (a->w_out_in ? x : dy) + t->col,
		.ldb = a->w_out_in ? a->in : a->out,
		.beta = add ? 1.0f : 0.0f,
		.c = c->p,
		.ldc = c->ld,
	};
	stream_gemm(j->s, &g, scratch);
}

static void weight_task(const struct linear_backward_job *j, uint32_t task, float *scratch)
{
	const struct k_linear_backward *a = j->a;
	const struct tile t = grid_tile(&j->weight, task);
	float *stack = scratch + GEMM_SCRATCH_FLOATS;
	struct rect slot[TREE_SLOTS_MAX];

	slot[0] = (struct rect){ a->dw + (size_t)t.row * j->weight.cols + t.col, j->weight.cols, t.rows, t.cols };
	for (uint32_t i = 1; i < tree_slots(a->n_mb); i++)
		slot[i] = (struct rect){ stack + (i - 1) * j->tile_floats, t.cols, t.rows, t.cols };
	for (uint32_t k = 0; k < a->n_mb; k++) {
		uint32_t top = tree_slot(k), merges = tree_merges(k, a->n_mb);
		/* The product itself adds a leaf to its sibling, where that gives the same bits. */
		bool add = merges > 0 && j->s->blas.adds_products && a->rows <= BLAS_ADDED_INNER_MAX;

		top -= add;
		weight_leaf(j, k, &t, &slot[top], add || a->dw_add, scratch);
		for (merges -= add; merges > 0; merges--, top--)
			j->s->isa->add_rect(&slot[top - 1], slot[top].p, slot[top].ld);
	}
}

static void bias_task(const struct linear_backward_job *j, uint32_t task)
{
	const struct k_linear_backward *a = j->a;
	const uint32_t col = task * BIAS_COLS, cols = a->out - col < BIAS_COLS ? a->out - col : BIAS_COLS;
	float slot[TREE_SLOTS_MAX][BIAS_COLS];

	for (uint32_t k = 0; k < a->n_mb; k++) {
		const float *dy = a->dy + (size_t)k * a->rows * a->out + col;
		const struct rect leaf = { .p = (float *)dy, .ld = a->out, .rows = a->rows, .cols = cols };
		uint32_t top = tree_slot(k);
		j->s->isa->col_sum(&leaf, slot[top]);
		for (uint32_t m = tree_merges(k, a->n_mb); m > 0; m--, top--) {
			const struct rect below = { .p = slot[top - 1], .rows = 1, .cols = cols };
			j->s->isa->add_rect(&below, slot[top], 0);
		}
	}
	memcpy(a->db + col, slot[0], cols * sizeof(float));
}

static void linear_backward_task(void *ctx, unsigned thread, uint32_t task)
{
	const struct linear_backward_job *j = ctx;
	float *scratch = workspace_thread(&j->ws, thread);

	if (task < j->weight_tasks)
		weight_task(j, task, scratch);
	else if (task - j->weight_tasks < j->data_tasks)
		data_task(j, task - j->weight_tasks, scratch);
	else
		bias_task(j, task - j->weight_tasks - j->data_tasks);
}

void cpu_linear_backward(struct k_stream *s, const struct k_linear_backward *a)
{
	const uint64_t weights = (uint64_t)a->in * a->out;

	assert(a->n_mb && a->rows && a->in && a->out && a->dy);
	assert((!a->dx || (a->w && a->dx != a->dy)) && (!a->dw || a->x));
	assert(!a->dx || a->act_in == K_ACT_NONE || (a->pre_in && !a->dx_add));
	assert(!a->dw_add || (a->n_mb == 1 && !a->db));
	struct linear_backward_job j = {
		.s = s,
		.a = a,
		.data = grid_activation(a->rows, a->in, a->out),
		.weight = a->w_out_in ? grid_weight(a->out, a->in, a->rows) : grid_weight(a->in, a->out, a->rows),
		.ws = workspace_take(s, linear_backward_scratch(a->n_mb, a->rows, weights)),
		.tile_floats = weight_tile_floats(a->rows, weights),
	};
	j.weight_tasks = a->dw ? grid_tiles(&j.weight) : 0;
	j.data_tasks = a->dx ? a->n_mb * grid_tiles(&j.data) : 0;
	j.bias_tasks = a->db ? ceil_div_u32(a->out, BIAS_COLS) : 0;
	pool_run(s->pool, linear_backward_task, &j, j.weight_tasks + j.data_tasks + j.bias_tasks);
}
