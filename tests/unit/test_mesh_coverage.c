/* SPDX-License-Identifier: Apache-2.0 */
/* Coverage: each rule by itself. */
#include "coverage_bench.h"

#include <errno.h>

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
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
