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

/* The files as the hub has them, in transformers 4's and in 5's spelling. */
static const char llama_8b[] =
	"{\"architectures\": [\"LlamaForCausalLM\"], \"attention_bias\": false, \"attention_dropout\": 0.0,"
	" \"bos_token_id\": 128000, \"eos_token_id\": 128001, \"hidden_act\": \"silu\", \"hidden_size\": 4096,"
	" \"initializer_range\": 0.02, \"intermediate_size\": 14336, \"max_position_embeddings\": 131072,"
	" \"mlp_bias\": false, \"model_type\": \"llama\", \"num_attention_heads\": 32, \"num_hidden_layers\": 32,"
	" \"num_key_value_heads\": 8, \"pretraining_tp\": 1, \"rms_norm_eps\": 1e-05,"
	" \"rope_scaling\": {\"factor\": 8.0, \"low_freq_factor\": 1.0, \"high_freq_factor\": 4.0,"
	" \"original_max_position_embeddings\": 8192, \"rope_type\": \"llama3\"}, \"rope_theta\": 500000.0,"
	" \"tie_word_embeddings\": false, \"torch_dtype\": \"bfloat16\", \"transformers_version\": \"4.43.0.dev0\","
	" \"use_cache\": true, \"vocab_size\": 128256}";
static const char llama_70b[] =
	"{\"architectures\": [\"LlamaForCausalLM\"], \"dtype\": \"bfloat16\", \"head_dim\": 128, \"hidden_size\": 8192,"
	" \"intermediate_size\": 28672, \"max_position_embeddings\": 131072, \"model_type\": \"llama\","
	" \"num_attention_heads\": 64, \"num_hidden_layers\": 80, \"num_key_value_heads\": 8, \"rms_norm_eps\": 1e-05,"
	" \"rope_parameters\": {\"factor\": 8.0, \"low_freq_factor\": 1.0, \"high_freq_factor\": 4.0,"
	" \"original_max_position_embeddings\": 8192, \"rope_theta\": 500000.0, \"rope_type\": \"llama3\"},"
	" \"vocab_size\": 128256}";
static const char smollm2[] =
	"{\"_name_or_path\": \"checkpoints\", \"architectures\": [\"LlamaForCausalLM\"], \"attention_bias\": false,"
	" \"bos_token_id\": 1, \"eos_token_id\": 2, \"hidden_act\": \"silu\", \"hidden_size\": 576,"
	" \"initializer_range\": 0.041666666666666664, \"intermediate_size\": 1536, \"is_llama_config\": true,"
	" \"max_position_embeddings\": 8192, \"model_type\": \"llama\", \"num_attention_heads\": 9,"
	" \"num_hidden_layers\": 30, \"num_key_value_heads\": 3, \"pad_token_id\": 2, \"pretraining_tp\": 1,"
	" \"rms_norm_eps\": 1e-05, \"rope_interleaved\": false, \"rope_scaling\": null, \"rope_theta\": 100000,"
	" \"tie_word_embeddings\": true, \"torch_dtype\": \"bfloat16\","
	" \"transformers.js_config\": {\"kv_cache_dtype\": {\"q4f16\": \"float16\"}},"
	" \"transformers_version\": \"4.42.3\", \"use_cache\": true, \"vocab_size\": 49152}";
static const char mistral_7b[] =
	"{\"architectures\": [\"MistralForCausalLM\"], \"bos_token_id\": 1, \"eos_token_id\": 2, \"hidden_act\": \"silu\","
	" \"hidden_size\": 4096, \"initializer_range\": 0.02, \"intermediate_size\": 14336,"
	" \"max_position_embeddings\": 32768, \"model_type\": \"mistral\", \"num_attention_heads\": 32,"
	" \"num_hidden_layers\": 32, \"num_key_value_heads\": 8, \"rms_norm_eps\": 1e-05, \"rope_theta\": 10000.0,"
	" \"sliding_window\": 4096, \"tie_word_embeddings\": false, \"torch_dtype\": \"bfloat16\","
	" \"transformers_version\": \"4.34.0.dev0\", \"use_cache\": true, \"vocab_size\": 32000}";
