/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The same bits for any number of threads, for deferred calls, and run after
 * run; and, for everything but products, on any instruction set. A small
 * transformer layer with its loss goes through every operation, on shapes that
 * make several tiles, blocks and tasks.
 */
#include "tests/unit/test_kernels.h"

enum {
	MB = 3,
	BATCH = 2,
	SEQ = 70,
	HEADS = 5,
	HEAD = 24,
	C = HEADS * HEAD,
	FFN = 400,
	VOCAB = 503,
	ROWS = BATCH * SEQ
};

static const struct k_dims dims = { MB, BATCH, SEQ, C, HEADS, HEADS, HEAD, FFN, VOCAB };
static const uint64_t streams[MB] = { 3, 1ull << 33, 12 };

/* Everything that one pass writes, piece by piece, each with its name. */
struct layer {
	uint32_t tokens[MB * ROWS], targets[MB * ROWS];
	float *wte, *wpe, *gamma, *beta, *w_qkv, *b_qkv, *w_proj, *w_fc, *b_fc, *w_out;
	float *x, *y, *mean, *rstd, *qkv, *att, *lse, *proj, *sum, *pre, *h, *out, *res, *logits;
	double loss[MB];
	float *dlogits_x, *dh, *dy, *datt, *dqkv, *dx, *dproj;
	float *dwte, *dwte_head, *dwpe, *dgamma, *dbeta, *dw_qkv, *db_qkv, *dw_proj, *dw_fc, *db_fc, *dw_out;
};

struct piece {
	const char *name;
	size_t offset, floats;
	bool random; /* an input; else an output */
};

#define PIECE(field, n, random)                                      \
	{                                                            \
#field, offsetof(struct layer, field), (n), (random) \
	}
#define ACT ((size_t)MB * ROWS)
static const struct piece pieces[] = {
	PIECE(wte, VOCAB *C, true),
	PIECE(wpe, SEQ *C, true),
	PIECE(gamma, C, true),
	PIECE(beta, C, true),
	PIECE(w_qkv, 3 * C * C, true),
	PIECE(b_qkv, 3 * C, true),
	PIECE(w_proj, C *C, true),
	PIECE(w_fc, C *FFN, true),
	PIECE(b_fc, FFN, true),
	PIECE(w_out, C *FFN, true),
	PIECE(x, ACT *C, false),
	PIECE(y, ACT *C, false),
	PIECE(mean, ACT, false),
	PIECE(rstd, ACT, false),
	PIECE(qkv, ACT * 3 * C, false),
	PIECE(att, ACT *C, false),
	PIECE(lse, ACT *HEADS, false),
	PIECE(proj, ACT *C, false),
	PIECE(sum, ACT *C, false),
	PIECE(pre, ACT *FFN, false),
	PIECE(h, ACT *FFN, false),
	PIECE(out, ACT *C, false),
	PIECE(res, ACT *C, false),
	PIECE(logits, ACT *VOCAB, false),
	PIECE(dlogits_x, ACT *C, false),
	PIECE(dh, ACT *FFN, false),
	PIECE(dy, ACT *C, false),
	PIECE(datt, ACT *C, false),
	PIECE(dqkv, ACT * 3 * C, false),
	PIECE(dx, ACT *C, false),
	PIECE(dproj, ACT *C, false),
	PIECE(dwte, VOCAB *C, false),
	PIECE(dwte_head, VOCAB *C, false),
	PIECE(dwpe, SEQ *C, false),
	PIECE(dgamma, C, false),
	PIECE(dbeta, C, false),
	PIECE(dw_qkv, 3 * C * C, false),
	PIECE(db_qkv, 3 * C, false),
	PIECE(dw_proj, C *C, false),
	PIECE(dw_fc, C *FFN, false),
	PIECE(db_fc, FFN, false),
	PIECE(dw_out, C *FFN, false),
};

static float **piece_at(struct layer *l, size_t i)
{
	return (float **)((char *)l + pieces[i].offset);
}

