/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A model's weights in safetensors files, found by the names of the unit table.
 * Opening reads headers only and decides everything: each tensor of the table
 * is in exactly one place with its shape and a type that can be read, and
 * nothing is there that nobody asked for, but for what is known to be no
 * parameter. Reading is then by ranges, so that every owner reads its own pages
 * and nobody the whole.
 *
 * Names: a file written by the bare model (GPT2Model, LlamaModel) lacks the
 * prefix that ...ForCausalLM's have; both are taken, for a tensor at a time. A
 * tied model has one matrix under two names. Usually the head's is left out; if
 * it is there it must be the embedding's, and it stands in for it if that was
 * left out.
 */
#include "model/model.h"
#include "model/st_index.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define INDEX_BYTES_MAX 100000000u
#define HEAD "lm_head.weight"
#define NO_TENSOR UINT32_MAX
#define SAMPLE 256u

static const char single_name[] = "model.safetensors";
static const char index_name[] = "model.safetensors.index.json";

struct place {
	const struct st_file *file; /* NULL: not found yet */
	const struct st_tensor *tensor;
};

struct model_weights {
	const struct unit_table *table;
	char *path;
	uint32_t *by_name; /* [n_tensors] the table's indices, sorted by name */
	struct st_file *file;
	uint32_t n_files;
	struct place *place; /* [n_tensors] */
	struct place head;   /* lm_head.weight of a tied model */
	char warning[512];
};

/* ---------------------------------------------------------------- where they are */

static bool exists(const char *path)
{
	struct stat st;

	return !stat(path, &st);
}

/* dir/name, malloced. */
static char *beside(const char *dir, const char *name)
{
	char *path = NULL;

	return asprintf(&path, "%s/%s", dir, name) < 0 ? NULL : path;
}

int model_weights_find(const char *path, char **file, struct err *e)
{
	static const char *const names[] = { single_name, index_name, "pytorch_model.bin",
					     "pytorch_model.bin.index.json" };
	struct stat st;

	if (stat(path, &st))
		return err_set(e, -errno, "%s: %s", path, strerror(errno));
	if (!S_ISDIR(st.st_mode)) {
		*file = strdup(path);
		return *file ? 0 : err_set(e, -ENOMEM, "%s: out of memory", path);
	}
	for (size_t i = 0; i < ARRAY_LEN(names); i++) {
		char *found = beside(path, names[i]);

		if (!found)
			return err_set(e, -ENOMEM, "%s: out of memory", path);
		if (exists(found) && i < 2) {
			*file = found;
			return 0;
		}
		if (exists(found)) {
			free(found);
			return err_set(e, -EINVAL,
				       "%s: the weights are pickled (%s), and only safetensors are read; convert them "
				       "with save_pretrained",
				       path, names[i]);
		}
		free(found);
	}
	return err_set(e, -ENOENT, "%s: no %s and no %s", path, single_name, index_name);
}

/* ------------------------------------------------------------------------ names */

static int compare_by_name(const void *a, const void *b, void *ctx)
{
	const struct unit_table *t = ctx;

	return strcmp(t->tensor[*(const uint32_t *)a].name, t->tensor[*(const uint32_t *)b].name);
}

static uint32_t find_exact(const struct model_weights *w, const char *name)
{
	uint32_t low = 0, high = w->table->n_tensors;

	while (low < high) {
		uint32_t mid = low + (high - low) / 2;
		int order = strcmp(name, w->table->tensor[w->by_name[mid]].name);

		if (!order)
			return w->by_name[mid];
		if (order < 0)
			high = mid;
		else
			low = mid + 1;
	}
	return NO_TENSOR;
}

/* "transformer." or "model.", by the table's first tensor. */
static size_t prefix_length(const struct unit_table *t)
{
	return strcspn(t->tensor[0].name, ".") + 1;
}

static uint32_t find_name(const struct model_weights *w, const char *name)
{
	size_t prefix = prefix_length(w->table);
	uint32_t i = find_exact(w, name);
	char with[96];

	if (i != NO_TENSOR || strlen(name) + prefix >= sizeof(with))
		return i;
	snprintf(with, sizeof(with), "%.*s%s", (int)prefix, w->table->tensor[0].name, name);
	return find_exact(w, with);
}

