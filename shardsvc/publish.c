/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Workers: from a connection to memory that both sides see, and back.
 *
 *   GREETING --proof--> WAITING --member, pages--> OPENING --accepted--> EXCHANGE --imported--> ATTACHED
 *
 * A worker that has proven itself may still be unknown to us, because our view
 * of the members travels on another connection, or come before we know our
 * pages; then it waits. FABRIC carries an address that is good for one
 * connection of the fabric; once that stands, REGIONS goes both ways with the
 * descriptors of memory, and ATTACHED when the other's is imported. Messages
 * and fabric events arrive by different ways, so either may be first.
 *
 * The end is the delicate part. When the connection is lost (the worker died,
 * was evicted, or broke the protocol) its offers are taken back, but jobs that
 * read its memory or its inbox may be with the data thread. The peer then stays
 * as GONE, its memory mapped, until the last of them is done; a mapping of
 * shared memory is good whoever dies. Its slot is free only after that.
 */
#include "shardsvc/shard.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define EVENTS_AT_ONCE 64
#define SLOT_BITS 16

static_assert(PEERS_MAX <= 1u << SLOT_BITS, "a slot fits a serial number");

static void count(_Atomic uint64_t *c, uint64_t n)
{
	atomic_fetch_add_explicit(c, n, memory_order_relaxed);
}

/* ------------------------------------------------------------ conversation */

static void peer_close(struct peer *p, const char *why)
{
	if (!p->conn || p->closing)
		return;
	p->closing = true;
	conn_close(p->conn, why);
}

int peer_refuse(struct peer *p, const char *fmt, ...)
{
	char why[512];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(why, sizeof(why), fmt, ap);
	va_end(ap);
	count(&p->shard->count.peers_dropped, 1);
	log_error(&p->shard->log, "%s is dropped: %s", p->conn ? conn_peer_text(p->conn) : "a worker", why);
	peer_close(p, why);
	return -EPROTO;
}

void peer_send(struct peer *p, unsigned type, const void *msg)
{
	int rc;

	if (!p->conn || p->closing)
		return;
	rc = conn_send(p->conn, type, msg);
	if (rc && rc != -EPIPE)
		peer_refuse(p, "%s cannot be sent: %s", wire_name(type), strerror(-rc));
}

static bool is_member(const struct shard *s, uint32_t member)
{
	for (uint32_t i = 0; i < s->n_live; i++)
		if (s->live[i] == member)
			return true;
	return false;
}

/* The worker waits until we know it and our pages. */
static void try_open(struct peer *p)
{
	struct shard *s = p->shard;
	struct msg_fabric m = { .address = { 0 } };
	struct fab_blob address;
	int rc;

	if (p->state != PEER_WAITING || p->closing || !s->prepared || !is_member(s, p->member))
		return;
	rc = s->fab_ops->address(s->fab, p->serial, &address);
	if (rc) {
		peer_refuse(p, "no address of the fabric for it: %s", strerror(-rc));
		return;
	}
	snprintf(m.provider, sizeof(m.provider), "%s", s->fab_ops->name);
	m.address = (struct wire_blob){ .data = address.data, .bytes = address.bytes };
	p->state = PEER_OPENING;
	peer_send(p, WIRE_FABRIC, &m);
}

/* An inbox for pushes, where gradients are not read in place: this worker's alone, and never another's. */
static int open_inbox(struct peer *p, struct fab_blob *out)
{
	struct shard *s = p->shard;
	const struct fab_region_attr attr = {
		.name = "inbox",
		.memory = FAB_HOST,
		.bytes = (s->plan.inbox_elements ? s->plan.inbox_elements : 1) * sizeof(float),
		.access = FAB_REMOTE_WRITE,
	};
	struct err e = { 0 };
	int rc = s->fab_ops->region_open(s->fab, &attr, &p->inbox, &e);

	if (rc)
		return peer_refuse(p, "no inbox for it: %s", e.text);
	service_inbox_opened(s);
	rc = s->fab_ops->export_region(p->ep, p->inbox, out);
	return rc ? peer_refuse(p, "its inbox cannot be exported: %s", strerror(-rc)) : 0;
}

static void send_regions(struct peer *p)
{
	struct shard *s = p->shard;
	struct fab_blob parameters, inbox = { 0 };
	struct msg_regions m = { .parameters = { 0 } };
	int rc = s->fab_ops->export_region(p->ep, s->parameters, &parameters);

	if (rc) {
		peer_refuse(p, "the parameters cannot be exported: %s", strerror(-rc));
		return;
	}
	if (!s->fab_ops->maps && open_inbox(p, &inbox))
		return;
	m.parameters = (struct wire_blob){ .data = parameters.data, .bytes = parameters.bytes };
	m.inbox = (struct wire_blob){ .data = inbox.data, .bytes = inbox.bytes };
	p->state = PEER_EXCHANGE;
	peer_send(p, WIRE_REGIONS, &m);
}

