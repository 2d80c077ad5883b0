/* SPDX-License-Identifier: Apache-2.0 */
/* Coverage: all its rules under random offers, and its indices against what is found the long way. */
#include "coverage_bench.h"

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
		cmocka_unit_test(test_random),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
