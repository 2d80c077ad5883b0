/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The coordinator's shell with members that follow a script, all in one loop:
 * sockets, files and JSON are real, the training is not.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "mesh/mesh.h"

#include <errno.h>
#include <event2/event.h>
#include <fcntl.h>
#include <jansson.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

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

static float element(uint32_t unit, uint64_t i)
{
	return (float)((unit * 1000003u + i) & 0xffffff);
}

static int m_welcome(void *ctx, const struct msg_welcome *w, struct err *e)
{
	struct member *m = ctx;
	char *text = strndup((const char *)w->config.data, w->config.bytes);
	int rc = job_config_parse(text, "welcome", "/", &m->job, e);

	free(text);
	m->welcome = *w;
	m->welcomes++;
	return rc;
}

static void m_members(void *ctx, const struct member_table *t)
{
	struct member *m = ctx;
	struct msg_ready ready = { .max_span = 4, .data_fingerprint = 99, .planned_bytes = 1000 + m->self.member };
	uint32_t shards = 0;

	for (uint32_t i = 0; i < t->n; i++)
		shards += t->member[i].role == ROLE_SHARD;
	if (shards == m->welcome.n_shards)
		assert_int_equal(member_link_send(m->link, WIRE_READY, &ready), 0);
}

/* A leaf's loss is step + index / 8: their mean is known, and exact. */
static void span_done(struct member *m, const struct msg_lease *l)
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

static void shard_step(struct member *m, const struct msg_step *s)
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

static void send_piece(struct member *m, const struct msg_export_read *r)
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

static int m_message(void *ctx, const struct wire_header *h, const union wire_msg *m)
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

static void m_over(void *ctx, uint32_t exit_code, const char *text)
{
	struct member *m = ctx;

	m->overs++;
	m->exit_code = exit_code;
	snprintf(m->text, sizeof(m->text), "%s", text);
	member_link_free(m->link);
	m->link = NULL;
}

static const struct member_ops member_ops = { m_welcome, m_members, m_message, m_over };

static void init_self(struct fixture *f, struct mesh_self *s, enum member_role role)
{
	memset(s, 0, sizeof(*s));
	s->base = f->base;
	s->role = role;
	s->token.bytes = 32;
	snprintf(s->job, sizeof(s->job), "test-job");
}

static struct member *join(struct fixture *f, enum member_role role)
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

static void o_event(struct observer *o, json_t *j)
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

static void o_ready(struct conn *c, void *ctx)
{
	struct observer *o = ctx;

	o->ready++;
	assert_int_equal(conn_send(c, WIRE_WATCH, &(struct msg_watch){ 0 }), 0);
}

static int o_message(struct conn *c, const struct wire_header *h, const union wire_msg *m, void *ctx)
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

static void o_closed(struct conn *c, int status, const char *text, void *ctx)
{
	struct observer *o = ctx;

	(void)c;
	(void)status;
	(void)text;
	o->c = NULL;
	o->closed++;
}

static const struct conn_ops observer_ops = { .ready = o_ready, .message = o_message, .closed = o_closed };

static struct observer *observe(struct fixture *f)
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

static void open_coordinator(struct fixture *f)
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

static int set_up(void **state)
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

static int tear_down(void **state)
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

static void wake(evutil_socket_t fd, short what, void *ctx)
{
	(void)fd;
	(void)what;
	(void)ctx;
}

/* One turn of the loop, 20 ms at most. */
static void turn(struct fixture *f)
{
	struct timeval tick = { .tv_usec = 20000 };

	event_base_once(f->base, -1, EV_TIMEOUT, wake, NULL, &tick);
	event_base_loop(f->base, EVLOOP_ONCE);
}

static void run_until(struct fixture *f, const int *value, int least)
{
	uint64_t end = clock_now_ns() + 20000000000u;

	while (*value < least) {
		assert_true(clock_now_ns() < end);
		turn(f);
	}
}

static void join_all(struct fixture *f)
{
	for (int i = 0; i < N_SHARDS; i++) {
		join(f, ROLE_SHARD);
		run_until(f, &f->member[i].welcomes, 1);
	}
	join(f, ROLE_WORKER);
}

