/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kernels: the mathematics, as one table of operations. cpu/ implements it on
 * a pool of threads, cuda/ on a CUDA stream; a deferred backend (tests) runs
 * nothing until an event is waited for, and so proves that no caller assumes
 * that a call has finished when it returns.
 *
 * Contract
 * - A call is enqueued on a stream; calls of one stream take effect in order.
 *   Argument structs are copied by the call; the memory they point to belongs
 *   to the caller and must stay until an event recorded behind the call is done.
 * - No call allocates. Scratch comes from the stream's workspace, whose size
 *   workspace_bytes() gives for the largest shapes to come.
 * - A stream is driven by one thread. Calls cannot fail on valid shapes (shapes
 *   are asserted); a device's sticky fault shows in stream_error().
 * - Bits: the result of a call is a function of its arguments and the math
 *   profile, never of the number of threads. A matrix product is cut into a
 *   tile grid that depends on its shape alone, each tile one single-threaded
 *   library call over the whole inner dimension. Micro-batches are never merged
 *   into one product. Where a call sums over the micro-batches of a span, it
 *   adds their leaves along the fixed binary tree: tree(n) = leaf if n == 1,
 *   else tree(l) + tree(n - l) with l the largest power of two below n.
 * - Layouts: all tensors are dense, row-major fp32. An activation of a span is
 *   [n_mb][rows][cols], micro-batches back to back; rows = batch * seq.
 */
#ifndef SHARDMESH_KERNELS_H
#define SHARDMESH_KERNELS_H

#include "base/base.h"

struct k_stream; /* opaque, backend's */

/* ------------------------------------------------------------ math profile */

enum k_library { K_LIB_PORTABLE, K_LIB_DNNL, K_LIB_OPENBLAS };
enum k_isa { K_ISA_PORTABLE, K_ISA_AVX2, K_ISA_AVX512 };

/*
 * Everything that can change a bit. It belongs to the job: detected once, from
 * a table of processor features and library versions and never from a timing,
 * then imposed on every member.
 */
struct k_profile {
	enum k_library library;
	enum k_isa isa;
	unsigned grid;    /* version of the tile grid's rules and of attention's */
	char version[32]; /* the library's own version */
	char text[128];   /* "cpu dnnl 2.6.3 avx512 grid2 fp32": the canonical form */
};

/*
 * The profile this machine should use. want: NULL or "" for the table's choice,
 * else "portable", "dnnl", "openblas", optionally ":portable", ":avx2" or
 * ":avx512" behind it. *reason (NULL or at least 160 bytes) says why it was chosen. -ENOTSUP when
 * what is wanted cannot run here. This, k_profile_check and stream_open load the
 * library and set the environment variables that bind it to the profile, so they
 * are called before other threads look at the environment; what is loaded stays,
 * and a process that has loaded it for one instruction set cannot run another.
 */
int k_profile_detect(const char *want, struct k_profile *out, char reason[160], struct err *e);
/* Reads the canonical form. -EINVAL. */
int k_profile_parse(const char *text, struct k_profile *out, struct err *e);
/* 0 if this machine can run p exactly; -ENOTSUP names both profiles. */
int k_profile_check(const struct k_profile *p, struct err *e);

/* ------------------------------------------------------------------ shapes */

/* Upper bounds over all calls to come, for workspace_bytes. */
struct k_dims {
	uint32_t n_mb;  /* micro-batches in a span */
	uint32_t batch; /* samples in a micro-batch */
	uint32_t seq;
	uint32_t channels; /* residual width */
	uint32_t heads, kv_heads, head_dim;
	uint32_t ffn; /* widest inner layer */
	uint32_t vocab;
};

/*
 * Dropout by counter: element i of micro-batch k (i counts within the
 * micro-batch's tensor) is dropped when a uniform of (seed, stream[k], i) is
 * below rate; kept elements are scaled by 1 / (1 - rate). rate 0: no dropout,
 * stream may be NULL. The uniform: word i mod 4 of rng_philox4x32 with the seed
 * as key and counter {i / 4, stream[k]}, low halves first, its upper 24 bits
 * times 2^-24.
 */
struct k_dropout {
	float rate;
	uint64_t seed;
	const uint64_t *stream; /* [n_mb] */
};

