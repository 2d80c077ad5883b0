/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attention with a window, with packed documents, and with both: against a naive
 * one in double, with blocks that see only a part of the keys, and a document
 * packed against the same one alone.
 */
#include "tests/unit/test_kernels.h"

static const uint64_t streams[] = { 4, 1ull << 35, 9 };

struct attn_case {
	uint32_t n_mb, batch, q_len, kv_len, heads, kv_heads, head_dim, window;
	float rate;
	const uint32_t
		*documents; /* lengths in the first sample, then 0; each one longer in the next sample; or NULL */
};

struct attn {
	const struct attn_case *c;
	size_t nq, nk, nl;
	float *q, *k, *v, *out, *lse, *dout, *dq, *dk, *dv;
	uint32_t *first_key;
	struct k_dropout dropout;
	double *dbl_q, *dbl_k, *dbl_v, *w;
};

static uint32_t document_start(const struct attn_case *c, uint32_t sample, uint32_t position)
{
	uint32_t start = 0;

	for (const uint32_t *n = c->documents; *n && position >= start + *n + sample; n++)
		start += *n + sample;
	return start;
}

static void attn_open(struct attn *d, const struct attn_case *c)
{
	const size_t samples = (size_t)c->n_mb * c->batch;

	*d = (struct attn){ .c = c, .dropout = { c->rate, 5, streams } };
	d->nq = samples * c->q_len * c->heads * c->head_dim;
	d->nk = samples * c->kv_len * c->kv_heads * c->head_dim;
	d->nl = samples * c->heads * c->q_len;
	d->q = test_random(d->nq, 1, 1.5);
	d->k = test_random(d->nk, 2, 1.5);
	d->v = test_random(d->nk, 3, 1.5);
	d->dout = test_random(d->nq, 4, 1.0);
	d->out = test_floats(d->nq);
	d->lse = test_floats(d->nl);
	d->dq = test_floats(d->nq);
	d->dk = test_floats(d->nk);
	d->dv = test_floats(d->nk);
	d->dbl_q = test_doubles(d->q, d->nq);
	d->dbl_k = test_doubles(d->k, d->nk);
	d->dbl_v = test_doubles(d->v, d->nk);
	d->w = test_doubles(d->dout, d->nq);
	if (!c->documents)
		return;
	d->first_key = test_alloc(samples * c->q_len * sizeof(uint32_t));
	for (uint32_t s = 0; s < samples; s++)
		for (uint32_t i = 0; i < c->q_len; i++)
			d->first_key[s * c->q_len + i] = document_start(c, s, c->kv_len - c->q_len + i);
}

static void attn_close(struct attn *d)
{
	void *const all[] = { d->q,  d->k,  d->v,     d->out,   d->lse,   d->dout, d->dq,
			      d->dk, d->dv, d->dbl_q, d->dbl_k, d->dbl_v, d->w,    d->first_key };
	for (size_t i = 0; i < ARRAY_LEN(all); i++)
		free(all[i]);
}

static struct k_attention_backward attn_args(const struct attn *d)
{
	const struct attn_case *c = d->c;
	const size_t qs = (size_t)c->heads * c->head_dim, ks = (size_t)c->kv_heads * c->head_dim;

	return (struct k_attention_backward){ .fwd = { .n_mb = c->n_mb,
						       .batch = c->batch,
						       .q_len = c->q_len,
						       .kv_len = c->kv_len,
						       .heads = c->heads,
						       .kv_heads = c->kv_heads,
						       .head_dim = c->head_dim,
						       .window = c->window,
						       .first_key = d->first_key,
						       .scale = 0.3f,
						       .q = d->q,
						       .k = d->k,
						       .v = d->v,
						       .q_stride = qs,
						       .k_stride = ks,
						       .v_stride = ks,
						       .out_stride = qs,
						       .out = d->out,
						       .lse = d->lse,
						       .dropout = d->dropout },
					      .dout = d->dout,
					      .dq = d->dq,
					      .dk = d->dk,
					      .dv = d->dv };
}

static struct k_dims attn_dims(const struct attn_case *c)
{
	return (struct k_dims){ .n_mb = c->n_mb, .batch = c->batch, .seq = c->kv_len, .head_dim = c->head_dim };
}

