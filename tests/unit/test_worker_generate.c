/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Generation: with its cache of keys and values, fed in any pieces, the logits
 * are those of the whole forward; what is drawn is a function of model, prompt
 * and seed; a model directory with something wrong is refused by name.
 */
#include "test_worker_model.h"
#include "worker/sample.h"
#include "worker/worker.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#define POSITIONS 8

struct directory {
	char path[64];
};

static void directory_open(struct directory *d)
{
	snprintf(d->path, sizeof(d->path), "/tmp/shardmesh-test-XXXXXX");
	assert_non_null(mkdtemp(d->path));
}

static void directory_close(struct directory *d)
{
	char path[128];

	snprintf(path, sizeof(path), "%s/config.json", d->path);
	unlink(path);
	snprintf(path, sizeof(path), "%s/model.safetensors", d->path);
	unlink(path);
	rmdir(d->path);
}

static void write_file(const struct directory *d, const char *name, const void *data, size_t bytes)
{
	struct err e = { 0 };
	char path[128];

	snprintf(path, sizeof(path), "%s/%s", d->path, name);
	if (file_write_atomic(path, data, bytes, 0644, &e))
		fail_msg("%s", e.text);
}

/* t as a Hugging Face directory. */
static void write_model(const struct directory *d, const struct tiny *t)
{
	uint32_t order[64];
	struct err e = { 0 };
	char *header, *file;
	size_t bytes, at;

	assert_int_equal(st_header_for(&t->table, &header, &bytes, order, &e), 0);
	at = bytes;
	file = zeroed(bytes + t->table.n_parameters * sizeof(float));
	memcpy(file, header, bytes);
	free(header);
	for (uint32_t i = 0; i < t->table.n_tensors; i++) {
		const struct tensor_info *x = &t->table.tensor[order[i]];

		memcpy(file + at, t->unit[x->unit] + x->offset, x->n * sizeof(float));
		at += x->n * sizeof(float);
	}
	assert_int_equal(at, bytes + t->table.n_parameters * sizeof(float));
	write_file(d, "model.safetensors", file, at);
	write_file(d, "config.json", t->model.json, strlen(t->model.json));
	free(file);
}

/* Logits behind the last of n tokens, by the whole forward. */
static void whole_forward(struct tiny *t, const uint32_t *tokens, uint32_t n, float *out)
{
	uint32_t vocab = t->model.vocab_size;
	float *logits = zeroed((size_t)n * vocab * sizeof(float));
	struct model_run r = tiny_run(t, 0, 1);

	r.training = false;
	r.gradient = NULL;
	r.batch = 1;
	r.seq = n;
	r.tokens = r.targets = tokens;
	r.logits = logits;
	tiny_loss(&r);
	memcpy(out, logits + (size_t)(n - 1) * vocab, vocab * sizeof(float));
	free(logits);
}

static void expect_close(const float *got, const float *want, uint32_t n)
{
	float largest = 0;

	for (uint32_t i = 0; i < n; i++)
		largest = fmaxf(largest, fabsf(want[i]));
	for (uint32_t i = 0; i < n; i++)
		assert_true(fabsf(got[i] - want[i]) <= 1e-5f * largest);
}

static struct generator *open_generator(const struct directory *d, double temperature, uint32_t top_k, uint64_t seed)
{
	struct generator_config cfg = {
		.model_dir = d->path, .threads = 2, .temperature = temperature, .top_k = top_k, .seed = seed
	};
	struct generator *g;
	struct err e = { 0 };

	if (generator_open(&cfg, &g, &e))
		fail_msg("%s", e.text);
	return g;
}

static void check_pieces(struct tiny *t, const uint32_t *tokens, const uint32_t *pieces, const struct directory *d)
{
	struct generator *g = open_generator(d, 0, 0, 0);
	float want[64];
	struct err e;
	uint32_t at = 0;

	assert_null(generator_logits(g));
	for (; *pieces; pieces++) {
		assert_int_equal(generator_feed(g, tokens + at, *pieces, &e), 0);
		at += *pieces;
		whole_forward(t, tokens, at, want);
		expect_close(generator_logits(g), want, t->model.vocab_size);
	}
	generator_free(g);
}

