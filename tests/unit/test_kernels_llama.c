/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the Llama family adds: RMSNorm, data gradients that add, rotary positions
 * with or without a norm of each head, gated linear units.
 */
#include "tests/unit/test_kernels.h"

static const uint64_t streams[] = { 11, 1ull << 40, 5, 99, 3 };

/* Freed together. */
struct bag {
	void *p[64];
	size_t n;
};

static void *keep(struct bag *b, void *p)
{
	assert_true(b->n < ARRAY_LEN(b->p));
	b->p[b->n++] = p;
	return p;
}

static void bag_empty(struct bag *b)
{
	while (b->n > 0)
		free(b->p[--b->n]);
}

static float *outputs(struct bag *b, size_t n)
{
	return keep(b, test_floats(n));
}

static float *inputs(struct bag *b, size_t n, uint64_t stream, double size)
{
	return keep(b, test_random(n, stream, size));
}

static double *doubles(struct bag *b, const float *x, size_t n)
{
	return keep(b, test_doubles(x, n));
}

/* ------------------------------------------------------------------ RMSNorm */

struct rms {
	uint32_t n_mb, rows, cols;
	float rate;
	bool branch, residual;
	struct k_dropout dropout;
	double *x, *b, *gamma, *w, *w_sum;
};

static double rms_reference(const struct rms *d, double *y)
{
	double loss = 0.0;

	for (size_t r = 0; r < (size_t)d->n_mb * d->rows; r++) {
		double row[1024], squares = 0.0;
		for (uint32_t i = 0; i < d->cols; i++) {
			uint64_t at = r * d->cols + i, in_mb = r % d->rows * d->cols + i;
			row[i] = d->x[at];
			if (d->branch)
				row[i] += dropout_factor(&d->dropout, (uint32_t)(r / d->rows), in_mb) * d->b[at];
			squares += row[i] * row[i] / d->cols;
		}
		for (uint32_t i = 0; i < d->cols; i++) {
			size_t at = r * d->cols + i;
			double v = row[i] / sqrt(squares + 1e-5) * d->gamma[i];
			loss += d->w[at] * v + (d->residual ? d->w_sum[at] * row[i] : 0.0);
			if (y)
				y[at] = v;
		}
	}
	return loss;
}

static double rms_loss(void *ctx)
{
	return rms_reference(ctx, NULL);
}

static void check_rms(struct rms *d)
{
	const struct k_dims dims = { .n_mb = d->n_mb, .batch = 1, .seq = d->rows, .channels = d->cols };
	const size_t rows = (size_t)d->n_mb * d->rows, n = rows * d->cols;
	struct bag bag = { 0 };
	float *x = inputs(&bag, n, 1, 2.0), *branch = inputs(&bag, n, 2, 2.0), *gamma = inputs(&bag, d->cols, 3, 1.5);
	float *dy = inputs(&bag, n, 5, 1.0), *dres = inputs(&bag, n, 6, 1.0), *sum = outputs(&bag, n);
	float *y = outputs(&bag, n), *rstd = outputs(&bag, rows), *mean = outputs(&bag, rows), *dx = outputs(&bag, n);
	float *dgamma = outputs(&bag, d->cols), *dbeta = outputs(&bag, d->cols);
	double *want = keep(&bag, test_alloc(n * sizeof(double)));
	struct fixture f;

	d->dropout = (struct k_dropout){ d->rate, 77, streams };
	d->x = doubles(&bag, x, n);
	d->b = doubles(&bag, branch, n);
	d->gamma = doubles(&bag, gamma, d->cols);
	d->w = doubles(&bag, dy, n);
	d->w_sum = doubles(&bag, dres, n);
	assert_true(fixture_open(&f, k_cpu_ops(), "", 2, &dims));
	const struct k_norm fwd = { .n_mb = d->n_mb,
				    .rows = d->rows,
				    .cols = d->cols,
				    .eps = 1e-5f,
				    .rms = true,
				    .x = x,
				    .branch = d->branch ? branch : NULL,
				    .dropout = d->dropout,
				    .sum = d->branch ? sum : NULL,
				    .gamma = gamma,
				    .y = y,
				    .mean = mean,
				    .rstd = rstd };
	const struct k_norm_backward bwd = { .n_mb = d->n_mb,
					     .rows = d->rows,
					     .cols = d->cols,
					     .rms = true,
					     .x = d->branch ? sum : x,
					     .rstd = rstd,
					     .gamma = gamma,
					     .dy = dy,
					     .dresidual = d->residual ? dx : NULL,
					     .dx = dx,
					     .dgamma = dgamma,
					     .dbeta = dbeta };
	f.ops->norm(f.s, &fwd);
	f.ops->copy(f.s, dx, dres, n * sizeof(float)); /* dx aliases dresidual */
	f.ops->norm_backward(f.s, &bwd);
	fixture_wait(&f);
	rms_reference(d, want);
	assert_near("y", y, want, n, 2e-6);
	assert_gradient("dx", dx, d->x, n, rms_loss, d, 100, 2e-5);
	assert_gradient("dgamma", dgamma, d->gamma, d->cols, rms_loss, d, 40, 1e-5);
	assert_unwritten(mean, rows);
	assert_unwritten(dbeta, d->cols);
	fixture_close(&f);
	bag_empty(&bag);
}

