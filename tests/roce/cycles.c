/* SPDX-License-Identifier: Apache-2.0 */
/*
 * roce_cycles cm|control CYCLES ERRORS: connections that come and go, then
 * connections that break in every way there is, each made again and used. What
 * the device, the kernel and the process count afterwards is what they counted
 * before: no queue pair, region, descriptor, thread or mapping is left behind.
 */
#include "members.h"

#include <dirent.h>

#define BYTES 4096u
#define SAY_AFTER 1000u /* connections: whoever waits sees that it goes on */

struct count {
	char rdma[128]; /* as `rdma resource` says */
	uint32_t fds, threads, mappings;
};

static uint32_t entries(const char *path)
{
	DIR *d = opendir(path);
	uint32_t n = 0;

	need(d);
	while (readdir(d))
		n++;
	closedir(d);
	return n;
}

static uint32_t lines(const char *path)
{
	FILE *f = fopen(path, "r");
	uint32_t n = 0;
	int c;

	need(f);
	while ((c = getc(f)) != EOF)
		n += c == '\n';
	fclose(f);
	return n;
}

static struct count take_stock(const char *when)
{
	struct count c = { .fds = entries("/proc/self/fd"),
			   .threads = entries("/proc/self/task"),
			   .mappings = lines("/proc/self/maps") };
	FILE *f = popen("rdma resource show rxe0", "r");

	need(f && fgets(c.rdma, sizeof(c.rdma), f));
	pclose(f);
	c.rdma[strcspn(c.rdma, "\n")] = 0;
	printf("%s: %s; %u fds, %u threads, %u mappings\n", when, c.rdma, c.fds, c.threads, c.mappings);
	return c;
}

struct used {
	struct members m;
	struct fab_region *parameters, *inbox, *local;
	struct fab_remote *read_from, *write_to;
};

static void begin(struct used *u)
{
	struct fab_blob blob;

	peer_connect(&u->m, 0);
	u->inbox = memory_new(&u->m, u->m.server, "inbox", BYTES, FAB_REMOTE_WRITE, NULL);
	u->read_from = memory_pass(&u->m, 0, u->parameters, &blob);
	u->write_to = memory_pass(&u->m, 0, u->inbox, &blob);
}

static void post(struct used *u)
{
	const struct fab_op r = { .remote = u->read_from, .local = u->local, .bytes = BYTES };
	const struct fab_op w = { .remote = u->write_to, .local = u->local, .bytes = BYTES };

	need(u->m.ops->read(u->m.peer[0].ep, &r, 1) == 0);
	need(u->m.ops->write_notify(u->m.peer[0].ep, &w, 1) == 0);
}

static void use(struct used *u)
{
	struct peer *p = &u->m.peer[0];
	uint64_t reads = p->reads, writes = p->writes, notices = u->m.notices[0];

	post(u);
	turn_until(&u->m, p->reads > reads && p->writes > writes && u->m.notices[0] > notices);
}

/* In turns, who goes first. */
static void end(struct used *u, uint32_t turn)
{
	if (turn % 2)
		peer_evict(&u->m, 0);
	peer_leave(&u->m, 0);
	if (turn % 2 == 0)
		peer_evict(&u->m, 0);
	u->m.ops->remote_close(u->read_from);
	u->m.ops->remote_close(u->write_to);
	u->m.ops->region_close(u->inbox);
}

static void to_error(struct fab_ep *ep, uint32_t qp)
{
	struct ibv_qp_attr a = { .qp_state = IBV_QPS_ERR };

	need(ibv_modify_qp(ep->rail[0].qp[qp].qp, &a, IBV_QP_STATE) == 0);
}

/* Asks for what is not there: the end of this connection, told by its name. */
static void bad_key(struct used *u)
{
	struct peer *p = &u->m.peer[0];
	const struct fab_op op = { .remote = u->read_from, .local = u->local, .bytes = BYTES };

	u->read_from->desc.key[0] ^= 0x5500;
	need(u->m.ops->read(p->ep, &op, 1) == 0);
	turn_until(&u->m, p->down);
	need(p->status == -EACCES && p->failed == 1);
	p->failed = 0;
}

static void error(struct used *u, uint32_t turn)
{
	struct peer *p = &u->m.peer[0];

	begin(u);
	switch (turn % 6) {
	case 0: /* ours, of those for reads */
		to_error(p->ep, 0);
		break;
	case 1: /* ours, for pushes, with work on its way */
		post(u);
		to_error(p->ep, 2);
		break;
	case 2: /* the other side's, for pushes: a push finds it */
		to_error(p->served, 2);
		break;
	case 3: /* all of the other side's, with work on its way */
		post(u);
		for (uint32_t i = 0; i < 4; i++)
			to_error(p->served, i);
		break;
	case 4:
		bad_key(u);
		end(u, turn);
		return;
	case 5: /* left in the middle */
		post(u);
		end(u, turn / 6);
		return;
	}
	use(u);
	end(u, turn);
}

static void same(const struct count *a, const struct count *b)
{
	need(!strcmp(a->rdma, b->rdma));
	need(a->fds == b->fds && a->threads == b->threads && a->mappings <= b->mappings + 2);
}

int main(int argc, char **argv)
{
	static struct used u;
	uint64_t n[2], began;
	struct count before, after;

	setvbuf(stdout, NULL, _IOLBF, 0);
	need(argc == 4);
	n[0] = strtoull(argv[2], NULL, 10);
	n[1] = strtoull(argv[3], NULL, 10);
	members_open(&u.m, connect_named(argv[1]));
	u.m.log.level = u.m.peer_log.level = LOG_ERROR;
	u.parameters = memory_new(&u.m, u.m.server, "parameters", BYTES, FAB_REMOTE_READ, NULL);
	u.local = memory_new(&u.m, u.m.peer[0].f, "window", BYTES, FAB_LOCAL, NULL);
	/* What is made on first use, by libraries too, is there after a few. */
	for (uint32_t i = 0; i < 12; i++)
		error(&u, i);
	before = take_stock("before");
	began = clock_now_ns();
	for (uint32_t i = 0; i < n[0]; i++) {
		begin(&u);
		use(&u);
		end(&u, i);
		if ((i + 1) % SAY_AFTER == 0 && i + 1 < n[0])
			printf("%u connections after %.1f s\n", i + 1, clock_seconds(clock_now_ns() - began));
	}
	printf("%llu connections in %.1f s\n", (unsigned long long)n[0], clock_seconds(clock_now_ns() - began));
	after = take_stock("then");
	same(&after, &before);
	began = clock_now_ns();
	for (uint32_t i = 0; i < n[1]; i++)
		error(&u, i);
	printf("%llu errors in %.1f s\n", (unsigned long long)n[1], clock_seconds(clock_now_ns() - began));
	after = take_stock("after");
	same(&after, &before);
	printf("cycles, by %s: %llu connections and %llu errors leave nothing behind\n", argv[1],
	       (unsigned long long)n[0], (unsigned long long)n[1]);
	members_close(&u.m);
	return 0;
}
