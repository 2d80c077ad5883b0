/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Workers of one host that share what they read: copy.c of several workers over
 * the same owners and a fabric that completes reads in any order, with boards
 * between them, windows in which units give way, workers that stop for a while
 * and workers that are gone in the middle of a claim or a copy. The clock is the
 * test's own. Checked: what a use is given is the unit, whole, of the version
 * asked for; every span ends; and how many bytes crossed the network.
 */
#include "base/base.h"

static uint64_t the_time(void);
#define clock_now_ns the_time
#include "worker/copy.c"
#undef clock_now_ns

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

enum { OWNERS = 2, WORKERS_MAX = 4, OPS_MAX = READS_MAX + OWNERS };

struct fab {
	struct fab_op op[OPS_MAX];
	uint32_t n_ops;
};
struct fab_region {
	uint8_t *base;
	uint64_t bytes;
};

struct side {
	struct worker *w;
	struct fab fab;
	struct fab_region window, words;
	struct board *board;
	struct task use[64];
	uint32_t n_use, computed;
	uint64_t stopped_until;
	bool dead;
};

static struct sim {
	struct model_config model;
	struct unit_table table;
	struct net net;
	struct use *uses;
	uint32_t n_uses, n;
	struct side side[WORKERS_MAX];
	uint8_t *memory[OWNERS];
	uint64_t bytes[OWNERS];
	uint64_t seed, draws, now;
} sim;

static uint64_t the_time(void)
{
	return sim.now;
}

static uint64_t draw(uint64_t below)
{
	return rng_u64(sim.seed, 0, sim.draws++) % below;
}

static float value(uint32_t unit, uint64_t i, uint32_t version)
{
	return (float)(version * 0x100000 + unit * 0x1000 + i % 0xfff);
}

static struct side *side_of(const struct worker *w)
{
	for (uint32_t i = 0; i < sim.n; i++)
		if (sim.side[i].w == w)
			return &sim.side[i];
	fail();
	return NULL;
}

/* ------------------------------------------------- what copy.c calls */

void control_task(struct worker *w, const struct task *t)
{
	struct side *s = side_of(w);

	assert_int_equal(t->kind, TASK_USE);
	assert_int_equal(t->use, s->n_use);
	s->use[s->n_use++] = *t;
}

void attach_lost(struct peer *p, const char *text)
{
	(void)p;
	fail_msg("%s", text);
}

/* Timers do not fire here: every worker is run again and again. */
void attach_pump(struct worker *w)
{
	(void)w;
}

struct neighbour *neighbours_of(struct worker *w, const struct board *b)
{
	for (uint32_t i = 0; i < w->neighbours.n; i++)
		if (w->neighbours.one[i].board == b)
			return &w->neighbours.one[i];
	fail();
	return NULL;
}

enum fab_ready fab_progress_check(uint64_t word, uint16_t branch, uint32_t version, uint16_t unit)
{
	uint32_t has = (uint32_t)(word >> 16) - (unit < (uint16_t)word ? 0 : 1);

	assert_int_equal(branch, 0);
	return has == version ? FAB_READY : (int32_t)(has - version) > 0 ? FAB_PASSED : FAB_NOT_YET;
}

int fabrics_memory(struct worker *w, enum memory_use use, const char *name, uint64_t bytes, void **at, struct err *e)
{
	struct side *s = side_of(w);
	struct fab_region *r = use == MEMORY_WINDOW ? &s->window : &s->words;

	(void)name;
	(void)e;
	r->bytes = bytes;
	r->base = aligned_alloc(4096, round_up_u64(bytes, 4096));
	assert_non_null(r->base);
	memset(r->base, 0, bytes);
	w->fabric[0].region[use] = r;
	*at = r->base;
	return 0;
}

/* Endpoint k + 1 of worker i: i in the high half. */
static int read_ops(struct fab_ep *ep, const struct fab_op *op, uint32_t n)
{
	struct side *s = &sim.side[(uintptr_t)ep >> 8];
	uint32_t owner = ((uintptr_t)ep & 0xff) - 1;

	for (uint32_t i = 0; i < n; i++) {
		assert_true(op[i].bytes > 0 && op[i].bytes <= SLICE_BYTES);
		assert_true(op[i].remote_offset + op[i].bytes <= sim.bytes[owner]);
		assert_true(op[i].local_offset + op[i].bytes <= op[i].local->bytes);
		assert_true(s->fab.n_ops < OPS_MAX);
		s->fab.op[s->fab.n_ops] = op[i];
		s->fab.op[s->fab.n_ops++].remote = (struct fab_remote *)(uintptr_t)(owner + 1);
	}
	return 0;
}

