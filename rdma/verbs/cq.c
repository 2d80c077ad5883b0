/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Completions and events on their way in.
 *
 * A rail is hot, polled by every fab_poll, or armed, when its completion channel
 * says that it has something. It becomes hot when something is posted on it or
 * an event comes, and is armed by fab_arm, when the user is about to sleep: ask
 * for an event first, then look once more, so that nothing falls in between. So
 * while work is in flight and the user polls, no system call is made.
 *
 * A rail that only serves is armed for solicited completions alone: the peer
 * says which of its notices are worth waking up for, and each of the others has
 * such a one behind it (post.c). Failures wake in either case. What we sent
 * ourselves is never solicited, so a rail with anything of ours on its way is
 * armed for all; posting makes it hot, so it cannot be left armed for less.
 *
 * What goes wrong has one name in the log, the first: everything after it on the
 * same rail is flushed and says nothing new. Some statuses mean that we asked
 * for what we have no right to: asking again would not help, so the endpoint is
 * given up instead of rebuilt.
 */
#include "rdma/verbs/verbs.h"

#include <assert.h>
#include <errno.h>

#define AT_ONCE 64
#define WR_SEND (1u << 16)

void vb_rail_heat(struct vb_rail *r)
{
	if (r->hot || !r->cq)
		return;
	r->hot = true;
	TAILQ_INSERT_TAIL(&r->ep->fab->hot, r, hot_link);
}

static void rail_cool(struct vb_rail *r)
{
	TAILQ_REMOVE(&r->ep->fab->hot, r, hot_link);
	r->hot = false;
}

/* Asking for it was wrong, and will be. (Not so IBV_WC_LOC_QP_OP_ERR: soft-RoCE says so when a link is down.) */
static bool is_final(enum ibv_wc_status s)
{
	return s == IBV_WC_REM_ACCESS_ERR || s == IBV_WC_REM_INV_REQ_ERR || s == IBV_WC_LOC_PROT_ERR ||
	       s == IBV_WC_LOC_LEN_ERR;
}

static void on_failure(struct vb_qp *q, const struct ibv_wc *wc)
{
	struct vb_rail *r = q->rail;
	bool send = wc->wr_id & WR_SEND;

	if (r->state == VB_DRAINING)
		return;
	/* A receive has no doing of ours: the peer did what it has no right to, and the event for it may come later. */
	if (!send) {
		vb_rail_refuse(r, ibv_wc_status_str(wc->status));
		return;
	}
	if (wc->status == IBV_WC_WR_FLUSH_ERR) {
		vb_rail_break(r, -EIO, "the queue pair went to error");
		return;
	}
	if (is_final(wc->status))
		vb_ep_down(r->ep, -EACCES, ibv_wc_status_str(wc->status));
	else
		vb_rail_break(r, wc->status == IBV_WC_RETRY_EXC_ERR ? -ETIMEDOUT : -EIO, ibv_wc_status_str(wc->status));
}

/* Success speaks for all before it; an error for none, since what it cut short is not known. */
static void on_sent(struct vb_qp *q, const struct ibv_wc *wc)
{
	uint32_t end = (uint32_t)(wc->wr_id >> 32);
	bool done = wc->status == IBV_WC_SUCCESS;

	assert(end - q->tail <= q->head - q->tail);
	while (q->tail != end)
		vb_slice_return(q, &q->slice[q->tail++ % VB_SQ_DEPTH], done);
}

static void on_received(struct vb_qp *q, const struct ibv_wc *wc)
{
	struct fab_ep *ep = q->rail->ep;

	assert(q->receives > 0);
	q->receives--;
	if (wc->status != IBV_WC_SUCCESS)
		return;
	if (wc->opcode != IBV_WC_RECV_RDMA_WITH_IMM) {
		vb_count(&ep->fab->counters.refused, 1);
		vb_rail_break(q->rail, -EPROTO, "a message that is no notice");
		return;
	}
	ep->notice[ep->notice_tail++ % VB_NOTICES] = (struct vb_notice){
		.imm = ntohl(wc->imm_data),
		.rail = q->rail->index,
		.qp = q->index,
		.generation = q->rail->generation,
	};
}

static uint32_t room_for_notices(const struct fab_ep *ep)
{
	return VB_NOTICES - (ep->notice_tail - ep->notice_head);
}

uint32_t vb_rail_poll(struct vb_rail *r)
{
	struct ibv_wc wc[AT_ONCE];
	uint32_t room = room_for_notices(r->ep);
	int n = ibv_poll_cq(r->cq, room < AT_ONCE ? (int)room : AT_ONCE, wc);

	if (n < 0) {
		vb_rail_break(r, -EIO, "the completion queue cannot be polled");
		return 0;
	}
	for (int i = 0; i < n; i++) {
		struct vb_qp *q = &r->qp[wc[i].wr_id & 0xff];

		if (wc[i].wr_id & WR_SEND)
			on_sent(q, &wc[i]);
		else
			on_received(q, &wc[i]);
		if (wc[i].status != IBV_WC_SUCCESS)
			on_failure(q, &wc[i]);
		/* Given up, or made anew: what is left of this list is of nobody. */
		if (!r->cq)
			break;
	}
	return (uint32_t)n;
}

