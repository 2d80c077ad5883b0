/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Connections of the provider verbs, on the stub: how they are made, what they
 * agree on, how they break and come back, and when they are given up.
 */
#include "verbs_pair.h"

#include "rdma/verbs/verbs.h"

#include <fcntl.h>

static const struct fab_options by_control = { .connect = FAB_CONNECT_CONTROL };
static const struct fab_options by_cm = { .connect = FAB_CONNECT_CM };

static void read_works(struct vpair *v, uint8_t seed)
{
	struct fab_op op = read_op(&v->m, 0, MIB, seed);

	fill(region_at(v->ops, v->m.params), MIB, seed);
	assert_int_equal(v->ops->read(v->a.ep, &op, 1), 0);
	completions(v, 1);
	assert_true(filled(region_at(v->ops, v->m.mine), MIB, seed));
}

static void push_works(struct vpair *v, uint32_t imm)
{
	struct fab_op op = write_op(&v->m, 0, MIB, imm);
	struct fab_event ev;

	assert_int_equal(v->ops->write_notify(v->a.ep, &op, 1), 0);
	completions(v, 1);
	ev = await(v, &v->b, LONG);
	assert_int_equal(ev.type, FAB_EV_NOTICE);
	assert_int_equal(ev.imm, imm);
	assert_memory_equal(region_at(v->ops, v->m.inbox), region_at(v->ops, v->m.mine), MIB);
}

static void each_way_connects(void **state)
{
	static const char *const ways[] = { "by control", "by cm", "by cm" };
	const struct fab_options options[] = { by_control, by_cm, { 0 } };
	char text[200];
	struct vpair v;

	(void)state;
	for (uint32_t i = 0; i < ARRAY_LEN(options); i++) {
		vpair_open(&v, &options[i], MIB);
		v.ops->describe(v.a.ep, text, sizeof(text));
		assert_non_null(strstr(text, ways[i]));
		assert_non_null(strstr(text, "2+2 queue pairs"));
		assert_int_equal(v.signals, i == 0 ? 3 : 0);
		assert_int_equal(stub.rd_atomic, 16);
		read_works(&v, 1);
		push_works(&v, 2);
		vpair_close(&v);
	}
}

/* Where there is no connection manager, or it cannot reach the other side, automatic takes the other way. */
static void automatic_finds_a_way(void **state)
{
	char text[200];
	struct vpair v;

	(void)state;
	stub.no_cm = true;
	vpair_open(&v, NULL, MIB);
	v.ops->describe(v.a.ep, text, sizeof(text));
	assert_non_null(strstr(text, "by control"));
	read_works(&v, 3);
	vpair_close(&v);
	stub_reset();
	stub.infiniband = true;
	vpair_open(&v, NULL, MIB);
	v.ops->describe(v.a.ep, text, sizeof(text));
	assert_non_null(strstr(text, "InfiniBand"));
	read_works(&v, 4);
	vpair_close(&v);
	stub_reset();
}

/* Two kinds of devices: of everything the smaller, and never none. */
static void depth_and_mtu_are_agreed_on(void **state)
{
	struct vpair v;
	char text[200];

	(void)state;
	memset(&v, 0, sizeof(v));
	clock_ahead_ns = 0;
	stub.n_devices = 2;
	stub.reads = 5;
	v.o = by_control;
	v.o.devices = "stub0";
	assert_int_equal(side_open(&v, &v.a, 1, "test", NULL), 0);
	v.o.devices = "stub1:1";
	assert_int_equal(side_open(&v, &v.b, 2, "test", NULL), 0);
	vpair_connect(&v);
	assert_int_equal(stub.rd_atomic, 4);
	v.ops->describe(v.a.ep, text, sizeof(text));
	assert_non_null(strstr(text, "MTU 1024"));
	vpair_close(&v);
	stub_reset();
	for (uint8_t ours = 0; ours < 3; ours++)
		for (uint8_t theirs = 0; theirs < 3; theirs++) {
			uint8_t out = 0;

			assert_int_equal(vb_reads(ours, theirs, &out), ours && theirs ? 0 : -ENOTSUP);
			assert_int_equal(out, ours < theirs ? ours : theirs);
		}
}

