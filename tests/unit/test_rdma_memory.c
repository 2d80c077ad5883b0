/* SPDX-License-Identifier: Apache-2.0 */
/* Regions: who may see, map and write what, whatever a peer tries; and what is left when they are closed. */
#include "rdma_raw.h"

#include <fcntl.h>
#include <sys/stat.h>

static void regions_are_zeroed_and_rounded(void **state)
{
	const struct fab_ops *ops = fab_provider("local");
	struct fab *f = fab_new(ops, 1, NULL);
	struct fab_region *r = region_new(ops, f, 3 * PAGE + 1, FAB_REMOTE_READ);
	const uint8_t *p = ops->region_addr(r);

	(void)state;
	for (uint32_t i = 0; i < 4 * PAGE; i++)
		assert_int_equal(p[i], 0);
	assert_int_equal(shared_mappings(), 1);
	ops->region_close(r);
	assert_int_equal(shared_mappings(), 0);
	ops->close(f);
}

/* Nothing may be left to grow during a step: every page is there after region_open. */
static void regions_are_populated(void **state)
{
	const struct fab_ops *ops = fab_provider("local");
	struct fab *f = fab_new(ops, 1, NULL);
	struct fab_region *r = region_new(ops, f, 64 * PAGE, FAB_LOCAL);
	uint8_t there[64] = { 0 };

	(void)state;
	assert_int_equal(mincore(ops->region_addr(r), 64 * PAGE, there), 0);
	for (uint32_t i = 0; i < 64; i++)
		assert_true(there[i] & 1);
	ops->close(f);
}

static void sizes_and_kinds_are_checked(void **state)
{
	const struct fab_ops *ops = fab_provider("local");
	struct fab *f = fab_new(ops, 1, NULL);
	struct fab_region_attr attr = { .name = "gpu", .memory = FAB_CUDA, .device = 3, .bytes = PAGE };
	struct fab_region *r = NULL;
	struct err e = { 0 };

	(void)state;
	assert_int_equal(ops->region_open(f, &attr, &r, &e), -ENOTSUP);
	assert_non_null(strstr(e.text, "gpu"));
	assert_non_null(strstr(e.text, "device 3"));
	attr = (struct fab_region_attr){ .bytes = 0 };
	assert_int_equal(ops->region_open(f, &attr, &r, &e), -EINVAL);
	attr.bytes = UINT64_MAX;
	assert_int_equal(ops->region_open(f, &attr, &r, &e), -EINVAL);
	assert_null(r);
	ops->close(f);
}

/* Huge pages where the machine has them, else ordinary ones and a warning; either way the memory is good. */
static void missing_huge_pages_are_said(void **state)
{
	const struct fab_ops *ops = fab_provider("local");
	struct fab_region_attr attr = {
		.name = "big", .memory = FAB_HUGEPAGE, .bytes = 3u << 20, .access = FAB_REMOTE_READ
	};
	struct fab_region *r = NULL;
	struct err e = { 0 };
	struct log log;
	struct fab *f;
	char said[1024] = { 0 };
	int pipes[2];

	(void)state;
	assert_int_equal(pipe2(pipes, O_NONBLOCK | O_CLOEXEC), 0);
	log_init(&log, pipes[1], "test");
	f = fab_new(ops, 1, &log);
	assert_int_equal(ops->region_open(f, &attr, &r, &e), 0);
	fill(ops->region_addr(r), r->bytes, 1);
	(void)!read(pipes[0], said, sizeof(said) - 1);
	if (r->page_bytes == PAGE) {
		assert_int_equal(atomic_load(&log.count[LOG_WARN]), 1);
		assert_non_null(strstr(said, "big"));
		assert_non_null(strstr(said, "huge pages"));
	} else {
		assert_int_equal(atomic_load(&log.count[LOG_WARN]), 0);
		assert_int_equal(r->bytes % r->page_bytes, 0);
	}
	ops->close(f);
	close(pipes[0]);
	close(pipes[1]);
}

