/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the files of the shard service share. Two threads, and no lock:
 *
 *   control thread   libevent: coordinator, workers, fabric; whose contribution
 *                    is taken (reduce.c, inbox.c); all bookkeeping of memory
 *   data thread      the kernels' stream: folds, Adam, hashes; the only one that
 *                    touches the bytes of state between READY and the end
 *
 * Between them one ring each way with fixed-size items (data.c). Jobs are done
 * in the order in which they were handed over, so memory that the control
 * thread gives to somebody else is written by later jobs only.
 */
#ifndef SHARDMESH_SHARD_H
#define SHARDMESH_SHARD_H

#include "base/base.h"
#include "kernels/kernels.h"
#include "mesh/mesh.h"
#include "model/model.h"
#include "rdma/fabric.h"
#include "shardsvc/shardsvc.h"

#include <pthread.h>

/* ----------------------------------------------------------------- store.c */

/* A (unit, part) of which this member owns pages: what one reduction tree is over. */
struct piece {
	uint32_t unit, part;
	uint32_t n_seg;
	uint64_t n;                              /* elements, compact: share order, the part's pages only */
	struct share_seg seg[RUNS_PER_UNIT_MAX]; /* share_offset counts within the piece */
	float *accumulator;                      /* sum 0 of its coverage: n elements */
};

struct store_unit {
	struct share share;
	uint64_t at; /* elements of other units before it in p, m and v */
	uint32_t first_piece;
	uint32_t n_pieces; /* parts of which we own pages; 0: none of the unit is ours */
};

/* The pages of this member. p lies in the parameter region that workers read: master and published copy are one. */
struct store {
	const struct unit_table *table;
	uint32_t member;
	uint64_t n; /* elements owned */
	uint32_t n_pieces;
	struct store_unit *unit;
	struct piece *piece; /* by unit, then part */
	struct arena moments, accumulators;
	struct fab_progress *progress;
	float *p, *m, *v; /* n each, units in order */
};

/* What is where, without memory for it. -ENOMEM. */
int store_init(struct store *s, const struct unit_table *t, const struct page_map *map, uint32_t member);
/* Elements of all accumulators. */
uint64_t store_accumulator_elements(const struct store *s);
/* region: page_map_share_bytes' layout, zeroed, the caller's. Allocates the rest. -ENOMEM. */
int store_allocate(struct store *s, void *region, struct err *e);
void store_release(struct store *s);
/* The piece of (unit, part), or NULL when none of its pages is ours. */
const struct piece *store_piece(const struct store *s, uint32_t unit, uint32_t part);
/* Elements [offset, offset+n) of a unit where they lie; NULL unless they are ours and adjacent. */
const float *store_span(const struct store *s, uint32_t unit, uint64_t offset, uint64_t n);

/* ------------------------------------------------------------------ sums.c */

/* Partial sums beside the accumulators: planned memory first, then an unlinked, mapped file, then unplanned memory. */
struct sum_extent {
	uint64_t at, n; /* elements */
};
struct sum_space {
	float *base;
	uint64_t elements;
	bool fitted; /* extents are never cut or joined: there is one of the right size for every sum that can be */
	uint32_t n_free;
	struct sum_extent *free; /* by at, never touching each other */
};
struct sum {
	uint64_t at, n;
	bool spilled;
};
struct sum_config {
	uint32_t max;             /* sums at once */
	uint64_t memory_elements; /* planned */
	const uint64_t *fitted;   /* or NULL: sizes of all sums that can be at once, memory_elements together */
	uint32_t n_fitted;
	uint64_t spill_elements; /* of the file, its blocks allocated at once; 0: no file */
	uint64_t limit_elements; /* of file and unplanned memory: more than can ever be needed */
	const char *spill_dir;
};
struct sum_pool {
	struct sum_space memory, spill;
	uint64_t file_elements; /* of spill: the file; what lies behind it is beyond the plan */
	uint32_t max, n_used;
	struct sum *sum;                /* [max + 1], by id; 0 is nobody's */
	uint32_t *unused;               /* ids, a stack of max - n_used */
	_Atomic uint64_t spilled_bytes; /* of all sums that went to the file */
	_Atomic uint64_t beyond_bytes;  /* of all sums that went beyond the plan */
};

