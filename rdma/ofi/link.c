/* SPDX-License-Identifier: Apache-2.0 */
/*
 * libfabric, found and opened. Each connection has an endpoint of its own, with
 * a completion queue and an address vector of its own: closing it is the one
 * way that every provider has to make sure that nothing of a peer's is under
 * way any more, and a notice needs no sender's name.
 */
#include "rdma/ofi/ofi.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <rdma/fi_errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>

#define COMPLETIONS 1024
#define KEY_TRIES 16

int ofi_random(void *out, size_t bytes)
{
	ssize_t n = getrandom(out, bytes, 0);

	return n == (ssize_t)bytes ? 0 : n < 0 ? -errno : -EIO;
}

/* -------------------------------------------------------------------- finding */

/*
 * ofi_rxm keeps buffers for messages on every endpoint, 80 MB of them unless
 * told otherwise, and it can be told by the environment alone. We send none.
 * What an operator has set stands.
 */
static void keep_small(void)
{
	(void)setenv("FI_OFI_RXM_BUFFER_SIZE", "1024", 0);
	(void)setenv("FI_OFI_RXM_MSG_RX_SIZE", "64", 0);
}

/* Modes are what we can do for a provider; it takes of them what it wants. */
static struct fi_info *hints_for(const char *provider)
{
	struct fi_info *h = load_allocinfo();

	if (!h)
		return NULL;
	h->caps = FI_RMA;
	h->mode = FI_CONTEXT | FI_CONTEXT2;
	h->ep_attr->type = FI_EP_RDM;
	h->tx_attr->op_flags = FI_DELIVERY_COMPLETE;
	h->domain_attr->mr_mode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY;
	h->domain_attr->threading = FI_THREAD_SAFE;
	h->fabric_attr->prov_name = strdup(provider);
	if (h->fabric_attr->prov_name)
		return h;
	load_freeinfo(h);
	return NULL;
}

static int find_with(const char *provider, const char *node, struct fi_info **out)
{
	struct fi_info *h = hints_for(provider);
	int ret;

	if (!h)
		return -ENOMEM;
	keep_small();
	ret = edge_getinfo(node, node ? FI_SOURCE | FI_NUMERICHOST : 0, h, out);
	load_freeinfo(h);
	return ret;
}

static const char *source_text(const struct fi_info *info, char out[INET6_ADDRSTRLEN])
{
	const struct sockaddr *at = info->src_addr;

	snprintf(out, INET6_ADDRSTRLEN, "%s", info->domain_attr->name ? info->domain_attr->name : "?");
	if (at && info->addr_format == FI_SOCKADDR_IN)
		inet_ntop(AF_INET, &((const struct sockaddr_in *)at)->sin_addr, out, INET6_ADDRSTRLEN);
	else if (at && info->addr_format == FI_SOCKADDR_IN6)
		inet_ntop(AF_INET6, &((const struct sockaddr_in6 *)at)->sin6_addr, out, INET6_ADDRSTRLEN);
	return out;
}

int ofi_find(const struct fab_options *o, struct fi_info **out, char reason[160])
{
	const char *provider = o && o->ofi_provider ? o->ofi_provider : OFI_PROVIDER;
	const char *node = o ? o->local_address : NULL;
	char at[INET6_ADDRSTRLEN];
	uint32_t v;
	int ret = load_check(reason);

	if (ret)
		return ret;
	v = load_version();
	ret = find_with(provider, node, out);
	/* A network whose addresses are not IP's: any of its ports. */
	if (ret == -ENODATA && node)
		ret = find_with(provider, NULL, out);
	if (ret) {
		snprintf(reason, 160,
			 "libfabric %u.%u has no provider \"%s\" for it here (%s): fi_info lists what there is",
			 FI_MAJOR(v), FI_MINOR(v), provider, load_strerror(-ret));
		return ret;
	}
	if ((*out)->domain_attr->cq_data_size < sizeof(uint32_t)) {
		snprintf(reason, 160, "libfabric's %s notices carry %zu bytes, 4 are needed", provider,
			 (*out)->domain_attr->cq_data_size);
		load_freeinfo(*out);
		return -ENOTSUP;
	}
	snprintf(reason, 160, "libfabric %u.%u, %s from %s", FI_MAJOR(v), FI_MINOR(v), (*out)->fabric_attr->prov_name,
		 source_text(*out, at));
	return 0;
}

/* --------------------------------------------------------------- memory keys */

/* Who may choose a key chooses one that nobody can guess. Narrow ones may be taken. */
static int random_key(const struct fab *f, uint64_t *key)
{
	size_t bytes = f->info->domain_attr->mr_key_size;

	*key = 0;
	if (f->provider_keys)
		return 0;
	return ofi_random(key, bytes < sizeof(*key) ? bytes : sizeof(*key));
}

