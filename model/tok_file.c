/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Reads a tokenizer.json as Hugging Face's tokenizers write it. The file says by
 * name what is done to a text; a name that is not here is refused, since a text
 * that is tokenised nearly right is a fault that nobody sees.
 *
 * The vocabulary is byte-level: its texts are written in 256 printable
 * characters that stand for the bytes (Radford et al. 2019, encoder.py); all of
 * them must be tokens, so every text has tokens.
 */
#include "model/tokenizer.h"

#include <errno.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#define DEPTH_MAX 8
#define MERGES_MAX (1u << 24)

/* What ByteLevel cuts by, in tokenizers' pre_tokenizers/byte_level.rs. */
static const char gpt2_pattern[] = "'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

struct file {
	struct tokenizer *t;
	json_t *root, *vocab;
	bool *is_bytes; /* [size] the token's text is made of the 256 characters */
	uint64_t pool_bytes;
	bool byte_level; /* the pre-tokenizer's last step has been seen */
	struct err *e;
};

static int fail(const struct file *f, const char *fmt, ...) PRINTF_LIKE(2, 3);

static int fail(const struct file *f, const char *fmt, ...)
{
	char text[512];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	return err_set(f->e, -EINVAL, "%s: %s", f->t->name, text);
}

/* So that a compiler sees that what comes back is no success, and does not fear for outputs that are not written. */
#define fail(f, ...) (fail((f), __VA_ARGS__), -EINVAL)

static int no_memory(const struct file *f)
{
	return err_set(f->e, -ENOMEM, "%s: out of memory", f->t->name);
}

static const json_t *given(const json_t *o, const char *key)
{
	const json_t *v = json_object_get(o, key);

	return json_is_null(v) ? NULL : v;
}

/* The "type" of a part, "" where it has none. */
static const char *type_of(const json_t *o)
{
	const char *type = json_string_value(json_object_get(o, "type"));

	return type ? type : "";
}

static int not_supported(const struct file *f, const char *part, const json_t *o, const char *known)
{
	return fail(f, "%s \"%.60s\" is not supported; %s", part, type_of(o), known);
}

/* Absent: `otherwise`. */
static int read_flag(const struct file *f, const json_t *o, const char *key, bool otherwise, bool *out)
{
	const json_t *v = given(o, key);

	if (v && !json_is_boolean(v))
		return fail(f, "%s is neither true nor false", key);
	*out = v ? json_is_true(v) : otherwise;
	return 0;
}

/* ----------------------------------------------------------------- vocabulary */

/* The character at *p, and *p behind it; jansson has checked the UTF-8. */
static uint32_t next_code_point(const uint8_t **p)
{
	const uint8_t *s = *p;
	unsigned n = s[0] < 0x80 ? 1 : s[0] < 0xe0 ? 2 : s[0] < 0xf0 ? 3 : 4;
	uint32_t c = n == 1 ? s[0] : s[0] & (0xffu >> (n + 1));

	for (unsigned i = 1; i < n; i++)
		c = c << 6 | (s[i] & 63);
	*p = s + n;
	return c;
}

static bool stands_for_itself(uint32_t c)
{
	return (c >= '!' && c <= '~') || (c >= 0xa1 && c <= 0xac) || (c >= 0xae && c <= 0xff);
}

/* The byte that a character stands for, or -1. The others follow from 256 on, in their own order. */
static int byte_of(uint32_t c)
{
	uint32_t at = 256;

	if (c < 256)
		return stands_for_itself(c) ? (int)c : -1;
	for (uint32_t b = 0; b < 256; b++)
		if (!stands_for_itself(b) && at++ == c)
			return (int)b;
	return -1;
}

/* Writes the bytes that a text stands for; false, and the text as it is, when it is not made of them. */
static bool write_bytes(const char *text, size_t n, uint8_t *out, uint32_t *length)
{
	const uint8_t *p = (const uint8_t *)text, *end = p + n;
	uint32_t at = 0;

	while (p < end) {
		int b = byte_of(next_code_point(&p));

		if (b < 0) {
			memcpy(out, text, n);
			*length = (uint32_t)n;
			return false;
		}
		out[at++] = (uint8_t)b;
	}
	*length = at;
	return true;
}

/* The id in v, below TOKEN_ID_MAX, or -EINVAL. */
static int read_id(const struct file *f, const char *token, const json_t *v, uint32_t *out)
{
	if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) >= TOKEN_ID_MAX)
		return fail(f, "the id of token \"%.100s\" is not an integer from 0 to %u", token, TOKEN_ID_MAX - 1);
	*out = (uint32_t)json_integer_value(v);
	return 0;
}

