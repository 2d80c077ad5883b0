/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The portable product, after the scheme of Goto and van de Geijn ("Anatomy of
 * high-performance matrix multiplication", 2008): blocks of A and B are packed
 * into slivers, and a micro-kernel keeps MR x NR sums in registers. Each element
 * of C is the sum, in order, of its sums over GEMM_KC products each; so its bits
 * depend on the inner dimension alone, not on the tile it stands in.
 */
#include "kernels/cpu/isa/isa.h"
#include "kernels/cpu/isa/vec.h"

#define NR (2 * VF)
#if VF == 16
#define MR 12
#elif VF == 8
#define MR 6
#else
#define MR 4
#endif
_Static_assert(GEMM_MC % MR == 0 && GEMM_NC % NR == 0, "packing space is counted in whole slivers");

/* Slivers of MR rows, each [kc][MR]; rows beyond the edge are zero. */
static void pack_a(const struct gemm *g, uint32_t row, uint32_t rows, uint32_t kk, uint32_t kc, float *out)
{
	for (uint32_t i = 0; i < rows; i += MR) {
		uint32_t mr = rows - i < MR ? rows - i : MR;
		if (g->ta) {
			const float *a = g->a + kk * g->lda + row + i;
			for (uint32_t p = 0; p < kc; p++, a += g->lda)
				for (uint32_t r = 0; r < MR; r++)
					out[p * MR + r] = r < mr ? a[r] : 0.0f;
		} else {
			for (uint32_t r = 0; r < MR; r++) {
				const float *a = g->a + (row + i + r) * g->lda + kk;
				for (uint32_t p = 0; p < kc; p++)
					out[p * MR + r] = r < mr ? a[p] : 0.0f;
			}
		}
		out += kc * MR;
	}
}

/* Slivers of NR columns, each [kc][NR]; columns beyond the edge are zero. */
static void pack_b(const struct gemm *g, uint32_t col, uint32_t cols, uint32_t kk, uint32_t kc, float *out)
{
	for (uint32_t j = 0; j < cols; j += NR) {
		uint32_t nr = cols - j < NR ? cols - j : NR;
		if (nr < NR)
			memset(out, 0, sizeof(float) * kc * NR);
		if (g->tb) {
			for (uint32_t c = 0; c < nr; c++) {
				const float *b = g->b + (col + j + c) * g->ldb + kk;
				for (uint32_t p = 0; p < kc; p++)
					out[p * NR + c] = b[p];
			}
		} else {
			const float *b = g->b + kk * g->ldb + col + j;
			for (uint32_t p = 0; p < kc; p++, b += g->ldb)
				memcpy(out + p * NR, b, nr * sizeof(float));
		}
		out += kc * NR;
	}
}

static inline void micro_kernel(const float *a, const float *b, uint32_t kc, float *restrict out)
{
	vf c[MR][2];

#pragma GCC unroll 12
	for (int r = 0; r < MR; r++)
		c[r][0] = c[r][1] = vf_set(0.0f);
	for (uint32_t p = 0; p < kc; p++) {
		vf b0 = vf_load(b + p * NR), b1 = vf_load(b + p * NR + VF);
#pragma GCC unroll 12
		for (int r = 0; r < MR; r++) {
			vf ar = vf_set(a[p * MR + r]);
			c[r][0] = vf_fma(ar, b0, c[r][0]);
			c[r][1] = vf_fma(ar, b1, c[r][1]);
		}
	}
#pragma GCC unroll 12
	for (int r = 0; r < MR; r++) {
		vf_store(out + r * NR, c[r][0]);
		vf_store(out + r * NR + VF, c[r][1]);
	}
}

/* The MR x NR sums go to C, or are added to it. */
static void store_sums(const float *sums, float *c, size_t ldc, uint32_t mr, uint32_t nr, bool add)
{
	for (uint32_t r = 0; r < mr; r++, sums += NR, c += ldc) {
		uint32_t j = 0;
		for (; j + VF <= nr; j += VF)
			vf_store(c + j, add ? vf_load(c + j) + vf_load(sums + j) : vf_load(sums + j));
		for (; j < nr; j++)
			c[j] = add ? c[j] + sums[j] : sums[j];
	}
}

struct block {
	uint32_t row, rows, col, cols, kc;
	bool add;
};

static void multiply_block(const struct gemm *g, const struct block *b, const float *pa, const float *pb)
{
	float sums[MR * NR];

	for (uint32_t j = 0; j < b->cols; j += NR)
		for (uint32_t i = 0; i < b->rows; i += MR) {
			uint32_t mr = b->rows - i < MR ? b->rows - i : MR;
			uint32_t nr = b->cols - j < NR ? b->cols - j : NR;
			micro_kernel(pa + i * b->kc, pb + j * b->kc, b->kc, sums);
			store_sums(sums, g->c + (b->row + i) * g->ldc + b->col + j, g->ldc, mr, nr, b->add);
		}
}

void ISA(gemm)(const struct gemm *g)
{
	float *pa = g->scratch, *pb = pa + GEMM_KC * GEMM_MC;

	for (uint32_t col = 0; col < g->n; col += GEMM_NC) {
		uint32_t cols = g->n - col < GEMM_NC ? g->n - col : GEMM_NC;
		for (uint32_t kk = 0; kk < g->k; kk += GEMM_KC) {
			uint32_t kc = g->k - kk < GEMM_KC ? g->k - kk : GEMM_KC;
			pack_b(g, col, cols, kk, kc, pb);
			for (uint32_t row = 0; row < g->m; row += GEMM_MC) {
				uint32_t rows = g->m - row < GEMM_MC ? g->m - row : GEMM_MC;
				const struct block b = { row, rows, col, cols, kc, kk > 0 || g->beta != 0.0f };
				pack_a(g, row, rows, kk, kc, pa);
				multiply_block(g, &b, pa, pb);
			}
		}
	}
}
