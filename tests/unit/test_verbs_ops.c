/* SPDX-License-Identifier: Apache-2.0 */
/* Reads, pushes and notices of the provider verbs, on the stub: how they are cut, posted and counted. */
#include "verbs_pair.h"

#include <poll.h>

static void reads_of_any_size(void **state)
{
	static const uint64_t bytes[] = { 1, 8, 4096, 512 << 10, (512 << 10) + 1, 5 * MIB + 77 };
	struct vpair v;

	(void)state;
	vpair_open(&v, NULL, 8 * MIB);
	fill(region_at(v.ops, v.m.params), 8 * MIB, 3);
	for (size_t i = 0; i < ARRAY_LEN(bytes); i++) {
		struct fab_op op = read_op(&v.m, 4096 + i, bytes[i], i);
		struct fab_event ev;

		memset(region_at(v.ops, v.m.mine), 0, 8 * MIB);
		assert_int_equal(v.ops->read(v.a.ep, &op, 1), 0);
		ev = await(&v, &v.a, LONG);
		assert_int_equal(ev.type, FAB_EV_READ);
		assert_int_equal(ev.user, i);
		assert_int_equal(ev.status, 0);
		assert_memory_equal(region_at(v.ops, v.m.mine) + 4096 + i, region_at(v.ops, v.m.params) + 4096 + i,
				    bytes[i]);
		assert_int_equal(region_at(v.ops, v.m.mine)[4095 + i], 0);
		assert_int_equal(region_at(v.ops, v.m.mine)[4096 + i + bytes[i]], 0);
	}
	assert_int_equal(v.ops->counters(v.a.f)->reads, ARRAY_LEN(bytes));
	quiet(&v);
	vpair_close(&v);
}

/* A notice for each operation, however many slices it has, and its bytes are there. */
static void pushes_of_any_size(void **state)
{
	static const uint64_t bytes[] = { 1, 64, 65, 512 << 10, 3 * MIB + 5 };
	struct vpair v;

	(void)state;
	vpair_open(&v, NULL, 4 * MIB);
	fill(region_at(v.ops, v.m.mine), 4 * MIB, 9);
	for (uint32_t i = 0; i < ARRAY_LEN(bytes); i++) {
		struct fab_op op = write_op(&v.m, 128, bytes[i], 40 + i);
		struct fab_event ev;

		assert_int_equal(v.ops->write_notify(v.a.ep, &op, 1), 0);
		ev = await(&v, &v.b, LONG);
		assert_int_equal(ev.type, FAB_EV_NOTICE);
		assert_int_equal(ev.imm, 40 + i);
		assert_int_equal(ev.user, 22);
		assert_memory_equal(region_at(v.ops, v.m.inbox) + 128, region_at(v.ops, v.m.mine) + 128, bytes[i]);
		ev = await(&v, &v.a, LONG);
		assert_int_equal(ev.type, FAB_EV_WRITE);
		assert_int_equal(ev.user, 1040 + i);
		quiet(&v);
	}
	/* And the end of the last. */
	assert_int_equal(stub.inline_n, 3);
	vpair_close(&v);
}

/* A full batch goes out in chains, is completed by their last, and everybody gets what is his. */
static void batches_are_chained(void **state)
{
	struct fab_op op[FAB_BATCH_MAX];
	bool seen[FAB_BATCH_MAX] = { false };
	struct vpair v;
	uint32_t posts;

	(void)state;
	vpair_open(&v, NULL, MIB);
	fill(region_at(v.ops, v.m.params), MIB, 1);
	for (uint32_t i = 0; i < FAB_BATCH_MAX; i++)
		op[i] = read_op(&v.m, i * 4096ull, 4096, i);
	posts = stub.posts;
	assert_int_equal(v.ops->read(v.a.ep, op, FAB_BATCH_MAX), 0);
	assert_int_equal(stub.chain_max, 32);
	assert_int_equal(stub.posts - posts, FAB_BATCH_MAX / 32);
	for (uint32_t i = 0; i < FAB_BATCH_MAX; i++) {
		struct fab_event ev = await(&v, &v.a, LONG);

		assert_int_equal(ev.status, 0);
		assert_true(ev.user < FAB_BATCH_MAX && !seen[ev.user]);
		seen[ev.user] = true;
	}
	assert_true(filled(region_at(v.ops, v.m.mine), MIB, 1));
	vpair_close(&v);
}

