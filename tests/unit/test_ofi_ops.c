/* SPDX-License-Identifier: Apache-2.0 */
/* The provider `ofi` on loopback: what arrives, when, and what is refused. */
#include "ofi_pair.h"

#include <poll.h>
#include <sys/mman.h>

static void reads_bring_the_bytes(void **state)
{
	struct ofi_pair p = { 0 };
	struct fab_event ev;
	struct fab_op op[2];

	ofi_bench_open(&p, *state, MIB);
	fill(region_at(p.ops, p.m.params), MIB, 3);
	op[0] = read_op(&p.m, 0, MIB / 2, 7);
	op[1] = read_op(&p.m, MIB / 2, MIB / 2, 8);
	assert_int_equal(p.ops->read(p.ep[0], op, 2), 0);
	memset(op, 0xff, sizeof(op));
	ev = ofi_expect(&p, 0, FAB_EV_READ);
	assert_int_equal(ev.status, 0);
	assert_ptr_equal(ev.ep, p.ep[0]);
	assert_int_equal(ev.user + ofi_expect(&p, 0, FAB_EV_READ).user, 15);
	assert_true(filled(region_at(p.ops, p.m.mine), MIB, 3));
	ofi_silence(&p);
	assert_int_equal(p.ops->counters(p.f[0])->reads, 2);
	assert_int_equal(p.ops->counters(p.f[0])->read_bytes, MIB);
	ofi_pair_close(&p);
}

static void writes_bring_bytes_and_notice(void **state)
{
	struct ofi_pair p = { 0 };
	uint32_t written = 0, noticed = 0;
	struct fab_event ev;
	struct fab_op op[2];

	ofi_bench_open(&p, *state, MIB);
	fill(region_at(p.ops, p.m.mine), MIB, 5);
	op[0] = write_op(&p.m, 0, 4096, 40);
	op[1] = write_op(&p.m, 4096, MIB - 4096, UINT32_MAX);
	assert_int_equal(p.ops->write_notify(p.ep[0], op, 2), 0);
	while (written < 2 || noticed < 2) {
		if (ofi_take(&p, 0, &ev)) {
			assert_int_equal(ev.type, FAB_EV_WRITE);
			assert_int_equal(ev.status, 0);
			assert_true(ev.user == 1040 || ev.user == 1000u + UINT32_MAX);
			written++;
		}
		if (!ofi_take(&p, 1, &ev))
			continue;
		assert_int_equal(ev.type, FAB_EV_NOTICE);
		assert_ptr_equal(ev.ep, p.ep[1]);
		assert_int_equal(ev.user, USER_B);
		assert_true(ev.imm == 40 || ev.imm == UINT32_MAX);
		if (ev.imm == 40)
			assert_true(filled(region_at(p.ops, p.m.inbox), 4096, 5));
		else
			assert_memory_equal(region_at(p.ops, p.m.inbox) + 4096, region_at(p.ops, p.m.mine) + 4096,
					    MIB - 4096);
		noticed++;
	}
	assert_int_equal(p.ops->counters(p.f[0])->writes, 2);
	assert_int_equal(p.ops->counters(p.f[0])->write_bytes, MIB);
	assert_int_equal(p.ops->counters(p.f[1])->notices, 2);
	ofi_silence(&p);
	ofi_pair_close(&p);
}

/* Longer than a slice and than the budget in flight, and no multiple of either. */
static void long_operations_arrive_whole(void **state)
{
	const uint64_t bytes = 21 * MIB + 4096 + 8;
	struct ofi_pair p = { 0 };
	struct fab_op op;

	p.options.inflight_bytes = 3 * MIB + 5;
	ofi_bench_open(&p, *state, 22 * MIB);
	fill(region_at(p.ops, p.m.params), bytes, 9);
	op = read_op(&p.m, 0, bytes, 1);
	assert_int_equal(p.ops->read(p.ep[0], &op, 1), 0);
	assert_int_equal(ofi_expect(&p, 0, FAB_EV_READ).status, 0);
	assert_true(filled(region_at(p.ops, p.m.mine), bytes, 9));
	assert_int_equal(region_at(p.ops, p.m.mine)[bytes], 0);
	op = write_op(&p.m, 0, bytes, 6);
	assert_int_equal(p.ops->write_notify(p.ep[0], &op, 1), 0);
	for (int i = 0; i < 2; i++) {
		struct fab_event ev;
		uint64_t end = clock_now_ns() + WAIT_NS;

		while (!ofi_take(&p, i, &ev))
			assert_true(clock_now_ns() < end);
		assert_int_equal(ev.type, i ? FAB_EV_NOTICE : FAB_EV_WRITE);
	}
	assert_true(filled(region_at(p.ops, p.m.inbox), bytes, 9));
	ofi_silence(&p);
	ofi_pair_close(&p);
}

