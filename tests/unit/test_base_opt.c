/* SPDX-License-Identifier: Apache-2.0 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/base.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct flags {
	bool verbose;
	const char *endpoint;
	uint64_t steps;
	double rate;
};

/* Parses the words after the program's name; argv is given back permuted. */
static int parse(struct flags *f, char **argv, int *rest, struct err *e)
{
	struct opt opts[] = {
		{ .name = "verbose", .kind = OPT_FLAG, .out = &f->verbose, .help = "says more" },
		{ .name = "rdzv-endpoint", .kind = OPT_STR, .out = &f->endpoint, .arg = "HOST:PORT", .help = "where" },
		{ .name = "steps", .kind = OPT_U64, .out = &f->steps, .arg = "N", .help = "how many" },
		{ .name = "learning-rate", .kind = OPT_F64, .out = &f->rate, .help = "how fast" },
		{ 0 },
	};
	int argc = 0;

	while (argv[argc])
		argc++;
	*f = (struct flags){ 0 };
	e->text[0] = 0;
	return opt_parse(opts, argc, argv, rest, e);
}

#define ARGV(...) ((char *[]){ "program", __VA_ARGS__, NULL })

static int clear_environment(void **state)
{
	(void)state;
	unsetenv("SHARDMESH_VERBOSE");
	unsetenv("SHARDMESH_RDZV_ENDPOINT");
	unsetenv("SHARDMESH_STEPS");
	return 0;
}

static void test_forms(void **state)
{
	struct flags f;
	struct err e;
	int rest;

	(void)state;
	assert_int_equal(parse(&f, ARGV("--verbose", "--rdzv-endpoint", "h0:1", "--steps=12", "--learning_rate=1e-3"),
			       &rest, &e),
			 0);
	assert_true(f.verbose && f.steps == 12 && f.rate == 1e-3);
	assert_string_equal(f.endpoint, "h0:1");
	assert_int_equal(rest, 6);
	assert_int_equal(parse(&f, ARGV("--rdzv_endpoint=a=b", "--verbose=false"), &rest, &e), 0);
	assert_string_equal(f.endpoint, "a=b");
	assert_false(f.verbose);
	/* The last one counts; a value may begin with a dash. */
	assert_int_equal(parse(&f, ARGV("--steps", "1", "--steps", "2", "--learning-rate", "-0.5"), &rest, &e), 0);
	assert_true(f.steps == 2 && f.rate == -0.5);
}

static void test_operands_come_last_in_order(void **state)
{
	char **argv = ARGV("one", "--steps", "3", "two", "-", "--verbose", "three", "--", "--steps", "four");
	static const char *const want[] = { "program", "--steps", "3",     "--verbose", "--",  "one",
					    "two",     "-",       "three", "--steps",   "four" };
	struct flags f;
	struct err e;
	int rest;

	(void)state;
	assert_int_equal(parse(&f, argv, &rest, &e), 0);
	assert_true(f.verbose && f.steps == 3);
	assert_int_equal(rest, 5);
	for (size_t i = 0; i < ARRAY_LEN(want); i++)
		assert_string_equal(argv[i], want[i]);
}

static void test_no_words(void **state)
{
	struct flags f;
	struct err e;
	int rest;

	(void)state;
	assert_int_equal(parse(&f, (char *[]){ "program", NULL }, &rest, &e), 0);
	assert_int_equal(rest, 1);
	assert_int_equal(parse(&f, ARGV("operand"), &rest, &e), 0);
	assert_int_equal(rest, 1);
}

static void assert_refused(char **argv, const char *text)
{
	struct flags f;
	struct err e;
	int rest = -7;

	assert_int_equal(parse(&f, argv, &rest, &e), -EINVAL);
	assert_string_equal(e.text, text);
	assert_int_equal(rest, -7);
}

static void test_errors_say_which_and_what(void **state)
{
	(void)state;
	assert_refused(ARGV("--stpes", "3"), "unknown flag --stpes; did you mean --steps?");
	assert_refused(ARGV("--rdzv_endpiont=x"), "unknown flag --rdzv-endpiont; did you mean --rdzv-endpoint?");
	assert_refused(ARGV("--xylophone"), "unknown flag --xylophone; --help lists them");
	assert_refused(ARGV("-v"), "unknown flag -v; flags begin with two dashes");
	assert_refused(ARGV("--rdzv-endpoint"), "--rdzv-endpoint: HOST:PORT is missing");
	assert_refused(ARGV("--learning-rate"), "--learning-rate: its value is missing");
	assert_refused(ARGV("--verbose=perhaps"), "--verbose: 'perhaps' is not true or false");
	/* A prefix of a flag's name is not the flag. */
	assert_refused(ARGV("--verbos"), "unknown flag --verbos; did you mean --verbose?");
}

