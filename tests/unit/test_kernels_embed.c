/* SPDX-License-Identifier: Apache-2.0 */
/* Embedding and cross-entropy, the two ends of the model. */
#include "tests/unit/test_kernels.h"

static const uint64_t streams[] = { 11, 1ull << 40, 5, 99, 3, 8, 1, 2, 7 };

struct embed_case {
	uint32_t n_mb, batch, seq, channels, vocab, positions;
	float rate;
};

/* A vocabulary far larger than what occurs, one in which every token occurs often, and one token only. */
static const struct embed_case cases[] = {
	{ 1, 1, 1, 5, 3, 4, 0.0f },  { 3, 2, 7, 40, 1000, 16, 0.2f },  { 7, 3, 11, 33, 20, 11, 0.0f },
	{ 9, 1, 5, 16, 1, 5, 0.1f }, { 2, 4, 64, 80, 300, 100, 0.0f },
};

static uint32_t *test_tokens(size_t n, uint32_t vocab)
{
	uint32_t *t = test_alloc(n * sizeof(uint32_t));
	for (size_t i = 0; i < n; i++)
		t[i] = (uint32_t)(rng_u64(3, 1, i) % vocab);
	return t;
}

static struct k_embed forward_of(const struct embed_case *c, const uint32_t *tokens, const float *wte, const float *wpe,
				 float *x)
{
	return (struct k_embed){ .n_mb = c->n_mb,
				 .batch = c->batch,
				 .seq = c->seq,
				 .channels = c->channels,
				 .vocab = c->vocab,
				 .tokens = tokens,
				 .wte = wte,
				 .wpe = wpe,
				 .x = x,
				 .dropout = { c->rate, 21, streams } };
}

static void check_embed(const struct embed_case *c)
{
	const struct k_dims dims = { .n_mb = c->n_mb, .batch = c->batch, .seq = c->seq, .channels = c->channels };
	const size_t rows = (size_t)c->batch * c->seq, n = c->n_mb * rows * c->channels;
	uint32_t *tokens = test_tokens(c->n_mb * rows, c->vocab);
	float *wte = test_random((size_t)c->vocab * c->channels, 1, 1.0), *x = test_floats(n), *plain = test_floats(n);
	float *wpe = test_random((size_t)c->positions * c->channels, 2, 1.0);
	struct fixture f;

	assert_true(fixture_open(&f, k_cpu_ops(), "", 2, &dims));
	struct k_embed a = forward_of(c, tokens, wte, wpe, x);
	f.ops->embed(f.s, &a);
	a.wpe = NULL;
	a.x = plain;
	a.dropout.rate = 0.0f;
	f.ops->embed(f.s, &a);
	fixture_wait(&f);
	for (size_t i = 0; i < n; i++) {
		size_t row = i / c->channels, col = i % c->channels;
		float token = wte[tokens[row] * (size_t)c->channels + col];
		float sum = token + wpe[row % c->seq * c->channels + col];
		const struct k_dropout d = { c->rate, 21, streams };
		float factor = (float)dropout_factor(&d, (uint32_t)(row / rows), row % rows * c->channels + col);
		assert_near_size("x", &x[i], &(double){ (double)sum * (double)factor }, 1, 2.0, 1e-6);
		assert_true(plain[i] == token);
	}
	fixture_close(&f);
	free(tokens);
	free(wte);
	free(wpe);
	free(x);
	free(plain);
}

static void embed_adds_token_and_position(void **state)
{
	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(cases); i++)
		check_embed(&cases[i]);
}

/* Dense leaves, token order, then the tree: what the contract says, done the slow way. */
static void dense_leaves(const struct embed_case *c, const uint32_t *tokens, const float *dx, float *wte, float *wpe)
{
	const size_t rows = (size_t)c->batch * c->seq, nte = (size_t)c->vocab * c->channels;
	const size_t npe = (size_t)c->positions * c->channels;
	const struct k_dropout d = { c->rate, 21, streams };

	memset(wte, 0, c->n_mb * nte * sizeof(float));
	memset(wpe, 0, c->n_mb * npe * sizeof(float));
	for (uint32_t k = 0; k < c->n_mb; k++)
		for (size_t r = 0; r < rows; r++)
			for (uint32_t i = 0; i < c->channels; i++) {
				float g = dx[(k * rows + r) * c->channels + i];
				g *= (float)dropout_factor(&d, k, r * c->channels + i);
				wte[k * nte + tokens[k * rows + r] * (size_t)c->channels + i] += g;
				wpe[k * npe + r % c->seq * c->channels + i] += g;
			}
	test_tree(wte, c->n_mb, nte);
	test_tree(wpe, c->n_mb, npe);
}

