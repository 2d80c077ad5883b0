/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Who adds to whom, without a lock and without believing the dead.
 *
 * Every word has one writer (board.h), so giving a sum away is a conversation:
 *
 *   right: OFFERED ......................... sees ADDED: its buffer is free ... sees FINAL: done
 *   left:          INTENT, ADDING, (adds), ADDED ..... owners answer: FINAL or LOST
 *
 * The left one writes INTENT, then looks whether the offer still stands, then
 * writes ADDING. The right one takes its offer back by writing LEAVES, then looks
 * at the other's words. All of it is sequentially consistent, so whichever is
 * second sees the other; who sees INTENT looks again later.
 *
 * A worker may be stopped anywhere and be evicted meanwhile. Then the right one
 * writes ALONE and uses its buffer again, and the left one, if it wakes up in
 * the middle of its addition, has read anything. So after it the offer is looked
 * at again: if it does not stand any more the sum is worthless, and so is the
 * span. ADDED and FINAL are written by who read the bytes and heard the owners;
 * whoever gave its sum away and does not come to see FINAL gives its span back,
 * and it is computed again. An owner that gets both, the parent from one worker
 * and the child from another, sorts that out as it does anyway (coverage).
 *
 * Waiting. A contribution that waits costs nothing while there are other
 * buffers. When computing stands still, the time is counted, and when a span
 * has spent what it may (wait_ns), it waits for nobody any more: from then on
 * only those pairs meet that are both there at the same moment. Nobody waits
 * in a circle: sums move to the left only.
 */
#include "worker/subtree.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* A neighbour whose span begins where the sibling does: the sibling's sum comes to be there. */
struct holder {
	const struct board *board;
	uint32_t parity;
	uint64_t lease;
};

/* ------------------------------------------------------------------- words */

static uint64_t own_word(const struct subtree *s, const struct subtree_item *i, enum sum_state state)
{
	return s->lease << 16 | (uint64_t)i->level << 8 | i->buffer << 4 | state;
}

static uint32_t unit_of(const struct subtree *s, const struct subtree_item *i)
{
	return (uint32_t)(i - s->item) / UNIT_PARTS_MAX;
}

static uint32_t part_of(const struct subtree *s, const struct subtree_item *i)
{
	return (uint32_t)(i - s->item) % UNIT_PARTS_MAX;
}

static struct board_sum *mine(const struct subtree *s, const struct subtree_item *i)
{
	return board_sum(s->cfg.boards->mine, s->parity, unit_of(s, i), part_of(s, i));
}

static void say(const struct subtree *s, const struct subtree_item *i, enum sum_state state)
{
	atomic_store(&mine(s, i)->own, own_word(s, i, state));
}

/* What a neighbour says of its own sum. */
static uint64_t look(const struct subtree *s, const struct subtree_item *i, const struct holder *h)
{
	uint64_t word = atomic_load(&board_sum_of(h->board, h->parity, unit_of(s, i), part_of(s, i))->own);

	return word >> 16 == h->lease ? word : SUM_NONE;
}

static enum sum_state state_of(uint64_t word)
{
	return (enum sum_state)(word & 15);
}

static uint32_t level_of(uint64_t word)
{
	return word >> 8 & 0xff;
}

static const struct board *board_of(const struct subtree *s, uint32_t member)
{
	const struct boards *b = s->cfg.boards;

	for (uint32_t k = 0; k < b->n; k++)
		if (b->theirs[k]->member == member)
			return b->theirs[k];
	return NULL;
}

/* What the neighbour that we offer to has done with our sum. */
static enum take_state fate(const struct subtree *s, const struct subtree_item *i)
{
	const struct board *b = board_of(s, i->with);

	for (uint32_t parity = 0; b && parity < 2; parity++) {
		const struct board_sum *sum = board_sum_of(b, parity, unit_of(s, i), part_of(s, i));

		for (uint32_t k = 0; k < BOARD_TAKES; k++) {
			uint64_t word = atomic_load(&sum->take[k]);

			if (word >> 4 == s->lease)
				return (enum take_state)(word & 15);
		}
	}
	return TAKE_NONE;
}

