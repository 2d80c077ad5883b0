/* SPDX-License-Identifier: Apache-2.0 */
/* Connections of the provider `ofi`: who is let in, what is mended, how each side hears of the end, what is left. */
#include "ofi_pair.h"

#include <netinet/in.h>
#include <sys/socket.h>

#define SECOND 1000000000ull

static uint16_t port_of(int fd, bool peer)
{
	struct sockaddr_in at = { 0 };
	socklen_t len = sizeof(at);

	if ((peer ? getpeername : getsockname)(fd, (struct sockaddr *)&at, &len) || at.sin_family != AF_INET)
		return 0;
	return at.sin_port;
}

static bool listens(uint16_t port)
{
	for (int fd = 3; fd < 1024; fd++) {
		socklen_t len = sizeof(int);
		int on = 0;

		if (!getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &on, &len) && on && port_of(fd, false) == port)
			return true;
	}
	return false;
}

/*
 * The accepting ends of all TCP connections of this process end. Only those:
 * to the others it is as if their peers had died.
 */
static uint32_t break_sockets(void)
{
	uint32_t n = 0;

	for (int fd = 3; fd < 1024; fd++) {
		if (port_of(fd, true) && listens(port_of(fd, false)))
			n += shutdown(fd, SHUT_RDWR) == 0;
	}
	return n;
}

/* The next signal of side i. */
static struct fab_blob next_signal(struct ofi_pair *p, int i)
{
	uint64_t end = clock_now_ns() + WAIT_NS;
	struct fab_event ev;

	while (!p->ops->poll(p->f[i], &ev, 1)) {
		assert_true(clock_now_ns() < end);
		nap();
	}
	assert_int_equal(ev.type, FAB_EV_SIGNAL);
	return *ev.blob;
}

/* ------------------------------------------------------------------ let in */

static void what_is_missing_is_named(void **state)
{
	const struct fab_ops *ops = fab_provider("ofi");
	struct fab_options o = { .ofi_provider = "no_such_provider" };
	struct fab_config cfg = { .job = "test", .options = &o };
	char reason[160] = { 0 };
	struct fab *f;
	struct err e = { 0 };

	(void)state;
	assert_true(ops->probe(&o, reason) < 0);
	assert_non_null(strstr(reason, "no_such_provider"));
	assert_true(ops->open(&cfg, &f, &e) < 0);
	assert_non_null(strstr(e.text, "no_such_provider"));
	o.ofi_provider = NULL;
	o.local_address = "127.0.0.1";
	assert_int_equal(ops->probe(&o, reason), 0);
	assert_non_null(strstr(reason, "tcp;ofi_rxm"));
	assert_non_null(strstr(reason, "127.0.0.1"));
}

static void secrets_are_good_once(void **state)
{
	struct fab_blob hello;
	struct ofi_pair p = { 0 };
	char text[128];

	(void)state;
	ofi_ends_open(&p, NULL);
	ofi_begin(&p);
	hello = next_signal(&p, 0);
	/* Another peer's secret, a secret that nobody was given. */
	assert_int_equal(p.ops->signal(p.f[1], USER_B + 1, &hello), -EPROTO);
	assert_int_equal(p.ops->signal(p.f[0], USER_B, &hello), -EPROTO);
	assert_int_equal(p.ops->counters(p.f[1])->refused, 1);
	assert_int_equal(p.ops->signal(p.f[1], USER_B, &hello), 0);
	/* The same introduction again is the same connection, but nobody else's. */
	assert_int_equal(p.ops->signal(p.f[1], USER_B, &hello), 0);
	assert_int_equal(p.ops->signal(p.f[1], USER_B + 1, &hello), -EPROTO);
	ofi_meet(&p);
	p.ops->describe(p.ep[0], text, sizeof(text));
	assert_non_null(strstr(text, "tcp;ofi_rxm with "));
	assert_non_null(strstr(text, "127.0.0.1"));
	/* It is used up. */
	p.ops->disconnect(p.ep[0]);
	p.ops->disconnect(ofi_expect(&p, 1, FAB_EV_DOWN).ep);
	assert_int_equal(p.ops->signal(p.f[1], USER_B, &hello), -EPROTO);
	assert_int_equal(p.ops->counters(p.f[1])->refused, 3);
	ofi_pair_close(&p);
}

