/* SPDX-License-Identifier: Apache-2.0 */
/* rdma, private: the ops tables that fabric.c chooses from. */
#ifndef SHARDMESH_PROVIDERS_H
#define SHARDMESH_PROVIDERS_H

#include "rdma/fabric.h"

extern const struct fab_ops fab_local_ops, fab_local_copy_ops, fab_ofi_ops, fab_verbs_ops;

/* fault.c: --fabric "fault:SPEC:provider" */
#define FAULT_PREFIX "fault:"
/* -EINVAL, -ENOTSUP: e says what is wrong with it. */
int fab_fault_check(const char *want, struct err *e);
/* The provider with faults, under the same name; it reads fab_config.want. */
const struct fab_ops *fab_fault(const struct fab_ops *ops);

#endif