/* How many ids there are, and bytes, over the vocabulary and the added tokens. */
static int measure(struct file *f)
{
	const json_t *added = json_object_get(f->root, "added_tokens"), *o;
	const char *token;
	json_t *v;
	uint32_t id;
	size_t i;
	int rc;

	json_object_foreach(f->vocab, token, v)
	{
		rc = read_id(f, token, v, &id);
		if (rc)
			return rc;
		f->t->size = id >= f->t->size ? id + 1 : f->t->size;
		f->pool_bytes += strlen(token);
	}
	json_array_foreach(added, i, o)
	{
		token = json_string_value(json_object_get(o, "content"));
		rc = token && token[0] ? read_id(f, token, json_object_get(o, "id"), &id)
				       : fail(f, "added token %zu has no content", i);
		if (rc)
			return rc;
		f->t->size = id >= f->t->size ? id + 1 : f->t->size;
		f->pool_bytes += json_string_length(json_object_get(o, "content"));
	}
	/* Offsets into the pool are 32 bits wide; the file's size is bounded far below. */
	return f->pool_bytes > INT32_MAX ? fail(f, "more than 2 GiB of tokens") : 0;
}

static int take_tables(struct file *f)
{
	struct tokenizer *t = f->t;

	t->pool = malloc(f->pool_bytes + 1);
	t->begin = calloc((size_t)t->size + 1, sizeof(*t->begin));
	t->length = calloc((size_t)t->size + 1, sizeof(*t->length));
	f->is_bytes = calloc((size_t)t->size + 1, sizeof(*f->is_bytes));
	return t->pool && t->begin && t->length && f->is_bytes ? 0 : no_memory(f);
}

static int read_vocabulary(struct file *f)
{
	struct tokenizer *t = f->t;
	uint32_t at = 0;
	const char *token;
	json_t *v;

	json_object_foreach(f->vocab, token, v)
	{
		uint32_t id = (uint32_t)json_integer_value(v);

		if (t->length[id])
			return fail(f, "two tokens have id %u", id);
		t->begin[id] = at;
		f->is_bytes[id] = write_bytes(token, strlen(token), t->pool + at, &t->length[id]);
		at += t->length[id];
		if (f->is_bytes[id] && t->length[id] == 1)
			t->bpe.byte_id[t->pool[t->begin[id]]] = id;
	}
	f->pool_bytes = at;
	return 0;
}

static int check_bytes(const struct file *f)
{
	const struct tokenizer *t = f->t;

	for (uint32_t b = 0; b < 256; b++) {
		uint32_t id = t->bpe.byte_id[b];

		if (id >= t->size || !f->is_bytes[id] || t->length[id] != 1 || t->pool[t->begin[id]] != b)
			return fail(f, "the vocabulary is not byte-level: it has no token for byte 0x%02x", b);
	}
	return 0;
}

/* --------------------------------------------------------------------- merges */

/* "left right", or ["left", "right"]: pointers into j, or into buf, of joined's size. */
static bool split_merge(const json_t *j, char *joined, size_t *left)
{
	const char *l = json_string_value(json_array_get(j, 0)), *r = json_string_value(json_array_get(j, 1));
	const char *both = json_string_value(j), *blank = both ? strchr(both, ' ') : NULL;

	if (l && r && json_array_size(j) == 2) {
		*left = strlen(l);
		memcpy(joined, l, *left);
		memcpy(joined + *left, r, strlen(r) + 1);
		return *left && r[0];
	}
	if (!blank || blank == both || !blank[1] || strchr(blank + 1, ' '))
		return false;
	*left = (size_t)(blank - both);
	memcpy(joined, both, *left);
	memcpy(joined + *left, blank + 1, strlen(blank + 1) + 1);
	return true;
}

static size_t merge_bytes(const json_t *j)
{
	return json_string_length(j) + json_string_length(json_array_get(j, 0)) +
	       json_string_length(json_array_get(j, 1)) + 1;
}

static bool find_in_vocabulary(const struct file *f, const char *text, size_t n, uint32_t *id)
{
	const json_t *v = json_object_getn(f->vocab, text, n);

	if (v)
		*id = (uint32_t)json_integer_value(v);
	return v != NULL;
}

