/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The decorator: what it does to operations stays within the contract (every
 * operation completes once, its bytes are right, a notice comes at least once
 * and after them), and what it is told to do it does.
 */
#include <setjmp.h>
#include <stdarg.h>

#include "tests/unit/rdma_pair.h"

#include <poll.h>

#define SLOTS 64u
#define SLOT_BYTES 4096u
#define ROUNDS 600u

struct faulty {
	const struct fab_ops *ops, *plain;
	struct fab *a, *b; /* a connects, with faults */
	struct fab_ep *ab, *ba;
	struct fab_region *parameters, *inbox, *local;
	struct fab_remote *r_parameters, *r_inbox;
};

static const struct fab_ops *with_faults(const char *want, struct err *e)
{
	struct fab_candidate c[FAB_CANDIDATES_MAX];

	return fab_candidates(want, NULL, true, c, NULL, NULL, e) == 1 ? c[0].ops : NULL;
}

static struct fab_remote *passed_on(struct faulty *w, struct fab_region *r)
{
	struct fab_remote *remote = NULL;
	struct fab_blob blob;
	struct fab_event ev;

	assert_int_equal(w->plain->export_region(w->ba, r, &blob), 0);
	while (w->ops->import_region(w->ab, &blob, &remote) == -EAGAIN)
		assert_int_equal(w->ops->poll(w->a, &ev, 1), 0);
	assert_non_null(remote);
	return remote;
}

static void open_pair(struct faulty *w, const char *want)
{
	struct fab_config cfg = { .job = "test", .member = 1, .want = want };
	struct fab_blob address;
	struct fab_event ev;
	struct err e = { 0 };
	bool up = false;

	memset(w, 0, sizeof(*w));
	w->plain = fab_provider("local-copy");
	w->ops = with_faults(want, &e);
	if (!w->ops || w->ops->open(&cfg, &w->a, &e))
		fail_msg("%s", e.text);
	w->b = fab_new(w->plain, 2, NULL);
	assert_int_equal(w->plain->address(w->b, 22, &address), 0);
	assert_int_equal(w->ops->connect(w->a, &address, 11, &w->ab), 0);
	while (!w->ba || !up) {
		if (w->plain->poll(w->b, &ev, 1)) {
			assert_int_equal(ev.type, FAB_EV_ACCEPTED);
			w->ba = ev.ep;
		}
		if (w->ops->poll(w->a, &ev, 1)) {
			assert_int_equal(ev.type, FAB_EV_CONNECTED);
			assert_ptr_equal(ev.ep, w->ab);
			assert_int_equal(ev.user, 11);
			up = true;
		}
	}
	w->parameters = region_new(w->plain, w->b, SLOTS * SLOT_BYTES, FAB_REMOTE_READ);
	w->inbox = region_new(w->plain, w->b, SLOTS * SLOT_BYTES, FAB_REMOTE_WRITE);
	w->r_parameters = passed_on(w, w->parameters);
	w->r_inbox = passed_on(w, w->inbox);
	w->local = region_new(w->ops, w->a, SLOTS * SLOT_BYTES, FAB_LOCAL);
	fill(w->plain->region_addr(w->parameters), SLOTS * SLOT_BYTES, 7);
}

static void close_pair(struct faulty *w)
{
	w->ops->disconnect(w->ab);
	w->ops->close(w->a);
	w->plain->close(w->b);
}

static int post_read(struct faulty *w, uint32_t slot)
{
	const struct fab_op op = { .remote = w->r_parameters,
				   .remote_offset = slot * SLOT_BYTES,
				   .local = w->local,
				   .local_offset = slot * SLOT_BYTES,
				   .bytes = SLOT_BYTES,
				   .user = slot };

	memset((uint8_t *)w->ops->region_addr(w->local) + slot * SLOT_BYTES, 0, SLOT_BYTES);
	return w->ops->read(w->ab, &op, 1);
}

static bool read_is_right(struct faulty *w, uint64_t slot)
{
	const uint8_t *got = (const uint8_t *)w->ops->region_addr(w->local) + slot * SLOT_BYTES;
	const uint8_t *want = (const uint8_t *)w->plain->region_addr(w->parameters) + slot * SLOT_BYTES;

	return !memcmp(got, want, SLOT_BYTES);
}

/* ----------------------------------------------------------------------- tests */

static void only_where_it_is_allowed(void **state)
{
	struct err e = { 0 };
	(void)state;

	unsetenv("SHARDMESH_FAULTS");
	assert_null(with_faults("fault:seed=1:local-copy", &e));
	assert_non_null(strstr(e.text, "SHARDMESH_FAULTS"));
	setenv("SHARDMESH_FAULTS", "1", 1);
	assert_non_null(with_faults(
		"fault:seed=1,delay=2ms,drop=0.01,deadline=1s,reorder=1,corrupt=0,disconnect=0.5:local", &e));
	assert_null(with_faults("fault:seed=1:nothing", &e));
	for (const char *const *bad = (const char *const[]){ "fault:local", "fault:delay=2:local", "fault:drop=2:local",
							     "fault:drop=:local", "fault:sed=1:local", "fault:x:local",
							     "fault:seed=:local", NULL };
	     *bad; bad++)
		assert_null(with_faults(*bad, &e));
	assert_true(with_faults("fault:seed=1:local", &e)->maps);
	assert_string_equal(with_faults("fault:seed=1:local-copy", &e)->name, "local-copy");
}

