/* SPDX-License-Identifier: Apache-2.0 */
/* Which micro-batch and which unit a number that is not finite is laid to. */
#include "worker/net.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

enum { LAYERS = 3, C = 5, BATCH = 2, SEQ = 3, MICRO = 3, FLOATS = BATCH * SEQ * C };

/* A span that was computed: what the search looks at. */
struct span_end {
	struct model_config model;
	struct net net;
	float boundary[LAYERS + 1][MICRO * FLOATS], dx[MICRO * FLOATS];
	float *boundaries[LAYERS + 1];
	double loss[MICRO];
};

static void span_end_init(struct span_end *s, bool training)
{
	memset(s, 0, sizeof(*s));
	s->model.n_layer = LAYERS;
	s->model.n_embd = C;
	for (uint32_t i = 0; i <= LAYERS; i++)
		s->boundaries[i] = s->boundary[i];
	s->net = (struct net){
		.cfg = { .model = &s->model, .batch = BATCH },
		.act = { .boundary = s->boundaries, .dx = s->dx, .loss = s->loss },
		.n_mb = MICRO,
		.seq = SEQ,
		.training = training,
	};
}

static void finite_is_finite(void **state)
{
	struct span_end s;
	uint32_t micro, unit;
	bool of_loss;
	(void)state;

	span_end_init(&s, true);
	s.dx[3] = 3e38f;
	s.boundary[1][7] = -3e38f;
	assert_true(net_finite(&s.net, &of_loss, &micro, &unit));
}

/* The first border behind which the micro-batch has such numbers; none: the head itself. */
static void a_loss_is_followed_to_its_unit(void **state)
{
	struct span_end s;
	uint32_t micro, unit;
	bool of_loss;
	(void)state;

	for (uint32_t from = 0; from <= LAYERS + 1; from++) {
		span_end_init(&s, from % 2);
		s.loss[1] = from % 2 ? NAN : INFINITY;
		for (uint32_t l = from; l <= LAYERS; l++)
			s.boundary[l][FLOATS + 4] = l % 2 ? NAN : -INFINITY;
		s.boundary[0][2 * FLOATS] = NAN; /* another micro-batch's */
		assert_false(net_finite(&s.net, &of_loss, &micro, &unit));
		assert_true(of_loss);
		assert_int_equal(micro, 1);
		assert_int_equal(unit, from);
	}
}

static void a_gradient_is_laid_to_its_micro_batch(void **state)
{
	struct span_end s;
	uint32_t micro, unit;
	bool of_loss;
	(void)state;

	span_end_init(&s, true);
	s.dx[3 * FLOATS - 1] = INFINITY;
	assert_false(net_finite(&s.net, &of_loss, &micro, &unit));
	assert_false(of_loss);
	assert_int_equal(micro, 2);
	/* An evaluation has no gradient: what lies there is an older span's. */
	s.net.training = false;
	assert_true(net_finite(&s.net, &of_loss, &micro, &unit));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(finite_is_finite),
		cmocka_unit_test(a_loss_is_followed_to_its_unit),
		cmocka_unit_test(a_gradient_is_laid_to_its_micro_batch),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
