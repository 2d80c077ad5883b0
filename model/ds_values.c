/* SPDX-License-Identifier: Apache-2.0 */
/* Readers of the config values that are more than a number or a switch. */
#include "model/ds_keys.h"
#include "model/hf_config.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <unistd.h>

#define CONFIG_BYTES_MAX (16u << 20)

char *ds_absolute(const char *base_dir, const char *path)
{
	char *cwd = NULL, *out = NULL;
	int n = -1;

	if (path[0] == '/')
		return strdup(path);
	if (!base_dir || base_dir[0] != '/') {
		cwd = getcwd(NULL, 0);
		if (!cwd)
			return NULL;
	}
	while (!strncmp(path, "./", 2))
		path += 2;
	if (!base_dir || !strcmp(base_dir, "."))
		n = asprintf(&out, "%s/%s", cwd, path);
	else if (cwd)
		n = asprintf(&out, "%s/%s/%s", cwd, base_dir, path);
	else
		n = asprintf(&out, "%s/%s", base_dir, path);
	free(cwd);
	return n < 0 ? NULL : out;
}

int ds_read_text(const char *path, char **out, struct err *e)
{
	char *text = NULL;
	size_t bytes = 0;
	int rc = file_read(path, CONFIG_BYTES_MAX, &text, &bytes, e);

	if (rc)
		return rc;
	if (strlen(text) != bytes) {
		free(text);
		return err_set(e, -EINVAL, "%s: holds a zero byte, so it is no JSON text", path);
	}
	*out = text;
	return 0;
}

static int out_of_memory(struct ds_parse *p)
{
	return err_set(p->e, -ENOMEM, "%s: out of memory", p->doc.name);
}

/* -EINVAL with the list of what is expected; words: NULL-ended. Else its index. */
static int read_word(struct ds_parse *p, const struct json_path *path, const json_t *v, const char *const *words)
{
	char list[128] = "", found[64];
	size_t n = 0;
	int i;

	for (i = 0; words[i]; i++) {
		if (json_is_string(v) && !strcmp(json_string_value(v), words[i]))
			return i;
		n += (size_t)snprintf(list + n, sizeof(list) - n, "%s\"%s\"",
				      !i             ? ""
				      : words[i + 1] ? ", "
						     : " or ",
				      words[i]);
	}
	return json_fail(&p->doc, path, p->e, "expected %s, found %s", list, json_words(v, found));
}

int ds_read_steps_per_print(struct ds_parse *p, const struct json_path *path, const json_t *v)
{
	const char *s = json_string_value(v);

	/* accelerate writes inf for never, which Python's json writes as a bare Infinity. */
	if (json_is_auto(v) || (s && (!strcmp(s, "inf") || !strcmp(s, "Infinity")))) {
		p->c->steps_per_print = 0;
		return 0;
	}
	return json_read_u64(&p->doc, path, v, 0, INT64_MAX, &p->c->steps_per_print, p->e);
}

int ds_read_stage(struct ds_parse *p, const struct json_path *path, const json_t *v)
{
	char words[64];

	if (!json_is_integer(v) || json_integer_value(v) != 3)
		return json_fail(&p->doc, path, p->e, "Shardmesh is ZeRO stage 3; set 3 (found %s)",
				 json_words(v, words));
	p->c->zero.stage = 3;
	return 0;
}

/* ------------------------------------------------------------ optimizer, schedule */

int ds_read_optimizer_type(struct ds_parse *p, const struct json_path *path, const json_t *v)
{
	char words[64];

	if (json_is_string(v) && !strcasecmp(json_string_value(v), "adamw")) {
		p->c->optimizer.type = OPTIMIZER_ADAMW;
		return 0;
	}
	if (json_is_string(v) && !strcasecmp(json_string_value(v), "adam")) {
		p->c->optimizer.type = OPTIMIZER_ADAM;
		return 0;
	}
	return json_fail(&p->doc, path, p->e, "only Adam and AdamW are built, found %s", json_words(v, words));
}

