/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Who is here. Members sit on seats that are allocated once; ids only grow, so
 * that the list by id is kept by appending. Until the first step nobody is
 * missed: who goes while the members gather is simply gone. After that a
 * worker's spans are open again, and a shard service's loss ends the job.
 */
#include "mesh/coord.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

static uint32_t place_of(const struct coord *c, uint32_t member)
{
	uint32_t low = 0, high = c->n_here;

	while (low < high) {
		uint32_t mid = low + (high - low) / 2;

		if (c->here[mid]->pub.id < member)
			low = mid + 1;
		else
			high = mid;
	}
	return low;
}

struct seat *coord_seat(const struct coord *c, uint32_t member)
{
	uint32_t at = place_of(c, member);

	return at < c->n_here && c->here[at]->pub.id == member ? c->here[at] : NULL;
}

const struct coord_member *coord_member_at(const struct coord *c, uint32_t index)
{
	return index < c->n_here ? &c->here[index]->pub : NULL;
}

/* -------------------------------------------------------------- registering */

static int refuse(const struct coord *c, enum member_role role, const struct msg_registration *m, struct err *e)
{
	if (role != ROLE_SHARD && role != ROLE_WORKER)
		return err_set(e, -EPERM, "only shard services and workers register");
	if (c->phase == PHASE_EXPORT)
		return err_set(e, -EPERM, "the job has done its steps and writes the model");
	if (c->phase > PHASE_EXPORT)
		return err_set(e, -EPERM, "the job is over");
	if (role == ROLE_SHARD && c->n_role[ROLE_SHARD] == c->cfg.n_shards)
		return err_set(e, -EPERM, "the job has its %u shard services", c->cfg.n_shards);
	if (role == ROLE_SHARD && !m->listen[0])
		return err_set(e, -EPERM, "a shard service must say where workers reach it");
	if (!c->n_spare)
		return err_set(e, -EPERM, "the job has %u members, which is the most it can have", c->n_here);
	return 0;
}

/* The lowest index that no member of the role on this host has. */
static uint32_t host_index(const struct coord *c, enum member_role role, uint64_t host_id)
{
	uint64_t taken[MEMBERS_MAX / 64] = { 0 };
	uint32_t at = 0;

	for (uint32_t i = 0; i < c->n_here; i++) {
		const struct seat *s = c->here[i];

		if (s->pub.role == role && s->pub.host_id == host_id)
			taken[s->host_index / 64] |= 1ull << s->host_index % 64;
	}
	while (taken[at / 64] >> at % 64 & 1)
		at++;
	return at;
}

static uint32_t host_place(const struct coord *c, const struct seat *s)
{
	uint32_t at = 0;

	while (at < c->n_here &&
	       (c->by_host[at]->pub.host_id < s->pub.host_id ||
		(c->by_host[at]->pub.host_id == s->pub.host_id && c->by_host[at]->pub.id < s->pub.id)))
		at++;
	return at;
}

static void sit_down(struct coord *c, enum member_role role, const struct msg_registration *m)
{
	struct seat *s = c->spare[c->n_spare - 1];
	uint32_t at;

	memset(s, 0, sizeof(*s));
	s->pub.id = ++c->last_id;
	s->pub.role = role;
	s->pub.pid = m->pid;
	s->pub.host_id = m->host_id;
	s->pub.last_seen_ns = s->joined_ns = c->now_ns;
	memcpy(s->pub.host, m->host, sizeof(s->pub.host));
	memcpy(s->pub.listen, m->listen, sizeof(s->pub.listen));
	s->host_index = host_index(c, role, m->host_id);
	c->n_spare--;
	at = host_place(c, s);
	memmove(c->by_host + at + 1, c->by_host + at, (c->n_here - at) * sizeof(struct seat *));
	c->by_host[at] = s;
	c->here[c->n_here++] = s;
	c->n_role[role]++;
	c->epoch++;
	c->view_changed = true;
}

int coord_register(struct coord *c, enum member_role role, const struct msg_registration *m, uint64_t now_ns,
		   uint32_t *member, struct err *e)
{
	const struct seat *s;
	char who[128];
	int rc;

	c->now_ns = now_ns;
	rc = refuse(c, role, m, e);
	if (rc)
		return rc;
	sit_down(c, role, m);
	s = c->here[c->n_here - 1];
	*member = s->pub.id;
	coord_out(c, OUT_WELCOME, s->pub.id);
	coord_note(c, "%s joined", coord_who(s, who));
	coord_settle(c);
	return 0;
}

/* -------------------------------------------------------------------- idle */

void coord_idle_add(struct coord *c, struct seat *s)
{
	assert(!s->idle && s->pub.ready && !s->pub.lease.id);
	s->idle = true;
	s->idle_next = NULL;
	s->idle_prev = c->idle_last;
	if (c->idle_last)
		c->idle_last->idle_next = s;
	else
		c->idle_first = s;
	c->idle_last = s;
}

void coord_idle_remove(struct coord *c, struct seat *s)
{
	if (!s->idle)
		return;
	s->idle = false;
	if (s->idle_prev)
		s->idle_prev->idle_next = s->idle_next;
	else
		c->idle_first = s->idle_next;
	if (s->idle_next)
		s->idle_next->idle_prev = s->idle_prev;
	else
		c->idle_last = s->idle_prev;
}

