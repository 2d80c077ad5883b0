/* SPDX-License-Identifier: Apache-2.0 */
#include "verbs_stub_parts.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/queue.h>
#include <unistd.h>

struct stub stub = { .n_devices = 1, .ports = 1, .max_mr_size = UINT64_MAX, .reads = 16 };

struct sdevice {
	struct ibv_device device;
};

struct schannel {
	struct ibv_comp_channel c;
	uint32_t cqs;
};

struct smr {
	struct ibv_mr mr;
	int rights;
	TAILQ_ENTRY(smr) link;
};

static TAILQ_HEAD(, scontext) contexts = TAILQ_HEAD_INITIALIZER(contexts);
static TAILQ_HEAD(, scq) cqs = TAILQ_HEAD_INITIALIZER(cqs);
static TAILQ_HEAD(, smr) mrs = TAILQ_HEAD_INITIALIZER(mrs);
static uint32_t last_number;
static struct sdevice devices[4];

bool stub_fails(const char *name, int error)
{
	if (++stub.calls != stub.fail_call)
		return false;
	stub.failed = name;
	errno = error;
	return true;
}

void *stub_made(size_t bytes)
{
	void *p = aligned_alloc(64, (bytes + 63) / 64 * 64);

	assert(p);
	memset(p, 0, bytes);
	stub.live++;
	return p;
}

void stub_unmade(void *p)
{
	assert(stub.live > 0);
	stub.live--;
	free(p);
}

uint32_t stub_number(void)
{
	return ++last_number;
}

void stub_reset(void)
{
	assert(stub.live == 0);
	stub = (struct stub){ .n_devices = 1, .ports = 1, .max_mr_size = UINT64_MAX, .reads = 16 };
}

void stub_fd_say(int fd, bool on)
{
	uint64_t v = 1;

	if (on)
		(void)!write(fd, &v, sizeof(v));
	else
		(void)!read(fd, &v, sizeof(v));
}

/* -------------------------------------------------------------------- devices */

struct ibv_device **ibv_get_device_list(int *n)
{
	struct ibv_device **list;

	*n = 0;
	if (FAILS(ENOSYS))
		return NULL;
	list = stub_made((stub.n_devices + 1) * sizeof(*list));
	for (uint32_t i = 0; i < stub.n_devices; i++) {
		snprintf(devices[i].device.name, sizeof(devices[i].device.name), "stub%u", i);
		list[i] = &devices[i].device;
	}
	*n = (int)stub.n_devices;
	return list;
}

void ibv_free_device_list(struct ibv_device **list)
{
	stub_unmade(list);
}

struct ibv_device *stub_device(uint32_t n)
{
	return &devices[n].device;
}

const char *ibv_get_device_name(struct ibv_device *device)
{
	return device->name;
}

static int poll_cq(struct ibv_cq *cq, int n, struct ibv_wc *wc);
static int req_notify_cq(struct ibv_cq *cq, int solicited);

struct ibv_context *ibv_open_device(struct ibv_device *device)
{
	struct scontext *c;

	if (FAILS(EACCES))
		return NULL;
	c = stub_made(sizeof(*c));
	c->c.device = device;
	c->index = (uint32_t)((struct sdevice *)device - devices);
	c->c.async_fd = eventfd(0, EFD_CLOEXEC | EFD_SEMAPHORE);
	c->c.ops.poll_cq = poll_cq;
	c->c.ops.req_notify_cq = req_notify_cq;
	c->c.ops.post_send = stub_post_send;
	c->c.ops.post_recv = stub_post_recv;
	TAILQ_INSERT_TAIL(&contexts, c, link);
	return &c->c;
}

int ibv_close_device(struct ibv_context *context)
{
	struct scontext *c = (struct scontext *)context;

	close(c->c.async_fd);
	TAILQ_REMOVE(&contexts, c, link);
	stub_unmade(c);
	return 0;
}

int ibv_query_device(struct ibv_context *context, struct ibv_device_attr *attr)
{
	int reads = stub.reads - (int)((struct scontext *)context)->index;

	if (FAILS(EIO))
		return EIO;
	*attr = (struct ibv_device_attr){ .phys_port_cnt = (uint8_t)stub.ports,
					  .max_mr_size = stub.max_mr_size,
					  .max_qp_rd_atom = reads,
					  .max_qp_init_rd_atom = reads };
	return 0;
}

#undef ibv_query_port
int ibv_query_port(struct ibv_context *context, uint8_t port, struct _compat_ibv_port_attr *out)
{
	struct ibv_port_attr *attr = (struct ibv_port_attr *)out;
	uint32_t d = ((struct scontext *)context)->index;

	if (FAILS(EIO))
		return EIO;
	attr->state = stub.port_down[d][port] ? IBV_PORT_DOWN : IBV_PORT_ACTIVE;
	attr->active_mtu = d ? IBV_MTU_1024 : IBV_MTU_4096;
	attr->lid = (uint16_t)(10 * d + port);
	attr->link_layer = stub.infiniband ? IBV_LINK_LAYER_INFINIBAND : IBV_LINK_LAYER_ETHERNET;
	return 0;
}

