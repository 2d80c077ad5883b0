/* SPDX-License-Identifier: Apache-2.0 */
/* The coordinator's shell: a whole job, and every way in which one ends early. */
#include "tests/unit/mesh_script.h"

#include <signal.h>
#include <sys/resource.h>

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

static const char *word_of(const json_t *o, const char *key)
{
	return json_string_value(json_object_get(o, key));
}

static void check_pairs(const json_t *fabric)
{
	const json_t *first = json_array_get(fabric, 0), *second = json_array_get(fabric, 1), *refused;

	assert_int_equal(json_array_size(fabric), 2);
	assert_int_equal(json_integer_value(json_object_get(first, "shard")), 1);
	assert_string_equal(word_of(first, "provider"), "local");
	assert_int_equal(json_array_size(json_object_get(first, "refused")), 0);
	assert_string_equal(word_of(second, "provider"), "verbs");
	assert_string_equal(word_of(second, "description"), "rxe0/1, by cm");
	refused = json_array_get(json_object_get(second, "refused"), 0);
	assert_string_equal(word_of(refused, "provider"), "local");
	assert_string_equal(word_of(refused, "reason"), "another host");
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
	assert_null(json_object_get(member_in(o->last_status, 1), "fabric"));
	check_pairs(json_object_get(m, "fabric"));
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
