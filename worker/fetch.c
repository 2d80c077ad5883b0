/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The live window.
 *
 * The order of uses of a span is known, so nothing is guessed: reads are
 * started in that order, use by use. The use that is computed next (pos) is a
 * demand; later ones are prefetched while the elements read ahead stay within
 * stage3_prefetch_bucket_size and a place is found. A unit stays after its use
 * while it comes back within stage3_max_reuse_distance; the order is taken as
 * a circle, since the next span of the same version begins like this one.
 *
 * Places are contiguous, found first-fit. When there is none, units that no
 * started use needs give way, the one needed last first; for a prefetch only
 * those needed later than what is prefetched, so a prefetch never costs a read
 * that its gain does not cover.
 *
 * It cannot lock up. A demand is only ever the lowest use not started, so all
 * that is pinned then is the use itself; everything else gives way at once or,
 * being read, when it has arrived, and nothing else is started meanwhile. If
 * the use's own units are in each other's way, all that is there gives way and
 * they are placed anew from the window's start, where they fit, the window
 * being as large as the largest use. Reads end by themselves: an owner's progress does not depend
 * on this worker.
 *
 * Where workers of a host copy from each other, a unit that was dropped goes on
 * to be offered as long as its bytes lie there. A read begins when whoever still
 * copies from its place is through; until then nothing is started, which takes a
 * moment and is no lock, since those who copy wait for nobody.
 */
#include "worker/fetch.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>

#define NO_USE UINT32_MAX

int fetch_init(struct fetch *f, const struct fetch_config *cfg)
{
	*f = (struct fetch){ .cfg = *cfg };
	f->unit = calloc(cfg->n_units, sizeof(*f->unit));
	return f->unit ? 0 : -ENOMEM;
}

void fetch_release(struct fetch *f)
{
	free(f->unit);
	*f = (struct fetch){ 0 };
}

static uint64_t use_elements(const uint64_t *elements, const struct use *u)
{
	uint64_t n = 0;

	for (uint32_t i = 0; i < u->n; i++)
		n += elements[u->unit[i]];
	return n;
}

uint64_t fetch_window_min(const uint64_t *unit_elements, const struct use *uses, uint32_t n_uses)
{
	uint64_t most = 0;

	for (uint32_t i = 0; i < n_uses; i++) {
		uint64_t n = use_elements(unit_elements, &uses[i]);

		most = n > most ? n : most;
	}
	return most;
}

static bool use_has(const struct use *u, uint32_t unit)
{
	for (uint32_t i = 0; i < u->n; i++)
		if (u->unit[i] == unit)
			return true;
	return false;
}

/* The first use of unit from `from` on, going round once; NO_USE when there is none. */
static uint32_t next_use(const struct fetch *f, uint32_t unit, uint32_t from)
{
	for (uint32_t i = 0; i < f->n_uses; i++)
		if (use_has(&f->uses[(from + i) % f->n_uses], unit))
			return from + i;
	return NO_USE;
}

static void drop(struct fetch *f, uint32_t unit)
{
	f->unit[unit].state = FETCH_ABSENT;
	f->unit[unit].shown = f->cfg.leave != NULL;
}

void fetch_plan(struct fetch *f, uint64_t version, const struct use *uses, uint32_t n_uses)
{
	assert(f->cfg.window >= fetch_window_min(f->cfg.unit_elements, uses, n_uses));
	for (uint32_t i = 0; i < f->cfg.n_units; i++) {
		struct fetch_unit *u = &f->unit[i];

		u->for_use = 0;
		if (version == f->version)
			continue;
		u->doomed = u->state == FETCH_READING;
		if (u->state == FETCH_THERE)
			drop(f, i);
	}
	f->version = version;
	f->uses = uses;
	f->n_uses = n_uses;
	f->pos = f->ready = f->started = 0;
	f->status = 0;
	f->failure_told = false;
}

void fetch_cancel(struct fetch *f)
{
	f->n_uses = f->pos = f->ready = f->started = 0;
}

/* Does it come back within the distance? Counted: what is used between. */
static bool comes_back(const struct fetch *f, uint32_t unit)
{
	uint32_t next = next_use(f, unit, f->pos);
	uint64_t between = 0;

	if (next == NO_USE)
		return false;
	for (uint32_t i = f->pos; i < next; i++)
		between += use_elements(f->cfg.unit_elements, &f->uses[i % f->n_uses]);
	return between <= f->cfg.reuse;
}

