/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The control thread's view: steps, leases and the span at hand.
 *
 * One span at a time. It begins with TASK_SPAN, the compute thread ends it with
 * REPORT_END, and it is over, with SPAN_DONE, when every offer it made is
 * answered; the next lease waits until then. A span is cancelled by RECALL, or
 * by a STEP that opens a later step: the compute thread stops at the next unit
 * border, what is unanswered is withdrawn, and SPAN_DONE says recalled.
 *
 * Parameters found newer than the span's step (stale) mean that its step was
 * committed without it. The word of that comes on another connection, so it is
 * waited for; if it does not come the protocol is broken, and the worker says
 * which unit and gives up.
 */
#include "worker/process.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define STALE_GRACE_S 3
#define END_GRACE_S 2

/* --------------------------------------------------------------------- end */

void control_end(struct worker *w, uint32_t exit_code, const char *text)
{
	if (w->over)
		return;
	w->over = true;
	w->exit_code = exit_code;
	if (text != w->exit_text)
		snprintf(w->exit_text, sizeof(w->exit_text), "%s", text);
	event_base_loopbreak(w->self.base);
}

static void on_end_timer(evutil_socket_t fd, short what, void *ctx)
{
	struct worker *w = ctx;

	(void)fd;
	(void)what;
	control_end(w, w->exit_code, w->exit_text);
}

void control_fail(struct worker *w, uint32_t exit_code, const char *fmt, ...)
{
	struct msg_failure m = { .exit_code = exit_code };
	struct timeval grace = { .tv_sec = END_GRACE_S };
	va_list ap;

	if (w->over || w->exit_text[0])
		return;
	va_start(ap, fmt);
	vsnprintf(m.text, sizeof(m.text), fmt, ap);
	va_end(ap);
	log_error(&w->log, "%s", m.text);
	w->exit_code = exit_code;
	snprintf(w->exit_text, sizeof(w->exit_text), "%s", m.text);
	/* The coordinator ends the job, or us; it is given a moment to say so. */
	if (member_link_send(w->link, WIRE_FAILURE, &m))
		grace.tv_sec = 0;
	event_add(w->end_timer, &grace);
}

/* ----------------------------------------------------------------- members */

static int on_welcome(void *ctx, const struct msg_welcome *m, struct err *e)
{
	return prepare(ctx, m, e);
}

static void on_members(void *ctx, const struct member_table *t)
{
	struct worker *w = ctx;
	struct err e;

	if (!w->have_map && !w->over && attach_open(w, t, &e))
		control_fail(w, EXIT_JOB_FAILED, "%s", e.text);
	if (!w->over)
		neighbours_members(w, t);
}

void control_ready(struct worker *w)
{
	struct msg_ready m = {
		.max_span = w->plan.max_span,
		.data_fingerprint = data_fingerprint(w->data),
		.planned_bytes = w->plan.mem.total,
	};
	char fabrics[64];

	log_info(&w->log, "attached to %u shard services by %s; spans of at most %u micro-batches, activations %s",
		 w->attach.n_peers, fabrics_text(w, fabrics), w->plan.max_span,
		 w->plan.keep_activations ? "kept" : "recomputed");
	member_link_send(w->link, WIRE_READY, &m);
}

/* ------------------------------------------------------------------- spans */

void control_task(struct worker *w, const struct task *t)
{
	bool pushed = ring_push(&w->compute.in, t);

	/* A span has a bounded number of tasks, and the ring holds them all. */
	assert(pushed);
}

static void start_next(struct worker *w)
{
	struct span_state *s = &w->span;
	struct task t = { .kind = TASK_SPAN };

	if (s->active || w->n_queued == 0)
		return;
	*s = (struct span_state){ .active = true, .lease = w->queued[0] };
	memmove(&w->queued[0], &w->queued[1], --w->n_queued * sizeof(w->queued[0]));
	t.lease = s->lease.id;
	t.n_micro = s->lease.n_micro;
	t.branch = (uint16_t)w->self.branch;
	t.span = (struct span){
		.step = s->lease.step,
		.first = s->lease.node.first,
		.n_mb = s->lease.n_leaves,
		.training = s->lease.kind == LEASE_TRAIN,
	};
	push_begin(w, &s->lease);
	control_task(w, &t);
	if (!w->in_place)
		copy_begin(w, &s->lease);
}

