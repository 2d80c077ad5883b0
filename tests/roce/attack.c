/* SPDX-License-Identifier: Apache-2.0 */
/*
 * roce_attack cm|control: a member that serves, a good peer that reads and
 * pushes all the time, and one that was let in and then does what it has no
 * right to: past its provider, with verbs of its own on its connected queue
 * pairs, with keys it has stolen, guessed or kept; or at the door, with what
 * begins a connection. After every attempt: the attacker was told no, the server
 * counted and logged it, no byte of the server is another, and the good peer has
 * got on.
 */
#include "members.h"

#include <fcntl.h>
#include <sys/mman.h>

#define BYTES (256u << 10) /* of each region */
#define PIECE (32u << 10)
#define GOOD 0
#define BAD 1
#define IN_FLIGHT 4 /* of each kind */
#define GARBAGE 2000

struct scene {
	struct members m;
	struct fab_region *parameters, *good_inbox, *good_local, *bad_inbox, *bad_local;
	struct fab_remote *good_parameters, *good_slots;
	struct fab_blob parameters_blob, good_blob, bad_blob, gone_blob;
	uint8_t *around, *pattern; /* the bad peer's inbox and as much on either side; what everything should be */
	uint64_t guesses;
};

static uint8_t *bytes_of(struct scene *s, struct fab_region *r)
{
	return s->m.ops->region_addr(r);
}

/* ------------------------------------------------------------------ good peer */

static void read_piece(struct scene *s, uint64_t k)
{
	const struct fab_op op = { .remote = s->good_parameters,
				   .remote_offset = k * PIECE,
				   .local = s->good_local,
				   .local_offset = k * PIECE,
				   .bytes = PIECE,
				   .user = k };

	memset(bytes_of(s, s->good_local) + k * PIECE, 0, PIECE);
	need(s->m.ops->read(s->m.peer[GOOD].ep, &op, 1) == 0);
}

/* From the half of its memory that nothing is read into. */
static void push_piece(struct scene *s, uint64_t k)
{
	const struct fab_op op = { .remote = s->good_slots,
				   .remote_offset = k * PIECE,
				   .local = s->good_local,
				   .local_offset = k * PIECE,
				   .bytes = PIECE,
				   .user = k,
				   .imm = (uint32_t)k };

	need(s->m.ops->write_notify(s->m.peer[GOOD].ep, &op, 1) == 0);
}

/* Reads use pieces 0 to 3, pushes 4 to 7. */
static void on_done(struct members *m, uint32_t i, const struct fab_event *ev)
{
	struct scene *s = (struct scene *)m;

	if (i != GOOD)
		return;
	need(ev->status == 0);
	if (ev->type == FAB_EV_READ) {
		need(!memcmp(bytes_of(s, s->good_local) + ev->user * PIECE, s->pattern + ev->user * PIECE, PIECE));
		read_piece(s, ev->user);
	} else {
		push_piece(s, ev->user);
	}
}

static void good_begins(struct scene *s)
{
	peer_connect(&s->m, GOOD);
	s->good_parameters = memory_pass(&s->m, GOOD, s->parameters, &s->parameters_blob);
	s->good_slots = memory_pass(&s->m, GOOD, s->good_inbox, &s->good_blob);
	s->m.done = on_done;
	for (uint64_t k = 0; k < IN_FLIGHT; k++) {
		read_piece(s, k);
		push_piece(s, IN_FLIGHT + k);
	}
}

static void good_gets_on(struct scene *s)
{
	const struct peer *p = &s->m.peer[GOOD];
	uint64_t reads = p->reads + 4, writes = p->writes + 4, notices = s->m.notices[GOOD] + 4;

	turn_until(&s->m, p->reads >= reads && p->writes >= writes && s->m.notices[GOOD] >= notices);
	need(!p->down && p->failed == 0);
}

static void nothing_is_changed(struct scene *s)
{
	need(!memcmp(bytes_of(s, s->parameters), s->pattern, BYTES));
	need(!memcmp(bytes_of(s, s->good_inbox), s->pattern, BYTES));
	for (uint32_t k = 0; k < 3; k++)
		need(!memcmp(s->around + k * BYTES, s->pattern, BYTES));
}

/* ------------------------------------------------------------------- bad peer */

