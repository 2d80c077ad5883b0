/* SPDX-License-Identifier: Apache-2.0 */
/* One function a call of libfabric: its errors become -Exxx here, and tests put themselves in between. */
#include "rdma/ofi/ofi.h"

#include <errno.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_errno.h>

/* libfabric's numbers are the kernel's up to FI_ERRNO_OFFSET; behind it are its own. */
int edge_errno(int64_t ret)
{
	if (ret >= 0)
		return 0;
	if (ret > -FI_ERRNO_OFFSET)
		return (int)ret;
	switch (-ret) {
	case FI_ETOOSMALL:
		return -EMSGSIZE;
	case FI_EAVAIL:
		return -EBADMSG;
	case FI_ENOKEY:
		return -EACCES;
	case FI_EADDRNOTAVAIL:
		return -EADDRNOTAVAIL;
	default:
		return -EIO;
	}
}

int edge_getinfo(const char *node, uint64_t flags, const struct fi_info *hints, struct fi_info **out)
{
	return edge_errno(load_getinfo(FI_VERSION(FI_MAJOR_VERSION, FI_MINOR_VERSION), node, flags, hints, out));
}

int edge_fabric(struct fi_info *info, struct fid_fabric **out)
{
	return edge_errno(load_fabric(info->fabric_attr, out));
}

int edge_domain(struct fid_fabric *fabric, struct fi_info *info, struct fid_domain **out)
{
	return edge_errno(fi_domain(fabric, info, out, NULL));
}

int edge_endpoint(struct fid_domain *domain, struct fi_info *info, struct fid_ep **out)
{
	return edge_errno(fi_endpoint(domain, info, out, NULL));
}

int edge_cq(struct fid_domain *domain, struct fi_cq_attr *attr, struct fid_cq **out)
{
	return edge_errno(fi_cq_open(domain, attr, out, NULL));
}

int edge_av(struct fid_domain *domain, struct fi_av_attr *attr, struct fid_av **out)
{
	return edge_errno(fi_av_open(domain, attr, out, NULL));
}

int edge_bind(struct fid_ep *ep, struct fid *what, uint64_t flags)
{
	return edge_errno(fi_ep_bind(ep, what, flags));
}

int edge_enable(struct fid_ep *ep)
{
	return edge_errno(fi_enable(ep));
}

int edge_getname(struct fid_ep *ep, void *name, size_t *bytes)
{
	return edge_errno(fi_getname(&ep->fid, name, bytes));
}

int edge_wait_fd(struct fid_cq *cq, int *fd)
{
	return edge_errno(fi_control(&cq->fid, FI_GETWAIT, fd));
}

int edge_insert(struct fid_av *av, const void *name, fi_addr_t *out)
{
	int n = fi_av_insert(av, name, 1, out, 0, NULL);

	if (n < 0)
		return edge_errno(n);
	return n == 1 ? 0 : -EADDRNOTAVAIL;
}

int edge_register(struct fid_domain *domain, const struct fi_mr_attr *attr, struct fid_mr **out)
{
	return edge_errno(fi_mr_regattr(domain, attr, 0, out));
}

int edge_trywait(struct fid_fabric *fabric, struct fid **fids, int n)
{
	return edge_errno(fi_trywait(fabric, fids, n));
}

int edge_read(struct fid_ep *ep, void *to, size_t bytes, void *desc, fi_addr_t from, uint64_t at, uint64_t key,
	      void *context)
{
	return edge_errno(fi_read(ep, to, bytes, desc, from, at, key, context));
}

int edge_write(struct fid_ep *ep, const struct fi_msg_rma *msg, uint64_t flags)
{
	return edge_errno(fi_writemsg(ep, msg, flags));
}

int edge_completions(struct fid_cq *cq, struct fi_cq_data_entry *out, size_t max)
{
	ssize_t n = fi_cq_read(cq, out, max);

	return n > 0 ? (int)n : edge_errno(n);
}

int edge_failure(struct fid_cq *cq, struct fi_cq_err_entry *out)
{
	ssize_t n = fi_cq_readerr(cq, out, 0);

	return n == 1 ? 0 : n < 0 ? edge_errno(n) : -EAGAIN;
}

int edge_close(struct fid *fid)
{
	return edge_errno(fi_close(fid));
}
