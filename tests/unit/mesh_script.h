/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A coordinator with members that follow a script, and an observer, all in one
 * loop: sockets, files and JSON are real, the training is not. Losses, norms
 * and the model's elements are such that the results are known exactly.
 */
#ifndef SHARDMESH_TEST_MESH_SCRIPT_H
#define SHARDMESH_TEST_MESH_SCRIPT_H

#include "mesh/mesh.h"

#include <errno.h>
#include <event2/event.h>
#include <fcntl.h>
#include <jansson.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#define MEMBERS 4
#define N_SHARDS 2

static const char config[] =
	"{\"train_batch_size\": 8, \"train_micro_batch_size_per_gpu\": 2,"
	"\"optimizer\": {\"type\": \"AdamW\", \"params\": {\"lr\": 1e-3}},"
	"\"zero_optimization\": {\"stage\": 3},"
	"\"shardmesh\": {"
	"\"model\": {\"model_type\": \"gpt2\", \"vocab_size\": 256, \"n_positions\": 64, \"n_embd\": 128, \"n_layer\": 2,"
	" \"n_head\": 4},"
	"\"data\": {\"train\": \"text.txt\", \"format\": \"bytes\", \"sequence_length\": 32, \"validation_fraction\": 0.2},"
	"\"steps\": 3, \"seed\": 7, \"eval_batches\": 2, \"shards\": 2, \"workers\": 1, \"threads_per_worker\": 1,"
	"\"state_hash_interval\": 1, \"run_dir\": \"run\"}}";

struct fixture;

struct member {
	struct fixture *f;
	struct mesh_self self;
	struct member_link *link;
	struct wait_record wait;
	struct msg_welcome welcome;
	struct job_config job;
	struct msg_lease held; /* not answered, see silent_step */
	uint32_t pieces;       /* EXPORT_READs that came */
	int welcomes, overs;
	uint32_t exit_code;
	char text[600];
};

struct observer {
	struct mesh_self self;
	struct conn *c;
	int ready, statuses, steps, phases, plans, notes, joins, summaries, shutdowns, closed;
	json_t *last_status, *summary;
	char last_phase[32];
};

struct fixture {
	struct event_base *base;
	struct mesh_self self;
	struct log log;
	struct job_config job;
	struct coordinator *co;
	struct member member[MEMBERS];
	uint32_t n_members;
	struct observer observer;
	char root[64], dir[128];
	uint32_t silent_step;   /* the worker answers no lease of this step on */
	uint32_t dies_at_piece; /* the first shard service ends its link instead of the n-th piece */
	uint32_t lies_at_piece; /* it sends one element too few */
	int log_fd;
};

/* ------------------------------------------------------------- scripted members */

static inline float element(uint32_t unit, uint64_t i)
{
	return (float)((unit * 1000003u + i) & 0xffffff);
}

static inline int m_welcome(void *ctx, const struct msg_welcome *w, struct err *e)
{
	struct member *m = ctx;
	char *text = strndup((const char *)w->config.data, w->config.bytes);
	int rc = job_config_parse(text, "welcome", "/", &m->job, e);

	free(text);
	m->welcome = *w;
	m->welcomes++;
	return rc;
}

/* What came of two shard services: one by the second provider it tried. */
static inline void say_choices(struct member *m)
{
	const struct msg_choice said[] = {
		{ .shard = 1, .chosen = 1, .provider = "local", .text = "shared memory" },
		{ .shard = 2, .provider = "local", .text = "another host" },
		{ .shard = 2, .chosen = 1, .provider = "verbs", .text = "rxe0/1, by cm" },
	};

	for (size_t i = 0; i < ARRAY_LEN(said); i++)
		assert_int_equal(member_link_send(m->link, WIRE_CHOICE, &said[i]), 0);
}

