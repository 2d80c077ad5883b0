/* SPDX-License-Identifier: Apache-2.0 */
/* A member's link against a coordinator that follows a script. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "mesh/mesh.h"

#include <errno.h>
#include <event2/event.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct fixture {
	struct event_base *base;
	/* the coordinator's side */
	struct mesh_self coordinator;
	struct conn_listener *listener;
	struct conn *c;
	int ready, registered, heartbeats, failures, closed;
	struct msg_registration registration;
	struct msg_failure failure;
	char waits[256];
	uint64_t counted;
	uint32_t last_sender;
	uint64_t last_term;
	/* the member's */
	struct mesh_self self;
	struct member_link *link;
	struct metrics metrics;
	struct wait_record wait;
	int welcomes, views, messages, overs;
	int welcome_result;
	struct msg_welcome welcome;
	char config[64];
	struct member_table table;
	unsigned last_type;
	uint32_t exit_code;
	char text[800];
};

/* -------------------------------------------------------- coordinator's side */

static void c_ready(struct conn *c, void *ctx)
{
	struct fixture *f = ctx;

	(void)c;
	f->ready++;
}

static void count(void *ctx, const char *name, uint64_t value)
{
	struct fixture *f = ctx;

	assert_string_equal(name, "mesh_things_total");
	f->counted = value;
}

static int c_message(struct conn *c, const struct wire_header *h, const union wire_msg *m, void *ctx)
{
	struct fixture *f = ctx;

	(void)c;
	f->last_sender = h->sender;
	f->last_term = h->term;
	if (h->type == WIRE_REGISTER) {
		f->registration = m->registration;
		f->registered++;
	} else if (h->type == WIRE_FAILURE) {
		f->failure = m->failure;
		f->failures++;
	} else if (h->type == WIRE_HEARTBEAT) {
		waits_text("worker 5", m->heartbeat.waits.data, m->heartbeat.waits.bytes, f->waits, sizeof(f->waits));
		assert_int_equal(metrics_unpack(m->heartbeat.counters.data, m->heartbeat.counters.bytes, count, f), 0);
		f->heartbeats++;
	}
	return 0;
}

static void c_closed(struct conn *c, int status, const char *text, void *ctx)
{
	struct fixture *f = ctx;

	(void)c;
	(void)status;
	(void)text;
	f->c = NULL;
	f->closed++;
}

static const struct conn_ops coordinator_ops = { .ready = c_ready, .message = c_message, .closed = c_closed };

static void c_accepted(void *ctx, struct conn *c)
{
	struct fixture *f = ctx;

	f->c = c;
	conn_set_ctx(c, &coordinator_ops, f);
}

/* ------------------------------------------------------------- member's side */

static int m_welcome(void *ctx, const struct msg_welcome *w, struct err *e)
{
	struct fixture *f = ctx;

	f->welcomes++;
	f->welcome = *w;
	snprintf(f->config, sizeof(f->config), "%.*s", (int)w->config.bytes, (const char *)w->config.data);
	return f->welcome_result < 0 ? err_set(e, f->welcome_result, "no room for this model") : 0;
}

static void m_members(void *ctx, const struct member_table *t)
{
	struct fixture *f = ctx;

	f->views++;
	f->table = *t;
}

static int m_message(void *ctx, const struct wire_header *h, const union wire_msg *m)
{
	struct fixture *f = ctx;

	(void)m;
	f->messages++;
	f->last_type = h->type;
	return 0;
}

static void m_over(void *ctx, uint32_t exit_code, const char *text)
{
	struct fixture *f = ctx;

	f->overs++;
	f->exit_code = exit_code;
	snprintf(f->text, sizeof(f->text), "%s", text);
}

static const struct member_ops member_ops = {
	.welcome = m_welcome,
	.members = m_members,
	.message = m_message,
	.over = m_over,
};

/* --------------------------------------------------------------------- tests */

static void init_self(struct mesh_self *s, struct event_base *base, enum member_role role)
{
	s->base = base;
	s->role = role;
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
	init_self(&f->coordinator, f->base, ROLE_COORDINATOR);
	f->coordinator.term = 1;
	init_self(&f->self, f->base, ROLE_WORKER);
	assert_int_equal(conn_listen(&f->coordinator, "127.0.0.1:0", c_accepted, f, &f->listener, &e), 0);
	*state = f;
	return 0;
}

static int tear_down(void **state)
{
	struct fixture *f = *state;

	member_link_free(f->link);
	conn_free(f->c);
	conn_listener_free(f->listener);
	event_base_free(f->base);
	free(f);
	return 0;
}

