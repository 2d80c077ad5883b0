/* SPDX-License-Identifier: Apache-2.0 */
/* The coordinator as a machine: who dies, who is late, who blocks, and how it ends. */
#include "tests/unit/mesh_machine.h"

/* -------------------------------------------------------- who dies, who comes */

static void test_worker_dies(void **state)
{
	struct bench *b = bench_new(1, 3, 3);
	uint64_t epoch;
	struct lease l;

	(void)state;
	start(b);
	span_done(b, b->worker[2]);
	epoch = coord_now(b->c).epoch;
	l = member_of(b, b->worker[0])->lease;
	gone(b, b->worker[0]);
	assert_int_equal(coord_now(b->c).epoch, epoch + 1);
	assert_int_equal(sent(b, b->shard[0], WIRE_EPOCH)->msg.epoch.n_members, 3);
	/* Its span is open again and goes to who is idle, as a new lease. */
	assert_int_equal(sent(b, b->worker[2], WIRE_LEASE)->msg.lease.first, l.node.first);
	assert_true(sent(b, b->worker[2], WIRE_LEASE)->msg.lease.lease > l.id);
	assert_null(sent(b, b->worker[1], WIRE_LEASE));
	whole_step(b);
	assert_true(done(b, COORD_LINE)->record.loss == 1 && done(b, COORD_LINE)->record.workers == 2);
	gone(b, b->worker[1]);
	assert_int_equal(phase(b), PHASE_RUN);
	gone(b, b->worker[2]);
	expect_failed(b, EXIT_JOB_FAILED, "worker 4 (pid 43 on h), the last worker, was lost: connection closed");
	bench_free(b);
}

/* One that is idle when it dies gets nothing more. */
static void test_idle_worker_dies(void **state)
{
	struct bench *b = bench_new(1, 3, 3);

	(void)state;
	start(b);
	span_done(b, b->worker[1]);
	span_done(b, b->worker[2]);
	gone(b, b->worker[1]);
	gone(b, b->worker[0]);
	assert_non_null(sent(b, b->worker[2], WIRE_LEASE));
	span_done(b, b->worker[2]);
	vote(b, b->shard[0], 1);
	assert_int_equal(coord_now(b->c).step, 2);
	bench_free(b);
}

static void test_joins_in_the_middle(void **state)
{
	struct bench *b = bench_new(1, 1, 8);
	const struct msg_step *m;

	(void)state;
	start(b);
	whole_step(b);
	assert_int_equal(tree_leaves(member_of(b, b->worker[0])->lease.node, 8), 8);
	worker(b);
	assert_non_null(sent(b, b->worker[1], WIRE_EPOCH));
	gone(b, b->worker[0]);
	assert_int_equal(phase(b), PHASE_RUN);
	/* Its capacity counts as soon as it is ready. */
	ready(b, b->worker[1], 3);
	m = &sent(b, b->worker[1], WIRE_STEP)->msg.step;
	assert_true(!m->has_commit && m->has_open && m->open_step == 2 && m->n_micro == 8);
	assert_true(m->lease && m->lease_first == 0 && m->lease_level == 1);
	worker(b);
	ready(b, b->worker[2], 100);
	assert_int_equal(member_of(b, b->worker[2])->lease.node.level, 1);
	/* When the smallest goes, spans may be longer. */
	gone(b, b->worker[1]);
	span_done(b, b->worker[2]);
	assert_int_equal(member_of(b, b->worker[2])->lease.node.first, 0);
	assert_int_equal(member_of(b, b->worker[2])->lease.node.level, 1);
	span_done(b, b->worker[2]);
	assert_int_equal(member_of(b, b->worker[2])->lease.node.first, 4);
	assert_int_equal(member_of(b, b->worker[2])->lease.node.level, 2);
	bench_free(b);
}

static void test_shard_lost(void **state)
{
	struct bench *b = bench_new(2, 2, 4);

	(void)state;
	start(b);
	gone(b, b->shard[1]);
	expect_failed(b, EXIT_JOB_FAILED, "shard service 2 (pid 41 on h) was lost: connection closed");
	/* Over is over. */
	gone(b, b->shard[0]);
	span_done(b, b->worker[0]);
	vote(b, b->shard[0], 1);
	tick(b, 100);
	coord_stop(b->c, 130, b->now);
	drain(b);
	assert_int_equal(b->n, 0);
	bench_free(b);
}

static void test_silence(void **state)
{
	struct bench *b = bench_new(1, 2, 4);
	union wire_msg beat = { 0 };

	(void)state;
	start(b);
	tick(b, 9);
	say(b, b->shard[0], WIRE_HEARTBEAT, &beat);
	say(b, b->worker[0], WIRE_HEARTBEAT, &beat);
	tick(b, 2);
	expect_evicted(b, b->worker[1], "no word from it for 11.0 s");
	assert_non_null(member_of(b, b->worker[0]));
	/* Our own loop stood still: nobody is to blame. */
	b->now += 100 * SECOND;
	coord_stalled(b->c, b->now);
	tick(b, 9);
	assert_int_equal(phase(b), PHASE_RUN);
	say(b, b->worker[0], WIRE_HEARTBEAT, &beat);
	tick(b, 2);
	expect_failed(b, EXIT_JOB_FAILED, "shard service 1 (pid 40 on h) was lost: no word from it for 11.0 s");
	bench_free(b);
}

