/* SPDX-License-Identifier: Apache-2.0 */
/* Coverage: each rule by itself, then all of them under random offers. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "mesh/mesh.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define OFFERS 40
#define SUMS 200

struct bench {
	struct coverage c;
	void *memory;
	uint32_t pool, in_use, last; /* sums without must; ids are not used twice in the tests by hand */
	bool reuse, used[SUMS];
	uint64_t value[SUMS];
};

static uint32_t take(void *ctx, bool must)
{
	struct bench *b = ctx;
	uint32_t sum = 1;

	if (!must && b->in_use >= b->pool)
		return COVERAGE_NO_SUM;
	if (b->reuse)
		while (b->used[sum])
			sum++;
	else
		sum = ++b->last;
	assert_true(sum < SUMS && !b->used[sum]);
	b->used[sum] = true;
	b->in_use++;
	return sum;
}

static void give(void *ctx, uint32_t sum)
{
	struct bench *b = ctx;

	assert_true(sum > 0 && sum < SUMS && b->used[sum]);
	b->used[sum] = false;
	b->in_use--;
}

static void bench_open(struct bench *b, uint32_t n_micro, uint32_t max_held, uint32_t pool)
{
	const struct coverage_sums sums = { .take = take, .give = give, .ctx = b };

	memset(b, 0, sizeof(*b));
	b->pool = pool;
	b->memory = malloc(coverage_bytes(OFFERS));
	coverage_init(&b->c, n_micro, max_held, &sums, b->memory, OFFERS);
}

static void bench_close(struct bench *b)
{
	free(b->memory);
}

static void offer(struct bench *b, uint64_t id, uint32_t first, uint32_t level, bool in_place, bool wanted)
{
	assert_int_equal(coverage_offer(&b->c, id, (struct tree_node){ first, level }, in_place, wanted), 0);
}

#define NOTHING(b)                                             \
	do {                                                   \
		struct coverage_action action;                 \
		assert_false(coverage_next(&(b)->c, &action)); \
	} while (0)

static void expect_answer(struct bench *b, uint64_t id, enum offer_verdict verdict)
{
	struct coverage_action a;

	assert_true(coverage_next(&b->c, &a));
	assert_int_equal(a.type, COVERAGE_ANSWER);
	assert_int_equal(a.offer, id);
	assert_int_equal(a.verdict, verdict);
}

static void expect_root(struct bench *b)
{
	struct coverage_action a;

	assert_true(coverage_next(&b->c, &a));
	assert_int_equal(a.type, COVERAGE_ROOT);
	assert_true(coverage_complete(&b->c));
	assert_int_equal(b->in_use, 0);
}

/* An operand as a number: sum n is n, offer n is -n, none is NO. */
#define NO 1000
static int number_of(const struct operand *o)
{
	return o->kind == OPERAND_NONE ? NO : o->kind == OPERAND_SUM ? (int)o->sum : -(int)o->offer;
}

static void expect_fold(struct bench *b, uint32_t dst, int left, int right)
{
	struct coverage_action a;

	assert_true(coverage_next(&b->c, &a));
	assert_int_equal(a.type, COVERAGE_FOLD);
	assert_int_equal(a.dst, dst);
	assert_int_equal(number_of(&a.a), left);
	assert_int_equal(number_of(&a.b), right);
}

/* ------------------------------------------------------------ in place */

static void test_reference(void **state)
{
	struct bench b;

	(void)state;
	bench_open(&b, 4, 8, 10);
	/* Held by reference until the sibling comes; the left one is the first operand. */
	offer(&b, 3, 1, 0, true, false);
	NOTHING(&b);
	offer(&b, 2, 0, 0, true, false);
	expect_fold(&b, 0, -2, -3);
	NOTHING(&b);
	/* The other half comes in the other order, wanted one by one. */
	offer(&b, 5, 3, 0, true, true);
	expect_fold(&b, 1, -5, NO);
	NOTHING(&b);
	offer(&b, 4, 2, 0, true, false);
	expect_fold(&b, 1, -4, 1);
	expect_fold(&b, 0, 0, 1);
	expect_root(&b);
	NOTHING(&b);
	bench_close(&b);
}

