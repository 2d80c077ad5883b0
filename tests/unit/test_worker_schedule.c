/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The order in which a span asks for units and gives gradients away, and that
 * it may be stopped anywhere. The hooks live as the program does: one gradient
 * buffer for everything, given away when final() is called, and units that are
 * gone as soon as used() was. On the deferred backend, so that whatever is given
 * away too early is not there yet.
 */
#include "test_worker_model.h"
#include "worker/schedule.h"

#include <errno.h>
#include <stdio.h>

struct fixture {
	struct tiny *t;
	struct net net;
	struct arena arena;
	void *workspace;
	struct use uses[16];
	uint32_t n_uses;
	char trace[1024];
	float *buffer, *unit[2]; /* copies that are spoiled after use */
	bool buffer_out;
	uint32_t borders, stop_at;
	int fail_units;
	float *(*gradient)[UNIT_PARTS_MAX];
};

static void say(struct fixture *f, const char *fmt, uint32_t a, uint32_t b)
{
	size_t n = strlen(f->trace);

	snprintf(f->trace + n, sizeof(f->trace) - n, fmt, a, b);
}

static int border(void *ctx)
{
	struct fixture *f = ctx;

	return f->borders++ == f->stop_at ? -ECANCELED : 0;
}

static int units(void *ctx, uint32_t use, const struct use *u, const float *params[2])
{
	struct fixture *f = ctx;

	(void)use;
	if (f->fail_units && u->kind == USE_BLOCK_BACKWARD)
		return f->fail_units;
	for (uint32_t i = 0; i < u->n; i++) {
		say(f, i ? "+%u" : " %u", u->unit[i], 0);
		memcpy(f->unit[i], f->t->unit[u->unit[i]], f->t->table.unit[u->unit[i]].n * sizeof(float));
		params[i] = f->unit[i];
	}
	return 0;
}

static void used(void *ctx, uint32_t use)
{
	struct fixture *f = ctx;

	(void)use;
	memset(f->unit[0], 0xff, f->t->table.largest_unit * sizeof(float));
	memset(f->unit[1], 0xff, f->t->table.largest_unit * sizeof(float));
}

static int gradient(void *ctx, uint32_t unit, uint32_t part, float **buffer)
{
	struct fixture *f = ctx;

	(void)unit;
	(void)part;
	assert_false(f->buffer_out);
	f->buffer_out = true;
	memset(f->buffer, 0xff, f->t->table.largest_unit * sizeof(float));
	*buffer = f->buffer;
	return 0;
}

static int final(void *ctx, uint32_t unit, uint32_t part, float *buffer)
{
	struct fixture *f = ctx;

	assert_true(f->buffer_out);
	assert_ptr_equal(buffer, f->buffer);
	f->buffer_out = false;
	say(f, " g%u.%u", unit, part);
	memcpy(f->gradient[unit][part], buffer, f->t->table.unit[unit].part[part].end * sizeof(float));
	return 0;
}

static void open_stream(struct fixture *f)
{
	struct k_stream_config cfg = { .profile = &f->t->profile, .threads = 1 };
	struct err e = { 0 };
	struct k_dims dims;

	net_dims(&f->t->model, BATCH, SEQ, 2, &dims);
	cfg.workspace_bytes = k_deferred_ops()->workspace_bytes(&dims, 1);
	f->workspace = cfg.workspace = zeroed(cfg.workspace_bytes);
	if (k_deferred_ops()->stream_open(&cfg, &f->net.stream, &e))
		fail_msg("%s", e.text);
}

static struct fixture *open_fixture(bool training, const char *keys)
{
	struct fixture *f = zeroed(sizeof(*f));
	struct net_config cfg = { .k = k_deferred_ops(), .batch = BATCH, .seq = SEQ, .max_span = 2, .seed = 7 };
	struct err e = { 0 };

	f->t = tiny_open(keys);
	cfg.model = &f->t->model;
	cfg.table = &f->t->table;
	assert_int_equal(net_init(&f->net, &cfg, &e), 0);
	assert_int_equal(arena_init(&f->arena, "test", net_activation_bytes(&cfg)), 0);
	assert_int_equal(net_activations(&f->net, &f->arena), 0);
	assert_int_equal(f->arena.used, f->arena.size);
	open_stream(f);
	f->n_uses = net_uses(&f->net, training, f->uses);
	assert_true(f->n_uses <= net_uses_max(&f->t->model));
	f->buffer = zeroed(f->t->table.largest_unit * sizeof(float));
	f->unit[0] = zeroed(f->t->table.largest_unit * sizeof(float));
	f->unit[1] = zeroed(f->t->table.largest_unit * sizeof(float));
	f->gradient = zeroed(f->t->table.n_units * sizeof(*f->gradient));
	for (uint32_t u = 0; u < f->t->table.n_units; u++)
		for (uint32_t p = 0; p < f->t->table.unit[u].n_parts; p++)
			f->gradient[u][p] = zeroed(f->t->table.unit[u].n * sizeof(float));
	memcpy(f->net.act.tokens, f->t->tokens, 2 * ROWS * sizeof(uint32_t));
	memcpy(f->net.act.targets, f->t->targets, 2 * ROWS * sizeof(uint32_t));
	f->stop_at = UINT32_MAX;
	return f;
}

