/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Workers at a shard service's door, over loopback and the real fabric: who is
 * let in, in which order things may come, and that everything of a worker is
 * given back when it goes.
 */
#include "tests/unit/test_shardsvc.h"

#include <errno.h>
#include <event2/event.h>
#include <fcntl.h>
#include <unistd.h>

#define DEADLINE_NS 10000000000ull
#define WORKERS 2u
#define GRADIENT_BYTES (1u << 16)

struct worker {
	struct mesh_self self;
	const struct fab_ops *ops;
	const char *provider;
	struct conn *conn;
	struct fab *fab;
	struct fab_ep *ep;
	struct fab_region *gradients;
	bool up, ready, closed, has_fabric, refused, has_regions, attached;
	char reason[256];
	struct fab_blob address, parameters, inbox;
	bool in_place, silent; /* silent: asks for no provider by itself */
	char text[512];
};

struct world {
	struct shard s;
	char want[32];
	struct event_base *base;
	struct worker worker[WORKERS];
};

/* -------------------------------------------------------------- worker's side */

static void take_blob(struct fab_blob *out, const struct wire_blob *b)
{
	assert_true(b->bytes <= FAB_BLOB_MAX);
	if (b->bytes)
		memcpy(out->data, b->data, b->bytes);
	out->bytes = b->bytes;
}

static void want(struct worker *k, const char *provider)
{
	struct msg_fabric_want m;

	snprintf(m.provider, sizeof(m.provider), "%s", provider);
	assert_int_equal(conn_send(k->conn, WIRE_FABRIC_WANT, &m), 0);
}

static void on_ready(struct conn *c, void *ctx)
{
	struct worker *k = ctx;

	(void)c;
	k->ready = true;
	if (k->self.role == ROLE_WORKER && !k->silent)
		want(k, k->ops->name);
}

static int on_message(struct conn *c, const struct wire_header *h, const union wire_msg *m, void *ctx)
{
	struct worker *k = ctx;

	(void)c;
	switch (h->type) {
	case WIRE_FABRIC:
		assert_string_equal(m->fabric.provider, k->provider);
		take_blob(&k->address, &m->fabric.address);
		k->has_fabric = true;
		break;
	case WIRE_FABRIC_REFUSED:
		k->refused = true;
		snprintf(k->reason, sizeof(k->reason), "%s", m->fabric_refused.reason);
		break;
	case WIRE_REGIONS:
		assert_int_equal(m->regions.in_place, m->regions.inbox.bytes == 0);
		take_blob(&k->parameters, &m->regions.parameters);
		take_blob(&k->inbox, &m->regions.inbox);
		k->has_regions = true;
		break;
	case WIRE_ATTACHED:
		k->in_place = m->attached.in_place;
		k->attached = true;
		break;
	default:
		fail_msg("unexpected %s", wire_name(h->type));
	}
	return 0;
}

static void on_closed(struct conn *c, int status, const char *text, void *ctx)
{
	struct worker *k = ctx;

	(void)c;
	(void)status;
	k->conn = NULL;
	k->closed = true;
	snprintf(k->text, sizeof(k->text), "%s", text);
}

static const struct conn_ops worker_ops = { .ready = on_ready, .message = on_message, .closed = on_closed };

static void poll_fabric(struct worker *k)
{
	struct fab_event ev;

	while (k->fab && k->ops->poll(k->fab, &ev, 1))
		if (ev.type == FAB_EV_CONNECTED)
			k->up = true;
}

/* Turns every loop until *what. */
static void run_until(struct world *w, const bool *what)
{
	uint64_t deadline = clock_now_ns() + DEADLINE_NS;

	while (!*what) {
		assert_true(clock_now_ns() < deadline);
		event_base_loop(w->base, EVLOOP_NONBLOCK);
		publish_poll(&w->s);
		for (uint32_t i = 0; i < WORKERS; i++)
			poll_fabric(&w->worker[i]);
	}
}

