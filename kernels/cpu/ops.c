/* SPDX-License-Identifier: Apache-2.0 */
/* The CPU backend as kernels.h names it, and the workspace that the largest of its operations needs. */
#include "kernels/cpu/cpu.h"

static uint64_t largest_weight(const struct k_dims *d)
{
	uint64_t qkv = ((uint64_t)d->heads + 2ull * d->kv_heads) * d->head_dim;
	uint64_t widest = qkv;

	if (d->ffn > widest)
		widest = d->ffn;
	if (d->vocab > widest)
		widest = d->vocab;
	if (d->channels > widest)
		widest = d->channels;
	return widest * d->channels;
}

static size_t cpu_workspace_bytes(const struct k_dims *d, unsigned threads)
{
	uint32_t n_mb = d->n_mb ? d->n_mb : 1;
	uint64_t rows = (uint64_t)d->batch * d->seq;
	const struct scratch need[] = {
		linear_scratch(),
		linear_backward_scratch(n_mb, (uint32_t)rows, largest_weight(d)),
		attention_scratch(d->seq, d->seq, d->head_dim, true),
		rotary_backward_scratch(n_mb, d->head_dim),
		embed_backward_scratch(n_mb, rows, d->vocab, d->channels),
		xent_scratch(n_mb, rows),
		state_scratch(),
	};
	size_t most = 0;

	for (size_t i = 0; i < ARRAY_LEN(need); i++) {
		size_t bytes = scratch_bytes(need[i], threads);
		most = bytes > most ? bytes : most;
	}
	return most;
}

static const struct k_ops cpu_ops = {
	.name = "cpu",
	.workspace_bytes = cpu_workspace_bytes,
	.stream_open = cpu_stream_open,
	.stream_close = cpu_stream_close,
	.stream_error = cpu_stream_error,
	.event_record = cpu_event_record,
	.event_done = cpu_event_done,
	.event_wait = cpu_event_wait,
	.copy = cpu_copy,
	.zero = cpu_zero,
	.embed = cpu_embed,
	.embed_backward = cpu_embed_backward,
	.norm = cpu_norm,
	.norm_backward = cpu_norm_backward,
	.residual = cpu_residual,
	.linear = cpu_linear,
	.linear_backward = cpu_linear_backward,
	.rotary = cpu_rotary,
	.rotary_backward = cpu_rotary_backward,
	.glu = cpu_glu,
	.glu_backward = cpu_glu_backward,
	.attention = cpu_attention,
	.attention_backward = cpu_attention_backward,
	.xent = cpu_xent,
	.fold = cpu_fold,
	.adam = cpu_adam,
	.state_hash = cpu_state_hash,
};

const struct k_ops *k_cpu_ops(void)
{
	return &cpu_ops;
}
