/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The program `worker`: what its files share. main.c: flags, signals, exit;
 * prepare.c: from the job's config to planned memory; control.c: the control
 * thread's view of steps, leases and spans; attach.c: shard services and the
 * map of their memory; pair.c: which provider of the fabric serves each of them;
 * fabrics.c: the providers in use, and our memory in them; copy.c: reading units
 * where memory is not shared; neighbours.c: the workers of this host, with whom
 * such reads are shared; push.c: gradients on their way to their owners; sums.c:
 * those of this host's workers, added before they leave it (subtree.c);
 * compute.c: the thread that computes.
 *
 * Two threads: the control thread owns everything here but struct compute's
 * lower half. They talk by two rings and share no other state, apart from the
 * memory that the messages hand over.
 */
#ifndef SHARDMESH_WORKER_PROCESS_H
#define SHARDMESH_WORKER_PROCESS_H

#include "kernels/kernels.h"
#include "mesh/mesh.h"
#include "model/model.h"
#include "rdma/fabric.h"
#include "worker/board.h"
#include "worker/fetch.h"
#include "worker/schedule.h"
#include "worker/slices.h"
#include "worker/subtree.h"
#include "worker/worker.h"

#include <event2/event.h>
#include <pthread.h>
#include <string.h>

#define JOIN_TIMEOUT_NS 600000000000ull /* for the coordinator, then for all shard services */
#define WAIT_WARN_NS 10000000000ull     /* a wait this long is said in the log, */
#define WAIT_FAIL_NS 600000000000ull    /* and this long ends the worker */
#define WAIT_SLICE_NS 20000000ull       /* a sleeper looks around this often */
#define BUFFERS_MAX 8
#define LEASES_MAX 16

enum { WAIT_RECORD_CONTROL, WAIT_RECORD_COMPUTE, WAIT_RECORDS };

enum { WORKER_PROVIDERS = 4 }; /* that are counted: worker_provider's names */

struct worker_counters {
	_Atomic uint64_t fetch_units, fetch_bytes, fetch_wait_ns;
	_Atomic uint64_t network_bytes, neighbour_bytes;        /* read over a network; copied from a neighbour */
	_Atomic uint64_t claimed, waited, seized, seized_bytes; /* portions; bytes over the network */
	_Atomic uint64_t neighbours;                            /* now */
	_Atomic uint64_t offers, push_bytes, push_wait_ns;
	_Atomic uint64_t sums_added, sums_given, sums_alone; /* gradients taken from, given to a neighbour; neither */
	_Atomic uint64_t sums_lost;                          /* spans given back: a neighbour was lost that had part */
	_Atomic uint64_t spans, recalled;
	_Atomic uint64_t chosen[WORKER_PROVIDERS], refused; /* providers of the fabric, by shard service */
};

static inline void count(_Atomic uint64_t *counter, uint64_t n)
{
	atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}

/* -------------------------------------------- between the two threads */

enum task_kind {
	TASK_SPAN,   /* compute `span` for `lease` */
	TASK_CANCEL, /* stop `lease` at the next unit border */
	TASK_USE,    /* copied: the units of `use` are there, at params */
	TASK_FAILED, /* copied: `unit` cannot be had: status */
	TASK_BUFFER, /* gradient buffer `buffer` is free again */
	TASK_QUIT,
};
struct task {
	enum task_kind kind;
	uint64_t lease;
	struct span span;
	uint32_t n_micro; /* of the step, or of the evaluation */
	uint16_t branch;
	uint32_t use, unit, buffer;
	int status;
	const float *params[2];
};

enum report_kind {
	REPORT_USED,  /* copied: done with `use` */
	REPORT_OFFER, /* the gradient of (unit, part) is final in `buffer` */
	REPORT_NEED,  /* a buffer is waited for */
	REPORT_END,   /* the span ended: status, loss */
};
struct report {
	enum report_kind kind;
	uint64_t lease;
	uint32_t use, unit, part, buffer;
	/* the end */
	int status; /* 0; -ECANCELED; -ESTALE: unit was newer at `peer`; -Exxx */
	uint32_t peer;
	double loss;
	struct trouble trouble;
	uint64_t compute_ns, fetch_ns, push_ns;
};

struct worker;

