/* SPDX-License-Identifier: Apache-2.0 */
/* Linear layers: every library against a naive product in double; activations; the span's tree. */
#include "tests/unit/test_kernels.h"

struct shape {
	uint32_t n_mb, rows, in, out;
	bool w_out_in;
};

static const struct shape shapes[] = {
	{ 1, 1, 1, 1, false },       { 1, 1, 7, 300, true },     { 3, 17, 33, 50, false },   { 3, 17, 33, 50, true },
	{ 2, 40, 400, 97, false },   { 5, 19, 48, 200, true },   { 1, 130, 300, 500, true }, { 2, 70, 270, 513, false },
	{ 1, 1030, 20, 300, false }, { 1, 8, 900, 1000, false },
};

static struct k_dims dims_of(const struct shape *s)
{
	uint32_t widest = s->in > s->out ? s->in : s->out, narrow = s->in < s->out ? s->in : s->out;
	return (struct k_dims){ .n_mb = s->n_mb, .batch = 1, .seq = s->rows, .channels = narrow, .ffn = widest };
}

static double act_reference(enum k_activation act, double x)
{
	switch (act) {
	case K_ACT_GELU_TANH:
		return 0.5 * x * (1.0 + tanh(sqrt(2.0 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
	case K_ACT_GELU_ERF:
		return 0.5 * x * (1.0 + erf(x / sqrt(2.0)));
	case K_ACT_RELU:
		return x > 0.0 ? x : 0.0;
	case K_ACT_SILU:
		return x / (1.0 + exp(-x));
	case K_ACT_NONE:
		break;
	}
	return x;
}

struct buffers {
	float *x, *w, *b, *dy, *pre, *y, *dx, *dw, *db;
	size_t nx, nw, ny;
};

static struct buffers buffers_open(const struct shape *s)
{
	struct buffers b = { .nx = (size_t)s->n_mb * s->rows * s->in,
			     .nw = (size_t)s->in * s->out,
			     .ny = (size_t)s->n_mb * s->rows * s->out };
	b.x = test_random(b.nx, 1, 1.0);
	b.w = test_random(b.nw, 2, 1.0);
	b.b = test_random(s->out, 3, 1.0);
	b.dy = test_random(b.ny, 4, 1.0);
	b.pre = test_floats(b.ny);
	b.y = test_floats(b.ny);
	b.dx = test_floats(b.nx);
	b.dw = test_floats(b.nw);
	b.db = test_floats(s->out);
	return b;
}

static void buffers_close(struct buffers *b)
{
	float *const all[] = { b->x, b->w, b->b, b->dy, b->pre, b->y, b->dx, b->dw, b->db };
	for (size_t i = 0; i < ARRAY_LEN(all); i++)
		free(all[i]);
}

static struct k_linear forward_of(const struct shape *s, const struct buffers *b)
{
	return (struct k_linear){ .n_mb = s->n_mb,
				  .rows = s->rows,
				  .in = s->in,
				  .out = s->out,
				  .w_out_in = s->w_out_in,
				  .x = b->x,
				  .w = b->w,
				  .b = b->b,
				  .y = b->y };
}

static struct k_linear_backward backward_of(const struct shape *s, const struct buffers *b)
{
	return (struct k_linear_backward){ .n_mb = s->n_mb,
					   .rows = s->rows,
					   .in = s->in,
					   .out = s->out,
					   .w_out_in = s->w_out_in,
					   .x = b->x,
					   .w = b->w,
					   .dy = b->dy,
					   .dx = b->dx,
					   .dw = b->dw,
					   .db = b->db };
}

struct wanted {
	double *y, *dx, *dw, *db;
};

/* The naive products: once for a shape, since they cost more than all the libraries together. */
static struct wanted wanted_open(const struct shape *s, const struct buffers *b)
{
	struct wanted w = { calloc(b->ny, sizeof(double)), calloc(b->nx, sizeof(double)), calloc(b->nw, sizeof(double)),
			    calloc(s->out, sizeof(double)) };

	for (size_t r = 0; r < (size_t)s->n_mb * s->rows; r++)
		for (uint32_t o = 0; o < s->out; o++) {
			double sum = b->b[o], g = b->dy[r * s->out + o];
			w.db[o] += g;
			for (uint32_t i = 0; i < s->in; i++) {
				size_t at = s->w_out_in ? (size_t)o * s->in + i : (size_t)i * s->out + o;
				sum += (double)b->x[r * s->in + i] * b->w[at];
				w.dx[r * s->in + i] += g * b->w[at];
				w.dw[at] += g * b->x[r * s->in + i];
			}
			w.y[r * s->out + o] = sum;
		}
	return w;
}

static void check_profile(const struct shape *s, struct fixture *f, const struct buffers *b, const struct wanted *w)
{
	const struct k_linear fwd = forward_of(s, b);
	const struct k_linear_backward bwd = backward_of(s, b);

	f->ops->linear(f->s, &fwd);
	f->ops->linear_backward(f->s, &bwd);
	fixture_wait(f);
	assert_near("y", b->y, w->y, b->ny, 2e-6);
	assert_near("dx", b->dx, w->dx, b->nx, 2e-6);
	assert_near("dw", b->dw, w->dw, b->nw, 2e-6);
	assert_near("db", b->db, w->db, s->out, 2e-6);
}

static void every_library_matches_naive(void **state)
{
	unsigned ran = 0;
	(void)state;

	for (size_t i = 0; i < ARRAY_LEN(shapes); i++) {
		const struct k_dims dims = dims_of(&shapes[i]);
		struct buffers b = buffers_open(&shapes[i]);
		struct wanted w = wanted_open(&shapes[i], &b);
		for (size_t p = 0; p < ARRAY_LEN(test_profiles); p++) {
			struct fixture f;
			if (!fixture_open(&f, k_cpu_ops(), test_profiles[p], 2, &dims))
				continue;
			ran++;
			check_profile(&shapes[i], &f, &b, &w);
			fixture_close(&f);
		}
		free(w.y);
		free(w.dx);
		free(w.dw);
		free(w.db);
		buffers_close(&b);
	}
	assert_true(ran >= 2 * ARRAY_LEN(shapes));
}

static void activations_match(void **state)
{
	const struct shape s = { 2, 37, 1, 103, false };
	const struct k_dims dims = dims_of(&s);
	struct fixture f;
	(void)state;

	assert_true(fixture_open(&f, k_cpu_ops(), "", 2, &dims));
	for (int act = K_ACT_NONE; act <= K_ACT_SILU; act++) {
		struct buffers b = buffers_open(&s);
		struct k_linear a = forward_of(&s, &b);
		double *want = test_alloc(b.ny * sizeof(double));
		a.act = (enum k_activation)act;
		/* In pairs with and without `pre`: the same y. Inputs up to 12 in size reach every tail. */
		for (size_t i = 0; i < b.nx; i++)
			b.x[i] *= 12.0f;
		a.pre = b.pre;
		f.ops->linear(f.s, &a);
		a.pre = NULL;
		a.y = b.dy;
		f.ops->linear(f.s, &a);
		fixture_wait(&f);
		assert_bits("y without pre", b.y, b.dy, b.ny * sizeof(float));
		for (size_t i = 0; i < b.ny; i++)
			want[i] = act_reference(a.act, b.pre[i]);
		/* 1 + erf cancels on the left: its error is absolute there, as everywhere. */
		double floor = act == K_ACT_GELU_ERF ? 2.0 : 0.1;
		for (size_t i = 0; i < b.ny; i++)
			assert_near_size("act", &b.y[i], &want[i], 1, fabs(want[i]) + floor, 5e-7);
		free(want);
		buffers_close(&b);
	}
	fixture_close(&f);
}

struct chain {
	const struct shape *s;
	enum k_activation act;
	double *pre, *w, *b, *dy;
};

/* sum dy (act(pre) W + b) */
static double chain_loss(void *ctx)
{
	const struct chain *c = ctx;
	const struct shape *s = c->s;
	double loss = 0.0;

	for (size_t r = 0; r < (size_t)s->n_mb * s->rows; r++)
		for (uint32_t o = 0; o < s->out; o++) {
			double y = c->b[o];
			for (uint32_t i = 0; i < s->in; i++)
				y += act_reference(c->act, c->pre[r * s->in + i]) *
				     c->w[s->w_out_in ? (size_t)o * s->in + i : (size_t)i * s->out + o];
			loss += c->dy[r * s->out + o] * y;
		}
	return loss;
}

static void backward_matches_differences(void **state)
{
	const struct shape s = { 3, 5, 18, 21, false };
	const struct k_dims dims = dims_of(&s);
	struct fixture f;
	(void)state;

	assert_true(fixture_open(&f, k_cpu_ops(), "", 2, &dims));
	for (int act = K_ACT_NONE; act <= K_ACT_SILU; act++) {
		struct buffers b = buffers_open(&s);
		float *pre = test_random(b.nx, 9, 3.0);
		struct k_linear_backward a = backward_of(&s, &b);
		struct chain c = { &s,
				   (enum k_activation)act,
				   test_doubles(pre, b.nx),
				   test_doubles(b.w, b.nw),
				   test_doubles(b.b, s.out),
				   test_doubles(b.dy, b.ny) };
		a.act_in = c.act;
		a.pre_in = pre;
		for (size_t i = 0; i < b.nx; i++)
			b.x[i] = (float)act_reference(c.act, pre[i]);
		f.ops->linear_backward(f.s, &a);
		fixture_wait(&f);
		assert_gradient("dx", b.dx, c.pre, b.nx, chain_loss, &c, b.nx, 5e-6);
		assert_gradient("dw", b.dw, c.w, b.nw, chain_loss, &c, b.nw, 5e-6);
		assert_gradient("db", b.db, c.b, s.out, chain_loss, &c, s.out, 5e-6);
		double *const doubles[] = { c.pre, c.w, c.b, c.dy };
		for (size_t i = 0; i < ARRAY_LEN(doubles); i++)
			free(doubles[i]);
		free(pre);
		buffers_close(&b);
	}
	fixture_close(&f);
}

/* A span's weight gradient is the tree of its micro-batches' own; their activations do not depend on the span. */
static void check_span(struct fixture *f, const struct shape *s)
{
	struct buffers b = buffers_open(s);
	size_t leaf = b.nw + s->out;
	float *leaves = test_floats(s->n_mb * leaf), *dx = test_floats(b.nx), *y = test_floats(b.ny);
	const struct k_linear fwd = forward_of(s, &b);
	const struct k_linear_backward bwd = backward_of(s, &b);

	f->ops->linear(f->s, &fwd);
	f->ops->linear_backward(f->s, &bwd);
	for (uint32_t k = 0; k < s->n_mb; k++) {
		struct k_linear one = fwd;
		struct k_linear_backward back = bwd;
		one.n_mb = back.n_mb = 1;
		one.x = back.x = b.x + (size_t)k * s->rows * s->in;
		one.y = y + (size_t)k * s->rows * s->out;
		back.dy = b.dy + (size_t)k * s->rows * s->out;
		back.dx = dx + (size_t)k * s->rows * s->in;
		back.dw = leaves + k * leaf;
		back.db = back.dw + b.nw;
		f->ops->linear(f->s, &one);
		f->ops->linear_backward(f->s, &back);
	}
	fixture_wait(f);
	test_tree(leaves, s->n_mb, leaf);
	assert_bits("y", y, b.y, b.ny * sizeof(float));
	assert_bits("dx", dx, b.dx, b.nx * sizeof(float));
	assert_bits("dw", leaves, b.dw, b.nw * sizeof(float));
	assert_bits("db", leaves + b.nw, b.db, s->out * sizeof(float));
	free(leaves);
	free(dx);
	free(y);
	buffers_close(&b);
}

static void span_is_the_tree_of_its_leaves(void **state)
{
	(void)state;
	for (uint32_t n_mb = 1; n_mb <= 9; n_mb++) {
		const struct shape s = { n_mb, 20, 130, 210, n_mb % 2 };
		const struct k_dims dims = dims_of(&s);
		struct fixture f;

		assert_true(fixture_open(&f, k_cpu_ops(), "", 2, &dims));
		check_span(&f, &s);
		fixture_close(&f);
	}
}

/* The product may add a leaf to its sibling itself: in every library, at the most rows for which that is done. */
static void products_add_leaves_like_the_tree(void **state)
{
	static const struct shape spans[] = {
		{ 2, 128, 768, 784, 0 }, { 3, 127, 770, 193, 1 }, { 4, 129, 192, 768, 0 },
		{ 5, 64, 100, 2304, 1 }, { 2, 1, 48, 96, 0 },     { 3, 17, 1632, 16, 1 },
	};

	(void)state;
	for (size_t p = 0; p < ARRAY_LEN(test_profiles); p++)
		for (size_t i = 0; i < ARRAY_LEN(spans); i++) {
			const struct k_dims dims = dims_of(&spans[i]);
			struct fixture f;

			if (!fixture_open(&f, k_cpu_ops(), test_profiles[p], 2, &dims))
				continue;
			check_span(&f, &spans[i]);
			fixture_close(&f);
		}
}

/* Each output may be left out, and the others do not change. */
static void outputs_are_optional(void **state)
{
	const struct shape s = { 3, 9, 40, 30, true };
	const struct k_dims dims = dims_of(&s);
	struct buffers b = buffers_open(&s);
	float *dx = test_floats(b.nx), *dw = test_floats(b.nw), *db = test_floats(s.out);
	struct fixture f;
	(void)state;

	assert_true(fixture_open(&f, k_cpu_ops(), "", 2, &dims));
	const struct k_linear_backward all = backward_of(&s, &b);
	struct k_linear_backward only[3] = { all, all, all };
	only[0].dx = dx;
	only[0].dw = only[0].db = NULL;
	only[1].dw = dw;
	only[1].dx = only[1].db = NULL;
	only[2].db = db;
	only[2].dx = only[2].dw = NULL;
	f.ops->linear_backward(f.s, &all);
	for (int i = 0; i < 3; i++)
		f.ops->linear_backward(f.s, &only[i]);
	fixture_wait(&f);
	assert_bits("dx", dx, b.dx, b.nx * sizeof(float));
	assert_bits("dw", dw, b.dw, b.nw * sizeof(float));
	assert_bits("db", db, b.db, s.out * sizeof(float));
	fixture_close(&f);
	free(dx);
	free(dw);
	free(db);
	buffers_close(&b);
}

/* A leaf in pieces of its rows: the second piece's product is added to what the first left. */
static void weight_gradient_adds(void **state)
{
	const struct shape s = { 1, 40, 60, 50, true }, half = { 1, 20, 60, 50, true };
	const struct k_dims dims = dims_of(&s);
	struct buffers b = buffers_open(&s);
	float *dw = test_floats(b.nw), *second = test_floats(b.nw);
	struct fixture f;
	(void)state;

	assert_true(fixture_open(&f, k_cpu_ops(), "", 2, &dims));
	const struct k_linear_backward whole = backward_of(&s, &b);
	struct k_linear_backward piece = whole;
	f.ops->linear_backward(f.s, &whole);
	piece.rows = half.rows;
	piece.dx = piece.db = NULL;
	piece.dw = dw;
	f.ops->linear_backward(f.s, &piece);
	piece.x += half.rows * half.in;
	piece.dy += half.rows * half.out;
	piece.dw = second;
	f.ops->linear_backward(f.s, &piece);
	piece.dw = dw;
	piece.dw_add = true;
	fixture_wait(&f);
	for (size_t i = 0; i < b.nw; i++)
		second[i] += dw[i];
	f.ops->linear_backward(f.s, &piece);
	fixture_wait(&f);
	for (size_t i = 0; i < b.nw; i++) {
		assert_float_equal(dw[i], second[i], 1e-5);
		assert_float_equal(dw[i], b.dw[i], 1e-5);
	}
	fixture_close(&f);
	free(dw);
	free(second);
	buffers_close(&b);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(every_library_matches_naive),
		cmocka_unit_test(activations_match),
		cmocka_unit_test(backward_matches_differences),
		cmocka_unit_test(span_is_the_tree_of_its_leaves),
		cmocka_unit_test(products_add_leaves_like_the_tree),
		cmocka_unit_test(outputs_are_optional),
		cmocka_unit_test(weight_gradient_adds),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
