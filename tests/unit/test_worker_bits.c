/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Loss and gradients have the same bits whether activations are kept or
 * recomputed, on any number of threads, on a backend that runs nothing until an
 * event is waited for, and whether a span is computed whole or as the tree of
 * its halves; and whether the logits of a span exist at once or a micro-batch's
 * at a time. The buffers are never more than the memory plan says.
 */
#include "test_worker_model.h"
#include "worker/net.h"

static const char dropout[] = "\"embd_pdrop\": 0.1, \"attn_pdrop\": 0.1, \"resid_pdrop\": 0.1";
static const char *const models[] = { dropout, TINY_LLAMA "}", TINY_MISTRAL "}", TINY_QWEN3 "}" };

/* A second set of gradients like t's. */
static void gradients_open(const struct tiny *t, float *(*g)[UNIT_PARTS_MAX])
{
	for (uint32_t u = 0; u < t->table.n_units; u++)
		for (uint32_t p = 0; p < t->table.unit[u].n_parts; p++)
			g[u][p] = zeroed(t->table.unit[u].n * sizeof(float));
}

static void gradients_close(const struct tiny *t, float *(*g)[UNIT_PARTS_MAX])
{
	for (uint32_t u = 0; u < t->table.n_units; u++)
		for (uint32_t p = 0; p < t->table.unit[u].n_parts; p++)
			free(g[u][p]);
}

static void expect_same(const struct tiny *t, float *(*g)[UNIT_PARTS_MAX])
{
	for (uint32_t u = 0; u < t->table.n_units; u++)
		for (uint32_t p = 0; p < t->table.unit[u].n_parts; p++)
			assert_memory_equal(t->gradient[u][p], g[u][p], t->table.unit[u].part[p].end * sizeof(float));
}

/* The reference is kept, one thread, the CPU backend; `other` differs in one respect. */
static void expect_same_run(struct tiny *t, struct model_run other)
{
	float *g[8][UNIT_PARTS_MAX] = { 0 };
	struct model_run reference = tiny_run(t, 0, MICRO_MAX);
	double want = tiny_loss(&reference), got;

	gradients_open(t, g);
	other.gradient = (float *const(*)[UNIT_PARTS_MAX])g;
	got = tiny_loss(&other);
	assert_memory_equal(&want, &got, sizeof(want));
	expect_same(t, g);
	gradients_close(t, g);
}

static void kept_or_recomputed_in(const char *keys)
{
	struct tiny *t = tiny_open(keys);
	struct model_run r = tiny_run(t, 0, MICRO_MAX);

	r.keep = false;
	expect_same_run(t, r);
	tiny_close(t);
}

static void kept_or_recomputed(void **state)
{
	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(models); i++)
		kept_or_recomputed_in(models[i]);
}

static void any_threads_in(const char *keys)
{
	struct tiny *t = tiny_open(keys);
	struct model_run r = tiny_run(t, 0, MICRO_MAX);

	for (r.threads = 2; r.threads <= 3; r.threads++)
		expect_same_run(t, r);
	tiny_close(t);
}

static void any_threads(void **state)
{
	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(models); i++)
		any_threads_in(models[i]);
}

static void deferred_in(const char *keys)
{
	struct tiny *t = tiny_open(keys);
	struct model_run r = tiny_run(t, 0, MICRO_MAX);

	r.ops = k_deferred_ops();
	expect_same_run(t, r);
	r.keep = false;
	expect_same_run(t, r);
	tiny_close(t);
}

static void deferred(void **state)
{
	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(models); i++)
		deferred_in(models[i]);
}

/* gradient(whole) = gradient(left) + gradient(right), each half computed on its own. */
static void add_halves(struct tiny *t, float *(*g)[UNIT_PARTS_MAX], uint32_t first, uint32_t n, double *loss)
{
	float *right[8][UNIT_PARTS_MAX] = { 0 };
	struct model_run r = tiny_run(t, first, n);
	double right_loss;

	if (n == 1) {
		r.gradient = (float *const(*)[UNIT_PARTS_MAX])g;
		*loss = tiny_loss(&r);
		return;
	}
	gradients_open(t, right);
	add_halves(t, g, first, n == 3 ? 2 : n / 2, loss);
	add_halves(t, right, first + (n == 3 ? 2 : n / 2), n == 3 ? 1 : n / 2, &right_loss);
	*loss += right_loss;
	for (uint32_t u = 0; u < t->table.n_units; u++)
		for (uint32_t p = 0; p < t->table.unit[u].n_parts; p++)
			for (uint64_t i = 0; i < t->table.unit[u].part[p].end; i++)
				g[u][p][i] += right[u][p][i];
	gradients_close(t, right);
}