static void test_numbers_are_whole_words(void **state)
{
	static const char *const bad_counts[] = { "", "-1", "+1", " 1", "1x", "0x10", "1.0", "18446744073709551616" };
	static const char *const bad_rates[] = { "", " 1", "1e", "1e999", "abc", "0.1.2" };
	struct flags f;
	struct err e;
	int rest;

	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(bad_counts); i++)
		assert_int_equal(parse(&f, ARGV("--steps", (char *)bad_counts[i]), &rest, &e), -EINVAL);
	for (size_t i = 0; i < ARRAY_LEN(bad_rates); i++)
		assert_int_equal(parse(&f, ARGV("--learning-rate", (char *)bad_rates[i]), &rest, &e), -EINVAL);
	assert_string_equal(e.text, "--learning-rate: '0.1.2' is not a number");
	assert_int_equal(parse(&f, ARGV("--steps", "18446744073709551615"), &rest, &e), 0);
	assert_true(f.steps == UINT64_MAX);
}

static void test_environment(void **state)
{
	struct flags f;
	struct err e;
	int rest;

	(void)state;
	setenv("SHARDMESH_STEPS", "5", 1);
	setenv("SHARDMESH_RDZV_ENDPOINT", "from:env", 1);
	setenv("SHARDMESH_VERBOSE", "1", 1);
	assert_int_equal(parse(&f, ARGV("--steps", "6"), &rest, &e), 0);
	assert_true(f.steps == 6 && f.verbose);
	assert_string_equal(f.endpoint, "from:env");

	setenv("SHARDMESH_STEPS", "many", 1);
	assert_int_equal(parse(&f, ARGV("--steps", "6"), &rest, &e), 0);
	assert_int_equal(parse(&f, ARGV("x"), &rest, &e), -EINVAL);
	assert_string_equal(e.text, "SHARDMESH_STEPS: 'many' is not a whole number");
	setenv("SHARDMESH_STEPS", "", 1);
	assert_int_equal(parse(&f, ARGV("x"), &rest, &e), 0);
	assert_true(f.steps == 0);
}

static void test_set_says_who_was_given(void **state)
{
	uint64_t steps = 9, shards = 4;
	struct opt opts[] = {
		{ .name = "steps", .kind = OPT_U64, .out = &steps, .help = "" },
		{ .name = "shards", .kind = OPT_U64, .out = &shards, .help = "", .set = true },
		{ 0 },
	};
	struct err e;
	int rest;

	(void)state;
	assert_int_equal(opt_parse(opts, 3, ARGV("--steps", "0"), &rest, &e), 0);
	assert_true(opts[0].set && steps == 0);
	assert_true(!opts[1].set && shards == 4);
}

static void test_help(void **state)
{
	const struct opt opts[] = {
		{ .name = "steps", .arg = "N", .help = "how many" },
		{ .name = "json", .help = "for machines" },
		{ 0 },
	};
	char *text = NULL;
	size_t n = 0;
	FILE *f = open_memstream(&text, &n);

	(void)state;
	assert_non_null(f);
	opt_help(f, opts);
	fclose(f);
	assert_string_equal(text, "  --steps N  how many\n  --json     for machines\n");
	free(text);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(test_forms, clear_environment, clear_environment),
		cmocka_unit_test_setup_teardown(test_operands_come_last_in_order, clear_environment, clear_environment),
		cmocka_unit_test_setup_teardown(test_no_words, clear_environment, clear_environment),
		cmocka_unit_test_setup_teardown(test_errors_say_which_and_what, clear_environment, clear_environment),
		cmocka_unit_test_setup_teardown(test_numbers_are_whole_words, clear_environment, clear_environment),
		cmocka_unit_test_setup_teardown(test_environment, clear_environment, clear_environment),
		cmocka_unit_test_setup_teardown(test_set_says_who_was_given, clear_environment, clear_environment),
		cmocka_unit_test(test_help),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
