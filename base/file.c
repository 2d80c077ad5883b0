/* SPDX-License-Identifier: Apache-2.0 */
#include "base/base.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

int write_full(int fd, const void *data, size_t bytes)
{
	const char *p = data;

	while (bytes > 0) {
		ssize_t n = write(fd, p, bytes);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		p += n;
		bytes -= (size_t)n;
	}
	return 0;
}

int pwrite_full(int fd, const void *data, size_t bytes, uint64_t offset)
{
	const char *p = data;

	while (bytes > 0) {
		ssize_t n = pwrite(fd, p, bytes, (off_t)offset);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		p += n;
		offset += (uint64_t)n;
		bytes -= (size_t)n;
	}
	return 0;
}

int pread_full(int fd, void *data, size_t bytes, uint64_t offset)
{
	char *p = data;

	while (bytes > 0) {
		ssize_t n = pread(fd, p, bytes, (off_t)offset);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (n == 0)
			return -ENODATA;
		p += n;
		offset += (uint64_t)n;
		bytes -= (size_t)n;
	}
	return 0;
}

/*
 * Reads to the end whatever fstat says, so that pipes and /proc work too. One
 * byte more than max is asked for, to tell "exactly max" from "more". *out is
 * freed by the caller on failure as well.
 */
static int read_all(int fd, size_t size_hint, size_t max, char **out, size_t *bytes)
{
	size_t room = size_hint < max ? size_hint + 1 : max + 1;
	size_t n = 0;
	char *grown;
	ssize_t got;

	for (;;) {
		grown = realloc(*out, room + 1);
		if (!grown)
			return -ENOMEM;
		*out = grown;
		while (n < room) {
			got = read(fd, *out + n, room - n);
			if (got < 0 && errno == EINTR)
				continue;
			if (got < 0)
				return -errno;
			if (got == 0)
				break;
			n += (size_t)got;
		}
		if (n > max)
			return -EFBIG;
		if (n < room)
			break;
		room = room < max / 2 ? room * 2 + 4096 : max + 1;
	}
	(*out)[n] = 0;
	*bytes = n;
	return 0;
}

int file_read(const char *path, size_t max, char **out, size_t *bytes, struct err *e)
{
	struct stat st;
	char *data = NULL;
	size_t n = 0;
	int fd, rc;

	if (max > SSIZE_MAX - 2)
		max = SSIZE_MAX - 2;
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return err_set(e, -errno, "%s: %s", path, strerror(errno));
	rc = fstat(fd, &st) < 0 ? -errno : 0;
	if (rc == 0)
		rc = read_all(fd, st.st_size > 0 ? (size_t)st.st_size : 0, max, &data, &n);
	close(fd);
	if (rc == 0) {
		*out = data;
		*bytes = n;
		return 0;
	}
	free(data);
	if (rc == -EFBIG)
		return err_set(e, rc, "%s: larger than the %zu bytes allowed", path, max);
	return err_set(e, rc, "%s: %s", path, strerror(-rc));
}

/* A rename is on disk only when its directory is. */
static int sync_parent(const char *path)
{
	const char *slash = strrchr(path, '/');
	char dir[PATH_MAX];
	int fd, rc;

	snprintf(dir, sizeof(dir), "%.*s", slash ? (int)(slash - path) + (slash == path) : 1, slash ? path : ".");
	fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	rc = fsync(fd) < 0 ? -errno : 0;
	close(fd);
	return rc;
}

static int write_temp(int fd, const void *data, size_t bytes, unsigned mode)
{
	int rc = write_full(fd, data, bytes);

	if (rc == 0 && fchmod(fd, (mode_t)mode) < 0)
		rc = -errno;
	if (rc == 0 && fsync(fd) < 0)
		rc = -errno;
	return rc;
}

int file_write_atomic(const char *path, const void *data, size_t bytes, unsigned mode, struct err *e)
{
	char temp[PATH_MAX];
	int fd, rc;

	if ((size_t)snprintf(temp, sizeof(temp), "%s.XXXXXX", path) >= sizeof(temp))
		return err_set(e, -ENAMETOOLONG, "%s: %s", path, strerror(ENAMETOOLONG));
	fd = mkostemp(temp, O_CLOEXEC);
	if (fd < 0)
		return err_set(e, -errno, "%s: %s", path, strerror(errno));
	rc = write_temp(fd, data, bytes, mode);
	if (close(fd) < 0 && rc == 0)
		rc = -errno;
	if (rc == 0 && rename(temp, path) < 0)
		rc = -errno;
	if (rc < 0)
		goto err_temp;
	rc = sync_parent(path);
	if (rc < 0)
		return err_set(e, rc, "%s: the folder cannot be synced: %s", path, strerror(-rc));
	return 0;
err_temp:
	unlink(temp);
	return err_set(e, rc, "%s: %s", path, strerror(-rc));
}

static int make_dir(const char *path)
{
	struct stat st;

	if (mkdir(path, 0777) == 0)
		return 0;
	if (errno != EEXIST)
		return -errno;
	if (stat(path, &st) < 0)
		return -errno;
	return S_ISDIR(st.st_mode) ? 0 : -ENOTDIR;
}

int make_dirs(const char *path, struct err *e)
{
	char part[PATH_MAX];
	size_t n = strlen(path);
	int rc;

	if (n == 0 || n >= sizeof(part))
		return err_set(e, n ? -ENAMETOOLONG : -ENOENT, "'%s': not a folder name", path);
	memcpy(part, path, n + 1);
	for (size_t i = 1; i <= n; i++) {
		if (part[i] != '/' && part[i] != 0)
			continue;
		part[i] = 0;
		rc = make_dir(part);
		if (rc < 0)
			return err_set(e, rc, "%s: %s", part, strerror(-rc));
		part[i] = path[i];
	}
	return 0;
}
