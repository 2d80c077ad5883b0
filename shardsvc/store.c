/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where our pages lie.
 *
 * All vectors of state have one layout: our share of unit 0, of unit 1, and so
 * on, each share our runs of the unit in global order. p lies behind the header
 * page of the parameter region that workers read or map, so that the master is
 * the published copy; m and v are private. A gradient is reduced by (unit,
 * part): a piece is what we own of the part's pages, and its accumulator is
 * laid out like the share without the other pages. Part 0 covers the whole
 * unit, so that its accumulator is the gradient that Adam reads.
 */
#include "shardsvc/shard.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>

static_assert(PARAM_HEADER >= sizeof(struct fab_progress), "the progress word lies in the header page");

/* The part's range rounded outward to whole pages. */
static struct unit_part part_pages(const struct unit_table *t, uint32_t unit, uint32_t part)
{
	const struct unit_part *p = &t->unit[unit].part[part];

	return (struct unit_part){ .begin = p->begin / t->page * t->page, .end = round_up_u64(p->end, t->page) };
}

/* What of the share lies in the part's pages. */
static void piece_cut(struct piece *p, const struct share *share, struct unit_part pages)
{
	for (uint32_t i = 0; i < share->n_seg; i++) {
		const struct share_seg *s = &share->seg[i];
		uint64_t begin = s->unit_offset > pages.begin ? s->unit_offset : pages.begin;
		uint64_t end = s->unit_offset + s->n < pages.end ? s->unit_offset + s->n : pages.end;

		if (begin >= end)
			continue;
		p->seg[p->n_seg++] = (struct share_seg){ .unit_offset = begin, .share_offset = p->n, .n = end - begin };
		p->n += end - begin;
	}
}

static void add_pieces(struct store *s, uint32_t unit)
{
	struct store_unit *u = &s->unit[unit];

	u->first_piece = s->n_pieces;
	for (uint32_t part = 0; part < s->table->unit[unit].n_parts; part++) {
		struct piece *p = &s->piece[s->n_pieces];

		*p = (struct piece){ .unit = unit, .part = part };
		piece_cut(p, &u->share, part_pages(s->table, unit, part));
		assert(part > 0 || p->n == u->share.n);
		if (p->n)
			s->n_pieces++;
	}
	u->n_pieces = s->n_pieces - u->first_piece;
}

int store_init(struct store *s, const struct unit_table *t, const struct page_map *map, uint32_t member)
{
	*s = (struct store){ .table = t, .member = member };
	s->unit = calloc(t->n_units, sizeof(*s->unit));
	s->piece = calloc((size_t)t->n_units * UNIT_PARTS_MAX, sizeof(*s->piece));
	if (!s->unit || !s->piece) {
		store_release(s);
		return -ENOMEM;
	}
	for (uint32_t u = 0; u < t->n_units; u++) {
		page_map_share(map, t, member, u, &s->unit[u].share);
		s->unit[u].at = s->n;
		s->n += s->unit[u].share.n;
		add_pieces(s, u);
		assert(page_map_share_bytes(map, t, member, u) == PARAM_HEADER + s->unit[u].at * sizeof(float));
	}
	return 0;
}

uint64_t store_accumulator_elements(const struct store *s)
{
	uint64_t n = 0;

	for (uint32_t i = 0; i < s->n_pieces; i++)
		n += s->piece[i].n;
	return n;
}

/* An owner of nothing has arenas too, so that nobody has to ask. */
static int arena_of_floats(struct arena *a, const char *name, uint64_t elements, struct err *e)
{
	char size[24];
	int rc = arena_init(a, name, elements ? elements * sizeof(float) : 1);

	if (rc)
		err_set(e, rc, "no memory for %s: %s", name, bytes_text(elements * sizeof(float), size));
	return rc;
}

int store_allocate(struct store *s, void *region, struct err *e)
{
	int rc = arena_of_floats(&s->moments, "Adam moments", 2 * s->n, e);

	if (rc)
		return rc;
	rc = arena_of_floats(&s->accumulators, "gradient accumulators", store_accumulator_elements(s), e);
	if (rc) {
		arena_release(&s->moments);
		return rc;
	}
	s->progress = region;
	s->p = (float *)((uint8_t *)region + PARAM_HEADER);
	s->m = arena_alloc(&s->moments, s->n * sizeof(float), CACHE_LINE);
	s->v = arena_alloc(&s->moments, s->n * sizeof(float), CACHE_LINE);
	for (uint32_t i = 0; i < s->n_pieces; i++) {
		struct piece *p = &s->piece[i];

		p->accumulator = arena_alloc(&s->accumulators, p->n * sizeof(float), CACHE_LINE);
		assert(p->accumulator);
	}
	assert(s->m && s->v);
	return 0;
}

void store_release(struct store *s)
{
	arena_release(&s->moments);
	arena_release(&s->accumulators);
	free(s->unit);
	free(s->piece);
	*s = (struct store){ 0 };
}

const struct piece *store_piece(const struct store *s, uint32_t unit, uint32_t part)
{
	const struct store_unit *u;

	if (unit >= s->table->n_units)
		return NULL;
	u = &s->unit[unit];
	for (uint32_t i = 0; i < u->n_pieces; i++)
		if (s->piece[u->first_piece + i].part == part)
			return &s->piece[u->first_piece + i];
	return NULL;
}

const float *store_span(const struct store *s, uint32_t unit, uint64_t offset, uint64_t n)
{
	const struct share *share;

	if (unit >= s->table->n_units)
		return NULL;
	share = &s->unit[unit].share;
	for (uint32_t i = 0; i < share->n_seg; i++) {
		const struct share_seg *g = &share->seg[i];
		uint64_t skip = offset - g->unit_offset;

		if (offset >= g->unit_offset && skip < g->n && n <= g->n - skip)
			return s->p + s->unit[unit].at + g->share_offset + skip;
	}
	return NULL;
}