/* e names what could not be had: file and size. */
int sums_init(struct sum_pool *p, const struct sum_config *c, struct err *e);
void sums_release(struct sum_pool *p);
/* Id of a sum of n elements; 0: no room. must: planned memory is not the end. */
uint32_t sums_take(struct sum_pool *p, uint64_t n, bool must);
void sums_give(struct sum_pool *p, uint32_t id);
/* Also of a sum just given back, until the next one is taken. */
float *sums_at(const struct sum_pool *p, uint32_t id);

/* ------------------------------------------------- init.c, fold.c, apply.c */

/* Initial values of our elements of a unit, the same whoever owns what. Padding stays zero. */
void store_fill_unit(struct store *s, uint32_t unit, uint64_t seed);
/* The same from files. -EINVAL, -EIO: e names file and tensor. */
int store_read_unit(struct store *s, uint32_t unit, const struct model_weights *w, struct err *e);

/* How the data thread computes. */
#define FOLD_SEGS_MAX (RUNS_PER_UNIT_MAX + 2 * UNIT_PARTS_MAX)
struct engine {
	const struct k_ops *ops;
	struct k_stream *stream;
	const _Atomic bool *stop; /* NULL, or true when the process is ending: whatever is under way may be left */
	struct k_fold_seg seg[FOLD_SEGS_MAX];
};

/* Where an operand of a fold lies: a whole flat unit (a gradient in place), or compact like a sum. */
struct fold_operand {
	const float *at; /* NULL: none */
	bool flat;
};
struct fold_job {
	float *dst; /* compact */
	struct fold_operand a, b;
	bool last; /* with it the unit's gradient is whole: square sum too */
};
/* The pass that joins a unit's parts: where the root of a part lies if it is not in the part's accumulator. */
struct finish_job {
	struct fold_operand root[UNIT_PARTS_MAX];
};

/* Segments of a fold, one for each of the piece's; how many. */
uint32_t fold_segments(const struct piece *p, const struct fold_job *j, struct k_fold_seg out[FOLD_SEGS_MAX]);
/* Segments of the last pass over a unit: part 0's roots, plus part 1's where it has pages, into part 0's accumulator. */
uint32_t finish_segments(const struct store *s, uint32_t unit, const struct finish_job *j,
			 struct k_fold_seg out[FOLD_SEGS_MAX]);
/* Each returns when it is done. square_sum: cleared first; may be NULL. */
void engine_fold(struct engine *g, const struct piece *p, const struct fold_job *j, struct exact_sum *square_sum);
void engine_finish(struct engine *g, const struct store *s, uint32_t unit, const struct finish_job *j,
		   struct exact_sum *square_sum);

struct apply_job {
	uint64_t step; /* the version that results */
	uint32_t branch;
	bool skip; /* version s without a change */
	bool hash_wanted;
	struct k_adam adam; /* all but the pointers and n */
};
/* Adam in forward order, each unit published when it is done; then the hash, if wanted, into *hash. 0, or -ECANCELED. */
int engine_apply(struct engine *g, struct store *s, const struct apply_job *j, struct hash128 *hash);
/* What readers may see: all units of version 0. */
void store_publish_initial(struct store *s, uint32_t branch);

/* ------------------------------------------------------------------ data.c */

