/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which provider of the fabric serves a shard service: asked for one after
 * another, best first, until one connects.
 *
 *   FABRIC_WANT ->  <- FABRIC (an address): connect -> CONNECTED: chosen
 *                   <- FABRIC_REFUSED, or it cannot be reached: the next one
 *
 * Each side may refuse: we when this host cannot use the provider, or cannot
 * open it; the shard service likewise, or because it was told to use another;
 * and shared memory is only believed in when each side has read a random file
 * of the other. A provider that talks to its other end does it by SIGNAL on the
 * same connection; signals of a provider that was given up are passed over.
 * Whatever comes of it is logged with its reason, counted, and told to the
 * coordinator for `meshctl status`.
 */
#include "worker/process.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static void tell(struct peer *p, bool chosen, const char *provider, const char *text)
{
	struct msg_choice m = { .shard = p->member, .chosen = chosen };

	snprintf(m.provider, sizeof(m.provider), "%s", provider);
	snprintf(m.text, sizeof(m.text), "%s", text);
	member_link_send(p->w->link, WIRE_CHOICE, &m);
}

static void note_refusal(void *ctx, const char *provider, const char *reason)
{
	struct peer *p = ctx;
	size_t used = strlen(p->refusals);

	log_info(&p->w->log, "%s: not by %s: %s", p->name, provider, reason);
	count(&p->w->counters.refused, 1);
	tell(p, false, provider, reason);
	snprintf(p->refusals + used, sizeof(p->refusals) - used, "%s%s: %s", used ? "; " : "", provider, reason);
}

/* Two processes of one host may share memory though one of them is told to copy it. */
static void add_local_copy(struct peer *p)
{
	const struct fab_ops *copy = fab_provider("local-copy");
	struct fab_candidate *c = p->candidate;

	if (p->n_candidates == 0 || p->n_candidates == FAB_CANDIDATES_MAX || strcmp(c[0].ops->name, "local") != 0 ||
	    strcmp(p->w->fabric_want, "auto") != 0)
		return;
	memmove(&c[2], &c[1], (p->n_candidates - 1) * sizeof(c[0]));
	c[1] = (struct fab_candidate){ .ops = copy };
	p->n_candidates++;
}

/* Asks for the next one that opens here. */
static void try_next(struct peer *p)
{
	struct worker *w = p->w;
	struct msg_fabric_want m = { .provider = "" };

	p->fabric = NULL;
	while (p->tried < p->n_candidates) {
		const struct fab_ops *ops = p->candidate[p->tried++].ops;
		struct err e = { 0 };

		if (fabrics_get(w, ops, &p->fabric, &e)) {
			note_refusal(p, ops->name, e.text);
			continue;
		}
		snprintf(m.provider, sizeof(m.provider), "%s", ops->name);
		if (p->conn && conn_send(p->conn, WIRE_FABRIC_WANT, &m))
			attach_lost(p, "it does not read its connection");
		return;
	}
	control_fail(w, EXIT_JOB_FAILED, "no fabric reaches %s: %s", p->name, p->refusals);
}

void pair_begin(struct peer *p)
{
	struct worker *w = p->w;
	struct err e = { 0 };
	int n = fab_candidates(w->fabric_want, &w->fabric_options, p->same_host, p->candidate, note_refusal, p, &e);

	if (n < 0) {
		control_fail(w, EXIT_JOB_FAILED, "no fabric reaches %s: %s", p->name, e.text);
		return;
	}
	p->n_candidates = (uint32_t)n;
	add_local_copy(p);
	try_next(p);
}

/* The one that is tried is given up. */
static void give_up(struct peer *p, const char *reason)
{
	note_refusal(p, p->fabric->ops->name, reason);
	if (p->ep)
		p->fabric->ops->disconnect(p->ep);
	p->ep = NULL;
	try_next(p);
}

static bool is_tried(const struct peer *p, const char *provider)
{
	return p->fabric && !p->fabric_up && !strcmp(p->fabric->ops->name, provider);
}

int pair_fabric(struct peer *p, const struct msg_fabric *m)
{
	struct fab_blob address = { .bytes = m->address.bytes };
	int rc;

	if (!is_tried(p, m->provider) || p->ep || address.bytes > sizeof(address.data))
		return -EPROTO;
	if (address.bytes)
		memcpy(address.data, m->address.data, address.bytes);
	rc = p->fabric->ops->connect(p->fabric->fab, &address, p->index, &p->ep);
	if (rc)
		give_up(p, strerror(-rc));
	return 0;
}

int pair_refused(struct peer *p, const struct msg_fabric_refused *m)
{
	if (!is_tried(p, m->provider) || p->ep)
		return -EPROTO;
	give_up(p, m->reason);
	return 0;
}

int pair_signal(struct peer *p, const struct msg_signal *m)
{
	struct fab_blob blob = { .bytes = m->data.bytes };

	if (!p->fabric || strcmp(p->fabric->ops->name, m->provider) != 0)
		return 0;
	if (!p->fabric->ops->signal || blob.bytes > sizeof(blob.data))
		return -EPROTO;
	if (blob.bytes)
		memcpy(blob.data, m->data.data, blob.bytes);
	return p->fabric->ops->signal(p->fabric->fab, p->index, &blob);
}

static void connected(struct peer *p)
{
	const struct fab_ops *ops = p->fabric->ops;
	uint32_t counter = worker_provider(ops->name);
	char text[256] = "";

	p->fabric_up = true;
	ops->describe(p->ep, text, sizeof(text));
	log_info(&p->w->log, "%s: by %s: %s", p->name, ops->name, text);
	if (counter < WORKER_PROVIDERS)
		count(&p->w->counters.chosen[counter], 1);
	tell(p, true, ops->name, text);
}

static void carry(struct peer *p, const struct fab_blob *blob)
{
	struct msg_signal m = { .data = { .data = blob->data, .bytes = blob->bytes } };

	snprintf(m.provider, sizeof(m.provider), "%s", p->fabric->ops->name);
	if (p->conn && conn_send(p->conn, WIRE_SIGNAL, &m))
		attach_lost(p, "it does not read its connection");
}

bool pair_event(struct fabric *f, const struct fab_event *ev)
{
	struct peer *p = &f->w->attach.peer[ev->user];

	if (p->fabric != f)
		return false;
	switch (ev->type) {
	case FAB_EV_CONNECTED:
		connected(p);
		return true;
	case FAB_EV_SIGNAL:
		carry(p, ev->blob);
		return false;
	default:
		if (p->fabric_up)
			attach_lost(p, strerror(-ev->status));
		else
			give_up(p, strerror(-ev->status));
		return false;
	}
}