/* One query row of one head. */
static void row_reference(const struct attn *d, uint32_t s, uint32_t h, uint32_t i, double *out, double *lse)
{
	const struct attn_case *c = d->c;
	const uint32_t kvh = h / (c->heads / c->kv_heads), hd = c->head_dim, end = c->kv_len - c->q_len + i + 1;
	const double *q = d->dbl_q + (((size_t)s * c->q_len + i) * c->heads + h) * hd;
	double p[1024], max = -INFINITY, sum = 0.0;
	uint32_t first = c->documents ? document_start(c, s, end - 1) : 0;

	if (c->window && end - first > c->window)
		first = end - c->window;
	for (uint32_t j = first; j < end; j++) {
		const double *k = d->dbl_k + (((size_t)s * c->kv_len + j) * c->kv_heads + kvh) * hd;
		p[j] = 0.0;
		for (uint32_t e = 0; e < hd; e++)
			p[j] += q[e] * k[e] * (double)0.3f;
		max = p[j] > max ? p[j] : max;
	}
	for (uint32_t j = first; j < end; j++)
		sum += p[j] = exp(p[j] - max);
	memset(out, 0, hd * sizeof(double));
	for (uint32_t j = first; j < end; j++) {
		const double *v = d->dbl_v + (((size_t)s * c->kv_len + j) * c->kv_heads + kvh) * hd;
		uint64_t at = (((uint64_t)(s % c->batch) * c->heads + h) * c->q_len + i) * c->kv_len + j;
		double w = p[j] / sum * dropout_factor(&d->dropout, s / c->batch, at);
		for (uint32_t e = 0; e < hd; e++)
			out[e] += w * v[e];
	}
	*lse = max + log(sum);
}

static void reference(const struct attn *d, double *out, double *lse)
{
	const struct attn_case *c = d->c;

	for (uint32_t s = 0; s < c->n_mb * c->batch; s++)
		for (uint32_t h = 0; h < c->heads; h++)
			for (uint32_t i = 0; i < c->q_len; i++)
				row_reference(d, s, h, i,
					      out + (((size_t)s * c->q_len + i) * c->heads + h) * c->head_dim,
					      lse + ((size_t)s * c->heads + h) * c->q_len + i);
}

static double attn_loss(void *ctx)
{
	const struct attn *d = ctx;
	double *out = test_alloc(d->nq * sizeof(double)), *lse = test_alloc(d->nl * sizeof(double)), loss = 0.0;

	reference(d, out, lse);
	for (size_t i = 0; i < d->nq; i++)
		loss += d->w[i] * out[i];
	free(out);
	free(lse);
	return loss;
}

static const uint32_t some_documents[] = { 30, 1, 64, 65, 2, 0 };
static const uint32_t short_documents[] = { 5, 1, 3, 1, 9, 2, 0 };
static const uint32_t long_documents[] = { 300, 40, 0 };

static const struct attn_case forward_cases[] = {
	{ 1, 1, 200, 200, 5, 1, 80, 1, 0.0f, NULL },
	{ 1, 1, 200, 200, 5, 1, 80, 3, 0.0f, NULL },
	{ 2, 1, 200, 200, 5, 1, 80, 64, 0.1f, NULL },
	{ 1, 2, 131, 131, 4, 2, 20, 100, 0.0f, NULL },
	{ 1, 1, 131, 131, 2, 2, 33, 1000, 0.0f, NULL },
	{ 2, 2, 200, 200, 5, 1, 80, 0, 0.0f, some_documents },
	{ 3, 1, 90, 90, 2, 1, 16, 0, 0.2f, short_documents },
	{ 1, 1, 400, 400, 1, 1, 24, 0, 0.0f, long_documents },
	{ 1, 2, 400, 400, 2, 1, 24, 70, 0.1f, long_documents },
	{ 2, 1, 200, 200, 5, 5, 8, 3, 0.0f, some_documents },
	/* Decoding: behind earlier keys, some of them another document's. */
	{ 1, 2, 1, 777, 4, 2, 16, 50, 0.0f, NULL },
	{ 1, 2, 7, 130, 3, 1, 20, 5, 0.0f, NULL },
	{ 1, 2, 100, 230, 3, 1, 20, 0, 0.0f, some_documents },
	{ 1, 1, 100, 230, 3, 1, 20, 40, 0.0f, some_documents },
};

static void check_forward(const struct attn_case *c, const char *profile)
{
	const struct k_dims dims = attn_dims(c);
	struct fixture f;
	struct attn d;

	if (!fixture_open(&f, k_cpu_ops(), profile, 2, &dims))
		return;
	attn_open(&d, c);
	double *out = test_alloc(d.nq * sizeof(double)), *lse = test_alloc(d.nl * sizeof(double));
	const struct k_attention a = attn_args(&d).fwd;
	f.ops->attention(f.s, &a);
	fixture_wait(&f);
	reference(&d, out, lse);
	assert_near("out", d.out, out, d.nq, 5e-6);
	assert_near("lse", d.lse, lse, d.nl, 5e-6);
	fixture_close(&f);
	free(out);
	free(lse);
	attn_close(&d);
}

static void forward_matches_naive(void **state)
{
	(void)state;
	for (size_t p = 0; p < ARRAY_LEN(test_profiles); p++)
		for (size_t i = 0; i < ARRAY_LEN(forward_cases); i++)
			check_forward(&forward_cases[i], test_profiles[p]);
}