enum job_type {
	JOB_START,  /* up only: stream and initial parameters are there, or status says why not */
	JOB_FOLD,   /* index: piece */
	JOB_FINISH, /* index: unit */
	JOB_APPLY,
	JOB_STOP,
};
struct job {
	enum job_type type;
	uint32_t index;
	uint64_t offer[2]; /* contributions that it reads; 0: none */
	union {
		struct fold_job fold;
		struct finish_job finish;
		struct apply_job apply;
	};
};
struct job_done {
	enum job_type type;
	uint32_t index;
	int status; /* 0, or the stream's fault */
	bool last;  /* JOB_FOLD: the unit is done with it */
	uint64_t offer[2];
	uint64_t step; /* JOB_APPLY */
	bool has_hash;
	struct hash128 hash;
	uint64_t nanoseconds;
};

#define DATA_RING 1024u
struct data {
	struct store *store;
	struct sum_pool *sums;
	struct exact_sum *square_sum; /* [n_units]; the data thread's until the job is done */
	struct k_profile profile;
	unsigned threads;
	uint64_t seed;
	const char *weights; /* where the first parameters are read from; NULL: they are random, by seed */
	struct arena workspace;
	struct engine engine;
	struct ring jobs, done;
	uint32_t in_flight; /* control thread's count: handed over and not reaped */
	_Atomic bool stop;
	pthread_t thread;
	bool running;
	struct err start_error; /* read after JOB_START came back with a status */
	char start_note[512];   /* read after JOB_START: what a user should hear of the files, or "" */
	struct wait_record *wait;
	_Atomic uint32_t
		idle_kind; /* enum wait_kind: what an idle data thread waits for, as the control thread knows */
	_Atomic uint64_t idle_step, idle_unit;
	_Atomic uint64_t folds, fold_bytes, applies, apply_nanoseconds, busy_nanoseconds;
};

/* Bytes of the stream's workspace; of the rings. */
size_t data_workspace_bytes(unsigned threads);
uint64_t data_ring_bytes(void);
/* Starts the thread, which opens its stream, fills in the parameters and answers JOB_START. */
int data_start(struct data *d, struct err *e);
/* Finishes the job at hand, drops the others. */
void data_stop(struct data *d);
void data_release(struct data *d);
/* Jobs that can be handed over now. */
uint32_t data_room(const struct data *d);
/* There must be room. */
void data_push(struct data *d, const struct job *j);
bool data_reap(struct data *d, struct job_done *out);

/* ------------------------------------------------------- control: peers */

#define PEERS_MAX MEMBERS_MAX
#define PEER_OFFERS 16u /* open offers of one worker; it has two buffers, so this is generous */
#define PUSH_SLICE (512u * 1024)
#define PEER_NONE UINT32_MAX

enum offer_stage {
	OFFER_FREE,
	OFFER_EARLY,   /* of the next step */
	OFFER_OPEN,    /* in the coverage */
	OFFER_TURN,    /* granted; another push of this worker has the inbox */
	OFFER_FILLING, /* granted and told; notices are counted */
	OFFER_FOLDING, /* a job reads it */
};
struct offer {
	enum offer_stage stage;
	bool wanted;
	uint64_t id; /* the worker's name for it */
	uint64_t step, where;
	uint32_t piece;
	struct tree_node node;
	uint32_t slices, slices_seen, imm;
	uint64_t order; /* of grants: first told, first served */
};

enum peer_state {
	PEER_GREETING, /* handshake under way */
	PEER_WAITING,  /* proven, but not in our member table yet, or we have no pages yet */
	PEER_OPENING,  /* it tries providers of the fabric; later one is connected, and its REGIONS are waited for */
	PEER_EXCHANGE, /* REGIONS went both ways; what it announced is on its way */
	PEER_ATTACHED, /* everything of it is imported, and ATTACHED sent */
	PEER_GONE,     /* connection lost; memory stays until no job reads it */
};
/* A provider of the fabric in use, with the parameters in it: fabric[0] made their memory, the others adopted it. */
struct shard;
struct fabric {
	struct shard *shard;
	const struct fab_ops *ops;
	struct fab *fab;
	struct event *event; /* once we are prepared */
	struct fab_region *parameters;
};

