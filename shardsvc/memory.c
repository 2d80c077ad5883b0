/* SPDX-License-Identifier: Apache-2.0 */
#include "shardsvc/shard.h"

#include <errno.h>
#include <sched.h>
#include <string.h>

/*
 * A shard service without pages, measured: libraries' private data, the heap
 * that connections come from, stacks.
 */
#define PROCESS_BYTES (2u << 20)
#define PAGE 4096u

static unsigned cores(void)
{
	cpu_set_t set;

	return sched_getaffinity(0, sizeof(set), &set) ? 1 : (unsigned)CPU_COUNT(&set);
}

unsigned shard_threads(const struct job_config *c, uint32_t host_members)
{
	uint32_t n = host_members ? host_members : 1;

	return c->threads_per_shard ? c->threads_per_shard : (cores() + n - 1) / n;
}

/* A coverage has room for every worker there can be; of its four arrays, what the workers asked for touch. */
static uint64_t coverage_touched(uint32_t n_workers)
{
	return coverage_bytes(n_workers) + 4 * PAGE;
}

static uint64_t table_bytes(const struct store *s, uint32_t n_workers)
{
	return s->n_pieces * (sizeof(struct piece) + sizeof(struct track)) + s->n_pieces * coverage_touched(n_workers) +
	       s->table->n_units * (sizeof(struct store_unit) + sizeof(struct exact_sum)) +
	       n_workers * sizeof(struct peer) + data_ring_bytes();
}

int shard_memory_plan(const struct job_config *c, const struct unit_table *t, const struct page_map *map,
		      uint32_t member, uint32_t n_micro, const struct shard_place *place, struct shard_plan *out,
		      struct err *e)
{
	struct store s;
	int rc = shard_plan_make(c, t, map, member, n_micro, place->n_workers, place->mapped, out, e);

	if (rc)
		return rc;
	rc = store_init(&s, t, map, member);
	if (rc)
		return err_set(e, rc, "tables of the pages: %s", strerror(-rc));
	mem_plan_add(&out->mem, "kernels' workspace", data_workspace_bytes(place->threads), "%u threads",
		     place->threads);
	mem_plan_add(&out->mem, "rings and tables", table_bytes(&s, place->n_workers), "%u pieces, %u workers",
		     s.n_pieces, place->n_workers);
	if (place->connection_bytes)
		mem_plan_add(&out->mem, "connections", (uint64_t)place->n_workers * place->connection_bytes,
			     "buffers of the network, to %u workers", place->n_workers);
	mem_plan_add(&out->mem, "the process itself", PROCESS_BYTES, "heap, stacks, private data of libraries");
	store_release(&s);
	return 0;
}
