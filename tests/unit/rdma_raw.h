/* SPDX-License-Identifier: Apache-2.0 */
/* A peer of the provider `local` that says what it likes: the protocol by hand, over a blocking loop of polls. */
#ifndef SHARDMESH_TEST_RDMA_RAW_H
#define SHARDMESH_TEST_RDMA_RAW_H

#include "rdma/local.h"
#include "rdma_pair.h"

#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>

struct raw {
	const struct fab_ops *ops;
	struct fab *f; /* the instance talked to; polled while we wait */
	struct fab_ep *ep;
	int sock;
	uint8_t key[LOCAL_KEY_BYTES];
};

static inline void raw_dial(struct raw *r, const struct fab_ops *ops, struct fab *f)
{
	struct sockaddr_un to = { .sun_family = AF_UNIX };
	struct local_where where;
	struct fab_blob address;

	*r = (struct raw){ .ops = ops, .f = f };
	assert_int_equal(ops->address(f, 77, &address), 0);
	memcpy(&where, address.data, sizeof(where));
	memcpy(r->key, where.key, sizeof(r->key));
	memcpy(to.sun_path + 1, where.socket_name, sizeof(where.socket_name));
	r->sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	assert_true(r->sock >= 0);
	assert_int_equal(connect(r->sock, (struct sockaddr *)&to,
				 (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + sizeof(where.socket_name))),
			 0);
}

static inline void raw_hello(struct raw *r, int proof)
{
	struct local_msg m;

	local_msg_init(&m, LOCAL_HELLO, 0);
	memcpy(m.key, r->key, sizeof(m.key));
	assert_int_equal(local_send(r->sock, &m, proof), 0);
}

/* The next message, or 0 when the other side has closed. *ev, if given, is the last event that came meanwhile. */
static inline int raw_recv(struct raw *r, struct local_msg *m, int *fd)
{
	uint64_t end = clock_now_ns() + WAIT_NS;
	int ret;

	do {
		struct fab_event ev;

		if (r->ops->poll(r->f, &ev, 1)) {
			assert_int_equal(ev.type, FAB_EV_ACCEPTED);
			assert_int_equal(ev.user, 77);
			r->ep = ev.ep;
		}
		ret = local_recv(r->sock, m, fd);
		assert_true(clock_now_ns() < end);
	} while (ret == -EAGAIN);
	return ret;
}

/* A correct greeting; r->ep is the endpoint at the other side. */
static inline void raw_greet(struct raw *r, const struct fab_ops *ops, struct fab *f)
{
	struct local_msg m;
	int proof, theirs = -1;

	raw_dial(r, ops, f);
	assert_int_equal(local_proof_create(&proof), 0);
	raw_hello(r, proof);
	assert_int_equal(raw_recv(r, &m, &theirs), 1);
	assert_int_equal(m.type, LOCAL_WELCOME);
	local_msg_init(&m, LOCAL_PROOF, 0);
	assert_int_equal(local_proof_hash(theirs, r->key, m.hash), 0);
	assert_int_equal(local_send(r->sock, &m, -1), 0);
	close(theirs);
	close(proof);
	assert_int_equal(raw_recv(r, &m, &theirs), 1);
	assert_int_equal(m.type, LOCAL_READY);
	assert_non_null(r->ep);
}

#endif
