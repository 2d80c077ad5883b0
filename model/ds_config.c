/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Reads a DeepSpeed config: walks the JSON once, looks every key up in the
 * table (ds_keys.c), and resolves at the end what depends on other keys. The
 * stage and the two types are read before the walk, since what the other keys
 * mean depends on them and their messages are the ones a user needs first.
 */
#include "model/ds_keys.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static int add_note(struct ds_parse *p, const char *fmt, ...) PRINTF_LIKE(2, 3);

static int add_note(struct ds_parse *p, const char *fmt, ...)
{
	struct job_config *c = p->c;
	char **notes = realloc(c->note, (c->n_notes + 1) * sizeof(*notes));
	char *text = NULL;
	va_list ap;

	if (notes)
		c->note = notes;
	va_start(ap, fmt);
	if (!notes || vasprintf(&text, fmt, ap) < 0)
		text = NULL;
	va_end(ap);
	if (!text)
		return err_set(p->e, -ENOMEM, "%s: out of memory", p->doc.name);
	c->note[c->n_notes++] = text;
	return 0;
}

/* ------------------------------------------------------------- unknown keys */

/* The part of a key's path below `section`, if it is a direct child of it; else NULL. */
static const char *child_name(const char *path, const char *section)
{
	size_t n = strlen(section);

	if (n && (strncmp(path, section, n) || path[n] != '.'))
		return NULL;
	path += n ? n + 1 : 0;
	return strchr(path, '.') ? NULL : path;
}

static const char *last_name(const char *path)
{
	const char *dot = strrchr(path, '.');

	return dot ? dot + 1 : path;
}

/* The nearest key of the same section, else the nearest of all, by its full path; else where to look. */
static int fail_unknown(struct ds_parse *p, const struct json_path *path, const char *section)
{
	const char *names[DS_KEYS_MAX + 1], *near;
	size_t n = 0;

	for (size_t i = 0; i < ds_n_keys; i++)
		if (child_name(ds_keys[i].path, section))
			names[n++] = child_name(ds_keys[i].path, section);
	names[n] = NULL;
	near = nearest_name(path->key, names);
	for (n = 0; !near && n < ds_n_keys; n++)
		names[n] = last_name(ds_keys[n].path);
	names[n] = NULL;
	if (near)
		return json_fail(&p->doc, path, p->e, "unknown key; did you mean \"%s\"?", near);
	near = nearest_name(path->key, names);
	for (size_t i = 0; near && i < ds_n_keys; i++)
		if (names[i] == near)
			return json_fail(&p->doc, path, p->e, "unknown key; did you mean \"%s\"?", ds_keys[i].path);
	return json_fail(&p->doc, path, p->e, "unknown key; docs/config.md lists those there are");
}

/* ------------------------------------------------------------- values by type */

static uint64_t max_of(const struct ds_key *k)
{
	return k->max > 0 ? (uint64_t)k->max : INT64_MAX;
}

/* Stores v in the key's field, or only checks it when the key has none. */
static int read_typed(struct ds_parse *p, const struct ds_key *k, const struct json_path *path, const json_t *v)
{
	void *field = (char *)p->c + k->offset;
	char words[64];
	uint64_t n;
	double x;
	bool b;
	int rc = 0;

	switch (k->type) {
	case DS_BOOL:
		return json_read_bool(&p->doc, path, v, k->size ? field : &b, p->e);
	case DS_UINT:
		rc = json_read_u64(&p->doc, path, v, (uint64_t)k->min, max_of(k), &n, p->e);
		if (!rc && k->size == sizeof(uint64_t))
			*(uint64_t *)field = n;
		else if (!rc && k->size)
			*(uint32_t *)field = (uint32_t)n;
		return rc;
	case DS_REAL:
		return json_read_f64(&p->doc, path, v, k->min, k->max > 0 ? k->max : 1e300, k->size ? field : &x, p->e);
	case DS_STRING:
		if (!json_is_string(v))
			rc = json_fail(&p->doc, path, p->e, "expected a string, found %s", json_words(v, words));
		return rc;
	case DS_LIST:
		if (!json_is_array(v))
			rc = json_fail(&p->doc, path, p->e, "expected a list, found %s", json_words(v, words));
		return rc;
	case DS_SECTION:
	case DS_ANY:
		break;
	}
	return rc;
}

static bool values_equal(const json_t *a, const json_t *b)
{
	if (json_is_number(a) && json_is_number(b))
		return json_number_value(a) == json_number_value(b);
	return json_equal(a, b);
}