static void test_wanted_back(void **state)
{
	struct bench b;

	(void)state;
	bench_open(&b, 4, 8, 10);
	offer(&b, 2, 0, 0, true, false);
	NOTHING(&b);
	coverage_want(&b.c, 2);
	expect_fold(&b, 0, -2, NO);
	coverage_want(&b.c, 2); /* its answer and this crossed */
	coverage_want(&b.c, 99);
	NOTHING(&b);
	bench_close(&b);
}

/* Nothing can come beside the root, so it is not waited for; and M may be 1. */
static void test_whole(void **state)
{
	struct bench b;

	(void)state;
	for (uint32_t n = 1; n < 6; n++) {
		bench_open(&b, n, 1, 0);
		offer(&b, 7, 0, tree_root(n).level, true, false);
		expect_fold(&b, 0, -7, NO);
		expect_root(&b);
		NOTHING(&b);
		bench_close(&b);
	}
}

static void test_ancestor_replaces(void **state)
{
	struct bench b;

	(void)state;
	bench_open(&b, 8, 8, 10);
	offer(&b, 1, 0, 0, true, true);
	expect_fold(&b, 0, -1, NO);
	offer(&b, 2, 2, 0, true, true);
	expect_fold(&b, 1, -2, NO);
	offer(&b, 3, 5, 0, true, true);
	expect_fold(&b, 2, -3, NO);
	assert_int_equal(b.in_use, 2);
	/* [0,4) comes whole: 0 and 2 are in it. */
	offer(&b, 4, 0, 2, true, true);
	expect_fold(&b, 0, -4, NO);
	assert_int_equal(b.in_use, 1);
	/* And what is below it is covered from now on. */
	offer(&b, 5, 3, 0, true, false);
	expect_answer(&b, 5, OFFER_COVERED);
	offer(&b, 6, 0, 2, false, true);
	expect_answer(&b, 6, OFFER_COVERED);
	/* [4,8) whole, beside what is held: added to it, and 5 makes room. */
	offer(&b, 7, 4, 2, true, false);
	expect_fold(&b, 0, 0, -7);
	expect_root(&b);
	bench_close(&b);
}

static void test_same_node_twice(void **state)
{
	struct bench b;

	(void)state;
	bench_open(&b, 4, 8, 10);
	offer(&b, 1, 2, 0, true, false);
	offer(&b, 2, 2, 0, true, false);
	NOTHING(&b);
	coverage_want(&b.c, 2);
	expect_fold(&b, 0, -2, NO);
	expect_answer(&b, 1, OFFER_COVERED);
	NOTHING(&b);
	bench_close(&b);
}

/* ------------------------------------------------------- who gets a sum */

/* K nodes beyond the lowest missing one and no more; but that one, and siblings, whatever is held. */
static void test_classes(void **state)
{
	struct bench b;
	struct tree_node n;

	(void)state;
	bench_open(&b, 16, 2, 100);
	offer(&b, 1, 9, 0, true, true);
	expect_fold(&b, 0, -1, NO);
	offer(&b, 2, 13, 0, true, true);
	expect_fold(&b, 1, -2, NO);
	assert_false(coverage_starved(&b.c));
	offer(&b, 3, 5, 0, true, true);
	offer(&b, 4, 7, 0, false, true);
	NOTHING(&b);
	assert_true(coverage_starved(&b.c));
	assert_true(coverage_lowest_missing(&b.c, &n));
	assert_true(tree_equal(n, (struct tree_node){ 0, 3 }));
	/* The sibling of a held one, not even wanted. */
	offer(&b, 5, 12, 0, true, false);
	expect_fold(&b, 1, -5, 1);
	NOTHING(&b);
	offer(&b, 6, 0, 0, true, true);
	expect_fold(&b, 2, -6, NO);
	assert_true(coverage_lowest_missing(&b.c, &n));
	assert_true(tree_equal(n, (struct tree_node){ 1, 0 }));
	NOTHING(&b);
	/* Two become one beyond it: there is room again, for the lowest, and for no more. */
	offer(&b, 7, 8, 0, true, false);
	expect_fold(&b, 0, -7, 0);
	offer(&b, 8, 10, 1, true, false);
	expect_fold(&b, 0, 0, -8);
	NOTHING(&b);
	offer(&b, 9, 14, 1, true, false);
	expect_fold(&b, 1, 1, -9);
	expect_fold(&b, 0, 0, 1);
	expect_fold(&b, 3, -3, NO);
	NOTHING(&b);
	bench_close(&b);
}

