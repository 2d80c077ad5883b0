/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The clock of meshctl bench fabric. A cell keeps `depth` operations of one
 * size in flight for some time: what completes in a poll is posted again in one
 * batch, with one look at the clock for all of it. Latency is from posting to
 * the poll that saw the completion, so at depths above one it includes the
 * queue. It is kept in buckets of 1/32 of a power of two.
 */
#include "meshctl/bench.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>

#define EVENTS 64
#define DEPTH_MAX 1024
#define SUB_BITS 5
#define BUCKETS ((64 - SUB_BITS + 1) << SUB_BITS)
#define STALL_NS 60000000000ull
#define TURN_EVERY 4096  /* empty polls between two looks at the control connections */
#define SLEEP_AFTER 1000 /* empty polls, then as a member does: on the descriptor */
#define SLICE (512u << 10)
#define READS_MAX 64 /* in flight, as a worker keeps them */
#define RUNS_MAX 64  /* a unit is cut into */

/* ------------------------------------------------------------------ histogram */

struct histogram {
	uint64_t n, max, bucket[BUCKETS];
};

static uint32_t bucket_of(uint64_t ns)
{
	uint32_t top;

	if (ns < 1u << SUB_BITS)
		return (uint32_t)ns;
	top = 63 - (uint32_t)__builtin_clzll(ns);
	return ((top - SUB_BITS + 1) << SUB_BITS) + (uint32_t)(ns >> (top - SUB_BITS) & ((1u << SUB_BITS) - 1));
}

static double bucket_us(uint32_t i)
{
	uint32_t shift = i >> SUB_BITS ? (i >> SUB_BITS) - 1 : 0;
	uint64_t low = i >> SUB_BITS ? (uint64_t)((1u << SUB_BITS) + (i & ((1u << SUB_BITS) - 1))) << shift : i;

	return (double)low / 1000.0;
}

static void add(struct histogram *h, uint64_t ns)
{
	h->bucket[bucket_of(ns)]++;
	h->n++;
	if (ns > h->max)
		h->max = ns;
}

static double quantile(const struct histogram *h, double q)
{
	uint64_t want = (uint64_t)((double)h->n * q), seen = 0;

	for (uint32_t i = 0; i < BUCKETS; i++) {
		seen += h->bucket[i];
		if (seen > want)
			return bucket_us(i);
	}
	return (double)h->max / 1000.0;
}

/* ----------------------------------------------------------------------- cells */

struct run {
	struct bench_join *j;
	const struct bench_cell *cell;
	struct fab_op op[DEPTH_MAX]; /* by slot */
	uint64_t posted_ns[DEPTH_MAX];
	uint32_t due[DEPTH_MAX], n_due; /* slots to post */
	uint32_t in_flight;
	uint64_t done;
	struct histogram latency;
};

static void lay_out(struct run *r)
{
	struct bench_peer *p = &r->j->peer[0];
	uint64_t slots = r->j->config->memory / r->cell->bytes;

	for (uint32_t i = 0; i < r->cell->depth; i++) {
		r->op[i] = (struct fab_op){
			.remote = r->cell->push ? p->inbox : p->parameters,
			.remote_offset = i % slots * r->cell->bytes,
			.local = r->j->local,
			.local_offset = i % slots * r->cell->bytes,
			.bytes = r->cell->bytes,
			.user = i,
			.imm = i,
		};
		r->due[r->n_due++] = i;
	}
}

static int post_due(struct run *r, uint64_t now)
{
	struct bench_peer *p = &r->j->peer[0];
	const struct fab_ops *ops = r->j->ops;
	struct fab_op batch[FAB_BATCH_MAX];
	uint32_t n = r->n_due < FAB_BATCH_MAX ? r->n_due : FAB_BATCH_MAX;
	int rc;

	for (uint32_t i = 0; i < n; i++)
		batch[i] = r->op[r->due[r->n_due - 1 - i]];
	rc = r->cell->push ? ops->write_notify(p->ep, batch, n) : ops->read(p->ep, batch, n);
	/* Too much at once for it: fewer. */
	if (rc == -EAGAIN && r->in_flight == 0 && n > 1) {
		n = 1;
		rc = r->cell->push ? ops->write_notify(p->ep, batch, n) : ops->read(p->ep, batch, n);
	}
	if (rc)
		return rc == -EAGAIN ? 0 : rc;
	for (uint32_t i = 0; i < n; i++)
		r->posted_ns[batch[i].user] = now;
	r->n_due -= n;
	r->in_flight += n;
	return 0;
}

