/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A decorator for tests: a provider whose network is bad, by a seeded schedule.
 * It only does what a provider of a network may do by the contract, so a user
 * that breaks under it would break one day without it:
 *
 *   delay      an operation reaches the provider later, by up to twice as much
 *   reorder    and some of them much later, so that others pass
 *   drop       it is lost, and done again when the deadline is over; or it was
 *              done and only the answer is lost: then it is done twice, and a
 *              write's notice comes twice
 *   disconnect the endpoint is down: everything in flight fails, then FAB_EV_DOWN
 *   corrupt    a bit of what was read is another (against the contract: for
 *              tests of checks above it)
 *
 * An operation is an entry from post to completion: HELD until it is due, then
 * POSTED with the provider, perhaps HELD and POSTED again. Events go through a
 * queue, since one of the provider's may become many. What the provider would
 * refuse to post is refused late, as a completion with that status. Regions and
 * remotes are the provider's own.
 */
#include "rdma/fabric.h"
#include "rdma/providers.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/queue.h>
#include <sys/timerfd.h>
#include <unistd.h>

#define ENTRIES_MAX 4096
#define EVENTS 64
#define REORDER_TIMES 10
#define REORDER_MIN_NS 1000000u
#define DEADLINE_NS 50000000u

struct schedule {
	uint64_t seed, delay_ns, deadline_ns;
	double drop, reorder, corrupt, disconnect;
};

enum entry_state { ENTRY_FREE, ENTRY_HELD, ENTRY_POSTED };
struct entry {
	enum entry_state state;
	struct fab_ep *ep;
	struct fab_op op;
	uint64_t due_ns;
	bool write, again, corrupt; /* again: the next answer is lost */
};

struct fab_ep {
	struct fab *fab;
	TAILQ_ENTRY(fab_ep) link;
	struct fab_ep *inner; /* NULL: cut */
	uint64_t user;
};
TAILQ_HEAD(fault_eps, fab_ep);

struct queued {
	struct fab_event ev;
	struct fab_blob blob;
	bool gone; /* of an endpoint that was disconnected */
};

struct fab {
	const struct fab_ops *ops; /* the provider */
	struct log *log;
	struct fab *inner;
	struct schedule s;
	char spec[160];
	uint64_t member, draws;
	int epoll_fd, timer_fd;
	struct fault_eps eps;
	struct entry entry[ENTRIES_MAX];
	uint32_t n_entries; /* not free */
	struct queued *queue;
	uint32_t n_queued, taken, capacity; /* taken: given out by the last poll */
};

/* -------------------------------------------------------------------- schedule */

static int read_time(const char *text, uint64_t *out)
{
	char *end;
	double v = strtod(text, &end);
	double unit = !strcmp(end, "us") ? 1e3 : !strcmp(end, "ms") ? 1e6 : !strcmp(end, "s") ? 1e9 : 0;

	if (end == text || unit == 0 || v < 0 || v * unit > 1e12)
		return -EINVAL;
	*out = (uint64_t)(v * unit);
	return 0;
}

static int read_chance(const char *text, double *out)
{
	char *end;

	*out = strtod(text, &end);
	return end == text || *end || !(*out >= 0) || *out > 1 ? -EINVAL : 0;
}

static int read_word(char *word, struct schedule *s)
{
	char *value = strchr(word, '='), *end;

	if (!value)
		return -EINVAL;
	*value++ = '\0';
	if (!strcmp(word, "seed")) {
		s->seed = strtoull(value, &end, 10);
		return end == value || *end ? -EINVAL : 0;
	}
	if (!strcmp(word, "delay"))
		return read_time(value, &s->delay_ns);
	if (!strcmp(word, "deadline"))
		return read_time(value, &s->deadline_ns);
	if (!strcmp(word, "drop"))
		return read_chance(value, &s->drop);
	if (!strcmp(word, "reorder"))
		return read_chance(value, &s->reorder);
	if (!strcmp(word, "corrupt"))
		return read_chance(value, &s->corrupt);
	return strcmp(word, "disconnect") ? -EINVAL : read_chance(value, &s->disconnect);
}