static void test_room_appears(void **state)
{
	struct bench b;

	(void)state;
	bench_open(&b, 16, 1, 100);
	offer(&b, 1, 8, 2, true, true);
	expect_fold(&b, 0, -1, NO);
	offer(&b, 2, 6, 0, true, true);
	offer(&b, 3, 4, 0, false, true);
	NOTHING(&b);
	/* [8,12) and [12,16) are one, still beyond; [0,4) comes and [4,8) is the next: 4 contains it, 6 does not. */
	offer(&b, 4, 12, 2, true, false);
	expect_fold(&b, 0, 0, -4);
	NOTHING(&b);
	offer(&b, 5, 0, 2, true, true);
	expect_fold(&b, 1, -5, NO);
	expect_answer(&b, 3, OFFER_GRANTED);
	NOTHING(&b);
	coverage_pushed(&b.c, 3);
	expect_fold(&b, 2, -3, NO);
	NOTHING(&b);
	offer(&b, 6, 5, 0, true, false);
	expect_fold(&b, 2, 2, -6);
	/* 6 is the lowest missing one now, and beside nothing that is held. */
	expect_fold(&b, 3, -2, NO);
	offer(&b, 7, 7, 0, true, false);
	expect_fold(&b, 3, 3, -7);
	expect_fold(&b, 2, 2, 3);
	expect_fold(&b, 1, 1, 2);
	expect_fold(&b, 0, 1, 0);
	expect_root(&b);
	bench_close(&b);
}

static void test_no_memory(void **state)
{
	struct bench b;

	(void)state;
	bench_open(&b, 8, 8, 0);
	offer(&b, 1, 5, 0, true, true);
	expect_fold(&b, 0, -1, NO);
	/* No sum for another one, in place or pushed, alone or as a pair. */
	offer(&b, 2, 7, 0, true, true);
	offer(&b, 3, 3, 0, false, true);
	offer(&b, 4, 2, 0, false, false);
	NOTHING(&b);
	assert_true(coverage_starved(&b.c));
	/* The sibling needs none. The lowest missing one gets one when somebody waits for it. */
	offer(&b, 5, 4, 0, false, false);
	expect_answer(&b, 5, OFFER_GRANTED);
	offer(&b, 6, 0, 0, false, false);
	NOTHING(&b);
	coverage_want(&b.c, 6);
	expect_answer(&b, 6, OFFER_GRANTED);
	assert_int_equal(b.in_use, 1);
	coverage_pushed(&b.c, 5);
	expect_fold(&b, 0, -5, 0);
	NOTHING(&b);
	coverage_pushed(&b.c, 6);
	expect_fold(&b, 1, -6, NO);
	offer(&b, 7, 1, 0, true, false);
	expect_fold(&b, 1, 1, -7);
	NOTHING(&b);
	/* In place as well. */
	offer(&b, 8, 2, 0, true, false);
	NOTHING(&b);
	coverage_want(&b.c, 8);
	expect_fold(&b, 2, -8, NO);
	bench_close(&b);
}

/* A pair over the lowest missing leaf waits by reference until one of the two is wanted. */
static void test_pair_waits_for_memory(void **state)
{
	struct bench b;

	(void)state;
	bench_open(&b, 8, 8, 0);
	offer(&b, 1, 5, 0, true, true);
	expect_fold(&b, 0, -1, NO);
	offer(&b, 2, 1, 0, true, false);
	offer(&b, 3, 0, 0, true, false);
	NOTHING(&b);
	assert_false(coverage_starved(&b.c));
	coverage_want(&b.c, 2);
	expect_fold(&b, 1, -3, -2);
	NOTHING(&b);
	bench_close(&b);
}

/* Who has lost the partner waits by reference again. */
static void test_partner_leaves(void **state)
{
	struct bench b;

	(void)state;
	bench_open(&b, 8, 1, 100);
	offer(&b, 1, 6, 0, true, true);
	expect_fold(&b, 0, -1, NO);
	offer(&b, 2, 2, 0, true, false);
	offer(&b, 3, 3, 0, true, false);
	NOTHING(&b);
	assert_true(coverage_withdraw(&b.c, 3));
	offer(&b, 4, 0, 1, true, true);
	expect_fold(&b, 1, -4, NO);
	NOTHING(&b);
	offer(&b, 5, 3, 0, true, false);
	expect_fold(&b, 2, -2, -5);
	expect_fold(&b, 1, 1, 2);
	NOTHING(&b);
	bench_close(&b);
}

