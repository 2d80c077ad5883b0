/* SPDX-License-Identifier: Apache-2.0 */
#include "model/model.h"

#include <errno.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define MIB (UINT64_C(1) << 20)
#define GIB (UINT64_C(1) << 30)
#define WORKSPACE_A_MB (3 * MIB)

static uint64_t workspace(void *ctx, uint32_t n_mb)
{
	*(uint32_t *)ctx = n_mb;
	return n_mb * WORKSPACE_A_MB;
}

struct fixture {
	struct job_config c;
	struct unit_table t;
	struct batch_plan b;
	uint32_t asked; /* span of the last workspace call */
};

static int setup(void **state)
{
	static struct fixture f;

	f.c = (struct job_config){
		.model = { .vocab_size = 1000,
			   .n_positions = 128,
			   .n_embd = 256,
			   .n_layer = 6,
			   .n_head = 4,
			   .n_inner = 1024,
			   .tie_word_embeddings = true },
		.data.sequence_length = 128,
		.zero.stage3_max_live_parameters = 1000000000,
		.workers = 2,
		.max_held_nodes = 8,
		.max_owners_per_unit = 16,
	};
	f.b = (struct batch_plan){ 64, 4, 16 };
	*state = &f;
	return unit_table_init(&f.t, &f.c.model, NULL);
}

static int teardown(void **state)
{
	unit_table_release(&((struct fixture *)*state)->t);
	return 0;
}

/* Pieces by the micro-batch alone; sums by the span; whichever is less where nothing has to be cut. */
static void test_head(void **state)
{
	const struct model_config m = { .vocab_size = 50257, .n_embd = 768 };
	static const struct {
		uint32_t rows, span, pieces, longest, sums;
	} want[] = {
		{ 128, 2, 0, 256, 0 },   { 512, 2, 0, 1024, 0 },  { 1024, 1, 0, 1024, 0 }, { 1024, 2, 1, 1024, 1 },
		{ 1024, 4, 1, 1024, 2 }, { 2048, 1, 2, 1024, 0 }, { 2048, 8, 2, 1024, 3 }, { 4100, 3, 4, 1028, 1 },
	};
	const struct model_config wide = { .vocab_size = 1000000, .n_embd = 64 };
	struct head_plan p;
	(void)state;

	for (size_t i = 0; i < ARRAY_LEN(want); i++) {
		head_plan_get(&m, want[i].rows, want[i].span, &p);
		assert_int_equal(p.pieces, want[i].pieces);
		assert_int_equal(p.logits, round_up_u64((uint64_t)want[i].longest * 50257, 16));
		assert_int_equal(p.sums, want[i].sums * 50257ull * 768);
		assert_int_equal(want[i].sums, p.pieces ? head_sums(want[i].span) : 0);
	}
	/* Never fewer than HEAD_ROWS_MIN rows, however wide they are. */
	head_plan_get(&wide, 1000, 1, &p);
	assert_int_equal(p.pieces, 3);
	for (uint32_t rows = HEAD_ROWS_MIN; rows < 3000; rows += 97)
		for (uint32_t pieces = 1; pieces <= rows / HEAD_ROWS_MIN; pieces++) {
			assert_int_equal(head_piece_begin(rows, pieces, 0), 0);
			assert_int_equal(head_piece_begin(rows, pieces, pieces), rows);
			for (uint32_t i = 0; i < pieces; i++)
				assert_in_range(head_piece_begin(rows, pieces, i + 1) -
							head_piece_begin(rows, pieces, i),
						rows / pieces - 16, head_piece_rows(rows, pieces));
			assert_in_range(head_piece_rows(rows, pieces), rows / pieces, rows / pieces + 32);
		}
}

static int try_plan(struct fixture *f, uint64_t memory, uint32_t host_workers, bool mapped, struct worker_plan *out,
		    struct err *e)
{
	const struct worker_place place = {
		.memory = memory, .workers = host_workers, .mapped = mapped, .workspace = workspace, .ctx = &f->asked
	};

	return worker_plan_make(&f->c, &f->t, &f->b, &place, out, e);
}

static struct worker_plan plan(struct fixture *f, uint64_t memory, uint32_t host_workers, bool mapped)
{
	struct worker_plan p;
	struct err e = { 0 };

