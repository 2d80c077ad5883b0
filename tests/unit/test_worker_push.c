/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Gradients on their way: the worker's push.c between a fabric and owners that
 * behave at random. Checked: a buffer is freed exactly once, after the last
 * answer and the last write of it; what an owner holds when all notices are
 * there is its runs of the part, in order; an inbox is never written for two
 * offers at once; buffers are wanted back when needed and not before.
 */
#include "worker/push.c"
#include "worker/sums.c"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

enum { PEERS = 3, OPS_MAX = 64, BUFFERS = 2 };

struct fake_op {
	struct fab_op op;
	uint32_t peer;
};

/* An owner: the offers it got, and its inbox. */
struct owner {
	struct {
		uint64_t id;
		uint32_t unit, part;
		bool open, granted, wanted, withdrawn;
		uint32_t notices, slices, imm;
		uint64_t seen; /* slices, a bit each */
		const float *gradient;
	} offer[BUFFERS];
	float *inbox;
	uint64_t inbox_bytes;
};

struct fab {
	uint8_t *memory[2];
	struct fake_op op[OPS_MAX];
	uint32_t n_ops, refuse;
};
struct fab_region {
	uint8_t *base;
	uint64_t bytes;
};

static struct sim {
	struct worker *w;
	struct model_config model;
	struct fab fab;
	struct fab_region gradients, staging;
	struct owner owner[PEERS];
	bool free[BUFFERS];
	uint32_t checks, wants, withdraws, lost;
	uint32_t next_imm;
	uint64_t seed, draws;
} sim;

static uint64_t draw(uint64_t below)
{
	return rng_u64(sim.seed, 0, sim.draws++) % below;
}

/* ------------------------------------------------- what push.c calls */

void control_task(struct worker *w, const struct task *t)
{
	assert_ptr_equal(w, sim.w);
	assert_int_equal(t->kind, TASK_BUFFER);
	assert_false(sim.free[t->buffer]);
	for (uint32_t i = 0; i < sim.fab.n_ops; i++)
		if (sim.fab.op[i].op.local == &sim.gradients)
			assert_int_not_equal(sim.fab.op[i].op.local_offset / (w->push.elements * sizeof(float)),
					     t->buffer);
	for (uint32_t i = 0; i < PEERS; i++)
		assert_false(sim.owner[i].offer[t->buffer].open);
	sim.free[t->buffer] = true;
}

void control_span_check(struct worker *w)
{
	assert_ptr_equal(w, sim.w);
	sim.checks++;
}

void attach_lost(struct peer *p, const char *text)
{
	(void)text;
	p->lost = true;
	sim.lost++;
}

/* There are no neighbours here (test_worker_subtree has them). */

const float *neighbours_gradients(struct worker *w, uint32_t member, uint64_t *bytes)
{
	(void)w;
	(void)member;
	(void)bytes;
	fail();
	return NULL;
}

void control_give_back(struct worker *w)
{
	(void)w;
	fail();
}

void control_fail(struct worker *w, uint32_t exit_code, const char *fmt, ...)
{
	(void)w;
	(void)exit_code;
	fail_msg("%s", fmt);
}

void attach_pump(struct worker *w)
{
	(void)w;
	fail();
}

static void on_offer(struct owner *o, const struct msg_offer *m)
{
	uint64_t bytes = sim.w->push.elements * sizeof(float);
	uint32_t buffer = (uint32_t)(m->where / bytes);

	assert_int_equal(m->where % bytes, 0);
	assert_int_equal(m->wanted, 0);
	assert_false(o->offer[buffer].open);
	memset(&o->offer[buffer], 0, sizeof(o->offer[buffer]));
	o->offer[buffer].id = m->offer;
	o->offer[buffer].unit = m->unit;
	o->offer[buffer].part = m->part;
	o->offer[buffer].open = true;
	o->offer[buffer].gradient = (const float *)(const void *)(sim.gradients.base + m->where);
}

