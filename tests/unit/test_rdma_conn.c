/* SPDX-License-Identifier: Apache-2.0 */
/* Connections of the provider `local`: who is let in, how each side hears of the end, and what is left behind. */
#include "rdma_raw.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/wait.h>

static void refused_with(struct pair *p, const struct fab_blob *address, uint64_t errors)
{
	struct fab_event ev = { 0 };
	struct fab_ep *ep = NULL;
	uint64_t end = clock_now_ns() + WAIT_NS;

	assert_int_equal(p->ops->connect(p->a, address, 5, &ep), 0);
	while (!p->ops->poll(p->a, &ev, 1)) {
		struct fab_event none;

		assert_int_equal(p->ops->poll(p->b, &none, 1), 0);
		assert_true(clock_now_ns() < end);
	}
	assert_int_equal(ev.type, FAB_EV_DOWN);
	assert_int_equal(ev.status, -ECONNREFUSED);
	assert_ptr_equal(ev.ep, ep);
	assert_int_equal(ev.user, 5);
	no_event(p->ops, p->a);
	no_event(p->ops, p->b);
	p->ops->disconnect(ep);
	assert_int_equal(p->ops->counters(p->b)->errors, errors);
}

static void keys_are_good_once(void **state)
{
	struct fab_event ea, eb;
	struct fab_blob address, wrong;
	struct pair p;

	(void)state;
	pair_open(&p, "local");
	assert_int_equal(p.ops->address(p.b, 33, &address), 0);
	wrong = address;
	wrong.data[offsetof(struct local_where, key)] ^= 1;
	refused_with(&p, &wrong, 1);
	/* A wrong key does not use up a right one. */
	assert_int_equal(p.ops->connect(p.a, &address, 1, &p.ab), 0);
	both_events(&p, &ea, &eb);
	assert_int_equal(ea.type, FAB_EV_CONNECTED);
	assert_int_equal(eb.type, FAB_EV_ACCEPTED);
	assert_int_equal(eb.user, 33);
	refused_with(&p, &address, 2);
	assert_int_equal(p.ops->counters(p.b)->connects, 2);
	pair_close(&p);
}

/* Many addresses are out at once; each is good for its own connection, in any order, and none for a second. */
static void addresses_do_not_mix(void **state)
{
	static const uint8_t order[] = { 2, 0, 4, 1, 3 };
	struct fab_blob address[ARRAY_LEN(order)], zero;
	struct fab_event ea, eb;
	uint64_t errors = 0;
	struct pair p;

	(void)state;
	pair_open(&p, "local");
	for (uint32_t i = 0; i < ARRAY_LEN(order); i++)
		assert_int_equal(p.ops->address(p.b, 100 + i, &address[i]), 0);
	zero = address[0];
	memset(zero.data + offsetof(struct local_where, key), 0, LOCAL_KEY_BYTES);
	for (uint32_t i = 0; i < ARRAY_LEN(order); i++) {
		assert_int_equal(p.ops->connect(p.a, &address[order[i]], 200 + i, &p.ab), 0);
		both_events(&p, &ea, &eb);
		assert_int_equal(ea.user, 200 + i);
		assert_int_equal(eb.type, FAB_EV_ACCEPTED);
		assert_int_equal(eb.user, 100 + order[i]);
		refused_with(&p, &zero, ++errors);
		for (uint32_t k = 0; k <= i; k++)
			refused_with(&p, &address[order[k]], ++errors);
	}
	pair_close(&p);
}

static void refusals_are_logged(void **state)
{
	struct pair p = { .ops = fab_provider("local") };
	struct fab_blob address;
	char said[4096] = { 0 };
	struct log log;
	int pipes[2];

	(void)state;
	assert_int_equal(pipe2(pipes, O_NONBLOCK | O_CLOEXEC), 0);
	log_init(&log, pipes[1], "test");
	p.a = fab_new(p.ops, 1, NULL);
	p.b = fab_new(p.ops, 2, &log);
	assert_int_equal(p.ops->address(p.b, 1, &address), 0);
	address.data[offsetof(struct local_where, key)] ^= 1;
	refused_with(&p, &address, 1);
	assert_int_equal(atomic_load(&log.count[LOG_WARN]), 1);
	assert_true(read(pipes[0], said, sizeof(said) - 1) > 0);
	assert_non_null(strstr(said, "refused"));
	assert_non_null(strstr(said, "key"));
	pair_close(&p);
	close(pipes[0]);
	close(pipes[1]);
}

