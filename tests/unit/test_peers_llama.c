/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Our models of the Llama family against transformers', by the numbers that
 * tests/peers/make_llama.py wrote: config.json as transformers writes it,
 * logits to 1e-4, loss and every gradient to 1e-5 of the largest magnitude in
 * the tensor.
 *
 * usage: test_peers_llama [directory of the numbers]
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

enum { MICRO = 2, BATCH = 2, LENGTH = 20, ROWS = MICRO * BATCH * LENGTH, UNITS_MAX = 8 };
#define LOGITS_TOLERANCE 1e-4
#define TOLERANCE 1e-5

static char directory[4096];

struct peers {
	struct model_config model;
	struct unit_table table;
	struct st_file file;
	struct k_profile profile;
	float *unit[UNITS_MAX], *gradient[UNITS_MAX][UNIT_PARTS_MAX];
	uint32_t tokens[ROWS], targets[ROWS];
};

static float *floats(uint64_t n)
{
	float *f = aligned_alloc(64, round_up_u64(n * sizeof(float), 64));

	assert_non_null(f);
	memset(f, 0, round_up_u64(n * sizeof(float), 64));
	return f;
}

/* n: where how many there are is written; or what is expected there, if it is not 0. */
static float *read_numbers(const struct peers *s, const char *prefix, const char *name, uint64_t *n)
{
	const struct st_tensor *t;
	struct err e = { 0 };
	char full[160];
	uint64_t found;
	float *out;

	snprintf(full, sizeof(full), "%s%s", prefix, name);
	t = st_find(&s->file, full);
	if (!t)
		fail_msg("%s has no %s", s->file.path, full);
	found = (t->end - t->begin) / sizeof(float);
	assert_true(*n == 0 || *n == found);
	*n = found;
	out = floats(found);
	if (st_read_f32(&s->file, t, 0, found, out, &e))
		fail_msg("%s", e.text);
	return out;
}

static void read_config(struct peers *s)
{
	uint64_t n = 0;
	float *text = read_numbers(s, "", "config", &n);
	char *json = calloc(n + 1, 1);
	struct err e = { 0 };

	assert_non_null(json);
	for (uint64_t i = 0; i < n; i++)
		json[i] = (char)text[i];
	if (model_config_parse(json, "config.json", &s->model, &e) || unit_table_init(&s->table, &s->model, &e))
		fail_msg("%s: %s", s->file.path, e.text);
	free(json);
	free(text);
}

static void read_parameters(struct peers *s)
{
	for (uint32_t u = 0; u < s->table.n_units; u++) {
		s->unit[u] = floats(s->table.unit[u].n);
		for (uint32_t part = 0; part < UNIT_PARTS_MAX; part++)
			s->gradient[u][part] = floats(s->table.unit[u].n);
	}
	for (uint32_t i = 0; i < s->table.n_tensors; i++) {
		const struct tensor_info *t = &s->table.tensor[i];
		uint64_t n = t->n;
		float *init = read_numbers(s, "init.", t->name, &n);

		memcpy(s->unit[t->unit] + t->offset, init, n * sizeof(float));
		free(init);
	}
}

static void setup(struct peers *s, const char *name)
{
	uint64_t n = MICRO * BATCH * (LENGTH + 1);
	struct err e = { 0 };
	char path[4200];
	float *tokens;

	snprintf(path, sizeof(path), "%s/%s.safetensors", directory, name);
	if (st_open(path, &s->file, &e) || k_profile_detect(NULL, &s->profile, NULL, &e))
		fail_msg("%s", e.text);
	read_config(s);
	read_parameters(s);
	tokens = read_numbers(s, "", "tokens", &n);
	for (int i = 0; i < ROWS; i++) {
		const float *t = tokens + i / LENGTH * (LENGTH + 1) + i % LENGTH;

		s->tokens[i] = (uint32_t)t[0];
		s->targets[i] = (uint32_t)t[1];
	}
	free(tokens);
}

static void release(struct peers *s)
{
	for (uint32_t u = 0; u < s->table.n_units; u++) {
		free(s->unit[u]);
		for (uint32_t part = 0; part < UNIT_PARTS_MAX; part++)
			free(s->gradient[u][part]);
	}
	st_close(&s->file);
	unit_table_release(&s->table);
	model_config_release(&s->model);
}