/* As long as anything could come of what was said. */
static void run_a_while(struct world *w)
{
	uint64_t until = clock_now_ns() + 30000000;

	while (clock_now_ns() < until) {
		event_base_loop(w->base, EVLOOP_NONBLOCK);
		publish_poll(&w->s);
		for (uint32_t i = 0; i < WORKERS; i++)
			poll_fabric(&w->worker[i]);
	}
}

static void dial(struct world *w, struct worker *k)
{
	k->closed = k->ready = false;
	assert_int_equal(conn_connect(&k->self, conn_listener_endpoint(w->s.listener), clock_now_ns() + DEADLINE_NS,
				      &worker_ops, k, &k->conn, NULL),
			 0);
}

static void join_fabric(struct world *w, struct worker *k)
{
	run_until(w, &k->has_fabric);
	assert_int_equal(k->ops->connect(k->fab, &k->address, 1, &k->ep), 0);
	run_until(w, &k->up);
}

static void send_regions(struct worker *k, bool with_gradients)
{
	struct fab_blob blob = { 0 };
	struct msg_regions m = { .in_place = with_gradients };

	if (with_gradients)
		assert_int_equal(k->ops->export_region(k->ep, k->gradients, &blob), 0);
	m.gradients = (struct wire_blob){ .data = blob.data, .bytes = blob.bytes };
	assert_int_equal(conn_send(k->conn, WIRE_REGIONS, &m), 0);
}

static void attach(struct world *w, struct worker *k)
{
	dial(w, k);
	join_fabric(w, k);
	send_regions(k, k->ops->maps);
	run_until(w, &k->has_regions);
	run_until(w, &k->attached);
}

/* ----------------------------------------------------------------- the world */

static void set_self(struct mesh_self *self, struct world *w, enum member_role role, uint32_t member)
{
	self->base = w->base;
	self->log = &w->s.log;
	self->role = role;
	self->member = member;
	self->token.bytes = 32;
	memset(self->token.data, 'k', 32);
	snprintf(self->job, sizeof(self->job), "publish");
}

static void set_members(struct world *w, uint32_t n, uint32_t first)
{
	w->s.n_live = n;
	for (uint32_t i = 0; i < n; i++) {
		w->s.live[i] = first + i;
		w->s.live_here[i] = true;
	}
	publish_members(&w->s);
}

static void open_parameters(struct world *w)
{
	struct err e = { 0 };
	void *at;

	assert_int_equal(fabrics_parameters(&w->s, 8192, &at, &e), 0);
	snprintf(at, 16, "parameters");
	w->s.prepared = true;
}

static void open_worker(struct world *w, uint32_t i, const char *fabric)
{
	const struct fab_region_attr attr = { .name = "gradients", .bytes = GRADIENT_BYTES, .access = FAB_REMOTE_READ };
	struct worker *k = &w->worker[i];
	const struct fab_config cfg = { .log = &w->s.log, .job = "publish", .member = 7 + i };
	struct err e = { 0 };

	set_self(&k->self, w, ROLE_WORKER, 7 + i);
	k->ops = fab_provider(fabric);
	k->provider = fabric;
	assert_int_equal(k->ops->open(&cfg, &k->fab, &e), 0);
	assert_int_equal(k->ops->region_open(k->fab, &attr, &k->gradients, &e), 0);
	memset(k->ops->region_addr(k->gradients), 0x5a, GRADIENT_BYTES);
}

static struct world *open_world(const char *ours, const char *fabric)
{
	struct world *w = aligned_alloc(_Alignof(struct world), sizeof(*w));
	struct err e = { 0 };

	assert_non_null(w);
	memset(w, 0, sizeof(*w));
	w->base = event_base_new();
	assert_non_null(w->base);
	log_init(&w->s.log, open("/dev/null", O_WRONLY | O_CLOEXEC), "test");
	set_self(&w->s.self, w, ROLE_SHARD, 3);
	snprintf(w->want, sizeof(w->want), "%s", ours);
	w->s.job.fabric = w->want;
	w->s.rdzv_endpoint = "127.0.0.1:1";
	w->s.inbox_elements = 4096;
	assert_int_equal(publish_listen(&w->s, &e), 0);
	assert_int_equal(fabrics_open(&w->s, &e), 0);
	for (uint32_t i = 0; i < WORKERS; i++)
		open_worker(w, i, fabric);
	return w;
}

