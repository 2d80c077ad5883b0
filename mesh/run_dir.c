/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The run directory: one job's, and one coordinator's at a time.
 *
 *   lock          held (flock) while a coordinator is at work; its pid
 *   job.json      name, id, when; hash of the config
 *   config.json   the resolved config
 *   endpoint      where the coordinator listens; only while it runs
 *   steps.jsonl   one line a committed step, appended, never rewritten
 *   summary.json  how it ended
 *   model/        the result (export.c)
 *
 * The lock is taken before anything is looked at, so that of two coordinators
 * one is refused and does no harm. A directory in which a job has committed a
 * step is that job's for good. One in which a start failed before the first
 * step holds nothing that anybody could miss, and is taken over.
 */
#include "mesh/run_dir.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static int file_path(const struct run_dir *r, const char *name, char out[PATH_MAX])
{
	return snprintf(out, PATH_MAX, "%s/%s", r->path, name) < PATH_MAX ? 0 : -ENAMETOOLONG;
}

static int say(struct err *e, int rc, const char *path)
{
	return err_set(e, rc, "run directory: %s: %s", path, strerror(-rc));
}

static int open_file(const struct run_dir *r, const char *name, int flags, struct err *e)
{
	char path[PATH_MAX];
	int fd, rc = file_path(r, name, path);

	if (rc < 0)
		return say(e, rc, r->path);
	fd = open(path, flags | O_CREAT | O_CLOEXEC, 0644);
	return fd >= 0 ? fd : say(e, -errno, path);
}

static int write_file(const struct run_dir *r, const char *name, const char *text, struct err *e)
{
	char path[PATH_MAX];
	int rc = file_path(r, name, path);

	if (rc < 0)
		return say(e, rc, r->path);
	rc = file_write_atomic(path, text, strlen(text), 0644, e);
	return rc < 0 ? err_prefix(e, "run directory") : 0;
}

static int lock(struct run_dir *r, struct err *e)
{
	char pid[16] = "";
	ssize_t n;

	r->lock_fd = open_file(r, "lock", O_RDWR, e);
	if (r->lock_fd < 0)
		return r->lock_fd;
	if (flock(r->lock_fd, LOCK_EX | LOCK_NB) == 0) {
		n = snprintf(pid, sizeof(pid), "%d\n", getpid());
		if (ftruncate(r->lock_fd, 0) == 0 && pwrite(r->lock_fd, pid, (size_t)n, 0) == n)
			return 0;
		return err_set(e, -errno, "run directory %s: the lock cannot be written: %s", r->path, strerror(errno));
	}
	if (errno != EWOULDBLOCK)
		return err_set(e, -errno, "run directory %s: cannot be locked: %s", r->path, strerror(errno));
	n = pread(r->lock_fd, pid, sizeof(pid) - 1, 0);
	return err_set(e, -EBUSY, "run directory %s: another coordinator is at work in it (pid %d)", r->path,
		       n > 0 ? (int)strtol(pid, NULL, 10) : 0);
}

/* Something of a run: lines, a model. */
static const char *find_result(const struct run_dir *r)
{
	static const char *const results[] = { "steps.jsonl", "model" };
	char path[PATH_MAX];
	struct stat st;

	for (size_t i = 0; i < ARRAY_LEN(results); i++)
		if (file_path(r, results[i], path) == 0 && stat(path, &st) == 0 &&
		    (S_ISDIR(st.st_mode) || st.st_size > 0))
			return results[i];
	return NULL;
}

static int refuse_other_job(const struct run_dir *r, struct err *e)
{
	const char *result = find_result(r), *name;
	char path[PATH_MAX];
	json_t *job;

	if (!result)
		return 0;
	job = file_path(r, "job.json", path) == 0 ? json_load_file(path, 0, NULL) : NULL;
	name = json_string_value(json_object_get(job, "job"));
	if (name)
		err_set(e, -EINVAL, "run directory %s holds job '%s': choose another --run-dir or remove it", r->path,
			name);
	else
		err_set(e, -EINVAL, "run directory %s holds the %s of some job: choose another --run-dir or remove it",
			r->path, result);
	json_decref(job);
	return -EINVAL;
}