static int map_gradients(struct peer *p)
{
	const struct fab_ops *f = p->shard->fab_ops;
	void *at;
	int rc;

	if (!p->gradients) {
		rc = f->import_region(p->ep, &p->gradients_blob, &p->gradients);
		if (rc)
			return rc;
	}
	p->gradients_bytes = f->remote_bytes(p->gradients);
	rc = f->map(p->gradients, 0, p->gradients_bytes, NULL, &at);
	if (rc)
		return rc;
	p->gradients_at = at;
	return 0;
}

/* What the worker announced may still be on its way: then again after the next events. */
static void try_attach(struct peer *p)
{
	struct shard *s = p->shard;
	const struct msg_attached m = { .in_place = s->fab_ops->maps };
	int rc = 0;

	if (p->state != PEER_EXCHANGE || !p->has_regions || p->closing)
		return;
	if (s->fab_ops->maps)
		rc = map_gradients(p);
	if (rc == -EAGAIN)
		return;
	if (rc) {
		peer_refuse(p, "its gradients cannot be mapped: %s", strerror(-rc));
		return;
	}
	p->state = PEER_ATTACHED;
	log_info(&s->log, "%s is attached: gradients are %s", conn_peer_text(p->conn),
		 m.in_place ? "read in place" : "pushed into its inbox");
	peer_send(p, WIRE_ATTACHED, &m);
}

static int on_regions(struct peer *p, const struct msg_regions *m)
{
	bool maps = p->shard->fab_ops && p->shard->fab_ops->maps;

	if (p->state < PEER_OPENING || p->has_regions)
		return peer_refuse(p, "REGIONS out of turn");
	if (m->gradients.bytes > FAB_BLOB_MAX || (m->gradients.bytes > 0) != maps)
		return peer_refuse(p, "REGIONS with %u bytes of gradient descriptor where gradients are %s",
				   m->gradients.bytes, maps ? "read in place" : "pushed");
	if (m->gradients.bytes)
		memcpy(p->gradients_blob.data, m->gradients.data, m->gradients.bytes);
	p->gradients_blob.bytes = m->gradients.bytes;
	p->has_regions = true;
	try_attach(p);
	return 0;
}

static int on_attached(struct peer *p, const struct msg_attached *m)
{
	if (p->state < PEER_EXCHANGE)
		return peer_refuse(p, "ATTACHED out of turn");
	if ((m->in_place != 0) != p->shard->fab_ops->maps)
		return peer_refuse(p, "it wants gradients %s, we do not", m->in_place ? "read in place" : "pushed");
	return 0;
}

/* ------------------------------------------------------------- connections */

static void on_ready(struct conn *c, void *ctx)
{
	struct peer *p = ctx;
	struct shard *s = p->shard;

	p->member = conn_member(c);
	if (conn_role(c) != ROLE_WORKER || p->member == 0) {
		peer_refuse(p, "only workers connect here");
		return;
	}
	for (uint32_t i = 0; i < s->n_slots; i++) {
		const struct peer *other = s->peer[i];

		if (other && other != p && other->conn && other->member == p->member) {
			peer_refuse(p, "it is connected already");
			return;
		}
	}
	p->state = PEER_WAITING;
	try_open(p);
}

static int on_message(struct conn *c, const struct wire_header *h, const union wire_msg *m, void *ctx)
{
	struct peer *p = ctx;

	(void)c;
	if (p->closing)
		return 0;
	switch (h->type) {
	case WIRE_REGIONS:
		return on_regions(p, &m->regions);
	case WIRE_ATTACHED:
		return on_attached(p, &m->attached);
	default:
		return inbox_message(p, h, m);
	}
}

static void on_closed(struct conn *c, int status, const char *text, void *ctx)
{
	struct peer *p = ctx;

	(void)status;
	log_info(&p->shard->log, "%s: %s", conn_peer_text(c), text);
	p->conn = NULL;
	inbox_withdraw_all(p);
	p->state = PEER_GONE;
	peer_settle(p);
}

void peer_settle(struct peer *p)
{
	struct shard *s = p->shard;
	const struct fab_ops *f = s->fab_ops;

	assert(p->state == PEER_GONE && !p->conn);
	if (p->n_offers)
		return;
	if (p->gradients)
		f->remote_close(p->gradients);
	if (p->ep)
		f->disconnect(p->ep);
	if (p->inbox)
		f->region_close(p->inbox);
	s->peer[p->slot] = NULL;
	free(p);
}

static const struct conn_ops peer_ops = {
	.ready = on_ready,
	.message = on_message,
	.closed = on_closed,
};

static uint32_t free_slot(struct shard *s)
{
	for (uint32_t i = 0; i < s->n_slots; i++)
		if (!s->peer[i])
			return i;
	return s->n_slots < PEERS_MAX ? s->n_slots++ : PEER_NONE;
}

