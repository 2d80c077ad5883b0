/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A Hugging Face config.json. It is full of keys that do not touch the
 * arithmetic of a language model (token ids, summary heads, versions of the
 * library that wrote it); those are kept and written back. Refused by name are
 * the keys that do touch it and are not built, and keys that are most likely
 * a used key misspelt, since HF would quietly train another model.
 */
#include "model/hf_config.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum hf_type { HF_U32, HF_FLOAT, HF_BOOL };

/* The keys that are used, with HF's second name for them and HF's default (transformers, GPT2Config). */
static const struct hf_key {
	const char *name, *alias;
	enum hf_type type;
	double min, max, def;
	size_t offset;
} keys[] = {
#define AT(field) offsetof(struct model_config, field)
	{ "vocab_size", NULL, HF_U32, 2, 1 << 24, 50257, AT(vocab_size) },
	{ "n_positions", "max_position_embeddings", HF_U32, 1, 1 << 24, 1024, AT(n_positions) },
	{ "n_embd", "hidden_size", HF_U32, 1, 1 << 20, 768, AT(n_embd) },
	{ "n_layer", "num_hidden_layers", HF_U32, 1, 4096, 12, AT(n_layer) },
	{ "n_head", "num_attention_heads", HF_U32, 1, 65536, 12, AT(n_head) },
	{ "n_inner", NULL, HF_U32, 1, 1 << 22, 0, AT(n_inner) },
	{ "layer_norm_epsilon", NULL, HF_FLOAT, 0, 1, 1e-5, AT(layer_norm_epsilon) },
	{ "initializer_range", NULL, HF_FLOAT, 0, 100, 0.02, AT(initializer_range) },
	{ "embd_pdrop", NULL, HF_FLOAT, 0, 0.999999, 0.1, AT(embd_pdrop) },
	{ "attn_pdrop", NULL, HF_FLOAT, 0, 0.999999, 0.1, AT(attn_pdrop) },
	{ "resid_pdrop", NULL, HF_FLOAT, 0, 0.999999, 0.1, AT(resid_pdrop) },
	{ "tie_word_embeddings", NULL, HF_BOOL, 0, 1, 1, AT(tie_word_embeddings) },
	{ "scale_attn_weights", NULL, HF_BOOL, 0, 1, 1, AT(scale_attn_weights) },
	{ "scale_attn_by_inverse_layer_idx", NULL, HF_BOOL, 0, 1, 0, AT(scale_attn_by_inverse_layer_idx) },
#undef AT
};

/* enum k_activation's values (kernels.h) by HF's names; silu is also called swish. */
static const struct {
	const char *name;
	uint32_t value;
} activations[] = {
	{ "gelu_new", 1 }, { "gelu_pytorch_tanh", 1 }, { "gelu", 2 }, { "relu", 3 }, { "silu", 4 }, { "swish", 4 },
};

/* Keys that change the arithmetic in a way that is not built, unless they are null, false or {}. */
static const struct {
	const char *name, *why;
} refused[] = {
	{ "add_cross_attention", "cross attention is not built" },
	{ "quantization_config", "quantised weights are not built" },
	{ "pruned_heads", "pruned heads are not built" },
	{ "auto_map", "it names Python code, and none is run" },
};

/* NULL when not given; null counts as that. */
static const json_t *given(const json_t *o, const char *name)
{
	const json_t *v = name ? json_object_get(o, name) : NULL;

	return json_is_null(v) ? NULL : v;
}

static int read_key(const struct json_doc *d, const struct json_path *path, const struct hf_key *k, const json_t *v,
		    struct model_config *out, struct err *e)
{
	void *at = (char *)out + k->offset;
	uint64_t n;
	double x;
	int rc;

	switch (k->type) {
	case HF_U32:
		rc = json_read_u64(d, path, v, (uint64_t)k->min, (uint64_t)k->max, &n, e);
		if (!rc)
			*(uint32_t *)at = (uint32_t)n;
		return rc;
	case HF_FLOAT:
		rc = json_read_f64(d, path, v, k->min, k->max, &x, e);
		if (!rc)
			*(float *)at = (float)x;
		return rc;
	case HF_BOOL:
		return json_read_bool(d, path, v, at, e);
	}
	return -EINVAL;
}

/* The value under either name, and the name it stands under. */
static int find_key(const struct json_doc *d, const struct json_path *at, const json_t *o, const struct hf_key *k,
		    const char **name, const json_t **value, struct err *e)
{
	const json_t *v = given(o, k->name), *w = given(o, k->alias);
	struct json_path path = { at, k->alias };

	*name = w && !v ? k->alias : k->name;
	*value = v ? v : w;
	if (v && w && !json_equal(v, w))
		return json_fail(d, &path, e, "means the same as %s, which is given another value", k->name);
	return 0;
}

static int read_used(const struct json_doc *d, const struct json_path *at, const json_t *o, struct model_config *out,
		     struct err *e)
{
	for (size_t i = 0; i < ARRAY_LEN(keys); i++) {
		const struct hf_key *k = &keys[i];
		struct json_path path = { at, NULL };
		const json_t *v;
		void *field = (char *)out + k->offset;
		int rc;

		if (k->type == HF_U32)
			*(uint32_t *)field = (uint32_t)k->def;
		else if (k->type == HF_FLOAT)
			*(float *)field = (float)k->def;
		else
			*(bool *)field = k->def != 0;
		rc = find_key(d, at, o, k, &path.key, &v, e);
		if (!rc && v)
			rc = read_key(d, &path, k, v, out, e);
		if (rc)
			return rc;
	}
	return 0;
}

