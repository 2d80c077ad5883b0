/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What happens next. An event only changes the state; coord_settle then looks at
 * it and takes every step that is due: phases, the line of a step that all have
 * applied, the commit, leases for who is idle, the recall. So it does not matter
 * in which order the last vote, the last span and the last APPLIED come.
 *
 *   gather --all are here--> prepare --ready--> run --no step left--> export --> done
 *                                               any --> failed
 *
 * In run there is at most one open step and one that is being applied, the one
 * before; the open one is not committed until the line of the other is out.
 *
 * Recall. An owner refuses what is not low enough when its sums are full; then
 * all workers may wait for a micro-batch that nobody computes, because who had
 * it died. The worker with the highest lease is called back to take the lowest
 * open one. Only a lease above what is open is recalled: the lowest leases are
 * never refused, so if all are below, one of them ends and its worker is free;
 * and every recall moves a worker downwards, so there are not many.
 */
#include "mesh/coord.h"

#include <assert.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <string.h>

/* ------------------------------------------------------------------- ends */

static void end_all(struct coord *c, enum coord_phase phase, uint32_t member_code, uint32_t exit_code, const char *text)
{
	c->phase = phase;
	for (uint32_t i = 0; i < c->n_here; i++)
		coord_out_text(c, OUT_SHUTDOWN, c->here[i]->pub.id, member_code, text);
	coord_out_text(c, OUT_FINISH, 0, exit_code, text);
}

void coord_fail(struct coord *c, uint32_t exit_code, const char *fmt, ...)
{
	char text[COORD_TEXT];
	va_list ap;

	if (c->phase > PHASE_EXPORT)
		return;
	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	end_all(c, PHASE_FAILED, exit_code, exit_code, text);
}

void coord_finish(struct coord *c, const char *text)
{
	end_all(c, PHASE_DONE, EXIT_OK, c->exit_code, text);
}

/* ------------------------------------------------------------------ leases */

static void grant_lease(struct coord *c, struct seat *s)
{
	if (!lease_take(&c->leases, c->n_ready[ROLE_WORKER], c->max_span, s->pub.id, &s->pub.lease)) {
		coord_idle_add(c, s);
		return;
	}
	c->n_leases[s->pub.lease.kind]++;
	c->counters.leases++;
}

void coord_lease_ended(struct coord *c, struct seat *s, bool reopen)
{
	if (reopen)
		lease_reopen(&c->leases, &s->pub.lease);
	if (c->recalled == s->pub.lease.id)
		c->recalled = 0;
	c->n_leases[s->pub.lease.kind]--;
	memset(&s->pub.lease, 0, sizeof(s->pub.lease));
}

void coord_enter(struct coord *c, struct seat *s)
{
	if (!c->open_step)
		return;
	grant_lease(c, s);
	coord_out(c, OUT_JOIN, s->pub.id);
}

static bool anything_open(const struct coord *c)
{
	return c->leases.set[LEASE_TRAIN].n_open || c->leases.set[LEASE_EVAL].n_open;
}

static void employ_idle(struct coord *c)
{
	while (c->idle_first && anything_open(c)) {
		struct seat *s = c->idle_first;

		coord_idle_remove(c, s);
		grant_lease(c, s);
		coord_out(c, OUT_LEASE, s->pub.id);
	}
}

static struct seat *highest_lease(const struct coord *c)
{
	struct seat *highest = NULL;

	for (uint32_t i = 0; i < c->n_here; i++) {
		struct seat *s = c->here[i];

		if (s->pub.lease.id && (!highest || s->pub.lease.node.first > highest->pub.lease.node.first))
			highest = s;
	}
	return highest;
}

