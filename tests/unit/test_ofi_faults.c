/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Each call of libfabric fails once, the first time it is made, the second, and
 * so on; what is mended is mended, what is not says so, and all that was opened
 * is closed. And what other providers may want: memory registered for our own
 * operations.
 */
#include "ofi_pair.h"

#include "rdma/ofi/ofi.h"

#define SECOND 1000000000ull

enum call {
	GETINFO,
	FABRIC,
	DOMAIN,
	ENDPOINT,
	CQ,
	AV,
	BIND,
	ENABLE,
	GETNAME,
	WAIT_FD,
	INSERT,
	REGISTER,
	TRYWAIT,
	WRITE,
	COMPLETIONS,
	FAILURE,
	CALLS,
};

static const char *const names[CALLS] = { "getinfo", "fabric", "domain",      "endpoint", "cq",     "av",
					  "bind",    "enable", "getname",     "wait_fd",  "insert", "register",
					  "trywait", "write",  "completions", "failure" };

/* Two engines and the test use these. */
static _Atomic int calls[CALLS], fail_at[CALLS], open_now;
static _Atomic uint64_t modes; /* that the provider is made to want */
static _Atomic bool forge;     /* notices carry somebody else's tag */

static bool fails(enum call c)
{
	return atomic_fetch_add(&calls[c], 1) + 1 == atomic_load(&fail_at[c]);
}

#define WRAP(name, c, opens, args, pass)                \
	int __real_edge_##name args;                    \
	int __wrap_edge_##name args;                    \
	int __wrap_edge_##name args                     \
	{                                               \
		int ret = -EIO;                         \
                                                        \
		if (!fails(c))                          \
			ret = __real_edge_##name pass;  \
		if (opens && ret == 0)                  \
			atomic_fetch_add(&open_now, 1); \
		return ret;                             \
	}

WRAP(fabric, FABRIC, true, (struct fi_info * i, struct fid_fabric **o), (i, o))
WRAP(domain, DOMAIN, true, (struct fid_fabric * f, struct fi_info *i, struct fid_domain **o), (f, i, o))
WRAP(endpoint, ENDPOINT, true, (struct fid_domain * d, struct fi_info *i, struct fid_ep **o), (d, i, o))
WRAP(cq, CQ, true, (struct fid_domain * d, struct fi_cq_attr *a, struct fid_cq **o), (d, a, o))
WRAP(av, AV, true, (struct fid_domain * d, struct fi_av_attr *a, struct fid_av **o), (d, a, o))
WRAP(register, REGISTER, true, (struct fid_domain * d, const struct fi_mr_attr *a, struct fid_mr **o), (d, a, o))
WRAP(bind, BIND, false, (struct fid_ep * e, struct fid *w, uint64_t f), (e, w, f))
WRAP(enable, ENABLE, false, (struct fid_ep * e), (e))
WRAP(getname, GETNAME, false, (struct fid_ep * e, void *n, size_t *b), (e, n, b))
WRAP(wait_fd, WAIT_FD, false, (struct fid_cq * c, int *fd), (c, fd))
WRAP(insert, INSERT, false, (struct fid_av * a, const void *n, fi_addr_t *o), (a, n, o))
WRAP(trywait, TRYWAIT, false, (struct fid_fabric * f, struct fid **v, int n), (f, v, n))
WRAP(completions, COMPLETIONS, false, (struct fid_cq * c, struct fi_cq_data_entry *o, size_t m), (c, o, m))
WRAP(failure, FAILURE, false, (struct fid_cq * c, struct fi_cq_err_entry *o), (c, o))

int __real_edge_getinfo(const char *node, uint64_t flags, const struct fi_info *hints, struct fi_info **out);
int __wrap_edge_getinfo(const char *node, uint64_t flags, const struct fi_info *hints, struct fi_info **out);
int __real_edge_write(struct fid_ep *ep, const struct fi_msg_rma *msg, uint64_t flags);
int __wrap_edge_write(struct fid_ep *ep, const struct fi_msg_rma *msg, uint64_t flags);
int __real_edge_close(struct fid *fid);
int __wrap_edge_close(struct fid *fid);

int __wrap_edge_getinfo(const char *node, uint64_t flags, const struct fi_info *hints, struct fi_info **out)
{
	int ret = fails(GETINFO) ? -EIO : __real_edge_getinfo(node, flags, hints, out);

	if (!ret)
		(*out)->domain_attr->mr_mode |= (int)atomic_load(&modes);
	return ret;
}

