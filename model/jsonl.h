/* SPDX-License-Identifier: Apache-2.0 */
/* One line of a JSONL file, in place: nothing is allocated or copied. Private to model/. */
#ifndef SHARDMESH_MODEL_JSONL_H
#define SHARDMESH_MODEL_JSONL_H

#include "base/base.h"

/* A JSON string where it stands: raw is the first byte behind the opening quote. */
struct jsonl_string {
	const uint8_t *raw;
	uint64_t bytes; /* when decoded */
};

/* {"text": ...}, or {"prompt": ..., "completion": ...}: then text is the completion. Other keys are passed over. */
struct jsonl_line {
	bool pair;
	struct jsonl_string prompt, text;
};

/*
 * line: n bytes without the newline. 0; 1: a blank line; -EINVAL: why says what
 * is wrong and where. Strict JSON in strict UTF-8, nesting up to 64; one of our
 * keys twice is an error.
 */
#define JSONL_WHY 160
int jsonl_parse(const uint8_t *line, size_t n, struct jsonl_line *out, char why[JSONL_WHY]);

/*
 * The next character of a string that jsonl_parse has accepted: its bytes go to
 * out, *p moves behind it. Returns how many, or 0 at the closing quote, where *p
 * stays.
 */
unsigned jsonl_next(const uint8_t **p, uint8_t out[4]);

/*
 * Length of the UTF-8 sequence at p, whose first byte is 0x80 or more; 0 when it
 * is none: no overlong forms, no surrogates, nothing above U+10FFFF (Unicode,
 * table 3-7).
 */
unsigned jsonl_utf8_length(const uint8_t *p, const uint8_t *end);

#endif
