/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Safetensors files. What the reader accepts is covered exactly by its tensors,
 * and every one of them can be read to its last byte or is refused by its type.
 */
#include "model/model.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static void read_all(const struct st_file *f, uint64_t data_bytes)
{
	uint64_t at = 0;
	struct err e;
	float last;

	for (uint32_t i = 0; i < f->n_tensors; i++) {
		const struct st_tensor *t = &f->tensor[i];
		uint64_t n = (t->end - t->begin) / (t->dtype == ST_F32 ? 4 : 2);

		assert(t->begin == at && st_find(f, t->name) == t);
		at = t->end;
		if (t->dtype != ST_OTHER && n > 0)
			assert(!st_read_f32(f, t, n - 1, 1, &last, &e));
	}
	assert(at == data_bytes);
}

static void try_file(const void *head, size_t head_bytes, const uint8_t *data, size_t bytes)
{
	int fd = memfd_create("fuzz", MFD_CLOEXEC);
	struct st_file f;
	struct err e = { 0 };
	char path[64];

	assert(fd >= 0);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	assert(!write_full(fd, head, head_bytes) && !write_full(fd, data, bytes));
	if (st_open(path, &f, &e)) {
		assert(e.text[0]);
	} else {
		read_all(&f, head_bytes + bytes - f.data_offset);
		st_close(&f);
	}
	close(fd);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
	const uint8_t *end = memchr(data, '\n', bytes);
	uint64_t length = end ? (uint64_t)(end - data) : bytes;

	/* As it is, and with a length word that fits, so that the header itself is reached: up to the first newline. */
	try_file("", 0, data, bytes);
	try_file(&length, sizeof(length), data, bytes);
	return 0;
}
