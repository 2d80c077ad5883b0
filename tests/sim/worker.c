/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A model worker. Its compute thread goes through the units forward and then
 * through the pieces backward; two gradient buffers are all it has, so it waits
 * for answers. What it computes from parameters that are being overwritten is
 * garbage, and must never count.
 */
#include "tests/sim/sim.h"

#include <inttypes.h>
#include <string.h>

#define BEAT SIM_S

/* Who comes later comes to any host. */
static uint32_t host_of(struct sim *s, uint32_t index)
{
	const struct plan *p = &s->plan;

	if (!p->per_host)
		return index / 8;
	if (index < p->n_workers)
		return index / p->per_host;
	return (uint32_t)chance_below(&s->chance, (p->n_workers - 1) / p->per_host + 1);
}

uint32_t worker_add(struct sim *s, bool steady)
{
	static const uint32_t spans[] = { 1, 1, 2, 3, 4, 8, 64, 4096 };
	uint32_t index = s->n_workers++;
	struct worker *w = &s->worker[index];

	w->index = index;
	w->here = true;
	w->steady = steady;
	w->in_place = !chance_of(&s->chance, s->plan.push_per_1000);
	w->host = host_of(s, index);
	w->slow = !steady && chance_of(&s->chance, s->plan.slow_per_1000);
	w->max_span = s->plan.max_span ? s->plan.max_span : spans[chance_below(&s->chance, ARRAY_LEN(spans))];
	sim_at(s, s->now + (steady ? 0 : chance_below(&s->chance, 20 * SIM_MS)),
	       (struct event){ .kind = EV_BEAT_WORKER, .a = index });
	return index;
}

/* -------------------------------------------------------------------- sending */

static void to_coordinator(struct sim *s, struct worker *w, struct mail *m)
{
	sim_send(s, &w->to_coord, (struct event){ .kind = EV_COORD_MAIL, .a = w->member, .mail = m });
}

static void to_owner(struct sim *s, struct worker *w, uint32_t owner, struct mail *m)
{
	sim_send(s, &w->to_owner[owner], (struct event){ .kind = EV_OFFER_MAIL, .a = w->index, .b = owner, .mail = m });
}

static uint32_t now_at(const struct sim *s, const struct worker *w)
{
	const struct plan *p = &s->plan;
	uint32_t back = w->stage - p->n_units;

	if (w->stage < p->n_units)
		return w->stage;
	/* Backward: the head's use of unit 0 first, then the units downwards. */
	if (p->two_parts && back == 0)
		return p->n_units;
	return p->n_units - 1 - (back - p->two_parts);
}

static uint32_t last_stage(const struct sim *s, const struct worker *w)
{
	return s->plan.n_units + (w->lease.kind == LEASE_TRAIN ? plan_pieces(&s->plan) : 0);
}

/* --------------------------------------------------------------------- offers */

static bool free_buffer(const struct worker *w, uint32_t *which)
{
	for (uint32_t i = 0; i < SIM_BUFFERS; i++)
		if (!w->buffer[i].busy) {
			*which = i;
			return true;
		}
	return false;
}

static bool all_answered(const struct worker *w)
{
	for (uint32_t i = 0; i < SIM_BUFFERS; i++)
		if (w->buffer[i].busy)
			return false;
	return true;
}

static void make_offer(struct sim *s, struct worker *w, uint32_t which, uint32_t owner, bool wanted)
{
	struct buffer *b = &w->buffer[which];
	struct mail *m = sim_mail(s, WIRE_OFFER);

	b->offer[owner].stage = STAGE_OFFERED;
	b->offer[owner].id = ++w->offers_made;
	b->offer[owner].wanted = wanted;
	b->unanswered++;
	m->offer = (struct msg_offer){ .step = w->step,
				       .offer = b->offer[owner].id,
				       .unit = piece_unit(&s->plan, b->piece),
				       .part = piece_part(&s->plan, b->piece),
				       .first = b->node.first,
				       .level = b->node.level,
				       .where = which,
				       .wanted = wanted };
	to_owner(s, w, owner, m);
}

void worker_offer(struct sim *s, struct worker *w, uint32_t which)
{
	uint32_t other;
	bool wanted = w->state == WORKER_DRAINING || !free_buffer(w, &other);

	for (uint32_t o = 0; o < s->plan.n_owners; o++)
		if (owner_has(s, o, w->buffer[which].piece))
			make_offer(s, w, which, o, wanted);
}

