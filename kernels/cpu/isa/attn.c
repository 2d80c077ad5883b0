/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attention's products. They are small, their scores are a staircase, and both
 * operands are in the cache, so they have kernels of their own: the second
 * operand is packed into panels, the first is read where it lies, and a tile of
 * TILE_ROWS x ATTN_PANEL sums is kept in registers. What lies beyond the
 * staircase's edge is left out by groups of TILE_ROWS rows.
 *
 * Each element is the sum, in order, of its sums over INNER_MAX products each.
 * The tile's shape shows in no bit; where it ends at the staircase it does, and
 * so TILE_ROWS is the same for all instruction sets.
 */
#include "kernels/cpu/isa/isa.h"
#include "kernels/cpu/isa/vec.h"

#define TILE_ROWS ATTN_GROUP
#define INNER_MAX 256u
#define LINES_AHEAD 24u
#define NV 2 /* vectors of a row of the micro-kernel */
#if VF == 16
#define MR 8
#else
#define MR 4
#endif
_Static_assert(TILE_ROWS % MR == 0 && ATTN_PANEL % (NV * VF) == 0, "a tile is whole micro-tiles");

#define INLINE static inline __attribute__((always_inline))

/* MR rows of nv vectors over k products; element (r, p) of the first operand is a[r * row + p * step]. */
INLINE void micro(const float *a, size_t row, size_t step, const float *b, uint32_t k, float *c, size_t ldc, bool add,
		  int nv)
{
	vf sum[MR][NV];

#pragma GCC unroll 8
	for (int r = 0; r < MR; r++)
		for (int v = 0; v < nv; v++)
			sum[r][v] = vf_set(0.0f);
	for (uint32_t p = 0; p < k; p++, a += step, b += ATTN_PANEL) {
		vf bv[NV];
#pragma GCC unroll 2
		for (int v = 0; v < nv; v++)
			bv[v] = vf_load(b + v * VF);
#pragma GCC unroll 8
		for (int r = 0; r < MR; r++) {
			vf ar = vf_set(a[(size_t)r * row]);
#pragma GCC unroll 2
			for (int v = 0; v < nv; v++)
				sum[r][v] = vf_fma(ar, bv[v], sum[r][v]);
		}
	}
#pragma GCC unroll 8
	for (int r = 0; r < MR; r++)
#pragma GCC unroll 2
		for (int v = 0; v < nv; v++) {
			float *at = c + (size_t)r * ldc + v * VF;
			vf_store(at, add ? vf_load(at) + sum[r][v] : sum[r][v]);
		}
}

INLINE void tile(const float *a, size_t row, size_t step, const float *b, uint32_t k, float *c, size_t ldc, bool add,
		 uint32_t cols)
{
	for (uint32_t r = 0; r < TILE_ROWS; r += MR) {
		uint32_t j = 0;
		for (; j + NV * VF <= (cols + VF - 1) / VF * VF; j += NV * VF)
			micro(a + r * row, row, step, b + j, k, c + r * ldc + j, ldc, add, NV);
		if (j < cols)
			micro(a + r * row, row, step, b + j, k, c + r * ldc + j, ldc, add, 1);
	}
}

static inline uint32_t min_u32(uint32_t a, uint32_t b)
{
	return a < b ? a : b;
}

/* The first n rows of a tile go to C, or are added to it. */
static void store_rows(const float *sums, float *c, size_t ldc, uint32_t n, uint32_t cols, bool add)
{
	for (uint32_t r = 0; r < n; r++)
		for (uint32_t j = 0; j < cols; j += VF) {
			vf v = vf_load(sums + r * ATTN_PANEL + j);
			float *at = c + r * ldc + j;
			vf_store(at, add ? vf_load(at) + v : v);
		}
}

static void fetch_ahead(struct attn_ahead *a)
{
	for (uint32_t lines = 0; lines < LINES_AHEAD && a->at < a->n;) {
		const struct rect *t = &a->rect[a->at];
		const float *p = t->p + a->row * t->ld;

		for (uint32_t c = 0; c < t->cols; c += 16, lines++)
			__builtin_prefetch(p + c, 0, 2);
		if (++a->row == t->rows) {
			a->row = 0;
			a->at++;
		}
	}
}

/* A group's products first..end with one panel's columns. */
static void tile_at(const struct attn_mul *g, uint32_t i, uint32_t first, uint32_t end, uint32_t col, uint32_t cols)
{
	const float *a = g->a + i * g->a_row + first * g->a_step;
	const float *b = g->b + col / ATTN_PANEL * g->b_panel + first * ATTN_PANEL;
	const bool whole = g->m - i >= TILE_ROWS, add = g->add || first >= INNER_MAX;
	float sums[TILE_ROWS * ATTN_PANEL], *c = g->c + i * g->ldc + col, *to = whole ? c : sums;
	const size_t ld = whole ? g->ldc : ATTN_PANEL;

	fetch_ahead(g->ahead);
	/* One of the steps is 1, which the loops want to know. */
	if (g->a_step == 1)
		tile(a, g->a_row, 1, b, end - first, to, ld, whole && add, cols);
	else
		tile(a, 1, g->a_step, b, end - first, to, ld, whole && add, cols);
	if (!whole)
		store_rows(sums, c, g->ldc, g->m - i, cols, add);
}

