/* SPDX-License-Identifier: Apache-2.0 */
/*
 * model: what is trained, as data. The DeepSpeed config and its "shardmesh"
 * section, the Hugging Face config.json, the cut of a model into units, pages
 * and runs, who owns which run, the memory plan, the learning-rate schedule,
 * training data, and safetensors files. No sockets, no threads, no mathematics
 * on tensors. Everything here is a function of its inputs alone.
 */
#ifndef SHARDMESH_MODEL_H
#define SHARDMESH_MODEL_H

#include "base/base.h"

/* ---------------------------------------------------------- model (config.json) */

/* GPT-2, or one of the Llama family: RMSNorm, rotary positions, gated feed-forward, grouped queries. */
enum model_family { FAMILY_GPT2, FAMILY_LLAMA, FAMILY_MISTRAL, FAMILY_QWEN2, FAMILY_QWEN3, MODEL_FAMILIES };

/*
 * Rotary positions (Su et al. 2021) and how their frequencies are stretched for
 * longer contexts, in the words of transformers' modeling_rope_utils.py.
 */
enum rope_type { ROPE_DEFAULT, ROPE_LINEAR, ROPE_DYNAMIC, ROPE_LLAMA3, ROPE_YARN };
struct rope_config {
	enum rope_type type;
	uint32_t rot; /* elements of a head that are turned, from its first on: head_dim; GPT-2: 0 */
	double theta;
	double factor;                             /* all types but the default */
	double low_freq_factor, high_freq_factor;  /* llama3 */
	double beta_fast, beta_slow;               /* yarn */
	double attention_factor;                   /* yarn: on cosine and sine; else 1 */
	bool truncate;                             /* yarn: the ramp between whole dimensions */
	uint32_t original_max_position_embeddings; /* llama3, yarn */
};

#define MODEL_LAYERS_MAX 4096u

/*
 * The keys of an HF config.json that change the arithmetic, HF's defaults
 * filled in. Names are GPT-2's where both families have the thing: n_embd is
 * the hidden size, n_inner the feed-forward's, n_positions
 * max_position_embeddings, layer_norm_epsilon also rms_norm_eps, attn_pdrop
 * also attention_dropout.
 */
struct model_config {
	enum model_family family;
	uint32_t vocab_size, n_positions, n_embd, n_layer, n_head, n_inner;
	uint32_t n_kv_head, head_dim; /* n_head queries share n_kv_head keys and values */
	uint32_t activation;          /* enum k_activation's value: gelu_new, gelu, relu, silu */
	float layer_norm_epsilon, initializer_range;
	float embd_pdrop, attn_pdrop, resid_pdrop;
	bool tie_word_embeddings, scale_attn_weights, scale_attn_by_inverse_layer_idx;
	/* the Llama family; GPT-2 has every bias and none of the rest */
	bool attention_bias;     /* of the q, k and v projections */
	bool attention_out_bias; /* of the o projection */
	bool mlp_bias;
	bool qk_norm; /* RMSNorm of every head's q and k before they are turned */
	struct rope_config rope;
	uint32_t sliding_window;                  /* keys a query of a windowed layer sees, itself included; 0: all */
	uint64_t windowed[MODEL_LAYERS_MAX / 64]; /* layers with the window, a bit each: model_layer_window */
	char *json; /* the whole config.json as it will be written beside the result; malloced */
};

static inline bool model_is_llama(const struct model_config *m)
{
	return m->family != FAMILY_GPT2;
}

/* The attention window of a layer, as k_attention takes it; 0: none. */
static inline uint32_t model_layer_window(const struct model_config *m, uint32_t layer)
{
	return m->windowed[layer / 64] >> layer % 64 & 1 ? m->sliding_window : 0;
}

/*
 * text: the JSON of a config.json; name: how messages call it (a path, or
 * "ds.json: shardmesh.model"). model_type (default gpt2) names the family.
 * Unknown keys that cannot change the arithmetic are kept; keys and values we do
 * not implement are refused by name. -EINVAL.
 */
int model_config_parse(const char *text, const char *name, struct model_config *out, struct err *e);
void model_config_release(struct model_config *m);