static void what_cannot_be_used_is_named(void **state)
{
	const struct fab_ops *ops = fab_provider("verbs");
	struct fab_options o = { 0 };
	char reason[160];
	struct vpair v = { .ops = ops };
	struct fab_config cfg = { .job = "test", .options = &o };
	struct err e = { 0 };

	(void)state;
	assert_int_equal(ops->probe(&o, reason), 0);
	assert_non_null(strstr(reason, "stub0/1 RoCE v2, GID 2 (10.0.0.1), MTU 4096"));
	o.devices = "mlx5_0,stub0:3";
	assert_true(ops->probe(&o, reason) < 0);
	assert_int_equal(ops->open(&cfg, &v.a.f, &e), -ENODEV);
	o.devices = NULL;
	stub.link_local = true;
	assert_true(ops->probe(&o, reason) < 0);
	assert_non_null(strstr(reason, "IP address"));
	assert_int_equal(ops->open(&cfg, &v.a.f, &e), -ENODEV);
	assert_non_null(strstr(e.text, "IP address"));
	stub_reset();
	stub.port_down[0][1] = true;
	assert_int_equal(ops->probe(&o, reason), -ENETDOWN);
	assert_non_null(strstr(reason, "is down"));
	stub_reset();
	stub.n_devices = 0;
	assert_int_equal(ops->probe(&o, reason), -ENODEV);
	stub_reset();
	stub.reads = 0;
	assert_int_equal(ops->probe(&o, reason), -EOPNOTSUPP);
	stub_reset();
	o.gid_index = 1 + 9;
	assert_true(ops->probe(&o, reason) < 0);
	assert_non_null(strstr(reason, "GID 9"));
	o = (struct fab_options){ .connect = FAB_CONNECT_CM };
	stub.no_cm = true;
	assert_int_equal(ops->open(&cfg, &v.a.f, &e), -ENODEV);
	assert_non_null(strstr(e.text, "rdma_ucm"));
	assert_int_equal(stub.live, 0);
	stub_reset();
}

static void the_memlock_remedy_is_exact(void **state)
{
	struct err e = { 0 };

	(void)state;
	assert_int_equal(vb_memlock_check(1 << 20, 0, 8 << 20, false, &e), 0);
	assert_int_equal(vb_memlock_check(1ull << 40, 1 << 20, 8 << 20, true, &e), 0);
	assert_int_equal(vb_memlock_check(1ull << 40, 1 << 20, UINT64_MAX, false, &e), 0);
	assert_int_equal(vb_memlock_check(8 << 20, 1, 8 << 20, false, &e), -ENOMEM);
	assert_non_null(strstr(e.text, "the limit is 8.0 MiB"));
	assert_non_null(strstr(e.text, "ulimit -l unlimited"));
	assert_non_null(strstr(e.text, "LimitMEMLOCK=infinity"));
	assert_non_null(strstr(e.text, "IPC_LOCK"));
}

/* ------------------------------------------------------------------- who is let in */

static void secrets_are_good_once(void **state)
{
	const struct fab_options options[] = { by_control, by_cm };
	struct fab_blob address, wrong;
	struct fab_event ev;
	struct fab_ep *ep;
	struct vpair v;

	(void)state;
	for (uint32_t i = 0; i < ARRAY_LEN(options); i++) {
		vpair_open(&v, &options[i], MIB);
		assert_int_equal(v.ops->address(v.b.f, 22, &address), 0);
		wrong = address;
		wrong.data[offsetof(struct vb_address, secret)] ^= 1;
		assert_int_equal(v.ops->connect(v.a.f, &wrong, 11, &ep), 0);
		ev = await(&v, &v.a, LONG);
		assert_int_equal(ev.type, FAB_EV_DOWN);
		assert_int_equal(ev.status, -ECONNREFUSED);
		assert_ptr_equal(ev.ep, ep);
		v.ops->disconnect(ep);
		/* A wrong one does not use up a right one. */
		assert_int_equal(v.ops->connect(v.a.f, &address, 11, &ep), 0);
		assert_int_equal(await(&v, &v.a, LONG).type, FAB_EV_CONNECTED);
		assert_int_equal(await(&v, &v.b, LONG).type, FAB_EV_ACCEPTED);
		assert_int_equal(v.ops->connect(v.a.f, &address, 11, &ep), 0);
		ev = await(&v, &v.a, LONG);
		assert_int_equal(ev.type, FAB_EV_DOWN);
		assert_int_equal(ev.status, -ECONNREFUSED);
		quiet(&v);
		read_works(&v, 9);
		vpair_close(&v);
	}
}

