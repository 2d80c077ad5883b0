/* SPDX-License-Identifier: Apache-2.0 */
#include "model/model.h"

#include <errno.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define MEMBERS_MAX 41

static int gpt2_setup(void **state)
{
	static struct unit_table t;
	struct model_config m = {
		.vocab_size = 50257,
		.n_positions = 1024,
		.n_embd = 768,
		.n_layer = 12,
		.n_head = 12,
		.n_inner = 3072,
		.tie_word_embeddings = true,
	};

	*state = &t;
	return unit_table_init(&t, &m, NULL);
}

static int gpt2_teardown(void **state)
{
	unit_table_release(*state);
	return 0;
}

static uint32_t index_of(const struct page_map *p, uint32_t member)
{
	for (uint32_t i = 0; i < p->n_members; i++)
		if (p->member[i] == member)
			return i;
	fail_msg("run owned by %u, no member", member);
	return 0;
}

/* What every map must hold: units even within one run, the right number of owners; returns max total / mean. */
static double check_map(const struct page_map *p, const struct unit_table *t)
{
	uint64_t total[MEMBERS_MAX] = { 0 }, most = 0;

	for (uint32_t u = 0; u < t->n_units; u++) {
		uint32_t n_runs = t->unit[u].n_runs, runs[MEMBERS_MAX] = { 0 }, owners = 0;
		uint32_t k = p->max_owners < p->n_members ? p->max_owners : p->n_members;

		for (uint32_t r = 0; r < n_runs; r++) {
			uint32_t i = index_of(p, page_map_owner(p, u, r));

			runs[i]++;
			total[i] += unit_run_begin(t, u, r + 1) - unit_run_begin(t, u, r);
		}
		k = k < n_runs ? k : n_runs;
		for (uint32_t i = 0; i < p->n_members; i++) {
			owners += runs[i] > 0;
			if (runs[i])
				assert_true(runs[i] == n_runs / k || runs[i] == (n_runs + k - 1) / k);
		}
		assert_int_equal(owners, k);
	}
	for (uint32_t i = 0; i < p->n_members; i++)
		most = total[i] > most ? total[i] : most;
	return (double)most * p->n_members / (double)t->n_elements;
}

static void members_fill(uint32_t *m, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		m[i] = 3 + 2 * i;
}

static void map_make(struct page_map *p, const struct unit_table *t, uint32_t n, uint32_t max_owners)
{
	uint32_t m[MEMBERS_MAX];

	members_fill(m, n);
	assert_int_equal(page_map_init(p, t, m, n, max_owners), 0);
}

static double moved(const uint32_t *before, const struct page_map *p, const struct unit_table *t)
{
	uint64_t n = 0;

	for (uint32_t u = 0; u < t->n_units; u++)
		for (uint32_t r = 0; r < t->unit[u].n_runs; r++)
			if (before[u * RUNS_PER_UNIT_MAX + r] != page_map_owner(p, u, r))
				n += unit_run_begin(t, u, r + 1) - unit_run_begin(t, u, r);
	return (double)n / (double)t->n_elements;
}

static uint32_t *owners_copy(const struct page_map *p)
{
	size_t bytes = (size_t)p->n_units * RUNS_PER_UNIT_MAX * sizeof(*p->owner);
	uint32_t *c = malloc(bytes);

	assert_non_null(c);
	memcpy(c, p->owner, bytes);
	return c;
}

static void test_even(void **state)
{
	const struct unit_table *t = *state;

	for (uint32_t n = 1; n <= 40; n++) {
		for (uint32_t f = 1; f <= 64; f *= 4) {
			struct page_map p;
			double worst;

			map_make(&p, t, n, f);
			worst = check_map(&p, t);
			if (f >= 16 && n <= 16)
				assert_true(worst <= 1.1);
			if (f >= 16)
				assert_true(worst <= 1.25);
			page_map_release(&p);
		}
	}
}

static void test_deterministic(void **state)
{
	const struct unit_table *t = *state;
	struct page_map a, b;

	map_make(&a, t, 7, 16);
	map_make(&b, t, 7, 16);
	assert_memory_equal(a.owner, b.owner, (size_t)t->n_units * RUNS_PER_UNIT_MAX * sizeof(*a.owner));
	page_map_release(&a);
	page_map_release(&b);
}

/* A fresh map gives each owner of a unit consecutive runs: one segment, one mapping, one read. */
static void test_one_segment(void **state)
{
	const struct unit_table *t = *state;
	struct page_map p;
	struct share s;

	map_make(&p, t, 11, 16);
	for (uint32_t u = 0; u < t->n_units; u++) {
		for (uint32_t i = 0; i < p.n_members; i++) {
			page_map_share(&p, t, p.member[i], u, &s);
			assert_true(s.n_seg <= 1);
		}
	}
	page_map_release(&p);
}

