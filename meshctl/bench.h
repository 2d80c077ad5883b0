/* SPDX-License-Identifier: Apache-2.0 */
/*
 * meshctl bench fabric, private: two sides of a fabric with nothing but memory
 * behind it. bench_serve.c: the passive side, a shard service without a job;
 * bench_join.c: the active side up to imported memory; bench_fabric.c: flags
 * and processes; bench_measure.c: the clock.
 */
#ifndef SHARDMESH_BENCH_H
#define SHARDMESH_BENCH_H

#include "mesh/mesh.h"
#include "rdma/fabric.h"

#define BENCH_PEERS_MAX 64

/* What both sides are told. */
struct bench_config {
	struct log log;
	struct job_token token;
	char job[64];
	const char *fabric; /* --fabric */
	struct fab_options options;
	bool same_host;
	uint64_t memory; /* bytes of each exported region */
};

/*
 * Listens, serves every connection until the last one has gone. tell: a file
 * descriptor that gets the endpoint as text, or -1: it is printed. 0, or -Exxx.
 */
int bench_serve(const struct bench_config *c, const char *listen, int tell, struct err *e);

/* ------------------------------------------------------------ the active side */

struct bench_join;
struct bench_peer {
	struct bench_join *join;
	struct conn *conn;
	struct fab_ep *ep;
	bool ready, up, refused, has_regions;
	char reason[256];
	struct fab_blob parameters_blob, inbox_blob;
	struct fab_remote *parameters, *inbox;
};
struct bench_join {
	const struct bench_config *config;
	struct mesh_self self;
	const struct fab_ops *ops;
	struct fab *fab;
	struct fab_region *local; /* config->memory bytes */
	uint32_t n_peers;
	struct bench_peer peer[BENCH_PEERS_MAX];
	char lost[256]; /* a connection ended: why */
};
/* Connected to every endpoint by the first provider that all of them take, memory imported. */
int bench_join(struct bench_join *j, const struct bench_config *c, const char *const *endpoint, uint32_t n,
	       struct err *e);
/* What has nothing to do with the operations: control connections, signals. */
void bench_join_event(struct bench_join *j, const struct fab_event *ev);
void bench_join_turn(struct bench_join *j);
void bench_join_close(struct bench_join *j);

/* ------------------------------------------------------------------ measuring */

struct bench_cell {
	bool push;
	uint64_t bytes;
	uint32_t depth;
	double seconds; /* to measure; a tenth of it is run before that */
};
struct bench_result {
	double gb_per_s, messages_per_s;
	double p50_us, p99_us, p999_us, max_us;
};
int bench_cell_run(struct bench_join *j, const struct bench_cell *c, struct bench_result *out, struct err *e);

/* A unit's pages, dealt in runs to all peers, read into one flat vector; and as many bytes of one peer in one piece. */
struct bench_pages {
	uint64_t page, unit_bytes;
	double seconds;
};
struct bench_pages_result {
	uint32_t runs;
	double pages_gb_per_s, contiguous_gb_per_s; /* medians */
};
int bench_pages_run(struct bench_join *j, const struct bench_pages *p, struct bench_pages_result *out, struct err *e);

#endif
