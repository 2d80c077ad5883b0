/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The one thread that uses libfabric.
 *
 * Over a software provider nothing moves unless somebody calls it, on the side
 * that is read from too, and a member's control thread sleeps or is busy. So
 * each instance has this thread. It makes every call of libfabric once it runs,
 * data and life cycle alike, so that no provider's promises about threads are
 * relied on; the user's thread hands over operations and takes completions
 * under one short lock, and asks for the rare rest by ofi_engine_call, which
 * waits.
 *
 * A turn is: what has been handed over, then for each connection its
 * completions, its signals and timers, its posting. When a turn and a few more
 * found nothing, the thread sleeps on the providers' descriptors and its own.
 * Against a lost wake-up: `asleep` is set under the lock after a last look at
 * what is handed over, and who hands over writes the descriptor if it is set;
 * libfabric's half is fi_trywait, which says no while something is there. A
 * provider without descriptors is asked every POLL_NS. TICK_MS bounds every
 * sleep while there are connections: it is how timers and words of a peer are
 * seen that woke nobody; it is shorter while one is being made, for which some
 * providers have no descriptor.
 */
#include "rdma/ofi/ofi.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#define IDLE_TURNS 16
#define PROGRESS_MAX 64
#define TICK_MS 50
#define CONNECTING_TICK_MS 1
#define POLL_NS 20000

void ofi_engine_wake(struct fab *f)
{
	const uint64_t one = 1;

	if (!f->asleep)
		return;
	f->asleep = false;
	(void)!write(f->wake_fd, &one, sizeof(one));
}

void ofi_make_ready(struct fab_ep *ep)
{
	const uint64_t one = 1;
	struct fab *f = ep->fab;

	if (!ep->ready) {
		ep->ready = true;
		TAILQ_INSERT_TAIL(&f->ready, ep, ready_link);
	}
	if (!f->armed || f->rung)
		return;
	f->rung = true;
	(void)!write(f->event_fd, &one, sizeof(one));
}

/* ------------------------------------------------------------------- a turn */

/* What the user's thread has handed over. */
static bool take_over(struct fab *f)
{
	struct ofi_call *call;
	struct fab_ep *ep;
	bool any = false;

	pthread_mutex_lock(&f->lock);
	call = f->call;
	TAILQ_FOREACH(ep, &f->engaged, turn_link)
	{
		if (TAILQ_EMPTY(&ep->submitted))
			continue;
		if (TAILQ_EMPTY(&ep->queue))
			ep->progress_ns = clock_now_ns();
		if (!ep->next)
			ep->next = TAILQ_FIRST(&ep->submitted);
		TAILQ_CONCAT(&ep->queue, &ep->submitted, link);
		any = true;
	}
	pthread_mutex_unlock(&f->lock);
	if (!call)
		return any;
	call->run(call->ctx);
	pthread_mutex_lock(&f->lock);
	call->done = true;
	f->call = NULL;
	pthread_cond_signal(&f->called);
	pthread_mutex_unlock(&f->lock);
	return true;
}

static bool ep_turn(struct fab_ep *ep, uint64_t now)
{
	bool any = false, rest = false;

	for (int i = 0; ep->fi.ep && (i == 0 || rest) && i < PROGRESS_MAX; i++) {
		rest = ofi_ops_progress(ep, now);
		any |= rest;
	}
	any |= ofi_answers_in(ep, now);
	any |= ofi_conn_step(ep, now);
	/* While completions wait an error may be among them: nothing is put behind it (ask.c). */
	if (ep->state != OFI_UP || rest)
		return any;
	any |= ofi_serve(ep);
	if (ep->state == OFI_UP)
		any |= ofi_ops_post(ep, now);
	return any;
}

static bool turn(struct fab *f)
{
	bool any = take_over(f);
	uint64_t now = clock_now_ns();
	struct fab_ep *ep;

	TAILQ_FOREACH(ep, &f->engaged, turn_link)
	any |= ep_turn(ep, now);
	/* Who was first is last: the budget of bytes in flight goes round. */
	ep = TAILQ_FIRST(&f->engaged);
	if (any && ep) {
		TAILQ_REMOVE(&f->engaged, ep, turn_link);
		TAILQ_INSERT_TAIL(&f->engaged, ep, turn_link);
	}
	return any;
}

/* -------------------------------------------------------------------- sleep */

