/* SPDX-License-Identifier: Apache-2.0 */
/* A small model cut over shard services, for the tests of the page store. */
#ifndef SHARDMESH_TEST_SHARDSVC_H
#define SHARDMESH_TEST_SHARDSVC_H

#include "shardsvc/shard.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define TEST_MEMBERS_MAX 8

/* Two blocks of 13 pages, a tied table of 4 pages (the last not full), positions of 2 pages, a head of 1. */
static inline void test_table(struct unit_table *t)
{
	const struct model_config m = {
		.family = FAMILY_GPT2,
		.vocab_size = 501,
		.n_positions = 250,
		.n_embd = 128,
		.n_layer = 2,
		.n_head = 4,
		.n_inner = 512,
		.initializer_range = 0.02f,
		.tie_word_embeddings = true,
	};

	assert_int_equal(unit_table_init(t, &m, NULL), 0);
	assert_int_equal(t->page, 16384);
}

static inline void test_map(struct page_map *p, const struct unit_table *t, uint32_t members)
{
	static const uint32_t ids[TEST_MEMBERS_MAX] = { 3, 4, 7, 9, 12, 13, 20, 21 };

	assert_in_range(members, 1, TEST_MEMBERS_MAX);
	assert_int_equal(page_map_init(p, t, ids, members, 16), 0);
}

/* Runs dealt at random: shares of many segments, and of none. */
static inline void test_scatter(struct page_map *p, const struct unit_table *t, uint64_t seed)
{
	for (uint32_t u = 0; u < t->n_units; u++)
		for (uint32_t r = 0; r < t->unit[u].n_runs; r++)
			p->owner[u * RUNS_PER_UNIT_MAX + r] = p->member[rng_u64(seed, u, r) % p->n_members];
}

struct test_store {
	struct store store;
	void *region;
};

static inline void test_store_open(struct test_store *s, const struct unit_table *t, const struct page_map *p,
				   uint32_t member)
{
	size_t bytes = page_map_share_bytes(p, t, member, t->n_units);

	assert_int_equal(store_init(&s->store, t, p, member), 0);
	s->region = aligned_alloc(4096, round_up_u64(bytes, 4096));
	assert_non_null(s->region);
	memset(s->region, 0, bytes);
	assert_int_equal(store_allocate(&s->store, s->region, NULL), 0);
}

static inline void test_store_close(struct test_store *s)
{
	store_release(&s->store);
	free(s->region);
}

static inline float *test_values(uint64_t n, uint64_t seed)
{
	float *x = aligned_alloc(CACHE_LINE, round_up_u64(n * sizeof(*x), CACHE_LINE));

	assert_non_null(x);
	rng_fill_normal(x, n, seed, 77, 0, 0.0f, 1.0f);
	return x;
}

/* A stream of one backend; the deferred one shows that nothing relies on a call's having been done on return. */
struct test_engine {
	struct engine engine;
	struct k_profile profile;
	void *workspace;
};

static inline void test_engine_open(struct test_engine *e, const struct k_ops *ops, unsigned threads)
{
	struct k_stream_config cfg = { .profile = &e->profile, .threads = threads };
	const struct k_dims none = { 0 };
	char reason[160];

	assert_int_equal(k_profile_detect("portable", &e->profile, reason, NULL), 0);
	cfg.workspace_bytes = round_up_u64(ops->workspace_bytes(&none, threads) + 1, CACHE_LINE);
	e->workspace = cfg.workspace = aligned_alloc(CACHE_LINE, cfg.workspace_bytes);
	assert_non_null(e->workspace);
	e->engine.ops = ops;
	assert_int_equal(ops->stream_open(&cfg, &e->engine.stream, NULL), 0);
}

static inline void test_engine_close(struct test_engine *e)
{
	e->engine.ops->stream_close(e->engine.stream);
	free(e->workspace);
}

#endif
