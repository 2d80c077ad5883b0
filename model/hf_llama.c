/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a config.json of the Llama family says beyond plain numbers. The four
 * families are one network with differences (transformers, modeling_llama.py,
 * modeling_mistral.py, modeling_qwen2.py, modeling_qwen3.py):
 *
 *            q k v bias        o bias            mlp bias   q/k norm  window
 *   llama    attention_bias    attention_bias    mlp_bias   no        none
 *   mistral  no                no                no         no        sliding_window, every layer
 *   qwen2    yes               no                no         no        use_sliding_window, by layer
 *   qwen3    attention_bias    attention_bias    no         yes       use_sliding_window, by layer
 *
 * Where a family has no say in a thing, a key that says otherwise is refused:
 * transformers would pass over it, and the user should know.
 */
#include "model/hf_config.h"

#include <errno.h>
#include <string.h>

#define WINDOW_DEFAULT 4096u
#define WINDOW_LAYERS_DEFAULT 28u

static const char *family_name(const struct hf_parse *p)
{
	static const char *const names[] = { "gpt2", "llama", "mistral", "qwen2", "qwen3" };

	return names[p->m->family];
}

static bool is_null(const struct hf_parse *p, const char *key)
{
	return json_is_null(json_object_get(p->o, key));
}

/* --------------------------------------------------------------------- shapes */

static int read_heads(struct hf_parse *p)
{
	struct json_path heads = { p->at, "num_attention_heads" }, kv = { p->at, "num_key_value_heads" };
	struct json_path dim = { p->at, "head_dim" };
	struct model_config *m = p->m;

	if (!m->n_kv_head || is_null(p, "num_key_value_heads"))
		m->n_kv_head = m->n_head;
	if (m->n_kv_head > m->n_head || m->n_head % m->n_kv_head)
		return json_fail(p->doc, &kv, p->e,
				 "num_attention_heads %u is not a multiple of num_key_value_heads %u", m->n_head,
				 m->n_kv_head);
	if (!m->head_dim && m->n_embd % m->n_head)
		return json_fail(
			p->doc, &heads, p->e,
			"hidden_size %u is not a multiple of num_attention_heads %u, and head_dim is not given",
			m->n_embd, m->n_head);
	if (!m->head_dim)
		m->head_dim = m->n_embd / m->n_head;
	if (m->head_dim % 2)
		return json_fail(p->doc, &dim, p->e, "%u is odd, and rotary positions turn pairs", m->head_dim);
	if ((uint64_t)m->n_head * m->head_dim > UINT32_MAX / 4)
		return json_fail(p->doc, &dim, p->e, "%u heads of %u are too wide", m->n_head, m->head_dim);
	return 0;
}

/* A switch that the family does not have must say what the family does. */
static int check_fixed(struct hf_parse *p, const char *key, bool given, bool fixed)
{
	struct json_path path = { p->at, key };

	if (given == fixed)
		return 0;
	return json_fail(p->doc, &path, p->e, "model_type \"%s\" is always %s here", family_name(p),
			 fixed ? "true" : "false");
}

static int read_biases(struct hf_parse *p)
{
	struct model_config *m = p->m;
	int rc = 0;

	if (m->family == FAMILY_MISTRAL || m->family == FAMILY_QWEN2)
		rc = check_fixed(p, "attention_bias", m->attention_bias, m->family == FAMILY_QWEN2);
	if (!rc && m->family != FAMILY_LLAMA)
		rc = check_fixed(p, "mlp_bias", m->mlp_bias, false);
	m->attention_out_bias = m->attention_bias && m->family != FAMILY_QWEN2;
	m->qk_norm = m->family == FAMILY_QWEN3;
	return rc;
}

/* -------------------------------------------------------------------- windows */

/* An integer key that stands in no row of the tables; not given: *out stays. */
static int read_count(struct hf_parse *p, const char *key, uint64_t min, uint32_t *out)
{
	struct json_path path = { p->at, key };
	const json_t *v = hf_given(p->o, key);
	uint64_t n;
	int rc = 0;

	if (v)
		rc = json_read_u64(p->doc, &path, v, min, INT32_MAX, &n, p->e);
	if (v && !rc)
		*out = (uint32_t)n;
	return rc;
}

