/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The whole transformer's backward against finite differences of its forward.
 * For every tensor two directions: the gradient's own, where the slope is
 * largest, and a random one. Dropout stays on where the model has it: its masks
 * are a function of the names of things, so the loss is smooth in parameters.
 */
#include "test_worker_model.h"

#define STEP_SIZE 4e-3
/* fp32 forward: noise of the loss over the step, and the third derivative. */
#define TOLERANCE 4e-3

static double sum_gradients(const struct tiny *t, const struct tensor_info *x, const float *direction)
{
	double slope = 0;

	for (uint32_t p = 0; p < t->table.unit[x->unit].n_parts; p++) {
		if (x->offset + x->n > t->table.unit[x->unit].part[p].end)
			continue;
		for (uint64_t i = 0; i < x->n; i++)
			slope += (double)t->gradient[x->unit][p][x->offset + i] * (double)direction[i];
	}
	return slope;
}

static double loss_at(struct tiny *t, const struct model_run *r, const struct tensor_info *x, const float *direction,
		      double h)
{
	float *w = t->unit[x->unit] + x->offset;
	float *saved = zeroed(x->n * sizeof(float));
	double loss;

	memcpy(saved, w, x->n * sizeof(float));
	for (uint64_t i = 0; i < x->n; i++)
		w[i] = (float)((double)w[i] + h * (double)direction[i]);
	loss = tiny_loss(r);
	memcpy(w, saved, x->n * sizeof(float));
	free(saved);
	return loss;
}

static void normalise(float *v, uint64_t n)
{
	double square = 0;

	for (uint64_t i = 0; i < n; i++)
		square += (double)v[i] * (double)v[i];
	for (uint64_t i = 0; i < n && square > 0; i++)
		v[i] = (float)((double)v[i] / sqrt(square));
}

static double slope_error(struct tiny *t, const struct model_run *r, const struct tensor_info *x, float *direction,
			  double scale)
{
	double want = sum_gradients(t, x, direction), got;

	got = (loss_at(t, r, x, direction, STEP_SIZE) - loss_at(t, r, x, direction, -STEP_SIZE)) / (2 * STEP_SIZE);
	if (fabs(got - want) > TOLERANCE * scale)
		print_error("%s: slope %.6g, gradient says %.6g (of %.3g)\n", x->name, got, want, scale);
	return fabs(got - want) / scale;
}

static void check_tensor(struct tiny *t, const struct model_run *r, const struct tensor_info *x)
{
	float *direction = zeroed(x->n * sizeof(float));
	double along;

	for (uint32_t p = 0; p < t->table.unit[x->unit].n_parts; p++)
		for (uint64_t i = 0; i < x->n && x->offset + x->n <= t->table.unit[x->unit].part[p].end; i++)
			direction[i] += t->gradient[x->unit][p][x->offset + i];
	normalise(direction, x->n);
	along = sum_gradients(t, x, direction);
	assert_true(along > 0);
	assert_true(slope_error(t, r, x, direction, along) <= TOLERANCE);
	rng_fill_normal(direction, x->n, 5, x->rng_stream, 0, 0, 1);
	normalise(direction, x->n);
	assert_true(slope_error(t, r, x, direction, along) <= TOLERANCE);
	free(direction);
}