static void close_world(struct world *w)
{
	for (uint32_t i = 0; i < WORKERS; i++) {
		struct worker *k = &w->worker[i];

		conn_free(k->conn);
		if (k->ep)
			k->ops->disconnect(k->ep);
		k->ops->region_close(k->gradients);
		k->ops->close(k->fab);
	}
	publish_close(&w->s);
	event_base_free(w->base);
	close(w->s.log.fd);
	free(w);
}

/* --------------------------------------------------------------------- tests */

static void memory_is_shared_both_ways(void **state)
{
	struct world *w = open_world("local", "local");
	struct worker *k = &w->worker[0];
	struct fab_remote *r;
	void *at;
	(void)state;

	open_parameters(w);
	set_members(w, 2, 7);
	attach(w, k);
	assert_true(k->in_place);
	assert_int_equal(k->inbox.bytes, 0);
	assert_int_equal(k->ops->import_region(k->ep, &k->parameters, &r), 0);
	assert_int_equal(k->ops->map(r, 0, 4096, NULL, &at), 0);
	assert_string_equal(at, "parameters");
	assert_int_equal(w->s.peer[0]->gradients_bytes, GRADIENT_BYTES);
	assert_int_equal(w->s.peer[0]->gradients_at[GRADIENT_BYTES - 1], 0x5a);
	k->ops->remote_close(r);
	close_world(w);
}

static void an_inbox_belongs_to_one_worker(void **state)
{
	struct world *w = open_world("local-copy", "local-copy");
	struct fab_remote *r;
	(void)state;

	open_parameters(w);
	set_members(w, 2, 7);
	attach(w, &w->worker[0]);
	attach(w, &w->worker[1]);
	assert_false(w->worker[0].in_place);
	assert_true(w->worker[0].inbox.bytes > 0 && w->worker[1].inbox.bytes > 0);
	assert_ptr_not_equal(w->s.peer[0]->inbox, w->s.peer[1]->inbox);
	assert_int_equal(w->worker[0].ops->import_region(w->worker[0].ep, &w->worker[0].inbox, &r), 0);
	assert_true(w->worker[0].ops->remote_bytes(r) >= 4096 * sizeof(float));
	w->worker[0].ops->remote_close(r);
	/* Another's descriptor is of no use. */
	assert_int_not_equal(w->worker[0].ops->import_region(w->worker[0].ep, &w->worker[1].inbox, &r), 0);
	close_world(w);
}

static void a_worker_waits_until_it_is_known_and_we_have_pages(void **state)
{
	struct world *w = open_world("local", "local");
	struct worker *k = &w->worker[0];
	(void)state;

	dial(w, k);
	run_until(w, &k->ready);
	run_a_while(w);
	assert_false(k->has_fabric);
	set_members(w, 1, 7);
	run_a_while(w);
	assert_false(k->has_fabric);
	open_parameters(w);
	set_members(w, 1, 9);
	run_a_while(w);
	/* A view without it may be older than it is. */
	assert_false(k->has_fabric || k->closed);
	set_members(w, 1, 7);
	run_until(w, &k->has_fabric);
	close_world(w);
}

static void its_regions_may_come_before_its_endpoint(void **state)
{
	struct world *w = open_world("local-copy", "local-copy");
	struct worker *k = &w->worker[0];
	(void)state;

	open_parameters(w);
	set_members(w, 1, 7);
	dial(w, k);
	run_until(w, &k->has_fabric);
	send_regions(k, false);
	run_a_while(w);
	assert_false(k->attached);
	join_fabric(w, k);
	run_until(w, &k->attached);
	close_world(w);
}

