/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The cut of a model into units, tensors, pages and runs. All of it follows
 * from the model's config alone, so every member computes the same table and
 * nothing of it travels.
 *
 * A tied embedding has two uses, and their gradients are reduced in two trees.
 * Its table comes first in unit 0 and what follows starts on the next page, so
 * that the second part is whole pages and no page mixes tensors with one and
 * with two parts.
 */
#include "model/model.h"

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define TENSOR_ALIGN 128u
#define PAGE_MIN (64u * 1024 / 4)
#define PAGE_MAX (4096u * 1024 / 4)
#define BLOCK_PAGES_MIN 64u
#define TENSORS_EMBEDDING_MAX 2u
#define TENSORS_BLOCK_MAX 18u
#define TENSORS_HEAD_MAX 3u

static_assert(PAGE_MIN % TENSOR_ALIGN == 0, "a page holds whole alignment steps");

static struct tensor_info *tensor_add(struct unit_table *t, uint32_t unit, const char *name, uint64_t rows,
				      uint64_t cols)
{
	struct unit_info *u = &t->unit[unit];
	struct tensor_info *x = &t->tensor[t->n_tensors++];

	snprintf(x->name, sizeof(x->name), "%s", name);
	x->unit = unit;
	x->n_dims = cols ? 2 : 1;
	x->shape[0] = rows;
	x->shape[1] = cols;
	x->n = cols ? rows * cols : rows;
	x->offset = round_up_u64(u->n_used, TENSOR_ALIGN);
	x->init = INIT_ZERO;
	x->rng_stream = hash64(x->name, strlen(x->name), 0);
	u->n_used = x->offset + x->n;
	u->n_tensors++;
	return x;
}

static void tensor_normal(struct tensor_info *x, double std)
{
	x->init = INIT_NORMAL;
	x->init_std = (float)std;
}

static struct unit_info *unit_begin(struct unit_table *t, enum unit_kind kind, uint32_t layer)
{
	struct unit_info *u = &t->unit[t->n_units++];

	u->kind = kind;
	u->layer = layer;
	u->first_tensor = t->n_tensors;
	return u;
}

/* --------------------------------------------------------------- a block's tensors */

/* One tensor of a block: its name behind the block's prefix; cols 0: one dimension. */
struct block_tensor {
	const char *name;
	uint64_t rows, cols;
	enum tensor_init init;
	double std;
};

struct block_list {
	struct block_tensor t[TENSORS_BLOCK_MAX];
	uint32_t n;
};

static void list_add(struct block_list *l, const char *name, uint64_t rows, uint64_t cols, enum tensor_init init,
		     double std)
{
	assert(l->n < TENSORS_BLOCK_MAX);
	l->t[l->n++] = (struct block_tensor){ name, rows, cols, init, std };
}

/* GPT2LMHeadModel (transformers, modeling_gpt2.py). Conv1D: a weight is [in][out]. */
static void list_gpt2(struct block_list *l, const struct model_config *m)
{
	uint64_t c = m->n_embd, f = m->n_inner;
	double std = m->initializer_range, std_residual = std / sqrt(2.0 * m->n_layer);

	list_add(l, "ln_1.weight", c, 0, INIT_ONE, 0);
	list_add(l, "ln_1.bias", c, 0, INIT_ZERO, 0);
	list_add(l, "attn.c_attn.weight", c, 3 * c, INIT_NORMAL, std);
	list_add(l, "attn.c_attn.bias", 3 * c, 0, INIT_ZERO, 0);
	list_add(l, "attn.c_proj.weight", c, c, INIT_NORMAL, std_residual);
	list_add(l, "attn.c_proj.bias", c, 0, INIT_ZERO, 0);
	list_add(l, "ln_2.weight", c, 0, INIT_ONE, 0);
	list_add(l, "ln_2.bias", c, 0, INIT_ZERO, 0);
	list_add(l, "mlp.c_fc.weight", c, f, INIT_NORMAL, std);
	list_add(l, "mlp.c_fc.bias", f, 0, INIT_ZERO, 0);
	list_add(l, "mlp.c_proj.weight", f, c, INIT_NORMAL, std_residual);
	list_add(l, "mlp.c_proj.bias", c, 0, INIT_ZERO, 0);
}

