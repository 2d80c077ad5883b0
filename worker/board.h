/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the workers of one host tell each other through shared memory: who
 * reads which portion of a unit from its owners, where it lies once it is
 * there, and who is copying it; and which sums of gradients each has, wants to
 * give, and has taken (subtree.h). Pure: works on memory handed in, no clock, no
 * fabric, so that threads can attack it in a test.
 */
#ifndef SHARDMESH_WORKER_BOARD_H
#define SHARDMESH_WORKER_BOARD_H

#include "base/base.h"
#include "model/model.h"

#define BOARD_PORTIONS 16   /* a unit is claimed in at most so many */
#define BOARD_MARKS 64      /* copies from neighbours at a time */
#define BOARD_NEIGHBOURS 63 /* workers of a host beside this one */

/* A unit on its worker's board. A portion's word: version << 2 | enum portion_state. */
struct board_unit {
	_Atomic uint64_t portion[BOARD_PORTIONS];
	_Atomic uint64_t offset;     /* bytes, in the worker's window; good while a portion is there */
	_Atomic uint64_t generation; /* of what lies there: grows with every board_withdraw */
};

enum portion_state { PORTION_NONE, PORTION_INTENT, PORTION_CLAIMED, PORTION_THERE };

/*
 * A worker's span: who holds which node of the tree. Words of sums carry its
 * lease, so that what is left of an older span means nothing. Two spans at a
 * time: neighbours may still look for what became of the one before.
 */
struct board_span {
	_Atomic uint64_t lease; /* written last; 0: none */
	_Atomic uint64_t step, first, level;
};

/* What a worker says of its own sum of a (unit, part): lease << 16 | level << 8 | buffer << 4 | enum sum_state. */
enum sum_state {
	SUM_NONE,    /* not computed yet */
	SUM_WAITS,   /* for the right sibling's */
	SUM_OFFERED, /* to the left sibling's worker: it may be taken from `buffer` */
	SUM_LEAVES,  /* it may not be taken any more; if it was, it still lies there */
	SUM_ALONE,   /* not to be waited for, and the buffer is used for something else */
};
/* What it says of others' that it takes: lease << 4 | enum take_state. */
enum take_state {
	TAKE_NONE,
	TAKE_INTENT,
	TAKE_ADDING, /* it reads the other's buffer */
	TAKE_ADDED,  /* the buffer is free */
	TAKE_FINAL,  /* the owners have it */
	TAKE_LOST,   /* it is not known to have reached them */
};
#define BOARD_TAKES 8 /* right siblings that one sum takes up on its way */
struct board_sum {
	_Atomic uint64_t own;
	_Atomic uint64_t take[BOARD_TAKES];
};

/* The memory of one worker's board: written by that worker alone, read by its neighbours. */
struct board {
	uint64_t magic;
	uint32_t member, n_units;
	_Atomic uint64_t mark[BOARD_MARKS]; /* whose unit is being copied: member << 32 | unit + 1; 0: none */
	struct board_span span[2];
	struct board_unit unit[]; /* behind them the sums */
};

/* Our board, and the neighbours' as they are mapped here. */
struct boards {
	struct board *mine;
	uint32_t n;
	const struct board *theirs[BOARD_NEIGHBOURS];
};

uint64_t board_bytes(uint32_t n_units);
/* Zeroed memory of board_bytes becomes a board. */
void board_init(struct board *b, uint32_t member, uint32_t n_units);
/* A neighbour's memory: 0, or -EPROTO when it is not the board of `member` for n_units. */
int board_check(const struct board *b, uint64_t bytes, uint32_t member, uint32_t n_units);

/* The sum of (unit, part) in the span `parity`. */
struct board_sum *board_sum(struct board *b, uint32_t parity, uint32_t unit, uint32_t part);
const struct board_sum *board_sum_of(const struct board *b, uint32_t parity, uint32_t unit, uint32_t part);

int boards_add(struct boards *b, const struct board *theirs); /* -ENOSPC */
void boards_remove(struct boards *b, uint32_t member);

enum claim {
	CLAIM_OURS,  /* nobody else reads it, and nobody will: read it, then board_there or board_give_up */
	CLAIM_THERE, /* *who has it: board_mark, copy, board_unmark */
	CLAIM_TAKEN, /* *who reads it: look again soon */
	CLAIM_AGAIN, /* somebody is just deciding: look again at once */
};
/* Whether somebody has it or reads it, without a claim: CLAIM_OURS means that nobody does. who: index into theirs. */
enum claim board_look(const struct boards *b, uint32_t unit, uint32_t portion, uint64_t version, uint32_t *who);
enum claim board_claim(struct boards *b, uint32_t unit, uint32_t portion, uint64_t version, uint32_t *who);
/* Ours whoever else has it: after a deadline. */
void board_seize(struct boards *b, uint32_t unit, uint32_t portion, uint64_t version);
/* The bytes of the portion lie in our window; `offset` is the unit's. */
void board_there(struct boards *b, uint32_t unit, uint32_t portion, uint64_t version, uint64_t offset);
void board_give_up(struct boards *b, uint32_t unit, uint32_t portion);

/*
 * Says that we copy from a unit of theirs[who]. 0: it stays where m says until
 * board_unmark, unless its worker does not reckon with us any more: whoever was
 * stopped long enough to be evicted, and then goes on. So what was copied counts
 * only if board_still says so, before board_unmark. -ESTALE: it is not there
 * any more. -EBUSY: too many copies at a time.
 */
struct board_mark {
	const struct board *from;
	uint32_t unit, slot;
	uint64_t offset, generation; /* bytes, in its window */
};
int board_mark(struct boards *b, uint32_t who, uint32_t unit, uint32_t portion, uint64_t version, struct board_mark *m);
/* Since board_mark, has the place been the unit's without a break? */
bool board_still(const struct board_mark *m);
void board_unmark(struct boards *b, const struct board_mark *m);

/* The unit's place is to be used for something else, or what it has is not whole: nobody begins to copy it any more. */
void board_withdraw(struct boards *b, uint32_t unit);
/* After board_withdraw: is nobody copying it any more? */
bool board_is_free(const struct boards *b, uint32_t unit);

#endif
