/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Reads, writes and notices of the provider `ofi`.
 *
 *   post -> submitted -> queue -> slices with libfabric -> finished -> event
 *           (lock)       (engine's)                        (lock)
 *
 * An operation is cut into slices of OFI_SLICE_BYTES, of which several are
 * under way, of one connection and of all together no more bytes than the
 * budget. A write's last slice carries the notice and leaves when the others
 * have been delivered, since a provider may bring them in any order; most
 * writes are one slice. Over tcp writes do keep their order, and a large one
 * with a notice in it would be as dangerous as a read (ask.c): there the notice
 * is a small write of its own behind them.
 *
 * Writes are posted with FI_DELIVERY_COMPLETE: a completion means that the
 * bytes are in the peer's memory, so one that did not come may be done again
 * without asking. The notice is libfabric's remote completion data, which is
 * queued at the target when its bytes are there (fi_cq(3)). Where eight bytes
 * fit, the upper four are the target's tag, so that nobody else's write into
 * that endpoint passes for a notice.
 */
#include "rdma/ofi/ofi.h"
#include "rdma/providers.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

#define COMPLETIONS_AT_ONCE 32

_Static_assert(OFI_NOTICES_ENOUGH + COMPLETIONS_AT_ONCE <= OFI_NOTICES, "what is read finds room");

/* ------------------------------------------------------------- user's thread */

static int check_op(const struct fab_ep *ep, const struct fab_op *op, enum fab_access needed)
{
	if (!op->remote || !op->local || op->remote->ep != ep || op->local->fab != ep->fab)
		return -EINVAL;
	if (op->remote->access != needed)
		return -EPERM;
	return fab_op_check(op, op->remote->bytes, op->local->bytes);
}

static void take_idle(struct fab_ep *ep, const struct fab_op *op, bool write, struct ofi_ops *out)
{
	struct ofi_op *o = TAILQ_FIRST(&ep->idle);

	TAILQ_REMOVE(&ep->idle, o, link);
	*o = (struct ofi_op){ .remote = op->remote,
			      .local = op->local,
			      .remote_offset = op->remote_offset,
			      .local_offset = op->local_offset,
			      .bytes = op->bytes,
			      .user = op->user,
			      .imm = op->imm,
			      .write = write };
	op->remote->ops++;
	op->local->ops++;
	TAILQ_INSERT_TAIL(out, o, link);
}

static void give_idle(struct fab_ep *ep, struct ofi_op *o)
{
	assert(o->remote->ops > 0 && o->local->ops > 0);
	o->remote->ops--;
	o->local->ops--;
	TAILQ_INSERT_TAIL(&ep->idle, o, link);
}

static bool enough_idle(const struct fab_ep *ep, uint32_t n)
{
	const struct ofi_op *o = TAILQ_FIRST(&ep->idle);

	for (; n > 0 && o; n--)
		o = TAILQ_NEXT(o, link);
	return n == 0;
}

static int post(struct fab_ep *ep, const struct fab_op *op, uint32_t n, bool write)
{
	struct ofi_ops batch = TAILQ_HEAD_INITIALIZER(batch);
	bool down;

	pthread_mutex_lock(&ep->fab->lock);
	down = ep->down;
	pthread_mutex_unlock(&ep->fab->lock);
	if (down || !ep->told)
		return -ENOTCONN;
	if (n > FAB_BATCH_MAX)
		return -EINVAL;
	for (uint32_t i = 0; i < n; i++) {
		int ret = check_op(ep, &op[i], write ? FAB_REMOTE_WRITE : FAB_REMOTE_READ);

		if (ret)
			return ret;
	}
	if (!enough_idle(ep, n))
		return -EAGAIN;
	for (uint32_t i = 0; i < n; i++)
		take_idle(ep, &op[i], write, &batch);
	pthread_mutex_lock(&ep->fab->lock);
	TAILQ_CONCAT(&ep->submitted, &batch, link);
	ofi_engine_wake(ep->fab);
	pthread_mutex_unlock(&ep->fab->lock);
	return 0;
}

int ofi_read(struct fab_ep *ep, const struct fab_op *op, uint32_t n)
{
	return post(ep, op, n, false);
}

int ofi_write_notify(struct fab_ep *ep, const struct fab_op *op, uint32_t n)
{
	return post(ep, op, n, true);
}

static void count_op(struct fab_counters *c, const struct ofi_op *o)
{
	if (o->status) {
		ofi_count(&c->errors, 1);
		return;
	}
	ofi_count(o->write ? &c->writes : &c->reads, 1);
	ofi_count(o->write ? &c->write_bytes : &c->read_bytes, o->bytes);
}

/* With the lock held. */
void ofi_ops_emit(struct fab_ep *ep, struct ofi_sink *s)
{
	struct ofi_op *o;

	while (s->n < s->max && (o = TAILQ_FIRST(&ep->finished))) {
		TAILQ_REMOVE(&ep->finished, o, link);
		count_op(&ep->fab->counters, o);
		s->out[s->n++] = (struct fab_event){ .type = o->write ? FAB_EV_WRITE : FAB_EV_READ,
						     .status = o->status,
						     .ep = ep,
						     .user = o->user,
						     .imm = o->imm };
		give_idle(ep, o);
	}
	/* The engine may have stopped for want of room. */
	if (ep->notice_tail - ep->notice_head >= OFI_NOTICES_ENOUGH)
		ofi_engine_wake(ep->fab);
	while (s->n < s->max && ep->notice_head != ep->notice_tail) {
		ofi_count(&ep->fab->counters.notices, 1);
		s->out[s->n++] = (struct fab_event){ .type = FAB_EV_NOTICE,
						     .ep = ep,
						     .user = ep->user,
						     .imm = ep->notices[ep->notice_head++ % OFI_NOTICES] };
	}
}

void ofi_ops_drop(struct fab_ep *ep)
{
	struct ofi_op *o;

	TAILQ_CONCAT(&ep->finished, &ep->queue, link);
	TAILQ_CONCAT(&ep->finished, &ep->submitted, link);
	while ((o = TAILQ_FIRST(&ep->finished))) {
		TAILQ_REMOVE(&ep->finished, o, link);
		give_idle(ep, o);
	}
}

static void slices_init(struct fab_ep *ep)
{
	ep->n_free = 0;
	for (uint32_t i = 0; i < OFI_SLICES; i++)
		ep->free[ep->n_free++] = &ep->slice[i];
}

void ofi_ops_init(struct fab_ep *ep)
{
	TAILQ_INIT(&ep->queue);
	TAILQ_INIT(&ep->submitted);
	TAILQ_INIT(&ep->finished);
	TAILQ_INIT(&ep->idle);
	for (uint32_t i = 0; i < OFI_OPS; i++)
		TAILQ_INSERT_TAIL(&ep->idle, &ep->ops[i], link);
	slices_init(ep);
}

/* ------------------------------------------------------------------- posting */

static uint64_t notice_data(const struct fab_ep *ep, uint32_t imm)
{
	return ep->fab->tagged ? (ep->far.tag & ~(uint64_t)UINT32_MAX) | imm : imm;
}

static void *desc_of(struct fid_mr *mr)
{
	return mr ? fi_mr_desc(mr) : NULL;
}

int ofi_write_bytes(struct fab_ep *ep, void *from, uint64_t bytes, struct fid_mr *mr, struct fi_rma_iov to,
		    void *context, const uint32_t *imm)
{
	struct iovec iov = { .iov_base = from, .iov_len = bytes };
	void *desc = desc_of(mr);
	struct fi_msg_rma msg = {
		.msg_iov = &iov,
		.desc = &desc,
		.iov_count = 1,
		.addr = ep->fi.far,
		.rma_iov = &to,
		.rma_iov_count = 1,
		.context = context,
		.data = imm ? notice_data(ep, *imm) : 0,
	};
	uint64_t flags = FI_COMPLETION | (context ? FI_DELIVERY_COMPLETE : 0) | (imm ? FI_REMOTE_CQ_DATA : 0);

	return edge_write(ep->fi.ep, &msg, flags);
}

static int post_slice(struct fab_ep *ep, struct ofi_op *o, struct ofi_slice *s, bool last)
{
	struct fi_rma_iov far = { .addr = o->remote->at + o->remote_offset + o->posted,
				  .len = s->bytes,
				  .key = o->remote->key };
	uint8_t *near = o->local->base + o->local_offset + o->posted;
	const uint32_t *imm = last && !ep->fab->asks ? &o->imm : NULL;

	if (o->write)
		return ofi_write_bytes(ep, near, s->bytes, o->local->mr, far, &s->context, imm);
	return edge_read(ep->fi.ep, near, s->bytes, desc_of(o->local->mr), ep->fi.far, far.addr, far.key, &s->context);
}

/* An ordered write's notice: all of its bytes are before it. */
static int post_notice(struct fab_ep *ep, struct ofi_op *o, struct ofi_slice *s)
{
	struct fi_rma_iov sink = { .addr = ep->far.mailbox_at + offsetof(struct ofi_mailbox, sink),
				   .len = sizeof(uint64_t),
				   .key = ep->far.mailbox_key };

	return ofi_write_bytes(ep, &ep->mailbox->sink, sink.len, ep->fi.mailbox_mr, sink, &s->context, &o->imm);
}

int ofi_word_post(struct fab_ep *ep, size_t offset, uint64_t value)
{
	struct ofi_slice *s = &ep->slice[OFI_SLICES];
	struct fi_rma_iov to = { .addr = ep->far.mailbox_at + offset,
				 .len = sizeof(value),
				 .key = ep->far.mailbox_key };

	s->op = NULL;
	s->bytes = sizeof(value);
	ep->mailbox->out = value;
	return ofi_write_bytes(ep, &ep->mailbox->out, sizeof(value), ep->fi.mailbox_mr, to, &s->context, NULL);
}

static void count_slice(struct fab_ep *ep, struct ofi_op *o, uint64_t bytes)
{
	ep->inflight += bytes;
	ep->fab->inflight += bytes;
	o->slices++;
	o->posted += bytes;
}

/* With libfabric itself; bytes 0: the notice. */
static int post_bytes(struct fab_ep *ep, struct ofi_op *o, uint64_t bytes, bool last)
{
	struct ofi_slice *s;
	int ret;

	if (ep->n_free == 0)
		return -EAGAIN;
	s = ep->free[ep->n_free - 1];
	s->op = o;
	s->bytes = bytes;
	ret = bytes ? post_slice(ep, o, s, last) : post_notice(ep, o, s);
	if (ret)
		return ret;
	ep->n_free--;
	count_slice(ep, o, bytes);
	return 0;
}

/* 0: a slice of ep->next is posted, or its notice. -EAGAIN: not now. */
static int post_next(struct fab_ep *ep)
{
	struct fab *f = ep->fab;
	struct ofi_op *o = ep->next;
	uint64_t left = o->bytes - o->posted;
	uint64_t bytes = left < OFI_SLICE_BYTES ? left : OFI_SLICE_BYTES;
	bool last = left == bytes, ordered = o->write && f->asks;
	int ret;

	if (o->write && last && !ordered && o->slices > 0)
		return -EAGAIN;
	if (ep->inflight > 0 && f->inflight + bytes > f->inflight_max)
		return -EAGAIN;
	if (!o->write && f->asks) {
		ret = ofi_ask(ep, o, bytes);
		if (!ret)
			count_slice(ep, o, bytes);
	} else {
		ret = post_bytes(ep, o, bytes, last);
	}
	if (ret)
		return ret;
	o->noticed = bytes == 0;
	if (ordered ? o->noticed : last)
		ep->next = TAILQ_NEXT(o, link);
	return 0;
}

bool ofi_ops_post(struct fab_ep *ep, uint64_t now)
{
	bool any = false;
	int ret = 0;

	while (ep->next && (ret = post_next(ep)) == 0)
		any = true;
	if (ret && ret != -EAGAIN)
		ofi_conn_break(ep, ret, "libfabric takes no operation");
	else if (!TAILQ_EMPTY(&ep->queue) && now > ep->progress_ns + ep->fab->deadline_ns)
		ofi_conn_break(ep, -ETIMEDOUT, "nothing of what is in flight has completed within the deadline");
	return any;
}

/* ---------------------------------------------------------------- completions */

static void finish(struct fab_ep *ep, struct ofi_op *o, int status)
{
	o->status = status;
	TAILQ_REMOVE(&ep->queue, o, link);
	pthread_mutex_lock(&ep->fab->lock);
	TAILQ_INSERT_TAIL(&ep->finished, o, link);
	ofi_make_ready(ep);
	pthread_mutex_unlock(&ep->fab->lock);
}

void ofi_slice_done(struct fab_ep *ep, struct ofi_op *o, uint64_t bytes)
{
	bool ordered = o->write && ep->fab->asks;

	assert(o->slices > 0);
	ep->inflight -= bytes;
	ep->fab->inflight -= bytes;
	if (--o->slices == 0 && o->posted == o->bytes && (o->noticed || !ordered))
		finish(ep, o, 0);
}

static void completion_in(struct fab_ep *ep, struct ofi_slice *s)
{
	if (s == &ep->answer) {
		ep->serving--;
	} else if (!s->op) {
		ep->word_done = true;
	} else {
		ep->free[ep->n_free++] = s;
		ofi_slice_done(ep, s->op, s->bytes);
	}
}

/* False: no room for it. */
static bool notice_in(struct fab_ep *ep, uint64_t data)
{
	struct fab *f = ep->fab;
	bool room;

	if (f->tagged && (data ^ ep->own.tag) >> 32) {
		if (atomic_fetch_add_explicit(&f->counters.refused, 1, memory_order_relaxed) == 0)
			log_warn(f->log,
				 "fabric ofi: refused a notice that is not the peer's; others are only counted");
		return true;
	}
	pthread_mutex_lock(&f->lock);
	room = ep->notice_tail - ep->notice_head < OFI_NOTICES;
	if (room)
		ep->notices[ep->notice_tail++ % OFI_NOTICES] = (uint32_t)data;
	ofi_make_ready(ep);
	pthread_mutex_unlock(&f->lock);
	return room;
}

static bool completions_in(struct fab_ep *ep, const struct fi_cq_data_entry *done, int n)
{
	bool room = true;

	for (int i = 0; i < n; i++) {
		/* Some providers put the first flag on the completion of the one who sent the data, too. */
		if (done[i].flags & FI_REMOTE_CQ_DATA && done[i].flags & FI_REMOTE_WRITE)
			room &= notice_in(ep, done[i].data);
		else if (done[i].op_context)
			completion_in(ep, done[i].op_context);
	}
	return room;
}

static void failure_in(struct fab_ep *ep)
{
	struct fi_cq_err_entry e = { 0 };
	int ret = edge_failure(ep->fi.cq, &e);

	if (ret == -EAGAIN)
		return;
	ofi_conn_break(ep, ret ? ret : edge_errno(-e.err), "an operation failed");
}

/* While the user does not take its notices, the peer's writes wait in the network. */
bool ofi_notice_room(struct fab_ep *ep)
{
	uint32_t used;

	pthread_mutex_lock(&ep->fab->lock);
	used = ep->notice_tail - ep->notice_head;
	pthread_mutex_unlock(&ep->fab->lock);
	return used < OFI_NOTICES_ENOUGH;
}

bool ofi_ops_progress(struct fab_ep *ep, uint64_t now)
{
	struct fi_cq_data_entry done[COMPLETIONS_AT_ONCE];
	int n;

	if (!ofi_notice_room(ep))
		return false;
	n = edge_completions(ep->fi.cq, done, ARRAY_LEN(done));
	if (n == -EAGAIN)
		return false;
	if (n == -EBADMSG) {
		failure_in(ep);
		return true;
	}
	if (n < 0) {
		ofi_conn_break(ep, n, "no completions from libfabric");
		return true;
	}
	/* There is room: that was asked above. */
	(void)completions_in(ep, done, n);
	ep->progress_ns = now;
	return true;
}

/* -------------------------------------------------------------------- endings */

bool ofi_ops_drain(struct fab_ep *ep)
{
	struct fi_cq_data_entry done[COMPLETIONS_AT_ONCE];
	bool room = true;

	for (;;) {
		/* Zeroed: libfabric takes what stands there for a buffer of ours. */
		struct fi_cq_err_entry failed = { 0 };
		int n = edge_completions(ep->fi.cq, done, ARRAY_LEN(done));

		if (n > 0)
			room &= completions_in(ep, done, n);
		else if (n != -EBADMSG || edge_failure(ep->fi.cq, &failed))
			return room;
	}
}

uint64_t ofi_ops_rewind(struct fab_ep *ep, uint64_t now)
{
	uint64_t since = now;
	struct ofi_op *o;

	TAILQ_FOREACH(o, &ep->queue, link)
	{
		if (o->posted > 0) {
			ofi_count(&ep->fab->counters.replays, 1);
			o->failed_ns = o->failed_ns ? o->failed_ns : now;
		}
		if (o->failed_ns && o->failed_ns < since)
			since = o->failed_ns;
		o->posted = 0;
		o->slices = 0;
		o->noticed = false;
	}
	ep->next = TAILQ_FIRST(&ep->queue);
	ep->fab->inflight -= ep->inflight;
	ep->inflight = 0;
	ep->asked = ep->got = 0;
	ep->served = ep->answered = 0;
	ep->serving = 0;
	slices_init(ep);
	return since;
}

void ofi_ops_fail(struct fab_ep *ep, int status)
{
	struct ofi_op *o;

	ep->next = NULL;
	while ((o = TAILQ_FIRST(&ep->queue)))
		finish(ep, o, status);
}