static inline void m_members(void *ctx, const struct member_table *t)
{
	struct member *m = ctx;
	struct msg_ready ready = { .max_span = 4, .data_fingerprint = 99, .planned_bytes = 1000 + m->self.member };
	uint32_t shards = 0;

	for (uint32_t i = 0; i < t->n; i++)
		shards += t->member[i].role == ROLE_SHARD;
	if (shards != m->welcome.n_shards)
		return;
	if (m->self.role == ROLE_WORKER)
		say_choices(m);
	assert_int_equal(member_link_send(m->link, WIRE_READY, &ready), 0);
}

/* A leaf's loss is step + index / 8: their mean is known, and exact. */
static inline void span_done(struct member *m, const struct msg_lease *l)
{
	struct msg_span_done done = {
		.step = l->step,
		.lease = l->lease,
		.kind = l->kind,
		.first = l->first,
		.level = l->level,
		.seconds_compute = 0.5,
	};
	uint32_t n = l->kind == LEASE_EVAL ? 2 : 4;

	if (m->f->silent_step && l->step >= m->f->silent_step) {
		m->held = *l;
		return;
	}
	for (uint32_t i = l->first; i < n && i < l->first + (1u << l->level); i++)
		done.loss += (double)l->step + i / 8.0;
	assert_int_equal(member_link_send(m->link, WIRE_SPAN_DONE, &done), 0);
}

static inline void shard_step(struct member *m, const struct msg_step *s)
{
	struct msg_applied applied = { .step = s->commit_step, .has_hash = s->hash_wanted, .hash_lo = 5 };
	struct msg_vote vote = { .step = s->open_step };
	struct exact_sum sum;

	if (s->has_commit)
		assert_int_equal(member_link_send(m->link, WIRE_APPLIED, &applied), 0);
	if (!s->has_open || !s->n_micro)
		return;
	exact_sum_clear(&sum);
	exact_sum_add(&sum, 2.0);
	memcpy(vote.square_sum, &sum, sizeof(vote.square_sum));
	assert_int_equal(member_link_send(m->link, WIRE_VOTE, &vote), 0);
}

static inline void send_piece(struct member *m, const struct msg_export_read *r)
{
	float *data = calloc(r->n, sizeof(*data));
	struct msg_export_data d = { .request = r->request, .bytes = { (uint8_t *)data, r->n * 4 } };
	struct fixture *f = m->f;

	assert_non_null(data);
	m->pieces++;
	for (uint32_t i = 0; i < r->n; i++)
		data[i] = element(r->unit, r->offset + i);
	if (m == &f->member[0] && m->pieces == f->lies_at_piece)
		d.bytes.bytes -= 4;
	if (m == &f->member[0] && m->pieces == f->dies_at_piece) {
		member_link_free(m->link);
		m->link = NULL;
	} else if (m->link) {
		assert_int_equal(member_link_send(m->link, WIRE_EXPORT_DATA, &d), 0);
	}
	free(data);
}

static inline int m_message(void *ctx, const struct wire_header *h, const union wire_msg *m)
{
	struct member *me = ctx;

	if (h->type == WIRE_STEP && me->self.role == ROLE_SHARD) {
		shard_step(me, &m->step);
	} else if (h->type == WIRE_STEP && m->step.lease) {
		struct msg_lease l = { .step = m->step.open_step,
				       .lease = m->step.lease,
				       .kind = m->step.lease_kind,
				       .first = m->step.lease_first,
				       .level = m->step.lease_level };

		span_done(me, &l);
	} else if (h->type == WIRE_LEASE) {
		span_done(me, &m->lease);
	} else if (h->type == WIRE_EXPORT_READ) {
		send_piece(me, &m->export_read);
	}
	return 0;
}

static inline void m_over(void *ctx, uint32_t exit_code, const char *text)
{
	struct member *m = ctx;

	m->overs++;
	m->exit_code = exit_code;
	snprintf(m->text, sizeof(m->text), "%s", text);
	member_link_free(m->link);
	m->link = NULL;
}

