/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Reads, writes and notices of the provider `local`.
 *
 * Posting checks and queues; fab_poll copies. A network would have the bytes
 * after the completion and not before, and so have we: a user that looks too
 * early, or reuses a buffer too early, is found out without a NIC.
 *
 *   post -> ops ring -> copy -> completion
 *                         \---> notices ring -> one message for many -> peer
 *
 * A notice is queued when its bytes are in the peer's memory, so that sending it
 * publishes them (local_fd.c says why a message is a barrier). Every stage is bounded and none blocks: when the socket is
 * full, notices wait in their ring; when that is full, writes wait in theirs;
 * when that is full, posting says -EAGAIN. Reads and writes of one endpoint are
 * executed in the order they were posted (users may not rely on it).
 */
#include "rdma/local.h"
#include "rdma/providers.h"

#include <assert.h>
#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

static int check_op(const struct fab_ep *ep, const struct fab_op *op, enum fab_access needed)
{
	if (!op->remote || !op->local || op->remote->ep != ep || op->local->fab != ep->fab)
		return -EINVAL;
	if (op->remote->access != needed)
		return -EPERM;
	return fab_op_check(op, op->remote->bytes, op->local->bytes);
}

static int check_batch(const struct fab_ep *ep, const struct fab_op *op, uint32_t n, enum fab_access needed)
{
	int ret = 0;

	if (ep->state != LOCAL_UP)
		return -ENOTCONN;
	if (n > FAB_BATCH_MAX)
		return -EINVAL;
	for (uint32_t i = 0; i < n && !ret; i++)
		ret = check_op(ep, &op[i], needed);
	if (!ret && n > LOCAL_OPS - (ep->op_tail - ep->op_head))
		ret = -EAGAIN;
	return ret;
}

static void queue_op(struct fab_ep *ep, const struct fab_op *op, bool write)
{
	struct local_op *slot = &ep->ops[ep->op_tail++ % LOCAL_OPS];
	uint8_t *far = op->remote->base + op->remote_offset;
	uint8_t *near = op->local->base + op->local_offset;

	*slot = (struct local_op){ .from = write ? near : far,
				   .to = write ? far : near,
				   .bytes = op->bytes,
				   .user = op->user,
				   .remote = op->remote,
				   .local = op->local,
				   .imm = op->imm,
				   .write = write };
	op->remote->ops++;
	op->local->ops++;
}

int local_read(struct fab_ep *ep, const struct fab_op *op, uint32_t n)
{
	int ret = check_batch(ep, op, n, FAB_REMOTE_READ);

	if (ret)
		return ret;
	for (uint32_t i = 0; i < n; i++)
		queue_op(ep, &op[i], false);
	local_ep_make_ready(ep);
	return 0;
}

int local_write_notify(struct fab_ep *ep, const struct fab_op *op, uint32_t n)
{
	int ret = check_batch(ep, op, n, FAB_REMOTE_WRITE);

	if (ret)
		return ret;
	for (uint32_t i = 0; i < n; i++)
		queue_op(ep, &op[i], true);
	local_ep_make_ready(ep);
	return 0;
}

/*
 * Progress words are read while their owner writes them: a few aligned words are
 * copied as words, so that none is torn, and taken with acquire, so that pages
 * read after a word are at least as new as it says. Everything else is read only
 * when some word has said that it is there.
 */
static void copy_bytes(const struct local_op *op)
{
	bool words = op->bytes <= CACHE_LINE && (((uintptr_t)op->from | (uintptr_t)op->to | op->bytes) & 7) == 0;

	if (words) {
		const _Atomic uint64_t *from = (const _Atomic uint64_t *)op->from;
		_Atomic uint64_t *to = (_Atomic uint64_t *)op->to;

		for (uint64_t i = 0; i < op->bytes / 8; i++)
			atomic_store_explicit(&to[i], atomic_load_explicit(&from[i], memory_order_acquire),
					      memory_order_relaxed);
	} else {
		memcpy(op->to, op->from, op->bytes);
	}
}

static void complete(struct fab_ep *ep, struct local_sink *s, int status)
{
	struct local_op *op = &ep->ops[ep->op_head++ % LOCAL_OPS];

	assert(op->remote->ops > 0 && op->local->ops > 0);
	op->remote->ops--;
	op->local->ops--;
	local_emit(s, (struct fab_event){ .type = op->write ? FAB_EV_WRITE : FAB_EV_READ,
					  .status = status,
					  .ep = ep,
					  .user = op->user,
					  .imm = op->imm });
}