/* More than is posted at once waits and goes out as the first comes back; then there is -EAGAIN. */
static void too_much_waits(void **state)
{
	const struct fab_options o = { .inflight_bytes = MIB };
	struct fab_op op[FAB_BATCH_MAX];
	uint32_t posted = 0;
	struct vpair v;
	int ret;

	(void)state;
	vpair_open(&v, &o, MIB);
	stub.hold = true;
	for (uint32_t i = 0; i < FAB_BATCH_MAX; i++)
		op[i] = read_op(&v.m, i * 4096ull, 4096, i);
	while ((ret = v.ops->read(v.a.ep, op, FAB_BATCH_MAX)) == 0)
		posted += FAB_BATCH_MAX;
	assert_int_equal(ret, -EAGAIN);
	assert_true(posted >= 512);
	quiet(&v);
	stub.hold = false;
	completions(&v, posted);
	quiet(&v);
	vpair_close(&v);
}

/* The budget is of bytes with the NIC: four slices, though eight would fit the queues. */
static void the_budget_holds(void **state)
{
	const struct fab_options o = { .inflight_bytes = 2 * MIB };
	struct fab_op op;
	struct vpair v;
	uint32_t posts;

	(void)state;
	vpair_open(&v, &o, 8 * MIB);
	stub.hold = true;
	posts = stub.posts;
	op = read_op(&v.m, 0, 4 * MIB, 1);
	assert_int_equal(v.ops->read(v.a.ep, &op, 1), 0);
	/* Two chains. */
	assert_int_equal(stub.posts - posts, 2);
	assert_int_equal(stub_waiting(), 4);
	stub.hold = false;
	completions(&v, 1);
	vpair_close(&v);
}

static void notices_outnumber_receives(void **state)
{
	enum { N = 3000 };
	uint8_t seen[N] = { 0 };
	uint32_t posted = 0, noticed = 0;
	struct vpair v;

	(void)state;
	vpair_open(&v, NULL, 8 * N);
	while (noticed < N) {
		struct fab_op op = write_op(&v.m, 8ull * posted, 8, posted);
		struct fab_event ev;

		if (posted < N && v.ops->write_notify(v.a.ep, &op, 1) == 0)
			posted++;
		while ((ev = await(&v, &v.b, 1)).type == FAB_EV_NOTICE) {
			assert_true(ev.imm < N && !seen[ev.imm]++);
			noticed++;
		}
		while (await(&v, &v.a, 0).type == FAB_EV_WRITE)
			;
	}
	quiet(&v);
	assert_int_equal(v.ops->counters(v.b.f)->notices, N);
	vpair_close(&v);
}

/* Nobody takes notices: the writer waits, nothing is lost, and nothing is in the way of reads. */
static void a_side_that_does_not_poll(void **state)
{
	struct fab_op op[FAB_BATCH_MAX], read_one;
	struct fab_event ev;
	uint32_t done = 0;
	struct vpair v;

	(void)state;
	vpair_open(&v, NULL, MIB);
	for (uint32_t round = 0; round < 4; round++) {
		for (uint32_t i = 0; i < FAB_BATCH_MAX; i++)
			op[i] = write_op(&v.m, 8ull * i, 8, round * FAB_BATCH_MAX + i);
		assert_int_equal(v.ops->write_notify(v.a.ep, op, FAB_BATCH_MAX), 0);
	}
	for (int i = 0; i < 100; i++) {
		side_poll(&v, &v.a, &v.b);
		nap();
	}
	done = v.a.n;
	assert_true(done < 4 * FAB_BATCH_MAX);
	v.a.n = v.a.taken = 0;
	completions(&v, 4 * FAB_BATCH_MAX - done);
	for (uint32_t i = 0; i < 4 * FAB_BATCH_MAX; i++)
		assert_int_equal((ev = await(&v, &v.b, LONG)).type, FAB_EV_NOTICE);
	read_one = read_op(&v.m, 0, 8, 1);
	assert_int_equal(v.ops->read(v.a.ep, &read_one, 1), 0);
	completions(&v, 1);
	vpair_close(&v);
}