/*
 * Cosine and sine of every position's angles, for k_rotary: [positions][rot / 2]
 * each, yarn's attention_factor applied. The formulas and the fp32 roundings are
 * those of transformers' modeling_rope_utils.py (rope.c writes them out); powers
 * and angles by det_*, so the bits are the same everywhere. positions: at most
 * 2^24; "dynamic" takes it as the sequence's length, as transformers does.
 */
void model_rope_tables(const struct model_config *m, uint32_t positions, float *cosine, float *sine);

/* --------------------------------------------------------- job (DeepSpeed JSON) */

enum optimizer_type { OPTIMIZER_ADAM, OPTIMIZER_ADAMW };
struct optimizer_config {
	enum optimizer_type type;
	double lr, beta1, beta2, eps, weight_decay;
	bool bias_correction;
	bool decoupled; /* AdamW's decay: type AdamW, or Adam with adam_w_mode (the default) */
};

enum scheduler_type { SCHEDULER_NONE, SCHEDULER_WARMUP, SCHEDULER_WARMUP_DECAY, SCHEDULER_WARMUP_COSINE };
struct scheduler_config {
	enum scheduler_type type;
	double warmup_min_lr, warmup_max_lr, warmup_min_ratio, cos_min_ratio;
	uint64_t warmup_num_steps, total_num_steps; /* total 0: "auto", the job's steps */
	bool log_warmup;                            /* else linear */
};

/* zero_optimization.*, DeepSpeed's names and defaults, in elements unless the key says otherwise. */
struct zero_config {
	uint32_t stage;
	uint64_t stage3_prefetch_bucket_size, stage3_max_live_parameters, stage3_max_reuse_distance;
	uint64_t stage3_param_persistence_threshold, stage3_model_persistence_threshold;
	uint64_t sub_group_size, reduce_bucket_size;
	bool overlap_comm, contiguous_gradients, stage3_gather_16bit_weights_on_model_save;
};

enum data_format { DATA_BYTES, DATA_LLMC, DATA_NANOGPT, DATA_JSONL, DATA_TEXT };
enum activations_mode { ACTIVATIONS_AUTO, ACTIVATIONS_KEEP, ACTIVATIONS_RECOMPUTE };

/* Files of one format, one behind the other. */
struct data_source {
	char **path; /* n_paths of them */
	uint32_t n_paths;
	enum data_format format;
	double weight; /* its share of the samples, against the others'; 0: not given, and then nobody's is */
};
#define DATA_SOURCES_MAX 256u

struct data_config {
	struct data_source *train; /* n_train of them */
	uint32_t n_train;
	struct data_source *validation; /* or none, and validation_fraction of train's tail */
	uint32_t n_validation;
	double validation_fraction;
	enum data_format format; /* of sources that do not name theirs */
	uint32_t sequence_length;
	char *tokenizer;    /* tokenizer.json for text and JSONL; NULL: JSONL's tokens are bytes */
	char *end_token;    /* the added token that closes a document; NULL: eos_token */
	uint32_t eos_token; /* of the model's config.json; TOKENIZER_NONE: it has none */
};
/* What a token of these data is: "tokenizer" where any is made by it, "bytes", "llmc", "nanogpt". */
const char *data_token_kind(const struct data_config *c);
/* Whether any source holds documents that must not see each other: data_first_keys. */
bool data_config_packed(const struct data_config *c);

/* An option of networks as rdma takes it: fab_options_set(name, value). */
struct rdma_setting {
	const char *name;
	char *value;
};
#define RDMA_SETTINGS_MAX 10

