/* SPDX-License-Identifier: Apache-2.0 */
/* Two ends over loopback in one loop, and strangers that send whatever they like. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "mesh/mesh.h"

#include <arpa/inet.h>
#include <errno.h>
#include <event2/event.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define ENDS_MAX 8

/* One end of a connection, and what has happened to it. */
struct end {
	struct conn *c;
	int ready, messages, closed, status;
	unsigned last_type;
	uint64_t last_sender, blob_bytes;
	char text[700];
	/* What to do inside callbacks; may be NULL. */
	void (*on_ready)(struct end *e);
	int (*on_message)(struct end *e, unsigned type, const union wire_msg *m);
};

struct fixture {
	struct event_base *base;
	struct mesh_self server, client;
	struct conn_listener *listener;
	struct end client_end, server_end[ENDS_MAX];
	int n_accepted;
	struct end template; /* of server ends */
};

static void on_ready(struct conn *c, void *ctx)
{
	struct end *e = ctx;

	assert_ptr_equal(conn_ctx(c), e);
	assert_int_equal(e->closed, 0);
	e->ready++;
	if (e->on_ready)
		e->on_ready(e);
}

static int on_message(struct conn *c, const struct wire_header *h, const union wire_msg *m, void *ctx)
{
	struct end *e = ctx;

	(void)c;
	assert_int_equal(e->closed, 0);
	assert_int_equal(e->ready, 1);
	e->messages++;
	e->last_type = h->type;
	e->last_sender = h->sender;
	if (h->type == WIRE_PROGRESS)
		e->blob_bytes += m->progress.json.bytes;
	return e->on_message ? e->on_message(e, h->type, m) : 0;
}

static void on_closed(struct conn *c, int status, const char *text, void *ctx)
{
	struct end *e = ctx;

	assert_ptr_equal(c, e->c);
	/* Whatever is asked of it now, it stays dead. */
	assert_int_equal(conn_send(c, WIRE_STATUS_GET, &(struct msg_status_get){ 0 }), -EPIPE);
	conn_close(c, "again");
	e->c = NULL;
	e->closed++;
	e->status = status;
	snprintf(e->text, sizeof(e->text), "%s", text);
}

static const struct conn_ops ops = { .ready = on_ready, .message = on_message, .closed = on_closed };

static void on_accepted(void *ctx, struct conn *c)
{
	struct fixture *f = ctx;
	struct end *e = &f->server_end[f->n_accepted++];

	assert_true(f->n_accepted <= ENDS_MAX);
	*e = f->template;
	e->c = c;
	conn_set_ctx(c, &ops, e);
}

static void init_self(struct mesh_self *s, struct event_base *base, enum member_role role, uint32_t member)
{
	memset(s, 0, sizeof(*s));
	s->base = base;
	s->role = role;
	s->member = member;
	s->token.bytes = 32;
	memset(s->token.data, 0x5a, 32);
	snprintf(s->job, sizeof(s->job), "test-job");
}

static int set_up(void **state)
{
	struct fixture *f = calloc(1, sizeof(*f));
	struct err e;

	assert_non_null(f);
	f->base = event_base_new();
	assert_non_null(f->base);
	init_self(&f->server, f->base, ROLE_SHARD, 7);
	init_self(&f->client, f->base, ROLE_WORKER, 3);
	assert_int_equal(conn_listen(&f->server, "127.0.0.1:0", on_accepted, f, &f->listener, &e), 0);
	*state = f;
	return 0;
}

static int tear_down(void **state)
{
	struct fixture *f = *state;

	conn_free(f->client_end.c);
	for (int i = 0; i < f->n_accepted; i++)
		conn_free(f->server_end[i].c);
	conn_listener_free(f->listener);
	event_base_free(f->base);
	free(f);
	return 0;
}

static void dial_for(struct fixture *f, const char *endpoint, double seconds)
{
	uint64_t deadline = clock_now_ns() + (uint64_t)(seconds * 1e9);
	struct err e;

	assert_int_equal(conn_connect(&f->client, endpoint, deadline, &ops, &f->client_end, &f->client_end.c, &e), 0);
}

static void dial(struct fixture *f)
{
	dial_for(f, conn_listener_endpoint(f->listener), 10);
}

