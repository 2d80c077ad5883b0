/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A connection of the provider `local`, from greeting to end.
 *
 * Each instance listens on an abstract Unix socket with a random name. An
 * address is that name and a key that is good once; who has it was let in by
 * the control connection. The kernel says who the other process is (SO_PEERCRED):
 * only our own user is talked to.
 *
 *   connecting side                         accepting side
 *   WAIT_WELCOME  -- HELLO key, file ----->  WAIT_HELLO    key known? it is used up
 *                 <- WELCOME hash, file ---  WAIT_PROOF    hash of the file in HELLO
 *   WAIT_READY    -- PROOF hash ---------->                hash right?
 *   UP            <- READY ----------------  UP            FAB_EV_ACCEPTED
 *   FAB_EV_CONNECTED
 *
 * Each side hashes a random file of the other through a mapping of it, seeded
 * with the key, so that an endpoint is used only where memory is truly shared.
 * A greeting that is wrong in any way, or takes longer than LOCAL_GREETING_NS,
 * breaks the endpoint. The connecting side then gets FAB_EV_DOWN; the accepting
 * user never heard of it, so it is only logged, counted and freed.
 *
 * Endings are all alike: local_ep_break closes the socket and puts the endpoint
 * on the ready list, fab_poll completes what was posted, then says FAB_EV_DOWN,
 * once. Nothing but fab_disconnect frees an endpoint that the user knows.
 */
#include "rdma/local.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <unistd.h>

#define ADDRESS_MAGIC 0x31414d53u /* "SMA1" */
#define MESSAGES_AT_ONCE 8

/* -------------------------------------------------------------- addresses */

int local_address(struct fab *f, uint64_t user, struct fab_blob *out)
{
	struct local_address one = { .user = user };
	struct local_where a = { .magic = ADDRESS_MAGIC };
	int ret = local_random(one.key, sizeof(one.key));

	if (ret)
		return ret;
	if (f->address_n == LOCAL_ADDRESSES) {
		log_warn(f->log, "fabric: %u addresses were given out and not used: the oldest is void", f->address_n);
		memmove(f->addresses, f->addresses + 1, --f->address_n * sizeof(*f->addresses));
	}
	f->addresses[f->address_n++] = one;
	memcpy(a.key, one.key, sizeof(a.key));
	memcpy(a.socket_name, f->socket_name, sizeof(a.socket_name));
	out->bytes = sizeof(a);
	memcpy(out->data, &a, sizeof(a));
	return 0;
}

/* A key is good once: finding it removes it. */
static int address_use(struct fab *f, const uint8_t key[LOCAL_KEY_BYTES], uint64_t *user)
{
	for (uint32_t i = 0; i < f->address_n; i++) {
		if (memcmp(f->addresses[i].key, key, LOCAL_KEY_BYTES))
			continue;
		*user = f->addresses[i].user;
		f->address_n--;
		memmove(&f->addresses[i], &f->addresses[i + 1], (f->address_n - i) * sizeof(*f->addresses));
		return 0;
	}
	return -EACCES;
}

/* -------------------------------------------------------- life of endpoint */

static bool greeting(const struct fab_ep *ep)
{
	return ep->state < LOCAL_UP;
}

/* The timer runs while somebody is greeting. It only wakes us: what is late is decided by the clock. */
static void timer_set(struct fab *f, bool on)
{
	const struct timespec second = { .tv_sec = on };
	const struct itimerspec t = { .it_interval = second, .it_value = second };
	int ret = timerfd_settime(f->timer_fd, 0, &t, NULL);

	assert(!ret);
	(void)ret;
}

static void greeting_starts(struct fab_ep *ep)
{
	ep->deadline_ns = clock_now_ns() + LOCAL_GREETING_NS;
	if (ep->fab->greetings++ == 0)
		timer_set(ep->fab, true);
}

static void greeting_ends(struct fab_ep *ep)
{
	assert(ep->fab->greetings > 0);
	if (--ep->fab->greetings == 0)
		timer_set(ep->fab, false);
}

/* Takes sock over on success. */
static int ep_create(struct fab *f, int sock, pid_t pid, enum local_state state, struct fab_ep **out)
{
	struct epoll_event ev = { .events = EPOLLIN };
	struct fab_ep *ep = calloc(1, sizeof(*ep));

	if (!ep)
		return -ENOMEM;
	ev.data.ptr = ep;
	if (epoll_ctl(f->epoll_fd, EPOLL_CTL_ADD, sock, &ev)) {
		int ret = -errno;

		free(ep);
		return ret;
	}
	ep->fab = f;
	ep->sock = sock;
	ep->pid = pid;
	ep->state = state;
	TAILQ_INSERT_TAIL(&f->eps, ep, link);
	greeting_starts(ep);
	*out = ep;
	return 0;
}