/* 10.0.DEVICE.PORT, and link-local IPv6 before it. */
static void make_gid(uint32_t device, uint32_t port, bool routed, uint8_t out[16])
{
	memset(out, 0, 16);
	if (routed) {
		out[10] = out[11] = 0xff;
		out[12] = 10;
		out[14] = (uint8_t)device;
	} else {
		out[0] = 0xfe;
		out[1] = 0x80;
	}
	out[15] = (uint8_t)port;
}

ssize_t _ibv_query_gid_table(struct ibv_context *context, struct ibv_gid_entry *entries, size_t max, uint32_t flags,
			     size_t entry_size)
{
	uint32_t d = ((struct scontext *)context)->index;
	ssize_t n = 0;

	(void)flags;
	assert(entry_size == sizeof(*entries) && max >= 3 * stub.ports);
	if (FAILS(EIO))
		return -EIO;
	for (uint32_t p = 1; p <= stub.ports; p++) {
		for (uint32_t k = 0; k < (stub.link_local ? 1 : 3); k++, n++) {
			entries[n] = (struct ibv_gid_entry){
				.gid_index = k + (k ? stub.gid_shift : 0),
				.port_num = p,
				.gid_type = k == 2 ? IBV_GID_TYPE_ROCE_V2 : IBV_GID_TYPE_ROCE_V1,
			};
			make_gid(d, p, k > 0, entries[n].gid.raw);
		}
	}
	return n;
}

bool stub_device_of_gid(const uint8_t gid[16], uint32_t *device, uint8_t *port)
{
	*device = gid[14];
	*port = gid[15];
	return gid[12] == 10 && *device < stub.n_devices && *port >= 1 && *port <= stub.ports;
}

/* --------------------------------------------------------------------- objects */

struct ibv_pd *ibv_alloc_pd(struct ibv_context *context)
{
	struct spd *pd;

	if (FAILS(ENOMEM))
		return NULL;
	pd = stub_made(sizeof(*pd));
	pd->pd.context = context;
	return &pd->pd;
}

int ibv_dealloc_pd(struct ibv_pd *p)
{
	assert(((struct spd *)p)->users == 0);
	stub_unmade(p);
	return 0;
}

static struct ibv_mr *reg(struct ibv_pd *pd, void *addr, size_t length, unsigned access)
{
	struct smr *m;

	assert(length <= stub.max_mr_size && !((uintptr_t)addr & 4095));
	/* Writing from afar needs the right to write at all. */
	assert(!(access & IBV_ACCESS_REMOTE_WRITE) || access & IBV_ACCESS_LOCAL_WRITE);
	m = stub_made(sizeof(*m));
	m->mr = (struct ibv_mr){ .context = pd->context, .pd = pd, .addr = addr, .length = length };
	m->mr.lkey = m->mr.rkey = stub_number() * 257;
	m->rights = (int)access;
	stub.relaxed_n += (access & IBV_ACCESS_RELAXED_ORDERING) != 0;
	((struct spd *)pd)->users++;
	TAILQ_INSERT_TAIL(&mrs, m, link);
	return &m->mr;
}

#undef ibv_reg_mr
struct ibv_mr *ibv_reg_mr(struct ibv_pd *pd, void *addr, size_t length, int access)
{
	return FAILS(ENOMEM) ? NULL : reg(pd, addr, length, (unsigned)access);
}

struct ibv_mr *ibv_reg_mr_iova2(struct ibv_pd *pd, void *addr, size_t length, uint64_t iova, unsigned access)
{
	assert(iova == (uintptr_t)addr);
	return FAILS(ENOMEM) ? NULL : reg(pd, addr, length, access);
}

int ibv_dereg_mr(struct ibv_mr *mr)
{
	((struct spd *)mr->pd)->users--;
	TAILQ_REMOVE(&mrs, (struct smr *)mr, link);
	stub_unmade(mr);
	return 0;
}

bool stub_allows(const struct ibv_pd *pd, uint32_t key, uint64_t at, uint64_t bytes, int right)
{
	struct smr *m;

	TAILQ_FOREACH(m, &mrs, link)
	if (m->mr.rkey == key && m->mr.pd == pd && (m->rights & right) == right && at >= (uintptr_t)m->mr.addr &&
	    bytes <= m->mr.length && at - (uintptr_t)m->mr.addr <= m->mr.length - bytes)
		return true;
	return false;
}

struct ibv_comp_channel *ibv_create_comp_channel(struct ibv_context *context)
{
	struct schannel *c;

	if (FAILS(EMFILE))
		return NULL;
	c = stub_made(sizeof(*c));
	c->c.context = context;
	c->c.fd = eventfd(0, EFD_CLOEXEC | EFD_SEMAPHORE);
	return &c->c;
}