int ofi_register(struct fab *f, void *at, uint64_t bytes, uint64_t flags, struct fid_mr **out)
{
	const struct iovec iov = { .iov_base = at, .iov_len = bytes };
	struct fi_mr_attr attr = { .mr_iov = &iov, .iov_count = 1, .access = flags };
	int ret = 0;

	for (int i = 0; i < KEY_TRIES; i++) {
		ret = random_key(f, &attr.requested_key);
		if (!ret)
			ret = edge_register(f->domain, &attr, out);
		if (ret != -EACCES)
			break;
	}
	return ret;
}

/* ----------------------------------------------------------------- endpoints */

static int queue_open(struct fab *f, struct ofi_link *l)
{
	struct fi_cq_attr attr = { .size = COMPLETIONS, .format = FI_CQ_FORMAT_DATA, .wait_obj = FI_WAIT_FD };
	struct epoll_event ev = { .events = EPOLLIN };
	int ret = -ENOSYS;

	if (f->waits)
		ret = edge_cq(f->domain, &attr, &l->cq);
	if (!ret)
		ret = edge_wait_fd(l->cq, &l->wait_fd);
	if (!ret)
		return epoll_ctl(f->epoll_fd, EPOLL_CTL_ADD, l->wait_fd, &ev) ? -errno : 0;
	if (ret != -ENOSYS || l->cq)
		return ret;
	/* The provider has nothing to sleep on: the engine looks again and again. */
	f->waits = false;
	attr.wait_obj = FI_WAIT_NONE;
	return edge_cq(f->domain, &attr, &l->cq);
}

static int endpoint_open(struct fab *f, struct ofi_link *l, struct ofi_side *own)
{
	struct fi_av_attr attr = { .type = FI_AV_UNSPEC, .count = 1 };
	size_t bytes = sizeof(own->name);
	int ret = edge_av(f->domain, &attr, &l->av);

	if (!ret)
		ret = edge_endpoint(f->domain, f->info, &l->ep);
	if (!ret)
		ret = edge_bind(l->ep, &l->av->fid, 0);
	if (!ret)
		ret = edge_bind(l->ep, &l->cq->fid, FI_TRANSMIT | FI_RECV);
	if (!ret)
		ret = edge_enable(l->ep);
	l->enabled = !ret;
	if (!ret)
		ret = edge_getname(l->ep, own->name, &bytes);
	own->name_bytes = (uint32_t)bytes;
	return ret;
}

int ofi_link_open(struct fab *f, struct ofi_mailbox *mailbox, struct ofi_link *out, struct ofi_side *own)
{
	struct ofi_link l = { .wait_fd = -1, .far = FI_ADDR_UNSPEC };
	int ret = queue_open(f, &l);

	if (!ret)
		ret = endpoint_open(f, &l, own);
	if (!ret)
		ret = ofi_register(f, mailbox, sizeof(*mailbox), FI_REMOTE_WRITE | FI_WRITE, &l.mailbox_mr);
	if (ret) {
		ofi_link_close(f, &l);
		return ret;
	}
	own->mailbox_key = fi_mr_key(l.mailbox_mr);
	own->mailbox_at = f->virtual_addresses ? (uintptr_t)mailbox : 0;
	*out = l;
	return 0;
}

static void close_one(struct fab *f, struct fid *fid, const char *what)
{
	int ret = edge_close(fid);

	if (ret)
		log_error(f->log, "fabric ofi: libfabric cannot close its %s: %s", what, strerror(-ret));
}

/* The endpoint first: it holds the others. */
void ofi_link_close(struct fab *f, struct ofi_link *l)
{
	if (l->ep && !l->enabled) {
		/* ofi_rxm does not survive closing what it has not enabled: it is left, with what it holds. */
		log_error(f->log, "fabric ofi: libfabric could not enable an endpoint: it is left behind");
		l->ep = NULL;
		l->av = NULL;
		l->cq = NULL;
	}
	if (l->ep)
		close_one(f, &l->ep->fid, "endpoint");
	if (l->mailbox_mr)
		close_one(f, &l->mailbox_mr->fid, "registration of a mailbox");
	if (l->av)
		close_one(f, &l->av->fid, "address vector");
	if (l->wait_fd >= 0)
		(void)epoll_ctl(f->epoll_fd, EPOLL_CTL_DEL, l->wait_fd, NULL);
	if (l->cq)
		close_one(f, &l->cq->fid, "completion queue");
	*l = (struct ofi_link){ .wait_fd = -1, .far = FI_ADDR_UNSPEC };
}
