/* SPDX-License-Identifier: Apache-2.0 */
/* A model shard service: views, offers, inboxes, steps. What is decided about sums is owner_fold.c's. */
#include "tests/sim/sim.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define BEAT SIM_S
#define SLOT_BITS 4
#define WORKER_BITS 16

bool owner_has(const struct sim *s, uint32_t owner, uint32_t piece)
{
	return s->plan.owns[piece] >> owner & 1;
}

int owner_open(struct sim *s, uint32_t index)
{
	struct owner *o = &s->owner[index];

	o->sim = s;
	o->index = index;
	o->max_jobs = 64;
	/* Sums beyond the pool's size exist for those that must have one. */
	o->n_pool = s->plan.pool + SIM_PIECES_MAX * (COVERAGE_HELD_MAX + s->max_workers) + 1;
	o->peer = calloc(s->max_workers, sizeof(*o->peer));
	o->pool_value = calloc(o->n_pool, sizeof(*o->pool_value));
	o->pool_used = calloc(o->n_pool, sizeof(*o->pool_used));
	o->pool_free = calloc(o->n_pool, sizeof(*o->pool_free));
	o->jobs = calloc(o->max_jobs, sizeof(*o->jobs));
	if (!o->peer || !o->pool_value || !o->pool_used || !o->pool_free || !o->jobs)
		return -1;
	for (uint32_t i = o->n_pool - 1; i > 0; i--)
		o->pool_free[o->n_pool_free++] = i;
	for (uint32_t i = 0; i < s->max_workers; i++)
		o->peer[i].filling = SIM_OFFERS;
	for (uint32_t i = 0; i < plan_pieces(&s->plan); i++) {
		o->piece[i].mine = owner_has(s, index, i);
		o->piece[i].memory = malloc(coverage_bytes(s->max_workers));
		if (!o->piece[i].memory)
			return -1;
	}
	sim_at(s, chance_below(&s->chance, 20 * SIM_MS), (struct event){ .kind = EV_BEAT_OWNER, .a = index, .c = 0 });
	return 0;
}

void owner_close(struct owner *o)
{
	for (uint32_t i = 0; i < SIM_PIECES_MAX; i++)
		free(o->piece[i].memory);
	free(o->jobs);
	free(o->pool_free);
	free(o->pool_used);
	free(o->pool_value);
	free(o->peer);
}

void owner_send(struct sim *s, struct owner *o, struct mail *m)
{
	sim_send(s, &o->to_coord, (struct event){ .kind = EV_COORD_MAIL, .a = o->member, .mail = m });
}

/* ------------------------------------------------------------------- answers */

static void answer(struct sim *s, struct owner *o, uint32_t worker, const struct taken *t, enum offer_verdict verdict)
{
	struct mail *m = sim_mail(s, WIRE_ANSWER);

	m->answer = (struct msg_answer){ .offer = t->id, .verdict = verdict, .slices = t->slices, .imm = t->imm };
	sim_send(s, &s->worker[worker].from_owner[o->index],
		 (struct event){ .kind = EV_ANSWER_MAIL, .a = worker, .b = o->index, .mail = m });
}

/* A worker has one inbox with an owner: of several granted pushes the first has its turn. */
static void next_turn(struct sim *s, struct owner *o, uint32_t worker)
{
	struct peer *p = &o->peer[worker];
	uint32_t first = SIM_OFFERS;

	if (p->filling != SIM_OFFERS)
		return;
	for (uint32_t i = 0; i < SIM_OFFERS; i++)
		if (p->taken[i].stage == TAKEN_TURN &&
		    (first == SIM_OFFERS || p->taken[i].order < p->taken[first].order))
			first = i;
	if (first == SIM_OFFERS)
		return;
	p->filling = first;
	p->taken[first].stage = TAKEN_FILLING;
	p->taken[first].slices = (uint32_t)chance_range(&s->chance, 1, 3);
	p->taken[first].seen = 0;
	p->taken[first].imm = p->next_imm;
	p->next_imm += p->taken[first].slices;
	answer(s, o, worker, &p->taken[first], OFFER_GRANTED);
}