static void rms_norm_matches_reference_and_differences(void **state)
{
	struct rms cases[] = {
		{ .n_mb = 1, .rows = 2, .cols = 3 },
		{ .n_mb = 3, .rows = 5, .cols = 37, .rate = 0.25f, .branch = true, .residual = true },
		{ .n_mb = 2, .rows = 33, .cols = 80, .residual = true },
		{ .n_mb = 5, .rows = 9, .cols = 1001, .branch = true },
	};
	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(cases); i++)
		check_rms(&cases[i]);
}

/* ------------------------------------------------- data gradients that add */

static void check_dx_add(const char *profile, bool w_out_in, unsigned *ran)
{
	const uint32_t n_mb = 3, rows = 30, in = 130, out = 600;
	const struct k_dims dims = { .n_mb = n_mb, .batch = 1, .seq = rows, .channels = in, .ffn = out };
	const size_t nx = (size_t)n_mb * rows * in, ny = (size_t)n_mb * rows * out, nw = (size_t)in * out;
	struct bag bag = { 0 };
	float *x = inputs(&bag, nx, 1, 1.0), *w = inputs(&bag, nw, 2, 1.0), *dy = inputs(&bag, ny, 3, 1.0);
	float *before = inputs(&bag, nx, 4, 20.0), *dx = outputs(&bag, nx), *alone = outputs(&bag, nx);
	float *dw[] = { outputs(&bag, nw), outputs(&bag, nw) };
	double *want = doubles(&bag, before, nx);
	struct fixture f;

	if (fixture_open(&f, k_cpu_ops(), profile, 2, &dims)) {
		struct k_linear_backward a = { .n_mb = n_mb,
					       .rows = rows,
					       .in = in,
					       .out = out,
					       .w_out_in = w_out_in,
					       .x = x,
					       .w = w,
					       .dy = dy,
					       .dx = alone,
					       .dw = dw[0] };
		f.ops->linear_backward(f.s, &a);
		f.ops->copy(f.s, dx, before, nx * sizeof(float));
		a.dx_add = true;
		a.dx = dx;
		a.dw = dw[1];
		f.ops->linear_backward(f.s, &a);
		fixture_wait(&f);
		fixture_close(&f);
		for (size_t i = 0; i < nx; i++)
			for (uint32_t o = 0; o < out; o++)
				want[i] += (double)dy[i / in * out + o] *
					   (double)w[w_out_in ? o * in + i % in : i % in * out + o];
		assert_near("dx added", dx, want, nx, 2e-6);
		for (size_t i = 0; i < nx; i++)
			want[i] -= before[i];
		assert_near("dx alone", alone, want, nx, 2e-6);
		assert_bits("dw", dw[0], dw[1], nw * sizeof(float));
		++*ran;
	}
	bag_empty(&bag);
}

static void data_gradients_add(void **state)
{
	unsigned ran = 0;
	(void)state;
	for (size_t p = 0; p < ARRAY_LEN(test_profiles); p++) {
		check_dx_add(test_profiles[p], false, &ran);
		check_dx_add(test_profiles[p], true, &ran);
	}
	assert_true(ran >= 4);
}

