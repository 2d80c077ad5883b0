/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A JSON reader for lines of training data (RFC 8259). The library that reads
 * configs builds a tree a line, and data have millions of them; here a line is
 * checked in one pass and its strings are found where they stand, so that the
 * step path can decode them again from the mapped file.
 */
#include "model/jsonl.h"

#include <errno.h>
#include <string.h>

#define DEPTH_MAX 64

struct cursor {
	const uint8_t *begin, *p, *end;
	char *why;
};

static int fail(const struct cursor *c, const char *what)
{
	snprintf(c->why, JSONL_WHY, "%s at byte %zu of the line", what, (size_t)(c->p - c->begin) + 1);
	return -EINVAL;
}

static void skip_blank(struct cursor *c)
{
	while (c->p < c->end && (*c->p == ' ' || *c->p == '\t' || *c->p == '\r' || *c->p == '\n'))
		c->p++;
}

static bool take(struct cursor *c, char wanted)
{
	if (c->p == c->end || *c->p != (uint8_t)wanted)
		return false;
	c->p++;
	return true;
}

/* -------------------------------------------------------------------- strings */

static int hex_value(uint8_t c)
{
	if (c >= '0' && c <= '9')
		return c - '0';
	c |= 32;
	return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* Four hexadecimal digits, or -1. */
static int32_t read_hex(const uint8_t *p, const uint8_t *end)
{
	int32_t v = 0;

	for (int i = 0; i < 4; i++) {
		int digit = p + i < end ? hex_value(p[i]) : -1;

		if (digit < 0)
			return -1;
		v = v << 4 | digit;
	}
	return v;
}

unsigned jsonl_utf8_length(const uint8_t *p, const uint8_t *end)
{
	uint8_t low = 0x80, high = 0xbf;
	unsigned n = p[0] < 0xc2 ? 0 : p[0] < 0xe0 ? 2 : p[0] < 0xf0 ? 3 : p[0] < 0xf5 ? 4 : 0;

	if (!n || (size_t)(end - p) < n)
		return 0;
	if (p[0] == 0xe0)
		low = 0xa0;
	else if (p[0] == 0xed)
		high = 0x9f;
	else if (p[0] == 0xf0)
		low = 0x90;
	else if (p[0] == 0xf4)
		high = 0x8f;
	if (p[1] < low || p[1] > high)
		return 0;
	for (unsigned i = 2; i < n; i++)
		if ((p[i] & 0xc0) != 0x80)
			return 0;
	return n;
}

static unsigned utf8_encode(uint32_t v, uint8_t out[4])
{
	if (v < 0x80) {
		out[0] = (uint8_t)v;
		return 1;
	}
	if (v < 0x800) {
		out[0] = (uint8_t)(0xc0 | v >> 6);
		out[1] = (uint8_t)(0x80 | (v & 63));
		return 2;
	}
	if (v < 0x10000) {
		out[0] = (uint8_t)(0xe0 | v >> 12);
		out[1] = (uint8_t)(0x80 | (v >> 6 & 63));
		out[2] = (uint8_t)(0x80 | (v & 63));
		return 3;
	}
	out[0] = (uint8_t)(0xf0 | v >> 18);
	out[1] = (uint8_t)(0x80 | (v >> 12 & 63));
	out[2] = (uint8_t)(0x80 | (v >> 6 & 63));
	out[3] = (uint8_t)(0x80 | (v & 63));
	return 4;
}

/* p: behind "\u". The character, *used digits and all: 4 or 10; or -1. */
static int32_t read_unicode(const uint8_t *p, const uint8_t *end, unsigned *used)
{
	int32_t v = read_hex(p, end), low;

	*used = 4;
	if (v < 0xd800 || v > 0xdfff)
		return v;
	if (v > 0xdbff || end - p < 10 || p[4] != '\\' || p[5] != 'u')
		return -1;
	low = read_hex(p + 6, end);
	if (low < 0xdc00 || low > 0xdfff)
		return -1;
	*used = 10;
	return 0x10000 + ((v - 0xd800) << 10) + (low - 0xdc00);
}

static const char escape_letters[] = "\"\\/bfnrt";
static const char escape_values[] = "\"\\/\b\f\n\r\t";

/* At a backslash; counts what it stands for. */
static int check_escape(struct cursor *c, uint64_t *bytes)
{
	uint8_t out[4];
	unsigned used;
	int32_t v;

	if (c->end - c->p >= 2 && c->p[1] && strchr(escape_letters, c->p[1])) {
		c->p += 2;
		++*bytes;
		return 0;
	}
	if (c->end - c->p < 2 || c->p[1] != 'u')
		return fail(c, "an unknown escape");
	v = read_unicode(c->p + 2, c->end, &used);
	if (v < 0)
		return fail(c, "a \\u escape that is no character");
	c->p += 2 + used;
	*bytes += utf8_encode((uint32_t)v, out);
	return 0;
}

static int check_string(struct cursor *c, struct jsonl_string *out)
{
	struct jsonl_string s;
	int rc = 0;

	if (!take(c, '"'))
		return fail(c, "a string was expected");
	s = (struct jsonl_string){ .raw = c->p };
	while (c->p < c->end && *c->p != '"') {
		unsigned n = 1;

		if (*c->p == '\\') {
			rc = check_escape(c, &s.bytes);
			if (rc)
				return rc;
			continue;
		}
		if (*c->p < 0x20)
			return fail(c, "a control character in a string");
		if (*c->p >= 0x80)
			n = jsonl_utf8_length(c->p, c->end);
		if (!n)
			return fail(c, "a byte that is not UTF-8");
		c->p += n;
		s.bytes += n;
	}
	if (!take(c, '"'))
		return fail(c, "a string without end");
	*out = s;
	return 0;
}

unsigned jsonl_next(const uint8_t **p, uint8_t out[4])
{
	const uint8_t *s = *p;
	unsigned n = 1, used;

	if (*s == '"')
		return 0;
	if (*s == '\\' && s[1] == 'u') {
		/* The string was checked, so the digits are there. */
		n = utf8_encode((uint32_t)read_unicode(s + 2, s + 12, &used), out);
		*p = s + 2 + used;
		return n;
	}
	if (*s == '\\') {
		out[0] = (uint8_t)escape_values[strchr(escape_letters, s[1]) - escape_letters];
		*p = s + 2;
		return 1;
	}
	if (*s >= 0x80)
		n = *s < 0xe0 ? 2 : *s < 0xf0 ? 3 : 4;
	memcpy(out, s, n);
	*p = s + n;
	return n;
}

static bool string_is(const struct jsonl_string *s, const char *word)
{
	const uint8_t *p = s->raw;
	uint8_t c[4];

	if (s->bytes != strlen(word))
		return false;
	for (; *word; word++)
		if (jsonl_next(&p, c) != 1 || c[0] != (uint8_t)*word)
			return false;
	return true;
}

/* --------------------------------------------------------------------- values */

static bool take_digits(struct cursor *c)
{
	const uint8_t *begin = c->p;

	while (c->p < c->end && *c->p >= '0' && *c->p <= '9')
		c->p++;
	return c->p > begin;
}

static int skip_number(struct cursor *c)
{
	bool good;

	take(c, '-');
	good = take(c, '0') || take_digits(c);
	if (good && take(c, '.'))
		good = take_digits(c);
	if (good && (take(c, 'e') || take(c, 'E'))) {
		if (!take(c, '+'))
			take(c, '-');
		good = take_digits(c);
	}
	return good ? 0 : fail(c, "a value was expected");
}

static bool take_word(struct cursor *c, const char *word)
{
	size_t n = strlen(word);

	if ((size_t)(c->end - c->p) < n || memcmp(c->p, word, n))
		return false;
	c->p += n;
	return true;
}

static int skip_value(struct cursor *c, unsigned depth);

static int skip_members(struct cursor *c, unsigned depth, bool object)
{
	char close = object ? '}' : ']';
	struct jsonl_string key;
	int rc;

	c->p++;
	skip_blank(c);
	if (take(c, close))
		return 0;
	do {
		skip_blank(c);
		rc = object ? check_string(c, &key) : 0;
		skip_blank(c);
		if (!rc && object && !take(c, ':'))
			rc = fail(c, "a colon was expected");
		if (!rc)
			rc = skip_value(c, depth + 1);
		if (rc)
			return rc;
		skip_blank(c);
	} while (take(c, ','));
	return take(c, close) ? 0 : fail(c, object ? "a comma or } was expected" : "a comma or ] was expected");
}

static int skip_value(struct cursor *c, unsigned depth)
{
	struct jsonl_string s;

	if (depth > DEPTH_MAX)
		return fail(c, "values too deep in each other");
	skip_blank(c);
	if (c->p == c->end)
		return fail(c, "a value was expected");
	if (*c->p == '"')
		return check_string(c, &s);
	if (*c->p == '{' || *c->p == '[')
		return skip_members(c, depth, *c->p == '{');
	if (take_word(c, "true") || take_word(c, "false") || take_word(c, "null"))
		return 0;
	return skip_number(c);
}

/* ----------------------------------------------------------------------- line */

static const char *const words[] = { "text", "prompt", "completion" };
struct found {
	struct jsonl_string s[ARRAY_LEN(words)];
	bool is[ARRAY_LEN(words)];
};

static int read_member(struct cursor *c, struct found *f)
{
	struct jsonl_string key;
	size_t i = 0;
	int rc = check_string(c, &key);

	if (rc)
		return rc;
	skip_blank(c);
	if (!take(c, ':'))
		return fail(c, "a colon was expected");
	skip_blank(c);
	while (i < ARRAY_LEN(words) && !string_is(&key, words[i]))
		i++;
	if (i == ARRAY_LEN(words))
		return skip_value(c, 1);
	if (f->is[i] || c->p == c->end || *c->p != '"') {
		snprintf(c->why, JSONL_WHY, f->is[i] ? "\"%s\" is given twice" : "\"%s\" is not a string", words[i]);
		return -EINVAL;
	}
	f->is[i] = true;
	return check_string(c, &f->s[i]);
}

static int read_object(struct cursor *c, struct found *f)
{
	int rc;

	if (!take(c, '{'))
		return fail(c, "an object was expected");
	skip_blank(c);
	if (take(c, '}'))
		return 0;
	do {
		skip_blank(c);
		rc = read_member(c, f);
		if (rc)
			return rc;
		skip_blank(c);
	} while (take(c, ','));
	return take(c, '}') ? 0 : fail(c, "a comma or } was expected");
}

int jsonl_parse(const uint8_t *line, size_t n, struct jsonl_line *out, char why[JSONL_WHY])
{
	struct cursor c = { line, line, line, why };
	struct found f = { 0 };
	int rc;

	if (!n)
		return 1;
	c.end += n;
	skip_blank(&c);
	if (c.p == c.end)
		return 1;
	rc = read_object(&c, &f);
	skip_blank(&c);
	if (!rc && c.p < c.end)
		rc = fail(&c, "something behind the object");
	if (rc)
		return rc;
	if (f.is[0] == (f.is[1] || f.is[2]) || f.is[1] != f.is[2]) {
		snprintf(why, JSONL_WHY, "expected {\"text\"} or {\"prompt\", \"completion\"}");
		return -EINVAL;
	}
	*out = (struct jsonl_line){ .pair = f.is[1], .prompt = f.s[1], .text = f.is[0] ? f.s[0] : f.s[2] };
	return 0;
}
