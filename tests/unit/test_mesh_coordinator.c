/* SPDX-License-Identifier: Apache-2.0 */
/* The coordinator as a machine: gathering, whole runs, what counts and what does not. */
#include "tests/unit/mesh_machine.h"

/* ------------------------------------------------------------------ gathering */

static void test_gather(void **state)
{
	struct bench *b = bench_new(2, 1, 4);
	const struct coord_action *a;
	uint32_t s1, s2, w;
	char text[128];

	(void)state;
	begin(b);
	s2 = shard(b);
	a = sent(b, s2, WIRE_WELCOME);
	assert_non_null(a);
	assert_int_equal(a->msg.welcome.member, s2);
	assert_int_equal(a->msg.welcome.n_shards, 2);
	assert_int_equal(a->msg.welcome.n_workers, 1);
	assert_int_equal(a->msg.welcome.host_index, 0);
	coord_waiting_for(b->c, text, sizeof(text));
	assert_string_equal(text, "members: 1 of 2 shard services, 0 of 1 workers");
	/* Who goes now is not missed, and its place on the host is free; its id is not used again. */
	s1 = shard(b);
	assert_int_equal(sent(b, s1, WIRE_WELCOME)->msg.welcome.host_index, 1);
	gone(b, s2);
	assert_int_equal(phase(b), PHASE_GATHER);
	b->n_shards = 1;
	b->shard[0] = s1;
	s2 = shard(b);
	assert_int_equal(s2, 3);
	assert_int_equal(sent(b, s2, WIRE_WELCOME)->msg.welcome.host_index, 0);
	assert_null(sent(b, s2, WIRE_EPOCH));
	w = worker(b);
	assert_int_equal(phase(b), PHASE_PREPARE);
	/* The views: a shard service sees all, a worker the shard services and the workers of its host. */
	assert_int_equal(count_sent(b, s1, WIRE_MEMBER), 3);
	assert_int_equal(sent(b, s1, WIRE_EPOCH)->msg.epoch.n_members, 3);
	assert_int_equal(count_sent(b, w, WIRE_MEMBER), 3);
	worker(b);
	assert_int_equal(count_sent(b, s2, WIRE_MEMBER), 4);
	assert_int_equal(sent(b, s2, WIRE_EPOCH)->msg.epoch.n_members, 4);
	assert_int_equal(count_sent(b, w, WIRE_MEMBER), 4);
	assert_int_equal(sent(b, w, WIRE_EPOCH)->msg.epoch.n_members, 4);
	assert_int_equal(sent(b, w, WIRE_EPOCH)->msg.epoch.epoch, 6); /* 5 came and 1 went */
	a = sent(b, w, WIRE_MEMBER);
	assert_int_equal(a->msg.member.member, s1);
	assert_int_equal(a->msg.member.role, ROLE_SHARD);
	assert_string_equal(a->msg.member.listen, "h:2");
	assert_string_equal(a->msg.member.host, "h");
	bench_free(b);
}

static void test_refusals(void **state)
{
	struct bench *b = bench_new(1, MEMBERS_MAX, 4);
	struct msg_registration m = { .host = "h" };
	struct err e;
	uint32_t id = 77;

	(void)state;
	begin(b);
	assert_int_equal(coord_register(b->c, ROLE_OBSERVER, &m, b->now, &id, &e), -EPERM);
	assert_int_equal(coord_register(b->c, ROLE_SHARD, &m, b->now, &id, &e), -EPERM);
	assert_non_null(strstr(e.text, "where workers reach it"));
	shard(b);
	assert_int_equal(enlist(b, ROLE_SHARD, &id, &e), -EPERM);
	assert_string_equal(e.text, "the job has its 1 shard services");
	assert_int_equal(id, 77);
	for (uint32_t i = 1; i < MEMBERS_MAX; i++)
		assert_int_equal(enlist(b, ROLE_WORKER, &id, &e), 0);
	assert_int_equal(coord_register(b->c, ROLE_WORKER, &m, b->now, &id, &e), -EPERM);
	assert_non_null(strstr(e.text, "the most it can have"));
	bench_free(b);
}