static int write_job(const struct run_dir *r, const char *job, const uint8_t id[16], const char *config, struct err *e)
{
	char hash[33], hex[33], created[32], *text;
	time_t now = (time_t)(clock_wall_ns() / 1000000000u);
	struct tm tm;
	json_t *o;
	int rc;

	hash128_hex(hash128(config, strlen(config), 0), hash);
	for (int i = 0; i < 16; i++)
		snprintf(hex + 2 * i, 3, "%02x", id[i]);
	gmtime_r(&now, &tm);
	strftime(created, sizeof(created), "%Y-%m-%dT%H:%M:%SZ", &tm);
	o = json_pack("{ss ss ss ss}", "job", job, "id", hex, "config_hash", hash, "created", created);
	text = o ? json_dumps(o, JSON_INDENT(2)) : NULL;
	json_decref(o);
	if (!text)
		return err_set(e, -EINVAL, "the job's name '%s' cannot be written as JSON", job);
	rc = write_file(r, "job.json", text, e);
	free(text);
	return rc;
}

int run_dir_open(struct run_dir *r, const char *path, const char *job, const uint8_t id[16], const char *config,
		 struct err *e)
{
	int rc;

	memset(r, 0, sizeof(*r));
	r->lock_fd = r->steps_fd = -1;
	if ((size_t)snprintf(r->path, sizeof(r->path), "%s", path) >= sizeof(r->path))
		return say(e, -ENAMETOOLONG, path);
	rc = make_dirs(path, e);
	if (rc < 0)
		return err_prefix(e, "run directory %s", path);
	rc = lock(r, e);
	if (rc == 0)
		rc = refuse_other_job(r, e);
	if (rc == 0)
		rc = write_job(r, job, id, config, e);
	if (rc == 0)
		rc = write_file(r, "config.json", config, e);
	if (rc == 0)
		rc = r->steps_fd = open_file(r, "steps.jsonl", O_WRONLY | O_APPEND, e);
	if (rc >= 0)
		return 0;
	if (r->lock_fd >= 0)
		close(r->lock_fd);
	r->lock_fd = -1;
	return rc;
}

int run_dir_endpoint(struct run_dir *r, const char *endpoint, struct err *e)
{
	char line[400];

	snprintf(line, sizeof(line), "%s\n", endpoint);
	return write_file(r, "endpoint", line, e);
}

int run_dir_line(struct run_dir *r, const char *line, size_t bytes, struct err *e)
{
	ssize_t n;

	do
		n = write(r->steps_fd, line, bytes);
	while (n < 0 && errno == EINTR);
	if (n == (ssize_t)bytes) {
		r->steps_bytes += bytes;
		return 0;
	}
	n = n < 0 ? -errno : -ENOSPC;
	/* Half a line would be taken for a damaged file. */
	if (ftruncate(r->steps_fd, (off_t)r->steps_bytes) < 0)
		return err_set(e, (int)n, "%s/steps.jsonl: %s, and its last line is torn", r->path, strerror((int)-n));
	return err_set(e, (int)n, "%s/steps.jsonl: %s", r->path, strerror((int)-n));
}

int run_dir_summary(struct run_dir *r, const char *json, struct err *e)
{
	return write_file(r, "summary.json", json, e);
}

void run_dir_release(struct run_dir *r)
{
	char path[PATH_MAX];

	if (r->lock_fd < 0)
		return;
	if (file_path(r, "endpoint", path) == 0)
		unlink(path);
	fsync(r->steps_fd);
	close(r->steps_fd);
	close(r->lock_fd);
	r->lock_fd = r->steps_fd = -1;
}
