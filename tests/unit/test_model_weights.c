/* SPDX-License-Identifier: Apache-2.0 */
#include "model/model.h"

#include <errno.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <cmocka.h>

/* A directory of safetensors, written tensor by tensor. */
struct fixture {
	char dir[64];
	struct model_config model;
	struct unit_table t;
};

struct file {
	char header[16384];
	size_t n_header;
	uint8_t data[65536];
	size_t n_data;
};

static const char gpt2_json[] =
	"{\"vocab_size\": 10, \"n_positions\": 4, \"n_embd\": 8, \"n_layer\": 1, \"n_head\": 2}";
static const char llama_json[] = "{\"model_type\": \"llama\", \"vocab_size\": 10, \"hidden_size\": 8,"
				 " \"num_attention_heads\": 2, \"intermediate_size\": 12, \"num_hidden_layers\": 1}";

static int setup_model(void **state, const char *json)
{
	static struct fixture f;
	char dir[] = "/tmp/shardmesh_weights_XXXXXX";

	if (!mkdtemp(dir) || model_config_parse(json, "x", &f.model, NULL))
		return -1;
	snprintf(f.dir, sizeof(f.dir), "%s", dir);
	*state = &f;
	return unit_table_init(&f.t, &f.model, NULL);
}

static int setup_gpt2(void **state)
{
	return setup_model(state, gpt2_json);
}

static int setup_llama(void **state)
{
	return setup_model(state, llama_json);
}

static int teardown(void **state)
{
	struct fixture *f = *state;
	char command[96];

	unit_table_release(&f->t);
	model_config_release(&f->model);
	snprintf(command, sizeof(command), "rm -r %s", f->dir);
	return system(command);
}

static const char *path_of(const struct fixture *f, const char *name)
{
	static char path[2][160];
	static unsigned turn;
	char *p = path[turn++ % 2];

	snprintf(p, 160, "%s/%s", f->dir, name);
	return p;
}

/* The value of element i of tensor k, exact in every type. */
static float value(uint32_t k, uint64_t i)
{
	return (float)(k % 64) + (float)(i % 4) * 0.25f;
}

static void put_value(struct file *x, float v, const char *dtype)
{
	uint32_t bits;
	uint16_t half;

	memcpy(&bits, &v, sizeof(bits));
	if (!strcmp(dtype, "F32")) {
		memcpy(x->data + x->n_data, &v, 4);
		x->n_data += 4;
		return;
	}
	half = (uint16_t)(bits >> 16);
	if (!strcmp(dtype, "F16"))
		half = v == 0 ? 0 : (uint16_t)((((bits >> 23 & 255) - 112) << 10) | (bits >> 13 & 1023));
	memcpy(x->data + x->n_data, &half, 2);
	x->n_data += 2;
}

static void put_tensor(struct file *x, const char *name, const uint64_t *shape, uint32_t n_dims, uint32_t k,
		       const char *dtype)
{
	size_t begin = x->n_data;
	uint64_t n = 1;

	x->n_header += (size_t)snprintf(x->header + x->n_header, sizeof(x->header) - x->n_header,
					"%s\"%s\":{\"dtype\":\"%s\",\"shape\":[", x->n_header ? "," : "{", name, dtype);
	for (uint32_t d = 0; d < n_dims; d++) {
		n *= shape[d];
		x->n_header += (size_t)snprintf(x->header + x->n_header, sizeof(x->header) - x->n_header, "%s%llu",
						d ? "," : "", (unsigned long long)shape[d]);
	}
	for (uint64_t i = 0; i < n; i++)
		put_value(x, value(k, i), dtype);
	x->n_header += (size_t)snprintf(x->header + x->n_header, sizeof(x->header) - x->n_header,
					"],\"data_offsets\":[%zu,%zu]}", begin, x->n_data);
	assert_true(x->n_header < sizeof(x->header) - 512 && x->n_data < sizeof(x->data) - 8192);
}

/* Tensor k of the table, under its name from `skip` characters on. */
static void put_ours(struct file *x, const struct fixture *f, uint32_t k, size_t skip, const char *dtype)
{
	const struct tensor_info *t = &f->t.tensor[k];

	put_tensor(x, strncmp(t->name, "lm_head", 7) ? t->name + skip : t->name, t->shape, t->n_dims, k, dtype);
}

static void write_file(const struct fixture *f, const char *name, struct file *x)
{
	size_t n = 8 + x->n_header + 1 + x->n_data;
	uint8_t *out = malloc(n);
	uint64_t length = x->n_header + 1;

	memcpy(out, &length, 8);
	memcpy(out + 8, x->header, x->n_header);
	out[8 + x->n_header] = '}';
	memcpy(out + 9 + x->n_header, x->data, x->n_data);
	assert_int_equal(file_write_atomic(path_of(f, name), out, n, 0600, NULL), 0);
	free(out);
}