/* ---------------------------------------------------------- rotary positions */

struct rotary_case {
	uint32_t n_mb, rows, seq, first_position, heads, head_dim, rot;
	bool gamma;
};

static const struct rotary_case rotary_cases[] = {
	{ 1, 1, 1, 0, 1, 2, 2, false },     { 3, 14, 7, 0, 5, 80, 80, false },   { 2, 10, 5, 3, 5, 80, 48, true },
	{ 2, 6, 3, 0, 1, 64, 0, true },     { 1, 9, 9, 100, 3, 33, 18, true },   { 2, 4, 4, 0, 2, 20, 6, false },
	{ 1, 3, 1, 17, 1, 128, 128, true }, { 1, 400, 200, 0, 1, 40, 40, true }, { 1, 2, 2, 0, 3, 5, 0, false },
	{ 2, 7, 5, 1, 2, 16, 16, false },
};

struct rotary {
	const struct rotary_case *c;
	struct bag bag;
	size_t n, n_rstd;
	float *cos, *sin, *gamma, *x, *out, *rstd, *dout, *dx, *dgamma;
	double *dbl_x, *dbl_gamma, *w;
};

static void rotary_open(struct rotary *d, const struct rotary_case *c)
{
	const uint32_t half = c->rot / 2, positions = c->first_position + c->seq;

	*d = (struct rotary){ .c = c, .n_rstd = (size_t)c->n_mb * c->rows * c->heads };
	d->n = d->n_rstd * c->head_dim;
	d->cos = outputs(&d->bag, (size_t)positions * half);
	d->sin = outputs(&d->bag, (size_t)positions * half);
	for (uint32_t p = 0; p < positions; p++)
		for (uint32_t i = 0; i < half; i++) {
			double angle = p * pow(10000.0, -2.0 * i / c->rot);
			d->cos[p * half + i] = (float)cos(angle);
			d->sin[p * half + i] = (float)sin(angle);
		}
	d->gamma = inputs(&d->bag, c->head_dim, 1, 1.5);
	d->x = inputs(&d->bag, d->n, 2, 2.0);
	d->dout = inputs(&d->bag, d->n, 3, 1.0);
	d->out = outputs(&d->bag, d->n);
	d->dx = outputs(&d->bag, d->n);
	d->rstd = outputs(&d->bag, d->n_rstd);
	d->dgamma = outputs(&d->bag, c->head_dim);
	d->dbl_x = doubles(&d->bag, d->x, d->n);
	d->dbl_gamma = doubles(&d->bag, d->gamma, c->head_dim);
	d->w = doubles(&d->bag, d->dout, d->n);
}

static struct k_rotary_backward rotary_args(const struct rotary *d)
{
	const struct rotary_case *c = d->c;
	return (struct k_rotary_backward){ .fwd = { .n_mb = c->n_mb,
						    .rows = c->rows,
						    .seq = c->seq,
						    .first_position = c->first_position,
						    .heads = c->heads,
						    .head_dim = c->head_dim,
						    .rot = c->rot,
						    .cos = c->rot ? d->cos : NULL,
						    .sin = c->rot ? d->sin : NULL,
						    .gamma = c->gamma ? d->gamma : NULL,
						    .eps = 1e-5f,
						    .x = d->x,
						    .out = d->out,
						    .rstd = c->gamma ? d->rstd : NULL },
					   .dout = d->dout,
					   .dx = d->dx,
					   .dgamma = c->gamma ? d->dgamma : NULL };
}

static struct k_dims rotary_dims(const struct rotary_case *c)
{
	return (struct k_dims){
		.n_mb = c->n_mb, .batch = 1, .seq = c->rows, .heads = c->heads, .head_dim = c->head_dim
	};
}