/* ----------------------------------------------------------------- pushes */

static void test_push(void **state)
{
	struct bench b;

	(void)state;
	bench_open(&b, 4, 1, 10);
	offer(&b, 1, 0, 0, false, false);
	expect_answer(&b, 1, OFFER_GRANTED);
	/* Its sum is reserved: the accumulator. */
	offer(&b, 2, 2, 1, false, false);
	expect_answer(&b, 2, OFFER_GRANTED);
	assert_int_equal(b.in_use, 1);
	NOTHING(&b);
	coverage_pushed(&b.c, 99);
	NOTHING(&b);
	coverage_pushed(&b.c, 2);
	expect_fold(&b, 1, -2, NO);
	/* In place beside what is being pushed: it waits, and is added when that is there. */
	offer(&b, 3, 1, 0, true, false);
	NOTHING(&b);
	coverage_pushed(&b.c, 1);
	coverage_pushed(&b.c, 1);
	expect_fold(&b, 0, -1, NO);
	expect_fold(&b, 0, 0, -3);
	expect_fold(&b, 0, 0, 1);
	expect_root(&b);
	bench_close(&b);
}

/* A grant counts towards K like what is held. */
static void test_grants_count(void **state)
{
	struct bench b;

	(void)state;
	bench_open(&b, 16, 2, 100);
	offer(&b, 1, 4, 0, false, true);
	expect_answer(&b, 1, OFFER_GRANTED);
	offer(&b, 2, 6, 0, false, true);
	expect_answer(&b, 2, OFFER_GRANTED);
	offer(&b, 3, 8, 0, false, true);
	NOTHING(&b);
	/* One over the lowest missing leaf does not count. */
	offer(&b, 4, 0, 1, false, true);
	expect_answer(&b, 4, OFFER_GRANTED);
	NOTHING(&b);
	/* Dead before it was pushed: its sum and its place are free. */
	assert_true(coverage_withdraw(&b.c, 2));
	expect_answer(&b, 3, OFFER_GRANTED);
	NOTHING(&b);
	assert_int_equal(b.in_use, 2);
	bench_close(&b);
}

static void test_covered_while_pushing(void **state)
{
	struct bench b;

	(void)state;
	bench_open(&b, 8, 8, 10);
	offer(&b, 1, 5, 0, false, true);
	expect_answer(&b, 1, OFFER_GRANTED);
	offer(&b, 2, 7, 0, false, true);
	expect_answer(&b, 2, OFFER_GRANTED);
	/* [4,8) comes whole. What was reserved below it is free at once: it takes the accumulator. */
	offer(&b, 3, 4, 2, true, true);
	expect_fold(&b, 0, -3, NO);
	assert_int_equal(b.in_use, 0);
	NOTHING(&b);
	coverage_pushed(&b.c, 1);
	expect_answer(&b, 1, OFFER_COVERED);
	/* Withdrawn instead of pushed: nothing more is said about it. */
	assert_true(coverage_withdraw(&b.c, 2));
	coverage_pushed(&b.c, 2);
	NOTHING(&b);
	bench_close(&b);
}

/* No sum is reserved where one below will serve; and it serves also when it has grown meanwhile. */
static void test_push_over_begun(void **state)
{
	struct bench b;

	(void)state;
	bench_open(&b, 8, 8, 10);
	offer(&b, 1, 4, 0, true, true);
	expect_fold(&b, 0, -1, NO);
	offer(&b, 2, 4, 2, false, true);
	expect_answer(&b, 2, OFFER_GRANTED);
	assert_int_equal(b.in_use, 0);
	offer(&b, 3, 5, 0, true, true);
	expect_fold(&b, 0, 0, -3);
	offer(&b, 4, 6, 0, true, true);
	expect_fold(&b, 1, -4, NO);
	coverage_pushed(&b.c, 2);
	expect_fold(&b, 0, -2, NO);
	assert_int_equal(b.in_use, 0);
	NOTHING(&b);
	bench_close(&b);
}

/* ---------------------------------------------------------- ends and errors */

