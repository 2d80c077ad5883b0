/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A connection: framed, checked messages over one TCP socket, owned by the
 * control thread.
 *
 *   connecting side: WAITING <-> CONNECTING -> CHALLENGE -> ACCEPTED -> READY
 *   accepting side:                   HELLO -> RESPONSE --------------> READY
 *   both: any of these -> CLOSING -> CLOSED, or straight to CLOSED
 *
 * Lifetime. closed() is called exactly once, and the memory goes when the last
 * callback of this connection on the stack has returned (depth), so an owner may
 * close, send or replace its ops from inside any callback. conn_close never
 * calls back from within: the end comes from the loop.
 *
 * CLOSING. A socket that is closed while unread bytes lie in it is reset, and a
 * reset destroys what the peer has not read yet: a last REJECT or SHUTDOWN would
 * be lost. So we flush, end our direction, and read (and drop) until the peer
 * ends its own, for CONN_CLOSE_NS at most.
 *
 * Limits. Input is read no further than one largest message; before the
 * handshake is done, no further than one small one. Output that the peer does
 * not read stops at CONN_OUTPUT_MAX: conn_send then says -ENOBUFS and the owner
 * decides. One timer a connection carries the deadline of its state.
 */
#include "mesh/conn_internal.h"
#include "mesh/wire_internal.h"

#include <assert.h>
#include <errno.h>
#include <event2/buffer.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define READ_AT_ONCE (256u << 10)
#define KEEPALIVE_IDLE_S 10
#define KEEPALIVE_INTERVAL_S 5
#define KEEPALIVE_PROBES 3

static const char *const role_name[] = {
	[ROLE_SHARD] = "shard",
	[ROLE_WORKER] = "worker",
	[ROLE_COORDINATOR] = "coordinator",
	[ROLE_OBSERVER] = "observer",
};

static void on_timer(evutil_socket_t fd, short what, void *ctx);
static void on_read(struct bufferevent *bev, void *ctx);
static void on_written(struct bufferevent *bev, void *ctx);
static void on_event(struct bufferevent *bev, short what, void *ctx);

/* ---------------------------------------------------------------- lifetime */

/* libevent writes without MSG_NOSIGNAL, and a peer that has gone must not end the program. */
static void ignore_sigpipe(void)
{
	struct sigaction sa;

	if (sigaction(SIGPIPE, NULL, &sa) == 0 && !(sa.sa_flags & SA_SIGINFO) && sa.sa_handler == SIG_DFL)
		signal(SIGPIPE, SIG_IGN);
}

static int conn_new(struct mesh_self *self, struct conn **out)
{
	struct conn *c = calloc(1, sizeof(*c));

	if (!c)
		return -ENOMEM;
	ignore_sigpipe();
	c->self = self;
	c->timer = event_new(self->base, -1, 0, on_timer, c);
	if (!c->timer) {
		free(c);
		return -ENOMEM;
	}
	*out = c;
	return 0;
}

static void destroy(struct conn *c)
{
	assert(c->depth == 0 && !c->listener);
	if (c->bev)
		bufferevent_free(c->bev);
	event_free(c->timer);
	free(c);
}

void conn_enter(struct conn *c)
{
	/* Callbacks call back a few levels deep at most. */
	assert(c->depth < 8);
	c->depth++;
}

void conn_leave(struct conn *c)
{
	assert(c->depth > 0);
	if (--c->depth == 0 && c->state == CONN_CLOSED)
		destroy(c);
}

static void stop(struct conn *c)
{
	c->state = CONN_CLOSED;
	event_del(c->timer);
	if (c->bev)
		bufferevent_disable(c->bev, EV_READ | EV_WRITE);
	if (c->listener)
		listener_forget(c->listener, c);
}

static void finish(struct conn *c, int status, const char *text)
{
	/* Only from within a callback of ours, whose conn_leave frees c. */
	assert(c->depth > 0);
	if (c->state == CONN_CLOSED)
		return;
	stop(c);
	/* The socket is closed before the owner hears of it: a peer must not wait for our owner's clean-up. */
	if (c->bev)
		bufferevent_free(c->bev);
	c->bev = NULL;
	c->ops->closed(c, status, text, c->ctx);
}