int conn_send(struct conn *c, unsigned type, const void *msg)
{
	struct owner *o = (struct owner *)(void *)c;
	uint64_t id = type == WIRE_OFFER ? 0 : ((const struct msg_want *)msg)->offer;

	if (type == WIRE_OFFER) {
		on_offer(o, msg);
		return 0;
	}
	for (uint32_t i = 0; i < BUFFERS; i++) {
		if (o->offer[i].id != id)
			continue;
		assert_true(o->offer[i].open);
		if (type == WIRE_WANT) {
			assert_false(o->offer[i].wanted);
			o->offer[i].wanted = true;
			sim.wants++;
		} else {
			assert_int_equal(type, WIRE_WITHDRAW);
			assert_false(o->offer[i].withdrawn);
			/* The owner gives its inbox away now. */
			for (uint32_t k = 0; k < sim.fab.n_ops; k++)
				assert_false(&sim.owner[sim.fab.op[k].peer] == o && o->offer[i].granted &&
					     sim.fab.op[k].op.imm - o->offer[i].imm < o->offer[i].slices);
			o->offer[i].withdrawn = true;
			sim.withdraws++;
		}
		return 0;
	}
	fail_msg("%s for an offer that was never made", wire_name(type));
	return -EPROTO;
}

const char *wire_name(unsigned type)
{
	return type == WIRE_WANT ? "WANT" : "WITHDRAW";
}

/* ------------------------------------------------------------ the fabric */

int fabrics_memory(struct worker *w, enum memory_use use, const char *name, uint64_t bytes, void **at, struct err *e)
{
	struct fab_region *r = use == MEMORY_GRADIENTS ? &sim.gradients : &sim.staging;

	(void)name;
	(void)e;
	assert_true(use == MEMORY_GRADIENTS || (use == MEMORY_STAGING && !w->in_place));
	r->bytes = bytes;
	r->base = aligned_alloc(4096, round_up_u64(bytes, 4096));
	assert_non_null(r->base);
	w->fabric[0].region[use] = r;
	*at = r->base;
	return 0;
}

static int write_notify(struct fab_ep *ep, const struct fab_op *op, uint32_t n)
{
	uint32_t peer = (uint32_t)(uintptr_t)ep - 1;

	assert_int_equal(n, 1);
	if (sim.fab.refuse && draw(sim.fab.refuse) == 0)
		return -EAGAIN;
	assert_true(op->bytes > 0 && op->bytes <= SLICE_BYTES);
	assert_true(op->local_offset + op->bytes <= op->local->bytes);
	assert_true(op->remote_offset + op->bytes <= sim.owner[peer].inbox_bytes);
	assert_ptr_equal(op->remote, (struct fab_remote *)(uintptr_t)(peer + 1));
	assert_true(sim.fab.n_ops < OPS_MAX);
	sim.fab.op[sim.fab.n_ops++] = (struct fake_op){ *op, peer };
	return 0;
}

static const struct fab_ops pushes = { .name = "copies", .write_notify = write_notify };

static void notice(struct owner *o, uint32_t imm)
{
	for (uint32_t i = 0; i < BUFFERS; i++) {
		uint32_t slice = imm - o->offer[i].imm;

		if (!o->offer[i].open || !o->offer[i].granted || slice >= o->offer[i].slices)
			continue;
		assert_false(o->offer[i].seen >> slice & 1);
		o->offer[i].seen |= UINT64_C(1) << slice;
		o->offer[i].notices++;
	}
}

/* Any operation in flight completes: its bytes are there, then its notice. */
static void complete_one(void)
{
	uint32_t k = (uint32_t)draw(sim.fab.n_ops);
	struct fake_op done = sim.fab.op[k];
	struct fab_event ev = { .type = FAB_EV_WRITE, .user = done.op.user };

	sim.fab.op[k] = sim.fab.op[--sim.fab.n_ops];
	memcpy((uint8_t *)sim.owner[done.peer].inbox + done.op.remote_offset,
	       done.op.local->base + done.op.local_offset, done.op.bytes);
	notice(&sim.owner[done.peer], done.op.imm);
	push_event(sim.w, &ev);
}

/* ------------------------------------------------------------- the owners */

static int answer(uint32_t peer, uint32_t buffer, enum offer_verdict verdict)
{
	struct msg_answer m = { .offer = sim.owner[peer].offer[buffer].id, .verdict = verdict };

	if (verdict == OFFER_GRANTED) {
		struct share share;

		part_share(sim.w, &sim.w->push.buffer[buffer], &sim.w->attach.peer[peer], &share);
		m.slices = share_slices(&share);
		m.imm = sim.next_imm;
		sim.next_imm += m.slices;
		sim.owner[peer].offer[buffer].granted = true;
		sim.owner[peer].offer[buffer].slices = m.slices;
		sim.owner[peer].offer[buffer].imm = m.imm;
	} else {
		sim.owner[peer].offer[buffer].open = false;
	}
	return push_answer(&sim.w->attach.peer[peer], &m);
}

