/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What happens to a config after it was read: the command line is laid over it,
 * it is checked as a whole, and it is written out resolved, for the members.
 */
#include "model/ds_keys.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* ---------------------------------------------------------------- overrides */

struct bounds {
	uint64_t min, max;
};

static int check_flag(const uint64_t *v, struct bounds b, const char *flag, struct err *e)
{
	bool low = v && *v < b.min;

	if (!v || (!low && *v <= b.max))
		return 0;
	return err_set(e, -EINVAL, "--%s: expected at %s %llu, found %llu", flag, low ? "least" : "most",
		       (unsigned long long)(low ? b.min : b.max), (unsigned long long)*v);
}

static int override_u32(uint32_t *field, const uint64_t *v, struct bounds b, const char *flag, struct err *e)
{
	int rc = check_flag(v, b, flag, e);

	if (!rc && v)
		*field = (uint32_t)*v;
	return rc;
}

static int override_u64(uint64_t *field, const uint64_t *v, struct bounds b, const char *flag, struct err *e)
{
	int rc = check_flag(v, b, flag, e);

	if (!rc && v)
		*field = *v;
	return rc;
}

static int override_string(char **field, char *copy, struct err *e)
{
	if (!copy)
		return err_set(e, -ENOMEM, "config: out of memory");
	free(*field);
	*field = copy;
	return 0;
}

static int override_fabric(struct job_config *c, const char *fabric, struct err *e)
{
	if (ds_fabric_known(fabric))
		return override_string(&c->fabric, strdup(fabric), e);
	return err_set(e, -EINVAL, "--fabric: expected auto, local, local-copy, verbs or ofi, found \"%s\"", fabric);
}

int job_config_override(struct job_config *c, const struct job_overrides *o, struct err *e)
{
	const struct bounds shards = { 1, 1024 }, workers = { 1, 4096 }, threads = { 0, 1024 };
	const struct bounds steps = { 1, INT64_MAX }, seed = { 0, INT64_MAX };
	int rc = override_u32(&c->shards, o->shards, shards, "shards", e);

	if (!rc)
		rc = override_u32(&c->workers, o->workers, workers, "workers", e);
	if (!rc)
		rc = override_u32(&c->threads_per_worker, o->threads, threads, "threads", e);
	if (!rc)
		rc = override_u32(&c->threads_per_shard, o->threads, threads, "threads", e);
	if (!rc)
		rc = override_u64(&c->steps, o->steps, steps, "steps", e);
	if (!rc)
		rc = override_u64(&c->seed, o->seed, seed, "seed", e);
	if (!rc && o->run_dir)
		rc = override_string(&c->run_dir, ds_absolute(NULL, o->run_dir), e);
	if (!rc && o->fabric)
		rc = override_fabric(c, o->fabric, e);
	return rc;
}

/* --------------------------------------------------------------- validation */

static const char *const format_names[] = { "bytes", "llmc", "nanogpt", "jsonl", "text" };

static bool is_bytes(const struct data_config *d, const struct data_source *s)
{
	return s->format == DATA_BYTES || (s->format == DATA_JSONL && !d->tokenizer);
}

/* Bytes are tokens 0 to 255; files of tokens are looked into when they are opened. */
static int check_vocabulary(const struct job_config *c, const struct data_source *s, uint32_t n, struct err *e)
{
	for (uint32_t i = 0; i < n; i++)
		if (is_bytes(&c->data, &s[i]) && c->model.vocab_size < 256)
			return err_set(e, -EINVAL,
				       "shardmesh.model: vocab_size %u is too small for data of format \"%s\", which "
				       "needs 256",
				       c->model.vocab_size, format_names[s[i].format]);
	return 0;
}

/* A tokenizer and data that it is for belong together. */
static int check_tokenizer(const struct data_config *d, struct err *e)
{
	bool text = false, used = false;

	for (uint32_t i = 0; i < d->n_train + d->n_validation; i++) {
		const struct data_source *s = i < d->n_train ? &d->train[i] : &d->validation[i - d->n_train];

		text |= s->format == DATA_TEXT;
		used |= s->format == DATA_TEXT || s->format == DATA_JSONL;
	}
	if (text && !d->tokenizer)
		return err_set(e, -EINVAL,
			       "shardmesh.data.format: \"text\" needs shardmesh.data.tokenizer; with \"bytes\" every "
			       "byte is a token");
	if (d->tokenizer && !used)
		return err_set(e, -EINVAL,
			       "shardmesh.data.tokenizer: no source is \"text\" or \"jsonl\"; the others are tokens "
			       "as they are");
	if (d->end_token && !d->tokenizer)
		return err_set(e, -EINVAL, "shardmesh.data.end_token: it is of a shardmesh.data.tokenizer; give one");
	return 0;
}

