/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The provider verbs, when things go wrong. Every call of libibverbs, of
 * librdmacm and of the system that can fail does, at every place where it is
 * made: one life of two instances is lived again and again, the n-th call
 * failing. Whatever fails, nothing stays behind: no object of a device, no file
 * descriptor, no mapping and, under the address sanitizer, no memory. Then what
 * a peer tries that has no right to.
 */
#include "verbs_pair.h"

#include "rdma/verbs/verbs.h"

#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/random.h>

/* ------------------------------------------------------------ failing system calls */

static uint32_t system_calls, system_fail;
static bool counting;

static bool system_fails(int error)
{
	if (!counting || ++system_calls != system_fail)
		return false;
	errno = error;
	return true;
}

#define WRAP(type, name, error, failed, params, args)                     \
	type __real_##name params;                                        \
	type __wrap_##name params;                                        \
	type __wrap_##name params                                         \
	{                                                                 \
		return system_fails(error) ? failed : __real_##name args; \
	}

WRAP(void *, calloc, ENOMEM, NULL, (size_t n, size_t bytes), (n, bytes))
WRAP(int, epoll_create1, EMFILE, -1, (int flags), (flags))
WRAP(int, epoll_ctl, ENOMEM, -1, (int e, int op, int fd, struct epoll_event *ev), (e, op, fd, ev))
WRAP(ssize_t, getrandom, ENOSYS, -1, (void *p, size_t n, unsigned flags), (p, n, flags))
WRAP(int, timerfd_create, EMFILE, -1, (int clock, int flags), (clock, flags))
WRAP(void *, mmap, ENOMEM, MAP_FAILED, (void *at, size_t n, int prot, int flags, int fd, off_t off),
     (at, n, prot, flags, fd, off))

/* --------------------------------------------------------- one life, again and again */

/* Time is put ahead while nothing happens: what has failed is tried again, or given up. */
static struct fab_event patiently(struct vpair *v, struct side *s)
{
	struct fab_event ev = { .type = 99 };

	for (int i = 0; i < 60 && ev.type == 99; i++) {
		ev = await(v, s, 100);
		if (ev.type == 99 && i > 4)
			clock_ahead_ns += VB_S;
	}
	return ev;
}

static bool life_connect(struct vpair *v)
{
	struct fab_event ev;

	if (sides_connect(v) || (ev = patiently(v, &v->a)).type != FAB_EV_CONNECTED)
		return false;
	ev = patiently(v, &v->b);
	if (ev.type != FAB_EV_ACCEPTED)
		return false;
	v->b.ep = ev.ep;
	return true;
}

static bool life_open(struct vpair *v, const struct fab_options *o)
{
	struct fab_region_attr attr = { .name = "memory", .bytes = MIB };
	struct fab_blob blob;
	struct err e;

	v->o = *o;
	if (side_open(v, &v->a, 1, "test", NULL) || side_open(v, &v->b, 2, "test", NULL) || !life_connect(v))
		return false;
	if (v->ops->region_open(v->a.f, &attr, &v->m.mine, &e))
		return false;
	attr.access = FAB_REMOTE_READ;
	if (v->ops->region_open(v->b.f, &attr, &v->m.params, &e) ||
	    v->ops->export_region(v->b.ep, v->m.params, &blob) ||
	    v->ops->import_region(v->a.ep, &blob, &v->m.params_of_b))
		return false;
	attr.access = FAB_REMOTE_WRITE;
	return !v->ops->region_open(v->b.f, &attr, &v->m.inbox, &e) &&
	       !v->ops->export_region(v->b.ep, v->m.inbox, &blob) &&
	       !v->ops->import_region(v->a.ep, &blob, &v->m.inbox_of_b);
}

/* A batch of reads and a push. Every operation completes, well or not; what completes well is right. */
static bool life_work(struct vpair *v, uint8_t seed)
{
	struct fab_op op[33];
	uint32_t posted, good = 0;

	fill(region_at(v->ops, v->m.params), MIB, seed);
	for (uint32_t i = 0; i < 32; i++)
		op[i] = read_op(&v->m, i * 32768ull, 32768, i);
	op[32] = write_op(&v->m, 0, 64, seed);
	posted = v->ops->read(v->a.ep, op, 32) ? 0 : 32;
	posted += v->ops->write_notify(v->a.ep, op + 32, 1) == 0;
	for (uint32_t i = 0; i < posted; i++) {
		struct fab_event ev = patiently(v, &v->a);

		assert_true(ev.type == FAB_EV_READ || ev.type == FAB_EV_WRITE);
		good += ev.status == 0;
		if (ev.type == FAB_EV_READ && !ev.status)
			assert_memory_equal(region_at(v->ops, v->m.mine) + ev.user * 32768,
					    region_at(v->ops, v->m.params) + ev.user * 32768, 32768);
	}
	while (await(v, &v->b, 5).type == FAB_EV_NOTICE)
		;
	return good == 33;
}

