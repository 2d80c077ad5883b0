/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A block of the Llama family (Touvron et al. 2023; transformers,
 * modeling_llama.py, modeling_mistral.py, modeling_qwen2.py, modeling_qwen3.py):
 * x + o(attention(norm x)), then x + down(act(gate(norm x)) * up(norm x)).
 * Weights are nn.Linear's, [out][in]; what the siblings differ in (biases, the
 * norm of each head's q and k, the window) follows from the tensors that are
 * there and the config.
 *
 * q, k and v are products of their own with buffers of their own: k and v are
 * narrower than q where queries share them, and they are what a context keeps.
 * q and k are turned in place, unless they are normalised first: the norm's
 * backward wants what was before it.
 */
#include "worker/net.h"

#include <stddef.h>

#define PLACE(tensor, field)                                      \
	{                                                         \
		tensor, offsetof(struct llama_refs, field), false \
	}
#define OPTION(tensor, field)                                    \
	{                                                        \
		tensor, offsetof(struct llama_refs, field), true \
	}

static const struct tensor_place places[] = {
	PLACE("input_layernorm.weight", norm1),    PLACE("self_attn.q_proj.weight", q_w),
	OPTION("self_attn.q_proj.bias", q_b),      PLACE("self_attn.k_proj.weight", k_w),
	OPTION("self_attn.k_proj.bias", k_b),      PLACE("self_attn.v_proj.weight", v_w),
	OPTION("self_attn.v_proj.bias", v_b),      OPTION("self_attn.q_norm.weight", q_norm),
	OPTION("self_attn.k_norm.weight", k_norm), PLACE("self_attn.o_proj.weight", o_w),
	OPTION("self_attn.o_proj.bias", o_b),      PLACE("post_attention_layernorm.weight", norm2),
	PLACE("mlp.gate_proj.weight", gate_w),     OPTION("mlp.gate_proj.bias", gate_b),
	PLACE("mlp.up_proj.weight", up_w),         OPTION("mlp.up_proj.bias", up_b),
	PLACE("mlp.down_proj.weight", down_w),     OPTION("mlp.down_proj.bias", down_b),
};

static uint32_t q_width(const struct model_config *m)
{
	return m->n_head * m->head_dim;
}

static uint32_t kv_width(const struct model_config *m)
{
	return m->n_kv_head * m->head_dim;
}

static void walk_cache(struct walk *w, const struct model_config *m, uint64_t rows, union block_acts *b)
{
	b->llama.k = net_take_floats(w, rows * kv_width(m));
	b->llama.v = net_take_floats(w, rows * kv_width(m));
}

static void walk_rows(struct walk *w, const struct model_config *m, uint64_t rows, union block_acts *b)
{
	struct llama_acts *a = &b->llama;
	uint64_t c = m->n_embd, f = m->n_inner, q = q_width(m);

	a->norm1 = net_take_floats(w, rows * c);
	a->rstd1 = net_take_floats(w, rows);
	a->q = net_take_floats(w, rows * q);
	a->att = net_take_floats(w, rows * q);
	a->lse = net_take_floats(w, rows * m->n_head);
	a->mid = net_take_floats(w, rows * c);
	a->norm2 = net_take_floats(w, rows * c);
	a->rstd2 = net_take_floats(w, rows);
	a->gate = net_take_floats(w, rows * f);
	a->up = net_take_floats(w, rows * f);
	a->act = net_take_floats(w, rows * f);
	if (!m->qk_norm)
		return;
	a->q_pre = net_take_floats(w, rows * q);
	a->k_pre = net_take_floats(w, rows * kv_width(m));
	a->q_rstd = net_take_floats(w, rows * m->n_head);
	a->k_rstd = net_take_floats(w, rows * m->n_kv_head);
}

/* ----------------------------------------------------------------- forward */

/* What of k and v this pass makes: behind what the context holds. */
static float *fresh(const struct net *n, float *cache)
{
	return cache + (size_t)n->first_position * kv_width(n->cfg.model);
}

/* The turning, behind the norm where there is one, of q or of k. */
static struct k_rotary rotary_of(const struct net *n, uint32_t layer, const float *p, const struct llama_acts *b,
				 bool of_q)
{
	const struct model_config *m = n->cfg.model;
	const struct llama_refs *r = &n->refs.block[layer].llama;
	float *out = of_q ? b->q : fresh(n, b->k), *pre = of_q ? b->q_pre : b->k_pre;

	return (struct k_rotary){
		.n_mb = n->n_mb,
		.rows = net_rows(n),
		.seq = n->seq,
		.first_position = n->first_position,
		.heads = of_q ? m->n_head : m->n_kv_head,
		.head_dim = m->head_dim,
		.rot = m->rope.rot,
		.cos = n->act.cos,
		.sin = n->act.sin,
		.gamma = net_at(p, of_q ? r->q_norm : r->k_norm),
		.eps = m->layer_norm_epsilon,
		.x = m->qk_norm ? pre : out,
		.out = out,
		.rstd = of_q ? b->q_rstd : b->k_rstd,
	};
}