/* x[n_mb][batch*seq][channels] = wte[token] + wpe[position], then dropout. wpe may be NULL. */
struct k_embed {
	uint32_t n_mb, batch, seq, channels, vocab;
	uint32_t first_position; /* position of column 0: 0 except when decoding */
	const uint32_t *tokens;  /* [n_mb][batch][seq] */
	const float *wte;        /* [vocab][channels] */
	const float *wpe;        /* [>= first_position + seq][channels] or NULL */
	float *x;
	struct k_dropout dropout;
};

/* Leaf gradients are dense (rows no token names are +0); span sum along the tree. Overwrites dwte, dwpe. */
struct k_embed_backward {
	uint32_t n_mb, batch, seq, channels, vocab;
	uint32_t positions; /* rows of dwpe; rows seq.. are set to 0 */
	const uint32_t *tokens;
	const float *dx; /* [n_mb][batch*seq][channels] */
	float *dwte;     /* [vocab][channels] */
	float *dwpe;     /* [positions][channels] or NULL */
	struct k_dropout dropout;
};

/*
 * LayerNorm (Ba et al. 2016), optionally behind a residual addition:
 * sum = x + dropout(branch) when branch is given (sum is written, may alias x),
 * else sum = x; y = (sum - mean) * rstd * gamma + beta. With rms (RMSNorm, Zhang
 * & Sennrich 2019) the mean is 0 and not written, and there is no beta:
 * y = sum * rstd * gamma with rstd = 1 / sqrt(mean of squares + eps).
 */
struct k_norm {
	uint32_t n_mb, rows, cols; /* rows of one micro-batch */
	float eps;
	bool rms;
	const float *x;
	const float *branch;       /* or NULL */
	struct k_dropout dropout;  /* of branch */
	float *sum;                /* [n_mb][rows][cols]; NULL when branch is NULL */
	const float *gamma, *beta; /* [cols] */
	float *y;
	float *mean, *rstd; /* [n_mb][rows]; may be NULL when no backward follows */
};

/*
 * dx = LayerNorm backward of dy, plus dresidual (the gradient that reaches the
 * sum directly) when given; dx may alias dresidual, nothing else. dgamma and dbeta are the
 * span's sums along the tree; a leaf sums its rows in order. Overwrites all.
 */
struct k_norm_backward {
	uint32_t n_mb, rows, cols;
	bool rms;       /* mean, beta and dbeta are not looked at */
	const float *x; /* the normalised input: `sum` of the forward */
	const float *mean, *rstd, *gamma;
	const float *dy;
	const float *dresidual; /* or NULL */
	float *dx;
	float *dgamma, *dbeta;
};

/* out = x + dropout(branch): the last residual of a block, and dropout's backward with x NULL. */
struct k_residual {
	uint32_t n_mb, rows, cols;
	const float *x; /* or NULL: out = dropout mask applied to branch */
	const float *branch;
	float *out; /* may alias x or branch */
	struct k_dropout dropout;
};

enum k_activation { K_ACT_NONE, K_ACT_GELU_TANH, K_ACT_GELU_ERF, K_ACT_RELU, K_ACT_SILU };

/*
 * y = x W + b for each micro-batch of the span. W is [in][out] (HF Conv1D), or
 * [out][in] when w_out_in is set (nn.Linear). With an activation, `pre` gets
 * the value before it (NULL when no backward follows) and y the value behind it.
 */
struct k_linear {
	uint32_t n_mb, rows, in, out;
	bool w_out_in;
	enum k_activation act;
	const float *x, *w;
	const float *b; /* [out] or NULL */
	float *pre, *y;
};

/*
 * dx = (dy W^T) for each micro-batch, times act'(pre_in) when act_in is not
 * NONE (pre_in: the input layer's value before its activation). dw, db: the
 * span's sums along the tree, tile by tile, partial sums in workspace.
 * dx, dw, db may each be NULL. Overwrites; with dx_add the product is added to
 * what dx holds (no act_in then), with dw_add dw's to what dw holds: a leaf that
 * comes in pieces of its rows, so n_mb is 1 and there is no db. dx must not
 * alias dy.
 */
struct k_linear_backward {
	uint32_t n_mb, rows, in, out;
	bool w_out_in, dx_add;
	const float *x, *w, *dy;
	float *dx, *dw, *db;
	enum k_activation act_in;
	const float *pre_in; /* [n_mb][rows][in] */
	bool dw_add;
};

