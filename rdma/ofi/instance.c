/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The provider `ofi`: libfabric's reliable datagram endpoints, over TCP unless
 * told otherwise (--ofi-provider). An instance is a domain of libfabric and the
 * thread that uses it (engine.c says why there is one).
 *
 * What the engine has for the user is on the list of ready endpoints, under the
 * lock; fab_poll serves it round robin. The user sleeps on an eventfd, which is
 * written at most once between an arm and the next poll.
 */
#include "rdma/ofi/ofi.h"
#include "rdma/providers.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ------------------------------------------------------------------ life cycle */

static int ofi_probe(const struct fab_options *o, char reason[160])
{
	struct fi_info *info = NULL;
	int ret = ofi_find(o, &info, reason);

	if (!ret)
		load_freeinfo(info);
	return ret;
}

static uint64_t or_default(uint64_t value, uint64_t otherwise)
{
	return value ? value : otherwise;
}

static void configure(struct fab *f, const struct fab_options *o)
{
	static const struct fab_options automatic;
	const struct fi_domain_attr *d = f->info->domain_attr;

	o = o ? o : &automatic;
	f->local_keys = d->mr_mode & FI_MR_LOCAL;
	f->provider_keys = d->mr_mode & FI_MR_PROV_KEY;
	f->virtual_addresses = d->mr_mode & FI_MR_VIRT_ADDR;
	f->tagged = d->cq_data_size >= sizeof(uint64_t);
	f->asks = !strncmp(f->info->fabric_attr->prov_name, "tcp", 3) && f->info->tx_attr->msg_order & FI_ORDER_WAW;
	f->waits = true;
	f->inflight_max = or_default(o->inflight_bytes, OFI_INFLIGHT_BYTES);
	f->deadline_ns = or_default(o->deadline_ns, OFI_DEADLINE_NS);
	f->down_ns = or_default(o->down_ns, OFI_DOWN_NS);
}

static void domain_close(struct fab *f)
{
	if (f->domain)
		(void)edge_close(&f->domain->fid);
	if (f->fabric)
		(void)edge_close(&f->fabric->fid);
}

static int domain_open(struct fab *f)
{
	int ret = edge_fabric(f->info, &f->fabric);

	if (!ret)
		ret = edge_domain(f->fabric, f->info, &f->domain);
	if (!ret)
		ret = ofi_engine_start(f);
	if (ret)
		domain_close(f);
	return ret;
}

static int ofi_open(const struct fab_config *cfg, struct fab **out, struct err *e)
{
	struct fab *f = calloc(1, sizeof(*f));
	char reason[160];
	int ret;

	if (!f)
		return err_set(e, -ENOMEM, "fabric ofi: no memory");
	f->log = cfg->log;
	TAILQ_INIT(&f->eps);
	TAILQ_INIT(&f->engaged);
	TAILQ_INIT(&f->ready);
	TAILQ_INIT(&f->regions);
	TAILQ_INIT(&f->remotes);
	ret = ofi_find(cfg->options, &f->info, reason);
	if (ret) {
		free(f);
		return err_set(e, ret, "fabric ofi: %s", reason);
	}
	configure(f, cfg->options);
	ret = domain_open(f);
	if (ret) {
		load_freeinfo(f->info);
		free(f);
		return err_set(e, ret, "fabric ofi: cannot open what was found (%s): %s", reason, strerror(-ret));
	}
	*out = f;
	return 0;
}

/* Endpoints first: they hold operations, operations hold memory. */
static void ofi_close(struct fab *f)
{
	while (!TAILQ_EMPTY(&f->eps))
		ofi_disconnect(TAILQ_FIRST(&f->eps));
	while (!TAILQ_EMPTY(&f->remotes))
		ofi_remote_close(TAILQ_FIRST(&f->remotes));
	while (!TAILQ_EMPTY(&f->regions))
		ofi_region_close(TAILQ_FIRST(&f->regions));
	ofi_engine_stop(f);
	domain_close(f);
	load_freeinfo(f->info);
	free(f);
}

/* ---------------------------------------------------------------------- events */

static void emit_signal(struct fab_ep *ep, struct ofi_sink *s)
{
	struct fab *f = ep->fab;

	if (!ep->signal_due || s->n == s->max || f->signal_n == OFI_SIGNALS)
		return;
	f->signals[f->signal_n] = ep->signal;
	ep->signal_due = false;
	s->out[s->n++] = (struct fab_event){ .type = FAB_EV_SIGNAL,
					     .ep = ep->connects || ep->told ? ep : NULL,
					     .user = ep->user,
					     .blob = &f->signals[f->signal_n++] };
}

