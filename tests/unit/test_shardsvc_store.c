/* SPDX-License-Identifier: Apache-2.0 */
/* Where pages lie: shares, pieces, spans; and the partial sums beside them. */
#include "tests/unit/test_shardsvc.h"

#include <errno.h>
#include <unistd.h>

/* -------------------------------------------------------------------- store */

static void every_element_is_in_one_share(void **state)
{
	struct unit_table t;
	struct page_map p;
	(void)state;

	test_table(&t);
	for (uint64_t seed = 0; seed < 6; seed++) {
		uint64_t n = 0, sum = 0;

		test_map(&p, &t, 1 + (uint32_t)seed);
		if (seed)
			test_scatter(&p, &t, seed);
		for (uint32_t i = 0; i < p.n_members; i++) {
			struct store s;

			assert_int_equal(store_init(&s, &t, &p, p.member[i]), 0);
			n += s.n;
			sum += store_accumulator_elements(&s);
			store_release(&s);
		}
		assert_int_equal(n, t.n_elements);
		/* The tied table has two accumulators. */
		assert_int_equal(sum, t.n_elements + t.unit[0].part[1].end);
		page_map_release(&p);
	}
	unit_table_release(&t);
}

/* A piece's segments are its part's pages and nothing else, compact and in order. */
static void check_piece(const struct store *s, const struct piece *p)
{
	const struct unit_part *part = &s->table->unit[p->unit].part[p->part];
	uint64_t end = round_up_u64(part->end, s->table->page), at = 0;

	for (uint32_t i = 0; i < p->n_seg; i++) {
		const struct share_seg *g = &p->seg[i];

		assert_int_equal(g->share_offset, at);
		assert_true(g->unit_offset >= part->begin / s->table->page * s->table->page);
		assert_true(g->unit_offset + g->n <= end);
		assert_int_equal(g->n % s->table->page, 0);
		assert_true(i == 0 || g[-1].unit_offset + g[-1].n < g->unit_offset + 1);
		at += g->n;
	}
	assert_int_equal(at, p->n);
	assert_ptr_equal(store_piece(s, p->unit, p->part), p);
	assert_non_null(p->accumulator);
}

static void pieces_are_the_pages_of_their_part(void **state)
{
	struct unit_table t;
	struct page_map p;
	(void)state;

	test_table(&t);
	/* A part that ends inside a page takes the whole of it. */
	t.unit[1].n_parts = 2;
	t.unit[1].part[1] = (struct unit_part){ .begin = 3 * t.page + 5, .end = 7 * t.page + 1 };
	test_map(&p, &t, 3);
	for (uint64_t seed = 1; seed < 20; seed++) {
		struct test_store s;
		uint64_t n = 0;

		test_scatter(&p, &t, seed);
		for (uint32_t i = 0; i < p.n_members; i++) {
			test_store_open(&s, &t, &p, p.member[i]);
			for (uint32_t k = 0; k < s.store.n_pieces; k++)
				check_piece(&s.store, &s.store.piece[k]);
			if (store_piece(&s.store, 1, 1))
				n += store_piece(&s.store, 1, 1)->n;
			test_store_close(&s);
		}
		assert_int_equal(n, 5 * t.page);
	}
	page_map_release(&p);
	unit_table_release(&t);
}

static void nothing_outside_our_pages_is_given_out(void **state)
{
	struct unit_table t;
	struct page_map p;
	struct test_store s;
	const struct share *share;
	(void)state;

	test_table(&t);
	test_map(&p, &t, 2);
	for (uint32_t r = 0; r < t.unit[1].n_runs; r++)
		p.owner[RUNS_PER_UNIT_MAX + r] = p.member[r == 2 || r == 3 || r == 9 ? 0 : 1];
	test_store_open(&s, &t, &p, p.member[0]);
	share = &s.store.unit[1].share;
	assert_int_equal(share->n_seg, 2);
	assert_ptr_equal(store_span(&s.store, 1, share->seg[0].unit_offset, 2 * t.page),
			 s.store.p + s.store.unit[1].at);
	assert_ptr_equal(store_span(&s.store, 1, share->seg[1].unit_offset + 7, 9),
			 s.store.p + s.store.unit[1].at + 2 * t.page + 7);
	assert_null(store_span(&s.store, 1, share->seg[0].unit_offset - 1, 2));
	assert_null(store_span(&s.store, 1, share->seg[0].unit_offset, 2 * t.page + 1));
	assert_null(store_span(&s.store, 1, share->seg[1].unit_offset + 1, UINT64_MAX));
	assert_null(store_span(&s.store, 1, UINT64_MAX, 1));
	assert_null(store_span(&s.store, t.n_units, 0, 1));
	assert_null(store_piece(&s.store, t.n_units, 0));
	assert_null(store_piece(&s.store, 1, 1));
	test_store_close(&s);
	page_map_release(&p);
	unit_table_release(&t);
}

