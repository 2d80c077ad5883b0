/* SPDX-License-Identifier: Apache-2.0 */
/* Attention against a naive one in double: odd head sizes, grouped heads, fused layouts, decoding, dropout. */
#include "tests/unit/test_kernels.h"

static const uint64_t streams[] = { 4, 1ull << 35, 9 };

struct attn_case {
	uint32_t n_mb, batch, q_len, kv_len, heads, kv_heads, head_dim;
	float rate;
	uint32_t cache; /* rows of a key cache longer than kv_len, or 0 */
};

static const struct attn_case forward_cases[] = {
	{ 1, 1, 1, 1, 1, 1, 1, 0.0f, 0 },       { 2, 2, 100, 100, 5, 5, 80, 0.1f, 0 },
	{ 1, 3, 1, 777, 4, 2, 16, 0.0f, 1000 }, { 1, 2, 7, 130, 3, 1, 20, 0.0f, 150 },
	{ 3, 1, 65, 65, 2, 1, 33, 0.2f, 0 },    { 1, 1, 300, 300, 2, 2, 64, 0.0f, 0 },
};

struct attn_data {
	const struct attn_case *c;
	struct k_dropout dropout;
	double *q, *k, *v, *w;
};

static size_t kv_rows(const struct attn_case *c)
{
	return c->cache ? c->cache : c->kv_len;
}

/* The output of one query row of one head. */
static void row_reference(const struct attn_data *d, uint32_t s, uint32_t h, uint32_t i, double *out, double *lse)
{
	const struct attn_case *c = d->c;
	uint32_t kvh = h / (c->heads / c->kv_heads), hd = c->head_dim, seen = c->kv_len - c->q_len + i + 1;
	const double *q = d->q + (((size_t)s * c->q_len + i) * c->heads + h) * hd;
	double p[1024], max = -INFINITY, sum = 0.0;

	for (uint32_t j = 0; j < seen; j++) {
		const double *k = d->k + (((size_t)s * kv_rows(c) + j) * c->kv_heads + kvh) * hd;
		p[j] = 0.0;
		for (uint32_t e = 0; e < hd; e++)
			p[j] += q[e] * k[e] * 0.3;
		max = p[j] > max ? p[j] : max;
	}
	for (uint32_t j = 0; j < seen; j++)
		sum += p[j] = exp(p[j] - max);
	for (uint32_t e = 0; e < hd; e++)
		out[e] = 0.0;
	for (uint32_t j = 0; j < seen; j++) {
		const double *v = d->v + (((size_t)s * kv_rows(c) + j) * c->kv_heads + kvh) * hd;
		uint64_t at = (((uint64_t)(s % c->batch) * c->heads + h) * c->q_len + i) * c->kv_len + j;
		double w = p[j] / sum * dropout_factor(&d->dropout, s / c->batch, at);
		for (uint32_t e = 0; e < hd; e++)
			out[e] += w * v[e];
	}
	*lse = max + log(sum);
}

static void reference(const struct attn_data *d, double *out, double *lse)
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
	const struct attn_data *d = ctx;
	const struct attn_case *c = d->c;
	size_t n = (size_t)c->n_mb * c->batch * c->q_len * c->heads * c->head_dim;
	double *out = test_alloc(n * sizeof(double)), *lse = test_alloc(n * sizeof(double)), loss = 0.0;

	reference(d, out, lse);
	for (size_t i = 0; i < n; i++)
		loss += d->w[i] * out[i];
	free(out);
	free(lse);
	return loss;
}

static void check_forward(const struct attn_case *c)
{
	const size_t samples = (size_t)c->n_mb * c->batch, nq = samples * c->q_len * c->heads * c->head_dim;
	const size_t nk = samples * kv_rows(c) * c->kv_heads * c->head_dim, nl = samples * c->heads * c->q_len;
	const struct k_dims dims = { .n_mb = c->n_mb, .batch = c->batch, .seq = c->kv_len, .head_dim = c->head_dim };
	float *q = test_random(nq, 1, 1.5), *k = test_random(nk, 2, 1.5), *v = test_random(nk, 3, 1.5);
	float *out = test_floats(nq), *lse = test_floats(nl);
	struct attn_data d = {
		c, { c->rate, 5, streams }, test_doubles(q, nq), test_doubles(k, nk), test_doubles(v, nk), NULL
	};
	double *want = test_alloc(nq * sizeof(double)), *want_lse = test_alloc(nl * sizeof(double));
	struct fixture f;

	reference(&d, want, want_lse);
	for (size_t p = 0; p < ARRAY_LEN(test_profiles); p++) {
		if (!fixture_open(&f, k_cpu_ops(), test_profiles[p], 2, &dims))
			continue;
		size_t qs = (size_t)c->heads * c->head_dim, ks = (size_t)c->kv_heads * c->head_dim;
		const struct k_attention a = { .n_mb = c->n_mb,
					       .batch = c->batch,
					       .q_len = c->q_len,
					       .kv_len = c->kv_len,
					       .heads = c->heads,
					       .kv_heads = c->kv_heads,
					       .head_dim = c->head_dim,
					       .scale = 0.3f,
					       .q = q,
					       .k = k,
					       .v = v,
					       .q_stride = qs,
					       .k_stride = ks,
					       .v_stride = ks,
					       .out_stride = qs,
					       .kv_sample_stride = c->cache * ks,
					       .out = out,
					       .lse = lse,
					       .dropout = d.dropout };
		f.ops->attention(f.s, &a);
		fixture_wait(&f);
		assert_near("out", out, want, nq, 5e-6);
		assert_near("lse", lse, want_lse, nl, 5e-6);
		fixture_close(&f);
	}
	float *const floats[] = { q, k, v, out, lse };
	double *const doubles[] = { d.q, d.k, d.v, want, want_lse };
	for (size_t i = 0; i < ARRAY_LEN(floats); i++)
		free(floats[i]);
	for (size_t i = 0; i < ARRAY_LEN(doubles); i++)
		free(doubles[i]);
}