/* False: something was handed over. */
static bool fall_asleep(struct fab *f)
{
	struct fab_ep *ep;
	bool empty;

	pthread_mutex_lock(&f->lock);
	empty = !f->call && !f->stop;
	TAILQ_FOREACH(ep, &f->engaged, turn_link)
	empty &= TAILQ_EMPTY(&ep->submitted) && !ep->incoming_due;
	f->asleep = empty;
	pthread_mutex_unlock(&f->lock);
	return empty;
}

static void wake_up(struct fab *f)
{
	uint64_t n;

	pthread_mutex_lock(&f->lock);
	f->asleep = false;
	pthread_mutex_unlock(&f->lock);
	(void)!read(f->wake_fd, &n, sizeof(n));
}

/* Does libfabric agree? False: it has something to do. */
static bool may_sleep(struct fab *f)
{
	struct fab_ep *ep;

	TAILQ_FOREACH(ep, &f->engaged, turn_link)
	{
		struct fid *fid = ep->fi.cq ? &ep->fi.cq->fid : NULL;

		if (fid && edge_trywait(f->fabric, &fid, 1))
			return false;
	}
	return true;
}

/* -1: until something happens. */
static int tick_ms(const struct fab *f)
{
	const struct fab_ep *ep;
	int ms = -1;

	TAILQ_FOREACH(ep, &f->engaged, turn_link)
	{
		if (ep->state != OFI_UP && ep->state != OFI_OVER)
			return CONNECTING_TICK_MS;
		if (ep->state != OFI_OVER)
			ms = TICK_MS;
	}
	return ms;
}

static void sleep_a_while(struct fab *f)
{
	const struct timespec nap = { .tv_nsec = POLL_NS };
	struct epoll_event ev[16];
	int ms = tick_ms(f);

	if (!fall_asleep(f))
		return;
	if (!f->waits && ms >= 0)
		(void)epoll_pwait2(f->epoll_fd, ev, ARRAY_LEN(ev), &nap, NULL);
	else if (may_sleep(f))
		(void)epoll_wait(f->epoll_fd, ev, ARRAY_LEN(ev), ms);
	wake_up(f);
}

static bool stopped(struct fab *f)
{
	bool stop;

	pthread_mutex_lock(&f->lock);
	stop = f->stop;
	pthread_mutex_unlock(&f->lock);
	return stop;
}

static void *engine_main(void *arg)
{
	struct fab *f = arg;
	unsigned idle = 0;

	pthread_setname_np(pthread_self(), "ofi");
	while (!stopped(f)) {
		idle = turn(f) ? 0 : idle + 1;
		if (idle > IDLE_TURNS)
			sleep_a_while(f);
	}
	return NULL;
}

/* ---------------------------------------------------------------- life cycle */

int ofi_engine_start(struct fab *f)
{
	struct epoll_event ev = { .events = EPOLLIN };
	int ret;

	f->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	f->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	f->event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	ret = f->epoll_fd < 0 || f->wake_fd < 0 || f->event_fd < 0 ? -errno : 0;
	if (!ret && epoll_ctl(f->epoll_fd, EPOLL_CTL_ADD, f->wake_fd, &ev))
		ret = -errno;
	if (ret)
		goto err_fds;
	pthread_mutex_init(&f->lock, NULL);
	pthread_cond_init(&f->called, NULL);
	ret = -pthread_create(&f->engine, NULL, engine_main, f);
	if (!ret)
		return 0;
	pthread_cond_destroy(&f->called);
	pthread_mutex_destroy(&f->lock);
err_fds:
	if (f->event_fd >= 0)
		close(f->event_fd);
	if (f->wake_fd >= 0)
		close(f->wake_fd);
	if (f->epoll_fd >= 0)
		close(f->epoll_fd);
	return ret;
}

void ofi_engine_stop(struct fab *f)
{
	assert(TAILQ_EMPTY(&f->engaged));
	pthread_mutex_lock(&f->lock);
	f->stop = true;
	ofi_engine_wake(f);
	pthread_mutex_unlock(&f->lock);
	pthread_join(f->engine, NULL);
	pthread_cond_destroy(&f->called);
	pthread_mutex_destroy(&f->lock);
	close(f->event_fd);
	close(f->wake_fd);
	close(f->epoll_fd);
}

void ofi_engine_call(struct fab *f, void (*run)(void *ctx), void *ctx)
{
	struct ofi_call call = { .run = run, .ctx = ctx };

	pthread_mutex_lock(&f->lock);
	assert(!f->call);
	f->call = &call;
	ofi_engine_wake(f);
	while (!call.done)
		pthread_cond_wait(&f->called, &f->lock);
	pthread_mutex_unlock(&f->lock);
}