static struct k_attention attention_of(const struct net *n, uint32_t layer, const struct llama_acts *b)
{
	const struct model_config *m = n->cfg.model;

	return (struct k_attention){
		.n_mb = n->n_mb,
		.batch = n->cfg.batch,
		.q_len = n->seq,
		.kv_len = n->first_position + n->seq,
		.heads = m->n_head,
		.kv_heads = m->n_kv_head,
		.head_dim = m->head_dim,
		.window = model_layer_window(m, layer),
		.first_key = n->act.first_key,
		.scale = net_attention_scale(m, layer),
		.q = b->q,
		.k = b->k,
		.v = b->v,
		.q_stride = q_width(m),
		.k_stride = kv_width(m),
		.v_stride = kv_width(m),
		.out_stride = q_width(m),
		.out = b->att,
		.lse = b->lse,
		.dropout = net_dropout(n, layer, SITE_ATTENTION),
	};
}

/* A projection: its weight and bias in the block's vector. */
struct product {
	uint32_t in, out;
	uint64_t w, b;
};

static void project(struct net *n, const float *p, struct product m, const float *x, float *y)
{
	net_linear(n, &(struct k_linear){ .in = m.in,
					  .out = m.out,
					  .w_out_in = true,
					  .x = x,
					  .w = p + m.w,
					  .b = net_at(p, m.b),
					  .y = y });
}

/* norm 1, q, k, v, attention and its projection into act.branch. */
static void attend(struct net *n, uint32_t layer, const float *p, const struct llama_acts *b)
{
	const struct model_config *m = n->cfg.model;
	const struct llama_refs *r = &n->refs.block[layer].llama;
	struct k_rotary q = rotary_of(n, layer, p, b, true), k = rotary_of(n, layer, p, b, false);
	struct k_attention attention = attention_of(n, layer, b);
	uint32_t c = m->n_embd, kv = kv_width(m);

	net_norm(n, &(struct k_norm){
			    .x = n->act.boundary[layer], .gamma = p + r->norm1, .y = b->norm1, .rstd = b->rstd1 });
	project(n, p, (struct product){ c, q_width(m), r->q_w, r->q_b }, b->norm1, m->qk_norm ? b->q_pre : b->q);
	project(n, p, (struct product){ c, kv, r->k_w, r->k_b }, b->norm1, m->qk_norm ? b->k_pre : fresh(n, b->k));
	project(n, p, (struct product){ c, kv, r->v_w, r->v_b }, b->norm1, fresh(n, b->v));
	n->cfg.k->rotary(n->stream, &q);
	n->cfg.k->rotary(n->stream, &k);
	n->cfg.k->attention(n->stream, &attention);
	project(n, p, (struct product){ q_width(m), c, r->o_w, r->o_b }, b->att, n->act.branch);
}

static struct k_glu glu_of(const struct net *n, const struct llama_acts *b)
{
	return (struct k_glu){
		.n_mb = n->n_mb,
		.rows = net_rows(n),
		.cols = n->cfg.model->n_inner,
		.act = (enum k_activation)n->cfg.model->activation,
		.gate = b->gate,
		.up = b->up,
		.y = b->act,
	};
}

static void inner(struct net *n, uint32_t layer, const float *p, const union block_acts *acts)
{
	const struct model_config *m = n->cfg.model;
	const struct llama_refs *r = &n->refs.block[layer].llama;
	const struct llama_acts *b = &acts->llama;
	struct k_glu glu = glu_of(n, b);

	attend(n, layer, p, b);
	net_norm(n, &(struct k_norm){ .x = n->act.boundary[layer],
				      .branch = n->act.branch,
				      .dropout = net_dropout(n, layer, SITE_PROJECTION),
				      .sum = b->mid,
				      .gamma = p + r->norm2,
				      .y = b->norm2,
				      .rstd = b->rstd2 });
	project(n, p, (struct product){ m->n_embd, m->n_inner, r->gate_w, r->gate_b }, b->norm2, b->gate);
	project(n, p, (struct product){ m->n_embd, m->n_inner, r->up_w, r->up_b }, b->norm2, b->up);
	n->cfg.k->glu(n->stream, &glu);
}

static const float *out(struct net *n, uint32_t layer, const float *p, const union block_acts *acts)
{
	const struct model_config *m = n->cfg.model;
	const struct llama_refs *r = &n->refs.block[layer].llama;

	project(n, p, (struct product){ m->n_inner, m->n_embd, r->down_w, r->down_b }, acts->llama.act, n->act.branch);
	return acts->llama.mid;
}

/* ---------------------------------------------------------------- backward */

struct flow {
	const float *x, *dy;
	float *dx;
	bool add; /* to what dx holds: several products share their input */
};

static void project_backward(struct net *n, const float *p, float *grad, struct product m, const struct flow *f)
{
	net_linear_backward(n, &(struct k_linear_backward){ .in = m.in,
							    .out = m.out,
							    .w_out_in = true,
							    .dx_add = f->add,
							    .x = f->x,
							    .w = p + m.w,
							    .dy = f->dy,
							    .dx = f->dx,
							    .dw = grad + m.w,
							    .db = net_grad_at(grad, m.b) });
}

