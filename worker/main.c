/* SPDX-License-Identifier: Apache-2.0 */
/* The program `worker`: joins a job, computes spans until the coordinator says that it is over. */
#include "worker/process.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct flags {
	const char *endpoint, *job, *token_file, *level, *format;
	uint64_t threads;
	struct fab_flags fabric;
	bool help, version;
};

static int parse_flags(struct flags *f, int argc, char **argv, struct err *e)
{
	struct opt opts[] = {
		{ .name = "rdzv-endpoint",
		  .kind = OPT_STR,
		  .out = &f->endpoint,
		  .arg = "HOST:PORT",
		  .help = "where the coordinator listens" },
		{ .name = "rdzv-id", .kind = OPT_STR, .out = &f->job, .arg = "JOB", .help = "the job's name" },
		{ .name = "token-file",
		  .kind = OPT_STR,
		  .out = &f->token_file,
		  .arg = "FILE",
		  .help = "the job's secret (or SHARDMESH_TOKEN in the environment)" },
		{ .name = "threads",
		  .kind = OPT_U64,
		  .out = &f->threads,
		  .arg = "N",
		  .help = "compute threads; 0: as the job's config says" },
		FAB_FLAG_OPTS(f->fabric),
		{ .name = "log-level",
		  .kind = OPT_STR,
		  .out = &f->level,
		  .arg = "LEVEL",
		  .help = "debug, info, warn or error (info)" },
		{ .name = "log-format",
		  .kind = OPT_STR,
		  .out = &f->format,
		  .arg = "FORMAT",
		  .help = "text or json (text on a terminal)" },
		{ .name = "help", .kind = OPT_FLAG, .out = &f->help, .help = "this text" },
		{ .name = "version", .kind = OPT_FLAG, .out = &f->version, .help = "the version" },
		{ 0 },
	};
	int rest, rc = opt_parse(opts, argc, argv, &rest, e);

	if (rc)
		return rc;
	if (f->help) {
		printf("usage: worker --rdzv-endpoint HOST:PORT --rdzv-id JOB [OPTIONS]\n\n"
		       "Computes spans of a job's micro-batches. Holds no state: it may join and die at any time.\n\n");
		opt_help(stdout, opts);
		return 0;
	}
	if (f->version)
		return 0;
	if (rest < argc)
		return err_set(e, -EINVAL, "'%s' is not expected here", argv[rest]);
	if (!f->endpoint || !f->job)
		return err_set(e, -EINVAL, "--%s is missing", f->endpoint ? "rdzv-id" : "rdzv-endpoint");
	if (strlen(f->job) >= sizeof(((struct mesh_self *)0)->job))
		return err_set(e, -EINVAL, "--rdzv-id is longer than %zu bytes",
			       sizeof(((struct mesh_self *)0)->job) - 1);
	if (f->threads > 4096)
		return err_set(e, -EINVAL, "--threads must be at most 4096");
	return 0;
}

static int set_log(struct worker *w, const struct flags *f, struct err *e)
{
	log_init(&w->log, STDERR_FILENO, "worker");
	if (f->level && log_level_parse(f->level, &w->log.level))
		return err_set(e, -EINVAL, "--log-level %s: debug, info, warn or error was expected", f->level);
	if (f->format && strcmp(f->format, "text") != 0 && strcmp(f->format, "json") != 0)
		return err_set(e, -EINVAL, "--log-format %s: text or json was expected", f->format);
	if (f->format)
		w->log.format = strcmp(f->format, "json") == 0 ? LOG_JSON : LOG_TEXT;
	return 0;
}

static struct event_base *new_base(void)
{
	struct event_config *cfg = event_config_new();
	struct event_base *base = NULL;

	if (!cfg)
		return NULL;
	/* One thread uses it; retries of progress reads are shorter than a millisecond. */
	if (event_config_set_flag(cfg, EVENT_BASE_FLAG_NOLOCK | EVENT_BASE_FLAG_PRECISE_TIMER) == 0)
		base = event_base_new_with_config(cfg);
	event_config_free(cfg);
	return base;
}

static int join(struct worker *w, const struct flags *f, struct err *e)
{
	int rc = token_load(f->token_file, &w->self.token, e);

	if (rc)
		return rc;
	w->self.log = &w->log;
	w->self.role = ROLE_WORKER;
	snprintf(w->self.job, sizeof(w->self.job), "%s", f->job);
	w->endpoint = f->endpoint;
	w->threads = (unsigned)f->threads;
	w->fabric_flags = f->fabric;
	w->self.base = new_base();
	return w->self.base ? control_open(w, e) : err_set(e, -ENOMEM, "cannot make an event loop");
}

/* False: the compute thread is still in the middle of something. */
static bool leave(struct worker *w)
{
	if (!compute_stop(&w->compute))
		return false;
	prepare_report(w);
	attach_release(w);
	control_release(w);
	prepare_release(w);
	if (w->self.base)
		event_base_free(w->self.base);
	return true;
}

static int run(struct worker *w, const struct flags *f)
{
	struct err e;
	int rc = join(w, f, &e);

	if (!rc)
		event_base_dispatch(w->self.base);
	w->log.warn_fd = -1; /* why a process ends is its last line, which a launcher reads itself */
	if (rc) {
		log_error(&w->log, "%s", e.text);
		w->exit_code = rc == -EINVAL ? EXIT_CONFIG : EXIT_JOB_FAILED;
	} else if (w->exit_code) {
		log_error(&w->log, "%s", w->exit_text);
	} else {
		log_info(&w->log, "%s", w->exit_text[0] ? w->exit_text : "the job is done");
	}
	/* Memory of a thread that runs cannot be given back; the process's end does it. */
	if (!leave(w))
		_exit((int)w->exit_code);
	return (int)w->exit_code;
}

int main(int argc, char **argv)
{
	struct flags f = { 0 };
	struct err e;
	struct worker *w;
	int rc = parse_flags(&f, argc, argv, &e);

	if (!rc && f.version)
		printf("worker " SHARDMESH_VERSION "\n");
	if (!rc && (f.help || f.version))
		return EXIT_OK;
	w = aligned_alloc(CACHE_LINE, round_up_u64(sizeof(*w), CACHE_LINE));
	if (!w)
		return EXIT_JOB_FAILED;
	memset(w, 0, sizeof(*w));
	if (!rc)
		rc = set_log(w, &f, &e);
	if (rc) {
		fprintf(stderr, "worker: %s\n", e.text);
		free(w);
		return EXIT_USAGE;
	}
	signal(SIGPIPE, SIG_IGN); /* a broken connection is an error code here */
	rc = run(w, &f);
	free(w);
	return rc;
}
