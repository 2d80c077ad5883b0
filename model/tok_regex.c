/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The regular expressions of a tokenizer.json. They are written for Oniguruma
 * (Ruby's dialect, Unicode on), and run here by PCRE2. What the two read alike
 * goes through; what they read differently is put in other words (\s, which in
 * PCRE2 has one character more) or refused: a word cut elsewhere would be other
 * tokens, and nobody would see it.
 */
#include "model/tokenizer.h"

#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Unicode's White_Space, for inside of brackets. */
#define WHITE_SPACE "\\p{Z}\\t-\\r\\x{85}"

struct translation {
	const char *p, *end;
	char *out; /* room for what the longest translation of each byte takes */
	bool in_class, class_begins;
	struct err *e;
};

static void put(struct translation *x, const char *text)
{
	size_t n = strlen(text);

	memcpy(x->out, text, n);
	x->out += n;
}

static int refuse(const struct translation *x, const char *what)
{
	return err_set(x->e, -EINVAL, "%s is not supported in a regular expression", what);
}

/* \p{...}, \P{...}: a category of one or two letters, or a script, which to PCRE2 alone also means its extensions. */
static int copy_property(struct translation *x)
{
	const char *close = x->end - x->p > 2 && x->p[2] == '{' ? memchr(x->p, '}', (size_t)(x->end - x->p)) : NULL;

	if (!close)
		return refuse(x, "\\p without {}");
	for (int i = 0; i < 3 || *x->p == '^'; i++)
		*x->out++ = *x->p++;
	if (close - x->p > 2)
		put(x, "sc:");
	while (x->p <= close)
		*x->out++ = *x->p++;
	return 0;
}

static int copy_escape(struct translation *x)
{
	char c = x->p + 1 < x->end ? x->p[1] : '\0', what[3] = { '\\', c, 0 };

	if (c == 'p' || c == 'P')
		return copy_property(x);
	if (c == 's')
		put(x, x->in_class ? WHITE_SPACE : "[" WHITE_SPACE "]");
	else if (c == 'S' && !x->in_class)
		put(x, "[^" WHITE_SPACE "]");
	else if (c && (strchr("rntd", c) || (isascii((unsigned char)c) && ispunct((unsigned char)c))))
		put(x, what);
	else
		return refuse(x, isprint((unsigned char)c) ? what : "a backslash before what is no character");
	x->p += 2;
	return 0;
}

static int copy_in_class(struct translation *x)
{
	char c = *x->p;
	bool begins = x->class_begins;

	x->class_begins = false;
	if (c == '[' || (c == ']' && begins))
		return refuse(x, "a bracket inside of brackets");
	if (c == '&' && x->p + 1 < x->end && x->p[1] == '&')
		return refuse(x, "&& inside of brackets");
	x->in_class = c != ']';
	*x->out++ = *x->p++;
	return 0;
}

/* Groups that capture nothing, look around, or switch case; the rest have other names in other dialects. */
static int check_group(const struct translation *x)
{
	static const char *const known[] = { "(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>", "(?i:" };
	size_t left = (size_t)(x->end - x->p);

	if (left < 2 || x->p[1] != '?')
		return left >= 2 && x->p[1] == '*' ? refuse(x, "(*") : 0;
	for (size_t i = 0; i < ARRAY_LEN(known); i++)
		if (left >= strlen(known[i]) && !memcmp(x->p, known[i], strlen(known[i])))
			return 0;
	return refuse(x, "this kind of group (?");
}

static int copy_outside(struct translation *x)
{
	int rc = *x->p == '(' ? check_group(x) : 0;

	if (rc)
		return rc;
	/* x{1,3}+ repeats the repetition in one dialect and never gives back in the other; likewise x{3}? and x{,3}. */
	if (*x->p == '}' && x->p + 1 < x->end && (x->p[1] == '+' || x->p[1] == '?'))
		return refuse(x, "a + or ? behind {}");
	if (*x->p == '{' && x->p + 1 < x->end && x->p[1] == ',')
		return refuse(x, "{,");
	if (*x->p == '.' || *x->p == '^' || *x->p == '$')
		return refuse(x, *x->p == '.' ? "a dot" : "an anchor");
	if (*x->p == '[') {
		x->in_class = x->class_begins = true;
		*x->out++ = *x->p++;
		if (x->p < x->end && *x->p == '^')
			*x->out++ = *x->p++;
		return 0;
	}
	*x->out++ = *x->p++;
	return 0;
}

static int translate(const char *pattern, size_t n, char **out, size_t *bytes, struct err *e)
{
	struct translation x = { .p = pattern, .end = pattern + n, .e = e };
	int rc = 0;

	*out = x.out = malloc(n * sizeof("[^" WHITE_SPACE "]") + 1);
	if (!x.out)
		return err_set(e, -ENOMEM, "out of memory");
	while (x.p < x.end && !rc) {
		if (*x.p != '\\') {
			rc = x.in_class ? copy_in_class(&x) : copy_outside(&x);
			continue;
		}
		x.class_begins = false;
		rc = copy_escape(&x);
	}
	*bytes = (size_t)(x.out - *out);
	if (rc)
		free(*out);
	return rc;
}

static int compile(struct tokenizer *t, const char *pattern, size_t bytes, uint32_t options, struct err *e)
{
	struct tok_stage *s = &t->stage[t->n_stages];
	PCRE2_UCHAR why[128];
	PCRE2_SIZE at;
	int code;

	s->re = pcre2_compile((PCRE2_SPTR)pattern, bytes, options | PCRE2_UTF | PCRE2_NEVER_BACKSLASH_C, &code, &at,
			      NULL);
	if (!s->re) {
		pcre2_get_error_message(code, why, sizeof(why));
		return err_set(e, -EINVAL, "the regular expression is not understood: %s", (const char *)why);
	}
	t->match[t->n_stages] = pcre2_match_data_create_from_pattern(s->re, NULL);
	if (!t->match[t->n_stages])
		return err_set(e, -ENOMEM, "out of memory");
	/* Only speed: where there is no compiler for this machine, the interpreter gives the same matches. */
	(void)pcre2_jit_compile(s->re, PCRE2_JIT_COMPLETE);
	return 0;
}

int tok_stage_add(struct tokenizer *t, const char *pattern, size_t bytes, bool literal, bool drop_gaps, struct err *e)
{
	char *text = NULL;
	size_t n;
	int rc;

	if (t->n_stages == TOK_STAGES_MAX)
		return err_set(e, -EINVAL, "more than %d steps", TOK_STAGES_MAX);
	if (literal) {
		rc = compile(t, pattern, bytes, PCRE2_LITERAL, e);
	} else {
		rc = translate(pattern, bytes, &text, &n, e);
		if (rc)
			return rc;
		rc = compile(t, text, n, PCRE2_UCP, e);
		free(text);
	}
	t->stage[t->n_stages].drop_gaps = drop_gaps;
	/* Counted also when it failed half way, so that it is freed. */
	t->n_stages++;
	return rc;
}