static void another_job_is_refused(void **state)
{
	struct vpair v = { 0 };
	struct fab_blob address;

	(void)state;
	assert_int_equal(side_open(&v, &v.a, 1, "test", NULL), 0);
	assert_int_equal(side_open(&v, &v.b, 2, "another", NULL), 0);
	assert_int_equal(v.ops->address(v.b.f, 22, &address), 0);
	assert_int_equal(v.ops->connect(v.a.f, &address, 11, &v.a.ep), -EINVAL);
	address.bytes--;
	assert_int_equal(v.ops->connect(v.a.f, &address, 11, &v.a.ep), -EINVAL);
	vpair_close(&v);
}

/* Signals are the peer's to choose: whatever they hold, they are refused or do no harm. */
static void strange_signals_do_no_harm(void **state)
{
	struct vb_msg m = { 0 };
	struct fab_blob blob, any;
	struct fab_event ev[8];
	struct vpair v;
	uint32_t n = 0;

	(void)state;
	memset(&v, 0, sizeof(v));
	v.o = by_control;
	assert_int_equal(side_open(&v, &v.a, 1, "test", NULL), 0);
	assert_int_equal(side_open(&v, &v.b, 2, "test", NULL), 0);
	assert_int_equal(sides_connect(&v), 0);
	while (!(n = v.ops->poll(v.a.f, ev, 8)))
		;
	assert_int_equal(ev[0].type, FAB_EV_SIGNAL);
	blob = *ev[0].blob;
	for (uint32_t at = 0; at < blob.bytes; at++) {
		/* The secret, the nonce and what is not looked at yet may be anything; to whom it is from may not. */
		any = blob;
		any.bytes = at;
		assert_int_equal(v.ops->signal(v.b.f, 22, &any), -EPROTO);
		for (unsigned bit = 0; bit < 8; bit++) {
			int ret;

			any = blob;
			any.data[at] ^= (uint8_t)(1 << bit);
			/* Of somebody else's address. */
			ret = v.ops->signal(v.b.f, 23, &any);
			assert_true(ret == 0 || ret == -EPROTO);
		}
	}
	vpair_close(&v);
	/* Every word to an endpoint that is up, with every generation near. */
	vpair_open(&v, &by_control, MIB);
	memcpy(&m, blob.data, sizeof(m));
	memcpy(m.hello.secret, v.a.ep->secret, sizeof(m.hello.secret));
	m.hello.nonce = v.a.ep->nonce;
	for (uint32_t word = 0; word < 256; word++) {
		if (word == VB_OFFER || word == VB_GONE || word == VB_BROKEN)
			continue;
		for (uint32_t generation = 1; generation < 3; generation++) {
			m.word = (uint8_t)word;
			m.hello.generation = generation;
			m.active = word & 1;
			memcpy(any.data, &m, sizeof(m));
			any.bytes = sizeof(m);
			if (word != VB_LATER) {
				m.active = 1;
				(void)v.ops->signal(v.b.f, 22, &any);
				(void)v.ops->signal(v.a.f, 11, &any);
			}
		}
	}
	read_works(&v, 1);
	push_works(&v, 1);
	vpair_close(&v);
}

/* -------------------------------------------------------------- breaking, coming back */

static void broken_once(struct vpair *v, uint8_t round)
{
	struct fab_op op[64];

	fill(region_at(v->ops, v->m.params), MIB, round);
	memset(region_at(v->ops, v->m.mine), 0, MIB);
	for (uint32_t i = 0; i < 64; i++)
		op[i] = read_op(&v->m, i * 16384ull, 16384, i);
	assert_int_equal(v->ops->read(v->a.ep, op, 64), 0);
	completions(v, 64);
	assert_true(filled(region_at(v->ops, v->m.mine), MIB, round));
	push_works(v, round);
}