static void open_link(struct fixture *f, const char *endpoint, double seconds)
{
	static _Atomic uint64_t things = 42;
	struct member_link_config cfg = {
		.rdzv_endpoint = endpoint,
		.join_timeout_ns = (uint64_t)(seconds * 1e9),
		.listen = "10.1.2.3:4567",
		.metrics = &f->metrics,
		.waits = &f->wait,
		.n_waits = 1,
	};
	struct err e;

	metrics_add(&f->metrics, "mesh_things_total", "things", &things);
	assert_int_equal(member_link_open(&f->self, &cfg, &member_ops, f, &f->link, &e), 0);
}

static void wake(evutil_socket_t fd, short what, void *ctx)
{
	(void)fd;
	(void)what;
	(void)ctx;
}

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

static void register_link(struct fixture *f)
{
	open_link(f, conn_listener_endpoint(f->listener), 10);
	run_until(f, &f->registered, 1);
}

static void send_welcome(struct fixture *f)
{
	static const char config[] = "{\"steps\": 7}";
	struct msg_welcome m = {
		.member = 5,
		.n_shards = 1,
		.n_workers = 1,
		.config = { .data = (const uint8_t *)config, .bytes = sizeof(config) - 1 },
	};

	conn_set_member(f->c, 5);
	assert_int_equal(conn_send(f->c, WIRE_WELCOME, &m), 0);
	run_until(f, &f->welcomes, 1);
}

static void send_member(struct fixture *f, uint32_t id, enum member_role role)
{
	struct msg_member m = { .member = id, .role = role };

	snprintf(m.listen, sizeof(m.listen), "127.0.0.1:%u", 1000 + id);
	assert_int_equal(conn_send(f->c, WIRE_MEMBER, &m), 0);
}

static void assert_says(const char *text, const char *part)
{
	if (!strstr(text, part))
		fail_msg("'%s' does not say '%s'", text, part);
}

static void test_join(void **state)
{
	struct fixture *f = *state;

	register_link(f);
	assert_int_equal(f->registration.pid, (uint32_t)getpid());
	assert_string_equal(f->registration.listen, "10.1.2.3:4567");
	assert_true(f->registration.host[0] != 0 && f->registration.host_id != 0);
	assert_int_equal(f->last_sender, 0);
	send_welcome(f);
	assert_string_equal(f->config, "{\"steps\": 7}");
	assert_int_equal(f->self.member, 5);
}

static void test_heartbeats(void **state)
{
	struct fixture *f = *state;

	register_link(f);
	wait_begin(&f->wait, WAIT_UNIT, 3, 17, 4, 2);
	assert_int_equal(f->heartbeats, 0);
	f->coordinator.term = 6;
	send_welcome(f);
	run_until(f, &f->heartbeats, 2);
	assert_int_equal(f->last_sender, 5);
	assert_int_equal(f->last_term, 6);
	assert_says(f->waits, "worker 5 waits for unit 17 page 4 from shard 2, ");
	assert_int_equal(f->counted, 42);
	wait_end(&f->wait);
	run_until(f, &f->heartbeats, 3);
	assert_string_equal(f->waits, "");
}

/* The program sees whole views only, each replacing the one before. */
static void test_views(void **state)
{
	struct fixture *f = *state;

	register_link(f);
	send_welcome(f);
	send_member(f, 1, ROLE_SHARD);
	send_member(f, 5, ROLE_WORKER);
	conn_send(f->c, WIRE_EPOCH, &(struct msg_epoch){ .epoch = 2, .n_members = 2 });
	run_until(f, &f->views, 1);
	assert_int_equal(f->table.n, 2);
	assert_int_equal(f->table.epoch, 2);
	assert_int_equal(f->self.epoch, 2);
	assert_string_equal(f->table.member[0].listen, "127.0.0.1:1001");
	send_member(f, 5, ROLE_WORKER);
	conn_send(f->c, WIRE_EPOCH, &(struct msg_epoch){ .epoch = 3, .n_members = 1 });
	run_until(f, &f->views, 2);
	assert_int_equal(f->table.n, 1);
	assert_int_equal(f->table.member[0].member, 5);
	/* A view that is not what EPOCH says it is. */
	conn_send(f->c, WIRE_EPOCH, &(struct msg_epoch){ .epoch = 4, .n_members = 1 });
	run_until(f, &f->overs, 1);
	assert_int_equal(f->exit_code, EXIT_JOB_FAILED);
	assert_says(f->text, "EPOCH was not accepted");
	assert_int_equal(f->views, 2);
}

