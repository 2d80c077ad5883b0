/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Dropout by counter, and the passes that apply it. Philox4x32-10 as in base:
 * key = seed, counter = {block, stream}, element i is word i mod 4 of block
 * i / 4. Each 64-bit lane carries one block, whose words stand in the low halves
 * of four vectors; what collects in the high halves is never looked at, since
 * the multiplication takes low halves only.
 */
#include "kernels/cpu/isa/isa.h"
#include "kernels/cpu/isa/vec.h"

typedef uint64_t vq __attribute__((vector_size(VF * 4)));

#define LANES (VF / 2)    /* blocks in a vector */
#define GROUP (4 * LANES) /* elements of these */
#define BATCH 64u         /* elements made at once: whole groups, whatever the vectors' width */

static inline vq vq_set(uint64_t s)
{
	vq v;
	for (int l = 0; l < LANES; l++)
		v[l] = s;
	return v;
}

/* The 64-bit products of the low halves. */
static inline vq vq_mul32(vq a, vq b)
{
#if VF == 16
	return (vq)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif VF == 8
	return (vq)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
	return (vq)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
	return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

/* Lanes of both in turn: a0 b0 a1 b1 ..., the first and the second half of them. */
static inline void vq_zip(vq a, vq b, vq *first, vq *second)
{
#if VF == 16
	*first = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
	*second = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#elif VF == 8
	*first = __builtin_shufflevector(a, b, 0, 4, 1, 5);
	*second = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#else
	*first = __builtin_shufflevector(a, b, 0, 2);
	*second = __builtin_shufflevector(a, b, 1, 3);
#endif
}

/* Multipliers of a random word each: dropped when its upper 24 bits are below the threshold. */
static inline vf keep(vq words, const struct drop *d)
{
	vi dropped = ((vi)((vu)words >> 8)) < (vi)(vq_set(d->threshold | (uint64_t)d->threshold << 32));
	return vf_select(dropped, vf_set(0.0f), vf_set(d->scale));
}

static inline void dropout_group(const struct drop *d, vq block, float out[GROUP])
{
	const vq m0 = vq_set(0xd2511f53u), m1 = vq_set(0xcd9e8d57u), low = vq_set(0xffffffffu);
	vq c0 = block, c1 = block >> 32, c2 = vq_set(d->stream), c3 = c2 >> 32, first, second;
	uint32_t k0 = (uint32_t)d->seed, k1 = (uint32_t)(d->seed >> 32);

	for (int round = 0; round < 10; round++, k0 += 0x9e3779b9u, k1 += 0xbb67ae85u) {
		vq p0 = vq_mul32(c0, m0), p1 = vq_mul32(c2, m1);
		c0 = (p1 >> 32) ^ c1 ^ vq_set(k0);
		c2 = (p0 >> 32) ^ c3 ^ vq_set(k1);
		c1 = p1;
		c3 = p0;
	}
	vq_zip((c0 & low) | c1 << 32, (c2 & low) | c3 << 32, &first, &second);
	vf_store(out, keep(first, d));
	vf_store(out + VF, keep(second, d));
}

/* Multipliers of the BATCH elements from block `block` on. */
static void dropout_batch(const struct drop *d, uint64_t block, float out[BATCH])
{
	vq at;

	for (int l = 0; l < LANES; l++)
		at[l] = block + (uint64_t)l;
	for (uint32_t i = 0; i < BATCH; i += GROUP, at += vq_set(LANES))
		dropout_group(d, at, out + i);
}

void ISA(dropout)(const struct drop *d, uint64_t first, uint32_t n, float *out)
{
	float batch[BATCH];
	uint64_t block = first / 4;
	uint32_t skip = (uint32_t)(first % 4);

	for (; skip == 0 && n >= BATCH; n -= BATCH, out += BATCH, block += BATCH / 4)
		dropout_batch(d, block, out);
	while (n > 0) {
		uint32_t take = BATCH - skip < n ? BATCH - skip : n;
		dropout_batch(d, block, batch);
		memcpy(out, batch + skip, take * sizeof(float));
		out += take;
		n -= take;
		block += BATCH / 4;
		skip = 0;
	}
}

/* out = x + mask * b, mask NULL for no dropout, x NULL for none. */
static void masked_add(const float *x, const float *b, const float *mask, float *out, uint32_t n)
{
	for (uint32_t i = 0; i < n; i += VF) {
		uint32_t left = n - i;
		vf v = left >= VF ? vf_load(b + i) : vf_load_n(b + i, left, 0.0f);
		if (mask)
			v *= left >= VF ? vf_load(mask + i) : vf_load_n(mask + i, left, 0.0f);
		if (x)
			v = (left >= VF ? vf_load(x + i) : vf_load_n(x + i, left, 0.0f)) + v;
		if (left >= VF)
			vf_store(out + i, v);
		else
			vf_store_n(out + i, v, left);
	}
}

void ISA(residual)(const float *x, const float *branch, float *out, uint64_t n, const struct drop *d, uint64_t first)
{
	float mask[4 * BATCH];

	for (uint64_t i = 0; i < n; i += ARRAY_LEN(mask)) {
		uint32_t take = n - i < ARRAY_LEN(mask) ? (uint32_t)(n - i) : ARRAY_LEN(mask);
		if (d->threshold)
			ISA(dropout)(d, first + i, take, mask);
		masked_add(x ? x + i : NULL, branch + i, d->threshold ? mask : NULL, out + i, take);
	}
}

void ISA(embed_row)(const float *a, const float *b, float *out, uint32_t n, const struct drop *d, uint64_t first)
{
	if (b)
		masked_add(a, b, NULL, out, n);
	else
		memcpy(out, a, n * sizeof(float));
	if (d->threshold)
		ISA(residual)(NULL, out, out, n, d, first);
}
