/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attention. Forward: a task is one (sample, head, BLOCK_ROWS query rows); the
 * scores of a block of rows against the keys it can see are one product, their
 * softmax is taken while they are in the cache, and one more product gives the
 * output. Keys behind the block's last row, or before the first that its first
 * row sees, are never touched. Backward: a task is one (sample, key head) and
 * goes through the query heads of its group and their blocks in a fixed order,
 * last block first: a block sets the gradients of the keys that none before it
 * has seen, and adds to the others.
 *
 * Blocks are counted from the beginning of their document. So no block spans
 * two, and a document goes through products of the same shapes whether it is
 * packed behind others or stands alone; with the portable library the same bits
 * come out. A task takes the blocks that begin among its rows.
 */
#include "kernels/cpu/cpu.h"

#define BLOCK_ROWS 64u

struct attention_job {
	struct k_stream *s;
	const struct k_attention *a;
	const struct k_attention_backward *back; /* NULL: forward */
	uint32_t blocks;
	size_t kv_sample; /* rows of floats between samples: floats for k; v alike */
	size_t v_sample;
	size_t score_floats; /* of one block */
	struct workspace ws;
};

/* One block of query rows of one head. */
struct block {
	uint32_t sample, head, kv_head;
	uint32_t row, rows;
	uint32_t key, width;    /* keys that it sees: the first that its first row does, to its last row's own */
	size_t ld;              /* of its scores */
	const float *q, *k, *v; /* its rows of q, its keys' of k and v */
};

/* A row of scores: whole vectors, and off the powers of two that would share cache sets. */
static size_t score_ld(uint32_t kv_len)
{
	return round_up_u64(kv_len, 16) + 16;
}

/* No block of a document of n keys sees more. */
static uint32_t keys_max(const struct k_attention *a, uint32_t n)
{
	return a->window && n > BLOCK_ROWS && a->window < n - BLOCK_ROWS ? a->window + BLOCK_ROWS - 1 : n;
}

static uint32_t block_rows(uint32_t q_len)
{
	return q_len < BLOCK_ROWS ? q_len : BLOCK_ROWS;
}

/* Packing, then the block's scores (backward: and their gradients), then three floats a row. */
struct scratch attention_scratch(uint32_t q_len, uint32_t kv_len, bool backward)
{
	uint64_t score = block_rows(q_len) * score_ld(kv_len);
	uint64_t floats = GEMM_SCRATCH_FLOATS + (backward ? 2 : 1) * score + 3ull * BLOCK_ROWS;
	return (struct scratch){ .per_thread = floats * sizeof(float) };
}

/* Rows of one document: row..end, its keys from `key` on. */
struct document {
	uint32_t row, end, key;
};

/* The first of n ascending values that is at least `value`, or n. */
static uint32_t lower_bound(const uint32_t *v, uint32_t n, uint32_t value)
{
	uint32_t at = 0;

	while (n > 0) {
		uint32_t half = n / 2;
		if (v[at + half] < value) {
			at += half + 1;
			n -= half + 1;
		} else {
			n = half;
		}
	}
	return at;
}

static struct document document_of(const struct k_attention *a, uint32_t sample, uint32_t row)
{
	if (!a->first_key)
		return (struct document){ .end = a->q_len };
	const uint32_t *first = a->first_key + (size_t)sample * a->q_len, key = first[row];
	struct document d = {
		.row = lower_bound(first, row, key),
		.end = row + 1 + lower_bound(first + row + 1, a->q_len - row - 1, key + 1),
		.key = key,
	};
	/* Each row sees itself. */
	assert(key <= a->kv_len - a->q_len + d.row);
	return d;
}

/* The block that a row belongs to. */
static struct block block_of(const struct attention_job *j, uint32_t sample, uint32_t head, uint32_t row)
{
	const struct k_attention *a = j->a;
	const struct document d = document_of(a, sample, row);
	const uint32_t past = a->kv_len - a->q_len;
	struct block b = { .sample = sample, .head = head, .kv_head = head / (a->heads / a->kv_heads) };

	b.row = row - (row - d.row) % BLOCK_ROWS;
	b.rows = d.end - b.row < BLOCK_ROWS ? d.end - b.row : BLOCK_ROWS;
	b.key = d.key;
	if (a->window && past + b.row + 1 - d.key > a->window)
		b.key = past + b.row + 1 - a->window;
	b.width = past + b.row + b.rows - b.key;
	b.ld = score_ld(keys_max(a, past + d.end - d.key));
	b.q = a->q + ((size_t)sample * a->q_len + b.row) * a->q_stride + (size_t)head * a->head_dim;
	b.k = a->k + sample * j->kv_sample + b.key * a->k_stride + (size_t)b.kv_head * a->head_dim;
	b.v = a->v + sample * j->v_sample + b.key * a->v_stride + (size_t)b.kv_head * a->head_dim;
	return b;
}

