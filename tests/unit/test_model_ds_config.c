/* SPDX-License-Identifier: Apache-2.0 */
#include "model/ds_keys.h"
#include "model/model.h"

#include <errno.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <cmocka.h>

/* The smallest section that makes a config whole; tests put their own keys before it. */
#define MODEL "\"model\": { \"n_embd\": 64, \"n_layer\": 2, \"n_head\": 4, \"vocab_size\": 256, \"n_positions\": 128 }"
#define DATA "\"data\": { \"train\": \"a.txt\" }"
#define OURS "\"shardmesh\": { " MODEL ", " DATA ", \"steps\": 10 }"

static int parse(const char *keys, struct job_config *c, struct err *e)
{
	char text[4096];

	snprintf(text, sizeof(text), "{ %s%s%s }", keys, keys[0] ? ",\n" : "", OURS);
	return job_config_parse(text, "ds.json", "/base", c, e);
}

static struct job_config parse_good(const char *keys)
{
	struct job_config c;
	struct err e = { 0 };

	if (parse(keys, &c, &e))
		fail_msg("%s: %s", keys, e.text);
	return c;
}

static bool has_note(const struct job_config *c, const char *begin)
{
	for (uint32_t i = 0; i < c->n_notes; i++)
		if (!strncmp(c->note[i], begin, strlen(begin)))
			return true;
	return false;
}

static void test_defaults(void **state)
{
	struct job_config c = parse_good("\"train_batch_size\": 8");

	(void)state;
	assert_int_equal(c.train_batch_size, 8);
	assert_int_equal(c.train_micro_batch_size_per_gpu, 0);
	assert_int_equal(c.gradient_accumulation_steps, 0);
	assert_true(c.gradient_clipping == 1.0);
	assert_int_equal(c.optimizer.type, OPTIMIZER_ADAMW);
	assert_true(c.optimizer.lr == 1e-3 && c.optimizer.beta1 == 0.9 && c.optimizer.beta2 == 0.999);
	assert_true(c.optimizer.eps == 1e-8 && c.optimizer.weight_decay == 0);
	assert_true(c.optimizer.bias_correction && c.optimizer.decoupled);
	assert_true(has_note(&c, "optimizer: AdamW with lr 0.001"));
	assert_int_equal(c.scheduler.type, SCHEDULER_NONE);
	assert_int_equal(c.zero.stage, 3);
	assert_int_equal(c.zero.stage3_prefetch_bucket_size, 50000000);
	assert_int_equal(c.zero.stage3_param_persistence_threshold, 100000);
	assert_int_equal(c.zero.stage3_model_persistence_threshold, INT64_MAX);
	assert_int_equal(c.zero.stage3_max_live_parameters, 1000000000);
	assert_int_equal(c.zero.stage3_max_reuse_distance, 1000000000);
	assert_int_equal(c.zero.sub_group_size, 1000000000);
	assert_int_equal(c.zero.reduce_bucket_size, 500000000);
	assert_true(c.zero.overlap_comm && c.zero.contiguous_gradients);
	assert_false(c.zero.stage3_gather_16bit_weights_on_model_save);
	assert_int_equal(c.steps_per_print, 0);
	assert_int_equal(c.model.n_embd, 64);
	assert_int_equal(c.data.n_train, 1);
	assert_string_equal(c.data.train[0].path[0], "/base/a.txt");
	assert_int_equal(c.data.format, DATA_BYTES);
	assert_int_equal(c.data.sequence_length, 128);
	assert_int_equal(c.steps, 10);
	assert_int_equal(c.seed, 42);
	assert_int_equal(c.eval_batches, 0);
	assert_int_equal(c.shards, 1);
	assert_int_equal(c.workers, 1);
	assert_string_equal(c.fabric, "auto");
	assert_true(c.host_sharing);
	assert_int_equal(c.host_wait_ms, 20);
	assert_string_equal(c.math, "");
	assert_string_equal(c.run_dir, "/base/run");
	assert_int_equal(c.activations, ACTIVATIONS_AUTO);
	assert_int_equal(c.max_owners_per_unit, 16);
	assert_int_equal(c.max_held_nodes, 8);
	job_config_release(&c);
}

