/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The inner loops, as one table for each instruction set. They work on one
 * thread and know nothing of tasks; the files of cpu/ cut the work and call
 * them. Except for gemm, which uses fused multiply-add where there is one, all
 * tables give the same bits.
 */
#ifndef SHARDMESH_KERNELS_CPU_ISA_H
#define SHARDMESH_KERNELS_CPU_ISA_H

#include "kernels/kernels.h"

/*
 * C = op(A) op(B) + beta C, row-major; op(A) is [m][k], op(B) [k][n]; ta, tb: the matrix is stored
 * transposed. beta is 0 or 1. scratch: what a library needs for packing (GEMM_SCRATCH_FLOATS).
 */
struct gemm {
	bool ta, tb;
	uint32_t m, n, k;
	const float *a, *b;
	size_t lda, ldb;
	float beta;
	float *c;
	size_t ldc;
	float *scratch;
};

/* Block sizes of the portable product, and the packing space that follows. */
#define GEMM_KC 256u
#define GEMM_MC 144u
#define GEMM_NC 768u
#define GEMM_SCRATCH_FLOATS (GEMM_KC * (GEMM_MC + GEMM_NC))

/* k_dropout for one micro-batch: dropped when the upper 24 bits are below the threshold; 0: no dropout. */
struct drop {
	uint32_t threshold;
	float scale;
	uint64_t seed, stream;
};

/* A rectangle of a matrix: rows x cols at p, ld floats from row to row. */
struct rect {
	float *p;
	size_t ld;
	uint32_t rows, cols;
};

/* One row of heads: elements i and rot / 2 + i of each head are turned by the angle, or back; the rest is copied. */
struct turn {
	const float *x;
	float *out; /* may be x */
	uint32_t heads, head_dim, rot;
	const float *cos, *sin; /* [rot / 2], of the row's position */
	bool back;
};

/*
 * Softmax of a block of query rows; row r sees the first first_visible + r keys, and of those only the last `window`
 * (0: all). What it does not see before them, and ATTN_GROUP keys behind them, becomes +0; a row has space for 16 more
 * than its last key, whose values do not matter.
 */
struct attn_rows {
	float *s; /* [rows][ld] scores, q k^T; becomes probabilities */
	size_t ld;
	uint32_t rows, first_visible, window;
	float scale;
	struct drop drop;
	uint64_t drop_first; /* element of row 0, key 0 */
	uint64_t drop_row;   /* elements from row to row */
};

/* What attn_mul leaves out of a staircase, where row i of a block of scores sees its first `edge` + i keys. */
enum attn_trim {
	ATTN_TRIM_COLS,  /* C is scores: columns that no row of a group sees keep what they hold */
	ATTN_TRIM_INNER, /* A is scores: products behind what a group sees */
	ATTN_TRIM_HEAD,  /* A is scores turned, its rows keys: products of rows before the first that sees a group */
};

/*
 * What will be wanted next, read or written: attn_mul fetches some of it into the cache with every tile, while the
 * arithmetic goes on. The rows of one head are a few lines each and far apart, which the processor does not foresee.
 */
#define ATTN_AHEAD_MAX 8
struct attn_ahead {
	struct rect rect[ATTN_AHEAD_MAX];
	uint32_t n, at, row; /* rectangles; the next one's next row */
};

/* Columns of a packed operand's panel, and rows that are trimmed together. */
#define ATTN_PANEL 32u
#define ATTN_GROUP 8u

/*
 * C = A B or, with add, C += A B. A(i, p) = a[i * a_row + p * a_step], one of these 1; B in panels of ATTN_PANEL
 * columns, b_panel floats from one to the next, each [>= k][ATTN_PANEL]. A is read up to a whole ATTN_GROUP of rows, C
 * is written up to a multiple of 16 columns; what stands there does not matter.
 */
struct attn_mul {
	enum attn_trim trim;
	uint32_t edge, m, n, k;
	const float *a;
	size_t a_row, a_step;
	const float *b;
	size_t b_panel;
	float *c;
	size_t ldc;
	bool add;
	struct attn_ahead *ahead;
};

/* struct k_adam's scalars, rounded to fp32 once. */
struct adam_scalars {
	float grad_scale, beta1, one_minus_beta1, beta2, one_minus_beta2;
	float decay; /* coupled: weight_decay; decoupled: lr * weight_decay */
	float step;  /* lr / bias1 */
	float root_bias2, eps;
	bool decoupled;
};

typedef void gemm_fn(const struct gemm *g);
/* out[i] = scale for a kept element, 0 for a dropped one; elements first.. of the micro-batch. */
typedef void dropout_fn(const struct drop *d, uint64_t first, uint32_t n, float *out);
/* t += bias (or NULL); y = act(t), where y has t's shape and may be t itself. */
typedef void bias_act_fn(const struct rect *t, float *y, const float *bias, enum k_activation act);
/* t *= act'(pre), pre of t's shape and ld. */
typedef void act_grad_fn(const struct rect *t, const float *pre, enum k_activation act);
/* dst += src, src of src_ld floats a row. */
typedef void add_rect_fn(const struct rect *dst, const float *src, size_t src_ld);
/* out[c] = the sum of column c, rows in order from +0. */
typedef void col_sum_fn(const struct rect *t, float *out);
/* out = x + mask * branch; x may be NULL. n elements at `first` of the micro-batch. */
typedef void residual_fn(const float *x, const float *branch, float *out, uint64_t n, const struct drop *d,
			 uint64_t first);
