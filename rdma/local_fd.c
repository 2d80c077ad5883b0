/* SPDX-License-Identifier: Apache-2.0 */
/*
 * File descriptors and messages of the provider `local`.
 *
 * Memory is shared as memfds, so that nothing has a name in a file system and
 * the kernel frees it with the last process that has it. A file descriptor that
 * comes from a peer is not trusted: mapping a file that can shrink means that
 * the peer can kill us with SIGBUS, and one on a strange file system can stall
 * us. Only memfds answer F_GET_SEALS, so the seals are the check for both.
 *
 * Messages are datagrams of a SOCK_SEQPACKET socket: whole or not at all, in
 * order, and an end of file when the peer is gone, however it went. A message
 * that does not have exactly the length and the file descriptors of its type is
 * a protocol error. What a message announces was written before sendmsg and is
 * looked at after recvmsg: the compiler moves no access over either call, and
 * the kernel's lock of the receive queue, released by one and taken by the
 * other, orders them between processors.
 */
#include "rdma/local.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define MSG_MAGIC 0x314c4d53u /* "SML1": the digit is the version */
#define PROOF_BYTES 256
#define PROOF_SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE)

union fd_control {
	char buf[CMSG_SPACE(sizeof(int))];
	struct cmsghdr align;
};

int local_random(void *out, size_t bytes)
{
	/* Requests of up to 256 bytes come whole and are not interrupted. */
	ssize_t n = getrandom(out, bytes, 0);

	if (n < 0)
		return -errno;
	return (size_t)n == bytes ? 0 : -EIO;
}

int local_memfd(const char *name, uint64_t bytes, unsigned flags, int *out)
{
	int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING | flags);
	int ret;

	if (fd < 0)
		return -errno;
	if (ftruncate(fd, (off_t)bytes)) {
		ret = -errno;
		close(fd);
		return ret;
	}
	*out = fd;
	return 0;
}

int local_seal(int fd, int seals)
{
	return fcntl(fd, F_ADD_SEALS, seals | F_SEAL_SEAL) ? -errno : 0;
}

int local_memfd_check(int fd, uint64_t bytes)
{
	const int needed = F_SEAL_SHRINK | F_SEAL_GROW;
	int seals = fcntl(fd, F_GET_SEALS);
	struct stat st;

	if (seals < 0 || (seals & needed) != needed)
		return -EPROTO;
	if (fstat(fd, &st))
		return -errno;
	return st.st_size >= 0 && (uint64_t)st.st_size == bytes ? 0 : -EPROTO;
}

int local_proof_create(int *out)
{
	uint8_t bytes[PROOF_BYTES];
	int fd = -1, ret;

	ret = local_random(bytes, sizeof(bytes));
	if (ret)
		return ret;
	ret = local_memfd("shardmesh-proof", sizeof(bytes), 0, &fd);
	if (ret)
		return ret;
	ret = pwrite_full(fd, bytes, sizeof(bytes), 0);
	if (!ret)
		ret = local_seal(fd, PROOF_SEALS);
	if (ret) {
		close(fd);
		return ret;
	}
	*out = fd;
	return 0;
}

int local_proof_hash(int fd, const uint8_t key[LOCAL_KEY_BYTES], uint64_t hash[2])
{
	int ret = local_memfd_check(fd, PROOF_BYTES);
	struct hash128 h;
	uint64_t seed;
	void *map;

	if (ret)
		return ret;
	/* Mapped, not read: what has to be shown is that a mapping is shared. */
	map = mmap(NULL, PROOF_BYTES, PROT_READ, MAP_SHARED, fd, 0);
	if (map == MAP_FAILED)
		return -errno;
	/* The one-time key as seed: an answer is good for one connection. */
	memcpy(&seed, key, sizeof(seed));
	h = hash128(map, PROOF_BYTES, seed);
	munmap(map, PROOF_BYTES);
	hash[0] = h.lo;
	hash[1] = h.hi;
	return 0;
}

