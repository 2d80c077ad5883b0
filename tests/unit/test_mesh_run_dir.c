/* SPDX-License-Identifier: Apache-2.0 */
/* The run directory: whose it is, what is in it, and what happens when it cannot be written. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "mesh/run_dir.h"

#include <errno.h>
#include <jansson.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

static const uint8_t id[16] = { 0xab, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 0xef };
static const char config[] = "{\"steps\": 3}";

static char root[64], dir[128];

static int set_up(void **state)
{
	(void)state;
	snprintf(root, sizeof(root), "/tmp/shardmesh-run-dir.XXXXXX");
	assert_non_null(mkdtemp(root));
	snprintf(dir, sizeof(dir), "%s/deep/run", root);
	return 0;
}

static int tear_down(void **state)
{
	char command[128];

	(void)state;
	snprintf(command, sizeof(command), "rm -rf %s", root);
	return system(command);
}

static const char *in_dir(const char *name)
{
	static char path[256];

	snprintf(path, sizeof(path), "%s/%s", dir, name);
	return path;
}

static char *text_of(const char *name)
{
	static char text[4096];
	char *read;
	size_t n;

	assert_int_equal(file_read(in_dir(name), sizeof(text) - 1, &read, &n, NULL), 0);
	memcpy(text, read, n + 1);
	free(read);
	return text;
}

static void open_good(struct run_dir *r)
{
	struct err e;

	if (run_dir_open(r, dir, "job-1", id, config, &e) < 0)
		fail_msg("%s", e.text);
}

static void assert_refused(int code, const char *reason)
{
	struct run_dir r;
	struct err e;

	assert_int_equal(run_dir_open(&r, dir, "job-2", id, config, &e), code);
	if (!strstr(e.text, reason))
		fail_msg("'%s' does not say '%s'", e.text, reason);
	assert_non_null(strstr(e.text, dir));
	/* Nothing is held: releasing it is no harm. */
	run_dir_release(&r);
}

static void test_new(void **state)
{
	struct run_dir r;
	struct err e;
	json_t *job;

	(void)state;
	open_good(&r);
	assert_string_equal(text_of("config.json"), config);
	job = json_load_file(in_dir("job.json"), 0, NULL);
	assert_non_null(job);
	assert_string_equal(json_string_value(json_object_get(job, "job")), "job-1");
	assert_string_equal(json_string_value(json_object_get(job, "id")), "ab0102030405060708090a0b0c0d0eef");
	assert_int_equal(strlen(json_string_value(json_object_get(job, "config_hash"))), 32);
	assert_int_equal(strlen(json_string_value(json_object_get(job, "created"))), 20);
	json_decref(job);
	assert_int_equal(run_dir_endpoint(&r, "127.0.0.1:29400", &e), 0);
	assert_string_equal(text_of("endpoint"), "127.0.0.1:29400\n");
	assert_int_equal(run_dir_line(&r, "{\"step\":1}\n", 11, &e), 0);
	assert_int_equal(run_dir_line(&r, "{\"step\":2}\n", 11, &e), 0);
	assert_string_equal(text_of("steps.jsonl"), "{\"step\":1}\n{\"step\":2}\n");
	assert_int_equal(run_dir_summary(&r, "{}", &e), 0);
	assert_string_equal(text_of("summary.json"), "{}");
	run_dir_release(&r);
	assert_int_equal(access(in_dir("endpoint"), F_OK), -1);
}

static void test_one_coordinator(void **state)
{
	struct run_dir r;
	char expected[64];

	(void)state;
	open_good(&r);
	snprintf(expected, sizeof(expected), "another coordinator is at work in it (pid %d)", getpid());
	assert_refused(-EBUSY, expected);
	/* The one that was refused has changed nothing. */
	assert_non_null(strstr(text_of("job.json"), "job-1"));
	run_dir_release(&r);
}

static void test_other_job(void **state)
{
	struct run_dir r;
	struct err e;

	(void)state;
	open_good(&r);
	assert_int_equal(run_dir_line(&r, "{}\n", 3, &e), 0);
	run_dir_release(&r);
	assert_refused(-EINVAL, "holds job 'job-1': choose another --run-dir or remove it");
	assert_int_equal(unlink(in_dir("job.json")), 0);
	assert_refused(-EINVAL, "holds the steps.jsonl of some job");
	assert_int_equal(unlink(in_dir("steps.jsonl")), 0);
	assert_int_equal(mkdir(in_dir("model"), 0777), 0);
	assert_refused(-EINVAL, "holds the model of some job");
}

static void test_failed_start_is_taken_over(void **state)
{
	struct run_dir r;
	struct err e;

	(void)state;
	open_good(&r);
	run_dir_release(&r);
	if (run_dir_open(&r, dir, "job-2", id, config, &e) < 0)
		fail_msg("%s", e.text);
	assert_non_null(strstr(text_of("job.json"), "job-2"));
	run_dir_release(&r);
}