static void a_map_shows_the_owners_memory(void **state)
{
	struct fab_region *r;
	struct fab_remote *remote;
	struct pair p;
	uint8_t *theirs;
	void *map = NULL;

	(void)state;
	pair_open(&p, "local");
	r = region_new(p.ops, p.b, 8 * PAGE, FAB_REMOTE_READ);
	theirs = p.ops->region_addr(r);
	fill(theirs, 8 * PAGE, 1);
	remote = region_pass(p.ops, p.ba, r, p.a, p.ab);
	assert_int_equal(p.ops->remote_bytes(remote), 8 * PAGE);
	assert_int_equal(p.ops->map(remote, 2 * PAGE, 6 * PAGE, NULL, &map), 0);
	assert_memory_equal(map, theirs + 2 * PAGE, 6 * PAGE);
	fill(theirs, 8 * PAGE, 2);
	assert_memory_equal(map, theirs + 2 * PAGE, 6 * PAGE);
	assert_int_equal(p.ops->counters(p.a)->mapped_bytes, 6 * PAGE);
	/* The other way round too. */
	assert_int_equal(p.ops->map(remote, PAGE, PAGE, NULL, &map), 0);
	assert_memory_equal(map, theirs + PAGE, PAGE);
	assert_int_equal(p.ops->map(remote, 1, PAGE, NULL, &map), -EINVAL);
	assert_int_equal(p.ops->map(remote, 0, 0, NULL, &map), -EINVAL);
	assert_int_equal(p.ops->map(remote, 0, PAGE, (void *)1, &map), -EINVAL);
	assert_int_equal(p.ops->map(remote, 0, 9 * PAGE, NULL, &map), -ERANGE);
	assert_int_equal(p.ops->map(remote, 8 * PAGE, 1, NULL, &map), -ERANGE);
	assert_int_equal(p.ops->map(remote, PAGE, UINT64_MAX, NULL, &map), -ERANGE);
	pair_close(&p);
	assert_int_equal(shared_mappings(), 0);
}

/* A peer has the file descriptor itself; nothing it does with it may change a byte or the size. */
static void readers_cannot_write(void **state)
{
	struct fab_region *r;
	struct fab_remote *remote;
	struct pair p;
	char path[64];
	uint8_t *map;
	void *out = NULL;
	int fd, again;

	(void)state;
	pair_open(&p, "local");
	r = region_new(p.ops, p.b, 4 * PAGE, FAB_REMOTE_READ);
	fill(p.ops->region_addr(r), 4 * PAGE, 5);
	remote = region_pass(p.ops, p.ba, r, p.a, p.ab);
	fd = remote->fd;
	assert_true(mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED);
	assert_true(mmap(NULL, PAGE, PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED);
	assert_int_equal(p.ops->map(remote, 0, 4 * PAGE, NULL, &out), 0);
	map = out;
	assert_int_equal(mprotect(map, PAGE, PROT_READ | PROT_WRITE), -1);
	assert_int_equal(mprotect(remote->base, PAGE, PROT_READ | PROT_WRITE), -1);
	assert_int_equal(madvise(map, PAGE, MADV_REMOVE), -1);
	assert_int_equal(pwrite(fd, "x", 1, 0), -1);
	assert_int_equal(ftruncate(fd, 0), -1);
	assert_int_equal(ftruncate(fd, 64 * PAGE), -1);
	assert_int_equal(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, PAGE), -1);
	assert_int_equal(fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE), -1);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	again = open(path, O_RDWR | O_CLOEXEC);
	if (again >= 0) {
		assert_true(mmap(NULL, PAGE, PROT_WRITE, MAP_SHARED, again, 0) == MAP_FAILED);
		assert_int_equal(pwrite(again, "x", 1, 0), -1);
		close(again);
	}
	assert_true(filled(p.ops->region_addr(r), 4 * PAGE, 5));
	pair_close(&p);
}

