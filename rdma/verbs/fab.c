/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The provider `verbs`: RDMA through libibverbs and librdmacm.
 *
 * An instance is one epoll set, whose descriptor is what a user's event loop
 * sleeps on: the completion channel and the asynchronous events of each device,
 * the event channel of librdmacm, and a timer. All of them are non-blocking and
 * level-triggered; fab_arm says false while anything waits in us. The timer runs
 * as fast as there is need: 5 ms while a rail is under way, 100 ms while
 * operations are in flight (their deadline), 1 s while peers read from us (look
 * in rail.c), not at all without endpoints.
 *
 * While rails are polled, the kernel is asked for the rest only now and then.
 */
#include "rdma/providers.h"
#include "rdma/verbs/verbs.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/timerfd.h>
#include <unistd.h>

#define EVENTS_AT_ONCE 16
#define POLLS_A_LOOK 16

int vb_random(void *out, size_t bytes)
{
	ssize_t n = getrandom(out, bytes, 0);

	return n == (ssize_t)bytes ? 0 : n < 0 ? -errno : -EIO;
}

int vb_watch(struct fab *f, int fd, void *who)
{
	struct epoll_event ev = { .events = EPOLLIN, .data.ptr = who };

	return epoll_ctl(f->epoll_fd, EPOLL_CTL_ADD, fd, &ev) ? -errno : 0;
}

void vb_signal_push(struct fab *f, struct fab_ep *ep, uint64_t user, const void *data, size_t bytes)
{
	struct vb_signal *s = f->n_signals < VB_WORDS_MAX ? calloc(1, sizeof(*s)) : NULL;

	assert(bytes <= FAB_BLOB_MAX);
	/* As if it had been lost on its way: what waits for an answer has a timer. */
	if (!s)
		return;
	s->ep = ep;
	s->user = user;
	s->blob.bytes = (uint32_t)bytes;
	memcpy(s->blob.data, data, bytes);
	TAILQ_INSERT_TAIL(&f->signals, s, link);
	f->n_signals++;
}

static void signals_free(struct vb_signals *list)
{
	struct vb_signal *s;

	while ((s = TAILQ_FIRST(list))) {
		TAILQ_REMOVE(list, s, link);
		free(s);
	}
}

/* ------------------------------------------------------------------------ time */

static void timer_set(struct fab *f, uint64_t ns)
{
	const struct timespec t = { .tv_sec = (time_t)(ns / VB_S), .tv_nsec = (long)(ns % VB_S) };
	const struct itimerspec both = { .it_interval = t, .it_value = t };
	int ret = timerfd_settime(f->timer_fd, 0, &both, NULL);

	assert(!ret);
	(void)ret;
	f->timer_ns = ns;
}

void vb_timer(struct fab *f, uint64_t interval_ns)
{
	if (f->timer_ns == 0 || interval_ns < f->timer_ns)
		timer_set(f, interval_ns);
}

static uint64_t rail_interval(const struct vb_rail *r)
{
	uint64_t interval = r->ep->active ? 0 : VB_S;

	if (r->state == VB_IDLE)
		return r->ep->active ? 20 * VB_MS : VB_S;
	if (r->state != VB_UP)
		return 5 * VB_MS;
	for (uint32_t i = 0; i < r->n_qps; i++)
		if (r->qp[i].head != r->qp[i].tail)
			return 100 * VB_MS;
	return interval;
}

/* How often time matters now. */
static uint64_t interval_needed(const struct fab *f)
{
	const struct fab_ep *ep;
	uint64_t best = 0;

	TAILQ_FOREACH(ep, &f->eps, link)
	{
		if (ep->state >= VB_EP_DOWN)
			continue;
		for (uint32_t i = 0; i < ep->n_rails; i++) {
			uint64_t one = rail_interval(&ep->rail[i]);

			if (one && (!best || one < best))
				best = one;
		}
	}
	return best;
}