static const struct fab_ops fabric = { .name = "far", .read = read_ops };

static void complete_one(struct side *s)
{
	uint32_t k = (uint32_t)draw(s->fab.n_ops);
	struct fab_op op = s->fab.op[k];
	struct fab_event ev = { .type = FAB_EV_READ, .user = op.user };

	s->fab.op[k] = s->fab.op[--s->fab.n_ops];
	memcpy(op.local->base + op.local_offset, sim.memory[(uintptr_t)op.remote - 1] + op.remote_offset, op.bytes);
	copy_event(s->w, &ev);
}

/* ------------------------------------------------------------- life cycle */

static void publish(struct worker *w, uint32_t version)
{
	for (uint32_t k = 0; k < OWNERS; k++) {
		uint64_t word = (uint64_t)version << 16 | sim.table.n_units;

		for (uint32_t u = 0; u < sim.table.n_units; u++) {
			uint32_t member = w->attach.peer[k].member;
			float *at =
				(float *)(void *)(sim.memory[k] + page_map_share_bytes(&w->map, &sim.table, member, u));
			struct share share;

			page_map_share(&w->map, &sim.table, member, u, &share);
			for (uint32_t i = 0; i < share.n_seg; i++)
				for (uint64_t j = 0; j < share.seg[i].n; j++)
					at[share.seg[i].share_offset + j] = value(u, share.seg[i].unit_offset + j,
										  version);
		}
		memcpy(sim.memory[k], &word, sizeof(word));
	}
}

static void open_owners(struct worker *w, uint32_t index)
{
	struct attach *a = &w->attach;
	const uint32_t ids[OWNERS] = { 2, 5 };

	assert_int_equal(page_map_init(&w->map, &w->table, ids, OWNERS, 16), 0);
	w->n_shards = a->n_peers = OWNERS;
	a->peer = calloc(OWNERS, sizeof(*a->peer));
	a->n_owners = calloc(w->table.n_units, sizeof(*a->n_owners));
	a->owner = calloc((size_t)w->table.n_units * OWNERS, sizeof(*a->owner));
	for (uint32_t i = 0; i < OWNERS; i++) {
		a->peer[i] = (struct peer){ .w = w, .index = i, .member = ids[i], .fabric = &w->fabric[0] };
		a->peer[i].ep = (struct fab_ep *)(uintptr_t)(index << 8 | (i + 1));
		sim.bytes[i] = page_map_share_bytes(&w->map, &w->table, ids[i], w->table.n_units);
		if (!sim.memory[i])
			sim.memory[i] = calloc(1, sim.bytes[i]);
		for (uint32_t u = 0; u < w->table.n_units; u++)
			a->owner[u * OWNERS + a->n_owners[u]++] = i;
	}
}

static void open_worker(uint32_t i, bool small)
{
	struct side *s = &sim.side[i];
	struct worker *w = aligned_alloc(CACHE_LINE, round_up_u64(sizeof(*w), CACHE_LINE));
	struct err e = { 0 };

	assert_non_null(w);
	memset(w, 0, sizeof(*w));
	s->w = w;
	w->fabric[0].ops = &fabric;
	w->self.member = 10 + i;
	w->self.base = event_base_new();
	w->table = sim.table;
	w->config.zero.stage3_prefetch_bucket_size = small ? 0 : 1000000000;
	w->config.zero.stage3_max_reuse_distance = small ? 0 : 1000000000;
	w->plan.window_elements = w->table.n_elements;
	if (small)
		w->plan.window_elements = w->table.unit[0].n + w->table.unit[w->table.n_units - 1].n;
	open_owners(w, i);
	w->neighbours.on = true;
	s->board = calloc(1, board_bytes(w->table.n_units));
	board_init(s->board, 10 + i, w->table.n_units);
	w->neighbours.boards.mine = s->board;
	assert_int_equal(copy_open(w, &e), 0);
	assert_true(w->copier.cut[0].n > 1);
}

