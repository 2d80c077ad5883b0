/* SPDX-License-Identifier: Apache-2.0 */
/* Every message of wire.def: there and back, cut at every length, and with every kind of damage. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "mesh/mesh.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static const uint8_t blob_bytes[] = "bytes of a blob, with a \0 inside";

/* Deterministic filling: each field another value, strings up to their whole length. */
static uint64_t counter;

static void fill_bytes(void *out, size_t bytes)
{
	uint8_t *p = out;

	for (size_t i = 0; i < bytes; i++)
		p[i] = (uint8_t)(rng_u64(1, 2, counter++) | 1);
}

static void fill_str(char *out, size_t max)
{
	size_t n = (size_t)(rng_u64(3, 4, counter++) % max);

	for (size_t i = 0; i < n; i++)
		out[i] = (char)('a' + i % 26);
	out[n] = 0;
}

struct message {
	unsigned type;
	const char *name;
	void (*fill)(union wire_msg *m);
	/* Of the same type: are all fields equal? */
	bool (*equal)(const union wire_msg *a, const union wire_msg *b);
};

/* clang-format off */
#define WIRE_MSG(NAME, number, name) \
	static void fill_##name(union wire_msg *u) { struct msg_##name *m = &u->name; memset(u, 0, sizeof(*u));
#define WIRE_U32(f) fill_bytes(&m->f, sizeof(m->f));
#define WIRE_U64(f) fill_bytes(&m->f, sizeof(m->f));
#define WIRE_F64(f) m->f = 1.0 / (double)++counter;
#define WIRE_FIXED(f, n) fill_bytes(m->f, n);
#define WIRE_STR(f, max) fill_str(m->f, max);
#define WIRE_BLOB(f) m->f.data = blob_bytes; m->f.bytes = sizeof(blob_bytes);
#define WIRE_END }
#include "mesh/wire.def"
#undef WIRE_MSG
#undef WIRE_U32
#undef WIRE_U64
#undef WIRE_F64
#undef WIRE_FIXED
#undef WIRE_STR
#undef WIRE_BLOB
#undef WIRE_END

#define WIRE_MSG(NAME, number, name) \
	static bool equal_##name(const union wire_msg *ua, const union wire_msg *ub) { \
	const struct msg_##name *a = &ua->name, *b = &ub->name; bool same = true;
#define WIRE_U32(f) same = same && a->f == b->f;
#define WIRE_U64(f) same = same && a->f == b->f;
#define WIRE_F64(f) same = same && a->f == b->f;
#define WIRE_FIXED(f, n) same = same && memcmp(a->f, b->f, n) == 0;
#define WIRE_STR(f, max) same = same && strcmp(a->f, b->f) == 0;
#define WIRE_BLOB(f) same = same && a->f.bytes == b->f.bytes && memcmp(a->f.data, b->f.data, a->f.bytes) == 0;
#define WIRE_END return same; }
#include "mesh/wire.def"
#undef WIRE_MSG
#undef WIRE_U32
#undef WIRE_U64
#undef WIRE_F64
#undef WIRE_FIXED
#undef WIRE_STR
#undef WIRE_BLOB
#undef WIRE_END

#define WIRE_U32(f)
#define WIRE_U64(f)
#define WIRE_F64(f)
#define WIRE_FIXED(f, n)
#define WIRE_STR(f, max)
#define WIRE_BLOB(f)
#define WIRE_END
static const struct message messages[] = {
#define WIRE_MSG(NAME, number, name) { number, #NAME, fill_##name, equal_##name },
#include "mesh/wire.def"
#undef WIRE_MSG
};
/* clang-format on */

static void test_round_trip(void **state)
{
	uint8_t body[8192];
	union wire_msg in, out;

	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(messages); i++) {
		for (int round = 0; round < 20; round++) {
			int n;

			messages[i].fill(&in);
			n = wire_encode(messages[i].type, &in, body, sizeof(body));
			assert_true(n > 0);
			assert_int_equal(wire_decode(messages[i].type, body, (size_t)n, &out), 0);
			assert_true(messages[i].equal(&in, &out));
		}
		assert_string_equal(wire_name(messages[i].type), messages[i].name);
	}
}

/* The copy has exactly n bytes, so that the sanitizers see a read past it. */
static int decode_exact(unsigned type, const uint8_t *body, size_t n)
{
	uint8_t *exact = malloc(n ? n : 1);
	union wire_msg out;
	int rc;

	assert_non_null(exact);
	memcpy(exact, body, n);
	rc = wire_decode(type, exact, n, &out);
	free(exact);
	return rc;
}

static void test_every_length(void **state)
{
	uint8_t body[8192] = { 0 };
	union wire_msg in;

	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(messages); i++) {
		int n;

		messages[i].fill(&in);
		n = wire_encode(messages[i].type, &in, body, sizeof(body));
		assert_true(n > 0);
		for (int cut = 0; cut < n; cut++) {
			uint8_t small[8192];

			assert_int_equal(decode_exact(messages[i].type, body, (size_t)cut), -EPROTO);
			assert_int_equal(wire_encode(messages[i].type, &in, small, (size_t)cut), -ENOSPC);
		}
		body[n] = 0;
		assert_int_equal(decode_exact(messages[i].type, body, (size_t)n + 1), -EPROTO);
	}
}

static void test_damaged_bytes(void **state)
{
	uint8_t body[8192], again[8192];
	union wire_msg in, out;

	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(messages); i++) {
		int n;

		messages[i].fill(&in);
		n = wire_encode(messages[i].type, &in, body, sizeof(body));
		for (int at = 0; at < n; at++) {
			uint8_t was = body[at];

			body[at] ^= (uint8_t)(1u << (at % 8));
			/* Either it is refused, or it is another message, whose one encoding this is. */
			if (wire_decode(messages[i].type, body, (size_t)n, &out) == 0) {
				assert_int_equal(wire_encode(messages[i].type, &out, again, sizeof(again)), n);
				assert_memory_equal(body, again, (size_t)n);
			}
			body[at] = was;
		}
	}
}

