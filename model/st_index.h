/* SPDX-License-Identifier: Apache-2.0 */
/* model.safetensors.index.json: which tensor is in which file. Private to model/. */
#ifndef SHARDMESH_MODEL_ST_INDEX_H
#define SHARDMESH_MODEL_ST_INDEX_H

#include "base/base.h"

#include <jansson.h>

struct st_index {
	char *path;
	json_t *root;
	json_t *weight_map; /* in root: {tensor: file}; every value is a plain file name */
	char **file;        /* the different files, in the order they are first named */
	uint32_t n_files;
	bool has_total_size;
	uint64_t total_size; /* bytes of all tensors, as the writer counted */
};

/*
 * text: `bytes` of it, NUL-ended. Refuses what is not {"weight_map": {name: file}}
 * or names a file by more than its name: folders, "..", an absolute path. -EINVAL.
 */
int st_index_parse(const char *text, size_t bytes, const char *path, struct st_index *out, struct err *e);
void st_index_release(struct st_index *x);

#endif
