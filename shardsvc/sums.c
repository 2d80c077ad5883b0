/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Partial sums of the reduction trees.
 *
 * A sum is one extent, first fit, of planned memory. Where the plan holds every
 * sum that there can be, the extents are of their sizes from the start, so that
 * no gap between them can keep a sum out; otherwise only a contribution that
 * must be taken may go to the spill file instead, which is unlinked when it is
 * made, has its blocks from the start, and is mapped: the page cache holds what
 * it has room for. The plan counts elements, not the gaps between extents of
 * unequal size, so behind the file's mapping lies address space for as much
 * again: a sum that ends up there costs memory that was not planned, which is
 * counted and logged, but no worker waits for ever because of it.
 *
 * Ids and extents belong to the control thread. The bytes are the data
 * thread's, and because jobs are done in the order in which they were handed
 * over, an extent may be given away as soon as the last job that reads it is
 * handed over.
 */
#include "shardsvc/shard.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static int space_init(struct sum_space *s, uint32_t max, uint64_t elements)
{
	/* Between two sums lies at most one free extent, and one at either end. */
	s->free = calloc((size_t)max + 1, sizeof(*s->free));
	if (!s->free)
		return -ENOMEM;
	s->elements = elements;
	s->n_free = elements > 0;
	s->free[0] = (struct sum_extent){ .at = 0, .n = elements };
	return 0;
}

static void space_fit(struct sum_space *s, const struct sum_config *c)
{
	uint64_t at = 0;

	assert(c->n_fitted <= c->max);
	s->fitted = true;
	s->n_free = c->n_fitted;
	for (uint32_t i = 0; i < c->n_fitted; i++) {
		s->free[i] = (struct sum_extent){ .at = at, .n = c->fitted[i] };
		at += c->fitted[i];
	}
	assert(at == s->elements);
}

static void space_release(struct sum_space *s)
{
	if (s->base)
		munmap(s->base, s->elements * sizeof(float));
	free(s->free);
}

static bool space_take(struct sum_space *s, uint64_t n, uint64_t *at)
{
	for (uint32_t i = 0; i < s->n_free; i++) {
		struct sum_extent *f = &s->free[i];

		if (f->n < n || (s->fitted && f->n != n))
			continue;
		*at = f->at;
		f->at += n;
		f->n -= n;
		if (f->n == 0)
			memmove(f, f + 1, (--s->n_free - i) * sizeof(*f));
		return true;
	}
	return false;
}

static void space_give(struct sum_space *s, uint64_t at, uint64_t n)
{
	struct sum_extent *f;
	uint32_t i = 0;
	bool joins_left, joins_right;

	while (i < s->n_free && s->free[i].at < at)
		i++;
	f = &s->free[i];
	assert(i == 0 || f[-1].at + f[-1].n <= at);
	assert(i == s->n_free || at + n <= f->at);
	joins_left = !s->fitted && i > 0 && f[-1].at + f[-1].n == at;
	joins_right = !s->fitted && i < s->n_free && f->at == at + n;
	if (joins_left) {
		f[-1].n += n + (joins_right ? f->n : 0);
		if (joins_right)
			memmove(f, f + 1, (--s->n_free - i) * sizeof(*f));
	} else if (joins_right) {
		f->at = at;
		f->n += n;
	} else {
		memmove(f + 1, f, (s->n_free++ - i) * sizeof(*f));
		*f = (struct sum_extent){ .at = at, .n = n };
	}
}

