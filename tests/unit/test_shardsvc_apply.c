/* SPDX-License-Identifier: Apache-2.0 */
/* First parameters, Adam and the hash: the same bits however the pages are dealt out. */
#include "tests/unit/test_shardsvc.h"

#include <errno.h>

#define SEED 1234u
#define STEPS 3u

/* The whole model in one store: what every partition is compared with. */
struct world {
	struct unit_table t;
	struct page_map all;
	struct test_store whole;
	struct test_engine e;
	struct hash128 hash[STEPS + 1];
};

static struct apply_job job_of(uint64_t step)
{
	return (struct apply_job){ .step = step,
				   .hash_wanted = true,
				   .adam = { .grad_scale = 1.0 / 12,
					     .lr = 1e-2 / (double)step,
					     .beta1 = 0.9,
					     .beta2 = 0.95,
					     .eps = 1e-8,
					     .weight_decay = 0.1,
					     .bias1 = 1 - det_pow_u64(0.9, step),
					     .bias2 = 1 - det_pow_u64(0.95, step),
					     .decoupled = true } };
}

/* The gradient of a step, element by element of the unit, into our accumulators. Padding has none. */
static void set_gradient(struct store *s, uint64_t step)
{
	for (uint32_t u = 0; u < s->table->n_units; u++) {
		const struct piece *p = store_piece(s, u, 0);

		for (uint32_t k = 0; p && k < p->n_seg; k++) {
			const struct share_seg *g = &p->seg[k];
			uint64_t used = s->table->unit[u].n_used, n;

			n = g->unit_offset >= used ? 0 : used - g->unit_offset;
			rng_fill_normal(p->accumulator + g->share_offset, n < g->n ? n : g->n, step, u, g->unit_offset,
					0.0f, 1.0f);
		}
	}
}

static void train(struct engine *e, struct store *s, struct hash128 hash[STEPS + 1])
{
	for (uint32_t u = 0; u < s->table->n_units; u++)
		store_fill_unit(s, u, SEED);
	store_publish_initial(s, 0);
	for (uint64_t step = 1; step <= STEPS; step++) {
		const struct apply_job j = job_of(step);

		set_gradient(s, step);
		assert_int_equal(engine_apply(e, s, &j, &hash[step]), 0);
	}
}

static int open_world(void **state)
{
	struct world *w = calloc(1, sizeof(*w));

	assert_non_null(w);
	test_table(&w->t);
	test_map(&w->all, &w->t, 1);
	test_store_open(&w->whole, &w->t, &w->all, w->all.member[0]);
	test_engine_open(&w->e, k_cpu_ops(), 1);
	train(&w->e.engine, &w->whole.store, w->hash);
	*state = w;
	return 0;
}

static int close_world(void **state)
{
	struct world *w = *state;

	test_engine_close(&w->e);
	test_store_close(&w->whole);
	page_map_release(&w->all);
	unit_table_release(&w->t);
	free(w);
	return 0;
}

static void check_same(const struct world *w, const struct store *s)
{
	const struct store *all = &w->whole.store;

	for (uint32_t u = 0; u < w->t.n_units; u++)
		for (uint32_t k = 0; k < s->unit[u].share.n_seg; k++) {
			const struct share_seg *g = &s->unit[u].share.seg[k];
			uint64_t mine = s->unit[u].at + g->share_offset, theirs = all->unit[u].at + g->unit_offset;

			assert_memory_equal(s->p + mine, all->p + theirs, g->n * sizeof(float));
			assert_memory_equal(s->m + mine, all->m + theirs, g->n * sizeof(float));
			assert_memory_equal(s->v + mine, all->v + theirs, g->n * sizeof(float));
		}
}

