/* SPDX-License-Identifier: Apache-2.0 */
/* The handshake: members that do not belong to the job, and strangers that send whatever they like. */
#include "tests/unit/mesh_ends.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

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

int main(void)
{
	const struct CMUnitTest tests[] = {
		TEST(test_wrong_token),     TEST(test_token_prefix),   TEST(test_wrong_job),
		TEST(test_garbage),         TEST(test_wrong_messages), TEST(test_wrong_proof),
		TEST(test_reflected_proof), TEST(test_wrong_protocol), TEST(test_slow_handshakes),
		TEST(test_many_pending),    TEST(test_cannot_listen),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
