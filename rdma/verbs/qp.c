/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Queue pairs of a rail, from nothing to able to send, to error, to nothing.
 *
 * A rail has one completion queue, large enough for everything that its queue
 * pairs can have out, so that it cannot overrun; and n queue pairs for reads,
 * then n for pushes. On the accepting side those for pushes live in a protection
 * domain of that peer's own (region.c says why), and what a queue pair lets the
 * peer do is what it is for and nothing else.
 *
 * The end is always the same: to error, wait until what was posted has come
 * back (drained), destroy. A destroyed queue pair moves nothing any more, so
 * destroying is also what ends a drain that takes too long.
 */
#include "rdma/verbs/verbs.h"

#include <errno.h>
#include <stdlib.h>

#define RNR_TIMER 12 /* 0.64 ms */
#define HOPS 64

/* ------------------------------------------------------------------- making */

static unsigned rights(const struct vb_qp *q)
{
	if (!q->push)
		return IBV_ACCESS_REMOTE_READ;
	return q->rail->ep->active ? 0 : IBV_ACCESS_REMOTE_WRITE;
}

static int qp_create(struct vb_qp *q)
{
	struct vb_rail *r = q->rail;
	struct vb_dev *d = r->port->dev;
	struct ibv_qp_init_attr init = {
		.qp_context = q,
		.send_cq = r->cq,
		.recv_cq = r->cq,
		.qp_type = IBV_QPT_RC,
		.cap = { .max_send_wr = VB_SQ_DEPTH,
			 .max_recv_wr = VB_RQ_DEPTH,
			 .max_send_sge = 1,
			 .max_recv_sge = 1,
			 .max_inline_data = VB_INLINE },
	};
	struct ibv_pd *pd = d->pd;
	uint32_t psn;
	int ret = q->push && !r->ep->active ? vb_ep_pd(r->ep, d, &pd) : 0;

	if (!ret)
		ret = vb_random(&psn, sizeof(psn));
	if (ret)
		return ret;
	q->psn = psn & 0xffffff;
	errno = 0;
	q->qp = ibv_create_qp(pd, &init);
	return q->qp ? 0 : errno ? -errno : -ENOMEM;
}

/* ibv_modify_qp gives a positive errno, some providers -1. */
static int modify(struct vb_qp *q, struct ibv_qp_attr *a, int mask)
{
	int ret = ibv_modify_qp(q->qp, a, mask);

	if (ret == 0)
		return 0;
	return ret > 0 ? -ret : -errno;
}

