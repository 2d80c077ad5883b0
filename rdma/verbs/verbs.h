/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the files of the provider `verbs` share. device.c: devices, ports and
 * what is chosen of them; region.c: memory and its keys; qp.c: queue pairs;
 * post.c: operations on their way out; cq.c: completions and events on their
 * way in; rail.c: a rail from nothing to up and back; connect.c: how it is
 * agreed on over the control connection; cm.c: over librdmacm; ep.c: an endpoint
 * from address to end; fab.c: the instance.
 *
 * An endpoint is made of rails. A rail is a port of ours, a port of the peer
 * and the queue pairs between them: some for reads, some for pushes. It is what
 * breaks and what is rebuilt, and operations go to whichever rails are up.
 */
#ifndef SHARDMESH_VERBS_H
#define SHARDMESH_VERBS_H

#include "rdma/fabric.h"

#include <assert.h>
#include <infiniband/verbs.h>
#include <netinet/in.h>
#include <rdma/rdma_cma.h>
#include <string.h>
#include <sys/queue.h>

#define VB_MAGIC 0x31425653u /* "SVB1" */
#define VB_PROTOCOL 2
#define VB_PORTS_MAX 8
#define VB_QPS_MAX 8   /* of one use, a rail */
#define VB_KEYS_MAX 96 /* of a region: ports times pieces */
#define VB_SLICE (512u << 10)
#define VB_CHAIN 32     /* work requests a doorbell; the last is signalled */
#define VB_SQ_DEPTH 128 /* power of two */
#define VB_RQ_DEPTH 256
#define VB_OPS 1024 /* posted and not completed, an endpoint */
#define VB_INLINE 64
#define VB_SECRET_BYTES 16
#define VB_ADDRESSES 4096 /* given out and not used yet; the oldest is forgotten first */
#define VB_BULK_BYTES (1u << 20)
#define VB_NOTICES 4096   /* taken from the NIC and not by the user, an endpoint; power of two */
#define VB_WORDS_MAX 1024 /* signals that nobody fetched */

#define VB_MS 1000000ull
#define VB_S 1000000000ull
#define VB_STEP_NS (3 * VB_S)       /* an offer, or a cm call, without an answer */
#define VB_SETTLE_NS (2 * VB_S)     /* connected with the rails that are up by then */
#define VB_DRAIN_NS (1 * VB_S)      /* then the queue pair is destroyed as it is */
#define VB_RECEIVES_NS (30 * VB_MS) /* soft-RoCE does not flush receives */
#define VB_RETRY_FIRST_NS (20 * VB_MS)
#define VB_RETRY_NS (125 * VB_MS) /* then, doubled with every try */
#define VB_RETRY_DOUBLINGS 3      /* to 1 s */
#define VB_STEADY_NS (2 * VB_S)   /* up for so long: the next break is a new story */
#define VB_LOOK_NS (1 * VB_S)     /* how often a rail of which we only serve is asked for its state */

_Static_assert(VB_OPS >= FAB_BATCH_MAX && VB_SQ_DEPTH >= VB_CHAIN, "a batch and a chain fit");
/* Asleep until a solicited notice, of which each chain has one; half a chain of receives may be owed. */
_Static_assert(VB_RQ_DEPTH - VB_CHAIN / 2 >= VB_CHAIN, "a chain's notices find receives while nobody looks");

/* ------------------------------------------------------- what peers exchange */

/* A port as its owner describes it. */
struct vb_port_desc {
	uint8_t gid[16];
	uint16_t lid;
	uint8_t link;      /* IBV_LINK_LAYER_* */
	uint8_t mtu;       /* enum ibv_mtu */
	uint8_t reads_in;  /* max_qp_rd_atom: reads of a peer that we answer at once */
	uint8_t reads_out; /* max_qp_init_rd_atom: reads of ours at once */
	uint8_t has_ip;    /* the gid is one */
	uint8_t zero;
};
_Static_assert(sizeof(struct vb_port_desc) == 24, "no padding");

/* An address blob: the first n_ports of port. */
struct vb_address {
	uint32_t magic;
	uint16_t protocol;
	uint16_t cm_port; /* 0: nobody listens */
	uint64_t job;     /* hash of its name */
	uint32_t member;
	uint8_t n_ports, qps, zero[2];
	uint8_t secret[VB_SECRET_BYTES];
	struct vb_port_desc port[VB_PORTS_MAX];
};
_Static_assert(sizeof(struct vb_address) == 40 + 24 * VB_PORTS_MAX, "no padding");
_Static_assert(sizeof(struct vb_address) <= FAB_BLOB_MAX, "an address fits");