void conn_fail(struct conn *c, int status, const char *fmt, ...)
{
	char text[sizeof(c->why)];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	finish(c, status, text);
}

/* Without the loop's help: the little that is queued at the end of a program nearly always fits the socket. */
static void write_out(struct bufferevent *bev)
{
	struct evbuffer *out = bufferevent_get_output(bev);
	int fd = bufferevent_getfd(bev);

	bufferevent_disable(bev, EV_WRITE);
	evbuffer_unfreeze(out, 1);
	while (evbuffer_get_length(out) > 0 && evbuffer_write(out, fd) > 0)
		;
	shutdown(fd, SHUT_WR);
}

void conn_free(struct conn *c)
{
	if (!c || c->state == CONN_CLOSED)
		return;
	if (c->bev && c->state >= CONN_HELLO && !c->output_ended)
		write_out(c->bev);
	conn_enter(c);
	stop(c);
	conn_leave(c);
}

void conn_timer(struct conn *c, uint64_t ns)
{
	struct timeval tv = { .tv_sec = (time_t)(ns / 1000000000u), .tv_usec = (suseconds_t)(ns % 1000000000u / 1000) };

	event_add(c->timer, &tv);
}

/* ----------------------------------------------------------------- closing */

static void end_output(struct conn *c)
{
	if (c->output_ended || evbuffer_get_length(bufferevent_get_output(c->bev)) > 0)
		return;
	c->output_ended = true;
	shutdown(bufferevent_getfd(c->bev), SHUT_WR);
}

void conn_close_status(struct conn *c, int status, const char *why)
{
	if (c->state == CONN_CLOSING || c->state == CONN_CLOSED)
		return;
	c->status = status;
	snprintf(c->why, sizeof(c->why), "%s", why);
	if (c->state < CONN_HELLO) {
		/* Nobody is at the other end; the timer only brings us back to the loop. */
		c->state = CONN_CLOSING;
		conn_timer(c, 0);
		return;
	}
	c->state = CONN_CLOSING;
	conn_timer(c, CONN_CLOSE_NS);
	bufferevent_setwatermark(c->bev, EV_READ, 0, 0);
	bufferevent_enable(c->bev, EV_READ);
	end_output(c);
}

void conn_close(struct conn *c, const char *why)
{
	conn_close_status(c, 0, why);
}

void conn_refuse(struct conn *c, uint32_t exit_code, const char *fmt, ...)
{
	struct msg_reject m = { .exit_code = exit_code };
	char why[sizeof(m.text) + 32];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(m.text, sizeof(m.text), fmt, ap);
	va_end(ap);
	atomic_fetch_add_explicit(&c->self->auth_failures, 1, memory_order_relaxed);
	log_warn(c->self->log, "refused the connection with %s: %s", c->peer_text, m.text);
	(void)conn_send(c, WIRE_REJECT, &m);
	snprintf(why, sizeof(why), "refused: %s", m.text);
	conn_close_status(c, -EPERM, why);
}

/* ----------------------------------------------------------------- sending */

