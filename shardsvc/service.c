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
#include "shardsvc/shard.h"

#include <assert.h>
#include <errno.h>
#include <event2/event.h>
#include <inttypes.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

/* What a shard service without pages takes, measured: about 1 MiB, and some room for the allocator. */
#define PROCESS_BYTES (2u << 20)

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

static unsigned cores(void)
{
	cpu_set_t set;

	return sched_getaffinity(0, sizeof(set), &set) ? 1 : (unsigned)CPU_COUNT(&set);
}

/* Given on the command line, in the config, or a fair part of the host. */
static unsigned choose_threads(const struct shard *s, uint32_t host_members)
{
	uint32_t n = host_members ? host_members : 1;

	if (s->threads_given)
		return (unsigned)s->threads_given;
	if (s->job.threads_per_shard)
		return s->job.threads_per_shard;
	return (cores() + n - 1) / n;
}

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
	snprintf(s->log.who, sizeof(s->log.who), "shard-%u", w->member);
	rc = k_profile_detect("portable", &s->data.profile, reason, e);
	if (rc)
		return rc;
	s->data.threads = choose_threads(s, w->host_members);
	s->data.seed = s->job.seed;
	s->data.weights = s->job.weights;
	log_info(&s->log, "member %u of job %s: state arithmetic on %u threads with %s (%s); the job's profile is %s",
		 w->member, s->self.job, s->data.threads, s->data.profile.text, reason, w->profile);
	return publish_open(s, e);
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
	return rc ? err_set(e, rc, "page map of %u shard services: %s", s->n_shards, strerror(-rc)) : 0;
}

static int make_plan(struct shard *s, struct err *e)
{
	char who[32];
	int rc = shard_plan_make(&s->job, &s->table, &s->map, s->self.member, s->batch.n_micro, s->n_workers,
				 s->fab_ops->maps, &s->plan, e);

	if (rc)
		return rc;
	mem_plan_add(&s->plan.mem, "kernels' workspace", data_workspace_bytes(s->data.threads), "%u threads",
		     s->data.threads);
	mem_plan_add(&s->plan.mem, "rings and tables",
		     DATA_RING * (sizeof(struct job) + sizeof(struct job_done)) +
			     s->store.n_pieces * (sizeof(struct piece) + sizeof(struct track)) +
			     s->table.n_units * (sizeof(struct store_unit) + sizeof(struct exact_sum)) +
			     s->n_workers * (sizeof(struct peer) + s->store.n_pieces * (uint64_t)coverage_bytes(1)),
		     "%u pieces, %u workers", s->store.n_pieces, s->n_workers);
	mem_plan_add(&s->plan.mem, "the process itself", PROCESS_BYTES, "heap, stacks, private data of libraries");
	snprintf(who, sizeof(who), "shard %u", s->self.member);
	mem_plan_print(stderr, who, &s->plan.mem);
	fflush(stderr);
	atomic_store(&s->count.planned_bytes, s->plan.mem.total);
	return 0;
}

static uint32_t log2_ceil(uint32_t n)
{
	uint32_t bits = 0;

	while (bits < 31 && 1u << bits < n)
		bits++;
	return bits;
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

	return sums_init(&s->sums, &c, e);
}

static int allocate(struct shard *s, struct err *e)
{
	struct fab_region_attr attr = { .name = "parameters", .memory = FAB_HOST, .access = FAB_REMOTE_READ };
	int rc;

	attr.bytes = page_map_share_bytes(&s->map, &s->table, s->self.member, s->table.n_units);
	rc = s->fab_ops->region_open(s->fab, &attr, &s->parameters, e);
	if (rc)
		return rc;
	atomic_store(&s->count.shard_bytes, attr.bytes);
	rc = store_allocate(&s->store, s->fab_ops->region_addr(s->parameters), e);
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

static void on_fabric(evutil_socket_t fd, short what, void *ctx)
{
	(void)fd;
	(void)what;
	publish_poll(ctx);
}

static int add_event(struct shard *s, struct event **ev, int fd, event_callback_fn fn, struct err *e)
{
	*ev = event_new(s->self.base, fd, EV_READ | EV_PERSIST, fn, s);
	if (!*ev || event_add(*ev, NULL))
		return err_set(e, -ENOMEM, "no memory for an event");
	return 0;
}

static int prepare(struct shard *s, uint32_t *shards, struct err *e)
{
	int rc = map_pages(s, shards, e);

	if (!rc)
		rc = make_plan(s, e);
	if (!rc)
		rc = allocate(s, e);
	if (rc)
		return rc;
	s->data.store = &s->store;
	s->data.wait = &s->waits[WAIT_OF_DATA];
	rc = data_start(&s->data, e);
	if (!rc)
		rc = add_event(s, &s->done_event, s->data.done.event_fd, on_done, e);
	if (!rc)
		rc = add_event(s, &s->fab_event, s->fab_ops->fd(s->fab), on_fabric, e);
	if (rc)
		return rc;
	s->prepared = true;
	/* Arms both: from here on their events wake us. */
	publish_poll(s);
	on_done(-1, 0, s);
	return 0;
}

static void on_members(void *ctx, const struct member_table *t)
{
	struct shard *s = ctx;
	uint32_t shards[64], n_shards = 0;
	struct err e = { 0 };

	s->n_live = 0;
	for (uint32_t i = 0; i < t->n; i++) {
		if (t->member[i].role == ROLE_WORKER)
			s->live[s->n_live++] = t->member[i].member;
		else if (t->member[i].role == ROLE_SHARD && n_shards < ARRAY_LEN(shards))
			shards[n_shards++] = t->member[i].member;
	}
	if (!s->prepared && n_shards == s->n_shards && prepare(s, shards, &e)) {
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

/* What "RssAnon:" and the like of /proc/self/status say, in bytes; 0 when it is not there. */
static uint64_t status_field(const char *text, const char *name)
{
	const char *at = strstr(text, name);

	return at ? strtoull(at + strlen(name), NULL, 10) * 1024 : 0;
}

void service_log_memory(struct shard *s)
{
	uint64_t own = atomic_load(&s->count.shard_bytes), anonymous;
	char text[5][24], *status;
	size_t bytes;

	if (!s->prepared || file_read("/proc/self/status", 65536, &status, &bytes, NULL))
		return;
	for (uint32_t i = 0; i < s->n_slots; i++)
		if (s->peer[i] && s->peer[i]->inbox)
			own += s->plan.inbox_elements * sizeof(float);
	anonymous = status_field(status, "RssAnon:");
	log_info(&s->log, "memory: %s planned, %s used: %s private, %s shared of our own; most resident at once %s",
		 bytes_text(s->plan.mem.total, text[0]), bytes_text(anonymous + own, text[1]),
		 bytes_text(anonymous, text[2]), bytes_text(own, text[3]),
		 bytes_text(status_field(status, "VmHWM:"), text[4]));
	free(status);
}

void service_release(struct shard *s)
{
	data_stop(&s->data);
	if (s->done_event)
		event_free(s->done_event);
	if (s->fab_event)
		event_free(s->fab_event);
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
