/* SPDX-License-Identifier: Apache-2.0 */
#include "mesh/mesh.h"

#include <ctype.h>
#include <errno.h>
#include <openssl/crypto.h>
#include <openssl/rand.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define TOKEN_MIN 16
#define TOKEN_RANDOM 32

/* Editors and `echo` leave a newline behind the token; it is not part of it. */
static int take(const char *text, size_t bytes, const char *from, struct job_token *out, struct err *e)
{
	while (bytes > 0 && isspace((unsigned char)text[bytes - 1]))
		bytes--;
	if (bytes < TOKEN_MIN || bytes > sizeof(out->data))
		return err_set(e, -EINVAL, "%s: a job token has %d to %zu bytes, this one has %zu", from, TOKEN_MIN,
			       sizeof(out->data), bytes);
	memset(out, 0, sizeof(*out));
	memcpy(out->data, text, bytes);
	out->bytes = (uint32_t)bytes;
	return 0;
}

static int load_file(const char *path, struct job_token *out, struct err *e)
{
	struct stat st;
	char *text;
	size_t bytes;
	int rc;

	if (stat(path, &st) < 0)
		return err_set(e, -errno, "token file %s: %s", path, strerror(errno));
	if (st.st_mode & S_IRWXO)
		return err_set(e, -EINVAL, "token file %s: others can use it (mode %03o): chmod o-rwx %s", path,
			       st.st_mode & 0777, path);
	rc = file_read(path, 4096, &text, &bytes, e);
	if (rc < 0)
		return err_prefix(e, "token file");
	rc = take(text, bytes, path, out, e);
	OPENSSL_cleanse(text, bytes);
	free(text);
	return rc;
}

int token_load(const char *file, struct job_token *out, struct err *e)
{
	const char *text = getenv("SHARDMESH_TOKEN");

	if (!file)
		file = getenv("SHARDMESH_TOKEN_FILE");
	if (file && *file)
		return load_file(file, out, e);
	if (text && *text)
		return take(text, strlen(text), "SHARDMESH_TOKEN", out, e);
	return err_set(e, -EINVAL, "no job token: give --token-file, or set SHARDMESH_TOKEN_FILE or SHARDMESH_TOKEN");
}

int token_create(const char *path, struct err *e)
{
	uint8_t random[TOKEN_RANDOM];
	char hex[2 * TOKEN_RANDOM + 2];
	int rc;

	if (RAND_bytes(random, sizeof(random)) != 1)
		return err_set(e, -EIO, "token file %s: no random bytes", path);
	for (size_t i = 0; i < sizeof(random); i++)
		snprintf(hex + 2 * i, 3, "%02x", random[i]);
	hex[2 * TOKEN_RANDOM] = '\n';
	rc = file_write_atomic(path, hex, 2 * TOKEN_RANDOM + 1, 0600, e);
	OPENSSL_cleanse(random, sizeof(random));
	OPENSSL_cleanse(hex, sizeof(hex));
	return rc < 0 ? err_prefix(e, "token file") : 0;
}