static void assert_says(const char *text, const char *part)
{
	if (!strstr(text, part))
		fail_msg("'%s' does not say '%s'", text, part);
}

static void assert_ends(struct fixture *f, int exit_code, const char *reason)
{
	struct err e = { .text = "" };
	int code = coordinator_run(f->co, &e);

	if (code != exit_code)
		fail_msg("exit code %d: %s", code, e.text);
	assert_says(e.text, reason);
}

static char *read_text(const char *dir, const char *name)
{
	char path[256], *text;
	struct err e;
	size_t n;

	snprintf(path, sizeof(path), "%s/%s", dir, name);
	if (file_read(path, 1 << 20, &text, &n, &e) < 0)
		fail_msg("%s", e.text);
	return text;
}

static bool exists(const struct fixture *f, const char *name)
{
	char path[256];

	snprintf(path, sizeof(path), "%s/%s", f->dir, name);
	return access(path, F_OK) == 0;
}

static json_t *read_json(const struct fixture *f, const char *name)
{
	char *text = read_text(f->dir, name);
	json_t *j = json_loads(text, 0, NULL);

	assert_non_null(j);
	free(text);
	return j;
}

/* ---------------------------------------------------------------------- tests */

static void check_model(const struct fixture *f)
{
	struct unit_table t;
	struct st_file st;
	char path[256];
	struct err e;
	json_t *c = read_json(f, "model/config.json");

	assert_string_equal(json_string_value(json_object_get(json_object_get(c, "shardmesh"), "data_format")),
			    "bytes");
	assert_int_equal(json_integer_value(json_object_get(c, "n_embd")), 128);
	json_decref(c);
	assert_int_equal(unit_table_init(&t, &f->job.model, &e), 0);
	snprintf(path, sizeof(path), "%s/model/model.safetensors", f->dir);
	assert_int_equal(st_open(path, &st, &e), 0);
	assert_int_equal(st.n_tensors, t.n_tensors);
	for (uint32_t i = 0; i < t.n_tensors; i++) {
		const struct tensor_info *x = &t.tensor[i];
		const struct st_tensor *y = st_find(&st, x->name);
		float *data = calloc(x->n, sizeof(*data));

		assert_non_null(y);
		assert_non_null(data);
		assert_int_equal(st_read_f32(&st, y, 0, x->n, data, &e), 0);
		for (uint64_t k = 0; k < x->n; k++)
			assert_true(data[k] == element(x->unit, x->offset + k));
		free(data);
	}
	st_close(&st);
	unit_table_release(&t);
}

static void check_lines(const struct fixture *f, uint64_t steps)
{
	char *text = read_text(f->dir, "steps.jsonl"), *rest = text;

	for (uint64_t step = 1; step <= steps; step++) {
		char *line = strsep(&rest, "\n");
		json_t *j = json_loads(line, 0, NULL);

		assert_non_null(j);
		assert_int_equal(json_integer_value(json_object_get(j, "step")), step);
		/* Leaves: step + {0,1,2,3} / 8; two owners of square sum 2 each; M = 4; hashes 5 + 5. */
		assert_true(json_number_value(json_object_get(j, "loss")) == (double)step + 0.1875);
		assert_true(json_number_value(json_object_get(j, "grad_norm")) == 0.5);
		assert_int_equal(json_integer_value(json_object_get(j, "tokens")), step * 8 * 32);
		assert_string_equal(json_string_value(json_object_get(j, "state_hash")),
				    "0000000000000000000000000000000a");
		json_decref(j);
	}
	assert_string_equal(rest, "");
	free(text);
}