static void test_cannot_be_made(void **state)
{
	struct err e;

	(void)state;
	snprintf(dir, sizeof(dir), "%s/file/run", root);
	{
		char path[128];

		snprintf(path, sizeof(path), "%s/file", root);
		assert_int_equal(file_write_atomic(path, "", 0, 0644, &e), 0);
	}
	assert_refused(-ENOTDIR, "Not a directory");
	snprintf(dir, sizeof(dir), "/proc/no-such-place");
	assert_refused(-ENOENT, "No such file or directory");
}

/* Root may write everywhere, so where root runs the test it is somebody else for a moment. */
static void test_read_only(void **state)
{
	uid_t me = geteuid();

	(void)state;
	snprintf(dir, sizeof(dir), "%s/ro", root);
	assert_int_equal(mkdir(dir, 0555), 0);
	assert_int_equal(chmod(root, 0755), 0);
	if (me == 0)
		assert_int_equal(seteuid(65534), 0);
	assert_refused(-EACCES, "Permission denied");
	snprintf(dir, sizeof(dir), "%s/ro/below", root);
	assert_refused(-EACCES, "Permission denied");
	if (me == 0)
		assert_int_equal(seteuid(me), 0);
}

/* A file size limit stands for the full disk: the write is short, then fails. */
static void test_full_disk(void **state)
{
	struct rlimit was, small = { .rlim_cur = 30 };
	struct run_dir r;
	struct err e;

	(void)state;
	open_good(&r);
	signal(SIGXFSZ, SIG_IGN);
	assert_int_equal(getrlimit(RLIMIT_FSIZE, &was), 0);
	small.rlim_max = was.rlim_max;
	assert_int_equal(run_dir_line(&r, "{\"a line\":\"of 20\"}..\n", 21, &e), 0);
	assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
	assert_true(run_dir_line(&r, "{\"a line\":\"too long\"}\n", 22, &e) < 0);
	assert_int_equal(setrlimit(RLIMIT_FSIZE, &was), 0);
	assert_non_null(strstr(e.text, "steps.jsonl"));
	assert_string_equal(text_of("steps.jsonl"), "{\"a line\":\"of 20\"}..\n");
	run_dir_release(&r);
}

/* ------------------------------------------------------------------- records */

static void test_record(void **state)
{
	struct step_record r = {
		.step = 7,
		.tokens = 7168,
		.epoch = 3,
		.loss = 2.0 / 3,
		.grad_norm = 1e-300,
		.lr = 0.1,
		.step_seconds = 0.25,
		.tokens_per_second = 4096,
		.validation_loss = 5.551115123125783e-17,
		.has_validation_loss = true,
		.has_state_hash = true,
		.state_hash = { .lo = 0x1234, .hi = 0xabcdef },
		.workers = 2,
		.shards = 4,
	};
	char line[1024];
	int n = step_record_json(&r, line, sizeof(line));
	json_t *o;

	(void)state;
	assert_int_equal(n, strlen(line));
	assert_int_equal(line[n - 1], '\n');
	o = json_loads(line, JSON_REJECT_DUPLICATES, NULL);
	assert_non_null(o);
	assert_int_equal(json_integer_value(json_object_get(o, "step")), 7);
	assert_int_equal(json_integer_value(json_object_get(o, "tokens")), 7168);
	assert_int_equal(json_integer_value(json_object_get(o, "epoch")), 3);
	assert_int_equal(json_integer_value(json_object_get(o, "workers")), 2);
	assert_int_equal(json_integer_value(json_object_get(o, "shards")), 4);
	/* The same bits. */
	assert_true(json_number_value(json_object_get(o, "loss")) == r.loss);
	assert_true(json_number_value(json_object_get(o, "grad_norm")) == r.grad_norm);
	assert_true(json_number_value(json_object_get(o, "lr")) == r.lr);
	assert_true(json_number_value(json_object_get(o, "validation_loss")) == r.validation_loss);
	assert_string_equal(json_string_value(json_object_get(o, "state_hash")), "0000000000abcdef0000000000001234");
	json_decref(o);
	for (int max = 0; max <= n; max++)
		assert_int_equal(step_record_json(&r, line, (size_t)max), -ENOSPC);
	r.has_validation_loss = r.has_state_hash = false;
	r.loss = 1.0 / 0.0;
	assert_true(step_record_json(&r, line, sizeof(line)) > 0);
	assert_null(strstr(line, "validation_loss"));
	assert_null(strstr(line, "state_hash"));
	assert_non_null(strstr(line, "\"loss\":null,"));
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

int main(void)
{
	const struct CMUnitTest tests[] = {
		TEST(test_new),
		TEST(test_one_coordinator),
		TEST(test_other_job),
		TEST(test_failed_start_is_taken_over),
		TEST(test_cannot_be_made),
		TEST(test_read_only),
		TEST(test_full_disk),
		cmocka_unit_test(test_record),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
