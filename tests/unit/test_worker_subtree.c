/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Sums that are added on the host: workers with real machines on real boards,
 * owners with real coverages, and everything else by chance: who computes, who
 * looks, when answers come, who is recalled, dies, or is stopped, evicted and
 * goes on. Values name what they must contain, so a root says whether every
 * micro-batch is in it once and in the order of the tree; and when a span is
 * done, every owner must have all of it.
 */
#include "worker/subtree.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { WORKERS = 6, UNITS = 3, ITEMS = UNITS + 1, BUFFERS = 2, OWNERS = 2, MICRO_MAX = 16, SUMS = 256, OFFERS = 512 };

#define GARBAGE UINT64_C(0xdead)
#define FIRST_MEMBER 10u

/* What a worker computes, in this order: the head's part of the embedding comes first. */
static const struct {
	uint32_t unit, part;
} items[ITEMS] = { { 0, 1 }, { 2, 0 }, { 1, 0 }, { 0, 0 } };

struct buffer {
	bool busy, adding, pushed, lost;
	uint32_t item, from, from_buffer, outstanding;
	uint64_t value;
};
enum life { NOT_THERE, ALIVE, EVICTED, DEAD };
struct worker {
	enum life life;
	bool told[WORKERS], owners_told; /* of this one's end */
	struct board *board;
	struct boards boards;
	struct subtree tree;
	uint64_t lease;
	struct tree_node node;
	uint32_t next; /* item to compute */
	bool cancelled;
	struct buffer buffer[BUFFERS];
};
struct owner {
	struct coverage coverage[ITEMS];
	void *memory[ITEMS];
	uint64_t sum[ITEMS][SUMS];
	bool used[ITEMS][SUMS];
	uint32_t covered[ITEMS]; /* bit per micro-batch, by answers given */
	uint64_t root[ITEMS];
};
struct offer {
	bool live, answered;
	uint32_t worker, buffer, owner, item;
	struct tree_node node;
	enum offer_verdict verdict;
};

static struct {
	uint32_t n_micro, n_workers;
	uint64_t seed, draws, now, step, last_lease;
	uint32_t open, done; /* bit per micro-batch */
	struct worker worker[WORKERS];
	struct owner owner[OWNERS];
	struct offer offer[OFFERS];
	uint32_t n_offers;
	uint64_t added, given, alone, lost, recalled, deaths, pushed; /* over all seeds */
} sim;

static uint64_t draw(uint64_t below)
{
	return rng_u64(sim.seed, 0, sim.draws++) % below;
}

/* ------------------------------------------------------------------- truth */

static uint64_t sum_of(uint64_t left, uint64_t right)
{
	return rng_u64(left, right, 77);
}

static uint64_t truth(uint32_t item, struct tree_node n)
{
	struct tree_node left, right;

	if (!tree_children(n, sim.n_micro, &left, &right))
		return rng_u64(sim.step, item, n.first);
	return sum_of(truth(item, left), truth(item, right));
}

static uint32_t leaves_of(struct tree_node n)
{
	return ((1u << tree_leaves(n, sim.n_micro)) - 1) << n.first;
}

/* ------------------------------------------------------------------ owners */

struct sums {
	bool *used;
};
static struct sums pools[OWNERS][ITEMS];

static uint32_t take_sum(void *ctx, bool must)
{
	struct sums *p = ctx;
	uint32_t k = 1;

	(void)must;
	while (p->used[k])
		k++;
	assert_true(k < SUMS);
	p->used[k] = true;
	return k;
}

static void give_sum(void *ctx, uint32_t sum)
{
	struct sums *p = ctx;

	assert_true(p->used[sum]);
	p->used[sum] = false;
}

static void owners_open(void)
{
	for (uint32_t o = 0; o < OWNERS; o++) {
		struct owner *w = &sim.owner[o];

		for (uint32_t i = 0; i < ITEMS; i++) {
			const struct coverage_sums sums = { take_sum, give_sum, &pools[o][i] };

			pools[o][i].used = w->used[i];
			if (!w->memory[i])
				w->memory[i] = malloc(coverage_bytes(64));
			coverage_init(&w->coverage[i], sim.n_micro, COVERAGE_K_MAX, &sums, w->memory[i], 64);
			w->covered[i] = 0;
			w->root[i] = 0;
		}
	}
}

