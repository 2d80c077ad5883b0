/* SPDX-License-Identifier: Apache-2.0 */
#ifndef SHARDMESH_KERNELS_CPU_POOL_H
#define SHARDMESH_KERNELS_CPU_POOL_H

#include "base/base.h"

struct pool;

/* Runs task `task` of a job on thread `thread` (0: the driving thread). */
typedef void pool_task(void *job, unsigned thread, uint32_t task);

/*
 * threads - 1 threads are started; each calls thread_init(arg) first (or NULL).
 * -ENOMEM, -EAGAIN.
 */
int pool_open(unsigned threads, void (*thread_init)(void *arg), void *arg, struct pool **out);
void pool_close(struct pool *p);
/* Runs tasks 0..n-1 and returns when all are done. Only the thread that opened the pool may call it. */
void pool_run(struct pool *p, pool_task *fn, void *job, uint32_t n);

#endif
