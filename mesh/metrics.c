/* SPDX-License-Identifier: Apache-2.0 */
#include "mesh/mesh.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

/* Packed: for each counter one byte of name length, the name, eight bytes of value. */
#define NAME_MAX_BYTES 63

void metrics_add(struct metrics *m, const char *name, const char *help, const _Atomic uint64_t *value)
{
	assert(m->n < METRICS_MAX);
	assert(strncmp(name, "mesh_", 5) == 0 && strlen(name) <= NAME_MAX_BYTES);
	m->metric[m->n++] = (struct metric){ .name = name, .help = help, .value = value };
}

static bool is_first(const struct metrics *m, uint32_t at)
{
	for (uint32_t i = 0; i < at; i++)
		if (!strcmp(m->metric[i].name, m->metric[at].name))
			return false;
	return true;
}

/* Of all counters of the name. */
static uint64_t sum_of(const struct metrics *m, const char *name)
{
	uint64_t sum = 0;

	for (uint32_t i = 0; i < m->n; i++)
		if (!strcmp(m->metric[i].name, name))
			sum += atomic_load_explicit(m->metric[i].value, memory_order_relaxed);
	return sum;
}

size_t metrics_pack(const struct metrics *m, uint8_t *out, size_t max)
{
	size_t used = 0;

	for (uint32_t i = 0; i < m->n; i++) {
		size_t n = strlen(m->metric[i].name);
		uint64_t value;

		if (!is_first(m, i))
			continue;
		value = sum_of(m, m->metric[i].name);
		if (max - used < 1 + n + sizeof(value))
			break;
		out[used++] = (uint8_t)n;
		memcpy(out + used, m->metric[i].name, n);
		memcpy(out + used + n, &value, sizeof(value));
		used += n + sizeof(value);
	}
	return used;
}

int metrics_unpack(const uint8_t *packed, size_t bytes, void (*fn)(void *ctx, const char *name, uint64_t value),
		   void *ctx)
{
	size_t at = 0;

	while (at < bytes) {
		char name[NAME_MAX_BYTES + 1];
		uint64_t value;
		size_t n = packed[at++];

		if (n == 0 || n > NAME_MAX_BYTES || bytes - at < n + sizeof(value) || memchr(packed + at, 0, n))
			return -EPROTO;
		memcpy(name, packed + at, n);
		name[n] = 0;
		memcpy(&value, packed + at + n, sizeof(value));
		at += n + sizeof(value);
		fn(ctx, name, value);
	}
	return 0;
}