static void test_join_timeouts(void **state)
{
	struct bench *b = bench_new(2, 1, 4);
	union wire_msg beat = { 0 };

	(void)state;
	begin(b);
	shard(b);
	/* Who prepares may be silent for long. */
	for (int i = 0; i < 12; i++) {
		tick(b, 5);
		if (i == 6)
			say(b, b->shard[0], WIRE_HEARTBEAT, &beat);
	}
	assert_int_equal(phase(b), PHASE_GATHER);
	tick(b, 1);
	expect_failed(b, EXIT_JOB_FAILED, "61.0 s still waiting for members: 1 of 2 shard services, 0 of 1 workers");
	bench_free(b);

	/* In a run only who comes too late is sent away. */
	b = bench_new(1, 1, 4);
	start(b);
	worker(b);
	for (int i = 0; i < 8; i++) {
		say(b, b->shard[0], WIRE_HEARTBEAT, &beat);
		say(b, b->worker[0], WIRE_HEARTBEAT, &beat);
		if (i == 4)
			say(b, b->worker[1], WIRE_HEARTBEAT, &beat);
		tick(b, 8);
	}
	expect_evicted(b, b->worker[1], "not ready 64.0 s after it joined");
	assert_int_equal(phase(b), PHASE_RUN);
	bench_free(b);
}

static void test_failures(void **state)
{
	struct bench *b = bench_new(1, 2, 4);
	union wire_msg m = { .failure = { .exit_code = 42, .text = "no such file" } };

	(void)state;
	start(b);
	say(b, b->worker[0], WIRE_FAILURE, &m);
	expect_evicted(b, b->worker[0], "no such file");
	assert_int_equal(phase(b), PHASE_RUN);
	m.failure.exit_code = 0;
	say(b, b->worker[1], WIRE_FAILURE, &m);
	expect_failed(b, EXIT_JOB_FAILED, "the last worker, was lost: no such file");
	bench_free(b);

	b = bench_new(2, 2, 4);
	begin(b);
	worker(b);
	m.failure.exit_code = 42;
	say(b, b->worker[0], WIRE_FAILURE, &m);
	expect_failed(b, 42, "worker 1 (pid 40 on h): no such file");
	bench_free(b);
}

/* -------------------------------------------------------------------- recalls */

/* Four workers with one micro-batch each; the one with `dead` dies. */
static struct bench *blocked(uint32_t dead)
{
	struct bench *b = bench_new(1, 4, 4);

	start(b);
	for (uint32_t i = 0; i < 4; i++)
		assert_int_equal(member_of(b, b->worker[i])->lease.node.first, i);
	gone(b, b->worker[dead]);
	return b;
}

static void test_recall(void **state)
{
	struct bench *b = blocked(0);
	struct lease l;
	char text[128];

	(void)state;
	/* Somebody may be about to be free: only a starved owner makes it urgent. */
	assert_null(sent(b, b->worker[3], WIRE_RECALL));
	starved(b, b->shard[0], 0);
	l = member_of(b, b->worker[3])->lease;
	assert_int_equal(sent(b, b->worker[3], WIRE_RECALL)->msg.recall.lease, l.id);
	assert_true(member_of(b, b->worker[3])->lease.recalled);
	assert_null(sent(b, b->worker[2], WIRE_RECALL));
	/* One at a time. */
	starved(b, b->shard[0], 0);
	assert_int_equal(coord_counters(b->c)->recalls, 1);
	coord_waiting_for(b->c, text, sizeof(text));
	assert_string_equal(text, "span [1,2) of worker 3 (0 of 4 micro-batches are done)");
	span_done_as(b, b->worker[3], &l, 1, 0, true);
	assert_int_equal(sent(b, b->worker[3], WIRE_LEASE)->msg.lease.first, 0);
	/* What it gave back is open, below nobody: the others end first. */
	starved(b, b->shard[0], 3);
	assert_int_equal(coord_counters(b->c)->recalls, 1);
	whole_step(b);
	assert_true(done(b, COORD_LINE)->record.loss == 1);
	bench_free(b);
}

/* The owner said it long ago, while somebody had the lease; it does not say it again. */
static void test_recall_after_death(void **state)
{
	struct bench *b = bench_new(1, 4, 4);

	(void)state;
	start(b);
	starved(b, b->shard[0], 1);
	assert_int_equal(coord_counters(b->c)->recalls, 0);
	gone(b, b->worker[1]);
	assert_non_null(sent(b, b->worker[3], WIRE_RECALL));
	/* The one that was recalled dies too: the next one. */
	gone(b, b->worker[3]);
	assert_non_null(sent(b, b->worker[2], WIRE_RECALL));
	/* It was done anyway: that counts, and it is free. */
	span_done(b, b->worker[2]);
	assert_int_equal(sent(b, b->worker[2], WIRE_LEASE)->msg.lease.first, 1);
	bench_free(b);
}