/* What users' files look like: comments, trailing commas, 5e8, "auto", Infinity, aliases, sections that are off. */
static const char users_file[] =
	"// a comment\n"
	"{\n"
	"  \"train_batch_size\": 2.4e1, # another\n"
	"  \"train_micro_batch_size_per_gpu\": \"auto\",\n"
	"  \"gradient_accumulation_steps\": \"auto\",\n"
	"  \"gradient_clipping\": \"auto\",\n"
	"  \"steps_per_print\": Infinity,\n"
	"  \"wall_clock_breakdown\": false,\n"
	"  \"bfloat16\": { \"enabled\": \"auto\" },\n"
	"  \"fp16\": { \"enabled\": false, \"loss_scale\": 0, \"initial_scale_power\": 16 },\n"
	"  /* block\n"
	"     comment */ \"optimizer\": { \"type\": \"Adam\",\n"
	"    \"params\": { \"lr\": 3e-4, \"betas\": [0.8, 0.95], \"eps\": \"auto\", \"weight_decay\": 0.1,\n"
	"      \"adam_w_mode\": false, \"torch_adam\": true, } },\n"
	"  \"scheduler\": { \"type\": \"WarmupDecayLR\", \"params\": { \"warmup_min_lr\": \"auto\", \"warmup_max_lr\": "
	"\"auto\",\n"
	"    \"warmup_num_steps\": 5, \"total_num_steps\": \"auto\", \"warmup_type\": \"linear\" } },\n"
	"  \"zero_optimization\": {\n"
	"    \"stage\": 3, \"overlap_comm\": true, \"contiguous_gradients\": true, \"sub_group_size\": 1e9,\n"
	"    \"reduce_bucket_size\": \"auto\", \"prefetch_bucket_size\": \"auto\",\n"
	"    \"stage3_param_persistence_threshold\": \"auto\", \"max_live_parameters\": 7e8,\n"
	"    \"offload_param\": { \"device\": \"none\", \"pin_memory\": true }, \"offload_optimizer\": null,\n"
	"    \"stage3_gather_16bit_weights_on_model_save\": true,\n"
	"  },\n"
	"  \"tensorboard\": { \"enabled\": false, \"output_path\": \"//not a comment, }\" },\n"
	"  \"shardmesh\": { " MODEL ",\n"
	"    \"data\": { \"train\": [ \"/x/1.bin\", \"./sub/2.bin\", ], \"format\": \"llmc\", \"sequence_length\": 64,\n"
	"              \"validation\": \"v.bin\" },\n"
	"    \"steps\": 100, \"seed\": 7, \"eval_interval\": 10, \"shards\": 4, \"workers\": 2, \"fabric\": \"local\",\n"
	"    \"host_sharing\": false, \"host_wait_ms\": 5, \"run_dir\": \"/runs/1\", \"activations\": \"recompute\", \"activation_memory\": 1e9,\n"
	"    \"rdma\": { \"connect\": \"cm\", \"mtu\": 1024, \"gid_index\": \"auto\", \"ofi_provider\": \"tcp\" } },\n"
	"}\n";

static void test_users_file(void **state)
{
	struct job_config c;
	struct err e = { 0 };

	(void)state;
	if (job_config_parse(users_file, "ds.json", "/base", &c, &e))
		fail_msg("%s", e.text);
	assert_int_equal(c.n_rdma, 3);
	assert_string_equal(c.rdma[1].name, "mtu");
	assert_string_equal(c.rdma[1].value, "1024");
	assert_int_equal(c.train_batch_size, 24);
	assert_int_equal(c.train_micro_batch_size_per_gpu, 0);
	assert_true(c.gradient_clipping == 1.0);
	assert_int_equal(c.steps_per_print, 0);
	assert_int_equal(c.optimizer.type, OPTIMIZER_ADAM);
	assert_false(c.optimizer.decoupled);
	assert_true(c.optimizer.lr == 3e-4 && c.optimizer.beta1 == 0.8 && c.optimizer.beta2 == 0.95);
	assert_true(c.optimizer.eps == 1e-8 && c.optimizer.weight_decay == 0.1);
	assert_int_equal(c.scheduler.type, SCHEDULER_WARMUP_DECAY);
	assert_true(c.scheduler.warmup_min_lr == 0 && c.scheduler.warmup_max_lr == 3e-4);
	assert_int_equal(c.scheduler.warmup_num_steps, 5);
	assert_int_equal(c.scheduler.total_num_steps, 0);
	assert_false(c.scheduler.log_warmup);
	/* Hugging Face's widths: h * h, 0.9 * h * h, 10 * h */
	assert_int_equal(c.zero.reduce_bucket_size, 4096);
	assert_int_equal(c.zero.stage3_prefetch_bucket_size, 3686);
	assert_int_equal(c.zero.stage3_param_persistence_threshold, 640);
	assert_int_equal(c.zero.stage3_max_live_parameters, 700000000);
	assert_true(c.zero.stage3_gather_16bit_weights_on_model_save);
	assert_int_equal(c.data.n_train, 1);
	assert_int_equal(c.data.train[0].n_paths, 2);
	assert_int_equal(c.data.train[0].format, DATA_LLMC);
	assert_string_equal(c.data.train[0].path[0], "/x/1.bin");
	assert_string_equal(c.data.train[0].path[1], "/base/sub/2.bin");
	assert_int_equal(c.data.n_validation, 1);
	assert_int_equal(c.data.format, DATA_LLMC);
	assert_int_equal(c.eval_batches, 8);
	assert_int_equal(c.activations, ACTIVATIONS_RECOMPUTE);
	assert_int_equal(c.activation_memory, 1000000000);
	assert_true(has_note(&c, "fp16.loss_scale: no effect here: "));
	assert_true(has_note(&c, "optimizer.params.torch_adam: no effect here: "));
	assert_true(has_note(&c, "zero_optimization.offload_param.pin_memory: no effect here: "));
	assert_true(has_note(&c, "zero_optimization.reduce_bucket_size: no effect here: "));
	assert_false(has_note(&c, "zero_optimization.prefetch_bucket_size: "));
	assert_false(has_note(&c, "optimizer: "));
	job_config_release(&c);
}