int __wrap_edge_write(struct fid_ep *ep, const struct fi_msg_rma *msg, uint64_t flags)
{
	struct fi_msg_rma m = *msg;

	if (atomic_load(&forge) && flags & FI_REMOTE_CQ_DATA)
		m.data ^= (uint64_t)1 << 63;
	return fails(WRITE) ? -EIO : __real_edge_write(ep, &m, flags);
}

int __wrap_edge_close(struct fid *fid)
{
	atomic_fetch_sub(&open_now, 1);
	return __real_edge_close(fid);
}

static void reset_calls(void)
{
	for (int c = 0; c < CALLS; c++) {
		atomic_store(&calls[c], 0);
		atomic_store(&fail_at[c], 0);
	}
}

/* ------------------------------------------------------------------- scenario */

struct scene {
	struct ofi_pair p;
	uint32_t posted, completed, noticed;
	bool up[2], down[2];
};

static void take_all(struct scene *s)
{
	struct fab_event ev;

	for (int i = 0; i < 2; i++) {
		while (ofi_take(&s->p, i, &ev)) {
			s->up[i] |= ev.type == FAB_EV_CONNECTED || ev.type == FAB_EV_ACCEPTED;
			s->down[i] |= ev.type == FAB_EV_DOWN;
			s->completed += ev.type == FAB_EV_READ || ev.type == FAB_EV_WRITE;
			s->noticed += ev.type == FAB_EV_NOTICE;
			if (ev.type == FAB_EV_CONNECTED || ev.type == FAB_EV_ACCEPTED)
				s->p.ep[i] = ev.ep;
		}
	}
	nap();
}

/* False: an instance could not be opened, and said why. */
static bool open_both(struct ofi_pair *p)
{
	struct fab_config cfg = { .job = "test", .options = &p->options };

	for (int i = 0; i < 2; i++) {
		struct err e = { 0 };

		if (p->ops->open(&cfg, &p->f[i], &e)) {
			assert_true(strlen(e.text) > 0);
			if (i)
				p->ops->close(p->f[0]);
			return false;
		}
	}
	return true;
}

static struct fab_region *try_region(struct ofi_pair *p, int i, enum fab_access access)
{
	const struct fab_region_attr attr = { .name = "memory", .bytes = MIB, .access = access };
	struct fab_region *r = NULL;
	struct err e = { 0 };
	int ret = p->ops->region_open(p->f[i], &attr, &r, &e);

	assert_true(ret == 0 || strlen(e.text) > 0);
	return ret ? NULL : r;
}

static struct fab_remote *try_pass(struct ofi_pair *p, struct fab_region *r)
{
	struct fab_remote *remote = NULL;
	struct fab_blob blob;

	if (r && p->ops->export_region(p->ep[1], r, &blob) == 0)
		assert_int_equal(p->ops->import_region(p->ep[0], &blob, &remote), 0);
	return remote;
}

static void move_bytes(struct scene *s)
{
	struct ofi_pair *p = &s->p;
	struct fab_op op;

	p->m.params = try_region(p, 1, FAB_REMOTE_READ);
	p->m.inbox = try_region(p, 1, FAB_REMOTE_WRITE);
	p->m.mine = try_region(p, 0, FAB_LOCAL);
	p->m.params_of_b = try_pass(p, p->m.params);
	p->m.inbox_of_b = try_pass(p, p->m.inbox);
	for (uint32_t i = 0; i < 4 && p->m.mine; i++) {
		op = read_op(&p->m, 0, MIB, i);
		if (p->m.params_of_b)
			s->posted += p->ops->read(p->ep[0], &op, 1) == 0;
		op = write_op(&p->m, 0, MIB, i);
		if (p->m.inbox_of_b)
			s->posted += p->ops->write_notify(p->ep[0], &op, 1) == 0;
	}
}

