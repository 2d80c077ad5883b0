/* SPDX-License-Identifier: Apache-2.0 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/base.h"

#include <poll.h>
#include <pthread.h>
#include <time.h>

#define FOREVER_NS (20ull * 1000000000u)

static bool fd_is_readable(int fd)
{
	struct pollfd p = { .fd = fd, .events = POLLIN };

	return poll(&p, 1, 0) == 1;
}

static void test_order_and_limits(void **state)
{
	struct ring r;
	uint32_t v, n = 0;

	(void)state;
	assert_int_equal(ring_init(&r, sizeof(v), 4), 0);
	assert_false(ring_pop(&r, &v));
	/* Often enough for the slots to be used again at every offset. */
	for (uint32_t round = 0; round < 10; round++) {
		for (uint32_t i = 0; i < 4; i++)
			assert_true(ring_push(&r, &(uint32_t){ n + i }));
		assert_false(ring_push(&r, &n));
		for (uint32_t i = 0; i < 3; i++) {
			assert_true(ring_pop(&r, &v));
			assert_int_equal(v, n + i);
		}
		assert_true(ring_push(&r, &(uint32_t){ n + 4 }));
		assert_true(ring_pop(&r, &v) && v == n + 3);
		assert_true(ring_pop(&r, &v) && v == n + 4);
		assert_false(ring_pop(&r, &v));
		n += 5;
	}
	ring_release(&r);
}

/* The counts wrap at 2^32 after hours of work; here they start just below. */
static void test_counts_wrap(void **state)
{
	struct ring r;
	uint64_t v;

	(void)state;
	assert_int_equal(ring_init(&r, sizeof(v), 8), 0);
	atomic_store(&r.head, UINT32_MAX - 2);
	atomic_store(&r.tail, UINT32_MAX - 2);
	for (uint64_t i = 0; i < 8; i++)
		assert_true(ring_push(&r, &i));
	assert_false(ring_push(&r, &(uint64_t){ 9 }));
	for (uint64_t i = 0; i < 8; i++)
		assert_true(ring_pop(&r, &v) && v == i);
	assert_false(ring_pop(&r, &v));
	ring_release(&r);
}

static void test_only_a_sleeper_costs_a_system_call(void **state)
{
	struct ring r;
	char v = 'x';

	(void)state;
	assert_int_equal(ring_init(&r, 1, 8), 0);
	assert_true(ring_push(&r, &v));
	assert_int_equal(atomic_load(&r.wakeups), 0);
	assert_false(ring_arm(&r));
	assert_true(ring_push(&r, &v));
	assert_int_equal(atomic_load(&r.wakeups), 0);
	assert_true(ring_pop(&r, &v) && ring_pop(&r, &v));

	assert_true(ring_arm(&r));
	assert_false(fd_is_readable(r.event_fd));
	assert_true(ring_push(&r, &v) && ring_push(&r, &v));
	assert_int_equal(atomic_load(&r.wakeups), 1);
	assert_true(fd_is_readable(r.event_fd));
	ring_disarm(&r);
	assert_false(fd_is_readable(r.event_fd));
	assert_false(ring_arm(&r));
	ring_release(&r);
}

static void test_wait_ends_at_its_deadline(void **state)
{
	struct ring r;
	char v = 'x';
	uint64_t start = clock_now_ns();

	(void)state;
	assert_int_equal(ring_init(&r, 1, 2), 0);
	assert_false(ring_wait(&r, 0));
	assert_false(ring_wait(&r, 3000000));
	assert_true(clock_now_ns() - start >= 3000000);
	assert_true(ring_push(&r, &v));
	assert_true(ring_wait(&r, 0));
	assert_true(ring_wait(&r, UINT64_MAX));
	ring_release(&r);
}

#define STREAM_ITEMS 200000

struct item {
	uint64_t n, check;
};

static void nap(void)
{
	nanosleep(&(struct timespec){ .tv_nsec = 50000 }, NULL);
}

static void *produce(void *arg)
{
	struct ring *r = arg;

	for (uint64_t i = 0; i < STREAM_ITEMS; i++) {
		struct item it = { .n = i, .check = rng_u64(1, 2, i) };

		while (!ring_push(r, &it))
			nap();
		/* Sometimes slow, so that the consumer falls asleep. */
		if (it.check % 4096 == 0)
			nap();
	}
	return NULL;
}

static void test_stream_between_threads(void **state)
{
	pthread_t thread;
	struct ring r;
	struct item it;

	(void)state;
	assert_int_equal(ring_init(&r, sizeof(it), 64), 0);
	assert_int_equal(pthread_create(&thread, NULL, produce, &r), 0);
	for (uint64_t i = 0; i < STREAM_ITEMS; i++) {
		while (!ring_pop(&r, &it))
			assert_true(ring_wait(&r, FOREVER_NS));
		assert_int_equal(it.n, i);
		assert_int_equal(it.check, rng_u64(1, 2, i));
	}
	assert_false(ring_pop(&r, &it));
	pthread_join(thread, NULL);
	ring_release(&r);
}

#define ROUNDS 20000

struct pair {
	struct ring to, from;
	bool woke;
};

static void *echo(void *arg)
{
	struct pair *p = arg;
	uint32_t v;

	p->woke = true;
	for (uint32_t i = 0; i < ROUNDS && p->woke; i++) {
		while (!ring_pop(&p->to, &v) && p->woke)
			p->woke = ring_wait(&p->to, FOREVER_NS);
		ring_push(&p->from, &v);
	}
	return NULL;
}

/* Both sides sleep at every turn: one lost wake-up and the other waits for ever. */
static void test_no_wake_up_is_lost(void **state)
{
	pthread_t thread;
	struct pair p;
	uint32_t v;

	(void)state;
	assert_int_equal(ring_init(&p.to, sizeof(v), 1), 0);
	assert_int_equal(ring_init(&p.from, sizeof(v), 1), 0);
	assert_int_equal(pthread_create(&thread, NULL, echo, &p), 0);
	for (uint32_t i = 0; i < ROUNDS; i++) {
		assert_true(ring_push(&p.to, &i));
		while (!ring_pop(&p.from, &v))
			assert_true(ring_wait(&p.from, FOREVER_NS));
		assert_int_equal(v, i);
	}
	pthread_join(thread, NULL);
	assert_true(p.woke);
	assert_true(atomic_load(&p.to.wakeups) <= ROUNDS);
	ring_release(&p.to);
	ring_release(&p.from);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_order_and_limits),
		cmocka_unit_test(test_counts_wrap),
		cmocka_unit_test(test_only_a_sleeper_costs_a_system_call),
		cmocka_unit_test(test_wait_ends_at_its_deadline),
		cmocka_unit_test(test_stream_between_threads),
		cmocka_unit_test(test_no_wake_up_is_lost),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
