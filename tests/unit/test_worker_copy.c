/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Units copied over a fabric: the worker's copy.c between owners that publish
 * versions at their own pace and a fabric that completes reads in any order,
 * late, and refuses some. Checked: what a use is given is the unit, whole, of
 * the version asked for; nothing is read before its owner's progress word says
 * so; no read leaves its region; every span ends.
 */
#include "worker/copy.c"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

enum { PEERS = 3, OPS_MAX = READS_MAX + PEERS };

struct owner {
	uint8_t *memory; /* progress word, then shares, as the contract lays them out */
	uint64_t bytes;
	uint32_t version;
};

struct fake_op {
	struct fab_op op;
	struct owner *owner;
};

struct fab {
	struct fake_op op[OPS_MAX];
	uint32_t n_ops, refuse;
	int fail; /* status of the next completion */
};
struct fab_region {
	uint8_t *base;
	uint64_t bytes;
};

static struct sim {
	struct worker *w;
	struct model_config model;
	struct fab fab;
	struct fab_region window, words;
	struct owner owner[PEERS];
	struct task use[64];
	uint32_t n_use, lost;
	int failed;
	uint64_t seed, draws;
} sim;

static uint64_t draw(uint64_t below)
{
	return rng_u64(sim.seed, 0, sim.draws++) % below;
}

/* Element i of a unit at a version: all different. */
static float value(uint32_t unit, uint64_t i, uint32_t version)
{
	return (float)(version * 0x100000 + unit * 0x1000 + i % 0xfff);
}

/* ------------------------------------------------- what copy.c calls */

void control_task(struct worker *w, const struct task *t)
{
	assert_ptr_equal(w, sim.w);
	assert_int_equal(t->lease, w->span.lease.id);
	if (t->kind == TASK_FAILED) {
		sim.failed = t->status;
		return;
	}
	assert_int_equal(t->kind, TASK_USE);
	assert_int_equal(t->use, sim.n_use);
	sim.use[sim.n_use++] = *t;
}

void attach_lost(struct peer *p, const char *text)
{
	(void)text;
	p->lost = true;
	sim.lost++;
}

/* Nothing is shared here (test_worker_share.c). */
struct neighbour *neighbours_of(struct worker *w, const struct board *b)
{
	(void)w;
	(void)b;
	fail();
	return NULL;
}

void attach_pump(struct worker *w)
{
	copy_run(w);
}

enum fab_ready fab_progress_check(uint64_t word, uint16_t branch, uint32_t version, uint16_t unit)
{
	uint32_t has = (uint32_t)(word >> 16) - (unit < (uint16_t)word ? 0 : 1);

	assert_int_equal(branch, 0);
	return has == version ? FAB_READY : (int32_t)(has - version) > 0 ? FAB_PASSED : FAB_NOT_YET;
}

int fabrics_memory(struct worker *w, enum memory_use use, const char *name, uint64_t bytes, void **at, struct err *e)
{
	struct fab_region *r = use == MEMORY_WINDOW ? &sim.window : &sim.words;

	(void)name;
	(void)e;
	assert_true(use == MEMORY_WINDOW || use == MEMORY_WORDS);
	r->bytes = bytes;
	r->base = aligned_alloc(4096, round_up_u64(bytes, 4096));
	assert_non_null(r->base);
	memset(r->base, 0, bytes);
	w->fabric[0].region[use] = r;
	*at = r->base;
	return 0;
}

static uint64_t word_of(const struct owner *o)
{
	uint64_t word;

	memcpy(&word, o->memory, sizeof(word));
	return word;
}

static int read_ops(struct fab_ep *ep, const struct fab_op *op, uint32_t n)
{
	struct owner *o = &sim.owner[(uintptr_t)ep - 1];

	if (sim.fab.refuse && draw(sim.fab.refuse) == 0)
		return -EAGAIN;
	for (uint32_t i = 0; i < n; i++) {
		assert_ptr_equal(op[i].remote, (struct fab_remote *)(void *)ep);
		assert_true(op[i].bytes > 0 && op[i].bytes <= SLICE_BYTES);
		assert_true(op[i].remote_offset + op[i].bytes <= o->bytes);
		assert_true(op[i].local_offset + op[i].bytes <= op[i].local->bytes);
		if (op_kind(op[i].user) == OP_UNIT)
			assert_int_not_equal(fab_progress_check(word_of(o), 0, (uint32_t)sim.w->copier.fetch.version,
								(uint16_t)op_a(op[i].user)),
					     FAB_NOT_YET);
		assert_true(sim.fab.n_ops < OPS_MAX);
		sim.fab.op[sim.fab.n_ops++] = (struct fake_op){ op[i], o };
	}
	return 0;
}

