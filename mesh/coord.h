/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The coordinator's insides, shared by its four files: coordinator.c (events),
 * coord_members.c (who is here), coord_step.c (what happens next), coord_out.c
 * (actions on their way out, and texts). Private to mesh.
 */
#ifndef SHARDMESH_MESH_COORD_H
#define SHARDMESH_MESH_COORD_H

#include "mesh/commit.h"
#include "mesh/lease.h"

/* Actions wait here in a compact form; a text or a message is made when it is taken. */
enum out_kind {
	OUT_WELCOME,
	OUT_TABLE, /* MEMBER for each in its view, then EPOCH */
	OUT_STEP,  /* the step message with the member's lease */
	OUT_JOIN,  /* the same to one that came in the middle of the step: nothing to commit */
	OUT_LEASE,
	OUT_RECALL,
	OUT_RELAY, /* the message of the event at hand */
	OUT_SHUTDOWN,
	OUT_CLOSE,
	OUT_LINE,
	OUT_EXPORT,
	OUT_FINISH,
	OUT_NOTE,
};
struct out {
	enum out_kind kind;
	uint32_t member, text, exit_code;
};

#define COORD_TEXT 320
/* One call may evict everybody, with two texts each, and tell everybody else a few things. */
#define COORD_TEXTS (2 * MEMBERS_MAX + 64)
#define COORD_OUTS (8 * MEMBERS_MAX + 64)

struct seat {
	struct coord_member pub;
	uint64_t joined_ns, fingerprint;
	uint32_t max_span, host_index;
	bool voted, applied; /* shard services: the open step, the committed one */
	struct exact_sum vote;
	struct hash128 hash;
	struct seat *idle_prev, *idle_next; /* workers that could take a lease */
	bool idle;
};

struct coord {
	struct coord_config cfg;
	enum coord_phase phase;
	uint32_t branch;
	uint64_t term, epoch, now_ns, started_ns;
	struct coord_counters counters;

	struct seat *seats, **spare; /* MEMBERS_MAX; those that nobody sits on */
	struct seat **here;          /* by id */
	struct seat **by_host;       /* the same, by host, then id */
	uint32_t n_here, n_spare, last_id;
	uint32_t n_role[ROLE_OBSERVER], n_ready[ROLE_OBSERVER];
	struct seat *idle_first, *idle_last;
	uint32_t max_span;    /* the smallest of the workers that are ready */
	uint64_t fingerprint; /* of the training data, by the first worker that was ready */
	bool fingerprint_known;
	bool view_changed; /* members came or went since the last OUT_TABLE */

	uint64_t open_step; /* 0: none */
	uint64_t last_step; /* the highest one opened */
	uint64_t opened_ns;
	struct trouble trouble; /* of the open step */
	uint32_t trouble_units; /* the votes' */
	uint32_t n_votes, n_leases[LEASE_EVAL + 1];
	struct lease_table leases;
	struct loss_tree loss[LEASE_EVAL + 1]; /* by lease kind */
	uint64_t recalled;                     /* id of the lease that is on its way back, or 0 */
	double seconds_compute, seconds_fetch, seconds_push;
	struct msg_relay relay; /* on its way out; its bytes are the sender's message */

	struct msg_step step_msg; /* of the last commit and the open step */
	bool applying;            /* a committed step waits for its line */
	uint32_t n_applied;
	struct hash128 hash;
	struct step_record record, line; /* of the step that is applied; on its way out */
	bool validated;
	uint64_t validation_version;
	double validation_loss;

	bool stopping;
	uint32_t exit_code;

	struct out *outs; /* a ring */
	uint32_t out_first, n_outs, table_at;
	char (*texts)[COORD_TEXT];
	uint32_t text_next;
};

/* coord_members.c */
struct seat *coord_seat(const struct coord *c, uint32_t member); /* NULL: not a member (any more) */
void coord_idle_add(struct coord *c, struct seat *s);
void coord_idle_remove(struct coord *c, struct seat *s);
/* A worker goes, told so by SHUTDOWN and the end of its connection; a shard service's loss ends the job. */
void coord_evict(struct coord *c, struct seat *s, uint32_t exit_code, const char *why);
/* READY was accepted or a worker left. */
void coord_count_spans(struct coord *c);

/* coord_step.c */
/* Everything that follows from the state as it is: called once at the end of every event. */
void coord_settle(struct coord *c);
void coord_enter(struct coord *c, struct seat *s); /* a worker is ready in the middle of a run */
void coord_lease_ended(struct coord *c, struct seat *s, bool reopen);
/* The job ends now, badly: everybody is told. */
void coord_fail(struct coord *c, uint32_t exit_code, const char *fmt, ...) PRINTF_LIKE(3, 4);
/* It ends well, or was stopped. */
void coord_finish(struct coord *c, const char *text);

/* coord_out.c */
void coord_out(struct coord *c, enum out_kind kind, uint32_t member);
void coord_out_text(struct coord *c, enum out_kind kind, uint32_t member, uint32_t exit_code, const char *text);
void coord_note(struct coord *c, const char *fmt, ...) PRINTF_LIKE(2, 3);
/* "shard service 2 (pid 123 on host)"; returns buf. */
const char *coord_who(const struct seat *s, char buf[128]);

#endif
