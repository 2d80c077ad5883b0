/* SPDX-License-Identifier: Apache-2.0 */
/* model.safetensors.index.json: what is accepted names nothing but files beside it, each once. */
#include "model/st_index.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
	char *text = malloc(bytes + 1);
	struct st_index x;
	struct err e = { 0 };

	memcpy(text, data, bytes);
	text[bytes] = '\0';
	if (st_index_parse(text, bytes, "dir/index.json", &x, &e)) {
		assert(e.text[0]);
	} else {
		assert(x.n_files > 0 && x.n_files <= json_object_size(x.weight_map));
		for (uint32_t i = 0; i < x.n_files; i++) {
			assert(x.file[i][0] && !strchr(x.file[i], '/') && strcmp(x.file[i], "..") != 0);
			for (uint32_t k = 0; k < i; k++)
				assert(strcmp(x.file[i], x.file[k]) != 0);
		}
		st_index_release(&x);
	}
	free(text);
	return 0;
}