static void bits_and_hash_do_not_depend_on_the_partition(void **state)
{
	static const uint32_t members[] = { 2, 3, 5 };
	struct world *w = *state;
	struct test_engine e = { 0 };

	test_engine_open(&e, k_deferred_ops(), 2);
	for (uint32_t i = 0; i < 2 * ARRAY_LEN(members); i++) {
		struct hash128 sum[STEPS + 1] = { 0 };
		struct page_map p;

		test_map(&p, &w->t, members[i / 2]);
		if (i % 2)
			test_scatter(&p, &w->t, i);
		for (uint32_t m = 0; m < p.n_members; m++) {
			struct hash128 hash[STEPS + 1];
			struct test_store s;

			test_store_open(&s, &w->t, &p, p.member[m]);
			train(&e.engine, &s.store, hash);
			check_same(w, &s.store);
			for (uint32_t step = 1; step <= STEPS; step++)
				sum[step] = hash128_add(sum[step], hash[step]);
			test_store_close(&s);
		}
		assert_memory_equal(&sum[1], &w->hash[1], STEPS * sizeof(sum[0]));
		page_map_release(&p);
	}
	assert_true(w->hash[1].lo != w->hash[2].lo);
	test_engine_close(&e);
}

/* Against kernels on whole vectors, without any of the store's bookkeeping. */
static void check_unit(struct world *w, uint32_t u, const float *first)
{
	const struct k_ops *ops = w->e.engine.ops;
	const struct store *all = &w->whole.store;
	uint64_t n = w->t.unit[u].n, at = all->unit[u].at;
	float *x = calloc(4 * n, sizeof(float));
	struct k_event done;

	assert_non_null(x);
	memcpy(x, first + at, n * sizeof(float));
	for (uint64_t step = 1; step <= STEPS; step++) {
		struct k_adam a = job_of(step).adam;

		a.p = x;
		a.m = x + n;
		a.v = x + 2 * n;
		a.grad = x + 3 * n;
		a.n = n;
		rng_fill_normal(x + 3 * n, w->t.unit[u].n_used, step, u, 0, 0.0f, 1.0f);
		ops->adam(w->e.engine.stream, &a);
		ops->event_record(w->e.engine.stream, &done);
		ops->event_wait(w->e.engine.stream, &done);
	}
	assert_memory_equal(all->p + at, x, n * sizeof(float));
	assert_memory_equal(all->m + at, x + n, n * sizeof(float));
	assert_memory_equal(all->v + at, x + 2 * n, n * sizeof(float));
	free(x);
}

static void apply_is_adam_of_the_whole_vector(void **state)
{
	struct world *w = *state;
	struct test_store first;

	test_store_open(&first, &w->t, &w->all, w->all.member[0]);
	for (uint32_t u = 0; u < w->t.n_units; u++)
		store_fill_unit(&first.store, u, SEED);
	for (uint32_t u = 0; u < w->t.n_units; u++)
		check_unit(w, u, first.store.p);
	test_store_close(&first);
}

static void versions_are_published(void **state)
{
	struct world *w = *state;
	struct store *s = &w->whole.store;
	uint64_t word = atomic_load(&s->progress->word);
	uint32_t signal = atomic_load(&s->progress->signal);
	struct apply_job j = job_of(STEPS + 1);
	struct hash128 hash;
	float before = s->p[0];

	assert_int_equal(word, fab_progress_word(0, STEPS, (uint16_t)w->t.n_units));
	/* One word a unit, since all have pages here. */
	j.hash_wanted = false;
	set_gradient(s, STEPS + 1);
	assert_int_equal(engine_apply(&w->e.engine, s, &j, &hash), 0);
	assert_int_equal(atomic_load(&s->progress->signal), signal + w->t.n_units);
	assert_true(hash.lo == 0 && hash.hi == 0);
	assert_true(s->p[0] != before);
	/* A step that is skipped is a version too, and changes nothing. */
	before = s->p[0];
	j.step++;
	j.skip = true;
	assert_int_equal(engine_apply(&w->e.engine, s, &j, &hash), 0);
	assert_true(s->p[0] == before);
	assert_int_equal(atomic_load(&s->progress->word), fab_progress_word(0, STEPS + 2, (uint16_t)w->t.n_units));
}

