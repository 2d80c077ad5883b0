/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Memory of the provider `ofi`, and who may see it.
 *
 * Where keys are ours to choose each export is a registration of its own with a
 * random key of 64 bits: what a peer was given is taken back when its connection
 * ends, whatever it still knows, and tells nothing about another's. Providers
 * that make keys themselves do it for hardware, where registering is dear: there
 * a region has one registration and one key.
 */
#include "rdma/ofi/ofi.h"
#include "rdma/providers.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define DESC_MAGIC 0x31524f53u /* "SOR1" */

/* What an export's blob holds. */
struct ofi_desc {
	uint32_t magic, access; /* enum fab_access */
	uint64_t at, key, bytes;
};

static void memory_free(struct fab_region *r)
{
	if (!r->adopted)
		munmap(r->base, r->bytes);
}

/* ------------------------------------------------------------- registrations */

struct registration {
	struct fab_region *region;
	struct fab_ep *ep; /* an export to its peer; NULL: the region's own */
	uint64_t flags;
	struct fid_mr *mr;
	int ret;
};

/* Engine. */
static int export_make(struct fab_ep *ep, struct fab_region *r, uint64_t flags, bool landing, struct fid_mr **mr)
{
	struct ofi_export *x = calloc(1, sizeof(*x));
	int ret;

	if (!x)
		return -ENOMEM;
	ret = ofi_register(r->fab, r->base, r->bytes, flags, &x->mr);
	if (ret) {
		free(x);
		return ret;
	}
	x->ep = ep;
	x->region = r;
	x->landing = landing;
	TAILQ_INSERT_TAIL(&ep->exports, x, of_ep);
	TAILQ_INSERT_TAIL(&r->exports, x, of_region);
	*mr = x->mr;
	return 0;
}

int ofi_landing(struct fab_ep *ep, struct fab_region *r, struct fid_mr **out)
{
	struct ofi_export *x;

	TAILQ_FOREACH(x, &r->exports, of_region)
	{
		if (x->ep == ep && x->landing) {
			*out = x->mr;
			return 0;
		}
	}
	return export_make(ep, r, FI_REMOTE_WRITE, true, out);
}

static void run_register(void *ctx)
{
	struct registration *g = ctx;
	struct fab_region *r = g->region;

	g->ret = g->ep ? export_make(g->ep, r, g->flags, false, &g->mr)
		       : ofi_register(r->fab, r->base, r->bytes, g->flags, &g->mr);
}

static int registered(struct fab_region *r, struct fab_ep *ep, uint64_t flags, struct fid_mr **out)
{
	struct registration g = { .region = r, .ep = ep, .flags = flags };

	ofi_engine_call(r->fab, run_register, &g);
	if (!g.ret)
		*out = g.mr;
	return g.ret;
}

static uint64_t remote_flags(enum fab_access access)
{
	switch (access) {
	case FAB_REMOTE_READ:
		return FI_REMOTE_READ;
	case FAB_REMOTE_WRITE:
		return FI_REMOTE_WRITE;
	case FAB_LOCAL:
		break;
	}
	return 0;
}

/* The one that the region keeps, if the provider wants one. */
static int register_own(struct fab_region *r)
{
	uint64_t flags = 0;

	if (r->fab->local_keys)
		flags |= FI_READ | FI_WRITE;
	if (r->fab->provider_keys)
		flags |= remote_flags(r->access);
	return flags ? registered(r, NULL, flags, &r->mr) : 0;
}

static void close_mr(struct fab *f, struct fid_mr *mr)
{
	int ret = edge_close(&mr->fid);

	if (ret)
		log_error(f->log, "fabric ofi: libfabric cannot close a registration: %s", strerror(-ret));
}

/* Engine. */
static void export_end(struct fab *f, struct ofi_export *x, struct fab_region *r)
{
	TAILQ_REMOVE(&x->ep->exports, x, of_ep);
	TAILQ_REMOVE(&r->exports, x, of_region);
	close_mr(f, x->mr);
	free(x);
}

void ofi_exports_end(struct fab_ep *ep)
{
	struct ofi_export *x, *next;

	for (x = TAILQ_FIRST(&ep->exports); x; x = next) {
		next = TAILQ_NEXT(x, of_ep);
		export_end(ep->fab, x, x->region);
	}
}