static void expect_inbox(uint32_t peer, uint32_t buffer)
{
	const struct owner *o = &sim.owner[peer];
	struct share share;

	part_share(sim.w, &sim.w->push.buffer[buffer], &sim.w->attach.peer[peer], &share);
	for (uint32_t i = 0; i < share.n_seg; i++)
		assert_memory_equal(o->inbox + share.seg[i].share_offset,
				    o->offer[buffer].gradient + share.seg[i].unit_offset,
				    share.seg[i].n * sizeof(float));
}

static bool has_grant(uint32_t peer)
{
	for (uint32_t i = 0; i < BUFFERS; i++)
		if (sim.owner[peer].offer[i].open && sim.owner[peer].offer[i].granted)
			return true;
	return false;
}

/* An owner does something it may do now. */
static void owner_acts(uint32_t peer)
{
	uint32_t buffer = (uint32_t)draw(BUFFERS);
	struct owner *o = &sim.owner[peer];

	if (!o->offer[buffer].open)
		return;
	if (o->offer[buffer].granted && o->offer[buffer].notices == o->offer[buffer].slices) {
		expect_inbox(peer, buffer);
		assert_int_equal(answer(peer, buffer, OFFER_TAKEN), 0);
	} else if (draw(6) == 0) {
		assert_int_equal(answer(peer, buffer, draw(2) ? OFFER_COVERED : OFFER_CLOSED), 0);
	} else if (!sim.w->in_place && !has_grant(peer)) {
		assert_int_equal(answer(peer, buffer, OFFER_GRANTED), 0);
	} else if (sim.w->in_place) {
		assert_int_equal(answer(peer, buffer, OFFER_TAKEN), 0);
	}
}

/* ------------------------------------------------------------- life cycle */

static void open_peers(struct worker *w)
{
	struct attach *a = &w->attach;
	const uint32_t ids[PEERS] = { 2, 5, 9 };
	struct share share;

	/* The one that came later has runs from between the others': slices that are cut. */
	assert_int_equal(page_map_init(&w->map, &w->table, ids, PEERS - 1, 16), 0);
	assert_int_equal(page_map_add(&w->map, &w->table, ids[PEERS - 1]), 0);
	a->n_peers = PEERS;
	a->peer = calloc(PEERS, sizeof(*a->peer));
	a->n_owners = calloc(w->table.n_units, sizeof(*a->n_owners));
	a->owner = calloc((size_t)w->table.n_units * PEERS, sizeof(*a->owner));
	for (uint32_t i = 0; i < PEERS; i++) {
		a->peer[i] = (struct peer){ .w = w, .index = i, .member = ids[i] };
		a->peer[i].conn = (struct conn *)(void *)&sim.owner[i];
		a->peer[i].fabric = &w->fabric[0];
		a->peer[i].ep = (struct fab_ep *)(uintptr_t)(i + 1);
		a->peer[i].inbox = (struct fab_remote *)(uintptr_t)(i + 1);
		for (uint32_t u = 0; u < w->table.n_units; u++) {
			page_map_share(&w->map, &w->table, ids[i], u, &share);
			if (share.n)
				a->owner[u * PEERS + a->n_owners[u]++] = i;
			if (share.n * sizeof(float) > sim.owner[i].inbox_bytes)
				sim.owner[i].inbox_bytes = share.n * sizeof(float);
		}
		sim.owner[i].inbox = malloc(sim.owner[i].inbox_bytes);
		assert_non_null(sim.owner[i].inbox);
	}
}

static void sim_open(bool in_place, uint64_t seed)
{
	static const char json[] =
		"{\"model_type\": \"gpt2\", \"vocab_size\": 6000, \"n_positions\": 64, \"n_embd\": 128, "
		"\"n_layer\": 1, \"n_head\": 2}";
	const struct granted_lease lease = { .id = 1, .step = 4, .node = { 2, 1 }, .n_leaves = 2 };
	struct worker *w = aligned_alloc(CACHE_LINE, round_up_u64(sizeof(*w), CACHE_LINE));
	struct err e = { 0 };

	assert_non_null(w);
	memset(w, 0, sizeof(*w));
	memset(&sim, 0, sizeof(sim));
	sim.w = w;
	sim.seed = seed;
	w->fabric[0].ops = &pushes;
	w->fabric[0].fab = &sim.fab;
	w->in_place = in_place;
	if (model_config_parse(json, "test", &sim.model, &e) || unit_table_init(&w->table, &sim.model, &e))
		fail_msg("%s", e.text);
	w->plan.n_gradient_buffers = BUFFERS;
	w->plan.gradient_elements = w->table.largest_unit;
	open_peers(w);
	assert_int_equal(push_open(w, &e), 0);
	assert_int_equal(push_attach(w), 0);
	for (uint32_t i = 0; i < BUFFERS; i++)
		sim.free[i] = true;
	push_begin(w, &lease);
}

