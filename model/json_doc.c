/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The tolerant front of jansson. DeepSpeed reads its configs with hjson, so
 * that real ones hold comments and trailing commas; json.dumps writes a bare
 * Infinity. Both are taken out before jansson, which stays strict, sees the
 * text. Nothing that is taken out removes a newline, so jansson's line numbers
 * and ours are the file's.
 */
#include "model/json_doc.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

struct front {
	const char *in;
	char *out;
	char *comma; /* in out: a comma that nothing but blanks has followed, or NULL */
	char before; /* the last character that is not blank */
	unsigned line;
};

static void emit(struct front *f, char c)
{
	*f->out++ = c;
}

static void copy_string(struct front *f)
{
	emit(f, *f->in++);
	while (*f->in && *f->in != '"' && *f->in != '\n') {
		if (*f->in == '\\' && f->in[1] && f->in[1] != '\n')
			emit(f, *f->in++);
		emit(f, *f->in++);
	}
	if (*f->in == '"')
		emit(f, *f->in++);
}

static void skip_line_comment(struct front *f)
{
	while (*f->in && *f->in != '\n')
		f->in++;
}

/* False when the comment does not end. */
static bool skip_block_comment(struct front *f)
{
	for (f->in += 2; *f->in; f->in++) {
		if (f->in[0] == '*' && f->in[1] == '/') {
			f->in += 2;
			return true;
		}
		if (*f->in == '\n') {
			emit(f, '\n');
			f->line++;
		}
	}
	return false;
}

static bool is_word(char c)
{
	return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_';
}

static void copy_word(struct front *f)
{
	const char *begin = f->in;
	size_t n;

	while (is_word(*f->in))
		f->in++;
	n = (size_t)(f->in - begin);
	if ((n == 8 && !memcmp(begin, "Infinity", n)) || (n == 3 && !memcmp(begin, "inf", n))) {
		memcpy(f->out, "\"inf\"", 5);
		f->out += 5;
		return;
	}
	memcpy(f->out, begin, n);
	f->out += n;
}

/* Everything that is neither blank nor comment: decides what a pending comma was. */
static void copy_token(struct front *f)
{
	char c = *f->in;

	if (f->comma && (c == '}' || c == ']'))
		*f->comma = ' ';
	f->comma = c == ',' && f->before != ',' && f->before != '{' && f->before != '[' ? f->out : NULL;
	f->before = c;
	if (c == '"')
		copy_string(f);
	else if (is_word(c))
		copy_word(f);
	else
		emit(f, *f->in++);
}

/* out holds 2 * strlen(text) + 1 bytes: only `inf` grows, from 3 to 5. 0, or the line of an endless comment. */
static unsigned clean(const char *text, char *out)
{
	struct front f = { .in = text, .out = out, .line = 1 };

	if (!strncmp(f.in, "\xef\xbb\xbf", 3))
		f.in += 3;
	while (*f.in) {
		unsigned line = f.line;

		if (*f.in == '#' || (f.in[0] == '/' && f.in[1] == '/')) {
			skip_line_comment(&f);
		} else if (f.in[0] == '/' && f.in[1] == '*') {
			if (!skip_block_comment(&f))
				return line;
		} else if (strchr(" \t\r\n", *f.in)) {
			f.line += *f.in == '\n';
			emit(&f, *f.in++);
		} else {
			copy_token(&f);
		}
	}
	emit(&f, '\0');
	return 0;
}

int json_doc_parse(struct json_doc *d, const char *text, const char *name, struct err *e)
{
	json_error_t je;
	unsigned endless;

	*d = (struct json_doc){ .name = strdup(name), .text = malloc(2 * strlen(text) + 1) };
	if (!d->name || !d->text) {
		json_doc_release(d);
		return err_set(e, -ENOMEM, "%s: out of memory", name);
	}
	endless = clean(text, d->text);
	if (endless) {
		json_doc_release(d);
		return err_set(e, -EINVAL, "%s:%u: this comment does not end", name, endless);
	}
	d->root = json_loads(d->text, JSON_REJECT_DUPLICATES, &je);
	if (!d->root || !json_is_object(d->root)) {
		if (d->root)
			err_set(e, -EINVAL, "%s: expected an object { … }", name);
		else
			err_set(e, -EINVAL, "%s:%d: %s", name, je.line > 0 ? je.line : 1, je.text);
		json_doc_release(d);
		return -EINVAL;
	}
	return 0;
}

