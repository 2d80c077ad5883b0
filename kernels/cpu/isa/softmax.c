/* SPDX-License-Identifier: Apache-2.0 */
/* Softmax, of attention's blocks of rows and of the loss. */
#include "kernels/cpu/isa/isa.h"
#include "kernels/cpu/isa/vec.h"

#define MASK_BLOCK 256u
/* Sums of exponentials go through blocks of this many elements, so that long rows stay exact to a few ulp. */
#define SUM_BLOCK 512u

#define INLINE static inline __attribute__((always_inline))

/* With `open` the last vector of x is whole, and what stands behind is not looked at. */
INLINE float row_max(const float *x, uint32_t n, bool open, float scale)
{
	const vf vs = vf_set(scale), lowest = vf_set(-__builtin_inff());
	struct acc16 m;
	uint32_t i = 0;

	acc16_clear(&m, -__builtin_inff());
	for (; i + 16 <= n; i += 16)
		for (int h = 0; h < VH; h++)
			m.v[h] = vf_max(vf_load(x + i + h * VF) * vs, m.v[h]);
	for (int h = 0; i < n && h < VH; h++) {
		vf t = open ? vf_load(x + i + h * VF) : vf_load_tail(x + i, n - i, h, 0.0f);
		m.v[h] = vf_max(vf_first((uint32_t)lane_count(n - i, h), t * vs, lowest), m.v[h]);
	}
	return acc16_max(&m);
}

/*
 * The sum of e^(scale x - max) over one block, stored into e unless that is NULL. With `open` the last vector of x and
 * e is whole: what stands behind is not looked at and becomes +0.
 */
INLINE void exp_block(const float *x, float *e, uint32_t n, bool open, float scale, float max, struct acc16 *total)
{
	const vf vs = vf_set(scale), vm = vf_set(max), zero = vf_set(0.0f);
	struct acc16 sum;
	uint32_t i = 0;

	acc16_clear(&sum, 0.0f);
	for (; i + 16 <= n; i += 16)
		for (int h = 0; h < VH; h++) {
			vf v = vf_exp(vf_load(x + i + h * VF) * vs - vm);
			sum.v[h] += v;
			if (e)
				vf_store(e + i + h * VF, v);
		}
	for (int h = 0; i < n && h < VH; h++) {
		const uint32_t left = (uint32_t)lane_count(n - i, h);
		vf v = open ? vf_load(x + i + h * VF) : vf_load_tail(x + i, n - i, h, 0.0f);
		v = vf_first(left, vf_exp(v * vs - vm), zero);
		sum.v[h] += v;
		if (e && open)
			vf_store(e + i + h * VF, v);
		else if (e)
			vf_store_n(e + i + h * VF, v, left);
	}
	for (int h = 0; h < VH; h++)
		total->v[h] += sum.v[h];
}

INLINE float row_exp(const float *x, float *e, uint32_t n, bool open, float scale, float max)
{
	struct acc16 total;

	acc16_clear(&total, 0.0f);
	for (uint32_t i = 0; i < n; i += SUM_BLOCK)
		exp_block(x + i, e ? e + i : NULL, n - i < SUM_BLOCK ? n - i : SUM_BLOCK, open, scale, max, &total);
	return acc16_sum(&total);
}

/* The keys that row r sees, from the first of them to *end. */
static uint32_t visible(const struct attn_rows *a, uint32_t r, uint32_t *end)
{
	*end = a->first_visible + r;
	return a->window && *end > a->window ? *end - a->window : 0;
}

/* What products look at on both sides of what a row sees. */
static void clear_around(float *row, uint32_t first, uint32_t end)
{
	if (first)
		memset(row, 0, first * sizeof(float));
	memset(row + end, 0, ATTN_GROUP * sizeof(float));
}

void ISA(attn_softmax)(const struct attn_rows *a, float *sum, float *max)
{
	for (uint32_t r = 0; r < a->rows; r++) {
		uint32_t end, first = visible(a, r, &end), n = end - first;
		float *row = a->s + r * a->ld, *s = row + first;

		max[r] = row_max(s, n, true, a->scale);
		sum[r] = row_exp(s, s, n, true, a->scale, max[r]);
		clear_around(row, first, end);
		if (a->drop.threshold)
			ISA(residual)(NULL, s, s, n, &a->drop, a->drop_first + r * a->drop_row + first);
	}
}

/* Keys of one row; whole vectors, what stands behind the n-th key does not matter. mask may be NULL. */
INLINE void attn_backward_part(float *s, float *dp, const float *mask, uint32_t n, float scale, float lse, float d)
{
	const vf vs = vf_set(scale), vl = vf_set(lse), v_d = vf_set(d);

	for (uint32_t i = 0; i < n; i += VF) {
		vf p = vf_exp(vf_load(s + i) * vs - vl), q = p, g = vf_load(dp + i);
		if (mask) {
			vf k = vf_load(mask + i);
			g *= k;
			q *= k;
		}
		vf_store(s + i, q);
		vf_store(dp + i, p * (g - v_d) * vs);
	}
}

void ISA(attn_backward)(const struct attn_rows *a, float *dp, const float *lse, const float *d)
{
	float mask[MASK_BLOCK];

	for (uint32_t r = 0; r < a->rows; r++) {
		float *s = a->s + r * a->ld, *g = dp + r * a->ld;
		uint32_t end, first = visible(a, r, &end);

		if (!a->drop.threshold)
			attn_backward_part(s + first, g + first, NULL, end - first, a->scale, lse[r], d[r]);
		for (uint32_t i = first; a->drop.threshold && i < end; i += MASK_BLOCK) {
			uint32_t take = end - i < MASK_BLOCK ? end - i : MASK_BLOCK;
			ISA(dropout)(&a->drop, a->drop_first + r * a->drop_row + i, take, mask);
			attn_backward_part(s + i, g + i, mask, take, a->scale, lse[r], d[r]);
		}
		clear_around(s, first, end);
		clear_around(g, first, end);
	}
}

void ISA(dot_rows)(const float *a, const float *b, size_t ld, uint32_t rows, uint32_t cols, float *out)
{
	for (uint32_t r = 0; r < rows; r++, a += ld, b += ld) {
		struct acc16 sum;
		uint32_t i = 0;

		acc16_clear(&sum, 0.0f);
		for (; i + 16 <= cols; i += 16)
			for (int h = 0; h < VH; h++)
				sum.v[h] += vf_load(a + i + h * VF) * vf_load(b + i + h * VF);
		for (int h = 0; i < cols && h < VH; h++)
			sum.v[h] += vf_load_tail(a + i, cols - i, h, 0.0f) * vf_load_tail(b + i, cols - i, h, 0.0f);
		out[r] = acc16_sum(&sum);
	}
}

double ISA(xent_row)(float *row, uint32_t n, uint32_t target, float inv_count, bool loss_only, float *sum)
{
	float max = row_max(row, n, false, 1.0f);
	double below_max = (double)max - (double)row[target];

	*sum = row_exp(row, loss_only ? NULL : row, n, false, 1.0f, max);
	if (!loss_only) {
		const struct rect t = { .p = row, .ld = 0, .rows = 1, .cols = n };
		float scale = inv_count / *sum;
		ISA(scale_rows)(&t, &scale);
		row[target] -= inv_count;
	}
	return below_max;
}
