/* SPDX-License-Identifier: Apache-2.0 */
/*
 * mesh: how members live together. Three layers, each usable without the next:
 *
 *   1. state machines without I/O: the reduction tree, coverage (an owner's
 *      view of one tree), leases, the coordinator. Event in, actions out; no
 *      clock, no socket, no allocation after init. The simulator drives these.
 *   2. the wire: messages from wire.def, framing, checksums, authentication.
 *   3. shells around libevent: connections, a member's link to the coordinator,
 *      the coordinator's sockets. One control thread a process owns them.
 */
#ifndef SHARDMESH_MESH_H
#define SHARDMESH_MESH_H

#include "base/base.h"
#include "model/model.h"

struct event_base;

/* ======================================================= 1. state machines */

/* ---------------------------------------------------------- reduction tree */

/*
 * A node covers the micro-batches [first, first + 2^level) below M. Canonical:
 * the lowest level that covers the same ones ("a node with one child is that
 * child"). All functions take and give canonical nodes.
 */
struct tree_node {
	uint32_t first, level;
};
struct tree_node tree_canonical(struct tree_node n, uint32_t n_micro);
struct tree_node tree_root(uint32_t n_micro);
uint32_t tree_leaves(struct tree_node n, uint32_t n_micro); /* micro-batches covered */
bool tree_equal(struct tree_node a, struct tree_node b);
bool tree_covers(struct tree_node a, struct tree_node b, uint32_t n_micro); /* a is b or an ancestor of b */
/* False for the root. *left: n is the left child. */
bool tree_sibling(struct tree_node n, uint32_t n_micro, struct tree_node *sibling, struct tree_node *parent,
		  bool *left);
/* False for a leaf. */
bool tree_children(struct tree_node n, uint32_t n_micro, struct tree_node *left, struct tree_node *right);
/* A node that came over the wire: aligned, inside M, canonical. */
bool tree_valid(struct tree_node n, uint32_t n_micro);

/* ---------------------------------------------------------------- coverage */

/*
 * An owner's view of the tree of one (unit, part): which nodes it holds the sum
 * of, which contributions are offered, what to fold next. Protocol rules 7 and
 * 8. Holds sums by id; the memory is the caller's. Folds are decided in an
 * order that is right if they are executed in that order (one queue an owner).
 */
enum offer_verdict { OFFER_GRANTED = 1, OFFER_TAKEN, OFFER_COVERED, OFFER_CLOSED };

#define COVERAGE_HELD_MAX 128
#define COVERAGE_K_MAX 64
#define COVERAGE_NO_SUM UINT32_MAX

/* Sum 0 is the accumulator of this (unit, part); others come from here. */
struct coverage_sums {
	/* must: an always-granted node needs it (a spilled sum then); else COVERAGE_NO_SUM when memory is short. */
	uint32_t (*take)(void *ctx, bool must);
	void (*give)(void *ctx, uint32_t sum);
	void *ctx;
};

enum operand_kind { OPERAND_NONE, OPERAND_SUM, OPERAND_OFFER };
struct operand {
	enum operand_kind kind;
	uint32_t sum;
	uint64_t offer;
};
enum coverage_action_type {
	COVERAGE_ANSWER, /* tell `offer` the verdict (GRANTED, COVERED or CLOSED) */
	COVERAGE_FOLD,   /* dst = a (+ b); the offers among a, b are TAKEN when it is done */
	COVERAGE_ROOT,   /* sum 0 holds the root once the folds before are done */
};
struct coverage_action {
	enum coverage_action_type type;
	uint64_t offer;
	enum offer_verdict verdict;
	uint32_t dst;        /* may be the sum of a or b */
	struct operand a, b; /* a is the left child where b is given */
};