static void wait_readable(int fd)
{
	assert_int_equal(poll(&(struct pollfd){ .fd = fd, .events = POLLIN }, 1, 5000), 1);
}

static void events_wake_a_sleeper(void **state)
{
	struct pollfd pfd[2] = { { .events = POLLIN }, { .events = POLLIN } };
	struct ofi_pair p = { 0 };
	struct fab_event ev;
	struct fab_op op;

	ofi_bench_open(&p, *state, PAGE);
	for (int i = 0; i < 2; i++) {
		pfd[i].fd = p.ops->fd(p.f[i]);
		assert_true(p.ops->arm(p.f[i]));
	}
	assert_int_equal(poll(pfd, 2, 0), 0);
	op = write_op(&p.m, 0, PAGE, 1);
	assert_int_equal(p.ops->write_notify(p.ep[0], &op, 1), 0);
	for (int i = 0; i < 2; i++) {
		wait_readable(pfd[i].fd);
		assert_false(p.ops->arm(p.f[i]));
		assert_int_equal(p.ops->poll(p.f[i], &ev, 1), 1);
		assert_int_equal(ev.type, i ? FAB_EV_NOTICE : FAB_EV_WRITE);
		assert_true(p.ops->arm(p.f[i]));
	}
	assert_int_equal(poll(pfd, 2, 0), 0);
	ofi_pair_close(&p);
}

/* The owner's control thread does nothing at all: reads are served, also after both sides have slept. */
static void a_passive_side_serves_without_polling(void **state)
{
	const struct timespec pause = { .tv_nsec = 120000000 };
	struct ofi_pair p = { 0 };
	uint64_t worst = 0;

	ofi_bench_open(&p, *state, MIB);
	fill(region_at(p.ops, p.m.params), MIB, 1);
	for (int i = 0; i < 5; i++) {
		struct fab_op op = read_op(&p.m, 0, MIB, 1);
		uint64_t start;
		struct fab_event ev;

		nanosleep(&pause, NULL);
		memset(region_at(p.ops, p.m.mine), 0, MIB);
		start = clock_now_ns();
		assert_int_equal(p.ops->read(p.ep[0], &op, 1), 0);
		while (!ofi_take(&p, 0, &ev)) {
			if (p.ops->arm(p.f[0]))
				wait_readable(p.ops->fd(p.f[0]));
		}
		assert_int_equal(ev.status, 0);
		assert_true(filled(region_at(p.ops, p.m.mine), MIB, 1));
		worst = clock_now_ns() - start > worst ? clock_now_ns() - start : worst;
	}
	assert_true(worst < 2000000000ull);
	ofi_pair_close(&p);
}

struct stream {
	struct ofi_pair p;
	uint8_t *seen; /* notices */
	uint32_t completed, noticed;
};

static void take_both(struct stream *t)
{
	struct fab_event ev;

	while (ofi_take(&t->p, 0, &ev)) {
		assert_int_equal(ev.type, FAB_EV_WRITE);
		assert_int_equal(ev.status, 0);
		t->completed++;
	}
	for (int k = 0; k < 7 && ofi_take(&t->p, 1, &ev); k++) {
		uint64_t word;

		assert_int_equal(ev.type, FAB_EV_NOTICE);
		assert_int_equal(t->seen[ev.imm], 0);
		t->seen[ev.imm] = 1;
		memcpy(&word, region_at(t->p.ops, t->p.m.inbox) + 8 * (uint64_t)ev.imm, sizeof(word));
		assert_int_equal(word, ev.imm * 0x9e3779b97f4a7c15ull + 1);
		t->noticed++;
	}
}

