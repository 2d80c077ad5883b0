/* SPDX-License-Identifier: Apache-2.0 */
/* The reduction tree, against what a recursive drawing of it says. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "mesh/mesh.h"

#include <stdlib.h>

#define M_MAX 130

/* Micro-batches [first, end) of a full node, cut at M: how canonical levels come about. */
static uint32_t covered(uint32_t first, uint32_t level, uint32_t n)
{
	uint64_t end = first + (1ull << level);

	return (uint32_t)((end < n ? end : n) - first);
}

static void test_canonical(void **state)
{
	(void)state;
	for (uint32_t n = 1; n <= M_MAX; n++)
		for (uint32_t level = 0; level < 9; level++)
			for (uint32_t first = 0; first < n; first += 1u << level) {
				struct tree_node c = tree_canonical((struct tree_node){ first, level }, n);
				uint32_t lowest = 0;

				while (covered(first, lowest, n) < covered(first, level, n))
					lowest++;
				assert_int_equal(c.first, first);
				assert_int_equal(c.level, lowest);
				assert_int_equal(tree_leaves(c, n), covered(first, level, n));
				assert_int_equal(tree_valid((struct tree_node){ first, level }, n), level == lowest);
			}
}

/* Every inner node has two children that are each other's siblings and lie side by side. */
static void walk(struct tree_node n, uint32_t m, uint32_t *leaves)
{
	struct tree_node l, r, sibling, parent;
	bool left;

	assert_true(tree_valid(n, m));
	if (!tree_children(n, m, &l, &r)) {
		assert_int_equal(tree_leaves(n, m), 1);
		assert_int_equal(n.first, *leaves);
		++*leaves;
		return;
	}
	assert_int_equal(l.first, n.first);
	assert_int_equal(r.first, l.first + tree_leaves(l, m));
	assert_int_equal(tree_leaves(l, m) + tree_leaves(r, m), tree_leaves(n, m));
	assert_true(tree_sibling(l, m, &sibling, &parent, &left));
	assert_true(left && tree_equal(sibling, r) && tree_equal(parent, n));
	assert_true(tree_sibling(r, m, &sibling, &parent, &left));
	assert_true(!left && tree_equal(sibling, l) && tree_equal(parent, n));
	assert_true(tree_covers(n, l, m) && tree_covers(n, r, m) && tree_covers(n, n, m));
	assert_false(tree_covers(l, n, m) || tree_covers(r, n, m) || tree_covers(l, r, m) || tree_covers(r, l, m));
	walk(l, m, leaves);
	walk(r, m, leaves);
}

static void test_shape(void **state)
{
	(void)state;
	for (uint32_t n = 1; n <= M_MAX; n++) {
		struct tree_node root = tree_root(n), sibling, parent;
		uint32_t leaves = 0;
		bool left;

		assert_int_equal(tree_leaves(root, n), n);
		assert_false(tree_sibling(root, n, &sibling, &parent, &left));
		walk(root, n, &leaves);
		assert_int_equal(leaves, n);
	}
}

/* 11 micro-batches: [0,8) and [8,11), the latter of [8,10) and 10, by hand. */
static void test_by_hand(void **state)
{
	struct tree_node sibling, parent;
	bool left;

	(void)state;
	assert_true(tree_equal(tree_root(11), (struct tree_node){ 0, 4 }));
	assert_true(tree_sibling((struct tree_node){ 10, 0 }, 11, &sibling, &parent, &left));
	assert_true(tree_equal(sibling, (struct tree_node){ 8, 1 }) && tree_equal(parent, (struct tree_node){ 8, 2 }));
	assert_false(left);
	assert_true(tree_sibling((struct tree_node){ 8, 2 }, 11, &sibling, &parent, &left));
	assert_true(tree_equal(sibling, (struct tree_node){ 0, 3 }) && tree_equal(parent, tree_root(11)));
	/* With 9, the last one is 8's whole half. */
	assert_true(tree_sibling((struct tree_node){ 8, 0 }, 9, &sibling, &parent, &left));
	assert_true(tree_equal(sibling, (struct tree_node){ 0, 3 }) && tree_equal(parent, tree_root(9)));
}

static void test_from_the_wire(void **state)
{
	(void)state;
	assert_true(tree_valid((struct tree_node){ 8, 2 }, 12));
	assert_false(tree_valid((struct tree_node){ 8, 3 }, 12)); /* not canonical */
	assert_false(tree_valid((struct tree_node){ 6, 2 }, 12)); /* not aligned */
	assert_false(tree_valid((struct tree_node){ 12, 0 }, 12));
	assert_false(tree_valid((struct tree_node){ 0, 5 }, 12));
	assert_false(tree_valid((struct tree_node){ 0, 33 }, 12));
	assert_false(tree_valid((struct tree_node){ UINT32_MAX, UINT32_MAX }, UINT32_MAX));
	assert_false(tree_valid((struct tree_node){ 0, 0 }, 0));
}

/* Nothing overflows at the far end. */
static void test_large(void **state)
{
	const uint32_t n = UINT32_MAX;
	struct tree_node leaf = { n - 1, 0 }, sibling, parent = leaf;
	bool left;

	(void)state;
	assert_int_equal(tree_root(n).level, 32);
	assert_int_equal(tree_leaves(tree_root(n), n), n);
	while (tree_sibling(parent, n, &sibling, &parent, &left))
		assert_true(tree_valid(parent, n) && tree_valid(sibling, n));
	assert_true(tree_equal(parent, tree_root(n)));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_canonical),     cmocka_unit_test(test_shape), cmocka_unit_test(test_by_hand),
		cmocka_unit_test(test_from_the_wire), cmocka_unit_test(test_large),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
