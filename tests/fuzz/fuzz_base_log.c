/* SPDX-License-Identifier: Apache-2.0 */
/* Whatever bytes a message holds, the log's line is one line and parses as JSON. */
#include "base/base.h"

#include <assert.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
	static char line[1 << 15];
	int fd = memfd_create("log", MFD_CLOEXEC);
	char *text = strndup((const char *)data, bytes);
	struct log l;
	json_t *parsed;
	ssize_t n;

	assert(fd >= 0 && text);
	log_init(&l, fd, "fuzz");
	log_info(&l, "%s", text);
	n = pread(fd, line, sizeof(line), 0);
	assert(n > 0 && memchr(line, '\n', (size_t)n) == line + n - 1);
	parsed = json_loadb(line, (size_t)n, 0, NULL);
	assert(parsed && json_is_string(json_object_get(parsed, "msg")));
	json_decref(parsed);
	free(text);
	close(fd);
	return 0;
}