static void test_refused_at_the_end(void **state)
{
	struct bench *b = bench_new(1, 1, 4);
	struct err e;
	uint32_t id;

	(void)state;
	b->cfg.steps = 1;
	start(b);
	whole_step(b);
	assert_int_equal(phase(b), PHASE_EXPORT);
	assert_int_equal(enlist(b, ROLE_WORKER, &id, &e), -EPERM);
	assert_non_null(strstr(e.text, "writes the model"));
	coord_exported(b->c, 0, "done", b->now);
	drain(b);
	assert_int_equal(enlist(b, ROLE_WORKER, &id, &e), -EPERM);
	assert_string_equal(e.text, "the job is over");
	bench_free(b);
}

static void test_ready(void **state)
{
	struct bench *b = bench_new(1, 2, 4);
	union wire_msg m = { .ready = { .max_span = 8, .data_fingerprint = 6 } };
	char text[128];

	(void)state;
	begin(b);
	shard(b);
	worker(b);
	worker(b);
	ready(b, b->shard[0], 0);
	ready(b, b->worker[0], 8);
	assert_int_equal(phase(b), PHASE_PREPARE);
	coord_waiting_for(b->c, text, sizeof(text));
	assert_string_equal(text, "worker 3 (pid 42 on h) to be ready (2 of 3 are)");
	/* Other data than the first one's: it is sent away, and the one that is left can begin. */
	say(b, b->worker[1], WIRE_READY, &m);
	expect_evicted(b, b->worker[1], "training data");
	assert_int_equal(sent(b, b->worker[1], WIRE_SHUTDOWN)->msg.shutdown.exit_code, EXIT_CONFIG);
	assert_int_equal(phase(b), PHASE_RUN);
	/* Said twice. */
	ready(b, b->worker[0], 8);
	assert_int_equal(stale(b), 1);
	worker(b);
	ready(b, b->worker[2], 0);
	expect_evicted(b, b->worker[2], "single micro-batch");
	bench_free(b);
}

static void test_wrong_version(void **state)
{
	struct bench *b = bench_new(1, 1, 4);
	union wire_msg m = { .ready = { .version = 3 } };

	(void)state;
	begin(b);
	shard(b);
	worker(b);
	say(b, b->shard[0], WIRE_READY, &m);
	expect_failed(b, EXIT_JOB_FAILED, "version 3");
	bench_free(b);
}

/* More workers than asked for: the first step does not wait for the slow one, which comes in later. */
static void test_slow_start(void **state)
{
	struct bench *b = bench_new(1, 1, 4);
	const struct coord_action *a;

	(void)state;
	begin(b);
	worker(b);
	worker(b);
	shard(b);
	ready(b, b->worker[1], 8);
	ready(b, b->shard[0], 0);
	assert_int_equal(phase(b), PHASE_RUN);
	a = sent(b, b->worker[1], WIRE_STEP);
	assert_true(a->msg.step.has_open && !a->msg.step.has_commit && a->msg.step.lease);
	assert_int_equal(a->msg.step.lease_level, 2);
	assert_null(sent(b, b->worker[0], WIRE_STEP));
	ready(b, b->worker[0], 8);
	a = sent(b, b->worker[0], WIRE_STEP);
	assert_true(a->msg.step.has_open && !a->msg.step.has_commit && !a->msg.step.lease);
	assert_int_equal(a->msg.step.open_step, 1);
	bench_free(b);
}

/* ---------------------------------------------------------------------- a run */