struct coverage_held {
	struct tree_node node;
	uint32_t sum;
};
enum offer_state { OFFER_WAITING, OFFER_PUSHING, OFFER_PUSHED, OFFER_ANSWERED };
struct coverage_offer {
	uint64_t id;
	struct tree_node node;
	enum offer_state state;
	enum offer_verdict verdict; /* answered: what coverage_next will say */
	bool in_place, wanted, eager;
	bool covered;  /* pushing: its node is held by now */
	uint32_t sum;  /* pushing: reserved for it, or COVERAGE_NO_SUM */
	uint32_t next; /* in a list of slots */
};
struct coverage {
	uint32_t n_micro, max_held; /* M, K */
	struct coverage_sums sums;
	uint32_t n_held, n_offers, max_offers;
	struct coverage_held held[COVERAGE_HELD_MAX]; /* by first */
	struct coverage_offer *offer;                 /* slots, in the caller's memory, and three indices into them: */
	uint32_t *by_id, *by_node, *eager;            /* all; not answered and not covered; those of them to act on */
	uint32_t n_by_node, n_eager, n_reserved;
	uint32_t n_slots, free, answers, answers_last, pushed; /* slots ever used; lists of slots */
	bool accumulator_used, root_told, closed;
};

/* Memory for max_offers offers at once. A live worker has at most one a (unit, part). */
size_t coverage_bytes(uint32_t max_offers);
/*
 * A new step: nothing is held, nothing offered. memory: coverage_bytes(max_offers),
 * aligned for a uint64_t, kept by the caller. max_held above COVERAGE_K_MAX is taken
 * as that. Every sum of the step before must have been given back (coverage_close).
 */
void coverage_init(struct coverage *c, uint32_t n_micro, uint32_t max_held, const struct coverage_sums *sums,
		   void *memory, uint32_t max_offers);
/*
 * A contribution is offered. in_place: it can be read where it is, and held by
 * reference until it is wanted or its sibling is there. -EINVAL: node not valid;
 * -ENOSPC: more than max_offers; -EEXIST: the id is known.
 */
int coverage_offer(struct coverage *c, uint64_t id, struct tree_node node, bool in_place, bool wanted);
void coverage_want(struct coverage *c, uint64_t id);
/*
 * The worker takes it back, or died. True: it was waiting or pushing and is forgotten (the verdict is CLOSED, and the
 * caller says it); false: unknown, taken already, or its answer is among the next actions.
 */
bool coverage_withdraw(struct coverage *c, uint64_t id);
/* A granted push is complete in its slot. Nothing happens when the id is unknown (withdrawn, closed). */
void coverage_pushed(struct coverage *c, uint64_t id);
/*
 * After any of the above: the next action, until false. Sums are given back when the fold that reads them last is
 * decided, so queue each action before the next call on any coverage that shares the sums.
 */
bool coverage_next(struct coverage *c, struct coverage_action *out);
bool coverage_complete(const struct coverage *c);
/* The lowest open leaf's largest node without anything held below it; false when nothing is missing. */
bool coverage_lowest_missing(const struct coverage *c, struct tree_node *out);
/* Some offer is wanted and, once coverage_next returned false, refused: only the lowest missing node can help. */
bool coverage_starved(const struct coverage *c);
/* Rule 9: the step is sealed; every offer that is left is answered CLOSED. */
void coverage_close(struct coverage *c);

/* ------------------------------------------------------------------ leases */

enum lease_kind { LEASE_TRAIN = 1, LEASE_EVAL };
struct lease {
	uint64_t id;     /* 0: none */
	uint32_t worker; /* member id */
	enum lease_kind kind;
	struct tree_node node;
	bool recalled;
};

/* ------------------------------------------------------------- coordinator */

#define MEMBERS_MAX 4096 /* of a job at once */
enum member_role { ROLE_SHARD = 1, ROLE_WORKER, ROLE_COORDINATOR, ROLE_OBSERVER };

struct coord_config {
	uint32_t n_shards, n_workers; /* to wait for before the first step */
	uint32_t n_micro, n_eval;     /* M; evaluation micro-batches, 0: none */
	uint64_t steps, eval_interval, state_hash_interval;
	uint64_t tokens_per_step;
	double gradient_clipping, beta1, beta2;
	bool bias_correction;
	double (*lr)(void *ctx, uint64_t adam_t);
	void *ctx;
	uint64_t heartbeat_timeout_ns; /* evicted after this long without a word */
	uint64_t join_timeout_ns;      /* from start to all members ready */
};

