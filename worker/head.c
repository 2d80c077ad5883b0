/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The head: final norm, logits, loss, and the gradients of all three.
 *
 * Logits are the largest thing a worker makes: a row is as wide as the
 * vocabulary. They are needed once, right after they are made, so they are made
 * a piece at a time: product, loss with its gradient in place, and both
 * products of the backward, then the next piece into the same memory. A piece
 * is all rows of the span where those are few; else the micro-batches go one by
 * one, and a large one in several pieces of its rows.
 *
 * With one micro-batch after another, the matrix's gradient cannot be summed
 * along the tree tile by tile, so whole partial sums stand beside it: the stack
 * of kernels.h's tree, slot 0 being the gradient itself. The pieces of one
 * micro-batch are added to its leaf in order. Where a micro-batch is cut depends
 * on the model and the micro-batch alone (head_plan_get), because that changes
 * bits; whether a span is taken at once or one by one does not.
 */
#include "worker/net.h"

#include <assert.h>

struct piece {
	uint32_t mb, n_mb;    /* micro-batches [mb, mb + n_mb) of the span */
	uint32_t first, rows; /* of each, rows [first, first + rows) */
	bool last;            /* of its micro-batch */
};

/* ----------------------------------------------------------------- forward */

static void final_norm(struct net *n, const float *head, uint32_t first_row)
{
	const struct model_config *m = n->cfg.model;
	struct k_norm norm = {
		.n_mb = n->n_mb,
		.rows = net_rows(n) - first_row,
		.cols = m->n_embd,
		.eps = m->layer_norm_epsilon,
		.rms = n->family->rms,
		.x = n->act.boundary[m->n_layer] + (size_t)first_row * m->n_embd,
		.gamma = head + n->refs.lnf_w,
		.beta = net_at(head, n->refs.lnf_b),
		.y = n->act.lnf,
		.mean = n->act.meanf,
		.rstd = n->act.rstdf,
	};

	n->cfg.k->norm(n->stream, &norm);
}

/* Where the piece's rows begin in a buffer of the whole span's. */
static size_t first_row_of(const struct net *n, const struct piece *p)
{
	return (size_t)p->mb * net_rows(n) + p->first;
}

static void make_logits(struct net *n, const float *head_w, const struct piece *p)
{
	const struct model_config *m = n->cfg.model;
	struct k_linear logits = {
		.n_mb = p->n_mb,
		.rows = p->rows,
		.in = m->n_embd,
		.out = m->vocab_size,
		.w_out_in = true,
		.x = n->act.lnf + first_row_of(n, p) * m->n_embd,
		.w = head_w,
		.y = n->act.logits,
	};

	n->cfg.k->linear(n->stream, &logits);
}

static void take_loss(struct net *n, const struct piece *p)
{
	uint32_t rows = net_rows(n);
	struct k_xent loss = {
		.n_mb = p->n_mb,
		.rows = p->rows,
		.vocab = n->cfg.model->vocab_size,
		.loss_only = !n->training,
		.logits = n->act.logits,
		.targets = n->act.targets + (size_t)p->mb * rows,
		.loss = n->act.loss + p->mb,
		.first_row = p->first,
		.all_rows = p->rows < rows ? rows : 0,
	};

	n->cfg.k->xent(n->stream, &loss);
}

void net_head_logits(struct net *n, const float *head, const float *head_w, uint32_t first_row)
{
	struct piece all = { .n_mb = n->n_mb, .rows = net_rows(n) - first_row };

	assert((first_row == 0 || n->n_mb == 1) && n->cfg.head_pieces == 0);
	final_norm(n, head, first_row);
	make_logits(n, head_w, &all);
}

/* ---------------------------------------------------------------- backward */

/* Slot of the tree's stack that leaf k is computed into, and additions behind it: kernels.h's tree of n leaves. */
static uint32_t leaf_slot(uint32_t k)
{
	return (uint32_t)__builtin_popcount(k);
}

