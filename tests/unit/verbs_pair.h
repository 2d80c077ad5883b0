/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Two instances of the provider verbs on the stub, an endpoint between them and
 * memory of each kind; signals go to the other side as the control connection
 * would carry them. Time can be put ahead, and no timer is slower than 1 ms.
 */
#ifndef SHARDMESH_TEST_VERBS_PAIR_H
#define SHARDMESH_TEST_VERBS_PAIR_H

#include "rdma_pair.h"
#include "verbs_stub.h"

#include <sys/timerfd.h>

#define MS 1000000ull

static uint64_t clock_ahead_ns;

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
	const struct timespec quick = { .tv_nsec = 200000 };
	const struct itimerspec both = { .it_interval = quick, .it_value = quick };

	if (t->it_value.tv_sec || t->it_value.tv_nsec)
		t = &both;
	return __real_timerfd_settime(fd, flags, t, old);
}

#define EVENTS 4096
struct side {
	struct fab *f;
	struct fab_ep *ep;
	struct fab_event ev[EVENTS]; /* but signals */
	uint32_t n, taken;
	bool deaf; /* what it is told is lost */
};

struct vpair {
	const struct fab_ops *ops;
	struct fab_options o;
	struct side a, b; /* a connects */
	struct pair_memory m;
	uint32_t signals;
};

static inline int side_open(struct vpair *v, struct side *s, uint32_t member, const char *job, struct log *log)
{
	const struct fab_config cfg = { .job = job, .member = member, .options = &v->o, .log = log };
	struct err e = { 0 };

	v->ops = fab_provider("verbs");
	return v->ops->open(&cfg, &s->f, &e);
}

static inline void side_poll(struct vpair *v, struct side *s, struct side *other)
{
	struct fab_event ev[64];
	uint32_t n = v->ops->poll(s->f, ev, ARRAY_LEN(ev));

	for (uint32_t i = 0; i < n; i++) {
		if (ev[i].type != FAB_EV_SIGNAL) {
			assert_true(s->n < EVENTS);
			s->ev[s->n++] = ev[i];
			continue;
		}
		v->signals++;
		if (other->f && !other->deaf)
			assert_int_equal(v->ops->signal(other->f, ev[i].user == 11 ? 22 : 11, ev[i].blob), 0);
	}
}

static inline void both_poll(struct vpair *v)
{
	if (v->a.f)
		side_poll(v, &v->a, &v->b);
	if (v->b.f)
		side_poll(v, &v->b, &v->a);
}

/* The next event of s, or one of type 99 after `polls` polls of both. */
static inline struct fab_event await(struct vpair *v, struct side *s, uint32_t polls)
{
	for (uint32_t i = 0; s->taken == s->n; i++) {
		if (i == polls)
			return (struct fab_event){ .type = 99 };
		both_poll(v);
		if (i > 50)
			nap();
	}
	if (s->taken + 1 == s->n) {
		struct fab_event last = s->ev[s->taken];

		s->taken = s->n = 0;
		return last;
	}
	return s->ev[s->taken++];
}
#define LONG 20000

static inline void quiet(struct vpair *v)
{
	for (int i = 0; i < 20; i++)
		both_poll(v);
	assert_int_equal(v->a.n - v->a.taken, 0);
	assert_int_equal(v->b.n - v->b.taken, 0);
}

static inline int sides_connect(struct vpair *v)
{
	struct fab_blob address;
	int ret = v->ops->address(v->b.f, 22, &address);

	return ret ? ret : v->ops->connect(v->a.f, &address, 11, &v->a.ep);
}

static inline void vpair_connect(struct vpair *v)
{
	struct fab_event ev;

	assert_int_equal(sides_connect(v), 0);
	ev = await(v, &v->a, LONG);
	assert_int_equal(ev.type, FAB_EV_CONNECTED);
	assert_ptr_equal(ev.ep, v->a.ep);
	ev = await(v, &v->b, LONG);
	assert_int_equal(ev.type, FAB_EV_ACCEPTED);
	assert_int_equal(ev.user, 22);
	v->b.ep = ev.ep;
}

static inline struct fab_remote *pass(struct vpair *v, struct fab_region *r)
{
	return region_pass(v->ops, v->b.ep, r, v->a.f, v->a.ep);
}

static inline void vpair_open(struct vpair *v, const struct fab_options *o, uint64_t bytes)
{
	memset(v, 0, sizeof(*v));
	clock_ahead_ns = 0;
	if (o)
		v->o = *o;
	assert_int_equal(side_open(v, &v->a, 1, "test", NULL), 0);
	assert_int_equal(side_open(v, &v->b, 2, "test", NULL), 0);
	vpair_connect(v);
	memory_open(&v->m, &(struct pair){ .ops = v->ops, .a = v->a.f, .b = v->b.f, .ab = v->a.ep, .ba = v->b.ep },
		    bytes);
	quiet(v);
}

static inline void vpair_close(struct vpair *v)
{
	if (v->a.f)
		v->ops->close(v->a.f);
	if (v->b.f)
		v->ops->close(v->b.f);
	assert_int_equal(stub.live, 0);
}

/* Takes n completions of status 0. */
static inline void completions(struct vpair *v, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++) {
		struct fab_event ev = await(v, &v->a, LONG);

		assert_true(ev.type == FAB_EV_READ || ev.type == FAB_EV_WRITE);
		assert_int_equal(ev.status, 0);
	}
}

#endif
