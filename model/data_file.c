/* SPDX-License-Identifier: Apache-2.0 */
#include "model/data_source.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define SAMPLE_BYTES 4096u
#define SAMPLE_COUNT 64u

static int map_fd(struct data_file *f, int fd, struct err *e)
{
	struct stat st;
	void *map;

	if (fstat(fd, &st))
		return err_set(e, -errno, "%s: %s", f->path, strerror(errno));
	if (!S_ISREG(st.st_mode))
		return err_set(e, -EINVAL, "%s: training data must be a regular file", f->path);
	if (!st.st_size)
		return err_set(e, -EINVAL, "%s: the file is empty", f->path);
	map = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0);
	if (map == MAP_FAILED)
		return err_set(e, -errno, "%s: cannot be mapped: %s", f->path, strerror(errno));
	f->map = map;
	f->bytes = (uint64_t)st.st_size;
	return 0;
}

int data_file_map(struct data_file *f, const char *path, struct err *e)
{
	/* A pipe under the name would wait for a writer before it could be refused. */
	int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC), rc;

	*f = (struct data_file){ .path = path };
	if (fd < 0)
		return err_set(e, -errno, "%s: %s", path, strerror(errno));
	rc = map_fd(f, fd, e);
	close(fd);
	return rc;
}

void data_file_unmap(struct data_file *f)
{
	if (f->map)
		munmap((void *)(uintptr_t)f->map, f->bytes);
	f->map = NULL;
}

uint64_t data_file_hash(const struct data_file *f, uint64_t h)
{
	uint64_t bytes = f->bytes < SAMPLE_BYTES ? f->bytes : SAMPLE_BYTES, room = f->bytes - bytes;

	h = hash64(&f->bytes, sizeof(f->bytes), h);
	for (uint64_t k = 0; k < SAMPLE_COUNT; k++)
		h = hash64(f->map + room / (SAMPLE_COUNT - 1) * k, bytes, h);
	return hash64(f->map + room, bytes, h);
}
