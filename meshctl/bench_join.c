/* SPDX-License-Identifier: Apache-2.0 */
/* The active side's half of the conversation: a worker's, up to imported memory. */
#include "meshctl/bench.h"

#include <errno.h>
#include <event2/event.h>
#include <string.h>
#include <time.h>

#define EVENTS 64
#define JOIN_NS 10000000000ull
#define FABRIC_NS 60000000000ull

static void on_ready(struct conn *c, void *ctx)
{
	struct bench_peer *p = ctx;

	(void)c;
	p->ready = true;
}

static int take_blob(struct fab_blob *out, const struct wire_blob *in)
{
	if (in->bytes > sizeof(out->data))
		return -EPROTO;
	out->bytes = in->bytes;
	if (in->bytes)
		memcpy(out->data, in->data, in->bytes);
	return 0;
}

static void refused(struct bench_peer *p, const char *reason)
{
	p->refused = true;
	snprintf(p->reason, sizeof(p->reason), "%s", reason);
}

static int on_fabric(struct bench_peer *p, const struct msg_fabric *m)
{
	struct bench_join *j = p->join;
	struct fab_blob address;
	int rc;

	if (p->ep || take_blob(&address, &m->address) || strcmp(m->provider, j->ops->name) != 0)
		return -EPROTO;
	rc = j->ops->connect(j->fab, &address, (uint64_t)(p - j->peer), &p->ep);
	if (rc)
		refused(p, strerror(-rc));
	return 0;
}

static int on_signal(struct bench_peer *p, const struct msg_signal *m)
{
	struct bench_join *j = p->join;
	struct fab_blob blob;

	if (!j->fab || strcmp(m->provider, j->ops->name) != 0)
		return 0;
	if (!j->ops->signal || take_blob(&blob, &m->data))
		return -EPROTO;
	return j->ops->signal(j->fab, (uint64_t)(p - j->peer), &blob);
}

static int on_message(struct conn *c, const struct wire_header *h, const union wire_msg *m, void *ctx)
{
	struct bench_peer *p = ctx;

	(void)c;
	switch (h->type) {
	case WIRE_FABRIC:
		return on_fabric(p, &m->fabric);
	case WIRE_FABRIC_REFUSED:
		refused(p, m->fabric_refused.reason);
		return 0;
	case WIRE_SIGNAL:
		return on_signal(p, &m->signal);
	case WIRE_REGIONS:
		p->has_regions = true;
		return take_blob(&p->parameters_blob, &m->regions.parameters) |
		       take_blob(&p->inbox_blob, &m->regions.inbox);
	default:
		return -EPROTO;
	}
}

static void on_closed(struct conn *c, int status, const char *text, void *ctx)
{
	struct bench_peer *p = ctx;

	(void)status;
	snprintf(p->join->lost, sizeof(p->join->lost), "%.80s: %s", conn_peer_text(c), text);
	p->conn = NULL;
}

static const struct conn_ops peer_ops = { .ready = on_ready, .message = on_message, .closed = on_closed };

void bench_join_event(struct bench_join *j, const struct fab_event *ev)
{
	struct bench_peer *p = &j->peer[ev->user];
	struct msg_signal m = { .provider = "" };

	switch (ev->type) {
	case FAB_EV_CONNECTED:
		p->up = true;
		break;
	case FAB_EV_DOWN:
		refused(p, strerror(-ev->status));
		if (p->up)
			snprintf(j->lost, sizeof(j->lost), "the fabric's connection is down: %s",
				 strerror(-ev->status));
		break;
	case FAB_EV_SIGNAL:
		snprintf(m.provider, sizeof(m.provider), "%s", j->ops->name);
		m.data = (struct wire_blob){ .data = ev->blob->data, .bytes = ev->blob->bytes };
		if (p->conn)
			(void)conn_send(p->conn, WIRE_SIGNAL, &m);
		break;
	default:
		break;
	}
}

void bench_join_turn(struct bench_join *j)
{
	event_base_loop(j->self.base, EVLOOP_NONBLOCK);
}

static bool all(const struct bench_join *j, bool (*test)(const struct bench_peer *p))
{
	for (uint32_t i = 0; i < j->n_peers; i++)
		if (!test(&j->peer[i]))
			return false;
	return true;
}

/* Turns both loops until all peers pass. */
static int wait_all(struct bench_join *j, bool (*test)(const struct bench_peer *p), uint64_t timeout_ns,
		    const char *what, struct err *e)
{
	const struct timespec nap = { .tv_nsec = 50000 };
	uint64_t end = clock_now_ns() + timeout_ns;
	struct fab_event ev[EVENTS];

	while (!all(j, test)) {
		uint32_t n;

		bench_join_turn(j);
		n = j->fab ? j->ops->poll(j->fab, ev, EVENTS) : 0;
		for (uint32_t i = 0; i < n; i++)
			bench_join_event(j, &ev[i]);
		if (j->lost[0])
			return err_set(e, -ECONNRESET, "%s", j->lost);
		if (clock_now_ns() > end)
			return err_set(e, -ETIMEDOUT, "waited %.0f s for %s", clock_seconds(timeout_ns), what);
		if (n == 0)
			nanosleep(&nap, NULL);
	}
	return 0;
}

