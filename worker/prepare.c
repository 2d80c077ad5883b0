/* SPDX-License-Identifier: Apache-2.0 */
/* From WELCOME to a worker whose memory is all taken: config, profile, data, plan, buffers, compute thread. */
#include "worker/process.h"

#include <assert.h>
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
	const struct worker_memory m = {
		.n_shards = w->n_shards,
		.host_workers = host_members,
		.threads = w->threads,
		.mapped = w->fabric->maps,
		.index_bytes = data_memory(w->data),
	};
	int rc = worker_memory_plan(&w->config, &w->table, &w->batch, &m, &w->plan, e);

	if (!rc)
		mem_plan_log(&w->log, &w->plan.mem);
	return rc;
}

/* ------------------------------------------------------------------ fabric */

static void on_fabric(evutil_socket_t fd, short what, void *ctx)
{
	(void)fd;
	(void)what;
	attach_pump(ctx);
}

static int choose_fabric(struct worker *w, struct err *e)
{
	const char *provider;
	char reason[160];
	int rc = fab_choose(w->config.fabric, &provider, reason, e);

	if (rc)
		return rc;
	w->fabric = fab_provider(provider);
	assert(w->fabric);
	log_info(&w->log, "fabric %s: %s", provider, reason);
	return 0;
}

static int open_fabric(struct worker *w, struct err *e)
{
	struct fab_config cfg = { .log = &w->log, .job = w->self.job, .member = w->self.member };
	int rc = w->fabric->open(&cfg, &w->fab, e);

	if (rc)
		return rc;
	w->fab_event = event_new(w->self.base, w->fabric->fd(w->fab), EV_READ | EV_PERSIST, on_fabric, w);
	if (!w->fab_event || event_add(w->fab_event, NULL))
		return err_set(e, -ENOMEM, "cannot watch the fabric");
	rc = push_open(w, e);
	return rc || w->fabric->maps ? rc : copy_open(w, e);
}

static void add_fabric_metrics(struct worker *w)
{
	const struct fab_counters *c = w->fabric->counters(w->fab);

	metrics_add(&w->metrics, "mesh_fabric_reads_total", "one-sided reads", &c->reads);
	metrics_add(&w->metrics, "mesh_fabric_read_bytes_total", "bytes read one-sided", &c->read_bytes);
	metrics_add(&w->metrics, "mesh_fabric_writes_total", "one-sided writes", &c->writes);
	metrics_add(&w->metrics, "mesh_fabric_write_bytes_total", "bytes written one-sided", &c->write_bytes);
	metrics_add(&w->metrics, "mesh_fabric_mapped_bytes", "peers' memory used in place", &c->mapped_bytes);
	metrics_add(&w->metrics, "mesh_fabric_errors_total", "failed fabric operations", &c->errors);
	metrics_add(&w->metrics, "mesh_fabric_connects_total", "fabric connections", &c->connects);
}

/* --------------------------------------------------------------------- all */

static int open_all(struct worker *w, struct err *e)
{
	int rc = open_fabric(w, e);

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
		rc = choose_fabric(w, e);
	if (rc)
		return rc;
	/* Only the data tell what their index takes; everything else is planned before it is taken. */
	rc = data_open(&w->config.data, w->config.seed, w->config.model.vocab_size, &w->data, e);
	if (rc)
		return rc;
	if (!w->threads)
		w->threads = worker_threads(&w->config, m->host_members);
	log_info(&w->log, "math profile %s, %u compute threads", w->profile.text, w->threads);
	rc = make_plan(w, m->host_members, e);
	if (!rc)
		rc = open_all(w, e);
	if (!rc)
		add_fabric_metrics(w);
	return rc;
}

void prepare_release(struct worker *w)
{
	if (!w->prepared)
		return;
	compute_release(&w->compute);
	push_release(w);
	copy_release(w);
	if (w->fab_event)
		event_free(w->fab_event);
	if (w->fab)
		w->fabric->close(w->fab);
	if (w->data)
		data_close(w->data);
	unit_table_release(&w->table);
	job_config_release(&w->config);
}

void prepare_report(struct worker *w)
{
	uint64_t own = w->push.n_buffers * w->push.elements * sizeof(float);

	if (!w->attach.ready_sent)
		return;
	own += w->plan.window_elements * sizeof(float);
	own += w->push.staging ? PUSH_STAGING_BYTES : 0;
	if (w->plan.window_elements)
		log_info(&w->log, "live window: at most %llu parameters at once, of %llu allowed",
			 (unsigned long long)atomic_load(&w->copier.fetch.live_max),
			 (unsigned long long)w->plan.window_elements);
	mem_plan_log_used(&w->log, &w->plan.mem, own);
}
