/* SPDX-License-Identifier: Apache-2.0 */
/* What run, plan and coordinator begin with: flags, their help, and the config they lay over. */
#include "meshctl/meshctl.h"

#include <errno.h>

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

static const uint64_t *given(const struct opt *opts, int which)
{
	return opts[which].set ? opts[which].out : NULL;
}

static int load(const struct config_flags *f, const struct opt *opts, struct job_config *c)
{
	struct job_overrides over = {
		.shards = given(opts, CONFIG_OPT_SHARDS),
		.workers = given(opts, CONFIG_OPT_WORKERS),
		.threads = given(opts, CONFIG_OPT_THREADS),
		.steps = given(opts, CONFIG_OPT_STEPS),
		.seed = given(opts, CONFIG_OPT_SEED),
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
	if (job_config_override(c, &over, &e) || lay_networks(&f->fabric, c, &e) || job_config_validate(c, &e)) {
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