static void sim_open(uint64_t seed, uint32_t n, bool small)
{
	static const char json[] =
		"{\"model_type\": \"gpt2\", \"vocab_size\": 6000, \"n_positions\": 64, \"n_embd\": 128, "
		"\"n_layer\": 3, \"n_head\": 2}";
	struct net_config cfg = { .model = &sim.model, .table = &sim.table, .max_span = 1 };
	struct err e = { 0 };

	memset(&sim, 0, sizeof(sim));
	sim.seed = seed;
	sim.n = n;
	sim.now = 1;
	if (model_config_parse(json, "test", &sim.model, &e) || unit_table_init(&sim.table, &sim.model, &e) ||
	    net_init(&sim.net, &cfg, &e))
		fail_msg("%s", e.text);
	sim.uses = calloc(net_uses_max(&sim.model), sizeof(struct use));
	sim.n_uses = net_uses(&sim.net, true, sim.uses);
	for (uint32_t i = 0; i < n; i++)
		open_worker(i, small);
	for (uint32_t i = 0; i < n; i++) {
		struct neighbours *h = &sim.side[i].w->neighbours;

		for (uint32_t k = 0; k < n; k++) {
			if (k == i)
				continue;
			h->one[h->n++] = (struct neighbour){ .member = 10 + k,
							     .attached = true,
							     .board = sim.side[k].board,
							     .window = sim.side[k].window.base,
							     .window_bytes = sim.side[k].window.bytes };
			assert_int_equal(boards_add(&h->boards, sim.side[k].board), 0);
		}
	}
}

static void sim_close(void)
{
	for (uint32_t i = 0; i < sim.n; i++) {
		struct side *s = &sim.side[i];

		copy_release(s->w);
		event_base_free(s->w->self.base);
		page_map_release(&s->w->map);
		free(s->w->attach.peer);
		free(s->w->attach.owner);
		free(s->w->attach.n_owners);
		free(s->w);
		free(s->board);
		free(s->window.base);
		free(s->words.base);
	}
	for (uint32_t k = 0; k < OWNERS; k++)
		free(sim.memory[k]);
	net_release(&sim.net);
	free(sim.uses);
	unit_table_release(&sim.table);
	model_config_release(&sim.model);
}

/* ---------------------------------------------------------------- a version */

static void begin(struct side *s, uint32_t version)
{
	s->n_use = s->computed = 0;
	fetch_plan(&s->w->copier.fetch, version, sim.uses, sim.n_uses);
	if (!s->dead && sim.now >= s->stopped_until)
		copy_run(s->w);
	else
		s->w->copier.again_ns = 1;
}

static void compute(struct side *s, uint32_t version)
{
	const struct use *u = &sim.uses[s->computed];

	for (uint32_t i = 0; i < u->n; i++) {
		uint64_t n = sim.table.unit[u->unit[i]].n;

		for (uint64_t k = 0; k < n; k += 61)
			if (s->use[s->computed].params[i][k] != value(u->unit[i], k, version))
				fail_msg("use %u: unit %u element %llu is not of version %u", s->computed, u->unit[i],
					 (unsigned long long)k, version);
	}
	fetch_finished(&s->w->copier.fetch, s->computed++);
}

/* It is gone, as the others see it: what it was in the middle of stays as it is. */
static void die(uint32_t victim)
{
	sim.side[victim].dead = true;
	for (uint32_t i = 0; i < sim.n; i++) {
		struct worker *w = sim.side[i].w;

		if (sim.side[i].dead)
			continue;
		copy_forget(w, sim.side[victim].board);
		boards_remove(&w->neighbours.boards, 10 + victim);
		for (uint32_t k = 0; k < w->neighbours.n; k++)
			if (w->neighbours.one[k].board == sim.side[victim].board)
				w->neighbours.one[k] = w->neighbours.one[--w->neighbours.n];
		copy_run(w);
	}
}

static void turn(struct side *s, uint32_t version)
{
	if (s->dead || sim.now < s->stopped_until)
		return;
	/* A worker is woken by an event or by its timer, and by nothing else. */
	if (s->fab.n_ops && draw(3))
		complete_one(s);
	else if (s->computed < s->n_use && draw(2))
		compute(s, version);
	else if (!s->w->copier.again_ns || s->w->copier.again_ns > sim.now)
		return;
	copy_run(s->w);
}

