/* SPDX-License-Identifier: Apache-2.0 */
/* What tests of job configs check: two of them that are equal, a dump that reads back, what is invalid as a whole. */
#ifndef SHARDMESH_TEST_DS_CONFIG_CHECKS_H
#define SHARDMESH_TEST_DS_CONFIG_CHECKS_H

#include "model/model.h"

#include <errno.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* The smallest sections that are accepted. */
#define MODEL "\"model\": { \"n_embd\": 64, \"n_layer\": 2, \"n_head\": 4, \"vocab_size\": 256, \"n_positions\": 128 }"
#define DATA "\"data\": { \"train\": \"a.txt\" }"

static inline void assert_sources_equal(const struct data_source *a, uint32_t n_a, const struct data_source *b,
					uint32_t n_b)
{
	assert_int_equal(n_a, n_b);
	for (uint32_t i = 0; i < n_a; i++) {
		assert_int_equal(a[i].format, b[i].format);
		assert_true(a[i].weight == b[i].weight);
		assert_int_equal(a[i].n_paths, b[i].n_paths);
		for (uint32_t k = 0; k < a[i].n_paths; k++)
			assert_string_equal(a[i].path[k], b[i].path[k]);
	}
}

static inline void assert_configs_equal(const struct job_config *a, const struct job_config *b)
{
	assert_int_equal(a->train_batch_size, b->train_batch_size);
	assert_int_equal(a->train_micro_batch_size_per_gpu, b->train_micro_batch_size_per_gpu);
	assert_int_equal(a->gradient_accumulation_steps, b->gradient_accumulation_steps);
	assert_true(a->gradient_clipping == b->gradient_clipping);
	assert_memory_equal(&a->optimizer.lr, &b->optimizer.lr, 5 * sizeof(double));
	assert_int_equal(a->optimizer.type, b->optimizer.type);
	assert_int_equal(a->optimizer.bias_correction, b->optimizer.bias_correction);
	assert_int_equal(a->optimizer.decoupled, b->optimizer.decoupled);
	assert_int_equal(a->scheduler.type, b->scheduler.type);
	if (a->scheduler.type != SCHEDULER_NONE) {
		assert_int_equal(a->scheduler.warmup_num_steps, b->scheduler.warmup_num_steps);
		assert_int_equal(a->scheduler.total_num_steps, b->scheduler.total_num_steps);
		assert_int_equal(a->scheduler.log_warmup, b->scheduler.log_warmup);
		assert_true(schedule_lr(a, 3) == schedule_lr(b, 3) && schedule_lr(a, 77) == schedule_lr(b, 77));
	}
	assert_memory_equal(&a->zero.stage3_prefetch_bucket_size, &b->zero.stage3_prefetch_bucket_size,
			    offsetof(struct zero_config, overlap_comm) -
				    offsetof(struct zero_config, stage3_prefetch_bucket_size));
	assert_int_equal(a->zero.overlap_comm, b->zero.overlap_comm);
	assert_int_equal(a->zero.contiguous_gradients, b->zero.contiguous_gradients);
	assert_int_equal(a->steps_per_print, b->steps_per_print);
	assert_memory_equal(&a->model, &b->model, offsetof(struct model_config, tie_word_embeddings));
	assert_string_equal(a->model.json, b->model.json);
	assert_int_equal(!a->weights, !b->weights);
	if (a->weights)
		assert_string_equal(a->weights, b->weights);
	assert_sources_equal(a->data.train, a->data.n_train, b->data.train, b->data.n_train);
	assert_sources_equal(a->data.validation, a->data.n_validation, b->data.validation, b->data.n_validation);
	assert_true(a->data.validation_fraction == b->data.validation_fraction);
	assert_int_equal(a->data.format, b->data.format);
	assert_int_equal(a->data.sequence_length, b->data.sequence_length);
	assert_int_equal(!a->data.tokenizer, !b->data.tokenizer);
	if (a->data.tokenizer)
		assert_string_equal(a->data.tokenizer, b->data.tokenizer);
	assert_int_equal(!a->data.end_token, !b->data.end_token);
	if (a->data.end_token)
		assert_string_equal(a->data.end_token, b->data.end_token);
	assert_int_equal(a->data.eos_token, b->data.eos_token);
	assert_int_equal(a->steps, b->steps);
	assert_int_equal(a->seed, b->seed);
	assert_int_equal(a->eval_interval, b->eval_interval);
	assert_int_equal(a->eval_batches, b->eval_batches);
	assert_int_equal(a->shards, b->shards);
	assert_int_equal(a->workers, b->workers);
	assert_int_equal(a->threads_per_worker, b->threads_per_worker);
	assert_int_equal(a->threads_per_shard, b->threads_per_shard);
	assert_string_equal(a->fabric, b->fabric);
	assert_int_equal(a->host_sharing, b->host_sharing);
	assert_int_equal(a->host_wait_ms, b->host_wait_ms);
	assert_int_equal(a->n_rdma, b->n_rdma);
	for (uint32_t i = 0; i < a->n_rdma; i++) {
		assert_string_equal(a->rdma[i].name, b->rdma[i].name);
		assert_string_equal(a->rdma[i].value, b->rdma[i].value);
	}
	assert_string_equal(a->math, b->math);
	assert_string_equal(a->run_dir, b->run_dir);
	assert_int_equal(a->state_hash_interval, b->state_hash_interval);
	assert_int_equal(a->activation_memory, b->activation_memory);
	assert_int_equal(a->activations, b->activations);
	assert_int_equal(a->max_owners_per_unit, b->max_owners_per_unit);
	assert_int_equal(a->max_held_nodes, b->max_held_nodes);
	assert_int_equal(a->partial_sum_memory, b->partial_sum_memory);
}

static inline void check_round_trip(const struct job_config *a)
{
	struct job_config b;
	struct err e = { 0 };
	char *text, *again;

	assert_int_equal(job_config_dump(a, &text, &e), 0);
	if (job_config_parse(text, "dump", "/elsewhere", &b, &e))
		fail_msg("%s\n%s", e.text, text);
	assert_configs_equal(a, &b);
	assert_int_equal(job_config_dump(&b, &again, &e), 0);
	assert_string_equal(text, again);
	free(text);
	free(again);
	job_config_release(&b);
}

static inline void check_invalid(const char *text, const char *message)
{
	struct job_config c;
	struct err e = { 0 };

	if (job_config_parse(text, "ds.json", "/base", &c, &e))
		fail_msg("%s", e.text);
	assert_int_equal(job_config_validate(&c, &e), -EINVAL);
	assert_string_equal(e.text, message);
	job_config_release(&c);
}

#endif
