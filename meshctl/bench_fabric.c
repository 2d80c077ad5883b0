/* SPDX-License-Identifier: Apache-2.0 */
/*
 * meshctl bench fabric: what a pair of members gets from a fabric. On one host
 * the passive side is a child process; between two hosts it is this command
 * with --listen, and the other one dials it with --connect. Both prove that
 * they know the token before anything else, as members of a job do.
 */
#include "meshctl/bench.h"
#include "meshctl/meshctl.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/wait.h>
#include <unistd.h>

#define LIST_MAX 64
#define MEMORY_DEFAULT (64ull << 20)
#define GPT2_BLOCK_BYTES (7087872ull * 4)
#define ENDPOINT_MAX 128

struct bench {
	struct bench_config config;
	struct fab_flags fabric;
	const char *sizes, *depths, *operation, *listen, *connect, *job, *token_file, *level;
	uint64_t memory, owners, page, unit;
	double seconds;
	bool json, help;
	uint32_t n_sizes, n_depths, n_children;
	uint64_t size[LIST_MAX], depth[LIST_MAX];
	pid_t child[BENCH_PEERS_MAX];
	char endpoint[BENCH_PEERS_MAX][ENDPOINT_MAX];
	char address[64]; /* of ours, from which the other side is reached */
};

/* ----------------------------------------------------------------------- flags */

/* "4096,64K,1M" */
static int read_list(const char *text, const char *flag, uint64_t max, uint64_t *out, uint32_t *n, struct err *e)
{
	const char *at = text;

	for (*n = 0; *n < LIST_MAX; at++) {
		char *end;
		uint64_t v = strtoull(at, &end, 10);

		if (*end == 'K' || *end == 'M')
			v <<= *end++ == 'K' ? 10 : 20;
		if (end == at || (*end && *end != ',') || v == 0 || v > max)
			return err_set(e, -EINVAL, "--%s %s: expected numbers up to %llu (K, M), with commas", flag,
				       text, (unsigned long long)max);
		out[(*n)++] = v;
		at = end;
		if (!*end)
			return 0;
	}
	return err_set(e, -EINVAL, "--%s: more than %d", flag, LIST_MAX);
}

static int check_flags(struct bench *b, struct err *e)
{
	int rc = read_list(b->sizes, "sizes", 1u << 30, b->size, &b->n_sizes, e);

	if (!rc)
		rc = read_list(b->depths, "depths", 1024, b->depth, &b->n_depths, e);
	if (!rc)
		rc = fab_flags_apply(&b->fabric, &b->config.options, e);
	if (rc)
		return rc;
	if (b->listen && b->connect)
		return err_set(e, -EINVAL, "--listen is one side, --connect the other");
	if (strcmp(b->operation, "read") && strcmp(b->operation, "push") && strcmp(b->operation, "both"))
		return err_set(e, -EINVAL, "--operation: expected read, push or both, found \"%s\"", b->operation);
	if (b->owners > BENCH_PEERS_MAX)
		return err_set(e, -EINVAL, "--owners: at most %d", BENCH_PEERS_MAX);
	if (b->memory < 4096 || b->page < 4096 || !(b->seconds > 0))
		return err_set(e, -EINVAL, "--memory and --pages: at least 4096; --seconds: more than 0");
	if (b->level && log_level_parse(b->level, &b->config.log.level))
		return err_set(e, -EINVAL, "--log-level is debug, info, warn or error");
	return 0;
}

/* On one host nobody else has to know the token. */
static int make_token(struct bench *b, struct err *e)
{
	struct job_token *t = &b->config.token;

	if (b->listen || b->connect)
		return token_load(b->token_file, t, e);
	t->bytes = 32;
	if (getrandom(t->data, t->bytes, 0) != (ssize_t)t->bytes)
		return err_set(e, -EIO, "no random bytes for a token");
	return 0;
}

/* -------------------------------------------------------------------- processes */

static _Noreturn void child(struct bench *b, int tell, pid_t parent)
{
	struct err e = { 0 };
	int rc = 0;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() == parent)
		rc = bench_serve(&b->config, "127.0.0.1:0", tell, &e);
	if (rc)
		fprintf(stderr, "meshctl bench: the passive side: %s\n", e.text);
	_exit(rc ? 1 : 0);
}

static int start_child(struct bench *b, uint32_t i, struct err *e)
{
	pid_t parent = getpid(), pid;
	int pipes[2];
	ssize_t n;

	if (pipe(pipes))
		return err_set(e, -errno, "pipe: %s", strerror(errno));
	pid = fork();
	if (pid == 0) {
		close(pipes[0]);
		child(b, pipes[1], parent);
	}
	close(pipes[1]);
	n = pid < 0 ? -1 : read(pipes[0], b->endpoint[i], ENDPOINT_MAX - 1);
	close(pipes[0]);
	if (pid > 0)
		b->child[b->n_children++] = pid;
	return n > 0 ? 0 : err_set(e, -ECHILD, "the passive side did not start");
}

