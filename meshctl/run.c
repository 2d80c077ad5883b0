/* SPDX-License-Identifier: Apache-2.0 */
/*
 * meshctl run: a whole job on this machine. Starts the coordinator, the shard
 * services and the workers as children, follows the job as an observer, and
 * ends when the coordinator ends.
 *
 * The coordinator decides; the launcher only starts, shows and cleans up. Its
 * exit code is the coordinator's. When a child dies the launcher says so at
 * once, and the coordinator, which sees the connection drop, decides what it
 * means. When the coordinator itself dies, everything ends.
 *
 * Ctrl-C once: the coordinator is asked to finish (SIGINT). Twice: SIGKILL.
 */
#include "meshctl/meshctl.h"

#include <errno.h>
#include <event2/event.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define ENDPOINT_WAIT_NS 10000000000ull
#define WATCH_CONNECT_NS 10000000000ull
#define GRACE_MS 2000 /* for members, once the coordinator has ended */

struct run {
	const struct job_config *config;
	struct launcher launcher;
	struct child *coordinator;
	struct progress_view progress;
	struct mesh_self self;
	struct event *on_child, *on_int, *on_term, *grace;
	struct conn *watch;
	char config_path[600], token_path[600], job[64], endpoint[160];
	int signals, exit_code;
	bool over, said_why;
};

static void say(struct run *r, const char *text)
{
	progress_clear(&r->progress);
	printf("%s\n", text);
	fflush(stdout);
}

/* ------------------------------------------------------------ the run directory */

static int prepare_run_dir(struct run *r, struct err *e)
{
	const char *dir = r->config->run_dir;
	char path[600], *json;
	int rc;

	if ((size_t)snprintf(path, sizeof(path), "%s/job.json", dir) >= sizeof(path))
		return err_set(e, -ENAMETOOLONG, "run directory %s: the path is too long", dir);
	if (!access(path, F_OK))
		return err_set(e, -EINVAL,
			       "run directory %s holds a job already (%s): choose another with --run-dir, or remove it",
			       dir, path);
	rc = make_dirs(dir, e);
	if (rc)
		return rc;
	snprintf(r->token_path, sizeof(r->token_path), "%s/token", dir);
	rc = token_create(r->token_path, e);
	if (rc)
		return rc;
	setenv("SHARDMESH_TOKEN_FILE", r->token_path, 1);
	snprintf(r->config_path, sizeof(r->config_path), "%s/config.json", dir);
	rc = job_config_dump(r->config, &json, e);
	if (rc)
		return rc;
	rc = file_write_atomic(r->config_path, json, strlen(json), 0644, e);
	free(json);
	return rc;
}

/* -------------------------------------------------------------------- children */

static int start_coordinator(struct run *r, struct err *e)
{
	const char *argv[] = { "coordinator", "--config", r->config_path, "--listen",    "127.0.0.1:0",
			       "--rdzv-id",   r->job,     "--token-file", r->token_path, NULL };
	int rc = launcher_start(&r->launcher, "coordinator", "meshctl", argv, e);

	if (!rc)
		r->coordinator = &r->launcher.child[r->launcher.n - 1];
	return rc;
}

/* The coordinator writes RUN_DIR/endpoint once it listens. */
static int await_endpoint(struct run *r, struct err *e)
{
	uint64_t deadline = clock_now_ns() + ENDPOINT_WAIT_NS;
	char path[600], why[900], *text;
	size_t n;

	snprintf(path, sizeof(path), "%s/endpoint", r->config->run_dir);
	while (clock_now_ns() < deadline) {
		if (!file_read(path, 128, &text, &n, NULL)) {
			snprintf(r->endpoint, sizeof(r->endpoint), "%.*s", (int)strcspn(text, "\n"), text);
			free(text);
			return 0;
		}
		if (launcher_reap(&r->launcher)) {
			child_epitaph(r->coordinator, why, sizeof(why));
			r->exit_code = WIFEXITED(r->coordinator->status) ? WEXITSTATUS(r->coordinator->status)
									 : EXIT_JOB_FAILED;
			return err_set(e, -ECHILD, "%s", why);
		}
		usleep(5000);
	}
	return err_set(e, -ETIMEDOUT, "the coordinator did not come up within %llu s; see %s",
		       (unsigned long long)(ENDPOINT_WAIT_NS / 1000000000u), r->coordinator->log);
}

static int start_members(struct run *r, const char *program, uint32_t n, struct err *e)
{
	const char *argv[] = {
		"--rdzv-endpoint", r->endpoint, "--rdzv-id", r->job, "--token-file", r->token_path, NULL
	};
	char name[32];
	int rc = 0;

	for (uint32_t i = 0; i < n && !rc; i++) {
		snprintf(name, sizeof(name), "%s-%u", program, i);
		rc = launcher_start(&r->launcher, name, program, argv, e);
	}
	return rc;
}

