/* SPDX-License-Identifier: Apache-2.0 */
/* meshctl generate: writes text with a trained model. */
#include "meshctl/meshctl.h"
#include "worker/worker.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct generate_flags {
	const char *model, *prompt;
	uint64_t tokens, top_k, seed, threads;
	double temperature;
};

/* How text and tokens go into each other: bytes, or a tokenizer, or not at all, and then both are numbers. */
struct words {
	bool bytes;
	struct tokenizer *tokenizer;
};

/* What the run's data were. */
static bool tokens_are_bytes(const struct model_config *m)
{
	json_error_t je;
	json_t *config = json_loads(m->json, 0, &je);
	const char *format = json_string_value(json_object_get(json_object_get(config, "shardmesh"), "data_format"));
	bool bytes = format && !strcmp(format, "bytes");

	json_decref(config);
	return bytes;
}

/* A Hugging Face directory of somebody else's has a tokenizer too. */
static int open_words(struct words *w, const char *dir, const struct model_config *m, struct err *e)
{
	char path[4096];

	*w = (struct words){ .bytes = tokens_are_bytes(m) };
	snprintf(path, sizeof(path), "%s/tokenizer.json", dir);
	if (w->bytes || access(path, F_OK))
		return 0;
	return tokenizer_open(path, &w->tokenizer, e);
}

/* Numbers separated by blanks or commas; t has room for as many as the prompt has characters. */
static int prompt_numbers(const char *prompt, uint32_t *t, size_t *n, struct err *e)
{
	char *end;

	for (const char *p = prompt; *p; p = end + strspn(end, " ,")) {
		t[(*n)++] = (uint32_t)strtoul(p, &end, 10);
		if (end == p || !strchr(" ,", *end))
			return err_set(
				e, -EINVAL,
				"--prompt '%s': this model's tokens are numbers, not bytes: give them as \"464 2068\"",
				prompt);
	}
	return 0;
}

/* What the template puts before a text, and the text. */
static int prompt_text(const char *prompt, struct tokenizer *t, struct token_list *out, struct err *e)
{
	size_t n, room = strlen(prompt) + 1;
	const uint32_t *prefix = tokenizer_prefix(t, &n);

	out->id = malloc((n + room) * sizeof(*out->id));
	if (!out->id)
		return err_set(e, -ENOMEM, "no memory for the prompt");
	out->room = n + room;
	memcpy(out->id, prefix, n * sizeof(*prefix));
	out->n = n;
	return tokenizer_encode(t, prompt, strlen(prompt), out, e) ? err_prefix(e, "--prompt") : 0;
}

/* The prompt as tokens; the caller releases them, also on failure. */
static int prompt_tokens(const char *prompt, const struct words *w, struct token_list *out, struct err *e)
{
	int rc = 0;

	if (w->tokenizer) {
		rc = prompt_text(prompt, w->tokenizer, out, e);
	} else {
		out->room = strlen(prompt) + 1;
		out->id = malloc(out->room * sizeof(*out->id));
		if (!out->id)
			return err_set(e, -ENOMEM, "no memory for the prompt");
		for (const char *p = prompt; w->bytes && *p; p++)
			out->id[out->n++] = (uint8_t)*p;
		if (!w->bytes)
			rc = prompt_numbers(prompt, out->id, &out->n, e);
	}
	if (!rc && !out->n)
		rc = err_set(e, -EINVAL, "--prompt is empty: give the model something to continue");
	return rc;
}

static void print_token(uint32_t token, const struct words *w)
{
	const uint8_t *text;
	size_t n;

	if (w->tokenizer) {
		text = tokenizer_bytes(w->tokenizer, token, &n);
		fwrite(text ? (const char *)text : "", 1, n, stdout);
	} else if (w->bytes) {
		putchar((int)token);
	} else {
		printf("%u ", token);
	}
}

