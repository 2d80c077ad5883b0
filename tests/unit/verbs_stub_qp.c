/* SPDX-License-Identifier: Apache-2.0 */
/* The stub's queue pairs, and the transport that carries their work requests from one to the other. */
#include "verbs_stub_parts.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

struct swr {
	struct ibv_send_wr wr;
	struct ibv_sge sge;
	uint8_t inlined[64];
};

struct sqp {
	struct ibv_qp qp;
	struct ibv_qp_init_attr init;
	struct ibv_qp_attr a;
	struct swr sq[RING];
	uint64_t rq[RING];
	uint32_t sq_head, sq_tail, rq_head, rq_tail;
	bool lost;
	TAILQ_ENTRY(sqp) link;
};

static TAILQ_HEAD(, sqp) qps = TAILQ_HEAD_INITIALIZER(qps);

struct ibv_qp *ibv_create_qp(struct ibv_pd *pd, struct ibv_qp_init_attr *init)
{
	struct sqp *q;

	if (FAILS(ENOMEM))
		return NULL;
	assert(init->qp_type == IBV_QPT_RC && init->cap.max_send_wr <= RING && init->cap.max_recv_wr <= RING);
	q = stub_made(sizeof(*q));
	q->init = *init;
	q->qp = (struct ibv_qp){ .context = pd->context,
				 .qp_context = init->qp_context,
				 .pd = pd,
				 .send_cq = init->send_cq,
				 .recv_cq = init->recv_cq,
				 .qp_num = stub_number() };
	((struct scq *)init->send_cq)->qps++;
	((struct spd *)pd)->users++;
	TAILQ_INSERT_TAIL(&qps, q, link);
	return &q->qp;
}

/* Events of it that nobody took go with it. */
static void events_drop(struct scontext *c, const struct ibv_qp *qp)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < c->n_events; i++) {
		if (c->events[i].event_type == IBV_EVENT_QP_ACCESS_ERR && c->events[i].element.qp == qp)
			stub_fd_say(c->c.async_fd, false);
		else
			c->events[n++] = c->events[i];
	}
	c->n_events = n;
}

int ibv_destroy_qp(struct ibv_qp *qp)
{
	struct sqp *q = (struct sqp *)qp;

	events_drop((struct scontext *)qp->context, qp);
	((struct scq *)qp->send_cq)->qps--;
	((struct spd *)qp->pd)->users--;
	TAILQ_REMOVE(&qps, q, link);
	stub_unmade(q);
	return 0;
}

static void flush(struct sqp *q)
{
	struct scq *cq = (struct scq *)q->qp.send_cq;

	for (; q->sq_head != q->sq_tail; q->sq_head++)
		stub_push_wc(
			cq,
			(struct ibv_wc){ .wr_id = q->sq[q->sq_head % RING].wr.wr_id, .status = IBV_WC_WR_FLUSH_ERR },
			false);
	for (; q->rq_head != q->rq_tail && !stub.no_flush_receives; q->rq_head++)
		stub_push_wc(cq, (struct ibv_wc){ .wr_id = q->rq[q->rq_head % RING], .status = IBV_WC_WR_FLUSH_ERR },
			     false);
}

static void to_error(struct sqp *q)
{
	q->qp.state = q->a.qp_state = IBV_QPS_ERR;
	q->lost = false;
	flush(q);
}

int stub_needed(enum ibv_qp_state from, enum ibv_qp_state to)
{
	if (from == IBV_QPS_RESET && to == IBV_QPS_INIT)
		return IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS;
	if (from == IBV_QPS_INIT && to == IBV_QPS_RTR)
		return IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC |
		       IBV_QP_MIN_RNR_TIMER;
	if (from == IBV_QPS_RTR && to == IBV_QPS_RTS)
		return IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC;
	return -1;
}

