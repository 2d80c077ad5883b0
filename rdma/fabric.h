/* SPDX-License-Identifier: Apache-2.0 */
/*
 * rdma: the one-sided fabric. This header is the whole contract; providers
 * (local: shared memory; verbs: libibverbs and librdmacm; ofi: libfabric)
 * implement struct fab_ops with designated initialisers.
 *
 * - A struct fab and everything made from it belong to one thread (a member's
 *   control thread). Memory of a region may be used by any thread.
 * - Regions are allocated by the fabric, once, before the first step: a NIC
 *   registers them, shared memory seals them. A region is remotely readable, or
 *   remotely writable by exactly one endpoint, never both.
 * - Operations are posted in batches on an endpoint and complete in batches by
 *   fab_poll. Operations of a batch may complete in any order.
 * - A write's notice is delivered to the other side after its bytes are visible
 *   there. A completed read saw bytes that were published before it was posted.
 * - Addresses and region descriptors are opaque blobs of at most 512 bytes.
 *   They are exchanged over the authenticated control connection, so that who
 *   has one has been let in; each address is good for one connection by one peer.
 * - Some providers have to talk before they can connect, and again whenever a
 *   connection is rebuilt. They do it through the same control connection:
 *   FAB_EV_SIGNAL is a blob to carry to the peer, where it goes into `signal`.
 *   Signals of one side arrive in order, or the connection is lost.
 * - Errors: -Exxx from posting means nothing of the batch was posted; -EAGAIN
 *   that too much is in flight: fab_poll, then post again. A provider of a
 *   network rebuilds a broken connection by itself, with back-off, and does again
 *   what had not completed; so an operation completes late, and a notice may
 *   come twice (same imm). Once it gives up (fab_options.down_ns) each operation
 *   completes with status < 0, then the endpoint gives FAB_EV_DOWN; only then
 *   may their memory be reused. No memory is handed back while a queue pair
 *   that knew of it could still move bytes.
 */
#ifndef SHARDMESH_FABRIC_H
#define SHARDMESH_FABRIC_H

#include "base/base.h"

struct fab;        /* a provider instance */
struct fab_ep;     /* a connection to one peer */
struct fab_region; /* local memory, remotely accessible */
struct fab_remote; /* a peer's region */

enum fab_memory { FAB_HOST, FAB_HUGEPAGE, FAB_CUDA };
enum fab_access {
	FAB_LOCAL,        /* destination of our reads, source of our writes */
	FAB_REMOTE_READ,  /* exported read-only: parameters, gradients in place */
	FAB_REMOTE_WRITE, /* an inbox: exported to one endpoint for pushes */
};

struct fab_region_attr {
	const char *name; /* "parameters": in logs and /proc */
	enum fab_memory memory;
	int device;     /* of FAB_CUDA */
	uint64_t bytes; /* rounded up to the memory's page size */
	enum fab_access access;
	/*
	 * NULL: the fabric allocates. Else memory that is there already, page-aligned
	 * and kept by reference until region_close: how one memory is used over
	 * several providers. local takes it as FAB_LOCAL alone, since it shares what
	 * it made itself (-ENOTSUP); the others take any.
	 */
	void *at;
};

#define FAB_BLOB_MAX 512
struct fab_blob {
	uint32_t bytes;
	uint8_t data[FAB_BLOB_MAX];
};

#define FAB_BATCH_MAX 256
struct fab_op {
	struct fab_remote *remote;
	uint64_t remote_offset;
	struct fab_region *local; /* not one that a peer writes: a provider may keep that apart from all others */
	uint64_t local_offset;
	uint64_t bytes;
	uint64_t user; /* comes back with the completion */
	uint32_t imm;  /* writes: the notice's value */
};