static void release(struct sim *s, struct owner *o, uint32_t worker, struct taken *t)
{
	struct peer *p = &o->peer[worker];

	t->stage = TAKEN_NONE;
	if (p->filling != (uint32_t)(t - p->taken))
		return;
	p->filling = SIM_OFFERS;
	next_turn(s, o, worker);
}

static void finish(struct sim *s, struct owner *o, uint32_t worker, struct taken *t, enum offer_verdict verdict)
{
	if (o->peer[worker].view == PEER_HERE)
		answer(s, o, worker, t, verdict);
	release(s, o, worker, t);
}

struct taken *owner_taken(struct sim *s, struct owner *o, uint64_t handle, uint32_t *worker)
{
	struct taken *t;

	*worker = (uint32_t)(handle >> SLOT_BITS) & ((1u << WORKER_BITS) - 1);
	t = &o->peer[*worker].taken[handle & ((1u << SLOT_BITS) - 1)];
	SIM_CHECK(s, t->stage != TAKEN_NONE && t->handle == handle, "owner %u acts on an offer that is gone", o->index);
	return t;
}

void owner_verdict(struct sim *s, struct owner *o, uint64_t handle, enum offer_verdict verdict)
{
	uint32_t worker;
	struct taken *t = owner_taken(s, o, handle, &worker);

	if (verdict != OFFER_GRANTED) {
		finish(s, o, worker, t, verdict);
		return;
	}
	SIM_CHECK(s, t->stage == TAKEN_OPEN && !s->worker[worker].in_place, "owner %u grants what it should not",
		  o->index);
	t->stage = TAKEN_TURN;
	t->order = o->offers_seen++;
	next_turn(s, o, worker);
}

/* -------------------------------------------------------------------- offers */

static void take_up(struct sim *s, struct owner *o, uint32_t worker, struct taken *t)
{
	struct piece_state *p = &o->piece[t->piece];
	int rc;

	/* Handles grow with time: whoever wants to serve in order of arrival can. */
	t->handle = (o->offers_seen++ << (SLOT_BITS + WORKER_BITS)) | worker << SLOT_BITS |
		    (uint64_t)(t - o->peer[worker].taken);
	t->stage = TAKEN_OPEN;
	rc = coverage_offer(&p->coverage, t->handle, t->node, s->worker[worker].in_place, t->wanted);
	SIM_CHECK(s, rc == 0, "owner %u: offer refused: %d", o->index, rc);
	owner_pump(s, o, t->piece);
}

static void on_offer(struct sim *s, struct owner *o, uint32_t worker, const struct msg_offer *m)
{
	struct peer *p = &o->peer[worker];
	struct taken *t = p->taken;
	bool early = m->step > o->step;

	while (t < p->taken + SIM_OFFERS && t->stage != TAKEN_NONE)
		t++;
	if (t == p->taken + SIM_OFFERS) {
		sim_fail(s, "worker %u has too many offers at owner %u", worker, o->index);
		return;
	}
	*t = (struct taken){ .stage = TAKEN_EARLY,
			     .id = m->offer,
			     .step = m->step,
			     .where = (uint32_t)m->where,
			     .node = { m->first, m->level },
			     .wanted = m->wanted,
			     .piece = m->part ? s->plan.n_units : m->unit };
	if (!early && (m->step != o->step || o->sealed))
		finish(s, o, worker, t, OFFER_CLOSED);
	else if (!early)
		take_up(s, o, worker, t);
}

static struct taken *find(struct peer *p, uint64_t id)
{
	for (uint32_t i = 0; i < SIM_OFFERS; i++)
		if (p->taken[i].stage != TAKEN_NONE && p->taken[i].id == id)
			return &p->taken[i];
	return NULL;
}

static bool is_open(const struct taken *t)
{
	return t->stage == TAKEN_OPEN || t->stage == TAKEN_TURN || t->stage == TAKEN_FILLING;
}