static void parcels_close(struct local_parcel *p, uint32_t *n)
{
	while (*n > 0)
		close(p[--*n].fd);
}

/* A child of fork may still hold the socket: taken out of the set by hand, and shut for both. */
static void ep_close_socket(struct fab_ep *ep)
{
	(void)epoll_ctl(ep->fab->epoll_fd, EPOLL_CTL_DEL, ep->sock, NULL);
	(void)shutdown(ep->sock, SHUT_RDWR);
	close(ep->sock);
}

static void ep_free(struct fab_ep *ep)
{
	struct fab *f = ep->fab;
	struct fab_remote *r;

	if (ep->state < LOCAL_BROKEN) {
		if (greeting(ep))
			greeting_ends(ep);
		ep_close_socket(ep);
	}
	local_ops_drop(ep);
	parcels_close(ep->arrived, &ep->arrived_n);
	parcels_close(ep->leaving, &ep->leaving_n);
	TAILQ_FOREACH(r, &f->remotes, link)
	if (r->ep == ep)
		r->ep = NULL;
	if (f->rx_ep == ep)
		f->rx_ep = NULL;
	if (ep->ready)
		TAILQ_REMOVE(&f->ready, ep, ready_link);
	TAILQ_REMOVE(&f->eps, ep, link);
	free(ep);
}

void local_ep_make_ready(struct fab_ep *ep)
{
	if (ep->ready)
		return;
	ep->ready = true;
	TAILQ_INSERT_TAIL(&ep->fab->ready, ep, ready_link);
}

void local_ep_break(struct fab_ep *ep, int status, const char *why)
{
	bool fault = greeting(ep) || status != -ECONNRESET;

	if (ep->state >= LOCAL_BROKEN)
		return;
	if (greeting(ep))
		greeting_ends(ep);
	/* An established peer that goes is nothing unusual; whoever posted something hears of it. */
	if (fault) {
		local_count(&ep->fab->counters.errors, 1);
		log_warn(ep->fab->log, "fabric: the connection %s process %d is %s: %s: %s", ep->known ? "with" : "of",
			 (int)ep->pid, ep->known ? "broken" : "refused", why, strerror(-status));
	}
	ep_close_socket(ep);
	parcels_close(ep->arrived, &ep->arrived_n);
	parcels_close(ep->leaving, &ep->leaving_n);
	ep->status = status;
	ep->state = LOCAL_BROKEN;
	local_ep_make_ready(ep);
}

void local_ep_finish(struct fab_ep *ep, struct local_sink *s)
{
	if (!ep->known) {
		ep_free(ep);
		return;
	}
	/* What the peer said before the end comes before the end. */
	if (ep->fab->rx_ep == ep)
		local_rx_drain(ep->fab, s);
	if (!local_ops_flush(ep, s) || s->n == s->max) {
		local_ep_make_ready(ep);
		return;
	}
	ep->state = LOCAL_DOWN;
	local_emit(s, (struct fab_event){ .type = FAB_EV_DOWN, .status = ep->status, .ep = ep, .user = ep->user });
}

void local_disconnect(struct fab_ep *ep)
{
	/* Notices of completed writes go out if there is room; a peer that reads nothing does not hold us. */
	if (ep->state == LOCAL_UP)
		local_ep_send_waiting(ep);
	ep_free(ep);
}

void local_greetings_expire(struct fab *f)
{
	uint64_t now = clock_now_ns();
	struct fab_ep *ep;

	TAILQ_FOREACH(ep, &f->eps, link)
	if (greeting(ep) && now >= ep->deadline_ns)
		local_ep_break(ep, -ETIMEDOUT, "the greeting took too long");
}

/* --------------------------------------------------------------- greeting */

/* Is the process at the other end of the socket our own user's? */
static int check_user(struct fab *f, int sock, pid_t *pid)
{
	struct ucred peer;
	socklen_t len = sizeof(peer);

	if (getsockopt(sock, SOL_SOCKET, SO_PEERCRED, &peer, &len))
		return -errno;
	if (peer.uid != geteuid()) {
		log_warn(f->log, "fabric: process %d belongs to user %u, we to %u", (int)peer.pid, (unsigned)peer.uid,
			 (unsigned)geteuid());
		return -EACCES;
	}
	*pid = peer.pid;
	return 0;
}

static void refuse(struct fab *f, int sock, int status)
{
	local_count(&f->counters.errors, 1);
	log_warn(f->log, "fabric: a connection was refused: %s", strerror(-status));
	close(sock);
}