/* A line of steps.jsonl. */
struct step_record {
	uint64_t step, tokens, epoch;
	double loss, grad_norm, lr, step_seconds, tokens_per_second, validation_loss;
	bool has_validation_loss, has_state_hash;
	struct hash128 state_hash;
	uint32_t workers, shards;
	double seconds_compute, seconds_fetch, seconds_push; /* summed over workers */
};

/* What was not finite, for a message that names it. */
enum trouble_kind { TROUBLE_NONE, TROUBLE_GRADIENT, TROUBLE_LOSS };
struct trouble {
	enum trouble_kind kind; /* the worst that a worker told of */
	uint32_t micro;         /* the first micro-batch that has it */
	uint32_t unit;          /* of a loss: where it begins; of a gradient: what owners found */
};

enum coord_phase { PHASE_GATHER, PHASE_PREPARE, PHASE_RUN, PHASE_EXPORT, PHASE_DONE, PHASE_FAILED };

enum coord_action_type {
	COORD_SEND,   /* `type` and `msg` to `member` */
	COORD_CLOSE,  /* drop the member's connection; text says why */
	COORD_LINE,   /* append `record` to steps.jsonl */
	COORD_EXPORT, /* all steps done: write model/, then call coord_exported */
	COORD_FINISH, /* end: exit_code and text */
	COORD_NOTE,   /* text for the log and the observers (members come and go, phases) */
};
struct coord_action; /* defined behind the wire structs below */
struct coord;

/* ================================================================ 2. wire */

#define WIRE_MAGIC 0x48534d53u /* "SMSH" */
#define WIRE_PROTOCOL 1u
#define WIRE_BODY_MAX (1u << 20)
#define RELAY_MAX 1024u /* bytes between two workers by way of the coordinator */

struct wire_header { /* as on the wire, little-endian */
	uint32_t magic;
	uint16_t protocol, type;
	uint32_t body_bytes, branch;
	uint64_t term, epoch, step;
	uint32_t sender, zero;
	uint64_t sequence;
	uint64_t hash; /* XXH3-64 of the body, seeded by that of the header with hash = 0 */
};
_Static_assert(sizeof(struct wire_header) == 64, "64-byte header");

struct wire_blob {
	const uint8_t *data;
	uint32_t bytes;
};

enum wire_type {
#define WIRE_MSG(NAME, number, name) WIRE_##NAME = number,
#define WIRE_U32(f)
#define WIRE_U64(f)
#define WIRE_F64(f)
#define WIRE_FIXED(f, n)
#define WIRE_STR(f, max)
#define WIRE_BLOB(f)
#define WIRE_END
#include "mesh/wire.def"
#undef WIRE_MSG
#undef WIRE_U32
#undef WIRE_U64
#undef WIRE_F64
#undef WIRE_FIXED
#undef WIRE_STR
#undef WIRE_BLOB
#undef WIRE_END
};

#define WIRE_MSG(NAME, number, name) struct msg_##name {
#define WIRE_U32(f) uint32_t f;
#define WIRE_U64(f) uint64_t f;
#define WIRE_F64(f) double f;
#define WIRE_FIXED(f, n) uint8_t f[n];
#define WIRE_STR(f, max) char f[max];
#define WIRE_BLOB(f) struct wire_blob f;
/* clang-format off */
#define WIRE_END };
/* clang-format on */
#include "mesh/wire.def"
#undef WIRE_MSG
#undef WIRE_U32
#undef WIRE_U64
#undef WIRE_F64
#undef WIRE_FIXED
#undef WIRE_STR
#undef WIRE_BLOB
#undef WIRE_END

union wire_msg { /* any decoded body */
#define WIRE_MSG(NAME, number, name) struct msg_##name name;
#define WIRE_U32(f)
#define WIRE_U64(f)
#define WIRE_F64(f)
#define WIRE_FIXED(f, n)
#define WIRE_STR(f, max)
#define WIRE_BLOB(f)
#define WIRE_END
#include "mesh/wire.def"
#undef WIRE_MSG
#undef WIRE_U32
#undef WIRE_U64
#undef WIRE_F64
#undef WIRE_FIXED
#undef WIRE_STR
#undef WIRE_BLOB
#undef WIRE_END
};