static void garbage_is_no_signal(void **state)
{
	struct fab_blob address, hello, wrong = { .bytes = 0 };
	struct ofi_pair p = { 0 };
	struct fab_ep *ep;

	(void)state;
	ofi_pair_open(&p, NULL);
	assert_int_equal(p.ops->signal(p.f[1], USER_B, &wrong), -EPROTO);
	wrong.bytes = FAB_BLOB_MAX;
	memset(wrong.data, 0xa5, sizeof(wrong.data));
	assert_int_equal(p.ops->signal(p.f[1], USER_B, &wrong), -EPROTO);
	assert_int_equal(p.ops->connect(p.f[0], &wrong, 1, &ep), -EINVAL);
	assert_int_equal(p.ops->address(p.f[1], USER_B, &address), 0);
	/* An address is not a signal, nor the other way round. */
	assert_int_equal(p.ops->signal(p.f[1], USER_B, &address), -EPROTO);
	wrong = address;
	wrong.bytes--;
	assert_int_equal(p.ops->connect(p.f[0], &wrong, 1, &ep), -EINVAL);
	assert_int_equal(p.ops->connect(p.f[0], &address, 1, &ep), 0);
	hello = next_signal(&p, 0);
	assert_int_equal(p.ops->connect(p.f[0], &hello, 1, &ep), -EINVAL);
	/* Every byte of it wrong in turn: refused, or ignored, and nothing breaks. */
	for (uint32_t i = 0; i < hello.bytes; i++) {
		wrong = hello;
		wrong.data[i] ^= 0x80;
		assert_true(p.ops->signal(p.f[1], 77, &wrong) <= 0);
	}
	ofi_pair_close(&p);
}

static void providers_must_agree(void **state)
{
	struct ofi_pair p = { 0 }, net = { 0 };
	struct fab_blob address;

	(void)state;
	ofi_pair_init(&net, "net");
	net.f[1] = ofi_new(&net, 2);
	ofi_pair_init(&p, NULL);
	p.f[0] = ofi_new(&p, 1);
	assert_int_equal(net.ops->address(net.f[1], USER_B, &address), 0);
	assert_int_equal(p.ops->connect(p.f[0], &address, USER_A, &p.ep[0]), -ENOTSUP);
	p.ops->close(p.f[0]);
	net.ops->close(net.f[1]);
}

static void the_oldest_unused_address_is_forgotten(void **state)
{
	struct fab_blob first, second, more;
	struct ofi_pair p = { 0 };
	struct fab_ep *ep;

	(void)state;
	ofi_ends_open(&p, NULL);
	assert_int_equal(p.ops->address(p.f[1], 1, &first), 0);
	assert_int_equal(p.ops->address(p.f[1], 2, &second), 0);
	for (uint32_t i = 0; i < 4095; i++)
		assert_int_equal(p.ops->address(p.f[1], 3, &more), 0);
	assert_int_equal(p.ops->connect(p.f[0], &first, 1, &ep), 0);
	more = next_signal(&p, 0);
	assert_int_equal(p.ops->signal(p.f[1], 1, &more), -EPROTO);
	p.ops->disconnect(ep);
	assert_int_equal(p.ops->connect(p.f[0], &second, 1, &ep), 0);
	more = next_signal(&p, 0);
	assert_int_equal(p.ops->signal(p.f[1], 2, &more), 0);
	ofi_pair_close(&p);
}

/* ----------------------------------------------------------------- endings */

static void each_side_hears_of_the_end_once(void **state)
{
	struct ofi_pair p = { 0 };
	struct fab_event ev;

	(void)state;
	ofi_pair_open(&p, NULL);
	for (int side = 0; side < 2; side++) {
		p.ops->disconnect(p.ep[side]);
		ev = ofi_expect(&p, !side, FAB_EV_DOWN);
		assert_int_equal(ev.status, -ECONNRESET);
		assert_ptr_equal(ev.ep, p.ep[!side]);
		ofi_silence(&p);
		p.ops->disconnect(p.ep[!side]);
		ofi_join(&p);
	}
	assert_int_equal(p.ops->counters(p.f[0])->errors, 0);
	assert_int_equal(p.ops->counters(p.f[0])->connects, 3);
	ofi_pair_close(&p);
}

