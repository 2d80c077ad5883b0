/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where peers' memory lies in our address space.
 *
 * A user lays the runs of many owners side by side in one reservation, and when
 * a run moves it maps the new owner's over the old one's, which goes on to be
 * open for its other runs. So what belongs to whom is written down, in one
 * sorted table: a mapping over another takes its place in the table too, and
 * closing a peer's region undoes only what is still its own. In a reservation,
 * undone means reserved again, never a hole that some other mmap could fall into.
 */
#include "rdma/local.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static int maps_reserve(struct local_maps *m, uint32_t extra)
{
	uint32_t capacity = m->capacity ? m->capacity : 64;
	struct local_map *v;

	while (capacity < m->n + extra)
		capacity *= 2;
	if (capacity == m->capacity)
		return 0;
	v = realloc(m->v, capacity * sizeof(*v));
	if (!v)
		return -ENOMEM;
	m->v = v;
	m->capacity = capacity;
	return 0;
}

/* The first mapping that ends behind `at`. */
static uint32_t maps_find(const struct local_maps *m, uintptr_t at)
{
	uint32_t lo = 0, hi = m->n;

	while (lo < hi) {
		uint32_t mid = lo + (hi - lo) / 2;

		if (m->v[mid].at + m->v[mid].bytes > at)
			hi = mid;
		else
			lo = mid + 1;
	}
	return lo;
}

static void maps_insert(struct local_maps *m, uint32_t i, struct local_map one)
{
	memmove(&m->v[i + 1], &m->v[i], (m->n - i) * sizeof(*m->v));
	m->v[i] = one;
	m->n++;
}

static void maps_remove(struct local_maps *m, uint32_t i)
{
	m->n--;
	memmove(&m->v[i], &m->v[i + 1], (m->n - i) * sizeof(*m->v));
}

/* Takes [at, end) out of the table; the table grows by at most one. Returns where the range would go. */
static uint32_t maps_carve(struct local_maps *m, uintptr_t at, uintptr_t end)
{
	uint32_t i = maps_find(m, at);

	while (i < m->n && m->v[i].at < end) {
		struct local_map old = m->v[i], before = old, behind = old;
		uintptr_t old_end = old.at + old.bytes;

		maps_remove(m, i);
		if (old.at < at) {
			before.bytes = at - old.at;
			maps_insert(m, i++, before);
		}
		if (old_end > end) {
			behind.at = end;
			behind.bytes = old_end - end;
			maps_insert(m, i, behind);
			break;
		}
	}
	return i;
}

static int map_check(const struct fab_remote *r, uint64_t offset, uint64_t bytes, const void *at)
{
	if (!r->fab->maps)
		return -ENOTSUP;
	if (bytes == 0 || offset % r->page_bytes || (uintptr_t)at % r->page_bytes)
		return -EINVAL;
	if (offset > r->bytes || bytes > r->bytes - offset)
		return -ERANGE;
	return 0;
}

int local_map(struct fab_remote *r, uint64_t offset, uint64_t bytes, void *at, void **out)
{
	int prot = r->access == FAB_REMOTE_WRITE ? PROT_READ | PROT_WRITE : PROT_READ;
	struct local_maps *m = &r->fab->mapped;
	struct local_map one = { .remote = r, .reserved = at };
	int ret = map_check(r, offset, bytes, at);
	void *map;

	if (ret)
		return ret;
	ret = maps_reserve(m, 2);
	if (ret)
		return ret;
	one.bytes = round_up_u64(bytes, r->page_bytes);
	map = mmap(at, one.bytes, prot, MAP_SHARED | MAP_POPULATE | (at ? MAP_FIXED : 0), r->fd, (off_t)offset);
	if (map == MAP_FAILED)
		return -errno;
	one.at = (uintptr_t)map;
	maps_insert(m, maps_carve(m, one.at, one.at + one.bytes), one);
	local_count(&r->fab->counters.mapped_bytes, one.bytes);
	*out = map;
	return 0;
}

static void unmap(const struct local_map *one)
{
	const int reserve = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
	void *at = (void *)one->at;

	if (!one->reserved || mmap(at, one->bytes, PROT_NONE, reserve, -1, 0) == MAP_FAILED)
		munmap(at, one->bytes);
}

void local_maps_drop(struct local_maps *m, const struct fab_remote *r)
{
	uint32_t kept = 0;

	for (uint32_t i = 0; i < m->n; i++) {
		if (m->v[i].remote == r)
			unmap(&m->v[i]);
		else
			m->v[kept++] = m->v[i];
	}
	m->n = kept;
}
