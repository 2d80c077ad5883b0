/* SPDX-License-Identifier: Apache-2.0 */
/*
 * NUMA: a shard service lives on one node, pages and threads, since all it does
 * is to stream its state through its processors. The services of a host go over
 * its nodes in turn. Bound is the control thread, before anything is allocated
 * and before there are other threads: those inherit both. Whoever restricted the
 * process already (taskset, numactl, a cpuset) knew better, and is left alone.
 */
#include "shardsvc/node.h"

#include <numa.h>
#include <string.h>

/* Of a node's memory, for shard services: the rest is for workers and the system. */
#define NODE_SHARE(bytes) ((bytes) / 10 * 9)

int node_choose(const struct node_view *v, const struct node_want *w, char reason[160])
{
	uint32_t services = w->host_members ? w->host_members : 1;
	const struct node_info *n;
	char need[24], has[24];
	uint64_t bytes;

	if (v->n_nodes < 2) {
		snprintf(reason, 160, "this machine has one node");
		return -1;
	}
	if (v->restricted) {
		snprintf(reason, 160, "processors or nodes were restricted before: left as they are");
		return -1;
	}
	n = &v->node[w->host_index % v->n_nodes];
	bytes = w->bytes * ((services + v->n_nodes - 1) / v->n_nodes);
	if (bytes > NODE_SHARE(n->bytes)) {
		snprintf(reason, 160, "its share of node %u's %s would be %s: over all nodes", n->id,
			 bytes_text(n->bytes, has), bytes_text(bytes, need));
		return -1;
	}
	if (w->threads > n->processors) {
		snprintf(reason, 160, "%u threads are more than the %u processors of node %u: over all nodes",
			 w->threads, n->processors, n->id);
		return -1;
	}
	snprintf(reason, 160, "service %u of this host, %u nodes in turn", w->host_index, v->n_nodes);
	return (int)n->id;
}

static uint32_t processors_of(int node)
{
	struct bitmask *cpus = numa_allocate_cpumask();
	uint32_t n = numa_node_to_cpus(node, cpus) ? 0 : numa_bitmask_weight(cpus);

	numa_free_cpumask(cpus);
	return n;
}

/* Nodes with memory and processors: memory alone is nobody's home. */
static void look(struct node_view *v)
{
	*v = (struct node_view){ 0 };
	if (numa_available() < 0)
		return;
	v->restricted = numa_num_task_cpus() < numa_num_configured_cpus() ||
			numa_num_task_nodes() < numa_num_configured_nodes();
	for (int i = 0; i <= numa_max_node() && v->n_nodes < NODES_MAX; i++) {
		long long bytes = numa_node_size64(i, NULL);
		struct node_info n = { .id = (uint32_t)i, .bytes = bytes > 0 ? (uint64_t)bytes : 0 };

		n.processors = processors_of(i);
		if (n.bytes && n.processors)
			v->node[v->n_nodes++] = n;
	}
}

void node_bind(struct log *log, const struct node_want *w)
{
	struct node_view v;
	struct bitmask *nodes;
	char reason[160];
	int node;

	look(&v);
	node = node_choose(&v, w, reason);
	if (node < 0) {
		log_info(log, "NUMA: not bound: %s", reason);
		return;
	}
	if (numa_run_on_node(node)) {
		log_warn(log, "NUMA: not bound to node %d: %m", node);
		return;
	}
	nodes = numa_allocate_nodemask();
	numa_bitmask_setbit(nodes, (unsigned)node);
	numa_set_membind(nodes);
	numa_free_nodemask(nodes);
	log_info(log, "NUMA: pages and threads on node %d: %s", node, reason);
}
