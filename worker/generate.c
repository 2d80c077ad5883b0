/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Text generation with a cache of keys and values. The cache of a layer is the
 * buffer that its product writes in training too, long enough for the context,
 * so attention reads keys and values where the product left them and nothing is
 * copied; the price for GPT-2 is the room of the q beside them. Feeding tokens
 * is a forward pass over as many rows, whether they are a prompt or the one
 * token just drawn; a long prompt goes in several, so that a pass's buffers stay
 * small.
 *
 * A context ends at the model's positions, or where its cache would outgrow
 * reason. One that outgrows it keeps its newer half, which is fed again from
 * position 0.
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
#define CONTEXT_MAX 8192u
#define PASS_ROWS_MAX 1024u
#define STREAM_SAMPLE 0x73616d706c65u

struct generator {
	struct model_config model;
	struct unit_table table;
	struct net net;
	struct k_profile profile;
	struct arena arena;
	float **unit;               /* [n_units] flat vectors */
	float *scratch;             /* [vocab] */
	struct arena context_arena; /* of the net */
	void *workspace;
	size_t workspace_bytes;
	uint32_t *context; /* [n_positions] */
	uint32_t n_positions, n_context;
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

static int load_tensors(struct generator *g, const char *dir, struct err *e)
{
	struct model_weights *w;
	int rc = model_weights_open(dir, &g->table, &w, e);

	if (rc)
		return rc;
	for (uint32_t i = 0; !rc && i < g->table.n_tensors; i++) {
		const struct tensor_info *t = &g->table.tensor[i];

		rc = model_weights_read(w, i, 0, t->n, g->unit[t->unit] + t->offset, e);
	}
	model_weights_close(w);
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
	for (uint32_t i = 0; i < g->table.n_units; i++)
		g->unit[i] = take(a, g->table.unit[i].n * sizeof(float));
	g->scratch = take(a, g->model.vocab_size * sizeof(float));
	g->context = take(a, g->n_positions * sizeof(uint32_t));
	g->workspace = take(a, g->workspace_bytes);
}

static uint32_t pass_rows(const struct generator *g)
{
	return g->n_positions < PASS_ROWS_MAX ? g->n_positions : PASS_ROWS_MAX;
}

static int take_context(struct generator *g, struct err *e)
{
	uint64_t bytes = net_context_bytes(&g->net.cfg, pass_rows(g));
	int rc = arena_init(&g->context_arena, "context", bytes);
	char text[24];

	if (rc)
		return err_set(e, rc, "no memory for a context of %u tokens (%s)", g->n_positions,
			       bytes_text(bytes, text));
	rc = net_context(&g->net, pass_rows(g), &g->context_arena);
	assert(rc == 0);
	return 0;
}

static int take_memory(struct generator *g, unsigned threads, struct err *e)
{
	struct arena count = { 0 };
	struct k_dims dims;
	char text[24];
	int rc;

	net_dims(&g->model, 1, g->n_positions, 1, &dims);
	g->workspace_bytes = k_cpu_ops()->workspace_bytes(&dims, threads);
	g->unit = calloc(g->table.n_units, sizeof(*g->unit));
	if (!g->unit)
		return err_set(e, -ENOMEM, "out of memory");
	walk_memory(g, &count);
	rc = arena_init(&g->arena, "generation", count.used);
	if (rc)
		return err_set(e, rc, "no memory for the model (%s)", bytes_text(count.used, text));
	walk_memory(g, &g->arena);
	return take_context(g, e);
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
		.seq = g->n_positions,
		.max_span = 1,
		.keep = true,
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
	g->n_positions = g->model.n_positions < CONTEXT_MAX ? g->model.n_positions : CONTEXT_MAX;
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
	arena_release(&g->context_arena);
	arena_release(&g->arena);
	free(g->unit);
	free(g);
}

const struct model_config *generator_model(const struct generator *g)
{
	return &g->model;
}

/* ----------------------------------------------------------------- forward */

/* Rows [first, first + n) of the context; of the logits only the last row's are made, and only if wanted. */
static void pass(struct generator *g, uint32_t first, uint32_t n, bool logits)
{
	const struct model_config *m = &g->model;
	const float *head = g->unit[net_unit_head(&g->net)];

	net_pass_begin(&g->net, first, n);
	memcpy(g->net.act.tokens, g->context + first, n * sizeof(uint32_t));
	net_embed_forward(&g->net, g->unit[0]);
	for (uint32_t l = 0; l < m->n_layer; l++)
		net_block_forward(&g->net, l, g->unit[net_unit_block(&g->net, l)]);
	if (logits)
		net_head_logits(&g->net, head, (m->tie_word_embeddings ? g->unit[0] : head) + g->net.refs.head_w,
				n - 1);
}

/* The newest n tokens of the context, whose first stands at position n_context - n. */
static int forward(struct generator *g, uint32_t n, struct err *e)
{
	struct k_event done;
	int rc;

	for (uint32_t first = g->n_context - n, rows; first < g->n_context; first += rows) {
		rows = g->n_context - first < pass_rows(g) ? g->n_context - first : pass_rows(g);
		pass(g, first, rows, first + rows == g->n_context);
		/* The next pass writes its tokens where this one reads them. */
		k_cpu_ops()->event_record(g->net.stream, &done);
		k_cpu_ops()->event_wait(g->net.stream, &done);
	}
	rc = k_cpu_ops()->stream_error(g->net.stream);
	return rc ? err_set(e, rc, "the computation failed: %s", strerror(-rc)) : 0;
}

int generator_feed(struct generator *g, const uint32_t *tokens, size_t n, struct err *e)
{
	uint32_t room = g->n_positions, fresh;

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
	return g->n_context ? g->net.act.logits : NULL;
}

int generator_next(struct generator *g, uint32_t *token, struct err *e)
{
	uint32_t t;
	int rc;

	if (!g->n_context)
		return err_set(e, -EINVAL, "nothing to continue: feed at least one token first");
	t = sample_token(g->net.act.logits, g->model.vocab_size, g->temperature, g->top_k,
			 rng_uniform(g->seed, STREAM_SAMPLE, g->drawn), g->scratch);
	g->drawn++;
	rc = generator_feed(g, &t, 1, e);
	if (!rc)
		*token = t;
	return rc;
}
