/* SPDX-License-Identifier: Apache-2.0 */
#include "meshctl/meshctl.h"

#include <string.h>

static const struct command {
	const char *name;
	int (*main)(int argc, char **argv);
	const char *help;
} commands[] = {
	{ "run", run_main, "train: start a whole job on this machine and follow it" },
	{ "plan", plan_main, "what a job would take of this machine's memory; starts nothing" },
	{ "coordinator", coordinator_main, "run the coordinator alone; members join by --rdzv-endpoint" },
	{ "status", status_main, "every member of a job and every wait" },
	{ "stop", stop_main, "finish the open step, write the model and end the job" },
	{ "generate", generate_main, "write text with a trained model" },
	{ "bench", bench_main, "bench fabric: what a pair of members gets from a fabric" },
};

static void help(FILE *f)
{
	fprintf(f, "usage: meshctl COMMAND [OPTIONS]\n\n");
	for (size_t i = 0; i < ARRAY_LEN(commands); i++)
		fprintf(f, "  %-12s %s\n", commands[i].name, commands[i].help);
	fprintf(f,
		"\nmeshctl COMMAND --help says more. Every option can also be given in the environment: --run-dir as\n"
		"SHARDMESH_RUN_DIR.\n");
}

void command_help(const char *usage, const char *what, const struct opt *opts)
{
	printf("usage: meshctl %s\n\n%s\n\n", usage, what);
	opt_help(stdout, opts);
}

int usage_error(const char *command, const struct err *e)
{
	fprintf(stderr, "meshctl %s: %s\nmeshctl %s --help says more.\n", command, e->text, command);
	return EXIT_USAGE;
}

static int unknown_command(const char *word)
{
	const char *names[ARRAY_LEN(commands) + 1] = { 0 };
	const char *near;

	for (size_t i = 0; i < ARRAY_LEN(commands); i++)
		names[i] = commands[i].name;
	near = nearest_name(word, names);
	fprintf(stderr, "meshctl: no command '%s'", word);
	if (near)
		fprintf(stderr, "; did you mean '%s'?", near);
	fprintf(stderr, "\n");
	help(stderr);
	return EXIT_USAGE;
}

int main(int argc, char **argv)
{
	if (argc < 2) {
		help(stderr);
		return EXIT_USAGE;
	}
	if (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h") || !strcmp(argv[1], "help")) {
		help(stdout);
		return EXIT_OK;
	}
	if (!strcmp(argv[1], "--version")) {
		printf("meshctl %s\n", SHARDMESH_VERSION);
		return EXIT_OK;
	}
	for (size_t i = 0; i < ARRAY_LEN(commands); i++) {
		if (!strcmp(argv[1], commands[i].name))
			return commands[i].main(argc - 1, argv + 1);
	}
	return unknown_command(argv[1]);
}
