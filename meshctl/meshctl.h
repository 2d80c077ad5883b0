/* SPDX-License-Identifier: Apache-2.0 */
/* meshctl: what an operator types. One command a file; this header is private to the folder. */
#ifndef SHARDMESH_MESHCTL_H
#define SHARDMESH_MESHCTL_H

#include "mesh/mesh.h"
#include "rdma/fabric.h"

#include <jansson.h>
#include <sys/types.h>

/* Commands: argv[0] is the command's name; the result is the process's exit code. */
int run_main(int argc, char **argv);
int plan_main(int argc, char **argv);
int coordinator_main(int argc, char **argv);
int status_main(int argc, char **argv);
int stop_main(int argc, char **argv);
int generate_main(int argc, char **argv);
int bench_main(int argc, char **argv);

/* "usage: meshctl NAME ..." with the table's options. */
void command_help(const char *usage, const char *what, const struct opt *opts);
/* Prints "meshctl: text" and what to type for help; EXIT_USAGE. */
int usage_error(const char *command, const struct err *e);

/* The flags that lay over a config, shared by run and coordinator. */
struct config_flags {
	const char *config, *run_dir;
	struct fab_flags fabric;
	uint64_t shards, workers, threads, steps, seed;
};
/* Their entries, first in a command's table and in this order: opts[CONFIG_OPT_SEED].set says whether a seed was given. */
enum { CONFIG_OPT_FILE, CONFIG_OPT_SEED, CONFIG_OPT_SHARDS, CONFIG_OPT_WORKERS, CONFIG_OPT_THREADS, CONFIG_OPT_STEPS };
#define CONFIG_OPTS(f)                                                                             \
	{ "config", OPT_STR, &(f).config, "FILE", "DeepSpeed JSON", false },                       \
		{ "seed", OPT_U64, &(f).seed, "N", "seed of everything random", false },           \
		{ "shards", OPT_U64, &(f).shards, "N", "shard services", false },                  \
		{ "workers", OPT_U64, &(f).workers, "N", "workers", false },                       \
		{ "threads", OPT_U64, &(f).threads, "N", "threads of each; 0: automatic", false }, \
		{ "steps", OPT_U64, &(f).steps, "N", "steps to train", false },                    \
		{ "run-dir", OPT_STR, &(f).run_dir, "DIR", "steps.jsonl, logs, model/", false },   \
		FAB_FLAG_OPTS((f).fabric)

/* A command whose table begins with CONFIG_OPTS(*flags). */
struct config_command {
	const char *usage, *what; /* of its help */
	const struct config_flags *flags;
	const bool *help; /* where its --help is noted */
};
#define COMMAND_GOES_ON (-1)
/*
 * Parses, prints the help, or loads, overrides and validates; messages name the file. COMMAND_GOES_ON: c is filled in;
 * else the exit code, and there is no c.
 */
int config_command_open(const struct config_command *cmd, struct opt *opts, int argc, char **argv,
			struct job_config *c);

/* ---------------------------------------------------------------- observer */

/* How to reach a job: by its run directory, or by endpoint, id and token. */
struct observer_flags {
	const char *run_dir, *endpoint, *job, *token_file;
};
/* An authenticated observer connection; ops and ctx as conn_connect. self->base must be set. */
int observer_connect(struct mesh_self *self, const struct observer_flags *f, uint64_t timeout_ns,
		     const struct conn_ops *ops, void *ctx, struct conn **out, struct err *e);

/* ------------------------------------------------------------------ launch */

#define CHILDREN_MAX 512
struct child {
	char name[32]; /* "shardsvc-0": also the log's name */
	char log[512];
	pid_t pid;  /* 0: not started, or gone */
	int status; /* of waitpid, once gone */
};
struct launcher {
	char bin_dir[512];
	const char *run_dir;
	uint32_t n;
	struct child child[CHILDREN_MAX];
	pid_t group; /* the children's process group */
};
/* Finds the programs (SHARDMESH_BIN, else beside /proc/self/exe) and makes RUN_DIR/log. */
int launcher_init(struct launcher *l, const char *run_dir, struct err *e);
/*
 * Starts a program as a child that dies with us, with its standard error in
 * RUN_DIR/log/NAME.log. argv is NULL-ended and without the program's name.
 */
int launcher_start(struct launcher *l, const char *name, const char *program, const char *const *argv, struct err *e);
/* Reaps one ended child; NULL when none has ended. */
struct child *launcher_reap(struct launcher *l);
uint32_t launcher_alive(const struct launcher *l);
void launcher_kill(struct launcher *l, int signal);
/* "worker-1 (pid 4711) was killed by signal 9 (Killed)" / "... exited with code 1: <last line of its log>" */
void child_epitaph(const struct child *c, char *out, size_t bytes);

/* -------------------------------------------------------------------- plan */

/* Opens the data as every worker will, and closes them again; what their index takes. -EINVAL, e names the file. */
int data_check(const struct job_config *c, uint64_t *index_bytes, struct err *e);
/*
 * Prints the memory plan of every process of the job to f, by the functions that
 * they plan with themselves; -ENOMEM when the job does not fit this machine.
 */
int plan_print(FILE *f, const struct job_config *c, uint64_t index_bytes, struct err *e);

/* ---------------------------------------------------------------- progress */

struct progress_view {
	FILE *out;
	bool terminal;
	uint64_t steps, print_every;
	uint64_t started_ns;
	uint64_t first_step, last_step;
	double loss, validation_loss, tokens_per_second;
	bool has_validation;
	bool bar_shown;
};
void progress_init(struct progress_view *p, FILE *out, const struct job_config *c);
/* A step's record as JSON: redraws the bar, or prints a line when one is due. */
void progress_step(struct progress_view *p, json_t *step);
/* The job's summary, or a step's record: the latest held-out loss. */
void progress_summary(struct progress_view *p, json_t *summary);
/* Makes room for another line of text while a bar stands. */
void progress_clear(struct progress_view *p);

#endif