struct job_config {
	/* batch arithmetic as given; 0: not given */
	uint64_t train_batch_size, train_micro_batch_size_per_gpu, gradient_accumulation_steps;
	double gradient_clipping; /* 0: off */
	struct optimizer_config optimizer;
	struct scheduler_config scheduler;
	struct zero_config zero;
	uint64_t steps_per_print; /* 0: off */
	/* "shardmesh" */
	struct model_config model;
	char *weights; /* where the first parameters are read from (model_weights_open); NULL: they are random */
	struct data_config data;
	uint64_t steps, seed;
	uint64_t eval_interval; /* steps between evaluations; 0: only after the last step */
	uint32_t eval_batches;  /* micro-batches an evaluation; 0: none at all */
	uint32_t shards, workers, threads_per_worker, threads_per_shard; /* threads 0: automatic */
	bool host_sharing;     /* workers of a host fetch a unit over a network once, and push their common sum */
	uint32_t host_wait_ms; /* how long computing may stand still for a neighbour's gradients, a span */
	char *fabric;          /* "auto", "local", "local-copy", "verbs", "ofi" */
	struct rdma_setting rdma[RDMA_SETTINGS_MAX];
	uint32_t n_rdma;
	char *math; /* "" or k_profile_detect's `want` */
	char *run_dir;
	uint64_t state_hash_interval; /* 0: never */
	uint64_t activation_memory;   /* bytes a worker; 0: automatic */
	enum activations_mode activations;
	uint32_t max_owners_per_unit; /* F */
	uint32_t max_held_nodes;      /* K */
	uint64_t partial_sum_memory;  /* bytes a shard service may use beside the accumulators; 0: automatic */
	/* What the user should hear at the start: "key: no effect here: why", defaults taken. Not dumped. */
	char **note;
	uint32_t n_notes;
};

/*
 * Reads a DeepSpeed JSON: comments (//, #, block) and trailing commas accepted,
 * duplicates rejected. Every unknown key is an error that names file, line, key
 * and the nearest known one; a known key whose behaviour is not built, set to
 * anything but its no-effect value, is refused with the reason. Relative paths
 * inside are taken from base_dir. -EINVAL.
 */
int job_config_parse(const char *text, const char *name, const char *base_dir, struct job_config *out, struct err *e);
int job_config_load(const char *path, struct job_config *out, struct err *e);
/* What the command line lays over the file, before validation; NULL: not given. threads: of both roles. */
struct job_overrides {
	const uint64_t *shards, *workers, *threads, *steps, *seed;
	const char *run_dir, *fabric;
};
/* The same for one option of networks. -EINVAL: there is none of the name; -ENOMEM. */
int job_config_set_rdma(struct job_config *c, const char *name, const char *value);
int job_config_override(struct job_config *c, const struct job_overrides *o, struct err *e);
/* Everything that can be checked without touching data: counts, lengths, positions. */
int job_config_validate(const struct job_config *c, struct err *e);
/*
 * The resolved config as JSON text that job_config_parse reads back to the same
 * values (absolute paths, model inline): what members get. malloced.
 */
int job_config_dump(const struct job_config *c, char **json, struct err *e);
void job_config_release(struct job_config *c);

struct batch_plan {
	uint64_t train_batch_size; /* T: samples a step */
	uint32_t micro_batch;      /* m: samples a micro-batch */
	uint32_t n_micro;          /* M = T / m */
};
/* T, m, M for `workers` workers at first start; given T and m decide M whatever workers is. -EINVAL. */
int batch_resolve(const struct job_config *c, uint32_t workers, struct batch_plan *out, struct err *e);

/* Learning rate of step s (from 1), DeepSpeed's formulas (t = adam_t - 1), det_* routines. */
double schedule_lr(const struct job_config *c, uint64_t adam_t);

/* ------------------------------------------------------------- units and pages */

enum unit_kind { UNIT_EMBEDDING, UNIT_BLOCK, UNIT_HEAD };
enum tensor_init { INIT_ZERO, INIT_ONE, INIT_NORMAL };

struct tensor_info {
	char name[96]; /* HF name */
	uint32_t unit;
	uint32_t n_dims;
	uint64_t shape[4];
	uint64_t offset, n; /* elements, in the unit's flat vector; offset a multiple of 128 */
	enum tensor_init init;
	float init_std;
	uint64_t rng_stream; /* hash of the name: initialisation does not depend on the partition */
};

/*
 * A part is one use of a unit's tensors that has its own reduction tree; the
 * unit's gradient is the sum of its parts' roots in part order. Part 0 covers
 * the whole unit; a tied embedding has a part 1 for its use in the head: wte and
 * the zeros behind it up to the page's end. Parts are whole pages.
 */
struct unit_part {
	uint64_t begin, end; /* elements of the unit's flat vector */
};
#define UNIT_PARTS_MAX 2