static int write_text(struct generator *g, const struct generate_flags *f, const struct words *w, struct err *e)
{
	struct token_list prompt = { 0 };
	uint32_t token;
	int rc = prompt_tokens(f->prompt, w, &prompt, e);

	if (!rc)
		rc = generator_feed(g, prompt.id, prompt.n, e);
	for (size_t i = 0; i < prompt.n && !rc; i++)
		print_token(prompt.id[i], w);
	token_list_release(&prompt);
	if (rc)
		return rc;
	for (uint64_t i = 0; i < f->tokens && !rc; i++) {
		rc = generator_next(g, &token, e);
		if (!rc)
			print_token(token, w);
		if (isatty(STDOUT_FILENO))
			fflush(stdout);
	}
	printf("\n");
	return rc;
}

static int generate(struct generator *g, const struct generate_flags *f, struct err *e)
{
	struct words w;
	int rc = open_words(&w, f->model, generator_model(g), e);

	if (rc)
		return rc;
	rc = write_text(g, f, &w, e);
	tokenizer_free(w.tokenizer);
	return rc;
}

static int generate_with(const struct generate_flags *f)
{
	struct generator_config cfg = {
		.model_dir = f->model,
		.threads = (unsigned)f->threads,
		.temperature = f->temperature,
		.top_k = (uint32_t)f->top_k,
		.seed = f->seed,
	};
	struct generator *g;
	struct err e = { 0 };
	int rc = generator_open(&cfg, &g, &e);

	if (!rc) {
		rc = generate(g, f, &e);
		generator_free(g);
	}
	if (!rc)
		return EXIT_OK;
	fprintf(stderr, "meshctl generate: %s\n", e.text);
	return rc == -EINVAL ? EXIT_CONFIG : EXIT_JOB_FAILED;
}

int generate_main(int argc, char **argv)
{
	struct generate_flags f = { .prompt = "\n", .tokens = 200, .temperature = 1.0 };
	struct err e = { 0 };
	bool help = false;
	int rest;
	struct opt opts[] = {
		{ .name = "model",
		  .kind = OPT_STR,
		  .out = &f.model,
		  .arg = "DIR",
		  .help = "Hugging Face directory: RUN_DIR/model" },
		{ .name = "prompt", .kind = OPT_STR, .out = &f.prompt, .arg = "TEXT", .help = "what to continue" },
		{ .name = "tokens", .kind = OPT_U64, .out = &f.tokens, .arg = "N", .help = "tokens to write (200)" },
		{ .name = "temperature",
		  .kind = OPT_F64,
		  .out = &f.temperature,
		  .arg = "T",
		  .help = "0: the likeliest token (1.0)" },
		{ .name = "top-k",
		  .kind = OPT_U64,
		  .out = &f.top_k,
		  .arg = "K",
		  .help = "only the K likeliest; 0: all" },
		{ .name = "seed", .kind = OPT_U64, .out = &f.seed, .arg = "S", .help = "same seed, same text" },
		{ .name = "threads",
		  .kind = OPT_U64,
		  .out = &f.threads,
		  .arg = "N",
		  .help = "compute threads; 0: all cores" },
		{ .name = "help", .kind = OPT_FLAG, .out = &help, .help = "this text" },
		{ 0 },
	};

	if (opt_parse(opts, argc, argv, &rest, &e))
		return usage_error(argv[0], &e);
	if (help) {
		command_help("generate --model DIR [OPTIONS]", "Writes text with a trained model.", opts);
		return EXIT_OK;
	}
	if (rest < argc || !f.model) {
		err_set(&e, -EINVAL, rest < argc ? "'%s' is not expected here" : "--model DIR is missing%s",
			rest < argc ? argv[rest] : "");
		return usage_error(argv[0], &e);
	}
	if (!(f.temperature >= 0) || f.top_k > UINT32_MAX) {
		err_set(&e, -EINVAL, "--temperature must be 0 or more, --top-k below 2^32");
		return usage_error(argv[0], &e);
	}
	return generate_with(&f);
}