static void test_messages(void **state)
{
	/* Keys before OURS on line 1, and the whole message. */
	static const struct {
		const char *keys, *message;
	} bad[] = {
		{ "\"train_batch_sise\": 8",
		  "ds.json:1: train_batch_sise: unknown key; did you mean \"train_batch_size\"?" },
		{ "\n\n\"zero_optimization\": {\n\"stage\": 3,\n\"stage3_prefetch_bucket\": 1}",
		  "ds.json:5: zero_optimization.stage3_prefetch_bucket: unknown key; did you mean "
		  "\"stage3_prefetch_bucket_size\"?" },
		{ "\"stage3_max_live_parameters\": 1",
		  "ds.json:1: stage3_max_live_parameters: unknown key; did you mean "
		  "\"zero_optimization.stage3_max_live_parameters\"?" },
		{ "\"zero_optimization\": {\"stage\": 3, \"gradient_clippin\": 1}",
		  "ds.json:1: zero_optimization.gradient_clippin: unknown key; did you mean \"gradient_clipping\"?" },
		{ "\"xyzzy_plugh\": 1", "ds.json:1: xyzzy_plugh: unknown key; docs/config.md lists those there are" },
		{ "\"train_batch_size\": 8, \"train_batch_size\": 9",
		  "ds.json:1: duplicate object key near '\"train_batch_size\"'" },
		{ "\"train_batch_size\": -8",
		  "ds.json:1: train_batch_size: expected an integer from 1 to 1000000000000, found -8" },
		{ "\"train_batch_size\": 2.5",
		  "ds.json:1: train_batch_size: expected an integer from 1 to 1000000000000, found 2.5" },
		{ "\"train_batch_size\": \"8\"",
		  "ds.json:1: train_batch_size: expected an integer from 1 to 1000000000000, found \"8\"" },
		{ "\"gradient_clipping\": [1]",
		  "ds.json:1: gradient_clipping: expected a number of at least 0, found a list" },
		{ "\"wall_clock_breakdown\": 1", "ds.json:1: wall_clock_breakdown: expected true or false, found 1" },
		{ "\"fp16\": true", "ds.json:1: fp16: expected an object, found true" },
		{ "\"fp16\": {\n\"enabled\": true}",
		  "ds.json:2: fp16.enabled: not built yet: fp16; accepted here: false; found true" },
		{ "\"bfloat16\": {\"enabled\": true}",
		  "ds.json:1: bfloat16.enabled: not built yet: bf16; accepted here: false; found true" },
		{ "\"bf16\": {}, \"bfloat16\": {}", "ds.json:1: bfloat16: means the same as bf16, which is given too" },
		{ "\"zero_optimization\": {\"stage\": 2}",
		  "ds.json:1: zero_optimization.stage: Shardmesh is ZeRO stage 3; set 3 (found 2)" },
		{ "\"zero_optimization\": {\"overlap_comm\": true}",
		  "ds.json:1: zero_optimization: gives no stage, which DeepSpeed takes as 0; Shardmesh is ZeRO stage 3: say "
		  "\"stage\": 3" },
		{ "\"zero_optimization\": true",
		  "ds.json:1: zero_optimization: true and false are the old way to say stage 1 and 0; say { \"stage\": 3 }" },
		{ "\"zero_optimization\": {\"stage\": 3, \"offload_optimizer\": {\"device\": \"nvme\"}}",
		  "ds.json:1: zero_optimization.offload_optimizer.device: not built yet: offload of optimizer states; "
		  "accepted here: \"none\"; found \"nvme\"" },
		{ "\"zero_optimization\": {\"stage\": 3, \"zenflow\": {}}",
		  "ds.json:1: zero_optimization.zenflow: not built yet: ZenFlow; leave the key out" },
		{ "\"zero_optimization\": {\"stage\": 3, \"max_reuse_distance\": 1, \"stage3_max_reuse_distance\": 1}",
		  "ds.json:1: zero_optimization.max_reuse_distance: means the same as "
		  "zero_optimization.stage3_max_reuse_distance, which is given too" },
		{ "\"optimizer\": {\"type\": \"OneBitAdam\", \"params\": {\"freeze_step\": 1}}",
		  "ds.json:1: optimizer.type: only Adam and AdamW are built, found \"OneBitAdam\"" },
		{ "\"optimizer\": {\"type\": \"AdamW\", \"params\": {\"lr\": \"auto\"}}",
		  "ds.json:1: optimizer.params.lr: \"auto\" is filled in by Hugging Face's Trainer, which is not here; give "
		  "a value" },
		{ "\"optimizer\": {\"type\": \"AdamW\", \"params\": {\"betas\": [0.9, 1]}}",
		  "ds.json:1: optimizer.params.betas: a beta of 1 never takes a gradient; use less" },
		{ "\"optimizer\": {\"params\": {\"lr\": 1}}",
		  "ds.json:1: optimizer: gives no type; say \"type\": \"AdamW\"" },
		{ "\"scheduler\": {\"type\": \"OneCycle\"}",
		  "ds.json:1: scheduler.type: only WarmupLR, WarmupDecayLR and WarmupCosineLR are built, found \"OneCycle\"" },
		{ "\"scheduler\": {\"type\": \"WarmupCosineLR\", \"params\": {\"warmup_min_lr\": 0}}",
		  "ds.json:1: scheduler.params.warmup_min_lr: WarmupCosineLR has no such parameter" },
		{ "\"scheduler\": {\"type\": \"WarmupDecayLR\", \"params\": {}}",
		  "ds.json:1: scheduler.params: total_num_steps is missing; give a number, or \"auto\" for the job's steps" },
		{ "\"scheduler\": {\"type\": \"WarmupLR\", \"params\": {\"warmup_type\": \"cosine\"}}",
		  "ds.json:1: scheduler.params.warmup_type: expected \"log\" or \"linear\", found \"cosine\"" },
		{ "\"train_batch_size\": NaN", "ds.json:1: invalid token near 'NaN'" },
		{ "/* endless", "ds.json:1: this comment does not end" },
		{ "\"a\": [1 2]", "ds.json:1: ']' expected near '2'" },
	};

	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
		struct job_config c;
		struct err e = { 0 };

		assert_int_equal(parse(bad[i].keys, &c, &e), -EINVAL);
		assert_string_equal(e.text, bad[i].message);
	}
}

