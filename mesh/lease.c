/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A lease is an aligned span of micro-batches. Which worker has it is known to
 * the coordinator; here are only those that nobody has. A span that comes back
 * is open micro-batches again and may be cut differently the next time, so
 * nothing about spans is remembered.
 */
#include "mesh/lease.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

static size_t words(uint32_t n)
{
	return ((size_t)n + 63) / 64;
}

int lease_table_init(struct lease_table *t, uint32_t n_micro, uint32_t n_eval)
{
	memset(t, 0, sizeof(*t));
	for (int kind = LEASE_TRAIN; kind <= LEASE_EVAL; kind++) {
		size_t n = words(kind == LEASE_TRAIN ? n_micro : n_eval) + 1;

		t->set[kind].open = calloc(n, sizeof(uint64_t));
		t->set[kind].starved = calloc(n, sizeof(uint64_t));
		if (!t->set[kind].open || !t->set[kind].starved) {
			lease_table_release(t);
			return -ENOMEM;
		}
	}
	return 0;
}

void lease_table_release(struct lease_table *t)
{
	for (int kind = LEASE_TRAIN; kind <= LEASE_EVAL; kind++) {
		free(t->set[kind].open);
		free(t->set[kind].starved);
	}
}

static void span_set_open(struct span_set *s, uint32_t n)
{
	memset(s->open, 0xff, words(n) * sizeof(uint64_t));
	memset(s->starved, 0, words(n) * sizeof(uint64_t));
	if (n % 64)
		s->open[n / 64] = (1ull << n % 64) - 1;
	s->n = s->n_open = n;
	s->low = 0;
	s->any_starved = false;
}

void lease_table_open(struct lease_table *t, uint32_t n_micro, uint32_t n_eval)
{
	span_set_open(&t->set[LEASE_TRAIN], n_micro);
	span_set_open(&t->set[LEASE_EVAL], n_eval);
}

static bool is_open(const struct span_set *s, uint32_t leaf)
{
	return s->open[leaf / 64] >> leaf % 64 & 1;
}

static bool all_open(const struct span_set *s, uint32_t from, uint32_t to)
{
	while (from < to && is_open(s, from))
		from++;
	return from >= to;
}

static void mark(struct span_set *s, struct tree_node n, bool open)
{
	uint32_t leaves = tree_leaves(n, s->n);

	for (uint32_t leaf = n.first; leaf < n.first + leaves; leaf++) {
		assert(is_open(s, leaf) != open);
		s->open[leaf / 64] ^= 1ull << leaf % 64;
	}
	s->n_open = open ? s->n_open + leaves : s->n_open - leaves;
	if (open && n.first < s->low)
		s->low = n.first;
}

bool lease_lowest(struct lease_table *t, enum lease_kind kind, uint32_t *leaf)
{
	struct span_set *s = &t->set[kind];

	if (!s->n_open)
		return false;
	while (!s->open[s->low / 64])
		s->low = (s->low / 64 + 1) * 64;
	*leaf = s->low / 64 * 64 + (uint32_t)__builtin_ctzll(s->open[s->low / 64]);
	return true;
}

/* Of n micro-batches in spans of `length`, dealt out in turn: those of the worker that gets most. */
static uint64_t busiest(uint64_t n, uint64_t n_workers, uint64_t length)
{
	uint64_t spans = (n + length - 1) / length, rounds = (spans + n_workers - 1) / n_workers;
	uint64_t missing = spans * length - n; /* of the last span */

	/* The last span counts where only one worker has as many spans as its holder. */
	return rounds * length - (spans - (rounds - 1) * n_workers == 1 ? missing : 0);
}

uint32_t lease_longest(uint32_t n, uint32_t n_workers, uint32_t max_span)
{
	uint64_t fair = busiest(n, n_workers, 1), best = 1;

	for (uint64_t length = 2; length <= max_span && length < 2ull * n; length *= 2)
		if (busiest(n, n_workers, length) <= fair)
			best = length;
	return (uint32_t)best;
}

static bool take(struct lease_table *t, enum lease_kind kind, uint32_t n_workers, uint32_t max_span, struct lease *out)
{
	struct span_set *s = &t->set[kind];
	struct tree_node n = { 0, 0 };
	uint32_t longest;

	if (!lease_lowest(t, kind, &n.first))
		return false;
	longest = lease_longest(s->n, n_workers, max_span);
	while (2ull << n.level <= longest) {
		uint64_t half = n.first + (1ull << n.level), end = n.first + (2ull << n.level);

		end = end < s->n ? end : s->n;
		if (n.first >> n.level & 1 || half >= s->n || !all_open(s, (uint32_t)half, (uint32_t)end))
			break;
		n.level++;
	}
	mark(s, n, false);
	out->kind = kind;
	out->node = n;
	return true;
}

bool lease_take(struct lease_table *t, uint32_t n_workers, uint32_t max_span, uint32_t worker, struct lease *out)
{
	assert(n_workers > 0 && max_span > 0);
	if (!take(t, LEASE_TRAIN, n_workers, max_span, out) && !take(t, LEASE_EVAL, n_workers, max_span, out))
		return false;
	out->id = ++t->last_id;
	out->worker = worker;
	out->recalled = false;
	return true;
}

void lease_reopen(struct lease_table *t, const struct lease *l)
{
	mark(&t->set[l->kind], l->node, true);
}

void lease_starve(struct lease_table *t, uint32_t leaf)
{
	struct span_set *s = &t->set[LEASE_TRAIN];

	s->starved[leaf / 64] |= 1ull << leaf % 64;
	s->any_starved = true;
}

bool lease_starving(const struct lease_table *t)
{
	const struct span_set *s = &t->set[LEASE_TRAIN];

	if (!s->any_starved || !s->n_open)
		return false;
	for (size_t i = 0; i < words(s->n); i++)
		if (s->open[i] & s->starved[i])
			return true;
	return false;
}