/* What old checkpoints hold beside parameters: GPT-2's causal masks, Llama's frequencies. */
static bool is_buffer(const struct model_weights *w, const char *name)
{
	static const char *const per_layer[] = { ".attn.bias", ".attn.masked_bias", ".self_attn.rotary_emb.inv_freq" };
	size_t prefix = prefix_length(w->table);

	if (!strncmp(name, w->table->tensor[0].name, prefix))
		name += prefix;
	if (!strcmp(name, "rotary_emb.inv_freq"))
		return true;
	if (!strncmp(name, "h.", 2))
		name += 2;
	else if (!strncmp(name, "layers.", 7))
		name += 7;
	else
		return false;
	name += strspn(name, "0123456789");
	for (size_t i = 0; i < ARRAY_LEN(per_layer); i++)
		if (!strcmp(name, per_layer[i]))
			return true;
	return false;
}

/* ---------------------------------------------------------------------- mapping */

static const char *shape_text(const uint64_t *shape, uint32_t n, char buf[128])
{
	size_t at = 0;

	buf[0] = '\0';
	for (uint32_t i = 0; i < n && at < 100; i++)
		at += (size_t)snprintf(buf + at, 128 - at, "%s%llu", i ? " x " : "", (unsigned long long)shape[i]);
	return n ? buf : "a scalar";
}

static int check_tensor(const struct st_file *f, const struct st_tensor *t, const struct tensor_info *want,
			struct err *e)
{
	char has[128], needs[128];

	if (t->n_dims != want->n_dims || memcmp(t->shape, want->shape, t->n_dims * sizeof(*t->shape)))
		return err_set(e, -EINVAL, "%s: tensor \"%s\" is %s, and config.json asks for %s", f->path, t->name,
			       shape_text(t->shape, t->n_dims, has), shape_text(want->shape, want->n_dims, needs));
	if (t->dtype == ST_OTHER)
		return err_set(e, -EINVAL, "%s: tensor \"%s\": only F32, F16 and BF16 can be read", f->path, t->name);
	return 0;
}

static int set_place(struct place *p, const struct st_file *f, const struct st_tensor *t, struct err *e)
{
	if (p->file)
		return err_set(e, -EINVAL, "%s: tensor \"%s\" is also in %s, as \"%s\"", f->path, t->name,
			       p->file->path, p->tensor->name);
	*p = (struct place){ f, t };
	return 0;
}

static int map_tensor(struct model_weights *w, const struct st_file *f, const struct st_tensor *t, struct err *e)
{
	uint32_t i = find_name(w, t->name);
	int rc;

	if (i == NO_TENSOR && is_buffer(w, t->name))
		return 0;
	if (i == NO_TENSOR && !strcmp(t->name, HEAD)) {
		rc = check_tensor(f, t, &w->table->tensor[0], e);
		return rc ? rc : set_place(&w->head, f, t, e);
	}
	if (i == NO_TENSOR)
		return err_set(e, -EINVAL, "%s: tensor \"%.200s\" is not one of the model that config.json describes",
			       f->path, t->name);
	rc = check_tensor(f, t, &w->table->tensor[i], e);
	return rc ? rc : set_place(&w->place[i], f, t, e);
}

static int map_file(struct model_weights *w, const struct st_file *f, struct err *e)
{
	int rc = 0;

	for (uint32_t i = 0; i < f->n_tensors && !rc; i++)
		rc = map_tensor(w, f, &f->tensor[i], e);
	return rc;
}