static void forward_matches_naive(void **state)
{
	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(forward_cases); i++)
		check_forward(&forward_cases[i]);
}

/* q, k and v side by side in one buffer, as a fused projection leaves them; gradients likewise. */
static void fuse(const struct attn_case *c, const float *q, const float *k, const float *v, float *qkv)
{
	const size_t rows = (size_t)c->n_mb * c->batch * c->q_len, nq = (size_t)c->heads * c->head_dim;
	const size_t nk = (size_t)c->kv_heads * c->head_dim, stride = nq + 2 * nk;

	for (size_t r = 0; r < rows; r++) {
		memcpy(qkv + r * stride, q + r * nq, nq * sizeof(float));
		memcpy(qkv + r * stride + nq, k + r * nk, nk * sizeof(float));
		memcpy(qkv + r * stride + nq + nk, v + r * nk, nk * sizeof(float));
	}
}

static void unfuse(const struct attn_case *c, const float *qkv, float *q, float *k, float *v)
{
	const size_t rows = (size_t)c->n_mb * c->batch * c->q_len, nq = (size_t)c->heads * c->head_dim;
	const size_t nk = (size_t)c->kv_heads * c->head_dim, stride = nq + 2 * nk;

	for (size_t r = 0; r < rows; r++) {
		memcpy(q + r * nq, qkv + r * stride, nq * sizeof(float));
		memcpy(k + r * nk, qkv + r * stride + nq, nk * sizeof(float));
		memcpy(v + r * nk, qkv + r * stride + nq + nk, nk * sizeof(float));
	}
}

static const struct attn_case backward_cases[] = {
	{ 1, 1, 1, 1, 1, 1, 1, 0.0f, 0 },
	{ 2, 2, 19, 19, 4, 2, 10, 0.0f, 0 },
	{ 3, 1, 70, 70, 5, 5, 8, 0.15f, 0 },
	{ 1, 1, 131, 131, 2, 1, 24, 0.0f, 0 },
};

static void check_backward(const struct attn_case *c, const char *want_profile)
{
	const size_t samples = (size_t)c->n_mb * c->batch, nq = samples * c->q_len * c->heads * c->head_dim;
	const size_t nk = samples * c->kv_len * c->kv_heads * c->head_dim, nl = samples * c->heads * c->q_len;
	const size_t qs = (size_t)c->heads * c->head_dim, ks = (size_t)c->kv_heads * c->head_dim, stride = qs + 2 * ks;
	const struct k_dims dims = { .n_mb = c->n_mb, .batch = c->batch, .seq = c->kv_len, .head_dim = c->head_dim };
	float *q = test_random(nq, 1, 1.5), *k = test_random(nk, 2, 1.5), *v = test_random(nk, 3, 1.5);
	float *qkv = test_floats(nq + 2 * nk), *dqkv = test_floats(nq + 2 * nk), *dout = test_random(nq, 4, 1.0);
	float *out = test_floats(nq), *lse = test_floats(nl);
	struct attn_data d = { c,
			       { c->rate, 5, streams },
			       test_doubles(q, nq),
			       test_doubles(k, nk),
			       test_doubles(v, nk),
			       test_doubles(dout, nq) };
	struct fixture f;

	fuse(c, q, k, v, qkv);
	if (fixture_open(&f, k_cpu_ops(), want_profile, 2, &dims)) {
		const struct k_attention_backward a = { .fwd = { .n_mb = c->n_mb,
								 .batch = c->batch,
								 .q_len = c->q_len,
								 .kv_len = c->kv_len,
								 .heads = c->heads,
								 .kv_heads = c->kv_heads,
								 .head_dim = c->head_dim,
								 .scale = 0.3f,
								 .q = qkv,
								 .k = qkv + qs,
								 .v = qkv + qs + ks,
								 .q_stride = stride,
								 .k_stride = stride,
								 .v_stride = stride,
								 .out_stride = qs,
								 .out = out,
								 .lse = lse,
								 .dropout = d.dropout },
							.dout = dout,
							.dq = dqkv,
							.dk = dqkv + qs,
							.dv = dqkv + qs + ks };
		f.ops->attention(f.s, &a.fwd);
		f.ops->attention_backward(f.s, &a);
		fixture_wait(&f);
		unfuse(c, dqkv, q, k, v);
		assert_gradient("dq", q, d.q, nq, attn_loss, &d, 30, 1e-5);
		assert_gradient("dk", k, d.k, nk, attn_loss, &d, 30, 1e-5);
		assert_gradient("dv", v, d.v, nk, attn_loss, &d, 30, 1e-5);
		fixture_close(&f);
	}
	float *const floats[] = { q, k, v, qkv, dqkv, dout, out, lse };
	double *const doubles[] = { d.q, d.k, d.v, d.w };
	for (size_t i = 0; i < ARRAY_LEN(floats); i++)
		free(floats[i]);
	for (size_t i = 0; i < ARRAY_LEN(doubles); i++)
		free(doubles[i]);
}

static void backward_matches_differences(void **state)
{
	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(backward_cases); i++) {
		check_backward(&backward_cases[i], "");
		check_backward(&backward_cases[i], "portable");
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(forward_matches_naive),
		cmocka_unit_test(backward_matches_differences),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
