/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the workers of one host tell each other through shared memory: who
 * reads which portion of a unit from its owners, where it lies once it is
 * there, and who is copying it. Pure: works on memory handed in, no clock, no
 * fabric, so that threads can attack it in a test.
 */
#ifndef SHARDMESH_WORKER_BOARD_H
#define SHARDMESH_WORKER_BOARD_H

#include "base/base.h"

#define BOARD_PORTIONS 16   /* a unit is claimed in at most so many */
#define BOARD_MARKS 64      /* copies from neighbours at a time */
#define BOARD_NEIGHBOURS 63 /* workers of a host beside this one */

/* A unit on its worker's board. A portion's word: version << 2 | enum portion_state. */
struct board_unit {
	_Atomic uint64_t portion[BOARD_PORTIONS];
	_Atomic uint64_t offset; /* bytes, in the worker's window; good while a portion is there */
};

enum portion_state { PORTION_NONE, PORTION_INTENT, PORTION_CLAIMED, PORTION_THERE };

/* The memory of one worker's board: written by that worker alone, read by its neighbours. */
struct board {
	uint64_t magic;
	uint32_t member, n_units;
	_Atomic uint64_t mark[BOARD_MARKS]; /* whose unit is being copied: member << 32 | unit + 1; 0: none */
	struct board_unit unit[];
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

int boards_add(struct boards *b, const struct board *theirs); /* -ENOSPC */
void boards_remove(struct boards *b, uint32_t member);

enum claim {
	CLAIM_OURS,  /* nobody else reads it, and nobody will: read it, then board_there or board_give_up */
	CLAIM_THERE, /* *who has it: board_mark, copy, board_unmark */
	CLAIM_TAKEN, /* *who reads it: look again soon */
	CLAIM_AGAIN, /* somebody is just deciding: look again at once */
};
/* who: index into theirs. */
enum claim board_claim(struct boards *b, uint32_t unit, uint32_t portion, uint64_t version, uint32_t *who);
/* Ours whoever else has it: after a deadline. */
void board_seize(struct boards *b, uint32_t unit, uint32_t portion, uint64_t version);
/* The bytes of the portion lie in our window; `offset` is the unit's. */
void board_there(struct boards *b, uint32_t unit, uint32_t portion, uint64_t version, uint64_t offset);
void board_give_up(struct boards *b, uint32_t unit, uint32_t portion);

/*
 * Says that we copy from *who's unit. 0 and the unit's offset in its window: it
 * stays there until board_unmark(*slot). -ESTALE: it is not there any more.
 * -EBUSY: too many copies at a time.
 */
int board_mark(struct boards *b, uint32_t who, uint32_t unit, uint32_t portion, uint64_t version, uint32_t *slot,
	       uint64_t *offset);
void board_unmark(struct boards *b, uint32_t slot);

/* The unit's place is to be used for something else: nobody begins to copy it from now on. */
void board_withdraw(struct boards *b, uint32_t unit);
/* After board_withdraw: is nobody copying it any more? */
bool board_is_free(const struct boards *b, uint32_t unit);

#endif
