/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A member's link to the coordinator.
 *
 *   connecting -> REGISTER -> WELCOME -> (MEMBER* EPOCH)* and everything else
 *
 * The table of members is replaced as a whole when EPOCH closes a view, so the
 * program never sees half of one. Header fields of what we send (term, step,
 * branch) follow what the coordinator last said, the epoch that view. A message
 * of an older term than the highest seen comes from a coordinator that was
 * replaced, and is dropped (rule 2).
 *
 * over() is the end and comes once: SHUTDOWN, a refusal, a coordinator that is
 * gone or never answered, or a welcome() that failed. Nothing is called after
 * it; member_link_send never calls it, only the loop does.
 */
#include "mesh/conn_internal.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define HEARTBEAT_SECONDS 1

struct member_link {
	struct mesh_self *self;
	struct member_link_config cfg;
	struct member_ops ops;
	void *ctx;
	struct conn *conn; /* NULL once it is closed */
	struct event *heartbeat;
	bool welcomed, over;
	char endpoint[300], listen[128];
	struct member_table table, next; /* next: the view that is being sent */
	uint8_t waits[4096], counters[METRICS_MAX * 80];
};

static void over(struct member_link *l, uint32_t exit_code, const char *text)
{
	if (l->over)
		return;
	l->over = true;
	event_del(l->heartbeat);
	l->ops.over(l->ctx, exit_code, text);
}

/* ------------------------------------------------------------- what we send */

static uint64_t host_id(void)
{
	char *text;
	size_t bytes;
	uint64_t id;

	if (file_read("/proc/sys/kernel/random/boot_id", 256, &text, &bytes, NULL) < 0)
		return 0;
	id = hash64(text, bytes, 0);
	free(text);
	return id;
}

static void send_registration(struct member_link *l)
{
	struct msg_registration m = { .pid = (uint32_t)getpid(), .host_id = host_id() };

	if (gethostname(m.host, sizeof(m.host)) < 0)
		snprintf(m.host, sizeof(m.host), "unknown");
	m.host[sizeof(m.host) - 1] = 0;
	snprintf(m.listen, sizeof(m.listen), "%s", l->listen);
	(void)conn_send(l->conn, WIRE_REGISTER, &m);
}

static void send_heartbeat(struct member_link *l)
{
	struct msg_heartbeat m = {
		.waits = { .data = l->waits },
		.counters = { .data = l->counters },
	};

	m.waits.bytes = (uint32_t)waits_pack(l->cfg.waits, l->cfg.n_waits, clock_now_ns(), l->waits, sizeof(l->waits));
	if (l->cfg.metrics)
		m.counters.bytes = (uint32_t)metrics_pack(l->cfg.metrics, l->counters, sizeof(l->counters));
	/* A coordinator that does not read is noticed by whoever waits for it; a heartbeat more changes nothing. */
	(void)conn_send(l->conn, WIRE_HEARTBEAT, &m);
}

static void on_heartbeat(evutil_socket_t fd, short what, void *ctx)
{
	struct member_link *l = ctx;

	(void)fd;
	(void)what;
	if (l->conn && l->welcomed)
		send_heartbeat(l);
}

/* ---------------------------------------------------------- what is received */

static int on_welcome(struct member_link *l, const struct msg_welcome *m)
{
	struct timeval each = { .tv_sec = HEARTBEAT_SECONDS };
	struct msg_failure failure = { .exit_code = EXIT_JOB_FAILED };
	struct err e = { .code = 0 };
	int rc;

	if (l->welcomed || m->member == 0)
		return -EPROTO;
	l->welcomed = true;
	l->self->member = m->member;
	event_add(l->heartbeat, &each);
	rc = l->ops.welcome(l->ctx, m, &e);
	if (rc == 0)
		return 0;
	if (rc == -EINVAL)
		failure.exit_code = EXIT_CONFIG;
	snprintf(failure.text, sizeof(failure.text), "%.500s", e.text);
	(void)conn_send(l->conn, WIRE_FAILURE, &failure);
	over(l, failure.exit_code, failure.text);
	return 0;
}

static int on_member(struct member_link *l, const struct msg_member *m)
{
	if (l->next.n == ARRAY_LEN(l->next.member))
		return -E2BIG;
	l->next.member[l->next.n++] = *m;
	return 0;
}

static int on_epoch(struct member_link *l, const struct msg_epoch *m)
{
	if (m->n_members != l->next.n)
		return -EPROTO;
	l->table.n = l->next.n;
	l->table.epoch = m->epoch;
	memcpy(l->table.member, l->next.member, l->next.n * sizeof(l->next.member[0]));
	l->next.n = 0;
	l->self->epoch = m->epoch;
	l->ops.members(l->ctx, &l->table);
	return 0;
}