static void inboxes_go_to_one_endpoint_for_ever(void **state)
{
	struct fab_region *inbox, *own;
	struct fab_remote *remote;
	struct fab_blob blob;
	struct pair p;
	uint8_t *map;
	void *out = NULL;

	(void)state;
	pair_open(&p, "local");
	inbox = region_new(p.ops, p.b, PAGE, FAB_REMOTE_WRITE);
	own = region_new(p.ops, p.b, PAGE, FAB_LOCAL);
	remote = region_pass(p.ops, p.ba, inbox, p.a, p.ab);
	assert_int_equal(p.ops->map(remote, 0, PAGE, NULL, &out), 0);
	map = out;
	map[5] = 42;
	assert_int_equal(((uint8_t *)p.ops->region_addr(inbox))[5], 42);
	assert_int_equal(ftruncate(remote->fd, 0), -1);
	assert_int_equal(p.ops->export_region(p.ba, inbox, &blob), -EPERM);
	assert_int_equal(p.ops->export_region(p.ba, own, &blob), -EPERM);
	/* A successor of the endpoint gets an inbox of its own. */
	p.ops->disconnect(p.ab);
	assert_int_equal(next_event(p.ops, p.b).type, FAB_EV_DOWN);
	assert_int_equal(p.ops->export_region(p.ba, own, &blob), -ENOTCONN);
	p.ops->disconnect(p.ba);
	pair_connect(&p);
	assert_int_equal(p.ops->export_region(p.ba, inbox, &blob), -EPERM);
	pair_close(&p);
}

static bool is_reserved(const uint8_t *at)
{
	int pipes[2];
	ssize_t n;

	assert_int_equal(pipe(pipes), 0);
	n = write(pipes[1], at, 1);
	close(pipes[0]);
	close(pipes[1]);
	return n < 0;
}

