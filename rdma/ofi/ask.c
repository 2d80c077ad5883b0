/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Reads as two writes, over tcp.
 *
 * When a connection ends in the middle of a read's answer, the tcp provider of
 * libfabric 1.17 reports that read twice, the second time from freed memory,
 * and ofi_rxm follows a null pointer: whoever reads from a member that dies
 * dies too. Over tcp a read is no more than a message to the owner's provider,
 * which sends the bytes back, so here the message is ours: the reader writes a
 * request into the owner's mailbox, the owner's engine writes the bytes into
 * the reader's memory and then, into its mailbox, how many requests it has
 * answered. Those paths of the provider do stand the end of a connection: what
 * they allocate belongs to one queue alone. For the same reason no large write
 * carries a notice.
 *
 *   reader                                   owner
 *   request[n % N] == request ===========>   right? (a key that this peer was given, its range)
 *   memory         <========== the bytes =
 *   answered       <========== n + 1 =====
 *
 * All of it needs writes to arrive in the order of posting (FI_ORDER_WAW): the
 * count is not believed before the bytes, and seq, the last word of a request,
 * is not there before the rest. Counts begin at the receiving side's tag, so
 * that a mailbox of zeros says nothing. A write that fails is followed by no
 * other: within one turn nothing new is connected, and no turn posts before it
 * has seen all completions.
 *
 * The owner checks what its provider would have checked, and says what it
 * refuses. The reader's memory is open to this owner alone, from the first
 * read on until the connection ends.
 */
#include "rdma/ofi/ofi.h"

#include <errno.h>

#define SERVING_MAX (2 * OFI_SLICES)

/* ------------------------------------------------------------------- reader */

int ofi_ask(struct fab_ep *ep, struct ofi_op *o, uint64_t bytes)
{
	uint32_t slot = ep->asked % OFI_SLICES;
	struct ofi_request *r = &ep->mailbox->out_request[slot];
	struct fi_rma_iov to = { .addr = ep->far.mailbox_at + offsetof(struct ofi_mailbox, request) + slot * sizeof(*r),
				 .len = sizeof(*r),
				 .key = ep->far.mailbox_key };
	uint64_t base = ep->fab->virtual_addresses ? (uintptr_t)o->local->base : 0;
	struct fid_mr *mr;
	int ret;

	if (ep->asked - ep->got == OFI_SLICES)
		return -EAGAIN;
	ret = ofi_landing(ep, o->local, &mr);
	if (ret)
		return ret;
	r->key = o->remote->key;
	r->offset = o->remote_offset + o->posted;
	r->bytes = bytes;
	r->to_key = fi_mr_key(mr);
	r->to_at = base + o->local_offset + o->posted;
	atomic_store_explicit(&r->seq, ep->far.tag + ep->asked + 1, memory_order_relaxed);
	ret = ofi_write_bytes(ep, r, sizeof(*r), ep->fi.mailbox_mr, to, NULL, NULL);
	if (ret)
		return ret;
	ep->ask[slot].op = o;
	ep->ask[slot].bytes = bytes;
	ep->asked++;
	return 0;
}

bool ofi_answers_in(struct fab_ep *ep, uint64_t now)
{
	uint64_t n = atomic_load_explicit(&ep->mailbox->answered, memory_order_acquire) - ep->own.tag;

	/* Beyond what was asked: nothing was written yet, or nonsense. */
	if (n <= ep->got || n > ep->asked)
		return false;
	while (ep->got < n) {
		struct ofi_slice *s = &ep->ask[ep->got++ % OFI_SLICES];

		ofi_slice_done(ep, s->op, s->bytes);
	}
	ep->progress_ns = now;
	return true;
}

/* -------------------------------------------------------------------- owner */

/* What the peer may read by this key. */
static struct fab_region *find_given(const struct fab_ep *ep, uint64_t key)
{
	const struct ofi_export *x;

	TAILQ_FOREACH(x, &ep->exports, of_ep)
	if (!x->landing && x->region->access == FAB_REMOTE_READ && fi_mr_key(x->mr) == key)
		return x->region;
	return NULL;
}

static void refuse(struct fab_ep *ep)
{
	ofi_count(&ep->fab->counters.refused, 1);
	ofi_conn_break(ep, -EACCES, "refused a read of memory that the peer was not given");
}

static int write_answer(struct fab_ep *ep, const struct ofi_request *r, struct fab_region *from)
{
	struct fi_rma_iov to = { .addr = r->to_at, .len = r->bytes, .key = r->to_key };
	int ret = ofi_write_bytes(ep, from->base + r->offset, r->bytes, from->mr, to, &ep->answer.context, NULL);

	if (!ret)
		ep->serving++;
	return ret;
}

/* The request that is next, copied, since the peer can change it under our eyes. */
static bool next_request(const struct fab_ep *ep, struct ofi_request *out)
{
	const struct ofi_request *r = &ep->mailbox->request[ep->served % OFI_SLICES];

	if (atomic_load_explicit(&r->seq, memory_order_acquire) != ep->own.tag + ep->served + 1)
		return false;
	out->key = r->key;
	out->offset = r->offset;
	out->bytes = r->bytes;
	out->to_key = r->to_key;
	out->to_at = r->to_at;
	return ep->serving < SERVING_MAX;
}

/* 0, -EAGAIN, or what breaks the connection. */
static int say_answered(struct fab_ep *ep)
{
	uint64_t *out = &ep->mailbox->out_answered[ep->served % ARRAY_LEN(ep->mailbox->out_answered)];
	struct fi_rma_iov to = { .addr = ep->far.mailbox_at + offsetof(struct ofi_mailbox, answered),
				 .len = sizeof(*out),
				 .key = ep->far.mailbox_key };
	int ret;

	*out = ep->far.tag + ep->served;
	ret = ofi_write_bytes(ep, out, sizeof(*out), ep->fi.mailbox_mr, to, NULL, NULL);
	if (!ret)
		ep->answered = ep->served;
	return ret;
}

bool ofi_serve(struct fab_ep *ep)
{
	uint64_t before = ep->served;
	struct ofi_request r;
	int ret = 0;

	while (!ret && next_request(ep, &r)) {
		struct fab_region *from = find_given(ep, r.key);

		if (!from || r.bytes == 0 || r.offset > from->bytes || r.bytes > from->bytes - r.offset) {
			refuse(ep);
			return true;
		}
		ret = write_answer(ep, &r, from);
		if (!ret)
			ep->served++;
		if (!ret)
			ret = say_answered(ep);
	}
	if ((!ret || ret == -EAGAIN) && ep->answered != ep->served)
		ret = say_answered(ep);
	if (ret && ret != -EAGAIN)
		ofi_conn_break(ep, ret, "libfabric takes no answer");
	return ep->served != before;
}