static void test_whole_job(void **state)
{
	struct fixture *f = *state;
	struct observer *o = observe(f);
	json_t *s;

	run_until(f, &o->phases, 1);
	assert_string_equal(o->last_phase, "gather");
	assert_true(exists(f, "endpoint"));
	join_all(f);
	assert_ends(f, 0, "");
	for (uint32_t i = 0; i < 3; i++) {
		assert_int_equal(f->member[i].overs, 1);
		assert_int_equal(f->member[i].exit_code, 0);
		assert_int_equal(f->member[i].welcome.host_members, i < 2 ? 2 : 1);
		assert_int_equal(f->member[i].welcome.host_index, i < 2 ? i : 0);
		assert_string_equal(f->member[i].welcome.profile, "portable:1");
		assert_int_equal(f->member[i].job.steps, 3);
	}
	check_lines(f, 3);
	check_model(f);
	assert_false(exists(f, "model.tmp"));
	s = read_json(f, "summary.json");
	assert_int_equal(json_integer_value(json_object_get(s, "exit")), 0);
	assert_int_equal(json_integer_value(json_object_get(s, "steps")), 3);
	assert_int_equal(json_integer_value(json_object_get(s, "tokens")), 3 * 8 * 32);
	/* Version 3, in the forward-only step 4: leaves 4 and 4 + 1/8. */
	assert_true(json_number_value(json_object_get(s, "validation_loss")) == 4.0625);
	assert_int_equal(json_integer_value(json_object_get(s, "validation_version")), 3);
	assert_int_equal(json_array_size(json_object_get(s, "members")), 3);
	assert_int_equal(
		json_integer_value(json_object_get(json_array_get(json_object_get(s, "members"), 0), "planned_bytes")),
		1001);
	assert_says(json_string_value(json_object_get(s, "model")), "/run/model");
	json_decref(s);
	run_until(f, &o->closed, 1);
	assert_int_equal(o->steps, 3);
	assert_int_equal(o->plans, 3);
	assert_int_equal(o->joins, 3);
	assert_int_equal(o->summaries, 1);
	assert_int_equal(o->shutdowns, 1);
	assert_int_equal(json_integer_value(json_object_get(o->summary, "steps")), 3);
	coordinator_free(f->co);
	f->co = NULL;
	assert_false(exists(f, "endpoint"));
}

static bool line_is_there(const struct fixture *f, const char *part)
{
	char *text = read_text(f->dir, "steps.jsonl");
	bool found = strstr(text, part) != NULL;

	free(text);
	return found;
}

static void test_late_watcher(void **state)
{
	struct fixture *f = *state;
	uint64_t end = clock_now_ns() + 20000000000u;
	struct observer *o;

	f->silent_step = 3;
	join_all(f);
	while (!line_is_there(f, "{\"step\":2,")) {
		assert_true(clock_now_ns() < end);
		turn(f);
	}
	o = observe(f);
	run_until(f, &o->steps, 1);
	assert_string_equal(o->last_phase, "run");
	assert_int_equal(o->plans, 3);
}

static const json_t *member_in(const json_t *status, uint32_t id)
{
	const json_t *m;
	size_t i;

	for (i = 0; (m = json_array_get(json_object_get(status, "members"), i)); i++)
		if (json_integer_value(json_object_get(m, "id")) == id)
			return m;
	fail_msg("no member %u", id);
	return NULL;
}

static void test_status(void **state)
{
	struct fixture *f = *state;
	struct observer *o = observe(f);
	const json_t *m;

	f->silent_step = 2;
	wait_begin(&f->member[2].wait, WAIT_UNIT, 2, 17, 4, 1);
	join_all(f);
	run_until(f, &o->steps, 1);
	/* Until a heartbeat has told of the wait. */
	do {
		int asked = o->statuses;

		assert_int_equal(conn_send(o->c, WIRE_STATUS_GET, &(struct msg_status_get){ 0 }), 0);
		run_until(f, &o->statuses, asked + 1);
		m = member_in(o->last_status, 3);
	} while (json_array_size(json_object_get(m, "waits")) == 0);
	assert_says(json_string_value(json_array_get(json_object_get(m, "waits"), 0)),
		    "worker 3 waits for unit 17 page 4 from shard 1, ");
	assert_string_equal(json_string_value(json_object_get(m, "role")), "worker");
	assert_true(json_is_true(json_object_get(m, "ready")));
	assert_int_equal(json_integer_value(json_object_get(m, "pid")), getpid());
	assert_int_equal(json_integer_value(json_object_get(json_object_get(m, "lease"), "first")), 0);
	assert_int_equal(json_integer_value(json_object_get(m, "planned_bytes")), 1003);
	assert_true(json_is_null(json_object_get(member_in(o->last_status, 1), "lease")));
	assert_string_equal(json_string_value(json_object_get(o->last_status, "job")), "test-job");
	assert_string_equal(json_string_value(json_object_get(o->last_status, "phase")), "run");
	assert_int_equal(json_integer_value(json_object_get(o->last_status, "step")), 2);
	assert_says(json_string_value(json_object_get(o->last_status, "waiting_for")), "of worker 3");
	assert_says(json_string_value(json_object_get(o->last_status, "run_dir")), "/run");
}