enum fab_event_type {
	FAB_EV_CONNECTED, /* our fab_connect succeeded */
	FAB_EV_ACCEPTED,  /* a peer used an address of ours; user: what fab_address was given */
	FAB_EV_READ,      /* a read completed */
	FAB_EV_WRITE,     /* a write completed: our buffer is ours again */
	FAB_EV_NOTICE,    /* a peer's write into a region of ours is visible; imm */
	FAB_EV_SIGNAL,    /* carry `blob` to the peer; ep may be NULL (the side that gave out the address) */
	FAB_EV_DOWN,      /* the endpoint is broken (status says why); all its operations have completed */
};
struct fab_event {
	enum fab_event_type type;
	int status; /* 0 or -Exxx */
	struct fab_ep *ep;
	uint64_t user; /* READ, WRITE: the operation's; else what connect or address was given */
	uint32_t imm;
	const struct fab_blob *blob; /* SIGNAL: good until the next poll */
};

/* Plain counters; programs register them as metrics. */
struct fab_counters {
	_Atomic uint64_t reads, read_bytes, writes, write_bytes, notices, mapped_bytes, errors, connects;
	_Atomic uint64_t rebuilds; /* connections that broke and stand again */
	_Atomic uint64_t replays;  /* operations done again on a rebuilt connection */
	_Atomic uint64_t refused;  /* what a peer tried without having the right to */
};

enum fab_connect { FAB_CONNECT_AUTO, FAB_CONNECT_CM, FAB_CONNECT_CONTROL };

/* What an operator may say of networks; all zero is automatic. Kept by reference. */
struct fab_options {
	const char *devices;      /* "mlx5_0,mlx5_1:2" (port 2); NULL: all active ports */
	enum fab_connect connect; /* --rdma-connect */
	unsigned queue_pairs;     /* a peer, NIC and use (reads; pushes); 0: 2 */
	unsigned gid_index;       /* + 1; 0: automatic */
	unsigned mtu;             /* path MTU in bytes; 0: the smaller of both ports' active MTU */
	unsigned pkey_index;
	unsigned service_level, traffic_class;
	unsigned timeout;          /* of a packet, 4.096 us * 2^timeout; 0: 14 */
	uint64_t inflight_bytes;   /* budget of reads and pushes in flight a NIC; 0: 16 MiB */
	uint64_t deadline_ns;      /* an operation older than this breaks its connection; 0: 5 s */
	uint64_t down_ns;          /* a connection that cannot be rebuilt for so long is down; 0: 30 s */
	const char *ofi_provider;  /* NULL: "tcp;ofi_rxm" */
	const char *local_address; /* IP address of ours that reaches the coordinator; NULL: not known */
};

/*
 * The same by name, as a user says them: the flags --rdma-NAME and --ofi-provider, and keys of a config. Strings are
 * kept by reference; "auto" is what it is without. -EINVAL: e says what was expected.
 */
int fab_options_set(struct fab_options *o, const char *name, const char *value, struct err *e);

/* The flags of every program that opens a fabric; NULL: not given. fabric is for fab_candidates. */
struct fab_flags {
	const char *fabric, *connect, *devices, *queue_pairs, *gid_index, *mtu, *pkey_index, *service_level,
		*traffic_class, *timeout, *ofi_provider;
};
#define FAB_FLAG_OPTS(f)                                                                                         \
	{ "fabric", OPT_STR, &(f).fabric, "NAME", "auto, local, local-copy, verbs, ofi", false },                \
		{ "rdma-connect", OPT_STR, &(f).connect, "HOW", "auto, cm (librdmacm) or control", false },      \
		{ "rdma-devices", OPT_STR, &(f).devices, "LIST", "mlx5_0,mlx5_1:2 (every active port)", false }, \
		{ "rdma-queue-pairs", OPT_STR, &(f).queue_pairs, "N", "a peer, port and use (2)", false },       \
		{ "rdma-gid-index", OPT_STR, &(f).gid_index, "N", "of the port's GIDs (automatic)", false },     \
		{ "rdma-mtu", OPT_STR, &(f).mtu, "BYTES", "path MTU (the smaller of both ports')", false },      \
		{ "rdma-pkey-index", OPT_STR, &(f).pkey_index, "N", "of the port's partition keys (0)", false }, \
		{ "rdma-service-level", OPT_STR, &(f).service_level, "N", "0 to 15 (0)", false },                \
		{ "rdma-traffic-class", OPT_STR, &(f).traffic_class, "N", "0 to 255 (0)", false },               \
		{ "rdma-timeout", OPT_STR, &(f).timeout, "N", "of a packet, 4.096 us * 2^N (14)", false },       \
	{                                                                                                        \
		"ofi-provider", OPT_STR, &(f).ofi_provider, "NAME", "libfabric's provider (tcp;ofi_rxm)", false  \
	}
