/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A coverage with a rule that looks right: sums are granted first come, first
 * served, while fewer than K are used, and nobody is always granted. It stops
 * as soon as K high nodes are held, because the low ones that would make room
 * are refused. Linked instead of the real one, so that the simulator can show
 * that it notices.
 */
#include "mesh/mesh.h"

bool real_coverage_next(struct coverage *c, struct coverage_action *out);
#define coverage_next real_coverage_next
#include "mesh/coverage.c"
#undef coverage_next

/* Ids grow with time, so by_id is the order of arrival. */
static bool next_come(struct coverage *c, struct coverage_action *out)
{
	for (uint32_t i = 0; i < c->n_offers && c->n_held + c->n_reserved < c->max_held; i++) {
		uint32_t slot = c->by_id[i];

		if (c->offer[slot].eager && admit(c, slot, true, out))
			return true;
	}
	return false;
}

bool coverage_next(struct coverage *c, struct coverage_action *out)
{
	if (next_answer(c, out))
		return true;
	if (c->closed)
		return false;
	if (coverage_complete(c))
		return next_root(c, out);
	return next_merge(c, out) || next_pushed(c, out) || next_come(c, out);
}