static void wake(evutil_socket_t fd, short what, void *ctx)
{
	(void)fd;
	(void)what;
	(void)ctx;
}

/* Runs the loop until *value is at least `least`; a test that waits for 15 s has failed. */
static void run_until(struct fixture *f, const int *value, int least)
{
	uint64_t end = clock_now_ns() + 15000000000u;
	struct timeval tick = { .tv_usec = 20000 };

	while (*value < least) {
		assert_true(clock_now_ns() < end);
		event_base_once(f->base, -1, EV_TIMEOUT, wake, NULL, &tick);
		event_base_loop(f->base, EVLOOP_ONCE);
	}
}

static void run_for(struct fixture *f, double seconds)
{
	uint64_t end = clock_now_ns() + (uint64_t)(seconds * 1e9);
	struct timeval tick = { .tv_usec = 5000 };

	while (clock_now_ns() < end) {
		event_base_once(f->base, -1, EV_TIMEOUT, wake, NULL, &tick);
		event_base_loop(f->base, EVLOOP_ONCE);
	}
}

static void connect_both(struct fixture *f)
{
	dial(f);
	run_until(f, &f->client_end.ready, 1);
	run_until(f, &f->server_end[0].ready, 1);
}

static void assert_says(const char *text, const char *part)
{
	if (!strstr(text, part))
		fail_msg("'%s' does not say '%s'", text, part);
}

/* ------------------------------------------------------------ the good case */

static void test_handshake_and_messages(void **state)
{
	struct fixture *f = *state;
	struct msg_want want = { .offer = 11 };
	struct conn *server;

	connect_both(f);
	server = f->server_end[0].c;
	assert_int_equal(conn_role(server), ROLE_WORKER);
	assert_int_equal(conn_member(server), 3);
	assert_int_equal(conn_role(f->client_end.c), ROLE_SHARD);
	assert_int_equal(conn_member(f->client_end.c), 7);
	assert_says(conn_peer_text(server), "worker 3 (127.0.0.1:");
	for (int i = 0; i < 1000; i++)
		assert_int_equal(conn_send(f->client_end.c, WIRE_WANT, &want), 0);
	assert_int_equal(conn_send(server, WIRE_FABRIC, &(struct msg_fabric){ .provider = "local" }), 0);
	run_until(f, &f->server_end[0].messages, 1000);
	run_until(f, &f->client_end.messages, 1);
	assert_int_equal(f->server_end[0].last_type, WIRE_WANT);
	assert_int_equal(f->server_end[0].last_sender, 3);
	assert_int_equal(f->client_end.last_type, WIRE_FABRIC);
	/* Two messages of the handshake on each side. */
	assert_int_equal(atomic_load(&f->client.messages_sent), 1002);
	assert_int_equal(atomic_load(&f->server.messages_received), 1002);
	assert_true(atomic_load(&f->client.bytes_sent) == atomic_load(&f->server.bytes_received));
}

static void test_close_flushes(void **state)
{
	struct fixture *f = *state;
	size_t bytes = 1000000;
	uint8_t *data = calloc(1, bytes);
	struct msg_progress m = { .json = { .data = data, .bytes = (uint32_t)bytes } };

	assert_non_null(data);
	connect_both(f);
	for (int i = 0; i < 20; i++)
		assert_int_equal(conn_send(f->client_end.c, WIRE_PROGRESS, &m), 0);
	conn_close(f->client_end.c, "done");
	assert_int_equal(f->client_end.closed, 0);
	assert_int_equal(conn_send(f->client_end.c, WIRE_PROGRESS, &m), -EPIPE);
	run_until(f, &f->server_end[0].closed, 1);
	run_until(f, &f->client_end.closed, 1);
	assert_int_equal(f->server_end[0].blob_bytes, 20 * bytes);
	assert_int_equal(f->server_end[0].status, -ECONNRESET);
	assert_string_equal(f->server_end[0].text, "connection closed");
	assert_int_equal(f->client_end.status, 0);
	assert_string_equal(f->client_end.text, "done");
	free(data);
}