	if (try_plan(f, memory, host_workers, mapped, &p, &e))
		fail_msg("%s", e.text);
	return p;
}

static uint64_t line(const struct mem_plan *p, const char *name)
{
	for (uint32_t i = 0; i < p->n_lines; i++)
		if (!strcmp(p->line[i].name, name))
			return p->line[i].bytes;
	fail_msg("no line %s", name);
	return 0;
}

static void check_total(const struct mem_plan *p)
{
	uint64_t sum = 0;

	for (uint32_t i = 0; i < p->n_lines; i++)
		sum += p->line[i].bytes;
	assert_int_equal(sum, p->total);
}

static void test_sizes(void **state)
{
	struct fixture *f = *state;
	struct activation_sizes s;

	activation_sizes_get(&f->c.model, 4, 128, &s);
	/* 512 rows of 256: every buffer is a whole number of cache lines. */
	assert_int_equal(s.boundary, 512 * 256);
	assert_int_equal(s.inner, 512 * (4 * 256 + 4 + 3 * 256 + 4 + 2 * 1024));
	assert_int_equal(s.scratch, 512 * (3 * 256 + 1024));
	assert_int_equal(s.head, 512 * (256 + 2));
	/* A row of 3 positions: 3 * 4 heads of lse take a line of 16 floats. */
	activation_sizes_get(&f->c.model, 1, 3, &s);
	assert_int_equal(s.inner, 4 * 768 + 4 * 16 + 3 * 768 + 16 + 2 * 3072);
}

/* Grouped queries wider than the residual stream, and a head whose q and k are kept twice. */
static void test_llama_sizes(void **state)
{
	struct model_config m = { .family = FAMILY_LLAMA,
				  .vocab_size = 1000,
				  .n_embd = 256,
				  .n_layer = 2,
				  .n_head = 8,
				  .n_kv_head = 2,
				  .head_dim = 48,
				  .n_inner = 512,
				  .rope.rot = 48 };
	struct activation_sizes s;

	(void)state;
	activation_sizes_get(&m, 4, 128, &s);
	assert_int_equal(s.boundary, 512 * 256);
	assert_int_equal(s.inner, 512 * (3 * 256 + 2 + 2 * 384 + 2 * 96 + 8 + 3 * 512));
	assert_int_equal(s.scratch, 512 * (2 * 256 + 384 + 384 + 2 * 96));
	assert_int_equal(s.head, 512 * (256 + 1));
	assert_int_equal(s.tables, 2 * 128 * 24);
	m.qk_norm = true;
	m.n_inner = 1024;
	activation_sizes_get(&m, 4, 128, &s);
	assert_int_equal(s.inner, 512 * (3 * 256 + 2 + 3 * 384 + 3 * 96 + 8 + 8 + 2 + 3 * 1024));
	assert_int_equal(s.scratch, 512 * (2 * 256 + 384 + 1024));
}

static void test_plenty(void **state)
{
	struct fixture *f = *state;
	struct worker_plan p = plan(f, 64 * GIB, 2, false);
	struct activation_sizes s;

	activation_sizes_get(&f->c.model, 4, 128, &s);
	assert_int_equal(p.max_span, 8); /* 16 micro-batches for 2 workers */
	assert_true(p.keep_activations);
	assert_int_equal(p.window_elements, f->t.n_elements);
	assert_int_equal(p.n_gradient_buffers, 2);
	assert_int_equal(p.gradient_elements, f->t.largest_unit);
	assert_int_equal(p.workspace_bytes, 8 * WORKSPACE_A_MB);
	assert_int_equal(f->asked, 8);
	check_total(&p.mem);
	assert_int_equal(line(&p.mem, "parameter window"), f->t.n_elements * 4);
	assert_int_equal(line(&p.mem, "gradient buffers"), 2 * f->t.largest_unit * 4);
	assert_int_equal(line(&p.mem, "residual stream"), 8 * 7 * s.boundary * 4);
	assert_int_equal(line(&p.mem, "activations"), 8 * 6 * s.inner * 4);
	assert_int_equal(line(&p.mem, "scratch"), 8 * s.scratch * 4);
	/* One micro-batch's logits and the three sums that a tree of 8 needs: less than the logits of 8. */
	assert_int_equal(p.head.pieces, 1);
	assert_int_equal(line(&p.mem, "final norm and logits"), (8 * s.head + 512 * 1000 + 3 * 1000 * 256) * 4);
	assert_int_equal(plan(f, 64 * GIB, 2, true).window_elements, 0);
}