static void an_owner_of_nothing_has_a_store(void **state)
{
	struct unit_table t;
	struct page_map p;
	struct test_store s;
	(void)state;

	test_table(&t);
	test_map(&p, &t, 2);
	for (uint32_t u = 0; u < t.n_units; u++)
		for (uint32_t r = 0; r < t.unit[u].n_runs; r++)
			p.owner[u * RUNS_PER_UNIT_MAX + r] = p.member[1];
	test_store_open(&s, &t, &p, p.member[0]);
	assert_int_equal(s.store.n, 0);
	assert_int_equal(s.store.n_pieces, 0);
	assert_null(store_span(&s.store, 0, 0, 1));
	test_store_close(&s);
	page_map_release(&p);
	unit_table_release(&t);
}

/* --------------------------------------------------------------------- sums */

static const char *spill_dir(void)
{
	const char *dir = getenv("TMPDIR");

	return dir ? dir : "/tmp";
}

static void open_sums(struct sum_pool *p, uint32_t max, uint64_t memory, uint64_t spill, uint64_t limit)
{
	const struct sum_config c = { .max = max,
				      .memory_elements = memory,
				      .spill_elements = spill,
				      .limit_elements = limit,
				      .spill_dir = spill_dir() };

	assert_int_equal(sums_init(p, &c, NULL), 0);
}

static void memory_first_then_file_then_unplanned(void **state)
{
	struct sum_pool p;
	uint32_t a, b, c, d;
	(void)state;

	open_sums(&p, 8, 100, 60, 200);
	a = sums_take(&p, 60, false);
	b = sums_take(&p, 60, false);
	assert_int_not_equal(a, 0);
	assert_int_equal(b, 0);
	b = sums_take(&p, 60, true);
	c = sums_take(&p, 40, false);
	d = sums_take(&p, 60, true);
	assert_true(b && c && d);
	assert_int_equal(p.spilled_bytes, 60 * sizeof(float));
	assert_int_equal(p.beyond_bytes, 60 * sizeof(float));
	for (uint32_t i = 0; i < 60; i++) {
		sums_at(&p, a)[i] = 1.0f;
		sums_at(&p, b)[i] = 2.0f;
		sums_at(&p, d)[i] = 4.0f;
	}
	for (uint32_t i = 0; i < 40; i++)
		sums_at(&p, c)[i] = 3.0f;
	assert_true(sums_at(&p, a)[59] == 1.0f && sums_at(&p, b)[59] == 2.0f && sums_at(&p, d)[0] == 4.0f);
	assert_int_equal(sums_take(&p, 100, true), 0);
	sums_give(&p, a);
	/* A decision that gave it back may still have to be carried out. */
	assert_true(sums_at(&p, a)[0] == 1.0f);
	assert_int_not_equal(sums_take(&p, 60, false), 0);
	sums_release(&p);
}