static void end_children(struct bench *b)
{
	for (uint32_t i = 0; i < b->n_children; i++) {
		kill(b->child[i], SIGTERM);
		waitpid(b->child[i], NULL, 0);
	}
}

/* "a:1,b:1": taken in turns when there are more owners than endpoints. */
static int dial_list(struct bench *b, uint32_t n, struct err *e)
{
	const char *at = b->connect;

	for (uint32_t i = 0; i < n; i++) {
		size_t bytes = strcspn(at, ",");

		if (bytes == 0 || bytes >= ENDPOINT_MAX)
			return err_set(e, -EINVAL, "--connect: expected HOST:PORT, or several with commas");
		memcpy(b->endpoint[i], at, bytes);
		at = at[bytes] ? at + bytes + 1 : b->connect;
	}
	return 0;
}

static int find_passive(struct bench *b, uint32_t n, struct err *e)
{
	int rc = 0;

	if (b->connect)
		return dial_list(b, n, e);
	b->config.same_host = true;
	for (uint32_t i = 0; i < n && !rc; i++)
		rc = start_child(b, i, e);
	return rc;
}

/* ---------------------------------------------------------------------- results */

static void print_cell(const struct bench_cell *c, const struct bench_result *r)
{
	char size[24];

	printf("%-5s %10s  depth %2u  %8.3f GB/s  %10.0f /s   p50 %8.1f  p99 %8.1f  p99.9 %8.1f  max %8.1f us\n",
	       c->push ? "push" : "read", bytes_text(c->bytes, size), c->depth, r->gb_per_s, r->messages_per_s,
	       r->p50_us, r->p99_us, r->p999_us, r->max_us);
	fflush(stdout);
}

static json_t *cell_json(const struct bench_cell *c, const struct bench_result *r)
{
	return json_pack("{ss sI si sf sf s{sf sf sf sf}}", "operation", c->push ? "push" : "read", "bytes",
			 (json_int_t)c->bytes, "depth", (int)c->depth, "gb_per_s", r->gb_per_s, "messages_per_s",
			 r->messages_per_s, "latency_us", "p50", r->p50_us, "p99", r->p99_us, "p999", r->p999_us, "max",
			 r->max_us);
}

static int run_cell(struct bench *b, struct bench_join *j, const struct bench_cell *c, json_t *results, struct err *e)
{
	struct bench_result r;
	int rc = bench_cell_run(j, c, &r, e);

	if (rc)
		return rc;
	if (!b->json)
		print_cell(c, &r);
	json_array_append_new(results, cell_json(c, &r));
	return 0;
}

static int run_table(struct bench *b, struct bench_join *j, json_t *out, struct err *e)
{
	json_t *results = json_array();
	int rc = 0;

	json_object_set_new(out, "results", results);
	for (int push = 0; push < 2; push++) {
		if (!strcmp(b->operation, push ? "read" : "push"))
			continue;
		for (uint32_t i = 0; i < b->n_sizes * b->n_depths && !rc; i++) {
			const struct bench_cell c = { .push = push,
						      .bytes = b->size[i / b->n_depths],
						      .depth = (uint32_t)b->depth[i % b->n_depths],
						      .seconds = b->seconds };

			rc = run_cell(b, j, &c, results, e);
		}
	}
	return rc;
}

static int run_pages(struct bench *b, struct bench_join *j, json_t *out, struct err *e)
{
	const struct bench_pages p = { .page = b->page, .unit_bytes = b->unit, .seconds = b->seconds };
	struct bench_pages_result r;
	char size[24];
	int rc = bench_pages_run(j, &p, &r, e);
	double ratio;

	if (rc)
		return rc;
	ratio = r.pages_gb_per_s / r.contiguous_gb_per_s;
	if (!b->json)
		printf("a unit of %s in %u runs from %llu owners %.3f GB/s, contiguous from one %.3f GB/s: %.3f\n",
		       bytes_text(b->unit, size), r.runs, (unsigned long long)b->owners, r.pages_gb_per_s,
		       r.contiguous_gb_per_s, ratio);
	json_object_set_new(out, "pages",
			    json_pack("{sI sI si sI sf sf sf}", "unit_bytes", (json_int_t)b->unit, "page_bytes",
				      (json_int_t)b->page, "runs", (int)r.runs, "owners", (json_int_t)b->owners,
				      "gb_per_s", r.pages_gb_per_s, "contiguous_gb_per_s", r.contiguous_gb_per_s,
				      "ratio", ratio));
	return 0;
}

static int measure(struct bench *b, struct bench_join *j, struct err *e)
{
	char text[256] = "";
	json_t *out;
	int rc;

	j->ops->describe(j->peer[0].ep, text, sizeof(text));
	out = json_pack("{ss ss sI}", "fabric", j->ops->name, "description", text, "memory",
			(json_int_t)b->config.memory);
	if (!out)
		return err_set(e, -ENOMEM, "out of memory");
	if (!b->json)
		printf("fabric %s: %s\n", j->ops->name, text);
	rc = b->owners ? run_pages(b, j, out, e) : run_table(b, j, out, e);
	if (!rc && b->json)
		json_dumpf(out, stdout, JSON_COMPACT | JSON_REAL_PRECISION(9));
	if (!rc && b->json)
		printf("\n");
	json_decref(out);
	return rc;
}

