/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A connection of the provider `ofi`, from introduction to end.
 *
 * An address is a secret that is good once. Both sides describe themselves by
 * signals, over the authenticated control connection; then the connecting side
 * writes a word into the other's mailbox, which proves the way and is what
 * makes both of them UP.
 *
 *   connecting                                accepting
 *   ALONE   -- SIDE secret, generation 1 -->  secret known? it is used up
 *   PAIRED  <- SIDE generation 1 -----------  PAIRED
 *           == hello into the mailbox =====>  UP  FAB_EV_ACCEPTED
 *   UP      <- delivered ===================
 *   FAB_EV_CONNECTED
 *
 * Whatever goes wrong after that is mended in one way: whoever notices closes
 * its endpoint of libfabric (so that nothing of it moves bytes any more), opens
 * another under the next generation and says so; the other, hearing of a newer
 * generation, does the same; then hello again, and what had not completed is
 * posted again. Both sides close before either posts, so a late packet of an
 * old write finds nobody: it cannot fall on bytes that have been granted to a
 * newer one. Two that notice at the same time open the same generation and are
 * paired by it. The connecting side alone tries again when an attempt leads
 * nowhere, ever more slowly; after down_ns both give up. So does who has an
 * operation that broke every connection for so long.
 *
 * An orderly end writes a word too, so that the other side hears of it without
 * posting anything. A peer that dies says nothing: who has something in flight
 * finds out, others are told by the control connection.
 */
#include "rdma/ofi/ofi.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define SIGNAL_MAGIC 0x31464f53u /* "SOF1" */
#define PAUSE_FIRST_NS 2000000ull
#define PAUSE_MAX_NS 1000000000ull
#define STEADY_NS 1000000000ull /* what stood so long breaks for a new reason */
#define BYE_NS 50000000ull

/* ------------------------------------------------------------ generations */

static void say_side(struct fab_ep *ep)
{
	struct ofi_signal m = {
		.magic = SIGNAL_MAGIC,
		.type = OFI_SIDE,
		.generation = ep->generation,
		.to = ep->far.id,
		.side = ep->own,
	};

	memcpy(m.secret, ep->secret, sizeof(m.secret));
	snprintf(m.provider, sizeof(m.provider), "%s", ep->fab->info->fabric_attr->prov_name);
	pthread_mutex_lock(&ep->fab->lock);
	memcpy(ep->signal.data, &m, sizeof(m));
	ep->signal.bytes = sizeof(m);
	/* One that was not taken yet is superseded. */
	ep->signal_due = true;
	ofi_make_ready(ep);
	pthread_mutex_unlock(&ep->fab->lock);
}

/* Returns since when some operation fails; now for none. */
static uint64_t close_generation(struct fab_ep *ep, uint64_t now)
{
	if (ep->fi.cq && !ofi_ops_drain(ep))
		ep->lost = true;
	ofi_link_close(ep->fab, &ep->fi);
	ep->state = OFI_CLOSED;
	return ofi_ops_rewind(ep, now);
}

static void pause_before_retry(struct fab_ep *ep, uint64_t now)
{
	uint64_t ns = PAUSE_FIRST_NS << (ep->attempts < 10 ? ep->attempts : 10);

	ep->attempts++;
	ep->retry_ns = now + (ns < PAUSE_MAX_NS ? ns : PAUSE_MAX_NS);
}

static void open_generation(struct fab_ep *ep, uint32_t generation, uint64_t now)
{
	int ret;

	assert(ep->state == OFI_CLOSED && !ep->fi.ep);
	ep->generation = generation;
	ep->attempt_ns = now;
	ep->word_posted = ep->word_done = false;
	memset(ep->mailbox, 0, sizeof(*ep->mailbox));
	ep->own = (struct ofi_side){ .id = ep->id };
	ret = ofi_random(&ep->own.tag, sizeof(ep->own.tag));
	/* Zero is what the mailbox has before anybody writes. */
	ep->own.tag |= (uint64_t)1 << 32;
	if (!ret)
		ret = ofi_link_open(ep->fab, ep->mailbox, &ep->fi, &ep->own);
	if (ret) {
		if (ep->attempts == 0)
			log_warn(ep->fab->log, "fabric ofi: no endpoint: %s", strerror(-ret));
		ep->status = ret;
		pause_before_retry(ep, now);
		return;
	}
	ep->state = OFI_ALONE;
	say_side(ep);
}

/* Completes all there is; nothing can be posted after that. */
static void give_up(struct fab_ep *ep, int status)
{
	struct fab *f = ep->fab;
	bool more = true;

	(void)close_generation(ep, clock_now_ns());
	ep->state = OFI_OVER;
	ep->status = status;
	while (more) {
		ofi_ops_fail(ep, status);
		pthread_mutex_lock(&f->lock);
		TAILQ_CONCAT(&ep->queue, &ep->submitted, link);
		more = !TAILQ_EMPTY(&ep->queue);
		ep->down = !more;
		ofi_make_ready(ep);
		pthread_mutex_unlock(&f->lock);
	}
}

