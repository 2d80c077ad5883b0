/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Vectors of the width that this instruction set has, by GNU vector extensions.
 *
 * The sources of this folder are compiled once for each instruction set, with
 * ISA_SUFFIX telling them apart. Element by element, the width of a vector
 * changes no bit. Sums over elements do depend on it, so they always run in 16
 * lanes (lane = element mod 16, struct acc16), joined by one fixed tree: the
 * same bits on every instruction set. A padding lane of a sum must add +0; lanes
 * start at +0 and so never are -0, which makes adding +0 exactly nothing.
 */
#ifndef SHARDMESH_KERNELS_CPU_ISA_VEC_H
#define SHARDMESH_KERNELS_CPU_ISA_VEC_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VF 16
#elif defined(__AVX2__)
#define VF 8
#else
#define VF 4
#endif
#define VH (16 / VF) /* native vectors in 16 lanes */

typedef float vf __attribute__((vector_size(VF * 4)));
typedef uint32_t vu __attribute__((vector_size(VF * 4)));
typedef int32_t vi __attribute__((vector_size(VF * 4)));
typedef float vf_mem __attribute__((vector_size(VF * 4), aligned(4), may_alias));
typedef float vf_half __attribute__((vector_size(VF * 2)));
typedef float vf_half_mem __attribute__((vector_size(VF * 2), aligned(4), may_alias));
typedef double vd __attribute__((vector_size(VF * 4))); /* half as many lanes */

static inline vf vf_load(const float *p)
{
	return *(const vf_mem *)p;
}

static inline void vf_store(float *p, vf v)
{
	*(vf_mem *)p = v;
}

static inline vf vf_set(float s)
{
#if VF == 16
	return (vf)_mm512_set1_ps(s);
#elif VF == 8
	return (vf)_mm256_set1_ps(s);
#else
	return (vf){ s, s, s, s };
#endif
}

/* The first n < VF elements, the rest set to pad. */
static inline vf vf_load_n(const float *p, size_t n, float pad)
{
	vf v = vf_set(pad);
	memcpy(&v, p, n * sizeof(float));
	return v;
}

static inline void vf_store_n(float *p, vf v, size_t n)
{
	memcpy(p, &v, n * sizeof(float));
}

/* Lanes of a where the mask (a comparison's result) is set, else of b. */
static inline vf vf_select(vi mask, vf a, vf b)
{
	return (vf)(((vi)a & mask) | ((vi)b & ~mask));
}

/* The first n lanes of a, the others of b. */
static inline vf vf_first(uint32_t n, vf a, vf b)
{
#if VF == 16
	const vi lane = { 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 };
#elif VF == 8
	const vi lane = { 0, 1, 2, 3, 4, 5, 6, 7 };
#else
	const vi lane = { 0, 1, 2, 3 };
#endif
	return vf_select(lane < (int32_t)n, a, b);
}

/* a > b ? a : b, on every instruction set: b when one of them is not a number. */
static inline vf vf_max(vf a, vf b)
{
#if VF == 16
	return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif VF == 8
	return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
	return vf_select(a > b, a, b);
#endif
}

/* a < b ? a : b, likewise. */
static inline vf vf_min(vf a, vf b)
{
#if VF == 16
	return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif VF == 8
	return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
	return vf_select(a < b, a, b);
#endif
}

static inline vf vf_sqrt(vf v)
{
#if VF == 16
	return (vf)_mm512_sqrt_ps((__m512)v);
#elif VF == 8
	return (vf)_mm256_sqrt_ps((__m256)v);
#else
	for (int i = 0; i < VF; i++)
		v[i] = __builtin_sqrtf(v[i]);
	return v;
#endif
}

/* Past the caches, where the instruction set can; p is a multiple of a vector. */
static inline void vf_stream(float *p, vf v)
{
#if VF == 16
	_mm512_stream_ps(p, (__m512)v);
#elif VF == 8
	_mm256_stream_ps(p, (__m256)v);
#else
	vf_store(p, v);
#endif
}

/* Orders streamed stores before what follows. */
static inline void vf_stream_end(void)
{
#if VF >= 8
	_mm_sfence();
#endif
}

/* a * b + c for products that are exact in double: fused or not, the same bits. */
static inline vd vd_fma_exact(vd a, vd b, vd c)
{
#if VF == 16
	return (vd)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif VF == 8
	return (vd)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
	return a * b + c;
#endif
}

/* a * b + c, fused where the instruction set can: only for products, whose bits belong to the profile. */
static inline vf vf_fma(vf a, vf b, vf c)
{
#if VF == 16
	return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif VF == 8
	return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
	return a * b + c;
#endif
}

/* ------------------------------------------------------- sums in 16 lanes */

struct acc16 {
	vf v[VH];
};

static inline void acc16_clear(struct acc16 *a, float s)
{
	for (int h = 0; h < VH; h++)
		a->v[h] = vf_set(s);
}

