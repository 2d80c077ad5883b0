/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The workers of this host: shared memory between them, so that what one has
 * read over a network the others copy (copy.c, board.c), and so that gradients
 * are added before they leave the host (sums.c, subtree.c).
 *
 * Who they are is in the member table; that they really share memory with us is
 * proved by the provider `local` when it connects, which two containers of one
 * host may not be able to. They have no connection of their own, so what has to
 * be said before is carried by the coordinator (RELAY):
 *
 *   higher id                                     lower id
 *      READY, once its memory is there      ->
 *                                           <-    ADDRESS, once its own is
 *      connects                             ...   accepts
 *      BOARD, WINDOW, GRADIENTS            <->    BOARD, WINDOW, GRADIENTS
 *      ATTACHED                            <->    ATTACHED
 *
 * ATTACHED says: I look at your board. From then on the other may mark and copy;
 * before it, its marks would be seen by nobody. A board is looked at as soon as
 * it is mapped.
 *
 * None of it is waited for, and all of it may fail: then units are read as if
 * there were no neighbours. One that is evicted, or whose connection breaks, is
 * dropped at once; a copy under way is begun anew elsewhere. What reaches us by
 * RELAY and makes no sense is passed over, since its sender is to blame, not the
 * coordinator.
 */
#include "worker/process.h"

#include <assert.h>
#include <errno.h>
#include <stdarg.h>

enum word { WORD_READY = 1, WORD_ADDRESS, WORD_BOARD, WORD_WINDOW, WORD_GRADIENTS, WORD_ATTACHED };
enum { BOARD, WINDOW, GRADIENTS, SHARED };

_Static_assert(FAB_BLOB_MAX <= RELAY_MAX, "a blob is one word");

/* --------------------------------------------------------------- life cycle */

void neighbours_off(struct worker *w, const char *why)
{
	struct neighbours *h = &w->neighbours;

	log_info(&w->log, "units are not shared with other workers of this host: %s", why);
	if (h->board)
		h->fabric->ops->region_close(h->board);
	h->board = NULL;
	h->on = false;
}

static const char *reason_against(const struct worker *w)
{
	bool far = false;

	for (uint32_t i = 0; i < w->attach.n_peers; i++)
		far |= peer_is_far(&w->attach.peer[i]);
	if (!far)
		return "no shard service is reached over a network";
	return w->config.host_sharing ? NULL : "shardmesh.host_sharing is false";
}

static int open_board(struct worker *w, struct err *e)
{
	struct neighbours *h = &w->neighbours;
	const struct fab_region_attr a = {
		.name = "board", .memory = FAB_HOST, .bytes = board_bytes(w->table.n_units), .access = FAB_REMOTE_READ
	};
	int rc = fabrics_get(w, fab_provider("local"), &h->fabric, e);

	if (!rc)
		rc = h->fabric->ops->region_open(h->fabric->fab, &a, &h->board, e);
	if (rc)
		return rc;
	h->boards.mine = h->fabric->ops->region_addr(h->board);
	board_init(h->boards.mine, w->self.member, w->table.n_units);
	return 0;
}

void neighbours_open(struct worker *w)
{
	const char *why = reason_against(w);
	struct err e = { 0 };

	if (w->in_place)
		return;
	if (!why && open_board(w, &e))
		why = e.text;
	w->neighbours.on = !why;
	if (why)
		neighbours_off(w, why);
}

static void let_go(struct worker *w, struct neighbour *n)
{
	struct neighbours *h = &w->neighbours;

	if (n->board) {
		copy_forget(w, n->board);
		sums_forget(w, n->member);
		boards_remove(&h->boards, n->member);
		atomic_store_explicit(&w->counters.neighbours, h->boards.n, memory_order_relaxed);
	}
	if (n->ep)
		h->fabric->ops->disconnect(n->ep);
	for (int i = 0; i < SHARED; i++)
		if (n->remote[i])
			h->fabric->ops->remote_close(n->remote[i]);
	*n = (struct neighbour){ .member = n->member };
}

void neighbours_release(struct worker *w)
{
	struct neighbours *h = &w->neighbours;

	for (uint32_t i = 0; i < h->n; i++)
		let_go(w, &h->one[i]);
	if (h->board)
		h->fabric->ops->region_close(h->board);
	h->board = NULL;
}