/* Unread input at the closing side must not destroy its last words. */
static void test_last_words_survive_unread_input(void **state)
{
	struct fixture *f = *state;
	uint8_t *data = calloc(1, 1000000);
	struct msg_progress flood = { .json = { .data = data, .bytes = 1000000 } };

	assert_non_null(data);
	connect_both(f);
	for (int i = 0; i < 10; i++)
		assert_int_equal(conn_send(f->client_end.c, WIRE_PROGRESS, &flood), 0);
	assert_int_equal(conn_send(f->server_end[0].c, WIRE_SHUTDOWN, &(struct msg_shutdown){ .exit_code = 1 }), 0);
	conn_close(f->server_end[0].c, "over");
	run_until(f, &f->client_end.closed, 1);
	assert_int_equal(f->client_end.messages, 1);
	assert_int_equal(f->client_end.last_type, WIRE_SHUTDOWN);
	run_until(f, &f->server_end[0].closed, 1);
	free(data);
}

/* --------------------------------------------------------------- refusals */

static void assert_both_refused(struct fixture *f, const char *reason)
{
	dial(f);
	run_until(f, &f->client_end.closed, 1);
	run_until(f, &f->server_end[0].closed, 1);
	assert_int_equal(f->client_end.ready + f->server_end[0].ready, 0);
	assert_int_equal(f->client_end.status, -EPERM);
	assert_int_equal(f->server_end[0].status, -EPERM);
	assert_says(f->client_end.text, reason);
	assert_says(f->server_end[0].text, reason);
	assert_int_equal(atomic_load(&f->client.auth_failures), 1);
	assert_int_equal(atomic_load(&f->server.auth_failures), 1);
}

static void test_wrong_token(void **state)
{
	struct fixture *f = *state;

	f->client.token.data[31] ^= 1;
	assert_both_refused(f, "job token");
}

static void test_token_prefix(void **state)
{
	struct fixture *f = *state;

	f->client.token.bytes = 31;
	assert_both_refused(f, "job token");
}

static void test_wrong_job(void **state)
{
	struct fixture *f = *state;

	snprintf(f->client.job, sizeof(f->client.job), "other-job");
	assert_both_refused(f, "this is not job 'other-job'");
	assert_null(strstr(f->client_end.text, "test-job"));
}

/* --------------------------------------------------------------- strangers */

static int stranger(struct fixture *f)
{
	struct sockaddr_in sa = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	sa.sin_port = htons((uint16_t)strtoul(strrchr(conn_listener_endpoint(f->listener), ':') + 1, NULL, 10));
	assert_true(fd >= 0);
	assert_int_equal(connect(fd, (struct sockaddr *)&sa, sizeof(sa)), 0);
	return fd;
}

static size_t frame(uint8_t *out, uint64_t sequence, unsigned type, const void *msg)
{
	struct wire_header h = {
		.magic = WIRE_MAGIC,
		.protocol = WIRE_PROTOCOL,
		.type = (uint16_t)type,
		.sequence = sequence,
	};
	int n = wire_encode(type, msg, out + sizeof(h), WIRE_BODY_MAX);

	assert_true(n >= 0);
	h.body_bytes = (uint32_t)n;
	wire_seal(&h, out + sizeof(h));
	memcpy(out, &h, sizeof(h));
	return sizeof(h) + (size_t)n;
}

static const struct msg_hello good_hello = { .protocol = WIRE_PROTOCOL, .role = ROLE_WORKER, .job = "test-job" };

static void send_all(int fd, const void *data, size_t bytes)
{
	assert_int_equal(send(fd, data, bytes, MSG_NOSIGNAL), bytes);
}

/* Everything that the other side says until it ends; the whole must fit. */
static size_t receive_all(int fd, uint8_t *out, size_t max)
{
	struct timeval patience = { .tv_sec = 5 };
	size_t n = 0;
	ssize_t got;

	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	do {
		got = recv(fd, out + n, max - n, 0);
		n += got > 0 ? (size_t)got : 0;
	} while (got > 0);
	return n;
}

/* The bytes end the connection, with that text, before anybody is ready. */
static void assert_dropped(struct fixture *f, const void *bytes, size_t n, const char *reason)
{
	int fd = stranger(f), at = f->n_accepted;

	send_all(fd, bytes, n);
	run_until(f, &f->n_accepted, at + 1);
	run_until(f, &f->server_end[at].closed, 1);
	assert_int_equal(f->server_end[at].ready, 0);
	assert_says(f->server_end[at].text, reason);
	close(fd);
}

