/* SPDX-License-Identifier: Apache-2.0 */
/* What run, plan and coordinator begin with: flags, their help, and the config they lay over. */
#include "meshctl/meshctl.h"

#include <errno.h>
#include <string.h>

static int lay_networks(const struct fab_flags *f, struct job_config *c, struct err *e)
{
	struct fab_setting s[FAB_SETTINGS];
	struct fab_options checked = { .devices = NULL };
	int rc = fab_flags_apply(f, &checked, e);

	fab_flags_settings(f, s);
	for (uint32_t i = 0; i < FAB_SETTINGS && !rc; i++)
		if (s[i].value && job_config_set_rdma(c, s[i].name, s[i].value))
			rc = err_set(e, -ENOMEM, "out of memory");
	return rc;
}

/* Zero is "not given" to what lays the flags over the config, so one that was given is refused here. */
static int check_counts(const struct opt *opts, struct err *e)
{
	static const char *const counts[] = { "shards", "workers", "steps" };

	for (const struct opt *o = opts; o->name; o++)
		for (size_t i = 0; i < ARRAY_LEN(counts); i++)
			if (o->set && !strcmp(o->name, counts[i]) && *(const uint64_t *)o->out == 0)
				return err_set(e, -EINVAL, "--%s: expected at least 1, found 0", o->name);
	return 0;
}

static int load(const struct config_flags *f, const struct opt *opts, struct job_config *c)
{
	struct job_overrides over = {
		.shards = f->shards,
		.workers = f->workers,
		.threads = f->threads,
		.steps = f->steps,
		.seed = opts[CONFIG_OPT_SEED].set ? &f->seed : NULL,
		.run_dir = f->run_dir,
		.fabric = f->fabric.fabric,
	};
	struct err e = { 0 };

	if (!f->config) {
		fprintf(stderr, "meshctl: --config FILE is missing: a DeepSpeed JSON with a \"shardmesh\" section\n");
		return EXIT_USAGE;
	}
	if (job_config_load(f->config, c, &e)) {
		fprintf(stderr, "meshctl: %s\n", e.text);
		return EXIT_CONFIG;
	}
	if (check_counts(opts, &e) || job_config_override(c, &over, &e) || lay_networks(&f->fabric, c, &e) ||
	    job_config_validate(c, &e)) {
		fprintf(stderr, "meshctl: %s: %s\n", f->config, e.text);
		job_config_release(c);
		return EXIT_CONFIG;
	}
	return EXIT_OK;
}

int config_command_open(const struct config_command *cmd, struct opt *opts, int argc, char **argv, struct job_config *c)
{
	struct err e = { 0 };
	int rest, code;

	if (opt_parse(opts, argc, argv, &rest, &e))
		return usage_error(argv[0], &e);
	if (*cmd->help) {
		command_help(cmd->usage, cmd->what, opts);
		return EXIT_OK;
	}
	if (rest < argc) {
		err_set(&e, -EINVAL, "'%s' is not expected here", argv[rest]);
		return usage_error(argv[0], &e);
	}
	code = load(cmd->flags, opts, c);
	return code ? code : COMMAND_GOES_ON;
}
