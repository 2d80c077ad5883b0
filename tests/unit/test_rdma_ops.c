/* SPDX-License-Identifier: Apache-2.0 */
/* Reads, writes and notices, on both local providers, and on verbs without a device: what arrives, when, and what is refused. */
#include "rdma_pair.h"

#include <poll.h>

struct bench {
	struct pair p;
	const struct fab_ops *ops;
	struct pair_memory m;
};

static void bench_open(struct bench *t, void **state, uint64_t bytes)
{
	pair_open(&t->p, *state);
	t->ops = t->p.ops;
	memory_open(&t->m, &t->p, bytes);
}

static void reads_bring_the_bytes(void **state)
{
	struct fab_event ev;
	struct fab_op op[2];
	struct bench t;

	bench_open(&t, state, MIB);
	fill(region_at(t.ops, t.m.params), MIB, 3);
	op[0] = read_op(&t.m, 0, MIB / 2, 7);
	op[1] = read_op(&t.m, MIB / 2, MIB / 2, 8);
	assert_int_equal(t.ops->read(t.p.ab, op, 2), 0);
	memset(op, 0xff, sizeof(op));
	ev = next_event(t.ops, t.p.a);
	assert_int_equal(ev.type, FAB_EV_READ);
	assert_int_equal(ev.status, 0);
	assert_ptr_equal(ev.ep, t.p.ab);
	assert_int_equal(ev.user + next_event(t.ops, t.p.a).user, 15);
	assert_true(filled(region_at(t.ops, t.m.mine), MIB, 3));
	no_event(t.ops, t.p.a);
	no_event(t.ops, t.p.b);
	assert_int_equal(t.ops->counters(t.p.a)->reads, 2);
	assert_int_equal(t.ops->counters(t.p.a)->read_bytes, MIB);
	pair_close(&t.p);
}

/* Who looks at the destination before the completion must not find the bytes: with a NIC they would not be there. */
static void nothing_moves_before_poll(void **state)
{
	struct fab_op op;
	struct bench t;

	bench_open(&t, state, PAGE);
	fill(region_at(t.ops, t.m.params), PAGE, 9);
	op = read_op(&t.m, 0, PAGE, 1);
	assert_int_equal(t.ops->read(t.p.ab, &op, 1), 0);
	assert_int_equal(region_at(t.ops, t.m.mine)[0], 0);
	assert_false(t.ops->arm(t.p.a));
	assert_int_equal(next_event(t.ops, t.p.a).type, FAB_EV_READ);
	assert_true(filled(region_at(t.ops, t.m.mine), PAGE, 9));
	assert_true(t.ops->arm(t.p.a));
	pair_close(&t.p);
}

static void writes_bring_bytes_and_notice(void **state)
{
	struct fab_event ev;
	struct fab_op op[2];
	struct bench t;

	bench_open(&t, state, MIB);
	fill(region_at(t.ops, t.m.mine), MIB, 5);
	op[0] = write_op(&t.m, 0, 4096, 40);
	op[1] = write_op(&t.m, 4096, MIB - 4096, 41);
	assert_int_equal(t.ops->write_notify(t.p.ab, op, 2), 0);
	for (uint32_t i = 0; i < 2; i++) {
		ev = next_event(t.ops, t.p.a);
		assert_int_equal(ev.type, FAB_EV_WRITE);
		assert_int_equal(ev.status, 0);
		assert_int_equal(ev.user, 1040 + i);
	}
	for (uint32_t i = 0; i < 2; i++) {
		ev = next_event(t.ops, t.p.b);
		assert_int_equal(ev.type, FAB_EV_NOTICE);
		assert_int_equal(ev.imm, 40 + i);
		assert_ptr_equal(ev.ep, t.p.ba);
		assert_int_equal(ev.user, 22);
	}
	assert_true(filled(region_at(t.ops, t.m.inbox), MIB, 5));
	assert_int_equal(t.ops->counters(t.p.a)->write_bytes, MIB);
	assert_int_equal(t.ops->counters(t.p.b)->notices, 2);
	pair_close(&t.p);
}

