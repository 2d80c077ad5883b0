/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The deferred backend: the CPU table behind a queue. A call is copied and
 * nothing runs until an event behind it is waited for or asked for, which shows
 * callers that count on a call to have finished when it returns, or that reuse
 * memory or an argument struct too early. The queue is bounded: a full one runs
 * its oldest calls, as a device would.
 */
#include <errno.h>
#include <stdlib.h>

#include "kernels/cpu/cpu.h"

#define QUEUE_CALLS 256u

struct copy_args {
	void *dst;
	const void *src; /* NULL: zero */
	size_t bytes;
};

enum call_kind {
	CALL_COPY,
	CALL_EMBED,
	CALL_EMBED_BACKWARD,
	CALL_NORM,
	CALL_NORM_BACKWARD,
	CALL_RESIDUAL,
	CALL_LINEAR,
	CALL_LINEAR_BACKWARD,
	CALL_ROTARY,
	CALL_ROTARY_BACKWARD,
	CALL_GLU,
	CALL_GLU_BACKWARD,
	CALL_ATTENTION,
	CALL_ATTENTION_BACKWARD,
	CALL_XENT,
	CALL_FOLD,
	CALL_ADAM,
	CALL_STATE_HASH,
};

struct call {
	enum call_kind kind;
	union {
		struct copy_args copy;
		struct k_embed embed;
		struct k_embed_backward embed_backward;
		struct k_norm norm;
		struct k_norm_backward norm_backward;
		struct k_residual residual;
		struct k_linear linear;
		struct k_linear_backward linear_backward;
		struct k_rotary rotary;
		struct k_rotary_backward rotary_backward;
		struct k_glu glu;
		struct k_glu_backward glu_backward;
		struct k_attention attention;
		struct k_attention_backward attention_backward;
		struct k_xent xent;
		struct k_fold fold;
		struct k_adam adam;
		struct k_state_hash state_hash;
	};
};

/* A deferred stream begins where a CPU stream would: callers only hold its address. */
struct deferred {
	struct k_stream *cpu;
	uint64_t queued, run; /* calls since the stream was opened; a ticket is a count of them */
	struct call calls[QUEUE_CALLS];
};

static struct deferred *deferred_of(struct k_stream *s)
{
	return (struct deferred *)(void *)s;
}

static void call_run(struct k_stream *s, const struct call *c)
{
	switch (c->kind) {
	case CALL_COPY:
		if (c->copy.src)
			cpu_copy(s, c->copy.dst, c->copy.src, c->copy.bytes);
		else
			cpu_zero(s, c->copy.dst, c->copy.bytes);
		break;
	case CALL_EMBED:
		cpu_embed(s, &c->embed);
		break;
	case CALL_EMBED_BACKWARD:
		cpu_embed_backward(s, &c->embed_backward);
		break;
	case CALL_NORM:
		cpu_norm(s, &c->norm);
		break;
	case CALL_NORM_BACKWARD:
		cpu_norm_backward(s, &c->norm_backward);
		break;
	case CALL_RESIDUAL:
		cpu_residual(s, &c->residual);
		break;
	case CALL_LINEAR:
		cpu_linear(s, &c->linear);
		break;
	case CALL_LINEAR_BACKWARD:
		cpu_linear_backward(s, &c->linear_backward);
		break;
	case CALL_ROTARY:
		cpu_rotary(s, &c->rotary);
		break;
	case CALL_ROTARY_BACKWARD:
		cpu_rotary_backward(s, &c->rotary_backward);
		break;
	case CALL_GLU:
		cpu_glu(s, &c->glu);
		break;
	case CALL_GLU_BACKWARD:
		cpu_glu_backward(s, &c->glu_backward);
		break;
	case CALL_ATTENTION:
		cpu_attention(s, &c->attention);
		break;
	case CALL_ATTENTION_BACKWARD:
		cpu_attention_backward(s, &c->attention_backward);
		break;
	case CALL_XENT:
		cpu_xent(s, &c->xent);
		break;
	case CALL_FOLD:
		cpu_fold(s, &c->fold);
		break;
	case CALL_ADAM:
		cpu_adam(s, &c->adam);
		break;
	case CALL_STATE_HASH:
		cpu_state_hash(s, &c->state_hash);
		break;
	}
}

static void run_until(struct deferred *d, uint64_t count)
{
	for (; d->run < count; d->run++)
		call_run(d->cpu, &d->calls[d->run % QUEUE_CALLS]);
}

static struct call *enqueue(struct k_stream *s, enum call_kind kind)
{
	struct deferred *d = deferred_of(s);

	if (d->queued - d->run == QUEUE_CALLS)
		run_until(d, d->run + 1);
	struct call *c = &d->calls[d->queued++ % QUEUE_CALLS];
	c->kind = kind;
	return c;
}

static void deferred_copy(struct k_stream *s, void *dst, const void *src, size_t bytes)
{
	enqueue(s, CALL_COPY)->copy = (struct copy_args){ .dst = dst, .src = src, .bytes = bytes };
}

static void deferred_zero(struct k_stream *s, void *dst, size_t bytes)
{
	enqueue(s, CALL_COPY)->copy = (struct copy_args){ .dst = dst, .bytes = bytes };
}

static void deferred_embed(struct k_stream *s, const struct k_embed *a)
{
	enqueue(s, CALL_EMBED)->embed = *a;
}