static void who_is_not_answered_gives_up(void **state)
{
	struct ofi_pair p = { .options = { .down_ns = SECOND / 4, .deadline_ns = SECOND / 20 }, .cut = true };
	struct fab_event ev;

	(void)state;
	ofi_ends_open(&p, NULL);
	ofi_begin(&p);
	assert_int_equal(p.ops->read(p.ep[0], NULL, 0), -ENOTCONN);
	ev = ofi_expect(&p, 0, FAB_EV_DOWN);
	assert_int_equal(ev.status, -ETIMEDOUT);
	assert_int_equal(ev.user, USER_A);
	ofi_silence(&p);
	p.ops->disconnect(p.ep[0]);
	ofi_pair_close(&p);
}

/* The accepting user never hears of a peer that introduces itself and does not come. */
static void who_does_not_come_is_forgotten(void **state)
{
	struct ofi_pair p = { .options = { .down_ns = SECOND / 4, .deadline_ns = SECOND } };
	uint64_t end = clock_now_ns() + WAIT_NS;
	struct fab_blob hello;
	struct fab_event ev;
	uint32_t fds;

	(void)state;
	ofi_ends_open(&p, NULL);
	ofi_begin(&p);
	hello = next_signal(&p, 0);
	p.ops->disconnect(p.ep[0]);
	fds = open_fds();
	assert_int_equal(p.ops->signal(p.f[1], USER_B, &hello), 0);
	while (p.ops->counters(p.f[1])->errors == 0) {
		if (p.ops->poll(p.f[1], &ev, 1))
			assert_int_equal(ev.type, FAB_EV_SIGNAL);
		assert_true(clock_now_ns() < end);
		nap();
	}
	ofi_silence(&p);
	assert_int_equal(open_fds(), fds);
	ofi_pair_close(&p);
}

static void connections_leave_nothing(void **state)
{
	uint32_t fds, threads, up, i;
	struct ofi_pair p = { 0 };

	(void)state;
	ofi_pair_open(&p, NULL);
	ofi_pair_close(&p);
	fds = open_fds();
	threads = ofi_threads();
	ofi_bench_open(&p, NULL, PAGE);
	up = open_fds();
	for (i = 0; i < 40; i++) {
		struct fab_op op = read_op(&p.m, 0, PAGE, i);

		assert_int_equal(p.ops->read(p.ep[0], &op, 1), 0);
		p.ops->disconnect(p.ep[i % 2]);
		while (ofi_next(&p, !(i % 2)).type != FAB_EV_DOWN)
			;
		p.ops->disconnect(p.ep[!(i % 2)]);
		p.ops->remote_close(p.m.params_of_b);
		ofi_join(&p);
		p.m.params_of_b = ofi_pass(&p, p.m.params, 0);
	}
	assert_int_equal(open_fds(), up);
	assert_int_equal(ofi_threads(), threads + 2);
	ofi_pair_close(&p);
	assert_int_equal(open_fds(), fds);
	assert_int_equal(ofi_threads(), threads);
}

/*
 * Closed at any point of the introduction. Descriptors are not counted:
 * ofi_rxm forgets a socket that had been accepted and not looked at.
 */
static void closing_ends_what_is_half_way(void **state)
{
	uint32_t threads = ofi_threads();

	(void)state;
	for (uint32_t i = 0; i < 12; i++) {
		struct ofi_pair p = { 0 };
		struct fab_event ev;

		ofi_ends_open(&p, NULL);
		ofi_begin(&p);
		for (uint32_t k = 0; k < i * 4; k++) {
			(void)ofi_take(&p, k % 2, &ev);
			nap();
		}
		p.ops->close(p.f[i % 2]);
		p.ops->close(p.f[!(i % 2)]);
		assert_int_equal(ofi_threads(), threads);
	}
}

/* ----------------------------------------------------------------- mending */

struct traffic {
	struct ofi_pair p;
	uint32_t reads, writes, posted, failed;
	uint8_t noticed[256];
	bool down[2];
};

static void take_traffic(struct traffic *t)
{
	struct fab_event ev;

	for (int i = 0; i < 2; i++) {
		while (ofi_take(&t->p, i, &ev)) {
			t->reads += ev.type == FAB_EV_READ;
			t->writes += ev.type == FAB_EV_WRITE;
			t->failed += ev.type != FAB_EV_NOTICE && ev.type != FAB_EV_DOWN && ev.status != 0;
			if (ev.type == FAB_EV_NOTICE)
				t->noticed[ev.imm] = 1;
			if (ev.type == FAB_EV_DOWN)
				t->down[i] = true;
			/* All that was posted has completed before. */
			if (ev.type == FAB_EV_DOWN && i == 0)
				assert_int_equal(t->reads + t->writes, t->posted);
		}
	}
	nap();
}

