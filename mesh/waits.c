/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What threads wait for. Each thread writes its own record, the control thread
 * reads them all once a second. The kind is written last and read first
 * (release, acquire), so that a record that says it waits has its fields. A
 * record that changes while it is read may mix two waits of the same thread:
 * it is a sentence for people, not worth a lock on the step path.
 */
#include "mesh/mesh.h"

#include <string.h>

struct packed_wait {
	uint32_t kind, unit, page, peer;
	uint64_t step, age_ms;
};
_Static_assert(sizeof(struct packed_wait) == 32, "as it travels");

void wait_begin(struct wait_record *w, enum wait_kind kind, uint64_t step, uint32_t unit, uint32_t page, uint32_t peer)
{
	atomic_store_explicit(&w->unit, unit, memory_order_relaxed);
	atomic_store_explicit(&w->page, page, memory_order_relaxed);
	atomic_store_explicit(&w->peer, peer, memory_order_relaxed);
	atomic_store_explicit(&w->step, step, memory_order_relaxed);
	atomic_store_explicit(&w->since_ns, clock_now_ns(), memory_order_relaxed);
	atomic_store_explicit(&w->kind, kind, memory_order_release);
}

void wait_end(struct wait_record *w)
{
	atomic_store_explicit(&w->kind, WAIT_NONE, memory_order_release);
}

size_t waits_pack(const struct wait_record *w, uint32_t n, uint64_t now_ns, uint8_t *out, size_t max)
{
	size_t used = 0;

	for (uint32_t i = 0; i < n && max - used >= sizeof(struct packed_wait); i++) {
		struct packed_wait p = { .kind = atomic_load_explicit(&w[i].kind, memory_order_acquire) };
		uint64_t since = atomic_load_explicit(&w[i].since_ns, memory_order_relaxed);

		if (p.kind == WAIT_NONE)
			continue;
		p.unit = atomic_load_explicit(&w[i].unit, memory_order_relaxed);
		p.page = atomic_load_explicit(&w[i].page, memory_order_relaxed);
		p.peer = atomic_load_explicit(&w[i].peer, memory_order_relaxed);
		p.step = atomic_load_explicit(&w[i].step, memory_order_relaxed);
		p.age_ms = now_ns > since ? (now_ns - since) / 1000000u : 0;
		memcpy(out + used, &p, sizeof(p));
		used += sizeof(p);
	}
	return used;
}

/* What follows "waits for". Peers are named where there is one: ids start at 1. */
static void describe(const struct packed_wait *p, char *out, size_t max)
{
	unsigned long long step = (unsigned long long)p->step;
	char shard[24] = "";

	if (p->peer)
		snprintf(shard, sizeof(shard), " shard %u", p->peer);
	switch (p->kind) {
	case WAIT_LEASE:
		snprintf(out, max, "a lease of step %llu", step);
		break;
	case WAIT_UNIT:
		snprintf(out, max, "unit %u page %u%s%s", p->unit, p->page, p->peer ? " from" : "", shard);
		break;
	case WAIT_GRADIENT_BUFFER:
		snprintf(out, max, "a gradient buffer, since unit %u is not taken yet%s%s", p->unit,
			 p->peer ? " by" : "", shard);
		break;
	case WAIT_CONTRIBUTION:
		snprintf(out, max, "contributions to unit %u of step %llu", p->unit, step);
		break;
	case WAIT_COMMIT:
		snprintf(out, max, "the commit of step %llu", step);
		break;
	case WAIT_MEMBERS:
		snprintf(out, max, "members");
		break;
	case WAIT_CONNECT:
		snprintf(out, max, "a connection%s%s", p->peer ? " to" : "", shard);
		break;
	default:
		snprintf(out, max, "something this program does not know (%u)", p->kind);
	}
}

size_t waits_text(const char *who, const uint8_t *packed, size_t bytes, char *out, size_t max)
{
	size_t used = 0;

	if (max > 0)
		out[0] = 0;
	for (size_t at = 0; bytes - at >= sizeof(struct packed_wait); at += sizeof(struct packed_wait)) {
		struct packed_wait p;
		char what[128];
		int n;

		memcpy(&p, packed + at, sizeof(p));
		describe(&p, what, sizeof(what));
		n = snprintf(out + used, max - used, "%s%s waits for %s, %.1f s", used ? "\n" : "", who, what,
			     (double)p.age_ms * 1e-3);
		if (n < 0 || (size_t)n >= max - used) {
			/* A cut sentence would mislead. */
			if (max > used)
				out[used] = 0;
			break;
		}
		used += (size_t)n;
	}
	return used;
}
