/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The provider `local` between processes, as it is used: an owner in a child
 * process, a reader here, a socket pair for what the control connection carries.
 * A child never returns into cmocka: what fails there ends it with its line.
 */
#include "rdma_pair.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>

#define BYTES (1u << 20)
#define ROUNDS 24u

#define MUST(what)                                                                \
	do {                                                                      \
		if (!(what)) {                                                    \
			fprintf(stderr, "child: line %d: %s\n", __LINE__, #what); \
			_exit(1);                                                 \
		}                                                                 \
	} while (0)

struct owner { /* in the child */
	const struct fab_ops *ops;
	struct fab *f;
	struct fab_ep *ep;
	struct fab_region *params, *inbox;
	int control;
};

struct reader { /* in the parent */
	const struct fab_ops *ops;
	struct fab *f;
	struct fab_ep *ep;
	struct fab_region *mine;
	struct fab_remote *params, *inbox;
	int control;
	pid_t child;
};

static bool put(int control, const void *data, size_t bytes)
{
	return write_full(control, data, bytes) == 0;
}

static bool get(int control, void *data, size_t bytes)
{
	uint8_t *p = data;

	while (bytes > 0) {
		ssize_t n = read(control, p, bytes);

		if (n <= 0)
			return false;
		p += n;
		bytes -= (size_t)n;
	}
	return true;
}

/* Sleeps on the descriptor, as an event loop does. */
static bool owner_event(struct owner *o, struct fab_event *ev)
{
	uint64_t end = clock_now_ns() + WAIT_NS;

	while (!o->ops->poll(o->f, ev, 1)) {
		struct pollfd pfd = { .fd = o->ops->fd(o->f), .events = POLLIN };

		if (clock_now_ns() > end)
			return false;
		if (o->ops->arm(o->f))
			poll(&pfd, 1, 1000);
	}
	return true;
}

static void owner_open(struct owner *o, const char *provider, int control)
{
	const struct fab_config cfg = { .job = "test", .member = 2 };
	struct fab_region_attr attr = { .name = "params", .bytes = BYTES, .access = FAB_REMOTE_READ };
	struct fab_event ev;
	struct fab_blob blob;

	o->ops = fab_provider(provider);
	o->control = control;
	MUST(o->ops->open(&cfg, &o->f, NULL) == 0);
	MUST(o->ops->region_open(o->f, &attr, &o->params, NULL) == 0);
	attr.access = FAB_REMOTE_WRITE;
	MUST(o->ops->region_open(o->f, &attr, &o->inbox, NULL) == 0);
	MUST(o->ops->address(o->f, 1, &blob) == 0 && put(control, &blob, sizeof(blob)));
	MUST(owner_event(o, &ev) && ev.type == FAB_EV_ACCEPTED);
	o->ep = ev.ep;
	MUST(o->ops->export_region(o->ep, o->params, &blob) == 0 && put(control, &blob, sizeof(blob)));
	MUST(o->ops->export_region(o->ep, o->inbox, &blob) == 0 && put(control, &blob, sizeof(blob)));
}

static struct fab_remote *reader_import(struct reader *r)
{
	struct fab_remote *remote = NULL;
	struct fab_event ev;
	struct fab_blob blob;
	uint64_t end = clock_now_ns() + WAIT_NS;
	int ret;

	assert_true(get(r->control, &blob, sizeof(blob)));
	while ((ret = r->ops->import_region(r->ep, &blob, &remote)) == -EAGAIN) {
		assert_int_equal(r->ops->poll(r->f, &ev, 1), 0);
		assert_true(clock_now_ns() < end);
		nap();
	}
	assert_int_equal(ret, 0);
	return remote;
}

static void reader_open(struct reader *r, const char *provider, void (*child)(const char *, int))
{
	struct fab_event ev;
	struct fab_blob blob;
	int control[2];

	assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, control), 0);
	fflush(NULL);
	r->child = fork();
	assert_true(r->child >= 0);
	if (r->child == 0) {
		close(control[0]);
		child(provider, control[1]);
		_exit(0);
	}
	close(control[1]);
	r->ops = fab_provider(provider);
	r->control = control[0];
	r->f = fab_new(r->ops, 1, NULL);
	r->mine = region_new(r->ops, r->f, BYTES, FAB_LOCAL);
	assert_true(get(r->control, &blob, sizeof(blob)));
	assert_int_equal(r->ops->connect(r->f, &blob, 1, &r->ep), 0);
	ev = next_event(r->ops, r->f);
	assert_int_equal(ev.type, FAB_EV_CONNECTED);
	r->params = reader_import(r);
	r->inbox = reader_import(r);
}

static void reader_close(struct reader *r, int expected)
{
	int status;

	r->ops->close(r->f);
	close(r->control);
	assert_int_equal(waitpid(r->child, &status, 0), r->child);
	assert_int_equal(status, expected);
	assert_int_equal(shared_mappings(), 0);
}

