/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A block of GPT-2 (Radford et al. 2019; transformers, modeling_gpt2.py):
 * x + proj(attention(ln_1 x)), then x + mlp(ln_2 x). The first addition rides
 * in the second norm's call. Weights are Conv1D's, [in][out]; one product gives
 * q, k and v side by side in a row.
 */
#include "worker/net.h"

#include <stddef.h>

#define PLACE(tensor, field)                                     \
	{                                                        \
		tensor, offsetof(struct gpt2_refs, field), false \
	}

static const struct tensor_place places[] = {
	PLACE("ln_1.weight", ln1_w),       PLACE("ln_1.bias", ln1_b),           PLACE("attn.c_attn.weight", attn_w),
	PLACE("attn.c_attn.bias", attn_b), PLACE("attn.c_proj.weight", proj_w), PLACE("attn.c_proj.bias", proj_b),
	PLACE("ln_2.weight", ln2_w),       PLACE("ln_2.bias", ln2_b),           PLACE("mlp.c_fc.weight", fc_w),
	PLACE("mlp.c_fc.bias", fc_b),      PLACE("mlp.c_proj.weight", out_w),   PLACE("mlp.c_proj.bias", out_b),
};

static void walk_cache(struct walk *w, const struct model_config *m, uint64_t rows, union block_acts *b)
{
	b->gpt2.qkv = net_take_floats(w, rows * 3 * m->n_embd);
}

static void walk_rows(struct walk *w, const struct model_config *m, uint64_t rows, union block_acts *b)
{
	struct gpt2_acts *a = &b->gpt2;
	uint64_t c = m->n_embd, f = m->n_inner;

	a->ln1 = net_take_floats(w, rows * c);
	a->mean1 = net_take_floats(w, rows);
	a->rstd1 = net_take_floats(w, rows);
	a->att = net_take_floats(w, rows * c);
	a->lse = net_take_floats(w, rows * m->n_head);
	a->mid = net_take_floats(w, rows * c);
	a->ln2 = net_take_floats(w, rows * c);
	a->mean2 = net_take_floats(w, rows);
	a->rstd2 = net_take_floats(w, rows);
	a->pre = net_take_floats(w, rows * f);
	a->act = net_take_floats(w, rows * f);
}

static struct k_attention attention_of(const struct net *n, uint32_t layer, const struct gpt2_acts *b)
{
	const struct model_config *m = n->cfg.model;
	size_t c = m->n_embd;

	return (struct k_attention){
		.n_mb = n->n_mb,
		.batch = n->cfg.batch,
		.q_len = n->seq,
		.kv_len = n->first_position + n->seq,
		.heads = m->n_head,
		.kv_heads = m->n_head,
		.head_dim = m->head_dim,
		.first_key = n->act.first_key,
		.scale = net_attention_scale(m, layer),
		.q = b->qkv + n->first_position * 3 * c,
		.k = b->qkv + c,
		.v = b->qkv + 2 * c,
		.q_stride = 3 * c,
		.k_stride = 3 * c,
		.v_stride = 3 * c,
		.out_stride = c,
		.out = b->att,
		.lse = b->lse,
		.dropout = net_dropout(n, layer, SITE_ATTENTION),
	};
}

static void inner(struct net *n, uint32_t layer, const float *p, const union block_acts *acts)
{
	const struct model_config *m = n->cfg.model;
	const struct gpt2_refs *r = &n->refs.block[layer].gpt2;
	const struct gpt2_acts *b = &acts->gpt2;
	struct k_attention attention = attention_of(n, layer, b);
	uint32_t c = m->n_embd;

	net_norm(n, &(struct k_norm){ .x = n->act.boundary[layer],
				      .gamma = p + r->ln1_w,
				      .beta = p + r->ln1_b,
				      .y = b->ln1,
				      .mean = b->mean1,
				      .rstd = b->rstd1 });
	net_linear(n, &(struct k_linear){ .in = c,
					  .out = 3 * c,
					  .x = b->ln1,
					  .w = p + r->attn_w,
					  .b = p + r->attn_b,
					  .y = b->qkv + (size_t)n->first_position * 3 * c });
	n->cfg.k->attention(n->stream, &attention);
	net_linear(
		n,
		&(struct k_linear){
			.in = c, .out = c, .x = b->att, .w = p + r->proj_w, .b = p + r->proj_b, .y = n->act.branch });
	net_norm(n, &(struct k_norm){ .x = n->act.boundary[layer],
				      .branch = n->act.branch,
				      .dropout = net_dropout(n, layer, SITE_PROJECTION),
				      .sum = b->mid,
				      .gamma = p + r->ln2_w,
				      .beta = p + r->ln2_b,
				      .y = b->ln2,
				      .mean = b->mean2,
				      .rstd = b->rstd2 });
	net_linear(n, &(struct k_linear){ .in = c,
					  .out = m->n_inner,
					  .act = (enum k_activation)m->activation,
					  .x = b->ln2,
					  .w = p + r->fc_w,
					  .b = p + r->fc_b,
					  .pre = b->pre,
					  .y = b->act });
}