/* Longest useful spans: the busiest of the workers gets no more than with spans of one. */
static void test_spans(void **state)
{
	struct fixture *f = *state;
	static const struct {
		uint32_t n_micro, workers, span;
	} want[] = { { 1, 1, 1 },  { 1, 5, 1 }, { 12, 1, 8 }, { 12, 2, 2 },  { 12, 3, 4 },
		     { 16, 4, 4 }, { 3, 2, 2 }, { 9, 2, 4 },  { 64, 1, 64 }, { 7, 100, 1 } };

	for (size_t i = 0; i < ARRAY_LEN(want); i++) {
		f->b.n_micro = want[i].n_micro;
		f->c.workers = want[i].workers;
		assert_int_equal(plan(f, 64 * GIB, 1, true).max_span, want[i].span);
	}
	f->b.n_micro = 16;
	f->c.workers = 2;
}

/* Less and less memory: shorter spans first, then activations are recomputed, then a refusal with the numbers. */
static void test_less_memory(void **state)
{
	struct fixture *f = *state;
	struct worker_plan before = plan(f, 64 * GIB, 1, true), p;
	struct err e = { 0 };
	bool shorter = false, recomputed = false;
	uint64_t memory;
	int rc = 0;

	for (memory = 4 * GIB; memory > MIB; memory -= memory / 8) {
		rc = try_plan(f, memory, 1, true, &p, &e);
		if (rc)
			break;
		assert_true(p.mem.total <= memory / 2);
		assert_true(p.mem.total <= before.mem.total);
		shorter |= p.max_span < 8 && p.keep_activations;
		recomputed |= !p.keep_activations;
		before = p;
	}
	assert_true(shorter && recomputed);
	assert_false(before.keep_activations);
	assert_int_equal(rc, -ENOMEM);
	assert_non_null(strstr(e.text, "a span of one micro-batch (4 samples of 128 tokens) needs "));
}

static void test_modes(void **state)
{
	struct fixture *f = *state;
	struct worker_plan p;
	struct err e = { 0 };

	f->c.activations = ACTIVATIONS_RECOMPUTE;
	p = plan(f, 64 * GIB, 1, true);
	assert_false(p.keep_activations);
	f->c.activations = ACTIVATIONS_KEEP;
	f->c.activation_memory = 20 * MIB;
	assert_int_equal(try_plan(f, 64 * GIB, 1, true, &p, &e), -ENOMEM);
	assert_non_null(strstr(e.text, "20.0 MiB"));
	assert_non_null(strstr(e.text, "shardmesh.activation_memory"));
	assert_non_null(strstr(e.text, "\"keep\""));
	f->c.activations = ACTIVATIONS_AUTO;
	p = plan(f, 64 * GIB, 1, true);
	assert_false(p.keep_activations);
	assert_int_equal(p.max_span, 1);
	assert_true(p.mem.total - p.workspace_bytes - line(&p.mem, "gradient buffers") <= 20 * MIB);
	f->c.activation_memory = 0;
}

static void test_window(void **state)
{
	struct fixture *f = *state;
	uint64_t needed = f->t.unit[0].n + f->t.unit[7].n; /* the head and the tied embedding */
	struct worker_plan p;

	if (needed < f->t.largest_unit)
		needed = f->t.largest_unit;
	f->c.zero.stage3_max_live_parameters = 10;
	p = plan(f, 64 * GIB, 1, false);
	assert_int_equal(p.window_elements, needed);
	f->c.zero.stage3_max_live_parameters = 2 * f->t.largest_unit;
	p = plan(f, 64 * GIB, 1, false);
	assert_int_equal(p.window_elements, 2 * f->t.largest_unit);
	f->c.zero.stage3_max_live_parameters = 1000000000;
}

static struct shard_plan shard(struct fixture *f, const struct page_map *map, uint32_t member, uint32_t n_micro,
			       bool mapped)
{
	struct shard_plan p;
	struct err e = { 0 };

	if (shard_plan_make(&f->c, &f->t, map, member, n_micro, 2, mapped, &p, &e))
		fail_msg("%s", e.text);
	return p;
}

