/* SPDX-License-Identifier: Apache-2.0 */
/* What coordinator_io.c (sockets and files), peers.c (connections) and status.c (JSON) share. */
#ifndef SHARDMESH_MESH_SHELL_H
#define SHARDMESH_MESH_SHELL_H

#include "mesh/export.h"
#include "mesh/mesh.h"
#include "mesh/run_dir.h"

#include <event2/event.h>
#include <sys/queue.h>

#define PEER_WAITS_MAX 2048    /* bytes of a heartbeat that are kept: 64 threads, */
#define PEER_COUNTERS_MAX 6912 /* METRICS_MAX counters */

#define PEER_CHOICES_MAX 4096 /* of a worker: what it has tried of the fabric */

/* What came of a worker's trying one provider of the fabric with one shard service. */
struct choice {
	uint32_t shard;
	bool chosen;
	char provider[32], text[256];
};

/* A connection to the coordinator, from its accept on. */
struct peer {
	TAILQ_ENTRY(peer) all;
	struct coordinator *owner;
	struct conn *c;
	uint32_t member;    /* 0: not registered, or not one of us any more */
	bool watches, told; /* told: SHUTDOWN was sent */
	uint64_t planned_bytes;
	uint32_t max_span, waits_bytes, counters_bytes;
	uint8_t waits[PEER_WAITS_MAX], counters[PEER_COUNTERS_MAX];
	uint32_t n_choices;
	struct choice *choices; /* in the order in which they were made */
};
TAILQ_HEAD(peer_list, peer);

struct coordinator {
	struct mesh_self *self;
	struct coordinator_config cfg;
	struct coord *coord;
	struct conn_listener *listener;
	struct event *tick, *deadline;
	struct run_dir run_dir;
	struct export *export; /* PHASE_EXPORT */
	char *config;          /* the resolved config, JSON */
	uint8_t job_id[16];
	bool one_host; /* it listens on a loopback address: everybody is on this host */
	struct peer_list peers;
	struct peer **by_member; /* by member id; NULL where gone */
	uint32_t n_by_member;
	uint64_t started_ns, last_tick_ns;
	enum coord_phase phase; /* that the observers know of */
	bool has_last;
	struct step_record last;
	bool finished;
	uint32_t exit_code;
	char text[512];
	struct coord_action action;
};

/* ------------------------------------------------------------ coordinator_io */

/* Carries out what the state machine wants; after every event. */
void coordinator_drain(struct coordinator *co);
/* The shell's own trouble (a full disk): the job ends. */
void coordinator_fail(struct coordinator *co, const char *fmt, ...) PRINTF_LIKE(2, 3);

/* --------------------------------------------------------------------- peers */

void peer_accepted(void *coordinator, struct conn *c);
struct peer *peer_of(const struct coordinator *co, uint32_t member); /* NULL: gone */
/* A PROGRESS to every observer that watches. */
void peers_tell(struct coordinator *co, const char *json);
/* SHUTDOWN to everybody who has not heard it, and the end of all connections. */
void peers_end(struct coordinator *co, uint32_t exit_code, const char *text);

/* -------------------------------------------------------------------- status */

/* All return malloced text, or NULL when memory is short. */
char *status_json(const struct coordinator *co, bool with_counters);
char *summary_json(const struct coordinator *co, bool with_event);
/* Events for observers. */
char *event_step(const struct step_record *r);
char *event_phase(const struct coordinator *co);
char *event_note(const char *text);
char *event_member(const struct peer *p, bool joined);
char *event_plan(const struct peer *p);
/* "shard service", "worker", ... */
const char *role_text(enum member_role role);

#endif
