/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The memory plan of a local run, before anything is started: the very
 * functions that the members plan with, on the same inputs.
 */
#include "meshctl/meshctl.h"
#include "rdma/fabric.h"
#include "shardsvc/shardsvc.h"
#include "worker/worker.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct job_plan {
	const struct job_config *config;
	struct batch_plan batch;
	struct unit_table table;
	/* What a pair on this host would use, as far as it is known before members meet. */
	const struct fab_ops *fabric;
	uint64_t index_bytes, total;
	FILE *out;
};

/* Shares differ by a run or two, so the largest stands for all. */
static int print_shards(struct job_plan *p, struct err *e)
{
	const struct job_config *c = p->config;
	const struct shard_place place = { .n_workers = c->workers,
					   .threads = shard_threads(c, c->shards),
					   .mapped = p->fabric->maps,
					   .connection_bytes = p->fabric->connection_bytes };
	struct shard_plan plan, largest = { 0 };
	uint32_t *ids = calloc(c->shards, sizeof(*ids));
	struct page_map map;
	char who[64];
	int rc;

	if (!ids)
		return err_set(e, -ENOMEM, "out of memory");
	for (uint32_t i = 0; i < c->shards; i++)
		ids[i] = i + 1;
	rc = page_map_init(&map, &p->table, ids, c->shards, c->max_owners_per_unit);
	free(ids);
	if (rc)
		return err_set(e, rc, "no page map for %u shard services", c->shards);
	for (uint32_t i = 0; i < c->shards && !rc; i++) {
		rc = shard_memory_plan(c, &p->table, &map, map.member[i], p->batch.n_micro, &place, &plan, e);
		if (rc)
			break;
		p->total += plan.mem.total;
		if (plan.mem.total > largest.mem.total)
			largest = plan;
	}
	page_map_release(&map);
	snprintf(who, sizeof(who), "each of %u shard services at most", c->shards);
	if (!rc)
		mem_plan_print(p->out, who, &largest.mem);
	return rc;
}

static int print_workers(struct job_plan *p, struct err *e)
{
	const struct job_config *c = p->config;
	const struct worker_memory m = {
		.n_shards = c->shards,
		.host_workers = c->workers,
		.threads = worker_threads(c, c->workers),
		.mapped = p->fabric->maps,
		.connections = (uint64_t)c->shards * p->fabric->connection_bytes,
		.index_bytes = p->index_bytes,
	};
	struct worker_plan plan;
	char who[32];
	int rc = worker_memory_plan(c, &p->table, &p->batch, &m, &plan, e);

	if (rc)
		return rc;
	p->total += plan.mem.total * c->workers;
	snprintf(who, sizeof(who), "each of %u workers", c->workers);
	mem_plan_print(p->out, who, &plan.mem);
	return 0;
}

static int print_all(struct job_plan *p, struct err *e)
{
	uint64_t memory = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
	char need[24], have[24];
	int rc = print_shards(p, e);

	if (!rc)
		rc = print_workers(p, e);
	if (rc)
		return rc;
	fprintf(p->out, "in all: %s of this machine's %s\n", bytes_text(p->total, need), bytes_text(memory, have));
	if (p->total <= memory)
		return 0;
	return err_set(
		e, -ENOMEM,
		"the job needs %s and this machine has %s: use a smaller model or micro-batch, or fewer processes "
		"here",
		need, have);
}

/* Every worker opens the data too; here they are looked at before anything is started or written. */
int data_check(const struct job_config *c, uint64_t *index_bytes, struct err *e)
{
	struct data_set *d;
	int rc = data_open(&c->data, c->seed, c->model.vocab_size, &d, e);

	if (rc) {
		err_prefix(e, "shardmesh.data");
		return -EINVAL;
	}
	*index_bytes = data_memory(d);
	data_close(d);
	return 0;
}

int plan_print(FILE *f, const struct job_config *c, uint64_t index_bytes, struct err *e)
{
	struct job_plan p = { .config = c, .index_bytes = index_bytes, .out = f };
	struct fab_candidate fabric[FAB_CANDIDATES_MAX];
	char size[24];
	int rc = batch_resolve(c, c->workers, &p.batch, e);

	if (rc)
		return rc;
	rc = fab_candidates(c->fabric, NULL, true, fabric, NULL, NULL, e);
	if (rc < 0)
		return rc;
	p.fabric = fabric[0].ops;
	rc = unit_table_init(&p.table, &c->model, e);
	if (rc)
		return rc;
	fprintf(f, "model: %llu parameters in %u units, pages of %s; a step is %llu samples in %u micro-batches\n",
		(unsigned long long)p.table.n_parameters, p.table.n_units, bytes_text(p.table.page * 4, size),
		(unsigned long long)p.batch.train_batch_size, p.batch.n_micro);
	fprintf(f, "fabric: %s (%s)\n", fabric[0].ops->name, fabric[0].reason);
	rc = print_all(&p, e);
	unit_table_release(&p.table);
	return rc;
}

/* ----------------------------------------------------------------- command */

/* Exit code 42: the config is no good, or the job does not fit. */
static int print_plan(const struct job_config *c)
{
	struct err e = { 0 };
	uint64_t index_bytes;
	int rc = data_check(c, &index_bytes, &e);

	if (!rc)
		rc = plan_print(stdout, c, index_bytes, &e);
	if (!rc)
		return EXIT_OK;
	fprintf(stderr, "meshctl plan: %s\n", e.text);
	return rc == -EINVAL || rc == -ENOMEM ? EXIT_CONFIG : EXIT_JOB_FAILED;
}

int plan_main(int argc, char **argv)
{
	struct config_flags f = { 0 };
	struct job_config c;
	bool help = false;
	const struct config_command cmd = {
		.usage = "plan --config FILE [OPTIONS]",
		.what = "Prints what every process of the job would take of this machine's memory, and starts nothing.\n"
			"Options lay over the config.",
		.flags = &f,
		.help = &help,
	};
	int code;
	struct opt opts[] = {
		CONFIG_OPTS(f),
		{ .name = "help", .kind = OPT_FLAG, .out = &help, .help = "this text" },
		{ 0 },
	};

	code = config_command_open(&cmd, opts, argc, argv, &c);
	if (code != COMMAND_GOES_ON)
		return code;
	code = print_plan(&c);
	job_config_release(&c);
	return code;
}
