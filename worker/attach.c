/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Shard services: from an address in the member table to their memory in ours.
 *
 *   connect, mutual proof -> a provider of the fabric (pair.c) -> when all have
 *   one: in place or copied, the plan, all memory -> REGIONS both ways
 *   -> import, map -> ATTACHED both ways -> (all of them) READY
 *
 * In place means that every shard service's memory can be mapped. One that
 * cannot puts all of them into copy mode, those of this host too: units come
 * whole or not at all, so half a view is of no use.
 *
 * A descriptor may arrive before what it names (-EAGAIN), so imports are tried
 * again after every poll. In place, one flat view a unit is laid
 * out in reserved address space and each owner's runs are mapped into it side
 * by side, once: from then on a fetch is a look at the owners' progress words.
 *
 * attach_pump is the only place that takes fabric events. It runs until there
 * are none and the fabric is armed, so whoever posts something calls it before
 * going back to the loop; called from within, it does nothing, since the outer
 * call goes on anyway.
 */
#include "worker/process.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define EVENTS 64
#define ROUNDS_MAX 64
#define LOST_GRACE_S 3

static void on_ready(struct conn *c, void *ctx);
static int on_message(struct conn *c, const struct wire_header *h, const union wire_msg *m, void *ctx);
static void on_closed(struct conn *c, int status, const char *text, void *ctx);

static const struct conn_ops peer_ops = { .ready = on_ready, .message = on_message, .closed = on_closed };

/* ------------------------------------------------------------- the page map */

static int open_owners(struct worker *w)
{
	struct attach *a = &w->attach;
	struct share share;

	a->n_owners = calloc(w->table.n_units, sizeof(*a->n_owners));
	a->owner = calloc((size_t)w->table.n_units * a->n_peers, sizeof(*a->owner));
	if (!a->n_owners || !a->owner)
		return -ENOMEM;
	for (uint32_t u = 0; u < w->table.n_units; u++) {
		for (uint32_t i = 0; i < a->n_peers; i++) {
			page_map_share(&w->map, &w->table, a->peer[i].member, u, &share);
			if (share.n > 0)
				a->owner[(size_t)u * a->n_peers + a->n_owners[u]++] = i;
		}
	}
	return 0;
}