/* Step 1 is opened, and the second worker has its second half. */
static void check_first_step(struct bench *b)
{
	const struct msg_step *m = &sent(b, b->shard[0], WIRE_STEP)->msg.step;

	assert_true(!m->has_commit && m->has_open && m->open_step == 1 && m->n_micro == 4 && !m->n_eval && !m->lease);
	m = &sent(b, b->worker[1], WIRE_STEP)->msg.step;
	assert_true(m->lease && m->lease_kind == LEASE_TRAIN && m->lease_first == 2 && m->lease_level == 1);
}

/* One message commits 1 and opens 2: norm sqrt(25)/4, clipped. */
static void check_first_commit(struct bench *b)
{
	for (uint32_t i = 0; i < 4; i++) {
		uint32_t member = i < 2 ? b->shard[i] : b->worker[i - 2];
		const struct msg_step *m;

		assert_int_equal(count_sent(b, member, WIRE_STEP), 1);
		m = &sent(b, member, WIRE_STEP)->msg.step;
		assert_true(m->has_commit && m->commit_step == 1 && m->apply && m->has_open && m->open_step == 2);
		assert_true(m->grad_norm == 1.25 && m->loss == 1.0 && m->lr == 0.5 && m->adam_t == 1);
		assert_true(m->grad_scale == 0.25 / (1.25 + 1e-6) / 4);
		assert_true(m->bias1 == 1 - 0.9 && m->bias2 == 1 - 0.99 && !m->hash_wanted);
		assert_int_equal(m->lease != 0, i >= 2);
	}
}

static void check_first_line(const struct coord_action *a)
{
	assert_true(a && a->record.step == 1 && a->record.loss == 1.0 && a->record.grad_norm == 1.25);
	assert_true(a->record.tokens == 64 && a->record.step_seconds == 2 && a->record.tokens_per_second == 32);
	assert_true(a->record.lr == 0.5 && a->record.workers == 2 && a->record.shards == 2 && a->record.epoch == 4);
	assert_true(a->record.seconds_compute == 2 && a->record.seconds_fetch == 0.5 && a->record.seconds_push == 1);
	assert_false(a->record.has_validation_loss || a->record.has_state_hash);
}

static void test_run(void **state)
{
	struct bench *b = bench_new(2, 2, 4);
	const struct coord_action *a;
	uint64_t version;
	double loss;

	(void)state;
	b->cfg.n_eval = 2;
	b->cfg.eval_interval = 2;
	b->cfg.state_hash_interval = 2;
	b->cfg.gradient_clipping = 0.25;
	start(b);
	check_first_step(b);
	b->now += 2 * SECOND;
	work_off(b);
	vote(b, b->shard[1], 16);
	assert_null(sent(b, b->shard[1], WIRE_STEP));
	vote(b, b->shard[0], 9);
	check_first_commit(b);
	assert_null(done(b, COORD_LINE));
	applied(b, b->shard[0], 1);
	applied(b, b->shard[0], 1);
	assert_null(done(b, COORD_LINE));
	applied(b, b->shard[1], 1);
	check_first_line(done(b, COORD_LINE));
	/* Step 2: its hash is the sum of what the owners report, and version 2 is evaluated in step 3. */
	whole_step(b);
	a = done(b, COORD_LINE);
	assert_true(a->record.step == 2 && a->record.has_state_hash && a->record.tokens == 128);
	assert_true(a->record.state_hash.lo == 3 && a->record.state_hash.hi == UINT64_MAX - 1);
	assert_false(coord_validation(b->c, &version, &loss));
	whole_step(b);
	a = done(b, COORD_LINE);
	assert_true(a->record.step == 3 && a->record.has_validation_loss && a->record.validation_loss == 1);
	assert_true(coord_validation(b->c, &version, &loss) && version == 2 && loss == 1);
	/* Step 4 is forward only: nobody votes, nothing is committed. */
	assert_int_equal(phase(b), PHASE_RUN);
	assert_int_equal(coord_now(b->c).step, 4);
	vote(b, b->shard[0], 1);
	work_off(b);
	assert_true(coord_validation(b->c, &version, &loss) && version == 3);
	assert_int_equal(phase(b), PHASE_EXPORT);
	assert_non_null(done(b, COORD_EXPORT));
	assert_null(sent(b, b->worker[0], WIRE_STEP));
	coord_exported(b->c, 0, "model written", b->now);
	drain(b);
	a = done(b, COORD_FINISH);
	assert_true(a && a->exit_code == 0 && phase(b) == PHASE_DONE);
	for (uint32_t i = 0; i < 2; i++)
		assert_int_equal(sent(b, b->worker[i], WIRE_SHUTDOWN)->msg.shutdown.exit_code, 0);
	bench_free(b);
}