static void layer_open(struct layer *l)
{
	for (size_t i = 0; i < ARRAY_LEN(pieces); i++)
		*piece_at(l, i) = pieces[i].random ? test_random(pieces[i].floats, i, 0.2)
						   : test_floats(pieces[i].floats);
	for (size_t i = 0; i < MB * ROWS; i++) {
		l->tokens[i] = (uint32_t)(rng_u64(1, 1, i) % VOCAB);
		l->targets[i] = (uint32_t)(rng_u64(1, 2, i) % VOCAB);
	}
}

static void layer_close(struct layer *l)
{
	for (size_t i = 0; i < ARRAY_LEN(pieces); i++)
		free(*piece_at(l, i));
}

static struct k_dropout dropout_of(uint64_t seed)
{
	return (struct k_dropout){ 0.1f, seed, streams };
}

static struct k_attention attention_of(const struct layer *l)
{
	return (struct k_attention){ .n_mb = MB,
				     .batch = BATCH,
				     .q_len = SEQ,
				     .kv_len = SEQ,
				     .heads = HEADS,
				     .kv_heads = HEADS,
				     .head_dim = HEAD,
				     .scale = 0.158f,
				     .q = l->qkv,
				     .k = l->qkv + C,
				     .v = l->qkv + 2 * C,
				     .q_stride = 3 * C,
				     .k_stride = 3 * C,
				     .v_stride = 3 * C,
				     .out_stride = C,
				     .out = l->att,
				     .lse = l->lse,
				     .dropout = dropout_of(2) };
}

static void layer_forward(struct fixture *f, struct layer *l)
{
	const struct k_ops *o = f->ops;
	o->embed(f->s,
		 &(struct k_embed){ MB, BATCH, SEQ, C, VOCAB, 0, l->tokens, l->wte, l->wpe, l->x, dropout_of(1) });
	o->norm(f->s, &(struct k_norm){ .n_mb = MB,
					.rows = ROWS,
					.cols = C,
					.eps = 1e-5f,
					.x = l->x,
					.gamma = l->gamma,
					.beta = l->beta,
					.y = l->y,
					.mean = l->mean,
					.rstd = l->rstd });
	o->linear(f->s,
		  &(struct k_linear){ MB, ROWS, C, 3 * C, false, K_ACT_NONE, l->y, l->w_qkv, l->b_qkv, NULL, l->qkv });
	const struct k_attention a = attention_of(l);
	o->attention(f->s, &a);
	o->linear(f->s, &(struct k_linear){ MB, ROWS, C, C, true, K_ACT_NONE, l->att, l->w_proj, NULL, NULL, l->proj });
	o->norm(f->s, &(struct k_norm){ .n_mb = MB,
					.rows = ROWS,
					.cols = C,
					.eps = 1e-5f,
					.x = l->x,
					.branch = l->proj,
					.dropout = dropout_of(3),
					.sum = l->sum,
					.gamma = l->gamma,
					.beta = l->beta,
					.y = l->y,
					.mean = l->mean,
					.rstd = l->rstd });
	o->linear(f->s,
		  &(struct k_linear){ MB, ROWS, C, FFN, false, K_ACT_GELU_TANH, l->y, l->w_fc, l->b_fc, l->pre, l->h });
	o->linear(f->s, &(struct k_linear){ MB, ROWS, FFN, C, false, K_ACT_NONE, l->h, l->w_out, NULL, NULL, l->out });
	o->residual(f->s, &(struct k_residual){ MB, ROWS, C, l->sum, l->out, l->res, dropout_of(4) });
	o->linear(f->s,
		  &(struct k_linear){ MB, ROWS, C, VOCAB, true, K_ACT_NONE, l->res, l->wte, NULL, NULL, l->logits });
	o->xent(f->s, &(struct k_xent){ MB, ROWS, VOCAB, false, l->logits, l->targets, l->loss, 0, 0 });
}

