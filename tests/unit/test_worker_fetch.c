/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The fetch state machine under random order of completion. A small simulator
 * plays the compute thread (which finishes uses in order, as it likes) and the
 * fabric (which ends reads in any order), and checks at every moment: places
 * do not overlap and stay inside the window, no more is read ahead than
 * allowed, what is in use stays where it is, and every span comes to its end.
 */
#include "base/base.h"
#include "worker/fetch.h"

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { UNITS_MAX = 12, USES_MAX = 32 };

struct sim {
	uint64_t seed, draws;
	struct fetch f;
	uint64_t elements[UNITS_MAX];
	struct use uses[2][USES_MAX];
	uint32_t n_uses[2], n_units;
	uint32_t reading[UNITS_MAX], n_reading;
	uint64_t version_of[UNITS_MAX]; /* what was read into the unit's place */
	uint64_t version;
	const struct use *use; /* the plan's */
	uint32_t n, computed, announced;
	uint64_t reads;
	bool shared; /* others copy from places, and are through after a while */
};

static uint64_t draw(struct sim *s, uint64_t below)
{
	return rng_u64(s->seed, 0, s->draws++) % below;
}

/* A model: embedding, equal blocks, small head; tied or not. */
static void make_uses(struct sim *s, bool tied)
{
	uint32_t layers = s->n_units - 2;

	for (unsigned training = 0; training < 2; training++) {
		struct use *u = s->uses[training];
		uint32_t n = 0;

		u[n++] = (struct use){ .kind = USE_EMBED, .n = 1, .unit = { 0 } };
		for (uint32_t l = 0; l < layers; l++)
			u[n++] = (struct use){ .kind = USE_BLOCK, .n = 1, .unit = { 1 + l } };
		u[n++] = (struct use){ .kind = USE_HEAD, .n = tied ? 2 : 1, .unit = { layers + 1, 0 } };
		for (uint32_t l = layers; training && l-- > 0;)
			u[n++] = (struct use){ .kind = USE_BLOCK_BACKWARD, .n = 1, .unit = { 1 + l } };
		if (training)
			u[n++] = (struct use){ .kind = USE_EMBED_BACKWARD };
		s->n_uses[training] = n;
	}
}

static bool leave(void *ctx, uint32_t unit)
{
	(void)unit;
	return draw(ctx, 3) == 0;
}

static void sim_open(struct sim *s, uint64_t seed)
{
	struct fetch_config cfg = { .unit_elements = s->elements };
	uint64_t least, all = 0;

	*s = (struct sim){ .seed = seed };
	s->n_units = 3 + (uint32_t)draw(s, UNITS_MAX - 2);
	for (uint32_t i = 0; i < s->n_units; i++) {
		s->elements[i] = 1 + draw(s, i == 0 ? 40 : 20);
		if (i > 1 && i + 1 < s->n_units && draw(s, 4) > 0)
			s->elements[i] = s->elements[1];
		all += s->elements[i];
	}
	make_uses(s, draw(s, 2));
	cfg.n_units = s->n_units;
	least = fetch_window_min(s->elements, s->uses[1], s->n_uses[1]);
	cfg.window = draw(s, 3) ? least + draw(s, all) : least;
	cfg.prefetch = draw(s, 4) ? draw(s, all) : 0;
	cfg.reuse = draw(s, 3) ? draw(s, 2 * all) : draw(s, 2) ? 0 : 1000000000;
	s->shared = draw(s, 2);
	cfg.leave = s->shared ? leave : NULL;
	cfg.ctx = s;
	assert_int_equal(fetch_init(&s->f, &cfg), 0);
}

static void check_window(const struct sim *s)
{
	uint64_t ahead = 0, live = 0;

	for (uint32_t i = 0; i < s->n_units; i++) {
		const struct fetch_unit *a = &s->f.unit[i];

		assert_true(s->shared || !a->shown);
		if (a->state == FETCH_ABSENT)
			continue;
		/* A unit is somewhere, or something of it is left somewhere. */
		assert_false(a->shown);
		live += s->elements[i];
		assert_true(a->offset + s->elements[i] <= s->f.cfg.window);
		if (!a->doomed && a->for_use > s->f.pos)
			ahead += s->elements[i];
		for (uint32_t k = 0; k < s->n_units; k++) {
			const struct fetch_unit *b = &s->f.unit[k];

			if (k == i)
				continue;
			assert_true((b->state == FETCH_ABSENT && !b->shown) ||
				    a->offset >= b->offset + s->elements[k] || b->offset >= a->offset + s->elements[i]);
		}
	}
	assert_true(ahead <= s->f.cfg.prefetch);
	assert_in_range(s->f.live_max, live, s->f.cfg.window);
}

