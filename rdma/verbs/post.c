/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Operations on their way out.
 *
 *   posted by the user -> todo -> slices on queue pairs -> done -> given back
 *                          ^           |
 *                          '-- again --'  its rail broke before it was over
 *
 * A slice is at most VB_SLICE bytes and lies in one key of either side. Slices
 * go to the queue pair with the least in flight, of all rails that are up and of
 * ports whose budget has room, in chains whose last work request is signalled:
 * since a queue pair completes in order, it speaks for all before it. Within a
 * chain so is the one that ends each so many bytes: if all that is in flight came
 * back together, the NIC would have nothing to do until the next are posted. But
 * every answer costs a completion and brings a refill of its own, so there are
 * only so many that half of what the queue pair has stays with the NIC meanwhile,
 * within HEARD_LEAST and HEARD_MOST.
 * A write keeps to one queue pair, so that its last slice, which carries the
 * notice, is behind the others.
 *
 * The other side hears in the same measure: it sleeps until a notice is
 * solicited (cq.c), which the last notice before each signalled work request
 * is. So a chain wakes it once or, where it is long, in time to work on what
 * came first; and since the last work request is signalled and a queue pair
 * delivers in order, no notice stays without a solicited one behind it. What
 * breaks in between is done again, and the other side looks when it rebuilds.
 *
 * When posting a chain fails in the middle, what was posted has no signalled end
 * and would never be heard of: the queue pair is put in error, which gives
 * everything back.
 *
 * An operation of which one slice came back undone is done again as a whole once
 * the others are back too: reads change nothing over there, and of notices the
 * owner expects repeats.
 */
#include "rdma/verbs/verbs.h"
#include "rdma/providers.h"

#include <errno.h>

#define HEARD_LEAST (64u << 10) /* bytes of a chain between two that are signalled */
#define HEARD_MOST (256u << 10)

/* ------------------------------------------------------------------- posting */

static int check_op(const struct fab_ep *ep, const struct fab_op *op, enum fab_access needed)
{
	if (!op->remote || !op->local || op->remote->ep != ep || op->local->fab != ep->fab)
		return -EINVAL;
	if (op->local->access == FAB_REMOTE_WRITE)
		return -EINVAL;
	if (op->remote->desc.access != needed)
		return -EPERM;
	return fab_op_check(op, op->remote->desc.bytes, op->local->bytes);
}

static int post(struct fab_ep *ep, const struct fab_op *op, uint32_t n, bool write)
{
	struct vb_op *free_op = TAILQ_FIRST(&ep->free);
	int ret = 0;

	if (ep->state != VB_EP_UP)
		return -ENOTCONN;
	if (n > FAB_BATCH_MAX)
		return -EINVAL;
	for (uint32_t i = 0; i < n && !ret; i++)
		ret = check_op(ep, &op[i], write ? FAB_REMOTE_WRITE : FAB_REMOTE_READ);
	if (ret)
		return ret;
	for (uint32_t i = 0; i < n; i++, free_op = TAILQ_NEXT(free_op, link))
		if (!free_op)
			return -EAGAIN;
	for (uint32_t i = 0; i < n; i++) {
		struct vb_op *o = TAILQ_FIRST(&ep->free);

		TAILQ_REMOVE(&ep->free, o, link);
		*o = (struct vb_op){ .op = op[i], .write = write, .queued = true };
		o->op.remote->ops++;
		o->op.local->ops++;
		TAILQ_INSERT_TAIL(&ep->todo, o, link);
	}
	ep->n_todo += n;
	ep->fab->n_todo += n;
	vb_pump(ep->fab);
	return 0;
}

int vb_read(struct fab_ep *ep, const struct fab_op *op, uint32_t n)
{
	return post(ep, op, n, false);
}

int vb_write_notify(struct fab_ep *ep, const struct fab_op *op, uint32_t n)
{
	return post(ep, op, n, true);
}

/* -------------------------------------------------------------------- slices */

