/* SPDX-License-Identifier: Apache-2.0 */
/* What people and their tools see of a job, as JSON: status, events, the summary. */
#include "mesh/shell.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

static const char *const phase_name[] = {
	[PHASE_GATHER] = "gather", [PHASE_PREPARE] = "prepare", [PHASE_RUN] = "run",
	[PHASE_EXPORT] = "export", [PHASE_DONE] = "done",       [PHASE_FAILED] = "failed",
};

const char *role_text(enum member_role role)
{
	static const char *const name[] = {
		[ROLE_SHARD] = "shard",
		[ROLE_WORKER] = "worker",
		[ROLE_COORDINATOR] = "coordinator",
		[ROLE_OBSERVER] = "observer",
	};

	return name[role];
}

static char *dump(json_t *o)
{
	char *text = o ? json_dumps(o, JSON_COMPACT | JSON_REAL_PRECISION(17)) : NULL;

	json_decref(o);
	return text;
}

/* ------------------------------------------------------------------- members */

static json_t *waits_json(const struct peer *p, const struct coord_member *m)
{
	char text[8192], who[40], *rest = text;
	json_t *list = json_array();

	snprintf(who, sizeof(who), "%s %u", role_text(m->role), m->id);
	waits_text(who, p->waits, p->waits_bytes, text, sizeof(text));
	for (char *line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest))
		json_array_append_new(list, json_string(line));
	return list;
}

static void add_counter(void *ctx, const char *name, uint64_t value)
{
	json_object_set_new(ctx, name, json_integer((json_int_t)value));
}

static json_t *counters_json(const struct peer *p)
{
	json_t *o = json_object();

	(void)metrics_unpack(p->counters, p->counters_bytes, add_counter, o);
	return o;
}

static json_t *lease_json(const struct coord_member *m)
{
	if (!m->lease.id)
		return json_null();
	return json_pack("{sI ss si si sb}", "id", (json_int_t)m->lease.id, "kind",
			 m->lease.kind == LEASE_EVAL ? "eval" : "train", "first", (int)m->lease.node.first, "level",
			 (int)m->lease.node.level, "recalled", m->lease.recalled);
}

/* Host names come from outside, and may be no UTF-8. */
static json_t *text_json(const char *s)
{
	json_t *j = json_string(s);

	return j ? j : json_string("?");
}

/* By pair: what a worker uses with each shard service, and what was refused before it came to that. */
static json_t *pair_json(const struct peer *p, uint32_t shard)
{
	json_t *refused = json_array();
	json_t *o = json_pack("{si sn sn so}", "shard", (int)shard, "provider", "description", "refused", refused);

	for (uint32_t i = 0; o && i < p->n_choices; i++) {
		const struct choice *c = &p->choices[i];

		if (c->shard != shard)
			continue;
		if (c->chosen) {
			json_object_set_new(o, "provider", text_json(c->provider));
			json_object_set_new(o, "description", text_json(c->text));
		} else {
			json_array_append_new(refused, json_pack("{so so}", "provider", text_json(c->provider),
								 "reason", text_json(c->text)));
		}
	}
	return o;
}

static bool first_of_shard(const struct peer *p, uint32_t at)
{
	for (uint32_t i = 0; i < at; i++)
		if (p->choices[i].shard == p->choices[at].shard)
			return false;
	return true;
}

static json_t *fabric_json(const struct peer *p)
{
	json_t *list = json_array();

	for (uint32_t i = 0; i < p->n_choices; i++)
		if (first_of_shard(p, i))
			json_array_append_new(list, pair_json(p, p->choices[i].shard));
	return list;
}

static json_t *member_json(const struct coordinator *co, const struct coord_member *m, bool with_counters)
{
	const struct peer *p = peer_of(co, m->id);
	uint64_t now = clock_now_ns(), age = now > m->last_seen_ns ? now - m->last_seen_ns : 0;
	json_t *o = json_pack("{si ss so si sb sI sI so}", "id", (int)m->id, "role", role_text(m->role), "host",
			      text_json(m->host), "pid", (int)m->pid, "ready", m->ready, "version",
			      (json_int_t)m->version, "last_seen_ms", (json_int_t)(age / 1000000u), "lease",
			      lease_json(m));

	if (!o || !p)
		return o;
	json_object_set_new(o, "planned_bytes", json_integer((json_int_t)p->planned_bytes));
	json_object_set_new(o, "waits", waits_json(p, m));
	if (m->role == ROLE_WORKER)
		json_object_set_new(o, "fabric", fabric_json(p));
	if (with_counters)
		json_object_set_new(o, "counters", counters_json(p));
	return o;
}