/* The epoch is not taken from here: ours is that of the view we hold. */
static void follow(struct mesh_self *self, const struct wire_header *h)
{
	self->branch = h->branch;
	self->term = h->term;
	self->step = h->step;
}

static int on_message(struct conn *c, const struct wire_header *h, const union wire_msg *m, void *ctx)
{
	struct member_link *l = ctx;

	(void)c;
	if (l->over)
		return 0;
	if (h->term < l->self->term) {
		log_warn(l->self->log, "dropped %s of term %llu: the coordinator's term is %llu", wire_name(h->type),
			 (unsigned long long)h->term, (unsigned long long)l->self->term);
		return 0;
	}
	follow(l->self, h);
	switch (h->type) {
	case WIRE_WELCOME:
		return on_welcome(l, &m->welcome);
	case WIRE_MEMBER:
		return on_member(l, &m->member);
	case WIRE_EPOCH:
		return on_epoch(l, &m->epoch);
	case WIRE_REJECT:
		over(l, m->reject.exit_code ? m->reject.exit_code : EXIT_JOB_FAILED, m->reject.text);
		return 0;
	case WIRE_SHUTDOWN:
		over(l, m->shutdown.exit_code, m->shutdown.text);
		return 0;
	case WIRE_STEP:
	case WIRE_LEASE:
	case WIRE_RECALL:
	case WIRE_RELAY:
	case WIRE_EXPORT_READ:
		return l->welcomed ? l->ops.message(l->ctx, h, m) : -EPROTO;
	default:
		return -EPROTO;
	}
}

/* ---------------------------------------------------------------- connection */

static void on_ready(struct conn *c, void *ctx)
{
	struct member_link *l = ctx;

	if (conn_role(c) != ROLE_COORDINATOR) {
		char text[400];

		snprintf(text, sizeof(text), "%s is not a coordinator: %s", l->endpoint, conn_peer_text(c));
		over(l, EXIT_CONFIG, text);
		return;
	}
	log_info(l->self->log, "connected to the %s", conn_peer_text(c));
	send_registration(l);
}

static uint32_t exit_code_of(const struct member_link *l, const struct conn *c, int status)
{
	if (conn_reject_code(c))
		return conn_reject_code(c);
	if (status == -EPERM)
		return EXIT_CONFIG;
	/* Before we were a member nothing is lost yet: whoever started us may start us again. */
	return l->welcomed ? EXIT_JOB_FAILED : EXIT_RETRY_LATER;
}

static void on_closed(struct conn *c, int status, const char *text, void *ctx)
{
	struct member_link *l = ctx;
	char said[800];

	l->conn = NULL;
	if (l->welcomed)
		snprintf(said, sizeof(said), "the coordinator (%s) is lost: %s", l->endpoint, text);
	else
		snprintf(said, sizeof(said), "cannot join: %s", text);
	over(l, exit_code_of(l, c, status), said);
}

static const struct conn_ops link_ops = {
	.ready = on_ready,
	.message = on_message,
	.closed = on_closed,
};

int member_link_open(struct mesh_self *self, const struct member_link_config *cfg, const struct member_ops *ops,
		     void *ctx, struct member_link **out, struct err *e)
{
	struct member_link *l = calloc(1, sizeof(*l));
	int rc = -ENOMEM;

	assert(self->role == ROLE_SHARD || self->role == ROLE_WORKER);
	if (!l)
		return err_set(e, rc, "out of memory for the link to the coordinator");
	l->self = self;
	l->cfg = *cfg;
	l->ops = *ops;
	l->ctx = ctx;
	snprintf(l->endpoint, sizeof(l->endpoint), "%s", cfg->rdzv_endpoint);
	snprintf(l->listen, sizeof(l->listen), "%s", cfg->listen ? cfg->listen : "");
	l->heartbeat = event_new(self->base, -1, EV_PERSIST, on_heartbeat, l);
	if (!l->heartbeat) {
		err_set(e, rc, "out of memory for the link to the coordinator");
		goto err_link;
	}
	rc = conn_connect(self, l->endpoint, clock_now_ns() + cfg->join_timeout_ns, &link_ops, l, &l->conn, e);
	if (rc < 0)
		goto err_heartbeat;
	*out = l;
	return 0;
err_heartbeat:
	event_free(l->heartbeat);
err_link:
	free(l);
	return rc;
}

int member_link_send(struct member_link *l, unsigned type, const void *msg)
{
	return l->conn ? conn_send(l->conn, type, msg) : -EPIPE;
}

void member_link_free(struct member_link *l)
{
	if (!l)
		return;
	conn_free(l->conn);
	event_free(l->heartbeat);
	free(l);
}
