/* SPDX-License-Identifier: Apache-2.0 */
/* The math profile: its text, the table's choice, refusal, and what is imposed on the libraries. */
#include "tests/unit/test_kernels.h"

#include <sys/wait.h>
#include <unistd.h>

static void text_reads_back(void **state)
{
	const char *const good[] = { "cpu dnnl 2.6.3 avx512 grid1 fp32", "cpu openblas 0.3.21 avx2 grid1 fp32",
				     "cpu portable 1 portable grid7 fp32" };
	struct k_profile p;
	(void)state;

	for (size_t i = 0; i < ARRAY_LEN(good); i++) {
		assert_int_equal(k_profile_parse(good[i], &p, NULL), 0);
		assert_string_equal(p.text, good[i]);
	}
	assert_int_equal(p.library, K_LIB_PORTABLE);
	assert_int_equal(p.isa, K_ISA_PORTABLE);
	assert_int_equal(p.grid, 7);
	assert_string_equal(p.version, "1");
}

static void bad_text_is_refused(void **state)
{
	const char *const bad[] = { "",
				    "cpu",
				    "gpu dnnl 2.6.3 avx512 grid1 fp32",
				    "cpu mkl 2.6.3 avx512 grid1 fp32",
				    "cpu dnnl 2.6.3 neon grid1 fp32",
				    "cpu dnnl 2.6.3 avx512 grid1 bf16",
				    "cpu dnnl 2.6.3 avx512 grid1 fp32 ",
				    "cpu dnnl 2.6.3 avx512 grid1 fp32 more",
				    "cpu  dnnl 2.6.3 avx512 grid1 fp32",
				    "cpu dnnl 2.6.3 avx512 grid-1 fp32",
				    "cpu dnnl 2.6.3.4.5.6.7.8.9.10.11.12.13.14.15.16 avx512 grid1 fp32" };
	struct k_profile p = { .grid = 99 };
	struct err e;
	(void)state;

	for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
		assert_int_equal(k_profile_parse(bad[i], &p, &e), -EINVAL);
		assert_int_equal(e.code, -EINVAL);
	}
	assert_int_equal(p.grid, 99);
}

static void detected_profile_runs_here(void **state)
{
	struct k_profile p, q;
	char reason[160];
	struct err e;
	(void)state;

	for (size_t i = 0; i < ARRAY_LEN(test_profiles); i++) {
		if (k_profile_detect(test_profiles[i], &p, reason, &e)) {
			assert_true(strlen(e.text) > 0);
			continue;
		}
		assert_true(strlen(reason) > 0);
		assert_int_equal(k_profile_parse(p.text, &q, &e), 0);
		assert_string_equal(p.text, q.text);
		assert_int_equal(k_profile_check(&q, &e), 0);
	}
	assert_int_equal(k_profile_detect(NULL, &p, NULL, &e), 0);
	assert_int_equal(k_profile_detect("portable", &p, NULL, &e), 0);
	assert_int_equal(p.library, K_LIB_PORTABLE);
	assert_int_equal(k_profile_detect("portable:portable", &p, NULL, &e), 0);
	assert_int_equal(p.isa, K_ISA_PORTABLE);
}

static void nonsense_is_refused(void **state)
{
	const char *const bad[] = { "mkl", "dnnl:", "dnnl:neon", ":avx2", "Portable" };
	struct k_profile p;
	struct err e;
	(void)state;

	for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
		assert_int_equal(k_profile_detect(bad[i], &p, NULL, &e), -EINVAL);
		assert_non_null(strstr(e.text, bad[i]));
	}
}

/* Another version, another grid: refused, and both profiles are named. */
static void foreign_profile_is_refused(void **state)
{
	const char *const foreign[] = { "cpu dnnl 99.1.2 avx2 grid1 fp32", "cpu portable 1 portable grid99 fp32",
					"cpu openblas 0.0.1 avx512 grid1 fp32" };
	struct k_profile p, own;
	struct err e;
	(void)state;

	assert_int_equal(k_profile_detect(NULL, &own, NULL, &e), 0);
	for (size_t i = 0; i < ARRAY_LEN(foreign); i++) {
		assert_int_equal(k_profile_parse(foreign[i], &p, &e), 0);
		assert_int_equal(k_profile_check(&p, &e), -ENOTSUP);
		assert_non_null(strstr(e.text, foreign[i]));
		assert_non_null(strstr(e.text, own.text));
		uint8_t *ws = test_alloc(1 << 20);
		struct k_stream *s;
		const struct k_stream_config cfg = { &p, 1, ws, 1 << 20 };
		assert_int_equal(k_cpu_ops()->stream_open(&cfg, &s, &e), -ENOTSUP);
		assert_int_equal(k_deferred_ops()->stream_open(&cfg, &s, &e), -ENOTSUP);
		free(ws);
	}
}

/*
 * In a process of its own, since libraries stay loaded: whatever the user's environment says, the profile's kernels
 * are taken; and once they are, others are refused.
 */
static void check_environment(const char *narrow, const char *wide)
{
	struct k_profile p;
	struct err e;

	setenv("OPENBLAS_CORETYPE", "Prescott", 1);
	setenv("DNNL_MAX_CPU_ISA", "SSE41", 1);
	setenv("OMP_NUM_THREADS", "7", 1);
	int rc = k_profile_detect(narrow, &p, NULL, &e);
	if (rc == -ENOTSUP)
		_exit(77);
	if (rc || p.isa != K_ISA_AVX2 || strcmp(getenv("OMP_NUM_THREADS"), "1") != 0)
		_exit(1);
	/* "No AVX-512 here" is a refusal as well. */
	_exit(k_profile_detect(wide, &p, NULL, &e) == -ENOTSUP ? 0 : 2);
}

static void library_is_held_to_the_profile(void **state)
{
	const char *const names[][2] = { { "dnnl:avx2", "dnnl:avx512" }, { "openblas:avx2", "openblas:avx512" } };
	(void)state;

	for (size_t i = 0; i < ARRAY_LEN(names); i++) {
		int status = 0;
		pid_t pid = fork();
		if (pid == 0)
			check_environment(names[i][0], names[i][1]);
		assert_true(pid > 0 && waitpid(pid, &status, 0) == pid && WIFEXITED(status));
		assert_true(WEXITSTATUS(status) == 0 || WEXITSTATUS(status) == 77);
	}
}

int main(void)
{
	/* The test of the environment needs a process that has loaded nothing yet. */
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(library_is_held_to_the_profile),
		cmocka_unit_test(text_reads_back),
		cmocka_unit_test(bad_text_is_refused),
		cmocka_unit_test(detected_profile_runs_here),
		cmocka_unit_test(nonsense_is_refused),
		cmocka_unit_test(foreign_profile_is_refused),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