static json_t *members_json(const struct coordinator *co, bool with_counters)
{
	const struct coord_member *m;
	json_t *list = json_array();

	for (uint32_t i = 0; (m = coord_member_at(co->coord, i)); i++)
		json_array_append_new(list, member_json(co, m, with_counters));
	return list;
}

/* -------------------------------------------------------------------- status */

static json_t *own_counters(const struct coordinator *co)
{
	const struct coord_counters *n = coord_counters(co->coord);
	struct mesh_self *self = co->self;

	return json_pack("{sI sI sI sI sI sI sI sI sI sI}", "mesh_messages_sent_total",
			 (json_int_t)atomic_load(&self->messages_sent), "mesh_messages_received_total",
			 (json_int_t)atomic_load(&self->messages_received), "mesh_bytes_sent_total",
			 (json_int_t)atomic_load(&self->bytes_sent), "mesh_bytes_received_total",
			 (json_int_t)atomic_load(&self->bytes_received), "mesh_auth_failures_total",
			 (json_int_t)atomic_load(&self->auth_failures), "mesh_leases_total", (json_int_t)n->leases,
			 "mesh_recalls_total", (json_int_t)n->recalls, "mesh_spans_done_total",
			 (json_int_t)n->spans_done, "mesh_evictions_total", (json_int_t)n->evictions,
			 "mesh_stale_messages_total", (json_int_t)n->stale);
}

char *status_json(const struct coordinator *co, bool with_counters)
{
	struct coord_now now = coord_now(co->coord);
	char waiting[256];
	json_t *o;

	coord_waiting_for(co->coord, waiting, sizeof(waiting));
	o = json_pack("{so ss sI sI sI so so so so}", "job", text_json(co->self->job), "phase", phase_name[now.phase],
		      "step", (json_int_t)now.step, "steps", (json_int_t)co->cfg.job->steps, "epoch",
		      (json_int_t)now.epoch, "waiting_for", text_json(waiting), "run_dir", text_json(co->run_dir.path),
		      "counters", own_counters(co), "members", members_json(co, with_counters));
	return dump(o);
}

/* -------------------------------------------------------------------- events */

char *event_step(const struct step_record *r)
{
	char line[1024];
	int n = step_record_json(r, line, sizeof(line));
	json_t *o = n > 0 ? json_loadb(line, (size_t)n, 0, NULL) : NULL;

	if (o)
		json_object_set_new(o, "event", json_string("step"));
	return dump(o);
}

char *event_phase(const struct coordinator *co)
{
	struct coord_now now = coord_now(co->coord);

	return dump(json_pack("{ss ss sI sI sI}", "event", "phase", "phase", phase_name[now.phase], "step",
			      (json_int_t)now.step, "steps", (json_int_t)co->cfg.job->steps, "epoch",
			      (json_int_t)now.epoch));
}

char *event_note(const char *text)
{
	return dump(json_pack("{ss so}", "event", "note", "text", text_json(text)));
}

char *event_member(const struct peer *p, bool joined)
{
	return dump(json_pack("{ss si ss sb}", "event", "member", "member", (int)p->member, "role",
			      role_text(conn_role(p->c)), "joined", joined));
}

char *event_plan(const struct peer *p)
{
	return dump(json_pack("{ss si ss sI si}", "event", "plan", "member", (int)p->member, "role",
			      role_text(conn_role(p->c)), "planned_bytes", (json_int_t)p->planned_bytes, "max_span",
			      (int)p->max_span));
}

/* ------------------------------------------------------------------- summary */

static void add_training(const struct coordinator *co, json_t *o)
{
	uint64_t version;
	double loss;

	if (co->has_last) {
		json_object_set_new(o, "steps", json_integer((json_int_t)co->last.step));
		json_object_set_new(o, "tokens", json_integer((json_int_t)co->last.tokens));
		json_object_set_new(o, "loss", json_real(co->last.loss));
	}
	if (coord_validation(co->coord, &version, &loss)) {
		json_object_set_new(o, "validation_loss", json_real(loss));
		json_object_set_new(o, "validation_version", json_integer((json_int_t)version));
	}
}

char *summary_json(const struct coordinator *co, bool with_event)
{
	json_t *o = json_pack("{so si so sf si so}", "job", text_json(co->self->job), "exit", (int)co->exit_code,
			      "text", text_json(co->text), "seconds", clock_seconds(clock_now_ns() - co->started_ns),
			      "steps", 0, "members", members_json(co, false));
	char model[PATH_MAX + 8];

	if (!o)
		return NULL;
	add_training(co, o);
	snprintf(model, sizeof(model), "%s/model", co->run_dir.path);
	json_object_set_new(o, "model", coord_now(co->coord).phase == PHASE_DONE ? text_json(model) : json_null());
	if (with_event)
		json_object_set_new(o, "event", json_string("summary"));
	return dump(o);
}