/* A few runs of the matrix under both names: reading all of it twice at every start would cost more than it finds. */
static int check_tied(struct model_weights *w, struct err *e)
{
	const struct place *a = &w->place[0], *b = &w->head;
	uint64_t n = w->table->tensor[0].n, at[] = { 0, n / 2, n - 1 };
	float x[SAMPLE], y[SAMPLE];

	for (size_t i = 0; i < ARRAY_LEN(at); i++) {
		uint64_t first = at[i] + SAMPLE > n ? (n > SAMPLE ? n - SAMPLE : 0) : at[i];
		uint64_t count = n - first < SAMPLE ? n - first : SAMPLE;
		int rc = st_read_f32(a->file, a->tensor, first, count, x, e);

		if (!rc)
			rc = st_read_f32(b->file, b->tensor, first, count, y, e);
		if (rc)
			return rc;
		if (memcmp(x, y, count * sizeof(*x)))
			return err_set(e, -EINVAL,
				       "%s: tensor \"%s\" differs from \"%s\", and tie_word_embeddings says that they "
				       "are one",
				       b->file->path, b->tensor->name, a->tensor->name);
	}
	return 0;
}

static int check_complete(struct model_weights *w, struct err *e)
{
	if (!w->place[0].file && w->head.file) {
		w->place[0] = w->head;
		w->head = (struct place){ 0 };
	}
	for (uint32_t i = 0; i < w->table->n_tensors; i++)
		if (!w->place[i].file)
			return err_set(e, -EINVAL, "%s: tensor \"%s\" is missing%s", w->path, w->table->tensor[i].name,
				       strcmp(w->table->tensor[i].name, HEAD)
					       ? ""
					       : "; is the model tied (tie_word_embeddings)?");
	return w->head.file ? check_tied(w, e) : 0;
}

/* ------------------------------------------------------------------------ files */

static int add_file(struct model_weights *w, const char *path, struct err *e)
{
	int rc = st_open(path, &w->file[w->n_files], e);

	w->n_files += !rc;
	return rc;
}

static int open_single(struct model_weights *w, const char *path, struct err *e)
{
	int rc;

	w->file = calloc(1, sizeof(*w->file));
	if (!w->file)
		return err_set(e, -ENOMEM, "%s: out of memory", path);
	rc = add_file(w, path, e);
	return rc ? rc : map_file(w, &w->file[0], e);
}

/* Every tensor of a shard must be the index's, of this very shard; what is left of the map at the end is missing. */
static int match_index(const struct st_index *x, const struct st_file *f, const char *name, json_t *left, struct err *e)
{
	for (uint32_t i = 0; i < f->n_tensors; i++) {
		const char *tensor = f->tensor[i].name;
		const char *says = json_string_value(json_object_get(x->weight_map, tensor));

		if (!says)
			return err_set(e, -EINVAL, "%s: tensor \"%.200s\" is not in the weight_map of %s", f->path,
				       tensor, x->path);
		if (strcmp(says, name))
			return err_set(e, -EINVAL, "%s: tensor \"%.200s\" is here, and %s says that it is in %.200s",
				       f->path, tensor, x->path, says);
		json_object_del(left, tensor);
	}
	return 0;
}

static int open_shard(struct model_weights *w, const struct st_index *x, const char *name, json_t *left, struct err *e)
{
	const char *slash = strrchr(x->path, '/');
	char *path = NULL;
	struct stat st;
	int rc = 0;

	if (asprintf(&path, "%.*s%s", slash ? (int)(slash - x->path + 1) : 0, x->path, name) < 0)
		return err_set(e, -ENOMEM, "%s: out of memory", x->path);
	if (lstat(path, &st))
		rc = err_set(e, -errno, "%s, which %s names: %s", path, x->path, strerror(errno));
	else if (S_ISLNK(st.st_mode))
		rc = err_set(e, -EINVAL,
			     "%s is a symbolic link, and %s may name only files beside it; copy a model out of a cache "
			     "with its files (huggingface-cli download --local-dir)",
			     path, x->path);
	if (!rc)
		rc = add_file(w, path, e);
	if (!rc)
		rc = match_index(x, &w->file[w->n_files - 1], name, left, e);
	free(path);
	return rc;
}

