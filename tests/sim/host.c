/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Workers of one host that add their sums before they push them: the real
 * machine of worker/subtree.c on real boards, which all lie in this process.
 * What is modelled is what lies around it: when somebody looks, how long an
 * addition takes, who comes to know whom, and when it is noticed that somebody
 * is gone. That differs from one neighbour to the next: a process that ends
 * breaks its connections, or the coordinator's next table says so first; one
 * that was only stopped is missing from the table and goes on. And a connection
 * may break between two that live, so that each goes on without the other.
 *
 * An addition reads its right operand when it begins and when it ends. If they
 * differ its sum is garbage: somebody used the buffer meanwhile, which is
 * allowed as long as nobody counts the sum.
 */
#include "tests/sim/sim.h"

#include <inttypes.h>
#include <stdlib.h>

#define LOOK_FIRST (100 * SIM_US)
#define LOOK_LAST (50 * SIM_MS)

/* -------------------------------------------------------------- life cycle */

/* As soon as it knows its member id. Who is read in place has no sums to save. */
void host_open(struct sim *s, struct worker *w)
{
	const struct subtree_config cfg = { .n_units = s->plan.n_units,
					    .wait_ns = s->plan.host_wait_ns,
					    .boards = &w->boards };

	if (!s->plan.per_host || w->in_place || w->board)
		return;
	w->board = calloc(1, board_bytes(s->plan.n_units));
	if (!w->board || subtree_init(&w->tree, &cfg))
		abort();
	board_init(w->board, w->member, s->plan.n_units);
	w->boards.mine = w->board;
}

void host_close(struct sim *s, struct worker *w)
{
	s->added += w->tree.added;
	s->alone += w->tree.alone;
	if (w->board)
		subtree_release(&w->tree);
	free(w->board);
}

static void look_soon(struct sim *s, struct worker *w)
{
	if (w->look_due || !subtree_watches(&w->tree))
		return;
	w->look_due = true;
	sim_at(s, s->now + w->look_ns, (struct event){ .kind = EV_LOOK, .a = w->index });
	w->look_ns = w->look_ns * 2 < LOOK_LAST ? w->look_ns * 2 : LOOK_LAST;
}

/* ----------------------------------------------------------------- actions */

static uint32_t piece_of(const struct sim *s, const struct subtree_action *a)
{
	return a->part ? s->plan.n_units : a->unit;
}

static void begin_add(struct sim *s, struct worker *w, const struct subtree_action *a)
{
	struct buffer *b = &w->buffer[a->buffer];
	uint32_t from = s->worker_of[a->from];

	SIM_CHECK(s, b->busy && !b->adding && !b->unanswered && b->piece == piece_of(s, a),
		  "worker %u adds to a buffer that it may not touch", w->index);
	b->adding = true;
	b->from = from;
	b->from_buffer = a->from_buffer;
	b->left = b->value;
	b->right = s->worker[from].buffer[a->from_buffer].value;
	b->value = SIM_GARBAGE;
	sim_at(s, s->now + chance_range(&s->chance, 1, s->plan.add_ns),
	       (struct event){ .kind = EV_ADDED, .a = w->index, .b = a->buffer, .c = b->add_number });
	chaos_at_sum(s, w->index);
	chaos_at_sum(s, from);
}

/* What was given hangs on its taker, and what was taken on who brings it to the owners. */
static void trouble(struct sim *s, const struct worker *w, const struct subtree_action *a)
{
	const struct subtree_item *i = &w->tree.item[a->unit * UNIT_PARTS_MAX + a->part];

	if (i->state == SUBTREE_GIVEN)
		chaos_at_sum(s, s->worker_of[i->with]);
	else if (i->n_takes)
		chaos_at_sum(s, w->index);
}

static void take_actions(struct sim *s, struct worker *w)
{
	struct subtree_action a;
	bool lost = false;

	while (subtree_next(&w->tree, &a)) {
		struct buffer *b = &w->buffer[a.buffer];

		w->look_ns = LOOK_FIRST;
		switch (a.type) {
		case SUBTREE_ADD:
			begin_add(s, w, &a);
			break;
		case SUBTREE_PUSH:
			b->node = a.node;
			worker_offer(s, w, a.buffer);
			trouble(s, w, &a);
			break;
		case SUBTREE_FREE:
			SIM_CHECK(s, b->busy && !b->adding && !b->unanswered, "worker %u frees a buffer in use",
				  w->index);
			worker_free(w, a.buffer);
			trouble(s, w, &a);
			break;
		case SUBTREE_LOST:
			lost = true;
		}
	}
	if (!lost)
		return;
	s->given_back++;
	sim_trace(s, "worker %u gives lease %" PRIu64 " back", w->index, w->lease.id);
	worker_cancel(s, w);
}

