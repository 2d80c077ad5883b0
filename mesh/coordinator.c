/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The coordinator as a state machine: members, the open step, its commit. Events
 * come in here; what follows from them is coord_step.c's.
 *
 * Rule 2 for what members send: the sender is a member, of our branch, and no
 * message of a later term than ours; what names a step, a lease or a version
 * names the one that is open. Everything else is late or repeated: it is counted
 * and has no effect. What a member of the mesh never sends (a vote of a worker,
 * a span that is not its lease) shows that it is broken, and it is evicted.
 */
#include "mesh/coord.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* --------------------------------------------------------------- life of it */

static int allocate(struct coord *c)
{
	c->seats = calloc(MEMBERS_MAX, sizeof(*c->seats));
	c->spare = calloc(MEMBERS_MAX, sizeof(struct seat *));
	c->here = calloc(MEMBERS_MAX, sizeof(struct seat *));
	c->by_host = calloc(MEMBERS_MAX, sizeof(struct seat *));
	c->outs = calloc(COORD_OUTS, sizeof(*c->outs));
	c->texts = calloc(COORD_TEXTS, sizeof(*c->texts));
	if (!c->seats || !c->spare || !c->here || !c->by_host || !c->outs || !c->texts)
		return -ENOMEM;
	for (uint32_t i = 0; i < MEMBERS_MAX; i++)
		c->spare[c->n_spare++] = &c->seats[MEMBERS_MAX - 1 - i];
	return 0;
}

int coord_new(const struct coord_config *cfg, uint64_t now_ns, struct coord **out)
{
	struct coord *c = calloc(1, sizeof(*c));
	int rc = -ENOMEM;

	assert(cfg->n_shards && cfg->n_workers && cfg->n_micro);
	if (!c)
		return rc;
	c->cfg = *cfg;
	c->term = 1;
	c->now_ns = c->started_ns = now_ns;
	c->max_span = UINT32_MAX;
	if (allocate(c) || lease_table_init(&c->leases, cfg->n_micro, cfg->n_eval))
		goto free_arrays;
	if (loss_tree_init(&c->loss[LEASE_TRAIN], cfg->n_micro))
		goto release_leases;
	if (loss_tree_init(&c->loss[LEASE_EVAL], cfg->n_eval))
		goto release_loss;
	*out = c;
	return 0;

release_loss:
	loss_tree_release(&c->loss[LEASE_TRAIN]);
release_leases:
	lease_table_release(&c->leases);
free_arrays:
	free(c->texts);
	free(c->outs);
	free(c->by_host);
	free(c->here);
	free(c->spare);
	free(c->seats);
	free(c);
	return rc;
}

void coord_free(struct coord *c)
{
	if (!c)
		return;
	loss_tree_release(&c->loss[LEASE_EVAL]);
	loss_tree_release(&c->loss[LEASE_TRAIN]);
	lease_table_release(&c->leases);
	free(c->texts);
	free(c->outs);
	free(c->by_host);
	free(c->here);
	free(c->spare);
	free(c->seats);
	free(c);
}

struct coord_now coord_now(const struct coord *c)
{
	return (struct coord_now){ .branch = c->branch,
				   .term = c->term,
				   .epoch = c->epoch,
				   .step = c->open_step ? c->open_step : c->last_step,
				   .phase = c->phase };
}

const struct coord_counters *coord_counters(const struct coord *c)
{
	return &c->counters;
}

bool coord_validation(const struct coord *c, uint64_t *version, double *loss)
{
	if (!c->validated)
		return false;
	*version = c->validation_version;
	*loss = c->validation_loss;
	return true;
}

/* ---------------------------------------------------------------- messages */

static void stale(struct coord *c)
{
	c->counters.stale++;
}

static void ready_shard(struct coord *c, struct seat *s, const struct msg_ready *m)
{
	char text[COORD_TEXT];

	if (m->version != 0) {
		snprintf(text, sizeof(text), "it holds version %" PRIu64 " and the job begins at 0", m->version);
		coord_evict(c, s, EXIT_JOB_FAILED, text);
		return;
	}
	s->pub.ready = true;
	c->n_ready[ROLE_SHARD]++;
}