static void bad_addresses_are_refused_at_once(void **state)
{
	struct fab_blob address, wrong;
	struct fab_ep *ep = NULL;
	struct pair p;

	(void)state;
	pair_open(&p, "local");
	assert_int_equal(p.ops->address(p.b, 1, &address), 0);
	wrong = address;
	wrong.bytes--;
	assert_int_equal(p.ops->connect(p.a, &wrong, 1, &ep), -EINVAL);
	wrong = address;
	wrong.data[0] ^= 1;
	assert_int_equal(p.ops->connect(p.a, &wrong, 1, &ep), -EINVAL);
	p.ops->close(p.b);
	assert_int_equal(p.ops->connect(p.a, &address, 1, &ep), -ECONNREFUSED);
	assert_null(ep);
	p.ops->close(p.a);
}

static void the_oldest_unused_address_is_forgotten(void **state)
{
	struct fab_blob first, second, more;
	struct fab_event ea, eb;
	struct pair p;

	(void)state;
	pair_open(&p, "local");
	assert_int_equal(p.ops->address(p.b, 1, &first), 0);
	assert_int_equal(p.ops->address(p.b, 2, &second), 0);
	for (uint32_t i = 0; i < LOCAL_ADDRESSES - 1; i++)
		assert_int_equal(p.ops->address(p.b, 3, &more), 0);
	refused_with(&p, &first, 1);
	assert_int_equal(p.ops->connect(p.a, &second, 1, &p.ab), 0);
	both_events(&p, &ea, &eb);
	assert_int_equal(eb.type, FAB_EV_ACCEPTED);
	assert_int_equal(eb.user, 2);
	pair_close(&p);
}

static void each_side_hears_of_the_end_once(void **state)
{
	struct fab_event ev;
	struct pair p;

	(void)state;
	for (int side = 0; side < 2; side++) {
		struct fab *left;

		pair_open(&p, "local");
		left = side ? p.a : p.b;
		p.ops->disconnect(side ? p.ba : p.ab);
		ev = next_event(p.ops, left);
		assert_int_equal(ev.type, FAB_EV_DOWN);
		assert_int_equal(ev.status, -ECONNRESET);
		no_event(p.ops, left);
		no_event(p.ops, side ? p.b : p.a);
		assert_int_equal(p.ops->counters(left)->errors, 0);
		pair_close(&p);
	}
}

static void a_thousand_connections_leave_nothing(void **state)
{
	uint32_t fds = open_fds();
	uint32_t up;
	struct pair p;

	(void)state;
	pair_open(&p, "local");
	up = open_fds();
	for (int i = 0; i < 1000; i++) {
		struct fab_region *r = region_new(p.ops, p.b, PAGE, FAB_REMOTE_READ);
		struct fab_remote *remote = region_pass(p.ops, p.ba, r, p.a, p.ab);
		struct fab_blob unused;

		/* One that is imported, one that has come and is not, one that has not even been received. */
		assert_int_equal(p.ops->export_region(p.ba, r, &unused), 0);
		no_event(p.ops, p.a);
		assert_int_equal(p.ops->export_region(p.ba, r, &unused), 0);
		p.ops->disconnect(i % 2 ? p.ab : p.ba);
		assert_int_equal(next_event(p.ops, i % 2 ? p.b : p.a).type, FAB_EV_DOWN);
		p.ops->disconnect(i % 2 ? p.ba : p.ab);
		p.ops->remote_close(remote);
		p.ops->region_close(r);
		assert_int_equal(open_fds(), up - 2);
		pair_connect(&p);
	}
	assert_int_equal(open_fds(), up);
	assert_int_equal(shared_mappings(), 0);
	pair_close(&p);
	assert_int_equal(open_fds(), fds);
}

/* After `polls` messages of the greeting one side closes: who connects hears of it, who accepts had heard of nothing. */
static void close_half_way(int polls, bool close_a)
{
	struct fab_blob address;
	struct fab_event ev;
	struct fab_ep *ep;
	struct pair p;

	pair_open(&p, "local");
	assert_int_equal(p.ops->address(p.b, 1, &address), 0);
	assert_int_equal(p.ops->connect(p.a, &address, 1, &ep), 0);
	for (int k = 0; k < polls; k++)
		assert_int_equal(p.ops->poll(k % 2 ? p.a : p.b, &ev, 1), 0);
	p.ops->close(close_a ? p.a : p.b);
	if (close_a) {
		assert_int_equal(next_event(p.ops, p.b).ep == p.ba, true);
		no_event(p.ops, p.b);
		p.ops->close(p.b);
		return;
	}
	for (int k = 0; k < 2; k++) {
		ev = next_event(p.ops, p.a);
		assert_int_equal(ev.type, FAB_EV_DOWN);
		assert_int_equal(ev.status, ev.ep == ep ? -ECONNREFUSED : -ECONNRESET);
	}
	p.ops->close(p.a);
}

