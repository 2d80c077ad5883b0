/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The providers of the fabric that this worker uses, one instance each, opened
 * for the first shard service that needs it; and our memory in them. In place
 * there is one provider and it makes the memory, since it shares only what it
 * made. In copy mode memory is allocated once, on huge pages where there are
 * any, and every provider adopts it; a window that neighbours copy from is made
 * by `local`, the others adopt it likewise.
 */
#include "worker/process.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

static void note_left_out(void *ctx, const char *provider, const char *reason)
{
	struct worker *w = ctx;

	log_debug(&w->log, "fabric %s is left out: %s", provider, reason);
}

/* The address from which we reach the coordinator is the one that others reach us by. */
static void find_address(struct worker *w)
{
	struct err e;

	if (!conn_route_address(w->endpoint, w->local_address, &e))
		w->fabric_options.local_address = w->local_address;
}

int fabrics_options(struct worker *w, struct err *e)
{
	struct fab_candidate c[FAB_CANDIDATES_MAX];
	int rc = 0;

	for (uint32_t i = 0; i < w->config.n_rdma && !rc; i++)
		rc = fab_options_set(&w->fabric_options, w->config.rdma[i].name, w->config.rdma[i].value, e);
	if (!rc)
		rc = fab_flags_apply(&w->fabric_flags, &w->fabric_options, e);
	if (rc)
		return rc;
	w->fabric_want = w->fabric_flags.fabric ? w->fabric_flags.fabric : w->config.fabric;
	find_address(w);
	/* What can be used nowhere is better known before anything is connected. */
	rc = fab_candidates(w->fabric_want, &w->fabric_options, true, c, note_left_out, w, e);
	return rc < 0 ? rc : 0;
}

/* ------------------------------------------------------------------ instances */

static void on_readable(evutil_socket_t fd, short what, void *ctx)
{
	(void)fd;
	(void)what;
	attach_pump(ctx);
}

static void add_metrics(struct worker *w, const struct fab_counters *c)
{
	struct metrics *m = &w->metrics;

	metrics_add(m, "mesh_fabric_reads_total", "one-sided reads", &c->reads);
	metrics_add(m, "mesh_fabric_read_bytes_total", "bytes read one-sided", &c->read_bytes);
	metrics_add(m, "mesh_fabric_writes_total", "one-sided writes", &c->writes);
	metrics_add(m, "mesh_fabric_write_bytes_total", "bytes written one-sided", &c->write_bytes);
	metrics_add(m, "mesh_fabric_mapped_bytes", "peers' memory used in place", &c->mapped_bytes);
	metrics_add(m, "mesh_fabric_errors_total", "failed fabric operations", &c->errors);
	metrics_add(m, "mesh_fabric_connects_total", "fabric connections", &c->connects);
	metrics_add(m, "mesh_fabric_rebuilds_total", "connections that broke and stand again", &c->rebuilds);
	metrics_add(m, "mesh_fabric_replays_total", "operations done again on them", &c->replays);
	metrics_add(m, "mesh_fabric_refused_total", "what peers tried without having the right", &c->refused);
}

static int open_instance(struct worker *w, const struct fab_ops *ops, struct fabric *f, struct err *e)
{
	const struct fab_config cfg = {
		.log = &w->log,
		.job = w->self.job,
		.member = w->self.member,
		.options = &w->fabric_options,
		.want = w->fabric_want,
	};
	int rc = ops->open(&cfg, &f->fab, e);

	if (rc)
		return rc;
	f->w = w;
	f->ops = ops;
	f->event = event_new(w->self.base, ops->fd(f->fab), EV_READ | EV_PERSIST, on_readable, w);
	if (f->event && !event_add(f->event, NULL))
		return 0;
	if (f->event)
		event_free(f->event);
	ops->close(f->fab);
	return err_set(e, -ENOMEM, "cannot watch it");
}