/* One panel's columns and the products first..end, of all groups of rows that have something there. */
static void panel(const struct attn_mul *g, uint32_t first, uint32_t end, uint32_t col)
{
	for (uint32_t i = 0; i < g->m; i += TILE_ROWS) {
		const uint32_t edge = g->edge + min_u32(i + TILE_ROWS, g->m) - 1;
		uint32_t from = first, to = end, cols = min_u32(g->n - col, ATTN_PANEL);

		if (g->trim == ATTN_TRIM_COLS)
			cols = edge > col ? min_u32(cols, edge - col) : 0;
		else if (g->trim == ATTN_TRIM_INNER)
			to = min_u32(end, edge);
		else if (i + 1 > first + g->edge)
			from = i + 1 - g->edge;
		if (cols > 0 && from < to)
			tile_at(g, i, from, to, col, cols);
	}
}

void ISA(attn_mul)(const struct attn_mul *g)
{
	for (uint32_t p = 0; p < g->k; p += INNER_MAX)
		for (uint32_t col = 0; col < g->n; col += ATTN_PANEL)
			panel(g, p, min_u32(p + INNER_MAX, g->k), col);
}

/* ------------------------------------------------------------------ packing */

#if VF == 16
#define ZIP_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define ZIP_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif VF == 8
#define ZIP_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define ZIP_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define ZIP_LOW 0, 4, 1, 5
#define ZIP_HIGH 2, 6, 3, 7
#endif

/* A square of VF x VF is turned by log2 VF perfect shuffles of its rows (Stone 1971). */
INLINE void turn_square(const float *src, size_t ld, float *dst)
{
	vf x[VF], y[VF];

#pragma GCC unroll 16
	for (int i = 0; i < VF; i++)
		x[i] = vf_load(src + (size_t)i * ld);
#pragma GCC unroll 4
	for (int n = 1; n < VF; n *= 2) {
#pragma GCC unroll 8
		for (int i = 0; i < VF / 2; i++) {
			y[2 * i] = __builtin_shufflevector(x[i], x[i + VF / 2], ZIP_LOW);
			y[2 * i + 1] = __builtin_shufflevector(x[i], x[i + VF / 2], ZIP_HIGH);
		}
#pragma GCC unroll 16
		for (int i = 0; i < VF; i++)
			x[i] = y[i];
	}
#pragma GCC unroll 16
	for (int i = 0; i < VF; i++)
		vf_store(dst + (size_t)i * ATTN_PANEL, x[i]);
}

/* A part of a panel: VF rows of src, of which n are there, become VF columns. */
static void turn_rows(const float *src, size_t ld, uint32_t n, uint32_t cols, float *dst)
{
	uint32_t c = 0;

	for (; n == VF && c + VF <= cols; c += VF)
		turn_square(src + c, ld, dst + c * ATTN_PANEL);
	for (; c < cols; c++)
		for (uint32_t r = 0; r < VF; r++)
			dst[c * ATTN_PANEL + r] = r < n ? src[r * ld + c] : 0.0f;
}

void ISA(attn_pack_turned)(const struct rect *t, float *dst)
{
	for (uint32_t r = 0; r < t->rows; r += ATTN_PANEL, dst += t->cols * ATTN_PANEL)
		for (uint32_t i = 0; i < ATTN_PANEL; i += VF)
			turn_rows(t->p + (r + i) * t->ld, t->ld, r + i < t->rows ? min_u32(t->rows - r - i, VF) : 0,
				  t->cols, dst + i);
}

void ISA(attn_pack)(const struct rect *t, float *dst, size_t panel_floats)
{
	for (uint32_t c = 0; c < t->cols; c += ATTN_PANEL, dst += panel_floats) {
		const uint32_t n = min_u32(t->cols - c, ATTN_PANEL);

		for (uint32_t r = 0; r < t->rows; r++) {
			float *to = dst + r * ATTN_PANEL;
			const float *from = t->p + r * t->ld + c;

			if (n == ATTN_PANEL) {
				for (uint32_t i = 0; i < ATTN_PANEL; i += VF)
					vf_store(to + i, vf_load(from + i));
				continue;
			}
			memcpy(to, from, n * sizeof(float));
			memset(to + n, 0, (ATTN_PANEL - n) * sizeof(float));
		}
	}
}