/*
 * No file descriptor is left to accept with, and the listening socket would
 * wake us for ever: the spare one is given up for it, so that the peer hears at
 * once that it is not wanted.
 */
static void accept_without_fd(struct fab *f)
{
	int sock;

	if (f->spare_fd >= 0)
		close(f->spare_fd);
	sock = accept4(f->listen_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
	if (sock >= 0)
		refuse(f, sock, -EMFILE);
	f->spare_fd = dup(f->epoll_fd);
}

static void accept_one(struct fab *f, int sock)
{
	struct fab_ep *ep;
	pid_t pid = 0;
	int ret = check_user(f, sock, &pid);

	if (!ret)
		ret = ep_create(f, sock, pid, LOCAL_WAIT_HELLO, &ep);
	if (ret)
		refuse(f, sock, ret);
}

void local_accept(struct fab *f)
{
	for (uint32_t i = 0; i < MESSAGES_AT_ONCE; i++) {
		int sock = accept4(f->listen_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);

		if (sock >= 0) {
			accept_one(f, sock);
		} else if (errno == EMFILE || errno == ENFILE) {
			accept_without_fd(f);
			return;
		} else {
			return;
		}
	}
}

/* A greeting has a fresh socket: that it is full is no reason to wait, and a peer that has gone refuses. */
static int say(struct fab_ep *ep, const struct local_msg *m, int fd)
{
	int ret = local_send(ep->sock, m, fd);

	return ret == -EPIPE || ret == -ECONNRESET ? -ECONNREFUSED : ret;
}

static int say_hello(struct fab_ep *ep)
{
	struct local_msg m;

	local_msg_init(&m, LOCAL_HELLO, 0);
	memcpy(m.key, ep->key, sizeof(m.key));
	return say(ep, &m, ep->fab->proof_fd);
}

static int dial(struct fab *f, const struct local_where *a, int *out, pid_t *pid)
{
	struct sockaddr_un to = { .sun_family = AF_UNIX };
	socklen_t len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + sizeof(a->socket_name));
	int sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	int ret;

	if (sock < 0)
		return -errno;
	memcpy(to.sun_path + 1, a->socket_name, sizeof(a->socket_name));
	ret = connect(sock, (struct sockaddr *)&to, len) ? -errno : check_user(f, sock, pid);
	if (ret) {
		close(sock);
		return ret;
	}
	*out = sock;
	return 0;
}

int local_connect(struct fab *f, const struct fab_blob *address, uint64_t user, struct fab_ep **out)
{
	struct local_where a;
	struct fab_ep *ep = NULL;
	pid_t pid = 0;
	int sock = -1, ret;

	if (address->bytes != sizeof(a))
		return -EINVAL;
	memcpy(&a, address->data, sizeof(a));
	if (a.magic != ADDRESS_MAGIC)
		return -EINVAL;
	ret = dial(f, &a, &sock, &pid);
	if (ret)
		return ret;
	ret = ep_create(f, sock, pid, LOCAL_WAIT_WELCOME, &ep);
	if (ret) {
		close(sock);
		return ret;
	}
	assert(ep);
	ep->user = user;
	memcpy(ep->key, a.key, sizeof(ep->key));
	ret = say_hello(ep);
	if (ret) {
		ep_free(ep);
		return ret;
	}
	ep->known = true;
	*out = ep;
	return 0;
}

static void up(struct fab_ep *ep, struct local_sink *s, enum fab_event_type type)
{
	greeting_ends(ep);
	ep->state = LOCAL_UP;
	ep->known = true;
	local_count(&ep->fab->counters.connects, 1);
	local_emit(s, (struct fab_event){ .type = type, .ep = ep, .user = ep->user });
}

static int on_hello(struct fab_ep *ep, const struct local_msg *m, int fd)
{
	struct local_msg answer;
	int ret = address_use(ep->fab, m->key, &ep->user);

	if (ret)
		return ret;
	memcpy(ep->key, m->key, sizeof(ep->key));
	local_msg_init(&answer, LOCAL_WELCOME, 0);
	ret = local_proof_hash(fd, ep->key, answer.hash);
	if (!ret)
		ret = say(ep, &answer, ep->fab->proof_fd);
	if (!ret)
		ep->state = LOCAL_WAIT_PROOF;
	return ret;
}

/* Has the other side read our file? */
static int check_hash(const struct fab_ep *ep, const uint64_t hash[2])
{
	uint64_t ours[2];
	int ret = local_proof_hash(ep->fab->proof_fd, ep->key, ours);

	if (ret)
		return ret;
	return hash[0] == ours[0] && hash[1] == ours[1] ? 0 : -EXDEV;
}

