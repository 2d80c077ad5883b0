/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Reading units where memory is not shared: the fabric's side of fetch.c. A
 * unit is read owner by owner, each worker beginning with another owner, so
 * that nobody is everybody's first target; of an owner first the progress word,
 * by a completed read, then its runs in slices. A word that was read once
 * stays true: an owner's progress only grows, so it is read again only when it
 * did not say enough, no more often than WORD_AGAIN_NS.
 *
 * Reads in flight are bounded; what does not fit waits in the unit's cursor
 * (owner, segment, byte) for the next completion.
 */
#include "worker/process.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define READS_MAX 64
#define BATCH 32
#define WORD_AGAIN_NS 300000u
#define WORD_STRIDE CACHE_LINE

/* --------------------------------------------------------------- life cycle */

static int open_memory(struct worker *w, struct err *e)
{
	uint64_t words = (uint64_t)w->n_shards * WORD_STRIDE;
	void *at;
	int rc = fabrics_memory(w, MEMORY_WINDOW, "window", w->plan.window_elements * sizeof(float), &at, e);

	if (rc)
		return rc;
	w->copier.window = at;
	rc = fabrics_memory(w, MEMORY_WORDS, "words", words, &at, e);
	if (!rc)
		w->copier.words = at;
	return rc;
}

static void on_retry(evutil_socket_t fd, short what, void *ctx)
{
	(void)fd;
	(void)what;
	attach_pump(ctx);
}

int copy_open(struct worker *w, struct err *e)
{
	struct copier *c = &w->copier;
	uint32_t n = w->table.n_units;
	struct fetch_config cfg = {
		.n_units = n,
		.window = w->plan.window_elements,
		.prefetch = w->config.zero.stage3_prefetch_bucket_size,
		.reuse = w->config.zero.stage3_max_reuse_distance,
	};

	c->unit_elements = calloc(n, sizeof(*c->unit_elements));
	c->unit = calloc(n, sizeof(*c->unit));
	c->queue = calloc(n, sizeof(*c->queue));
	c->retry = event_new(w->self.base, -1, 0, on_retry, w);
	if (!c->unit_elements || !c->unit || !c->queue || !c->retry)
		return err_set(e, -ENOMEM, "out of memory");
	for (uint32_t i = 0; i < n; i++)
		c->unit_elements[i] = w->table.unit[i].n;
	cfg.unit_elements = c->unit_elements;
	if (fetch_init(&c->fetch, &cfg))
		return err_set(e, -ENOMEM, "out of memory");
	return open_memory(w, e);
}

void copy_release(struct worker *w)
{
	struct copier *c = &w->copier;

	if (c->retry)
		event_free(c->retry);
	fetch_release(&c->fetch);
	free(c->unit_elements);
	free(c->unit);
	free(c->queue);
}

void copy_begin(struct worker *w, const struct granted_lease *l)
{
	unsigned training = l->kind == LEASE_TRAIN;

	fetch_plan(&w->copier.fetch, l->step - 1, w->compute.uses[training], w->compute.n_uses[training]);
}

void copy_cancel(struct worker *w)
{
	fetch_cancel(&w->copier.fetch);
}

/* -------------------------------------------------------------------- reads */

static uint64_t read_word(const struct worker *w, const struct peer *p)
{
	uint64_t word;

	memcpy(&word, w->copier.words + (size_t)p->index * WORD_STRIDE, sizeof(word));
	return word;
}

/* Asks for the owner's progress, now or when it is time again. */
static void want_word(struct worker *w, struct peer *p)
{
	struct fab_op op = {
		.remote = p->parameters,
		.local = p->fabric->region[MEMORY_WORDS],
		.local_offset = (uint64_t)p->index * WORD_STRIDE,
		.bytes = sizeof(uint64_t),
		.user = op_user(OP_WORD, p->index, 0),
	};
	uint64_t now = clock_now_ns();
	struct timeval again = { 0 };

	if (p->word_reading || p->lost)
		return;
	if (now < p->word_again_ns || p->fabric->ops->read(p->ep, &op, 1)) {
		again.tv_usec = WORD_AGAIN_NS / 1000;
		event_add(w->copier.retry, &again);
		return;
	}
	p->word_reading = true;
	p->word_again_ns = now + WORD_AGAIN_NS;
}

/* A batch of slices from the cursor on, within one owner's share; advances the cursor. */
static uint32_t fill_batch(struct worker *w, uint32_t unit, struct peer *p, const struct share *share,
			   struct fab_op *op, uint32_t max)
{
	struct copy_unit *u = &w->copier.unit[unit];
	uint64_t base = page_map_share_bytes(&w->map, &w->table, p->member, unit);
	uint32_t n = 0;

	while (n < max && u->segment < share->n_seg) {
		const struct share_seg *s = &share->seg[u->segment];
		uint64_t left = s->n * sizeof(float) - u->byte;
		uint64_t bytes = left < SLICE_BYTES ? left : SLICE_BYTES;

		op[n++] = (struct fab_op){
			.remote = p->parameters,
			.remote_offset = base + s->share_offset * sizeof(float) + u->byte,
			.local = p->fabric->region[MEMORY_WINDOW],
			.local_offset = (u->offset + s->unit_offset) * sizeof(float) + u->byte,
			.bytes = bytes,
			.user = op_user(OP_UNIT, unit, p->index),
		};
		u->byte += bytes;
		if (u->byte == s->n * sizeof(float)) {
			u->byte = 0;
			u->segment++;
		}
	}
	return n;
}

