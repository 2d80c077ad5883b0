/* SPDX-License-Identifier: Apache-2.0 */
/*
 * LayerNorm and RMSNorm by rows, and their weights' gradients by blocks of columns. RMSNorm is LayerNorm
 * with mean 0 and without beta: subtracting 0 changes nothing, so most loops serve both.
 */
#include "kernels/cpu/isa/isa.h"
#include "kernels/cpu/isa/vec.h"

static float row_mean(const float *x, uint32_t n)
{
	struct acc16 sum;
	uint32_t i = 0;

	acc16_clear(&sum, 0.0f);
	for (; i + 16 <= n; i += 16)
		for (int h = 0; h < VH; h++)
			sum.v[h] += vf_load(x + i + h * VF);
	if (i < n)
		for (int h = 0; h < VH; h++)
			sum.v[h] += vf_load_tail(x + i, n - i, h, 0.0f);
	return acc16_sum(&sum) / (float)n;
}

static float row_variance(const float *x, uint32_t n, float mean)
{
	struct acc16 sum;
	const vf m = vf_set(mean);
	uint32_t i = 0;

	acc16_clear(&sum, 0.0f);
	for (; i + 16 <= n; i += 16)
		for (int h = 0; h < VH; h++) {
			vf d = vf_load(x + i + h * VF) - m;
			sum.v[h] += d * d;
		}
	if (i < n)
		for (int h = 0; h < VH; h++) {
			vf d = vf_load_tail(x + i, n - i, h, mean) - m;
			sum.v[h] += d * d;
		}
	return acc16_sum(&sum) / (float)n;
}

static void normalise_row(const struct k_norm *a, const float *x, float mean, float rstd, float *y)
{
	const vf vm = vf_set(mean), vr = vf_set(rstd);
	uint32_t i = 0, n = a->cols;

	for (; i + VF <= n; i += VF)
		vf_store(y + i, (vf_load(x + i) - vm) * vr * vf_load(a->gamma + i) + vf_load(a->beta + i));
	for (; i < n; i++)
		y[i] = (x[i] - mean) * rstd * a->gamma[i] + a->beta[i];
}

static void scale_row(const float *x, float rstd, const float *gamma, float *y, uint32_t n)
{
	const vf vr = vf_set(rstd);
	uint32_t i = 0;

	for (; i + VF <= n; i += VF)
		vf_store(y + i, vf_load(x + i) * vr * vf_load(gamma + i));
	for (; i < n; i++)
		y[i] = x[i] * rstd * gamma[i];
}

void ISA(norm_row)(const struct k_norm *a, uint64_t row, const struct drop *d, uint64_t drop_first)
{
	uint32_t n = a->cols;
	const float *x = a->x + row * n;
	float *y = a->y + row * n;

	if (a->branch) {
		float *sum = a->sum + row * n;
		ISA(residual)(x, a->branch + row * n, sum, n, d, drop_first);
		x = sum;
	}
	float mean = a->rms ? 0.0f : row_mean(x, n);
	float rstd = 1.0f / __builtin_sqrtf(row_variance(x, n, mean) + a->eps);
	if (a->rms)
		scale_row(x, rstd, a->gamma, y, n);
	else
		normalise_row(a, x, mean, rstd, y);
	if (a->mean && !a->rms)
		a->mean[row] = mean;
	if (a->rstd)
		a->rstd[row] = rstd;
}

static inline float mean_of(const struct k_norm_backward *a, uint64_t row)
{
	return a->rms ? 0.0f : a->mean[row];
}

/* The two sums of a row's backward: g and g * xhat, with g = dy * gamma. */
static void norm_back_sums(const struct k_norm_backward *a, uint64_t row, float *sum_g, float *sum_gx)
{
	uint32_t n = a->cols, i = 0;
	const float *x = a->x + row * n, *dy = a->dy + row * n;
	const float mean = mean_of(a, row);
	const vf vm = vf_set(mean), vr = vf_set(a->rstd[row]);
	struct acc16 s1, s2;

	acc16_clear(&s1, 0.0f);
	acc16_clear(&s2, 0.0f);
	for (; i + 16 <= n; i += 16)
		for (int h = 0; h < VH; h++) {
			uint32_t j = i + h * VF;
			vf g = vf_load(dy + j) * vf_load(a->gamma + j);
			s1.v[h] += g;
			s2.v[h] += g * ((vf_load(x + j) - vm) * vr);
		}
	if (i < n)
		for (int h = 0; h < VH; h++) {
			vf g = vf_load_tail(dy + i, n - i, h, 0.0f) * vf_load_tail(a->gamma + i, n - i, h, 0.0f);
			s1.v[h] += g;
			s2.v[h] += g * ((vf_load_tail(x + i, n - i, h, mean) - vm) * vr);
		}
	*sum_g = acc16_sum(&s1);
	*sum_gx = acc16_sum(&s2);
}

void ISA(norm_back_row)(const struct k_norm_backward *a, uint64_t row)
{
	uint32_t n = a->cols, i = 0;
	const float *x = a->x + row * n, *dy = a->dy + row * n;
	const float *res = a->dresidual ? a->dresidual + row * n : NULL;
	float *dx = a->dx + row * n, mean = mean_of(a, row), rstd = a->rstd[row], c1, c2;

	norm_back_sums(a, row, &c1, &c2);
	c1 = a->rms ? 0.0f : c1 / (float)n;
	c2 /= (float)n;
	const vf vm = vf_set(mean), vr = vf_set(rstd), v1 = vf_set(c1), v2 = vf_set(c2);
	for (; i + VF <= n; i += VF) {
		vf xhat = (vf_load(x + i) - vm) * vr;
		vf v = vr * (vf_load(dy + i) * vf_load(a->gamma + i) - v1 - xhat * v2);
		vf_store(dx + i, res ? v + vf_load(res + i) : v);
	}
	for (; i < n; i++) {
		float xhat = (x[i] - mean) * rstd;
		float v = rstd * (dy[i] * a->gamma[i] - c1 - xhat * c2);
		dx[i] = res ? v + res[i] : v;
	}
}

void ISA(norm_back_cols)(const struct k_norm_backward *a, uint32_t mb, uint32_t first, uint32_t n, float *dgamma,
			 float *dbeta)
{
	vf dg[NORM_COLS / VF], db[NORM_COLS / VF];
	const uint32_t whole = n / VF, tail = n % VF;

	for (uint32_t c = 0; c < NORM_COLS / VF; c++)
		dg[c] = db[c] = vf_set(0.0f);
	for (uint64_t r = (uint64_t)mb * a->rows; r < (uint64_t)(mb + 1) * a->rows; r++) {
		const float *x = a->x + r * a->cols + first, *dy = a->dy + r * a->cols + first;
		const vf vm = vf_set(mean_of(a, r)), vr = vf_set(a->rstd[r]);

		for (uint32_t c = 0; c < whole; c++) {
			vf g = vf_load(dy + c * VF);
			db[c] += g;
			dg[c] += g * ((vf_load(x + c * VF) - vm) * vr);
		}
		if (tail) {
			vf g = vf_load_n(dy + whole * VF, tail, 0.0f);
			db[whole] += g;
			dg[whole] += g * ((vf_load_n(x + whole * VF, tail, 0.0f) - vm) * vr);
		}
	}
	memcpy(dgamma, dg, n * sizeof(float));
	memcpy(dbeta, db, n * sizeof(float));
}