static int read_merge(const struct file *f, const json_t *j, uint32_t rank)
{
	char *joined = malloc(merge_bytes(j));
	uint32_t left, right, both;
	size_t n;
	int rc = 0;

	if (!joined)
		return no_memory(f);
	if (!split_merge(j, joined, &n))
		rc = fail(f, "merge %u is no pair of tokens", rank);
	else if (!find_in_vocabulary(f, joined, n, &left) ||
		 !find_in_vocabulary(f, joined + n, strlen(joined + n), &right) ||
		 !find_in_vocabulary(f, joined, strlen(joined), &both))
		rc = fail(f, "merge %u: \"%.*s\", \"%.100s\" or both joined is not in the vocabulary", rank,
			  n < 100 ? (int)n : 100, joined, joined + n);
	else
		tok_bpe_add_merge(&f->t->bpe, left, right, rank, both);
	free(joined);
	return rc;
}

static int read_merges(const struct file *f, const json_t *list)
{
	const json_t *j;
	size_t i;
	int rc;

	if (!json_is_array(list) || json_array_size(list) > MERGES_MAX)
		return fail(f, "model.merges is not a list of at most %u", MERGES_MAX);
	if (tok_bpe_init(&f->t->bpe, json_array_size(list)))
		return no_memory(f);
	json_array_foreach(list, i, j)
	{
		rc = read_merge(f, j, (uint32_t)i);
		if (rc)
			return rc;
	}
	return 0;
}

/* ---------------------------------------------------------------------- model */

static int refuse_options(const struct file *f, const json_t *model)
{
	static const char *const affixes[] = { "continuing_subword_prefix", "end_of_word_suffix" };
	bool fallback;
	int rc = read_flag(f, model, "byte_fallback", false, &fallback);

	if (rc)
		return rc;
	if (fallback)
		return fail(f, "model.byte_fallback (SentencePiece) is not supported; only byte-level BPE is");
	if (given(model, "dropout") && json_number_value(given(model, "dropout")) != 0)
		return fail(f, "model.dropout is not supported: a text would have other tokens each time");
	for (size_t i = 0; i < ARRAY_LEN(affixes); i++)
		if (given(model, affixes[i]) && json_string_length(given(model, affixes[i])))
			return fail(f, "model.%s is not supported; only byte-level BPE is", affixes[i]);
	return 0;
}

static int read_model(struct file *f)
{
	const json_t *model = given(f->root, "model");
	bool words;
	int rc;

	/* GPT-2's own file is older than the type. */
	if (!json_is_object(model) || (type_of(model)[0] && strcmp(type_of(model), "BPE") != 0))
		return not_supported(f, "model", model, "only byte-level BPE is");
	f->vocab = json_object_get(model, "vocab");
	if (!json_is_object(f->vocab))
		return fail(f, "model.vocab is not an object of tokens and their ids");
	rc = refuse_options(f, model);
	if (!rc)
		rc = read_flag(f, model, "ignore_merges", false, &words);
	if (!rc)
		rc = measure(f);
	if (!rc)
		rc = take_tables(f);
	if (!rc)
		rc = read_vocabulary(f);
	if (!rc)
		rc = check_bytes(f);
	if (!rc)
		rc = read_merges(f, json_object_get(model, "merges"));
	if (!rc && words && tok_bpe_index_words(f->t, f->is_bytes))
		rc = no_memory(f);
	return rc;
}

/* --------------------------------------------------------------- added tokens */

/* The text that is looked for, malloced. */
static char *wanted_text(const struct file *f, const char *content, bool normalized)
{
	uint8_t *composed;
	size_t n;
	char *text;

	if (!normalized || !f->t->nfc)
		return strdup(content);
	if (tok_nfc((const uint8_t *)content, strlen(content), &composed, &n))
		return NULL;
	text = strndup((const char *)composed, n);
	free(composed);
	return text;
}

static int check_added(const struct file *f, const json_t *o, const char *content, uint32_t id)
{
	static const char *const flags[] = { "single_word", "lstrip", "rstrip" };
	const json_t *in_vocabulary = json_object_get(f->vocab, content);
	bool on;

	for (size_t i = 0; i < ARRAY_LEN(flags); i++) {
		int rc = read_flag(f, o, flags[i], false, &on);

		if (rc)
			return rc;
		if (on)
			return fail(f, "added token \"%.100s\": %s is not supported", content, flags[i]);
	}
	if (in_vocabulary ? json_integer_value(in_vocabulary) != id : f->t->length[id] != 0)
		return fail(f, "added token \"%.100s\": id %u is another one's in the vocabulary", content, id);
	return 0;
}

