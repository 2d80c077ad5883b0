/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A 512-bit unsigned fixed-point number with 240 bits behind the point. Integer
 * addition is associative and commutative, so the sum does not depend on who
 * added what in which order. The largest double is below 2^1024, far above the
 * 2^272 that fits: a square sum that large means the job has diverged, so it is
 * treated like an infinity, as is a carry out of the top.
 */
#include "base/base.h"

#include <math.h>
#include <string.h>

#define TOP_BIT (EXACT_SUM_WORDS * 64)

void exact_sum_clear(struct exact_sum *s)
{
	memset(s, 0, sizeof(*s));
}

/* Adds v * 2^(64 * at). */
static void add_word(struct exact_sum *s, unsigned at, uint64_t v)
{
	while (v && at < EXACT_SUM_WORDS) {
		s->w[at] += v;
		v = s->w[at] < v;
		at++;
	}
	if (v)
		s->non_finite = 1;
}

void exact_sum_add(struct exact_sum *s, double x)
{
	int exponent, at;
	uint64_t mantissa;

	if (!(x >= 0) || isinf(x)) {
		s->non_finite = 1;
		return;
	}
	if (x == 0)
		return;
	/* x = mantissa * 2^exponent with 53 bits of mantissa */
	mantissa = (uint64_t)ldexp(frexp(x, &exponent), 53);
	at = exponent - 53 + EXACT_SUM_FRACTION_BITS;
	if (at <= -53)
		return;
	if (at < 0) {
		mantissa >>= -at;
		at = 0;
	}
	if (exponent + EXACT_SUM_FRACTION_BITS > TOP_BIT) {
		s->non_finite = 1;
		return;
	}
	add_word(s, (unsigned)at / 64, mantissa << (at % 64));
	if (at % 64 > 11)
		add_word(s, (unsigned)at / 64 + 1, mantissa >> (64 - at % 64));
}

void exact_sum_merge(struct exact_sum *into, const struct exact_sum *from)
{
	for (unsigned i = 0; i < EXACT_SUM_WORDS; i++)
		add_word(into, i, from->w[i]);
	into->non_finite |= from->non_finite;
}

double exact_sum_value(const struct exact_sum *s)
{
	int top = EXACT_SUM_WORDS - 1;
	uint64_t high, low;
	unsigned shift;

	if (s->non_finite)
		return INFINITY;
	while (top > 0 && !s->w[top])
		top--;
	if (!s->w[top])
		return 0;
	/* The 64 bits from the highest set one on, then cut to 53. */
	high = s->w[top];
	low = top > 0 ? s->w[top - 1] : 0;
	shift = (unsigned)__builtin_clzll(high);
	if (shift)
		high = high << shift | low >> (64 - shift);
	return ldexp((double)(high >> 11), top * 64 + 11 - (int)shift - EXACT_SUM_FRACTION_BITS);
}