static void test_garbage(void **state)
{
	static const char http[] = "GET / HTTP/1.1\r\nHost: x\r\nUser-Agent: a-browser-or-a-health-check\r\n\r\n";
	struct fixture *f = *state;
	uint8_t bytes[4096];
	struct wire_header h;

	for (size_t i = 0; i < sizeof(bytes); i++)
		bytes[i] = (uint8_t)rng_u64(1, 1, i);
	assert_dropped(f, bytes, sizeof(bytes), "not a shardmesh message");
	assert_dropped(f, http, sizeof(http) - 1, "not a shardmesh message");
	/* A length far beyond what a handshake needs is refused by the header alone. */
	frame(bytes, 1, WIRE_HELLO, &good_hello);
	memcpy(&h, bytes, sizeof(h));
	h.body_bytes = WIRE_BODY_MAX;
	assert_dropped(f, &h, sizeof(h), "in the handshake");
	h.body_bytes = UINT32_MAX;
	assert_dropped(f, &h, sizeof(h), "at most 1048576");
}

static void test_wrong_messages(void **state)
{
	struct fixture *f = *state;
	uint8_t bytes[1024];
	struct msg_hello hello = good_hello;
	size_t n = frame(bytes, 1, WIRE_REGISTER, &(struct msg_registration){ .pid = 1 });

	assert_dropped(f, bytes, n, "REGISTER in the middle of the handshake");
	n = frame(bytes, 1, WIRE_RESPONSE, &(struct msg_response){ 0 });
	assert_dropped(f, bytes, n, "RESPONSE in the middle of the handshake");
	n = frame(bytes, 2, WIRE_HELLO, &hello);
	assert_dropped(f, bytes, n, "message 1 was expected");
	n = frame(bytes, 1, WIRE_HELLO, &hello);
	bytes[n - 1] ^= 1;
	assert_dropped(f, bytes, n, "wrong checksum");
	hello.role = 99;
	n = frame(bytes, 1, WIRE_HELLO, &hello);
	assert_dropped(f, bytes, n, "unknown role 99");
	assert_int_equal(atomic_load(&f->server.auth_failures), 0);
}

/* A stranger that guesses: it gets a CHALLENGE, and a REJECT for its proof, with a text and no proof of ours to use. */
static void test_wrong_proof(void **state)
{
	struct fixture *f = *state;
	uint8_t bytes[1024], answer[4096];
	struct wire_header h;
	union wire_msg m;
	size_t n = frame(bytes, 1, WIRE_HELLO, &good_hello), challenge;
	int fd = stranger(f);

	n += frame(bytes + n, 2, WIRE_RESPONSE, &(struct msg_response){ .proof = { 1 } });
	send_all(fd, bytes, n);
	shutdown(fd, SHUT_WR);
	run_until(f, &f->n_accepted, 1);
	run_until(f, &f->server_end[0].closed, 1);
	assert_int_equal(f->server_end[0].status, -EPERM);
	assert_int_equal(atomic_load(&f->server.auth_failures), 1);
	n = receive_all(fd, answer, sizeof(answer));
	memcpy(&h, answer, sizeof(h));
	assert_int_equal(h.type, WIRE_CHALLENGE);
	challenge = sizeof(h) + h.body_bytes;
	memcpy(&h, answer + challenge, sizeof(h));
	assert_int_equal(h.type, WIRE_REJECT);
	assert_int_equal(challenge + sizeof(h) + h.body_bytes, n);
	assert_int_equal(wire_decode(WIRE_REJECT, answer + challenge + sizeof(h), h.body_bytes, &m), 0);
	assert_int_equal(m.reject.exit_code, EXIT_CONFIG);
	assert_says(m.reject.text, "job token");
	close(fd);
}

