/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Contributions on their way in, and the answers.
 *
 *   EARLY --step opens--> OPEN --fold--> FOLDING --done--> answered TAKEN
 *                          |                ^
 *                      granted (push)       |
 *                          v                |
 *                         TURN --inbox--> FILLING
 *
 * and from every stage but FOLDING to the answers COVERED and CLOSED. The
 * coverage of the piece decides; here is what it does not know: whose offer it
 * is, where its bytes are, and that a worker has one inbox with us, so that of
 * several granted pushes one has its turn. A turn that waits cannot block
 * anybody else: what has the inbox was granted, so it is folded as soon as its
 * last slice is noticed.
 *
 * A push that is closed while it is under way gives the inbox to the worker's
 * next push. Notices of the old one are told apart by their value; its bytes
 * cannot land on the new one's, because a worker begins a push only when all
 * writes of the one before have completed, and takes one back only then. A
 * network that repeats a write repeats its notice: each slice counts once.
 *
 * Everything that comes from a worker is checked before it has effect. What
 * cannot be is refused with a reason and ends the connection.
 */
#include "shardsvc/shard.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

#define WHERE_ALIGN CACHE_LINE

static void count(_Atomic uint64_t *c, uint64_t n)
{
	atomic_fetch_add_explicit(c, n, memory_order_relaxed);
}

/* ------------------------------------------------------------------- names */

/* The coverage's name for an offer: peer slot and place, unique while the offer is not free. Never 0. */
static uint64_t handle_of(const struct peer *p, const struct offer *o)
{
	return (uint64_t)(p->slot + 1) << 32 | (uint64_t)(o - p->offer);
}

static struct offer *offer_of(struct shard *s, uint64_t handle, struct peer **p)
{
	uint32_t slot = (uint32_t)(handle >> 32) - 1, at = (uint32_t)handle;

	assert(slot < s->n_slots && s->peer[slot] && at < PEER_OFFERS);
	*p = s->peer[slot];
	assert((*p)->offer[at].stage != OFFER_FREE);
	return &(*p)->offer[at];
}

static struct offer *find(struct peer *p, uint64_t id)
{
	for (uint32_t i = 0; i < PEER_OFFERS; i++)
		if (p->offer[i].stage != OFFER_FREE && p->offer[i].id == id)
			return &p->offer[i];
	return NULL;
}

static struct coverage *coverage_of(struct peer *p, const struct offer *o)
{
	return &p->shard->track[o->piece].coverage;
}

/* ----------------------------------------------------------------- answers */

static void answer(struct peer *p, uint64_t offer, enum offer_verdict verdict)
{
	const struct msg_answer m = { .offer = offer, .verdict = verdict };
	struct shard_counters *c = &p->shard->count;

	count(verdict == OFFER_TAKEN ? &c->taken : verdict == OFFER_COVERED ? &c->covered : &c->closed, 1);
	peer_send(p, WIRE_ANSWER, &m);
}

/* The granted push that waits longest gets the inbox, if it is free. */
static void next_turn(struct peer *p)
{
	struct offer *first = NULL;
	struct msg_answer m = { .verdict = OFFER_GRANTED };

	for (uint32_t i = 0; i < PEER_OFFERS && p->filling == PEER_NONE; i++)
		if (p->offer[i].stage == OFFER_TURN && (!first || p->offer[i].order < first->order))
			first = &p->offer[i];
	if (!first)
		return;
	first->stage = OFFER_FILLING;
	first->slices =
		(uint32_t)((p->shard->store.piece[first->piece].n * sizeof(float) + PUSH_SLICE - 1) / PUSH_SLICE);
	first->slices_seen = 0;
	memset(p->slices_seen, 0, (first->slices + 63) / 64 * sizeof(uint64_t));
	first->imm = p->next_imm;
	p->next_imm += first->slices;
	p->filling = (uint32_t)(first - p->offer);
	m.offer = first->id;
	m.slices = first->slices;
	m.imm = first->imm;
	count(&p->shard->count.grants, 1);
	peer_send(p, WIRE_ANSWER, &m);
}

/* The offer is answered: its place and, if it had it, the inbox are free. */
static void release(struct peer *p, struct offer *o)
{
	o->stage = OFFER_FREE;
	p->n_offers--;
	if (p->filling == (uint32_t)(o - p->offer)) {
		p->filling = PEER_NONE;
		next_turn(p);
	}
	if (p->state == PEER_GONE)
		peer_settle(p);
}

