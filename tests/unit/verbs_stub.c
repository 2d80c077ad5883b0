/* SPDX-License-Identifier: Apache-2.0 */
#include "verbs_stub.h"

#include <arpa/inet.h>
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <rdma/rdma_cma.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/queue.h>
#include <unistd.h>

#define RING 1024

struct stub stub = { .n_devices = 1, .ports = 1, .max_mr_size = UINT64_MAX, .reads = 16 };

struct sdevice {
	struct ibv_device device;
};

struct scontext {
	struct ibv_context c;
	uint32_t index;
	struct ibv_async_event events[32];
	uint32_t n_events, taken;
	TAILQ_ENTRY(scontext) link;
};

struct schannel {
	struct ibv_comp_channel c;
	uint32_t cqs;
};

struct scq {
	struct ibv_cq cq;
	struct ibv_wc wc[RING * 4];
	uint32_t head, tail;
	bool armed, event;
	uint32_t unacked, qps;
	TAILQ_ENTRY(scq) link;
};

struct spd {
	struct ibv_pd pd;
	uint32_t users;
};

struct smr {
	struct ibv_mr mr;
	int rights;
	TAILQ_ENTRY(smr) link;
};

struct swr {
	struct ibv_send_wr wr;
	struct ibv_sge sge;
	uint8_t inlined[64];
};

struct sqp {
	struct ibv_qp qp;
	struct ibv_qp_init_attr init;
	struct ibv_qp_attr a;
	struct swr sq[RING];
	uint64_t rq[RING];
	uint32_t sq_head, sq_tail, rq_head, rq_tail;
	bool lost;
	TAILQ_ENTRY(sqp) link;
};

struct sid {
	struct rdma_cm_id id;
	struct sid *peer;
	bool listens, connected;
	uint16_t port;
	uint32_t qpn, peer_qpn;
	uint8_t sgid[16], dgid[16];
	uint8_t reads_in, reads_out;
	uint32_t unacked;
	TAILQ_ENTRY(sid) link;
};

struct sevent {
	struct rdma_cm_event ev;
	uint8_t data[256];
	struct sid *owner; /* whose channel, and who may not be destroyed before it is acknowledged */
	bool taken;
	TAILQ_ENTRY(sevent) link;
};

static TAILQ_HEAD(, scontext) contexts = TAILQ_HEAD_INITIALIZER(contexts);
static TAILQ_HEAD(, scq) cqs = TAILQ_HEAD_INITIALIZER(cqs);
static TAILQ_HEAD(, smr) mrs = TAILQ_HEAD_INITIALIZER(mrs);
static TAILQ_HEAD(, sqp) qps = TAILQ_HEAD_INITIALIZER(qps);
static TAILQ_HEAD(, sid) ids = TAILQ_HEAD_INITIALIZER(ids);
static TAILQ_HEAD(, sevent) events = TAILQ_HEAD_INITIALIZER(events);
static uint32_t next_number = 1;
static uint16_t next_port = 5000;
static struct sdevice devices[4];
static struct ibv_context cm_context[4];

/* The n-th call that can fail does. */
static bool fails(const char *name, int error)
{
	if (++stub.calls != stub.fail_call)
		return false;
	stub.failed = name;
	errno = error;
	return true;
}
#define FAILS(error) fails(__func__, error)

static void *made(size_t bytes)
{
	void *p = aligned_alloc(64, (bytes + 63) / 64 * 64);

	assert(p);
	memset(p, 0, bytes);
	stub.live++;
	return p;
}

static void unmade(void *p)
{
	assert(stub.live > 0);
	stub.live--;
	free(p);
}

void stub_reset(void)
{
	assert(stub.live == 0);
	stub = (struct stub){ .n_devices = 1, .ports = 1, .max_mr_size = UINT64_MAX, .reads = 16 };
}

