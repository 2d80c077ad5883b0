/* SPDX-License-Identifier: Apache-2.0 */
#include "mesh/mesh.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>

struct line {
	char *out;
	size_t n, max;
};

static void add(struct line *l, const char *fmt, ...) PRINTF_LIKE(2, 3);
static void add(struct line *l, const char *fmt, ...)
{
	size_t room = l->n < l->max ? l->max - l->n : 0;
	va_list ap;
	int n;

	va_start(ap, fmt);
	n = vsnprintf(room ? l->out + l->n : NULL, room, fmt, ap);
	va_end(ap);
	l->n += n > 0 ? (size_t)n : 0;
}

/* JSON has no word for what is not finite. */
static void add_f64(struct line *l, const char *name, double v)
{
	char buf[32];

	add(l, ",\"%s\":%s", name, isfinite(v) ? double_text(v, buf) : "null");
}

int step_record_json(const struct step_record *r, char *out, size_t max)
{
	struct line l = { .out = out, .max = max };
	char hex[33];

	add(&l, "{\"step\":%" PRIu64, r->step);
	add_f64(&l, "loss", r->loss);
	add_f64(&l, "grad_norm", r->grad_norm);
	add_f64(&l, "lr", r->lr);
	add(&l, ",\"tokens\":%" PRIu64, r->tokens);
	add_f64(&l, "step_seconds", r->step_seconds);
	add_f64(&l, "tokens_per_second", r->tokens_per_second);
	add(&l, ",\"epoch\":%" PRIu64 ",\"workers\":%u,\"shards\":%u", r->epoch, r->workers, r->shards);
	add_f64(&l, "seconds_compute", r->seconds_compute);
	add_f64(&l, "seconds_fetch", r->seconds_fetch);
	add_f64(&l, "seconds_push", r->seconds_push);
	if (r->has_validation_loss)
		add_f64(&l, "validation_loss", r->validation_loss);
	if (r->has_state_hash) {
		hash128_hex(r->state_hash, hex);
		add(&l, ",\"state_hash\":\"%s\"", hex);
	}
	add(&l, "}\n");
	return l.n < max ? (int)l.n : -ENOSPC;
}