static void test_messages_and_terms(void **state)
{
	struct fixture *f = *state;

	register_link(f);
	f->coordinator.term = 4;
	f->coordinator.step = 9;
	send_welcome(f);
	conn_send(f->c, WIRE_STEP, &(struct msg_step){ .has_open = 1, .open_step = 9 });
	run_until(f, &f->messages, 1);
	assert_int_equal(f->last_type, WIRE_STEP);
	assert_int_equal(f->self.term, 4);
	assert_int_equal(f->self.step, 9);
	/* From a coordinator that was replaced: not heard. */
	f->coordinator.term = 3;
	conn_send(f->c, WIRE_RECALL, &(struct msg_recall){ .lease = 1 });
	f->coordinator.term = 4;
	conn_send(f->c, WIRE_LEASE, &(struct msg_lease){ .lease = 1 });
	run_until(f, &f->messages, 2);
	assert_int_equal(f->last_type, WIRE_LEASE);
	assert_int_equal(f->messages, 2);
	assert_int_equal(member_link_send(f->link, WIRE_FAILURE, &(struct msg_failure){ .exit_code = 3 }), 0);
	run_until(f, &f->failures, 1);
	/* What only members say is no word of a coordinator. */
	conn_send(f->c, WIRE_VOTE, &(struct msg_vote){ .step = 9 });
	run_until(f, &f->overs, 1);
	assert_says(f->text, "VOTE was not accepted");
}

static void test_shutdown(void **state)
{
	struct fixture *f = *state;

	register_link(f);
	send_welcome(f);
	conn_send(f->c, WIRE_SHUTDOWN, &(struct msg_shutdown){ .exit_code = 1, .text = "shard service 2 was lost" });
	conn_close(f->c, "over");
	run_until(f, &f->closed, 1);
	assert_int_equal(f->overs, 1);
	assert_int_equal(f->exit_code, 1);
	assert_string_equal(f->text, "shard service 2 was lost");
	assert_int_equal(member_link_send(f->link, WIRE_FAILURE, &(struct msg_failure){ 0 }), -EPIPE);
}

static void test_refused(void **state)
{
	struct fixture *f = *state;

	register_link(f);
	conn_send(f->c, WIRE_REJECT,
		  &(struct msg_reject){ .exit_code = 75, .text = "the job has its 2 shard services" });
	run_until(f, &f->overs, 1);
	assert_int_equal(f->exit_code, 75);
	assert_string_equal(f->text, "the job has its 2 shard services");
}

static void test_coordinator_is_lost(void **state)
{
	struct fixture *f = *state;

	register_link(f);
	send_welcome(f);
	conn_free(f->c);
	f->c = NULL;
	run_until(f, &f->overs, 1);
	assert_int_equal(f->exit_code, EXIT_JOB_FAILED);
	assert_says(f->text, "the coordinator (127.0.0.1:");
	assert_says(f->text, ") is lost: connection closed");
}

static void test_welcome_fails(void **state)
{
	struct fixture *f = *state;

	register_link(f);
	f->welcome_result = -EINVAL;
	send_welcome(f);
	run_until(f, &f->failures, 1);
	assert_int_equal(f->failure.exit_code, EXIT_CONFIG);
	assert_string_equal(f->failure.text, "no room for this model");
	assert_int_equal(f->overs, 1);
	assert_int_equal(f->exit_code, EXIT_CONFIG);
}

static void test_wrong_token(void **state)
{
	struct fixture *f = *state;

	f->self.token.data[0]++;
	open_link(f, conn_listener_endpoint(f->listener), 10);
	run_until(f, &f->overs, 1);
	assert_int_equal(f->exit_code, EXIT_CONFIG);
	assert_says(f->text, "job token");
}

static void test_wrong_job(void **state)
{
	struct fixture *f = *state;

	snprintf(f->self.job, sizeof(f->self.job), "another");
	open_link(f, conn_listener_endpoint(f->listener), 10);
	run_until(f, &f->overs, 1);
	assert_int_equal(f->exit_code, EXIT_CONFIG);
	assert_says(f->text, "this is not job 'another'");
}

static void test_not_a_coordinator(void **state)
{
	struct fixture *f = *state;

	f->coordinator.role = ROLE_SHARD;
	open_link(f, conn_listener_endpoint(f->listener), 10);
	run_until(f, &f->overs, 1);
	assert_int_equal(f->exit_code, EXIT_CONFIG);
	assert_says(f->text, "is not a coordinator: shard");
	assert_int_equal(f->registered, 0);
}

static void test_nobody_answers(void **state)
{
	struct fixture *f = *state;
	char endpoint[64];

	snprintf(endpoint, sizeof(endpoint), "%s", conn_listener_endpoint(f->listener));
	conn_listener_free(f->listener);
	f->listener = NULL;
	open_link(f, endpoint, 0.3);
	run_until(f, &f->overs, 1);
	assert_int_equal(f->exit_code, EXIT_RETRY_LATER);
	assert_says(f->text, "cannot join: connection refused by 127.0.0.1:");
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

int main(void)
{
	const struct CMUnitTest tests[] = {
		TEST(test_join),
		TEST(test_heartbeats),
		TEST(test_views),
		TEST(test_messages_and_terms),
		TEST(test_shutdown),
		TEST(test_refused),
		TEST(test_coordinator_is_lost),
		TEST(test_welcome_fails),
		TEST(test_wrong_token),
		TEST(test_wrong_job),
		TEST(test_not_a_coordinator),
		TEST(test_nobody_answers),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
