/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A JSON text that a person wrote, with what is needed to complain about it:
 * its name, its lines, and the path of the key at fault. Private to model/.
 */
#ifndef SHARDMESH_MODEL_JSON_DOC_H
#define SHARDMESH_MODEL_JSON_DOC_H

#include "base/base.h"

#include <jansson.h>

struct json_doc {
	char *name; /* "ds.json" in messages */
	char *text; /* as given, comments and trailing commas blanked out; lines kept */
	json_t *root;
};

/* Where a value stands: a list from the innermost key to the root (NULL). Lives on the walker's stack. */
struct json_path {
	const struct json_path *up;
	const char *key;
};
#define JSON_PATH_MAX 256

/*
 * Accepts comments (//, #, block), trailing commas and a bare Infinity (which
 * becomes the string "inf"); refuses duplicate keys. The root must be an object.
 */
int json_doc_parse(struct json_doc *d, const char *text, const char *name, struct err *e);
void json_doc_release(struct json_doc *d);

/* Line (from 1) of the key at path in a text that has been parsed; of its nearest ancestor when it is not there. */
unsigned json_pos_line(const char *text, const struct json_path *path);

/* "zero_optimization.stage" into buf; returns buf. */
const char *json_path_text(const struct json_path *path, char buf[JSON_PATH_MAX]);
/* A value in words for messages: "-3", "\"auto\"", "a list"; returns buf. */
const char *json_words(const json_t *v, char buf[64]);

/* -EINVAL and "name:line: path: text". */
int json_fail(const struct json_doc *d, const struct json_path *path, struct err *e, const char *fmt, ...)
	PRINTF_LIKE(4, 5);

/* Typed values. Integers may be written 5e8 or 3.0; bounds are inclusive. -EINVAL says what was expected and found. */
int json_read_u64(const struct json_doc *d, const struct json_path *path, const json_t *v, uint64_t min, uint64_t max,
		  uint64_t *out, struct err *e);
int json_read_f64(const struct json_doc *d, const struct json_path *path, const json_t *v, double min, double max,
		  double *out, struct err *e);
int json_read_bool(const struct json_doc *d, const struct json_path *path, const json_t *v, bool *out, struct err *e);
/* malloced. */
int json_read_string(const struct json_doc *d, const struct json_path *path, const json_t *v, char **out,
		     struct err *e);

/* True for the string "auto". */
bool json_is_auto(const json_t *v);

#endif
