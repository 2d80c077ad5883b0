/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Finds the line of a key in a JSON text. jansson keeps no positions, and they
 * are wanted only for messages, so the text, which has been parsed and is
 * therefore well-formed, is walked once more when there is something to say.
 */
#include "model/json_doc.h"

#include <string.h>

#define DEPTH_MAX 16

struct cursor {
	const char *p;
	unsigned line;
};

static void step(struct cursor *c)
{
	c->line += *c->p == '\n';
	c->p++;
}

static void skip_blank(struct cursor *c)
{
	while (*c->p && strchr(" \t\r\n", *c->p))
		step(c);
}

/* From the opening quote to behind the closing one. */
static void skip_string(struct cursor *c)
{
	step(c);
	while (*c->p && *c->p != '"') {
		if (*c->p == '\\' && c->p[1])
			step(c);
		step(c);
	}
	if (*c->p)
		step(c);
}

/* To the comma or bracket that ends the value at hand. */
static void skip_value(struct cursor *c)
{
	unsigned depth = 0;

	while (*c->p) {
		if (*c->p == '"') {
			skip_string(c);
			continue;
		}
		if (*c->p == '{' || *c->p == '[')
			depth++;
		else if (depth == 0 && (*c->p == ',' || *c->p == '}' || *c->p == ']'))
			return;
		else if (*c->p == '}' || *c->p == ']')
			depth--;
		step(c);
	}
}

/*
 * c stands at the start of a value. When that is an object with the key, c goes
 * to the key's value and *line says where the key stands.
 */
static bool enter(struct cursor *c, const char *key, unsigned *line)
{
	size_t n = strlen(key);

	skip_blank(c);
	if (*c->p != '{')
		return false;
	step(c);
	for (;;) {
		struct cursor k;

		skip_blank(c);
		if (*c->p != '"')
			return false;
		k = *c;
		skip_string(c);
		skip_blank(c);
		if (*c->p != ':')
			return false;
		step(c);
		if ((size_t)(c->p - k.p) > n + 2 && !memcmp(k.p + 1, key, n) && k.p[n + 1] == '"') {
			*line = k.line;
			return true;
		}
		skip_value(c);
		if (*c->p != ',')
			return false;
		step(c);
	}
}

unsigned json_pos_line(const char *text, const struct json_path *path)
{
	struct cursor c = { text, 1 };
	const char *key[DEPTH_MAX];
	unsigned n = 0, line;

	for (; path && n < DEPTH_MAX; path = path->up)
		key[n++] = path->key;
	skip_blank(&c);
	line = c.line;
	while (n > 0 && enter(&c, key[--n], &line))
		;
	return line;
}