static void finish_add(struct sim *s, struct worker *w, uint32_t which)
{
	struct buffer *b = &w->buffer[which];
	uint64_t right = s->worker[b->from].buffer[b->from_buffer].value;

	b->adding = false;
	b->add_number++;
	b->value = right == b->right ? truth_add(b->left, right) : SIM_GARBAGE;
	s->torn += right != b->right;
	s->last_progress = s->now;
	subtree_added(&w->tree, piece_unit(&s->plan, b->piece), piece_part(&s->plan, b->piece), s->now);
	take_actions(s, w);
	chaos_at_sum(s, w->index);
}

/* -------------------------------------------------------------- neighbours */

static struct neighbour *find(struct worker *w, uint32_t index)
{
	for (uint32_t i = 0; i < w->n_neighbours; i++)
		if (w->neighbour[i].index == index)
			return &w->neighbour[i];
	return NULL;
}

void host_listed(struct sim *s, struct worker *w, uint32_t member)
{
	uint32_t index = s->worker_of[member];
	struct neighbour *n;

	if (!w->board || index == w->index || s->worker[index].host != w->host)
		return;
	n = find(w, index);
	if (!n && w->n_neighbours < BOARD_NEIGHBOURS) {
		n = &w->neighbour[w->n_neighbours++];
		*n = (struct neighbour){ .index = index };
	}
	if (n)
		n->listed = true;
}

static void let_go(struct sim *s, struct worker *w, struct neighbour *n)
{
	const struct worker *gone = &s->worker[n->index];

	if (n->view == PEER_HERE) {
		s->parted_living += gone->here;
		for (uint32_t i = 0; i < SIM_BUFFERS; i++)
			if (w->buffer[i].adding && w->buffer[i].from == n->index)
				finish_add(s, w, i);
		subtree_gone(&w->tree, gone->member, s->now);
		take_actions(s, w);
		boards_remove(&w->boards, gone->member);
	}
	n->view = PEER_GONE;
}

/* A table is complete: who is new, and who is not in it any more. */
void host_epoch(struct sim *s, struct worker *w)
{
	for (uint32_t i = 0; i < w->n_neighbours; i++) {
		struct neighbour *n = &w->neighbour[i];
		uint64_t soon = chance_below(&s->chance, 20 * s->plan.latency_ns);

		if (!n->listed)
			let_go(s, w, n);
		else if (!n->asked && !chance_of(&s->chance, s->plan.stranger_per_1000))
			sim_at(s, s->now + soon, (struct event){ .kind = EV_MEET, .a = w->index, .b = n->index });
		n->asked = true;
		n->listed = false;
	}
}

static void meet(struct sim *s, struct worker *w, struct neighbour *n)
{
	const struct worker *other = &s->worker[n->index];

	if (n->view != PEER_UNKNOWN || !other->here || !other->board)
		return;
	n->view = PEER_HERE;
	if (boards_add(&w->boards, other->board))
		sim_fail(s, "worker %u has too many neighbours", w->index);
}

static void part_later(struct sim *s, uint32_t from, uint32_t other)
{
	sim_at(s, s->now + 1 + chance_below(&s->chance, chance_of(&s->chance, 500) ? 2 * s->plan.latency_ns : SIM_S),
	       (struct event){ .kind = EV_PARTED, .a = from, .b = other });
}

/* A connection breaks, and both sides notice. */
void host_part(struct sim *s, struct worker *w)
{
	const struct neighbour *n;

	if (!w->n_neighbours)
		return;
	n = &w->neighbour[chance_below(&s->chance, w->n_neighbours)];
	part_later(s, w->index, n->index);
	part_later(s, n->index, w->index);
}

/* ------------------------------------------------------------------- deaths */

