/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the files of the provider `ofi` share. load.c: libfabric when it is
 * there; edge.c: each call of it; link.c: an endpoint of libfabric from opening to close; engine.c: the one
 * thread that uses them; conn.c: what a connection says by signals; op.c:
 * reads, writes, notices; ask.c: reads as two writes; region.c: memory and its
 * keys; instance.c: the ops.
 *
 * libfabric's own header is <rdma/fabric.h> too: these files are built with the
 * tree on the path of quoted includes alone.
 */
#ifndef SHARDMESH_OFI_H
#define SHARDMESH_OFI_H

#include "rdma/fabric.h"

#include <pthread.h>
#include <rdma/fabric.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_rma.h>
#include <sys/queue.h>

#define OFI_PROVIDER "tcp;ofi_rxm"
#define OFI_SECRET_BYTES 16
#define OFI_NAME_MAX 256
#define OFI_ADDRESSES 4096 /* given out and not used yet; the oldest is forgotten first */
#define OFI_OPS 1024       /* posted and not completed, per endpoint */
#define OFI_SLICES 32      /* with libfabric at a time, per endpoint */
#define OFI_SLICE_BYTES (512u << 10)
#define OFI_NOTICES 4096        /* that the user has not taken, per endpoint */
#define OFI_NOTICES_ENOUGH 1024 /* of them: no more is read from libfabric until the user takes some */
#define OFI_SIGNALS 8           /* handed out by one fab_poll */
#define OFI_INFLIGHT_BYTES (16ull << 20)
#define OFI_DEADLINE_NS 5000000000ull
#define OFI_CONNECTION_BYTES (4u << 20) /* with tcp;ofi_rxm: nearly all of it libfabric's */
#define OFI_DOWN_NS 30000000000ull

_Static_assert(OFI_OPS >= FAB_BATCH_MAX, "a batch fits");

/* ------------------------------------------------------------------ load.c */

/* 0, or -ELIBACC and how to get it. */
int load_check(char reason[160]);
/* What libfabric calls them; -ELIBACC, NULL or 0 without it. */
int load_getinfo(uint32_t version, const char *node, uint64_t flags, const struct fi_info *hints, struct fi_info **out);
struct fi_info *load_allocinfo(void);
void load_freeinfo(struct fi_info *info);
int load_fabric(struct fi_fabric_attr *attr, struct fid_fabric **out);
uint32_t load_version(void);
const char *load_strerror(int number);

/* ------------------------------------------------------------------ edge.c */

/* All: 0 or -Exxx; edge_completions: how many. -EAGAIN: nothing there, or no room now. */
int edge_errno(int64_t ret);
int edge_getinfo(const char *node, uint64_t flags, const struct fi_info *hints, struct fi_info **out);
int edge_fabric(struct fi_info *info, struct fid_fabric **out);
int edge_domain(struct fid_fabric *fabric, struct fi_info *info, struct fid_domain **out);
int edge_endpoint(struct fid_domain *domain, struct fi_info *info, struct fid_ep **out);
int edge_cq(struct fid_domain *domain, struct fi_cq_attr *attr, struct fid_cq **out);
int edge_av(struct fid_domain *domain, struct fi_av_attr *attr, struct fid_av **out);
int edge_bind(struct fid_ep *ep, struct fid *what, uint64_t flags);
int edge_enable(struct fid_ep *ep);
int edge_getname(struct fid_ep *ep, void *name, size_t *bytes);
int edge_wait_fd(struct fid_cq *cq, int *fd);
int edge_insert(struct fid_av *av, const void *name, fi_addr_t *out);
int edge_register(struct fid_domain *domain, const struct fi_mr_attr *attr, struct fid_mr **out);
int edge_trywait(struct fid_fabric *fabric, struct fid **fids, int n);
int edge_read(struct fid_ep *ep, void *to, size_t bytes, void *desc, fi_addr_t from, uint64_t at, uint64_t key,
	      void *context);
int edge_write(struct fid_ep *ep, const struct fi_msg_rma *msg, uint64_t flags);
int edge_completions(struct fid_cq *cq, struct fi_cq_data_entry *out, size_t max);
int edge_failure(struct fid_cq *cq, struct fi_cq_err_entry *out);
int edge_close(struct fid *fid);

/* ------------------------------------------------------------------ objects */

/* A read that the owner is asked to write (ask.c). seq is last: it is there when the rest is. */
struct ofi_request {
	uint64_t key, offset, bytes; /* of the owner's memory */
	uint64_t to_key, to_at;
	_Atomic uint64_t seq;
};

