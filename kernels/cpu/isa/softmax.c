/* SPDX-License-Identifier: Apache-2.0 */
/* Softmax, of attention's blocks of rows and of the loss. */
#include "kernels/cpu/isa/isa.h"
#include "kernels/cpu/isa/vec.h"

#define MASK_BLOCK 256u
/* Sums of exponentials go through blocks of this many elements, so that long rows stay exact to a few ulp. */
#define SUM_BLOCK 512u

static float row_max(const float *x, uint32_t n, float scale)
{
	const float lowest = -__builtin_inff();
	const vf vs = vf_set(scale);
	struct acc16 m;
	uint32_t i = 0;

	acc16_clear(&m, lowest);
	for (; i + 16 <= n; i += 16)
		for (int h = 0; h < VH; h++)
			m.v[h] = vf_max(vf_load(x + i + h * VF) * vs, m.v[h]);
	for (int h = 0; i < n && h < VH; h++)
		if (lane_count(n - i, h)) {
			vf t = vf_load_tail(x + i, n - i, h, x[i]);
			m.v[h] = vf_max(t * vs, m.v[h]);
		}
	return acc16_max(&m);
}

/* The sum of e^(scale x - max) over one block, stored into e unless that is NULL. */
static void exp_block(const float *x, float *e, uint32_t n, float scale, float max, struct acc16 *sum)
{
	const vf vs = vf_set(scale), vm = vf_set(max);
	uint32_t i = 0;

	for (; i + 16 <= n; i += 16)
		for (int h = 0; h < VH; h++) {
			vf v = vf_exp(vf_load(x + i + h * VF) * vs - vm);
			sum->v[h] += v;
			if (e)
				vf_store(e + i + h * VF, v);
		}
	for (int h = 0; i < n && h < VH; h++) {
		size_t left = lane_count(n - i, h);
		if (!left)
			break;
		float tail[VF] = { 0 };
		vf v = vf_exp(vf_load_n(x + i + h * VF, left, 0.0f) * vs - vm);
		vf_store_n(tail, v, left);
		sum->v[h] += vf_load(tail);
		if (e)
			vf_store_n(e + i + h * VF, v, left);
	}
}

static float row_exp(const float *x, float *e, uint32_t n, float scale, float max)
{
	struct acc16 total;

	acc16_clear(&total, 0.0f);
	for (uint32_t i = 0; i < n; i += SUM_BLOCK) {
		struct acc16 sum;
		uint32_t take = n - i < SUM_BLOCK ? n - i : SUM_BLOCK;
		acc16_clear(&sum, 0.0f);
		exp_block(x + i, e ? e + i : NULL, take, scale, max, &sum);
		for (int h = 0; h < VH; h++)
			total.v[h] += sum.v[h];
	}
	return acc16_sum(&total);
}

/* The keys that row r sees, from the first of them to *end. */
static uint32_t visible(const struct attn_rows *a, uint32_t r, uint32_t *end)
{
	*end = a->first_visible + r;
	return a->window && *end > a->window ? *end - a->window : 0;
}

static void clear_invisible(float *row, uint32_t first, uint32_t end, uint32_t width)
{
	memset(row, 0, first * sizeof(float));
	memset(row + end, 0, (width - end) * sizeof(float));
}

void ISA(attn_softmax)(const struct attn_rows *a, float *sum, float *max)
{
	for (uint32_t r = 0; r < a->rows; r++) {
		uint32_t end, first = visible(a, r, &end), n = end - first;
		float *row = a->s + r * a->ld, *s = row + first;

		max[r] = row_max(s, n, a->scale);
		sum[r] = row_exp(s, s, n, a->scale, max[r]);
		clear_invisible(row, first, end, a->width);
		if (a->drop.threshold)
			ISA(residual)(NULL, s, s, n, &a->drop, a->drop_first + r * a->drop_row + first);
	}
}

/* Keys first..first+n of one row; mask may be NULL. */
static void attn_backward_part(float *s, float *dp, const float *mask, uint32_t n, float scale, float lse, float d)
{
	const vf vs = vf_set(scale), vl = vf_set(lse), v_d = vf_set(d);

	for (uint32_t i = 0; i < n; i += VF) {
		uint32_t left = n - i < VF ? n - i : VF;
		vf p = vf_exp((left == VF ? vf_load(s + i) : vf_load_n(s + i, left, 0.0f)) * vs - vl);
		vf g = left == VF ? vf_load(dp + i) : vf_load_n(dp + i, left, 0.0f);
		vf q = p;
		if (mask) {
			vf k = left == VF ? vf_load(mask + i) : vf_load_n(mask + i, left, 0.0f);
			g *= k;
			q *= k;
		}
		g = p * (g - v_d) * vs;
		if (left == VF) {
			vf_store(s + i, q);
			vf_store(dp + i, g);
		} else {
			vf_store_n(s + i, q, left);
			vf_store_n(dp + i, g, left);
		}
	}
}

void ISA(attn_backward)(const struct attn_rows *a, float *dp, const float *lse, const float *d)
{
	float mask[MASK_BLOCK];

	for (uint32_t r = 0; r < a->rows; r++) {
		float *s = a->s + r * a->ld, *g = dp + r * a->ld;
		uint32_t end, first = visible(a, r, &end);

		for (uint32_t i = first; i < end; i += MASK_BLOCK) {
			uint32_t take = end - i < MASK_BLOCK ? end - i : MASK_BLOCK;
			if (a->drop.threshold)
				ISA(dropout)(&a->drop, a->drop_first + r * a->drop_row + i, take, mask);
			attn_backward_part(s + i, g + i, a->drop.threshold ? mask : NULL, take, a->scale, lse[r], d[r]);
		}
		clear_invisible(s, first, end, a->width);
		clear_invisible(g, first, end, a->width);
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
	float max = row_max(row, n, 1.0f);
	double below_max = (double)max - (double)row[target];

	*sum = row_exp(row, loss_only ? NULL : row, n, 1.0f, max);
	if (!loss_only) {
		const struct rect t = { .p = row, .ld = 0, .rows = 1, .cols = n };
		float scale = inv_count / *sum;
		ISA(scale_rows)(&t, &scale);
		row[target] -= inv_count;
	}
	return below_max;
}