int conn_send(struct conn *c, unsigned type, const void *msg)
{
	struct mesh_self *self = c->self;
	struct wire_header h = {
		.magic = WIRE_MAGIC,
		.protocol = WIRE_PROTOCOL,
		.type = (uint16_t)type,
		.branch = self->branch,
		.term = self->term,
		.epoch = self->epoch,
		.step = self->step,
		.sender = self->member,
	};
	int body = wire_size(type, msg);
	struct evbuffer_iovec v;
	struct evbuffer *out;

	if (c->state < CONN_HELLO || c->state > CONN_READY)
		return -EPIPE;
	if (body < 0)
		return body == -ENOSPC ? -EMSGSIZE : body;
	out = bufferevent_get_output(c->bev);
	if (evbuffer_get_length(out) + sizeof(h) + (size_t)body > CONN_OUTPUT_MAX)
		return -ENOBUFS;
	if (evbuffer_reserve_space(out, (ev_ssize_t)(sizeof(h) + (size_t)body), &v, 1) < 0)
		return -ENOMEM;
	h.body_bytes = (uint32_t)body;
	h.sequence = ++c->sent;
	wire_encode(type, msg, (uint8_t *)v.iov_base + sizeof(h), (size_t)body);
	wire_seal(&h, (const uint8_t *)v.iov_base + sizeof(h));
	memcpy(v.iov_base, &h, sizeof(h));
	v.iov_len = sizeof(h) + (size_t)body;
	evbuffer_commit_space(out, &v, 1);
	atomic_fetch_add_explicit(&self->messages_sent, 1, memory_order_relaxed);
	atomic_fetch_add_explicit(&self->bytes_sent, v.iov_len, memory_order_relaxed);
	return 0;
}

/* --------------------------------------------------------------- receiving */

static bool in_handshake(const struct conn *c)
{
	return c->state >= CONN_HELLO && c->state < CONN_READY;
}

/* What the header alone says, before its body is waited for. */
static int check_header(struct conn *c, const struct wire_header *h)
{
	struct err e;
	int rc;

	/* A program of another protocol must hear why, not only see the connection end. */
	if (h->magic == WIRE_MAGIC && h->protocol != WIRE_PROTOCOL && in_handshake(c)) {
		conn_refuse(c, EXIT_CONFIG, "protocol %u, this side speaks protocol %u", h->protocol, WIRE_PROTOCOL);
		return -EPERM;
	}
	rc = wire_check_header(h, &e);
	if (rc == 0 && in_handshake(c) && h->body_bytes > CONN_HANDSHAKE_BODY_MAX)
		rc = err_set(&e, -EPROTO, "%s of %u bytes in the handshake", wire_name(h->type), h->body_bytes);
	if (rc < 0)
		conn_fail(c, rc, "%s", e.text);
	return rc;
}

static int check_order(const struct conn *c, const struct wire_header *h, struct err *e)
{
	if (h->sequence != c->received + 1)
		return err_set(e, -EPROTO, "%s is message %llu, message %llu was expected", wire_name(h->type),
			       (unsigned long long)h->sequence, (unsigned long long)c->received + 1);
	/* A member that was only just named still writes 0. */
	if (c->state == CONN_READY && h->sender != 0 && h->sender != c->member)
		return err_set(e, -EPROTO, "%s in the name of member %u", wire_name(h->type), h->sender);
	return 0;
}

static void deliver(struct conn *c, const struct wire_header *h, const uint8_t *body)
{
	union wire_msg m;
	struct err e;
	int rc = wire_check(h, body, &e);

	if (rc == 0)
		rc = check_order(c, h, &e);
	if (rc == 0 && wire_decode(h->type, body, h->body_bytes, &m) < 0)
		rc = err_set(&e, -EPROTO, "%s with a body that cannot be read", wire_name(h->type));
	if (rc < 0) {
		conn_fail(c, rc, "%s", e.text);
		return;
	}
	c->received++;
	atomic_fetch_add_explicit(&c->self->messages_received, 1, memory_order_relaxed);
	atomic_fetch_add_explicit(&c->self->bytes_received, sizeof(*h) + h->body_bytes, memory_order_relaxed);
	if (in_handshake(c)) {
		handshake_message(c, h->type, &m);
		return;
	}
	rc = c->ops->message(c, h, &m, c->ctx);
	if (rc < 0)
		conn_fail(c, rc, "%s was not accepted: %s", wire_name(h->type), strerror(-rc));
}

