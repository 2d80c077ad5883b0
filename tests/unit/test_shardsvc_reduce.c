/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An owner's step with the real coverage, folds and data thread: workers, the
 * coordinator and the fabric are played by the test. Whoever comes in whatever
 * order, in place or pushed, with memory or without: the same vote, the same
 * gradient. And whatever does not belong in the protocol ends its connection
 * and has no other effect.
 */
#include "tests/unit/test_shardsvc.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <unistd.h>

#define M 6u
#define NODES 16u
#define WORKERS 6u

struct world;

/* The worker's side of a connection; its address is the connection's. */
struct worker {
	struct world *w;
	struct peer *peer;
	uint8_t *region; /* flat gradients of all pieces, one behind the other */
	uint8_t *inbox;
	uint64_t next_offer;
	uint32_t open; /* offers without an answer */
	uint32_t answers[OFFER_CLOSED + 1];
	bool closed;
	struct msg_answer granted[PEER_OFFERS]; /* pushes to be done */
	uint32_t n_granted;
	struct {
		uint64_t id;
		uint32_t piece, node;
	} offered[PEER_OFFERS];
};

struct world {
	struct shard s;
	struct page_map map;
	void *region;
	struct fab_ops ops;
	bool push;
	uint64_t where[8], bytes; /* of a piece's flat unit in a worker's region */
	uint32_t n_nodes;
	struct tree_node node[NODES]; /* the leaves first, then their parents */
	float *value[8][NODES];       /* flat */
	struct worker worker[WORKERS];
	uint32_t votes, applied, starved, failures;
	struct msg_vote vote;
	struct msg_applied last_applied;
	struct msg_starved last_starved;
};

/* -------------------------------------------------------- what is played here */

int __wrap_member_link_send(struct member_link *l, unsigned type, const void *msg);
int __wrap_conn_send(struct conn *c, unsigned type, const void *msg);
void __wrap_conn_close(struct conn *c, const char *why);
const char *__wrap_conn_peer_text(const struct conn *c);

int __wrap_member_link_send(struct member_link *l, unsigned type, const void *msg)
{
	struct world *w = (struct world *)l;

	switch (type) {
	case WIRE_VOTE:
		w->vote = *(const struct msg_vote *)msg;
		w->votes++;
		break;
	case WIRE_APPLIED:
		w->last_applied = *(const struct msg_applied *)msg;
		w->applied++;
		break;
	case WIRE_STARVED:
		w->last_starved = *(const struct msg_starved *)msg;
		w->starved++;
		break;
	case WIRE_FAILURE:
		w->failures++;
		break;
	default:
		assert_int_equal(type, WIRE_READY);
	}
	return 0;
}

int __wrap_conn_send(struct conn *c, unsigned type, const void *msg)
{
	struct worker *k = (struct worker *)c;
	const struct msg_answer *m = msg;

	assert_int_equal(type, WIRE_ANSWER);
	assert_in_range(m->verdict, OFFER_GRANTED, OFFER_CLOSED);
	k->answers[m->verdict]++;
	if (m->verdict == OFFER_GRANTED) {
		k->granted[k->n_granted++] = *m;
		return 0;
	}
	k->open--;
	for (uint32_t i = 0; i < PEER_OFFERS; i++)
		if (k->offered[i].id == m->offer)
			k->offered[i].id = 0;
	return 0;
}

void __wrap_conn_close(struct conn *c, const char *why)
{
	assert_non_null(why);
	((struct worker *)c)->closed = true;
}

const char *__wrap_conn_peer_text(const struct conn *c)
{
	(void)c;
	return "worker";
}

static void *region_addr(struct fab_region *r)
{
	return r;
}

static void region_close(struct fab_region *r)
{
	(void)r;
}

static void remote_close(struct fab_remote *r)
{
	/* It is read by nobody any more: reading it now would be seen. */
	memset(r, 0xff, 4096);
}

static void disconnect(struct fab_ep *ep)
{
	(void)ep;
}

/* --------------------------------------------------------------------- world */