static int validate_data(const struct job_config *c, struct err *e)
{
	const struct data_config *d = &c->data;
	int rc;

	if (d->sequence_length > c->model.n_positions)
		return err_set(e, -EINVAL,
			       "shardmesh.data.sequence_length: %u is longer than the model's n_positions %u",
			       d->sequence_length, c->model.n_positions);
	rc = check_tokenizer(d, e);
	if (!rc)
		rc = check_vocabulary(c, d->train, d->n_train, e);
	if (!rc)
		rc = check_vocabulary(c, d->validation, d->n_validation, e);
	if (rc)
		return rc;
	if (d->n_validation && !is_bytes(d, &d->train[0]) && is_bytes(d, &d->validation[0]))
		return err_set(e, -EINVAL, "shardmesh.data: training data are tokens and validation data are bytes");
	if (d->n_validation && d->validation_fraction > 0)
		return err_set(e, -EINVAL,
			       "shardmesh.data: validation and validation_fraction are both given; give one");
	if (c->eval_batches && !d->n_validation && d->validation_fraction == 0)
		return err_set(
			e, -EINVAL,
			"shardmesh.eval_batches: there is nothing to evaluate on; give shardmesh.data.validation "
			"or validation_fraction");
	return 0;
}

int job_config_validate(const struct job_config *c, struct err *e)
{
	struct batch_plan b;
	int rc;

	if (!c->steps)
		return err_set(e, -EINVAL, "shardmesh.steps: missing; say how many steps to train (or --steps)");
	rc = validate_data(c, e);
	if (rc)
		return rc;
	rc = batch_resolve(c, c->workers, &b, e);
	if (rc)
		return rc;
	if ((uint64_t)b.micro_batch * c->data.sequence_length > INT32_MAX)
		return err_set(e, -EINVAL, "train_micro_batch_size_per_gpu: %u samples of %u tokens are too many",
			       b.micro_batch, c->data.sequence_length);
	return 0;
}

/* --------------------------------------------------------------------- dump */

/* Sets dotted path to v (stolen), making the sections on the way. Nonzero: out of memory. */
static int put(json_t *root, const char *path, json_t *v)
{
	const char *dot;
	char name[64];

	while ((dot = strchr(path, '.'))) {
		json_t *next;

		snprintf(name, sizeof(name), "%.*s", (int)(dot - path), path);
		next = json_object_get(root, name);
		if (!next && json_object_set_new(root, name, next = json_object())) {
			json_decref(v);
			return -1;
		}
		root = next;
		path = dot + 1;
	}
	return json_object_set_new(root, path, v);
}

/* Every key that is stored as it is, straight from the table. */
static int put_plain(json_t *root, const struct job_config *c)
{
	int bad = 0;

	for (size_t i = 0; i < ds_n_keys; i++) {
		const struct ds_key *k = &ds_keys[i];
		const char *field = (const char *)c + k->offset;
		uint64_t n;

		if (k->use != DS_USED || !k->size)
			continue;
		if (k->type == DS_BOOL) {
			bad |= put(root, k->path, json_boolean(*(const bool *)field));
		} else if (k->type == DS_REAL) {
			bad |= put(root, k->path, json_real(*(const double *)field));
		} else {
			n = k->size == sizeof(uint64_t) ? *(const uint64_t *)field : *(const uint32_t *)field;
			/* 0 is how "not given" is stored where the key itself may not be 0. */
			if (n >= (uint64_t)k->min)
				bad |= put(root, k->path, json_integer((json_int_t)n));
		}
	}
	return bad;
}

static int put_optimizer(json_t *root, const struct optimizer_config *o)
{
	int bad = put(root, "optimizer.type", json_string(o->type == OPTIMIZER_ADAM ? "Adam" : "AdamW"));

	bad |= put(root, "optimizer.params.betas", json_pack("[ff]", o->beta1, o->beta2));
	bad |= put(root, "optimizer.params.adam_w_mode", json_boolean(o->decoupled));
	return bad;
}