static const char qwen2_05b[] =
	"{\"architectures\": [\"Qwen2ForCausalLM\"], \"attention_dropout\": 0.0, \"bos_token_id\": 151643,"
	" \"eos_token_id\": 151643, \"hidden_act\": \"silu\", \"hidden_size\": 896, \"initializer_range\": 0.02,"
	" \"intermediate_size\": 4864, \"max_position_embeddings\": 32768, \"max_window_layers\": 24,"
	" \"model_type\": \"qwen2\", \"num_attention_heads\": 14, \"num_hidden_layers\": 24, \"num_key_value_heads\": 2,"
	" \"rms_norm_eps\": 1e-06, \"rope_theta\": 1000000.0, \"sliding_window\": 32768, \"tie_word_embeddings\": true,"
	" \"torch_dtype\": \"bfloat16\", \"transformers_version\": \"4.40.1\", \"use_cache\": true,"
	" \"use_mrope\": false, \"use_sliding_window\": false, \"vocab_size\": 151936}";
static const char qwen3_06b[] =
	"{\"architectures\": [\"Qwen3ForCausalLM\"], \"attention_bias\": false, \"attention_dropout\": 0.0,"
	" \"bos_token_id\": 151643, \"eos_token_id\": 151645, \"head_dim\": 128, \"hidden_act\": \"silu\","
	" \"hidden_size\": 1024, \"initializer_range\": 0.02, \"intermediate_size\": 3072,"
	" \"max_position_embeddings\": 40960, \"max_window_layers\": 28, \"model_type\": \"qwen3\","
	" \"num_attention_heads\": 16, \"num_hidden_layers\": 28, \"num_key_value_heads\": 8, \"rms_norm_eps\": 1e-06,"
	" \"rope_scaling\": null, \"rope_theta\": 1000000, \"sliding_window\": null, \"tie_word_embeddings\": true,"
	" \"torch_dtype\": \"bfloat16\", \"transformers_version\": \"4.51.0\", \"use_cache\": true,"
	" \"use_sliding_window\": false, \"vocab_size\": 151936}";

/* Counts as the model cards and safetensors indexes give them. */
static void test_parameter_counts(void **state)
{
	static const struct {
		const char *text;
		uint64_t n;
	} want[] = {
		{ llama_8b, 8030261248 },   { llama_70b, 70553706496 }, { smollm2, 134515008 },
		{ mistral_7b, 7241732096 }, { qwen2_05b, 494032768 },   { qwen3_06b, 596049920 },
	};

	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(want); i++) {
		struct model_config m = parse_good(want[i].text);
		struct unit_table t;

		assert_int_equal(unit_table_init(&t, &m, NULL), 0);
		assert_int_equal(t.n_parameters, want[i].n);
		assert_int_equal(t.n_units, m.n_layer + 2);
		unit_table_release(&t);
		model_config_release(&m);
	}
}