/* Needed by a use that was started and is not computed yet. */
static bool is_pinned(const struct fetch *f, uint32_t unit)
{
	for (uint32_t i = f->pos; i < f->started; i++)
		if (use_has(&f->uses[i], unit))
			return true;
	return false;
}

void fetch_finished(struct fetch *f, uint32_t use)
{
	if (use >= f->n_uses || use < f->pos)
		return; /* of a span that was cancelled */
	assert(use < f->ready);
	for (uint32_t i = f->pos; i <= use; i++) {
		f->pos = i + 1;
		for (uint32_t k = 0; k < f->uses[i].n; k++) {
			uint32_t unit = f->uses[i].unit[k];

			assert(f->unit[unit].state == FETCH_THERE);
			if (!is_pinned(f, unit) && !comes_back(f, unit))
				drop(f, unit);
		}
	}
}

void fetch_arrived(struct fetch *f, uint32_t unit, int status)
{
	struct fetch_unit *u = &f->unit[unit];

	assert(u->state == FETCH_READING);
	if (status || u->doomed)
		drop(f, unit);
	else
		u->state = FETCH_THERE;
	if (status && !u->doomed && !f->status && f->n_uses > 0) {
		f->status = status;
		f->failed_unit = unit;
	}
	u->doomed = false;
}

bool fetch_is_doomed(const struct fetch *f, uint32_t unit)
{
	return f->unit[unit].doomed;
}

/* ------------------------------------------------------------------ places */

static bool overlaps(const struct fetch *f, uint32_t unit, uint64_t begin, uint64_t n)
{
	const struct fetch_unit *u = &f->unit[unit];

	return u->offset < begin + n && begin < u->offset + f->cfg.unit_elements[unit];
}

/* The unit that overlaps [begin, begin + n), victims aside; NO_USE when the room is free. */
static uint32_t occupant(const struct fetch *f, uint64_t begin, uint64_t n)
{
	for (uint32_t i = 0; i < f->cfg.n_units; i++) {
		const struct fetch_unit *u = &f->unit[i];

		if (u->state != FETCH_ABSENT && !u->victim && overlaps(f, i, begin, n))
			return i;
	}
	return NO_USE;
}

static bool find_hole(const struct fetch *f, uint64_t n, uint64_t *out)
{
	uint64_t at = 0;

	while (at + n <= f->cfg.window) {
		uint32_t in_the_way = occupant(f, at, n);

		if (in_the_way == NO_USE) {
			*out = at;
			return true;
		}
		at = f->unit[in_the_way].offset + f->cfg.unit_elements[in_the_way];
	}
	return false;
}

/* The unit that can go and is needed last; only those needed after `use`. */
static uint32_t pick_victim(const struct fetch *f, uint32_t use)
{
	uint32_t best = NO_USE, best_next = 0;

	for (uint32_t i = 0; i < f->cfg.n_units; i++) {
		uint32_t next;

		if (f->unit[i].state != FETCH_THERE || f->unit[i].victim || is_pinned(f, i) ||
		    use_has(&f->uses[use], i))
			continue;
		next = next_use(f, i, f->pos);
		if (next > use && (best == NO_USE || next > best_next)) {
			best = i;
			best_next = next;
		}
	}
	return best;
}

/* Victims in the way of the place go; the others may stay after all. */
static void settle_victims(struct fetch *f, bool found, uint64_t at, uint64_t n)
{
	for (uint32_t i = 0; i < f->cfg.n_units; i++) {
		struct fetch_unit *u = &f->unit[i];

		if (u->victim && found && overlaps(f, i, at, n))
			drop(f, i);
		u->victim = false;
	}
}

static bool make_room(struct fetch *f, uint32_t use, uint64_t n, uint64_t *at)
{
	bool found;

	while (!(found = find_hole(f, n, at))) {
		uint32_t victim = pick_victim(f, use);

		if (victim == NO_USE)
			break;
		f->unit[victim].victim = true;
	}
	settle_victims(f, found, found ? *at : 0, n);
	return found;
}

