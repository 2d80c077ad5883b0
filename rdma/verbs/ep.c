/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An endpoint, from address to end.
 *
 * It is connected when all its rails are up, or some are and VB_SETTLE_NS is
 * over; from then on rails may break and come back without its user hearing of
 * it. When none has been up for down_ns (for the first time: VB_CONNECT_NS), or
 * the peer says that it has no such endpoint, or we asked for what we have no
 * right to, it is given up: rails are stopped, operations complete with the
 * status, FAB_EV_DOWN follows. What the accepting user never heard of is freed
 * without a word but in the log.
 *
 * Nothing frees an endpoint while events are handled, only vb_disconnect and,
 * for those that nobody knows, the end of fab_poll.
 */
#include "rdma/verbs/verbs.h"

#include <errno.h>
#include <stdlib.h>

#define VB_CONNECT_NS (10 * VB_S)

/* ----------------------------------------------------------------- addresses */

int vb_address(struct fab *f, uint64_t user, struct fab_blob *out)
{
	struct vb_given one = { .user = user };
	struct vb_address a = { .magic = VB_MAGIC,
				.protocol = VB_PROTOCOL,
				.cm_port = f->cm_port,
				.job = f->job,
				.member = f->member,
				.n_ports = (uint8_t)f->n_ports,
				.qps = (uint8_t)f->o.queue_pairs };
	int ret = vb_random(one.secret, sizeof(one.secret));

	if (ret)
		return ret;
	if (f->given_n == VB_ADDRESSES) {
		log_warn(f->log, "verbs: %u addresses were given out and not used: the oldest is void", f->given_n);
		memmove(f->given, f->given + 1, --f->given_n * sizeof(*f->given));
	}
	f->given[f->given_n++] = one;
	memcpy(a.secret, one.secret, sizeof(a.secret));
	for (uint32_t i = 0; i < f->n_ports; i++)
		a.port[i] = f->port[i].desc;
	out->bytes = sizeof(a);
	memcpy(out->data, &a, sizeof(a));
	return 0;
}

/* A secret is good once: finding it removes it. */
static int given_use(struct fab *f, const uint8_t secret[VB_SECRET_BYTES], uint64_t *user)
{
	for (uint32_t i = 0; i < f->given_n; i++) {
		if (memcmp(f->given[i].secret, secret, VB_SECRET_BYTES))
			continue;
		*user = f->given[i].user;
		f->given_n--;
		memmove(&f->given[i], &f->given[i + 1], (f->given_n - i) * sizeof(*f->given));
		return 0;
	}
	return -EACCES;
}

/* ---------------------------------------------------------------------- making */

static struct fab_ep *ep_new(struct fab *f, bool active)
{
	struct fab_ep *ep = calloc(1, sizeof(*ep));

	if (!ep)
		return NULL;
	ep->fab = f;
	ep->active = active;
	ep->born_ns = ep->broken_ns = clock_now_ns();
	TAILQ_INIT(&ep->free);
	TAILQ_INIT(&ep->todo);
	TAILQ_INIT(&ep->done);
	for (uint32_t i = 0; i < VB_OPS; i++)
		TAILQ_INSERT_TAIL(&ep->free, &ep->op[i], link);
	for (uint32_t i = 0; i < VB_PORTS_MAX; i++) {
		ep->rail[i].ep = ep;
		ep->rail[i].index = (uint8_t)i;
	}
	TAILQ_INSERT_TAIL(&f->eps, ep, link);
	return ep;
}

int vb_ep_accept(struct fab *f, const struct vb_hello *h, struct fab_ep **out)
{
	uint64_t user = 0;
	struct fab_ep *ep;
	int ret = given_use(f, h->secret, &user);

	if (ret)
		return ret;
	ep = ep_new(f, false);
	if (!ep)
		return -ENOMEM;
	ep->user = user;
	ep->nonce = h->nonce;
	ep->peer = h->member;
	ep->n_rails = h->n_rails;
	ep->qps = h->qps;
	memcpy(ep->secret, h->secret, sizeof(ep->secret));
	/* A rail has a port from the start, so that it can be named. */
	for (uint32_t i = 0; i < ep->n_rails; i++)
		ep->rail[i].port = &f->port[i % f->n_ports];
	vb_timer(f, 20 * VB_MS);
	*out = ep;
	return 0;
}

/* Ports are paired by place; those of different networks cannot be. */
static int rails_plan(struct fab_ep *ep, const struct vb_address *a)
{
	struct fab *f = ep->fab;
	uint32_t n = f->n_ports > a->n_ports ? f->n_ports : a->n_ports;

	for (uint32_t i = 0; i < n; i++) {
		struct vb_rail *r = &ep->rail[ep->n_rails];

		r->port = &f->port[i % f->n_ports];
		r->remote_port = (uint8_t)(i % a->n_ports);
		r->remote = a->port[r->remote_port];
		ep->n_rails += r->port->desc.link == r->remote.link;
	}
	return ep->n_rails ? 0 : -ENETUNREACH;
}

