/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The data thread: owns the kernels' stream and does the jobs of one ring in
 * order, answering each in another. Neither ring can overflow: the control
 * thread counts what is in flight (handed over, answer not reaped) and never
 * lets it pass the rings' size, so an answer always has room.
 *
 * Order is the whole of the synchronisation. A job's arguments lie in its item;
 * the memory it names was written by jobs before it, by a worker before its
 * offer, or by the fabric before its notice; and what it wrote may be looked at
 * by the control thread when it has reaped the answer.
 *
 * The state arithmetic is a written order of operations, the same on every
 * processor whatever the job's math profile says, so the stream uses the widest
 * instructions of this machine and no matrix library is loaded.
 */
#include "shardsvc/shard.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

#define LOOK_NS 1000000000ull

static_assert(sizeof(struct job) <= 256, "a job is an item of a ring, not a message");

size_t data_workspace_bytes(unsigned threads)
{
	const struct k_dims none = { 0 };
	size_t n = k_cpu_ops()->workspace_bytes(&none, threads);

	return n ? n : CACHE_LINE;
}

uint64_t data_ring_bytes(void)
{
	return DATA_RING * (sizeof(struct job) + sizeof(struct job_done));
}

static void count(_Atomic uint64_t *c, uint64_t n)
{
	atomic_fetch_add_explicit(c, n, memory_order_relaxed);
}

/* Bytes read and written by a fold, for the metrics. */
static uint64_t fold_traffic(const struct piece *p, const struct fold_job *j)
{
	return p->n * sizeof(float) * (j->b.at ? 3 : 2);
}

static void do_fold(struct data *d, const struct job *j, struct job_done *out)
{
	const struct piece *p = &d->store->piece[j->index];

	engine_fold(&d->engine, p, &j->fold, j->fold.last ? &d->square_sum[p->unit] : NULL);
	out->last = j->fold.last;
	count(&d->folds, 1);
	count(&d->fold_bytes, fold_traffic(p, &j->fold));
}

static void do_finish(struct data *d, const struct job *j)
{
	const struct store_unit *u = &d->store->unit[j->index];
	uint64_t elements = 2 * u->share.n;

	engine_finish(&d->engine, d->store, j->index, &j->finish, &d->square_sum[j->index]);
	for (uint32_t i = 1; i < u->n_pieces; i++)
		elements += d->store->piece[u->first_piece + i].n;
	count(&d->folds, 1);
	count(&d->fold_bytes, elements * sizeof(float));
}

static void do_apply(struct data *d, const struct job *j, struct job_done *out, uint64_t began)
{
	out->status = engine_apply(&d->engine, d->store, &j->apply, &out->hash);
	out->step = j->apply.step;
	out->has_hash = j->apply.hash_wanted;
	count(&d->applies, 1);
	count(&d->apply_nanoseconds, clock_now_ns() - began);
}

static void do_job(struct data *d, const struct job *j)
{
	struct job_done out = { .type = j->type, .index = j->index, .offer = { j->offer[0], j->offer[1] } };
	uint64_t began = clock_now_ns();

	switch (j->type) {
	case JOB_FOLD:
		do_fold(d, j, &out);
		break;
	case JOB_FINISH:
		do_finish(d, j);
		break;
	case JOB_APPLY:
		do_apply(d, j, &out, began);
		break;
	case JOB_START:
	case JOB_STOP:
		return;
	}
	if (!out.status)
		out.status = d->engine.ops->stream_error(d->engine.stream);
	out.nanoseconds = clock_now_ns() - began;
	count(&d->busy_nanoseconds, out.nanoseconds);
	if (!ring_push(&d->done, &out))
		assert(!"the ring of answers holds all that is in flight");
}

static int open_stream(struct data *d)
{
	const struct k_stream_config cfg = {
		.profile = &d->profile,
		.threads = d->threads,
		.workspace = d->workspace.base,
		.workspace_bytes = d->workspace.size,
	};

	d->engine.ops = k_cpu_ops();
	d->engine.stop = &d->stop;
	return d->engine.ops->stream_open(&cfg, &d->engine.stream, &d->start_error);
}

static int fill_units(struct data *d, const struct model_weights *w)
{
	struct store *s = d->store;
	int rc = 0;

	for (uint32_t u = 0; !rc && u < s->table->n_units; u++) {
		if (atomic_load_explicit(&d->stop, memory_order_relaxed))
			return -ECANCELED;
		if (w)
			rc = store_read_unit(s, u, w, &d->start_error);
		else
			store_fill_unit(s, u, d->seed);
	}
	return rc;
}