static bool is_ready(const struct bench_peer *p)
{
	return p->ready;
}

static bool is_decided(const struct bench_peer *p)
{
	return p->up || p->refused;
}

static bool is_up(const struct bench_peer *p)
{
	return p->up;
}

/* True too when it cannot: the caller looks. */
static bool is_imported(const struct bench_peer *peer)
{
	struct bench_peer *p = (struct bench_peer *)(uintptr_t)peer;
	const struct fab_ops *ops = p->join->ops;
	int rc = p->has_regions ? 0 : -EAGAIN;

	if (!rc && !p->parameters)
		rc = ops->import_region(p->ep, &p->parameters_blob, &p->parameters);
	if (!rc && !p->inbox)
		rc = ops->import_region(p->ep, &p->inbox_blob, &p->inbox);
	if (rc && rc != -EAGAIN)
		snprintf(p->join->lost, sizeof(p->join->lost), "its memory cannot be imported: %s", strerror(-rc));
	return !rc;
}

static void leave_provider(struct bench_join *j)
{
	for (uint32_t i = 0; i < j->n_peers; i++) {
		struct bench_peer *p = &j->peer[i];

		if (p->ep)
			j->ops->disconnect(p->ep);
		if (p->parameters)
			j->ops->remote_close(p->parameters);
		if (p->inbox)
			j->ops->remote_close(p->inbox);
		p->ep = NULL;
		p->parameters = p->inbox = NULL;
		p->up = p->refused = p->has_regions = false;
	}
	if (j->local)
		j->ops->region_close(j->local);
	if (j->fab)
		j->ops->close(j->fab);
	j->local = NULL;
	j->fab = NULL;
}

/* 0; -ECONNREFUSED: somebody does not take it, and e says who and why; else it is over. */
static int try_provider(struct bench_join *j, const struct fab_ops *ops, struct err *e)
{
	const struct fab_config cfg = { .log = (struct log *)&j->config->log,
					.job = j->config->job,
					.member = 2,
					.options = &j->config->options,
					.want = j->config->fabric };
	const struct fab_region_attr attr = { .name = "local", .bytes = j->config->memory, .access = FAB_LOCAL };
	struct msg_fabric_want want;
	int rc;

	j->ops = ops;
	snprintf(want.provider, sizeof(want.provider), "%s", ops->name);
	if (ops->open(&cfg, &j->fab, e) || ops->region_open(j->fab, &attr, &j->local, e))
		return -ECONNREFUSED;
	for (uint32_t i = 0; i < j->n_peers; i++)
		if (conn_send(j->peer[i].conn, WIRE_FABRIC_WANT, &want))
			return err_set(e, -ECONNRESET, "a connection does not take messages");
	rc = wait_all(j, is_decided, FABRIC_NS, "the fabric to connect", e);
	if (rc)
		return rc;
	for (uint32_t i = 0; i < j->n_peers; i++)
		if (j->peer[i].refused)
			return err_set(e, -ECONNREFUSED, "%s", j->peer[i].reason);
	rc = wait_all(j, is_up, FABRIC_NS, "the fabric to connect", e);
	return rc ? rc : wait_all(j, is_imported, JOIN_NS, "memory to be described", e);
}

static void log_refused(void *ctx, const char *provider, const char *reason)
{
	log_info((struct log *)ctx, "fabric %s is left out: %s", provider, reason);
}

static int connect_fabric(struct bench_join *j, struct err *e)
{
	struct log *log = (struct log *)(uintptr_t)&j->config->log;
	struct fab_candidate c[FAB_CANDIDATES_MAX];
	int n = fab_candidates(j->config->fabric, &j->config->options, j->config->same_host, c, log_refused, log, e);
	int rc = n;

	for (int i = 0; i < n; i++) {
		rc = try_provider(j, c[i].ops, e);
		if (rc != -ECONNREFUSED)
			return rc;
		log_refused(log, c[i].ops->name, e->text);
		leave_provider(j);
		j->lost[0] = '\0';
	}
	return rc;
}

int bench_join(struct bench_join *j, const struct bench_config *c, const char *const *endpoint, uint32_t n,
	       struct err *e)
{
	int rc = 0;

	memset(j, 0, sizeof(*j));
	j->config = c;
	j->n_peers = n;
	j->self =
		(struct mesh_self){ .log = (struct log *)&c->log, .role = ROLE_WORKER, .member = 2, .token = c->token };
	snprintf(j->self.job, sizeof(j->self.job), "%s", c->job);
	j->self.base = event_base_new();
	if (!j->self.base)
		return err_set(e, -ENOMEM, "no event loop");
	for (uint32_t i = 0; i < n && !rc; i++) {
		j->peer[i].join = j;
		rc = conn_connect(&j->self, endpoint[i], clock_now_ns() + JOIN_NS, &peer_ops, &j->peer[i],
				  &j->peer[i].conn, e);
	}
	if (!rc)
		rc = wait_all(j, is_ready, JOIN_NS, "the passive side", e);
	return rc ? rc : connect_fabric(j, e);
}

void bench_join_close(struct bench_join *j)
{
	if (j->fab)
		leave_provider(j);
	for (uint32_t i = 0; i < j->n_peers; i++)
		conn_free(j->peer[i].conn);
	if (j->self.base)
		event_base_free(j->self.base);
}
