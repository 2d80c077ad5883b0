/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How a rail is agreed on over librdmacm: it finds GID, VLAN and MTU by the
 * routing table, which knows more than we do. One id a queue pair, since cm
 * connects one at a time; the queue pairs are our own, in our own protection
 * domains, and only their attributes come from cm.
 *
 *   connecting side                     accepting side
 *   resolve address, resolve route
 *   connect, hello as private data -->  CONNECT_REQUEST: whose is the secret?
 *                                       to RTS, accept
 *   CONNECT_RESPONSE: to RTS       <--
 *   establish                      -->  ESTABLISHED
 *
 * When all ids of a rail are through, it is up. Nothing here blocks: all answers
 * are events of one channel. An id lives as long as its queue pair; a request
 * that is of no use is rejected with one byte that says whether to come again.
 */
#include "rdma/verbs/verbs.h"

#include <errno.h>
#include <fcntl.h>

#define BACKLOG 1024
#define STEP_MS 2000

#define REJECTED_NO_LISTENER 8 /* of the InfiniBand CM: invalid service id; who listened is gone */

enum rejection { REJECT_LATER = 1, REJECT_GONE };

/* ------------------------------------------------------------------ listening */

static int listen_on(struct fab *f, sa_family_t family)
{
	struct sockaddr_storage any = { .ss_family = family };

	if (rdma_create_id(f->cm, &f->listener, f, RDMA_PS_TCP))
		return -errno;
	if (!rdma_bind_addr(f->listener, (struct sockaddr *)&any) && !rdma_listen(f->listener, BACKLOG)) {
		f->cm_port = ntohs(rdma_get_src_port(f->listener));
		return 0;
	}
	rdma_destroy_id(f->listener);
	f->listener = NULL;
	return -EADDRNOTAVAIL;
}

int vb_cm_open(struct fab *f)
{
	int flags, ret;

	errno = 0;
	f->cm = rdma_create_event_channel();
	if (!f->cm)
		return errno ? -errno : -ENODEV;
	flags = fcntl(f->cm->fd, F_GETFL);
	ret = flags < 0 || fcntl(f->cm->fd, F_SETFL, flags | O_NONBLOCK) ? -errno : 0;
	if (!ret)
		ret = vb_watch(f, f->cm->fd, &f->cm);
	/* An IPv6 socket takes both. */
	if (!ret && listen_on(f, AF_INET6))
		ret = listen_on(f, AF_INET);
	if (ret)
		vb_cm_close(f);
	return ret;
}

void vb_cm_close(struct fab *f)
{
	if (f->listener)
		rdma_destroy_id(f->listener);
	if (f->cm)
		rdma_destroy_event_channel(f->cm);
	f->listener = NULL;
	f->cm = NULL;
	f->cm_port = 0;
}

/* ----------------------------------------------------------- connecting side */

static int dial_one(struct vb_qp *q)
{
	struct vb_rail *r = q->rail;
	struct fab *f = r->ep->fab;
	struct sockaddr_storage from, to;
	uint8_t tos = (uint8_t)f->o.traffic_class;

	vb_port_sockaddr(&r->port->desc, 0, &from);
	vb_port_sockaddr(&r->remote, r->ep->cm_port, &to);
	if (rdma_create_id(f->cm, &q->id, q, RDMA_PS_TCP)) {
		q->id = NULL;
		return -errno;
	}
	if (tos && rdma_set_option(q->id, RDMA_OPTION_ID, RDMA_OPTION_ID_TOS, &tos, sizeof(tos)))
		return -errno;
	return rdma_resolve_addr(q->id, (struct sockaddr *)&from, (struct sockaddr *)&to, STEP_MS) ? -errno : 0;
}

int vb_cm_dial(struct vb_rail *r)
{
	int ret = 0;

	if (!r->ep->cm_port || !r->port->desc.has_ip || !r->remote.has_ip)
		return -EADDRNOTAVAIL;
	for (uint32_t i = 0; i < r->n_qps && !ret; i++)
		ret = dial_one(&r->qp[i]);
	return ret;
}