/* Returns the largest error, of the largest magnitude. */
static double expect_close(const struct peers *s, const char *prefix, const char *name, const float *got, uint64_t n,
			   double scale, double tolerance)
{
	float *want = read_numbers(s, prefix, name, &n);
	double largest = 0, error = 0;

	for (uint64_t i = 0; i < n; i++) {
		largest = fmax(largest, fabs((double)want[i]));
		error = fmax(error, fabs((double)got[i] * scale - (double)want[i]));
	}
	free(want);
	if (!(error <= tolerance * largest))
		fail_msg("%s: %s%s: off by %.3g, the largest magnitude is %.3g", s->file.path, prefix, name, error,
			 largest);
	return error / largest;
}

static struct model_run run_of(struct peers *s)
{
	return (struct model_run){
		.model = &s->model,
		.table = &s->table,
		.ops = k_cpu_ops(),
		.profile = &s->profile,
		.threads = 1,
		.batch = BATCH,
		.seq = LENGTH,
		.n_mb = MICRO,
		.keep = true,
		.tokens = s->tokens,
		.targets = s->targets,
		.unit = (const float *const *)s->unit,
	};
}

static double check_logits(struct peers *s)
{
	uint64_t n = (uint64_t)ROWS * s->model.vocab_size;
	struct model_run run = run_of(s);
	struct err e = { 0 };
	double loss, error;

	run.logits = floats(n);
	if (model_run(&run, &loss, &e))
		fail_msg("%s", e.text);
	error = expect_close(s, "", "logits", run.logits, n, 1, LOGITS_TOLERANCE);
	free(run.logits);
	return error;
}

static double check_gradients(struct peers *s)
{
	struct model_run run = run_of(s);
	struct err e = { 0 };
	double loss, worst = 0;
	float mean;

	run.training = true;
	run.gradient = (float *const(*)[UNIT_PARTS_MAX])s->gradient;
	if (model_run(&run, &loss, &e))
		fail_msg("%s", e.text);
	mean = (float)(loss / MICRO);
	worst = expect_close(s, "", "loss", &mean, 1, 1, TOLERANCE);
	for (uint32_t u = 0; u < s->table.n_units; u++)
		for (uint64_t i = 0; s->table.unit[u].n_parts > 1 && i < s->table.unit[u].part[1].end; i++)
			s->gradient[u][0][i] += s->gradient[u][1][i];
	for (uint32_t i = 0; i < s->table.n_tensors; i++) {
		const struct tensor_info *t = &s->table.tensor[i];

		worst = fmax(worst, expect_close(s, "grad.", t->name, s->gradient[t->unit][0] + t->offset, t->n,
						 1.0 / MICRO, TOLERANCE));
	}
	return worst;
}

static void like_transformers(const char *name, enum model_family family)
{
	struct peers s = { 0 };
	double logits, gradients;

	setup(&s, name);
	assert_int_equal(s.model.family, family);
	logits = check_logits(&s);
	gradients = check_gradients(&s);
	print_message("%s: largest error %.2g of the largest logit, %.2g of a gradient's largest magnitude\n", name,
		      logits, gradients);
	release(&s);
}

static void llama(void **state)
{
	(void)state;
	like_transformers("llama", FAMILY_LLAMA);
}

static void mistral(void **state)
{
	(void)state;
	like_transformers("mistral", FAMILY_MISTRAL);
}

static void qwen2(void **state)
{
	(void)state;
	like_transformers("qwen2", FAMILY_QWEN2);
}

static void qwen3(void **state)
{
	(void)state;
	like_transformers("qwen3", FAMILY_QWEN3);
}

int main(int argc, char **argv)
{
	const char *source = getenv("SHARDMESH_SOURCE");
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(llama),
		cmocka_unit_test(mistral),
		cmocka_unit_test(qwen2),
		cmocka_unit_test(qwen3),
	};

	snprintf(directory, sizeof(directory), "%s/tests/peers", source ? source : ".");
	if (argc > 1)
		snprintf(directory, sizeof(directory), "%s", argv[1]);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
