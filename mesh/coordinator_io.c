/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The coordinator's shell: sockets, files and the clock around the state
 * machine (coordinator.c), which decides everything.
 *
 * Every event goes in by one coord_ call, and coordinator_drain then carries out
 * what came of it, in order, before the loop goes on. The header of what we send
 * follows coord_now. Ten times a second the clock is an event; if the loop itself
 * was late by more than a second the members may have been heard in vain, and all
 * timers restart (rule 14).
 *
 * The end: SHUTDOWN to everybody, summary.json, then as long as it takes to
 * flush, END_SECONDS at most. It comes by COORD_FINISH, or by coordinator_fail
 * when the shell itself cannot go on (a disk that is full): the state machine is
 * then not asked any more.
 */
#include "mesh/shell.h"
#include "mesh/wire_internal.h"

#include <assert.h>
#include <errno.h>
#include <event2/event.h>
#include <openssl/rand.h>
#include <stdlib.h>
#include <string.h>

#define TICK_NS 100000000ull
#define STALL_NS 1000000000ull
#define END_SECONDS 2
#define HEARTBEAT_TIMEOUT_NS 10000000000ull
#define JOIN_TIMEOUT_NS 600000000000ull

/* ------------------------------------------------------------------- the end */

static void write_summary(struct coordinator *co)
{
	char *json = summary_json(co, false), *event = summary_json(co, true);
	struct err e;

	if (!json || run_dir_summary(&co->run_dir, json, &e) < 0)
		log_error(co->self->log, "%s", json ? e.text : "out of memory for summary.json");
	peers_tell(co, event);
	free(json);
	free(event);
}

static void finish(struct coordinator *co, uint32_t exit_code, const char *text)
{
	struct timeval grace = { .tv_sec = END_SECONDS };

	if (co->finished)
		return;
	co->finished = true;
	co->exit_code = exit_code;
	snprintf(co->text, sizeof(co->text), "%s", text);
	if (exit_code == EXIT_OK)
		log_info(co->self->log, "the job is done: %s", text);
	else
		log_info(co->self->log, "the job ends with exit code %u: %s", exit_code, text); /* told by the caller */
	export_free(co->export);
	co->export = NULL;
	write_summary(co);
	peers_end(co, exit_code, text);
	event_del(co->tick);
	if (TAILQ_EMPTY(&co->peers))
		event_base_loopbreak(co->self->base);
	event_add(co->deadline, &grace);
}

void coordinator_fail(struct coordinator *co, const char *fmt, ...)
{
	char text[sizeof(co->text)];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	finish(co, EXIT_JOB_FAILED, text);
}

static void on_deadline(evutil_socket_t fd, short what, void *ctx)
{
	struct coordinator *co = ctx;

	(void)fd;
	(void)what;
	event_base_loopbreak(co->self->base);
}

/* ------------------------------------------------------------------- actions */

static void follow_state(struct coordinator *co)
{
	struct coord_now now = coord_now(co->coord);

	co->self->branch = now.branch;
	co->self->term = now.term;
	co->self->epoch = now.epoch;
	co->self->step = now.step;
}

/* The state machine knows ids and numbers; what a member needs besides is ours. */
static void complete_welcome(const struct coordinator *co, const struct peer *p, struct msg_welcome *m)
{
	const struct job_config *job = co->cfg.job;

	memcpy(m->job_id, co->job_id, sizeof(m->job_id));
	snprintf(m->profile, sizeof(m->profile), "%s", co->cfg.profile);
	m->config.data = (const uint8_t *)co->config;
	m->config.bytes = (uint32_t)strlen(co->config);
	if (co->one_host)
		m->host_members = conn_role(p->c) == ROLE_SHARD ? job->shards : job->workers;
}

static void do_send(struct coordinator *co, struct coord_action *a)
{
	struct peer *p = peer_of(co, a->member);
	int rc;

	/* Its connection has ended already, and the state machine will hear of it. */
	if (!p)
		return;
	if (a->msg_type == WIRE_WELCOME)
		complete_welcome(co, p, &a->msg.welcome);
	if (a->msg_type == WIRE_SHUTDOWN)
		p->told = true;
	rc = conn_send(p->c, a->msg_type, &a->msg);
	if (rc == -ENOBUFS)
		conn_close(p->c, "it does not read what is sent to it");
	else if (rc < 0 && rc != -EPIPE)
		coordinator_fail(co, "%s cannot be sent to %s: %s", wire_name(a->msg_type), conn_peer_text(p->c),
				 strerror(-rc));
}

