/* SPDX-License-Identifier: Apache-2.0 */
#include "tests/bench/bare_loop.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "mesh/commit.h"

/* ----------------------------------------------------------------------- open */

static double learning_rate(void *ctx, uint64_t adam_t)
{
	return schedule_lr(ctx, adam_t);
}

static int read_job(struct bare *b, const char *path, struct err *e)
{
	const struct job_config *c = &b->config;
	int rc = job_config_load(path, &b->config, e);

	if (!rc)
		rc = job_config_validate(c, e);
	if (!rc)
		rc = batch_resolve(c, 1, &b->batch, e);
	if (!rc)
		rc = unit_table_init(&b->table, &c->model, e);
	if (!rc)
		rc = data_open(&c->data, c->seed, c->model.vocab_size, &b->data, e);
	b->commit = (struct coord_config){
		.n_micro = b->batch.n_micro,
		.gradient_clipping = c->gradient_clipping,
		.beta1 = c->optimizer.beta1,
		.beta2 = c->optimizer.beta2,
		.bias_correction = c->optimizer.bias_correction,
		.lr = learning_rate,
		.ctx = &b->config,
	};
	return rc;
}

static void fill(const struct bare *b, uint32_t unit)
{
	const struct unit_info *u = &b->table.unit[unit];

	for (uint32_t i = u->first_tensor; i < u->first_tensor + u->n_tensors; i++) {
		const struct tensor_info *t = &b->table.tensor[i];
		float *p = b->unit[unit].p + t->offset;

		if (t->init == INIT_NORMAL)
			rng_fill_normal(p, t->n, b->config.seed, t->rng_stream, 0, 0.0f, t->init_std);
		for (uint64_t k = 0; t->init == INIT_ONE && k < t->n; k++)
			p[k] = 1.0f;
	}
}

static float *take(struct bare *b, uint64_t n)
{
	float *f = arena_alloc(&b->state, n * sizeof(*f), CACHE_LINE);

	assert(f);
	memset(f, 0, n * sizeof(*f));
	return f;
}

static int open_state(struct bare *b, struct err *e)
{
	uint64_t n = 0;

	for (uint32_t u = 0; u < b->table.n_units; u++)
		n += b->table.unit[u].n * (3 + b->table.unit[u].n_parts);
	b->unit = calloc(b->table.n_units, sizeof(*b->unit));
	if (!b->unit || arena_init(&b->state, "state", n * sizeof(float)))
		return err_set(e, -ENOMEM, "no memory for the state");
	for (uint32_t u = 0; u < b->table.n_units; u++) {
		const struct unit_info *info = &b->table.unit[u];

		b->unit[u].p = take(b, info->n);
		b->unit[u].m = take(b, info->n);
		b->unit[u].v = take(b, info->n);
		for (uint32_t part = 0; part < info->n_parts; part++)
			b->unit[u].gradient[part] = take(b, info->n);
		fill(b, u);
	}
	return 0;
}

static int open_net(struct bare *b, unsigned threads, struct err *e)
{
	const struct job_config *c = &b->config;
	struct net_config net = {
		.model = &c->model,
		.table = &b->table,
		.k = b->ops,
		.batch = b->batch.micro_batch,
		.seq = c->data.sequence_length,
		.max_span = b->batch.n_micro,
		.keep = true,
		.seed = c->seed,
	};
	struct k_stream_config stream = { .profile = &b->profile, .threads = threads };
	struct head_plan head;
	struct k_dims dims;
	int rc;

	/* As a worker would: where logits are cut changes bits. */
	head_plan_get(&c->model, net.batch * net.seq, net.max_span, &head);
	net.head_pieces = head.pieces;
	rc = net_init(&b->net, &net, e);
	if (rc)
		return rc;
	net_dims(&c->model, net.batch, net.seq, net.max_span, &dims);
	stream.workspace_bytes = round_up_u64(b->ops->workspace_bytes(&dims, threads), CACHE_LINE);
	b->uses = calloc(net_uses_max(&c->model), sizeof(*b->uses));
	if (!b->uses || arena_init(&b->activations, "activations", net_activation_bytes(&net)) ||
	    arena_init(&b->workspace, "workspace", stream.workspace_bytes))
		return err_set(e, -ENOMEM, "no memory for the activations");
	memset(b->activations.base, 0, b->activations.size);
	memset(b->workspace.base, 0, b->workspace.size);
	rc = net_activations(&b->net, &b->activations);
	assert(!rc);
	b->n_uses = net_uses(&b->net, true, b->uses);
	stream.workspace = b->workspace.base;
	return b->ops->stream_open(&stream, &b->net.stream, e);
}

int bare_open(struct bare *b, const char *config, unsigned threads, const struct k_ops *ops, struct err *e)
{
	int rc;

	*b = (struct bare){ .ops = ops };
	rc = read_job(b, config, e);
	if (!rc)
		rc = k_profile_detect(b->config.math, &b->profile, NULL, e);
	if (!rc)
		rc = open_state(b, e);
	return rc ? rc : open_net(b, threads, e);
}