static void own_address(struct bench *b, const char *endpoint)
{
	struct err e;

	if (!conn_route_address(endpoint, b->address, &e))
		b->config.options.local_address = b->address;
}

static int active(struct bench *b, struct err *e)
{
	struct bench_join *j = calloc(1, sizeof(*j));
	const char *endpoint[BENCH_PEERS_MAX];
	uint32_t n = b->owners ? (uint32_t)b->owners : 1;
	int rc = j ? find_passive(b, n, e) : err_set(e, -ENOMEM, "out of memory");

	for (uint32_t i = 0; i < n; i++)
		endpoint[i] = b->endpoint[i];
	if (!rc)
		own_address(b, b->endpoint[0]);
	if (!rc) {
		rc = bench_join(j, &b->config, endpoint, n, e);
		if (!rc)
			rc = measure(b, j, e);
		bench_join_close(j);
	}
	end_children(b);
	free(j);
	return rc;
}

static int fabric_main(int argc, char **argv)
{
	struct bench b = { .sizes = "4K,16K,64K,256K,1M,8M",
			   .depths = "1,4,16,64",
			   .operation = "both",
			   .job = "bench",
			   .memory = MEMORY_DEFAULT,
			   .page = 64 << 10,
			   .unit = GPT2_BLOCK_BYTES,
			   .seconds = 0.5 };
	struct err e = { 0 };
	int rest, rc;
	struct opt opts[] = {
		FAB_FLAG_OPTS(b.fabric),
		{ "sizes", OPT_STR, &b.sizes, "LIST", "bytes of an operation (4K,16K,64K,256K,1M,8M)", false },
		{ "depths", OPT_STR, &b.depths, "LIST", "operations in flight (1,4,16,64)", false },
		{ "operation", OPT_STR, &b.operation, "WHICH", "read, push or both (both)", false },
		{ "seconds", OPT_F64, &b.seconds, "S", "for each size and depth (0.5)", false },
		{ "memory", OPT_U64, &b.memory, "BYTES", "of each side, gone through in turn (64 MiB)", false },
		{ "owners", OPT_U64, &b.owners, "N", "instead: a unit in pages from N owners", false },
		{ "pages", OPT_U64, &b.page, "BYTES", "a page of the unit (65536)", false },
		{ "unit", OPT_U64, &b.unit, "BYTES", "of the unit (a block of GPT-2)", false },
		{ "listen", OPT_STR, &b.listen, "HOST:PORT", "be the passive side, for one run", false },
		{ "connect", OPT_STR, &b.connect, "LIST", "where the passive side listens (HOST:PORT,...)", false },
		{ "rdzv-id", OPT_STR, &b.job, "NAME", "the same on both sides (bench)", false },
		{ "token-file", OPT_STR, &b.token_file, "FILE", "of both sides (else SHARDMESH_TOKEN)", false },
		{ "log-level", OPT_STR, &b.level, "LEVEL", "debug, info, warn, error (warn)", false },
		{ "json", OPT_FLAG, &b.json, NULL, "one JSON object", false },
		{ "help", OPT_FLAG, &b.help, NULL, "this text", false },
		{ 0 },
	};

	log_init(&b.config.log, STDERR_FILENO, "bench");
	b.config.log.level = LOG_WARN;
	rc = opt_parse(opts, argc, argv, &rest, &e);
	if (!rc && rest < argc)
		rc = err_set(&e, -EINVAL, "'%s' is not expected here", argv[rest]);
	if (!rc && b.help) {
		command_help("bench fabric [OPTIONS]",
			     "Reads and pushes between two members: throughput, messages, latency.", opts);
		return EXIT_OK;
	}
	if (!rc)
		rc = check_flags(&b, &e);
	if (rc)
		return usage_error("bench fabric", &e);
	b.config.fabric = b.fabric.fabric ? b.fabric.fabric : "auto";
	b.config.memory = b.memory;
	snprintf(b.config.job, sizeof(b.config.job), "%s", b.job);
	rc = make_token(&b, &e);
	/* Where it listens it is reached; a child does so on loopback. */
	if (!rc && !b.connect)
		own_address(&b, b.listen ? b.listen : "127.0.0.1:1");
	if (!rc)
		rc = b.listen ? bench_serve(&b.config, b.listen, -1, &e) : active(&b, &e);
	if (rc)
		fprintf(stderr, "meshctl bench fabric: %s\n", e.text);
	return rc ? EXIT_JOB_FAILED : EXIT_OK;
}

int bench_main(int argc, char **argv)
{
	struct err e = { 0 };

	if (argc > 1 && !strcmp(argv[1], "fabric"))
		return fabric_main(argc - 1, argv + 1);
	if (argc > 1 && (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h")))
		return fabric_main(argc, argv);
	err_set(&e, -EINVAL, "there is one benchmark: meshctl bench fabric");
	return usage_error("bench", &e);
}
