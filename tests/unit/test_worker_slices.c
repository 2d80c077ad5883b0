/* SPDX-License-Identifier: Apache-2.0 */
/* Shares narrowed to a part and cut into slices: every element once, in share order, against a count by hand. */
#include "base/base.h"
#include "worker/slices.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define PAGE 16384u /* elements: 64 KiB */

static uint64_t draw(uint64_t seed, uint64_t *i, uint64_t below)
{
	return rng_u64(seed, 0, (*i)++) % below;
}

/* Random whole pages of a unit, adjacent ones joined. */
static void random_share(struct share *s, uint64_t seed)
{
	uint64_t page = 0, i = 0;

	*s = (struct share){ 0 };
	while (s->n_seg < RUNS_PER_UNIT_MAX && page < 300) {
		uint64_t n = 1 + draw(seed, &i, 20);

		page += s->n_seg || draw(seed, &i, 2) ? 1 + draw(seed, &i, 6) : 0;
		s->seg[s->n_seg++] = (struct share_seg){ page * PAGE, s->n, n * PAGE };
		s->n += n * PAGE;
		page += n;
	}
}

static void check_slices(const struct share *s)
{
	uint64_t element = 0, all = 0;
	uint32_t seg = 0;

	for (uint32_t k = 0; k < share_slices(s); k++) {
		struct slice_piece piece[RUNS_PER_UNIT_MAX];
		uint32_t n = share_slice(s, k, piece, RUNS_PER_UNIT_MAX);
		uint64_t bytes = 0;

		assert_true(n > 0);
		for (uint32_t i = 0; i < n; i++) {
			while (seg < s->n_seg && element == s->seg[seg].n) {
				seg++;
				element = 0;
			}
			assert_int_equal(piece[i].unit_offset, s->seg[seg].unit_offset + element);
			element += piece[i].n;
			assert_true(element <= s->seg[seg].n);
			bytes += piece[i].n * sizeof(float);
		}
		all += bytes;
		assert_int_equal(bytes, k + 1 < share_slices(s) ? SLICE_BYTES : bytes);
		assert_true(bytes <= SLICE_BYTES);
	}
	assert_int_equal(all, s->n * sizeof(float));
}

static void slices_cover_the_share(void **state)
{
	struct share s;

	(void)state;
	for (uint64_t seed = 0; seed < 200; seed++) {
		random_share(&s, seed);
		check_slices(&s);
	}
}

static void part_takes_whole_pages(void **state)
{
	(void)state;
	for (uint64_t seed = 0; seed < 200; seed++) {
		uint64_t i = 1000, begin = draw(seed, &i, 300 * PAGE), end = begin + 1 + draw(seed, &i, 100 * PAGE);
		const struct unit_part part = { begin, end };
		struct share s, cut;
		uint64_t want = 0, at = 0;

		random_share(&s, seed);
		share_of_part(&s, &part, PAGE, &cut);
		for (uint32_t k = 0; k < s.n_seg; k++)
			for (uint64_t page = s.seg[k].unit_offset; page < s.seg[k].unit_offset + s.seg[k].n;
			     page += PAGE)
				want += page + PAGE > begin && page < end ? PAGE : 0;
		assert_int_equal(cut.n, want);
		for (uint32_t k = 0; k < cut.n_seg; k++) {
			assert_int_equal(cut.seg[k].share_offset, at);
			assert_int_equal(cut.seg[k].unit_offset % PAGE, 0);
			at += cut.seg[k].n;
		}
		assert_int_equal(at, want);
		check_slices(&cut);
	}
}

static void nothing_is_no_slice(void **state)
{
	const struct unit_part part = { 0, PAGE };
	struct share s = { .n_seg = 1, .n = PAGE, .seg = { { PAGE, 0, PAGE } } }, cut;

	(void)state;
	share_of_part(&s, &part, PAGE, &cut);
	assert_int_equal(cut.n_seg, 0);
	assert_int_equal(share_slices(&cut), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(slices_cover_the_share),
		cmocka_unit_test(part_takes_whole_pages),
		cmocka_unit_test(nothing_is_no_slice),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