static void leaf_values(struct world *w, uint32_t piece, uint32_t leaf)
{
	const struct piece *p = &w->s.store.piece[piece];
	const struct unit_part *part = &w->s.table.unit[p->unit].part[p->part];
	float *x = calloc(w->s.table.unit[p->unit].n, sizeof(*x));

	assert_non_null(x);
	rng_fill_normal(x, part->end < w->s.table.unit[p->unit].n_used ? part->end : w->s.table.unit[p->unit].n_used, 3,
			piece * 100 + leaf, 0, 0.0f, 1.0f);
	w->value[piece][leaf] = x;
}

static uint32_t node_index(const struct world *w, struct tree_node n)
{
	uint32_t i = 0;

	while (i < w->n_nodes && !tree_equal(w->node[i], n))
		i++;
	return i;
}

/* Every node of the tree with its value, children before parents. */
static void add_node(struct world *w, struct tree_node n)
{
	struct tree_node left, right;

	if (!tree_children(n, M, &left, &right))
		return;
	add_node(w, left);
	add_node(w, right);
	for (uint32_t k = 0; k < w->s.store.n_pieces; k++) {
		uint64_t elements = w->s.table.unit[w->s.store.piece[k].unit].n;
		const float *a = w->value[k][node_index(w, left)], *b = w->value[k][node_index(w, right)];
		float *x = malloc(elements * sizeof(*x));

		assert_non_null(x);
		for (uint64_t i = 0; i < elements; i++)
			x[i] = a[i] + b[i];
		w->value[k][w->n_nodes] = x;
	}
	w->node[w->n_nodes++] = n;
}

static void make_values(struct world *w)
{
	for (uint32_t i = 0; i < M; i++) {
		w->node[i] = tree_canonical((struct tree_node){ .first = i }, M);
		for (uint32_t k = 0; k < w->s.store.n_pieces; k++)
			leaf_values(w, k, i);
	}
	w->n_nodes = M;
	add_node(w, tree_root(M));
	for (uint32_t k = 0; k < w->s.store.n_pieces; k++) {
		w->where[k] = w->bytes;
		w->bytes += w->s.table.unit[w->s.store.piece[k].unit].n * sizeof(float);
	}
}

static void add_worker(struct world *w, uint32_t i)
{
	struct worker *k = &w->worker[i];
	struct peer *p = calloc(1, sizeof(*p));

	assert_non_null(p);
	*k = (struct worker){ .w = w, .peer = p, .next_offer = 1 };
	k->region = aligned_alloc(4096, round_up_u64(w->bytes, 4096));
	k->inbox = aligned_alloc(4096, round_up_u64(w->bytes, 4096));
	assert_true(k->region && k->inbox);
	*p = (struct peer){ .shard = &w->s,
			    .slot = i,
			    .member = 100 + i,
			    .serial = i + 1,
			    .state = PEER_ATTACHED,
			    .conn = (struct conn *)k,
			    .filling = PEER_NONE,
			    .next_imm = UINT32_MAX - 1,
			    .inbox = (struct fab_region *)k->inbox,
			    .fabric = &w->s.fabric[0],
			    .in_place = !w->push,
			    .slices_seen = w->push ? calloc(4, sizeof(uint64_t)) : NULL,
			    .gradients = (struct fab_remote *)k->region,
			    .gradients_at = k->region,
			    .gradients_bytes = w->bytes };
	w->s.peer[i] = p;
	w->s.n_slots = i + 1;
}

static void settle(struct world *w)
{
	struct job_done d;

	while (w->s.data.in_flight) {
		if (data_reap(&w->s.data, &d))
			reduce_done(&w->s, &d);
		else
			sched_yield();
	}
}

struct options {
	bool push;
	uint32_t max_held;
	uint64_t memory; /* elements of planned memory for sums */
};

