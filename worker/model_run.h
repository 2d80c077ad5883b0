/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A whole model's forward and backward in plain memory: the program's own
 * transformer and schedule without fabric or mesh. For tests and comparisons.
 */
#ifndef SHARDMESH_WORKER_MODEL_RUN_H
#define SHARDMESH_WORKER_MODEL_RUN_H

#include "kernels/kernels.h"
#include "model/model.h"

struct model_run {
	const struct model_config *model;
	const struct unit_table *table;
	const struct k_ops *ops; /* k_cpu_ops() or another */
	const struct k_profile *profile;
	uint32_t threads;
	uint32_t batch, seq;              /* of a micro-batch */
	uint32_t n_mb;                    /* micro-batches of the span */
	bool training;                    /* backward too, with the model's dropout */
	bool keep;                        /* keep activations, else recompute them; same bits */
	uint32_t head_pieces;             /* struct head_plan's; 0 where logits are asked for */
	uint64_t seed, step;              /* name the dropout, */
	uint32_t first;                   /* with the global index of the first micro-batch */
	const uint32_t *tokens, *targets; /* [n_mb][batch][seq] */
	const uint32_t *first_key;        /* as k_attention takes it, or NULL */
	const float *const *unit;         /* [n_units]: flat vectors, unit->n elements each */
	/*
	 * [n_units][UNIT_PARTS_MAX]: where the span's gradient of each (unit,
	 * part) goes, unit->n elements each; outside the part's pages nothing is
	 * written. NULL without training.
	 */
	float *const (*gradient)[UNIT_PARTS_MAX];
	/* Out, either may be NULL: each micro-batch's loss [n_mb]; logits [n_mb][batch][seq][vocab], without training. */
	double *losses;
	float *logits;
};

/* *loss: tree sum of the micro-batches' mean losses. */
int model_run(const struct model_run *r, double *loss, struct err *e);

#endif