/* What it proved to us cannot be sent back as our proof to it. */
static void test_reflected_proof(void **state)
{
	struct fixture *f = *state;
	uint8_t bytes[1024], answer[1024];
	struct msg_response response;
	union wire_msg m;
	size_t n = frame(bytes, 1, WIRE_HELLO, &good_hello);
	int fd = stranger(f);

	send_all(fd, bytes, n);
	run_until(f, &f->n_accepted, 1);
	run_for(f, 0.1);
	n = (size_t)recv(fd, answer, sizeof(answer), MSG_DONTWAIT);
	assert_int_equal(wire_decode(WIRE_CHALLENGE, answer + 64, n - 64, &m), 0);
	memcpy(response.proof, m.challenge.proof, sizeof(response.proof));
	send_all(fd, bytes, frame(bytes, 2, WIRE_RESPONSE, &response));
	shutdown(fd, SHUT_WR);
	run_until(f, &f->server_end[0].closed, 1);
	assert_int_equal(f->server_end[0].status, -EPERM);
	close(fd);
}

/* Another protocol is told so, whether the header says it or the body. */
static void test_wrong_protocol(void **state)
{
	struct fixture *f = *state;
	uint8_t bytes[1024], answer[1024];
	struct msg_hello hello = good_hello;
	size_t n;

	for (int in_header = 0; in_header < 2; in_header++) {
		struct end *e = &f->server_end[f->n_accepted];
		union wire_msg m;
		int fd = stranger(f);

		hello.protocol = in_header ? WIRE_PROTOCOL : 2;
		n = frame(bytes, 1, WIRE_HELLO, &hello);
		if (in_header)
			((struct wire_header *)(void *)bytes)->protocol = 2;
		send_all(fd, bytes, n);
		shutdown(fd, SHUT_WR);
		run_until(f, &f->n_accepted, in_header + 1);
		run_until(f, &e->closed, 1);
		n = receive_all(fd, answer, sizeof(answer));
		assert_true(n > 64);
		assert_int_equal(wire_decode(WIRE_REJECT, answer + 64, n - 64, &m), 0);
		assert_says(m.reject.text, "protocol 2, this side speaks protocol 1");
		assert_int_equal(m.reject.exit_code, EXIT_CONFIG);
		close(fd);
	}
	assert_int_equal(atomic_load(&f->server.auth_failures), 2);
}

static void test_slow_handshakes(void **state)
{
	struct fixture *f = *state;
	uint8_t bytes[1024];
	size_t n = frame(bytes, 1, WIRE_HELLO, &good_hello), sent = 0;
	int silent = stranger(f), slow = stranger(f), stuck = stranger(f);
	uint64_t start = clock_now_ns();

	send_all(stuck, bytes, n);
	while (f->n_accepted < 3 || !f->server_end[1].closed) {
		assert_true(clock_now_ns() - start < 10000000000u);
		if (sent < n)
			(void)send(slow, bytes + sent++, 1, MSG_NOSIGNAL);
		run_for(f, 0.1);
	}
	run_until(f, &f->server_end[0].closed, 1);
	run_until(f, &f->server_end[2].closed, 1);
	assert_true(clock_now_ns() - start > 4500000000u);
	for (int i = 0; i < 3; i++) {
		assert_int_equal(f->server_end[i].status, -ETIMEDOUT);
		assert_says(f->server_end[i].text, "not finished in time");
	}
	close(silent);
	close(slow);
	close(stuck);
}

struct crowd {
	int accepted, closed;
};

static void crowd_ready(struct conn *c, void *ctx)
{
	(void)c;
	(void)ctx;
	fail_msg("a silent stranger is ready");
}

static void crowd_closed(struct conn *c, int status, const char *text, void *ctx)
{
	struct crowd *crowd = ctx;

	(void)c;
	(void)status;
	(void)text;
	crowd->closed++;
}

static const struct conn_ops crowd_ops = { .ready = crowd_ready, .closed = crowd_closed };

static void crowd_accepted(void *ctx, struct conn *c)
{
	struct crowd *crowd = ctx;

	crowd->accepted++;
	conn_set_ctx(c, &crowd_ops, crowd);
}