static bool any_reading(const struct fetch *f)
{
	for (uint32_t i = 0; i < f->cfg.n_units; i++)
		if (f->unit[i].state == FETCH_READING)
			return true;
	return false;
}

/* Elements read, or being read, for uses behind the one being computed. */
static uint64_t elements_ahead(const struct fetch *f)
{
	uint64_t n = 0;

	for (uint32_t i = 0; i < f->cfg.n_units; i++)
		if (f->unit[i].state != FETCH_ABSENT && !f->unit[i].doomed && f->unit[i].for_use > f->pos)
			n += f->cfg.unit_elements[i];
	return n;
}

/* A place for a unit of the next use to start. False: not now. */
static bool place(struct fetch *f, uint32_t unit, uint64_t *at)
{
	uint64_t n = f->cfg.unit_elements[unit];
	uint32_t use = f->started;

	if (use > f->pos && elements_ahead(f) + n > f->cfg.prefetch)
		return false;
	if (make_room(f, use, n, at))
		return true;
	if (use > f->pos || any_reading(f))
		return false;
	/* The use's own units are in each other's way: they are placed anew, in an empty window. */
	for (uint32_t i = 0; i < f->cfg.n_units; i++)
		if (f->unit[i].state != FETCH_ABSENT)
			drop(f, i);
	return make_room(f, use, n, at);
}

/* What lies in the place of `unit`, and what it left elsewhere, is offered to nobody any more. False: not yet. */
static bool vacate(struct fetch *f, uint32_t unit, uint64_t at)
{
	bool all = true;

	for (uint32_t i = 0; i < f->cfg.n_units; i++) {
		struct fetch_unit *u = &f->unit[i];

		if (!u->shown || (i != unit && !overlaps(f, i, at, f->cfg.unit_elements[unit])))
			continue;
		u->shown = !f->cfg.leave(f->cfg.ctx, i);
		all &= !u->shown;
	}
	f->held_up = !all;
	return all;
}

/* ----------------------------------------------------------------- actions */

static bool all_there(const struct fetch *f, const struct use *u)
{
	for (uint32_t i = 0; i < u->n; i++)
		if (f->unit[u->unit[i]].state != FETCH_THERE)
			return false;
	return true;
}

/* What a user bounded by stage3_max_live_parameters. */
static void note_live(struct fetch *f)
{
	uint64_t live = 0;

	for (uint32_t i = 0; i < f->cfg.n_units; i++)
		live += f->unit[i].state != FETCH_ABSENT ? f->cfg.unit_elements[i] : 0;
	assert(live <= f->cfg.window);
	if (live > atomic_load_explicit(&f->live_max, memory_order_relaxed))
		atomic_store_explicit(&f->live_max, live, memory_order_relaxed);
}

/* Starts the next read. False: nothing can be started now. */
static bool start(struct fetch *f, struct fetch_action *out)
{
	for (; f->started < f->n_uses; f->started++) {
		const struct use *u = &f->uses[f->started];

		for (uint32_t i = 0; i < u->n; i++) {
			struct fetch_unit *x = &f->unit[u->unit[i]];
			uint64_t at;

			if (x->doomed)
				return false;
			if (x->state != FETCH_ABSENT)
				continue;
			if (!place(f, u->unit[i], &at) || !vacate(f, u->unit[i], at))
				return false;
			*x = (struct fetch_unit){ .state = FETCH_READING, .offset = at, .for_use = f->started };
			note_live(f);
			*out = (struct fetch_action){ .type = FETCH_READ, .unit = u->unit[i], .offset = at };
			return true;
		}
	}
	return false;
}

static bool announce(struct fetch *f, struct fetch_action *out)
{
	if (f->ready == f->started || !all_there(f, &f->uses[f->ready]))
		return false;
	*out = (struct fetch_action){ .type = FETCH_USE, .use = f->ready++ };
	return true;
}

bool fetch_next(struct fetch *f, struct fetch_action *out)
{
	if (f->status) {
		bool tell = !f->failure_told;

		f->failure_told = true;
		*out = (struct fetch_action){ .type = FETCH_FAILED, .unit = f->failed_unit, .status = f->status };
		return tell;
	}
	f->held_up = false;
	/* Once more behind start: it passes over uses whose units are all there. */
	return announce(f, out) || start(f, out) || announce(f, out);
}
