/* SPDX-License-Identifier: Apache-2.0 */
/* Bias, activations and their derivatives, on a tile while it is hot; sums of columns and of tiles. */
#include "kernels/cpu/isa/isa.h"
#include "kernels/cpu/isa/vec.h"

#define INLINE static inline __attribute__((always_inline))

#define GELU_CUBIC 0.044715f
#define GELU_2C 1.5957691216057308f /* 2 sqrt(2 / pi) */

/* 0.5 (1 + tanh(u)) is the logistic function of 2u. */
INLINE vf gelu_tanh_gate(vf x)
{
	return vf_sigmoid(x * (vf_set(1.0f) + x * x * vf_set(GELU_CUBIC)) * vf_set(GELU_2C));
}

INLINE vf gelu_erf_gate(vf x)
{
	return vf_set(0.5f) * (vf_set(1.0f) + vf_erf(x * vf_set(0.70710678118654752f)));
}

INLINE vf act_value(vf x, enum k_activation act)
{
	switch (act) {
	case K_ACT_GELU_TANH:
		return x * gelu_tanh_gate(x);
	case K_ACT_GELU_ERF:
		return x * gelu_erf_gate(x);
	case K_ACT_RELU:
		return vf_select(x < vf_set(0.0f), vf_set(0.0f), x);
	case K_ACT_SILU:
		return x * vf_sigmoid(x);
	case K_ACT_NONE:
		break;
	}
	return x;
}

INLINE vf act_slope(vf x, enum k_activation act)
{
	const vf one = vf_set(1.0f);
	vf s;

	switch (act) {
	case K_ACT_GELU_TANH:
		s = gelu_tanh_gate(x);
		return s + x * s * (one - s) * vf_set(GELU_2C) * (one + vf_set(3.0f * GELU_CUBIC) * x * x);
	case K_ACT_GELU_ERF:
		return gelu_erf_gate(x) + x * vf_exp(vf_set(-0.5f) * x * x) * vf_set(0.39894228040143268f);
	case K_ACT_RELU:
		return vf_select(x > vf_set(0.0f), one, vf_set(0.0f));
	case K_ACT_SILU:
		s = vf_sigmoid(x);
		return s * (one + x * (one - s));
	case K_ACT_NONE:
		break;
	}
	return one;
}

INLINE void bias_act_row(float *t, float *y, const float *bias, uint32_t n, enum k_activation act)
{
	const vf zero = vf_set(0.0f);
	uint32_t i = 0;

	for (; i + VF <= n; i += VF) {
		vf v = vf_load(t + i);
		if (bias)
			v += vf_load(bias + i);
		vf_store(t + i, v);
		vf_store(y + i, act_value(v, act));
	}
	if (i < n) {
		vf v = vf_load_n(t + i, n - i, 0.0f);
		v += bias ? vf_load_n(bias + i, n - i, 0.0f) : zero;
		vf_store_n(t + i, v, n - i);
		vf_store_n(y + i, act_value(v, act), n - i);
	}
}

INLINE void bias_act_rows(const struct rect *t, float *y, const float *bias, enum k_activation act)
{
	for (uint32_t r = 0; r < t->rows; r++)
		bias_act_row(t->p + r * t->ld, y + r * t->ld, bias, t->cols, act);
}

void ISA(bias_act)(const struct rect *t, float *y, const float *bias, enum k_activation act)
{
	switch (act) {
	case K_ACT_NONE:
		bias_act_rows(t, y, bias, K_ACT_NONE);
		break;
	case K_ACT_GELU_TANH:
		bias_act_rows(t, y, bias, K_ACT_GELU_TANH);
		break;
	case K_ACT_GELU_ERF:
		bias_act_rows(t, y, bias, K_ACT_GELU_ERF);
		break;
	case K_ACT_RELU:
		bias_act_rows(t, y, bias, K_ACT_RELU);
		break;
	case K_ACT_SILU:
		bias_act_rows(t, y, bias, K_ACT_SILU);
		break;
	}
}

INLINE void act_grad_rows(const struct rect *t, const float *pre, enum k_activation act)
{
	for (uint32_t r = 0; r < t->rows; r++) {
		float *g = t->p + r * t->ld;
		const float *x = pre + r * t->ld;
		uint32_t i = 0, n = t->cols;

		for (; i + VF <= n; i += VF)
			vf_store(g + i, vf_load(g + i) * act_slope(vf_load(x + i), act));
		if (i < n)
			vf_store_n(g + i, vf_load_n(g + i, n - i, 0.0f) * act_slope(vf_load_n(x + i, n - i, 0.0f), act),
				   n - i);
	}
}