/* Regions that a device registers in pieces: operations are cut where keys end, on both sides. */
static void pieces_are_sewn_together(void **state)
{
	struct fab_op op;
	struct vpair v;

	(void)state;
	stub.max_mr_size = 2 * MIB + 5;
	vpair_open(&v, NULL, 7 * MIB);
	fill(region_at(v.ops, v.m.params), 7 * MIB, 5);
	op = read_op(&v.m, 3, 7 * MIB - 3, 1);
	op.local_offset = 1;
	assert_int_equal(v.ops->read(v.a.ep, &op, 1), 0);
	completions(&v, 1);
	assert_memory_equal(region_at(v.ops, v.m.mine) + 1, region_at(v.ops, v.m.params) + 3, 7 * MIB - 3);
	op = write_op(&v.m, 0, 7 * MIB, 8);
	assert_int_equal(v.ops->write_notify(v.a.ep, &op, 1), 0);
	assert_int_equal(await(&v, &v.b, LONG).imm, 8);
	assert_memory_equal(region_at(v.ops, v.m.mine), region_at(v.ops, v.m.inbox), 7 * MIB);
	vpair_close(&v);
	stub_reset();
}

/* Two devices of different kinds: both carry, and each pair of ports has what both can. */
static void rails_share_the_work(void **state)
{
	struct fab_op op;
	struct vpair v;
	char text[200];

	(void)state;
	stub.n_devices = 2;
	vpair_open(&v, NULL, 8 * MIB);
	assert_int_equal(v.ops->counters(v.a.f)->connects, 2);
	assert_int_equal(stub_qps(), 16);
	fill(region_at(v.ops, v.m.params), 8 * MIB, 2);
	op = read_op(&v.m, 0, 8 * MIB, 1);
	stub.hold = true;
	assert_int_equal(v.ops->read(v.a.ep, &op, 1), 0);
	assert_int_equal(stub.posts, 4);
	stub.hold = false;
	completions(&v, 1);
	assert_true(filled(region_at(v.ops, v.m.mine), 8 * MIB, 2));
	v.ops->describe(v.a.ep, text, sizeof(text));
	assert_non_null(strstr(text, "stub0/1 RoCE v2, GID 2, MTU"));
	assert_non_null(strstr(text, "2 of 2 rails"));
	vpair_close(&v);
	stub_reset();
}

static void sleepers_are_woken(void **state)
{
	struct vpair v;
	struct pollfd pfd = { .events = POLLIN };
	struct fab_op op;

	(void)state;
	vpair_open(&v, NULL, MIB);
	pfd.fd = v.ops->fd(v.b.f);
	while (!v.ops->arm(v.b.f) || poll(&pfd, 1, 0))
		both_poll(&v);
	op = write_op(&v.m, 0, 4096, 7);
	assert_int_equal(v.ops->write_notify(v.a.ep, &op, 1), 0);
	stub_step();
	assert_int_equal(poll(&pfd, 1, 1000), 1);
	assert_int_equal(await(&v, &v.b, 3).imm, 7);
	completions(&v, 1);
	/* A reader that sleeps while it is in flight. */
	pfd.fd = v.ops->fd(v.a.f);
	stub.hold = true;
	op = read_op(&v.m, 0, 4096, 1);
	assert_int_equal(v.ops->read(v.a.ep, &op, 1), 0);
	side_poll(&v, &v.a, &v.b);
	assert_true(v.ops->arm(v.a.f));
	stub.hold = false;
	stub_step();
	assert_int_equal(poll(&pfd, 1, 1000), 1);
	completions(&v, 1);
	vpair_close(&v);
}

/* As a service does: polls when its descriptor says so, until nothing is there, then sleeps. */
static void b_dozes(struct vpair *v)
{
	struct pollfd pfd = { .fd = v->ops->fd(v->b.f), .events = POLLIN };

	while (poll(&pfd, 1, 0) == 1) {
		do
			side_poll(v, &v->b, &v->a);
		while (!v->ops->arm(v->b.f));
	}
}

static void b_falls_asleep(struct vpair *v)
{
	while (!v->ops->arm(v->b.f))
		both_poll(v);
	b_dozes(v);
	stub.wakeups = 0;
}

/* Lets one work request after the other through; b sleeps in between. */
static void one_by_one(struct vpair *v, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++) {
		stub.stop_wr = stub.wr_done + 2;
		stub_step();
		b_dozes(v);
	}
	stub.stop_wr = 0;
}

