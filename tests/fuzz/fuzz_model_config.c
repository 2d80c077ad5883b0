/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Config files, both the job's and the model's. Whatever the text, the parser
 * either says what is wrong with it or gives a config that survives being
 * written out and read back.
 */
#include "model/model.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

static void read_back(struct job_config *c)
{
	struct job_config again;
	char *text, *twice;
	struct err e;

	assert(!job_config_dump(c, &text, &e));
	assert(!job_config_parse(text, "dump", "/", &again, &e));
	assert(!job_config_dump(&again, &twice, &e));
	assert(!strcmp(text, twice));
	(void)job_config_validate(&again, &e);
	job_config_release(&again);
	free(text);
	free(twice);
}

/* An inline model: a path would read files. */
static void try_job(const char *text)
{
	struct job_config c;
	struct err e = { 0 };

	if (job_config_parse(text, "fuzz", "/", &c, &e)) {
		assert(e.text[0]);
		return;
	}
	read_back(&c);
	job_config_release(&c);
}

static void try_model(const char *text)
{
	struct model_config m, again;
	struct err e = { 0 };

	if (model_config_parse(text, "fuzz", &m, &e)) {
		assert(e.text[0]);
		return;
	}
	assert(!model_config_parse(m.json, "fuzz", &again, &e));
	assert(!strcmp(m.json, again.json));
	model_config_release(&m);
	model_config_release(&again);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
	static const char whole[] = "{\"shardmesh\": {\"model\": {\"n_embd\": 12}, \"data\": {\"train\": \"a\"}},\n%s";
	char *text = malloc(bytes + 1), *with_ours = NULL;

	memcpy(text, data, bytes);
	text[bytes] = '\0';
	if (!strstr(text, "\"model\": \"")) {
		try_job(text);
		/* Most mutations lose our section, without which nothing gets past the walk. */
		if (asprintf(&with_ours, whole, text) >= 0)
			try_job(with_ours);
		free(with_ours);
	}
	try_model(text);
	free(text);
	return 0;
}
