/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the parts of the stub share: devices, objects and their events
 * (verbs_stub.c), queue pairs and transport (verbs_stub_qp.c), librdmacm
 * (verbs_stub_cm.c).
 */
#ifndef SHARDMESH_TEST_VERBS_STUB_PARTS_H
#define SHARDMESH_TEST_VERBS_STUB_PARTS_H

#include "verbs_stub.h"

#include <stddef.h>
#include <sys/queue.h>

#define RING 1024 /* work requests of a queue pair, each way */

struct scontext {
	struct ibv_context c;
	uint32_t index;
	struct ibv_async_event events[32];
	uint32_t n_events, taken;
	TAILQ_ENTRY(scontext) link;
};

struct scq {
	struct ibv_cq cq;
	struct ibv_wc wc[RING * 4];
	uint32_t head, tail;
	bool armed, armed_solicited, event; /* armed: for any completion */
	uint32_t unacked, qps;
	TAILQ_ENTRY(scq) link;
};

struct spd {
	struct ibv_pd pd;
	uint32_t users;
};

/* Called by every call that can fail: the stub.fail_call-th does, with error in errno. */
bool stub_fails(const char *name, int error);
#define FAILS(error) stub_fails(__func__, error)

/* Zeroed memory that stub.live counts until stub_unmade. */
void *stub_made(size_t bytes);
void stub_unmade(void *p);

/* An eventfd that is readable while there is something: one more, or one less. */
void stub_fd_say(int fd, bool on);

/* Numbers of queue pairs and keys: none twice. */
uint32_t stub_number(void);

struct ibv_device *stub_device(uint32_t n);
/* Whose GID it is; false where no port of this machine has it. */
bool stub_device_of_gid(const uint8_t gid[16], uint32_t *device, uint8_t *port);
/* What each transition needs beside IBV_QP_STATE, as the specification says for RC; -1: there is no such one. */
int stub_needed(enum ibv_qp_state from, enum ibv_qp_state to);

void stub_async_push(struct scontext *c, struct ibv_async_event ev);
/* Whether the key belongs to a region of this protection domain with all those rights over all those bytes. */
bool stub_allows(const struct ibv_pd *pd, uint32_t key, uint64_t at, uint64_t bytes, int right);
/* solicited: of a notice whose sender wants it to be heard. */
void stub_push_wc(struct scq *cq, struct ibv_wc wc, bool solicited);

/* What ibv_post_send and ibv_post_recv come to. */
int stub_post_send(struct ibv_qp *qp, struct ibv_send_wr *wr, struct ibv_send_wr **bad);
int stub_post_recv(struct ibv_qp *qp, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad);

#endif
