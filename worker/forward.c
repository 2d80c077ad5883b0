/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Forward: embedding and blocks. What is inside a block is its family's; it
 * ends with an addition to the residual stream, which is a call of its own.
 */
#include "worker/net.h"

void net_embed_forward(struct net *n, const float *embedding)
{
	const struct net_config *c = &n->cfg;
	struct k_embed a = {
		.n_mb = n->n_mb,
		.batch = c->batch,
		.seq = n->seq,
		.channels = c->model->n_embd,
		.vocab = c->model->vocab_size,
		.first_position = n->first_position,
		.tokens = n->act.tokens,
		.wte = embedding + n->refs.wte,
		.wpe = net_at(embedding, n->refs.wpe),
		.x = n->act.boundary[0],
		.dropout = net_dropout(n, 0, SITE_EMBEDDING),
	};

	c->k->embed(n->stream, &a);
}

void net_norm(struct net *n, const struct k_norm *shape)
{
	struct k_norm a = *shape;

	a.n_mb = n->n_mb;
	a.rows = net_rows(n);
	a.cols = n->cfg.model->n_embd;
	a.eps = n->cfg.model->layer_norm_epsilon;
	a.rms = n->family->rms;
	n->cfg.k->norm(n->stream, &a);
}

void net_linear(struct net *n, const struct k_linear *shape)
{
	struct k_linear a = *shape;

	a.n_mb = n->n_mb;
	a.rows = net_rows(n);
	n->cfg.k->linear(n->stream, &a);
}

static const union block_acts *acts_of(struct net *n, uint32_t layer)
{
	if (n->act.keep)
		return &n->act.block[layer];
	n->act.held_layer = layer;
	return &n->act.block[0];
}

void net_block_forward(struct net *n, uint32_t layer, const float *params)
{
	const union block_acts *b = acts_of(n, layer);
	struct k_residual add = {
		.n_mb = n->n_mb,
		.rows = net_rows(n),
		.cols = n->cfg.model->n_embd,
		.branch = n->act.branch,
		.out = n->act.boundary[layer + 1],
		.dropout = net_dropout(n, layer, SITE_MLP),
	};

	n->family->inner(n, layer, params, b);
	add.x = n->family->out(n, layer, params, b);
	n->cfg.k->residual(n->stream, &add);
}

void net_block_recompute(struct net *n, uint32_t layer, const float *params)
{
	if (n->act.keep || n->act.held_layer == layer)
		return;
	n->family->inner(n, layer, params, acts_of(n, layer));
}