static void check_model(const char *keys)
{
	struct tiny *t = tiny_open(keys);
	struct model_run r = tiny_run(t, 0, 3), forward = r;

	/* A gradient that is left out, or added to what was there, shows. */
	for (uint32_t u = 0; u < t->table.n_units; u++)
		for (uint32_t p = 0; p < t->table.unit[u].n_parts; p++)
			memset(t->gradient[u][p], 0xff, t->table.unit[u].n * sizeof(float));
	tiny_loss(&r);
	/* Forward alone would leave the dropout out, so the differences run the backward too, into other buffers. */
	forward.gradient = (float *const(*)[UNIT_PARTS_MAX])zeroed(t->table.n_units * sizeof(*t->gradient));
	for (uint32_t u = 0; u < t->table.n_units; u++)
		for (uint32_t p = 0; p < t->table.unit[u].n_parts; p++)
			((float *(*)[UNIT_PARTS_MAX])forward.gradient)[u][p] =
				zeroed(t->table.unit[u].n * sizeof(float));
	for (uint32_t i = 0; i < t->table.n_tensors; i++)
		check_tensor(t, &forward, &t->table.tensor[i]);
	for (uint32_t u = 0; u < t->table.n_units; u++)
		for (uint32_t p = 0; p < UNIT_PARTS_MAX; p++)
			free(forward.gradient[u][p]);
	free((void *)(uintptr_t)forward.gradient);
	tiny_close(t);
}

static void tied_with_dropout(void **state)
{
	(void)state;
	check_model("\"embd_pdrop\": 0.1, \"attn_pdrop\": 0.1, \"resid_pdrop\": 0.1");
}

static void untied(void **state)
{
	(void)state;
	check_model("\"embd_pdrop\": 0, \"attn_pdrop\": 0, \"resid_pdrop\": 0, \"tie_word_embeddings\": false");
}

static void other_scales_and_widths(void **state)
{
	(void)state;
	check_model("\"embd_pdrop\": 0, \"attn_pdrop\": 0, \"resid_pdrop\": 0, \"n_inner\": 20, "
		    "\"activation_function\": \"gelu\", \"scale_attn_by_inverse_layer_idx\": true");
}

static void unscaled_attention(void **state)
{
	(void)state;
	check_model("\"embd_pdrop\": 0, \"attn_pdrop\": 0, \"resid_pdrop\": 0, \"scale_attn_weights\": false, "
		    "\"activation_function\": \"silu\"");
}

static void llama(void **state)
{
	(void)state;
	check_model(TINY_LLAMA "}");
}

static void mistral(void **state)
{
	(void)state;
	check_model(TINY_MISTRAL "}");
}

static void qwen3_with_dropout(void **state)
{
	(void)state;
	check_model(TINY_QWEN3 "}");
}

/* What lies in a part's pages is the part's gradient or zero; what lies behind them is not touched. */
static void check_gaps(const char *keys)
{
	struct tiny *t = tiny_open(keys);
	struct model_run r = tiny_run(t, 0, 1);

	for (uint32_t u = 0; u < t->table.n_units; u++)
		for (uint32_t p = 0; p < t->table.unit[u].n_parts; p++)
			memset(t->gradient[u][p], 0xff, t->table.unit[u].n * sizeof(float));
	tiny_loss(&r);
	for (uint32_t u = 0; u < t->table.n_units; u++) {
		const struct unit_info *info = &t->table.unit[u];

		for (uint32_t p = 0; p < info->n_parts; p++) {
			float *g = t->gradient[u][p];

			for (uint32_t i = info->first_tensor; i < info->first_tensor + info->n_tensors; i++) {
				const struct tensor_info *x = &t->table.tensor[i];

				if (x->offset + x->n > info->part[p].end)
					continue;
				for (uint64_t k = 0; k < x->n; k++)
					assert_true(isfinite(g[x->offset + k]));
				memset(g + x->offset, 0, x->n * sizeof(float));
			}
			for (uint64_t i = 0; i < info->n; i++)
				assert_true(i < info->part[p].end ? g[i] == 0 : isnan(g[i]));
		}
	}
	tiny_close(t);
}

static void gaps_are_zero(void **state)
{
	(void)state;
	check_gaps("");
	check_gaps(TINY_LLAMA "}");
	check_gaps(TINY_QWEN3 "}");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(tied_with_dropout),
		cmocka_unit_test(untied),
		cmocka_unit_test(other_scales_and_widths),
		cmocka_unit_test(unscaled_attention),
		cmocka_unit_test(llama),
		cmocka_unit_test(mistral),
		cmocka_unit_test(qwen3_with_dropout),
		cmocka_unit_test(gaps_are_zero),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