static int to_init(struct vb_qp *q)
{
	struct ibv_qp_attr a = {
		.qp_state = IBV_QPS_INIT,
		.pkey_index = (uint16_t)q->rail->ep->fab->o.pkey_index,
		.port_num = q->rail->port->num,
		.qp_access_flags = rights(q),
	};

	return modify(q, &a, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
}

int vb_rail_build(struct vb_rail *r)
{
	struct vb_dev *d = r->port->dev;
	int ret = 0;

	assert(!r->cq && !r->qp);
	r->n_qps = 2u * r->ep->qps;
	r->qp = calloc(r->n_qps, sizeof(*r->qp));
	if (!r->qp)
		return -ENOMEM;
	errno = 0;
	r->cq = ibv_create_cq(d->context, (int)(r->n_qps * (VB_SQ_DEPTH + VB_RQ_DEPTH)), r, d->channel, 0);
	if (!r->cq) {
		ret = errno ? -errno : -ENOMEM;
		goto failed;
	}
	for (uint32_t i = 0; i < r->n_qps && !ret; i++) {
		r->qp[i].rail = r;
		r->qp[i].index = (uint8_t)i;
		r->qp[i].push = i >= r->ep->qps;
		ret = qp_create(&r->qp[i]);
		if (!ret && !r->by_cm)
			ret = to_init(&r->qp[i]);
	}
	if (!ret)
		return 0;
failed:
	log_warn(r->ep->fab->log, "verbs: %s: no queue pairs: %s", r->port->name, strerror(-ret));
	vb_rail_unbuild(r);
	return ret;
}

/* What is still in the ring had no completion: it is done again. */
static void return_slices(struct vb_qp *q)
{
	while (q->tail != q->head)
		vb_slice_return(q, &q->slice[q->tail++ % VB_SQ_DEPTH], false);
	q->chain_n = 0;
	assert(q->in_flight == 0);
}

void vb_rail_unbuild(struct vb_rail *r)
{
	struct vb_rails *hot = &r->ep->fab->hot;

	for (uint32_t i = 0; r->qp && i < r->n_qps; i++) {
		struct vb_qp *q = &r->qp[i];

		if (q->id)
			vb_cm_hang_up(q);
		if (q->qp)
			ibv_destroy_qp(q->qp);
		q->qp = NULL;
	}
	/* Only now can nothing move any more. */
	for (uint32_t i = 0; r->qp && i < r->n_qps; i++)
		return_slices(&r->qp[i]);
	if (r->cq)
		ibv_destroy_cq(r->cq);
	if (r->hot)
		TAILQ_REMOVE(hot, r, hot_link);
	r->hot = false;
	r->cq = NULL;
	free(r->qp);
	r->qp = NULL;
	r->n_qps = 0;
}

/* --------------------------------------------------------------- connecting */

int vb_reads(uint8_t ours, uint8_t theirs, uint8_t *out)
{
	*out = ours < theirs ? ours : theirs;
	return *out ? 0 : -ENOTSUP;
}

static void path_set(const struct vb_qp *q, const struct vb_port_desc *remote, struct ibv_ah_attr *ah)
{
	const struct vb_port *p = q->rail->port;
	const struct fab_options *o = &q->rail->ep->fab->o;

	ah->port_num = p->num;
	ah->dlid = remote->lid;
	ah->sl = (uint8_t)o->service_level;
	/* Within one InfiniBand subnet a LID is enough. */
	ah->is_global = p->desc.link == IBV_LINK_LAYER_ETHERNET || memcmp(p->desc.gid, remote->gid, 8) != 0;
	if (!ah->is_global)
		return;
	memcpy(ah->grh.dgid.raw, remote->gid, sizeof(remote->gid));
	ah->grh.sgid_index = (uint8_t)p->gid_index;
	ah->grh.hop_limit = HOPS;
	ah->grh.traffic_class = (uint8_t)o->traffic_class;
}

static int to_rtr(struct vb_qp *q, const struct vb_port_desc *remote, uint8_t reads_in)
{
	struct ibv_qp_attr a = {
		.qp_state = IBV_QPS_RTR,
		.path_mtu = q->rail->mtu,
		.dest_qp_num = q->peer.qpn,
		.rq_psn = q->peer.psn,
		.max_dest_rd_atomic = reads_in,
		.min_rnr_timer = RNR_TIMER,
	};

	path_set(q, remote, &a.ah_attr);
	return modify(q, &a,
		      IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
			      IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
}

static int to_rts(struct vb_qp *q, uint8_t reads_out)
{
	struct ibv_qp_attr a = {
		.qp_state = IBV_QPS_RTS,
		.sq_psn = q->psn,
		.timeout = (uint8_t)q->rail->ep->fab->o.timeout,
		.retry_cnt = 7,
		.rnr_retry = 7, /* for ever: the deadline is ours */
		.max_rd_atomic = reads_out,
	};

	return modify(q, &a,
		      IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
			      IBV_QP_MAX_QP_RD_ATOMIC);
}

int vb_qp_receive(struct vb_qp *q, uint32_t n)
{
	struct ibv_recv_wr wr[VB_CHAIN], *bad;

	while (n > 0) {
		uint32_t k = n < VB_CHAIN ? n : VB_CHAIN;
		int ret;

		for (uint32_t i = 0; i < k; i++)
			wr[i] = (struct ibv_recv_wr){ .wr_id = q->index, .next = i + 1 < k ? &wr[i + 1] : NULL };
		ret = ibv_post_recv(q->qp, wr, &bad);
		if (ret)
			return ret > 0 ? -ret : -errno;
		q->receives += k;
		n -= k;
	}
	return 0;
}

static int receives_open(struct vb_qp *q)
{
	return q->push && !q->rail->ep->active ? vb_qp_receive(q, VB_RQ_DEPTH) : 0;
}

int vb_qp_connect(struct vb_qp *q, const struct vb_port_desc *remote)
{
	const struct vb_port_desc *ours = &q->rail->port->desc;
	uint8_t reads_in, reads_out;
	int ret = vb_reads(ours->reads_in, remote->reads_out, &reads_in);

	if (!ret)
		ret = vb_reads(ours->reads_out, remote->reads_in, &reads_out);
	if (!ret)
		ret = receives_open(q);
	if (!ret)
		ret = to_rtr(q, remote, reads_in);
	return ret ? ret : to_rts(q, reads_out);
}

/* What cm says of a state's attributes, and what we say. */
static int cm_modify(struct vb_qp *q, enum ibv_qp_state state, uint8_t reads_in, uint8_t reads_out)
{
	const struct fab_options *o = &q->rail->ep->fab->o;
	struct ibv_qp_attr a = { .qp_state = state };
	int mask = 0;

	if (rdma_init_qp_attr(q->id, &a, &mask))
		return -errno;
	if (mask & IBV_QP_ACCESS_FLAGS)
		a.qp_access_flags = rights(q);
	if (mask & IBV_QP_MAX_DEST_RD_ATOMIC)
		a.max_dest_rd_atomic = reads_in;
	if (mask & IBV_QP_MAX_QP_RD_ATOMIC)
		a.max_rd_atomic = reads_out;
	if (mask & IBV_QP_TIMEOUT)
		a.timeout = (uint8_t)o->timeout;
	if (mask & IBV_QP_MIN_RNR_TIMER)
		a.min_rnr_timer = RNR_TIMER;
	if (mask & IBV_QP_PATH_MTU && o->mtu && vb_mtu_bytes(a.path_mtu) > o->mtu)
		a.path_mtu = q->rail->mtu;
	else if (mask & IBV_QP_PATH_MTU)
		q->rail->mtu = a.path_mtu;
	return modify(q, &a, mask);
}

int vb_qp_connect_cm(struct vb_qp *q, uint8_t reads_in, uint8_t reads_out)
{
	int ret = cm_modify(q, IBV_QPS_INIT, 0, 0);

	if (!ret)
		ret = receives_open(q);
	if (!ret)
		ret = cm_modify(q, IBV_QPS_RTR, reads_in, reads_out);
	return ret ? ret : cm_modify(q, IBV_QPS_RTS, reads_in, reads_out);
}

/* --------------------------------------------------------------------- ending */

void vb_rail_to_error(struct vb_rail *r)
{
	struct ibv_qp_attr a = { .qp_state = IBV_QPS_ERR };

	/* Of a dead device there is nothing to be asked any more; destroying ends it. */
	for (uint32_t i = 0; i < r->n_qps; i++)
		(void)ibv_modify_qp(r->qp[i].qp, &a, IBV_QP_STATE);
	vb_rail_heat(r);
}

bool vb_rail_drained(const struct vb_rail *r, uint64_t now)
{
	bool sent = true, received = true;

	if (now - r->since_ns > VB_DRAIN_NS)
		return true;
	for (uint32_t i = 0; i < r->n_qps; i++) {
		sent &= r->qp[i].tail == r->qp[i].posted;
		received &= r->qp[i].receives == 0;
	}
	return sent && (received || now - r->since_ns > VB_RECEIVES_NS);
}
