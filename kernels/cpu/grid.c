/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The tile grid, version 1. Measured on AVX-512 with oneDNN and OpenBLAS: all
 * rows (up to 1,024) by half of the columns for activations, since halving the
 * rows costs 4-25 %; tiles of a weight's gradient that stay in a core's cache
 * while a span's leaves are added; steps in multiples of 96 columns, which is a
 * whole number of every library's register tile; an even number of tiles, for
 * two threads; no slivers, which fall into the libraries' slow and, worse,
 * shape-dependent paths.
 *
 * A change here changes bits: it needs a new GRID_VERSION.
 */
#include "kernels/cpu/cpu.h"

#define ROWS_MAX 1024u
#define COLS_MAX 2304u
#define WEIGHT_STEP 768u
/* A product of fewer multiplications is one tile. */
#define SPLIT_MIN 4000000u

static uint32_t unit_of(uint32_t n)
{
	return n >= 768 ? 96 : n >= 192 ? 48 : 16;
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

struct grid grid_weight(uint32_t rows, uint32_t cols)
{
	struct grid g = { .rows = rows, .cols = cols };

	cut(rows, 2 * ceil_div_u32(rows, 2 * WEIGHT_STEP), &g.row_step, &g.row_tiles);
	cut(cols, ceil_div_u32(cols, WEIGHT_STEP), &g.col_step, &g.col_tiles);
	return g;
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
