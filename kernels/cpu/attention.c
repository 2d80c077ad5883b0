/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attention, by products of its own (isa/attn.c), whatever the library is. A
 * task first packs the keys and values that it looks at, once for all its query
 * heads. Forward: a task is one (sample, key head, FORWARD_ROWS query rows); a
 * block of BLOCK_ROWS rows takes its scores against the keys that it can see,
 * their softmax while they are in the cache, and one more product for the
 * output. Keys behind the block's last row, or before the first that its first
 * row sees, are never touched. Backward: a task is one (sample, key head) and
 * goes through the query heads of its group and their blocks in a fixed order,
 * adding to the gradients of the keys, which are packed too.
 *
 * Blocks are counted from the beginning of their document. So no block spans
 * two, and a document has the same bits whether it is packed behind others or
 * stands alone. A task takes the blocks that begin among its rows.
 */
#include "kernels/cpu/cpu.h"

#define BLOCK_ROWS 64u
#define FORWARD_ROWS 256u
#define AHEAD_ROWS 256u /* of a tensor: what fits in a cache beside the work */

/* Where a task's things stand in its thread's scratch, in floats. */
struct attn_space {
	size_t k_turned;  /* keys in panels, each [head_dim][ATTN_PANEL] */
	size_t v;         /* forward: values, in panels of their columns; backward: turned like the keys */
	size_t k;         /* backward: keys in panels of their columns */
	size_t dk, dv;    /* backward: [kv_len][cols] */
	size_t rows[2];   /* a block's rows of q, and of dout: [BLOCK_ROWS][head_dim] */
	size_t packed[2]; /* backward: the same in panels of their columns */
	size_t out;       /* a block's rows of out or of dq: [BLOCK_ROWS][cols] */
	size_t scores[2]; /* and their gradients: [BLOCK_ROWS][score_ld] */
	size_t by_row;    /* three floats a row */
	size_t floats;
};

struct attention_job {
	struct k_stream *s;
	const struct k_attention *a;
	const struct k_attention_backward *back; /* NULL: forward */
	size_t k_sample, v_sample;               /* floats between samples */
	size_t cols;                             /* of packed rows: head_dim in whole vectors */
	size_t panel;                            /* floats of a panel of keys' or values' columns */
	struct attn_space at;
	struct workspace ws;
};

/* One block of query rows of one head. */
struct block {
	uint32_t sample, head;
	uint32_t row, rows;
	uint32_t key, width; /* keys that it sees: the first that its first row does, to its last row's own */
};

/* A block, and where it is at work. */
struct work {
	const struct attention_job *j;
	struct block b;
	float *scratch;
	uint32_t first_key; /* the packed keys' first */
	uint32_t lead;      /* columns of its scores before its first key's: panels begin at multiples of ATTN_PANEL */
	size_t ld;          /* of its scores */
	struct attn_ahead *ahead;
};

/* A row of scores: whole vectors, and off the powers of two that would share cache sets. */
static size_t score_ld(uint32_t keys)
{
	return round_up_u64(keys + 16, 16) | 16;
}

static size_t take(size_t *end, uint64_t floats)
{
	size_t at = *end;

	*end += round_up_u64(floats, 16);
	return at;
}

static size_t packed_cols(uint32_t head_dim)
{
	return round_up_u64(head_dim, 16);
}

static struct attn_space space_of(uint32_t q_len, uint32_t kv_len, uint32_t head_dim, bool backward)
{
	const uint64_t keys = round_up_u64(kv_len, ATTN_PANEL), panels = round_up_u64(head_dim, ATTN_PANEL);
	const uint64_t rows = q_len < BLOCK_ROWS ? round_up_u64(q_len, ATTN_GROUP) : BLOCK_ROWS;
	struct attn_space at = { 0 };
	size_t end = 0;

	at.k_turned = take(&end, keys * head_dim);
	at.v = take(&end, keys * (backward ? head_dim : panels));
	if (backward) {
		at.k = take(&end, keys * panels);
		at.dk = take(&end, kv_len * packed_cols(head_dim));
		at.dv = take(&end, kv_len * packed_cols(head_dim));
	}
	at.out = take(&end, rows * packed_cols(head_dim));
	for (unsigned i = 0; i <= backward; i++) {
		at.rows[i] = take(&end, rows * head_dim);
		at.scores[i] = take(&end, rows * score_ld(kv_len + ATTN_PANEL));
		if (backward)
			at.packed[i] = take(&end, rows * panels);
	}
	at.by_row = take(&end, 3ull * BLOCK_ROWS);
	at.floats = end;
	return at;
}