/*
 * Per head of each row: RMSNorm over head_dim where gamma is given (Qwen3), then
 * rotary position embedding (Su et al. 2021) in Hugging Face's half-split form:
 * elements i and i + rot/2 of the head's first rot are turned by the angle whose
 * cosine and sine the table has for the row's position; the rest is copied.
 * Row r of a micro-batch is at position first_position + r mod seq. out may
 * alias x unless gamma is given.
 */
struct k_rotary {
	uint32_t n_mb, rows, seq, first_position;
	uint32_t heads, head_dim, rot; /* rot even, at most head_dim; 0: no rotation */
	const float *cos, *sin;        /* [positions][rot / 2] */
	const float *gamma;            /* [head_dim] or NULL */
	float eps;
	const float *x; /* [n_mb][rows][heads * head_dim] */
	float *out;
	float *rstd; /* [n_mb][rows][heads]; NULL without gamma or backward */
};

/* dx may alias dout. dgamma: the span's sum along the tree; a leaf sums rows, then heads, in order. */
struct k_rotary_backward {
	struct k_rotary fwd; /* x and rstd as in the forward where gamma is given */
	const float *dout;
	float *dx;
	float *dgamma; /* NULL without gamma */
};

/* y = act(gate) * up (Shazeer 2020); all [n_mb][rows][cols]; y may alias neither. */
struct k_glu {
	uint32_t n_mb, rows, cols;
	enum k_activation act;
	const float *gate, *up;
	float *y;
};
/* dgate may alias gate's buffer, dup up's; either may alias dy. */
struct k_glu_backward {
	struct k_glu fwd; /* y is not looked at */
	const float *dy;
	float *dgate, *dup;
};

/*
 * Causal softmax(q k^T * scale) v for samples independently (flash-style, no
 * seq x seq matrix beyond a block of rows). Query i sits at position
 * kv_len - q_len + i and sees keys 0..that. q, k, v and out are rows of
 * *_stride floats; head h at column h * head_dim; query head h uses kv head
 * h / (heads / kv_heads). lse [samples][heads][q_len] may be NULL. A query sees
 * at most the last `window` keys, itself included (0: all), and none before its
 * document's first position where `first_key` is given: packed documents do not
 * see each other.
 */
struct k_attention {
	uint32_t n_mb, batch; /* samples = n_mb * batch */
	uint32_t q_len, kv_len, heads, kv_heads, head_dim;
	uint32_t window;
	const uint32_t *first_key; /* [samples][q_len], ascending within a sample; or NULL */
	float scale;
	const float *q, *k, *v;
	size_t q_stride, k_stride, v_stride, out_stride; /* floats between rows */
	size_t kv_sample_stride;                         /* floats between samples of k and of v; 0: kv_len * stride */
	float *out, *lse;
	struct k_dropout dropout; /* on the probabilities; element (sample in mb, head, i, j) */
};

struct k_attention_backward {
	struct k_attention fwd; /* as in the forward, out and lse given; q_len == kv_len */
	const float *dout;      /* rows of fwd.out_stride */
	float *dq, *dk, *dv;    /* strides as q, k, v; overwritten */
};

/*
 * Cross-entropy of each row with its gradient in place: loss[k] = mean over the
 * rows of micro-batch k (rows summed in order, double); logits become
 * (softmax - onehot) / counted rows, the leaf's gradient. Rows whose target is
 * K_IGNORE_TARGET count for nothing. With loss_only the logits are left as they
 * are. A micro-batch without counted rows has loss 0 and gradient 0.
 *
 * One micro-batch may come in pieces, a call each, in order: logits are those of
 * rows [first_row, first_row + rows) of its all_rows, targets those of all of
 * them; loss[0] carries the sum so far and is right behind the last piece.
 */
#define K_IGNORE_TARGET UINT32_MAX
struct k_xent {
	uint32_t n_mb, rows, vocab;
	bool loss_only;
	float *logits;                /* [n_mb][rows][vocab] */
	const uint32_t *targets;      /* [n_mb][rows]; in pieces [all_rows] */
	double *loss;                 /* [n_mb] */
	uint32_t first_row, all_rows; /* all_rows 0: not in pieces */
};

/* ----------------------------------------------------- arithmetic of state */

/*
 * State is cut into chunks of 16,384 elements of a unit. These operations are
 * a written order of + - * / sqrt without contraction: same bits on every
 * processor, whatever the profile. Segment lengths are multiples of the chunk.
 */
#define K_CHUNK 16384u