/* s = q k^T */
static void block_scores(const struct attention_job *j, const struct block *b, float *scores, float *scratch)
{
	const struct k_attention *a = j->a;

	struct gemm g = {
		.tb = true,
		.m = b->rows,
		.n = b->width,
		.k = a->head_dim,
		.a = b->q,
		.lda = a->q_stride,
		.b = b->k,
		.ldb = a->k_stride,
		.c = scores,
		.ldc = b->ld,
	};
	stream_gemm(j->s, &g, scratch);
}

static struct attn_rows block_attn_rows(const struct attention_job *j, const struct block *b, float *scores)
{
	const struct k_attention *a = j->a;
	uint64_t in_mb = b->sample % a->batch;

	return (struct attn_rows){
		.s = scores,
		.ld = b->ld,
		.rows = b->rows,
		.width = b->width,
		.first_visible = b->width - b->rows + 1,
		.window = a->window,
		.scale = a->scale,
		.drop = drop_of(&a->dropout, b->sample / a->batch),
		.drop_first = ((in_mb * a->heads + b->head) * a->q_len + b->row) * a->kv_len + b->key,
		.drop_row = a->kv_len,
	};
}

static void block_forward(const struct attention_job *j, const struct block *b, float *scratch)
{
	const struct k_attention *a = j->a;
	float *scores = scratch + GEMM_SCRATCH_FLOATS, *sum = scores + j->score_floats, *max = sum + BLOCK_ROWS;
	const struct attn_rows rows = block_attn_rows(j, b, scores);
	float *out = a->out + ((size_t)b->sample * a->q_len + b->row) * a->out_stride + (size_t)b->head * a->head_dim;

	block_scores(j, b, scores, scratch);
	j->s->isa->attn_softmax(&rows, sum, max);
	struct gemm g = {
		.m = b->rows,
		.n = a->head_dim,
		.k = b->width,
		.a = scores,
		.lda = rows.ld,
		.b = b->v,
		.ldb = a->v_stride,
		.c = out,
		.ldc = a->out_stride,
	};
	stream_gemm(j->s, &g, scratch);
	float *lse = a->lse ? a->lse + ((size_t)b->sample * a->heads + b->head) * a->q_len + b->row : NULL;
	/* The largest score gives 1 to its row's sum; a sum that is no number keeps being none, det_log is for numbers. */
	for (uint32_t r = 0; lse && r < b->rows; r++)
		lse[r] = max[r] + (sum[r] >= 1.0f ? (float)det_log((double)sum[r]) : sum[r]);
	for (uint32_t r = 0; r < b->rows; r++)
		sum[r] = 1.0f / sum[r];
	const struct rect t = { .p = out, .ld = a->out_stride, .rows = b->rows, .cols = a->head_dim };
	j->s->isa->scale_rows(&t, sum);
}

static void attention_task(void *ctx, unsigned thread, uint32_t task)
{
	const struct attention_job *j = ctx;
	const struct k_attention *a = j->a;
	/* Long blocks first, so that the last tasks are short ones. */
	uint32_t heads = a->n_mb * a->batch * a->heads, sample = task % heads / a->heads, head = task % a->heads;
	uint32_t first = (j->blocks - 1 - task / heads) * BLOCK_ROWS, row = first;

	while (row < a->q_len && row - first < BLOCK_ROWS) {
		const struct block b = block_of(j, sample, head, row);
		if (b.row >= first)
			block_forward(j, &b, workspace_thread(&j->ws, thread));
		row = b.row + b.rows;
	}
}

static struct attention_job attention_job(struct k_stream *s, const struct k_attention *a,
					  const struct k_attention_backward *back)
{
	assert(a->n_mb && a->batch && a->q_len && a->q_len <= a->kv_len && a->kv_heads && a->head_dim);
	assert(a->heads % a->kv_heads == 0 && a->q && a->k && a->v && a->out);
	return (struct attention_job){
		.s = s,
		.a = a,
		.back = back,
		.blocks = ceil_div_u32(a->q_len, BLOCK_ROWS),
		.kv_sample = a->kv_sample_stride ? a->kv_sample_stride : a->kv_len * a->k_stride,
		.v_sample = a->kv_sample_stride ? a->kv_sample_stride : a->kv_len * a->v_stride,
		.score_floats = block_rows(a->q_len) * score_ld(a->kv_len),
		.ws = workspace_take(s, attention_scratch(a->q_len, a->kv_len, back != NULL)),
	};
}

void cpu_attention(struct k_stream *s, const struct k_attention *a)
{
	struct attention_job j = attention_job(s, a, NULL);
	pool_run(s->pool, attention_task, &j, a->n_mb * a->batch * a->heads * j.blocks);
}