static void test_values(void **state)
{
	struct model_config m = parse_good(llama_8b);

	(void)state;
	assert_int_equal(m.family, FAMILY_LLAMA);
	assert_true(model_is_llama(&m));
	assert_int_equal(m.n_embd, 4096);
	assert_int_equal(m.n_inner, 14336);
	assert_int_equal(m.n_kv_head, 8);
	assert_int_equal(m.head_dim, 128);
	assert_int_equal(m.n_positions, 131072);
	assert_int_equal(m.activation, 4);
	assert_true(m.layer_norm_epsilon == 1e-5f && m.attn_pdrop == 0 && m.embd_pdrop == 0 && m.resid_pdrop == 0);
	assert_false(m.tie_word_embeddings || m.attention_bias || m.attention_out_bias || m.mlp_bias || m.qk_norm);
	assert_int_equal(m.rope.type, ROPE_LLAMA3);
	assert_int_equal(m.rope.rot, 128);
	assert_true(m.rope.theta == 500000 && m.rope.factor == 8 && m.rope.high_freq_factor == 4);
	assert_int_equal(m.rope.original_max_position_embeddings, 8192);
	assert_int_equal(model_layer_window(&m, 31), 0);
	model_config_release(&m);
	m = parse_good(qwen2_05b);
	assert_true(m.attention_bias && !m.attention_out_bias && !m.qk_norm && m.tie_word_embeddings);
	assert_int_equal(m.sliding_window, 0);
	model_config_release(&m);
	m = parse_good(qwen3_06b);
	assert_true(!m.attention_bias && m.qk_norm);
	assert_int_equal(m.head_dim, 128);
	model_config_release(&m);
	m = parse_good("{\"model_type\": \"qwen3\", \"attention_bias\": true, \"attention_dropout\": 0.25}");
	assert_true(m.attention_bias && m.attention_out_bias && m.attn_pdrop == 0.25f);
	model_config_release(&m);
	m = parse_good("{\"model_type\": \"mistral\", \"num_key_value_heads\": null, \"hidden_act\": \"gelu\"}");
	assert_int_equal(m.n_kv_head, 32);
	assert_int_equal(m.activation, 2);
	model_config_release(&m);
}

/* Which layers have the window. */
static void test_windows(void **state)
{
	static const struct {
		const char *text;
		uint32_t window, first, layers;
	} want[] = {
		{ "{\"model_type\": \"mistral\", \"num_hidden_layers\": 3}", 4096, 0, 3 },
		{ "{\"model_type\": \"mistral\", \"sliding_window\": null}", 0, 0, 32 },
		{ "{\"model_type\": \"mistral\", \"sliding_window\": 7, \"num_hidden_layers\": 70}", 7, 0, 70 },
		{ "{\"model_type\": \"qwen2\", \"sliding_window\": 7}", 0, 0, 32 },
		{ "{\"model_type\": \"qwen2\", \"use_sliding_window\": true, \"sliding_window\": 7}", 7, 28, 32 },
		{ "{\"model_type\": \"qwen3\", \"use_sliding_window\": true, \"max_window_layers\": 5}", 4096, 5, 32 },
		{ "{\"model_type\": \"qwen3\", \"use_sliding_window\": true, \"max_window_layers\": 99}", 4096, 99,
		  32 },
		{ "{\"model_type\": \"qwen3\", \"use_sliding_window\": true, \"num_hidden_layers\": 2,"
		  " \"layer_types\": [\"full_attention\", \"sliding_attention\"]}",
		  4096, 1, 2 },
		{ "{\"model_type\": \"llama\", \"sliding_window\": 4096, \"use_sliding_window\": false}", 0, 0, 32 },
		{ "{\"model_type\": \"mistral\", \"num_hidden_layers\": 1, \"layer_types\": [\"sliding_attention\"]}",
		  4096, 0, 1 },
	};

	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(want); i++) {
		struct model_config m = parse_good(want[i].text);

		for (uint32_t l = 0; l < want[i].layers; l++)
			assert_int_equal(model_layer_window(&m, l), l >= want[i].first ? want[i].window : 0);
		model_config_release(&m);
	}
}

/* What is written beside the result reads back to the same model, and twice to the same text. */
static void test_written_back(void **state)
{
	static const char *const texts[] = { llama_8b,
					     llama_70b,
					     smollm2,
					     mistral_7b,
					     qwen2_05b,
					     qwen3_06b,
					     "{\"model_type\": \"llama\"}",
					     "{\"model_type\": \"mistral\"}",
					     "{\"model_type\": \"mistral\", \"sliding_window\": null}" };

	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(texts); i++) {
		struct model_config m = parse_good(texts[i]), again = parse_good(m.json);
		json_t *j = json_loads(m.json, 0, NULL);

		assert_string_equal(m.json, again.json);
		assert_int_equal(m.family, again.family);
		assert_int_equal(m.n_kv_head, again.n_kv_head);
		assert_int_equal(m.head_dim, again.head_dim);
		assert_int_equal(m.sliding_window, again.sliding_window);
		assert_true(m.rope.theta == again.rope.theta);
		assert_int_equal(m.rope.type, again.rope.type);
		assert_string_equal(json_string_value(json_object_get(j, "torch_dtype")), "float32");
		assert_null(json_object_get(j, "n_embd"));
		json_decref(j);
		model_config_release(&again);
		model_config_release(&m);
	}
}