/* Who evaluates is free soon, and so is who was recalled already. */
static void recall_highest(struct coord *c)
{
	struct seat *s;
	uint32_t leaf;

	if (c->recalled || c->n_leases[LEASE_EVAL] || !c->n_leases[LEASE_TRAIN] || !lease_starving(&c->leases))
		return;
	s = highest_lease(c);
	if (!lease_lowest(&c->leases, LEASE_TRAIN, &leaf) || s->pub.lease.node.first < leaf)
		return;
	s->pub.lease.recalled = true;
	c->recalled = s->pub.lease.id;
	c->counters.recalls++;
	coord_out(c, OUT_RECALL, s->pub.id);
}

/* ------------------------------------------------------------------- steps */

static bool is_evaluated(const struct coord *c, uint64_t version)
{
	if (!c->cfg.n_eval)
		return false;
	if (version == c->cfg.steps)
		return true;
	return version && c->cfg.eval_interval && version % c->cfg.eval_interval == 0;
}

/* Neighbours in the tree to neighbours on a host, who add their sums before they leave it. */
static void deal(struct coord *c)
{
	for (uint32_t i = 0; i < c->n_here; i++) {
		struct seat *s = c->by_host[i];

		if (!s->pub.ready || s->pub.role != ROLE_WORKER)
			continue;
		coord_idle_remove(c, s);
		grant_lease(c, s);
	}
}

/* Opens step t if there is one; everybody who is ready hears it, with the commit of the step before. */
static void open_step(struct coord *c, uint64_t t)
{
	uint32_t n_micro = t <= c->cfg.steps ? c->cfg.n_micro : 0;
	uint32_t n_eval = is_evaluated(c, t - 1) ? c->cfg.n_eval : 0;
	bool open = !c->stopping && (n_micro || (n_eval && t == c->cfg.steps + 1));

	c->open_step = open ? t : 0;
	if (open) {
		c->last_step = t;
		c->opened_ns = c->now_ns;
		c->n_votes = 0;
		c->trouble = (struct trouble){ TROUBLE_NONE, 0, 0 };
		c->trouble_units = 0;
		c->seconds_compute = c->seconds_fetch = c->seconds_push = 0;
		lease_table_open(&c->leases, n_micro, n_eval);
		loss_tree_open(&c->loss[LEASE_TRAIN], n_micro);
		loss_tree_open(&c->loss[LEASE_EVAL], n_eval);
		c->step_msg.has_open = 1;
		c->step_msg.open_step = t;
		c->step_msg.n_micro = n_micro;
		c->step_msg.n_eval = n_eval;
		deal(c);
	}
	for (uint32_t i = 0; i < c->n_here; i++) {
		struct seat *s = c->here[i];

		s->voted = false;
		if (s->pub.ready && (open || c->step_msg.has_commit))
			coord_out(c, OUT_STEP, s->pub.id);
	}
}

static void make_record(struct coord *c, bool validated)
{
	double seconds = clock_seconds(c->now_ns - c->opened_ns);

	c->record = (struct step_record){
		.step = c->open_step,
		.tokens = c->open_step * c->cfg.tokens_per_step,
		.epoch = c->epoch,
		.loss = c->step_msg.loss,
		.grad_norm = c->step_msg.grad_norm,
		.lr = c->step_msg.lr,
		.step_seconds = seconds,
		.tokens_per_second = seconds > 0 ? (double)c->cfg.tokens_per_step / seconds : 0,
		.validation_loss = c->validation_loss,
		.has_validation_loss = validated,
		.has_state_hash = c->step_msg.hash_wanted,
		.workers = c->n_ready[ROLE_WORKER],
		.shards = c->n_role[ROLE_SHARD],
		.seconds_compute = c->seconds_compute,
		.seconds_fetch = c->seconds_fetch,
		.seconds_push = c->seconds_push,
	};
}

