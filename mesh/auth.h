/* SPDX-License-Identifier: Apache-2.0 */
#ifndef SHARDMESH_MESH_AUTH_H
#define SHARDMESH_MESH_AUTH_H

#include "mesh/mesh.h"

#define AUTH_BYTES 32

/* What both sides prove that they saw, and the same way round. */
struct auth_transcript {
	uint8_t connect_nonce[AUTH_BYTES], accept_nonce[AUTH_BYTES];
	uint32_t protocol;
	uint32_t connect_role, connect_member;
	uint32_t accept_role, accept_member;
	const char *job;
};

enum auth_side { AUTH_CONNECT, AUTH_ACCEPT };

/* Random bytes that were never used before. -EIO. */
int auth_nonce(uint8_t out[AUTH_BYTES]);
/* The proof that `side` sends. -EIO. */
int auth_proof(const struct job_token *token, enum auth_side side, const struct auth_transcript *t,
	       uint8_t out[AUTH_BYTES]);
/* Takes the same time wherever they differ. */
bool auth_equal(const uint8_t a[AUTH_BYTES], const uint8_t b[AUTH_BYTES]);

#endif