void json_doc_release(struct json_doc *d)
{
	free(d->name);
	free(d->text);
	json_decref(d->root);
	*d = (struct json_doc){ 0 };
}

const char *json_path_text(const struct json_path *path, char buf[JSON_PATH_MAX])
{
	size_t at = 0;

	buf[0] = '\0';
	if (!path)
		return buf;
	if (path->up) {
		json_path_text(path->up, buf);
		at = strlen(buf);
		if (at < JSON_PATH_MAX - 1)
			buf[at++] = '.';
	}
	snprintf(buf + at, JSON_PATH_MAX - at, "%s", path->key);
	return buf;
}

const char *json_words(const json_t *v, char buf[64])
{
	char number[32];

	switch (json_typeof(v)) {
	case JSON_OBJECT:
		snprintf(buf, 64, "an object");
		break;
	case JSON_ARRAY:
		snprintf(buf, 64, "a list");
		break;
	case JSON_STRING:
		snprintf(buf, 64, "\"%.50s\"%s", json_string_value(v), json_string_length(v) > 50 ? "…" : "");
		break;
	case JSON_INTEGER:
		snprintf(buf, 64, "%lld", (long long)json_integer_value(v));
		break;
	case JSON_REAL:
		snprintf(buf, 64, "%s", double_text(json_real_value(v), number));
		break;
	case JSON_TRUE:
	case JSON_FALSE:
		snprintf(buf, 64, "%s", json_is_true(v) ? "true" : "false");
		break;
	case JSON_NULL:
		snprintf(buf, 64, "null");
		break;
	}
	return buf;
}

int json_fail(const struct json_doc *d, const struct json_path *path, struct err *e, const char *fmt, ...)
{
	char text[768], where[JSON_PATH_MAX];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	return err_set(e, -EINVAL, "%s:%u: %s: %s", d->name, json_pos_line(d->text, path), json_path_text(path, where),
		       text);
}

bool json_is_auto(const json_t *v)
{
	return json_is_string(v) && !strcmp(json_string_value(v), "auto");
}

int json_read_u64(const struct json_doc *d, const struct json_path *path, const json_t *v, uint64_t min, uint64_t max,
		  uint64_t *out, struct err *e)
{
	char words[64];
	double x = json_is_real(v) ? json_real_value(v) : 0;

	if (json_is_integer(v) && json_integer_value(v) >= 0) {
		uint64_t n = (uint64_t)json_integer_value(v);

		if (n >= min && n <= max) {
			*out = n;
			return 0;
		}
	} else if (json_is_real(v) && x == floor(x) && x >= (double)min && x <= (double)max && x < 0x1p63) {
		*out = (uint64_t)x;
		return 0;
	}
	if (max == INT64_MAX)
		return json_fail(d, path, e, "expected an integer of at least %llu, found %s", (unsigned long long)min,
				 json_words(v, words));
	return json_fail(d, path, e, "expected an integer from %llu to %llu, found %s", (unsigned long long)min,
			 (unsigned long long)max, json_words(v, words));
}

int json_read_f64(const struct json_doc *d, const struct json_path *path, const json_t *v, double min, double max,
		  double *out, struct err *e)
{
	char words[64], lo[32], hi[32];
	double x = json_number_value(v);

	if (json_is_number(v) && x >= min && x <= max) {
		*out = x;
		return 0;
	}
	if (max >= 1e300)
		return json_fail(d, path, e, "expected a number of at least %s, found %s", double_text(min, lo),
				 json_words(v, words));
	return json_fail(d, path, e, "expected a number from %s to %s, found %s", double_text(min, lo),
			 double_text(max, hi), json_words(v, words));
}

int json_read_bool(const struct json_doc *d, const struct json_path *path, const json_t *v, bool *out, struct err *e)
{
	char words[64];

	if (!json_is_boolean(v))
		return json_fail(d, path, e, "expected true or false, found %s", json_words(v, words));
	*out = json_is_true(v);
	return 0;
}

int json_read_string(const struct json_doc *d, const struct json_path *path, const json_t *v, char **out, struct err *e)
{
	char words[64];
	char *s;

	if (!json_is_string(v))
		return json_fail(d, path, e, "expected a string, found %s", json_words(v, words));
	s = strdup(json_string_value(v));
	if (!s)
		return err_set(e, -ENOMEM, "%s: out of memory", d->name);
	*out = s;
	return 0;
}
