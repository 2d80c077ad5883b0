/* SPDX-License-Identifier: Apache-2.0 */
/* All that a worker will take: model's plan and the program's own lines. */
#include "kernels/kernels.h"
#include "worker/board.h"
#include "worker/net.h"
#include "worker/slices.h"
#include "worker/worker.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

/*
 * A worker without buffers, measured: the mathematics library's private data and
 * generated code (which grows with the shapes it meets), the heap that
 * connections come from, stacks.
 */
#define PROCESS_BYTES (8u << 20)
#define PAGE 4096u

unsigned worker_threads(const struct job_config *c, uint32_t host_members)
{
	long cores = sysconf(_SC_NPROCESSORS_ONLN);
	unsigned members = host_members ? host_members : 1;

	if (c->threads_per_worker)
		return c->threads_per_worker;
	return cores > 0 ? ((unsigned)cores + members - 1) / members : 1;
}

/* The host's memory, or what a control group leaves of it. */
static uint64_t host_memory(void)
{
	uint64_t all = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
	char *text, *end;
	size_t bytes;
	uint64_t limit;

	if (file_read("/sys/fs/cgroup/memory.max", 64, &text, &bytes, NULL))
		return all;
	limit = strtoull(text, &end, 10);
	if (end != text && limit < all)
		all = limit;
	free(text);
	return all;
}

struct inputs {
	const struct job_config *config;
	const struct batch_plan *batch;
	unsigned threads;
};

static uint64_t workspace(void *ctx, uint32_t n_mb)
{
	const struct inputs *in = ctx;
	struct k_dims dims;

	net_dims(&in->config->model, in->batch->micro_batch, in->config->data.sequence_length, n_mb, &dims);
	return k_cpu_ops()->workspace_bytes(&dims, in->threads);
}

int worker_memory_plan(const struct job_config *c, const struct unit_table *t, const struct batch_plan *b,
		       const struct worker_memory *m, struct worker_plan *out, struct err *e)
{
	struct inputs in = { .config = c, .batch = b, .threads = m->threads };
	struct worker_place place = {
		.memory = host_memory(),
		.workers = m->host_workers,
		.mapped = m->mapped,
		.beside = m->index_bytes + PROCESS_BYTES,
		.workspace = workspace,
		.ctx = &in,
	};
	uint64_t words = round_up_u64((uint64_t)m->n_shards * CACHE_LINE, PAGE);
	uint64_t board = c->host_sharing && !m->mapped ? round_up_u64(board_bytes(t->n_units), PAGE) : 0;
	int rc;

	place.beside += m->connections + (m->mapped ? 0 : PUSH_STAGING_BYTES + words + board);
	rc = worker_plan_make(c, t, b, &place, out, e);
	if (rc)
		return rc;
	if (m->mapped)
		mem_plan_add(&out->mem, "staging", 0, "gradients are folded where they are");
	else
		mem_plan_add(&out->mem, "staging", PUSH_STAGING_BYTES + words,
			     "slices that the page map cuts, progress words of %u shard services", m->n_shards);
	if (board)
		mem_plan_add(&out->mem, "board", board, "what workers of a host tell each other of %u units",
			     t->n_units);
	if (m->connections)
		mem_plan_add(&out->mem, "connections", m->connections, "buffers of the network, to %u shard services",
			     m->n_shards);
	if (m->index_bytes)
		mem_plan_add(&out->mem, "data index", m->index_bytes, "of documents; data files themselves are mapped");
	mem_plan_add(&out->mem, "the process itself", PROCESS_BYTES, "heap, stacks, the mathematics library");
	return 0;
}