static int take(struct run *r, const struct fab_event *ev, uint64_t now)
{
	if (ev->type != FAB_EV_READ && ev->type != FAB_EV_WRITE) {
		bench_join_event(r->j, ev);
		return 0;
	}
	if (ev->status)
		return ev->status;
	add(&r->latency, now - r->posted_ns[ev->user]);
	r->due[r->n_due++] = (uint32_t)ev->user;
	r->in_flight--;
	r->done++;
	return 0;
}

static int one_poll(struct run *r, uint32_t *empty, uint64_t *now)
{
	struct fab_event ev[EVENTS];
	uint32_t n = r->j->ops->poll(r->j->fab, ev, EVENTS);
	int rc = 0;

	*now = clock_now_ns();
	for (uint32_t i = 0; i < n && !rc; i++)
		rc = take(r, &ev[i], *now);
	*empty = n ? 0 : *empty + 1;
	if (*empty >= SLEEP_AFTER && r->j->ops->arm(r->j->fab)) {
		struct pollfd fd = { .fd = r->j->ops->fd(r->j->fab), .events = POLLIN };

		(void)poll(&fd, 1, 1);
	}
	if (!rc && *empty % TURN_EVERY == TURN_EVERY - 1) {
		bench_join_turn(r->j);
		rc = r->j->lost[0] ? -ECONNRESET : 0;
	}
	return rc;
}

/* Until `end`; with `end` 0 until nothing is in flight. */
static int run_until(struct run *r, uint64_t end, uint64_t *now)
{
	uint64_t moved = clock_now_ns();
	uint32_t empty = 0;
	int rc = 0;

	*now = moved;
	while (!rc && (end ? *now < end : r->in_flight > 0)) {
		if (end && r->n_due)
			rc = post_due(r, *now);
		if (!rc)
			rc = one_poll(r, &empty, now);
		if (!empty)
			moved = *now;
		else if (*now - moved > STALL_NS)
			rc = -ETIMEDOUT;
	}
	return rc;
}

static void result_of(const struct run *r, double seconds, struct bench_result *out)
{
	*out = (struct bench_result){
		.gb_per_s = (double)r->done * (double)r->cell->bytes / seconds / 1e9,
		.messages_per_s = (double)r->done / seconds,
		.p50_us = quantile(&r->latency, 0.5),
		.p99_us = quantile(&r->latency, 0.99),
		.p999_us = quantile(&r->latency, 0.999),
		.max_us = (double)r->latency.max / 1000.0,
	};
}

static int failed(const struct bench_join *j, int rc, struct err *e)
{
	return err_set(e, rc, "%s", j->lost[0] ? j->lost : strerror(-rc));
}

int bench_cell_run(struct bench_join *j, const struct bench_cell *c, struct bench_result *out, struct err *e)
{
	uint64_t ns = (uint64_t)(c->seconds * 1e9), began, now;
	struct run *r;
	int rc;

	if (c->bytes == 0 || c->bytes > j->config->memory)
		return err_set(e, -EINVAL, "%llu bytes do not fit the memory of %llu", (unsigned long long)c->bytes,
			       (unsigned long long)j->config->memory);
	if (c->depth == 0 || c->depth > DEPTH_MAX)
		return err_set(e, -EINVAL, "a depth of %u: expected 1 to %u", c->depth, DEPTH_MAX);
	r = calloc(1, sizeof(*r));
	if (!r)
		return err_set(e, -ENOMEM, "out of memory");
	r->j = j;
	r->cell = c;
	lay_out(r);
	rc = run_until(r, clock_now_ns() + ns / 10, &now);
	began = now;
	r->done = 0;
	memset(&r->latency, 0, sizeof(r->latency));
	if (!rc)
		rc = run_until(r, began + ns, &now);
	result_of(r, clock_seconds(now - began), out);
	if (!rc)
		rc = run_until(r, 0, &now);
	free(r);
	return rc ? failed(j, rc, e) : 0;
}

/* ----------------------------------------------------------------------- pages */

struct piece {
	uint32_t peer;
	struct fab_op op;
};
struct plan {
	uint32_t n;
	struct piece *piece;
};

static void add_piece(struct plan *p, struct bench_join *j, uint32_t peer, uint64_t remote, uint64_t local,
		      uint64_t bytes)
{
	for (uint64_t at = 0; at < bytes; at += SLICE) {
		p->piece[p->n++] = (struct piece){
			.peer = peer,
			.op = { .remote = j->peer[peer].parameters,
				.remote_offset = remote + at,
				.local = j->local,
				.local_offset = local + at,
				.bytes = bytes - at < SLICE ? bytes - at : SLICE },
		};
	}
}