static void layer_backward(struct fixture *f, struct layer *l)
{
	const struct k_ops *o = f->ops;
	o->linear_backward(f->s,
			   &(struct k_linear_backward){ MB, ROWS, C, VOCAB, true, false, l->res, l->wte, l->logits,
							l->dlogits_x, l->dwte_head, NULL, K_ACT_NONE, NULL, false });
	o->residual(f->s, &(struct k_residual){ MB, ROWS, C, NULL, l->dlogits_x, l->dy, dropout_of(4) });
	o->linear_backward(f->s, &(struct k_linear_backward){ MB, ROWS, FFN, C, false, false, l->h, l->w_out, l->dy,
							      l->dh, l->dw_out, NULL, K_ACT_GELU_TANH, l->pre, false });
	o->linear_backward(f->s, &(struct k_linear_backward){ MB, ROWS, C, FFN, false, false, l->y, l->w_fc, l->dh,
							      l->datt, l->dw_fc, l->db_fc, K_ACT_NONE, NULL, false });
	o->norm_backward(f->s, &(struct k_norm_backward){ MB, ROWS, C, false, l->sum, l->mean, l->rstd, l->gamma,
							  l->datt, l->dlogits_x, l->dx, l->dgamma, l->dbeta });
	o->residual(f->s, &(struct k_residual){ MB, ROWS, C, NULL, l->dx, l->dproj, dropout_of(3) });
	o->linear_backward(f->s, &(struct k_linear_backward){ MB, ROWS, C, C, true, false, l->att, l->w_proj, l->dproj,
							      l->datt, l->dw_proj, NULL, K_ACT_NONE, NULL, false });
	const struct k_attention_backward a = { attention_of(l), l->datt, l->dqkv, l->dqkv + C, l->dqkv + 2 * C };
	o->attention_backward(f->s, &a);
	o->linear_backward(f->s, &(struct k_linear_backward){ MB, ROWS, C, 3 * C, false, false, l->y, l->w_qkv, l->dqkv,
							      l->dy, l->dw_qkv, l->db_qkv, K_ACT_NONE, NULL, false });
	o->embed_backward(f->s, &(struct k_embed_backward){ MB, BATCH, SEQ, C, VOCAB, SEQ, l->tokens, l->dy, l->dwte,
							    l->dwpe, dropout_of(1) });
}

static bool run_layer(const struct k_ops *ops, const char *profile, unsigned threads, struct layer *l)
{
	struct fixture f;

	if (!fixture_open(&f, ops, profile, threads, &dims))
		return false;
	layer_open(l);
	layer_forward(&f, l);
	layer_backward(&f, l);
	fixture_wait(&f);
	fixture_close(&f);
	return true;
}

static void assert_same_layer(struct layer *a, struct layer *b)
{
	for (size_t i = 0; i < ARRAY_LEN(pieces); i++)
		assert_bits(pieces[i].name, *piece_at(a, i), *piece_at(b, i), pieces[i].floats * sizeof(float));
	assert_bits("loss", a->loss, b->loss, sizeof(a->loss));
}

/* Not the same bits of nothing. */
static void assert_layer_is_numbers(struct layer *l)
{
	for (size_t i = 0; i < ARRAY_LEN(pieces); i++)
		for (size_t k = 0; k < pieces[i].floats; k++)
			assert_true(isfinite((*piece_at(l, i))[k]));
}

static void threads_and_deferral_change_no_bit(void **state)
{
	static struct layer first, other;
	unsigned ran = 0;
	(void)state;

	for (size_t p = 0; p < ARRAY_LEN(test_profiles); p++) {
		if (!run_layer(k_cpu_ops(), test_profiles[p], 1, &first))
			continue;
		assert_layer_is_numbers(&first);
		for (unsigned threads = 1; threads <= 3; threads++, ran++) {
			assert_true(run_layer(k_cpu_ops(), test_profiles[p], threads, &other));
			assert_same_layer(&first, &other);
			layer_close(&other);
		}
		assert_true(run_layer(k_deferred_ops(), test_profiles[p], 2, &other));
		assert_same_layer(&first, &other);
		layer_close(&other);
		layer_close(&first);
	}
	assert_true(ran >= 6);
}