static bool commit(struct coord *c)
{
	bool validated = c->step_msg.n_eval > 0;
	struct exact_sum sum;
	struct err e;

	exact_sum_clear(&sum);
	for (uint32_t i = 0; i < c->n_here; i++)
		if (c->here[i]->pub.role == ROLE_SHARD)
			exact_sum_merge(&sum, &c->here[i]->vote);
	if (c->trouble.kind != TROUBLE_LOSS && c->trouble_units)
		c->trouble.unit = c->trouble_units - 1;
	if (commit_decide(&c->cfg, c->open_step, &sum, loss_tree_mean(&c->loss[LEASE_TRAIN]), &c->trouble, &c->step_msg,
			  &e)) {
		coord_fail(c, EXIT_JOB_FAILED, "%s", e.text);
		return false;
	}
	make_record(c, validated);
	c->applying = true;
	c->n_applied = 0;
	c->hash = (struct hash128){ 0, 0 };
	for (uint32_t i = 0; i < c->n_here; i++)
		c->here[i]->applied = false;
	return true;
}

/* The open step has everything: its end, and the next one's beginning. */
static void close_step(struct coord *c)
{
	uint64_t t = c->open_step;

	if (c->step_msg.n_eval) {
		c->validated = true;
		c->validation_version = t - 1;
		c->validation_loss = loss_tree_mean(&c->loss[LEASE_EVAL]);
	}
	if (!c->step_msg.n_micro)
		c->open_step = 0;
	else if (commit(c))
		open_step(c, t + 1);
}

static bool step_complete(const struct coord *c)
{
	if (!c->open_step || c->applying)
		return false;
	return loss_tree_complete(&c->loss[LEASE_TRAIN]) && loss_tree_complete(&c->loss[LEASE_EVAL]) &&
	       (!c->step_msg.n_micro || c->n_votes == c->cfg.n_shards);
}

static void write_line(struct coord *c)
{
	if (!c->applying || c->n_applied < c->cfg.n_shards)
		return;
	c->applying = false;
	c->line = c->record;
	c->line.state_hash = c->hash;
	coord_out(c, OUT_LINE, 0);
}

static void run(struct coord *c)
{
	write_line(c);
	if (step_complete(c))
		close_step(c);
	if (c->phase != PHASE_RUN)
		return;
	if (!c->open_step) {
		if (c->applying)
			return;
		c->phase = PHASE_EXPORT;
		coord_note(c, "all steps are done: writing the model");
		coord_out(c, OUT_EXPORT, 0);
		return;
	}
	employ_idle(c);
	if (!c->idle_first)
		recall_highest(c);
}

/* ------------------------------------------------------------------ phases */

static void gather(struct coord *c)
{
	if (c->n_role[ROLE_SHARD] < c->cfg.n_shards || c->n_role[ROLE_WORKER] < c->cfg.n_workers)
		return;
	c->phase = PHASE_PREPARE;
	coord_note(c, "%u shard services and %u workers are here and prepare", c->n_role[ROLE_SHARD],
		   c->n_role[ROLE_WORKER]);
}

/* Who came in addition to those waited for may be ready later. */
static void prepare(struct coord *c)
{
	uint32_t wanted = c->cfg.n_workers < c->n_role[ROLE_WORKER] ? c->cfg.n_workers : c->n_role[ROLE_WORKER];

	if (c->n_ready[ROLE_SHARD] < c->cfg.n_shards || !c->n_ready[ROLE_WORKER] || c->n_ready[ROLE_WORKER] < wanted)
		return;
	c->phase = PHASE_RUN;
	coord_note(c, "all are ready: %" PRIu64 " steps of %u micro-batches", c->cfg.steps, c->cfg.n_micro);
	open_step(c, 1);
}

/* Nobody needs a view before all are here; it would be the first of many. */
static void tell_views(struct coord *c)
{
	if (!c->view_changed || c->phase == PHASE_GATHER)
		return;
	c->view_changed = false;
	for (uint32_t i = 0; i < c->n_here; i++)
		coord_out(c, OUT_TABLE, c->here[i]->pub.id);
}

void coord_settle(struct coord *c)
{
	if (c->phase == PHASE_GATHER)
		gather(c);
	if (c->phase <= PHASE_EXPORT)
		tell_views(c);
	if (c->phase == PHASE_PREPARE)
		prepare(c);
	if (c->phase == PHASE_RUN)
		run(c);
}
