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

#define NO_TENSOR UINT64_MAX /* a bias or a norm that this model does without */

/* Element offsets in the flat vector of a block. */
struct gpt2_refs {
	uint64_t ln1_w, ln1_b, attn_w, attn_b, proj_w, proj_b;
	uint64_t ln2_w, ln2_b, fc_w, fc_b, out_w, out_b;
};
struct llama_refs {
	uint64_t norm1, q_w, q_b, k_w, k_b, v_w, v_b, q_norm, k_norm, o_w, o_b;
	uint64_t norm2, gate_w, gate_b, up_w, up_b, down_w, down_b;
};
union block_refs {
	struct gpt2_refs gpt2;
	struct llama_refs llama;
};

struct net_refs {
	uint64_t wte, wpe;       /* in the embedding's unit; wpe: or NO_TENSOR */
	union block_refs *block; /* [n_layer] */
	uint64_t lnf_w, lnf_b;   /* in the head's unit; lnf_b: or NO_TENSOR */
	uint64_t head_w;         /* untied: in the head's unit; tied: wte in the embedding's */
};

/*
 * What the backward of a block needs of its forward; each [n_mb][rows][..]. When
 * a pass continues a context (generation), keys and values hold the earlier
 * positions in front: qkv of GPT-2, k and v of Llama.
 */
struct gpt2_acts {
	float *ln1, *mean1, *rstd1, *qkv, *att, *lse;
	float *mid, *ln2, *mean2, *rstd2, *pre, *act;
};
struct llama_acts {
	float *norm1, *rstd1, *q, *k, *v, *att, *lse;
	float *q_pre, *k_pre, *q_rstd, *k_rstd; /* before their norm, with qk_norm */
	float *mid, *norm2, *rstd2, *gate, *up, *act;
};
union block_acts {
	struct gpt2_acts gpt2;
	struct llama_acts llama;
};

#define NO_LAYER UINT32_MAX

/* Buffers of a span. One place a buffer, all from the arena that the plan sized. */
struct activations {
	float **boundary;        /* [n_layer + 1]: the residual stream into each block and into the head */
	union block_acts *block; /* [n_layer], or one where activations are recomputed */
	bool keep;
	uint32_t held_layer;   /* recomputed: whose forward block[0] holds */
	float *branch;         /* [rows][C]: what is about to be added to the residual stream */
	float *dx, *dy, *wide; /* backward: [rows][C], [rows][max(C, HD)], [rows][max(n_inner, HD + 2KD)] */
	float *lnf, *meanf, *rstdf;
	float *logits;                  /* of the span, or of a piece: head_pieces */
	float *head_sum[HEAD_SUMS_MAX]; /* partial sums of the matrix's gradient, with head_pieces */
	float *cos, *sin;               /* [seq][rot / 2], of the rotary positions; NULL where there are none */
	double *loss;                   /* [max_span] */
	uint32_t *tokens, *targets;
	uint32_t *first_key; /* as k_attention takes it; NULL where no documents are packed */
	uint64_t *streams;   /* [dropout sites][max_span] */
};

struct net_config {
	const struct model_config *model;
	const struct unit_table *table;
	const struct k_ops *k;
	uint32_t batch, seq, max_span;
	bool keep;
	bool packed;          /* samples hold documents that do not see each other */
	uint32_t head_pieces; /* struct head_plan's; 0: the logits of a span at once */
	uint64_t seed;
};

struct net_family;

struct net {
	struct net_config cfg;
	const struct net_family *family;
	struct k_stream *stream; /* the caller's; set before the first call */
	struct net_refs refs;
	struct activations act;
	/* the span being computed */
	uint32_t n_mb;
	bool training;
	uint32_t seq, first_position; /* of the pass: cfg.seq and 0 but when a context is continued */
};

/* -------------------------------------------------------------- families */

/* One walk over all buffers serves both questions, how many bytes and where: so the two cannot differ. */
struct walk {
	struct arena *arena; /* NULL: count */
	uint64_t bytes;
	bool failed;
};
float *net_take_floats(struct walk *w, uint64_t n);

struct tensor_place {
	const char *name; /* behind the block's prefix */
	size_t ref;       /* offset of its uint64_t in the family's refs */
	bool optional;    /* the model's config may leave it out */
};

/* What differs between families. C residual width, p the block's flat vector, grad its gradient's. */
struct net_family {
	const char *embedding, *positions, *norm_w, *norm_b; /* HF names; positions and norm_b: or NULL */
	const char *block;                                   /* what stands before a layer's number */
	bool rms;                                            /* norms are RMSNorm, else LayerNorm */
	uint32_t n_tensors;
	const struct tensor_place *tensor; /* [n_tensors] of a block */
	/* Keys and values, which a context keeps, of so many rows; then all other buffers. */
	void (*walk_cache)(struct walk *w, const struct model_config *m, uint64_t rows, union block_acts *b);
	void (*walk_rows)(struct walk *w, const struct model_config *m, uint64_t rows, union block_acts *b);
	/* Everything of a block that its backward needs: all but the last product and addition. */
	void (*inner)(struct net *n, uint32_t layer, const float *p, const union block_acts *b);
	/* The last product, into act.branch; returns what it is added to. */
	const float *(*out)(struct net *n, uint32_t layer, const float *p, const union block_acts *b);
	/* act.dx: the gradient behind the block, then before it. What the forward left in b is used up. */
	void (*backward)(struct net *n, uint32_t layer, const float *p, const union block_acts *b, float *grad);
};
extern const struct net_family net_gpt2, net_llama;