static void modes_of_workers_differ(void **state)
{
	struct world *w = open_world("auto", "local");
	struct worker *k = &w->worker[1];
	(void)state;

	open_parameters(w);
	set_members(w, 2, 7);
	attach(w, &w->worker[0]);
	/* By the same memory, but told to copy. */
	k->silent = true;
	dial(w, k);
	run_until(w, &k->ready);
	k->provider = "local-copy";
	want(k, "local-copy");
	join_fabric(w, k);
	send_regions(k, false);
	run_until(w, &k->attached);
	assert_true(w->worker[0].in_place && !k->in_place);
	assert_int_equal(w->worker[0].inbox.bytes, 0);
	assert_true(k->inbox.bytes > 0);
	assert_true(w->s.peer[0]->in_place && !w->s.peer[1]->in_place);
	assert_int_equal(w->s.n_fabrics, 1);
	close_world(w);
}

static void a_provider_may_be_refused_and_another_asked_for(void **state)
{
	struct world *w = open_world("local-copy", "local-copy");
	struct worker *k = &w->worker[0];
	(void)state;

	open_parameters(w);
	set_members(w, 2, 7);
	k->silent = true;
	dial(w, k);
	run_until(w, &k->ready);
	want(k, "local");
	run_until(w, &k->refused);
	assert_non_null(strstr(k->reason, "local-copy"));
	k->refused = false;
	want(k, "no such thing");
	run_until(w, &k->refused);
	assert_int_equal(w->s.count.fabrics_refused, 2);
	/* An endpoint that is given up for another goes. */
	want(k, "local-copy");
	join_fabric(w, k);
	k->has_fabric = k->up = false;
	want(k, "local-copy");
	run_until(w, &k->has_fabric);
	k->ops->disconnect(k->ep);
	join_fabric(w, k);
	send_regions(k, false);
	run_until(w, &k->attached);
	assert_int_equal(w->s.fabric[0].ops->counters(w->s.fabric[0].fab)->connects, 2);
	close_world(w);
}

static void another_host_shares_no_memory(void **state)
{
	struct world *w = open_world("auto", "local");
	(void)state;

	open_parameters(w);
	set_members(w, 2, 7);
	w->s.live_here[0] = false;
	dial(w, &w->worker[0]);
	run_until(w, &w->worker[0].refused);
	assert_non_null(strstr(w->worker[0].reason, "another host"));
	attach(w, &w->worker[1]);
	close_world(w);
}

static void one_that_is_evicted_is_let_go_with_all_it_had(void **state)
{
	struct world *w = open_world("local", "local");
	struct worker *k = &w->worker[0];
	bool gone;
	(void)state;

	open_parameters(w);
	set_members(w, 2, 7);
	attach(w, k);
	set_members(w, 1, 8);
	run_until(w, &k->closed);
	for (gone = false; !gone; gone = !w->s.peer[0])
		run_a_while(w);
	/* Its slot is free for the next, who starts from nothing. */
	attach(w, &w->worker[1]);
	assert_non_null(w->s.peer[0]);
	assert_int_equal(w->s.peer[0]->member, 8);
	close_world(w);
}

static void a_broken_fabric_ends_the_connection(void **state)
{
	struct world *w = open_world("local", "local");
	struct worker *k = &w->worker[0];
	(void)state;

	open_parameters(w);
	set_members(w, 2, 7);
	attach(w, k);
	k->ops->disconnect(k->ep);
	k->ep = NULL;
	run_until(w, &k->closed);
	assert_int_equal(w->s.count.peers_dropped, 0);
	close_world(w);
}

/* Says `type` as the first thing after the handshake, or after FABRIC; must be dropped for it. */
static void check_dropped(bool opened, unsigned type, const void *m)
{
	struct world *w = open_world("local", "local");
	struct worker *k = &w->worker[0];

	open_parameters(w);
	if (opened)
		set_members(w, 1, 7);
	dial(w, k);
	run_until(w, opened ? &k->has_fabric : &k->ready);
	assert_int_equal(conn_send(k->conn, type, m), 0);
	run_until(w, &k->closed);
	assert_int_equal(w->s.count.peers_dropped, 1);
	close_world(w);
}

