/* SPDX-License-Identifier: Apache-2.0 */
#include "base/base.h"

#include <assert.h>
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#define ALIGN_MAX 4096

int arena_init(struct arena *a, const char *name, size_t size)
{
	void *base;

	assert(size > 0);
	base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (base == MAP_FAILED)
		return -ENOMEM;
	/* Only a wish: a kernel without transparent hugepages says EINVAL and serves small pages. */
	madvise(base, size, MADV_HUGEPAGE);
	*a = (struct arena){ .base = base, .size = size };
	snprintf(a->name, sizeof(a->name), "%s", name);
	return 0;
}

void arena_release(struct arena *a)
{
	if (a->base)
		munmap(a->base, a->size);
	memset(a, 0, sizeof(*a));
}

void *arena_alloc(struct arena *a, size_t bytes, size_t align)
{
	size_t start;

	assert(align > 0 && align <= ALIGN_MAX && (align & (align - 1)) == 0);
	assert(a->used <= a->size);
	start = (a->used + align - 1) & ~(align - 1);
	if (start > a->size || bytes > a->size - start)
		return NULL;
	a->used = start + bytes;
	return a->base + start;
}