static void finish(struct peer *p, struct offer *o, enum offer_verdict verdict)
{
	answer(p, o->id, verdict);
	release(p, o);
}

void inbox_verdict(struct shard *s, uint64_t handle, enum offer_verdict verdict)
{
	struct peer *p;
	struct offer *o = offer_of(s, handle, &p);

	if (verdict != OFFER_GRANTED) {
		finish(p, o, verdict);
		return;
	}
	assert(!p->in_place && o->stage == OFFER_OPEN);
	o->stage = OFFER_TURN;
	o->order = p->grants++;
	next_turn(p);
}

struct fold_operand inbox_operand(struct shard *s, uint64_t handle)
{
	struct peer *p;
	struct offer *o = offer_of(s, handle, &p);

	assert(o->stage == OFFER_OPEN || o->stage == OFFER_FILLING);
	o->stage = OFFER_FOLDING;
	if (p->in_place)
		return (struct fold_operand){ .at = (const float *)(p->gradients_at + o->where), .flat = true };
	return (struct fold_operand){ .at = p->fabric->ops->region_addr(p->inbox) };
}

void inbox_taken(struct shard *s, uint64_t handle)
{
	struct peer *p;
	struct offer *o = offer_of(s, handle, &p);

	assert(o->stage == OFFER_FOLDING);
	finish(p, o, OFFER_TAKEN);
}

/* ------------------------------------------------------------------ offers */

static int take_up(struct peer *p, struct offer *o)
{
	int rc = coverage_offer(coverage_of(p, o), handle_of(p, o), o->node, p->in_place, o->wanted);

	if (rc) {
		release(p, o);
		return peer_refuse(p, "offer %llu cannot be taken up (%d)", (unsigned long long)o->id, rc);
	}
	o->stage = OFFER_OPEN;
	reduce_pump(p->shard, o->piece);
	return 0;
}

/* The bytes of the whole flat unit must lie in the worker's gradient region. */
static bool where_is_good(const struct peer *p, const struct msg_offer *m)
{
	uint64_t bytes = p->shard->table.unit[m->unit].n * sizeof(float);

	if (!p->in_place)
		return true;
	return m->where % WHERE_ALIGN == 0 && bytes <= p->gradients_bytes && m->where <= p->gradients_bytes - bytes;
}

static int check_offer(struct peer *p, const struct msg_offer *m, const struct piece *piece)
{
	const struct tree_node node = { .first = m->first, .level = m->level };
	const struct shard *s = p->shard;

	if (!piece)
		return peer_refuse(p, "offer for unit %u part %u, of which we own no page", m->unit, m->part);
	if (!tree_valid(node, s->batch.n_micro))
		return peer_refuse(p, "offer of node %u level %u, which no tree over %u micro-batches has", m->first,
				   m->level, s->batch.n_micro);
	if (!where_is_good(p, m))
		return peer_refuse(p, "offer at byte %llu of a gradient region of %llu: unit %u does not lie there",
				   (unsigned long long)m->where, (unsigned long long)p->gradients_bytes, m->unit);
	if (m->step > s->open_step + 1)
		return peer_refuse(p, "offer for step %llu while step %llu is open", (unsigned long long)m->step,
				   (unsigned long long)s->open_step);
	for (uint32_t i = 0; i < PEER_OFFERS; i++) {
		const struct offer *o = &p->offer[i];

		if (o->stage != OFFER_FREE && o->id == m->offer)
			return peer_refuse(p, "offer %llu is made twice", (unsigned long long)m->offer);
		if (o->stage != OFFER_FREE && o->stage != OFFER_FOLDING && o->step == m->step &&
		    &s->store.piece[o->piece] == piece)
			return peer_refuse(p, "a second offer for unit %u part %u before the first is answered",
					   m->unit, m->part);
	}
	return 0;
}

static struct offer *new_offer(struct peer *p)
{
	for (uint32_t i = 0; i < PEER_OFFERS; i++)
		if (p->offer[i].stage == OFFER_FREE)
			return &p->offer[i];
	return NULL;
}

