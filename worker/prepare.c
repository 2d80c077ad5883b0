/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From WELCOME to a worker whose memory is all taken, in two parts: config, profile and data; and, when the fabric is
 * connected everywhere, so that it is known what is mapped and what is copied, plan, buffers and compute thread.
 */
#include "worker/process.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* ------------------------------------------------------------------ config */

static int read_config(struct worker *w, const struct msg_welcome *m, struct err *e)
{
	char *text = strndup((const char *)m->config.data, m->config.bytes);
	int rc;

	if (!text)
		return err_set(e, -ENOMEM, "out of memory");
	rc = job_config_parse(text, "the coordinator's config", "/", &w->config, e);
	free(text);
	if (rc)
		return rc;
	rc = batch_resolve(&w->config, m->n_workers, &w->batch, e);
	return rc ? rc : unit_table_init(&w->table, &w->config.model, e);
}

static int read_profile(struct worker *w, const char *text, struct err *e)
{
	int rc = k_profile_parse(text, &w->profile, e);

	return rc ? rc : k_profile_check(&w->profile, e);
}

/* ---------------------------------------------------------------- the plan */

static int make_plan(struct worker *w, uint32_t host_members, struct err *e)
{
	struct worker_memory m = {
		.n_shards = w->n_shards,
		.host_workers = host_members,
		.threads = w->threads,
		.mapped = w->in_place,
		.index_bytes = data_memory(w->data),
	};
	int rc;

	for (uint32_t i = 0; i < w->attach.n_peers; i++)
		m.connections += w->attach.peer[i].fabric->ops->connection_bytes;
	rc = worker_memory_plan(&w->config, &w->table, &w->batch, &m, &w->plan, e);

	if (!rc)
		mem_plan_log(&w->log, &w->plan.mem);
	return rc;
}

/* --------------------------------------------------------------------- all */

static int open_all(struct worker *w, struct err *e)
{
	int rc = push_open(w, e);

	if (!rc && !w->in_place)
		rc = copy_open(w, e);
	if (!rc)
		rc = compute_open(w, e);
	if (!rc)
		rc = control_watch_compute(w, e);
	return rc ? rc : compute_start(&w->compute, e);
}

int prepare(struct worker *w, const struct msg_welcome *m, struct err *e)
{
	int rc;

	snprintf(w->log.who, sizeof(w->log.who), "worker-%u", m->member);
	w->prepared = true;
	w->n_shards = m->n_shards;
	w->n_workers = m->n_workers;
	rc = read_config(w, m, e);
	if (!rc)
		rc = read_profile(w, m->profile, e);
	if (!rc)
		rc = fabrics_options(w, e);
	if (rc)
		return rc;
	/* Only the data tell what their index takes; everything else is planned before it is taken. */
	rc = data_open(&w->config.data, w->config.seed, w->config.model.vocab_size, &w->data, e);
	if (rc)
		return rc;
	if (!w->threads)
		w->threads = worker_threads(&w->config, m->host_members);
	log_info(&w->log, "math profile %s, %u compute threads", w->profile.text, w->threads);
	w->host_members = m->host_members;
	return 0;
}

int prepare_memory(struct worker *w, struct err *e)
{
	int rc = make_plan(w, w->host_members, e);

	return rc ? rc : open_all(w, e);
}

void prepare_release(struct worker *w)
{
	if (!w->prepared)
		return;
	compute_release(&w->compute);
	push_release(w);
	neighbours_release(w);
	copy_release(w);
	fabrics_release(w);
	if (w->data)
		data_close(w->data);
	unit_table_release(&w->table);
	job_config_release(&w->config);
}

static void report_sharing(struct worker *w)
{
	struct worker_counters *c = &w->counters;

	log_info(&w->log,
		 "sharing: %llu parameter bytes over a network, %llu from workers of this host; %llu portions claimed, "
		 "%llu waited for, %llu seized (%llu bytes)",
		 (unsigned long long)c->network_bytes, (unsigned long long)c->neighbour_bytes,
		 (unsigned long long)c->claimed, (unsigned long long)c->waited, (unsigned long long)c->seized,
		 (unsigned long long)c->seized_bytes);
	log_info(
		&w->log,
		"sums: %llu gradient bytes pushed; %llu gradients taken from workers of this host, %llu given to them, "
		"%llu pushed alone, %llu spans given back",
		(unsigned long long)c->push_bytes, (unsigned long long)c->sums_added, (unsigned long long)c->sums_given,
		(unsigned long long)c->sums_alone, (unsigned long long)c->sums_lost);
}

void prepare_report(struct worker *w)
{
	/* In place the gradients are shared memory; in copy mode what neighbours read: window and gradients. */
	uint64_t own = w->in_place ? w->push.n_buffers * w->push.elements * sizeof(float)
		       : w->neighbours.on
			       ? (w->plan.window_elements + w->push.n_buffers * w->push.elements) * sizeof(float)
			       : 0;

	if (!w->attach.ready_sent)
		return;
	if (w->plan.window_elements)
		log_info(&w->log, "live window: at most %llu parameters at once, of %llu allowed",
			 (unsigned long long)atomic_load(&w->copier.fetch.live_max),
			 (unsigned long long)w->plan.window_elements);
	if (!w->in_place)
		report_sharing(w);
	mem_plan_log_used(&w->log, &w->plan.mem, own);
}
