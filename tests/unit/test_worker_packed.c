/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Packed documents: two in one sample give the losses and gradients that they
 * give alone, weighted by how many of their targets count. Rotary positions
 * know distances only, so that the second one's place in the sample does not
 * show but in roundings.
 */
#include "test_worker_model.h"

#include "kernels/kernels.h"

#define TOLERANCE 2e-5

/* What `seq` tokens from `at` on give alone; gradients go to the model's buffers. */
static double alone(struct tiny *t, uint32_t at, uint32_t seq)
{
	struct model_run r = tiny_run(t, 0, 1);

	r.batch = 1;
	r.seq = seq;
	r.tokens += at;
	r.targets += at;
	return tiny_loss(&r);
}

/* sum += factor * gradient, all units and parts in a row; returns the elements. */
static size_t add_gradients(const struct tiny *t, double factor, double *sum)
{
	size_t n = 0;

	for (uint32_t u = 0; u < t->table.n_units; u++) {
		for (uint32_t p = 0; p < t->table.unit[u].n_parts; p++) {
			for (uint64_t i = 0; i < t->table.unit[u].part[p].end && sum; i++)
				sum[n + i] += factor * (double)t->gradient[u][p][i];
			n += t->table.unit[u].part[p].end;
		}
	}
	return n;
}

static void check_packed(const char *model)
{
	static const uint32_t first_key[SEQ] = { 0, 0, 2, 2, 2, 2 };
	struct tiny *t = tiny_open(model);
	struct model_run r = tiny_run(t, 0, 1);
	size_t n = add_gradients(t, 0, NULL);
	double *want = calloc(n, sizeof(*want)), *got = calloc(n, sizeof(*got));
	double loss, largest = 0;

	assert_true(want && got);
	t->targets[4] = K_IGNORE_TARGET;
	loss = 2 * alone(t, 0, 2);
	add_gradients(t, 2.0 / 5, want);
	loss += 3 * alone(t, 2, 4);
	add_gradients(t, 3.0 / 5, want);
	r.batch = 1;
	r.first_key = first_key;
	assert_float_equal(tiny_loss(&r), loss / 5, TOLERANCE);
	add_gradients(t, 1, got);
	for (size_t i = 0; i < n; i++)
		largest = fmax(largest, fabs(want[i]));
	for (size_t i = 0; i < n; i++)
		assert_true(fabs(got[i] - want[i]) <= TOLERANCE * largest);
	/* Without the keys the second document sees the first. */
	r.first_key = NULL;
	assert_true(fabs(tiny_loss(&r) - loss / 5) > 100 * TOLERANCE);
	free(want);
	free(got);
	tiny_close(t);
}

static void llama(void **state)
{
	(void)state;
	check_packed(TINY_LLAMA "}");
}

static void with_a_window(void **state)
{
	(void)state;
	check_packed(TINY_MISTRAL "}");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(llama),
		cmocka_unit_test(with_a_window),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
