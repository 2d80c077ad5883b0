/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Two ends of a connection over loopback in one loop, for tests of mesh's
 * connections: a listener (shard service 7) and one dialler (worker 3), what
 * happened to each end, and a loop that runs until something has.
 */
#ifndef SHARDMESH_TEST_MESH_ENDS_H
#define SHARDMESH_TEST_MESH_ENDS_H

#include "mesh/mesh.h"

#include <errno.h>
#include <event2/event.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

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

static inline void on_ready(struct conn *c, void *ctx)
{
	struct end *e = ctx;

	assert_ptr_equal(conn_ctx(c), e);
	assert_int_equal(e->closed, 0);
	e->ready++;
	if (e->on_ready)
		e->on_ready(e);
}

static inline int on_message(struct conn *c, const struct wire_header *h, const union wire_msg *m, void *ctx)
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

static inline void on_closed(struct conn *c, int status, const char *text, void *ctx)
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

static inline void on_accepted(void *ctx, struct conn *c)
{
	struct fixture *f = ctx;
	struct end *e = &f->server_end[f->n_accepted++];

	assert_true(f->n_accepted <= ENDS_MAX);
	*e = f->template;
	e->c = c;
	conn_set_ctx(c, &ops, e);
}

static inline void init_self(struct mesh_self *s, struct event_base *base, enum member_role role, uint32_t member)
{
	memset(s, 0, sizeof(*s));
	s->base = base;
	s->role = role;
	s->member = member;
	s->token.bytes = 32;
	memset(s->token.data, 0x5a, 32);
	snprintf(s->job, sizeof(s->job), "test-job");
}

static inline int set_up(void **state)
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

static inline int tear_down(void **state)
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

static inline void dial_for(struct fixture *f, const char *endpoint, double seconds)
{
	uint64_t deadline = clock_now_ns() + (uint64_t)(seconds * 1e9);
	struct err e;

	assert_int_equal(conn_connect(&f->client, endpoint, deadline, &ops, &f->client_end, &f->client_end.c, &e), 0);
}

static inline void dial(struct fixture *f)
{
	dial_for(f, conn_listener_endpoint(f->listener), 10);
}

static inline void wake(evutil_socket_t fd, short what, void *ctx)
{
	(void)fd;
	(void)what;
	(void)ctx;
}

/* Runs the loop until *value is at least `least`; a test that waits for 15 s has failed. */
static inline void run_until(struct fixture *f, const int *value, int least)
{
	uint64_t end = clock_now_ns() + 15000000000u;
	struct timeval tick = { .tv_usec = 20000 };

	while (*value < least) {
		assert_true(clock_now_ns() < end);
		event_base_once(f->base, -1, EV_TIMEOUT, wake, NULL, &tick);
		event_base_loop(f->base, EVLOOP_ONCE);
	}
}

static inline void run_for(struct fixture *f, double seconds)
{
	uint64_t end = clock_now_ns() + (uint64_t)(seconds * 1e9);
	struct timeval tick = { .tv_usec = 5000 };

	while (clock_now_ns() < end) {
		event_base_once(f->base, -1, EV_TIMEOUT, wake, NULL, &tick);
		event_base_loop(f->base, EVLOOP_ONCE);
	}
}

static inline void connect_both(struct fixture *f)
{
	dial(f);
	run_until(f, &f->client_end.ready, 1);
	run_until(f, &f->server_end[0].ready, 1);
}

static inline void assert_says(const char *text, const char *part)
{
	if (!strstr(text, part))
		fail_msg("'%s' does not say '%s'", text, part);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

#endif