struct scratch attention_scratch(uint32_t q_len, uint32_t kv_len, uint32_t head_dim, bool backward)
{
	return (struct scratch){ .per_thread = space_of(q_len, kv_len, head_dim, backward).floats * sizeof(float) };
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
static struct block block_of(const struct k_attention *a, uint32_t sample, uint32_t head, uint32_t row)
{
	const struct document d = document_of(a, sample, row);
	const uint32_t past = a->kv_len - a->q_len;
	struct block b = { .sample = sample, .head = head, .key = d.key };

	b.row = row - (row - d.row) % BLOCK_ROWS;
	b.rows = d.end - b.row < BLOCK_ROWS ? d.end - b.row : BLOCK_ROWS;
	if (a->window && past + b.row + 1 - d.key > a->window)
		b.key = past + b.row + 1 - a->window;
	b.width = past + b.row + b.rows - b.key;
	return b;
}

static struct work work_of(const struct attention_job *j, const struct block *b, uint32_t first_key, float *scratch,
			   struct attn_ahead *ahead)
{
	const uint32_t lead = (b->key - first_key) % ATTN_PANEL;

	return (struct work){ j, *b, scratch, first_key, lead, score_ld(lead + b->width), ahead };
}

/* Where the block's rows are in a tensor of the stride. */
static size_t rows_at(const struct work *w, size_t stride)
{
	const struct k_attention *a = w->j->a;
	return ((size_t)w->b.sample * a->q_len + w->b.row) * stride + (size_t)w->b.head * a->head_dim;
}

static size_t by_row_at(const struct work *w)
{
	return ((size_t)w->b.sample * w->j->a->heads + w->b.head) * w->j->a->q_len + w->b.row;
}

static void copy_rows(float *dst, size_t dst_ld, const float *src, size_t src_ld, uint32_t rows, uint32_t cols)
{
	for (uint32_t r = 0; r < rows; r++, dst += dst_ld, src += src_ld)
		memcpy(dst, src, cols * sizeof(float));
}

/* Row i of the block sees so many of its keys, and i more. */
static uint32_t first_visible(const struct work *w)
{
	return w->b.width - w->b.rows + 1;
}

/*
 * Scores, or their gradients: the block's rows, which are copied to have them side by side, by packed keys or values.
 */
static void block_scores(const struct work *w, unsigned which, const float *rows, size_t stride, size_t turned)
{
	const struct attention_job *j = w->j;
	const uint32_t n = j->a->head_dim;
	float *own = w->scratch + j->at.rows[which];

	copy_rows(own, n, rows, stride, w->b.rows, n);
	j->s->isa->attn_mul(&(struct attn_mul){
		.trim = ATTN_TRIM_COLS,
		.edge = w->lead + first_visible(w),
		.m = w->b.rows,
		.n = w->lead + w->b.width,
		.k = n,
		.a = own,
		.a_row = n,
		.a_step = 1,
		.b = w->scratch + turned + (size_t)(w->b.key - w->first_key - w->lead) * n,
		.b_panel = (size_t)ATTN_PANEL * n,
		.c = w->scratch + j->at.scores[which],
		.ldc = w->ld,
		.ahead = w->ahead,
	});
}

/* The block's row of out or dq: scores or their gradients by packed values or keys. */
static void block_rows(const struct work *w, unsigned which, size_t packed)
{
	const struct attention_job *j = w->j;

	j->s->isa->attn_mul(&(struct attn_mul){
		.trim = ATTN_TRIM_INNER,
		.edge = first_visible(w),
		.m = w->b.rows,
		.n = j->a->head_dim,
		.k = w->b.width,
		.a = w->scratch + j->at.scores[which] + w->lead,
		.a_row = w->ld,
		.a_step = 1,
		.b = w->scratch + packed + (size_t)(w->b.key - w->first_key) * ATTN_PANEL,
		.b_panel = j->panel,
		.c = w->scratch + j->at.out,
		.ldc = j->cols,
		.ahead = w->ahead,
	});
}

static struct attn_rows block_attn_rows(const struct work *w)
{
	const struct k_attention *a = w->j->a;
	const uint64_t in_mb = w->b.sample % a->batch;