void vb_cm_hang_up(struct vb_qp *q)
{
	/* Of no effect where it never came to a connection. */
	(void)rdma_disconnect(q->id);
	rdma_destroy_id(q->id);
	q->id = NULL;
}

static int on_address(struct vb_qp *q)
{
	const struct vb_port *p = q->rail->port;

	if (!q->id->verbs || strcmp(ibv_get_device_name(q->id->verbs->device), p->dev->name) ||
	    q->id->port_num != p->num)
		return -EXDEV;
	return rdma_resolve_route(q->id, STEP_MS) ? -errno : 0;
}

static struct rdma_conn_param parameters(const struct vb_qp *q, uint8_t reads_in, uint8_t reads_out)
{
	return (struct rdma_conn_param){ .responder_resources = reads_in,
					 .initiator_depth = reads_out,
					 .retry_count = 7,
					 .rnr_retry_count = 7,
					 .qp_num = q->qp->qp_num };
}

static int on_route(struct vb_qp *q)
{
	const struct vb_port_desc *d = &q->rail->port->desc;
	struct rdma_conn_param param = parameters(q, d->reads_in, d->reads_out);
	struct vb_hello hello;

	vb_hello_init(q->rail, q->index, &hello);
	param.private_data = &hello;
	param.private_data_len = sizeof(hello);
	return rdma_connect(q->id, &param) ? -errno : 0;
}

/* Both directions, from what the other side says of itself. */
static int agree(const struct vb_qp *q, const struct rdma_conn_param *theirs, uint8_t *reads_in, uint8_t *reads_out)
{
	const struct vb_port_desc *ours = &q->rail->port->desc;
	int ret = vb_reads(ours->reads_in, theirs->responder_resources, reads_in);

	return ret ? ret : vb_reads(ours->reads_out, theirs->initiator_depth, reads_out);
}

static void one_is_ready(struct vb_qp *q)
{
	struct vb_rail *r = q->rail;
	bool all = true;

	q->ready = true;
	for (uint32_t i = 0; i < r->n_qps; i++)
		all &= r->qp[i].ready;
	if (all && (r->state == VB_RESOLVING || r->state == VB_ACCEPTED))
		vb_rail_up(r);
}

static int on_response(struct vb_qp *q, const struct rdma_conn_param *theirs)
{
	uint8_t reads_in, reads_out;
	int ret = agree(q, theirs, &reads_in, &reads_out);

	if (!ret)
		ret = vb_qp_connect_cm(q, reads_in, reads_out);
	if (ret)
		return ret;
	if (rdma_establish(q->id))
		return -errno;
	one_is_ready(q);
	return 0;
}

/* ------------------------------------------------------------ accepting side */

static void reject(struct rdma_cm_id *id, enum rejection why)
{
	const uint8_t byte = (uint8_t)why;

	(void)rdma_reject(id, &byte, sizeof(byte));
	rdma_destroy_id(id);
}

static int accept_qp(struct vb_qp *q, const struct rdma_conn_param *theirs)
{
	struct rdma_conn_param param;
	uint8_t reads_in, reads_out;
	int ret = agree(q, theirs, &reads_in, &reads_out);

	if (!ret)
		ret = vb_qp_connect_cm(q, reads_in, reads_out);
	if (ret)
		return ret;
	param = parameters(q, reads_in, reads_out);
	return rdma_accept(q->id, &param) ? -errno : 0;
}

/* The rail of a request, made anew if it is the first of its generation. NULL: rejected with *why. */
static struct vb_rail *request_rail(struct fab *f, const struct vb_hello *h, enum rejection *why)
{
	struct vb_rail *r;
	struct fab_ep *ep;
	int status;

	*why = REJECT_GONE;
	ep = vb_hello_ep(f, h, &status);
	if (!ep)
		return NULL;
	*why = REJECT_LATER;
	r = &ep->rail[h->rail];
	if (h->generation > r->generation) {
		r->port = &f->port[h->passive_port];
		r->remote_port = h->active_port;
		r->remote = (struct vb_port_desc){ 0 };
		r->by_cm = true;
		if (vb_rail_take(r, h)) {
			vb_rail_stop(r);
			return NULL;
		}
	}
	if (h->generation != r->generation || r->state != VB_ACCEPTED || !r->by_cm || r->qp[h->qp].id)
		return NULL;
	return r;
}

