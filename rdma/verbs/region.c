/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Memory and its keys.
 *
 * A region is registered once on every device, before the first step, in pieces
 * of what the device can take at once. Which protection domain its keys live in
 * decides who can use them, whatever keys a peer has got hold of:
 *
 *   FAB_LOCAL         the device's common domain; no remote right
 *   FAB_REMOTE_READ   the common domain, remote read. Queue pairs for reads live
 *                     there, and nothing writable does
 *   FAB_REMOTE_WRITE  registered when it is exported, in a domain of that one
 *                     endpoint, where its queue pairs for pushes live and nothing
 *                     else: a key is of no use to any other peer
 *
 * So only the side that accepted a connection has inboxes. Relaxed ordering (of
 * what the NIC writes on its way through PCIe) is asked for where big reads
 * land, since their completion alone says that they are there; never for an
 * inbox, where a notice also speaks for the writes before it, nor for small
 * regions, where words are.
 *
 * GPU memory would come here as a dma-buf (ibv_reg_dmabuf_mr in mr_open).
 */
#include "rdma/verbs/verbs.h"
#include "rdma/providers.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#define DESC_MAGIC 0x314d4256u /* "VBM1" */
#define CAP_IPC_LOCK_BIT 14

/* ------------------------------------------------------------ locked memory */

/* What /proc says of our effective rights. */
static bool may_lock_all(void)
{
	static const char field[] = "CapEff:";
	FILE *status = fopen("/proc/self/status", "re");
	unsigned long long caps = 0;
	char line[128];

	if (!status)
		return false;
	while (fgets(line, sizeof(line), status))
		if (!strncmp(line, field, strlen(field))) {
			caps = strtoull(line + strlen(field), NULL, 16);
			break;
		}
	fclose(status);
	return caps >> CAP_IPC_LOCK_BIT & 1;
}

void vb_memlock(uint64_t *limit, bool *privileged)
{
	struct rlimit r;

	*limit = getrlimit(RLIMIT_MEMLOCK, &r) || r.rlim_cur == RLIM_INFINITY ? UINT64_MAX : r.rlim_cur;
	*privileged = *limit == UINT64_MAX || may_lock_all();
}

int vb_memlock_check(uint64_t need, uint64_t have, uint64_t limit, bool privileged, struct err *e)
{
	char n[24], h[24], l[24];

	if (privileged || (need <= limit && have <= limit - need))
		return 0;
	return err_set(e, -ENOMEM,
		       "%s of memory must be locked for the NIC beside %s that are, and the limit is %s: raise it with "
		       "\"ulimit -l unlimited\" in the shell that starts this (limits.conf: memlock), "
		       "LimitMEMLOCK=infinity in a systemd unit, --ulimit memlock=-1 for docker, or give the container "
		       "the capability IPC_LOCK (Kubernetes: securityContext.capabilities.add)",
		       bytes_text(need, n), bytes_text(have, h), bytes_text(limit, l));
}

static int memlock_check(struct fab *f, uint64_t need, struct err *e)
{
	uint64_t limit;
	bool privileged;

	vb_memlock(&limit, &privileged);
	return vb_memlock_check(need, f->locked_bytes, limit, privileged, e);
}

/* --------------------------------------------------------------- registration */

static int mr_rights(const struct fab_region *r)
{
	if (r->access == FAB_REMOTE_READ)
		return IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ;
	if (r->access == FAB_REMOTE_WRITE)
		return IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE;
	return IBV_ACCESS_LOCAL_WRITE | (r->bytes >= VB_BULK_BYTES ? IBV_ACCESS_RELAXED_ORDERING : 0);
}

static struct ibv_mr *mr_open(const struct fab_region *r, struct ibv_pd *pd, uint32_t piece)
{
	uint64_t at = piece * r->piece_bytes;
	uint64_t left = r->bytes - at;

	errno = 0;
	return ibv_reg_mr(pd, r->base + at, left < r->piece_bytes ? left : r->piece_bytes, mr_rights(r));
}

static void mrs_close(struct fab_region *r)
{
	for (uint32_t i = 0; i < r->fab->n_devs * r->n_pieces; i++) {
		if (!r->mr[i])
			continue;
		r->fab->locked_bytes -= r->mr[i]->length;
		ibv_dereg_mr(r->mr[i]);
		r->mr[i] = NULL;
	}
}