static void sim_close(void)
{
	struct worker *w = sim.w;

	push_release(w);
	free(sim.gradients.base);
	free(sim.staging.base);
	page_map_release(&w->map);
	unit_table_release(&w->table);
	model_config_release(&sim.model);
	for (uint32_t i = 0; i < PEERS; i++)
		free(sim.owner[i].inbox);
	free(w->attach.peer);
	free(w->attach.owner);
	free(w->attach.n_owners);
	free(w);
}

/* As the compute thread: fills a free buffer and reports it. */
static void fill(uint32_t buffer, uint32_t unit, uint32_t part)
{
	float *g = (float *)(void *)sim.gradients.base + buffer * sim.w->push.elements;
	struct report r = { .kind = REPORT_OFFER, .unit = unit, .part = part, .buffer = buffer };

	assert_true(sim.free[buffer]);
	sim.free[buffer] = false;
	for (uint64_t i = 0; i < sim.w->table.unit[unit].n; i++)
		g[i] = (float)(sim.draws * 7919 + i);
	sim.draws++;
	push_offer(sim.w, &r);
}

static uint32_t open_offers(uint32_t buffer)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < PEERS; i++)
		n += sim.owner[i].offer[buffer].open;
	return n;
}

/* ------------------------------------------------------------------ tests */

/* Random life: spans of offers, all answered in the end, now and then recalled. */
static void random_life(bool in_place)
{
	for (uint64_t seed = 1; seed <= 40; seed++) {
		uint32_t left = 12;
		bool recalled = false;

		sim_open(in_place, seed);
		sim.fab.refuse = draw(3) ? 0 : 3;
		for (uint32_t events = 0; left || !push_idle(sim.w) || sim.fab.n_ops; events++) {
			uint32_t buffer = (uint32_t)draw(BUFFERS);

			assert_true(events < 20000);
			if (left && sim.free[buffer] && draw(2)) {
				uint32_t unit = (uint32_t)draw(sim.w->table.n_units);

				fill(buffer, unit, (uint32_t)draw(sim.w->table.unit[unit].n_parts));
				left--;
			}
			if (left == 1 && !recalled && draw(20) == 0) {
				recalled = sim.w->span.cancelled = true;
				push_end(sim.w, true);
			}
			if (!left)
				push_end(sim.w, sim.w->span.cancelled);
			if (sim.fab.n_ops && draw(2))
				complete_one();
			owner_acts((uint32_t)draw(PEERS));
			push_run(sim.w);
		}
		assert_true(sim.free[0] && sim.free[1]);
		assert_int_equal(sim.w->push.staging_free, in_place ? 0 : (1u << PUSH_STAGING_SLOTS) - 1);
		assert_int_equal(sim.lost, 0);
		sim_close();
	}
}

static void random_life_in_place(void **state)
{
	(void)state;
	random_life(true);
}

static void random_life_pushed(void **state)
{
	(void)state;
	random_life(false);
}

static void wanted_when_needed(void **state)
{
	uint32_t owners;

	(void)state;
	sim_open(true, 1);
	fill(0, 1, 0);
	owners = open_offers(0);
	assert_true(owners > 1);
	/* Another buffer is free: nothing is wanted. */
	assert_int_equal(sim.wants, 0);
	fill(1, 2, 0);
	/* None is free: the oldest. */
	assert_int_equal(sim.wants, owners);
	for (uint32_t i = 0; i < PEERS; i++)
		assert_int_equal(sim.owner[i].offer[0].wanted, sim.owner[i].offer[0].open);
	push_need(sim.w);
	assert_int_equal(sim.wants, owners);
	/* The end wants all, each once. */
	push_end(sim.w, false);
	push_end(sim.w, false);
	assert_int_equal(sim.wants, owners + open_offers(1));
	push_end(sim.w, true);
	push_end(sim.w, true);
	assert_int_equal(sim.withdraws, owners + open_offers(1));
	for (uint32_t i = 0; i < PEERS; i++)
		for (uint32_t b = 0; b < BUFFERS; b++)
			if (sim.owner[i].offer[b].open)
				assert_int_equal(answer(i, b, OFFER_CLOSED), 0);
	assert_true(push_idle(sim.w));
	sim_close();
}