/* Nothing of ours is on its way. */
static bool only_serves(const struct vb_rail *r)
{
	for (uint32_t i = 0; i < r->n_qps; i++)
		if (r->qp[i].head != r->qp[i].tail)
			return false;
	return true;
}

bool vb_rails_arm(struct fab *f)
{
	struct vb_rail *r;

	while ((r = TAILQ_FIRST(&f->hot))) {
		if (ibv_req_notify_cq(r->cq, only_serves(r))) {
			vb_rail_break(r, -EIO, "the completion queue cannot be armed");
			return false;
		}
		if (vb_rail_poll(r) > 0)
			return false;
		rail_cool(r);
	}
	return true;
}

void vb_completion_events(struct vb_dev *d)
{
	struct ibv_cq *cq;
	void *context;

	while (!ibv_get_cq_event(d->channel, &cq, &context)) {
		ibv_ack_cq_events(cq, 1);
		vb_rail_heat(context);
	}
}

/* -------------------------------------------------------------- asynchronous */

static void on_qp_event(struct vb_qp *q, enum ibv_event_type type)
{
	struct vb_rail *r;

	assert(q);
	r = q->rail;
	if (type == IBV_EVENT_QP_ACCESS_ERR || type == IBV_EVENT_QP_REQ_ERR)
		vb_rail_refuse(r, ibv_event_type_str(type));
	else
		vb_rail_break(r, -EIO, ibv_event_type_str(type));
}

static void on_port_event(struct fab *f, const struct vb_dev *d, const struct ibv_async_event *ev)
{
	bool error = ev->event_type == IBV_EVENT_PORT_ERR;

	for (uint32_t i = 0; i < f->n_ports; i++)
		if (f->port[i].dev == d && f->port[i].num == ev->element.port_num)
			vb_port_changed(f, &f->port[i], !error, ibv_event_type_str(ev->event_type));
}

static void on_fatal(struct fab *f, struct vb_dev *d)
{
	log_error(f->log, "verbs: %s: %s", d->name, ibv_event_type_str(IBV_EVENT_DEVICE_FATAL));
	d->fatal = true;
	for (uint32_t i = 0; i < f->n_ports; i++)
		if (f->port[i].dev == d)
			vb_port_changed(f, &f->port[i], false, ibv_event_type_str(IBV_EVENT_DEVICE_FATAL));
}

static void on_async(struct fab *f, struct vb_dev *d, const struct ibv_async_event *ev, void *who)
{
	switch (ev->event_type) {
	case IBV_EVENT_QP_FATAL:
	case IBV_EVENT_QP_REQ_ERR:
	case IBV_EVENT_QP_ACCESS_ERR:
	case IBV_EVENT_PATH_MIG_ERR:
		on_qp_event(who, ev->event_type);
		break;
	case IBV_EVENT_CQ_ERR:
		assert(who);
		vb_rail_break(who, -EIO, ibv_event_type_str(ev->event_type));
		break;
	case IBV_EVENT_PORT_ERR:
	case IBV_EVENT_PORT_ACTIVE:
	case IBV_EVENT_LID_CHANGE:
	case IBV_EVENT_GID_CHANGE:
		on_port_event(f, d, ev);
		break;
	case IBV_EVENT_DEVICE_FATAL:
		on_fatal(f, d);
		break;
	default:
		log_debug(f->log, "verbs: %s: %s", d->name, ibv_event_type_str(ev->event_type));
		break;
	}
}

static bool is_qp_event(enum ibv_event_type t)
{
	return t == IBV_EVENT_QP_FATAL || t == IBV_EVENT_QP_REQ_ERR || t == IBV_EVENT_QP_ACCESS_ERR ||
	       t == IBV_EVENT_PATH_MIG_ERR;
}

void vb_async_events(struct fab *f, struct vb_dev *d)
{
	struct ibv_async_event ev;

	while (!ibv_get_async_event(d->context, &ev)) {
		void *who = NULL;

		/* Taken while it is ours: acknowledged is what a queue pair must be before it can be destroyed. */
		if (is_qp_event(ev.event_type))
			who = ev.element.qp->qp_context;
		else if (ev.event_type == IBV_EVENT_CQ_ERR)
			who = ev.element.cq->cq_context;
		ibv_ack_async_event(&ev);
		on_async(f, d, &ev, who);
	}
}