/* ----------------------------------------------------------------- backward */

/* Rows first..end of a head's keys become +0. */
static void clear_keys(float *p, size_t stride, uint32_t first, uint32_t end, uint32_t head_dim)
{
	for (uint32_t r = first; r < end; r++)
		memset(p + (r - first) * stride, 0, head_dim * sizeof(float));
}

/* dk += ds^T q and dv += p^T dout; keys before `begun` have no gradients yet. */
static void block_key_gradients(const struct attention_job *j, const struct block *b, const float *p, const float *ds,
				uint32_t begun, float *scratch)
{
	const struct k_attention *a = j->a;
	float *dk = j->back->dk + (b->k - a->k), *dv = j->back->dv + (b->v - a->v);
	const bool none = begun == b->key + b->width;
	const float *dout = j->back->dout + ((size_t)b->sample * a->q_len + b->row) * a->out_stride +
			    (size_t)b->head * a->head_dim;

	struct gemm g = {
		.ta = true,
		.m = b->width,
		.n = a->head_dim,
		.k = b->rows,
		.a = p,
		.lda = b->ld,
		.b = dout,
		.ldb = a->out_stride,
		.beta = none ? 0.0f : 1.0f,
		.c = dv,
		.ldc = a->v_stride,
	};
	if (!none) {
		clear_keys(dv, a->v_stride, b->key, begun, a->head_dim);
		clear_keys(dk, a->k_stride, b->key, begun, a->head_dim);
	}
	stream_gemm(j->s, &g, scratch);
	g.a = ds;
	g.b = b->q;
	g.ldb = a->q_stride;
	g.c = dk;
	g.ldc = a->k_stride;
	stream_gemm(j->s, &g, scratch);
}

/* dq = ds k */
static void block_query_gradient(const struct attention_job *j, const struct block *b, const float *ds, float *scratch)
{
	const struct k_attention *a = j->a;

	struct gemm g = {
		.m = b->rows,
		.n = a->head_dim,
		.k = b->width,
		.a = ds,
		.lda = b->ld,
		.b = b->k,
		.ldb = a->k_stride,
		.c = j->back->dq + (b->q - a->q),
		.ldc = a->q_stride,
	};
	stream_gemm(j->s, &g, scratch);
}

static void block_backward(const struct attention_job *j, const struct block *b, uint32_t begun, float *scratch)
{
	const struct k_attention *a = j->a;
	float *scores = scratch + GEMM_SCRATCH_FLOATS, *dp = scores + j->score_floats, *d = dp + j->score_floats;
	const struct attn_rows rows = block_attn_rows(j, b, scores);
	const size_t at = ((size_t)b->sample * a->q_len + b->row) * a->out_stride + (size_t)b->head * a->head_dim;
	const float *lse = a->lse + ((size_t)b->sample * a->heads + b->head) * a->q_len + b->row;

	block_scores(j, b, scores, scratch);
	struct gemm g = {
		.tb = true,
		.m = b->rows,
		.n = b->width,
		.k = a->head_dim,
		.a = j->back->dout + at,
		.lda = a->out_stride,
		.b = b->v,
		.ldb = a->v_stride,
		.c = dp,
		.ldc = rows.ld,
	};
	stream_gemm(j->s, &g, scratch);
	/* The softmax's row sum of p * dp is dout . out, dropout or not. */
	j->s->isa->dot_rows(j->back->dout + at, a->out + at, a->out_stride, b->rows, a->head_dim, d);
	j->s->isa->attn_backward(&rows, dp, lse, d);
	block_key_gradients(j, b, scores, dp, begun, scratch);
	block_query_gradient(j, b, dp, scratch);
}

static void attention_backward_task(void *ctx, unsigned thread, uint32_t task)
{
	const struct attention_job *j = ctx;
	const struct k_attention *a = j->a;
	uint32_t group = a->heads / a->kv_heads, sample = task / a->kv_heads, kv_head = task % a->kv_heads;
	uint32_t begun = a->kv_len;

	for (uint32_t h = 0; h < group; h++)
		for (uint32_t row = a->q_len; row > 0;) {
			const struct block b = block_of(j, sample, kv_head * group + h, row - 1);
			block_backward(j, &b, begun, workspace_thread(&j->ws, thread));
			begun = b.key < begun ? b.key : begun;
			row = b.row;
		}
}

void cpu_attention_backward(struct k_stream *s, const struct k_attention_backward *a)
{
	assert(a->fwd.q_len == a->fwd.kv_len && a->fwd.lse && a->dout && a->dq && a->dk && a->dv);
	struct attention_job j = attention_job(s, &a->fwd, a);
	pool_run(s->pool, attention_backward_task, &j, a->fwd.n_mb * a->fwd.batch * a->fwd.kv_heads);
}