/* A readable eventfd while there is something. */
static void fd_say(int fd, bool on)
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
	list = made((stub.n_devices + 1) * sizeof(*list));
	for (uint32_t i = 0; i < stub.n_devices; i++) {
		snprintf(devices[i].device.name, sizeof(devices[i].device.name), "stub%u", i);
		list[i] = &devices[i].device;
	}
	*n = (int)stub.n_devices;
	return list;
}

void ibv_free_device_list(struct ibv_device **list)
{
	unmade(list);
}

const char *ibv_get_device_name(struct ibv_device *device)
{
	return device->name;
}

static int poll_cq(struct ibv_cq *cq, int n, struct ibv_wc *wc);
static int req_notify_cq(struct ibv_cq *cq, int solicited);
static int post_send(struct ibv_qp *qp, struct ibv_send_wr *wr, struct ibv_send_wr **bad);
static int post_recv(struct ibv_qp *qp, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad);

struct ibv_context *ibv_open_device(struct ibv_device *device)
{
	struct scontext *c;

	if (FAILS(EACCES))
		return NULL;
	c = made(sizeof(*c));
	c->c.device = device;
	c->index = (uint32_t)((struct sdevice *)device - devices);
	c->c.async_fd = eventfd(0, EFD_CLOEXEC | EFD_SEMAPHORE);
	c->c.ops.poll_cq = poll_cq;
	c->c.ops.req_notify_cq = req_notify_cq;
	c->c.ops.post_send = post_send;
	c->c.ops.post_recv = post_recv;
	TAILQ_INSERT_TAIL(&contexts, c, link);
	return &c->c;
}

int ibv_close_device(struct ibv_context *context)
{
	struct scontext *c = (struct scontext *)context;

	close(c->c.async_fd);
	TAILQ_REMOVE(&contexts, c, link);
	unmade(c);
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

static bool device_of_gid(const uint8_t gid[16], uint32_t *device, uint8_t *port)
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
	pd = made(sizeof(*pd));
	pd->pd.context = context;
	return &pd->pd;
}

int ibv_dealloc_pd(struct ibv_pd *p)
{
	assert(((struct spd *)p)->users == 0);
	unmade(p);
	return 0;
}

static struct ibv_mr *reg(struct ibv_pd *pd, void *addr, size_t length, unsigned access)
{
	struct smr *m;

	assert(length <= stub.max_mr_size && !((uintptr_t)addr & 4095));
	/* Writing from afar needs the right to write at all. */
	assert(!(access & IBV_ACCESS_REMOTE_WRITE) || access & IBV_ACCESS_LOCAL_WRITE);
	m = made(sizeof(*m));
	m->mr = (struct ibv_mr){ .context = pd->context, .pd = pd, .addr = addr, .length = length };
	m->mr.lkey = m->mr.rkey = next_number++ * 257;
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
	unmade(mr);
	return 0;
}

struct ibv_comp_channel *ibv_create_comp_channel(struct ibv_context *context)
{
	struct schannel *c;

	if (FAILS(EMFILE))
		return NULL;
	c = made(sizeof(*c));
	c->c.context = context;
	c->c.fd = eventfd(0, EFD_CLOEXEC | EFD_SEMAPHORE);
	return &c->c;
}

int ibv_destroy_comp_channel(struct ibv_comp_channel *c)
{
	assert(((struct schannel *)c)->cqs == 0);
	close(c->fd);
	unmade(c);
	return 0;
}

struct ibv_cq *ibv_create_cq(struct ibv_context *context, int cqe, void *cq_context, struct ibv_comp_channel *channel,
			     int vector)
{
	struct scq *cq;

	if (FAILS(ENOMEM))
		return NULL;
	assert(cqe <= (int)(RING * 4) && vector == 0);
	cq = made(sizeof(*cq));
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
		fd_say(cq->channel->fd, false);
	((struct schannel *)cq->channel)->cqs--;
	TAILQ_REMOVE(&cqs, s, link);
	unmade(s);
	return 0;
}