static void events_wake_a_sleeper(void **state)
{
	struct pollfd pfd = { .events = POLLIN };
	struct fab_op op;
	struct bench t;

	bench_open(&t, state, PAGE);
	pfd.fd = t.ops->fd(t.p.b);
	no_event(t.ops, t.p.b);
	assert_true(t.ops->arm(t.p.b));
	assert_int_equal(poll(&pfd, 1, 0), 0);
	op = write_op(&t.m, 0, PAGE, 1);
	assert_int_equal(t.ops->write_notify(t.p.ab, &op, 1), 0);
	assert_int_equal(next_event(t.ops, t.p.a).type, FAB_EV_WRITE);
	assert_int_equal(poll(&pfd, 1, 1000), 1);
	assert_int_equal(next_event(t.ops, t.p.b).type, FAB_EV_NOTICE);
	assert_int_equal(poll(&pfd, 1, 0), 0);
	pair_close(&t.p);
}

/* One message of many notices, taken one by one: the rest waits in the instance, and arm must say so. */
static void notices_of_one_message_come_one_by_one(void **state)
{
	struct fab_op op[FAB_BATCH_MAX];
	struct fab_event ev[FAB_BATCH_MAX + 1];
	struct bench t;

	bench_open(&t, state, PAGE);
	for (uint32_t i = 0; i < FAB_BATCH_MAX; i++)
		op[i] = write_op(&t.m, 8 * (uint64_t)i, 8, i);
	assert_int_equal(t.ops->write_notify(t.p.ab, op, FAB_BATCH_MAX), 0);
	assert_int_equal(t.ops->poll(t.p.a, ev, FAB_BATCH_MAX + 1), FAB_BATCH_MAX);
	for (uint32_t i = 0; i < FAB_BATCH_MAX; i++) {
		assert_int_equal(next_event(t.ops, t.p.b).imm, i);
		assert_int_equal(t.ops->arm(t.p.b), i == FAB_BATCH_MAX - 1);
	}
	no_event(t.ops, t.p.b);
	pair_close(&t.p);
}

/* Takes what b has; every notice must find its bytes, in the order of posting. */
static void take_notices(struct bench *t, uint32_t *next)
{
	struct fab_event ev[7];
	uint32_t n = t->ops->poll(t->p.b, ev, ARRAY_LEN(ev));

	for (uint32_t i = 0; i < n; i++) {
		uint64_t word;

		assert_int_equal(ev[i].type, FAB_EV_NOTICE);
		assert_int_equal(ev[i].imm, *next);
		memcpy(&word, region_at(t->ops, t->m.inbox) + 8 * (uint64_t)*next, sizeof(word));
		assert_int_equal(word, *next * 0x9e3779b97f4a7c15ull + 1);
		++*next;
	}
}

static void many_small_batches(void **state)
{
	enum { WRITES = 20000 };
	uint32_t posted = 0, completed = 0, next = 0;
	struct bench t;

	bench_open(&t, state, 8 * WRITES);
	for (uint64_t i = 0; i < WRITES; i++)
		((uint64_t *)region_at(t.ops, t.m.mine))[i] = i * 0x9e3779b97f4a7c15ull + 1;
	while (next < WRITES) {
		uint32_t n = posted % 13 + 1;
		struct fab_op op[13];
		struct fab_event ev[5];

		n = n < WRITES - posted ? n : WRITES - posted;
		for (uint32_t i = 0; i < n; i++)
			op[i] = write_op(&t.m, 8 * (uint64_t)(posted + i), 8, posted + i);
		if (t.ops->write_notify(t.p.ab, op, n) == 0)
			posted += n;
		n = t.ops->poll(t.p.a, ev, ARRAY_LEN(ev));
		for (uint32_t i = 0; i < n; i++, completed++)
			assert_int_equal(ev[i].user, 1000 + completed);
		take_notices(&t, &next);
	}
	assert_int_equal(completed, WRITES);
	no_event(t.ops, t.p.b);
	pair_close(&t.p);
}