struct unit_info {
	enum unit_kind kind;
	uint32_t layer; /* of a block */
	uint32_t first_tensor, n_tensors;
	uint64_t n_used; /* elements up to the end of the last tensor */
	uint64_t n;      /* padded to whole pages with zeros */
	uint32_t n_pages, n_runs;
	uint32_t n_parts;
	struct unit_part part[UNIT_PARTS_MAX];
};

#define RUNS_PER_UNIT_MAX 64
struct unit_table {
	uint32_t n_units, n_tensors;
	struct unit_info *unit;
	struct tensor_info *tensor; /* in unit order */
	uint64_t page;              /* elements a page */
	uint64_t n_parameters;      /* real ones, tied counted once */
	uint64_t n_elements;        /* padded */
	uint64_t largest_unit;      /* padded elements */
};

/* Page size rule: design "Words". Deterministic in the model alone. -ENOMEM, -EINVAL. */
int unit_table_init(struct unit_table *t, const struct model_config *m, struct err *e);
void unit_table_release(struct unit_table *t);
/* First element of run r of a unit, r <= n_runs: run r is [run_begin(r), run_begin(r+1)). */
uint64_t unit_run_begin(const struct unit_table *t, uint32_t unit, uint32_t r);
const struct tensor_info *unit_table_find(const struct unit_table *t, const char *name);

/* -------------------------------------------------------------------- page map */

/*
 * Run -> owner. A function of the list of shard members: each unit's runs are
 * spread evenly (difference at most 1) over at most F owners, and owners' totals
 * are even too; page_map_add / page_map_remove move about 1/N of the pages and
 * no more. Owners are member ids.
 */
struct page_map {
	uint32_t n_members, n_units;
	uint32_t max_owners;
	uint32_t *member; /* [n_members] ids, ascending */
	uint32_t *owner;  /* [n_units][RUNS_PER_UNIT_MAX] member ids */
};

int page_map_init(struct page_map *p, const struct unit_table *t, const uint32_t *members, uint32_t n,
		  uint32_t max_owners);
int page_map_add(struct page_map *p, const struct unit_table *t, uint32_t member);
int page_map_remove(struct page_map *p, const struct unit_table *t, uint32_t member);
void page_map_release(struct page_map *p);
static inline uint32_t page_map_owner(const struct page_map *p, uint32_t unit, uint32_t run)
{
	return p->owner[unit * RUNS_PER_UNIT_MAX + run];
}

/*
 * A member's share of a unit: its runs compact and in global order. Adjacent
 * runs are joined into one segment.
 */
struct share_seg {
	uint64_t unit_offset;  /* elements, in the unit's flat vector */
	uint64_t share_offset; /* elements, in the share */
	uint64_t n;
};
struct share {
	uint32_t n_seg;
	uint64_t n; /* elements in all */
	struct share_seg seg[RUNS_PER_UNIT_MAX];
};
void page_map_share(const struct page_map *p, const struct unit_table *t, uint32_t member, uint32_t unit,
		    struct share *out);
/*
 * A shard service's parameter region: PARAM_HEADER bytes with the progress word
 * at offset 0, then its shares in unit order, back to back. Byte offset of a
 * unit's share; unit == n_units gives the region's size.
 */
#define PARAM_HEADER 4096u
uint64_t page_map_share_bytes(const struct page_map *p, const struct unit_table *t, uint32_t member, uint32_t unit);

/* ----------------------------------------------------------------- memory plan */

/* All memory is planned before the first step; a program prints its plan and keeps to it. */
#define PLAN_LINES_MAX 24
struct plan_line {
	char name[32];
	uint64_t bytes;
	char note[96];
};
struct mem_plan {
	uint32_t n_lines;
	struct plan_line line[PLAN_LINES_MAX];
	uint64_t total;
};
void mem_plan_add(struct mem_plan *p, const char *name, uint64_t bytes, const char *note_fmt, ...) PRINTF_LIKE(4, 5);
/* More for a line, or a line. */
void mem_plan_grow(struct mem_plan *p, const char *name, uint64_t bytes);
void mem_plan_print(FILE *f, const char *who, const struct mem_plan *p);
/* A line each, with the bytes, and the total; the same lines as in print. */
void mem_plan_log(struct log *log, const struct mem_plan *p);
/* At the end: what was planned, the private memory of this process, and the shared memory that is its own. */
void mem_plan_log_used(struct log *log, const struct mem_plan *p, uint64_t own_shared);

