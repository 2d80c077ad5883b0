/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the coordinator says, and getting ready.
 *
 *   WELCOME         config and name: units, batch, fabric
 *   all shard       services are members: the page map follows from their ids,
 *                   and with it pages, plan and memory. The data thread fills in
 *                   the first parameters while workers connect; then READY
 *   STEP, EXPORT    reduce.c, export.c
 *   SHUTDOWN, loss  the end; the first reason counts
 */
#include "shardsvc/node.h"
#include "shardsvc/shard.h"

#include <assert.h>
#include <errno.h>
#include <event2/event.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

void shard_end(struct shard *s, uint32_t exit_code, bool report, const char *fmt, ...)
{
	struct msg_failure m = { .exit_code = exit_code };
	va_list ap;

	if (s->over)
		return;
	s->over = true;
	s->exit_code = exit_code;
	va_start(ap, fmt);
	vsnprintf(s->exit_text, sizeof(s->exit_text), fmt, ap);
	va_end(ap);
	if (report && s->link) {
		snprintf(m.text, sizeof(m.text), "%s", s->exit_text);
		member_link_send(s->link, WIRE_FAILURE, &m);
	}
	event_base_loopbreak(s->self.base);
}

/* ----------------------------------------------------------------- welcome */

static int read_config(struct shard *s, const struct msg_welcome *w, struct err *e)
{
	char *text = strndup((const char *)w->config.data, w->config.bytes);
	int rc = text ? job_config_parse(text, "the job's config", "/", &s->job, e) : -ENOMEM;

	free(text);
	if (rc)
		return rc;
	rc = batch_resolve(&s->job, w->n_workers, &s->batch, e);
	if (!rc)
		rc = unit_table_init(&s->table, &s->job.model, e);
	if (rc)
		job_config_release(&s->job);
	return rc;
}

static int on_welcome(void *ctx, const struct msg_welcome *w, struct err *e)
{
	struct shard *s = ctx;
	char reason[160];
	int rc = read_config(s, w, e);

	if (rc)
		return rc;
	s->welcomed = true;
	s->n_shards = w->n_shards;
	s->n_workers = w->n_workers;
	s->host_index = w->host_index;
	s->host_members = w->host_members;
	snprintf(s->log.who, sizeof(s->log.who), "shard-%u", w->member);
	rc = k_profile_detect("portable", &s->data.profile, reason, e);
	if (rc)
		return rc;
	s->data.threads = s->threads_given ? (unsigned)s->threads_given : shard_threads(&s->job, w->host_members);
	s->data.seed = s->job.seed;
	s->data.weights = s->job.weights;
	log_info(&s->log, "member %u of job %s: state arithmetic on %u threads with %s (%s); the job's profile is %s",
		 w->member, s->self.job, s->data.threads, s->data.profile.text, reason, w->profile);
	return fabrics_open(s, e);
}

/* ----------------------------------------------------------------- prepare */

static int compare_ids(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return x < y ? -1 : x > y;
}

static int map_pages(struct shard *s, uint32_t *shards, struct err *e)
{
	int rc;

	qsort(shards, s->n_shards, sizeof(*shards), compare_ids);
	rc = page_map_init(&s->map, &s->table, shards, s->n_shards, s->job.max_owners_per_unit);
	if (!rc)
		rc = store_init(&s->store, &s->table, &s->map, s->self.member);
	for (uint32_t u = 0; u < s->table.n_units && !rc; u++)
		if (s->store.unit[u].share.n > s->inbox_elements)
			s->inbox_elements = s->store.unit[u].share.n;
	return rc ? err_set(e, rc, "page map of %u shard services: %s", s->n_shards, strerror(-rc)) : 0;
}

static int make_plan(struct shard *s, struct err *e)
{
	const struct fab_ops *fabric = fabrics_expected(s);
	const struct shard_place place = { .n_workers = s->n_workers,
					   .threads = s->data.threads,
					   .mapped = s->one_host && fabric && fabric->maps,
					   .connection_bytes = fabric ? fabric->connection_bytes : 0 };
	int rc = shard_memory_plan(&s->job, &s->table, &s->map, s->self.member, s->batch.n_micro, &place, &s->plan, e);

	if (rc)
		return rc;
	s->n_inboxes_planned = place.mapped ? 0 : s->n_workers;
	s->connection_bytes = place.connection_bytes;
	mem_plan_log(&s->log, &s->plan.mem);
	atomic_store(&s->count.planned_bytes, s->plan.mem.total);
	return 0;
}

