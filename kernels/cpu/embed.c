/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Embedding. Its backward sums, for each vocabulary row, the rows of dx that
 * carry the token: in token order within a micro-batch, then along the tree. The
 * positions are first sorted by token (counting sort, so that their order
 * stays), then each task zeroes a range of rows and fills in those that occur.
 *
 * A leaf sums from +0, so no sum is ever -0, and adding the +0 of a micro-batch
 * without the token changes nothing: subtrees without it are left out.
 */
#include "kernels/cpu/cpu.h"

#define BACKWARD_TASKS 128u

struct embed_job {
	struct k_stream *s;
	const struct k_embed *a;
	uint32_t rows_per_task;
};

static void embed_task(void *ctx, unsigned thread, uint32_t task)
{
	const struct embed_job *j = ctx;
	const struct k_embed *a = j->a;
	const uint32_t rows = a->batch * a->seq;
	uint64_t row = (uint64_t)task * j->rows_per_task, end = row + j->rows_per_task;

	(void)thread;
	if (end > (uint64_t)a->n_mb * rows)
		end = (uint64_t)a->n_mb * rows;
	for (; row < end; row++) {
		const struct drop d = drop_of(&a->dropout, (uint32_t)(row / rows));
		uint32_t token = a->tokens[row];
		size_t position = a->first_position + row % a->seq;

		assert(token < a->vocab);
		j->s->isa->embed_row(a->wte + (size_t)token * a->channels,
				     a->wpe ? a->wpe + position * a->channels : NULL, a->x + row * a->channels,
				     a->channels, &d, row % rows * a->channels);
	}
}

void cpu_embed(struct k_stream *s, const struct k_embed *a)
{
	struct embed_job j = { .s = s, .a = a, .rows_per_task = rows_per_task(a->channels) };

	assert(a->n_mb && a->batch && a->seq && a->channels && a->tokens && a->wte && a->x);
	pool_run(s->pool, embed_task, &j,
		 (uint32_t)ceil_div_u64((uint64_t)a->n_mb * a->batch * a->seq, j.rows_per_task));
}

/* ----------------------------------------------------------------- backward */

struct embed_backward_job {
	struct k_stream *s;
	const struct k_embed_backward *a;
	uint32_t rows; /* of a micro-batch */
	uint32_t vocab_step, vocab_tasks, position_step, position_tasks;
	const uint32_t *start; /* [vocab + 1]: where a token's rows begin in `order` */
	const uint32_t *order; /* rows of dx, sorted by token */
	struct workspace ws;
};

/* One task's sums: the tree's stack, one row a slot, and behind it a row for what dropout leaves. */
struct row_stack {
	float *rows, *masked;
	size_t channels;
};

static float *row_slot(const struct row_stack *st, uint32_t slot)
{
	return st->rows + slot * st->channels;
}

struct scratch embed_backward_scratch(uint32_t n_mb, uint64_t tokens, uint32_t vocab, uint32_t channels)
{
	return (struct scratch){
		.shared = (vocab + 1ull + tokens * n_mb) * sizeof(uint32_t),
		.per_thread = (tree_slots(n_mb) + 1ull) * channels * sizeof(float),
	};
}

static struct row_stack row_stack_of(const struct embed_backward_job *j, unsigned thread)
{
	struct row_stack st = { .rows = workspace_thread(&j->ws, thread), .channels = j->a->channels };

	st.masked = row_slot(&st, tree_slots(j->a->n_mb));
	return st;
}

static void add_row(const struct embed_backward_job *j, float *to, const float *from)
{
	const struct rect row = { .p = to, .rows = 1, .cols = j->a->channels };
	j->s->isa->add_rect(&row, from, 0);
}

/* to += dx[row], through the forward's dropout. */
static void add_dx(const struct embed_backward_job *j, float *to, uint32_t row, float *masked)
{
	const struct k_embed_backward *a = j->a;
	const struct drop d = drop_of(&a->dropout, row / j->rows);
	const float *dx = a->dx + (size_t)row * a->channels;

	if (d.threshold) {
		uint64_t first = (uint64_t)(row % j->rows) * a->channels;
		j->s->isa->residual(NULL, dx, masked, a->channels, &d, first);
		dx = masked;
	}
	add_row(j, to, dx);
}

/*
 * The sum over micro-batches mb..mb+n of the rows at *at, into slot `top`; *at
 * moves behind them. False when none of them has the token.
 */
