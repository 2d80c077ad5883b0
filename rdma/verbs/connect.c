/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How a rail is agreed on over the control connection.
 *
 *   connecting side                        accepting side
 *   queue pairs in INIT
 *   OFFER  generation, port, ends ------>  queue pairs to RTS
 *                                  <-----  ACCEPT  generation, port, ends
 *   queue pairs to RTS
 *   READY  generation ------------------>  up
 *   up
 *
 * READY is needed because the accepting side is ready first, and must not post
 * before the other is. Each side learns the other's port anew with every offer,
 * since its GID may have moved. Who knows the secret of an address was let in by
 * the control connection that carried it; a secret is good for one connecting
 * endpoint (its nonce), which may come again with the next generation.
 *
 * What is old is ignored, what makes no sense is -EPROTO, and who asks for an
 * endpoint that is not there is told so (GONE), so that it need not wait.
 */
#include "rdma/verbs/verbs.h"

#include <errno.h>

void vb_hello_init(const struct vb_rail *r, uint8_t qp, struct vb_hello *out)
{
	const struct fab_ep *ep = r->ep;
	uint8_t ours = (uint8_t)(r->port - ep->fab->port);

	*out = (struct vb_hello){ .magic = VB_MAGIC,
				  .protocol = VB_PROTOCOL,
				  .rail = r->index,
				  .n_rails = ep->n_rails,
				  .job = ep->fab->job,
				  .nonce = ep->nonce,
				  .member = ep->fab->member,
				  .generation = r->generation,
				  .qp = qp,
				  .qps = ep->qps,
				  .active_port = ep->active ? ours : r->remote_port,
				  .passive_port = ep->active ? r->remote_port : ours };
	memcpy(out->secret, ep->secret, sizeof(out->secret));
}

int vb_hello_check(const struct fab *f, const struct vb_hello *h)
{
	if (h->magic != VB_MAGIC || h->protocol != VB_PROTOCOL || h->job != f->job)
		return -EPROTO;
	if (h->n_rails == 0 || h->n_rails > VB_PORTS_MAX || h->rail >= h->n_rails)
		return -EPROTO;
	if (h->qps == 0 || h->qps > VB_QPS_MAX || h->qp >= 2 * h->qps || h->generation == 0)
		return -EPROTO;
	return h->active_port < VB_PORTS_MAX && h->passive_port < VB_PORTS_MAX ? 0 : -EPROTO;
}

void vb_say(struct vb_rail *r, enum vb_word word)
{
	struct vb_msg m = { .word = (uint8_t)word, .active = r->ep->active, .port = r->port->desc };

	vb_hello_init(r, 0, &m.hello);
	for (uint32_t i = 0; i < r->n_qps; i++)
		m.end[i] = (struct vb_end){ .qpn = r->qp[i].qp->qp_num, .psn = r->qp[i].psn };
	vb_signal_push(r->ep->fab, r->ep, r->ep->user, &m, sizeof(m));
}

void vb_say_gone(struct fab *f, uint64_t user, const struct vb_hello *h, bool active)
{
	struct vb_msg m = { .hello = *h, .word = VB_GONE, .active = active };

	vb_signal_push(f, NULL, user, &m, sizeof(m));
}

static struct fab_ep *find_ep(struct fab *f, const struct vb_hello *h, bool active)
{
	struct fab_ep *ep;

	TAILQ_FOREACH(ep, &f->eps, link)
	if (ep->active == active && ep->state < VB_EP_DOWN && ep->nonce == h->nonce &&
	    !memcmp(ep->secret, h->secret, sizeof(ep->secret)))
		return ep;
	return NULL;
}

struct fab_ep *vb_hello_ep(struct fab *f, const struct vb_hello *h, int *status)
{
	struct fab_ep *ep = find_ep(f, h, false);

	*status = 0;
	if (!ep)
		*status = vb_ep_accept(f, h, &ep);
	if (*status)
		return NULL;
	if (ep->n_rails != h->n_rails || ep->qps != h->qps || h->passive_port >= f->n_ports) {
		*status = -EPROTO;
		return NULL;
	}
	return ep;
}

/* ----------------------------------------------------------- accepting side */

