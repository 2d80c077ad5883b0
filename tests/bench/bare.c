/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Trains a job's config in a bare loop, without any mesh, and prints a line of
 * JSON a step, with the keys of steps.jsonl.
 *
 *   bare CONFIG STEPS THREADS
 */
#include "tests/bench/bare_loop.h"

#include <inttypes.h>
#include <stdlib.h>

static int run(struct bare *b, uint64_t steps, struct err *e)
{
	for (uint64_t t = 1; t <= steps; t++) {
		uint64_t begin = clock_now_ns();
		struct msg_step done;
		char loss[32], norm[32];
		int rc = bare_step(b, t, &done, e);

		if (rc)
			return rc;
		printf("{\"step\": %" PRIu64 ", \"loss\": %s, \"grad_norm\": %s, \"step_seconds\": %.6f}\n", t,
		       double_text(done.loss, loss), double_text(done.grad_norm, norm),
		       clock_seconds(clock_now_ns() - begin));
		fflush(stdout);
	}
	return 0;
}

int main(int argc, char **argv)
{
	uint64_t steps = argc == 4 ? strtoull(argv[2], NULL, 10) : 0;
	unsigned threads = argc == 4 ? (unsigned)strtoul(argv[3], NULL, 10) : 0;
	struct err e = { 0 };
	struct bare b;
	int rc;

	if (!steps || !threads) {
		fprintf(stderr, "usage: bare CONFIG STEPS THREADS\n");
		return EXIT_USAGE;
	}
	rc = bare_open(&b, argv[1], threads, k_cpu_ops(), &e);
	if (!rc)
		rc = run(&b, steps, &e);
	if (rc)
		fprintf(stderr, "bare: %s\n", e.text);
	bare_close(&b);
	return rc ? EXIT_JOB_FAILED : EXIT_OK;
}