/*
 * What the peer may write to without being asked: a word that says that it has
 * reached us, one that says that it goes, requests, how many of ours it has
 * answered, and a word that nobody reads, for writes that are only a notice.
 * Behind it, where ours leave from.
 */
struct ofi_mailbox {
	_Atomic uint64_t hello, bye, answered;
	uint64_t sink;
	struct ofi_request request[OFI_SLICES];
	uint64_t out;
	uint64_t out_answered[2 * OFI_SLICES];
	struct ofi_request out_request[OFI_SLICES];
};

/* One generation of a connection, as one side describes it to the other. */
struct ofi_side {
	uint64_t id;  /* fab_ep's */
	uint64_t tag; /* proves to this side that a word or a notice is meant for it */
	uint64_t mailbox_at, mailbox_key;
	uint32_t name_bytes;
	uint8_t name[OFI_NAME_MAX];
};

enum ofi_signal_type { OFI_ADDRESS = 1, OFI_SIDE };

/* What the address blob and signals carry. */
struct ofi_signal {
	uint32_t magic; /* and protocol version */
	uint16_t type;
	uint16_t reserved;
	uint32_t generation, reserved2;
	uint64_t to; /* id of the side that is spoken to; 0: who has given out the secret */
	uint8_t secret[OFI_SECRET_BYTES];
	char provider[40];
	struct ofi_side side;
};
_Static_assert(sizeof(struct ofi_signal) <= FAB_BLOB_MAX, "a signal fits a blob");

/* What libfabric has of one generation; all NULL while there is none. */
struct ofi_link {
	struct fid_ep *ep;
	struct fid_cq *cq;
	struct fid_av *av;
	struct fid_mr *mailbox_mr;
	int wait_fd; /* -1: none */
	bool enabled;
	fi_addr_t far;
};

struct ofi_op {
	TAILQ_ENTRY(ofi_op) link;
	struct fab_remote *remote;
	struct fab_region *local;
	uint64_t remote_offset, local_offset, bytes, user;
	uint64_t posted;    /* bytes handed to libfabric */
	uint64_t failed_ns; /* when it was first in flight on a connection that broke; 0: never */
	uint32_t slices;    /* of them, with libfabric */
	bool noticed;       /* ordered writes: the notice is on its way */
	uint32_t imm;
	int status;
	bool write;
};
TAILQ_HEAD(ofi_ops, ofi_op);

/* The context of one call; the first bytes are libfabric's. */
struct ofi_slice {
	struct fi_context2 context;
	struct ofi_op *op; /* NULL: a word to the peer's mailbox; or an answer */
	uint64_t bytes;
};

enum ofi_state {
	OFI_CLOSED, /* no generation: waits for its turn to try again */
	OFI_ALONE,  /* open; what the peer has of this generation is not known */
	OFI_PAIRED, /* known; the peer is being reached (who connected), or waited for (who accepted) */
	OFI_UP,
	OFI_OVER, /* given up, or the peer has gone: operations are complete, FAB_EV_DOWN follows them */
};

struct ofi_export {
	TAILQ_ENTRY(ofi_export) of_ep, of_region;
	struct fab_ep *ep;
	struct fab_region *region;
	struct fid_mr *mr;
	bool landing; /* for what we read: not given by the user */
};
TAILQ_HEAD(ofi_exports, ofi_export);

struct fab_ep {
	struct fab *fab;
	TAILQ_ENTRY(fab_ep) link;

	/* Written once, before the engine knows it. */
	uint64_t user, id; /* id: what the peer's signals name; never 0 */
	bool connects;     /* our fab_connect: we drive */
	uint8_t secret[OFI_SECRET_BYTES];

	/* The engine's. */
	TAILQ_ENTRY(fab_ep) turn_link;
	struct ofi_link fi;
	enum ofi_state state;
	uint32_t generation, attempts;
	struct ofi_side own, far;
	bool word_posted, word_done;
	bool lost;            /* notices that the peer relies on: the end */
	uint64_t attempt_ns;  /* when this generation began */
	uint64_t broken_ns;   /* since when it has not been up */
	uint64_t up_ns;       /* since when it has */
	uint64_t retry_ns;    /* CLOSED: when to try again */
	uint64_t progress_ns; /* when something of what is in flight last moved */
	struct ofi_ops queue; /* taken over, not complete */
	struct ofi_op *next;  /* of the queue: the first that is not wholly posted */
	uint32_t n_free;
	struct ofi_slice *free[OFI_SLICES + 1];
	struct ofi_slice slice[OFI_SLICES + 1]; /* one more for words */
	uint64_t inflight;
	struct ofi_mailbox *mailbox;
	struct ofi_exports exports;
	uint64_t asked, got;              /* reads that the peer was asked for, and has written */
	struct ofi_slice ask[OFI_SLICES]; /* by asked modulo its length */
	uint64_t served, answered;        /* requests of the peer: written, and said so */
	uint32_t serving;                 /* of served: with libfabric */
	struct ofi_slice answer;

