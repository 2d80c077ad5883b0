/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The provider `local`: shared memory between processes of one host, and
 * `local-copy`, the same without fab_map, where every byte is moved by reads
 * and writes as a network would.
 *
 * An instance is one epoll set: the listening socket, the sockets of its
 * endpoints, and a timer for greetings that take too long. The set's own file
 * descriptor is what a user's event loop sleeps on. Events of sockets are
 * level-triggered, so that the descriptor is readable as long as something
 * waits in the kernel; what waits in us is on the ready list or in rx, and
 * fab_arm says false while there is any. So an arm needs no system call, and
 * no wake-up is lost between the last fab_poll and sleep.
 *
 * ready holds the endpoints for which fab_poll can do something without the
 * kernel: operations to execute, or an end to announce. It is served round
 * robin, in turns with the sockets, so that neither a flood of notices nor a
 * long queue of copies starves the other.
 */
#include "rdma/local.h"
#include "rdma/providers.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <unistd.h>

#define SOCKETS_AT_ONCE 64
#define BACKLOG 4096

static int random_name(char out[LOCAL_SOCKET_NAME_BYTES + 1])
{
	uint64_t r[2];
	int ret = local_random(r, sizeof(r));

	if (ret)
		return ret;
	snprintf(out, LOCAL_SOCKET_NAME_BYTES + 1, "shardmesh-%016llx%016llx", (unsigned long long)r[0],
		 (unsigned long long)r[1]);
	return 0;
}

static int listen_open(struct fab *f)
{
	struct sockaddr_un at = { .sun_family = AF_UNIX };
	socklen_t len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + LOCAL_SOCKET_NAME_BYTES);
	int ret = random_name(f->socket_name);

	if (ret)
		return ret;
	memcpy(at.sun_path + 1, f->socket_name, LOCAL_SOCKET_NAME_BYTES);
	f->listen_fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (f->listen_fd < 0)
		return -errno;
	if (bind(f->listen_fd, (struct sockaddr *)&at, len) || listen(f->listen_fd, BACKLOG))
		return -errno;
	return 0;
}

static int watch(struct fab *f, int *fd)
{
	struct epoll_event ev = { .events = EPOLLIN, .data.ptr = fd };

	return epoll_ctl(f->epoll_fd, EPOLL_CTL_ADD, *fd, &ev) ? -errno : 0;
}

static int fds_open(struct fab *f)
{
	int ret;

	f->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (f->epoll_fd < 0)
		return -errno;
	f->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
	if (f->timer_fd < 0)
		return -errno;
	f->spare_fd = dup(f->epoll_fd);
	if (f->spare_fd < 0)
		return -errno;
	ret = local_proof_create(&f->proof_fd);
	if (!ret)
		ret = listen_open(f);
	if (!ret)
		ret = watch(f, &f->listen_fd);
	if (!ret)
		ret = watch(f, &f->timer_fd);
	return ret;
}

static void fds_close(struct fab *f)
{
	const int fds[] = { f->listen_fd, f->proof_fd, f->spare_fd, f->timer_fd, f->epoll_fd };

	for (size_t i = 0; i < ARRAY_LEN(fds); i++)
		if (fds[i] >= 0)
			close(fds[i]);
}

static int open_as(const struct fab_config *cfg, bool maps, struct fab **out, struct err *e)
{
	struct fab *f = calloc(1, sizeof(*f));
	int ret;

	if (!f)
		return err_set(e, -ENOMEM, "fabric local: no memory");
	f->log = cfg->log;
	f->maps = maps;
	f->member = cfg->member;
	snprintf(f->job, sizeof(f->job), "%s", cfg->job ? cfg->job : "");
	f->epoll_fd = f->listen_fd = f->timer_fd = f->proof_fd = f->spare_fd = -1;
	TAILQ_INIT(&f->eps);
	TAILQ_INIT(&f->ready);
	TAILQ_INIT(&f->regions);
	TAILQ_INIT(&f->remotes);
	ret = fds_open(f);
	if (ret) {
		fds_close(f);
		free(f);
		return err_set(e, ret, "fabric local: cannot open sockets and memory files: %s", strerror(-ret));
	}
	*out = f;
	return 0;
}

static int open_mapped(const struct fab_config *cfg, struct fab **out, struct err *e)
{
	return open_as(cfg, true, out, e);
}

static int open_copied(const struct fab_config *cfg, struct fab **out, struct err *e)
{
	return open_as(cfg, false, out, e);
}

/* Endpoints first: they hold operations, operations hold memory. */
static void local_close(struct fab *f)
{
	while (!TAILQ_EMPTY(&f->eps))
		local_disconnect(TAILQ_FIRST(&f->eps));
	while (!TAILQ_EMPTY(&f->remotes))
		local_remote_close(TAILQ_FIRST(&f->remotes));
	while (!TAILQ_EMPTY(&f->regions))
		local_region_close(TAILQ_FIRST(&f->regions));
	fds_close(f);
	free(f->mapped.v);
	free(f);
}

