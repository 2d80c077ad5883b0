/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The memory plan: what a worker and a shard service will take, to the byte of
 * every large buffer, before they take it. The counts are upper bounds that the
 * programs reach: buffers begin on cache lines, so each is rounded up to one
 * for every micro-batch, and is at most that when a span lies in one piece.
 *
 * A worker chooses two things from its budget: how many micro-batches a span
 * may have, and whether activations are kept. Long spans save fetches and
 * pushes, kept activations save a second forward; both cost activations. A span
 * is never longer than the coordinator would lease it to the workers asked for.
 */
#include "model/model.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define LINE_FLOATS (CACHE_LINE / sizeof(float))
/* Of the host's memory, for its workers: the other half is for shard services, data and the system. */
#define HOST_SHARE 2
/* A span this many times shorter is still better than computing the forward twice. */
#define KEEP_WORTH 4
/* Sums of the whole share that the automatic pool holds; more than this waits in spill for a long tree. */
#define POOL_SHARES 2

void mem_plan_add(struct mem_plan *p, const char *name, uint64_t bytes, const char *note_fmt, ...)
{
	struct plan_line *l = &p->line[p->n_lines];
	va_list ap;

	assert(p->n_lines < PLAN_LINES_MAX);
	p->n_lines++;
	snprintf(l->name, sizeof(l->name), "%s", name);
	l->bytes = bytes;
	va_start(ap, note_fmt);
	vsnprintf(l->note, sizeof(l->note), note_fmt, ap);
	va_end(ap);
	p->total += bytes;
}

void mem_plan_grow(struct mem_plan *p, const char *name, uint64_t bytes)
{
	uint32_t i = 0;

	while (i < p->n_lines && strcmp(p->line[i].name, name))
		i++;
	if (i == p->n_lines) {
		mem_plan_add(p, name, bytes, "since the start");
		return;
	}
	p->line[i].bytes += bytes;
	p->total += bytes;
}

void mem_plan_print(FILE *f, const char *who, const struct mem_plan *p)
{
	char size[24];

	fprintf(f, "memory of %s\n", who);
	for (uint32_t i = 0; i < p->n_lines; i++)
		fprintf(f, "  %-24s %10s  %s\n", p->line[i].name, bytes_text(p->line[i].bytes, size), p->line[i].note);
	fprintf(f, "  %-24s %10s\n", "total", bytes_text(p->total, size));
}

void mem_plan_log(struct log *log, const struct mem_plan *p)
{
	char size[24];

	for (uint32_t i = 0; i < p->n_lines; i++)
		log_info(log, "memory plan: %s: %llu bytes (%s), %s", p->line[i].name,
			 (unsigned long long)p->line[i].bytes, bytes_text(p->line[i].bytes, size), p->line[i].note);
	log_info(log, "memory plan: %llu bytes (%s) in all", (unsigned long long)p->total, bytes_text(p->total, size));
}

/* "RssAnon:" and the like of /proc/self/status, in bytes; 0 where there is none. */
static uint64_t status_field(const char *text, const char *name)
{
	const char *at = strstr(text, name);

	return at ? strtoull(at + strlen(name), NULL, 10) * 1024 : 0;
}

void mem_plan_log_used(struct log *log, const struct mem_plan *p, uint64_t own_shared)
{
	char text[5][24], *status;
	uint64_t private;
	size_t bytes;

	if (file_read("/proc/self/status", 65536, &status, &bytes, NULL))
		return;
	private = status_field(status, "RssAnon:");
	log_info(log, "memory: %s planned, %s used: %s private, %s shared of our own; most resident at once %s",
		 bytes_text(p->total, text[0]), bytes_text(private + own_shared, text[1]), bytes_text(private, text[2]),
		 bytes_text(own_shared, text[3]), bytes_text(status_field(status, "VmHWM:"), text[4]));
	free(status);
}

/* ---------------------------------------------------------------- activations */

static uint64_t max_u64(uint64_t a, uint64_t b)
{
	return a > b ? a : b;
}