static void on_accepted(void *ctx, struct conn *c)
{
	struct shard *s = ctx;
	uint32_t slot = free_slot(s);
	struct peer *p = slot == PEER_NONE ? NULL : calloc(1, sizeof(*p));

	if (!p) {
		log_error(&s->log, "no room for another worker beside %u", s->n_slots);
		conn_free(c);
		return;
	}
	*p = (struct peer){ .shard = s, .slot = slot, .conn = c, .filling = PEER_NONE };
	p->serial = ++s->next_serial << SLOT_BITS | slot;
	s->peer[slot] = p;
	conn_set_ctx(c, &peer_ops, p);
}

int publish_listen(struct shard *s, struct err *e)
{
	char route[64];
	int rc = 0;

	if (!s->listen) {
		rc = conn_route(s->rdzv_endpoint, route, e);
		if (rc)
			return rc;
	}
	return conn_listen(&s->self, s->listen ? s->listen : route, on_accepted, s, &s->listener, e);
}

void publish_members(struct shard *s)
{
	for (uint32_t i = 0; i < s->n_slots; i++) {
		struct peer *p = s->peer[i];

		if (!p)
			continue;
		try_open(p);
		if (p->state > PEER_WAITING && p->state != PEER_GONE && !is_member(s, p->member))
			peer_close(p, "it is not a member any more");
	}
}

/* ------------------------------------------------------------------ fabric */

static void register_metrics(struct shard *s)
{
	const struct fab_counters *c = s->fab_ops->counters(s->fab);
	struct metrics *m = &s->metrics;

	metrics_add(m, "mesh_fabric_connects_total", "endpoints that came up", &c->connects);
	metrics_add(m, "mesh_fabric_notices_total", "slices of pushes that arrived", &c->notices);
	metrics_add(m, "mesh_fabric_mapped_bytes_total", "memory of workers mapped here", &c->mapped_bytes);
	metrics_add(m, "mesh_fabric_errors_total", "operations and connections that failed", &c->errors);
}

int publish_open(struct shard *s, struct err *e)
{
	const struct fab_config cfg = { .log = &s->log, .job = s->self.job, .member = s->self.member };
	const char *provider;
	char reason[160];
	int rc = fab_choose(s->job.fabric, &provider, reason, e);

	if (rc)
		return rc;
	log_info(&s->log, "fabric %s (%s)", provider, reason);
	s->fab_ops = fab_provider(provider);
	if (!s->fab_ops)
		return err_set(e, -ENOTSUP, "fabric %s is not in this build", provider);
	rc = s->fab_ops->open(&cfg, &s->fab, e);
	if (!rc)
		register_metrics(s);
	return rc;
}

static struct peer *peer_of(struct shard *s, uint64_t serial)
{
	uint32_t slot = (uint32_t)(serial & ((1u << SLOT_BITS) - 1));

	return slot < s->n_slots && s->peer[slot] && s->peer[slot]->serial == serial ? s->peer[slot] : NULL;
}

static void on_event(struct shard *s, const struct fab_event *ev)
{
	struct peer *p = peer_of(s, ev->user);

	switch (ev->type) {
	case FAB_EV_ACCEPTED:
		if (!p || p->state != PEER_OPENING || p->closing) {
			s->fab_ops->disconnect(ev->ep);
			return;
		}
		p->ep = ev->ep;
		send_regions(p);
		try_attach(p);
		break;
	case FAB_EV_NOTICE:
		if (p && p->state == PEER_ATTACHED)
			inbox_notice(p, ev->imm);
		break;
	case FAB_EV_DOWN:
		/* Of one that is gone: its endpoint went with it. One that dies is often noticed here first. */
		if (p && !p->closing && p->conn) {
			log_info(&s->log, "%s: its fabric connection is lost: %s", conn_peer_text(p->conn),
				 strerror(-ev->status));
			peer_close(p, "its fabric connection is lost");
		}
		break;
	case FAB_EV_CONNECTED:
	case FAB_EV_READ:
	case FAB_EV_WRITE:
	case FAB_EV_SIGNAL:
		assert(!"a shard service connects to nobody and posts nothing");
		break;
	}
}

void publish_poll(struct shard *s)
{
	struct fab_event ev[EVENTS_AT_ONCE];
	uint32_t n;

	do {
		while ((n = s->fab_ops->poll(s->fab, ev, EVENTS_AT_ONCE)) > 0)
			for (uint32_t i = 0; i < n; i++)
				on_event(s, &ev[i]);
		for (uint32_t i = 0; i < s->n_slots; i++)
			if (s->peer[i])
				try_attach(s->peer[i]);
	} while (!s->fab_ops->arm(s->fab));
}

/* The data thread has stopped, the loop too: nothing refers to anything any more. */
void publish_close(struct shard *s)
{
	for (uint32_t i = 0; i < s->n_slots; i++) {
		struct peer *p = s->peer[i];

		if (!p)
			continue;
		if (p->conn)
			conn_free(p->conn);
		p->conn = NULL;
		p->n_offers = 0;
		p->state = PEER_GONE;
		peer_settle(p);
	}
	conn_listener_free(s->listener);
	if (s->parameters)
		s->fab_ops->region_close(s->parameters);
	if (s->fab)
		s->fab_ops->close(s->fab);
}
