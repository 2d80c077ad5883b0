/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An owner's step, on the control thread.
 *
 *   NONE --open--> REDUCE --all units whole--> SEALED --commit--> NONE
 *   NONE --open without micro-batches--> FORWARD (nothing of it is an owner's)
 *
 * Each piece has a coverage that decides; this file carries the decisions out.
 * Decisions are taken in the order in which coverage_next gives them and handed
 * to the data thread in that order, which is what makes them right (a sum may
 * be somebody else's as soon as its last reader is queued). A fold is held back
 * for one call of coverage_next, to see whether it makes the root: then the
 * square sum is taken in the same pass, or, where the unit has another part, the
 * pass that joins the two reads a lone contribution itself. When the ring is
 * full, a piece is marked dirty and goes on when an answer has come back.
 *
 * After the vote nothing is taken any more: what is still offered is answered
 * CLOSED. The commit's Adam is queued before the next step's folds, so those
 * find the accumulators free without anybody waiting.
 */
#include "shardsvc/shard.h"

#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static void count(_Atomic uint64_t *c)
{
	atomic_fetch_add_explicit(c, 1, memory_order_relaxed);
}

/* -------------------------------------------------------------------- sums */

static void note_beyond(struct shard *s)
{
	uint64_t beyond = atomic_load_explicit(&s->sums.beyond_bytes, memory_order_relaxed);

	if (beyond == s->beyond_told)
		return;
	if (!s->beyond_told)
		log_warn(&s->log, "partial sums do not fit the plan's memory and spill file: unplanned memory is used");
	s->beyond_told = beyond;
}

static uint32_t take_sum(void *ctx, bool must)
{
	struct track *t = ctx;
	uint32_t id = sums_take(&t->shard->sums, t->shard->store.piece[t->index].n, must);

	if (must)
		note_beyond(t->shard);
	return id ? id : COVERAGE_NO_SUM;
}

static void give_sum(void *ctx, uint32_t sum)
{
	struct track *t = ctx;

	sums_give(&t->shard->sums, sum);
}

/* --------------------------------------------------------------- decisions */

static float *sum_at(const struct track *t, uint32_t sum)
{
	return sum ? sums_at(&t->shard->sums, sum) : t->shard->store.piece[t->index].accumulator;
}

static struct fold_operand operand_of(const struct track *t, const struct operand *o, uint64_t *offer)
{
	switch (o->kind) {
	case OPERAND_SUM:
		return (struct fold_operand){ .at = sum_at(t, o->sum) };
	case OPERAND_OFFER:
		*offer = o->offer;
		return inbox_operand(t->shard, o->offer);
	case OPERAND_NONE:
		break;
	}
	return (struct fold_operand){ 0 };
}

static struct job fold_of(const struct track *t, const struct coverage_action *a)
{
	struct job j = { .type = JOB_FOLD, .index = t->index };

	j.fold.dst = sum_at(t, a->dst);
	j.fold.a = operand_of(t, &a->a, &j.offer[0]);
	j.fold.b = operand_of(t, &a->b, &j.offer[1]);
	return j;
}

/* The piece's root is in the accumulator when `pending` is done. True: with it the unit's gradient is whole. */
static bool root_found(struct shard *s, struct track *t)
{
	uint32_t unit = s->store.piece[t->index].unit;

	assert(!t->rooted && s->parts_open[unit] > 0);
	t->rooted = true;
	return --s->parts_open[unit] == 0;
}

static void set_dirty(struct shard *s, struct track *t, bool dirty)
{
	if (t->dirty == dirty)
		return;
	t->dirty = dirty;
	s->n_dirty += dirty ? 1 : UINT32_MAX;
}

/* Something wanted is refused: the coordinator has to know what everybody waits for. */
static void check_starved(struct shard *s, struct track *t)
{
	const struct piece *p = &s->store.piece[t->index];
	struct msg_starved m = { .step = s->open_step, .unit = p->unit, .part = p->part };
	struct tree_node n;

	if (s->phase != STEP_REDUCE || !coverage_starved(&t->coverage) || !coverage_lowest_missing(&t->coverage, &n)) {
		t->told = false;
		return;
	}
	if (t->told && tree_equal(t->told_node, n))
		return;
	t->told = true;
	t->told_node = n;
	m.first = n.first;
	m.level = n.level;
	count(&s->count.starved);
	member_link_send(s->link, WIRE_STARVED, &m);
}

/*
 * The unit's gradient is whole when `pending`, which makes its last root, is
 * done: the square sum comes with it, or with the pass that joins the parts. A
 * root that is a lone contribution needs no pass of its own before that one.
 */
static void push_last(struct shard *s, const struct track *t, struct job *pending)
{
	const struct piece *p = &s->store.piece[t->index];
	struct job finish = { .type = JOB_FINISH, .index = p->unit };

	if (pending->type == JOB_FOLD && s->store.unit[p->unit].n_pieces == 1) {
		pending->fold.last = true;
		data_push(&s->data, pending);
		return;
	}
	if (pending->type == JOB_FOLD && !pending->fold.b.at) {
		finish.finish.root[p->part] = pending->fold.a;
		finish.offer[0] = pending->offer[0];
	} else if (pending->type == JOB_FOLD) {
		data_push(&s->data, pending);
	}
	data_push(&s->data, &finish);
}

/* A fold in hand, and what a root asks for behind it. */
#define PUMP_ROOM 2u

void reduce_pump(struct shard *s, uint32_t piece)
{
	struct track *t = &s->track[piece];
	struct job pending = { .type = JOB_STOP };
	struct coverage_action a;
	bool room;

	while ((room = data_room(&s->data) >= PUMP_ROOM + 1) && coverage_next(&t->coverage, &a)) {
		if (a.type == COVERAGE_ANSWER) {
			inbox_verdict(s, a.offer, a.verdict);
		} else if (a.type == COVERAGE_FOLD) {
			if (pending.type == JOB_FOLD)
				data_push(&s->data, &pending);
			pending = fold_of(t, &a);
		} else if (root_found(s, t)) {
			push_last(s, t, &pending);
			pending.type = JOB_STOP;
		}
	}
	if (pending.type == JOB_FOLD)
		data_push(&s->data, &pending);
	set_dirty(s, t, !room);
	check_starved(s, t);
}

static void pump_dirty(struct shard *s)
{
	for (uint32_t i = 0; s->n_dirty && i < s->store.n_pieces && data_room(&s->data) > PUMP_ROOM; i++)
		if (s->track[i].dirty)
			reduce_pump(s, i);
}

/* -------------------------------------------------------------------- vote */

static void send_vote(struct shard *s)
{
	struct msg_vote m = { .step = s->open_step };
	struct exact_sum sum;
	uint64_t words[EXACT_SUM_WORDS + 1];

	static_assert(sizeof(words) == sizeof(m.square_sum), "an exact sum travels as its words");
	exact_sum_clear(&sum);
	for (uint32_t u = 0; u < s->table.n_units; u++)
		if (s->store.unit[u].n_pieces) {
			exact_sum_merge(&sum, &s->data.square_sum[u]);
			m.trouble_units = s->data.square_sum[u].non_finite ? u + 1 : m.trouble_units;
		}
	for (uint32_t i = 0; i < EXACT_SUM_WORDS; i++)
		words[i] = htole64(sum.w[i]);
	words[EXACT_SUM_WORDS] = htole64(sum.non_finite);
	memcpy(m.square_sum, words, sizeof(words));
	member_link_send(s->link, WIRE_VOTE, &m);
}

static void note_wait(struct shard *s);

static void seal(struct shard *s)
{
	assert(s->phase == STEP_REDUCE && s->units_open == 0);
	s->phase = STEP_SEALED;
	send_vote(s);
	for (uint32_t i = 0; i < s->store.n_pieces; i++) {
		coverage_close(&s->track[i].coverage);
		reduce_pump(s, i);
	}
	note_wait(s);
}

static void unit_whole(struct shard *s)
{
	assert(s->phase == STEP_REDUCE && s->units_open > 0);
	if (--s->units_open == 0)
		seal(s);
}

/* -------------------------------------------------------------------- step */

static int refuse_step(struct shard *s, const struct msg_step *m, const char *why)
{
	log_error(&s->log, "STEP (commit %s%llu, open %s%llu) while step %llu of version %llu is at hand: %s",
		  m->has_commit ? "" : "no ", (unsigned long long)m->commit_step, m->has_open ? "" : "no ",
		  (unsigned long long)m->open_step, (unsigned long long)s->open_step, (unsigned long long)s->version,
		  why);
	return -EPROTO;
}

static int commit(struct shard *s, const struct msg_step *m)
{
	const struct optimizer_config *o = &s->job.optimizer;
	struct job j = { .type = JOB_APPLY };

	if (m->commit_step <= s->version)
		return 0;
	if (s->phase != STEP_SEALED || m->commit_step != s->open_step || m->commit_step != s->version + 1)
		return refuse_step(s, m, "we have not voted for it");
	j.apply = (struct apply_job){
		.step = m->commit_step,
		.branch = s->self.branch,
		.skip = !m->apply,
		.hash_wanted = m->hash_wanted,
		.adam = { .grad_scale = m->grad_scale,
			  .lr = m->lr,
			  .beta1 = o->beta1,
			  .beta2 = o->beta2,
			  .eps = o->eps,
			  .weight_decay = o->weight_decay,
			  .bias1 = m->bias1,
			  .bias2 = m->bias2,
			  .decoupled = o->decoupled },
	};
	data_push(&s->data, &j);
	s->version = m->commit_step;
	s->phase = STEP_NONE;
	return 0;
}

static void open_pieces(struct shard *s, uint32_t n_micro)
{
	size_t each = round_up_u64(coverage_bytes(PEERS_MAX), CACHE_LINE);

	assert(s->sums.n_used == 0 && s->n_dirty == 0);
	for (uint32_t i = 0; i < s->store.n_pieces; i++) {
		struct track *t = &s->track[i];
		const struct coverage_sums sums = { .take = take_sum, .give = give_sum, .ctx = t };

		t->rooted = t->told = false;
		coverage_init(&t->coverage, n_micro, s->job.max_held_nodes, &sums, s->offers.base + i * each,
			      PEERS_MAX);
	}
	s->units_open = 0;
	for (uint32_t u = 0; u < s->table.n_units; u++) {
		s->parts_open[u] = (uint8_t)s->store.unit[u].n_pieces;
		s->units_open += s->parts_open[u] > 0;
	}
}

static int open_step(struct shard *s, const struct msg_step *m)
{
	if (m->open_step == s->open_step)
		return 0;
	if (s->phase != STEP_NONE || m->open_step != s->version + 1)
		return refuse_step(s, m, "the step before is not committed");
	if (m->n_micro != 0 && m->n_micro != s->batch.n_micro)
		return refuse_step(s, m, "its number of micro-batches is not the job's");
	s->open_step = m->open_step;
	s->phase = m->n_micro ? STEP_REDUCE : STEP_FORWARD;
	if (s->phase == STEP_REDUCE)
		open_pieces(s, m->n_micro);
	inbox_step_opened(s);
	/* An owner of nothing has its root at once. */
	if (s->phase == STEP_REDUCE && s->units_open == 0)
		seal(s);
	return 0;
}

int reduce_step(struct shard *s, const struct msg_step *m)
{
	int rc = s->ready ? 0 : refuse_step(s, m, "we are not ready");

	if (!rc && m->has_commit)
		rc = commit(s, m);
	if (!rc && m->has_open)
		rc = open_step(s, m);
	note_wait(s);
	return rc;
}

/* ----------------------------------------------------------------- answers */

static void started(struct shard *s)
{
	struct msg_ready m = { .planned_bytes = s->plan.mem.total };

	s->ready = true;
	if (s->data.start_note[0])
		log_warn(&s->log, "%s", s->data.start_note);
	log_info(&s->log, "ready: %llu elements in %u pieces", (unsigned long long)s->store.n, s->store.n_pieces);
	member_link_send(s->link, WIRE_READY, &m);
}

static void applied(struct shard *s, const struct job_done *d)
{
	struct msg_applied m = {
		.step = d->step,
		.has_hash = d->has_hash,
		.hash_lo = d->hash.lo,
		.hash_hi = d->hash.hi,
		.seconds = clock_seconds(d->nanoseconds),
	};

	s->applied = d->step;
	count(&s->count.steps_applied);
	member_link_send(s->link, WIRE_APPLIED, &m);
}

void reduce_done(struct shard *s, const struct job_done *d)
{
	if (d->status) {
		if (d->type == JOB_START && s->data.start_error.text[0])
			shard_end(s, EXIT_JOB_FAILED, true, "%s", s->data.start_error.text);
		else
			shard_end(s, EXIT_JOB_FAILED, true, "the data thread failed: %s", strerror(-d->status));
		return;
	}
	for (uint32_t i = 0; i < ARRAY_LEN(d->offer); i++)
		if (d->offer[i])
			inbox_taken(s, d->offer[i]);
	if (d->type == JOB_START)
		started(s);
	else if (d->type == JOB_APPLY)
		applied(s, d);
	else if (d->type == JOB_FINISH || d->last)
		unit_whole(s);
	pump_dirty(s);
	note_wait(s);
}

/* ------------------------------------------------------------------- waits */

/* The last unit that is not whole: backward comes to it first. */
static uint32_t awaited_unit(const struct shard *s)
{
	uint32_t u = s->table.n_units;

	while (u > 0 && !s->parts_open[u - 1])
		u--;
	return u ? u - 1 : 0;
}

/* A worker that is filling its inbox for the unit, else 0: any may come. */
static uint32_t awaited_peer(const struct shard *s, uint32_t unit)
{
	for (uint32_t i = 0; i < s->n_slots; i++) {
		const struct peer *p = s->peer[i];

		if (p && p->filling != PEER_NONE && s->store.piece[p->offer[p->filling].piece].unit == unit)
			return p->member;
	}
	return 0;
}

static void note_wait(struct shard *s)
{
	struct wait_record *w = &s->waits[WAIT_OF_CONTROL];
	enum wait_kind kind = !s->prepared ? WAIT_MEMBERS : !s->ready ? WAIT_NONE : WAIT_COMMIT;
	uint32_t unit = 0, peer = 0;

	if (s->phase == STEP_REDUCE) {
		kind = WAIT_CONTRIBUTION;
		unit = awaited_unit(s);
		peer = awaited_peer(s, unit);
	}
	atomic_store_explicit(&s->data.idle_kind, kind, memory_order_relaxed);
	atomic_store_explicit(&s->data.idle_step, s->open_step, memory_order_relaxed);
	atomic_store_explicit(&s->data.idle_unit, unit, memory_order_relaxed);
	if (kind == WAIT_NONE) {
		wait_end(w);
		return;
	}
	if (atomic_load_explicit(&w->kind, memory_order_relaxed) == kind &&
	    atomic_load_explicit(&w->step, memory_order_relaxed) == s->open_step &&
	    atomic_load_explicit(&w->unit, memory_order_relaxed) == unit &&
	    atomic_load_explicit(&w->peer, memory_order_relaxed) == peer)
		return;
	wait_begin(w, kind, s->open_step, unit, 0, peer);
}

void reduce_tick(struct shard *s)
{
	note_wait(s);
	if (s->phase != STEP_REDUCE)
		return;
	for (uint32_t i = 0; i < s->store.n_pieces; i++) {
		s->track[i].told = false;
		check_starved(s, &s->track[i]);
	}
}

/* -------------------------------------------------------------------- life */

int reduce_init(struct shard *s)
{
	size_t each = round_up_u64(coverage_bytes(PEERS_MAX), CACHE_LINE);
	uint32_t n = s->store.n_pieces ? s->store.n_pieces : 1;
	int rc = arena_init(&s->offers, "offers", n * each);

	if (rc)
		return rc;
	/* Room for every worker there can be, touched as far as there are workers. */
	(void)madvise(s->offers.base, s->offers.size, MADV_NOHUGEPAGE);
	s->track = calloc(n, sizeof(*s->track));
	s->parts_open = calloc(s->table.n_units, sizeof(*s->parts_open));
	s->data.square_sum = calloc(s->table.n_units, sizeof(*s->data.square_sum));
	if (!s->track || !s->parts_open || !s->data.square_sum)
		return -ENOMEM;
	for (uint32_t i = 0; i < s->store.n_pieces; i++) {
		s->track[i].shard = s;
		s->track[i].index = i;
	}
	return 0;
}

void reduce_release(struct shard *s)
{
	arena_release(&s->offers);
	free(s->track);
	free(s->parts_open);
	free(s->data.square_sum);
}
