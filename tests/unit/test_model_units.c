/* SPDX-License-Identifier: Apache-2.0 */
#include "model/model.h"

#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static struct model_config gpt2_config(uint32_t layers, uint32_t width, uint32_t vocab, uint32_t positions, bool tied)
{
	return (struct model_config){
		.vocab_size = vocab,
		.n_positions = positions,
		.n_embd = width,
		.n_layer = layers,
		.n_head = 1,
		.n_inner = 4 * width,
		.initializer_range = 0.02f,
		.tie_word_embeddings = tied,
	};
}

static void check_layout(const struct unit_table *t)
{
	uint64_t elements = 0;
	uint32_t tensors = 0;

	for (uint32_t u = 0; u < t->n_units; u++) {
		const struct unit_info *x = &t->unit[u];
		uint64_t end = 0;

		assert_int_equal(x->first_tensor, tensors);
		for (uint32_t i = 0; i < x->n_tensors; i++) {
			const struct tensor_info *s = &t->tensor[x->first_tensor + i];
			uint64_t n = 1;

			for (uint32_t d = 0; d < s->n_dims; d++)
				n *= s->shape[d];
			assert_int_equal(s->n, n);
			assert_int_equal(s->unit, u);
			assert_int_equal(s->offset % 128, 0);
			assert_true(s->offset >= end);
			end = s->offset + s->n;
			assert_ptr_equal(unit_table_find(t, s->name), s);
		}
		assert_int_equal(x->n_used, end);
		assert_int_equal(x->n, round_up_u64(end, t->page));
		assert_int_equal(x->n, x->n_pages * t->page);
		assert_true(x->n_runs >= 1 && x->n_runs <= RUNS_PER_UNIT_MAX && x->n_runs <= x->n_pages);
		assert_int_equal(unit_run_begin(t, u, 0), 0);
		assert_int_equal(unit_run_begin(t, u, x->n_runs), x->n);
		for (uint32_t r = 0; r < x->n_runs; r++) {
			uint64_t n = unit_run_begin(t, u, r + 1) - unit_run_begin(t, u, r);

			assert_int_equal(n % t->page, 0);
			assert_true(n / t->page == x->n_pages / x->n_runs || n / t->page == x->n_pages / x->n_runs + 1);
		}
		for (uint32_t k = 0; k < x->n_parts; k++) {
			assert_int_equal(x->part[k].begin % t->page, 0);
			assert_int_equal(x->part[k].end % t->page, 0);
		}
		assert_int_equal(x->part[0].begin, 0);
		assert_int_equal(x->part[0].end, x->n);
		tensors += x->n_tensors;
		elements += x->n;
	}
	assert_int_equal(tensors, t->n_tensors);
	assert_int_equal(elements, t->n_elements);
}

static void test_gpt2_124m(void **state)
{
	struct model_config m = gpt2_config(12, 768, 50257, 1024, true);
	struct unit_table t;
	const struct tensor_info *x;

	(void)state;
	assert_int_equal(unit_table_init(&t, &m, NULL), 0);
	assert_int_equal(t.n_parameters, 124439808);
	assert_int_equal(t.n_units, 14);
	assert_int_equal(t.n_tensors, 148);
	assert_int_equal(t.page, 65536); /* 7,087,872 elements a block: 54 pages of 131,072 are too few */
	check_layout(&t);
	assert_int_equal(t.unit[0].kind, UNIT_EMBEDDING);
	assert_int_equal(t.unit[0].n_parts, 2);
	assert_int_equal(t.unit[0].part[1].begin, 0);
	assert_int_equal(t.unit[0].part[1].end, round_up_u64(50257 * 768, 65536));
	assert_int_equal(t.largest_unit, t.unit[0].n);
	assert_int_equal(t.unit[1].kind, UNIT_BLOCK);
	assert_int_equal(t.unit[12].layer, 11);
	assert_int_equal(t.unit[1].n_parts, 1);
	assert_int_equal(t.unit[13].kind, UNIT_HEAD);
	assert_int_equal(t.unit[13].n_runs, 1);
	x = unit_table_find(&t, "transformer.wte.weight");
	assert_int_equal(x->offset, 0);
	x = unit_table_find(&t, "transformer.wpe.weight");
	assert_int_equal(x->offset, t.unit[0].part[1].end);
	x = unit_table_find(&t, "transformer.h.11.attn.c_attn.weight");
	assert_int_equal(x->unit, 12);
	assert_int_equal(x->shape[0], 768);
	assert_int_equal(x->shape[1], 2304);
	assert_null(unit_table_find(&t, "lm_head.weight"));
	unit_table_release(&t);
}