/* Each round: new parameters, announced; a gradient comes back with its notice, and is what the reader made of them. */
static void train(const char *provider, int control)
{
	struct owner o = { 0 };
	struct fab_event ev;
	uint8_t *params, *inbox;

	owner_open(&o, provider, control);
	params = o.ops->region_addr(o.params);
	inbox = o.ops->region_addr(o.inbox);
	for (uint32_t i = 0; i < ROUNDS; i++) {
		fill(params + PAGE, BYTES - PAGE, (uint8_t)i);
		fab_progress_publish((struct fab_progress *)params, fab_progress_word(0, i + 1, 1));
		MUST(put(control, &i, sizeof(i)));
		for (uint32_t part = 0; part < 4; part++)
			MUST(owner_event(&o, &ev) && ev.type == FAB_EV_NOTICE && ev.imm == 4 * i + part);
		for (uint32_t k = 0; k < BYTES - PAGE; k++)
			MUST(inbox[k] == (uint8_t)(pattern(k, (uint8_t)i) ^ 0x5a));
	}
	MUST(owner_event(&o, &ev) && ev.type == FAB_EV_DOWN);
	o.ops->close(o.f);
}

static void read_params(struct reader *r, uint32_t round)
{
	const uint8_t *word = r->ops->region_addr(r->mine);
	struct fab_op op = { .remote = r->params, .local = r->mine, .bytes = sizeof(struct fab_progress) };

	assert_int_equal(r->ops->read(r->ep, &op, 1), 0);
	assert_int_equal(next_event(r->ops, r->f).status, 0);
	assert_int_equal(fab_progress_check(((const struct fab_progress *)word)->word, 0, round + 1, 0), FAB_READY);
	op.remote_offset = op.local_offset = PAGE;
	op.bytes = BYTES - PAGE;
	assert_int_equal(r->ops->read(r->ep, &op, 1), 0);
	assert_int_equal(next_event(r->ops, r->f).status, 0);
}

static void push_gradient(struct reader *r, uint32_t round)
{
	const uint64_t quarter = (BYTES - PAGE) / 4;
	struct fab_op op[4];

	for (uint32_t i = 0; i < 4; i++)
		op[i] = (struct fab_op){ .remote = r->inbox,
					 .remote_offset = i * quarter,
					 .local = r->mine,
					 .local_offset = PAGE + i * quarter,
					 .bytes = quarter,
					 .imm = 4 * round + i };
	assert_int_equal(r->ops->write_notify(r->ep, op, 4), 0);
	for (uint32_t i = 0; i < 4; i++)
		assert_int_equal(next_event(r->ops, r->f).type, FAB_EV_WRITE);
}

static void steps_run_between_processes(void **state)
{
	struct reader r = { 0 };
	uint8_t *mine;

	reader_open(&r, *state, train);
	mine = r.ops->region_addr(r.mine);
	for (uint32_t i = 0; i < ROUNDS; i++) {
		uint32_t round;

		assert_true(get(r.control, &round, sizeof(round)));
		assert_int_equal(round, i);
		read_params(&r, i);
		assert_true(filled(mine + PAGE, BYTES - PAGE, (uint8_t)i));
		for (uint32_t k = PAGE; k < BYTES; k++)
			mine[k] ^= 0x5a;
		push_gradient(&r, i);
	}
	reader_close(&r, 0);
}

/* Publishes as fast as the reader says that it has seen the last one; no messages, only words. */
static void publish(const char *provider, int control)
{
	struct owner o = { 0 };
	struct fab_progress *p;
	uint64_t end;

	owner_open(&o, provider, control);
	p = o.ops->region_addr(o.params);
	for (uint64_t i = 1; i <= 1000; i++) {
		fab_progress_publish(p, i);
		end = clock_now_ns() + WAIT_NS;
		while (atomic_load_explicit((_Atomic uint64_t *)o.ops->region_addr(o.inbox), memory_order_acquire) != i)
			MUST(clock_now_ns() < end);
		if (i % 100 == 0)
			nap();
	}
}

static void words_wake_readers_in_other_processes(void **state)
{
	const struct fab_progress *p;
	struct reader r = { 0 };
	_Atomic uint64_t *seen;
	void *map = NULL;
	int status;

	(void)state;
	reader_open(&r, "local", publish);
	assert_int_equal(r.ops->map(r.params, 0, PAGE, NULL, &map), 0);
	p = map;
	assert_int_equal(r.ops->map(r.inbox, 0, PAGE, NULL, &map), 0);
	seen = map;
	for (uint64_t i = 1; i <= 1000; i++) {
		assert_int_equal(fab_progress_wait(p, i - 1, i % 2 ? 0 : 20000, WAIT_NS), i);
		atomic_store_explicit(seen, i, memory_order_release);
	}
	assert_int_equal(waitpid(r.child, &status, 0), r.child);
	assert_int_equal(status, 0);
	assert_int_equal(atomic_load(&p->word), 1000);
	r.ops->close(r.f);
	close(r.control);
}