static void open_world(struct world **out, const struct options *o)
{
	struct world *w = aligned_alloc(_Alignof(struct world), sizeof(*w));
	struct shard *s = &w->s;
	struct sum_config sums = { .max = 4096,
				   .memory_elements = o->memory,
				   .spill_elements = 1u << 20,
				   .limit_elements = 16u << 20,
				   .spill_dir = "/tmp" };
	char reason[160];
	struct err e;

	assert_non_null(w);
	memset(w, 0, sizeof(*w));
	log_init(&s->log, open("/dev/null", O_WRONLY | O_CLOEXEC), "test");
	s->self.log = &s->log;
	s->link = (struct member_link *)w;
	w->push = o->push;
	w->ops = (struct fab_ops){ .name = "test",
				   .maps = !o->push,
				   .region_addr = region_addr,
				   .region_close = region_close,
				   .remote_close = remote_close,
				   .disconnect = disconnect };
	s->fabric[0] = (struct fabric){ .shard = s, .ops = &w->ops };
	s->n_fabrics = 1;
	s->prepared = true;
	s->batch.n_micro = M;
	s->job.max_held_nodes = o->max_held;
	s->job.optimizer = (struct optimizer_config){ .beta1 = 0.9, .beta2 = 0.99, .eps = 1e-8, .decoupled = true };
	test_table(&s->table);
	test_map(&w->map, &s->table, 2);
	test_scatter(&w->map, &s->table, 11);
	assert_int_equal(store_init(&s->store, &s->table, &w->map, w->map.member[0]), 0);
	assert_in_range(s->store.n_pieces, 3, 8);
	w->region = aligned_alloc(4096, round_up_u64(PARAM_HEADER + s->store.n * sizeof(float), 4096));
	assert_non_null(w->region);
	assert_int_equal(store_allocate(&s->store, w->region, NULL), 0);
	assert_int_equal(sums_init(&s->sums, &sums, NULL), 0);
	assert_int_equal(reduce_init(s), 0);
	s->data.store = &s->store;
	s->data.sums = &s->sums;
	s->data.wait = &s->waits[WAIT_OF_DATA];
	s->data.threads = 2;
	assert_int_equal(k_profile_detect("portable", &s->data.profile, reason, NULL), 0);
	assert_int_equal(data_start(&s->data, &e), 0);
	make_values(w);
	for (uint32_t i = 0; i < WORKERS; i++)
		add_worker(w, i);
	settle(w);
	assert_true(s->ready);
	*out = w;
}

static void close_world(struct world *w)
{
	struct shard *s = &w->s;

	data_stop(&s->data);
	data_release(&s->data);
	reduce_release(s);
	sums_release(&s->sums);
	store_release(&s->store);
	page_map_release(&w->map);
	for (uint32_t k = 0; k < 8; k++)
		for (uint32_t i = 0; i < NODES; i++)
			free(w->value[k][i]);
	for (uint32_t i = 0; i < WORKERS; i++) {
		free(w->worker[i].region);
		free(w->worker[i].inbox);
		if (s->peer[i])
			free(s->peer[i]->slices_seen);
		free(s->peer[i]);
	}
	unit_table_release(&s->table);
	free(w->region);
	close(s->log.fd);
	free(w);
}

/* ------------------------------------------------------------------- playing */

static int send_step(struct world *w, bool commit, uint64_t step)
{
	const struct msg_step m = { .has_commit = commit,
				    .commit_step = step - 1,
				    .apply = 1,
				    .grad_scale = 1.0 / M,
				    .lr = 1e-3,
				    .bias1 = 1,
				    .bias2 = 1,
				    .hash_wanted = 1,
				    .has_open = 1,
				    .open_step = step,
				    .n_micro = M };

	return reduce_step(&w->s, &m);
}

static int say(struct worker *k, unsigned type, const union wire_msg *m)
{
	const struct wire_header h = { .type = (uint16_t)type };

	return inbox_message(k->peer, &h, m);
}

static struct msg_offer offer_of(struct worker *k, uint32_t piece, uint32_t node, uint64_t step, bool wanted)
{
	const struct piece *p = &k->w->s.store.piece[piece];

	return (struct msg_offer){ .step = step,
				   .offer = k->next_offer++,
				   .unit = p->unit,
				   .part = p->part,
				   .first = k->w->node[node].first,
				   .level = k->w->node[node].level,
				   .where = k->w->where[piece],
				   .wanted = wanted };
}

static void offer(struct worker *k, uint32_t piece, uint32_t node, uint64_t step, bool wanted)
{
	const struct world *w = k->w;
	union wire_msg m = { .offer = offer_of(k, piece, node, step, wanted) };
	uint32_t i = 0;

	memcpy(k->region + w->where[piece], w->value[piece][node],
	       w->s.table.unit[w->s.store.piece[piece].unit].n * sizeof(float));
	while (k->offered[i].id)
		assert_true(++i < PEER_OFFERS);
	k->offered[i].id = m.offer.offer;
	k->offered[i].piece = piece;
	k->offered[i].node = node;
	k->open++;
	assert_int_equal(say(k, WIRE_OFFER, &m), 0);
}

