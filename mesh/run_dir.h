/* SPDX-License-Identifier: Apache-2.0 */
#ifndef SHARDMESH_MESH_RUN_DIR_H
#define SHARDMESH_MESH_RUN_DIR_H

#include "mesh/mesh.h"

#include <limits.h>

/* What the coordinator writes; the launcher's token and log/ lie beside it. */
struct run_dir {
	char path[PATH_MAX];
	int lock_fd, steps_fd;
	uint64_t steps_bytes; /* of whole lines */
};

/*
 * Creates the directory if it is not there, locks it, and writes job.json and
 * config.json. -EINVAL: it holds another job; -EBUSY: another coordinator is at
 * work in it; else what the file system said. e is one message.
 */
int run_dir_open(struct run_dir *r, const char *path, const char *job, const uint8_t id[16], const char *config,
		 struct err *e);
/* RUN_DIR/endpoint, for those who look for the coordinator; removed by run_dir_release. */
int run_dir_endpoint(struct run_dir *r, const char *endpoint, struct err *e);
/* Appends one line to steps.jsonl by one write. After an error the file ends with the last whole line. */
int run_dir_line(struct run_dir *r, const char *line, size_t bytes, struct err *e);
int run_dir_summary(struct run_dir *r, const char *json, struct err *e);
void run_dir_release(struct run_dir *r);

#endif
