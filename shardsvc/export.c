/* SPDX-License-Identifier: Apache-2.0 */
/* The result leaves: the coordinator asks for the parameters piece by piece. */
#include "shardsvc/shard.h"

#include <errno.h>

int export_read(struct shard *s, const struct msg_export_read *m)
{
	struct msg_export_data out = { .request = m->request };
	const float *at;

	/* All have applied before anybody exports, so nothing writes what is read here. */
	if (!s->ready || s->applied != s->version || s->phase == STEP_REDUCE || s->phase == STEP_SEALED) {
		log_error(&s->log, "EXPORT_READ while version %llu is being made", (unsigned long long)s->version);
		return -EPROTO;
	}
	at = m->n <= WIRE_BODY_MAX / sizeof(float) ? store_span(&s->store, m->unit, m->offset, m->n) : NULL;
	if (!at) {
		log_error(&s->log, "EXPORT_READ of %u elements at %llu of unit %u, which are not in one run of ours",
			  m->n, (unsigned long long)m->offset, m->unit);
		return -EPROTO;
	}
	atomic_fetch_add_explicit(&s->count.exports, m->n * sizeof(float), memory_order_relaxed);
	out.bytes = (struct wire_blob){ .data = (const uint8_t *)at, .bytes = m->n * (uint32_t)sizeof(float) };
	return member_link_send(s->link, WIRE_EXPORT_DATA, &out);
}