int ibv_modify_qp(struct ibv_qp *qp, struct ibv_qp_attr *a, int mask)
{
	struct sqp *q = (struct sqp *)qp;

	assert(mask & IBV_QP_STATE);
	if (a->qp_state == IBV_QPS_ERR) {
		if (qp->state == IBV_QPS_RESET)
			return EINVAL;
		to_error(q);
		return 0;
	}
	if (FAILS(EINVAL))
		return EINVAL;
	assert((mask & ~IBV_QP_STATE) == stub_needed(qp->state, a->qp_state));
	if (mask & IBV_QP_ACCESS_FLAGS)
		q->a.qp_access_flags = a->qp_access_flags;
	if (mask & IBV_QP_DEST_QPN)
		q->a.dest_qp_num = a->dest_qp_num;
	if (mask & IBV_QP_RQ_PSN)
		q->a.rq_psn = a->rq_psn;
	if (mask & IBV_QP_SQ_PSN)
		q->a.sq_psn = a->sq_psn;
	if (mask & IBV_QP_PATH_MTU)
		q->a.path_mtu = a->path_mtu;
	if (mask & IBV_QP_MAX_DEST_RD_ATOMIC)
		q->a.max_dest_rd_atomic = a->max_dest_rd_atomic;
	if (mask & IBV_QP_MAX_QP_RD_ATOMIC)
		stub.rd_atomic = q->a.max_rd_atomic = a->max_rd_atomic;
	if (mask & IBV_QP_AV)
		q->a.ah_attr = a->ah_attr;
	q->qp.state = q->a.qp_state = a->qp_state;
	return 0;
}

int ibv_query_qp(struct ibv_qp *qp, struct ibv_qp_attr *a, int mask, struct ibv_qp_init_attr *init)
{
	(void)mask;
	if (FAILS(EIO))
		return EIO;
	*a = ((struct sqp *)qp)->a;
	*init = ((struct sqp *)qp)->init;
	return 0;
}

static bool take_wr(struct sqp *q, const struct ibv_send_wr *wr)
{
	struct swr *s = &q->sq[q->sq_tail % RING];

	if (q->sq_tail - q->sq_head == q->init.cap.max_send_wr)
		return false;
	assert(wr->num_sge == 1);
	s->wr = *wr;
	s->sge = wr->sg_list[0];
	if (wr->send_flags & IBV_SEND_INLINE) {
		assert(s->sge.length <= q->init.cap.max_inline_data && s->sge.length <= sizeof(s->inlined));
		memcpy(s->inlined, (const void *)(uintptr_t)s->sge.addr, s->sge.length);
		stub.inline_n++;
	}
	q->sq_tail++;
	return true;
}

int stub_post_send(struct ibv_qp *qp, struct ibv_send_wr *wr, struct ibv_send_wr **bad)
{
	struct sqp *q = (struct sqp *)qp;
	uint32_t n = 0;

	stub.posts++;
	*bad = wr;
	if (FAILS(ENOMEM))
		return ENOMEM;
	assert(qp->state == IBV_QPS_RTS || qp->state == IBV_QPS_ERR);
	for (; wr; wr = wr->next, n++) {
		*bad = wr;
		assert(wr->next || wr->send_flags & IBV_SEND_SIGNALED);
		if (!wr->next && stub.posts == stub.fail_post)
			return ENOMEM;
		if (!take_wr(q, wr))
			return ENOMEM;
	}
	if (n > stub.chain_max)
		stub.chain_max = n;
	if (qp->state == IBV_QPS_ERR)
		flush(q);
	return 0;
}

int stub_post_recv(struct ibv_qp *qp, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad)
{
	struct sqp *q = (struct sqp *)qp;

	*bad = wr;
	if (FAILS(ENOMEM))
		return ENOMEM;
	assert(qp->state != IBV_QPS_RESET);
	for (; wr; wr = wr->next) {
		assert(q->rq_tail - q->rq_head < q->init.cap.max_recv_wr);
		q->rq[q->rq_tail++ % RING] = wr->wr_id;
	}
	if (qp->state == IBV_QPS_ERR)
		flush(q);
	return 0;
}

struct ibv_qp *stub_qp(uint32_t n)
{
	struct sqp *q;

	TAILQ_FOREACH(q, &qps, link)
	if (n-- == 0)
		return &q->qp;
	return NULL;
}

uint32_t stub_qps(void)
{
	struct sqp *q;
	uint32_t n = 0;

	TAILQ_FOREACH(q, &qps, link)
	n++;
	return n;
}

uint32_t stub_waiting(void)
{
	struct sqp *q;
	uint32_t n = 0;

	TAILQ_FOREACH(q, &qps, link)
	n += q->sq_tail - q->sq_head;
	return n;
}

/* -------------------------------------------------------------------- transport */

static struct sqp *peer_of(const struct sqp *q)
{
	struct sqp *p;
	uint32_t d;
	uint8_t port;

