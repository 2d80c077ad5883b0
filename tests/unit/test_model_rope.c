/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tables of rotary positions against transformers', by the numbers that
 * tests/peers/make_rope.py wrote. The roundings to fp32 are the same; the power
 * behind a frequency may differ in its last bit, which at position t turns an
 * angle by t * f * 2^-23.
 *
 * usage: test_model_rope [file of the numbers]
 */
#include "model/model.h"

#include <math.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#include <jansson.h>

static char path[4096];

struct exactness {
	uint64_t n, same;
};

static double number(const json_t *list, size_t position, size_t pair)
{
	return json_number_value(json_array_get(json_array_get(list, position), pair));
}

static void check_case(const json_t *c, struct exactness *x)
{
	uint32_t length = (uint32_t)json_integer_value(json_object_get(c, "length"));
	const json_t *positions = json_object_get(c, "positions");
	char *text = json_dumps(json_object_get(c, "config"), 0);
	float *cosine, *sine;
	struct model_config m;
	struct err e = { 0 };
	uint32_t half;

	if (model_config_parse(text, "rope.json", &m, &e))
		fail_msg("%s: %s", text, e.text);
	half = m.rope.rot / 2;
	cosine = malloc((size_t)length * half * sizeof(*cosine));
	sine = malloc((size_t)length * half * sizeof(*sine));
	model_rope_tables(&m, length, cosine, sine);
	for (size_t k = 0; k < json_array_size(positions); k++) {
		size_t t = (size_t)json_integer_value(json_array_get(positions, k));
		double slack = 2.4e-7 + (double)t * 0x1p-22;

		for (uint32_t i = 0; i < half; i++) {
			float wc = (float)number(json_object_get(c, "cos"), k, i);
			float ws = (float)number(json_object_get(c, "sin"), k, i);
			float gc = cosine[t * half + i], gs = sine[t * half + i];

			if (fabs((double)gc - wc) > slack || fabs((double)gs - ws) > slack)
				fail_msg("%s: position %zu pair %u: (%.9g, %.9g), transformers (%.9g, %.9g)", text, t,
					 i, gc, gs, wc, ws);
			x->n++;
			x->same += fabs((double)gc - wc) <= 2.4e-7 && fabs((double)gs - ws) <= 2.4e-7;
		}
	}
	free(cosine);
	free(sine);
	free(text);
	model_config_release(&m);
}

static void test_transformers(void **state)
{
	struct exactness x = { 0 };
	json_error_t je;
	json_t *list;

	(void)state;
	list = json_load_file(path, 0, &je);
	if (!list)
		fail_msg("%s: %s", path, je.text);
	assert_true(json_array_size(list) >= 10);
	for (size_t i = 0; i < json_array_size(list); i++)
		check_case(json_array_get(list, i), &x);
	json_decref(list);
	print_message("%llu of %llu pairs to the last bits\n", (unsigned long long)x.same, (unsigned long long)x.n);
	/* Far positions of the few frequencies that are an ulp off are all that may miss. */
	assert_true(x.same * 100 >= x.n * 98);
}

/* The tables of a shorter sequence are the head of a longer one's, unless the type looks at the length. */
static void test_prefix(void **state)
{
	static const char *const configs[] = {
		"{\"model_type\": \"llama\", \"hidden_size\": 8, \"num_attention_heads\": 1}",
		"{\"model_type\": \"llama\", \"hidden_size\": 8, \"num_attention_heads\": 1,"
		" \"max_position_embeddings\": 16, \"rope_scaling\": {\"type\": \"dynamic\", \"factor\": 2}}",
	};
	float c[2][40 * 4], s[2][40 * 4];

	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(configs); i++) {
		struct model_config m;

		assert_int_equal(model_config_parse(configs[i], "x", &m, NULL), 0);
		model_rope_tables(&m, 16, c[0], s[0]);
		model_rope_tables(&m, 40, c[1], s[1]);
		assert_int_equal(memcmp(c[0], c[1], 16 * 4 * sizeof(float)) == 0, i == 0);
		assert_true(c[0][0] == 1 && s[0][0] == 0);
		model_config_release(&m);
	}
}

int main(int argc, char **argv)
{
	const char *source = getenv("SHARDMESH_SOURCE");
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_transformers),
		cmocka_unit_test(test_prefix),
	};

	snprintf(path, sizeof(path), "%s/tests/peers/rope.json", source ? source : ".");
	if (argc > 1)
		snprintf(path, sizeof(path), "%s", argv[1]);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