static void test_commit_arithmetic(void **state)
{
	struct bench *b = bench_new(1, 1, 4);
	const struct msg_step *m;

	(void)state;
	b->cfg.gradient_clipping = 100;
	b->cfg.bias_correction = false;
	start(b);
	work_off(b);
	vote(b, b->shard[0], 16);
	m = &sent(b, b->shard[0], WIRE_STEP)->msg.step;
	assert_true(m->grad_norm == 1 && m->grad_scale == 0.25 && m->bias1 == 1 && m->bias2 == 1);
	bench_free(b);
}

/* The last span may come after the last vote; and nothing is committed while the step before is being applied. */
static void test_order_of_the_last(void **state)
{
	struct bench *b = bench_new(2, 1, 4);

	(void)state;
	start(b);
	vote(b, b->shard[0], 9);
	vote(b, b->shard[1], 9);
	assert_int_equal(coord_now(b->c).step, 1);
	work_off(b);
	assert_int_equal(coord_now(b->c).step, 2);
	applied(b, b->shard[0], 1);
	work_off(b);
	vote(b, b->shard[0], 9);
	vote(b, b->shard[1], 9);
	assert_int_equal(coord_now(b->c).step, 2);
	applied(b, b->shard[1], 1);
	assert_int_equal(done(b, COORD_LINE)->record.step, 1);
	assert_int_equal(coord_now(b->c).step, 3);
	bench_free(b);
}

/* Sums of losses whose order shows: along the tree whatever order they come in. */
static void test_loss_along_the_tree(void **state)
{
	static const double x[5] = { 1e16, 1, 1, -1e16, 0.5 };
	struct bench *b = bench_new(1, 5, 5);
	double want = (((x[0] + x[1]) + (x[2] + x[3])) + x[4]) / 5;

	(void)state;
	start(b);
	for (uint32_t i = 0; i < 5; i++) {
		struct lease l = member_of(b, b->worker[(i * 3 + 1) % 5])->lease;

		span_done_as(b, l.worker, &l, 1, x[l.node.first], false);
	}
	vote(b, b->shard[0], 1);
	assert_true(sent(b, b->shard[0], WIRE_STEP)->msg.step.loss == want);
	bench_free(b);
}

/* Its lease is done, and something of it is not finite. */
static void span_troubled(struct bench *b, uint32_t member, double loss, struct trouble t)
{
	const struct lease *l = &member_of(b, member)->lease;
	union wire_msg m = { .span_done = { .step = coord_now(b->c).step,
					    .lease = l->id,
					    .kind = l->kind,
					    .first = l->node.first,
					    .level = l->node.level,
					    .loss = loss,
					    .trouble = t.kind,
					    .trouble_micro = t.micro,
					    .trouble_unit = t.unit } };

	say(b, member, WIRE_SPAN_DONE, &m);
}

static void vote_troubled(struct bench *b, uint32_t member, uint32_t units)
{
	union wire_msg m = { .vote = { .step = coord_now(b->c).step, .trouble_units = units } };
	struct exact_sum sum;

	exact_sum_clear(&sum);
	exact_sum_add(&sum, INFINITY);
	memcpy(m.vote.square_sum, &sum, sizeof(sum));
	say(b, member, WIRE_VOTE, &m);
}