static void send_done(struct worker *w, const struct granted_lease *l, const struct report *end, bool recalled,
		      uint64_t push_ns)
{
	struct msg_span_done m = {
		.step = l->step,
		.lease = l->id,
		.kind = l->kind,
		.first = l->node.first,
		.level = l->node.level,
		.recalled = recalled,
		.loss = recalled ? 0 : end->loss,
		.seconds_compute = clock_seconds(end->compute_ns),
		.seconds_fetch = clock_seconds(end->fetch_ns),
		.seconds_push = clock_seconds(push_ns),
		.trouble = end->trouble.kind,
		.trouble_micro = end->trouble.micro,
		.trouble_unit = end->trouble.unit,
	};

	count(recalled ? &w->counters.recalled : &w->counters.spans, 1);
	member_link_send(w->link, WIRE_SPAN_DONE, &m);
}

/* For status: whose answer the span waits for. */
static void show_wait(struct worker *w)
{
	for (uint32_t i = 0; i < w->push.n_buffers; i++) {
		const struct gradient_buffer *b = &w->push.buffer[i];

		for (uint32_t k = 0; b->busy && k < w->attach.n_peers; k++) {
			const struct offer *o = &w->push.offer[(size_t)i * w->attach.n_peers + k];

			if (o->progress == OFFER_NONE)
				continue;
			wait_begin(&w->waits[WAIT_RECORD_CONTROL], WAIT_CONTRIBUTION, w->span.lease.step, b->unit, 0,
				   w->attach.peer[k].member);
			return;
		}
	}
}

void control_span_check(struct worker *w)
{
	struct span_state *s = &w->span;
	uint64_t waited;

	if (!s->active || !s->ended || !push_idle(w) || (s->stale && !s->cancelled))
		return;
	wait_end(&w->waits[WAIT_RECORD_CONTROL]);
	waited = clock_now_ns() - s->push_since_ns;
	count(&w->counters.push_wait_ns, s->end.push_ns + waited);
	send_done(w, &s->lease, &s->end, s->cancelled, s->end.push_ns + waited);
	*s = (struct span_state){ 0 };
	event_del(w->stale_timer);
	start_next(w);
}

static void cancel_span(struct worker *w)
{
	struct span_state *s = &w->span;
	const struct task t = { .kind = TASK_CANCEL, .lease = s->lease.id };

	if (!s->active || s->cancelled)
		return;
	s->cancelled = true;
	if (!s->ended)
		control_task(w, &t);
	if (!w->in_place)
		copy_cancel(w);
	push_end(w, true);
	control_span_check(w);
}

void control_give_back(struct worker *w)
{
	log_info(&w->log, "what a worker of this host took of our gradients is lost with its span: ours is given back");
	cancel_span(w);
}

static void on_stale_timer(evutil_socket_t fd, short what, void *ctx)
{
	struct worker *w = ctx;
	const struct span_state *s = &w->span;

	(void)fd;
	(void)what;
	control_fail(w, EXIT_JOB_FAILED,
		     "unit %u of shard service %u is newer than version %llu, which the open step %llu is computed on",
		     s->end.unit, s->end.peer, (unsigned long long)(s->lease.step - 1),
		     (unsigned long long)s->lease.step);
}

static void span_ended(struct worker *w, const struct report *r)
{
	struct span_state *s = &w->span;
	struct timeval grace = { .tv_sec = STALE_GRACE_S };

	assert(s->active && !s->ended && r->lease == s->lease.id);
	s->ended = true;
	s->end = *r;
	s->push_since_ns = clock_now_ns();
	if (!w->in_place)
		copy_cancel(w);
	if (r->status == -ESTALE && !s->cancelled) {
		s->stale = true;
		event_add(w->stale_timer, &grace);
	} else if (r->status == -ETIMEDOUT) {
		control_fail(w, EXIT_JOB_FAILED, "unit %u did not come for %.0f s", r->unit,
			     clock_seconds(WAIT_FAIL_NS));
		return;
	} else if (r->status && !s->cancelled) {
		control_fail(w, EXIT_JOB_FAILED, "the computation of step %llu failed: %s",
			     (unsigned long long)s->lease.step, strerror(-r->status));
		return;
	}
	push_end(w, s->cancelled || s->stale);
	if (!push_idle(w))
		show_wait(w);
	control_span_check(w);
}

static void take_report(struct worker *w, const struct report *r)
{
	switch (r->kind) {
	case REPORT_USED:
		fetch_finished(&w->copier.fetch, r->use);
		break;
	case REPORT_OFFER:
		push_offer(w, r);
		break;
	case REPORT_NEED:
		push_need(w);
		break;
	case REPORT_END:
		span_ended(w, r);
		break;
	}
}