static double rotary_reference(const struct rotary *d, double *out)
{
	const struct rotary_case *c = d->c;
	const uint32_t half = c->rot / 2, hd = c->head_dim;
	double loss = 0.0;

	for (size_t h = 0; h < d->n_rstd; h++) {
		const double *x = d->dbl_x + h * hd;
		size_t at = (c->first_position + h / c->heads % c->rows % c->seq) * half;
		double v[256], squares = 0.0;

		for (uint32_t i = 0; i < hd; i++)
			squares += x[i] * x[i] / hd;
		for (uint32_t i = 0; i < hd; i++)
			v[i] = c->gamma ? x[i] / sqrt(squares + 1e-5) * d->dbl_gamma[i] : x[i];
		for (uint32_t i = 0; i < hd; i++) {
			double y = v[i];
			if (i < half)
				y = v[i] * d->cos[at + i] - v[i + half] * d->sin[at + i];
			else if (i < c->rot)
				y = v[i] * d->cos[at + i - half] + v[i - half] * d->sin[at + i - half];
			loss += d->w[h * hd + i] * y;
			if (out)
				out[h * hd + i] = y;
		}
	}
	return loss;
}

static double rotary_loss(void *ctx)
{
	return rotary_reference(ctx, NULL);
}

static void check_rotary(const struct rotary_case *c)
{
	const struct k_dims dims = rotary_dims(c);
	struct rotary d;
	struct fixture f;

	rotary_open(&d, c);
	double *want = keep(&d.bag, test_alloc(d.n * sizeof(double)));
	assert_true(fixture_open(&f, k_cpu_ops(), "", 2, &dims));
	struct k_rotary_backward a = rotary_args(&d);
	f.ops->rotary(f.s, &a.fwd);
	f.ops->rotary_backward(f.s, &a);
	fixture_wait(&f);
	rotary_reference(&d, want);
	assert_near("out", d.out, want, d.n, 2e-6);
	assert_gradient("dx", d.dx, d.dbl_x, d.n, rotary_loss, &d, 100, 2e-5);
	if (c->gamma)
		assert_gradient("dgamma", d.dgamma, d.dbl_gamma, c->head_dim, rotary_loss, &d, 40, 1e-5);
	/* dx may alias dout, and out x: the same bits. Then turning back gives x again. */
	a.dout = a.dx = memcpy(outputs(&d.bag, d.n), d.dout, d.n * sizeof(float));
	f.ops->rotary_backward(f.s, &a);
	fixture_wait(&f);
	assert_bits("dx in place", a.dx, d.dx, d.n * sizeof(float));
	if (!c->gamma) {
		a.fwd.x = a.fwd.out = a.dx = memcpy(outputs(&d.bag, d.n), d.x, d.n * sizeof(float));
		a.dout = a.fwd.out;
		f.ops->rotary(f.s, &a.fwd);
		fixture_wait(&f);
		assert_bits("out in place", a.fwd.out, d.out, d.n * sizeof(float));
		f.ops->rotary_backward(f.s, &a);
		fixture_wait(&f);
		assert_near("there and back", a.dx, d.dbl_x, d.n, 1e-6);
	}
	fixture_close(&f);
	bag_empty(&d.bag);
}

static void rotary_matches_reference_and_differences(void **state)
{
	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(rotary_cases); i++)
		check_rotary(&rotary_cases[i]);
}

/* A row's bits do not depend on how many rows are asked for at once. */
static void rotary_decodes_as_it_reads(void **state)
{
	const struct rotary_case c = { 1, 7, 7, 5, 3, 80, 40, true };
	const struct k_dims dims = rotary_dims(&c);
	const uint32_t width = c.heads * c.head_dim;
	struct rotary d;
	struct fixture f;
	(void)state;

	rotary_open(&d, &c);
	float *row = outputs(&d.bag, width);
	assert_true(fixture_open(&f, k_cpu_ops(), "", 2, &dims));
	struct k_rotary a = rotary_args(&d).fwd;
	f.ops->rotary(f.s, &a);
	a.rows = a.seq = 1;
	a.out = row;
	a.rstd = NULL;
	for (uint32_t r = 0; r < c.rows; r++) {
		a.first_position = c.first_position + r;
		a.x = d.x + r * width;
		f.ops->rotary(f.s, &a);
		fixture_wait(&f);
		assert_bits("row", row, d.out + r * width, width * sizeof(float));
	}
	fixture_close(&f);
	bag_empty(&d.bag);
}