/* The worst, and of that the first micro-batch; of a gradient the last unit, since it came from there. */
static void test_not_finite_is_named(void **state)
{
	static const struct {
		struct trouble left, right; /* of the two workers' spans */
		double loss;
		const char *text;
	} want[] = {
		{ { TROUBLE_GRADIENT, 0, 0 },
		  { TROUBLE_LOSS, 3, 5 },
		  NAN,
		  "step 1: the loss of micro-batch 3 is not finite: unit 5 is the first whose values are not" },
		{ { TROUBLE_LOSS, 1, 2 },
		  { TROUBLE_LOSS, 2, 1 },
		  NAN,
		  "the loss of micro-batch 1 is not finite: unit 2" },
		{ { TROUBLE_GRADIENT, 1, 0 },
		  { TROUBLE_GRADIENT, 2, 0 },
		  1,
		  "step 1: the gradient is not finite: unit 6 is the last with such a one, micro-batch 1 the first" },
		{ { TROUBLE_NONE, 0, 0 },
		  { TROUBLE_NONE, 0, 0 },
		  1,
		  "unit 6 is the last whose sum is not, of micro-batches 0 to 3" },
	};
	(void)state;

	for (size_t i = 0; i < ARRAY_LEN(want); i++) {
		struct bench *b = bench_new(2, 2, 4);

		start(b);
		span_troubled(b, b->worker[0], want[i].loss, want[i].left);
		span_troubled(b, b->worker[1], want[i].loss, want[i].right);
		vote_troubled(b, b->shard[0], 7);
		vote_troubled(b, b->shard[1], 3);
		expect_failed(b, EXIT_JOB_FAILED, want[i].text);
		bench_free(b);
	}
}

static void test_not_finite(void **state)
{
	struct bench *b = bench_new(1, 1, 2);
	struct lease l;

	(void)state;
	start(b);
	l = member_of(b, b->worker[0])->lease;
	span_done_as(b, b->worker[0], &l, 1, NAN, false);
	vote(b, b->shard[0], 1);
	expect_failed(b, EXIT_JOB_FAILED, "step 1: the loss is not finite");
	bench_free(b);

	b = bench_new(1, 1, 2);
	start(b);
	whole_step(b);
	work_off(b);
	vote(b, b->shard[0], INFINITY);
	expect_failed(b, EXIT_JOB_FAILED, "step 2: the gradient norm is not finite");
	bench_free(b);
}

/* --------------------------------------------------------------------- rule 2 */

static void test_late_and_repeated(void **state)
{
	struct bench *b = bench_new(2, 2, 4);
	struct wire_header h = { .sender = 3, .term = 1 };
	union wire_msg beat = { 0 };
	struct lease l;

	(void)state;
	start(b);
	/* Another branch, a later term, another's name, nobody. */
	h.branch = 1;
	coord_message(b->c, 3, &h, WIRE_HEARTBEAT, &beat, b->now);
	h.branch = 0;
	h.term = 2;
	coord_message(b->c, 3, &h, WIRE_HEARTBEAT, &beat, b->now);
	h.term = 1;
	coord_message(b->c, 4, &h, WIRE_HEARTBEAT, &beat, b->now);
	coord_message(b->c, 99, &h, WIRE_HEARTBEAT, &beat, b->now);
	assert_int_equal(stale(b), 4);
	coord_message(b->c, 3, &h, WIRE_HEARTBEAT, &beat, b->now);
	assert_int_equal(stale(b), 4);
	/* The same span twice, and of another step. */
	l = member_of(b, b->worker[0])->lease;
	span_done_as(b, b->worker[0], &l, 2, 2, false);
	assert_int_equal(stale(b), 5);
	assert_true(member_of(b, b->worker[0])->lease.id == l.id);
	span_done_as(b, b->worker[0], &l, 1, 2, false);
	span_done_as(b, b->worker[0], &l, 1, 2, false);
	assert_int_equal(stale(b), 6);
	/* Its next lease is another one, even of the same span. */
	l = member_of(b, b->worker[1])->lease;
	l.id++;
	span_done_as(b, b->worker[1], &l, 1, 2, false);
	assert_int_equal(stale(b), 7);
	/* Votes: repeated, of steps that are not open. */
	vote(b, b->shard[0], 9);
	vote(b, b->shard[0], 9);
	assert_int_equal(stale(b), 8);
	span_done(b, b->worker[1]);
	assert_int_equal(coord_now(b->c).step, 1);
	vote(b, b->shard[1], 9);
	assert_int_equal(coord_now(b->c).step, 2);
	vote_for(b, b->shard[0], 1, 9);
	vote_for(b, b->shard[0], 3, 9);
	assert_int_equal(stale(b), 10);
	applied(b, b->shard[0], 2);
	applied(b, b->shard[0], 0);
	assert_int_equal(stale(b), 12);
	/* What somebody who is gone had under way. */
	l = member_of(b, b->worker[0])->lease;
	gone(b, b->worker[0]);
	span_done_as(b, b->worker[0], &l, 2, 2, false);
	assert_int_equal(stale(b), 13);
	gone(b, b->worker[0]);
	assert_int_equal(coord_counters(b->c)->evictions, 1);
	bench_free(b);
}

