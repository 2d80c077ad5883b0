/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Every system call of the provider `local` fails once, at every place where it
 * is made: the linker puts the functions below in front of the real ones
 * (--wrap), and one life of two instances is lived again and again, the n-th
 * call of one kind failing. Whatever fails, nothing may stay behind: no file
 * descriptor, no mapping and, under the address sanitizer, no memory.
 */
#include "rdma_raw.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/timerfd.h>

#define CALLS(X)         \
	X(accept4)       \
	X(bind)          \
	X(calloc)        \
	X(connect)       \
	X(dup)           \
	X(epoll_create1) \
	X(epoll_ctl)     \
	X(fcntl)         \
	X(fstat)         \
	X(ftruncate)     \
	X(getrandom)     \
	X(getsockopt)    \
	X(listen)        \
	X(madvise)       \
	X(memfd_create)  \
	X(mmap)          \
	X(pwrite)        \
	X(realloc)       \
	X(recvmsg)       \
	X(sendmsg)       \
	X(socket)        \
	X(timerfd_create)

#define CALL_ENUM(name) CALL_##name,
enum call { CALLS(CALL_ENUM) CALL_NONE };

enum effect {
	FATAL,    /* something must report it */
	HARMLESS, /* nothing may come of it */
	EITHER,   /* by where it happens */
};

static enum call armed = CALL_NONE;
static uint32_t countdown;
static int injected;
static uint64_t clock_ahead_ns;
static bool timer_short;

static bool fails(enum call c)
{
	if (c != armed || --countdown > 0)
		return false;
	armed = CALL_NONE;
	errno = injected;
	return true;
}