static void test_withdraw(void **state)
{
	struct bench b;

	(void)state;
	bench_open(&b, 8, 8, 10);
	offer(&b, 1, 0, 0, true, false);
	assert_true(coverage_withdraw(&b.c, 1));
	assert_false(coverage_withdraw(&b.c, 1));
	NOTHING(&b);
	/* Taken already: its answer is TAKEN, by whoever folds. */
	offer(&b, 2, 0, 0, true, true);
	expect_fold(&b, 0, -2, NO);
	assert_false(coverage_withdraw(&b.c, 2));
	/* Its answer is on its way. */
	offer(&b, 3, 0, 0, true, true);
	assert_false(coverage_withdraw(&b.c, 3));
	expect_answer(&b, 3, OFFER_COVERED);
	/* Complete in its slot, and not looked at yet. */
	offer(&b, 4, 6, 0, false, true);
	offer(&b, 5, 4, 0, false, true);
	expect_answer(&b, 5, OFFER_GRANTED);
	expect_answer(&b, 4, OFFER_GRANTED);
	coverage_pushed(&b.c, 4);
	coverage_pushed(&b.c, 5);
	assert_true(coverage_withdraw(&b.c, 4));
	expect_fold(&b, 1, -5, NO);
	NOTHING(&b);
	assert_int_equal(b.in_use, 1);
	bench_close(&b);
}

static void test_close(void **state)
{
	struct bench b;

	(void)state;
	bench_open(&b, 16, 8, 10);
	offer(&b, 1, 0, 0, true, true);
	expect_fold(&b, 0, -1, NO);
	offer(&b, 2, 2, 0, true, true);
	expect_fold(&b, 1, -2, NO);
	offer(&b, 3, 8, 0, false, true);
	expect_answer(&b, 3, OFFER_GRANTED);
	offer(&b, 4, 12, 0, true, false);
	offer(&b, 5, 0, 0, true, false);
	assert_int_equal(b.in_use, 2);
	coverage_close(&b.c);
	assert_int_equal(b.in_use, 0);
	expect_answer(&b, 5, OFFER_COVERED);
	expect_answer(&b, 3, OFFER_CLOSED);
	expect_answer(&b, 4, OFFER_CLOSED);
	NOTHING(&b);
	coverage_pushed(&b.c, 3);
	NOTHING(&b);
	offer(&b, 6, 1, 0, true, true);
	expect_answer(&b, 6, OFFER_CLOSED);
	NOTHING(&b);
	bench_close(&b);
}

/* After the root everything is covered, until the seal says closed. */
static void test_after_root(void **state)
{
	struct bench b;
	struct tree_node n;

	(void)state;
	bench_open(&b, 4, 8, 10);
	offer(&b, 1, 1, 0, true, false);
	offer(&b, 2, 2, 1, false, true);
	expect_answer(&b, 2, OFFER_GRANTED);
	offer(&b, 3, 0, 2, true, true);
	expect_fold(&b, 0, -3, NO);
	expect_answer(&b, 1, OFFER_COVERED);
	expect_root(&b);
	assert_false(coverage_lowest_missing(&b.c, &n));
	assert_false(coverage_starved(&b.c));
	offer(&b, 4, 3, 0, false, true);
	expect_answer(&b, 4, OFFER_COVERED);
	NOTHING(&b);
	coverage_close(&b.c);
	expect_answer(&b, 2, OFFER_CLOSED);
	NOTHING(&b);
	assert_true(coverage_complete(&b.c));
	bench_close(&b);
}

static void test_errors(void **state)
{
	struct bench b;

	(void)state;
	bench_open(&b, 12, 8, 100);
	assert_int_equal(coverage_offer(&b.c, 1, (struct tree_node){ 8, 3 }, true, true), -EINVAL);
	assert_int_equal(coverage_offer(&b.c, 1, (struct tree_node){ 12, 0 }, true, true), -EINVAL);
	offer(&b, 1, 3, 0, true, false);
	assert_int_equal(coverage_offer(&b.c, 1, (struct tree_node){ 4, 0 }, true, true), -EEXIST);
	for (uint64_t id = 2; id <= OFFERS; id++)
		offer(&b, id, 3, 0, true, false);
	assert_int_equal(coverage_offer(&b.c, 500, (struct tree_node){ 4, 0 }, true, true), -ENOSPC);
	/* A place that was left is used again. */
	assert_true(coverage_withdraw(&b.c, 17));
	offer(&b, 500, 4, 0, true, false);
	assert_int_equal(coverage_offer(&b.c, 501, (struct tree_node){ 4, 0 }, true, true), -ENOSPC);
	coverage_want(&b.c, 40);
	expect_fold(&b, 0, -40, NO);
	for (uint64_t id = 1; id < OFFERS; id++)
		if (id != 17)
			expect_answer(&b, id, OFFER_COVERED);
	NOTHING(&b);
	bench_close(&b);
}