static void cache_gives_the_same_logits(void **state)
{
	static const uint32_t pieces[][POSITIONS + 1] = { { 8 }, { 1, 1, 1, 1, 1, 1, 1, 1 }, { 3, 1, 4 }, { 1, 7 } };
	static const char *const models[] = { "",
					      "\"tie_word_embeddings\": false, \"n_inner\": 8",
					      "\"scale_attn_by_inverse_layer_idx\": true",
					      TINY_LLAMA "}",
					      TINY_MISTRAL "}",
					      TINY_QWEN3 "}" };

	(void)state;
	for (size_t m = 0; m < ARRAY_LEN(models); m++) {
		struct tiny *t = tiny_open(models[m]);
		struct directory d;

		directory_open(&d);
		write_model(&d, t);
		for (size_t i = 0; i < ARRAY_LEN(pieces); i++)
			check_pieces(t, t->tokens, pieces[i], &d);
		directory_close(&d);
		tiny_close(t);
	}
}

/* A context that outgrows the positions keeps its newer half. */
static void long_context(void **state)
{
	struct tiny *t = tiny_open("");
	struct directory d;
	struct generator *g;
	float want[64];
	struct err e;

	(void)state;
	directory_open(&d);
	write_model(&d, t);
	g = open_generator(&d, 0, 0, 0);
	assert_int_equal(generator_feed(g, t->tokens, 20, &e), 0);
	whole_forward(t, t->tokens + 16, 4, want);
	expect_close(generator_logits(g), want, t->model.vocab_size);
	assert_int_equal(generator_feed(g, t->tokens + 20, 4, &e), 0);
	whole_forward(t, t->tokens + 16, 8, want);
	expect_close(generator_logits(g), want, t->model.vocab_size);
	assert_int_equal(generator_feed(g, t->tokens + 24, 1, &e), 0);
	whole_forward(t, t->tokens + 21, 4, want);
	expect_close(generator_logits(g), want, t->model.vocab_size);
	generator_free(g);
	directory_close(&d);
	tiny_close(t);
}

/* Of more positions than a cache is made for, 8,192 are used; and what is fed again goes in several passes. */
static void longer_than_a_pass(void **state)
{
	enum { ROOM = 8192, KEPT = ROOM / 2 };
	struct tiny *t = tiny_open(
		"{\"model_type\": \"llama\", \"vocab_size\": 31, \"max_position_embeddings\": 20000, "
		"\"hidden_size\": 8, \"num_hidden_layers\": 2, \"intermediate_size\": 8, "
		"\"num_attention_heads\": 2}");
	uint32_t *tokens = zeroed((ROOM + 1) * sizeof(*tokens));
	struct directory d;
	struct generator *g;
	float want[64];
	struct err e;

	(void)state;
	for (uint32_t i = 0; i <= ROOM; i++)
		tokens[i] = (uint32_t)(rng_u64(4, 0, i) % t->model.vocab_size);
	directory_open(&d);
	write_model(&d, t);
	g = open_generator(&d, 0, 0, 0);
	assert_int_equal(generator_feed(g, tokens, ROOM + 1, &e), 0);
	whole_forward(t, tokens + ROOM + 1 - KEPT, KEPT, want);
	expect_close(generator_logits(g), want, t->model.vocab_size);
	generator_free(g);
	directory_close(&d);
	free(tokens);
	tiny_close(t);
}

static void draw(const struct directory *d, double temperature, uint32_t top_k, uint64_t seed, uint32_t out[20])
{
	struct generator *g = open_generator(d, temperature, top_k, seed);
	const uint32_t prompt[] = { 3, 1, 4 };
	struct err e = { 0 };

	assert_int_equal(generator_next(g, out, &e), -EINVAL);
	assert_int_equal(generator_feed(g, prompt, 3, &e), 0);
	for (int i = 0; i < 20; i++)
		assert_int_equal(generator_next(g, &out[i], &e), 0);
	generator_free(g);
}

static void same_seed_same_text(void **state)
{
	struct tiny *t = tiny_open("");
	uint32_t a[20], b[20], greedy[20];
	struct directory d;

	(void)state;
	directory_open(&d);
	write_model(&d, t);
	draw(&d, 1.0, 0, 5, a);
	draw(&d, 1.0, 0, 5, b);
	assert_memory_equal(a, b, sizeof(a));
	draw(&d, 1.0, 0, 6, b);
	assert_memory_not_equal(a, b, sizeof(a));
	/* No temperature, or one candidate: the seed has no say. */
	draw(&d, 0, 0, 5, greedy);
	draw(&d, 0, 7, 6, b);
	assert_memory_equal(greedy, b, sizeof(b));
	draw(&d, 1.5, 1, 6, b);
	assert_memory_equal(greedy, b, sizeof(b));
	directory_close(&d);
	tiny_close(t);
}

