/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An owner's view of the tree of one (unit, part).
 *
 * What is held is a set of disjoint nodes whose sums are complete. A node never
 * stops being covered: it is merged into its parent, or an ancestor that comes
 * whole replaces it. That is what makes the rest simple: whatever was decided
 * because a node is held stays right, and an offer that was found covered stays
 * covered.
 *
 * Memory is what can deadlock here. A worker waits until its offer is answered,
 * so an owner that filled its sums with high nodes and then refused a low one
 * would wait for workers that wait for it. Hence the classes of coverage_next:
 * an offer beside a held node needs no sum, because it is added into that one;
 * an offer over the lowest missing micro-batch always gets a sum; only the
 * others are counted against K. The lowest span that is not done is therefore
 * never refused, by any owner, and when it is taken the next one is the lowest.
 *
 * A sum is reserved when a push is granted, since what was pushed must be taken.
 * None is reserved where a node below or beside is held: its sum serves, and it
 * cannot go away without the offer being covered. A reservation is given back
 * as soon as its node is covered, even while the push is still under way (it
 * goes into the worker's slot, not into the sum); so when the root is folded
 * nobody can have sum 0 but what it replaces, and it always ends there.
 *
 * Each call of coverage_next looks at the state afresh instead of remembering
 * what is due. It costs a few binary searches over the offers for each held
 * node, of which there are about log2(M) + K.
 */
#include "mesh/mesh.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

#define NONE UINT32_MAX

/* ----------------------------------------------------------------- indices */

size_t coverage_bytes(uint32_t max_offers)
{
	return max_offers * (sizeof(struct coverage_offer) + 3 * sizeof(uint32_t));
}

static void index_insert(uint32_t *index, uint32_t *n, uint32_t at, uint32_t slot)
{
	memmove(index + at + 1, index + at, (*n - at) * sizeof(*index));
	index[at] = slot;
	(*n)++;
}

static void index_remove(uint32_t *index, uint32_t *n, uint32_t at, uint32_t count)
{
	memmove(index + at, index + at + count, (*n - at - count) * sizeof(*index));
	*n -= count;
}

static uint32_t id_place(const struct coverage *c, uint64_t id)
{
	uint32_t low = 0, high = c->n_offers;

	while (low < high) {
		uint32_t mid = low + (high - low) / 2;

		if (c->offer[c->by_id[mid]].id < id)
			low = mid + 1;
		else
			high = mid;
	}
	return low;
}

static uint32_t find_id(const struct coverage *c, uint64_t id)
{
	uint32_t at = id_place(c, id);

	return at < c->n_offers && c->offer[c->by_id[at]].id == id ? c->by_id[at] : NONE;
}

/* Nodes in order: by first, an ancestor before what is below it, so that a node and all below it lie together. */
static bool node_before(const struct coverage *c, uint32_t slot, uint64_t first, uint32_t level, uint32_t other)
{
	const struct coverage_offer *o = &c->offer[slot];

	if (o->node.first != first)
		return o->node.first < first;
	if (o->node.level != level)
		return o->node.level > level;
	return slot < other;
}

/* Where in by_node or eager the first entry not before (first, level, slot) stands. */
static uint32_t node_place(const struct coverage *c, const uint32_t *index, uint32_t n, uint64_t first, uint32_t level,
			   uint32_t slot)
{
	uint32_t low = 0, high = n;

	while (low < high) {
		uint32_t mid = low + (high - low) / 2;

		if (node_before(c, index[mid], first, level, slot))
			low = mid + 1;
		else
			high = mid;
	}
	return low;
}

/* The first offer of a node in by_node; the others follow while `node_at` says so. */
static uint32_t node_first(const struct coverage *c, struct tree_node n)
{
	return node_place(c, c->by_node, c->n_by_node, n.first, n.level, 0);
}

static bool node_at(const struct coverage *c, uint32_t at, struct tree_node n)
{
	return at < c->n_by_node && tree_equal(c->offer[c->by_node[at]].node, n);
}

/* One past the offers of n and below n that begin at node_first(n), in either index. */
static uint32_t node_end(const struct coverage *c, const uint32_t *index, uint32_t n_index, struct tree_node n)
{
	return node_place(c, index, n_index, (uint64_t)n.first + tree_leaves(n, c->n_micro), UINT32_MAX, 0);
}

/* ------------------------------------------------------------------ offers */

/* An offer in place that waits at the sibling of o: the two can be added in one pass. */
static uint32_t partner_of(const struct coverage *c, const struct coverage_offer *o)
{
	struct tree_node sibling, parent;
	bool left;

	if (!o->in_place || !tree_sibling(o->node, c->n_micro, &sibling, &parent, &left))
		return NONE;
	for (uint32_t at = node_first(c, sibling); node_at(c, at, sibling); at++) {
		const struct coverage_offer *other = &c->offer[c->by_node[at]];

		if (other->in_place && other->state == OFFER_WAITING)
			return c->by_node[at];
	}
	return NONE;
}

/* An offer in place that nobody wants back waits by reference, unless waiting cannot bring anything. */
static bool should_be_eager(const struct coverage *c, const struct coverage_offer *o)
{
	if (o->state != OFFER_WAITING)
		return false;
	return o->wanted || !o->in_place || tree_leaves(o->node, c->n_micro) == c->n_micro || partner_of(c, o) != NONE;
}

static void refresh(struct coverage *c, uint32_t slot)
{
	struct coverage_offer *o = &c->offer[slot];
	bool eager = should_be_eager(c, o);
	uint32_t at;

	if (eager == o->eager)
		return;
	o->eager = eager;
	at = node_place(c, c->eager, c->n_eager, o->node.first, o->node.level, slot);
	if (eager)
		index_insert(c->eager, &c->n_eager, at, slot);
	else
		index_remove(c->eager, &c->n_eager, at, 1);
}

/* Offers at n came or went: those at its sibling may have won or lost their partner. */
static void refresh_beside(struct coverage *c, struct tree_node n)
{
	struct tree_node sibling, parent;
	bool left;

	if (!tree_sibling(n, c->n_micro, &sibling, &parent, &left))
		return;
	for (uint32_t at = node_first(c, sibling); node_at(c, at, sibling); at++)
		refresh(c, c->by_node[at]);
}

static void give(struct coverage *c, uint32_t sum)
{
	if (sum)
		c->sums.give(c->sums.ctx, sum);
	else
		c->accumulator_used = false;
}

/* The accumulator where it is free, else one of the pool's; COVERAGE_NO_SUM only without `must`. */
static uint32_t take(struct coverage *c, bool must)
{
	uint32_t sum;

	if (!c->accumulator_used) {
		c->accumulator_used = true;
		return 0;
	}
	sum = c->sums.take(c->sums.ctx, must);
	assert(sum != 0 && (sum != COVERAGE_NO_SUM || !must));
	return sum;
}

/* Gives up what was reserved for a push; the sum, or COVERAGE_NO_SUM. */
static uint32_t unreserve(struct coverage *c, struct coverage_offer *o)
{
	uint32_t sum = o->sum;

	o->sum = COVERAGE_NO_SUM;
	if (sum != COVERAGE_NO_SUM)
		c->n_reserved--;
	return sum;
}

static void unlink_pushed(struct coverage *c, uint32_t slot)
{
	uint32_t *link = &c->pushed;

	while (*link != slot)
		link = &c->offer[*link].next;
	*link = c->offer[slot].next;
}

static void answer_later(struct coverage *c, uint32_t slot, enum offer_verdict verdict)
{
	struct coverage_offer *o = &c->offer[slot];

	o->state = OFFER_ANSWERED;
	o->verdict = verdict;
	o->next = NONE;
	if (c->answers == NONE)
		c->answers = slot;
	else
		c->offer[c->answers_last].next = slot;
	c->answers_last = slot;
}

static void forget(struct coverage *c, uint32_t slot)
{
	index_remove(c->by_id, &c->n_offers, id_place(c, c->offer[slot].id), 1);
	c->offer[slot].next = c->free;
	c->free = slot;
}

/* Takes an offer that is not covered out of everything. */
static void drop(struct coverage *c, uint32_t slot)
{
	struct coverage_offer *o = &c->offer[slot];
	struct tree_node n = o->node;

	if (o->state == OFFER_PUSHED)
		unlink_pushed(c, slot);
	o->state = OFFER_ANSWERED;
	refresh(c, slot);
	index_remove(c->by_node, &c->n_by_node, node_place(c, c->by_node, c->n_by_node, n.first, n.level, slot), 1);
	refresh_beside(c, n);
	forget(c, slot);
}

/* ---------------------------------------------------------------- what is held */

/* The held nodes that begin at or before `first`. */
static uint32_t held_until(const struct coverage *c, uint32_t first)
{
	uint32_t low = 0, high = c->n_held;

	while (low < high) {
		uint32_t mid = low + (high - low) / 2;

		if (c->held[mid].node.first <= first)
			low = mid + 1;
		else
			high = mid;
	}
	return low;
}

static const struct coverage_held *held_find(const struct coverage *c, struct tree_node n)
{
	uint32_t at = held_until(c, n.first);

	return at && tree_equal(c->held[at - 1].node, n) ? &c->held[at - 1] : NULL;
}

static bool is_covered(const struct coverage *c, struct tree_node n)
{
	uint32_t at = held_until(c, n.first);

	return at && tree_covers(c->held[at - 1].node, n, c->n_micro);
}

/* n itself is not covered: is anything below it held? */
static bool is_begun(const struct coverage *c, struct tree_node n)
{
	uint32_t at = held_until(c, n.first);

	if (at && c->held[at - 1].node.first == n.first)
		return true;
	return at < c->n_held && tree_covers(n, c->held[at].node, c->n_micro);
}

/* The lowest missing leaf, and how many held nodes lie before it. */
static uint32_t lowest_leaf(const struct coverage *c, uint32_t *n_before)
{
	uint32_t leaf = 0, i;

	for (i = 0; i < c->n_held && c->held[i].node.first == leaf; i++)
		leaf += tree_leaves(c->held[i].node, c->n_micro);
	*n_before = i;
	return leaf;
}

/* Of two sums that are free to hold one node, keeps the accumulator or else the first. */
static void keep_one(struct coverage *c, uint32_t *kept, uint32_t sum)
{
	if (sum == COVERAGE_NO_SUM)
		return;
	if (*kept != COVERAGE_NO_SUM)
		give(c, sum ? sum : *kept);
	if (*kept == COVERAGE_NO_SUM || !sum)
		*kept = sum;
}

/*
 * Where the sum of p goes, which replaces every node and every reservation
 * below it. Changes nothing when there is no sum to be had.
 */
static uint32_t hold(struct coverage *c, struct tree_node p, bool must)
{
	uint32_t end = node_end(c, c->by_node, c->n_by_node, p), dst = COVERAGE_NO_SUM, at, n;

	at = held_until(c, p.first);
	if (at && c->held[at - 1].node.first == p.first)
		at--;
	for (n = 0; at + n < c->n_held && tree_covers(p, c->held[at + n].node, c->n_micro); n++)
		keep_one(c, &dst, c->held[at + n].sum);
	for (uint32_t i = node_first(c, p); i < end; i++)
		keep_one(c, &dst, unreserve(c, &c->offer[c->by_node[i]]));
	if (dst == COVERAGE_NO_SUM) {
		dst = take(c, must);
	} else if (dst && !c->accumulator_used) {
		give(c, dst);
		dst = take(c, must);
	}
	if (dst == COVERAGE_NO_SUM)
		return dst;
	assert(c->n_held + 1 - n <= COVERAGE_HELD_MAX);
	memmove(c->held + at + 1, c->held + at + n, (c->n_held - at - n) * sizeof(c->held[0]));
	c->held[at] = (struct coverage_held){ p, dst };
	c->n_held += 1 - n;
	return dst;
}

/*
 * p is held now: the offers of p and below are covered. A push is told when it
 * is complete. Offers at p's sibling may have lost a partner; next_beside has
 * them before anybody asks.
 */
static void cover(struct coverage *c, struct tree_node p)
{
	uint32_t from = node_first(c, p), end = node_end(c, c->by_node, c->n_by_node, p);

	for (uint32_t i = from; i < end; i++) {
		struct coverage_offer *o = &c->offer[c->by_node[i]];

		if (o->state == OFFER_PUSHED)
			unlink_pushed(c, c->by_node[i]);
		if (o->state == OFFER_PUSHING)
			o->covered = true;
		else
			answer_later(c, c->by_node[i], OFFER_COVERED);
		o->eager = false;
	}
	index_remove(c->by_node, &c->n_by_node, from, end - from);
	from = node_place(c, c->eager, c->n_eager, p.first, p.level, 0);
	end = node_end(c, c->eager, c->n_eager, p);
	index_remove(c->eager, &c->n_eager, from, end - from);
}

/* ----------------------------------------------------------------- actions */

static struct operand the_offer(const struct coverage *c, uint32_t slot)
{
	return (struct operand){ .kind = OPERAND_OFFER, .offer = c->offer[slot].id };
}

static struct operand the_sum(const struct coverage_held *h)
{
	return (struct operand){ .kind = OPERAND_SUM, .sum = h->sum };
}

/* p = a, or a + b in the order of the tree. False: there is no sum for it. */
static bool fold(struct coverage *c, struct tree_node p, struct operand a, struct operand b, bool must,
		 struct coverage_action *out)
{
	uint32_t dst = hold(c, p, must);

	if (dst == COVERAGE_NO_SUM)
		return false;
	if (a.kind == OPERAND_OFFER)
		drop(c, find_id(c, a.offer));
	if (b.kind == OPERAND_OFFER)
		drop(c, find_id(c, b.offer));
	cover(c, p);
	*out = (struct coverage_action){ .type = COVERAGE_FOLD, .dst = dst, .a = a, .b = b };
	return true;
}

/* An offer whose sibling is held is added to it; the sum is there already. */
static void fold_beside(struct coverage *c, uint32_t slot, const struct coverage_held *held,
			struct coverage_action *out)
{
	struct operand mine = the_offer(c, slot), theirs = the_sum(held);
	struct tree_node sibling, parent;
	bool left, done;

	tree_sibling(held->node, c->n_micro, &sibling, &parent, &left);
	done = fold(c, parent, left ? theirs : mine, left ? mine : theirs, false, out);
	assert(done);
}

/* Reserves the sum that the push will be copied into, where none below or beside will do. */
static bool grant(struct coverage *c, uint32_t slot, bool needs_sum, bool must, struct coverage_action *out)
{
	struct coverage_offer *o = &c->offer[slot];

	if (needs_sum) {
		o->sum = take(c, must);
		if (o->sum == COVERAGE_NO_SUM)
			return false;
		c->n_reserved++;
	}
	o->state = OFFER_PUSHING;
	refresh(c, slot);
	*out = (struct coverage_action){ .type = COVERAGE_ANSWER, .offer = o->id, .verdict = OFFER_GRANTED };
	return true;
}

/*
 * An eager offer that may have a sum is folded, with its partner where it has
 * one, or granted. always: it stands over the lowest missing leaf, so it gets a
 * sum whatever memory says, once a worker waits for it.
 */
static bool admit(struct coverage *c, uint32_t slot, bool always, struct coverage_action *out)
{
	struct coverage_offer *o = &c->offer[slot];
	struct operand mine = the_offer(c, slot), theirs;
	uint32_t partner = partner_of(c, o);
	struct tree_node sibling, parent;
	bool left;

	if (!o->in_place)
		return grant(c, slot, !is_begun(c, o->node), always && o->wanted, out);
	if (partner == NONE)
		return fold(c, o->node, mine, (struct operand){ 0 }, always && o->wanted, out);
	tree_sibling(o->node, c->n_micro, &sibling, &parent, &left);
	theirs = the_offer(c, partner);
	return fold(c, parent, left ? mine : theirs, left ? theirs : mine,
		    always && (o->wanted || c->offer[partner].wanted), out);
}

/* ------------------------------------------------------------------- rules */

static bool next_answer(struct coverage *c, struct coverage_action *out)
{
	uint32_t slot = c->answers;

	if (slot == NONE)
		return false;
	*out = (struct coverage_action){ .type = COVERAGE_ANSWER,
					 .offer = c->offer[slot].id,
					 .verdict = c->offer[slot].verdict };
	c->answers = c->offer[slot].next;
	forget(c, slot);
	return true;
}

static bool next_root(struct coverage *c, struct coverage_action *out)
{
	if (c->root_told || !coverage_complete(c))
		return false;
	assert(c->held[0].sum == 0);
	c->root_told = true;
	*out = (struct coverage_action){ .type = COVERAGE_ROOT };
	return true;
}

/* Two held siblings are one node. Nothing lies between them, so they are neighbours. */
static bool next_merge(struct coverage *c, struct coverage_action *out)
{
	for (uint32_t i = 0; i + 1 < c->n_held; i++) {
		struct tree_node sibling, parent;
		bool left;

		tree_sibling(c->held[i].node, c->n_micro, &sibling, &parent, &left);
		if (left && tree_equal(c->held[i + 1].node, sibling))
			return fold(c, parent, the_sum(&c->held[i]), the_sum(&c->held[i + 1]), false, out);
	}
	return false;
}

/* What was pushed is taken at once: the slot is the worker's next one. */
static bool next_pushed(struct coverage *c, struct coverage_action *out)
{
	const struct coverage_held *held = NULL;
	struct tree_node sibling, parent;
	uint32_t slot = c->pushed;
	bool left;

	if (slot == NONE)
		return false;
	if (tree_sibling(c->offer[slot].node, c->n_micro, &sibling, &parent, &left))
		held = held_find(c, sibling);
	if (held)
		fold_beside(c, slot, held, out);
	else
		fold(c, c->offer[slot].node, the_offer(c, slot), (struct operand){ 0 }, true, out);
	return true;
}

/* Siblings of held nodes, wanted or not: they cost no sum and win one where they lead to a merge. */
static bool next_beside(struct coverage *c, struct coverage_action *out)
{
	for (uint32_t i = 0; i < c->n_held; i++) {
		struct tree_node sibling, parent;
		bool left;

		tree_sibling(c->held[i].node, c->n_micro, &sibling, &parent, &left);
		for (uint32_t at = node_first(c, sibling); node_at(c, at, sibling); at++) {
			uint32_t slot = c->by_node[at];

			if (c->offer[slot].state != OFFER_WAITING)
				continue;
			if (!c->offer[slot].in_place)
				return grant(c, slot, false, false, out);
			fold_beside(c, slot, &c->held[i], out);
			return true;
		}
	}
	return false;
}

/* Offers over the lowest missing leaf, from the root down: the larger, the more is done. */
static bool next_lowest(struct coverage *c, struct coverage_action *out)
{
	struct tree_node n = tree_root(c->n_micro), left, right;
	uint32_t n_before, leaf = lowest_leaf(c, &n_before);

	do {
		for (uint32_t at = node_first(c, n); node_at(c, at, n); at++)
			if (c->offer[c->by_node[at]].eager && admit(c, c->by_node[at], true, out))
				return true;
		if (!tree_children(n, c->n_micro, &left, &right))
			break;
		n = leaf < right.first ? left : right;
	} while (true);
	return false;
}

/* Sums that are held or reserved to the right of the lowest missing leaf. */
static uint32_t count_right(const struct coverage *c)
{
	struct tree_node n = tree_root(c->n_micro), left, right;
	uint32_t n_before, leaf = lowest_leaf(c, &n_before), count = c->n_held - n_before + c->n_reserved;

	while (c->n_reserved) {
		for (uint32_t at = node_first(c, n); node_at(c, at, n); at++)
			count -= c->offer[c->by_node[at]].sum != COVERAGE_NO_SUM;
		if (!tree_children(n, c->n_micro, &left, &right))
			break;
		n = leaf < right.first ? left : right;
	}
	return count;
}

/* The others, lowest first, while there are fewer than K. */
static bool next_room(struct coverage *c, struct coverage_action *out)
{
	return c->n_eager && count_right(c) < c->max_held && admit(c, c->eager[0], false, out);
}

bool coverage_next(struct coverage *c, struct coverage_action *out)
{
	if (next_answer(c, out))
		return true;
	if (c->closed)
		return false;
	if (coverage_complete(c))
		return next_root(c, out);
	return next_merge(c, out) || next_pushed(c, out) || next_beside(c, out) || next_lowest(c, out) ||
	       next_room(c, out);
}

/* ------------------------------------------------------------------ events */

void coverage_init(struct coverage *c, uint32_t n_micro, uint32_t max_held, const struct coverage_sums *sums,
		   void *memory, uint32_t max_offers)
{
	assert(n_micro > 0 && max_held > 0);
	c->n_micro = n_micro;
	c->max_held = max_held < COVERAGE_K_MAX ? max_held : COVERAGE_K_MAX;
	c->sums = *sums;
	c->max_offers = max_offers;
	c->offer = memory;
	c->by_id = (uint32_t *)(c->offer + max_offers);
	c->by_node = c->by_id + max_offers;
	c->eager = c->by_node + max_offers;
	c->n_held = c->n_offers = c->n_by_node = c->n_eager = c->n_reserved = c->n_slots = 0;
	c->free = c->answers = c->answers_last = c->pushed = NONE;
	c->accumulator_used = c->root_told = c->closed = false;
}

/* A slot that was used before, or else the next one: memory is touched as far as it is needed. */
static uint32_t new_slot(struct coverage *c)
{
	uint32_t slot = c->free;

	if (slot == NONE)
		return c->n_slots < c->max_offers ? c->n_slots++ : NONE;
	c->free = c->offer[slot].next;
	return slot;
}

int coverage_offer(struct coverage *c, uint64_t id, struct tree_node node, bool in_place, bool wanted)
{
	uint32_t slot;

	if (!tree_valid(node, c->n_micro))
		return -EINVAL;
	if (find_id(c, id) != NONE)
		return -EEXIST;
	slot = new_slot(c);
	if (slot == NONE)
		return -ENOSPC;
	c->offer[slot] = (struct coverage_offer){ .id = id,
						  .node = node,
						  .state = OFFER_WAITING,
						  .in_place = in_place,
						  .wanted = wanted,
						  .sum = COVERAGE_NO_SUM,
						  .next = NONE };
	index_insert(c->by_id, &c->n_offers, id_place(c, id), slot);
	if (c->closed || is_covered(c, node)) {
		answer_later(c, slot, c->closed ? OFFER_CLOSED : OFFER_COVERED);
		return 0;
	}
	index_insert(c->by_node, &c->n_by_node, node_place(c, c->by_node, c->n_by_node, node.first, node.level, slot),
		     slot);
	refresh(c, slot);
	refresh_beside(c, node);
	return 0;
}

void coverage_want(struct coverage *c, uint64_t id)
{
	uint32_t slot = find_id(c, id);

	if (slot == NONE)
		return;
	c->offer[slot].wanted = true;
	refresh(c, slot);
}

bool coverage_withdraw(struct coverage *c, uint64_t id)
{
	uint32_t slot = find_id(c, id), sum;

	if (slot == NONE || c->offer[slot].state == OFFER_ANSWERED)
		return false;
	sum = unreserve(c, &c->offer[slot]);
	if (sum != COVERAGE_NO_SUM)
		give(c, sum);
	if (c->offer[slot].covered)
		forget(c, slot);
	else
		drop(c, slot);
	return true;
}

void coverage_pushed(struct coverage *c, uint64_t id)
{
	uint32_t slot = find_id(c, id);

	if (slot == NONE || c->offer[slot].state != OFFER_PUSHING)
		return;
	if (c->offer[slot].covered) {
		answer_later(c, slot, OFFER_COVERED);
		return;
	}
	c->offer[slot].state = OFFER_PUSHED;
	c->offer[slot].next = c->pushed;
	c->pushed = slot;
}

void coverage_close(struct coverage *c)
{
	c->closed = true;
	for (uint32_t i = 0; i < c->n_offers; i++) {
		struct coverage_offer *o = &c->offer[c->by_id[i]];
		uint32_t sum = unreserve(c, o);

		if (sum != COVERAGE_NO_SUM)
			give(c, sum);
		if (o->state != OFFER_ANSWERED)
			answer_later(c, c->by_id[i], OFFER_CLOSED);
	}
	c->n_by_node = c->n_eager = 0;
	c->pushed = NONE;
	if (coverage_complete(c))
		return;
	for (uint32_t i = 0; i < c->n_held; i++)
		give(c, c->held[i].sum);
	c->n_held = 0;
}

bool coverage_complete(const struct coverage *c)
{
	return c->n_held == 1 && tree_leaves(c->held[0].node, c->n_micro) == c->n_micro;
}

bool coverage_lowest_missing(const struct coverage *c, struct tree_node *out)
{
	uint32_t n_before, leaf = lowest_leaf(c, &n_before);
	struct tree_node n = tree_root(c->n_micro), left, right;

	if (leaf == c->n_micro)
		return false;
	while (n.first != leaf || is_begun(c, n)) {
		tree_children(n, c->n_micro, &left, &right);
		n = leaf < right.first ? left : right;
	}
	*out = n;
	return true;
}

bool coverage_starved(const struct coverage *c)
{
	for (uint32_t i = 0; i < c->n_eager; i++)
		if (c->offer[c->eager[i]].wanted)
			return true;
	return false;
}
