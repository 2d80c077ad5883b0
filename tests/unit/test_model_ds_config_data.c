/* SPDX-License-Identifier: Apache-2.0 */
/* A job config's data and where its first parameters come from: sources, tokenizer, weights. */
#include "ds_config_checks.h"

#include <sys/stat.h>

/* data.train as sources with paths, formats and weights. */
static void test_sources(void **state)
{
	static const struct {
		const char *data, *message;
	} bad[] = {
		{ "\"train\": [{\"path\": \"a\", \"weight\": 1}, \"b\"]",
		  "data.train: give every source a weight, or none" },
		{ "\"train\": {\"paths\": \"a\"}", "data.train.paths: unknown key; did you mean \"path\"?" },
		{ "\"train\": {\"path\": \"a\", \"tokenizer\": 1}",
		  "data.train.tokenizer: unknown key; a source has path, format and weight" },
		{ "\"train\": {\"format\": \"jsonl\"}", "data.train: a source without path" },
		{ "\"train\": {\"path\": []}",
		  "data.train.path: expected a path or a list of paths, found an empty list" },
		{ "\"train\": {\"path\": \"a\", \"weight\": 0}",
		  "data.train.weight: expected a number from 1e-06 to 1e+06" },
		{ "\"train\": {\"path\": \"a\", \"format\": \"txt\"}",
		  "data.train.format: expected \"bytes\", \"llmc\"" },
		{ "\"train\": [{\"path\": \"a\"}, {\"path\": \"b\", \"format\": \"nanogpt\"}]",
		  "data.train: \"bytes\" and \"nanogpt\" do not mix" },
		{ "\"train\": \"a\", \"validation\": {\"path\": \"a\", \"weight\": 1}",
		  "data.validation.weight: held-out data are taken evenly; leave it out" },
	};
	struct job_config c, again;
	struct err e = { 0 };
	char *text;

	(void)state;
	if (job_config_parse("{\"shardmesh\": {" MODEL
			     ", \"data\": {\"train\": [{\"path\": [\"a\", \"b\"], \"weight\": 3},"
			     " {\"path\": \"c\", \"weight\": 0.5, \"format\": \"bytes\"}], \"format\": \"jsonl\","
			     " \"validation\": \"v\"}}}",
			     "ds.json", "/base", &c, &e))
		fail_msg("%s", e.text);
	assert_int_equal(c.data.n_train, 2);
	assert_int_equal(c.data.train[0].n_paths, 2);
	assert_string_equal(c.data.train[0].path[1], "/base/b");
	assert_int_equal(c.data.train[0].format, DATA_JSONL);
	assert_true(c.data.train[0].weight == 3 && c.data.train[1].weight == 0.5);
	assert_int_equal(c.data.train[1].format, DATA_BYTES);
	assert_int_equal(c.data.validation[0].format, DATA_JSONL);
	assert_string_equal(data_token_kind(&c.data), "bytes");
	assert_true(data_config_packed(&c.data));
	assert_int_equal(job_config_dump(&c, &text, &e), 0);
	assert_int_equal(job_config_parse(text, "dump", "/", &again, &e), 0);
	assert_configs_equal(&c, &again);
	job_config_release(&again);
	job_config_release(&c);
	free(text);
	for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
		assert_true(asprintf(&text, "{\"shardmesh\": {" MODEL ", \"data\": {%s}}}", bad[i].data) > 0);
		assert_int_equal(job_config_parse(text, "ds.json", "/base", &c, &e), -EINVAL);
		if (!strstr(e.text, bad[i].message))
			fail_msg("\"%s\" does not hold \"%s\"", e.text, bad[i].message);
		free(text);
	}
}

