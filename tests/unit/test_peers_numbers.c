/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Our transformer and our Adam against PyTorch's and transformers', by the
 * numbers that tests/peers/make_numbers.py wrote: loss, every gradient of the
 * first step, the norm, and the parameters after 3 AdamW steps with clipping,
 * to 1e-5 of the largest magnitude in the tensor.
 *
 * usage: test_peers_numbers [gpt2_small.safetensors]
 */
#include "kernels/kernels.h"
#include "model/model.h"
#include "worker/model_run.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { STEPS = 3, MICRO = 3, BATCH = 2, LENGTH = 24, UNITS_MAX = 8 };
#define TOLERANCE 1e-5

static const char model_json[] =
	"{\"model_type\": \"gpt2\", \"vocab_size\": 67, \"n_positions\": 32, \"n_embd\": 40, \"n_layer\": 2, \"n_head\": 5,"
	" \"embd_pdrop\": 0, \"attn_pdrop\": 0, \"resid_pdrop\": 0}";

static const char *numbers_path;

struct peers {
	struct model_config model;
	struct unit_table table;
	struct st_file file;
	struct k_profile profile;
	struct k_stream *stream;
	float *p[UNITS_MAX], *m[UNITS_MAX], *v[UNITS_MAX], *g[UNITS_MAX][UNIT_PARTS_MAX];
	float *tokens;
	double worst;
};

static float *floats(uint64_t n)
{
	float *f = aligned_alloc(64, round_up_u64(n * sizeof(float), 64));

	assert_non_null(f);
	memset(f, 0, round_up_u64(n * sizeof(float), 64));
	return f;
}

static float *read_numbers(struct peers *s, const char *prefix, const char *name, uint64_t n)
{
	const struct st_tensor *t;
	struct err e = { 0 };
	char full[160];
	float *out = floats(n);

	snprintf(full, sizeof(full), "%s%s", prefix, name);
	t = st_find(&s->file, full);
	if (!t)
		fail_msg("%s has no %s", numbers_path, full);
	assert_int_equal((t->end - t->begin) / sizeof(float), n);
	if (st_read_f32(&s->file, t, 0, n, out, &e))
		fail_msg("%s", e.text);
	return out;
}

static void expect_close(struct peers *s, const char *what, const float *got, const float *want, uint64_t n)
{
	double largest = 0, error = 0;

	for (uint64_t i = 0; i < n; i++) {
		largest = fmax(largest, fabs((double)want[i]));
		error = fmax(error, fabs((double)got[i] - (double)want[i]));
	}
	s->worst = fmax(s->worst, error / largest);
	if (!(error <= TOLERANCE * largest))
		fail_msg("%s: off by %.3g, the largest magnitude is %.3g", what, error, largest);
}

static void expect_tensors(struct peers *s, const char *prefix, float *const flat[])
{
	for (uint32_t i = 0; i < s->table.n_tensors; i++) {
		const struct tensor_info *t = &s->table.tensor[i];
		float *want = read_numbers(s, prefix, t->name, t->n);

		expect_close(s, t->name, flat[t->unit] + t->offset, want, t->n);
		free(want);
	}
}

static void setup(struct peers *s)
{
	static uint8_t workspace[1 << 20] __attribute__((aligned(64)));
	struct k_stream_config cfg = {
		.profile = &s->profile, .threads = 1, .workspace = workspace, .workspace_bytes = sizeof(workspace)
	};
	struct err e = { 0 };
	char reason[160];

	if (model_config_parse(model_json, "test", &s->model, &e) || unit_table_init(&s->table, &s->model, &e) ||
	    st_open(numbers_path, &s->file, &e) || k_profile_detect(NULL, &s->profile, reason, &e) ||
	    k_cpu_ops()->stream_open(&cfg, &s->stream, &e))
		fail_msg("%s", e.text);
	for (uint32_t u = 0; u < s->table.n_units; u++) {
		uint64_t n = s->table.unit[u].n;

		s->p[u] = floats(n);
		s->m[u] = floats(n);
		s->v[u] = floats(n);
		for (uint32_t part = 0; part < UNIT_PARTS_MAX; part++)
			s->g[u][part] = floats(n);
	}
	for (uint32_t i = 0; i < s->table.n_tensors; i++) {
		const struct tensor_info *t = &s->table.tensor[i];
		float *init = read_numbers(s, "init.", t->name, t->n);

		memcpy(s->p[t->unit] + t->offset, init, t->n * sizeof(float));
		free(init);
	}
	s->tokens = read_numbers(s, "", "tokens", STEPS * MICRO * BATCH * (LENGTH + 1));
}

static void release(struct peers *s)
{
	k_cpu_ops()->stream_close(s->stream);
	for (uint32_t u = 0; u < s->table.n_units; u++) {
		free(s->p[u]);
		free(s->m[u]);
		free(s->v[u]);
		for (uint32_t part = 0; part < UNIT_PARTS_MAX; part++)
			free(s->g[u][part]);
	}
	free(s->tokens);
	st_close(&s->file);
	unit_table_release(&s->table);
	model_config_release(&s->model);
}