/* "fault:SPEC:provider" */
static int read_spec(const char *want, char spec[160], struct schedule *s, struct err *e)
{
	const char *from = want + strlen(FAULT_PREFIX), *to = strrchr(want, ':');
	char words[160], *rest = words;

	*s = (struct schedule){ .deadline_ns = DEADLINE_NS };
	if (to < from || (size_t)(to - from) >= sizeof(words))
		return err_set(e, -EINVAL, "--fabric %s: expected fault:SPEC:PROVIDER", want);
	snprintf(words, sizeof(words), "%.*s", (int)(to - from), from);
	snprintf(spec, 160, "%s", words);
	for (char *word = strtok_r(words, ",", &rest); word; word = strtok_r(NULL, ",", &rest))
		if (read_word(word, s))
			return err_set(
				e, -EINVAL,
				"--fabric %s: \"%s\" is not understood; there are seed=N, delay=2ms, deadline=50ms and "
				"the chances drop, reorder, corrupt and disconnect",
				want, word);
	return 0;
}

static uint64_t draw(struct fab *f)
{
	return rng_u64(f->s.seed, f->member, f->draws++);
}

static bool chance(struct fab *f, double p)
{
	return p > 0 && (double)(draw(f) >> 11) * 0x1p-53 < p;
}

static uint64_t below(struct fab *f, uint64_t n)
{
	return n ? draw(f) % n : 0;
}

/* ---------------------------------------------------------------------- events */

static void push(struct fab *f, const struct fab_event *ev)
{
	struct queued *q;

	if (f->n_queued == f->capacity) {
		f->capacity = f->capacity ? 2 * f->capacity : EVENTS;
		f->queue = realloc(f->queue, f->capacity * sizeof(*f->queue));
		assert(f->queue); /* of a test */
	}
	q = &f->queue[f->n_queued++];
	*q = (struct queued){ .ev = *ev };
	if (ev->blob)
		q->blob = *ev->blob;
}

static void complete(struct entry *en, int status)
{
	const struct fab_event ev = { .type = en->write ? FAB_EV_WRITE : FAB_EV_READ,
				      .status = status,
				      .ep = en->ep,
				      .user = en->op.user,
				      .imm = en->op.imm };

	push(en->ep->fab, &ev);
	en->ep->fab->n_entries--;
	en->state = ENTRY_FREE;
}

static void fail_all(struct fab_ep *ep, int status)
{
	struct fab *f = ep->fab;

	for (uint32_t i = 0; i < ENTRIES_MAX && f->n_entries; i++)
		if (f->entry[i].state != ENTRY_FREE && f->entry[i].ep == ep)
			complete(&f->entry[i], status);
}

/* As if the network between the two had ended. */
static void cut(struct fab_ep *ep)
{
	const struct fab_event down = { .type = FAB_EV_DOWN, .status = -ECONNRESET, .ep = ep, .user = ep->user };

	if (ep->fab->log)
		log_info(ep->fab->log, "fault: cuts a connection of %s", ep->fab->ops->name);
	ep->fab->ops->disconnect(ep->inner);
	ep->inner = NULL;
	fail_all(ep, -ECONNRESET);
	push(ep->fab, &down);
}

static struct fab_ep *ep_new(struct fab *f, struct fab_ep *inner, uint64_t user)
{
	struct fab_ep *ep = calloc(1, sizeof(*ep));

	if (!ep)
		return NULL;
	*ep = (struct fab_ep){ .fab = f, .inner = inner, .user = user };
	TAILQ_INSERT_TAIL(&f->eps, ep, link);
	return ep;
}

static struct fab_ep *ep_of(struct fab *f, const struct fab_ep *inner)
{
	struct fab_ep *ep;

	TAILQ_FOREACH(ep, &f->eps, link)
	if (ep->inner == inner)
		return ep;
	return NULL;
}

static void flip(struct fab *f, const struct fab_op *op)
{
	uint8_t *at = (uint8_t *)f->ops->region_addr(op->local) + op->local_offset + below(f, op->bytes);

	*at ^= (uint8_t)(1u << below(f, 8));
}

static void on_completion(struct fab *f, const struct fab_event *ev)
{
	struct entry *en = &f->entry[ev->user];

	assert(ev->user < ENTRIES_MAX && en->state == ENTRY_POSTED);
	if (en->again && !ev->status) {
		en->again = false;
		en->state = ENTRY_HELD;
		en->due_ns = clock_now_ns() + f->s.deadline_ns;
		return;
	}
	if (en->corrupt && !ev->status)
		flip(f, &en->op);
	complete(en, ev->status);
}

