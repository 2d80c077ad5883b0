/* SPDX-License-Identifier: Apache-2.0 */
#include "mesh/conn_internal.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int bad_endpoint(const char *text, struct err *e)
{
	return err_set(e, -EINVAL, "'%s': expected host:port", text);
}

int endpoint_parse(const char *text, struct endpoint *out, struct err *e)
{
	const char *host = text, *colon = strrchr(text, ':');
	size_t n;
	char *end;
	long port;

	if (!colon)
		return bad_endpoint(text, e);
	n = (size_t)(colon - text);
	if (n >= 2 && host[0] == '[' && host[n - 1] == ']') {
		host++;
		n -= 2;
	} else if (memchr(host, ':', n)) {
		return err_set(e, -EINVAL, "'%s': an IPv6 address is written [address]:port", text);
	}
	if (n == 1 && *host == '*')
		n = 0;
	port = strtol(colon + 1, &end, 10);
	if (n >= sizeof(out->host) || colon[1] < '0' || colon[1] > '9' || *end || port > 65535)
		return bad_endpoint(text, e);
	snprintf(out->host, sizeof(out->host), "%.*s", (int)n, host);
	snprintf(out->port, sizeof(out->port), "%ld", port);
	return 0;
}

int endpoint_resolve(const struct endpoint *ep, bool passive, struct addrinfo **out, struct err *e)
{
	struct addrinfo hints = {
		.ai_family = AF_UNSPEC,
		.ai_socktype = SOCK_STREAM,
		.ai_flags = AI_NUMERICSERV | (passive ? AI_PASSIVE : 0),
	};
	int rc = getaddrinfo(ep->host[0] ? ep->host : NULL, ep->port, &hints, out);

	if (rc == 0)
		return 0;
	return err_set(e, -EAGAIN, "cannot resolve '%s': %s", ep->host,
		       rc == EAI_SYSTEM ? strerror(errno) : gai_strerror(rc));
}

void endpoint_text(const struct sockaddr *sa, char *out, size_t bytes)
{
	char host[INET6_ADDRSTRLEN] = "?";

	if (sa->sa_family == AF_INET6) {
		const struct sockaddr_in6 *in6 = (const struct sockaddr_in6 *)(const void *)sa;

		inet_ntop(AF_INET6, &in6->sin6_addr, host, sizeof(host));
		snprintf(out, bytes, "[%s]:%u", host, ntohs(in6->sin6_port));
	} else {
		const struct sockaddr_in *in = (const struct sockaddr_in *)(const void *)sa;

		inet_ntop(AF_INET, &in->sin_addr, host, sizeof(host));
		snprintf(out, bytes, "%s:%u", host, ntohs(in->sin_port));
	}
}

/* Connecting a datagram socket asks the routing table and sends nothing. */
static int route(const struct addrinfo *ai, struct sockaddr_storage *sa)
{
	socklen_t n = sizeof(*sa);
	int fd = socket(ai->ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	int rc = 0;

	if (fd < 0)
		return -errno;
	if (connect(fd, ai->ai_addr, ai->ai_addrlen) < 0 || getsockname(fd, (struct sockaddr *)sa, &n) < 0)
		rc = -errno;
	close(fd);
	return rc;
}

static void set_port_0(struct sockaddr_storage *sa)
{
	if (sa->ss_family == AF_INET6)
		((struct sockaddr_in6 *)sa)->sin6_port = 0;
	else
		((struct sockaddr_in *)sa)->sin_port = 0;
}

int conn_route_address(const char *endpoint, char out[64], struct err *e)
{
	int rc = conn_route(endpoint, out, e);
	size_t n;

	if (rc)
		return rc;
	*strrchr(out, ':') = '\0';
	n = strlen(out);
	if (out[0] == '[') {
		memmove(out, out + 1, n - 2);
		out[n - 2] = '\0';
	}
	return 0;
}

int conn_route(const char *endpoint, char out[64], struct err *e)
{
	struct sockaddr_storage sa = { 0 };
	struct addrinfo *list;
	struct endpoint ep;
	int rc = endpoint_parse(endpoint, &ep, e);

	if (rc == 0)
		rc = endpoint_resolve(&ep, false, &list, e);
	if (rc < 0)
		return rc;
	rc = -EHOSTUNREACH;
	for (const struct addrinfo *ai = list; ai && rc < 0; ai = ai->ai_next)
		rc = route(ai, &sa);
	freeaddrinfo(list);
	if (rc < 0)
		return err_set(e, rc, "no route to %s: %s", endpoint, strerror(-rc));
	set_port_0(&sa);
	endpoint_text((const struct sockaddr *)&sa, out, 64);
	return 0;
}