static void do_close(struct coordinator *co, const struct coord_action *a)
{
	struct peer *p = peer_of(co, a->member);

	if (!p)
		return;
	co->by_member[a->member] = NULL;
	p->member = 0;
	conn_close(p->c, a->text);
}

static void do_line(struct coordinator *co, const struct step_record *r)
{
	char line[1024], *event;
	struct err e;
	int n = step_record_json(r, line, sizeof(line));

	assert(n > 0);
	if (run_dir_line(&co->run_dir, line, (size_t)n, &e) < 0) {
		coordinator_fail(co, "%s", e.text);
		return;
	}
	co->last = *r;
	co->has_last = true;
	event = event_step(r);
	peers_tell(co, event);
	free(event);
}

static int send_read(void *ctx, uint32_t member, const struct msg_export_read *m)
{
	struct coordinator *co = ctx;
	struct peer *p = peer_of(co, member);

	return p ? conn_send(p->c, WIRE_EXPORT_READ, m) : -EPIPE;
}

static void do_export(struct coordinator *co)
{
	const struct coord_member *m;
	uint32_t *shards = calloc(co->cfg.job->shards, sizeof(*shards));
	struct export_config cfg = {
		.job = co->cfg.job,
		.run_dir = co->run_dir.path,
		.shards = shards,
		.send = send_read,
		.ctx = co,
	};
	struct err e = { .text = "out of memory to write the model" };
	int rc = -ENOMEM;

	for (uint32_t i = 0; shards && (m = coord_member_at(co->coord, i)); i++)
		if (m->role == ROLE_SHARD && cfg.n_shards < co->cfg.job->shards)
			shards[cfg.n_shards++] = m->id;
	if (shards)
		rc = export_open(&cfg, &co->export, &e);
	free(shards);
	if (rc < 0)
		coord_exported(co->coord, rc, e.text, clock_now_ns());
}

static void do_note(struct coordinator *co, const char *text)
{
	char *event = event_note(text);

	log_info(co->self->log, "%s", text);
	peers_tell(co, event);
	free(event);
}

static void carry_out(struct coordinator *co, struct coord_action *a)
{
	switch (a->type) {
	case COORD_SEND:
		do_send(co, a);
		break;
	case COORD_CLOSE:
		do_close(co, a);
		break;
	case COORD_LINE:
		do_line(co, &a->record);
		break;
	case COORD_EXPORT:
		do_export(co);
		break;
	case COORD_FINISH:
		finish(co, a->exit_code, a->text);
		break;
	case COORD_NOTE:
		do_note(co, a->text);
		break;
	}
}

void coordinator_drain(struct coordinator *co)
{
	follow_state(co);
	while (!co->finished && coord_next(co->coord, &co->action)) {
		follow_state(co);
		carry_out(co, &co->action);
	}
	if (co->phase != coord_now(co->coord).phase) {
		char *event = event_phase(co);

		co->phase = coord_now(co->coord).phase;
		peers_tell(co, event);
		free(event);
	}
}

/* --------------------------------------------------------------------- clock */

static void on_tick(evutil_socket_t fd, short what, void *ctx)
{
	struct coordinator *co = ctx;
	uint64_t now = clock_now_ns();

	(void)fd;
	(void)what;
	if (now - co->last_tick_ns > TICK_NS + STALL_NS) {
		log_warn(co->self->log, "this process stood still for %.1f s: all timers restart",
			 clock_seconds(now - co->last_tick_ns));
		coord_stalled(co->coord, now);
	} else {
		coord_tick(co->coord, now);
	}
	co->last_tick_ns = now;
	coordinator_drain(co);
}

/* ------------------------------------------------------------------ lifetime */

static double lr_of(void *ctx, uint64_t adam_t)
{
	return schedule_lr(ctx, adam_t);
}

static int open_state(struct coordinator *co, struct err *e)
{
	const struct job_config *job = co->cfg.job;
	const struct coord_config cfg = {
		.n_shards = job->shards,
		.n_workers = job->workers,
		.n_micro = co->cfg.batch.n_micro,
		.n_eval = job->eval_batches,
		.steps = job->steps,
		.eval_interval = job->eval_interval,
		.state_hash_interval = job->state_hash_interval,
		.tokens_per_step = co->cfg.batch.train_batch_size * job->data.sequence_length,
		.gradient_clipping = job->gradient_clipping,
		.beta1 = job->optimizer.beta1,
		.beta2 = job->optimizer.beta2,
		.bias_correction = job->optimizer.bias_correction,
		.lr = lr_of,
		.ctx = (void *)(uintptr_t)job,
		.heartbeat_timeout_ns = HEARTBEAT_TIMEOUT_NS,
		.join_timeout_ns = JOIN_TIMEOUT_NS,
	};
	int rc = coord_new(&cfg, clock_now_ns(), &co->coord);

	return rc < 0 ? err_set(e, rc, "out of memory for the coordinator") : 0;
}