static void reads_complete_once_in_another_order(void **state)
{
	bool out[SLOTS] = { false };
	uint32_t posted = 0, done = 0, passed = 0;
	uint64_t last = 0, order[SLOTS] = { 0 };
	struct fab_event ev;
	struct faulty w;
	(void)state;

	open_pair(&w, "fault:seed=5,delay=100us,drop=0.05,deadline=3ms,reorder=0.2:local-copy");
	while (done < ROUNDS) {
		for (uint32_t i = 0; i < SLOTS && posted < ROUNDS; i++) {
			if (out[i])
				continue;
			assert_int_equal(post_read(&w, i), 0);
			out[i] = true;
			order[i] = ++posted;
		}
		if (!w.ops->poll(w.a, &ev, 1))
			continue;
		assert_int_equal(ev.type, FAB_EV_READ);
		assert_int_equal(ev.status, 0);
		assert_true(ev.user < SLOTS && out[ev.user]);
		assert_true(read_is_right(&w, ev.user));
		out[ev.user] = false;
		passed += order[ev.user] < last;
		last = order[ev.user];
		done++;
	}
	assert_true(passed > ROUNDS / 20);
	/* Done again, of which the user hears nothing. */
	assert_true(w.ops->counters(w.a)->reads > ROUNDS);
	no_event(w.ops, w.a);
	close_pair(&w);
}

static void notices_come_at_least_once(void **state)
{
	uint32_t notices[ROUNDS] = { 0 }, posted = 0, done = 0, seen = 0, twice = 0;
	uint64_t deadline = clock_now_ns() + WAIT_NS;
	struct fab_event ev;
	struct faulty w;
	(void)state;

	open_pair(&w, "fault:seed=9,drop=0.2,deadline=1ms:local-copy");
	fill(w.ops->region_addr(w.local), SLOTS * SLOT_BYTES, 3);
	while (done < ROUNDS || seen < ROUNDS) {
		const struct fab_op op = { .remote = w.r_inbox,
					   .remote_offset = posted % SLOTS * SLOT_BYTES,
					   .local = w.local,
					   .local_offset = posted % SLOTS * SLOT_BYTES,
					   .bytes = SLOT_BYTES,
					   .imm = posted };

		assert_true(clock_now_ns() < deadline);
		if (posted < ROUNDS && posted - done < SLOTS && !w.ops->write_notify(w.ab, &op, 1))
			posted++;
		if (w.ops->poll(w.a, &ev, 1)) {
			assert_int_equal(ev.type, FAB_EV_WRITE);
			assert_int_equal(ev.status, 0);
			done++;
		}
		if (w.plain->poll(w.b, &ev, 1)) {
			assert_int_equal(ev.type, FAB_EV_NOTICE);
			seen += notices[ev.imm] == 0;
			twice += notices[ev.imm] == 1;
			notices[ev.imm]++;
		}
	}
	assert_true(twice > 0);
	assert_true(filled(w.plain->region_addr(w.inbox), SLOTS * SLOT_BYTES, 3));
	close_pair(&w);
}

static void an_end_fails_everything_first(void **state)
{
	uint32_t failed = 0, posted = 0;
	struct fab_event ev;
	struct faulty w;
	(void)state;

	open_pair(&w, "fault:seed=2,delay=50ms,disconnect=0.1:local-copy");
	while (posted < SLOTS && post_read(&w, posted) == 0)
		posted++;
	assert_true(posted > 0 && posted < SLOTS);
	while (failed < posted) {
		assert_int_equal(w.ops->poll(w.a, &ev, 1), 1);
		assert_int_equal(ev.type, FAB_EV_READ);
		assert_int_equal(ev.status, -ECONNRESET);
		failed++;
	}
	assert_int_equal(w.ops->poll(w.a, &ev, 1), 1);
	assert_int_equal(ev.type, FAB_EV_DOWN);
	assert_int_equal(ev.user, 11);
	assert_ptr_equal(ev.ep, w.ab);
	no_event(w.ops, w.a);
	assert_int_equal(post_read(&w, 0), -ENOTCONN);
	/* The other side hears of it too. */
	assert_int_equal(next_event(w.plain, w.b).type, FAB_EV_DOWN);
	close_pair(&w);
}

static void a_bit_is_another_only_when_asked_for(void **state)
{
	struct fab_event ev;
	struct faulty w;
	(void)state;

	open_pair(&w, "fault:seed=4,corrupt=1:local-copy");
	assert_int_equal(post_read(&w, 3), 0);
	ev = next_event(w.ops, w.a);
	assert_int_equal(ev.status, 0);
	assert_false(read_is_right(&w, 3));
	close_pair(&w);
}

static void it_wakes_who_sleeps(void **state)
{
	struct fab_event ev;
	struct faulty w;
	uint64_t began;
	(void)state;

	open_pair(&w, "fault:seed=4,drop=1,deadline=30ms:local-copy");
	began = clock_now_ns();
	assert_int_equal(post_read(&w, 0), 0);
	while (!w.ops->poll(w.a, &ev, 1)) {
		struct pollfd p = { .fd = w.ops->fd(w.a), .events = POLLIN };

		if (w.ops->arm(w.a))
			assert_int_equal(poll(&p, 1, 5000), 1);
	}
	assert_int_equal(ev.type, FAB_EV_READ);
	assert_true(clock_now_ns() - began >= 30000000u);
	close_pair(&w);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(only_where_it_is_allowed),
		cmocka_unit_test(reads_complete_once_in_another_order),
		cmocka_unit_test(notices_come_at_least_once),
		cmocka_unit_test(an_end_fails_everything_first),
		cmocka_unit_test(a_bit_is_another_only_when_asked_for),
		cmocka_unit_test(it_wakes_who_sleeps),
	};

	setenv("SHARDMESH_FAULTS", "1", 1);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