	/* Between the engine and the user's thread, under fab->lock. */
	TAILQ_ENTRY(fab_ep) ready_link;
	bool ready, signal_due, incoming_due;
	bool connected; /* has been up */
	bool down;      /* nothing more can be posted */
	int status;     /* of down: the last reason */
	struct ofi_signal incoming;
	struct fab_blob signal;
	struct ofi_ops submitted, finished;
	uint32_t notice_head, notice_tail;
	uint32_t notices[OFI_NOTICES];
	char text[128]; /* of describe */

	/* The user's thread's. */
	uint64_t far_id;  /* who may send it signals; 0: not known yet */
	bool told, ended; /* the user has had FAB_EV_CONNECTED or FAB_EV_ACCEPTED; FAB_EV_DOWN */
	struct ofi_ops idle;
	struct ofi_op ops[OFI_OPS];
};
TAILQ_HEAD(ofi_eps, fab_ep);

struct fab_region {
	struct fab *fab;
	TAILQ_ENTRY(fab_region) link;
	struct fid_mr *mr; /* for our own operations, and for peers where keys are the provider's */
	uint8_t *base;
	uint64_t bytes;
	enum fab_access access;
	bool adopted, exported;
	uint32_t ops; /* in flight */
	struct ofi_exports exports;
};
TAILQ_HEAD(ofi_regions, fab_region);

struct fab_remote {
	struct fab *fab;
	struct fab_ep *ep; /* NULL once disconnected */
	TAILQ_ENTRY(fab_remote) link;
	uint64_t at, key, bytes;
	enum fab_access access;
	uint32_t ops; /* in flight */
};
TAILQ_HEAD(ofi_remotes, fab_remote);

struct ofi_address {
	uint8_t secret[OFI_SECRET_BYTES];
	uint64_t user;
};

struct ofi_call {
	void (*run)(void *ctx);
	void *ctx;
	bool done;
};

struct fab {
	struct log *log;
	struct fi_info *info;
	struct fid_fabric *fabric;
	struct fid_domain *domain;
	bool local_keys, provider_keys, virtual_addresses, tagged, waits;
	bool asks; /* reads are asked for, and writes arrive in order (ask.c) */
	uint64_t inflight_max, deadline_ns, down_ns;

	/* The engine's. */
	pthread_t engine;
	int epoll_fd, wake_fd;
	struct ofi_eps engaged; /* changed in calls alone */
	uint64_t inflight;

	pthread_mutex_t lock;
	pthread_cond_t called;
	struct ofi_call *call;
	bool stop, asleep;
	struct ofi_eps ready;
	bool armed, rung; /* the user sleeps; event_fd has been written */

	/* The user's thread's. */
	int event_fd;
	struct ofi_eps eps;
	struct ofi_regions regions;
	struct ofi_remotes remotes;
	uint32_t address_n, signal_n;
	struct fab_blob signals[OFI_SIGNALS]; /* handed out by the last fab_poll */
	struct fab_counters counters;
	struct ofi_address addresses[OFI_ADDRESSES];
};

/* Where one fab_poll puts its events. */
struct ofi_sink {
	struct fab_event *out;
	uint32_t n, max;
};

static inline void ofi_count(_Atomic uint64_t *counter, uint64_t n)
{
	atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}

int ofi_random(void *out, size_t bytes); /* at most 256 */

/* ------------------------------------------------------------------ link.c */

/* What libfabric has for the options. reason: what was found, or why nothing. */
int ofi_find(const struct fab_options *o, struct fi_info **out, char reason[160]);
/* The peer's words land in `mailbox`. Fills own->name, own->mailbox_*. */
int ofi_link_open(struct fab *f, struct ofi_mailbox *mailbox, struct ofi_link *out, struct ofi_side *own);
/* When it returns, nothing of it moves bytes any more. */
void ofi_link_close(struct fab *f, struct ofi_link *l);
/* Registers; flags of libfabric. The key is random where it is ours to choose. */
int ofi_register(struct fab *f, void *at, uint64_t bytes, uint64_t flags, struct fid_mr **out);

/* ---------------------------------------------------------------- engine.c */