static bool notices_full(const struct fab_ep *ep)
{
	return ep->notice_tail - ep->notice_head == LOCAL_NOTICES;
}

bool local_ops_runnable(const struct fab_ep *ep)
{
	if (ep->op_head == ep->op_tail)
		return false;
	return !ep->ops[ep->op_head % LOCAL_OPS].write || !notices_full(ep);
}

void local_ops_run(struct fab_ep *ep, struct local_sink *s)
{
	struct fab_counters *c = &ep->fab->counters;

	while (local_ops_runnable(ep) && s->n < s->max && s->copy_left > 0) {
		const struct local_op *op = &ep->ops[ep->op_head % LOCAL_OPS];

		copy_bytes(op);
		s->copy_left -= op->bytes < s->copy_left ? op->bytes : s->copy_left;
		if (op->write)
			ep->notices[ep->notice_tail++ % LOCAL_NOTICES] = op->imm;
		local_count(op->write ? &c->writes : &c->reads, 1);
		local_count(op->write ? &c->write_bytes : &c->read_bytes, op->bytes);
		complete(ep, s, 0);
	}
	local_ep_send_waiting(ep);
}

bool local_ops_flush(struct fab_ep *ep, struct local_sink *s)
{
	while (ep->op_head != ep->op_tail && s->n < s->max) {
		local_count(&ep->fab->counters.errors, 1);
		complete(ep, s, ep->status);
	}
	return ep->op_head == ep->op_tail;
}

void local_ops_drop(struct fab_ep *ep)
{
	for (; ep->op_head != ep->op_tail; ep->op_head++) {
		const struct local_op *op = &ep->ops[ep->op_head % LOCAL_OPS];

		op->remote->ops--;
		op->local->ops--;
	}
}

static int send_parcels(struct fab_ep *ep)
{
	struct local_msg m;
	uint32_t sent = 0;
	int ret = 0;

	while (sent < ep->leaving_n) {
		local_msg_init(&m, LOCAL_REGION, 0);
		m.region = ep->leaving[sent].desc;
		ret = local_send(ep->sock, &m, ep->leaving[sent].fd);
		if (ret)
			break;
		close(ep->leaving[sent++].fd);
	}
	ep->leaving_n -= sent;
	memmove(ep->leaving, ep->leaving + sent, ep->leaving_n * sizeof(*ep->leaving));
	return ret;
}

static int send_notices(struct fab_ep *ep)
{
	struct local_msg m;
	int ret;

	while (ep->notice_head != ep->notice_tail) {
		uint32_t n = ep->notice_tail - ep->notice_head;

		n = n < LOCAL_MSG_NOTICES ? n : LOCAL_MSG_NOTICES;
		local_msg_init(&m, LOCAL_NOTICE, n);
		for (uint32_t i = 0; i < n; i++)
			m.imm[i] = ep->notices[(ep->notice_head + i) % LOCAL_NOTICES];
		ret = local_send(ep->sock, &m, -1);
		if (ret)
			return ret;
		ep->notice_head += n;
	}
	return 0;
}

static int want_out(struct fab_ep *ep, bool on)
{
	struct epoll_event ev = { .events = EPOLLIN | (on ? EPOLLOUT : 0), .data.ptr = ep };

	if (ep->want_out == on)
		return 0;
	if (epoll_ctl(ep->fab->epoll_fd, EPOLL_CTL_MOD, ep->sock, &ev))
		return -errno;
	ep->want_out = on;
	return 0;
}

void local_ep_send_waiting(struct fab_ep *ep)
{
	int ret = 0;

	if (ep->leaving_n)
		ret = send_parcels(ep);
	if (!ret)
		ret = send_notices(ep);
	/* The peer has gone; what it sent before is still to be read, and the end of file breaks the endpoint. */
	if (ret == -EPIPE || ret == -ECONNRESET)
		return;
	if (!ret || ret == -EAGAIN)
		ret = want_out(ep, ret == -EAGAIN);
	if (ret)
		local_ep_break(ep, ret, "cannot send");
}