static void set_windowed(struct model_config *m, uint32_t first_layer)
{
	for (uint32_t i = first_layer; i < m->n_layer; i++)
		m->windowed[i / 64] |= UINT64_C(1) << i % 64;
}

/* layer_types: of the Qwens it decides, elsewhere it may only agree with what the family does. */
static int read_layer_types(struct hf_parse *p)
{
	struct json_path path = { p->at, "layer_types" };
	const json_t *list = hf_given(p->o, path.key);
	uint64_t asked[MODEL_LAYERS_MAX / 64] = { 0 };
	struct model_config *m = p->m;
	char words[64];

	if (!list)
		return 0;
	if (!json_is_array(list) || json_array_size(list) != m->n_layer)
		return json_fail(p->doc, &path, p->e, "expected a list of num_hidden_layers = %u words", m->n_layer);
	for (uint32_t i = 0; i < m->n_layer; i++) {
		const json_t *v = json_array_get(list, i);
		const char *word = json_is_string(v) ? json_string_value(v) : "";

		if (!strcmp(word, "sliding_attention"))
			asked[i / 64] |= UINT64_C(1) << i % 64;
		else if (strcmp(word, "full_attention"))
			return json_fail(p->doc, &path, p->e,
					 "layer %u: expected \"full_attention\" or \"sliding_attention\", found %s", i,
					 json_words(v, words));
	}
	if (m->family == FAMILY_QWEN2 || m->family == FAMILY_QWEN3)
		memcpy(m->windowed, asked, sizeof(asked));
	else if (memcmp(m->windowed, asked, sizeof(asked)))
		return json_fail(p->doc, &path, p->e,
				 "model_type \"%s\" has one kind of attention, and this is another", family_name(p));
	return 0;
}

static int read_use_window(struct hf_parse *p, bool *use)
{
	struct json_path path = { p->at, "use_sliding_window" };
	const json_t *v = hf_given(p->o, path.key);
	bool said;
	int rc;

	if (!v)
		return 0;
	rc = json_read_bool(p->doc, &path, v, &said, p->e);
	if (rc)
		return rc;
	if ((p->m->family == FAMILY_LLAMA && said) || (p->m->family == FAMILY_MISTRAL && said != *use))
		return json_fail(p->doc, &path, p->e, "model_type \"%s\" pays no attention to it; %s", family_name(p),
				 p->m->family == FAMILY_LLAMA ? "its attention has no window"
							      : "sliding_window alone decides");
	*use = said;
	return 0;
}

static int read_windows(struct hf_parse *p)
{
	struct json_path path = { p->at, "sliding_window" };
	struct model_config *m = p->m;
	bool llama = m->family == FAMILY_LLAMA, use = m->family == FAMILY_MISTRAL;
	uint32_t window = is_null(p, path.key) || llama ? 0 : WINDOW_DEFAULT, first = WINDOW_LAYERS_DEFAULT;
	uint64_t any = 0;
	int rc = read_count(p, path.key, 1, &window);

	use = use && window;
	if (!rc)
		rc = read_use_window(p, &use);
	if (!rc && llama && window && !hf_given(p->o, "use_sliding_window"))
		rc = json_fail(p->doc, &path, p->e, "model_type \"llama\" pays no attention to it; leave it out");
	if (!rc)
		rc = read_count(p, "max_window_layers", 0, &first);
	if (rc)
		return rc;
	m->sliding_window = use ? window : 0;
	if (m->sliding_window)
		set_windowed(m, m->family == FAMILY_MISTRAL ? 0 : first);
	rc = read_layer_types(p);
	for (size_t i = 0; i < ARRAY_LEN(m->windowed); i++)
		any |= m->windowed[i];
	if (!rc && any && !m->sliding_window)
		rc = json_fail(
			p->doc, &(struct json_path){ p->at, "layer_types" }, p->e,
			"asks for sliding_attention, and there is no window (use_sliding_window, sliding_window)");
	return rc;
}

int hf_llama_read(struct hf_parse *p)
{
	int rc = read_heads(p);

	p->m->scale_attn_weights = true;
	if (!rc)
		rc = read_biases(p);
	if (!rc)
		rc = read_windows(p);
	return rc ? rc : hf_rope_read(p);
}