/* -------------------------------------------------------------------- words */

static void say(struct worker *w, const struct neighbour *n, enum word word, const struct fab_blob *blob)
{
	struct msg_relay m = { .to = n->member, .kind = word };

	if (blob)
		m.data = (struct wire_blob){ .data = blob->data, .bytes = blob->bytes };
	(void)member_link_send(w->link, WIRE_RELAY, &m);
}

static void drop(struct worker *w, struct neighbour *n, const char *why)
{
	log_info(&w->log, "worker %u shares nothing with us: %s", n->member, why);
	let_go(w, n);
}

/* To one with a higher id that asked for it. */
static void give_address(struct worker *w, struct neighbour *n)
{
	struct neighbours *h = &w->neighbours;
	struct fab_blob blob;

	if (!h->greeted || !n->ready || n->addressed || n->member < w->self.member)
		return;
	n->addressed = true;
	if (!h->fabric->ops->address(h->fabric->fab, NEIGHBOUR_USER | n->member, &blob))
		say(w, n, WORD_ADDRESS, &blob);
}

static void greet(struct worker *w, struct neighbour *n)
{
	if (n->member < w->self.member)
		say(w, n, WORD_READY, NULL);
	else
		give_address(w, n);
}

void neighbours_greet(struct worker *w)
{
	struct neighbours *h = &w->neighbours;

	if (!h->on)
		return;
	h->greeted = true;
	for (uint32_t i = 0; i < h->n; i++)
		greet(w, &h->one[i]);
}

static struct neighbour *find(struct worker *w, uint64_t member)
{
	for (uint32_t i = 0; i < w->neighbours.n; i++)
		if (w->neighbours.one[i].member == member)
			return &w->neighbours.one[i];
	return NULL;
}

struct neighbour *neighbours_of(struct worker *w, const struct board *b)
{
	for (uint32_t i = 0; i < w->neighbours.n; i++)
		if (w->neighbours.one[i].board == b)
			return &w->neighbours.one[i];
	assert(false);
	return NULL;
}

const float *neighbours_gradients(struct worker *w, uint32_t member, uint64_t *bytes)
{
	struct neighbour *n = find(w, member);

	if (!n || !n->board)
		return NULL;
	*bytes = w->neighbours.fabric->ops->remote_bytes(n->remote[GRADIENTS]);
	return n->gradients;
}

static void on_address(struct worker *w, struct neighbour *n, const struct fab_blob *blob)
{
	struct neighbours *h = &w->neighbours;
	int rc;

	if (!h->greeted || n->ep || n->member > w->self.member)
		return;
	rc = h->fabric->ops->connect(h->fabric->fab, blob, NEIGHBOUR_USER | n->member, &n->ep);
	if (rc)
		drop(w, n, strerror(-rc));
}

void neighbours_relay(struct worker *w, const struct msg_relay *m)
{
	struct neighbour *n = find(w, m->from);
	struct fab_blob blob = { .bytes = m->data.bytes };

	if (!n || blob.bytes > sizeof(blob.data))
		return;
	if (blob.bytes)
		memcpy(blob.data, m->data.data, blob.bytes);
	switch ((enum word)m->kind) {
	case WORD_READY:
		n->ready = true;
		give_address(w, n);
		break;
	case WORD_ADDRESS:
		on_address(w, n, &blob);
		break;
	case WORD_BOARD:
	case WORD_WINDOW:
	case WORD_GRADIENTS:
		n->blob[m->kind - WORD_BOARD] = blob;
		n->have_blob[m->kind - WORD_BOARD] = true;
		break;
	case WORD_ATTACHED:
		n->attached = true;
		break;
	}
}

/* ------------------------------------------------------------------ members */

static bool is_here(const struct member_table *t, uint32_t member)
{
	for (uint32_t i = 0; i < t->n; i++)
		if (t->member[i].member == member)
			return true;
	return false;
}

