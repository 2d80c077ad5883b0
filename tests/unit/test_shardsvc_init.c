/* SPDX-License-Identifier: Apache-2.0 */
/* First parameters from a file: every owner's share is what the file says, whoever owns what. */
#include "tests/unit/test_shardsvc.h"

#include <errno.h>
#include <unistd.h>

struct world {
	struct unit_table t;
	char path[64];
};

/* Element i of the table's tensor k. */
static float value(uint32_t k, uint64_t i)
{
	return (float)k + (float)(i % 4093) * 0x1p-13f;
}

static int open_world(void **state)
{
	static struct world w;
	uint32_t order[64];
	char *header;
	size_t bytes;
	FILE *f;

	test_table(&w.t);
	snprintf(w.path, sizeof(w.path), "/tmp/shardmesh-test-%d.safetensors", (int)getpid());
	f = fopen(w.path, "w");
	if (!f || w.t.n_tensors > ARRAY_LEN(order) || st_header_for(&w.t, &header, &bytes, order, NULL))
		return -1;
	fwrite(header, 1, bytes, f);
	free(header);
	for (uint32_t k = 0; k < w.t.n_tensors; k++) {
		for (uint64_t i = 0; i < w.t.tensor[order[k]].n; i++) {
			float v = value(order[k], i);

			fwrite(&v, sizeof(v), 1, f);
		}
	}
	*state = &w;
	return fclose(f);
}

static int close_world(void **state)
{
	struct world *w = *state;

	unit_table_release(&w->t);
	return unlink(w->path);
}

/* What a segment holds against the file; the gaps between tensors are zero. */
static void check_segment(const struct world *w, uint32_t unit, const struct share_seg *g, const float *got)
{
	const struct unit_info *info = &w->t.unit[unit];
	uint32_t k = info->first_tensor, end = k + info->n_tensors;

	for (uint64_t i = g->unit_offset; i < g->unit_offset + g->n; i++) {
		const struct tensor_info *x;
		float want = 0;

		while (k < end && i >= w->t.tensor[k].offset + w->t.tensor[k].n)
			k++;
		x = &w->t.tensor[k];
		if (k < end && i >= x->offset)
			want = value(k, i - x->offset);
		if (got[i - g->unit_offset] != want)
			fail_msg("unit %u, element %lu", unit, (unsigned long)i);
	}
}

static uint64_t check_member(const struct world *w, const struct page_map *p, uint32_t member,
			     const struct model_weights *weights)
{
	struct test_store s;
	struct err e = { 0 };
	uint64_t n;

	test_store_open(&s, &w->t, p, member);
	for (uint32_t u = 0; u < w->t.n_units; u++) {
		const struct store_unit *unit = &s.store.unit[u];

		if (store_read_unit(&s.store, u, weights, &e))
			fail_msg("%s", e.text);
		for (uint32_t k = 0; k < unit->share.n_seg; k++)
			check_segment(w, u, &unit->share.seg[k],
				      s.store.p + unit->at + unit->share.seg[k].share_offset);
	}
	n = s.store.n;
	test_store_close(&s);
	return n;
}

static void every_owner_reads_its_own(void **state)
{
	const struct world *w = *state;
	struct model_weights *weights;
	struct err e = { 0 };

	if (model_weights_open(w->path, &w->t, &weights, &e))
		fail_msg("%s", e.text);
	for (uint64_t seed = 0; seed < 4; seed++) {
		struct page_map p;
		uint64_t n = 0;

		test_map(&p, &w->t, 1 + (uint32_t)seed);
		if (seed)
			test_scatter(&p, &w->t, seed);
		for (uint32_t i = 0; i < p.n_members; i++)
			n += check_member(w, &p, p.member[i], weights);
		assert_int_equal(n, w->t.n_elements);
		page_map_release(&p);
	}
	model_weights_close(weights);
}

/* A file that loses its end after it was opened. */
static void what_cannot_be_read_is_named(void **state)
{
	const struct world *w = *state;
	struct model_weights *weights;
	struct test_store s;
	struct page_map p;
	struct err e = { 0 };
	int rc = 0;

	assert_int_equal(model_weights_open(w->path, &w->t, &weights, &e), 0);
	assert_int_equal(truncate(w->path, 65536), 0);
	test_map(&p, &w->t, 1);
	test_store_open(&s, &w->t, &p, p.member[0]);
	for (uint32_t u = 0; !rc && u < w->t.n_units; u++)
		rc = store_read_unit(&s.store, u, weights, &e);
	assert_true(rc < 0);
	assert_non_null(strstr(e.text, w->path));
	test_store_close(&s);
	page_map_release(&p);
	model_weights_close(weights);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(every_owner_reads_its_own, open_world, close_world),
		cmocka_unit_test_setup_teardown(what_cannot_be_read_is_named, open_world, close_world),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
