/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Devices and ports: which are used, with what, and why not the others.
 *
 * A port is used when it is active, lets us in and, where it is Ethernet, has a
 * GID that routers forward. Of its GIDs the best is taken: RoCE v2 before v1
 * (which no router forwards), the address family of the job's own address
 * before the other, that very address before all, IPv4 before IPv6; never
 * link-local and never one of a network device in another namespace. A flap may
 * move the GIDs to other places of the table, so it is read again before every
 * connection. Every choice is logged, and so is every port that is left out.
 */
#include "rdma/verbs/verbs.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <stdlib.h>
#include <unistd.h>

#define GIDS_MAX 1024
#define HUGE_BYTES (2u << 20)

/* ---------------------------------------------------------------------- GID */

static bool is_v4(const uint8_t g[16])
{
	static const uint8_t mapped[12] = { [10] = 0xff, [11] = 0xff };

	return !memcmp(g, mapped, sizeof(mapped));
}

static bool is_link_local(const uint8_t g[16])
{
	return is_v4(g) ? g[12] == 169 && g[13] == 254 : g[0] == 0xfe && (g[1] & 0xc0) == 0x80;
}

/* The job's own address as a GID, if it is known. */
static bool local_gid(const struct fab_options *o, uint8_t out[16])
{
	uint8_t v4[4];

	memset(out, 0, 16);
	if (!o->local_address)
		return false;
	if (inet_pton(AF_INET6, o->local_address, out) == 1)
		return true;
	if (inet_pton(AF_INET, o->local_address, v4) != 1)
		return false;
	out[10] = out[11] = 0xff;
	memcpy(out + 12, v4, sizeof(v4));
	return true;
}

/* How good an entry of the table is; 0: of no use. */
static unsigned gid_score(const struct fab_options *o, const struct vb_port *p, const struct ibv_gid_entry *g)
{
	char netdev[IF_NAMESIZE];
	uint8_t ours[16];
	unsigned score = 1;
	bool known = local_gid(o, ours);

	if (is_link_local(g->gid.raw) || (g->ndev_ifindex && !if_indextoname(g->ndev_ifindex, netdev)))
		return 0;
	if (g->gid_type == IBV_GID_TYPE_ROCE_V2)
		score += 16;
	if (known && !memcmp(ours, g->gid.raw, sizeof(ours)))
		score += 8;
	if (known ? is_v4(ours) == is_v4(g->gid.raw) : is_v4(g->gid.raw))
		score += 4;
	/* Where it was reached at first, should the port have got other addresses meanwhile. */
	if (!memcmp(p->home, g->gid.raw, sizeof(p->home)))
		score += 2;
	return score;
}

/* Fills what the port is addressed by. -EADDRNOTAVAIL: `why` says what is missing. */
static int gid_choose(const struct fab_options *o, struct vb_port *p, const struct ibv_gid_entry *all, ssize_t n,
		      char why[160])
{
	const struct ibv_gid_entry *best = NULL;
	unsigned best_score = 0;

	for (ssize_t i = 0; i < n; i++) {
		unsigned score = gid_score(o, p, &all[i]);

		if (all[i].port_num != p->num)
			continue;
		/* What the operator names is taken as it is; of InfiniBand the first serves. */
		if (o->gid_index)
			score = all[i].gid_index == o->gid_index - 1;
		else if (p->attr.link_layer != IBV_LINK_LAYER_ETHERNET)
			score = all[i].gid_index == 0;
		if (score > best_score) {
			best = &all[i];
			best_score = score;
		}
	}
	if (!best) {
		if (o->gid_index)
			snprintf(why, 160, "%s has no GID %u (--rdma-gid-index)", p->name, o->gid_index - 1);
		else
			snprintf(why, 160, "%s has no GID that can be routed: give its network device an IP address",
				 p->name);
		return -EADDRNOTAVAIL;
	}
	p->gid_index = best->gid_index;
	p->roce2 = best->gid_type == IBV_GID_TYPE_ROCE_V2;
	memcpy(p->desc.gid, best->gid.raw, sizeof(p->desc.gid));
	if (!p->has_home)
		memcpy(p->home, p->desc.gid, sizeof(p->home));
	p->has_home = true;
	return 0;
}