static void decided(uint64_t id, enum offer_verdict verdict)
{
	struct offer *o = &sim.offer[id];

	assert_true(o->live && !o->answered);
	o->answered = true;
	o->verdict = verdict;
	if (verdict == OFFER_TAKEN)
		sim.owner[o->owner].covered[o->item] |= leaves_of(o->node);
}

static uint64_t operand_value(const struct owner *o, uint32_t item, const struct operand *x)
{
	const struct offer *f = &sim.offer[x->offer];

	if (x->kind == OPERAND_SUM)
		return o->sum[item][x->sum];
	assert_int_equal(sim.worker[f->worker].buffer[f->buffer].item, item);
	return sim.worker[f->worker].buffer[f->buffer].value;
}

static void owner_runs(uint32_t owner, uint32_t item)
{
	struct owner *o = &sim.owner[owner];
	struct coverage_action a;

	while (coverage_next(&o->coverage[item], &a)) {
		uint64_t value;

		switch (a.type) {
		case COVERAGE_ANSWER:
			decided(a.offer, a.verdict);
			break;
		case COVERAGE_FOLD:
			value = operand_value(o, item, &a.a);
			if (a.b.kind != OPERAND_NONE)
				value = sum_of(value, operand_value(o, item, &a.b));
			o->sum[item][a.dst] = value;
			if (a.a.kind == OPERAND_OFFER)
				decided(a.a.offer, OFFER_TAKEN);
			if (a.b.kind == OPERAND_OFFER)
				decided(a.b.offer, OFFER_TAKEN);
			break;
		case COVERAGE_ROOT:
			o->root[item] = o->sum[item][0];
			break;
		}
	}
}

static void owner_withdraws(uint32_t id)
{
	struct offer *o = &sim.offer[id];

	if (o->live && !o->answered && coverage_withdraw(&sim.owner[o->owner].coverage[o->item], id))
		decided(id, OFFER_CLOSED);
	owner_runs(o->owner, o->item);
}

/* ----------------------------------------------------------------- workers */

static void drain(uint32_t w);

static void push(uint32_t w, const struct subtree_action *a)
{
	struct worker *me = &sim.worker[w];
	struct buffer *b = &me->buffer[a->buffer];

	assert_true(b->busy && !b->adding && !b->pushed && !me->cancelled);
	b->pushed = true;
	sim.pushed++;
	for (uint32_t o = 0; o < OWNERS && !me->owners_told; o++) {
		uint32_t id = 0;

		while (sim.offer[id].live)
			id++;
		assert_true(id < OFFERS);
		sim.offer[id] = (struct offer){
			.live = true, .worker = w, .buffer = a->buffer, .owner = o, .item = b->item, .node = a->node
		};
		b->outstanding++;
		assert_int_equal(coverage_offer(&sim.owner[o].coverage[b->item], id, a->node, true, true), 0);
		owner_runs(o, b->item);
	}
}

static void free_buffer(struct worker *me, uint32_t buffer)
{
	struct buffer *b = &me->buffer[buffer];

	assert_true(b->busy && !b->adding && !b->outstanding);
	*b = (struct buffer){ .value = GARBAGE };
	subtree_stall(&me->tree, false, sim.now);
}

static void cancel(uint32_t w)
{
	struct worker *me = &sim.worker[w];

	if (!me->lease || me->cancelled)
		return;
	me->cancelled = true;
	subtree_cancel(&me->tree);
	for (uint32_t id = 0; id < OFFERS; id++)
		if (sim.offer[id].live && sim.offer[id].worker == w)
			owner_withdraws(id);
	drain(w);
}

static void drain(uint32_t w)
{
	struct worker *me = &sim.worker[w];
	struct subtree_action a;
	bool lost = false;

	while (subtree_next(&me->tree, &a)) {
		struct buffer *b = &me->buffer[a.buffer];

		switch (a.type) {
		case SUBTREE_ADD:
			assert_true(b->busy && !b->adding && !b->pushed);
			b->adding = true;
			b->from = a.from - FIRST_MEMBER;
			b->from_buffer = a.from_buffer;
			break;
		case SUBTREE_PUSH:
			push(w, &a);
			break;
		case SUBTREE_FREE:
			free_buffer(me, a.buffer);
			break;
		case SUBTREE_LOST:
			lost = true;
			sim.lost++;
			break;
		}
	}
	if (lost)
		cancel(w);
}