static int memory_map(struct sum_space *s, struct err *e)
{
	char size[24];
	void *base;

	if (!s->elements)
		return 0;
	base = mmap(NULL, s->elements * sizeof(float), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (base == MAP_FAILED)
		return err_set(e, -ENOMEM, "no memory for partial sums: %s",
			       bytes_text(s->elements * sizeof(float), size));
	(void)madvise(base, s->elements * sizeof(float), MADV_HUGEPAGE);
	s->base = base;
	return 0;
}

/* A file without a name, where the file system can do that; else its name is taken away at once. */
static int spill_open(const char *dir)
{
	char path[4096];
	int fd = open(dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);

	if (fd >= 0 || (errno != EOPNOTSUPP && errno != EISDIR && errno != EINVAL))
		return fd >= 0 ? fd : -errno;
	if ((size_t)snprintf(path, sizeof(path), "%s/spill.XXXXXX", dir) >= sizeof(path))
		return -ENAMETOOLONG;
	fd = mkostemp(path, O_CLOEXEC);
	if (fd < 0)
		return -errno;
	unlink(path);
	return fd;
}

static int limit_map(struct sum_space *s, struct err *e)
{
	const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
	char size[24];
	void *base;

	if (!s->elements)
		return 0;
	base = mmap(NULL, s->elements * sizeof(float), PROT_READ | PROT_WRITE, flags, -1, 0);
	if (base == MAP_FAILED)
		return err_set(e, -ENOMEM, "no address space for partial sums: %s",
			       bytes_text(s->elements * sizeof(float), size));
	s->base = base;
	return 0;
}

/* The file over the front of the spill space. */
static int spill_map(struct sum_space *s, uint64_t elements, const char *dir, struct err *e)
{
	uint64_t bytes = elements * sizeof(float);
	char size[24];
	void *base;
	int fd, rc;

	if (!bytes)
		return 0;
	fd = spill_open(dir);
	if (fd < 0)
		return err_set(e, fd, "spill file in %s: %s", dir, strerror(-fd));
	/* The blocks now: a full disk must not become SIGBUS in the middle of a step. */
	rc = -posix_fallocate(fd, 0, (off_t)bytes);
	base = rc ? MAP_FAILED : mmap(s->base, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
	if (!rc && base == MAP_FAILED)
		rc = -errno;
	close(fd);
	if (rc)
		return err_set(e, rc, "spill file of %s in %s: %s", bytes_text(bytes, size), dir, strerror(-rc));
	return 0;
}

int sums_init(struct sum_pool *p, const struct sum_config *c, struct err *e)
{
	int rc;

	assert(c->spill_elements <= c->limit_elements);
	memset(p, 0, sizeof(*p));
	p->max = c->max;
	p->file_elements = c->spill_elements;
	p->sum = calloc((size_t)c->max + 1, sizeof(*p->sum));
	p->unused = calloc((size_t)c->max + 1, sizeof(*p->unused));
	rc = p->sum && p->unused ? 0 : -ENOMEM;
	if (!rc)
		rc = space_init(&p->memory, c->max, c->memory_elements);
	if (!rc)
		rc = space_init(&p->spill, c->max, c->limit_elements);
	if (rc)
		err_set(e, rc, "no memory for a table of %u partial sums", c->max);
	else if (c->fitted)
		space_fit(&p->memory, c);
	if (!rc)
		rc = memory_map(&p->memory, e);
	if (!rc)
		rc = limit_map(&p->spill, e);
	if (!rc)
		rc = spill_map(&p->spill, c->spill_elements, c->spill_dir, e);
	if (rc) {
		sums_release(p);
		return rc;
	}
	for (uint32_t i = 0; i < c->max; i++)
		p->unused[i] = c->max - i;
	return 0;
}

void sums_release(struct sum_pool *p)
{
	space_release(&p->memory);
	space_release(&p->spill);
	free(p->sum);
	free(p->unused);
	memset(p, 0, sizeof(*p));
}

static void count_spill(struct sum_pool *p, const struct sum *s)
{
	bool beyond = s->at + s->n > p->file_elements;

	atomic_fetch_add_explicit(beyond ? &p->beyond_bytes : &p->spilled_bytes, s->n * sizeof(float),
				  memory_order_relaxed);
}

uint32_t sums_take(struct sum_pool *p, uint64_t n, bool must)
{
	struct sum s = { .n = n };
	uint32_t id;

	assert(n > 0);
	if (p->n_used == p->max)
		return 0;
	if (!space_take(&p->memory, n, &s.at)) {
		if (!must || !space_take(&p->spill, n, &s.at))
			return 0;
		s.spilled = true;
		count_spill(p, &s);
	}
	id = p->unused[p->max - ++p->n_used];
	p->sum[id] = s;
	return id;
}

void sums_give(struct sum_pool *p, uint32_t id)
{
	const struct sum *s = &p->sum[id];

	assert(id > 0 && id <= p->max && s->n > 0 && p->n_used > 0);
	space_give(s->spilled ? &p->spill : &p->memory, s->at, s->n);
	p->unused[p->max - p->n_used--] = id;
}

float *sums_at(const struct sum_pool *p, uint32_t id)
{
	const struct sum *s = &p->sum[id];

	assert(id > 0 && id <= p->max && s->n > 0);
	return (s->spilled ? p->spill.base : p->memory.base) + s->at;
}