/* On every device: in the common domain, or in ep's. */
static int mrs_open(struct fab_region *r, struct fab_ep *ep)
{
	struct fab *f = r->fab;
	int ret = 0;

	for (uint32_t i = 0; i < f->n_devs * r->n_pieces && !ret; i++) {
		struct vb_dev *d = &f->dev[i / r->n_pieces];
		struct ibv_pd *pd = d->pd;

		if (ep)
			ret = vb_ep_pd(ep, d, &pd);
		if (ret)
			break;
		r->mr[i] = mr_open(r, pd, i % r->n_pieces);
		if (r->mr[i]) {
			f->locked_bytes += r->mr[i]->length;
			continue;
		}
		ret = errno ? -errno : -ENOMEM;
		log_error(f->log, "region %s: %s does not register %llu bytes: %s", r->name, d->name,
			  (unsigned long long)r->bytes, strerror(-ret));
	}
	if (ret)
		mrs_close(r);
	return ret;
}

static int region_pieces(struct fab_region *r, const struct fab_region_attr *a, struct err *e)
{
	struct fab *f = r->fab;

	r->piece_bytes = f->piece_bytes;
	r->n_pieces = (uint32_t)((r->bytes + r->piece_bytes - 1) / r->piece_bytes);
	if (r->access != FAB_LOCAL && r->n_pieces * f->n_ports > VB_KEYS_MAX)
		return err_set(e, -E2BIG,
			       "region %s: %u pieces on %u ports are more keys than an export has room for (%u)",
			       fab_region_name(a), r->n_pieces, f->n_ports, VB_KEYS_MAX);
	r->mr = calloc((size_t)f->n_devs * r->n_pieces, sizeof(struct ibv_mr *));
	return r->mr ? 0 : err_set(e, -ENOMEM, "region %s: no memory", fab_region_name(a));
}

static int region_register(struct fab_region *r, const struct fab_region_attr *a, struct err *e)
{
	int ret = memlock_check(r->fab, r->bytes * r->fab->n_devs, e);

	if (ret) {
		err_prefix(e, "region %s", fab_region_name(a));
		return ret;
	}
	/* An inbox is registered for the one that it is exported to. */
	ret = r->access == FAB_REMOTE_WRITE ? 0 : mrs_open(r, NULL);
	return ret ? err_set(e, ret, "region %s: it cannot be registered: %s", fab_region_name(a), strerror(-ret)) : 0;
}

static void region_free(struct fab_region *r)
{
	if (r->mapped)
		munmap(r->base, r->mapped);
	free(r->mr);
	free(r);
}

int vb_region_open(struct fab *f, const struct fab_region_attr *a, struct fab_region **out, struct err *e)
{
	struct fab_region *r;
	char size[24];
	int ret = fab_region_check(a, "verbs", e);

	if (ret)
		return ret;
	r = calloc(1, sizeof(*r));
	if (!r)
		return err_set(e, -ENOMEM, "region %s: no memory", fab_region_name(a));
	r->fab = f;
	r->access = a->access;
	snprintf(r->name, sizeof(r->name), "%s", fab_region_name(a));
	if (a->at) {
		r->base = a->at;
		r->bytes = a->bytes;
	} else {
		ret = fab_memory_map(f->log, a, &r->base, &r->mapped);
		r->bytes = r->mapped;
		if (ret)
			ret = err_set(e, ret, "region %s: %s of memory: %s", fab_region_name(a),
				      bytes_text(a->bytes, size), strerror(-ret));
	}
	if (!ret)
		ret = region_pieces(r, a, e);
	if (!ret)
		ret = region_register(r, a, e);
	if (ret) {
		region_free(r);
		return ret;
	}
	TAILQ_INSERT_TAIL(&f->regions, r, link);
	*out = r;
	return 0;
}

void vb_region_close(struct fab_region *r)
{
	assert(r->ops == 0);
	TAILQ_REMOVE(&r->fab->regions, r, link);
	mrs_close(r);
	region_free(r);
}

void *vb_region_addr(struct fab_region *r)
{
	return r->base;
}

