/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Gradients of neighbours are added before they leave the host: who adds to
 * whom, who waits, and what is believed of a neighbour. Pure: works on the
 * boards and a time handed in, events in, actions out. One instance a worker,
 * used by its control thread.
 *
 * A contribution is the sum of one (unit, part) over a node of the tree; it
 * begins as the span's and grows. Of two siblings the left one's worker adds:
 * it waits for the right one's and takes it from its buffer; the right one
 * waits to be taken. What has no sibling at a neighbour goes to the owners.
 * Whoever was taken is done with the contribution only when the owners have
 * what it became part of.
 */
#ifndef SHARDMESH_WORKER_SUBTREE_H
#define SHARDMESH_WORKER_SUBTREE_H

#include "mesh/mesh.h"
#include "worker/board.h"

struct subtree_config {
	uint32_t n_units;
	uint64_t wait_ns;      /* how long computing may stand still for neighbours in one span */
	struct boards *boards; /* kept; neighbours are added and removed by others */
};

enum subtree_action_type {
	SUBTREE_ADD,  /* the left buffer += `from`'s `from_buffer`, left operand first; then subtree_added */
	SUBTREE_PUSH, /* offer `buffer` to the owners as `node`; then subtree_answered */
	SUBTREE_FREE, /* nobody reads `buffer` any more */
	SUBTREE_LOST, /* something of the span cannot be known to have reached the owners: compute it again */
};
struct subtree_action {
	enum subtree_action_type type;
	uint32_t unit, part, buffer;
	struct tree_node node;
	uint32_t from, from_buffer; /* member id; which of its buffers */
};

/* Where a contribution is. */
enum subtree_state {
	SUBTREE_NONE,
	SUBTREE_WAITS,   /* left: for the sibling */
	SUBTREE_ADDS,    /* left: the caller is adding */
	SUBTREE_OFFERED, /* right: to the left sibling's worker */
	SUBTREE_LEAVES,  /* right: withdrawn, but the other is just deciding */
	SUBTREE_TAKEN,   /* right: the other reads our buffer */
	SUBTREE_GIVEN,   /* right: in the other's sum, whose fate decides ours */
	SUBTREE_PUSHED,  /* with the owners */
	SUBTREE_OVER,
};
struct subtree_item {
	enum subtree_state state;
	uint32_t buffer, level, n_takes;
	uint32_t with, with_parity; /* the neighbour it has to do with; ADDS: its span, and */
	uint64_t seen;              /* what it said of its sum when we began */
};

struct subtree {
	struct subtree_config cfg;
	struct subtree_item *item; /* [n_units][UNIT_PARTS_MAX] */
	uint64_t lease, step;
	struct tree_node node; /* the span's */
	uint32_t n_micro, parity;
	bool active, cancelled, lost;
	uint32_t n_live;         /* items that are neither NONE nor OVER */
	bool stalled, impatient; /* computing stands still; it has stood still for long enough */
	bool clock_runs;
	uint64_t clock_ns, spent_ns; /* of this span, for neighbours */
	uint64_t added, given,
		alone; /* contributions: taken from, taken by neighbours; left although there was a sibling */
	uint32_t n_out, first_out, max_out;
	struct subtree_action *out; /* a ring */
};

int subtree_init(struct subtree *s, const struct subtree_config *cfg); /* -ENOMEM */
void subtree_release(struct subtree *s);

/* A span to train on; the one before is idle. lease: never used before in this job. */
void subtree_begin(struct subtree *s, uint64_t lease, uint64_t step, struct tree_node node, uint32_t n_micro);
/* The span is over, all of it answered: neighbours look for nothing of it any more. */
void subtree_end(struct subtree *s);
/* The span's own contribution lies in `buffer`, which is not touched until SUBTREE_FREE, or until it was pushed. */
void subtree_final(struct subtree *s, uint32_t unit, uint32_t part, uint32_t buffer, uint64_t now_ns);
void subtree_added(struct subtree *s, uint32_t unit, uint32_t part, uint64_t now_ns);
/* What was pushed is answered by all owners; the buffer is the caller's. taken: they all have it. */
void subtree_answered(struct subtree *s, uint32_t unit, uint32_t part, bool taken);
/* Computing waits for a buffer, or is through with the span; or goes on. */
void subtree_stall(struct subtree *s, bool stalled, uint64_t now_ns);
/* The span is given back: nothing more is handed over, what can be had back is. */
void subtree_cancel(struct subtree *s);
/* The neighbour is gone; its board can still be read. No SUBTREE_ADD from it may be under way. */
void subtree_gone(struct subtree *s, uint32_t member, uint64_t now_ns);
/* Looks at the neighbours' boards. */
void subtree_look(struct subtree *s, uint64_t now_ns);
/* Take actions after every call but these. False: none. */
bool subtree_next(struct subtree *s, struct subtree_action *out);
/* Nothing of the span is unanswered. */
bool subtree_idle(const struct subtree *s);
/* subtree_look has to be called again soon: a neighbour's move or a deadline is waited for. */
bool subtree_watches(const struct subtree *s);

#endif