/* Runs of three owners side by side; one moves from the first to the second; closing undoes only one's own. */
static void runs_lie_side_by_side_in_reserved_space(void **state)
{
	struct fab_region *r[3];
	struct fab_remote *remote[3];
	struct pair p;
	uint8_t *view;
	void *out = NULL;

	(void)state;
	pair_open(&p, "local");
	view = mmap(NULL, 12 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	assert_true(view != MAP_FAILED);
	for (uint8_t i = 0; i < 3; i++) {
		r[i] = region_new(p.ops, p.b, 4 * PAGE, FAB_REMOTE_READ);
		memset(p.ops->region_addr(r[i]), 'a' + i, 4 * PAGE);
		remote[i] = region_pass(p.ops, p.ba, r[i], p.a, p.ab);
		assert_int_equal(p.ops->map(remote[i], 0, 4 * PAGE, view + 4 * PAGE * i, &out), 0);
		assert_ptr_equal(out, view + 4 * PAGE * i);
	}
	for (uint32_t i = 0; i < 12; i++)
		assert_int_equal(view[i * PAGE], 'a' + i / 4);
	/* Pages 1 and 2 go from a to b, page 4 from b to c, then 2..4 to c. */
	assert_int_equal(p.ops->map(remote[1], 0, 2 * PAGE, view + PAGE, &out), 0);
	assert_int_equal(p.ops->map(remote[2], 0, PAGE, view + 4 * PAGE, &out), 0);
	assert_int_equal(p.ops->map(remote[2], PAGE, 3 * PAGE, view + 2 * PAGE, &out), 0);
	for (uint32_t i = 0; i < 12; i++)
		assert_int_equal(view[i * PAGE], "abcccbbbcccc"[i]);
	p.ops->remote_close(remote[0]);
	for (uint32_t i = 0; i < 12; i++)
		assert_int_equal(is_reserved(view + i * PAGE), "abcccbbbcccc"[i] == 'a');
	p.ops->remote_close(remote[2]);
	for (uint32_t i = 0; i < 12; i++)
		assert_int_equal(is_reserved(view + i * PAGE), "abcccbbbcccc"[i] != 'b');
	p.ops->remote_close(remote[1]);
	for (uint32_t i = 0; i < 12; i++)
		assert_true(is_reserved(view + i * PAGE));
	pair_close(&p);
	munmap(view, 12 * PAGE);
	assert_int_equal(shared_mappings(), 0);
}

/* As many mappings as a worker has runs, laid in a scattered order over each other. */
static void many_mappings_keep_their_owners(void **state)
{
	enum { PAGES = 512 };
	struct fab_region *r[4];
	struct fab_remote *remote[4];
	uint8_t owner[PAGES];
	struct pair p;
	uint8_t *view;
	void *out = NULL;

	(void)state;
	pair_open(&p, "local");
	view = mmap(NULL, PAGES * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	assert_true(view != MAP_FAILED);
	memset(owner, 0xff, sizeof(owner));
	for (uint8_t i = 0; i < 4; i++) {
		r[i] = region_new(p.ops, p.b, 16 * PAGE, FAB_REMOTE_READ);
		memset(p.ops->region_addr(r[i]), i, 16 * PAGE);
		remote[i] = region_pass(p.ops, p.ba, r[i], p.a, p.ab);
	}
	for (uint64_t i = 0; i < 3000; i++) {
		uint64_t x = rng_u64(5, 0, i);
		uint32_t n = 1 + x % 16, first = (uint32_t)(x >> 8) % (PAGES - n);
		uint8_t who = x >> 32 & 3;

		assert_int_equal(p.ops->map(remote[who], 0, n * PAGE, view + first * PAGE, &out), 0);
		memset(owner + first, who, n);
	}
	for (uint8_t closed = 0; closed < 4; closed++) {
		for (uint32_t i = 0; i < PAGES; i++)
			if (owner[i] >= closed && owner[i] < 4)
				assert_int_equal(view[i * PAGE], owner[i]);
			else
				assert_true(is_reserved(view + i * PAGE));
		p.ops->remote_close(remote[closed]);
	}
	pair_close(&p);
	munmap(view, PAGES * PAGE);
	assert_int_equal(shared_mappings(), 0);
}

static void copies_are_not_mapped(void **state)
{
	struct fab_region *r;
	struct fab_remote *remote;
	struct pair p;
	void *out = NULL;

	(void)state;
	pair_open(&p, "local-copy");
	assert_false(p.ops->maps);
	r = region_new(p.ops, p.b, PAGE, FAB_REMOTE_READ);
	remote = region_pass(p.ops, p.ba, r, p.a, p.ab);
	assert_int_equal(p.ops->map(remote, 0, PAGE, NULL, &out), -ENOTSUP);
	assert_null(out);
	pair_close(&p);
}

static void imports_need_the_very_blob(void **state)
{
	struct fab_remote *remote = NULL;
	struct fab_blob blob, wrong;
	struct fab_region *r;
	struct local_desc d;
	struct pair p;

	(void)state;
	pair_open(&p, "local");
	r = region_new(p.ops, p.b, PAGE, FAB_REMOTE_READ);
	assert_int_equal(p.ops->export_region(p.ba, r, &blob), 0);
	no_event(p.ops, p.a);
	wrong = blob;
	wrong.bytes--;
	assert_int_equal(p.ops->import_region(p.ab, &wrong, &remote), -EINVAL);
	wrong = blob;
	wrong.data[0] ^= 1;
	assert_int_equal(p.ops->import_region(p.ab, &wrong, &remote), -EINVAL);
	wrong = blob;
	wrong.data[offsetof(struct local_desc, key)] ^= 1;
	assert_int_equal(p.ops->import_region(p.ab, &wrong, &remote), -EAGAIN);
	assert_int_equal(p.ops->import_region(p.ba, &blob, &remote), -EAGAIN);
	/* What came over the socket says something else than the control connection. */
	memcpy(&d, blob.data, sizeof(d));
	d.access = FAB_REMOTE_WRITE;
	memcpy(blob.data, &d, sizeof(d));
	assert_int_equal(p.ops->import_region(p.ab, &blob, &remote), -EPROTO);
	assert_null(remote);
	pair_close(&p);
}

static void mapped_memory_outlives_its_owner(void **state)
{
	struct fab_region *r;
	struct fab_remote *remote;
	struct pair p;
	void *out = NULL;

	(void)state;
	pair_open(&p, "local");
	r = region_new(p.ops, p.b, 4 * PAGE, FAB_REMOTE_READ);
	fill(p.ops->region_addr(r), 4 * PAGE, 8);
	remote = region_pass(p.ops, p.ba, r, p.a, p.ab);
	assert_int_equal(p.ops->map(remote, 0, 4 * PAGE, NULL, &out), 0);
	p.ops->close(p.b);
	assert_int_equal(next_event(p.ops, p.a).type, FAB_EV_DOWN);
	assert_true(filled(out, 4 * PAGE, 8));
	p.ops->disconnect(p.ab);
	assert_true(filled(out, 4 * PAGE, 8));
	p.ops->remote_close(remote);
	assert_int_equal(shared_mappings(), 0);
	p.ops->close(p.a);
}

/* A region whose file could shrink would kill its reader: such a description is refused, and so is a false one. */
static void regions_that_could_shrink_are_refused(void **state)
{
	const struct fab_ops *ops = fab_provider("local");
	struct fab *f = fab_new(ops, 1, NULL);
	struct fab_remote *remote = NULL;
	struct fab_blob blob;
	struct local_msg m;
	struct raw r;

	(void)state;
	raw_greet(&r, ops, f);
	for (int i = 0; i < 8; i++) {
		int fd = -1;

		assert_int_equal(local_memfd("evil", 4 * PAGE, 0, &fd), 0);
		local_msg_init(&m, LOCAL_REGION, 0);
		m.region = (struct local_desc){
			.magic = 0x314d4d53u, .bytes = 4 * PAGE, .page_bytes = PAGE, .access = FAB_REMOTE_READ
		};
		m.region.key[0] = (uint8_t)i;
		/* 0: not sealed. 1: grows only. 2..6: sealed, but the description is wrong. 7: all is well. */
		if (i > 0)
			assert_int_equal(local_seal(fd, F_SEAL_GROW | (i > 1 ? F_SEAL_SHRINK : 0)), 0);
		m.region.bytes += i == 2 ? PAGE : 0;
		m.region.access = i == 3 ? FAB_LOCAL : i == 4 ? 99 : m.region.access;
		m.region.page_bytes = i == 5 ? 3 * PAGE : i == 6 ? 512 : PAGE;
		assert_int_equal(local_send(r.sock, &m, fd), 0);
		close(fd);
		no_event(ops, f);
		blob.bytes = sizeof(m.region);
		memcpy(blob.data, &m.region, sizeof(m.region));
		assert_int_equal(ops->import_region(r.ep, &blob, &remote), i < 7 ? -EPROTO : 0);
		assert_int_equal(ops->counters(f)->errors, i < 7 ? i + 1 : 7);
	}
	ops->close(f);
	close(r.sock);
	assert_int_equal(shared_mappings(), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(regions_are_zeroed_and_rounded),
		cmocka_unit_test(regions_are_populated),
		cmocka_unit_test(sizes_and_kinds_are_checked),
		cmocka_unit_test(missing_huge_pages_are_said),
		cmocka_unit_test(a_map_shows_the_owners_memory),
		cmocka_unit_test(readers_cannot_write),
		cmocka_unit_test(inboxes_go_to_one_endpoint_for_ever),
		cmocka_unit_test(runs_lie_side_by_side_in_reserved_space),
		cmocka_unit_test(many_mappings_keep_their_owners),
		cmocka_unit_test(copies_are_not_mapped),
		cmocka_unit_test(imports_need_the_very_blob),
		cmocka_unit_test(mapped_memory_outlives_its_owner),
		cmocka_unit_test(regions_that_could_shrink_are_refused),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
