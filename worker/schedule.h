/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A leased span as a sequence of uses: forward unit by unit for all of its
 * micro-batches, then backward unit by unit. Where parameters come from and
 * gradients go is behind hooks: the program's fetch and push, or plain memory.
 */
#ifndef SHARDMESH_WORKER_SCHEDULE_H
#define SHARDMESH_WORKER_SCHEDULE_H

#include "worker/net.h"

struct span_hooks {
	/* At every unit border. 0, or -ECANCELED: the lease was recalled; -Exxx ends the span. */
	int (*border)(void *ctx);
	/*
	 * Use `use` begins: waits for its units; params[i] is the flat vector of
	 * its i-th unit, valid until used(). -ECANCELED, -ESTALE (a newer version
	 * is there), -Exxx.
	 */
	int (*units)(void *ctx, uint32_t use, const struct use *u, const float *params[2]);
	void (*used)(void *ctx, uint32_t use);
	/* A free gradient buffer for (unit, part); waits for one. */
	int (*gradient)(void *ctx, uint32_t unit, uint32_t part, float **buffer);
	/* The span's gradient of (unit, part) is in the buffer, complete in memory. */
	int (*final)(void *ctx, uint32_t unit, uint32_t part, float *buffer);
	void *ctx;
};

struct span {
	uint64_t step;
	uint32_t first, n_mb; /* micro-batches [first, first + n_mb) */
	bool training;        /* else forward only */
};

/*
 * Computes a span whose tokens and targets are in net->act. uses, n_uses: what
 * net_uses gave. *loss: tree sum of the micro-batches' mean losses. The first
 * error of a hook, or the stream's, ends it.
 */
int span_run(struct net *n, const struct span *s, const struct use *uses, uint32_t n_uses,
	     const struct span_hooks *hooks, double *loss);

/* Sum along the tree of the reduction: tree(l) + tree(n - l), l the largest power of two below n. */
double tree_sum(const double *v, uint32_t n);

#endif
