/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Mutual proof that both ends of a connection know the job token.
 *
 *   connecting -> HELLO{nonce c}      accepting -> CHALLENGE{nonce a, proof a}
 *   connecting -> RESPONSE{proof c}   accepting -> ACCEPTED
 *
 * A proof is HMAC-SHA256 under the token over a label, both nonces, the
 * protocol, both roles, both member ids and the job's name. The labels of the
 * two sides differ, so a proof cannot be sent back to whoever made it; both
 * nonces are in it, so an old one is worth nothing; roles, ids and job are in
 * it, so none of them can be changed on the way. The accepting side proves
 * itself first: a member tells a stranger nothing that helps against the token,
 * since 256 bits of HMAC over its own fresh nonce are all it ever sends.
 *
 * What this does not do: encrypt, or authenticate what follows. Someone who can
 * rewrite packets between two members can still rewrite them; the network
 * between members is meant to be the cluster's own.
 */
#include "mesh/auth.h"

#include <errno.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <openssl/rand.h>
#include <string.h>

static const char *const label[] = {
	[AUTH_CONNECT] = "shardmesh 1 connect",
	[AUTH_ACCEPT] = "shardmesh 1 accept",
};

/* Every field has a fixed length or its length before it: no two transcripts have the same bytes. */
#define TRANSCRIPT_MAX 256
struct transcript_bytes {
	uint8_t data[TRANSCRIPT_MAX];
	size_t n;
};

static void add(struct transcript_bytes *b, const void *data, size_t bytes)
{
	memcpy(b->data + b->n, data, bytes);
	b->n += bytes;
}

static void add_str(struct transcript_bytes *b, const char *s)
{
	uint32_t n = (uint32_t)strlen(s);

	add(b, &n, sizeof(n));
	add(b, s, n);
}

int auth_nonce(uint8_t out[AUTH_BYTES])
{
	return RAND_bytes(out, AUTH_BYTES) == 1 ? 0 : -EIO;
}

int auth_proof(const struct job_token *token, enum auth_side side, const struct auth_transcript *t,
	       uint8_t out[AUTH_BYTES])
{
	struct transcript_bytes b = { .n = 0 };
	unsigned n = AUTH_BYTES;

	_Static_assert(TRANSCRIPT_MAX >= 4 + 24 + 2 * AUTH_BYTES + 5 * 4 + 4 + sizeof(((struct mesh_self *)0)->job),
		       "label, nonces, numbers and job fit");
	add_str(&b, label[side]);
	add(&b, t->connect_nonce, AUTH_BYTES);
	add(&b, t->accept_nonce, AUTH_BYTES);
	add(&b, &t->protocol, sizeof(t->protocol));
	add(&b, &t->connect_role, sizeof(t->connect_role));
	add(&b, &t->connect_member, sizeof(t->connect_member));
	add(&b, &t->accept_role, sizeof(t->accept_role));
	add(&b, &t->accept_member, sizeof(t->accept_member));
	add_str(&b, t->job);
	if (!HMAC(EVP_sha256(), token->data, (int)token->bytes, b.data, b.n, out, &n) || n != AUTH_BYTES)
		return -EIO;
	return 0;
}

bool auth_equal(const uint8_t a[AUTH_BYTES], const uint8_t b[AUTH_BYTES])
{
	return CRYPTO_memcmp(a, b, AUTH_BYTES) == 0;
}