/* --------------------------------------------------------- gated linear units */

static double act_reference(enum k_activation act, double x)
{
	switch (act) {
	case K_ACT_GELU_TANH:
		return 0.5 * x * (1.0 + tanh(sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x)));
	case K_ACT_GELU_ERF:
		return 0.5 * x * (1.0 + erf(x / M_SQRT2));
	case K_ACT_RELU:
		return x > 0.0 ? x : 0.0;
	case K_ACT_SILU:
		return x / (1.0 + exp(-x));
	case K_ACT_NONE:
		break;
	}
	return x;
}

struct glu {
	enum k_activation act;
	size_t n;
	double *gate, *up, *w;
};

static double glu_loss(void *ctx)
{
	const struct glu *d = ctx;
	double loss = 0.0;

	for (size_t i = 0; i < d->n; i++)
		loss += d->w[i] * act_reference(d->act, d->gate[i]) * d->up[i];
	return loss;
}

static void check_glu(struct fixture *f, enum k_activation act, uint32_t n_mb, uint32_t rows, uint32_t cols)
{
	const size_t n = (size_t)n_mb * rows * cols, bytes = n * sizeof(float);
	struct bag bag = { 0 };
	float *gate = inputs(&bag, n, 1, 6.0), *up = inputs(&bag, n, 2, 2.0), *dy = inputs(&bag, n, 3, 1.0);
	float *y = outputs(&bag, n), *dgate = outputs(&bag, n), *dup = outputs(&bag, n);
	float *other = outputs(&bag, n), *gate2 = outputs(&bag, n), *up2 = outputs(&bag, n);
	struct glu d = { act, n, doubles(&bag, gate, n), doubles(&bag, up, n), doubles(&bag, dy, n) };
	double *want = keep(&bag, test_alloc(n * sizeof(double)));

	for (size_t i = 0; i < n; i++)
		want[i] = act_reference(act, d.gate[i]) * d.up[i];
	const struct k_glu_backward a = { { n_mb, rows, cols, act, gate, up, y }, dy, dgate, dup };
	struct k_glu_backward b = a;
	f->ops->glu(f->s, &a.fwd);
	f->ops->glu_backward(f->s, &a);
	/* In the place of gate and up. */
	b.fwd.gate = b.dgate = memcpy(gate2, gate, bytes);
	b.fwd.up = b.dup = memcpy(up2, up, bytes);
	f->ops->glu_backward(f->s, &b);
	fixture_wait(f);
	/* 1 + erf cancels on the left: its error is absolute there, as everywhere. */
	for (size_t i = 0; i < n; i++)
		assert_near_size("y", &y[i], &want[i], 1, fabs(want[i]) + 4.0, 5e-7);
	assert_gradient("dgate", dgate, d.gate, n, glu_loss, &d, 50, 5e-6);
	assert_gradient("dup", dup, d.up, n, glu_loss, &d, 50, 5e-6);
	assert_bits("dgate in gate", gate2, dgate, bytes);
	assert_bits("dup in up", up2, dup, bytes);
	/* In the place of dy, one and the other. */
	b = a;
	b.dy = b.dgate = memcpy(gate2, dy, bytes);
	b.dup = other;
	f->ops->glu_backward(f->s, &b);
	b.dy = b.dup = memcpy(up2, dy, bytes);
	b.dgate = y;
	f->ops->glu_backward(f->s, &b);
	fixture_wait(f);
	assert_bits("dgate in dy", gate2, dgate, bytes);
	assert_bits("dup beside it", other, dup, bytes);
	assert_bits("dup in dy", up2, dup, bytes);
	assert_bits("dgate beside it", y, dgate, bytes);
	bag_empty(&bag);
}

static void glu_matches_reference_and_differences(void **state)
{
	const struct k_dims dims = { 0 };
	struct fixture f;
	(void)state;

	assert_true(fixture_open(&f, k_cpu_ops(), "", 2, &dims));
	for (int act = K_ACT_NONE; act <= K_ACT_SILU; act++) {
		check_glu(&f, (enum k_activation)act, 1, 1, 3);
		check_glu(&f, (enum k_activation)act, 3, 5, 37);
	}
	check_glu(&f, K_ACT_SILU, 2, 50, 333); /* several tasks, the last one short */
	fixture_close(&f);
}

