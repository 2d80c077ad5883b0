/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which unit is read when, and where in the live window it goes. Pure: events
 * in, actions out, no clock and no fabric. Used where units are copied; where
 * they are mapped there is nothing to decide.
 */
#ifndef SHARDMESH_WORKER_FETCH_H
#define SHARDMESH_WORKER_FETCH_H

#include "worker/net.h"

struct fetch_config {
	uint32_t n_units;
	const uint64_t *unit_elements; /* [n_units], kept by reference */
	uint64_t window;               /* elements; at least fetch_window_min */
	uint64_t prefetch;             /* elements read ahead of the use being computed */
	uint64_t reuse;                /* kept after use when needed again within so many elements */
	/*
	 * Others may copy a unit from its place, also when it is not needed here any more, until the place is used for
	 * something else: may it be, now? Called for each unit that lies there, or lay elsewhere, again until it says
	 * yes, which must not depend on this worker. NULL: nobody does.
	 */
	bool (*leave)(void *ctx, uint32_t unit);
	void *ctx;
};

enum fetch_state { FETCH_ABSENT, FETCH_READING, FETCH_THERE };
struct fetch_unit {
	enum fetch_state state;
	bool doomed;      /* being read, for nobody any more: its place is free when it has arrived */
	bool victim;      /* while a place is sought */
	bool shown;       /* absent, and others may be copying what is left in its place */
	uint64_t offset;  /* elements, in the window */
	uint32_t for_use; /* the use it was read for */
};

struct fetch {
	struct fetch_config cfg;
	struct fetch_unit *unit;
	uint64_t version;
	const struct use *uses;
	uint32_t n_uses;
	uint32_t pos;     /* uses below are computed */
	uint32_t ready;   /* uses below were announced; pos <= ready unless one failed */
	uint32_t started; /* of uses below every unit is there or being read */
	int status;       /* of the first unit that failed since fetch_plan */
	uint32_t failed_unit;
	bool failure_told;
	bool held_up; /* fetch_next could have started a read but for those who copy what is in the way: ask again soon */
	_Atomic uint64_t live_max; /* elements in the window at once, read and being read; for the metrics */
};

enum fetch_action_type {
	FETCH_READ,   /* read `unit` with the plan's version to `offset` of the window */
	FETCH_USE,    /* every unit of `use` is there, and stays until the use is finished */
	FETCH_FAILED, /* `unit` cannot be had: `status` */
};
struct fetch_action {
	enum fetch_action_type type;
	uint32_t unit, use;
	uint64_t offset;
	int status;
};

int fetch_init(struct fetch *f, const struct fetch_config *cfg);
void fetch_release(struct fetch *f);
/* The smallest window that the uses allow: the largest sum of one use. */
uint64_t fetch_window_min(const uint64_t *unit_elements, const struct use *uses, uint32_t n_uses);
/*
 * A span begins: its uses in order (kept by reference), at `version`. What is
 * there of the same version is used again. The span before must have ended.
 */
void fetch_plan(struct fetch *f, uint64_t version, const struct use *uses, uint32_t n_uses);
/* The span ended early: nothing more is read, what is being read arrives yet. */
void fetch_cancel(struct fetch *f);
/* The compute thread is done with `use` and everything before it. */
void fetch_finished(struct fetch *f, uint32_t use);
/* A read ended: 0, -ESTALE (a newer version is there), -Exxx. */
void fetch_arrived(struct fetch *f, uint32_t unit, int status);
/* A unit being read that nobody wants any more: what is not posted yet need not be. */
bool fetch_is_doomed(const struct fetch *f, uint32_t unit);
/* The next action, until false. */
bool fetch_next(struct fetch *f, struct fetch_action *out);

#endif
