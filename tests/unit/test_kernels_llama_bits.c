/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The same bits for any number of threads and for deferred calls; and, for
 * everything but products, on any instruction set: a layer as Qwen3 has it, with
 * a window and two packed documents, on shapes that make several tiles, blocks
 * and tasks.
 */
#include <stdio.h>

#include "tests/unit/test_kernels.h"

static const uint64_t streams[] = { 3, 1ull << 33, 12 };

enum {
	MB = 3,
	BATCH = 2,
	SEQ = 75,
	ROWS = BATCH * SEQ,
	HEADS = 5,
	HEAD = 80,
	ROT = 48,
	C = 120,
	FFN = 260,
	QUERY = HEADS * HEAD,
	ACT = MB * ROWS
};

/* Inputs, then what a pass writes; D_ is a gradient of. */
enum piece {
	X,
	GAMMA,
	GAMMA_2,
	GAMMA_Q,
	GAMMA_K,
	W_Q,
	W_K,
	W_V,
	W_O,
	W_GATE,
	W_UP,
	W_DOWN,
	COS,
	SIN,
	D_RES,
	N_INPUTS,
	RSTD = N_INPUTS,
	Y,
	Q,
	K,
	V,
	Q_TURNED,
	K_TURNED,
	RSTD_Q,
	RSTD_K,
	ATT,
	LSE,
	PROJ,
	SUM,
	RSTD_2,
	Y_2,
	GATE,
	UP,
	H,
	OUT,
	RES,
	D_H,
	D_GATE,
	D_UP,
	D_Y_2,
	D_SUM,
	D_ATT,
	D_Q,
	D_K,
	D_V,
	D_Y,
	D_X,
	D_W_DOWN,
	D_W_GATE,
	D_W_UP,
	D_W_O,
	D_W_Q,
	D_W_K,
	D_W_V,
	D_GAMMA,
	D_GAMMA_2,
	D_GAMMA_Q,
	D_GAMMA_K,
	N_PIECES
};

static const size_t floats[N_PIECES] = {
	[X] = ACT * C,
	[GAMMA] = C,
	[GAMMA_2] = C,
	[GAMMA_Q] = HEAD,
	[GAMMA_K] = HEAD,
	[W_Q] = C * QUERY,
	[W_K] = C * HEAD,
	[W_V] = C * HEAD,
	[W_O] = QUERY * C,
	[W_GATE] = C * FFN,
	[W_UP] = C * FFN,
	[W_DOWN] = FFN * C,
	[COS] = SEQ * ROT / 2,
	[SIN] = SEQ * ROT / 2,
	[D_RES] = ACT * C,
	[RSTD] = ACT,
	[Y] = ACT * C,
	[Q] = ACT * QUERY,
	[K] = ACT * HEAD,
	[V] = ACT * HEAD,
	[Q_TURNED] = ACT * QUERY,
	[K_TURNED] = ACT * HEAD,
	[RSTD_Q] = ACT * HEADS,
	[RSTD_K] = ACT,
	[ATT] = ACT * QUERY,
	[LSE] = ACT * HEADS,
	[PROJ] = ACT * C,
	[SUM] = ACT * C,
	[RSTD_2] = ACT,
	[Y_2] = ACT * C,
	[GATE] = ACT * FFN,
	[UP] = ACT * FFN,
	[H] = ACT * FFN,
	[OUT] = ACT * C,
	[RES] = ACT * C,
	[D_H] = ACT * FFN,
	[D_GATE] = ACT * FFN,
	[D_UP] = ACT * FFN,
	[D_Y_2] = ACT * C,
	[D_SUM] = ACT * C,
	[D_ATT] = ACT * QUERY,
	[D_Q] = ACT * QUERY,
	[D_K] = ACT * HEAD,
	[D_V] = ACT * HEAD,
	[D_Y] = ACT * C,
	[D_X] = ACT * C,
	[D_W_DOWN] = FFN * C,
	[D_W_GATE] = C * FFN,
	[D_W_UP] = C * FFN,
	[D_W_O] = QUERY * C,
	[D_W_Q] = C * QUERY,
	[D_W_K] = C * HEAD,
	[D_W_V] = C * HEAD,
	[D_GAMMA] = C,
	[D_GAMMA_2] = C,
	[D_GAMMA_Q] = HEAD,
	[D_GAMMA_K] = HEAD,
};

struct layer {
	struct fixture *f;
	bool products; /* else linear layers and attention are left out */
	float *p[N_PIECES];
	uint32_t first_key[ACT];
};

static void layer_linear(struct layer *l, enum piece x, enum piece w, enum piece y)
{
	const uint32_t in = (uint32_t)(floats[x] / ACT), out = (uint32_t)(floats[y] / ACT);
	const struct k_linear a = { MB, ROWS, in, out, true, K_ACT_NONE, l->p[x], l->p[w], NULL, NULL, l->p[y] };

	if (l->products)
		l->f->ops->linear(l->f->s, &a);
}

