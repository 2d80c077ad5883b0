/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The first parameters. Every element is a function of (seed, tensor, place in
 * the tensor), so each owner makes its own and nobody needs to know who owns
 * the rest.
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

/* What of the tensor lies in the segment. */
static void fill_overlap(const struct tensor_info *x, uint64_t seed, const struct share_seg *g, float *share)
{
	uint64_t begin = x->offset > g->unit_offset ? x->offset : g->unit_offset;
	uint64_t tensor_end = x->offset + x->n, seg_end = g->unit_offset + g->n;
	uint64_t end = tensor_end < seg_end ? tensor_end : seg_end;

	if (begin < end)
		fill(x, seed, begin - x->offset, end - begin, share + g->share_offset + (begin - g->unit_offset));
}

void store_fill_unit(struct store *s, uint32_t unit, uint64_t seed)
{
	const struct unit_info *info = &s->table->unit[unit];
	const struct store_unit *u = &s->unit[unit];

	for (uint32_t i = 0; i < info->n_tensors; i++)
		for (uint32_t k = 0; k < u->share.n_seg; k++)
			fill_overlap(&s->table->tensor[info->first_tensor + i], seed, &u->share.seg[k], s->p + u->at);
}
