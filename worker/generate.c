/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Text generation with a cache of keys and values. The cache of a layer is the
 * rows that c_attn writes ([position][q k v]), so attention reads keys and
 * values where the product left them and nothing is copied; the price is the
 * room of the q. Feeding n tokens is one pass over n rows, whether they are a
 * prompt or the one token just drawn.
 *
 * A learned position embedding ends at n_positions. A context that outgrows it
 * keeps its newer half, which is fed again from position 0.
 */
#include "worker/worker.h"
#include "kernels/kernels.h"
#include "worker/net.h"
#include "worker/sample.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CONFIG_BYTES_MAX (16u << 20)
#define STREAM_SAMPLE 0x73616d706c65u

struct generator {
	struct model_config model;
	struct unit_table table;
	struct net net; /* for where the tensors lie; no activations */
	struct k_profile profile;
	struct arena arena;
	float **unit;              /* [n_units] flat vectors */
	float *cache;              /* [n_layer][n_positions][3C] */
	float *x, *y, *att, *wide; /* [n_positions][C]; wide: or n_inner, the larger */
	float *logits, *scratch;   /* [vocab] */
	void *workspace;
	size_t workspace_bytes;
	uint32_t *context; /* [n_positions] */
	uint32_t n_context;
	double temperature;
	uint32_t top_k;
	uint64_t seed, drawn;
};

/* ----------------------------------------------------------------- loading */

static int load_config(struct generator *g, const char *dir, struct err *e)
{
	char path[4096], *text;
	size_t bytes;
	int rc;

	snprintf(path, sizeof(path), "%s/config.json", dir);
	rc = file_read(path, CONFIG_BYTES_MAX, &text, &bytes, e);
	if (rc)
		return rc;
	rc = model_config_parse(text, path, &g->model, e);
	free(text);
	return rc;
}

/* GPT2Model's own files lack the prefix that GPT2LMHeadModel's have. */
static const struct st_tensor *find_tensor(const struct st_file *f, const char *name)
{
	static const char prefix[] = "transformer.";
	const struct st_tensor *t = st_find(f, name);

	if (!t && strncmp(name, prefix, sizeof(prefix) - 1) == 0)
		t = st_find(f, name + sizeof(prefix) - 1);
	return t;
}

static int load_tensor(struct generator *g, const struct st_file *f, const struct tensor_info *want, struct err *e)
{
	const struct st_tensor *t = find_tensor(f, want->name);
	bool same = t && t->n_dims == want->n_dims;

	if (!t)
		return err_set(e, -EINVAL, "%s: tensor %s is missing", f->path, want->name);
	for (uint32_t d = 0; same && d < t->n_dims; d++)
		same = t->shape[d] == want->shape[d];
	if (!same)
		return err_set(e, -EINVAL, "%s: tensor %s does not have the shape that config.json asks for", f->path,
			       want->name);
	return st_read_f32(f, t, 0, want->n, g->unit[want->unit] + want->offset, e);
}

static int load_tensors(struct generator *g, const char *dir, struct err *e)
{
	char path[4096];
	struct st_file f = { 0 };
	int rc;

	snprintf(path, sizeof(path), "%s/model.safetensors", dir);
	rc = st_open(path, &f, e);
	for (uint32_t i = 0; !rc && i < g->table.n_tensors; i++)
		rc = load_tensor(g, &f, &g->table.tensor[i], e);
	if (f.path)
		st_close(&f);
	return rc;
}

/* ------------------------------------------------------------------ memory */

/* One walk to count and one to take, so that the two cannot differ; a->base NULL: count. */
static void *take(struct arena *a, uint64_t bytes)
{
	void *p = NULL;

	bytes = round_up_u64(bytes, CACHE_LINE);
	if (a->base) {
		p = arena_alloc(a, bytes, CACHE_LINE);
		assert(p);
	} else {
		a->used += bytes;
	}
	return p;
}

static void walk_memory(struct generator *g, struct arena *a)
{
	const struct model_config *m = &g->model;
	size_t rows = m->n_positions, c = m->n_embd;

	for (uint32_t i = 0; i < g->table.n_units; i++)
		g->unit[i] = take(a, g->table.unit[i].n * sizeof(float));
	g->cache = take(a, m->n_layer * rows * 3 * c * sizeof(float));
	g->x = take(a, rows * c * sizeof(float));
	g->y = take(a, rows * c * sizeof(float));
	g->att = take(a, rows * c * sizeof(float));
	g->wide = take(a, rows * (m->n_inner > c ? m->n_inner : c) * sizeof(float));
	g->logits = take(a, m->vocab_size * sizeof(float));
	g->scratch = take(a, m->vocab_size * sizeof(float));
	g->context = take(a, rows * sizeof(uint32_t));
	g->workspace = take(a, g->workspace_bytes);
}

