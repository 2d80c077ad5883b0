/* SPDX-License-Identifier: Apache-2.0 */
/* What lies around the coordinator: its connections, its timer, and the eyes on what it says. */
#include "tests/sim/sim.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define TICK (250 * SIM_MS)

static double learning_rate(void *ctx, uint64_t adam_t)
{
	(void)ctx;
	return 1.0 / (double)(adam_t + 1);
}

int shell_open(struct sim *s)
{
	const struct plan *p = &s->plan;
	const struct coord_config cfg = {
		.n_shards = p->n_owners,
		.n_workers = p->n_workers,
		.n_micro = p->n_micro,
		.n_eval = p->n_eval,
		.steps = p->steps,
		.eval_interval = p->eval_interval,
		.state_hash_interval = p->hash_interval,
		.tokens_per_step = 1000,
		.gradient_clipping = 1.0,
		.beta1 = 0.9,
		.beta2 = 0.999,
		.bias_correction = true,
		.lr = learning_rate,
		.heartbeat_timeout_ns = 10 * SIM_S,
		.join_timeout_ns = 120 * SIM_S,
	};

	sim_at(s, TICK, (struct event){ .kind = EV_COORD_TICK });
	if (p->stop_at_ns)
		sim_at(s, p->stop_at_ns, (struct event){ .kind = EV_STOP });
	return coord_new(&cfg, 0, &s->coord);
}

void shell_close(struct sim *s)
{
	coord_free(s->coord);
}

/* --------------------------------------------------------------------- lines */

static double expected_norm(const struct sim *s, uint64_t step)
{
	struct exact_sum sum;

	exact_sum_clear(&sum);
	for (uint32_t o = 0; o < s->plan.n_owners; o++)
		for (uint32_t u = 0; u < s->plan.n_units; u++)
			if (owner_has(s, o, u))
				exact_sum_add(&sum, truth_square(step, o, u));
	return sqrt(exact_sum_value(&sum)) / s->plan.n_micro;
}

static double expected_loss(const struct sim *s, uint64_t step, enum lease_kind kind)
{
	uint32_t n = kind == LEASE_TRAIN ? s->plan.n_micro : s->plan.n_eval;

	return truth_loss(step, kind, tree_root(n), n) / n;
}

static void check_evaluation(struct sim *s, const struct step_record *r)
{
	uint64_t version = r->step - 1, interval = s->plan.eval_interval;
	bool due = s->plan.n_eval && version && interval && version % interval == 0;

	SIM_CHECK(s, r->has_validation_loss == due, "line %" PRIu64 ": evaluation %s", r->step,
		  due ? "lost" : "made up");
	if (due && r->has_validation_loss)
		SIM_CHECK(s, r->validation_loss == expected_loss(s, r->step, LEASE_EVAL),
			  "line %" PRIu64 ": another validation loss", r->step);
}

static void check_hash(struct sim *s, const struct step_record *r)
{
	bool due = s->plan.hash_interval && r->step % s->plan.hash_interval == 0;
	struct hash128 h = { 0, 0 };

	SIM_CHECK(s, r->has_state_hash == due, "line %" PRIu64 ": state hash %s", r->step, due ? "lost" : "made up");
	for (uint32_t o = 0; o < s->plan.n_owners && due; o++)
		h = hash128_add(h, truth_hash(r->step, o));
	if (due)
		SIM_CHECK(s, r->state_hash.lo == h.lo && r->state_hash.hi == h.hi,
			  "line %" PRIu64 ": another state hash", r->step);
}

static void check_line(struct sim *s, const struct step_record *r)
{
	s->lines++;
	SIM_CHECK(s, r->step == s->lines, "line %" PRIu64 " is of step %" PRIu64, s->lines, r->step);
	SIM_CHECK(s, r->loss == expected_loss(s, r->step, LEASE_TRAIN), "line %" PRIu64 ": another loss", r->step);
	SIM_CHECK(s, r->grad_norm == expected_norm(s, r->step), "line %" PRIu64 ": another norm", r->step);
	SIM_CHECK(s, r->tokens == 1000 * r->step, "line %" PRIu64 ": another count of tokens", r->step);
	for (uint32_t o = 0; o < s->plan.n_owners; o++)
		SIM_CHECK(s, s->owner[o].published[s->plan.n_units - 1] >= r->step,
			  "line %" PRIu64 " before owner %u has applied it", r->step, o);
	check_evaluation(s, r);
	check_hash(s, r);
}

static void check_end(struct sim *s, const struct coord_action *a)
{
	uint64_t version;
	double loss;

	sim_trace(s, "finish %u: %s", a->exit_code, a->text);
	s->finished = true;
	s->exit_code = a->exit_code;
	if (s->stopped) {
		SIM_CHECK(s, a->exit_code == 130, "stopped with exit code %u: %s", a->exit_code, a->text);
		return;
	}
	SIM_CHECK(s, a->exit_code == 0, "the job failed: %s", a->text);
	SIM_CHECK(s, s->lines == s->plan.steps, "%" PRIu64 " lines of %" PRIu64, s->lines, s->plan.steps);
	if (!s->plan.n_eval)
		return;
	SIM_CHECK(s, coord_validation(s->coord, &version, &loss) && version == s->plan.steps,
		  "the last version was not evaluated");
	SIM_CHECK(s, loss == expected_loss(s, s->plan.steps + 1, LEASE_EVAL), "another last validation loss");
}

/* ------------------------------------------------------------------- actions */

/* Commit needs every owner's seal, and every micro-batch's loss is in (its line shows that). */
static void check_commit(struct sim *s, const struct msg_step *m)
{
	for (uint32_t o = 0; o < s->plan.n_owners && m->has_commit; o++)
		SIM_CHECK(s, s->votes_told[o] >= m->commit_step, "step %" PRIu64 " committed without owner %u",
			  m->commit_step, o);
}