static const struct fab_ops fabric = { .name = "copies", .read = read_ops };

static void complete_one(void)
{
	uint32_t k = (uint32_t)draw(sim.fab.n_ops);
	struct fake_op done = sim.fab.op[k];
	struct fab_event ev = { .type = FAB_EV_READ, .user = done.op.user, .status = sim.fab.fail };

	sim.fab.op[k] = sim.fab.op[--sim.fab.n_ops];
	sim.fab.fail = 0;
	if (!ev.status)
		memcpy(done.op.local->base + done.op.local_offset, done.owner->memory + done.op.remote_offset,
		       done.op.bytes);
	copy_event(sim.w, &ev);
}

/* ------------------------------------------------------------- the owners */

/* One more unit of the owner's share has the next version, and the word says it. */
static void publish(uint32_t peer, uint32_t version, uint32_t units_done)
{
	struct owner *o = &sim.owner[peer];
	const struct worker *w = sim.w;
	uint64_t word = (uint64_t)version << 16 | units_done;
	uint32_t unit = units_done - 1;
	struct share share;
	float *at;

	if (units_done > 0) {
		at = (float *)(void *)(o->memory +
				       page_map_share_bytes(&w->map, &w->table, w->attach.peer[peer].member, unit));
		page_map_share(&w->map, &w->table, w->attach.peer[peer].member, unit, &share);
		for (uint32_t i = 0; i < share.n_seg; i++)
			for (uint64_t k = 0; k < share.seg[i].n; k++)
				at[share.seg[i].share_offset + k] = value(unit, share.seg[i].unit_offset + k, version);
	}
	memcpy(o->memory, &word, sizeof(word));
	o->version = version;
}

static void publish_all(uint32_t version)
{
	for (uint32_t i = 0; i < PEERS; i++)
		for (uint32_t u = 1; u <= sim.w->table.n_units; u++)
			publish(i, version, u);
}

static void publish_next(uint32_t peer, uint32_t version)
{
	uint64_t word = word_of(&sim.owner[peer]);
	uint32_t done = word >> 16 == version ? (uint32_t)(word & 0xffff) : 0;

	if (done < sim.w->table.n_units)
		publish(peer, version, done + 1);
}

/* ------------------------------------------------------------- life cycle */

static void open_peers(struct worker *w)
{
	struct attach *a = &w->attach;
	const uint32_t ids[PEERS] = { 2, 5, 9 };
	struct share share;

	assert_int_equal(page_map_init(&w->map, &w->table, ids, PEERS - 1, 16), 0);
	assert_int_equal(page_map_add(&w->map, &w->table, ids[PEERS - 1]), 0);
	w->n_shards = a->n_peers = PEERS;
	a->peer = calloc(PEERS, sizeof(*a->peer));
	a->n_owners = calloc(w->table.n_units, sizeof(*a->n_owners));
	a->owner = calloc((size_t)w->table.n_units * PEERS, sizeof(*a->owner));
	for (uint32_t i = 0; i < PEERS; i++) {
		a->peer[i] = (struct peer){ .w = w, .index = i, .member = ids[i] };
		a->peer[i].fabric = &w->fabric[0];
		a->peer[i].ep = (struct fab_ep *)(uintptr_t)(i + 1);
		a->peer[i].parameters = (struct fab_remote *)(uintptr_t)(i + 1);
		sim.owner[i].bytes = page_map_share_bytes(&w->map, &w->table, ids[i], w->table.n_units);
		sim.owner[i].memory = calloc(1, sim.owner[i].bytes);
		assert_non_null(sim.owner[i].memory);
		for (uint32_t u = 0; u < w->table.n_units; u++) {
			page_map_share(&w->map, &w->table, ids[i], u, &share);
			if (share.n)
				a->owner[u * PEERS + a->n_owners[u]++] = i;
		}
	}
}