static void want_all(struct worker *k)
{
	for (uint32_t i = 0; i < PEER_OFFERS; i++) {
		const union wire_msg m = { .want = { .offer = k->offered[i].id } };

		if (k->offered[i].id)
			assert_int_equal(say(k, WIRE_WANT, &m), 0);
	}
}

/* Writes what was granted first, and gives notice of its slices, the last one first and each twice. */
static void push(struct worker *k)
{
	const struct world *w = k->w;
	struct msg_answer g = k->granted[0];
	uint32_t i = 0;

	while (k->offered[i].id != g.offer)
		i++;
	const struct piece *p = &w->s.store.piece[k->offered[i].piece];
	const float *flat = w->value[k->offered[i].piece][k->offered[i].node];

	assert_int_equal(g.slices, (p->n * sizeof(float) + PUSH_SLICE - 1) / PUSH_SLICE);
	for (uint32_t s = 0; s < p->n_seg; s++)
		memcpy((float *)k->inbox + p->seg[s].share_offset, flat + p->seg[s].unit_offset,
		       p->seg[s].n * sizeof(float));
	memmove(k->granted, k->granted + 1, --k->n_granted * sizeof(g));
	for (uint32_t s = g.slices; s-- > 0;) {
		inbox_notice(k->peer, g.imm + s);
		inbox_notice(k->peer, g.imm + s);
	}
}

/* Leases the nodes in order to whoever is free, at random, and plays on until the vote. */
static void play_step(struct world *w, uint64_t step, const uint32_t *nodes, uint32_t n, uint64_t seed)
{
	uint32_t next = 0, votes = w->votes;

	for (uint64_t i = 0; w->votes == votes; i++) {
		struct worker *k = &w->worker[rng_u64(seed, 1, i) % WORKERS];
		uint64_t luck = rng_u64(seed, 2, i);

		if (k->n_granted)
			push(k);
		else if (!k->open && next < n && luck % 3 == 0)
			for (uint32_t p = w->s.store.n_pieces, node = nodes[next++]; p-- > 0;)
				offer(k, p, node, step, luck % 2);
		else if (k->open && luck % 4 == 0)
			want_all(k);
		for (struct job_done d; luck % 5 && data_reap(&w->s.data, &d);)
			reduce_done(&w->s, &d);
	}
	assert_int_equal(w->vote.step, step);
	settle(w);
	for (uint32_t i = 0; i < WORKERS; i++)
		assert_int_equal(w->worker[i].open, 0);
	assert_int_equal(w->s.sums.n_used, 0);
}

static void check_gradient(const struct world *w)
{
	const struct store *s = &w->s.store;

	for (uint32_t u = 0; u < w->s.table.n_units; u++) {
		const struct piece *p = store_piece(s, u, 0), *other = store_piece(s, u, 1);

		for (uint32_t k = 0; p && k < p->n_seg; k++)
			for (uint64_t i = 0; i < p->seg[k].n; i++) {
				uint64_t at = p->seg[k].unit_offset + i;
				float want = w->value[p - s->piece][w->n_nodes - 1][at];

				if (other && at < w->s.table.unit[u].part[1].end)
					want += w->value[other - s->piece][w->n_nodes - 1][at];
				assert_true(p->accumulator[p->seg[k].share_offset + i] == want);
			}
	}
}

/* Spans that cover M in different ways, as indices of nodes. */
static uint32_t spans(const struct world *w, uint32_t how, uint32_t out[M])
{
	static const struct tree_node cuts[][M] = {
		{ { 0, 0 }, { 1, 0 }, { 2, 0 }, { 3, 0 }, { 4, 0 }, { 5, 0 } },
		{ { 0, 1 }, { 2, 1 }, { 4, 1 } },
		{ { 0, 2 }, { 4, 0 }, { 5, 0 } },
		{ { 0, 0 }, { 1, 0 }, { 2, 1 }, { 4, 1 } },
		{ { 0, 3 } },
	};
	static const uint32_t n[] = { 6, 3, 3, 4, 1 };

	for (uint32_t i = 0; i < n[how]; i++) {
		out[i] = node_index(w, tree_canonical(cuts[how][i], M));
		assert_true(out[i] < w->n_nodes);
	}
	return n[how];
}
#define CUTS 5u