/* Our own section, given whole. */
static void test_own_section(void **state)
{
	static const struct {
		const char *section, *message;
	} bad[] = {
		{ DATA,
		  "ds.json:1: shardmesh.model: missing; give the path of a config.json, its directory, or its keys as "
		  "an object" },
		{ MODEL, "ds.json:1: shardmesh.data: train is missing; give a path or a list of paths" },
		{ MODEL ", \"data\": {\"train\": []}",
		  "ds.json:1: shardmesh.data.train: expected a path or a list of paths, found an empty list" },
		{ MODEL ", \"data\": {\"train\": [\"a\", 1]}",
		  "ds.json:1: shardmesh.data.train: expected a path or a list of paths, found 1" },
		{ MODEL ", \"data\": {\"train\": \"a\", \"format\": \"csv\"}",
		  "ds.json:1: shardmesh.data.format: expected \"bytes\", \"llmc\", \"nanogpt\", \"jsonl\" or \"text\", found "
		  "\"csv\"" },
		{ MODEL ", " DATA ", \"fabric\": \"tcp\"",
		  "ds.json:1: shardmesh.fabric: expected \"auto\", \"local\", \"local-copy\", \"verbs\" or \"ofi\", found "
		  "\"tcp\"" },
		{ MODEL ", " DATA ", \"rdma\": { \"mtu\": 1500 }",
		  "ds.json:1: shardmesh.rdma.mtu: expected 256, 512, 1024, 2048 or 4096, found 1500" },
		{ MODEL ", " DATA ", \"rdma\": { \"connect\": \"now\" }",
		  "ds.json:1: shardmesh.rdma.connect: expected \"auto\", \"cm\" or \"control\", found \"now\"" },
		{ MODEL ", " DATA ", \"rdma\": { \"service_level\": 16 }",
		  "ds.json:1: shardmesh.rdma.service_level: expected an integer from 0 to 15, found 16" },
		{ MODEL ", " DATA ", \"worker\": 2",
		  "ds.json:1: shardmesh.worker: unknown key; did you mean \"workers\"?" },
		{ MODEL ", " DATA ", \"shards\": 0",
		  "ds.json:1: shardmesh.shards: expected an integer from 1 to 1024, found 0" },
		{ "\"model\": {\n\"n_layers\": 2 }, " DATA,
		  "ds.json:2: shardmesh.model.n_layers: unknown key; did you mean \"n_layer\"?" },
		{ "\"model\": 3, " DATA,
		  "ds.json:1: shardmesh.model: expected the path of a config.json, its directory, or "
		  "its keys as an object, found 3" },
		{ "\"model\": \"/no/such/dir\", " DATA,
		  "ds.json:1: shardmesh.model: /no/such/dir: No such file or directory" },
	};

	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
		struct job_config c;
		struct err e = { 0 };
		char text[1024];

		snprintf(text, sizeof(text), "{\"shardmesh\": { %s }}", bad[i].section);
		assert_int_equal(job_config_parse(text, "ds.json", "/base", &c, &e), -EINVAL);
		assert_string_equal(e.text, bad[i].message);
	}
}

