/* SPDX-License-Identifier: Apache-2.0 */
/*
 * JSONL data. A line is taken exactly when jansson takes it too, and then both
 * find the same text in it, but for what we are known to refuse or to pass over:
 * nesting deeper than ours, numbers beyond its types, keys given twice. A file
 * is packed into windows that hold nothing out of bounds.
 */
#include "model/jsonl.h"
#include "model/model.h"

#include <assert.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define LENGTH 5u

static void compare(const struct jsonl_string *s, const json_t *v)
{
	const char *want = json_string_value(v);
	const uint8_t *p = s->raw;
	uint64_t n = 0;
	uint8_t c[4];
	unsigned k;

	assert(want && s->bytes == json_string_length(v));
	while ((k = jsonl_next(&p, c))) {
		assert(n + k <= s->bytes && !memcmp(want + n, c, k));
		n += k;
	}
	assert(n == s->bytes);
}

static void try_line(const uint8_t *line, size_t n)
{
	struct jsonl_line l;
	char why[JSONL_WHY] = "";
	int rc = jsonl_parse(line, n, &l, why);
	json_error_t je;
	json_t *o = json_loadb((const char *)line, n, JSON_ALLOW_NUL, &je);

	if (rc < 0)
		assert(why[0]);
	if (!rc && o) {
		compare(&l.text, json_object_get(o, l.pair ? "completion" : "text"));
		if (l.pair)
			compare(&l.prompt, json_object_get(o, "prompt"));
	} else if (!rc) {
		assert(json_error_code(&je) == json_error_numeric_overflow);
	} else if (rc < 0 && o && json_is_object(o)) {
		bool text = json_is_string(json_object_get(o, "text"));
		bool pair = json_is_string(json_object_get(o, "prompt")) &&
			    json_is_string(json_object_get(o, "completion"));

		assert(text == pair || strstr(why, "twice") || strstr(why, "too deep") || strstr(why, "not a string") ||
		       strstr(why, "expected {"));
	}
	json_decref(o);
}

static void check_window(const uint32_t *tokens, const uint32_t *targets, const uint32_t *keys)
{
	for (uint32_t i = 0; i < LENGTH; i++) {
		assert(tokens[i] < 256 && (targets[i] <= 256 || targets[i] == DATA_NO_TARGET));
		assert(keys[i] <= i && (i == 0 || keys[i] >= keys[i - 1]));
	}
}

static void try_file(const uint8_t *data, size_t bytes)
{
	int fd = memfd_create("fuzz", MFD_CLOEXEC);
	char path[64], *paths[] = { path };
	struct data_source s = { .path = paths, .n_paths = 1, .format = DATA_JSONL };
	struct data_config c = { .train = &s, .n_train = 1, .sequence_length = LENGTH };
	uint32_t tokens[LENGTH], targets[LENGTH], keys[LENGTH];
	struct data_set *d;
	struct err e = { 0 };

	assert(fd >= 0);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	assert(!write_full(fd, data, bytes));
	if (data_open(&c, 1, 300, &d, &e)) {
		assert(e.text[0]);
	} else {
		for (uint64_t step = 1; step <= data_windows(d, DATA_TRAIN); step++) {
			data_micro_batch(d, DATA_TRAIN, step, 1, 0, 1, tokens, targets);
			data_first_keys(d, DATA_TRAIN, step, 1, 0, 1, keys);
			check_window(tokens, targets, keys);
		}
		data_close(d);
	}
	close(fd);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
	const uint8_t *end = memchr(data, '\n', bytes);

	try_line(data, end ? (size_t)(end - data) : bytes);
	try_file(data, bytes);
	return 0;
}
