/* SPDX-License-Identifier: Apache-2.0 */
/* What providers do alike: the memory of a region, what is refused of its attributes and of an operation, no mapping. */
#include "rdma/providers.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define HUGE_PAGE_BYTES (2ull << 20)
#define REGION_BYTES_MAX ((uint64_t)1 << 46)

const char *fab_region_name(const struct fab_region_attr *a)
{
	return a->name ? a->name : "region";
}

int fab_region_check(const struct fab_region_attr *a, const char *provider, struct err *e)
{
	if (a->memory == FAB_CUDA)
		return err_set(e, -ENOTSUP, "region %s: GPU memory (device %d) is not for the fabric \"%s\"",
			       fab_region_name(a), a->device, provider);
	if (a->bytes == 0 || a->bytes > REGION_BYTES_MAX)
		return err_set(e, -EINVAL, "region %s: %llu bytes is not a size", fab_region_name(a),
			       (unsigned long long)a->bytes);
	return 0;
}

static int map_pages(uint64_t bytes, int flags, uint8_t **base, uint64_t *mapped)
{
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);

	if (at == MAP_FAILED)
		return -errno;
	*base = at;
	*mapped = bytes;
	return 0;
}

/* Transparent huge pages where they are wished for; all pages now, and an error now. */
static int map_ordinary(const struct fab_region_attr *a, uint8_t **base, uint64_t *mapped)
{
	uint64_t bytes = round_up_u64(a->bytes, (uint64_t)sysconf(_SC_PAGESIZE));
	int ret = map_pages(bytes, 0, base, mapped);

	if (ret)
		return ret;
	if (a->memory == FAB_HUGEPAGE)
		(void)madvise(*base, bytes, MADV_HUGEPAGE);
	/* A kernel before 5.14 does not know the call: then by and by. */
	if (!madvise(*base, bytes, MADV_POPULATE_WRITE) || errno == EINVAL)
		return 0;
	ret = errno == EFAULT ? -ENOMEM : -errno;
	munmap(*base, bytes);
	*base = NULL;
	*mapped = 0;
	return ret;
}

void fab_no_huge_pages(struct log *log, const struct fab_region_attr *a, int error)
{
	log_warn(log,
		 "region %s: no huge pages (%s): ordinary pages instead, transparent huge pages where the kernel has "
		 "them; sysctl vm.nr_hugepages sets huge pages aside",
		 fab_region_name(a), strerror(-error));
}

int fab_memory_map(struct log *log, const struct fab_region_attr *a, uint8_t **base, uint64_t *bytes)
{
	int ret;

	if (a->memory != FAB_HUGEPAGE)
		return map_ordinary(a, base, bytes);
	ret = map_pages(round_up_u64(a->bytes, HUGE_PAGE_BYTES), MAP_HUGETLB | MAP_POPULATE, base, bytes);
	if (!ret)
		return 0;
	fab_no_huge_pages(log, a, ret);
	return map_ordinary(a, base, bytes);
}

static bool inside(uint64_t offset, uint64_t bytes, uint64_t all)
{
	return offset <= all && bytes <= all - offset;
}

int fab_op_check(const struct fab_op *op, uint64_t remote_bytes, uint64_t local_bytes)
{
	if (op->bytes == 0)
		return -EINVAL;
	if (!inside(op->remote_offset, op->bytes, remote_bytes) || !inside(op->local_offset, op->bytes, local_bytes))
		return -ERANGE;
	return 0;
}

int fab_no_map(struct fab_remote *r, uint64_t offset, uint64_t bytes, void *at, void **out)
{
	(void)r;
	(void)offset;
	(void)bytes;
	(void)at;
	(void)out;
	return -ENOTSUP;
}
