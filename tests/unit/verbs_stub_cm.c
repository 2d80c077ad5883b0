/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The stub's librdmacm: identifiers that resolve, connect and tell each other
 * by events, but make no queue pair; the provider makes its own and asks here
 * only for the attributes of each transition.
 */
#include "verbs_stub_parts.h"

#include <arpa/inet.h>
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <rdma/rdma_cma.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/queue.h>
#include <unistd.h>

struct sid {
	struct rdma_cm_id id;
	struct sid *peer;
	bool listens, connected;
	uint16_t port;
	uint32_t qpn, peer_qpn;
	uint8_t sgid[16], dgid[16];
	uint8_t reads_in, reads_out;
	uint32_t unacked;
	TAILQ_ENTRY(sid) link;
};

struct sevent {
	struct rdma_cm_event ev;
	uint8_t data[256];
	struct sid *owner; /* whose channel, and who may not be destroyed before it is acknowledged */
	bool taken;
	TAILQ_ENTRY(sevent) link;
};

static TAILQ_HEAD(, sid) ids = TAILQ_HEAD_INITIALIZER(ids);
static TAILQ_HEAD(, sevent) events = TAILQ_HEAD_INITIALIZER(events);
static uint16_t next_port = 5000;
static struct ibv_context cm_context[4];

struct rdma_event_channel *rdma_create_event_channel(void)
{
	struct rdma_event_channel *c;

	if (FAILS(ENODEV))
		return NULL;
	if (stub.no_cm) {
		errno = ENODEV;
		return NULL;
	}
	c = stub_made(sizeof(*c));
	c->fd = eventfd(0, EFD_CLOEXEC | EFD_SEMAPHORE);
	return c;
}

void rdma_destroy_event_channel(struct rdma_event_channel *c)
{
	struct sid *i;

	TAILQ_FOREACH(i, &ids, link)
	assert(i->id.channel != c);
	close(c->fd);
	stub_unmade(c);
}

static struct sid *id_new(struct rdma_event_channel *channel, void *context)
{
	struct sid *i = stub_made(sizeof(*i));

	i->id.channel = channel;
	i->id.context = context;
	TAILQ_INSERT_TAIL(&ids, i, link);
	return i;
}

int rdma_create_id(struct rdma_event_channel *channel, struct rdma_cm_id **id, void *context, enum rdma_port_space ps)
{
	assert(ps == RDMA_PS_TCP);
	if (FAILS(ENOMEM))
		return -1;
	*id = &id_new(channel, context)->id;
	return 0;
}

static void event_free(struct sevent *e)
{
	TAILQ_REMOVE(&events, e, link);
	stub_unmade(e);
}

int rdma_destroy_id(struct rdma_cm_id *id)
{
	struct sid *i = (struct sid *)id;
	struct sevent *e, *next;

	/* It would wait for ever. */
	assert(i->unacked == 0);
	for (e = TAILQ_FIRST(&events); e; e = next) {
		next = TAILQ_NEXT(e, link);
		if (e->owner != i || e->taken)
			continue;
		stub_fd_say(id->channel->fd, false);
		/* A request that nobody took goes with the listener. */
		if (e->ev.id != id)
			rdma_destroy_id(e->ev.id);
		event_free(e);
	}
	if (i->peer)
		i->peer->peer = NULL;
	TAILQ_REMOVE(&ids, i, link);
	stub_unmade(i);
	return 0;
}

static void tell(struct sid *owner, struct sid *about, enum rdma_cm_event_type type, int status, const void *data,
		 uint8_t bytes)
{
	struct sevent *e = stub_made(sizeof(*e));

	e->owner = owner;
	e->ev.id = &about->id;
	e->ev.event = type;
	e->ev.status = status;
	if (bytes)
		memcpy(e->data, data, bytes);
	e->ev.param.conn.private_data = e->data;
	e->ev.param.conn.private_data_len = bytes;
	if (about->peer) {
		e->ev.param.conn.responder_resources = about->peer->reads_out;
		e->ev.param.conn.initiator_depth = about->peer->reads_in;
	}
	TAILQ_INSERT_TAIL(&events, e, link);
	stub_fd_say(owner->id.channel->fd, true);
}

int rdma_get_cm_event(struct rdma_event_channel *channel, struct rdma_cm_event **ev)
{
	struct sevent *e;

	assert(fcntl(channel->fd, F_GETFL) & O_NONBLOCK);
	TAILQ_FOREACH(e, &events, link)
	if (e->owner->id.channel == channel && !e->taken) {
		e->taken = true;
		e->owner->unacked++;
		stub_fd_say(channel->fd, false);
		*ev = &e->ev;
		return 0;
	}
	errno = EAGAIN;
	return -1;
}

int rdma_ack_cm_event(struct rdma_cm_event *ev)
{
	struct sevent *e = (struct sevent *)ev;

	assert(e->taken && e->owner->unacked > 0);
	e->owner->unacked--;
	event_free(e);
	return 0;
}

int rdma_bind_addr(struct rdma_cm_id *id, struct sockaddr *addr)
{
	(void)addr;
	if (FAILS(EADDRNOTAVAIL))
		return -1;
	((struct sid *)id)->port = next_port++;
	return 0;
}

int rdma_listen(struct rdma_cm_id *id, int backlog)
{
	assert(backlog > 0);
	if (FAILS(EADDRINUSE))
		return -1;
	((struct sid *)id)->listens = true;
	return 0;
}

__be16 rdma_get_src_port(struct rdma_cm_id *id)
{
	return htons(((struct sid *)id)->port);
}

