/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The compute thread: takes a span, runs its uses in order, reports. It drives
 * the kernel stream, whose pool has the other compute threads.
 *
 * It sleeps in one of three places, each with a wait record and a deadline:
 * for a lease, for a unit, for a gradient buffer. Where units are copied, and
 * for buffers and leases, what it waits for is a task in its ring. Where units
 * are mapped it waits on the owner's progress word itself, in slices, and looks
 * at its ring between them. Everything it knows comes by ring, so nothing here
 * is locked or shared; wait records are atomics, for the heartbeat.
 *
 * A recalled lease ends the span at the next unit border, or at once where it
 * sleeps. Parameters that are newer than the span's step mean that the step is
 * over and the span of no use: the span ends with -ESTALE, and the control
 * thread finds out whether that is so.
 */
#include "worker/process.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define SPIN_NS 20000u
#define STOP_SECONDS 2

/* ----------------------------------------------------------------- messages */

static void report(struct compute *c, struct report *r)
{
	bool pushed;

	r->lease = c->now.lease;
	pushed = ring_push(&c->out, r);
	/* A span makes a bounded number of reports, and the ring holds them all. */
	assert(pushed);
}

static void take_task(struct compute *c, const struct task *t)
{
	bool mine = c->busy && t->lease == c->now.lease;

	switch (t->kind) {
	case TASK_SPAN:
		assert(!c->busy);
		c->now = *t;
		c->busy = true;
		c->cancelled = false;
		c->failed = 0;
		c->uses_there = 0;
		break;
	case TASK_CANCEL:
		c->cancelled |= mine;
		break;
	case TASK_USE:
		if (!mine)
			break;
		memcpy(c->use_params[t->use], t->params, sizeof(t->params));
		c->uses_there = t->use + 1;
		break;
	case TASK_FAILED:
		if (!mine)
			break;
		c->failed = t->status;
		c->failed_unit = t->unit;
		c->failed_peer = 0;
		break;
	case TASK_BUFFER:
		c->free_buffers |= 1u << t->buffer;
		break;
	case TASK_QUIT:
		c->quit = true;
		break;
	}
}

/* Takes what is in the ring. 0, or why the span should stop. */
static int look(struct compute *c)
{
	struct task t;

	while (ring_pop(&c->in, &t))
		take_task(c, &t);
	if (c->cancelled || c->quit)
		return -ECANCELED;
	return c->failed;
}

/* -------------------------------------------------------------------- waits */

struct patience {
	uint64_t since_ns, warned_ns;
};

static struct wait_record *record(struct compute *c)
{
	return &c->w->waits[WAIT_RECORD_COMPUTE];
}

static void begin_wait(struct compute *c, struct patience *p, enum wait_kind kind, uint32_t unit, uint32_t peer)
{
	p->since_ns = p->warned_ns = clock_now_ns();
	wait_begin(record(c), kind, c->now.span.step, unit, 0, peer);
}

static void warn(struct compute *c, uint64_t now_ns)
{
	uint8_t packed[256];
	char text[512];
	size_t n = waits_pack(record(c), 1, now_ns, packed, sizeof(packed));

	if (waits_text(c->w->log.who, packed, n, text, sizeof(text)) > 0)
		log_warn(&c->w->log, "%.*s", (int)strcspn(text, "\n"), text);
}

/* Between two slices of a wait: 0, or why it ends. */
static int between(struct compute *c, struct patience *p)
{
	uint64_t now = clock_now_ns();
	int rc = look(c);

	if (rc)
		return rc;
	if (now - p->warned_ns > WAIT_WARN_NS) {
		warn(c, now);
		p->warned_ns = now;
	}
	return now - p->since_ns > WAIT_FAIL_NS ? -ETIMEDOUT : 0;
}

static uint64_t end_wait(struct compute *c, const struct patience *p)
{
	wait_end(record(c));
	return clock_now_ns() - p->since_ns;
}

/* ------------------------------------------------------------------- units */

static int wait_progress(struct compute *c, uint32_t unit, const struct peer *owner)
{
	uint32_t version = (uint32_t)(c->now.span.step - 1);
	uint64_t word = atomic_load_explicit(&owner->progress->word, memory_order_acquire);
	enum fab_ready ready = fab_progress_check(word, c->now.branch, version, (uint16_t)unit);
	struct patience p = { 0 };
	int rc = 0;

	if (ready == FAB_READY)
		return 0;
	begin_wait(c, &p, WAIT_UNIT, unit, owner->member);
	while (!rc && ready == FAB_NOT_YET) {
		word = fab_progress_wait(owner->progress, word, SPIN_NS, WAIT_SLICE_NS);
		ready = fab_progress_check(word, c->now.branch, version, (uint16_t)unit);
		if (ready == FAB_NOT_YET)
			rc = between(c, &p);
	}
	c->fetch_ns += end_wait(c, &p);
	if (!rc && ready == FAB_PASSED)
		rc = -ESTALE;
	if (rc) {
		c->failed_unit = unit;
		c->failed_peer = owner->member;
	}
	return rc;
}