static void check_embed_backward(const struct embed_case *c)
{
	const struct k_dims dims = {
		.n_mb = c->n_mb, .batch = c->batch, .seq = c->seq, .channels = c->channels, .vocab = c->vocab
	};
	const size_t rows = (size_t)c->batch * c->seq, n = c->n_mb * rows * c->channels;
	const size_t nte = (size_t)c->vocab * c->channels, npe = (size_t)c->positions * c->channels;
	uint32_t *tokens = test_tokens(c->n_mb * rows, c->vocab);
	float *dx = test_random(n, 1, 1.0), *dwte = test_floats(nte), *dwpe = test_floats(npe);
	float *want_te = test_floats(nte * c->n_mb), *want_pe = test_floats(npe * c->n_mb);
	struct fixture f;

	/* Negative zeros must come out as +0, as dense leaves make them. */
	for (size_t i = 0; i < n; i += 3)
		dx[i] = -0.0f;
	assert_true(fixture_open(&f, k_cpu_ops(), "", 3, &dims));
	const struct k_embed_backward a = { .n_mb = c->n_mb,
					    .batch = c->batch,
					    .seq = c->seq,
					    .channels = c->channels,
					    .vocab = c->vocab,
					    .positions = c->positions,
					    .tokens = tokens,
					    .dx = dx,
					    .dwte = dwte,
					    .dwpe = dwpe,
					    .dropout = { c->rate, 21, streams } };
	f.ops->embed_backward(f.s, &a);
	fixture_wait(&f);
	dense_leaves(c, tokens, dx, want_te, want_pe);
	assert_bits("dwte", dwte, want_te, nte * sizeof(float));
	assert_bits("dwpe", dwpe, want_pe, npe * sizeof(float));
	fixture_close(&f);
	float *const floats[] = { dx, dwte, dwpe, want_te, want_pe };
	for (size_t i = 0; i < ARRAY_LEN(floats); i++)
		free(floats[i]);
	free(tokens);
}

static void embed_backward_is_the_tree_of_dense_leaves(void **state)
{
	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(cases); i++)
		check_embed_backward(&cases[i]);
}

/* ------------------------------------------------------------ cross-entropy */

struct xent_data {
	uint32_t n_mb, rows, vocab;
	const uint32_t *targets;
	double *logits;
};

static void xent_reference(const struct xent_data *d, double *loss)
{
	for (uint32_t k = 0; k < d->n_mb; k++) {
		uint32_t counted = 0;
		loss[k] = 0.0;
		for (size_t r = (size_t)k * d->rows; r < (size_t)(k + 1) * d->rows; r++) {
			const double *x = d->logits + r * d->vocab;
			double max = -INFINITY, sum = 0.0;
			if (d->targets[r] == K_IGNORE_TARGET)
				continue;
			for (uint32_t i = 0; i < d->vocab; i++)
				max = x[i] > max ? x[i] : max;
			for (uint32_t i = 0; i < d->vocab; i++)
				sum += exp(x[i] - max);
			loss[k] += max + log(sum) - x[d->targets[r]];
			counted++;
		}
		loss[k] = counted ? loss[k] / counted : 0.0;
	}
}

static double xent_total(void *ctx)
{
	const struct xent_data *d = ctx;
	double loss[8], total = 0.0;

	xent_reference(d, loss);
	for (uint32_t k = 0; k < d->n_mb; k++)
		total += loss[k];
	return total;
}