/* dst = a, or a + b where b is given. dst may alias a or b. */
struct k_fold_seg {
	float *dst;
	const float *a, *b;
	uint64_t n;
};
struct k_fold {
	const struct k_fold_seg *seg; /* caller's, until the event */
	uint32_t n_seg;
	/* Or NULL: the square sums of dst are added to it, per chunk in 16 double
	 * lanes (lane = element mod 16) joined by a fixed tree, then exactly. */
	struct exact_sum *square_sum;
};

/*
 * One Adam step on n elements (Kingma & Ba 2015; decoupled decay: Loshchilov &
 * Hutter 2019), g scaled first:
 *   g = grad * grad_scale; if (!decoupled) g += weight_decay * p
 *   m = beta1 * m + (1 - beta1) * g;  v = beta2 * v + (1 - beta2) * g * g
 *   if (decoupled) p -= lr * weight_decay * p
 *   p -= (lr / bias1) * m / (sqrt(v) / sqrt(bias2) + eps)
 * in fp32, scalars rounded from double once. grad_scale carries 1/M and clipping.
 */
struct k_adam {
	float *p, *m, *v;
	const float *grad;
	uint64_t n;
	double grad_scale, lr, beta1, beta2, eps, weight_decay;
	double bias1, bias2; /* 1 - beta^t; 1 without bias correction */
	bool decoupled;
};

/*
 * Adds to *out, mod 2^128, three XXH3-128 for each chunk: over its master, m and
 * v (part 0, 1, 2), seeded by unit << 40 | chunk index in the unit << 2 | part.
 * n: elements present, a multiple of K_CHUNK.
 */
struct k_state_hash {
	const float *p, *m, *v;
	uint64_t n;
	uint64_t first_chunk;
	uint32_t unit;
	struct hash128 *out;
};

/* ------------------------------------------------------------------- table */

/* Done when every call enqueued before the record has taken effect. */
struct k_event {
	uint64_t ticket;
};

struct k_stream_config {
	const struct k_profile *profile;
	unsigned threads; /* CPU: pool size, the driving thread counted */
	void *workspace;  /* 64-byte aligned, caller's */
	size_t workspace_bytes;
};

struct k_ops {
	const char *name;
	size_t (*workspace_bytes)(const struct k_dims *dims, unsigned threads);
	int (*stream_open)(const struct k_stream_config *cfg, struct k_stream **out, struct err *e);
	void (*stream_close)(struct k_stream *s); /* waits for what is enqueued */
	int (*stream_error)(struct k_stream *s);  /* 0 or a sticky -Exxx */
	void (*event_record)(struct k_stream *s, struct k_event *ev);
	bool (*event_done)(struct k_stream *s, const struct k_event *ev);
	void (*event_wait)(struct k_stream *s, const struct k_event *ev);

	void (*copy)(struct k_stream *s, void *dst, const void *src, size_t bytes);
	void (*zero)(struct k_stream *s, void *dst, size_t bytes);
	void (*embed)(struct k_stream *s, const struct k_embed *a);
	void (*embed_backward)(struct k_stream *s, const struct k_embed_backward *a);
	void (*norm)(struct k_stream *s, const struct k_norm *a);
	void (*norm_backward)(struct k_stream *s, const struct k_norm_backward *a);
	void (*residual)(struct k_stream *s, const struct k_residual *a);
	void (*linear)(struct k_stream *s, const struct k_linear *a);
	void (*linear_backward)(struct k_stream *s, const struct k_linear_backward *a);
	void (*rotary)(struct k_stream *s, const struct k_rotary *a);
	void (*rotary_backward)(struct k_stream *s, const struct k_rotary_backward *a);
	void (*glu)(struct k_stream *s, const struct k_glu *a);
	void (*glu_backward)(struct k_stream *s, const struct k_glu_backward *a);
	void (*attention)(struct k_stream *s, const struct k_attention *a);
	void (*attention_backward)(struct k_stream *s, const struct k_attention_backward *a);
	void (*xent)(struct k_stream *s, const struct k_xent *a);
	void (*fold)(struct k_stream *s, const struct k_fold *a);
	void (*adam)(struct k_stream *s, const struct k_adam *a);
	void (*state_hash)(struct k_stream *s, const struct k_state_hash *a);
};

const struct k_ops *k_cpu_ops(void);
/* Wraps the CPU table: calls run only when an event behind them is waited for or asked for. */
const struct k_ops *k_deferred_ops(void);

#endif