static void test_k_is_bounded(void **state)
{
	struct bench b;

	(void)state;
	bench_open(&b, 400, 1000, 150);
	for (uint32_t i = 1; i <= 100; i++) {
		struct coverage_action a;

		offer(&b, i, 400 - 4 * i, 0, true, true);
		assert_int_equal(coverage_next(&b.c, &a), i <= COVERAGE_K_MAX || i == 100);
		if (i > COVERAGE_K_MAX)
			coverage_withdraw(&b.c, i);
	}
	bench_close(&b);
}

/* ---------------------------------------------------------------- random */

struct random {
	struct bench b;
	uint64_t seed, i;
	uint32_t n;
	struct {
		struct tree_node node;
		bool in_place, wanted, pushing, live;
	} offer[4000];
};

static uint64_t next_random(struct random *r)
{
	return rng_u64(3, r->seed, r->i++) >> 7;
}

static uint64_t add(uint64_t left, uint64_t right)
{
	return (left * 3 + 1) * 0x9e3779b97f4a7c15ull ^ (right * 7 + 5) * 0xbf58476d1ce4e5b9ull;
}

static uint64_t value_of(struct tree_node n, uint32_t m)
{
	struct tree_node l, r;

	if (!tree_children(n, m, &l, &r))
		return (n.first + 1) * 0x94d049bb133111ebull;
	return add(value_of(l, m), value_of(r, m));
}

static uint64_t operand_value(struct random *r, const struct operand *o)
{
	if (o->kind == OPERAND_SUM)
		return r->b.value[o->sum];
	assert_true(r->offer[o->offer].live);
	r->offer[o->offer].live = false;
	return value_of(r->offer[o->offer].node, r->b.c.n_micro);
}

/* What the indices must say, found the long way. */
static void check_indices(const struct random *r)
{
	const struct coverage *c = &r->b.c;
	uint32_t n_reserved = 0, n_held_sums = 0, n_by_node = 0, n_eager = 0;

	for (uint32_t i = 0; i < c->n_offers; i++) {
		const struct coverage_offer *o = &c->offer[c->by_id[i]];
		struct tree_node sibling, parent;
		bool left, eager, whole = !tree_sibling(o->node, c->n_micro, &sibling, &parent, &left);

		assert_true(!i || c->offer[c->by_id[i - 1]].id < o->id);
		n_reserved += o->sum != COVERAGE_NO_SUM;
		n_by_node += o->state != OFFER_ANSWERED && !o->covered;
		eager = o->state == OFFER_WAITING && (o->wanted || !o->in_place || whole);
		for (uint32_t k = 0; k < c->n_offers && !whole && o->state == OFFER_WAITING && o->in_place; k++) {
			const struct coverage_offer *x = &c->offer[c->by_id[k]];

			eager |= x->in_place && x->state == OFFER_WAITING && tree_equal(x->node, sibling);
		}
		assert_int_equal(o->eager, eager);
		n_eager += eager;
	}
	assert_int_equal(n_reserved, c->n_reserved);
	assert_int_equal(n_by_node, c->n_by_node);
	assert_int_equal(n_eager, c->n_eager);
	for (uint32_t i = 0; i < c->n_held; i++) {
		n_held_sums += c->held[i].sum != 0;
		if (i)
			assert_true(c->held[i - 1].node.first + tree_leaves(c->held[i - 1].node, c->n_micro) <=
				    c->held[i].node.first);
	}
	assert_true(r->b.in_use <= n_held_sums + n_reserved && r->b.in_use >= n_held_sums);
}