/* First touch here and now: a page fault in a step would not be in the plan's time. */
static int fill_store(struct data *d)
{
	struct model_weights *w = NULL;
	struct store *s = d->store;
	int rc = 0;

	if (d->weights)
		rc = model_weights_open(d->weights, s->table, &w, &d->start_error);
	if (rc)
		return rc;
	memset(s->moments.base, 0, s->moments.size);
	memset(s->accumulators.base, 0, s->accumulators.size);
	if (d->sums->memory.base)
		memset(d->sums->memory.base, 0, d->sums->memory.elements * sizeof(float));
	if (w && model_weights_warning(w))
		snprintf(d->start_note, sizeof(d->start_note), "%s", model_weights_warning(w));
	rc = fill_units(d, w);
	if (!rc)
		store_publish_initial(s, 0);
	if (w)
		model_weights_close(w);
	return rc;
}

/*
 * The record says what the control thread waits for: nothing else can give us
 * work. That may change while we sleep, so it is looked at now and then.
 */
static void idle(struct data *d)
{
	enum wait_kind kind = WAIT_NONE, told = WAIT_NONE;

	do {
		kind = (enum wait_kind)atomic_load_explicit(&d->idle_kind, memory_order_relaxed);
		if (kind != told)
			wait_begin(d->wait, kind, atomic_load_explicit(&d->idle_step, memory_order_relaxed),
				   (uint32_t)atomic_load_explicit(&d->idle_unit, memory_order_relaxed), 0, 0);
		told = kind;
	} while (!ring_wait(&d->jobs, LOOK_NS));
	wait_end(d->wait);
}

static void *data_main(void *arg)
{
	struct data *d = arg;
	struct job_done started = { .type = JOB_START, .status = open_stream(d) };
	bool opened = !started.status;
	struct job j;

	if (opened)
		started.status = fill_store(d);
	if (!ring_push(&d->done, &started))
		assert(!"the first answer has room");
	while (!started.status && !atomic_load_explicit(&d->stop, memory_order_acquire)) {
		if (ring_pop(&d->jobs, &j))
			do_job(d, &j);
		else
			idle(d);
	}
	if (opened)
		d->engine.ops->stream_close(d->engine.stream);
	return NULL;
}

int data_start(struct data *d, struct err *e)
{
	int rc = ring_init(&d->jobs, sizeof(struct job), DATA_RING);

	if (rc)
		return err_set(e, rc, "ring of jobs: %s", strerror(-rc));
	rc = ring_init(&d->done, sizeof(struct job_done), DATA_RING);
	if (rc) {
		err_set(e, rc, "ring of answers: %s", strerror(-rc));
		goto release_jobs;
	}
	rc = arena_init(&d->workspace, "workspace", data_workspace_bytes(d->threads));
	if (rc) {
		err_set(e, rc, "no memory for the kernels' workspace");
		goto release_done;
	}
	d->in_flight = 1; /* the answer to JOB_START */
	rc = -pthread_create(&d->thread, NULL, data_main, d);
	if (rc) {
		err_set(e, rc, "cannot start the data thread: %s", strerror(-rc));
		goto release_workspace;
	}
	d->running = true;
	return 0;

release_workspace:
	arena_release(&d->workspace);
release_done:
	ring_release(&d->done);
release_jobs:
	ring_release(&d->jobs);
	return rc;
}

void data_stop(struct data *d)
{
	const struct job stop = { .type = JOB_STOP };

	if (!d->running)
		return;
	atomic_store_explicit(&d->stop, true, memory_order_release);
	/* Only to wake it; a full ring means that it is awake. */
	(void)ring_push(&d->jobs, &stop);
	pthread_join(d->thread, NULL);
	d->running = false;
}

void data_release(struct data *d)
{
	assert(!d->running);
	arena_release(&d->workspace);
	ring_release(&d->done);
	ring_release(&d->jobs);
}

uint32_t data_room(const struct data *d)
{
	return DATA_RING - d->in_flight;
}

void data_push(struct data *d, const struct job *j)
{
	assert(d->in_flight < DATA_RING);
	d->in_flight++;
	if (!ring_push(&d->jobs, j))
		assert(!"the ring of jobs holds all that is in flight");
}

bool data_reap(struct data *d, struct job_done *out)
{
	if (!ring_pop(&d->done, out))
		return false;
	assert(d->in_flight > 0);
	d->in_flight--;
	return true;
}