static void finish(struct run *r, int exit_code)
{
	struct timeval grace = { .tv_sec = GRACE_MS / 1000, .tv_usec = GRACE_MS % 1000 * 1000 };

	if (!r->over) {
		r->over = true;
		r->exit_code = exit_code;
		evtimer_add(r->grace, &grace);
	}
	if (!launcher_alive(&r->launcher))
		event_base_loopbreak(r->self.base);
}

static void coordinator_ended(struct run *r)
{
	char text[900];
	int status = r->coordinator->status;

	if (r->over) /* we ended it ourselves */
		return;
	if (WIFEXITED(status)) {
		if (WEXITSTATUS(status) == EXIT_JOB_FAILED || WEXITSTATUS(status) == EXIT_CONFIG) {
			child_epitaph(r->coordinator, text, sizeof(text));
			if (!r->said_why)
				say(r, text);
		}
		finish(r, WEXITSTATUS(status));
		return;
	}
	child_epitaph(r->coordinator, text, sizeof(text));
	say(r, text);
	finish(r, EXIT_JOB_FAILED);
	launcher_kill(&r->launcher, SIGKILL);
}

static void on_child(evutil_socket_t number, short what, void *ctx)
{
	struct run *r = ctx;
	struct child *c;
	char text[900];

	(void)number;
	(void)what;
	while ((c = launcher_reap(&r->launcher))) {
		/* Once the coordinator has said why the job ends, a member that exits for that reason is no news. */
		bool news = WIFSIGNALED(c->status) || (WEXITSTATUS(c->status) && !r->said_why);

		if (c == r->coordinator) {
			coordinator_ended(r);
		} else if (!r->over && news) {
			child_epitaph(c, text, sizeof(text));
			say(r, text);
			/* Before the first step the coordinator would wait for a member that cannot come. */
			if (!r->progress.first_step) {
				finish(r, WIFEXITED(c->status) ? WEXITSTATUS(c->status) : EXIT_JOB_FAILED);
				launcher_kill(&r->launcher, SIGKILL);
			}
		}
	}
	if (r->over && !launcher_alive(&r->launcher))
		event_base_loopbreak(r->self.base);
}

static void on_grace(evutil_socket_t fd, short what, void *ctx)
{
	struct run *r = ctx;

	(void)fd;
	(void)what;
	launcher_kill(&r->launcher, SIGKILL);
}

static void on_signal(evutil_socket_t number, short what, void *ctx)
{
	struct run *r = ctx;

	(void)what;
	if (r->signals++ || r->over) {
		say(r, "stopped at once");
		launcher_kill(&r->launcher, SIGKILL);
		finish(r, 128 + (int)number);
		return;
	}
	say(r, "finishing the open step, then writing the model (once more to stop at once)");
	kill(r->coordinator->pid, (int)number);
}

/* ------------------------------------------------------------------- observing */

static void watch_ready(struct conn *c, void *ctx)
{
	struct msg_watch m = { 0 };

	(void)ctx;
	conn_send(c, WIRE_WATCH, &m);
}

static int watch_message(struct conn *c, const struct wire_header *h, const union wire_msg *m, void *ctx)
{
	struct run *r = ctx;
	const char *event, *text;
	json_error_t je;
	json_t *j;

	(void)c;
	if (h->type == WIRE_SHUTDOWN) {
		r->said_why = m->shutdown.exit_code != EXIT_OK && m->shutdown.text[0];
		if (r->said_why)
			say(r, m->shutdown.text);
		return 0;
	}
	if (h->type != WIRE_PROGRESS)
		return 0;
	j = json_loadb((const char *)m->progress.json.data, m->progress.json.bytes, 0, &je);
	if (!j)
		return -EPROTO;
	event = json_string_value(json_object_get(j, "event"));
	text = json_string_value(json_object_get(j, "text"));
	if (event && !strcmp(event, "step"))
		progress_step(&r->progress, j);
	else if (event && !strcmp(event, "summary"))
		progress_summary(&r->progress, j);
	else if (text)
		say(r, text);
	json_decref(j);
	return 0;
}

static void watch_closed(struct conn *c, int status, const char *text, void *ctx)
{
	struct run *r = ctx;

	(void)c;
	(void)status;
	(void)text; /* how the coordinator ended is told by its exit */
	r->watch = NULL;
}

static const struct conn_ops watch_ops = { .ready = watch_ready, .message = watch_message, .closed = watch_closed };

/* ------------------------------------------------------------------------ main */

static int open_events(struct run *r, struct err *e)
{
	r->on_child = evsignal_new(r->self.base, SIGCHLD, on_child, r);
	r->on_int = evsignal_new(r->self.base, SIGINT, on_signal, r);
	r->on_term = evsignal_new(r->self.base, SIGTERM, on_signal, r);
	r->grace = evtimer_new(r->self.base, on_grace, r);
	if (!r->on_child || !r->on_int || !r->on_term || !r->grace || evsignal_add(r->on_child, NULL) ||
	    evsignal_add(r->on_int, NULL) || evsignal_add(r->on_term, NULL))
		return err_set(e, -ENOMEM, "cannot set up signal handling");
	return 0;
}