/*
 * Activation buffers of a span, in floats per micro-batch, each buffer rounded
 * up to a cache line; C channels, H heads and K heads of keys of D elements, F
 * inner width, V vocabulary, a row a token:
 *   boundary  C: the residual stream into each block and into the head; kept
 *             n_layer + 1 times whatever the mode
 *   inner     GPT-2: ln_1 out C, mean, rstd, qkv 3C, attention out C, lse H,
 *             residual between C, ln_2 out C, mean, rstd, fc before and after
 *             its activation 2F. Llama: norm 1 out C, rstd, q HD, k KD (turned
 *             in place; with qk_norm they are copies, beside the projections HD,
 *             KD and their rstd H, K), v KD, attention out HD, lse H, residual
 *             between C, norm 2 out C, rstd, gate F, up F, their product F. Kept
 *             for every block, or once for the block that is recomputed
 *   scratch   once. GPT-2: the branch C, the residual's gradient C, one more C,
 *             and one of max(3C, F). Llama: C, C, max(C, HD), and one buffer
 *             that is either F or three, HD and KD and KD
 *   head      final norm out C, rstd, GPT-2's mean: once
 *   tables    Llama: cosine and sine, sequence_length * D / 2 each: once for the
 *             worker, not for each micro-batch
 */
struct activation_sizes {
	uint64_t boundary, inner, scratch, head, tables;
};
void activation_sizes_get(const struct model_config *m, uint32_t micro_batch, uint32_t sequence_length,
			  struct activation_sizes *out);

/*
 * How the logits of a span are made. A micro-batch of more than
 * HEAD_LOGITS_BYTES of them is cut into pieces of its rows, of HEAD_ROWS_MIN or
 * more, since few rows make slow products; a function of model and micro-batch
 * alone, for it changes bits. Without that need the whole span's logits are made
 * at once where they take no more room than one micro-batch's with the partial
 * sums of the matrix's gradient, which the other way needs; that changes no bit.
 */
#define HEAD_LOGITS_BYTES (UINT64_C(256) << 20)
#define HEAD_ROWS_MIN 256u
#define HEAD_SUMS_MAX 32
struct head_plan {
	uint32_t pieces; /* 0: a span's at once; n: a micro-batch in n pieces, one at a time */
	uint64_t logits; /* floats at once */
	uint64_t sums;   /* floats of partial sums */
};
void head_plan_get(const struct model_config *m, uint32_t rows, uint32_t span, struct head_plan *out);
/* Piece i of a micro-batch is rows [begin(i), begin(i + 1)); cut at multiples of 16, nearly equal. */
uint32_t head_piece_begin(uint32_t rows, uint32_t pieces, uint32_t i);
/* Of the longest piece. */
uint32_t head_piece_rows(uint32_t rows, uint32_t pieces);
/* Partial sums beside the gradient itself that a tree of `span` leaves needs. */
static inline uint32_t head_sums(uint32_t span)
{
	return 31 - (uint32_t)__builtin_clz(span);
}

struct worker_plan {
	uint32_t max_span; /* micro-batches of a lease this worker can hold: a power of two, at most M */
	bool keep_activations;
	struct head_plan head;
	uint64_t window_elements; /* live window where units are copied (0 where they are mapped) */
	uint32_t n_gradient_buffers;
	uint64_t gradient_elements; /* of one buffer: the largest unit */
	uint64_t workspace_bytes;
	struct mem_plan mem;
};
/* What a worker's plan depends on beside the job. */
struct worker_place {
	uint64_t memory;  /* of the host, or of the control group */
	uint32_t workers; /* that share it */
	bool mapped;      /* units are read in place */
	uint64_t beside;  /* bytes that are taken already, or that the caller will add to the plan */
	/* The kernels' workspace for spans of n_mb: a callback, since model does not know kernels. */
	uint64_t (*workspace)(void *ctx, uint32_t n_mb);
	void *ctx;
};
/* -ENOMEM with the numbers when not even a span of one micro-batch fits. */
int worker_plan_make(const struct job_config *c, const struct unit_table *t, const struct batch_plan *b,
		     const struct worker_place *place, struct worker_plan *out, struct err *e);

