/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Reading units where memory is not shared: the fabric's side of fetch.c. A
 * unit is read owner by owner, each worker beginning with another owner, so
 * that nobody is everybody's first target; of an owner first the progress word,
 * by a completed read, then its runs in slices. A word that was read once
 * stays true: an owner's progress only grows, so it is read again only when it
 * did not say enough, no more often than WORD_AGAIN_NS.
 *
 * Reads in flight are bounded; what does not fit waits in the portion's cursor
 * (owner, segment, byte) for the next completion.
 *
 * Where neighbours share their reads (neighbours.c), a unit is cut into
 * portions, and each is read over the network by the one worker of the host
 * that claims it (board.c) and copied from its window by the others. A worker
 * begins with a portion of its own, and claims no more than it can post, so that
 * the work spreads by itself. Nobody depends on a neighbour: what one claimed
 * and does not bring in time is read by whoever needs it, which gives the same
 * bytes; the time is DEADLINE_NS, or longer where our own reads take long. A portion
 * that has nothing of a far owner is not worth a claim.
 *
 * Copies are made here, a piece at a time, since they are memory to memory.
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
#define PORTION_BYTES_MIN (512u << 10)
#define LOOK_AGAIN_NS 100000u
#define DEADLINE_NS 100000000u
#define DEADLINE_FACTOR 4
#define COPY_TURN_BYTES (2u << 20)

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

/* Who owns something of each portion. */
static void cut_owners(struct worker *w, uint32_t unit)
{
	struct copy_cut *cut = &w->copier.cut[unit];
	struct share share;

	assert(w->attach.n_owners[unit] <= 64);
	for (uint32_t k = 0; k < w->attach.n_owners[unit]; k++) {
		const struct peer *p = &w->attach.peer[attach_owners(&w->attach, unit)[k]];

		page_map_share(&w->map, &w->table, p->member, unit, &share);
		for (uint32_t i = 0; i < share.n_seg; i++) {
			uint64_t first = share.seg[i].unit_offset / cut->elements;
			uint64_t last = (share.seg[i].unit_offset + share.seg[i].n - 1) / cut->elements;

			for (uint64_t s = first; s <= last; s++) {
				cut->owners[s] |= (uint64_t)1 << k;
				cut->network[s] |= peer_is_far(p);
			}
		}
	}
}

/* A function of the unit alone, so that neighbours agree. */
static void cut_units(struct worker *w)
{
	for (uint32_t u = 0; u < w->table.n_units; u++) {
		struct copy_cut *cut = &w->copier.cut[u];
		uint64_t n = w->table.unit[u].n;

		cut->elements = n;
		if (w->neighbours.on) {
			uint64_t least = PORTION_BYTES_MIN / sizeof(float),
				 even = (n + BOARD_PORTIONS - 1) / BOARD_PORTIONS;

			cut->elements = round_up_u64(even > least ? even : least, w->table.page);
		}
		cut->n = (uint32_t)((n + cut->elements - 1) / cut->elements);
		cut_owners(w, u);
	}
}

/* fetch.c's question, whether a unit's place may be used for something else. */
static bool leave(void *ctx, uint32_t unit)
{
	struct worker *w = ctx;

	board_withdraw(&w->neighbours.boards, unit);
	return board_is_free(&w->neighbours.boards, unit);
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
		.ctx = w,
	};
	int rc;

	c->unit_elements = calloc(n, sizeof(*c->unit_elements));
	c->unit = calloc(n, sizeof(*c->unit));
	c->cut = calloc(n, sizeof(*c->cut));
	c->queue = calloc(n, sizeof(*c->queue));
	c->retry = event_new(w->self.base, -1, 0, on_retry, w);
	if (!c->unit_elements || !c->unit || !c->cut || !c->queue || !c->retry)
		return err_set(e, -ENOMEM, "out of memory");
	for (uint32_t i = 0; i < n; i++)
		c->unit_elements[i] = w->table.unit[i].n;
	rc = open_memory(w, e);
	if (rc)
		return rc;
	/* With the window it is settled whether others may see it. */
	cut_units(w);
	cfg.unit_elements = c->unit_elements;
	cfg.leave = w->neighbours.on ? leave : NULL;
	return fetch_init(&c->fetch, &cfg) ? err_set(e, -ENOMEM, "out of memory") : 0;
}