/* DeepSpeed's Adam means AdamW unless adam_w_mode is false; for AdamW itself the switch does nothing. */
int ds_read_adam_w_mode(struct ds_parse *p, const struct json_path *path, const json_t *v)
{
	bool on = true;
	int rc = json_is_auto(v) ? 0 : json_read_bool(&p->doc, path, v, &on, p->e);

	if (!rc)
		p->c->optimizer.decoupled = on || p->c->optimizer.type == OPTIMIZER_ADAMW;
	return rc;
}

int ds_read_betas(struct ds_parse *p, const struct json_path *path, const json_t *v)
{
	char words[64];
	double b[2];
	int rc;

	if (json_is_auto(v))
		return 0;
	if (!json_is_array(v) || json_array_size(v) != 2)
		return json_fail(&p->doc, path, p->e, "expected a list of two numbers, found %s", json_words(v, words));
	for (size_t i = 0; i < 2; i++) {
		rc = json_read_f64(&p->doc, path, json_array_get(v, i), 0, 1, &b[i], p->e);
		if (rc)
			return rc;
		if (b[i] == 1)
			return json_fail(&p->doc, path, p->e, "a beta of 1 never takes a gradient; use less");
	}
	p->c->optimizer.beta1 = b[0];
	p->c->optimizer.beta2 = b[1];
	return 0;
}

static const char *const scheduler_names[] = { "WarmupLR", "WarmupDecayLR", "WarmupCosineLR", NULL };

int ds_read_scheduler_type(struct ds_parse *p, const struct json_path *path, const json_t *v)
{
	char words[64];

	for (int i = 0; scheduler_names[i]; i++) {
		if (json_is_string(v) && !strcmp(json_string_value(v), scheduler_names[i])) {
			p->c->scheduler.type = (enum scheduler_type)(SCHEDULER_WARMUP + i);
			return 0;
		}
	}
	return json_fail(&p->doc, path, p->e, "only WarmupLR, WarmupDecayLR and WarmupCosineLR are built, found %s",
			 json_words(v, words));
}

/* The parameters of each schedule: another one's is an error, as it is in DeepSpeed's constructors. */
static const struct scheduler_param {
	const char *name;
	bool of_warmup, of_decay, of_cosine;
	bool is_real;
	size_t offset;
} scheduler_params[] = {
#define AT(field) offsetof(struct scheduler_config, field)
	{ "warmup_min_lr", true, true, false, true, AT(warmup_min_lr) },
	{ "warmup_max_lr", true, true, false, true, AT(warmup_max_lr) },
	{ "warmup_num_steps", true, true, true, false, AT(warmup_num_steps) },
	{ "total_num_steps", false, true, true, false, AT(total_num_steps) },
	{ "warmup_min_ratio", false, false, true, true, AT(warmup_min_ratio) },
	{ "cos_min_ratio", false, false, true, true, AT(cos_min_ratio) },
	{ "warmup_type", true, true, true, false, 0 },
#undef AT
};

static const struct scheduler_param *scheduler_param_find(enum scheduler_type type, const char *name)
{
	const struct scheduler_param *s = scheduler_params;

	while (strcmp(s->name, name))
		s++;
	if ((type == SCHEDULER_WARMUP && s->of_warmup) || (type == SCHEDULER_WARMUP_DECAY && s->of_decay) ||
	    (type == SCHEDULER_WARMUP_COSINE && s->of_cosine))
		return s;
	return NULL;
}

/* HF: the floor is 0, the top the optimizer's rate, the total the job's steps; only the warm-up is a choice. */
static int read_auto_param(struct ds_parse *p, const struct json_path *path)
{
	if (!strcmp(path->key, "warmup_num_steps"))
		return json_fail(&p->doc, path, p->e,
				 "\"auto\" is filled in by Hugging Face's Trainer, which is not here; give a number");
	if (!strcmp(path->key, "warmup_max_lr"))
		p->max_lr = MAX_LR_AUTO;
	return 0;
}