/* Every key that is refused is accepted with each of the values that ask for nothing, with "auto" and with null. */
static void test_every_refused_key(void **state)
{
	(void)state;
	for (size_t i = 0; i < ds_n_keys; i++) {
		const struct ds_key *k = &ds_keys[i];
		struct json_t *root = json_pack("{s:{s:i}}", "zero_optimization", "stage", 3), *at = root;
		char path[128], off[64], *save = NULL, *name, *text;
		const char *last = strrchr(k->path, '.');
		struct job_config c;

		if (k->use != DS_NOT_BUILT || !strncmp(k->path, "scheduler.", 10) ||
		    !strncmp(k->path, "optimizer.", 10)) {
			json_decref(root);
			continue;
		}
		snprintf(path, sizeof(path), "%.*s", last ? (int)(last - k->path) : 0, k->path);
		for (name = strtok_r(path, ".", &save); name; name = strtok_r(NULL, ".", &save)) {
			if (!json_object_get(at, name))
				json_object_set_new(at, name, json_object());
			at = json_object_get(at, name);
		}
		snprintf(off, sizeof(off), "%s null \"auto\"", k->off);
		for (char *v = strtok_r(off, " ", &save); v; v = strtok_r(NULL, " ", &save)) {
			json_object_set_new(at, last ? last + 1 : k->path, json_loads(v, JSON_DECODE_ANY, NULL));
			text = json_dumps(root, 0);
			text[strlen(text) - 1] = '\0';
			c = parse_good(text + 1);
			job_config_release(&c);
			free(text);
		}
		json_decref(root);
	}
}

static void test_table(void **state)
{
	(void)state;
	for (size_t i = 0; i < ds_n_keys; i++) {
		const struct ds_key *k = &ds_keys[i];

		assert_ptr_equal(ds_key_find(k->path), k);
		assert_true(strlen(k->path) < 100);
		if (k->use == DS_ALIAS)
			assert_non_null(ds_key_find(k->text));
		if (k->use == DS_NO_EFFECT || k->use == DS_NOT_BUILT)
			assert_true(k->text && k->text[0]);
		if (k->use == DS_USED && k->type != DS_SECTION)
			assert_true(k->read || k->size);
	}
}

/* The user's page names every key of the table, and only keys of the table stand in its first columns. */
static void test_documented(void **state)
{
	const char *source = getenv("SHARDMESH_SOURCE");
	char path[1024], word[256], *text;
	struct err e = { 0 };
	size_t bytes;

	(void)state;
	if (!source)
		skip();
	snprintf(path, sizeof(path), "%s/docs/config.md", source);
	if (file_read(path, 1 << 20, &text, &bytes, &e))
		fail_msg("%s", e.text);
	for (size_t i = 0; i < ds_n_keys; i++) {
		snprintf(word, sizeof(word), "\n| `%s` |", ds_keys[i].path);
		if (ds_keys[i].type != DS_SECTION && !strstr(text, word))
			fail_msg("docs/config.md does not describe %s", ds_keys[i].path);
	}
	for (const char *row = strstr(text, "\n| `"); row; row = strstr(row + 1, "\n| `")) {
		snprintf(word, sizeof(word), "%.*s", (int)strcspn(row + 4, "`"), row + 4);
		if (!ds_key_find(word))
			fail_msg("docs/config.md describes %s, which is no key", word);
	}
	free(text);
}

static void assert_sources_equal(const struct data_source *a, uint32_t n_a, const struct data_source *b, uint32_t n_b)
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

static void assert_configs_equal(const struct job_config *a, const struct job_config *b)
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

static void check_round_trip(const struct job_config *a)
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

static void test_round_trip(void **state)
{
	static const char *const variants[] = {
		"",
		"\"train_batch_size\": 8, \"gradient_clipping\": 0.1, \"steps_per_print\": 10",
		"\"optimizer\": {\"type\": \"adam\", \"params\": {\"lr\": 0.1, \"adam_w_mode\": false, \"bias_correction\": "
		"false}}",
		"\"scheduler\": {\"type\": \"WarmupLR\", \"params\": {\"warmup_min_lr\": 1e-5, \"warmup_num_steps\": 7}}",
		"\"scheduler\": {\"type\": \"WarmupCosineLR\", \"params\": {\"total_num_steps\": 90, \"warmup_min_ratio\": "
		"0.3, \"warmup_num_steps\": 9, \"cos_min_ratio\": 0.07}}",
	};
	struct job_config c;

	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(variants); i++) {
		c = parse_good(variants[i]);
		check_round_trip(&c);
		job_config_release(&c);
	}
	assert_int_equal(job_config_parse(users_file, "ds.json", "/base", &c, NULL), 0);
	check_round_trip(&c);
	job_config_release(&c);
}

