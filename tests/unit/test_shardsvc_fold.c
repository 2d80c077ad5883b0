/* SPDX-License-Identifier: Apache-2.0 */
/* Folds over our runs against a naive model of whole flat units. */
#include "tests/unit/test_shardsvc.h"

struct world {
	struct unit_table t;
	struct page_map p;
	struct test_engine e;
};

static int open_world(void **state)
{
	struct world *w = calloc(1, sizeof(*w));

	assert_non_null(w);
	test_table(&w->t);
	test_map(&w->p, &w->t, 3);
	test_engine_open(&w->e, k_deferred_ops(), 2);
	*state = w;
	return 0;
}

static int close_world(void **state)
{
	struct world *w = *state;

	test_engine_close(&w->e);
	page_map_release(&w->p);
	unit_table_release(&w->t);
	free(w);
	return 0;
}

/* dst = a (flat) + b (compact), then dst = dst + c (flat): each element as if the unit lay in one piece. */
static void check_folds(struct world *w, const struct piece *p)
{
	const struct unit_info *u = &w->t.unit[p->unit];
	float *a = test_values(u->n, 1), *c = test_values(u->n, 2), *b = test_values(p->n, 3);
	float *dst = test_values(p->n, 4);
	struct fold_job j = { .dst = dst, .a = { a, true }, .b = { b, false } };

	engine_fold(&w->e.engine, p, &j, NULL);
	j = (struct fold_job){ .dst = dst, .a = { dst, false }, .b = { c, true } };
	engine_fold(&w->e.engine, p, &j, NULL);
	for (uint32_t k = 0; k < p->n_seg; k++) {
		const struct share_seg *g = &p->seg[k];

		for (uint64_t i = 0; i < g->n; i++) {
			uint64_t flat = g->unit_offset + i, compact = g->share_offset + i;

			assert_true(dst[compact] == (a[flat] + b[compact]) + c[flat]);
		}
	}
	free(a);
	free(b);
	free(c);
	free(dst);
}

static void folds_are_over_our_runs(void **state)
{
	struct world *w = *state;

	for (uint64_t seed = 1; seed < 5; seed++) {
		test_scatter(&w->p, &w->t, seed);
		for (uint32_t m = 0; m < w->p.n_members; m++) {
			struct test_store s;

			test_store_open(&s, &w->t, &w->p, w->p.member[m]);
			for (uint32_t i = 0; i < s.store.n_pieces; i++)
				check_folds(w, &s.store.piece[i]);
			test_store_close(&s);
		}
	}
}

static void a_copy_has_no_second_operand(void **state)
{
	struct world *w = *state;
	struct k_fold_seg seg[FOLD_SEGS_MAX];
	struct test_store s;
	float x[4];
	const struct fold_job j = { .dst = x, .a = { x, false } };

	test_store_open(&s, &w->t, &w->p, w->p.member[0]);
	assert_true(fold_segments(&s.store.piece[0], &j, seg) > 0);
	assert_null(seg[0].b);
	test_store_close(&s);
}

/*
 * What Adam reads of unit 0: part 0's root, plus part 1's where the tied table
 * has pages. lone: bit p set: the root of part p is a contribution in place.
 */
static void check_finish(struct world *w, struct store *s, unsigned lone, struct exact_sum *total)
{
	const struct piece *whole = store_piece(s, 0, 0), *tied = store_piece(s, 0, 1);
	float *a = test_values(w->t.unit[0].n, 1), *b = test_values(w->t.unit[0].n, 2);
	const struct finish_job finish = { .root = { { lone & 1 ? a : NULL, true }, { lone & 2 ? b : NULL, true } } };
	struct fold_job j = { .a = { a, true } };
	struct exact_sum sum;

	if (whole && !(lone & 1)) {
		j.dst = whole->accumulator;
		engine_fold(&w->e.engine, whole, &j, NULL);
	}
	if (tied && !(lone & 2)) {
		j = (struct fold_job){ .dst = tied->accumulator, .a = { b, true } };
		engine_fold(&w->e.engine, tied, &j, NULL);
	}
	if (whole) {
		memset(&sum, 0xee, sizeof(sum));
		engine_finish(&w->e.engine, s, 0, &finish, &sum);
		exact_sum_merge(total, &sum);
		for (uint32_t k = 0; k < whole->n_seg; k++)
			for (uint64_t i = 0; i < whole->seg[k].n; i++) {
				uint64_t at = whole->seg[k].unit_offset + i;
				float want = at < w->t.unit[0].part[1].end ? a[at] + b[at] : a[at];

				assert_true(whole->accumulator[whole->seg[k].share_offset + i] == want);
			}
	}
	free(a);
	free(b);
}