void ISA(act_grad)(const struct rect *t, const float *pre, enum k_activation act)
{
	switch (act) {
	case K_ACT_NONE:
		break;
	case K_ACT_GELU_TANH:
		act_grad_rows(t, pre, K_ACT_GELU_TANH);
		break;
	case K_ACT_GELU_ERF:
		act_grad_rows(t, pre, K_ACT_GELU_ERF);
		break;
	case K_ACT_RELU:
		act_grad_rows(t, pre, K_ACT_RELU);
		break;
	case K_ACT_SILU:
		act_grad_rows(t, pre, K_ACT_SILU);
		break;
	}
}

INLINE void glu_all(const float *gate, const float *up, float *y, uint32_t n, enum k_activation act)
{
	uint32_t i = 0, left;

	for (; i + VF <= n; i += VF)
		vf_store(y + i, act_value(vf_load(gate + i), act) * vf_load(up + i));
	left = n - i;
	if (left) {
		vf v = act_value(vf_load_n(gate + i, left, 0.0f), act) * vf_load_n(up + i, left, 0.0f);
		vf_store_n(y + i, v, left);
	}
}

void ISA(glu)(const float *gate, const float *up, float *y, uint32_t n, enum k_activation act)
{
	switch (act) {
	case K_ACT_NONE:
		glu_all(gate, up, y, n, K_ACT_NONE);
		break;
	case K_ACT_GELU_TANH:
		glu_all(gate, up, y, n, K_ACT_GELU_TANH);
		break;
	case K_ACT_GELU_ERF:
		glu_all(gate, up, y, n, K_ACT_GELU_ERF);
		break;
	case K_ACT_RELU:
		glu_all(gate, up, y, n, K_ACT_RELU);
		break;
	case K_ACT_SILU:
		glu_all(gate, up, y, n, K_ACT_SILU);
		break;
	}
}

INLINE void glu_back_all(const float *gate, const float *up, const float *dy, float *dgate, float *dup, uint32_t n,
			 enum k_activation act)
{
	for (uint32_t i = 0; i < n; i += VF) {
		const uint32_t left = n - i;
		const bool whole = left >= VF;
		vf x = whole ? vf_load(gate + i) : vf_load_n(gate + i, left, 0.0f);
		vf u = whole ? vf_load(up + i) : vf_load_n(up + i, left, 0.0f);
		vf g = whole ? vf_load(dy + i) : vf_load_n(dy + i, left, 0.0f);
		vf dx = g * u * act_slope(x, act), du = g * act_value(x, act);
		if (whole) {
			vf_store(dgate + i, dx);
			vf_store(dup + i, du);
		} else {
			vf_store_n(dgate + i, dx, left);
			vf_store_n(dup + i, du, left);
		}
	}
}

void ISA(glu_back)(const float *gate, const float *up, const float *dy, float *dgate, float *dup, uint32_t n,
		   enum k_activation act)
{
	switch (act) {
	case K_ACT_NONE:
		glu_back_all(gate, up, dy, dgate, dup, n, K_ACT_NONE);
		break;
	case K_ACT_GELU_TANH:
		glu_back_all(gate, up, dy, dgate, dup, n, K_ACT_GELU_TANH);
		break;
	case K_ACT_GELU_ERF:
		glu_back_all(gate, up, dy, dgate, dup, n, K_ACT_GELU_ERF);
		break;
	case K_ACT_RELU:
		glu_back_all(gate, up, dy, dgate, dup, n, K_ACT_RELU);
		break;
	case K_ACT_SILU:
		glu_back_all(gate, up, dy, dgate, dup, n, K_ACT_SILU);
		break;
	}
}

void ISA(add_rect)(const struct rect *dst, const float *src, size_t src_ld)
{
	for (uint32_t r = 0; r < dst->rows; r++) {
		float *d = dst->p + r * dst->ld;
		const float *s = src + r * src_ld;
		uint32_t i = 0, n = dst->cols;

		for (; i + VF <= n; i += VF)
			vf_store(d + i, vf_load(d + i) + vf_load(s + i));
		for (; i < n; i++)
			d[i] += s[i];
	}
}

void ISA(col_sum)(const struct rect *t, float *out)
{
	const struct rect row = { .p = out, .ld = 0, .rows = 1, .cols = t->cols };

	memset(out, 0, t->cols * sizeof(float));
	for (uint32_t r = 0; r < t->rows; r++)
		ISA(add_rect)(&row, t->p + r * t->ld, 0);
}

void ISA(scale_rows)(const struct rect *t, const float *by)
{
	for (uint32_t r = 0; r < t->rows; r++) {
		float *p = t->p + r * t->ld;
		uint32_t i = 0;

		for (; i + VF <= t->cols; i += VF)
			vf_store(p + i, vf_load(p + i) * vf_set(by[r]));
		for (; i < t->cols; i++)
			p[i] *= by[r];
	}
}