static void test_override(void **state)
{
	struct job_config c = parse_good("\"train_batch_size\": 8");
	struct job_overrides o = {
		.shards = 3, .workers = 5, .threads = 2, .steps = 99, .run_dir = "/r", .fabric = "local"
	};
	uint64_t seed = 0;
	char cwd[1024], want[1100];
	struct err e = { 0 };

	(void)state;
	o.seed = &seed;
	assert_int_equal(job_config_override(&c, &o, &e), 0);
	assert_int_equal(c.shards, 3);
	assert_int_equal(c.workers, 5);
	assert_int_equal(c.threads_per_worker, 2);
	assert_int_equal(c.threads_per_shard, 2);
	assert_int_equal(c.steps, 99);
	assert_int_equal(c.seed, 0);
	assert_string_equal(c.run_dir, "/r");
	assert_string_equal(c.fabric, "local");
	/* Nothing given changes nothing; a relative directory is the caller's, not the config's. */
	o = (struct job_overrides){ .run_dir = "here" };
	assert_int_equal(job_config_override(&c, &o, &e), 0);
	assert_int_equal(c.shards, 3);
	assert_non_null(getcwd(cwd, sizeof(cwd)));
	snprintf(want, sizeof(want), "%s/here", cwd);
	assert_string_equal(c.run_dir, want);
	assert_int_equal(job_config_override(&c, &(struct job_overrides){ .fabric = "tcp" }, &e), -EINVAL);
	assert_string_equal(e.text, "--fabric: expected auto, local, local-copy, verbs or ofi, found \"tcp\"");
	assert_int_equal(job_config_override(&c, &(struct job_overrides){ .workers = 5000 }, &e), -EINVAL);
	assert_string_equal(e.text, "--workers: expected at most 4096, found 5000");
	job_config_release(&c);
}

static void check_invalid(const char *text, const char *message)
{
	struct job_config c;
	struct err e = { 0 };

	if (job_config_parse(text, "ds.json", "/base", &c, &e))
		fail_msg("%s", e.text);
	assert_int_equal(job_config_validate(&c, &e), -EINVAL);
	assert_string_equal(e.text, message);
	job_config_release(&c);
}

static void test_validate(void **state)
{
	struct job_config c = parse_good("\"train_batch_size\": 8");

	(void)state;
	assert_int_equal(job_config_validate(&c, NULL), 0);
	job_config_release(&c);
	check_invalid("{\"train_batch_size\": 8, \"shardmesh\": {" MODEL ", " DATA "}}",
		      "shardmesh.steps: missing; say how many steps to train (or --steps)");
	check_invalid("{\"shardmesh\": {" MODEL ", " DATA ", \"steps\": 1}}",
		      "Either train_batch_size or train_micro_batch_size_per_gpu needs to be provided");
	check_invalid("{\"train_batch_size\": 8, \"shardmesh\": {" MODEL
		      ", \"data\": {\"train\": \"a\", \"sequence_length\": 129}, \"steps\": 1}}",
		      "shardmesh.data.sequence_length: 129 is longer than the model's n_positions 128");
	check_invalid("{\"train_batch_size\": 8, \"shardmesh\": {\"model\": {\"vocab_size\": 255}, " DATA
		      ", \"steps\": 1}}",
		      "shardmesh.model: vocab_size 255 is too small for data of format \"bytes\", which needs 256");
	check_invalid(
		"{\"train_batch_size\": 8, \"shardmesh\": {" MODEL
		", \"data\": {\"train\": \"a\", \"validation\": \"b\", \"validation_fraction\": 0.1}, \"steps\": 1}}",
		"shardmesh.data: validation and validation_fraction are both given; give one");
	check_invalid("{\"train_batch_size\": 8, \"shardmesh\": {" MODEL ", " DATA
		      ", \"steps\": 1, \"eval_batches\": 4}}",
		      "shardmesh.eval_batches: there is nothing to evaluate on; give shardmesh.data.validation or "
		      "validation_fraction");
}

/* job_config_load: paths are the config's neighbours, a model directory is looked into, and lines are the file's. */
static void test_load(void **state)
{
	char dir[] = "/tmp/shardmesh_config_XXXXXX", path[128], want[128];
	static const char config[] = "{\"train_batch_size\": 8,\n\"shardmesh\": {\"model\": \"m\", " DATA
				     ", \"steps\": 1}}";
	static const char model[] = "{\"n_embd\": 32, \"n_head\": 2,\n \"n_layer\": 3}";
	struct job_config c;
	struct err e = { 0 };

	(void)state;
	assert_non_null(mkdtemp(dir));
	snprintf(path, sizeof(path), "%s/m", dir);
	assert_int_equal(mkdir(path, 0700), 0);
	snprintf(path, sizeof(path), "%s/m/config.json", dir);
	assert_int_equal(file_write_atomic(path, model, strlen(model), 0600, &e), 0);
	snprintf(path, sizeof(path), "%s/ds.json", dir);
	assert_int_equal(file_write_atomic(path, config, strlen(config), 0600, &e), 0);
	if (job_config_load(path, &c, &e))
		fail_msg("%s", e.text);
	assert_int_equal(c.model.n_layer, 3);
	snprintf(want, sizeof(want), "%s/a.txt", dir);
	assert_string_equal(c.data.train[0].path[0], want);
	job_config_release(&c);
	assert_int_equal(file_write_atomic(path, "{\n\"x\0\": 1}", 10, 0600, &e), 0);
	assert_int_equal(job_config_load(path, &c, &e), -EINVAL);
	assert_non_null(strstr(e.text, "holds a zero byte"));
	snprintf(path, sizeof(path), "%s/none.json", dir);
	assert_int_equal(job_config_load(path, &c, &e), -ENOENT);
	snprintf(path, sizeof(path), "rm -r %s", dir);
	assert_int_equal(system(path), 0);
}

