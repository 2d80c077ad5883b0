/* SPDX-License-Identifier: Apache-2.0 */
/* model_config_parse on a part of a larger document. Private to model/. */
#ifndef SHARDMESH_MODEL_HF_CONFIG_H
#define SHARDMESH_MODEL_HF_CONFIG_H

#include "model/json_doc.h"
#include "model/model.h"

/* o: the object at path `at` (NULL: the root of d). */
int model_config_read(const struct json_doc *d, const struct json_path *at, const json_t *o, struct model_config *out,
		      struct err *e);

#endif
