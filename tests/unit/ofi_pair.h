/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Two instances of the provider `ofi` on loopback with an endpoint between
 * them: rdma_pair.h's pair, for a provider that talks by signals and whose
 * completions take their time. One thread has both ends; what one signals is
 * carried to the other at once.
 */
#ifndef SHARDMESH_TEST_OFI_PAIR_H
#define SHARDMESH_TEST_OFI_PAIR_H

#include "rdma_pair.h"

/*
 * What the sanitizers shall not say of libfabric, which was not built with them.
 * Leaks: it keeps what it found of providers until the process ends, and its
 * provider net a little of each fabric; that we close all that we open is
 * counted by test_ofi_faults. Races: it moves bytes that their owner writes
 * meanwhile, a progress word for one, and that is what a fabric is for; a NIC
 * would do it unseen. Not looking into it, the sanitizer misses a lock that its
 * last unlock at exit belongs to.
 */
const char *__lsan_default_suppressions(void);
const char *__tsan_default_suppressions(void);

const char *__lsan_default_suppressions(void)
{
	return "leak:libfabric.so\n";
}

const char *__tsan_default_suppressions(void)
{
	return "called_from_lib:libfabric.so\nmutex:_dl_call_fini\n";
}

#define USER_A 11u
#define USER_B 22u

struct ofi_pair {
	const struct fab_ops *ops;
	struct fab_options options;
	struct fab *f[2]; /* 0 connects, 1 accepts */
	struct fab_ep *ep[2];
	bool cut; /* signals get lost */
	struct pair_memory m;
};

/* One event of side `i` that is no signal. */
static inline bool ofi_take(struct ofi_pair *p, int i, struct fab_event *ev)
{
	while (p->ops->poll(p->f[i], ev, 1)) {
		if (ev->type != FAB_EV_SIGNAL)
			return true;
		assert_int_equal(ev->user, i ? USER_B : USER_A);
		if (!p->cut)
			assert_int_equal(p->ops->signal(p->f[!i], i ? USER_A : USER_B, ev->blob), 0);
	}
	return false;
}

/* The next event of side i; the other side must have none but signals. */
static inline struct fab_event ofi_next(struct ofi_pair *p, int i)
{
	uint64_t end = clock_now_ns() + WAIT_NS;
	struct fab_event ev, other;

	while (!ofi_take(p, i, &ev)) {
		assert_false(ofi_take(p, !i, &other));
		assert_true(clock_now_ns() < end);
		nap();
	}
	return ev;
}

static inline struct fab_event ofi_expect(struct ofi_pair *p, int i, enum fab_event_type type)
{
	struct fab_event ev = ofi_next(p, i);

	assert_int_equal(ev.type, type);
	return ev;
}

static inline void ofi_silence(struct ofi_pair *p)
{
	struct fab_event ev;

	for (int k = 0; k < 20; k++) {
		assert_false(ofi_take(p, 0, &ev));
		assert_false(ofi_take(p, 1, &ev));
		nap();
	}
}

static inline struct fab *ofi_new(struct ofi_pair *p, uint32_t member)
{
	struct fab_config cfg = { .job = "test", .member = member, .options = &p->options };
	struct fab *f = NULL;
	struct err e = { 0 };

	assert_int_equal(p->ops->open(&cfg, &f, &e), 0);
	return f;
}

/* Both are told that they are connected. */
static inline void ofi_meet(struct ofi_pair *p)
{
	uint64_t end = clock_now_ns() + WAIT_NS;
	bool up[2] = { false };
	struct fab_event ev;

	while (!up[0] || !up[1]) {
		for (int i = 0; i < 2; i++) {
			if (!ofi_take(p, i, &ev))
				continue;
			assert_int_equal(ev.type, i ? FAB_EV_ACCEPTED : FAB_EV_CONNECTED);
			assert_int_equal(ev.user, i ? USER_B : USER_A);
			assert_int_equal(ev.status, 0);
			p->ep[i] = ev.ep;
			up[i] = true;
		}
		assert_true(clock_now_ns() < end);
		nap();
	}
}

/* provider: NULL for the usual one. Ends the test where this libfabric does not have it. */
static inline void ofi_pair_init(struct ofi_pair *p, const char *provider)
{
	char reason[160];

	p->ops = fab_provider("ofi");
	assert_non_null(p->ops);
	p->options.local_address = "127.0.0.1";
	p->options.ofi_provider = provider;
	if (provider && p->ops->probe(&p->options, reason))
		skip();
}

/* Both instances, and no connection. */
static inline void ofi_ends_open(struct ofi_pair *p, const char *provider)
{
	ofi_pair_init(p, provider);
	p->f[0] = ofi_new(p, 1);
	p->f[1] = ofi_new(p, 2);
}

/* Side 0 begins to connect; what it has to say to side 1 is its first signal. */
static inline void ofi_begin(struct ofi_pair *p)
{
	struct fab_blob address;

	assert_int_equal(p->ops->address(p->f[1], USER_B, &address), 0);
	assert_int_equal(p->ops->connect(p->f[0], &address, USER_A, &p->ep[0]), 0);
}

static inline void ofi_join(struct ofi_pair *p)
{
	ofi_begin(p);
	ofi_meet(p);
}

static inline void ofi_pair_open(struct ofi_pair *p, const char *provider)
{
	ofi_ends_open(p, provider);
	ofi_join(p);
}

static inline void ofi_pair_close(struct ofi_pair *p)
{
	p->ops->close(p->f[0]);
	p->ops->close(p->f[1]);
}

static inline struct fab_remote *ofi_pass(struct ofi_pair *p, struct fab_region *r, int to)
{
	return region_pass(p->ops, p->ep[!to], r, p->f[to], p->ep[to]);
}

/* Side 1 has parameters and an inbox, side 0 memory of its own. */
static inline void ofi_bench_open(struct ofi_pair *p, const char *provider, uint64_t bytes)
{
	ofi_pair_open(p, provider);
	memory_open(&p->m, &(struct pair){ .ops = p->ops, .a = p->f[0], .b = p->f[1], .ab = p->ep[0], .ba = p->ep[1] },
		    bytes);
}

/* But "." and "..". */
static inline uint32_t ofi_threads(void)
{
	return dir_entries("/proc/self/task") - 2;
}

#endif