/* --------------------------------------------------------------------- tests */

static void any_order_gives_the_same_vote(void **state)
{
	static const struct options options[] = {
		{ .max_held = 8, .memory = 8u << 20 },
		{ .max_held = 1, .memory = 0 },
		{ .max_held = 2, .memory = 1u << 20, .push = true },
		{ .max_held = 8, .memory = 0, .push = true },
	};
	struct msg_vote first = { 0 };
	uint64_t spilled = 0;
	(void)state;

	for (uint32_t o = 0; o < ARRAY_LEN(options); o++) {
		struct world *w;

		open_world(&w, &options[o]);
		for (uint64_t step = 1; step <= 3 * CUTS; step++) {
			uint32_t nodes[M], n = spans(w, (uint32_t)step % CUTS, nodes);

			assert_int_equal(send_step(w, step > 1, step), 0);
			play_step(w, step, nodes, n, 100 * o + step);
			check_gradient(w);
			if (!first.step)
				first = w->vote;
			assert_memory_equal(w->vote.square_sum, first.square_sum, sizeof(first.square_sum));
		}
		settle(w);
		assert_int_equal(w->applied, 3 * CUTS - 1);
		assert_int_equal(w->last_applied.step, 3 * CUTS - 1);
		assert_int_equal(w->last_applied.has_hash, 1);
		spilled += w->s.sums.spilled_bytes;
		if (options[o].push)
			assert_int_equal(w->s.count.grants, w->s.count.taken);
		close_world(w);
	}
	assert_true(spilled > 0);
}

static void the_vote_is_the_sum_of_squares(void **state)
{
	const struct options o = { .max_held = 8, .memory = 8u << 20 };
	struct exact_sum got;
	struct world *w;
	uint32_t nodes[M], n;
	uint64_t words[9];
	double want = 0;
	(void)state;

	open_world(&w, &o);
	n = spans(w, 1, nodes);
	assert_int_equal(send_step(w, false, 1), 0);
	play_step(w, 1, nodes, n, 5);
	memcpy(words, w->vote.square_sum, sizeof(words));
	for (uint32_t i = 0; i < EXACT_SUM_WORDS; i++)
		got.w[i] = le64toh(words[i]);
	got.non_finite = words[8];
	for (uint32_t u = 0; u < w->s.table.n_units; u++) {
		const struct piece *p = store_piece(&w->s.store, u, 0);

		for (uint64_t i = 0; p && i < p->n; i++)
			want += (double)p->accumulator[i] * p->accumulator[i];
	}
	assert_true(exact_sum_value(&got) > want * (1 - 1e-9) && exact_sum_value(&got) < want * (1 + 1e-9));
	close_world(w);
}

static void offers_of_the_next_step_wait_and_old_ones_are_closed(void **state)
{
	const struct options o = { .max_held = 8, .memory = 8u << 20 };
	struct world *w;
	struct worker *k;
	(void)state;

	open_world(&w, &o);
	k = &w->worker[0];
	/* Before any STEP is here. */
	for (uint32_t p = 0; p < w->s.store.n_pieces; p++)
		offer(k, p, w->n_nodes - 1, 1, true);
	assert_int_equal(k->open, w->s.store.n_pieces);
	assert_int_equal(send_step(w, false, 1), 0);
	settle(w);
	assert_int_equal(w->votes, 1);
	assert_int_equal(k->answers[OFFER_TAKEN], w->s.store.n_pieces);
	/* Voted: what comes for step 1 is too late, what comes for step 2 waits, and may be taken back. */
	offer(k, 0, 0, 1, true);
	assert_int_equal(k->answers[OFFER_CLOSED], 1);
	offer(k, 0, 0, 2, false);
	assert_int_equal(k->open, 1);
	const union wire_msg back = { .withdraw = { .offer = k->next_offer - 1 } };
	assert_int_equal(say(k, WIRE_WITHDRAW, &back), 0);
	assert_int_equal(k->answers[OFFER_CLOSED], 2);
	/* Its answer crossed: nothing happens. */
	assert_int_equal(say(k, WIRE_WITHDRAW, &back), 0);
	const union wire_msg want = { .want = { .offer = 12345 } };
	assert_int_equal(say(k, WIRE_WANT, &want), 0);
	assert_false(k->closed);
	assert_int_equal(k->open, 0);
	close_world(w);
}