static uint64_t least(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

/* The next slice: within one key on either side. */
static uint32_t slice_bytes(const struct vb_op *o)
{
	const struct vb_region_desc *d = &o->op.remote->desc;
	const struct fab_region *r = o->op.local;
	uint64_t bytes = least(VB_SLICE, o->op.bytes - o->posted);

	bytes = least(bytes, d->piece_bytes - (o->op.remote_offset + o->posted) % d->piece_bytes);
	return (uint32_t)least(bytes, r->piece_bytes - (o->op.local_offset + o->posted) % r->piece_bytes);
}

static bool qp_has_room(const struct fab *f, const struct vb_qp *q, uint32_t bytes)
{
	uint64_t in_flight = q->rail->port->in_flight;

	if (q->rail->state != VB_UP || q->head - q->tail == VB_SQ_DEPTH)
		return false;
	return in_flight == 0 || in_flight + bytes <= f->o.inflight_bytes;
}

static struct vb_qp *pick(struct fab_ep *ep, const struct vb_op *o, uint32_t bytes)
{
	struct vb_qp *best = NULL;

	if (o->qp)
		return qp_has_room(ep->fab, o->qp, bytes) ? o->qp : NULL;
	for (uint32_t i = 0; i < ep->n_rails; i++) {
		struct vb_rail *r = &ep->rail[i];
		struct vb_qp *q;

		if (r->state != VB_UP)
			continue;
		q = r->qp + (o->write ? ep->qps : 0);
		for (uint32_t k = 0; k < ep->qps; k++)
			if (qp_has_room(ep->fab, &q[k], bytes) && (!best || q[k].in_flight < best->in_flight))
				best = &q[k];
	}
	return best;
}

static uint32_t remote_key(const struct vb_op *o, const struct vb_rail *r)
{
	const struct vb_region_desc *d = &o->op.remote->desc;

	return d->key[(o->op.remote_offset + o->posted) / d->piece_bytes * d->n_ports + r->remote_port];
}

static uint32_t local_key(const struct vb_op *o, const struct vb_rail *r)
{
	const struct fab_region *l = o->op.local;
	uint64_t dev = (uint64_t)(r->port->dev - l->fab->dev);

	return l->mr[dev * l->n_pieces + (o->op.local_offset + o->posted) / l->piece_bytes]->lkey;
}

static void fill_wr(struct vb_qp *q, const struct vb_op *o, uint32_t bytes)
{
	struct ibv_send_wr *wr = &q->wr[q->chain_n];
	struct ibv_sge *sge = &q->sge[q->chain_n];
	bool last = o->posted + bytes == o->op.bytes;

	*sge = (struct ibv_sge){ .addr = (uintptr_t)(o->op.local->base + o->op.local_offset + o->posted),
				 .length = bytes,
				 .lkey = local_key(o, q->rail) };
	*wr = (struct ibv_send_wr){
		.wr_id = (uint64_t)(q->head + 1) << 32 | 1u << 16 | q->index,
		.sg_list = sge,
		.num_sge = 1,
		.opcode = !o->write ? IBV_WR_RDMA_READ
			  : last    ? IBV_WR_RDMA_WRITE_WITH_IMM
				    : IBV_WR_RDMA_WRITE,
		.imm_data = htonl(o->op.imm),
		.send_flags = o->write && bytes <= VB_INLINE ? IBV_SEND_INLINE : 0,
		.wr.rdma = { .remote_addr = o->op.remote->desc.at + o->op.remote_offset + o->posted,
			     .rkey = remote_key(o, q->rail) },
	};
}

/* Links the work requests, and says which are heard of on either side. */
static void chain_close(struct vb_qp *q)
{
	uint64_t most = least(q->in_flight / 2, HEARD_MOST), unheard = 0;
	struct ibv_send_wr *notice = NULL;

	for (uint32_t i = 0; i < q->chain_n; i++) {
		struct ibv_send_wr *wr = &q->wr[i];
		bool last = i + 1 == q->chain_n;

		wr->next = last ? NULL : wr + 1;
		if (wr->opcode == IBV_WR_RDMA_WRITE_WITH_IMM)
			notice = wr;
		unheard += q->sge[i].length;
		if (!last && unheard < (most > HEARD_LEAST ? most : HEARD_LEAST))
			continue;
		wr->send_flags |= IBV_SEND_SIGNALED;
		if (notice)
			notice->send_flags |= IBV_SEND_SOLICITED;
		notice = NULL;
		unheard = 0;
	}
}

static void chain_post(struct vb_qp *q)
{
	struct ibv_send_wr *bad = NULL;
	uint32_t n = q->chain_n;
	int ret;

	chain_close(q);
	q->chain_n = 0;
	errno = 0;
	ret = ibv_post_send(q->qp, q->wr, &bad);
	vb_rail_heat(q->rail);
	if (ret == 0) {
		q->posted += n;
		return;
	}
	if (bad)
		q->posted += (uint32_t)(bad - q->wr);
	vb_rail_break(q->rail, ret > 0 ? -ret : -EIO, "posting failed");
}

static void slice_add(struct vb_qp *q, struct vb_op *o, uint32_t bytes, uint64_t now)
{
	fill_wr(q, o, bytes);
	q->slice[q->head++ % VB_SQ_DEPTH] = (struct vb_slice){ .op = o, .bytes = bytes, .posted_ns = now };
	q->in_flight += bytes;
	q->rail->port->in_flight += bytes;
	o->posted += bytes;
	o->out++;
	if (o->write)
		o->qp = q;
	if (++q->chain_n == VB_CHAIN)
		chain_post(q);
}

static void dequeue(struct fab_ep *ep, struct vb_op *o)
{
	assert(o->queued);
	TAILQ_REMOVE(&ep->todo, o, link);
	o->queued = false;
	ep->n_todo--;
	ep->fab->n_todo--;
}

static void enqueue(struct fab_ep *ep, struct vb_op *o)
{
	TAILQ_INSERT_TAIL(&ep->todo, o, link);
	o->queued = true;
	ep->n_todo++;
	ep->fab->n_todo++;
}

static void pump_ep(struct fab_ep *ep, uint64_t now)
{
	struct vb_op *o;

	while ((o = TAILQ_FIRST(&ep->todo))) {
		struct vb_qp *q;

		if (o->failed) {
			/* What is left of it is on its way back, and begins anew then. */
			dequeue(ep, o);
			continue;
		}
		q = pick(ep, o, slice_bytes(o));
		if (!q)
			break;
		slice_add(q, o, slice_bytes(o), now);
		if (o->posted == o->op.bytes && !o->failed)
			dequeue(ep, o);
	}
	for (uint32_t i = 0; i < ep->n_rails; i++)
		for (uint32_t k = 0; k < ep->rail[i].n_qps; k++)
			if (ep->rail[i].qp[k].chain_n && ep->rail[i].state == VB_UP)
				chain_post(&ep->rail[i].qp[k]);
}

void vb_pump(struct fab *f)
{
	struct fab_ep *ep;
	uint64_t now;

	if (f->n_todo == 0)
		return;
	now = clock_now_ns();
	vb_timer(f, 100 * VB_MS);
	TAILQ_FOREACH(ep, &f->eps, link)
	if (ep->n_todo > 0 && ep->state == VB_EP_UP)
		pump_ep(ep, now);
	/* Another is first next time, so that a budget that is short goes round. */
	ep = TAILQ_FIRST(&f->eps);
	TAILQ_REMOVE(&f->eps, ep, link);
	TAILQ_INSERT_TAIL(&f->eps, ep, link);
}

/* --------------------------------------------------------------------- coming */

static void finish(struct fab_ep *ep, struct vb_op *o, int status)
{
	struct fab_counters *c = &ep->fab->counters;

	if (!status) {
		vb_count(o->write ? &c->writes : &c->reads, 1);
		vb_count(o->write ? &c->write_bytes : &c->read_bytes, o->op.bytes);
	}
	o->status = status;
	TAILQ_INSERT_TAIL(&ep->done, o, link);
}

void vb_slice_return(struct vb_qp *q, struct vb_slice *s, bool done)
{
	struct fab_ep *ep = q->rail->ep;
	struct vb_op *o = s->op;

	assert(o->out > 0 && q->in_flight >= s->bytes && q->rail->port->in_flight >= s->bytes);
	q->in_flight -= s->bytes;
	q->rail->port->in_flight -= s->bytes;
	o->failed |= !done;
	if (--o->out > 0)
		return;
	if (o->failed) {
		vb_count(&ep->fab->counters.replays, 1);
		o->failed = false;
		o->posted = 0;
		o->qp = NULL;
		if (!o->queued)
			enqueue(ep, o);
	} else if (!o->queued) {
		finish(ep, o, 0);
	}
}

void vb_ops_fail(struct fab_ep *ep, int status)
{
	struct vb_op *o;

	while ((o = TAILQ_FIRST(&ep->todo))) {
		assert(o->out == 0);
		dequeue(ep, o);
		finish(ep, o, status);
	}
}
