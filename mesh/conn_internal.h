/* SPDX-License-Identifier: Apache-2.0 */
/* What endpoint.c, conn.c, handshake.c and listener.c share. */
#ifndef SHARDMESH_MESH_CONN_INTERNAL_H
#define SHARDMESH_MESH_CONN_INTERNAL_H

#include "mesh/auth.h"
#include "mesh/mesh.h"

#include <event2/bufferevent.h>
#include <event2/event.h>
#include <netdb.h>
#include <sys/queue.h>
#include <sys/socket.h>

#define CONN_HANDSHAKE_NS 5000000000ull
#define CONN_CLOSE_NS 2000000000ull /* to flush, and to see the peer's end */
#define CONN_OUTPUT_MAX (64u << 20)
#define CONN_HANDSHAKE_BODY_MAX 600u /* REJECT with its longest text, and nothing longer */
#define CONN_PENDING_MAX 256u        /* a listener's connections that are not through the handshake */

/* ---------------------------------------------------------------- endpoint */

struct endpoint {
	char host[256];
	char port[8];
};
/* "host:port" or "[v6]:port"; an empty host or * is every address of this host. -EINVAL. */
int endpoint_parse(const char *text, struct endpoint *out, struct err *e);
/* Blocks for the resolver. passive: to bind. -EAGAIN with the reason; *out is freed with freeaddrinfo. */
int endpoint_resolve(const struct endpoint *ep, bool passive, struct addrinfo **out, struct err *e);
/* "10.0.0.2:41000", "[::1]:41000". */
void endpoint_text(const struct sockaddr *sa, char *out, size_t bytes);

/* -------------------------------------------------------------- connection */

enum conn_state {
	CONN_WAITING,    /* connecting side: until the next try */
	CONN_CONNECTING, /* connecting side: TCP is asked */
	CONN_HELLO,      /* accepting side: waits for HELLO */
	CONN_CHALLENGE,  /* connecting side: waits for CHALLENGE */
	CONN_RESPONSE,   /* accepting side: waits for RESPONSE */
	CONN_ACCEPTED,   /* connecting side: waits for ACCEPTED */
	CONN_READY,
	CONN_CLOSING, /* flushes, then waits for the peer's end */
	CONN_CLOSED,  /* closed() was called; freed when the last callback returns */
};

struct conn {
	struct mesh_self *self;
	const struct conn_ops *ops;
	void *ctx;
	struct bufferevent *bev; /* NULL between tries */
	struct event *timer;     /* the state's deadline, or the next try */
	enum conn_state state;
	unsigned depth; /* callbacks of this connection on the stack */
	bool connecting_side, output_ended;
	enum member_role role;
	uint32_t member;
	uint32_t reject_code; /* of a REJECT in the handshake; else 0 */
	uint64_t sent, received;
	char address[80], peer_text[128];
	int status; /* CONN_CLOSING: what closed() will be told */
	char why[640];
	struct auth_transcript transcript;
	/* connecting side */
	struct endpoint endpoint;
	uint64_t started_ns, deadline_ns;
	unsigned tries;
	/* accepting side, until the handshake is done */
	struct conn_listener *listener;
	TAILQ_ENTRY(conn) pending;
};
TAILQ_HEAD(conn_list, conn);

/* -> CONN_HELLO on a socket that was accepted; takes fd. */
int conn_accept(struct mesh_self *self, int fd, const struct sockaddr *sa, struct conn **out);
/* Starts to read and the clock of the handshake. */
void conn_accept_start(struct conn *c);
void conn_enter(struct conn *c);
/* c may be gone after it. */
void conn_leave(struct conn *c);
/* Closes at once and tells the owner. */
void conn_fail(struct conn *c, int status, const char *fmt, ...) PRINTF_LIKE(3, 4);
/* Like conn_close, with the status that closed() is told. */
void conn_close_status(struct conn *c, int status, const char *why);
/* Arms the one timer. */
void conn_timer(struct conn *c, uint64_t ns);
/* The handshake is done: names the peer and tells the owner. */
void conn_is_ready(struct conn *c, uint32_t role, uint32_t member);
/* Sends REJECT, counts and logs it, closes. exit_code: what the peer should exit with. */
void conn_refuse(struct conn *c, uint32_t exit_code, const char *fmt, ...) PRINTF_LIKE(3, 4);
/* What a REJECT said in the handshake, 0 if there was none. */
uint32_t conn_reject_code(const struct conn *c);

/* --------------------------------------------------------------- handshake */

/* TCP is connected: speaks first. */
void handshake_start(struct conn *c);
/* Any message before CONN_READY. May close c. */
void handshake_message(struct conn *c, unsigned type, const union wire_msg *m);

/* ---------------------------------------------------------------- listener */

/* c left the handshake, or is gone. */
void listener_forget(struct conn_listener *l, struct conn *c);

#endif
