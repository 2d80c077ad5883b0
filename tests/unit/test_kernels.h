/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the tests of kernels/ share: a stream with its workspace, reproducible
 * inputs, comparison with references in double, and finite differences. A
 * reference is a forward pass in double; a backward pass is checked against
 * central differences of it, which are good to about 1e-8 there.
 */
#ifndef SHARDMESH_TEST_KERNELS_H
#define SHARDMESH_TEST_KERNELS_H

#include <errno.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "kernels/kernels.h"

struct fixture {
	const struct k_ops *ops;
	struct k_stream *s;
	struct k_profile profile;
	void *workspace;
};

static inline void *test_alloc(size_t bytes)
{
	void *p = aligned_alloc(64, round_up_u64(bytes ? bytes : 1, 64));
	assert_non_null(p);
	memset(p, 0xff, round_up_u64(bytes ? bytes : 1, 64)); /* not a number, wherever it is read unwritten */
	return p;
}

static inline float *test_floats(size_t n)
{
	return test_alloc(n * sizeof(float));
}

/* False when this machine cannot run `want`. */
static inline bool fixture_open(struct fixture *f, const struct k_ops *ops, const char *want, unsigned threads,
				const struct k_dims *dims)
{
	struct err e = { 0 };
	size_t bytes = ops->workspace_bytes(dims, threads);

	f->ops = ops;
	if (k_profile_detect(want, &f->profile, NULL, &e) == -ENOTSUP)
		return false;
	f->workspace = test_alloc(bytes);
	const struct k_stream_config cfg = { &f->profile, threads, f->workspace, bytes };
	if (ops->stream_open(&cfg, &f->s, &e))
		fail_msg("%s", e.text);
	return true;
}

static inline void fixture_wait(struct fixture *f)
{
	struct k_event ev;
	f->ops->event_record(f->s, &ev);
	f->ops->event_wait(f->s, &ev);
	assert_true(f->ops->event_done(f->s, &ev));
	assert_int_equal(f->ops->stream_error(f->s), 0);
}

static inline void fixture_close(struct fixture *f)
{
	f->ops->stream_close(f->s);
	free(f->workspace);
}

/* Uniform in (-size, size). */
static inline float *test_random(size_t n, uint64_t stream, double size)
{
	float *x = test_floats(n);
	for (size_t i = 0; i < n; i++)
		x[i] = (float)((2.0 * rng_uniform(7, stream, i) - 1.0) * size);
	return x;
}

static inline double *test_doubles(const float *x, size_t n)
{
	double *d = test_alloc(n * sizeof(double));
	for (size_t i = 0; i < n; i++)
		d[i] = x[i];
	return d;
}

static inline void assert_near_size(const char *what, const float *got, const double *want, size_t n, double size,
				    double tolerance)
{
	for (size_t i = 0; i < n; i++)
		if (!(fabs(got[i] - want[i]) <= tolerance * size))
			fail_msg("%s[%zu]: got %.9g, want %.9g (size %.3g)", what, i, got[i], want[i], size);
}

/* Every element to tolerance times the largest magnitude. */
static inline void assert_near(const char *what, const float *got, const double *want, size_t n, double tolerance)
{
	double size = 1e-30;
	for (size_t i = 0; i < n; i++)
		size = fabs(want[i]) > size ? fabs(want[i]) : size;
	assert_near_size(what, got, want, n, size, tolerance);
}

static inline void assert_bits(const char *what, const void *a, const void *b, size_t bytes)
{
	const uint8_t *x = a, *y = b;
	if (memcmp(a, b, bytes) == 0)
		return;
	for (size_t i = 0; i < bytes; i++)
		if (x[i] != y[i])
			fail_msg("%s: bits differ at byte %zu of %zu", what, i, bytes);
}

/* As test_floats left them. */
static inline void assert_unwritten(const float *p, size_t n)
{
	for (size_t i = 0; i < n * sizeof(float); i++)
		assert_int_equal(((const uint8_t *)p)[i], 0xff);
}

/*
 * grad[n] against central differences of loss(ctx) in the double variables x[n], at no more than
 * `samples` places, to tolerance times the gradient's largest magnitude.
 */
static inline void assert_gradient(const char *what, const float *grad, double *x, size_t n, double (*loss)(void *ctx),
				   void *ctx, size_t samples, double tolerance)
{
	const double h = 1e-5;
	size_t step = n > samples ? n / samples : 1;
	double size = 1e-3;

	for (size_t i = 0; i < n; i++)
		size = fabs(grad[i]) > size ? fabs(grad[i]) : size;
	for (size_t i = 0; i < n; i += step) {
		double at = x[i];
		x[i] = at + h;
		double up = loss(ctx);
		x[i] = at - h;
		double down = loss(ctx);
		x[i] = at;
		double want = (up - down) / (2.0 * h);
		if (!(fabs(grad[i] - want) <= tolerance * size))
			fail_msg("%s[%zu]: got %.9g, differences say %.9g (size %.3g)", what, i, grad[i], want, size);
	}
}

/* The multiplier that the contract gives element i of micro-batch mb. */
static inline double dropout_factor(const struct k_dropout *d, uint32_t mb, uint64_t i)
{
	if (d->rate == 0.0f)
		return 1.0;
	const uint32_t key[2] = { (uint32_t)d->seed, (uint32_t)(d->seed >> 32) };
	const uint32_t ctr[4] = { (uint32_t)(i / 4), (uint32_t)(i / 4 >> 32), (uint32_t)d->stream[mb],
				  (uint32_t)(d->stream[mb] >> 32) };
	uint32_t w[4];
	rng_philox4x32(key, ctr, w);
	return (w[i % 4] >> 8) * 0x1p-24 < (double)d->rate ? 0.0 : 1.0 / (1.0 - (double)d->rate);
}

/* leaf[i] of n leaves of `size` floats, summed along the contract's tree into leaf[0]. */
static inline void test_tree(float *leaf, uint32_t n, size_t size)
{
	uint32_t left = 1;
	if (n == 1)
		return;
	while (2 * left < n)
		left *= 2;
	test_tree(leaf, left, size);
	test_tree(leaf + left * size, n - left, size);
	for (size_t i = 0; i < size; i++)
		leaf[i] += leaf[left * size + i];
}

/* Every library that may be here, the own one on every instruction set. */
static const char *const test_profiles[] = { "", "portable", "portable:avx2", "portable:portable", "dnnl", "openblas" };

#endif