static void test_shards(void **state)
{
	struct fixture *f = *state;
	uint32_t members[] = { 1, 2, 3 };
	uint64_t owned = 0, accumulators = 0;
	struct page_map map;
	struct shard_plan p;
	struct err e = { 0 };

	assert_int_equal(page_map_init(&map, &f->t, members, 3, 16), 0);
	for (uint32_t i = 0; i < 3; i++) {
		uint64_t largest = 0;
		struct share s;

		p = shard(f, &map, members[i], 12, false);
		check_total(&p.mem);
		for (uint32_t u = 0; u < f->t.n_units; u++) {
			page_map_share(&map, &f->t, members[i], u, &s);
			largest = s.n > largest ? s.n : largest;
		}
		assert_int_equal(p.inbox_elements, largest);
		assert_int_equal(line(&p.mem, "inboxes"), 2 * largest * 4);
		assert_int_equal(line(&p.mem, "parameters"),
				 page_map_share_bytes(&map, &f->t, members[i], f->t.n_units));
		assert_int_equal(line(&p.mem, "Adam m"), p.n_elements * 4);
		assert_int_equal(shard(f, &map, members[i], 12, true).inbox_elements, 0);
		owned += p.n_elements;
		accumulators += line(&p.mem, "gradient accumulators") / 4;
	}
	assert_int_equal(owned, f->t.n_elements);
	/* The tied embedding's pages are accumulated twice. */
	assert_int_equal(accumulators, f->t.n_elements + f->t.unit[0].part[1].end);
	f->c.partial_sum_memory = 1;
	assert_int_equal(shard_plan_make(&f->c, &f->t, &map, 1, 12, 2, true, &p, &e), -ENOMEM);
	assert_non_null(strstr(e.text, "shardmesh.partial_sum_memory"));
	f->c.partial_sum_memory = 0;
	page_map_release(&map);
}

/* Pool and spill together hold every node a tree must take; one micro-batch needs neither. */
static void test_partial_sums(void **state)
{
	struct fixture *f = *state;
	uint32_t member = 1;
	struct page_map map;
	struct shard_plan p;
	uint64_t accumulators;

	assert_int_equal(page_map_init(&map, &f->t, &member, 1, 16), 0);
	p = shard(f, &map, 1, 1, true);
	assert_int_equal(p.pool_elements + p.spill_elements, 0);
	accumulators = line(&p.mem, "gradient accumulators") / 4;
	p = shard(f, &map, 1, 1024, true);
	assert_true(p.pool_elements + p.spill_elements >= 10 * accumulators);
	f->c.partial_sum_memory = 100 * accumulators * 4;
	p = shard(f, &map, 1, 1024, true);
	assert_int_equal(p.pool_elements, (10 + 8 - 1) * accumulators);
	assert_int_equal(p.spill_elements, 0);
	f->c.partial_sum_memory = f->t.largest_unit * 4;
	p = shard(f, &map, 1, 1024, true);
	assert_int_equal(p.pool_elements, f->t.largest_unit);
	assert_int_equal(p.spill_elements, 10 * accumulators);
	f->c.partial_sum_memory = 0;
	page_map_release(&map);
}

static void test_print(void **state)
{
	struct fixture *f = *state;
	struct worker_plan p = plan(f, 64 * GIB, 2, false);
	char *text = NULL;
	size_t n;
	FILE *out = open_memstream(&text, &n);

	mem_plan_print(out, "worker-1", &p.mem);
	fclose(out);
	assert_int_equal(strncmp(text, "memory of worker-1\n", 19), 0);
	for (uint32_t i = 0; i < p.mem.n_lines; i++)
		assert_non_null(strstr(text, p.mem.line[i].name));
	assert_non_null(strstr(text, "\n  total "));
	free(text);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_sizes),  cmocka_unit_test(test_llama_sizes), cmocka_unit_test(test_plenty),
		cmocka_unit_test(test_spans),  cmocka_unit_test(test_less_memory), cmocka_unit_test(test_modes),
		cmocka_unit_test(test_window), cmocka_unit_test(test_shards),      cmocka_unit_test(test_partial_sums),
		cmocka_unit_test(test_print),  cmocka_unit_test(test_head),
	};

	return cmocka_run_group_tests(tests, setup, teardown);
}