static void a_part_goes_to_its_owners_only(void **state)
{
	struct share share;

	(void)state;
	sim_open(true, 1);
	fill(0, 0, 1);
	for (uint32_t i = 0; i < PEERS; i++) {
		part_share(sim.w, &sim.w->push.buffer[0], &sim.w->attach.peer[i], &share);
		assert_int_equal(sim.owner[i].offer[0].open, share.n > 0);
		if (share.n)
			assert_int_equal(answer(i, 0, OFFER_TAKEN), 0);
	}
	assert_true(sim.free[0]);
	sim_close();
}

static void recalled_offers_nothing(void **state)
{
	(void)state;
	sim_open(true, 1);
	sim.w->span.cancelled = true;
	fill(0, 1, 0);
	assert_int_equal(open_offers(0), 0);
	assert_true(sim.free[0]);
	sim_close();
}

/* Closed in the middle of its writes: the buffer stays until they are done, and so does the inbox. */
static void closed_while_written(void **state)
{
	uint32_t peer = 0;

	(void)state;
	sim_open(false, 1);
	fill(0, 0, 0);
	fill(1, 0, 0);
	while (!sim.owner[peer].offer[0].open)
		peer++;
	for (uint32_t i = 0; i < PEERS; i++)
		if (i != peer && sim.owner[i].offer[0].open)
			answer(i, 0, OFFER_COVERED);
	assert_int_equal(answer(peer, 0, OFFER_GRANTED), 0);
	push_run(sim.w);
	assert_true(sim.fab.n_ops > 0);
	assert_int_equal(answer(peer, 0, OFFER_CLOSED), 0);
	assert_false(sim.free[0]);
	assert_int_equal(answer(peer, 1, OFFER_GRANTED), 0);
	for (uint32_t n = sim.fab.n_ops; n > 0; n--) {
		push_run(sim.w);
		assert_int_equal(sim.fab.n_ops, n);
		complete_one();
	}
	assert_true(sim.free[0]);
	push_run(sim.w);
	assert_true(sim.fab.n_ops > 0);
	while (sim.fab.n_ops) {
		complete_one();
		push_run(sim.w);
	}
	expect_inbox(peer, 1);
	sim_close();
}

static void nonsense_is_refused(void **state)
{
	struct msg_answer m = { .verdict = OFFER_TAKEN };
	uint32_t peer = 0;

	(void)state;
	sim_open(false, 1);
	fill(0, 1, 0);
	while (!sim.owner[peer].offer[0].open)
		peer++;
	m.offer = sim.owner[peer].offer[0].id;
	assert_int_equal(push_answer(&sim.w->attach.peer[(peer + 1) % PEERS], &m), -EPROTO);
	m.verdict = 77;
	assert_int_equal(push_answer(&sim.w->attach.peer[peer], &m), -EPROTO);
	m.verdict = OFFER_GRANTED;
	m.slices = 1000;
	assert_int_equal(push_answer(&sim.w->attach.peer[peer], &m), -EPROTO);
	assert_int_equal(answer(peer, 0, OFFER_GRANTED), 0);
	assert_int_equal(answer(peer, 0, OFFER_GRANTED), -EPROTO);
	m.verdict = OFFER_TAKEN;
	m.offer = 12345;
	assert_int_equal(push_answer(&sim.w->attach.peer[peer], &m), -EPROTO);
	sim_close();
	/* Where memory is mapped there is nothing to grant. */
	sim_open(true, 1);
	fill(0, 1, 0);
	for (peer = 0; !sim.owner[peer].offer[0].open;)
		peer++;
	assert_int_equal(answer(peer, 0, OFFER_GRANTED), -EPROTO);
	sim_close();
}

static void a_failed_write_loses_the_peer(void **state)
{
	struct fab_event ev = { .type = FAB_EV_WRITE, .status = -EIO };
	uint32_t peer = 0;

	(void)state;
	sim_open(false, 1);
	fill(0, 1, 0);
	while (!sim.owner[peer].offer[0].open)
		peer++;
	assert_int_equal(answer(peer, 0, OFFER_GRANTED), 0);
	push_run(sim.w);
	ev.user = sim.fab.op[0].op.user;
	push_event(sim.w, &ev);
	assert_int_equal(sim.lost, 1);
	sim_close();
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(random_life_in_place),    cmocka_unit_test(random_life_pushed),
		cmocka_unit_test(wanted_when_needed),      cmocka_unit_test(a_part_goes_to_its_owners_only),
		cmocka_unit_test(recalled_offers_nothing), cmocka_unit_test(closed_while_written),
		cmocka_unit_test(nonsense_is_refused),     cmocka_unit_test(a_failed_write_loses_the_peer),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