static void push_wc(struct scq *cq, struct ibv_wc wc)
{
	/* An overrun is the end of a queue. */
	assert(cq->tail - cq->head < (uint32_t)cq->cq.cqe);
	cq->wc[cq->tail++ % (RING * 4)] = wc;
	if (!cq->armed)
		return;
	cq->armed = false;
	if (!cq->event)
		fd_say(cq->cq.channel->fd, true);
	cq->event = true;
}

static int req_notify_cq(struct ibv_cq *cq, int solicited)
{
	assert(!solicited);
	if (FAILS(EIO))
		return EIO;
	((struct scq *)cq)->armed = true;
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
		fd_say(channel->fd, false);
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

/* ----------------------------------------------------------------- queue pairs */

struct ibv_qp *ibv_create_qp(struct ibv_pd *pd, struct ibv_qp_init_attr *init)
{
	struct sqp *q;

	if (FAILS(ENOMEM))
		return NULL;
	assert(init->qp_type == IBV_QPT_RC && init->cap.max_send_wr <= RING && init->cap.max_recv_wr <= RING);
	q = made(sizeof(*q));
	q->init = *init;
	q->qp = (struct ibv_qp){ .context = pd->context,
				 .qp_context = init->qp_context,
				 .pd = pd,
				 .send_cq = init->send_cq,
				 .recv_cq = init->recv_cq,
				 .qp_num = next_number++ };
	((struct scq *)init->send_cq)->qps++;
	((struct spd *)pd)->users++;
	TAILQ_INSERT_TAIL(&qps, q, link);
	return &q->qp;
}

/* Events of it that nobody took go with it. */
static void events_drop(struct scontext *c, const struct ibv_qp *qp)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < c->n_events; i++) {
		if (c->events[i].event_type == IBV_EVENT_QP_ACCESS_ERR && c->events[i].element.qp == qp)
			fd_say(c->c.async_fd, false);
		else
			c->events[n++] = c->events[i];
	}
	c->n_events = n;
}

int ibv_destroy_qp(struct ibv_qp *qp)
{
	struct sqp *q = (struct sqp *)qp;

	events_drop((struct scontext *)qp->context, qp);
	((struct scq *)qp->send_cq)->qps--;
	((struct spd *)qp->pd)->users--;
	TAILQ_REMOVE(&qps, q, link);
	unmade(q);
	return 0;
}

static void flush(struct sqp *q)
{
	struct scq *cq = (struct scq *)q->qp.send_cq;

	for (; q->sq_head != q->sq_tail; q->sq_head++)
		push_wc(cq,
			(struct ibv_wc){ .wr_id = q->sq[q->sq_head % RING].wr.wr_id, .status = IBV_WC_WR_FLUSH_ERR });
	for (; q->rq_head != q->rq_tail && !stub.no_flush_receives; q->rq_head++)
		push_wc(cq, (struct ibv_wc){ .wr_id = q->rq[q->rq_head % RING], .status = IBV_WC_WR_FLUSH_ERR });
}

static void to_error(struct sqp *q)
{
	q->qp.state = q->a.qp_state = IBV_QPS_ERR;
	q->lost = false;
	flush(q);
}

/* What each transition needs, as the specification says for RC. */
static int needed(enum ibv_qp_state from, enum ibv_qp_state to)
{
	if (from == IBV_QPS_RESET && to == IBV_QPS_INIT)
		return IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS;
	if (from == IBV_QPS_INIT && to == IBV_QPS_RTR)
		return IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC |
		       IBV_QP_MIN_RNR_TIMER;
	if (from == IBV_QPS_RTR && to == IBV_QPS_RTS)
		return IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC;
	return -1;
}

