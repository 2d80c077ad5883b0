/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Who owns which run.
 *
 * page_map_init deals the units out from the largest to the smallest. The
 * owners of a unit are the min(F, members, runs) members that have least so
 * far, each gets the same number of consecutive runs, and the runs left over go
 * one each to those that have least; so what one unit leaves uneven the next
 * ones level out, and a unit that is a single run goes to whoever has least.
 * Ties are decided by a hash of unit and member, so that no member is always
 * first. Consecutive runs mean few segments, hence few reads and mappings.
 *
 * page_map_add and page_map_remove change a map by as little as evenness
 * allows: a leaving member's runs go to those who stay, a new member takes its
 * fair share from those who have most, and nothing else moves. A map is
 * therefore named by its first list of members and the changes since.
 */
#include "model/model.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Scratch of one change: what each member has in all and in the unit at hand. */
struct deal {
	const struct unit_table *t;
	struct page_map *p;
	uint64_t *total;   /* [n_members] elements */
	uint32_t *runs;    /* [n_members] runs of the unit at hand */
	uint32_t *order;   /* [max(n_members, n_units)] scratch */
	uint32_t *by_size; /* [n_units] units, largest first */
};

static uint64_t run_elements(const struct unit_table *t, uint32_t unit, uint32_t r)
{
	return unit_run_begin(t, unit, r + 1) - unit_run_begin(t, unit, r);
}

static uint32_t *owner_at(const struct page_map *p, uint32_t unit, uint32_t run)
{
	return &p->owner[(size_t)unit * RUNS_PER_UNIT_MAX + run];
}

static uint64_t tie(uint32_t unit, uint32_t member)
{
	uint32_t key[2] = { unit, member };

	return hash64(key, sizeof(key), 0);
}

static uint32_t member_index(const struct page_map *p, uint32_t member)
{
	uint32_t i = 0;

	while (i < p->n_members && p->member[i] != member)
		i++;
	return i;
}

static uint32_t min_u32(uint32_t a, uint32_t b)
{
	return a < b ? a : b;
}

/* How many owners a unit has when there are n members. */
static uint32_t owners_of(const struct page_map *p, const struct unit_table *t, uint32_t unit, uint32_t n)
{
	return min_u32(min_u32(p->max_owners, n), t->unit[unit].n_runs);
}

static void sort_units(struct deal *d)
{
	const struct unit_info *u = d->t->unit;

	for (uint32_t i = 0; i < d->t->n_units; i++) {
		uint32_t j = i;

		for (; j > 0 && u[d->by_size[j - 1]].n < u[i].n; j--)
			d->by_size[j] = d->by_size[j - 1];
		d->by_size[j] = i;
	}
}

static void deal_release(struct deal *d)
{
	free(d->total);
	free(d->runs);
	free(d->order);
	free(d->by_size);
}

static int deal_init(struct deal *d, struct page_map *p, const struct unit_table *t)
{
	size_t n = p->n_members > t->n_units ? p->n_members : t->n_units;

	*d = (struct deal){ .t = t, .p = p };
	d->total = calloc(n, sizeof(*d->total));
	d->runs = calloc(n, sizeof(*d->runs));
	d->order = calloc(n, sizeof(*d->order));
	d->by_size = calloc(n, sizeof(*d->by_size));
	if (!d->total || !d->runs || !d->order || !d->by_size) {
		deal_release(d);
		return -ENOMEM;
	}
	sort_units(d);
	return 0;
}

/* Totals of all members from the map as it stands. */
static void count_totals(struct deal *d)
{
	for (uint32_t u = 0; u < d->t->n_units; u++)
		for (uint32_t r = 0; r < d->t->unit[u].n_runs; r++)
			d->total[member_index(d->p, *owner_at(d->p, u, r))] += run_elements(d->t, u, r);
}

static void count_runs(struct deal *d, uint32_t unit)
{
	memset(d->runs, 0, d->p->n_members * sizeof(*d->runs));
	for (uint32_t r = 0; r < d->t->unit[unit].n_runs; r++)
		d->runs[member_index(d->p, *owner_at(d->p, unit, r))]++;
}

/* True when member index a comes before b in who should be given something of `unit`. */
static bool has_less(const struct deal *d, uint32_t unit, uint32_t a, uint32_t b)
{
	if (d->total[a] != d->total[b])
		return d->total[a] < d->total[b];
	return tie(unit, d->p->member[a]) < tie(unit, d->p->member[b]);
}

struct order_ctx {
	const struct deal *d;
	uint32_t unit;
};

static int compare_total(const void *a, const void *b, void *ctx)
{
	const struct order_ctx *o = ctx;
	uint32_t i = *(const uint32_t *)a, j = *(const uint32_t *)b;

	return i == j ? 0 : has_less(o->d, o->unit, i, j) ? -1 : 1;
}

