/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Claims and marks without a lock.
 *
 * A lock in shared memory would have to survive the death of who holds it, and
 * memory that two processes write breaks the rule that each object has one
 * writer. So every worker has a board that it alone writes, and agreement comes
 * from the order of writes and looks, all sequentially consistent:
 *
 * Claim. A worker writes INTENT, then looks at every neighbour's word, then
 * writes CLAIMED. Of two workers that look at the same time each sees the
 * other's INTENT; the one with the smaller id waits for the other to decide, the
 * other gives way. If both were to claim, each would have looked at the other
 * before the other's INTENT; but both wrote INTENT before they looked. The one
 * that waits looks again a bounded number of times: a neighbour may have been
 * stopped between INTENT and the look, and then it is CLAIM_AGAIN.
 *
 * Mark. A copier writes its mark, then looks whether the portion is still
 * there. The owner of the place takes the words away, then looks at the marks.
 * Whichever is second sees the other: the copier does not begin, or the owner
 * waits.
 *
 * Generation. A mark holds back only an owner that looks at it. One that was told
 * that the copier is gone does not; the copier, if it was only stopped, finds
 * out by the generation, which the owner raises before the bytes change: like
 * the reader of a sequence lock it looks before and behind the copy.
 *
 * A word carries its version, so what is left of an older step means nothing.
 * The dead need no cleaning up: who is evicted leaves `theirs`, and its word
 * with it.
 */
#include "worker/board.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

#define BOARD_MAGIC 0x3144524f424d5353ull /* "SSMBORD1" */
#define LOOKS_MAX 1000

static uint64_t word_of(uint64_t version, enum portion_state state)
{
	return version << 2 | state;
}

static enum portion_state state_of(uint64_t word, uint64_t version)
{
	return word >> 2 == version ? (enum portion_state)(word & 3) : PORTION_NONE;
}

static enum portion_state look(const struct board *b, uint32_t unit, uint32_t portion, uint64_t version)
{
	return state_of(atomic_load(&b->unit[unit].portion[portion]), version);
}

static void say(struct boards *b, uint32_t unit, uint32_t portion, uint64_t version, enum portion_state state)
{
	assert(unit < b->mine->n_units && portion < BOARD_PORTIONS);
	atomic_store(&b->mine->unit[unit].portion[portion], word_of(version, state));
}

/* ------------------------------------------------------------------ memory */

uint64_t board_bytes(uint32_t n_units)
{
	return sizeof(struct board) +
	       n_units * (sizeof(struct board_unit) + 2ull * UNIT_PARTS_MAX * sizeof(struct board_sum));
}

void board_init(struct board *b, uint32_t member, uint32_t n_units)
{
	b->magic = BOARD_MAGIC;
	b->member = member;
	b->n_units = n_units;
}

int board_check(const struct board *b, uint64_t bytes, uint32_t member, uint32_t n_units)
{
	if (bytes < board_bytes(n_units) || b->magic != BOARD_MAGIC || b->member != member || b->n_units != n_units)
		return -EPROTO;
	return 0;
}

const struct board_sum *board_sum_of(const struct board *b, uint32_t parity, uint32_t unit, uint32_t part)
{
	const struct board_sum *sums = (const struct board_sum *)(const void *)&b->unit[b->n_units];

	assert(parity < 2 && unit < b->n_units && part < UNIT_PARTS_MAX);
	return sums + ((size_t)parity * b->n_units + unit) * UNIT_PARTS_MAX + part;
}

struct board_sum *board_sum(struct board *b, uint32_t parity, uint32_t unit, uint32_t part)
{
	return (struct board_sum *)board_sum_of(b, parity, unit, part);
}

int boards_add(struct boards *b, const struct board *theirs)
{
	if (b->n == BOARD_NEIGHBOURS)
		return -ENOSPC;
	b->theirs[b->n++] = theirs;
	return 0;
}

void boards_remove(struct boards *b, uint32_t member)
{
	for (uint32_t i = 0; i < b->n; i++) {
		if (b->theirs[i]->member != member)
			continue;
		b->theirs[i] = b->theirs[--b->n];
		return;
	}
}

/* ------------------------------------------------------------------ claims */

/* Somebody who is past deciding; there beats claimed, since it can be copied now. */
static bool is_decided(const struct boards *b, uint32_t unit, uint32_t portion, uint64_t version, enum claim *out,
		       uint32_t *who)
{
	bool found = false;

	for (uint32_t i = 0; i < b->n; i++) {
		enum portion_state s = look(b->theirs[i], unit, portion, version);

		if (s != PORTION_THERE && (s != PORTION_CLAIMED || found))
			continue;
		*who = i;
		*out = s == PORTION_THERE ? CLAIM_THERE : CLAIM_TAKEN;
		if (s == PORTION_THERE)
			return true;
		found = true;
	}
	return found;
}