/* True when v is one of the values of k->off, or a section that says it is not enabled. */
static bool asks_for_nothing(const struct ds_key *k, const json_t *v)
{
	char values[64], *save = NULL;

	if (json_is_auto(v) || (k->type == DS_ANY && json_is_false(json_object_get(v, "enabled"))))
		return true;
	snprintf(values, sizeof(values), "%s", k->off);
	for (char *s = strtok_r(values, " ", &save); s; s = strtok_r(NULL, " ", &save)) {
		json_t *off = json_loads(s, JSON_DECODE_ANY, NULL);
		bool same = values_equal(off, v);

		json_decref(off);
		if (same)
			return true;
	}
	return false;
}

static int read_not_built(struct ds_parse *p, const struct ds_key *k, const struct json_path *path, const json_t *v)
{
	char words[64];

	if (asks_for_nothing(k, v))
		return 0;
	if (!k->off[0] || !strcmp(k->off, "{}"))
		return json_fail(&p->doc, path, p->e, "not built yet: %s; leave the key out", k->text);
	return json_fail(&p->doc, path, p->e, "not built yet: %s; accepted here: %s; found %s", k->text, k->off,
			 json_words(v, words));
}

/* A value that goes into the config, by the key's reader or by its type. */
static int read_used(struct ds_parse *p, const struct ds_key *k, const struct json_path *path, const json_t *v)
{
	if (k->read)
		return k->read(p, path, v);
	if (!json_is_auto(v))
		return read_typed(p, k, path, v);
	if (k->automatic == DS_AUTO_DEFAULT)
		return 0;
	return json_fail(&p->doc, path, p->e,
			 "\"auto\" is filled in by Hugging Face's Trainer, which is not here; give a value");
}

static int read_value(struct ds_parse *p, const struct ds_key *k, const struct json_path *path, const json_t *v)
{
	char where[JSON_PATH_MAX];
	int rc;

	if (k->use == DS_NOT_BUILT)
		return read_not_built(p, k, path, v);
	rc = read_used(p, k, path, v);
	if (!rc && k->text)
		rc = add_note(p, "%s: no effect here: %s", json_path_text(path, where), k->text);
	return rc;
}

/* ----------------------------------------------------------------- the walk */

/* The value at a dotted path, or NULL; null counts as not there. */
static const json_t *value_at(const struct ds_parse *p, const char *dotted)
{
	const json_t *v = p->doc.root;
	char name[64];

	while (v && *dotted) {
		size_t n = strcspn(dotted, ".");

		snprintf(name, sizeof(name), "%.*s", (int)n, dotted);
		v = json_object_get(v, name);
		dotted += n + (dotted[n] == '.');
	}
	return v && !json_is_null(v) ? v : NULL;
}

static int walk(struct ds_parse *p, const json_t *o, const struct json_path *at, const char *section);

static int walk_section(struct ds_parse *p, const json_t *v, const struct json_path *path, const char *section)
{
	char words[64];

	if (json_is_object(v))
		return walk(p, v, path, section);
	if (!strcmp(section, "zero_optimization") && json_is_boolean(v))
		return json_fail(&p->doc, path, p->e,
				 "true and false are the old way to say stage 1 and 0; say { \"stage\": 3 }");
	return json_fail(&p->doc, path, p->e, "expected an object, found %s", json_words(v, words));
}

/* One key of an object whose path, aliases replaced, is `section`. */
static int walk_key(struct ds_parse *p, const struct json_path *path, const char *section, const json_t *v)
{
	char full[JSON_PATH_MAX];
	const struct ds_key *k;

	snprintf(full, sizeof(full), "%s%s%s", section, section[0] ? "." : "", path->key);
	k = ds_key_find(full);
	if (!k)
		return fail_unknown(p, path, section);
	if (json_is_null(v))
		return 0; /* Python's None: not given */
	if (k->use == DS_ALIAS) {
		if (value_at(p, k->text))
			return json_fail(&p->doc, path, p->e, "means the same as %s, which is given too", k->text);
		k = ds_key_find(k->text);
	}
	return k->type == DS_SECTION ? walk_section(p, v, path, k->path) : read_value(p, k, path, v);
}

static int walk(struct ds_parse *p, const json_t *o, const struct json_path *at, const char *section)
{
	const char *key;
	json_t *v;
	int rc;

	json_object_foreach((json_t *)o, key, v)
	{
		struct json_path path = { at, key };

		rc = walk_key(p, &path, section, v);
		if (rc)
			return rc;
	}
	return 0;
}

/* Reads section.key before the walk. */
static int read_first(struct ds_parse *p, const char *section, const char *key, ds_read_fn read)
{
	struct json_path up = { NULL, section }, path = { &up, key };
	const json_t *v = json_object_get(json_object_get(p->doc.root, section), key);

	return v && !json_is_null(v) ? read(p, &path, v) : 0;
}