/* Sum of the micro-batches' losses; gradients' roots, parts summed, in g[][0]. */
static double forward_backward(struct peers *s, int step)
{
	uint32_t tokens[MICRO * BATCH * LENGTH], targets[MICRO * BATCH * LENGTH];
	float *gradient[UNITS_MAX][UNIT_PARTS_MAX];
	const float *unit[UNITS_MAX];
	struct err e = { 0 };
	double loss;

	for (int row = 0; row < MICRO * BATCH; row++) {
		const float *t = s->tokens + (size_t)(step * MICRO * BATCH + row) * (LENGTH + 1);

		for (int i = 0; i < LENGTH; i++) {
			tokens[row * LENGTH + i] = (uint32_t)t[i];
			targets[row * LENGTH + i] = (uint32_t)t[i + 1];
		}
	}
	for (uint32_t u = 0; u < s->table.n_units; u++) {
		unit[u] = s->p[u];
		for (uint32_t part = 0; part < UNIT_PARTS_MAX; part++)
			gradient[u][part] = s->g[u][part];
	}
	struct model_run run = {
		.model = &s->model,
		.table = &s->table,
		.ops = k_cpu_ops(),
		.profile = &s->profile,
		.threads = 1,
		.batch = BATCH,
		.seq = LENGTH,
		.n_mb = MICRO,
		.training = true,
		.keep = true,
		.tokens = tokens,
		.targets = targets,
		.unit = unit,
		.gradient = (float *const(*)[UNIT_PARTS_MAX])gradient,
	};
	if (model_run(&run, &loss, &e))
		fail_msg("%s", e.text);
	for (uint32_t u = 0; u < s->table.n_units; u++) {
		const struct unit_info *info = &s->table.unit[u];

		for (uint64_t i = 0; info->n_parts > 1 && i < info->part[1].end; i++)
			s->g[u][0][i] += s->g[u][1][i];
	}
	return loss;
}

static double square_sum(struct peers *s)
{
	struct exact_sum sum;

	exact_sum_clear(&sum);
	for (uint32_t u = 0; u < s->table.n_units; u++) {
		struct k_fold_seg seg = { .dst = s->g[u][0], .a = s->g[u][0], .n = s->table.unit[u].n };
		struct k_fold fold = { .seg = &seg, .n_seg = 1, .square_sum = &sum };
		struct k_event done;

		k_cpu_ops()->fold(s->stream, &fold);
		k_cpu_ops()->event_record(s->stream, &done);
		k_cpu_ops()->event_wait(s->stream, &done);
	}
	return exact_sum_value(&sum);
}

static void adam(struct peers *s, int step, double scale)
{
	for (uint32_t u = 0; u < s->table.n_units; u++) {
		struct k_adam a = {
			.p = s->p[u],
			.m = s->m[u],
			.v = s->v[u],
			.grad = s->g[u][0],
			.n = s->table.unit[u].n,
			.grad_scale = scale,
			.lr = 1e-3,
			.beta1 = 0.9,
			.beta2 = 0.95,
			.eps = 1e-4,
			.weight_decay = 0.1,
			.bias1 = 1 - det_pow_u64(0.9, (uint64_t)step + 1),
			.bias2 = 1 - det_pow_u64(0.95, (uint64_t)step + 1),
			.decoupled = true,
		};
		struct k_event done;

		k_cpu_ops()->adam(s->stream, &a);
		k_cpu_ops()->event_record(s->stream, &done);
		k_cpu_ops()->event_wait(s->stream, &done);
	}
}

static void three_steps_like_pytorch(void **state)
{
	struct peers s = { 0 };
	float *loss, *norm, *mean[UNITS_MAX];

	(void)state;
	setup(&s);
	loss = read_numbers(&s, "", "loss", STEPS);
	norm = read_numbers(&s, "", "norm", STEPS);
	for (int step = 0; step < STEPS; step++) {
		float got_loss = (float)(forward_backward(&s, step) / MICRO), got_norm;
		double n = sqrt(square_sum(&s)) / MICRO, clip = 0.25 / (n + 1e-6);

		expect_close(&s, "loss", &got_loss, &loss[step], 1);
		got_norm = (float)n;
		expect_close(&s, "norm", &got_norm, &norm[step], 1);
		for (uint32_t u = 0; step == 0 && u < s.table.n_units; u++) {
			mean[u] = floats(s.table.unit[u].n);
			for (uint64_t i = 0; i < s.table.unit[u].n; i++)
				mean[u][i] = s.g[u][0][i] / MICRO;
		}
		if (step == 0)
			expect_tensors(&s, "grad.", mean);
		adam(&s, step, (clip < 1 ? clip : 1) / MICRO);
	}
	expect_tensors(&s, "final.", s.p);
	print_message("largest error: %.2g of a tensor's largest magnitude\n", s.worst);
	for (uint32_t u = 0; u < s.table.n_units; u++)
		free(mean[u]);
	free(loss);
	free(norm);
	release(&s);
}

int main(int argc, char **argv)
{
	static char path[4096];
	const char *source = getenv("SHARDMESH_SOURCE");
	const struct CMUnitTest tests[] = { cmocka_unit_test(three_steps_like_pytorch) };

	snprintf(path, sizeof(path), "%s/tests/peers/gpt2_small.safetensors", source ? source : ".");
	numbers_path = argc > 1 ? argv[1] : path;
	return cmocka_run_group_tests(tests, NULL, NULL);
}