/* Whatever way a work request ends, it is done again, and the user hears nothing but that it is done. */
static void failed_work_is_done_again(void **state)
{
	static const enum ibv_wc_status status[] = {
		IBV_WC_RETRY_EXC_ERR, IBV_WC_RNR_RETRY_EXC_ERR, IBV_WC_GENERAL_ERR,
		IBV_WC_REM_OP_ERR,    IBV_WC_LOC_QP_OP_ERR,     IBV_WC_WR_FLUSH_ERR
	};
	const struct fab_options options[] = { by_control, by_cm };
	struct vpair v;

	(void)state;
	for (uint32_t o = 0; o < ARRAY_LEN(options); o++) {
		vpair_open(&v, &options[o], MIB);
		for (uint32_t i = 0; i < ARRAY_LEN(status); i++) {
			stub.fail_status = status[i];
			stub.fail_wr = stub.wr_done + 1 + 7 * i;
			broken_once(&v, (uint8_t)(i + 1));
			assert_int_equal(v.ops->counters(v.a.f)->rebuilds, i + 1);
			assert_true(v.ops->counters(v.a.f)->replays > i);
			/* So that the next is not held for a repeat. */
			clock_ahead_ns += 10 * VB_S;
			while (await(&v, &v.b, 10).type == FAB_EV_NOTICE)
				;
		}
		quiet(&v);
		assert_int_equal(stub_qps(), 8);
		vpair_close(&v);
	}
}

/* A read whose completion never comes: the deadline breaks the rail; until it is drained nothing completes. */
static void a_lost_read_ends_at_the_deadline(void **state)
{
	const struct fab_options o = { .connect = FAB_CONNECT_CONTROL, .deadline_ns = 3 * VB_S };
	struct fab_op op;
	struct vpair v;

	(void)state;
	vpair_open(&v, &o, MIB);
	fill(region_at(v.ops, v.m.params), MIB, 8);
	op = read_op(&v.m, 0, MIB, 1);
	stub.lose_wr = stub.wr_done + 1;
	assert_int_equal(v.ops->read(v.a.ep, &op, 1), 0);
	assert_int_equal(await(&v, &v.a, 300).type, 99);
	assert_int_equal(v.ops->counters(v.a.f)->rebuilds, 0);
	clock_ahead_ns += 3 * VB_S;
	completions(&v, 1);
	assert_true(filled(region_at(v.ops, v.m.mine), MIB, 8));
	assert_int_equal(v.ops->counters(v.a.f)->rebuilds, 1);
	vpair_close(&v);
}

static void half_a_chain_is_not_lost(void **state)
{
	struct vpair v;

	(void)state;
	vpair_open(&v, &by_control, MIB);
	stub.fail_post = stub.posts + 1;
	broken_once(&v, 3);
	assert_int_equal(v.ops->counters(v.a.f)->rebuilds, 1);
	vpair_close(&v);
}

static void ports_come_and_go(void **state)
{
	const struct fab_options options[] = { by_control, by_cm, { 0 } };
	struct fab_op op;
	struct vpair v;
	char text[200];

	(void)state;
	for (uint32_t i = 0; i < ARRAY_LEN(options); i++) {
		vpair_open(&v, &options[i], MIB);
		fill(region_at(v.ops, v.m.params), MIB, 6);
		op = read_op(&v.m, 0, MIB, 1);
		stub_port_event(0, 1, IBV_EVENT_PORT_ERR);
		assert_int_equal(v.ops->read(v.a.ep, &op, 1), 0);
		assert_int_equal(await(&v, &v.a, 200).type, 99);
		/* It comes back with its GIDs in another place. */
		stub.gid_shift = 3;
		stub_port_event(0, 1, IBV_EVENT_PORT_ACTIVE);
		completions(&v, 1);
		assert_true(filled(region_at(v.ops, v.m.mine), MIB, 6));
		v.ops->describe(v.a.ep, text, sizeof(text));
		assert_non_null(strstr(text, "GID 5"));
		quiet(&v);
		vpair_close(&v);
		stub_reset();
	}
}