static const struct attn_case backward_cases[] = {
	{ 1, 1, 70, 70, 5, 1, 8, 1, 0.0f, NULL },
	{ 2, 1, 70, 70, 2, 1, 10, 3, 0.0f, NULL },
	{ 1, 1, 150, 150, 2, 2, 8, 40, 0.15f, NULL },
	{ 1, 1, 150, 150, 2, 1, 8, 80, 0.0f, NULL },
	{ 1, 2, 80, 80, 4, 2, 8, 0, 0.0f, short_documents },
	{ 2, 1, 180, 180, 2, 1, 8, 0, 0.1f, some_documents },
	{ 1, 1, 180, 180, 3, 1, 8, 20, 0.0f, some_documents },
};

static void assert_tiny(const char *what, const float *got, size_t n)
{
	const double zero = 0.0;

	for (size_t i = 0; i < n; i++)
		assert_near_size(what, &got[i], &zero, 1, 1.0, 1e-6);
}

static void check_backward(const struct attn_case *c, const char *profile)
{
	const struct k_dims dims = attn_dims(c);
	struct fixture f;
	struct attn d;

	assert_true(fixture_open(&f, k_cpu_ops(), profile, 2, &dims));
	attn_open(&d, c);
	const struct k_attention_backward a = attn_args(&d);
	f.ops->attention(f.s, &a.fwd);
	f.ops->attention_backward(f.s, &a);
	fixture_wait(&f);
	if (c->window == 1) {
		/* Who sees only itself gives it the whole weight, whatever the score. */
		assert_tiny("dq", d.dq, d.nq);
		assert_tiny("dk", d.dk, d.nk);
	} else {
		assert_gradient("dq", d.dq, d.dbl_q, d.nq, attn_loss, &d, 30, 1e-5);
		assert_gradient("dk", d.dk, d.dbl_k, d.nk, attn_loss, &d, 30, 1e-5);
	}
	assert_gradient("dv", d.dv, d.dbl_v, d.nk, attn_loss, &d, 30, 1e-5);
	fixture_close(&f);
	attn_close(&d);
}

static void backward_matches_differences(void **state)
{
	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(backward_cases); i++) {
		check_backward(&backward_cases[i], "");
		check_backward(&backward_cases[i], "portable");
	}
}

/* Runs c with other windows and documents in it, and expects the bits of d. */
static void assert_same_attention(struct fixture *f, const struct attn *d, const struct attn_case *c)
{
	struct attn other;

	attn_open(&other, c);
	const struct k_attention_backward a = attn_args(&other);
	f->ops->attention(f->s, &a.fwd);
	f->ops->attention_backward(f->s, &a);
	fixture_wait(f);
	assert_bits("out", other.out, d->out, d->nq * sizeof(float));
	assert_bits("lse", other.lse, d->lse, d->nl * sizeof(float));
	assert_bits("dq", other.dq, d->dq, d->nq * sizeof(float));
	assert_bits("dk", other.dk, d->dk, d->nk * sizeof(float));
	assert_bits("dv", other.dv, d->dv, d->nk * sizeof(float));
	attn_close(&other);
}

/* A window as wide as the sequence, or wider, and one document are no limits: not a bit changes. */
static void limits_that_limit_nothing(void **state)
{
	static const uint32_t one_document[] = { 200, 0 };
	const struct attn_case none = { 1, 1, 200, 200, 4, 2, 40, 0, 0.1f, NULL };
	const uint32_t windows[] = { 200, 201, UINT32_MAX };
	const struct k_dims dims = attn_dims(&none);
	(void)state;

	for (size_t p = 0; p < ARRAY_LEN(test_profiles); p++) {
		struct fixture f;
		struct attn d;
		if (!fixture_open(&f, k_cpu_ops(), test_profiles[p], 2, &dims))
			continue;
		attn_open(&d, &none);
		const struct k_attention_backward a = attn_args(&d);
		f.ops->attention(f.s, &a.fwd);
		f.ops->attention_backward(f.s, &a);
		fixture_wait(&f);
		for (size_t i = 0; i < ARRAY_LEN(windows); i++) {
			struct attn_case c = none;
			c.window = windows[i];
			assert_same_attention(&f, &d, &c);
			c.documents = one_document;
			assert_same_attention(&f, &d, &c);
		}
		attn_close(&d);
		fixture_close(&f);
	}
}

