/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the files of the provider `local` share. local_fd.c: file descriptors
 * and messages; local_region.c: memory and who may see it; local_map.c: where a
 * peer's memory lies in our address space; local_op.c: reads, writes, notices;
 * local_conn.c: a connection from greeting to end; local.c: the instance.
 */
#ifndef SHARDMESH_LOCAL_H
#define SHARDMESH_LOCAL_H

#include "rdma/fabric.h"

#include <sys/queue.h>
#include <sys/types.h>

#define LOCAL_KEY_BYTES 16
#define LOCAL_SOCKET_NAME_BYTES 42 /* "shardmesh-" and 32 hex digits */
#define LOCAL_ADDRESSES 4096       /* given out and not used yet; the oldest is forgotten first */
#define LOCAL_PARCELS 64           /* regions on their way, each direction, per endpoint */
#define LOCAL_OPS 1024             /* posted and not completed, per endpoint */
#define LOCAL_NOTICES 1024         /* waiting for room in the socket, per endpoint */
#define LOCAL_MSG_NOTICES 256
#define LOCAL_COPY_BYTES (8u << 20) /* copied in one fab_poll, so that it comes back to its caller */
#define LOCAL_GREETING_NS 10000000000ull

_Static_assert(LOCAL_OPS >= FAB_BATCH_MAX, "a batch fits");

/* What an address blob holds: where to connect, and a key that opens once. */
struct local_where {
	uint32_t magic;
	uint8_t key[LOCAL_KEY_BYTES];
	char socket_name[LOCAL_SOCKET_NAME_BYTES];
};

/* A region as its owner describes it: in the blob and, beside the file descriptor, on the socket. */
struct local_desc {
	uint32_t magic;
	uint32_t access; /* enum fab_access */
	uint8_t key[LOCAL_KEY_BYTES];
	uint64_t bytes;
	uint64_t page_bytes;
	char name[32];
};
_Static_assert(sizeof(struct local_desc) == 72, "no padding");

enum local_msg_type { LOCAL_HELLO = 1, LOCAL_WELCOME, LOCAL_PROOF, LOCAL_READY, LOCAL_REGION, LOCAL_NOTICE };

struct local_msg {
	uint32_t magic; /* and protocol version */
	uint16_t type;
	uint16_t count; /* of notices */
	union {
		uint8_t key[LOCAL_KEY_BYTES]; /* hello */
		uint64_t hash[2];             /* welcome, proof: of the other side's random file */
		struct local_desc region;
		uint32_t imm[LOCAL_MSG_NOTICES];
	};
};
_Static_assert(offsetof(struct local_msg, imm) == 8, "no padding");

struct local_parcel {
	struct local_desc desc;
	int fd;
};

struct local_op {
	const uint8_t *from;
	uint8_t *to;
	uint64_t bytes, user;
	struct fab_remote *remote;
	struct fab_region *local;
	uint32_t imm;
	bool write;
};

enum local_state {
	LOCAL_WAIT_HELLO,   /* accepted: who is it? */
	LOCAL_WAIT_PROOF,   /* accepted: its key was good; has it read our file? */
	LOCAL_WAIT_WELCOME, /* connecting: has it read our file? */
	LOCAL_WAIT_READY,   /* connecting: it is checking that we read its file */
	LOCAL_UP,
	LOCAL_BROKEN, /* socket closed; operations are being flushed, then FAB_EV_DOWN */
	LOCAL_DOWN,   /* FAB_EV_DOWN is out; waits for fab_disconnect */
};

struct fab_ep {
	struct fab *fab;
	TAILQ_ENTRY(fab_ep) link;
	TAILQ_ENTRY(fab_ep) ready_link;
	bool ready;    /* is on fab->ready */
	bool known;    /* the user has it: a failure is an event */
	bool want_out; /* the socket was full: EPOLLOUT is asked for */
	bool inbox;    /* a writable region of ours was exported to it: notices are due */
	enum local_state state;
	int sock, status;
	pid_t pid; /* of the other side, for the log */
	uint64_t user, deadline_ns;
	uint8_t key[LOCAL_KEY_BYTES];
	uint32_t op_head, op_tail; /* ring indices, never wrapped by hand */
	uint32_t notice_head, notice_tail;
	uint32_t arrived_n, leaving_n;
	struct local_parcel arrived[LOCAL_PARCELS]; /* not imported yet */
	struct local_parcel leaving[LOCAL_PARCELS]; /* waiting for room in the socket */
	uint32_t notices[LOCAL_NOTICES];
	struct local_op ops[LOCAL_OPS];
};
TAILQ_HEAD(local_eps, fab_ep);

struct fab_region {
	struct fab *fab;
	TAILQ_ENTRY(fab_region) link;
	int fd;
	uint8_t *base;
	uint64_t bytes, page_bytes;
	enum fab_access access;
	bool exported;
	uint32_t ops; /* in flight */
	char name[32];
};
TAILQ_HEAD(local_regions, fab_region);

struct fab_remote {
	struct fab *fab;
	struct fab_ep *ep; /* NULL once disconnected */
	TAILQ_ENTRY(fab_remote) link;
	int fd;
	uint8_t *base; /* all of it, for reads and writes */
	uint64_t bytes, page_bytes;
	enum fab_access access;
	uint32_t ops; /* in flight */
};
TAILQ_HEAD(local_remotes, fab_remote);

struct local_map {
	uintptr_t at;
	uint64_t bytes;
	const struct fab_remote *remote;
	bool reserved; /* lies in address space of the user: goes back to being reserved */
};
struct local_maps {
	struct local_map *v; /* sorted, disjoint */
	uint32_t n, capacity;
};

