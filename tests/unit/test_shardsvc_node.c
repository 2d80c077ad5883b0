/* SPDX-License-Identifier: Apache-2.0 */
/* Which NUMA node a shard service takes, on machines that we do not have. */
#include "shardsvc/node.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

#define GIB (UINT64_C(1) << 30)

/* Two sockets; node 1 is memory without processors and was left out. */
static const struct node_view two = { .n_nodes = 2, .node = { { 0, 32, 256 * GIB }, { 2, 16, 128 * GIB } } };

static int choose(const struct node_view *v, struct node_want w, const char *says)
{
	char reason[160] = "";
	int node = node_choose(v, &w, reason);

	if (!strstr(reason, says))
		fail_msg("'%s' does not say '%s'", reason, says);
	return node;
}

static void services_take_nodes_in_turn(void **state)
{
	(void)state;
	assert_int_equal(choose(&two, (struct node_want){ 0, 4, 8, 10 * GIB }, "in turn"), 0);
	assert_int_equal(choose(&two, (struct node_want){ 1, 4, 8, 10 * GIB }, "in turn"), 2);
	assert_int_equal(choose(&two, (struct node_want){ 2, 4, 8, 10 * GIB }, "in turn"), 0);
	/* Nobody said how many there are. */
	assert_int_equal(choose(&two, (struct node_want){ 1, 0, 8, 10 * GIB }, "in turn"), 2);
}

static void no_node_where_it_would_not_fit(void **state)
{
	(void)state;
	assert_int_equal(choose(&two, (struct node_want){ 0, 1, 8, 240 * GIB }, "over all nodes"), -1);
	assert_int_equal(choose(&two, (struct node_want){ 0, 1, 8, 230 * GIB }, "in turn"), 0);
	/* Three services, so two may share a node. */
	assert_int_equal(choose(&two, (struct node_want){ 1, 3, 8, 60 * GIB }, "120.0 GiB"), -1);
	assert_int_equal(choose(&two, (struct node_want){ 1, 2, 8, 60 * GIB }, "in turn"), 2);
	assert_int_equal(choose(&two, (struct node_want){ 1, 2, 17, GIB }, "17 threads"), -1);
}

static void one_node_or_a_restricted_process_is_left_alone(void **state)
{
	struct node_view v = two;
	(void)state;

	v.n_nodes = 1;
	assert_int_equal(choose(&v, (struct node_want){ 0, 1, 1, GIB }, "one node"), -1);
	v.n_nodes = 0; /* a kernel without NUMA */
	assert_int_equal(choose(&v, (struct node_want){ 0, 1, 1, GIB }, "one node"), -1);
	v = two;
	v.restricted = true;
	assert_int_equal(choose(&v, (struct node_want){ 0, 1, 1, GIB }, "restricted"), -1);
}

/* Whatever this machine is, the threads and pages that it ends with are somewhere. */
static void binding_here_leaves_a_working_process(void **state)
{
	struct log log;
	(void)state;

	log_init(&log, 2, "test");
	node_bind(&log, &(struct node_want){ 0, 1, 1, 1 });
	assert_int_equal(log.count[LOG_WARN] + log.count[LOG_ERROR], 0);
	assert_int_equal(log.count[LOG_INFO], 1);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(services_take_nodes_in_turn),
		cmocka_unit_test(no_node_where_it_would_not_fit),
		cmocka_unit_test(one_node_or_a_restricted_process_is_left_alone),
		cmocka_unit_test(binding_here_leaves_a_working_process),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