/* Every notice finds its bytes, and comes once, though the one who takes them is the slower. */
static void many_small_writes(void **state)
{
	enum { WRITES = 20000 };
	struct stream t = { 0 };
	uint32_t posted = 0, refusals = 0;
	uint64_t end = clock_now_ns() + 3 * WAIT_NS;

	t.seen = calloc(WRITES, 1);
	ofi_bench_open(&t.p, *state, 8 * WRITES);
	for (uint64_t i = 0; i < WRITES; i++)
		((uint64_t *)region_at(t.p.ops, t.p.m.mine))[i] = i * 0x9e3779b97f4a7c15ull + 1;
	while (t.noticed < WRITES || t.completed < WRITES) {
		uint32_t n = posted % 251 + 1;
		struct fab_op op[251];
		int ret;

		n = n < WRITES - posted ? n : WRITES - posted;
		for (uint32_t i = 0; i < n; i++)
			op[i] = write_op(&t.p.m, 8 * (uint64_t)(posted + i), 8, posted + i);
		ret = t.p.ops->write_notify(t.p.ep[0], op, n);
		assert_true(ret == 0 || ret == -EAGAIN);
		posted += ret ? 0 : n;
		refusals += ret != 0;
		take_both(&t);
		assert_true(clock_now_ns() < end);
	}
	assert_true(refusals > 0);
	ofi_silence(&t.p);
	free(t.seen);
	ofi_pair_close(&t.p);
}

static void refused(struct ofi_pair *p, struct fab_op op, bool write, int expected)
{
	struct fab_op batch[2];
	int ret;

	/* A good one before it: nothing of the batch may be posted. */
	batch[0] = write ? write_op(&p->m, 0, 8, 0) : read_op(&p->m, 0, 8, 0);
	batch[1] = op;
	ret = write ? p->ops->write_notify(p->ep[0], batch, 2) : p->ops->read(p->ep[0], batch, 2);
	assert_int_equal(ret, expected);
}

static void wrong_operations_are_refused(void **state)
{
	struct fab_op good_read, good_write, op, many[FAB_BATCH_MAX + 1];
	struct ofi_pair p = { 0 }, other = { 0 };
	struct fab_blob blob;
	struct fab_remote *remote;

	ofi_bench_open(&p, *state, PAGE);
	ofi_bench_open(&other, *state, PAGE);
	good_read = read_op(&p.m, 0, PAGE, 0);
	good_write = write_op(&p.m, 0, PAGE, 0);
#define REFUSED(from, write, expected, ...)       \
	do {                                      \
		op = from;                        \
		__VA_ARGS__;                      \
		refused(&p, op, write, expected); \
	} while (0)
	REFUSED(good_read, false, -ERANGE, op.remote_offset = 1);
	REFUSED(good_read, false, -ERANGE, op.local_offset = 1);
	REFUSED(good_read, false, -ERANGE, op.bytes = UINT64_MAX);
	REFUSED(good_read, false, -ERANGE, (op.remote_offset = UINT64_MAX, op.bytes = 2));
	REFUSED(good_read, false, -EINVAL, op.bytes = 0);
	REFUSED(good_read, false, -EINVAL, op.remote = NULL);
	REFUSED(good_read, false, -EINVAL, op.local = NULL);
	REFUSED(good_read, false, -EINVAL, op.remote = other.m.params_of_b);
	REFUSED(good_read, false, -EINVAL, op.local = other.m.mine);
	REFUSED(good_read, false, -EPERM, op.remote = p.m.inbox_of_b);
	REFUSED(good_write, true, -EPERM, op.remote = p.m.params_of_b);
#undef REFUSED
	for (uint32_t i = 0; i < ARRAY_LEN(many); i++)
		many[i] = read_op(&p.m, 0, 8, i);
	assert_int_equal(p.ops->read(p.ep[0], many, ARRAY_LEN(many)), -EINVAL);
	assert_int_equal(p.ops->read(p.ep[0], many, 0), 0);
	assert_int_equal(p.ops->export_region(p.ep[1], p.m.inbox, &blob), -EPERM);
	assert_int_equal(p.ops->export_region(p.ep[0], p.m.mine, &blob), -EPERM);
	assert_int_equal(p.ops->export_region(p.ep[1], p.m.params, &blob), 0);
	blob.data[0] ^= 1;
	assert_int_equal(p.ops->import_region(p.ep[0], &blob, &remote), -EINVAL);
	blob.bytes--;
	assert_int_equal(p.ops->import_region(p.ep[0], &blob, &remote), -EINVAL);
	assert_int_equal(p.ops->map(p.m.params_of_b, 0, PAGE, NULL, (void **)&remote), -ENOTSUP);
	assert_int_equal(p.ops->remote_bytes(p.m.params_of_b), PAGE);
	ofi_silence(&p);
	assert_int_equal(p.ops->counters(p.f[0])->reads, 0);
	ofi_pair_close(&other);
	ofi_pair_close(&p);
}