int ds_read_scheduler_param(struct ds_parse *p, const struct json_path *path, const json_t *v)
{
	static const char *const warmup_types[] = { "log", "linear", NULL };
	struct scheduler_config *sc = &p->c->scheduler;
	const struct scheduler_param *s = scheduler_param_find(sc->type, path->key);
	void *field;
	int rc;

	if (!s)
		return json_fail(&p->doc, path, p->e, "%s has no such parameter",
				 sc->type == SCHEDULER_NONE ? "a scheduler without type"
							    : scheduler_names[sc->type - SCHEDULER_WARMUP]);
	if (json_is_auto(v))
		return read_auto_param(p, path);
	if (!strcmp(path->key, "warmup_type")) {
		rc = read_word(p, path, v, warmup_types);
		if (rc >= 0)
			sc->log_warmup = rc == 0;
		return rc < 0 ? rc : 0;
	}
	field = (char *)sc + s->offset;
	if (!strcmp(path->key, "warmup_max_lr"))
		p->max_lr = MAX_LR_GIVEN;
	if (s->is_real)
		return json_read_f64(&p->doc, path, v, 0, 1e300, field, p->e);
	return json_read_u64(&p->doc, path, v, 1, INT64_MAX, field, p->e);
}

/* --------------------------------------------------------------------- ZeRO */

int ds_read_width_default(struct ds_parse *p, const struct json_path *path, const json_t *v)
{
	struct zero_config *z = &p->c->zero;
	uint64_t *field = &z->reduce_bucket_size;
	bool *automatic = &p->auto_reduce_bucket;

	if (strstr(path->key, "prefetch_bucket_size")) {
		field = &z->stage3_prefetch_bucket_size;
		automatic = &p->auto_prefetch;
	} else if (strstr(path->key, "param_persistence_threshold")) {
		field = &z->stage3_param_persistence_threshold;
		automatic = &p->auto_persistence;
	}
	*automatic = json_is_auto(v);
	return *automatic ? 0 : json_read_u64(&p->doc, path, v, 0, INT64_MAX, field, p->e);
}

/* ---------------------------------------------------------------- shardmesh */

static int read_model_file(struct ds_parse *p, const struct json_path *path, const char *given)
{
	char *file = ds_absolute(p->base_dir, given), *text = NULL;
	struct stat st;
	struct err why = { 0 };
	int rc;

	if (file && !stat(file, &st) && S_ISDIR(st.st_mode)) {
		char *in_dir = NULL;

		if (asprintf(&in_dir, "%s/config.json", file) < 0)
			in_dir = NULL;
		free(p->model_dir);
		p->model_dir = file;
		file = in_dir;
	}
	if (!file)
		return out_of_memory(p);
	rc = ds_read_text(file, &text, &why);
	if (rc)
		rc = json_fail(&p->doc, path, p->e, "%s", why.text);
	else
		rc = model_config_parse(text, file, &p->c->model, p->e);
	free(text);
	free(file);
	return rc;
}

int ds_read_model(struct ds_parse *p, const struct json_path *path, const json_t *v)
{
	char words[64];

	if (json_is_object(v))
		return model_config_read(&p->doc, path, v, &p->c->model, p->e);
	if (json_is_string(v))
		return read_model_file(p, path, json_string_value(v));
	return json_fail(&p->doc, path, p->e,
			 "expected the path of a config.json, its directory, or its keys as an object, found %s",
			 json_words(v, words));
}

static int read_path(struct ds_parse *p, const struct json_path *path, const json_t *v, char **out)
{
	char words[64];

	if (!json_is_string(v) || !json_string_length(v))
		return json_fail(&p->doc, path, p->e, "expected a path, found %s", json_words(v, words));
	*out = ds_absolute(p->base_dir, json_string_value(v));
	return *out ? 0 : out_of_memory(p);
}

int ds_read_weights(struct ds_parse *p, const struct json_path *path, const json_t *v)
{
	free(p->c->weights);
	p->c->weights = NULL;
	return read_path(p, path, v, &p->c->weights);
}

int ds_read_initialize(struct ds_parse *p, const struct json_path *path, const json_t *v)
{
	static const char *const words[] = { "auto", "weights", "random", NULL };
	int i = read_word(p, path, v, words);

	if (i >= 0)
		p->initialize = i;
	return i < 0 ? i : 0;
}

static const char *const format_words[] = { "bytes", "llmc", "nanogpt", "jsonl", "text", NULL };

