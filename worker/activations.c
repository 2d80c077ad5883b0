/* SPDX-License-Identifier: Apache-2.0 */
#include "worker/net.h"

#include <assert.h>
#include <errno.h>

/* Buffers begin on cache lines. */
#define ALIGN 64u

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

float *net_take_floats(struct walk *w, uint64_t n)
{
	return take(w, n * sizeof(float));
}

static void walk_tables(struct walk *w, const struct net_config *cfg, struct activations *a)
{
	uint64_t n = (uint64_t)cfg->seq * (cfg->model->rope.rot / 2);

	if (!n)
		return;
	a->cos = net_take_floats(w, n);
	a->sin = net_take_floats(w, n);
}

/* What the head makes: for the whole span, or for a piece of it with partial sums of the matrix's gradient. */
static void walk_head(struct walk *w, const struct net_config *cfg, struct activations *a)
{
	const struct model_config *m = cfg->model;
	uint32_t rows = cfg->batch * cfg->seq;
	uint64_t at_once = cfg->head_pieces ? head_piece_rows(rows, cfg->head_pieces) : (uint64_t)cfg->max_span * rows;

	a->logits = net_take_floats(w, at_once * m->vocab_size);
	for (uint32_t i = 0; cfg->head_pieces && i < head_sums(cfg->max_span); i++)
		a->head_sum[i] = net_take_floats(w, (uint64_t)m->vocab_size * m->n_embd);
}

static void walk_scratch(struct walk *w, const struct net_config *cfg, struct activations *a)
{
	const struct model_config *m = cfg->model;
	uint64_t rows = (uint64_t)cfg->max_span * cfg->batch * cfg->seq, c = m->n_embd;
	uint64_t q = (uint64_t)m->n_head * m->head_dim, qkv = q + 2 * (uint64_t)m->n_kv_head * m->head_dim;
	uint64_t sites = 1 + (uint64_t)m->n_layer * (DROPOUT_SITES - 1);

	a->branch = net_take_floats(w, rows * c);
	a->dx = net_take_floats(w, rows * c);
	a->dy = net_take_floats(w, rows * (q > c ? q : c));
	a->wide = net_take_floats(w, rows * (qkv > m->n_inner ? qkv : m->n_inner));
	a->lnf = net_take_floats(w, rows * c);
	a->meanf = net_family_of(cfg->model)->rms ? NULL : net_take_floats(w, rows);
	a->rstdf = net_take_floats(w, rows);
	walk_head(w, cfg, a);
	a->loss = take(w, cfg->max_span * sizeof(double));
	a->tokens = take(w, rows * sizeof(uint32_t));
	a->targets = take(w, rows * sizeof(uint32_t));
	a->first_key = cfg->packed ? take(w, rows * sizeof(uint32_t)) : NULL;
	a->streams = take(w, sites * cfg->max_span * sizeof(uint64_t));
}

/* a: whose pointers are written; NULL with no arena. */
static void walk_all(struct walk *w, const struct net_config *cfg, struct activations *a)
{
	const struct net_family *family = net_family_of(cfg->model);
	uint64_t rows = (uint64_t)cfg->max_span * cfg->batch * cfg->seq;
	uint32_t layers = cfg->model->n_layer;
	struct activations counted = { 0 };

	for (uint32_t i = 0; i <= layers; i++) {
		float *b = net_take_floats(w, rows * cfg->model->n_embd);

		if (a)
			a->boundary[i] = b;
	}
	for (uint32_t i = 0; i < (cfg->keep ? layers : 1); i++) {
		union block_acts block = { 0 };

		family->walk_cache(w, cfg->model, rows, &block);
		family->walk_rows(w, cfg->model, rows, &block);
		if (a)
			a->block[i] = block;
	}
	walk_scratch(w, cfg, a ? a : &counted);
	walk_tables(w, cfg, a ? a : &counted);
}

uint64_t net_activation_bytes(const struct net_config *cfg)
{
	struct walk w = { 0 };

	walk_all(&w, cfg, NULL);
	return w.bytes;
}

static int finish(struct net *n, const struct walk *w)
{
	n->act.keep = n->cfg.keep;
	n->act.held_layer = NO_LAYER;
	if (w->failed)
		return -ENOMEM;
	if (n->act.cos)
		model_rope_tables(n->cfg.model, n->cfg.seq, n->act.cos, n->act.sin);
	return 0;
}

int net_activations(struct net *n, struct arena *a)
{
	struct walk w = { .arena = a };

	walk_all(&w, &n->cfg, &n->act);
	return finish(n, &w);
}

/* -------------------------------------------------------------- generation */

/* All layers share the buffers of a pass: only keys and values are a layer's own. */
static void walk_context(struct walk *w, const struct net_config *cfg, uint32_t rows, struct activations *a)
{
	const struct model_config *m = cfg->model;
	const struct net_family *family = net_family_of(cfg->model);
	float *stream = net_take_floats(w, (uint64_t)rows * m->n_embd);
	struct activations counted = { 0 }, *to = a ? a : &counted;
	union block_acts block = { 0 };

	family->walk_rows(w, m, rows, &block);
	for (uint32_t i = 0; i < m->n_layer; i++) {
		family->walk_cache(w, m, cfg->seq, &block);
		if (a)
			a->block[i] = block;
	}
	for (uint32_t i = 0; i <= m->n_layer && a; i++)
		a->boundary[i] = stream;
	to->branch = net_take_floats(w, (uint64_t)rows * m->n_embd);
	to->lnf = net_take_floats(w, m->n_embd);
	to->logits = net_take_floats(w, m->vocab_size);
	to->tokens = take(w, rows * sizeof(uint32_t));
	walk_tables(w, cfg, to);
}

uint64_t net_context_bytes(const struct net_config *cfg, uint32_t rows)
{
	struct walk w = { 0 };

	walk_context(&w, cfg, rows, NULL);
	return w.bytes;
}

int net_context(struct net *n, uint32_t rows, struct arena *a)
{
	struct walk w = { .arena = a };

	assert(n->cfg.keep);
	walk_context(&w, &n->cfg, rows, &n->act);
	return finish(n, &w);
}