void copy_release(struct worker *w)
{
	struct copier *c = &w->copier;

	if (c->retry)
		event_free(c->retry);
	fetch_release(&c->fetch);
	free(c->unit_elements);
	free(c->unit);
	free(c->cut);
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

/* Something has to be looked at again though no event will say so. */
static void look_again(struct worker *w, uint64_t in_ns)
{
	uint64_t at = clock_now_ns() + in_ns;

	if (!w->copier.again_ns || at < w->copier.again_ns)
		w->copier.again_ns = at;
}

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

	if (p->word_reading || p->lost)
		return;
	if (now < p->word_again_ns || p->fabric->ops->read(p->ep, &op, 1)) {
		look_again(w, WORD_AGAIN_NS);
		return;
	}
	p->word_reading = true;
	p->word_again_ns = now + WORD_AGAIN_NS;
}

/* The k-th owner, each worker beginning with another. NULL: it has nothing of the portion. */
static struct peer *owner_at(struct worker *w, uint32_t unit, uint32_t s, uint32_t k)
{
	uint32_t at = (k + w->self.member) % w->attach.n_owners[unit];

	if (!(w->copier.cut[unit].owners[s] >> at & 1))
		return NULL;
	return &w->attach.peer[attach_owners(&w->attach, unit)[at]];
}

/* Has the owner the unit at our version? */
static enum fab_ready progress(struct worker *w, uint32_t unit, struct peer *p, uint32_t *waits_for)
{
	enum fab_ready ready = fab_progress_check(p->word, (uint16_t)w->self.branch, (uint32_t)w->copier.fetch.version,
						  (uint16_t)unit);

	if (ready == FAB_NOT_YET) {
		*waits_for = p->member;
		want_word(w, p);
	}
	return ready;
}

/* A batch of slices from the cursor on, within one owner's share of the portion; advances the cursor. */
static uint32_t fill_batch(struct worker *w, uint32_t unit, uint32_t s, struct peer *p, const struct share *share,
			   struct fab_op *op, uint32_t max)
{
	const struct copy_cut *cut = &w->copier.cut[unit];
	struct copy_portion *at = &w->copier.unit[unit].portion[s];
	uint64_t base = page_map_share_bytes(&w->map, &w->table, p->member, unit), n_ops = 0;
	uint64_t begin = s * cut->elements, end = begin + cut->elements;

	while (n_ops < max && at->segment < share->n_seg) {
		const struct share_seg *seg = &share->seg[at->segment];
		uint64_t from = seg->unit_offset > begin ? seg->unit_offset : begin;
		uint64_t to = seg->unit_offset + seg->n < end ? seg->unit_offset + seg->n : end;
		uint64_t left = to > from ? (to - from) * sizeof(float) - at->byte : 0;
		uint64_t bytes = left < SLICE_BYTES ? left : SLICE_BYTES;

		if (bytes)
			op[n_ops++] = (struct fab_op){
				.remote = p->parameters,
				.remote_offset = base + (seg->share_offset + from - seg->unit_offset) * sizeof(float) +
						 at->byte,
				.local = p->fabric->region[MEMORY_WINDOW],
				.local_offset = (w->copier.unit[unit].offset + from) * sizeof(float) + at->byte,
				.bytes = bytes,
				.user = op_user(OP_UNIT, unit, s << 16 | p->index),
			};
		at->byte += bytes;
		if (bytes == left) {
			at->byte = 0;
			at->segment++;
		}
	}
	return (uint32_t)n_ops;
}

static void count_reads(struct worker *w, const struct peer *p, const struct copy_portion *at, const struct fab_op *op,
			uint32_t n)
{
	uint64_t bytes = 0;

	for (uint32_t i = 0; i < n; i++)
		bytes += op[i].bytes;
	count(&w->counters.fetch_bytes, bytes);
	if (peer_is_far(p))
		count(&w->counters.network_bytes, bytes);
	if (peer_is_far(p) && at->seized)
		count(&w->counters.seized_bytes, bytes);
}

/* Posts an owner's share as far as there is room. True: all of it is posted. */
static bool post_share(struct worker *w, uint32_t unit, uint32_t s, struct peer *p)
{
	struct copier *c = &w->copier;
	struct copy_portion *at = &c->unit[unit].portion[s];
	struct share share;

	page_map_share(&w->map, &w->table, p->member, unit, &share);
	while (at->segment < share.n_seg && c->reads < READS_MAX) {
		struct copy_portion before = *at;
		uint32_t room = READS_MAX - c->reads;
		struct fab_op op[BATCH];
		uint32_t n = fill_batch(w, unit, s, p, &share, op, room < BATCH ? room : BATCH);
		int rc = n ? p->fabric->ops->read(p->ep, op, n) : 0;

		if (rc) {
			*at = before;
			if (rc != -EAGAIN)
				attach_lost(p, strerror(-rc));
			return false;
		}
		count_reads(w, p, at, op, n);
		at->reads += n;
		c->unit[unit].reads += n;
		c->reads += n;
	}
	return at->segment == share.n_seg;
}