/* All of it; how far it came is of no matter, only what is left. */
static bool live(const struct fab_options *o)
{
	struct vpair v = { 0 };
	bool good;

	clock_ahead_ns = 0;
	good = life_open(&v, o) && life_work(&v, 1);
	if (good) {
		stub.fail_status = IBV_WC_RETRY_EXC_ERR;
		stub.fail_wr = stub.wr_done + 3;
		good = life_work(&v, 2);
	}
	if (good) {
		stub_port_event(0, 1, IBV_EVENT_PORT_ERR);
		both_poll(&v);
		stub_port_event(0, 1, IBV_EVENT_PORT_ACTIVE);
		good = life_work(&v, 3);
	}
	if (good)
		v.ops->disconnect(v.a.ep);
	vpair_close(&v);
	return good;
}

static void nothing_is_left_of(const struct fab_options *o, bool system)
{
	uint32_t fds = open_fds(), n, good = 0;

	for (n = 1; n < 5000; n++) {
		bool hit;

		stub_reset();
		system_calls = 0;
		system_fail = system ? n : 0;
		stub.fail_call = system ? 0 : n;
		counting = true;
		good += live(o);
		counting = false;
		hit = system ? system_calls >= n : stub.calls >= n;
		assert_int_equal(stub.live, 0);
		assert_int_equal(open_fds(), fds);
		if (!hit)
			break;
	}
	/* To the end; and most of what fails is only done again. */
	assert_true(n > 40 && n < 5000);
	assert_true(good > 0);
	stub_reset();
}

static const struct fab_options by_control = { .connect = FAB_CONNECT_CONTROL, .queue_pairs = 1, .down_ns = 4 * VB_S };
static const struct fab_options by_cm = { .connect = FAB_CONNECT_CM, .queue_pairs = 1, .down_ns = 4 * VB_S };
static const struct fab_options automatic = { .queue_pairs = 1, .down_ns = 4 * VB_S, .traffic_class = 106 };

static void every_call_fails_by_control(void **state)
{
	(void)state;
	nothing_is_left_of(&by_control, false);
}

static void every_call_fails_by_cm(void **state)
{
	(void)state;
	nothing_is_left_of(&by_cm, false);
}

static void every_call_fails_automatic(void **state)
{
	(void)state;
	nothing_is_left_of(&automatic, false);
}

static void every_system_call_fails(void **state)
{
	(void)state;
	nothing_is_left_of(&by_control, true);
	nothing_is_left_of(&by_cm, true);
}

/* ------------------------------------------------------------- a thousand forced errors */

static void a_thousand_breaks_leave_nothing(void **state)
{
	struct vpair v;
	uint32_t live_before;

	(void)state;
	vpair_open(&v, &by_control, MIB);
	live_before = stub.live;
	for (uint32_t i = 0; i < 1000; i++) {
		struct fab_op op = read_op(&v.m, 0, 4096, i);

		stub.fail_status = i % 2 ? IBV_WC_RETRY_EXC_ERR : IBV_WC_GENERAL_ERR;
		stub.fail_wr = stub.wr_done + 1;
		assert_int_equal(v.ops->read(v.a.ep, &op, 1), 0);
		/* The last break is long over, and the wait for the next try is short. */
		clock_ahead_ns += 10 * VB_S;
		for (; v.a.n == v.a.taken; clock_ahead_ns += MS)
			both_poll(&v);
		completions(&v, 1);
	}
	quiet(&v);
	assert_int_equal(v.ops->counters(v.a.f)->rebuilds, 1000);
	assert_int_equal(stub.live, live_before);
	vpair_close(&v);
}

/* --------------------------------------------------------------------- attacks */

/* What the attacker has, got at by looking into its own instance. */
static void attack(struct vpair *v, struct fab_op op, bool write, uint64_t refused)
{
	struct fab_event ev;
	int ret = write ? v->ops->write_notify(v->a.ep, &op, 1) : v->ops->read(v->a.ep, &op, 1);

	assert_int_equal(ret, 0);
	ev = patiently(v, &v->a);
	assert_int_equal(ev.type, write ? FAB_EV_WRITE : FAB_EV_READ);
	assert_int_equal(ev.status, -EACCES);
	ev = patiently(v, &v->a);
	assert_int_equal(ev.type, FAB_EV_DOWN);
	assert_int_equal(ev.status, -EACCES);
	/* On a device that says nothing, it is found by looking. */
	for (int i = 0; i < 400 && v->ops->counters(v->b.f)->refused < refused; i++) {
		clock_ahead_ns += VB_S / 100;
		both_poll(v);
		nap();
	}
	assert_int_equal(v->ops->counters(v->b.f)->refused, refused);
}

enum { BEYOND_INBOX, INTO_PARAMETERS, INTO_ANOTHERS, STALE_KEY, GUESSED_KEY, READ_INBOX, READ_PRIVATE, ATTACKS };