/* Member indices into d->order, least total first. */
static void order_by_total(struct deal *d, uint32_t unit)
{
	struct order_ctx ctx = { d, unit };

	for (uint32_t i = 0; i < d->p->n_members; i++)
		d->order[i] = i;
	qsort_r(d->order, d->p->n_members, sizeof(*d->order), compare_total, &ctx);
}

static void deal_unit(struct deal *d, uint32_t unit)
{
	uint32_t n_runs = d->t->unit[unit].n_runs, run = 0;
	uint32_t k = owners_of(d->p, d->t, unit, d->p->n_members);

	order_by_total(d, unit);
	memset(d->runs, 0, d->p->n_members * sizeof(*d->runs));
	for (uint32_t i = 0; i < k; i++)
		d->runs[d->order[i]] = n_runs / k + (i < n_runs % k);
	for (uint32_t j = 0; j < d->p->n_members; j++) {
		for (uint32_t left = d->runs[j]; left > 0; left--, run++) {
			*owner_at(d->p, unit, run) = d->p->member[j];
			d->total[j] += run_elements(d->t, unit, run);
		}
	}
	assert(run == n_runs);
}

int page_map_init(struct page_map *p, const struct unit_table *t, const uint32_t *members, uint32_t n,
		  uint32_t max_owners)
{
	struct deal d;
	int rc;

	if (n == 0 || max_owners == 0)
		return -EINVAL;
	for (uint32_t i = 1; i < n; i++)
		if (members[i - 1] >= members[i])
			return -EINVAL;
	*p = (struct page_map){ .n_members = n, .n_units = t->n_units, .max_owners = max_owners };
	p->member = malloc(n * sizeof(*p->member));
	p->owner = calloc((size_t)t->n_units * RUNS_PER_UNIT_MAX, sizeof(*p->owner));
	rc = p->member && p->owner ? deal_init(&d, p, t) : -ENOMEM;
	if (rc) {
		page_map_release(p);
		return rc;
	}
	memcpy(p->member, members, n * sizeof(*p->member));
	for (uint32_t i = 0; i < t->n_units; i++)
		deal_unit(&d, d.by_size[i]);
	deal_release(&d);
	return 0;
}

void page_map_release(struct page_map *p)
{
	free(p->member);
	free(p->owner);
	*p = (struct page_map){ 0 };
}

/*
 * The owner of `unit`, other than `except`, that should give a run away: the
 * most runs of the unit, then the most in all.
 */
static uint32_t richest(const struct deal *d, uint32_t unit, uint32_t except)
{
	uint32_t best = UINT32_MAX;

	for (uint32_t i = 0; i < d->p->n_members; i++) {
		if (i == except || !d->runs[i])
			continue;
		if (best == UINT32_MAX || d->runs[i] > d->runs[best] ||
		    (d->runs[i] == d->runs[best] && has_less(d, unit, best, i)))
			best = i;
	}
	return best;
}

static void move_run(struct deal *d, uint32_t unit, uint32_t run, uint32_t from, uint32_t to)
{
	uint64_t n = run_elements(d->t, unit, run);

	assert(*owner_at(d->p, unit, run) == d->p->member[from]);
	*owner_at(d->p, unit, run) = d->p->member[to];
	d->total[from] -= n;
	d->total[to] += n;
	d->runs[from]--;
	d->runs[to]++;
}

/* The last run that `from` holds of the unit: pieces of its share stay together. */
static uint32_t last_run_of(const struct deal *d, uint32_t unit, uint32_t from)
{
	uint32_t r = d->t->unit[unit].n_runs;

	while (*owner_at(d->p, unit, --r) != d->p->member[from])
		assert(r > 0);
	return r;
}

/* The new member becomes one owner more of the unit: an equal number of runs, from those with most. */
static void join_as_owner(struct deal *d, uint32_t unit, uint32_t joiner, uint32_t k, uint64_t fair)
{
	uint32_t n_runs = d->t->unit[unit].n_runs, want = n_runs / k;
	uint64_t run = d->t->unit[unit].n / n_runs;

	if (n_runs % k && d->total[joiner] + (2 * want + 1) * run / 2 < fair)
		want++;
	while (d->runs[joiner] < want) {
		uint32_t from = richest(d, unit, joiner);

		move_run(d, unit, last_run_of(d, unit, from), from, joiner);
	}
}

/* The new member takes the place of the owner that has most in all, where that brings it nearer to its fair share. */
static void replace_owner(struct deal *d, uint32_t unit, uint32_t joiner, uint64_t fair)
{
	uint64_t share = 0;
	uint32_t from = UINT32_MAX;

	for (uint32_t i = 0; i < d->p->n_members; i++)
		if (i != joiner && d->runs[i] && (from == UINT32_MAX || has_less(d, unit, from, i)))
			from = i;
	for (uint32_t r = 0; r < d->t->unit[unit].n_runs; r++)
		if (*owner_at(d->p, unit, r) == d->p->member[from])
			share += run_elements(d->t, unit, r);
	if (d->total[joiner] + share / 2 > fair || d->total[joiner] + share > d->total[from])
		return;
	while (d->runs[from])
		move_run(d, unit, last_run_of(d, unit, from), from, joiner);
}