static int units_mapped(struct compute *c, const struct use *u, const float *params[2])
{
	const struct attach *a = &c->w->attach;

	for (uint32_t i = 0; i < u->n; i++) {
		const uint32_t *owners = attach_owners(a, u->unit[i]);

		for (uint32_t k = 0; k < a->n_owners[u->unit[i]]; k++) {
			int rc = wait_progress(c, u->unit[i], &a->peer[owners[k]]);

			if (rc)
				return rc;
		}
		params[i] = a->unit[u->unit[i]];
		count(&c->w->counters.fetch_units, 1);
	}
	return 0;
}

static int units_copied(struct compute *c, uint32_t use, const struct use *u, const float *params[2])
{
	struct patience p = { 0 };
	int rc = look(c);

	if (!rc && c->uses_there <= use) {
		begin_wait(c, &p, WAIT_UNIT, u->n ? u->unit[0] : 0, 0);
		while (!rc && c->uses_there <= use) {
			uint32_t owner = atomic_load_explicit(&c->w->copier.waits_for, memory_order_relaxed);

			atomic_store_explicit(&record(c)->peer, owner, memory_order_relaxed);
			ring_wait(&c->in, WAIT_SLICE_NS);
			rc = between(c, &p);
		}
		c->fetch_ns += end_wait(c, &p);
		if (rc == -ETIMEDOUT)
			c->failed_unit = u->unit[0];
	}
	if (!rc)
		memcpy(params, c->use_params[use], sizeof(c->use_params[use]));
	return rc;
}

/* ------------------------------------------------------------------- hooks */

static int border(void *ctx)
{
	return look(ctx);
}

static int units(void *ctx, uint32_t use, const struct use *u, const float *params[2])
{
	struct compute *c = ctx;

	return c->w->plan.window_elements ? units_copied(c, use, u, params) : units_mapped(c, u, params);
}

static void used(void *ctx, uint32_t use)
{
	struct compute *c = ctx;
	struct report r = { .kind = REPORT_USED, .use = use };

	if (c->w->plan.window_elements)
		report(c, &r);
}

static int gradient(void *ctx, uint32_t unit, uint32_t part, float **buffer)
{
	struct compute *c = ctx;
	struct report need = { .kind = REPORT_NEED };
	struct patience p;
	uint32_t k;
	int rc = look(c);

	(void)part;
	if (!rc && !c->free_buffers) {
		report(c, &need);
		begin_wait(c, &p, WAIT_GRADIENT_BUFFER, unit, 0);
		while (!rc && !c->free_buffers) {
			ring_wait(&c->in, WAIT_SLICE_NS);
			rc = between(c, &p);
		}
		c->push_ns += end_wait(c, &p);
	}
	if (rc)
		return rc;
	k = (uint32_t)__builtin_ctz(c->free_buffers);
	c->free_buffers &= ~(1u << k);
	*buffer = c->w->push.memory + k * c->w->push.elements;
	return 0;
}

static int final(void *ctx, uint32_t unit, uint32_t part, float *buffer)
{
	struct compute *c = ctx;
	const float *base = c->w->push.memory;
	struct report r = { .kind = REPORT_OFFER, .unit = unit, .part = part };

	r.buffer = (uint32_t)((size_t)(buffer - base) / c->w->push.elements);
	report(c, &r);
	return 0;
}

/* -------------------------------------------------------------------- spans */

static void load_data(struct compute *c)
{
	const struct worker *w = c->w;
	const struct span *s = &c->now.span;
	size_t n = (size_t)w->batch.micro_batch * w->config.data.sequence_length;
	enum data_split split = s->training ? DATA_TRAIN : DATA_VALIDATION;
	struct activations *act = &c->net.act;

	for (uint32_t i = 0; i < s->n_mb; i++) {
		data_micro_batch(w->data, split, s->step, c->now.n_micro, s->first + i, w->batch.micro_batch,
				 act->tokens + i * n, act->targets + i * n);
		if (act->first_key)
			data_first_keys(w->data, split, s->step, c->now.n_micro, s->first + i, w->batch.micro_batch,
					act->first_key + i * n);
	}
}

static struct trouble find_trouble(struct compute *c)
{
	struct trouble t = { 0 };
	bool of_loss;

	if (net_finite(&c->net, &of_loss, &t.micro, &t.unit))
		return t;
	t.kind = of_loss ? TROUBLE_LOSS : TROUBLE_GRADIENT;
	t.micro += c->now.span.first;
	return t;
}

static void run_span(struct compute *c)
{
	const struct span_hooks hooks = { border, units, used, gradient, final, c };
	struct report end = { .kind = REPORT_END };
	unsigned training = c->now.span.training;
	uint64_t begin = clock_now_ns(), all;

	c->fetch_ns = c->push_ns = 0;
	c->failed_peer = 0;
	load_data(c);
	end.status = span_run(&c->net, &c->now.span, c->uses[training], c->n_uses[training], &hooks, &end.loss);
	if (!end.status)
		end.trouble = find_trouble(c);
	all = clock_now_ns() - begin;
	end.unit = c->failed_unit;
	end.peer = c->failed_peer;
	end.fetch_ns = c->fetch_ns;
	end.push_ns = c->push_ns;
	end.compute_ns = all - c->fetch_ns - c->push_ns;
	count(&c->w->counters.fetch_wait_ns, c->fetch_ns);
	report(c, &end);
	c->busy = false;
}