/* The networks' options among them, by name; value NULL: not given. */
#define FAB_SETTINGS 10
struct fab_setting {
	const char *name, *value;
};
void fab_flags_settings(const struct fab_flags *f, struct fab_setting out[FAB_SETTINGS]);
/* Lays what was given over *o. */
int fab_flags_apply(const struct fab_flags *f, struct fab_options *o, struct err *e);

struct fab_config {
	struct log *log;
	const char *job;                   /* names what we create */
	uint32_t member;                   /* our member id */
	const struct fab_options *options; /* NULL: all zero */
	const char *want;                  /* --fabric, where the decorator finds its schedule; NULL: "auto" */
};

struct fab_ops {
	const char *name;
	bool maps; /* fab_map works: memory of a peer can be used in place */
	/* Of private memory that a connection takes, for a memory plan; measured. 0: too little to plan. */
	uint32_t connection_bytes;
	/*
	 * Can this host use it at all? 0, or -Exxx; `reason` says in either case what
	 * was found, or what is missing and how to get it. Cheap, leaves nothing open.
	 */
	int (*probe)(const struct fab_options *o, char reason[160]);
	int (*open)(const struct fab_config *cfg, struct fab **out, struct err *e);
	void (*close)(struct fab *f);

	/* An address for one connection by one peer; `user` comes back in FAB_EV_ACCEPTED. */
	int (*address)(struct fab *f, uint64_t user, struct fab_blob *out);
	/* Starts to connect; FAB_EV_CONNECTED or FAB_EV_DOWN follows. */
	int (*connect)(struct fab *f, const struct fab_blob *address, uint64_t user, struct fab_ep **out);
	/*
	 * What the peer's FAB_EV_SIGNAL carried. `user`: what our connect or address
	 * was given. -EPROTO: nothing the provider understands, which is an attack or
	 * a bug; a signal of a connection that is gone is ignored. NULL: it has none.
	 */
	int (*signal)(struct fab *f, uint64_t user, const struct fab_blob *in);
	/* How it is connected, for people: "rxe0/1 RoCE v2, GID 1, MTU 4096, 2+2 queue pairs, by control". */
	void (*describe)(const struct fab_ep *ep, char *out, size_t bytes);
	/* Drains and frees the endpoint; no event for it comes after. */
	void (*disconnect)(struct fab_ep *ep);

	int (*region_open)(struct fab *f, const struct fab_region_attr *a, struct fab_region **out, struct err *e);
	/* No operation may be in flight on it; a disconnect ends those of its endpoint. */
	void (*region_close)(struct fab_region *r);
	void *(*region_addr)(struct fab_region *r);
	/*
	 * Gives ep's peer access; the blob goes to that peer. Endpoint must be
	 * connected. -EPERM: FAB_LOCAL, or FAB_REMOTE_WRITE exported before, to
	 * whomever. -EAGAIN: too many exports on their way.
	 */
	int (*export_region)(struct fab_ep *ep, struct fab_region *r, struct fab_blob *out);
	/* -EAGAIN: what the blob names is still on its way; try again after the next fab_poll. */
	int (*import_region)(struct fab_ep *ep, const struct fab_blob *blob, struct fab_remote **out);
	/*
	 * Unmaps what was mapped (what lay in reserved address space is reserved
	 * again, PROT_NONE). No operation may be in flight on it. A remote outlives
	 * its endpoint: mapped memory of a dead peer is good until here.
	 */
	void (*remote_close)(struct fab_remote *r);
	/* Size of a peer's region, checked at import: what an offset into it may not pass. */
	uint64_t (*remote_bytes)(const struct fab_remote *r);
	/*
	 * Maps [offset, offset+bytes) of a peer's region at `at` (page-aligned,
	 * inside address space the caller reserved; NULL: anywhere), populated.
	 * offset: a multiple of the region's page size; bytes is rounded up to it.
	 * May replace an earlier mapping of any remote. Read-only for
	 * FAB_REMOTE_READ. -ENOTSUP where memory is not shared.
	 */
	int (*map)(struct fab_remote *r, uint64_t offset, uint64_t bytes, void *at, void **out);