static void test_broken_members(void **state)
{
	struct bench *b = bench_new(1, 4, 4);
	union wire_msg m = { .applied = { .step = 1 } };
	struct lease l;

	(void)state;
	start(b);
	vote(b, b->worker[0], 1);
	expect_evicted(b, b->worker[0], "never sends");
	l = member_of(b, b->worker[1])->lease;
	l.node.first ^= 1;
	span_done_as(b, b->worker[1], &l, 1, 1, false);
	expect_evicted(b, b->worker[1], "another span");
	say(b, b->shard[0], WIRE_APPLIED, &m);
	assert_int_equal(phase(b), PHASE_RUN);
	vote(b, b->shard[0], 1);
	vote(b, b->shard[0], 2);
	expect_failed(b, EXIT_JOB_FAILED, "shard service 1 (pid 40 on h) was lost: it voted twice with different sums");
	bench_free(b);
}

/* Nobody recalled it: it is open again, for whoever is free. */
static void test_given_back(void **state)
{
	struct bench *b = bench_new(1, 2, 4);
	struct lease l;

	(void)state;
	start(b);
	l = member_of(b, b->worker[1])->lease;
	span_done_as(b, b->worker[1], &l, 1, 0, true);
	assert_int_equal(member_of(b, b->worker[1])->lease.node.first, l.node.first);
	assert_int_not_equal(member_of(b, b->worker[1])->lease.id, l.id);
	assert_non_null(sent(b, b->worker[1], WIRE_LEASE));
	bench_free(b);
}

static void enlist_on(struct bench *b, uint64_t host_id)
{
	struct msg_registration m = { .pid = 60 + b->n_workers, .host_id = host_id, .host = "h" };

	assert_int_equal(coord_register(b->c, ROLE_WORKER, &m, b->now, &b->worker[b->n_workers++], NULL), 0);
	drain(b);
}

/* Workers of one host get spans that lie side by side, however they came. */
static void test_dealt_by_host(void **state)
{
	struct bench *b = bench_new(1, 5, 5);

	(void)state;
	begin(b);
	shard(b);
	for (uint32_t i = 0; i < 4; i++)
		enlist_on(b, i % 2 ? 3 : 9);
	enlist_on(b, 3);
	ready(b, b->shard[0], 8);
	for (uint32_t i = 0; i < 5; i++)
		ready(b, b->worker[i], 8);
	assert_int_equal(phase(b), PHASE_RUN);
	assert_int_equal(member_of(b, b->worker[1])->lease.node.first, 0);
	assert_int_equal(member_of(b, b->worker[3])->lease.node.first, 1);
	assert_int_equal(member_of(b, b->worker[4])->lease.node.first, 2);
	assert_int_equal(member_of(b, b->worker[0])->lease.node.first, 3);
	assert_int_equal(member_of(b, b->worker[2])->lease.node.first, 4);
	bench_free(b);
}