const char *wire_name(unsigned type); /* NULL when unknown */
/* Body of a message of `type` from its struct; bytes written, or -ENOSPC, -EINVAL. */
int wire_encode(unsigned type, const void *msg, uint8_t *out, size_t max);
/* -EPROTO: unknown type, wrong length, a string without its bounds. Blobs point into body. */
int wire_decode(unsigned type, const uint8_t *body, size_t bytes, union wire_msg *out);
/* Checks magic, protocol, lengths and hash; -EPROTO with the reason. */
int wire_check(const struct wire_header *h, const uint8_t *body, struct err *e);
void wire_seal(struct wire_header *h, const uint8_t *body); /* fills in hash */

/* ------------------------------------------- coordinator, with its messages */

struct coord_action {
	enum coord_action_type type;
	uint32_t member;
	unsigned msg_type; /* enum wire_type */
	union wire_msg msg;
	struct step_record record;
	uint32_t exit_code;
	char text[512];
};

/* Header fields the coordinator's messages carry now. */
struct coord_now {
	uint32_t branch;
	uint64_t term, epoch, step;
	enum coord_phase phase;
};

struct coord_counters {
	/* Messages dropped by rule 2: not a member (any more), another branch, a step or lease not open. */
	uint64_t stale;
	uint64_t leases, recalls, spans_done, evictions;
};

struct coord_member {
	uint32_t id;
	enum member_role role;
	bool ready;
	uint32_t pid;
	uint64_t host_id, last_seen_ns, version;
	char host[64], listen[128];
	struct lease lease; /* a worker's current one */
};

/*
 * All memory is allocated here. After any call with now_ns, take the actions by coord_next until it returns false,
 * before the next one.
 */
int coord_new(const struct coord_config *cfg, uint64_t now_ns, struct coord **out);
void coord_free(struct coord *c);
/* A process registers. *member: its id from now on. -EPERM: e says why it is refused. */
int coord_register(struct coord *c, enum member_role role, const struct msg_registration *m, uint64_t now_ns,
		   uint32_t *member, struct err *e);
/* A decoded message from a member, its header checked against rule 2 by the coordinator itself. */
void coord_message(struct coord *c, uint32_t member, const struct wire_header *h, unsigned type,
		   const union wire_msg *m, uint64_t now_ns);
/* Its connection ended; why: for people. */
void coord_gone(struct coord *c, uint32_t member, const char *why, uint64_t now_ns);
/* Finish the open step and end (Ctrl-C, meshctl stop): exit code after the model is written. */
void coord_stop(struct coord *c, uint32_t exit_code, uint64_t now_ns);
void coord_exported(struct coord *c, int status, const char *text, uint64_t now_ns);
/* The shell's loop stalled: all timers restart (rule 14). Else call a few times a second. */
void coord_tick(struct coord *c, uint64_t now_ns);
void coord_stalled(struct coord *c, uint64_t now_ns);
bool coord_next(struct coord *c, struct coord_action *out);
struct coord_now coord_now(const struct coord *c);
const struct coord_counters *coord_counters(const struct coord *c);
/* For status: members by index until NULL; the open step's leases are in them. */
const struct coord_member *coord_member_at(const struct coord *c, uint32_t index);
/* "vote of shard 2", "span [4,8) of worker 5", "3 of 4 shard services": what the step waits for. */
void coord_waiting_for(const struct coord *c, char *out, size_t bytes);
/* The last validation loss and the version it is of; false when there is none. */
bool coord_validation(const struct coord *c, uint64_t *version, double *loss);

/* =============================================================== 3. shells */

/* ------------------------------------------------------- waits and metrics */