/* Everything announced and not computed is there, of the right version. */
static void check_announced(const struct sim *s)
{
	for (uint32_t i = s->computed; i < s->announced; i++) {
		for (uint32_t k = 0; k < s->use[i].n; k++) {
			uint32_t unit = s->use[i].unit[k];

			assert_int_equal(s->f.unit[unit].state, FETCH_THERE);
			assert_int_equal(s->version_of[unit], s->version);
		}
	}
}

static void take_actions(struct sim *s)
{
	struct fetch_action a;

	while (fetch_next(&s->f, &a)) {
		switch (a.type) {
		case FETCH_READ:
			for (uint32_t i = 0; i < s->n_reading; i++)
				assert_int_not_equal(s->reading[i], a.unit);
			s->reading[s->n_reading++] = a.unit;
			s->version_of[a.unit] = s->version;
			s->reads++;
			break;
		case FETCH_USE:
			assert_int_equal(a.use, s->announced);
			s->announced++;
			break;
		case FETCH_FAILED:
			fail_msg("unit %u failed", a.unit);
		}
		check_window(s);
		check_announced(s);
	}
}

static void end_read(struct sim *s)
{
	uint32_t k = (uint32_t)draw(s, s->n_reading), unit = s->reading[k];

	s->reading[k] = s->reading[--s->n_reading];
	fetch_arrived(&s->f, unit, 0);
}

static void begin_span(struct sim *s)
{
	unsigned training = draw(s, 4) > 0;

	s->version += draw(s, 2);
	s->use = s->uses[training];
	s->n = s->n_uses[training];
	s->computed = s->announced = 0;
	fetch_plan(&s->f, s->version, s->use, s->n);
}

/* cut: how many uses to compute before the span is recalled; more than there are: never. */
static void run_span(struct sim *s, uint32_t cut)
{
	uint32_t events = 0;

	begin_span(s);
	while (s->computed < s->n && s->computed < cut) {
		bool may_compute;

		take_actions(s);
		may_compute = s->announced > s->computed;
		/* Else nothing would ever happen again. */
		assert_true(may_compute || s->n_reading > 0 || s->f.held_up);
		assert_true(++events < 1000);
		if (s->f.held_up && draw(s, 2))
			continue;
		if (!may_compute && !s->n_reading)
			continue;
		if (s->n_reading && (!may_compute || draw(s, 2))) {
			end_read(s);
		} else {
			fetch_finished(&s->f, s->computed++);
			check_window(s);
		}
	}
	if (s->computed < s->n)
		fetch_cancel(&s->f);
	else
		take_actions(s);
}

static void never_locks_up(void **state)
{
	(void)state;
	for (uint64_t seed = 1; seed <= 3000; seed++) {
		struct sim s;

		sim_open(&s, seed);
		for (int span = 0; span < 6; span++)
			run_span(&s, draw(&s, 3) ? UINT32_MAX : (uint32_t)draw(&s, 10));
		fetch_release(&s.f);
	}
}

static void open_fixed(struct sim *s, uint64_t window, uint64_t prefetch, uint64_t reuse)
{
	struct fetch_config cfg = {
		.n_units = 6, .unit_elements = s->elements, .window = window, .prefetch = prefetch, .reuse = reuse
	};

	*s = (struct sim){ .seed = 1, .n_units = 6, .version = 1, .elements = { 30, 10, 10, 10, 10, 1 } };
	make_uses(s, true);
	assert_int_equal(fetch_init(&s->f, &cfg), 0);
}

static void whole_span(struct sim *s)
{
	s->use = s->uses[1];
	s->n = s->n_uses[1];
	s->computed = s->announced = 0;
	fetch_plan(&s->f, s->version, s->use, s->n);
	take_actions(s);
	while (s->computed < s->n) {
		while (s->n_reading) {
			end_read(s);
			take_actions(s);
		}
		assert_true(s->announced > s->computed);
		fetch_finished(&s->f, s->computed++);
		take_actions(s);
	}
}

