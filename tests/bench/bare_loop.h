/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A training step without any mesh: the worker's own transformer and schedule
 * with a fold and its square sum behind each unit, the coordinator's decision,
 * and Adam, called one behind the other on one stream in one process. Nothing is shared, sent,
 * copied or allocated during a step. Loss and norm have the bits that the mesh
 * gets from the same config, so a comparison is of the same work.
 */
#ifndef SHARDMESH_BENCH_BARE_LOOP_H
#define SHARDMESH_BENCH_BARE_LOOP_H

#include "mesh/mesh.h"
#include "model/model.h"
#include "worker/schedule.h"

struct bare_unit {
	float *p, *m, *v, *gradient[UNIT_PARTS_MAX];
};

struct bare {
	struct job_config config;
	struct unit_table table;
	struct batch_plan batch;
	struct coord_config commit;
	struct data_set *data;
	struct k_profile profile;
	const struct k_ops *ops;
	struct net net;
	struct use *uses;
	uint32_t n_uses;
	struct bare_unit *unit;
	struct exact_sum squares; /* of the step's gradients that are whole */
	struct arena state, activations, workspace;
};

/* Parameters as an owner would fill them; every page touched. ops: the CPU table, or one that wraps it. */
int bare_open(struct bare *b, const char *config, unsigned threads, const struct k_ops *ops, struct err *e);
void bare_close(struct bare *b);
/* Steps from 1, in order. *done: loss, norm and what else the commit says. */
int bare_step(struct bare *b, uint64_t step, struct msg_step *done, struct err *e);

#endif