/* Strangers that hold connections open use up their own limit, not our descriptors; when they go there is room again. */
static void test_many_pending(void **state)
{
	enum { LIMIT = 256, MANY = 300 };
	struct fixture *f = *state;
	struct crowd crowd = { 0 };
	int fd[MANY], ended = 0;
	char byte;
	struct err e;

	conn_listener_free(f->listener);
	assert_int_equal(conn_listen(&f->server, "127.0.0.1:0", crowd_accepted, &crowd, &f->listener, &e), 0);
	for (int i = 0; i < MANY; i++)
		fd[i] = stranger(f);
	run_until(f, &crowd.accepted, LIMIT);
	run_for(f, 0.2);
	assert_int_equal(crowd.accepted, LIMIT);
	for (int i = 0; i < MANY; i++)
		ended += recv(fd[i], &byte, 1, MSG_DONTWAIT) == 0;
	assert_int_equal(ended, MANY - LIMIT);
	for (int i = 0; i < MANY; i++)
		close(fd[i]);
	run_until(f, &crowd.closed, LIMIT);
	fd[0] = stranger(f);
	run_until(f, &crowd.accepted, LIMIT + 1);
	close(fd[0]);
	run_until(f, &crowd.closed, LIMIT + 1);
}

static void test_cannot_listen(void **state)
{
	struct fixture *f = *state;
	struct conn_listener *l;
	struct err e;

	assert_int_equal(conn_listen(&f->server, "127.0.0.1:70000", on_accepted, f, &l, &e), -EINVAL);
	assert_says(e.text, "expected host:port");
	assert_int_equal(conn_listen(&f->server, conn_listener_endpoint(f->listener), on_accepted, f, &l, &e),
			 -EADDRINUSE);
	assert_says(e.text, "cannot listen on 127.0.0.1:");
}

/* --------------------------------------------------------- after handshake */

static void test_peer_dies(void **state)
{
	struct fixture *f = *state;

	connect_both(f);
	conn_free(f->client_end.c);
	f->client_end.c = NULL;
	run_until(f, &f->server_end[0].closed, 1);
	assert_int_equal(f->server_end[0].status, -ECONNRESET);
	assert_int_equal(f->client_end.closed, 0);
}

/* conn_free still writes what it can: the last message of a program that ends. */
static void test_free_writes(void **state)
{
	struct fixture *f = *state;

	connect_both(f);
	assert_int_equal(conn_send(f->client_end.c, WIRE_FAILURE, &(struct msg_failure){ .text = "disk" }), 0);
	conn_free(f->client_end.c);
	f->client_end.c = NULL;
	run_until(f, &f->server_end[0].closed, 1);
	assert_int_equal(f->server_end[0].last_type, WIRE_FAILURE);
}

static int refuse_message(struct end *e, unsigned type, const union wire_msg *m)
{
	(void)e;
	(void)type;
	(void)m;
	return -E2BIG;
}

static void test_message_not_accepted(void **state)
{
	struct fixture *f = *state;

	f->template.on_message = refuse_message;
	connect_both(f);
	conn_send(f->client_end.c, WIRE_WANT, &(struct msg_want){ .offer = 1 });
	conn_send(f->client_end.c, WIRE_WANT, &(struct msg_want){ .offer = 2 });
	run_until(f, &f->server_end[0].closed, 1);
	assert_int_equal(f->server_end[0].messages, 1);
	assert_int_equal(f->server_end[0].status, -E2BIG);
	assert_says(f->server_end[0].text, "WANT was not accepted");
	run_until(f, &f->client_end.closed, 1);
}

static int echo_then_close(struct end *e, unsigned type, const union wire_msg *m)
{
	assert_int_equal(conn_send(e->c, type, m), 0);
	if (e->messages == 3)
		conn_close(e->c, "three are enough");
	return 0;
}

static void send_five(struct end *e)
{
	for (uint64_t i = 0; i < 5; i++)
		assert_int_equal(conn_send(e->c, WIRE_WANT, &(struct msg_want){ .offer = i }), 0);
}

static void test_send_and_close_inside_callbacks(void **state)
{
	struct fixture *f = *state;

	f->template.on_message = echo_then_close;
	f->client_end.on_ready = send_five;
	dial(f);
	run_until(f, &f->client_end.closed, 1);
	run_until(f, &f->server_end[0].closed, 1);
	assert_int_equal(f->server_end[0].messages, 3);
	assert_int_equal(f->client_end.messages, 3);
	assert_string_equal(f->server_end[0].text, "three are enough");
}

