/* SPDX-License-Identifier: Apache-2.0 */
/* Progress words: what they say, and that no reader misses one; and the choice of a provider. */
#include "rdma_pair.h"

#include <pthread.h>
#include <sys/mman.h>

#define SECOND 1000000000ull

static void words_say_what_is_ready(void **state)
{
	const uint64_t w = fab_progress_word(7, 100, 3);

	(void)state;
	assert_int_equal(fab_progress_check(w, 7, 100, 0), FAB_READY);
	assert_int_equal(fab_progress_check(w, 7, 100, 2), FAB_READY);
	assert_int_equal(fab_progress_check(w, 7, 100, 3), FAB_NOT_YET);
	assert_int_equal(fab_progress_check(w, 7, 99, 3), FAB_READY);
	assert_int_equal(fab_progress_check(w, 7, 99, 2), FAB_PASSED);
	assert_int_equal(fab_progress_check(w, 7, 101, 0), FAB_NOT_YET);
	assert_int_equal(fab_progress_check(w, 7, 98, 9), FAB_PASSED);
	assert_int_equal(fab_progress_check(w, 6, 100, 0), FAB_PASSED);
	assert_int_equal(fab_progress_check(w, 8, 100, 0), FAB_PASSED);
	/* Nothing published yet is not version 2^32 - 1. */
	assert_int_equal(fab_progress_check(0, 0, 0, 0), FAB_NOT_YET);
	assert_int_equal(fab_progress_check(0, 0, UINT32_MAX, 0), FAB_NOT_YET);
	assert_int_equal(fab_progress_check(fab_progress_word(0, 0, 1), 0, 0, 0), FAB_READY);
	assert_int_equal(fab_progress_check(fab_progress_word(UINT16_MAX, UINT32_MAX, UINT16_MAX), UINT16_MAX,
					    UINT32_MAX, UINT16_MAX - 1),
			 FAB_READY);
}

static void waits_end_in_time(void **state)
{
	struct fab_progress p = { 0 };
	uint64_t start = clock_now_ns(), spent;

	(void)state;
	assert_int_equal(fab_progress_wait(&p, 0, 0, 0), 0);
	assert_int_equal(fab_progress_wait(&p, 0, SECOND, 5000000), 0);
	assert_int_equal(fab_progress_wait(&p, 0, 1000, 20000000), 0);
	spent = clock_now_ns() - start;
	assert_true(spent >= 25000000);
	fab_progress_publish(&p, 9);
	assert_int_equal(fab_progress_wait(&p, 0, 0, UINT64_MAX), 9);
	assert_int_equal(atomic_load(&p.signal), 1);
}

struct reader {
	const struct fab_progress *p;
	uint64_t spin_ns, last;
};

/* Ends at the last word; a lost wake-up shows as a wait that took all its time. */
static void *read_along(void *arg)
{
	struct reader *r = arg;
	uint64_t seen = 0;

	while (seen < r->last) {
		uint64_t word = fab_progress_wait(r->p, seen, r->spin_ns, 10 * SECOND);

		if (word <= seen)
			return NULL;
		seen = word;
	}
	return r;
}

/* Readers have a read-only mapping of the region, as in another process; each sleeps differently. */
static void no_reader_misses_a_publish(void **state)
{
	static const uint64_t spins[] = { 0, 1000, 100000 };
	struct reader readers[ARRAY_LEN(spins)];
	pthread_t threads[ARRAY_LEN(spins)];
	struct fab_progress *mine;
	struct fab_remote *remote;
	struct fab_region *r;
	struct pair p;
	void *map = NULL, *ended;

	(void)state;
	pair_open(&p, "local");
	r = region_new(p.ops, p.b, PAGE, FAB_REMOTE_READ);
	mine = p.ops->region_addr(r);
	remote = region_pass(p.ops, p.ba, r, p.a, p.ab);
	assert_int_equal(p.ops->map(remote, 0, PAGE, NULL, &map), 0);
	for (size_t i = 0; i < ARRAY_LEN(spins); i++) {
		readers[i] = (struct reader){ .p = map, .spin_ns = spins[i], .last = 2000 };
		assert_int_equal(pthread_create(&threads[i], NULL, read_along, &readers[i]), 0);
	}
	for (uint64_t w = 1; w <= 2000; w++) {
		fab_progress_publish(mine, w);
		if (w % 16 == 0)
			nap();
	}
	for (size_t i = 0; i < ARRAY_LEN(spins); i++) {
		assert_int_equal(pthread_join(threads[i], &ended), 0);
		assert_ptr_equal(ended, &readers[i]);
	}
	pair_close(&p);
}

static void note_refusal(void *ctx, const char *provider, const char *reason)
{
	char *text = ctx;

	snprintf(text + strlen(text), 400 - strlen(text), "%s: %s\n", provider, reason);
}

static void choices_have_reasons(void **state)
{
	struct fab_candidate c[FAB_CANDIDATES_MAX];
	char refused[400] = { 0 };
	struct err e = { 0 };

	(void)state;
	assert_true(fab_candidates("auto", NULL, true, c, note_refusal, refused, &e) > 0);
	assert_string_equal(c[0].ops->name, "local");
	assert_non_null(strstr(c[0].reason, "one host"));
	(void)fab_candidates("auto", NULL, false, c, note_refusal, refused, &e);
	assert_non_null(strstr(refused, "local: another host"));
	assert_int_equal(fab_candidates("local-copy", NULL, false, c, NULL, NULL, &e), 1);
	assert_string_equal(c[0].ops->name, "local-copy");
	assert_int_equal(fab_candidates("smoke-signals", NULL, true, c, NULL, NULL, &e), -ENOTSUP);
	assert_non_null(strstr(e.text, "\"smoke-signals\""));
	assert_non_null(strstr(e.text, "auto, local, local-copy"));
	assert_true(fab_provider("local")->maps);
	assert_false(fab_provider("local-copy")->maps);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(words_say_what_is_ready),
		cmocka_unit_test(waits_end_in_time),
		cmocka_unit_test(no_reader_misses_a_publish),
		cmocka_unit_test(choices_have_reasons),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