static void on_timer(struct fab *f)
{
	uint64_t ticks, now = clock_now_ns(), interval;
	struct fab_ep *ep;

	/* Reading makes it quiet until the next tick. */
	if (read(f->timer_fd, &ticks, sizeof(ticks)) != sizeof(ticks))
		return;
	TAILQ_FOREACH(ep, &f->eps, link)
	if (ep->state < VB_EP_DOWN)
		vb_ep_tick(ep, now);
	interval = interval_needed(f);
	if (interval != f->timer_ns)
		timer_set(f, interval);
}

/* ----------------------------------------------------------------- open, close */

static void options_fill(struct fab *f, const struct fab_options *o)
{
	if (o)
		f->o = *o;
	if (!f->o.queue_pairs)
		f->o.queue_pairs = 2;
	if (f->o.queue_pairs > VB_QPS_MAX)
		f->o.queue_pairs = VB_QPS_MAX;
	if (!f->o.timeout)
		f->o.timeout = 14;
	if (!f->o.inflight_bytes)
		f->o.inflight_bytes = 16u << 20;
	if (!f->o.deadline_ns)
		f->o.deadline_ns = 5 * VB_S;
	if (!f->o.down_ns)
		f->o.down_ns = 30 * VB_S;
}

static int fds_open(struct fab *f)
{
	f->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (f->epoll_fd < 0)
		return -errno;
	f->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
	if (f->timer_fd < 0)
		return -errno;
	return vb_watch(f, f->timer_fd, &f->timer_fd);
}

static void fab_free(struct fab *f)
{
	signals_free(&f->signals);
	signals_free(&f->told);
	vb_cm_close(f);
	vb_devices_close(f);
	if (f->timer_fd >= 0)
		close(f->timer_fd);
	if (f->epoll_fd >= 0)
		close(f->epoll_fd);
	free(f);
}

/* Only who is told to use it fails without it. */
static int cm_open(struct fab *f, struct err *e)
{
	int ret;

	if (f->o.connect == FAB_CONNECT_CONTROL)
		return 0;
	ret = vb_cm_open(f);
	if (!ret)
		return 0;
	if (f->o.connect == FAB_CONNECT_CM)
		return err_set(e, ret, "fabric verbs: no connection manager (modprobe rdma_ucm): %s", strerror(-ret));
	log_info(f->log, "verbs: no connection manager (%s): connected over the control connection", strerror(-ret));
	return 0;
}

static int verbs_open(const struct fab_config *cfg, struct fab **out, struct err *e)
{
	struct fab *f = calloc(1, sizeof(*f));
	const char *job = cfg->job ? cfg->job : "";
	int ret;

	if (!f)
		return err_set(e, -ENOMEM, "fabric verbs: no memory");
	f->log = cfg->log;
	f->member = cfg->member;
	f->job = hash64(job, strlen(job), 0);
	f->epoll_fd = f->timer_fd = -1;
	options_fill(f, cfg->options);
	TAILQ_INIT(&f->eps);
	TAILQ_INIT(&f->hot);
	TAILQ_INIT(&f->regions);
	TAILQ_INIT(&f->remotes);
	TAILQ_INIT(&f->signals);
	TAILQ_INIT(&f->told);
	ret = fds_open(f);
	if (ret)
		ret = err_set(e, ret, "fabric verbs: %s", strerror(-ret));
	if (!ret)
		ret = vb_devices_open(f, e);
	if (!ret)
		ret = cm_open(f, e);
	if (ret) {
		fab_free(f);
		return ret;
	}
	*out = f;
	return 0;
}

/* Endpoints first: they hold operations, operations hold memory. */
static void verbs_close(struct fab *f)
{
	while (!TAILQ_EMPTY(&f->eps))
		vb_ep_free(TAILQ_FIRST(&f->eps));
	while (!TAILQ_EMPTY(&f->remotes))
		vb_remote_close(TAILQ_FIRST(&f->remotes));
	while (!TAILQ_EMPTY(&f->regions))
		vb_region_close(TAILQ_FIRST(&f->regions));
	fab_free(f);
}

/* ------------------------------------------------------------------------ poll */