/* The node of a span as it is announced; false: none, or just being written. */
static bool span_read(const struct board_span *span, uint64_t step, uint32_t n_micro, struct tree_node *node,
		      uint64_t *lease)
{
	uint64_t first, level;
	bool ours;

	*lease = atomic_load(&span->lease);
	ours = atomic_load(&span->step) == step;
	first = atomic_load(&span->first);
	level = atomic_load(&span->level);
	if (!*lease || !ours || first >= n_micro || level > 32 || atomic_load(&span->lease) != *lease)
		return false;
	*node = (struct tree_node){ (uint32_t)first, (uint32_t)level };
	return tree_valid(*node, n_micro);
}

static bool find_holder(const struct subtree *s, struct tree_node sibling, struct holder *out)
{
	const struct boards *b = s->cfg.boards;

	out->lease = 0;
	for (uint32_t k = 0; k < b->n; k++) {
		for (uint32_t parity = 0; parity < 2; parity++) {
			struct tree_node node;
			uint64_t lease;

			if (span_read(&b->theirs[k]->span[parity], s->step, s->n_micro, &node, &lease) &&
			    lease > out->lease && node.first == sibling.first && tree_covers(sibling, node, s->n_micro))
				*out = (struct holder){ b->theirs[k], parity, lease };
		}
	}
	return out->lease != 0;
}

/* ----------------------------------------------------------------- actions */

static struct subtree_action *act(struct subtree *s, const struct subtree_item *i, enum subtree_action_type type)
{
	struct subtree_action *a = &s->out[(s->first_out + s->n_out++) % s->max_out];

	assert(s->n_out <= s->max_out);
	*a = (struct subtree_action){ .type = type };
	if (i) {
		a->unit = unit_of(s, i);
		a->part = part_of(s, i);
		a->buffer = i->buffer;
		a->node = (struct tree_node){ s->node.first, i->level };
	}
	return a;
}

bool subtree_next(struct subtree *s, struct subtree_action *out)
{
	if (!s->n_out)
		return false;
	*out = s->out[s->first_out];
	s->first_out = (s->first_out + 1) % s->max_out;
	s->n_out--;
	return true;
}

static void lose_span(struct subtree *s)
{
	if (!s->lost && !s->cancelled)
		act(s, NULL, SUBTREE_LOST);
	s->lost = true;
}

/* ---------------------------------------------------------------- outcomes */

/* The end of a contribution, and of all that it took in. */
static void end_item(struct subtree *s, struct subtree_item *i, bool taken)
{
	struct board_sum *sum = mine(s, i);

	for (uint32_t k = 0; k < i->n_takes; k++) {
		uint64_t lease = atomic_load(&sum->take[k]) >> 4;

		atomic_store(&sum->take[k], lease << 4 | (taken ? TAKE_FINAL : TAKE_LOST));
	}
	i->state = SUBTREE_OVER;
	s->n_live--;
}

static void end_given(struct subtree *s, struct subtree_item *i, bool taken)
{
	if (!taken)
		lose_span(s);
	end_item(s, i, taken);
}

/* It lies in our buffer and nobody reads it: to the owners, if the span still counts. */
static void leave(struct subtree *s, struct subtree_item *i)
{
	say(s, i, SUM_ALONE);
	if (s->cancelled) {
		act(s, i, SUBTREE_FREE);
		end_item(s, i, false);
		return;
	}
	i->state = SUBTREE_PUSHED;
	act(s, i, SUBTREE_PUSH);
}

