/* SPDX-License-Identifier: Apache-2.0 */
#ifndef SHARDMESH_WORKER_SAMPLE_H
#define SHARDMESH_WORKER_SAMPLE_H

#include "base/base.h"

/*
 * The token that `uniform` in (0,1) picks from softmax(logits / temperature)
 * over the top_k largest logits (0: all; of equal ones the lower token first).
 * Temperature 0: the largest, of equal ones the lowest. scratch: [n] floats.
 */
uint32_t sample_token(const float *logits, uint32_t n, double temperature, uint32_t top_k, double uniform,
		      float *scratch);

#endif
