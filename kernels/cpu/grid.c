/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The tile grid, version 1, measured with AVX-512, oneDNN and OpenBLAS.
 * Activations: all rows (up to 1,024) by half of the columns or less, since
 * halving the rows costs 4-25 % and halving the columns 0-3 %. Weight gradients:
 * with few rows a micro-batch the sums of the tree cost as much as the products,
 * so their tiles stay in a core's cache; with many, large tiles pay. Steps are
 * multiples of 96 columns, a whole number of every library's register tile; the
 * number of tiles is even, for two threads; and there are no slivers, which fall
 * into the libraries' slow and, worse, shape-dependent paths.
 *
 * A change here changes bits: it needs a new GRID_VERSION.
 */
#include "kernels/cpu/cpu.h"

#define ROWS_MAX 1024u
#define COLS_MAX 1536u
#define WEIGHT_COLS 768u
/* A product of fewer multiplications is one tile. */
#define SPLIT_MIN 4000000u

#define UNIT_MAX 96u

static uint32_t unit_of(uint32_t n)
{
	return n >= 768 ? UNIT_MAX : n >= 192 ? 48 : 16;
}

/* Cuts n into about `parts` steps of a whole number of units; a remainder of less than a unit joins its neighbour. */
static void cut(uint32_t n, uint32_t parts, uint32_t *step, uint32_t *tiles)
{
	uint32_t unit = unit_of(n);

	*step = n;
	*tiles = 1;
	if (parts <= 1 || n < 2 * unit)
		return;
	*step = (uint32_t)round_up_u64(ceil_div_u32(n, parts), unit);
	*tiles = n / *step;
	if (n - *tiles * *step >= unit)
		*tiles += 1;
}

struct grid grid_activation(uint32_t rows, uint32_t cols, uint32_t inner)
{
	struct grid g = { .rows = rows, .cols = cols };
	uint32_t row_parts = ceil_div_u32(rows, ROWS_MAX), col_parts = 2 * ceil_div_u32(cols, 2 * COLS_MAX);

	if ((uint64_t)rows * cols * inner < SPLIT_MIN) {
		col_parts = 1;
	} else if (cols < 192 || (rows >= ROWS_MAX && cols <= 768)) {
		/* Columns too few to halve: the rows are halved instead, where that leaves two even tiles. */
		col_parts = 1;
		row_parts *= 2;
	}
	cut(rows, row_parts, &g.row_step, &g.row_tiles);
	cut(cols, col_parts, &g.col_step, &g.col_tiles);
	return g;
}

/* About how many rows a weight tile has, by the rows of a micro-batch. */
static uint32_t weight_rows(uint32_t inner)
{
	return inner <= 192 ? 192 : inner < 768 ? 768 : 1632;
}

struct grid grid_weight(uint32_t rows, uint32_t cols, uint32_t inner)
{
	struct grid g = { .rows = rows, .cols = cols };

	cut(rows, 2 * ceil_div_u32(rows, 2 * weight_rows(inner)), &g.row_step, &g.row_tiles);
	cut(cols, ceil_div_u32(cols, WEIGHT_COLS), &g.col_step, &g.col_tiles);
	return g;
}

uint64_t grid_weight_tile_max(uint64_t weights, uint32_t inner)
{
	/* A step is rounded up to a unit, and a remainder below a unit joins it. */
	uint64_t most = (weight_rows(inner) + 2ull * UNIT_MAX) * (WEIGHT_COLS + 2ull * UNIT_MAX);
	return weights < most ? weights : most;
}

struct tile grid_tile(const struct grid *g, uint32_t index)
{
	uint32_t r = index / g->col_tiles, c = index % g->col_tiles;
	struct tile t = { .row = r * g->row_step, .col = c * g->col_step };

	assert(r < g->row_tiles);
	t.rows = r + 1 == g->row_tiles ? g->rows - t.row : g->row_step;
	t.cols = c + 1 == g->col_tiles ? g->cols - t.col : g->col_step;
	return t;
}
