/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Actions on their way out. What is queued is small: the message is made when
 * the shell takes the action, from the state, which is still the same then
 * because the shell empties the queue after every event. A member that went in
 * the meantime is passed over.
 */
#include "mesh/coord.h"

#include <assert.h>
#include <inttypes.h>
#include <stdarg.h>
#include <string.h>

static const char *role_text(enum member_role role)
{
	return role == ROLE_SHARD ? "shard service" : "worker";
}

const char *coord_who(const struct seat *s, char buf[128])
{
	snprintf(buf, 128, "%s %u (pid %u on %s)", role_text(s->pub.role), s->pub.id, s->pub.pid, s->pub.host);
	return buf;
}

static struct out *push(struct coord *c, enum out_kind kind, uint32_t member)
{
	struct out *o = &c->outs[(c->out_first + c->n_outs) % COORD_OUTS];

	assert(c->n_outs < COORD_OUTS);
	c->n_outs++;
	*o = (struct out){ .kind = kind, .member = member };
	return o;
}

void coord_out(struct coord *c, enum out_kind kind, uint32_t member)
{
	push(c, kind, member);
}

static uint32_t keep_text(struct coord *c, const char *text)
{
	uint32_t at = c->text_next++ % COORD_TEXTS;

	snprintf(c->texts[at], COORD_TEXT, "%s", text);
	return at;
}

void coord_out_text(struct coord *c, enum out_kind kind, uint32_t member, uint32_t exit_code, const char *text)
{
	struct out *o = push(c, kind, member);

	o->exit_code = exit_code;
	o->text = keep_text(c, text);
}

void coord_note(struct coord *c, const char *fmt, ...)
{
	char text[COORD_TEXT];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	coord_out_text(c, OUT_NOTE, 0, 0, text);
}

/* ---------------------------------------------------------------- messages */

static void make_welcome(const struct coord *c, const struct seat *s, struct coord_action *a)
{
	uint32_t beside = 0;

	for (uint32_t i = 0; i < c->n_here; i++)
		beside += c->here[i]->pub.role == s->pub.role && c->here[i]->pub.host_id == s->pub.host_id;
	a->msg_type = WIRE_WELCOME;
	a->msg.welcome = (struct msg_welcome){
		.member = s->pub.id,
		.n_shards = c->cfg.n_shards,
		.n_workers = c->cfg.n_workers,
		.host_index = s->host_index,
		.host_members = beside,
	};
}

/* A worker deals with the shard services, and with the workers of its own host. */
static bool in_view(const struct seat *viewer, const struct seat *s)
{
	return viewer->pub.role == ROLE_SHARD || s->pub.role == ROLE_SHARD || s->pub.host_id == viewer->pub.host_id;
}

static uint32_t view_size(const struct coord *c, const struct seat *viewer)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < c->n_here; i++)
		n += in_view(viewer, c->here[i]);
	return n;
}

static void make_member(const struct seat *s, struct coord_action *a)
{
	struct msg_member *m = &a->msg.member;

	a->msg_type = WIRE_MEMBER;
	m->member = s->pub.id;
	m->role = s->pub.role;
	m->pid = s->pub.pid;
	m->host_id = s->pub.host_id;
	memcpy(m->host, s->pub.host, sizeof(m->host));
	memcpy(m->listen, s->pub.listen, sizeof(m->listen));
}

/* One message of a view; the last one, EPOCH, ends it. */
static bool make_table(struct coord *c, const struct seat *viewer, struct coord_action *a)
{
	while (c->table_at < c->n_here && !in_view(viewer, c->here[c->table_at]))
		c->table_at++;
	if (c->table_at < c->n_here) {
		make_member(c->here[c->table_at++], a);
		return false;
	}
	c->table_at = 0;
	a->msg_type = WIRE_EPOCH;
	a->msg.epoch = (struct msg_epoch){ .epoch = c->epoch, .n_members = view_size(c, viewer) };
	return true;
}

static void make_step(const struct coord *c, const struct seat *s, bool joins, struct coord_action *a)
{
	struct msg_step *m = &a->msg.step;

	a->msg_type = WIRE_STEP;
	*m = c->step_msg;
	if (joins)
		*m = (struct msg_step){
			.has_open = m->has_open, .open_step = m->open_step, .n_micro = m->n_micro, .n_eval = m->n_eval
		};
	if (!s->pub.lease.id)
		return;
	m->lease = s->pub.lease.id;
	m->lease_kind = s->pub.lease.kind;
	m->lease_first = s->pub.lease.node.first;
	m->lease_level = s->pub.lease.node.level;
}

static void make_lease(const struct coord *c, const struct seat *s, struct coord_action *a)
{
	a->msg_type = WIRE_LEASE;
	a->msg.lease = (struct msg_lease){
		.step = c->open_step,
		.lease = s->pub.lease.id,
		.kind = s->pub.lease.kind,
		.first = s->pub.lease.node.first,
		.level = s->pub.lease.node.level,
	};
}

/* A message to a member that is here. False: more of the same item follows. */
static bool make_send(struct coord *c, const struct out *o, const struct seat *s, struct coord_action *a)
{
	a->type = COORD_SEND;
	switch (o->kind) {
	case OUT_WELCOME:
		make_welcome(c, s, a);
		break;
	case OUT_TABLE:
		return make_table(c, s, a);
	case OUT_LEASE:
		make_lease(c, s, a);
		break;
	case OUT_RECALL:
		a->msg_type = WIRE_RECALL;
		a->msg.recall = (struct msg_recall){ .step = c->open_step, .lease = s->pub.lease.id };
		break;
	case OUT_RELAY:
		a->msg_type = WIRE_RELAY;
		a->msg.relay = c->relay;
		break;
	default:
		make_step(c, s, o->kind == OUT_JOIN, a);
	}
	return true;
}