/* What a thread waits for right now: one record a thread, sent with the heartbeat. */
enum wait_kind {
	WAIT_NONE,
	WAIT_LEASE,
	WAIT_UNIT,
	WAIT_GRADIENT_BUFFER,
	WAIT_CONTRIBUTION,
	WAIT_COMMIT,
	WAIT_MEMBERS,
	WAIT_CONNECT,
};
struct wait_record {
	_Atomic uint32_t kind, unit, page, peer;
	_Atomic uint64_t step, since_ns;
};
void wait_begin(struct wait_record *w, enum wait_kind kind, uint64_t step, uint32_t unit, uint32_t page, uint32_t peer);
void wait_end(struct wait_record *w);
/* Packs the n records that wait; bytes written. ages in milliseconds replace since_ns. */
size_t waits_pack(const struct wait_record *w, uint32_t n, uint64_t now_ns, uint8_t *out, size_t max);
/* "worker 3 waits for unit 17 page 4 from shard 5, 1.2 s": one sentence a record; for status. */
size_t waits_text(const char *who, const uint8_t *packed, size_t bytes, char *out, size_t max);

/*
 * One registry a process: names with the prefix mesh_, values are atomics owned by whoever counts. Several counters
 * may have one name, those of several instances of something: its value is their sum.
 */
struct metric {
	const char *name, *help;
	const _Atomic uint64_t *value;
};
#define METRICS_MAX 96
struct metrics {
	uint32_t n;
	struct metric metric[METRICS_MAX];
};
void metrics_add(struct metrics *m, const char *name, const char *help, const _Atomic uint64_t *value);
size_t metrics_pack(const struct metrics *m, uint8_t *out, size_t max);
/* Calls fn for each (name, value) of a packed block; -EPROTO. */
int metrics_unpack(const uint8_t *packed, size_t bytes, void (*fn)(void *ctx, const char *name, uint64_t value),
		   void *ctx);

/* ------------------------------------------------------------- connections */

/* Secret of a job: 16 to 256 bytes, from SHARDMESH_TOKEN or the file SHARDMESH_TOKEN_FILE / --token-file. */
struct job_token {
	uint32_t bytes;
	uint8_t data[256];
};
/* file: NULL for the environment. A token file that others can read is refused. */
int token_load(const char *file, struct job_token *out, struct err *e);
/* Writes 32 random bytes as hex, mode 0600. */
int token_create(const char *path, struct err *e);

/* Who we are on every connection; header fields are read from here at each send. */
struct mesh_self {
	struct log *log;
	struct event_base *base;
	struct job_token token;
	char job[64]; /* --rdzv-id */
	enum member_role role;
	uint32_t member;
	uint32_t branch;
	uint64_t term, epoch, step;
	_Atomic uint64_t messages_sent, messages_received, bytes_sent, bytes_received, auth_failures;
};

struct conn;
struct conn_ops {
	/* Mutual proof is done: the peer's role and member id can be believed. */
	void (*ready)(struct conn *c, void *ctx);
	/* A checked, decoded message. 0, or -Exxx: the connection is dropped with that reason. */
	int (*message)(struct conn *c, const struct wire_header *h, const union wire_msg *m, void *ctx);
	/*
	 * Once, for every connection that was given out; c is gone after it. text: one clause, for people.
	 * status: 0 we closed it, -EPERM the handshake was refused (by us or by the peer), -ETIMEDOUT never
	 * reached or handshake not finished, -ECONNRESET the peer ended it, -EPROTO it broke the protocol.
	 */
	void (*closed)(struct conn *c, int status, const char *text, void *ctx);
};

/*
 * Starts to connect to "host:port", again and again until deadline_ns. The connection is freed after closed(). Any
 * connection makes the process ignore SIGPIPE, unless it handles it.
 */
int conn_connect(struct mesh_self *self, const char *endpoint, uint64_t deadline_ns, const struct conn_ops *ops,
		 void *ctx, struct conn **out, struct err *e);
/* Encodes, frames and queues. -EMSGSIZE, -EPIPE; -ENOBUFS when the peer does not read. */
int conn_send(struct conn *c, unsigned type, const void *msg);
/* Flushes what is queued (2 s at most), then closes; closed() is called later, from the loop, with status 0. */
void conn_close(struct conn *c, const char *why);
/*
 * At once, and closed() is not called: for the end of a program, whose loop does
 * not run any more. What is queued is written as far as the socket takes it.
 */
void conn_free(struct conn *c);
enum member_role conn_role(const struct conn *c);
uint32_t conn_member(const struct conn *c);
void conn_set_member(struct conn *c, uint32_t member); /* the coordinator names it */
void *conn_ctx(const struct conn *c);
void conn_set_ctx(struct conn *c, const struct conn_ops *ops, void *ctx);
const char *conn_peer_text(const struct conn *c); /* "worker 3 (10.0.0.2:41000)" */