/* Nothing is in flight whose deadline would tell. */
static void a_port_that_has_moved_is_left(void **state)
{
	struct vpair v;
	char text[200];

	(void)state;
	vpair_open(&v, &by_control, MIB);
	stub_port_event(0, 1, IBV_EVENT_GID_CHANGE);
	quiet(&v);
	assert_int_equal(v.ops->counters(v.a.f)->errors, 0);
	stub.gid_shift = 3;
	stub_port_event(0, 1, IBV_EVENT_GID_CHANGE);
	for (uint32_t i = 0; v.ops->counters(v.a.f)->rebuilds < 1; i++) {
		assert_true(i < LONG);
		both_poll(&v);
		nap();
	}
	v.ops->describe(v.a.ep, text, sizeof(text));
	assert_non_null(strstr(text, "GID 5"));
	read_works(&v, 1);
	vpair_close(&v);
	stub_reset();
}

/* One device of two dies: the other carries on, and nobody hears of it. */
static void a_dead_device_leaves_the_other(void **state)
{
	struct vpair v;

	(void)state;
	stub.n_devices = 2;
	vpair_open(&v, &by_control, MIB);
	stub_device_event(1, IBV_EVENT_DEVICE_FATAL);
	for (uint8_t i = 0; i < 5; i++) {
		read_works(&v, i);
		push_works(&v, i);
	}
	quiet(&v);
	vpair_close(&v);
	stub_reset();
}

static void the_only_dead_device_is_the_end(void **state)
{
	const struct fab_options o = { .down_ns = VB_S };
	struct fab_event ev;
	struct fab_op op;
	struct vpair v;

	(void)state;
	vpair_open(&v, &o, MIB);
	stub.hold = true;
	op = read_op(&v.m, 0, MIB, 5);
	assert_int_equal(v.ops->read(v.a.ep, &op, 1), 0);
	stub_device_event(0, IBV_EVENT_DEVICE_FATAL);
	assert_int_equal(await(&v, &v.a, 200).type, 99);
	clock_ahead_ns += 2 * VB_S;
	ev = await(&v, &v.a, LONG);
	assert_int_equal(ev.type, FAB_EV_READ);
	assert_int_equal(ev.user, 5);
	assert_true(ev.status < 0);
	ev = await(&v, &v.a, LONG);
	assert_int_equal(ev.type, FAB_EV_DOWN);
	assert_ptr_equal(ev.ep, v.a.ep);
	assert_int_equal(await(&v, &v.b, LONG).type, FAB_EV_DOWN);
	quiet(&v);
	assert_int_equal(v.ops->read(v.a.ep, &op, 1), -ENOTCONN);
	vpair_close(&v);
	stub_reset();
}

/* ----------------------------------------------------------------------------- ends */

static void each_side_hears_of_the_end(void **state)
{
	const struct fab_options options[] = { by_control, by_cm };

	(void)state;
	for (uint32_t i = 0; i < 4; i++) {
		bool a_leaves = i & 1;
		struct fab_event ev;
		struct vpair v;
		struct side *left;
		struct fab_op op;

		vpair_open(&v, &options[i / 2], MIB);
		left = a_leaves ? &v.b : &v.a;
		op = read_op(&v.m, 0, MIB, 1);
		if (!a_leaves) {
			stub.hold = true;
			assert_int_equal(v.ops->read(v.a.ep, &op, 1), 0);
		}
		v.ops->disconnect(a_leaves ? v.a.ep : v.b.ep);
		stub.hold = false;
		/* A reader notices; one that is only read from, when it asks. */
		if (a_leaves && i / 2 == 0) {
			quiet(&v);
			vpair_close(&v);
			continue;
		}
		ev = await(&v, left, LONG);
		if (!a_leaves) {
			assert_int_equal(ev.type, FAB_EV_READ);
			assert_true(ev.status < 0);
			ev = await(&v, left, LONG);
		}
		assert_int_equal(ev.type, FAB_EV_DOWN);
		assert_int_equal(ev.status, -ECONNRESET);
		quiet(&v);
		vpair_close(&v);
	}
}

