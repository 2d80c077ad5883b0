/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Workers: from a connection to memory that both sides see, and back.
 *
 *   GREETING --proof--> WAITING --member, pages--> OPENING --accepted--> EXCHANGE --imported--> ATTACHED
 *
 * A worker that has proven itself may still be unknown to us, because our view
 * of the members travels on another connection, or come before we know our
 * pages; then it waits. In OPENING it asks for one provider of the fabric after
 * another: FABRIC carries an address that is good for one connection,
 * FABRIC_REFUSED the reason why not; what it asks for next replaces what it
 * asked for before, and only the last one's events count. When it is connected
 * to all shard services it knows whether it maps or copies, and sends REGIONS;
 * ours follows, and ATTACHED when what was announced is imported. Messages and
 * fabric events arrive by different ways, so either may be first.
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

static_assert(sizeof(((struct msg_fabric *)0)->provider) == sizeof(((struct peer *)0)->provider), "copied whole");
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

static bool is_here(const struct shard *s, uint32_t member)
{
	for (uint32_t i = 0; i < s->n_live; i++)
		if (s->live[i] == member)
			return s->live_here[i];
	return false;
}

/* The one that was tried before was not to the worker's liking, or did not connect. */
static void leave_fabric(struct peer *p)
{
	if (p->ep)
		p->fabric->ops->disconnect(p->ep);
	p->ep = NULL;
	p->fabric = NULL;
}

static void refuse_provider(struct peer *p, const char *reason)
{
	struct msg_fabric_refused m = { .provider = "" };

	snprintf(m.provider, sizeof(m.provider), "%s", p->provider);
	snprintf(m.reason, sizeof(m.reason), "%s", reason);
	log_info(&p->shard->log, "%s is not served by %s: %s", conn_peer_text(p->conn), m.provider, reason);
	count(&p->shard->count.fabrics_refused, 1);
	peer_send(p, WIRE_FABRIC_REFUSED, &m);
}

/* The worker waits until we know it and our pages. */
static void try_open(struct peer *p)
{
	struct shard *s = p->shard;
	struct msg_fabric m = { .address = { 0 } };
	struct fab_blob address;
	struct err e = { 0 };
	int rc;

	if (p->state < PEER_WAITING || p->closing || !p->wanted[0] || !s->prepared || !is_member(s, p->member))
		return;
	p->state = PEER_OPENING;
	leave_fabric(p);
	memcpy(p->provider, p->wanted, sizeof(p->provider));
	p->wanted[0] = '\0';
	rc = fabrics_get(s, p->provider, is_here(s, p->member), &p->fabric, &e);
	if (!rc) {
		assert(p->fabric);
		rc = p->fabric->ops->address(p->fabric->fab, p->serial, &address);
	}
	if (rc) {
		p->fabric = NULL;
		refuse_provider(p, e.text[0] ? e.text : strerror(-rc));
		return;
	}
	memcpy(m.provider, p->provider, sizeof(m.provider));
	m.address = (struct wire_blob){ .data = address.data, .bytes = address.bytes };
	peer_send(p, WIRE_FABRIC, &m);
}

static int on_want(struct peer *p, const struct msg_fabric_want *m)
{
	if (p->state < PEER_WAITING || p->state > PEER_OPENING || p->has_regions || p->wanted[0] || !m->provider[0])
		return peer_refuse(p, "FABRIC_WANT out of turn");
	memcpy(p->wanted, m->provider, sizeof(p->wanted));
	try_open(p);
	return 0;
}

static int on_signal(struct peer *p, const struct msg_signal *m)
{
	struct fab_blob blob = { .bytes = m->data.bytes };
	int rc;

	/* Of one that it has given up, before it heard of that. */
	if (!p->fabric || strcmp(p->provider, m->provider) != 0)
		return 0;
	if (!p->fabric->ops->signal || blob.bytes > sizeof(blob.data))
		return peer_refuse(p, "SIGNAL of %u bytes for %s", m->data.bytes, p->provider);
	if (blob.bytes)
		memcpy(blob.data, m->data.data, blob.bytes);
	rc = p->fabric->ops->signal(p->fabric->fab, p->serial, &blob);
	return rc ? peer_refuse(p, "SIGNAL for %s: %s", p->provider, strerror(-rc)) : 0;
}