/* One message, if a whole one is there. False: wait for more, or the connection is over. */
static bool take_message(struct conn *c)
{
	struct evbuffer *in = bufferevent_get_input(c->bev);
	struct wire_header h;
	const uint8_t *whole;
	size_t bytes;

	if (evbuffer_copyout(in, &h, sizeof(h)) < (ev_ssize_t)sizeof(h))
		return false;
	if (check_header(c, &h) < 0)
		return false;
	bytes = sizeof(h) + h.body_bytes;
	if (evbuffer_get_length(in) < bytes)
		return false;
	whole = evbuffer_pullup(in, (ev_ssize_t)bytes);
	if (!whole) {
		conn_fail(c, -ENOMEM, "out of memory for %s", wire_name(h.type));
		return false;
	}
	deliver(c, &h, whole + sizeof(h));
	if (c->state == CONN_CLOSED)
		return false;
	evbuffer_drain(in, bytes);
	return true;
}

static void on_read(struct bufferevent *bev, void *ctx)
{
	struct conn *c = ctx;

	conn_enter(c);
	while (c->state >= CONN_HELLO && c->state <= CONN_READY && take_message(c))
		;
	if (c->state == CONN_CLOSING)
		evbuffer_drain(bufferevent_get_input(bev), evbuffer_get_length(bufferevent_get_input(bev)));
	conn_leave(c);
}

static void on_written(struct bufferevent *bev, void *ctx)
{
	struct conn *c = ctx;

	(void)bev;
	if (c->state == CONN_CLOSING)
		end_output(c);
}

static void on_end(struct conn *c, short what, int error)
{
	bool eof = what & BEV_EVENT_EOF;

	if (c->state == CONN_CLOSING)
		finish(c, c->status, c->why);
	else if (error == ETIMEDOUT)
		conn_fail(c, -ETIMEDOUT, "the peer's host does not answer any more");
	else if (c->state != CONN_READY)
		conn_fail(c, -ECONNRESET, "connection closed by %s in the handshake", c->peer_text);
	else if (eof && evbuffer_get_length(bufferevent_get_input(c->bev)) > 0)
		conn_fail(c, -ECONNRESET, "connection closed in the middle of a message");
	else
		conn_fail(c, -ECONNRESET, "%s", eof || error == 0 ? "connection closed" : strerror(error));
}

/* -------------------------------------------------------------- connecting */

/* Small messages go at once, and a host that vanished is noticed even when we have nothing to say. */
static void set_socket_options(int fd)
{
	int one = 1, idle = KEEPALIVE_IDLE_S, interval = KEEPALIVE_INTERVAL_S, probes = KEEPALIVE_PROBES;

	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof(one));
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof(idle));
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof(interval));
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof(probes));
}

static void set_bufferevent(struct conn *c)
{
	bufferevent_setcb(c->bev, on_read, on_written, on_event, c);
	bufferevent_set_max_single_read(c->bev, READ_AT_ONCE);
	bufferevent_setwatermark(c->bev, EV_READ, 0, sizeof(struct wire_header) + CONN_HANDSHAKE_BODY_MAX);
}

#define RETRY_FIRST_NS 50000000ull
#define RETRY_MAX_NS 1000000000ull
#define TRY_MIN_NS 1000000000ull
#define TRY_MAX_NS 5000000000ull

/* What is left until a deadline, within bounds. */
static uint64_t patience(uint64_t deadline_ns, uint64_t min_ns, uint64_t max_ns)
{
	uint64_t now = clock_now_ns();
	uint64_t left = deadline_ns > now ? deadline_ns - now : 0;

	return left < min_ns ? min_ns : left > max_ns ? max_ns : left;
}

/* 50 ms, doubling to 1 s; text: what went wrong this time. */
static void try_later(struct conn *c, const char *text)
{
	uint64_t now = clock_now_ns();
	uint64_t wait = c->tries < 6 ? RETRY_FIRST_NS << (c->tries - 1) : RETRY_MAX_NS;

	if (c->bev)
		bufferevent_free(c->bev);
	c->bev = NULL;
	c->state = CONN_WAITING;
	if (now >= c->deadline_ns) {
		conn_fail(c, -ETIMEDOUT, "%s for %.0f s", text, clock_seconds(now - c->started_ns));
		return;
	}
	if (c->tries == 1)
		log_info(c->self->log, "%s; trying again until it answers", text);
	conn_timer(c, wait < c->deadline_ns - now ? wait : c->deadline_ns - now);
}