static void test_strings_and_blobs(void **state)
{
	union wire_msg m = { 0 };
	uint8_t body[1024];
	int n;

	(void)state;
	memset(m.stop.reason, 'x', sizeof(m.stop.reason));
	assert_int_equal(wire_encode(WIRE_STOP, &m, body, sizeof(body)), -EINVAL);
	m.stop.reason[sizeof(m.stop.reason) - 1] = 0;
	n = wire_encode(WIRE_STOP, &m, body, sizeof(body));
	assert_int_equal(n, 2 + 127);
	/* A NUL inside a string would make two encodings of one text. */
	body[50] = 0;
	assert_int_equal(decode_exact(WIRE_STOP, body, (size_t)n), -EPROTO);
	/* A length that leaves no room for the NUL. */
	memset(body, 'x', sizeof(body));
	body[0] = 128;
	body[1] = 0;
	assert_int_equal(decode_exact(WIRE_STOP, body, 2 + 128), -EPROTO);
	m = (union wire_msg){ .status = { .json = { .data = NULL, .bytes = 4 } } };
	assert_int_equal(wire_encode(WIRE_STATUS, &m, body, sizeof(body)), -EINVAL);
	/* An empty blob is no pointer into the body. */
	memset(body, 0, 4);
	assert_int_equal(wire_decode(WIRE_STATUS, body, 4, &m), 0);
	assert_null(m.status.json.data);
	/* A length near 2^32 must not wrap. */
	memset(body, 0xff, 8);
	assert_int_equal(decode_exact(WIRE_STATUS, body, 8), -EPROTO);
}

static void test_largest_body(void **state)
{
	uint8_t *data = calloc(1, WIRE_BODY_MAX), *body = malloc(WIRE_BODY_MAX + 16);
	struct msg_progress m = { .json = { .data = data, .bytes = WIRE_BODY_MAX - 4 } };

	(void)state;
	assert_non_null(data);
	assert_non_null(body);
	assert_int_equal(wire_encode(WIRE_PROGRESS, &m, body, WIRE_BODY_MAX + 16), WIRE_BODY_MAX);
	m.json.bytes++;
	assert_int_equal(wire_encode(WIRE_PROGRESS, &m, body, WIRE_BODY_MAX + 16), -ENOSPC);
	free(data);
	free(body);
}

static void test_unknown_types(void **state)
{
	uint8_t body[64] = { 0 };
	union wire_msg m;

	(void)state;
	for (unsigned type = 0; type < 70000; type++) {
		if (wire_name(type))
			continue;
		assert_int_equal(wire_decode(type, body, 0, &m), -EPROTO);
		assert_int_equal(wire_encode(type, &m, body, sizeof(body)), -EINVAL);
	}
}

static struct wire_header sealed(const uint8_t *body, uint32_t bytes)
{
	struct wire_header h = {
		.magic = WIRE_MAGIC,
		.protocol = WIRE_PROTOCOL,
		.type = WIRE_STOP,
		.body_bytes = bytes,
		.term = 3,
		.sequence = 9,
	};

	wire_seal(&h, body);
	return h;
}

static void assert_refused(struct wire_header h, const uint8_t *body, const char *reason)
{
	struct err e;

	assert_int_equal(wire_check(&h, body, &e), -EPROTO);
	if (!strstr(e.text, reason))
		fail_msg("'%s' does not say '%s'", e.text, reason);
}

static void test_header(void **state)
{
	uint8_t body[8] = { 3, 0, 'a', 'b', 'c' };
	struct wire_header good = sealed(body, 5), bad;
	struct err e;

	(void)state;
	assert_int_equal(wire_check(&good, body, &e), 0);
	bad = good, bad.magic++;
	assert_refused(bad, body, "not a shardmesh message");
	bad = good, bad.protocol++;
	assert_refused(bad, body, "protocol 2");
	bad = good, bad.type = 9;
	assert_refused(bad, body, "unknown message type 9");
	bad = good, bad.body_bytes = WIRE_BODY_MAX + 1;
	assert_refused(bad, body, "at most 1048576");
	bad = good, bad.zero = 1;
	assert_refused(bad, body, "reserved");
}

/* Whatever bit changes, in the header or in the body, the message is refused. */
static void test_every_bit_is_sealed(void **state)
{
	uint8_t body[8] = { 3, 0, 'a', 'b', 'c' };
	const struct wire_header good = sealed(body, 5);

	(void)state;
	for (size_t bit = 0; bit < sizeof(good) * 8; bit++) {
		struct wire_header bad = good;
		struct err e;

		((uint8_t *)&bad)[bit / 8] ^= (uint8_t)(1u << (bit % 8));
		if (bad.body_bytes > sizeof(body))
			continue; /* a receiver has not got so many bytes yet */
		assert_int_equal(wire_check(&bad, body, &e), -EPROTO);
	}
	for (size_t bit = 0; bit < 5 * 8; bit++) {
		body[bit / 8] ^= (uint8_t)(1u << (bit % 8));
		assert_refused(good, body, "checksum");
		body[bit / 8] ^= (uint8_t)(1u << (bit % 8));
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_round_trip),    cmocka_unit_test(test_every_length),
		cmocka_unit_test(test_damaged_bytes), cmocka_unit_test(test_strings_and_blobs),
		cmocka_unit_test(test_largest_body),  cmocka_unit_test(test_unknown_types),
		cmocka_unit_test(test_header),        cmocka_unit_test(test_every_bit_is_sealed),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
