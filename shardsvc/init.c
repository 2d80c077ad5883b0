/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The first parameters. Random ones are a function of (seed, tensor, place in
 * the tensor), so each owner makes its own and nobody needs to know who owns
 * the rest. From safetensors each owner reads its own ranges of every tensor:
 * together they read each file once.
 */
#include "shardsvc/shard.h"

static void fill(const struct tensor_info *x, uint64_t seed, uint64_t first, uint64_t n, float *out)
{
	float value = x->init == INIT_ONE ? 1.0f : 0.0f;

	if (x->init == INIT_NORMAL) {
		rng_fill_normal(out, n, seed, x->rng_stream, first, 0.0f, x->init_std);
		return;
	}
	for (uint64_t i = 0; i < n; i++)
		out[i] = value;
}

/* What of a tensor lies in a segment of the share. */
struct overlap {
	uint64_t first, n; /* elements of the tensor */
	float *at;
};

static struct overlap overlap(const struct tensor_info *x, const struct share_seg *g, float *share)
{
	uint64_t begin = x->offset > g->unit_offset ? x->offset : g->unit_offset;
	uint64_t tensor_end = x->offset + x->n, seg_end = g->unit_offset + g->n;
	uint64_t end = tensor_end < seg_end ? tensor_end : seg_end;

	if (begin >= end)
		return (struct overlap){ 0 };
	return (struct overlap){ begin - x->offset, end - begin, share + g->share_offset + (begin - g->unit_offset) };
}

void store_fill_unit(struct store *s, uint32_t unit, uint64_t seed)
{
	const struct unit_info *info = &s->table->unit[unit];
	const struct store_unit *u = &s->unit[unit];

	for (uint32_t i = info->first_tensor; i < info->first_tensor + info->n_tensors; i++) {
		for (uint32_t k = 0; k < u->share.n_seg; k++) {
			struct overlap o = overlap(&s->table->tensor[i], &u->share.seg[k], s->p + u->at);

			if (o.n)
				fill(&s->table->tensor[i], seed, o.first, o.n, o.at);
		}
	}
}

int store_read_unit(struct store *s, uint32_t unit, const struct model_weights *w, struct err *e)
{
	const struct unit_info *info = &s->table->unit[unit];
	const struct store_unit *u = &s->unit[unit];

	for (uint32_t i = info->first_tensor; i < info->first_tensor + info->n_tensors; i++) {
		for (uint32_t k = 0; k < u->share.n_seg; k++) {
			struct overlap o = overlap(&s->table->tensor[i], &u->share.seg[k], s->p + u->at);
			int rc = o.n ? model_weights_read(w, i, o.first, o.n, o.at, e) : 0;

			if (rc)
				return rc;
		}
	}
	return 0;
}