/* One turn for each rail that is hot now. Handling one may take any of them off the list. */
static void poll_hot(struct fab *f)
{
	uint32_t turns = 0;
	struct vb_rail *r;

	TAILQ_FOREACH(r, &f->hot, hot_link)
	turns++;
	while (turns-- > 0 && (r = TAILQ_FIRST(&f->hot))) {
		TAILQ_REMOVE(&f->hot, r, hot_link);
		TAILQ_INSERT_TAIL(&f->hot, r, hot_link);
		(void)vb_rail_poll(r);
	}
}

static void kernel_events(struct fab *f)
{
	struct epoll_event ev[EVENTS_AT_ONCE];
	int n = epoll_wait(f->epoll_fd, ev, EVENTS_AT_ONCE, 0);

	for (int i = 0; i < n; i++) {
		void *who = ev[i].data.ptr;

		if (who == &f->timer_fd)
			on_timer(f);
		else if (who == &f->cm)
			vb_cm_events(f);
		for (uint32_t k = 0; k < f->n_devs; k++) {
			if (who == &f->dev[k].channel)
				vb_completion_events(&f->dev[k]);
			else if (who == &f->dev[k].context)
				vb_async_events(f, &f->dev[k]);
		}
	}
}

static void emit_signals(struct fab *f, struct vb_sink *s)
{
	struct vb_signal *one;

	while (s->n < s->max && (one = TAILQ_FIRST(&f->signals))) {
		TAILQ_REMOVE(&f->signals, one, link);
		f->n_signals--;
		TAILQ_INSERT_TAIL(&f->told, one, link);
		s->out[s->n++] = (struct fab_event){
			.type = FAB_EV_SIGNAL, .ep = one->ep, .user = one->user, .blob = &one->blob
		};
	}
}

static void emit_all(struct fab *f, struct vb_sink *s)
{
	struct fab_ep *ep, *next;

	emit_signals(f, s);
	for (ep = TAILQ_FIRST(&f->eps); ep; ep = next) {
		next = TAILQ_NEXT(ep, link);
		if (!ep->known && ep->state >= VB_EP_DOWN)
			vb_ep_free(ep);
		else if (vb_ep_has_events(ep))
			vb_ep_emit(ep, s);
	}
}

static uint32_t verbs_poll(struct fab *f, struct fab_event *out, uint32_t max)
{
	struct vb_sink s = { .out = out, .max = max };

	signals_free(&f->told);
	poll_hot(f);
	/* However much completes: who asks to connect, and time, wait there. */
	if (TAILQ_EMPTY(&f->hot) || ++f->polls >= POLLS_A_LOOK) {
		f->polls = 0;
		kernel_events(f);
		poll_hot(f);
	}
	vb_pump(f);
	emit_all(f, &s);
	return s.n;
}

static int verbs_fd(struct fab *f)
{
	return f->epoll_fd;
}

static bool verbs_arm(struct fab *f)
{
	const struct fab_ep *ep;

	if (!TAILQ_EMPTY(&f->signals))
		return false;
	TAILQ_FOREACH(ep, &f->eps, link)
	if (vb_ep_has_events(ep))
		return false;
	if (!vb_rails_arm(f))
		return false;
	return TAILQ_EMPTY(&f->signals);
}

static const struct fab_counters *verbs_counters(const struct fab *f)
{
	return &f->counters;
}

const struct fab_ops fab_verbs_ops = {
	.name = "verbs",
	.maps = false,
	.probe = vb_probe,
	.open = verbs_open,
	.close = verbs_close,
	.address = vb_address,
	.connect = vb_connect,
	.signal = vb_signal_in,
	.describe = vb_describe,
	.disconnect = vb_disconnect,
	.region_open = vb_region_open,
	.region_close = vb_region_close,
	.region_addr = vb_region_addr,
	.export_region = vb_export,
	.import_region = vb_import,
	.remote_close = vb_remote_close,
	.remote_bytes = vb_remote_bytes,
	.map = fab_no_map,
	.read = vb_read,
	.write_notify = vb_write_notify,
	.poll = verbs_poll,
	.fd = verbs_fd,
	.arm = verbs_arm,
	.counters = verbs_counters,
};
