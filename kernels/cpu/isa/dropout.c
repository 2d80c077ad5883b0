/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Dropout by counter, and the passes that apply it. Philox4x32-10 as in base:
 * key = seed, counter = {block, stream}, element i is word i mod 4 of block
 * i / 4. LANES blocks at a time, in plain loops that compilers turn into vectors.
 */
#include "kernels/cpu/isa/isa.h"
#include "kernels/cpu/isa/vec.h"

#define LANES 16u
#define BATCH (4u * LANES) /* elements of LANES blocks */

struct philox_lanes {
	uint32_t w[4][LANES];
};

static inline void philox_round(struct philox_lanes *c, uint32_t k0, uint32_t k1)
{
	for (uint32_t l = 0; l < LANES; l++) {
		uint64_t p0 = (uint64_t)c->w[0][l] * 0xd2511f53u;
		uint64_t p1 = (uint64_t)c->w[2][l] * 0xcd9e8d57u;
		c->w[0][l] = (uint32_t)(p1 >> 32) ^ c->w[1][l] ^ k0;
		c->w[1][l] = (uint32_t)p1;
		c->w[2][l] = (uint32_t)(p0 >> 32) ^ c->w[3][l] ^ k1;
		c->w[3][l] = (uint32_t)p0;
	}
}

/* Multipliers of the BATCH elements from block `block` on. */
static void dropout_batch(const struct drop *d, uint64_t block, float out[BATCH])
{
	uint32_t k0 = (uint32_t)d->seed, k1 = (uint32_t)(d->seed >> 32);
	struct philox_lanes c;

	for (uint32_t l = 0; l < LANES; l++) {
		c.w[0][l] = (uint32_t)(block + l);
		c.w[1][l] = (uint32_t)((block + l) >> 32);
		c.w[2][l] = (uint32_t)d->stream;
		c.w[3][l] = (uint32_t)(d->stream >> 32);
	}
	for (int round = 0; round < 10; round++) {
		philox_round(&c, k0, k1);
		k0 += 0x9e3779b9u;
		k1 += 0xbb67ae85u;
	}
	for (uint32_t l = 0; l < LANES; l++)
		for (uint32_t w = 0; w < 4; w++)
			out[4 * l + w] = (c.w[w][l] >> 8) < d->threshold ? 0.0f : d->scale;
}

void ISA(dropout)(const struct drop *d, uint64_t first, uint32_t n, float *out)
{
	float batch[BATCH];
	uint64_t block = first / 4;
	uint32_t skip = (uint32_t)(first % 4);

	while (n > 0) {
		uint32_t take = BATCH - skip < n ? BATCH - skip : n;
		dropout_batch(d, block, batch);
		memcpy(out, batch + skip, take * sizeof(float));
		out += take;
		n -= take;
		block += LANES;
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