static void finish_add(uint32_t w, uint32_t buffer)
{
	struct worker *me = &sim.worker[w];
	struct buffer *b = &me->buffer[buffer];

	b->adding = false;
	b->value = sum_of(b->value, sim.worker[b->from].buffer[b->from_buffer].value);
	subtree_added(&me->tree, items[b->item].unit, items[b->item].part, sim.now);
	drain(w);
}

static void compute(uint32_t w)
{
	struct worker *me = &sim.worker[w];
	uint32_t k = 0;

	while (k < BUFFERS && me->buffer[k].busy)
		k++;
	if (me->cancelled || me->next == ITEMS || k == BUFFERS) {
		subtree_stall(&me->tree, true, sim.now);
		return;
	}
	me->buffer[k] = (struct buffer){ .busy = true, .item = me->next, .value = truth(me->next, me->node) };
	subtree_final(&me->tree, items[me->next].unit, items[me->next].part, k, sim.now);
	me->next++;
	drain(w);
}

static void answers(uint32_t w)
{
	struct worker *me = &sim.worker[w];

	for (uint32_t id = 0; id < OFFERS; id++) {
		struct offer *o = &sim.offer[id];
		struct buffer *b = &me->buffer[o->buffer];

		if (!o->live || !o->answered || o->worker != w || draw(2))
			continue;
		o->live = false;
		b->lost |= o->verdict == OFFER_CLOSED;
		if (--b->outstanding)
			continue;
		subtree_answered(&me->tree, items[b->item].unit, items[b->item].part, !b->lost);
		free_buffer(me, o->buffer);
		drain(w);
	}
}

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

/* ------------------------------------------------------------------- deaths */

static void end_life(uint32_t w)
{
	struct worker *me = &sim.worker[w];

	me->life = draw(2) ? DEAD : EVICTED;
	sim.deaths++;
	if (me->lease)
		sim.open |= leaves_of(me->node);
}

