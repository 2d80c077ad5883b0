/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Single-producer single-consumer ring.
 *
 * head and tail count items and wrap at 2^32; a slot is (count mod capacity).
 * The producer alone writes tail, the consumer alone writes head, each with
 * release after it is done with the slot, each read by the other with acquire:
 * that hands the slot's bytes over in both directions.
 *
 * Sleeping must not lose a wake-up. The consumer sets `sleeping`, then looks
 * at tail again; the producer advances tail, then looks at `sleeping`. With
 * all four seq_cst, at least one of the two sees the other: either the
 * consumer finds the item and does not sleep, or the producer finds it asleep
 * and writes the eventfd. No fence is used, since thread sanitizers do not
 * model fences. The price is one locked instruction a push.
 *
 * The flag is taken by exchange, so of many pushes to one sleeper only the
 * first writes the eventfd. A wake-up may come for items that the consumer has
 * found by itself in the meantime; then it looks once more for nothing, which
 * is harmless. The eventfd is non-blocking: its counter cannot be overrun by
 * one write a sleep, and ring_disarm must not block when nobody wrote.
 */
#include "base/base.h"

#include <assert.h>
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

int ring_init(struct ring *r, uint32_t item_bytes, uint32_t capacity)
{
	uint8_t *slots;
	int event_fd, rc;

	assert(item_bytes > 0);
	assert(capacity > 0 && (capacity & (capacity - 1)) == 0);
	slots = malloc((size_t)item_bytes * capacity);
	if (!slots)
		return -ENOMEM;
	event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (event_fd < 0) {
		rc = -errno;
		goto err_slots;
	}
	memset(r, 0, sizeof(*r));
	r->slots = slots;
	r->item_bytes = item_bytes;
	r->capacity = capacity;
	r->event_fd = event_fd;
	return 0;
err_slots:
	free(slots);
	return rc;
}

void ring_release(struct ring *r)
{
	if (r->slots)
		close(r->event_fd);
	free(r->slots);
	memset(r, 0, sizeof(*r));
	r->event_fd = -1;
}

static uint8_t *slot(const struct ring *r, uint32_t count)
{
	return r->slots + (size_t)(count & (r->capacity - 1)) * r->item_bytes;
}

static void wake(struct ring *r)
{
	uint64_t one = 1;
	ssize_t n;

	if (!atomic_exchange_explicit(&r->sleeping, 0, memory_order_seq_cst))
		return;
	atomic_fetch_add_explicit(&r->wakeups, 1, memory_order_relaxed);
	do
		n = write(r->event_fd, &one, sizeof(one));
	while (n < 0 && errno == EINTR);
	/* EAGAIN: the counter is at its end, so the consumer wakes anyway. */
	assert(n == (ssize_t)sizeof(one) || errno == EAGAIN);
}

bool ring_push(struct ring *r, const void *item)
{
	uint32_t tail = atomic_load_explicit(&r->tail, memory_order_relaxed);
	uint32_t head = atomic_load_explicit(&r->head, memory_order_acquire);

	assert(tail - head <= r->capacity);
	if (tail - head == r->capacity)
		return false;
	memcpy(slot(r, tail), item, r->item_bytes);
	atomic_store_explicit(&r->tail, tail + 1, memory_order_seq_cst);
	if (atomic_load_explicit(&r->sleeping, memory_order_seq_cst))
		wake(r);
	return true;
}

bool ring_pop(struct ring *r, void *item)
{
	uint32_t head = atomic_load_explicit(&r->head, memory_order_relaxed);
	uint32_t tail = atomic_load_explicit(&r->tail, memory_order_acquire);

	if (head == tail)
		return false;
	memcpy(item, slot(r, head), r->item_bytes);
	atomic_store_explicit(&r->head, head + 1, memory_order_release);
	return true;
}

static bool is_empty(struct ring *r)
{
	return atomic_load_explicit(&r->head, memory_order_relaxed) ==
	       atomic_load_explicit(&r->tail, memory_order_seq_cst);
}

bool ring_arm(struct ring *r)
{
	atomic_store_explicit(&r->sleeping, 1, memory_order_seq_cst);
	if (is_empty(r))
		return true;
	atomic_store_explicit(&r->sleeping, 0, memory_order_relaxed);
	return false;
}

void ring_disarm(struct ring *r)
{
	uint64_t fired;
	ssize_t n;

	atomic_store_explicit(&r->sleeping, 0, memory_order_relaxed);
	do
		n = read(r->event_fd, &fired, sizeof(fired));
	while (n < 0 && errno == EINTR);
}

/* Rounded up, so that a short wait does not spin through zeros. */
static struct timespec until(uint64_t deadline_ns)
{
	uint64_t now = clock_now_ns();
	uint64_t left = deadline_ns > now ? deadline_ns - now : 0;

	return (struct timespec){ .tv_sec = (time_t)(left / 1000000000u), .tv_nsec = (long)(left % 1000000000u) };
}

bool ring_wait(struct ring *r, uint64_t timeout_ns)
{
	uint64_t now = clock_now_ns();
	uint64_t deadline = timeout_ns < UINT64_MAX - now ? now + timeout_ns : UINT64_MAX;

	while (is_empty(r)) {
		struct pollfd fd = { .fd = r->event_fd, .events = POLLIN };
		struct timespec left = until(deadline);

		if (left.tv_sec == 0 && left.tv_nsec == 0)
			return false;
		if (!ring_arm(r))
			break;
		ppoll(&fd, 1, &left, NULL);
		ring_disarm(r);
	}
	return true;
}
