/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The wire: bodies in and out of structs, and the seal of a header.
 *
 * wire.def is the only list of messages; everything here is generated from it,
 * so a field that is encoded is decoded, in the same order. The encoding is
 * canonical: what wire_decode accepts, wire_encode gives back byte for byte.
 * The fuzzer holds us to that, and it leaves no room for two readings of one
 * message. A decoder trusts nothing: lengths are checked against what is left
 * before anything is read, a string may hold no NUL and must fit its field with
 * one, and a body with bytes left over is as wrong as one that is too short.
 */
#include "mesh/mesh.h"
#include "mesh/wire_internal.h"

#include <errno.h>
#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "fields are copied as they lie in memory");

/* ---------------------------------------------------------------- encoding */

/* out NULL: only counts. An error sticks, so that fields need no check each. */
struct encoder {
	uint8_t *out;
	size_t n, max;
	int status;
};

static void put(struct encoder *e, const void *data, size_t bytes)
{
	if (e->status < 0)
		return;
	if (bytes > e->max - e->n) {
		e->status = -ENOSPC;
		return;
	}
	if (e->out && bytes > 0)
		memcpy(e->out + e->n, data, bytes);
	e->n += bytes;
}

static void put_str(struct encoder *e, const char *s, size_t max)
{
	size_t n = strnlen(s, max);
	uint16_t n16 = (uint16_t)n;

	if (n == max) {
		e->status = e->status < 0 ? e->status : -EINVAL;
		return;
	}
	put(e, &n16, sizeof(n16));
	put(e, s, n);
}

static void put_blob(struct encoder *e, const struct wire_blob *b)
{
	if (b->bytes > 0 && !b->data) {
		e->status = e->status < 0 ? e->status : -EINVAL;
		return;
	}
	put(e, &b->bytes, sizeof(b->bytes));
	put(e, b->data, b->bytes);
}

/* clang-format off */
#define WIRE_MSG(NAME, number, name) static void encode_##name(struct encoder *e, const struct msg_##name *m) {
#define WIRE_U32(f) put(e, &m->f, sizeof(m->f));
#define WIRE_U64(f) put(e, &m->f, sizeof(m->f));
#define WIRE_F64(f) put(e, &m->f, sizeof(m->f));
#define WIRE_FIXED(f, n) put(e, m->f, n);
#define WIRE_STR(f, max) put_str(e, m->f, max);
#define WIRE_BLOB(f) put_blob(e, &m->f);
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

/* The other uses look at the list of messages only. */
#define WIRE_U32(f)
#define WIRE_U64(f)
#define WIRE_F64(f)
#define WIRE_FIXED(f, n)
#define WIRE_STR(f, max)
#define WIRE_BLOB(f)
#define WIRE_END
/* clang-format on */

static int encode(unsigned type, const void *msg, struct encoder *e)
{
	switch (type) {
#define WIRE_MSG(NAME, number, name)   \
	case number:                   \
		encode_##name(e, msg); \
		break;
#include "mesh/wire.def"
#undef WIRE_MSG
	default:
		return -EINVAL;
	}
	return e->status < 0 ? e->status : (int)e->n;
}

int wire_encode(unsigned type, const void *msg, uint8_t *out, size_t max)
{
	struct encoder e = { .out = out, .max = max < WIRE_BODY_MAX ? max : WIRE_BODY_MAX };

	return encode(type, msg, &e);
}

int wire_size(unsigned type, const void *msg)
{
	struct encoder e = { .max = WIRE_BODY_MAX };

	return encode(type, msg, &e);
}

const char *wire_name(unsigned type)
{
	switch (type) {
#define WIRE_MSG(NAME, number, name) \
	case number:                 \
		return #NAME;
#include "mesh/wire.def"
#undef WIRE_MSG
	default:
		return NULL;
	}
}

#undef WIRE_U32
#undef WIRE_U64
#undef WIRE_F64
#undef WIRE_FIXED
#undef WIRE_STR
#undef WIRE_BLOB
#undef WIRE_END

