/* SPDX-License-Identifier: Apache-2.0 */
/* A command line of any words: no word is lost, and what is refused is refused with a text. */
#include "base/base.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#define WORDS_MAX 16

/* The input is cut into words at line ends; argv[0] is the program's name. */
static int split(char *text, char **argv)
{
	int argc = 0;

	argv[argc++] = "program";
	for (char *word = strtok_r(text, "\n", &text); word && argc < WORDS_MAX; word = strtok_r(NULL, "\n", &text))
		argv[argc++] = word;
	return argc;
}

static void check_permuted(char **before, char **after, int argc)
{
	for (int i = 0; i < argc; i++) {
		int found = 0;

		for (int k = 0; k < argc; k++)
			found += after[k] == before[i];
		assert(found == 1);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
	char *text = strndup((const char *)data, bytes);
	char *before[WORDS_MAX], *argv[WORDS_MAX];
	const char *name = NULL;
	uint64_t steps = 0;
	bool json = false;
	double rate = 0;
	struct opt opts[] = {
		{ .name = "json", .kind = OPT_FLAG, .out = &json, .help = "" },
		{ .name = "run-dir", .kind = OPT_STR, .out = &name, .arg = "DIR", .help = "" },
		{ .name = "steps", .kind = OPT_U64, .out = &steps, .help = "" },
		{ .name = "rate", .kind = OPT_F64, .out = &rate, .help = "" },
		{ 0 },
	};
	struct err e = { 0 };
	int argc, rest = -1;

	assert(text);
	argc = split(text, argv);
	memcpy(before, argv, sizeof(*argv) * (size_t)argc);
	if (opt_parse(opts, argc, argv, &rest, &e) == 0)
		assert(rest >= 1 && rest <= argc);
	else
		assert(rest == -1 && e.text[0]);
	check_permuted(before, argv, argc);
	free(text);
	return 0;
}