static void a_deaf_peer_is_given_up(void **state)
{
	struct vpair v;
	struct fab_event ev;

	(void)state;
	memset(&v, 0, sizeof(v));
	clock_ahead_ns = 0;
	v.o = by_control;
	v.b.deaf = true;
	assert_int_equal(side_open(&v, &v.a, 1, "test", NULL), 0);
	assert_int_equal(side_open(&v, &v.b, 2, "test", NULL), 0);
	assert_int_equal(sides_connect(&v), 0);
	for (int i = 0; i < 40 && v.a.n == 0; i++) {
		clock_ahead_ns += VB_S / 2;
		assert_true(await(&v, &v.b, 20).type == 99);
	}
	ev = await(&v, &v.a, LONG);
	assert_int_equal(ev.type, FAB_EV_DOWN);
	assert_int_equal(ev.status, -ETIMEDOUT);
	vpair_close(&v);
}

static void cycles_leave_nothing(void **state)
{
	const struct fab_options options[] = { by_control, by_cm };
	uint32_t fds = open_fds();
	struct vpair v;

	(void)state;
	for (uint32_t o = 0; o < ARRAY_LEN(options); o++) {
		uint32_t live, up;

		vpair_open(&v, &options[o], MIB);
		v.ops->remote_close(v.m.params_of_b);
		v.ops->remote_close(v.m.inbox_of_b);
		live = stub.live;
		up = open_fds();
		for (int i = 0; i < 200; i++) {
			v.ops->disconnect(v.a.ep);
			v.ops->disconnect(v.b.ep);
			both_poll(&v);
			v.a.n = v.a.taken = v.b.n = v.b.taken = 0;
			vpair_connect(&v);
		}
		/* The inbox was of the first. */
		assert_int_equal(stub.live, live - 1);
		assert_int_equal(open_fds(), up);
		vpair_close(&v);
		assert_int_equal(open_fds(), fds);
	}
}

/* What must be said of a broken rail is said, once. */
static void breaks_are_logged(void **state)
{
	char said[16384] = { 0 };
	struct vpair v = { 0 };
	struct log log;
	int pipes[2];

	(void)state;
	assert_int_equal(pipe2(pipes, O_NONBLOCK | O_CLOEXEC), 0);
	log_init(&log, pipes[1], "test");
	v.o = by_control;
	assert_int_equal(side_open(&v, &v.a, 1, "test", &log), 0);
	assert_int_equal(side_open(&v, &v.b, 2, "test", NULL), 0);
	vpair_connect(&v);
	v.m.params = region_new(v.ops, v.b.f, MIB, FAB_REMOTE_READ);
	v.m.mine = region_new(v.ops, v.a.f, MIB, FAB_LOCAL);
	v.m.params_of_b = pass(&v, v.m.params);
	stub.fail_status = IBV_WC_RETRY_EXC_ERR;
	stub.fail_wr = stub.wr_done + 1;
	read_works(&v, 1);
	assert_true(read(pipes[0], said, sizeof(said) - 1) > 0);
	assert_non_null(strstr(said, "stub0/1: RoCE v2, GID 2 (10.0.0.1; the best that can be routed), MTU 4096"));
	assert_non_null(strstr(said, "transport retry counter exceeded"));
	assert_null(strstr(said, "Flushed"));
	assert_non_null(strstr(said, "is up again"));
	assert_int_equal(atomic_load(&log.count[LOG_WARN]), 1);
	vpair_close(&v);
	close(pipes[0]);
	close(pipes[1]);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(each_way_connects),
		cmocka_unit_test(automatic_finds_a_way),
		cmocka_unit_test(depth_and_mtu_are_agreed_on),
		cmocka_unit_test(what_cannot_be_used_is_named),
		cmocka_unit_test(the_memlock_remedy_is_exact),
		cmocka_unit_test(secrets_are_good_once),
		cmocka_unit_test(another_job_is_refused),
		cmocka_unit_test(strange_signals_do_no_harm),
		cmocka_unit_test(failed_work_is_done_again),
		cmocka_unit_test(a_lost_read_ends_at_the_deadline),
		cmocka_unit_test(half_a_chain_is_not_lost),
		cmocka_unit_test(ports_come_and_go),
		cmocka_unit_test(a_port_that_has_moved_is_left),
		cmocka_unit_test(a_dead_device_leaves_the_other),
		cmocka_unit_test(the_only_dead_device_is_the_end),
		cmocka_unit_test(each_side_hears_of_the_end),
		cmocka_unit_test(a_deaf_peer_is_given_up),
		cmocka_unit_test(cycles_leave_nothing),
		cmocka_unit_test(breaks_are_logged),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
