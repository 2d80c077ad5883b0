/* SPDX-License-Identifier: Apache-2.0 */
/* Boards: the rules one by one, then threads that fetch and evict as hard as they can. */
#include "worker/board.h"

#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define UNITS 4u
#define WORKERS 4u

struct host {
	struct board *board[WORKERS];
	struct boards view[WORKERS];
};

static void host_open(struct host *h, uint32_t n)
{
	memset(h, 0, sizeof(*h));
	for (uint32_t i = 0; i < n; i++) {
		h->board[i] = calloc(1, board_bytes(UNITS));
		assert_non_null(h->board[i]);
		board_init(h->board[i], 10 + i, UNITS);
		h->view[i].mine = h->board[i];
	}
	for (uint32_t i = 0; i < n; i++)
		for (uint32_t k = 0; k < n; k++)
			if (k != i)
				assert_int_equal(boards_add(&h->view[i], h->board[k]), 0);
}

static void host_close(struct host *h)
{
	for (uint32_t i = 0; i < WORKERS; i++)
		free(h->board[i]);
}

static void one_claims_the_other_copies(void **state)
{
	struct host h;
	uint32_t who = 99;
	struct board_mark m;

	(void)state;
	host_open(&h, 2);
	assert_int_equal(board_claim(&h.view[1], 2, 3, 7, &who), CLAIM_OURS);
	assert_int_equal(board_claim(&h.view[0], 2, 3, 7, &who), CLAIM_TAKEN);
	assert_int_equal(board_look(&h.view[0], 2, 3, 7, &who), CLAIM_TAKEN);
	assert_int_equal(board_look(&h.view[0], 2, 3, 8, &who), CLAIM_OURS);
	assert_int_equal(who, 0);
	/* Another portion and another version have nothing to do with it. */
	assert_int_equal(board_claim(&h.view[0], 2, 4, 7, &who), CLAIM_OURS);
	assert_int_equal(board_claim(&h.view[0], 2, 3, 8, &who), CLAIM_OURS);
	assert_int_equal(board_mark(&h.view[0], 0, 2, 3, 7, &m), -ESTALE);
	board_there(&h.view[1], 2, 3, 7, 4096);
	board_give_up(&h.view[0], 2, 3);
	assert_int_equal(board_claim(&h.view[0], 2, 3, 7, &who), CLAIM_THERE);
	assert_int_equal(board_mark(&h.view[0], who, 2, 3, 7, &m), 0);
	assert_int_equal(m.offset, 4096);
	assert_true(board_still(&m));
	board_withdraw(&h.view[1], 2);
	assert_false(board_is_free(&h.view[1], 2));
	assert_true(board_is_free(&h.view[1], 1));
	/* Who does not see the mark may have used the place: the copier finds out. */
	assert_false(board_still(&m));
	board_unmark(&h.view[0], &m);
	assert_true(board_is_free(&h.view[1], 2));
	assert_int_equal(board_mark(&h.view[0], 0, 2, 3, 7, &m), -ESTALE);
	host_close(&h);
}

static void the_smaller_id_waits_for_a_decision(void **state)
{
	struct host h;
	uint32_t who;

	(void)state;
	host_open(&h, 2);
	/* A neighbour stopped between INTENT and its look. */
	atomic_store(&h.board[0]->unit[0].portion[0], 5 << 2 | PORTION_INTENT);
	assert_int_equal(board_claim(&h.view[1], 0, 0, 5, &who), CLAIM_AGAIN);
	atomic_store(&h.board[0]->unit[0].portion[0], 0);
	atomic_store(&h.board[1]->unit[0].portion[0], 5 << 2 | PORTION_INTENT);
	assert_int_equal(board_claim(&h.view[0], 0, 0, 5, &who), CLAIM_AGAIN);
	/* It died there: who is gone has no say. */
	boards_remove(&h.view[0], 11);
	assert_int_equal(board_claim(&h.view[0], 0, 0, 5, &who), CLAIM_OURS);
	host_close(&h);
}

