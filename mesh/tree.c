/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The reduction tree over micro-batches. Nothing is stored: a node is two
 * numbers, and what is beside and above it follows from them and from M. Where
 * M is not a power of two, a node of the full tree whose right half lies beyond
 * M is its left half; canonical nodes leave such nodes out, so that one set of
 * micro-batches has one name and every inner node has two children.
 */
#include "mesh/mesh.h"

#include <assert.h>

/* One past the last micro-batch; 64 bits because a level may reach beyond 2^32. */
static uint64_t tree_end(struct tree_node n, uint32_t n_micro)
{
	uint64_t end = n.first + (1ull << n.level);

	return end < n_micro ? end : n_micro;
}

/* The lowest level at which `first` reaches over `leaves` micro-batches. */
static uint32_t level_over(uint64_t leaves)
{
	return leaves <= 1 ? 0 : 64 - (uint32_t)__builtin_clzll(leaves - 1);
}

struct tree_node tree_canonical(struct tree_node n, uint32_t n_micro)
{
	assert(n.first < n_micro && n.level <= 32);
	return (struct tree_node){ n.first, level_over(tree_end(n, n_micro) - n.first) };
}

struct tree_node tree_root(uint32_t n_micro)
{
	assert(n_micro > 0);
	return (struct tree_node){ 0, level_over(n_micro) };
}

uint32_t tree_leaves(struct tree_node n, uint32_t n_micro)
{
	return (uint32_t)(tree_end(n, n_micro) - n.first);
}

bool tree_equal(struct tree_node a, struct tree_node b)
{
	return a.first == b.first && a.level == b.level;
}

bool tree_covers(struct tree_node a, struct tree_node b, uint32_t n_micro)
{
	return a.first <= b.first && tree_end(b, n_micro) <= tree_end(a, n_micro);
}

bool tree_sibling(struct tree_node n, uint32_t n_micro, struct tree_node *sibling, struct tree_node *parent, bool *left)
{
	uint32_t level = n.level;
	uint64_t beside;

	if (tree_leaves(n, n_micro) == n_micro)
		return false;
	/* Upwards past the nodes of which n is the only child. */
	while (!(n.first >> level & 1) && n.first + (1ull << level) >= n_micro)
		level++;
	*left = !(n.first >> level & 1);
	beside = *left ? n.first + (1ull << level) : n.first - (1ull << level);
	*sibling = tree_canonical((struct tree_node){ (uint32_t)beside, level }, n_micro);
	*parent = (struct tree_node){ *left ? n.first : (uint32_t)beside, level + 1 };
	return true;
}

bool tree_children(struct tree_node n, uint32_t n_micro, struct tree_node *left, struct tree_node *right)
{
	uint32_t half;

	if (n.level == 0)
		return false;
	half = n.first + (1u << (n.level - 1));
	*left = (struct tree_node){ n.first, n.level - 1 };
	*right = tree_canonical((struct tree_node){ half, n.level - 1 }, n_micro);
	return true;
}

bool tree_valid(struct tree_node n, uint32_t n_micro)
{
	if (n.first >= n_micro || n.level > 32 || (n.first & ((1ull << n.level) - 1)))
		return false;
	return tree_equal(n, tree_canonical(n, n_micro));
}
