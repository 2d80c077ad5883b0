/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The pool of compute threads: the driving thread and threads - 1 of our own.
 *
 * A job is a function and a number of tasks. One 64-bit word says which job is
 * on and how many of its tasks are unclaimed: (generation << 32) | left. A
 * thread claims a task by exchanging the word for one less; so it can never
 * claim a task of a job that is over, however late it wakes, and nobody waits
 * for threads that slept through a job. fn, job and n are plain: they are
 * written before the word is released, read only between a claim and its `done`,
 * and the driving thread writes them again only when all tasks are done.
 *
 * Which thread gets which task is a race that does not matter: tasks write
 * disjoint memory and never depend on each other.
 *
 * An idle thread spins for SPIN_NS and then sleeps on a futex. Layers follow
 * each other within microseconds, while a wake-up costs about 30; spinning
 * longer takes the core from other processes on a shared machine. Where threads
 * exceed cores nobody spins. The sleeper announces itself (sleepers) before it
 * looks at the word a last time, the driver publishes the word before it looks
 * at sleepers, both sequentially consistent: one of them sees the other. The
 * driving thread waits in the same way for the tasks that others still run.
 */
#include "kernels/cpu/pool.h"

#include <assert.h>
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SPIN_NS 40000u
#define LEFT(word) ((uint32_t)(word))

struct pool_thread {
	struct pool *pool;
	unsigned index;
	pthread_t id;
};

struct pool {
	unsigned threads;
	bool spin;
	void (*thread_init)(void *arg);
	void *thread_arg;

	pool_task *fn;
	void *job;
	uint32_t n;
	_Alignas(CACHE_LINE) _Atomic uint64_t word;
	_Alignas(CACHE_LINE) _Atomic uint32_t done;
	_Atomic uint32_t driver_waits;
	_Alignas(CACHE_LINE) _Atomic uint32_t sleepers;
	_Atomic uint32_t wake; /* futex: changes when there is work for sleepers */
	_Atomic bool stop;

	struct pool_thread own[]; /* threads - 1 */
};

static void futex_wait(_Atomic uint32_t *at, uint32_t value)
{
	syscall(SYS_futex, at, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *at, int count)
{
	syscall(SYS_futex, at, FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0);
}

static inline void cpu_relax(void)
{
#if defined(__x86_64__)
	__builtin_ia32_pause();
#endif
}

static bool pool_claim(struct pool *p, uint32_t *left)
{
	uint64_t word = atomic_load_explicit(&p->word, memory_order_acquire);

	while (LEFT(word) > 0)
		if (atomic_compare_exchange_weak_explicit(&p->word, &word, word - 1, memory_order_acquire,
							  memory_order_acquire)) {
			*left = LEFT(word);
			return true;
		}
	return false;
}

static void pool_work(struct pool *p, unsigned thread)
{
	uint32_t left;

	while (pool_claim(p, &left)) {
		uint32_t n = p->n;
		p->fn(p->job, thread, n - left);
		if (atomic_fetch_add(&p->done, 1) + 1 == n && atomic_load(&p->driver_waits))
			futex_wake(&p->done, 1);
	}
}

static bool pool_has_work(struct pool *p)
{
	return LEFT(atomic_load(&p->word)) > 0 || atomic_load(&p->stop);
}

static bool pool_spin_for_work(struct pool *p)
{
	uint64_t until = clock_now_ns() + SPIN_NS;

	do {
		for (int i = 0; i < 16; i++) {
			if (pool_has_work(p))
				return true;
			cpu_relax();
		}
	} while (clock_now_ns() < until);
	return false;
}

static void pool_sleep(struct pool *p)
{
	uint32_t wake = atomic_load(&p->wake);

	atomic_fetch_add(&p->sleepers, 1);
	if (!pool_has_work(p))
		futex_wait(&p->wake, wake);
	atomic_fetch_sub(&p->sleepers, 1);
}

static void *pool_main(void *arg)
{
	struct pool_thread *t = arg;
	struct pool *p = t->pool;

	if (p->thread_init)
		p->thread_init(p->thread_arg);
	while (!atomic_load(&p->stop)) {
		pool_work(p, t->index);
		if (!(p->spin && pool_spin_for_work(p)))
			pool_sleep(p);
	}
	return NULL;
}

static void pool_wake(struct pool *p, int count)
{
	if (atomic_load(&p->sleepers) == 0)
		return;
	atomic_fetch_add(&p->wake, 1);
	futex_wake(&p->wake, count);
}

static void pool_wait_done(struct pool *p, uint32_t n)
{
	uint64_t until = clock_now_ns() + SPIN_NS;

	while (atomic_load(&p->done) != n) {
		cpu_relax();
		if (p->spin && clock_now_ns() < until)
			continue;
		atomic_store(&p->driver_waits, 1);
		uint32_t done = atomic_load(&p->done);
		if (done != n)
			futex_wait(&p->done, done);
		atomic_store(&p->driver_waits, 0);
	}
}

void pool_run(struct pool *p, pool_task *fn, void *job, uint32_t n)
{
	if (p->threads == 1 || n <= 1) {
		for (uint32_t i = 0; i < n; i++)
			fn(job, 0, i);
		return;
	}
	uint64_t generation = (atomic_load_explicit(&p->word, memory_order_relaxed) >> 32) + 1;
	p->fn = fn;
	p->job = job;
	p->n = n;
	atomic_store_explicit(&p->done, 0, memory_order_relaxed);
	atomic_store(&p->word, generation << 32 | n);
	pool_wake(p, n - 1 < INT_MAX ? (int)(n - 1) : INT_MAX);
	pool_work(p, 0);
	pool_wait_done(p, n);
}

static bool cores_suffice(unsigned threads)
{
	cpu_set_t set;

	if (sched_getaffinity(0, sizeof(set), &set) != 0)
		return false;
	return threads <= (unsigned)CPU_COUNT(&set);
}

static void pool_join(struct pool *p, unsigned started)
{
	atomic_store(&p->stop, true);
	atomic_fetch_add(&p->wake, 1);
	futex_wake(&p->wake, INT_MAX);
	for (unsigned i = 0; i < started; i++)
		pthread_join(p->own[i].id, NULL);
}

int pool_open(unsigned threads, void (*thread_init)(void *arg), void *arg, struct pool **out)
{
	assert(threads >= 1);
	size_t bytes = sizeof(struct pool) + (threads - 1) * sizeof(struct pool_thread);
	struct pool *p = aligned_alloc(CACHE_LINE, round_up_u64(bytes, CACHE_LINE));
	if (!p)
		return -ENOMEM;
	*p = (struct pool){
		.threads = threads, .spin = cores_suffice(threads), .thread_init = thread_init, .thread_arg = arg
	};
	for (unsigned i = 0; i + 1 < threads; i++) {
		p->own[i] = (struct pool_thread){ .pool = p, .index = i + 1 };
		int rc = pthread_create(&p->own[i].id, NULL, pool_main, &p->own[i]);
		if (rc != 0) {
			pool_join(p, i);
			free(p);
			return -rc;
		}
	}
	*out = p;
	return 0;
}

void pool_close(struct pool *p)
{
	pool_join(p, p->threads - 1);
	free(p);
}
