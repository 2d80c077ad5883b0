/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A whole job in one thread: the real coordinator, the real coverages and, where
 * workers of a host add their sums, the real machine for it; with model workers, a network that delays, a clock that is a number and a seed that
 * decides everything else. Sums are names: the value of a contribution is a hash
 * of what it must contain, an addition hashes its operands in order, so that the
 * root says whether every micro-batch is in it once, in the order of the tree.
 */
#ifndef SHARDMESH_TESTS_SIM_H
#define SHARDMESH_TESTS_SIM_H

#include "mesh/mesh.h"
#include "worker/subtree.h"

#define SIM_OWNERS_MAX 8
#define SIM_UNITS_MAX 8
#define SIM_PIECES_MAX (SIM_UNITS_MAX + 1)
#define SIM_BUFFERS 2                /* of gradients, a worker */
#define SIM_OFFERS 8                 /* of one worker at one owner at once */
#define SIM_GARBAGE UINT64_C(0xdead) /* the value of memory that nobody may read */

#define SIM_US UINT64_C(1000)
#define SIM_MS UINT64_C(1000000)
#define SIM_S UINT64_C(1000000000)

/* ------------------------------------------------------------------- chance */

struct chance {
	uint64_t state;
};
uint64_t chance_u64(struct chance *c);
uint64_t chance_below(struct chance *c, uint64_t n);                  /* 0 .. n-1 */
uint64_t chance_range(struct chance *c, uint64_t low, uint64_t high); /* low .. high */
bool chance_of(struct chance *c, uint32_t per_1000);

/* -------------------------------------------------------------------- truth */

/* What contributions, sums and losses must be. */
uint64_t truth_add(uint64_t left, uint64_t right);
uint64_t truth_node(uint64_t step, uint32_t unit, uint32_t part, struct tree_node n, uint32_t n_micro);
double truth_loss(uint64_t step, enum lease_kind kind, struct tree_node n, uint32_t n_micro);
/* The addend of the square sum for an owner's share of a unit. */
double truth_square(uint64_t step, uint32_t owner, uint32_t unit);
struct hash128 truth_hash(uint64_t step, uint32_t owner);

/* --------------------------------------------------------------------- plan */

/* What a seed stands for. */
struct plan {
	uint32_t n_owners, n_units, n_workers; /* at first */
	bool two_parts;
	uint32_t n_micro, n_eval;
	uint64_t steps, eval_interval, hash_interval;
	uint32_t max_held, pool;      /* K; sums an owner has besides the accumulators */
	uint8_t owns[SIM_PIECES_MAX]; /* bit per owner: has pages of the piece */
	uint32_t push_per_1000;       /* workers that push instead of being read in place */
	uint32_t max_span;            /* 0: a mixture */
	uint64_t latency_ns, compute_ns, fold_ns;
	uint32_t slow_per_1000;         /* workers that are 30 times slower */
	uint32_t lag_per_1000;          /* connections that are 30 times slower */
	uint32_t repeat_per_1000;       /* messages that are sent twice */
	uint32_t defer_per_1000;        /* decisions that an owner leaves for later */
	uint32_t kills, joins, freezes; /* at most, in the job */
	uint32_t kill_per_1000;         /* at a moment that is made for it */
	uint64_t stop_at_ns;            /* Ctrl-C; 0: never */
	uint32_t per_host;              /* workers of a host, who add their sums; 0: they do not */
	uint64_t host_wait_ns, add_ns;
	bool at_sums;               /* who dies does so where sums are between two */
	uint32_t returned;          /* spans, at most, that are given back there without a reason */
	uint32_t stranger_per_1000; /* neighbours that never come to share memory */
	uint32_t partings;          /* connections between neighbours that break */
};
/* Command line over seed: 0 is not given. */
struct plan_options {
	uint64_t workers, micro, units, owners, steps, held, per_host;
};
void plan_make(struct plan *p, uint64_t seed, const struct plan_options *o);
void plan_print(const struct plan *p);
uint32_t plan_pieces(const struct plan *p);
uint32_t piece_unit(const struct plan *p, uint32_t piece); /* the last piece is unit 0's second part */
uint32_t piece_part(const struct plan *p, uint32_t piece);