void local_msg_init(struct local_msg *m, enum local_msg_type type, uint32_t count)
{
	m->magic = MSG_MAGIC;
	m->type = (uint16_t)type;
	m->count = (uint16_t)count;
}

size_t local_msg_bytes(enum local_msg_type type, uint32_t count)
{
	const size_t head = offsetof(struct local_msg, imm);

	switch (type) {
	case LOCAL_HELLO:
		return head + LOCAL_KEY_BYTES;
	case LOCAL_WELCOME:
	case LOCAL_PROOF:
		return head + sizeof(((struct local_msg *)0)->hash);
	case LOCAL_READY:
		return head;
	case LOCAL_REGION:
		return head + sizeof(struct local_desc);
	case LOCAL_NOTICE:
		return head + count * sizeof(uint32_t);
	}
	return 0;
}

int local_send(int sock, const struct local_msg *m, int fd)
{
	struct iovec iov = { .iov_base = (void *)m, .iov_len = local_msg_bytes(m->type, m->count) };
	struct msghdr h = { .msg_iov = &iov, .msg_iovlen = 1 };
	union fd_control control = { { 0 } };
	struct cmsghdr *c;
	ssize_t n;

	if (fd >= 0) {
		h.msg_control = control.buf;
		h.msg_controllen = sizeof(control.buf);
		c = CMSG_FIRSTHDR(&h);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(c), &fd, sizeof(int));
	}
	do
		n = sendmsg(sock, &h, MSG_DONTWAIT | MSG_NOSIGNAL);
	while (n < 0 && errno == EINTR);
	if (n >= 0)
		return 0;
	/* Too many file descriptors in flight, or no memory: like a full socket, this passes. */
	if (errno == ENOBUFS || errno == ENOMEM || errno == ETOOMANYREFS)
		return -EAGAIN;
	return -errno;
}

/*
 * Room for one file descriptor is, by alignment, room for two, and what has
 * been received is open in this process: all but the first are closed.
 */
static uint32_t take_fds(struct msghdr *h, int *fd)
{
	uint32_t taken = 0;

	for (struct cmsghdr *c = CMSG_FIRSTHDR(h); c; c = CMSG_NXTHDR(h, c)) {
		size_t n = c->cmsg_type == SCM_RIGHTS ? (c->cmsg_len - CMSG_LEN(0)) / sizeof(int) : 0;

		for (size_t i = 0; i < n; i++) {
			int got;

			memcpy(&got, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
			if (taken++ == 0)
				*fd = got;
			else
				close(got);
		}
	}
	return taken;
}

static bool well_formed(const struct local_msg *m, size_t bytes, uint32_t fds)
{
	bool has_fd;

	if (bytes < offsetof(struct local_msg, imm) || m->magic != MSG_MAGIC)
		return false;
	has_fd = m->type == LOCAL_HELLO || m->type == LOCAL_WELCOME || m->type == LOCAL_REGION;
	if (m->count > LOCAL_MSG_NOTICES || fds != has_fd)
		return false;
	return bytes == local_msg_bytes(m->type, m->count);
}

int local_recv(int sock, struct local_msg *m, int *fd)
{
	struct iovec iov = { .iov_base = m, .iov_len = sizeof(*m) };
	union fd_control control;
	struct msghdr h = {
		.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.buf, .msg_controllen = sizeof(control.buf)
	};
	uint32_t fds;
	ssize_t n;
	int got = -1;

	/*
	 * A peer that closed without reading everything leaves ECONNRESET, once,
	 * before what it had sent; that comes first, then the end of file.
	 */
	do
		n = recvmsg(sock, &h, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	while (n < 0 && (errno == EINTR || errno == ECONNRESET));
	if (n < 0)
		return -errno;
	fds = take_fds(&h, &got);
	if (n == 0 && fds == 0)
		return 0;
	if (!(h.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) && well_formed(m, (size_t)n, fds)) {
		*fd = got;
		return 1;
	}
	if (got >= 0)
		close(got);
	/* The kernel drops file descriptors that no longer fit into our table. */
	return h.msg_flags & MSG_CTRUNC && fds == 0 ? -EMFILE : -EPROTO;
}
