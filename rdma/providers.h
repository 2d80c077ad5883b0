/* SPDX-License-Identifier: Apache-2.0 */
/* rdma, private: the ops tables that fabric.c chooses from. */
#ifndef SHARDMESH_PROVIDERS_H
#define SHARDMESH_PROVIDERS_H

#include "rdma/fabric.h"

extern const struct fab_ops fab_local_ops, fab_local_copy_ops, fab_ofi_ops, fab_verbs_ops;

#endif