/* out = mask * (a + b); b may be NULL. */
typedef void embed_row_fn(const float *a, const float *b, float *out, uint32_t n, const struct drop *d, uint64_t first);
/* y = act(gate) * up */
typedef void glu_fn(const float *gate, const float *up, float *y, uint32_t n, enum k_activation act);
/* dgate may be gate, dup may be up, either may be dy. */
typedef void glu_back_fn(const float *gate, const float *up, const float *dy, float *dgate, float *dup, uint32_t n,
			 enum k_activation act);
typedef void rotary_row_fn(const struct turn *t);
/* One row; drop_first: the row's first element. */
typedef void norm_row_fn(const struct k_norm *a, uint64_t row, const struct drop *d, uint64_t drop_first);
typedef void norm_back_row_fn(const struct k_norm_backward *a, uint64_t row);
/* The leaf of micro-batch mb for columns first..first+n: dgamma and dbeta, n <= NORM_COLS. */
#define NORM_COLS 64u
typedef void norm_back_cols_fn(const struct k_norm_backward *a, uint32_t mb, uint32_t first, uint32_t n, float *dgamma,
			       float *dbeta);
typedef void attn_mul_fn(const struct attn_mul *g);
/* t in panels of its columns, panel_floats apart, zeros behind the last column. */
typedef void attn_pack_fn(const struct rect *t, float *dst, size_t panel_floats);
/* The transpose of t in panels of its columns: t's rows. Panels back to back, zeros behind the last row. */
typedef void attn_pack_turned_fn(const struct rect *t, float *dst);
/* s becomes exp(scale s - max), dropped where dropout says; sum and max of each row before dropout. */
typedef void attn_softmax_fn(const struct attn_rows *a, float *sum, float *max);
/* t[r] *= by[r] */
typedef void scale_rows_fn(const struct rect *t, const float *by);
/* out[r] = a[r] . b[r], both of ld floats a row. */
typedef void dot_rows_fn(const float *a, const float *b, size_t ld, uint32_t rows, uint32_t cols, float *out);
/*
 * p = exp(scale s - lse); s becomes mask * p, dp (same shape) becomes p * (mask * dp - d) * scale.
 */
typedef void attn_backward_fn(const struct attn_rows *a, float *dp, const float *lse, const float *d);
/*
 * Returns max - x[target] and, in *sum, the sum of e^(x - max): the row's loss is log(*sum) more. Unless loss_only
 * the row becomes softmax * inv_count, less inv_count at the target.
 */
typedef double xent_row_fn(float *row, uint32_t n, uint32_t target, float inv_count, bool loss_only, float *sum);
/* dst becomes +0, past the caches: more than they hold, of which most is not needed soon. */
typedef void zero_past_fn(float *dst, uint64_t n);
/* dst = a (+ b), n a multiple of K_CHUNK; square sums of chunks go to sum unless it is NULL. */
typedef void fold_fn(float *dst, const float *a, const float *b, uint64_t n, struct exact_sum *sum);
typedef void adam_fn(float *p, float *m, float *v, const float *g, uint64_t n, const struct adam_scalars *c);

struct isa_ops {
	gemm_fn *gemm;
	dropout_fn *dropout;
	bias_act_fn *bias_act;
	act_grad_fn *act_grad;
	add_rect_fn *add_rect;
	col_sum_fn *col_sum;
	residual_fn *residual;
	embed_row_fn *embed_row;
	glu_fn *glu;
	glu_back_fn *glu_back;
	rotary_row_fn *rotary_row;
	norm_row_fn *norm_row;
	norm_back_row_fn *norm_back_row;
	norm_back_cols_fn *norm_back_cols;
	attn_mul_fn *attn_mul;
	attn_pack_fn *attn_pack;
	attn_pack_turned_fn *attn_pack_turned;
	attn_softmax_fn *attn_softmax;
	scale_rows_fn *scale_rows;
	dot_rows_fn *dot_rows;
	attn_backward_fn *attn_backward;
	xent_row_fn *xent_row;
	zero_past_fn *zero_past;
	fold_fn *fold;
	adam_fn *adam;
};

extern const struct isa_ops isa_ops_portable;
#if defined(__x86_64__)
extern const struct isa_ops isa_ops_avx2;
extern const struct isa_ops isa_ops_avx512;
#endif

/* Names of one instruction set's functions: ISA(gemm) is gemm_avx512 in the files compiled for AVX-512. */
#ifndef ISA_SUFFIX
#define ISA_SUFFIX portable
#endif
#define ISA_JOIN2(a, b) a##_##b
#define ISA_JOIN(a, b) ISA_JOIN2(a, b)
#define ISA(name) ISA_JOIN(name, ISA_SUFFIX)

gemm_fn ISA(gemm);
dropout_fn ISA(dropout);
bias_act_fn ISA(bias_act);
act_grad_fn ISA(act_grad);
add_rect_fn ISA(add_rect);
col_sum_fn ISA(col_sum);
residual_fn ISA(residual);
embed_row_fn ISA(embed_row);
glu_fn ISA(glu);
glu_back_fn ISA(glu_back);
rotary_row_fn ISA(rotary_row);
norm_row_fn ISA(norm_row);
norm_back_row_fn ISA(norm_back_row);
norm_back_cols_fn ISA(norm_back_cols);
attn_mul_fn ISA(attn_mul);
attn_pack_fn ISA(attn_pack);
attn_pack_turned_fn ISA(attn_pack_turned);
attn_softmax_fn ISA(attn_softmax);
scale_rows_fn ISA(scale_rows);
dot_rows_fn ISA(dot_rows);
attn_backward_fn ISA(attn_backward);
xent_row_fn ISA(xent_row);
zero_past_fn ISA(zero_past);
fold_fn ISA(fold);
adam_fn ISA(adam);

#endif