static void port_ip(struct vb_port *p)
{
	const uint8_t *g = p->desc.gid;

	p->desc.has_ip = p->attr.link_layer == IBV_LINK_LAYER_ETHERNET && p->roce2;
	p->ip[0] = 0;
	if (is_v4(g))
		inet_ntop(AF_INET, g + 12, p->ip, sizeof(p->ip));
	else
		inet_ntop(AF_INET6, g, p->ip, sizeof(p->ip));
}

void vb_port_sockaddr(const struct vb_port_desc *d, uint16_t port, struct sockaddr_storage *out)
{
	struct sockaddr_in *v4 = (struct sockaddr_in *)out;
	struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)out;

	memset(out, 0, sizeof(*out));
	if (is_v4(d->gid)) {
		v4->sin_family = AF_INET;
		v4->sin_port = htons(port);
		memcpy(&v4->sin_addr, d->gid + 12, 4);
	} else {
		v6->sin6_family = AF_INET6;
		v6->sin6_port = htons(port);
		memcpy(&v6->sin6_addr, d->gid, 16);
	}
}

/* --------------------------------------------------------------------- ports */

uint32_t vb_mtu_bytes(enum ibv_mtu mtu)
{
	return mtu >= IBV_MTU_256 && mtu <= IBV_MTU_4096 ? 128u << mtu : 0;
}

static uint8_t clip_reads(int n)
{
	return (uint8_t)(n < 0 ? 0 : n > 128 ? 128 : n);
}

static int port_gids(const struct fab_options *o, struct vb_port *p, char why[160])
{
	struct ibv_gid_entry *all = calloc(GIDS_MAX, sizeof(*all));
	ssize_t n;
	int ret;

	if (!all)
		return -ENOMEM;
	n = ibv_query_gid_table(p->dev->context, all, GIDS_MAX, 0);
	if (n < 0) {
		snprintf(why, 160, "%s: its GIDs cannot be read: %s", p->name, strerror((int)-n));
		ret = (int)n;
	} else {
		ret = gid_choose(o, p, all, n, why);
	}
	free(all);
	return ret;
}

/* Is the port usable now, and with what? */
static int port_look(const struct fab_options *o, struct vb_port *p, char why[160])
{
	const struct ibv_device_attr *a = &p->dev->attr;
	int ret;

	why[0] = 0;
	if (ibv_query_port(p->dev->context, p->num, &p->attr)) {
		snprintf(why, 160, "%s cannot be asked for its state: %s", p->name, strerror(errno));
		return -EIO;
	}
	if (p->attr.state != IBV_PORT_ACTIVE) {
		snprintf(why, 160, "%s is %s", p->name, ibv_port_state_str(p->attr.state));
		return -ENETDOWN;
	}
	ret = port_gids(o, p, why);
	if (ret)
		return ret;
	p->desc.lid = p->attr.lid;
	p->desc.link = p->attr.link_layer;
	p->desc.mtu = (uint8_t)p->attr.active_mtu;
	p->desc.reads_in = clip_reads(a->max_qp_rd_atom);
	p->desc.reads_out = clip_reads(a->max_qp_init_rd_atom);
	port_ip(p);
	if (p->desc.reads_in == 0 || p->desc.reads_out == 0) {
		snprintf(why, 160, "%s does not do RDMA reads", p->name);
		return -EOPNOTSUPP;
	}
	return 0;
}

int vb_port_refresh(struct fab *f, struct vb_port *p)
{
	uint32_t gid_was = p->gid_index;
	bool was_up = p->up;
	char why[160];
	int ret = p->dev->fatal ? -ENODEV : port_look(&f->o, p, why);

	p->up = ret == 0;
	if (ret == -ENODEV)
		return ret;
	if (ret && was_up)
		log_warn(f->log, "verbs: %s", why);
	else if (!ret && p->gid_index != gid_was)
		log_info(f->log, "verbs: %s: its GID moved from index %u to %u (%s)", p->name, gid_was, p->gid_index,
			 p->ip);
	return ret;
}

