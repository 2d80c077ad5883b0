/* SPDX-License-Identifier: Apache-2.0 */
/* A bench for the coordinator's machine: its actions after each event, and what members say to it. */
#ifndef SHARDMESH_TESTS_MESH_MACHINE_H
#define SHARDMESH_TESTS_MESH_MACHINE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "mesh/mesh.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define SECOND UINT64_C(1000000000)
#define LOG 4000

struct bench {
	struct coord_config cfg;
	struct coord *c;
	uint64_t now;
	struct coord_action *log; /* since the last event */
	uint32_t n;
	uint32_t shard[4], worker[8], n_shards, n_workers;
};

static inline double rate(void *ctx, uint64_t adam_t)
{
	(void)ctx;
	return 0.5 / (double)adam_t;
}

static inline void drain(struct bench *b)
{
	for (b->n = 0; coord_next(b->c, &b->log[b->n]); b->n++)
		assert_true(b->n < LOG);
}

static inline struct bench *bench_new(uint32_t n_shards, uint32_t n_workers, uint32_t n_micro)
{
	struct bench *b = calloc(1, sizeof(*b));

	b->log = calloc(LOG + 1, sizeof(*b->log));
	b->now = 100 * SECOND;
	b->cfg = (struct coord_config){
		.n_shards = n_shards,
		.n_workers = n_workers,
		.n_micro = n_micro,
		.steps = 3,
		.tokens_per_step = 64,
		.beta1 = 0.9,
		.beta2 = 0.99,
		.bias_correction = true,
		.lr = rate,
		.heartbeat_timeout_ns = 10 * SECOND,
		.join_timeout_ns = 60 * SECOND,
	};
	return b;
}

static inline void begin(struct bench *b)
{
	assert_int_equal(coord_new(&b->cfg, b->now, &b->c), 0);
}

static inline void bench_free(struct bench *b)
{
	coord_free(b->c);
	free(b->log);
	free(b);
}

/* ----------------------------------------------------------------- what came */

static inline const struct coord_action *sent(const struct bench *b, uint32_t member, unsigned type)
{
	for (uint32_t i = 0; i < b->n; i++)
		if (b->log[i].type == COORD_SEND && b->log[i].member == member && b->log[i].msg_type == type)
			return &b->log[i];
	return NULL;
}

static inline uint32_t count_sent(const struct bench *b, uint32_t member, unsigned type)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < b->n; i++)
		n += b->log[i].type == COORD_SEND && b->log[i].member == member && b->log[i].msg_type == type;
	return n;
}

static inline const struct coord_action *done(const struct bench *b, enum coord_action_type type)
{
	for (uint32_t i = 0; i < b->n; i++)
		if (b->log[i].type == type)
			return &b->log[i];
	return NULL;
}

static inline enum coord_phase phase(const struct bench *b)
{
	return coord_now(b->c).phase;
}

static inline uint64_t stale(const struct bench *b)
{
	return coord_counters(b->c)->stale;
}

static inline const struct coord_member *member_of(const struct bench *b, uint32_t member)
{
	const struct coord_member *m;

	for (uint32_t i = 0; (m = coord_member_at(b->c, i)); i++)
		if (m->id == member)
			return m;
	return NULL;
}

static inline void expect_failed(const struct bench *b, uint32_t code, const char *text)
{
	const struct coord_action *a = done(b, COORD_FINISH);

	assert_non_null(a);
	assert_int_equal(phase(b), PHASE_FAILED);
	assert_int_equal(a->exit_code, code);
	if (!strstr(a->text, text))
		print_error("it says: %s\n", a->text);
	assert_non_null(strstr(a->text, text));
	/* Everybody who is left hears the same. */
	for (uint32_t i = 0; coord_member_at(b->c, i); i++) {
		const struct coord_action *s = sent(b, coord_member_at(b->c, i)->id, WIRE_SHUTDOWN);

		assert_non_null(s);
		assert_int_equal(s->msg.shutdown.exit_code, code);
		assert_string_equal(s->msg.shutdown.text, a->text);
	}
}

/* Gone, and told why. */
static inline void expect_evicted(const struct bench *b, uint32_t member, const char *text)
{
	const struct coord_action *s = sent(b, member, WIRE_SHUTDOWN), *a = done(b, COORD_CLOSE);

	assert_null(member_of(b, member));
	assert_non_null(s);
	assert_non_null(strstr(s->msg.shutdown.text, text));
	assert_true(s->msg.shutdown.exit_code != 0);
	assert_non_null(a);
	assert_int_equal(a->member, member);
	assert_non_null(strstr(a->text, text));
}

/* --------------------------------------------------------------- what members do */

