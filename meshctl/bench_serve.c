/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The passive side: a shard service's half of the conversation, with memory
 * that nobody looks at. It sleeps in the loop as a shard service does, so what
 * the active side measures is what a worker would see.
 */
#include "meshctl/bench.h"

#include <errno.h>
#include <event2/event.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define EVENTS 64

struct server;
struct instance {
	struct server *server;
	const struct fab_ops *ops;
	struct fab *fab;
	struct event *event;
	struct fab_region *parameters;
};
struct client {
	struct server *server;
	struct conn *conn;
	struct instance *in; /* of the provider that was asked for last */
	struct fab_ep *ep;
	struct fab_region *inbox;
};
struct server {
	const struct bench_config *config;
	struct mesh_self self;
	uint32_t n_instances, n_clients;
	struct instance instance[FAB_CANDIDATES_MAX];
	struct client client[BENCH_PEERS_MAX];
};

/* ------------------------------------------------------------------ providers */

static int send_blob_signal(struct client *c, const struct fab_event *ev)
{
	struct msg_signal m = { .data = { .data = ev->blob->data, .bytes = ev->blob->bytes } };

	snprintf(m.provider, sizeof(m.provider), "%s", c->in->ops->name);
	return c->conn ? conn_send(c->conn, WIRE_SIGNAL, &m) : 0;
}

static int open_inbox(struct client *c, struct fab_blob *out, struct err *e)
{
	const struct fab_region_attr attr = { .name = "inbox",
					      .bytes = c->server->config->memory,
					      .access = FAB_REMOTE_WRITE };
	int rc = c->in->ops->region_open(c->in->fab, &attr, &c->inbox, e);

	return rc ? rc : c->in->ops->export_region(c->ep, c->inbox, out);
}

static void on_up(struct client *c)
{
	struct fab_blob parameters, inbox;
	struct msg_regions m = { .in_place = 0 };
	struct err e = { 0 };
	int rc = c->in->ops->export_region(c->ep, c->in->parameters, &parameters);

	if (!rc)
		rc = open_inbox(c, &inbox, &e);
	if (rc) {
		conn_close(c->conn, e.text[0] ? e.text : strerror(-rc));
		return;
	}
	m.parameters = (struct wire_blob){ .data = parameters.data, .bytes = parameters.bytes };
	m.inbox = (struct wire_blob){ .data = inbox.data, .bytes = inbox.bytes };
	(void)conn_send(c->conn, WIRE_REGIONS, &m);
}

static void on_event(struct instance *in, const struct fab_event *ev)
{
	struct client *c = &in->server->client[ev->user];

	switch (ev->type) {
	case FAB_EV_ACCEPTED:
		if (!c->conn || c->in != in || c->ep) {
			in->ops->disconnect(ev->ep);
			break;
		}
		c->ep = ev->ep;
		on_up(c);
		break;
	case FAB_EV_SIGNAL:
		if (c->in == in)
			(void)send_blob_signal(c, ev);
		break;
	case FAB_EV_DOWN:
		if (c->conn && c->ep == ev->ep)
			conn_close(c->conn, strerror(-ev->status));
		break;
	default:
		break;
	}
}

static void poll_instance(struct instance *in)
{
	struct fab_event ev[EVENTS];
	uint32_t n;

	do {
		while ((n = in->ops->poll(in->fab, ev, EVENTS)) > 0)
			for (uint32_t i = 0; i < n; i++)
				on_event(in, &ev[i]);
	} while (!in->ops->arm(in->fab));
}

static void on_readable(evutil_socket_t fd, short what, void *ctx)
{
	(void)fd;
	(void)what;
	poll_instance(ctx);
}

static int instance_open(struct server *s, const struct fab_ops *ops, struct instance *in, struct err *e)
{
	const struct fab_config cfg = {
		.log = (struct log *)&s->config->log, .job = s->config->job, .member = 1, .options = &s->config->options
	};
	const struct fab_region_attr attr = { .name = "parameters",
					      .bytes = s->config->memory,
					      .access = FAB_REMOTE_READ };
	int rc = ops->open(&cfg, &in->fab, e);

	if (rc)
		return rc;
	in->server = s;
	in->ops = ops;
	rc = ops->region_open(in->fab, &attr, &in->parameters, e);
	if (!rc) {
		in->event = event_new(s->self.base, ops->fd(in->fab), EV_READ | EV_PERSIST, on_readable, in);
		if (!in->event || event_add(in->event, NULL))
			rc = err_set(e, -ENOMEM, "no memory for an event");
	}
	return rc;
}

static void instance_close(struct instance *in)
{
	if (in->event)
		event_free(in->event);
	if (in->parameters)
		in->ops->region_close(in->parameters);
	if (in->fab)
		in->ops->close(in->fab);
}

static int instance_of(struct server *s, const char *name, struct instance **out, struct err *e)
{
	struct instance *in = &s->instance[s->n_instances];
	struct fab_candidate c[FAB_CANDIDATES_MAX];
	int rc;

	for (uint32_t i = 0; i < s->n_instances; i++) {
		if (!strcmp(s->instance[i].ops->name, name)) {
			*out = &s->instance[i];
			return 0;
		}
	}
	if (s->n_instances == ARRAY_LEN(s->instance))
		return err_set(e, -ENOSPC, "too many providers");
	rc = fab_candidates(name, &s->config->options, true, c, NULL, NULL, e);
	if (rc > 0)
		rc = instance_open(s, c[0].ops, in, e);
	if (rc) {
		instance_close(in);
		memset(in, 0, sizeof(*in));
		return rc;
	}
	s->n_instances++;
	*out = in;
	return 0;
}