static void write_text(const struct fixture *f, const char *name, const char *text)
{
	assert_int_equal(file_write_atomic(path_of(f, name), text, strlen(text), 0600, NULL), 0);
}

/* Every tensor of the table reads as it was written, in one piece and in pieces. */
static void check_good(const struct fixture *f, const char *path)
{
	struct model_weights *w;
	struct err e = { 0 };

	if (model_weights_open(path, &f->t, &w, &e))
		fail_msg("%s", e.text);
	assert_null(model_weights_warning(w));
	for (uint32_t k = 0; k < f->t.n_tensors; k++) {
		uint64_t n = f->t.tensor[k].n;
		float x[512];

		assert_true(n <= ARRAY_LEN(x));
		assert_int_equal(model_weights_read(w, k, 0, n, x, &e), 0);
		for (uint64_t i = 0; i < n; i++)
			assert_true(x[i] == value(k, i));
		assert_int_equal(model_weights_read(w, k, n - 1, 1, x, &e), 0);
		assert_true(x[0] == value(k, n - 1));
	}
	model_weights_close(w);
}

static void check_bad(const struct fixture *f, const char *path, const char *message)
{
	struct model_weights *w;
	struct err e = { 0 };

	assert_int_not_equal(model_weights_open(path, &f->t, &w, &e), 0);
	if (!strstr(e.text, message))
		fail_msg("\"%s\" does not hold \"%s\"", e.text, message);
}

static void put_all(struct file *x, const struct fixture *f, size_t skip, const char *dtype)
{
	*x = (struct file){ 0 };
	for (uint32_t k = 0; k < f->t.n_tensors; k++)
		put_ours(x, f, k, skip, dtype);
}

static void test_types_and_names(void **state)
{
	static const char *const dtypes[] = { "F32", "F16", "BF16" };
	struct fixture *f = *state;
	size_t prefix = strcspn(f->t.tensor[0].name, ".") + 1;
	static struct file x;

	for (size_t i = 0; i < ARRAY_LEN(dtypes); i++) {
		for (size_t skip = 0; skip <= prefix; skip += prefix) {
			put_all(&x, f, skip, dtypes[i]);
			write_file(f, "model.safetensors", &x);
			check_good(f, f->dir);
			check_good(f, path_of(f, "model.safetensors"));
		}
	}
}

/* Buffers of old checkpoints and the second name of a tied matrix. */
static void test_passed_over(void **state)
{
	struct fixture *f = *state;
	const uint64_t mask[] = { 1, 1, 4, 4 }, *shape = f->t.tensor[0].shape;
	static struct file x;

	put_all(&x, f, 12, "F32");
	put_tensor(&x, "h.0.attn.bias", mask, 4, 1, "F32");
	put_tensor(&x, "transformer.h.0.attn.masked_bias", mask, 0, 1, "F32");
	put_tensor(&x, "lm_head.weight", shape, 2, 0, "BF16");
	write_file(f, "model.safetensors", &x);
	check_good(f, f->dir);
	/* The head's matrix alone. */
	x = (struct file){ 0 };
	put_tensor(&x, "lm_head.weight", shape, 2, 0, "F32");
	for (uint32_t k = 1; k < f->t.n_tensors; k++)
		put_ours(&x, f, k, 0, "F32");
	write_file(f, "model.safetensors", &x);
	check_good(f, f->dir);
	/* Another matrix than the embedding. */
	put_all(&x, f, 0, "F32");
	put_tensor(&x, "lm_head.weight", shape, 2, 5, "F32");
	write_file(f, "model.safetensors", &x);
	check_bad(f, f->dir, "tensor \"lm_head.weight\" differs from \"transformer.wte.weight\"");
	put_all(&x, f, 0, "F32");
	put_tensor(&x, "lm_head.weight", mask, 4, 0, "F32");
	write_file(f, "model.safetensors", &x);
	check_bad(f, f->dir, "tensor \"lm_head.weight\" is 1 x 1 x 4 x 4, and config.json asks for 10 x 8");
}

