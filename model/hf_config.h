/* SPDX-License-Identifier: Apache-2.0 */
/* model_config_parse on a part of a larger document, and its two families' halves. Private to model/. */
#ifndef SHARDMESH_MODEL_HF_CONFIG_H
#define SHARDMESH_MODEL_HF_CONFIG_H

#include "model/json_doc.h"
#include "model/model.h"

/* o: the object at path `at` (NULL: the root of d). */
int model_config_read(const struct json_doc *d, const struct json_path *at, const json_t *o, struct model_config *out,
		      struct err *e);

/* A config.json on its way into a struct model_config. */
struct hf_parse {
	const struct json_doc *doc;
	const struct json_path *at;
	const json_t *o;
	struct model_config *m;
	struct err *e;
};

/* NULL when not given; null counts as that. */
const json_t *hf_given(const json_t *o, const char *name);

/* hf_llama.c: what the plain keys of the Llama family leave to say: shapes, biases, rotary positions, windows. */
int hf_llama_read(struct hf_parse *p);
/* hf_rope.c: rope_theta, rope_scaling, rope_parameters, partial_rotary_factor. */
int hf_rope_read(struct hf_parse *p);

#endif