static void close_fixture(struct fixture *f)
{
	k_deferred_ops()->stream_close(f->net.stream);
	net_release(&f->net);
	arena_release(&f->arena);
	for (uint32_t u = 0; u < f->t->table.n_units; u++)
		for (uint32_t p = 0; p < UNIT_PARTS_MAX; p++)
			free(f->gradient[u][p]);
	free(f->gradient);
	free(f->workspace);
	free(f->buffer);
	free(f->unit[0]);
	free(f->unit[1]);
	tiny_close(f->t);
	free(f);
}

static int run(struct fixture *f, bool training, double *loss)
{
	const struct span_hooks hooks = { border, units, used, gradient, final, f };
	const struct span span = { .step = 3, .n_mb = 2, .training = training };

	f->borders = 0;
	f->trace[0] = 0;
	f->buffer_out = false;
	return span_run(&f->net, &span, f->uses, f->n_uses, &hooks, loss);
}

static void order_of_training(void **state)
{
	struct fixture *f = open_fixture(true, "");
	struct model_run reference = tiny_run(f->t, 0, 2);
	double loss = 0, want = tiny_loss(&reference);

	(void)state;
	assert_int_equal(run(f, true, &loss), 0);
	assert_string_equal(f->trace, " 0 1 2 3 4+0 g0.1 g4.0 3 g3.0 2 g2.0 1 g1.0 g0.0");
	assert_memory_equal(&loss, &want, sizeof(loss));
	for (uint32_t u = 0; u < f->t->table.n_units; u++)
		for (uint32_t p = 0; p < f->t->table.unit[u].n_parts; p++)
			assert_memory_equal(f->gradient[u][p], f->t->gradient[u][p],
					    f->t->table.unit[u].part[p].end * sizeof(float));
	close_fixture(f);
}

static void order_of_evaluation(void **state)
{
	struct fixture *f = open_fixture(false, "");
	struct model_run reference = tiny_run(f->t, 0, 2);
	double loss = 0, want;

	(void)state;
	reference.training = false;
	want = tiny_loss(&reference);
	assert_int_equal(run(f, false, &loss), 0);
	assert_string_equal(f->trace, " 0 1 2 3 4+0");
	assert_memory_equal(&loss, &want, sizeof(loss));
	close_fixture(f);
}

static void order_of_untied(void **state)
{
	struct fixture *f = open_fixture(true, "\"tie_word_embeddings\": false");
	double loss;

	(void)state;
	assert_int_equal(run(f, true, &loss), 0);
	assert_string_equal(f->trace, " 0 1 2 3 4 g4.0 3 g3.0 2 g2.0 1 g1.0 g0.0");
	close_fixture(f);
}

/* At every border the span may end; what comes after is not started, and the next span is not harmed. */
static void stops_anywhere(void **state)
{
	struct fixture *f = open_fixture(true, "");
	struct model_run reference = tiny_run(f->t, 0, 2);
	double loss = 0, want = tiny_loss(&reference);

	(void)state;
	for (f->stop_at = 0; f->stop_at < f->n_uses; f->stop_at++) {
		assert_int_equal(run(f, true, &loss), -ECANCELED);
		assert_int_equal(f->borders, f->stop_at + 1);
		assert_false(f->buffer_out);
	}
	f->fail_units = -ESTALE;
	assert_int_equal(run(f, true, &loss), -ESTALE);
	f->fail_units = 0;
	assert_int_equal(run(f, true, &loss), 0);
	assert_memory_equal(&loss, &want, sizeof(loss));
	close_fixture(f);
}

static void sum_is_a_tree(void **state)
{
	const double v[7] = { 1, 0x1p-53, 0x1p-53, 0x1p-53, 1, -1, 0x1p-60 };

	(void)state;
	assert_true(tree_sum(v, 1) == 1);
	assert_true(tree_sum(v, 3) == (v[0] + v[1]) + v[2]);
	assert_true(tree_sum(v, 4) == (v[0] + v[1]) + (v[2] + v[3]));
	assert_true(tree_sum(v, 4) != ((v[0] + v[1]) + v[2]) + v[3]);
	assert_true(tree_sum(v, 7) == ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + v[6]));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(order_of_training), cmocka_unit_test(order_of_evaluation),
		cmocka_unit_test(order_of_untied),   cmocka_unit_test(stops_anywhere),
		cmocka_unit_test(sum_is_a_tree),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