/* ----------------------------------------------------------------- messages */

/* Bodies that matter here; the others are cut down. */
struct mail {
	unsigned type;
	union {
		struct msg_epoch epoch;
		struct msg_ready ready;
		struct msg_step step;
		struct msg_lease lease;
		struct msg_recall recall;
		struct msg_span_done span_done;
		struct msg_vote vote;
		struct msg_applied applied;
		struct msg_starved starved;
		struct msg_offer offer;
		struct msg_want want;
		struct msg_withdraw withdraw;
		struct msg_answer answer;
		struct {
			uint32_t member, role;
		} who;          /* WELCOME, MEMBER */
		uint64_t value; /* what a slice carries */
	};
	struct mail *next; /* free ones */
};

/* One direction of a connection. */
struct link {
	uint64_t last; /* when its last message arrives */
	uint32_t lag;  /* times the latency of others; 0: not chosen yet */
};

enum event_kind {
	EV_COORD_MAIL, /* a: member; mail */
	EV_COORD_LOST, /* a: member whose connection ended */
	EV_COORD_TICK,
	EV_EXPORTED,
	EV_OWNER_MAIL,  /* a: owner; from the coordinator */
	EV_WORKER_MAIL, /* a: worker; from the coordinator */
	EV_OFFER_MAIL,  /* a: worker, b: owner; worker to owner */
	EV_ANSWER_MAIL, /* a: worker, b: owner; owner to worker */
	EV_NOTICE,      /* a: worker, b: owner, c: imm */
	EV_STREAM,      /* a: owner; the first job of its queue is done */
	EV_PUMP,        /* a: owner */
	EV_COMPUTE,     /* a: worker, c: its compute number */
	EV_BEAT_OWNER,  /* a */
	EV_BEAT_WORKER, /* a */
	EV_KILL,        /* a: worker */
	EV_FREEZE,      /* a: worker, c: until */
	EV_THAW,        /* a: worker */
	EV_LOOK,        /* a: worker */
	EV_ADDED,       /* a: worker, b: buffer, c: its add number */
	EV_MEET,        /* a: worker, b: its neighbour, whose memory is there now */
	EV_PARTED,      /* a: worker, b: its neighbour, whose connection ended */
	EV_GIVE_BACK,   /* a: worker */
	EV_PART,        /* some neighbours' connection breaks */
	EV_JOIN,
	EV_CHAOS, /* the next kill, freeze or join at a random moment */
	EV_STOP,
};
struct event {
	uint64_t at, number;
	enum event_kind kind;
	uint32_t a, b;
	uint64_t c;
	struct mail *mail;
};

/* ------------------------------------------------------------------ workers */

enum offer_stage { STAGE_NONE, STAGE_OFFERED, STAGE_GRANTED, STAGE_WITHDRAWN };
struct buffer {
	bool busy, lost; /* lost: something of it was had back from an owner */
	uint32_t piece, unanswered;
	struct tree_node node;
	uint64_t value;
	bool adding;
	uint32_t from, from_buffer; /* worker */
	uint64_t left, right, add_number;
	struct {
		enum offer_stage stage;
		uint64_t id;
		bool wanted;
	} offer[SIM_OWNERS_MAX];
};