static void deferred_embed_backward(struct k_stream *s, const struct k_embed_backward *a)
{
	enqueue(s, CALL_EMBED_BACKWARD)->embed_backward = *a;
}

static void deferred_norm(struct k_stream *s, const struct k_norm *a)
{
	enqueue(s, CALL_NORM)->norm = *a;
}

static void deferred_norm_backward(struct k_stream *s, const struct k_norm_backward *a)
{
	enqueue(s, CALL_NORM_BACKWARD)->norm_backward = *a;
}

static void deferred_residual(struct k_stream *s, const struct k_residual *a)
{
	enqueue(s, CALL_RESIDUAL)->residual = *a;
}

static void deferred_linear(struct k_stream *s, const struct k_linear *a)
{
	enqueue(s, CALL_LINEAR)->linear = *a;
}

static void deferred_linear_backward(struct k_stream *s, const struct k_linear_backward *a)
{
	enqueue(s, CALL_LINEAR_BACKWARD)->linear_backward = *a;
}

static void deferred_rotary(struct k_stream *s, const struct k_rotary *a)
{
	enqueue(s, CALL_ROTARY)->rotary = *a;
}

static void deferred_rotary_backward(struct k_stream *s, const struct k_rotary_backward *a)
{
	enqueue(s, CALL_ROTARY_BACKWARD)->rotary_backward = *a;
}

static void deferred_glu(struct k_stream *s, const struct k_glu *a)
{
	enqueue(s, CALL_GLU)->glu = *a;
}

static void deferred_glu_backward(struct k_stream *s, const struct k_glu_backward *a)
{
	enqueue(s, CALL_GLU_BACKWARD)->glu_backward = *a;
}

static void deferred_attention(struct k_stream *s, const struct k_attention *a)
{
	enqueue(s, CALL_ATTENTION)->attention = *a;
}

static void deferred_attention_backward(struct k_stream *s, const struct k_attention_backward *a)
{
	enqueue(s, CALL_ATTENTION_BACKWARD)->attention_backward = *a;
}

static void deferred_xent(struct k_stream *s, const struct k_xent *a)
{
	enqueue(s, CALL_XENT)->xent = *a;
}

static void deferred_fold(struct k_stream *s, const struct k_fold *a)
{
	enqueue(s, CALL_FOLD)->fold = *a;
}

static void deferred_adam(struct k_stream *s, const struct k_adam *a)
{
	enqueue(s, CALL_ADAM)->adam = *a;
}

static void deferred_state_hash(struct k_stream *s, const struct k_state_hash *a)
{
	enqueue(s, CALL_STATE_HASH)->state_hash = *a;
}

static size_t deferred_workspace_bytes(const struct k_dims *dims, unsigned threads)
{
	return k_cpu_ops()->workspace_bytes(dims, threads);
}

static int deferred_stream_open(const struct k_stream_config *cfg, struct k_stream **out, struct err *e)
{
	struct deferred *d = malloc(sizeof(*d));

	if (!d)
		return err_set(e, -ENOMEM, "no memory for a compute stream");
	d->queued = d->run = 0;
	int rc = k_cpu_ops()->stream_open(cfg, &d->cpu, e);
	if (rc) {
		free(d);
		return rc;
	}
	*out = (struct k_stream *)(void *)d;
	return 0;
}

static void deferred_stream_close(struct k_stream *s)
{
	struct deferred *d = deferred_of(s);

	run_until(d, d->queued);
	k_cpu_ops()->stream_close(d->cpu);
	free(d);
}

static int deferred_stream_error(struct k_stream *s)
{
	return k_cpu_ops()->stream_error(deferred_of(s)->cpu);
}

static void deferred_event_record(struct k_stream *s, struct k_event *ev)
{
	ev->ticket = deferred_of(s)->queued;
}

static void deferred_event_wait(struct k_stream *s, const struct k_event *ev)
{
	assert(ev->ticket <= deferred_of(s)->queued);
	run_until(deferred_of(s), ev->ticket);
}

static bool deferred_event_done(struct k_stream *s, const struct k_event *ev)
{
	deferred_event_wait(s, ev);
	return true;
}

static const struct k_ops deferred_ops = {
	.name = "deferred",
	.workspace_bytes = deferred_workspace_bytes,
	.stream_open = deferred_stream_open,
	.stream_close = deferred_stream_close,
	.stream_error = deferred_stream_error,
	.event_record = deferred_event_record,
	.event_done = deferred_event_done,
	.event_wait = deferred_event_wait,
	.copy = deferred_copy,
	.zero = deferred_zero,
	.embed = deferred_embed,
	.embed_backward = deferred_embed_backward,
	.norm = deferred_norm,
	.norm_backward = deferred_norm_backward,
	.residual = deferred_residual,
	.linear = deferred_linear,
	.linear_backward = deferred_linear_backward,
	.rotary = deferred_rotary,
	.rotary_backward = deferred_rotary_backward,
	.glu = deferred_glu,
	.glu_backward = deferred_glu_backward,
	.attention = deferred_attention,
	.attention_backward = deferred_attention_backward,
	.xent = deferred_xent,
	.fold = deferred_fold,
	.adam = deferred_adam,
	.state_hash = deferred_state_hash,
};

const struct k_ops *k_deferred_ops(void)
{
	return &deferred_ops;
}