int ibv_modify_qp(struct ibv_qp *qp, struct ibv_qp_attr *a, int mask)
{
	struct sqp *q = (struct sqp *)qp;

	assert(mask & IBV_QP_STATE);
	if (a->qp_state == IBV_QPS_ERR) {
		if (qp->state == IBV_QPS_RESET)
			return EINVAL;
		to_error(q);
		return 0;
	}
	if (FAILS(EINVAL))
		return EINVAL;
	assert((mask & ~IBV_QP_STATE) == needed(qp->state, a->qp_state));
	if (mask & IBV_QP_ACCESS_FLAGS)
		q->a.qp_access_flags = a->qp_access_flags;
	if (mask & IBV_QP_DEST_QPN)
		q->a.dest_qp_num = a->dest_qp_num;
	if (mask & IBV_QP_RQ_PSN)
		q->a.rq_psn = a->rq_psn;
	if (mask & IBV_QP_SQ_PSN)
		q->a.sq_psn = a->sq_psn;
	if (mask & IBV_QP_PATH_MTU)
		q->a.path_mtu = a->path_mtu;
	if (mask & IBV_QP_MAX_DEST_RD_ATOMIC)
		q->a.max_dest_rd_atomic = a->max_dest_rd_atomic;
	if (mask & IBV_QP_MAX_QP_RD_ATOMIC)
		stub.rd_atomic = q->a.max_rd_atomic = a->max_rd_atomic;
	if (mask & IBV_QP_AV)
		q->a.ah_attr = a->ah_attr;
	q->qp.state = q->a.qp_state = a->qp_state;
	return 0;
}

int ibv_query_qp(struct ibv_qp *qp, struct ibv_qp_attr *a, int mask, struct ibv_qp_init_attr *init)
{
	(void)mask;
	if (FAILS(EIO))
		return EIO;
	*a = ((struct sqp *)qp)->a;
	*init = ((struct sqp *)qp)->init;
	return 0;
}

static bool take_wr(struct sqp *q, const struct ibv_send_wr *wr)
{
	struct swr *s = &q->sq[q->sq_tail % RING];

	if (q->sq_tail - q->sq_head == q->init.cap.max_send_wr)
		return false;
	assert(wr->num_sge == 1);
	s->wr = *wr;
	s->sge = wr->sg_list[0];
	if (wr->send_flags & IBV_SEND_INLINE) {
		assert(s->sge.length <= q->init.cap.max_inline_data && s->sge.length <= sizeof(s->inlined));
		memcpy(s->inlined, (const void *)(uintptr_t)s->sge.addr, s->sge.length);
		stub.inline_n++;
	}
	q->sq_tail++;
	return true;
}

static int post_send(struct ibv_qp *qp, struct ibv_send_wr *wr, struct ibv_send_wr **bad)
{
	struct sqp *q = (struct sqp *)qp;
	uint32_t n = 0;

	stub.posts++;
	*bad = wr;
	if (FAILS(ENOMEM))
		return ENOMEM;
	assert(qp->state == IBV_QPS_RTS || qp->state == IBV_QPS_ERR);
	for (; wr; wr = wr->next, n++) {
		*bad = wr;
		assert(wr->next || wr->send_flags & IBV_SEND_SIGNALED);
		if (!wr->next && stub.posts == stub.fail_post)
			return ENOMEM;
		if (!take_wr(q, wr))
			return ENOMEM;
	}
	if (n > stub.chain_max)
		stub.chain_max = n;
	if (qp->state == IBV_QPS_ERR)
		flush(q);
	return 0;
}

static int post_recv(struct ibv_qp *qp, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad)
{
	struct sqp *q = (struct sqp *)qp;

	*bad = wr;
	if (FAILS(ENOMEM))
		return ENOMEM;
	assert(qp->state != IBV_QPS_RESET);
	for (; wr; wr = wr->next) {
		assert(q->rq_tail - q->rq_head < q->init.cap.max_recv_wr);
		q->rq[q->rq_tail++ % RING] = wr->wr_id;
	}
	if (qp->state == IBV_QPS_ERR)
		flush(q);
	return 0;
}

struct ibv_qp *stub_qp(uint32_t n)
{
	struct sqp *q;

	TAILQ_FOREACH(q, &qps, link)
	if (n-- == 0)
		return &q->qp;
	return NULL;
}

uint32_t stub_qps(void)
{
	struct sqp *q;
	uint32_t n = 0;

	TAILQ_FOREACH(q, &qps, link)
	n++;
	return n;
}

