/* SPDX-License-Identifier: Apache-2.0 */
/* Reads, writes and notices, on both providers: what arrives, when, and what is refused. */
#include "rdma_pair.h"

#define MIB (1u << 20)

static const char *provider_of(void **state)
{
	return *state;
}

struct bench {
	struct pair p;
	struct fab_region *params, *inbox, *mine; /* params and inbox are b's, mine is a's */
	struct fab_remote *params_of_b, *inbox_of_b;
};

static void bench_open(struct bench *t, const char *provider, uint64_t bytes)
{
	pair_open(&t->p, provider);
	t->params = region_new(t->p.ops, t->p.b, bytes, FAB_REMOTE_READ);
	t->inbox = region_new(t->p.ops, t->p.b, bytes, FAB_REMOTE_WRITE);
	t->mine = region_new(t->p.ops, t->p.a, bytes, FAB_LOCAL);
	t->params_of_b = region_pass(t->p.ops, t->p.ba, t->params, t->p.a, t->p.ab);
	t->inbox_of_b = region_pass(t->p.ops, t->p.ba, t->inbox, t->p.a, t->p.ab);
}

static uint8_t *at(struct bench *t, struct fab_region *r)
{
	return t->p.ops->region_addr(r);
}

static void reads_bring_the_bytes(void **state)
{
	struct bench t;
	struct fab_op op[2];
	struct fab_event ev;

	bench_open(&t, provider_of(state), MIB);
	fill(at(&t, t.params), MIB, 3);
	op[0] = (struct fab_op){ .remote = t.params_of_b, .local = t.mine, .bytes = MIB / 2, .user = 7 };
	op[1] = (struct fab_op){ .remote = t.params_of_b,
				 .remote_offset = MIB / 2,
				 .local = t.mine,
				 .local_offset = MIB / 2,
				 .bytes = MIB / 2,
				 .user = 8 };
	assert_int_equal(t.p.ops->read(t.p.ab, op, 2), 0);
	ev = next_event(t.p.ops, t.p.a);
	assert_int_equal(ev.type, FAB_EV_READ);
	assert_int_equal(ev.user + next_event(t.p.ops, t.p.a).user, 15);
	assert_int_equal(ev.status, 0);
	assert_ptr_equal(ev.ep, t.p.ab);
	assert_true(filled(at(&t, t.mine), MIB, 3));
	no_event(t.p.ops, t.p.a);
	no_event(t.p.ops, t.p.b);
	assert_int_equal(t.p.ops->counters(t.p.a)->reads, 2);
	assert_int_equal(t.p.ops->counters(t.p.a)->read_bytes, MIB);
	pair_close(&t.p);
}

int main(void)
{
	static char local[] = "local", copy[] = "local-copy";
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_prestate(reads_bring_the_bytes, local),
		cmocka_unit_test_prestate(reads_bring_the_bytes, copy),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