static void test_tensors(void **state)
{
	struct model_config m = parse_good(
		"{\"model_type\": \"llama\", \"hidden_size\": 64, \"num_attention_heads\": 4,"
		" \"num_key_value_heads\": 2, \"head_dim\": 24, \"intermediate_size\": 80,"
		" \"num_hidden_layers\": 2, \"vocab_size\": 300, \"attention_bias\": true,"
		" \"mlp_bias\": true, \"initializer_range\": 0.05}");
	static const struct {
		const char *name;
		uint64_t rows, cols;
		enum tensor_init init;
	} want[] = {
		{ "model.embed_tokens.weight", 300, 64, INIT_NORMAL },
		{ "model.layers.0.input_layernorm.weight", 64, 0, INIT_ONE },
		{ "model.layers.0.self_attn.q_proj.weight", 96, 64, INIT_NORMAL },
		{ "model.layers.0.self_attn.q_proj.bias", 96, 0, INIT_ZERO },
		{ "model.layers.0.self_attn.k_proj.weight", 48, 64, INIT_NORMAL },
		{ "model.layers.0.self_attn.k_proj.bias", 48, 0, INIT_ZERO },
		{ "model.layers.0.self_attn.v_proj.weight", 48, 64, INIT_NORMAL },
		{ "model.layers.0.self_attn.v_proj.bias", 48, 0, INIT_ZERO },
		{ "model.layers.0.self_attn.o_proj.weight", 64, 96, INIT_NORMAL },
		{ "model.layers.0.self_attn.o_proj.bias", 64, 0, INIT_ZERO },
		{ "model.layers.0.post_attention_layernorm.weight", 64, 0, INIT_ONE },
		{ "model.layers.0.mlp.gate_proj.weight", 80, 64, INIT_NORMAL },
		{ "model.layers.0.mlp.gate_proj.bias", 80, 0, INIT_ZERO },
		{ "model.layers.0.mlp.up_proj.weight", 80, 64, INIT_NORMAL },
		{ "model.layers.0.mlp.up_proj.bias", 80, 0, INIT_ZERO },
		{ "model.layers.0.mlp.down_proj.weight", 64, 80, INIT_NORMAL },
		{ "model.layers.0.mlp.down_proj.bias", 64, 0, INIT_ZERO },
	};
	struct unit_table t;

	(void)state;
	assert_int_equal(unit_table_init(&t, &m, NULL), 0);
	for (size_t i = 0; i < ARRAY_LEN(want); i++) {
		const struct tensor_info *x = &t.tensor[i];

		assert_string_equal(x->name, want[i].name);
		assert_int_equal(x->shape[0], want[i].rows);
		assert_int_equal(x->n_dims, want[i].cols ? 2 : 1);
		assert_int_equal(x->shape[1], want[i].cols);
		assert_int_equal(x->init, want[i].init);
		assert_true(x->init_std == (want[i].init == INIT_NORMAL ? 0.05f : 0));
	}
	assert_int_equal(unit_table_find(&t, "model.norm.weight")->unit, 3);
	assert_int_equal(unit_table_find(&t, "lm_head.weight")->unit, 3);
	assert_int_equal(t.n_tensors, 1 + 2 * 16 + 2);
	unit_table_release(&t);
	model_config_release(&m);
	m = parse_good(qwen3_06b);
	assert_int_equal(unit_table_init(&t, &m, NULL), 0);
	assert_int_equal(unit_table_find(&t, "model.layers.27.self_attn.q_norm.weight")->n, 128);
	assert_int_equal(unit_table_find(&t, "model.layers.27.self_attn.k_norm.weight")->init, INIT_ONE);
	/* Tied: the second part is the whole unit, for nothing stands behind the table. */
	assert_int_equal(t.unit[0].n_parts, 2);
	assert_int_equal(t.unit[0].part[1].end, t.unit[0].n);
	assert_null(unit_table_find(&t, "lm_head.weight"));
	unit_table_release(&t);
	model_config_release(&m);
}

