/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The provider `ofi` between processes: one is killed while bytes move, the
 * other survives that and says what happened. A socket pair is the control
 * connection. A child never returns into cmocka.
 */
#include "ofi_pair.h"

#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>

#define BYTES (8 * MIB)
#define SECOND 1000000000ull

enum kind { SIGNAL = 1, ADDRESS, PARAMETERS, INBOX };

struct parcel {
	uint32_t kind;
	struct fab_blob blob;
};

struct side {
	const struct fab_ops *ops;
	struct fab_options options;
	struct fab *f;
	struct fab_ep *ep;
	int control;
	bool alone; /* the control connection has ended */
};

static void open_side(struct side *s, int control)
{
	const struct fab_config cfg = { .job = "test", .options = &s->options };

	s->ops = fab_provider("ofi");
	s->control = control;
	s->options = (struct fab_options){ .local_address = "127.0.0.1", .deadline_ns = SECOND, .down_ns = 3 * SECOND };
	if (s->ops->open(&cfg, &s->f, NULL))
		_exit(3);
}

static void say(struct side *s, enum kind kind, const struct fab_blob *blob)
{
	struct parcel p = { .kind = kind, .blob = *blob };

	(void)!send(s->control, &p, sizeof(p), MSG_NOSIGNAL);
}

/* One event, signals carried; false: none now. */
static bool take(struct side *s, struct fab_event *ev)
{
	if (!s->ops->poll(s->f, ev, 1))
		return false;
	if (ev->type != FAB_EV_SIGNAL)
		return true;
	say(s, SIGNAL, ev->blob);
	return false;
}

/* What the other side said; 0: nothing now. */
static uint32_t hear(struct side *s, struct parcel *p)
{
	struct pollfd fd = { .fd = s->control, .events = POLLIN };

	if (s->alone || poll(&fd, 1, 0) != 1)
		return 0;
	if (recv(s->control, p, sizeof(*p), MSG_WAITALL) != sizeof(*p)) {
		s->alone = true;
		return 0;
	}
	if (p->kind == SIGNAL)
		(void)s->ops->signal(s->f, 1, &p->blob);
	return p->kind == SIGNAL ? 0 : p->kind;
}

static struct fab_region *memory(struct side *s, enum fab_access access)
{
	const struct fab_region_attr attr = { .name = "memory", .bytes = BYTES, .access = access };
	struct fab_region *r = NULL;

	if (s->ops->region_open(s->f, &attr, &r, NULL))
		_exit(4);
	return r;
}

static void give(struct side *s, struct fab_ep *ep, struct fab_region *params, struct fab_region *inbox)
{
	struct fab_blob blob;

	if (s->ops->export_region(ep, params, &blob))
		_exit(8);
	say(s, PARAMETERS, &blob);
	if (s->ops->export_region(ep, inbox, &blob))
		_exit(8);
	say(s, INBOX, &blob);
}

/* Serves until the other side is gone; 0: and was well then. */
static void be_owner(int control)
{
	uint64_t end = clock_now_ns() + WAIT_NS;
	struct side s = { 0 };
	struct fab_region *params, *inbox;
	struct fab_event ev;
	struct fab_blob blob;
	struct parcel p;

	open_side(&s, control);
	params = memory(&s, FAB_REMOTE_READ);
	inbox = memory(&s, FAB_REMOTE_WRITE);
	if (s.ops->address(s.f, 1, &blob))
		_exit(5);
	say(&s, ADDRESS, &blob);
	while (!s.alone && clock_now_ns() < end) {
		(void)hear(&s, &p);
		if (!take(&s, &ev))
			nap();
		else if (ev.type == FAB_EV_ACCEPTED)
			give(&s, ev.ep, params, inbox);
	}
	s.ops->close(s.f);
	_exit(s.alone ? 0 : 6);
}

/* Reads and writes as fast as it goes, until the end. `moving` is written once bytes have moved. */
static void be_reader(int control, int moving)
{
	struct fab_blob blob[2] = { { .bytes = 0 } };
	struct fab_remote *remote[2] = { NULL };
	uint64_t end = clock_now_ns() + WAIT_NS;
	struct side s = { 0 };
	struct fab_region *mine;
	struct fab_event ev;
	struct parcel p;
	uint32_t done = 0;

	open_side(&s, control);
	mine = memory(&s, FAB_LOCAL);
	while (clock_now_ns() < end) {
		switch (hear(&s, &p)) {
		case ADDRESS:
			(void)s.ops->connect(s.f, &p.blob, 1, &s.ep);
			break;
		case PARAMETERS:
			blob[0] = p.blob;
			break;
		case INBOX:
			blob[1] = p.blob;
			break;
		}
		/* They may be here before we know that we are connected. */
		for (int i = 0; i < 2; i++)
			if (blob[i].bytes && !remote[i])
				(void)s.ops->import_region(s.ep, &blob[i], &remote[i]);
		for (int i = 0; i < 8 && remote[0] && remote[1]; i++) {
			struct fab_op op = { .remote = remote[0], .local = mine, .bytes = MIB };

			(void)s.ops->read(s.ep, &op, 1);
			op.remote = remote[1];
			(void)s.ops->write_notify(s.ep, &op, 1);
		}
		while (take(&s, &ev)) {
			if (ev.type == FAB_EV_DOWN) {
				s.ops->close(s.f);
				_exit(0);
			}
			if (++done == 20)
				(void)!write(moving, "m", 1);
		}
		nap();
	}
	_exit(7);
}

/* Kills one of the two while bytes move; the other must end by itself, well. */
static void one_dies(bool owner_dies)
{
	int control[2], moving[2], status;
	pid_t owner, reader;
	char m;

	assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, control), 0);
	assert_int_equal(pipe(moving), 0);
	fflush(NULL);
	owner = fork();
	if (owner == 0) {
		close(control[0]);
		be_owner(control[1]);
	}
	reader = fork();
	if (reader == 0) {
		close(control[1]);
		be_reader(control[0], moving[1]);
	}
	close(control[0]);
	close(control[1]);
	close(moving[1]);
	assert_int_equal(read(moving[0], &m, 1), 1);
	nap();
	assert_int_equal(kill(owner_dies ? owner : reader, SIGKILL), 0);
	assert_int_equal(waitpid(owner_dies ? owner : reader, &status, 0), owner_dies ? owner : reader);
	assert_int_equal(waitpid(owner_dies ? reader : owner, &status, 0), owner_dies ? reader : owner);
	assert_int_equal(status, 0);
	close(moving[0]);
}

static void who_reads_survives_its_owner(void **state)
{
	(void)state;
	for (int i = 0; i < 4; i++)
		one_dies(true);
}

static void who_is_read_survives_its_reader(void **state)
{
	(void)state;
	for (int i = 0; i < 4; i++)
		one_dies(false);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(who_reads_survives_its_owner),
		cmocka_unit_test(who_is_read_survives_its_reader),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
