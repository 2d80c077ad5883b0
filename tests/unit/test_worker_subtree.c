/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Sums that are added on the host: each rule by itself, then everything by
 * chance: who computes, who looks, when answers come, who is recalled, dies, or
 * is stopped, evicted and goes on. When a span is done, every owner must have
 * all of it.
 */
#include "subtree_host.h"

/* ------------------------------------------------------- the rules, one by one */

/* Four workers with one micro-batch each of a step of four. */
static void four(uint64_t wait_ns)
{
	sim.seed = 1;
	sim.draws = sim.now = 0;
	sim.n_workers = sim.n_micro = 4;
	sim.step++;
	sim.open = sim.done = 0;
	memset(sim.offer, 0, sizeof(sim.offer));
	owners_open();
	workers_open(wait_ns);
	for (uint32_t w = 0; w < 4; w++) {
		sim.worker[w].lease = ++sim.last_lease;
		sim.worker[w].node = (struct tree_node){ w, 0 };
		subtree_begin(&sim.worker[w].tree, sim.worker[w].lease, sim.step, sim.worker[w].node, 4);
	}
	sim.pushed = 0;
}

static void look(uint32_t w)
{
	subtree_look(&sim.worker[w].tree, sim.now);
	drain(w);
}

static enum subtree_state state_of(uint32_t w, uint32_t item)
{
	return sim.worker[w].tree.item[items[item].unit * UNIT_PARTS_MAX + items[item].part].state;
}

static void one_root_leaves_the_host(void **state)
{
	(void)state;
	four(1000);
	for (uint32_t w = 4; w-- > 0;)
		compute(w);
	assert_int_equal(state_of(0, 0), SUBTREE_ADDS);
	assert_int_equal(state_of(2, 0), SUBTREE_ADDS);
	look(1);
	assert_int_equal(state_of(1, 0), SUBTREE_TAKEN);
	finish_add(0, 0);
	finish_add(2, 0);
	look(1);
	assert_int_equal(state_of(1, 0), SUBTREE_GIVEN);
	assert_false(sim.worker[1].buffer[0].busy);
	look(0);
	finish_add(0, 0);
	assert_int_equal(sim.pushed, 1);
	/* Nobody's is over before the owners have it. */
	for (uint32_t w = 1; w < 4; w++) {
		look(w);
		assert_int_equal(state_of(w, 0), SUBTREE_GIVEN);
	}
	while (state_of(0, 0) != SUBTREE_OVER)
		answers(0);
	for (uint32_t w = 1; w < 4; w++) {
		look(w);
		look(w);
	}
	look(3);
	for (uint32_t w = 1; w < 4; w++)
		assert_int_equal(state_of(w, 0), SUBTREE_OVER);
	assert_int_equal(sim.owner[0].root[0], truth(0, tree_root(4)));
	workers_close();
	owners_close();
}

/* Time counts while computing stands still; what is spent is spent for the whole span. */
static void nobody_waits_for_long(void **state)
{
	(void)state;
	four(1000);
	compute(0);
	assert_int_equal(state_of(0, 0), SUBTREE_WAITS);
	assert_true(subtree_watches(&sim.worker[0].tree));
	sim.now += 5000;
	look(0);
	assert_int_equal(state_of(0, 0), SUBTREE_WAITS);
	subtree_stall(&sim.worker[0].tree, true, sim.now);
	sim.now += 999;
	look(0);
	assert_int_equal(state_of(0, 0), SUBTREE_WAITS);
	sim.now += 1;
	look(0);
	assert_int_equal(state_of(0, 0), SUBTREE_PUSHED);
	subtree_stall(&sim.worker[0].tree, false, sim.now);
	compute(0);
	assert_int_equal(state_of(0, 1), SUBTREE_PUSHED);
	/* The other one sees that it is alone too. */
	compute(1);
	assert_int_equal(state_of(1, 0), SUBTREE_PUSHED);
	workers_close();
	owners_close();
}

/* Without patience those still meet who are there at the same moment. */
static void the_impatient_take_what_is_there(void **state)
{
	(void)state;
	four(0);
	sim.worker[1].tree.impatient = false;
	sim.worker[1].tree.cfg.wait_ns = 1000;
	compute(1);
	assert_int_equal(state_of(1, 0), SUBTREE_OFFERED);
	compute(0);
	assert_int_equal(state_of(0, 0), SUBTREE_ADDS);
	workers_close();
	owners_close();
}

static void the_dead_are_not_believed(void **state)
{
	(void)state;
	four(1000);
	compute(1);
	compute(0);
	look(1);
	assert_int_equal(state_of(1, 0), SUBTREE_TAKEN);
	/* Stopped in the middle of its addition: ours again, and what it makes of it is worthless. */
	sim.worker[0].life = EVICTED;
	tell(0, 1);
	assert_int_equal(state_of(1, 0), SUBTREE_PUSHED);
	finish_add(0, 0);
	assert_true(sim.worker[0].cancelled);
	assert_int_equal(sim.pushed, 1);
	/* Dead after it was given: it has to be computed again. */
	compute(3);
	compute(2);
	finish_add(2, 0);
	look(3);
	assert_int_equal(state_of(3, 0), SUBTREE_GIVEN);
	sim.worker[2].life = DEAD;
	tell(2, 3);
	assert_true(sim.worker[3].cancelled);
	workers_close();
	owners_close();
}

