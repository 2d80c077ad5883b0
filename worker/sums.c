/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Gradients of the workers of this host, added before they are pushed: what
 * subtree.c decides is done here. Additions run on the control thread, with the
 * owners' own arithmetic, in pieces of about a tenth of a millisecond between
 * which the fabric and all connections have their turn; the compute threads go
 * on meanwhile, and are not asked at a unit border, which would hold up the
 * neighbour that waits for its buffer by as much as a unit takes.
 *
 * Neighbours say nothing when their boards change. So boards are looked at
 * whenever something else happens, and by a timer as long as a neighbour is
 * waited for: often at first, then less so.
 */
#include "worker/process.h"

#include <assert.h>
#include <errno.h>

#define PIECE (256u << 10) /* elements */
#define LOOK_FIRST_US 100
#define LOOK_LAST_US 500

/* --------------------------------------------------------------- life cycle */

static void on_look(evutil_socket_t fd, short what, void *ctx)
{
	struct worker *w = ctx;
	struct sums *s = &w->sums;

	(void)fd;
	(void)what;
	s->look_us = s->look_us * 2 < LOOK_LAST_US ? s->look_us * 2 : LOOK_LAST_US;
	attach_pump(w);
}

static int open_stream(struct worker *w, struct err *e)
{
	const struct k_dims none = { 0 };
	const struct k_ops *k = k_cpu_ops();
	struct k_stream_config cfg = { .profile = &w->profile, .threads = 1 };

	cfg.workspace_bytes = k->workspace_bytes(&none, 1);
	if (arena_init(&w->sums.workspace, "sums", cfg.workspace_bytes + CACHE_LINE))
		return err_set(e, -ENOMEM, "no memory for sums");
	cfg.workspace = arena_alloc(&w->sums.workspace, cfg.workspace_bytes, CACHE_LINE);
	return k->stream_open(&cfg, &w->sums.stream, e);
}

int sums_open(struct worker *w, struct err *e)
{
	const struct subtree_config cfg = {
		.n_units = w->table.n_units,
		.wait_ns = w->config.host_wait_ms * 1000000ull,
		.boards = &w->neighbours.boards,
	};
	struct sums *s = &w->sums;
	int rc;

	if (!w->neighbours.on)
		return 0;
	s->timer = event_new(w->self.base, -1, 0, on_look, w);
	if (!s->timer || subtree_init(&s->tree, &cfg))
		return err_set(e, -ENOMEM, "out of memory");
	rc = open_stream(w, e);
	s->on = !rc;
	return rc;
}

void sums_release(struct worker *w)
{
	struct sums *s = &w->sums;

	s->on = false;
	if (s->timer)
		event_free(s->timer);
	if (s->stream)
		k_cpu_ops()->stream_close(s->stream);
	arena_release(&s->workspace);
	subtree_release(&s->tree);
}

/* ----------------------------------------------------------------- actions */

static void begin_add(struct worker *w, const struct subtree_action *a)
{
	const struct unit_part *part = &w->table.unit[a->unit].part[a->part];
	struct sum_add *add = &w->sums.add[a->buffer];
	uint64_t bytes, first = a->from_buffer * w->push.elements;
	const float *theirs = neighbours_gradients(w, a->from, &bytes);

	assert(!add->active && theirs);
	/* What we believe of a neighbour is not where its memory ends. */
	if ((first + w->push.elements) * sizeof(float) > bytes) {
		control_fail(w, EXIT_JOB_FAILED, "worker %u offers a gradient buffer that it does not have", a->from);
		return;
	}
	*add = (struct sum_add){
		.active = true,
		.unit = a->unit,
		.part = a->part,
		.from = a->from,
		.theirs = theirs + first,
		.at = part->begin / w->table.page * w->table.page,
		.end = round_up_u64(part->end, w->table.page),
	};
}

/* Looks again soon, if there is something to look for; at once, if there is something to add. */
static void watch(struct worker *w, bool at_once)
{
	struct sums *s = &w->sums;
	struct timeval soon = { .tv_usec = at_once ? 0 : s->look_us };

	if (at_once || (subtree_watches(&s->tree) && !event_pending(s->timer, EV_TIMEOUT, NULL)))
		event_add(s->timer, &soon);
}

