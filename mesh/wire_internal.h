/* SPDX-License-Identifier: Apache-2.0 */
#ifndef SHARDMESH_MESH_WIRE_INTERNAL_H
#define SHARDMESH_MESH_WIRE_INTERNAL_H

#include "mesh/mesh.h"

/* Bytes wire_encode would write, or its error. */
int wire_size(unsigned type, const void *msg);
/* wire_check without the body: everything that can be known when the header is there. */
int wire_check_header(const struct wire_header *h, struct err *e);

#endif
