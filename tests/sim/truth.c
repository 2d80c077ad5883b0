/* SPDX-License-Identifier: Apache-2.0 */
/* What everything must be: pure functions, so that a result can be checked wherever it turns up. */
#include "tests/sim/sim.h"

static uint64_t mix(uint64_t x)
{
	x ^= x >> 30;
	x *= 0xbf58476d1ce4e5b9ull;
	x ^= x >> 27;
	x *= 0x94d049bb133111ebull;
	return x ^ x >> 31;
}

/* --------------------------------------------------------------- chance */

uint64_t chance_u64(struct chance *c)
{
	c->state += 0x9e3779b97f4a7c15ull;
	return mix(c->state);
}

uint64_t chance_below(struct chance *c, uint64_t n)
{
	return chance_u64(c) % n;
}

uint64_t chance_range(struct chance *c, uint64_t low, uint64_t high)
{
	return low + chance_below(c, high - low + 1);
}

bool chance_of(struct chance *c, uint32_t per_1000)
{
	return chance_below(c, 1000) < per_1000;
}

/* ---------------------------------------------------------------- truth */

/* Neither commutative nor associative, as sums of floats are. */
uint64_t truth_add(uint64_t left, uint64_t right)
{
	return mix(left * 3 + mix(right + 0x51ed2701u));
}

static uint64_t leaf(uint64_t step, uint32_t unit, uint32_t part, uint32_t micro)
{
	return mix(mix(step * 64 + unit * 2 + part + 1) + micro);
}

uint64_t truth_node(uint64_t step, uint32_t unit, uint32_t part, struct tree_node n, uint32_t n_micro)
{
	struct tree_node left, right;

	if (!tree_children(n, n_micro, &left, &right))
		return leaf(step, unit, part, n.first);
	return truth_add(truth_node(step, unit, part, left, n_micro), truth_node(step, unit, part, right, n_micro));
}

double truth_loss(uint64_t step, enum lease_kind kind, struct tree_node n, uint32_t n_micro)
{
	struct tree_node left, right;

	/* Many bits, and of different size, so that another order of additions gives another sum. */
	if (!tree_children(n, n_micro, &left, &right))
		return 1e-3 * (double)(leaf(step, 99, kind, n.first) % 1000003) /
		       (double)(1 + leaf(step, 98, kind, n.first) % 97);
	return truth_loss(step, kind, left, n_micro) + truth_loss(step, kind, right, n_micro);
}

double truth_square(uint64_t step, uint32_t owner, uint32_t unit)
{
	return (double)(leaf(step, unit, 0, owner) >> 11) * 0x1p-40;
}

struct hash128 truth_hash(uint64_t step, uint32_t owner)
{
	return (struct hash128){ .lo = leaf(step, 97, 0, owner), .hi = leaf(step, 97, 1, owner) };
}