/* Ours was offered, and perhaps taken. */
static void follow(struct subtree *s, struct subtree_item *i)
{
	enum take_state t = fate(s, i);

	if (i->state == SUBTREE_GIVEN) {
		if (t != TAKE_ADDED)
			end_given(s, i, t == TAKE_FINAL);
		return;
	}
	if (t == TAKE_INTENT)
		return;
	if (t == TAKE_ADDING) {
		i->state = SUBTREE_TAKEN;
		return;
	}
	if (t == TAKE_NONE && i->state == SUBTREE_OFFERED)
		return;
	/* Given back, or withdrawn in time; of an older span's words nothing may be left at all. */
	if (t == TAKE_LOST || t == TAKE_NONE) {
		leave(s, i);
		return;
	}
	s->given++;
	/* Whoever else might be reading it finds that it does not stand. */
	say(s, i, SUM_ALONE);
	act(s, i, SUBTREE_FREE);
	i->state = SUBTREE_GIVEN;
	if (s->cancelled || t == TAKE_FINAL)
		end_item(s, i, t == TAKE_FINAL);
}

static void withdraw(struct subtree *s, struct subtree_item *i)
{
	say(s, i, SUM_LEAVES);
	i->state = SUBTREE_LEAVES;
	follow(s, i);
}

/* --------------------------------------------------------------- decisions */

/* False: the offer does not stand any more. */
static bool take(struct subtree *s, struct subtree_item *i, const struct holder *h, uint64_t word)
{
	_Atomic uint64_t *take = &mine(s, i)->take[i->n_takes];
	struct subtree_action *a;

	atomic_store(take, h->lease << 4 | TAKE_INTENT);
	if (look(s, i, h) != word) {
		atomic_store(take, TAKE_NONE);
		return false;
	}
	atomic_store(take, h->lease << 4 | TAKE_ADDING);
	i->n_takes++;
	i->with = h->board->member;
	i->with_parity = h->parity;
	i->seen = word;
	i->state = SUBTREE_ADDS;
	a = act(s, i, SUBTREE_ADD);
	a->from = i->with;
	a->from_buffer = word >> 4 & 15;
	return true;
}

/* The left one of two. True: settled for now. */
static bool as_left(struct subtree *s, struct subtree_item *i, struct tree_node sibling, const struct holder *h)
{
	uint64_t word = look(s, i, h);
	enum sum_state theirs = state_of(word);
	bool coming = theirs == SUM_NONE || (theirs == SUM_WAITS && level_of(word) < sibling.level);

	if (i->n_takes == BOARD_TAKES)
		return false;
	while (theirs == SUM_OFFERED && level_of(word) == sibling.level) {
		if (take(s, i, h, word))
			return true;
		word = look(s, i, h);
		theirs = state_of(word);
	}
	if (!coming || s->impatient)
		return false;
	if (i->state != SUBTREE_WAITS)
		say(s, i, SUM_WAITS);
	i->state = SUBTREE_WAITS;
	return true;
}

/* The right one: offers while the other can be expected to come to it. */
static bool as_right(struct subtree *s, struct subtree_item *i, struct tree_node sibling, const struct holder *h)
{
	uint64_t word = look(s, i, h);
	enum sum_state theirs = state_of(word);
	bool there = theirs == SUM_WAITS && level_of(word) == sibling.level;

	if (theirs != SUM_NONE && theirs != SUM_WAITS)
		return false;
	if (i->state == SUBTREE_OFFERED)
		return h->board->member == i->with && !s->impatient;
	if (s->impatient && !there)
		return false;
	i->with = h->board->member;
	i->state = SUBTREE_OFFERED;
	say(s, i, SUM_OFFERED);
	return true;
}

static void decide(struct subtree *s, struct subtree_item *i)
{
	struct tree_node node = { s->node.first, i->level }, sibling, parent;
	struct holder h = { 0 };
	bool left, settled;

	if (!tree_sibling(node, s->n_micro, &sibling, &parent, &left) || !find_holder(s, sibling, &h)) {
		settled = false;
	} else {
		settled = left ? as_left(s, i, sibling, &h) : as_right(s, i, sibling, &h);
		s->alone += !settled;
	}
	if (settled)
		return;
	if (i->state == SUBTREE_OFFERED)
		withdraw(s, i);
	else
		leave(s, i);
}

