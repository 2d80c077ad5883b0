/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Memory of the provider `local`, and who may see it.
 *
 * A region is a memfd, mapped and populated here, then sealed. Seals are what
 * a peer cannot get around, whatever it does with the file descriptor it has:
 *
 *   FAB_REMOTE_READ   cannot be resized, and nobody can write to it or map it
 *                     writable any more (F_SEAL_FUTURE_WRITE); the one writable
 *                     mapping is ours and older than the seal
 *   FAB_REMOTE_WRITE  cannot be resized; writable for the one endpoint that it
 *                     is exported to, once and for ever: what a peer can write
 *                     never becomes somebody else's
 *   FAB_LOCAL         is never given out
 *
 * An export has two halves: the blob, which names and describes the region and
 * travels on the authenticated control connection, and the file descriptor with
 * the same description, which travels on the endpoint's socket. An import needs
 * both, and they must agree. There is no way to take an export back: the memory
 * is freed when its owner and its readers have closed it.
 */
#include "rdma/local.h"
#include "rdma/providers.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define DESC_MAGIC 0x314d4d53u /* "SMM1" */

/* Huge pages when they are asked for and there; else ordinary ones, and the log says why. */
static int region_map_huge(struct fab_region *r, const char *name, uint64_t bytes)
{
	struct stat st;
	int ret = local_memfd(name, 0, MFD_HUGETLB, &r->fd);

	if (ret)
		return ret;
	if (fstat(r->fd, &st)) {
		ret = -errno;
		goto err_close;
	}
	r->page_bytes = (uint64_t)st.st_blksize;
	r->bytes = round_up_u64(bytes, r->page_bytes);
	if (ftruncate(r->fd, (off_t)r->bytes)) {
		ret = -errno;
		goto err_close;
	}
	/* Reserves the pages, so that populating cannot run out of them. */
	r->base = mmap(NULL, r->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, r->fd, 0);
	if (r->base != MAP_FAILED)
		return 0;
	ret = -errno;
err_close:
	close(r->fd);
	return ret;
}

static int region_map_normal(struct fab_region *r, const char *name, uint64_t bytes)
{
	int ret;

	r->page_bytes = (uint64_t)sysconf(_SC_PAGESIZE);
	r->bytes = round_up_u64(bytes, r->page_bytes);
	ret = local_memfd(name, r->bytes, 0, &r->fd);
	if (ret)
		return ret;
	r->base = mmap(NULL, r->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, r->fd, 0);
	if (r->base != MAP_FAILED)
		return 0;
	ret = -errno;
	close(r->fd);
	return ret;
}

/* All pages now, and an error now instead of SIGBUS in the middle of a step. */
static int region_populate(struct fab_region *r)
{
	if (!madvise(r->base, r->bytes, MADV_POPULATE_WRITE))
		return 0;
	if (errno == EFAULT)
		return -ENOMEM;
	if (errno != EINVAL)
		return -errno;
	/* Before Linux 5.14. */
	return fallocate(r->fd, 0, 0, (off_t)r->bytes) ? -errno : 0;
}

static int region_map(struct fab_region *r, const struct fab_region_attr *a)
{
	char name[128];
	int ret;

	snprintf(name, sizeof(name), "shardmesh-%s-%u-%s", r->fab->job, r->fab->member, fab_region_name(a));
	if (a->memory != FAB_HUGEPAGE)
		return region_map_normal(r, name, a->bytes);
	ret = region_map_huge(r, name, a->bytes);
	if (!ret)
		return 0;
	fab_no_huge_pages(r->fab->log, a, ret);
	ret = region_map_normal(r, name, a->bytes);
	/* A wish: the kernel may be configured not to have them for shared memory. */
	if (!ret)
		(void)madvise(r->base, r->bytes, MADV_HUGEPAGE);
	return ret;
}

static int region_check(const struct fab_region_attr *a, struct err *e)
{
	if (a->at && a->access != FAB_LOCAL)
		return err_set(e, -ENOTSUP, "region %s: the fabric \"local\" shares only memory that it made itself",
			       fab_region_name(a));
	return fab_region_check(a, "local", e);
}

/* A memfd, populated and sealed. */
static int region_make(struct fab_region *r, const struct fab_region_attr *a)
{
	int seals = F_SEAL_SHRINK | F_SEAL_GROW | (a->access == FAB_REMOTE_READ ? F_SEAL_FUTURE_WRITE : 0);
	int ret = region_map(r, a);

	if (ret)
		return ret;
	ret = region_populate(r);
	if (!ret)
		ret = local_seal(r->fd, seals);
	if (!ret)
		return 0;
	munmap(r->base, r->bytes);
	close(r->fd);
	return ret;
}

/* Memory of somebody else, for our own reads and writes: nothing to share, nothing to free. */
static int region_adopt(struct fab_region *r, const struct fab_region_attr *a)
{
	r->fd = -1;
	r->base = a->at;
	r->bytes = a->bytes;
	r->page_bytes = (uint64_t)sysconf(_SC_PAGESIZE);
	return 0;
}

int local_region_open(struct fab *f, const struct fab_region_attr *a, struct fab_region **out, struct err *e)
{
	struct fab_region *r;
	char size[24];
	int ret = region_check(a, e);

	if (ret)
		return ret;
	r = calloc(1, sizeof(*r));
	if (!r)
		return err_set(e, -ENOMEM, "region %s: no memory", fab_region_name(a));
	r->fab = f;
	r->access = a->access;
	snprintf(r->name, sizeof(r->name), "%s", fab_region_name(a));
	ret = a->at ? region_adopt(r, a) : region_make(r, a);
	if (ret)
		goto err_free;
	TAILQ_INSERT_TAIL(&f->regions, r, link);
	*out = r;
	return 0;
err_free:
	free(r);
	return err_set(e, ret, "region %s: %s of shared memory: %s", fab_region_name(a), bytes_text(a->bytes, size),
		       strerror(-ret));
}