static void test_shares(void **state)
{
	const struct unit_table *t = *state;
	struct page_map p;
	struct share s;

	map_make(&p, t, 5, 16);
	assert_int_equal(page_map_remove(&p, t, 7), 0);
	assert_int_equal(page_map_add(&p, t, 100), 0);
	for (uint32_t u = 0; u < t->n_units; u++) {
		uint64_t n = 0;

		for (uint32_t i = 0; i < p.n_members; i++) {
			uint32_t m = p.member[i];
			uint64_t at = 0;

			page_map_share(&p, t, m, u, &s);
			for (uint32_t k = 0; k < s.n_seg; k++) {
				assert_int_equal(s.seg[k].share_offset, at);
				assert_true(!k || s.seg[k].unit_offset > s.seg[k - 1].unit_offset + s.seg[k - 1].n);
				at += s.seg[k].n;
			}
			assert_int_equal(at, s.n);
			assert_int_equal(page_map_share_bytes(&p, t, m, u + 1) - page_map_share_bytes(&p, t, m, u),
					 s.n * 4);
			n += s.n;
		}
		assert_int_equal(n, t->unit[u].n);
	}
	assert_int_equal(page_map_share_bytes(&p, t, 3, 0), PARAM_HEADER);
	page_map_release(&p);
}

/* One member more moves about 1/N, and only to the new one; one less moves its share, and only from it. */
static void test_moves_little(void **state)
{
	const struct unit_table *t = *state;

	for (uint32_t n = 1; n < 40; n++) {
		struct page_map p;
		uint32_t *before;

		map_make(&p, t, n, 16);
		before = owners_copy(&p);
		assert_int_equal(page_map_add(&p, t, 1000), 0);
		check_map(&p, t);
		assert_true(moved(before, &p, t) <= 1.5 / (n + 1));
		assert_true(moved(before, &p, t) >= 0.5 / (n + 1));
		for (uint32_t u = 0; u < t->n_units; u++)
			for (uint32_t r = 0; r < t->unit[u].n_runs; r++)
				assert_true(page_map_owner(&p, u, r) == 1000 ||
					    page_map_owner(&p, u, r) == before[u * RUNS_PER_UNIT_MAX + r]);
		free(before);
		before = owners_copy(&p);
		assert_int_equal(page_map_remove(&p, t, 3), 0);
		check_map(&p, t);
		assert_true(moved(before, &p, t) <= 1.5 / (n + 1));
		for (uint32_t u = 0; u < t->n_units; u++)
			for (uint32_t r = 0; r < t->unit[u].n_runs; r++)
				assert_true(before[u * RUNS_PER_UNIT_MAX + r] == 3 ||
					    page_map_owner(&p, u, r) == before[u * RUNS_PER_UNIT_MAX + r]);
		free(before);
		page_map_release(&p);
	}
}

/* Many changes in a row do not wear the balance out. */
static void test_long_life(void **state)
{
	const struct unit_table *t = *state;
	struct page_map p;
	uint32_t next = 1000;

	map_make(&p, t, 6, 16);
	for (uint64_t i = 0; i < 400; i++) {
		uint64_t roll = rng_u64(1, 2, i);
		bool grow = p.n_members < 3 || (p.n_members < 24 && roll % 2);

		if (grow)
			assert_int_equal(page_map_add(&p, t, next++), 0);
		else
			assert_int_equal(page_map_remove(&p, t, p.member[(roll >> 8) % p.n_members]), 0);
		assert_true(check_map(&p, t) <= 1.35);
	}
	page_map_release(&p);
}

/* Units of one or two runs do not pile up on one member. */
static void test_small_units_apart(void **state)
{
	struct model_config m = { .vocab_size = 256, .n_positions = 64, .n_embd = 32, .n_layer = 6, .n_inner = 128 };
	struct unit_table t;
	struct page_map p;

	(void)state;
	assert_int_equal(unit_table_init(&t, &m, NULL), 0);
	map_make(&p, &t, 8, 16);
	assert_int_equal(t.n_units, 8);
	for (uint32_t u = 0; u < t.n_units; u++)
		assert_int_equal(t.unit[u].n_runs, 1);
	assert_true(check_map(&p, &t) == 1.0);
	page_map_release(&p);
	unit_table_release(&t);
}

static void test_refusals(void **state)
{
	const struct unit_table *t = *state;
	struct page_map p;

	assert_int_equal(page_map_init(&p, t, NULL, 0, 16), -EINVAL);
	assert_int_equal(page_map_init(&p, t, (uint32_t[]){ 2, 1 }, 2, 16), -EINVAL);
	assert_int_equal(page_map_init(&p, t, (uint32_t[]){ 1, 1 }, 2, 16), -EINVAL);
	assert_int_equal(page_map_init(&p, t, (uint32_t[]){ 1 }, 1, 0), -EINVAL);
	map_make(&p, t, 1, 16);
	assert_int_equal(page_map_remove(&p, t, 4), -ENOENT);
	assert_int_equal(page_map_remove(&p, t, 3), -EBUSY);
	assert_int_equal(page_map_add(&p, t, 3), -EEXIST);
	page_map_release(&p);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_even),
		cmocka_unit_test(test_deterministic),
		cmocka_unit_test(test_one_segment),
		cmocka_unit_test(test_shares),
		cmocka_unit_test(test_moves_little),
		cmocka_unit_test(test_long_life),
		cmocka_unit_test(test_small_units_apart),
		cmocka_unit_test(test_refusals),
	};

	return cmocka_run_group_tests(tests, gpt2_setup, gpt2_teardown);
}