static void carry_signal(struct peer *p, const struct fab_blob *blob)
{
	struct msg_signal m = { .data = { .data = blob->data, .bytes = blob->bytes } };

	memcpy(m.provider, p->provider, sizeof(m.provider));
	peer_send(p, WIRE_SIGNAL, &m);
}

/* An inbox for pushes, where gradients are not read in place: this worker's alone, and never another's. */
static int open_inbox(struct peer *p, struct fab_blob *out)
{
	struct shard *s = p->shard;
	const struct fab_region_attr attr = {
		.name = "inbox",
		.memory = FAB_HOST,
		.bytes = (s->inbox_elements ? s->inbox_elements : 1) * sizeof(float),
		.access = FAB_REMOTE_WRITE,
	};
	struct err e = { 0 };
	int rc = p->fabric->ops->region_open(p->fabric->fab, &attr, &p->inbox, &e);

	if (rc)
		return peer_refuse(p, "no inbox for it: %s", e.text);
	p->slices_seen = calloc(attr.bytes / PUSH_SLICE / 64 + 1, sizeof(uint64_t));
	if (!p->slices_seen)
		return peer_refuse(p, "out of memory");
	service_inbox_opened(s);
	rc = p->fabric->ops->export_region(p->ep, p->inbox, out);
	return rc ? peer_refuse(p, "its inbox cannot be exported: %s", strerror(-rc)) : 0;
}

/* It has said what it does, and its endpoint is there. */
static void send_regions(struct peer *p)
{
	struct fab_blob parameters, inbox = { 0 };
	struct msg_regions m = { .parameters = { 0 } };
	int rc;

	if (p->state != PEER_OPENING || !p->has_regions || !p->ep || p->closing)
		return;
	rc = p->fabric->ops->export_region(p->ep, p->fabric->parameters, &parameters);
	if (rc) {
		peer_refuse(p, "the parameters cannot be exported: %s", strerror(-rc));
		return;
	}
	if (!p->in_place && open_inbox(p, &inbox))
		return;
	m.in_place = p->in_place;
	m.parameters = (struct wire_blob){ .data = parameters.data, .bytes = parameters.bytes };
	m.inbox = (struct wire_blob){ .data = inbox.data, .bytes = inbox.bytes };
	p->state = PEER_EXCHANGE;
	peer_send(p, WIRE_REGIONS, &m);
}

static int map_gradients(struct peer *p)
{
	const struct fab_ops *f = p->fabric->ops;
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
	const struct msg_attached m = { .in_place = p->in_place };
	int rc = 0;

	if (p->state != PEER_EXCHANGE || p->closing)
		return;
	if (p->in_place)
		rc = map_gradients(p);
	if (rc == -EAGAIN)
		return;
	if (rc) {
		peer_refuse(p, "its gradients cannot be mapped: %s", strerror(-rc));
		return;
	}
	p->state = PEER_ATTACHED;
	log_info(&s->log, "%s is attached by %s: gradients are %s", conn_peer_text(p->conn), p->provider,
		 m.in_place ? "read in place" : "pushed into its inbox");
	peer_send(p, WIRE_ATTACHED, &m);
}

static int on_regions(struct peer *p, const struct msg_regions *m)
{
	bool in_place = m->in_place != 0;

	if (p->state != PEER_OPENING || p->has_regions || !p->fabric)
		return peer_refuse(p, "REGIONS out of turn");
	if (in_place && !p->fabric->ops->maps)
		return peer_refuse(p, "it wants gradients read in place over %s", p->provider);
	if (m->gradients.bytes > FAB_BLOB_MAX || (m->gradients.bytes > 0) != in_place)
		return peer_refuse(p, "REGIONS with %u bytes of gradient descriptor where gradients are %s",
				   m->gradients.bytes, in_place ? "read in place" : "pushed");
	if (m->gradients.bytes)
		memcpy(p->gradients_blob.data, m->gradients.data, m->gradients.bytes);
	p->gradients_blob.bytes = m->gradients.bytes;
	p->in_place = in_place;
	p->has_regions = true;
	send_regions(p);
	try_attach(p);
	return 0;
}

