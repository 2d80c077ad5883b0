/* SPDX-License-Identifier: Apache-2.0 */
#include "base/base.h"

#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define NAME_MAX_BYTES 64
#define OPTS_MAX 128

static bool same_name(const char *name, const char *word, size_t n)
{
	for (size_t i = 0; i < n; i++)
		if (name[i] == 0 || name[i] != (word[i] == '_' ? '-' : word[i]))
			return false;
	return name[n] == 0;
}

static struct opt *find(struct opt *opts, const char *word, size_t n)
{
	for (; opts->name; opts++)
		if (same_name(opts->name, word, n))
			return opts;
	return NULL;
}

static int unknown(const struct opt *opts, const char *word, size_t n, struct err *e)
{
	const char *names[OPTS_MAX + 1];
	char dashed[NAME_MAX_BYTES];
	const char *near;
	size_t count = 0;

	snprintf(dashed, sizeof(dashed), "%.*s", (int)(n < sizeof(dashed) ? n : sizeof(dashed) - 1), word);
	for (char *c = dashed; *c; c++)
		*c = *c == '_' ? '-' : *c;
	for (; opts->name; opts++) {
		assert(count < OPTS_MAX);
		names[count++] = opts->name;
	}
	names[count] = NULL;
	near = nearest_name(dashed, names);
	if (near)
		return err_set(e, -EINVAL, "unknown flag --%s; did you mean --%s?", dashed, near);
	return err_set(e, -EINVAL, "unknown flag --%s; --help lists them", dashed);
}

static int parse_bool(const char *text, bool *out)
{
	static const char *const words[] = { "false", "true", "no", "yes", "0", "1" };

	for (unsigned i = 0; i < ARRAY_LEN(words); i++) {
		if (strcmp(text, words[i]) == 0) {
			*out = i & 1;
			return 0;
		}
	}
	return -EINVAL;
}

static int parse_u64(const char *text, uint64_t *out)
{
	unsigned long long v;
	char *end;

	/* strtoull takes a sign and leading space, which no count has. */
	if (!isdigit((unsigned char)text[0]))
		return -EINVAL;
	errno = 0;
	v = strtoull(text, &end, 10);
	if (errno || *end)
		return -EINVAL;
	*out = v;
	return 0;
}

static int parse_f64(const char *text, double *out)
{
	char *end;
	double v;

	if (!text[0] || isspace((unsigned char)text[0]))
		return -EINVAL;
	errno = 0;
	v = strtod(text, &end);
	if ((errno == ERANGE && (v > 1 || v < -1)) || *end)
		return -EINVAL;
	*out = v;
	return 0;
}

/* from: how the user wrote it, "--steps" or "SHARDMESH_STEPS", for the error. */
static int assign(struct opt *o, const char *text, const char *from, struct err *e)
{
	static const char *const expected[] = {
		[OPT_FLAG] = "true or false",
		[OPT_STR] = "a text",
		[OPT_U64] = "a whole number",
		[OPT_F64] = "a number",
	};
	int rc = 0;

	switch (o->kind) {
	case OPT_FLAG:
		rc = parse_bool(text, o->out);
		break;
	case OPT_STR:
		*(const char **)o->out = text;
		break;
	case OPT_U64:
		rc = parse_u64(text, o->out);
		break;
	case OPT_F64:
		rc = parse_f64(text, o->out);
		break;
	}
	if (rc < 0)
		return err_set(e, rc, "%s: '%s' is not %s", from, text, expected[o->kind]);
	o->set = true;
	return 0;
}

/* argv[i] starts with "--" and is longer. *used: how many words it took. */
static int parse_flag(struct opt *opts, int argc, char **argv, int i, int *used, struct err *e)
{
	const char *word = argv[i] + 2;
	const char *equals = strchr(word, '=');
	size_t n = equals ? (size_t)(equals - word) : strlen(word);
	struct opt *o = find(opts, word, n);
	char from[NAME_MAX_BYTES + 2];

	if (!o)
		return unknown(opts, word, n, e);
	snprintf(from, sizeof(from), "--%s", o->name);
	*used = 1;
	if (equals)
		return assign(o, equals + 1, from, e);
	if (o->kind == OPT_FLAG)
		return assign(o, "true", from, e);
	if (i + 1 >= argc)
		return err_set(e, -EINVAL, "%s: %s is missing", from, o->arg ? o->arg : "its value");
	*used = 2;
	return assign(o, argv[i + 1], from, e);
}

/* Moves the `count` words at `at` down to `to`; what stood between moves up behind them, in order. */
static void rotate_down(char **argv, int to, int at, int count)
{
	for (int k = 0; k < count; k++) {
		char *word = argv[at + k];

		memmove(argv + to + k + 1, argv + to + k, (size_t)(at - to) * sizeof(*argv));
		argv[to + k] = word;
	}
}

static int from_environment(struct opt *o, struct err *e)
{
	static const char prefix[] = "SHARDMESH_";
	char name[sizeof(prefix) + NAME_MAX_BYTES];
	const char *value;
	size_t n;

	n = (size_t)snprintf(name, sizeof(name), "%s%s", prefix, o->name);
	assert(n < sizeof(name));
	for (char *c = name; *c; c++)
		*c = *c == '-' ? '_' : (char)toupper((unsigned char)*c);
	value = getenv(name);
	if (!value || !*value)
		return 0;
	return assign(o, value, name, e);
}

int opt_parse(struct opt *opts, int argc, char **argv, int *rest, struct err *e)
{
	int operands = 1; /* argv[operands..i) are operands seen so far */
	int i = 1, rc;

	for (struct opt *o = opts; o->name; o++)
		o->set = false;
	while (i < argc) {
		int used = 1;
		bool last = strcmp(argv[i], "--") == 0;

		if (argv[i][0] != '-' || argv[i][1] == 0) {
			i++;
			continue;
		}
		if (argv[i][1] != '-')
			return err_set(e, -EINVAL, "unknown flag %s; flags begin with two dashes", argv[i]);
		rc = last ? 0 : parse_flag(opts, argc, argv, i, &used, e);
		if (rc < 0)
			return rc;
		rotate_down(argv, operands, i, used);
		operands += used;
		i += used;
		if (last)
			break;
	}
	for (struct opt *o = opts; o->name; o++) {
		rc = o->set ? 0 : from_environment(o, e);
		if (rc < 0)
			return rc;
	}
	*rest = operands;
	return 0;
}

void opt_help(FILE *f, const struct opt *opts)
{
	size_t width = 0;

	for (const struct opt *o = opts; o->name; o++) {
		size_t n = strlen(o->name) + (o->arg ? strlen(o->arg) + 1 : 0);

		width = n > width ? n : width;
	}
	for (; opts->name; opts++) {
		int n = fprintf(f, "  --%s%s%s", opts->name, opts->arg ? " " : "", opts->arg ? opts->arg : "");

		fprintf(f, "%*s  %s\n", (int)width + 4 - n, "", opts->help);
	}
}