static int free_inside(struct end *e, unsigned type, const union wire_msg *m)
{
	struct conn *c = e->c;

	(void)type;
	e->c = NULL;
	conn_free(c);
	/* The message lies in the connection's buffer, and is still there. */
	assert_int_equal(m->want.offer, 0);
	return 0;
}

static void test_free_inside_callback(void **state)
{
	struct fixture *f = *state;

	f->template.on_message = free_inside;
	f->client_end.on_ready = send_five;
	dial(f);
	run_until(f, &f->client_end.closed, 1);
	assert_int_equal(f->server_end[0].messages, 1);
	assert_int_equal(f->server_end[0].closed, 0);
}

/* -ENOBUFS once the peer has stopped to read; nothing that was accepted is lost when it reads again. */
static void test_peer_does_not_read(void **state)
{
	struct fixture *f = *state;
	uint8_t *data = calloc(1, 1000000);
	struct msg_progress m = { .json = { .data = data, .bytes = 1000000 } };
	int sent = 0;

	assert_non_null(data);
	connect_both(f);
	while (conn_send(f->client_end.c, WIRE_PROGRESS, &m) == 0)
		sent++;
	assert_int_equal(conn_send(f->client_end.c, WIRE_PROGRESS, &m), -ENOBUFS);
	assert_in_range(sent, 60, 68);
	run_until(f, &f->server_end[0].messages, sent);
	assert_int_equal(f->server_end[0].blob_bytes, (uint64_t)sent * 1000000);
	assert_int_equal(conn_send(f->client_end.c, WIRE_PROGRESS, &m), 0);
	free(data);
}

static void test_message_too_big(void **state)
{
	struct fixture *f = *state;
	uint8_t *data = calloc(1, WIRE_BODY_MAX);
	struct msg_progress m = { .json = { .data = data, .bytes = WIRE_BODY_MAX } };

	assert_non_null(data);
	connect_both(f);
	assert_int_equal(conn_send(f->client_end.c, WIRE_PROGRESS, &m), -EMSGSIZE);
	m.json.bytes = WIRE_BODY_MAX - 4;
	assert_int_equal(conn_send(f->client_end.c, WIRE_PROGRESS, &m), 0);
	run_until(f, &f->server_end[0].messages, 1);
	free(data);
}

static void test_sender_must_be_the_peer(void **state)
{
	struct fixture *f = *state;

	connect_both(f);
	f->client.member = 4;
	conn_send(f->client_end.c, WIRE_WANT, &(struct msg_want){ .offer = 1 });
	run_until(f, &f->server_end[0].closed, 1);
	assert_says(f->server_end[0].text, "in the name of member 4");
	assert_int_equal(f->server_end[0].messages, 0);
}

static void test_member_is_named(void **state)
{
	struct fixture *f = *state;

	f->client.member = 0;
	connect_both(f);
	assert_says(conn_peer_text(f->server_end[0].c), "worker (127.0.0.1:");
	conn_set_member(f->server_end[0].c, 12);
	assert_says(conn_peer_text(f->server_end[0].c), "worker 12 (127.0.0.1:");
	conn_send(f->client_end.c, WIRE_WANT, &(struct msg_want){ .offer = 1 });
	f->client.member = 12;
	conn_send(f->client_end.c, WIRE_WANT, &(struct msg_want){ .offer = 2 });
	run_until(f, &f->server_end[0].messages, 2);
	assert_int_equal(f->server_end[0].last_sender, 12);
}

/* ---------------------------------------------------------------- connecting */

/* An endpoint where nobody listens: bound, so that nobody else takes it, but not listening. */
static int nobody(char *endpoint, size_t bytes)
{
	struct sockaddr_in sa = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t n = sizeof(sa);
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;

	assert_true(fd >= 0);
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	assert_int_equal(bind(fd, (struct sockaddr *)&sa, sizeof(sa)), 0);
	assert_int_equal(getsockname(fd, (struct sockaddr *)&sa, &n), 0);
	snprintf(endpoint, bytes, "127.0.0.1:%u", ntohs(sa.sin_port));
	return fd;
}

