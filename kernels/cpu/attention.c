/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attention. Forward: a task is one (sample, head, block of query rows); the
 * scores of the block against the keys it can see are one product, their
 * softmax is taken while they are in the cache, and one more product gives the
 * output. Keys behind the block's last row are never touched. Backward: a task
 * is one (sample, key head) and goes through the query heads of its group and
 * their blocks in a fixed order, last block first, since that one reaches all
 * keys and so initialises the gradients that the others add to.
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
	uint32_t width; /* keys that its last row sees */
	const float *q, *k, *v;
};

/* A row of scores: whole vectors, and off the powers of two that would share cache sets. */
static size_t score_ld(uint32_t kv_len)
{
	return round_up_u64(kv_len, 16) + 16;
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

static struct block block_of(const struct attention_job *j, uint32_t sample, uint32_t head, uint32_t index)
{
	const struct k_attention *a = j->a;
	struct block b = { .sample = sample, .head = head, .kv_head = head / (a->heads / a->kv_heads) };

	b.row = index * BLOCK_ROWS;
	b.rows = a->q_len - b.row < BLOCK_ROWS ? a->q_len - b.row : BLOCK_ROWS;
	b.width = a->kv_len - a->q_len + b.row + b.rows;
	b.q = a->q + ((size_t)sample * a->q_len + b.row) * a->q_stride + (size_t)head * a->head_dim;
	b.k = a->k + sample * j->kv_sample + (size_t)b.kv_head * a->head_dim;
	b.v = a->v + sample * j->v_sample + (size_t)b.kv_head * a->head_dim;
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
		.ldc = score_ld(a->kv_len),
	};
	stream_gemm(j->s, &g, scratch);
}

static struct attn_rows block_attn_rows(const struct attention_job *j, const struct block *b, float *scores)
{
	const struct k_attention *a = j->a;
	uint64_t in_mb = b->sample % a->batch;

	return (struct attn_rows){
		.s = scores,
		.ld = score_ld(a->kv_len),
		.rows = b->rows,
		.width = b->width,
		.first_visible = a->kv_len - a->q_len + b->row + 1,
		.scale = a->scale,
		.drop = drop_of(&a->dropout, b->sample / a->batch),
		.drop_first = ((in_mb * a->heads + b->head) * a->q_len + b->row) * a->kv_len,
		.drop_row = a->kv_len,
	};
}

static void attention_task(void *ctx, unsigned thread, uint32_t task)
{
	const struct attention_job *j = ctx;
	const struct k_attention *a = j->a;
	float *scratch = workspace_thread(&j->ws, thread);
	float *scores = scratch + GEMM_SCRATCH_FLOATS, *sum = scores + j->score_floats, *max = sum + BLOCK_ROWS;
	/* Long blocks first, so that the last tasks are short ones. */
	uint32_t heads = a->n_mb * a->batch * a->heads, sample = task % heads / a->heads, head = task % a->heads;
	const struct block b = block_of(j, sample, head, j->blocks - 1 - task / heads);
	const struct attn_rows rows = block_attn_rows(j, &b, scores);
	float *out = a->out + ((size_t)b.sample * a->q_len + b.row) * a->out_stride + (size_t)b.head * a->head_dim;

	block_scores(j, &b, scores, scratch);
	j->s->isa->attn_softmax(&rows, sum, max);
	struct gemm g = {
		.m = b.rows,
		.n = a->head_dim,
		.k = b.width,
		.a = scores,
		.lda = rows.ld,
		.b = b.v,
		.ldb = a->v_stride,
		.c = out,
		.ldc = a->out_stride,
	};
	stream_gemm(j->s, &g, scratch);
	for (uint32_t r = 0; a->lse && r < b.rows; r++)
		a->lse[((size_t)b.sample * a->heads + b.head) * a->q_len + b.row + r] = max[r] +
											(float)det_log((double)sum[r]);
	for (uint32_t r = 0; r < b.rows; r++)
		sum[r] = 1.0f / sum[r];
	const struct rect t = { .p = out, .ld = a->out_stride, .rows = b.rows, .cols = a->head_dim };
	j->s->isa->scale_rows(&t, sum);
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

/* dk += ds^T q and dv += p^T dout; the first block of a key head overwrites. */
static void block_key_gradients(const struct attention_job *j, const struct block *b, const float *p, const float *ds,
				bool first, float *scratch)
{
	const struct k_attention *a = j->a;
	const size_t ld = score_ld(a->kv_len), at = (size_t)b->kv_head * a->head_dim;
	const float *dout = j->back->dout + ((size_t)b->sample * a->q_len + b->row) * a->out_stride +
			    (size_t)b->head * a->head_dim;

	struct gemm g = {
		.ta = true,
		.m = b->width,
		.n = a->head_dim,
		.k = b->rows,
		.a = p,
		.lda = ld,
		.b = dout,
		.ldb = a->out_stride,
		.beta = first ? 0.0f : 1.0f,
		.c = j->back->dv + b->sample * j->v_sample + at,
		.ldc = a->v_stride,
	};
	stream_gemm(j->s, &g, scratch);
	g.a = ds;
	g.b = b->q;
	g.ldb = a->q_stride;
	g.c = j->back->dk + b->sample * j->kv_sample + at;
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
		.lda = score_ld(a->kv_len),
		.b = b->k,
		.ldb = a->k_stride,
		.c = j->back->dq + (b->q - a->q),
		.ldc = a->q_stride,
	};
	stream_gemm(j->s, &g, scratch);
}

static void block_backward(const struct attention_job *j, const struct block *b, bool first, float *scratch)
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
	block_key_gradients(j, b, scores, dp, first, scratch);
	block_query_gradient(j, b, dp, scratch);
}

static void attention_backward_task(void *ctx, unsigned thread, uint32_t task)
{
	const struct attention_job *j = ctx;
	const struct k_attention *a = j->a;
	uint32_t group = a->heads / a->kv_heads, sample = task / a->kv_heads, kv_head = task % a->kv_heads;
	float *scratch = workspace_thread(&j->ws, thread);

	for (uint32_t h = 0; h < group; h++)
		for (uint32_t i = j->blocks; i-- > 0;) {
			const struct block b = block_of(j, sample, kv_head * group + h, i);
			block_backward(j, &b, h == 0 && i == j->blocks - 1, scratch);
		}
}

void cpu_attention_backward(struct k_stream *s, const struct k_attention_backward *a)
{
	assert(a->fwd.q_len == a->fwd.kv_len && a->fwd.lse && a->dout && a->dq && a->dk && a->dv);
	struct attention_job j = attention_job(s, &a->fwd, a);
	pool_run(s->pool, attention_backward_task, &j, a->fwd.n_mb * a->fwd.batch * a->fwd.kv_heads);
}