/* --------------------------------------------------------- spans are trees */

static void spans_are_trees_of_their_leaves(void **state)
{
	(void)state;
	for (uint32_t n_mb = 1; n_mb <= 9; n_mb++) {
		const struct rotary_case c = { n_mb, 6, 3, 2, 5, 80, 48, true };
		const struct k_dims dims = rotary_dims(&c);
		const size_t hd = c.head_dim, one = c.rows * c.heads * hd, heads = (size_t)c.rows * c.heads;
		struct rotary d;
		struct fixture f;

		rotary_open(&d, &c);
		float *leaves = outputs(&d.bag, n_mb * 2 * hd), *span = outputs(&d.bag, 2 * hd),
		      *dx = outputs(&d.bag, d.n);
		assert_true(fixture_open(&f, k_cpu_ops(), "", 3, &dims));
		struct k_rotary_backward a = rotary_args(&d);
		/* The same rows for the norm: heads as rows. */
		struct k_norm_backward b = { .n_mb = n_mb,
					     .rows = c.rows * c.heads,
					     .cols = c.head_dim,
					     .rms = true,
					     .x = d.x,
					     .rstd = d.rstd,
					     .gamma = d.gamma,
					     .dy = d.dout,
					     .dx = d.out,
					     .dgamma = span + hd };
		f.ops->rotary(f.s, &a.fwd);
		a.dgamma = span;
		f.ops->rotary_backward(f.s, &a);
		f.ops->norm_backward(f.s, &b);
		a.fwd.n_mb = b.n_mb = 1;
		for (uint32_t k = 0; k < n_mb; k++) {
			a.fwd.x = b.x = d.x + k * one;
			a.fwd.rstd = d.rstd + k * heads;
			b.rstd = a.fwd.rstd;
			a.dout = b.dy = d.dout + k * one;
			a.dx = dx + k * one;
			a.dgamma = leaves + k * 2 * hd;
			b.dgamma = a.dgamma + hd;
			b.dx = d.out + k * one;
			f.ops->rotary_backward(f.s, &a);
			f.ops->norm_backward(f.s, &b);
		}
		fixture_wait(&f);
		test_tree(leaves, n_mb, 2 * hd);
		assert_bits("dgamma of rotary and RMSNorm", span, leaves, 2 * hd * sizeof(float));
		assert_bits("dx", d.dx, dx, d.n * sizeof(float));
		fixture_close(&f);
		bag_empty(&d.bag);
	}
}

/* So many leaves that they are what the workspace is planned for. */
static void leaves_have_room(void **state)
{
	const struct rotary_case c = { 3000, 1, 1, 0, 1, 128, 0, true };
	const struct k_dims dims = rotary_dims(&c);
	struct rotary d;
	struct fixture f;
	(void)state;

	rotary_open(&d, &c);
	float *leaves = outputs(&d.bag, d.n);
	assert_true(fixture_open(&f, k_cpu_ops(), "", 1, &dims));
	const struct k_rotary_backward a = rotary_args(&d);
	f.ops->rotary(f.s, &a.fwd);
	f.ops->rotary_backward(f.s, &a);
	fixture_wait(&f);
	for (size_t i = 0; i < d.n; i++)
		leaves[i] = d.dout[i] * (d.x[i] * d.rstd[i / c.head_dim]);
	test_tree(leaves, c.n_mb, c.head_dim);
	assert_bits("dgamma", leaves, d.dgamma, c.head_dim * sizeof(float));
	fixture_close(&f);
	bag_empty(&d.bag);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(rms_norm_matches_reference_and_differences),
		cmocka_unit_test(data_gradients_add),
		cmocka_unit_test(rotary_matches_reference_and_differences),
		cmocka_unit_test(rotary_decodes_as_it_reads),
		cmocka_unit_test(glu_matches_reference_and_differences),
		cmocka_unit_test(spans_are_trees_of_their_leaves),
		cmocka_unit_test(leaves_have_room),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
