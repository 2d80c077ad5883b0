/* SPDX-License-Identifier: Apache-2.0 */
/*
 * libibverbs and librdmacm without a device: the functions that the provider
 * verbs calls, in one process, which really move the bytes and check what
 * hardware checks (protection domain, key, bounds, rights, states, numbers).
 * Nothing moves until stub_step, which ibv_poll_cq also calls. Any call can be
 * made to fail, any work request to end badly.
 */
#ifndef SHARDMESH_TEST_VERBS_STUB_H
#define SHARDMESH_TEST_VERBS_STUB_H

#include <infiniband/verbs.h>
#include <stdbool.h>
#include <stdint.h>

struct stub {
	/* The machine; set before a fabric is opened. */
	uint32_t n_devices, ports;
	uint64_t max_mr_size;
	int reads; /* max_qp_rd_atom; a later device has one less */
	bool no_cm;
	bool link_local; /* no GID but one that is not routed */
	bool infiniband;
	bool quiet_access; /* a broken right puts the queue pair in error without an event, as soft-RoCE */
	bool no_flush_receives;
	uint32_t gid_shift;   /* the GIDs have moved by so many places */
	bool port_down[4][4]; /* device, port from 1 */

	/* Failing. */
	uint32_t calls;     /* that can fail, so far */
	uint32_t fail_call; /* the one that fails; 0: none */
	const char *failed; /* its name */
	uint32_t wr_done;
	uint32_t fail_wr; /* the work request that ends with fail_status; 0: none */
	enum ibv_wc_status fail_status;
	uint32_t lose_wr;   /* the work request that never ends */
	uint32_t fail_post; /* the post_send that takes all but its last work request; 0: none */
	bool hold;          /* nothing moves */
	uint32_t stop_wr;   /* nothing moves from this work request on; 0: none */

	/* What was seen. */
	uint32_t live; /* objects that are not destroyed */
	uint32_t chain_max, inline_n, relaxed_n, posts;
	uint32_t wakeups;   /* completion events raised */
	uint32_t rd_atomic; /* of the last queue pair to RTS */
};
extern struct stub stub;

/* Back to one device with one port. Nothing may be live. */
void stub_reset(void);
/* Lets every queue pair do what it can. */
void stub_step(void);
/* An event of a port or a device; the port's state goes with it. */
void stub_port_event(uint32_t device, uint8_t port, enum ibv_event_type type);
void stub_device_event(uint32_t device, enum ibv_event_type type);
/* The n-th queue pair that is alive, in the order they were made. */
struct ibv_qp *stub_qp(uint32_t n);
uint32_t stub_qps(void);
/* Work requests that are posted and not over. */
uint32_t stub_waiting(void);

#endif