static void final_before_death_counts(void **state)
{
	(void)state;
	four(1000);
	compute(3);
	compute(2);
	finish_add(2, 0);
	look(3);
	sim.worker[0].life = DEAD;
	tell(0, 2);
	look(2);
	assert_int_equal(state_of(2, 0), SUBTREE_PUSHED);
	while (state_of(2, 0) != SUBTREE_OVER)
		answers(2);
	sim.worker[2].life = DEAD;
	tell(2, 3);
	assert_int_equal(state_of(3, 0), SUBTREE_OVER);
	assert_false(sim.worker[3].cancelled);
	workers_close();
	owners_close();
}

static void recalled_gives_back(void **state)
{
	(void)state;
	four(1000);
	/* Offered: taken back. */
	compute(1);
	cancel(1);
	assert_int_equal(state_of(1, 0), SUBTREE_OVER);
	compute(0);
	assert_int_equal(state_of(0, 0), SUBTREE_PUSHED);
	/* Taken: the other recalled before it added; ours goes to the owners. */
	compute(3);
	compute(2);
	look(3);
	cancel(2);
	look(3);
	assert_int_equal(state_of(3, 0), SUBTREE_TAKEN);
	finish_add(2, 0);
	look(3);
	assert_int_equal(state_of(3, 0), SUBTREE_PUSHED);
	workers_close();
	owners_close();
}

/* Taken back while the other is between its two looks: it is waited for, whatever it decides. */
static void who_decides_is_waited_for(void **state)
{
	static const enum take_state then[] = { TAKE_NONE, TAKE_ADDING };

	(void)state;
	for (uint32_t k = 0; k < 2; k++) {
		_Atomic uint64_t *word;

		four(1000);
		compute(1);
		word = &board_sum(sim.worker[0].board, sim.worker[0].tree.parity, 0, 1)->take[0];
		atomic_store(word, sim.worker[1].lease << 4 | TAKE_INTENT);
		cancel(1);
		look(1);
		assert_int_equal(state_of(1, 0), SUBTREE_LEAVES);
		assert_true(sim.worker[1].buffer[0].busy);
		atomic_store(word, then[k] ? sim.worker[1].lease << 4 | then[k] : 0);
		look(1);
		assert_int_equal(state_of(1, 0), then[k] ? SUBTREE_TAKEN : SUBTREE_OVER);
		assert_int_equal(sim.worker[1].buffer[0].busy, then[k] != TAKE_NONE);
		workers_close();
		owners_close();
	}
}

/* ---------------------------------------------------------- lives by chance */

static void try_end(uint32_t w)
{
	struct worker *me = &sim.worker[w];

	if (!me->lease || (me->next < ITEMS && !me->cancelled) || !subtree_idle(&me->tree))
		return;
	for (uint32_t k = 0; k < BUFFERS; k++)
		if (me->buffer[k].busy)
			return;
	subtree_end(&me->tree);
	sim.added += me->tree.added;
	sim.given += me->tree.given;
	sim.alone += me->tree.alone;
	me->tree.added = me->tree.given = me->tree.alone = 0;
	me->lease = 0;
	if (me->life != ALIVE)
		return;
	if (me->cancelled) {
		sim.recalled++;
		sim.open |= leaves_of(me->node);
		return;
	}
	assert_int_equal(sim.done & leaves_of(me->node), 0);
	sim.done |= leaves_of(me->node);
	for (uint32_t o = 0; o < OWNERS; o++)
		for (uint32_t i = 0; i < ITEMS; i++)
			assert_int_equal(sim.owner[o].covered[i] & leaves_of(me->node), leaves_of(me->node));
}

/* The lowest open micro-batch, and as much of the tree as chance wants. */
static void lease(uint32_t w)
{
	struct worker *me = &sim.worker[w];
	struct tree_node n;

	if (me->lease || me->life != ALIVE || !sim.open)
		return;
	n = (struct tree_node){ (uint32_t)__builtin_ctz(sim.open), 0 };
	while (draw(2) && !(n.first >> n.level & 1)) {
		struct tree_node up = { n.first, n.level + 1 };

		if (n.first + (1u << n.level) >= sim.n_micro || (leaves_of(up) & ~sim.open))
			break;
		n = up;
	}
	n = tree_canonical(n, sim.n_micro);
	sim.open &= ~leaves_of(n);
	me->lease = ++sim.last_lease;
	me->node = n;
	me->next = 0;
	me->cancelled = false;
	subtree_begin(&me->tree, me->lease, sim.step, n, sim.n_micro);
}