static void closing_ends_what_is_half_way(void **state)
{
	uint32_t fds = open_fds();

	(void)state;
	for (int i = 0; i < 10; i++) {
		close_half_way(i / 2, i % 2);
		assert_int_equal(open_fds(), fds);
	}
}

/* The peer closes on us, has sent nothing more, and the endpoint gives `status` if it was up. */
static void raw_is_dropped(struct raw *r, uint64_t errors, int status)
{
	struct local_msg m;
	int fd = -1;

	if (r->ep) {
		struct fab_event ev = next_event(r->ops, r->f);

		assert_int_equal(ev.type, FAB_EV_DOWN);
		assert_int_equal(ev.status, status);
		assert_ptr_equal(ev.ep, r->ep);
	}
	assert_int_equal(raw_recv(r, &m, &fd), 0);
	assert_int_equal(r->ops->counters(r->f)->errors, errors);
	no_event(r->ops, r->f);
	close(r->sock);
}

static void wrong_greetings_are_refused(void **state)
{
	const struct fab_ops *ops = fab_provider("local");
	uint32_t fds = open_fds();
	struct fab *f = fab_new(ops, 1, NULL);
	struct local_msg m;
	struct raw r;
	int proof, fd = -1;

	(void)state;
	assert_int_equal(local_proof_create(&proof), 0);

	raw_dial(&r, ops, f); /* not a message */
	assert_int_equal(send(r.sock, "hello", 5, 0), 5);
	raw_is_dropped(&r, 1, 0);

	raw_dial(&r, ops, f); /* no file */
	raw_hello(&r, -1);
	raw_is_dropped(&r, 2, 0);

	raw_dial(&r, ops, f); /* another message first */
	local_msg_init(&m, LOCAL_READY, 0);
	assert_int_equal(local_send(r.sock, &m, -1), 0);
	raw_is_dropped(&r, 3, 0);

	raw_dial(&r, ops, f); /* a file that can shrink */
	assert_int_equal(local_memfd("evil", 256, 0, &fd), 0);
	raw_hello(&r, fd);
	close(fd);
	raw_is_dropped(&r, 4, 0);

	raw_dial(&r, ops, f); /* a file that is no memory */
	fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
	raw_hello(&r, fd);
	close(fd);
	raw_is_dropped(&r, 5, 0);

	raw_dial(&r, ops, f); /* has not read our file */
	raw_hello(&r, proof);
	assert_int_equal(raw_recv(&r, &m, &fd), 1);
	close(fd);
	local_msg_init(&m, LOCAL_PROOF, 0);
	m.hash[0] = m.hash[1] = 0;
	assert_int_equal(local_send(r.sock, &m, -1), 0);
	raw_is_dropped(&r, 6, 0);

	raw_dial(&r, ops, f); /* says nothing and goes */
	no_event(ops, f);
	close(r.sock);
	no_event(ops, f);
	assert_int_equal(ops->counters(f)->errors, 7);

	close(proof);
	ops->close(f);
	assert_int_equal(open_fds(), fds);
}

/* Sends a region message with two file descriptors: neither may stay open at the other side. */
static void send_two_fds(int sock, int fd)
{
	union {
		char buf[CMSG_SPACE(2 * sizeof(int))];
		struct cmsghdr align;
	} control = { { 0 } };
	struct local_msg m;
	struct iovec iov = { .iov_base = &m, .iov_len = local_msg_bytes(LOCAL_REGION, 0) };
	struct msghdr h = {
		.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.buf, .msg_controllen = sizeof(control.buf)
	};
	struct cmsghdr *c = CMSG_FIRSTHDR(&h);
	int two[2] = { fd, fd };

	memset(&m, 0, sizeof(m));
	local_msg_init(&m, LOCAL_REGION, 0);
	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(sizeof(two));
	memcpy(CMSG_DATA(c), two, sizeof(two));
	assert_true(sendmsg(sock, &h, 0) > 0);
}

