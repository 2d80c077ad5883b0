/* SPDX-License-Identifier: Apache-2.0 */
/*
 * DeepSpeed's learning-rate schedules (deepspeed/runtime/lr_schedules.py), with
 * the routines of base, so that every machine computes the same bits. t counts
 * applied steps from 0: a step that was skipped does not advance the schedule.
 */
#include "model/model.h"

#include <assert.h>

#define PI 3.14159265358979323846

static uint64_t max_u64(uint64_t a, uint64_t b)
{
	return a > b ? a : b;
}

/* Rises from 0 to 1 over `warmup` steps; t < warmup. */
static double warmup_gamma(const struct scheduler_config *s, uint64_t t, uint64_t warmup)
{
	if (s->log_warmup)
		return det_log((double)t + 1) / det_log((double)warmup);
	return (double)t / (double)warmup;
}

/* Falls from 1 at the end of the warm-up to 0 at total. */
static double decay_gamma(uint64_t t, uint64_t warmup, uint64_t total)
{
	double left = t < total ? (double)(total - t) : 0;
	double span = total > warmup ? (double)(total - warmup) : 1;

	return left / span;
}

static double cosine_ratio(const struct scheduler_config *s, uint64_t t, uint64_t warmup, uint64_t total)
{
	double span = total > warmup ? (double)(total - warmup) : 1;
	double progress = (double)(t - warmup + 1) / span, sine, cosine, ratio;

	if (progress > 1)
		progress = 1;
	det_sincos(PI * progress, &sine, &cosine);
	ratio = s->cos_min_ratio + (1 - s->cos_min_ratio) * ((1 + cosine) / 2);
	return ratio > 0 ? ratio : 0;
}

double schedule_lr(const struct job_config *c, uint64_t adam_t)
{
	const struct scheduler_config *s = &c->scheduler;
	uint64_t t = adam_t - 1, warmup = max_u64(s->warmup_num_steps, 2);
	uint64_t total = s->total_num_steps ? s->total_num_steps : c->steps;
	double gamma = t < warmup ? warmup_gamma(s, t, warmup) : 1;

	assert(adam_t > 0);
	switch (s->type) {
	case SCHEDULER_NONE:
		break;
	case SCHEDULER_WARMUP_DECAY:
		if (t >= warmup)
			gamma = decay_gamma(t, warmup, total);
		return s->warmup_min_lr + (s->warmup_max_lr - s->warmup_min_lr) * gamma;
	case SCHEDULER_WARMUP:
		return s->warmup_min_lr + (s->warmup_max_lr - s->warmup_min_lr) * gamma;
	case SCHEDULER_WARMUP_COSINE:
		if (t >= warmup)
			return c->optimizer.lr * cosine_ratio(s, t, warmup, total);
		return c->optimizer.lr * (s->warmup_min_ratio + (1 - s->warmup_min_ratio) * gamma);
	}
	return c->optimizer.lr;
}
