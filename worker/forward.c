/* SPDX-License-Identifier: Apache-2.0 */
/*
 * GPT-2's forward (Radford et al. 2019; transformers, modeling_gpt2.py): a
 * block is x + proj(attention(ln_1 x)), then x + mlp(ln_2 x). The first
 * addition rides in the second norm's call, the second is a call of its own.
 */
#include "worker/net.h"

#include <assert.h>

static uint32_t rows(const struct net *n)
{
	return n->cfg.batch * n->cfg.seq;
}

void net_embed_forward(struct net *n, const float *embedding)
{
	const struct net_config *c = &n->cfg;
	struct k_embed a = {
		.n_mb = n->n_mb,
		.batch = c->batch,
		.seq = c->seq,
		.channels = c->model->n_embd,
		.vocab = c->model->vocab_size,
		.tokens = n->act.tokens,
		.wte = embedding + n->refs.wte,
		.wpe = embedding + n->refs.wpe,
		.x = n->act.boundary[0],
		.dropout = net_dropout(n, 0, SITE_EMBEDDING),
	};

	c->k->embed(n->stream, &a);
}

static void norm(struct net *n, const struct k_norm *shape)
{
	struct k_norm a = *shape;

	a.n_mb = n->n_mb;
	a.rows = rows(n);
	a.cols = n->cfg.model->n_embd;
	a.eps = n->cfg.model->layer_norm_epsilon;
	n->cfg.k->norm(n->stream, &a);
}

static void linear(struct net *n, const struct k_linear *shape)
{
	struct k_linear a = *shape;

	a.n_mb = n->n_mb;
	a.rows = rows(n);
	n->cfg.k->linear(n->stream, &a);
}

static void attention(struct net *n, uint32_t layer, const struct block_acts *b)
{
	const struct model_config *m = n->cfg.model;
	size_t stride = 3 * (size_t)m->n_embd;
	struct k_attention a = {
		.n_mb = n->n_mb,
		.batch = n->cfg.batch,
		.q_len = n->cfg.seq,
		.kv_len = n->cfg.seq,
		.heads = m->n_head,
		.kv_heads = m->n_head,
		.head_dim = m->n_embd / m->n_head,
		.scale = net_attention_scale(m, layer),
		.q = b->qkv,
		.k = b->qkv + m->n_embd,
		.v = b->qkv + 2 * (size_t)m->n_embd,
		.q_stride = stride,
		.k_stride = stride,
		.v_stride = stride,
		.out_stride = m->n_embd,
		.out = b->att,
		.lse = b->lse,
		.dropout = net_dropout(n, layer, SITE_ATTENTION),
	};

	n->cfg.k->attention(n->stream, &a);
}

/* Everything of a block that its backward needs: all but the last product and addition. */
static void block_inner(struct net *n, uint32_t layer, const float *p, const struct block_acts *b)
{
	const struct model_config *m = n->cfg.model;
	const struct block_refs *r = &n->refs.block[layer];
	uint32_t c = m->n_embd;

	norm(n, &(struct k_norm){ .x = n->act.boundary[layer],
				  .gamma = p + r->ln1_w,
				  .beta = p + r->ln1_b,
				  .y = b->ln1,
				  .mean = b->mean1,
				  .rstd = b->rstd1 });
	linear(n, &(struct k_linear){
			  .in = c, .out = 3 * c, .x = b->ln1, .w = p + r->attn_w, .b = p + r->attn_b, .y = b->qkv });
	attention(n, layer, b);
	linear(n, &(struct k_linear){
			  .in = c, .out = c, .x = b->att, .w = p + r->proj_w, .b = p + r->proj_b, .y = n->act.branch });
	norm(n, &(struct k_norm){ .x = n->act.boundary[layer],
				  .branch = n->act.branch,
				  .dropout = net_dropout(n, layer, SITE_PROJECTION),
				  .sum = b->mid,
				  .gamma = p + r->ln2_w,
				  .beta = p + r->ln2_b,
				  .y = b->ln2,
				  .mean = b->mean2,
				  .rstd = b->rstd2 });
	linear(n, &(struct k_linear){ .in = c,
				      .out = m->n_inner,
				      .act = (enum k_activation)m->activation,
				      .x = b->ln2,
				      .w = p + r->fc_w,
				      .b = p + r->fc_b,
				      .pre = b->pre,
				      .y = b->act });
}

static const struct block_acts *acts_of(struct net *n, uint32_t layer)
{
	if (n->act.keep)
		return &n->act.block[layer];
	n->act.held_layer = layer;
	return &n->act.block[0];
}

void net_block_forward(struct net *n, uint32_t layer, const float *params)
{
	const struct block_acts *b = acts_of(n, layer);
	const struct block_refs *r = &n->refs.block[layer];
	uint32_t c = n->cfg.model->n_embd;
	struct k_residual add = {
		.n_mb = n->n_mb,
		.rows = rows(n),
		.cols = c,
		.x = b->mid,
		.branch = n->act.branch,
		.out = n->act.boundary[layer + 1],
		.dropout = net_dropout(n, layer, SITE_MLP),
	};

	block_inner(n, layer, params, b);
	linear(n, &(struct k_linear){ .in = n->cfg.model->n_inner,
				      .out = c,
				      .x = b->act,
				      .w = params + r->out_w,
				      .b = params + r->out_b,
				      .y = n->act.branch });
	n->cfg.k->residual(n->stream, &add);
}

void net_block_recompute(struct net *n, uint32_t layer, const float *params)
{
	if (n->act.keep || n->act.held_layer == layer)
		return;
	block_inner(n, layer, params, acts_of(n, layer));
}

void net_head_forward(struct net *n, const float *head, const float *head_w)
{
	const struct model_config *m = n->cfg.model;
	struct k_xent loss = {
		.n_mb = n->n_mb,
		.rows = rows(n),
		.vocab = m->vocab_size,
		.loss_only = !n->training,
		.logits = n->act.logits,
		.targets = n->act.targets,
		.loss = n->act.loss,
	};

	norm(n, &(struct k_norm){ .x = n->act.boundary[m->n_layer],
				  .gamma = head + n->refs.lnf_w,
				  .beta = head + n->refs.lnf_b,
				  .y = n->act.lnf,
				  .mean = n->act.meanf,
				  .rstd = n->act.rstdf });
	linear(n, &(struct k_linear){ .in = m->n_embd,
				      .out = m->vocab_size,
				      .w_out_in = true,
				      .x = n->act.lnf,
				      .w = head_w,
				      .y = n->act.logits });
	n->cfg.k->xent(n->stream, &loss);
}
