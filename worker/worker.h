/* SPDX-License-Identifier: Apache-2.0 */
/*
 * worker: what other programs may use of it: text generation from a finished
 * model, and its memory plan, so that a job can be refused before anything is
 * started. The rest of the folder is the program `worker`.
 */
#ifndef SHARDMESH_WORKER_H
#define SHARDMESH_WORKER_H

#include "base/base.h"
#include "model/model.h"

struct generator; /* a loaded model with its context; one thread drives it */

struct generator_config {
	const char *model_dir; /* Hugging Face directory: config.json and safetensors, in one file or several */
	const char *math;      /* k_profile_detect's `want`; NULL for the table's choice */
	unsigned threads;      /* 0: as many as there are cores */
	double temperature;    /* 0: always the likeliest token */
	uint32_t top_k;        /* only the k likeliest tokens; 0: all */
	uint64_t seed;
};

/*
 * Loads the whole model into memory, beside a cache of keys and values for its
 * positions, the first 8,192 of them at most. -EINVAL: e names the file and what is wrong with it;
 * -ENOMEM; -ENOTSUP for the math profile.
 */
int generator_open(const struct generator_config *cfg, struct generator **out, struct err *e);
void generator_free(struct generator *g); /* NULL allowed */
const struct model_config *generator_model(const struct generator *g);
/*
 * Appends n >= 1 tokens to the context. A context that outgrows the cache
 * loses its older half. -EINVAL: a token is not in the vocabulary.
 */
int generator_feed(struct generator *g, const uint32_t *tokens, size_t n, struct err *e);
/* Logits of the token that follows the context [vocab_size]; NULL before the first feed. Valid until the next feed. */
const float *generator_logits(const struct generator *g);
/*
 * Draws the next token and appends it to the context. The i-th token drawn
 * depends on the model, the tokens fed, seed and i alone. -EINVAL before the
 * first feed.
 */
int generator_next(struct generator *g, uint32_t *token, struct err *e);

/* ------------------------------------------------------------------ memory */

/* What a worker's plan depends on beside the job. */
struct worker_memory {
	uint32_t n_shards, host_workers; /* of the job; workers that share this host */
	unsigned threads;
	bool mapped;          /* units are read and gradients folded in place */
	uint64_t connections; /* fab_ops.connection_bytes, of all of them */
	uint64_t index_bytes; /* data_memory: taken already, since only the data tell how much it is */
};
/* Threads of a worker that nobody gave a number, beside `host_members` on one host. */
unsigned worker_threads(const struct job_config *c, uint32_t host_members);
/*
 * All that the program will take on this host: worker_plan_make's lines and its
 * own. The program plans with this function and keeps to it. Errors as
 * worker_plan_make.
 */
int worker_memory_plan(const struct job_config *c, const struct unit_table *t, const struct batch_plan *b,
		       const struct worker_memory *m, struct worker_plan *out, struct err *e);

#endif