static void test_one_shard_too_many(void **state)
{
	struct fixture *f = *state;
	struct member *third;

	for (int i = 0; i < N_SHARDS; i++) {
		join(f, ROLE_SHARD);
		run_until(f, &f->member[i].welcomes, 1);
	}
	third = join(f, ROLE_SHARD);
	run_until(f, &third->overs, 1);
	assert_int_equal(third->exit_code, EXIT_RETRY_LATER);
	assert_says(third->text, "the job has its 2 shard services");
	/* The job itself does not care. */
	join(f, ROLE_WORKER);
	assert_ends(f, 0, "");
}

/* The step that is open when it is asked to stop is still finished, and no other is begun. */
static void test_stop_by_observer(void **state)
{
	struct fixture *f = *state;
	struct observer *o = observe(f);
	int notes;

	f->silent_step = 2;
	join_all(f);
	run_until(f, &o->steps, 1);
	notes = o->notes;
	assert_int_equal(conn_send(o->c, WIRE_STOP, &(struct msg_stop){ .reason = "enough" }), 0);
	run_until(f, &o->notes, notes + 1);
	f->silent_step = 0;
	span_done(&f->member[2], &f->member[2].held);
	assert_ends(f, 0, "");
	check_lines(f, 2);
	check_model(f);
}

static void test_last_worker_lost(void **state)
{
	struct fixture *f = *state;
	struct observer *o = observe(f);

	f->silent_step = 2;
	join_all(f);
	run_until(f, &o->steps, 1);
	member_link_free(f->member[2].link);
	f->member[2].link = NULL;
	assert_ends(f, 1, "the last worker, was lost: connection closed");
	assert_int_equal(f->member[0].exit_code, 1);
}

static void test_signal(void **state)
{
	struct fixture *f = *state;
	struct observer *o = observe(f);

	join_all(f);
	run_until(f, &o->steps, 1);
	coordinator_stop(f->co, 130);
	assert_ends(f, 130, "the model is in ");
	check_model(f);
	assert_int_equal(f->member[0].exit_code, 0);
}

static void test_stop_before_start(void **state)
{
	struct fixture *f = *state;

	join(f, ROLE_SHARD);
	run_until(f, &f->member[0].welcomes, 1);
	coordinator_stop(f->co, 143);
	assert_ends(f, 143, "stopped before the first step");
	assert_int_equal(f->member[0].overs, 1);
	assert_int_equal(f->member[0].exit_code, 143);
}

static void test_shard_lost(void **state)
{
	struct fixture *f = *state;
	struct observer *o = observe(f);
	uint64_t start;
	char expected[128];
	json_t *s;

	f->silent_step = 2;
	join_all(f);
	run_until(f, &o->steps, 1);
	member_link_free(f->member[1].link);
	f->member[1].link = NULL;
	start = clock_now_ns();
	snprintf(expected, sizeof(expected), "shard service 2 (pid %d on ", getpid());
	assert_ends(f, 1, expected);
	assert_true(clock_now_ns() - start < 3000000000u);
	assert_says(f->member[2].text, "was lost: connection closed");
	assert_int_equal(f->member[2].exit_code, 1);
	s = read_json(f, "summary.json");
	assert_int_equal(json_integer_value(json_object_get(s, "exit")), 1);
	assert_says(json_string_value(json_object_get(s, "text")), "was lost");
	assert_true(json_is_null(json_object_get(s, "model")));
	json_decref(s);
	check_lines(f, 1);
}

static void assert_no_model(const struct fixture *f)
{
	assert_false(exists(f, "model"));
	assert_false(exists(f, "model.tmp"));
}

static void test_shard_lost_in_export(void **state)
{
	struct fixture *f = *state;

	f->dies_at_piece = 3;
	join_all(f);
	assert_ends(f, 1, "was lost: ");
	assert_no_model(f);
}

