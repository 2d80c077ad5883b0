/* SPDX-License-Identifier: Apache-2.0 */
/* meshctl status and meshctl stop: one question to the coordinator, one answer. */
#include "meshctl/meshctl.h"

#include <errno.h>
#include <event2/event.h>
#include <string.h>

#define CONNECT_TIMEOUT_NS 3000000000ull

struct query {
	struct mesh_self self;
	unsigned type; /* what to send when connected */
	union wire_msg msg;
	bool json, answered, asked;
	int exit_code;
};

static void print_pair(json_t *pair)
{
	json_t *refused = json_object_get(pair, "refused"), *r;
	const char *provider = json_string_value(json_object_get(pair, "provider"));
	const char *description = json_string_value(json_object_get(pair, "description"));
	size_t i;

	printf("           fabric to shard %lld: %s%s%s\n", json_integer_value(json_object_get(pair, "shard")),
	       provider ? provider : "none yet", description ? ": " : "", description ? description : "");
	json_array_foreach(refused, i, r)
	{
		printf("             not %s: %s\n", json_string_value(json_object_get(r, "provider")),
		       json_string_value(json_object_get(r, "reason")));
	}
}

static void print_member(json_t *m)
{
	json_t *waits = json_object_get(m, "waits"), *wait, *pairs = json_object_get(m, "fabric"), *pair;
	size_t i;

	printf("  %-8s %-4lld %-6s pid %-8lld %s\n", json_string_value(json_object_get(m, "role")),
	       json_integer_value(json_object_get(m, "id")),
	       json_is_true(json_object_get(m, "ready")) ? "ready" : "joins",
	       json_integer_value(json_object_get(m, "pid")), json_string_value(json_object_get(m, "host")));
	json_array_foreach(pairs, i, pair)
	{
		print_pair(pair);
	}
	json_array_foreach(waits, i, wait)
	{
		printf("           %s\n", json_string_value(wait));
	}
}

static void print_status(json_t *s)
{
	json_t *members = json_object_get(s, "members"), *m;
	size_t i;

	printf("job %s  phase %s  step %lld  epoch %lld\n", json_string_value(json_object_get(s, "job")),
	       json_string_value(json_object_get(s, "phase")), json_integer_value(json_object_get(s, "step")),
	       json_integer_value(json_object_get(s, "epoch")));
	printf("waiting for: %s\n", json_string_value(json_object_get(s, "waiting_for")));
	json_array_foreach(members, i, m)
	{
		print_member(m);
	}
}

static int show_status(struct query *q, const struct wire_blob *blob)
{
	json_error_t je;
	json_t *s;

	if (q->json) {
		printf("%.*s\n", (int)blob->bytes, (const char *)blob->data);
		return 0;
	}
	s = json_loadb((const char *)blob->data, blob->bytes, 0, &je);
	if (!s)
		return -EPROTO;
	print_status(s);
	json_decref(s);
	return 0;
}

static void query_ready(struct conn *c, void *ctx)
{
	struct query *q = ctx;

	q->asked = conn_send(c, q->type, &q->msg) == 0;
	if (q->asked && q->type == WIRE_STOP) {
		q->answered = true;
		conn_close(c, "said");
	}
}

static int query_message(struct conn *c, const struct wire_header *h, const union wire_msg *m, void *ctx)
{
	struct query *q = ctx;

	if (h->type != WIRE_STATUS)
		return 0;
	q->answered = show_status(q, &m->status.json) == 0;
	conn_close(c, "answered");
	return 0;
}

static void query_closed(struct conn *c, int status, const char *text, void *ctx)
{
	struct query *q = ctx;

	(void)c;
	(void)status;
	if (!q->answered) {
		fprintf(stderr, "meshctl: no answer from the coordinator: %s\n", text);
		q->exit_code = EXIT_RETRY_LATER;
	}
	event_base_loopbreak(q->self.base);
}

static const struct conn_ops query_ops = { .ready = query_ready, .message = query_message, .closed = query_closed };

static int ask(struct query *q, const struct observer_flags *f)
{
	struct conn *c;
	struct err e = { 0 };
	int rc;

	q->self.base = event_base_new();
	if (!q->self.base)
		return EXIT_JOB_FAILED;
	rc = observer_connect(&q->self, f, CONNECT_TIMEOUT_NS, &query_ops, q, &c, &e);
	if (rc) {
		fprintf(stderr, "meshctl: %s\n", e.text);
		event_base_free(q->self.base);
		/* What was typed does not get better by itself, as a coordinator that is not there yet may. */
		return rc == -EINVAL ? EXIT_USAGE : EXIT_RETRY_LATER;
	}
	event_base_dispatch(q->self.base);
	event_base_free(q->self.base);
	return q->exit_code;
}

static int query_main(int argc, char **argv, struct query *q, const char *usage, const char *what, bool with_json)
{
	struct observer_flags f = { 0 };
	struct err e = { 0 };
	bool help = false;
	int rest;
	struct opt opts[] = {
		{ .name = "run-dir",
		  .kind = OPT_STR,
		  .out = &f.run_dir,
		  .arg = "DIR",
		  .help = "the job's run directory" },
		{ .name = "rdzv-endpoint",
		  .kind = OPT_STR,
		  .out = &f.endpoint,
		  .arg = "HOST:PORT",
		  .help = "the coordinator" },
		{ .name = "rdzv-id", .kind = OPT_STR, .out = &f.job, .arg = "JOB", .help = "the job's name" },
		{ .name = "token-file",
		  .kind = OPT_STR,
		  .out = &f.token_file,
		  .arg = "FILE",
		  .help = "the job's token (else SHARDMESH_TOKEN, or DIR/token)" },
		{ .name = "help", .kind = OPT_FLAG, .out = &help, .help = "this text" },
		{ .name = with_json ? "json" : NULL,
		  .kind = OPT_FLAG,
		  .out = &q->json,
		  .help = "print the coordinator's JSON" },
		{ 0 },
	};

	if (opt_parse(opts, argc, argv, &rest, &e))
		return usage_error(argv[0], &e);
	if (help) {
		command_help(usage, what, opts);
		return EXIT_OK;
	}
	if (rest < argc) {
		err_set(&e, -EINVAL, "'%s' is not expected here", argv[rest]);
		return usage_error(argv[0], &e);
	}
	return ask(q, &f);
}

int status_main(int argc, char **argv)
{
	struct query q = { .type = WIRE_STATUS_GET };

	return query_main(argc, argv, &q, "status [--run-dir DIR | --rdzv-endpoint HOST:PORT --rdzv-id JOB] [--json]",
			  "Names every member of a job and every wait.", true);
}

int stop_main(int argc, char **argv)
{
	struct query q = { .type = WIRE_STOP };

	snprintf(q.msg.stop.reason, sizeof(q.msg.stop.reason), "meshctl stop");
	return query_main(argc, argv, &q, "stop [--run-dir DIR | --rdzv-endpoint HOST:PORT --rdzv-id JOB]",
			  "The job finishes its open step, writes its model and ends.", false);
}