enum worker_state {
	WORKER_IDLE,
	WORKER_FETCHING, /* waits for the unit's version */
	WORKER_COMPUTING,
	WORKER_BLOCKED,  /* needs a buffer */
	WORKER_DRAINING, /* the span is done but for answers */
};
/* A worker of the same host as another one sees it. */
enum peer_view { PEER_UNKNOWN, PEER_HERE, PEER_GONE };
struct neighbour {
	uint32_t index;
	bool listed, asked;
	enum peer_view view;
};
struct worker {
	uint32_t index, member, host;
	bool here, registered, attached_told, in_place, slow, steady;
	uint64_t frozen_until;
	uint32_t max_span, attached; /* bit per owner */
	enum worker_state state;
	bool recalled;
	struct lease lease;
	uint64_t step, compute_number, offers_made;
	uint32_t stage;     /* forward: 0 .. units-1; then pieces in backward order */
	uint32_t computing; /* buffer */
	struct buffer buffer[SIM_BUFFERS];
	struct link to_coord, from_coord, to_owner[SIM_OWNERS_MAX], from_owner[SIM_OWNERS_MAX], fabric[SIM_OWNERS_MAX];

	struct board *board; /* NULL: it shares nothing */
	struct boards boards;
	struct subtree tree;
	struct neighbour neighbour[BOARD_NEIGHBOURS];
	uint32_t n_neighbours;
	bool look_due;
	uint64_t look_ns;
};

/* ------------------------------------------------------------------- owners */

enum taken_stage { TAKEN_NONE, TAKEN_EARLY, TAKEN_OPEN, TAKEN_TURN, TAKEN_FILLING, TAKEN_FOLDING };
struct taken {
	enum taken_stage stage;
	uint64_t id, handle, step, order;
	uint32_t piece, where, slices, seen, imm;
	struct tree_node node;
	bool wanted;
};
/* A worker as an owner sees it. */
struct peer {
	enum peer_view view;
	bool listed, attach_asked;
	uint32_t filling, next_imm; /* SIM_OFFERS: the inbox is free */
	uint64_t inbox;             /* its value */
	struct taken taken[SIM_OFFERS];
};

enum job_kind { JOB_FOLD, JOB_ROOT, JOB_POISON, JOB_APPLY };
struct job {
	enum job_kind kind;
	uint32_t piece, dst; /* poison: dst is a pool sum; apply: piece is a unit */
	struct operand a, b;
	uint64_t step;
};
struct piece_state {
	struct coverage coverage;
	void *memory;
	uint64_t accumulator;
	bool mine, told, dirty, rooted;
	struct tree_node told_node;
};
struct owner {
	struct sim *sim;
	uint32_t index, member;
	bool registered, ready_told, sealed;
	uint64_t step, version, published[SIM_UNITS_MAX], offers_seen;
	uint32_t units_open, parts_open[SIM_UNITS_MAX];
	struct piece_state piece[SIM_PIECES_MAX];
	struct peer *peer; /* by worker */
	uint64_t *pool_value;
	bool *pool_used;
	uint32_t *pool_free, n_pool, n_pool_free, pool_in_use;
	uint32_t given[COVERAGE_HELD_MAX * 2], n_given;
	struct job *jobs; /* a ring */
	uint32_t job_first, n_jobs, max_jobs;
	struct link to_coord, from_coord;
};

/* ---------------------------------------------------------------- the world */

struct sim {
	uint64_t seed;
	struct chance chance;
	struct plan plan;
	bool verbose, drop_recalls;

	uint64_t now, n_events, last_progress;
	struct event *heap;
	uint32_t n_heap, max_heap;
	struct mail *mail_free;

	struct coord *coord;
	struct owner owner[SIM_OWNERS_MAX];
	struct worker *worker;
	uint32_t n_workers, max_workers;
	uint32_t *worker_of; /* by member */
	uint32_t max_member;
	uint32_t shortest; /* leaves of the shortest lease of the open step */

	uint64_t lines, votes_told[SIM_OWNERS_MAX];
	bool finished, failed, stopped;
	uint32_t exit_code;
	char why[512];
	uint32_t kills, joins, freezes, recalls, starved, spilled, max_in_use;

	/* of hosts; where sums were at a death: the dead one's, and those of neighbours that had to do with it */
	uint64_t added, alone, torn, given_back, returned, parted_living, undecided;
	uint64_t died_in[SUBTREE_OVER + 1], bereaved[SUBTREE_OVER + 1];
};