static int put_scheduler(json_t *root, const struct scheduler_config *s)
{
	static const char *const names[] = { "", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR" };
	int bad;

	if (s->type == SCHEDULER_NONE)
		return 0;
	bad = put(root, "scheduler.type", json_string(names[s->type]));
	bad |= put(root, "scheduler.params.warmup_type", json_string(s->log_warmup ? "log" : "linear"));
	bad |= put(root, "scheduler.params.warmup_num_steps", json_integer((json_int_t)s->warmup_num_steps));
	if (s->type != SCHEDULER_WARMUP)
		bad |= put(root, "scheduler.params.total_num_steps",
			   s->total_num_steps ? json_integer((json_int_t)s->total_num_steps) : json_string("auto"));
	if (s->type == SCHEDULER_WARMUP_COSINE) {
		bad |= put(root, "scheduler.params.warmup_min_ratio", json_real(s->warmup_min_ratio));
		bad |= put(root, "scheduler.params.cos_min_ratio", json_real(s->cos_min_ratio));
	} else {
		bad |= put(root, "scheduler.params.warmup_min_lr", json_real(s->warmup_min_lr));
		bad |= put(root, "scheduler.params.warmup_max_lr", json_real(s->warmup_max_lr));
	}
	return bad;
}

static json_t *path_list(char *const *path, uint32_t n)
{
	json_t *list = json_array();

	for (uint32_t i = 0; list && i < n; i++) {
		if (json_array_append_new(list, json_string(path[i]))) {
			json_decref(list);
			return NULL;
		}
	}
	return list;
}

static json_t *source_object(const struct data_source *s)
{
	json_t *o = json_object();
	int bad = json_object_set_new(o, "path", path_list(s->path, s->n_paths));

	bad |= json_object_set_new(o, "format", json_string(format_names[s->format]));
	if (s->weight > 0)
		bad |= json_object_set_new(o, "weight", json_real(s->weight));
	if (bad) {
		json_decref(o);
		return NULL;
	}
	return o;
}

/* Sources with all they have said; a json_array_append_new of NULL fails. */
static json_t *source_list(const struct data_source *s, uint32_t n)
{
	json_t *list = json_array();

	for (uint32_t i = 0; list && i < n; i++) {
		if (json_array_append_new(list, source_object(&s[i]))) {
			json_decref(list);
			return NULL;
		}
	}
	return list;
}

static int put_shardmesh(json_t *root, const struct job_config *c)
{
	static const char *const activations[] = { "auto", "keep", "recompute" };
	int bad = put(root, "shardmesh.model", json_loads(c->model.json, 0, NULL));

	bad |= put(root, "shardmesh.initialize", json_string(c->weights ? "weights" : "random"));
	if (c->weights)
		bad |= put(root, "shardmesh.weights", json_string(c->weights));
	bad |= put(root, "shardmesh.data.train", source_list(c->data.train, c->data.n_train));
	if (c->data.n_validation)
		bad |= put(root, "shardmesh.data.validation", source_list(c->data.validation, c->data.n_validation));
	bad |= put(root, "shardmesh.data.format", json_string(format_names[c->data.format]));
	if (c->data.tokenizer)
		bad |= put(root, "shardmesh.data.tokenizer", json_string(c->data.tokenizer));
	if (c->data.end_token)
		bad |= put(root, "shardmesh.data.end_token", json_string(c->data.end_token));
	bad |= put(root, "shardmesh.data.sequence_length", json_integer(c->data.sequence_length));
	bad |= put(root, "shardmesh.eval_batches", json_integer(c->eval_batches));
	bad |= put(root, "shardmesh.fabric", json_string(c->fabric));
	bad |= put(root, "shardmesh.rdma", ds_rdma_json(c));
	bad |= put(root, "shardmesh.math", json_string(c->math));
	bad |= put(root, "shardmesh.run_dir", json_string(c->run_dir));
	bad |= put(root, "shardmesh.activations", json_string(activations[c->activations]));
	return bad;
}

int job_config_dump(const struct job_config *c, char **json, struct err *e)
{
	json_t *root = json_object();
	char *text = NULL;
	int bad = !root;

	if (!bad) {
		bad |= put(root, "zero_optimization.stage", json_integer(3));
		bad |= put_plain(root, c);
		bad |= put_optimizer(root, &c->optimizer);
		bad |= put_scheduler(root, &c->scheduler);
		bad |= put(root, "steps_per_print", json_integer((json_int_t)c->steps_per_print));
		bad |= put_shardmesh(root, c);
	}
	if (!bad)
		text = json_dumps(root, JSON_INDENT(2) | JSON_REAL_PRECISION(17));
	json_decref(root);
	if (!text)
		return err_set(e, -ENOMEM, "config: out of memory");
	*json = text;
	return 0;
}