static struct fab_op attack_op(struct vpair *v, int kind, struct fab_region *anothers, struct fab_region *private_one,
			       bool *write)
{
	struct fab_op op = write_op(&v->m, 0, 64, 1);
	struct fab_remote *in = v->m.inbox_of_b, *params = v->m.params_of_b;

	*write = true;
	switch (kind) {
	case BEYOND_INBOX:
		in->desc.bytes += MIB;
		op.remote_offset = in->desc.bytes - MIB - 32;
		break;
	case INTO_PARAMETERS:
		in->desc.at = params->desc.at;
		in->desc.key[0] = params->desc.key[0];
		break;
	case INTO_ANOTHERS:
		in->desc.at = (uintptr_t)v->ops->region_addr(anothers);
		in->desc.key[0] = anothers->mr[0]->rkey;
		break;
	case STALE_KEY:
		v->ops->region_close(v->m.inbox);
		v->m.inbox = NULL;
		break;
	case GUESSED_KEY:
		in->desc.key[0] ^= 0x100;
		break;
	case READ_INBOX:
		params->desc.at = in->desc.at;
		params->desc.key[0] = in->desc.key[0];
		*write = false;
		break;
	case READ_PRIVATE:
		params->desc.at = (uintptr_t)v->ops->region_addr(private_one);
		params->desc.key[0] = private_one->mr[0]->rkey;
		*write = false;
		break;
	}
	if (!*write)
		op = read_op(&v->m, 0, 64, 1);
	return op;
}

/* A second, honest peer of the same owner goes on as if nothing had happened. */
static void attacks_are_refused(void **state)
{
	for (int kind = 0; kind < 2 * ATTACKS; kind++) {
		struct fab_region *anothers, *private_one;
		struct fab_ep *honest_a, *honest_b;
		struct fab_remote *theirs = NULL;
		struct fab_blob blob;
		struct fab_op op;
		struct vpair v;
		bool write;

		(void)state;
		stub_reset();
		stub.quiet_access = stub.no_flush_receives = kind >= ATTACKS;
		vpair_open(&v, &by_control, MIB);
		honest_a = v.a.ep;
		honest_b = v.b.ep;
		vpair_connect(&v);
		/* The first is honest, the second attacks. */
		anothers = v.m.inbox;
		private_one = region_new(v.ops, v.b.f, MIB, FAB_LOCAL);
		v.m.inbox = region_new(v.ops, v.b.f, MIB, FAB_REMOTE_WRITE);
		theirs = v.m.inbox_of_b;
		v.m.params_of_b = pass(&v, v.m.params);
		v.m.inbox_of_b = pass(&v, v.m.inbox);
		fill(region_at(v.ops, v.m.params), MIB, 4);
		fill(region_at(v.ops, anothers), MIB, 5);
		op = attack_op(&v, kind % ATTACKS, anothers, private_one, &write);
		attack(&v, op, write, 1);
		assert_true(filled(region_at(v.ops, v.m.params), MIB, 4));
		assert_true(filled(region_at(v.ops, anothers), MIB, 5));
		/* The honest one is undisturbed. */
		op = (struct fab_op){ .remote = theirs, .local = v.m.mine, .bytes = 4096, .imm = 9 };
		assert_int_equal(v.ops->write_notify(honest_a, &op, 1), 0);
		completions(&v, 1);
		assert_ptr_equal(patiently(&v, &v.b).ep, honest_b);
		assert_int_equal(v.ops->export_region(honest_b, v.m.params, &blob), 0);
		vpair_close(&v);
	}
	stub_reset();
}

/* Before anybody looks, on a device that says nothing. */
static void an_attacker_that_goes_is_counted(void **state)
{
	struct fab_op op;
	struct vpair v;

	(void)state;
	stub_reset();
	stub.quiet_access = stub.no_flush_receives = true;
	vpair_open(&v, &by_control, MIB);
	v.m.params_of_b->desc.key[0] ^= 0x100;
	op = read_op(&v.m, 0, 64, 1);
	assert_int_equal(v.ops->read(v.a.ep, &op, 1), 0);
	assert_int_equal(await(&v, &v.a, LONG).status, -EACCES);
	assert_int_equal(v.ops->counters(v.b.f)->refused, 0);
	v.ops->disconnect(v.b.ep);
	assert_int_equal(v.ops->counters(v.b.f)->refused, 1);
	vpair_close(&v);
	stub_reset();
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(every_call_fails_by_control),      cmocka_unit_test(every_call_fails_by_cm),
		cmocka_unit_test(every_call_fails_automatic),       cmocka_unit_test(every_system_call_fails),
		cmocka_unit_test(a_thousand_breaks_leave_nothing),  cmocka_unit_test(attacks_are_refused),
		cmocka_unit_test(an_attacker_that_goes_is_counted),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