static int read_leading(struct ds_parse *p)
{
	int rc = read_first(p, "zero_optimization", "stage", ds_read_stage);

	if (!rc)
		rc = read_first(p, "optimizer", "type", ds_read_optimizer_type);
	if (!rc)
		rc = read_first(p, "scheduler", "type", ds_read_scheduler_type);
	return rc;
}

/* ------------------------------------------------------- what depends on others */

static int fail_at(struct ds_parse *p, const char *section, const char *key, const char *text)
{
	struct json_path up = { NULL, section }, path = { section ? &up : NULL, key };

	return json_fail(&p->doc, &path, p->e, "%s", text);
}

static int check_present(struct ds_parse *p)
{
	const json_t *optimizer = value_at(p, "optimizer"), *scheduler = value_at(p, "scheduler");

	if (value_at(p, "zero_optimization") && !value_at(p, "zero_optimization.stage"))
		return fail_at(
			p, NULL, "zero_optimization",
			"gives no stage, which DeepSpeed takes as 0; Shardmesh is ZeRO stage 3: say \"stage\": 3");
	if (optimizer && !value_at(p, "optimizer.type"))
		return fail_at(p, NULL, "optimizer", "gives no type; say \"type\": \"AdamW\"");
	if (scheduler && !value_at(p, "scheduler.type"))
		return fail_at(p, NULL, "scheduler", "gives no type; say for example \"type\": \"WarmupLR\"");
	if (p->c->scheduler.type > SCHEDULER_WARMUP && !value_at(p, "scheduler.params.total_num_steps"))
		return fail_at(p, "scheduler", "params",
			       "total_num_steps is missing; give a number, or \"auto\" for the job's steps");
	if (!value_at(p, "shardmesh.model"))
		return fail_at(p, "shardmesh", "model",
			       "missing; give the path of a config.json, its directory, or its keys as an object");
	if (!value_at(p, "shardmesh.data.train"))
		return fail_at(p, "shardmesh", "data", "train is missing; give a path or a list of paths");
	return 0;
}

/* Hugging Face's formulas for "auto" (transformers, integrations/deepspeed.py). */
static void fill_width_defaults(struct ds_parse *p)
{
	uint64_t h = p->c->model.n_embd;

	if (p->auto_reduce_bucket)
		p->c->zero.reduce_bucket_size = h * h;
	if (p->auto_prefetch)
		p->c->zero.stage3_prefetch_bucket_size = (uint64_t)(0.9 * (double)(h * h));
	if (p->auto_persistence)
		p->c->zero.stage3_param_persistence_threshold = 10 * h;
}

/* "auto": what the directory holds. What is chosen is said, since two starts from one config must not differ silently. */
static int choose_automatically(struct ds_parse *p)
{
	struct err why = { 0 };
	char *file = NULL;
	int rc;

	if (!p->model_dir)
		return 0;
	rc = model_weights_find(p->model_dir, &file, &why);
	free(file);
	if (rc == -ENOENT)
		return add_note(p, "shardmesh.initialize: %s; the first parameters are random", why.text);
	if (rc)
		return fail_at(p, "shardmesh", "model", why.text);
	p->c->weights = strdup(p->model_dir);
	if (!p->c->weights)
		return err_set(p->e, -ENOMEM, "%s: out of memory", p->doc.name);
	return add_note(p, "shardmesh.initialize: the first parameters are read from %s", p->c->weights);
}

static int resolve_weights(struct ds_parse *p)
{
	struct job_config *c = p->c;

	if (p->initialize == INITIALIZE_RANDOM) {
		bool given = c->weights;

		free(c->weights);
		c->weights = NULL;
		return given ? add_note(p, "shardmesh.weights: no effect here: shardmesh.initialize is \"random\"") : 0;
	}
	if (c->weights)
		return 0;
	if (p->initialize == INITIALIZE_AUTO)
		return choose_automatically(p);
	if (!p->model_dir)
		return fail_at(p, "shardmesh", "initialize",
			       "\"weights\" needs shardmesh.weights, or a directory as shardmesh.model");
	c->weights = strdup(p->model_dir);
	return c->weights ? 0 : err_set(p->e, -ENOMEM, "%s: out of memory", p->doc.name);
}

/* The model's end of text: a number, or the first of a list. */
static uint32_t eos_token(const struct model_config *m)
{
	json_t *o = json_loads(m->json, 0, NULL);
	const json_t *v = json_object_get(o, "eos_token_id");
	uint32_t id = TOKENIZER_NONE;

	if (json_array_size(v))
		v = json_array_get(v, 0);
	if (json_is_integer(v) && json_integer_value(v) >= 0 && json_integer_value(v) < TOKENIZER_NONE)
		id = (uint32_t)json_integer_value(v);
	json_decref(o);
	return id;
}

