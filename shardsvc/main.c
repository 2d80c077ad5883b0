/* SPDX-License-Identifier: Apache-2.0 */
/* shardsvc: flags, start-up and the loop of the control thread. */
#include "shardsvc/shard.h"

#include <errno.h>
#include <event2/event.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define JOIN_TIMEOUT_NS (60 * 1000000000ull)
#define RESOLVE_AGAIN_NS (200 * 1000000ull)
#define TICK_US 500000

struct flags {
	const char *token_file, *job, *log_level, *log_format;
	bool help, version;
};

static void register_metrics(struct shard *s)
{
	struct shard_counters *c = &s->count;
	struct metrics *m = &s->metrics;

	metrics_add(m, "mesh_shard_bytes", "parameter region", &c->shard_bytes);
	metrics_add(m, "mesh_planned_bytes", "memory plan", &c->planned_bytes);
	metrics_add(m, "mesh_offers_total", "contributions offered", &c->offers);
	metrics_add(m, "mesh_offers_taken_total", "answered taken", &c->taken);
	metrics_add(m, "mesh_offers_covered_total", "answered covered", &c->covered);
	metrics_add(m, "mesh_offers_closed_total", "answered closed", &c->closed);
	metrics_add(m, "mesh_offers_early_total", "came before the step was open here", &c->early);
	metrics_add(m, "mesh_grants_total", "pushes granted", &c->grants);
	metrics_add(m, "mesh_push_bytes_total", "bytes of complete pushes", &c->push_bytes);
	metrics_add(m, "mesh_notices_stale_total", "notices of pushes taken back, or repeated", &c->notices_stale);
	metrics_add(m, "mesh_starved_total", "times the coordinator was told what is missing", &c->starved);
	metrics_add(m, "mesh_steps_applied_total", "versions made", &c->steps_applied);
	metrics_add(m, "mesh_workers_dropped_total", "connections dropped for cause", &c->peers_dropped);
	metrics_add(m, "mesh_fabric_refusals_total", "providers not given to workers", &c->fabrics_refused);
	metrics_add(m, "mesh_export_bytes_total", "parameters read by the coordinator", &c->exports);
	metrics_add(m, "mesh_folds_total", "passes of additions", &s->data.folds);
	metrics_add(m, "mesh_fold_bytes_total", "memory read and written by them", &s->data.fold_bytes);
	metrics_add(m, "mesh_apply_nanoseconds_total", "optimizer and hash", &s->data.apply_nanoseconds);
	metrics_add(m, "mesh_data_busy_nanoseconds_total", "data thread at work", &s->data.busy_nanoseconds);
	metrics_add(m, "mesh_data_wakeups_total", "system calls to wake the data thread", &s->data.jobs.wakeups);
	metrics_add(m, "mesh_control_wakeups_total", "system calls to wake the control thread", &s->data.done.wakeups);
	metrics_add(m, "mesh_spill_bytes_total", "partial sums put into the spill file", &s->sums.spilled_bytes);
	metrics_add(m, "mesh_beyond_plan_bytes_total", "partial sums beyond the plan", &s->sums.beyond_bytes);
	metrics_add(m, "mesh_messages_sent_total", "on all connections", &s->self.messages_sent);
	metrics_add(m, "mesh_messages_received_total", "on all connections", &s->self.messages_received);
	metrics_add(m, "mesh_message_bytes_sent_total", "on all connections", &s->self.bytes_sent);
	metrics_add(m, "mesh_message_bytes_received_total", "on all connections", &s->self.bytes_received);
	metrics_add(m, "mesh_auth_failures_total", "handshakes refused", &s->self.auth_failures);
	metrics_add(m, "mesh_log_warnings_total", "warnings logged", &s->log.count[LOG_WARN]);
	metrics_add(m, "mesh_log_errors_total", "errors logged", &s->log.count[LOG_ERROR]);
}

static void on_tick(evutil_socket_t fd, short what, void *ctx)
{
	struct shard *s = ctx;

	(void)fd;
	(void)what;
	if (!s->prepared)
		return;
	publish_poll(s);
	reduce_tick(s);
}

static void on_signal(evutil_socket_t number, short what, void *ctx)
{
	(void)what;
	shard_end(ctx, 128 + (uint32_t)number, false, "ended by signal %d (%s)", (int)number, strsignal((int)number));
}

