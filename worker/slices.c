/* SPDX-License-Identifier: Apache-2.0 */
#include "worker/slices.h"

#include <assert.h>

#define SLICE_ELEMENTS (SLICE_BYTES / sizeof(float))

static uint64_t max_u64(uint64_t a, uint64_t b)
{
	return a > b ? a : b;
}

static uint64_t min_u64(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

void share_of_part(const struct share *s, const struct unit_part *part, uint64_t page, struct share *out)
{
	uint64_t begin = part->begin / page * page;
	uint64_t end = round_up_u64(part->end, page);

	out->n_seg = 0;
	out->n = 0;
	for (uint32_t i = 0; i < s->n_seg; i++) {
		uint64_t from = max_u64(s->seg[i].unit_offset, begin);
		uint64_t to = min_u64(s->seg[i].unit_offset + s->seg[i].n, end);

		if (from >= to)
			continue;
		out->seg[out->n_seg++] =
			(struct share_seg){ .unit_offset = from, .share_offset = out->n, .n = to - from };
		out->n += to - from;
	}
}

uint32_t share_slices(const struct share *s)
{
	return (uint32_t)((s->n + SLICE_ELEMENTS - 1) / SLICE_ELEMENTS);
}

uint32_t share_slice(const struct share *s, uint32_t k, struct slice_piece *out, uint32_t max)
{
	uint64_t begin = (uint64_t)k * SLICE_ELEMENTS;
	uint64_t end = min_u64(begin + SLICE_ELEMENTS, s->n);
	uint32_t n = 0;

	for (uint32_t i = 0; i < s->n_seg; i++) {
		const struct share_seg *g = &s->seg[i];
		uint64_t from = max_u64(g->share_offset, begin);
		uint64_t to = min_u64(g->share_offset + g->n, end);

		if (from >= to)
			continue;
		assert(n < max);
		out[n++] = (struct slice_piece){ .unit_offset = g->unit_offset + (from - g->share_offset),
						 .n = to - from };
	}
	return n;
}