static void on_event(struct fab *f, const struct fab_event *from)
{
	struct fab_event ev = *from;

	if (ev.type == FAB_EV_READ || ev.type == FAB_EV_WRITE) {
		on_completion(f, &ev);
		return;
	}
	if (ev.type == FAB_EV_ACCEPTED) {
		ev.ep = ep_new(f, from->ep, ev.user);
		if (!ev.ep) {
			f->ops->disconnect(from->ep);
			return;
		}
	} else if (ev.ep) {
		ev.ep = ep_of(f, from->ep);
	}
	/* What is held of one that ends ends before it. */
	if (ev.type == FAB_EV_DOWN && ev.ep)
		fail_all(ev.ep, ev.status);
	push(f, &ev);
}

/* ------------------------------------------------------------------ operations */

static void hand_over(struct fab *f, uint32_t i)
{
	struct entry *en = &f->entry[i];
	struct fab_op op = en->op;
	int rc;

	op.user = i;
	rc = en->write ? f->ops->write_notify(en->ep->inner, &op, 1) : f->ops->read(en->ep->inner, &op, 1);
	if (!rc)
		en->state = ENTRY_POSTED;
	else if (rc == -EAGAIN)
		en->due_ns = clock_now_ns() + REORDER_MIN_NS / 10;
	else
		complete(en, rc);
}

/* Posts what is due. The earliest of the others; 0: none. */
static uint64_t post_due(struct fab *f)
{
	uint64_t now = clock_now_ns(), next = 0;
	uint32_t left = f->n_entries;

	for (uint32_t i = 0; i < ENTRIES_MAX && left; i++) {
		struct entry *en = &f->entry[i];

		left -= en->state != ENTRY_FREE;
		if (en->state == ENTRY_HELD && en->due_ns <= now)
			hand_over(f, i);
		if (en->state == ENTRY_HELD && (!next || en->due_ns < next))
			next = en->due_ns;
	}
	return next;
}

static void plan_entry(struct fab *f, struct entry *en)
{
	en->due_ns = clock_now_ns() + below(f, 2 * f->s.delay_ns);
	if (chance(f, f->s.reorder))
		en->due_ns += below(f, REORDER_TIMES * f->s.delay_ns + REORDER_MIN_NS);
	if (chance(f, f->s.drop)) {
		en->again = draw(f) & 1;
		en->due_ns += en->again ? 0 : f->s.deadline_ns;
	}
	en->corrupt = !en->write && chance(f, f->s.corrupt);
}

static int post(struct fab_ep *ep, const struct fab_op *op, uint32_t n, bool write)
{
	struct fab *f = ep->fab;
	bool cuts = false;
	uint32_t at = 0;

	if (!ep->inner)
		return -ENOTCONN;
	if (n > FAB_BATCH_MAX)
		return -EINVAL;
	if (n > ENTRIES_MAX - f->n_entries)
		return -EAGAIN;
	for (uint32_t i = 0; i < n; i++) {
		while (f->entry[at].state != ENTRY_FREE)
			at++;
		f->entry[at] = (struct entry){ .state = ENTRY_HELD, .ep = ep, .op = op[i], .write = write };
		plan_entry(f, &f->entry[at]);
		f->n_entries++;
		cuts |= chance(f, f->s.disconnect);
	}
	if (cuts)
		cut(ep);
	return 0;
}

static int fault_read(struct fab_ep *ep, const struct fab_op *op, uint32_t n)
{
	return post(ep, op, n, false);
}

static int fault_write(struct fab_ep *ep, const struct fab_op *op, uint32_t n)
{
	return post(ep, op, n, true);
}

/* What the last poll gave out is forgotten: its blobs were good until now. */
static void forget_taken(struct fab *f)
{
	f->n_queued -= f->taken;
	memmove(f->queue, f->queue + f->taken, f->n_queued * sizeof(*f->queue));
	f->taken = 0;
}

static uint32_t give_out(struct fab *f, struct fab_event *out, uint32_t max)
{
	uint32_t n = 0;

	while (f->taken < f->n_queued && n < max) {
		struct queued *q = &f->queue[f->taken++];

		if (q->gone)
			continue;
		q->ev.blob = q->ev.type == FAB_EV_SIGNAL ? &q->blob : NULL;
		out[n++] = q->ev;
	}
	return n;
}

