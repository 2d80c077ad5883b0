/* SPDX-License-Identifier: Apache-2.0 */
#include "worker/schedule.h"

#include <assert.h>

double tree_sum(const double *v, uint32_t n)
{
	uint32_t left = 1;

	assert(n > 0);
	if (n == 1)
		return v[0];
	while (left * 2 < n)
		left *= 2;
	return tree_sum(v, left) + tree_sum(v + left, n - left);
}

/* What was enqueued has taken effect: buffers may be given away and units released. */
static int settle(struct net *n)
{
	struct k_event ev;

	n->cfg.k->event_record(n->stream, &ev);
	n->cfg.k->event_wait(n->stream, &ev);
	return n->cfg.k->stream_error(n->stream);
}

static int finish_gradient(struct net *n, const struct span_hooks *h, uint32_t unit, uint32_t part, float *buffer)
{
	int rc = settle(n);

	return rc ? rc : h->final(h->ctx, unit, part, buffer);
}

/* Loss and backward in one, a piece of the logits at a time: the matrix's gradient is the first that is final. */
static int head_train(struct net *n, const struct span_hooks *h, const float *head, const float *head_w)
{
	uint32_t unit = net_unit_head(n), embedding = net_unit_embedding(n);
	bool tied = n->cfg.model->tie_word_embeddings;
	float *buffer;
	int rc;

	rc = h->gradient(h->ctx, tied ? embedding : unit, tied, &buffer);
	if (rc)
		return rc;
	net_head_train(n, head, head_w, buffer);
	if (tied) {
		rc = finish_gradient(n, h, embedding, 1, buffer);
		if (!rc)
			rc = h->gradient(h->ctx, unit, 0, &buffer);
		if (rc)
			return rc;
	}
	net_head_backward(n, head, buffer);
	return finish_gradient(n, h, unit, 0, buffer);
}

static int block_backward(struct net *n, const struct span_hooks *h, uint32_t layer, const float *params)
{
	uint32_t unit = net_unit_block(n, layer);
	float *buffer;
	int rc = h->gradient(h->ctx, unit, 0, &buffer);

	if (rc)
		return rc;
	net_block_backward(n, layer, params, buffer);
	return finish_gradient(n, h, unit, 0, buffer);
}

static int embed_backward(struct net *n, const struct span_hooks *h)
{
	uint32_t unit = net_unit_embedding(n);
	float *buffer;
	int rc = h->gradient(h->ctx, unit, 0, &buffer);

	if (rc)
		return rc;
	net_embed_backward(n, buffer);
	return finish_gradient(n, h, unit, 0, buffer);
}

static int run_use(struct net *n, const struct span_hooks *h, const struct use *u, const float *const params[2])
{
	const float *head_w;

	switch (u->kind) {
	case USE_EMBED:
		net_embed_forward(n, params[0]);
		return settle(n);
	case USE_BLOCK:
		net_block_forward(n, u->layer, params[0]);
		return settle(n);
	case USE_HEAD:
		head_w = (n->cfg.model->tie_word_embeddings ? params[1] : params[0]) + n->refs.head_w;
		if (n->training)
			return head_train(n, h, params[0], head_w);
		net_head_loss(n, params[0], head_w);
		return settle(n);
	case USE_BLOCK_BACKWARD:
		return block_backward(n, h, u->layer, params[0]);
	case USE_EMBED_BACKWARD:
		return embed_backward(n, h);
	}
	assert(false);
	return 0;
}

int span_run(struct net *n, const struct span *s, const struct use *uses, uint32_t n_uses,
	     const struct span_hooks *hooks, double *loss)
{
	net_span_begin(n, s->step, s->first, s->n_mb, s->training);
	for (uint32_t i = 0; i < n_uses; i++) {
		const float *params[2] = { NULL, NULL };
		int rc = hooks->border(hooks->ctx);

		if (!rc)
			rc = hooks->units(hooks->ctx, i, &uses[i], params);
		if (!rc)
			rc = run_use(n, hooks, &uses[i], params);
		if (rc)
			return rc;
		hooks->used(hooks->ctx, i);
	}
	*loss = tree_sum(n->act.loss, s->n_mb);
	return 0;
}
