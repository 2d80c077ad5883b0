/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The providers of the fabric that workers reach us by, one instance each. The
 * first makes the parameters' memory, by shared memory, whoever will read it;
 * the others are opened when a worker first asks for them, and adopt it. An
 * instance made for copies on one host is the same as one for mapping, so
 * `local` serves workers that are told to copy, too.
 */
#include "shardsvc/shard.h"

#include <assert.h>
#include <errno.h>
#include <event2/event.h>
#include <string.h>

static bool is_local(const struct fab_ops *ops)
{
	return !strncmp(ops->name, "local", strlen("local"));
}

/* Adopting instances count under the same names: metrics_pack adds them up. */
static void register_metrics(struct shard *s, const struct fab_counters *c)
{
	struct metrics *m = &s->metrics;

	metrics_add(m, "mesh_fabric_connects_total", "endpoints that came up", &c->connects);
	metrics_add(m, "mesh_fabric_notices_total", "slices of pushes that arrived", &c->notices);
	metrics_add(m, "mesh_fabric_mapped_bytes_total", "memory of workers mapped here", &c->mapped_bytes);
	metrics_add(m, "mesh_fabric_errors_total", "operations and connections that failed", &c->errors);
	metrics_add(m, "mesh_fabric_rebuilds_total", "connections that broke and stand again", &c->rebuilds);
	metrics_add(m, "mesh_fabric_refused_total", "what workers tried without having the right", &c->refused);
}

static void on_readable(evutil_socket_t fd, short what, void *ctx)
{
	(void)fd;
	(void)what;
	publish_poll(ctx);
}

static int watch(struct fabric *f, struct err *e)
{
	f->event = event_new(f->shard->self.base, f->ops->fd(f->fab), EV_READ | EV_PERSIST, on_readable, f->shard);
	if (!f->event || event_add(f->event, NULL))
		return err_set(e, -ENOMEM, "no memory for an event");
	return 0;
}

static void instance_close(struct fabric *f)
{
	if (f->event)
		event_free(f->event);
	if (f->parameters)
		f->ops->region_close(f->parameters);
	f->ops->close(f->fab);
	memset(f, 0, sizeof(*f));
}

static int instance_open(struct shard *s, const struct fab_ops *ops, struct fabric *f, struct err *e)
{
	const struct fab_config cfg = {
		.log = &s->log,
		.job = s->self.job,
		.member = s->self.member,
		.options = &s->fabric_options,
		.want = s->fabric_want,
	};
	int rc = ops->open(&cfg, &f->fab, e);

	if (rc)
		return rc;
	f->shard = s;
	f->ops = ops;
	return 0;
}

/* -------------------------------------------------------------------- options */

/* The address that routes to the coordinator is the one that workers reach us by. */
static void find_address(struct shard *s)
{
	struct err e;

	if (!conn_route_address(s->rdzv_endpoint, s->local_address, &e))
		s->fabric_options.local_address = s->local_address;
}

static const struct fab_ops *home_provider(const struct fab_candidate *c, int n)
{
	for (int i = 0; i < n; i++)
		if (is_local(c[i].ops))
			return c[i].ops;
	return fab_provider("local");
}

int fabrics_open(struct shard *s, struct err *e)
{
	struct fab_candidate c[FAB_CANDIDATES_MAX];
	int n, rc = 0;

	for (uint32_t i = 0; i < s->job.n_rdma && !rc; i++)
		rc = fab_options_set(&s->fabric_options, s->job.rdma[i].name, s->job.rdma[i].value, e);
	if (!rc)
		rc = fab_flags_apply(&s->fabric_flags, &s->fabric_options, e);
	if (rc)
		return rc;
	s->fabric_want = s->fabric_flags.fabric ? s->fabric_flags.fabric : s->job.fabric;
	find_address(s);
	n = fab_candidates(s->fabric_want, &s->fabric_options, true, c, NULL, NULL, e);
	if (n < 0)
		return n;
	for (int i = 0; i < n; i++)
		log_info(&s->log, "fabric %s: %s", c[i].ops->name, c[i].reason);
	rc = instance_open(s, home_provider(c, n), &s->fabric[0], e);
	if (rc)
		return rc;
	register_metrics(s, s->fabric[0].ops->counters(s->fabric[0].fab));
	s->n_fabrics = 1;
	return 0;
}

