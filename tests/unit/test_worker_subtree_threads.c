/* SPDX-License-Identifier: Apache-2.0 */
/* Two threads and one sum: who takes and who takes back must agree which of them has it. */
#include "worker/subtree.h"

#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define GARBAGE UINT64_C(0xdead)
#define FIRST_MEMBER 10u

enum { ROUNDS = 10000 };

/* One takes while the other takes back: both must come to the same end, and nobody reads what is not theirs. */
static struct race {
	struct board *board[2];
	struct boards boards[2];
	struct subtree tree[2];
	_Atomic uint64_t arrived;
	uint64_t value; /* the right one's buffer: plain memory, for the race detector to watch */
	uint32_t wrong, freed;
} race;

/* A barrier that does not sleep: the two shall come out of it at the same moment. */
static void meet(uint64_t round)
{
	atomic_fetch_add(&race.arrived, 1);
	while (atomic_load(&race.arrived) < 2 * round)
		sched_yield();
}

static void drain_race(struct subtree *s)
{
	struct subtree_action a;

	while (subtree_next(s, &a)) {
		if (a.type == SUBTREE_ADD) {
			race.wrong += race.value != s->step;
			subtree_added(s, 0, 0, 0);
		} else if (a.type == SUBTREE_FREE) {
			race.value = GARBAGE;
			race.freed++;
		} else if (a.type == SUBTREE_PUSH) {
			subtree_answered(s, 0, 0, true);
		} else {
			race.wrong++;
		}
	}
}

static void *race_left(void *arg)
{
	struct subtree *s = &race.tree[0];
	uint32_t looks = 0;

	(void)arg;
	for (uint64_t t = 1; t <= ROUNDS; t++) {
		subtree_begin(s, 2 * t, t, (struct tree_node){ 0, 0 }, 2);
		meet(2 * t - 1);
		subtree_final(s, 0, 0, 0, 0);
		drain_race(s);
		while (!subtree_idle(s)) {
			subtree_look(s, 0);
			drain_race(s);
			/* Not always: the closer the two are, the better. */
			if (looks++ % 256 == 0)
				sched_yield();
		}
		meet(2 * t);
		subtree_end(s);
	}
	return NULL;
}

static void *race_right(void *arg)
{
	struct subtree *s = &race.tree[1];

	(void)arg;
	for (uint64_t t = 1; t <= ROUNDS; t++) {
		subtree_begin(s, 2 * t + 1, t, (struct tree_node){ 1, 0 }, 2);
		race.value = t;
		meet(2 * t - 1);
		subtree_final(s, 0, 0, 0, 0);
		drain_race(s);
		for (volatile uint64_t spin = rng_u64(1, 2, t) % (1u << t % 14); spin; spin--)
			;
		/* Where both share a core nothing happens in between by itself. */
		if (t % 4 == 0)
			sched_yield();
		subtree_cancel(s);
		drain_race(s);
		while (!subtree_idle(s)) {
			subtree_look(s, 0);
			drain_race(s);
		}
		meet(2 * t);
		subtree_end(s);
	}
	return NULL;
}

static void threads_agree_who_has_it(void **state)
{
	pthread_t left, right;

	(void)state;
	memset(&race, 0, sizeof(race));
	for (uint32_t k = 0; k < 2; k++) {
		const struct subtree_config cfg = { .n_units = 1, .wait_ns = 1, .boards = &race.boards[k] };

		race.board[k] = calloc(1, board_bytes(1));
		assert_non_null(race.board[k]);
		board_init(race.board[k], FIRST_MEMBER + k, 1);
		race.boards[k].mine = race.board[k];
		assert_int_equal(subtree_init(&race.tree[k], &cfg), 0);
	}
	for (uint32_t k = 0; k < 2; k++)
		assert_int_equal(boards_add(&race.boards[k], race.board[1 - k]), 0);
	assert_int_equal(pthread_create(&left, NULL, race_left, NULL), 0);
	assert_int_equal(pthread_create(&right, NULL, race_right, NULL), 0);
	pthread_join(left, NULL);
	pthread_join(right, NULL);
	assert_int_equal(race.wrong, 0);
	assert_int_equal(race.freed, ROUNDS);
	assert_int_equal(race.tree[0].added, race.tree[1].given);
	assert_in_range(race.tree[0].added, 100, ROUNDS - 100);
	for (uint32_t k = 0; k < 2; k++) {
		subtree_release(&race.tree[k]);
		free(race.board[k]);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(threads_agree_who_has_it),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