static void on_request(struct fab *f, struct rdma_cm_id *id, const struct vb_hello *h,
		       const struct rdma_conn_param *theirs)
{
	enum rejection why = REJECT_GONE;
	struct vb_rail *r = vb_hello_check(f, h) ? NULL : request_rail(f, h, &why);
	struct vb_qp *q;
	int ret;

	if (!r) {
		if (why == REJECT_GONE) {
			vb_count(&f->counters.refused, 1);
			log_warn(f->log, "verbs: a connection was refused: its secret is unknown or used");
		}
		reject(id, why);
		return;
	}
	q = &r->qp[h->qp];
	q->id = id;
	id->context = q;
	ret = accept_qp(q, theirs);
	if (!ret)
		return;
	q->id = NULL;
	reject(id, REJECT_LATER);
	vb_rail_break(r, ret, "a request cannot be accepted");
}

/* --------------------------------------------------------------------- events */

static void on_rejected(struct vb_qp *q, const struct rdma_cm_event *ev, uint8_t byte)
{
	if (byte == REJECT_GONE || ev->status == REJECTED_NO_LISTENER)
		vb_ep_down(q->rail->ep, q->rail->was_up ? -ECONNRESET : -ECONNREFUSED,
			   "the other side has no such endpoint");
	else
		vb_rail_break(q->rail, -ECONNREFUSED, rdma_event_str(ev->event));
}

static void on_qp_event(struct vb_qp *q, const struct rdma_cm_event *ev, uint8_t byte)
{
	struct vb_rail *r = q->rail;
	int ret = 0;

	switch (ev->event) {
	case RDMA_CM_EVENT_ADDR_RESOLVED:
		ret = on_address(q);
		break;
	case RDMA_CM_EVENT_ROUTE_RESOLVED:
		ret = on_route(q);
		break;
	case RDMA_CM_EVENT_CONNECT_RESPONSE:
		ret = r->state == VB_RESOLVING ? on_response(q, &ev->param.conn) : 0;
		break;
	case RDMA_CM_EVENT_ESTABLISHED:
		one_is_ready(q);
		break;
	case RDMA_CM_EVENT_REJECTED:
		on_rejected(q, ev, byte);
		break;
	case RDMA_CM_EVENT_DISCONNECTED:
		vb_rail_break(r, -ECONNRESET, "the other side has disconnected");
		break;
	case RDMA_CM_EVENT_ADDR_CHANGE:
	case RDMA_CM_EVENT_TIMEWAIT_EXIT:
		break;
	default:
		ret = ev->status < 0 ? ev->status : -EIO;
		break;
	}
	if (ret)
		vb_rail_break(r, ret, rdma_event_str(ev->event));
}

/* An event is acknowledged before anything is done: who destroys an id waits for that. */
static void take_event(struct fab *f, struct rdma_cm_event *ev)
{
	struct rdma_cm_event copy = *ev;
	struct vb_hello hello = { 0 };
	uint8_t byte = 0;

	if (ev->event == RDMA_CM_EVENT_CONNECT_REQUEST && ev->param.conn.private_data_len >= sizeof(hello))
		memcpy(&hello, ev->param.conn.private_data, sizeof(hello));
	if (ev->event == RDMA_CM_EVENT_REJECTED && ev->param.conn.private_data_len > 0)
		byte = *(const uint8_t *)ev->param.conn.private_data;
	rdma_ack_cm_event(ev);
	copy.param.conn.private_data = NULL;
	if (copy.event == RDMA_CM_EVENT_CONNECT_REQUEST)
		on_request(f, copy.id, &hello, &copy.param.conn);
	else if (copy.id != f->listener)
		on_qp_event(copy.id->context, &copy, byte);
}

void vb_cm_events(struct fab *f)
{
	struct rdma_cm_event *ev;

	while (!rdma_get_cm_event(f->cm, &ev))
		take_event(f, ev);
}
