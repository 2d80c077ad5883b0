/* SPDX-License-Identifier: Apache-2.0 */
/*
 * libm differs between versions and processors in the last bit, and a compiler
 * may contract a * b + c; what is computed here is written into state that has
 * to have the same bits everywhere, so it uses + - * / sqrt alone and is built
 * with -ffp-contract=off. Products that need more than 53 bits are made of
 * Dekker's two-product instead of fma, which not every machine has in hardware.
 */
#include "base/base.h"
#include "base/det_inline.h"

#include <assert.h>

/* An unevaluated sum, |lo| at most half an ulp of hi. */
struct pair {
	double hi, lo;
};

/* a + b for |a| >= |b|, exactly. */
static struct pair fast_two_sum(double a, double b)
{
	double hi = a + b;

	return (struct pair){ hi, b - (hi - a) };
}

/* a * b exactly, while nothing leaves the range of normal numbers. */
static struct pair two_product(double a, double b)
{
	const double splitter = 134217729.0; /* 2^27 + 1 */
	double at = a * splitter, bt = b * splitter;
	double ah = at - (at - a), bh = bt - (bt - b);
	double al = a - ah, bl = b - bh;
	double hi = a * b;

	return (struct pair){ hi, ((ah * bh - hi) + ah * bl + al * bh) + al * bl };
}

static struct pair pair_product(struct pair a, struct pair b)
{
	struct pair p = two_product(a.hi, b.hi);

	return fast_two_sum(p.hi, p.lo + (a.hi * b.lo + a.lo * b.hi));
}

double det_log(double x)
{
	assert(x > 0);
	return det_log_inline(x);
}

void det_sincos(double x, double *s, double *c)
{
	assert(x >= -1e5 && x <= 1e5);
	det_sincos_inline(x, s, c);
}

/* exp(hi + lo) by the method of fdlibm's e_exp.c; |lo| is at most about an ulp of hi. */
static double exp_pair(double hi, double lo)
{
	double shifted = hi * 1.44269504088896338700e+00 + 6755399441055744.0;
	double k = shifted - 6755399441055744.0;
	double a = hi - k * DET_LN2_HI;
	double b = k * DET_LN2_LO - lo;
	double r = a - b;
	double t = r * r;
	double c = r - t * (1.66666666666666019037e-01 +
			    t * (-2.77777777770155933842e-03 +
				 t * (6.61375632143793436117e-05 +
				      t * (-1.65339022054652515390e-06 + t * 4.13813679705723846039e-08))));
	double y = 1.0 - ((b - r * c / (2.0 - c)) - a);

	/* |k| is at most 1011, so 2^k is normal and the product exact. */
	return y * det_from_bits((uint64_t)(1023 + (int64_t)k) << 52);
}

double det_exp(double x)
{
	assert(x > -700 && x < 700);
	return exp_pair(x, 0);
}

/*
 * log(x) to about 70 bits: pow multiplies it by up to 1e3 before exp, which
 * turns that many absolute units into relative ones. log(m) = 2 atanh(s) with
 * s = f / (2 + f); the first two terms of its series in pairs, the rest, below
 * 2^-12 of the whole, in doubles.
 */
static struct pair log_pair(double x)
{
	double m, k = det_split(x, &m);
	double f = m - 1.0;
	struct pair d = fast_two_sum(2.0, f);
	double s0 = f / d.hi;
	struct pair back = two_product(s0, d.hi);
	struct pair s = fast_two_sum(s0, ((f - back.hi) - back.lo - s0 * d.lo) / d.hi);
	struct pair z = pair_product(s, s);
	struct pair cube = pair_product(pair_product(s, z),
					(struct pair){ 0x1.5555555555555p-1, 0x1.5555555555555p-55 });
	double w = z.hi;
	double series = 0;
	struct pair head = fast_two_sum(2.0 * s.hi, cube.hi);
	struct pair whole;
	double low;

	for (int odd = 31; odd >= 5; odd -= 2)
		series = series * w + 2.0 / odd;
	low = head.lo + (2.0 * s.lo + cube.lo + s.hi * w * w * series);
	if (k == 0)
		return fast_two_sum(head.hi, low);
	whole = fast_two_sum(k * DET_LN2_HI, head.hi);
	return fast_two_sum(whole.hi, whole.lo + (k * DET_LN2_LO + low));
}

double det_pow(double x, double y)
{
	struct pair l, p;

	assert(x > 0);
	if (y == 0 || x == 1)
		return 1;
	l = log_pair(x);
	p = two_product(l.hi, y);
	p = fast_two_sum(p.hi, p.lo + l.lo * y);
	assert(p.hi > -700 && p.hi < 700);
	return exp_pair(p.hi, p.lo);
}

/* In pairs, since each squaring doubles the relative error of what it squares. */
double det_pow_u64(double x, uint64_t n)
{
	struct pair result = { 1, 0 }, square = { x, 0 };

	while (n) {
		if (n & 1)
			result = pair_product(result, square);
		n >>= 1;
		if (n)
			square = pair_product(square, square);
	}
	return result.hi + result.lo;
}
