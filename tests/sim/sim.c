/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sim: whole jobs by seed.
 *
 *   sim --seeds 500                    seeds 1 to 500; the first failure is told with how to replay it
 *   sim --seed 42 --verbose            one seed, with what happens
 *   sim --workers 2000 --micro 4096    sizes over the seed's
 *   sim --per-host 4 --seeds 500       workers that add their sums on their hosts, whatever the seed says
 *   sim --expect-caught "wrong root"   for a rule that is wrong: ends well as soon as a seed fails like this
 *   sim --drop-recalls                 the wrong rule that needs no other coverage: nobody is ever called back
 *
 * A job fails when anything differs from what it must be, and when nothing has
 * happened for longer than anybody may be silent.
 */
#include "tests/sim/sim.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* Longer than a heartbeat's timeout and a frozen worker together, and than who prepares may be silent. */
#define SILENCE (90 * SIM_S)
#define EVENTS_MAX 20000000ull

struct options {
	uint64_t seed, seeds, first;
	bool verbose, drop_recalls;
	const char *caught;
	struct plan_options plan;
};
struct totals {
	uint64_t events, kills, joins, freezes, recalls, starved, spilled, lines;
	uint64_t added, alone, torn, given_back, returned, parted_living, undecided;
	uint64_t died_in[SUBTREE_OVER + 1], bereaved[SUBTREE_OVER + 1];
};

static void dispatch(struct sim *s, const struct event *e)
{
	switch (e->kind) {
	case EV_COORD_MAIL:
	case EV_COORD_LOST:
	case EV_COORD_TICK:
	case EV_EXPORTED:
	case EV_STOP:
		shell_event(s, e);
		break;
	case EV_OWNER_MAIL:
	case EV_OFFER_MAIL:
	case EV_NOTICE:
	case EV_STREAM:
	case EV_PUMP:
	case EV_BEAT_OWNER:
		owner_event(s, e);
		break;
	case EV_WORKER_MAIL:
	case EV_ANSWER_MAIL:
	case EV_COMPUTE:
	case EV_BEAT_WORKER:
	case EV_THAW:
	case EV_LOOK:
	case EV_ADDED:
	case EV_MEET:
	case EV_PARTED:
	case EV_GIVE_BACK:
		worker_event(s, e);
		break;
	case EV_KILL:
	case EV_FREEZE:
	case EV_PART:
	case EV_JOIN:
	case EV_CHAOS:
		chaos_event(s, e);
	}
}

static void run(struct sim *s)
{
	struct event e;
	char waiting[256];

	while (!s->failed && !s->finished && sim_next(s, &e)) {
		dispatch(s, &e);
		sim_mail_free(s, e.mail);
		if (s->now > s->last_progress + SILENCE || s->n_events > EVENTS_MAX) {
			coord_waiting_for(s->coord, waiting, sizeof(waiting));
			sim_fail(s, "the job does not end: it waits for %s", waiting);
		}
	}
}

static int open_world(struct sim *s)
{
	const struct plan *p = &s->plan;

	s->max_workers = p->n_workers + p->joins + 2 * p->kills;
	s->max_member = p->n_owners + s->max_workers;
	s->worker = calloc(s->max_workers, sizeof(*s->worker));
	s->worker_of = calloc(s->max_member + 1, sizeof(*s->worker_of));
	s->shortest = p->n_micro;
	if (!s->worker || !s->worker_of || shell_open(s))
		return -1;
	for (uint32_t i = 0; i < p->n_owners; i++)
		if (owner_open(s, i))
			return -1;
	for (uint32_t i = 0; i < p->n_workers; i++)
		worker_add(s, i == 0);
	chaos_begin(s);
	return 0;
}

static void close_world(struct sim *s)
{
	for (uint32_t i = 0; i < s->n_workers; i++)
		host_close(s, &s->worker[i]);
	for (uint32_t i = 0; i < s->n_heap; i++)
		sim_mail_free(s, s->heap[i].mail);
	while (s->mail_free) {
		struct mail *m = s->mail_free;

		s->mail_free = m->next;
		free(m);
	}
	for (uint32_t i = 0; i < SIM_OWNERS_MAX; i++)
		owner_close(&s->owner[i]);
	shell_close(s);
	free(s->worker_of);
	free(s->worker);
	free(s->heap);
}

static void add_up(struct totals *t, const struct sim *s)
{
	t->events += s->n_events;
	t->kills += s->kills;
	t->joins += s->joins;
	t->freezes += s->freezes;
	t->recalls += s->recalls;
	t->starved += s->starved;
	t->spilled += s->spilled;
	t->lines += s->lines;
	t->added += s->added;
	t->alone += s->alone;
	t->torn += s->torn;
	t->given_back += s->given_back;
	t->returned += s->returned;
	t->parted_living += s->parted_living;
	t->undecided += s->undecided;
	for (uint32_t i = 0; i <= SUBTREE_OVER; i++) {
		t->died_in[i] += s->died_in[i];
		t->bereaved[i] += s->bereaved[i];
	}
}

static void print_states(const char *whose, const uint64_t n[SUBTREE_OVER + 1])
{
	printf("%s: %" PRIu64 " waited, %" PRIu64 " were added to, %" PRIu64 " offered, %" PRIu64
	       " were being taken, %" PRIu64 " given, %" PRIu64 " with the owners\n",
	       whose, n[SUBTREE_WAITS], n[SUBTREE_ADDS], n[SUBTREE_OFFERED], n[SUBTREE_TAKEN], n[SUBTREE_GIVEN],
	       n[SUBTREE_PUSHED]);
}