/* nn.Linear: a weight is [out][in]. */
static void list_linear(struct block_list *l, const char *weight, const char *bias, uint64_t out, uint64_t in,
			double std)
{
	list_add(l, weight, out, in, INIT_NORMAL, std);
	if (bias)
		list_add(l, bias, out, 0, INIT_ZERO, 0);
}

/* {Llama,Mistral,Qwen2,Qwen3}ForCausalLM (transformers, modeling_llama.py and its siblings). */
static void list_llama(struct block_list *l, const struct model_config *m)
{
	uint64_t c = m->n_embd, f = m->n_inner, q = (uint64_t)m->n_head * m->head_dim;
	uint64_t kv = (uint64_t)m->n_kv_head * m->head_dim;
	bool in = m->attention_bias, out = m->attention_out_bias, mlp = m->mlp_bias;
	double std = m->initializer_range;

	list_add(l, "input_layernorm.weight", c, 0, INIT_ONE, 0);
	list_linear(l, "self_attn.q_proj.weight", in ? "self_attn.q_proj.bias" : NULL, q, c, std);
	list_linear(l, "self_attn.k_proj.weight", in ? "self_attn.k_proj.bias" : NULL, kv, c, std);
	list_linear(l, "self_attn.v_proj.weight", in ? "self_attn.v_proj.bias" : NULL, kv, c, std);
	if (m->qk_norm) {
		list_add(l, "self_attn.q_norm.weight", m->head_dim, 0, INIT_ONE, 0);
		list_add(l, "self_attn.k_norm.weight", m->head_dim, 0, INIT_ONE, 0);
	}
	list_linear(l, "self_attn.o_proj.weight", out ? "self_attn.o_proj.bias" : NULL, c, q, std);
	list_add(l, "post_attention_layernorm.weight", c, 0, INIT_ONE, 0);
	list_linear(l, "mlp.gate_proj.weight", mlp ? "mlp.gate_proj.bias" : NULL, f, c, std);
	list_linear(l, "mlp.up_proj.weight", mlp ? "mlp.up_proj.bias" : NULL, f, c, std);
	list_linear(l, "mlp.down_proj.weight", mlp ? "mlp.down_proj.bias" : NULL, c, f, std);
}

static void list_block(struct block_list *l, const struct model_config *m)
{
	l->n = 0;
	if (model_is_llama(m))
		list_llama(l, m);
	else
		list_gpt2(l, m);
}

/* Elements a block takes, with the gaps between its tensors: what the page's size follows from. */
static uint64_t block_elements(const struct block_list *l)
{
	uint64_t n = 0;

	for (uint32_t i = 0; i < l->n; i++)
		n = round_up_u64(n, TENSOR_ALIGN) + l->t[i].rows * (l->t[i].cols ? l->t[i].cols : 1);
	return n;
}

static void add_block(struct unit_table *t, const struct model_config *m, const struct block_list *l, uint32_t layer)
{
	uint32_t unit = t->n_units;

	unit_begin(t, UNIT_BLOCK, layer);
	for (uint32_t i = 0; i < l->n; i++) {
		const struct block_tensor *b = &l->t[i];
		struct tensor_info *x;
		char name[96];

		snprintf(name, sizeof(name), "%s.%u.%s", model_is_llama(m) ? "model.layers" : "transformer.h", layer,
			 b->name);
		x = tensor_add(t, unit, name, b->rows, b->cols);
		x->init = b->init;
		x->init_std = (float)b->std;
	}
}

/* ------------------------------------------------------------------- the two ends */

/* The page's size must be known when this is called: see the top of the file. */
static void add_embedding(struct unit_table *t, const struct model_config *m)
{
	bool llama = model_is_llama(m);
	struct unit_info *u = &t->unit[0];

	u->kind = UNIT_EMBEDDING;
	tensor_normal(tensor_add(t, 0, llama ? "model.embed_tokens.weight" : "transformer.wte.weight", m->vocab_size,
				 m->n_embd),
		      m->initializer_range);
	u->n_parts = 1;
	if (m->tie_word_embeddings) {
		u->n_parts = 2;
		u->part[1].end = round_up_u64(u->n_used, t->page);
	}
	if (llama)
		return;
	if (m->tie_word_embeddings)
		u->n_used = u->part[1].end;
	tensor_normal(tensor_add(t, 0, "transformer.wpe.weight", m->n_positions, m->n_embd), m->initializer_range);
}