struct shard_plan {
	uint64_t n_elements;     /* owned */
	uint64_t pool_elements;  /* partial sums in memory, beside one accumulator a page */
	uint32_t sums_each;      /* the pool has this many of each (unit, part): all that can be; 0: it has not */
	uint64_t spill_elements; /* partial sums that may go to the spill file */
	uint64_t inbox_elements; /* one worker's inbox: the largest share of a unit; 0 where mapped */
	struct mem_plan mem;
};
int shard_plan_make(const struct job_config *c, const struct unit_table *t, const struct page_map *map, uint32_t member,
		    uint32_t n_micro, uint32_t n_workers, bool mapped, struct shard_plan *out, struct err *e);

/* ------------------------------------------------------------------- tokenizer */

/*
 * A tokenizer.json of Hugging Face's tokenizers whose model is byte-level BPE, as
 * GPT-2, Llama 3, Qwen and SmolLM have it: the ids are those that tokenizers
 * gives. What is not supported is refused by name. One thread at a time: it
 * keeps scratch memory and the words it saw last.
 */
struct tokenizer;
#define TOKENIZER_NONE UINT32_MAX
#define TOKENIZER_BYTES_MAX 200000000u /* of a tokenizer.json */

/* Ids, in memory that grows. */
struct token_list {
	uint32_t *id;
	size_t n, room;
};
void token_list_release(struct token_list *l);

/* path: the file, or its directory. -EINVAL names the file and what is wrong with it or not supported; -errno. */
int tokenizer_open(const char *path, struct tokenizer **out, struct err *e);
/* Of a text in memory; name: how messages call it. */
int tokenizer_parse(const char *text, size_t bytes, const char *name, struct tokenizer **out, struct err *e);
void tokenizer_free(struct tokenizer *t);
/* The file that tokenizer_open reads; malloced. */
int tokenizer_path(const char *path, char **out, struct err *e);
/* The largest id and one. */
uint32_t tokenizer_size(const struct tokenizer *t);
/* The id of an added token by its text, or TOKENIZER_NONE. */
uint32_t tokenizer_find(const struct tokenizer *t, const char *content);
/*
 * A text's ids, behind those in out, without what the template puts around it;
 * added tokens that stand in the text are taken as such. -EINVAL: not UTF-8, or
 * a pattern that takes too long on it; out then holds a part.
 */
int tokenizer_encode(struct tokenizer *t, const void *text, size_t bytes, struct token_list *out, struct err *e);
/* The bytes that an id stands for, n of them; none and NULL for an id that nothing has. A character may be cut. */
const uint8_t *tokenizer_bytes(const struct tokenizer *t, uint32_t id, size_t *n);
/* What the template (post_processor) puts before and behind a text: special tokens, n of them. */
const uint32_t *tokenizer_prefix(const struct tokenizer *t, size_t *n);
const uint32_t *tokenizer_suffix(const struct tokenizer *t, size_t *n);

/* ------------------------------------------------------------------------ data */

/*
 * Data, memory-mapped, opened once by each worker. A sample is sequence_length
 * tokens and the one behind each: windows tile a stream of tokens; documents of
 * JSONL files are packed into windows, where they do not see each other. Which
 * sample stands where is a pure function of (seed, step, micro-batch): a
 * permutation of all windows an epoch, or, where sources have weights, each
 * source's share of every 65,536 samples and a permutation of its own windows.
 *
 * A JSONL line is {"text"}, or {"prompt", "completion"} with the loss on the
 * completion alone; other keys are passed over. A document's tokens are the
 * UTF-8 bytes and an end token: 256 where the vocabulary has it, else a newline.
 * With a tokenizer they are its ids, prompt and completion by themselves, with
 * its template around them, closed by the template's or by end_token; a file of
 * format text is one stream of its ids, as it stands. Those are kept in memory.
 */
struct data_set;
enum data_split { DATA_TRAIN, DATA_VALIDATION };

/*
 * vocab: ids at or beyond it are an error that names the file and the position,
 * as a malformed line does with its number. c must stay until the close.
 */
