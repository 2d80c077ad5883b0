/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The handshake of a connection; auth.c says what it proves and how.
 *
 *   connecting   CHALLENGE ---CHALLENGE/RESPONSE---> ACCEPTED ---ACCEPTED---> READY
 *   accepting    HELLO -------HELLO/CHALLENGE------> RESPONSE ---RESPONSE---> READY
 *
 * (state ---received/sent---> state.) Whoever finds the other wrong sends REJECT
 * with a text for people, counts it and closes. A REJECT says which thing did
 * not fit (protocol, job name, token) but nothing of what the right one is.
 * Nothing else is accepted before READY, and nothing is allocated for a peer
 * beyond its connection.
 */
#include "mesh/conn_internal.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

static const char wrong_token[] = "the job token is not the same on both sides";

static void send_or_fail(struct conn *c, unsigned type, const void *msg, enum conn_state next)
{
	int rc = conn_send(c, type, msg);

	if (rc < 0)
		conn_fail(c, rc, "cannot send %s: %s", wire_name(type), strerror(-rc));
	else
		c->state = next;
}

void handshake_start(struct conn *c)
{
	struct auth_transcript *t = &c->transcript;
	struct msg_hello m = {
		.protocol = WIRE_PROTOCOL,
		.role = c->self->role,
		.member = c->self->member,
	};

	assert(c->connecting_side);
	if (auth_nonce(t->connect_nonce) < 0) {
		conn_fail(c, -EIO, "no random bytes for the handshake");
		return;
	}
	t->protocol = m.protocol;
	t->connect_role = m.role;
	t->connect_member = m.member;
	t->job = c->self->job;
	memcpy(m.nonce, t->connect_nonce, AUTH_BYTES);
	snprintf(m.job, sizeof(m.job), "%s", c->self->job);
	send_or_fail(c, WIRE_HELLO, &m, CONN_CHALLENGE);
}

static bool is_role(uint32_t role)
{
	return role >= ROLE_SHARD && role <= ROLE_OBSERVER;
}

static void on_hello(struct conn *c, const struct msg_hello *m)
{
	struct auth_transcript *t = &c->transcript;
	struct msg_challenge answer = { .role = c->self->role, .member = c->self->member };

	if (!is_role(m->role)) {
		conn_fail(c, -EPROTO, "unknown role %u", m->role);
		return;
	}
	if (m->protocol != WIRE_PROTOCOL) {
		conn_refuse(c, EXIT_CONFIG, "protocol %u, this side speaks protocol %u", m->protocol, WIRE_PROTOCOL);
		return;
	}
	if (strcmp(m->job, c->self->job) != 0) {
		conn_refuse(c, EXIT_CONFIG, "this is not job '%s'", m->job);
		return;
	}
	*t = (struct auth_transcript){
		.protocol = m->protocol,
		.connect_role = m->role,
		.connect_member = m->member,
		.accept_role = answer.role,
		.accept_member = answer.member,
		.job = c->self->job,
	};
	memcpy(t->connect_nonce, m->nonce, AUTH_BYTES);
	if (auth_nonce(t->accept_nonce) < 0 || auth_proof(&c->self->token, AUTH_ACCEPT, t, answer.proof) < 0) {
		conn_fail(c, -EIO, "the handshake cannot be computed");
		return;
	}
	memcpy(answer.nonce, t->accept_nonce, AUTH_BYTES);
	send_or_fail(c, WIRE_CHALLENGE, &answer, CONN_RESPONSE);
}

static void on_challenge(struct conn *c, const struct msg_challenge *m)
{
	struct auth_transcript *t = &c->transcript;
	struct msg_response answer;
	uint8_t expected[AUTH_BYTES];

	if (!is_role(m->role)) {
		conn_fail(c, -EPROTO, "unknown role %u", m->role);
		return;
	}
	t->accept_role = m->role;
	t->accept_member = m->member;
	memcpy(t->accept_nonce, m->nonce, AUTH_BYTES);
	if (auth_proof(&c->self->token, AUTH_ACCEPT, t, expected) < 0 ||
	    auth_proof(&c->self->token, AUTH_CONNECT, t, answer.proof) < 0) {
		conn_fail(c, -EIO, "the handshake cannot be computed");
		return;
	}
	if (!auth_equal(expected, m->proof)) {
		conn_refuse(c, EXIT_CONFIG, "%s", wrong_token);
		return;
	}
	send_or_fail(c, WIRE_RESPONSE, &answer, CONN_ACCEPTED);
}

static void on_response(struct conn *c, const struct msg_response *m)
{
	const struct auth_transcript *t = &c->transcript;
	struct msg_accepted answer = { .protocol = WIRE_PROTOCOL };
	uint8_t expected[AUTH_BYTES];
	int rc;

	if (auth_proof(&c->self->token, AUTH_CONNECT, t, expected) < 0) {
		conn_fail(c, -EIO, "the handshake cannot be computed");
		return;
	}
	if (!auth_equal(expected, m->proof)) {
		conn_refuse(c, EXIT_CONFIG, "%s", wrong_token);
		return;
	}
	rc = conn_send(c, WIRE_ACCEPTED, &answer);
	if (rc < 0)
		conn_fail(c, rc, "cannot send ACCEPTED: %s", strerror(-rc));
	else
		conn_is_ready(c, t->connect_role, t->connect_member);
}

static void on_reject(struct conn *c, const struct msg_reject *m)
{
	c->reject_code = m->exit_code ? m->exit_code : EXIT_JOB_FAILED;
	atomic_fetch_add_explicit(&c->self->auth_failures, 1, memory_order_relaxed);
	log_warn(c->self->log, "%s refuses the connection: %s", c->peer_text, m->text);
	conn_fail(c, -EPERM, "refused by %s: %s", c->peer_text, m->text);
}

void handshake_message(struct conn *c, unsigned type, const union wire_msg *m)
{
	if (type == WIRE_REJECT)
		on_reject(c, &m->reject);
	else if (type == WIRE_HELLO && c->state == CONN_HELLO)
		on_hello(c, &m->hello);
	else if (type == WIRE_CHALLENGE && c->state == CONN_CHALLENGE)
		on_challenge(c, &m->challenge);
	else if (type == WIRE_RESPONSE && c->state == CONN_RESPONSE)
		on_response(c, &m->response);
	else if (type == WIRE_ACCEPTED && c->state == CONN_ACCEPTED)
		conn_is_ready(c, c->transcript.accept_role, c->transcript.accept_member);
	else
		conn_fail(c, -EPROTO, "%s in the middle of the handshake", wire_name(type));
}