static int watch_signals(struct shard *s, struct err *e)
{
	static const int numbers[] = { SIGTERM, SIGINT };

	signal(SIGPIPE, SIG_IGN);
	for (uint32_t i = 0; i < ARRAY_LEN(numbers); i++) {
		s->signal_event[i] = evsignal_new(s->self.base, numbers[i], on_signal, s);
		if (!s->signal_event[i] || evsignal_add(s->signal_event[i], NULL))
			return err_set(e, -ENOMEM, "no memory for an event");
	}
	return 0;
}

/* A name may become known while a job is starting everywhere at once. */
static int listen_for_workers(struct shard *s, struct err *e)
{
	uint64_t deadline = clock_now_ns() + JOIN_TIMEOUT_NS;
	int rc;

	while ((rc = publish_listen(s, e)) == -EAGAIN && clock_now_ns() < deadline) {
		const struct timespec pause = { .tv_nsec = RESOLVE_AGAIN_NS };

		nanosleep(&pause, NULL);
	}
	return rc;
}

static int open_all(struct shard *s, struct err *e)
{
	const struct timeval tick = { .tv_usec = TICK_US };
	struct member_link_config cfg = {
		.rdzv_endpoint = s->rdzv_endpoint,
		.join_timeout_ns = JOIN_TIMEOUT_NS,
		.metrics = &s->metrics,
		.waits = s->waits,
		.n_waits = SHARD_WAITS,
	};
	int rc = listen_for_workers(s, e);

	if (rc)
		return rc;
	rc = watch_signals(s, e);
	if (rc)
		return rc;
	s->tick_event = event_new(s->self.base, -1, EV_PERSIST, on_tick, s);
	if (!s->tick_event || event_add(s->tick_event, &tick))
		return err_set(e, -ENOMEM, "no memory for an event");
	wait_begin(&s->waits[WAIT_OF_CONTROL], WAIT_MEMBERS, 0, 0, 0, 0);
	cfg.listen = conn_listener_endpoint(s->listener);
	log_info(&s->log, "workers are taken at %s; joining %s at %s", cfg.listen, s->self.job, s->rdzv_endpoint);
	return member_link_open(&s->self, &cfg, &shard_member_ops, s, &s->link, e);
}

static void close_all(struct shard *s)
{
	service_log_memory(s);
	service_release(s);
	member_link_free(s->link);
	if (s->tick_event)
		event_free(s->tick_event);
	for (uint32_t i = 0; i < ARRAY_LEN(s->signal_event); i++)
		if (s->signal_event[i])
			event_free(s->signal_event[i]);
	event_base_free(s->self.base);
}

static int serve(struct shard *s)
{
	struct err e = { 0 };
	int rc;

	s->self.base = event_base_new();
	if (!s->self.base) {
		fprintf(stderr, "shardsvc: no event loop\n");
		return EXIT_JOB_FAILED;
	}
	rc = open_all(s, &e);
	if (rc)
		shard_end(s, rc == -EINVAL ? EXIT_USAGE : EXIT_JOB_FAILED, false, "%s", e.text);
	else
		event_base_dispatch(s->self.base);
	s->log.warn_fd = -1; /* why a process ends is its last line, which a launcher reads itself */
	if (s->exit_code == EXIT_OK)
		log_info(&s->log, "the job is over: %s", s->exit_text);
	else
		log_error(&s->log, "%s", s->exit_text);
	close_all(s);
	if (s->exit_code != EXIT_OK)
		fprintf(stderr, "shardsvc: %s\n", s->exit_text);
	return (int)s->exit_code;
}

static int usage(const char *text)
{
	fprintf(stderr, "shardsvc: %s\n", text);
	return EXIT_USAGE;
}