/*
 * Through the MLP: act.dx becomes the gradient of the sum behind the attention.
 * The gradients of gate and up take their places: nobody asks for them again.
 */
static void mlp_backward(struct net *n, uint32_t layer, const float *p, const struct llama_acts *b, float *grad)
{
	const struct model_config *m = n->cfg.model;
	const struct llama_refs *r = &n->refs.block[layer].llama;
	struct activations *a = &n->act;
	struct k_glu_backward glu = { .fwd = glu_of(n, b), .dy = a->wide, .dgate = b->gate, .dup = b->up };

	project_backward(n, p, grad, (struct product){ m->n_inner, m->n_embd, r->down_w, r->down_b },
			 &(struct flow){ b->act, net_branch_gradient(n, layer, SITE_MLP), a->wide, false });
	n->cfg.k->glu_backward(n->stream, &glu);
	project_backward(n, p, grad, (struct product){ m->n_embd, m->n_inner, r->gate_w, r->gate_b },
			 &(struct flow){ b->norm2, b->gate, a->dy, false });
	project_backward(n, p, grad, (struct product){ m->n_embd, m->n_inner, r->up_w, r->up_b },
			 &(struct flow){ b->norm2, b->up, a->dy, true });
	net_norm_backward(n, &(struct k_norm_backward){ .x = b->mid,
							.rstd = b->rstd2,
							.gamma = p + r->norm2,
							.dy = a->dy,
							.dresidual = a->dx,
							.dx = a->dx,
							.dgamma = grad + r->norm2 });
}

/* The gradients of q, k and v, one behind the other in act.wide. */
struct qkv_gradient {
	float *q, *k, *v;
};

/* From act.dy, the gradient of the attention's output, to those of the products q, k and v. */
static struct qkv_gradient attention_backward(struct net *n, uint32_t layer, const float *p, const struct llama_acts *b,
					      float *grad)
{
	const struct model_config *m = n->cfg.model;
	const struct llama_refs *r = &n->refs.block[layer].llama;
	size_t all = (size_t)n->n_mb * net_rows(n);
	struct qkv_gradient d = { .q = n->act.wide };
	struct k_attention_backward a = { .fwd = attention_of(n, layer, b), .dout = n->act.dy };
	struct k_rotary_backward q = { .fwd = rotary_of(n, layer, p, b, true) };
	struct k_rotary_backward k = { .fwd = rotary_of(n, layer, p, b, false) };

	d.k = d.q + all * q_width(m);
	d.v = d.k + all * kv_width(m);
	a.dq = d.q;
	a.dk = d.k;
	a.dv = d.v;
	q.dout = q.dx = d.q;
	k.dout = k.dx = d.k;
	q.dgamma = net_grad_at(grad, r->q_norm);
	k.dgamma = net_grad_at(grad, r->k_norm);
	n->cfg.k->attention_backward(n->stream, &a);
	n->cfg.k->rotary_backward(n->stream, &q);
	n->cfg.k->rotary_backward(n->stream, &k);
	return d;
}

static void backward(struct net *n, uint32_t layer, const float *p, const union block_acts *acts, float *grad)
{
	const struct model_config *m = n->cfg.model;
	const struct llama_refs *r = &n->refs.block[layer].llama;
	const struct llama_acts *b = &acts->llama;
	struct activations *a = &n->act;
	uint32_t c = m->n_embd, kv = kv_width(m);
	struct qkv_gradient d;

	mlp_backward(n, layer, p, b, grad);
	project_backward(n, p, grad, (struct product){ q_width(m), c, r->o_w, r->o_b },
			 &(struct flow){ b->att, net_branch_gradient(n, layer, SITE_PROJECTION), a->dy, false });
	d = attention_backward(n, layer, p, b, grad);
	project_backward(n, p, grad, (struct product){ c, q_width(m), r->q_w, r->q_b },
			 &(struct flow){ b->norm1, d.q, a->dy, false });
	project_backward(n, p, grad, (struct product){ c, kv, r->k_w, r->k_b },
			 &(struct flow){ b->norm1, d.k, a->dy, true });
	project_backward(n, p, grad, (struct product){ c, kv, r->v_w, r->v_b },
			 &(struct flow){ b->norm1, d.v, a->dy, true });
	net_norm_backward(n, &(struct k_norm_backward){ .x = a->boundary[layer],
							.rstd = b->rstd1,
							.gamma = p + r->norm1,
							.dy = a->dy,
							.dresidual = a->dx,
							.dx = a->dx,
							.dgamma = grad + r->norm1 });
}

const struct net_family net_llama = {
	.embedding = "model.embed_tokens.weight",
	.norm_w = "model.norm.weight",
	.block = "model.layers",
	.rms = true,
	.n_tensors = ARRAY_LEN(places),
	.tensor = places,
	.walk_cache = walk_cache,
	.walk_rows = walk_rows,
	.inner = inner,
	.out = out,
	.backward = backward,
};