struct compute {
	struct worker *w;
	pthread_t thread;
	bool started;
	struct ring in;  /* struct task */
	struct ring out; /* struct report */
	struct net net;
	struct arena activations;
	struct arena workspace;
	struct use *uses[2]; /* evaluation, training */
	uint32_t n_uses[2];
	/* from here on the compute thread's own */
	struct task now;
	bool busy, cancelled, quit;
	uint32_t uses_there;
	const float *(*use_params)[2];
	uint32_t free_buffers; /* bit set */
	int failed;
	uint32_t failed_unit, failed_peer;
	uint64_t fetch_ns, push_ns;
};

/* --------------------------------------------------------- the fabric */

/* Our memory that providers know: one memory, a region of it in each provider in use. */
enum memory_use { MEMORY_GRADIENTS, MEMORY_STAGING, MEMORY_WINDOW, MEMORY_WORDS, MEMORY_USES };

/* A provider in use, for as many shard services as take it. */
struct fabric {
	struct worker *w;
	const struct fab_ops *ops;
	struct fab *fab;
	struct event *event;
	struct fab_region *region[MEMORY_USES];
};

/* ------------------------------------------------------ shard services */

struct peer {
	struct worker *w;
	uint32_t index, member;
	bool same_host;
	char name[96];
	struct conn *conn;
	/* one provider after another, until one connects */
	uint32_t n_candidates, tried;
	struct fab_candidate candidate[FAB_CANDIDATES_MAX];
	char refusals[512];
	struct fabric *fabric; /* the one that is tried, or was chosen; NULL: none yet */
	struct fab_ep *ep;
	bool fabric_up, have_regions, ours_attached, theirs_attached, lost;
	struct fab_blob parameters_blob, inbox_blob;
	struct fab_remote *parameters, *inbox;
	const struct fab_progress *progress; /* mapped */
	/* copied: the progress word as last read */
	uint64_t word, word_again_ns;
	bool word_reading;
	/* push mode: the one offer being written */
	struct offer *writing;
	uint32_t writes, next_slice;
};

struct attach {
	uint32_t n_peers, n_attached;
	struct peer *peer;
	uint32_t *n_owners; /* [n_units] */
	uint32_t *owner;    /* [n_units][n_peers]: indices of peers that own runs */
	uint8_t *view;      /* mapped: reserved address space, units back to back */
	uint64_t view_bytes;
	float **unit; /* mapped: [n_units], inside view */
	bool planned; /* all are connected, and all memory is there */
	bool ready_sent;
};

/* ---------------------------------------------------------------- copying */

enum copy_state {
	COPY_WANTED,    /* nothing of it was read; a neighbour may have it, or be reading it */
	COPY_READING,   /* from its owners */
	COPY_NEIGHBOUR, /* from a neighbour's window, as `mark` says */
	COPY_THERE,
};
/* A piece of a unit that one worker of a host reads. The whole unit where nothing is shared. */
struct copy_portion {
	enum copy_state state;
	bool posted, seized;
	uint32_t owner;    /* how many owners were posted whole */
	uint32_t segment;  /* of the present one's share */
	uint64_t byte;     /* of the segment */
	uint32_t reads;    /* in flight */
	uint64_t since_ns; /* read: since when; wanted: since when a neighbour's read is waited for, or 0 */
	struct board_mark mark;
	uint64_t copied; /* bytes */
};
struct copy_unit {
	bool active;
	uint64_t offset; /* elements, in the window */
	uint32_t left;   /* portions that are not there */
	uint32_t reads;  /* in flight */
	int status;
	struct copy_portion portion[BOARD_PORTIONS];
};

/* How a unit is cut, and who owns what of it. */
struct copy_cut {
	uint64_t elements; /* of a portion */
	uint32_t n;
	uint64_t owners[BOARD_PORTIONS]; /* bit k: of attach_owners */
	bool network[BOARD_PORTIONS];    /* some of them are reached over a network */
};

struct copier {
	struct fetch fetch;
	uint64_t *unit_elements;
	float *window;
	uint8_t *words;
	struct copy_unit *unit;
	struct copy_cut *cut;
	uint32_t *queue; /* units being read, oldest first */
	uint32_t n_queue, reads;
	uint32_t unposted;   /* portions being read that are not posted whole */
	uint64_t slowest_ns; /* of the last portions read, about: what a neighbour's may take */
	uint64_t copy_left;  /* bytes to copy before others have their turn */
	uint64_t again_ns;   /* when to look again, though no event says so; 0: never */
	struct event *retry;
	_Atomic uint32_t waits_for; /* member id of the owner the oldest read waits for; 0: none */
};

