/* SPDX-License-Identifier: Apache-2.0 */
#include "worker/model_run.h"
#include "worker/schedule.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct run {
	const struct model_run *r;
	struct net net;
	struct arena arena;
	void *workspace;
};

static int border(void *ctx)
{
	(void)ctx;
	return 0;
}

static int units(void *ctx, uint32_t use, const struct use *u, const float *params[2])
{
	struct run *run = ctx;

	(void)use;
	for (uint32_t i = 0; i < u->n; i++)
		params[i] = run->r->unit[u->unit[i]];
	return 0;
}

static void used(void *ctx, uint32_t use)
{
	(void)ctx;
	(void)use;
}

static int gradient(void *ctx, uint32_t unit, uint32_t part, float **buffer)
{
	struct run *run = ctx;

	*buffer = run->r->gradient[unit][part];
	return 0;
}

static int final(void *ctx, uint32_t unit, uint32_t part, float *buffer)
{
	struct run *run = ctx;

	assert(buffer == run->r->gradient[unit][part]);
	return 0;
}

static int open_stream(struct run *run, struct err *e)
{
	const struct model_run *r = run->r;
	struct k_stream_config cfg = { .profile = r->profile, .threads = r->threads };
	struct k_dims dims;

	net_dims(r->model, r->batch, r->seq, r->n_mb, &dims);
	cfg.workspace_bytes = round_up_u64(r->ops->workspace_bytes(&dims, r->threads), CACHE_LINE);
	run->workspace = aligned_alloc(CACHE_LINE, cfg.workspace_bytes);
	if (!run->workspace)
		return err_set(e, -ENOMEM, "no memory for %zu bytes of workspace", cfg.workspace_bytes);
	cfg.workspace = run->workspace;
	return r->ops->stream_open(&cfg, &run->net.stream, e);
}

static int open_run(struct run *run, struct err *e)
{
	const struct model_run *r = run->r;
	struct net_config cfg = {
		.model = r->model,
		.table = r->table,
		.k = r->ops,
		.batch = r->batch,
		.seq = r->seq,
		.max_span = r->n_mb,
		.keep = r->keep,
		.packed = r->first_key,
		.head_pieces = r->head_pieces,
		.seed = r->seed,
	};
	int rc = net_init(&run->net, &cfg, e);

	if (rc)
		return rc;
	rc = arena_init(&run->arena, "activations", net_activation_bytes(&cfg));
	if (rc)
		return err_set(e, rc, "no memory for the activations");
	rc = net_activations(&run->net, &run->arena);
	assert(rc == 0);
	return open_stream(run, e);
}

static void close_run(struct run *run)
{
	if (run->net.stream)
		run->r->ops->stream_close(run->net.stream);
	free(run->workspace);
	arena_release(&run->arena);
	net_release(&run->net);
}

static int compute(struct run *run, double *loss, struct err *e)
{
	const struct model_run *r = run->r;
	struct span span = { .step = r->step, .first = r->first, .n_mb = r->n_mb, .training = r->training };
	struct span_hooks hooks = { border, units, used, gradient, final, run };
	size_t n = (size_t)r->n_mb * r->batch * r->seq;
	struct use *uses = calloc(net_uses_max(r->model), sizeof(*uses));
	int rc;

	if (!uses)
		return err_set(e, -ENOMEM, "out of memory");
	memcpy(run->net.act.tokens, r->tokens, n * sizeof(uint32_t));
	memcpy(run->net.act.targets, r->targets, n * sizeof(uint32_t));
	if (r->first_key)
		memcpy(run->net.act.first_key, r->first_key, n * sizeof(uint32_t));
	rc = span_run(&run->net, &span, uses, net_uses(&run->net, r->training, uses), &hooks, loss);
	if (rc)
		rc = err_set(e, rc, "the computation failed: %s", strerror(-rc));
	if (!rc && r->losses)
		memcpy(r->losses, run->net.act.loss, r->n_mb * sizeof(double));
	if (!rc && r->logits)
		memcpy(r->logits, run->net.act.logits, n * r->model->vocab_size * sizeof(float));
	free(uses);
	return rc;
}

int model_run(const struct model_run *r, double *loss, struct err *e)
{
	struct run run = { .r = r };
	int rc;

	assert(!r->training || (r->gradient && !r->logits));
	assert(!r->logits || r->head_pieces == 0);
	rc = open_run(&run, e);
	if (!rc)
		rc = compute(&run, loss, e);
	close_run(&run);
	return rc;
}