static int on_welcome(struct fab_ep *ep, const struct local_msg *m, int fd)
{
	struct local_msg answer;
	int ret = check_hash(ep, m->hash);

	if (ret)
		return ret;
	local_msg_init(&answer, LOCAL_PROOF, 0);
	ret = local_proof_hash(fd, ep->key, answer.hash);
	if (!ret)
		ret = say(ep, &answer, -1);
	if (!ret)
		ep->state = LOCAL_WAIT_READY;
	return ret;
}

static int on_proof(struct fab_ep *ep, const struct local_msg *m, struct local_sink *s)
{
	struct local_msg answer;
	int ret = check_hash(ep, m->hash);

	if (ret)
		return ret;
	local_msg_init(&answer, LOCAL_READY, 0);
	ret = say(ep, &answer, -1);
	if (!ret)
		up(ep, s, FAB_EV_ACCEPTED);
	return ret;
}

/* ------------------------------------------------------------- afterwards */

/* Takes fd over on success. */
static int on_region(struct fab_ep *ep, const struct local_msg *m, int fd)
{
	if (ep->arrived_n == LOCAL_PARCELS)
		return -EPROTO;
	ep->arrived[ep->arrived_n++] = (struct local_parcel){ .desc = m->region, .fd = fd };
	return 0;
}

static int on_notices(struct fab_ep *ep, const struct local_msg *m, struct local_sink *s)
{
	if (!ep->inbox)
		return -EPROTO;
	assert(!ep->fab->rx_ep && m == &ep->fab->rx);
	ep->fab->rx_ep = ep;
	ep->fab->rx_next = 0;
	local_rx_drain(ep->fab, s);
	return 0;
}

void local_rx_drain(struct fab *f, struct local_sink *s)
{
	if (!f->rx_ep)
		return;
	for (; f->rx_next < f->rx.count && s->n < s->max; f->rx_next++) {
		local_count(&f->counters.notices, 1);
		local_emit(s, (struct fab_event){ .type = FAB_EV_NOTICE,
						  .ep = f->rx_ep,
						  .user = f->rx_ep->user,
						  .imm = f->rx.imm[f->rx_next] });
	}
	if (f->rx_next == f->rx.count)
		f->rx_ep = NULL;
}

/* What is expected is a matter of the state alone; everything else is -EPROTO. fd stays the caller's if *keep is false. */
static int ep_message(struct fab_ep *ep, const struct local_msg *m, int fd, struct local_sink *s, bool *keep)
{
	int ret;

	if (ep->state == LOCAL_WAIT_HELLO && m->type == LOCAL_HELLO)
		return on_hello(ep, m, fd);
	if (ep->state == LOCAL_WAIT_WELCOME && m->type == LOCAL_WELCOME)
		return on_welcome(ep, m, fd);
	if (ep->state == LOCAL_WAIT_PROOF && m->type == LOCAL_PROOF)
		return on_proof(ep, m, s);
	if (ep->state == LOCAL_WAIT_READY && m->type == LOCAL_READY) {
		up(ep, s, FAB_EV_CONNECTED);
		return 0;
	}
	if (ep->state == LOCAL_UP && m->type == LOCAL_NOTICE)
		return on_notices(ep, m, s);
	if (ep->state == LOCAL_UP && m->type == LOCAL_REGION) {
		ret = on_region(ep, m, fd);
		*keep = !ret;
		return ret;
	}
	return -EPROTO;
}

static const char *why_broken(const struct fab_ep *ep, int status)
{
	if (status == -ECONNREFUSED)
		return "the other side closed before it was ready";
	if (status == -EXDEV)
		return "the other side did not read our memory: no shared memory between us";
	if (status == -EACCES)
		return "its key is unknown or used";
	return greeting(ep) ? "wrong greeting" : "wrong message";
}

void local_ep_receive(struct fab_ep *ep, struct local_sink *s)
{
	struct fab *f = ep->fab;

	/* Every message gives at most one event, but for notices, which keep rx until all are out. */
	for (uint32_t i = 0; i < MESSAGES_AT_ONCE && s->n < s->max && !f->rx_ep; i++) {
		bool keep = false;
		int fd = -1;
		int ret = local_recv(ep->sock, &f->rx, &fd);

		if (ret == -EAGAIN)
			return;
		if (ret == 0)
			ret = greeting(ep) ? -ECONNREFUSED : -ECONNRESET;
		else if (ret == 1)
			ret = ep_message(ep, &f->rx, fd, s, &keep);
		if (fd >= 0 && !keep)
			close(fd);
		if (ret) {
			local_ep_break(ep, ret, why_broken(ep, ret));
			return;
		}
	}
}