static void on_want(struct sim *s, struct owner *o, uint32_t worker, uint64_t id)
{
	struct taken *t = find(&o->peer[worker], id);

	if (!t)
		return;
	t->wanted = true;
	if (!is_open(t))
		return;
	coverage_want(&o->piece[t->piece].coverage, t->handle);
	owner_pump(s, o, t->piece);
}

static bool take_back(struct owner *o, struct taken *t)
{
	return t->stage == TAKEN_EARLY || (is_open(t) && coverage_withdraw(&o->piece[t->piece].coverage, t->handle));
}

static void on_withdraw(struct sim *s, struct owner *o, uint32_t worker, uint64_t id)
{
	struct taken *t = find(&o->peer[worker], id);
	bool open = t && is_open(t);

	if (!t || !take_back(o, t))
		return;
	finish(s, o, worker, t, OFFER_CLOSED);
	if (open)
		owner_pump(s, o, t->piece);
}

static void on_notice(struct sim *s, struct owner *o, uint32_t worker, uint32_t imm, uint64_t value)
{
	struct peer *p = &o->peer[worker];
	struct taken *t;

	if (p->view == PEER_GONE)
		return;
	/* Whatever it belongs to, its bytes land in the inbox. */
	p->inbox = SIM_GARBAGE;
	t = p->filling == SIM_OFFERS ? NULL : &p->taken[p->filling];
	if (!t || t->stage != TAKEN_FILLING || imm - t->imm >= t->slices)
		return;
	if (++t->seen < t->slices)
		return;
	p->inbox = value;
	coverage_pushed(&o->piece[t->piece].coverage, t->handle);
	owner_pump(s, o, t->piece);
}

/* --------------------------------------------------------------------- views */

static void attached(struct sim *s, struct owner *o, uint32_t worker)
{
	o->peer[worker].attach_asked = false;
	sim_send(s, &s->worker[worker].from_owner[o->index],
		 (struct event){
			 .kind = EV_ANSWER_MAIL, .a = worker, .b = o->index, .mail = sim_mail(s, WIRE_ATTACHED) });
}

static void drop_peer(struct sim *s, struct owner *o, uint32_t worker)
{
	struct peer *p = &o->peer[worker];

	p->view = PEER_GONE;
	for (uint32_t i = 0; i < SIM_OFFERS; i++) {
		struct taken *t = &p->taken[i];
		bool open = is_open(t);

		if (!take_back(o, t))
			continue;
		t->stage = TAKEN_NONE;
		if (open)
			owner_pump(s, o, t->piece);
	}
}

static void send_vote(struct sim *s, struct owner *o)
{
	struct mail *m = sim_mail(s, WIRE_VOTE);
	struct exact_sum sum;

	exact_sum_clear(&sum);
	for (uint32_t u = 0; u < s->plan.n_units; u++)
		if (o->piece[u].mine)
			exact_sum_add(&sum, truth_square(o->step, o->index, u));
	m->vote.step = o->step;
	memcpy(m->vote.square_sum, &sum, sizeof(sum));
	owner_send(s, o, m);
}

void owner_seal(struct sim *s, struct owner *o)
{
	o->sealed = true;
	s->votes_told[o->index] = o->step;
	send_vote(s, o);
}

static void on_epoch(struct sim *s, struct owner *o)
{
	for (uint32_t i = 0; i < s->n_workers; i++) {
		struct peer *p = &o->peer[i];

		if (p->listed && p->view == PEER_UNKNOWN)
			p->view = PEER_HERE;
		else if (!p->listed && p->view == PEER_HERE)
			drop_peer(s, o, i);
		if (p->attach_asked && p->view == PEER_HERE)
			attached(s, o, i);
		p->listed = false;
	}
	if (!o->ready_told) {
		struct mail *m = sim_mail(s, WIRE_READY);

		o->ready_told = true;
		owner_send(s, o, m);
	}
	/* Rule 9: the vote is repeated at every new epoch. */
	if (o->sealed && o->step > o->version && o->step <= s->plan.steps)
		send_vote(s, o);
}

