/* SPDX-License-Identifier: Apache-2.0 */
/* On which NUMA node a shard service lives. */
#ifndef SHARDMESH_SHARDSVC_NODE_H
#define SHARDMESH_SHARDSVC_NODE_H

#include "base/base.h"

#define NODES_MAX 64
struct node_info {
	uint32_t id, processors;
	uint64_t bytes; /* all of its memory */
};
struct node_view {
	bool restricted; /* the process may not use all processors, or not all nodes */
	uint32_t n_nodes;
	struct node_info node[NODES_MAX]; /* those with memory and processors */
};
struct node_want {
	uint32_t host_index, host_members; /* this service among those of the host */
	unsigned threads;
	uint64_t bytes; /* planned */
};
/* The node's id, or -1: none; reason says why. */
int node_choose(const struct node_view *v, const struct node_want *w, char reason[160]);
/* Chooses, and binds this thread and all memory and threads to come; logged with the reason. */
void node_bind(struct log *log, const struct node_want *w);

#endif