/* With INTENT written: may it become CLAIMED? A neighbour's state after it decided, or that it did not. */
static enum portion_state settle(const struct board *theirs, uint32_t me, uint32_t unit, uint32_t portion,
				 uint64_t version)
{
	enum portion_state s = look(theirs, unit, portion, version);

	if (s == PORTION_INTENT && theirs->member > me)
		for (int i = 0; i < LOOKS_MAX && s == PORTION_INTENT; i++)
			s = look(theirs, unit, portion, version);
	return s;
}

enum claim board_look(const struct boards *b, uint32_t unit, uint32_t portion, uint64_t version, uint32_t *who)
{
	enum claim out = CLAIM_OURS;

	(void)is_decided(b, unit, portion, version, &out, who);
	return out;
}

enum claim board_claim(struct boards *b, uint32_t unit, uint32_t portion, uint64_t version, uint32_t *who)
{
	enum claim out = CLAIM_OURS;

	assert(look(b->mine, unit, portion, version) == PORTION_NONE);
	if (is_decided(b, unit, portion, version, &out, who))
		return out;
	say(b, unit, portion, version, PORTION_INTENT);
	for (uint32_t i = 0; i < b->n && out == CLAIM_OURS; i++) {
		enum portion_state s = settle(b->theirs[i], b->mine->member, unit, portion, version);

		if (s == PORTION_NONE)
			continue;
		*who = i;
		out = s == PORTION_THERE ? CLAIM_THERE : s == PORTION_CLAIMED ? CLAIM_TAKEN : CLAIM_AGAIN;
	}
	say(b, unit, portion, version, out == CLAIM_OURS ? PORTION_CLAIMED : PORTION_NONE);
	return out;
}

void board_seize(struct boards *b, uint32_t unit, uint32_t portion, uint64_t version)
{
	say(b, unit, portion, version, PORTION_CLAIMED);
}

void board_there(struct boards *b, uint32_t unit, uint32_t portion, uint64_t version, uint64_t offset)
{
	atomic_store(&b->mine->unit[unit].offset, offset);
	say(b, unit, portion, version, PORTION_THERE);
}

void board_give_up(struct boards *b, uint32_t unit, uint32_t portion)
{
	say(b, unit, portion, 0, PORTION_NONE);
}

/* ------------------------------------------------------------------- marks */

static uint64_t mark_of(uint32_t member, uint32_t unit)
{
	return (uint64_t)member << 32 | (unit + 1);
}

int board_mark(struct boards *b, uint32_t who, uint32_t unit, uint32_t portion, uint64_t version, struct board_mark *m)
{
	const struct board *from = b->theirs[who];

	for (uint32_t i = 0; i < BOARD_MARKS; i++) {
		if (atomic_load_explicit(&b->mine->mark[i], memory_order_relaxed))
			continue;
		*m = (struct board_mark){ .from = from, .unit = unit, .slot = i };
		atomic_store(&b->mine->mark[i], mark_of(from->member, unit));
		m->generation = atomic_load(&from->unit[unit].generation);
		m->offset = atomic_load(&from->unit[unit].offset);
		if (look(from, unit, portion, version) == PORTION_THERE)
			return 0;
		board_unmark(b, m);
		return -ESTALE;
	}
	return -EBUSY;
}

bool board_still(const struct board_mark *m)
{
	/* What was copied was read before what follows. */
	atomic_thread_fence(memory_order_acquire);
	return atomic_load(&m->from->unit[m->unit].generation) == m->generation;
}

void board_unmark(struct boards *b, const struct board_mark *m)
{
	atomic_store(&b->mine->mark[m->slot], 0);
}

void board_withdraw(struct boards *b, uint32_t unit)
{
	struct board_unit *u = &b->mine->unit[unit];

	for (uint32_t i = 0; i < BOARD_PORTIONS; i++)
		board_give_up(b, unit, i);
	atomic_store(&u->generation, atomic_load_explicit(&u->generation, memory_order_relaxed) + 1);
	/* What comes into the place is written behind this. */
	atomic_thread_fence(memory_order_seq_cst);
}

bool board_is_free(const struct boards *b, uint32_t unit)
{
	uint64_t wanted = mark_of(b->mine->member, unit);

	for (uint32_t i = 0; i < b->n; i++)
		for (uint32_t k = 0; k < BOARD_MARKS; k++)
			if (atomic_load(&b->theirs[i]->mark[k]) == wanted)
				return false;
	return true;
}