static uint32_t count_inboxes(const struct shard *s)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < s->n_slots; i++)
		n += s->peer[i] && s->peer[i]->inbox;
	return n;
}

void service_inbox_opened(struct shard *s)
{
	uint64_t bytes = s->inbox_elements * sizeof(float);
	uint32_t n = count_inboxes(s);
	char each[24], all[24];

	if (n <= s->n_inboxes_planned)
		return;
	s->n_inboxes_planned = n;
	mem_plan_grow(&s->plan.mem, "inboxes", bytes);
	if (s->connection_bytes)
		mem_plan_grow(&s->plan.mem, "connections", s->connection_bytes);
	atomic_store(&s->count.planned_bytes, s->plan.mem.total);
	log_info(&s->log, "memory plan: one more inbox, %s: a worker pushes that was not planned for; %s in all",
		 bytes_text(bytes, each), bytes_text(s->plan.mem.total, all));
}

static uint32_t log2_ceil(uint32_t n)
{
	uint32_t bits = 0;

	while (bits < 31 && 1u << bits < n)
		bits++;
	return bits;
}

/* Where the plan has room for all sums that there can be, each piece's has an extent of its own. */
static void fit_sums(const struct shard *s, struct sum_config *c, uint64_t *sizes)
{
	for (uint32_t i = 0; i < s->store.n_pieces; i++)
		for (uint32_t k = 0; k < s->plan.sums_each; k++)
			sizes[c->n_fitted++] = s->store.piece[i].n;
	c->fitted = sizes;
}

static int open_sums(struct shard *s, struct err *e)
{
	uint32_t a_piece = log2_ceil(s->batch.n_micro) + s->job.max_held_nodes + 2;
	struct sum_config c = {
		.max = a_piece * s->store.n_pieces,
		.memory_elements = s->plan.pool_elements,
		.spill_elements = s->plan.spill_elements,
		/* Twice what can be held, for the gaps between extents. */
		.limit_elements = 2 * a_piece * store_accumulator_elements(&s->store),
		.spill_dir = s->run_dir ? s->run_dir : s->job.run_dir,
	};
	uint64_t *sizes = calloc(c.max + 1, sizeof(*sizes));
	int rc;

	if (!sizes)
		return err_set(e, -ENOMEM, "no memory for a table of %u partial sums", c.max);
	if (s->plan.sums_each)
		fit_sums(s, &c, sizes);
	rc = sums_init(&s->sums, &c, e);
	free(sizes);
	return rc;
}

static int allocate(struct shard *s, struct err *e)
{
	uint64_t bytes = page_map_share_bytes(&s->map, &s->table, s->self.member, s->table.n_units);
	void *at;
	int rc = fabrics_parameters(s, bytes, &at, e);

	if (rc)
		return rc;
	atomic_store(&s->count.shard_bytes, bytes);
	rc = store_allocate(&s->store, at, e);
	if (!rc)
		rc = open_sums(s, e);
	if (rc)
		return rc;
	rc = reduce_init(s);
	return rc ? err_set(e, rc, "no memory for the tables of %u pieces", s->store.n_pieces) : 0;
}

static void on_done(evutil_socket_t fd, short what, void *ctx)
{
	struct shard *s = ctx;
	struct job_done d;

	(void)fd;
	(void)what;
	ring_disarm(&s->data.done);
	do {
		while (!s->over && data_reap(&s->data, &d))
			reduce_done(s, &d);
	} while (!s->over && !ring_arm(&s->data.done));
}

static int add_event(struct shard *s, struct event **ev, int fd, event_callback_fn fn, struct err *e)
{
	*ev = event_new(s->self.base, fd, EV_READ | EV_PERSIST, fn, s);
	if (!*ev || event_add(*ev, NULL))
		return err_set(e, -ENOMEM, "no memory for an event");
	return 0;
}

/* Before anything is allocated and any thread started: both come to stay where this thread is. */
static void choose_node(struct shard *s)
{
	const struct node_want want = { .host_index = s->host_index,
					.host_members = s->host_members,
					.threads = s->data.threads,
					.bytes = s->plan.mem.total };

	node_bind(&s->log, &want);
}

