/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A rail: a port of ours, a port of the peer, and the queue pairs between them.
 *
 *  connecting side:  IDLE --start--> OFFERED (control)  --ACCEPT-----------> UP
 *                     ^   \--------> RESOLVING (cm)     --CONNECT_RESPONSE-> UP
 *  accepting side:   IDLE --offer, request--> ACCEPTED --READY, ESTABLISHED> UP
 *                     ^                                                      |
 *                     '--- drained, destroyed --- DRAINING <--- break -------'
 *
 * The connecting side alone starts; every start is a new generation with new
 * queue pairs, and whatever is said of an older one is ignored. The first retry
 * comes at once, since most breaks are over when they are noticed, the next ones
 * after 1/8, 1/4, 1/2, 1 s. The accepting side that breaks first says so
 * (BROKEN), and makes way for a newer generation whatever it has, since an offer
 * means that the other side has given the old one up.
 *
 * Operations that were on their way go back to the endpoint when the queue
 * pairs are drained, not before: until then the NIC may still write into their
 * destinations. The port is looked at again before every start: its GID may have
 * moved.
 */
#include "rdma/verbs/verbs.h"

#include <errno.h>

static void enter(struct vb_rail *r, enum vb_rail_state state)
{
	r->state = state;
	r->since_ns = clock_now_ns();
	/* What is under way is looked at often. */
	if (state != VB_UP)
		vb_timer(r->ep->fab, 5 * VB_MS);
}

static void retry_later(struct vb_rail *r)
{
	uint64_t wait = VB_RETRY_FIRST_NS;

	if (r->attempts > 0)
		wait = VB_RETRY_NS << (r->attempts > VB_RETRY_DOUBLINGS ? VB_RETRY_DOUBLINGS : r->attempts - 1);
	r->attempts++;
	r->retry_ns = clock_now_ns() + wait;
}

/* Nothing is left of the generation; the connecting side tries again. */
static void rest(struct vb_rail *r)
{
	vb_rail_unbuild(r);
	enter(r, VB_IDLE);
	if (r->ep->active)
		retry_later(r);
	vb_ep_rails_changed(r->ep);
}

/* The smaller of both ports', and of what the operator says. */
static enum ibv_mtu path_mtu(const struct vb_rail *r)
{
	enum ibv_mtu mtu = r->port->attr.active_mtu;
	uint32_t most = r->ep->fab->o.mtu;

	if (r->remote.mtu && r->remote.mtu < mtu)
		mtu = r->remote.mtu;
	while (most && mtu > IBV_MTU_256 && vb_mtu_bytes(mtu) > most)
		mtu--;
	return mtu;
}

static bool wants_cm(const struct vb_rail *r)
{
	const struct fab *f = r->ep->fab;

	if (f->o.connect == FAB_CONNECT_CONTROL || !f->cm)
		return false;
	if (f->o.connect == FAB_CONNECT_CM)
		return true;
	/* What broke is rebuilt over the control connection, which does not depend on the port that broke. */
	return !r->no_cm && !r->was_up && r->ep->cm_port && r->port->desc.has_ip && r->remote.has_ip;
}

void vb_rail_start(struct vb_rail *r)
{
	int ret = vb_port_refresh(r->ep->fab, r->port);

	assert(r->ep->active && r->state == VB_IDLE);
	r->generation++;
	r->by_cm = wants_cm(r);
	r->mtu = path_mtu(r);
	if (!ret)
		ret = vb_rail_build(r);
	if (ret) {
		rest(r);
		return;
	}
	if (r->by_cm) {
		enter(r, VB_RESOLVING);
		ret = vb_cm_dial(r);
		if (ret)
			vb_rail_break(r, ret, "connection manager");
	} else {
		enter(r, VB_OFFERED);
		vb_say(r, VB_OFFER);
	}
}

void vb_rail_up(struct vb_rail *r)
{
	struct fab *f = r->ep->fab;

	enter(r, VB_UP);
	r->looked_ns = r->since_ns;
	vb_count(&f->counters.connects, !r->was_up);
	vb_count(&f->counters.rebuilds, r->was_up);
	log_info(f->log, "verbs: %s to member %u is %s: %s, GID %u, MTU %u, %u+%u queue pairs, by %s", r->port->name,
		 r->ep->peer, r->was_up ? "up again" : "up",
		 r->port->desc.link != IBV_LINK_LAYER_ETHERNET ? "InfiniBand" : "RoCE", r->port->gid_index,
		 vb_mtu_bytes(r->mtu), r->ep->qps, r->ep->qps, r->by_cm ? "cm" : "control");
	r->was_up = true;
	vb_rail_heat(r);
	vb_ep_rails_changed(r->ep);
}

/*
 * A queue pair of ours that only serves goes to error without a word on some
 * devices, when the peer has tried what it may not.
 */
static bool in_error(const struct vb_rail *r)
{
	struct ibv_qp_init_attr init;
	struct ibv_qp_attr a = { 0 };

	for (uint32_t i = 0; i < r->n_qps; i++) {
		if (r->qp[i].tail != r->qp[i].head || ibv_query_qp(r->qp[i].qp, &a, IBV_QP_STATE, &init))
			continue;
		if (a.qp_state == IBV_QPS_ERR || a.qp_state == IBV_QPS_SQE)
			return true;
	}
	return false;
}

static void count_refused(const struct vb_rail *r)
{
	vb_count(&r->ep->fab->counters.refused, 1);
	log_warn(r->ep->fab->log, "verbs: member %u tried what it has no right to", r->ep->peer);
}

/* Before queue pairs that serve are taken down: who tries something and then goes is not forgotten. */
static void last_look(const struct vb_rail *r)
{
	if (!r->ep->active && r->state == VB_UP && in_error(r))
		count_refused(r);
}

