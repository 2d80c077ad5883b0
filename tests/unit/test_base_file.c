/* SPDX-License-Identifier: Apache-2.0 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/base.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct place {
	char dir[64], path[128];
};

static int make_place(void **state)
{
	struct place *p = calloc(1, sizeof(*p));

	snprintf(p->dir, sizeof(p->dir), "/tmp/shardmesh-file-XXXXXX");
	if (!mkdtemp(p->dir))
		return -1;
	snprintf(p->path, sizeof(p->path), "%s/file", p->dir);
	*state = p;
	return 0;
}

static int remove_place(void **state)
{
	struct place *p = *state;
	int rc;

	unlink(p->path);
	/* Fails if a temporary file was left behind. */
	rc = rmdir(p->dir);
	free(p);
	return rc;
}

static void test_write_and_read(void **state)
{
	struct place *p = *state;
	char *data = NULL, big[10000];
	struct stat st;
	struct err e;
	size_t n;

	memset(big, 'b', sizeof(big));
	assert_int_equal(file_write_atomic(p->path, "old", 3, 0644, &e), 0);
	assert_int_equal(file_write_atomic(p->path, big, sizeof(big), 0600, &e), 0);
	assert_int_equal(stat(p->path, &st), 0);
	assert_int_equal(st.st_mode & 07777, 0600);
	assert_int_equal(file_read(p->path, sizeof(big), &data, &n, &e), 0);
	assert_int_equal(n, sizeof(big));
	assert_memory_equal(data, big, n);
	assert_int_equal(data[n], 0);
	free(data);
	assert_int_equal(file_write_atomic(p->path, "", 0, 0600, &e), 0);
	assert_int_equal(file_read(p->path, SIZE_MAX, &data, &n, &e), 0);
	assert_int_equal(n, 0);
	assert_string_equal(data, "");
	free(data);
}

static void test_read_refuses(void **state)
{
	struct place *p = *state;
	char *data = NULL, want[256];
	struct err e;
	size_t n;

	assert_int_equal(file_read(p->path, 10, &data, &n, &e), -ENOENT);
	snprintf(want, sizeof(want), "%s: No such file or directory", p->path);
	assert_string_equal(e.text, want);
	assert_int_equal(file_write_atomic(p->path, "12345678901", 11, 0600, &e), 0);
	assert_int_equal(file_read(p->path, 10, &data, &n, &e), -EFBIG);
	assert_int_equal(file_read(p->path, 0, &data, &n, &e), -EFBIG);
	assert_int_equal(file_read(p->dir, 10, &data, &n, &e), -EISDIR);
	assert_null(data);
	assert_int_equal(file_read(p->path, 11, &data, &n, NULL), 0);
	assert_int_equal(n, 11);
	free(data);
}

struct feed {
	int fd;
	size_t bytes;
};

static void *feed_pipe(void *arg)
{
	struct feed *f = arg;
	char *data = malloc(f->bytes);

	memset(data, 'p', f->bytes);
	write_full(f->fd, data, f->bytes);
	close(f->fd);
	free(data);
	return NULL;
}

/* What fstat says of a pipe or of /proc is nothing. */
static void test_read_without_a_size(void **state)
{
	struct feed f = { .bytes = 300000 };
	char *data = NULL, path[64];
	pthread_t thread;
	struct err e;
	int fds[2];
	size_t n;

	(void)state;
	assert_int_equal(pipe(fds), 0);
	f.fd = fds[1];
	assert_int_equal(pthread_create(&thread, NULL, feed_pipe, &f), 0);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fds[0]);
	assert_int_equal(file_read(path, 1 << 20, &data, &n, &e), 0);
	pthread_join(thread, NULL);
	close(fds[0]);
	assert_int_equal(n, f.bytes);
	free(data);
	assert_int_equal(file_read("/proc/self/status", 1 << 20, &data, &n, &e), 0);
	assert_true(n > 100);
	free(data);
}

static void test_write_refuses(void **state)
{
	struct place *p = *state;
	char path[256], want[512];
	struct err e;

	snprintf(path, sizeof(path), "%s/none/file", p->dir);
	assert_int_equal(file_write_atomic(path, "x", 1, 0600, &e), -ENOENT);
	snprintf(want, sizeof(want), "%s: No such file or directory", path);
	assert_string_equal(e.text, want);
	/* A folder in the way: the rename fails, the temporary file goes. */
	snprintf(path, sizeof(path), "%s/folder", p->dir);
	assert_int_equal(mkdir(path, 0700), 0);
	assert_int_equal(file_write_atomic(path, "x", 1, 0600, &e), -EISDIR);
	assert_int_equal(rmdir(path), 0);
}

static void test_at_offsets(void **state)
{
	struct place *p = *state;
	char buf[8];
	int fd = open(p->path, O_RDWR | O_CREAT, 0600);

	assert_true(fd >= 0);
	assert_int_equal(pwrite_full(fd, "abcdef", 6, 1000), 0);
	assert_int_equal(pread_full(fd, buf, 4, 1002), 0);
	assert_memory_equal(buf, "cdef", 4);
	assert_int_equal(pread_full(fd, buf, 5, 1002), -ENODATA);
	close(fd);
	assert_int_equal(write_full(fd, "x", 1), -EBADF);
	assert_int_equal(pwrite_full(fd, "x", 1, 0), -EBADF);
	assert_int_equal(pread_full(fd, buf, 1, 0), -EBADF);
}

static void test_make_dirs(void **state)
{
	struct place *p = *state;
	char deep[256], want[512];
	struct err e;

	snprintf(deep, sizeof(deep), "%s/a//b/c/", p->dir);
	assert_int_equal(make_dirs(deep, &e), 0);
	assert_int_equal(make_dirs(deep, &e), 0);
	assert_int_equal(rmdir(deep), 0);
	snprintf(deep, sizeof(deep), "%s/a/b", p->dir);
	assert_int_equal(rmdir(deep), 0);
	snprintf(deep, sizeof(deep), "%s/a", p->dir);
	assert_int_equal(rmdir(deep), 0);

	assert_int_equal(file_write_atomic(p->path, "x", 1, 0600, &e), 0);
	snprintf(deep, sizeof(deep), "%s/under", p->path);
	assert_int_equal(make_dirs(deep, &e), -ENOTDIR);
	snprintf(want, sizeof(want), "%s: Not a directory", p->path);
	assert_string_equal(e.text, want);
	assert_int_equal(make_dirs("", &e), -ENOENT);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(test_write_and_read, make_place, remove_place),
		cmocka_unit_test_setup_teardown(test_read_refuses, make_place, remove_place),
		cmocka_unit_test(test_read_without_a_size),
		cmocka_unit_test_setup_teardown(test_write_refuses, make_place, remove_place),
		cmocka_unit_test_setup_teardown(test_at_offsets, make_place, remove_place),
		cmocka_unit_test_setup_teardown(test_make_dirs, make_place, remove_place),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