/* Address space for the views; nothing is in it until owners are mapped. */
static int open_view(struct worker *w)
{
	struct attach *a = &w->attach;
	uint64_t at = 0;
	void *base;

	a->unit = calloc(w->table.n_units, sizeof(*a->unit));
	if (!a->unit)
		return -ENOMEM;
	a->view_bytes = w->table.n_elements * sizeof(float);
	base = mmap(NULL, a->view_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (base == MAP_FAILED)
		return -errno;
	a->view = base;
	for (uint32_t u = 0; u < w->table.n_units; u++) {
		a->unit[u] = (float *)(void *)(a->view + at);
		at += w->table.unit[u].n * sizeof(float);
	}
	return 0;
}

static int connect_peer(struct worker *w, struct peer *p, const struct msg_member *m, uint64_t our_host, struct err *e)
{
	p->w = w;
	p->same_host = m->host_id == our_host;
	p->index = (uint32_t)(p - w->attach.peer);
	p->member = m->member;
	snprintf(p->name, sizeof(p->name), "shard service %u (pid %u on %.40s)", m->member, m->pid, m->host);
	return conn_connect(&w->self, m->listen, clock_now_ns() + JOIN_TIMEOUT_NS, &peer_ops, p, &p->conn, e);
}

static int by_id(const void *a, const void *b)
{
	const struct msg_member *x = *(const struct msg_member *const *)a, *y = *(const struct msg_member *const *)b;

	return (x->member > y->member) - (x->member < y->member);
}

static int open_peers(struct worker *w, const struct msg_member **shard, uint32_t n, uint64_t our_host, struct err *e)
{
	struct attach *a = &w->attach;
	uint32_t *ids = calloc(n, sizeof(*ids));
	int rc;

	a->peer = calloc(n, sizeof(*a->peer));
	if (!ids || !a->peer) {
		free(ids);
		return err_set(e, -ENOMEM, "out of memory");
	}
	a->n_peers = n;
	for (uint32_t i = 0; i < n; i++)
		ids[i] = shard[i]->member;
	rc = page_map_init(&w->map, &w->table, ids, n, w->config.max_owners_per_unit);
	free(ids);
	if (rc)
		return err_set(e, rc, "cannot make the page map for %u shard services: %s", n, strerror(-rc));
	w->have_map = true;
	for (uint32_t i = 0; i < n && !rc; i++)
		rc = connect_peer(w, &a->peer[i], shard[i], our_host, e);
	if (rc)
		return rc;
	rc = open_owners(w);
	return rc ? err_set(e, rc, "cannot lay out %u units: %s", w->table.n_units, strerror(-rc)) : 0;
}

int attach_open(struct worker *w, const struct member_table *t, struct err *e)
{
	const struct msg_member **shard = calloc(w->n_shards, sizeof(const struct msg_member *));
	uint64_t our_host = 0;
	uint32_t n = 0;
	int rc = 0;

	if (!shard)
		return err_set(e, -ENOMEM, "out of memory");
	for (uint32_t i = 0; i < t->n; i++) {
		if (t->member[i].role == ROLE_SHARD && n < w->n_shards)
			shard[n++] = &t->member[i];
		if (t->member[i].member == w->self.member)
			our_host = t->member[i].host_id;
	}
	if (n == w->n_shards) {
		qsort(shard, n, sizeof(const struct msg_member *), by_id);
		wait_begin(&w->waits[WAIT_RECORD_CONTROL], WAIT_CONNECT, 0, 0, 0, shard[0]->member);
		rc = open_peers(w, shard, n, our_host, e);
	}
	free(shard);
	return rc;
}

void attach_release(struct worker *w)
{
	struct attach *a = &w->attach;

	for (uint32_t i = 0; i < a->n_peers; i++) {
		struct peer *p = &a->peer[i];

		conn_free(p->conn);
		if (p->ep)
			p->fabric->ops->disconnect(p->ep);
		if (p->parameters)
			p->fabric->ops->remote_close(p->parameters);
		if (p->inbox)
			p->fabric->ops->remote_close(p->inbox);
	}
	if (a->view)
		munmap(a->view, a->view_bytes);
	free(a->unit);
	free(a->owner);
	free(a->n_owners);
	free(a->peer);
	if (w->have_map)
		page_map_release(&w->map);
}

/* -------------------------------------------------------------------- loss */

static void on_grace_over(evutil_socket_t fd, short what, void *ctx)
{
	struct peer *p = ctx;

	(void)fd;
	(void)what;
	control_fail(p->w, EXIT_JOB_FAILED, "the connection to %s was lost", p->name);
}

void attach_lost(struct peer *p, const char *text)
{
	struct timeval grace = { .tv_sec = LOST_GRACE_S };

	if (p->lost || p->w->over)
		return;
	p->lost = true;
	log_info(&p->w->log, "lost %s: %s", p->name, text);
	/* If it is dead the coordinator knows better than we do, and soon. */
	if (event_base_once(p->w->self.base, -1, EV_TIMEOUT, on_grace_over, p, &grace))
		control_fail(p->w, EXIT_JOB_FAILED, "the connection to %s was lost: %s", p->name, text);
}

static void on_closed(struct conn *c, int status, const char *text, void *ctx)
{
	struct peer *p = ctx;

	(void)c;
	(void)status;
	p->conn = NULL;
	attach_lost(p, text);
}

/* ------------------------------------------------------------- attachment */

static void on_ready(struct conn *c, void *ctx)
{
	struct peer *p = ctx;

	if (conn_role(c) != ROLE_SHARD || conn_member(c) != p->member)
		control_fail(p->w, EXIT_JOB_FAILED, "at the address of %s answers %s", p->name, conn_peer_text(c));
	else
		pair_begin(p);
}

static void send_regions(struct peer *p)
{
	struct worker *w = p->w;
	struct msg_regions m = { .in_place = w->in_place };
	struct fab_blob blob;

	if (w->in_place) {
		int rc = p->fabric->ops->export_region(p->ep, p->fabric->region[MEMORY_GRADIENTS], &blob);

		if (rc) {
			control_fail(w, EXIT_JOB_FAILED, "cannot give %s access to the gradients: %s", p->name,
				     strerror(-rc));
			return;
		}
		m.gradients = (struct wire_blob){ .data = blob.data, .bytes = blob.bytes };
	}
	if (p->conn)
		conn_send(p->conn, WIRE_REGIONS, &m);
}

/* Connected to all of them: what memory there has to be is known now. */
static void check_connected(struct worker *w)
{
	struct attach *a = &w->attach;
	struct err e = { 0 };
	int rc;

	w->in_place = true;
	for (uint32_t i = 0; i < a->n_peers; i++) {
		if (!a->peer[i].fabric_up)
			return;
		w->in_place &= a->peer[i].fabric->ops->maps;
	}
	neighbours_open(w);
	rc = prepare_memory(w, &e);
	if (!rc && w->in_place)
		rc = open_view(w);
	if (!rc)
		rc = push_attach(w);
	if (!rc)
		rc = sums_open(w, &e);
	if (rc) {
		control_fail(w, rc == -EINVAL ? EXIT_CONFIG : EXIT_JOB_FAILED, "%s",
			     e.text[0] ? e.text : strerror(-rc));
		return;
	}
	a->planned = true;
	for (uint32_t i = 0; i < a->n_peers; i++)
		send_regions(&a->peer[i]);
	neighbours_greet(w);
}

static int take_blob(struct fab_blob *out, const struct wire_blob *in)
{
	if (in->bytes > sizeof(out->data))
		return -EPROTO;
	out->bytes = in->bytes;
	if (in->bytes > 0)
		memcpy(out->data, in->data, in->bytes);
	return 0;
}

static int on_regions(struct peer *p, const struct msg_regions *m)
{
	bool inbox = m->inbox.bytes > 0;

	if (!p->w->attach.planned || p->have_regions || m->parameters.bytes == 0 || inbox == p->w->in_place)
		return -EPROTO;
	if (take_blob(&p->parameters_blob, &m->parameters) || take_blob(&p->inbox_blob, &m->inbox))
		return -EPROTO;
	p->have_regions = true;
	return 0;
}

/* The owner's progress word and its runs of every unit, each where the unit's view wants it. */
static int map_peer(struct worker *w, struct peer *p)
{
	struct share share;
	void *at;
	int rc = p->fabric->ops->map(p->parameters, 0, PARAM_HEADER, NULL, &at);

	if (rc)
		return rc;
	p->progress = at;
	for (uint32_t u = 0; u < w->table.n_units; u++) {
		uint64_t base = page_map_share_bytes(&w->map, &w->table, p->member, u);

		page_map_share(&w->map, &w->table, p->member, u, &share);
		for (uint32_t i = 0; i < share.n_seg && !rc; i++) {
			const struct share_seg *s = &share.seg[i];

			rc = p->fabric->ops->map(p->parameters, base + s->share_offset * sizeof(float),
						 s->n * sizeof(float), w->attach.unit[u] + s->unit_offset, &at);
		}
	}
	return rc;
}

static int import(struct worker *w, struct peer *p)
{
	uint64_t need = page_map_share_bytes(&w->map, &w->table, p->member, w->table.n_units);
	const struct fab_ops *ops = p->fabric->ops;
	int rc = 0;

	if (!p->parameters)
		rc = ops->import_region(p->ep, &p->parameters_blob, &p->parameters);
	if (!rc && p->inbox_blob.bytes > 0 && !p->inbox)
		rc = ops->import_region(p->ep, &p->inbox_blob, &p->inbox);
	if (rc)
		return rc;
	if (ops->remote_bytes(p->parameters) < need)
		return -ERANGE;
	return w->in_place ? map_peer(w, p) : 0;
}

/* The next one that is waited for, or all are there. */
static void check_all(struct worker *w)
{
	struct attach *a = &w->attach;

	for (uint32_t i = 0; i < a->n_peers; i++) {
		if (!a->peer[i].ours_attached || !a->peer[i].theirs_attached) {
			atomic_store_explicit(&w->waits[WAIT_RECORD_CONTROL].peer, a->peer[i].member,
					      memory_order_relaxed);
			return;
		}
	}
	if (a->ready_sent)
		return;
	a->ready_sent = true;
	wait_end(&w->waits[WAIT_RECORD_CONTROL]);
	control_ready(w);
}

/* Imports whatever arrived since the last poll. */
static void import_all(struct worker *w)
{
	for (uint32_t i = 0; i < w->attach.n_peers; i++) {
		struct peer *p = &w->attach.peer[i];
		struct msg_attached m = { .in_place = w->in_place };
		int rc;

		if (!p->fabric_up || !p->have_regions || p->ours_attached || p->lost)
			continue;
		rc = import(w, p);
		if (rc == -EAGAIN)
			continue;
		if (rc) {
			control_fail(w, EXIT_JOB_FAILED, "cannot take in the memory of %s: %s", p->name, strerror(-rc));
			p->lost = true;
			continue;
		}
		p->ours_attached = true;
		if (p->conn)
			conn_send(p->conn, WIRE_ATTACHED, &m);
		check_all(w);
	}
}

static int on_message(struct conn *c, const struct wire_header *h, const union wire_msg *m, void *ctx)
{
	struct peer *p = ctx;
	int rc = -EPROTO;

	(void)c;
	if (p->w->over)
		return 0;
	switch (h->type) {
	case WIRE_FABRIC:
		rc = pair_fabric(p, &m->fabric);
		break;
	case WIRE_FABRIC_REFUSED:
		rc = pair_refused(p, &m->fabric_refused);
		break;
	case WIRE_SIGNAL:
		rc = pair_signal(p, &m->signal);
		break;
	case WIRE_REGIONS:
		rc = on_regions(p, &m->regions);
		break;
	case WIRE_ATTACHED:
		if (p->theirs_attached || !p->have_regions || (m->attached.in_place != 0) != p->w->in_place)
			break;
		p->theirs_attached = true;
		check_all(p->w);
		rc = 0;
		break;
	case WIRE_ANSWER:
		rc = push_answer(p, &m->answer);
		break;
	default:
		break;
	}
	if (!rc)
		attach_pump(p->w);
	return rc;
}

/* -------------------------------------------------------------------- pump */

static void handle(struct fabric *f, const struct fab_event *ev)
{
	struct worker *w = f->w;

	switch (ev->type) {
	case FAB_EV_CONNECTED:
	case FAB_EV_ACCEPTED:
	case FAB_EV_DOWN:
	case FAB_EV_SIGNAL:
		if (ev->type != FAB_EV_SIGNAL && ev->user & NEIGHBOUR_USER)
			neighbours_event(w, ev);
		else if (pair_event(f, ev))
			check_connected(w);
		break;
	case FAB_EV_READ:
		copy_event(w, ev);
		break;
	case FAB_EV_WRITE:
		push_event(w, ev);
		break;
	case FAB_EV_NOTICE:
		/* This side gives out no inbox. */
		assert(false);
		break;
	}
}

/* One turn of every provider: how many events there were. */
static uint32_t poll_all(struct worker *w)
{
	struct fab_event ev[EVENTS];
	uint32_t all = 0;

	for (uint32_t k = 0; k < w->n_fabrics; k++) {
		struct fabric *f = &w->fabric[k];
		uint32_t n = f->ops->poll(f->fab, ev, EVENTS);

		for (uint32_t i = 0; i < n && !w->over; i++)
			handle(f, &ev[i]);
		all += n;
	}
	return all;
}

static bool arm_all(struct worker *w)
{
	bool armed = true;

	for (uint32_t k = 0; k < w->n_fabrics; k++)
		armed &= w->fabric[k].ops->arm(w->fabric[k].fab);
	return armed;
}

void attach_pump(struct worker *w)
{
	uint32_t rounds = 0;

	if (!w->n_fabrics || w->pumping || w->over)
		return;
	w->pumping = true;
	while (!w->over) {
		uint32_t n = poll_all(w);

		import_all(w);
		neighbours_run(w);
		copy_run(w);
		push_run(w);
		if (n == 0 && arm_all(w))
			break;
		/* Others wait for the loop too: heartbeats first of all. */
		if (++rounds == ROUNDS_MAX) {
			event_active(w->fabric[0].event, EV_READ, 0);
			break;
		}
	}
	w->pumping = false;
}