static const struct member_ops member_ops = { m_welcome, m_members, m_message, m_over };

static inline void init_self(struct fixture *f, struct mesh_self *s, enum member_role role)
{
	memset(s, 0, sizeof(*s));
	s->base = f->base;
	s->role = role;
	s->token.bytes = 32;
	snprintf(s->job, sizeof(s->job), "test-job");
}

static inline struct member *join(struct fixture *f, enum member_role role)
{
	struct member *m = &f->member[f->n_members++];
	struct member_link_config cfg = {
		.rdzv_endpoint = coordinator_endpoint(f->co),
		.join_timeout_ns = 10000000000u,
		.listen = role == ROLE_SHARD ? "127.0.0.1:1" : "",
		.waits = &m->wait,
		.n_waits = 1,
	};
	struct err e;

	assert_true(f->n_members <= MEMBERS);
	m->f = f;
	init_self(f, &m->self, role);
	assert_int_equal(member_link_open(&m->self, &cfg, &member_ops, m, &m->link, &e), 0);
	return m;
}

/* ------------------------------------------------------------------- observer */

static inline void o_event(struct observer *o, json_t *j)
{
	const char *event = json_string_value(json_object_get(j, "event"));

	assert_non_null(event);
	o->steps += strcmp(event, "step") == 0;
	o->plans += strcmp(event, "plan") == 0;
	o->notes += strcmp(event, "note") == 0;
	o->joins += strcmp(event, "member") == 0 && json_is_true(json_object_get(j, "joined"));
	if (strcmp(event, "phase") == 0) {
		o->phases++;
		snprintf(o->last_phase, sizeof(o->last_phase), "%s", json_string_value(json_object_get(j, "phase")));
	} else if (strcmp(event, "summary") == 0) {
		o->summaries++;
		o->summary = json_incref(j);
	}
}

static inline void o_ready(struct conn *c, void *ctx)
{
	struct observer *o = ctx;

	o->ready++;
	assert_int_equal(conn_send(c, WIRE_WATCH, &(struct msg_watch){ 0 }), 0);
}

static inline int o_message(struct conn *c, const struct wire_header *h, const union wire_msg *m, void *ctx)
{
	struct observer *o = ctx;
	json_t *j;

	(void)c;
	if (h->type == WIRE_SHUTDOWN) {
		o->shutdowns++;
		return 0;
	}
	assert_true(h->type == WIRE_STATUS || h->type == WIRE_PROGRESS);
	j = json_loadb((const char *)m->status.json.data, m->status.json.bytes, JSON_REJECT_DUPLICATES, NULL);
	assert_non_null(j);
	if (h->type == WIRE_PROGRESS) {
		o_event(o, j);
		json_decref(j);
		return 0;
	}
	o->statuses++;
	json_decref(o->last_status);
	o->last_status = j;
	return 0;
}

static inline void o_closed(struct conn *c, int status, const char *text, void *ctx)
{
	struct observer *o = ctx;

	(void)c;
	(void)status;
	(void)text;
	o->c = NULL;
	o->closed++;
}

static const struct conn_ops observer_ops = { .ready = o_ready, .message = o_message, .closed = o_closed };

static inline struct observer *observe(struct fixture *f)
{
	struct observer *o = &f->observer;
	struct err e;

	init_self(f, &o->self, ROLE_OBSERVER);
	assert_int_equal(conn_connect(&o->self, coordinator_endpoint(f->co), clock_now_ns() + 10000000000u,
				      &observer_ops, o, &o->c, &e),
			 0);
	return o;
}

/* -------------------------------------------------------------------- fixture */

static inline void open_coordinator(struct fixture *f)
{
	struct coordinator_config cfg = {
		.listen = "127.0.0.1:0", .job = &f->job, .profile = "portable:1", .run_dir = f->dir
	};
	struct err e;

	assert_int_equal(batch_resolve(&f->job, f->job.workers, &cfg.batch, &e), 0);
	assert_int_equal(cfg.batch.n_micro, 4);
	if (coordinator_open(&f->self, &cfg, &f->co, &e) < 0)
		fail_msg("%s", e.text);
}