static void bad_comes(struct scene *s)
{
	struct fab_remote *remote;
	struct fab_region *gone;

	peer_connect(&s->m, BAD);
	gone = memory_new(&s->m, s->m.server, "gone", BYTES, FAB_REMOTE_READ, NULL);
	remote = memory_pass(&s->m, BAD, gone, &s->gone_blob);
	s->m.ops->remote_close(remote);
	s->m.ops->region_close(gone);
	s->bad_inbox = memory_new(&s->m, s->m.server, "inbox of the bad", BYTES, FAB_REMOTE_WRITE, s->around + BYTES);
	remote = memory_pass(&s->m, BAD, s->bad_inbox, &s->bad_blob);
	s->m.ops->remote_close(remote);
}

static void bad_is_evicted(struct scene *s)
{
	if (s->m.peer[BAD].served)
		peer_evict(&s->m, BAD);
	if (s->bad_inbox)
		s->m.ops->region_close(s->bad_inbox);
	s->bad_inbox = NULL;
}

static void bad_goes(struct scene *s)
{
	bad_is_evicted(s);
	if (s->m.peer[BAD].ep)
		peer_leave(&s->m, BAD);
	s->m.peer[BAD].deaf = false;
}

enum whose { PARAMETERS, GOOD_INBOX, OWN_INBOX, GONE, GUESSED, NOTHING };

#define READS 0 /* its queue pairs: two for reads, two for pushes */
#define PUSHES 2
struct attempt {
	const char *name;
	enum whose whose;
	int64_t from; /* its beginning */
	uint32_t bytes, qp;
	enum ibv_wr_opcode opcode;
};

static const struct vb_region_desc *desc(const struct fab_blob *b)
{
	return (const struct vb_region_desc *)(const void *)b->data;
}

static void aim(struct scene *s, enum whose whose, uint64_t *at, uint32_t *key)
{
	const struct fab_blob *blob[] = { &s->parameters_blob, &s->good_blob, &s->bad_blob, &s->gone_blob,
					  &s->parameters_blob };

	*at = *key = 0;
	if (whose == NOTHING)
		return;
	*at = desc(blob[whose])->at;
	*key = whose == GUESSED ? (uint32_t)rng_u64(1, 0, s->guesses++) : desc(blob[whose])->key[0];
}

static void post_raw(struct scene *s, const struct attempt *a)
{
	struct vb_rail *r = &s->m.peer[BAD].ep->rail[0];
	struct ibv_sge sge = { .addr = (uintptr_t)bytes_of(s, s->bad_local),
			       .length = a->bytes,
			       .lkey = s->bad_local->mr[0]->lkey };
	struct ibv_send_wr wr = { .sg_list = &sge,
				  .num_sge = a->bytes > 0,
				  .opcode = a->opcode,
				  .send_flags = IBV_SEND_SIGNALED,
				  .imm_data = htonl(7) };
	struct ibv_send_wr *unposted;
	uint64_t at;
	uint32_t key;

	aim(s, a->whose, &at, &key);
	at += (uint64_t)a->from;
	if (a->opcode == IBV_WR_ATOMIC_FETCH_AND_ADD) {
		wr.wr.atomic.remote_addr = at;
		wr.wr.atomic.rkey = key;
		wr.wr.atomic.compare_add = 1;
	} else {
		wr.wr.rdma.remote_addr = at;
		wr.wr.rdma.rkey = key;
	}
	need(ibv_post_send(r->qp[a->qp].qp, &wr, &unposted) == 0);
}

static bool answered(struct scene *s, struct ibv_wc *wc)
{
	int n = ibv_poll_cq(s->m.peer[BAD].ep->rail[0].cq, 1, wc);

	need(n >= 0);
	return n > 0;
}

/* Past the provider, which is not asked again before this endpoint is gone. */
static enum ibv_wc_status try_raw(struct scene *s, const struct attempt *a)
{
	struct ibv_wc wc = { 0 };

	s->m.peer[BAD].deaf = true;
	post_raw(s, a);
	turn_until(&s->m, answered(s, &wc));
	return wc.status;
}

static bool is_protection(enum ibv_wc_status st)
{
	return st == IBV_WC_REM_ACCESS_ERR || st == IBV_WC_REM_INV_REQ_ERR || st == IBV_WC_REM_OP_ERR;
}

static uint64_t refused(struct scene *s)
{
	return s->m.ops->counters(s->m.server)->refused;
}

/* Until the server knows: counted and logged. */
static void is_noticed(struct scene *s, uint64_t before, uint64_t lines)
{
	turn_until(&s->m, refused(s) > before);
	need(s->m.log.count[LOG_WARN] > lines);
}

