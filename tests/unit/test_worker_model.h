/* SPDX-License-Identifier: Apache-2.0 */
/* A tiny model in plain memory for the tests of the worker: parameters, samples, gradients. */
#ifndef SHARDMESH_TEST_WORKER_MODEL_H
#define SHARDMESH_TEST_WORKER_MODEL_H

#include "worker/model_run.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { BATCH = 2, SEQ = 6, MICRO_MAX = 4, ROWS = BATCH * SEQ };

struct tiny {
	struct model_config model;
	struct unit_table table;
	struct k_profile profile;
	float **unit;
	float *(*gradient)[UNIT_PARTS_MAX];
	uint32_t tokens[MICRO_MAX * ROWS], targets[MICRO_MAX * ROWS];
};

static void *zeroed(size_t bytes)
{
	void *p = aligned_alloc(64, round_up_u64(bytes, 64));

	assert_non_null(p);
	memset(p, 0, round_up_u64(bytes, 64));
	return p;
}

/* Not the model's own initialisation: everything random, so that no gradient is trivially zero. */
static void tiny_fill(struct tiny *t)
{
	for (uint32_t i = 0; i < t->table.n_tensors; i++) {
		const struct tensor_info *x = &t->table.tensor[i];
		bool scale = x->init == INIT_ONE;

		rng_fill_normal(t->unit[x->unit] + x->offset, x->n, 1, x->rng_stream, 0, scale ? 1.0f : 0.0f,
				scale ? 0.1f : 0.2f);
	}
	for (uint32_t i = 0; i < MICRO_MAX * ROWS; i++) {
		t->tokens[i] = (uint32_t)(rng_u64(2, 0, i) % t->model.vocab_size);
		t->targets[i] = (uint32_t)(rng_u64(2, 1, i) % t->model.vocab_size);
	}
}

/* Models of the Llama family for tiny_open; more members may follow, and the brace. */
#define TINY_SIZES                                                                                            \
	"\"vocab_size\": 31, \"max_position_embeddings\": 8, \"hidden_size\": 12, \"num_hidden_layers\": 3, " \
	"\"intermediate_size\": 20, \"num_attention_heads\": 4, \"num_key_value_heads\": 2, \"head_dim\": 4"
#define TINY_LLAMA                                                                                   \
	"{\"model_type\": \"llama\", " TINY_SIZES ", \"attention_bias\": true, \"mlp_bias\": true, " \
	"\"tie_word_embeddings\": false"
#define TINY_MISTRAL "{\"model_type\": \"mistral\", " TINY_SIZES ", \"sliding_window\": 3, \"rope_theta\": 100.0"
#define TINY_QWEN3                                                                                                \
	"{\"model_type\": \"qwen3\", " TINY_SIZES ", \"tie_word_embeddings\": true, \"attention_dropout\": 0.1, " \
	"\"rope_theta\": 100.0"

/* keys: JSON members to add to a GPT-2, or ""; or a whole model's, from its brace on. */
static struct tiny *tiny_open(const char *keys)
{
	struct tiny *t = calloc(1, sizeof(*t));
	struct err e = { 0 };
	char json[1024];

	assert_non_null(t);
	if (*keys == '{')
		snprintf(json, sizeof(json), "%s", keys);
	else
		snprintf(
			json, sizeof(json),
			"{\"model_type\": \"gpt2\", \"vocab_size\": 31, \"n_positions\": 8, \"n_embd\": 12, \"n_layer\": 3, "
			"\"n_head\": 3%s%s}",
			*keys ? ", " : "", keys);
	if (model_config_parse(json, "test", &t->model, &e) || unit_table_init(&t->table, &t->model, &e) ||
	    k_profile_detect(NULL, &t->profile, NULL, &e))
		fail_msg("%s", e.text);
	t->unit = calloc(t->table.n_units, sizeof(*t->unit));
	t->gradient = calloc(t->table.n_units, sizeof(*t->gradient));
	assert_non_null(t->unit);
	assert_non_null(t->gradient);
	for (uint32_t u = 0; u < t->table.n_units; u++) {
		t->unit[u] = zeroed(t->table.unit[u].n * sizeof(float));
		for (uint32_t p = 0; p < t->table.unit[u].n_parts; p++)
			t->gradient[u][p] = zeroed(t->table.unit[u].n * sizeof(float));
	}
	tiny_fill(t);
	return t;
}

static void tiny_close(struct tiny *t)
{
	for (uint32_t u = 0; u < t->table.n_units; u++) {
		free(t->unit[u]);
		for (uint32_t p = 0; p < UNIT_PARTS_MAX; p++)
			free(t->gradient[u][p]);
	}
	free(t->unit);
	free(t->gradient);
	unit_table_release(&t->table);
	model_config_release(&t->model);
	free(t);
}

/* Micro-batches [first, first + n_mb) of the samples; the caller changes what it likes. */
static struct model_run tiny_run(struct tiny *t, uint32_t first, uint32_t n_mb)
{
	return (struct model_run){
		.model = &t->model,
		.table = &t->table,
		.ops = k_cpu_ops(),
		.profile = &t->profile,
		.threads = 1,
		.batch = BATCH,
		.seq = SEQ,
		.n_mb = n_mb,
		.training = true,
		.keep = true,
		.seed = 7,
		.step = 3,
		.first = first,
		.tokens = t->tokens + first * ROWS,
		.targets = t->targets + first * ROWS,
		.unit = (const float *const *)t->unit,
		.gradient = (float *const(*)[UNIT_PARTS_MAX])t->gradient,
	};
}

static double tiny_loss(const struct model_run *r)
{
	struct err e = { 0 };
	double loss;

	if (model_run(r, &loss, &e))
		fail_msg("%s", e.text);
	return loss;
}

#endif
