/* SPDX-License-Identifier: Apache-2.0 */
#include "worker/net.h"

#include <assert.h>
#include <errno.h>

/* Buffers begin on cache lines. */
#define ALIGN 64u

/*
 * One walk over all buffers serves both questions: with an arena it takes them,
 * without one it only counts. So the two cannot differ.
 */
struct walk {
	struct arena *arena; /* NULL: count */
	uint64_t bytes;
	bool failed;
};

static void *take(struct walk *w, uint64_t bytes)
{
	void *p = NULL;

	bytes = round_up_u64(bytes, ALIGN);
	w->bytes += bytes;
	if (w->arena) {
		p = arena_alloc(w->arena, bytes, ALIGN);
		w->failed |= !p;
	}
	return p;
}

static float *take_floats(struct walk *w, uint64_t n)
{
	return take(w, n * sizeof(float));
}

static void walk_block(struct walk *w, const struct net_config *cfg, struct block_acts *b)
{
	uint64_t rows = (uint64_t)cfg->max_span * cfg->batch * cfg->seq;
	uint64_t c = cfg->model->n_embd, f = cfg->model->n_inner;

	*b = (struct block_acts){
		.ln1 = take_floats(w, rows * c),
		.mean1 = take_floats(w, rows),
		.rstd1 = take_floats(w, rows),
		.qkv = take_floats(w, rows * 3 * c),
		.att = take_floats(w, rows * c),
		.lse = take_floats(w, rows * cfg->model->n_head),
		.mid = take_floats(w, rows * c),
		.ln2 = take_floats(w, rows * c),
		.mean2 = take_floats(w, rows),
		.rstd2 = take_floats(w, rows),
		.pre = take_floats(w, rows * f),
		.act = take_floats(w, rows * f),
	};
}

static void walk_scratch(struct walk *w, const struct net_config *cfg, struct activations *a)
{
	const struct model_config *m = cfg->model;
	uint64_t rows = (uint64_t)cfg->max_span * cfg->batch * cfg->seq;
	uint64_t c = m->n_embd, wide = m->n_inner > 3 * m->n_embd ? m->n_inner : 3 * m->n_embd;
	uint64_t sites = 1 + (uint64_t)m->n_layer * (DROPOUT_SITES - 1);

	a->branch = take_floats(w, rows * c);
	a->dx = take_floats(w, rows * c);
	a->dy = take_floats(w, rows * c);
	a->wide = take_floats(w, rows * wide);
	a->lnf = take_floats(w, rows * c);
	a->meanf = take_floats(w, rows);
	a->rstdf = take_floats(w, rows);
	a->logits = take_floats(w, rows * m->vocab_size);
	a->loss = take(w, cfg->max_span * sizeof(double));
	a->tokens = take(w, rows * sizeof(uint32_t));
	a->targets = take(w, rows * sizeof(uint32_t));
	a->streams = take(w, sites * cfg->max_span * sizeof(uint64_t));
}

/* a: whose pointers are written; NULL with no arena. */
static void walk_all(struct walk *w, const struct net_config *cfg, struct activations *a)
{
	uint64_t rows = (uint64_t)cfg->max_span * cfg->batch * cfg->seq;
	uint32_t layers = cfg->model->n_layer;
	struct activations counted = { 0 };
	struct block_acts block;

	for (uint32_t i = 0; i <= layers; i++) {
		float *b = take_floats(w, rows * cfg->model->n_embd);

		if (a)
			a->boundary[i] = b;
	}
	for (uint32_t i = 0; i < (cfg->keep ? layers : 1); i++) {
		walk_block(w, cfg, &block);
		if (a)
			a->block[i] = block;
	}
	walk_scratch(w, cfg, a ? a : &counted);
}

uint64_t net_activation_bytes(const struct net_config *cfg)
{
	struct walk w = { 0 };

	walk_all(&w, cfg, NULL);
	return w.bytes;
}

int net_activations(struct net *n, struct arena *a)
{
	struct walk w = { .arena = a };

	walk_all(&w, &n->cfg, &n->act);
	n->act.keep = n->cfg.keep;
	n->act.held_layer = NO_LAYER;
	return w.failed ? -ENOMEM : 0;
}
