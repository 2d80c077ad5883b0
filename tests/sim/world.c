/* SPDX-License-Identifier: Apache-2.0 */
/* Time, the network and what went wrong. */
#include "tests/sim/sim.h"

#include <stdlib.h>
#include <string.h>

/* ------------------------------------------------------------------- events */

static bool before(const struct event *x, const struct event *y)
{
	return x->at != y->at ? x->at < y->at : x->number < y->number;
}

void sim_at(struct sim *s, uint64_t at, struct event e)
{
	uint32_t i = s->n_heap++;

	if (s->n_heap > s->max_heap) {
		s->max_heap = s->max_heap ? s->max_heap * 2 : 4096;
		s->heap = realloc(s->heap, s->max_heap * sizeof(*s->heap));
		if (!s->heap)
			abort();
	}
	e.at = at;
	e.number = s->n_events++;
	while (i && before(&e, &s->heap[(i - 1) / 2])) {
		s->heap[i] = s->heap[(i - 1) / 2];
		i = (i - 1) / 2;
	}
	s->heap[i] = e;
}

bool sim_next(struct sim *s, struct event *out)
{
	struct event last;
	uint32_t i = 0;

	if (!s->n_heap)
		return false;
	*out = s->heap[0];
	last = s->heap[--s->n_heap];
	for (;;) {
		uint32_t child = 2 * i + 1;

		if (child + 1 < s->n_heap && before(&s->heap[child + 1], &s->heap[child]))
			child++;
		if (child >= s->n_heap || !before(&s->heap[child], &last))
			break;
		s->heap[i] = s->heap[child];
		i = child;
	}
	s->heap[i] = last;
	s->now = out->at;
	return true;
}

/* ------------------------------------------------------------------ network */

struct mail *sim_mail(struct sim *s, unsigned type)
{
	struct mail *m = s->mail_free;

	if (m)
		s->mail_free = m->next;
	else
		m = malloc(sizeof(*m));
	if (!m)
		abort();
	memset(m, 0, sizeof(*m));
	m->type = type;
	return m;
}

void sim_mail_free(struct sim *s, struct mail *m)
{
	if (!m)
		return;
	m->next = s->mail_free;
	s->mail_free = m;
}

/* What a member may say again: rule 9's votes, and whatever a reconnect would repeat. */
static bool may_repeat(unsigned type)
{
	return type == WIRE_VOTE || type == WIRE_SPAN_DONE || type == WIRE_APPLIED || type == WIRE_STARVED ||
	       type == WIRE_READY || type == WIRE_WANT || type == WIRE_WITHDRAW;
}

static uint64_t latency(struct sim *s)
{
	uint64_t ns = chance_range(&s->chance, s->plan.latency_ns / 10, s->plan.latency_ns);

	return chance_of(&s->chance, 20) ? ns * 20 : ns;
}

/* In order within a connection; the odd nanosecond belongs to thaws, so that a backlog comes before what is new. */
static void deliver(struct sim *s, struct link *link, const struct event *e)
{
	uint64_t at = (s->now + latency(s) * link->lag) & ~1ull;

	if (at <= link->last)
		at = link->last + 2;
	link->last = at;
	sim_at(s, at, *e);
}

void sim_send(struct sim *s, struct link *link, struct event e)
{
	struct mail *copy = NULL;

	if (!link->lag)
		link->lag = chance_of(&s->chance, s->plan.lag_per_1000) ? 30 : 1;
	if (e.mail && may_repeat(e.mail->type) && chance_of(&s->chance, s->plan.repeat_per_1000)) {
		copy = sim_mail(s, e.mail->type);
		*copy = *e.mail;
	}
	deliver(s, link, &e);
	if (!copy)
		return;
	e.mail = copy;
	deliver(s, link, &e);
}

/* ------------------------------------------------------------------ verdict */

void sim_fail(struct sim *s, const char *fmt, ...)
{
	va_list ap;

	if (s->failed)
		return;
	s->failed = true;
	va_start(ap, fmt);
	vsnprintf(s->why, sizeof(s->why), fmt, ap);
	va_end(ap);
}

void sim_trace(const struct sim *s, const char *fmt, ...)
{
	va_list ap;

	if (!s->verbose)
		return;
	printf("%12.6f ", (double)s->now * 1e-9);
	va_start(ap, fmt);
	vprintf(fmt, ap);
	va_end(ap);
	putchar('\n');
}
