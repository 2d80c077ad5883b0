/* SPDX-License-Identifier: Apache-2.0 */
/* LayerNorm, the residual stream, dropout. */
#include "tests/unit/test_kernels.h"

static const uint64_t streams[] = { 11, 1ull << 40, 5, 99, 3 };

struct norm_case {
	uint32_t n_mb, rows, cols;
	float rate;
	bool branch, residual;
};

static const struct norm_case cases[] = {
	{ 1, 1, 1, 0.0f, false, false }, { 3, 5, 37, 0.25f, true, true },  { 2, 50, 768, 0.1f, true, false },
	{ 5, 9, 100, 0.0f, true, true }, { 2, 33, 80, 0.0f, false, true },
};

struct norm_data {
	const struct norm_case *c;
	struct k_dropout dropout;
	size_t n;
	double *x, *branch, *gamma, *beta, *w, *w_sum;
};

/* The sum of w y, plus w_sum times the normalised input where a residual goes on; y to *y where asked. */
static double norm_reference(const struct norm_data *d, double *y, double *sum)
{
	const struct norm_case *c = d->c;
	double loss = 0.0;

	for (size_t r = 0; r < (size_t)c->n_mb * c->rows; r++) {
		double row[1024], mean = 0.0, var = 0.0;
		for (uint32_t i = 0; i < c->cols; i++) {
			uint64_t at = r * c->cols + i, in_mb = r % c->rows * c->cols + i;
			row[i] = d->x[at];
			if (c->branch)
				row[i] += dropout_factor(&d->dropout, (uint32_t)(r / c->rows), in_mb) * d->branch[at];
			mean += row[i] / c->cols;
		}
		for (uint32_t i = 0; i < c->cols; i++)
			var += (row[i] - mean) * (row[i] - mean) / c->cols;
		for (uint32_t i = 0; i < c->cols; i++) {
			size_t at = r * c->cols + i;
			double v = (row[i] - mean) / sqrt(var + 1e-5) * d->gamma[i] + d->beta[i];
			loss += d->w[at] * v + (c->residual ? d->w_sum[at] * row[i] : 0.0);
			if (y) {
				y[at] = v;
				sum[at] = row[i];
			}
		}
	}
	return loss;
}

static double norm_loss(void *ctx)
{
	return norm_reference(ctx, NULL, NULL);
}

static void check_case(const struct norm_case *c)
{
	const struct k_dims dims = { .n_mb = c->n_mb, .batch = 1, .seq = c->rows, .channels = c->cols };
	const size_t n = (size_t)c->n_mb * c->rows * c->cols, rows = (size_t)c->n_mb * c->rows;
	float *x = test_random(n, 1, 2.0), *branch = test_random(n, 2, 2.0), *gamma = test_random(c->cols, 3, 1.5);
	float *beta = test_random(c->cols, 4, 1.0), *dy = test_random(n, 5, 1.0), *dres = test_random(n, 6, 1.0);
	float *sum = test_floats(n), *y = test_floats(n), *mean = test_floats(rows), *rstd = test_floats(rows);
	float *dx = test_floats(n), *dgamma = test_floats(c->cols), *dbeta = test_floats(c->cols);
	double *want_y = test_alloc(n * sizeof(double)), *want_sum = test_alloc(n * sizeof(double));
	struct norm_data d = { c,
			       { c->rate, 77, streams },
			       n,
			       test_doubles(x, n),
			       test_doubles(branch, n),
			       test_doubles(gamma, c->cols),
			       test_doubles(beta, c->cols),
			       test_doubles(dy, n),
			       test_doubles(dres, n) };
	struct fixture f;

	assert_true(fixture_open(&f, k_cpu_ops(), "", 2, &dims));
	const struct k_norm fwd = { .n_mb = c->n_mb,
				    .rows = c->rows,
				    .cols = c->cols,
				    .eps = 1e-5f,
				    .x = x,
				    .branch = c->branch ? branch : NULL,
				    .dropout = d.dropout,
				    .sum = c->branch ? sum : NULL,
				    .gamma = gamma,
				    .beta = beta,
				    .y = y,
				    .mean = mean,
				    .rstd = rstd };
	const struct k_norm_backward bwd = { .n_mb = c->n_mb,
					     .rows = c->rows,
					     .cols = c->cols,
					     .x = c->branch ? sum : x,
					     .mean = mean,
					     .rstd = rstd,
					     .gamma = gamma,
					     .dy = dy,
					     .dresidual = c->residual ? dx : NULL,
					     .dx = dx,
					     .dgamma = dgamma,
					     .dbeta = dbeta };
	f.ops->norm(f.s, &fwd);
	f.ops->copy(f.s, dx, dres, n * sizeof(float)); /* dx aliases dresidual */
	f.ops->norm_backward(f.s, &bwd);
	fixture_wait(&f);
	norm_reference(&d, want_y, want_sum);
	assert_near("y", y, want_y, n, 2e-6);
	if (c->branch)
		assert_near("sum", sum, want_sum, n, 1e-6);
	if (c->cols > 1) {
		/* The gradient in x is the gradient in the normalised input. */
		assert_gradient("dx", dx, d.x, n, norm_loss, &d, 100, 2e-5);
		assert_gradient("dgamma", dgamma, d.gamma, c->cols, norm_loss, &d, 40, 1e-5);
	}
	assert_gradient("dbeta", dbeta, d.beta, c->cols, norm_loss, &d, 40, 1e-5);
	fixture_close(&f);
	float *const floats[] = { x, branch, gamma, beta, dy, dres, sum, y, mean, rstd, dx, dgamma, dbeta };
	double *const doubles[] = { want_y, want_sum, d.x, d.branch, d.gamma, d.beta, d.w, d.w_sum };
	for (size_t i = 0; i < ARRAY_LEN(floats); i++)
		free(floats[i]);
	for (size_t i = 0; i < ARRAY_LEN(doubles); i++)
		free(doubles[i]);
}