static void test_llama_extras(void **state)
{
	struct fixture *f = *state;
	const uint64_t four[] = { 4 };
	static struct file x;

	put_all(&x, f, 0, "F32");
	put_tensor(&x, "model.layers.0.self_attn.rotary_emb.inv_freq", four, 1, 1, "F32");
	put_tensor(&x, "rotary_emb.inv_freq", four, 1, 1, "F32");
	write_file(f, "model.safetensors", &x);
	check_good(f, f->dir);
	put_all(&x, f, 0, "F32");
	put_tensor(&x, "model.layers.0.self_attn.rotary_emb.cos", four, 1, 1, "F32");
	write_file(f, "model.safetensors", &x);
	check_bad(f, f->dir, "tensor \"model.layers.0.self_attn.rotary_emb.cos\" is not one of the model");
	/* Untied, and no head. */
	x = (struct file){ 0 };
	for (uint32_t k = 0; k + 1 < f->t.n_tensors; k++)
		put_ours(&x, f, k, 0, "F32");
	write_file(f, "model.safetensors", &x);
	check_bad(f, f->dir, "tensor \"lm_head.weight\" is missing; is the model tied (tie_word_embeddings)?");
}

static void test_refusals(void **state)
{
	struct fixture *f = *state;
	static struct file x;
	uint64_t wrong[] = { 8, 10 };

	check_bad(f, path_of(f, "none"), "No such file");
	check_bad(f, f->dir, "no model.safetensors and no model.safetensors.index.json");
	write_text(f, "pytorch_model.bin", "x");
	check_bad(f, f->dir, "the weights are pickled (pytorch_model.bin), and only safetensors are read");
	x = (struct file){ 0 };
	for (uint32_t k = 1; k < f->t.n_tensors; k++)
		put_ours(&x, f, k, 0, "F32");
	write_file(f, "model.safetensors", &x);
	check_bad(f, f->dir, "model.safetensors: tensor \"transformer.wte.weight\" is missing");
	put_tensor(&x, "wte.weight", wrong, 2, 0, "F32");
	write_file(f, "model.safetensors", &x);
	check_bad(f, f->dir, "tensor \"wte.weight\" is 8 x 10, and config.json asks for 10 x 8");
	put_all(&x, f, 0, "F32");
	put_ours(&x, f, 3, 12, "F32");
	write_file(f, "model.safetensors", &x);
	check_bad(f, f->dir, "tensor \"h.0.ln_1.bias\" is also in ");
	put_all(&x, f, 0, "F32");
	put_tensor(&x, "transformer.h.1.ln_1.bias", wrong, 1, 0, "F32");
	write_file(f, "model.safetensors", &x);
	check_bad(f, f->dir, "tensor \"transformer.h.1.ln_1.bias\" is not one of the model that config.json describes");
	x = (struct file){ 0 };
	for (uint32_t k = 0; k < f->t.n_tensors; k++)
		put_ours(&x, f, k, 0, k == 2 ? "I16" : "F32");
	write_file(f, "model.safetensors", &x);
	check_bad(f, f->dir, "tensor \"transformer.h.0.ln_1.weight\": only F32, F16 and BF16 can be read");
	assert_int_equal(truncate(path_of(f, "model.safetensors"), 900), 0);
	check_bad(f, f->dir, "model.safetensors: ");
}

/* Two shards, tensors in turn, and an index. */
static void write_shards(const struct fixture *f, char *map, size_t room, uint64_t *bytes)
{
	static struct file x[2];
	size_t at = 0;

	x[0] = x[1] = (struct file){ 0 };
	map[0] = '\0';
	for (uint32_t k = 0; k < f->t.n_tensors; k++) {
		put_ours(&x[k % 2], f, k, 0, "F32");
		at += (size_t)snprintf(map + at, room - at, "%s\"%s\": \"model-0000%u-of-00002.safetensors\"",
				       k ? ", " : "", f->t.tensor[k].name, k % 2 + 1);
	}
	*bytes = x[0].n_data + x[1].n_data;
	write_file(f, "model-00001-of-00002.safetensors", &x[0]);
	write_file(f, "model-00002-of-00002.safetensors", &x[1]);
}

static void write_index(const struct fixture *f, const char *fmt, ...) PRINTF_LIKE(2, 3);

static void write_index(const struct fixture *f, const char *fmt, ...)
{
	char *text = NULL;
	va_list ap;

	va_start(ap, fmt);
	assert_true(vasprintf(&text, fmt, ap) > 0);
	va_end(ap);
	write_text(f, "model.safetensors.index.json", text);
	free(text);
}