void vb_inboxes_revoke(struct fab_ep *ep)
{
	struct fab_region *r;

	TAILQ_FOREACH(r, &ep->fab->regions, link)
	if (r->inbox_of == ep) {
		mrs_close(r);
		r->inbox_of = NULL;
	}
}

/* ------------------------------------------------------------ export, import */

static int inbox_open(struct fab_ep *ep, struct fab_region *r)
{
	int ret;

	if (r->exported)
		return -EPERM;
	/* The connecting side has one domain, where everything of it is: nothing writable may be there. */
	if (ep->active)
		return -ENOTSUP;
	ret = mrs_open(r, ep);
	if (!ret)
		r->inbox_of = ep;
	return ret;
}

int vb_export(struct fab_ep *ep, struct fab_region *r, struct fab_blob *out)
{
	const struct fab *f = ep->fab;
	struct vb_region_desc d = { .magic = DESC_MAGIC,
				    .protocol = VB_PROTOCOL,
				    .access = (uint8_t)r->access,
				    .n_ports = (uint8_t)f->n_ports,
				    .at = (uintptr_t)r->base,
				    .bytes = r->bytes,
				    .piece_bytes = r->piece_bytes,
				    .n_keys = r->n_pieces * f->n_ports };
	int ret = 0;

	if (ep->state != VB_EP_UP)
		return -ENOTCONN;
	if (r->access == FAB_LOCAL)
		return -EPERM;
	if (r->access == FAB_REMOTE_WRITE)
		ret = inbox_open(ep, r);
	if (ret)
		return ret;
	for (uint32_t i = 0; i < d.n_keys; i++) {
		uint32_t dev = (uint32_t)(f->port[i % f->n_ports].dev - f->dev);

		d.key[i] = r->mr[dev * r->n_pieces + i / f->n_ports]->rkey;
	}
	r->exported = true;
	out->bytes = (uint32_t)(offsetof(struct vb_region_desc, key) + d.n_keys * sizeof(d.key[0]));
	memcpy(out->data, &d, out->bytes);
	return 0;
}

static bool desc_good(const struct vb_region_desc *d, uint32_t bytes)
{
	if (d->magic != DESC_MAGIC || d->protocol != VB_PROTOCOL || d->n_ports == 0 || d->n_ports > VB_PORTS_MAX)
		return false;
	if (d->access != FAB_REMOTE_READ && d->access != FAB_REMOTE_WRITE)
		return false;
	if (d->bytes == 0 || d->bytes > (uint64_t)1 << 46 || d->piece_bytes == 0 || d->at > UINT64_MAX - d->bytes)
		return false;
	/* No overflow: there are at most VB_KEYS_MAX pieces, or it is wrong. */
	return d->n_keys <= VB_KEYS_MAX && (d->bytes - 1) / d->piece_bytes < VB_KEYS_MAX &&
	       d->n_keys == ((d->bytes - 1) / d->piece_bytes + 1) * d->n_ports &&
	       bytes == offsetof(struct vb_region_desc, key) + d->n_keys * sizeof(d->key[0]);
}

int vb_import(struct fab_ep *ep, const struct fab_blob *blob, struct fab_remote **out)
{
	struct vb_region_desc d = { 0 };
	struct fab_remote *r;

	if (ep->state != VB_EP_UP)
		return -ENOTCONN;
	if (blob->bytes < offsetof(struct vb_region_desc, key) || blob->bytes > sizeof(d))
		return -EINVAL;
	memcpy(&d, blob->data, blob->bytes);
	if (!desc_good(&d, blob->bytes))
		return -EINVAL;
	for (uint32_t i = 0; i < ep->n_rails; i++)
		if (ep->rail[i].remote_port >= d.n_ports)
			return -EINVAL;
	r = calloc(1, sizeof(*r));
	if (!r)
		return -ENOMEM;
	r->fab = ep->fab;
	r->ep = ep;
	r->desc = d;
	TAILQ_INSERT_TAIL(&ep->fab->remotes, r, link);
	*out = r;
	return 0;
}

void vb_remote_close(struct fab_remote *r)
{
	assert(r->ops == 0);
	TAILQ_REMOVE(&r->fab->remotes, r, link);
	free(r);
}

uint64_t vb_remote_bytes(const struct fab_remote *r)
{
	return r->desc.bytes;
}