static void ready_worker(struct coord *c, struct seat *s, const struct msg_ready *m)
{
	if (!m->max_span) {
		coord_evict(c, s, EXIT_JOB_FAILED, "it cannot hold a single micro-batch");
		return;
	}
	if (c->fingerprint_known && m->data_fingerprint != c->fingerprint) {
		coord_evict(c, s, EXIT_CONFIG, "its training data are not those of the other workers");
		return;
	}
	c->fingerprint_known = true;
	c->fingerprint = m->data_fingerprint;
	s->max_span = m->max_span;
	s->pub.ready = true;
	c->n_ready[ROLE_WORKER]++;
	coord_count_spans(c);
	if (c->phase == PHASE_RUN)
		coord_enter(c, s);
}

static void on_ready(struct coord *c, struct seat *s, const union wire_msg *m)
{
	if (s->pub.ready || c->phase > PHASE_RUN)
		stale(c);
	else if (c->phase == PHASE_GATHER)
		coord_evict(c, s, EXIT_JOB_FAILED, "it is ready before it can know the members");
	else if (s->pub.role == ROLE_SHARD)
		ready_shard(c, s, &m->ready);
	else
		ready_worker(c, s, &m->ready);
}

/* The worst there is, where it is first. */
static void note_trouble(struct coord *c, const struct msg_span_done *m)
{
	const struct trouble t = { (enum trouble_kind)m->trouble, m->trouble_micro, m->trouble_unit };

	if (m->kind != LEASE_TRAIN || t.kind == TROUBLE_NONE || t.kind > TROUBLE_LOSS)
		return;
	if (t.kind > c->trouble.kind || (t.kind == c->trouble.kind && t.micro < c->trouble.micro))
		c->trouble = t;
}

static void on_span_done(struct coord *c, struct seat *s, const union wire_msg *msg)
{
	const struct msg_span_done *m = &msg->span_done;
	const struct lease *l = &s->pub.lease;

	if (!c->open_step || m->step != c->open_step || !l->id || m->lease != l->id) {
		stale(c);
		return;
	}
	/* It may be given back without a recall: its worker lost a neighbour that had part of it. */
	if (m->kind != l->kind || m->first != l->node.first || m->level != l->node.level) {
		coord_evict(c, s, EXIT_JOB_FAILED, "it answered a lease with another span");
		return;
	}
	if (!m->recalled) {
		loss_tree_add(&c->loss[l->kind], l->node, m->loss);
		note_trouble(c, m);
		c->seconds_compute += m->seconds_compute;
		c->seconds_fetch += m->seconds_fetch;
		c->seconds_push += m->seconds_push;
		c->counters.spans_done++;
	}
	coord_lease_ended(c, s, m->recalled);
	coord_idle_add(c, s);
}

static void on_vote(struct coord *c, struct seat *s, const union wire_msg *m)
{
	struct exact_sum sum;

	if (!c->open_step || m->vote.step != c->open_step || !c->step_msg.n_micro) {
		stale(c);
		return;
	}
	if (vote_decode(m->vote.square_sum, &sum)) {
		coord_evict(c, s, EXIT_JOB_FAILED, "its vote is not a sum");
		return;
	}
	if (s->voted) {
		stale(c);
		if (memcmp(&sum, &s->vote, sizeof(sum)))
			coord_evict(c, s, EXIT_JOB_FAILED, "it voted twice with different sums");
		return;
	}
	s->voted = true;
	s->vote = sum;
	c->n_votes++;
	if (m->vote.trouble_units > c->trouble_units)
		c->trouble_units = m->vote.trouble_units;
}

static void on_applied(struct coord *c, struct seat *s, const union wire_msg *msg)
{
	const struct msg_applied *m = &msg->applied;

	if (!c->applying || m->step != c->record.step || s->applied) {
		stale(c);
		return;
	}
	if (c->record.has_state_hash && !m->has_hash) {
		coord_evict(c, s, EXIT_JOB_FAILED, "it did not report the state hash");
		return;
	}
	if (c->record.has_state_hash)
		c->hash = hash128_add(c->hash, (struct hash128){ .lo = m->hash_lo, .hi = m->hash_hi });
	s->applied = true;
	s->pub.version = m->step;
	c->n_applied++;
}

static void on_starved(struct coord *c, struct seat *s, const union wire_msg *msg)
{
	const struct msg_starved *m = &msg->starved;

	if (!c->open_step || m->step != c->open_step || !c->step_msg.n_micro) {
		stale(c);
		return;
	}
	if (m->first >= c->step_msg.n_micro) {
		coord_evict(c, s, EXIT_JOB_FAILED, "it waits for a micro-batch that does not exist");
		return;
	}
	lease_starve(&c->leases, m->first);
}