/* data.train as sources with paths, formats and weights. */
static void test_sources(void **state)
{
	static const struct {
		const char *data, *message;
	} bad[] = {
		{ "\"train\": [{\"path\": \"a\", \"weight\": 1}, \"b\"]",
		  "data.train: give every source a weight, or none" },
		{ "\"train\": {\"paths\": \"a\"}", "data.train.paths: unknown key; did you mean \"path\"?" },
		{ "\"train\": {\"path\": \"a\", \"tokenizer\": 1}",
		  "data.train.tokenizer: unknown key; a source has path, format and weight" },
		{ "\"train\": {\"format\": \"jsonl\"}", "data.train: a source without path" },
		{ "\"train\": {\"path\": []}",
		  "data.train.path: expected a path or a list of paths, found an empty list" },
		{ "\"train\": {\"path\": \"a\", \"weight\": 0}",
		  "data.train.weight: expected a number from 1e-06 to 1e+06" },
		{ "\"train\": {\"path\": \"a\", \"format\": \"txt\"}",
		  "data.train.format: expected \"bytes\", \"llmc\"" },
		{ "\"train\": [{\"path\": \"a\"}, {\"path\": \"b\", \"format\": \"nanogpt\"}]",
		  "data.train: \"bytes\" and \"nanogpt\" do not mix" },
		{ "\"train\": \"a\", \"validation\": {\"path\": \"a\", \"weight\": 1}",
		  "data.validation.weight: held-out data are taken evenly; leave it out" },
	};
	struct job_config c, again;
	struct err e = { 0 };
	char *text;

	(void)state;
	if (job_config_parse("{\"shardmesh\": {" MODEL
			     ", \"data\": {\"train\": [{\"path\": [\"a\", \"b\"], \"weight\": 3},"
			     " {\"path\": \"c\", \"weight\": 0.5, \"format\": \"bytes\"}], \"format\": \"jsonl\","
			     " \"validation\": \"v\"}}}",
			     "ds.json", "/base", &c, &e))
		fail_msg("%s", e.text);
	assert_int_equal(c.data.n_train, 2);
	assert_int_equal(c.data.train[0].n_paths, 2);
	assert_string_equal(c.data.train[0].path[1], "/base/b");
	assert_int_equal(c.data.train[0].format, DATA_JSONL);
	assert_true(c.data.train[0].weight == 3 && c.data.train[1].weight == 0.5);
	assert_int_equal(c.data.train[1].format, DATA_BYTES);
	assert_int_equal(c.data.validation[0].format, DATA_JSONL);
	assert_string_equal(data_token_kind(&c.data), "bytes");
	assert_true(data_config_packed(&c.data));
	assert_int_equal(job_config_dump(&c, &text, &e), 0);
	assert_int_equal(job_config_parse(text, "dump", "/", &again, &e), 0);
	assert_configs_equal(&c, &again);
	job_config_release(&again);
	job_config_release(&c);
	free(text);
	for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
		assert_true(asprintf(&text, "{\"shardmesh\": {" MODEL ", \"data\": {%s}}}", bad[i].data) > 0);
		assert_int_equal(job_config_parse(text, "ds.json", "/base", &c, &e), -EINVAL);
		if (!strstr(e.text, bad[i].message))
			fail_msg("\"%s\" does not hold \"%s\"", e.text, bad[i].message);
		free(text);
	}
}

/* A tokenizer makes tokens of JSONL and text, which then stand beside token files, and not beside bytes. */
static void test_tokenizer(void **state)
{
	static const struct {
		const char *data, *message;
	} bad[] = {
		{ "\"train\": \"a\", \"format\": \"text\"",
		  "shardmesh.data.format: \"text\" needs shardmesh.data.tokenizer; with \"bytes\" every byte is a token" },
		{ "\"train\": \"a\", \"tokenizer\": \"t\"",
		  "shardmesh.data.tokenizer: no source is \"text\" or \"jsonl\"; the others are tokens as they are" },
		{ "\"train\": \"a\", \"end_token\": \"x\"",
		  "shardmesh.data.end_token: it is of a shardmesh.data.tokenizer; give one" },
		{ "\"train\": \"a\", \"format\": \"jsonl\", \"tokenizer\": \"t\", \"validation\": {\"path\": \"v\", "
		  "\"format\": \"bytes\"}",
		  "shardmesh.data: training data are tokens and validation data are bytes" },
	};
	struct job_config c;
	struct err e = { 0 };
	char text[1024];

	(void)state;
	if (job_config_parse(
		    "{\"train_batch_size\": 8, \"shardmesh\": {\"model\": {\"vocab_size\": 100, \"eos_token_id\": "
		    "[7, 8]}, \"steps\": 1, \"data\": {\"train\": [{\"path\": \"a\", \"format\": \"jsonl\"},"
		    " {\"path\": \"b\", \"format\": \"nanogpt\"}, {\"path\": \"c\", \"format\": \"text\"}],"
		    " \"end_token\": \"</s>\", \"tokenizer\": \"t/tokenizer.json\"}}}",
		    "ds.json", "/base", &c, &e) ||
	    job_config_validate(&c, &e))
		fail_msg("%s", e.text);
	assert_string_equal(c.data.tokenizer, "/base/t/tokenizer.json");
	assert_string_equal(c.data.end_token, "</s>");
	assert_int_equal(c.data.eos_token, 7);
	assert_string_equal(data_token_kind(&c.data), "tokenizer");
	check_round_trip(&c);
	job_config_release(&c);
	for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
		snprintf(text, sizeof(text),
			 "{\"train_batch_size\": 8, \"shardmesh\": {" MODEL ", \"steps\": 1, \"data\": {%s}}}",
			 bad[i].data);
		check_invalid(text, bad[i].message);
	}
	assert_int_equal(job_config_parse("{\"shardmesh\": {" MODEL ", \"data\": {\"train\": [{\"path\": \"a\"}, "
					  "{\"path\": \"b\", \"format\": \"jsonl\"}], \"tokenizer\": \"t\"}}}",
					  "ds.json", "/base", &c, &e),
			 -EINVAL);
	assert_non_null(strstr(e.text, "\"bytes\" and \"jsonl\" do not mix"));
}