static void what_is_not_a_board_is_refused(void **state)
{
	struct host h;

	(void)state;
	host_open(&h, 1);
	assert_int_equal(board_check(h.board[0], board_bytes(UNITS), 10, UNITS), 0);
	assert_int_equal(board_check(h.board[0], board_bytes(UNITS) - 1, 10, UNITS), -EPROTO);
	assert_int_equal(board_check(h.board[0], board_bytes(UNITS), 11, UNITS), -EPROTO);
	assert_int_equal(board_check(h.board[0], board_bytes(UNITS), 10, UNITS - 1), -EPROTO);
	h.board[0]->magic++;
	assert_int_equal(board_check(h.board[0], board_bytes(UNITS), 10, UNITS), -EPROTO);
	host_close(&h);
}

static void marks_run_out_and_come_back(void **state)
{
	struct host h;
	struct board_mark m[BOARD_MARKS], more;

	(void)state;
	host_open(&h, 2);
	board_there(&h.view[1], 0, 0, 1, 0);
	for (uint32_t i = 0; i < BOARD_MARKS; i++)
		assert_int_equal(board_mark(&h.view[0], 0, 0, 0, 1, &m[i]), 0);
	assert_int_equal(board_mark(&h.view[0], 0, 0, 0, 1, &more), -EBUSY);
	board_unmark(&h.view[0], &m[17]);
	assert_int_equal(board_mark(&h.view[0], 0, 0, 0, 1, &more), 0);
	assert_int_equal(more.slot, m[17].slot);
	host_close(&h);
}

/*
 * Every worker wants every unit of every version. A window holds one place, so
 * units are evicted all the time; a place is poisoned before it is used again,
 * and a copier checks that what it copied is whole.
 */
struct worker {
	struct boards *view;
	_Atomic uint64_t *window[WORKERS]; /* [UNITS] of every worker, by place in the host */
	uint32_t me;
	uint64_t copied;
	bool torn;
	pthread_barrier_t *version_over;
	_Atomic uint64_t *claims; /* claims alone */
};

#define ROUNDS 2000u
#define STAMP(version, unit) ((version)*16 + (unit) + 1)

static void read_or_copy(struct worker *w, uint32_t unit, uint64_t version)
{
	_Atomic uint64_t *mine = &w->window[w->me][unit];
	struct board_mark m;
	uint32_t who;
	uint64_t seen;

	for (;;) {
		switch (board_claim(w->view, unit, 0, version, &who)) {
		case CLAIM_OURS:
			atomic_store_explicit(mine, STAMP(version, unit), memory_order_relaxed);
			return;
		case CLAIM_THERE:
			if (board_mark(w->view, who, unit, 0, version, &m))
				break;
			seen = atomic_load_explicit(&w->window[w->view->theirs[who]->member - 10][unit],
						    memory_order_relaxed);
			w->torn |= !board_still(&m);
			board_unmark(w->view, &m);
			w->torn |= seen != STAMP(version, unit);
			w->copied++;
			atomic_store_explicit(mine, seen, memory_order_relaxed);
			return;
		case CLAIM_TAKEN:
		case CLAIM_AGAIN:
			break;
		}
	}
}

static void *fetch_and_evict(void *arg)
{
	struct worker *w = arg;

	for (uint64_t version = 1; version <= ROUNDS; version++) {
		for (uint32_t i = 0; i < UNITS; i++) {
			uint32_t unit = (uint32_t)((i + w->me) % UNITS);

			read_or_copy(w, unit, version);
			board_there(w->view, unit, 0, version, unit);
			if ((version + unit + w->me) % 3)
				continue;
			board_withdraw(w->view, unit);
			while (!board_is_free(w->view, unit))
				;
			atomic_store_explicit(&w->window[w->me][unit], UINT64_MAX, memory_order_relaxed);
		}
		/* What is left of the version goes when everybody had the chance to copy it. */
		pthread_barrier_wait(w->version_over);
		for (uint32_t unit = 0; unit < UNITS; unit++) {
			board_withdraw(w->view, unit);
			while (!board_is_free(w->view, unit))
				;
			atomic_store_explicit(&w->window[w->me][unit], UINT64_MAX, memory_order_relaxed);
		}
	}
	return NULL;
}