/* With extents of the sums' own sizes no order of taking and giving leaves a gap that keeps one out. */
static void fitted_sums_always_find_their_place(void **state)
{
	static const uint64_t size[] = { 30, 10, 30, 10, 10, 30, 10 };
	uint64_t all = 0;
	uint32_t id[ARRAY_LEN(size)] = { 0 };
	struct sum_pool p;
	(void)state;

	for (size_t i = 0; i < ARRAY_LEN(size); i++)
		all += size[i];
	const struct sum_config c = { .max = 8,
				      .memory_elements = all,
				      .limit_elements = 100,
				      .spill_dir = spill_dir(),
				      .fitted = size,
				      .n_fitted = ARRAY_LEN(size) };
	assert_int_equal(sums_init(&p, &c, NULL), 0);
	for (uint64_t round = 0; round < 500; round++) {
		size_t i = rng_u64(1, 0, round) % ARRAY_LEN(size);

		if (id[i]) {
			sums_give(&p, id[i]);
			id[i] = 0;
			continue;
		}
		id[i] = sums_take(&p, size[i], false);
		assert_int_not_equal(id[i], 0);
		for (size_t k = 0; k < ARRAY_LEN(size); k++)
			assert_true(k == i || !id[k] || sums_at(&p, id[k]) + size[k] <= sums_at(&p, id[i]) ||
				    sums_at(&p, id[i]) + size[i] <= sums_at(&p, id[k]));
	}
	assert_int_equal(p.spilled_bytes + p.beyond_bytes, 0);
	sums_release(&p);
}

static void the_number_of_sums_is_limited(void **state)
{
	struct sum_pool p;
	uint32_t a, b;
	(void)state;

	open_sums(&p, 2, 100, 0, 100);
	a = sums_take(&p, 1, true);
	b = sums_take(&p, 1, true);
	assert_true(a && b && a != b);
	assert_int_equal(sums_take(&p, 1, true), 0);
	sums_give(&p, a);
	assert_int_equal(sums_take(&p, 1, true), a);
	sums_release(&p);
}

/* Sums at random, each filled with its own value: none is ever written by another, and in the end all is one again. */
static void random_sums_never_overlap(void **state)
{
	enum { MAX = 64 };
	uint32_t id[MAX] = { 0 };
	uint64_t n[MAX] = { 0 };
	struct sum_pool p;
	(void)state;

	open_sums(&p, MAX, 4000, 2000, 9000);
	for (uint32_t i = 0; i < 20000; i++) {
		uint32_t k = (uint32_t)(rng_u64(5, 1, i) % MAX);

		if (id[k]) {
			const float *x = sums_at(&p, id[k]);

			assert_true(x[0] == (float)k && x[n[k] - 1] == (float)k && x[n[k] / 2] == (float)k);
			sums_give(&p, id[k]);
			id[k] = 0;
			continue;
		}
		n[k] = 1 + rng_u64(5, 2, i) % 300;
		id[k] = sums_take(&p, n[k], rng_u64(5, 3, i) % 4 == 0);
		for (uint64_t e = 0; id[k] && e < n[k]; e++)
			sums_at(&p, id[k])[e] = (float)k;
	}
	assert_true(p.spilled_bytes > 0);
	for (uint32_t k = 0; k < MAX; k++)
		if (id[k])
			sums_give(&p, id[k]);
	assert_int_equal(p.n_used, 0);
	assert_int_equal(p.memory.n_free, 1);
	assert_int_equal(p.memory.free[0].n, 4000);
	assert_int_equal(p.spill.n_free, 1);
	assert_int_equal(p.spill.free[0].n, 9000);
	sums_release(&p);
}

static void a_spill_file_that_cannot_be_is_named(void **state)
{
	const struct sum_config c = {
		.max = 1, .spill_elements = 1, .limit_elements = 1, .spill_dir = "/nonexistent/run"
	};
	struct sum_pool p;
	struct err e = { 0 };
	(void)state;

	assert_int_equal(sums_init(&p, &c, &e), -ENOENT);
	assert_non_null(strstr(e.text, "/nonexistent/run"));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(every_element_is_in_one_share),
		cmocka_unit_test(pieces_are_the_pages_of_their_part),
		cmocka_unit_test(nothing_outside_our_pages_is_given_out),
		cmocka_unit_test(an_owner_of_nothing_has_a_store),
		cmocka_unit_test(memory_first_then_file_then_unplanned),
		cmocka_unit_test(fitted_sums_always_find_their_place),
		cmocka_unit_test(the_number_of_sums_is_limited),
		cmocka_unit_test(random_sums_never_overlap),
		cmocka_unit_test(a_spill_file_that_cannot_be_is_named),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