static bool all_done(void)
{
	for (uint32_t i = 0; i < sim.n; i++)
		if (!sim.side[i].dead && sim.side[i].computed < sim.n_uses)
			return false;
	return true;
}

/* stops: in a thousand turns; a stop lasts longer than a deadline. */
static void run_version(uint32_t version, uint32_t stops)
{
	publish(sim.side[0].w, version);
	for (uint32_t i = 0; i < sim.n; i++)
		begin(&sim.side[i], version);
	for (uint32_t turns = 0; !all_done(); turns++) {
		struct side *s = &sim.side[draw(sim.n)];

		assert_true(turns < 1000000);
		sim.now += 1 + draw(20000);
		if (draw(1000) < stops)
			s->stopped_until = sim.now + 3 * DEADLINE_NS;
		turn(s, version);
		/* Everybody sleeps: time passes. */
		if (stops)
			sim.now += DEADLINE_NS / 1000;
	}
}

static uint64_t sum(size_t counter)
{
	uint64_t all = 0;

	for (uint32_t i = 0; i < sim.n; i++)
		all += *(_Atomic uint64_t *)((uint8_t *)&sim.side[i].w->counters + counter);
	return all;
}
#define SUM(name) sum(offsetof(struct worker_counters, name))

static uint64_t all_bytes(void)
{
	return sim.table.n_elements * sizeof(float);
}

/* ------------------------------------------------------------------ tests */

/* Windows hold everything: each byte crosses the network once a version, whoever asks first. */
static void once_a_host(void **state)
{
	(void)state;
	for (uint64_t seed = 1; seed <= 12; seed++) {
		uint32_t n = 1 + (uint32_t)(seed % WORKERS_MAX);

		sim_open(seed, n, false);
		for (uint32_t version = 1; version <= 3; version++) {
			run_version(version, 0);
			assert_int_equal(SUM(network_bytes), version * all_bytes());
			assert_int_equal(SUM(neighbour_bytes), (n - 1) * version * all_bytes());
		}
		assert_int_equal(SUM(seized), 0);
		sim_close();
	}
}

/* Units give way all the time, also while a neighbour wants them: more is read, never something wrong. */
static void small_windows(void **state)
{
	uint64_t copied = 0;

	(void)state;
	for (uint64_t seed = 1; seed <= 12; seed++) {
		sim_open(seed, 2 + (uint32_t)(seed % 3), true);
		for (uint32_t version = 1; version <= 3; version++)
			run_version(version, 0);
		/* A unit is read for a use of each worker at most. */
		assert_true(SUM(network_bytes) <= SUM(fetch_bytes));
		copied += SUM(neighbour_bytes);
		sim_close();
	}
	assert_true(copied > 0);
}

/* Who stops in the middle of a claim holds nobody up for longer than the deadline. */
static void stopped(void **state)
{
	uint64_t seized = 0;

	(void)state;
	for (uint64_t seed = 1; seed <= 12; seed++) {
		sim_open(seed, 3, seed % 2);
		for (uint32_t version = 1; version <= 3; version++)
			run_version(version, 3);
		if (seed % 2 == 0)
			assert_int_equal(SUM(network_bytes), 3 * all_bytes() + SUM(seized_bytes));
		seized += SUM(seized);
		sim_close();
	}
	assert_true(seized > 0);
}

/* Dead with claims, with marks, in the middle of a copy. */
static void gone(void **state)
{
	(void)state;
	for (uint64_t seed = 1; seed <= 24; seed++) {
		uint64_t turns;

		sim_open(seed, 4, seed % 2);
		publish(sim.side[0].w, 1);
		for (uint32_t i = 0; i < sim.n; i++)
			begin(&sim.side[i], 1);
		turns = draw(200);
		for (uint64_t i = 0; i < turns; i++)
			turn(&sim.side[draw(sim.n)], 1);
		die(1 + (uint32_t)draw(3));
		for (uint32_t i = 0; !all_done(); i++) {
			assert_true(i < 1000000);
			sim.now += 10000;
			turn(&sim.side[draw(sim.n)], 1);
		}
		run_version(2, 0);
		sim_close();
	}
}

/* Worker 1 is in the middle of a copy of worker 0's unit 0, which that has read for its first use. */
static struct copy_portion *open_half_copied(void)
{
	struct side *s = &sim.side[1];