/* A peer that does not poll: posting ends in -EAGAIN, nothing blocks, and nothing is lost when it polls again. */
static void a_full_socket_neither_loses_nor_blocks(void **state)
{
	uint32_t posted = 0, completed = 0, next = 0, refusals = 0;
	struct fab_event ev[64];
	struct bench t;

	bench_open(&t, state, 8 * MIB);
	for (uint64_t i = 0; i < MIB; i++)
		((uint64_t *)region_at(t.ops, t.m.mine))[i] = i * 0x9e3779b97f4a7c15ull + 1;
	while (refusals < 100) {
		struct fab_op op = write_op(&t.m, 8 * (uint64_t)posted, 8, posted);
		int ret = t.ops->write_notify(t.p.ab, &op, 1);

		assert_true(ret == 0 || ret == -EAGAIN);
		assert_true(posted < MIB);
		posted += ret == 0;
		refusals += ret == -EAGAIN;
		completed += t.ops->poll(t.p.a, ev, 1);
	}
	assert_true(completed < posted);
	/* Blocked, not busy: only the socket can change that. */
	assert_true(t.ops->arm(t.p.a));
	while (next < posted) {
		take_notices(&t, &next);
		completed += t.ops->poll(t.p.a, ev, ARRAY_LEN(ev));
	}
	assert_int_equal(completed, posted);
	no_event(t.ops, t.p.b);
	assert_int_equal(poll(&(struct pollfd){ .fd = t.ops->fd(t.p.a), .events = POLLIN }, 1, 0), 0);
	pair_close(&t.p);
}

/* More bytes than one poll copies: it comes back to its caller in between. */
static void a_long_copy_is_cut_into_turns(void **state)
{
	struct fab_event ev[4];
	struct fab_op op[3];
	struct bench t;

	bench_open(&t, state, 16 * MIB);
	fill(region_at(t.ops, t.m.params), 16 * MIB, 1);
	op[0] = read_op(&t.m, 0, 6 * MIB, 0);
	op[1] = read_op(&t.m, 6 * MIB, 6 * MIB, 1);
	op[2] = read_op(&t.m, 12 * MIB, 4 * MIB, 2);
	assert_int_equal(t.ops->read(t.p.ab, op, 3), 0);
	assert_int_equal(t.ops->poll(t.p.a, ev, 4), 2);
	assert_false(t.ops->arm(t.p.a));
	assert_int_equal(t.ops->poll(t.p.a, ev, 4), 1);
	assert_true(filled(region_at(t.ops, t.m.mine), 16 * MIB, 1));
	pair_close(&t.p);
}

static void refused(struct bench *t, struct fab_op op, bool write, int expected)
{
	struct fab_op batch[2];
	int ret;

	/* A good one before it: nothing of the batch may be posted. */
	batch[0] = write ? write_op(&t->m, 0, 8, 0) : read_op(&t->m, 0, 8, 0);
	batch[1] = op;
	ret = write ? t->ops->write_notify(t->p.ab, batch, 2) : t->ops->read(t->p.ab, batch, 2);
	assert_int_equal(ret, expected);
	no_event(t->ops, t->p.a);
}

static void wrong_operations_are_refused(void **state)
{
	struct fab_op good_read, good_write, op, many[FAB_BATCH_MAX + 1];
	struct bench t, other;

	bench_open(&t, state, PAGE);
	bench_open(&other, state, PAGE);
	good_read = read_op(&t.m, 0, PAGE, 0);
	good_write = write_op(&t.m, 0, PAGE, 0);
#define REFUSED(from, write, expected, ...)       \
	do {                                      \
		op = from;                        \
		__VA_ARGS__;                      \
		refused(&t, op, write, expected); \
	} while (0)
	REFUSED(good_read, false, -ERANGE, op.remote_offset = 1);
	REFUSED(good_read, false, -ERANGE, op.local_offset = 1);
	REFUSED(good_read, false, -ERANGE, op.bytes = PAGE + 1);
	REFUSED(good_read, false, -ERANGE, op.bytes = UINT64_MAX);
	REFUSED(good_read, false, -ERANGE, (op.remote_offset = UINT64_MAX, op.bytes = 2));
	REFUSED(good_read, false, -ERANGE, (op.local_offset = UINT64_MAX, op.bytes = 2));
	REFUSED(good_read, false, -ERANGE, op.remote_offset = PAGE + 1);
	REFUSED(good_read, false, -EINVAL, op.bytes = 0);
	REFUSED(good_read, false, -EINVAL, op.remote = NULL);
	REFUSED(good_read, false, -EINVAL, op.local = NULL);
	REFUSED(good_read, false, -EINVAL, op.remote = other.m.params_of_b);
	REFUSED(good_read, false, -EINVAL, op.local = other.m.mine);
	REFUSED(good_read, false, -EPERM, op.remote = t.m.inbox_of_b);
	REFUSED(good_write, true, -EPERM, op.remote = t.m.params_of_b);
	REFUSED(good_write, true, -ERANGE, op.remote_offset = PAGE);
#undef REFUSED
	for (uint32_t i = 0; i < ARRAY_LEN(many); i++)
		many[i] = read_op(&t.m, 0, 8, i);
	assert_int_equal(t.ops->read(t.p.ab, many, ARRAY_LEN(many)), -EINVAL);
	assert_int_equal(t.ops->read(t.p.ab, many, 0), 0);
	no_event(t.ops, t.p.a);
	assert_true(t.ops->arm(t.p.a));
	pair_close(&other.p);
	pair_close(&t.p);
}