/* A process that ends does not finish a long pass, and nobody is told of a version that is not there. */
static void an_apply_can_be_left(void **state)
{
	const _Atomic bool stop = true;
	struct world *w = *state;
	struct store *s = &w->whole.store;
	uint64_t word = atomic_load(&s->progress->word);
	const struct apply_job j = job_of(STEPS + 1);
	struct hash128 hash;

	w->e.engine.stop = &stop;
	assert_int_equal(engine_apply(&w->e.engine, s, &j, &hash), -ECANCELED);
	assert_int_equal(atomic_load(&s->progress->word), word);
}

/* ----------------------------------------------------------- first parameters */

static void check_tensor(const struct store *s, const struct tensor_info *x)
{
	const float *v = s->p + s->unit[x->unit].at + x->offset;
	double sum = 0, square = 0;

	for (uint64_t i = 0; i < x->n; i++) {
		if (x->init == INIT_NORMAL)
			assert_true(v[i] == x->init_std * rng_normal(SEED, x->rng_stream, i));
		else
			assert_true(v[i] == (x->init == INIT_ONE ? 1.0f : 0.0f));
		sum += v[i];
		square += (double)v[i] * v[i];
	}
	if (x->init != INIT_NORMAL)
		return;
	assert_true(sum / (double)x->n < 0.01 * x->init_std + 1e-3);
	assert_true(square / (double)x->n > 0.9 * x->init_std * x->init_std);
}

static void first_parameters_are_the_models(void **state)
{
	struct unit_table t;
	struct page_map p;
	struct test_store s;
	uint64_t real = 0, zeros = 0, want = 0;
	(void)state;

	test_table(&t);
	test_map(&p, &t, 1);
	test_store_open(&s, &t, &p, p.member[0]);
	for (uint32_t u = 0; u < t.n_units; u++)
		store_fill_unit(&s.store, u, SEED);
	for (uint32_t i = 0; i < t.n_tensors; i++) {
		check_tensor(&s.store, &t.tensor[i]);
		real += t.tensor[i].n;
		want += t.tensor[i].init == INIT_ZERO ? t.tensor[i].n : 0;
	}
	/* Zeros are the biases and the padding, nothing else. */
	for (uint64_t i = 0; i < s.store.n; i++)
		zeros += s.store.p[i] == 0.0f;
	assert_int_equal(zeros, want + t.n_elements - real);
	test_store_close(&s);
	page_map_release(&p);
	unit_table_release(&t);
}

static void first_parameters_do_not_depend_on_the_partition(void **state)
{
	static const uint32_t members[] = { 1, 2, 3, 5 };
	struct unit_table t;
	struct page_map p;
	float *first = NULL;
	(void)state;

	test_table(&t);
	for (uint32_t i = 0; i < ARRAY_LEN(members); i++) {
		float *all = calloc(t.n_elements, sizeof(float));

		assert_non_null(all);
		test_map(&p, &t, members[i]);
		for (uint32_t m = 0; m < members[i]; m++) {
			struct test_store s;
			uint64_t base = 0;

			test_store_open(&s, &t, &p, p.member[m]);
			for (uint32_t u = 0; u < t.n_units; base += t.unit[u++].n) {
				const struct store_unit *su = &s.store.unit[u];

				store_fill_unit(&s.store, u, SEED);
				for (uint32_t k = 0; k < su->share.n_seg; k++)
					memcpy(all + base + su->share.seg[k].unit_offset,
					       s.store.p + su->at + su->share.seg[k].share_offset,
					       su->share.seg[k].n * sizeof(float));
			}
			test_store_close(&s);
		}
		page_map_release(&p);
		if (first)
			assert_memory_equal(all, first, t.n_elements * sizeof(float));
		if (first)
			free(all);
		else
			first = all;
	}
	free(first);
	unit_table_release(&t);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(bits_and_hash_do_not_depend_on_the_partition, open_world, close_world),
		cmocka_unit_test_setup_teardown(apply_is_adam_of_the_whole_vector, open_world, close_world),
		cmocka_unit_test_setup_teardown(versions_are_published, open_world, close_world),
		cmocka_unit_test_setup_teardown(an_apply_can_be_left, open_world, close_world),
		cmocka_unit_test(first_parameters_are_the_models),
		cmocka_unit_test(first_parameters_do_not_depend_on_the_partition),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