static void act(struct random *r)
{
	struct coverage_action a;

	while (coverage_next(&r->b.c, &a)) {
		if (a.type == COVERAGE_ROOT) {
			assert_true(r->b.value[0] == value_of(tree_root(r->b.c.n_micro), r->b.c.n_micro));
		} else if (a.type == COVERAGE_FOLD) {
			uint64_t value = operand_value(r, &a.a);

			if (a.b.kind != OPERAND_NONE)
				value = add(value, operand_value(r, &a.b));
			r->b.value[a.dst] = value;
		} else {
			assert_true(r->offer[a.offer].live);
			r->offer[a.offer].live = r->offer[a.offer].pushing = a.verdict == OFFER_GRANTED;
		}
		/* Now and then something happens before all is decided. */
		if (next_random(r) % 16 == 0)
			return;
	}
	check_indices(r);
}

/* Any aligned node, as no lease table would cut them; near the lowest missing leaf often enough to come to an end. */
static struct tree_node any_node(struct random *r)
{
	uint32_t m = r->b.c.n_micro, level;
	struct tree_node n = { (uint32_t)(next_random(r) % m), 0 }, lowest;

	if (next_random(r) % 4 == 0 && coverage_lowest_missing(&r->b.c, &lowest))
		n = lowest;
	level = (uint32_t)(next_random(r) % 3) * (uint32_t)(next_random(r) % 3);
	n.first = n.first >> level << level;
	n.level = level > tree_root(m).level ? 0 : level;
	return tree_canonical(n, m);
}

static void one_event(struct random *r)
{
	uint64_t what = next_random(r) % 8, id = r->n ? next_random(r) % r->n : 0;

	if (what < 3 && r->b.c.n_offers < OFFERS && r->n < ARRAY_LEN(r->offer)) {
		id = r->n++;
		r->offer[id].node = any_node(r);
		r->offer[id].in_place = next_random(r) % 2;
		r->offer[id].wanted = next_random(r) % 2;
		r->offer[id].live = true;
		offer(&r->b, id, r->offer[id].node.first, r->offer[id].node.level, r->offer[id].in_place,
		      r->offer[id].wanted);
	} else if (what == 3) {
		coverage_want(&r->b.c, id);
	} else if (what == 4) {
		if (coverage_withdraw(&r->b.c, id))
			r->offer[id].live = false;
	} else {
		/* The oldest push that is under way. */
		for (id = r->n > OFFERS * 4 ? r->n - OFFERS * 4 : 0; id < r->n && !r->offer[id].pushing; id++)
			;
		if (id < r->n) {
			r->offer[id].pushing = false;
			coverage_pushed(&r->b.c, id);
		}
	}
	act(r);
}

static void test_random(void **state)
{
	struct random *r = malloc(sizeof(*r));
	uint32_t ended = 0;

	(void)state;
	for (uint64_t seed = 0; seed < 1500; seed++) {
		uint32_t m;

		memset(r, 0, sizeof(*r));
		r->seed = seed;
		m = 1 + (uint32_t)(next_random(r) % 60);
		bench_open(&r->b, m, 1 + (uint32_t)(next_random(r) % 4), (uint32_t)(next_random(r) % 6));
		r->b.reuse = true;
		for (uint32_t i = 0; i < 4000 && !r->b.c.root_told; i++)
			one_event(r);
		ended += r->b.c.root_told;
		coverage_close(&r->b.c);
		act(r);
		while (r->b.c.n_offers)
			act(r);
		assert_int_equal(r->b.in_use, 0);
		bench_close(&r->b);
	}
	assert_true(ended > 1000);
	free(r);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_reference),
		cmocka_unit_test(test_wanted_back),
		cmocka_unit_test(test_whole),
		cmocka_unit_test(test_ancestor_replaces),
		cmocka_unit_test(test_same_node_twice),
		cmocka_unit_test(test_classes),
		cmocka_unit_test(test_room_appears),
		cmocka_unit_test(test_no_memory),
		cmocka_unit_test(test_pair_waits_for_memory),
		cmocka_unit_test(test_partner_leaves),
		cmocka_unit_test(test_push),
		cmocka_unit_test(test_grants_count),
		cmocka_unit_test(test_covered_while_pushing),
		cmocka_unit_test(test_push_over_begun),
		cmocka_unit_test(test_withdraw),
		cmocka_unit_test(test_close),
		cmocka_unit_test(test_after_root),
		cmocka_unit_test(test_errors),
		cmocka_unit_test(test_k_is_bounded),
		cmocka_unit_test(test_random),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