/* Recalled before it began. */
static void give_back(struct compute *c)
{
	struct report end = { .kind = REPORT_END, .status = -ECANCELED };

	report(c, &end);
	c->busy = false;
}

static void *compute_main(void *arg)
{
	struct compute *c = arg;
	bool waiting = false;

	for (;;) {
		int rc = look(c);

		if (c->quit)
			break;
		if (waiting == c->busy) {
			waiting = !c->busy;
			if (waiting)
				wait_begin(record(c), c->now.lease ? WAIT_LEASE : WAIT_MEMBERS, c->now.span.step, 0, 0,
					   0);
			else
				wait_end(record(c));
		}
		if (!c->busy)
			ring_wait(&c->in, WAIT_WARN_NS);
		else if (rc)
			give_back(c);
		else
			run_span(c);
	}
	return NULL;
}

/* --------------------------------------------------------------- life cycle */

static uint32_t power_of_two(uint32_t at_least)
{
	uint32_t n = 1;

	while (n < at_least)
		n *= 2;
	return n;
}

static int open_tables(struct compute *c, struct err *e)
{
	uint32_t uses = net_uses_max(&c->w->config.model);
	/* A use makes at most three reports and two tasks; buffers and leases come on top. */
	uint32_t messages = power_of_two(4 * uses + 4 * BUFFERS_MAX + LEASES_MAX);
	int rc = ring_init(&c->in, sizeof(struct task), messages);

	if (!rc)
		rc = ring_init(&c->out, sizeof(struct report), messages);
	c->use_params = calloc(uses, sizeof(*c->use_params));
	for (unsigned training = 0; training < 2; training++) {
		c->uses[training] = calloc(uses, sizeof(struct use));
		if (c->uses[training])
			c->n_uses[training] = net_uses(&c->net, training, c->uses[training]);
	}
	if (rc || !c->use_params || !c->uses[0] || !c->uses[1])
		return err_set(e, rc ? rc : -ENOMEM, "out of memory for the compute thread");
	return 0;
}

static int open_arenas(struct compute *c, struct err *e)
{
	const struct worker_plan *plan = &c->w->plan;
	int rc = arena_init(&c->activations, "activations", net_activation_bytes(&c->net.cfg));

	if (!rc)
		rc = net_activations(&c->net, &c->activations);
	if (!rc)
		rc = arena_init(&c->workspace, "workspace", plan->workspace_bytes);
	return rc ? err_set(e, rc, "no memory for the activations and the workspace") : 0;
}

int compute_open(struct worker *w, struct err *e)
{
	struct compute *c = &w->compute;
	struct net_config cfg = {
		.model = &w->config.model,
		.table = &w->table,
		.k = k_cpu_ops(),
		.batch = w->batch.micro_batch,
		.seq = w->config.data.sequence_length,
		.max_span = w->plan.max_span,
		.keep = w->plan.keep_activations,
		.packed = data_packed(w->data),
		.head_pieces = w->plan.head.pieces,
		.seed = w->config.seed,
	};
	struct k_stream_config stream = { .profile = &w->profile, .threads = w->threads };
	int rc;

	c->w = w;
	rc = net_init(&c->net, &cfg, e);
	if (!rc)
		rc = open_tables(c, e);
	if (!rc)
		rc = open_arenas(c, e);
	if (rc)
		return rc;
	stream.workspace = arena_alloc(&c->workspace, w->plan.workspace_bytes, CACHE_LINE);
	stream.workspace_bytes = w->plan.workspace_bytes;
	assert(stream.workspace);
	c->free_buffers = (1u << w->plan.n_gradient_buffers) - 1;
	return cfg.k->stream_open(&stream, &c->net.stream, e);
}

int compute_start(struct compute *c, struct err *e)
{
	int rc = pthread_create(&c->thread, NULL, compute_main, c);

	if (rc)
		return err_set(e, -rc, "cannot start the compute thread: %s", strerror(rc));
	c->started = true;
	return 0;
}

bool compute_stop(struct compute *c)
{
	const struct task quit = { .kind = TASK_QUIT };
	struct timespec deadline;

	if (!c->started)
		return true;
	if (!ring_push(&c->in, &quit))
		return false;
	clock_gettime(CLOCK_REALTIME, &deadline);
	deadline.tv_sec += STOP_SECONDS;
	if (pthread_timedjoin_np(c->thread, NULL, &deadline))
		return false;
	c->started = false;
	return true;
}

void compute_release(struct compute *c)
{
	assert(!c->started);
	if (c->net.stream)
		c->net.cfg.k->stream_close(c->net.stream);
	if (c->net.cfg.model)
		net_release(&c->net);
	arena_release(&c->activations);
	arena_release(&c->workspace);
	ring_release(&c->in);
	ring_release(&c->out);
	free(c->use_params);
	free(c->uses[0]);
	free(c->uses[1]);
}