static void print_totals(const struct totals *t, uint64_t seeds)
{
	printf("%" PRIu64 " jobs: %" PRIu64 " lines, %" PRIu64 " events, %" PRIu64 " kills, %" PRIu64 " joins, %" PRIu64
	       " freezes, %" PRIu64 " starved, %" PRIu64 " recalls, %" PRIu64 " spilled sums\n",
	       seeds, t->lines, t->events, t->kills, t->joins, t->freezes, t->starved, t->recalls, t->spilled);
	if (!t->added)
		return;
	printf("hosts: %" PRIu64 " sums added, %" PRIu64 " went alone, %" PRIu64 " torn, %" PRIu64
	       " spans given back and %" PRIu64 " without a reason, %" PRIu64 " living neighbours let go, %" PRIu64
	       " died between two looks\n",
	       t->added, t->alone, t->torn, t->given_back, t->returned, t->parted_living, t->undecided);
	print_states("sums of the dead", t->died_in);
	print_states("of their neighbours", t->bereaved);
}

/* 0, or 1 with what went wrong in why. */
static int run_seed(uint64_t seed, const struct options *o, struct totals *t, char why[512])
{
	struct sim *s = calloc(1, sizeof(*s));
	int failed;

	if (!s)
		abort();
	s->seed = seed;
	s->chance.state = seed;
	s->verbose = o->verbose;
	s->drop_recalls = o->drop_recalls;
	plan_make(&s->plan, seed, &o->plan);
	if (o->verbose)
		plan_print(&s->plan);
	if (open_world(s))
		abort();
	run(s);
	failed = s->failed;
	snprintf(why, 512, "%s", s->why);
	close_world(s);
	add_up(t, s);
	free(s);
	return failed;
}

static void print_failure(uint64_t seed, const struct options *o, const char *why)
{
	struct plan p;

	plan_make(&p, seed, &o->plan);
	printf("seed %" PRIu64 " fails: %s\n", seed, why);
	plan_print(&p);
	printf("again: the same line with --seed %" PRIu64 " --verbose instead of --seeds\n", seed);
}

static int parse(struct options *o, int argc, char **argv, struct err *e)
{
	struct opt opts[] = {
		{ .name = "seed", .kind = OPT_U64, .out = &o->seed, .arg = "N", .help = "this seed alone" },
		{ .name = "seeds", .kind = OPT_U64, .out = &o->seeds, .arg = "N", .help = "so many seeds" },
		{ .name = "first", .kind = OPT_U64, .out = &o->first, .arg = "N", .help = "the first of them" },
		{ .name = "verbose", .kind = OPT_FLAG, .out = &o->verbose, .help = "what happens" },
		{ .name = "workers", .kind = OPT_U64, .out = &o->plan.workers, .arg = "N", .help = "at first" },
		{ .name = "micro", .kind = OPT_U64, .out = &o->plan.micro, .arg = "N", .help = "micro-batches a step" },
		{ .name = "units", .kind = OPT_U64, .out = &o->plan.units, .arg = "N", .help = "of the model" },
		{ .name = "owners", .kind = OPT_U64, .out = &o->plan.owners, .arg = "N", .help = "shard services" },
		{ .name = "steps", .kind = OPT_U64, .out = &o->plan.steps, .arg = "N", .help = "of the job" },
		{ .name = "held", .kind = OPT_U64, .out = &o->plan.held, .arg = "N", .help = "K" },
		{ .name = "per-host", .kind = OPT_U64, .out = &o->plan.per_host, .arg = "N", .help = "workers" },
		{ .name = "drop-recalls", .kind = OPT_FLAG, .out = &o->drop_recalls, .help = "a wrong rule" },
		{ .name = "expect-caught",
		  .kind = OPT_STR,
		  .out = &o->caught,
		  .arg = "TEXT",
		  .help = "some seed must fail, saying this" },
		{ 0 },
	};
	int rest;
	int rc = opt_parse(opts, argc, argv, &rest, e);

	if (rc == 0 && (rest < argc || o->plan.units > SIM_UNITS_MAX || o->plan.owners > SIM_OWNERS_MAX))
		return err_set(e, -EXIT_USAGE, "at most %u units and %u owners, and no operands", SIM_UNITS_MAX,
			       SIM_OWNERS_MAX);
	return rc;
}

/* A wrong rule was given: is it caught, and for the right reason? */
static int judge_caught(const struct options *o, uint64_t seed, const char *why)
{
	if (!strstr(why, o->caught)) {
		printf("seed %" PRIu64 " fails in another way: %s\n", seed, why);
		return EXIT_JOB_FAILED;
	}
	printf("seed %" PRIu64 " catches it: %s\n", seed, why);
	return EXIT_OK;
}

int main(int argc, char **argv)
{
	struct options o = { .seeds = 1, .first = 1 };
	struct totals t = { 0 };
	struct err e = { 0 };
	char why[512];

	if (parse(&o, argc, argv, &e)) {
		fprintf(stderr, "sim: %s\n", e.text);
		return EXIT_USAGE;
	}
	if (o.seed) {
		o.first = o.seed;
		o.seeds = 1;
	}
	for (uint64_t seed = o.first; seed < o.first + o.seeds; seed++) {
		if (!run_seed(seed, &o, &t, why))
			continue;
		if (o.caught)
			return judge_caught(&o, seed, why);
		print_failure(seed, &o, why);
		return EXIT_JOB_FAILED;
	}
	print_totals(&t, o.seeds);
	return o.caught ? EXIT_JOB_FAILED : EXIT_OK;
}
