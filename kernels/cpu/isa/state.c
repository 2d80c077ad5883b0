/* SPDX-License-Identifier: Apache-2.0 */
/* The arithmetic of state: a written order of + - * / sqrt, one pass over memory. */
#include "kernels/cpu/isa/isa.h"
#include "kernels/cpu/isa/vec.h"

/* Memory comes in a kilobyte ahead: the hardware's own prefetcher is late with four streams. */
#define AHEAD 256 /* floats */

struct lanes16d {
	vd v[2 * VH];
};

static inline void add_squares(struct lanes16d *sq, int h, vf x)
{
	union {
		vf whole;
		vf_half half[2];
	} u = { .whole = x };
	vd lo = __builtin_convertvector(u.half[0], vd), hi = __builtin_convertvector(u.half[1], vd);
	sq->v[2 * h] = vd_fma_exact(lo, lo, sq->v[2 * h]);
	sq->v[2 * h + 1] = vd_fma_exact(hi, hi, sq->v[2 * h + 1]);
}

static double lanes16d_sum(const struct lanes16d *sq)
{
	double l[16];
	memcpy(l, sq->v, sizeof(l));
	for (int w = 8; w > 0; w /= 2)
		for (int i = 0; i < w; i++)
			l[i] += l[i + w];
	return l[0];
}

void ISA(zero_past)(float *dst, uint64_t n)
{
	uint64_t i = 0;

	for (; i < n && (uintptr_t)(dst + i) % sizeof(vf); i++)
		dst[i] = 0.0f;
	for (; i + VF <= n; i += VF)
		vf_stream(dst + i, vf_set(0.0f));
	for (; i < n; i++)
		dst[i] = 0.0f;
	vf_stream_end();
}

enum fold_store { FOLD_KEEP, FOLD_STORE, FOLD_STREAM };

static inline __attribute__((always_inline)) void fold_chunk(float *dst, const float *a, const float *b,
							     enum fold_store store, struct lanes16d *sq)
{
	for (uint32_t i = 0; i < K_CHUNK; i += 16) {
		__builtin_prefetch(a + i + AHEAD);
		if (b)
			__builtin_prefetch(b + i + AHEAD);
		for (int h = 0; h < VH; h++) {
			uint32_t j = i + (uint32_t)h * VF;
			vf v = vf_load(a + j);
			if (b)
				v += vf_load(b + j);
			if (store == FOLD_STORE)
				vf_store(dst + j, v);
			else if (store == FOLD_STREAM)
				vf_stream(dst + j, v);
			if (sq)
				add_squares(sq, h, v);
		}
	}
}

/* One chunk; its shape is picked here, once, and not in the loop. */
static void fold_pick(float *dst, const float *a, const float *b, enum fold_store store, struct lanes16d *sq)
{
	if (store == FOLD_STREAM)
		b ? fold_chunk(dst, a, b, FOLD_STREAM, sq) : fold_chunk(dst, a, NULL, FOLD_STREAM, sq);
	else if (store == FOLD_STORE)
		b ? fold_chunk(dst, a, b, FOLD_STORE, sq) : fold_chunk(dst, a, NULL, FOLD_STORE, sq);
	else
		fold_chunk(dst, a, NULL, FOLD_KEEP, sq);
}

/*
 * A sum that goes elsewhere is streamed: it is not needed before the next
 * contribution comes, and reading its old bytes into the cache would be a third
 * of the traffic.
 */
static enum fold_store fold_store_of(const float *dst, const float *a, const float *b)
{
	if (dst == a && !b)
		return FOLD_KEEP;
	return dst == a || dst == b || (uintptr_t)dst % sizeof(vf) ? FOLD_STORE : FOLD_STREAM;
}

void ISA(fold)(float *dst, const float *a, const float *b, uint64_t n, struct exact_sum *sum)
{
	const enum fold_store store = fold_store_of(dst, a, b);

	if (store == FOLD_KEEP && !sum)
		return;
	for (uint64_t at = 0; at < n; at += K_CHUNK) {
		struct lanes16d sq = { 0 };
		fold_pick(dst + at, a + at, b ? b + at : NULL, store, sum ? &sq : NULL);
		if (sum)
			exact_sum_add(sum, lanes16d_sum(&sq));
	}
	if (store == FOLD_STREAM)
		vf_stream_end();
}

static inline __attribute__((always_inline)) void adam_part(float *p, float *m, float *v, const float *grad,
							    const struct adam_scalars *c, bool decoupled)
{
	vf x = vf_load(p), g = vf_load(grad) * vf_set(c->grad_scale);

	if (!decoupled)
		g = g + vf_set(c->decay) * x;
	vf mt = vf_set(c->beta1) * vf_load(m) + vf_set(c->one_minus_beta1) * g;
	vf vt = vf_set(c->beta2) * vf_load(v) + vf_set(c->one_minus_beta2) * g * g;
	if (decoupled)
		x = x - vf_set(c->decay) * x;
	x = x - vf_set(c->step) * mt / (vf_sqrt(vt) / vf_set(c->root_bias2) + vf_set(c->eps));
	vf_store(p, x);
	vf_store(m, mt);
	vf_store(v, vt);
}

static inline __attribute__((always_inline)) void adam_all(float *p, float *m, float *v, const float *g, uint64_t n,
							   const struct adam_scalars *c, bool decoupled)
{
	for (uint64_t i = 0; i < n; i += 16) {
		__builtin_prefetch(p + i + AHEAD, 1);
		__builtin_prefetch(m + i + AHEAD, 1);
		__builtin_prefetch(v + i + AHEAD, 1);
		__builtin_prefetch(g + i + AHEAD, 0);
		for (int h = 0; h < VH; h++)
			adam_part(p + i + h * VF, m + i + h * VF, v + i + h * VF, g + i + h * VF, c, decoupled);
	}
}

void ISA(adam)(float *p, float *m, float *v, const float *g, uint64_t n, const struct adam_scalars *c)
{
	if (c->decoupled)
		adam_all(p, m, v, g, n, c, true);
	else
		adam_all(p, m, v, g, n, c, false);
}