int page_map_add(struct page_map *p, const struct unit_table *t, uint32_t member)
{
	uint32_t n = p->n_members, at = 0, joiner;
	uint64_t sum = 0;
	uint32_t *m;
	struct deal d;
	int rc;

	if (member_index(p, member) < n)
		return -EEXIST;
	m = realloc(p->member, (n + 1) * sizeof(*m));
	if (!m)
		return -ENOMEM;
	p->member = m;
	while (at < n && m[at] < member)
		at++;
	memmove(&m[at + 1], &m[at], (n - at) * sizeof(*m));
	m[at] = member;
	p->n_members = n + 1;
	rc = deal_init(&d, p, t);
	if (rc) {
		memmove(&m[at], &m[at + 1], (n - at) * sizeof(*m));
		p->n_members = n;
		return rc;
	}
	joiner = at;
	count_totals(&d);
	/* fair: what it should have once the units so far are dealt, so that the rounding of one levels the others'. */
	for (uint32_t i = 0; i < t->n_units; i++) {
		uint32_t u = d.by_size[i], k = owners_of(p, t, u, n + 1);

		sum += t->unit[u].n;
		count_runs(&d, u);
		if (k > owners_of(p, t, u, n))
			join_as_owner(&d, u, joiner, k, sum / (n + 1));
		else
			replace_owner(&d, u, joiner, sum / (n + 1));
	}
	deal_release(&d);
	return 0;
}

/* Who takes what a leaving owner had of the unit: the fewest runs of it, then the least in all. */
static uint32_t poorest(const struct deal *d, uint32_t unit, uint32_t leaver, bool owners_only)
{
	uint32_t best = UINT32_MAX;

	for (uint32_t i = 0; i < d->p->n_members; i++) {
		if (i == leaver || (d->runs[i] == 0) == owners_only)
			continue;
		if (best == UINT32_MAX || d->runs[i] < d->runs[best] ||
		    (d->runs[i] == d->runs[best] && has_less(d, unit, i, best)))
			best = i;
	}
	return best;
}

static void hand_over(struct deal *d, uint32_t unit, uint32_t leaver)
{
	uint32_t n = d->p->n_members - 1, had = owners_of(d->p, d->t, unit, n + 1);
	bool replaced = owners_of(d->p, d->t, unit, n) == had;
	uint32_t heir = replaced ? poorest(d, unit, leaver, false) : 0;

	for (uint32_t r = 0; r < d->t->unit[unit].n_runs; r++) {
		if (*owner_at(d->p, unit, r) != d->p->member[leaver])
			continue;
		if (!replaced)
			heir = poorest(d, unit, leaver, true);
		move_run(d, unit, r, leaver, heir);
	}
}

int page_map_remove(struct page_map *p, const struct unit_table *t, uint32_t member)
{
	uint32_t leaver = member_index(p, member);
	struct deal d;
	int rc;

	if (leaver == p->n_members)
		return -ENOENT;
	if (p->n_members == 1)
		return -EBUSY;
	rc = deal_init(&d, p, t);
	if (rc)
		return rc;
	count_totals(&d);
	for (uint32_t i = 0; i < t->n_units; i++) {
		count_runs(&d, d.by_size[i]);
		if (d.runs[leaver])
			hand_over(&d, d.by_size[i], leaver);
	}
	deal_release(&d);
	memmove(&p->member[leaver], &p->member[leaver + 1], (p->n_members - leaver - 1) * sizeof(*p->member));
	p->n_members--;
	return 0;
}

void page_map_share(const struct page_map *p, const struct unit_table *t, uint32_t member, uint32_t unit,
		    struct share *out)
{
	struct share_seg *s = NULL;

	out->n_seg = 0;
	out->n = 0;
	for (uint32_t r = 0; r < t->unit[unit].n_runs; r++) {
		uint64_t begin = unit_run_begin(t, unit, r), n = run_elements(t, unit, r);

		if (page_map_owner(p, unit, r) != member)
			continue;
		if (!s || s->unit_offset + s->n != begin) {
			s = &out->seg[out->n_seg++];
			*s = (struct share_seg){ .unit_offset = begin, .share_offset = out->n };
		}
		s->n += n;
		out->n += n;
	}
}

uint64_t page_map_share_bytes(const struct page_map *p, const struct unit_table *t, uint32_t member, uint32_t unit)
{
	uint64_t n = 0;

	assert(unit <= t->n_units);
	for (uint32_t u = 0; u < unit; u++)
		for (uint32_t r = 0; r < t->unit[u].n_runs; r++)
			if (page_map_owner(p, u, r) == member)
				n += run_elements(t, u, r);
	return PARAM_HEADER + n * sizeof(float);
}
