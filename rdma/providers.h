/* SPDX-License-Identifier: Apache-2.0 */
/* rdma, private: the ops tables that fabric.c chooses from, and what they share. */
#ifndef SHARDMESH_PROVIDERS_H
#define SHARDMESH_PROVIDERS_H

#include "rdma/fabric.h"

extern const struct fab_ops fab_local_ops, fab_local_copy_ops, fab_ofi_ops, fab_verbs_ops;

/* memory.c: what providers do alike. */

const char *fab_region_name(const struct fab_region_attr *a);
/* -ENOTSUP: not host memory; -EINVAL: no size. */
int fab_region_check(const struct fab_region_attr *a, const char *provider, struct err *e);
/* Private memory, populated: huge pages when they are asked for and there, else ordinary ones, and the log says why. */
int fab_memory_map(struct log *log, const struct fab_region_attr *a, uint8_t **base, uint64_t *bytes);
/* Tells the log that a region has ordinary pages instead. */
void fab_no_huge_pages(struct log *log, const struct fab_region_attr *a, int error);
/* fab_ops.map where memory is not shared. */
int fab_no_map(struct fab_remote *r, uint64_t offset, uint64_t bytes, void *at, void **out);

/* -EINVAL: no bytes; -ERANGE: outside of one of the two regions, of so many bytes. */
int fab_op_check(const struct fab_op *op, uint64_t remote_bytes, uint64_t local_bytes);

/* fault.c: --fabric "fault:SPEC:provider" */
#define FAULT_PREFIX "fault:"
/* -EINVAL, -ENOTSUP: e says what is wrong with it. */
int fab_fault_check(const char *want, struct err *e);
/* The provider with faults, under the same name; it reads fab_config.want. */
const struct fab_ops *fab_fault(const struct fab_ops *ops);

#endif