/* Posts what may be posted of a portion. */
static void post_portion(struct worker *w, uint32_t unit, uint32_t s, uint32_t *waits_for)
{
	struct copy_unit *u = &w->copier.unit[unit];
	struct copy_portion *at = &u->portion[s];

	while (!u->status && at->owner < w->attach.n_owners[unit]) {
		struct peer *p = owner_at(w, unit, s, at->owner);

		if (p) {
			enum fab_ready ready = progress(w, unit, p, waits_for);

			if (ready == FAB_PASSED)
				u->status = -ESTALE;
			if (ready != FAB_READY || p->lost || !post_share(w, unit, s, p))
				return;
		}
		at->owner++;
		at->segment = 0;
	}
	if (!u->status) {
		at->posted = true;
		w->copier.unposted--;
	}
}

static void begin_read(struct worker *w, struct copy_portion *at)
{
	at->state = COPY_READING;
	at->since_ns = clock_now_ns();
	w->copier.unposted++;
}

/* ----------------------------------------------------------------- sharing */

/* Have all owners of the portion our version? */
static bool owners_ready(struct worker *w, uint32_t unit, uint32_t s, uint32_t *waits_for)
{
	bool all = true;

	for (uint32_t k = 0; k < w->attach.n_owners[unit]; k++) {
		struct peer *p = owner_at(w, unit, s, k);
		enum fab_ready ready = p ? progress(w, unit, p, waits_for) : FAB_READY;

		if (ready == FAB_PASSED)
			w->copier.unit[unit].status = -ESTALE;
		all &= ready == FAB_READY;
	}
	return all;
}

/* No more than can be posted is taken away from the neighbours. */
static bool may_read(struct worker *w, uint32_t unit, uint32_t s, uint32_t *waits_for)
{
	return w->copier.unposted == 0 && w->copier.reads < READS_MAX && owners_ready(w, unit, s, waits_for);
}

static void wait_for_neighbour(struct worker *w, uint32_t unit, uint32_t s, uint32_t *waits_for)
{
	struct copy_portion *at = &w->copier.unit[unit].portion[s];
	uint64_t now = clock_now_ns(), deadline = DEADLINE_FACTOR * w->copier.slowest_ns;

	if (!at->since_ns) {
		at->since_ns = now;
		count(&w->counters.waited, 1);
	}
	look_again(w, LOOK_AGAIN_NS);
	if (now - at->since_ns < (deadline > DEADLINE_NS ? deadline : DEADLINE_NS) || !may_read(w, unit, s, waits_for))
		return;
	board_seize(&w->neighbours.boards, unit, s, w->copier.fetch.version);
	count(&w->counters.seized, 1);
	at->seized = true;
	begin_read(w, at);
}

/* What another process writes is not believed: the unit lies inside its window, or it is read from its owners. */
static bool is_inside(const struct worker *w, const struct neighbour *n, uint32_t unit, const struct board_mark *m)
{
	uint64_t bytes = w->table.unit[unit].n * sizeof(float);

	return bytes <= n->window_bytes && m->offset <= n->window_bytes - bytes;
}

static void take_from(struct worker *w, uint32_t unit, uint32_t s, uint32_t who, uint32_t *waits_for)
{
	struct boards *b = &w->neighbours.boards;
	struct copy_portion *at = &w->copier.unit[unit].portion[s];
	const struct neighbour *n = neighbours_of(w, b->theirs[who]);

	if (!n->attached) {
		wait_for_neighbour(w, unit, s, waits_for);
	} else if (board_mark(b, who, unit, s, w->copier.fetch.version, &at->mark)) {
		look_again(w, LOOK_AGAIN_NS);
	} else if (!is_inside(w, n, unit, &at->mark)) {
		board_unmark(b, &at->mark);
		wait_for_neighbour(w, unit, s, waits_for);
	} else {
		at->state = COPY_NEIGHBOUR;
		at->copied = 0;
	}
}