void coord_count_spans(struct coord *c)
{
	c->max_span = UINT32_MAX;
	for (uint32_t i = 0; i < c->n_here; i++) {
		const struct seat *s = c->here[i];

		if (s->pub.role == ROLE_WORKER && s->pub.ready && s->max_span < c->max_span)
			c->max_span = s->max_span;
	}
}

/* ------------------------------------------------------------------- going */

static void stand_up(struct coord *c, struct seat *s)
{
	uint32_t at = place_of(c, s->pub.id);

	memmove(c->here + at, c->here + at + 1, (c->n_here - at - 1) * sizeof(struct seat *));
	at = host_place(c, s);
	memmove(c->by_host + at, c->by_host + at + 1, (c->n_here - at - 1) * sizeof(struct seat *));
	c->n_here--;
	c->spare[c->n_spare++] = s;
	c->n_role[s->pub.role]--;
	c->n_ready[s->pub.role] -= s->pub.ready;
	c->epoch++;
	c->view_changed = true;
}

static void remove_worker(struct coord *c, struct seat *s)
{
	coord_idle_remove(c, s);
	if (s->pub.lease.id)
		coord_lease_ended(c, s, true);
	stand_up(c, s);
	if (s->pub.ready)
		coord_count_spans(c);
}

/* A member is not here any more, whatever its connection does. The seat's content stays until the next one sits down. */
static void lose(struct coord *c, struct seat *s, uint32_t exit_code, const char *why)
{
	bool missed = c->phase >= PHASE_PREPARE;
	char who[128];

	coord_who(s, who);
	c->counters.evictions++;
	if (s->pub.role == ROLE_SHARD) {
		stand_up(c, s);
		if (missed) {
			coord_fail(c, exit_code, "%s was lost: %s", who, why);
			return;
		}
	} else {
		remove_worker(c, s);
		if (missed && c->phase < PHASE_EXPORT && !c->n_role[ROLE_WORKER]) {
			coord_fail(c, exit_code, "%s, the last worker, was lost: %s", who, why);
			return;
		}
	}
	coord_note(c, "%s is gone: %s", who, why);
}

void coord_evict(struct coord *c, struct seat *s, uint32_t exit_code, const char *why)
{
	coord_out_text(c, OUT_SHUTDOWN, s->pub.id, exit_code, why);
	coord_out_text(c, OUT_CLOSE, s->pub.id, exit_code, why);
	lose(c, s, exit_code, why);
}

void coord_gone(struct coord *c, uint32_t member, const char *why, uint64_t now_ns)
{
	struct seat *s = coord_seat(c, member);

	c->now_ns = now_ns;
	if (!s || c->phase > PHASE_EXPORT)
		return;
	lose(c, s, EXIT_JOB_FAILED, why);
	coord_settle(c);
}

/* ------------------------------------------------------------------ timers */

/*
 * Who prepares (reads data, allocates, makes its parameters) does so on its
 * control thread, and may be silent for longer. If it dies its connection says
 * so; this is for a host that died with it.
 */
#define PREPARE_PATIENCE 6

static uint64_t silence_allowed_ns(const struct coord *c, const struct seat *s)
{
	return c->cfg.heartbeat_timeout_ns * (s->pub.ready ? 1 : PREPARE_PATIENCE);
}

static bool too_late(const struct coord *c, const struct seat *s, char *why, size_t bytes)
{
	if (c->now_ns > s->pub.last_seen_ns + silence_allowed_ns(c, s)) {
		snprintf(why, bytes, "no word from it for %.1f s", clock_seconds(c->now_ns - s->pub.last_seen_ns));
		return true;
	}
	if (c->phase == PHASE_RUN && !s->pub.ready && c->now_ns > s->joined_ns + c->cfg.join_timeout_ns) {
		snprintf(why, bytes, "not ready %.1f s after it joined", clock_seconds(c->now_ns - s->joined_ns));
		return true;
	}
	return false;
}

void coord_tick(struct coord *c, uint64_t now_ns)
{
	char text[COORD_TEXT];

	c->now_ns = now_ns;
	if (c->phase < PHASE_RUN && now_ns > c->started_ns + c->cfg.join_timeout_ns) {
		coord_waiting_for(c, text, sizeof(text));
		coord_fail(c, EXIT_JOB_FAILED, "after %.1f s still waiting for %s",
			   clock_seconds(now_ns - c->started_ns), text);
	}
	/* Downwards, since who goes is taken out. */
	for (uint32_t i = c->n_here; i-- > 0 && c->phase <= PHASE_EXPORT;)
		if (too_late(c, c->here[i], text, sizeof(text)))
			coord_evict(c, c->here[i], EXIT_JOB_FAILED, text);
	coord_settle(c);
}

void coord_stalled(struct coord *c, uint64_t now_ns)
{
	c->now_ns = now_ns;
	for (uint32_t i = 0; i < c->n_here; i++)
		c->here[i]->pub.last_seen_ns = c->here[i]->joined_ns = now_ns;
	c->started_ns = now_ns;
}