static void test_no_recall(void **state)
{
	struct bench *b = blocked(3);

	(void)state;
	/* All leases are below what is open: the lowest of them is never refused, so one of them ends. */
	starved(b, b->shard[0], 3);
	assert_int_equal(coord_counters(b->c)->recalls, 0);
	span_done(b, b->worker[1]);
	assert_int_equal(sent(b, b->worker[1], WIRE_LEASE)->msg.lease.first, 3);
	bench_free(b);

	/* Somebody evaluates: it will be free. */
	b = bench_new(1, 4, 3);
	b->cfg.n_eval = 1;
	b->cfg.eval_interval = 1;
	start(b);
	whole_step(b);
	assert_int_equal(member_of(b, b->worker[3])->lease.kind, LEASE_EVAL);
	gone(b, b->worker[0]);
	starved(b, b->shard[0], 0);
	assert_int_equal(coord_counters(b->c)->recalls, 0);
	span_done(b, b->worker[3]);
	assert_int_equal(sent(b, b->worker[3], WIRE_LEASE)->msg.lease.first, 0);
	/* When nobody does any more, it is urgent again. */
	gone(b, b->worker[3]);
	assert_non_null(sent(b, b->worker[2], WIRE_RECALL));
	bench_free(b);
}

/* ---------------------------------------------------------------------- stops */

static void stop(struct bench *b)
{
	coord_stop(b->c, 130, b->now);
	drain(b);
}

static void test_stop(void **state)
{
	struct bench *b = bench_new(1, 2, 4);
	const struct msg_step *m;
	char text[128];

	(void)state;
	b->cfg.n_eval = 3;
	start(b);
	whole_step(b);
	stop(b);
	assert_int_equal(phase(b), PHASE_RUN);
	work_off(b);
	coord_waiting_for(b->c, text, sizeof(text));
	assert_string_equal(text, "vote of shard 1");
	vote(b, b->shard[0], 1);
	m = &sent(b, b->worker[1], WIRE_STEP)->msg.step;
	assert_true(m->has_commit && m->commit_step == 2 && !m->has_open && !m->lease);
	coord_waiting_for(b->c, text, sizeof(text));
	assert_string_equal(text, "shard 1 to apply step 2");
	/* Who comes now has nothing to do. */
	worker(b);
	ready(b, b->worker[2], 8);
	assert_null(sent(b, b->worker[2], WIRE_STEP));
	applied(b, b->shard[0], 2);
	assert_non_null(done(b, COORD_LINE));
	assert_non_null(done(b, COORD_EXPORT));
	/* No worker is needed any more. */
	for (uint32_t i = 0; i < 3; i++)
		gone(b, b->worker[i]);
	assert_int_equal(phase(b), PHASE_EXPORT);
	coord_exported(b->c, 0, "stopped after step 2", b->now);
	drain(b);
	assert_int_equal(phase(b), PHASE_DONE);
	assert_int_equal(done(b, COORD_FINISH)->exit_code, 130);
	assert_int_equal(sent(b, b->shard[0], WIRE_SHUTDOWN)->msg.shutdown.exit_code, 0);
	bench_free(b);
}

static void test_stop_early_and_twice(void **state)
{
	struct bench *b = bench_new(1, 1, 4);

	(void)state;
	begin(b);
	shard(b);
	stop(b);
	expect_failed(b, 130, "before the first step");
	bench_free(b);

	b = bench_new(1, 1, 4);
	start(b);
	stop(b);
	assert_null(done(b, COORD_FINISH));
	stop(b);
	expect_failed(b, 130, "stopped at once");
	bench_free(b);
}

static void test_export_fails(void **state)
{
	struct bench *b = bench_new(1, 1, 4);

	(void)state;
	b->cfg.steps = 1;
	start(b);
	whole_step(b);
	coord_exported(b->c, -ENOSPC, "model/model.safetensors: no space left on device", b->now);
	drain(b);
	expect_failed(b, EXIT_JOB_FAILED, "no space left");
	bench_free(b);

	b = bench_new(1, 1, 4);
	b->cfg.steps = 1;
	start(b);
	whole_step(b);
	gone(b, b->shard[0]);
	expect_failed(b, EXIT_JOB_FAILED, "shard service 1");
	bench_free(b);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_worker_dies),
		cmocka_unit_test(test_idle_worker_dies),
		cmocka_unit_test(test_joins_in_the_middle),
		cmocka_unit_test(test_shard_lost),
		cmocka_unit_test(test_silence),
		cmocka_unit_test(test_join_timeouts),
		cmocka_unit_test(test_failures),
		cmocka_unit_test(test_recall),
		cmocka_unit_test(test_recall_after_death),
		cmocka_unit_test(test_no_recall),
		cmocka_unit_test(test_stop),
		cmocka_unit_test(test_stop_early_and_twice),
		cmocka_unit_test(test_export_fails),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