/* Who asks for which queue pair of which rail: begins each signal, and is the private data of a cm connect. */
struct vb_hello {
	uint32_t magic;
	uint16_t protocol;
	uint8_t rail, n_rails;
	uint64_t job;
	uint64_t nonce; /* of the connecting endpoint */
	uint32_t member;
	uint32_t generation; /* of the rail; grows with every attempt */
	uint8_t secret[VB_SECRET_BYTES];
	uint8_t qp;  /* cm: which of the rail's */
	uint8_t qps; /* of each use */
	uint8_t active_port, passive_port;
	uint8_t zero[4];
};
_Static_assert(sizeof(struct vb_hello) == 56, "all the private data that a cm connect can carry");

enum vb_word {
	VB_OFFER = 1, /* connecting side: my queue pairs are these */
	VB_ACCEPT,    /* mine are these, ready to receive */
	VB_READY,     /* mine are ready too: go */
	VB_BROKEN,    /* accepting side: offer anew */
	VB_LATER,     /* not now; offer again */
	VB_GONE,      /* there is no such endpoint: give up */
};

struct vb_end {
	uint32_t qpn, psn;
};

struct vb_msg {
	struct vb_hello hello;
	uint8_t word;   /* enum vb_word */
	uint8_t active; /* said by the side that connected */
	uint8_t zero[6];
	struct vb_port_desc port;
	struct vb_end end[2 * VB_QPS_MAX]; /* reads, then pushes */
};
_Static_assert(sizeof(struct vb_msg) == 88 + 16 * VB_QPS_MAX, "no padding");

/* A region blob: key[piece * n_ports + port], the first n_keys. */
struct vb_region_desc {
	uint32_t magic;
	uint16_t protocol;
	uint8_t access; /* enum fab_access */
	uint8_t n_ports;
	uint64_t at, bytes;
	uint64_t piece_bytes; /* a key is good for so much */
	uint32_t n_keys, zero;
	uint32_t key[VB_KEYS_MAX];
};
_Static_assert(sizeof(struct vb_region_desc) == 40 + 4 * VB_KEYS_MAX, "no padding");
_Static_assert(sizeof(struct vb_region_desc) <= FAB_BLOB_MAX, "a region fits");

/* ------------------------------------------------------------------- devices */

struct vb_dev {
	struct ibv_context *context;
	struct ibv_pd *pd; /* what is read, and all that is ours */
	struct ibv_comp_channel *channel;
	struct ibv_device_attr attr;
	char name[64];
	bool fatal;
};

struct vb_port {
	struct vb_dev *dev;
	uint8_t num;
	bool up;
	struct ibv_port_attr attr;
	struct vb_port_desc desc;
	uint32_t gid_index;
	bool roce2, has_home;
	uint8_t home[16]; /* the GID that it was opened with */
	char ip[INET6_ADDRSTRLEN];
	char name[72]; /* "rxe0/1" */
	uint64_t in_flight;
};

/* ------------------------------------------------------------------ instance */

struct vb_rail;

struct vb_slice {
	struct vb_op *op;
	uint32_t bytes;
	uint64_t posted_ns;
};

struct vb_qp {
	struct vb_rail *rail;
	struct ibv_qp *qp;
	struct rdma_cm_id *id; /* cm alone */
	bool push;
	bool ready; /* cm: established */
	uint8_t index;
	uint32_t psn;
	struct vb_end peer;
	/* Send queue: slices [tail, head) are in the ring, those before `posted` with the NIC. */
	uint32_t head, tail, posted;
	uint64_t in_flight;
	uint32_t receives, owed; /* with the NIC; to be given back to it */
	uint32_t chain_n;
	struct ibv_send_wr wr[VB_CHAIN];
	struct ibv_sge sge[VB_CHAIN];
	struct vb_slice slice[VB_SQ_DEPTH];
};