static uint32_t leaf_merges(uint32_t k, uint32_t n)
{
	return k + 1 == n ? leaf_slot(k) : (uint32_t)__builtin_ctz(k + 1);
}

static float *slot_at(const struct net *n, uint32_t slot, float *dw)
{
	return slot ? n->act.head_sum[slot - 1] : dw;
}

static void merge(struct net *n, uint32_t slot, float *dw)
{
	float *sum = slot_at(n, slot - 1, dw);
	struct k_residual add = {
		.n_mb = 1,
		.rows = n->cfg.model->vocab_size,
		.cols = n->cfg.model->n_embd,
		.x = sum,
		.branch = slot_at(n, slot, dw),
		.out = sum,
	};

	n->cfg.k->residual(n->stream, &add);
}

/* The logits' gradient to that of the final norm's output, and to dw. */
static void pull_back(struct net *n, const float *head_w, const struct piece *p, float *dw)
{
	const struct model_config *m = n->cfg.model;
	size_t at = first_row_of(n, p) * m->n_embd;
	uint32_t slot = p->n_mb == 1 ? leaf_slot(p->mb) : 0;
	struct k_linear_backward b = {
		.n_mb = p->n_mb,
		.rows = p->rows,
		.in = m->n_embd,
		.out = m->vocab_size,
		.w_out_in = true,
		.x = n->act.lnf + at,
		.w = head_w,
		.dy = n->act.logits,
		.dx = n->act.dy + at,
		.dw = slot_at(n, slot, dw),
		.dw_add = p->first > 0,
	};

	n->cfg.k->linear_backward(n->stream, &b);
	if (!p->last || p->n_mb == n->n_mb)
		return;
	for (uint32_t merges = leaf_merges(p->mb, n->n_mb); merges > 0; merges--)
		merge(n, slot--, dw);
}

/* dw: where the gradient of the logits' matrix goes; NULL: none is asked for. */
static void do_piece(struct net *n, const float *head_w, const struct piece *p, float *dw)
{
	make_logits(n, head_w, p);
	take_loss(n, p);
	if (dw)
		pull_back(n, head_w, p, dw);
}

static void do_pieces(struct net *n, const float *head, const float *head_w, float *dw)
{
	uint32_t rows = net_rows(n), pieces = n->cfg.head_pieces;
	struct piece p = { .n_mb = n->n_mb, .rows = rows, .last = true };

	final_norm(n, head, 0);
	if (!pieces) {
		do_piece(n, head_w, &p, dw);
		return;
	}
	p.n_mb = 1;
	for (p.mb = 0; p.mb < n->n_mb; p.mb++)
		for (uint32_t i = 0; i < pieces; i++) {
			p.first = head_piece_begin(rows, pieces, i);
			p.rows = head_piece_begin(rows, pieces, i + 1) - p.first;
			p.last = i + 1 == pieces;
			do_piece(n, head_w, &p, dw);
		}
}

void net_head_loss(struct net *n, const float *head, const float *head_w)
{
	assert(!n->training);
	do_pieces(n, head, head_w, NULL);
}

void net_head_train(struct net *n, const float *head, const float *head_w, float *grad)
{
	bool tied = n->cfg.model->tie_word_embeddings;

	assert(n->training);
	net_zero_gaps(n, tied ? net_unit_embedding(n) : net_unit_head(n), tied, grad);
	do_pieces(n, head, head_w, grad + n->refs.head_w);
}

void net_head_backward(struct net *n, const float *head, float *grad)
{
	const struct model_config *m = n->cfg.model;
	struct activations *a = &n->act;

	assert(n->training);
	if (m->tie_word_embeddings)
		net_zero_gaps(n, net_unit_head(n), 0, grad);
	net_norm_backward(n, &(struct k_norm_backward){ .x = a->boundary[m->n_layer],
							.mean = a->meanf,
							.rstd = a->rstdf,
							.gamma = head + n->refs.lnf_w,
							.dy = a->dy,
							.dx = a->dx,
							.dgamma = grad + n->refs.lnf_w,
							.dbeta = net_grad_at(grad, n->refs.lnf_b) });
}
