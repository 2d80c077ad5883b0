/* SPDX-License-Identifier: Apache-2.0 */
#include "mesh/commit.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

int loss_tree_init(struct loss_tree *t, uint32_t n_max)
{
	t->n = t->n_done = 0;
	t->level = malloc((size_t)n_max + 1);
	t->sum = calloc((size_t)n_max + 1, sizeof(double));
	if (t->level && t->sum)
		return 0;
	loss_tree_release(t);
	return -ENOMEM;
}

void loss_tree_release(struct loss_tree *t)
{
	free(t->level);
	free(t->sum);
}

void loss_tree_open(struct loss_tree *t, uint32_t n)
{
	t->n = n;
	t->n_done = 0;
	memset(t->level, LOSS_NONE, n);
}

void loss_tree_add(struct loss_tree *t, struct tree_node node, double sum)
{
	struct tree_node sibling, parent;
	bool left;

	assert(tree_valid(node, t->n) && t->level[node.first] == LOSS_NONE);
	t->n_done += tree_leaves(node, t->n);
	while (tree_sibling(node, t->n, &sibling, &parent, &left) && t->level[sibling.first] == sibling.level) {
		double other = t->sum[sibling.first];

		sum = left ? sum + other : other + sum;
		t->level[sibling.first] = LOSS_NONE;
		node = parent;
	}
	t->level[node.first] = (uint8_t)node.level;
	t->sum[node.first] = sum;
}

bool loss_tree_complete(const struct loss_tree *t)
{
	assert(t->n_done <= t->n);
	return t->n_done == t->n;
}

double loss_tree_mean(const struct loss_tree *t)
{
	assert(t->n && t->level[0] == tree_root(t->n).level);
	return t->sum[0] / t->n;
}

int vote_decode(const uint8_t bytes[72], struct exact_sum *out)
{
	uint64_t w[EXACT_SUM_WORDS + 1];

	for (size_t i = 0; i < ARRAY_LEN(w); i++) {
		w[i] = 0;
		for (int b = 7; b >= 0; b--)
			w[i] = w[i] << 8 | bytes[i * 8 + (size_t)b];
	}
	if (w[EXACT_SUM_WORDS] > 1)
		return -EINVAL;
	memcpy(out->w, w, sizeof(out->w));
	out->non_finite = w[EXACT_SUM_WORDS];
	return 0;
}

static int not_finite(const struct coord_config *cfg, uint64_t step, bool of_loss, const struct trouble *t,
		      struct err *e)
{
	if (of_loss && t->kind == TROUBLE_LOSS)
		return err_set(e, -EDOM,
			       "step %" PRIu64 ": the loss of micro-batch %u is not finite: unit %u is the first whose "
			       "values are not",
			       step, t->micro, t->unit);
	if (of_loss)
		return err_set(e, -EDOM,
			       "step %" PRIu64
			       ": the loss is not finite, though that of each micro-batch is: the sum of "
			       "micro-batches 0 to %u overflows behind unit %u",
			       step, cfg->n_micro - 1, t->unit);
	if (t->kind == TROUBLE_GRADIENT)
		return err_set(e, -EDOM,
			       "step %" PRIu64 ": the gradient is not finite: unit %u is the last with such a one, "
			       "micro-batch %u the first",
			       step, t->unit, t->micro);
	return err_set(e, -EDOM,
		       "step %" PRIu64 ": the gradient norm is not finite: unit %u is the last whose sum is not, of "
		       "micro-batches 0 to %u",
		       step, t->unit, cfg->n_micro - 1);
}

int commit_decide(const struct coord_config *cfg, uint64_t step, const struct exact_sum *square_sum, double loss,
		  const struct trouble *trouble, struct msg_step *out, struct err *e)
{
	double norm = sqrt(exact_sum_value(square_sum)) / cfg->n_micro, clip = 1.0;

	if (!isfinite(loss) || !isfinite(norm))
		return not_finite(cfg, step, !isfinite(loss), trouble, e);
	if (cfg->gradient_clipping > 0) {
		clip = cfg->gradient_clipping / (norm + 1e-6);
		clip = clip < 1.0 ? clip : 1.0;
	}
	*out = (struct msg_step){
		.has_commit = 1,
		.commit_step = step,
		.apply = 1,
		.grad_norm = norm,
		.grad_scale = clip / cfg->n_micro,
		.lr = cfg->lr(cfg->ctx, step),
		.bias1 = cfg->bias_correction ? 1.0 - det_pow_u64(cfg->beta1, step) : 1.0,
		.bias2 = cfg->bias_correction ? 1.0 - det_pow_u64(cfg->beta2, step) : 1.0,
		.loss = loss,
		.adam_t = step,
		.hash_wanted = cfg->state_hash_interval && step % cfg->state_hash_interval == 0,
	};
	return 0;
}
