/* SPDX-License-Identifier: Apache-2.0 */
#include "worker/net.h"

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>

uint32_t net_unit_embedding(const struct net *n)
{
	(void)n;
	return 0;
}

uint32_t net_unit_block(const struct net *n, uint32_t layer)
{
	assert(layer < n->cfg.model->n_layer);
	return 1 + layer;
}

uint32_t net_unit_head(const struct net *n)
{
	return n->cfg.model->n_layer + 1;
}

/* The table is made from the same config, so a missing tensor is one that the family's list here does not know. */
static int find(const struct net *n, uint32_t unit, const char *name, uint64_t *offset, struct err *e)
{
	const struct tensor_info *t = unit_table_find(n->cfg.table, name);

	if (!t || t->unit != unit)
		return err_set(e, -EINVAL, "the model has no tensor %s in unit %u", name, unit);
	*offset = t->offset;
	return 0;
}

static int find_block(struct net *n, uint32_t layer, struct err *e)
{
	const struct net_family *f = n->family;
	uint32_t unit = net_unit_block(n, layer);
	char name[96];

	for (uint32_t i = 0; i < f->n_tensors; i++) {
		uint64_t *ref = (uint64_t *)((char *)&n->refs.block[layer] + f->tensor[i].ref);
		int rc;

		snprintf(name, sizeof(name), "%s.%u.%s", f->block, layer, f->tensor[i].name);
		*ref = NO_TENSOR;
		if (f->tensor[i].optional && !unit_table_find(n->cfg.table, name))
			continue;
		rc = find(n, unit, name, ref, e);
		if (rc)
			return rc;
	}
	return 0;
}

static int find_ends(struct net *n, struct err *e)
{
	const struct net_family *f = n->family;
	struct net_refs *r = &n->refs;
	uint32_t head = net_unit_head(n);
	bool tied = n->cfg.model->tie_word_embeddings;
	int rc;

	r->wpe = r->lnf_b = NO_TENSOR;
	rc = find(n, 0, f->embedding, &r->wte, e);
	if (!rc && f->positions)
		rc = find(n, 0, f->positions, &r->wpe, e);
	if (!rc)
		rc = find(n, head, f->norm_w, &r->lnf_w, e);
	if (!rc && f->norm_b)
		rc = find(n, head, f->norm_b, &r->lnf_b, e);
	if (!rc && !tied)
		rc = find(n, head, "lm_head.weight", &r->head_w, e);
	if (tied)
		r->head_w = r->wte;
	return rc;
}

int net_init(struct net *n, const struct net_config *cfg, struct err *e)
{
	uint32_t layers = cfg->model->n_layer;
	uint32_t blocks = cfg->keep ? layers : 1;
	int rc;

	*n = (struct net){ .cfg = *cfg, .family = net_family_of(cfg->model), .seq = cfg->seq };
	n->refs.block = calloc(layers, sizeof(*n->refs.block));
	n->act.boundary = calloc((size_t)layers + 1, sizeof(*n->act.boundary));
	n->act.block = calloc(blocks, sizeof(*n->act.block));
	rc = n->refs.block && n->act.boundary && n->act.block ? 0 : err_set(e, -ENOMEM, "out of memory");
	for (uint32_t i = 0; i < layers && !rc; i++)
		rc = find_block(n, i, e);
	if (!rc)
		rc = find_ends(n, e);
	if (rc)
		net_release(n);
	return rc;
}

void net_release(struct net *n)
{
	free(n->refs.block);
	free(n->act.boundary);
	free(n->act.block);
	*n = (struct net){ 0 };
}

void net_dims(const struct model_config *m, uint32_t batch, uint32_t seq, uint32_t n_mb, struct k_dims *out)
{
	*out = (struct k_dims){
		.n_mb = n_mb,
		.batch = batch,
		.seq = seq,
		.channels = m->n_embd,
		.heads = m->n_head,
		.kv_heads = m->n_kv_head,
		.head_dim = m->head_dim,
		.ffn = m->n_inner,
		.vocab = m->vocab_size,
	};
}