static void try_failed(struct conn *c, int error)
{
	char text[200];

	if (error == ECONNREFUSED)
		snprintf(text, sizeof(text), "connection refused by %s", c->address);
	else
		snprintf(text, sizeof(text), "%s does not answer (%s)", c->address, strerror(error));
	try_later(c, text);
}

/* Tries go round the addresses that the name has. */
static const struct addrinfo *pick_address(const struct addrinfo *list, unsigned try)
{
	const struct addrinfo *ai = list;
	unsigned n = 0;

	for (; ai; ai = ai->ai_next)
		n++;
	assert(n > 0);
	ai = list;
	for (unsigned i = 0; i < try % n; i++)
		ai = ai->ai_next;
	return ai;
}

static void try_connect(struct conn *c)
{
	struct addrinfo *list;
	const struct addrinfo *ai;
	struct err e;

	c->tries++;
	if (endpoint_resolve(&c->endpoint, false, &list, &e) < 0) {
		try_later(c, e.text);
		return;
	}
	ai = pick_address(list, c->tries - 1);
	endpoint_text(ai->ai_addr, c->address, sizeof(c->address));
	snprintf(c->peer_text, sizeof(c->peer_text), "%s", c->address);
	c->bev = bufferevent_socket_new(c->self->base, -1, BEV_OPT_CLOSE_ON_FREE);
	if (!c->bev) {
		conn_fail(c, -ENOMEM, "out of memory");
		goto out;
	}
	set_bufferevent(c);
	c->state = CONN_CONNECTING;
	conn_timer(c, patience(c->deadline_ns, TRY_MIN_NS, TRY_MAX_NS));
	/* Failing at once, it may have called on_event already. */
	if (bufferevent_socket_connect(c->bev, ai->ai_addr, (int)ai->ai_addrlen) < 0 && c->state == CONN_CONNECTING)
		try_failed(c, errno);
out:
	freeaddrinfo(list);
}

/*
 * TCP lets a socket connect to itself: a port of the ephemeral range on our own
 * host, where nobody listens yet, may be picked as the source of a try.
 */
static bool connected_to_itself(int fd)
{
	struct sockaddr_storage here = { 0 }, there = { 0 };
	socklen_t n = sizeof(here), m = sizeof(there);

	return getsockname(fd, (struct sockaddr *)&here, &n) == 0 &&
	       getpeername(fd, (struct sockaddr *)&there, &m) == 0 && n == m && memcmp(&here, &there, n) == 0;
}

static void on_connected(struct conn *c)
{
	if (connected_to_itself(bufferevent_getfd(c->bev))) {
		try_failed(c, ECONNREFUSED);
		return;
	}
	set_socket_options(bufferevent_getfd(c->bev));
	bufferevent_enable(c->bev, EV_READ | EV_WRITE);
	/* A peer that is alive but busy starting up answers late; strangers are the accepting side's worry. */
	conn_timer(c, patience(c->deadline_ns, CONN_HANDSHAKE_NS, UINT64_MAX));
	c->state = CONN_CHALLENGE;
	handshake_start(c);
}

static void on_event(struct bufferevent *bev, short what, void *ctx)
{
	int error = errno;
	struct conn *c = ctx;

	(void)bev;
	conn_enter(c);
	if (c->state == CONN_CLOSED)
		;
	else if (what & BEV_EVENT_CONNECTED)
		on_connected(c);
	else if (c->state == CONN_CONNECTING)
		try_failed(c, error);
	else
		on_end(c, what, what & BEV_EVENT_ERROR ? error : 0);
	conn_leave(c);
}

