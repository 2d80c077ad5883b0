/* SPDX-License-Identifier: Apache-2.0 */
/* Private to kernels/: the CPU stream and what its operations share. */
#ifndef SHARDMESH_KERNELS_CPU_H
#define SHARDMESH_KERNELS_CPU_H

#include <assert.h>
#include <string.h>

#include "kernels/cpu/blas.h"
#include "kernels/cpu/isa/isa.h"
#include "kernels/cpu/pool.h"

struct k_stream {
	const struct isa_ops *isa;
	struct blas blas;
	struct pool *pool;
	unsigned threads;
	uint8_t *workspace;
	size_t workspace_bytes;
	uint64_t ticket;
};

const struct isa_ops *isa_table(enum k_isa isa);

/* ---------------------------------------------------------------- workspace */

/*
 * A call's scratch: `shared` bytes for all threads, then `per_thread` for each.
 * What an operation needs is computed by one function, used both to plan
 * (cpu_workspace_bytes) and to run (workspace_take), so the two cannot differ.
 */
struct scratch {
	size_t shared, per_thread;
};

struct workspace {
	uint8_t *shared, *threads;
	size_t per_thread;
};

size_t scratch_bytes(struct scratch need, unsigned threads);
/* Asserts that the caller's plan was large enough. */
struct workspace workspace_take(const struct k_stream *s, struct scratch need);

static inline void *workspace_thread(const struct workspace *w, unsigned thread)
{
	return w->threads + thread * w->per_thread;
}

struct scratch linear_scratch(void);
struct scratch linear_backward_scratch(uint32_t n_mb, uint32_t rows, uint64_t weights);
struct scratch attention_scratch(uint32_t q_len, uint32_t kv_len, uint32_t head_dim, bool backward);
struct scratch rotary_backward_scratch(uint32_t n_mb, uint32_t head_dim);
struct scratch embed_backward_scratch(uint32_t n_mb, uint64_t tokens, uint32_t vocab, uint32_t channels);
struct scratch xent_scratch(uint32_t n_mb, uint64_t rows);
struct scratch state_scratch(void);

/* ---------------------------------------------------------------- tile grid */

/*
 * How a matrix is cut into tiles: a function of its shape alone. The last tile
 * of a row or column of tiles takes the remainder, which is never a sliver.
 */
struct grid {
	uint32_t rows, cols;
	uint32_t row_step, col_step;
	uint32_t row_tiles, col_tiles;
};

struct tile {
	uint32_t row, rows, col, cols;
};

/* Of the grid, and of the order of our own products' sums. */
#define GRID_VERSION 2u

/* Activations [rows][cols], summed over inner. */
struct grid grid_activation(uint32_t rows, uint32_t cols, uint32_t inner);
/* A weight's gradient [rows][cols], summed over inner. */
struct grid grid_weight(uint32_t rows, uint32_t cols, uint32_t inner);
/* No tile of a gradient of `weights` elements has more elements; grows with both. */
uint64_t grid_weight_tile_max(uint64_t weights, uint32_t inner);
static inline uint32_t grid_tiles(const struct grid *g)
{
	return g->row_tiles * g->col_tiles;
}
struct tile grid_tile(const struct grid *g, uint32_t index);

/* --------------------------------------------------------------- fixed tree */

/*
 * tree(n) = tree(l) + tree(n - l), l the largest power of two below n, by a
 * stack of partial sums: leaf k is computed into slot tree_slot(k); then
 * tree_merges(k, n) times the top slot is added to the one below it.
 */
static inline uint32_t tree_slot(uint32_t k)
{
	return (uint32_t)__builtin_popcount(k);
}

static inline uint32_t tree_merges(uint32_t k, uint32_t n)
{
	if (k + 1 == n)
		return tree_slot(k);
	return (uint32_t)__builtin_ctz(k + 1);
}

/* Slots needed for n leaves. */
static inline uint32_t tree_slots(uint32_t n)
{
	return 32 - (uint32_t)__builtin_clz(n);
}
#define TREE_SLOTS_MAX 32

/* ------------------------------------------------------------------ helpers */

static inline uint32_t ceil_div_u32(uint32_t a, uint32_t b)
{
	return a / b + (a % b != 0);
}

static inline uint64_t ceil_div_u64(uint64_t a, uint64_t b)
{
	return a / b + (a % b != 0);
}

/* Work of about 64 KiB of floats a task. */
static inline uint32_t rows_per_task(uint32_t cols)
{
	return cols >= 16384 ? 1 : 16384 / cols;
}

/* Dropout of micro-batch mb in the inner loops' form. */
struct drop drop_of(const struct k_dropout *d, uint32_t mb);
/* One product on the calling thread; g->scratch is set from the thread's scratch. */
void stream_gemm(const struct k_stream *s, struct gemm *g, float *scratch);

/* ------------------------------------------------------------------- stream */

int cpu_stream_open(const struct k_stream_config *cfg, struct k_stream **out, struct err *e);
void cpu_stream_close(struct k_stream *s);
int cpu_stream_error(struct k_stream *s);
void cpu_event_record(struct k_stream *s, struct k_event *ev);
bool cpu_event_done(struct k_stream *s, const struct k_event *ev);
void cpu_event_wait(struct k_stream *s, const struct k_event *ev);

/* --------------------------------------------------------------- operations */

void cpu_copy(struct k_stream *s, void *dst, const void *src, size_t bytes);
void cpu_zero(struct k_stream *s, void *dst, size_t bytes);
void cpu_embed(struct k_stream *s, const struct k_embed *a);
void cpu_embed_backward(struct k_stream *s, const struct k_embed_backward *a);
void cpu_norm(struct k_stream *s, const struct k_norm *a);
void cpu_norm_backward(struct k_stream *s, const struct k_norm_backward *a);
void cpu_residual(struct k_stream *s, const struct k_residual *a);
void cpu_linear(struct k_stream *s, const struct k_linear *a);
void cpu_linear_backward(struct k_stream *s, const struct k_linear_backward *a);
void cpu_rotary(struct k_stream *s, const struct k_rotary *a);
void cpu_rotary_backward(struct k_stream *s, const struct k_rotary_backward *a);
void cpu_glu(struct k_stream *s, const struct k_glu *a);
void cpu_glu_backward(struct k_stream *s, const struct k_glu_backward *a);
void cpu_attention(struct k_stream *s, const struct k_attention *a);
void cpu_attention_backward(struct k_stream *s, const struct k_attention_backward *a);
void cpu_xent(struct k_stream *s, const struct k_xent *a);
void cpu_fold(struct k_stream *s, const struct k_fold *a);
void cpu_adam(struct k_stream *s, const struct k_adam *a);
void cpu_state_hash(struct k_stream *s, const struct k_state_hash *a);

#endif