static void threads_never_copy_what_is_not_there(void **state)
{
	static _Atomic uint64_t window[WORKERS][UNITS];
	pthread_barrier_t version_over;
	struct host h;
	struct worker w[WORKERS];
	pthread_t thread[WORKERS];
	uint64_t copied = 0;

	(void)state;
	host_open(&h, WORKERS);
	assert_int_equal(pthread_barrier_init(&version_over, NULL, WORKERS), 0);
	for (uint32_t i = 0; i < WORKERS; i++) {
		w[i] = (struct worker){ .view = &h.view[i], .me = i, .version_over = &version_over };
		for (uint32_t k = 0; k < WORKERS; k++)
			w[i].window[k] = window[k];
	}
	for (uint32_t i = 0; i < WORKERS; i++)
		assert_int_equal(pthread_create(&thread[i], NULL, fetch_and_evict, &w[i]), 0);
	for (uint32_t i = 0; i < WORKERS; i++) {
		pthread_join(thread[i], NULL);
		assert_false(w[i].torn);
		copied += w[i].copied;
	}
	assert_true(copied > 0);
	pthread_barrier_destroy(&version_over);
	host_close(&h);
}

/* Nobody evicts: then every portion is fetched exactly once, whatever the timing. */
static void *claim_all(void *arg)
{
	struct worker *w = arg;

	for (uint64_t version = 1; version <= ROUNDS; version++) {
		for (uint32_t unit = 0; unit < UNITS; unit++) {
			enum claim c;
			uint32_t who;

			do {
				c = board_claim(w->view, unit, 0, version, &who);
			} while (c == CLAIM_AGAIN);
			if (c == CLAIM_OURS)
				atomic_fetch_add(&w->claims[version * UNITS + unit], 1);
		}
		/* Who is ahead has forgotten the version that others still claim. */
		pthread_barrier_wait(w->version_over);
	}
	return NULL;
}

static void threads_claim_each_portion_once(void **state)
{
	_Atomic uint64_t *claims = calloc((ROUNDS + 1) * UNITS, sizeof(*claims));
	pthread_barrier_t version_over;
	struct host h;
	struct worker w[WORKERS];
	pthread_t thread[WORKERS];

	(void)state;
	assert_non_null(claims);
	assert_int_equal(pthread_barrier_init(&version_over, NULL, WORKERS), 0);
	host_open(&h, WORKERS);
	for (uint32_t i = 0; i < WORKERS; i++) {
		w[i] = (struct worker){ .view = &h.view[i], .me = i, .version_over = &version_over, .claims = claims };
		assert_int_equal(pthread_create(&thread[i], NULL, claim_all, &w[i]), 0);
	}
	for (uint32_t i = 0; i < WORKERS; i++)
		pthread_join(thread[i], NULL);
	for (uint64_t at = UNITS; at < (ROUNDS + 1) * UNITS; at++)
		assert_int_equal(atomic_load(&claims[at]), 1);
	pthread_barrier_destroy(&version_over);
	free(claims);
	host_close(&h);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(one_claims_the_other_copies),
		cmocka_unit_test(the_smaller_id_waits_for_a_decision),
		cmocka_unit_test(what_is_not_a_board_is_refused),
		cmocka_unit_test(marks_run_out_and_come_back),
		cmocka_unit_test(threads_never_copy_what_is_not_there),
		cmocka_unit_test(threads_claim_each_portion_once),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
