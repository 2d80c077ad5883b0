/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The step takes effect: Adam over our share of each unit in forward order,
 * and the progress word behind each, so that workers begin the next forward
 * while later units are still being updated. The hash comes last, for nobody
 * waits for it.
 */
#include "shardsvc/shard.h"

#include <assert.h>
#include <errno.h>

static void wait_for(struct engine *g)
{
	struct k_event done;

	g->ops->event_record(g->stream, &done);
	g->ops->event_wait(g->stream, &done);
}

/* A large share takes longer than an ending process has. */
static bool is_stopped(const struct engine *g)
{
	return g->stop && atomic_load_explicit(g->stop, memory_order_relaxed);
}

static void publish(struct store *s, const struct apply_job *j, uint32_t units_done)
{
	fab_progress_publish(s->progress,
			     fab_progress_word((uint16_t)j->branch, (uint32_t)j->step, (uint16_t)units_done));
}

static void adam_unit(struct engine *g, struct store *s, const struct apply_job *j, uint32_t unit)
{
	const struct store_unit *u = &s->unit[unit];
	struct k_adam a = j->adam;

	a.p = s->p + u->at;
	a.m = s->m + u->at;
	a.v = s->v + u->at;
	a.grad = s->piece[u->first_piece].accumulator;
	a.n = u->share.n;
	g->ops->adam(g->stream, &a);
	wait_for(g);
}

/* Chunks that are all padding are left out: they are zero for ever. */
static void hash_unit(struct engine *g, const struct store *s, uint32_t unit, struct hash128 *hash)
{
	uint64_t used = round_up_u64(s->table->unit[unit].n_used, K_CHUNK);
	const struct store_unit *u = &s->unit[unit];

	for (uint32_t i = 0; i < u->share.n_seg; i++) {
		const struct share_seg *seg = &u->share.seg[i];
		uint64_t at = u->at + seg->share_offset;
		uint64_t n = seg->unit_offset < used ? used - seg->unit_offset : 0;
		struct k_state_hash h = { .p = s->p + at, .m = s->m + at, .v = s->v + at, .unit = unit, .out = hash };

		h.n = n < seg->n ? n : seg->n;
		h.first_chunk = seg->unit_offset / K_CHUNK;
		if (h.n)
			g->ops->state_hash(g->stream, &h);
	}
}

int engine_apply(struct engine *g, struct store *s, const struct apply_job *j, struct hash128 *hash)
{
	uint32_t n_units = s->table->n_units;

	assert(n_units <= UINT16_MAX && j->step <= UINT32_MAX);
	for (uint32_t u = 0; u < n_units && !j->skip; u++) {
		if (is_stopped(g))
			return -ECANCELED;
		if (!s->unit[u].share.n)
			continue;
		adam_unit(g, s, j, u);
		if (u + 1 < n_units)
			publish(s, j, u + 1);
	}
	publish(s, j, n_units);
	*hash = (struct hash128){ 0 };
	for (uint32_t u = 0; u < n_units && j->hash_wanted && !is_stopped(g); u++)
		hash_unit(g, s, u, hash);
	wait_for(g);
	return is_stopped(g) ? -ECANCELED : 0;
}

void store_publish_initial(struct store *s, uint32_t branch)
{
	struct apply_job none = { .branch = branch };

	publish(s, &none, s->table->n_units);
}