static void test_wrong_piece(void **state)
{
	struct fixture *f = *state;

	f->lies_at_piece = 2;
	join_all(f);
	assert_ends(f, 1, "was lost: EXPORT_DATA was not accepted");
	assert_no_model(f);
}

static void limit_files(struct rlimit *was, rlim_t bytes)
{
	struct rlimit small;

	signal(SIGXFSZ, SIG_IGN);
	assert_int_equal(getrlimit(RLIMIT_FSIZE, was), 0);
	small = *was;
	small.rlim_cur = bytes;
	assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
}

/* A file size limit stands for the disk that is full. */
static void test_no_room_for_line(void **state)
{
	struct fixture *f = *state;
	struct rlimit was;

	/* The log would be stopped too. */
	f->self.log = NULL;
	join_all(f);
	limit_files(&was, 400);
	assert_ends(f, 1, "steps.jsonl: ");
	assert_int_equal(setrlimit(RLIMIT_FSIZE, &was), 0);
	check_lines(f, 1);
	assert_int_equal(f->member[0].overs, 1);
	assert_says(f->member[0].text, "steps.jsonl: ");
}

static void test_no_room_for_model(void **state)
{
	struct fixture *f = *state;
	struct rlimit was;

	join_all(f);
	limit_files(&was, 1000000);
	assert_ends(f, 1, "model.safetensors: ");
	assert_int_equal(setrlimit(RLIMIT_FSIZE, &was), 0);
	assert_no_model(f);
	check_lines(f, 3);
}

static void test_observers_only_ask(void **state)
{
	struct fixture *f = *state;
	struct observer *o = observe(f);

	run_until(f, &o->ready, 1);
	assert_int_equal(conn_send(o->c, WIRE_REGISTER, &(struct msg_registration){ .pid = 1 }), 0);
	run_until(f, &o->closed, 1);
	assert_int_equal(o->joins, 0);
}

static void test_late_loop(void **state)
{
	struct fixture *f = *state;
	char text[65536] = "";

	join(f, ROLE_SHARD);
	run_until(f, &f->member[0].welcomes, 1);
	usleep(1300000);
	for (int i = 0; i < 50 && !strstr(text, "stood still"); i++) {
		turn(f);
		assert_true(pread(f->log_fd, text, sizeof(text) - 1, 0) > 0);
	}
	assert_says(text, "this process stood still for 1.");
}

/* What fails half way leaves nothing behind that the next try would trip over. */
static void test_cannot_listen(void **state)
{
	struct fixture *f = *state;
	struct coordinator_config cfg = { .job = &f->job, .profile = "portable:1" };
	struct coordinator *other;
	char dir[128], endpoint[64];
	struct err e;

	snprintf(dir, sizeof(dir), "%s/other", f->root);
	snprintf(endpoint, sizeof(endpoint), "%s", coordinator_endpoint(f->co));
	cfg.run_dir = dir;
	cfg.listen = endpoint;
	assert_int_equal(batch_resolve(&f->job, 1, &cfg.batch, &e), 0);
	assert_int_equal(coordinator_open(&f->self, &cfg, &other, &e), -EADDRINUSE);
	assert_says(e.text, "cannot listen on 127.0.0.1:");
	cfg.listen = "127.0.0.1:0";
	assert_int_equal(coordinator_open(&f->self, &cfg, &other, &e), 0);
	coordinator_free(other);
	cfg.run_dir = f->dir;
	assert_int_equal(coordinator_open(&f->self, &cfg, &other, &e), -EBUSY);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

int main(void)
{
	const struct CMUnitTest tests[] = {
		TEST(test_whole_job),
		TEST(test_late_watcher),
		TEST(test_status),
		TEST(test_one_shard_too_many),
		TEST(test_stop_by_observer),
		TEST(test_last_worker_lost),
		TEST(test_signal),
		TEST(test_stop_before_start),
		TEST(test_shard_lost),
		TEST(test_shard_lost_in_export),
		TEST(test_wrong_piece),
		TEST(test_no_room_for_line),
		TEST(test_no_room_for_model),
		TEST(test_observers_only_ask),
		TEST(test_late_loop),
		TEST(test_cannot_listen),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
