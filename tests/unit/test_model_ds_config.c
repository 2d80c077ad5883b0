/* SPDX-License-Identifier: Apache-2.0 */
#include "ds_config_checks.h"
#include "model/ds_keys.h"

#include <sys/stat.h>
#include <unistd.h>

/* What makes a config whole; tests put their own keys before it. */
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

/* Keys before OURS on line 1, and the whole message. */
static const struct {
	const char *keys, *message;
} bad_keys[] = {
	{ "\"train_batch_sise\": 8", "ds.json:1: train_batch_sise: unknown key; did you mean \"train_batch_size\"?" },
	{ "\n\n\"zero_optimization\": {\n\"stage\": 3,\n\"stage3_prefetch_bucket\": 1}",
	  "ds.json:5: zero_optimization.stage3_prefetch_bucket: unknown key; did you mean "
	  "\"stage3_prefetch_bucket_size\"?" },
	{ "\"stage3_max_live_parameters\": 1", "ds.json:1: stage3_max_live_parameters: unknown key; did you mean "
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
	{ "\"gradient_clipping\": [1]", "ds.json:1: gradient_clipping: expected a number of at least 0, found a list" },
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
	{ "\"optimizer\": {\"params\": {\"lr\": 1}}", "ds.json:1: optimizer: gives no type; say \"type\": \"AdamW\"" },
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

static void test_messages(void **state)
{
	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(bad_keys); i++) {
		struct job_config c;
		struct err e = { 0 };

		assert_int_equal(parse(bad_keys[i].keys, &c, &e), -EINVAL);
		assert_string_equal(e.text, bad_keys[i].message);
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
	const uint64_t shards = 3, workers = 5, threads = 2, steps = 99, seed = 0, many = 5000, none = 0;
	struct job_overrides o = { .shards = &shards,
				   .workers = &workers,
				   .threads = &threads,
				   .steps = &steps,
				   .seed = &seed,
				   .run_dir = "/r",
				   .fabric = "local" };
	char cwd[1024], want[1100];
	struct err e = { 0 };

	(void)state;
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
	assert_int_equal(job_config_override(&c, &(struct job_overrides){ .workers = &many }, &e), -EINVAL);
	assert_string_equal(e.text, "--workers: expected at most 4096, found 5000");
	assert_int_equal(job_config_override(&c, &(struct job_overrides){ .steps = &none }, &e), -EINVAL);
	assert_string_equal(e.text, "--steps: expected at least 1, found 0");
	assert_int_equal(job_config_override(&c, &(struct job_overrides){ .threads = &none }, &e), 0);
	assert_int_equal(c.threads_per_worker, 0);
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
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