static int read_added_token(struct file *f, const json_t *o)
{
	const char *content = json_string_value(json_object_get(o, "content"));
	uint32_t id = (uint32_t)json_integer_value(json_object_get(o, "id"));
	struct tok_added *a = &f->t->added[f->t->n_added];
	int rc = check_added(f, o, content, id);

	if (!rc)
		rc = read_flag(f, o, "normalized", true, &a->normalized);
	if (rc)
		return rc;
	a->id = id;
	a->text = wanted_text(f, content, a->normalized);
	if (!a->text)
		return no_memory(f);
	a->bytes = (uint32_t)strlen(a->text);
	f->t->n_added++;
	/* It stands for its text, also where the vocabulary has it in the 256 characters. */
	f->t->begin[id] = (uint32_t)f->pool_bytes;
	f->t->length[id] = (uint32_t)strlen(content);
	memcpy(f->t->pool + f->pool_bytes, content, f->t->length[id]);
	f->pool_bytes += f->t->length[id];
	return 0;
}

static int read_added(struct file *f)
{
	const json_t *list = given(f->root, "added_tokens"), *o;
	size_t i;
	int rc;

	if (list && !json_is_array(list))
		return fail(f, "added_tokens is not a list");
	f->t->added = calloc(json_array_size(list) + 1, sizeof(*f->t->added));
	if (!f->t->added)
		return no_memory(f);
	json_array_foreach(list, i, o)
	{
		rc = read_added_token(f, o);
		if (rc)
			return rc;
	}
	tok_added_sort(f->t);
	return 0;
}

/* ------------------------------------------------------ normalizer, pre-tokenizer */

static int read_normalizer(struct file *f, const json_t *o, int depth)
{
	const json_t *list, *member;
	size_t i;
	int rc = 0;

	if (!o)
		return 0;
	if (!strcmp(type_of(o), "NFC")) {
		f->t->nfc = true;
		return 0;
	}
	if (strcmp(type_of(o), "Sequence") != 0 || depth == DEPTH_MAX)
		return not_supported(f, "normalizer", o, "only NFC or none is");
	list = json_object_get(o, "normalizers");
	json_array_foreach(list, i, member)
	{
		if (!rc)
			rc = read_normalizer(f, member, depth + 1);
	}
	return rc;
}

static int add_stage(const struct file *f, const char *pattern, size_t n, bool literal, bool drop_gaps)
{
	struct err why = { 0 };
	int rc = tok_stage_add(f->t, pattern, n, literal, drop_gaps, &why);

	return rc ? err_set(f->e, rc, "%s: pre_tokenizer: \"%.100s\": %s", f->t->name, pattern, why.text) : 0;
}

static int read_byte_level(struct file *f, const json_t *o)
{
	bool prefix, use_regex;
	int rc = read_flag(f, o, "add_prefix_space", true, &prefix);

	if (!rc)
		rc = read_flag(f, o, "use_regex", true, &use_regex);
	if (rc)
		return rc;
	f->byte_level = true;
	if (prefix && f->t->n_stages == TOK_STAGES_MAX)
		return fail(f, "pre_tokenizer: more than %d steps", TOK_STAGES_MAX);
	if (prefix)
		f->t->stage[f->t->n_stages++] = (struct tok_stage){ .prefix_space = true };
	return use_regex ? add_stage(f, gpt2_pattern, strlen(gpt2_pattern), false, false) : 0;
}

static int read_split(struct file *f, const json_t *o)
{
	const json_t *pattern = json_object_get(o, "pattern"), *regex = json_object_get(pattern, "Regex");
	const json_t *v = regex ? regex : json_object_get(pattern, "String");
	const char *behavior = json_string_value(json_object_get(o, "behavior"));
	bool invert, removed = behavior && !strcmp(behavior, "Removed");
	int rc = read_flag(f, o, "invert", false, &invert);

	if (rc)
		return rc;
	if (!json_string_length(v))
		return fail(f, "pre_tokenizer Split: no pattern");
	/* What is removed where matches are, is what is kept where they are not. */
	if (!(removed && invert) && !(behavior && !strcmp(behavior, "Isolated")))
		return fail(f, "pre_tokenizer Split: behavior \"%.40s\"%s is not supported; \"Isolated\" is",
			    behavior ? behavior : "", invert ? " with invert" : "");
	return add_stage(f, json_string_value(v), json_string_length(v), !regex, removed);
}

static int read_digits(struct file *f, const json_t *o)
{
	bool individual;
	int rc = read_flag(f, o, "individual_digits", false, &individual);

	return rc ? rc : add_stage(f, individual ? "\\p{N}" : "\\p{N}+", individual ? 5 : 6, false, false);
}

