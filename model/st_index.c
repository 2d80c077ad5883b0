/* SPDX-License-Identifier: Apache-2.0 */
#include "model/st_index.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define FILES_MAX 4096u

static int add_file(struct st_index *x, const char *name, struct err *e)
{
	char **files;

	for (uint32_t i = 0; i < x->n_files; i++)
		if (!strcmp(x->file[i], name))
			return 0;
	if (x->n_files == FILES_MAX)
		return err_set(e, -EINVAL, "%s: names more than %u files", x->path, FILES_MAX);
	files = realloc(x->file, (x->n_files + 1) * sizeof(*files));
	if (!files)
		return err_set(e, -ENOMEM, "%s: out of memory", x->path);
	x->file = files;
	x->file[x->n_files] = strdup(name);
	if (!x->file[x->n_files])
		return err_set(e, -ENOMEM, "%s: out of memory", x->path);
	x->n_files++;
	return 0;
}

static int check_entry(struct st_index *x, const char *tensor, const json_t *v, struct err *e)
{
	const char *name = json_string_value(v);

	if (!name || !name[0] || strlen(name) != json_string_length(v))
		return err_set(e, -EINVAL, "%s: weight_map: tensor \"%.200s\" has no file's name", x->path, tensor);
	if (strchr(name, '/') || !strcmp(name, "..") || !strcmp(name, "."))
		return err_set(
			e, -EINVAL,
			"%s: weight_map: \"%.200s\" is not the name of a file beside the index; paths are refused",
			x->path, name);
	return add_file(x, name, e);
}

static int read_total_size(struct st_index *x, const json_t *metadata, struct err *e)
{
	const json_t *v = json_object_get(metadata, "total_size");

	if (!v || json_is_null(v))
		return 0;
	/* Some writers have divided on the way, so that it is 1.6e10 or ends in .0. */
	if (!json_is_number(v) || json_number_value(v) < 0 || json_number_value(v) > 0x1p62)
		return err_set(e, -EINVAL, "%s: metadata.total_size is not a number of bytes", x->path);
	x->has_total_size = true;
	x->total_size = json_is_integer(v) ? (uint64_t)json_integer_value(v) : (uint64_t)json_real_value(v);
	return 0;
}

static int read_root(struct st_index *x, struct err *e)
{
	const char *tensor;
	json_t *v;
	int rc;

	x->weight_map = json_object_get(x->root, "weight_map");
	if (!json_is_object(x->weight_map) || !json_object_size(x->weight_map))
		return err_set(e, -EINVAL, "%s: no weight_map with a file's name for every tensor", x->path);
	rc = read_total_size(x, json_object_get(x->root, "metadata"), e);
	json_object_foreach(x->weight_map, tensor, v)
	{
		if (!rc)
			rc = check_entry(x, tensor, v, e);
	}
	return rc;
}

int st_index_parse(const char *text, size_t bytes, const char *path, struct st_index *out, struct err *e)
{
	struct st_index x = { .path = strdup(path) };
	json_error_t je;
	int rc;

	if (!x.path)
		return err_set(e, -ENOMEM, "%s: out of memory", path);
	x.root = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &je);
	if (!x.root)
		rc = err_set(e, -EINVAL, "%s:%d: %s", path, je.line > 0 ? je.line : 1, je.text);
	else
		rc = read_root(&x, e);
	if (rc)
		st_index_release(&x);
	else
		*out = x;
	return rc;
}

void st_index_release(struct st_index *x)
{
	for (uint32_t i = 0; i < x->n_files; i++)
		free(x->file[i]);
	free(x->file);
	json_decref(x->root);
	free(x->path);
	*x = (struct st_index){ 0 };
}