static bool token_tree(const struct embed_backward_job *j, struct row_stack *st, uint32_t top, uint32_t mb, uint32_t n,
		       const uint32_t **at, const uint32_t *end)
{
	if (*at == end || **at / j->rows >= mb + n)
		return false;
	if (n == 1) {
		memset(row_slot(st, top), 0, j->a->channels * sizeof(float));
		for (; *at < end && **at / j->rows == mb; ++*at)
			add_dx(j, row_slot(st, top), **at, st->masked);
		return true;
	}
	uint32_t left = 1u << (31 - __builtin_clz(n - 1));
	bool has_left = token_tree(j, st, top, mb, left, at, end);
	bool has_right = token_tree(j, st, top + has_left, mb + left, n - left, at, end);
	if (has_left && has_right)
		add_row(j, row_slot(st, top), row_slot(st, top + 1));
	return has_left || has_right;
}

static void token_rows(const struct embed_backward_job *j, uint32_t task, struct row_stack *st)
{
	const struct k_embed_backward *a = j->a;
	uint32_t first = task * j->vocab_step,
		 end = first + j->vocab_step < a->vocab ? first + j->vocab_step : a->vocab;

	for (uint32_t t = first, none = first; t < end; none = ++t) {
		/* Most tokens of a vocabulary are not there: their rows are zeroed together. */
		while (t < end && j->start[t] == j->start[t + 1])
			t++;
		if (t > none)
			j->s->isa->zero_past(a->dwte + (size_t)none * a->channels, (uint64_t)(t - none) * a->channels);
		if (t == end)
			return;
		const uint32_t *at = j->order + j->start[t];
		token_tree(j, st, 0, 0, a->n_mb, &at, j->order + j->start[t + 1]);
		memcpy(a->dwte + (size_t)t * a->channels, row_slot(st, 0), a->channels * sizeof(float));
	}
}

static void position_row(const struct embed_backward_job *j, uint32_t position, struct row_stack *st)
{
	const struct k_embed_backward *a = j->a;

	for (uint32_t k = 0; k < a->n_mb; k++) {
		uint32_t top = tree_slot(k);
		memset(row_slot(st, top), 0, a->channels * sizeof(float));
		for (uint32_t b = 0; b < a->batch; b++)
			add_dx(j, row_slot(st, top), k * j->rows + b * a->seq + position, st->masked);
		for (uint32_t m = tree_merges(k, a->n_mb); m > 0; m--, top--)
			add_row(j, row_slot(st, top - 1), row_slot(st, top));
	}
	memcpy(a->dwpe + (size_t)position * a->channels, row_slot(st, 0), a->channels * sizeof(float));
}

static void embed_backward_task(void *ctx, unsigned thread, uint32_t task)
{
	const struct embed_backward_job *j = ctx;
	const struct k_embed_backward *a = j->a;
	struct row_stack st = row_stack_of(j, thread);

	if (task < j->vocab_tasks) {
		token_rows(j, task, &st);
		return;
	}
	uint32_t first = (task - j->vocab_tasks) * j->position_step;
	for (uint32_t p = first; p < first + j->position_step && p < a->positions; p++) {
		if (p < a->seq)
			position_row(j, p, &st);
		else
			memset(a->dwpe + (size_t)p * a->channels, 0, a->channels * sizeof(float));
	}
}

static void sort_by_token(const struct k_embed_backward *a, uint32_t n, uint32_t *start, uint32_t *order)
{
	memset(start, 0, (a->vocab + 1ull) * sizeof(uint32_t));
	for (uint32_t i = 0; i < n; i++) {
		assert(a->tokens[i] < a->vocab);
		start[a->tokens[i]]++;
	}
	for (uint32_t t = 0, sum = 0; t <= a->vocab; t++) {
		uint32_t count = start[t];
		start[t] = sum;
		sum += count;
	}
	for (uint32_t i = 0; i < n; i++)
		order[start[a->tokens[i]]++] = i;
	/* Each start has moved to the next one's place. */
	memmove(start + 1, start, a->vocab * sizeof(uint32_t));
	start[0] = 0;
}

void cpu_embed_backward(struct k_stream *s, const struct k_embed_backward *a)
{
	assert(a->n_mb && a->batch && a->seq && a->channels && a->vocab && a->tokens && a->dx && a->dwte);
	assert(!a->dwpe || a->positions >= a->seq);
	struct embed_backward_job j = { .s = s, .a = a, .rows = a->batch * a->seq };
	j.ws = workspace_take(s, embed_backward_scratch(a->n_mb, j.rows, a->vocab, a->channels));
	uint32_t *start = (uint32_t *)j.ws.shared, *order = start + a->vocab + 1;
	sort_by_token(a, a->n_mb * j.rows, start, order);
	j.start = start;
	j.order = order;
	j.vocab_step = ceil_div_u32(a->vocab, BACKWARD_TASKS);
	j.vocab_tasks = ceil_div_u32(a->vocab, j.vocab_step);
	if (a->dwpe) {
		j.position_step = ceil_div_u32(a->positions, BACKWARD_TASKS);
		j.position_tasks = ceil_div_u32(a->positions, j.position_step);
	}
	pool_run(s->pool, embed_backward_task, &j, j.vocab_tasks + j.position_tasks);
}