/* Only workers of one host have something to tell each other. The receiver may have gone in the meantime. */
static void on_relay(struct coord *c, struct seat *s, const union wire_msg *m)
{
	const struct seat *to = coord_seat(c, m->relay.to);

	if (m->relay.data.bytes > RELAY_MAX || m->relay.to > c->last_id || s->pub.id == m->relay.to ||
	    (to && (to->pub.role != ROLE_WORKER || to->pub.host_id != s->pub.host_id))) {
		coord_evict(c, s, EXIT_JOB_FAILED, "it spoke to a member that is no neighbour of it");
		return;
	}
	if (!to) {
		stale(c);
		return;
	}
	c->relay = m->relay;
	c->relay.from = s->pub.id;
	coord_out(c, OUT_RELAY, to->pub.id);
}

/* While the members prepare nothing is lost yet, and whoever started the job should see what is wrong. */
static void on_failure(struct coord *c, struct seat *s, const union wire_msg *m)
{
	uint32_t code = m->failure.exit_code ? m->failure.exit_code : EXIT_JOB_FAILED;
	char who[128], text[COORD_TEXT];

	if (c->phase <= PHASE_PREPARE) {
		coord_fail(c, code, "%s: %s", coord_who(s, who), m->failure.text);
		return;
	}
	snprintf(text, sizeof(text), "%s", m->failure.text);
	coord_evict(c, s, code, text);
}

/* Without a handler: the shell's own, and that it came is all that counts here. */
#define FROM(role) (1u << (role))
static const struct handler {
	unsigned type, roles;
	void (*handle)(struct coord *c, struct seat *s, const union wire_msg *m);
} handlers[] = {
	{ WIRE_READY, FROM(ROLE_SHARD) | FROM(ROLE_WORKER), on_ready },
	{ WIRE_SPAN_DONE, FROM(ROLE_WORKER), on_span_done },
	{ WIRE_VOTE, FROM(ROLE_SHARD), on_vote },
	{ WIRE_APPLIED, FROM(ROLE_SHARD), on_applied },
	{ WIRE_STARVED, FROM(ROLE_SHARD), on_starved },
	{ WIRE_HEARTBEAT, FROM(ROLE_SHARD) | FROM(ROLE_WORKER), NULL },
	{ WIRE_CHOICE, FROM(ROLE_WORKER), NULL },
	{ WIRE_RELAY, FROM(ROLE_WORKER), on_relay },
	{ WIRE_EXPORT_DATA, FROM(ROLE_SHARD), NULL },
	{ WIRE_FAILURE, FROM(ROLE_SHARD) | FROM(ROLE_WORKER), on_failure },
};

void coord_message(struct coord *c, uint32_t member, const struct wire_header *h, unsigned type,
		   const union wire_msg *m, uint64_t now_ns)
{
	struct seat *s = coord_seat(c, member);

	c->now_ns = now_ns;
	if (!s || c->phase > PHASE_EXPORT || h->sender != member || h->branch != c->branch || h->term > c->term) {
		stale(c);
		return;
	}
	s->pub.last_seen_ns = now_ns;
	for (size_t i = 0; i < ARRAY_LEN(handlers); i++) {
		if (handlers[i].type != type || !(handlers[i].roles & FROM(s->pub.role)))
			continue;
		if (handlers[i].handle)
			handlers[i].handle(c, s, m);
		coord_settle(c);
		return;
	}
	coord_evict(c, s, EXIT_JOB_FAILED, "it sent what its role never sends");
	coord_settle(c);
}

/* --------------------------------------------------------------------- end */

void coord_stop(struct coord *c, uint32_t exit_code, uint64_t now_ns)
{
	c->now_ns = now_ns;
	if (c->phase > PHASE_EXPORT)
		return;
	c->exit_code = exit_code;
	if (c->phase < PHASE_RUN)
		coord_fail(c, exit_code, "stopped before the first step");
	else if (c->stopping)
		coord_fail(c, exit_code, "stopped at once");
	else
		coord_note(c, "stopping: %sthe model is written", c->open_step ? "the open step is finished and " : "");
	c->stopping = true;
}

void coord_exported(struct coord *c, int status, const char *text, uint64_t now_ns)
{
	c->now_ns = now_ns;
	if (c->phase != PHASE_EXPORT)
		return;
	if (status)
		coord_fail(c, EXIT_JOB_FAILED, "%s", text);
	else
		coord_finish(c, text);
}