static void take_actions(struct worker *w)
{
	struct sums *s = &w->sums;
	struct subtree_action a;
	bool lost = false, adds = false;

	while (subtree_next(&s->tree, &a)) {
		s->look_us = LOOK_FIRST_US;
		switch (a.type) {
		case SUBTREE_ADD:
			begin_add(w, &a);
			adds = true;
			break;
		case SUBTREE_PUSH:
			push_to_owners(w, a.buffer, a.node);
			break;
		case SUBTREE_FREE:
			push_free(w, a.buffer);
			break;
		case SUBTREE_LOST:
			lost = true;
			break;
		}
	}
	atomic_store_explicit(&w->counters.sums_added, s->tree.added, memory_order_relaxed);
	atomic_store_explicit(&w->counters.sums_given, s->tree.given, memory_order_relaxed);
	atomic_store_explicit(&w->counters.sums_alone, s->tree.alone, memory_order_relaxed);
	if (lost) {
		count(&w->counters.sums_lost, 1);
		control_give_back(w);
	}
	watch(w, adds);
}

/* Adds up to `most` elements. */
static void add_some(struct worker *w, uint32_t buffer, uint64_t most)
{
	struct sum_add *a = &w->sums.add[buffer];
	uint64_t n = a->end - a->at < most ? a->end - a->at : most;
	float *ours = w->push.memory + buffer * w->push.elements + a->at;
	const struct k_fold_seg seg = { .dst = ours, .a = ours, .b = a->theirs + a->at, .n = n };
	const struct k_fold fold = { .seg = &seg, .n_seg = 1 };
	struct k_event done;

	k_cpu_ops()->fold(w->sums.stream, &fold);
	k_cpu_ops()->event_record(w->sums.stream, &done);
	k_cpu_ops()->event_wait(w->sums.stream, &done);
	a->at += n;
	if (a->at < a->end)
		return;
	a->active = false;
	subtree_added(&w->sums.tree, a->unit, a->part, clock_now_ns());
	take_actions(w);
}

/* ------------------------------------------------------------------ events */

void sums_begin(struct worker *w, const struct granted_lease *l)
{
	struct sums *s = &w->sums;

	if (!s->on)
		return;
	if (s->tree.active)
		subtree_end(&s->tree);
	if (l->kind == LEASE_TRAIN)
		subtree_begin(&s->tree, l->id, l->step, l->node, l->n_micro);
}

void sums_final(struct worker *w, uint32_t buffer)
{
	const struct gradient_buffer *b = &w->push.buffer[buffer];

	subtree_final(&w->sums.tree, b->unit, b->part, buffer, clock_now_ns());
	take_actions(w);
}

void sums_answered(struct worker *w, uint32_t buffer)
{
	const struct gradient_buffer *b = &w->push.buffer[buffer];

	if (!w->sums.on)
		return;
	subtree_answered(&w->sums.tree, b->unit, b->part, !b->lost);
	take_actions(w);
}

void sums_stall(struct worker *w, bool stalled)
{
	if (!w->sums.on || !w->sums.tree.active)
		return;
	subtree_stall(&w->sums.tree, stalled, clock_now_ns());
	watch(w, false);
}

void sums_cancel(struct worker *w)
{
	if (!w->sums.on || !w->sums.tree.active)
		return;
	subtree_cancel(&w->sums.tree);
	take_actions(w);
}

bool sums_idle(const struct worker *w)
{
	return !w->sums.on || subtree_idle(&w->sums.tree);
}

void sums_forget(struct worker *w, uint32_t member)
{
	if (!w->sums.on || !w->sums.tree.active)
		return;
	/* Its memory is good as long as it is mapped. */
	for (uint32_t k = 0; k < w->push.n_buffers; k++)
		if (w->sums.add[k].active && w->sums.add[k].from == member)
			add_some(w, k, UINT64_MAX);
	subtree_gone(&w->sums.tree, member, clock_now_ns());
	take_actions(w);
	control_span_check(w);
}

void sums_run(struct worker *w)
{
	struct sums *s = &w->sums;
	bool more = false;

	if (!s->on || !s->tree.active)
		return;
	subtree_look(&s->tree, clock_now_ns());
	take_actions(w);
	for (uint32_t k = 0; k < w->push.n_buffers; k++) {
		if (!s->add[k].active)
			continue;
		/* Also when there is another one, or the next one has begun. */
		more = true;
		add_some(w, k, PIECE);
		break;
	}
	watch(w, more);
	control_span_check(w);
}