int fabrics_get(struct worker *w, const struct fab_ops *ops, struct fabric **out, struct err *e)
{
	struct fabric *f;
	int rc;

	for (uint32_t i = 0; i < w->n_fabrics; i++) {
		if (w->fabric[i].ops == ops) {
			*out = &w->fabric[i];
			return 0;
		}
	}
	assert(w->n_fabrics < ARRAY_LEN(w->fabric));
	f = &w->fabric[w->n_fabrics];
	rc = open_instance(w, ops, f, e);
	if (rc)
		return rc;
	add_metrics(w, ops->counters(f->fab));
	w->n_fabrics++;
	/* From now on its events wake the loop; there may be some already. */
	if (!ops->arm(f->fab))
		event_active(f->event, EV_READ, 0);
	*out = f;
	return 0;
}

void fabrics_release(struct worker *w)
{
	for (uint32_t k = 0; k < w->n_fabrics; k++) {
		struct fabric *f = &w->fabric[k];

		event_free(f->event);
		for (uint32_t i = 0; i < MEMORY_USES; i++)
			if (f->region[i])
				f->ops->region_close(f->region[i]);
		f->ops->close(f->fab);
	}
	for (uint32_t i = 0; i < MEMORY_USES; i++)
		arena_release(&w->memory[i]);
}

/* --------------------------------------------------------------------- memory */

static bool in_use(const struct worker *w, const struct fabric *f)
{
	for (uint32_t i = 0; i < w->attach.n_peers; i++)
		if (w->attach.peer[i].fabric == f)
			return true;
	return false;
}

static int shared_memory(struct fabric *f, enum memory_use use, const struct fab_region_attr *a, void **at,
			 struct err *e)
{
	int rc = f->ops->region_open(f->fab, a, &f->region[use], e);

	if (!rc)
		*at = f->ops->region_addr(f->region[use]);
	return rc;
}

/* Memory of one use that neighbours may read. -Exxx: it is not to be had, and they read none. */
static int neighbours_memory(struct worker *w, enum memory_use use, struct fab_region_attr a, void **at)
{
	struct err e = { 0 };
	int rc;

	a.access = FAB_REMOTE_READ;
	rc = shared_memory(w->neighbours.fabric, use, &a, at, &e);
	if (rc)
		neighbours_off(w, e.text);
	return rc;
}

int fabrics_memory(struct worker *w, enum memory_use use, const char *name, uint64_t bytes, void **at, struct err *e)
{
	struct fab_region_attr a = {
		.name = name, .memory = FAB_HOST, .bytes = bytes, .access = w->in_place ? FAB_REMOTE_READ : FAB_LOCAL
	};
	bool shared = (use == MEMORY_WINDOW || use == MEMORY_GRADIENTS) && w->neighbours.on;
	int rc = 0;

	if (w->in_place)
		return shared_memory(w->attach.peer[0].fabric, use, &a, at, e);
	if (shared)
		shared = !neighbours_memory(w, use, a, &a.at);
	if (!shared && arena_init(&w->memory[use], name, round_up_u64(bytes, 4096)))
		return err_set(e, -ENOMEM, "no memory for the %s", name);
	if (!shared)
		a.at = w->memory[use].base;
	for (uint32_t k = 0; k < w->n_fabrics && !rc; k++)
		if (in_use(w, &w->fabric[k]) && !w->fabric[k].region[use])
			rc = w->fabric[k].ops->region_open(w->fabric[k].fab, &a, &w->fabric[k].region[use], e);
	*at = a.at;
	return rc;
}

/* ---------------------------------------------------------------------- names */

uint32_t worker_provider(const char *name)
{
	static const char *const names[WORKER_PROVIDERS] = { "local", "local-copy", "verbs", "ofi" };
	uint32_t i = 0;

	while (i < WORKER_PROVIDERS && strcmp(names[i], name) != 0)
		i++;
	return i;
}

const char *fabrics_text(const struct worker *w, char out[64])
{
	size_t at = 0;

	out[0] = '\0';
	for (uint32_t k = 0; k < w->n_fabrics && at < 64; k++)
		if (in_use(w, &w->fabric[k]))
			at += (size_t)snprintf(out + at, 64 - at, "%s%s", at ? " and " : "", w->fabric[k].ops->name);
	return out;
}