static uint64_t min_u64(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

static uint64_t buffer(uint64_t rows, uint64_t width)
{
	return round_up_u64(rows * width, LINE_FLOATS);
}

static void gpt2_sizes(const struct model_config *m, uint64_t rows, struct activation_sizes *out)
{
	uint64_t c = buffer(rows, m->n_embd), wide = max_u64(m->n_inner, 3 * (uint64_t)m->n_embd);

	/* both norms with mean and rstd, q k v, attention and its lse, the residual between, before and after the gelu */
	out->inner = 4 * c + 4 * buffer(rows, 1) + buffer(rows, 3 * (uint64_t)m->n_embd) + buffer(rows, m->n_head) +
		     2 * buffer(rows, m->n_inner);
	/* the branch, the residual's gradient, another of its width, and the widest: of q k v or of the inner layer */
	out->scratch = 3 * c + buffer(rows, wide);
	out->head = c + 2 * buffer(rows, 1);
	out->tables = 0;
}

static void llama_sizes(const struct model_config *m, uint64_t rows, uint32_t sequence_length,
			struct activation_sizes *out)
{
	uint64_t c = buffer(rows, m->n_embd), f = buffer(rows, m->n_inner);
	uint64_t q = buffer(rows, (uint64_t)m->n_head * m->head_dim);
	uint64_t kv = buffer(rows, (uint64_t)m->n_kv_head * m->head_dim);

	/* both norms with rstd, q k v, attention and its lse, the residual between, gate, up and their product */
	out->inner = 3 * c + 2 * buffer(rows, 1) + 2 * q + 2 * kv + buffer(rows, m->n_head) + 3 * f;
	if (m->qk_norm)
		out->inner += q + kv + buffer(rows, m->n_head) + buffer(rows, m->n_kv_head);
	/* the branch, the residual's gradient, the attention's, and those of q k v or of the inner layer */
	out->scratch = 2 * c + max_u64(c, q) + max_u64(f, q + 2 * kv);
	out->head = c + buffer(rows, 1);
	out->tables = 2 * buffer(sequence_length, m->rope.rot / 2);
}

void activation_sizes_get(const struct model_config *m, uint32_t micro_batch, uint32_t sequence_length,
			  struct activation_sizes *out)
{
	uint64_t rows = (uint64_t)micro_batch * sequence_length;

	out->boundary = buffer(rows, m->n_embd);
	if (model_is_llama(m))
		llama_sizes(m, rows, sequence_length, out);
	else
		gpt2_sizes(m, rows, out);
}

/* ----------------------------------------------------------------------- head */

#define PIECE_UNIT 16u

uint32_t head_piece_begin(uint32_t rows, uint32_t pieces, uint32_t i)
{
	assert(pieces && i <= pieces);
	return i == pieces ? rows : (uint32_t)((uint64_t)rows * i / pieces) / PIECE_UNIT * PIECE_UNIT;
}

uint32_t head_piece_rows(uint32_t rows, uint32_t pieces)
{
	uint32_t most = 0;

	for (uint32_t i = 0; i < pieces; i++)
		most = (uint32_t)max_u64(most,
					 head_piece_begin(rows, pieces, i + 1) - head_piece_begin(rows, pieces, i));
	return most;
}

static uint32_t pieces_of(const struct model_config *m, uint32_t rows)
{
	uint64_t bytes = (uint64_t)rows * m->vocab_size * sizeof(float);
	uint64_t pieces = (bytes + HEAD_LOGITS_BYTES - 1) / HEAD_LOGITS_BYTES;

	return (uint32_t)max_u64(1, min_u64(pieces, rows / HEAD_ROWS_MIN));
}

void head_plan_get(const struct model_config *m, uint32_t rows, uint32_t span, struct head_plan *out)
{
	struct head_plan p = { .pieces = pieces_of(m, rows) };
	uint64_t at_once = buffer((uint64_t)span * rows, m->vocab_size);

	p.logits = buffer(head_piece_rows(rows, p.pieces), m->vocab_size);
	p.sums = head_sums(span) * buffer(m->vocab_size, m->n_embd);
	if (p.pieces == 1 && at_once <= p.logits + p.sums)
		p = (struct head_plan){ .logits = at_once };
	*out = p;
}

/* Tokens, targets, where documents begin, loss and dropout streams of a span. */
static uint64_t sample_bytes(const struct job_config *c, uint64_t rows, uint32_t span)
{
	uint64_t sites = 1 + 3 * (uint64_t)c->model.n_layer, arrays = data_config_packed(&c->data) ? 3 : 2;

	return arrays * round_up_u64(span * rows * sizeof(uint32_t), CACHE_LINE) +
	       round_up_u64(span * sizeof(double), CACHE_LINE) +
	       round_up_u64(span * sites * sizeof(uint64_t), CACHE_LINE);
}

/* --------------------------------------------------------------------- worker */

struct worker_need {
	const struct job_config *c;
	const struct worker_place *place;
	struct activation_sizes sizes;
	uint64_t rows;
};

static uint64_t workspace_bytes(const struct worker_need *n, uint32_t span)
{
	return n->place->workspace(n->place->ctx, span);
}

static uint64_t blocks_bytes(const struct worker_need *n, uint32_t span, bool keep)
{
	return span * n->sizes.inner * (keep ? n->c->model.n_layer : 1) * sizeof(float);
}

static uint64_t boundary_bytes(const struct worker_need *n, uint32_t span)
{
	return span * n->sizes.boundary * ((uint64_t)n->c->model.n_layer + 1) * sizeof(float);
}

static uint64_t head_bytes(const struct worker_need *n, const struct head_plan *head, uint32_t span)
{
	return (span * n->sizes.head + head->logits + head->sums) * sizeof(float);
}

static uint64_t activation_bytes(const struct worker_need *n, uint32_t span, bool keep)
{
	struct head_plan head;

	head_plan_get(&n->c->model, (uint32_t)n->rows, span, &head);
	return boundary_bytes(n, span) + blocks_bytes(n, span, keep) + head_bytes(n, &head, span) +
	       span * n->sizes.scratch * sizeof(float) + n->sizes.tables * sizeof(float) +
	       sample_bytes(n->c, n->rows, span);
}

/* Bytes that count against the budget: a budget the user gave is for activations alone. */
static uint64_t counted_bytes(const struct worker_need *n, uint32_t span, bool keep)
{
	return activation_bytes(n, span, keep) + (n->c->activation_memory ? 0 : workspace_bytes(n, span));
}

/* Micro-batches that the busiest of equal workers gets when spans are dealt in turn. */
static uint32_t busiest(uint32_t n_micro, uint32_t workers, uint32_t span)
{
	uint32_t full = n_micro / span, each = full / workers * span;

	return full % workers ? each + span : each + n_micro % span;
}

/* The longest span, a power of two, for which the busiest worker gets no more than with spans of one. */
static uint32_t useful_span(uint32_t n_micro, uint32_t workers)
{
	uint32_t longest = 1;

	for (uint32_t span = 2; span <= n_micro; span *= 2)
		if (busiest(n_micro, workers, span) <= busiest(n_micro, workers, 1))
			longest = span;
	return longest;
}

/* The longest span that fits, 0 for none. */
static uint32_t fitting_span(const struct worker_need *n, uint32_t longest, bool keep, uint64_t budget)
{
	uint32_t span = longest;

	while (span && counted_bytes(n, span, keep) > budget)
		span /= 2;
	return span;
}

/* What must be live at once: the largest unit, and for a tied head the embedding beside it. */
static uint64_t window_min(const struct job_config *c, const struct unit_table *t)
{
	uint64_t head = t->unit[t->n_units - 1].n;

	if (c->model.tie_word_embeddings)
		head += t->unit[0].n;
	return max_u64(t->largest_unit, head);
}

/* stage3_max_live_parameters, not more than the model, less where half the budget is less, never below the minimum. */
static uint64_t window_elements(const struct job_config *c, const struct unit_table *t, uint64_t budget)
{
	uint64_t n = min_u64(c->zero.stage3_max_live_parameters, t->n_elements);

	n = min_u64(n, budget / 2 / sizeof(float) / t->page * t->page);
	return max_u64(n, window_min(c, t));
}

static void add_window_line(struct worker_plan *p, const struct job_config *c, const struct unit_table *t)
{
	const char *why = "stage3_max_live_parameters";

	if (p->window_elements == t->n_elements)
		why = "the whole model";
	else if (p->window_elements > c->zero.stage3_max_live_parameters)
		why = "stage3_max_live_parameters raised to what is needed at once";
	else if (p->window_elements < c->zero.stage3_max_live_parameters)
		why = "less than stage3_max_live_parameters: half of the worker's budget";
	if (p->window_elements)
		mem_plan_add(&p->mem, "parameter window", p->window_elements * sizeof(float), "%s", why);
	else
		mem_plan_add(&p->mem, "parameter window", 0, "units are read in place");
}

static void add_worker_lines(struct worker_plan *p, const struct worker_need *n, const struct unit_table *t)
{
	const struct job_config *c = n->c;
	uint32_t span = p->max_span;

	add_window_line(p, c, t);
	mem_plan_add(&p->mem, "gradient buffers", p->n_gradient_buffers * p->gradient_elements * sizeof(float),
		     "%u of the largest unit", p->n_gradient_buffers);
	mem_plan_add(&p->mem, "residual stream", boundary_bytes(n, span),
		     "between units, spans of up to %u micro-batches", span);
	if (p->keep_activations)
		mem_plan_add(&p->mem, "activations", blocks_bytes(n, span, true), "kept for all %u blocks",
			     c->model.n_layer);
	else
		mem_plan_add(&p->mem, "activations", blocks_bytes(n, span, false),
			     "of one block, recomputed in backward");
	mem_plan_add(&p->mem, "scratch", span * n->sizes.scratch * sizeof(float), "of one block's backward");
	if (p->head.pieces > 1)
		mem_plan_add(&p->mem, "final norm and logits", head_bytes(n, &p->head, span),
			     "of %u rows at a time, and %u partial sums of their weight",
			     head_piece_rows((uint32_t)n->rows, p->head.pieces), head_sums(span));
	else if (p->head.pieces)
		mem_plan_add(&p->mem, "final norm and logits", head_bytes(n, &p->head, span),
			     "of one micro-batch, and %u partial sums of their weight", head_sums(span));
	else
		mem_plan_add(&p->mem, "final norm and logits", head_bytes(n, &p->head, span), "of the whole span");
	if (n->sizes.tables)
		mem_plan_add(&p->mem, "rotary tables", n->sizes.tables * sizeof(float), "cosine and sine");
	mem_plan_add(&p->mem, "samples", sample_bytes(c, n->rows, span), "tokens, targets, dropout streams");
	mem_plan_add(&p->mem, "workspace", p->workspace_bytes, "of the kernels");
}

static int choose_span(struct worker_plan *p, const struct worker_need *n, uint32_t longest, uint64_t budget)
{
	enum activations_mode mode = n->c->activations;
	uint32_t keep = mode == ACTIVATIONS_RECOMPUTE ? 0 : fitting_span(n, longest, true, budget);
	uint32_t recompute = mode == ACTIVATIONS_KEEP ? 0 : fitting_span(n, longest, false, budget);

	if (!keep && !recompute)
		return -ENOMEM;
	p->keep_activations = keep && (uint64_t)keep * KEEP_WORTH >= recompute;
	p->max_span = p->keep_activations ? keep : recompute;
	return 0;
}

int worker_plan_make(const struct job_config *c, const struct unit_table *t, const struct batch_plan *b,
		     const struct worker_place *place, struct worker_plan *out, struct err *e)
{
	struct worker_need n = { .c = c, .place = place };
	struct worker_plan p = { .n_gradient_buffers = 2, .gradient_elements = t->largest_unit };
	uint64_t total = place->memory / HOST_SHARE / (place->workers ? place->workers : 1);
	uint64_t fixed, budget, need;
	char need_text[24], has_text[24];

	activation_sizes_get(&c->model, b->micro_batch, c->data.sequence_length, &n.sizes);
	n.rows = (uint64_t)b->micro_batch * c->data.sequence_length;
	p.window_elements = place->mapped ? 0 : window_elements(c, t, total);
	fixed = (p.window_elements + p.n_gradient_buffers * p.gradient_elements) * sizeof(float) + place->beside;
	budget = c->activation_memory ? c->activation_memory : total > fixed ? total - fixed : 0;
	if (choose_span(&p, &n, useful_span(b->n_micro, c->workers ? c->workers : 1), budget)) {
		need = counted_bytes(&n, 1, c->activations == ACTIVATIONS_KEEP);
		return err_set(
			e, -ENOMEM,
			"a worker has %s for activations%s, and a span of one micro-batch (%u samples of %u tokens) "
			"needs %s%s",
			bytes_text(budget, has_text),
			c->activation_memory ? " (shardmesh.activation_memory)" : " and workspace", b->micro_batch,
			c->data.sequence_length, bytes_text(need, need_text),
			c->activations == ACTIVATIONS_KEEP ? " with shardmesh.activations \"keep\"" : "");
	}
	p.workspace_bytes = workspace_bytes(&n, p.max_span);
	head_plan_get(&c->model, (uint32_t)n.rows, p.max_span, &p.head);
	add_worker_lines(&p, &n, t);
	*out = p;
	return 0;
}

/* -------------------------------------------------------------- shard service */

static uint32_t log2_ceil(uint64_t n)
{
	uint32_t bits = 0;

	while (bits < 63 && (UINT64_C(1) << bits) < n)
		bits++;
	return bits;
}

/* Elements of the share that lie in a part. */
static uint64_t part_elements(const struct share *s, const struct unit_part *part)
{
	uint64_t n = 0;

	for (uint32_t i = 0; i < s->n_seg; i++) {
		uint64_t begin = max_u64(s->seg[i].unit_offset, part->begin);
		uint64_t end = min_u64(s->seg[i].unit_offset + s->seg[i].n, part->end);

		n += end > begin ? end - begin : 0;
	}
	return n;
}

struct shard_need {
	uint64_t owned, accumulators, largest_share;
};

static void count_owned(const struct unit_table *t, const struct page_map *map, uint32_t member, struct shard_need *n)
{
	struct share s;

	*n = (struct shard_need){ 0 };
	for (uint32_t u = 0; u < t->n_units; u++) {
		page_map_share(map, t, member, u, &s);
		n->owned += s.n;
		n->largest_share = max_u64(n->largest_share, s.n);
		for (uint32_t k = 0; k < t->unit[u].n_parts; k++)
			n->accumulators += part_elements(&s, &t->unit[u].part[k]);
	}
}

/*
 * Sums of a whole share that a tree of M leaves may hold beside its accumulator:
 * at most ceil(log2 M) complete nodes left of its lowest missing leaf, and K
 * more that are let in on the right. No two of them are siblings, those are one
 * node at once; so there are no more than M / 2. Where contributions are pushed,
 * one being written has its sum already, so that no two need be apart.
 */
static uint64_t sums_most(const struct job_config *c, uint32_t n_micro, bool mapped)
{
	uint64_t nodes = log2_ceil(n_micro) + (uint64_t)c->max_held_nodes;

	return min_u64(nodes, mapped ? (n_micro + 1) / 2 : n_micro) - 1;
}

/* Only the nodes on the left have to be taken whatever happens, so only they need a place outside the pool. */
static int plan_sums(const struct job_config *c, const struct shard_need *n, uint32_t n_micro, uint32_t n_workers,
		     bool mapped, struct shard_plan *p, struct err *e)
{
	uint64_t most = sums_most(c, n_micro, mapped), depth = log2_ceil(n_micro), all = most * n->accumulators;
	uint64_t pool = POOL_SHARES * n->accumulators + (uint64_t)n_workers * n->largest_share;
	char given[24], least[24];

	if (c->partial_sum_memory)
		pool = c->partial_sum_memory / sizeof(float) / LINE_FLOATS * LINE_FLOATS;
	if (c->partial_sum_memory && pool < min_u64(all, n->largest_share))
		return err_set(e, -ENOMEM,
			       "shardmesh.partial_sum_memory: %s holds not even one sum of a unit's share, which is %s",
			       bytes_text(c->partial_sum_memory, given),
			       bytes_text(n->largest_share * sizeof(float), least));
	p->pool_elements = min_u64(pool, all);
	p->sums_each = p->pool_elements == all ? (uint32_t)most : 0;
	p->spill_elements = min_u64(all - p->pool_elements, depth * n->accumulators);
	return 0;
}

int shard_plan_make(const struct job_config *c, const struct unit_table *t, const struct page_map *map, uint32_t member,
		    uint32_t n_micro, uint32_t n_workers, bool mapped, struct shard_plan *out, struct err *e)
{
	struct shard_plan p = { 0 };
	struct shard_need n;
	char spill[24];
	int rc;

	count_owned(t, map, member, &n);
	p.n_elements = n.owned;
	rc = plan_sums(c, &n, n_micro, n_workers, mapped, &p, e);
	if (rc)
		return rc;
	p.inbox_elements = mapped ? 0 : n.largest_share;
	mem_plan_add(&p.mem, "parameters", PARAM_HEADER + n.owned * sizeof(float),
		     "fp32 master and published copy in one");
	mem_plan_add(&p.mem, "Adam m", n.owned * sizeof(float), "fp32");
	mem_plan_add(&p.mem, "Adam v", n.owned * sizeof(float), "fp32");
	mem_plan_add(&p.mem, "gradient accumulators", n.accumulators * sizeof(float), "one for every use of a page");
	mem_plan_add(&p.mem, "partial sums", p.pool_elements * sizeof(float), "up to %s more in a spill file",
		     bytes_text(p.spill_elements * sizeof(float), spill));
	if (mapped)
		mem_plan_add(&p.mem, "inboxes", 0, "gradients are folded in place");
	else
		mem_plan_add(&p.mem, "inboxes", n_workers * p.inbox_elements * sizeof(float),
			     "one for each of %u workers", n_workers);
	*out = p;
	return 0;
}
