/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rotary positions as a config.json says them. transformers 4 writes rope_theta
 * and a rope_scaling (null for none) whose type is under "type" or "rope_type";
 * transformers 5 writes all of it into rope_parameters. Each type has its own
 * parameters; another's would be passed over there and is refused here.
 */
#include "model/hf_config.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Parameters by the types that have them, a bit each. */
#define BIT(type) (1u << (type))
#define SCALED (BIT(ROPE_LINEAR) | BIT(ROPE_DYNAMIC) | BIT(ROPE_LLAMA3) | BIT(ROPE_YARN))
#define EVERY (SCALED | BIT(ROPE_DEFAULT))
/* Some files give "dynamic" an original length; no version of transformers has used it. */
#define ORIGINAL (BIT(ROPE_DYNAMIC) | BIT(ROPE_LLAMA3) | BIT(ROPE_YARN))

static const char *const type_names[] = { "default", "linear", "dynamic", "llama3", "yarn" };

struct rope_read {
	struct hf_parse *p;
	struct json_path at; /* of the object, when there is one */
	const json_t *o;     /* rope_parameters or rope_scaling, or NULL */
	struct rope_config r;
	double mscale, mscale_all_dim; /* 0: not given */
	double partial;
	double original;
};

static const struct rope_key {
	const char *name;
	unsigned types, required;
	double min, max;
	size_t offset; /* of a double in struct rope_read */
} keys[] = {
#define AT(field) offsetof(struct rope_read, field)
	{ "rope_theta", EVERY, 0, 1.001, 1e15, AT(r.theta) },
	{ "partial_rotary_factor", EVERY, 0, 0, 1, AT(partial) },
	{ "factor", SCALED, SCALED & ~BIT(ROPE_YARN), 1, 1e6, AT(r.factor) },
	{ "low_freq_factor", BIT(ROPE_LLAMA3), BIT(ROPE_LLAMA3), 1e-6, 1e6, AT(r.low_freq_factor) },
	{ "high_freq_factor", BIT(ROPE_LLAMA3), BIT(ROPE_LLAMA3), 1e-6, 1e6, AT(r.high_freq_factor) },
	{ "original_max_position_embeddings", ORIGINAL, 0, 1, 1 << 24, AT(original) },
	{ "attention_factor", BIT(ROPE_YARN), 0, 1e-6, 1e6, AT(r.attention_factor) },
	{ "beta_fast", BIT(ROPE_YARN), 0, 1e-3, 1e6, AT(r.beta_fast) },
	{ "beta_slow", BIT(ROPE_YARN), 0, 1e-3, 1e6, AT(r.beta_slow) },
	{ "mscale", BIT(ROPE_YARN), 0, 0, 1e6, AT(mscale) },
	{ "mscale_all_dim", BIT(ROPE_YARN), 0, 0, 1e6, AT(mscale_all_dim) },
#undef AT
};

static int find_object(struct rope_read *x)
{
	const json_t *five = hf_given(x->p->o, "rope_parameters"), *four = hf_given(x->p->o, "rope_scaling");
	char words[64];

	x->at = (struct json_path){ x->p->at, five ? "rope_parameters" : "rope_scaling" };
	x->o = five ? five : four;
	if (five && four && !json_equal(five, four))
		return json_fail(x->p->doc, &x->at, x->p->e,
				 "means the same as rope_scaling, which is given another value");
	if (x->o && !json_is_object(x->o))
		return json_fail(x->p->doc, &x->at, x->p->e, "expected an object, found %s", json_words(x->o, words));
	return 0;
}

static int read_type(struct rope_read *x)
{
	const json_t *v = hf_given(x->o, "rope_type"), *old = hf_given(x->o, "type");
	struct json_path path = { &x->at, v ? "rope_type" : "type" };
	char words[64];

	if (v && old && !json_equal(v, old))
		return json_fail(x->p->doc, &path, x->p->e, "means the same as type, which is given another value");
	v = v ? v : old;
	if (!v)
		return 0;
	for (size_t i = 0; i < ARRAY_LEN(type_names); i++) {
		if (json_is_string(v) && !strcmp(json_string_value(v), type_names[i])) {
			x->r.type = (enum rope_type)i;
			return 0;
		}
	}
	return json_fail(x->p->doc, &path, x->p->e,
			 "%s is not built; \"default\", \"linear\", \"dynamic\", \"llama3\" and \"yarn\" are",
			 json_words(v, words));
}

static int read_number(struct rope_read *x, const struct json_path *path, const struct rope_key *k, const json_t *v)
{
	return json_read_f64(x->p->doc, path, v, k->min, k->max, (double *)((char *)x + k->offset), x->p->e);
}