/* The workers of our host that are not listed yet. */
static void list_new(struct worker *w, const struct member_table *t, uint64_t our_host)
{
	struct neighbours *h = &w->neighbours;

	for (uint32_t i = 0; i < t->n && h->n < BOARD_NEIGHBOURS; i++) {
		const struct msg_member *m = &t->member[i];

		if (m->role != ROLE_WORKER || m->host_id != our_host || m->member == w->self.member ||
		    find(w, m->member))
			continue;
		h->one[h->n] = (struct neighbour){ .member = m->member };
		if (h->greeted)
			greet(w, &h->one[h->n]);
		h->n++;
	}
}

void neighbours_members(struct worker *w, const struct member_table *t)
{
	struct neighbours *h = &w->neighbours;
	uint64_t our_host = 0;

	for (uint32_t i = 0; i < t->n; i++)
		if (t->member[i].member == w->self.member)
			our_host = t->member[i].host_id;
	for (uint32_t i = h->n; i-- > 0;) {
		if (is_here(t, h->one[i].member))
			continue;
		let_go(w, &h->one[i]);
		h->one[i] = h->one[--h->n];
	}
	list_new(w, t, our_host);
}

/* --------------------------------------------------------------- connection */

static void give(struct worker *w, struct neighbour *n, enum word word, struct fab_region *r)
{
	struct fab_blob blob;
	int rc = w->neighbours.fabric->ops->export_region(n->ep, r, &blob);

	if (rc)
		drop(w, n, strerror(-rc));
	else
		say(w, n, word, &blob);
}

void neighbours_event(struct worker *w, const struct fab_event *ev)
{
	struct neighbours *h = &w->neighbours;
	struct neighbour *n = find(w, ev->user & ~NEIGHBOUR_USER);

	if (ev->type == FAB_EV_DOWN) {
		if (n && n->ep == ev->ep)
			drop(w, n, strerror(-ev->status));
		return;
	}
	/* It left before it used the address, or was dropped. */
	if (!n || n->up) {
		h->fabric->ops->disconnect(ev->ep);
		return;
	}
	n->ep = ev->ep;
	n->up = true;
	give(w, n, WORD_BOARD, h->board);
	if (n->up)
		give(w, n, WORD_WINDOW, h->fabric->region[MEMORY_WINDOW]);
	if (n->up)
		give(w, n, WORD_GRADIENTS, h->fabric->region[MEMORY_GRADIENTS]);
}

/* ------------------------------------------------------------------- memory */

static int import(struct worker *w, struct neighbour *n)
{
	const struct fab_ops *ops = w->neighbours.fabric->ops;
	void *at[SHARED];
	int rc = 0;

	for (int i = 0; i < SHARED && !rc; i++)
		if (!n->remote[i])
			rc = ops->import_region(n->ep, &n->blob[i], &n->remote[i]);
	for (int i = 0; i < SHARED && !rc; i++)
		rc = ops->map(n->remote[i], 0, ops->remote_bytes(n->remote[i]), NULL, &at[i]);
	if (rc)
		return rc;
	rc = board_check(at[BOARD], ops->remote_bytes(n->remote[BOARD]), n->member, w->table.n_units);
	if (!rc)
		rc = boards_add(&w->neighbours.boards, at[BOARD]);
	if (rc)
		return rc;
	n->board = at[BOARD];
	n->window = at[WINDOW];
	n->window_bytes = ops->remote_bytes(n->remote[WINDOW]);
	n->gradients = at[GRADIENTS];
	return 0;
}

static void look_at(struct worker *w, struct neighbour *n)
{
	int rc = import(w, n);

	if (rc == -EAGAIN)
		return;
	if (rc) {
		drop(w, n, strerror(-rc));
		return;
	}
	atomic_store_explicit(&w->counters.neighbours, w->neighbours.boards.n, memory_order_relaxed);
	log_info(&w->log, "shares units with worker %u: what one has read the other copies", n->member);
	say(w, n, WORD_ATTACHED, NULL);
}

void neighbours_run(struct worker *w)
{
	struct neighbours *h = &w->neighbours;

	for (uint32_t i = 0; i < h->n; i++) {
		struct neighbour *n = &h->one[i];

		if (n->up && !n->board && n->have_blob[BOARD] && n->have_blob[WINDOW] && n->have_blob[GRADIENTS])
			look_at(w, n);
	}
}