static uint32_t fault_poll(struct fab *f, struct fab_event *out, uint32_t max)
{
	struct fab_event ev[EVENTS];
	uint64_t ticks;
	uint32_t n;

	if (f->taken)
		forget_taken(f);
	if (read(f->timer_fd, &ticks, sizeof(ticks)) < 0)
		assert(errno == EAGAIN);
	post_due(f);
	n = f->ops->poll(f->inner, ev, EVENTS);
	for (uint32_t i = 0; i < n; i++)
		on_event(f, &ev[i]);
	return give_out(f, out, max);
}

static bool fault_arm(struct fab *f)
{
	uint64_t next = post_due(f), now = clock_now_ns();
	uint64_t in = next > now ? next - now : 1;
	struct itimerspec t = { .it_value = { .tv_sec = (time_t)(in / 1000000000),
					      .tv_nsec = (long)(in % 1000000000) } };

	if (f->taken < f->n_queued)
		return false;
	if (!next)
		t = (struct itimerspec){ .it_value = { .tv_sec = 0 } };
	timerfd_settime(f->timer_fd, 0, &t, NULL);
	return f->ops->arm(f->inner);
}

static int fault_fd(struct fab *f)
{
	return f->epoll_fd;
}

/* ------------------------------------------------------------- what is passed on */

static int fault_address(struct fab *f, uint64_t user, struct fab_blob *out)
{
	return f->ops->address(f->inner, user, out);
}

static int fault_connect(struct fab *f, const struct fab_blob *address, uint64_t user, struct fab_ep **out)
{
	struct fab_ep *inner;
	int rc = f->ops->connect(f->inner, address, user, &inner);

	if (rc)
		return rc;
	*out = ep_new(f, inner, user);
	if (*out)
		return 0;
	f->ops->disconnect(inner);
	return -ENOMEM;
}

static int fault_signal(struct fab *f, uint64_t user, const struct fab_blob *in)
{
	return f->ops->signal ? f->ops->signal(f->inner, user, in) : -EPROTO;
}

static void fault_describe(const struct fab_ep *ep, char *out, size_t bytes)
{
	size_t used = (size_t)snprintf(out, bytes, "with faults (%s): ", ep->fab->spec);

	if (ep->inner && used < bytes)
		ep->fab->ops->describe(ep->inner, out + used, bytes - used);
}

static void fault_disconnect(struct fab_ep *ep)
{
	struct fab *f = ep->fab;

	if (ep->inner)
		f->ops->disconnect(ep->inner);
	for (uint32_t i = 0; i < ENTRIES_MAX; i++) {
		if (f->entry[i].state != ENTRY_FREE && f->entry[i].ep == ep) {
			f->entry[i].state = ENTRY_FREE;
			f->n_entries--;
		}
	}
	for (uint32_t i = f->taken; i < f->n_queued; i++)
		f->queue[i].gone |= f->queue[i].ev.ep == ep;
	TAILQ_REMOVE(&f->eps, ep, link);
	free(ep);
}

static int fault_region_open(struct fab *f, const struct fab_region_attr *a, struct fab_region **out, struct err *e)
{
	return f->ops->region_open(f->inner, a, out, e);
}

static int fault_export(struct fab_ep *ep, struct fab_region *r, struct fab_blob *out)
{
	return ep->inner ? ep->fab->ops->export_region(ep->inner, r, out) : -ENOTCONN;
}

static int fault_import(struct fab_ep *ep, const struct fab_blob *blob, struct fab_remote **out)
{
	return ep->inner ? ep->fab->ops->import_region(ep->inner, blob, out) : -ENOTCONN;
}

static const struct fab_counters *fault_counters(const struct fab *f)
{
	return f->ops->counters(f->inner);
}

/* ------------------------------------------------------------------- life cycle */

static void fault_close(struct fab *f)
{
	while (!TAILQ_EMPTY(&f->eps))
		fault_disconnect(TAILQ_FIRST(&f->eps));
	f->ops->close(f->inner);
	close(f->timer_fd);
	close(f->epoll_fd);
	free(f->queue);
	free(f);
}

static int watch(struct fab *f, int fd)
{
	struct epoll_event ev = { .events = EPOLLIN };

	return epoll_ctl(f->epoll_fd, EPOLL_CTL_ADD, fd, &ev) ? -errno : 0;
}