/* The upper half of a vector's first n lanes, as the lower one. */
static inline vf vf_upper(vf v, int n)
{
#if VF == 16
	if (n == 16)
		return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15);
	if (n == 8)
		return __builtin_shufflevector(v, v, 4, 5, 6, 7, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
	if (n == 4)
		return __builtin_shufflevector(v, v, 2, 3, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
	return __builtin_shufflevector(v, v, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#elif VF == 8
	if (n == 8)
		return __builtin_shufflevector(v, v, 4, 5, 6, 7, 4, 5, 6, 7);
	if (n == 4)
		return __builtin_shufflevector(v, v, 2, 3, 2, 3, 4, 5, 6, 7);
	return __builtin_shufflevector(v, v, 1, 1, 2, 3, 4, 5, 6, 7);
#else
	return n == 4 ? __builtin_shufflevector(v, v, 2, 3, 2, 3) : __builtin_shufflevector(v, v, 1, 1, 2, 3);
#endif
}

/* Lane i and lane i + 8 first, then i and i + 4, and so on. */
static inline float acc16_sum(const struct acc16 *a)
{
	struct acc16 l = *a;

	for (int w = VH / 2; w > 0; w /= 2)
		for (int i = 0; i < w; i++)
			l.v[i] += l.v[i + w];
#pragma GCC unroll 4
	for (int n = VF; n > 1; n /= 2)
		l.v[0] += vf_upper(l.v[0], n);
	return l.v[0][0];
}

static inline float acc16_max(const struct acc16 *a)
{
	struct acc16 l = *a;

	for (int w = VH / 2; w > 0; w /= 2)
		for (int i = 0; i < w; i++)
			l.v[i] = vf_max(l.v[i], l.v[i + w]);
#pragma GCC unroll 4
	for (int n = VF; n > 1; n /= 2)
		l.v[0] = vf_max(l.v[0], vf_upper(l.v[0], n));
	return l.v[0][0];
}

/* How many of the 16-block's elements fall into native vector h, when `left` elements are left. */
static inline size_t lane_count(size_t left, int h)
{
	size_t first = (size_t)h * VF;
	if (left <= first)
		return 0;
	return left - first < VF ? left - first : VF;
}

/* Loads native vector h of a 16-block with `left` elements left, padded. */
static inline vf vf_load_tail(const float *p, size_t left, int h, float pad)
{
	size_t n = lane_count(left, h);
	return n ? vf_load_n(p + h * VF, n, pad) : vf_set(pad);
}

/* ------------------------------------------------------------ exponentials */

/*
 * e^x, within 2 ulp, by Cephes' expf (Moshier): x = n ln 2 + r, a polynomial in r. Below -87.3 the
 * result is +0, above 88 it stays at e^88; what is not a number stays so.
 */
static inline vf vf_exp(vf x)
{
	const vf lowest = vf_set(-87.3f), highest = vf_set(88.0f), magic = vf_set(12582912.0f);
	vi under = x < lowest;
	/* What is not a number is the second operand of both, and so their result. */
	vf c = vf_min(highest, vf_max(lowest, x));
	vf t = c * vf_set(1.44269504088896341f) + magic;
	vf n = t - magic;
	vf r = c - n * vf_set(0.693359375f);
	r = r - n * vf_set(-2.12194440e-4f);
	vf y = vf_set(1.9875691500e-4f) * r + vf_set(1.3981999507e-3f);
	y = y * r + vf_set(8.3334519073e-3f);
	y = y * r + vf_set(4.1665795894e-2f);
	y = y * r + vf_set(1.6666665459e-1f);
	y = y * r + vf_set(5.0000001201e-1f);
	y = y * (r * r) + r + vf_set(1.0f);
	/* The low bits of t hold n: shifted into the exponent they make 2^n. */
	y = y * (vf)(((vu)t << 23) + 0x3f800000u);
	return (vf)((vi)y & ~under);
}

/* 1 / (1 + e^-x) */
static inline vf vf_sigmoid(vf x)
{
	return vf_set(1.0f) / (vf_set(1.0f) + vf_exp(-x));
}

/* erf(x) by a rational function of x^2 on [-4, 4], within a few ulp; beyond, it is 1 in fp32. */
static inline vf vf_erf(vf x)
{
	vf c = vf_select(x > vf_set(4.0f), vf_set(4.0f), x);
	c = vf_select(c < vf_set(-4.0f), vf_set(-4.0f), c);
	vf z = c * c;
	vf p = vf_set(-2.72614225801306e-10f) * z + vf_set(2.77068142495902e-08f);
	p = p * z + vf_set(-2.10102402082508e-06f);
	p = p * z + vf_set(-5.69250639462346e-05f);
	p = p * z + vf_set(-7.34990630326855e-04f);
	p = p * z + vf_set(-2.95459980854025e-03f);
	p = p * z + vf_set(-1.60960333262415e-02f);
	vf q = vf_set(-1.45660718464996e-05f) * z + vf_set(-2.13374055278905e-04f);
	q = q * z + vf_set(-1.68282697438203e-03f);
	q = q * z + vf_set(-7.37332916720468e-03f);
	q = q * z + vf_set(-1.42647390514189e-02f);
	return c * p / q;
}

#endif