static void the_last_pass_joins_parts_and_squares_them_exactly(void **state)
{
	struct world *w = *state;
	struct exact_sum first, sum;

	for (uint64_t seed = 0; seed < 8; seed++) {
		exact_sum_clear(&sum);
		if (seed)
			test_scatter(&w->p, &w->t, seed);
		for (uint32_t m = 0; m < w->p.n_members; m++) {
			struct test_store s;

			test_store_open(&s, &w->t, &w->p, w->p.member[m]);
			check_finish(w, &s.store, (unsigned)seed % 4, &sum);
			test_store_close(&s);
		}
		if (!seed)
			first = sum;
		assert_memory_equal(&sum, &first, sizeof(sum));
	}
	assert_true(exact_sum_value(&first) > 0);
}

/* A unit with one part: the pass that makes the root squares it, and a pass of its own would say the same. */
static void a_fused_square_sum_is_that_of_the_result(void **state)
{
	struct world *w = *state;
	struct test_store s;
	struct exact_sum fused, alone;
	const struct piece *p;
	struct fold_job j;
	float *a;

	test_store_open(&s, &w->t, &w->p, w->p.member[1]);
	p = store_piece(&s.store, 1, 0);
	assert_non_null(p);
	a = test_values(w->t.unit[1].n, 9);
	j = (struct fold_job){ .dst = p->accumulator, .a = { a, true }, .b = { a, true }, .last = true };
	engine_fold(&w->e.engine, p, &j, &fused);
	engine_finish(&w->e.engine, &s.store, 1, &(struct finish_job){ 0 }, &alone);
	assert_memory_equal(&fused, &alone, sizeof(fused));
	free(a);
	test_store_close(&s);
}

/* A sum in the spill file is a sum like any other. */
static void a_spilled_operand_has_the_same_bits(void **state)
{
	struct world *w = *state;
	const struct sum_config c = {
		.max = 4, .spill_elements = 1u << 20, .limit_elements = 2u << 20, .spill_dir = "/tmp"
	};
	struct sum_pool pool;
	struct test_store s;
	const struct piece *p;
	struct fold_job j;
	float *a, *b, *spilled;

	test_store_open(&s, &w->t, &w->p, w->p.member[0]);
	p = store_piece(&s.store, 2, 0);
	assert_non_null(p);
	assert_int_equal(sums_init(&pool, &c, NULL), 0);
	spilled = sums_at(&pool, sums_take(&pool, p->n, true));
	a = test_values(w->t.unit[2].n, 5);
	b = test_values(w->t.unit[2].n, 6);
	j = (struct fold_job){ .dst = spilled, .a = { a, true } };
	engine_fold(&w->e.engine, p, &j, NULL);
	j = (struct fold_job){ .dst = p->accumulator, .a = { spilled, false }, .b = { b, true } };
	engine_fold(&w->e.engine, p, &j, NULL);
	for (uint32_t k = 0; k < p->n_seg; k++)
		for (uint64_t i = 0; i < p->seg[k].n; i++) {
			uint64_t at = p->seg[k].unit_offset + i;

			assert_true(p->accumulator[p->seg[k].share_offset + i] == a[at] + b[at]);
		}
	assert_int_equal(pool.spilled_bytes, p->n * sizeof(float));
	free(a);
	free(b);
	sums_release(&pool);
	test_store_close(&s);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(folds_are_over_our_runs, open_world, close_world),
		cmocka_unit_test_setup_teardown(a_copy_has_no_second_operand, open_world, close_world),
		cmocka_unit_test_setup_teardown(the_last_pass_joins_parts_and_squares_them_exactly, open_world,
						close_world),
		cmocka_unit_test_setup_teardown(a_fused_square_sum_is_that_of_the_result, open_world, close_world),
		cmocka_unit_test_setup_teardown(a_spilled_operand_has_the_same_bits, open_world, close_world),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