static void push_many(struct vpair *v, uint32_t n, uint64_t bytes)
{
	struct fab_op op[FAB_BATCH_MAX];

	for (uint32_t i = 0; i < n; i++)
		op[i] = write_op(&v->m, i * bytes, bytes, i);
	stub.hold = true;
	assert_int_equal(v->ops->write_notify(v->a.ep, op, n), 0);
	stub.hold = false;
}

/* Each notice arrives, and the last of each queue pair alone wakes; of large ones each half, or each 256 KiB. */
static void the_last_notice_wakes(void **state)
{
	static const struct {
		uint32_t n, bytes, wakeups;
	} cases[] = { { 1, 8, 1 },         { 10, 8, 2 },        { 12, 4096, 2 },
		      { 64, 8, 2 },        { 4, 64 << 10, 4 },  { 8, 64 << 10, 4 },
		      { 24, 64 << 10, 6 }, { 16, 64 << 10, 4 }, { 4, 512 << 10, 4 } };
	struct vpair v;

	(void)state;
	vpair_open(&v, NULL, 2 * MIB);
	for (size_t c = 0; c < ARRAY_LEN(cases); c++) {
		b_falls_asleep(&v);
		push_many(&v, cases[c].n, cases[c].bytes);
		one_by_one(&v, cases[c].n);
		assert_int_equal(v.b.n, cases[c].n);
		for (uint32_t i = 0; i < v.b.n; i++)
			assert_int_equal(v.b.ev[i].type, FAB_EV_NOTICE);
		assert_int_equal(stub.wakeups, cases[c].wakeups);
		v.b.n = 0;
		completions(&v, cases[c].n);
		quiet(&v);
	}
	vpair_close(&v);
}

/* A chain that ends in the middle of a push: the notice before it is not kept waiting for the push's end. */
static void a_chain_without_an_end_wakes(void **state)
{
	const struct fab_options o = { .queue_pairs = 1, .inflight_bytes = 600 << 10 };
	struct fab_op op[2];
	struct vpair v;

	(void)state;
	vpair_open(&v, &o, MIB);
	b_falls_asleep(&v);
	op[0] = write_op(&v.m, 0, 8, 1);
	op[1] = write_op(&v.m, 4096, 700 << 10, 2);
	stub.hold = true;
	assert_int_equal(v.ops->write_notify(v.a.ep, op, 2), 0);
	stub.hold = false;
	assert_int_equal(stub_waiting(), 2);
	one_by_one(&v, 2);
	assert_int_equal(v.b.n, 1);
	assert_int_equal(v.b.ev[0].imm, 1);
	completions(&v, 2);
	assert_int_equal(await(&v, &v.b, LONG).imm, 1);
	assert_int_equal(await(&v, &v.b, LONG).imm, 2);
	vpair_close(&v);
}

/* A rail that breaks in a chain: what was delivered is told, what is done again wakes anew. */
static void a_rebuilt_rail_wakes(void **state)
{
	enum { N = 10 };
	uint32_t seen = 0;
	struct vpair v;

	(void)state;
	vpair_open(&v, NULL, MIB);
	for (uint32_t fail = 1; fail <= N; fail++) {
		b_falls_asleep(&v);
		stub.fail_wr = stub.wr_done + fail;
		stub.fail_status = IBV_WC_RETRY_EXC_ERR;
		push_many(&v, N, 4096);
		seen = 0;
		for (uint32_t polls = 0; seen != (1u << N) - 1; v.b.n = 0) {
			assert_true(polls++ < LONG);
			side_poll(&v, &v.a, &v.b);
			b_dozes(&v);
			nap();
			for (uint32_t i = 0; i < v.b.n; i++)
				seen |= 1u << v.b.ev[i].imm;
		}
		completions(&v, N);
		quiet(&v);
		/* Steady since, so that the next break is repaired at once. */
		clock_ahead_ns += 3000 * MS;
	}
	assert_int_equal(v.ops->counters(v.b.f)->rebuilds, N);
	vpair_close(&v);
}