static void on_timer(evutil_socket_t fd, short what, void *ctx)
{
	struct conn *c = ctx;

	(void)fd;
	(void)what;
	conn_enter(c);
	switch (c->state) {
	case CONN_WAITING:
		try_connect(c);
		break;
	case CONN_CONNECTING:
		try_failed(c, ETIMEDOUT);
		break;
	case CONN_CLOSING:
		finish(c, c->status, c->why);
		break;
	case CONN_CLOSED:
		break;
	default:
		conn_fail(c, -ETIMEDOUT, "the handshake with %s was not finished in time", c->peer_text);
	}
	conn_leave(c);
}

int conn_connect(struct mesh_self *self, const char *endpoint, uint64_t deadline_ns, const struct conn_ops *ops,
		 void *ctx, struct conn **out, struct err *e)
{
	struct endpoint ep;
	struct conn *c;
	int rc = endpoint_parse(endpoint, &ep, e);

	if (rc < 0)
		return rc;
	rc = conn_new(self, &c);
	if (rc < 0)
		return err_set(e, rc, "cannot connect to %s: out of memory", endpoint);
	c->connecting_side = true;
	c->ops = ops;
	c->ctx = ctx;
	c->endpoint = ep;
	c->started_ns = clock_now_ns();
	c->deadline_ns = deadline_ns;
	c->state = CONN_WAITING;
	snprintf(c->peer_text, sizeof(c->peer_text), "%.100s", endpoint);
	/* From the loop, so that nothing is called back before *out is known. */
	conn_timer(c, 0);
	*out = c;
	return 0;
}

/* --------------------------------------------------------------- accepting */

int conn_accept(struct mesh_self *self, int fd, const struct sockaddr *sa, struct conn **out)
{
	struct conn *c;
	int rc = conn_new(self, &c);

	if (rc < 0)
		return rc;
	c->bev = bufferevent_socket_new(self->base, fd, BEV_OPT_CLOSE_ON_FREE);
	if (!c->bev) {
		destroy(c);
		return -ENOMEM;
	}
	c->state = CONN_HELLO;
	endpoint_text(sa, c->address, sizeof(c->address));
	snprintf(c->peer_text, sizeof(c->peer_text), "%s", c->address);
	set_socket_options(fd);
	set_bufferevent(c);
	*out = c;
	return 0;
}

void conn_accept_start(struct conn *c)
{
	if (c->state != CONN_HELLO)
		return;
	assert(c->ops);
	conn_timer(c, CONN_HANDSHAKE_NS);
	bufferevent_enable(c->bev, EV_READ | EV_WRITE);
}

/* ------------------------------------------------------------------- ready */

static void name_peer(struct conn *c)
{
	if (c->member)
		snprintf(c->peer_text, sizeof(c->peer_text), "%s %u (%s)", role_name[c->role], c->member, c->address);
	else
		snprintf(c->peer_text, sizeof(c->peer_text), "%s (%s)", role_name[c->role], c->address);
}

void conn_is_ready(struct conn *c, uint32_t role, uint32_t member)
{
	assert(role >= ROLE_SHARD && role <= ROLE_OBSERVER);
	c->state = CONN_READY;
	c->role = (enum member_role)role;
	c->member = member;
	name_peer(c);
	event_del(c->timer);
	if (c->listener)
		listener_forget(c->listener, c);
	bufferevent_setwatermark(c->bev, EV_READ, 0, sizeof(struct wire_header) + WIRE_BODY_MAX);
	c->ops->ready(c, c->ctx);
}

enum member_role conn_role(const struct conn *c)
{
	return c->role;
}

uint32_t conn_member(const struct conn *c)
{
	return c->member;
}

void conn_set_member(struct conn *c, uint32_t member)
{
	c->member = member;
	name_peer(c);
}

void *conn_ctx(const struct conn *c)
{
	return c->ctx;
}

void conn_set_ctx(struct conn *c, const struct conn_ops *ops, void *ctx)
{
	c->ops = ops;
	c->ctx = ctx;
}

const char *conn_peer_text(const struct conn *c)
{
	return c->peer_text;
}

uint32_t conn_reject_code(const struct conn *c)
{
	return c->reject_code;
}