	return (struct attn_rows){
		.s = w->scratch + w->j->at.scores[0] + w->lead,
		.ld = w->ld,
		.rows = w->b.rows,
		.first_visible = first_visible(w),
		.window = a->window,
		.scale = a->scale,
		.drop = drop_of(&a->dropout, w->b.sample / a->batch),
		.drop_first = ((in_mb * a->heads + w->b.head) * a->q_len + w->b.row) * a->kv_len + w->b.key,
		.drop_row = a->kv_len,
	};
}

static void block_forward(const struct work *w)
{
	const struct attention_job *j = w->j;
	const struct k_attention *a = j->a;
	float *sum = w->scratch + j->at.by_row, *max = sum + BLOCK_ROWS, *out = w->scratch + j->at.out;
	const struct attn_rows scores = block_attn_rows(w);
	const struct rect rows = { .p = out, .ld = j->cols, .rows = w->b.rows, .cols = a->head_dim };

	block_scores(w, 0, a->q + rows_at(w, a->q_stride), a->q_stride, j->at.k_turned);
	j->s->isa->attn_softmax(&scores, sum, max);
	block_rows(w, 0, j->at.v);
	float *lse = a->lse ? a->lse + by_row_at(w) : NULL;
	/* The largest score gives 1 to its row's sum; a sum that is no number keeps being none, det_log is for numbers. */
	for (uint32_t r = 0; lse && r < w->b.rows; r++)
		lse[r] = max[r] + (sum[r] >= 1.0f ? (float)det_log((double)sum[r]) : sum[r]);
	for (uint32_t r = 0; r < w->b.rows; r++)
		sum[r] = 1.0f / sum[r];
	j->s->isa->scale_rows(&rows, sum);
	copy_rows(a->out + rows_at(w, a->out_stride), a->out_stride, out, j->cols, w->b.rows, a->head_dim);
}

/* Keys first..end of a sample's key head. */
static struct rect keys_of(const struct attention_job *j, uint32_t sample, uint32_t kv_head, uint32_t first,
			   uint32_t end, bool values)
{
	const struct k_attention *a = j->a;
	const size_t stride = values ? a->v_stride : a->k_stride;
	const float *p = values ? a->v + sample * j->v_sample : a->k + sample * j->k_sample;

	p += first * stride + (size_t)kv_head * a->head_dim;
	return (struct rect){ .p = (float *)p, .ld = stride, .rows = end - first, .cols = a->head_dim };
}

/* At most AHEAD_ROWS rows of the group's heads, the first or the last ones. */
static void fetch_rows(struct attn_ahead *to, const struct rect *t, bool last)
{
	struct rect r = *t;

	r.rows = t->rows < AHEAD_ROWS ? t->rows : AHEAD_ROWS;
	r.p += last ? (t->rows - r.rows) * t->ld : 0;
	to->rect[to->n++] = r;
}

/* Rows first..end of a tensor like q, of all query heads of a key head. */
static struct rect queries_of(const struct attention_job *j, const float *p, size_t stride, uint32_t sample,
			      uint32_t kv_head, uint32_t first, uint32_t end)
{
	const struct k_attention *a = j->a;
	const uint32_t cols = a->heads / a->kv_heads * a->head_dim;

	p += ((size_t)sample * a->q_len + first) * stride + (size_t)kv_head * cols;
	return (struct rect){ .p = (float *)p, .ld = stride, .rows = end - first, .cols = cols };
}

/*
 * This task's output, and what the thread's next task begins with, if the threads go on in turn. Only where it is one
 * chunk: longer ones are longer at work than the cache would keep it.
 */
static void forward_ahead(const struct attention_job *j, uint32_t task, struct attn_ahead *to)
{
	const struct k_attention *a = j->a;
	const uint32_t next = task + j->s->threads, all = a->n_mb * a->batch * a->kv_heads;
	struct rect r;

	if (a->q_len > FORWARD_ROWS)
		return;
	r = queries_of(j, a->out, a->out_stride, task / a->kv_heads, task % a->kv_heads, 0, a->q_len);
	fetch_rows(to, &r, false);
	if (next >= all)
		return;
	r = keys_of(j, next / a->kv_heads, next % a->kv_heads, 0, a->kv_len, false);
	fetch_rows(to, &r, false);
	r = keys_of(j, next / a->kv_heads, next % a->kv_heads, 0, a->kv_len, true);
	fetch_rows(to, &r, false);
	r = queries_of(j, a->q, a->q_stride, next / a->kv_heads, next % a->kv_heads, 0, a->q_len);
	fetch_rows(to, &r, false);
}

static void attention_task(void *ctx, unsigned thread, uint32_t task)
{
	const struct attention_job *j = ctx;
	const struct k_attention *a = j->a;
	/* Long rows first, so that the last tasks are short ones. */
	const uint32_t all = a->n_mb * a->batch * a->kv_heads, chunks = ceil_div_u32(a->q_len, FORWARD_ROWS);
	const uint32_t sample = task % all / a->kv_heads, kv_head = task % a->kv_heads, group = a->heads / a->kv_heads;
	const uint32_t first = (chunks - 1 - task / all) * FORWARD_ROWS;
	const uint32_t end = a->q_len - first < FORWARD_ROWS ? a->q_len : first + FORWARD_ROWS;
	struct block begin = block_of(a, sample, 0, first), last = block_of(a, sample, 0, end - 1);
	float *scratch = workspace_thread(&j->ws, thread);

	if (begin.row < first && begin.row + begin.rows < end)
		begin = block_of(a, sample, 0, begin.row + begin.rows);
	if (begin.row < first)
		return;
	const struct rect k = keys_of(j, sample, kv_head, begin.key, last.key + last.width, false);
	const struct rect v = keys_of(j, sample, kv_head, begin.key, last.key + last.width, true);
	struct attn_ahead ahead = { 0 };

	forward_ahead(j, task, &ahead);
	j->s->isa->attn_pack_turned(&k, scratch + j->at.k_turned);
	j->s->isa->attn_pack(&v, scratch + j->at.v, j->panel);
	for (uint32_t h = kv_head * group; h < (kv_head + 1) * group; h++)
		for (uint32_t row = begin.row; row < end;) {
			const struct block b = block_of(a, sample, h, row);
			const struct work w = work_of(j, &b, begin.key, scratch, &ahead);
			block_forward(&w);
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
		.k_sample = a->kv_sample_stride ? a->kv_sample_stride : a->kv_len * a->k_stride,
		.v_sample = a->kv_sample_stride ? a->kv_sample_stride : a->kv_len * a->v_stride,
		.cols = packed_cols(a->head_dim),
		.panel = (size_t)round_up_u64(a->kv_len, ATTN_PANEL) * ATTN_PANEL,
		.at = space_of(a->q_len, a->kv_len, a->head_dim, back != NULL),
		.ws = workspace_take(s, attention_scratch(a->q_len, a->kv_len, a->head_dim, back != NULL)),
	};
}

void cpu_attention(struct k_stream *s, const struct k_attention *a)
{
	struct attention_job j = attention_job(s, a, NULL);
	pool_run(s->pool, attention_task, &j, a->n_mb * a->batch * a->kv_heads * ceil_div_u32(a->q_len, FORWARD_ROWS));
}

/* ----------------------------------------------------------------- backward */

/* dk or dv, packed: scores or their gradients turned, by the block's rows of q or dout. */
static void block_keys(const struct work *w, unsigned which, const float *rows, size_t stride, size_t packed,
		       size_t grads)
{
	const struct attention_job *j = w->j;
	const struct rect t = { .p = (float *)rows, .ld = stride, .rows = w->b.rows, .cols = j->a->head_dim };

	j->s->isa->attn_pack(&t, w->scratch + packed, (size_t)w->b.rows * ATTN_PANEL);
	j->s->isa->attn_mul(&(struct attn_mul){
		.trim = ATTN_TRIM_HEAD,
		.edge = first_visible(w),
		.m = w->b.width,
		.n = j->a->head_dim,
		.k = w->b.rows,
		.a = w->scratch + j->at.scores[which] + w->lead,
		.a_row = 1,
		.a_step = w->ld,
		.b = w->scratch + packed,
		.b_panel = (size_t)w->b.rows * ATTN_PANEL,
		.c = w->scratch + grads + w->b.key * j->cols,
		.ldc = j->cols,
		.add = true,
		.ahead = w->ahead,
	});
}

static void block_backward(const struct work *w)
{
	const struct attention_job *j = w->j;
	const struct k_attention *a = j->a;
	const struct attn_rows scores = block_attn_rows(w);
	const size_t at = rows_at(w, a->out_stride);
	const float *q = a->q + rows_at(w, a->q_stride), *dout = j->back->dout + at;
	float *d = w->scratch + j->at.by_row;

	block_scores(w, 0, q, a->q_stride, j->at.k_turned);
	block_scores(w, 1, dout, a->out_stride, j->at.v);
	/* The softmax's row sum of p * dp is dout . out, dropout or not. */
	j->s->isa->dot_rows(dout, a->out + at, a->out_stride, w->b.rows, a->head_dim, d);
	j->s->isa->attn_backward(&scores, w->scratch + j->at.scores[1] + w->lead, a->lse + by_row_at(w), d);
	block_keys(w, 0, dout, a->out_stride, j->at.packed[0], j->at.dv);
	block_keys(w, 1, q, a->q_stride, j->at.packed[1], j->at.dk);
	block_rows(w, 1, j->at.k);
	copy_rows(j->back->dq + rows_at(w, a->q_stride), a->q_stride, w->scratch + j->at.out, j->cols, w->b.rows,
		  a->head_dim);
}

/* This task's gradients, and what the thread's next task begins with. */
static void backward_ahead(const struct attention_job *j, uint32_t task, struct attn_ahead *to)
{
	const struct k_attention *a = j->a;
	const uint32_t sample = task / a->kv_heads, kv_head = task % a->kv_heads, next = task + j->s->threads;
	const uint32_t next_sample = next / a->kv_heads, next_head = next % a->kv_heads, n = a->q_len;
	const struct rect k = keys_of(j, sample, kv_head, 0, n, false), v = keys_of(j, sample, kv_head, 0, n, true);
	struct rect r = queries_of(j, j->back->dq, a->q_stride, sample, kv_head, 0, n);

	fetch_rows(to, &r, true);
	if (next < a->n_mb * a->batch * a->kv_heads) {
		r = keys_of(j, next_sample, next_head, 0, n, false);
		fetch_rows(to, &r, false);
		r = keys_of(j, next_sample, next_head, 0, n, true);
		fetch_rows(to, &r, false);
		r = queries_of(j, a->q, a->q_stride, next_sample, next_head, 0, n);
		fetch_rows(to, &r, true);
		r = queries_of(j, j->back->dout, a->out_stride, next_sample, next_head, 0, n);
		fetch_rows(to, &r, true);
		r = queries_of(j, a->out, a->out_stride, next_sample, next_head, 0, n);
		fetch_rows(to, &r, true);
	}
	r = k;
	r.p = j->back->dk + (k.p - a->k);
	fetch_rows(to, &r, false);
	r = v;
	r.p = j->back->dv + (v.p - a->v);
	fetch_rows(to, &r, false);
}

static void attention_backward_task(void *ctx, unsigned thread, uint32_t task)
{
	const struct attention_job *j = ctx;
	const struct k_attention *a = j->a;
	const uint32_t group = a->heads / a->kv_heads, sample = task / a->kv_heads, kv_head = task % a->kv_heads;
	const struct rect k = keys_of(j, sample, kv_head, 0, a->kv_len, false);
	const struct rect v = keys_of(j, sample, kv_head, 0, a->kv_len, true);
	float *scratch = workspace_thread(&j->ws, thread), *dk = scratch + j->at.dk, *dv = scratch + j->at.dv;
	struct attn_ahead ahead = { 0 };

	backward_ahead(j, task, &ahead);
	j->s->isa->attn_pack_turned(&k, scratch + j->at.k_turned);
	j->s->isa->attn_pack_turned(&v, scratch + j->at.v);
	j->s->isa->attn_pack(&k, scratch + j->at.k, j->panel);
	memset(dk, 0, a->kv_len * j->cols * sizeof(float));
	memset(dv, 0, a->kv_len * j->cols * sizeof(float));
	for (uint32_t h = 0; h < group; h++)
		for (uint32_t row = a->q_len; row > 0;) {
			const struct block b = block_of(a, sample, kv_head * group + h, row - 1);
			const struct work w = work_of(j, &b, 0, scratch, &ahead);
			block_backward(&w);
			row = b.row;
		}
	copy_rows(j->back->dk + (k.p - a->k), k.ld, dk, j->cols, a->kv_len, a->head_dim);
	copy_rows(j->back->dv + (v.p - a->v), v.ld, dv, j->cols, a->kv_len, a->head_dim);
}

void cpu_attention_backward(struct k_stream *s, const struct k_attention_backward *a)
{
	assert(a->fwd.q_len == a->fwd.kv_len && a->fwd.lse && a->dout && a->dq && a->dk && a->dv);
	struct attention_job j = attention_job(s, &a->fwd, a);
	pool_run(s->pool, attention_backward_task, &j, a->fwd.n_mb * a->fwd.batch * a->fwd.kv_heads);
}
