/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Sums on a host with a rule that looks right: whoever gave its sum to a
 * neighbour is done with it when the neighbour is gone, since the addition was
 * made. But the sum died with the neighbour, before the owners had it; the span
 * counts as done, so that nobody is asked for it again. Linked instead of the
 * real one, so that the simulator can show that it notices.
 */
#include "worker/subtree.h"

void real_subtree_gone(struct subtree *s, uint32_t member, uint64_t now_ns);
#define subtree_gone real_subtree_gone
#include "worker/subtree.c"
#undef subtree_gone

void subtree_gone(struct subtree *s, uint32_t member, uint64_t now_ns)
{
	for (uint32_t k = 0; s->active && k < n_items(s); k++)
		if (s->item[k].state == SUBTREE_GIVEN && s->item[k].with == member)
			end_item(s, &s->item[k], true);
	real_subtree_gone(s, member, now_ns);
}
