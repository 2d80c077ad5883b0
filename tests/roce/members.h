/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Members of a job in one process, over verbs: one that serves, as a shard
 * service does, and peers that connect to it. Each has a fabric of its own, and
 * so a device context, protection domains and keys of its own; signals go from
 * one to the other as the control connection would carry them.
 */
#ifndef SHARDMESH_TEST_MEMBERS_H
#define SHARDMESH_TEST_MEMBERS_H

#include "rdma/verbs/verbs.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#define JOB "roce"
#define PEERS 2
#define WAIT_NS (30 * VB_S)

#define need(what)                                                              \
	do {                                                                    \
		if (!(what)) {                                                  \
			printf("FAIL: %s:%d: %s\n", __FILE__, __LINE__, #what); \
			exit(1);                                                \
		}                                                               \
	} while (0)

struct peer {
	struct fab *f;
	struct fab_ep *ep, *served; /* its side, and the server's */
	bool deaf;                  /* not polled: it does as it likes */
	bool connected, down;
	int status;
	uint64_t reads, writes, failed;
	struct fab_blob address, said; /* what it was given; its last signal */
};

struct members {
	const struct fab_ops *ops;
	struct fab_options o;
	struct log log, peer_log; /* the server's, all peers' */
	struct fab *server;
	struct peer peer[PEERS];
	uint64_t notices[PEERS];
	uint64_t protests; /* signals that the server took for an attack */
	void (*done)(struct members *, uint32_t i, const struct fab_event *ev); /* may be NULL */
};

static inline struct fab *member_open(struct members *m, uint32_t number, struct log *log)
{
	const struct fab_config cfg = { .job = JOB, .member = number, .options = &m->o, .log = log };
	struct fab *f = NULL;
	struct err e = { 0 };

	if (m->ops->open(&cfg, &f, &e))
		printf("%s\n", e.text);
	need(f);
	return f;
}

static inline void members_open(struct members *m, enum fab_connect how)
{
	m->ops = fab_provider("verbs");
	need(m->ops);
	m->o.connect = how;
	log_init(&m->log, STDOUT_FILENO, "server");
	m->log.format = LOG_TEXT;
	m->log.level = LOG_WARN;
	m->peer_log = m->log;
	snprintf(m->peer_log.who, sizeof(m->peer_log.who), "peers");
	m->server = member_open(m, 1, &m->log);
	for (uint32_t i = 0; i < PEERS; i++)
		m->peer[i].f = member_open(m, 2 + i, &m->peer_log);
}

static inline void members_close(struct members *m)
{
	for (uint32_t i = 0; i < PEERS; i++)
		m->ops->close(m->peer[i].f);
	m->ops->close(m->server);
}

static inline void on_server_event(struct members *m, const struct fab_event *ev)
{
	struct peer *p = &m->peer[ev->user];

	switch (ev->type) {
	case FAB_EV_ACCEPTED:
		need(!p->served);
		p->served = ev->ep;
		break;
	case FAB_EV_SIGNAL:
		if (!p->deaf)
			need(m->ops->signal(p->f, ev->user, ev->blob) == 0);
		break;
	case FAB_EV_NOTICE:
		m->notices[ev->user]++;
		break;
	default:
		break;
	}
}

static inline void on_peer_event(struct members *m, uint32_t i, const struct fab_event *ev)
{
	struct peer *p = &m->peer[i];

	switch (ev->type) {
	case FAB_EV_CONNECTED:
		p->connected = true;
		break;
	case FAB_EV_SIGNAL:
		p->said = *ev->blob;
		m->protests += m->ops->signal(m->server, i, ev->blob) != 0;
		break;
	case FAB_EV_DOWN:
		p->down = true;
		p->status = ev->status;
		break;
	case FAB_EV_READ:
	case FAB_EV_WRITE:
		p->reads += ev->type == FAB_EV_READ && !ev->status;
		p->writes += ev->type == FAB_EV_WRITE && !ev->status;
		p->failed += ev->status != 0;
		if (m->done)
			m->done(m, i, ev);
		break;
	default:
		break;
	}
}

static inline void members_turn(struct members *m)
{
	struct fab_event ev[32];
	uint32_t n = m->ops->poll(m->server, ev, ARRAY_LEN(ev));

	for (uint32_t k = 0; k < n; k++)
		on_server_event(m, &ev[k]);
	for (uint32_t i = 0; i < PEERS; i++) {
		n = m->peer[i].deaf ? 0 : m->ops->poll(m->peer[i].f, ev, ARRAY_LEN(ev));
		for (uint32_t k = 0; k < n; k++)
			on_peer_event(m, i, &ev[k]);
	}
}

/* Turns until `what`, which must come. */
#define turn_until(m, what)                                       \
	do {                                                      \
		const uint64_t until_ = clock_now_ns() + WAIT_NS; \
                                                                  \
		while (!(what)) {                                 \
			if (clock_now_ns() > until_)              \
				printf("in vain: %s\n", #what);   \
			need(clock_now_ns() <= until_);           \
			members_turn(m);                          \
		}                                                 \
	} while (0)

/* By the address that it has. */
static inline void peer_dial(struct members *m, uint32_t i)
{
	struct peer *p = &m->peer[i];

	p->connected = p->down = p->deaf = false;
	need(m->ops->connect(p->f, &p->address, i, &p->ep) == 0);
}

static inline void peer_connect(struct members *m, uint32_t i)
{
	need(m->ops->address(m->server, i, &m->peer[i].address) == 0);
	peer_dial(m, i);
	turn_until(m, m->peer[i].connected && m->peer[i].served);
}

/* The server's side: what an eviction is. */
static inline void peer_evict(struct members *m, uint32_t i)
{
	m->ops->disconnect(m->peer[i].served);
	m->peer[i].served = NULL;
}

static inline void peer_leave(struct members *m, uint32_t i)
{
	m->ops->disconnect(m->peer[i].ep);
	m->peer[i].ep = NULL;
}

static inline struct fab_region *memory_new(struct members *m, struct fab *f, const char *name, uint64_t bytes,
					    enum fab_access access, void *at)
{
	const struct fab_region_attr a = { .name = name, .bytes = bytes, .access = access, .at = at };
	struct fab_region *r = NULL;
	struct err e = { 0 };

	if (m->ops->region_open(f, &a, &r, &e))
		printf("%s\n", e.text);
	need(r);
	return r;
}

/* The server's region as peer i has it. */
static inline struct fab_remote *memory_pass(struct members *m, uint32_t i, struct fab_region *r, struct fab_blob *blob)
{
	struct fab_remote *remote = NULL;

	need(m->ops->export_region(m->peer[i].served, r, blob) == 0);
	need(m->ops->import_region(m->peer[i].ep, blob, &remote) == 0);
	return remote;
}

static inline enum fab_connect connect_named(const char *name)
{
	struct fab_options o = { 0 };
	struct err e = { 0 };

	if (fab_options_set(&o, "connect", name, &e))
		printf("%s\n", e.text);
	need(!e.text[0]);
	return o.connect;
}

#endif