struct local_address {
	uint8_t key[LOCAL_KEY_BYTES];
	uint64_t user;
};

struct fab {
	struct log *log;
	bool maps;
	char job[64];
	uint32_t member;
	int epoll_fd, listen_fd, timer_fd, proof_fd;
	int spare_fd; /* given up for a moment to refuse a connection when there is no other */
	char socket_name[LOCAL_SOCKET_NAME_BYTES + 1];
	uint32_t greetings; /* endpoints on their way up: the timer runs while there is one */
	uint32_t address_n;
	bool sockets_first; /* whose turn it is in fab_poll */
	struct local_eps eps, ready;
	struct local_regions regions;
	struct local_remotes remotes;
	struct local_maps mapped;
	struct fab_ep *rx_ep; /* whose notices are in rx, from rx_next on */
	uint32_t rx_next;
	struct local_msg rx;
	struct fab_counters counters;
	struct local_address addresses[LOCAL_ADDRESSES];
};

/* Where one fab_poll puts its events. */
struct local_sink {
	struct fab_event *out;
	uint32_t n, max;
	uint64_t copy_left;
};

static inline void local_emit(struct local_sink *s, struct fab_event ev)
{
	s->out[s->n++] = ev;
}

static inline void local_count(_Atomic uint64_t *counter, uint64_t n)
{
	atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}

/* ------------------------------------------------------------- local_fd.c */

int local_random(void *out, size_t bytes); /* at most 256 */
/* An empty memfd of `bytes`; flags: MFD_HUGETLB or 0. */
int local_memfd(const char *name, uint64_t bytes, unsigned flags, int *out);
/* Adds seals, and seals the seals. */
int local_seal(int fd, int seals);
/* Is this a memfd of exactly `bytes` that nobody can resize? -EPROTO: no, and mapping it could kill us. */
int local_memfd_check(int fd, uint64_t bytes);
/* A small random file to prove with that memory is shared. */
int local_proof_create(int *out);
int local_proof_hash(int fd, const uint8_t key[LOCAL_KEY_BYTES], uint64_t hash[2]);

void local_msg_init(struct local_msg *m, enum local_msg_type type, uint32_t count);
/* Bytes on the wire of a message with this head. */
size_t local_msg_bytes(enum local_msg_type type, uint32_t count);
/* fd: -1 for none. -EAGAIN: no room now; the socket will be writable again. Never blocks. */
int local_send(int sock, const struct local_msg *m, int fd);
/*
 * 1: a well-formed message, with its file descriptor or -1 in *fd, which is the
 * caller's. 0: the other side has closed. -EAGAIN: nothing there. -EPROTO.
 */
int local_recv(int sock, struct local_msg *m, int *fd);

/* --------------------------------------------------------- local_region.c */

int local_region_open(struct fab *f, const struct fab_region_attr *a, struct fab_region **out, struct err *e);
void local_region_close(struct fab_region *r);
void *local_region_addr(struct fab_region *r);
int local_export(struct fab_ep *ep, struct fab_region *r, struct fab_blob *out);
int local_import(struct fab_ep *ep, const struct fab_blob *blob, struct fab_remote **out);
void local_remote_close(struct fab_remote *r);
uint64_t local_remote_bytes(const struct fab_remote *r);

/* ------------------------------------------------------------ local_map.c */

int local_map(struct fab_remote *r, uint64_t offset, uint64_t bytes, void *at, void **out);
/* Unmaps all that was mapped of r. */
void local_maps_drop(struct local_maps *m, const struct fab_remote *r);

/* ------------------------------------------------------------- local_op.c */

int local_read(struct fab_ep *ep, const struct fab_op *op, uint32_t n);
int local_write_notify(struct fab_ep *ep, const struct fab_op *op, uint32_t n);
/* Executes what is posted, as far as the sink and the socket have room. */
void local_ops_run(struct fab_ep *ep, struct local_sink *s);
/* Completes with ep->status what is posted, as far as the sink has room. True: nothing is left. */
bool local_ops_flush(struct fab_ep *ep, struct local_sink *s);
/* Forgets what is posted. */
void local_ops_drop(struct fab_ep *ep);
/* True when local_ops_run could do something. */
bool local_ops_runnable(const struct fab_ep *ep);
/* Sends what waits for room in the socket, as far as there is room. May break ep. */
void local_ep_send_waiting(struct fab_ep *ep);

/* ----------------------------------------------------------- local_conn.c */

int local_connect(struct fab *f, const struct fab_blob *address, uint64_t user, struct fab_ep **out);
int local_address(struct fab *f, uint64_t user, struct fab_blob *out);
void local_disconnect(struct fab_ep *ep);
/* Takes every connection that waits at the listening socket. */
void local_accept(struct fab *f);
/* Reads from ep's socket, at most a few messages. May break ep. */
void local_ep_receive(struct fab_ep *ep, struct local_sink *s);
/* Hands out the notices of f->rx as far as the sink has room. */
void local_rx_drain(struct fab *f, struct local_sink *s);
/* Closes the socket and puts ep on the ready list, for its operations to be flushed and FAB_EV_DOWN. */
void local_ep_break(struct fab_ep *ep, int status, const char *why);
void local_ep_make_ready(struct fab_ep *ep);
/* Operations of a broken endpoint, then FAB_EV_DOWN, as far as the sink has room. */
void local_ep_finish(struct fab_ep *ep, struct local_sink *s);
/* Breaks every endpoint whose greeting takes too long. */
void local_greetings_expire(struct fab *f);

#endif