static int prepare(struct shard *s, uint32_t *shards, struct err *e)
{
	int rc = map_pages(s, shards, e);

	if (!rc)
		rc = make_plan(s, e);
	if (!rc)
		choose_node(s);
	if (!rc)
		rc = allocate(s, e);
	if (rc)
		return rc;
	s->data.store = &s->store;
	s->data.sums = &s->sums;
	s->data.wait = &s->waits[WAIT_OF_DATA];
	rc = data_start(&s->data, e);
	if (!rc)
		rc = add_event(s, &s->done_event, s->data.done.event_fd, on_done, e);
	if (!rc)
		rc = fabrics_watch(s, e);
	if (rc)
		return rc;
	s->prepared = true;
	/* Arms both: from here on their events wake us. */
	publish_poll(s);
	on_done(-1, 0, s);
	return 0;
}

static uint64_t our_host(const struct shard *s, const struct member_table *t)
{
	for (uint32_t i = 0; i < t->n; i++)
		if (t->member[i].member == s->self.member)
			return t->member[i].host_id;
	return 0;
}

/* Pages can be dealt when all shard services are here, and not before. */
static int prepare_once(struct shard *s, const struct member_table *t, struct err *e)
{
	uint32_t *ids, n = 0;
	int rc;

	for (uint32_t i = 0; i < t->n; i++)
		n += t->member[i].role == ROLE_SHARD;
	if (s->prepared || n == 0 || n != s->n_shards)
		return 0;
	ids = calloc(n, sizeof(*ids));
	if (!ids)
		return err_set(e, -ENOMEM, "no memory for the ids of %u shard services", n);
	for (uint32_t i = 0, k = 0; i < t->n; i++)
		if (t->member[i].role == ROLE_SHARD)
			ids[k++] = t->member[i].member;
	rc = prepare(s, ids, e);
	free(ids);
	return rc;
}

static void on_members(void *ctx, const struct member_table *t)
{
	struct shard *s = ctx;
	uint64_t host = our_host(s, t);
	struct err e = { 0 };

	s->n_live = 0;
	s->one_host = true;
	for (uint32_t i = 0; i < t->n; i++) {
		s->one_host &= t->member[i].host_id == host;
		if (t->member[i].role == ROLE_WORKER) {
			s->live_here[s->n_live] = t->member[i].host_id == host;
			s->live[s->n_live++] = t->member[i].member;
		}
	}
	if (prepare_once(s, t, &e)) {
		shard_end(s, EXIT_JOB_FAILED, true, "%s", e.text);
		return;
	}
	publish_members(s);
}

/* ---------------------------------------------------------------- messages */

static int on_message(void *ctx, const struct wire_header *h, const union wire_msg *m)
{
	struct shard *s = ctx;

	switch (h->type) {
	case WIRE_STEP:
		return reduce_step(s, &m->step);
	case WIRE_EXPORT_READ:
		return export_read(s, &m->export_read);
	default:
		log_error(&s->log, "%s is not a message for a shard service", wire_name(h->type));
		return -EPROTO;
	}
}

static void on_over(void *ctx, uint32_t exit_code, const char *text)
{
	shard_end(ctx, exit_code, false, "%s", text);
}

const struct member_ops shard_member_ops = {
	.welcome = on_welcome,
	.members = on_members,
	.message = on_message,
	.over = on_over,
};

/* --------------------------------------------------------------------- end */

void service_log_memory(struct shard *s)
{
	uint64_t own = atomic_load(&s->count.shard_bytes);

	if (s->prepared)
		mem_plan_log_used(&s->log, &s->plan.mem, own + count_inboxes(s) * s->inbox_elements * sizeof(float));
}

void service_release(struct shard *s)
{
	data_stop(&s->data);
	if (s->done_event)
		event_free(s->done_event);
	publish_close(s);
	if (!s->welcomed)
		return;
	if (s->data.jobs.slots)
		data_release(&s->data);
	reduce_release(s);
	sums_release(&s->sums);
	store_release(&s->store);
	page_map_release(&s->map);
	unit_table_release(&s->table);
	job_config_release(&s->job);
}