/* Is "dev" or "dev:port" among "mlx5_0,mlx5_1:2"? */
static bool listed(const char *devices, const char *dev, unsigned port)
{
	char one[80];

	while (devices && *devices) {
		size_t n = strcspn(devices, ",");

		snprintf(one, sizeof(one), "%s:%u", dev, port);
		if ((n == strlen(dev) && !strncmp(devices, dev, n)) || (n == strlen(one) && !strncmp(devices, one, n)))
			return true;
		devices += n + (devices[n] == ',');
	}
	return !devices;
}

static bool any_port_listed(const char *devices, const char *dev)
{
	bool any = false;

	for (unsigned port = 1; port <= VB_PORTS_MAX && !any; port++)
		any = listed(devices, dev, port);
	return any;
}

/* ------------------------------------------------------------------- devices */

/* Opens the device as far as to ask it. */
static int dev_ask(struct vb_dev *d, struct ibv_device *device, char why[160])
{
	snprintf(d->name, sizeof(d->name), "%s", ibv_get_device_name(device));
	errno = 0;
	d->context = ibv_open_device(device);
	if (!d->context) {
		int ret = errno ? -errno : -EIO;

		snprintf(why, 160, "%s cannot be opened: %s%s", d->name, strerror(-ret),
			 ret == -EACCES || ret == -EPERM || ret == -ENOENT
				 ? " (a container needs --device /dev/infiniband)"
				 : "");
		return ret;
	}
	if (ibv_query_device(d->context, &d->attr)) {
		snprintf(why, 160, "%s cannot be asked for what it can do: %s", d->name, strerror(errno));
		ibv_close_device(d->context);
		d->context = NULL;
		return -EIO;
	}
	return 0;
}

static struct ibv_device **device_list(int *n, char why[160])
{
	struct ibv_device **list;

	*n = 0;
	errno = 0;
	list = ibv_get_device_list(n);
	if (!list)
		snprintf(why, 160, "no RDMA devices: %s",
			 errno == ENOSYS ? "the kernel has no InfiniBand support (modprobe ib_uverbs)"
					 : strerror(errno));
	else if (*n == 0)
		snprintf(why, 160, "no RDMA devices (rdma link shows none)");
	return list;
}

/* The first usable port of the device; `why` says what it is, or why there is none. */
static int probe_device(const struct fab_options *o, struct ibv_device *device, char why[160])
{
	struct vb_dev d = { 0 };
	struct vb_port p = { .dev = &d };
	int ret = dev_ask(&d, device, why);

	if (ret)
		return ret;
	ret = -ENODEV;
	snprintf(why, 160, "%s has no port that --rdma-devices names", d.name);
	for (unsigned i = 1; i <= d.attr.phys_port_cnt && ret; i++) {
		if (!listed(o->devices, d.name, i))
			continue;
		p.num = (uint8_t)i;
		snprintf(p.name, sizeof(p.name), "%s/%u", d.name, i);
		ret = port_look(o, &p, why);
	}
	if (!ret)
		snprintf(why, 160, "%s %s, GID %u (%s), MTU %u", p.name, p.roce2 ? "RoCE v2" : "InfiniBand",
			 p.gid_index, p.ip, vb_mtu_bytes(p.attr.active_mtu));
	ibv_close_device(d.context);
	return ret;
}

static int probe_memlock(char reason[160])
{
	const uint64_t least = 64u << 20;
	uint64_t limit;
	bool privileged;
	char size[24];

	vb_memlock(&limit, &privileged);
	if (privileged || limit >= least)
		return 0;
	snprintf(reason, 160,
		 "only %s may be locked: ulimit -l unlimited, LimitMEMLOCK=infinity (systemd), "
		 "--ulimit memlock=-1 (docker), or IPC_LOCK",
		 bytes_text(limit, size));
	return -EPERM;
}

int vb_probe(const struct fab_options *o, char reason[160])
{
	struct ibv_device **list;
	int n, ret = -ENODEV;

	list = device_list(&n, reason);
	if (n > 0)
		snprintf(reason, 160, "--rdma-devices names none of the %d RDMA devices here", n);
	for (int i = 0; i < n && ret; i++)
		if (any_port_listed(o->devices, ibv_get_device_name(list[i])))
			ret = probe_device(o, list[i], reason);
	if (list)
		ibv_free_device_list(list);
	return ret ? ret : probe_memlock(reason);
}

static int nonblocking(int fd)
{
	int flags = fcntl(fd, F_GETFL);

	return flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) ? -errno : 0;
}

