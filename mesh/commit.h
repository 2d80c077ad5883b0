/* SPDX-License-Identifier: Apache-2.0 */
/* What a step ends with: the losses' sum along the tree, the votes' square sum, and what follows from both. Private. */
#ifndef SHARDMESH_MESH_COMMIT_H
#define SHARDMESH_MESH_COMMIT_H

#include "mesh/mesh.h"

/* Sums of disjoint nodes, merged as far as they go. At most one begins at each micro-batch. */
struct loss_tree {
	uint32_t n, n_done; /* micro-batches: of the step, in some sum */
	uint8_t *level;     /* of the sum that begins here; LOSS_NONE */
	double *sum;
};
#define LOSS_NONE 255

/* Room for at most n_max micro-batches. -ENOMEM. */
int loss_tree_init(struct loss_tree *t, uint32_t n_max);
void loss_tree_release(struct loss_tree *t);
void loss_tree_open(struct loss_tree *t, uint32_t n);
/* The node's sum. None of its micro-batches is in yet: leases are disjoint, and each counts once. */
void loss_tree_add(struct loss_tree *t, struct tree_node node, double sum);
/* True when all are in (also when there are none). */
bool loss_tree_complete(const struct loss_tree *t);
/* Complete, and not empty: the sum along the tree, divided by the number of micro-batches. */
double loss_tree_mean(const struct loss_tree *t);

/* The square sum of a VOTE. -EINVAL: not one. */
int vote_decode(const uint8_t bytes[72], struct exact_sum *out);

/*
 * Fills in the commit part of the STEP message: norm, clipping (the factor is
 * clipping / (norm + 1e-6) where that is below 1, as torch's clip_grad_norm_),
 * learning rate, Adam's bias corrections. -EDOM: loss or norm is not finite; e
 * names the step and, as far as trouble knows, micro-batch and unit.
 */
int commit_decide(const struct coord_config *cfg, uint64_t step, const struct exact_sum *square_sum, double loss,
		  const struct trouble *trouble, struct msg_step *out, struct err *e);

#endif