	sim_open(5, 2, true);
	publish(sim.side[0].w, 1);
	begin(&sim.side[0], 1);
	for (int turns = 0; sim.side[0].n_use == 0; turns++) {
		assert_true(turns < 100000);
		sim.now += LOOK_AGAIN_NS;
		turn(&sim.side[0], 1);
	}
	fetch_plan(&s->w->copier.fetch, 1, sim.uses, sim.n_uses);
	/* One turn with nothing to copy with: marked, not copied. */
	s->w->copier.copy_left = 0;
	take_actions(s->w);
	advance_units(s->w);
	for (uint32_t i = 0; i < BOARD_PORTIONS; i++)
		if (s->w->copier.unit[0].portion[i].state == COPY_NEIGHBOUR)
			return &s->w->copier.unit[0].portion[i];
	fail();
	return NULL;
}

static void a_copy_holds_the_place(void **state)
{
	struct copier *c;

	(void)state;
	open_half_copied();
	c = &sim.side[0].w->copier;
	if (sim.side[0].computed == 0)
		compute(&sim.side[0], 1);
	copy_run(sim.side[0].w);
	assert_true(c->fetch.held_up);
	assert_int_equal(c->fetch.unit[1].state, FETCH_ABSENT);
	/* All that is marked is more than a turn copies. */
	copy_run(sim.side[1].w);
	copy_run(sim.side[1].w);
	copy_run(sim.side[0].w);
	assert_false(c->fetch.held_up);
	assert_int_equal(c->fetch.unit[1].state, FETCH_READING);
	sim_close();
}

/* Dead in the middle of a copy from it: the copy is begun anew, from the owners. */
static void gone_while_copied(void **state)
{
	struct copy_portion *at;

	(void)state;
	at = open_half_copied();
	die(0);
	assert_int_not_equal(at->state, COPY_NEIGHBOUR);
	for (int turns = 0; !all_done(); turns++) {
		assert_true(turns < 1000000);
		sim.now += LOOK_AGAIN_NS;
		turn(&sim.side[1], 1);
	}
	assert_int_equal(SUM(neighbour_bytes), 0);
	sim_close();
}

/* Its marks hold a place; it was evicted, the place was used, and it wakes: what it copied does not count. */
static void wakes_up_evicted(void **state)
{
	struct boards *b;
	struct side *s;

	(void)state;
	open_half_copied();
	s = &sim.side[1];
	b = &sim.side[0].w->neighbours.boards;
	board_withdraw(b, 0);
	assert_false(board_is_free(b, 0));
	/* Its worker reckons with nobody any more, and something else comes into the place. */
	boards_remove(b, 11);
	assert_true(board_is_free(b, 0));
	memset(sim.side[0].window.base, 0xff, sim.side[0].window.bytes);
	s->w->copier.again_ns = 1;
	for (int turns = 0; s->n_use == 0; turns++) {
		assert_true(turns < 100000);
		sim.now += DEADLINE_NS;
		turn(s, 1);
	}
	compute(s, 1);
	assert_int_equal(SUM(neighbour_bytes), 0);
	sim_close();
}

/* A board that says nonsense costs its time, and nothing is read outside the window. */
static void nonsense_on_a_board(void **state)
{
	(void)state;
	sim_open(6, 2, false);
	publish(sim.side[0].w, 1);
	for (uint32_t s = 0; s < BOARD_PORTIONS; s++)
		board_there(&sim.side[1].w->neighbours.boards, 0, s, 1, sim.side[1].window.bytes - 4096);
	begin(&sim.side[0], 1);
	for (int turns = 0; sim.side[0].n_use == 0; turns++) {
		assert_true(turns < 100000);
		sim.now += LOOK_AGAIN_NS;
		turn(&sim.side[0], 1);
	}
	compute(&sim.side[0], 1);
	assert_int_equal(SUM(seized), sim.side[0].w->copier.cut[0].n);
	assert_int_equal(SUM(neighbour_bytes), 0);
	sim_close();
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(once_a_host),
		cmocka_unit_test(small_windows),
		cmocka_unit_test(stopped),
		cmocka_unit_test(gone),
		cmocka_unit_test(a_copy_holds_the_place),
		cmocka_unit_test(gone_while_copied),
		cmocka_unit_test(wakes_up_evicted),
		cmocka_unit_test(nonsense_on_a_board),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
