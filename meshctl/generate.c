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

/* What the run's data were: bytes can be shown as text, other tokens only as numbers. */
static bool tokens_are_bytes(const struct model_config *m)
{
	json_error_t je;
	json_t *config = json_loads(m->json, 0, &je);
	const char *format = json_string_value(json_object_get(json_object_get(config, "shardmesh"), "data_format"));
	bool bytes = format && !strcmp(format, "bytes");

	json_decref(config);
	return bytes;
}

/* The prompt as tokens: its bytes, or numbers separated by blanks or commas. malloced. */
static int prompt_tokens(const char *prompt, bool bytes, uint32_t **out, size_t *n, struct err *e)
{
	size_t max = strlen(prompt), count = 0;
	uint32_t *t = malloc((max + 1) * sizeof(*t));
	char *end;

	if (!t)
		return err_set(e, -ENOMEM, "no memory for the prompt");
	for (const char *p = prompt; *p;) {
		if (bytes) {
			t[count++] = (uint8_t)*p++;
			continue;
		}
		t[count++] = (uint32_t)strtoul(p, &end, 10);
		if (end == p || !strchr(" ,", *end)) {
			free(t);
			return err_set(
				e, -EINVAL,
				"--prompt '%s': this model's tokens are numbers, not bytes: give them as \"464 2068\"",
				prompt);
		}
		p = end + strspn(end, " ,");
	}
	if (!count) {
		free(t);
		return err_set(e, -EINVAL, "--prompt is empty: give the model something to continue");
	}
	*out = t;
	*n = count;
	return 0;
}

static void print_token(uint32_t token, bool bytes)
{
	if (bytes)
		putchar((int)token);
	else
		printf("%u ", token);
}

static int generate(struct generator *g, const struct generate_flags *f, struct err *e)
{
	bool bytes = tokens_are_bytes(generator_model(g));
	uint32_t *prompt, token;
	size_t n;
	int rc = prompt_tokens(f->prompt, bytes, &prompt, &n, e);

	if (rc)
		return rc;
	rc = generator_feed(g, prompt, n, e);
	for (size_t i = 0; i < n && !rc; i++)
		print_token(prompt[i], bytes);
	free(prompt);
	for (uint64_t i = 0; i < f->tokens && !rc; i++) {
		rc = generator_next(g, &token, e);
		if (!rc)
			print_token(token, bytes);
		if (isatty(STDOUT_FILENO))
			fflush(stdout);
	}
	printf("\n");
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