static const struct attempt attempts[] = {
	{ "write into the parameters, for pushes", PARAMETERS, 0, 64, PUSHES, IBV_WR_RDMA_WRITE },
	{ "write into the parameters, for reads", PARAMETERS, 0, 64, READS, IBV_WR_RDMA_WRITE },
	{ "add to the parameters", PARAMETERS, 0, 8, READS, IBV_WR_ATOMIC_FETCH_AND_ADD },
	{ "read behind the parameters", PARAMETERS, BYTES - 32, 64, READS, IBV_WR_RDMA_READ },
	{ "write across the end of its inbox", OWN_INBOX, BYTES - 32, 64, PUSHES, IBV_WR_RDMA_WRITE_WITH_IMM },
	{ "write behind its inbox", OWN_INBOX, BYTES, 64, PUSHES, IBV_WR_RDMA_WRITE },
	{ "write before its inbox", OWN_INBOX, -64, 64, PUSHES, IBV_WR_RDMA_WRITE },
	{ "write into its inbox, for reads", OWN_INBOX, 0, 64, READS, IBV_WR_RDMA_WRITE },
	{ "read of its inbox", OWN_INBOX, 0, 64, PUSHES, IBV_WR_RDMA_READ },
	{ "write with another's key", GOOD_INBOX, 0, 64, PUSHES, IBV_WR_RDMA_WRITE_WITH_IMM },
	{ "read with another's key", GOOD_INBOX, 0, 64, READS, IBV_WR_RDMA_READ },
	{ "read with a stale key", GONE, 0, 64, READS, IBV_WR_RDMA_READ },
	{ "read with a guessed key", GUESSED, 0, 64, READS, IBV_WR_RDMA_READ },
	{ "read with another guess", GUESSED, 0, 64, READS, IBV_WR_RDMA_READ },
	{ "write with a guessed key", GUESSED, 0, 64, PUSHES, IBV_WR_RDMA_WRITE },
	{ "a message", NOTHING, 0, 64, PUSHES, IBV_WR_SEND },
	{ "an empty message", NOTHING, 0, 0, PUSHES, IBV_WR_SEND },
};

/* On a connection that was let in. */
static void attempt(struct scene *s, const struct attempt *a)
{
	uint64_t before = refused(s), lines = s->m.log.count[LOG_WARN];
	enum ibv_wc_status st;

	bad_comes(s);
	st = try_raw(s, a);
	printf("%s: %s\n", a->name, ibv_wc_status_str(st));
	/* An empty message does arrive; that it is no notice is seen by the server alone. */
	need(is_protection(st) || (st == IBV_WC_SUCCESS && a->opcode == IBV_WR_SEND && a->bytes == 0));
	is_noticed(s, before, lines);
	good_gets_on(s);
	nothing_is_changed(s);
	bad_goes(s);
}

/* Through the provider, which is told of more than there is: the operation fails, and the connection is over. */
static void forged_size(struct scene *s)
{
	uint64_t before = refused(s), lines = s->m.log.count[LOG_WARN];
	struct peer *p = &s->m.peer[BAD];
	struct vb_region_desc more = *desc(&s->parameters_blob);
	struct fab_blob blob = s->parameters_blob;
	struct fab_op op = { .remote_offset = BYTES - 32, .local = s->bad_local, .bytes = 64 };

	bad_comes(s);
	more.bytes += BYTES;
	memcpy(blob.data, &more, blob.bytes);
	need(s->m.ops->import_region(p->ep, &blob, &op.remote) == 0);
	need(s->m.ops->read(p->ep, &op, 1) == 0);
	turn_until(&s->m, p->down);
	printf("read behind the parameters, by the provider: %s\n", strerror(-p->status));
	need(p->failed == 1 && p->status == -EACCES);
	is_noticed(s, before, lines);
	good_gets_on(s);
	nothing_is_changed(s);
	s->m.ops->remote_close(op.remote);
	p->failed = 0;
	bad_goes(s);
}

/* With what it was given before: keys, queue pairs, the address. */
static void evicted(struct scene *s)
{
	static const struct attempt push = {
		"push after eviction", OWN_INBOX, 0, 64, PUSHES, IBV_WR_RDMA_WRITE_WITH_IMM
	};
	uint64_t before = refused(s), lines = s->m.log.count[LOG_WARN], notices = s->m.notices[BAD];
	struct ibv_qp_attr to_error = { .qp_state = IBV_QPS_ERR };
	struct peer *p = &s->m.peer[BAD];
	struct ibv_wc wc = { 0 };

	bad_comes(s);
	bad_is_evicted(s);
	p->deaf = true;
	post_raw(s, &push);
	for (uint64_t end = clock_now_ns() + 2 * VB_S; clock_now_ns() < end;)
		members_turn(&s->m);
	/* soft-RoCE asks for ever; that ends it. */
	need(ibv_modify_qp(p->ep->rail[0].qp[push.qp].qp, &to_error, IBV_QP_STATE) == 0);
	turn_until(&s->m, answered(s, &wc));
	printf("%s: %s\n", push.name, ibv_wc_status_str(wc.status));
	need(wc.status != IBV_WC_SUCCESS && s->m.notices[BAD] == notices);
	nothing_is_changed(s);
	bad_goes(s);
	peer_dial(&s->m, BAD);
	turn_until(&s->m, p->down);
	printf("the same address again: %s\n", strerror(-p->status));
	need(!p->served);
	is_noticed(s, before, lines);
	good_gets_on(s);
	bad_goes(s);
}