static void span_is_its_tree_in(const char *keys)
{
	struct tiny *t = tiny_open(keys);

	for (uint32_t n = 2; n <= MICRO_MAX; n++) {
		float *g[8][UNIT_PARTS_MAX] = { 0 };
		struct model_run whole = tiny_run(t, 0, n);
		double want, got;

		gradients_open(t, g);
		add_halves(t, g, 0, n, &want);
		got = tiny_loss(&whole);
		assert_memory_equal(&want, &got, sizeof(want));
		expect_same(t, g);
		gradients_close(t, g);
	}
	tiny_close(t);
}

static void span_is_its_tree(void **state)
{
	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(models); i++)
		span_is_its_tree_in(models[i]);
}

/* One micro-batch after another, with whole partial sums of the matrix's gradient, is the same as all at once. */
static void one_by_one_in(const char *keys)
{
	for (uint32_t n = 1; n <= MICRO_MAX; n++) {
		struct tiny *t = tiny_open(keys);
		struct model_run r = tiny_run(t, 0, n), other = r;
		float *g[8][UNIT_PARTS_MAX] = { 0 };
		double want = tiny_loss(&r), got;

		gradients_open(t, g);
		other.gradient = (float *const(*)[UNIT_PARTS_MAX])g;
		other.head_pieces = 1;
		other.ops = n % 2 ? k_cpu_ops() : k_deferred_ops();
		got = tiny_loss(&other);
		assert_memory_equal(&want, &got, sizeof(want));
		expect_same(t, g);
		gradients_close(t, g);
		tiny_close(t);
	}
}

static void one_by_one(void **state)
{
	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(models); i++)
		one_by_one_in(models[i]);
}

/* Micro-batches of 36 rows, cut into 16 and 20. */
enum { LONG_BATCH = 6, LONG_ROWS = LONG_BATCH * SEQ, LONG_MICRO = 3 };
struct cut {
	struct tiny *t;
	uint32_t tokens[LONG_MICRO * LONG_ROWS], targets[LONG_MICRO * LONG_ROWS];
};

static struct model_run cut_run(struct cut *c, uint32_t first, uint32_t n_mb, uint32_t pieces)
{
	struct model_run r = tiny_run(c->t, first, n_mb);

	r.batch = LONG_BATCH;
	r.tokens = c->tokens + first * LONG_ROWS;
	r.targets = c->targets + first * LONG_ROWS;
	r.head_pieces = pieces;
	return r;
}

static void cut_open(struct cut *c, const char *keys)
{
	c->t = tiny_open(keys);
	for (uint32_t i = 0; i < LONG_MICRO * LONG_ROWS; i++) {
		c->tokens[i] = (uint32_t)(rng_u64(5, 0, i) % c->t->model.vocab_size);
		c->targets[i] = i % 7 == 3 ? DATA_NO_TARGET : (uint32_t)(rng_u64(5, 1, i) % c->t->model.vocab_size);
	}
}

/* Into g; left is the sum of the first two micro-batches, the third is added to it. */
static double cut_sum(struct cut *c, float *(*g)[UNIT_PARTS_MAX], float *(*right)[UNIT_PARTS_MAX])
{
	struct model_run left = cut_run(c, 0, 2, 2), third = cut_run(c, 2, 1, 2);
	double loss;

	left.gradient = (float *const(*)[UNIT_PARTS_MAX])g;
	third.gradient = (float *const(*)[UNIT_PARTS_MAX])right;
	loss = tiny_loss(&left);
	loss += tiny_loss(&third);
	for (uint32_t u = 0; u < c->t->table.n_units; u++)
		for (uint32_t p = 0; p < c->t->table.unit[u].n_parts; p++)
			for (uint64_t i = 0; i < c->t->table.unit[u].part[p].end; i++)
				g[u][p][i] += right[u][p][i];
	return loss;
}

static void expect_near(const struct tiny *t, float *(*g)[UNIT_PARTS_MAX])
{
	for (uint32_t u = 0; u < t->table.n_units; u++)
		for (uint32_t p = 0; p < t->table.unit[u].n_parts; p++)
			for (uint64_t i = 0; i < t->table.unit[u].part[p].end; i++)
				assert_float_equal(g[u][p][i], t->gradient[u][p][i], 1e-5);
}

