/* SPDX-License-Identifier: Apache-2.0 */
#ifndef SHARDMESH_MESH_EXPORT_H
#define SHARDMESH_MESH_EXPORT_H

#include "mesh/mesh.h"

/* The model on its way from the shard services to RUN_DIR/model. */
struct export;

struct export_config {
	const struct job_config *job;
	const char *run_dir;
	const uint32_t *shards; /* member ids, ascending */
	uint32_t n_shards;
	/* Asks a shard service; 0 or -Exxx, then the export has failed. */
	int (*send)(void *ctx, uint32_t member, const struct msg_export_read *m);
	void *ctx;
};
/* Opens RUN_DIR/model.tmp and asks for the first pieces. */
int export_open(const struct export_config *cfg, struct export **out, struct err *e);
/*
 * A piece came. 1: the model is complete in RUN_DIR/model; 0: more is to come;
 * -EPROTO: this member was not asked for that, nothing has changed; else the
 * export has failed.
 */
int export_take(struct export *x, uint32_t member, const struct msg_export_data *m, struct err *e);
/* Whatever is not complete is removed. */
void export_free(struct export *x);

#endif