static void make_shutdown(const struct coord *c, const struct out *o, struct coord_action *a)
{
	a->type = COORD_SEND;
	a->msg_type = WIRE_SHUTDOWN;
	a->msg.shutdown.exit_code = o->exit_code;
	snprintf(a->msg.shutdown.text, sizeof(a->msg.shutdown.text), "%s", c->texts[o->text]);
}

static void make_other(const struct coord *c, const struct out *o, struct coord_action *a)
{
	static const enum coord_action_type types[] = {
		[OUT_CLOSE] = COORD_CLOSE,   [OUT_LINE] = COORD_LINE, [OUT_EXPORT] = COORD_EXPORT,
		[OUT_FINISH] = COORD_FINISH, [OUT_NOTE] = COORD_NOTE,
	};

	a->type = types[o->kind];
	a->exit_code = o->exit_code;
	a->text[0] = '\0';
	if (o->kind == OUT_LINE)
		a->record = c->line;
	else if (o->kind != OUT_EXPORT)
		snprintf(a->text, sizeof(a->text), "%s", c->texts[o->text]);
}

static void pop(struct coord *c)
{
	c->out_first = (c->out_first + 1) % COORD_OUTS;
	c->n_outs--;
}

bool coord_next(struct coord *c, struct coord_action *out)
{
	while (c->n_outs) {
		const struct out *o = &c->outs[c->out_first];
		const struct seat *s;

		out->member = o->member;
		if (o->kind == OUT_SHUTDOWN) {
			make_shutdown(c, o, out);
			pop(c);
			return true;
		}
		if (o->kind > OUT_SHUTDOWN) {
			make_other(c, o, out);
			pop(c);
			return true;
		}
		s = coord_seat(c, o->member);
		if (!s || make_send(c, o, s, out))
			pop(c);
		if (s)
			return true;
	}
	return false;
}

/* ------------------------------------------------------- what is waited for */

static void wait_ready(const struct coord *c, char *out, size_t bytes)
{
	char who[128];

	for (uint32_t i = 0; i < c->n_here; i++) {
		if (c->here[i]->pub.ready)
			continue;
		snprintf(out, bytes, "%s to be ready (%u of %u are)", coord_who(c->here[i], who),
			 c->n_ready[ROLE_SHARD] + c->n_ready[ROLE_WORKER], c->n_here);
		return;
	}
}

static bool wait_span(const struct coord *c, char *out, size_t bytes)
{
	const struct seat *lowest = NULL;
	const struct lease *l;
	uint32_t n;

	for (uint32_t i = 0; i < c->n_here; i++) {
		const struct seat *s = c->here[i];

		if (s->pub.lease.id && (!lowest || s->pub.lease.kind < lowest->pub.lease.kind ||
					(s->pub.lease.kind == lowest->pub.lease.kind &&
					 s->pub.lease.node.first < lowest->pub.lease.node.first)))
			lowest = s;
	}
	if (!lowest)
		return false;
	l = &lowest->pub.lease;
	n = l->kind == LEASE_TRAIN ? c->step_msg.n_micro : c->step_msg.n_eval;
	snprintf(out, bytes, "%sspan [%u,%u) of worker %u (%u of %u micro-batches are done)",
		 l->kind == LEASE_EVAL ? "evaluation " : "", l->node.first, l->node.first + tree_leaves(l->node, n),
		 lowest->pub.id, c->loss[l->kind].n_done, n);
	return true;
}

static void wait_shard(const struct coord *c, bool applied, char *out, size_t bytes)
{
	for (uint32_t i = 0; i < c->n_here; i++) {
		const struct seat *s = c->here[i];

		if (s->pub.role != ROLE_SHARD || (applied ? s->applied : s->voted))
			continue;
		if (applied)
			snprintf(out, bytes, "shard %u to apply step %" PRIu64, s->pub.id, c->record.step);
		else
			snprintf(out, bytes, "vote of shard %u", s->pub.id);
		return;
	}
}

static void wait_run(const struct coord *c, char *out, size_t bytes)
{
	if (!c->open_step)
		wait_shard(c, true, out, bytes);
	else if (wait_span(c, out, bytes))
		return;
	else if (c->leases.set[LEASE_TRAIN].n_open || c->leases.set[LEASE_EVAL].n_open)
		snprintf(out, bytes, "a worker that is ready: %u micro-batches are open",
			 c->leases.set[LEASE_TRAIN].n_open + c->leases.set[LEASE_EVAL].n_open);
	else
		wait_shard(c, c->applying, out, bytes);
}

void coord_waiting_for(const struct coord *c, char *out, size_t bytes)
{
	if (bytes)
		out[0] = '\0';
	if (c->phase == PHASE_GATHER)
		snprintf(out, bytes, "members: %u of %u shard services, %u of %u workers", c->n_role[ROLE_SHARD],
			 c->cfg.n_shards, c->n_role[ROLE_WORKER], c->cfg.n_workers);
	else if (c->phase == PHASE_PREPARE)
		wait_ready(c, out, bytes);
	else if (c->phase == PHASE_RUN)
		wait_run(c, out, bytes);
	else if (c->phase == PHASE_EXPORT)
		snprintf(out, bytes, "the model to be written");
}
