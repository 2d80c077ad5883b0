/* SPDX-License-Identifier: Apache-2.0 */
/*
 * shardsvc: what other programs may use of it: its memory plan, so that a job
 * can be refused before anything is started. The rest of the folder is the
 * program `shardsvc`.
 */
#ifndef SHARDMESH_SHARDSVC_H
#define SHARDMESH_SHARDSVC_H

#include "base/base.h"
#include "model/model.h"

/* What a shard service's plan depends on beside the job and its pages. */
struct shard_place {
	uint32_t n_workers; /* asked for at the start */
	unsigned threads;
	bool mapped;               /* gradients are read in place */
	uint32_t connection_bytes; /* fab_ops.connection_bytes, of the fabric that workers are expected to take */
};
/* Threads of a shard service that nobody gave a number, beside `host_members` on one host. */
unsigned shard_threads(const struct job_config *c, uint32_t host_members);
/*
 * All that the program will take: shard_plan_make's lines and its own. The
 * program plans with this function and keeps to it. Errors as shard_plan_make.
 */
int shard_memory_plan(const struct job_config *c, const struct unit_table *t, const struct page_map *map,
		      uint32_t member, uint32_t n_micro, const struct shard_place *place, struct shard_plan *out,
		      struct err *e);

#endif