int ds_read_format(struct ds_parse *p, const struct json_path *path, const json_t *v)
{
	int i = read_word(p, path, v, format_words);

	if (i >= 0)
		p->c->data.format = (enum data_format)i;
	return i < 0 ? i : 0;
}

/* data.format, which may stand behind the sources that take it; what is wrong with it is said when its turn comes. */
static enum data_format default_format(const struct ds_parse *p)
{
	const json_t *data = json_object_get(json_object_get(p->doc.root, "shardmesh"), "data");
	const char *word = json_string_value(json_object_get(data, "format"));

	for (int i = 0; word && format_words[i]; i++)
		if (!strcmp(word, format_words[i]))
			return (enum data_format)i;
	return DATA_BYTES;
}

static int read_path_list(struct ds_parse *p, const struct json_path *path, const json_t *v, struct data_source *s)
{
	size_t count = json_is_array(v) ? json_array_size(v) : 1;
	char words[64];
	int rc = 0;

	if (!count || !(json_is_array(v) || json_is_string(v)))
		return json_fail(&p->doc, path, p->e, "expected a path or a list of paths, found %s",
				 count ? json_words(v, words) : "an empty list");
	s->path = calloc(count, sizeof(*s->path));
	if (!s->path)
		return out_of_memory(p);
	for (; !rc && s->n_paths < count; s->n_paths += !rc)
		rc = read_path(p, path, json_is_array(v) ? json_array_get(v, s->n_paths) : v, &s->path[s->n_paths]);
	return rc;
}

static int read_source_key(struct ds_parse *p, const struct json_path *path, const json_t *v, bool train,
			   struct data_source *s)
{
	static const char *const names[] = { "path", "format", "weight", NULL };
	const char *near = nearest_name(path->key, names);
	int i;

	if (!strcmp(path->key, "path"))
		return read_path_list(p, path, v, s);
	if (!strcmp(path->key, "weight") && train)
		return json_read_f64(&p->doc, path, v, 1e-6, 1e6, &s->weight, p->e);
	if (!strcmp(path->key, "weight"))
		return json_fail(&p->doc, path, p->e, "held-out data are taken evenly; leave it out");
	if (strcmp(path->key, "format"))
		return json_fail(&p->doc, path, p->e, "unknown key; %s%s%s", near ? "did you mean \"" : "",
				 near ? near : "a source has path, format and weight", near ? "\"?" : "");
	i = read_word(p, path, v, format_words);
	if (i >= 0)
		s->format = (enum data_format)i;
	return i < 0 ? i : 0;
}

/* A path, or {"path", "format", "weight"}. */
static int read_source(struct ds_parse *p, const struct json_path *at, const json_t *v, struct data_source *s)
{
	const char *key;
	json_t *member;
	int rc = 0;

	if (!json_is_object(v))
		return read_path_list(p, at, v, s);
	json_object_foreach((json_t *)v, key, member)
	{
		struct json_path path = { at, key };

		if (!rc && !json_is_null(member))
			rc = read_source_key(p, &path, member, !strcmp(at->key, "train"), s);
	}
	if (!rc && !s->path)
		rc = json_fail(&p->doc, at, p->e, "a source without path");
	return rc;
}

static bool all_strings(const json_t *list)
{
	for (size_t i = 0; i < json_array_size(list); i++)
		if (!json_is_string(json_array_get(list, i)))
			return false;
	return true;
}

/* A tokenizer may stand behind the sources that it is for. */
static bool makes_bytes(const struct ds_parse *p, enum data_format format)
{
	const json_t *data = json_object_get(json_object_get(p->doc.root, "shardmesh"), "data");

	return format == DATA_BYTES || (format == DATA_JSONL && !json_is_string(json_object_get(data, "tokenizer")));
}

/* All sources have a weight or none has; tokens of two kinds would mean different things by the same number. */
static int check_sources(struct ds_parse *p, const struct json_path *path, const struct data_source *s, uint32_t n)
{
	for (uint32_t i = 1; i < n; i++) {
		if ((s[i].weight > 0) != (s[0].weight > 0))
			return json_fail(&p->doc, path, p->e, "give every source a weight, or none");
		if (makes_bytes(p, s[i].format) != makes_bytes(p, s[0].format))
			return json_fail(&p->doc, path, p->e,
					 "\"%s\" and \"%s\" do not mix: one's tokens are bytes, the other's are not",
					 format_words[s[0].format], format_words[s[i].format]);
	}
	return 0;
}