static inline int enlist(struct bench *b, enum member_role role, uint32_t *member, struct err *e)
{
	struct msg_registration m = { .pid = 40 + b->n_shards + b->n_workers, .host_id = 7, .host = "h" };
	int rc;

	if (role == ROLE_SHARD)
		snprintf(m.listen, sizeof(m.listen), "h:%u", 1 + b->n_shards);
	rc = coord_register(b->c, role, &m, b->now, member, e);
	drain(b);
	return rc;
}

static inline uint32_t shard(struct bench *b)
{
	assert_int_equal(enlist(b, ROLE_SHARD, &b->shard[b->n_shards], NULL), 0);
	return b->shard[b->n_shards++];
}

static inline uint32_t worker(struct bench *b)
{
	assert_int_equal(enlist(b, ROLE_WORKER, &b->worker[b->n_workers], NULL), 0);
	return b->worker[b->n_workers++];
}

static inline void say(struct bench *b, uint32_t member, unsigned type, const union wire_msg *m)
{
	struct wire_header h = { .sender = member, .term = 1 };

	coord_message(b->c, member, &h, type, m, b->now);
	drain(b);
}

static inline void ready(struct bench *b, uint32_t member, uint32_t max_span)
{
	union wire_msg m = { .ready = { .max_span = max_span, .data_fingerprint = 5 } };

	say(b, member, WIRE_READY, &m);
}

static inline void span_done_as(struct bench *b, uint32_t member, const struct lease *l, uint64_t step, double loss,
				bool recalled)
{
	union wire_msg m = { .span_done = { .step = step,
					    .lease = l->id,
					    .kind = l->kind,
					    .first = l->node.first,
					    .level = l->node.level,
					    .recalled = recalled,
					    .loss = loss,
					    .seconds_compute = 1,
					    .seconds_fetch = 0.25,
					    .seconds_push = 0.5 } };

	say(b, member, WIRE_SPAN_DONE, &m);
}

/* Its lease is done, with a loss of 1 a micro-batch; false: it has none. */
static inline bool span_done(struct bench *b, uint32_t member)
{
	struct lease l = member_of(b, member)->lease;
	uint32_t n = l.kind == LEASE_TRAIN ? b->cfg.n_micro : b->cfg.n_eval;

	if (!l.id)
		return false;
	span_done_as(b, member, &l, coord_now(b->c).step, tree_leaves(l.node, n), false);
	return true;
}

static inline void work_off(struct bench *b)
{
	bool any;

	do {
		any = false;
		for (uint32_t i = 0; i < b->n_workers; i++)
			if (member_of(b, b->worker[i]))
				any |= span_done(b, b->worker[i]);
	} while (any);
}

static inline void vote_for(struct bench *b, uint32_t member, uint64_t step, double square)
{
	union wire_msg m = { .vote = { .step = step } };
	struct exact_sum sum;

	exact_sum_clear(&sum);
	exact_sum_add(&sum, square);
	memcpy(m.vote.square_sum, &sum, sizeof(sum));
	say(b, member, WIRE_VOTE, &m);
}

static inline void vote(struct bench *b, uint32_t member, double square)
{
	vote_for(b, member, coord_now(b->c).step, square);
}

static inline void applied(struct bench *b, uint32_t member, uint64_t step)
{
	union wire_msg m = { .applied = { .step = step, .has_hash = 1, .hash_lo = member, .hash_hi = UINT64_MAX } };

	say(b, member, WIRE_APPLIED, &m);
}

static inline void starved(struct bench *b, uint32_t member, uint32_t first)
{
	union wire_msg m = { .starved = { .step = coord_now(b->c).step, .first = first } };

	say(b, member, WIRE_STARVED, &m);
}

static inline void gone(struct bench *b, uint32_t member)
{
	coord_gone(b->c, member, "connection closed", b->now);
	drain(b);
}

static inline void tick(struct bench *b, uint64_t seconds)
{
	b->now += seconds * SECOND;
	coord_tick(b->c, b->now);
	drain(b);
}

/* All members are here and ready: step 1 is open. */
static inline void start(struct bench *b)
{
	begin(b);
	while (b->n_shards < b->cfg.n_shards)
		shard(b);
	while (b->n_workers < b->cfg.n_workers)
		worker(b);
	for (uint32_t i = 0; i < b->n_shards; i++)
		ready(b, b->shard[i], 0);
	for (uint32_t i = 0; i < b->n_workers; i++)
		ready(b, b->worker[i], 1000);
	assert_int_equal(phase(b), PHASE_RUN);
}

static inline void whole_step(struct bench *b)
{
	uint64_t step = coord_now(b->c).step;

	work_off(b);
	for (uint32_t i = 0; i < b->n_shards; i++)
		vote(b, b->shard[i], 9);
	for (uint32_t i = 0; i < b->n_shards; i++)
		applied(b, b->shard[i], step);
}

#endif