static void say_to(struct bench *b, uint32_t from, uint32_t to, uint32_t bytes)
{
	static const uint8_t data[RELAY_MAX + 1] = "word";
	union wire_msg m = { .relay = { .from = 99, .to = to, .kind = 5, .data = { .data = data, .bytes = bytes } } };

	say(b, from, WIRE_RELAY, &m);
}

/* Workers of one host speak through the coordinator; nobody else does. */
static void test_relay(void **state)
{
	struct bench *b = bench_new(1, 4, 4);
	const struct coord_action *a;
	uint64_t stale_before;

	(void)state;
	start(b);
	say_to(b, b->worker[0], b->worker[1], 4);
	a = sent(b, b->worker[1], WIRE_RELAY);
	assert_non_null(a);
	assert_int_equal(a->msg.relay.from, b->worker[0]);
	assert_int_equal(a->msg.relay.kind, 5);
	assert_int_equal(a->msg.relay.data.bytes, 4);
	assert_memory_equal(a->msg.relay.data.data, "word", 4);
	/* Who went in the meantime is passed over. */
	gone(b, b->worker[1]);
	stale_before = stale(b);
	say_to(b, b->worker[0], b->worker[1], 4);
	assert_int_equal(stale(b), stale_before + 1);
	assert_non_null(member_of(b, b->worker[0]));
	say_to(b, b->worker[0], b->shard[0], 4);
	expect_evicted(b, b->worker[0], "no neighbour");
	say_to(b, b->worker[2], b->worker[3], RELAY_MAX + 1);
	expect_evicted(b, b->worker[2], "no neighbour");
	bench_free(b);
}

static void test_broken_shards(void **state)
{
	struct bench *b = bench_new(1, 1, 4);
	union wire_msg m = { .vote = { .step = 1 } };

	(void)state;
	start(b);
	m.vote.square_sum[64] = 2;
	say(b, b->shard[0], WIRE_VOTE, &m);
	expect_failed(b, EXIT_JOB_FAILED, "not a sum");
	bench_free(b);

	b = bench_new(1, 1, 4);
	start(b);
	starved(b, b->shard[0], 4);
	expect_failed(b, EXIT_JOB_FAILED, "does not exist");
	bench_free(b);

	b = bench_new(1, 1, 4);
	b->cfg.state_hash_interval = 1;
	start(b);
	work_off(b);
	vote(b, b->shard[0], 1);
	memset(&m, 0, sizeof(m));
	m.applied.step = 1;
	say(b, b->shard[0], WIRE_APPLIED, &m);
	expect_failed(b, EXIT_JOB_FAILED, "state hash");
	bench_free(b);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_gather),
		cmocka_unit_test(test_refusals),
		cmocka_unit_test(test_refused_at_the_end),
		cmocka_unit_test(test_ready),
		cmocka_unit_test(test_wrong_version),
		cmocka_unit_test(test_slow_start),
		cmocka_unit_test(test_run),
		cmocka_unit_test(test_commit_arithmetic),
		cmocka_unit_test(test_order_of_the_last),
		cmocka_unit_test(test_loss_along_the_tree),
		cmocka_unit_test(test_not_finite),
		cmocka_unit_test(test_not_finite_is_named),
		cmocka_unit_test(test_late_and_repeated),
		cmocka_unit_test(test_broken_members),
		cmocka_unit_test(test_given_back),
		cmocka_unit_test(test_dealt_by_host),
		cmocka_unit_test(test_relay),
		cmocka_unit_test(test_broken_shards),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