static void test_initialisation(void **state)
{
	struct model_config m = gpt2_config(8, 64, 256, 32, false);
	struct unit_table t;
	static const struct {
		const char *name;
		enum tensor_init init;
		double std;
	} want[] = {
		{ "transformer.wte.weight", INIT_NORMAL, 0.02 },
		{ "transformer.wpe.weight", INIT_NORMAL, 0.02 },
		{ "transformer.h.3.ln_1.weight", INIT_ONE, 0 },
		{ "transformer.h.3.ln_1.bias", INIT_ZERO, 0 },
		{ "transformer.h.3.attn.c_attn.weight", INIT_NORMAL, 0.02 },
		{ "transformer.h.3.attn.c_attn.bias", INIT_ZERO, 0 },
		{ "transformer.h.3.attn.c_proj.weight", INIT_NORMAL, 0.005 }, /* 0.02 / sqrt(2 * 8) */
		{ "transformer.h.3.ln_2.weight", INIT_ONE, 0 },
		{ "transformer.h.3.mlp.c_fc.weight", INIT_NORMAL, 0.02 },
		{ "transformer.h.3.mlp.c_proj.weight", INIT_NORMAL, 0.005 },
		{ "transformer.h.3.mlp.c_proj.bias", INIT_ZERO, 0 },
		{ "transformer.ln_f.weight", INIT_ONE, 0 },
		{ "transformer.ln_f.bias", INIT_ZERO, 0 },
		{ "lm_head.weight", INIT_NORMAL, 0.02 },
	};

	(void)state;
	assert_int_equal(unit_table_init(&t, &m, NULL), 0);
	check_layout(&t);
	for (size_t i = 0; i < ARRAY_LEN(want); i++) {
		const struct tensor_info *x = unit_table_find(&t, want[i].name);

		assert_non_null(x);
		assert_int_equal(x->init, want[i].init);
		assert_float_equal(x->init_std, want[i].std, 1e-8);
	}
	for (uint32_t i = 0; i < t.n_tensors; i++)
		for (uint32_t j = 0; j < i; j++)
			assert_true(t.tensor[i].rng_stream != t.tensor[j].rng_stream);
	unit_table_release(&t);
}

/* An untied head has its own matrix and one tree; nothing is padded to a page behind wte. */
static void test_untied(void **state)
{
	struct model_config m = gpt2_config(2, 64, 300, 32, false);
	struct unit_table t;

	(void)state;
	assert_int_equal(unit_table_init(&t, &m, NULL), 0);
	check_layout(&t);
	assert_int_equal(t.unit[0].n_parts, 1);
	assert_int_equal(unit_table_find(&t, "transformer.wpe.weight")->offset, round_up_u64(300 * 64, 128));
	assert_int_equal(unit_table_find(&t, "lm_head.weight")->unit, 3);
	assert_int_equal(t.n_parameters, 2 * 300 * 64 + 32 * 64 + 2 * (12 * 64 * 64 + 13 * 64) + 2 * 64);
	unit_table_release(&t);
}

static void test_page_size(void **state)
{
	/* Width to the page it gives: 12 c^2 + 13 c elements in at least 64 pages, from 16,384 to 1,048,576. */
	static const struct {
		uint32_t width;
		uint64_t page;
	} want[] = {
		{ 16, 16384 },    { 128, 16384 },   { 384, 16384 },    { 512, 32768 },     { 768, 65536 },
		{ 1024, 131072 }, { 1600, 262144 }, { 4096, 1048576 }, { 12288, 1048576 },
	};

	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(want); i++) {
		struct model_config m = gpt2_config(1, want[i].width, 256, 8, true);
		struct unit_table t;

		assert_int_equal(unit_table_init(&t, &m, NULL), 0);
		assert_int_equal(t.page, want[i].page);
		check_layout(&t);
		unit_table_release(&t);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_gpt2_124m),
		cmocka_unit_test(test_initialisation),
		cmocka_unit_test(test_untied),
		cmocka_unit_test(test_page_size),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
