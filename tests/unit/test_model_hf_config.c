/* SPDX-License-Identifier: Apache-2.0 */
#include "model/model.h"

#include <errno.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#include <jansson.h>

static struct model_config parse_good(const char *text)
{
	struct model_config m;
	struct err e = { 0 };

	if (model_config_parse(text, "config.json", &m, &e))
		fail_msg("%s: %s", text, e.text);
	return m;
}

static void test_defaults(void **state)
{
	struct model_config m = parse_good("{}");

	(void)state;
	assert_int_equal(m.family, FAMILY_GPT2);
	assert_int_equal(m.vocab_size, 50257);
	assert_int_equal(m.n_positions, 1024);
	assert_int_equal(m.n_embd, 768);
	assert_int_equal(m.n_layer, 12);
	assert_int_equal(m.n_head, 12);
	assert_int_equal(m.n_inner, 3072);
	assert_int_equal(m.activation, 1);
	assert_true(m.layer_norm_epsilon == 1e-5f && m.initializer_range == 0.02f);
	assert_true(m.embd_pdrop == 0.1f && m.attn_pdrop == 0.1f && m.resid_pdrop == 0.1f);
	assert_true(m.tie_word_embeddings && m.scale_attn_weights);
	assert_false(m.scale_attn_by_inverse_layer_idx);
	model_config_release(&m);
}

/* The file as the hub has it, with its many keys that do nothing. */
static const char hub_file[] =
	"{\n"
	"  \"activation_function\": \"gelu_new\",\n"
	"  \"architectures\": [\"GPT2LMHeadModel\"],\n"
	"  \"attn_pdrop\": 0.0, \"bos_token_id\": 50256, \"embd_pdrop\": 0.2,\n"
	"  \"eos_token_id\": 50256, \"initializer_range\": 0.01,\n"
	"  \"layer_norm_epsilon\": 1e-06, \"model_type\": \"gpt2\", \"n_ctx\": 1024,\n"
	"  \"n_embd\": 64, \"n_head\": 8, \"n_inner\": null, \"n_layer\": 2, \"n_positions\": 512,\n"
	"  \"resid_pdrop\": 0.3, \"reorder_and_upcast_attn\": true, \"summary_type\": \"cls_index\",\n"
	"  \"scale_attn_by_inverse_layer_idx\": true, \"scale_attn_weights\": false,\n"
	"  \"task_specific_params\": {\"text-generation\": {\"do_sample\": true}},\n"
	"  \"tie_word_embeddings\": false, \"torch_dtype\": \"float16\", \"dtype\": \"bfloat16\",\n"
	"  \"transformers_version\": \"4.57.0\", \"use_cache\": true, \"vocab_size\": 1000\n"
	"}\n";

static void test_hub_file(void **state)
{
	struct model_config m = parse_good(hub_file);

	(void)state;
	assert_int_equal(m.vocab_size, 1000);
	assert_int_equal(m.n_positions, 512);
	assert_int_equal(m.n_inner, 256);
	assert_true(m.embd_pdrop == 0.2f && m.attn_pdrop == 0 && m.resid_pdrop == 0.3f);
	assert_true(m.layer_norm_epsilon == 1e-6f && m.initializer_range == 0.01f);
	assert_false(m.tie_word_embeddings);
	assert_false(m.scale_attn_weights);
	assert_true(m.scale_attn_by_inverse_layer_idx);
	model_config_release(&m);
}