/* Nobody has it, nobody reads it: do we? */
static void claim_portion(struct worker *w, uint32_t unit, uint32_t s, uint32_t *waits_for)
{
	uint32_t who;

	if (!may_read(w, unit, s, waits_for))
		return;
	if (board_claim(&w->neighbours.boards, unit, s, w->copier.fetch.version, &who) != CLAIM_OURS) {
		look_again(w, LOOK_AGAIN_NS);
		return;
	}
	count(&w->counters.claimed, 1);
	begin_read(w, &w->copier.unit[unit].portion[s]);
}

static void want_portion(struct worker *w, uint32_t unit, uint32_t s, uint32_t *waits_for)
{
	struct copier *c = &w->copier;
	uint32_t who;

	if (!w->neighbours.on || !c->cut[unit].network[s]) {
		/* Where claims are made, only what can be posted may stand in their way. */
		if (!w->neighbours.on || owners_ready(w, unit, s, waits_for))
			begin_read(w, &c->unit[unit].portion[s]);
		return;
	}
	switch (board_look(&w->neighbours.boards, unit, s, c->fetch.version, &who)) {
	case CLAIM_THERE:
		take_from(w, unit, s, who, waits_for);
		break;
	case CLAIM_TAKEN:
	case CLAIM_AGAIN:
		wait_for_neighbour(w, unit, s, waits_for);
		break;
	case CLAIM_OURS:
		claim_portion(w, unit, s, waits_for);
		break;
	}
}

static uint64_t portion_bytes(const struct worker *w, uint32_t unit, uint32_t s)
{
	uint64_t n = w->table.unit[unit].n, begin = s * w->copier.cut[unit].elements;
	uint64_t left = n - begin;

	return (left < w->copier.cut[unit].elements ? left : w->copier.cut[unit].elements) * sizeof(float);
}

static void end_copy(struct worker *w, struct copy_portion *at)
{
	board_unmark(&w->neighbours.boards, &at->mark);
	at->state = COPY_WANTED;
	at->since_ns = 0;
}

/* True: it is there. */
static bool copy_portion(struct worker *w, uint32_t unit, uint32_t s)
{
	struct copier *c = &w->copier;
	struct copy_portion *at = &c->unit[unit].portion[s];
	uint64_t begin = s * c->cut[unit].elements * sizeof(float), all = portion_bytes(w, unit, s);
	uint64_t left = all - at->copied, bytes = left < c->copy_left ? left : c->copy_left;
	bool whole;

	memcpy((uint8_t *)c->window + c->unit[unit].offset * sizeof(float) + begin + at->copied,
	       neighbours_of(w, at->mark.from)->window + at->mark.offset + begin + at->copied, bytes);
	at->copied += bytes;
	c->copy_left -= bytes;
	if (at->copied < all)
		return false;
	whole = board_still(&at->mark);
	end_copy(w, at);
	if (whole)
		count(&w->counters.neighbour_bytes, all);
	else
		look_again(w, 0);
	return whole;
}

void copy_forget(struct worker *w, const struct board *from)
{
	struct copier *c = &w->copier;

	for (uint32_t i = 0; i < c->n_queue; i++) {
		struct copy_unit *u = &c->unit[c->queue[i]];

		for (uint32_t s = 0; s < c->cut[c->queue[i]].n; s++)
			if (u->portion[s].state == COPY_NEIGHBOUR && u->portion[s].mark.from == from)
				end_copy(w, &u->portion[s]);
	}
	if (c->n_queue > 0)
		event_active(c->retry, EV_TIMEOUT, 0);
}

/* ------------------------------------------------------------------- units */

static void portion_there(struct worker *w, uint32_t unit, uint32_t s)
{
	struct copier *c = &w->copier;
	struct copy_unit *u = &c->unit[unit];

	u->portion[s].state = COPY_THERE;
	u->left--;
	if (w->neighbours.on)
		board_there(&w->neighbours.boards, unit, s, c->fetch.version, u->offset * sizeof(float));
}

static void read_portion(struct worker *w, uint32_t unit, uint32_t s, uint32_t *waits_for)
{
	struct copier *c = &w->copier;
	struct copy_portion *at = &c->unit[unit].portion[s];
	uint64_t took;

	if (!at->posted)
		post_portion(w, unit, s, waits_for);
	if (!at->posted || at->reads > 0)
		return;
	took = clock_now_ns() - at->since_ns;
	c->slowest_ns = took > c->slowest_ns ? took : c->slowest_ns - (c->slowest_ns - took) / 16;
	portion_there(w, unit, s);
}

