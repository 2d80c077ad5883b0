/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A Hugging Face config.json. It is full of keys that do not touch the
 * arithmetic of a language model (token ids, summary heads, versions of the
 * library that wrote it); those are kept and written back. Refused by name are
 * the keys that do touch it and are not built, keys of another family, and keys
 * that are most likely a used key misspelt, since HF would quietly train another
 * model.
 */
#include "model/hf_config.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum hf_type { HF_U32, HF_FLOAT, HF_BOOL };

/* A key that is used, with HF's second name for it and HF's default (transformers, *Config). */
struct hf_key {
	const char *name, *alias;
	enum hf_type type;
	double min, max;
	double def[MODEL_FAMILIES];
	size_t offset;
};

#define AT(field) offsetof(struct model_config, field)
#define GPT2(v)   \
	{         \
		v \
	}
#define ALL(v)                \
	{                     \
		0, v, v, v, v \
	}
static const struct hf_key gpt2_keys[] = {
	{ "vocab_size", NULL, HF_U32, 2, 1 << 24, GPT2(50257), AT(vocab_size) },
	{ "n_positions", "max_position_embeddings", HF_U32, 1, 1 << 24, GPT2(1024), AT(n_positions) },
	{ "n_embd", "hidden_size", HF_U32, 1, 1 << 20, GPT2(768), AT(n_embd) },
	{ "n_layer", "num_hidden_layers", HF_U32, 1, MODEL_LAYERS_MAX, GPT2(12), AT(n_layer) },
	{ "n_head", "num_attention_heads", HF_U32, 1, 65536, GPT2(12), AT(n_head) },
	{ "n_inner", NULL, HF_U32, 1, 1 << 22, GPT2(0), AT(n_inner) },
	{ "layer_norm_epsilon", NULL, HF_FLOAT, 0, 1, GPT2(1e-5), AT(layer_norm_epsilon) },
	{ "initializer_range", NULL, HF_FLOAT, 0, 100, GPT2(0.02), AT(initializer_range) },
	{ "embd_pdrop", NULL, HF_FLOAT, 0, 0.999999, GPT2(0.1), AT(embd_pdrop) },
	{ "attn_pdrop", NULL, HF_FLOAT, 0, 0.999999, GPT2(0.1), AT(attn_pdrop) },
	{ "resid_pdrop", NULL, HF_FLOAT, 0, 0.999999, GPT2(0.1), AT(resid_pdrop) },
	{ "tie_word_embeddings", NULL, HF_BOOL, 0, 1, GPT2(1), AT(tie_word_embeddings) },
	{ "scale_attn_weights", NULL, HF_BOOL, 0, 1, GPT2(1), AT(scale_attn_weights) },
	{ "scale_attn_by_inverse_layer_idx", NULL, HF_BOOL, 0, 1, GPT2(0), AT(scale_attn_by_inverse_layer_idx) },
};

/* Defaults in the order of enum model_family: Llama, Mistral, Qwen2, Qwen3. 0 heads or head_dim: from the others. */
static const struct hf_key llama_keys[] = {
	{ "vocab_size", NULL, HF_U32, 2, 1 << 24, { 0, 32000, 32000, 151936, 151936 }, AT(vocab_size) },
	{ "max_position_embeddings", NULL, HF_U32, 1, 1 << 24, { 0, 2048, 131072, 32768, 32768 }, AT(n_positions) },
	{ "hidden_size", NULL, HF_U32, 1, 1 << 20, ALL(4096), AT(n_embd) },
	{ "num_hidden_layers", NULL, HF_U32, 1, MODEL_LAYERS_MAX, ALL(32), AT(n_layer) },
	{ "num_attention_heads", NULL, HF_U32, 1, 65536, ALL(32), AT(n_head) },
	{ "num_key_value_heads", NULL, HF_U32, 1, 65536, { 0, 0, 8, 32, 32 }, AT(n_kv_head) },
	{ "intermediate_size", NULL, HF_U32, 1, 1 << 22, { 0, 11008, 14336, 22016, 22016 }, AT(n_inner) },
	{ "head_dim", NULL, HF_U32, 2, 65536, { 0, 0, 0, 0, 128 }, AT(head_dim) },
	{ "rms_norm_eps", NULL, HF_FLOAT, 0, 1, ALL(1e-6), AT(layer_norm_epsilon) },
	{ "initializer_range", NULL, HF_FLOAT, 0, 100, ALL(0.02), AT(initializer_range) },
	{ "attention_dropout", NULL, HF_FLOAT, 0, 0.999999, ALL(0), AT(attn_pdrop) },
	{ "tie_word_embeddings", NULL, HF_BOOL, 0, 1, ALL(0), AT(tie_word_embeddings) },
	{ "attention_bias", NULL, HF_BOOL, 0, 1, { 0, 0, 0, 1, 0 }, AT(attention_bias) },
	{ "mlp_bias", NULL, HF_BOOL, 0, 1, ALL(0), AT(mlp_bias) },
};
#undef ALL
#undef GPT2
#undef AT
#define KEYS_MAX 64