void bare_close(struct bare *b)
{
	if (b->net.stream)
		b->ops->stream_close(b->net.stream);
	if (b->net.cfg.model)
		net_release(&b->net);
	arena_release(&b->activations);
	arena_release(&b->workspace);
	arena_release(&b->state);
	free(b->uses);
	free(b->unit);
	data_close(b->data);
	unit_table_release(&b->table);
	job_config_release(&b->config);
}

/* ----------------------------------------------------------------------- step */

static void wait_for(struct bare *b)
{
	struct k_event done;

	b->ops->event_record(b->net.stream, &done);
	b->ops->event_wait(b->net.stream, &done);
}

/* The unit's gradient where part 0 has it: part 1 is added in place, and the squares are summed on the way. */
static void fold(struct bare *b, uint32_t unit, struct exact_sum *all)
{
	const struct unit_info *info = &b->table.unit[unit];
	float *g = b->unit[unit].gradient[0], *other = b->unit[unit].gradient[1];
	uint64_t begin = 0, end = 0;
	struct k_fold_seg seg[3];
	struct exact_sum sum;
	struct k_fold f = { .seg = seg, .square_sum = &sum };

	if (info->n_parts > 1) {
		begin = info->part[1].begin / b->table.page * b->table.page;
		end = round_up_u64(info->part[1].end, b->table.page);
	}
	if (begin)
		seg[f.n_seg++] = (struct k_fold_seg){ .dst = g, .a = g, .n = begin };
	if (end > begin)
		seg[f.n_seg++] =
			(struct k_fold_seg){ .dst = g + begin, .a = g + begin, .b = other + begin, .n = end - begin };
	if (info->n > end)
		seg[f.n_seg++] = (struct k_fold_seg){ .dst = g + end, .a = g + end, .n = info->n - end };
	exact_sum_clear(&sum);
	b->ops->fold(b->net.stream, &f);
	wait_for(b);
	exact_sum_merge(all, &sum);
}

static int border(void *ctx)
{
	(void)ctx;
	return 0;
}

static int units(void *ctx, uint32_t use, const struct use *u, const float *params[2])
{
	const struct bare *b = ctx;

	(void)use;
	for (uint32_t i = 0; i < u->n; i++)
		params[i] = b->unit[u->unit[i]].p;
	return 0;
}

static void used(void *ctx, uint32_t use)
{
	(void)ctx;
	(void)use;
}

static int gradient(void *ctx, uint32_t unit, uint32_t part, float **buffer)
{
	const struct bare *b = ctx;

	*buffer = b->unit[unit].gradient[part];
	return 0;
}

/* Part 0 comes last. The unit's gradient is read again while it may still be in a cache. */
static int final(void *ctx, uint32_t unit, uint32_t part, float *buffer)
{
	struct bare *b = ctx;

	(void)buffer;
	if (part == 0)
		fold(b, unit, &b->squares);
	return 0;
}

static void load_data(struct bare *b, uint64_t step)
{
	size_t n = (size_t)b->batch.micro_batch * b->config.data.sequence_length;

	for (uint32_t i = 0; i < b->batch.n_micro; i++)
		data_micro_batch(b->data, DATA_TRAIN, step, b->batch.n_micro, i, b->batch.micro_batch,
				 b->net.act.tokens + i * n, b->net.act.targets + i * n);
}

static void adam(struct bare *b, uint32_t unit, const struct msg_step *m)
{
	const struct optimizer_config *o = &b->config.optimizer;
	const struct bare_unit *u = &b->unit[unit];
	struct k_adam a = {
		.p = u->p,
		.m = u->m,
		.v = u->v,
		.grad = u->gradient[0],
		.n = b->table.unit[unit].n,
		.grad_scale = m->grad_scale,
		.lr = m->lr,
		.beta1 = o->beta1,
		.beta2 = o->beta2,
		.eps = o->eps,
		.weight_decay = o->weight_decay,
		.bias1 = m->bias1,
		.bias2 = m->bias2,
		.decoupled = o->decoupled,
	};

	b->ops->adam(b->net.stream, &a);
	wait_for(b);
}

int bare_step(struct bare *b, uint64_t step, struct msg_step *done, struct err *e)
{
	const struct span_hooks hooks = { border, units, used, gradient, final, b };
	const struct span span = { .step = step, .n_mb = b->batch.n_micro, .training = true };
	double loss;
	int rc;

	exact_sum_clear(&b->squares);
	load_data(b, step);
	rc = span_run(&b->net, &span, b->uses, b->n_uses, &hooks, &loss);
	if (rc)
		return err_set(e, rc, "the computation failed: %s", strerror(-rc));
	rc = commit_decide(&b->commit, step, &b->squares, loss / b->batch.n_micro, &(struct trouble){ 0 }, done, e);
	for (uint32_t u = 0; u < b->table.n_units && !rc; u++)
		adam(b, u, done);
	return rc;
}