/* The other side leaves with much in flight: every operation completes, then one FAB_EV_DOWN, then silence. */
static void the_end_comes_after_all_completions(void **state)
{
	enum { N = 64 };
	uint32_t failed = 0;
	struct fab_op op[N];
	struct fab_event ev;
	struct bench t;

	bench_open(&t, state, PAGE);
	for (uint32_t i = 0; i < N; i++)
		op[i] = read_op(&t.m, 8 * (uint64_t)i, 8, i);
	assert_int_equal(t.ops->read(t.p.ab, op, N), 0);
	t.ops->disconnect(t.p.ba);
	for (uint32_t i = 0; i < N; i++) {
		ev = next_event(t.ops, t.p.a);
		assert_int_equal(ev.type, FAB_EV_READ);
		assert_int_equal(ev.user, i);
		assert_true(ev.status == 0 || ev.status == -ECONNRESET);
		failed += ev.status != 0;
	}
	assert_true(failed > 0);
	ev = next_event(t.ops, t.p.a);
	assert_int_equal(ev.type, FAB_EV_DOWN);
	assert_int_equal(ev.status, -ECONNRESET);
	assert_ptr_equal(ev.ep, t.p.ab);
	assert_int_equal(ev.user, 11);
	no_event(t.ops, t.p.a);
	assert_true(t.ops->arm(t.p.a));
	assert_int_equal(t.ops->read(t.p.ab, op, 1), -ENOTCONN);
	t.ops->disconnect(t.p.ab);
	t.ops->remote_close(t.m.params_of_b);
	t.ops->remote_close(t.m.inbox_of_b);
	pair_close(&t.p);
}

/* What was said before the end is heard before it, also when the one who leaves has not read everything itself. */
static void notices_come_before_the_end(void **state)
{
	struct fab_op op[3];
	struct fab_event ev[8];
	struct fab_blob unread;
	struct bench t;

	bench_open(&t, state, PAGE);
	assert_int_equal(t.ops->export_region(t.p.ba, t.m.params, &unread), 0);
	for (uint32_t i = 0; i < 3; i++)
		op[i] = write_op(&t.m, 8 * (uint64_t)i, 8, i);
	assert_int_equal(t.ops->write_notify(t.p.ab, op, 3), 0);
	while (t.ops->counters(t.p.a)->writes < 3)
		t.ops->poll(t.p.a, ev, 0 + 1);
	t.ops->disconnect(t.p.ab);
	for (uint32_t i = 0; i < 3; i++)
		assert_int_equal(next_event(t.ops, t.p.b).imm, i);
	assert_int_equal(next_event(t.ops, t.p.b).type, FAB_EV_DOWN);
	no_event(t.ops, t.p.b);
	pair_close(&t.p);
}

/* Disconnecting ends what is in flight without a word: memory is free at once. */
static void disconnect_drops_what_is_in_flight(void **state)
{
	struct fab_op op[4];
	struct bench t;

	bench_open(&t, state, PAGE);
	for (uint32_t i = 0; i < 4; i++)
		op[i] = i % 2 ? read_op(&t.m, 0, 8, i) : write_op(&t.m, 0, 8, i);
	assert_int_equal(t.ops->read(t.p.ab, &op[1], 1), 0);
	assert_int_equal(t.ops->write_notify(t.p.ab, &op[2], 1), 0);
	t.ops->disconnect(t.p.ab);
	t.ops->region_close(t.m.mine);
	t.ops->remote_close(t.m.params_of_b);
	no_event(t.ops, t.p.a);
	assert_int_equal(next_event(t.ops, t.p.b).type, FAB_EV_DOWN);
	pair_close(&t.p);
}