static int on_offer(struct vb_rail *r, const struct vb_msg *m)
{
	int ret;

	if (m->hello.generation <= r->generation)
		return 0;
	r->port = &r->ep->fab->port[m->hello.passive_port];
	r->remote_port = m->hello.active_port;
	r->remote = m->port;
	r->by_cm = false;
	ret = vb_rail_take(r, &m->hello);
	for (uint32_t i = 0; i < r->n_qps && !ret; i++) {
		r->qp[i].peer = m->end[i];
		ret = vb_qp_connect(&r->qp[i], &m->port);
	}
	if (ret) {
		log_warn(r->ep->fab->log, "verbs: %s: member %u cannot be answered now: %s", r->port->name, r->ep->peer,
			 strerror(-ret));
		vb_rail_stop(r);
		vb_say(r, VB_LATER);
		return 0;
	}
	vb_rail_heat(r);
	vb_say(r, VB_ACCEPT);
	return 0;
}

static int to_accepting(struct fab *f, uint64_t user, const struct vb_msg *m)
{
	struct vb_rail *r;
	struct fab_ep *ep;
	int status;

	if (m->word == VB_OFFER)
		ep = vb_hello_ep(f, &m->hello, &status);
	else
		ep = find_ep(f, &m->hello, false);
	if (!ep) {
		if (m->word != VB_OFFER)
			return 0;
		vb_count(&f->counters.refused, 1);
		log_warn(f->log, "verbs: an offer was refused: its secret is unknown or used");
		vb_say_gone(f, user, &m->hello, false);
		return 0;
	}
	r = &ep->rail[m->hello.rail];
	/* Its address was given to somebody else. */
	if (ep->user != user)
		return -EPROTO;
	switch (m->word) {
	case VB_OFFER:
		return on_offer(r, m);
	case VB_READY:
		if (r->state == VB_ACCEPTED && r->generation == m->hello.generation)
			vb_rail_up(r);
		return 0;
	case VB_GONE:
		vb_ep_down(ep, -ECONNRESET, "the other side has no such endpoint any more");
		return 0;
	default:
		return -EPROTO;
	}
}

/* ---------------------------------------------------------- connecting side */

static void on_accept(struct vb_rail *r, const struct vb_msg *m)
{
	int ret = 0;

	if (r->state != VB_OFFERED)
		return;
	r->remote = m->port;
	for (uint32_t i = 0; i < r->n_qps && !ret; i++) {
		r->qp[i].peer = m->end[i];
		ret = vb_qp_connect(&r->qp[i], &m->port);
	}
	if (ret) {
		vb_rail_break(r, ret, "a queue pair cannot be connected");
		return;
	}
	vb_say(r, VB_READY);
	vb_rail_up(r);
}

static int to_connecting(struct fab *f, uint64_t user, const struct vb_msg *m)
{
	struct fab_ep *ep = find_ep(f, &m->hello, true);
	struct vb_rail *r;

	if (!ep) {
		if (m->word == VB_BROKEN || m->word == VB_ACCEPT)
			vb_say_gone(f, user, &m->hello, true);
		return 0;
	}
	if (ep->user != user || m->hello.rail >= ep->n_rails)
		return -EPROTO;
	r = &ep->rail[m->hello.rail];
	if (m->word == VB_GONE) {
		vb_ep_down(ep, ep->known && ep->state == VB_EP_UP ? -ECONNRESET : -ECONNREFUSED,
			   "the other side has no such endpoint");
		return 0;
	}
	if (m->word != VB_ACCEPT && m->word != VB_BROKEN && m->word != VB_LATER)
		return -EPROTO;
	if (m->hello.generation != r->generation)
		return 0;
	if (m->word == VB_ACCEPT)
		on_accept(r, m);
	else
		vb_rail_break(r, m->word == VB_LATER ? -EAGAIN : -ECONNRESET,
			      m->word == VB_LATER ? "the other side cannot now" : "the other side has broken it");
	return 0;
}

int vb_signal_in(struct fab *f, uint64_t user, const struct fab_blob *in)
{
	struct vb_msg m;
	int ret;

	if (in->bytes != sizeof(m))
		return -EPROTO;
	memcpy(&m, in->data, sizeof(m));
	ret = vb_hello_check(f, &m.hello);
	if (ret || m.active > 1)
		return -EPROTO;
	return m.active ? to_accepting(f, user, &m) : to_connecting(f, user, &m);
}