static void check_total_size(struct model_weights *w, const struct st_index *x)
{
	uint64_t bytes = 0;

	for (uint32_t i = 0; i < w->n_files; i++)
		for (uint32_t k = 0; k < w->file[i].n_tensors; k++)
			bytes += w->file[i].tensor[k].end - w->file[i].tensor[k].begin;
	if (x->has_total_size && x->total_size != bytes)
		snprintf(w->warning, sizeof(w->warning),
			 "%.200s: metadata.total_size is %llu, and the tensors take %llu", x->path,
			 (unsigned long long)x->total_size, (unsigned long long)bytes);
}

static int open_shards(struct model_weights *w, const struct st_index *x, json_t *left, struct err *e)
{
	int rc = 0;

	w->file = calloc(x->n_files, sizeof(*w->file));
	if (!w->file || !left)
		return err_set(e, -ENOMEM, "%s: out of memory", x->path);
	for (uint32_t i = 0; i < x->n_files && !rc; i++)
		rc = open_shard(w, x, x->file[i], left, e);
	if (!rc && json_object_size(left)) {
		const char *tensor = json_object_iter_key(json_object_iter(left));

		rc = err_set(e, -EINVAL, "%s: tensor \"%.200s\" is not in %.200s, where weight_map says it is", x->path,
			     tensor, json_string_value(json_object_get(left, tensor)));
	}
	/* Only now do the files stay where they are, and may be pointed into. */
	for (uint32_t i = 0; i < w->n_files && !rc; i++)
		rc = map_file(w, &w->file[i], e);
	if (!rc)
		check_total_size(w, x);
	return rc;
}

static int open_index(struct model_weights *w, const char *path, struct err *e)
{
	char *text = NULL;
	struct st_index x;
	size_t bytes;
	json_t *left;
	int rc = file_read(path, INDEX_BYTES_MAX, &text, &bytes, e);

	if (rc)
		return rc;
	rc = st_index_parse(text, bytes, path, &x, e);
	free(text);
	if (rc)
		return rc;
	left = json_copy(x.weight_map);
	rc = open_shards(w, &x, left, e);
	json_decref(left);
	st_index_release(&x);
	return rc;
}

static int open_files(struct model_weights *w, struct err *e)
{
	size_t n = strlen(w->path);

	if (n > 5 && !strcmp(w->path + n - 5, ".json"))
		return open_index(w, w->path, e);
	return open_single(w, w->path, e);
}

int model_weights_open(const char *path, const struct unit_table *t, struct model_weights **out, struct err *e)
{
	struct model_weights *w = calloc(1, sizeof(*w));
	int rc = w ? 0 : -ENOMEM;

	if (w) {
		w->table = t;
		w->by_name = calloc(t->n_tensors, sizeof(*w->by_name));
		w->place = calloc(t->n_tensors, sizeof(*w->place));
	}
	if (rc || !w->by_name || !w->place) {
		model_weights_close(w);
		return err_set(e, -ENOMEM, "%s: out of memory", path);
	}
	for (uint32_t i = 0; i < t->n_tensors; i++)
		w->by_name[i] = i;
	qsort_r(w->by_name, t->n_tensors, sizeof(*w->by_name), compare_by_name, (void *)(uintptr_t)t);
	rc = model_weights_find(path, &w->path, e);
	if (!rc)
		rc = open_files(w, e);
	if (!rc)
		rc = check_complete(w, e);
	if (rc)
		model_weights_close(w);
	else
		*out = w;
	return rc;
}

void model_weights_close(struct model_weights *w)
{
	if (!w)
		return;
	for (uint32_t i = 0; i < w->n_files; i++)
		st_close(&w->file[i]);
	free(w->file);
	free(w->place);
	free(w->by_name);
	free(w->path);
	free(w);
}

const char *model_weights_warning(const struct model_weights *w)
{
	return w->warning[0] ? w->warning : NULL;
}

int model_weights_read(const struct model_weights *w, uint32_t tensor, uint64_t first, uint64_t n, float *out,
		       struct err *e)
{
	assert(tensor < w->table->n_tensors);
	assert(first <= w->table->tensor[tensor].n && n <= w->table->tensor[tensor].n - first);
	return st_read_f32(w->place[tensor].file, w->place[tensor].tensor, first, n, out, e);
}