static int take_memory(struct generator *g, unsigned threads, struct err *e)
{
	struct arena count = { 0 };
	struct k_dims dims;
	char text[24];
	int rc;

	net_dims(&g->model, 1, g->model.n_positions, 1, &dims);
	g->workspace_bytes = k_cpu_ops()->workspace_bytes(&dims, threads);
	g->unit = calloc(g->table.n_units, sizeof(*g->unit));
	if (!g->unit)
		return err_set(e, -ENOMEM, "out of memory");
	walk_memory(g, &count);
	rc = arena_init(&g->arena, "generation", count.used);
	if (rc)
		return err_set(e, rc, "no memory for the model and its cache (%s)", bytes_text(count.used, text));
	walk_memory(g, &g->arena);
	return 0;
}

static int open_math(struct generator *g, const struct generator_config *cfg, unsigned threads, struct err *e)
{
	struct k_stream_config s = { .profile = &g->profile, .threads = threads };
	int rc = k_profile_detect(cfg->math, &g->profile, NULL, e);

	if (rc)
		return rc;
	rc = take_memory(g, threads, e);
	if (rc)
		return rc;
	s.workspace = g->workspace;
	s.workspace_bytes = g->workspace_bytes;
	return k_cpu_ops()->stream_open(&s, &g->net.stream, e);
}

static int open_net(struct generator *g, struct err *e)
{
	struct net_config cfg = {
		.model = &g->model,
		.table = &g->table,
		.k = k_cpu_ops(),
		.batch = 1,
		.seq = g->model.n_positions,
		.max_span = 1,
	};
	int rc = unit_table_init(&g->table, &g->model, e);

	return rc ? rc : net_init(&g->net, &cfg, e);
}

int generator_open(const struct generator_config *cfg, struct generator **out, struct err *e)
{
	long cores = sysconf(_SC_NPROCESSORS_ONLN);
	unsigned threads = cfg->threads ? cfg->threads : cores > 0 ? (unsigned)cores : 1;
	struct generator *g = calloc(1, sizeof(*g));
	int rc;

	if (!g)
		return err_set(e, -ENOMEM, "out of memory");
	g->temperature = cfg->temperature;
	g->top_k = cfg->top_k;
	g->seed = cfg->seed;
	rc = load_config(g, cfg->model_dir, e);
	if (!rc)
		rc = open_net(g, e);
	if (!rc)
		rc = open_math(g, cfg, threads, e);
	if (!rc)
		rc = load_tensors(g, cfg->model_dir, e);
	if (rc)
		generator_free(g);
	else
		*out = g;
	return rc;
}

void generator_free(struct generator *g)
{
	if (!g)
		return;
	if (g->net.stream)
		k_cpu_ops()->stream_close(g->net.stream);
	if (g->net.cfg.table)
		net_release(&g->net);
	unit_table_release(&g->table);
	model_config_release(&g->model);
	arena_release(&g->arena);
	free(g->unit);
	free(g);
}

const struct model_config *generator_model(const struct generator *g)
{
	return &g->model;
}

const char *generator_profile(const struct generator *g)
{
	return g->profile.text;
}

/* ----------------------------------------------------------------- forward */

static void norm(struct generator *g, uint32_t n, const float *branch, const float *gamma, const float *beta)
{
	struct k_norm a = {
		.n_mb = 1,
		.rows = n,
		.cols = g->model.n_embd,
		.eps = g->model.layer_norm_epsilon,
		.x = g->x,
		.branch = branch,
		.sum = branch ? g->x : NULL,
		.gamma = gamma,
		.beta = beta,
		.y = g->y,
	};

	k_cpu_ops()->norm(g->net.stream, &a);
}

static void linear(struct generator *g, const struct k_linear *shape, uint32_t n)
{
	struct k_linear a = *shape;

	a.n_mb = 1;
	a.rows = n;
	k_cpu_ops()->linear(g->net.stream, &a);
}

static void attention(struct generator *g, uint32_t layer, const float *cache, uint32_t first, uint32_t n)
{
	const struct model_config *m = &g->model;
	size_t stride = 3 * (size_t)m->n_embd;
	struct k_attention a = {
		.n_mb = 1,
		.batch = 1,
		.q_len = n,
		.kv_len = first + n,
		.heads = m->n_head,
		.kv_heads = m->n_head,
		.head_dim = m->n_embd / m->n_head,
		.scale = net_attention_scale(m, layer),
		.q = cache + first * stride,
		.k = cache + m->n_embd,
		.v = cache + 2 * (size_t)m->n_embd,
		.q_stride = stride,
		.k_stride = stride,
		.v_stride = stride,
		.out_stride = m->n_embd,
		.out = g->att,
	};

	k_cpu_ops()->attention(g->net.stream, &a);
}

