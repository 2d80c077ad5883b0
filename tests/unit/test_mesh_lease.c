/* SPDX-License-Identifier: Apache-2.0 */
/* Leases: how long, which first, and what comes back. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "mesh/lease.h"

#include <stdlib.h>
#include <string.h>

/* Deals spans of `length` out in turn and counts. */
static uint32_t busiest(uint32_t n, uint32_t n_workers, uint32_t length)
{
	uint32_t got[32] = { 0 }, most = 0;

	for (uint32_t first = 0, i = 0; first < n; first += length, i++)
		got[i % n_workers] += first + length <= n ? length : n - first;
	for (uint32_t i = 0; i < n_workers; i++)
		most = got[i] > most ? got[i] : most;
	return most;
}

static void test_length(void **state)
{
	(void)state;
	for (uint32_t n = 1; n <= 100; n++)
		for (uint32_t w = 1; w <= 20; w++)
			for (uint32_t cap = 1; cap <= 70; cap += 7) {
				uint32_t best = 1;

				for (uint32_t length = 2; length <= cap && length < 2 * n; length *= 2)
					if (busiest(n, w, length) <= busiest(n, w, 1))
						best = length;
				assert_int_equal(lease_longest(n, w, cap), best);
			}
	/* By hand: 12 over 3 are 4 each; over 2 they are 6, which spans of 4 cannot give. */
	assert_int_equal(lease_longest(12, 3, UINT32_MAX), 4);
	assert_int_equal(lease_longest(12, 2, UINT32_MAX), 2);
	assert_int_equal(lease_longest(12, 1, UINT32_MAX), 16);
	assert_int_equal(lease_longest(12, 1, 5), 4);
	assert_int_equal(lease_longest(UINT32_MAX, 1, UINT32_MAX), 1u << 31);
}

static void test_lowest_first(void **state)
{
	struct lease_table t;
	struct lease l, second;
	uint32_t leaf;

	(void)state;
	assert_int_equal(lease_table_init(&t, 12, 3), 0);
	assert_false(lease_take(&t, 1, 8, 7, &l));
	lease_table_open(&t, 12, 3);
	assert_true(lease_take(&t, 3, 8, 7, &l));
	assert_int_equal(l.worker, 7);
	assert_int_equal(l.kind, LEASE_TRAIN);
	assert_true(tree_equal(l.node, (struct tree_node){ 0, 2 }));
	assert_true(lease_take(&t, 3, 8, 8, &second));
	assert_true(tree_equal(second.node, (struct tree_node){ 4, 2 }));
	assert_true(second.id > l.id);
	/* What comes back is the lowest again, and may be cut differently. */
	lease_reopen(&t, &l);
	assert_true(lease_lowest(&t, LEASE_TRAIN, &leaf));
	assert_int_equal(leaf, 0);
	assert_true(lease_take(&t, 3, 1, 9, &l));
	assert_true(tree_equal(l.node, (struct tree_node){ 0, 0 }));
	/* Alignment: from 1 nothing longer begins. */
	assert_true(lease_take(&t, 3, 8, 9, &l));
	assert_true(tree_equal(l.node, (struct tree_node){ 1, 0 }));
	assert_true(lease_take(&t, 3, 8, 9, &l));
	assert_true(tree_equal(l.node, (struct tree_node){ 2, 1 }));
	assert_true(lease_take(&t, 3, 8, 9, &l));
	assert_true(tree_equal(l.node, (struct tree_node){ 8, 2 }));
	/* Evaluation comes when there is nothing to train on. */
	assert_true(lease_take(&t, 3, 8, 9, &l));
	assert_int_equal(l.kind, LEASE_EVAL);
	assert_true(tree_equal(l.node, (struct tree_node){ 0, 0 }));
	lease_reopen(&t, &second);
	assert_true(lease_take(&t, 3, 8, 9, &l));
	assert_int_equal(l.kind, LEASE_TRAIN);
	assert_true(lease_take(&t, 1, 8, 9, &l));
	assert_true(l.kind == LEASE_EVAL && tree_equal(l.node, (struct tree_node){ 1, 0 }));
	assert_true(lease_take(&t, 1, 8, 9, &l));
	assert_false(lease_take(&t, 1, 8, 9, &l));
	assert_false(lease_lowest(&t, LEASE_EVAL, &leaf));
	lease_table_release(&t);
}

static void test_starving(void **state)
{
	struct lease_table t;
	struct lease l;

	(void)state;
	assert_int_equal(lease_table_init(&t, 200, 0), 0);
	lease_table_open(&t, 200, 0);
	lease_starve(&t, 130);
	assert_true(lease_starving(&t));
	do
		assert_true(lease_take(&t, 200, 1, 1, &l));
	while (l.node.first != 130);
	assert_false(lease_starving(&t));
	lease_reopen(&t, &l);
	assert_true(lease_starving(&t));
	/* Another one does not make it forgotten; the next step does. */
	lease_starve(&t, 7);
	assert_true(lease_starving(&t));
	lease_table_open(&t, 200, 0);
	assert_false(lease_starving(&t));
	while (lease_take(&t, 200, 1, 1, &l))
		if (l.node.first == 7)
			lease_starve(&t, 7);
	assert_int_equal(l.node.first, 199);
	lease_reopen(&t, &(struct lease){ .kind = LEASE_TRAIN, .node = { 130, 0 } });
	assert_false(lease_starving(&t));
	lease_table_release(&t);
}

/* Random takes and returns: always disjoint, valid, lowest first, and all of it in the end. */
static void test_random(void **state)
{
	uint8_t owner[300];
	struct lease live[64];

	(void)state;
	for (uint32_t round = 0; round < 300; round++) {
		uint32_t n = 1 + (uint32_t)rng_u64(1, round, 0) % 300, n_live = 0, n_open = n;
		struct lease_table t;

		assert_int_equal(lease_table_init(&t, n, 0), 0);
		lease_table_open(&t, n, 0);
		memset(owner, 0, sizeof(owner));
		for (uint32_t i = 1; n_open || n_live; i++) {
			uint64_t r = rng_u64(2, round, i);
			uint32_t at = n_live ? (uint32_t)(r >> 8) % n_live : 0, lowest = 0;
			struct lease *l = &live[at];

			if (n_live == ARRAY_LEN(live) || !n_open || (n_live && r % 3 == 0)) {
				bool back = r % 2;

				for (uint32_t k = 0; k < tree_leaves(l->node, n); k++)
					owner[l->node.first + k] = back ? 0 : 2;
				if (back) {
					lease_reopen(&t, l);
					n_open += tree_leaves(l->node, n);
				}
				*l = live[--n_live];
				continue;
			}
			l = &live[n_live++];
			assert_true(lease_take(&t, 1 + (uint32_t)(r >> 16) % 9, 1 + (uint32_t)(r >> 24) % 33, 5, l));
			assert_true(tree_valid(l->node, n));
			while (owner[lowest])
				lowest++;
			assert_int_equal(l->node.first, lowest);
			for (uint32_t k = 0; k < tree_leaves(l->node, n); k++) {
				assert_int_equal(owner[lowest + k], 0);
				owner[lowest + k] = 1;
			}
			n_open -= tree_leaves(l->node, n);
		}
		for (uint32_t k = 0; k < n; k++)
			assert_int_equal(owner[k], 2);
		lease_table_release(&t);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_length),
		cmocka_unit_test(test_lowest_first),
		cmocka_unit_test(test_starving),
		cmocka_unit_test(test_random),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