enum vb_rail_state {
	VB_IDLE,      /* nothing: connecting side, waiting to try again; accepting side, for an offer */
	VB_RESOLVING, /* connecting, cm: address, route, answer */
	VB_OFFERED,   /* connecting, control: the offer is out */
	VB_ACCEPTED,  /* accepting: able to receive, waiting for the other side to be ready */
	VB_UP,
	VB_DRAINING, /* queue pairs in error, work on its way back */
};

struct vb_rail {
	struct fab_ep *ep;
	struct vb_port *port;
	uint8_t index, remote_port;
	bool by_cm;
	bool no_cm; /* it was tried and did not work */
	bool hot;   /* is on fab->hot: polled */
	bool was_up;
	enum vb_rail_state state;
	uint32_t generation, attempts;
	uint64_t since_ns, retry_ns, looked_ns;
	struct vb_port_desc remote;
	enum ibv_mtu mtu;
	struct ibv_cq *cq;
	uint32_t n_qps; /* both uses */
	struct vb_qp *qp;
	TAILQ_ENTRY(vb_rail) hot_link;
};
TAILQ_HEAD(vb_rails, vb_rail);

struct vb_op {
	struct fab_op op;
	TAILQ_ENTRY(vb_op) link; /* of free, todo or done */
	uint64_t posted;         /* bytes */
	uint32_t out;            /* slices */
	bool write, queued;      /* queued: is on todo */
	bool failed;             /* a slice came back undone: all of it is done again */
	int status;
	struct vb_qp *qp; /* a write keeps to one queue pair, for its notice to be last */
};
TAILQ_HEAD(vb_ops, vb_op);

struct vb_notice {
	uint32_t imm;
	uint8_t rail, qp;
	uint32_t generation;
};

enum vb_ep_state {
	VB_EP_CONNECTING,
	VB_EP_UP,    /* it has been; rails may be down */
	VB_EP_DOWN,  /* nothing left with the NICs; operations are being given back, then FAB_EV_DOWN */
	VB_EP_ENDED, /* FAB_EV_DOWN is out */
};

struct fab_ep {
	struct fab *fab;
	TAILQ_ENTRY(fab_ep) link;
	bool active; /* we connected */
	bool known;  /* the user has it */
	bool announced;
	enum vb_ep_state state;
	int status;
	uint64_t user, nonce, born_ns;
	uint64_t broken_ns; /* since when no rail is up; 0: one is */
	uint32_t peer;      /* member */
	uint16_t cm_port;
	uint8_t secret[VB_SECRET_BYTES];
	uint8_t n_rails, qps;
	uint32_t n_exports; /* nothing was ever exported writable: no notice is due */
	struct vb_rail rail[VB_PORTS_MAX];
	struct ibv_pd *pd[VB_PORTS_MAX]; /* accepting side: a device's pushes of this peer alone; by device */
	uint32_t n_todo;
	struct vb_ops free, todo, done;
	uint32_t notice_head, notice_tail;
	struct vb_notice notice[VB_NOTICES];
	struct vb_op op[VB_OPS];
};
TAILQ_HEAD(vb_eps, fab_ep);

struct fab_region {
	struct fab *fab;
	TAILQ_ENTRY(fab_region) link;
	uint8_t *base;
	uint64_t bytes, mapped; /* mapped: 0 where the memory is somebody else's */
	uint64_t piece_bytes;
	uint32_t n_pieces;
	enum fab_access access;
	bool exported;
	struct fab_ep *inbox_of; /* whose protection domains hold its keys */
	uint32_t ops;            /* in flight */
	struct ibv_mr **mr;      /* [device * n_pieces + piece] */
	char name[32];
};
TAILQ_HEAD(vb_regions, fab_region);

struct fab_remote {
	struct fab *fab;
	struct fab_ep *ep; /* NULL once disconnected */
	TAILQ_ENTRY(fab_remote) link;
	uint32_t ops;
	struct vb_region_desc desc;
};
TAILQ_HEAD(vb_remotes, fab_remote);

struct vb_signal {
	TAILQ_ENTRY(vb_signal) link;
	struct fab_ep *ep;
	uint64_t user;
	struct fab_blob blob;
};
TAILQ_HEAD(vb_signals, vb_signal);

struct vb_given {
	uint8_t secret[VB_SECRET_BYTES];
	uint64_t user;
};