static bool address_good(const struct vb_address *a)
{
	return a->magic == VB_MAGIC && a->protocol == VB_PROTOCOL && a->n_ports > 0 && a->n_ports <= VB_PORTS_MAX &&
	       a->qps > 0 && a->qps <= VB_QPS_MAX;
}

int vb_connect(struct fab *f, const struct fab_blob *address, uint64_t user, struct fab_ep **out)
{
	struct vb_address a;
	struct fab_ep *ep;
	int ret;

	if (address->bytes != sizeof(a))
		return -EINVAL;
	memcpy(&a, address->data, sizeof(a));
	if (!address_good(&a) || a.job != f->job)
		return -EINVAL;
	ep = ep_new(f, true);
	if (!ep)
		return -ENOMEM;
	ep->known = true;
	ep->user = user;
	ep->peer = a.member;
	ep->cm_port = a.cm_port;
	ep->qps = a.qps < f->o.queue_pairs ? a.qps : (uint8_t)f->o.queue_pairs;
	memcpy(ep->secret, a.secret, sizeof(ep->secret));
	ret = vb_random(&ep->nonce, sizeof(ep->nonce));
	if (!ret)
		ret = rails_plan(ep, &a);
	if (ret) {
		vb_ep_free(ep);
		return ret;
	}
	for (uint32_t i = 0; i < ep->n_rails; i++)
		vb_rail_start(&ep->rail[i]);
	*out = ep;
	return 0;
}

int vb_ep_pd(struct fab_ep *ep, const struct vb_dev *d, struct ibv_pd **out)
{
	struct ibv_pd **pd = &ep->pd[d - ep->fab->dev];

	errno = 0;
	if (!*pd)
		*pd = ibv_alloc_pd(d->context);
	if (!*pd)
		return errno ? -errno : -ENOMEM;
	*out = *pd;
	return 0;
}

void vb_describe(const struct fab_ep *ep, char *out, size_t bytes)
{
	const struct vb_rail *r = &ep->rail[0];
	uint32_t up = 0;

	for (uint32_t i = 0; i < ep->n_rails; i++) {
		if (ep->rail[i].state != VB_UP)
			continue;
		if (up++ == 0)
			r = &ep->rail[i];
	}
	if (up == 0)
		snprintf(out, bytes, "%s, not connected now", r->port->name);
	else
		snprintf(out, bytes, "%s %s, GID %u, MTU %u, %u+%u queue pairs, by %s, %u of %u rails", r->port->name,
			 r->port->desc.link != IBV_LINK_LAYER_ETHERNET ? "InfiniBand"
			 : r->port->roce2                              ? "RoCE v2"
								       : "RoCE v1",
			 r->port->gid_index, vb_mtu_bytes(r->mtu), ep->qps, ep->qps, r->by_cm ? "cm" : "control", up,
			 ep->n_rails);
}

/* ---------------------------------------------------------------------- ending */

void vb_ep_down(struct fab_ep *ep, int status, const char *why)
{
	if (ep->state >= VB_EP_DOWN)
		return;
	vb_count(&ep->fab->counters.errors, status != -ECONNRESET);
	log_write(ep->fab->log, status == -ECONNRESET ? LOG_INFO : LOG_WARN, LOG_WHERE,
		  "verbs: the connection with member %u is given up: %s: %s", ep->peer, why, strerror(-status));
	/* First, so that nothing is begun anew in between. */
	ep->state = VB_EP_DOWN;
	ep->status = status;
	for (uint32_t i = 0; i < ep->n_rails; i++)
		vb_rail_stop(&ep->rail[i]);
	vb_ops_fail(ep, status);
}

static void signals_drop(struct fab *f, const struct fab_ep *ep)
{
	struct vb_signal *s, *next;

	for (s = TAILQ_FIRST(&f->signals); s; s = next) {
		next = TAILQ_NEXT(s, link);
		if (s->ep != ep)
			continue;
		TAILQ_REMOVE(&f->signals, s, link);
		f->n_signals--;
		free(s);
	}
}

static void done_drop(struct fab_ep *ep)
{
	struct vb_op *o;

	TAILQ_FOREACH(o, &ep->done, link)
	{
		o->op.remote->ops--;
		o->op.local->ops--;
	}
}

void vb_ep_free(struct fab_ep *ep)
{
	struct fab *f = ep->fab;
	struct fab_remote *remote;

	ep->state = VB_EP_ENDED;
	for (uint32_t i = 0; i < ep->n_rails; i++)
		vb_rail_stop(&ep->rail[i]);
	vb_ops_fail(ep, -ECANCELED);
	done_drop(ep);
	vb_inboxes_revoke(ep);
	for (uint32_t i = 0; i < VB_PORTS_MAX; i++)
		if (ep->pd[i])
			ibv_dealloc_pd(ep->pd[i]);
	TAILQ_FOREACH(remote, &f->remotes, link)
	if (remote->ep == ep)
		remote->ep = NULL;
	signals_drop(f, ep);
	TAILQ_REMOVE(&f->eps, ep, link);
	free(ep);
}