static void on_compute(evutil_socket_t fd, short what, void *ctx)
{
	struct worker *w = ctx;
	struct report r;

	(void)fd;
	(void)what;
	ring_disarm(&w->compute.out);
	do {
		while (!w->over && ring_pop(&w->compute.out, &r))
			take_report(w, &r);
	} while (!w->over && !ring_arm(&w->compute.out));
	attach_pump(w);
}

/* ----------------------------------------------------------------- messages */

/* A lease of the open step, checked; queued until the span at hand is over. */
static int take_lease(struct worker *w, uint64_t id, uint32_t kind, uint32_t first, uint32_t level)
{
	struct granted_lease l = {
		.id = id,
		.step = w->open_step,
		.kind = (enum lease_kind)kind,
		.node = { .first = first, .level = level },
	};
	uint32_t n = kind == LEASE_TRAIN ? w->n_micro : kind == LEASE_EVAL ? w->n_eval : 0;

	if (!w->attach.ready_sent || w->n_queued == LEASES_MAX || n == 0 || !tree_valid(l.node, n))
		return -EPROTO;
	l.n_micro = n;
	l.n_leaves = tree_leaves(l.node, n);
	if (l.n_leaves > w->plan.max_span)
		return -EPROTO;
	w->queued[w->n_queued++] = l;
	start_next(w);
	return 0;
}

/* What belongs to steps before the open one is of no use any more. */
static void drop_old(struct worker *w)
{
	uint32_t kept = 0;

	for (uint32_t i = 0; i < w->n_queued; i++)
		if (w->queued[i].step == w->open_step)
			w->queued[kept++] = w->queued[i];
	w->n_queued = kept;
	if (w->span.active && w->span.lease.step != w->open_step)
		cancel_span(w);
}

static int on_step(struct worker *w, const struct msg_step *m)
{
	if (!m->has_open)
		return 0;
	if (m->open_step == 0 || m->open_step < w->open_step)
		return -EPROTO;
	w->open_step = m->open_step;
	w->self.step = m->open_step;
	w->n_micro = m->n_micro;
	w->n_eval = m->n_eval;
	drop_old(w);
	return m->lease ? take_lease(w, m->lease, m->lease_kind, m->lease_first, m->lease_level) : 0;
}

static int on_lease(struct worker *w, const struct msg_lease *m)
{
	if (m->step > w->open_step)
		return -EPROTO;
	return m->step < w->open_step ? 0 : take_lease(w, m->lease, m->kind, m->first, m->level);
}

static void on_recall(struct worker *w, const struct msg_recall *m)
{
	static const struct report nothing = { 0 };

	if (w->span.active && w->span.lease.id == m->lease) {
		cancel_span(w);
		return;
	}
	for (uint32_t i = 0; i < w->n_queued; i++) {
		struct granted_lease l = w->queued[i];

		if (l.id != m->lease)
			continue;
		memmove(&w->queued[i], &w->queued[i + 1], (--w->n_queued - i) * sizeof(l));
		send_done(w, &l, &nothing, true, 0);
		return;
	}
	/* It was done before the recall arrived: SPAN_DONE is on its way. */
}

static int on_message(void *ctx, const struct wire_header *h, const union wire_msg *m)
{
	struct worker *w = ctx;
	int rc = 0;

	if (w->over)
		return 0;
	switch (h->type) {
	case WIRE_STEP:
		rc = on_step(w, &m->step);
		break;
	case WIRE_LEASE:
		rc = on_lease(w, &m->lease);
		break;
	case WIRE_RECALL:
		on_recall(w, &m->recall);
		break;
	case WIRE_RELAY:
		neighbours_relay(w, &m->relay);
		break;
	default:
		rc = -EPROTO;
	}
	attach_pump(w);
	return rc;
}

static void on_over(void *ctx, uint32_t exit_code, const char *text)
{
	struct worker *w = ctx;

	control_end(w, w->exit_text[0] ? w->exit_code : exit_code, w->exit_text[0] ? w->exit_text : text);
}

/* --------------------------------------------------------------- life cycle */

