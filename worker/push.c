/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A gradient on its way to its owners.
 *
 * The compute thread fills one of a few buffers of one exported region and
 * reports it; each owner of pages of the part gets an offer and answers it. In
 * place, an owner reads the buffer where it is. Else it grants the offer, the
 * worker writes the owner's runs of the part into its inbox, compact and in
 * slices with a notice each, and the owner says taken when it has folded them.
 * The buffer is free when every offer of it is answered and nothing is being
 * written from it any more.
 *
 *   OUT -> MAY_WRITE -> WRITING -> WRITTEN      (push mode; an answer may come
 *    '------------------------------------> answered     at any of these)
 *
 * An owner may hold an unwanted contribution by reference until its sibling
 * comes. So a buffer is wanted back no earlier than needed: when it is the
 * oldest and none is free, when the compute thread waits for one, and all of
 * them at the end of the span.
 *
 * At most one offer at a time is written to an owner, also when an older one
 * was closed in the middle of its writes: its inbox must not get two at once. A
 * network may repeat a write until it has completed, in another order than it
 * was posted. So the next push begins only when every write of the one before
 * has completed; and a push under way is not withdrawn before its posted writes
 * have completed, since the owner gives the inbox away when it hears of it.
 * A slice that lies in one piece is written from the gradient itself; one that
 * the page map cuts goes through a staging slot.
 *
 * Where there are neighbours a contribution goes to them first, or waits for
 * theirs (sums.c); it comes back here as that of a larger node, or not at all.
 */
#include "worker/process.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define WRITES_MAX 16 /* slices in flight to one owner */
#define PIECES_MAX RUNS_PER_UNIT_MAX

/* --------------------------------------------------------------- life cycle */

int push_open(struct worker *w, struct err *e)
{
	struct push *p = &w->push;
	void *at;
	int rc;

	assert(w->plan.n_gradient_buffers > 0 && w->plan.n_gradient_buffers <= BUFFERS_MAX);
	p->n_buffers = w->plan.n_gradient_buffers;
	p->elements = w->plan.gradient_elements;
	rc = fabrics_memory(w, MEMORY_GRADIENTS, "gradients", p->n_buffers * p->elements * sizeof(float), &at, e);
	if (rc)
		return rc;
	p->memory = at;
	if (w->in_place)
		return 0;
	rc = fabrics_memory(w, MEMORY_STAGING, "staging", PUSH_STAGING_BYTES, &at, e);
	if (rc)
		return rc;
	p->staging = at;
	p->staging_free = (1u << PUSH_STAGING_SLOTS) - 1;
	return 0;
}

int push_attach(struct worker *w)
{
	struct push *p = &w->push;

	p->offer = calloc((size_t)p->n_buffers * w->attach.n_peers, sizeof(*p->offer));
	return p->offer ? 0 : -ENOMEM;
}

void push_release(struct worker *w)
{
	sums_release(w);
	free(w->push.offer);
}

static struct offer *offer_of(const struct worker *w, uint32_t buffer, uint32_t peer)
{
	return &w->push.offer[(size_t)buffer * w->attach.n_peers + peer];
}

/* The peer's runs in the pages of the buffer's part. */
static void part_share(const struct worker *w, const struct gradient_buffer *b, const struct peer *p, struct share *out)
{
	struct share whole;

	page_map_share(&w->map, &w->table, p->member, b->unit, &whole);
	share_of_part(&whole, &w->table.unit[b->unit].part[b->part], w->table.page, out);
}

/* ------------------------------------------------------------------- offers */

void push_begin(struct worker *w, const struct granted_lease *l)
{
	assert(push_idle(w));
	w->push.step = l->step;
	w->push.node = l->node;
	sums_begin(w, l);
}

bool push_idle(const struct worker *w)
{
	for (uint32_t i = 0; i < w->push.n_buffers; i++)
		if (w->push.buffer[i].busy)
			return false;
	return sums_idle(w);
}

void push_free(struct worker *w, uint32_t i)
{
	const struct task t = { .kind = TASK_BUFFER, .buffer = i };

	w->push.buffer[i].busy = false;
	sums_stall(w, w->span.ended);
	control_task(w, &t);
}

/* The offer is over when it is answered and nothing of it is in flight. */
static void offer_check(struct worker *w, struct offer *o)
{
	struct gradient_buffer *b = &w->push.buffer[o->buffer];

	if (!o->answered || o->progress == OFFER_WRITING)
		return;
	*o = (struct offer){ .progress = OFFER_NONE };
	assert(b->outstanding > 0);
	if (--b->outstanding == 0) {
		sums_answered(w, (uint32_t)(b - w->push.buffer));
		push_free(w, (uint32_t)(b - w->push.buffer));
	}
	control_span_check(w);
}

static void send_id(struct peer *p, unsigned type, uint64_t id)
{
	const struct msg_want m = { .offer = id };

	_Static_assert(sizeof(struct msg_want) == sizeof(struct msg_withdraw), "both carry the id alone");
	if (p->conn && conn_send(p->conn, type, &m))
		attach_lost(p, "it does not read its connection");
}

/* For every offer of a buffer that is not answered. */
static void want_back(struct worker *w, uint32_t buffer)
{
	for (uint32_t i = 0; i < w->attach.n_peers; i++) {
		struct offer *o = offer_of(w, buffer, i);

		if (o->progress == OFFER_NONE || o->answered || o->wanted)
			continue;
		o->wanted = true;
		send_id(&w->attach.peer[i], WIRE_WANT, o->id);
	}
}

static void withdraw_offers(struct worker *w, uint32_t buffer)
{
	for (uint32_t i = 0; i < w->attach.n_peers; i++) {
		struct offer *o = offer_of(w, buffer, i);

		if (o->progress == OFFER_NONE || o->answered || o->withdrawn)
			continue;
		o->withdrawn = true;
		/* Said when the last write has completed. */
		if (o->progress != OFFER_WRITING)
			send_id(&w->attach.peer[i], WIRE_WITHDRAW, o->id);
	}
}

/* The oldest buffer that is out; NULL when all are free. */
static struct gradient_buffer *oldest(struct push *p)
{
	struct gradient_buffer *best = NULL;

	for (uint32_t i = 0; i < p->n_buffers; i++)
		if (p->buffer[i].busy && (!best || p->buffer[i].sequence < best->sequence))
			best = &p->buffer[i];
	return best;
}

static bool all_busy(const struct push *p)
{
	for (uint32_t i = 0; i < p->n_buffers; i++)
		if (!p->buffer[i].busy)
			return false;
	return true;
}

static void want_oldest(struct worker *w)
{
	struct gradient_buffer *b = oldest(&w->push);

	if (b)
		want_back(w, (uint32_t)(b - w->push.buffer));
}

void push_need(struct worker *w)
{
	sums_stall(w, all_busy(&w->push));
	want_oldest(w);
}

static void offer_to(struct worker *w, struct peer *p, uint32_t buffer)
{
	struct push *push = &w->push;
	const struct gradient_buffer *b = &push->buffer[buffer];
	struct offer *o = offer_of(w, buffer, p->index);
	struct msg_offer m = {
		.step = push->step,
		.offer = ++push->next_id,
		.unit = b->unit,
		.part = b->part,
		.first = b->node.first,
		.level = b->node.level,
		.where = buffer * push->elements * sizeof(float),
	};

	assert(o->progress == OFFER_NONE);
	*o = (struct offer){ .id = m.offer, .progress = OFFER_OUT, .buffer = buffer };
	count(&w->counters.offers, 1);
	if (p->conn && conn_send(p->conn, WIRE_OFFER, &m))
		attach_lost(p, "it does not read its connection");
}

void push_to_owners(struct worker *w, uint32_t buffer, struct tree_node node)
{
	struct gradient_buffer *b = &w->push.buffer[buffer];
	const uint32_t *owners = attach_owners(&w->attach, b->unit);

	b->node = node;
	for (uint32_t i = 0; i < w->attach.n_owners[b->unit]; i++) {
		struct peer *peer = &w->attach.peer[owners[i]];
		struct share share;

		part_share(w, b, peer, &share);
		if (share.n == 0)
			continue;
		b->outstanding++;
		offer_to(w, peer, buffer);
	}
	if (w->span.ended)
		want_back(w, buffer);
	else if (all_busy(&w->push))
		want_oldest(w);
}

void push_offer(struct worker *w, const struct report *r)
{
	struct push *p = &w->push;
	struct gradient_buffer *b = &p->buffer[r->buffer];

	assert(!b->busy);
	*b = (struct gradient_buffer){ .busy = true, .unit = r->unit, .part = r->part, .sequence = ++p->next_sequence };
	/* Of a recalled span nothing more is offered. */
	if (w->span.cancelled)
		push_free(w, r->buffer);
	else if (w->sums.on)
		sums_final(w, r->buffer);
	else
		push_to_owners(w, r->buffer, p->node);
}

void push_end(struct worker *w, bool withdraw)
{
	if (withdraw)
		sums_cancel(w);
	else
		sums_stall(w, true);
	for (uint32_t i = 0; i < w->push.n_buffers; i++) {
		struct gradient_buffer *b = &w->push.buffer[i];

		if (!b->busy || b->withdrawn)
			continue;
		b->withdrawn = withdraw;
		if (withdraw)
			withdraw_offers(w, i);
		else
			want_back(w, i);
	}
}

/* ------------------------------------------------------------------ answers */

static struct offer *find_offer(struct worker *w, uint32_t peer, uint64_t id)
{
	for (uint32_t i = 0; i < w->push.n_buffers; i++) {
		struct offer *o = offer_of(w, i, peer);

		if (o->progress != OFFER_NONE && o->id == id && !o->answered)
			return o;
	}
	return NULL;
}

static int granted(struct peer *p, struct offer *o, const struct msg_answer *m)
{
	struct worker *w = p->w;
	struct share share;

	if (w->in_place || o->progress != OFFER_OUT)
		return -EPROTO;
	part_share(w, &w->push.buffer[o->buffer], p, &share);
	if (m->slices != share_slices(&share))
		return -EPROTO;
	/* One that was withdrawn before the grant arrived is answered again. */
	o->progress = OFFER_MAY_WRITE;
	o->slices = m->slices;
	o->imm = m->imm;
	return 0;
}

int push_answer(struct peer *p, const struct msg_answer *m)
{
	struct worker *w = p->w;
	struct offer *o = find_offer(w, p->index, m->offer);
	int rc = 0;

	if (!o)
		return -EPROTO;
	switch (m->verdict) {
	case OFFER_GRANTED:
		rc = granted(p, o, m);
		break;
	case OFFER_TAKEN:
	case OFFER_COVERED:
	case OFFER_CLOSED:
		w->push.buffer[o->buffer].lost |= m->verdict == OFFER_CLOSED && o->withdrawn;
		o->answered = true;
		offer_check(w, o);
		break;
	default:
		rc = -EPROTO;
	}
	return rc;
}

/* ------------------------------------------------------------------- writes */

/* Where slice k can be written from; -EAGAIN: every staging slot is in use. */
static int place_slice(struct peer *p, const struct share *share, uint32_t k, struct fab_op *op)
{
	struct push *push = &p->w->push;
	struct slice_piece piece[PIECES_MAX];
	uint32_t n = share_slice(share, k, piece, PIECES_MAX), slot;
	uint64_t base = p->writing->buffer * push->elements, bytes = 0;
	uint8_t *to;

	if (n == 1) {
		op->local = p->fabric->region[MEMORY_GRADIENTS];
		op->local_offset = (base + piece[0].unit_offset) * sizeof(float);
		op->bytes = piece[0].n * sizeof(float);
		op->user = op_user(OP_WRITE, p->index, PUSH_STAGING_SLOTS);
		return 0;
	}
	if (!push->staging_free)
		return -EAGAIN;
	slot = (uint32_t)__builtin_ctz(push->staging_free);
	push->staging_free &= ~(1u << slot);
	to = push->staging + (size_t)slot * SLICE_BYTES;
	for (uint32_t i = 0; i < n; i++) {
		memcpy(to + bytes, push->memory + base + piece[i].unit_offset, piece[i].n * sizeof(float));
		bytes += piece[i].n * sizeof(float);
	}
	op->local = p->fabric->region[MEMORY_STAGING];
	op->local_offset = (uint64_t)slot * SLICE_BYTES;
	op->bytes = bytes;
	op->user = op_user(OP_WRITE, p->index, slot);
	return 0;
}

static void free_slot(struct push *push, uint32_t slot)
{
	if (slot < PUSH_STAGING_SLOTS)
		push->staging_free |= 1u << slot;
}

static void writing_check(struct peer *p)
{
	struct offer *o = p->writing;

	/* Answered or withdrawn in the middle, the rest need not be written. */
	if (p->writes > 0 || (p->next_slice < o->slices && !o->answered && !o->withdrawn))
		return;
	p->writing = NULL;
	o->progress = OFFER_WRITTEN;
	if (o->withdrawn && !o->answered)
		send_id(p, WIRE_WITHDRAW, o->id);
	offer_check(p->w, o);
}

static void write_slices(struct peer *p)
{
	struct worker *w = p->w;
	struct offer *o = p->writing;
	struct share share;

	part_share(w, &w->push.buffer[o->buffer], p, &share);
	while (p->next_slice < o->slices && p->writes < WRITES_MAX && !o->answered && !o->withdrawn) {
		struct fab_op op = { .remote = p->inbox,
				     .remote_offset = (uint64_t)p->next_slice * SLICE_BYTES,
				     .imm = o->imm + p->next_slice };
		int rc = place_slice(p, &share, p->next_slice, &op);

		if (rc)
			break;
		rc = p->fabric->ops->write_notify(p->ep, &op, 1);
		if (rc) {
			free_slot(&w->push, op_b(op.user));
			if (rc != -EAGAIN)
				attach_lost(p, strerror(-rc));
			break;
		}
		count(&w->counters.push_bytes, op.bytes);
		p->writes++;
		p->next_slice++;
	}
	writing_check(p);
}

static struct offer *next_to_write(const struct worker *w, uint32_t peer)
{
	for (uint32_t i = 0; i < w->push.n_buffers; i++) {
		struct offer *o = offer_of(w, i, peer);

		if (o->progress == OFFER_MAY_WRITE && !o->withdrawn)
			return o;
	}
	return NULL;
}

void push_run(struct worker *w)
{
	if (w->in_place || !w->push.offer)
		return;
	for (uint32_t i = 0; i < w->attach.n_peers; i++) {
		struct peer *p = &w->attach.peer[i];

		if (p->lost)
			continue;
		if (!p->writing) {
			p->writing = next_to_write(w, i);
			if (!p->writing)
				continue;
			p->writing->progress = OFFER_WRITING;
			p->next_slice = 0;
		}
		write_slices(p);
	}
	sums_run(w);
}

void push_event(struct worker *w, const struct fab_event *ev)
{
	struct peer *p = &w->attach.peer[op_a(ev->user)];

	assert(op_a(ev->user) < w->attach.n_peers && p->writes > 0 && p->writing);
	free_slot(&w->push, op_b(ev->user));
	p->writes--;
	if (ev->status && !p->lost)
		attach_lost(p, strerror(-ev->status));
	if (!p->lost)
		writing_check(p);
}
