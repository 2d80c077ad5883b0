/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The network as calls of kernels.h: where each tensor lies in its unit, the
 * buffers of a span, and one function a unit and direction. Nothing here knows
 * where a unit's parameters come from or where its gradient goes: callers give
 * flat vectors. The calls are enqueued; whoever drives them waits for events.
 */
#ifndef SHARDMESH_WORKER_NET_H
#define SHARDMESH_WORKER_NET_H

#include "kernels/kernels.h"
#include "model/model.h"

/* Element offsets in the flat vector of a block. */
struct block_refs {
	uint64_t ln1_w, ln1_b, attn_w, attn_b, proj_w, proj_b;
	uint64_t ln2_w, ln2_b, fc_w, fc_b, out_w, out_b;
};

struct net_refs {
	uint64_t wte, wpe;        /* in the embedding's unit */
	struct block_refs *block; /* [n_layer] */
	uint64_t lnf_w, lnf_b;    /* in the head's unit */
	uint64_t head_w;          /* untied: in the head's unit; tied: wte in the embedding's */
};

/* What the backward of a block needs of its forward; each [n_mb][rows][..]. */
struct block_acts {
	float *ln1, *mean1, *rstd1, *qkv, *att, *lse;
	float *mid, *ln2, *mean2, *rstd2, *pre, *act;
};

#define NO_LAYER UINT32_MAX

/* Buffers of a span. One place a buffer, all from the arena that the plan sized. */
struct activations {
	float **boundary;         /* [n_layer + 1]: the residual stream into each block and into the head */
	struct block_acts *block; /* [n_layer], or one where activations are recomputed */
	bool keep;
	uint32_t held_layer;   /* recomputed: whose forward block[0] holds */
	float *branch;         /* [rows][C]: what is about to be added to the residual stream */
	float *dx, *dy, *wide; /* backward: [rows][C], [rows][C], [rows][max(n_inner, 3C)] */
	float *lnf, *meanf, *rstdf, *logits;
	double *loss; /* [max_span] */
	uint32_t *tokens, *targets;
	uint64_t *streams; /* [dropout sites][max_span] */
};

struct net_config {
	const struct model_config *model;
	const struct unit_table *table;
	const struct k_ops *k;
	uint32_t batch, seq, max_span;
	bool keep;
	uint64_t seed;
};

struct net {
	struct net_config cfg;
	struct k_stream *stream; /* the caller's; set before the first call */
	struct net_refs refs;
	struct activations act;
	/* the span being computed */
	uint32_t n_mb;
	bool training;
};

/* -------------------------------------------------------- transformer.c */

/* Looks up every tensor in cfg's table; allocates only tables of pointers. -EINVAL names a missing tensor. */
int net_init(struct net *n, const struct net_config *cfg, struct err *e);
void net_release(struct net *n);
/* Shapes for the kernels' workspace with spans of n_mb. */
void net_dims(const struct model_config *m, uint32_t batch, uint32_t seq, uint32_t n_mb, struct k_dims *out);

uint32_t net_unit_embedding(const struct net *n);
uint32_t net_unit_block(const struct net *n, uint32_t layer);
uint32_t net_unit_head(const struct net *n);

/* A use of parameters: what happens between two unit borders. */
enum use_kind { USE_EMBED, USE_BLOCK, USE_HEAD, USE_BLOCK_BACKWARD, USE_EMBED_BACKWARD };
struct use {
	enum use_kind kind;
	uint32_t layer;
	uint32_t n;       /* units read: 0 to 2 */
	uint32_t unit[2]; /* the head first, then the tied embedding */
};
/* The known order of a span: forward then, in training, backward. Returns how many; out holds net_uses_max. */
uint32_t net_uses(const struct net *n, bool training, struct use *out);
uint32_t net_uses_max(const struct model_config *m);

/*
 * Starts a span: how many micro-batches, whose global index of the first is
 * `first`, in training (with dropout) or not. Tokens and targets are in act.
 */
void net_span_begin(struct net *n, uint64_t step, uint32_t first, uint32_t n_mb, bool training);
/*
 * The dropout stream of (step, micro-batch, layer, site): a hash of the four,
 * so that no two sites of a job share their random numbers.
 */
enum dropout_site { SITE_EMBEDDING, SITE_ATTENTION, SITE_PROJECTION, SITE_MLP, DROPOUT_SITES };
uint64_t net_dropout_stream(uint64_t step, uint32_t micro_batch, uint32_t layer, enum dropout_site site);
struct k_dropout net_dropout(const struct net *n, uint32_t layer, enum dropout_site site);
/* Softmax scale of a layer: 1/sqrt(head_dim) and 1/(layer + 1), each if the model asks for it. */
float net_attention_scale(const struct model_config *m, uint32_t layer);

/* -------------------------------------------------------- activations.c */

/* Bytes of all buffers for spans of max_span; what net_activations takes from its arena. */
uint64_t net_activation_bytes(const struct net_config *cfg);
/* -ENOMEM when the arena is smaller than planned. */
int net_activations(struct net *n, struct arena *a);

/* ------------------------------------------------- forward.c, backward.c */

void net_embed_forward(struct net *n, const float *embedding);
void net_block_forward(struct net *n, uint32_t layer, const float *params);
/* Recomputed activations: the part of the block's forward that its backward needs. */
void net_block_recompute(struct net *n, uint32_t layer, const float *params);
/* Final norm, logits, loss; in training the logits become their gradient. head_w: the logits' matrix. */
void net_head_forward(struct net *n, const float *head, const float *head_w);

/*
 * Gradients go to flat vectors of the unit; elements outside its tensors are
 * set to zero. The embedding's part 1 (tied) is net_head_backward_weight's.
 */
void net_head_backward(struct net *n, const float *head, const float *head_w, float *grad);
/* Tied: the gradient of the logits' matrix into the embedding's flat vector, part 1. */
void net_head_backward_tied(struct net *n, float *grad);
void net_block_backward(struct net *n, uint32_t layer, const float *params, float *grad);
void net_embed_backward(struct net *n, float *grad);
/* Sets to zero what lies in the pages of (unit, part) outside the part's tensors. */
void net_zero_gaps(struct net *n, uint32_t unit, uint32_t part, float *grad);

#endif