static void serve_for_ever(const char *provider, int control)
{
	struct owner o = { 0 };
	struct fab_event ev;

	owner_open(&o, provider, control);
	fill(o.ops->region_addr(o.params), BYTES, 77);
	MUST(put(control, "ready", 5));
	while (owner_event(&o, &ev) && ev.type == FAB_EV_NOTICE)
		;
	_exit(1);
}

/* Keeps reads and writes in flight; counts what completes until the end, which must come last. */
static void run_until_down(struct reader *r, uint32_t kill_after)
{
	struct fab_op read_one = { .remote = r->params, .local = r->mine, .bytes = PAGE };
	struct fab_op write_one = { .remote = r->inbox, .local = r->mine, .bytes = PAGE };
	uint32_t posted = 0, completed = 0;
	uint64_t end = clock_now_ns() + WAIT_NS;
	struct fab_event ev;

	for (;;) {
		posted += r->ops->read(r->ep, &read_one, 1) == 0;
		posted += r->ops->write_notify(r->ep, &write_one, 1) == 0;
		if (completed == kill_after)
			assert_int_equal(kill(r->child, SIGKILL), 0);
		assert_true(clock_now_ns() < end);
		if (!r->ops->poll(r->f, &ev, 1))
			continue;
		if (ev.type == FAB_EV_DOWN)
			break;
		assert_true(ev.type == FAB_EV_READ || ev.type == FAB_EV_WRITE);
		completed++;
	}
	assert_int_equal(ev.status, -ECONNRESET);
	assert_int_equal(completed, posted);
	no_event(r->ops, r->f);
}

static void a_killed_owner_is_down_once(void **state)
{
	static const uint32_t kill_after[] = { 0, 1, 500, 20000 };
	uint32_t fds = open_fds();

	for (size_t i = 0; i < ARRAY_LEN(kill_after); i++) {
		struct reader r = { 0 };
		void *map = NULL;
		char ready[5];

		reader_open(&r, *state, serve_for_ever);
		assert_true(get(r.control, ready, sizeof(ready)));
		if (r.ops->maps)
			assert_int_equal(r.ops->map(r.params, 0, BYTES, NULL, &map), 0);
		run_until_down(&r, kill_after[i]);
		assert_int_equal(r.ops->write_notify(r.ep, NULL, 0), -ENOTCONN);
		/* What was mapped of the dead is still there, until it is closed. */
		r.ops->disconnect(r.ep);
		if (map)
			assert_true(filled(map, BYTES, 77));
		r.ops->remote_close(r.params);
		r.ops->remote_close(r.inbox);
		assert_int_equal(shared_mappings(), 1);
		reader_close(&r, SIGKILL);
		assert_int_equal(open_fds(), fds);
	}
}

static void say_address_and_sleep(const char *provider, int control)
{
	struct owner o = { .ops = fab_provider(provider) };
	const struct fab_config cfg = { .job = "test", .member = 2 };
	struct fab_blob blob;

	MUST(o.ops->open(&cfg, &o.f, NULL) == 0);
	MUST(o.ops->address(o.f, 1, &blob) == 0 && put(control, &blob, sizeof(blob)));
	for (;;)
		pause();
}

static void a_peer_killed_before_its_greeting_is_down(void **state)
{
	const struct fab_ops *ops = fab_provider("local");
	struct fab *f = fab_new(ops, 1, NULL);
	struct fab_event ev;
	struct fab_blob blob;
	struct fab_ep *ep;
	int control[2], status;
	pid_t child;

	(void)state;
	assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, control), 0);
	child = fork();
	if (child == 0)
		say_address_and_sleep("local", control[1]);
	assert_true(get(control[0], &blob, sizeof(blob)));
	assert_int_equal(ops->connect(f, &blob, 9, &ep), 0);
	no_event(ops, f);
	assert_int_equal(kill(child, SIGKILL), 0);
	ev = next_event(ops, f);
	assert_int_equal(ev.type, FAB_EV_DOWN);
	assert_int_equal(ev.status, -ECONNREFUSED);
	assert_int_equal(waitpid(child, &status, 0), child);
	ops->disconnect(ep);
	assert_int_equal(ops->connect(f, &blob, 9, &ep), -ECONNREFUSED);
	ops->close(f);
	close(control[0]);
	close(control[1]);
}

#define BOTH(test) cmocka_unit_test_prestate(test, local), cmocka_unit_test_prestate(test, copy)

int main(void)
{
	static char local[] = "local", copy[] = "local-copy";
	const struct CMUnitTest tests[] = {
		BOTH(steps_run_between_processes),
		cmocka_unit_test(words_wake_readers_in_other_processes),
		BOTH(a_killed_owner_is_down_once),
		cmocka_unit_test(a_peer_killed_before_its_greeting_is_down),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