/* ------------------------------------------------------------------- at the door */

enum forgery { WRONG_SECRET, WRONG_JOB, WRONG_PROTOCOL, WRONG_RAIL, NOISE, FORGERIES };
static const char *const forgery_name[] = { "wrong secret", "wrong job", "wrong protocol", "wrong rail", "noise" };

/* From an address that is good, so that one thing alone is wrong. */
static struct vb_hello forge(struct scene *s, enum forgery what)
{
	struct vb_hello h = { .magic = VB_MAGIC,
			      .protocol = VB_PROTOCOL,
			      .n_rails = 1,
			      .job = hash64(JOB, strlen(JOB), 0),
			      .nonce = rng_u64(2, 0, s->guesses++),
			      .member = 2 + BAD,
			      .generation = 1,
			      .qps = 2 };
	struct vb_address a;
	struct fab_blob address;

	need(s->m.ops->address(s->m.server, BAD, &address) == 0);
	memcpy(&a, address.data, sizeof(a));
	memcpy(h.secret, a.secret, sizeof(h.secret));
	h.secret[5] ^= what == WRONG_SECRET;
	h.job ^= what == WRONG_JOB;
	h.protocol += what == WRONG_PROTOCOL;
	h.rail += what == WRONG_RAIL;
	for (uint32_t i = 0; what == NOISE && i < sizeof(h) / 8; i++)
		((uint64_t *)&h)[i] = rng_u64(3, 0, s->guesses++);
	return h;
}

/* By the control connection: either the signal is an attack, or nobody is found. */
static void forged_signal(struct scene *s, enum forgery what)
{
	uint64_t before = refused(s), lines = s->m.log.count[LOG_WARN];
	struct vb_msg m = { .hello = forge(s, what), .word = VB_OFFER, .active = 1 };
	struct fab_blob blob = { .bytes = sizeof(m) };
	int ret;

	memcpy(blob.data, &m, sizeof(m));
	s->m.peer[BAD].deaf = true;
	ret = s->m.ops->signal(s->m.server, BAD, &blob);
	printf("an offer by the control connection, %s: %s\n", forgery_name[what], strerror(-ret));
	need(ret == (what == WRONG_SECRET ? 0 : -EPROTO));
	if (what == WRONG_SECRET)
		is_noticed(s, before, lines);
	good_gets_on(s);
	need(!s->m.peer[BAD].served);
	s->m.peer[BAD].deaf = false;
}

static bool next_cm_event(struct rdma_event_channel *c, enum rdma_cm_event_type *out)
{
	struct rdma_cm_event *ev;

	if (rdma_get_cm_event(c, &ev))
		return false;
	*out = ev->event;
	rdma_ack_cm_event(ev);
	return true;
}

static void await_cm(struct scene *s, struct rdma_event_channel *c, enum rdma_cm_event_type wanted)
{
	enum rdma_cm_event_type got = wanted;

	turn_until(&s->m, next_cm_event(c, &got));
	if (got != wanted)
		printf("%s instead of %s\n", rdma_event_str(got), rdma_event_str(wanted));
	need(got == wanted);
}

/* By librdmacm: rejected. */
static void forged_request(struct scene *s, enum forgery what)
{
	uint64_t before = refused(s), lines = s->m.log.count[LOG_WARN];
	struct rdma_event_channel *c = rdma_create_event_channel();
	struct vb_hello hello = forge(s, what);
	struct rdma_conn_param param = { .private_data = &hello,
					 .private_data_len = sizeof(hello),
					 .responder_resources = 1,
					 .initiator_depth = 1,
					 .retry_count = 7,
					 .qp_num = 0xabc000 + (uint32_t)what }; /* one in use would be stale */
	struct sockaddr_storage from, to;
	struct rdma_cm_id *id;

	need(c && fcntl(c->fd, F_SETFL, O_NONBLOCK) == 0);
	vb_port_sockaddr(&s->m.server->port[0].desc, 0, &from);
	vb_port_sockaddr(&s->m.server->port[0].desc, s->m.server->cm_port, &to);
	need(rdma_create_id(c, &id, NULL, RDMA_PS_TCP) == 0);
	need(rdma_resolve_addr(id, (struct sockaddr *)&from, (struct sockaddr *)&to, 2000) == 0);
	await_cm(s, c, RDMA_CM_EVENT_ADDR_RESOLVED);
	need(rdma_resolve_route(id, 2000) == 0);
	await_cm(s, c, RDMA_CM_EVENT_ROUTE_RESOLVED);
	need(rdma_connect(id, &param) == 0);
	await_cm(s, c, RDMA_CM_EVENT_REJECTED);
	printf("a request to the connection manager, %s: rejected\n", forgery_name[what]);
	is_noticed(s, before, lines);
	good_gets_on(s);
	need(!s->m.peer[BAD].served);
	rdma_destroy_id(id);
	rdma_destroy_event_channel(c);
}

