/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Who began it, when a number is not finite. A loss that is none came through
 * the residual stream, and that is kept at every block's border: the first
 * border with such a number is behind the unit that made it. Backward, what is
 * not finite in one unit is in every unit before it, since the residual
 * stream's gradient is added to; so a look at what reaches the embedding tells
 * for all of them, and costs a pass over one layer's width.
 */
#include "worker/net.h"

#include <math.h>
#include <string.h>

#define EXPONENT 0x7f800000u

static bool all_finite(const float *x, size_t n)
{
	uint32_t bad = 0;

	for (size_t i = 0; i < n; i++) {
		uint32_t bits;

		memcpy(&bits, &x[i], sizeof(bits));
		bad |= (bits & EXPONENT) == EXPONENT;
	}
	return !bad;
}

/* The unit behind whose output the micro-batch's numbers are not finite. */
static uint32_t first_unit(const struct net *n, uint32_t micro)
{
	size_t floats = (size_t)net_rows(n) * n->cfg.model->n_embd;

	for (uint32_t i = 0; i <= n->cfg.model->n_layer; i++)
		if (!all_finite(n->act.boundary[i] + micro * floats, floats))
			return i;
	return net_unit_head(n);
}

bool net_finite(const struct net *n, bool *of_loss, uint32_t *micro, uint32_t *unit)
{
	size_t floats = (size_t)net_rows(n) * n->cfg.model->n_embd;

	for (uint32_t i = 0; i < n->n_mb; i++) {
		*micro = i;
		*of_loss = !isfinite(n->act.loss[i]);
		if (*of_loss) {
			*unit = first_unit(n, i);
			return false;
		}
	}
	for (uint32_t i = 0; i < n->n_mb && n->training; i++) {
		*micro = i;
		if (!all_finite(n->act.dx + i * floats, floats))
			return false;
	}
	return true;
}
