/* SPDX-License-Identifier: Apache-2.0 */
#ifndef SHARDMESH_WORKER_SLICES_H
#define SHARDMESH_WORKER_SLICES_H

#include "model/model.h"

/* What one fabric operation moves at most. */
#define SLICE_BYTES (512u << 10)
/* Slices on their way that lie in no one piece. */
#define PUSH_STAGING_SLOTS 8
#define PUSH_STAGING_BYTES ((uint64_t)PUSH_STAGING_SLOTS * SLICE_BYTES)

/*
 * Narrows a share to the pages of a part, part bounds rounded outward to whole
 * pages; share_offset counts from the first element that is left.
 */
void share_of_part(const struct share *s, const struct unit_part *part, uint64_t page, struct share *out);
/* Slices that a share is pushed in. */
uint32_t share_slices(const struct share *s);
/*
 * Slice k as pieces of the unit's flat vector, in order: element offset and
 * count of each. Returns how many; out holds max.
 */
struct slice_piece {
	uint64_t unit_offset, n;
};
uint32_t share_slice(const struct share *s, uint32_t k, struct slice_piece *out, uint32_t max);

#endif
