/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a model shard service does with its coverages' decisions. Folds wait in
 * one queue and are executed in order, some time later, on what lies there then:
 * a buffer that was reused too early, or a sum that was given back and taken by
 * somebody else, shows as a wrong root. A sum that is given back is poisoned
 * once the queue has got so far.
 */
#include "tests/sim/sim.h"

#include <inttypes.h>
#include <stdlib.h>

/* ---------------------------------------------------------------------- sums */

static uint32_t take_sum(void *ctx, bool must)
{
	struct owner *o = ctx;
	struct sim *s = o->sim;
	uint32_t sum;

	if (!must && o->pool_in_use >= s->plan.pool)
		return COVERAGE_NO_SUM;
	if (!o->n_pool_free) {
		sim_fail(s, "owner %u: %u sums are in use", o->index, o->pool_in_use);
		abort();
	}
	sum = o->pool_free[--o->n_pool_free];
	SIM_CHECK(s, !o->pool_used[sum], "owner %u: sum %u taken twice", o->index, sum);
	o->pool_used[sum] = true;
	o->pool_in_use++;
	s->spilled += o->pool_in_use > s->plan.pool;
	if (o->pool_in_use > s->max_in_use)
		s->max_in_use = o->pool_in_use;
	return sum;
}

static void give_sum(void *ctx, uint32_t sum)
{
	struct owner *o = ctx;

	SIM_CHECK(o->sim, sum && sum < o->n_pool && o->pool_used[sum], "owner %u: sum %u given back twice", o->index,
		  sum);
	o->pool_used[sum] = false;
	o->pool_in_use--;
	o->pool_free[o->n_pool_free++] = sum;
	o->given[o->n_given++] = sum;
}

static uint64_t *sum_at(struct owner *o, uint32_t piece, uint32_t sum)
{
	return sum ? &o->pool_value[sum] : &o->piece[piece].accumulator;
}

/* --------------------------------------------------------------------- queue */

static void next_job(struct sim *s, const struct owner *o)
{
	const struct job *j = &o->jobs[o->job_first];
	uint64_t ns = j->kind == JOB_FOLD || j->kind == JOB_APPLY ? chance_range(&s->chance, 1, s->plan.fold_ns) : 0;

	sim_at(s, s->now + ns, (struct event){ .kind = EV_STREAM, .a = o->index });
}

static void grow(struct owner *o)
{
	struct job *jobs = malloc(2 * o->max_jobs * sizeof(*jobs));

	if (!jobs)
		abort();
	for (uint32_t i = 0; i < o->n_jobs; i++)
		jobs[i] = o->jobs[(o->job_first + i) % o->max_jobs];
	free(o->jobs);
	o->jobs = jobs;
	o->job_first = 0;
	o->max_jobs *= 2;
}

void owner_queue(struct sim *s, struct owner *o, struct job j)
{
	if (o->n_jobs == o->max_jobs)
		grow(o);
	o->jobs[(o->job_first + o->n_jobs++) % o->max_jobs] = j;
	if (o->n_jobs == 1)
		next_job(s, o);
}

static void poison_given(struct sim *s, struct owner *o)
{
	for (uint32_t i = 0; i < o->n_given; i++)
		owner_queue(s, o, (struct job){ .kind = JOB_POISON, .dst = o->given[i] });
	o->n_given = 0;
}

/* ----------------------------------------------------------------- execution */

static uint64_t operand_value(struct sim *s, struct owner *o, uint32_t piece, const struct operand *x)
{
	const struct taken *t;
	uint32_t worker;
	uint64_t value;

	if (x->kind == OPERAND_SUM)
		return *sum_at(o, piece, x->sum);
	t = owner_taken(s, o, x->offer, &worker);
	value = s->worker[worker].in_place ? worker_read(s, worker, t->where) : o->peer[worker].inbox;
	SIM_CHECK(s,
		  value == truth_node(o->step, piece_unit(&s->plan, piece), piece_part(&s->plan, piece), t->node,
				      s->plan.n_micro),
		  "owner %u step %" PRIu64 " piece %u: worker %u's offer of [%u, level %u] is not there any more",
		  o->index, o->step, piece, worker, t->node.first, t->node.level);
	return value;
}