#define WRAP(type, name, failed, params, args)                           \
	type __real_##name params;                                       \
	type __wrap_##name params;                                       \
	type __wrap_##name params                                        \
	{                                                                \
		return fails(CALL_##name) ? failed : __real_##name args; \
	}

WRAP(int, accept4, -1, (int fd, struct sockaddr *a, socklen_t *n, int flags), (fd, a, n, flags))
WRAP(int, bind, -1, (int fd, const struct sockaddr *a, socklen_t n), (fd, a, n))
WRAP(void *, calloc, NULL, (size_t n, size_t bytes), (n, bytes))
WRAP(int, connect, -1, (int fd, const struct sockaddr *a, socklen_t n), (fd, a, n))
WRAP(int, dup, -1, (int fd), (fd))
WRAP(int, epoll_create1, -1, (int flags), (flags))
WRAP(int, epoll_ctl, -1, (int e, int op, int fd, struct epoll_event *ev), (e, op, fd, ev))
WRAP(int, fcntl, -1, (int fd, int cmd, long arg), (fd, cmd, arg))
WRAP(int, fstat, -1, (int fd, struct stat *st), (fd, st))
WRAP(int, ftruncate, -1, (int fd, off_t n), (fd, n))
WRAP(ssize_t, getrandom, -1, (void *p, size_t n, unsigned flags), (p, n, flags))
WRAP(int, getsockopt, -1, (int fd, int level, int name, void *p, socklen_t *n), (fd, level, name, p, n))
WRAP(int, listen, -1, (int fd, int backlog), (fd, backlog))
WRAP(int, madvise, -1, (void *p, size_t n, int advice), (p, n, advice))
WRAP(int, memfd_create, -1, (const char *name, unsigned flags), (name, flags))
WRAP(void *, mmap, MAP_FAILED, (void *at, size_t n, int prot, int flags, int fd, off_t off),
     (at, n, prot, flags, fd, off))
WRAP(ssize_t, pwrite, -1, (int fd, const void *p, size_t n, off_t at), (fd, p, n, at))
WRAP(void *, realloc, NULL, (void *p, size_t n), (p, n))
WRAP(ssize_t, recvmsg, -1, (int fd, struct msghdr *h, int flags), (fd, h, flags))
WRAP(ssize_t, sendmsg, -1, (int fd, const struct msghdr *h, int flags), (fd, h, flags))
WRAP(int, socket, -1, (int domain, int type, int protocol), (domain, type, protocol))
WRAP(int, timerfd_create, -1, (int clock, int flags), (clock, flags))

/* Time, as far as the instances see it. */
uint64_t __real_clock_now_ns(void);
uint64_t __wrap_clock_now_ns(void);
uint64_t __wrap_clock_now_ns(void)
{
	return __real_clock_now_ns() + clock_ahead_ns;
}

int __real_timerfd_settime(int fd, int flags, const struct itimerspec *t, struct itimerspec *old);
int __wrap_timerfd_settime(int fd, int flags, const struct itimerspec *t, struct itimerspec *old);
int __wrap_timerfd_settime(int fd, int flags, const struct itimerspec *t, struct itimerspec *old)
{
	struct itimerspec quick = *t;

	if (timer_short && t->it_value.tv_sec) {
		quick.it_value = (struct timespec){ .tv_nsec = 1000000 };
		quick.it_interval = quick.it_value;
	}
	return __real_timerfd_settime(fd, flags, &quick, old);
}

/* ------------------------------------------------------------ one life, again and again */

struct life {
	const struct fab_ops *ops;
	struct fab *a, *b;
	struct fab_ep *ab, *ba;
	struct fab_region *params, *inbox, *mine;
	struct fab_remote *params_of_b, *inbox_of_b;
	uint32_t events[FAB_EV_DOWN + 1];
	uint8_t *view; /* reserved */
};

static void poll_both(struct life *l)
{
	struct fab *const both[] = { l->a, l->b };
	struct fab_event ev[8];

	for (int i = 0; i < 2; i++) {
		uint32_t n = l->ops->poll(both[i], ev, ARRAY_LEN(ev));

		for (uint32_t k = 0; k < n; k++) {
			l->events[ev[k].type] += ev[k].status == 0 || ev[k].type == FAB_EV_DOWN;
			if (ev[k].type == FAB_EV_ACCEPTED)
				l->ba = ev[k].ep;
		}
	}
}

/* Polls until there is an event of this type; -ENOTCONN when an endpoint breaks or nothing happens any more. */
static int await(struct life *l, enum fab_event_type type)
{
	for (int i = 0; i < 50 && !l->events[FAB_EV_DOWN]; i++) {
		if (l->events[type])
			return 0;
		poll_both(l);
	}
	return -ENOTCONN;
}

static int life_connect(struct life *l)
{
	const struct fab_config cfg = { .job = "test" };
	struct fab_blob address;
	int ret = l->ops->open(&cfg, &l->a, NULL);

	if (!ret)
		ret = l->ops->open(&cfg, &l->b, NULL);
	if (!ret)
		ret = l->ops->address(l->b, 2, &address);
	if (!ret)
		ret = l->ops->connect(l->a, &address, 1, &l->ab);
	if (!ret)
		ret = await(l, FAB_EV_ACCEPTED);
	return ret ? ret : await(l, FAB_EV_CONNECTED);
}

static int pass(struct life *l, struct fab_region *r, struct fab_remote **out)
{
	struct fab_blob blob;
	int ret = l->ops->export_region(l->ba, r, &blob);

	if (ret)
		return ret;
	ret = -EAGAIN;
	for (int i = 0; i < 50 && ret == -EAGAIN; i++) {
		poll_both(l);
		ret = l->ops->import_region(l->ab, &blob, out);
	}
	return ret;
}

static int life_share(struct life *l)
{
	struct fab_region_attr attr = { .name = "m", .bytes = 4 * PAGE, .access = FAB_LOCAL, .memory = FAB_HUGEPAGE };
	int ret = l->ops->region_open(l->a, &attr, &l->mine, NULL);

	attr.access = FAB_REMOTE_READ;
	attr.memory = FAB_HOST;
	if (!ret)
		ret = l->ops->region_open(l->b, &attr, &l->params, NULL);
	attr.access = FAB_REMOTE_WRITE;
	if (!ret)
		ret = l->ops->region_open(l->b, &attr, &l->inbox, NULL);
	if (!ret)
		ret = pass(l, l->params, &l->params_of_b);
	return ret ? ret : pass(l, l->inbox, &l->inbox_of_b);
}

static int life_work(struct life *l)
{
	struct fab_op read_one = { .remote = l->params_of_b, .local = l->mine, .bytes = PAGE };
	struct fab_op write_one = { .remote = l->inbox_of_b, .local = l->mine, .bytes = PAGE };
	void *map = NULL;
	int ret = 0;

	if (l->ops->maps)
		ret = l->ops->map(l->params_of_b, 0, PAGE, l->view + PAGE, &map);
	if (!ret)
		ret = l->ops->read(l->ab, &read_one, 1);
	if (!ret)
		ret = l->ops->write_notify(l->ab, &write_one, 1);
	if (!ret)
		ret = await(l, FAB_EV_READ);
	if (!ret)
		ret = await(l, FAB_EV_WRITE);
	return ret ? ret : await(l, FAB_EV_NOTICE);
}

static int live(const char *provider)
{
	struct life l = { .ops = fab_provider(provider) };
	int ret;

	l.view = __real_mmap(NULL, 4 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	assert_true(l.view != MAP_FAILED);
	ret = life_connect(&l);
	if (!ret)
		ret = life_share(&l);
	if (!ret)
		ret = life_work(&l);
	if (l.a)
		l.ops->close(l.a);
	if (l.b)
		l.ops->close(l.b);
	munmap(l.view, 4 * PAGE);
	return ret;
}

/* Returns whether there was an n-th call of this kind to fail. */
static bool live_with_fault(const char *provider, enum call call, int error, uint32_t n, enum effect effect)
{
	uint32_t fds = open_fds();
	bool fired;
	int ret;

	countdown = n;
	injected = error;
	armed = call;
	ret = live(provider);
	fired = armed == CALL_NONE;
	armed = CALL_NONE;
	if (ret ? !fired || effect == HARMLESS : fired && effect == FATAL)
		fail_msg("%s: call %d, %s, number %u: the life ended with %d", provider, (int)call, strerror(error), n,
			 ret);
	assert_int_equal(open_fds(), fds);
	assert_int_equal(shared_mappings(), 0);
	return fired;
}

static void nothing_stays_behind(void **state)
{
	static const struct {
		enum call call;
		int error;
		enum effect effect;
	} faults[] = {
		{ CALL_accept4, EMFILE, EITHER }, /* or nobody was waiting */
		{ CALL_accept4, EINTR, HARMLESS },
		{ CALL_bind, EADDRINUSE, FATAL },
		{ CALL_calloc, ENOMEM, FATAL },
		{ CALL_connect, EAGAIN, FATAL },
		{ CALL_dup, EMFILE, FATAL },
		{ CALL_epoll_create1, EMFILE, FATAL },
		{ CALL_epoll_ctl, ENOSPC, EITHER }, /* taking out of the set: closing does it too */
		{ CALL_fcntl, EPERM, FATAL },
		{ CALL_fstat, EIO, EITHER }, /* of huge pages: ordinary ones instead */
		{ CALL_ftruncate, EINVAL, EITHER },
		{ CALL_getrandom, EINTR, FATAL },
		{ CALL_getsockopt, EIO, FATAL },
		{ CALL_listen, EADDRINUSE, FATAL },
		{ CALL_madvise, ENOMEM, EITHER }, /* MADV_HUGEPAGE is a wish */
		{ CALL_madvise, EFAULT, EITHER },
		{ CALL_madvise, EINVAL, HARMLESS }, /* an old kernel */
		{ CALL_memfd_create, EMFILE, EITHER },
		{ CALL_mmap, ENOMEM, EITHER }, /* a reservation that cannot be restored is unmapped */
		{ CALL_pwrite, EIO, FATAL },
		{ CALL_recvmsg, EIO, FATAL },
		{ CALL_recvmsg, EINTR, HARMLESS },
		{ CALL_recvmsg, EAGAIN, HARMLESS },
		{ CALL_recvmsg, ECONNRESET, HARMLESS },
		{ CALL_sendmsg, EIO, FATAL },
		{ CALL_sendmsg, EINTR, HARMLESS },
		{ CALL_sendmsg, EPIPE, FATAL },
		{ CALL_sendmsg, ETOOMANYREFS, EITHER }, /* a greeting ends, anything later is said again */
		{ CALL_socket, EMFILE, FATAL },
		{ CALL_timerfd_create, EMFILE, FATAL },
	};

	assert_int_equal(live(*state), 0);
	for (size_t i = 0; i < ARRAY_LEN(faults); i++) {
		uint32_t n = 1;

		while (live_with_fault(*state, faults[i].call, faults[i].error, n, faults[i].effect))
			n++;
		/* A kind that never fired is a seam that does not hold. */
		assert_true(n > 1);
	}
}

static void a_map_that_cannot_be_recorded_is_not_made(void **state)
{
	(void)state;
	assert_true(live_with_fault("local", CALL_realloc, ENOMEM, 1, FATAL));
}

/* The kernel says EFAULT where a touch would raise SIGBUS; the user hears that there is no memory. */
static void no_memory_is_an_error_not_a_signal(void **state)
{
	const struct fab_ops *ops = fab_provider("local");
	struct fab_region_attr attr = { .name = "huge", .bytes = PAGE };
	struct fab *f = fab_new(ops, 1, NULL);
	struct fab_region *r = NULL;
	struct err e = { 0 };

	(void)state;
	injected = EFAULT;
	countdown = 1;
	armed = CALL_madvise;
	assert_int_equal(ops->region_open(f, &attr, &r, &e), -ENOMEM);
	assert_non_null(strstr(e.text, "huge"));
	assert_int_equal(armed, CALL_NONE);
	assert_null(r);
	ops->close(f);
	assert_int_equal(shared_mappings(), 0);
}

/* After the greeting a message that finds no room waits, and is sent when there is: nothing is lost. */
static void what_finds_no_room_is_sent_later(void **state)
{
	enum { GREETING = 4 };

	(void)state;
	for (uint32_t n = GREETING + 1; n <= GREETING + 3; n++) {
		assert_true(live_with_fault("local-copy", CALL_sendmsg, EAGAIN, n, HARMLESS));
		assert_true(live_with_fault("local-copy", CALL_sendmsg, ENOBUFS, n, HARMLESS));
	}
}

/* Posting and polling allocate nothing: the next allocation would fail, and there is none. */
static void steps_allocate_nothing(void **state)
{
	static const enum call allocations[] = { CALL_calloc, CALL_realloc, CALL_mmap };
	struct fab_op read_one = { .bytes = 8 }, write_one = { .bytes = 8 };
	struct pair p;

	pair_open(&p, *state);
	read_one.local = write_one.local = region_new(p.ops, p.a, PAGE, FAB_LOCAL);
	read_one.remote = region_pass(p.ops, p.ba, region_new(p.ops, p.b, PAGE, FAB_REMOTE_READ), p.a, p.ab);
	write_one.remote = region_pass(p.ops, p.ba, region_new(p.ops, p.b, PAGE, FAB_REMOTE_WRITE), p.a, p.ab);
	for (size_t i = 0; i < ARRAY_LEN(allocations); i++) {
		armed = allocations[i];
		countdown = 1;
		for (int k = 0; k < 3000; k++) {
			assert_int_equal(p.ops->read(p.ab, &read_one, 1), 0);
			assert_int_equal(p.ops->write_notify(p.ab, &write_one, 1), 0);
			assert_int_equal(next_event(p.ops, p.a).type, FAB_EV_READ);
			assert_int_equal(next_event(p.ops, p.a).type, FAB_EV_WRITE);
			assert_int_equal(next_event(p.ops, p.b).type, FAB_EV_NOTICE);
		}
		assert_int_equal(armed, allocations[i]);
		armed = CALL_NONE;
	}
	pair_close(&p);
}

/* The endpoint breaks under our own hands while notices of the peer wait to be taken: they come before the end. */
static void end_suddenly(bool other_turn)
{
	struct fab_op op[2] = { { .bytes = 8 }, { .bytes = 8, .imm = 1 } };
	struct fab_region *inbox, *params, *mine;
	struct fab_event ev[2];
	struct fab_blob blob;
	struct pair p;

	pair_open(&p, "local");
	inbox = region_new(p.ops, p.b, PAGE, FAB_REMOTE_WRITE);
	params = region_new(p.ops, p.b, PAGE, FAB_REMOTE_READ);
	mine = region_new(p.ops, p.a, PAGE, FAB_LOCAL);
	op[0].remote = op[1].remote = region_pass(p.ops, p.ba, inbox, p.a, p.ab);
	op[0].local = op[1].local = mine;
	assert_int_equal(p.ops->write_notify(p.ab, op, 2), 0);
	assert_int_equal(p.ops->poll(p.a, ev, 2), 2);
	assert_int_equal(next_event(p.ops, p.b).imm, 0);
	injected = EIO;
	countdown = 1;
	armed = CALL_sendmsg;
	assert_int_equal(p.ops->export_region(p.ba, params, &blob), 0);
	if (other_turn)
		assert_int_equal(p.ops->poll(p.b, ev, 0), 0);
	assert_int_equal(p.ops->poll(p.b, ev, 2), 2);
	assert_int_equal(ev[0].type, FAB_EV_NOTICE);
	assert_int_equal(ev[0].imm, 1);
	assert_int_equal(ev[1].type, FAB_EV_DOWN);
	assert_int_equal(ev[1].status, -EIO);
	no_event(p.ops, p.b);
	pair_close(&p);
}

/* Sockets come first in one poll, endpoints in the next: it holds either way. */
static void notices_come_before_a_sudden_end(void **state)
{
	(void)state;
	end_suddenly(false);
	end_suddenly(true);
}

/* ---------------------------------------------------------------- time */

static void greetings_have_a_deadline(void **state)
{
	const struct fab_ops *ops = fab_provider("local");
	struct fab *a, *b;
	struct fab_blob address;
	struct fab_event ev;
	struct fab_ep *ep;
	struct pollfd pfd = { .events = POLLIN };

	(void)state;
	timer_short = true;
	a = fab_new(ops, 1, NULL);
	b = fab_new(ops, 2, NULL);
	assert_int_equal(ops->address(b, 1, &address), 0);
	assert_int_equal(ops->connect(a, &address, 6, &ep), 0);
	/* b never polls. The timer alone wakes a; until the clock says so it is no reason to give up. */
	pfd.fd = ops->fd(a);
	assert_int_equal(poll(&pfd, 1, 5000), 1);
	no_event(ops, a);
	clock_ahead_ns += LOCAL_GREETING_NS;
	assert_int_equal(poll(&pfd, 1, 5000), 1);
	ev = next_event(ops, a);
	assert_int_equal(ev.type, FAB_EV_DOWN);
	assert_int_equal(ev.status, -ETIMEDOUT);
	assert_ptr_equal(ev.ep, ep);
	/* Nobody greets any more: the timer is off. */
	assert_int_equal(poll(&pfd, 1, 20), 0);
	ops->close(a);
	ops->close(b);
	timer_short = false;
}

static void a_silent_stranger_is_dropped(void **state)
{
	const struct fab_ops *ops = fab_provider("local");
	uint32_t fds = open_fds();
	struct fab *f;
	struct local_msg m;
	struct pollfd pfd = { .events = POLLIN };
	struct raw r;
	int fd = -1;

	(void)state;
	timer_short = true;
	f = fab_new(ops, 1, NULL);
	raw_dial(&r, ops, f);
	no_event(ops, f);
	clock_ahead_ns += LOCAL_GREETING_NS;
	pfd.fd = ops->fd(f);
	assert_int_equal(poll(&pfd, 1, 5000), 1);
	assert_int_equal(raw_recv(&r, &m, &fd), 0);
	assert_int_equal(ops->counters(f)->errors, 1);
	close(r.sock);
	ops->close(f);
	assert_int_equal(open_fds(), fds);
	timer_short = false;
}

int main(void)
{
	static char local[] = "local", copy[] = "local-copy";
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_prestate(nothing_stays_behind, local),
		cmocka_unit_test_prestate(nothing_stays_behind, copy),
		cmocka_unit_test(a_map_that_cannot_be_recorded_is_not_made),
		cmocka_unit_test(no_memory_is_an_error_not_a_signal),
		cmocka_unit_test(what_finds_no_room_is_sent_later),
		cmocka_unit_test_prestate(steps_allocate_nothing, local),
		cmocka_unit_test_prestate(steps_allocate_nothing, copy),
		cmocka_unit_test(notices_come_before_a_sudden_end),
		cmocka_unit_test(greetings_have_a_deadline),
		cmocka_unit_test(a_silent_stranger_is_dropped),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