struct fab {
	struct log *log;
	struct fab_options o; /* defaults filled in */
	uint64_t job;
	uint32_t member;
	int epoll_fd, timer_fd;
	uint64_t timer_ns; /* its interval; 0: off */
	uint32_t polls;    /* since the kernel was asked for what it has */
	uint32_t n_devs, n_ports;
	struct vb_dev dev[VB_PORTS_MAX];
	struct vb_port port[VB_PORTS_MAX];
	uint64_t piece_bytes; /* the smallest max_mr_size, in whole huge pages */
	uint64_t locked_bytes;
	struct rdma_event_channel *cm;
	struct rdma_cm_id *listener;
	uint16_t cm_port;
	struct vb_eps eps;
	struct vb_rails hot;
	struct vb_regions regions;
	struct vb_remotes remotes;
	struct vb_signals signals, told; /* to be told; told in the last poll */
	uint32_t n_signals, n_todo, n_unsettled;
	struct fab_counters counters;
	uint32_t given_n;
	struct vb_given given[VB_ADDRESSES];
};

/* Where one fab_poll puts its events. */
struct vb_sink {
	struct fab_event *out;
	uint32_t n, max;
};

static inline void vb_count(_Atomic uint64_t *counter, uint64_t n)
{
	atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}

/* ---------------------------------------------------------------- device.c */

/* What a port would be used with, or why it is not; text for people. */
int vb_probe(const struct fab_options *o, char reason[160]);
/* Opens all devices and ports that the options let in. -ENODEV: none, e says what was found. */
int vb_devices_open(struct fab *f, struct err *e);
void vb_devices_close(struct fab *f);
/* Looks again at the port's state and GID, which moves when a link flaps. -ENETDOWN. */
int vb_port_refresh(struct fab *f, struct vb_port *p);
uint32_t vb_mtu_bytes(enum ibv_mtu mtu);
/* The port's IP address, as cm wants it. */
void vb_port_sockaddr(const struct vb_port_desc *d, uint16_t port, struct sockaddr_storage *out);

/* ---------------------------------------------------------------- region.c */

/* `need` bytes more with `have` locked: 0, or -ENOMEM and what to do about it. */
int vb_memlock_check(uint64_t need, uint64_t have, uint64_t limit, bool privileged, struct err *e);
/* The limit of this process, and whether it is exempt from it. */
void vb_memlock(uint64_t *limit, bool *privileged);
int vb_region_open(struct fab *f, const struct fab_region_attr *a, struct fab_region **out, struct err *e);
void vb_region_close(struct fab_region *r);
void *vb_region_addr(struct fab_region *r);
int vb_export(struct fab_ep *ep, struct fab_region *r, struct fab_blob *out);
int vb_import(struct fab_ep *ep, const struct fab_blob *blob, struct fab_remote **out);
void vb_remote_close(struct fab_remote *r);
uint64_t vb_remote_bytes(const struct fab_remote *r);
/* Takes the keys of the inboxes that were exported to ep back. */
void vb_inboxes_revoke(struct fab_ep *ep);

/* -------------------------------------------------------------------- qp.c */

/* The completion queue and the queue pairs of the rail, in INIT (control) or RESET (cm). */
int vb_rail_build(struct vb_rail *r);
/* Frees all of it; what had not completed goes back to its operations. */
void vb_rail_unbuild(struct vb_rail *r);
/* To RTS, with what the peer said. Receives are posted first. */
int vb_qp_connect(struct vb_qp *q, const struct vb_port_desc *remote);
/* The same with what cm found out. */
int vb_qp_connect_cm(struct vb_qp *q, uint8_t reads_in, uint8_t reads_out);
int vb_qp_receive(struct vb_qp *q, uint32_t n);
void vb_rail_to_error(struct vb_rail *r);
bool vb_rail_drained(const struct vb_rail *r, uint64_t now);
/* Reads of one side at the other at once: never 0. -ENOTSUP: a device answers none. */
int vb_reads(uint8_t ours, uint8_t theirs, uint8_t *out);

/* ------------------------------------------------------------------ post.c */

int vb_read(struct fab_ep *ep, const struct fab_op *op, uint32_t n);
int vb_write_notify(struct fab_ep *ep, const struct fab_op *op, uint32_t n);
/* Posts what waits, as far as rails, queues and the budget have room. */
void vb_pump(struct fab *f);
/* A slice is over; `done`: its bytes are there. */
void vb_slice_return(struct vb_qp *q, struct vb_slice *s, bool done);
/* Every operation that is with no NIC completes with status. */
void vb_ops_fail(struct fab_ep *ep, int status);