static void emit_up(struct fab_ep *ep, struct ofi_sink *s)
{
	if (!ep->connected || ep->told || ep->ended || s->n == s->max)
		return;
	ep->told = true;
	ofi_count(&ep->fab->counters.connects, 1);
	s->out[s->n++] = (struct fab_event){ .type = ep->connects ? FAB_EV_CONNECTED : FAB_EV_ACCEPTED,
					     .ep = ep,
					     .user = ep->user };
}

static bool has_more(const struct fab_ep *ep)
{
	return ep->signal_due || (ep->connected && !ep->told) || !TAILQ_EMPTY(&ep->finished) ||
	       ep->notice_head != ep->notice_tail || (ep->down && !ep->ended);
}

/* The last of all. True: the user never heard of it, so that it is ours to free. */
static bool emit_down(struct fab_ep *ep, struct ofi_sink *s)
{
	if (!ep->down || ep->ended || s->n == s->max || !TAILQ_EMPTY(&ep->finished) ||
	    ep->notice_head != ep->notice_tail)
		return false;
	ep->signal_due = false;
	ep->ended = true;
	if (!ep->connects && !ep->told)
		return true;
	s->out[s->n++] = (struct fab_event){ .type = FAB_EV_DOWN, .status = ep->status, .ep = ep, .user = ep->user };
	return false;
}

/* One turn for each that is ready. Returns one that is to be freed, if there is. */
static struct fab_ep *serve_ready(struct fab *f, struct ofi_sink *s)
{
	struct ofi_eps now = TAILQ_HEAD_INITIALIZER(now);
	struct fab_ep *ep, *stranger = NULL;

	TAILQ_CONCAT(&now, &f->ready, ready_link);
	while (!stranger && s->n < s->max && (ep = TAILQ_FIRST(&now))) {
		TAILQ_REMOVE(&now, ep, ready_link);
		ep->ready = false;
		emit_signal(ep, s);
		emit_up(ep, s);
		ofi_ops_emit(ep, s);
		if (emit_down(ep, s))
			stranger = ep;
		else if (has_more(ep))
			ofi_make_ready(ep);
	}
	TAILQ_CONCAT(&now, &f->ready, ready_link);
	TAILQ_CONCAT(&f->ready, &now, ready_link);
	return stranger;
}

static void hush(struct fab *f)
{
	uint64_t n;

	f->armed = false;
	if (!f->rung)
		return;
	f->rung = false;
	(void)!read(f->event_fd, &n, sizeof(n));
}

static uint32_t ofi_poll(struct fab *f, struct fab_event *out, uint32_t max)
{
	struct ofi_sink s = { .out = out, .max = max };
	struct fab_ep *stranger;

	pthread_mutex_lock(&f->lock);
	hush(f);
	f->signal_n = 0;
	stranger = serve_ready(f, &s);
	pthread_mutex_unlock(&f->lock);
	if (stranger) {
		ofi_count(&f->counters.errors, 1);
		log_warn(f->log, "fabric ofi: a peer introduced itself and did not come: %s",
			 strerror(-stranger->status));
		ofi_disconnect(stranger);
	}
	return s.n;
}

static int ofi_fd(struct fab *f)
{
	return f->event_fd;
}

static bool ofi_arm(struct fab *f)
{
	bool empty;

	pthread_mutex_lock(&f->lock);
	empty = TAILQ_EMPTY(&f->ready);
	f->armed = empty;
	pthread_mutex_unlock(&f->lock);
	return empty;
}

static const struct fab_counters *ofi_counters(const struct fab *f)
{
	return &f->counters;
}

const struct fab_ops fab_ofi_ops = {
	.name = "ofi",
	.maps = false,
	.connection_bytes = OFI_CONNECTION_BYTES,
	.probe = ofi_probe,
	.open = ofi_open,
	.close = ofi_close,
	.address = ofi_address,
	.connect = ofi_connect,
	.signal = ofi_signal,
	.describe = ofi_describe,
	.disconnect = ofi_disconnect,
	.region_open = ofi_region_open,
	.region_close = ofi_region_close,
	.region_addr = ofi_region_addr,
	.export_region = ofi_export,
	.import_region = ofi_import,
	.remote_close = ofi_remote_close,
	.remote_bytes = ofi_remote_bytes,
	.map = fab_no_map,
	.read = ofi_read,
	.write_notify = ofi_write_notify,
	.poll = ofi_poll,
	.fd = ofi_fd,
	.arm = ofi_arm,
	.counters = ofi_counters,
};