/* --------------------------------------------------------------------- steps */

static void open_step(struct sim *s, struct owner *o, const struct msg_step *m)
{
	SIM_CHECK(s, m->open_step == o->version + 1, "owner %u: step %" PRIu64 " opens at version %" PRIu64, o->index,
		  m->open_step, o->version);
	o->step = m->open_step;
	o->sealed = m->n_micro == 0;
	if (m->n_micro)
		owner_open_pieces(s, o, m->n_micro);
	for (uint32_t w = 0; w < s->n_workers; w++)
		for (uint32_t i = 0; i < SIM_OFFERS; i++) {
			struct taken *t = &o->peer[w].taken[i];

			if (t->stage == TAKEN_EARLY && t->step == o->step && !o->sealed)
				take_up(s, o, w, t);
		}
}

static void on_step(struct sim *s, struct owner *o, const struct msg_step *m)
{
	if (m->has_commit) {
		SIM_CHECK(s, o->sealed && m->commit_step == o->version + 1 && m->commit_step == o->step,
			  "owner %u: commit of step %" PRIu64 " at version %" PRIu64, o->index, m->commit_step,
			  o->version);
		o->version = m->commit_step;
		for (uint32_t u = 0; u < s->plan.n_units; u++)
			owner_queue(s, o, (struct job){ .kind = JOB_APPLY, .piece = u, .step = o->version });
	}
	if (m->has_open)
		open_step(s, o, m);
}

/* -------------------------------------------------------------------- events */

static void from_coordinator(struct sim *s, struct owner *o, const struct mail *m)
{
	switch (m->type) {
	case WIRE_MEMBER:
		if (m->who.role == ROLE_WORKER)
			o->peer[s->worker_of[m->who.member]].listed = true;
		break;
	case WIRE_EPOCH:
		on_epoch(s, o);
		break;
	case WIRE_STEP:
		on_step(s, o, &m->step);
		break;
	default:
		break;
	}
}

static void from_worker(struct sim *s, struct owner *o, uint32_t worker, const struct mail *m)
{
	struct peer *p = &o->peer[worker];

	if (p->view == PEER_GONE)
		return;
	switch (m->type) {
	case WIRE_ATTACHED:
		p->attach_asked = true;
		if (p->view == PEER_HERE)
			attached(s, o, worker);
		break;
	case WIRE_OFFER:
		on_offer(s, o, worker, &m->offer);
		break;
	case WIRE_WANT:
		on_want(s, o, worker, m->want.offer);
		break;
	default:
		on_withdraw(s, o, worker, m->withdraw.offer);
	}
}

/* The first beat registers. */
static void beat(struct sim *s, struct owner *o)
{
	if (!o->registered)
		shell_register(s, ROLE_SHARD, o->index);
	else
		owner_send(s, o, sim_mail(s, WIRE_HEARTBEAT));
	o->registered = true;
	sim_at(s, s->now + BEAT, (struct event){ .kind = EV_BEAT_OWNER, .a = o->index });
}

void owner_event(struct sim *s, const struct event *e)
{
	struct owner *o = &s->owner[e->kind == EV_OFFER_MAIL || e->kind == EV_NOTICE ? e->b : e->a];

	switch (e->kind) {
	case EV_OWNER_MAIL:
		from_coordinator(s, o, e->mail);
		break;
	case EV_OFFER_MAIL:
		from_worker(s, o, e->a, e->mail);
		break;
	case EV_NOTICE:
		on_notice(s, o, e->a, (uint32_t)e->c, e->mail->value);
		break;
	case EV_STREAM:
		owner_job_done(s, o);
		break;
	case EV_PUMP:
		for (uint32_t i = 0; i < plan_pieces(&s->plan); i++)
			if (o->piece[i].dirty) {
				o->piece[i].dirty = false;
				owner_pump(s, o, i);
			}
		break;
	default:
		beat(s, o);
	}
}
