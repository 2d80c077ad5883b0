/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Who is connected to the coordinator: members, which register and then speak
 * to the state machine, and observers, which ask and watch and never get
 * further than this file. A connection and a membership end separately: a
 * member that the state machine has evicted loses its id here at once, and what
 * its connection still says or how it ends concerns nobody.
 */
#include "mesh/shell.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct peer *peer_of(const struct coordinator *co, uint32_t member)
{
	return member < co->n_by_member ? co->by_member[member] : NULL;
}

static int remember(struct coordinator *co, struct peer *p, uint32_t member)
{
	if (member >= co->n_by_member) {
		uint32_t n = member + 64;
		struct peer **grown = realloc(co->by_member, n * sizeof(struct peer *));

		if (!grown)
			return -ENOMEM;
		memset(grown + co->n_by_member, 0, (n - co->n_by_member) * sizeof(struct peer *));
		co->by_member = grown;
		co->n_by_member = n;
	}
	co->by_member[member] = p;
	p->member = member;
	return 0;
}

/* ----------------------------------------------------------------- observers */

static void send_json(struct peer *p, unsigned type, char *json)
{
	/* STATUS and PROGRESS have the same one field. */
	struct msg_status m = { .json = { .data = (const uint8_t *)json, .bytes = json ? (uint32_t)strlen(json) : 0 } };

	/* An observer that does not read is none. */
	if (!json || conn_send(p->c, type, &m) < 0)
		conn_close(p->c, "it does not read");
	free(json);
}

void peers_tell(struct coordinator *co, const char *json)
{
	struct peer *p;

	TAILQ_FOREACH(p, &co->peers, all)
	if (p->watches && json)
		send_json(p, WIRE_PROGRESS, strdup(json));
}

static void answer_status(struct peer *p)
{
	char *json = status_json(p->owner, true);

	if (json && strlen(json) + sizeof(uint32_t) > WIRE_BODY_MAX) {
		free(json);
		json = status_json(p->owner, false);
	}
	send_json(p, WIRE_STATUS, json);
}

/* A watcher that comes late hears first what it has missed: the phase, the plans, the last line. */
static void begin_watch(struct peer *p)
{
	struct peer *q;

	if (p->watches)
		return;
	p->watches = true;
	send_json(p, WIRE_PROGRESS, event_phase(p->owner));
	TAILQ_FOREACH(q, &p->owner->peers, all)
	if (q->member && q->planned_bytes)
		send_json(p, WIRE_PROGRESS, event_plan(q));
	if (p->owner->has_last)
		send_json(p, WIRE_PROGRESS, event_step(&p->owner->last));
}

static int on_observer(struct peer *p, const struct wire_header *h, const union wire_msg *m)
{
	struct coordinator *co = p->owner;

	switch (h->type) {
	case WIRE_STATUS_GET:
		answer_status(p);
		return 0;
	case WIRE_WATCH:
		begin_watch(p);
		return 0;
	case WIRE_STOP:
		log_info(co->self->log, "%s asks to stop: %s", conn_peer_text(p->c), m->stop.reason);
		coord_stop(co->coord, EXIT_OK, clock_now_ns());
		return 0;
	default:
		return -EPROTO;
	}
}

/* ------------------------------------------------------------------- members */

static int on_register(struct peer *p, const struct msg_registration *m)
{
	struct msg_reject reject = { .exit_code = EXIT_RETRY_LATER };
	struct coordinator *co = p->owner;
	uint32_t member;
	struct err e;
	char *event;

	if (p->member)
		return -EPROTO;
	if (coord_register(co->coord, conn_role(p->c), m, clock_now_ns(), &member, &e) < 0) {
		log_info(co->self->log, "refused to register %s: %s", conn_peer_text(p->c), e.text);
		snprintf(reject.text, sizeof(reject.text), "%.500s", e.text);
		(void)conn_send(p->c, WIRE_REJECT, &reject);
		conn_close(p->c, "refused");
		return 0;
	}
	if (remember(co, p, member) < 0) {
		coordinator_drain(co);
		coord_gone(co->coord, member, "the coordinator is out of memory", clock_now_ns());
		return -ENOMEM;
	}
	conn_set_member(p->c, member);
	event = event_member(p, true);
	peers_tell(co, event);
	free(event);
	return 0;
}

static int keep_heartbeat(struct peer *p, const struct msg_heartbeat *m)
{
	if (m->waits.bytes > sizeof(p->waits) || m->counters.bytes > sizeof(p->counters))
		return -EMSGSIZE;
	p->waits_bytes = m->waits.bytes;
	p->counters_bytes = m->counters.bytes;
	if (m->waits.bytes)
		memcpy(p->waits, m->waits.data, m->waits.bytes);
	if (m->counters.bytes)
		memcpy(p->counters, m->counters.data, m->counters.bytes);
	return 0;
}

static void keep_plan(struct peer *p, const struct msg_ready *m)
{
	char *event;

	p->planned_bytes = m->planned_bytes;
	p->max_span = m->max_span;
	event = event_plan(p);
	peers_tell(p->owner, event);
	free(event);
}