/* Where there is a fused multiply-add, its width does not matter to our own products either. */
static void own_products_agree_between_vector_widths(void **state)
{
	static struct layer a, b;
	(void)state;

	if (!run_layer(k_cpu_ops(), "portable:avx2", 2, &a))
		skip();
	if (run_layer(k_cpu_ops(), "portable:avx512", 2, &b)) {
		assert_same_layer(&a, &b);
		layer_close(&b);
	}
	layer_close(&a);
}

/* Everything but products, on every instruction set. */
static void run_elementwise(const char *profile, struct layer *l, bool *ran)
{
	struct fixture f;

	*ran = fixture_open(&f, k_cpu_ops(), profile, 2, &dims);
	if (!*ran)
		return;
	layer_open(l);
	const struct k_ops *o = f.ops;
	for (size_t i = 0; i < ACT * VOCAB; i++)
		l->logits[i] = l->wte[i % (VOCAB * C)] * 40.0f;
	for (size_t i = 0; i < ACT * C; i++)
		l->proj[i] = l->wte[(i * 7) % (VOCAB * C)];
	o->embed(f.s, &(struct k_embed){ MB, BATCH, SEQ, C, VOCAB, 0, l->tokens, l->wte, l->wpe, l->x, dropout_of(1) });
	o->norm(f.s, &(struct k_norm){ .n_mb = MB,
				       .rows = ROWS,
				       .cols = C,
				       .eps = 1e-5f,
				       .x = l->x,
				       .branch = l->proj,
				       .dropout = dropout_of(3),
				       .sum = l->sum,
				       .gamma = l->gamma,
				       .beta = l->beta,
				       .y = l->y,
				       .mean = l->mean,
				       .rstd = l->rstd });
	o->norm_backward(f.s, &(struct k_norm_backward){ MB, ROWS, C, false, l->sum, l->mean, l->rstd, l->gamma,
							 l->proj, NULL, l->dx, l->dgamma, l->dbeta });
	o->residual(f.s, &(struct k_residual){ MB, ROWS, C, l->x, l->y, l->res, dropout_of(4) });
	o->embed_backward(f.s, &(struct k_embed_backward){ MB, BATCH, SEQ, C, VOCAB, SEQ, l->tokens, l->res, l->dwte,
							   l->dwpe, dropout_of(1) });
	o->xent(f.s, &(struct k_xent){ MB, ROWS, VOCAB, false, l->logits, l->targets, l->loss, 0, 0 });
	fixture_wait(&f);
	fixture_close(&f);
}

static void instruction_sets_agree_without_products(void **state)
{
	static struct layer first, other;
	const char *const wider[] = { "portable:avx2", "portable:avx512" };
	bool ran;
	(void)state;

	run_elementwise("portable:portable", &first, &ran);
	assert_true(ran);
	for (size_t i = 0; i < ARRAY_LEN(wider); i++) {
		run_elementwise(wider[i], &other, &ran);
		if (!ran)
			continue;
		assert_same_layer(&first, &other);
		layer_close(&other);
	}
	layer_close(&first);
}

/* Many short jobs on more threads than cores: sleeping, waking and late threads, again and again. */
static void pool_survives_short_jobs(void **state)
{
	const struct k_dims none = { 0 };
	struct fixture f;
	float *p = test_floats(2 * 64 * K_CHUNK);
	(void)state;

	assert_true(fixture_open(&f, k_cpu_ops(), "portable", 7, &none));
	memset(p, 0, sizeof(float) * 2 * 64 * K_CHUNK);
	for (int i = 0; i < 300; i++) {
		f.ops->zero(f.s, p, 64 * K_CHUNK * sizeof(float));
		f.ops->copy(f.s, p, p + 64 * K_CHUNK, (size_t)(i % 64 + 1) * K_CHUNK * sizeof(float));
		if (i % 50 == 0) { /* long enough to fall asleep */
			uint64_t until = clock_now_ns() + 1000000;
			while (clock_now_ns() < until)
				;
		}
	}
	fixture_wait(&f);
	fixture_close(&f);
	free(p);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(threads_and_deferral_change_no_bit),
		cmocka_unit_test(own_products_agree_between_vector_widths),
		cmocka_unit_test(instruction_sets_agree_without_products),
		cmocka_unit_test(pool_survives_short_jobs),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