int data_open(const struct data_config *c, uint64_t seed, uint32_t vocab, struct data_set **out, struct err *e);
void data_close(struct data_set *d);
uint64_t data_tokens(const struct data_set *d, enum data_split split);
uint64_t data_windows(const struct data_set *d, enum data_split split);
/* XXH3-64 over sizes and a sample of the contents: members that see other files differ in it. */
uint64_t data_fingerprint(const struct data_set *d);
/* Bytes of memory that ids and the index of documents take, beside the mapped files. */
uint64_t data_memory(const struct data_set *d);
bool data_packed(const struct data_set *d);
/*
 * Micro-batch `index` of step `step` (training), or micro-batch `index` of the
 * n_micro of the fixed evaluation set, whose windows stand at even distances
 * (step is ignored). tokens, targets: [micro_batch][sequence_length]; where
 * there is nothing to learn (prompts, what a window has left over) the target is
 * DATA_NO_TARGET, which is the kernels' K_IGNORE_TARGET.
 */
#define DATA_NO_TARGET UINT32_MAX
void data_micro_batch(const struct data_set *d, enum data_split split, uint64_t step, uint32_t n_micro, uint32_t index,
		      uint32_t micro_batch, uint32_t *tokens, uint32_t *targets);
/*
 * Of the same micro-batch, for each position the first position of its document:
 * k_attention's first_key. [micro_batch][sequence_length]; all 0 in a stream.
 */
void data_first_keys(const struct data_set *d, enum data_split split, uint64_t step, uint32_t n_micro, uint32_t index,
		     uint32_t micro_batch, uint32_t *first_key);

/* ----------------------------------------------------------------- safetensors */

enum st_dtype { ST_F32, ST_F16, ST_BF16, ST_OTHER }; /* ST_OTHER: a legal type that st_read_f32 refuses */
struct st_tensor {
	char *name;
	enum st_dtype dtype;
	uint32_t n_dims;
	uint64_t shape[8];
	uint64_t begin, end; /* bytes, from the start of the data section */
};
struct st_file {
	int fd;
	char *path;
	uint64_t data_offset; /* of the data section in the file */
	uint32_t n_tensors;
	struct st_tensor *tensor; /* by begin */
};
/* Opens and checks everything the format forbids before anything is allocated by its word. -EINVAL names file and cause. */
int st_open(const char *path, struct st_file *out, struct err *e);
void st_close(struct st_file *f);
const struct st_tensor *st_find(const struct st_file *f, const char *name);
/* Reads elements [first, first+n) as fp32, converting F16 and BF16. */
int st_read_f32(const struct st_file *f, const struct st_tensor *t, uint64_t first, uint64_t n, float *out,
		struct err *e);

/*
 * The header of a model.safetensors for all tensors of a table, in F32, with
 * {"format":"pt"}, tensors by name as the reference writer orders them:
 * *header (malloced) is the 8-byte length and the padded JSON; order[i] is the
 * table's index of the i-th tensor in the data section, which follows densely.
 */
int st_header_for(const struct unit_table *t, char **header, size_t *bytes, uint32_t *order, struct err *e);

/* --------------------------------------------------------------------- weights */

/*
 * The weights of a model in safetensors files, for the tensors of a unit table.
 * path: a Hugging Face directory (model.safetensors, else
 * model.safetensors.index.json and the shards it names), or one of these files.
 * F32, F16 and BF16; names with or without the prefix of the table's; buffers
 * of old checkpoints (h.N.attn.bias, ...rotary_emb.inv_freq) and the second name
 * of a tied matrix are passed over. Anything else that is unexpected, missing,
 * there twice or of another shape is an error that names file and tensor, as is
 * an index that points outside its directory. Headers alone are read. -EINVAL,
 * -errno of a file. t must stay until the close.
 */
struct model_weights;
int model_weights_open(const char *path, const struct unit_table *t, struct model_weights **out, struct err *e);
void model_weights_close(struct model_weights *w);
/* Something a user should hear (an index whose total_size is wrong), or NULL. */
const char *model_weights_warning(const struct model_weights *w);
/* Elements [first, first + n) of the table's tensor, as fp32. Any thread. */
int model_weights_read(const struct model_weights *w, uint32_t tensor, uint64_t first, uint64_t n, float *out,
		       struct err *e);
/* The file that model_weights_open would begin with; malloced. -ENOENT: none in the directory; -EINVAL: pickled ones. */
int model_weights_find(const char *path, char **file, struct err *e);

#endif