static void test_rope_spellings(void **state)
{
	static const char *const same[] = {
		"{\"model_type\": \"llama\", \"rope_theta\": 5e5, \"rope_scaling\": {\"type\": \"linear\", \"factor\": 2}}",
		"{\"model_type\": \"llama\", \"rope_theta\": 5e5, \"rope_scaling\": {\"rope_type\": \"linear\","
		" \"factor\": 2}}",
		"{\"model_type\": \"llama\", \"rope_parameters\": {\"rope_type\": \"linear\", \"rope_theta\": 5e5,"
		" \"factor\": 2, \"partial_rotary_factor\": 1.0}}",
		"{\"model_type\": \"llama\", \"rope_theta\": 5e5, \"rope_parameters\": {\"rope_type\": \"linear\","
		" \"rope_theta\": 5e5, \"factor\": 2}, \"rope_scaling\": null}",
	};
	struct model_config m;

	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(same); i++) {
		m = parse_good(same[i]);
		assert_int_equal(m.rope.type, ROPE_LINEAR);
		assert_true(m.rope.theta == 5e5 && m.rope.factor == 2 && m.rope.attention_factor == 1);
		model_config_release(&m);
	}
	m = parse_good("{\"model_type\": \"qwen2\", \"rope_scaling\": {\"type\": \"yarn\", \"factor\": 4.0,"
		       " \"original_max_position_embeddings\": 32768}}");
	assert_int_equal(m.rope.type, ROPE_YARN);
	assert_true(m.rope.beta_fast == 32 && m.rope.beta_slow == 1 && m.rope.truncate);
	assert_float_equal(m.rope.attention_factor, 1.1386294361119891, 1e-15);
	model_config_release(&m);
	/* Without an original length, the length itself; without a factor, their ratio. */
	m = parse_good("{\"model_type\": \"llama\", \"rope_scaling\": {\"type\": \"yarn\", \"factor\": 4.0}}");
	assert_int_equal(m.rope.original_max_position_embeddings, 2048);
	model_config_release(&m);
	m = parse_good("{\"model_type\": \"llama\", \"rope_scaling\": {\"type\": \"yarn\","
		       " \"original_max_position_embeddings\": 256}}");
	assert_true(m.rope.factor == 8);
	model_config_release(&m);
}