/* What still reads it would read this. */
void worker_free(struct worker *w, uint32_t which)
{
	w->buffer[which].busy = false;
	w->buffer[which].value = SIM_GARBAGE;
}

static void want_all(struct sim *s, struct worker *w)
{
	for (uint32_t i = 0; i < SIM_BUFFERS; i++)
		for (uint32_t o = 0; o < s->plan.n_owners; o++) {
			struct mail *m;

			if (w->buffer[i].offer[o].stage == STAGE_NONE || w->buffer[i].offer[o].wanted)
				continue;
			w->buffer[i].offer[o].wanted = true;
			m = sim_mail(s, WIRE_WANT);
			m->want.offer = w->buffer[i].offer[o].id;
			to_owner(s, w, o, m);
		}
}

static void withdraw_all(struct sim *s, struct worker *w)
{
	for (uint32_t i = 0; i < SIM_BUFFERS; i++)
		for (uint32_t o = 0; o < s->plan.n_owners; o++) {
			struct mail *m;

			if (w->buffer[i].offer[o].stage != STAGE_OFFERED)
				continue;
			w->buffer[i].offer[o].stage = STAGE_WITHDRAWN;
			m = sim_mail(s, WIRE_WITHDRAW);
			m->withdraw.offer = w->buffer[i].offer[o].id;
			to_owner(s, w, o, m);
		}
}

void worker_cancel(struct sim *s, struct worker *w)
{
	if (w->recalled)
		return;
	w->recalled = true;
	host_cancel(s, w);
	withdraw_all(s, w);
}

/* ---------------------------------------------------------------------- spans */

static void span_done(struct sim *s, struct worker *w, bool recalled)
{
	struct mail *m = sim_mail(s, WIRE_SPAN_DONE);
	uint32_t n = w->lease.kind == LEASE_TRAIN ? s->plan.n_micro : s->plan.n_eval;

	m->span_done = (struct msg_span_done){ .step = w->step,
					       .lease = w->lease.id,
					       .kind = w->lease.kind,
					       .first = w->lease.node.first,
					       .level = w->lease.node.level,
					       .recalled = recalled };
	if (!recalled)
		m->span_done.loss = truth_loss(w->step, w->lease.kind, w->lease.node, n);
	w->lease.id = 0;
	w->recalled = false;
	w->state = WORKER_IDLE;
	to_coordinator(s, w, m);
	chaos_chance(s, w->index);
}

static bool is_published(const struct sim *s, uint32_t unit, uint64_t version)
{
	for (uint32_t o = 0; o < s->plan.n_owners; o++)
		if (owner_has(s, o, unit) && s->owner[o].published[unit] < version)
			return false;
	return true;
}

static bool is_overwritten(const struct sim *s, uint32_t unit, uint64_t version)
{
	for (uint32_t o = 0; o < s->plan.n_owners; o++)
		if (owner_has(s, o, unit) && s->owner[o].published[unit] > version)
			return true;
	return false;
}

static void compute(struct sim *s, struct worker *w)
{
	uint64_t ns = chance_range(&s->chance, 1, s->plan.compute_ns) * (w->slow ? 30 : 1);

	w->state = WORKER_COMPUTING;
	sim_at(s, s->now + ns, (struct event){ .kind = EV_COMPUTE, .a = w->index, .c = ++w->compute_number });
}

/* The next thing of the span, as far as it goes without waiting. */
static void go_on(struct sim *s, struct worker *w)
{
	if (w->recalled || w->stage == last_stage(s, w)) {
		want_all(s, w);
		w->state = WORKER_DRAINING;
		if (all_answered(w) && host_idle(w))
			span_done(s, w, w->stage < last_stage(s, w) || w->recalled);
		return;
	}
	if (w->stage >= s->plan.n_units) {
		if (!free_buffer(w, &w->computing)) {
			want_all(s, w);
			w->state = WORKER_BLOCKED;
			return;
		}
		w->buffer[w->computing].busy = true;
		w->buffer[w->computing].lost = false;
		w->buffer[w->computing].piece = now_at(s, w);
		w->buffer[w->computing].node = w->lease.node;
		w->buffer[w->computing].value = SIM_GARBAGE;
		memset(w->buffer[w->computing].offer, 0, sizeof(w->buffer[0].offer));
	} else if (!is_published(s, w->stage, w->step - 1)) {
		w->state = WORKER_FETCHING;
		return;
	}
	compute(s, w);
}