/* -------------------------------------------------------------------- cq.c */

void vb_rail_heat(struct vb_rail *r);
/* Handles up to a few completions. Returns how many; may break the rail. */
uint32_t vb_rail_poll(struct vb_rail *r);
/* Asks the rails that are polled for events instead. False: something was there. */
bool vb_rails_arm(struct fab *f);
void vb_completion_events(struct vb_dev *d);
void vb_async_events(struct fab *f, struct vb_dev *d);

/* ------------------------------------------------------------------ rail.c */

/* Connecting side: a new generation. */
void vb_rail_start(struct vb_rail *r);
void vb_rail_up(struct vb_rail *r);
/* Queue pairs to error; what comes next is decided when they are drained. */
void vb_rail_break(struct vb_rail *r, int status, const char *why);
/* A queue pair of ours went to error by what the peer did: counted as refused, then broken. */
void vb_rail_refuse(struct vb_rail *r, const char *why);
/* As far as it can be taken down at once, for what must not wait. */
void vb_rail_stop(struct vb_rail *r);
/* Accepting side: makes way for a newer generation and builds it. */
int vb_rail_take(struct vb_rail *r, const struct vb_hello *h);
void vb_rail_tick(struct vb_rail *r, uint64_t now);
/* Of a port that changed. */
void vb_port_changed(struct fab *f, struct vb_port *p, bool up, const char *why);

/* --------------------------------------------------------------- connect.c */

void vb_hello_init(const struct vb_rail *r, uint8_t qp, struct vb_hello *out);
/* Does it belong to this job and protocol? -EPROTO. */
int vb_hello_check(const struct fab *f, const struct vb_hello *h);
void vb_say(struct vb_rail *r, enum vb_word word);
/* To somebody of whom no endpoint is. */
void vb_say_gone(struct fab *f, uint64_t user, const struct vb_hello *h, bool active);
int vb_signal_in(struct fab *f, uint64_t user, const struct fab_blob *in);
/* The accepting endpoint that a hello belongs to, made if it is its first. NULL: none, or no memory. */
struct fab_ep *vb_hello_ep(struct fab *f, const struct vb_hello *h, int *status);

/* -------------------------------------------------------------------- cm.c */

int vb_cm_open(struct fab *f);
void vb_cm_close(struct fab *f);
int vb_cm_dial(struct vb_rail *r);
/* Says good-bye and forgets the id. */
void vb_cm_hang_up(struct vb_qp *q);
void vb_cm_events(struct fab *f);

/* -------------------------------------------------------------------- ep.c */

int vb_address(struct fab *f, uint64_t user, struct fab_blob *out);
int vb_connect(struct fab *f, const struct fab_blob *address, uint64_t user, struct fab_ep **out);
void vb_disconnect(struct fab_ep *ep);
void vb_describe(const struct fab_ep *ep, char *out, size_t bytes);
/* Accepting side: the endpoint of a secret that was given out and is used up by it. */
int vb_ep_accept(struct fab *f, const struct vb_hello *h, struct fab_ep **out);
/* Gives it up: no rail stays, operations fail, then FAB_EV_DOWN. */
void vb_ep_down(struct fab_ep *ep, int status, const char *why);
/* A rail came up or went. */
void vb_ep_rails_changed(struct fab_ep *ep);
/* Everything that it has for the user, as far as there is room. */
void vb_ep_emit(struct fab_ep *ep, struct vb_sink *s);
bool vb_ep_has_events(const struct fab_ep *ep);
void vb_ep_tick(struct fab_ep *ep, uint64_t now);
void vb_ep_free(struct fab_ep *ep);
/* The protection domain of its pushes on a device, made on first use. */
int vb_ep_pd(struct fab_ep *ep, const struct vb_dev *d, struct ibv_pd **out);

/* ------------------------------------------------------------------- fab.c */

/* The timer runs at least this often from now on; the next quiet tick slows it. */
void vb_timer(struct fab *f, uint64_t interval_ns);
int vb_watch(struct fab *f, int fd, void *who);
int vb_random(void *out, size_t bytes);
void vb_signal_push(struct fab *f, struct fab_ep *ep, uint64_t user, const void *data, size_t bytes);

#endif