struct peer {
	struct shard *shard;
	uint32_t slot, member;
	uint64_t serial; /* names it to the fabric; its slot is in the low bits */
	enum peer_state state;
	struct conn *conn; /* NULL when gone */
	bool closing;      /* conn_close was called */
	char wanted[32];   /* provider that it asked for, and has no answer yet; "": none */
	char provider[32]; /* the one it was given an address of */
	struct fabric *fabric;
	struct fab_ep *ep;
	struct fab_region *inbox;
	uint64_t *slices_seen; /* of the push that has the inbox: a bit each, since a notice may come twice */
	bool has_regions;      /* its REGIONS came: */
	bool in_place;         /* it maps our memory, and we its gradients */
	struct fab_blob gradients_blob;
	struct fab_remote *gradients;
	const uint8_t *gradients_at;
	uint64_t gradients_bytes;
	uint32_t filling; /* offer that has the inbox, or PEER_NONE */
	uint32_t next_imm;
	uint32_t n_offers; /* not free */
	uint64_t grants;
	struct offer offer[PEER_OFFERS];
};

/* ------------------------------------------------------- control: reduction */

/* The control thread's view of a piece in the open step. */
struct track {
	struct shard *shard;
	uint32_t index;
	struct coverage coverage;
	bool rooted;
	bool dirty; /* actions wait for room in the ring */
	bool told;  /* STARVED was sent for: */
	struct tree_node told_node;
};

enum step_phase {
	STEP_NONE,    /* nothing is open */
	STEP_REDUCE,  /* contributions are taken */
	STEP_SEALED,  /* voted; commit is to come */
	STEP_FORWARD, /* forward only: nothing to reduce, no vote */
};

struct shard_counters {
	_Atomic uint64_t offers, covered, closed, taken, grants, push_bytes, notices_stale, early, starved;
	_Atomic uint64_t steps_applied, shard_bytes, peers_dropped, exports, planned_bytes;
	_Atomic uint64_t fabrics_refused;
};

enum { WAIT_OF_CONTROL, WAIT_OF_DATA, SHARD_WAITS };

struct shard {
	struct log log;
	struct mesh_self self;
	const char *rdzv_endpoint, *listen, *run_dir;
	uint64_t threads_given;
	struct member_link *link;
	struct conn_listener *listener;
	struct event *done_event, *tick_event, *signal_event[2];
	struct wait_record waits[SHARD_WAITS];
	struct metrics metrics;
	struct shard_counters count;

	/* from WELCOME */
	bool welcomed;
	uint32_t n_shards, n_workers;
	uint32_t host_index, host_members; /* among the host's shard services */
	struct job_config job;
	struct batch_plan batch;
	struct unit_table table;
	struct fab_flags fabric_flags; /* laid over the config's */
	const char *fabric_want;
	struct fab_options fabric_options;
	char local_address[64];
	uint32_t n_fabrics;
	struct fabric fabric[FAB_CANDIDATES_MAX];

	/* from the first complete view on: our pages */
	bool prepared, ready;
	struct page_map map;
	struct shard_plan plan;
	uint64_t inbox_elements; /* of each inbox: the largest share of a unit */
	uint32_t n_inboxes_planned, connection_bytes;
	struct store store;
	struct sum_pool sums;
	struct data data;

	/* the open step */
	enum step_phase phase;
	uint64_t open_step, version; /* version: of the last apply that was handed to the data thread */
	uint32_t units_open;
	uint8_t *parts_open;  /* [n_units] pieces without a root */
	struct track *track;  /* [n_pieces] */
	struct arena offers;  /* the coverages' slots */
	uint64_t beyond_told; /* bytes beyond the plan that were logged */
	uint32_t n_dirty;
	uint64_t applied; /* version that all our pages have */

	/* workers */
	uint64_t next_serial;
	uint32_t n_live;
	uint32_t live[PEERS_MAX];  /* member ids of workers, as of the last view */
	bool live_here[PEERS_MAX]; /* is it on our host? */
	bool one_host;             /* all members of the last view are */
	uint32_t n_slots;          /* of peer[] that were ever used */
	struct peer *peer[PEERS_MAX];