static inline int set_up(void **state)
{
	struct fixture *f = calloc(1, sizeof(*f));
	char path[128];
	struct err e;

	assert_non_null(f);
	snprintf(f->root, sizeof(f->root), "/tmp/shardmesh-coordinator.XXXXXX");
	assert_non_null(mkdtemp(f->root));
	snprintf(f->dir, sizeof(f->dir), "%s/run", f->root);
	f->base = event_base_new();
	assert_non_null(f->base);
	init_self(f, &f->self, ROLE_COORDINATOR);
	snprintf(path, sizeof(path), "%s/log", f->root);
	f->log_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	assert_true(f->log_fd >= 0);
	log_init(&f->log, f->log_fd, "coordinator");
	f->self.log = &f->log;
	if (job_config_parse(config, "test", f->root, &f->job, &e) < 0)
		fail_msg("%s", e.text);
	open_coordinator(f);
	*state = f;
	return 0;
}

static inline int tear_down(void **state)
{
	struct fixture *f = *state;
	char command[128];

	conn_free(f->observer.c);
	json_decref(f->observer.last_status);
	json_decref(f->observer.summary);
	for (uint32_t i = 0; i < f->n_members; i++) {
		member_link_free(f->member[i].link);
		job_config_release(&f->member[i].job);
	}
	coordinator_free(f->co);
	event_base_free(f->base);
	job_config_release(&f->job);
	close(f->log_fd);
	snprintf(command, sizeof(command), "rm -rf %s", f->root);
	free(f);
	return system(command);
}

static inline void wake(evutil_socket_t fd, short what, void *ctx)
{
	(void)fd;
	(void)what;
	(void)ctx;
}

/* One turn of the loop, 20 ms at most. */
static inline void turn(struct fixture *f)
{
	struct timeval tick = { .tv_usec = 20000 };

	event_base_once(f->base, -1, EV_TIMEOUT, wake, NULL, &tick);
	event_base_loop(f->base, EVLOOP_ONCE);
}

static inline void run_until(struct fixture *f, const int *value, int least)
{
	uint64_t end = clock_now_ns() + 20000000000u;

	while (*value < least) {
		assert_true(clock_now_ns() < end);
		turn(f);
	}
}

static inline void join_all(struct fixture *f)
{
	for (int i = 0; i < N_SHARDS; i++) {
		join(f, ROLE_SHARD);
		run_until(f, &f->member[i].welcomes, 1);
	}
	join(f, ROLE_WORKER);
}

static inline void assert_says(const char *text, const char *part)
{
	if (!strstr(text, part))
		fail_msg("'%s' does not say '%s'", text, part);
}

static inline void assert_ends(struct fixture *f, int exit_code, const char *reason)
{
	struct err e = { .text = "" };
	int code = coordinator_run(f->co, &e);

	if (code != exit_code)
		fail_msg("exit code %d: %s", code, e.text);
	assert_says(e.text, reason);
}

static inline char *read_text(const char *dir, const char *name)
{
	char path[256], *text;
	struct err e;
	size_t n;

	snprintf(path, sizeof(path), "%s/%s", dir, name);
	if (file_read(path, 1 << 20, &text, &n, &e) < 0)
		fail_msg("%s", e.text);
	return text;
}

static inline bool exists(const struct fixture *f, const char *name)
{
	char path[256];

	snprintf(path, sizeof(path), "%s/%s", f->dir, name);
	return access(path, F_OK) == 0;
}

static inline json_t *read_json(const struct fixture *f, const char *name)
{
	char *text = read_text(f->dir, name);
	json_t *j = json_loads(text, 0, NULL);

	assert_non_null(j);
	free(text);
	return j;
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

#endif