static void advance(struct subtree *s, struct subtree_item *i)
{
	switch (i->state) {
	case SUBTREE_OFFERED:
		follow(s, i);
		if (i->state == SUBTREE_OFFERED)
			decide(s, i);
		break;
	case SUBTREE_WAITS:
		decide(s, i);
		break;
	case SUBTREE_LEAVES:
	case SUBTREE_TAKEN:
	case SUBTREE_GIVEN:
		follow(s, i);
		break;
	default:
		break;
	}
}

/* -------------------------------------------------------------------- time */

static uint32_t n_items(const struct subtree *s)
{
	return s->cfg.n_units * UNIT_PARTS_MAX;
}

static bool anything_waits(const struct subtree *s)
{
	for (uint32_t k = 0; k < n_items(s) && s->n_live; k++)
		if (s->item[k].state == SUBTREE_WAITS || s->item[k].state == SUBTREE_OFFERED)
			return true;
	return false;
}

/* Only time that computing lost to neighbours counts. */
static void tick(struct subtree *s, uint64_t now_ns)
{
	if (s->clock_runs)
		s->spent_ns += now_ns - s->clock_ns;
	s->clock_ns = now_ns;
	s->clock_runs = s->stalled && anything_waits(s);
	if (s->spent_ns >= s->cfg.wait_ns)
		s->impatient = true;
}

/* ------------------------------------------------------------------ events */

int subtree_init(struct subtree *s, const struct subtree_config *cfg)
{
	*s = (struct subtree){ .cfg = *cfg };
	/* At most a buffer's end and an item's next step each, and the span's loss. */
	s->max_out = 2 * n_items(s) + 1;
	s->item = calloc(n_items(s), sizeof(*s->item));
	s->out = calloc(s->max_out, sizeof(*s->out));
	if (s->item && s->out)
		return 0;
	subtree_release(s);
	return -ENOMEM;
}

void subtree_release(struct subtree *s)
{
	free(s->item);
	free(s->out);
	s->item = NULL;
	s->out = NULL;
}

void subtree_begin(struct subtree *s, uint64_t lease, uint64_t step, struct tree_node node, uint32_t n_micro)
{
	struct board_span *span;

	assert(!s->active && lease > 0 && lease < 1ull << 48);
	memset(s->item, 0, n_items(s) * sizeof(*s->item));
	s->lease = lease;
	s->step = step;
	s->node = node;
	s->n_micro = n_micro;
	s->parity ^= 1;
	s->active = true;
	s->cancelled = s->lost = s->stalled = s->clock_runs = false;
	s->spent_ns = 0;
	s->impatient = s->cfg.wait_ns == 0;
	span = &s->cfg.boards->mine->span[s->parity];
	atomic_store(&span->lease, 0);
	atomic_store(&span->step, step);
	atomic_store(&span->first, node.first);
	atomic_store(&span->level, node.level);
	atomic_store(&span->lease, lease);
}

static void unannounce(struct subtree *s)
{
	atomic_store(&s->cfg.boards->mine->span[s->parity].lease, 0);
}

void subtree_end(struct subtree *s)
{
	assert(subtree_idle(s));
	unannounce(s);
	s->active = false;
}

static struct subtree_item *item_of(const struct subtree *s, uint32_t unit, uint32_t part)
{
	assert(s->active && unit < s->cfg.n_units && part < UNIT_PARTS_MAX);
	return &s->item[unit * UNIT_PARTS_MAX + part];
}

void subtree_final(struct subtree *s, uint32_t unit, uint32_t part, uint32_t buffer, uint64_t now_ns)
{
	struct subtree_item *i = item_of(s, unit, part);

	assert(i->state == SUBTREE_NONE && buffer < 16);
	i->buffer = buffer;
	i->level = s->node.level;
	s->n_live++;
	tick(s, now_ns);
	if (s->cancelled)
		leave(s, i);
	else
		decide(s, i);
	tick(s, now_ns);
}

