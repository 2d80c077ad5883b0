/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tables of rotary positions. With d = rot elements turned, base b and
 * i = 0 .. d/2 - 1 (transformers, modeling_rope_utils.py; the default in
 * modeling_llama.py, compute_default_rope_parameters):
 *
 *   p_i = b^(2i/d), f_i = 1 / p_i; position t turns pair i by t * f_i
 *   linear   f_i / factor
 *   dynamic  b * (factor * L / N - (factor - 1))^(d / (d - 2)) in b's place, with L the
 *            sequence's length, not below N = max_position_embeddings
 *   llama3   wavelength w = 2 pi / f_i, O the original length: f_i where w < O / high,
 *            f_i / factor where w > O / low, between them (1 - s) f_i / factor + s f_i with
 *            s = (O / w - low) / (high - low)
 *   yarn     f_i / factor * r + f_i * (1 - r), r a ramp over i from 0 to 1 between the
 *            dimensions that turn beta_fast and beta_slow times over the original length
 *            (Peng et al. 2023); cosine and sine times attention_factor
 *
 * transformers computes all of it in fp32, and at far positions the roundings
 * are large: at position 100,000 the last bit of a frequency near 1 turns by
 * 0.006. So the roundings are made where transformers makes them; what is left
 * is that its power is within an ulp and ours is rounded correctly.
 */
#include "model/model.h"

#include <assert.h>
#include <float.h>
#include <math.h>
#include <stdlib.h>

#define TWO_PI 6.28318530717958647692
/* 2 pi in two pieces; the first has 33 bits, so that its product with a number of turns is exact. */
#define TWO_PI_HI 6.28318530693650245667e+00
#define TWO_PI_LO 2.43084020260247700000e-10
#define POSITIONS_MAX (1u << 24)

static float power(double base, float exponent)
{
	return exponent == 0 ? 1.0f : (float)det_pow(base, (double)exponent);
}

/* b^(2i/d) */
static float pair_power(double base, uint32_t i, uint32_t rot)
{
	return power((double)(float)base, (float)(2 * i) / (float)rot);
}

static double dynamic_base(const struct model_config *m, uint32_t positions)
{
	const struct rope_config *r = &m->rope;
	double length = positions > m->n_positions ? positions : m->n_positions;
	double stretch = r->factor * length / m->n_positions - (r->factor - 1);

	if (stretch == 1 || r->rot <= 2)
		return r->theta;
	return fmin(r->theta * det_pow(stretch, (double)r->rot / ((double)r->rot - 2)), FLT_MAX);
}

static float llama3_frequency(const struct rope_config *r, float f)
{
	float old = (float)r->original_max_position_embeddings, factor = (float)r->factor;
	float low = (float)r->low_freq_factor, span = (float)(r->high_freq_factor - r->low_freq_factor);
	float wavelength = (float)TWO_PI / f, s;

	if (wavelength > (float)(r->original_max_position_embeddings / r->low_freq_factor))
		return f / factor;
	if (wavelength < (float)(r->original_max_position_embeddings / r->high_freq_factor))
		return f;
	s = (old / wavelength - low) / span;
	return (1.0f - s) * f / factor + s * f;
}

/* The dimension whose pair turns `turns` times over the original length. */
static double yarn_dimension(const struct rope_config *r, double turns)
{
	return r->rot * det_log(r->original_max_position_embeddings / (turns * TWO_PI)) / (2 * det_log(r->theta));
}

static float yarn_frequency(const struct rope_config *r, uint32_t i, float p)
{
	double low = yarn_dimension(r, r->beta_fast), high = yarn_dimension(r, r->beta_slow);
	float ramp, keep;

	if (r->truncate) {
		low = floor(low);
		high = ceil(high);
	}
	low = low < 0 ? 0 : low;
	high = high > r->rot - 1 ? r->rot - 1 : high;
	if (low == high)
		high += 0.001;
	ramp = ((float)i - (float)low) / (float)(high - low);
	ramp = ramp < 0 ? 0 : ramp > 1 ? 1 : ramp;
	keep = 1.0f - ramp;
	return 1.0f / ((float)r->factor * p) * (1.0f - keep) + 1.0f / p * keep;
}

static float frequency(const struct model_config *m, double base, uint32_t i)
{
	const struct rope_config *r = &m->rope;
	float p = pair_power(base, i, r->rot), f = 1.0f / p;

	switch (r->type) {
	case ROPE_DEFAULT:
	case ROPE_DYNAMIC:
		break;
	case ROPE_LINEAR:
		return f / (float)r->factor;
	case ROPE_LLAMA3:
		return llama3_frequency(r, f);
	case ROPE_YARN:
		return yarn_frequency(r, i, p);
	}
	return f;
}

void model_rope_tables(const struct model_config *m, uint32_t positions, float *cosine, float *sine)
{
	uint32_t half = m->rope.rot / 2;
	double base = m->rope.type == ROPE_DYNAMIC ? dynamic_base(m, positions) : m->rope.theta;
	float scale = (float)m->rope.attention_factor;

	assert(m->rope.rot > 0 && m->rope.rot % 2 == 0 && positions <= POSITIONS_MAX);
	for (uint32_t i = 0; i < half; i++) {
		float f = frequency(m, base, i);

		for (uint32_t t = 0; t < positions; t++) {
			double angle = (double)((float)t * f), turns = floor(angle / TWO_PI), s, c;

			angle = (angle - turns * TWO_PI_HI) - turns * TWO_PI_LO;
			det_sincos(angle, &s, &c);
			cosine[(size_t)t * half + i] = (float)c * scale;
			sine[(size_t)t * half + i] = (float)s * scale;
		}
	}
}