/* ---------------------------------------------------------------- decoding */

struct decoder {
	const uint8_t *in;
	size_t left;
	bool bad;
};

static void get(struct decoder *d, void *out, size_t bytes)
{
	if (d->bad || bytes > d->left) {
		d->bad = true;
		return;
	}
	if (bytes > 0)
		memcpy(out, d->in, bytes);
	d->in += bytes;
	d->left -= bytes;
}

static void get_str(struct decoder *d, char *out, size_t max)
{
	uint16_t n = 0;

	get(d, &n, sizeof(n));
	if (d->bad || n >= max || n > d->left || memchr(d->in, 0, n)) {
		d->bad = true;
		return;
	}
	get(d, out, n);
	out[n] = 0;
}

static void get_blob(struct decoder *d, struct wire_blob *b)
{
	uint32_t n = 0;

	get(d, &n, sizeof(n));
	if (d->bad || n > d->left) {
		d->bad = true;
		return;
	}
	b->data = n ? d->in : NULL;
	b->bytes = n;
	d->in += n;
	d->left -= n;
}

/* clang-format off */
#define WIRE_MSG(NAME, number, name) static void decode_##name(struct decoder *d, struct msg_##name *m) {
#define WIRE_U32(f) get(d, &m->f, sizeof(m->f));
#define WIRE_U64(f) get(d, &m->f, sizeof(m->f));
#define WIRE_F64(f) get(d, &m->f, sizeof(m->f));
#define WIRE_FIXED(f, n) get(d, m->f, n);
#define WIRE_STR(f, max) get_str(d, m->f, max);
#define WIRE_BLOB(f) get_blob(d, &m->f);
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

#define WIRE_U32(f)
#define WIRE_U64(f)
#define WIRE_F64(f)
#define WIRE_FIXED(f, n)
#define WIRE_STR(f, max)
#define WIRE_BLOB(f)
#define WIRE_END
/* clang-format on */

int wire_decode(unsigned type, const uint8_t *body, size_t bytes, union wire_msg *out)
{
	struct decoder d = { .in = body, .left = bytes };

	memset(out, 0, sizeof(*out));
	switch (type) {
#define WIRE_MSG(NAME, number, name)           \
	case number:                           \
		decode_##name(&d, &out->name); \
		break;
#include "mesh/wire.def"
#undef WIRE_MSG
	default:
		return -EPROTO;
	}
	return d.bad || d.left ? -EPROTO : 0;
}

/* ------------------------------------------------------------------ header */

static uint64_t seal(const struct wire_header *h, const uint8_t *body)
{
	struct wire_header open = *h;

	open.hash = 0;
	return hash64(body, h->body_bytes, hash64(&open, sizeof(open), 0));
}

void wire_seal(struct wire_header *h, const uint8_t *body)
{
	h->hash = seal(h, body);
}

int wire_check_header(const struct wire_header *h, struct err *e)
{
	if (h->magic != WIRE_MAGIC)
		return err_set(e, -EPROTO, "not a shardmesh message");
	if (h->protocol != WIRE_PROTOCOL)
		return err_set(e, -EPROTO, "protocol %u, this program speaks protocol %u", h->protocol, WIRE_PROTOCOL);
	if (!wire_name(h->type))
		return err_set(e, -EPROTO, "unknown message type %u", h->type);
	if (h->body_bytes > WIRE_BODY_MAX)
		return err_set(e, -EPROTO, "%s with a body of %u bytes, at most %u are allowed", wire_name(h->type),
			       h->body_bytes, WIRE_BODY_MAX);
	if (h->zero != 0)
		return err_set(e, -EPROTO, "%s with a reserved field set", wire_name(h->type));
	return 0;
}

int wire_check(const struct wire_header *h, const uint8_t *body, struct err *e)
{
	int rc = wire_check_header(h, e);

	if (rc < 0)
		return rc;
	if (h->hash != seal(h, body))
		return err_set(e, -EPROTO, "%s with a wrong checksum", wire_name(h->type));
	return 0;
}
