/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A host whose workers add up their gradients: real machines on real boards,
 * and owners with real coverages. What happens in it, and when, is the test's:
 * a worker computes, looks, ends an addition, gets its answers, is recalled, or
 * hears of another's end. A value names what it must contain, so a root says
 * whether every micro-batch is in it once and in the order of the tree.
 */
#ifndef SHARDMESH_TEST_SUBTREE_HOST_H
#define SHARDMESH_TEST_SUBTREE_HOST_H

#include "worker/subtree.h"

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

#endif