static void open_uses(struct worker *w)
{
	struct net_config cfg = { .model = &sim.model, .table = &w->table, .max_span = 1 };
	struct err e = { 0 };

	assert_int_equal(net_init(&w->compute.net, &cfg, &e), 0);
	for (unsigned training = 0; training < 2; training++) {
		w->compute.uses[training] = calloc(net_uses_max(&sim.model), sizeof(struct use));
		w->compute.n_uses[training] = net_uses(&w->compute.net, training, w->compute.uses[training]);
	}
}

/* window: 0 for the smallest that is allowed, else the whole model. */
static void sim_open(uint64_t seed, bool small, uint64_t prefetch, uint64_t reuse)
{
	static const char json[] =
		"{\"model_type\": \"gpt2\", \"vocab_size\": 6000, \"n_positions\": 64, \"n_embd\": 128, "
		"\"n_layer\": 3, \"n_head\": 2}";
	struct worker *w = aligned_alloc(CACHE_LINE, round_up_u64(sizeof(*w), CACHE_LINE));
	struct err e = { 0 };

	assert_non_null(w);
	memset(w, 0, sizeof(*w));
	memset(&sim, 0, sizeof(sim));
	sim.w = w;
	sim.seed = seed;
	w->fabric[0].ops = &fabric;
	w->fabric[0].fab = &sim.fab;
	w->self.member = 7;
	w->self.base = event_base_new();
	assert_non_null(w->self.base);
	if (model_config_parse(json, "test", &sim.model, &e) || unit_table_init(&w->table, &sim.model, &e))
		fail_msg("%s", e.text);
	w->config.zero.stage3_prefetch_bucket_size = prefetch;
	w->config.zero.stage3_max_reuse_distance = reuse;
	w->plan.window_elements = w->table.n_elements;
	if (small)
		w->plan.window_elements = w->table.unit[0].n + w->table.unit[w->table.n_units - 1].n;
	open_peers(w);
	open_uses(w);
	assert_int_equal(copy_open(w, &e), 0);
}

static void sim_close(void)
{
	struct worker *w = sim.w;

	copy_release(w);
	free(sim.window.base);
	free(sim.words.base);
	event_base_free(w->self.base);
	net_release(&w->compute.net);
	free(w->compute.uses[0]);
	free(w->compute.uses[1]);
	page_map_release(&w->map);
	unit_table_release(&w->table);
	model_config_release(&sim.model);
	for (uint32_t i = 0; i < PEERS; i++)
		free(sim.owner[i].memory);
	free(w->attach.peer);
	free(w->attach.owner);
	free(w->attach.n_owners);
	free(w);
}

static void begin(uint64_t step, bool training)
{
	sim.n_use = 0;
	sim.failed = 0;
	sim.w->span.lease =
		(struct granted_lease){ .id = step * 10, .step = step, .kind = training ? LEASE_TRAIN : LEASE_EVAL };
	copy_begin(sim.w, &sim.w->span.lease);
	copy_run(sim.w);
}

static void expect_units(uint32_t use, uint32_t version)
{
	const struct use *u = &sim.w->copier.fetch.uses[use];

	for (uint32_t i = 0; i < u->n; i++)
		for (uint64_t k = 0; k < sim.w->table.unit[u->unit[i]].n; k++)
			if (sim.use[use].params[i][k] != value(u->unit[i], k, version))
				fail_msg("use %u: unit %u element %llu is not of version %u", use, u->unit[i],
					 (unsigned long long)k, version);
}

/* ------------------------------------------------------------------ tests */