/* The news of a worker's end come to each at its own time. */
static void tell(uint32_t gone, uint32_t to)
{
	struct worker *me = &sim.worker[to];

	if (sim.worker[gone].told[to] || gone == to || me->life == NOT_THERE || me->life == DEAD)
		return;
	sim.worker[gone].told[to] = true;
	for (uint32_t k = 0; k < BUFFERS; k++)
		if (me->buffer[k].adding && me->buffer[k].from == gone)
			finish_add(to, k);
	subtree_gone(&me->tree, FIRST_MEMBER + gone, sim.now);
	boards_remove(&me->boards, FIRST_MEMBER + gone);
	drain(to);
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

/* ------------------------------------------------------------- life cycle */

static void workers_open(uint64_t wait_ns)
{
	for (uint32_t w = 0; w < sim.n_workers; w++) {
		struct worker *me = &sim.worker[w];
		const struct subtree_config cfg = { .n_units = UNITS, .wait_ns = wait_ns, .boards = &me->boards };

		memset(me, 0, sizeof(*me));
		me->life = ALIVE;
		me->board = calloc(1, board_bytes(UNITS));
		assert_non_null(me->board);
		board_init(me->board, FIRST_MEMBER + w, UNITS);
		me->boards.mine = me->board;
		assert_int_equal(subtree_init(&me->tree, &cfg), 0);
	}
	for (uint32_t w = 0; w < sim.n_workers; w++)
		for (uint32_t k = 0; k < sim.n_workers; k++)
			if (k != w)
				assert_int_equal(boards_add(&sim.worker[w].boards, sim.worker[k].board), 0);
}

static void workers_close(void)
{
	for (uint32_t w = 0; w < sim.n_workers; w++) {
		subtree_release(&sim.worker[w].tree);
		free(sim.worker[w].board);
	}
}

static void owners_close(void)
{
	for (uint32_t o = 0; o < OWNERS; o++)
		for (uint32_t i = 0; i < ITEMS; i++)
			free(sim.owner[o].memory[i]);
	memset(sim.owner, 0, sizeof(sim.owner));
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

/* ------------------------------------------------------------------ threads */

enum { ROUNDS = 10000 };

/* One takes while the other takes back: both must come to the same end, and nobody reads what is not theirs. */
static struct race {
	struct board *board[2];
	struct boards boards[2];
	struct subtree tree[2];
	_Atomic uint64_t arrived;
	uint64_t value; /* the right one's buffer: plain memory, for the race detector to watch */
	uint32_t wrong, freed;
} race;

/* A barrier that does not sleep: the two shall come out of it at the same moment. */
static void meet(uint64_t round)
{
	atomic_fetch_add(&race.arrived, 1);
	while (atomic_load(&race.arrived) < 2 * round)
		sched_yield();
}

static void drain_race(struct subtree *s)
{
	struct subtree_action a;

	while (subtree_next(s, &a)) {
		if (a.type == SUBTREE_ADD) {
			race.wrong += race.value != s->step;
			subtree_added(s, 0, 0, 0);
		} else if (a.type == SUBTREE_FREE) {
			race.value = GARBAGE;
			race.freed++;
		} else if (a.type == SUBTREE_PUSH) {
			subtree_answered(s, 0, 0, true);
		} else {
			race.wrong++;
		}
	}
}

static void *race_left(void *arg)
{
	struct subtree *s = &race.tree[0];
	uint32_t looks = 0;

	(void)arg;
	for (uint64_t t = 1; t <= ROUNDS; t++) {
		subtree_begin(s, 2 * t, t, (struct tree_node){ 0, 0 }, 2);
		meet(2 * t - 1);
		subtree_final(s, 0, 0, 0, 0);
		drain_race(s);
		while (!subtree_idle(s)) {
			subtree_look(s, 0);
			drain_race(s);
			/* Not always: the closer the two are, the better. */
			if (looks++ % 256 == 0)
				sched_yield();
		}
		meet(2 * t);
		subtree_end(s);
	}
	return NULL;
}

static void *race_right(void *arg)
{
	struct subtree *s = &race.tree[1];

	(void)arg;
	for (uint64_t t = 1; t <= ROUNDS; t++) {
		subtree_begin(s, 2 * t + 1, t, (struct tree_node){ 1, 0 }, 2);
		race.value = t;
		meet(2 * t - 1);
		subtree_final(s, 0, 0, 0, 0);
		drain_race(s);
		for (volatile uint64_t spin = rng_u64(1, 2, t) % (1u << t % 14); spin; spin--)
			;
		/* Where both share a core nothing happens in between by itself. */
		if (t % 4 == 0)
			sched_yield();
		subtree_cancel(s);
		drain_race(s);
		while (!subtree_idle(s)) {
			subtree_look(s, 0);
			drain_race(s);
		}
		meet(2 * t);
		subtree_end(s);
	}
	return NULL;
}

static void threads_agree_who_has_it(void **state)
{
	pthread_t left, right;

	(void)state;
	memset(&race, 0, sizeof(race));
	for (uint32_t k = 0; k < 2; k++) {
		const struct subtree_config cfg = { .n_units = 1, .wait_ns = 1, .boards = &race.boards[k] };

		race.board[k] = calloc(1, board_bytes(1));
		assert_non_null(race.board[k]);
		board_init(race.board[k], FIRST_MEMBER + k, 1);
		race.boards[k].mine = race.board[k];
		assert_int_equal(subtree_init(&race.tree[k], &cfg), 0);
	}
	for (uint32_t k = 0; k < 2; k++)
		assert_int_equal(boards_add(&race.boards[k], race.board[1 - k]), 0);
	assert_int_equal(pthread_create(&left, NULL, race_left, NULL), 0);
	assert_int_equal(pthread_create(&right, NULL, race_right, NULL), 0);
	pthread_join(left, NULL);
	pthread_join(right, NULL);
	assert_int_equal(race.wrong, 0);
	assert_int_equal(race.freed, ROUNDS);
	assert_int_equal(race.tree[0].added, race.tree[1].given);
	assert_in_range(race.tree[0].added, 100, ROUNDS - 100);
	for (uint32_t k = 0; k < 2; k++) {
		subtree_release(&race.tree[k]);
		free(race.board[k]);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(one_root_leaves_the_host),         cmocka_unit_test(nobody_waits_for_long),
		cmocka_unit_test(the_impatient_take_what_is_there), cmocka_unit_test(the_dead_are_not_believed),
		cmocka_unit_test(final_before_death_counts),        cmocka_unit_test(recalled_gives_back),
		cmocka_unit_test(who_decides_is_waited_for),        cmocka_unit_test(lives_in_peace),
		cmocka_unit_test(lives_with_recalls_and_deaths),    cmocka_unit_test(threads_agree_who_has_it),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