void ofi_conn_break(struct fab_ep *ep, int status, const char *why)
{
	uint64_t now = clock_now_ns();

	if (ep->state == OFI_UP) {
		ep->broken_ns = now;
		if (now > ep->up_ns + STEADY_NS)
			ep->attempts = 0;
		ofi_count(&ep->fab->counters.errors, 1);
		log_warn(ep->fab->log, "fabric ofi: a connection is broken: %s: %s; it is built again", why,
			 strerror(-status));
	}
	ep->status = status;
	/* One that is refused whenever it is tried, over connections that stand, is hopeless too. */
	if (now > close_generation(ep, now) + ep->fab->down_ns)
		give_up(ep, status);
	else
		pause_before_retry(ep, now);
}

void ofi_conn_start(struct fab_ep *ep)
{
	uint64_t now = clock_now_ns();

	ep->broken_ns = now;
	ep->state = OFI_CLOSED;
	TAILQ_INSERT_TAIL(&ep->fab->engaged, ep, turn_link);
	if (ep->connects)
		open_generation(ep, 1, now);
}

static void go_up(struct fab_ep *ep, uint64_t now)
{
	struct fab *f = ep->fab;
	size_t bytes = sizeof(ep->text) - 32;
	char peer[sizeof(ep->text) - 32];

	ep->state = OFI_UP;
	ep->up_ns = ep->progress_ns = now;
	fi_av_straddr(ep->fi.av, ep->far.name, peer, &bytes);
	if (ep->connected) {
		ofi_count(&f->counters.rebuilds, 1);
		log_info(f->log, "fabric ofi: the connection with %s stands again", peer);
	}
	pthread_mutex_lock(&f->lock);
	snprintf(ep->text, sizeof(ep->text), "%s with %s", f->info->fabric_attr->prov_name, peer);
	ep->connected = true;
	ofi_make_ready(ep);
	pthread_mutex_unlock(&f->lock);
}

/* ------------------------------------------------------------------- steps */

static bool take_incoming(struct fab_ep *ep, struct ofi_signal *out)
{
	bool due;

	pthread_mutex_lock(&ep->fab->lock);
	due = ep->incoming_due;
	ep->incoming_due = false;
	if (due)
		*out = ep->incoming;
	pthread_mutex_unlock(&ep->fab->lock);
	return due;
}

static void on_side(struct fab_ep *ep, const struct ofi_signal *m, uint64_t now)
{
	int ret;

	if (m->generation > ep->generation) {
		if (ep->state == OFI_UP) {
			ep->broken_ns = now;
			log_info(ep->fab->log, "fabric ofi: the peer builds the connection again");
		}
		ep->far.id = m->side.id;
		(void)close_generation(ep, now);
		open_generation(ep, m->generation, now);
	}
	if (m->generation != ep->generation || ep->state != OFI_ALONE)
		return;
	ep->far = m->side;
	ret = edge_insert(ep->fi.av, ep->far.name, &ep->fi.far);
	if (ret)
		ofi_conn_break(ep, ret, "libfabric does not take the peer's address");
	else
		ep->state = OFI_PAIRED;
}

/* The connecting side reaches for the other. */
static void try_hello(struct fab_ep *ep, uint64_t now)
{
	int ret;

	if (ep->word_done) {
		go_up(ep, now);
		return;
	}
	if (ep->word_posted)
		return;
	ret = ofi_word_post(ep, offsetof(struct ofi_mailbox, hello), ep->far.tag);
	ep->word_posted = !ret;
	if (ret && ret != -EAGAIN)
		ofi_conn_break(ep, ret, "libfabric cannot write to the peer");
}

static bool has_word(const struct fab_ep *ep, const _Atomic uint64_t *word)
{
	return atomic_load_explicit(word, memory_order_acquire) == ep->own.tag;
}

static void while_paired(struct fab_ep *ep, uint64_t now)
{
	if (ep->connects)
		try_hello(ep, now);
	else if (has_word(ep, &ep->mailbox->hello))
		go_up(ep, now);
}

/* What it had written before it went is in the completion queue. */
static void on_bye(struct fab_ep *ep, uint64_t now)
{
	while (ep->state == OFI_UP && ofi_ops_progress(ep, now))
		;
	if (ep->state == OFI_UP && ofi_notice_room(ep))
		give_up(ep, -ECONNRESET);
}