static void what_is_covered_is_not_folded_twice(void **state)
{
	const struct options o = { .max_held = 8, .memory = 8u << 20 };
	struct world *w;
	(void)state;

	open_world(&w, &o);
	assert_int_equal(send_step(w, false, 1), 0);
	for (uint32_t p = 0; p < w->s.store.n_pieces; p++)
		offer(&w->worker[0], p, node_index(w, (struct tree_node){ 0, 2 }), 1, true);
	for (uint32_t p = 0; p < w->s.store.n_pieces; p++)
		offer(&w->worker[1], p, 1, 1, true);
	settle(w);
	assert_int_equal(w->worker[1].answers[OFFER_COVERED], w->s.store.n_pieces);
	for (uint32_t p = 0; p < w->s.store.n_pieces; p++)
		offer(&w->worker[2], p, node_index(w, tree_canonical((struct tree_node){ 4, 1 }, M)), 1, true);
	settle(w);
	assert_int_equal(w->votes, 1);
	check_gradient(w);
	close_world(w);
}

/* A message that breaks the protocol: its connection goes, and nothing else happens. */
static void check_refused(struct world *w, uint32_t worker, const struct msg_offer *bad)
{
	struct worker *k = &w->worker[worker];
	const union wire_msg m = { .offer = *bad };
	uint32_t open = k->peer->n_offers;

	assert_int_equal(say(k, WIRE_OFFER, &m), -EPROTO);
	assert_true(k->closed);
	assert_int_equal(k->peer->n_offers, open);
	k->closed = k->peer->closing = false;
}

static void broken_offers_end_the_connection(void **state)
{
	const struct options o = { .max_held = 8, .memory = 8u << 20 };
	struct world *w;
	struct worker *k;
	struct msg_offer good, bad;
	(void)state;

	open_world(&w, &o);
	k = &w->worker[0];
	assert_int_equal(send_step(w, false, 1), 0);
	good = offer_of(k, 0, 0, 1, false);
#define REFUSED(change)                    \
	do {                               \
		bad = good;                \
		change;                    \
		check_refused(w, 0, &bad); \
	} while (0)
	REFUSED(bad.unit = w->s.table.n_units);
	REFUSED(bad.unit = UINT32_MAX);
	REFUSED(bad.part = 2);
	REFUSED(bad.part = UINT32_MAX);
	REFUSED(bad.first = M);
	REFUSED(bad.level = 40);
	REFUSED(bad.first = 1; bad.level = 1);
	REFUSED(bad.step = 3);
	REFUSED(bad.where += 4);
	REFUSED(bad.where = w->bytes);
	REFUSED(bad.where = UINT64_MAX - 63);
	offer(k, 0, 0, 1, false);
	REFUSED(bad.offer = k->next_offer - 1; bad.unit = w->s.store.piece[2].unit);
	REFUSED((void)0);
#undef REFUSED
	assert_int_equal(w->s.count.peers_dropped, 13);
	/* Messages that are not a worker's, and one that is not attached yet. */
	assert_int_equal(say(k, WIRE_VOTE, &(union wire_msg){ 0 }), -EPROTO);
	w->worker[1].peer->state = PEER_EXCHANGE;
	assert_int_equal(say(&w->worker[1], WIRE_OFFER, &(union wire_msg){ .offer = good }), -EPROTO);
	assert_int_equal(w->failures, 0);
	close_world(w);
}

static void lose(struct worker *k)
{
	struct peer *p = k->peer;

	p->conn = NULL;
	inbox_withdraw_all(p);
	p->state = PEER_GONE;
	peer_settle(p);
}