static void post_traffic(struct traffic *t, uint32_t rounds)
{
	for (uint32_t i = 0; i < rounds; i++) {
		struct fab_op r = read_op(&t->p.m, 0, 2 * MIB, i);
		struct fab_op w = write_op(&t->p.m, (uint64_t)i * PAGE, PAGE, i);

		assert_int_equal(t->p.ops->read(t->p.ep[0], &r, 1), 0);
		assert_int_equal(t->p.ops->write_notify(t->p.ep[0], &w, 1), 0);
		t->posted += 2;
	}
}

/* Connections break again and again; every operation completes, every notice comes, and the bytes are right. */
static void what_breaks_is_built_again(void **state)
{
	enum { ROUNDS = 64, BREAKS = 5 };
	uint64_t end = clock_now_ns() + 2 * WAIT_NS;
	const struct fab_counters *c;
	struct traffic t = { 0 };
	uint32_t broken = 0;

	(void)state;
	ofi_bench_open(&t.p, NULL, 2 * MIB);
	c = t.p.ops->counters(t.p.f[0]);
	fill(region_at(t.p.ops, t.p.m.params), 2 * MIB, 1);
	for (uint32_t k = 0; k < BREAKS; k++) {
		memset(region_at(t.p.ops, t.p.m.mine), 0, 2 * MIB);
		memset(t.noticed, 0, sizeof(t.noticed));
		memset(region_at(t.p.ops, t.p.m.inbox), 0xee, 2 * MIB);
		post_traffic(&t, ROUNDS);
		while (t.reads + t.writes < t.posted) {
			take_traffic(&t);
			if (broken == k && t.reads > k * ROUNDS + 4)
				broken += break_sockets() > 0;
			assert_true(clock_now_ns() < end);
		}
		assert_true(filled(region_at(t.p.ops, t.p.m.mine), 2 * MIB, 1));
		/* What is written is noticed, though maybe a moment later. */
		for (uint32_t i = 0; i < ROUNDS;) {
			take_traffic(&t);
			i += t.noticed[i];
			assert_true(clock_now_ns() < end);
		}
	}
	assert_int_equal(broken, BREAKS);
	assert_int_equal(t.failed, 0);
	assert_true(c->rebuilds > 0 && c->replays > 0);
	assert_int_equal(t.down[0] || t.down[1], 0);
	ofi_pair_close(&t.p);
}

/* Both have something in flight, so both notice, at the same time. */
static void two_that_notice_meet_again(void **state)
{
	struct fab_region *far, *own;
	struct ofi_pair p = { 0 };
	struct fab_op op, back;
	struct fab_remote *remote;

	(void)state;
	ofi_bench_open(&p, NULL, 2 * MIB);
	far = region_new(p.ops, p.f[0], 2 * MIB, FAB_REMOTE_READ);
	own = region_new(p.ops, p.f[1], 2 * MIB, FAB_LOCAL);
	remote = ofi_pass(&p, far, 1);
	for (uint32_t k = 0; k < 5; k++) {
		uint64_t end = clock_now_ns() + WAIT_NS;
		uint32_t left = 64;
		bool broken = false;

		for (uint32_t i = 0; i < 32; i++) {
			op = read_op(&p.m, 0, 2 * MIB, i);
			back = (struct fab_op){ .remote = remote, .local = own, .bytes = 2 * MIB };
			assert_int_equal(p.ops->read(p.ep[0], &op, 1), 0);
			assert_int_equal(p.ops->read(p.ep[1], &back, 1), 0);
		}
		while (left > 0) {
			struct fab_event ev;

			for (int i = 0; i < 2; i++) {
				while (ofi_take(&p, i, &ev)) {
					assert_int_equal(ev.type, FAB_EV_READ);
					assert_int_equal(ev.status, 0);
					left--;
				}
			}
			if (!broken && left < 60)
				broken = break_sockets() > 0;
			assert_true(clock_now_ns() < end);
			nap();
		}
		assert_true(broken);
	}
	ofi_pair_close(&p);
}