uint32_t stub_waiting(void)
{
	struct sqp *q;
	uint32_t n = 0;

	TAILQ_FOREACH(q, &qps, link)
	n += q->sq_tail - q->sq_head;
	return n;
}

/* -------------------------------------------------------------------- transport */

static const struct smr *find_mr(const struct ibv_pd *pd, uint32_t key, uint64_t at, uint64_t bytes, int right)
{
	struct smr *m;

	TAILQ_FOREACH(m, &mrs, link)
	if (m->mr.rkey == key && m->mr.pd == pd && (m->rights & right) == right && at >= (uintptr_t)m->mr.addr &&
	    bytes <= m->mr.length && at - (uintptr_t)m->mr.addr <= m->mr.length - bytes)
		return m;
	return NULL;
}

static void async_push(struct scontext *c, struct ibv_async_event ev)
{
	assert(c->n_events < 32);
	c->events[c->n_events++] = ev;
	fd_say(c->c.async_fd, true);
}

static struct sqp *peer_of(const struct sqp *q)
{
	struct sqp *p;
	uint32_t d;
	uint8_t port;

	if (q->a.ah_attr.is_global && (!device_of_gid(q->a.ah_attr.grh.dgid.raw, &d, &port) || stub.port_down[d][port]))
		return NULL;
	TAILQ_FOREACH(p, &qps, link)
	if (p->qp.qp_num == q->a.dest_qp_num)
		return (p->qp.state == IBV_QPS_RTR || p->qp.state == IBV_QPS_RTS) && p->a.dest_qp_num == q->qp.qp_num &&
				       p->a.rq_psn == q->a.sq_psn
			       ? p
			       : NULL;
	return NULL;
}

/* The peer has tried what it may not. */
static enum ibv_wc_status violated(struct sqp *peer)
{
	to_error(peer);
	if (!stub.quiet_access)
		async_push((struct scontext *)(peer->qp.context),
			   (struct ibv_async_event){ .event_type = IBV_EVENT_QP_ACCESS_ERR, .element.qp = &peer->qp });
	return IBV_WC_REM_ACCESS_ERR;
}

/* IBV_WC_RNR_RETRY_EXC_ERR: it has to wait. */
static enum ibv_wc_status execute(struct sqp *q, struct swr *s)
{
	bool read = s->wr.opcode == IBV_WR_RDMA_READ;
	bool imm = s->wr.opcode == IBV_WR_RDMA_WRITE_WITH_IMM;
	int near_right = read ? IBV_ACCESS_LOCAL_WRITE : 0;
	int far_right = read ? IBV_ACCESS_REMOTE_READ : IBV_ACCESS_REMOTE_WRITE;
	void *far = (void *)(uintptr_t)s->wr.wr.rdma.remote_addr, *near = (void *)(uintptr_t)s->sge.addr;
	struct sqp *peer = peer_of(q);

	if (!peer)
		return IBV_WC_RETRY_EXC_ERR;
	if (s->wr.send_flags & IBV_SEND_INLINE)
		near = s->inlined;
	else if (!find_mr(q->qp.pd, s->sge.lkey, s->sge.addr, s->sge.length, near_right))
		return IBV_WC_LOC_PROT_ERR;
	if (read && (q->a.max_rd_atomic == 0 || peer->a.max_dest_rd_atomic < q->a.max_rd_atomic))
		return IBV_WC_REM_INV_REQ_ERR;
	if (!(peer->a.qp_access_flags & (unsigned)far_right) ||
	    !find_mr(peer->qp.pd, s->wr.wr.rdma.rkey, s->wr.wr.rdma.remote_addr, s->sge.length, far_right))
		return violated(peer);
	if (imm && peer->rq_head == peer->rq_tail)
		return IBV_WC_RNR_RETRY_EXC_ERR;
	memcpy(read ? near : far, read ? far : near, s->sge.length);
	if (imm)
		push_wc((struct scq *)peer->qp.recv_cq, (struct ibv_wc){ .wr_id = peer->rq[peer->rq_head++ % RING],
									 .status = IBV_WC_SUCCESS,
									 .opcode = IBV_WC_RECV_RDMA_WITH_IMM,
									 .wc_flags = IBV_WC_WITH_IMM,
									 .imm_data = s->wr.imm_data });
	return IBV_WC_SUCCESS;
}