	if (q->a.ah_attr.is_global &&
	    (!stub_device_of_gid(q->a.ah_attr.grh.dgid.raw, &d, &port) || stub.port_down[d][port]))
		return NULL;
	TAILQ_FOREACH(p, &qps, link)
	if (p->qp.qp_num == q->a.dest_qp_num)
		return (p->qp.state == IBV_QPS_RTR || p->qp.state == IBV_QPS_RTS) && p->a.dest_qp_num == q->qp.qp_num &&
				       p->a.rq_psn == q->a.sq_psn
			       ? p
			       : NULL;
	return NULL;
}

/* The peer has tried what it may not. */
static enum ibv_wc_status violated(struct sqp *peer)
{
	to_error(peer);
	if (!stub.quiet_access)
		stub_async_push(
			(struct scontext *)(peer->qp.context),
			(struct ibv_async_event){ .event_type = IBV_EVENT_QP_ACCESS_ERR, .element.qp = &peer->qp });
	return IBV_WC_REM_ACCESS_ERR;
}

/* IBV_WC_RNR_RETRY_EXC_ERR: it has to wait. */
static enum ibv_wc_status execute(struct sqp *q, struct swr *s)
{
	bool read = s->wr.opcode == IBV_WR_RDMA_READ;
	bool imm = s->wr.opcode == IBV_WR_RDMA_WRITE_WITH_IMM;
	int near_right = read ? IBV_ACCESS_LOCAL_WRITE : 0;
	int far_right = read ? IBV_ACCESS_REMOTE_READ : IBV_ACCESS_REMOTE_WRITE;
	void *far = (void *)(uintptr_t)s->wr.wr.rdma.remote_addr, *near = (void *)(uintptr_t)s->sge.addr;
	struct sqp *peer = peer_of(q);

	if (!peer)
		return IBV_WC_RETRY_EXC_ERR;
	if (s->wr.send_flags & IBV_SEND_INLINE)
		near = s->inlined;
	else if (!stub_allows(q->qp.pd, s->sge.lkey, s->sge.addr, s->sge.length, near_right))
		return IBV_WC_LOC_PROT_ERR;
	if (read && (q->a.max_rd_atomic == 0 || peer->a.max_dest_rd_atomic < q->a.max_rd_atomic))
		return IBV_WC_REM_INV_REQ_ERR;
	if (!(peer->a.qp_access_flags & (unsigned)far_right) ||
	    !stub_allows(peer->qp.pd, s->wr.wr.rdma.rkey, s->wr.wr.rdma.remote_addr, s->sge.length, far_right))
		return violated(peer);
	if (imm && peer->rq_head == peer->rq_tail)
		return IBV_WC_RNR_RETRY_EXC_ERR;
	memcpy(read ? near : far, read ? far : near, s->sge.length);
	if (imm)
		stub_push_wc((struct scq *)peer->qp.recv_cq,
			     (struct ibv_wc){ .wr_id = peer->rq[peer->rq_head++ % RING],
					      .status = IBV_WC_SUCCESS,
					      .opcode = IBV_WC_RECV_RDMA_WITH_IMM,
					      .wc_flags = IBV_WC_WITH_IMM,
					      .imm_data = s->wr.imm_data },
			     s->wr.send_flags & IBV_SEND_SOLICITED);
	return IBV_WC_SUCCESS;
}

/* False: nothing to do, or it has to wait. */
static bool step_one(struct sqp *q)
{
	struct swr *s = &q->sq[q->sq_head % RING];
	enum ibv_wc_status status;

	if (q->qp.state != IBV_QPS_RTS || q->sq_head == q->sq_tail || q->lost)
		return false;
	if (stub.stop_wr && stub.wr_done + 1 >= stub.stop_wr)
		return false;
	if (stub.wr_done + 1 == stub.lose_wr) {
		stub.wr_done++;
		q->lost = true;
		return false;
	}
	status = stub.wr_done + 1 == stub.fail_wr ? stub.fail_status : execute(q, s);
	if (status == IBV_WC_RNR_RETRY_EXC_ERR && stub.wr_done + 1 != stub.fail_wr)
		return false;
	stub.wr_done++;
	q->sq_head++;
	if (status != IBV_WC_SUCCESS || s->wr.send_flags & IBV_SEND_SIGNALED)
		stub_push_wc((struct scq *)q->qp.send_cq, (struct ibv_wc){ .wr_id = s->wr.wr_id, .status = status },
			     false);
	if (status != IBV_WC_SUCCESS)
		to_error(q);
	return true;
}

void stub_step(void)
{
	struct sqp *q;

	if (stub.hold)
		return;
	TAILQ_FOREACH(q, &qps, link)
	while (step_one(q))
		;
}