/* The whole life of a pair, as far as it gets. What is posted completes, whatever happens. */
static void play(struct scene *s)
{
	uint64_t end = clock_now_ns() + WAIT_NS;
	struct fab_blob address;

	*s = (struct scene){
		.p = { .ops = fab_provider("ofi"),
		       .options = { .local_address = "127.0.0.1", .deadline_ns = SECOND / 2, .down_ns = 2 * SECOND } }
	};
	if (!open_both(&s->p))
		return;
	if (s->p.ops->address(s->p.f[1], USER_B, &address) == 0 &&
	    s->p.ops->connect(s->p.f[0], &address, USER_A, &s->p.ep[0]) == 0) {
		while (!(s->up[0] && s->up[1]) && !s->down[0]) {
			take_all(s);
			assert_true(clock_now_ns() < end);
		}
		if (s->up[0] && s->up[1])
			move_bytes(s);
		while (s->completed < s->posted) {
			take_all(s);
			assert_true(clock_now_ns() < end);
		}
		take_all(s);
	}
	ofi_pair_close(&s->p);
}

/* ---------------------------------------------------------------------- tests */

/* At most so many: some are made again and again while nothing happens. */
static const int most[CALLS] = { [TRYWAIT] = 6, [COMPLETIONS] = 24, [WRITE] = 24 };

static void each_call_fails_once(void **state)
{
	(void)state;
	for (int c = 0; c < CALLS; c++) {
		struct scene s;

		for (int n = 1; !most[c] || n <= most[c]; n++) {
			reset_calls();
			atomic_store(&fail_at[c], n);
			play(&s);
			if (atomic_load(&calls[c]) < n)
				break;
			/* What cannot be enabled is left, with the queue and the vector that it holds. */
			if (c == BIND || c == ENABLE)
				atomic_fetch_sub(&open_now, 3);
			if (atomic_load(&open_now) != 0)
				print_message("%s, call %d\n", names[c], n);
			assert_int_equal(atomic_load(&open_now), 0);
		}
	}
	reset_calls();
}

/* One failure on the way of the bytes is mended: all of them arrive. */
static void failures_on_the_way_are_mended(void **state)
{
	static const enum call on_the_way[] = { WRITE, COMPLETIONS };

	(void)state;
	for (size_t k = 0; k < ARRAY_LEN(on_the_way); k++) {
		for (int n = 2; n < 12; n += 3) {
			struct scene s;

			reset_calls();
			atomic_store(&fail_at[on_the_way[k]], n);
			play(&s);
			assert_int_equal(atomic_load(&open_now), 0);
			assert_true(s.up[0] && s.up[1]);
			assert_int_equal(s.posted, 8);
			assert_false(s.down[0]);
		}
	}
	reset_calls();
}

/* As hardware: our own memory is registered too. */
static void local_memory_is_registered_where_wanted(void **state)
{
	struct ofi_pair p = { 0 };
	struct fab_op op;

	(void)state;
	atomic_store(&modes, FI_MR_LOCAL);
	ofi_bench_open(&p, NULL, MIB);
	/* Each region, two mailboxes, two exports. */
	assert_int_equal(atomic_load(&calls[REGISTER]), 3 + 2 + 2);
	fill(region_at(p.ops, p.m.params), MIB, 4);
	op = read_op(&p.m, PAGE, MIB - PAGE, 1);
	assert_int_equal(p.ops->read(p.ep[0], &op, 1), 0);
	assert_int_equal(ofi_expect(&p, 0, FAB_EV_READ).status, 0);
	assert_memory_equal(region_at(p.ops, p.m.mine) + PAGE, region_at(p.ops, p.m.params) + PAGE, MIB - PAGE);
	ofi_pair_close(&p);
	atomic_store(&modes, 0);
	assert_int_equal(atomic_load(&open_now), 0);
}

static void a_strangers_notice_is_refused(void **state)
{
	struct ofi_pair p = { 0 };
	struct fab_op op;

	(void)state;
	ofi_bench_open(&p, NULL, PAGE);
	atomic_store(&forge, true);
	op = write_op(&p.m, 0, PAGE, 7);
	assert_int_equal(p.ops->write_notify(p.ep[0], &op, 1), 0);
	ofi_expect(&p, 0, FAB_EV_WRITE);
	ofi_silence(&p);
	atomic_store(&forge, false);
	assert_int_equal(p.ops->counters(p.f[1])->refused, 1);
	assert_int_equal(p.ops->counters(p.f[1])->notices, 0);
	ofi_pair_close(&p);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(each_call_fails_once),
		cmocka_unit_test(failures_on_the_way_are_mended),
		cmocka_unit_test(local_memory_is_registered_where_wanted),
		cmocka_unit_test(a_strangers_notice_is_refused),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
