/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The forward's transpose, unit by unit. act.dx carries the gradient of the
 * residual stream from the head down to the embedding; a unit's weight
 * gradients are summed over the span inside the kernels and written straight
 * into the flat vector the caller gives.
 */
#include "worker/net.h"

void net_norm_backward(struct net *n, const struct k_norm_backward *shape)
{
	struct k_norm_backward a = *shape;

	a.n_mb = n->n_mb;
	a.rows = net_rows(n);
	a.cols = n->cfg.model->n_embd;
	a.rms = n->family->rms;
	n->cfg.k->norm_backward(n->stream, &a);
}

void net_linear_backward(struct net *n, const struct k_linear_backward *shape)
{
	struct k_linear_backward a = *shape;

	a.n_mb = n->n_mb;
	a.rows = net_rows(n);
	n->cfg.k->linear_backward(n->stream, &a);
}

const float *net_branch_gradient(struct net *n, uint32_t layer, enum dropout_site site)
{
	struct k_residual a = {
		.n_mb = n->n_mb,
		.rows = net_rows(n),
		.cols = n->cfg.model->n_embd,
		.branch = n->act.dx,
		.out = n->act.branch,
		.dropout = net_dropout(n, layer, site),
	};

	if (a.dropout.rate == 0)
		return n->act.dx;
	n->cfg.k->residual(n->stream, &a);
	return n->act.branch;
}

static void zero(struct net *n, float *grad, uint64_t begin, uint64_t end)
{
	if (begin < end)
		n->cfg.k->zero(n->stream, grad + begin, (end - begin) * sizeof(*grad));
}

void net_zero_gaps(struct net *n, uint32_t unit, uint32_t part, float *grad)
{
	const struct unit_table *t = n->cfg.table;
	const struct unit_info *u = &t->unit[unit];
	uint64_t at = u->part[part].begin / t->page * t->page;
	uint64_t end = round_up_u64(u->part[part].end, t->page);

	for (uint32_t i = u->first_tensor; i < u->first_tensor + u->n_tensors; i++) {
		const struct tensor_info *x = &t->tensor[i];

		if (x->offset < u->part[part].begin || x->offset + x->n > u->part[part].end)
			continue;
		zero(n, grad, at, x->offset);
		at = x->offset + x->n;
	}
	zero(n, grad, at, end);
}

void net_block_backward(struct net *n, uint32_t layer, const float *params, float *grad)
{
	struct activations *a = &n->act;

	net_block_recompute(n, layer, params);
	net_zero_gaps(n, net_unit_block(n, layer), 0, grad);
	n->family->backward(n, layer, params, &a->block[a->keep ? layer : 0], grad);
	a->held_layer = NO_LAYER;
}

void net_embed_backward(struct net *n, float *grad)
{
	const struct net_config *c = &n->cfg;
	struct k_embed_backward a = {
		.n_mb = n->n_mb,
		.batch = c->batch,
		.seq = c->seq,
		.channels = c->model->n_embd,
		.vocab = c->model->vocab_size,
		.positions = c->model->n_positions,
		.tokens = n->act.tokens,
		.dx = n->act.dx,
		.dwte = grad + n->refs.wte,
		.dwpe = net_grad_at(grad, n->refs.wpe),
		.dropout = net_dropout(n, 0, SITE_EMBEDDING),
	};

	net_zero_gaps(n, net_unit_embedding(n), 0, grad);
	c->k->embed_backward(n->stream, &a);
}
