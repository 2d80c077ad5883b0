/* SPDX-License-Identifier: Apache-2.0 */
/* Counters, waits and tokens: what is packed comes out again, and nothing else does. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "mesh/mesh.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct seen {
	unsigned n;
	char name[8][64];
	uint64_t value[8];
};

static void see(void *ctx, const char *name, uint64_t value)
{
	struct seen *s = ctx;

	assert_true(s->n < 8);
	snprintf(s->name[s->n], sizeof(s->name[0]), "%s", name);
	s->value[s->n++] = value;
}

static void test_metrics(void **state)
{
	static _Atomic uint64_t a = 7, b = UINT64_MAX;
	struct metrics m = { 0 };
	struct seen s = { 0 };
	uint8_t packed[256];
	size_t n;

	(void)state;
	metrics_add(&m, "mesh_steps_total", "steps", &a);
	metrics_add(&m, "mesh_bytes_total", "bytes", &b);
	n = metrics_pack(&m, packed, sizeof(packed));
	assert_int_equal(n, 2 * (1 + 16 + 8));
	assert_int_equal(metrics_unpack(packed, n, see, &s), 0);
	assert_int_equal(s.n, 2);
	assert_string_equal(s.name[0], "mesh_steps_total");
	assert_true(s.value[0] == 7 && s.value[1] == UINT64_MAX);
	/* A block that is cut anywhere but between two counters is refused. */
	for (size_t cut = 1; cut < n; cut++) {
		s.n = 0;
		assert_int_equal(metrics_unpack(packed, cut, see, &s), cut == n / 2 ? 0 : -EPROTO);
	}
	/* What does not fit is left out whole. */
	assert_int_equal(metrics_pack(&m, packed, n - 1), n / 2);
	assert_int_equal(metrics_pack(&m, packed, 0), 0);
}

static void test_metrics_of_one_name(void **state)
{
	static _Atomic uint64_t a = 7, b = 5, c = 1;
	struct metrics m = { 0 };
	struct seen s = { 0 };
	uint8_t packed[256];

	(void)state;
	metrics_add(&m, "mesh_reads_total", "of one instance", &a);
	metrics_add(&m, "mesh_writes_total", "of both", &c);
	metrics_add(&m, "mesh_reads_total", "of another", &b);
	assert_int_equal(metrics_unpack(packed, metrics_pack(&m, packed, sizeof(packed)), see, &s), 0);
	assert_int_equal(s.n, 2);
	assert_string_equal(s.name[0], "mesh_reads_total");
	assert_string_equal(s.name[1], "mesh_writes_total");
	assert_true(s.value[0] == 12 && s.value[1] == 1);
}

static void test_metrics_garbage(void **state)
{
	struct seen s = { 0 };
	uint8_t zero_length[9] = { 0 }, too_long[80] = { 70 }, with_nul[12] = { 3, 'a', 0, 'b' };

	(void)state;
	assert_int_equal(metrics_unpack(zero_length, sizeof(zero_length), see, &s), -EPROTO);
	assert_int_equal(metrics_unpack(too_long, sizeof(too_long), see, &s), -EPROTO);
	assert_int_equal(metrics_unpack(with_nul, sizeof(with_nul), see, &s), -EPROTO);
	assert_int_equal(metrics_unpack(NULL, 0, see, &s), 0);
	assert_int_equal(s.n, 0);
}

static size_t pack_one(enum wait_kind kind, uint64_t step, uint32_t unit, uint32_t page, uint32_t peer, uint8_t *packed,
		       size_t max)
{
	struct wait_record w[3] = { 0 };

	wait_begin(&w[1], kind, step, unit, page, peer);
	return waits_pack(w, 3, atomic_load(&w[1].since_ns) + 1234000000u, packed, max);
}

static void test_waits(void **state)
{
	static const struct {
		enum wait_kind kind;
		const char *text;
	} cases[] = {
		{ WAIT_LEASE, "worker 3 waits for a lease of step 9, 1.2 s" },
		{ WAIT_UNIT, "worker 3 waits for unit 17 page 4 from shard 5, 1.2 s" },
		{ WAIT_GRADIENT_BUFFER,
		  "worker 3 waits for a gradient buffer, since unit 17 is not taken yet by shard 5, 1.2 s" },
		{ WAIT_CONTRIBUTION, "worker 3 waits for contributions to unit 17 of step 9, 1.2 s" },
		{ WAIT_COMMIT, "worker 3 waits for the commit of step 9, 1.2 s" },
		{ WAIT_MEMBERS, "worker 3 waits for members, 1.2 s" },
		{ WAIT_CONNECT, "worker 3 waits for a connection to shard 5, 1.2 s" },
	};
	uint8_t packed[128];
	char text[256];

	(void)state;
	for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
		size_t n = pack_one(cases[i].kind, 9, 17, 4, 5, packed, sizeof(packed));

		assert_int_equal(waits_text("worker 3", packed, n, text, sizeof(text)), strlen(cases[i].text));
		assert_string_equal(text, cases[i].text);
	}
	assert_int_equal(pack_one(WAIT_UNIT, 0, 0, 0, 0, packed, 31), 0);
}