static void step_state(struct fab_ep *ep, uint64_t now)
{
	switch (ep->state) {
	case OFI_CLOSED:
		if (ep->generation > 0 && now >= ep->retry_ns)
			open_generation(ep, ep->generation + 1, now);
		break;
	case OFI_PAIRED:
		while_paired(ep, now);
		break;
	case OFI_UP:
		if (has_word(ep, &ep->mailbox->bye))
			on_bye(ep, now);
		break;
	case OFI_ALONE:
	case OFI_OVER:
		break;
	}
}

/* What takes too long: an attempt, or all of them. */
static void step_time(struct fab_ep *ep, uint64_t now)
{
	const struct fab *f = ep->fab;

	if (ep->state == OFI_UP || ep->state == OFI_OVER)
		return;
	if (ep->lost)
		log_error(f->log, "fabric ofi: notices are lost: more than %u were not taken", OFI_NOTICES);
	if (ep->lost)
		give_up(ep, -ENOBUFS);
	else if (now > ep->broken_ns + f->down_ns)
		give_up(ep, ep->status ? ep->status : -ETIMEDOUT);
	else if (ep->connects && ep->state != OFI_CLOSED && now > ep->attempt_ns + f->deadline_ns)
		ofi_conn_break(ep, -ETIMEDOUT, "the peer is not reached");
}

bool ofi_conn_step(struct fab_ep *ep, uint64_t now)
{
	enum ofi_state before = ep->state;
	struct ofi_signal m;
	bool heard;

	if (before == OFI_OVER)
		return false;
	heard = take_incoming(ep, &m);
	if (heard)
		on_side(ep, &m, now);
	step_state(ep, now);
	step_time(ep, now);
	return heard || ep->state != before;
}

/* ----------------------------------------------------------- user's thread */

int ofi_address(struct fab *f, uint64_t user, struct fab_blob *out)
{
	struct ofi_signal m = { .magic = SIGNAL_MAGIC, .type = OFI_ADDRESS };
	struct ofi_address one = { .user = user };
	int ret = ofi_random(one.secret, sizeof(one.secret));

	if (ret)
		return ret;
	if (f->address_n == OFI_ADDRESSES) {
		log_warn(f->log, "fabric ofi: %u addresses were given out and not used: the oldest is void",
			 f->address_n);
		memmove(f->addresses, f->addresses + 1, --f->address_n * sizeof(*f->addresses));
	}
	f->addresses[f->address_n++] = one;
	memcpy(m.secret, one.secret, sizeof(m.secret));
	snprintf(m.provider, sizeof(m.provider), "%s", f->info->fabric_attr->prov_name);
	out->bytes = sizeof(m);
	memcpy(out->data, &m, sizeof(m));
	return 0;
}

/* A secret is good once: finding it removes it. */
static bool address_use(struct fab *f, const uint8_t secret[OFI_SECRET_BYTES], uint64_t user)
{
	for (uint32_t i = 0; i < f->address_n; i++) {
		if (memcmp(f->addresses[i].secret, secret, OFI_SECRET_BYTES) || f->addresses[i].user != user)
			continue;
		f->address_n--;
		memmove(&f->addresses[i], &f->addresses[i + 1], (f->address_n - i) * sizeof(*f->addresses));
		return true;
	}
	return false;
}

static void ep_free(struct fab_ep *ep)
{
	free(ep->mailbox);
	free(ep);
}

static void run_start(void *ctx)
{
	ofi_conn_start(ctx);
}

static int ep_create(struct fab *f, uint64_t user, bool connects, const uint8_t secret[OFI_SECRET_BYTES],
		     struct fab_ep **out)
{
	struct fab_ep *ep = calloc(1, sizeof(*ep));
	int ret;

	if (!ep)
		return -ENOMEM;
	ep->mailbox = aligned_alloc(CACHE_LINE, round_up_u64(sizeof(*ep->mailbox), CACHE_LINE));
	if (!ep->mailbox) {
		free(ep);
		return -ENOMEM;
	}
	memset(ep->mailbox, 0, sizeof(*ep->mailbox));
	ret = ofi_random(&ep->id, sizeof(ep->id));
	if (ret) {
		ep_free(ep);
		return ret;
	}
	ep->id |= 1;
	ep->fab = f;
	ep->user = user;
	ep->connects = connects;
	ep->fi.wait_fd = -1;
	memcpy(ep->secret, secret, sizeof(ep->secret));
	TAILQ_INIT(&ep->exports);
	ofi_ops_init(ep);
	TAILQ_INSERT_TAIL(&f->eps, ep, link);
	*out = ep;
	return 0;
}

static int parse(const struct fab_blob *in, enum ofi_signal_type type, struct ofi_signal *out)
{
	if (in->bytes != sizeof(*out))
		return -EPROTO;
	memcpy(out, in->data, sizeof(*out));
	if (out->magic != SIGNAL_MAGIC || out->type != type || out->side.name_bytes > sizeof(out->side.name))
		return -EPROTO;
	return memchr(out->provider, 0, sizeof(out->provider)) ? 0 : -EPROTO;
}