static void block(struct generator *g, uint32_t layer, uint32_t first, uint32_t n)
{
	const struct model_config *m = &g->model;
	const struct block_refs *r = &g->net.refs.block[layer];
	const float *p = g->unit[net_unit_block(&g->net, layer)];
	size_t stride = 3 * (size_t)m->n_embd;
	float *cache = g->cache + layer * m->n_positions * stride;
	uint32_t c = m->n_embd;
	struct k_residual add = { .n_mb = 1, .rows = n, .cols = c, .x = g->x, .branch = g->y, .out = g->x };

	norm(g, n, NULL, p + r->ln1_w, p + r->ln1_b);
	linear(g,
	       &(struct k_linear){ .in = c,
				   .out = 3 * c,
				   .x = g->y,
				   .w = p + r->attn_w,
				   .b = p + r->attn_b,
				   .y = cache + first * stride },
	       n);
	attention(g, layer, cache, first, n);
	linear(g,
	       &(struct k_linear){
		       .in = c, .out = c, .x = g->att, .w = p + r->proj_w, .b = p + r->proj_b, .y = g->wide },
	       n);
	norm(g, n, g->wide, p + r->ln2_w, p + r->ln2_b);
	linear(g,
	       &(struct k_linear){ .in = c,
				   .out = m->n_inner,
				   .act = (enum k_activation)m->activation,
				   .x = g->y,
				   .w = p + r->fc_w,
				   .b = p + r->fc_b,
				   .y = g->wide },
	       n);
	linear(g,
	       &(struct k_linear){
		       .in = m->n_inner, .out = c, .x = g->wide, .w = p + r->out_w, .b = p + r->out_b, .y = g->y },
	       n);
	k_cpu_ops()->residual(g->net.stream, &add);
}

/* Only the last row's logits are wanted. */
static void head(struct generator *g, uint32_t n)
{
	const struct model_config *m = &g->model;
	const float *p = g->unit[net_unit_head(&g->net)];
	const float *w = (m->tie_word_embeddings ? g->unit[0] : p) + g->net.refs.head_w;
	struct k_linear a = {
		.in = m->n_embd,
		.out = m->vocab_size,
		.w_out_in = true,
		.x = g->y + (size_t)(n - 1) * m->n_embd,
		.w = w,
		.y = g->logits,
	};

	norm(g, n, NULL, p + g->net.refs.lnf_w, p + g->net.refs.lnf_b);
	linear(g, &a, 1);
}

/* The newest n tokens of the context, whose first stands at position n_context - n. */
static int forward(struct generator *g, uint32_t n, struct err *e)
{
	const struct model_config *m = &g->model;
	uint32_t first = g->n_context - n;
	struct k_embed embed = {
		.n_mb = 1,
		.batch = 1,
		.seq = n,
		.channels = m->n_embd,
		.vocab = m->vocab_size,
		.first_position = first,
		.tokens = g->context + first,
		.wte = g->unit[0] + g->net.refs.wte,
		.wpe = g->unit[0] + g->net.refs.wpe,
		.x = g->x,
	};
	struct k_event done;
	int rc;

	k_cpu_ops()->embed(g->net.stream, &embed);
	for (uint32_t l = 0; l < m->n_layer; l++)
		block(g, l, first, n);
	head(g, n);
	k_cpu_ops()->event_record(g->net.stream, &done);
	k_cpu_ops()->event_wait(g->net.stream, &done);
	rc = k_cpu_ops()->stream_error(g->net.stream);
	return rc ? err_set(e, rc, "the computation failed: %s", strerror(-rc)) : 0;
}

int generator_feed(struct generator *g, const uint32_t *tokens, size_t n, struct err *e)
{
	uint32_t room = g->model.n_positions, fresh;

	assert(n > 0);
	for (size_t i = 0; i < n; i++)
		if (tokens[i] >= g->model.vocab_size)
			return err_set(e, -EINVAL, "token %u is outside the model's vocabulary of %u", tokens[i],
				       g->model.vocab_size);
	if (g->n_context + n <= room) {
		fresh = (uint32_t)n;
		memcpy(g->context + g->n_context, tokens, n * sizeof(*tokens));
		g->n_context += fresh;
		return forward(g, fresh, e);
	}
	/* Too long: the newest half of what there is, old and new, from position 0. */
	fresh = room > 1 ? room / 2 : 1;
	if (n >= fresh) {
		memcpy(g->context, tokens + n - fresh, fresh * sizeof(*tokens));
	} else {
		uint32_t old = fresh - (uint32_t)n;

		memmove(g->context, g->context + g->n_context - old, old * sizeof(*tokens));
		memcpy(g->context + old, tokens, n * sizeof(*tokens));
	}
	g->n_context = fresh;
	return forward(g, fresh, e);
}

const float *generator_logits(const struct generator *g)
{
	return g->n_context ? g->logits : NULL;
}

int generator_next(struct generator *g, uint32_t *token, struct err *e)
{
	uint32_t t;
	int rc;

	if (!g->n_context)
		return err_set(e, -EINVAL, "nothing to continue: feed at least one token first");
	t = sample_token(g->logits, g->model.vocab_size, g->temperature, g->top_k,
			 rng_uniform(g->seed, STREAM_SAMPLE, g->drawn), g->scratch);
	g->drawn++;
	rc = generator_feed(g, &t, 1, e);
	if (!rc)
		*token = t;
	return rc;
}