static void test_written_back(void **state)
{
	struct model_config m = parse_good(hub_file), again;
	json_t *j = json_loads(m.json, 0, NULL);

	(void)state;
	assert_non_null(j);
	assert_string_equal(json_string_value(json_array_get(json_object_get(j, "architectures"), 0)),
			    "GPT2LMHeadModel");
	assert_string_equal(json_string_value(json_object_get(j, "model_type")), "gpt2");
	assert_string_equal(json_string_value(json_object_get(j, "torch_dtype")), "float32");
	assert_string_equal(json_string_value(json_object_get(j, "dtype")), "float32");
	assert_string_equal(json_string_value(json_object_get(j, "summary_type")), "cls_index");
	assert_int_equal(json_integer_value(json_object_get(j, "n_inner")), 256);
	assert_int_equal(json_integer_value(json_object_get(j, "n_ctx")), 1024);
	json_decref(j);
	again = parse_good(m.json);
	assert_memory_equal(&m, &again, offsetof(struct model_config, tie_word_embeddings));
	assert_string_equal(m.json, again.json);
	model_config_release(&again);
	model_config_release(&m);
	m = parse_good("{\"hidden_size\": 96, \"num_attention_heads\": 3}");
	assert_int_equal(m.n_embd, 96);
	j = json_loads(m.json, 0, NULL);
	assert_int_equal(json_integer_value(json_object_get(j, "n_embd")), 96);
	assert_null(json_object_get(j, "hidden_size"));
	assert_int_equal(json_integer_value(json_object_get(j, "vocab_size")), 50257);
	assert_string_equal(json_string_value(json_object_get(j, "activation_function")), "gelu_new");
	json_decref(j);
	model_config_release(&m);
	/* null is not given, under either name, and what is written can be read */
	m = parse_good("{\"hidden_size\": null, \"n_layer\": null, \"num_hidden_layers\": 3}");
	assert_int_equal(m.n_embd, 768);
	assert_int_equal(m.n_layer, 3);
	again = parse_good(m.json);
	assert_int_equal(again.n_layer, 3);
	model_config_release(&again);
	model_config_release(&m);
}

static void test_activations(void **state)
{
	/* The values of enum k_activation, which model does not know by name. */
	static const struct {
		const char *text;
		uint32_t value;
	} want[] = {
		{ "{\"activation_function\": \"gelu_new\"}", 1 },
		{ "{\"activation_function\": \"gelu_pytorch_tanh\"}", 1 },
		{ "{\"activation_function\": \"gelu\"}", 2 },
		{ "{\"activation_function\": \"relu\"}", 3 },
		{ "{\"activation_function\": \"silu\"}", 4 },
		{ "{\"activation_function\": null}", 1 },
	};

	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(want); i++) {
		struct model_config m = parse_good(want[i].text);

		assert_int_equal(m.activation, want[i].value);
		model_config_release(&m);
	}
}

static void test_messages(void **state)
{
	static const struct {
		const char *text, *message;
	} bad[] = {
		{ "[]", "config.json: expected an object { … }" },
		{ "{\"n_embd\": 0}", "config.json:1: n_embd: expected an integer from 1 to 1048576, found 0" },
		{ "{\n\"n_embd\": 10,\n\"n_head\": 3}",
		  "config.json:3: n_head: n_embd 10 is not a multiple of n_head 3" },
		{ "{\"n_embed\": 10}", "config.json:1: n_embed: unknown key; did you mean \"n_embd\"?" },
		{ "{\"layer_norm_eps\": 1e-5}",
		  "config.json:1: layer_norm_eps: unknown key; did you mean \"layer_norm_epsilon\"?" },
		{ "{\"n_embd\": 64, \"hidden_size\": 32}",
		  "config.json:1: hidden_size: means the same as n_embd, which is given another value" },
		{ "{\"model_type\": \"bloom\"}",
		  "config.json:1: model_type: \"bloom\" is not built; \"gpt2\", \"llama\", "
		  "\"mistral\", \"qwen2\" and \"qwen3\" are" },
		{ "{\"architectures\": [\"GPT2ForSequenceClassification\"]}",
		  "config.json:1: architectures: \"GPT2ForSequenceClassification\" is not built; \"GPT2LMHeadModel\" is" },
		{ "{\"activation_function\": \"tanh\"}",
		  "config.json:1: activation_function: expected gelu_new, gelu_pytorch_tanh, gelu, relu or silu, found "
		  "\"tanh\"" },
		{ "{\"add_cross_attention\": true}",
		  "config.json:1: add_cross_attention: cross attention is not built" },
		{ "{\"quantization_config\": {\"bits\": 4}}",
		  "config.json:1: quantization_config: quantised weights are not built" },
		{ "{\"resid_pdrop\": 1}", "config.json:1: resid_pdrop: expected a number from 0 to 0.999999, found 1" },
		{ "{\"tie_word_embeddings\": \"yes\"}",
		  "config.json:1: tie_word_embeddings: expected true or false, found \"yes\"" },
	};

	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
		struct model_config m;
		struct err e = { 0 };

		assert_int_equal(model_config_parse(bad[i].text, "config.json", &m, &e), -EINVAL);
		assert_string_equal(e.text, bad[i].message);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_defaults),     cmocka_unit_test(test_hub_file),
		cmocka_unit_test(test_written_back), cmocka_unit_test(test_activations),
		cmocka_unit_test(test_messages),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