static void open_fails(const struct directory *d, int code, const char *part)
{
	struct generator_config cfg = { .model_dir = d->path, .threads = 1 };
	struct generator *g = NULL;
	struct err e = { 0 };

	assert_int_equal(generator_open(&cfg, &g, &e), code);
	assert_null(g);
	if (!strstr(e.text, part))
		fail_msg("'%s' does not say '%s'", e.text, part);
}

static void what_is_wrong_is_named(void **state)
{
	struct tiny *t = tiny_open(""), *other = tiny_open("\"n_inner\": 16");
	const uint32_t strange[] = { 1, 31 };
	struct directory d;
	struct generator *g;
	struct err e = { 0 };

	(void)state;
	directory_open(&d);
	open_fails(&d, -ENOENT, "config.json");
	write_file(&d, "config.json", t->model.json, strlen(t->model.json));
	open_fails(&d, -ENOENT, "model.safetensors");
	write_model(&d, t);
	write_file(&d, "config.json", other->model.json, strlen(other->model.json));
	open_fails(&d, -EINVAL, "transformer.h.0.mlp.c_fc.");
	write_model(&d, t);
	g = open_generator(&d, 0, 0, 0);
	assert_int_equal(generator_feed(g, strange, 2, &e), -EINVAL);
	assert_non_null(strstr(e.text, "31"));
	assert_int_equal(generator_model(g)->n_layer, 3);
	generator_free(g);
	directory_close(&d);
	tiny_close(t);
	tiny_close(other);
}

/* Against the definition, token by token. */
static void sampling_follows_the_softmax(void **state)
{
	const float logits[6] = { 1.0f, 3.0f, 2.0f, 3.0f, -1000.0f, 2.0f };
	float scratch[6];
	uint32_t hits[6] = { 0 };
	double p[6], total = 0;

	(void)state;
	for (int i = 0; i < 6; i++)
		total += p[i] = exp((double)logits[i] / 0.7);
	for (int i = 0; i < 20000; i++)
		hits[sample_token(logits, 6, 0.7, 0, (i + 0.5) / 20000, scratch)]++;
	for (int i = 0; i < 6; i++)
		assert_true(fabs(hits[i] / 20000.0 - p[i] / total) < 2e-4);
	/* Of the two 2s the lower one is the third; the others are out. */
	memset(hits, 0, sizeof(hits));
	for (int i = 0; i < 2000; i++)
		hits[sample_token(logits, 6, 0.7, 3, (i + 0.5) / 2000, scratch)]++;
	assert_true(hits[1] > 0 && hits[3] > 0 && hits[2] > 0);
	assert_int_equal(hits[1] + hits[3] + hits[2], 2000);
	assert_int_equal(sample_token(logits, 6, 0, 0, 0.99, scratch), 1);
	assert_int_equal(sample_token(logits, 6, 1, 1, 0.99, scratch), 1);
	assert_int_equal(sample_token(logits, 6, 1, 0, 1 - 0x1p-53, scratch), 5);
	assert_int_equal(sample_token(logits, 6, 1, 0, 0x1p-53, scratch), 0);
}

/* The k largest of random numbers, against sorting. */
static void top_k_is_the_largest(void **state)
{
	enum { N = 97 };
	float logits[N], scratch[N];

	(void)state;
	for (uint32_t i = 0; i < N; i++)
		logits[i] = (float)(rng_u64(3, 0, i) % 40) / 10;
	for (uint32_t k = 1; k <= N; k++) {
		bool seen[N] = { false };
		uint32_t distinct = 0;

		for (int i = 0; i < 4000; i++)
			seen[sample_token(logits, N, 3, k, (i + 0.5) / 4000, scratch)] = true;
		for (uint32_t i = 0; i < N; i++) {
			uint32_t better = 0;

			for (uint32_t j = 0; j < N; j++)
				better += logits[j] > logits[i] || (logits[j] == logits[i] && j < i);
			assert_int_equal(seen[i], better < k);
			distinct += seen[i];
		}
		assert_int_equal(distinct, k);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(cache_gives_the_same_logits), cmocka_unit_test(long_context),
		cmocka_unit_test(longer_than_a_pass),          cmocka_unit_test(same_seed_same_text),
		cmocka_unit_test(what_is_wrong_is_named),      cmocka_unit_test(sampling_follows_the_softmax),
		cmocka_unit_test(top_k_is_the_largest),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