/* What every use of the device needs. */
static int dev_open(struct fab *f, struct vb_dev *d, char why[160])
{
	int ret;

	d->pd = ibv_alloc_pd(d->context);
	if (!d->pd)
		goto failed;
	d->channel = ibv_create_comp_channel(d->context);
	if (!d->channel)
		goto failed;
	ret = nonblocking(d->channel->fd);
	if (!ret)
		ret = nonblocking(d->context->async_fd);
	if (!ret)
		ret = vb_watch(f, d->channel->fd, &d->channel);
	if (!ret)
		ret = vb_watch(f, d->context->async_fd, &d->context);
	if (!ret)
		return 0;
	errno = -ret;
failed:
	ret = errno ? -errno : -ENOMEM;
	snprintf(why, 160, "%s cannot be used: %s", d->name, strerror(-ret));
	return ret;
}

static void dev_close(struct vb_dev *d)
{
	if (d->channel)
		ibv_destroy_comp_channel(d->channel);
	if (d->pd)
		ibv_dealloc_pd(d->pd);
	if (d->context)
		ibv_close_device(d->context);
	memset(d, 0, sizeof(*d));
}

static void dev_ports(struct fab *f, struct vb_dev *d, char why[160])
{
	for (unsigned i = 1; i <= d->attr.phys_port_cnt && f->n_ports < VB_PORTS_MAX; i++) {
		struct vb_port *p = &f->port[f->n_ports];

		if (!listed(f->o.devices, d->name, i))
			continue;
		*p = (struct vb_port){ .dev = d, .num = (uint8_t)i };
		snprintf(p->name, sizeof(p->name), "%s/%u", ibv_get_device_name(d->context->device), i);
		if (port_look(&f->o, p, why)) {
			log_info(f->log, "verbs: a port is left out: %s", why);
			continue;
		}
		p->up = true;
		f->n_ports++;
		log_info(f->log, "verbs: %s: %s, GID %u (%s; %s), MTU %u, %u reads in, %u out", p->name,
			 p->attr.link_layer != IBV_LINK_LAYER_ETHERNET ? "InfiniBand"
			 : p->roce2                                    ? "RoCE v2"
								       : "RoCE v1",
			 p->gid_index, p->ip, f->o.gid_index ? "as told" : "the best that can be routed",
			 vb_mtu_bytes(p->attr.active_mtu), p->desc.reads_in, p->desc.reads_out);
	}
}

static void dev_take(struct fab *f, struct ibv_device *device, char why[160])
{
	struct vb_dev *d = &f->dev[f->n_devs];
	uint32_t ports = f->n_ports;

	if (!any_port_listed(f->o.devices, ibv_get_device_name(device)))
		return;
	if (dev_ask(d, device, why)) {
		log_info(f->log, "verbs: a device is left out: %s", why);
		return;
	}
	dev_ports(f, d, why);
	if (f->n_ports == ports || dev_open(f, d, why)) {
		f->n_ports = ports;
		dev_close(d);
		return;
	}
	f->n_devs++;
	/* Whole huge pages, so that no piece ends within one. */
	if (d->attr.max_mr_size / HUGE_BYTES * HUGE_BYTES < f->piece_bytes)
		f->piece_bytes = d->attr.max_mr_size / HUGE_BYTES * HUGE_BYTES;
	if (f->piece_bytes == 0)
		f->piece_bytes = HUGE_BYTES;
}

int vb_devices_open(struct fab *f, struct err *e)
{
	char why[160] = "";
	struct ibv_device **list;
	int n;

	f->piece_bytes = (uint64_t)1 << 40;
	list = device_list(&n, why);
	for (int i = 0; i < n && f->n_devs < VB_PORTS_MAX; i++)
		dev_take(f, list[i], why);
	if (list)
		ibv_free_device_list(list);
	if (f->n_ports == 0)
		return err_set(e, -ENODEV, "fabric verbs: no usable port: %s",
			       why[0] ? why : "--rdma-devices names none that is here");
	return 0;
}

void vb_devices_close(struct fab *f)
{
	while (f->n_devs > 0)
		dev_close(&f->dev[--f->n_devs]);
	f->n_ports = 0;
}