/* False: nothing to do, or it has to wait. */
static bool step_one(struct sqp *q)
{
	struct swr *s = &q->sq[q->sq_head % RING];
	enum ibv_wc_status status;

	if (q->qp.state != IBV_QPS_RTS || q->sq_head == q->sq_tail || q->lost)
		return false;
	if (stub.wr_done + 1 == stub.lose_wr) {
		stub.wr_done++;
		q->lost = true;
		return false;
	}
	status = stub.wr_done + 1 == stub.fail_wr ? stub.fail_status : execute(q, s);
	if (status == IBV_WC_RNR_RETRY_EXC_ERR && stub.wr_done + 1 != stub.fail_wr)
		return false;
	stub.wr_done++;
	q->sq_head++;
	if (status != IBV_WC_SUCCESS || s->wr.send_flags & IBV_SEND_SIGNALED)
		push_wc((struct scq *)q->qp.send_cq, (struct ibv_wc){ .wr_id = s->wr.wr_id, .status = status });
	if (status != IBV_WC_SUCCESS)
		to_error(q);
	return true;
}

void stub_step(void)
{
	struct sqp *q;

	if (stub.hold)
		return;
	TAILQ_FOREACH(q, &qps, link)
	while (step_one(q))
		;
}

/* ------------------------------------------------------------ asynchronous events */

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
	fd_say(context->async_fd, false);
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
		async_push(c, ev);
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

/* --------------------------------------------------------------------------- cm */

struct rdma_event_channel *rdma_create_event_channel(void)
{
	struct rdma_event_channel *c;

	if (FAILS(ENODEV))
		return NULL;
	if (stub.no_cm) {
		errno = ENODEV;
		return NULL;
	}
	c = made(sizeof(*c));
	c->fd = eventfd(0, EFD_CLOEXEC | EFD_SEMAPHORE);
	return c;
}

void rdma_destroy_event_channel(struct rdma_event_channel *c)
{
	struct sid *i;

	TAILQ_FOREACH(i, &ids, link)
	assert(i->id.channel != c);
	close(c->fd);
	unmade(c);
}

static struct sid *id_new(struct rdma_event_channel *channel, void *context)
{
	struct sid *i = made(sizeof(*i));

	i->id.channel = channel;
	i->id.context = context;
	TAILQ_INSERT_TAIL(&ids, i, link);
	return i;
}

int rdma_create_id(struct rdma_event_channel *channel, struct rdma_cm_id **id, void *context, enum rdma_port_space ps)
{
	assert(ps == RDMA_PS_TCP);
	if (FAILS(ENOMEM))
		return -1;
	*id = &id_new(channel, context)->id;
	return 0;
}

static void event_free(struct sevent *e)
{
	TAILQ_REMOVE(&events, e, link);
	unmade(e);
}

int rdma_destroy_id(struct rdma_cm_id *id)
{
	struct sid *i = (struct sid *)id;
	struct sevent *e, *next;

	/* It would wait for ever. */
	assert(i->unacked == 0);
	for (e = TAILQ_FIRST(&events); e; e = next) {
		next = TAILQ_NEXT(e, link);
		if (e->owner != i || e->taken)
			continue;
		fd_say(id->channel->fd, false);
		/* A request that nobody took goes with the listener. */
		if (e->ev.id != id)
			rdma_destroy_id(e->ev.id);
		event_free(e);
	}
	if (i->peer)
		i->peer->peer = NULL;
	TAILQ_REMOVE(&ids, i, link);
	unmade(i);
	return 0;
}

