/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Bytes from a stranger, as a body of any type (the first two bytes choose it),
 * as a header, and as the packed blocks inside a heartbeat. A body that is
 * accepted must be the one encoding of what was read from it.
 */
#include "mesh/mesh.h"

#include <stdlib.h>
#include <string.h>

static uint8_t again[WIRE_BODY_MAX];

static void body(const uint8_t *data, size_t size)
{
	union wire_msg m;
	uint16_t type;

	memcpy(&type, data, sizeof(type));
	type %= 72; /* just past the last number */
	data += sizeof(type);
	size -= sizeof(type);
	if (wire_decode(type, data, size, &m) < 0)
		return;
	if (wire_encode(type, &m, again, sizeof(again)) != (int)size || memcmp(again, data, size) != 0)
		abort();
}

static void header(const uint8_t *data, size_t size)
{
	struct wire_header h;
	struct err e;

	if (size < sizeof(h))
		return;
	memcpy(&h, data, sizeof(h));
	/* A receiver has the whole body before it asks. */
	h.body_bytes %= (uint32_t)(size - sizeof(h) + 1);
	(void)wire_check(&h, data + sizeof(h), &e);
	h.magic = WIRE_MAGIC;
	h.protocol = WIRE_PROTOCOL;
	if (wire_check(&h, data + sizeof(h), &e) < 0 && !memchr(e.text, 0, sizeof(e.text)))
		abort();
}

static void count(void *ctx, const char *name, uint64_t value)
{
	(void)value;
	*(size_t *)ctx += strlen(name) + 1 + sizeof(value);
}

static void heartbeat(const uint8_t *data, size_t size)
{
	char text[300];
	size_t seen = 0, n = waits_text("worker 1", data, size, text, sizeof(text));

	if (n >= sizeof(text) || strlen(text) != n)
		abort();
	if (metrics_unpack(data, size, count, &seen) == 0 && seen != size)
		abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	if (size >= 2)
		body(data, size);
	header(data, size);
	heartbeat(data, size);
	return 0;
}