	bool over;
	uint32_t exit_code;
	char exit_text[512];
};

/* --------------------------------------------------------------- reduce.c */

/* -ENOMEM. */
int reduce_init(struct shard *s);
void reduce_release(struct shard *s);
/* STEP: commit, open, or both. -EPROTO with the reason logged. */
int reduce_step(struct shard *s, const struct msg_step *m);
/* Takes up what a piece's coverage decided. */
void reduce_pump(struct shard *s, uint32_t piece);
/* A job came back. */
void reduce_done(struct shard *s, const struct job_done *d);
/* Once a second: repeats STARVED, refreshes the wait record. */
void reduce_tick(struct shard *s);

/* ---------------------------------------------------------------- inbox.c */

/* Messages of an attached worker. 0, or -EPROTO with the reason logged: its connection is dropped. */
int inbox_message(struct peer *p, const struct wire_header *h, const union wire_msg *m);
/* A push's slice is visible. */
void inbox_notice(struct peer *p, uint32_t imm);
/* The step opened: early offers of it are taken up. */
void inbox_step_opened(struct shard *s);
/* The coverage answered; `offer` is its name for it. */
void inbox_verdict(struct shard *s, uint64_t offer, enum offer_verdict verdict);
/* Where the bytes of an offer are; from now on a job reads them. */
struct fold_operand inbox_operand(struct shard *s, uint64_t offer);
/* A job has read them. */
void inbox_taken(struct shard *s, uint64_t offer);
/* The worker is gone: all but what jobs read is taken back. */
void inbox_withdraw_all(struct peer *p);

/* -------------------------------------------------------------- fabrics.c */

/* What config and flags say of the fabric, and the provider that makes the parameters' memory. */
int fabrics_open(struct shard *s, struct err *e);
/* The provider that workers will most likely take, as far as it is known before they do; NULL: none. */
const struct fab_ops *fabrics_expected(const struct shard *s);
/* The parameters, zeroed: *at. */
int fabrics_parameters(struct shard *s, uint64_t bytes, void **at, struct err *e);
/* We are prepared: events of what is open, and of what will be, wake the loop. */
int fabrics_watch(struct shard *s, struct err *e);
/* The instance that serves a worker which asks for `name`; e: why it does not get it. */
int fabrics_get(struct shard *s, const char *name, bool same_host, struct fabric **out, struct err *e);
void fabrics_close(struct shard *s);

/* -------------------------------------------------------------- publish.c */

int publish_listen(struct shard *s, struct err *e);
/* Workers that wait for a member table or for our pages go on if they can; those that are no members go. */
void publish_members(struct shard *s);
/* Takes all events of the fabric. */
void publish_poll(struct shard *s);
/* The worker broke the protocol: drops it. Always -EPROTO, for `return`. */
int peer_refuse(struct peer *p, const char *fmt, ...) PRINTF_LIKE(2, 3);
void peer_send(struct peer *p, unsigned type, const void *msg);
/* Frees a peer that is gone and that nothing refers to any more. */
void peer_settle(struct peer *p);
void publish_close(struct shard *s);

/* ------------------------------------------------------- export.c, main.c */

int export_read(struct shard *s, const struct msg_export_read *m);

/* service.c: everything that the coordinator says, and preparing for the first step. */
extern const struct member_ops shard_member_ops;
/* Ends the loop; the first reason counts. report: tell the coordinator too. */
void shard_end(struct shard *s, uint32_t exit_code, bool report, const char *fmt, ...) PRINTF_LIKE(4, 5);
void service_release(struct shard *s);
/* What was used against what was planned, into the log. */
void service_log_memory(struct shard *s);
/* The plan has the inboxes of the workers asked for; more than that is said. */
void service_inbox_opened(struct shard *s);

#endif