static int on_offer(struct peer *p, const struct msg_offer *m)
{
	struct shard *s = p->shard;
	const struct piece *piece = store_piece(&s->store, m->unit, m->part);
	bool early = m->step > s->open_step;
	struct offer *o;
	int rc = check_offer(p, m, piece);

	if (rc)
		return rc;
	count(&s->count.offers, 1);
	if (!early && (m->step != s->open_step || s->phase != STEP_REDUCE)) {
		answer(p, m->offer, OFFER_CLOSED);
		return 0;
	}
	o = new_offer(p);
	if (!o)
		return peer_refuse(p, "more than %u offers at once", PEER_OFFERS);
	*o = (struct offer){ .stage = OFFER_EARLY,
			     .wanted = m->wanted,
			     .id = m->offer,
			     .step = m->step,
			     .where = m->where,
			     .piece = (uint32_t)(piece - s->store.piece),
			     .node = { .first = m->first, .level = m->level } };
	p->n_offers++;
	if (!early)
		return take_up(p, o);
	count(&s->count.early, 1);
	return 0;
}

void inbox_step_opened(struct shard *s)
{
	for (uint32_t i = 0; i < s->n_slots; i++) {
		struct peer *p = s->peer[i];

		for (uint32_t k = 0; p && k < PEER_OFFERS; k++) {
			struct offer *o = &p->offer[k];

			if (o->stage != OFFER_EARLY)
				continue;
			if (s->phase == STEP_REDUCE && o->step == s->open_step)
				(void)take_up(p, o);
			else
				finish(p, o, OFFER_CLOSED);
		}
	}
}

/* Its answer may have crossed the message: then there is nothing to do. */
static int on_want(struct peer *p, const struct msg_want *m)
{
	struct offer *o = find(p, m->offer);

	if (!o)
		return 0;
	o->wanted = true;
	if (o->stage == OFFER_OPEN || o->stage == OFFER_TURN || o->stage == OFFER_FILLING) {
		coverage_want(coverage_of(p, o), handle_of(p, o));
		reduce_pump(p->shard, o->piece);
	}
	return 0;
}

/* True: it is out of the coverage, so nothing but us knows it. False: an answer or a fold is under way. */
static bool take_back(struct peer *p, struct offer *o)
{
	switch (o->stage) {
	case OFFER_EARLY:
		return true;
	case OFFER_OPEN:
	case OFFER_TURN:
	case OFFER_FILLING:
		return coverage_withdraw(coverage_of(p, o), handle_of(p, o));
	case OFFER_FREE:
	case OFFER_FOLDING:
		break;
	}
	return false;
}

static int on_withdraw(struct peer *p, const struct msg_withdraw *m)
{
	struct offer *o = find(p, m->offer);
	uint32_t piece;

	if (!o || !take_back(p, o))
		return 0;
	piece = o->piece;
	finish(p, o, OFFER_CLOSED);
	/* Its sum may be another's now. */
	if (p->shard->phase == STEP_REDUCE)
		reduce_pump(p->shard, piece);
	return 0;
}

void inbox_withdraw_all(struct peer *p)
{
	for (uint32_t i = 0; i < PEER_OFFERS; i++) {
		struct offer *o = &p->offer[i];
		bool open = o->stage != OFFER_EARLY && o->stage != OFFER_FREE;

		if (take_back(p, o))
			release(p, o);
		if (open)
			reduce_pump(p->shard, o->piece);
	}
}

void inbox_notice(struct peer *p, uint32_t imm)
{
	struct offer *o = p->filling == PEER_NONE ? NULL : &p->offer[p->filling];
	uint32_t slice = o ? imm - o->imm : 0;

	if (!o || o->stage != OFFER_FILLING || slice >= o->slices || p->slices_seen[slice / 64] >> slice % 64 & 1) {
		count(&p->shard->count.notices_stale, 1);
		return;
	}
	p->slices_seen[slice / 64] |= UINT64_C(1) << slice % 64;
	if (++o->slices_seen < o->slices)
		return;
	count(&p->shard->count.push_bytes, p->shard->store.piece[o->piece].n * sizeof(float));
	coverage_pushed(coverage_of(p, o), handle_of(p, o));
	reduce_pump(p->shard, o->piece);
}

int inbox_message(struct peer *p, const struct wire_header *h, const union wire_msg *m)
{
	if (p->state != PEER_ATTACHED)
		return peer_refuse(p, "%s before it is attached", wire_name(h->type));
	switch (h->type) {
	case WIRE_OFFER:
		return on_offer(p, &m->offer);
	case WIRE_WANT:
		return on_want(p, &m->want);
	case WIRE_WITHDRAW:
		return on_withdraw(p, &m->withdraw);
	default:
		return peer_refuse(p, "%s is not a message for a shard service", wire_name(h->type));
	}
}
