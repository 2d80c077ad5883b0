/* SPDX-License-Identifier: Apache-2.0 */
/* Batch arithmetic and learning rates, against DeepSpeed's formulas written out here with libm. */
#include "model/model.h"

#include <errno.h>
#include <math.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static void test_batch(void **state)
{
	static const struct {
		uint64_t t, m, g;
		uint32_t w;
		uint64_t want_t;
		uint32_t want_m, want_n;
	} good[] = {
		{ 32, 4, 0, 1, 32, 4, 8 },                              /* T and m: M = T / m */
		{ 32, 4, 0, 3, 32, 4, 8 },                              /* whatever the workers */
		{ 32, 4, 2, 3, 32, 4, 8 },                              /* g divides M and does nothing */
		{ 32, 4, 8, 100, 32, 4, 8 }, { 24, 0, 3, 2, 24, 4, 6 }, /* m = T / W / g */
		{ 24, 0, 0, 2, 24, 12, 2 },                             /* m = T / W */
		{ 0, 4, 3, 2, 24, 4, 6 },                               /* T = m g W */
		{ 0, 4, 0, 2, 8, 4, 2 },                                /* T = m W */
		{ 1, 1, 1, 5, 1, 1, 1 },
	};

	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(good); i++) {
		struct job_config c = { .train_batch_size = good[i].t,
					.train_micro_batch_size_per_gpu = good[i].m,
					.gradient_accumulation_steps = good[i].g };
		struct batch_plan b;
		struct err e = { 0 };

		if (batch_resolve(&c, good[i].w, &b, &e))
			fail_msg("case %zu: %s", i, e.text);
		assert_int_equal(b.train_batch_size, good[i].want_t);
		assert_int_equal(b.micro_batch, good[i].want_m);
		assert_int_equal(b.n_micro, good[i].want_n);
	}
}

static void test_batch_errors(void **state)
{
#define CHECK \
	"Check batch related parameters. train_batch_size is not equal to micro_batch_per_gpu * gradient_acc_step * world_size "
	static const struct {
		uint64_t t, m, g;
		uint32_t w;
		const char *message;
	} bad[] = {
		{ 0, 0, 0, 2, "Either train_batch_size or train_micro_batch_size_per_gpu needs to be provided" },
		{ 0, 0, 4, 2, "Either train_batch_size or train_micro_batch_size_per_gpu needs to be provided" },
		{ 32, 3, 0, 2, CHECK "32 != 3 * 5 * 2" },
		{ 32, 4, 3, 2, CHECK "32 != 4 * 3 * 2" },
		{ 32, 0, 0, 3, CHECK "32 != 10 * 1 * 3" },
		{ 32, 0, 5, 2, CHECK "32 != 3 * 5 * 2" },
		{ 2, 0, 0, 3, CHECK "2 != 0 * 1 * 3" },
		{ 1u << 21, 1, 0, 1,
		  "train_batch_size: 2097152 samples in micro-batches of 1 are 2097152 micro-batches; at most 1048576 are "
		  "supported" },
	};

	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
		struct job_config c = { .train_batch_size = bad[i].t,
					.train_micro_batch_size_per_gpu = bad[i].m,
					.gradient_accumulation_steps = bad[i].g };
		struct batch_plan b;
		struct err e = { 0 };

		assert_int_equal(batch_resolve(&c, bad[i].w, &b, &e), -EINVAL);
		assert_string_equal(e.text, bad[i].message);
	}
}

/* deepspeed/runtime/lr_schedules.py, t from 0. */
static double reference(const struct job_config *c, double t)
{
	const struct scheduler_config *s = &c->scheduler;
	double w = fmax(2, (double)s->warmup_num_steps), total = (double)s->total_num_steps;
	double gamma = s->log_warmup ? log(t + 1) / log(w) : t / w, p;

	if (s->type == SCHEDULER_NONE)
		return c->optimizer.lr;
	if (s->type == SCHEDULER_WARMUP_COSINE) {
		if (t < w)
			return c->optimizer.lr * (s->warmup_min_ratio + (1 - s->warmup_min_ratio) * gamma);
		p = fmin(1, (t - w + 1) / fmax(1, total - w));
		return c->optimizer.lr * fmax(0, s->cos_min_ratio + (1 - s->cos_min_ratio) * ((1 + cos(M_PI * p)) / 2));
	}
	if (t >= w)
		gamma = s->type == SCHEDULER_WARMUP ? 1 : fmax(0, (total - t) / fmax(1, total - w));
	return s->warmup_min_lr + (s->warmup_max_lr - s->warmup_min_lr) * gamma;
}

static void test_schedules(void **state)
{
	struct job_config c = { .optimizer.lr = 3e-4, .steps = 1000 };
	static const uint64_t warmups[] = { 1, 2, 10, 100 };
	static const uint64_t totals[] = { 5, 10, 11, 100, 120 };

	(void)state;
	c.scheduler = (struct scheduler_config){
		.warmup_min_lr = 1e-6, .warmup_max_lr = 5e-4, .warmup_min_ratio = 0.1, .cos_min_ratio = 0.01
	};
	for (int type = SCHEDULER_NONE; type <= SCHEDULER_WARMUP_COSINE; type++) {
		for (size_t i = 0; i < ARRAY_LEN(warmups) * ARRAY_LEN(totals) * 2; i++) {
			c.scheduler.type = (enum scheduler_type)type;
			c.scheduler.log_warmup = i % 2;
			c.scheduler.warmup_num_steps = warmups[i / 2 % ARRAY_LEN(warmups)];
			c.scheduler.total_num_steps = totals[i / 2 / ARRAY_LEN(warmups)];
			for (uint64_t step = 1; step <= 150; step++)
				assert_float_equal(schedule_lr(&c, step), reference(&c, (double)step - 1), 1e-15);
		}
	}
}

/* Values worked out by hand. */
static void test_known_rates(void **state)
{
	struct job_config c = { .optimizer.lr = 1, .steps = 12 };

	(void)state;
	c.scheduler = (struct scheduler_config){ .type = SCHEDULER_WARMUP, .warmup_max_lr = 1, .warmup_num_steps = 4 };
	assert_true(schedule_lr(&c, 1) == 0);
	assert_true(schedule_lr(&c, 3) == 0.5);
	assert_true(schedule_lr(&c, 5) == 1 && schedule_lr(&c, 1000) == 1);
	c.scheduler.log_warmup = true;
	assert_float_equal(schedule_lr(&c, 2), 0.5, 1e-15); /* ln 2 / ln 4 */
	/* total 0 is "auto": the job's steps */
	c.scheduler.type = SCHEDULER_WARMUP_DECAY;
	assert_true(schedule_lr(&c, 5) == 1);
	assert_true(schedule_lr(&c, 9) == 0.5); /* (12 - 8) / (12 - 4) */
	assert_true(schedule_lr(&c, 13) == 0 && schedule_lr(&c, 14) == 0);
	c.scheduler = (struct scheduler_config){ .type = SCHEDULER_WARMUP_COSINE,
						 .warmup_num_steps = 4,
						 .total_num_steps = 12 };
	assert_float_equal(schedule_lr(&c, 8), 0.5, 1e-15); /* (7 - 4 + 1) / 8 of half a turn */
	assert_float_equal(schedule_lr(&c, 12), 0, 1e-15);
	assert_float_equal(schedule_lr(&c, 100), 0, 1e-15);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_batch),
		cmocka_unit_test(test_batch_errors),
		cmocka_unit_test(test_schedules),
		cmocka_unit_test(test_known_rates),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