static void tell(struct sid *owner, struct sid *about, enum rdma_cm_event_type type, int status, const void *data,
		 uint8_t bytes)
{
	struct sevent *e = made(sizeof(*e));

	e->owner = owner;
	e->ev.id = &about->id;
	e->ev.event = type;
	e->ev.status = status;
	if (bytes)
		memcpy(e->data, data, bytes);
	e->ev.param.conn.private_data = e->data;
	e->ev.param.conn.private_data_len = bytes;
	if (about->peer) {
		e->ev.param.conn.responder_resources = about->peer->reads_out;
		e->ev.param.conn.initiator_depth = about->peer->reads_in;
	}
	TAILQ_INSERT_TAIL(&events, e, link);
	fd_say(owner->id.channel->fd, true);
}

int rdma_get_cm_event(struct rdma_event_channel *channel, struct rdma_cm_event **ev)
{
	struct sevent *e;

	assert(fcntl(channel->fd, F_GETFL) & O_NONBLOCK);
	TAILQ_FOREACH(e, &events, link)
	if (e->owner->id.channel == channel && !e->taken) {
		e->taken = true;
		e->owner->unacked++;
		fd_say(channel->fd, false);
		*ev = &e->ev;
		return 0;
	}
	errno = EAGAIN;
	return -1;
}

int rdma_ack_cm_event(struct rdma_cm_event *ev)
{
	struct sevent *e = (struct sevent *)ev;

	assert(e->taken && e->owner->unacked > 0);
	e->owner->unacked--;
	event_free(e);
	return 0;
}

int rdma_bind_addr(struct rdma_cm_id *id, struct sockaddr *addr)
{
	(void)addr;
	if (FAILS(EADDRNOTAVAIL))
		return -1;
	((struct sid *)id)->port = next_port++;
	return 0;
}

int rdma_listen(struct rdma_cm_id *id, int backlog)
{
	assert(backlog > 0);
	if (FAILS(EADDRINUSE))
		return -1;
	((struct sid *)id)->listens = true;
	return 0;
}

__be16 rdma_get_src_port(struct rdma_cm_id *id)
{
	return htons(((struct sid *)id)->port);
}

int rdma_set_option(struct rdma_cm_id *id, int level, int optname, void *optval, size_t optlen)
{
	(void)id;
	assert(level == RDMA_OPTION_ID && optname == RDMA_OPTION_ID_TOS && optval && optlen == 1);
	return FAILS(EINVAL) ? -1 : 0;
}

static void v4_gid(const struct sockaddr *a, uint8_t out[16])
{
	assert(a->sa_family == AF_INET);
	memset(out, 0, 16);
	out[10] = out[11] = 0xff;
	memcpy(out + 12, &((const struct sockaddr_in *)a)->sin_addr, 4);
}

int rdma_resolve_addr(struct rdma_cm_id *id, struct sockaddr *src, struct sockaddr *dst, int timeout_ms)
{
	struct sid *i = (struct sid *)id;
	uint32_t d;
	uint8_t port;

	assert(timeout_ms > 0);
	if (FAILS(EINVAL))
		return -1;
	v4_gid(src, i->sgid);
	v4_gid(dst, i->dgid);
	i->port = ntohs(((struct sockaddr_in *)dst)->sin_port);
	/* An event that fails instead of the call. */
	if (FAILS(0) || !device_of_gid(i->sgid, &d, &port) || stub.port_down[d][port]) {
		tell(i, i, RDMA_CM_EVENT_ADDR_ERROR, -ENODEV, NULL, 0);
		return 0;
	}
	cm_context[d].device = &devices[d].device;
	id->verbs = &cm_context[d];
	id->port_num = port;
	tell(i, i, RDMA_CM_EVENT_ADDR_RESOLVED, 0, NULL, 0);
	return 0;
}