static void what_comes_out_of_turn_ends_the_connection(void **state)
{
	uint8_t junk[FAB_BLOB_MAX + 1] = { 0 };
	struct msg_regions regions = { .in_place = 1, .gradients = { .data = junk, .bytes = 100 } };
	const struct msg_offer offer = { .step = 1 };
	const struct msg_attached attached = { .in_place = 1 };
	const struct msg_fabric_want nothing = { .provider = "" };
	const struct msg_signal signal = { .provider = "local", .data = { .data = junk, .bytes = 4 } };
	const struct msg_vote vote = { .step = 1 };
	(void)state;

	check_dropped(false, WIRE_REGIONS, &regions);
	check_dropped(false, WIRE_ATTACHED, &attached);
	check_dropped(false, WIRE_OFFER, &offer);
	check_dropped(true, WIRE_OFFER, &offer);
	check_dropped(true, WIRE_ATTACHED, &attached);
	check_dropped(true, WIRE_VOTE, &vote);
	check_dropped(false, WIRE_FABRIC_WANT, &nothing);
	/* Shared memory has nothing to say beside its socket. */
	check_dropped(true, WIRE_SIGNAL, &signal);
	/* Gradients are read in place here: a descriptor must be there, and of a descriptor's size. */
	regions.gradients.bytes = 0;
	check_dropped(true, WIRE_REGIONS, &regions);
	regions.gradients.bytes = sizeof(junk);
	check_dropped(true, WIRE_REGIONS, &regions);
}

static void a_descriptor_that_is_none_ends_the_connection(void **state)
{
	struct world *w = open_world("local", "local");
	struct worker *k = &w->worker[0];
	uint8_t junk[72] = { 1, 2, 3 };
	const struct msg_regions m = { .in_place = 1, .gradients = { .data = junk, .bytes = sizeof(junk) } };
	(void)state;

	open_parameters(w);
	set_members(w, 1, 7);
	dial(w, k);
	join_fabric(w, k);
	assert_int_equal(conn_send(k->conn, WIRE_REGIONS, &m), 0);
	run_until(w, &k->closed);
	assert_int_equal(w->s.count.peers_dropped, 1);
	close_world(w);
}

static void a_member_connects_once(void **state)
{
	struct world *w = open_world("local", "local");
	(void)state;

	open_parameters(w);
	set_members(w, 1, 7);
	w->worker[1].self.member = 7;
	attach(w, &w->worker[0]);
	dial(w, &w->worker[1]);
	run_until(w, &w->worker[1].closed);
	assert_false(w->worker[0].closed);
	/* A shard service is no worker. */
	w->worker[1].self.member = 4;
	w->worker[1].self.role = ROLE_SHARD;
	dial(w, &w->worker[1]);
	run_until(w, &w->worker[1].closed);
	assert_int_equal(w->s.count.peers_dropped, 2);
	close_world(w);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(memory_is_shared_both_ways),
		cmocka_unit_test(an_inbox_belongs_to_one_worker),
		cmocka_unit_test(a_worker_waits_until_it_is_known_and_we_have_pages),
		cmocka_unit_test(its_regions_may_come_before_its_endpoint),
		cmocka_unit_test(modes_of_workers_differ),
		cmocka_unit_test(a_provider_may_be_refused_and_another_asked_for),
		cmocka_unit_test(another_host_shares_no_memory),
		cmocka_unit_test(one_that_is_evicted_is_let_go_with_all_it_had),
		cmocka_unit_test(a_broken_fabric_ends_the_connection),
		cmocka_unit_test(what_comes_out_of_turn_ends_the_connection),
		cmocka_unit_test(a_descriptor_that_is_none_ends_the_connection),
		cmocka_unit_test(a_member_connects_once),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