static int read_pre_tokenizer(struct file *f, const json_t *o, int depth)
{
	const json_t *list = json_object_get(o, "pretokenizers"), *member;
	const char *type = type_of(o);
	size_t i;
	int rc = 0;

	if (f->byte_level)
		return fail(f, "pre_tokenizer \"%.60s\" behind ByteLevel is not supported", type);
	if (!strcmp(type, "ByteLevel"))
		return read_byte_level(f, o);
	if (!strcmp(type, "Split"))
		return read_split(f, o);
	if (!strcmp(type, "Digits"))
		return read_digits(f, o);
	if (strcmp(type, "Sequence") != 0 || depth == DEPTH_MAX)
		return not_supported(f, "pre_tokenizer", o, "ByteLevel, Split, Digits and Sequence are");
	json_array_foreach(list, i, member)
	{
		if (!rc)
			rc = read_pre_tokenizer(f, member, depth + 1);
	}
	return rc;
}

/* ------------------------------------------------------- post-processor, decoder */

static int add_template_ids(const struct file *f, const json_t *o, const char *name, uint32_t *out, uint32_t *n)
{
	const json_t *special = json_object_get(json_object_get(o, "special_tokens"), name), *v;
	size_t i;
	int rc = json_array_size(json_object_get(special, "ids"))
			 ? 0
			 : fail(f, "post_processor: \"%.60s\" has no ids", name);

	json_array_foreach(json_object_get(special, "ids"), i, v)
	{
		if (!rc && *n == TOK_TEMPLATE_MAX)
			rc = fail(f, "post_processor: more than %d tokens around a text", TOK_TEMPLATE_MAX);
		if (!rc)
			rc = read_id(f, name, v, &out[*n]);
		if (!rc && (out[*n] >= f->t->size || !f->t->length[out[*n]]))
			rc = fail(f, "post_processor: \"%.60s\": there is no token %u", name, out[*n]);
		if (!rc)
			++*n;
	}
	return rc;
}

static int read_template(struct file *f, const json_t *o)
{
	const json_t *member;
	bool behind = false;
	size_t i;
	int rc;

	json_array_foreach(json_object_get(o, "single"), i, member)
	{
		const char *special = json_string_value(json_object_get(json_object_get(member, "SpecialToken"), "id"));

		if (!special && behind)
			return fail(f, "post_processor: the text stands in the template twice");
		if (!special) {
			behind = true;
			continue;
		}
		rc = add_template_ids(f, o, special, behind ? f->t->suffix : f->t->prefix,
				      behind ? &f->t->n_suffix : &f->t->n_prefix);
		if (rc)
			return rc;
	}
	return behind ? 0 : fail(f, "post_processor: the template has no place for the text");
}

static int read_post_processor(struct file *f, const json_t *o, int depth)
{
	const json_t *member;
	size_t i;
	int rc = 0;

	/* ByteLevel's changes where a token says it stood, which nobody asks here. */
	if (!o || !strcmp(type_of(o), "ByteLevel"))
		return 0;
	if (!strcmp(type_of(o), "TemplateProcessing") && !f->t->n_prefix && !f->t->n_suffix)
		return read_template(f, o);
	if (strcmp(type_of(o), "Sequence") != 0 || depth == DEPTH_MAX)
		return not_supported(f, "post_processor", o, "ByteLevel and one TemplateProcessing are");
	json_array_foreach(json_object_get(o, "processors"), i, member)
	{
		if (!rc)
			rc = read_post_processor(f, member, depth + 1);
	}
	return rc;
}

static int read_parts(struct file *f)
{
	const json_t *decoder = given(f->root, "decoder");
	int rc = read_normalizer(f, given(f->root, "normalizer"), 0);

	if (!rc)
		rc = read_pre_tokenizer(f, given(f->root, "pre_tokenizer"), 0);
	if (!rc && !f->byte_level)
		rc = fail(f, "pre_tokenizer has no ByteLevel; only byte-level BPE is supported");
	if (!rc && decoder && strcmp(type_of(decoder), "ByteLevel") != 0)
		rc = not_supported(f, "decoder", decoder, "only ByteLevel is");
	if (!rc)
		rc = read_added(f);
	return rc ? rc : read_post_processor(f, given(f->root, "post_processor"), 0);
}

int tok_file_read(struct tokenizer *t, const char *text, size_t bytes, struct err *e)
{
	struct file f = { .t = t, .e = e };
	json_error_t je;
	int rc;

	f.root = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &je);
	if (!f.root)
		return err_set(e, -EINVAL, "%s:%d: %s", t->name, je.line > 0 ? je.line : 1, je.text);
	rc = json_is_object(f.root) ? read_model(&f) : fail(&f, "not a tokenizer.json: expected an object");
	if (!rc)
		rc = read_parts(&f);
	json_decref(f.root);
	free(f.is_bytes);
	return rc;
}
