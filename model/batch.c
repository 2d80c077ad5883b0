/* SPDX-License-Identifier: Apache-2.0 */
/*
 * DeepSpeed's three batch keys, without a fixed number of workers. T samples a
 * step in micro-batches of m make M = T / m micro-batches, whoever computes
 * them; gradient_accumulation_steps g only has to divide M. Where T or m is
 * missing, the number of workers at the first start supplies it, by DeepSpeed's
 * formulas, and T stays what it was when that number changes.
 */
#include "model/model.h"

#include <errno.h>

#define N_MICRO_MAX (1u << 20)
#define MICRO_BATCH_MAX (1u << 20)

static int fail_product(struct err *e, uint64_t t, uint64_t m, uint64_t g, uint64_t w)
{
	return err_set(e, -EINVAL,
		       "Check batch related parameters. train_batch_size is not equal to micro_batch_per_gpu * "
		       "gradient_acc_step * world_size %llu != %llu * %llu * %llu",
		       (unsigned long long)t, (unsigned long long)m, (unsigned long long)g, (unsigned long long)w);
}

int batch_resolve(const struct job_config *c, uint32_t workers, struct batch_plan *out, struct err *e)
{
	uint64_t t = c->train_batch_size, m = c->train_micro_batch_size_per_gpu, g = c->gradient_accumulation_steps;
	uint64_t w = workers ? workers : 1;
	uint64_t given_g = g ? g : 1;

	if (!t && !m)
		return err_set(e, -EINVAL,
			       "Either train_batch_size or train_micro_batch_size_per_gpu needs to be provided");
	if (!t)
		t = m * given_g * w;
	if (!m)
		m = t / w / given_g;
	if (!m || t % m || (t / m) % given_g)
		return fail_product(e, t, m, g ? g : (m ? t / m / w : 1), w);
	/* m was worked out from w, so here the product has to be exact. */
	if (!c->train_micro_batch_size_per_gpu && m * given_g * w != t)
		return fail_product(e, t, m, given_g, w);
	if (m > MICRO_BATCH_MAX)
		return err_set(e, -EINVAL,
			       "train_micro_batch_size_per_gpu: %llu is more than the %u that are supported",
			       (unsigned long long)m, MICRO_BATCH_MAX);
	if (t / m > N_MICRO_MAX)
		return err_set(
			e, -EINVAL,
			"train_batch_size: %llu samples in micro-batches of %llu are %llu micro-batches; at most %u "
			"are supported",
			(unsigned long long)t, (unsigned long long)m, (unsigned long long)(t / m), N_MICRO_MAX);
	*out = (struct batch_plan){ t, (uint32_t)m, (uint32_t)(t / m) };
	return 0;
}