void worker_go_on(struct sim *s, struct worker *w)
{
	go_on(s, w);
	host_stall(s, w, w->state == WORKER_BLOCKED || w->state == WORKER_DRAINING);
}

static void computed(struct sim *s, struct worker *w)
{
	struct buffer *b = &w->buffer[w->computing];

	s->last_progress = s->now;
	if (w->stage++ < s->plan.n_units) {
		worker_go_on(s, w);
		return;
	}
	if (w->recalled) {
		worker_free(w, w->computing);
	} else {
		uint32_t unit = piece_unit(&s->plan, b->piece);

		b->value = truth_node(w->step, unit, piece_part(&s->plan, b->piece), w->lease.node, s->plan.n_micro);
		if (is_overwritten(s, unit, w->step - 1))
			b->value = SIM_GARBAGE;
		if (w->board)
			host_final(s, w, w->computing);
		else
			worker_offer(s, w, w->computing);
	}
	worker_go_on(s, w);
}

void worker_published(struct sim *s)
{
	for (uint32_t i = 0; i < s->n_workers; i++) {
		struct worker *w = &s->worker[i];

		if (w->here && w->state == WORKER_FETCHING && s->now >= w->frozen_until)
			worker_go_on(s, w);
	}
}

uint64_t worker_read(const struct sim *s, uint32_t index, uint32_t where)
{
	return s->worker[index].buffer[where].value;
}

static void begin(struct sim *s, struct worker *w, uint64_t step, struct lease l)
{
	if (!l.id)
		return;
	SIM_CHECK(s, !w->lease.id && w->state == WORKER_IDLE, "worker %u gets a second lease", w->index);
	SIM_CHECK(s, l.kind == LEASE_EVAL || tree_leaves(l.node, s->plan.n_micro) <= w->max_span,
		  "worker %u gets a span longer than it can hold", w->index);
	w->lease = l;
	w->step = step;
	w->stage = 0;
	w->recalled = false;
	host_begin(s, w);
	worker_go_on(s, w);
}

/* -------------------------------------------------------------------- answers */

static bool find_offer(struct worker *w, uint32_t owner, uint64_t id, uint32_t *which)
{
	for (uint32_t i = 0; i < SIM_BUFFERS; i++)
		if (w->buffer[i].offer[owner].stage != STAGE_NONE && w->buffer[i].offer[owner].id == id) {
			*which = i;
			return true;
		}
	return false;
}

static void push(struct sim *s, struct worker *w, uint32_t owner, const struct msg_answer *a, uint64_t value)
{
	for (uint32_t i = 0; i < a->slices; i++) {
		struct mail *m = sim_mail(s, WIRE_ANSWER);

		m->value = value;
		sim_send(s, &w->fabric[owner],
			 (struct event){ .kind = EV_NOTICE, .a = w->index, .b = owner, .c = a->imm + i, .mail = m });
	}
}

static void on_answer(struct sim *s, struct worker *w, uint32_t owner, const struct msg_answer *a)
{
	struct buffer *b;
	uint32_t which;

	if (!find_offer(w, owner, a->offer, &which)) {
		sim_fail(s, "worker %u: an answer to an offer that has one", w->index);
		return;
	}
	b = &w->buffer[which];
	if (a->verdict == OFFER_GRANTED) {
		if (b->offer[owner].stage == STAGE_WITHDRAWN)
			return;
		b->offer[owner].stage = STAGE_GRANTED;
		push(s, w, owner, a, b->value);
		return;
	}
	b->lost |= a->verdict == OFFER_CLOSED && b->offer[owner].stage == STAGE_WITHDRAWN;
	b->offer[owner].stage = STAGE_NONE;
	if (--b->unanswered)
		return;
	host_answered(s, w, which);
	worker_free(w, which);
	if (w->state == WORKER_BLOCKED || w->state == WORKER_DRAINING)
		worker_go_on(s, w);
}

/* --------------------------------------------------------------------- events */

static void on_epoch(struct sim *s, struct worker *w)
{
	host_epoch(s, w);
	if (w->attached_told)
		return;
	w->attached_told = true;
	for (uint32_t o = 0; o < s->plan.n_owners; o++)
		to_owner(s, w, o, sim_mail(s, WIRE_ATTACHED));
}