static void test_messages(void **state)
{
#define L "{\"model_type\": \"llama\", "
	static const struct {
		const char *text, *message;
	} bad[] = {
		{ "{\"model_type\": \"gemma\"}",
		  "model_type: \"gemma\" is not built; \"gpt2\", \"llama\", \"mistral\", "
		  "\"qwen2\" and \"qwen3\" are" },
		{ "{\"architectures\": [\"LlamaForCausalLM\"]}",
		  "architectures: \"LlamaForCausalLM\" belongs to model_type \"llama\", and this is \"gpt2\"" },
		{ L "\"n_embd\": 64}", "n_embd: a model of model_type \"llama\" has no such key; \"gpt2\" has" },
		{ "{\"rope_theta\": 1e4}", "rope_theta: a model of model_type \"gpt2\" has no such key; \"llama\" has "
					   "(model_type is not given)" },
		{ L "\"hidden_sizes\": 64}", "hidden_sizes: unknown key; did you mean \"hidden_size\"?" },
		{ L "\"num_attention_heads\": 12, \"hidden_size\": 48, \"num_key_value_heads\": 5}",
		  "num_key_value_heads: num_attention_heads 12 is not a multiple of num_key_value_heads 5" },
		{ L "\"hidden_size\": 50}", "num_attention_heads: hidden_size 50 is not a multiple of "
					    "num_attention_heads 32, and head_dim is not given" },
		{ L "\"head_dim\": 15}", "head_dim: 15 is odd, and rotary positions turn pairs" },
		{ L "\"pretraining_tp\": 2}", "pretraining_tp: products cut into slices are not built" },
		{ L "\"rope_interleaved\": true}",
		  "rope_interleaved: rotary positions in pairs of neighbours are not built" },
		{ L "\"hidden_act\": \"relu2\"}",
		  "hidden_act: expected gelu_new, gelu_pytorch_tanh, gelu, relu or silu, found \"relu2\"" },
		{ L "\"sliding_window\": 16}", "sliding_window: model_type \"llama\" pays no attention to it" },
		{ L "\"use_sliding_window\": true}", "use_sliding_window: model_type \"llama\" pays no attention" },
		{ L "\"partial_rotary_factor\": 0.5}", "partial_rotary_factor: transformers turns whole heads" },
		{ L "\"rope_scaling\": {\"type\": \"longrope\", \"factor\": 2}}",
		  "rope_scaling.type: \"longrope\" is not built; \"default\", \"linear\", \"dynamic\", \"llama3\" and "
		  "\"yarn\" are" },
		{ L "\"rope_scaling\": {\"type\": \"linear\"}}", "rope_scaling: type \"linear\" needs factor" },
		{ L "\"rope_scaling\": {\"type\": \"linear\", \"factor\": 0.5}}",
		  "rope_scaling.factor: expected a number from 1 to 1e+06, found 0.5" },
		{ L "\"rope_scaling\": {\"type\": \"linear\", \"factor\": 2, \"beta_fast\": 3}}",
		  "rope_scaling.beta_fast: rotary positions of type \"linear\" have no such parameter" },
		{ L "\"rope_parameters\": {\"rope_theta\": 1e4}, \"rope_theta\": 1e5}",
		  "rope_theta: rope_parameters gives it another value" },
		{ L "\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8, \"low_freq_factor\": 4,"
		    " \"high_freq_factor\": 4}}",
		  "rope_scaling: high_freq_factor is not above low_freq_factor" },
		{ L "\"rope_scaling\": \"linear\"}", "rope_scaling: expected an object, found \"linear\"" },
		{ "{\"model_type\": \"mistral\", \"attention_bias\": true}",
		  "attention_bias: model_type \"mistral\" is always false here" },
		{ "{\"model_type\": \"qwen2\", \"attention_bias\": false}",
		  "attention_bias: model_type \"qwen2\" is always true here" },
		{ "{\"model_type\": \"qwen3\", \"mlp_bias\": true}",
		  "mlp_bias: model_type \"qwen3\" is always false here" },
		{ "{\"model_type\": \"qwen3\", \"num_hidden_layers\": 2, \"layer_types\": [\"full_attention\"]}",
		  "layer_types: expected a list of num_hidden_layers = 2 words" },
		{ "{\"model_type\": \"qwen3\", \"num_hidden_layers\": 1, \"layer_types\": [\"linear_attention\"]}",
		  "layer_types: layer 0: expected \"full_attention\" or \"sliding_attention\", found "
		  "\"linear_attention\"" },
		{ "{\"model_type\": \"qwen3\", \"num_hidden_layers\": 1, \"layer_types\": [\"sliding_attention\"]}",
		  "layer_types: asks for sliding_attention, and there is no window" },
		{ "{\"model_type\": \"qwen2\", \"use_mrope\": true}",
		  "use_mrope: rotary positions in several dimensions" },
	};
#undef L

	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
		struct model_config m;
		struct err e = { 0 };

		assert_int_equal(model_config_parse(bad[i].text, "config.json", &m, &e), -EINVAL);
		if (strncmp(e.text, "config.json:1: ", 15) || !strstr(e.text, bad[i].message))
			fail_msg("%s: \"%s\" is not \"%s\"", bad[i].text, e.text, bad[i].message);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_parameter_counts), cmocka_unit_test(test_values),
		cmocka_unit_test(test_windows),          cmocka_unit_test(test_written_back),
		cmocka_unit_test(test_tensors),          cmocka_unit_test(test_rope_spellings),
		cmocka_unit_test(test_messages),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