/* -------------------------------------------------------------- neighbours */

/* A worker of this host. */
struct neighbour {
	uint32_t member;
	bool ready;     /* it asked for an address (the one with the higher id does) */
	bool addressed; /* it has one */
	bool attached;  /* it looks at our board: we may copy from its window */
	struct fab_ep *ep;
	bool up, have_blob[3];
	struct fab_blob blob[3]; /* of its board, its window, its gradients */
	struct fab_remote *remote[3];
	const struct board *board; /* mapped; among boards.theirs */
	const uint8_t *window;
	uint64_t window_bytes;
	const float *gradients;
};

struct neighbours {
	bool on, greeted;
	struct fabric *fabric; /* local */
	struct fab_region *board;
	struct boards boards;
	uint32_t n;
	struct neighbour one[BOARD_NEIGHBOURS];
};

/* ---------------------------------------------------------------- pushing */

enum offer_progress { OFFER_NONE, OFFER_OUT, OFFER_MAY_WRITE, OFFER_WRITING, OFFER_WRITTEN };
struct offer {
	uint64_t id;
	enum offer_progress progress;
	bool wanted, answered;
	bool withdrawn; /* not to be written (on); WITHDRAW is sent when nothing is in flight */
	uint32_t buffer, slices, imm;
};

struct gradient_buffer {
	bool busy, withdrawn;
	bool lost; /* an owner gave it back: withdrawn before it was taken */
	uint32_t unit, part, outstanding;
	struct tree_node node; /* offered to the owners */
	uint64_t sequence;
};

struct push {
	float *memory;    /* the buffers */
	uint8_t *staging; /* PUSH_STAGING_SLOTS slices */
	uint32_t n_buffers;
	uint64_t elements; /* of one buffer */
	uint64_t step;
	struct tree_node node;
	struct gradient_buffer buffer[BUFFERS_MAX];
	struct offer *offer; /* [n_buffers][n_peers] */
	uint64_t next_id, next_sequence;
	uint32_t staging_free; /* bit set */
};

/* ------------------------------------------------- sums with neighbours */

struct sum_add {
	bool active;
	uint32_t unit, part, from; /* member */
	const float *theirs;
	uint64_t at, end; /* elements of the unit */
};

struct sums {
	bool on;
	struct subtree tree;
	struct k_stream *stream;
	struct arena workspace;
	struct sum_add add[BUFFERS_MAX]; /* into our buffer */
	struct event *timer;
	uint32_t look_us;
};

/* ------------------------------------------------------------------ spans */

struct granted_lease {
	uint64_t id, step;
	enum lease_kind kind;
	struct tree_node node;
	uint32_t n_leaves, n_micro; /* micro-batches of the span; of the whole kind */
};

struct span_state {
	bool active;    /* from TASK_SPAN to SPAN_DONE */
	bool ended;     /* the compute thread is through with it */
	bool cancelled; /* recalled, or its step is over */
	bool stale;     /* it found newer parameters; is its step over? */
	struct granted_lease lease;
	struct report end;
	uint64_t push_since_ns;
};

struct worker {
	struct log log;
	struct mesh_self self;
	struct member_link *link;
	struct metrics metrics;
	struct wait_record waits[WAIT_RECORDS];
	struct worker_counters counters;
	const char *endpoint; /* --rdzv-endpoint */
	unsigned threads;     /* --threads; 0: the config's */

	bool prepared;
	uint32_t n_shards, n_workers;
	struct job_config config;
	struct batch_plan batch;
	struct unit_table table;
	struct page_map map;
	bool have_map;
	struct worker_plan plan;
	struct k_profile profile;
	struct data_set *data;

	struct fab_flags fabric_flags; /* laid over the config's */
	const char *fabric_want;
	struct fab_options fabric_options;
	char local_address[64];
	uint32_t n_fabrics;
	struct fabric fabric[FAB_CANDIDATES_MAX];
	struct arena memory[MEMORY_USES]; /* copied: what providers adopt */
	uint32_t host_members;
	bool in_place; /* every shard service's memory is mapped; known when all are connected */
	bool pumping;

