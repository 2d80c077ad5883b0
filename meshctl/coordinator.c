/* SPDX-License-Identifier: Apache-2.0 */
/* meshctl coordinator: a thin main over mesh's coordinator. */
#include "kernels/kernels.h"
#include "meshctl/meshctl.h"

#include <errno.h>
#include <event2/event.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

struct service {
	struct coordinator *coordinator;
	struct log log;
	struct mesh_self self;
	int signals;
};

static void on_signal(evutil_socket_t number, short what, void *ctx)
{
	struct service *s = ctx;

	(void)what;
	if (s->signals++) {
		log_warn(&s->log, "a second signal: stopping at once");
		_exit(128 + (int)number);
	}
	log_info(&s->log, "signal %d: the open step is finished, then the model is written", (int)number);
	coordinator_stop(s->coordinator, 128 + (uint32_t)number);
}

static int serve(struct service *s, const struct coordinator_config *cfg)
{
	struct event *on_int, *on_term;
	struct err e = { 0 };
	int code;

	if (coordinator_open(&s->self, cfg, &s->coordinator, &e)) {
		log_error(&s->log, "%s", e.text);
		fprintf(stderr, "meshctl coordinator: %s\n", e.text);
		return e.code == -EINVAL ? EXIT_CONFIG : EXIT_JOB_FAILED;
	}
	on_int = evsignal_new(s->self.base, SIGINT, on_signal, s);
	on_term = evsignal_new(s->self.base, SIGTERM, on_signal, s);
	if (!on_int || !on_term || evsignal_add(on_int, NULL) || evsignal_add(on_term, NULL)) {
		code = EXIT_JOB_FAILED;
		goto free_events;
	}
	code = coordinator_run(s->coordinator, &e);
	if (e.text[0])
		fprintf(stderr, "meshctl coordinator: %s\n", e.text);
free_events:
	if (on_int)
		event_free(on_int);
	if (on_term)
		event_free(on_term);
	coordinator_free(s->coordinator);
	return code;
}

/* Beside members: the log, the run directory, the loop, meshctl's watchers and exports. */
#define DESCRIPTORS_APART 16

/* Who could not be let in would wait for nothing: said before anybody is asked to come. */
static int descriptors_check(const struct job_config *c, struct err *e)
{
	uint64_t need = (uint64_t)c->shards + c->workers + DESCRIPTORS_APART;
	struct rlimit r;

	if (getrlimit(RLIMIT_NOFILE, &r) || r.rlim_cur >= need)
		return 0;
	r.rlim_cur = need < r.rlim_max ? need : r.rlim_max;
	if (r.rlim_cur >= need && !setrlimit(RLIMIT_NOFILE, &r))
		return 0;
	return err_set(e, -EMFILE,
		       "Too many open files: %u members need %llu file descriptors here, the limit is %llu "
		       "(ulimit -n)",
		       c->shards + c->workers, (unsigned long long)need, (unsigned long long)r.rlim_max);
}

static int coordinate(struct service *s, struct job_config *c, const char *listen, const char *token_file)
{
	struct coordinator_config cfg = { .listen = listen, .job = c, .run_dir = c->run_dir };
	struct k_profile profile;
	char reason[160];
	struct err e = { 0 };
	int code = EXIT_CONFIG;

	if (descriptors_check(c, &e)) {
		fprintf(stderr, "meshctl coordinator: %s\n", e.text);
		return EXIT_JOB_FAILED;
	}
	if (batch_resolve(c, c->workers, &cfg.batch, &e) || k_profile_detect(c->math, &profile, reason, &e) ||
	    token_load(token_file, &s->self.token, &e)) {
		fprintf(stderr, "meshctl coordinator: %s\n", e.text);
		return code;
	}
	cfg.profile = profile.text;
	s->self.base = event_base_new();
	if (!s->self.base)
		return EXIT_JOB_FAILED;
	log_info(&s->log, "math profile %s (%s)", profile.text, reason);
	code = serve(s, &cfg);
	event_base_free(s->self.base);
	return code;
}

int coordinator_main(int argc, char **argv)
{
	struct config_flags f = { 0 };
	const char *listen = "0.0.0.0:29400", *job = "shardmesh", *token_file = NULL, *level = "info";
	struct service s = { .self.role = ROLE_COORDINATOR };
	struct job_config c;
	struct err e = { 0 };
	bool help = false;
	const struct config_command cmd = {
		.usage = "coordinator --config FILE [OPTIONS]",
		.what = "Runs the coordinator alone. Shard services and workers join by --rdzv-endpoint and --rdzv-id,\n"
			"in any order.",
		.flags = &f,
		.help = &help,
	};
	int code;
	struct opt opts[] = {
		CONFIG_OPTS(f),
		{ .name = "listen",
		  .kind = OPT_STR,
		  .out = &listen,
		  .arg = "HOST:PORT",
		  .help = "where members join (0.0.0.0:29400; port 0: any)" },
		{ .name = "rdzv-id", .kind = OPT_STR, .out = &job, .arg = "JOB", .help = "the job's name (shardmesh)" },
		{ .name = "token-file",
		  .kind = OPT_STR,
		  .out = &token_file,
		  .arg = "FILE",
		  .help = "the job's token, mode 0600 (else SHARDMESH_TOKEN)" },
		{ .name = "log-level",
		  .kind = OPT_STR,
		  .out = &level,
		  .arg = "LEVEL",
		  .help = "debug, info, warn, error" },
		{ .name = "help", .kind = OPT_FLAG, .out = &help, .help = "this text" },
		{ 0 },
	};

	code = config_command_open(&cmd, opts, argc, argv, &c);
	if (code != COMMAND_GOES_ON)
		return code;
	log_init(&s.log, STDERR_FILENO, "coordinator");
	if (log_level_parse(level, &s.log.level)) {
		job_config_release(&c);
		err_set(&e, -EINVAL, "--log-level '%s' is not debug, info, warn or error", level);
		return usage_error(argv[0], &e);
	}
	s.self.log = &s.log;
	snprintf(s.self.job, sizeof(s.self.job), "%s", job);
	code = coordinate(&s, &c, listen, token_file);
	job_config_release(&c);
	return code;
}