/* Owner after owner, as a worker asks them; an owner's runs lie in its memory one behind the other. */
static int plan_pages(struct bench_join *j, const struct bench_pages *b, uint64_t run, struct plan *p)
{
	uint64_t n_runs = (b->unit_bytes + run - 1) / run;

	p->piece = calloc(b->unit_bytes / SLICE + n_runs + 1, sizeof(*p->piece));
	if (!p->piece)
		return -ENOMEM;
	for (uint32_t peer = 0; peer < j->n_peers; peer++) {
		uint64_t remote = 0;

		for (uint64_t i = peer; i < n_runs; i += j->n_peers) {
			uint64_t left = b->unit_bytes - i * run, bytes = left < run ? left : run;

			add_piece(p, j, peer, remote, i * run, bytes);
			remote += bytes;
		}
	}
	return 0;
}

static int plan_contiguous(struct bench_join *j, const struct bench_pages *b, struct plan *p)
{
	p->piece = calloc(b->unit_bytes / SLICE + 1, sizeof(*p->piece));
	if (!p->piece)
		return -ENOMEM;
	add_piece(p, j, 0, 0, 0, b->unit_bytes);
	return 0;
}

static int read_once(struct bench_join *j, const struct plan *p, uint64_t *ns)
{
	uint64_t began = clock_now_ns();
	uint32_t posted = 0, done = 0;
	struct fab_event ev[EVENTS];
	int rc = 0;

	while (done < p->n && !rc) {
		uint32_t n;

		while (posted < p->n && posted - done < READS_MAX && !rc) {
			rc = j->ops->read(j->peer[p->piece[posted].peer].ep, &p->piece[posted].op, 1);
			posted += !rc;
		}
		if (rc == -EAGAIN)
			rc = 0;
		n = j->ops->poll(j->fab, ev, EVENTS);
		for (uint32_t i = 0; i < n && !rc; i++) {
			if (ev[i].type == FAB_EV_READ) {
				rc = ev[i].status;
				done++;
			} else {
				bench_join_event(j, &ev[i]);
			}
		}
		if (n == 0 && clock_now_ns() - began > STALL_NS)
			rc = -ETIMEDOUT;
	}
	*ns = clock_now_ns() - began;
	return rc;
}

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

#define ROUNDS_MAX 4096

/* The two in turns, so that what else the host does falls on both. */
static int measure(struct bench_join *j, const struct bench_pages *b, const struct plan plan[2],
		   struct bench_pages_result *out)
{
	double(*rate)[ROUNDS_MAX] = calloc(2, sizeof(*rate));
	uint64_t end = clock_now_ns() + (uint64_t)(b->seconds * 1e9), ns;
	uint32_t n = 0;
	int rc = rate ? 0 : -ENOMEM;

	for (int k = 0; k < 2 && !rc; k++)
		rc = read_once(j, &plan[k], &ns);
	while (!rc && n < ROUNDS_MAX && (n == 0 || clock_now_ns() < end)) {
		for (int k = 0; k < 2 && !rc; k++) {
			rc = read_once(j, &plan[k], &ns);
			rate[k][n] = (double)b->unit_bytes / (double)ns;
		}
		n++;
		bench_join_turn(j);
	}
	if (!rc) {
		qsort(rate[0], n, sizeof(double), by_value);
		qsort(rate[1], n, sizeof(double), by_value);
		out->pages_gb_per_s = rate[0][n / 2];
		out->contiguous_gb_per_s = rate[1][n / 2];
	}
	free(rate);
	return rc;
}

int bench_pages_run(struct bench_join *j, const struct bench_pages *b, struct bench_pages_result *out, struct err *e)
{
	uint64_t n_pages = (b->unit_bytes + b->page - 1) / b->page;
	uint64_t run = (n_pages + RUNS_MAX - 1) / RUNS_MAX * b->page;
	struct plan plan[2] = { { 0 } };
	int rc;

	if (b->unit_bytes > j->config->memory)
		return err_set(e, -EINVAL, "a unit of %llu bytes does not fit the memory of %llu",
			       (unsigned long long)b->unit_bytes, (unsigned long long)j->config->memory);
	out->runs = (uint32_t)((b->unit_bytes + run - 1) / run);
	rc = plan_pages(j, b, run, &plan[0]);
	if (!rc)
		rc = plan_contiguous(j, b, &plan[1]);
	if (!rc)
		rc = measure(j, b, plan, out);
	free(plan[0].piece);
	free(plan[1].piece);
	return rc ? failed(j, rc, e) : 0;
}
