/* SPDX-License-Identifier: Apache-2.0 */
/* The table of config keys. Private to model/. */
#ifndef SHARDMESH_MODEL_DS_KEYS_H
#define SHARDMESH_MODEL_DS_KEYS_H

#include "model/json_doc.h"
#include "model/model.h"

enum ds_type {
	DS_SECTION, /* an object whose keys are in the table too */
	DS_BOOL,
	DS_UINT,
	DS_REAL,
	DS_STRING,
	DS_LIST,
	DS_ANY,
};

/* What setting a key does here. */
enum ds_use {
	DS_USED,      /* stored in struct job_config; with a `text` it is a note all the same */
	DS_NO_EFFECT, /* checked for its type, listed as a note with the reason */
	DS_NOT_BUILT, /* refused, unless it has a value that asks for nothing */
	DS_ALIAS,     /* another name: `text` is the key it stands for */
};

/* What the string "auto", which Hugging Face's Trainer replaces before DeepSpeed sees it, stands for. */
enum ds_auto {
	DS_AUTO_REFUSED,
	DS_AUTO_DEFAULT, /* the default, which is also HF's; or a width that HF derives from the model */
};

struct ds_parse;
/* Reads a value that the plain types do not cover. */
typedef int (*ds_read_fn)(struct ds_parse *p, const struct json_path *path, const json_t *v);

struct ds_key {
	const char *path; /* "zero_optimization.stage" */
	enum ds_type type;
	enum ds_use use;
	const char *text;    /* DS_NO_EFFECT, DS_NOT_BUILT: the reason; DS_ALIAS: the key meant */
	const char *off;     /* DS_NOT_BUILT: JSON values, separated by blanks, that ask for nothing */
	double min, max;     /* DS_UINT, DS_REAL; max 0: no bound */
	size_t offset, size; /* DS_USED without read: the field of struct job_config */
	enum ds_auto automatic;
	ds_read_fn read;
};

#define DS_KEYS_MAX 400
extern const struct ds_key ds_keys[];
extern const size_t ds_n_keys;
const struct ds_key *ds_key_find(const char *path);

/* One config file on its way into a struct job_config. */
struct ds_parse {
	struct json_doc doc;
	const char *base_dir;
	struct job_config *c;
	struct err *e;
	/* Set to "auto": from the model's width, when that is known. */
	bool auto_prefetch, auto_persistence, auto_reduce_bucket;
	enum { MAX_LR_DEFAULT, MAX_LR_GIVEN, MAX_LR_AUTO } max_lr; /* scheduler.params.warmup_max_lr */
	bool has_eval_batches;
	char *model_dir; /* the directory that shardmesh.model names, or NULL */
	enum { INITIALIZE_AUTO, INITIALIZE_WEIGHTS, INITIALIZE_RANDOM } initialize;
};

/* ds_values.c: the readers named in the table. */
int ds_read_steps_per_print(struct ds_parse *p, const struct json_path *path, const json_t *v);
int ds_read_optimizer_type(struct ds_parse *p, const struct json_path *path, const json_t *v);
int ds_read_adam_w_mode(struct ds_parse *p, const struct json_path *path, const json_t *v);
int ds_read_betas(struct ds_parse *p, const struct json_path *path, const json_t *v);
int ds_read_scheduler_type(struct ds_parse *p, const struct json_path *path, const json_t *v);
int ds_read_scheduler_param(struct ds_parse *p, const struct json_path *path, const json_t *v);
int ds_read_width_default(struct ds_parse *p, const struct json_path *path, const json_t *v);
int ds_read_stage(struct ds_parse *p, const struct json_path *path, const json_t *v);
int ds_read_model(struct ds_parse *p, const struct json_path *path, const json_t *v);
int ds_read_weights(struct ds_parse *p, const struct json_path *path, const json_t *v);
int ds_read_initialize(struct ds_parse *p, const struct json_path *path, const json_t *v);
int ds_read_sources(struct ds_parse *p, const struct json_path *path, const json_t *v);
int ds_read_format(struct ds_parse *p, const struct json_path *path, const json_t *v);
int ds_read_tokenizer(struct ds_parse *p, const struct json_path *path, const json_t *v);
int ds_read_end_token(struct ds_parse *p, const struct json_path *path, const json_t *v);
int ds_read_sequence_length(struct ds_parse *p, const struct json_path *path, const json_t *v);
int ds_read_eval_batches(struct ds_parse *p, const struct json_path *path, const json_t *v);
int ds_read_activations(struct ds_parse *p, const struct json_path *path, const json_t *v);
int ds_read_fabric(struct ds_parse *p, const struct json_path *path, const json_t *v);
int ds_read_rdma(struct ds_parse *p, const struct json_path *path, const json_t *v);
int ds_read_math(struct ds_parse *p, const struct json_path *path, const json_t *v);
int ds_read_run_dir(struct ds_parse *p, const struct json_path *path, const json_t *v);

/* A text file whole; malloced. A zero byte in it is an error. */
int ds_read_text(const char *path, char **out, struct err *e);
/* path taken from base_dir (NULL: the working directory) and made absolute; malloced, NULL when out of memory. */
char *ds_absolute(const char *base_dir, const char *path);

/* "shardmesh.rdma" as it was read; NULL when memory is short. */
json_t *ds_rdma_json(const struct job_config *c);
void ds_rdma_release(struct job_config *c);
/* Is it a word for "shardmesh.fabric"? */
bool ds_fabric_known(const char *name);

#endif