static inline const struct net_family *net_family_of(const struct model_config *m)
{
	return model_is_llama(m) ? &net_llama : &net_gpt2;
}

/* Rows of a micro-batch in this pass. */
static inline uint32_t net_rows(const struct net *n)
{
	return n->cfg.batch * n->seq;
}

/* A tensor in its unit's flat vector, or NULL. */
static inline const float *net_at(const float *flat, uint64_t ref)
{
	return ref == NO_TENSOR ? NULL : flat + ref;
}
static inline float *net_grad_at(float *flat, uint64_t ref)
{
	return ref == NO_TENSOR ? NULL : flat + ref;
}

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
/*
 * Starts a pass outside training that continues a context: seq more rows, the
 * first at position `first`. Generation only, batch and span are 1.
 */
void net_pass_begin(struct net *n, uint32_t first, uint32_t seq);
/* Softmax scale of a layer: 1/sqrt(head_dim) and 1/(layer + 1), each if the model asks for it. */
float net_attention_scale(const struct model_config *m, uint32_t layer);

/* -------------------------------------------------------- activations.c */

/* Bytes of all buffers for spans of max_span; what net_activations takes from its arena. */
uint64_t net_activation_bytes(const struct net_config *cfg);
/* Takes the buffers and fills in the tables of rotary positions. -ENOMEM when the arena is smaller than planned. */
int net_activations(struct net *n, struct arena *a);
/*
 * The same for generation: a context of cfg.seq positions whose keys and values
 * are kept, in passes of at most `rows` rows. Logits are one row's.
 */
uint64_t net_context_bytes(const struct net_config *cfg, uint32_t rows);
int net_context(struct net *n, uint32_t rows, struct arena *a);

/* ------------------------------------------------- forward.c, backward.c */

void net_embed_forward(struct net *n, const float *embedding);
void net_block_forward(struct net *n, uint32_t layer, const float *params);
/* Recomputed activations: the part of the block's forward that its backward needs. */
void net_block_recompute(struct net *n, uint32_t layer, const float *params);
/*
 * Gradients go to flat vectors of the unit; elements outside its tensors are
 * set to zero. The embedding's part 1 (tied) is net_head_train's.
 */
void net_block_backward(struct net *n, uint32_t layer, const float *params, float *grad);
void net_embed_backward(struct net *n, float *grad);
/* Sets to zero what lies in the pages of (unit, part) outside the part's tensors. */
void net_zero_gaps(struct net *n, uint32_t unit, uint32_t part, float *grad);

/* --------------------------------------------------------------- head.c */

/* Final norm and logits of the pass's rows from first_row on; that is 0 unless there is but one micro-batch. */
void net_head_logits(struct net *n, const float *head, const float *head_w, uint32_t first_row);
/* Final norm, logits, loss, outside training. head_w: the logits' matrix. */
void net_head_loss(struct net *n, const float *head, const float *head_w);
/*
 * The same in training, and on through the logits: act.dy becomes the gradient
 * of the final norm's output, and the matrix's own goes to grad, the flat vector
 * of the unit that has the matrix: the head, or (tied) the embedding, as part 1.
 */
void net_head_train(struct net *n, const float *head, const float *head_w, float *grad);
/* Through the final norm. grad: the head's flat vector; untied, the one net_head_train was given. */
void net_head_backward(struct net *n, const float *head, float *grad);

/* For families: calls whose n_mb, rows and what follows from the model are filled in. Norms are of C columns. */
void net_norm(struct net *n, const struct k_norm *shape);
void net_linear(struct net *n, const struct k_linear *shape);
void net_norm_backward(struct net *n, const struct k_norm_backward *shape);
void net_linear_backward(struct net *n, const struct k_linear_backward *shape);
/* The gradient of dropout(branch): act.dx itself where nothing was dropped. */
const float *net_branch_gradient(struct net *n, uint32_t layer, enum dropout_site site);

/* ------------------------------------------------------------- trouble.c */

/*
 * Whether everything of the span just computed is finite, looked at where that
 * costs next to nothing. False: *micro is the first micro-batch of the span that
 * is not; *of_loss, whether its loss is not, or only its gradient; and of a loss,
 * *unit is the first unit whose output is not.
 */
bool net_finite(const struct net *n, bool *of_loss, uint32_t *micro, uint32_t *unit);

#endif