int ofi_connect(struct fab *f, const struct fab_blob *address, uint64_t user, struct fab_ep **out)
{
	const char *own = f->info->fabric_attr->prov_name;
	struct ofi_signal m;
	int ret;

	if (parse(address, OFI_ADDRESS, &m))
		return -EINVAL;
	if (strncmp(m.provider, own, sizeof(m.provider) - 1)) {
		log_error(f->log, "fabric ofi: the peer's libfabric provider is %s, ours is %s: --ofi-provider differs",
			  m.provider, own);
		return -ENOTSUP;
	}
	ret = ep_create(f, user, true, m.secret, out);
	if (ret)
		return ret;
	ofi_engine_call(f, run_start, *out);
	return 0;
}

static void refuse(struct fab *f, const char *why)
{
	ofi_count(&f->counters.refused, 1);
	log_warn(f->log, "fabric ofi: refused a peer's signal: %s", why);
}

static struct fab_ep *addressee(struct fab *f, const struct ofi_signal *m)
{
	struct fab_ep *ep;

	TAILQ_FOREACH(ep, &f->eps, link)
	{
		if (m->to ? ep->id == m->to : !ep->connects && ep->far_id == m->side.id)
			return ep;
	}
	return NULL;
}

/* Somebody introduces itself; whom we know by its secret is the one who was given the address. */
static int accept_peer(struct fab *f, uint64_t user, const struct ofi_signal *m, struct fab_ep **out)
{
	int ret;

	if (!address_use(f, m->secret, user)) {
		refuse(f, "its secret is not that of an address that was given to it");
		return -EPROTO;
	}
	ret = ep_create(f, user, false, m->secret, out);
	if (!ret)
		ofi_engine_call(f, run_start, *out);
	return ret;
}

int ofi_signal(struct fab *f, uint64_t user, const struct fab_blob *in)
{
	struct ofi_signal m;
	struct fab_ep *ep;
	int ret = parse(in, OFI_SIDE, &m);

	if (ret || m.side.id == 0) {
		refuse(f, "it is none of this provider");
		return -EPROTO;
	}
	ep = addressee(f, &m);
	if (!ep && m.to)
		return 0;
	if (!ep) {
		ret = accept_peer(f, user, &m, &ep);
		if (ret)
			return ret;
	}
	if (ep->user != user || (ep->far_id && ep->far_id != m.side.id) ||
	    memcmp(ep->secret, m.secret, OFI_SECRET_BYTES)) {
		refuse(f, "it is about somebody else's connection");
		return -EPROTO;
	}
	ep->far_id = m.side.id;
	pthread_mutex_lock(&f->lock);
	ep->incoming = m;
	ep->incoming_due = true;
	ofi_engine_wake(f);
	pthread_mutex_unlock(&f->lock);
	return 0;
}

/* ------------------------------------------------------------------- ending */

static void say_bye(struct fab_ep *ep)
{
	uint64_t end = clock_now_ns() + BYE_NS, now;
	bool posted = false;

	ep->word_done = false;
	while (!ep->word_done && ep->state == OFI_UP && (now = clock_now_ns()) < end) {
		if (!posted) {
			int ret = ofi_word_post(ep, offsetof(struct ofi_mailbox, bye), ep->far.tag);

			if (ret && ret != -EAGAIN)
				return;
			posted = !ret;
		}
		(void)ofi_ops_progress(ep, now);
	}
}

static void run_end(void *ctx)
{
	struct fab_ep *ep = ctx;

	if (ep->state == OFI_UP)
		say_bye(ep);
	if (ep->state != OFI_OVER)
		(void)close_generation(ep, clock_now_ns());
	ofi_exports_end(ep);
	TAILQ_REMOVE(&ep->fab->engaged, ep, turn_link);
}

void ofi_disconnect(struct fab_ep *ep)
{
	struct fab *f = ep->fab;
	struct fab_remote *r;

	ofi_engine_call(f, run_end, ep);
	ofi_ops_drop(ep);
	TAILQ_FOREACH(r, &f->remotes, link)
	if (r->ep == ep)
		r->ep = NULL;
	pthread_mutex_lock(&f->lock);
	if (ep->ready)
		TAILQ_REMOVE(&f->ready, ep, ready_link);
	pthread_mutex_unlock(&f->lock);
	TAILQ_REMOVE(&f->eps, ep, link);
	ep_free(ep);
}

void ofi_describe(const struct fab_ep *ep, char *out, size_t bytes)
{
	pthread_mutex_lock(&ep->fab->lock);
	snprintf(out, bytes, "%s", ep->text);
	pthread_mutex_unlock(&ep->fab->lock);
}