/* In pieces: near the whole, and the same for any threads, kept or not, deferred, and as the tree of its parts. */
static void pieces_in(const char *keys)
{
	float *g[8][UNIT_PARTS_MAX] = { 0 }, *right[8][UNIT_PARTS_MAX] = { 0 };
	struct model_run r;
	struct cut c;
	double whole, want, got;

	cut_open(&c, keys);
	gradients_open(c.t, g);
	gradients_open(c.t, right);
	r = cut_run(&c, 0, LONG_MICRO, 2);
	want = tiny_loss(&r);
	r.gradient = (float *const(*)[UNIT_PARTS_MAX])g;
	r.head_pieces = 0;
	whole = tiny_loss(&r);
	assert_float_equal(want, whole, 1e-6);
	expect_near(c.t, g);
	r.head_pieces = 2;
	for (int i = 0; i < 4; i++) {
		r.threads = 1 + (i & 1);
		r.keep = i < 2;
		r.ops = i == 3 ? k_deferred_ops() : k_cpu_ops();
		got = tiny_loss(&r);
		assert_memory_equal(&want, &got, sizeof(want));
		expect_same(c.t, g);
	}
	got = cut_sum(&c, g, right);
	assert_memory_equal(&want, &got, sizeof(want));
	expect_same(c.t, g);
	r.training = false;
	got = tiny_loss(&r);
	if (c.t->model.attn_pdrop == 0)
		assert_memory_equal(&want, &got, sizeof(want));
	gradients_close(c.t, g);
	gradients_close(c.t, right);
	tiny_close(c.t);
}

static void pieces(void **state)
{
	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(models); i++)
		pieces_in(models[i]);
}

/* Dropout is drawn by step and micro-batch: another name, other numbers; the same name, the same. */
static void dropout_follows_names(void **state)
{
	struct tiny *t = tiny_open(dropout);
	struct model_run r = tiny_run(t, 0, 1), other = r;
	double loss = tiny_loss(&r);

	(void)state;
	assert_true(loss == tiny_loss(&other));
	other.step++;
	assert_true(loss != tiny_loss(&other));
	other = r;
	other.first++;
	assert_true(loss != tiny_loss(&other));
	other = r;
	other.seed++;
	assert_true(loss != tiny_loss(&other));
	/* Forward alone is evaluation: no dropout, whatever the names. */
	other = r;
	other.training = false;
	loss = tiny_loss(&other);
	other.step++;
	assert_true(loss == tiny_loss(&other));
	tiny_close(t);
}

static void buffers_fit_the_plan_in(const char *keys)
{
	struct tiny *t = tiny_open(keys);
	struct activation_sizes s;

	activation_sizes_get(&t->model, BATCH, SEQ, &s);
	for (uint32_t span = 1; span <= MICRO_MAX; span++) {
		for (uint32_t layers = 1; layers <= t->model.n_layer; layers += t->model.n_layer - 1) {
			struct head_plan head;
			uint64_t rows = (uint64_t)span * ROWS, streams = 1 + 3 * (uint64_t)t->model.n_layer;
			uint64_t floats = s.boundary * (t->model.n_layer + 1) + s.inner * layers + s.scratch + s.head;
			uint64_t samples = 2 * round_up_u64(rows * sizeof(uint32_t), CACHE_LINE) +
					   round_up_u64(span * sizeof(double), CACHE_LINE) +
					   round_up_u64(span * streams * sizeof(uint64_t), CACHE_LINE);
			struct net_config cfg = {
				.model = &t->model,
				.table = &t->table,
				.k = k_cpu_ops(),
				.batch = BATCH,
				.seq = SEQ,
				.max_span = span,
				.keep = layers > 1,
			};
			uint64_t planned;

			head_plan_get(&t->model, ROWS, span, &head);
			cfg.head_pieces = head.pieces;
			planned = (span * floats + s.tables + head.logits + head.sums) * sizeof(float) + samples;
			/* The plan rounds for each micro-batch. */
			assert_in_range(net_activation_bytes(&cfg), planned - planned / 16, planned);
		}
	}
	tiny_close(t);
}

static void buffers_fit_the_plan(void **state)
{
	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(models); i++)
		buffers_fit_the_plan_in(models[i]);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(kept_or_recomputed),
		cmocka_unit_test(any_threads),
		cmocka_unit_test(deferred),
		cmocka_unit_test(span_is_its_tree),
		cmocka_unit_test(one_by_one),
		cmocka_unit_test(pieces),
		cmocka_unit_test(dropout_follows_names),
		cmocka_unit_test(buffers_fit_the_plan),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