static void test_refused_until_deadline(void **state)
{
	struct fixture *f = *state;
	char endpoint[64], expected[128];
	int fd = nobody(endpoint, sizeof(endpoint));

	dial_for(f, endpoint, 1.0);
	run_until(f, &f->client_end.closed, 1);
	assert_int_equal(f->client_end.status, -ETIMEDOUT);
	snprintf(expected, sizeof(expected), "connection refused by %s for 1 s", endpoint);
	assert_string_equal(f->client_end.text, expected);
	close(fd);
}

static void test_listener_comes_later(void **state)
{
	struct fixture *f = *state;
	char endpoint[64];
	int fd = nobody(endpoint, sizeof(endpoint));
	struct err e;

	dial_for(f, endpoint, 10);
	run_for(f, 0.3);
	assert_int_equal(f->client_end.closed, 0);
	close(fd);
	conn_listener_free(f->listener);
	assert_int_equal(conn_listen(&f->server, endpoint, on_accepted, f, &f->listener, &e), 0);
	run_until(f, &f->client_end.ready, 1);
}

static void test_close_while_trying(void **state)
{
	struct fixture *f = *state;
	char endpoint[64];
	int fd = nobody(endpoint, sizeof(endpoint));

	dial_for(f, endpoint, 10);
	run_for(f, 0.1);
	assert_int_equal(conn_send(f->client_end.c, WIRE_WANT, &(struct msg_want){ 0 }), -EPIPE);
	conn_close(f->client_end.c, "changed my mind");
	assert_int_equal(f->client_end.closed, 0);
	run_until(f, &f->client_end.closed, 1);
	assert_string_equal(f->client_end.text, "changed my mind");
	close(fd);
}

static void test_names(void **state)
{
	static const char *const bad[] = { "",           "host",    "host:",  ":x",   "host:1x",
					   "host:70000", "host:-1", "::1:80", "[::1]" };
	struct fixture *f = *state;
	struct conn *c;
	struct err e;
	char local[64];

	for (size_t i = 0; i < ARRAY_LEN(bad); i++)
		assert_int_equal(conn_connect(&f->client, bad[i], 0, &ops, f, &c, &e), -EINVAL);
	dial_for(f, "no-such-host.invalid:1", 0.2);
	run_until(f, &f->client_end.closed, 1);
	assert_says(f->client_end.text, "cannot resolve 'no-such-host.invalid'");
	assert_int_equal(conn_route("127.0.0.1:9", local, &e), 0);
	assert_string_equal(local, "127.0.0.1:0");
	assert_int_equal(conn_route("127.0.0.1", local, &e), -EINVAL);
}

static void test_every_address(void **state)
{
	struct fixture *f = *state;
	char host[256], expected[300];
	struct err e;

	conn_listener_free(f->listener);
	assert_int_equal(conn_listen(&f->server, "*:0", on_accepted, f, &f->listener, &e), 0);
	gethostname(host, sizeof(host));
	snprintf(expected, sizeof(expected), "%s:", host);
	assert_says(conn_listener_endpoint(f->listener), expected);
	snprintf(expected, sizeof(expected), "localhost%s", strrchr(conn_listener_endpoint(f->listener), ':'));
	dial_for(f, expected, 10);
	run_until(f, &f->client_end.ready, 1);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

int main(void)
{
	const struct CMUnitTest tests[] = {
		TEST(test_handshake_and_messages),
		TEST(test_close_flushes),
		TEST(test_last_words_survive_unread_input),
		TEST(test_wrong_token),
		TEST(test_token_prefix),
		TEST(test_wrong_job),
		TEST(test_garbage),
		TEST(test_wrong_messages),
		TEST(test_wrong_proof),
		TEST(test_reflected_proof),
		TEST(test_wrong_protocol),
		TEST(test_slow_handshakes),
		TEST(test_many_pending),
		TEST(test_cannot_listen),
		TEST(test_peer_dies),
		TEST(test_free_writes),
		TEST(test_message_not_accepted),
		TEST(test_send_and_close_inside_callbacks),
		TEST(test_free_inside_callback),
		TEST(test_peer_does_not_read),
		TEST(test_message_too_big),
		TEST(test_sender_must_be_the_peer),
		TEST(test_member_is_named),
		TEST(test_refused_until_deadline),
		TEST(test_listener_comes_later),
		TEST(test_close_while_trying),
		TEST(test_names),
		TEST(test_every_address),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