static int apply_flags(struct shard *s, const struct flags *f)
{
	struct err e = { 0 };

	if (log_level_parse(f->log_level, &s->log.level))
		return usage("--log-level is debug, info, warn or error");
	if (f->log_format && strcmp(f->log_format, "text") && strcmp(f->log_format, "json"))
		return usage("--log-format is text or json");
	if (f->log_format)
		s->log.format = strcmp(f->log_format, "json") ? LOG_TEXT : LOG_JSON;
	if (!s->rdzv_endpoint)
		return usage("--rdzv-endpoint HOST:PORT is missing: where the coordinator is");
	if (strlen(f->job) >= sizeof(s->self.job))
		return usage("--rdzv-id is too long");
	snprintf(s->self.job, sizeof(s->self.job), "%s", f->job);
	if (token_load(f->token_file, &s->self.token, &e)) {
		fprintf(stderr, "shardsvc: %s\n", e.text);
		return EXIT_CONFIG;
	}
	return EXIT_OK;
}

static void print_help(const struct opt *opts)
{
	printf("usage: shardsvc --rdzv-endpoint HOST:PORT [options]\n\n"
	       "A shard service of a Shardmesh job: holds a part of the parameters with their optimizer state,\n"
	       "sums gradients and applies them. Joins the coordinator at HOST:PORT.\n\n");
	opt_help(stdout, opts);
}

/* What the command line asks for; EXIT_OK and *serving when it is to join a job. */
static int read_command_line(struct shard *s, int argc, char **argv, bool *serving)
{
	struct flags f = { .job = "shardmesh", .log_level = "info" };
	struct err e = { 0 };
	int rest;
	struct opt opts[] = {
		{ .name = "rdzv-endpoint",
		  .kind = OPT_STR,
		  .out = &s->rdzv_endpoint,
		  .arg = "HOST:PORT",
		  .help = "the coordinator" },
		{ .name = "rdzv-id",
		  .kind = OPT_STR,
		  .out = &f.job,
		  .arg = "JOB",
		  .help = "the job's name (shardmesh)" },
		{ .name = "token-file",
		  .kind = OPT_STR,
		  .out = &f.token_file,
		  .arg = "FILE",
		  .help = "the job's token, mode 0600 (else SHARDMESH_TOKEN)" },
		{ .name = "listen",
		  .kind = OPT_STR,
		  .out = &s->listen,
		  .arg = "HOST:PORT",
		  .help = "where workers connect (the address that routes to the coordinator, any port)" },
		{ .name = "threads",
		  .kind = OPT_U64,
		  .out = &s->threads_given,
		  .arg = "N",
		  .help = "for folds and the optimizer (cores / shard services of this host)" },
		{ .name = "run-dir",
		  .kind = OPT_STR,
		  .out = &s->run_dir,
		  .arg = "DIR",
		  .help = "where partial sums that do not fit memory go (the job's run directory)" },
		FAB_FLAG_OPTS(s->fabric_flags),
		{ .name = "log-level",
		  .kind = OPT_STR,
		  .out = &f.log_level,
		  .arg = "LEVEL",
		  .help = "debug, info, warn, error" },
		{ .name = "log-format",
		  .kind = OPT_STR,
		  .out = &f.log_format,
		  .arg = "FORMAT",
		  .help = "text or json (text on a terminal)" },
		{ .name = "help", .kind = OPT_FLAG, .out = &f.help, .help = "this text" },
		{ .name = "version", .kind = OPT_FLAG, .out = &f.version, .help = "the version" },
		{ 0 },
	};

	*serving = false;
	if (opt_parse(opts, argc, argv, &rest, &e))
		return usage(e.text);
	if (f.help) {
		print_help(opts);
		return EXIT_OK;
	}
	if (f.version) {
		printf("shardsvc %s\n", SHARDMESH_VERSION);
		return EXIT_OK;
	}
	if (rest < argc)
		return usage("takes no operands; --help lists its flags");
	*serving = true;
	return apply_flags(s, &f);
}

int main(int argc, char **argv)
{
	/* Rings and counters in it stand on cache lines of their own. */
	struct shard *s = aligned_alloc(CACHE_LINE, round_up_u64(sizeof(*s), CACHE_LINE));
	bool serving;
	int code;

	if (!s)
		return EXIT_JOB_FAILED;
	memset(s, 0, sizeof(*s));
	log_init(&s->log, STDERR_FILENO, "shard");
	s->self.log = &s->log;
	s->self.role = ROLE_SHARD;
	register_metrics(s);
	code = read_command_line(s, argc, argv, &serving);
	if (code == EXIT_OK && serving)
		code = serve(s);
	free(s);
	return code;
}