static void wrong_messages_break_the_endpoint(void **state)
{
	const struct fab_ops *ops = fab_provider("local");
	uint32_t fds = open_fds();
	struct fab *f = fab_new(ops, 1, NULL);
	struct local_msg m = { 0 };
	struct raw r;
	int fd = -1;

	(void)state;
	assert_int_equal(local_memfd("region", PAGE, 0, &fd), 0);

	raw_greet(&r, ops, f); /* a notice where nothing can be written */
	local_msg_init(&m, LOCAL_NOTICE, 1);
	assert_int_equal(local_send(r.sock, &m, -1), 0);
	raw_is_dropped(&r, 1, -EPROTO);

	raw_greet(&r, ops, f); /* a greeting again */
	raw_hello(&r, fd);
	raw_is_dropped(&r, 2, -EPROTO);

	raw_greet(&r, ops, f); /* longer than any message */
	assert_int_equal(send(r.sock, f, sizeof(m) + 8, 0), sizeof(m) + 8);
	raw_is_dropped(&r, 3, -EPROTO);

	raw_greet(&r, ops, f); /* more notices than it has bytes for */
	local_msg_init(&m, LOCAL_NOTICE, LOCAL_MSG_NOTICES);
	assert_int_equal(send(r.sock, &m, 100, 0), 100);
	raw_is_dropped(&r, 4, -EPROTO);

	raw_greet(&r, ops, f); /* of a type that there is not */
	local_msg_init(&m, 77, 0);
	assert_int_equal(send(r.sock, &m, 8, 0), 8);
	raw_is_dropped(&r, 5, -EPROTO);

	raw_greet(&r, ops, f); /* two files with one message */
	send_two_fds(r.sock, fd);
	raw_is_dropped(&r, 6, -EPROTO);

	raw_greet(&r, ops, f); /* more regions than anybody imports */
	memset(&m, 0, sizeof(m));
	local_msg_init(&m, LOCAL_REGION, 0);
	for (uint32_t i = 0; i <= LOCAL_PARCELS; i++)
		assert_int_equal(local_send(r.sock, &m, fd), 0);
	raw_is_dropped(&r, 7, -EPROTO);

	close(fd);
	ops->close(f);
	assert_int_equal(open_fds(), fds);
}

static void other_users_are_refused(void **state)
{
	const struct fab_ops *ops = fab_provider("local");
	struct fab *f;
	struct raw r = { 0 };
	struct fab_event ev;
	pid_t child;
	int status;

	(void)state;
	if (geteuid() != 0)
		skip(); /* only root can become somebody else */
	f = fab_new(ops, 1, NULL);
	child = fork();
	if (child == 0) {
		if (seteuid(65534))
			_exit(2);
		raw_dial(&r, ops, f);
		_exit(0);
	}
	assert_int_equal(waitpid(child, &status, 0), child);
	assert_int_equal(status, 0);
	assert_int_equal(ops->poll(f, &ev, 1), 0);
	assert_int_equal(ops->counters(f)->errors, 1);
	ops->close(f);
}

/* Sleeping on the descriptor alone is enough to get through a greeting. */
static void a_greeting_wakes_sleepers(void **state)
{
	struct pair p = { .ops = fab_provider("local") };
	struct fab_blob address;
	struct fab_event ev;
	uint32_t up = 0;

	(void)state;
	p.a = fab_new(p.ops, 1, NULL);
	p.b = fab_new(p.ops, 2, NULL);
	assert_int_equal(p.ops->address(p.b, 1, &address), 0);
	assert_int_equal(p.ops->connect(p.a, &address, 1, &p.ab), 0);
	while (up < 2) {
		struct pollfd pfd[2] = { { .fd = p.ops->fd(p.a), .events = POLLIN },
					 { .fd = p.ops->fd(p.b), .events = POLLIN } };

		assert_true(p.ops->arm(p.a) && p.ops->arm(p.b));
		assert_true(poll(pfd, 2, 1000) > 0);
		if (pfd[0].revents)
			up += p.ops->poll(p.a, &ev, 1);
		if (pfd[1].revents)
			up += p.ops->poll(p.b, &ev, 1);
	}
	pair_close(&p);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(keys_are_good_once),
		cmocka_unit_test(addresses_do_not_mix),
		cmocka_unit_test(refusals_are_logged),
		cmocka_unit_test(bad_addresses_are_refused_at_once),
		cmocka_unit_test(the_oldest_unused_address_is_forgotten),
		cmocka_unit_test(each_side_hears_of_the_end_once),
		cmocka_unit_test(a_thousand_connections_leave_nothing),
		cmocka_unit_test(closing_ends_what_is_half_way),
		cmocka_unit_test(wrong_greetings_are_refused),
		cmocka_unit_test(wrong_messages_break_the_endpoint),
		cmocka_unit_test(other_users_are_refused),
		cmocka_unit_test(a_greeting_wakes_sleepers),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