/* What it offered and nobody read is forgotten; what is being read stays mapped until then, and counts. */
static void a_dead_workers_memory_is_read_to_the_end(void **state)
{
	struct options o = { .max_held = 8, .memory = 8u << 20 };
	(void)state;

	for (uint32_t push_mode = 0; push_mode < 2; push_mode++) {
		struct world *w;
		struct worker *k;
		uint32_t lower, upper;

		o.push = push_mode;
		open_world(&w, &o);
		lower = node_index(w, (struct tree_node){ 0, 2 });
		upper = node_index(w, tree_canonical((struct tree_node){ 4, 1 }, M));
		assert_int_equal(send_step(w, false, 1), 0);
		k = &w->worker[0];
		for (uint32_t p = 0; p < w->s.store.n_pieces; p++)
			offer(k, p, upper, 1, false);
		/* Held by reference, or granted and not pushed: gone with the worker. */
		lose(k);
		assert_null(w->s.peer[0]);
		k = &w->worker[1];
		for (uint32_t p = 0; p < w->s.store.n_pieces; p++)
			offer(k, p, lower, 1, true);
		while (k->n_granted)
			push(k);
		/* Jobs read it now (unless they are done already): it stays until the last is reaped. */
		lose(k);
		if (w->s.data.in_flight)
			assert_non_null(w->s.peer[1]);
		settle(w);
		assert_null(w->s.peer[1]);
		for (uint32_t p = 0; p < w->s.store.n_pieces; p++) {
			offer(&w->worker[2], p, lower, 1, true);
			offer(&w->worker[3], p, upper, 1, true);
		}
		while (!w->votes) {
			for (uint32_t i = 2; i < 4; i++)
				if (w->worker[i].n_granted)
					push(&w->worker[i]);
			settle(w);
		}
		check_gradient(w);
		close_world(w);
	}
}

/* A worker waits for its buffer, no sum is left for it, and what would help is not offered. */
static void the_coordinator_hears_what_is_missing(void **state)
{
	const struct options o = { .max_held = 1, .memory = 0 };
	struct world *w;
	(void)state;

	open_world(&w, &o);
	assert_int_equal(send_step(w, false, 1), 0);
	offer(&w->worker[0], 0, 5, 1, true);
	assert_int_equal(w->starved, 0);
	offer(&w->worker[1], 0, 2, 1, false);
	assert_int_equal(w->starved, 0);
	want_all(&w->worker[1]);
	assert_int_equal(w->starved, 1);
	assert_int_equal(w->last_starved.step, 1);
	assert_int_equal(w->last_starved.first, 0);
	/* Said once, and again in case the coordinator could do nothing about it then. */
	offer(&w->worker[2], 0, 3, 1, false);
	assert_int_equal(w->starved, 1);
	reduce_tick(&w->s);
	assert_int_equal(w->starved, 2);
	assert_int_equal(atomic_load(&w->s.waits[WAIT_OF_CONTROL].kind), WAIT_CONTRIBUTION);
	close_world(w);
}

static void steps_out_of_order_are_refused(void **state)
{
	const struct options o = { .max_held = 8, .memory = 8u << 20 };
	struct world *w;
	uint32_t nodes[M], n;
	float before;
	(void)state;

	open_world(&w, &o);
	n = spans(w, 4, nodes);
	assert_int_equal(send_step(w, false, 2), -EPROTO);
	assert_int_equal(send_step(w, true, 2), -EPROTO);
	assert_int_equal(send_step(w, false, 1), 0);
	assert_int_equal(send_step(w, true, 2), -EPROTO);
	/* Said twice: once is enough. */
	assert_int_equal(send_step(w, false, 1), 0);
	play_step(w, 1, nodes, n, 1);
	assert_int_equal(send_step(w, true, 2), 0);
	settle(w);
	before = w->s.store.p[0];
	assert_int_equal(send_step(w, true, 2), 0);
	settle(w);
	assert_true(w->s.store.p[0] == before);
	assert_int_equal(w->applied, 1);
	close_world(w);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(any_order_gives_the_same_vote),
		cmocka_unit_test(the_vote_is_the_sum_of_squares),
		cmocka_unit_test(offers_of_the_next_step_wait_and_old_ones_are_closed),
		cmocka_unit_test(what_is_covered_is_not_folded_twice),
		cmocka_unit_test(broken_offers_end_the_connection),
		cmocka_unit_test(a_dead_workers_memory_is_read_to_the_end),
		cmocka_unit_test(the_coordinator_hears_what_is_missing),
		cmocka_unit_test(steps_out_of_order_are_refused),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