void vb_rail_break(struct vb_rail *r, int status, const char *why)
{
	struct fab *f = r->ep->fab;

	if (r->state == VB_IDLE || r->state == VB_DRAINING)
		return;
	if (status != -EACCES)
		last_look(r);
	/* A peer that goes is nothing unusual; whoever posted something hears of it. */
	vb_count(&f->counters.errors, status != -ECONNRESET);
	log_write(f->log, status == -ECONNRESET ? LOG_INFO : LOG_WARN, LOG_WHERE,
		  "verbs: %s to member %u is broken: %s: %s", r->port->name, r->ep->peer, why, strerror(-status));
	if (r->state == VB_UP && clock_now_ns() - r->since_ns > VB_STEADY_NS)
		r->attempts = 0;
	/* Automatic means that what does not work is not insisted on. */
	if (r->state == VB_RESOLVING && f->o.connect == FAB_CONNECT_AUTO && !r->no_cm) {
		r->no_cm = true;
		log_warn(f->log, "verbs: %s to member %u: by the control connection from now on", r->port->name,
			 r->ep->peer);
	}
	r->ep->status = status;
	vb_rail_to_error(r);
	enter(r, VB_DRAINING);
	if (!r->ep->active)
		vb_say(r, VB_BROKEN);
	vb_ep_rails_changed(r->ep);
}

void vb_rail_refuse(struct vb_rail *r, const char *why)
{
	if (r->state != VB_UP && r->state != VB_ACCEPTED)
		return;
	count_refused(r);
	vb_rail_break(r, -EACCES, why);
}

void vb_rail_stop(struct vb_rail *r)
{
	last_look(r);
	if (r->state != VB_IDLE && r->state != VB_DRAINING)
		vb_rail_to_error(r);
	r->state = VB_DRAINING;
	/* What has completed counts as completed. */
	while (r->cq && vb_rail_poll(r) > 0)
		;
	vb_rail_unbuild(r);
	r->state = VB_IDLE;
	r->since_ns = clock_now_ns();
}

int vb_rail_take(struct vb_rail *r, const struct vb_hello *h)
{
	struct fab *f = r->ep->fab;
	int ret;

	assert(!r->ep->active);
	/* The old one goes without a word: the other side has given it up. */
	if (r->state == VB_UP)
		log_info(f->log, "verbs: %s to member %u: the other side begins anew", r->port->name, r->ep->peer);
	vb_rail_stop(r);
	r->generation = h->generation;
	vb_ep_rails_changed(r->ep);
	ret = vb_port_refresh(f, r->port);
	r->mtu = path_mtu(r);
	if (!ret)
		ret = vb_rail_build(r);
	if (!ret)
		enter(r, VB_ACCEPTED);
	return ret;
}

/* ---------------------------------------------------------------------- time */

/* The oldest slice with the NIC. */
static bool overdue(const struct vb_rail *r, uint64_t now)
{
	uint64_t deadline = r->ep->fab->o.deadline_ns;

	for (uint32_t i = 0; i < r->n_qps; i++) {
		const struct vb_qp *q = &r->qp[i];

		if (q->tail != q->posted && now - q->slice[q->tail % VB_SQ_DEPTH].posted_ns > deadline)
			return true;
	}
	return false;
}

static void look(struct vb_rail *r, uint64_t now)
{
	r->looked_ns = now;
	if (in_error(r))
		vb_rail_refuse(r, "queue pair in error");
}

static void tick_up(struct vb_rail *r, uint64_t now)
{
	if (overdue(r, now))
		vb_rail_break(r, -ETIMEDOUT, "the deadline of an operation is over");
	else if (!r->ep->active && now - r->looked_ns > VB_LOOK_NS)
		look(r, now);
}

void vb_rail_tick(struct vb_rail *r, uint64_t now)
{
	switch (r->state) {
	case VB_IDLE:
		if (r->ep->active && now >= r->retry_ns)
			vb_rail_start(r);
		break;
	case VB_RESOLVING:
	case VB_OFFERED:
	case VB_ACCEPTED:
		if (now - r->since_ns > VB_STEP_NS)
			vb_rail_break(r, -ETIMEDOUT, "no answer");
		break;
	case VB_UP:
		tick_up(r, now);
		break;
	case VB_DRAINING:
		if (vb_rail_drained(r, now))
			rest(r);
		break;
	}
}

/* Is the port still reached where it was? */
static int port_moved(struct fab *f, struct vb_port *p)
{
	const struct vb_port was = *p;
	int ret = vb_port_refresh(f, p);

	if (ret)
		return ret;
	/* The same GID at another index is another to the device. */
	if (was.gid_index != p->gid_index || memcmp(was.desc.gid, p->desc.gid, sizeof(was.desc.gid)))
		return -EADDRNOTAVAIL;
	return was.desc.lid != p->desc.lid ? -EADDRNOTAVAIL : 0;
}

void vb_port_changed(struct fab *f, struct vb_port *p, bool up, const char *why)
{
	struct fab_ep *ep;
	int gone = -ENETDOWN;

	log_write(f->log, up ? LOG_INFO : LOG_WARN, LOG_WHERE, "verbs: %s: %s", p->name, why);
	if (up)
		gone = port_moved(f, p);
	else
		p->up = false;
	TAILQ_FOREACH(ep, &f->eps, link)
	for (uint32_t i = 0; i < ep->n_rails; i++) {
		struct vb_rail *r = &ep->rail[i];

		if (r->port != p)
			continue;
		if (gone)
			vb_rail_break(r, gone, why);
		/* What waits for the port need not wait for its turn. */
		if (up && r->state == VB_IDLE && ep->active)
			r->retry_ns = 0;
	}
}
