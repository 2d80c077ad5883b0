/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Two fabric instances and an endpoint between them, for tests of rdma/. In one
 * process both are polled by the one thread; between processes, a socket pair
 * carries what the control connection would.
 */
#ifndef SHARDMESH_TEST_RDMA_PAIR_H
#define SHARDMESH_TEST_RDMA_PAIR_H

#include "rdma/fabric.h"

#include <dirent.h>
#include <errno.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#define WAIT_NS 20000000000ull
#define PAGE 4096u
#define MIB (1u << 20)

struct pair {
	const struct fab_ops *ops;
	struct fab *a, *b; /* a connects, b accepts */
	struct fab_ep *ab, *ba;
};

static inline uint32_t dir_entries(const char *path)
{
	DIR *d = opendir(path);
	uint32_t n = 0;

	assert_non_null(d);
	while (readdir(d))
		n++;
	closedir(d);
	return n;
}

/* More than there are by a constant: only good beside another such number. */
static inline uint32_t open_fds(void)
{
	return dir_entries("/proc/self/fd");
}

/* Mappings of this process that come from a fabric. */
static inline uint32_t shared_mappings(void)
{
	FILE *f = fopen("/proc/self/maps", "r");
	char line[512];
	uint32_t n = 0;

	assert_non_null(f);
	while (fgets(line, sizeof(line), f))
		n += strstr(line, "memfd:shardmesh-") != NULL;
	fclose(f);
	return n;
}

static inline struct fab *fab_new(const struct fab_ops *ops, uint32_t member, struct log *log)
{
	struct fab_config cfg = { .job = "test", .member = member, .log = log };
	struct fab *f = NULL;
	struct err e = { 0 };

	assert_int_equal(ops->open(&cfg, &f, &e), 0);
	return f;
}

static inline void nap(void)
{
	const struct timespec t = { .tv_nsec = 50000 };

	nanosleep(&t, NULL);
}

static inline struct fab_event next_event(const struct fab_ops *ops, struct fab *f)
{
	uint64_t end = clock_now_ns() + WAIT_NS;
	struct fab_event ev;

	while (!ops->poll(f, &ev, 1)) {
		assert_true(clock_now_ns() < end);
		nap();
	}
	return ev;
}

static inline void no_event(const struct fab_ops *ops, struct fab *f)
{
	struct fab_event ev;

	for (int i = 0; i < 10; i++)
		assert_int_equal(ops->poll(f, &ev, 1), 0);
}

/* An event of `from` that is not for the control connection; what is goes to `to`. */
static inline bool take_event(const struct fab_ops *ops, struct fab *from, struct fab *to, uint64_t user,
			      struct fab_event *out)
{
	if (!ops->poll(from, out, 1))
		return false;
	if (out->type != FAB_EV_SIGNAL)
		return true;
	assert_int_equal(ops->signal(to, user, out->blob), 0);
	return false;
}

/* The first event of each, both polled meanwhile. */
static inline void both_events(struct pair *p, struct fab_event *at_a, struct fab_event *at_b)
{
	uint64_t end = clock_now_ns() + WAIT_NS;
	bool a = false, b = false;

	while (!a || !b) {
		if (!a)
			a = take_event(p->ops, p->a, p->b, 22, at_a);
		if (!b)
			b = take_event(p->ops, p->b, p->a, 11, at_b);
		assert_true(clock_now_ns() < end);
	}
}

static inline void pair_connect(struct pair *p)
{
	struct fab_event ea = { 0 }, eb = { 0 };
	struct fab_blob address;

	assert_int_equal(p->ops->address(p->b, 22, &address), 0);
	assert_int_equal(p->ops->connect(p->a, &address, 11, &p->ab), 0);
	both_events(p, &ea, &eb);
	assert_int_equal(ea.type, FAB_EV_CONNECTED);
	assert_ptr_equal(ea.ep, p->ab);
	assert_int_equal(ea.user, 11);
	assert_int_equal(eb.type, FAB_EV_ACCEPTED);
	assert_int_equal(eb.user, 22);
	assert_int_equal(ea.status, 0);
	assert_int_equal(eb.status, 0);
	p->ba = eb.ep;
}