static int open_config(struct coordinator *co, struct err *e)
{
	struct msg_welcome m = { .member = 1 };
	int rc = job_config_dump(co->cfg.job, &co->config, e);

	if (rc < 0)
		return rc;
	/* That it fits a message is known now, not when the first member joins. */
	m.config.data = (const uint8_t *)co->config;
	m.config.bytes = (uint32_t)strlen(co->config);
	snprintf(m.profile, sizeof(m.profile), "%s", co->cfg.profile);
	if (wire_size(WIRE_WELCOME, &m) < 0)
		return err_set(e, -EINVAL, "the config has %u bytes and cannot be sent to members", m.config.bytes);
	return 0;
}

static int open_events(struct coordinator *co, struct err *e)
{
	struct timeval each = { .tv_usec = TICK_NS / 1000 };

	co->tick = event_new(co->self->base, -1, EV_PERSIST, on_tick, co);
	co->deadline = event_new(co->self->base, -1, 0, on_deadline, co);
	if (!co->tick || !co->deadline || event_add(co->tick, &each) < 0)
		return err_set(e, -ENOMEM, "out of memory for the coordinator");
	co->last_tick_ns = clock_now_ns();
	return 0;
}

static int open_listener(struct coordinator *co, struct err *e)
{
	const char *endpoint;
	int rc = conn_listen(co->self, co->cfg.listen, peer_accepted, co, &co->listener, e);

	if (rc < 0)
		return rc;
	endpoint = conn_listener_endpoint(co->listener);
	co->one_host = strncmp(endpoint, "127.", 4) == 0 || strncmp(endpoint, "[::1]", 5) == 0;
	log_info(co->self->log, "job '%s' waits for its members at %s", co->self->job, endpoint);
	return run_dir_endpoint(&co->run_dir, endpoint, e);
}

int coordinator_open(struct mesh_self *self, const struct coordinator_config *cfg, struct coordinator **out,
		     struct err *e)
{
	struct coordinator *co = calloc(1, sizeof(*co));
	int rc;

	assert(self->role == ROLE_COORDINATOR);
	if (!co)
		return err_set(e, -ENOMEM, "out of memory for the coordinator");
	co->self = self;
	co->cfg = *cfg;
	co->started_ns = clock_now_ns();
	co->run_dir.lock_fd = -1;
	TAILQ_INIT(&co->peers);
	rc = RAND_bytes(co->job_id, sizeof(co->job_id)) == 1 ? 0 : err_set(e, -EIO, "no random bytes for the job's id");
	if (rc == 0)
		rc = open_config(co, e);
	if (rc == 0)
		rc = open_state(co, e);
	if (rc == 0)
		rc = run_dir_open(&co->run_dir, cfg->run_dir, self->job, co->job_id, co->config, e);
	if (rc == 0)
		rc = open_events(co, e);
	if (rc == 0)
		rc = open_listener(co, e);
	if (rc < 0) {
		coordinator_free(co);
		return rc;
	}
	follow_state(co);
	*out = co;
	return 0;
}

const char *coordinator_endpoint(const struct coordinator *c)
{
	return conn_listener_endpoint(c->listener);
}

void coordinator_stop(struct coordinator *c, uint32_t exit_code)
{
	if (c->finished)
		return;
	coord_stop(c->coord, exit_code, clock_now_ns());
	coordinator_drain(c);
}

int coordinator_run(struct coordinator *c, struct err *e)
{
	event_base_dispatch(c->self->base);
	if (!c->finished)
		finish(c, EXIT_JOB_FAILED, "the coordinator's loop ended");
	if (c->exit_code != EXIT_OK)
		err_set(e, -ECANCELED, "%s", c->text);
	return (int)c->exit_code;
}

void coordinator_free(struct coordinator *c)
{
	struct peer *p;

	if (!c)
		return;
	while ((p = TAILQ_FIRST(&c->peers))) {
		TAILQ_REMOVE(&c->peers, p, all);
		conn_free(p->c);
		free(p->choices);
		free(p);
	}
	conn_listener_free(c->listener);
	if (c->tick)
		event_free(c->tick);
	if (c->deadline)
		event_free(c->deadline);
	export_free(c->export);
	run_dir_release(&c->run_dir);
	coord_free(c->coord);
	free(c->by_member);
	free(c->config);
	free(c);
}