static int read_activation(const struct json_doc *d, const struct json_path *at, const json_t *o,
			   struct model_config *out, struct err *e)
{
	const json_t *v = given(o, "activation_function");
	struct json_path path = { at, "activation_function" };
	char words[64];

	out->activation = activations[0].value;
	if (!v)
		return 0;
	for (size_t i = 0; i < ARRAY_LEN(activations); i++) {
		if (json_is_string(v) && !strcmp(json_string_value(v), activations[i].name)) {
			out->activation = activations[i].value;
			return 0;
		}
	}
	return json_fail(d, &path, e, "expected gelu_new, gelu_pytorch_tanh, gelu, relu or silu, found %s",
			 json_words(v, words));
}

/* model_type and architectures: only GPT-2 with a language-model head is built. */
static int check_family(const struct json_doc *d, const struct json_path *at, const json_t *o, struct err *e)
{
	const json_t *type = given(o, "model_type"), *list = given(o, "architectures"), *a;
	struct json_path type_path = { at, "model_type" }, list_path = { at, "architectures" };
	char words[64];
	size_t i;

	if (type && !(json_is_string(type) && !strcmp(json_string_value(type), "gpt2")))
		return json_fail(d, &type_path, e, "%s is not built; the GPT-2 family is: \"gpt2\"",
				 json_words(type, words));
	if (!list)
		return 0;
	if (!json_is_array(list))
		return json_fail(d, &list_path, e, "expected a list, found %s", json_words(list, words));
	json_array_foreach(list, i,
			   a) if (!json_is_string(a) ||
				  (strcmp(json_string_value(a), "GPT2LMHeadModel") &&
				   strcmp(json_string_value(a),
					  "GPT2Model"))) return json_fail(d, &list_path, e,
									  "%s is not built; \"GPT2LMHeadModel\" is",
									  json_words(a, words));
	return 0;
}

static bool is_used(const char *key)
{
	if (!strcmp(key, "activation_function"))
		return true;
	for (size_t i = 0; i < ARRAY_LEN(keys); i++)
		if (!strcmp(key, keys[i].name) || (keys[i].alias && !strcmp(key, keys[i].alias)))
			return true;
	return false;
}

static int check_refused(const struct json_doc *d, const struct json_path *at, const json_t *o, struct err *e)
{
	for (size_t i = 0; i < ARRAY_LEN(refused); i++) {
		const json_t *v = given(o, refused[i].name);
		struct json_path path = { at, refused[i].name };

		if (v && !json_is_false(v) && !(json_is_object(v) && json_object_size(v) == 0))
			return json_fail(d, &path, e, "%s", refused[i].why);
	}
	return 0;
}

static int check_misspelt(const struct json_doc *d, const struct json_path *at, const json_t *o, struct err *e)
{
	const char *names[ARRAY_LEN(keys) + 2], *key, *near;
	json_t *v;
	size_t n = 0;

	for (; n < ARRAY_LEN(keys); n++)
		names[n] = keys[n].name;
	names[n++] = "activation_function";
	names[n] = NULL;
	json_object_foreach((json_t *)o, key, v)
	{
		struct json_path path = { at, key };

		near = is_used(key) ? NULL : nearest_name(key, names);
		if (near)
			return json_fail(d, &path, e, "unknown key; did you mean \"%s\"?", near);
	}
	return 0;
}

/* The user's keys, with everything that was used written out under its own name, and the type of the weights. */
static char *make_json(const json_t *o, const struct model_config *m)
{
	json_t *j = json_deep_copy(o);
	char *text = NULL;
	int bad = j == NULL;

	if (bad)
		return NULL;
	bad |= json_object_set_new(j, "architectures", json_pack("[s]", "GPT2LMHeadModel"));
	bad |= json_object_set_new(j, "model_type", json_string("gpt2"));
	bad |= json_object_set_new(j, "torch_dtype", json_string("float32"));
	if (json_object_get(j, "dtype"))
		bad |= json_object_set_new(j, "dtype", json_string("float32"));
	for (size_t i = 0; i < ARRAY_LEN(keys); i++) {
		const struct hf_key *k = &keys[i];
		const void *field = (const char *)m + k->offset;
		json_t *v;

		if (k->alias)
			(void)json_object_del(j, k->alias);
		if (given(j, k->name))
			continue;
		if (k->type == HF_U32)
			v = json_integer(*(const uint32_t *)field);
		else if (k->type == HF_FLOAT)
			v = json_real(k->def);
		else
			v = json_boolean(*(const bool *)field);
		bad |= json_object_set_new(j, k->name, v);
	}
	if (!given(j, "activation_function"))
		bad |= json_object_set_new(j, "activation_function", json_string(activations[0].name));
	if (!bad)
		text = json_dumps(j, JSON_INDENT(2) | JSON_SORT_KEYS);
	json_decref(j);
	return text;
}

int model_config_read(const struct json_doc *d, const struct json_path *at, const json_t *o, struct model_config *out,
		      struct err *e)
{
	struct model_config m = { .family = FAMILY_GPT2 };
	struct json_path head_path = { at, "n_head" };
	int rc;

	rc = check_family(d, at, o, e);
	if (!rc)
		rc = read_used(d, at, o, &m, e);
	if (!rc)
		rc = read_activation(d, at, o, &m, e);
	if (!rc)
		rc = check_refused(d, at, o, e);
	if (!rc)
		rc = check_misspelt(d, at, o, e);
	if (rc)
		return rc;
	if (m.n_embd % m.n_head)
		return json_fail(d, &head_path, e, "n_embd %u is not a multiple of n_head %u", m.n_embd, m.n_head);
	if (!m.n_inner)
		m.n_inner = 4 * m.n_embd;
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