static void add_head(struct unit_table *t, const struct model_config *m)
{
	uint32_t unit = t->n_units;

	unit_begin(t, UNIT_HEAD, 0);
	if (model_is_llama(m)) {
		tensor_add(t, unit, "model.norm.weight", m->n_embd, 0)->init = INIT_ONE;
	} else {
		tensor_add(t, unit, "transformer.ln_f.weight", m->n_embd, 0)->init = INIT_ONE;
		tensor_add(t, unit, "transformer.ln_f.bias", m->n_embd, 0);
	}
	if (!m->tie_word_embeddings)
		tensor_normal(tensor_add(t, unit, "lm_head.weight", m->vocab_size, m->n_embd), m->initializer_range);
}

/* ---------------------------------------------------------------------- the table */

static uint64_t page_elements(uint64_t smallest_block)
{
	uint64_t page = PAGE_MAX;

	while (page > PAGE_MIN && (smallest_block + page - 1) / page < BLOCK_PAGES_MIN)
		page /= 2;
	return page;
}

static void finish_units(struct unit_table *t)
{
	for (uint32_t i = 0; i < t->n_units; i++) {
		struct unit_info *u = &t->unit[i];

		u->n = round_up_u64(u->n_used, t->page);
		u->n_pages = (uint32_t)(u->n / t->page);
		u->n_runs = u->n_pages < RUNS_PER_UNIT_MAX ? u->n_pages : RUNS_PER_UNIT_MAX;
		if (!u->n_parts)
			u->n_parts = 1;
		u->part[0].end = u->n;
		t->n_elements += u->n;
		if (u->n > t->largest_unit)
			t->largest_unit = u->n;
	}
	for (uint32_t i = 0; i < t->n_tensors; i++)
		t->n_parameters += t->tensor[i].n;
}

int unit_table_init(struct unit_table *t, const struct model_config *m, struct err *e)
{
	size_t n_units = (size_t)m->n_layer + 2, n_tensors;
	struct block_list block;

	assert(m->n_layer > 0 && m->n_embd > 0 && m->n_inner > 0 && m->vocab_size > 0 && m->n_positions > 0);
	assert(!model_is_llama(m) || (m->n_kv_head > 0 && m->head_dim > 0));
	list_block(&block, m);
	n_tensors = TENSORS_EMBEDDING_MAX + (size_t)m->n_layer * block.n + TENSORS_HEAD_MAX;
	*t = (struct unit_table){ 0 };
	t->unit = calloc(n_units, sizeof(*t->unit));
	t->tensor = calloc(n_tensors, sizeof(*t->tensor));
	if (!t->unit || !t->tensor) {
		unit_table_release(t);
		return err_set(e, -ENOMEM, "unit table: out of memory for %zu tensors", n_tensors);
	}
	t->page = page_elements(block_elements(&block));
	t->n_units = 1;
	add_embedding(t, m);
	for (uint32_t i = 0; i < m->n_layer; i++)
		add_block(t, m, &block, i);
	add_head(t, m);
	assert(t->n_units == n_units && t->n_tensors <= n_tensors);
	assert(t->unit[1].n_used == block_elements(&block));
	finish_units(t);
	return 0;
}

void unit_table_release(struct unit_table *t)
{
	free(t->unit);
	free(t->tensor);
	*t = (struct unit_table){ 0 };
}

uint64_t unit_run_begin(const struct unit_table *t, uint32_t unit, uint32_t r)
{
	const struct unit_info *u = &t->unit[unit];

	assert(unit < t->n_units && r <= u->n_runs);
	return (uint64_t)u->n_pages * r / u->n_runs * t->page;
}

const struct tensor_info *unit_table_find(const struct unit_table *t, const char *name)
{
	for (uint32_t i = 0; i < t->n_tensors; i++)
		if (!strcmp(t->tensor[i].name, name))
			return &t->tensor[i];
	return NULL;
}