const struct fab_ops *fabrics_expected(const struct shard *s)
{
	struct fab_candidate c[FAB_CANDIDATES_MAX];
	int n = fab_candidates(s->fabric_want, &s->fabric_options, s->one_host, c, NULL, NULL, NULL);

	return n > 0 ? c[0].ops : NULL;
}

int fabrics_parameters(struct shard *s, uint64_t bytes, void **at, struct err *e)
{
	const struct fab_region_attr a = {
		.name = "parameters", .memory = FAB_HOST, .bytes = bytes, .access = FAB_REMOTE_READ
	};
	struct fabric *home = &s->fabric[0];
	int rc = home->ops->region_open(home->fab, &a, &home->parameters, e);

	if (!rc)
		*at = home->ops->region_addr(home->parameters);
	return rc;
}

int fabrics_watch(struct shard *s, struct err *e)
{
	return watch(&s->fabric[0], e);
}

/* ------------------------------------------------------------------- requests */

/* Another provider over the same parameters. */
static int adopt(struct shard *s, const struct fab_ops *ops, struct fabric **out, struct err *e)
{
	struct fabric *home = &s->fabric[0], *f = &s->fabric[s->n_fabrics];
	struct fab_region_attr a = { .name = "parameters", .memory = FAB_HOST, .access = FAB_REMOTE_READ };
	int rc;

	assert(s->n_fabrics < ARRAY_LEN(s->fabric));
	rc = instance_open(s, ops, f, e);
	if (rc)
		return rc;
	a.bytes = atomic_load(&s->count.shard_bytes);
	a.at = home->ops->region_addr(home->parameters);
	rc = ops->region_open(f->fab, &a, &f->parameters, e);
	if (!rc)
		rc = watch(f, e);
	if (rc) {
		instance_close(f);
		return rc;
	}
	register_metrics(s, ops->counters(f->fab));
	s->n_fabrics++;
	*out = f;
	return 0;
}

struct refusal {
	const char *name;
	char reason[160];
};

static void note_refusal(void *ctx, const char *provider, const char *reason)
{
	struct refusal *r = ctx;

	if (!strcmp(provider, r->name))
		snprintf(r->reason, sizeof(r->reason), "%s", reason);
}

static const struct fab_ops *find(const struct fab_candidate *c, int n, const char *name)
{
	for (int i = 0; i < n; i++)
		if (!strcmp(c[i].ops->name, name))
			return c[i].ops;
	/* Who is told to copy is served by the memory that others map. */
	return !strcmp(name, "local-copy") ? find(c, n, "local") : NULL;
}

int fabrics_get(struct shard *s, const char *name, bool same_host, struct fabric **out, struct err *e)
{
	struct fab_candidate c[FAB_CANDIDATES_MAX];
	struct refusal r = { .name = name };
	int n = fab_candidates(s->fabric_want, &s->fabric_options, same_host, c, note_refusal, &r, e);
	const struct fab_ops *ops = find(c, n, name);

	if (!ops && r.reason[0])
		return err_set(e, -ENOTSUP, "%s", r.reason);
	if (!ops)
		return err_set(e, -ENOTSUP, "this shard service is told to use \"%s\"", s->fabric_want);
	for (uint32_t i = 0; i < s->n_fabrics; i++) {
		if (s->fabric[i].ops == ops) {
			*out = &s->fabric[i];
			return 0;
		}
	}
	return adopt(s, ops, out, e);
}

void fabrics_close(struct shard *s)
{
	while (s->n_fabrics > 0)
		instance_close(&s->fabric[--s->n_fabrics]);
}
