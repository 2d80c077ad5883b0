/* SPDX-License-Identifier: Apache-2.0 */
/* Rotary position embedding of one row of heads, and its inverse. */
#include "kernels/cpu/isa/isa.h"
#include "kernels/cpu/isa/vec.h"

#define INLINE static inline __attribute__((always_inline))

INLINE vf load_upto(const float *p, uint32_t left)
{
	return left >= VF ? vf_load(p) : vf_load_n(p, left, 0.0f);
}

INLINE void store_upto(float *p, vf v, uint32_t left)
{
	if (left >= VF)
		vf_store(p, v);
	else
		vf_store_n(p, v, left);
}

/* Elements i and half + i, by +angle or -angle. */
INLINE void turn_head(const struct turn *t, const float *x, float *out)
{
	const uint32_t half = t->rot / 2;

	for (uint32_t i = 0; i < half; i += VF) {
		const uint32_t left = half - i;
		vf c = load_upto(t->cos + i, left), s = load_upto(t->sin + i, left);
		vf a = load_upto(x + i, left), b = load_upto(x + half + i, left);
		if (t->back)
			s = -s;
		store_upto(out + i, a * c - b * s, left);
		store_upto(out + half + i, b * c + a * s, left);
	}
}

void ISA(rotary_row)(const struct turn *t)
{
	const float *x = t->x;
	float *out = t->out;

	for (uint32_t h = 0; h < t->heads; h++, x += t->head_dim, out += t->head_dim) {
		turn_head(t, x, out);
		if (out != x)
			memcpy(out + t->rot, x + t->rot, (t->head_dim - t->rot) * sizeof(float));
	}
}