static void layer_linear_back(struct layer *l, enum piece x, enum piece w, enum piece dy, enum piece dx, enum piece dw,
			      bool add)
{
	const struct k_linear_backward a = { .n_mb = MB,
					     .rows = ROWS,
					     .in = (uint32_t)(floats[x] / ACT),
					     .out = (uint32_t)(floats[dy] / ACT),
					     .w_out_in = true,
					     .dx_add = add,
					     .x = l->p[x],
					     .w = l->p[w],
					     .dy = l->p[dy],
					     .dx = l->p[dx],
					     .dw = l->p[dw] };
	if (l->products)
		l->f->ops->linear_backward(l->f->s, &a);
}

static struct k_rotary layer_rotary(struct layer *l, bool query)
{
	return (struct k_rotary){ .n_mb = MB,
				  .rows = ROWS,
				  .seq = SEQ,
				  .heads = query ? HEADS : 1,
				  .head_dim = HEAD,
				  .rot = ROT,
				  .cos = l->p[COS],
				  .sin = l->p[SIN],
				  .gamma = l->p[query ? GAMMA_Q : GAMMA_K],
				  .eps = 1e-6f,
				  .x = l->p[query ? Q : K],
				  .out = l->p[query ? Q_TURNED : K_TURNED],
				  .rstd = l->p[query ? RSTD_Q : RSTD_K] };
}

static struct k_attention layer_attention(const struct layer *l)
{
	return (struct k_attention){ .n_mb = MB,
				     .batch = BATCH,
				     .q_len = SEQ,
				     .kv_len = SEQ,
				     .heads = HEADS,
				     .kv_heads = 1,
				     .head_dim = HEAD,
				     .window = 20,
				     .first_key = l->first_key,
				     .scale = 0.11f,
				     .q = l->p[Q_TURNED],
				     .k = l->p[K_TURNED],
				     .v = l->p[V],
				     .q_stride = QUERY,
				     .k_stride = HEAD,
				     .v_stride = HEAD,
				     .out_stride = QUERY,
				     .out = l->p[ATT],
				     .lse = l->p[LSE] };
}

static void layer_forward(struct layer *l)
{
	const struct k_ops *o = l->f->ops;
	const struct k_dropout none = { .rate = 0.0f }, some = { 0.1f, 3, streams };
	const struct k_rotary q = layer_rotary(l, true), k = layer_rotary(l, false);
	const struct k_attention attention = layer_attention(l);
	struct k_norm n = { .n_mb = MB, .rows = ROWS, .cols = C, .eps = 1e-6f, .rms = true };

	n.x = l->p[X];
	n.gamma = l->p[GAMMA];
	n.y = l->p[Y];
	n.rstd = l->p[RSTD];
	o->norm(l->f->s, &n);
	layer_linear(l, Y, W_Q, Q);
	layer_linear(l, Y, W_K, K);
	layer_linear(l, Y, W_V, V);
	o->rotary(l->f->s, &q);
	o->rotary(l->f->s, &k);
	if (l->products)
		o->attention(l->f->s, &attention);
	layer_linear(l, ATT, W_O, PROJ);
	n.branch = l->p[PROJ];
	n.dropout = some;
	n.sum = l->p[SUM];
	n.gamma = l->p[GAMMA_2];
	n.y = l->p[Y_2];
	n.rstd = l->p[RSTD_2];
	o->norm(l->f->s, &n);
	layer_linear(l, Y_2, W_GATE, GATE);
	layer_linear(l, Y_2, W_UP, UP);
	o->glu(l->f->s, &(struct k_glu){ MB, ROWS, FFN, K_ACT_SILU, l->p[GATE], l->p[UP], l->p[H] });
	layer_linear(l, H, W_DOWN, OUT);
	o->residual(l->f->s, &(struct k_residual){ MB, ROWS, C, l->p[SUM], l->p[OUT], l->p[RES], none });
}

