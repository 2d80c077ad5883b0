/* SPDX-License-Identifier: Apache-2.0 */
/* A coverage with sums that are counted: none is used twice at a time, and none beyond what there are. */
#ifndef SHARDMESH_TEST_COVERAGE_BENCH_H
#define SHARDMESH_TEST_COVERAGE_BENCH_H

#include "mesh/mesh.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define OFFERS 40
#define SUMS 200

struct bench {
	struct coverage c;
	void *memory;
	uint32_t pool, in_use, last; /* sums without must; ids are not used twice in the tests by hand */
	bool reuse, used[SUMS];
	uint64_t value[SUMS];
};

static uint32_t take(void *ctx, bool must)
{
	struct bench *b = ctx;
	uint32_t sum = 1;

	if (!must && b->in_use >= b->pool)
		return COVERAGE_NO_SUM;
	if (b->reuse)
		while (b->used[sum])
			sum++;
	else
		sum = ++b->last;
	assert_true(sum < SUMS && !b->used[sum]);
	b->used[sum] = true;
	b->in_use++;
	return sum;
}

static void give(void *ctx, uint32_t sum)
{
	struct bench *b = ctx;

	assert_true(sum > 0 && sum < SUMS && b->used[sum]);
	b->used[sum] = false;
	b->in_use--;
}

static void bench_open(struct bench *b, uint32_t n_micro, uint32_t max_held, uint32_t pool)
{
	const struct coverage_sums sums = { .take = take, .give = give, .ctx = b };

	memset(b, 0, sizeof(*b));
	b->pool = pool;
	b->memory = malloc(coverage_bytes(OFFERS));
	coverage_init(&b->c, n_micro, max_held, &sums, b->memory, OFFERS);
}

static void bench_close(struct bench *b)
{
	free(b->memory);
}

static void offer(struct bench *b, uint64_t id, uint32_t first, uint32_t level, bool in_place, bool wanted)
{
	assert_int_equal(coverage_offer(&b->c, id, (struct tree_node){ first, level }, in_place, wanted), 0);
}

#endif