/* The network is gone for good: all that was posted fails, then the end is told. */
static void what_stays_broken_is_down(void **state)
{
	struct traffic t = { .p = { .options = { .down_ns = SECOND / 2, .deadline_ns = SECOND / 10 } } };
	uint64_t end = clock_now_ns() + WAIT_NS;
	struct fab_op op;

	(void)state;
	ofi_bench_open(&t.p, NULL, 2 * MIB);
	t.p.cut = true;
	while (!t.down[0]) {
		/* ofi_rxm may mend what it has not reported, so it is broken until that does not help. */
		if (t.reads + t.writes == t.posted) {
			post_traffic(&t, 64);
			assert_true(break_sockets() > 0);
		}
		take_traffic(&t);
		assert_true(clock_now_ns() < end);
	}
	assert_true(t.failed > 0);
	op = read_op(&t.p.m, 0, PAGE, 0);
	assert_int_equal(t.p.ops->read(t.p.ep[0], &op, 1), -ENOTCONN);
	assert_true(t.p.ops->counters(t.p.f[0])->errors >= t.failed);
	ofi_pair_close(&t.p);
}

/* ------------------------------------------------------------------ rights */

/* What an attacker may know of a descriptor does not help it: another key, a key that was taken back. */
static void only_keys_that_were_given_open(void **state)
{
	struct ofi_pair p = { .options = { .down_ns = SECOND / 2, .deadline_ns = SECOND / 4 } };
	struct ofi_pair good = { 0 };
	uint32_t down = 0;

	(void)state;
	ofi_bench_open(&p, NULL, PAGE);
	good = p;
	for (int stale = 0; stale < 2; stale++) {
		struct fab_region *secret = region_new(p.ops, p.f[1], PAGE, FAB_REMOTE_READ);
		uint64_t end = clock_now_ns() + WAIT_NS;
		struct fab_remote *remote;
		struct fab_blob blob;
		struct fab_event ev;
		struct fab_op op;

		fill(region_at(p.ops, secret), PAGE, 99);
		memset(region_at(p.ops, p.m.mine), 0, PAGE);
		/* A connection of its own for each attempt, beside the good one. */
		p.ep[0] = p.ep[1] = NULL;
		ofi_join(&p);
		assert_int_equal(p.ops->export_region(p.ep[1], secret, &blob), 0);
		if (!stale)
			blob.data[16] ^= 1; /* the key */
		assert_int_equal(p.ops->import_region(p.ep[0], &blob, &remote), 0);
		if (stale)
			p.ops->region_close(secret);
		op = (struct fab_op){ .remote = remote, .local = p.m.mine, .bytes = PAGE };
		assert_int_equal(p.ops->read(p.ep[0], &op, 1), 0);
		while (down <= (uint32_t)stale) {
			if (ofi_take(&p, 0, &ev)) {
				assert_true(ev.status < 0);
				down += ev.type == FAB_EV_DOWN;
			}
			(void)ofi_take(&p, 1, &ev);
			assert_true(clock_now_ns() < end);
			nap();
		}
		for (uint32_t i = 0; i < PAGE; i++)
			assert_int_equal(region_at(p.ops, p.m.mine)[i], 0);
		assert_true(p.ops->counters(p.f[1])->refused > 0);
		p.ops->disconnect(p.ep[0]);
		p.ops->remote_close(remote);
	}
	/* The other connection never noticed. */
	fill(region_at(good.ops, good.m.params), PAGE, 5);
	assert_int_equal(
		good.ops->read(good.ep[0],
			       &(struct fab_op){ .remote = good.m.params_of_b, .local = good.m.mine, .bytes = PAGE },
			       1),
		0);
	assert_int_equal(ofi_expect(&good, 0, FAB_EV_READ).status, 0);
	assert_true(filled(region_at(good.ops, good.m.mine), PAGE, 5));
	ofi_pair_close(&good);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(what_is_missing_is_named),
		cmocka_unit_test(secrets_are_good_once),
		cmocka_unit_test(garbage_is_no_signal),
		cmocka_unit_test(providers_must_agree),
		cmocka_unit_test(the_oldest_unused_address_is_forgotten),
		cmocka_unit_test(each_side_hears_of_the_end_once),
		cmocka_unit_test(who_is_not_answered_gives_up),
		cmocka_unit_test(who_does_not_come_is_forgotten),
		cmocka_unit_test(connections_leave_nothing),
		cmocka_unit_test(closing_ends_what_is_half_way),
		cmocka_unit_test(what_breaks_is_built_again),
		cmocka_unit_test(two_that_notice_meet_again),
		cmocka_unit_test(what_stays_broken_is_down),
		cmocka_unit_test(only_keys_that_were_given_open),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