static void norm_matches_reference_and_differences(void **state)
{
	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(cases); i++)
		check_case(&cases[i]);
}

static void span_is_the_tree_of_its_leaves(void **state)
{
	(void)state;
	for (uint32_t n_mb = 1; n_mb <= 9; n_mb++) {
		const uint32_t rows = 7, cols = 150;
		const struct k_dims dims = { .n_mb = n_mb, .batch = 1, .seq = rows, .channels = cols };
		const size_t one = (size_t)rows * cols, n = n_mb * one;
		float *x = test_random(n, 1, 2.0), *mean = test_random(n_mb * rows, 2, 1.0),
		      *dy = test_random(n, 4, 1.0);
		float *rstd = test_random(n_mb * rows, 3, 1.0), *gamma = test_random(cols, 5, 1.0),
		      *dx = test_floats(n);
		float *span = test_floats(2 * cols), *leaves = test_floats(2 * cols * n_mb);
		struct fixture f;

		assert_true(fixture_open(&f, k_cpu_ops(), "", 3, &dims));
		const struct k_norm_backward all = { .n_mb = n_mb,
						     .rows = rows,
						     .cols = cols,
						     .x = x,
						     .mean = mean,
						     .rstd = rstd,
						     .gamma = gamma,
						     .dy = dy,
						     .dx = dx,
						     .dgamma = span,
						     .dbeta = span + cols };
		f.ops->norm_backward(f.s, &all);
		for (uint32_t k = 0; k < n_mb; k++) {
			struct k_norm_backward leaf = all;
			leaf.n_mb = 1;
			leaf.x = x + k * one;
			leaf.dy = dy + k * one;
			leaf.dx = dx + k * one;
			leaf.mean = mean + k * rows;
			leaf.rstd = rstd + k * rows;
			leaf.dgamma = leaves + (size_t)k * 2 * cols;
			leaf.dbeta = leaf.dgamma + cols;
			f.ops->norm_backward(f.s, &leaf);
		}
		fixture_wait(&f);
		test_tree(leaves, n_mb, 2 * cols);
		assert_bits("dgamma and dbeta", leaves, span, 2 * cols * sizeof(float));
		fixture_close(&f);
		float *const all_floats[] = { x, mean, dy, rstd, gamma, dx, span, leaves };
		for (size_t i = 0; i < ARRAY_LEN(all_floats); i++)
			free(all_floats[i]);
	}
}

/* The mask is the contract's, element by element; its rate is what was asked for; backward applies the same one. */
static void dropout_is_the_contracts(void **state)
{
	const uint32_t n_mb = 3, rows = 61, cols = 333;
	const struct k_dims dims = { .n_mb = n_mb, .batch = 1, .seq = rows, .channels = cols };
	const size_t one = (size_t)rows * cols, n = n_mb * one;
	float *ones = test_floats(n), *x = test_random(n, 1, 1.0), *mask = test_floats(n), *sum = test_floats(n);
	struct fixture f;
	size_t dropped = 0;
	(void)state;

	for (size_t i = 0; i < n; i++)
		ones[i] = 1.0f;
	assert_true(fixture_open(&f, k_cpu_ops(), "", 2, &dims));
	const struct k_dropout dropout = { 0.3f, 0x123456789abcdefull, streams };
	struct k_residual a = { n_mb, rows, cols, NULL, ones, mask, dropout };
	f.ops->residual(f.s, &a);
	a.x = x;
	a.out = sum;
	f.ops->residual(f.s, &a);
	fixture_wait(&f);
	for (size_t i = 0; i < n; i++) {
		float want = (float)dropout_factor(&dropout, (uint32_t)(i / one), i % one);
		assert_near_size("mask", &mask[i], &(double){ (double)want }, 1, 1.0, 1e-7);
		assert_true(sum[i] == x[i] + mask[i]);
		dropped += mask[i] == 0.0f;
	}
	/* 6 standard deviations. */
	assert_true(fabs((double)dropped / (double)n - 0.3) < 6.0 * sqrt(0.3 * 0.7 / (double)n));
	a.dropout.rate = 0.0f;
	a.dropout.stream = NULL;
	f.ops->residual(f.s, &a);
	fixture_wait(&f);
	for (size_t i = 0; i < n; i++)
		assert_true(sum[i] == x[i] + 1.0f);
	fixture_close(&f);
	free(ones);
	free(x);
	free(mask);
	free(sum);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(norm_matches_reference_and_differences),
		cmocka_unit_test(span_is_the_tree_of_its_leaves),
		cmocka_unit_test(dropout_is_the_contracts),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