/* Posts an owner's share as far as there is room. True: all of it is posted. */
static bool post_share(struct worker *w, uint32_t unit, struct peer *p)
{
	struct copier *c = &w->copier;
	struct copy_unit *u = &c->unit[unit];
	struct share share;

	page_map_share(&w->map, &w->table, p->member, unit, &share);
	while (u->segment < share.n_seg && c->reads < READS_MAX) {
		struct copy_unit before = *u;
		uint32_t room = READS_MAX - c->reads;
		struct fab_op op[BATCH];
		uint32_t n = fill_batch(w, unit, p, &share, op, room < BATCH ? room : BATCH);
		int rc = p->fabric->ops->read(p->ep, op, n);

		if (rc) {
			*u = before;
			if (rc != -EAGAIN)
				attach_lost(p, strerror(-rc));
			return false;
		}
		for (uint32_t i = 0; i < n; i++)
			count(&w->counters.fetch_bytes, op[i].bytes);
		u->reads += n;
		c->reads += n;
	}
	return u->segment == share.n_seg;
}

static struct peer *owner_at(struct worker *w, uint32_t unit, uint32_t k)
{
	uint32_t n = w->attach.n_owners[unit];

	return &w->attach.peer[attach_owners(&w->attach, unit)[(k + w->self.member) % n]];
}

/* Posts what may be posted of a unit. *waits_for: whose progress it needs. True: nothing is left to post. */
static bool post_unit(struct worker *w, uint32_t unit, uint32_t *waits_for)
{
	struct copy_unit *u = &w->copier.unit[unit];
	uint32_t version = (uint32_t)w->copier.fetch.version;

	while (!u->status && u->owner < w->attach.n_owners[unit]) {
		struct peer *p = owner_at(w, unit, u->owner);

		if (fetch_is_doomed(&w->copier.fetch, unit)) {
			u->status = -ECANCELED;
			break;
		}
		switch (fab_progress_check(p->word, (uint16_t)w->self.branch, version, (uint16_t)unit)) {
		case FAB_PASSED:
			u->status = -ESTALE;
			break;
		case FAB_NOT_YET:
			*waits_for = p->member;
			want_word(w, p);
			return false;
		case FAB_READY:
			if (p->lost || !post_share(w, unit, p))
				return false;
			u->owner++;
			u->segment = 0;
			break;
		}
	}
	return true;
}

static void start_unit(struct worker *w, const struct fetch_action *a)
{
	struct copier *c = &w->copier;

	assert(!c->unit[a->unit].active);
	c->unit[a->unit] = (struct copy_unit){ .active = true, .offset = a->offset };
	c->queue[c->n_queue++] = a->unit;
	count(&w->counters.fetch_units, 1);
}

static void tell_use(struct worker *w, uint32_t use)
{
	const float *window = w->copier.window;
	const struct use *u = &w->copier.fetch.uses[use];
	struct task t = { .kind = TASK_USE, .lease = w->span.lease.id, .use = use };

	for (uint32_t i = 0; i < u->n; i++)
		t.params[i] = window + w->copier.fetch.unit[u->unit[i]].offset;
	control_task(w, &t);
}

/* What the state machine wants next. True: something was done. */
static bool take_actions(struct worker *w)
{
	struct fetch_action a;
	bool any = false;

	while (fetch_next(&w->copier.fetch, &a)) {
		struct task failed = { .kind = TASK_FAILED, .lease = w->span.lease.id };

		any = true;
		switch (a.type) {
		case FETCH_READ:
			start_unit(w, &a);
			break;
		case FETCH_USE:
			tell_use(w, a.use);
			break;
		case FETCH_FAILED:
			failed.unit = a.unit;
			failed.status = a.status;
			control_task(w, &failed);
			break;
		}
	}
	return any;
}

/* Posts for every unit being read, oldest first, and ends those that are complete. */
static bool advance_units(struct worker *w)
{
	struct copier *c = &w->copier;
	uint32_t left = 0, waits_for = 0;
	bool any = false;

	for (uint32_t i = 0; i < c->n_queue; i++) {
		uint32_t unit = c->queue[i];
		struct copy_unit *u = &c->unit[unit];

		if (!post_unit(w, unit, &waits_for) || u->reads > 0) {
			c->queue[left++] = unit;
			continue;
		}
		u->active = false;
		fetch_arrived(&c->fetch, unit, u->status);
		any = true;
	}
	c->n_queue = left;
	atomic_store_explicit(&c->waits_for, waits_for, memory_order_relaxed);
	return any;
}

void copy_run(struct worker *w)
{
	bool again = w->copier.window != NULL;

	while (again) {
		again = take_actions(w);
		again |= advance_units(w);
	}
}

void copy_event(struct worker *w, const struct fab_event *ev)
{
	struct copier *c = &w->copier;
	bool word = op_kind(ev->user) == OP_WORD;
	struct peer *p = &w->attach.peer[word ? op_a(ev->user) : op_b(ev->user)];

	if (word) {
		p->word_reading = false;
		if (!ev->status)
			p->word = read_word(w, p);
	} else {
		assert(c->unit[op_a(ev->user)].reads > 0);
		c->unit[op_a(ev->user)].reads--;
		c->reads--;
		if (ev->status)
			c->unit[op_a(ev->user)].status = ev->status;
	}
	if (ev->status && !p->lost)
		attach_lost(p, strerror(-ev->status));
}