static void check_xent(uint32_t n_mb, uint32_t rows, uint32_t vocab, double size)
{
	const struct k_dims dims = { .n_mb = n_mb, .batch = 1, .seq = rows, .vocab = vocab };
	const size_t n = (size_t)n_mb * rows * vocab;
	uint32_t *targets = test_tokens((size_t)n_mb * rows, vocab);
	float *logits = test_random(n, 1, size), *before = test_floats(n);
	double loss[8], only[8], want[8];
	struct xent_data d = { n_mb, rows, vocab, targets, test_doubles(logits, n) };
	struct fixture f;

	for (size_t i = 2; i < (size_t)n_mb * rows; i += 5)
		targets[i] = K_IGNORE_TARGET;
	if (n_mb > 1) /* a micro-batch without any target */
		for (uint32_t r = 0; r < rows; r++)
			targets[rows + r] = K_IGNORE_TARGET;
	memcpy(before, logits, n * sizeof(float));
	assert_true(fixture_open(&f, k_cpu_ops(), "", 2, &dims));
	struct k_xent a = { n_mb, rows, vocab, true, logits, targets, only, 0, 0 };
	f.ops->xent(f.s, &a);
	fixture_wait(&f);
	assert_bits("logits of loss_only", logits, before, n * sizeof(float));
	a.loss_only = false;
	a.loss = loss;
	f.ops->xent(f.s, &a);
	fixture_wait(&f);
	assert_bits("loss with and without gradient", loss, only, n_mb * sizeof(double));
	xent_reference(&d, want);
	for (uint32_t k = 0; k < n_mb; k++)
		assert_true(fabs(loss[k] - want[k]) <= 3e-7 * (1.0 + fabs(want[k])));
	assert_gradient("dlogits", logits, d.logits, n, xent_total, &d, 200, 1e-5);
	fixture_close(&f);
	free(targets);
	free(logits);
	free(before);
	free(d.logits);
}

static void xent_matches_reference_and_differences(void **state)
{
	(void)state;
	check_xent(1, 1, 1, 1.0);
	check_xent(3, 13, 257, 4.0);
	check_xent(2, 6, 5003, 30.0);
}

/* A micro-batch in pieces: the bits of the whole, with gradient or without. */
static void xent_in_pieces_is_the_whole(void **state)
{
	enum { ROWS = 37, VOCAB = 301 };
	const struct k_dims dims = { .n_mb = 1, .batch = 1, .seq = ROWS, .vocab = VOCAB };
	const uint32_t end[] = { 16, 17, 32, ROWS };
	uint32_t *targets = test_tokens(ROWS, VOCAB);
	struct fixture f;
	(void)state;

	assert_true(fixture_open(&f, k_cpu_ops(), "", 2, &dims));
	targets[0] = targets[16] = targets[ROWS - 1] = K_IGNORE_TARGET;
	for (int loss_only = 0; loss_only <= 1; loss_only++) {
		float *whole = test_random(ROWS * VOCAB, 1, 4.0), *pieces = test_random(ROWS * VOCAB, 1, 4.0);
		double want, got;
		f.ops->xent(f.s, &(struct k_xent){ 1, ROWS, VOCAB, loss_only, whole, targets, &want, 0, 0 });
		for (uint32_t i = 0, first = 0; i < ARRAY_LEN(end); first = end[i++])
			f.ops->xent(f.s, &(struct k_xent){ .n_mb = 1,
							   .rows = end[i] - first,
							   .vocab = VOCAB,
							   .loss_only = loss_only,
							   .logits = pieces + (size_t)first * VOCAB,
							   .targets = targets,
							   .loss = &got,
							   .first_row = first,
							   .all_rows = ROWS });
		fixture_wait(&f);
		assert_bits("loss", &got, &want, sizeof(got));
		assert_bits("logits", pieces, whole, ROWS * VOCAB * sizeof(float));
		free(whole);
		free(pieces);
	}
	fixture_close(&f);
	free(targets);
}

static void xent_of_a_number_gone_is_none(void **state)
{
	const struct k_dims dims = { .n_mb = 1, .batch = 1, .seq = 2, .vocab = 20 };
	const uint32_t targets[2] = { 3, 4 };
	float bad[] = { NAN, INFINITY };
	struct fixture f;
	(void)state;

	assert_true(fixture_open(&f, k_cpu_ops(), "", 1, &dims));
	for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
		float *logits = test_random(40, 1, 1.0);
		double loss;
		logits[7] = bad[i];
		const struct k_xent a = { 1, 2, 20, false, logits, targets, &loss, 0, 0 };
		f.ops->xent(f.s, &a);
		fixture_wait(&f);
		assert_false(isfinite(loss));
		assert_true(isnan(logits[0]));
		free(logits);
	}
	fixture_close(&f);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(embed_adds_token_and_position),
		cmocka_unit_test(embed_backward_is_the_tree_of_dense_leaves),
		cmocka_unit_test(xent_matches_reference_and_differences),
		cmocka_unit_test(xent_in_pieces_is_the_whole),
		cmocka_unit_test(xent_of_a_number_gone_is_none),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
