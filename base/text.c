/* SPDX-License-Identifier: Apache-2.0 */
#include "base/base.h"

#include <stdlib.h>
#include <string.h>

#define WORD_MAX 128

const char *bytes_text(uint64_t bytes, char buf[24])
{
	static const char *const unit[] = { "B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB" };
	double v = (double)bytes;
	unsigned u = 0;

	/* 1023.95 and more would print as 1024.0 of the smaller unit. */
	while (v >= (u == 0 ? 1024.0 : 1023.95) && u + 1 < ARRAY_LEN(unit)) {
		v /= 1024;
		u++;
	}
	snprintf(buf, 24, u == 0 ? "%.0f %s" : "%.1f %s", v, unit[u]);
	return buf;
}

const char *double_text(double v, char buf[32])
{
	for (int digits = 1; digits <= 17; digits++) {
		snprintf(buf, 32, "%.*g", digits, v);
		if (strtod(buf, NULL) == v)
			break;
	}
	return buf;
}

static size_t min3(size_t a, size_t b, size_t c)
{
	size_t m = a < b ? a : b;

	return m < c ? m : c;
}

/* Levenshtein, one row kept. Both words are shorter than WORD_MAX. */
static size_t edit_distance(const char *a, const char *b)
{
	size_t row[WORD_MAX];
	size_t bn = strlen(b);

	for (size_t j = 0; j <= bn; j++)
		row[j] = j;
	for (size_t i = 0; a[i]; i++) {
		size_t diagonal = row[0];

		row[0] = i + 1;
		for (size_t j = 0; j < bn; j++) {
			size_t above = row[j + 1];

			row[j + 1] = min3(diagonal + (a[i] != b[j]), above + 1, row[j] + 1);
			diagonal = above;
		}
	}
	return row[bn];
}

const char *nearest_name(const char *word, const char *const *names)
{
	const char *best = NULL;
	size_t n = strlen(word), near_max;

	if (n == 0 || n >= WORD_MAX)
		return NULL;
	/* A third of the letters may be wrong; past that a suggestion is a guess. */
	near_max = n < 3 ? 1 : (n + 1) / 3;
	for (; *names; names++) {
		size_t d = strlen(*names) < WORD_MAX ? edit_distance(word, *names) : WORD_MAX;

		if (d <= near_max && d < n) {
			best = *names;
			near_max = d ? d - 1 : 0;
			if (d == 0)
				break;
		}
	}
	return best;
}
