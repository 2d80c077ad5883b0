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
#define TENSORS_EMBEDDING 2u
#define TENSORS_BLOCK 12u
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

static void add_norm(struct unit_table *t, uint32_t unit, const char *prefix, uint64_t width)
{
	char name[96];

	snprintf(name, sizeof(name), "%s.weight", prefix);
	tensor_add(t, unit, name, width, 0)->init = INIT_ONE;
	snprintf(name, sizeof(name), "%s.bias", prefix);
	tensor_add(t, unit, name, width, 0);
}

/* HF's Conv1D: the weight is [in][out]. */
static void add_linear(struct unit_table *t, uint32_t unit, const char *prefix, uint64_t in, uint64_t out, double std)
{
	char name[96];

	snprintf(name, sizeof(name), "%s.weight", prefix);
	tensor_normal(tensor_add(t, unit, name, in, out), std);
	snprintf(name, sizeof(name), "%s.bias", prefix);
	tensor_add(t, unit, name, out, 0);
}

static struct unit_info *unit_begin(struct unit_table *t, enum unit_kind kind, uint32_t layer)
{
	struct unit_info *u = &t->unit[t->n_units++];

	u->kind = kind;
	u->layer = layer;
	u->first_tensor = t->n_tensors;
	return u;
}

/* GPT2LMHeadModel's names, shapes and initialisation (transformers, modeling_gpt2.py). */
static void add_block(struct unit_table *t, const struct model_config *m, uint32_t layer)
{
	double std = m->initializer_range;
	double std_residual = std / sqrt(2.0 * m->n_layer);
	uint32_t unit = t->n_units;
	uint64_t c = m->n_embd;
	char p[80];

	unit_begin(t, UNIT_BLOCK, layer);
	snprintf(p, sizeof(p), "transformer.h.%u.ln_1", layer);
	add_norm(t, unit, p, c);
	snprintf(p, sizeof(p), "transformer.h.%u.attn.c_attn", layer);
	add_linear(t, unit, p, c, 3 * c, std);
	snprintf(p, sizeof(p), "transformer.h.%u.attn.c_proj", layer);
	add_linear(t, unit, p, c, c, std_residual);
	snprintf(p, sizeof(p), "transformer.h.%u.ln_2", layer);
	add_norm(t, unit, p, c);
	snprintf(p, sizeof(p), "transformer.h.%u.mlp.c_fc", layer);
	add_linear(t, unit, p, c, m->n_inner, std);
	snprintf(p, sizeof(p), "transformer.h.%u.mlp.c_proj", layer);
	add_linear(t, unit, p, m->n_inner, c, std_residual);
	assert(t->unit[unit].n_tensors == TENSORS_BLOCK);
}

/* The page's size must be known when this is called: see the top of the file. */
static void add_embedding(struct unit_table *t, const struct model_config *m)
{
	struct unit_info *u = &t->unit[0];
	struct tensor_info *wte;

	u->kind = UNIT_EMBEDDING;
	wte = tensor_add(t, 0, "transformer.wte.weight", m->vocab_size, m->n_embd);
	tensor_normal(wte, m->initializer_range);
	u->n_parts = 1;
	if (m->tie_word_embeddings) {
		u->n_used = round_up_u64(u->n_used, t->page);
		u->n_parts = 2;
		u->part[1].end = u->n_used;
	}
	tensor_normal(tensor_add(t, 0, "transformer.wpe.weight", m->n_positions, m->n_embd), m->initializer_range);
}

static void add_head(struct unit_table *t, const struct model_config *m)
{
	uint32_t unit = t->n_units;

	unit_begin(t, UNIT_HEAD, 0);
	add_norm(t, unit, "transformer.ln_f", m->n_embd);
	if (!m->tie_word_embeddings)
		tensor_normal(tensor_add(t, unit, "lm_head.weight", m->vocab_size, m->n_embd), m->initializer_range);
}

/* Elements a block takes, with the gaps between its tensors: what the page's size follows from. */
static uint64_t block_elements(const struct model_config *m)
{
	uint64_t c = m->n_embd, f = m->n_inner;
	uint64_t w[TENSORS_BLOCK] = { c, c, c * 3 * c, 3 * c, c * c, c, c, c, c * f, f, f * c, c };
	uint64_t n = 0;

	for (size_t i = 0; i < ARRAY_LEN(w); i++)
		n = round_up_u64(n, TENSOR_ALIGN) + w[i];
	return n;
}

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
	size_t n_units = (size_t)m->n_layer + 2;
	size_t n_tensors = TENSORS_EMBEDDING + (size_t)m->n_layer * TENSORS_BLOCK + TENSORS_HEAD_MAX;

	assert(m->n_layer > 0 && m->n_embd > 0 && m->n_inner > 0 && m->vocab_size > 0 && m->n_positions > 0);
	*t = (struct unit_table){ 0 };
	t->unit = calloc(n_units, sizeof(*t->unit));
	t->tensor = calloc(n_tensors, sizeof(*t->tensor));
	if (!t->unit || !t->tensor) {
		unit_table_release(t);
		return err_set(e, -ENOMEM, "unit table: out of memory for %zu tensors", n_tensors);
	}
	t->page = page_elements(block_elements(m));
	t->n_units = 1;
	add_embedding(t, m);
	for (uint32_t i = 0; i < m->n_layer; i++)
		add_block(t, m, i);
	add_head(t, m);
	assert(t->n_units == n_units && t->n_tensors <= n_tensors);
	assert(t->unit[1].n_used == block_elements(m));
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