void vb_disconnect(struct fab_ep *ep)
{
	vb_ep_free(ep);
}

/* ------------------------------------------------------------------------ time */

static void settle(struct fab_ep *ep, uint32_t up, uint64_t now)
{
	if (ep->state != VB_EP_CONNECTING || up == 0 || (up < ep->n_rails && now - ep->born_ns < VB_SETTLE_NS))
		return;
	ep->state = VB_EP_UP;
	ep->known = true;
	ep->announced = true;
}

static uint32_t rails_up(const struct fab_ep *ep)
{
	uint32_t up = 0;

	for (uint32_t i = 0; i < ep->n_rails; i++)
		up += ep->rail[i].state == VB_UP;
	return up;
}

void vb_ep_rails_changed(struct fab_ep *ep)
{
	uint64_t now = clock_now_ns();
	uint32_t up = rails_up(ep);

	if (up > 0)
		ep->broken_ns = 0;
	else if (!ep->broken_ns)
		ep->broken_ns = now;
	settle(ep, up, now);
}

void vb_ep_tick(struct fab_ep *ep, uint64_t now)
{
	uint64_t patience = ep->fab->o.down_ns;

	for (uint32_t i = 0; i < ep->n_rails && ep->state < VB_EP_DOWN; i++)
		vb_rail_tick(&ep->rail[i], now);
	if (ep->state >= VB_EP_DOWN)
		return;
	settle(ep, rails_up(ep), now);
	if (ep->state == VB_EP_CONNECTING && patience > VB_CONNECT_NS)
		patience = VB_CONNECT_NS;
	if (ep->broken_ns && now > ep->broken_ns && now - ep->broken_ns > patience)
		vb_ep_down(ep, ep->status ? ep->status : -ETIMEDOUT, "it cannot be rebuilt");
}

/* ---------------------------------------------------------------------- events */

bool vb_ep_has_events(const struct fab_ep *ep)
{
	return ep->announced || !TAILQ_EMPTY(&ep->done) || ep->state == VB_EP_DOWN ||
	       (ep->known && ep->notice_head != ep->notice_tail);
}

static void emit(struct vb_sink *s, struct fab_event ev)
{
	s->out[s->n++] = ev;
}

static void emit_done(struct fab_ep *ep, struct vb_sink *s)
{
	struct vb_op *o;

	while (s->n < s->max && (o = TAILQ_FIRST(&ep->done))) {
		TAILQ_REMOVE(&ep->done, o, link);
		o->op.remote->ops--;
		o->op.local->ops--;
		emit(s, (struct fab_event){ .type = o->write ? FAB_EV_WRITE : FAB_EV_READ,
					    .status = o->status,
					    .ep = ep,
					    .user = o->op.user,
					    .imm = o->op.imm });
		TAILQ_INSERT_TAIL(&ep->free, o, link);
	}
}

/* Its receive goes back to the NIC, if that generation still stands. */
static void notice_give_back(struct fab_ep *ep, const struct vb_notice *n)
{
	struct vb_rail *r = &ep->rail[n->rail];
	struct vb_qp *q;

	if (r->generation != n->generation || (r->state != VB_UP && r->state != VB_ACCEPTED))
		return;
	q = &r->qp[n->qp];
	if (++q->owed < VB_CHAIN / 2)
		return;
	if (vb_qp_receive(q, q->owed))
		vb_rail_break(r, -EIO, "a receive cannot be posted");
	else
		q->owed = 0;
}

static void emit_notices(struct fab_ep *ep, struct vb_sink *s)
{
	while (s->n < s->max && ep->notice_head != ep->notice_tail) {
		struct vb_notice n = ep->notice[ep->notice_head++ % VB_NOTICES];

		vb_count(&ep->fab->counters.notices, 1);
		emit(s, (struct fab_event){ .type = FAB_EV_NOTICE, .ep = ep, .user = ep->user, .imm = n.imm });
		notice_give_back(ep, &n);
	}
}

void vb_ep_emit(struct fab_ep *ep, struct vb_sink *s)
{
	if (ep->announced && s->n < s->max) {
		ep->announced = false;
		emit(s, (struct fab_event){
				.type = ep->active ? FAB_EV_CONNECTED : FAB_EV_ACCEPTED, .ep = ep, .user = ep->user });
	}
	if (!ep->known)
		return;
	emit_done(ep, s);
	emit_notices(ep, s);
	if (ep->state != VB_EP_DOWN || s->n == s->max)
		return;
	ep->state = VB_EP_ENDED;
	emit(s, (struct fab_event){ .type = FAB_EV_DOWN, .status = ep->status, .ep = ep, .user = ep->user });
}