static void worker_acts(uint32_t w)
{
	struct worker *me = &sim.worker[w];
	uint32_t k = (uint32_t)draw(BUFFERS);

	if (me->life == NOT_THERE || me->life == DEAD)
		return;
	lease(w);
	if (!me->lease)
		return;
	switch (draw(5)) {
	case 0:
		compute(w);
		break;
	case 1:
		if (me->buffer[k].adding)
			finish_add(w, k);
		break;
	case 2:
		answers(w);
		break;
	default:
		subtree_look(&me->tree, sim.now);
		drain(w);
	}
	try_end(w);
}

static void end_life(uint32_t w)
{
	struct worker *me = &sim.worker[w];

	me->life = draw(2) ? DEAD : EVICTED;
	sim.deaths++;
	if (me->lease)
		sim.open |= leaves_of(me->node);
}

static void tell_owners(uint32_t gone)
{
	sim.worker[gone].owners_told = true;
	for (uint32_t id = 0; id < OFFERS; id++)
		if (sim.offer[id].worker == gone)
			owner_withdraws(id);
}

static void news(void)
{
	for (uint32_t w = 0; w < sim.n_workers; w++) {
		if (sim.worker[w].life != DEAD && sim.worker[w].life != EVICTED)
			continue;
		if (draw(30) == 0)
			tell_owners(w);
		if (draw(5) == 0)
			tell(w, (uint32_t)draw(sim.n_workers));
	}
}

static uint32_t n_alive(void)
{
	uint32_t n = 0;

	for (uint32_t w = 0; w < sim.n_workers; w++)
		n += sim.worker[w].life == ALIVE;
	return n;
}

static bool step_complete(void)
{
	for (uint32_t o = 0; o < OWNERS; o++)
		for (uint32_t i = 0; i < ITEMS; i++)
			if (!coverage_complete(&sim.owner[o].coverage[i]))
				return false;
	return sim.done == (1u << sim.n_micro) - 1;
}

static void close_step(void)
{
	for (uint32_t o = 0; o < OWNERS; o++) {
		for (uint32_t i = 0; i < ITEMS; i++) {
			assert_int_equal(sim.owner[o].root[i], truth(i, tree_root(sim.n_micro)));
			coverage_close(&sim.owner[o].coverage[i]);
			owner_runs(o, i);
		}
	}
	/* Whoever was evicted has heard of it by now. */
	for (uint32_t w = 0; w < sim.n_workers; w++)
		if (sim.worker[w].life == EVICTED)
			sim.worker[w].life = DEAD;
	for (uint32_t id = 0; id < OFFERS; id++)
		if (sim.worker[sim.offer[id].worker].life == DEAD)
			sim.offer[id].live = false;
}

static void one_step(uint32_t misery)
{
	uint32_t events = 0;

	sim.step++;
	sim.open = (1u << sim.n_micro) - 1;
	sim.done = 0;
	owners_open();
	while (!step_complete()) {
		uint32_t w = (uint32_t)draw(sim.n_workers);

		assert_true(events++ < 200000);
		sim.now += draw(40);
		worker_acts(w);
		news();
		if (misery && draw(misery) == 0)
			cancel(w);
		if (misery && draw(misery * 4) == 0 && sim.worker[w].life == ALIVE && n_alive() > 1)
			end_life(w);
	}
	close_step();
}

static void random_lives(uint32_t misery, uint64_t seeds)
{
	static const uint64_t waits[] = { 0, 300, 20000 };

	sim.added = sim.given = sim.alone = sim.lost = sim.recalled = sim.deaths = 0;
	for (uint64_t seed = 1; seed <= seeds; seed++) {
		sim.seed = seed * 1000 + misery;
		sim.draws = 0;
		sim.n_workers = 1 + (uint32_t)draw(WORKERS);
		sim.n_micro = 1 + (uint32_t)draw(MICRO_MAX);
		memset(sim.offer, 0, sizeof(sim.offer));
		workers_open(waits[draw(3)]);
		for (uint32_t t = 0; t < 4; t++)
			one_step(misery);
		workers_close();
	}
	owners_close();
}

static void lives_in_peace(void **state)
{
	(void)state;
	random_lives(0, 150);
	assert_true(sim.added > 1000 && sim.given == sim.added && sim.alone > 1000);
	assert_int_equal(sim.lost + sim.recalled, 0);
}

static void lives_with_recalls_and_deaths(void **state)
{
	(void)state;
	random_lives(100, 300);
	assert_true(sim.added > 1000 && sim.lost > 50 && sim.recalled > 500 && sim.deaths > 150);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(one_root_leaves_the_host),         cmocka_unit_test(nobody_waits_for_long),
		cmocka_unit_test(the_impatient_take_what_is_there), cmocka_unit_test(the_dead_are_not_believed),
		cmocka_unit_test(final_before_death_counts),        cmocka_unit_test(recalled_gives_back),
		cmocka_unit_test(who_decides_is_waited_for),        cmocka_unit_test(lives_in_peace),
		cmocka_unit_test(lives_with_recalls_and_deaths),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