/* A tokenizer makes tokens of JSONL and text, which then stand beside token files, and not beside bytes. */
static void test_tokenizer(void **state)
{
	static const struct {
		const char *data, *message;
	} bad[] = {
		{ "\"train\": \"a\", \"format\": \"text\"",
		  "shardmesh.data.format: \"text\" needs shardmesh.data.tokenizer; with \"bytes\" every byte is a token" },
		{ "\"train\": \"a\", \"tokenizer\": \"t\"",
		  "shardmesh.data.tokenizer: no source is \"text\" or \"jsonl\"; the others are tokens as they are" },
		{ "\"train\": \"a\", \"end_token\": \"x\"",
		  "shardmesh.data.end_token: it is of a shardmesh.data.tokenizer; give one" },
		{ "\"train\": \"a\", \"format\": \"jsonl\", \"tokenizer\": \"t\", \"validation\": {\"path\": \"v\", "
		  "\"format\": \"bytes\"}",
		  "shardmesh.data: training data are tokens and validation data are bytes" },
	};
	struct job_config c;
	struct err e = { 0 };
	char text[1024];

	(void)state;
	if (job_config_parse(
		    "{\"train_batch_size\": 8, \"shardmesh\": {\"model\": {\"vocab_size\": 100, \"eos_token_id\": "
		    "[7, 8]}, \"steps\": 1, \"data\": {\"train\": [{\"path\": \"a\", \"format\": \"jsonl\"},"
		    " {\"path\": \"b\", \"format\": \"nanogpt\"}, {\"path\": \"c\", \"format\": \"text\"}],"
		    " \"end_token\": \"</s>\", \"tokenizer\": \"t/tokenizer.json\"}}}",
		    "ds.json", "/base", &c, &e) ||
	    job_config_validate(&c, &e))
		fail_msg("%s", e.text);
	assert_string_equal(c.data.tokenizer, "/base/t/tokenizer.json");
	assert_string_equal(c.data.end_token, "</s>");
	assert_int_equal(c.data.eos_token, 7);
	assert_string_equal(data_token_kind(&c.data), "tokenizer");
	check_round_trip(&c);
	job_config_release(&c);
	for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
		snprintf(text, sizeof(text),
			 "{\"train_batch_size\": 8, \"shardmesh\": {" MODEL ", \"steps\": 1, \"data\": {%s}}}",
			 bad[i].data);
		check_invalid(text, bad[i].message);
	}
	assert_int_equal(job_config_parse("{\"shardmesh\": {" MODEL ", \"data\": {\"train\": [{\"path\": \"a\"}, "
					  "{\"path\": \"b\", \"format\": \"jsonl\"}], \"tokenizer\": \"t\"}}}",
					  "ds.json", "/base", &c, &e),
			 -EINVAL);
	assert_non_null(strstr(e.text, "\"bytes\" and \"jsonl\" do not mix"));
}

static void write_text(const char *dir, const char *name, const char *text)
{
	char path[160];

	snprintf(path, sizeof(path), "%s/%s", dir, name);
	assert_int_equal(file_write_atomic(path, text, strlen(text), 0600, NULL), 0);
}

/* The weights that a config comes to (NULL: random), and the note that says so; through a dump they are the same. */
static void check_weights(const char *dir, const char *keys, const char *want, const char *note)
{
	struct job_config c, again;
	char *text = NULL, *dump;
	struct err e = { 0 };
	bool noted = false;

	assert_true(asprintf(&text, "{\"shardmesh\": {%s, " DATA "}}", keys) > 0);
	if (job_config_parse(text, "ds.json", dir, &c, &e))
		fail_msg("%s", e.text);
	for (uint32_t i = 0; i < c.n_notes; i++)
		noted |= strstr(c.note[i], note) != NULL;
	assert_true(noted || !note[0]);
	assert_int_equal(job_config_dump(&c, &dump, &e), 0);
	assert_int_equal(job_config_parse(dump, "dump", "/", &again, &e), 0);
	if (want) {
		assert_string_equal(c.weights, want);
		assert_string_equal(again.weights, want);
	} else {
		assert_null(c.weights);
		assert_null(again.weights);
	}
	job_config_release(&again);
	job_config_release(&c);
	free(dump);
	free(text);
}

static void test_initialize(void **state)
{
	char dir[] = "/tmp/shardmesh_config_XXXXXX", m[64], command[64];
	struct job_config c;
	struct err e = { 0 };

	(void)state;
	assert_non_null(mkdtemp(dir));
	snprintf(m, sizeof(m), "%s/m", dir);
	assert_int_equal(mkdir(m, 0700), 0);
	write_text(m, "config.json", "{\"n_embd\": 32, \"n_head\": 2}");
	check_weights(dir, "\"model\": \"m\"", NULL,
		      "no model.safetensors and no model.safetensors.index.json; the first parameters are random");
	check_weights(dir, "\"model\": \"m\", \"initialize\": \"weights\"", m, "");
	write_text(m, "pytorch_model.bin", "");
	assert_int_equal(job_config_parse("{\"shardmesh\": {\"model\": \"m\", " DATA "}}", "ds.json", dir, &c, &e),
			 -EINVAL);
	assert_non_null(strstr(e.text, "only safetensors are read"));
	check_weights(dir, "\"model\": \"m\", \"initialize\": \"random\"", NULL, "");
	write_text(m, "model.safetensors.index.json", "");
	check_weights(dir, "\"model\": \"m\"", m, "the first parameters are read from");
	check_weights(dir, "\"model\": \"m/config.json\"", NULL, "");
	check_weights(dir, "\"model\": \"m\", \"weights\": \"/w\"", "/w", "");
	check_weights(dir, MODEL ", \"weights\": \"/w\", \"initialize\": \"random\"", NULL,
		      "shardmesh.weights: no effect here");
	assert_int_equal(job_config_parse("{\"shardmesh\": {" MODEL ", \"initialize\": \"weights\", " DATA "}}",
					  "ds.json", dir, &c, &e),
			 -EINVAL);
	assert_string_equal(e.text,
			    "ds.json:1: shardmesh.initialize: \"weights\" needs shardmesh.weights, or a directory "
			    "as shardmesh.model");
	snprintf(command, sizeof(command), "rm -r %s", dir);
	assert_int_equal(system(command), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_initialize),
		cmocka_unit_test(test_sources),
		cmocka_unit_test(test_tokenizer),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