static void test_index(void **state)
{
	struct fixture *f = *state;
	struct model_weights *w;
	struct err e = { 0 };
	char map[8192], target[160];
	uint64_t bytes;

	write_shards(f, map, sizeof(map), &bytes);
	write_index(f, "{\"metadata\": {\"total_size\": %llu}, \"weight_map\": {%s}}", (unsigned long long)bytes, map);
	check_good(f, f->dir);
	write_index(f, "{\"weight_map\": {%s}}", map);
	check_good(f, path_of(f, "model.safetensors.index.json"));
	write_index(f, "{\"metadata\": {\"total_size\": 7}, \"weight_map\": {%s}}", map);
	assert_int_equal(model_weights_open(f->dir, &f->t, &w, &e), 0);
	assert_non_null(strstr(model_weights_warning(w), "metadata.total_size is 7, and the tensors take "));
	model_weights_close(w);
	/* A name that no shard has, and one that is in another shard than said. */
	write_index(f, "{\"weight_map\": {%s, \"x\": \"model-00002-of-00002.safetensors\"}}", map);
	check_bad(f, f->dir, "tensor \"x\" is not in model-00002-of-00002.safetensors, where weight_map says it is");
	*strstr(map, "00001") = '1';
	write_index(f, "{\"weight_map\": {%s}}", map);
	check_bad(f, f->dir, "model-10001-of-00002.safetensors, which ");
	write_shards(f, map, sizeof(map), &bytes);
	memcpy(strstr(map, "00001"), "00002", 5);
	write_index(f, "{\"weight_map\": {%s}}", map);
	check_bad(f, f->dir, "tensor \"transformer.wte.weight\" is here, and ");
	/* A tensor that the index does not know. */
	write_shards(f, map, sizeof(map), &bytes);
	write_index(f, "{\"weight_map\": {%s}}", strchr(map, ',') + 1);
	check_bad(f, f->dir, "tensor \"transformer.wte.weight\" is not in the weight_map of ");
	/* A shard that is a link. */
	write_index(f, "{\"weight_map\": {%s}}", map);
	snprintf(target, sizeof(target), "%s/elsewhere", f->dir);
	assert_int_equal(rename(path_of(f, "model-00002-of-00002.safetensors"), target), 0);
	assert_int_equal(symlink(target, path_of(f, "model-00002-of-00002.safetensors")), 0);
	check_bad(f, f->dir, "model-00002-of-00002.safetensors is a symbolic link, and ");
}

static void test_hostile_index(void **state)
{
	static const struct {
		const char *text, *message;
	} bad[] = {
		{ "", "index.json:1: " },
		{ "[]", "no weight_map with a file's name for every tensor" },
		{ "{}", "no weight_map" },
		{ "{\"weight_map\": {}}", "no weight_map" },
		{ "{\"weight_map\": {\"a\": 1}}", "weight_map: tensor \"a\" has no file's name" },
		{ "{\"weight_map\": {\"a\": \"\"}}", "weight_map: tensor \"a\" has no file's name" },
		{ "{\"weight_map\": {\"a\": \"/etc/passwd\"}}",
		  "weight_map: \"/etc/passwd\" is not the name of a file beside" },
		{ "{\"weight_map\": {\"a\": \"../x\"}}", "weight_map: \"../x\" is not the name of a file" },
		{ "{\"weight_map\": {\"a\": \"x/y\"}}", "weight_map: \"x/y\" is not the name of a file" },
		{ "{\"weight_map\": {\"a\": \".\"}}", "weight_map: \".\" is not the name of a file" },
		{ "{\"weight_map\": {\"a\": \"x\\u0000y\"}}", "index.json:1: " },
		{ "{\"weight_map\": {\"a\": \"x\"}, \"weight_map\": {\"a\": \"x\"}}", "duplicate object key" },
		{ "{\"weight_map\": [\"x\"]}", "no weight_map with a file's name for every tensor" },
		{ "{\"weight_map\": {\"a\": \"..\"}}", "weight_map: \"..\" is not the name of a file" },
		{ "{\"weight_map\": {\"a\": \"x\", \"a\": \"y\"}}", "duplicate object key" },
		{ "{\"weight_map\": {\"a\": \"x\"}} x", "end of file expected" },
		{ "{\"metadata\": {\"total_size\": \"big\"}, \"weight_map\": {\"a\": \"x\"}}",
		  "metadata.total_size is not a number of bytes" },
		{ "{\"metadata\": {\"total_size\": -1}, \"weight_map\": {\"a\": \"x\"}}",
		  "metadata.total_size is not a number of bytes" },
		{ "{\"weight_map\": {\"a\": \"x\"}}", "/x, which " },
	};
	struct fixture *f = *state;

	for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
		write_text(f, "model.safetensors.index.json", bad[i].text);
		check_bad(f, f->dir, bad[i].message);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(test_types_and_names, setup_gpt2, teardown),
		cmocka_unit_test_setup_teardown(test_types_and_names, setup_llama, teardown),
		cmocka_unit_test_setup_teardown(test_passed_over, setup_gpt2, teardown),
		cmocka_unit_test_setup_teardown(test_llama_extras, setup_llama, teardown),
		cmocka_unit_test_setup_teardown(test_refusals, setup_gpt2, teardown),
		cmocka_unit_test_setup_teardown(test_index, setup_gpt2, teardown),
		cmocka_unit_test_setup_teardown(test_hostile_index, setup_gpt2, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
