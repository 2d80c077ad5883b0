/* SPDX-License-Identifier: Apache-2.0 */
#include "model/tokenizer.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

int token_list_grow(struct token_list *l, size_t n)
{
	size_t room = l->room ? l->room : 256;
	uint32_t *more;

	if (l->room - l->n >= n)
		return 0;
	while (room - l->n < n)
		room += room / 2;
	more = realloc(l->id, room * sizeof(*more));
	if (!more)
		return -ENOMEM;
	l->id = more;
	l->room = room;
	return 0;
}

void token_list_release(struct token_list *l)
{
	free(l->id);
	*l = (struct token_list){ 0 };
}

int tokenizer_parse(const char *text, size_t bytes, const char *name, struct tokenizer **out, struct err *e)
{
	struct tokenizer *t = calloc(1, sizeof(*t));
	int rc;

	if (t)
		t->name = strdup(name);
	if (!t || !t->name || tok_split_init(t)) {
		tokenizer_free(t);
		return err_set(e, -ENOMEM, "%s: out of memory", name);
	}
	rc = tok_file_read(t, text, bytes, e);
	if (rc)
		tokenizer_free(t);
	else
		*out = t;
	return rc;
}

int tokenizer_path(const char *path, char **out, struct err *e)
{
	struct stat st;

	if (stat(path, &st))
		return err_set(e, -errno, "%s: %s", path, strerror(errno));
	if (asprintf(out, "%s%s", path, S_ISDIR(st.st_mode) ? "/tokenizer.json" : "") < 0)
		return err_set(e, -ENOMEM, "%s: out of memory", path);
	return 0;
}

int tokenizer_open(const char *path, struct tokenizer **out, struct err *e)
{
	char *file, *text;
	size_t bytes;
	int rc = tokenizer_path(path, &file, e);

	if (rc)
		return rc;
	rc = file_read(file, TOKENIZER_BYTES_MAX, &text, &bytes, e);
	if (!rc) {
		rc = tokenizer_parse(text, bytes, file, out, e);
		free(text);
	}
	free(file);
	return rc;
}

void tokenizer_free(struct tokenizer *t)
{
	if (!t)
		return;
	for (uint32_t i = 0; i < t->n_added; i++)
		free(t->added[i].text);
	for (uint32_t i = 0; i < t->n_stages; i++) {
		pcre2_code_free(t->stage[i].re);
		pcre2_match_data_free(t->match[i]);
	}
	pcre2_match_context_free(t->match_context);
	pcre2_jit_stack_free(t->jit_stack);
	tok_bpe_release(&t->bpe);
	free(t->added);
	free(t->pool);
	free(t->begin);
	free(t->length);
	free(t->name);
	free(t);
}

uint32_t tokenizer_size(const struct tokenizer *t)
{
	return t->size;
}

uint32_t tokenizer_find(const struct tokenizer *t, const char *content)
{
	size_t n = strlen(content);

	for (uint32_t i = 0; i < t->n_added; i++) {
		uint32_t id = t->added[i].id;

		if (t->length[id] == n && !memcmp(t->pool + t->begin[id], content, n))
			return id;
	}
	return TOKENIZER_NONE;
}

const uint8_t *tokenizer_bytes(const struct tokenizer *t, uint32_t id, size_t *n)
{
	*n = id < t->size ? t->length[id] : 0;
	return *n ? t->pool + t->begin[id] : NULL;
}

const uint32_t *tokenizer_prefix(const struct tokenizer *t, size_t *n)
{
	*n = t->n_prefix;
	return t->prefix;
}

const uint32_t *tokenizer_suffix(const struct tokenizer *t, size_t *n)
{
	*n = t->n_suffix;
	return t->suffix;
}