static const struct rope_key *find_row(const char *name)
{
	for (size_t i = 0; i < ARRAY_LEN(keys); i++)
		if (!strcmp(keys[i].name, name))
			return &keys[i];
	return NULL;
}

static int read_member(struct rope_read *x, const char *name, const json_t *v)
{
	struct json_path path = { &x->at, name };
	const struct rope_key *k = find_row(name);

	if (json_is_null(v) || !strcmp(name, "type") || !strcmp(name, "rope_type"))
		return 0;
	if (!strcmp(name, "truncate") && x->r.type == ROPE_YARN)
		return json_read_bool(x->p->doc, &path, v, &x->r.truncate, x->p->e);
	if (!k || !(k->types & BIT(x->r.type)))
		return json_fail(x->p->doc, &path, x->p->e, "rotary positions of type \"%s\" have no such parameter",
				 type_names[x->r.type]);
	return read_number(x, &path, k, v);
}

static int read_members(struct rope_read *x)
{
	const char *name;
	json_t *v;
	int rc = 0;

	json_object_foreach((json_t *)x->o, name, v)
	{
		if (!rc)
			rc = read_member(x, name, v);
	}
	for (size_t i = 0; i < ARRAY_LEN(keys) && !rc; i++)
		if (keys[i].required & BIT(x->r.type) && !hf_given(x->o, keys[i].name))
			rc = json_fail(x->p->doc, &x->at, x->p->e, "type \"%s\" needs %s", type_names[x->r.type],
				       keys[i].name);
	return rc;
}

/* A parameter that may also stand beside the object; there it may only say the same. */
static int read_outer(struct rope_read *x, const char *name)
{
	const json_t *v = hf_given(x->p->o, name), *inner = hf_given(x->o, name);
	struct json_path path = { x->p->at, name };

	if (!v)
		return 0;
	if (inner && json_number_value(v) != json_number_value(inner))
		return json_fail(x->p->doc, &path, x->p->e, "%s gives it another value", x->at.key);
	return read_number(x, &path, find_row(name), v);
}

/* yarn's scale of cosine and sine: transformers, _compute_yarn_parameters, get_mscale. */
static double yarn_scale(double factor, double mscale)
{
	return factor <= 1 ? 1.0 : 0.1 * mscale * det_log(factor) + 1.0;
}

static int finish_yarn(struct rope_read *x)
{
	struct rope_config *r = &x->r;

	if (r->factor == 0)
		r->factor = (double)x->p->m->n_positions / r->original_max_position_embeddings;
	if (r->attention_factor == 0 && x->mscale != 0 && x->mscale_all_dim != 0)
		r->attention_factor = yarn_scale(r->factor, x->mscale) / yarn_scale(r->factor, x->mscale_all_dim);
	else if (r->attention_factor == 0)
		r->attention_factor = yarn_scale(r->factor, 1);
	r->beta_fast = r->beta_fast == 0 ? 32 : r->beta_fast;
	r->beta_slow = r->beta_slow == 0 ? 1 : r->beta_slow;
	if (r->beta_fast < r->beta_slow)
		return json_fail(x->p->doc, &x->at, x->p->e, "beta_fast is less than beta_slow");
	return 0;
}

static int finish(struct rope_read *x)
{
	struct json_path partial = { x->p->at, "partial_rotary_factor" };
	struct rope_config *r = &x->r;
	struct model_config *m = x->p->m;

	r->rot = m->head_dim;
	if ((uint32_t)(m->head_dim * x->partial) != m->head_dim)
		return json_fail(x->p->doc, &partial, x->p->e,
				 "transformers turns whole heads in a model of this type; only 1 is built");
	if (r->type == ROPE_LLAMA3 || r->type == ROPE_YARN)
		r->original_max_position_embeddings = x->original == 0 ? m->n_positions : (uint32_t)x->original;
	if (r->type == ROPE_LLAMA3 && r->high_freq_factor <= r->low_freq_factor)
		return json_fail(x->p->doc, &x->at, x->p->e, "high_freq_factor is not above low_freq_factor");
	if (r->type == ROPE_YARN)
		return finish_yarn(x);
	r->attention_factor = 1;
	return 0;
}

int hf_rope_read(struct hf_parse *p)
{
	struct rope_read x = { .p = p, .r = { .theta = 10000, .truncate = true }, .partial = 1 };
	int rc = find_object(&x);

	if (!rc)
		rc = read_type(&x);
	if (!rc && x.o)
		rc = read_members(&x);
	if (!rc)
		rc = read_outer(&x, "rope_theta");
	if (!rc)
		rc = read_outer(&x, "partial_rotary_factor");
	if (!rc)
		rc = read_outer(&x, "original_max_position_embeddings");
	if (!rc)
		rc = finish(&x);
	if (!rc)
		p->m->rope = x.r;
	return rc;
}