int ofi_engine_start(struct fab *f);
void ofi_engine_stop(struct fab *f);
/* Runs it on the engine's thread, and waits for that. */
void ofi_engine_call(struct fab *f, void (*run)(void *ctx), void *ctx);
/* With the lock held: the engine has something to do. */
void ofi_engine_wake(struct fab *f);
/* With the lock held: fab_poll has something to do for ep. */
void ofi_make_ready(struct fab_ep *ep);

/* ------------------------------------------------------------------ conn.c */

int ofi_address(struct fab *f, uint64_t user, struct fab_blob *out);
int ofi_connect(struct fab *f, const struct fab_blob *address, uint64_t user, struct fab_ep **out);
int ofi_signal(struct fab *f, uint64_t user, const struct fab_blob *in);
void ofi_disconnect(struct fab_ep *ep);
void ofi_describe(const struct fab_ep *ep, char *out, size_t bytes);
/* Engine: what time and the peer's signals ask for. True: something was done. */
bool ofi_conn_step(struct fab_ep *ep, uint64_t now);
/* Engine: from now on the peer is to be reached, or will reach us. */
void ofi_conn_start(struct fab_ep *ep);
/* Engine: ends this generation and begins another after a pause. */
void ofi_conn_break(struct fab_ep *ep, int status, const char *why);

/* -------------------------------------------------------------------- op.c */

int ofi_read(struct fab_ep *ep, const struct fab_op *op, uint32_t n);
int ofi_write_notify(struct fab_ep *ep, const struct fab_op *op, uint32_t n);
void ofi_ops_init(struct fab_ep *ep);
/* User's thread, with the lock held: hands out what has completed. */
void ofi_ops_emit(struct fab_ep *ep, struct ofi_sink *s);
/* User's thread, after the engine has let go of ep: forgets what is posted. */
void ofi_ops_drop(struct fab_ep *ep);
/* Engine: can a few more notices be kept for the user? */
bool ofi_notice_room(struct fab_ep *ep);
/* Engine: reads completions. True: there were some. May break ep. */
bool ofi_ops_progress(struct fab_ep *ep, uint64_t now);
/* Engine, on an endpoint that is up: posts what there is room for. True: something was posted. May break ep. */
bool ofi_ops_post(struct fab_ep *ep, uint64_t now);
/*
 * Engine: reads what is left before the link is closed, since what is in
 * libfabric's queue has been confirmed to the peer. False: notices are lost.
 */
bool ofi_ops_drain(struct fab_ep *ep);
/*
 * Engine: what is in flight is to be posted again; the link is closed. Returns
 * since when the most unfortunate operation fails; `now` for none.
 */
uint64_t ofi_ops_rewind(struct fab_ep *ep, uint64_t now);
/* Engine: everything taken over completes with status. */
void ofi_ops_fail(struct fab_ep *ep, int status);
/* Engine: `value` to the peer's mailbox at `offset`. Its completion sets ep->word_done. */
int ofi_word_post(struct fab_ep *ep, size_t offset, uint64_t value);

/* Engine: `bytes` to the peer. context NULL: nobody waits for it; imm NULL: no notice. */
int ofi_write_bytes(struct fab_ep *ep, void *from, uint64_t bytes, struct fid_mr *mr, struct fi_rma_iov to,
		    void *context, const uint32_t *imm);
/* Engine: a slice of o is done. */
void ofi_slice_done(struct fab_ep *ep, struct ofi_op *o, uint64_t bytes);

/* ------------------------------------------------------------------- ask.c */

/* Engine: asks for the next slice of o; 0, -EAGAIN. */
int ofi_ask(struct fab_ep *ep, struct ofi_op *o, uint64_t bytes);
/* Engine: takes note of what the peer has written. True: something. */
bool ofi_answers_in(struct fab_ep *ep, uint64_t now);
/* Engine: writes what the peer asks for. True: something was posted. May break ep. */
bool ofi_serve(struct fab_ep *ep);

/* ---------------------------------------------------------------- region.c */

/* Engine: the peer's right to write what we read into r; made when it is first needed. */
int ofi_landing(struct fab_ep *ep, struct fab_region *r, struct fid_mr **out);

int ofi_region_open(struct fab *f, const struct fab_region_attr *a, struct fab_region **out, struct err *e);
void ofi_region_close(struct fab_region *r);
void *ofi_region_addr(struct fab_region *r);
int ofi_export(struct fab_ep *ep, struct fab_region *r, struct fab_blob *out);
int ofi_import(struct fab_ep *ep, const struct fab_blob *blob, struct fab_remote **out);
void ofi_remote_close(struct fab_remote *r);
uint64_t ofi_remote_bytes(const struct fab_remote *r);
/* Engine: takes back what ep's peer was given. */
void ofi_exports_end(struct fab_ep *ep);

#endif