static void test_waits_several(void **state)
{
	struct wait_record w[3] = { 0 };
	uint8_t packed[128];
	char text[512];
	size_t n, whole;

	(void)state;
	wait_begin(&w[0], WAIT_COMMIT, 4, 0, 0, 0);
	wait_begin(&w[2], WAIT_MEMBERS, 0, 0, 0, 0);
	n = waits_pack(w, 3, clock_now_ns(), packed, sizeof(packed));
	whole = waits_text("shard 1", packed, n, text, sizeof(text));
	assert_non_null(strchr(text, '\n'));
	/* No room for the second sentence: the first stays whole. */
	assert_true(waits_text("shard 1", packed, n, text, whole) < whole);
	assert_null(strchr(text, '\n'));
	assert_non_null(strstr(text, "shard 1 waits for the commit of step 4"));
	/* A cut record is no sentence. */
	assert_int_equal(waits_text("shard 1", packed, 31, text, sizeof(text)), 0);
	wait_end(&w[0]);
	wait_end(&w[2]);
	assert_int_equal(waits_pack(w, 3, clock_now_ns(), packed, sizeof(packed)), 0);
}

static char dir[] = "/tmp/shardmesh-token.XXXXXX";
static char path[64];

static int set_up(void **state)
{
	(void)state;
	unsetenv("SHARDMESH_TOKEN");
	unsetenv("SHARDMESH_TOKEN_FILE");
	snprintf(dir, sizeof(dir), "/tmp/shardmesh-token.XXXXXX");
	assert_non_null(mkdtemp(dir));
	snprintf(path, sizeof(path), "%s/token", dir);
	return 0;
}

static int tear_down(void **state)
{
	(void)state;
	unlink(path);
	return rmdir(dir);
}

static void test_token_file(void **state)
{
	struct job_token a, b;
	struct stat st;
	struct err e;

	(void)state;
	assert_int_equal(token_create(path, &e), 0);
	assert_int_equal(stat(path, &st), 0);
	assert_int_equal(st.st_mode & 0777, 0600);
	assert_int_equal(token_load(path, &a, &e), 0);
	assert_int_equal(a.bytes, 64);
	setenv("SHARDMESH_TOKEN_FILE", path, 1);
	setenv("SHARDMESH_TOKEN", "not this one, the file", 1);
	assert_int_equal(token_load(NULL, &b, &e), 0);
	assert_memory_equal(&a, &b, sizeof(a));
	assert_int_equal(token_create(path, &e), 0);
	assert_int_equal(token_load(path, &b, &e), 0);
	assert_memory_not_equal(&a, &b, sizeof(a));
	assert_int_equal(chmod(path, 0604), 0);
	assert_int_equal(token_load(path, &a, &e), -EINVAL);
	assert_non_null(strstr(e.text, "others can use it"));
	assert_int_equal(unlink(path), 0);
	assert_int_equal(token_load(path, &a, &e), -ENOENT);
	assert_non_null(strstr(e.text, path));
}

static void test_token_environment(void **state)
{
	struct job_token t;
	struct err e;
	char long_one[300];

	(void)state;
	assert_int_equal(token_load(NULL, &t, &e), -EINVAL);
	assert_non_null(strstr(e.text, "--token-file"));
	setenv("SHARDMESH_TOKEN", "0123456789abcdef\n", 1);
	assert_int_equal(token_load(NULL, &t, &e), 0);
	assert_int_equal(t.bytes, 16);
	setenv("SHARDMESH_TOKEN", "0123456789abcde\n", 1);
	assert_int_equal(token_load(NULL, &t, &e), -EINVAL);
	memset(long_one, 'x', sizeof(long_one));
	long_one[256] = 0;
	setenv("SHARDMESH_TOKEN", long_one, 1);
	assert_int_equal(token_load(NULL, &t, &e), 0);
	long_one[256] = 'x';
	long_one[257] = 0;
	setenv("SHARDMESH_TOKEN", long_one, 1);
	assert_int_equal(token_load(NULL, &t, &e), -EINVAL);
	assert_null(strstr(e.text, "xxxx"));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_metrics),
		cmocka_unit_test(test_metrics_of_one_name),
		cmocka_unit_test(test_metrics_garbage),
		cmocka_unit_test(test_waits),
		cmocka_unit_test(test_waits_several),
		cmocka_unit_test_setup_teardown(test_token_file, set_up, tear_down),
		cmocka_unit_test_setup_teardown(test_token_environment, set_up, tear_down),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