static void write_text(const char *dir, const char *name, const char *text)
{
	char path[160];

	snprintf(path, sizeof(path), "%s/%s", dir, name);
	assert_int_equal(file_write_atomic(path, text, strlen(text), 0600, NULL), 0);
}

/* The weights that a config comes to (NULL: random), and the note that says so; through a dump they are the same. */
static void check_weights(const char *dir, const char *keys, const char *want, const char *note)
{
	struct job_config c, again;
	char *text = NULL, *dump;
	struct err e = { 0 };
	bool noted = false;

	assert_true(asprintf(&text, "{\"shardmesh\": {%s, " DATA "}}", keys) > 0);
	if (job_config_parse(text, "ds.json", dir, &c, &e))
		fail_msg("%s", e.text);
	for (uint32_t i = 0; i < c.n_notes; i++)
		noted |= strstr(c.note[i], note) != NULL;
	assert_true(noted || !note[0]);
	assert_int_equal(job_config_dump(&c, &dump, &e), 0);
	assert_int_equal(job_config_parse(dump, "dump", "/", &again, &e), 0);
	if (want) {
		assert_string_equal(c.weights, want);
		assert_string_equal(again.weights, want);
	} else {
		assert_null(c.weights);
		assert_null(again.weights);
	}
	job_config_release(&again);
	job_config_release(&c);
	free(dump);
	free(text);
}

static void test_initialize(void **state)
{
	char dir[] = "/tmp/shardmesh_config_XXXXXX", m[64], command[64];
	struct job_config c;
	struct err e = { 0 };

	(void)state;
	assert_non_null(mkdtemp(dir));
	snprintf(m, sizeof(m), "%s/m", dir);
	assert_int_equal(mkdir(m, 0700), 0);
	write_text(m, "config.json", "{\"n_embd\": 32, \"n_head\": 2}");
	check_weights(dir, "\"model\": \"m\"", NULL,
		      "no model.safetensors and no model.safetensors.index.json; the first parameters are random");
	check_weights(dir, "\"model\": \"m\", \"initialize\": \"weights\"", m, "");
	write_text(m, "pytorch_model.bin", "");
	assert_int_equal(job_config_parse("{\"shardmesh\": {\"model\": \"m\", " DATA "}}", "ds.json", dir, &c, &e),
			 -EINVAL);
	assert_non_null(strstr(e.text, "only safetensors are read"));
	check_weights(dir, "\"model\": \"m\", \"initialize\": \"random\"", NULL, "");
	write_text(m, "model.safetensors.index.json", "");
	check_weights(dir, "\"model\": \"m\"", m, "the first parameters are read from");
	check_weights(dir, "\"model\": \"m/config.json\"", NULL, "");
	check_weights(dir, "\"model\": \"m\", \"weights\": \"/w\"", "/w", "");
	check_weights(dir, MODEL ", \"weights\": \"/w\", \"initialize\": \"random\"", NULL,
		      "shardmesh.weights: no effect here");
	assert_int_equal(job_config_parse("{\"shardmesh\": {" MODEL ", \"initialize\": \"weights\", " DATA "}}",
					  "ds.json", dir, &c, &e),
			 -EINVAL);
	assert_string_equal(e.text,
			    "ds.json:1: shardmesh.initialize: \"weights\" needs shardmesh.weights, or a directory "
			    "as shardmesh.model");
	snprintf(command, sizeof(command), "rm -r %s", dir);
	assert_int_equal(system(command), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_defaults),
		cmocka_unit_test(test_users_file),
		cmocka_unit_test(test_messages),
		cmocka_unit_test(test_own_section),
		cmocka_unit_test(test_every_refused_key),
		cmocka_unit_test(test_table),
		cmocka_unit_test(test_documented),
		cmocka_unit_test(test_round_trip),
		cmocka_unit_test(test_override),
		cmocka_unit_test(test_validate),
		cmocka_unit_test(test_load),
		cmocka_unit_test(test_initialize),
		cmocka_unit_test(test_sources),
		cmocka_unit_test(test_tokenizer),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
