/* SPDX-License-Identifier: Apache-2.0 */
/* The micro-batches of the open step that nobody has been given, and spans of them. Private to mesh. */
#ifndef SHARDMESH_MESH_LEASE_H
#define SHARDMESH_MESH_LEASE_H

#include "mesh/mesh.h"

/* One bit a micro-batch. */
struct span_set {
	uint32_t n, n_open;
	uint32_t low; /* none below it is open */
	bool any_starved;
	uint64_t *open;    /* neither leased nor done */
	uint64_t *starved; /* an owner said that it waits for this one */
};
struct lease_table {
	struct span_set set[LEASE_EVAL + 1]; /* by kind */
	uint64_t last_id;
};

/* Room for steps of at most n_micro and n_eval micro-batches. -ENOMEM. */
int lease_table_init(struct lease_table *t, uint32_t n_micro, uint32_t n_eval);
void lease_table_release(struct lease_table *t);
/* A new step: everything is open. 0: none of that kind. */
void lease_table_open(struct lease_table *t, uint32_t n_micro, uint32_t n_eval);
/*
 * The longest power of two for which the busiest of n_workers equal workers gets
 * no more of n micro-batches than with length 1, and at most max_span.
 */
uint32_t lease_longest(uint32_t n, uint32_t n_workers, uint32_t max_span);
/*
 * The lowest open node, as long as lease_longest and its alignment allow; what
 * is trained on goes before evaluation. False: nothing is open.
 */
bool lease_take(struct lease_table *t, uint32_t n_workers, uint32_t max_span, uint32_t worker, struct lease *out);
/* Its holder is gone or gave it back. */
void lease_reopen(struct lease_table *t, const struct lease *l);
/* An owner refuses offers until this micro-batch comes. */
void lease_starve(struct lease_table *t, uint32_t leaf);
/* Some owner waits for a micro-batch that is open. */
bool lease_starving(const struct lease_table *t);
/* The lowest open micro-batch of a kind; false: none. */
bool lease_lowest(struct lease_table *t, enum lease_kind kind, uint32_t *leaf);

#endif