/* -------------------------------------------------------------------- clients */

static void drop_endpoint(struct client *c)
{
	if (c->ep)
		c->in->ops->disconnect(c->ep);
	if (c->inbox)
		c->in->ops->region_close(c->inbox);
	c->ep = NULL;
	c->inbox = NULL;
}

static int on_want(struct client *c, const char *provider)
{
	struct msg_fabric_refused no = { .provider = "" };
	struct msg_fabric yes = { .provider = "" };
	struct fab_blob address = { 0 };
	struct err e = { 0 };
	int rc;

	drop_endpoint(c);
	rc = instance_of(c->server, provider, &c->in, &e);
	if (!rc)
		rc = c->in->ops->address(c->in->fab, (uint64_t)(c - c->server->client), &address);
	if (rc) {
		snprintf(no.provider, sizeof(no.provider), "%s", provider);
		snprintf(no.reason, sizeof(no.reason), "%s", e.text[0] ? e.text : strerror(-rc));
		return conn_send(c->conn, WIRE_FABRIC_REFUSED, &no);
	}
	poll_instance(c->in);
	snprintf(yes.provider, sizeof(yes.provider), "%s", provider);
	yes.address = (struct wire_blob){ .data = address.data, .bytes = address.bytes };
	return conn_send(c->conn, WIRE_FABRIC, &yes);
}

static int on_signal(struct client *c, const struct msg_signal *m)
{
	struct fab_blob in = { .bytes = m->data.bytes };

	if (!c->in || strcmp(c->in->ops->name, m->provider) != 0)
		return 0;
	if (!c->in->ops->signal || in.bytes > sizeof(in.data))
		return -EPROTO;
	if (in.bytes)
		memcpy(in.data, m->data.data, in.bytes);
	return c->in->ops->signal(c->in->fab, (uint64_t)(c - c->server->client), &in);
}

static int on_message(struct conn *conn, const struct wire_header *h, const union wire_msg *m, void *ctx)
{
	struct client *c = ctx;
	int rc = -EPROTO;

	(void)conn;
	if (h->type == WIRE_FABRIC_WANT)
		rc = on_want(c, m->fabric_want.provider);
	else if (h->type == WIRE_SIGNAL)
		rc = on_signal(c, &m->signal);
	if (c->in)
		poll_instance(c->in);
	return rc;
}

static void on_closed(struct conn *conn, int status, const char *text, void *ctx)
{
	struct client *c = ctx;
	struct server *s = c->server;
	bool proven = conn_role(conn) != 0;

	(void)status;
	log_debug(&((struct bench_config *)s->config)->log, "%s: %s", conn_peer_text(conn), text);
	drop_endpoint(c);
	c->conn = NULL;
	/* Strangers come and go; the last of those who measured ends it. */
	for (uint32_t i = 0; i < s->n_clients; i++)
		if (s->client[i].conn)
			return;
	if (proven)
		event_base_loopbreak(s->self.base);
}

static void on_ready(struct conn *conn, void *ctx)
{
	(void)ctx;
	if (conn_role(conn) != ROLE_WORKER)
		conn_close(conn, "only the active side connects here");
}

static const struct conn_ops client_ops = { .ready = on_ready, .message = on_message, .closed = on_closed };

static void on_accepted(void *ctx, struct conn *conn)
{
	struct server *s = ctx;
	uint32_t i = 0;

	while (i < s->n_clients && s->client[i].conn)
		i++;
	if (i == BENCH_PEERS_MAX) {
		conn_free(conn);
		return;
	}
	if (i == s->n_clients)
		s->n_clients++;
	s->client[i] = (struct client){ .server = s, .conn = conn };
	conn_set_ctx(conn, &client_ops, &s->client[i]);
}

static int serve(struct server *s, const char *listen, int tell, struct err *e)
{
	struct conn_listener *l;
	const char *endpoint;
	int rc = conn_listen(&s->self, listen, on_accepted, s, &l, e);

	if (rc)
		return rc;
	endpoint = conn_listener_endpoint(l);
	if (tell < 0) {
		printf("listening at %s\n", endpoint);
		fflush(stdout);
	} else {
		rc = write_full(tell, endpoint, strlen(endpoint));
		close(tell);
	}
	if (!rc)
		event_base_dispatch(s->self.base);
	conn_listener_free(l);
	return rc ? err_set(e, rc, "cannot say where it listens: %s", strerror(-rc)) : 0;
}

int bench_serve(const struct bench_config *c, const char *listen, int tell, struct err *e)
{
	struct server *s = calloc(1, sizeof(*s));
	int rc;

	if (!s)
		return err_set(e, -ENOMEM, "out of memory");
	s->config = c;
	s->self =
		(struct mesh_self){ .log = (struct log *)&c->log, .role = ROLE_SHARD, .member = 1, .token = c->token };
	snprintf(s->self.job, sizeof(s->self.job), "%s", c->job);
	s->self.base = event_base_new();
	rc = s->self.base ? serve(s, listen, tell, e) : err_set(e, -ENOMEM, "no event loop");
	for (uint32_t i = 0; i < s->n_clients; i++) {
		drop_endpoint(&s->client[i]);
		conn_free(s->client[i].conn);
	}
	for (uint32_t i = 0; i < s->n_instances; i++)
		instance_close(&s->instance[i]);
	if (s->self.base)
		event_base_free(s->self.base);
	free(s);
	return rc;
}