/* world.c */
void sim_at(struct sim *s, uint64_t at, struct event e);
bool sim_next(struct sim *s, struct event *out);
struct mail *sim_mail(struct sim *s, unsigned type);
void sim_mail_free(struct sim *s, struct mail *m);
/* Sends along a connection, now and then twice. */
void sim_send(struct sim *s, struct link *link, struct event e);
/* The first failure is kept. */
void sim_fail(struct sim *s, const char *fmt, ...) PRINTF_LIKE(2, 3);
#define SIM_CHECK(s, ok, ...)                     \
	do {                                      \
		if (!(ok))                        \
			sim_fail(s, __VA_ARGS__); \
	} while (0)
void sim_trace(const struct sim *s, const char *fmt, ...) PRINTF_LIKE(2, 3);

/* shell.c: the coordinator's surroundings */
int shell_open(struct sim *s);
void shell_close(struct sim *s);
void shell_register(struct sim *s, enum member_role role, uint32_t index);
void shell_event(struct sim *s, const struct event *e);

/* owner.c */
int owner_open(struct sim *s, uint32_t index);
void owner_close(struct owner *o);
void owner_event(struct sim *s, const struct event *e);
void owner_send(struct sim *s, struct owner *o, struct mail *m);
bool owner_has(const struct sim *s, uint32_t owner, uint32_t piece);
/* owner_fold.c */
void owner_pump(struct sim *s, struct owner *o, uint32_t piece);
void owner_queue(struct sim *s, struct owner *o, struct job j);
void owner_job_done(struct sim *s, struct owner *o);
void owner_open_pieces(struct sim *s, struct owner *o, uint32_t n_micro);
void owner_seal(struct sim *s, struct owner *o);
struct taken *owner_taken(struct sim *s, struct owner *o, uint64_t handle, uint32_t *worker);
void owner_verdict(struct sim *s, struct owner *o, uint64_t handle, enum offer_verdict verdict);

/* worker.c */
uint32_t worker_add(struct sim *s, bool steady);
void worker_event(struct sim *s, const struct event *e);
void worker_kill(struct sim *s, uint32_t index);
void worker_published(struct sim *s);                                      /* some unit has a new version */
uint64_t worker_read(const struct sim *s, uint32_t index, uint32_t where); /* what lies in a gradient buffer now */

void worker_go_on(struct sim *s, struct worker *w);
void worker_cancel(struct sim *s, struct worker *w); /* its span is given back; worker_go_on afterwards */
void worker_offer(struct sim *s, struct worker *w, uint32_t which); /* a gradient buffer, to its owners */
void worker_free(struct worker *w, uint32_t which);

/* host.c: what workers of one host do for each other; nothing where they share nothing */
void host_open(struct sim *s, struct worker *w);
void host_close(struct sim *s, struct worker *w);
void host_listed(struct sim *s, struct worker *w, uint32_t member);
void host_epoch(struct sim *s, struct worker *w);
void host_part(struct sim *s, struct worker *w);
void host_died(struct sim *s, struct worker *w);
void host_begin(struct sim *s, struct worker *w);
void host_final(struct sim *s, struct worker *w, uint32_t which);
void host_answered(struct sim *s, struct worker *w, uint32_t which);
void host_stall(struct sim *s, struct worker *w, bool stalled);
void host_cancel(struct sim *s, struct worker *w);
bool host_idle(const struct worker *w);
void host_run(struct sim *s, struct worker *w); /* after each of its events */
void host_event(struct sim *s, const struct event *e);

/* chaos.c */
void chaos_begin(struct sim *s);
void chaos_event(struct sim *s, const struct event *e);
/* A moment at which losing this worker hurts. */
void chaos_chance(struct sim *s, uint32_t worker);
/* A moment at which a sum is between it and another one. */
void chaos_at_sum(struct sim *s, uint32_t worker);

#endif
