/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The bodies of det_log and det_sincos without a branch or a call, so that rng.c can run them over arrays and the
 * compiler makes vectors of them; det.c wraps the same text. That is what makes rng_fill_normal equal rng_normal bit
 * for bit. Only + - * / and bit operations on the representation, in the order written.
 *
 * Method and minimax coefficients are those of fdlibm (e_log.c, k_sin.c, k_cos.c, e_rem_pio2.c; Copyright (C) 1993,
 * 2004 by Sun Microsystems, Inc., freely usable), below 1 ulp each.
 */
#ifndef SHARDMESH_BASE_DET_INLINE_H
#define SHARDMESH_BASE_DET_INLINE_H

#include <stdint.h>
#include <string.h>

#define DET_LN2_HI 6.93147180369123816490e-01 /* 32 bits, so that k * DET_LN2_HI is exact */
#define DET_LN2_LO 1.90821492927058770002e-10

static inline uint64_t det_bits(double x)
{
	uint64_t u;

	memcpy(&u, &x, sizeof(u));
	return u;
}

static inline double det_from_bits(uint64_t u)
{
	double x;

	memcpy(&x, &u, sizeof(x));
	return x;
}

/* x = 2^k * m with m in [sqrt(1/2), sqrt(2)); x is positive and normal. */
static inline double det_split(double x, double *m)
{
	/* Adding this carries into the exponent exactly when the fraction is that of sqrt(2) or more. */
	uint64_t u = det_bits(x) + (0x3ff0000000000000u - 0x3fe6a09e667f3bcdu);
	uint64_t biased = u >> 52;

	*m = det_from_bits((u & 0x000fffffffffffffu) + 0x3fe6a09e667f3bcdu);
	/* biased as a double without a conversion, which SSE2 and AVX2 lack for 64-bit lanes: 2^52 + biased, less 2^52. */
	return det_from_bits(0x4330000000000000u | biased) - (4503599627370496.0 + 1023.0);
}

static inline double det_log_inline(double x)
{
	double m, k = det_split(x, &m);
	double f = m - 1.0;
	double s = f / (2.0 + f);
	double z = s * s;
	double w = z * z;
	double even = w * (3.999999999940941908e-01 + w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01));
	double odd = z *
		     (6.666666666666735130e-01 +
		      w * (2.857142874366239149e-01 + w * (1.818357216161805012e-01 + w * 1.479819860511658591e-01)));
	double half = 0.5 * f * f;

	return k * DET_LN2_HI - ((half - (s * (half + (even + odd)) + k * DET_LN2_LO)) - f);
}

/* Rest of a - b that rounding lost (Knuth): a - b = d + rest exactly, for d = a - b rounded. */
static inline double det_diff_rest(double a, double b, double d)
{
	double bb = a - d;

	return (a - (d + bb)) + (bb - b);
}

/* sin and cos of hi + lo, |hi| <= pi/4. */
static inline double det_sin_kernel(double hi, double lo)
{
	double z = hi * hi;
	double w = z * z;
	double r = 8.33333333332248946124e-03 + z * (-1.98412698298579493134e-04 + z * 2.75573137070700676789e-06) +
		   z * w * (-2.50507602534068634195e-08 + z * 1.58969099521155010221e-10);
	double v = z * hi;

	return hi - ((z * (0.5 * lo - v * r) - lo) - v * -1.66666666666666324348e-01);
}

static inline double det_cos_kernel(double hi, double lo)
{
	double z = hi * hi;
	double w = z * z;
	double r =
		z * (4.16666666666666019037e-02 + z * (-1.38888888888741095749e-03 + z * 2.48015872894767294178e-05)) +
		w * w *
			(-2.75573143513906633035e-07 +
			 z * (2.08757232129817482790e-09 + z * -1.13596475577881948265e-11));
	double half = 0.5 * z;
	double one = 1.0 - half;

	return one + (((1.0 - one) - half) + (z * r - hi * lo));
}

/*
 * n = nearest whole number to x / (pi/2); x - n * pi/2 as hi + lo. pi/2 is held in three parts of 33 bits, whose
 * products with n (17 bits) are exact, and a fourth: 150 bits, more than a double below 1e5 can cancel.
 */
static inline uint64_t det_reduce(double x, double *hi, double *lo)
{
	double shifted = x * 6.36619772367581382433e-01 + 6755399441055744.0; /* 1.5 * 2^52: rounds to a whole number */
	double n = shifted - 6755399441055744.0;
	double r0 = x - n * 1.57079632673412561417e+00;
	double w1 = n * 6.07710050630396597660e-11;
	double r1 = r0 - w1;
	double w2 = n * 2.02226624871116645580e-21;
	double r2 = r1 - w2;
	double rest = (det_diff_rest(r0, w1, r1) + det_diff_rest(r1, w2, r2)) - n * 8.47842766036889956997e-32;

	*hi = r2 + rest;
	*lo = (r2 - *hi) + rest;
	return det_bits(shifted);
}

static inline void det_sincos_inline(double x, double *s, double *c)
{
	double hi, lo;
	uint64_t n = det_reduce(x, &hi, &lo);
	uint64_t sine = det_bits(det_sin_kernel(hi, lo));
	uint64_t cosine = det_bits(det_cos_kernel(hi, lo));
	uint64_t odd = 0 - (n & 1); /* in odd quadrants the two change places */
	uint64_t swap = (sine ^ cosine) & odd;

	*s = det_from_bits((sine ^ swap) ^ (n & 2) << 62);
	*c = det_from_bits((cosine ^ swap) ^ ((n + 1) & 2) << 62);
}

#endif