/* What a family is called, and its own keys. */
static const struct hf_family {
	const char *model_type, *causal_lm, *bare;
	const struct hf_key *key;
	size_t n_keys;
	const char *activation, *default_activation;
	const char *const *others; /* used keys that are in no row, and known ones that do nothing; NULL-ended */
} families[MODEL_FAMILIES] = {
#define LLAMA_KEYS llama_keys, ARRAY_LEN(llama_keys), "hidden_act", "silu"
#define OTHERS(...) ((const char *const[]){ __VA_ARGS__, NULL })
#define LLAMA_OTHERS                                                                                           \
	OTHERS("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "sliding_window",     \
	       "use_sliding_window", "max_window_layers", "layer_types", "pretraining_tp", "rope_interleaved", \
	       "use_mrope", "original_max_position_embeddings")
	[FAMILY_GPT2] = { "gpt2", "GPT2LMHeadModel", "GPT2Model", gpt2_keys, ARRAY_LEN(gpt2_keys),
			  "activation_function", "gelu_new", OTHERS("n_ctx") },
	[FAMILY_LLAMA] = { "llama", "LlamaForCausalLM", "LlamaModel", LLAMA_KEYS, LLAMA_OTHERS },
	[FAMILY_MISTRAL] = { "mistral", "MistralForCausalLM", "MistralModel", LLAMA_KEYS, LLAMA_OTHERS },
	[FAMILY_QWEN2] = { "qwen2", "Qwen2ForCausalLM", "Qwen2Model", LLAMA_KEYS, LLAMA_OTHERS },
	[FAMILY_QWEN3] = { "qwen3", "Qwen3ForCausalLM", "Qwen3Model", LLAMA_KEYS, LLAMA_OTHERS },
#undef LLAMA_OTHERS
#undef OTHERS
#undef LLAMA_KEYS
};

/* enum k_activation's values (kernels.h) by HF's names; silu is also called swish. */
static const struct {
	const char *name;
	uint32_t value;
} activations[] = {
	{ "gelu_new", 1 }, { "gelu_pytorch_tanh", 1 }, { "gelu", 2 }, { "relu", 3 }, { "silu", 4 }, { "swish", 4 },
};

/* Keys that change the arithmetic in a way that is not built, unless they are null, false, {}, [] or `off`. */
static const struct {
	const char *name, *why;
	double off;
} refused[] = {
	{ "add_cross_attention", "cross attention is not built", 0 },
	{ "quantization_config", "quantised weights are not built", 0 },
	{ "pruned_heads", "pruned heads are not built", 0 },
	{ "auto_map", "it names Python code, and none is run", 0 },
	{ "pretraining_tp", "products cut into slices are not built", 1 },
	{ "rope_interleaved", "rotary positions in pairs of neighbours are not built", 0 },
	{ "use_mrope", "rotary positions in several dimensions are not built", 0 },
	{ "no_rope_layers", "layers without positions are not built", 0 },
	{ "num_experts", "mixtures of experts are not built", 0 },
	{ "num_local_experts", "mixtures of experts are not built", 0 },
};

const json_t *hf_given(const json_t *o, const char *name)
{
	const json_t *v = name ? json_object_get(o, name) : NULL;

	return json_is_null(v) ? NULL : v;
}

static const struct hf_family *family_of(const struct hf_parse *p)
{
	return &families[p->m->family];
}

static void set_default(const struct hf_key *k, struct model_config *m)
{
	void *field = (char *)m + k->offset;
	double def = k->def[m->family];

	if (k->type == HF_U32)
		*(uint32_t *)field = (uint32_t)def;
	else if (k->type == HF_FLOAT)
		*(float *)field = (float)def;
	else
		*(bool *)field = def != 0;
}

static int read_key(const struct hf_parse *p, const struct json_path *path, const struct hf_key *k, const json_t *v)
{
	void *at = (char *)p->m + k->offset;
	uint64_t n;
	double x;
	int rc;

	switch (k->type) {
	case HF_U32:
		rc = json_read_u64(p->doc, path, v, (uint64_t)k->min, (uint64_t)k->max, &n, p->e);
		if (!rc)
			*(uint32_t *)at = (uint32_t)n;
		return rc;
	case HF_FLOAT:
		rc = json_read_f64(p->doc, path, v, k->min, k->max, &x, p->e);
		if (!rc)
			*(float *)at = (float)x;
		return rc;
	case HF_BOOL:
		return json_read_bool(p->doc, path, v, at, p->e);
	}
	return -EINVAL;
}

/* The value under either name, and the name it stands under. */
static int find_key(const struct hf_parse *p, const struct hf_key *k, const char **name, const json_t **value)
{
	const json_t *v = hf_given(p->o, k->name), *w = hf_given(p->o, k->alias);
	struct json_path path = { p->at, k->alias };

	*name = w && !v ? k->alias : k->name;
	*value = v ? v : w;
	if (v && w && !json_equal(v, w))
		return json_fail(p->doc, &path, p->e, "means the same as %s, which is given another value", k->name);
	return 0;
}

static int read_used(const struct hf_parse *p)
{
	const struct hf_family *f = family_of(p);

	for (size_t i = 0; i < f->n_keys; i++) {
		struct json_path path = { p->at, NULL };
		const json_t *v;
		int rc;

		set_default(&f->key[i], p->m);
		rc = find_key(p, &f->key[i], &path.key, &v);
		if (!rc && v)
			rc = read_key(p, &path, &f->key[i], v);
		if (rc)
			return rc;
	}
	return 0;
}

static int read_activation(const struct hf_parse *p)
{
	struct json_path path = { p->at, family_of(p)->activation };
	const json_t *v = hf_given(p->o, path.key);
	const char *word = v ? json_string_value(v) : family_of(p)->default_activation;
	char words[64];

	for (size_t i = 0; word && i < ARRAY_LEN(activations); i++) {
		if (!strcmp(word, activations[i].name)) {
			p->m->activation = activations[i].value;
			return 0;
		}
	}
	return json_fail(p->doc, &path, p->e, "expected gelu_new, gelu_pytorch_tanh, gelu, relu or silu, found %s",
			 json_words(v, words));
}

/* --------------------------------------------------------------------- family */

static int read_model_type(const struct hf_parse *p)
{
	struct json_path path = { p->at, "model_type" };
	const json_t *v = hf_given(p->o, path.key);
	char words[64];

	p->m->family = FAMILY_GPT2;
	if (!v)
		return 0;
	for (int i = 0; i < MODEL_FAMILIES; i++) {
		if (json_is_string(v) && !strcmp(json_string_value(v), families[i].model_type)) {
			p->m->family = (enum model_family)i;
			return 0;
		}
	}
	return json_fail(p->doc, &path, p->e,
			 "%s is not built; \"gpt2\", \"llama\", \"mistral\", \"qwen2\" and "
			 "\"qwen3\" are",
			 json_words(v, words));
}

/* An architecture of another family most likely means that model_type is missing. */
static int check_architecture(const struct hf_parse *p, const struct json_path *path, const json_t *a)
{
	const struct hf_family *f = family_of(p);
	const char *name = json_string_value(a);
	char words[64];

	if (name && (!strcmp(name, f->causal_lm) || !strcmp(name, f->bare)))
		return 0;
	for (int i = 0; name && i < MODEL_FAMILIES; i++)
		if (!strcmp(name, families[i].causal_lm) || !strcmp(name, families[i].bare))
			return json_fail(p->doc, path, p->e, "%s belongs to model_type \"%s\", and this is \"%s\"",
					 json_words(a, words), families[i].model_type, f->model_type);
	return json_fail(p->doc, path, p->e, "%s is not built; \"%s\" is", json_words(a, words), f->causal_lm);
}

static int check_architectures(const struct hf_parse *p)
{
	struct json_path path = { p->at, "architectures" };
	const json_t *list = hf_given(p->o, path.key);
	char words[64];
	int rc = 0;

	if (!list)
		return 0;
	if (!json_is_array(list))
		return json_fail(p->doc, &path, p->e, "expected a list, found %s", json_words(list, words));
	for (size_t i = 0; i < json_array_size(list) && !rc; i++)
		rc = check_architecture(p, &path, json_array_get(list, i));
	return rc;
}

/* --------------------------------------------------- keys that are not for use */

static const struct hf_key *find_row(const struct hf_family *f, const char *key)
{
	for (size_t i = 0; i < f->n_keys; i++)
		if (!strcmp(key, f->key[i].name) || (f->key[i].alias && !strcmp(key, f->key[i].alias)))
			return &f->key[i];
	return NULL;
}

static bool is_used(const struct hf_family *f, const char *key)
{
	if (!strcmp(key, f->activation) || find_row(f, key))
		return true;
	for (size_t i = 0; f->others[i]; i++)
		if (!strcmp(key, f->others[i]))
			return true;
	return false;
}

static int check_refused(const struct hf_parse *p)
{
	for (size_t i = 0; i < ARRAY_LEN(refused); i++) {
		const json_t *v = hf_given(p->o, refused[i].name);
		struct json_path path = { p->at, refused[i].name };
		bool off = !v || json_is_false(v) || (json_is_object(v) && !json_object_size(v)) ||
			   (json_is_array(v) && !json_array_size(v)) ||
			   (json_is_number(v) && json_number_value(v) == refused[i].off);

		if (!off)
			return json_fail(p->doc, &path, p->e, "%s", refused[i].why);
	}
	return 0;
}

/*
 * GPT-2's keys in a Llama and the other way round: transformers would ignore
 * them and take its defaults, which is not the model that was meant.
 */
static int check_foreign(const struct hf_parse *p, const struct json_path *path)
{
	const struct hf_family *mine = family_of(p);
	const struct hf_family *other = &families[model_is_llama(p->m) ? FAMILY_GPT2 : FAMILY_LLAMA];

	if (is_used(mine, path->key) || !is_used(other, path->key))
		return 0;
	return json_fail(p->doc, path, p->e, "a model of model_type \"%s\" has no such key; \"%s\" has%s",
			 mine->model_type, other->model_type,
			 hf_given(p->o, "model_type") ? "" : " (model_type is not given)");
}

static int check_misspelt(const struct hf_parse *p, const struct json_path *path)
{
	const struct hf_family *f = family_of(p);
	const char *names[KEYS_MAX], *near;
	size_t n = 0;

	static_assert(ARRAY_LEN(llama_keys) + 16 < KEYS_MAX && ARRAY_LEN(gpt2_keys) + 16 < KEYS_MAX, "names fit");
	for (size_t i = 0; i < f->n_keys; i++)
		names[n++] = f->key[i].name;
	for (size_t i = 0; f->others[i]; i++)
		names[n++] = f->others[i];
	names[n++] = f->activation;
	names[n] = NULL;
	near = is_used(f, path->key) ? NULL : nearest_name(path->key, names);
	return near ? json_fail(p->doc, path, p->e, "unknown key; did you mean \"%s\"?", near) : 0;
}

static int check_keys(const struct hf_parse *p)
{
	const char *key;
	json_t *v;
	int rc = check_refused(p);

	json_object_foreach((json_t *)p->o, key, v)
	{
		struct json_path path = { p->at, key };

		if (!rc && !json_is_null(v))
			rc = check_foreign(p, &path);
		if (!rc)
			rc = check_misspelt(p, &path);
	}
	return rc;
}

/* ------------------------------------------------------------------ as written */

static json_t *key_value(const struct hf_key *k, const struct model_config *m)
{
	const void *field = (const char *)m + k->offset;

	if (k->type == HF_U32)
		return json_integer(*(const uint32_t *)field);
	if (k->type == HF_FLOAT)
		return json_real(k->def[m->family]);
	return json_boolean(*(const bool *)field);
}

/* Keys that stand in no row and whose default is worth saying. */
static int set_others(json_t *j, const struct model_config *m)
{
	int bad = 0;

	if (!model_is_llama(m))
		return 0;
	if (!hf_given(j, "rope_parameters") && !hf_given(j, "rope_theta"))
		bad |= json_object_set_new(j, "rope_theta", json_real(m->rope.theta));
	if (m->family == FAMILY_MISTRAL && !json_object_get(j, "sliding_window"))
		bad |= json_object_set_new(j, "sliding_window", json_integer(m->sliding_window));
	return bad;
}

/* The user's keys, with everything that was used written out under its own name, and the type of the weights. */
static char *make_json(const json_t *o, const struct model_config *m)
{
	const struct hf_family *f = &families[m->family];
	json_t *j = json_deep_copy(o);
	char *text = NULL;
	int bad = j == NULL;

	if (bad)
		return NULL;
	bad |= json_object_set_new(j, "architectures", json_pack("[s]", f->causal_lm));
	bad |= json_object_set_new(j, "model_type", json_string(f->model_type));
	bad |= json_object_set_new(j, "torch_dtype", json_string("float32"));
	if (json_object_get(j, "dtype"))
		bad |= json_object_set_new(j, "dtype", json_string("float32"));
	for (size_t i = 0; i < f->n_keys; i++) {
		const struct hf_key *k = &f->key[i];

		if (!hf_given(j, k->name))
			bad |= json_object_set_new(j, k->name, key_value(k, m));
		if (k->alias)
			(void)json_object_del(j, k->alias);
	}
	if (!hf_given(j, f->activation))
		bad |= json_object_set_new(j, f->activation, json_string(f->default_activation));
	bad |= set_others(j, m);
	if (!bad)
		text = json_dumps(j, JSON_INDENT(2) | JSON_SORT_KEYS);
	json_decref(j);
	return text;
}

static int finish_gpt2(const struct hf_parse *p)
{
	struct json_path path = { p->at, "n_head" };
	struct model_config *m = p->m;

	assert(m->n_head > 0);
	if (m->n_embd % m->n_head)
		return json_fail(p->doc, &path, p->e, "n_embd %u is not a multiple of n_head %u", m->n_embd, m->n_head);
	if (!m->n_inner)
		m->n_inner = 4 * m->n_embd;
	m->n_kv_head = m->n_head;
	m->head_dim = m->n_embd / m->n_head;
	m->attention_bias = m->attention_out_bias = m->mlp_bias = true;
	m->rope = (struct rope_config){ .attention_factor = 1 };
	return 0;
}

int model_config_read(const struct json_doc *d, const struct json_path *at, const json_t *o, struct model_config *out,
		      struct err *e)
{
	struct model_config m = { 0 };
	struct hf_parse p = { .doc = d, .at = at, .o = o, .m = &m, .e = e };
	int rc;

	rc = read_model_type(&p);
	if (!rc)
		rc = check_architectures(&p);
	if (!rc)
		rc = read_used(&p);
	if (!rc)
		rc = read_activation(&p);
	if (!rc)
		rc = check_keys(&p);
	if (!rc)
		rc = model_is_llama(&m) ? hf_llama_read(&p) : finish_gpt2(&p);
	if (rc)
		return rc;
	m.json = make_json(o, &m);
	if (!m.json)
		return err_set(e, -ENOMEM, "%s: out of memory", d->name);
	*out = m;
	return 0;
}

int model_config_parse(const char *text, const char *name, struct model_config *out, struct err *e)
{
	struct json_doc d;
	int rc = json_doc_parse(&d, text, name, e);

	if (rc)
		return rc;
	rc = model_config_read(&d, NULL, d.root, out, e);
	json_doc_release(&d);
	return rc;
}

void model_config_release(struct model_config *m)
{
	free(m->json);
	*m = (struct model_config){ 0 };
}