/* Memory that somebody else made, at both ends. */
static void adopted_memory_is_used_in_place(void **state)
{
	struct fab_region_attr attr = { .name = "adopted", .bytes = MIB };
	struct ofi_pair p = { 0 };
	uint8_t *at[2];
	struct fab_region *r[2];
	struct fab_op op;
	struct err e;

	ofi_pair_open(&p, *state);
	for (int i = 0; i < 2; i++) {
		at[i] = mmap(NULL, MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		assert_true(at[i] != MAP_FAILED);
		attr.at = at[i];
		attr.access = i ? FAB_REMOTE_READ : FAB_LOCAL;
		assert_int_equal(p.ops->region_open(p.f[i], &attr, &r[i], &e), 0);
		assert_ptr_equal(p.ops->region_addr(r[i]), at[i]);
	}
	fill(at[1], MIB, 4);
	op = (struct fab_op){ .remote = ofi_pass(&p, r[1], 0), .local = r[0], .bytes = MIB };
	assert_int_equal(p.ops->read(p.ep[0], &op, 1), 0);
	assert_int_equal(ofi_expect(&p, 0, FAB_EV_READ).status, 0);
	ofi_pair_close(&p);
	assert_true(filled(at[0], MIB, 4));
	assert_true(filled(at[1], MIB, 4));
	munmap(at[0], MIB);
	munmap(at[1], MIB);
}

static void regions_say_what_is_wrong(void **state)
{
	struct fab_region_attr attr = { .name = "window", .bytes = 0 };
	struct ofi_pair p = { 0 };
	struct fab_region *r;
	struct err e;

	ofi_pair_init(&p, *state);
	p.f[0] = ofi_new(&p, 1);
	assert_int_equal(p.ops->region_open(p.f[0], &attr, &r, &e), -EINVAL);
	assert_non_null(strstr(e.text, "window"));
	attr.bytes = PAGE;
	attr.memory = FAB_CUDA;
	assert_int_equal(p.ops->region_open(p.f[0], &attr, &r, &e), -ENOTSUP);
	attr.memory = FAB_HUGEPAGE;
	assert_int_equal(p.ops->region_open(p.f[0], &attr, &r, &e), 0);
	p.ops->region_close(r);
	p.ops->close(p.f[0]);
}

/* A progress word is read whole, and what it announces is there for the next read. */
static void a_word_is_read_before_its_page(void **state)
{
	struct ofi_pair p = { 0 };
	struct fab_progress *word;
	const struct fab_progress *got;
	struct fab_op op;

	ofi_bench_open(&p, *state, 2 * PAGE);
	word = (struct fab_progress *)region_at(p.ops, p.m.params);
	got = (const struct fab_progress *)region_at(p.ops, p.m.mine);
	for (uint16_t v = 1; v < 200; v++) {
		fill(region_at(p.ops, p.m.params) + PAGE, PAGE, (uint8_t)v);
		fab_progress_publish(word, fab_progress_word(3, v, 4));
		op = read_op(&p.m, 0, sizeof(*word), v);
		assert_int_equal(p.ops->read(p.ep[0], &op, 1), 0);
		assert_int_equal(ofi_expect(&p, 0, FAB_EV_READ).status, 0);
		assert_int_equal(fab_progress_check(got->word, 3, v, 0), FAB_READY);
		op = read_op(&p.m, PAGE, PAGE, v);
		assert_int_equal(p.ops->read(p.ep[0], &op, 1), 0);
		assert_int_equal(ofi_expect(&p, 0, FAB_EV_READ).status, 0);
		assert_true(filled(region_at(p.ops, p.m.mine) + PAGE, PAGE, (uint8_t)v));
	}
	ofi_pair_close(&p);
}

/* The side that was connected to reads and writes as well. */
static void both_sides_may_post(void **state)
{
	struct fab_region *theirs, *box, *own;
	struct ofi_pair p = { 0 };
	struct fab_event ev;
	struct fab_op op;

	ofi_pair_open(&p, *state);
	theirs = region_new(p.ops, p.f[0], PAGE, FAB_REMOTE_READ);
	box = region_new(p.ops, p.f[0], PAGE, FAB_REMOTE_WRITE);
	own = region_new(p.ops, p.f[1], PAGE, FAB_LOCAL);
	fill(region_at(p.ops, theirs), PAGE, 8);
	op = (struct fab_op){ .remote = ofi_pass(&p, theirs, 1), .local = own, .bytes = PAGE };
	assert_int_equal(p.ops->read(p.ep[1], &op, 1), 0);
	assert_int_equal(ofi_expect(&p, 1, FAB_EV_READ).status, 0);
	op.remote = ofi_pass(&p, box, 1);
	op.imm = 5;
	assert_int_equal(p.ops->write_notify(p.ep[1], &op, 1), 0);
	while (!ofi_take(&p, 0, &ev))
		nap();
	assert_int_equal(ev.type, FAB_EV_NOTICE);
	assert_int_equal(ev.imm, 5);
	assert_int_equal(ev.user, USER_A);
	assert_true(filled(region_at(p.ops, box), PAGE, 8));
	ofi_pair_close(&p);
}

/* Disconnecting ends what is in flight without a word: memory is free at once. */
static void disconnect_drops_what_is_in_flight(void **state)
{
	struct ofi_pair p = { 0 };
	struct fab_op op[64];

	ofi_bench_open(&p, *state, 64 * MIB);
	for (uint32_t i = 0; i < ARRAY_LEN(op); i++)
		op[i] = read_op(&p.m, i * (uint64_t)MIB, MIB, i);
	assert_int_equal(p.ops->read(p.ep[0], op, ARRAY_LEN(op)), 0);
	p.ops->disconnect(p.ep[0]);
	p.ops->region_close(p.m.mine);
	p.ops->remote_close(p.m.params_of_b);
	ofi_expect(&p, 1, FAB_EV_DOWN);
	ofi_silence(&p);
	ofi_pair_close(&p);
}

/* What was said before the end is heard before it. */
static void notices_come_before_the_end(void **state)
{
	struct ofi_pair p = { 0 };
	struct fab_op op[3];
	struct fab_event ev;

	ofi_bench_open(&p, *state, PAGE);
	for (uint32_t i = 0; i < 3; i++)
		op[i] = write_op(&p.m, 8 * (uint64_t)i, 8, i);
	assert_int_equal(p.ops->write_notify(p.ep[0], op, 3), 0);
	for (uint32_t i = 0; i < 3;)
		i += ofi_take(&p, 0, &ev);
	p.ops->disconnect(p.ep[0]);
	for (uint32_t i = 0; i < 3; i++)
		assert_int_equal(ofi_expect(&p, 1, FAB_EV_NOTICE).imm, i);
	ev = ofi_expect(&p, 1, FAB_EV_DOWN);
	assert_int_equal(ev.status, -ECONNRESET);
	assert_int_equal(ev.user, USER_B);
	assert_int_equal(p.ops->read(p.ep[1], NULL, 0), -ENOTCONN);
	ofi_silence(&p);
	ofi_pair_close(&p);
}

/* net is the provider that tcp has become since. */
#define EACH(test) cmocka_unit_test(test), cmocka_unit_test_prestate(test, net)

int main(void)
{
	static char net[] = "net";
	const struct CMUnitTest tests[] = {
		EACH(reads_bring_the_bytes),
		EACH(writes_bring_bytes_and_notice),
		EACH(long_operations_arrive_whole),
		EACH(events_wake_a_sleeper),
		EACH(a_passive_side_serves_without_polling),
		EACH(many_small_writes),
		EACH(wrong_operations_are_refused),
		EACH(adopted_memory_is_used_in_place),
		EACH(regions_say_what_is_wrong),
		EACH(a_word_is_read_before_its_page),
		EACH(both_sides_may_post),
		EACH(disconnect_drops_what_is_in_flight),
		EACH(notices_come_before_the_end),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
