/* SPDX-License-Identifier: Apache-2.0 */
#include "meshctl/meshctl.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* RUN_DIR/name without its newline, malloced. */
static int run_file(const char *run_dir, const char *name, char **out, struct err *e)
{
	char path[600];
	size_t n;
	int rc;

	snprintf(path, sizeof(path), "%s/%s", run_dir, name);
	rc = file_read(path, 4096, out, &n, e);
	if (rc)
		return rc;
	while (n && (*out)[n - 1] == '\n')
		(*out)[--n] = '\0';
	return 0;
}

static int job_name(const char *run_dir, char *out, size_t bytes, struct err *e)
{
	char path[600];
	json_error_t je;
	json_t *job;
	const char *name;

	snprintf(path, sizeof(path), "%s/job.json", run_dir);
	job = json_load_file(path, 0, &je);
	if (!job)
		return err_set(e, -ENOENT, "%s: %s; is there a job in this directory?", path, je.text);
	name = json_string_value(json_object_get(job, "job"));
	if (name)
		snprintf(out, bytes, "%s", name);
	json_decref(job);
	return name ? 0 : err_set(e, -EINVAL, "%s: has no \"job\"", path);
}

int observer_connect(struct mesh_self *self, const struct observer_flags *f, uint64_t timeout_ns,
		     const struct conn_ops *ops, void *ctx, struct conn **out, struct err *e)
{
	char token_path[600], *endpoint = NULL;
	const char *token_file = f->token_file;
	int rc;

	self->role = ROLE_OBSERVER;
	if (!f->endpoint && !f->run_dir)
		return err_set(e, -EINVAL,
			       "name the job: --run-dir DIR, or --rdzv-endpoint HOST:PORT and --rdzv-id JOB");
	if (f->job)
		snprintf(self->job, sizeof(self->job), "%s", f->job);
	else if (!f->run_dir)
		return err_set(e, -EINVAL, "--rdzv-endpoint needs --rdzv-id, the name of the job");
	else if ((rc = job_name(f->run_dir, self->job, sizeof(self->job), e)))
		return rc;
	if (!token_file && f->run_dir && !getenv("SHARDMESH_TOKEN") && !getenv("SHARDMESH_TOKEN_FILE")) {
		snprintf(token_path, sizeof(token_path), "%s/token", f->run_dir);
		token_file = token_path;
	}
	rc = token_load(token_file, &self->token, e);
	if (rc)
		return rc;
	if (!f->endpoint && (rc = run_file(f->run_dir, "endpoint", &endpoint, e)))
		return err_set(e, rc, "no coordinator is running for %s: %s/endpoint is not there", f->run_dir,
			       f->run_dir);
	rc = conn_connect(self, f->endpoint ? f->endpoint : endpoint, clock_now_ns() + timeout_ns, ops, ctx, out, e);
	free(endpoint);
	return rc;
}
