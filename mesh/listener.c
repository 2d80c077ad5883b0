/* SPDX-License-Identifier: Apache-2.0 */
#include "mesh/conn_internal.h"

#include <assert.h>
#include <errno.h>
#include <event2/listener.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BACKLOG 512
#define PAUSE_SECONDS 1 /* when there are no file descriptors left */

struct conn_listener {
	struct mesh_self *self;
	struct evconnlistener *ev;
	struct event *resume;
	void (*accepted)(void *ctx, struct conn *c);
	void *ctx;
	unsigned n_pending;
	struct conn_list pending; /* not through the handshake */
	char endpoint[300];
};

void listener_forget(struct conn_listener *l, struct conn *c)
{
	assert(l->n_pending > 0);
	TAILQ_REMOVE(&l->pending, c, pending);
	l->n_pending--;
	c->listener = NULL;
}

static void on_accept(struct evconnlistener *ev, evutil_socket_t fd, struct sockaddr *sa, int bytes, void *ctx)
{
	struct conn_listener *l = ctx;
	struct conn *c;

	(void)ev;
	(void)bytes;
	/* Strangers who never finish a handshake must not use up descriptors that members need. */
	if (l->n_pending >= CONN_PENDING_MAX || conn_accept(l->self, fd, sa, &c) < 0) {
		char from[80];

		endpoint_text(sa, from, sizeof(from));
		log_warn(l->self->log, "dropped a connection from %s: %u handshakes are open", from, l->n_pending);
		close(fd);
		return;
	}
	TAILQ_INSERT_TAIL(&l->pending, c, pending);
	l->n_pending++;
	c->listener = l;
	conn_enter(c);
	l->accepted(l->ctx, c);
	conn_accept_start(c);
	conn_leave(c);
}

static void on_resume(evutil_socket_t fd, short what, void *ctx)
{
	struct conn_listener *l = ctx;

	(void)fd;
	(void)what;
	evconnlistener_enable(l->ev);
}

/* Without descriptors accept fails again at once, for ever: better to look again in a while. */
static void on_accept_error(struct evconnlistener *ev, void *ctx)
{
	struct conn_listener *l = ctx;
	struct timeval later = { .tv_sec = PAUSE_SECONDS };

	log_warn(l->self->log, "cannot accept on %s: %s; trying again in %d s", l->endpoint, strerror(errno),
		 PAUSE_SECONDS);
	evconnlistener_disable(ev);
	event_add(l->resume, &later);
}

/* A bound, listening, non-blocking socket; or -Exxx. */
static int open_socket(const struct addrinfo *ai)
{
	int fd = socket(ai->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	int one = 1, rc;

	if (fd < 0)
		return -errno;
	if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)) < 0 ||
	    bind(fd, ai->ai_addr, ai->ai_addrlen) < 0 || listen(fd, BACKLOG) < 0) {
		rc = -errno;
		close(fd);
		return rc;
	}
	return fd;
}

union address {
	struct sockaddr any;
	struct sockaddr_in in;
	struct sockaddr_in6 in6;
};

static bool is_every_address(const union address *a)
{
	if (a->any.sa_family == AF_INET6)
		return IN6_IS_ADDR_UNSPECIFIED(&a->in6.sin6_addr);
	return a->in.sin_addr.s_addr == htonl(INADDR_ANY);
}

/* This host's name, if it leads anywhere; containers often have one that nobody knows. */
static bool host_name(char *out, size_t bytes)
{
	struct addrinfo *list;
	struct endpoint ep = { .port = "0" };

	if (gethostname(ep.host, sizeof(ep.host) - 1) < 0 || endpoint_resolve(&ep, false, &list, NULL) < 0)
		return false;
	freeaddrinfo(list);
	snprintf(out, bytes, "%s", ep.host);
	return true;
}

static int name_endpoint(struct conn_listener *l, int fd)
{
	union address here = { .in6 = { 0 } };
	socklen_t n = sizeof(here);
	bool v6;
	char host[256];

	if (getsockname(fd, &here.any, &n) < 0)
		return -errno;
	endpoint_text(&here.any, l->endpoint, sizeof(l->endpoint));
	if (!is_every_address(&here))
		return 0;
	v6 = here.any.sa_family == AF_INET6;
	if (!host_name(host, sizeof(host)))
		snprintf(host, sizeof(host), "%s", v6 ? "[::1]" : "127.0.0.1");
	snprintf(l->endpoint, sizeof(l->endpoint), "%s:%u", host, ntohs(v6 ? here.in6.sin6_port : here.in.sin_port));
	return 0;
}

static int bind_first(const char *endpoint, struct err *e)
{
	struct addrinfo *list = NULL;
	struct endpoint ep;
	int fd = -EADDRNOTAVAIL, rc = endpoint_parse(endpoint, &ep, e);

	if (rc == 0)
		rc = endpoint_resolve(&ep, true, &list, e);
	if (rc < 0)
		return rc;
	for (const struct addrinfo *ai = list; ai && fd < 0; ai = ai->ai_next)
		fd = open_socket(ai);
	freeaddrinfo(list);
	return fd >= 0 ? fd : err_set(e, fd, "cannot listen on %s: %s", endpoint, strerror(-fd));
}

int conn_listen(struct mesh_self *self, const char *endpoint, void (*accepted)(void *ctx, struct conn *c), void *ctx,
		struct conn_listener **out, struct err *e)
{
	struct conn_listener *l = calloc(1, sizeof(*l));
	int fd, rc;

	if (!l)
		return err_set(e, -ENOMEM, "cannot listen on %s: out of memory", endpoint);
	l->self = self;
	l->accepted = accepted;
	l->ctx = ctx;
	TAILQ_INIT(&l->pending);
	fd = bind_first(endpoint, e);
	rc = fd;
	if (fd < 0)
		goto err_listener;
	rc = name_endpoint(l, fd);
	l->resume = event_new(self->base, -1, 0, on_resume, l);
	/* Already listening: a backlog of 0 says so. */
	l->ev = evconnlistener_new(self->base, on_accept, l, LEV_OPT_CLOSE_ON_EXEC | LEV_OPT_CLOSE_ON_FREE, 0, fd);
	if (rc < 0 || !l->resume || !l->ev)
		goto err_socket;
	evconnlistener_set_error_cb(l->ev, on_accept_error);
	*out = l;
	return 0;
err_socket:
	rc = err_set(e, rc < 0 ? rc : -ENOMEM, "cannot listen on %s", endpoint);
	if (l->resume)
		event_free(l->resume);
	if (l->ev)
		evconnlistener_free(l->ev);
	else
		close(fd);
err_listener:
	free(l);
	return rc;
}

void conn_listener_free(struct conn_listener *l)
{
	if (!l)
		return;
	while (!TAILQ_EMPTY(&l->pending))
		listener_forget(l, TAILQ_FIRST(&l->pending));
	event_free(l->resume);
	evconnlistener_free(l->ev);
	free(l);
}

const char *conn_listener_endpoint(const struct conn_listener *l)
{
	return l->endpoint;
}
