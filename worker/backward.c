/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The forward's transpose, unit by unit. act.dx carries the gradient of the
 * residual stream from the head down to the embedding; a unit's weight
 * gradients are summed over the span inside the kernels and written straight
 * into the flat vector the caller gives.
 */
#include "worker/net.h"

#include <assert.h>

static uint32_t rows(const struct net *n)
{
	return n->cfg.batch * n->cfg.seq;
}

static void norm_backward(struct net *n, const struct k_norm_backward *shape)
{
	struct k_norm_backward a = *shape;

	a.n_mb = n->n_mb;
	a.rows = rows(n);
	a.cols = n->cfg.model->n_embd;
	n->cfg.k->norm_backward(n->stream, &a);
}

static void linear_backward(struct net *n, const struct k_linear_backward *shape)
{
	struct k_linear_backward a = *shape;

	a.n_mb = n->n_mb;
	a.rows = rows(n);
	n->cfg.k->linear_backward(n->stream, &a);
}

/* The gradient of dropout(branch): act.dx itself where nothing was dropped. */
static const float *branch_gradient(struct net *n, uint32_t layer, enum dropout_site site)
{
	struct k_residual a = {
		.n_mb = n->n_mb,
		.rows = rows(n),
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

void net_head_backward(struct net *n, const float *head, const float *head_w, float *grad)
{
	const struct model_config *m = n->cfg.model;
	struct activations *a = &n->act;

	assert(n->training);
	net_zero_gaps(n, net_unit_head(n), 0, grad);
	linear_backward(n, &(struct k_linear_backward){ .in = m->n_embd,
							.out = m->vocab_size,
							.w_out_in = true,
							.x = a->lnf,
							.w = head_w,
							.dy = a->logits,
							.dx = a->dy,
							.dw = m->tie_word_embeddings ? NULL : grad + n->refs.head_w });
	norm_backward(n, &(struct k_norm_backward){ .x = a->boundary[m->n_layer],
						    .mean = a->meanf,
						    .rstd = a->rstdf,
						    .gamma = head + n->refs.lnf_w,
						    .dy = a->dy,
						    .dx = a->dx,
						    .dgamma = grad + n->refs.lnf_w,
						    .dbeta = grad + n->refs.lnf_b });
}

void net_head_backward_tied(struct net *n, float *grad)
{
	const struct model_config *m = n->cfg.model;

	assert(m->tie_word_embeddings);
	net_zero_gaps(n, net_unit_embedding(n), 1, grad);
	linear_backward(n, &(struct k_linear_backward){ .in = m->n_embd,
							.out = m->vocab_size,
							.w_out_in = true,
							.x = n->act.lnf,
							.dy = n->act.logits,
							.dw = grad + n->refs.wte });
}

/* Through the MLP: act.dx becomes the gradient of the sum behind the attention. */
static void mlp_backward(struct net *n, uint32_t layer, const float *p, const struct block_acts *b, float *grad)
{
	const struct model_config *m = n->cfg.model;
	const struct block_refs *r = &n->refs.block[layer];
	struct activations *a = &n->act;

	linear_backward(n, &(struct k_linear_backward){ .in = m->n_inner,
							.out = m->n_embd,
							.x = b->act,
							.w = p + r->out_w,
							.dy = branch_gradient(n, layer, SITE_MLP),
							.dx = a->wide,
							.dw = grad + r->out_w,
							.db = grad + r->out_b,
							.act_in = (enum k_activation)m->activation,
							.pre_in = b->pre });
	linear_backward(n, &(struct k_linear_backward){ .in = m->n_embd,
							.out = m->n_inner,
							.x = b->ln2,
							.w = p + r->fc_w,
							.dy = a->wide,
							.dx = a->dy,
							.dw = grad + r->fc_w,
							.db = grad + r->fc_b });
	norm_backward(n, &(struct k_norm_backward){ .x = b->mid,
						    .mean = b->mean2,
						    .rstd = b->rstd2,
						    .gamma = p + r->ln2_w,
						    .dy = a->dy,
						    .dresidual = a->dx,
						    .dx = a->dx,
						    .dgamma = grad + r->ln2_w,
						    .dbeta = grad + r->ln2_b });
}

static void attention_backward(struct net *n, uint32_t layer, const struct block_acts *b)
{
	const struct model_config *m = n->cfg.model;
	size_t c = m->n_embd;
	struct k_attention_backward a = {
		.fwd = { .n_mb = n->n_mb,
			 .batch = n->cfg.batch,
			 .q_len = n->cfg.seq,
			 .kv_len = n->cfg.seq,
			 .heads = m->n_head,
			 .kv_heads = m->n_head,
			 .head_dim = m->n_embd / m->n_head,
			 .scale = net_attention_scale(m, layer),
			 .q = b->qkv,
			 .k = b->qkv + c,
			 .v = b->qkv + 2 * c,
			 .q_stride = 3 * c,
			 .k_stride = 3 * c,
			 .v_stride = 3 * c,
			 .out_stride = c,
			 .out = b->att,
			 .lse = b->lse,
			 .dropout = net_dropout(n, layer, SITE_ATTENTION) },
		.dout = n->act.dy,
		.dq = n->act.wide,
		.dk = n->act.wide + c,
		.dv = n->act.wide + 2 * c,
	};

	n->cfg.k->attention_backward(n->stream, &a);
}

void net_block_backward(struct net *n, uint32_t layer, const float *params, float *grad)
{
	const struct block_refs *r = &n->refs.block[layer];
	struct activations *a = &n->act;
	const struct block_acts *b = &a->block[a->keep ? layer : 0];
	uint32_t c = n->cfg.model->n_embd;

	net_block_recompute(n, layer, params);
	net_zero_gaps(n, net_unit_block(n, layer), 0, grad);
	mlp_backward(n, layer, params, b, grad);
	linear_backward(n, &(struct k_linear_backward){ .in = c,
							.out = c,
							.x = b->att,
							.w = params + r->proj_w,
							.dy = branch_gradient(n, layer, SITE_PROJECTION),
							.dx = a->dy,
							.dw = grad + r->proj_w,
							.db = grad + r->proj_b });
	attention_backward(n, layer, b);
	linear_backward(n, &(struct k_linear_backward){ .in = c,
							.out = 3 * c,
							.x = b->ln1,
							.w = params + r->attn_w,
							.dy = a->wide,
							.dx = a->dy,
							.dw = grad + r->attn_w,
							.db = grad + r->attn_b });
	norm_backward(n, &(struct k_norm_backward){ .x = a->boundary[layer],
						    .mean = b->mean1,
						    .rstd = b->rstd1,
						    .gamma = params + r->ln1_w,
						    .dy = a->dy,
						    .dresidual = a->dx,
						    .dx = a->dx,
						    .dgamma = grad + r->ln1_w,
						    .dbeta = grad + r->ln1_b });
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
		.dwpe = grad + n->refs.wpe,
		.dropout = net_dropout(n, 0, SITE_EMBEDDING),
	};

	net_zero_gaps(n, net_unit_embedding(n), 0, grad);
	c->k->embed_backward(n->stream, &a);
}