static int on_attached(struct peer *p, const struct msg_attached *m)
{
	if (p->state < PEER_EXCHANGE)
		return peer_refuse(p, "ATTACHED out of turn");
	if ((m->in_place != 0) != p->in_place)
		return peer_refuse(p, "it changed its mind: gradients %s", m->in_place ? "read in place" : "pushed");
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
	case WIRE_FABRIC_WANT:
		return on_want(p, &m->fabric_want);
	case WIRE_SIGNAL:
		return on_signal(p, &m->signal);
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
	const struct fab_ops *f = p->fabric ? p->fabric->ops : NULL;

	assert(p->state == PEER_GONE && !p->conn);
	assert(f || (!p->gradients && !p->ep && !p->inbox));
	if (p->n_offers)
		return;
	if (p->gradients)
		f->remote_close(p->gradients);
	if (p->ep)
		f->disconnect(p->ep);
	if (p->inbox)
		f->region_close(p->inbox);
	free(p->slices_seen);
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

static struct peer *peer_of(struct shard *s, uint64_t serial)
{
	uint32_t slot = (uint32_t)(serial & ((1u << SLOT_BITS) - 1));

	return slot < s->n_slots && s->peer[slot] && s->peer[slot]->serial == serial ? s->peer[slot] : NULL;
}

/* Its endpoint is no more: while it tries providers, the next may do; later it is the end of it. */
static void on_down(struct peer *p, const struct fab_event *ev)
{
	if (!p->conn || p->closing || p->ep != ev->ep)
		return;
	log_info(&p->shard->log, "%s: its fabric connection by %s is lost: %s", conn_peer_text(p->conn), p->provider,
		 strerror(-ev->status));
	if (p->state == PEER_OPENING && !p->has_regions)
		leave_fabric(p);
	else
		peer_close(p, "its fabric connection is lost");
}

static void on_event(struct fabric *f, const struct fab_event *ev)
{
	struct peer *p = peer_of(f->shard, ev->user);

	/* Of a peer that is gone, or that tries another provider by now: its endpoint went with it. */
	if (!p || p->fabric != f) {
		if (ev->type == FAB_EV_ACCEPTED)
			f->ops->disconnect(ev->ep);
		return;
	}
	switch (ev->type) {
	case FAB_EV_ACCEPTED:
		if (p->state != PEER_OPENING || p->ep || p->closing) {
			f->ops->disconnect(ev->ep);
			return;
		}
		p->ep = ev->ep;
		send_regions(p);
		try_attach(p);
		break;
	case FAB_EV_NOTICE:
		if (p->state == PEER_ATTACHED)
			inbox_notice(p, ev->imm);
		break;
	case FAB_EV_SIGNAL:
		carry_signal(p, ev->blob);
		break;
	case FAB_EV_DOWN:
		on_down(p, ev);
		break;
	case FAB_EV_CONNECTED:
	case FAB_EV_READ:
	case FAB_EV_WRITE:
		assert(!"a shard service connects to nobody and posts nothing");
		break;
	}
}

static void poll_one(struct fabric *f)
{
	struct fab_event ev[EVENTS_AT_ONCE];
	uint32_t n;

	while ((n = f->ops->poll(f->fab, ev, EVENTS_AT_ONCE)) > 0)
		for (uint32_t i = 0; i < n; i++)
			on_event(f, &ev[i]);
}

static bool arm_all(struct shard *s)
{
	bool armed = true;

	for (uint32_t i = 0; i < s->n_fabrics; i++)
		armed &= s->fabric[i].ops->arm(s->fabric[i].fab);
	return armed;
}

void publish_poll(struct shard *s)
{
	do {
		for (uint32_t i = 0; i < s->n_fabrics; i++)
			poll_one(&s->fabric[i]);
		for (uint32_t i = 0; i < s->n_slots; i++)
			if (s->peer[i])
				try_attach(s->peer[i]);
	} while (!arm_all(s));
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
	fabrics_close(s);
}
