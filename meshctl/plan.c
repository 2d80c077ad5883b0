/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The memory plan of a local run, before anything is started: the very
 * functions that the members plan with, on the same inputs.
 */
#include "kernels/kernels.h"
#include "meshctl/meshctl.h"
#include "rdma/fabric.h"

#include <errno.h>
#include <string.h>
#include <sys/sysinfo.h>
#include <unistd.h>

struct plan_inputs {
	const struct job_config *config;
	struct batch_plan batch;
	unsigned threads;
};

static uint64_t workspace(void *ctx, uint32_t n_mb)
{
	const struct plan_inputs *in = ctx;
	const struct model_config *m = &in->config->model;
	struct k_dims dims = {
		.n_mb = n_mb,
		.batch = in->batch.micro_batch,
		.seq = in->config->data.sequence_length,
		.channels = m->n_embd,
		.heads = m->n_head,
		.kv_heads = m->n_kv_head,
		.head_dim = m->head_dim,
		.ffn = m->n_inner,
		.vocab = m->vocab_size,
	};

	return k_cpu_ops()->workspace_bytes(&dims, in->threads);
}

static int print_shards(FILE *f, const struct plan_inputs *in, const struct unit_table *t, bool mapped, uint64_t *total,
			struct err *e)
{
	const struct job_config *c = in->config;
	uint32_t ids[512];
	struct page_map map;
	struct shard_plan plan;
	char who[32];
	int rc;

	for (uint32_t i = 0; i < c->shards; i++)
		ids[i] = i + 1;
	rc = page_map_init(&map, t, ids, c->shards, c->max_owners_per_unit);
	if (rc)
		return err_set(e, rc, "no page map for %u shard services", c->shards);
	for (uint32_t i = 0; i < c->shards && !rc; i++) {
		rc = shard_plan_make(c, t, &map, ids[i], in->batch.n_micro, c->workers, mapped, &plan, e);
		if (rc)
			break;
		*total += plan.mem.total;
		snprintf(who, sizeof(who), "shard service %u of %u", i + 1, c->shards);
		if (i == 0)
			mem_plan_print(f, who, &plan.mem);
	}
	page_map_release(&map);
	return rc;
}

static int print_workers(FILE *f, const struct plan_inputs *in, const struct unit_table *t, bool mapped,
			 uint64_t *total, struct err *e)
{
	uint64_t memory = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
	struct worker_plan plan;
	char who[32];
	int rc;

	rc = worker_plan_make(in->config, t, &in->batch, memory, in->config->workers, mapped, workspace,
			      (void *)(uintptr_t)in, &plan, e);
	if (rc)
		return rc;
	*total += plan.mem.total * in->config->workers;
	snprintf(who, sizeof(who), "each of %u workers", in->config->workers);
	mem_plan_print(f, who, &plan.mem);
	return 0;
}

int plan_print(FILE *f, const struct job_config *c, struct err *e)
{
	struct plan_inputs in = { .config = c };
	uint64_t total = 0, memory = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
	char need[24], have[24], reason[160];
	const char *provider;
	struct unit_table t;
	bool mapped;
	long cores = sysconf(_SC_NPROCESSORS_ONLN);
	int rc;

	rc = batch_resolve(c, c->workers, &in.batch, e);
	if (rc)
		return rc;
	rc = fab_choose(c->fabric, &provider, reason, e);
	if (rc)
		return rc;
	mapped = fab_provider(provider)->maps;
	in.threads = c->threads_per_worker ? c->threads_per_worker : (unsigned)((cores + c->workers - 1) / c->workers);
	rc = unit_table_init(&t, &c->model, e);
	if (rc)
		return rc;
	fprintf(f, "model: %llu parameters in %u units, pages of %s; a step is %llu samples in %u micro-batches\n",
		(unsigned long long)t.n_parameters, t.n_units, bytes_text(t.page * 4, need),
		(unsigned long long)in.batch.train_batch_size, in.batch.n_micro);
	fprintf(f, "fabric: %s (%s)\n", provider, reason);
	rc = print_shards(f, &in, &t, mapped, &total, e);
	if (!rc)
		rc = print_workers(f, &in, &t, mapped, &total, e);
	unit_table_release(&t);
	if (rc)
		return rc;
	fprintf(f, "in all: %s of this machine's %s\n", bytes_text(total, need), bytes_text(memory, have));
	if (total > memory)
		return err_set(
			e, -ENOMEM,
			"the job needs %s and this machine has %s: use a smaller model or micro-batch, or fewer processes "
			"here",
			need, have);
	return 0;
}