	/*
	 * At most FAB_BATCH_MAX operations; the array is free on return. -EAGAIN;
	 * -ENOTCONN; -EINVAL: no bytes, or not of this endpoint; -ERANGE: outside
	 * one of the regions; -EPERM: a read of FAB_REMOTE_WRITE memory, or a write
	 * to FAB_REMOTE_READ memory.
	 */
	int (*read)(struct fab_ep *ep, const struct fab_op *op, uint32_t n);
	int (*write_notify)(struct fab_ep *ep, const struct fab_op *op, uint32_t n);
	/* Up to max events; never blocks. */
	uint32_t (*poll)(struct fab *f, struct fab_event *out, uint32_t max);
	/* Readable when fab_poll may have something, after fab_arm said true. */
	int (*fd)(struct fab *f);
	/* Ask for the fd to fire; false: something is there already, poll again. */
	bool (*arm)(struct fab *f);
	const struct fab_counters *(*counters)(const struct fab *f);
};

/*
 * "local", "local-copy" (local without map: every byte moved by reads and
 * writes, as a network would), "verbs", "ofi". NULL: not in this build.
 */
const struct fab_ops *fab_provider(const char *name);

/*
 * The providers to try for a pair of members, best first. `want`: --fabric;
 * "auto" gives local (if same_host), verbs, ofi, as far as probe lets this
 * host use them; any other name gives that one alone. `refused` is told of each
 * one left out, with the reason. Returns how many; -ENOTSUP (e names what was
 * asked for and what there is) when there is none.
 */
#define FAB_CANDIDATES_MAX 4
struct fab_candidate {
	const struct fab_ops *ops;
	char reason[160];
};
int fab_candidates(const char *want, const struct fab_options *o, bool same_host,
		   struct fab_candidate out[FAB_CANDIDATES_MAX],
		   void (*refused)(void *ctx, const char *provider, const char *reason), void *ctx, struct err *e);

/*
 * A decorator for tests: wraps any provider's ops and does to its operations
 * what a seeded schedule says. Reads --fabric "fault:SPEC:provider", SPEC like
 * "seed=1,delay=2ms,drop=0.01,deadline=50ms,reorder=0.1,corrupt=0,disconnect=0.001"; only
 * where the environment has SHARDMESH_FAULTS=1. fab_candidates finds it by the
 * prefix; it has the provider's name, so that the other side may do without.
 */

/* ---------------------------------------------------------- progress words */

/*
 * What an owner says of its published parameters, on a cache line of its own
 * at the start of its parameter region: units below units_done have `version`,
 * the others version - 1. Written by the owner alone, after a release fence
 * behind the bytes; readers look at it before they look at pages.
 */
struct fab_progress {
	_Atomic uint64_t word;   /* branch << 48 | version << 16 | units_done */
	_Atomic uint32_t signal; /* changes with every publish: what sleepers on this host wait on */
	uint8_t pad[CACHE_LINE - 12];
};
_Static_assert(sizeof(struct fab_progress) == CACHE_LINE, "one cache line");

#define FAB_VERSION_BITS 32
static inline uint64_t fab_progress_word(uint16_t branch, uint32_t version, uint16_t units_done)
{
	return (uint64_t)branch << 48 | (uint64_t)version << 16 | units_done;
}

enum fab_ready { FAB_NOT_YET, FAB_READY, FAB_PASSED };
/* Is unit `unit` there with exactly `version`? PASSED: it is newer, or the branch is another. */
enum fab_ready fab_progress_check(uint64_t word, uint16_t branch, uint32_t version, uint16_t unit);
/* Owner: store with release and wake sleepers on this host. */
void fab_progress_publish(struct fab_progress *p, uint64_t word);
/*
 * Reader on the same host (mapped): waits until the word differs from `seen` or
 * timeout_ns is over. Spins up to spin_ns first. Returns the word (acquire).
 */
uint64_t fab_progress_wait(const struct fab_progress *p, uint64_t seen, uint64_t spin_ns, uint64_t timeout_ns);

#endif