/* Room and distance for everything: each unit once, and nothing again for the next span of the version. */
static void everything_is_read_once(void **state)
{
	struct sim s;

	(void)state;
	open_fixed(&s, 71, 1000, 1000);
	whole_span(&s);
	assert_int_equal(s.reads, 6);
	whole_span(&s);
	assert_int_equal(s.reads, 6);
	s.version++;
	whole_span(&s);
	assert_int_equal(s.reads, 12);
	fetch_release(&s.f);
}

/* No distance: one read forward and one backward, but for the block that turns round and the embedding. */
static void released_after_use(void **state)
{
	struct sim s;

	(void)state;
	open_fixed(&s, 71, 0, 0);
	whole_span(&s);
	/* embedding, 4 blocks, head and embedding, 4 blocks */
	assert_int_equal(s.reads, 1 + 4 + 2 + 4);
	fetch_release(&s.f);
	/* The last block comes back behind the head: 31 elements. */
	open_fixed(&s, 71, 0, 31);
	whole_span(&s);
	assert_int_equal(s.reads, 1 + 4 + 2 + 3);
	fetch_release(&s.f);
}

/* The window holds the head with its embedding and no more: what comes back last gave way. */
static void smallest_window(void **state)
{
	struct sim s;

	(void)state;
	open_fixed(&s, 31, 1000, 1000);
	whole_span(&s);
	assert_true(s.reads >= 1 + 4 + 2 + 1);
	fetch_release(&s.f);
}

static void prefetch_limits(void **state)
{
	struct sim s;

	(void)state;
	open_fixed(&s, 71, 20, 0);
	fetch_plan(&s.f, 1, s.uses[1], s.n_uses[1]);
	s.use = s.uses[1];
	take_actions(&s);
	/* The embedding is a demand; two blocks fit the bucket. */
	assert_int_equal(s.n_reading, 3);
	fetch_release(&s.f);
	open_fixed(&s, 71, 9, 0);
	fetch_plan(&s.f, 1, s.uses[1], s.n_uses[1]);
	s.use = s.uses[1];
	take_actions(&s);
	assert_int_equal(s.n_reading, 1);
	fetch_release(&s.f);
}

static void failure_is_told_once(void **state)
{
	struct fetch_action a;
	struct sim s;

	(void)state;
	open_fixed(&s, 71, 0, 0);
	fetch_plan(&s.f, 1, s.uses[1], s.n_uses[1]);
	assert_true(fetch_next(&s.f, &a));
	assert_int_equal(a.type, FETCH_READ);
	fetch_arrived(&s.f, 0, -ESTALE);
	assert_true(fetch_next(&s.f, &a));
	assert_int_equal(a.type, FETCH_FAILED);
	assert_int_equal(a.unit, 0);
	assert_int_equal(a.status, -ESTALE);
	assert_false(fetch_next(&s.f, &a));
	/* The next plan begins anew. */
	fetch_plan(&s.f, 2, s.uses[1], s.n_uses[1]);
	assert_true(fetch_next(&s.f, &a));
	assert_int_equal(a.type, FETCH_READ);
	fetch_release(&s.f);
}

/* A read for a version that is over ends first; then its unit is read again. */
static void old_reads_are_not_used(void **state)
{
	struct fetch_action a;
	struct sim s;

	(void)state;
	open_fixed(&s, 71, 0, 0);
	fetch_plan(&s.f, 1, s.uses[1], s.n_uses[1]);
	assert_true(fetch_next(&s.f, &a));
	fetch_cancel(&s.f);
	assert_false(fetch_next(&s.f, &a));
	fetch_plan(&s.f, 2, s.uses[1], s.n_uses[1]);
	assert_true(fetch_is_doomed(&s.f, 0));
	assert_false(fetch_next(&s.f, &a));
	fetch_arrived(&s.f, 0, -ESTALE);
	assert_true(fetch_next(&s.f, &a));
	assert_int_equal(a.type, FETCH_READ);
	assert_int_equal(a.unit, 0);
	fetch_release(&s.f);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(never_locks_up),         cmocka_unit_test(everything_is_read_once),
		cmocka_unit_test(released_after_use),     cmocka_unit_test(smallest_window),
		cmocka_unit_test(prefetch_limits),        cmocka_unit_test(failure_is_told_once),
		cmocka_unit_test(old_reads_are_not_used),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
