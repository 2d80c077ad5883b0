/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Additions along the tree, over our runs. A decision of the coverage (dst =
 * a, or left + right) becomes one segment for each of the piece's: accumulators,
 * sums and pushed contributions are compact, a gradient in place is a whole
 * flat unit of which we read our runs.
 *
 * The unit's gradient is whole when all its parts are at the root. A unit with
 * one part gets its square sum from the pass that makes the root; a unit with
 * two from the pass that adds part 1 to part 0, which goes over the whole share
 * so that each chunk's squares are of its final value. A root that is one
 * contribution is read by that pass where it lies: the tied embedding comes at
 * the very end of backward, when nothing else is left to do.
 */
#include "shardsvc/shard.h"

#include <assert.h>

static const float *operand_at(const struct fold_operand *o, const struct share_seg *g)
{
	if (!o->at)
		return NULL;
	return o->at + (o->flat ? g->unit_offset : g->share_offset);
}

uint32_t fold_segments(const struct piece *p, const struct fold_job *j, struct k_fold_seg out[FOLD_SEGS_MAX])
{
	for (uint32_t i = 0; i < p->n_seg; i++) {
		const struct share_seg *g = &p->seg[i];

		out[i] = (struct k_fold_seg){
			.dst = j->dst + g->share_offset, .a = operand_at(&j->a, g), .b = operand_at(&j->b, g), .n = g->n
		};
	}
	return p->n_seg;
}

/* A part's root where it lies: its accumulator, unless the job names another place. */
static const float *root_at(const struct piece *p, const struct finish_job *j, const struct share_seg *g)
{
	const struct fold_operand accumulator = { .at = p->accumulator };

	return operand_at(j->root[p->part].at ? &j->root[p->part] : &accumulator, g);
}

/* Segment g of part 0, with the one segment of part 1 that may lie inside it. */
static uint32_t split(const struct piece *whole, const struct share_seg *g, const struct piece *other,
		      const struct share_seg *inside, const struct finish_job *j, struct k_fold_seg *out)
{
	float *at = whole->accumulator + g->share_offset;
	const float *a = root_at(whole, j, g);
	uint64_t before = inside ? inside->unit_offset - g->unit_offset : g->n;
	uint64_t behind = inside ? g->n - before - inside->n : 0;
	uint32_t n = 0;

	if (before)
		out[n++] = (struct k_fold_seg){ .dst = at, .a = a, .n = before };
	if (inside)
		out[n++] = (struct k_fold_seg){
			.dst = at + before, .a = a + before, .b = root_at(other, j, inside), .n = inside->n
		};
	if (behind)
		out[n++] = (struct k_fold_seg){ .dst = at + g->n - behind, .a = a + g->n - behind, .n = behind };
	return n;
}

uint32_t finish_segments(const struct store *s, uint32_t unit, const struct finish_job *j,
			 struct k_fold_seg out[FOLD_SEGS_MAX])
{
	const struct store_unit *u = &s->unit[unit];
	const struct piece *whole = &s->piece[u->first_piece];
	const struct piece *other = u->n_pieces > 1 ? whole + 1 : NULL;
	uint32_t n = 0, k = 0;

	static_assert(UNIT_PARTS_MAX == 2, "one addition joins the parts");
	assert(u->n_pieces > 0 && whole->part == 0);
	for (uint32_t i = 0; i < whole->n_seg; i++) {
		const struct share_seg *g = &whole->seg[i], *inside = NULL;

		if (other && k < other->n_seg && other->seg[k].unit_offset < g->unit_offset + g->n)
			inside = &other->seg[k++];
		n += split(whole, g, other, inside, j, &out[n]);
	}
	assert(n <= FOLD_SEGS_MAX && (!other || k == other->n_seg));
	return n;
}

static void run(struct engine *g, uint32_t n_seg, struct exact_sum *square_sum)
{
	struct k_fold f = { .seg = g->seg, .n_seg = n_seg, .square_sum = square_sum };
	struct k_event done;

	if (square_sum)
		exact_sum_clear(square_sum);
	g->ops->fold(g->stream, &f);
	g->ops->event_record(g->stream, &done);
	g->ops->event_wait(g->stream, &done);
}

void engine_fold(struct engine *g, const struct piece *p, const struct fold_job *j, struct exact_sum *square_sum)
{
	run(g, fold_segments(p, j, g->seg), square_sum);
}

void engine_finish(struct engine *g, const struct store *s, uint32_t unit, const struct finish_job *j,
		   struct exact_sum *square_sum)
{
	run(g, finish_segments(s, unit, j, g->seg), square_sum);
}
