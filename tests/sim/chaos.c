/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Who dies, stops and comes, and when: at random moments, and at moments where
 * it hurts (something of a span was taken and something was not; somebody is
 * starved for what this one computes). Worker 0 is spared, so that the job can
 * always end.
 */
#include "tests/sim/sim.h"

#include <inttypes.h>

static uint64_t moment(struct sim *s)
{
	const struct plan *p = &s->plan;
	uint64_t work = p->steps * (p->n_micro / p->n_workers + 1) * p->n_units * 2 * (p->compute_ns + p->latency_ns);

	return s->now + 1 + chance_below(&s->chance, work + 50 * SIM_MS);
}

void chaos_begin(struct sim *s)
{
	for (uint32_t i = 0; i < s->plan.joins; i++)
		sim_at(s, moment(s), (struct event){ .kind = EV_JOIN });
	for (uint32_t i = 0; i < s->plan.freezes; i++)
		sim_at(s, moment(s), (struct event){ .kind = EV_FREEZE });
	for (uint32_t i = 0; i < s->plan.partings; i++)
		sim_at(s, moment(s), (struct event){ .kind = EV_PART });
	for (uint32_t i = 0; i < s->plan.kills / 2; i++)
		sim_at(s, moment(s), (struct event){ .kind = EV_CHAOS });
}

static void kill_later(struct sim *s, uint32_t worker)
{
	if (s->kills >= s->plan.kills || worker == 0 || !s->worker[worker].here)
		return;
	s->kills++;
	sim_at(s, s->now + chance_below(&s->chance, chance_of(&s->chance, 500) ? 2 * s->plan.latency_ns : SIM_US),
	       (struct event){ .kind = EV_KILL, .a = worker });
	if (chance_of(&s->chance, 500) && s->n_workers < s->max_workers)
		sim_at(s, moment(s), (struct event){ .kind = EV_JOIN });
}

void chaos_chance(struct sim *s, uint32_t worker)
{
	if (!s->plan.at_sums && chance_of(&s->chance, s->plan.kill_per_1000))
		kill_later(s, worker);
}

/* From a moment to longer than the coordinator waits. */
static void freeze(struct sim *s, uint32_t worker)
{
	static const uint64_t long_ns[] = { SIM_MS, 100 * SIM_MS, 2 * SIM_S, 15 * SIM_S };
	struct worker *w = &s->worker[worker];

	if (worker == 0 || !w->here || s->now < w->frozen_until)
		return;
	s->freezes++;
	w->frozen_until = (s->now + long_ns[chance_below(&s->chance, ARRAY_LEN(long_ns))]) | 1;
	sim_trace(s, "worker %u is frozen until %.6f", worker, (double)w->frozen_until * 1e-9);
	sim_at(s, w->frozen_until, (struct event){ .kind = EV_THAW, .a = worker });
}

static void freeze_once_more(struct sim *s, uint32_t worker)
{
	if (s->freezes < s->plan.freezes + s->plan.kills)
		freeze(s, worker);
}

/* The coordinator takes a span back whenever its worker says so. */
static void give_back_later(struct sim *s, uint32_t worker)
{
	if (s->returned == s->plan.returned)
		return;
	s->returned++;
	sim_at(s, s->now + chance_below(&s->chance, s->plan.latency_ns * 2),
	       (struct event){ .kind = EV_GIVE_BACK, .a = worker });
}

void chaos_at_sum(struct sim *s, uint32_t worker)
{
	if (!chance_of(&s->chance, s->plan.kill_per_1000))
		return;
	if (chance_of(&s->chance, 500))
		kill_later(s, worker);
	else if (chance_of(&s->chance, 600))
		freeze_once_more(s, worker);
	else
		give_back_later(s, worker);
}

void chaos_event(struct sim *s, const struct event *e)
{
	uint32_t any = (uint32_t)chance_below(&s->chance, s->n_workers);

	switch (e->kind) {
	case EV_KILL:
		worker_kill(s, e->a);
		/* The first step waits for a number of them. */
		if (coord_now(s->coord).phase == PHASE_GATHER)
			sim_at(s, moment(s), (struct event){ .kind = EV_JOIN });
		break;
	case EV_CHAOS:
		kill_later(s, any);
		break;
	case EV_FREEZE:
		if (coord_now(s->coord).phase == PHASE_GATHER)
			sim_at(s, moment(s), *e);
		else
			freeze(s, any);
		break;
	case EV_PART:
		host_part(s, &s->worker[any]);
		break;
	default:
		if (s->n_workers == s->max_workers)
			return;
		s->joins++;
		sim_trace(s, "worker %u joins", worker_add(s, false));
	}
}