/* Keys that no row of a block sees are not touched: not a number there does not reach the block. */
static void unseen_keys_are_left_out(void **state)
{
	static const uint32_t two_documents[] = { 70, 0 };
	const struct attn_case cases[] = { { 1, 1, 192, 192, 2, 1, 16, 20, 0.0f, NULL },
					   { 1, 1, 192, 192, 2, 1, 16, 0, 0.0f, two_documents } };
	const uint32_t bad[] = { 108, 70 }, clean[] = { 128, 70 }; /* keys that are, and the first row that is well */
	(void)state;

	for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
		const struct attn_case *c = &cases[i];
		const struct k_dims dims = attn_dims(c);
		const size_t qs = (size_t)c->heads * c->head_dim, ks = (size_t)c->kv_heads * c->head_dim;
		struct fixture f;
		struct attn d;

		assert_true(fixture_open(&f, k_cpu_ops(), "", 2, &dims));
		attn_open(&d, c);
		for (size_t e = 0; e < bad[i] * ks; e++)
			d.k[e] = d.v[e] = NAN;
		const struct k_attention_backward a = attn_args(&d);
		f.ops->attention(f.s, &a.fwd);
		f.ops->attention_backward(f.s, &a);
		fixture_wait(&f);
		assert_true(isnan(d.out[0]));
		for (size_t e = clean[i] * qs; e < d.nq; e++)
			assert_true(isfinite(d.out[e]) && isfinite(d.dq[e]));
		for (size_t e = clean[i] * ks; e < d.nk; e++)
			assert_true(isfinite(d.dk[e]) && isfinite(d.dv[e]));
		fixture_close(&f);
		attn_close(&d);
	}
}

/* ------------------------------------------------------------ packed or alone */

/* Rows first..end of the packed sequence, on their own. */
static void check_document(struct fixture *f, const struct attn *packed, struct attn *alone, uint32_t first,
			   uint32_t end)
{
	const struct attn_case *c = packed->c;
	const size_t qs = (size_t)c->heads * c->head_dim, ks = (size_t)c->kv_heads * c->head_dim;
	const uint32_t n = end - first;
	struct k_attention_backward a = attn_args(alone);

	a.fwd.first_key = NULL;
	a.fwd.q_len = a.fwd.kv_len = n;
	a.fwd.q += first * qs;
	a.fwd.k += first * ks;
	a.fwd.v += first * ks;
	a.fwd.out += first * qs;
	a.dout += first * qs;
	a.dq += first * qs;
	a.dk += first * ks;
	a.dv += first * ks;
	f->ops->attention(f->s, &a.fwd);
	f->ops->attention_backward(f->s, &a);
	fixture_wait(f);
	assert_bits("out", a.fwd.out, packed->out + first * qs, n * qs * sizeof(float));
	assert_bits("dq", a.dq, packed->dq + first * qs, n * qs * sizeof(float));
	assert_bits("dk", a.dk, packed->dk + first * ks, n * ks * sizeof(float));
	assert_bits("dv", a.dv, packed->dv + first * ks, n * ks * sizeof(float));
	for (uint32_t h = 0; h < c->heads; h++)
		assert_bits("lse", alone->lse + h * n, packed->lse + h * c->q_len + first, n * sizeof(float));
}

static void packed_is_alone(void **state)
{
	static const struct attn_case cases[] = {
		{ 1, 1, 200, 200, 5, 1, 80, 0, 0.0f, some_documents },
		{ 1, 1, 90, 90, 2, 1, 16, 0, 0.0f, short_documents },
		{ 1, 1, 700, 700, 2, 1, 24, 0, 0.0f, long_documents },
		{ 1, 1, 700, 700, 4, 2, 24, 90, 0.0f, long_documents },
	};
	unsigned ran = 0;
	(void)state;

	for (size_t i = 0; i < ARRAY_LEN(test_profiles) * ARRAY_LEN(cases); i++) {
		const struct attn_case *c = &cases[i % ARRAY_LEN(cases)];
		const struct k_dims dims = attn_dims(c);
		struct attn packed, alone;
		struct fixture f;

		if (!fixture_open(&f, k_cpu_ops(), test_profiles[i / ARRAY_LEN(cases)], 2, &dims))
			continue;
		attn_open(&packed, c);
		attn_open(&alone, c);
		const struct k_attention_backward a = attn_args(&packed);
		f.ops->attention(f.s, &a.fwd);
		f.ops->attention_backward(f.s, &a);
		fixture_wait(&f);
		for (uint32_t first = 0, end; first < c->q_len; first = end) {
			for (end = first; end < c->q_len && document_start(c, 0, end) == first;)
				end++;
			check_document(&f, &packed, &alone, first, end);
			ran++;
		}
		attn_close(&packed);
		attn_close(&alone);
		fixture_close(&f);
	}
	assert_true(ran >= 20);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(forward_matches_naive),     cmocka_unit_test(backward_matches_differences),
		cmocka_unit_test(limits_that_limit_nothing), cmocka_unit_test(unseen_keys_are_left_out),
		cmocka_unit_test(packed_is_alone),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