static int open_over(const char *provider, const struct fab_config *cfg, struct fab **out, struct err *e)
{
	struct fab *f = calloc(1, sizeof(*f));
	int rc;

	/* Nobody has this table but by that word. */
	assert(cfg->want);
	rc = f ? read_spec(cfg->want, f->spec, &f->s, e) : err_set(e, -ENOMEM, "out of memory");

	if (rc)
		goto free_it;
	f->ops = fab_provider(provider);
	f->log = cfg->log;
	f->member = cfg->member;
	TAILQ_INIT(&f->eps);
	rc = f->ops->open(cfg, &f->inner, e);
	if (rc)
		goto free_it;
	f->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	f->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
	rc = f->epoll_fd < 0 || f->timer_fd < 0 ? -errno : watch(f, f->timer_fd);
	if (!rc)
		rc = watch(f, f->ops->fd(f->inner));
	if (rc) {
		fault_close(f);
		return err_set(e, rc, "no descriptors for faults: %s", strerror(-rc));
	}
	*out = f;
	return 0;

free_it:
	free(f);
	return rc;
}

/* Each provider's table, since a name and whether it maps are part of it. */
#define OVER(NAME, provider, mapped)                                                                       \
	static int open_##NAME(const struct fab_config *cfg, struct fab **out, struct err *e)              \
	{                                                                                                  \
		return open_over(provider, cfg, out, e);                                                   \
	}                                                                                                  \
	static int probe_##NAME(const struct fab_options *o, char reason[160])                             \
	{                                                                                                  \
		return fab_provider(provider)->probe(o, reason);                                           \
	}                                                                                                  \
	static void close_region_##NAME(struct fab_region *r)                                              \
	{                                                                                                  \
		fab_provider(provider)->region_close(r);                                                   \
	}                                                                                                  \
	static void *region_addr_##NAME(struct fab_region *r)                                              \
	{                                                                                                  \
		return fab_provider(provider)->region_addr(r);                                             \
	}                                                                                                  \
	static void close_remote_##NAME(struct fab_remote *r)                                              \
	{                                                                                                  \
		fab_provider(provider)->remote_close(r);                                                   \
	}                                                                                                  \
	static uint64_t remote_bytes_##NAME(const struct fab_remote *r)                                    \
	{                                                                                                  \
		return fab_provider(provider)->remote_bytes(r);                                            \
	}                                                                                                  \
	static int map_##NAME(struct fab_remote *r, uint64_t offset, uint64_t bytes, void *at, void **out) \
	{                                                                                                  \
		return fab_provider(provider)->map(r, offset, bytes, at, out);                             \
	}                                                                                                  \
	static const struct fab_ops over_##NAME = {                                                        \
		.name = provider,                                                                          \
		.maps = mapped,                                                                            \
		.probe = probe_##NAME,                                                                     \
		.open = open_##NAME,                                                                       \
		.close = fault_close,                                                                      \
		.address = fault_address,                                                                  \
		.connect = fault_connect,                                                                  \
		.signal = fault_signal,                                                                    \
		.describe = fault_describe,                                                                \
		.disconnect = fault_disconnect,                                                            \
		.region_open = fault_region_open,                                                          \
		.region_close = close_region_##NAME,                                                       \
		.region_addr = region_addr_##NAME,                                                         \
		.export_region = fault_export,                                                             \
		.import_region = fault_import,                                                             \
		.remote_close = close_remote_##NAME,                                                       \
		.remote_bytes = remote_bytes_##NAME,                                                       \
		.map = map_##NAME,                                                                         \
		.read = fault_read,                                                                        \
		.write_notify = fault_write,                                                               \
		.poll = fault_poll,                                                                        \
		.fd = fault_fd,                                                                            \
		.arm = fault_arm,                                                                          \
		.counters = fault_counters,                                                                \
	};

OVER(local, "local", true)
OVER(local_copy, "local-copy", false)
OVER(verbs, "verbs", false)
OVER(ofi, "ofi", false)

const struct fab_ops *fab_fault(const struct fab_ops *ops)
{
	static const struct fab_ops *const over[] = { &over_local, &over_local_copy, &over_verbs, &over_ofi };

	for (size_t i = 0; i < ARRAY_LEN(over); i++)
		if (!strcmp(over[i]->name, ops->name))
			return over[i];
	return NULL;
}

int fab_fault_check(const char *want, struct err *e)
{
	const char *allowed = getenv("SHARDMESH_FAULTS");
	struct schedule s;
	char spec[160];

	if (!allowed || strcmp(allowed, "1") != 0)
		return err_set(e, -ENOTSUP, "--fabric %s: for tests, where SHARDMESH_FAULTS=1 is in the environment",
			       want);
	return read_spec(want, spec, &s, e);
}