static void advance_portion(struct worker *w, uint32_t unit, uint32_t s, uint32_t *waits_for)
{
	struct copier *c = &w->copier;
	const struct copy_portion *at = &c->unit[unit].portion[s];

	if (at->state == COPY_WANTED)
		want_portion(w, unit, s, waits_for);
	if (at->state == COPY_NEIGHBOUR && c->copy_left > 0 && copy_portion(w, unit, s))
		portion_there(w, unit, s);
	if (at->state == COPY_READING)
		read_portion(w, unit, s, waits_for);
}

/* Where this worker begins: neighbours begin elsewhere. */
static uint32_t first_portion(const struct worker *w, uint32_t unit)
{
	const struct boards *b = &w->neighbours.boards;
	uint32_t place = 0;

	for (uint32_t i = 0; i < b->n; i++)
		place += b->theirs[i]->member < w->self.member;
	return place * w->copier.cut[unit].n / (b->n + 1);
}

/* Nothing more of it is read; what is in flight arrives yet. */
static void stop_unit(struct worker *w, uint32_t unit)
{
	struct copy_unit *u = &w->copier.unit[unit];

	for (uint32_t s = 0; s < w->copier.cut[unit].n; s++) {
		struct copy_portion *at = &u->portion[s];

		if (at->state == COPY_NEIGHBOUR)
			end_copy(w, at);
		if (at->state == COPY_READING && !at->posted) {
			at->posted = true;
			w->copier.unposted--;
		}
	}
}

/* True: it is over, whole or not. */
static bool advance_unit(struct worker *w, uint32_t unit, uint32_t *waits_for)
{
	struct copier *c = &w->copier;
	struct copy_unit *u = &c->unit[unit];
	uint32_t n = c->cut[unit].n, first = first_portion(w, unit);

	if (fetch_is_doomed(&c->fetch, unit) && !u->status)
		u->status = -ECANCELED;
	for (uint32_t i = 0; i < n && !u->status; i++)
		advance_portion(w, unit, (first + i) % n, waits_for);
	if (u->status)
		stop_unit(w, unit);
	if (u->reads > 0 || (u->left > 0 && !u->status))
		return false;
	/* What of it was claimed and is not there is for others to read. */
	if (u->status && w->neighbours.on)
		board_withdraw(&w->neighbours.boards, unit);
	return true;
}

static void start_unit(struct worker *w, const struct fetch_action *a)
{
	struct copier *c = &w->copier;

	assert(!c->unit[a->unit].active);
	c->unit[a->unit] = (struct copy_unit){ .active = true, .offset = a->offset, .left = c->cut[a->unit].n };
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

		if (!advance_unit(w, unit, &waits_for)) {
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

/* The timer, for what no event tells. */
static void set_retry(struct worker *w)
{
	struct copier *c = &w->copier;
	uint64_t now = clock_now_ns();
	struct timeval in = { 0 };

	if (c->n_queue > 0 && c->copy_left == 0)
		look_again(w, 0);
	if (c->fetch.held_up)
		look_again(w, LOOK_AGAIN_NS);
	if (!c->again_ns)
		return;
	if (c->again_ns > now)
		in.tv_usec = (suseconds_t)((c->again_ns - now) / 1000);
	event_add(c->retry, &in);
}

void copy_run(struct worker *w)
{
	bool again = w->copier.window != NULL;

	w->copier.copy_left = COPY_TURN_BYTES;
	w->copier.again_ns = 0;
	while (again) {
		again = take_actions(w);
		again |= advance_units(w);
	}
	if (w->copier.window)
		set_retry(w);
}

void copy_event(struct worker *w, const struct fab_event *ev)
{
	struct copier *c = &w->copier;
	bool word = op_kind(ev->user) == OP_WORD;
	struct peer *p = &w->attach.peer[word ? op_a(ev->user) : op_b(ev->user) & 0xffff];

	if (word) {
		p->word_reading = false;
		if (!ev->status)
			p->word = read_word(w, p);
	} else {
		struct copy_unit *u = &c->unit[op_a(ev->user)];
		struct copy_portion *at = &u->portion[op_b(ev->user) >> 16];

		assert(at->reads > 0 && u->reads > 0 && c->reads > 0);
		at->reads--;
		u->reads--;
		c->reads--;
		if (ev->status)
			u->status = ev->status;
	}
	if (ev->status && !p->lost)
		attach_lost(p, strerror(-ev->status));
}