static void run_fold(struct sim *s, struct owner *o, const struct job *j)
{
	uint64_t value = operand_value(s, o, j->piece, &j->a);

	if (j->b.kind != OPERAND_NONE)
		value = truth_add(value, operand_value(s, o, j->piece, &j->b));
	*sum_at(o, j->piece, j->dst) = value;
	for (int i = 0; i < 2; i++) {
		const struct operand *x = i ? &j->b : &j->a;
		uint32_t worker;

		if (x->kind != OPERAND_OFFER)
			continue;
		(void)owner_taken(s, o, x->offer, &worker);
		owner_verdict(s, o, x->offer, OFFER_TAKEN);
		chaos_chance(s, worker);
	}
}

static void run_root(struct sim *s, struct owner *o, const struct job *j)
{
	uint32_t unit = piece_unit(&s->plan, j->piece), part = piece_part(&s->plan, j->piece);
	uint64_t want = truth_node(o->step, unit, part, tree_root(s->plan.n_micro), s->plan.n_micro);

	SIM_CHECK(s, o->piece[j->piece].accumulator == want, "owner %u step %" PRIu64 " unit %u part %u: wrong root",
		  o->index, o->step, unit, part);
	if (--o->parts_open[unit] || --o->units_open)
		return;
	owner_seal(s, o);
	for (uint32_t i = 0; i < plan_pieces(&s->plan); i++) {
		if (!o->piece[i].mine)
			continue;
		coverage_close(&o->piece[i].coverage);
		o->piece[i].dirty = true;
		owner_pump(s, o, i);
	}
	SIM_CHECK(s, o->pool_in_use == 0, "owner %u step %" PRIu64 ": %u sums are leaked", o->index, o->step,
		  o->pool_in_use);
}

static void run_apply(struct sim *s, struct owner *o, const struct job *j)
{
	struct mail *m;

	o->published[j->piece] = j->step;
	worker_published(s);
	if (j->piece + 1 < s->plan.n_units)
		return;
	m = sim_mail(s, WIRE_APPLIED);
	m->applied = (struct msg_applied){ .step = j->step,
					   .has_hash = 1,
					   .hash_lo = truth_hash(j->step, o->index).lo,
					   .hash_hi = truth_hash(j->step, o->index).hi };
	owner_send(s, o, m);
}

void owner_job_done(struct sim *s, struct owner *o)
{
	struct job j = o->jobs[o->job_first];

	o->job_first = (o->job_first + 1) % o->max_jobs;
	o->n_jobs--;
	if (o->n_jobs)
		next_job(s, o);
	switch (j.kind) {
	case JOB_FOLD:
		run_fold(s, o, &j);
		break;
	case JOB_ROOT:
		run_root(s, o, &j);
		break;
	case JOB_POISON:
		o->pool_value[j.dst] = SIM_GARBAGE;
		break;
	case JOB_APPLY:
		run_apply(s, o, &j);
	}
}

/* -------------------------------------------------------------------- checks */

static uint32_t log2_up(uint32_t n)
{
	return n <= 1 ? 0 : 32 - (uint32_t)__builtin_clz(n - 1);
}

/* What is held is disjoint and in order; ceil(log2 spans) sums before the lowest missing leaf and K behind it. */
static void check_held(struct sim *s, const struct owner *o, const struct coverage *c)
{
	uint32_t leaf = 0, end = 0, before = 0, spans, right;

	for (uint32_t i = 0; i < c->n_held; i++) {
		struct tree_node n = c->held[i].node;

		SIM_CHECK(s, tree_valid(n, c->n_micro) && n.first >= end, "owner %u: held nodes overlap", o->index);
		end = n.first + tree_leaves(n, c->n_micro);
		if (n.first == leaf && before == i) {
			leaf = end;
			before++;
		}
	}
	right = c->n_held - before;
	for (uint32_t i = 0; i < c->n_by_node; i++) {
		const struct coverage_offer *x = &c->offer[c->by_node[i]];

		right += x->sum != COVERAGE_NO_SUM && x->node.first > leaf;
	}
	spans = (c->n_micro + s->shortest - 1) / s->shortest;
	SIM_CHECK(s, coverage_complete(c) || before <= log2_up(spans), "owner %u: %u sums before leaf %u of %u spans",
		  o->index, before, leaf, spans);
	SIM_CHECK(s, right <= c->max_held, "owner %u: %u sums beyond leaf %u, K %u", o->index, right, leaf,
		  c->max_held);
}

/* --------------------------------------------------------------------- pump */