/* Any bytes at all, then a signal that was good with a few of them others. Its own connection may go, no more. */
static void garbage(struct scene *s)
{
	struct fab_blob good;

	bad_comes(s);
	good = s->m.peer[BAD].said;
	for (uint32_t i = 0; i < GARBAGE; i++) {
		uint64_t random = rng_u64(4, 0, s->guesses++);
		struct fab_blob b = { .bytes = (uint32_t)(random % (FAB_BLOB_MAX + 1)) };

		if (i % 2 && good.bytes)
			b = good;
		for (uint32_t k = 0; k < (i % 2 ? 3 : b.bytes); k++)
			b.data[rng_u64(5, k, random) % FAB_BLOB_MAX] = (uint8_t)rng_u64(6, k, random);
		need(s->m.ops->signal(s->m.server, BAD, &b) <= 0);
		if (i % 16 == 0)
			members_turn(&s->m);
	}
	printf("%u signals of garbage\n", GARBAGE);
	good_gets_on(s);
	nothing_is_changed(s);
	bad_goes(s);
	bad_comes(s);
	bad_goes(s);
}

/* ----------------------------------------------------------------------- scene */

static void scene_open(struct scene *s, enum fab_connect how)
{
	members_open(&s->m, how);
	s->around = mmap(NULL, 3 * BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	s->pattern = malloc(BYTES);
	need(s->around != MAP_FAILED && s->pattern);
	for (uint32_t i = 0; i < BYTES; i += 8)
		memcpy(s->pattern + i, &(uint64_t){ rng_u64(7, 0, i) }, 8);
	s->parameters = memory_new(&s->m, s->m.server, "parameters", BYTES, FAB_REMOTE_READ, NULL);
	s->good_inbox = memory_new(&s->m, s->m.server, "inbox", BYTES, FAB_REMOTE_WRITE, NULL);
	s->good_local = memory_new(&s->m, s->m.peer[GOOD].f, "window", BYTES, FAB_LOCAL, NULL);
	s->bad_local = memory_new(&s->m, s->m.peer[BAD].f, "window", BYTES, FAB_LOCAL, NULL);
	memcpy(bytes_of(s, s->parameters), s->pattern, BYTES);
	memcpy(bytes_of(s, s->good_inbox), s->pattern, BYTES);
	memcpy(bytes_of(s, s->good_local), s->pattern, BYTES);
	memset(bytes_of(s, s->bad_local), 0xbd, BYTES);
	for (uint32_t k = 0; k < 3; k++)
		memcpy(s->around + k * BYTES, s->pattern, BYTES);
}

int main(int argc, char **argv)
{
	static struct scene s;
	enum fab_connect how = connect_named(argc > 1 ? argv[1] : "auto");

	setvbuf(stdout, NULL, _IOLBF, 0);
	scene_open(&s, how);
	good_begins(&s);
	good_gets_on(&s);
	for (uint32_t i = 0; i < ARRAY_LEN(attempts); i++)
		attempt(&s, &attempts[i]);
	forged_size(&s);
	evicted(&s);
	for (enum forgery what = 0; what < FORGERIES; what++) {
		forged_signal(&s, what);
		if (s.m.server->cm_port)
			forged_request(&s, what);
	}
	garbage(&s);
	printf("attack, by %s: all refused; the good peer: %llu reads, %llu pushes, none failed, %llu refusals counted\n",
	       argc > 1 ? argv[1] : "auto", (unsigned long long)s.m.peer[GOOD].reads,
	       (unsigned long long)s.m.peer[GOOD].writes, (unsigned long long)refused(&s));
	s.m.done = NULL;
	members_close(&s.m);
	munmap(s.around, 3 * BYTES);
	free(s.pattern);
	return 0;
}
