/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A coverage with a rule that looks right: what overlaps anything that is held
 * is dropped as a repetition. But a span may have been cut differently when it
 * was leased again, so that a node comes of which only a part is here; dropped,
 * the rest of it never comes. Linked instead of the real one, so that the
 * simulator can show that it notices.
 */
#include "mesh/mesh.h"

bool real_coverage_next(struct coverage *c, struct coverage_action *out);
#define coverage_next real_coverage_next
#include "mesh/coverage.c"
#undef coverage_next

/* By offer, before anything else is decided: it is told covered though only something below it is held. */
static bool next_overlap(struct coverage *c, struct coverage_action *out)
{
	for (uint32_t i = 0; i < c->n_by_node; i++) {
		uint32_t slot = c->by_node[i];
		struct coverage_offer *o = &c->offer[slot];
		uint32_t sum;

		if (o->state == OFFER_PUSHING || !is_begun(c, o->node))
			continue;
		sum = unreserve(c, o);
		if (sum != COVERAGE_NO_SUM)
			give(c, sum);
		*out = (struct coverage_action){ .type = COVERAGE_ANSWER, .offer = o->id, .verdict = OFFER_COVERED };
		drop(c, slot);
		return true;
	}
	return false;
}

bool coverage_next(struct coverage *c, struct coverage_action *out)
{
	if (!c->closed && !coverage_complete(c) && next_overlap(c, out))
		return true;
	return real_coverage_next(c, out);
}