struct conn_listener;
/* "host:port", port 0: any. accepted(ctx, c) is called before the handshake, to set ops and ctx. */
int conn_listen(struct mesh_self *self, const char *endpoint, void (*accepted)(void *ctx, struct conn *c), void *ctx,
		struct conn_listener **out, struct err *e);
void conn_listener_free(struct conn_listener *l);
/* "127.0.0.1:41234": what others should dial; where every address is listened on, this host's name. */
const char *conn_listener_endpoint(const struct conn_listener *l);
/*
 * The address of this host from which "host:port" is reached, with port 0, as conn_listen takes it: where a shard
 * service listens for workers. Sends nothing. -EAGAIN: the name cannot be resolved yet.
 */
int conn_route(const char *endpoint, char out[64], struct err *e);
/* The same without port and brackets: "10.0.0.2", "::1". */
int conn_route_address(const char *endpoint, char out[64], struct err *e);

/* ------------------------------------------------------------------ member */

/*
 * A shard service's or worker's link to the coordinator: connects, registers,
 * keeps the member table, sends heartbeats with waits and counters, hands the
 * rest on. self->branch, term and step follow the coordinator's headers, epoch the view.
 */
struct member_table {
	uint32_t n;
	struct msg_member member[MEMBERS_MAX];
	uint64_t epoch;
};
struct member_ops {
	/*
	 * Config and profile are here; plan, open, then (shards) initialise. 0, or -Exxx with e: reported as FAILURE,
	 * then over() with 42 for -EINVAL, else 1. Heartbeats stand still while this runs.
	 */
	int (*welcome)(void *ctx, const struct msg_welcome *w, struct err *e);
	/* A complete view: members came or went. A worker sees shard services, and the workers of its host. */
	void (*members)(void *ctx, const struct member_table *t);
	/* STEP, LEASE, RECALL, RELAY, EXPORT_READ. */
	int (*message)(void *ctx, const struct wire_header *h, const union wire_msg *m);
	/*
	 * Once: the job is over for us by SHUTDOWN, a refusal, or because the coordinator is gone (1) or never answered
	 * (75). Leave the loop and exit with the code. Nothing is called after it; the link may be freed in it.
	 */
	void (*over)(void *ctx, uint32_t exit_code, const char *text);
};
struct member_link_config {
	const char *rdzv_endpoint;
	uint64_t join_timeout_ns;
	const char *listen; /* our endpoint for workers, or "" */
	struct metrics *metrics;
	struct wait_record *waits;
	uint32_t n_waits;
};
struct member_link;
int member_link_open(struct mesh_self *self, const struct member_link_config *cfg, const struct member_ops *ops,
		     void *ctx, struct member_link **out, struct err *e);
int member_link_send(struct member_link *l, unsigned type, const void *msg);
void member_link_free(struct member_link *l);

/* ------------------------------------------------------ coordinator's shell */

struct coordinator_config {
	const char *listen; /* "host:port" */
	const struct job_config *job;
	const char *profile; /* canonical math profile */
	const char *run_dir;
	struct batch_plan batch;
};
struct coordinator;
/*
 * Opens the run directory (refusing another job's), the listener and the state
 * machine. Writes RUN_DIR/endpoint, steps.jsonl, summary.json and, at the end,
 * model/, streamed from the shard services piece by piece.
 */
int coordinator_open(struct mesh_self *self, const struct coordinator_config *cfg, struct coordinator **out,
		     struct err *e);
const char *coordinator_endpoint(const struct coordinator *c);
void coordinator_stop(struct coordinator *c, uint32_t exit_code); /* first Ctrl-C */
/* Runs self->base until the job is over; the exit code, and why in e. */
int coordinator_run(struct coordinator *c, struct err *e);
void coordinator_free(struct coordinator *c);

/* One line of steps.jsonl, with newline; bytes, or -ENOSPC. */
int step_record_json(const struct step_record *r, char *out, size_t max);

#endif