static void on_attached(struct sim *s, struct worker *w, uint32_t owner)
{
	struct mail *m;

	w->attached |= 1u << owner;
	if (w->attached != (1u << s->plan.n_owners) - 1)
		return;
	m = sim_mail(s, WIRE_READY);
	m->ready = (struct msg_ready){ .max_span = w->max_span, .data_fingerprint = 7 };
	to_coordinator(s, w, m);
}

static void on_recall(struct sim *s, struct worker *w, uint64_t lease)
{
	if (!w->lease.id || w->lease.id != lease || w->recalled)
		return;
	worker_cancel(s, w);
	if (w->state != WORKER_COMPUTING)
		worker_go_on(s, w);
}

static void from_coordinator(struct sim *s, struct worker *w, const struct mail *m)
{
	const struct msg_step *t = &m->step;

	switch (m->type) {
	case WIRE_WELCOME:
		w->member = m->who.member;
		host_open(s, w);
		break;
	case WIRE_MEMBER:
		if (m->who.role == ROLE_WORKER)
			host_listed(s, w, m->who.member);
		break;
	case WIRE_EPOCH:
		on_epoch(s, w);
		break;
	case WIRE_STEP:
		if (t->has_open)
			begin(s, w, t->open_step,
			      (struct lease){ .id = t->lease,
					      .kind = t->lease_kind,
					      .node = { t->lease_first, t->lease_level } });
		break;
	case WIRE_LEASE:
		begin(s, w, m->lease.step,
		      (struct lease){ .id = m->lease.lease,
				      .kind = m->lease.kind,
				      .node = { m->lease.first, m->lease.level } });
		break;
	case WIRE_RECALL:
		on_recall(s, w, m->recall.lease);
		break;
	case WIRE_SHUTDOWN:
		w->here = false;
		break;
	default:
		break;
	}
}

void worker_kill(struct sim *s, uint32_t index)
{
	struct worker *w = &s->worker[index];

	if (!w->here)
		return;
	sim_trace(s, "worker %u (member %u) dies with lease %" PRIu64 " [%u, level %u]", index, w->member, w->lease.id,
		  w->lease.node.first, w->lease.node.level);
	w->here = false;
	host_died(s, w);
	if (w->member)
		sim_send(s, &w->to_coord, (struct event){ .kind = EV_COORD_LOST, .a = w->member });
}

static void beat(struct sim *s, struct worker *w)
{
	if (!w->registered)
		shell_register(s, ROLE_WORKER, w->index);
	else if (w->member)
		to_coordinator(s, w, sim_mail(s, WIRE_HEARTBEAT));
	w->registered = true;
	sim_at(s, s->now + BEAT, (struct event){ .kind = EV_BEAT_WORKER, .a = w->index });
}

/* A frozen process finds everything that came in the meantime, in order, when it goes on. */
static bool is_frozen(struct sim *s, const struct worker *w, const struct event *e)
{
	struct event again = *e;

	if (s->now >= w->frozen_until)
		return false;
	if (e->mail) {
		again.mail = sim_mail(s, e->mail->type);
		*again.mail = *e->mail;
	}
	sim_at(s, w->frozen_until, again);
	return true;
}

void worker_event(struct sim *s, const struct event *e)
{
	struct worker *w = &s->worker[e->a];

	if (!w->here || is_frozen(s, w, e))
		return;
	switch (e->kind) {
	case EV_WORKER_MAIL:
		from_coordinator(s, w, e->mail);
		break;
	case EV_ANSWER_MAIL:
		if (e->mail->type == WIRE_ATTACHED)
			on_attached(s, w, e->b);
		else
			on_answer(s, w, e->b, &e->mail->answer);
		break;
	case EV_COMPUTE:
		if (e->c == w->compute_number && w->state == WORKER_COMPUTING)
			computed(s, w);
		break;
	case EV_THAW:
		if (w->state == WORKER_FETCHING)
			worker_go_on(s, w);
		break;
	case EV_GIVE_BACK:
		on_recall(s, w, w->lease.id);
		break;
	case EV_BEAT_WORKER:
		beat(s, w);
		break;
	default:
		host_event(s, e);
	}
	if (w->here)
		host_run(s, w);
}