static void note_lease(struct sim *s, uint64_t id, uint32_t kind, uint32_t first, uint32_t level)
{
	struct tree_node n = { first, level };

	if (!id || kind != LEASE_TRAIN)
		return;
	SIM_CHECK(s, tree_valid(n, s->plan.n_micro), "lease of a node that does not exist");
	if (tree_leaves(n, s->plan.n_micro) < s->shortest)
		s->shortest = tree_leaves(n, s->plan.n_micro);
}

static struct mail *mail_of(struct sim *s, const struct coord_action *a)
{
	struct mail *m = sim_mail(s, a->msg_type);

	switch (a->msg_type) {
	case WIRE_WELCOME:
		m->who.member = a->msg.welcome.member;
		break;
	case WIRE_MEMBER:
		m->who.member = a->msg.member.member;
		m->who.role = a->msg.member.role;
		break;
	case WIRE_EPOCH:
		m->epoch = a->msg.epoch;
		break;
	case WIRE_STEP:
		m->step = a->msg.step;
		check_commit(s, &m->step);
		note_lease(s, m->step.lease, m->step.lease_kind, m->step.lease_first, m->step.lease_level);
		break;
	case WIRE_LEASE:
		m->lease = a->msg.lease;
		note_lease(s, m->lease.lease, m->lease.kind, m->lease.first, m->lease.level);
		break;
	case WIRE_RECALL:
		m->recall = a->msg.recall;
		break;
	case WIRE_SHUTDOWN:
		break;
	default:
		sim_fail(s, "the coordinator sends %u", a->msg_type);
	}
	return m;
}

static void send_to(struct sim *s, const struct coord_action *a)
{
	uint32_t i;

	for (i = 0; i < s->plan.n_owners; i++) {
		if (s->owner[i].member != a->member)
			continue;
		sim_send(s, &s->owner[i].from_coord,
			 (struct event){ .kind = EV_OWNER_MAIL, .a = i, .mail = mail_of(s, a) });
		return;
	}
	if (a->msg_type == WIRE_RECALL) {
		s->recalls++;
		if (s->drop_recalls)
			return;
	}
	i = s->worker_of[a->member];
	sim_send(s, &s->worker[i].from_coord, (struct event){ .kind = EV_WORKER_MAIL, .a = i, .mail = mail_of(s, a) });
}

static void drain(struct sim *s)
{
	struct coord_action a;

	while (coord_next(s->coord, &a)) {
		switch (a.type) {
		case COORD_SEND:
			send_to(s, &a);
			break;
		case COORD_LINE:
			check_line(s, &a.record);
			sim_trace(s, "line %" PRIu64, a.record.step);
			break;
		case COORD_EXPORT:
			sim_at(s, s->now + SIM_MS, (struct event){ .kind = EV_EXPORTED });
			break;
		case COORD_FINISH:
			check_end(s, &a);
			break;
		case COORD_CLOSE:
		case COORD_NOTE:
			sim_trace(s, "coordinator: %s", a.text);
		}
	}
}

/* -------------------------------------------------------------------- events */

void shell_register(struct sim *s, enum member_role role, uint32_t index)
{
	uint32_t host = role == ROLE_WORKER ? s->worker[index].host : index / 8;
	struct msg_registration r = { .pid = 1000 + index, .host_id = host, .host = "sim", .listen = "sim:1" };
	uint32_t member;
	struct err e;

	if (coord_register(s->coord, role, &r, s->now, &member, &e)) {
		sim_trace(s, "registration of %u refused: %s", index, e.text);
		if (role == ROLE_WORKER)
			s->worker[index].here = false;
		return;
	}
	if (member > s->max_member) {
		sim_fail(s, "member id %u", member);
		return;
	}
	if (role == ROLE_SHARD)
		s->owner[index].member = member;
	else
		s->worker_of[member] = index;
	drain(s);
}

static void message(struct sim *s, const struct event *e)
{
	struct wire_header h = { .sender = e->a, .term = 1 };
	union wire_msg m;

	memset(&m, 0, sizeof(m));
	switch (e->mail->type) {
	case WIRE_READY:
		m.ready = e->mail->ready;
		break;
	case WIRE_SPAN_DONE:
		m.span_done = e->mail->span_done;
		break;
	case WIRE_VOTE:
		m.vote = e->mail->vote;
		break;
	case WIRE_APPLIED:
		m.applied = e->mail->applied;
		break;
	case WIRE_STARVED:
		m.starved = e->mail->starved;
		break;
	default:
		break;
	}
	coord_message(s->coord, e->a, &h, e->mail->type, &m, s->now);
	if (e->mail->type != WIRE_HEARTBEAT)
		s->last_progress = s->now;
}

void shell_event(struct sim *s, const struct event *e)
{
	switch (e->kind) {
	case EV_COORD_MAIL:
		message(s, e);
		break;
	case EV_COORD_LOST:
		coord_gone(s->coord, e->a, "connection closed", s->now);
		break;
	case EV_COORD_TICK:
		coord_tick(s->coord, s->now);
		sim_at(s, s->now + TICK, *e);
		break;
	case EV_STOP:
		sim_trace(s, "stop");
		s->stopped = !s->finished && coord_now(s->coord).phase < PHASE_DONE;
		coord_stop(s->coord, 130, s->now);
		break;
	case EV_EXPORTED:
		coord_exported(s->coord, 0, "written", s->now);
		break;
	default:
		sim_fail(s, "not an event of the coordinator: %d", e->kind);
	}
	drain(s);
}