/* One that has just begun to take may have died before it said so: between its two looks. */
static void forget_decision(struct sim *s, struct worker *w, uint32_t at)
{
	struct subtree_item *i = &w->tree.item[at];
	uint32_t unit = at / UNIT_PARTS_MAX, part = at % UNIT_PARTS_MAX;
	const struct worker *right = &s->worker[s->worker_of[i->with]];
	_Atomic uint64_t *take = &board_sum(w->board, w->tree.parity, unit, part)->take[i->n_takes - 1];

	if (right->tree.item[at].state != SUBTREE_OFFERED || !chance_of(&s->chance, 500))
		return;
	s->undecided++;
	atomic_store(take, (i->seen >> 16) << 4 | TAKE_INTENT);
}

/* Where those are that had to do with it: nobody may be left out of the statistics of a run. */
static void count_bereaved(struct sim *s, const struct worker *w)
{
	for (uint32_t i = 0; i < s->n_workers; i++) {
		const struct worker *other = &s->worker[i];

		if (!other->here || !other->board || other == w || other->host != w->host || !other->tree.active)
			continue;
		for (uint32_t k = 0; k < s->plan.n_units * UNIT_PARTS_MAX; k++)
			if (other->tree.item[k].with == w->member)
				s->bereaved[other->tree.item[k].state]++;
	}
}

void host_died(struct sim *s, struct worker *w)
{
	if (!w->board)
		return;
	count_bereaved(s, w);
	for (uint32_t k = 0; k < s->plan.n_units * UNIT_PARTS_MAX; k++) {
		if (!w->tree.active)
			break;
		s->died_in[w->tree.item[k].state]++;
		if (w->tree.item[k].state == SUBTREE_ADDS)
			forget_decision(s, w, k);
	}
	/* Otherwise it is noticed when the coordinator says so. */
	for (uint32_t i = 0; i < s->n_workers; i++)
		if (s->worker[i].board && s->worker[i].host == w->host && &s->worker[i] != w &&
		    chance_of(&s->chance, 500))
			part_later(s, i, w->index);
}

/* -------------------------------------------------------------------- spans */

void host_begin(struct sim *s, struct worker *w)
{
	if (!w->board)
		return;
	if (w->tree.active)
		subtree_end(&w->tree);
	w->look_ns = LOOK_FIRST;
	if (w->lease.kind == LEASE_TRAIN)
		subtree_begin(&w->tree, w->lease.id, w->step, w->lease.node, s->plan.n_micro);
}

void host_final(struct sim *s, struct worker *w, uint32_t which)
{
	const struct buffer *b = &w->buffer[which];

	subtree_final(&w->tree, piece_unit(&s->plan, b->piece), piece_part(&s->plan, b->piece), which, s->now);
	take_actions(s, w);
}

void host_answered(struct sim *s, struct worker *w, uint32_t which)
{
	const struct buffer *b = &w->buffer[which];

	if (!w->board)
		return;
	subtree_answered(&w->tree, piece_unit(&s->plan, b->piece), piece_part(&s->plan, b->piece), !b->lost);
	take_actions(s, w);
}

void host_stall(struct sim *s, struct worker *w, bool stalled)
{
	if (w->board && w->tree.active)
		subtree_stall(&w->tree, stalled, s->now);
}

void host_cancel(struct sim *s, struct worker *w)
{
	if (!w->board || !w->tree.active)
		return;
	subtree_cancel(&w->tree);
	take_actions(s, w);
}

bool host_idle(const struct worker *w)
{
	return !w->board || subtree_idle(&w->tree);
}

/* ------------------------------------------------------------------- events */

void host_run(struct sim *s, struct worker *w)
{
	if (!w->board || !w->tree.active || w->state == WORKER_IDLE)
		return;
	subtree_look(&w->tree, s->now);
	take_actions(s, w);
	if (w->state == WORKER_BLOCKED || w->state == WORKER_DRAINING || (w->state == WORKER_FETCHING && w->recalled))
		worker_go_on(s, w);
	look_soon(s, w);
}

void host_event(struct sim *s, const struct event *e)
{
	struct worker *w = &s->worker[e->a];
	struct neighbour *n = e->kind == EV_LOOK || e->kind == EV_ADDED ? NULL : find(w, e->b);

	switch (e->kind) {
	case EV_LOOK:
		w->look_due = false;
		break;
	case EV_ADDED:
		if (w->buffer[e->b].adding && w->buffer[e->b].add_number == e->c)
			finish_add(s, w, e->b);
		break;
	case EV_MEET:
		meet(s, w, n);
		break;
	default:
		if (n)
			let_go(s, w, n);
	}
}