static inline void pair_open(struct pair *p, const char *provider)
{
	memset(p, 0, sizeof(*p));
	p->ops = fab_provider(provider);
	assert_non_null(p->ops);
	p->a = fab_new(p->ops, 1, NULL);
	p->b = fab_new(p->ops, 2, NULL);
	pair_connect(p);
}

static inline void pair_close(struct pair *p)
{
	p->ops->close(p->a);
	p->ops->close(p->b);
}

static inline struct fab_region *region_new(const struct fab_ops *ops, struct fab *f, uint64_t bytes,
					    enum fab_access access)
{
	struct fab_region_attr attr = { .name = "memory", .bytes = bytes, .access = access };
	struct fab_region *r = NULL;
	struct err e = { 0 };

	assert_int_equal(ops->region_open(f, &attr, &r, &e), 0);
	return r;
}

/* Exports r over `from` and imports it over `to`, an endpoint of f. */
static inline struct fab_remote *region_pass(const struct fab_ops *ops, struct fab_ep *from, struct fab_region *r,
					     struct fab *f, struct fab_ep *to)
{
	struct fab_remote *remote = NULL;
	struct fab_blob blob;

	assert_int_equal(ops->export_region(from, r, &blob), 0);
	/* Half of what the provider local exports goes another way and has not come yet. */
	if (!ops->signal) {
		assert_int_equal(ops->import_region(to, &blob, &remote), -EAGAIN);
		no_event(ops, f);
	}
	assert_int_equal(ops->import_region(to, &blob, &remote), 0);
	assert_non_null(remote);
	return remote;
}

static inline uint8_t *region_at(const struct fab_ops *ops, struct fab_region *r)
{
	return ops->region_addr(r);
}

/* Memory for a's operations: parameters and an inbox of b, and some of its own. */
struct pair_memory {
	struct fab_region *params, *inbox, *mine;
	struct fab_remote *params_of_b, *inbox_of_b;
};

static inline void memory_open(struct pair_memory *m, const struct pair *p, uint64_t bytes)
{
	m->params = region_new(p->ops, p->b, bytes, FAB_REMOTE_READ);
	m->inbox = region_new(p->ops, p->b, bytes, FAB_REMOTE_WRITE);
	m->mine = region_new(p->ops, p->a, bytes, FAB_LOCAL);
	m->params_of_b = region_pass(p->ops, p->ba, m->params, p->a, p->ab);
	m->inbox_of_b = region_pass(p->ops, p->ba, m->inbox, p->a, p->ab);
}

static inline struct fab_op read_op(const struct pair_memory *m, uint64_t offset, uint64_t bytes, uint64_t user)
{
	return (struct fab_op){ .remote = m->params_of_b,
				.remote_offset = offset,
				.local = m->mine,
				.local_offset = offset,
				.bytes = bytes,
				.user = user };
}

static inline struct fab_op write_op(const struct pair_memory *m, uint64_t offset, uint64_t bytes, uint32_t imm)
{
	return (struct fab_op){ .remote = m->inbox_of_b,
				.remote_offset = offset,
				.local = m->mine,
				.local_offset = offset,
				.bytes = bytes,
				.user = 1000u + imm,
				.imm = imm };
}

/* Every byte depends on its place and on seed. */
static inline uint8_t pattern(uint64_t i, uint8_t seed)
{
	return (uint8_t)(i * 131 + (i >> 8) * 7 + seed);
}

static inline void fill(uint8_t *p, uint64_t n, uint8_t seed)
{
	for (uint64_t i = 0; i < n; i++)
		p[i] = pattern(i, seed);
}

static inline bool filled(const uint8_t *p, uint64_t n, uint8_t seed)
{
	for (uint64_t i = 0; i < n; i++)
		if (p[i] != pattern(i, seed))
			return false;
	return true;
}

#endif