	struct attach attach;
	struct copier copier;
	struct neighbours neighbours;
	struct push push;
	struct sums sums;
	struct compute compute;
	struct event *compute_event;

	uint64_t open_step;
	uint32_t n_micro, n_eval;
	struct span_state span;
	struct granted_lease queued[LEASES_MAX];
	uint32_t n_queued;
	struct event *stale_timer, *end_timer;

	bool over;
	uint32_t exit_code;
	char exit_text[512];
};

/* ------------------------------------------------------------- prepare.c */

/* WELCOME: config, profile, data. 0, or -Exxx with e. */
int prepare(struct worker *w, const struct msg_welcome *m, struct err *e);
/* in_place is known: the plan, all memory, the compute thread. */
int prepare_memory(struct worker *w, struct err *e);
void prepare_release(struct worker *w);
/* What was planned against what was used. */
void prepare_report(struct worker *w);

/* ------------------------------------------------------------- control.c */

int control_open(struct worker *w, struct err *e);
void control_release(struct worker *w);
/* The compute thread's reports wake the loop; call before it is started. */
int control_watch_compute(struct worker *w, struct err *e);
/* The worker cannot go on: tells the coordinator, and ends soon if it says nothing. */
void control_fail(struct worker *w, uint32_t exit_code, const char *fmt, ...) PRINTF_LIKE(3, 4);
/* The loop ends with this. The first one counts. */
void control_end(struct worker *w, uint32_t exit_code, const char *text);
/* All shard services are attached: tell the coordinator. */
void control_ready(struct worker *w);
/* Something of the span was answered: is it over? */
void control_span_check(struct worker *w);
void control_task(struct worker *w, const struct task *t);
/* Part of the span cannot be known to have reached the owners. */
void control_give_back(struct worker *w);

/* ------------------------------------------------------------- fabrics.c */

/* What config and flags say of the fabric. -EINVAL, -ENOTSUP: e says what is wrong with it. */
int fabrics_options(struct worker *w, struct err *e);
/* The instance of a provider, opened when it is the first time. e: why it cannot be. */
int fabrics_get(struct worker *w, const struct fab_ops *ops, struct fabric **out, struct err *e);
/* Memory for a use in every provider in use, once in_place is known and nobody is asked for another provider. */
int fabrics_memory(struct worker *w, enum memory_use use, const char *name, uint64_t bytes, void **at, struct err *e);
void fabrics_release(struct worker *w);
/* "local and verbs": what this worker's pairs use. */
const char *fabrics_text(const struct worker *w, char out[64]);
/* Which counter a provider has; WORKER_PROVIDERS: none. */
uint32_t worker_provider(const char *name);

/* ---------------------------------------------------------------- pair.c */

/* The connection stands: asks for the first provider. */
void pair_begin(struct peer *p);
int pair_fabric(struct peer *p, const struct msg_fabric *m);
int pair_refused(struct peer *p, const struct msg_fabric_refused *m);
int pair_signal(struct peer *p, const struct msg_signal *m);
/* CONNECTED, DOWN, SIGNAL of an instance. True: the pair has just been connected. */
bool pair_event(struct fabric *f, const struct fab_event *ev);

/* -------------------------------------------------------------- attach.c */

/* The member table holds all shard services: the page map, and connections to them. */
int attach_open(struct worker *w, const struct member_table *t, struct err *e);
void attach_release(struct worker *w);
/* Fabric events until there are none, and what follows from them. Call after anything that may have posted. */
void attach_pump(struct worker *w);
/* The peer is of no use any more: unless the coordinator ends the job, the worker gives up. */
void attach_lost(struct peer *p, const char *text);
static inline const uint32_t *attach_owners(const struct attach *a, uint32_t unit)
{
	return a->owner + (size_t)unit * a->n_peers;
}

/* ---------------------------------------------------------------- copy.c */

int copy_open(struct worker *w, struct err *e);
void copy_release(struct worker *w);
void copy_begin(struct worker *w, const struct granted_lease *l);
void copy_cancel(struct worker *w);
/* Takes up what the state machine wants, and posts what may be posted. */
void copy_run(struct worker *w);
void copy_event(struct worker *w, const struct fab_event *ev);
/* The neighbour goes: what is being copied from it is to be had elsewhere. */
void copy_forget(struct worker *w, const struct board *from);