int ibv_destroy_comp_channel(struct ibv_comp_channel *c)
{
	assert(((struct schannel *)c)->cqs == 0);
	close(c->fd);
	stub_unmade(c);
	return 0;
}

struct ibv_cq *ibv_create_cq(struct ibv_context *context, int cqe, void *cq_context, struct ibv_comp_channel *channel,
			     int vector)
{
	struct scq *cq;

	if (FAILS(ENOMEM))
		return NULL;
	assert(cqe <= (int)(RING * 4) && vector == 0);
	cq = stub_made(sizeof(*cq));
	cq->cq = (struct ibv_cq){ .context = context, .channel = channel, .cq_context = cq_context, .cqe = cqe };
	((struct schannel *)channel)->cqs++;
	TAILQ_INSERT_TAIL(&cqs, cq, link);
	return &cq->cq;
}

int ibv_destroy_cq(struct ibv_cq *cq)
{
	struct scq *s = (struct scq *)cq;

	/* It would wait for ever. */
	assert(s->qps == 0 && s->unacked == 0);
	if (s->event)
		stub_fd_say(cq->channel->fd, false);
	((struct schannel *)cq->channel)->cqs--;
	TAILQ_REMOVE(&cqs, s, link);
	stub_unmade(s);
	return 0;
}

void stub_push_wc(struct scq *cq, struct ibv_wc wc, bool solicited)
{
	/* An overrun is the end of a queue. */
	assert(cq->tail - cq->head < (uint32_t)cq->cq.cqe);
	cq->wc[cq->tail++ % (RING * 4)] = wc;
	/* A failure is always worth waking for. */
	if (!cq->armed && !(cq->armed_solicited && (solicited || wc.status != IBV_WC_SUCCESS)))
		return;
	cq->armed = cq->armed_solicited = false;
	if (cq->event)
		return;
	cq->event = true;
	stub.wakeups++;
	stub_fd_say(cq->cq.channel->fd, true);
}

static int req_notify_cq(struct ibv_cq *cq, int solicited)
{
	struct scq *s = (struct scq *)cq;

	if (FAILS(EIO))
		return EIO;
	/* Asking for less takes nothing back. */
	s->armed |= !solicited;
	s->armed_solicited |= solicited != 0;
	return 0;
}

int ibv_get_cq_event(struct ibv_comp_channel *channel, struct ibv_cq **cq, void **context)
{
	struct scq *s;

	assert(fcntl(channel->fd, F_GETFL) & O_NONBLOCK);
	TAILQ_FOREACH(s, &cqs, link)
	if (s->cq.channel == channel && s->event) {
		s->event = false;
		s->unacked++;
		stub_fd_say(channel->fd, false);
		*cq = &s->cq;
		*context = s->cq.cq_context;
		return 0;
	}
	errno = EAGAIN;
	return -1;
}

void ibv_ack_cq_events(struct ibv_cq *cq, unsigned n)
{
	assert(((struct scq *)cq)->unacked >= n);
	((struct scq *)cq)->unacked -= n;
}

static int poll_cq(struct ibv_cq *cq, int n, struct ibv_wc *wc)
{
	struct scq *s = (struct scq *)cq;
	int got = 0;

	if (FAILS(EIO))
		return -1;
	stub_step();
	while (got < n && s->head != s->tail)
		wc[got++] = s->wc[s->head++ % (RING * 4)];
	return got;
}

/* ------------------------------------------------------------ asynchronous events */

void stub_async_push(struct scontext *c, struct ibv_async_event ev)
{
	assert(c->n_events < 32);
	c->events[c->n_events++] = ev;
	stub_fd_say(c->c.async_fd, true);
}

int ibv_get_async_event(struct ibv_context *context, struct ibv_async_event *ev)
{
	struct scontext *c = (struct scontext *)(context);

	assert(fcntl(context->async_fd, F_GETFL) & O_NONBLOCK);
	if (c->n_events == 0) {
		errno = EAGAIN;
		return -1;
	}
	*ev = c->events[0];
	memmove(c->events, c->events + 1, --c->n_events * sizeof(*ev));
	stub_fd_say(context->async_fd, false);
	c->taken++;
	return 0;
}

void ibv_ack_async_event(struct ibv_async_event *ev)
{
	(void)ev;
}

static void event_all(uint32_t device, struct ibv_async_event ev)
{
	struct scontext *c;

	TAILQ_FOREACH(c, &contexts, link)
	if (c->index == device)
		stub_async_push(c, ev);
}

void stub_port_event(uint32_t device, uint8_t port, enum ibv_event_type type)
{
	stub.port_down[device][port] = type == IBV_EVENT_PORT_ERR;
	event_all(device, (struct ibv_async_event){ .event_type = type, .element.port_num = port });
}

void stub_device_event(uint32_t device, enum ibv_event_type type)
{
	event_all(device, (struct ibv_async_event){ .event_type = type });
}