/* What was added lay there until now. */
static bool still_stands(const struct subtree *s, const struct subtree_item *i, const struct holder *h)
{
	_Atomic uint64_t *take = &mine(s, i)->take[i->n_takes - 1];
	uint64_t word;

	/* Changes nothing, but no read of the bytes moves behind it, and not the look before it. */
	atomic_exchange(take, h->lease << 4 | TAKE_ADDING);
	word = look(s, i, h);
	return word >> 4 == i->seen >> 4 && (state_of(word) == SUM_OFFERED || state_of(word) == SUM_LEAVES);
}

void subtree_added(struct subtree *s, uint32_t unit, uint32_t part, uint64_t now_ns)
{
	struct subtree_item *i = item_of(s, unit, part);
	_Atomic uint64_t *word = &mine(s, i)->take[i->n_takes - 1];
	const struct board *b = board_of(s, i->with);
	struct tree_node node = { s->node.first, i->level }, sibling, parent;
	uint64_t lease = i->seen >> 16;
	bool left, stands;

	assert(i->state == SUBTREE_ADDS);
	stands = b && still_stands(s, i, &(struct holder){ b, i->with_parity, lease });
	tick(s, now_ns);
	if (!stands)
		lose_span(s);
	if (!stands || s->cancelled) {
		act(s, i, SUBTREE_FREE);
		end_item(s, i, false);
	} else {
		atomic_store(word, lease << 4 | TAKE_ADDED);
		s->added++;
		tree_sibling(node, s->n_micro, &sibling, &parent, &left);
		i->level = parent.level;
		decide(s, i);
	}
	tick(s, now_ns);
}

void subtree_answered(struct subtree *s, uint32_t unit, uint32_t part, bool taken)
{
	struct subtree_item *i = item_of(s, unit, part);

	assert(i->state == SUBTREE_PUSHED && (taken || s->cancelled));
	end_item(s, i, taken);
}

void subtree_stall(struct subtree *s, bool stalled, uint64_t now_ns)
{
	s->stalled = stalled;
	tick(s, now_ns);
}

void subtree_cancel(struct subtree *s)
{
	assert(s->active);
	if (s->cancelled)
		return;
	s->cancelled = true;
	unannounce(s);
	for (uint32_t k = 0; k < n_items(s); k++) {
		struct subtree_item *i = &s->item[k];

		if (i->state == SUBTREE_WAITS)
			leave(s, i);
		else if (i->state == SUBTREE_OFFERED)
			withdraw(s, i);
		else if (i->state == SUBTREE_GIVEN)
			end_item(s, i, false);
	}
}

void subtree_gone(struct subtree *s, uint32_t member, uint64_t now_ns)
{
	if (!s->active)
		return;
	for (uint32_t k = 0; k < n_items(s); k++) {
		struct subtree_item *i = &s->item[k];

		if (i->with != member)
			continue;
		assert(i->state != SUBTREE_ADDS);
		/* It cannot give away what it is not known to have given. */
		if (i->state == SUBTREE_OFFERED || i->state == SUBTREE_LEAVES || i->state == SUBTREE_TAKEN)
			leave(s, i);
		else if (i->state == SUBTREE_GIVEN)
			end_given(s, i, fate(s, i) == TAKE_FINAL);
	}
	tick(s, now_ns);
}

void subtree_look(struct subtree *s, uint64_t now_ns)
{
	if (!s->active)
		return;
	tick(s, now_ns);
	for (uint32_t k = 0; k < n_items(s) && s->n_live; k++)
		advance(s, &s->item[k]);
	tick(s, now_ns);
}

bool subtree_idle(const struct subtree *s)
{
	return s->n_live == 0;
}

bool subtree_watches(const struct subtree *s)
{
	for (uint32_t k = 0; k < n_items(s) && s->n_live; k++)
		if (s->item[k].state != SUBTREE_NONE && s->item[k].state != SUBTREE_ADDS &&
		    s->item[k].state != SUBTREE_PUSHED && s->item[k].state != SUBTREE_OVER)
			return true;
	return false;
}