static void spans_of_versions(uint64_t seed, bool small, uint64_t prefetch, uint64_t reuse)
{
	sim_open(seed, small, prefetch, reuse);
	sim.fab.refuse = draw(3) ? 0 : 5;
	for (uint32_t version = 0; version < 3; version++) {
		bool training = draw(3) > 0;
		uint32_t computed = 0, n = sim.w->compute.n_uses[training];

		begin(version + 1, training);
		while (computed < n) {
			publish_next((uint32_t)draw(PEERS), version);
			if (sim.fab.n_ops && draw(4))
				complete_one();
			if (computed < sim.n_use && draw(2)) {
				expect_units(computed, version);
				fetch_finished(&sim.w->copier.fetch, computed++);
			}
			copy_run(sim.w);
		}
		for (uint32_t i = 0; i < PEERS; i++)
			while ((word_of(&sim.owner[i]) & 0xffff) < sim.w->table.n_units)
				publish_next(i, version);
	}
	assert_int_equal(sim.failed, 0);
	assert_int_equal(sim.lost, 0);
	sim_close();
}

static void every_use_gets_its_version(void **state)
{
	(void)state;
	for (uint64_t seed = 1; seed <= 4; seed++) {
		spans_of_versions(seed, false, 1000000000, 1000000000);
		spans_of_versions(seed, true, 1000000000, 1000000000);
		spans_of_versions(seed, true, 0, 0);
		spans_of_versions(seed, false, 200000, 0);
	}
}

/* An owner that is not ready is asked again and again, so that quiet is when only that happens. */
static void run_until_quiet(void)
{
	for (int idle = 0; idle < 4; idle++) {
		const struct timespec pause = { .tv_nsec = WORD_AGAIN_NS };

		copy_run(sim.w);
		while (sim.fab.n_ops) {
			if (op_kind(sim.fab.op[0].op.user) == OP_UNIT)
				idle = 0;
			complete_one();
			copy_run(sim.w);
		}
		nanosleep(&pause, NULL);
	}
}

static void newer_is_stale(void **state)
{
	(void)state;
	sim_open(1, false, 0, 0);
	publish_all(5);
	begin(5, true);
	run_until_quiet();
	assert_int_equal(sim.failed, -ESTALE);
	assert_int_equal(sim.n_use, 0);
	/* The next span is not harmed. */
	copy_cancel(sim.w);
	begin(6, true);
	run_until_quiet();
	assert_int_equal(sim.failed, 0);
	assert_int_equal(sim.n_use, 1);
	expect_units(0, 5);
	sim_close();
}

static void waits_for_the_slow_owner(void **state)
{
	(void)state;
	sim_open(1, false, 0, 0);
	for (uint32_t u = 1; u <= sim.w->table.n_units; u++) {
		publish(0, 3, u);
		publish(2, 3, u);
	}
	begin(4, true);
	run_until_quiet();
	assert_int_equal(sim.n_use, 0);
	assert_int_equal(atomic_load(&sim.w->copier.waits_for), 5);
	publish(1, 3, 1);
	run_until_quiet();
	assert_int_equal(sim.n_use, 1);
	expect_units(0, 3);
	sim_close();
}

/* Recalled in the middle: what is in flight ends, and the next version is read anew. */
static void recalled_in_flight(void **state)
{
	(void)state;
	sim_open(3, true, 1000000000, 1000000000);
	publish_all(0);
	begin(1, true);
	while (sim.fab.n_ops && op_kind(sim.fab.op[0].op.user) == OP_WORD) {
		complete_one();
		copy_run(sim.w);
	}
	assert_true(sim.fab.n_ops > 0);
	copy_cancel(sim.w);
	publish_all(1);
	begin(2, true);
	run_until_quiet();
	assert_int_equal(sim.failed, 0);
	assert_true(sim.n_use > 0);
	for (uint32_t i = 0; i < sim.n_use; i++)
		expect_units(i, 1);
	sim_close();
}

static void a_failed_read_loses_the_peer(void **state)
{
	(void)state;
	sim_open(1, false, 0, 0);
	publish_all(0);
	begin(1, true);
	sim.fab.fail = -EIO;
	complete_one();
	assert_int_equal(sim.lost, 1);
	sim_close();
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(every_use_gets_its_version),   cmocka_unit_test(newer_is_stale),
		cmocka_unit_test(waits_for_the_slow_owner),     cmocka_unit_test(recalled_in_flight),
		cmocka_unit_test(a_failed_read_loses_the_peer),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