static const float *out(struct net *n, uint32_t layer, const float *p, const union block_acts *acts)
{
	const struct gpt2_refs *r = &n->refs.block[layer].gpt2;

	net_linear(n, &(struct k_linear){ .in = n->cfg.model->n_inner,
					  .out = n->cfg.model->n_embd,
					  .x = acts->gpt2.act,
					  .w = p + r->out_w,
					  .b = p + r->out_b,
					  .y = n->act.branch });
	return acts->gpt2.mid;
}

/* Through the MLP: act.dx becomes the gradient of the sum behind the attention. */
static void mlp_backward(struct net *n, uint32_t layer, const float *p, const struct gpt2_acts *b, float *grad)
{
	const struct model_config *m = n->cfg.model;
	const struct gpt2_refs *r = &n->refs.block[layer].gpt2;
	struct activations *a = &n->act;

	net_linear_backward(n, &(struct k_linear_backward){ .in = m->n_inner,
							    .out = m->n_embd,
							    .x = b->act,
							    .w = p + r->out_w,
							    .dy = net_branch_gradient(n, layer, SITE_MLP),
							    .dx = a->wide,
							    .dw = grad + r->out_w,
							    .db = grad + r->out_b,
							    .act_in = (enum k_activation)m->activation,
							    .pre_in = b->pre });
	net_linear_backward(n, &(struct k_linear_backward){ .in = m->n_embd,
							    .out = m->n_inner,
							    .x = b->ln2,
							    .w = p + r->fc_w,
							    .dy = a->wide,
							    .dx = a->dy,
							    .dw = grad + r->fc_w,
							    .db = grad + r->fc_b });
	net_norm_backward(n, &(struct k_norm_backward){ .x = b->mid,
							.mean = b->mean2,
							.rstd = b->rstd2,
							.gamma = p + r->ln2_w,
							.dy = a->dy,
							.dresidual = a->dx,
							.dx = a->dx,
							.dgamma = grad + r->ln2_w,
							.dbeta = grad + r->ln2_b });
}

/* From act.dy, the gradient of the attention's output, to act.wide, that of q, k and v. */
static void attention_backward(struct net *n, uint32_t layer, const struct gpt2_acts *b)
{
	size_t c = n->cfg.model->n_embd;
	struct k_attention_backward a = {
		.fwd = attention_of(n, layer, b),
		.dout = n->act.dy,
		.dq = n->act.wide,
		.dk = n->act.wide + c,
		.dv = n->act.wide + 2 * c,
	};

	n->cfg.k->attention_backward(n->stream, &a);
}

static void backward(struct net *n, uint32_t layer, const float *p, const union block_acts *acts, float *grad)
{
	const struct gpt2_refs *r = &n->refs.block[layer].gpt2;
	const struct gpt2_acts *b = &acts->gpt2;
	struct activations *a = &n->act;
	uint32_t c = n->cfg.model->n_embd;

	mlp_backward(n, layer, p, b, grad);
	net_linear_backward(n, &(struct k_linear_backward){ .in = c,
							    .out = c,
							    .x = b->att,
							    .w = p + r->proj_w,
							    .dy = net_branch_gradient(n, layer, SITE_PROJECTION),
							    .dx = a->dy,
							    .dw = grad + r->proj_w,
							    .db = grad + r->proj_b });
	attention_backward(n, layer, b);
	net_linear_backward(n, &(struct k_linear_backward){ .in = c,
							    .out = 3 * c,
							    .x = b->ln1,
							    .w = p + r->attn_w,
							    .dy = a->wide,
							    .dx = a->dy,
							    .dw = grad + r->attn_w,
							    .db = grad + r->attn_b });
	net_norm_backward(n, &(struct k_norm_backward){ .x = a->boundary[layer],
							.mean = b->mean1,
							.rstd = b->rstd1,
							.gamma = p + r->ln1_w,
							.dy = a->dy,
							.dresidual = a->dx,
							.dx = a->dx,
							.dgamma = grad + r->ln1_w,
							.dbeta = grad + r->ln1_b });
}

const struct net_family net_gpt2 = {
	.embedding = "transformer.wte.weight",
	.positions = "transformer.wpe.weight",
	.norm_w = "transformer.ln_f.weight",
	.norm_b = "transformer.ln_f.bias",
	.block = "transformer.h",
	.n_tensors = ARRAY_LEN(places),
	.tensor = places,
	.walk_cache = walk_cache,
	.walk_rows = walk_rows,
	.inner = inner,
	.out = out,
	.backward = backward,
};