static int resolve(struct ds_parse *p)
{
	struct job_config *c = p->c;
	char number[32];
	int rc = check_present(p);

	if (rc)
		return rc;
	rc = resolve_weights(p);
	if (rc)
		return rc;
	fill_width_defaults(p);
	c->data.eos_token = eos_token(&c->model);
	if (p->max_lr == MAX_LR_AUTO || (p->max_lr == MAX_LR_DEFAULT && c->scheduler.type == SCHEDULER_WARMUP))
		c->scheduler.warmup_max_lr = c->optimizer.lr;
	if (!c->data.sequence_length)
		c->data.sequence_length = c->model.n_positions;
	if (!p->has_eval_batches && !c->data.n_validation && c->data.validation_fraction == 0)
		c->eval_batches = 0;
	if (!value_at(p, "optimizer.params.lr"))
		return add_note(p, "optimizer: %s with lr %s: the default, since none is given",
				c->optimizer.type == OPTIMIZER_ADAM ? "Adam" : "AdamW",
				double_text(c->optimizer.lr, number));
	return 0;
}

/* DeepSpeed's defaults, of the generation after June 2026; ours for "shardmesh". */
static int set_defaults(struct job_config *c, const char *base_dir, struct err *e)
{
	*c = (struct job_config){
		.gradient_clipping = 1.0,
		.optimizer = { .type = OPTIMIZER_ADAMW,
			       .lr = 1e-3,
			       .beta1 = 0.9,
			       .beta2 = 0.999,
			       .eps = 1e-8,
			       .bias_correction = true,
			       .decoupled = true },
		.scheduler = { .warmup_max_lr = 0.001,
			       .cos_min_ratio = 1e-4,
			       .warmup_num_steps = 1000,
			       .log_warmup = true },
		.zero = { .stage = 3,
			  .stage3_prefetch_bucket_size = 50000000,
			  .stage3_max_live_parameters = 1000000000,
			  .stage3_max_reuse_distance = 1000000000,
			  .stage3_param_persistence_threshold = 100000,
			  .stage3_model_persistence_threshold = INT64_MAX,
			  .sub_group_size = 1000000000,
			  .reduce_bucket_size = 500000000,
			  .overlap_comm = true,
			  .contiguous_gradients = true },
		.seed = 42,
		.eval_batches = 8,
		.shards = 1,
		.workers = 1,
		.host_sharing = true,
		.host_wait_ms = 20,
		.max_owners_per_unit = 16,
		.max_held_nodes = 8,
	};
	c->fabric = strdup("auto");
	c->math = strdup("");
	c->run_dir = ds_absolute(base_dir, "run");
	return c->fabric && c->math && c->run_dir ? 0 : err_set(e, -ENOMEM, "config: out of memory");
}

int job_config_parse(const char *text, const char *name, const char *base_dir, struct job_config *out, struct err *e)
{
	struct job_config c;
	struct ds_parse p = { .base_dir = base_dir, .c = &c, .e = e };
	int rc = json_doc_parse(&p.doc, text, name, e);

	if (rc)
		return rc;
	rc = set_defaults(&c, base_dir, e);
	if (!rc)
		rc = read_leading(&p);
	if (!rc)
		rc = walk(&p, p.doc.root, NULL, "");
	if (!rc)
		rc = resolve(&p);
	json_doc_release(&p.doc);
	free(p.model_dir);
	if (rc)
		job_config_release(&c);
	else
		*out = c;
	return rc;
}

int job_config_load(const char *path, struct job_config *out, struct err *e)
{
	const char *slash = strrchr(path, '/');
	char *text = NULL, *dir = NULL;
	int rc = ds_read_text(path, &text, e);

	if (rc)
		return rc;
	dir = slash ? strndup(path, slash == path ? 1 : (size_t)(slash - path)) : strdup(".");
	rc = dir ? job_config_parse(text, path, dir, out, e) : err_set(e, -ENOMEM, "%s: out of memory", path);
	free(dir);
	free(text);
	return rc;
}

static void release_paths(char **path, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		free(path[i]);
	free(path);
}

static void release_sources(struct data_source *s, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		release_paths(s[i].path, s[i].n_paths);
	free(s);
}

void job_config_release(struct job_config *c)
{
	model_config_release(&c->model);
	release_sources(c->data.train, c->data.n_train);
	release_sources(c->data.validation, c->data.n_validation);
	release_paths(c->note, c->n_notes);
	free(c->data.tokenizer);
	free(c->data.end_token);
	free(c->weights);
	free(c->fabric);
	ds_rdma_release(c);
	free(c->math);
	free(c->run_dir);
	*c = (struct job_config){ 0 };
}