static void run_region_end(void *ctx)
{
	struct fab_region *r = ctx;
	struct ofi_export *x, *next;

	for (x = TAILQ_FIRST(&r->exports); x; x = next) {
		next = TAILQ_NEXT(x, of_region);
		/* Answers may be leaving from it. */
		if (x->ep->serving > 0)
			ofi_conn_break(x->ep, -EACCES, "memory that is being read is closed");
		export_end(r->fab, x, r);
	}
	if (r->mr)
		close_mr(r->fab, r->mr);
}

/* -------------------------------------------------------------------- regions */

int ofi_region_open(struct fab *f, const struct fab_region_attr *a, struct fab_region **out, struct err *e)
{
	struct fab_region *r;
	char size[24];
	int ret = fab_region_check(a, "ofi", e);

	if (ret)
		return ret;
	r = calloc(1, sizeof(*r));
	if (!r)
		return err_set(e, -ENOMEM, "region %s: no memory", fab_region_name(a));
	*r = (struct fab_region){ .fab = f, .access = a->access, .adopted = a->at, .base = a->at, .bytes = a->bytes };
	TAILQ_INIT(&r->exports);
	ret = a->at ? 0 : fab_memory_map(f->log, a, &r->base, &r->bytes);
	if (ret)
		goto err_free;
	ret = register_own(r);
	if (ret)
		goto err_memory;
	TAILQ_INSERT_TAIL(&f->regions, r, link);
	*out = r;
	return 0;
err_memory:
	memory_free(r);
err_free:
	free(r);
	return err_set(e, ret, "region %s: %s of memory for libfabric: %s", fab_region_name(a),
		       bytes_text(a->bytes, size), strerror(-ret));
}

void ofi_region_close(struct fab_region *r)
{
	assert(r->ops == 0);
	ofi_engine_call(r->fab, run_region_end, r);
	TAILQ_REMOVE(&r->fab->regions, r, link);
	memory_free(r);
	free(r);
}

void *ofi_region_addr(struct fab_region *r)
{
	return r->base;
}

/* -------------------------------------------------------------------- exports */

/* -EAGAIN: the user has not heard yet that it is; the peer may have. */
static int check_up(struct fab_ep *ep)
{
	bool down;

	pthread_mutex_lock(&ep->fab->lock);
	down = ep->down;
	pthread_mutex_unlock(&ep->fab->lock);
	if (down)
		return -ENOTCONN;
	return ep->told ? 0 : -EAGAIN;
}

int ofi_export(struct fab_ep *ep, struct fab_region *r, struct fab_blob *out)
{
	struct ofi_desc d = { .magic = DESC_MAGIC, .access = r->access, .bytes = r->bytes };
	struct fid_mr *mr = r->mr;
	int ret = 0;

	if (check_up(ep))
		return -ENOTCONN;
	if (r->access == FAB_LOCAL || (r->access == FAB_REMOTE_WRITE && r->exported))
		return -EPERM;
	if (!ep->fab->provider_keys)
		ret = registered(r, ep, remote_flags(r->access), &mr);
	if (ret)
		return ret;
	r->exported = true;
	d.at = ep->fab->virtual_addresses ? (uintptr_t)r->base : 0;
	d.key = fi_mr_key(mr);
	out->bytes = sizeof(d);
	memcpy(out->data, &d, sizeof(d));
	return 0;
}

int ofi_import(struct fab_ep *ep, const struct fab_blob *blob, struct fab_remote **out)
{
	struct fab_remote *r;
	struct ofi_desc d;
	int ret = check_up(ep);

	if (ret)
		return ret;
	if (blob->bytes != sizeof(d))
		return -EINVAL;
	memcpy(&d, blob->data, sizeof(d));
	if (d.magic != DESC_MAGIC)
		return -EINVAL;
	if ((d.access != FAB_REMOTE_READ && d.access != FAB_REMOTE_WRITE) || d.bytes == 0 ||
	    d.at > UINT64_MAX - d.bytes)
		return -EPROTO;
	r = calloc(1, sizeof(*r));
	if (!r)
		return -ENOMEM;
	*r = (struct fab_remote){ .fab = ep->fab,
				  .ep = ep,
				  .at = d.at,
				  .key = d.key,
				  .bytes = d.bytes,
				  .access = (enum fab_access)d.access };
	TAILQ_INSERT_TAIL(&ep->fab->remotes, r, link);
	*out = r;
	return 0;
}

void ofi_remote_close(struct fab_remote *r)
{
	assert(r->ops == 0);
	TAILQ_REMOVE(&r->fab->remotes, r, link);
	free(r);
}

uint64_t ofi_remote_bytes(const struct fab_remote *r)
{
	return r->bytes;
}