/* Notices that were taken from the socket and not handed out end with their endpoint. */
static void disconnect_drops_notices_not_taken(void **state)
{
	struct fab_op op[3];
	struct fab_event ev[3];
	struct bench t;

	bench_open(&t, state, PAGE);
	for (uint32_t i = 0; i < 3; i++)
		op[i] = write_op(&t.m, 8 * (uint64_t)i, 8, i);
	assert_int_equal(t.ops->write_notify(t.p.ab, op, 3), 0);
	assert_int_equal(t.ops->poll(t.p.a, ev, 3), 3);
	assert_int_equal(next_event(t.ops, t.p.b).imm, 0);
	assert_false(t.ops->arm(t.p.b));
	t.ops->disconnect(t.p.ba);
	assert_true(t.ops->arm(t.p.b));
	no_event(t.ops, t.p.b);
	assert_int_equal(t.ops->counters(t.p.b)->notices, 1);
	pair_close(&t.p);
}

/* A progress word is read whole, and what it announces is there for the next read. */
static void a_word_is_read_before_its_page(void **state)
{
	struct fab_progress *p;
	const struct fab_progress *got;
	struct fab_op op;
	struct bench t;

	bench_open(&t, state, 2 * PAGE);
	p = (struct fab_progress *)region_at(t.ops, t.m.params);
	got = (const struct fab_progress *)region_at(t.ops, t.m.mine);
	for (uint16_t v = 1; v < 200; v++) {
		fill(region_at(t.ops, t.m.params) + PAGE, PAGE, (uint8_t)v);
		fab_progress_publish(p, fab_progress_word(3, v, 4));
		op = read_op(&t.m, 0, sizeof(*p), v);
		assert_int_equal(t.ops->read(t.p.ab, &op, 1), 0);
		assert_int_equal(next_event(t.ops, t.p.a).status, 0);
		assert_int_equal(fab_progress_check(got->word, 3, v, 0), FAB_READY);
		op = read_op(&t.m, PAGE, PAGE, v);
		assert_int_equal(t.ops->read(t.p.ab, &op, 1), 0);
		assert_int_equal(next_event(t.ops, t.p.a).status, 0);
		assert_true(filled(region_at(t.ops, t.m.mine) + PAGE, PAGE, (uint8_t)v));
	}
	pair_close(&t.p);
}

#ifdef WITH_VERBS_STUB
/* Where the order in which things complete does not matter, nor how much fits between two sides. */
#define VERBS(test) cmocka_unit_test_prestate(test, verbs),
#else
#define VERBS(test)
#endif
#define BOTH(test) cmocka_unit_test_prestate(test, local), cmocka_unit_test_prestate(test, copy)

int main(void)
{
	static char local[] = "local", copy[] = "local-copy";
#ifdef WITH_VERBS_STUB
	static char verbs[] = "verbs";
#endif
	const struct CMUnitTest tests[] = { BOTH(reads_bring_the_bytes),
					    VERBS(reads_bring_the_bytes) BOTH(nothing_moves_before_poll),
					    VERBS(nothing_moves_before_poll) BOTH(writes_bring_bytes_and_notice),
					    VERBS(writes_bring_bytes_and_notice) BOTH(events_wake_a_sleeper),
					    BOTH(notices_of_one_message_come_one_by_one),
					    BOTH(many_small_batches),
					    BOTH(a_full_socket_neither_loses_nor_blocks),
					    BOTH(a_long_copy_is_cut_into_turns),
					    BOTH(wrong_operations_are_refused),
					    VERBS(wrong_operations_are_refused)
						    BOTH(the_end_comes_after_all_completions),
					    BOTH(notices_come_before_the_end),
					    BOTH(disconnect_drops_what_is_in_flight),
					    BOTH(disconnect_drops_notices_not_taken),
					    BOTH(a_word_is_read_before_its_page),
					    VERBS(a_word_is_read_before_its_page) };

	return cmocka_run_group_tests(tests, NULL, NULL);
}