/* ---------------------------------------------------------- neighbours.c */

/* All shard services are connected: are reads to be shared, and can they be? Before any memory is taken. */
void neighbours_open(struct worker *w);
void neighbours_release(struct worker *w);
/* All memory is there: asks the neighbours for a connection. */
void neighbours_greet(struct worker *w);
/* A new view of the members. */
void neighbours_members(struct worker *w, const struct member_table *t);
void neighbours_relay(struct worker *w, const struct msg_relay *m);
/* CONNECTED, ACCEPTED, DOWN with NEIGHBOUR_USER set. */
#define NEIGHBOUR_USER ((uint64_t)1 << 32)
void neighbours_event(struct worker *w, const struct fab_event *ev);
/* Takes in what arrived since the last poll. */
void neighbours_run(struct worker *w);
/* Not to be shared after all: why, for the log. */
void neighbours_off(struct worker *w, const char *why);
/* The one whose board it is. */
struct neighbour *neighbours_of(struct worker *w, const struct board *b);
/* The gradient buffers of one whose board we look at; NULL: there is none such. */
const float *neighbours_gradients(struct worker *w, uint32_t member, uint64_t *bytes);
/* Its bytes cross a network, or are to be treated as if they did. */
static inline bool peer_is_far(const struct peer *p)
{
	return strcmp(p->fabric->ops->name, "local") != 0;
}

/* ---------------------------------------------------------------- push.c */

int push_open(struct worker *w, struct err *e);
/* The shard services are known. */
int push_attach(struct worker *w);
void push_release(struct worker *w);
void push_begin(struct worker *w, const struct granted_lease *l);
void push_offer(struct worker *w, const struct report *r);
/* The compute thread needs a buffer. */
void push_need(struct worker *w);
/* The span is at its end: all buffers are wanted back; or it was cancelled: withdrawn. */
void push_end(struct worker *w, bool withdraw);
bool push_idle(const struct worker *w);
int push_answer(struct peer *p, const struct msg_answer *m);
/* Posts what was granted. */
void push_run(struct worker *w);
void push_event(struct worker *w, const struct fab_event *ev);
/* The buffer's contribution as that of `node`: when all owners have answered, sums_answered, and it is free. */
void push_to_owners(struct worker *w, uint32_t buffer, struct tree_node node);
void push_free(struct worker *w, uint32_t buffer);

/* ---------------------------------------------------------------- sums.c */

/* Neighbours are on: their gradients and ours become one sum. Else all of these do nothing. */
int sums_open(struct worker *w, struct err *e);
void sums_release(struct worker *w);
void sums_begin(struct worker *w, const struct granted_lease *l);
/* Only where sums are on: what would be offered to the owners. */
void sums_final(struct worker *w, uint32_t buffer);
void sums_answered(struct worker *w, uint32_t buffer);
/* Computing waits for a buffer or has ended; or goes on. */
void sums_stall(struct worker *w, bool stalled);
void sums_cancel(struct worker *w);
bool sums_idle(const struct worker *w);
/* The neighbour goes; its memory is still mapped, and its board still among the others. */
void sums_forget(struct worker *w, uint32_t member);
/* Looks at the neighbours, and adds a piece. */
void sums_run(struct worker *w);

/* ------------------------------------------------------------- compute.c */

/* Activations, workspace and stream; net.cfg is set. */
int compute_open(struct worker *w, struct err *e);
int compute_start(struct compute *c, struct err *e);
/* False: it did not end within two seconds (it is in the middle of a product). */
bool compute_stop(struct compute *c);
void compute_release(struct compute *c);

/* fab_op.user: what a completion is of. */
enum op_kind { OP_WORD = 1, OP_UNIT, OP_WRITE };
static inline uint64_t op_user(enum op_kind kind, uint32_t a, uint32_t b)
{
	return (uint64_t)kind << 56 | (uint64_t)(a & 0xffffffu) << 32 | b;
}
static inline enum op_kind op_kind(uint64_t user)
{
	return (enum op_kind)(user >> 56);
}
static inline uint32_t op_a(uint64_t user)
{
	return user >> 32 & 0xffffffu;
}
static inline uint32_t op_b(uint64_t user)
{
	return (uint32_t)user;
}

#endif