int rdma_resolve_route(struct rdma_cm_id *id, int timeout_ms)
{
	struct sid *i = (struct sid *)id;

	assert(timeout_ms > 0);
	if (FAILS(EINVAL))
		return -1;
	tell(i, i, FAILS(0) ? RDMA_CM_EVENT_ROUTE_ERROR : RDMA_CM_EVENT_ROUTE_RESOLVED, 0, NULL, 0);
	return 0;
}

int rdma_connect(struct rdma_cm_id *id, struct rdma_conn_param *p)
{
	struct sid *i = (struct sid *)id, *l, *server;

	assert(p->private_data_len <= 56);
	if (FAILS(EINVAL))
		return -1;
	i->qpn = p->qp_num;
	i->reads_in = p->responder_resources;
	i->reads_out = p->initiator_depth;
	TAILQ_FOREACH(l, &ids, link)
	if (l->listens && l->port == i->port)
		break;
	if (FAILS(0) || !l) {
		tell(i, i, RDMA_CM_EVENT_UNREACHABLE, -ETIMEDOUT, NULL, 0);
		return 0;
	}
	server = id_new(l->id.channel, l->id.context);
	memcpy(server->sgid, i->dgid, 16);
	memcpy(server->dgid, i->sgid, 16);
	server->peer = i;
	server->peer_qpn = i->qpn;
	i->peer = server;
	tell(l, server, RDMA_CM_EVENT_CONNECT_REQUEST, 0, p->private_data, p->private_data_len);
	return 0;
}

int rdma_accept(struct rdma_cm_id *id, struct rdma_conn_param *p)
{
	struct sid *i = (struct sid *)id;

	if (FAILS(EINVAL) || !i->peer) {
		errno = EINVAL;
		return -1;
	}
	i->qpn = p->qp_num;
	i->reads_in = p->responder_resources;
	i->reads_out = p->initiator_depth;
	i->peer->peer_qpn = i->qpn;
	tell(i->peer, i->peer, RDMA_CM_EVENT_CONNECT_RESPONSE, 0, NULL, 0);
	return 0;
}

int rdma_reject(struct rdma_cm_id *id, const void *data, uint8_t bytes)
{
	struct sid *i = (struct sid *)id;

	if (i->peer)
		tell(i->peer, i->peer, RDMA_CM_EVENT_REJECTED, 28, data, bytes);
	return 0;
}

int rdma_establish(struct rdma_cm_id *id)
{
	struct sid *i = (struct sid *)id;

	if (FAILS(EINVAL) || !i->peer) {
		errno = EINVAL;
		return -1;
	}
	i->connected = i->peer->connected = true;
	tell(i->peer, i->peer, RDMA_CM_EVENT_ESTABLISHED, 0, NULL, 0);
	return 0;
}

int rdma_disconnect(struct rdma_cm_id *id)
{
	struct sid *i = (struct sid *)id;

	if (!i->connected) {
		errno = EINVAL;
		return -1;
	}
	i->connected = false;
	if (i->peer && i->peer->connected) {
		i->peer->connected = false;
		tell(i->peer, i->peer, RDMA_CM_EVENT_DISCONNECTED, 0, NULL, 0);
	}
	return 0;
}

int rdma_init_qp_attr(struct rdma_cm_id *id, struct ibv_qp_attr *a, int *mask)
{
	struct sid *i = (struct sid *)id;

	if (FAILS(EINVAL))
		return -1;
	*mask = IBV_QP_STATE;
	switch (a->qp_state) {
	case IBV_QPS_INIT:
		*mask |= needed(IBV_QPS_RESET, IBV_QPS_INIT);
		break;
	case IBV_QPS_RTR:
		*mask |= needed(IBV_QPS_INIT, IBV_QPS_RTR);
		a->dest_qp_num = i->peer_qpn;
		a->path_mtu = IBV_MTU_1024;
		a->ah_attr.is_global = 1;
		memcpy(a->ah_attr.grh.dgid.raw, i->dgid, 16);
		break;
	case IBV_QPS_RTS:
		*mask |= needed(IBV_QPS_RTR, IBV_QPS_RTS);
		break;
	default:
		abort();
	}
	return 0;
}