static void mark_folding(struct sim *s, struct owner *o, const struct operand *x, uint32_t piece)
{
	struct taken *t;
	uint32_t worker;

	if (x->kind != OPERAND_OFFER)
		return;
	t = owner_taken(s, o, x->offer, &worker);
	SIM_CHECK(s, t->stage == TAKEN_OPEN || t->stage == TAKEN_FILLING, "owner %u folds what it does not have",
		  o->index);
	SIM_CHECK(s, s->worker[worker].in_place || t->stage == TAKEN_FILLING, "owner %u folds what was not pushed",
		  o->index);
	SIM_CHECK(s, t->piece == piece && t->step == o->step, "owner %u folds another piece's offer", o->index);
	t->stage = TAKEN_FOLDING;
}

static void tell_starved(struct sim *s, struct owner *o, uint32_t piece)
{
	struct piece_state *p = &o->piece[piece];
	struct tree_node n;
	struct mail *m;

	if (o->sealed || !coverage_starved(&p->coverage) || !coverage_lowest_missing(&p->coverage, &n)) {
		p->told = false;
		return;
	}
	if (p->told && tree_equal(p->told_node, n))
		return;
	p->told = true;
	p->told_node = n;
	m = sim_mail(s, WIRE_STARVED);
	m->starved = (struct msg_starved){ .step = o->step,
					   .unit = piece_unit(&s->plan, piece),
					   .part = piece_part(&s->plan, piece),
					   .first = n.first,
					   .level = n.level };
	owner_send(s, o, m);
	s->starved++;
	for (uint32_t i = 0; i < s->n_workers; i++) {
		const struct worker *w = &s->worker[i];

		if (w->lease.id && w->lease.kind == LEASE_TRAIN && w->lease.node.first == n.first)
			chaos_chance(s, i);
	}
}

static void carry_out(struct sim *s, struct owner *o, uint32_t piece, const struct coverage_action *a)
{
	if (a->type == COVERAGE_ANSWER) {
		owner_verdict(s, o, a->offer, a->verdict);
	} else if (a->type == COVERAGE_ROOT) {
		owner_queue(s, o, (struct job){ .kind = JOB_ROOT, .piece = piece });
	} else {
		SIM_CHECK(s, !a->dst || o->pool_used[a->dst], "owner %u folds into a sum it does not have", o->index);
		mark_folding(s, o, &a->a, piece);
		mark_folding(s, o, &a->b, piece);
		owner_queue(s, o,
			    (struct job){ .kind = JOB_FOLD, .piece = piece, .dst = a->dst, .a = a->a, .b = a->b });
	}
	poison_given(s, o);
}

/* Now and then an owner has no room for more decisions, and goes on later. */
static bool leaves_it(struct sim *s, struct owner *o, struct piece_state *p)
{
	if (o->sealed || !chance_of(&s->chance, s->plan.defer_per_1000))
		return false;
	p->dirty = true;
	sim_at(s, s->now + chance_below(&s->chance, s->plan.fold_ns * 4),
	       (struct event){ .kind = EV_PUMP, .a = o->index });
	return true;
}

void owner_pump(struct sim *s, struct owner *o, uint32_t piece)
{
	struct piece_state *p = &o->piece[piece];
	struct coverage_action a;

	poison_given(s, o); /* by a withdrawal */
	if (p->dirty && !o->sealed)
		return;
	p->dirty = false;
	while (!s->failed && !leaves_it(s, o, p) && coverage_next(&p->coverage, &a)) {
		s->last_progress = s->now;
		carry_out(s, o, piece, &a);
	}
	if (!p->dirty)
		check_held(s, o, &p->coverage);
	tell_starved(s, o, piece);
}

void owner_open_pieces(struct sim *s, struct owner *o, uint32_t n_micro)
{
	const struct coverage_sums sums = { .take = take_sum, .give = give_sum, .ctx = o };

	SIM_CHECK(s, o->pool_in_use == 0, "owner %u: a step opens while sums are in use", o->index);
	o->units_open = 0;
	for (uint32_t u = 0; u < s->plan.n_units; u++)
		o->parts_open[u] = 0;
	for (uint32_t i = 0; i < plan_pieces(&s->plan); i++) {
		struct piece_state *p = &o->piece[i];

		if (!p->mine)
			continue;
		coverage_init(&p->coverage, n_micro, s->plan.max_held, &sums, p->memory, s->max_workers);
		p->told = p->dirty = false;
		if (!o->parts_open[piece_unit(&s->plan, i)]++)
			o->units_open++;
	}
}