static void add_metrics(struct worker *w)
{
	struct metrics *m = &w->metrics;
	struct worker_counters *c = &w->counters;

	metrics_add(m, "mesh_fetch_units_total", "units fetched for use", &c->fetch_units);
	metrics_add(m, "mesh_fetch_bytes_total", "parameter bytes copied from shard services", &c->fetch_bytes);
	metrics_add(m, "mesh_network_bytes_total", "of them over a network", &c->network_bytes);
	metrics_add(m, "mesh_neighbour_bytes_total", "parameter bytes copied from workers of this host",
		    &c->neighbour_bytes);
	metrics_add(m, "mesh_neighbours", "workers of this host that share what they read", &c->neighbours);
	metrics_add(m, "mesh_portions_claimed_total", "portions of units read for the host", &c->claimed);
	metrics_add(m, "mesh_portions_waited_total", "portions that a neighbour was waited for", &c->waited);
	metrics_add(m, "mesh_portions_seized_total", "portions read though a neighbour had claimed them", &c->seized);
	metrics_add(m, "mesh_seized_bytes_total", "bytes over a network for them", &c->seized_bytes);
	metrics_add(m, "mesh_fetch_wait_ns_total", "time the compute thread waited for units", &c->fetch_wait_ns);
	metrics_add(m, "mesh_live_parameters_max", "parameters in the live window at once, where units are copied",
		    &w->copier.fetch.live_max);
	metrics_add(m, "mesh_offers_total", "contributions offered to shard services", &c->offers);
	metrics_add(m, "mesh_push_bytes_total", "gradient bytes written to shard services", &c->push_bytes);
	metrics_add(m, "mesh_sums_added_total", "gradients of workers of this host added to ours", &c->sums_added);
	metrics_add(m, "mesh_sums_given_total", "gradients that a worker of this host added to its own",
		    &c->sums_given);
	metrics_add(m, "mesh_sums_alone_total", "gradients pushed though a worker of this host has the sibling",
		    &c->sums_alone);
	metrics_add(m, "mesh_sums_lost_total", "spans given back: a worker was lost that had part of them",
		    &c->sums_lost);
	metrics_add(m, "mesh_push_wait_ns_total", "time waited for buffers and answers", &c->push_wait_ns);
	metrics_add(m, "mesh_fabric_choices_local_total", "shard services reached by it", &c->chosen[0]);
	metrics_add(m, "mesh_fabric_choices_local_copy_total", "shard services reached by it", &c->chosen[1]);
	metrics_add(m, "mesh_fabric_choices_verbs_total", "shard services reached by it", &c->chosen[2]);
	metrics_add(m, "mesh_fabric_choices_ofi_total", "shard services reached by it", &c->chosen[3]);
	metrics_add(m, "mesh_fabric_refusals_total", "providers that could not be used", &c->refused);
	metrics_add(m, "mesh_spans_total", "spans computed", &c->spans);
	metrics_add(m, "mesh_recalled_total", "spans given back", &c->recalled);
	metrics_add(m, "mesh_messages_sent_total", "control messages sent", &w->self.messages_sent);
	metrics_add(m, "mesh_messages_received_total", "control messages received", &w->self.messages_received);
	metrics_add(m, "mesh_bytes_sent_total", "control bytes sent", &w->self.bytes_sent);
	metrics_add(m, "mesh_bytes_received_total", "control bytes received", &w->self.bytes_received);
	metrics_add(m, "mesh_auth_failures_total", "connections refused", &w->self.auth_failures);
	metrics_add(m, "mesh_wakeups_total", "times a sleeping compute thread was woken", &w->compute.in.wakeups);
}

int control_open(struct worker *w, struct err *e)
{
	static const struct member_ops ops = {
		.welcome = on_welcome, .members = on_members, .message = on_message, .over = on_over
	};
	struct member_link_config cfg = {
		.rdzv_endpoint = w->endpoint,
		.join_timeout_ns = JOIN_TIMEOUT_NS,
		.listen = "",
		.metrics = &w->metrics,
		.waits = w->waits,
		.n_waits = WAIT_RECORDS,
	};

	add_metrics(w);
	w->stale_timer = event_new(w->self.base, -1, 0, on_stale_timer, w);
	w->end_timer = event_new(w->self.base, -1, 0, on_end_timer, w);
	if (!w->stale_timer || !w->end_timer)
		return err_set(e, -ENOMEM, "out of memory");
	return member_link_open(&w->self, &cfg, &ops, w, &w->link, e);
}

int control_watch_compute(struct worker *w, struct err *e)
{
	w->compute_event = event_new(w->self.base, w->compute.out.event_fd, EV_READ | EV_PERSIST, on_compute, w);
	if (!w->compute_event || event_add(w->compute_event, NULL) || !ring_arm(&w->compute.out))
		return err_set(e, -ENOMEM, "cannot watch the compute thread");
	return 0;
}

void control_release(struct worker *w)
{
	member_link_free(w->link);
	if (w->stale_timer)
		event_free(w->stale_timer);
	if (w->end_timer)
		event_free(w->end_timer);
	if (w->compute_event)
		event_free(w->compute_event);
}