int rdma_set_option(struct rdma_cm_id *id, int level, int optname, void *optval, size_t optlen)
{
	(void)id;
	assert(level == RDMA_OPTION_ID && optname == RDMA_OPTION_ID_TOS && optval && optlen == 1);
	return FAILS(EINVAL) ? -1 : 0;
}

static void v4_gid(const struct sockaddr *a, uint8_t out[16])
{
	assert(a->sa_family == AF_INET);
	memset(out, 0, 16);
	out[10] = out[11] = 0xff;
	memcpy(out + 12, &((const struct sockaddr_in *)a)->sin_addr, 4);
}

int rdma_resolve_addr(struct rdma_cm_id *id, struct sockaddr *src, struct sockaddr *dst, int timeout_ms)
{
	struct sid *i = (struct sid *)id;
	uint32_t d;
	uint8_t port;

	assert(timeout_ms > 0);
	if (FAILS(EINVAL))
		return -1;
	v4_gid(src, i->sgid);
	v4_gid(dst, i->dgid);
	i->port = ntohs(((struct sockaddr_in *)dst)->sin_port);
	/* An event that fails instead of the call. */
	if (FAILS(0) || !stub_device_of_gid(i->sgid, &d, &port) || stub.port_down[d][port]) {
		tell(i, i, RDMA_CM_EVENT_ADDR_ERROR, -ENODEV, NULL, 0);
		return 0;
	}
	cm_context[d].device = stub_device(d);
	id->verbs = &cm_context[d];
	id->port_num = port;
	tell(i, i, RDMA_CM_EVENT_ADDR_RESOLVED, 0, NULL, 0);
	return 0;
}

int rdma_resolve_route(struct rdma_cm_id *id, int timeout_ms)
{
	struct sid *i = (struct sid *)id;

	assert(timeout_ms > 0);
	if (FAILS(EINVAL))
		return -1;
	tell(i, i, FAILS(0) ? RDMA_CM_EVENT_ROUTE_ERROR : RDMA_CM_EVENT_ROUTE_RESOLVED, 0, NULL, 0);
	return 0;
}

int rdma_connect(struct rdma_cm_id *id, struct rdma_conn_param *p)
{
	struct sid *i = (struct sid *)id, *l, *server;

	assert(p->private_data_len <= 56);
	if (FAILS(EINVAL))
		return -1;
	i->qpn = p->qp_num;
	i->reads_in = p->responder_resources;
	i->reads_out = p->initiator_depth;
	TAILQ_FOREACH(l, &ids, link)
	if (l->listens && l->port == i->port)
		break;
	if (FAILS(0) || !l) {
		tell(i, i, RDMA_CM_EVENT_UNREACHABLE, -ETIMEDOUT, NULL, 0);
		return 0;
	}
	server = id_new(l->id.channel, l->id.context);
	memcpy(server->sgid, i->dgid, 16);
	memcpy(server->dgid, i->sgid, 16);
	server->peer = i;
	server->peer_qpn = i->qpn;
	i->peer = server;
	tell(l, server, RDMA_CM_EVENT_CONNECT_REQUEST, 0, p->private_data, p->private_data_len);
	return 0;
}

int rdma_accept(struct rdma_cm_id *id, struct rdma_conn_param *p)
{
	struct sid *i = (struct sid *)id;

	if (FAILS(EINVAL) || !i->peer) {
		errno = EINVAL;
		return -1;
	}
	i->qpn = p->qp_num;
	i->reads_in = p->responder_resources;
	i->reads_out = p->initiator_depth;
	i->peer->peer_qpn = i->qpn;
	tell(i->peer, i->peer, RDMA_CM_EVENT_CONNECT_RESPONSE, 0, NULL, 0);
	return 0;
}

int rdma_reject(struct rdma_cm_id *id, const void *data, uint8_t bytes)
{
	struct sid *i = (struct sid *)id;

	if (i->peer)
		tell(i->peer, i->peer, RDMA_CM_EVENT_REJECTED, 28, data, bytes);
	return 0;
}

int rdma_establish(struct rdma_cm_id *id)
{
	struct sid *i = (struct sid *)id;

	if (FAILS(EINVAL) || !i->peer) {
		errno = EINVAL;
		return -1;
	}
	i->connected = i->peer->connected = true;
	tell(i->peer, i->peer, RDMA_CM_EVENT_ESTABLISHED, 0, NULL, 0);
	return 0;
}

int rdma_disconnect(struct rdma_cm_id *id)
{
	struct sid *i = (struct sid *)id;

	if (!i->connected) {
		errno = EINVAL;
		return -1;
	}
	i->connected = false;
	if (i->peer && i->peer->connected) {
		i->peer->connected = false;
		tell(i->peer, i->peer, RDMA_CM_EVENT_DISCONNECTED, 0, NULL, 0);
	}
	return 0;
}

int rdma_init_qp_attr(struct rdma_cm_id *id, struct ibv_qp_attr *a, int *mask)
{
	struct sid *i = (struct sid *)id;

	if (FAILS(EINVAL))
		return -1;
	*mask = IBV_QP_STATE;
	switch (a->qp_state) {
	case IBV_QPS_INIT:
		*mask |= stub_needed(IBV_QPS_RESET, IBV_QPS_INIT);
		break;
	case IBV_QPS_RTR:
		*mask |= stub_needed(IBV_QPS_INIT, IBV_QPS_RTR);
		a->dest_qp_num = i->peer_qpn;
		a->path_mtu = IBV_MTU_1024;
		a->ah_attr.is_global = 1;
		memcpy(a->ah_attr.grh.dgid.raw, i->dgid, 16);
		break;
	case IBV_QPS_RTS:
		*mask |= stub_needed(IBV_QPS_RTR, IBV_QPS_RTS);
		break;
	default:
		abort();
	}
	return 0;
}