uint32_t net_uses_max(const struct model_config *m)
{
	return 2 * m->n_layer + 3;
}

uint32_t net_uses(const struct net *n, bool training, struct use *out)
{
	uint32_t layers = n->cfg.model->n_layer, k = 0;
	bool tied = n->cfg.model->tie_word_embeddings;

	out[k++] = (struct use){ .kind = USE_EMBED, .n = 1, .unit = { net_unit_embedding(n) } };
	for (uint32_t l = 0; l < layers; l++)
		out[k++] = (struct use){ .kind = USE_BLOCK, .layer = l, .n = 1, .unit = { net_unit_block(n, l) } };
	out[k++] = (struct use){ .kind = USE_HEAD,
				 .n = tied ? 2 : 1,
				 .unit = { net_unit_head(n), net_unit_embedding(n) } };
	if (!training)
		return k;
	for (uint32_t l = layers; l-- > 0;)
		out[k++] = (struct use){
			.kind = USE_BLOCK_BACKWARD, .layer = l, .n = 1, .unit = { net_unit_block(n, l) }
		};
	out[k++] = (struct use){ .kind = USE_EMBED_BACKWARD };
	return k;
}

uint64_t net_dropout_stream(uint64_t step, uint32_t micro_batch, uint32_t layer, enum dropout_site site)
{
	const uint64_t name[4] = { step, micro_batch, layer, (uint64_t)site };

	return hash64(name, sizeof(name), 0x64726f70u);
}

/* Row of act.streams: one for the embedding, then three a layer. */
static uint32_t site_row(uint32_t layer, enum dropout_site site)
{
	return site == SITE_EMBEDDING ? 0 : layer * (DROPOUT_SITES - 1) + (uint32_t)site;
}

static void fill_streams(struct net *n, uint64_t step, uint32_t first, uint32_t layer, enum dropout_site site)
{
	uint64_t *row = n->act.streams + (size_t)site_row(layer, site) * n->cfg.max_span;

	for (uint32_t i = 0; i < n->n_mb; i++)
		row[i] = net_dropout_stream(step, first + i, layer, site);
}

void net_span_begin(struct net *n, uint64_t step, uint32_t first, uint32_t n_mb, bool training)
{
	assert(n_mb > 0 && n_mb <= n->cfg.max_span);
	n->n_mb = n_mb;
	n->training = training;
	n->seq = n->cfg.seq;
	n->first_position = 0;
	n->act.held_layer = NO_LAYER;
	if (!training)
		return;
	fill_streams(n, step, first, 0, SITE_EMBEDDING);
	for (uint32_t l = 0; l < n->cfg.model->n_layer; l++)
		for (unsigned site = SITE_ATTENTION; site < DROPOUT_SITES; site++)
			fill_streams(n, step, first, l, (enum dropout_site)site);
}

void net_pass_begin(struct net *n, uint32_t first, uint32_t seq)
{
	assert(seq > 0 && first + seq <= n->cfg.seq && n->cfg.batch == 1 && n->cfg.max_span == 1);
	n->n_mb = 1;
	n->training = false;
	n->seq = seq;
	n->first_position = first;
}

struct k_dropout net_dropout(const struct net *n, uint32_t layer, enum dropout_site site)
{
	const struct model_config *m = n->cfg.model;
	float rate = site == SITE_EMBEDDING ? m->embd_pdrop : site == SITE_ATTENTION ? m->attn_pdrop : m->resid_pdrop;

	if (!n->training || rate == 0)
		return (struct k_dropout){ 0 };
	return (struct k_dropout){
		.rate = rate,
		.seed = n->cfg.seed,
		.stream = n->act.streams + (size_t)site_row(layer, site) * n->cfg.max_span,
	};
}

float net_attention_scale(const struct model_config *m, uint32_t layer)
{
	float scale = m->scale_attn_weights ? 1.0f / sqrtf((float)m->head_dim) : 1.0f;

	return m->scale_attn_by_inverse_layer_idx ? scale / (float)(layer + 1) : scale;
}