static void close_events(struct run *r)
{
	struct event *events[] = { r->on_child, r->on_int, r->on_term, r->grace };

	for (size_t i = 0; i < ARRAY_LEN(events); i++) {
		if (events[i])
			event_free(events[i]);
	}
}

static int start_all(struct run *r, struct err *e)
{
	struct observer_flags f = { .endpoint = r->endpoint, .job = r->job, .token_file = r->token_path };
	int rc = start_coordinator(r, e);

	if (!rc)
		rc = await_endpoint(r, e);
	if (!rc)
		rc = open_events(r, e);
	if (!rc)
		rc = observer_connect(&r->self, &f, WATCH_CONNECT_NS, &watch_ops, r, &r->watch, e);
	if (!rc)
		rc = start_members(r, "shardsvc", r->config->shards, e);
	if (!rc)
		rc = start_members(r, "worker", r->config->workers, e);
	return rc;
}

static void conclude(const struct run *r)
{
	const char *dir = r->config->run_dir;

	if (r->exit_code != EXIT_OK && r->exit_code <= 128) {
		printf("the job failed; logs are in %s/log\n", dir);
		return;
	}
	if (r->signals > 1)
		return;
	if (r->progress.has_validation)
		printf("held-out loss: %.4f nats a token\n", r->progress.validation_loss);
	printf("steps: %s/steps.jsonl\nmodel: %s/model\n", dir, dir);
}

/* The shard services read them; here their headers are looked at, before anything is started or written. */
static int check_weights(const struct job_config *c, struct err *e)
{
	struct model_weights *w;
	struct unit_table t;
	int rc;

	if (!c->weights)
		return 0;
	rc = unit_table_init(&t, &c->model, e);
	if (rc)
		return rc;
	rc = model_weights_open(c->weights, &t, &w, e);
	if (!rc)
		model_weights_close(w);
	unit_table_release(&t);
	return rc ? err_prefix(e, "shardmesh.weights") : 0;
}

static int run_job(struct run *r)
{
	struct err e = { 0 };
	uint64_t index_bytes;

	r->exit_code = EXIT_JOB_FAILED;
	if (check_weights(r->config, &e) || data_check(r->config, &index_bytes, &e)) {
		fprintf(stderr, "meshctl run: %s\n", e.text);
		return EXIT_CONFIG;
	}
	if (plan_print(stdout, r->config, index_bytes, &e) || prepare_run_dir(r, &e)) {
		fprintf(stderr, "meshctl run: %s\n", e.text);
		return e.code == -EINVAL || e.code == -ENOMEM ? EXIT_CONFIG : EXIT_JOB_FAILED;
	}
	for (uint32_t i = 0; i < r->config->n_notes; i++)
		printf("note: %s\n", r->config->note[i]);
	fflush(stdout);
	progress_init(&r->progress, stdout, r->config);
	r->self.base = event_base_new();
	if (!r->self.base || launcher_init(&r->launcher, r->config->run_dir, &e) || start_all(r, &e)) {
		fprintf(stderr, "meshctl run: %s\n", e.text);
		launcher_kill(&r->launcher, SIGKILL);
		return r->exit_code;
	}
	event_active(r->on_child, EV_SIGNAL, 1); /* for a child that ended before the handler stood */
	event_base_dispatch(r->self.base);
	progress_clear(&r->progress);
	conclude(r);
	close_events(r);
	event_base_free(r->self.base);
	return r->exit_code;
}

static void default_job_name(char *out, size_t bytes)
{
	snprintf(out, bytes, "run-%d-%llu", (int)getpid(), (unsigned long long)(clock_wall_ns() / 1000000000u));
}

int run_main(int argc, char **argv)
{
	struct config_flags f = { 0 };
	const char *job = NULL;
	struct run *r;
	struct job_config c;
	bool help = false;
	const struct config_command cmd = {
		.usage = "run --config FILE [OPTIONS]",
		.what = "Trains: starts a coordinator, shard services and workers on this machine and follows them.\n"
			"Options lay over the config.",
		.flags = &f,
		.help = &help,
	};
	int code;
	struct opt opts[] = {
		CONFIG_OPTS(f),
		{ .name = "rdzv-id", .kind = OPT_STR, .out = &job, .arg = "JOB", .help = "the job's name" },
		{ .name = "help", .kind = OPT_FLAG, .out = &help, .help = "this text" },
		{ 0 },
	};

	code = config_command_open(&cmd, opts, argc, argv, &c);
	if (code != COMMAND_GOES_ON)
		return code;
	r = calloc(1, sizeof(*r));
	if (!r) {
		job_config_release(&c);
		return EXIT_JOB_FAILED;
	}
	r->config = &c;
	if (job)
		snprintf(r->job, sizeof(r->job), "%s", job);
	else
		default_job_name(r->job, sizeof(r->job));
	code = run_job(r);
	free(r);
	job_config_release(&c);
	return code;
}