static void on_timer(struct fab *f)
{
	uint64_t ticks;

	/* Reading makes it quiet until the next tick. */
	if (read(f->timer_fd, &ticks, sizeof(ticks)) == sizeof(ticks))
		local_greetings_expire(f);
}

static void on_socket(struct fab_ep *ep, uint32_t events, struct local_sink *s)
{
	/* What the peer sent comes before what its end would break. */
	if (events & (EPOLLIN | EPOLLHUP | EPOLLERR))
		local_ep_receive(ep, s);
	if (events & EPOLLOUT && ep->state == LOCAL_UP)
		local_ep_send_waiting(ep);
	if (ep->state == LOCAL_UP && local_ops_runnable(ep))
		local_ep_make_ready(ep);
}

static void serve_sockets(struct fab *f, struct local_sink *s)
{
	struct epoll_event ev[SOCKETS_AT_ONCE];
	int n;

	local_rx_drain(f, s);
	if (f->rx_ep || s->n == s->max)
		return;
	n = epoll_wait(f->epoll_fd, ev, SOCKETS_AT_ONCE, 0);
	/* Nothing frees an endpoint here, so that each pointer is good for the whole loop. */
	for (int i = 0; i < n; i++) {
		if (ev[i].data.ptr == &f->listen_fd)
			local_accept(f);
		else if (ev[i].data.ptr == &f->timer_fd)
			on_timer(f);
		else if (((struct fab_ep *)ev[i].data.ptr)->state <= LOCAL_UP)
			on_socket(ev[i].data.ptr, ev[i].events, s);
	}
}

static void serve_ready(struct fab *f, struct local_sink *s)
{
	struct local_eps now = TAILQ_HEAD_INITIALIZER(now);
	struct fab_ep *ep;

	/* One turn for each that is there now; what has more to do queues up behind. */
	TAILQ_CONCAT(&now, &f->ready, ready_link);
	while ((ep = TAILQ_FIRST(&now)) && s->n < s->max) {
		TAILQ_REMOVE(&now, ep, ready_link);
		ep->ready = false;
		if (ep->state == LOCAL_UP)
			local_ops_run(ep, s);
		if (ep->state == LOCAL_UP && local_ops_runnable(ep))
			local_ep_make_ready(ep);
		else if (ep->state == LOCAL_BROKEN && !ep->ready)
			local_ep_finish(ep, s);
	}
	TAILQ_CONCAT(&now, &f->ready, ready_link);
	TAILQ_CONCAT(&f->ready, &now, ready_link);
}

static uint32_t local_poll(struct fab *f, struct fab_event *out, uint32_t max)
{
	struct local_sink s = { .out = out, .max = max, .copy_left = LOCAL_COPY_BYTES };

	f->sockets_first = !f->sockets_first;
	if (f->sockets_first)
		serve_sockets(f, &s);
	serve_ready(f, &s);
	if (!f->sockets_first)
		serve_sockets(f, &s);
	return s.n;
}

static int local_fd(struct fab *f)
{
	return f->epoll_fd;
}

static bool local_arm(struct fab *f)
{
	return !f->rx_ep && TAILQ_EMPTY(&f->ready);
}

static const struct fab_counters *local_counters(const struct fab *f)
{
	return &f->counters;
}

static int local_probe(const struct fab_options *o, char reason[160])
{
	(void)o;
	snprintf(reason, 160, "shared memory, for members of one host that prove it");
	return 0;
}

static void local_describe(const struct fab_ep *ep, char *out, size_t bytes)
{
	snprintf(out, bytes, "shared memory with pid %d", (int)ep->pid);
}

#define LOCAL_OPS_TABLE                                                                                               \
	.probe = local_probe, .describe = local_describe, .close = local_close, .address = local_address,             \
	.connect = local_connect, .disconnect = local_disconnect, .region_open = local_region_open,                   \
	.region_close = local_region_close, .region_addr = local_region_addr, .export_region = local_export,          \
	.import_region = local_import, .remote_close = local_remote_close, .remote_bytes = local_remote_bytes,        \
	.map = local_map, .read = local_read, .write_notify = local_write_notify, .poll = local_poll, .fd = local_fd, \
	.arm = local_arm, .counters = local_counters

const struct fab_ops fab_local_ops = {
	.name = "local",
	.maps = true,
	.open = open_mapped,
	LOCAL_OPS_TABLE,
};

const struct fab_ops fab_local_copy_ops = {
	.name = "local-copy",
	.maps = false,
	.open = open_copied,
	LOCAL_OPS_TABLE,
};
