/* SPDX-License-Identifier: Apache-2.0 */
#include "base/base.h"
#include "base/det_inline.h"

#include <assert.h>
#include <math.h>

#define ROUNDS 10

/*
 * Philox4x32-10, as published: two 32 x 32 bit products a round, the key bumped
 * by Weyl constants between rounds. The 64-bit numbers of a job fill key
 * (seed) and counter (index, stream), low word first.
 */
void rng_philox4x32(const uint32_t key[2], const uint32_t ctr[4], uint32_t out[4])
{
	uint32_t k0 = key[0], k1 = key[1];
	uint32_t c0 = ctr[0], c1 = ctr[1], c2 = ctr[2], c3 = ctr[3];

	for (int round = 0; round < ROUNDS; round++) {
		uint64_t p0 = (uint64_t)0xd2511f53u * c0;
		uint64_t p1 = (uint64_t)0xcd9e8d57u * c2;

		c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
		c1 = (uint32_t)p1;
		c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
		c3 = (uint32_t)p0;
		k0 += 0x9e3779b9u;
		k1 += 0xbb67ae85u;
	}
	out[0] = c0;
	out[1] = c1;
	out[2] = c2;
	out[3] = c3;
}

/* The block as two 64-bit numbers. */
static inline void block(uint64_t seed, uint64_t stream, uint64_t i, uint64_t *a, uint64_t *b)
{
	const uint32_t key[2] = { (uint32_t)seed, (uint32_t)(seed >> 32) };
	const uint32_t ctr[4] = { (uint32_t)i, (uint32_t)(i >> 32), (uint32_t)stream, (uint32_t)(stream >> 32) };
	uint32_t out[4];

	rng_philox4x32(key, ctr, out);
	*a = out[0] | (uint64_t)out[1] << 32;
	*b = out[2] | (uint64_t)out[3] << 32;
}

/*
 * (2k + 1) / 2^53 of the high 52 bits: never 0 or 1, and exact. The bits go
 * behind the point of a number in [1, 2), since SSE2 and AVX2 cannot convert
 * 64-bit integers.
 */
static inline double to_uniform(uint64_t bits)
{
	return (det_from_bits(0x3ff0000000000000u | bits >> 12) - 1.0) + 0x1p-53;
}

uint64_t rng_u64(uint64_t seed, uint64_t stream, uint64_t i)
{
	uint64_t a, b;

	block(seed, stream, i, &a, &b);
	return a;
}

double rng_uniform(uint64_t seed, uint64_t stream, uint64_t i)
{
	return to_uniform(rng_u64(seed, stream, i));
}

/* Box-Muller; elements 2p and 2p + 1 come from block p. */
static inline void normal_pair(uint64_t a, uint64_t b, float *even, float *odd)
{
	double radius = sqrt(-2.0 * det_log_inline(to_uniform(a)));
	double s, c;

	det_sincos_inline(6.283185307179586 * to_uniform(b), &s, &c);
	*even = (float)(radius * c);
	*odd = (float)(radius * s);
}

float rng_normal(uint64_t seed, uint64_t stream, uint64_t i)
{
	uint64_t a, b;
	float even, odd;

	block(seed, stream, i / 2, &a, &b);
	normal_pair(a, b, &even, &odd);
	return i & 1 ? odd : even;
}

#define SPAN_PAIRS 128

/* Three loops over arrays rather than one: each is of a shape that compilers make vectors of. */
static void fill_pairs(float *out, uint64_t pairs, uint64_t seed, uint64_t stream, uint64_t first, float mean,
		       float std)
{
	uint64_t a[SPAN_PAIRS], b[SPAN_PAIRS];
	float even[SPAN_PAIRS], odd[SPAN_PAIRS];

	assert(pairs <= SPAN_PAIRS);
	for (uint64_t p = 0; p < pairs; p++)
		block(seed, stream, first + p, &a[p], &b[p]);
	for (uint64_t p = 0; p < pairs; p++)
		normal_pair(a[p], b[p], &even[p], &odd[p]);
	for (uint64_t p = 0; p < pairs; p++) {
		out[2 * p] = mean + std * even[p];
		out[2 * p + 1] = mean + std * odd[p];
	}
}

void rng_fill_normal(float *out, uint64_t n, uint64_t seed, uint64_t stream, uint64_t first, float mean, float std)
{
	if (n > 0 && (first & 1)) {
		*out++ = mean + std * rng_normal(seed, stream, first);
		first++;
		n--;
	}
	while (n > 1) {
		uint64_t pairs = n / 2 < SPAN_PAIRS ? n / 2 : SPAN_PAIRS;

		fill_pairs(out, pairs, seed, stream, first / 2, mean, std);
		out += 2 * pairs;
		first += 2 * pairs;
		n -= 2 * pairs;
	}
	if (n > 0)
		*out = mean + std * rng_normal(seed, stream, first);
}

/*
 * A balanced Feistel network over the smallest even number of bits that holds
 * n, its round function Philox: a permutation of a power of four below 4n.
 * Walking until the value falls below n makes it one of 0..n-1, with less than
 * four rounds of it on average. The second counter word keeps these blocks
 * apart from those of rng_u64 on the same stream.
 */
#define FEISTEL_ROUNDS 8
#define FEISTEL_DOMAIN 0x46454953u

static uint64_t feistel(uint64_t seed, uint64_t stream, unsigned half_bits, uint64_t v)
{
	const uint32_t key[2] = { (uint32_t)seed, (uint32_t)(seed >> 32) };
	uint64_t mask = ((uint64_t)1 << half_bits) - 1;
	uint64_t left = v >> half_bits, right = v & mask;

	for (uint32_t round = 0; round < FEISTEL_ROUNDS; round++) {
		const uint32_t ctr[4] = { (uint32_t)right, FEISTEL_DOMAIN + round, (uint32_t)stream,
					  (uint32_t)(stream >> 32) };
		uint32_t out[4];
		uint64_t next;

		rng_philox4x32(key, ctr, out);
		next = left ^ (out[0] & mask);
		left = right;
		right = next;
	}
	return left << half_bits | right;
}

uint64_t rng_permute(uint64_t seed, uint64_t stream, uint64_t n, uint64_t i)
{
	unsigned bits, half_bits;

	assert(n >= 1 && i < n);
	bits = n > 1 ? 64 - (unsigned)__builtin_clzll(n - 1) : 1;
	half_bits = (bits + 1) / 2;
	do
		i = feistel(seed, stream, half_bits, i);
	while (i >= n);
	return i;
}