static int keep_choice(struct peer *p, const struct msg_choice *m)
{
	struct choice *grown, *c;

	if (p->n_choices == PEER_CHOICES_MAX)
		return -EMSGSIZE;
	grown = realloc(p->choices, (p->n_choices + 1) * sizeof(*grown));
	if (!grown)
		return -ENOMEM;
	p->choices = grown;
	c = &grown[p->n_choices++];
	*c = (struct choice){ .shard = m->shard, .chosen = m->chosen };
	memcpy(c->provider, m->provider, sizeof(c->provider));
	memcpy(c->text, m->text, sizeof(c->text));
	return 0;
}

static int on_piece(struct peer *p, const struct msg_export_data *m)
{
	struct coordinator *co = p->owner;
	struct err e;
	int rc = co->export ? export_take(co->export, p->member, m, &e) : -EPROTO;
	char text[PATH_MAX + 64];

	if (rc == 0 || rc == -EPROTO)
		return rc;
	export_free(co->export);
	co->export = NULL;
	snprintf(text, sizeof(text), "the model is in %s/model", co->run_dir.path);
	coord_exported(co->coord, rc < 0 ? rc : 0, rc < 0 ? e.text : text, clock_now_ns());
	return 0;
}

static int on_member(struct peer *p, const struct wire_header *h, const union wire_msg *m)
{
	int rc = 0;

	if (h->type == WIRE_REGISTER)
		return on_register(p, &m->registration);
	if (!p->member)
		return -EPROTO;
	if (h->type == WIRE_HEARTBEAT)
		rc = keep_heartbeat(p, &m->heartbeat);
	else if (h->type == WIRE_CHOICE)
		rc = keep_choice(p, &m->choice);
	else if (h->type == WIRE_READY)
		keep_plan(p, &m->ready);
	if (rc < 0)
		return rc;
	coord_message(p->owner->coord, p->member, h, h->type, m, clock_now_ns());
	if (h->type != WIRE_EXPORT_DATA)
		return 0;
	coordinator_drain(p->owner);
	return p->owner->finished ? 0 : on_piece(p, &m->export_data);
}

/* --------------------------------------------------------------- connections */

static void on_ready(struct conn *c, void *ctx)
{
	struct peer *p = ctx;

	log_debug(p->owner->self->log, "%s is connected", conn_peer_text(c));
	if (conn_role(c) == ROLE_COORDINATOR)
		conn_close(c, "two coordinators have nothing to say to each other");
}

static int on_message(struct conn *c, const struct wire_header *h, const union wire_msg *m, void *ctx)
{
	struct peer *p = ctx;
	int rc;

	if (p->owner->finished)
		return 0;
	rc = conn_role(c) == ROLE_OBSERVER ? on_observer(p, h, m) : on_member(p, h, m);
	coordinator_drain(p->owner);
	return rc;
}

static void forget(struct peer *p)
{
	struct coordinator *co = p->owner;

	TAILQ_REMOVE(&co->peers, p, all);
	if (peer_of(co, p->member) == p)
		co->by_member[p->member] = NULL;
	free(p->choices);
	free(p);
}

static void on_closed(struct conn *c, int status, const char *text, void *ctx)
{
	struct peer *p = ctx;
	struct coordinator *co = p->owner;
	uint32_t member = p->member;

	if (!conn_role(c) && status != -EPERM)
		log_info(co->self->log, "a connection from %s came to nothing: %s", conn_peer_text(c), text);
	else
		log_debug(co->self->log, "%s: %s", conn_peer_text(c), text);
	if (member) {
		char *event = event_member(p, false);

		p->watches = false;
		peers_tell(co, event);
		free(event);
	}
	forget(p);
	if (co->finished) {
		if (TAILQ_EMPTY(&co->peers))
			event_base_loopbreak(co->self->base);
		return;
	}
	if (member)
		coord_gone(co->coord, member, text, clock_now_ns());
	coordinator_drain(co);
}

static const struct conn_ops peer_ops = { .ready = on_ready, .message = on_message, .closed = on_closed };

static void orphan_closed(struct conn *c, int status, const char *text, void *ctx)
{
	(void)c;
	(void)status;
	(void)text;
	(void)ctx;
}

static const struct conn_ops orphan_ops = { .closed = orphan_closed };

void peer_accepted(void *coordinator, struct conn *c)
{
	struct coordinator *co = coordinator;
	struct peer *p = calloc(1, sizeof(*p));

	if (!p) {
		conn_set_ctx(c, &orphan_ops, NULL);
		conn_close(c, "out of memory");
		return;
	}
	p->owner = co;
	p->c = c;
	TAILQ_INSERT_TAIL(&co->peers, p, all);
	conn_set_ctx(c, &peer_ops, p);
}

void peers_end(struct coordinator *co, uint32_t exit_code, const char *text)
{
	struct msg_shutdown m = { .exit_code = exit_code };
	struct peer *p;

	snprintf(m.text, sizeof(m.text), "%s", text);
	TAILQ_FOREACH(p, &co->peers, all)
	{
		if (conn_role(p->c) && !p->told)
			(void)conn_send(p->c, WIRE_SHUTDOWN, &m);
		p->told = true;
		conn_close(p->c, "the job is over");
	}
}
