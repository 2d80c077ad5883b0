/* SPDX-License-Identifier: Apache-2.0 */
/* Connections: what two members that trust each other may count on. */
#include "tests/unit/mesh_ends.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

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
	for (int i = 0; i < 4; i++)
		assert_int_equal(conn_send(f->client_end.c, WIRE_PROGRESS, &m), 0);
	conn_close(f->client_end.c, "done");
	assert_int_equal(f->client_end.closed, 0);
	assert_int_equal(conn_send(f->client_end.c, WIRE_PROGRESS, &m), -EPIPE);
	run_until(f, &f->server_end[0].closed, 1);
	run_until(f, &f->client_end.closed, 1);
	assert_int_equal(f->server_end[0].blob_bytes, 4 * bytes);
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
	assert_int_equal(conn_route_address("127.0.0.1:9", local, &e), 0);
	assert_string_equal(local, "127.0.0.1");
	assert_int_equal(conn_route_address("127.0.0.1", local, &e), -EINVAL);
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

int main(void)
{
	const struct CMUnitTest tests[] = {
		TEST(test_handshake_and_messages),
		TEST(test_close_flushes),
		TEST(test_last_words_survive_unread_input),
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
