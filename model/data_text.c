/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Text as a tokenizer makes it into ids. A document is closed by what the
 * tokenizer's template puts behind a text, and by the end token that the config
 * names; by the model's eos_token_id where neither is there.
 */
#include "model/data_source.h"
#include "model/tokenizer.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

static_assert(ARRAY_LEN(((struct data_text *)0)->closing) > TOK_TEMPLATE_MAX, "a template and an end token fit");

bool data_config_packed(const struct data_config *c)
{
	bool packed = false;

	for (uint32_t i = 0; i < c->n_train; i++)
		packed |= c->train[i].format == DATA_JSONL;
	for (uint32_t i = 0; i < c->n_validation; i++)
		packed |= c->validation[i].format == DATA_JSONL;
	return packed;
}

static int check_id(const struct data_text *x, uint32_t id, struct err *e)
{
	const uint8_t *text;
	size_t n;

	if (id < x->vocab)
		return 0;
	text = tokenizer_bytes(x->tokenizer, id, &n);
	return err_set(e, -EINVAL, "the tokenizer's token %u (\"%.*s\") is beyond the model's vocab_size %u", id,
		       n < 40 ? (int)n : 40, text ? (const char *)text : "", x->vocab);
}

static int close_with(struct data_text *x, const struct data_config *c, struct err *e)
{
	uint32_t end = x->n_closing ? TOKENIZER_NONE : c->eos_token;

	if (c->end_token) {
		end = tokenizer_find(x->tokenizer, c->end_token);
		if (end == TOKENIZER_NONE)
			return err_set(e, -EINVAL, "%s: end_token \"%s\" is none of its added tokens", c->tokenizer,
				       c->end_token);
	} else if (end == TOKENIZER_NONE && !x->n_closing && data_config_packed(c)) {
		return err_set(e, -EINVAL,
			       "%s: nothing says which token ends a document: give end_token, or eos_token_id in the "
			       "model's config.json",
			       c->tokenizer);
	}
	if (end != TOKENIZER_NONE && (!x->n_closing || x->closing[x->n_closing - 1] != end))
		x->closing[x->n_closing++] = end;
	return 0;
}

int data_text_open(struct data_text *x, const struct data_config *c, struct err *e)
{
	const uint32_t *id;
	size_t n;
	int rc;

	if (!c->tokenizer)
		return 0;
	rc = tokenizer_open(c->tokenizer, &x->tokenizer, e);
	if (rc)
		return rc;
	id = tokenizer_suffix(x->tokenizer, &n);
	memcpy(x->closing, id, n * sizeof(*id));
	x->n_closing = (uint32_t)n;
	rc = close_with(x, c, e);
	for (uint32_t i = 0; i < x->n_closing && !rc; i++)
		rc = check_id(x, x->closing[i], e);
	id = tokenizer_prefix(x->tokenizer, &n);
	for (size_t i = 0; i < n && !rc; i++)
		rc = check_id(x, id[i], e);
	return rc;
}

int data_encode(const struct data_text *x, const void *text, size_t n, struct token_list *out, struct err *e)
{
	size_t first = out->n;
	int rc = tokenizer_encode(x->tokenizer, text, n, out, e);

	for (size_t i = first; i < out->n && !rc; i++)
		rc = check_id(x, out->id[i], e);
	return rc;
}