static void regions_are_what_they_say(void **state)
{
	struct fab_region_attr attr = { .name = "gpu", .memory = FAB_CUDA, .bytes = 4096 };
	struct fab_region *r = NULL, *local, *second;
	struct fab_remote *remote = NULL;
	struct fab_blob blob, wrong;
	struct err e = { 0 };
	struct vpair v;

	(void)state;
	stub_reset();
	vpair_open(&v, NULL, MIB);
	assert_int_equal(v.ops->region_open(v.a.f, &attr, &r, &e), -ENOTSUP);
	assert_non_null(strstr(e.text, "device 0"));
	attr.memory = FAB_HOST;
	attr.bytes = 0;
	assert_int_equal(v.ops->region_open(v.a.f, &attr, &r, &e), -EINVAL);
	local = region_new(v.ops, v.b.f, 4096, FAB_LOCAL);
	assert_int_equal(v.ops->export_region(v.b.ep, local, &blob), -EPERM);
	assert_int_equal(v.ops->export_region(v.b.ep, v.m.inbox, &blob), -EPERM);
	second = region_new(v.ops, v.a.f, 4096, FAB_REMOTE_WRITE);
	assert_int_equal(v.ops->export_region(v.a.ep, second, &blob), -ENOTSUP);
	/* Where reads land only. */
	assert_int_equal(stub.relaxed_n, 1);

	assert_int_equal(v.ops->export_region(v.b.ep, v.m.params, &blob), 0);
	for (uint32_t cut = 0; cut < blob.bytes; cut++) {
		wrong = blob;
		wrong.bytes = cut;
		assert_int_equal(v.ops->import_region(v.a.ep, &wrong, &remote), -EINVAL);
	}
	for (uint32_t at = 0; at < 8; at++) {
		wrong = blob;
		wrong.data[at] ^= 0x55;
		assert_int_equal(v.ops->import_region(v.a.ep, &wrong, &remote), -EINVAL);
	}
	wrong = blob;
	memset(wrong.data + 8, 0xff, 16);
	assert_int_equal(v.ops->import_region(v.a.ep, &wrong, &remote), -EINVAL);
	assert_int_equal(v.ops->import_region(v.a.ep, &blob, &remote), 0);
	assert_int_equal(v.ops->remote_bytes(remote), MIB);
	assert_int_equal(v.ops->map(remote, 0, 4096, NULL, NULL), -ENOTSUP);
	v.ops->remote_close(remote);
	vpair_close(&v);
}

/* One memory over two instances: the second adopts what the first made. */
static void memory_is_adopted(void **state)
{
	const struct fab_ops *local = fab_provider("local");
	struct fab *f = fab_new(local, 2, NULL);
	struct fab_region *made = region_new(local, f, MIB, FAB_REMOTE_READ);
	struct fab_region_attr attr = { .name = "params", .bytes = MIB, .access = FAB_REMOTE_READ };
	struct fab_region *adopted = NULL;
	struct err e = { 0 };
	struct fab_op op;
	struct vpair v;

	(void)state;
	vpair_open(&v, NULL, MIB);
	attr.at = local->region_addr(made);
	assert_int_equal(v.ops->region_open(v.b.f, &attr, &adopted, &e), 0);
	assert_ptr_equal(v.ops->region_addr(adopted), attr.at);
	fill(attr.at, MIB, 77);
	v.m.params_of_b = pass(&v, adopted);
	op = read_op(&v.m, 0, MIB, 1);
	assert_int_equal(v.ops->read(v.a.ep, &op, 1), 0);
	completions(&v, 1);
	assert_true(filled(region_at(v.ops, v.m.mine), MIB, 77));
	vpair_close(&v);
	assert_true(filled(attr.at, MIB, 77));
	local->close(f);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(reads_of_any_size),         cmocka_unit_test(pushes_of_any_size),
		cmocka_unit_test(batches_are_chained),       cmocka_unit_test(too_much_waits),
		cmocka_unit_test(the_budget_holds),          cmocka_unit_test(notices_outnumber_receives),
		cmocka_unit_test(a_side_that_does_not_poll), cmocka_unit_test(pieces_are_sewn_together),
		cmocka_unit_test(rails_share_the_work),      cmocka_unit_test(sleepers_are_woken),
		cmocka_unit_test(the_last_notice_wakes),     cmocka_unit_test(a_chain_without_an_end_wakes),
		cmocka_unit_test(a_rebuilt_rail_wakes),      cmocka_unit_test(regions_are_what_they_say),
		cmocka_unit_test(memory_is_adopted),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