/* data.train and data.validation: a path or a list of paths, which are one source, or a list of sources. */
int ds_read_sources(struct ds_parse *p, const struct json_path *path, const json_t *v)
{
	bool train = !strcmp(path->key, "train"), list = json_is_array(v) && !all_strings(v);
	uint32_t *n = train ? &p->c->data.n_train : &p->c->data.n_validation;
	struct data_source **sources = train ? &p->c->data.train : &p->c->data.validation;
	size_t count = list ? json_array_size(v) : 1;
	int rc = 0;

	if (count > DATA_SOURCES_MAX)
		return json_fail(&p->doc, path, p->e, "more than %u sources", DATA_SOURCES_MAX);
	*sources = calloc(count, sizeof(**sources));
	if (!*sources)
		return out_of_memory(p);
	while (!rc && *n < count) {
		struct data_source *s = &(*sources)[*n];

		s->format = default_format(p);
		rc = read_source(p, path, list ? json_array_get(v, *n) : v, s);
		++*n;
	}
	return rc ? rc : check_sources(p, path, *sources, *n);
}

int ds_read_tokenizer(struct ds_parse *p, const struct json_path *path, const json_t *v)
{
	return read_path(p, path, v, &p->c->data.tokenizer);
}

int ds_read_end_token(struct ds_parse *p, const struct json_path *path, const json_t *v)
{
	return json_read_string(&p->doc, path, v, &p->c->data.end_token, p->e);
}

int ds_read_sequence_length(struct ds_parse *p, const struct json_path *path, const json_t *v)
{
	uint64_t n;
	int rc = json_read_u64(&p->doc, path, v, 1, 1u << 24, &n, p->e);

	if (!rc)
		p->c->data.sequence_length = (uint32_t)n;
	return rc;
}

int ds_read_eval_batches(struct ds_parse *p, const struct json_path *path, const json_t *v)
{
	uint64_t n;
	int rc = json_read_u64(&p->doc, path, v, 0, 1u << 20, &n, p->e);

	if (!rc) {
		p->c->eval_batches = (uint32_t)n;
		p->has_eval_batches = true;
	}
	return rc;
}

int ds_read_activations(struct ds_parse *p, const struct json_path *path, const json_t *v)
{
	static const char *const words[] = { "auto", "keep", "recompute", NULL };
	int i = read_word(p, path, v, words);

	if (i >= 0)
		p->c->activations = (enum activations_mode)i;
	return i < 0 ? i : 0;
}

/* Replaces the default that stands in *field. */
static int replace_string(struct ds_parse *p, char **field, const char *s)
{
	char *copy = strdup(s);

	if (!copy)
		return out_of_memory(p);
	free(*field);
	*field = copy;
	return 0;
}

int ds_read_fabric(struct ds_parse *p, const struct json_path *path, const json_t *v)
{
	const char *word = json_string_value(v);
	char words[64];

	if (!word || !ds_fabric_known(word))
		return json_fail(&p->doc, path, p->e,
				 "expected \"auto\", \"local\", \"local-copy\", \"verbs\" or \"ofi\", found %s",
				 json_words(v, words));
	return replace_string(p, &p->c->fabric, word);
}

int ds_read_math(struct ds_parse *p, const struct json_path *path, const json_t *v)
{
	char words[64];

	if (!json_is_string(v))
		return json_fail(&p->doc, path, p->e, "expected a string, found %s", json_words(v, words));
	return replace_string(p, &p->c->math, json_is_auto(v) ? "" : json_string_value(v));
}

int ds_read_run_dir(struct ds_parse *p, const struct json_path *path, const json_t *v)
{
	char *dir = NULL;
	int rc = read_path(p, path, v, &dir);

	if (rc)
		return rc;
	free(p->c->run_dir);
	p->c->run_dir = dir;
	return 0;
}