void local_region_close(struct fab_region *r)
{
	assert(r->ops == 0);
	TAILQ_REMOVE(&r->fab->regions, r, link);
	if (r->fd >= 0) {
		munmap(r->base, r->bytes);
		close(r->fd);
	}
	free(r);
}

void *local_region_addr(struct fab_region *r)
{
	return r->base;
}

int local_export(struct fab_ep *ep, struct fab_region *r, struct fab_blob *out)
{
	struct local_parcel p = {
		.desc = { .magic = DESC_MAGIC, .access = r->access, .bytes = r->bytes, .page_bytes = r->page_bytes }
	};
	int ret;

	if (ep->state != LOCAL_UP)
		return -ENOTCONN;
	if (r->access == FAB_LOCAL || (r->access == FAB_REMOTE_WRITE && r->exported))
		return -EPERM;
	if (ep->leaving_n == LOCAL_PARCELS)
		return -EAGAIN;
	snprintf(p.desc.name, sizeof(p.desc.name), "%s", r->name);
	ret = local_random(p.desc.key, sizeof(p.desc.key));
	if (ret)
		return ret;
	/* Its own descriptor: the region may be closed before the socket has room. */
	p.fd = fcntl(r->fd, F_DUPFD_CLOEXEC, 0);
	if (p.fd < 0)
		return -errno;
	ep->leaving[ep->leaving_n++] = p;
	r->exported = true;
	ep->inbox |= r->access == FAB_REMOTE_WRITE;
	out->bytes = sizeof(p.desc);
	memcpy(out->data, &p.desc, sizeof(p.desc));
	local_ep_send_waiting(ep);
	return 0;
}

static int find_arrived(const struct fab_ep *ep, const struct local_desc *d)
{
	for (uint32_t i = 0; i < ep->arrived_n; i++)
		if (!memcmp(ep->arrived[i].desc.key, d->key, LOCAL_KEY_BYTES))
			return (int)i;
	return -EAGAIN;
}

static int desc_check(const struct local_desc *d, int fd)
{
	uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);

	if (d->access != FAB_REMOTE_READ && d->access != FAB_REMOTE_WRITE)
		return -EPROTO;
	if (d->page_bytes < page || (d->page_bytes & (d->page_bytes - 1)) || d->bytes == 0 || d->bytes % d->page_bytes)
		return -EPROTO;
	return local_memfd_check(fd, d->bytes);
}

/* Maps all of it, for reads and writes; populated where that is the only way in. */
static int remote_open(struct fab_ep *ep, const struct local_parcel *p, struct fab_remote **out)
{
	int prot = p->desc.access == FAB_REMOTE_WRITE ? PROT_READ | PROT_WRITE : PROT_READ;
	int flags = MAP_SHARED | (ep->fab->maps ? 0 : MAP_POPULATE);
	struct fab_remote *r;
	int ret = desc_check(&p->desc, p->fd);

	if (ret)
		return ret;
	r = calloc(1, sizeof(*r));
	if (!r)
		return -ENOMEM;
	r->base = mmap(NULL, p->desc.bytes, prot, flags, p->fd, 0);
	if (r->base == MAP_FAILED) {
		ret = -errno;
		free(r);
		return ret;
	}
	r->fab = ep->fab;
	r->ep = ep;
	r->fd = p->fd;
	r->bytes = p->desc.bytes;
	r->page_bytes = p->desc.page_bytes;
	r->access = (enum fab_access)p->desc.access;
	TAILQ_INSERT_TAIL(&ep->fab->remotes, r, link);
	*out = r;
	return 0;
}

int local_import(struct fab_ep *ep, const struct fab_blob *blob, struct fab_remote **out)
{
	struct local_parcel p;
	struct local_desc d;
	int i, ret;

	if (ep->state != LOCAL_UP)
		return -ENOTCONN;
	if (blob->bytes != sizeof(d))
		return -EINVAL;
	memcpy(&d, blob->data, sizeof(d));
	if (d.magic != DESC_MAGIC)
		return -EINVAL;
	i = find_arrived(ep, &d);
	if (i < 0)
		return i;
	p = ep->arrived[i];
	ret = memcmp(&p.desc, &d, sizeof(d)) ? -EPROTO : remote_open(ep, &p, out);
	/* What cannot be used is thrown away, except for want of something here that may come back. */
	if (ret && ret != -EPROTO)
		return ret;
	if (ret) {
		local_count(&ep->fab->counters.errors, 1);
		log_warn(ep->fab->log, "refused a region of a peer: it is not what was announced, or can be resized");
		close(p.fd);
	}
	ep->arrived[i] = ep->arrived[--ep->arrived_n];
	return ret;
}

void local_remote_close(struct fab_remote *r)
{
	assert(r->ops == 0);
	TAILQ_REMOVE(&r->fab->remotes, r, link);
	local_maps_drop(&r->fab->mapped, r);
	munmap(r->base, r->bytes);
	close(r->fd);
	free(r);
}

uint64_t local_remote_bytes(const struct fab_remote *r)
{
	return r->bytes;
}