static void layer_backward(struct layer *l)
{
	const struct k_ops *o = l->f->ops;
	struct k_norm_backward n = { .n_mb = MB, .rows = ROWS, .cols = C, .rms = true };

	layer_linear_back(l, H, W_DOWN, D_RES, D_H, D_W_DOWN, false);
	o->glu_backward(l->f->s, &(struct k_glu_backward){ { MB, ROWS, FFN, K_ACT_SILU, l->p[GATE], l->p[UP], NULL },
							   l->p[D_H],
							   l->p[D_GATE],
							   l->p[D_UP] });
	layer_linear_back(l, Y_2, W_GATE, D_GATE, D_Y_2, D_W_GATE, false);
	layer_linear_back(l, Y_2, W_UP, D_UP, D_Y_2, D_W_UP, true);
	n.x = l->p[SUM];
	n.rstd = l->p[RSTD_2];
	n.gamma = l->p[GAMMA_2];
	n.dy = l->p[D_Y_2];
	n.dresidual = l->p[D_RES];
	n.dx = l->p[D_SUM];
	n.dgamma = l->p[D_GAMMA_2];
	o->norm_backward(l->f->s, &n);
	layer_linear_back(l, ATT, W_O, D_SUM, D_ATT, D_W_O, false);
	const struct k_attention_backward a = { layer_attention(l), l->p[D_ATT], l->p[D_Q], l->p[D_K], l->p[D_V] };
	if (l->products)
		o->attention_backward(l->f->s, &a);
	o->rotary_backward(l->f->s,
			   &(struct k_rotary_backward){ layer_rotary(l, true), l->p[D_Q], l->p[D_Q], l->p[D_GAMMA_Q] });
	o->rotary_backward(
		l->f->s, &(struct k_rotary_backward){ layer_rotary(l, false), l->p[D_K], l->p[D_K], l->p[D_GAMMA_K] });
	layer_linear_back(l, Y, W_Q, D_Q, D_Y, D_W_Q, false);
	layer_linear_back(l, Y, W_K, D_K, D_Y, D_W_K, true);
	layer_linear_back(l, Y, W_V, D_V, D_Y, D_W_V, true);
	n.x = l->p[X];
	n.rstd = l->p[RSTD];
	n.gamma = l->p[GAMMA];
	n.dy = l->p[D_Y];
	n.dresidual = l->p[D_SUM];
	n.dx = l->p[D_X];
	n.dgamma = l->p[D_GAMMA];
	o->norm_backward(l->f->s, &n);
}

static bool layer_run(struct layer *l, const struct k_ops *ops, const char *profile, unsigned threads, bool products)
{
	const struct k_dims dims = { MB, BATCH, SEQ, C, HEADS, 1, HEAD, FFN, 1 };
	struct fixture f;

	if (!fixture_open(&f, ops, profile, threads, &dims))
		return false;
	*l = (struct layer){ .f = &f, .products = products };
	for (size_t i = 0; i < N_PIECES; i++) {
		bool given = i < N_INPUTS || !products;
		l->p[i] = given ? test_random(floats[i], i, 0.5) : test_floats(floats[i]);
	}
	for (uint32_t i = 0; i < ACT; i++)
		l->first_key[i] = i % SEQ < 40 ? 0 : 40;
	layer_forward(l);
	layer_backward(l);
	if (ops == k_deferred_ops() && products)
		for (size_t i = N_INPUTS; i < N_PIECES; i++)
			assert_unwritten(l->p[i], floats[i]);
	fixture_wait(&f);
	fixture_close(&f);
	return true;
}

static void layer_close(struct layer *l)
{
	for (size_t i = 0; i < N_PIECES; i++)
		free(l->p[i]);
}

static void assert_layer_again(struct layer *first, const struct k_ops *ops, const char *profile, unsigned threads)
{
	static struct layer other;
	char what[64];

	assert_true(layer_run(&other, ops, profile, threads, first->products));
	for (size_t i = 0; i < N_PIECES; i++) {
		snprintf(what, sizeof(what), "%s, %u threads, %s: piece %zu", ops->name, threads, profile, i);
		assert_bits(what, first->p[i], other.p[i], floats[i] * sizeof(float));
		for (size_t k = 0; k < floats[i]; k++)
			assert_true(isfinite(other.p[i][k]));
	}
	layer_close(&other);
}

static void threads_and_deferral_change_no_bit(void **state)
{
	static struct layer first;
	unsigned ran = 0;
	(void)state;

	for (size_t p = 0; p < ARRAY_LEN(test_profiles); p++) {
		if (!layer_run(&first, k_cpu_ops(), test_profiles[p], 1, true))
			continue;
		for (unsigned threads = 1; threads <= 3; threads++, ran++)
			assert_layer_again(&first, k_cpu_ops(), test_profiles[p], threads);
		assert_layer_again(&first, k_deferred_ops(), test_profiles[p], 2);
		layer_close(&first);
	}
	assert_true(ran >= 6);
}

static void instruction_sets_agree_without_products(void **state)
{
	const char *const wider[] = { "portable:avx2", "portable:avx512" };
	const struct k_dims none = { 0 };
	static struct layer first;
	(void)state;

	assert_true(layer_run(&first, k_cpu_ops(), "portable:portable", 2, false));
	for (size_t i = 0; i < ARRAY_LEN(wider); i++) {
		struct fixture f;
		if (!fixture_open(&f, k_cpu_ops(), wider[i], 1, &none))
			continue;
		fixture_close(&f);
		assert_layer_again(&first, k_cpu_ops(), wider[i], 2);
	}
	layer_close(&first);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(threads_and_deferral_change_no_bit),
		cmocka_unit_test(instruction_sets_agree_without_products),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
