/* SPDX-License-Identifier: Apache-2.0 */
/* Fold, Adam, hash: exact against the written order, whatever the threads, segments and instruction set. */
#include "tests/unit/test_kernels.h"

#define CHUNKS 19u
#define N (CHUNKS * K_CHUNK)

static const struct k_dims no_dims = { 0 };
static const char *const isas[] = { "portable:portable", "portable:avx2", "portable:avx512" };

/* The contract's square sum of n elements. */
static struct exact_sum square_reference(const float *x, size_t n)
{
	struct exact_sum sum;

	exact_sum_clear(&sum);
	for (size_t c = 0; c < n; c += K_CHUNK) {
		double lane[16] = { 0 };
		for (size_t i = 0; i < K_CHUNK; i++)
			lane[i % 16] += (double)x[c + i] * (double)x[c + i];
		for (int w = 8; w > 0; w /= 2)
			for (int i = 0; i < w; i++)
				lane[i] += lane[i + w];
		exact_sum_add(&sum, lane[0]);
	}
	return sum;
}

/* Cuts [0, N) into segments of the given number of chunks, again and again. */
static uint32_t cut(struct k_fold_seg *seg, float *dst, const float *a, const float *b, uint32_t chunks)
{
	uint32_t count = 0;
	for (size_t at = 0; at < N; at += (size_t)chunks * K_CHUNK, count++) {
		size_t n = N - at < (size_t)chunks * K_CHUNK ? N - at : (size_t)chunks * K_CHUNK;
		seg[count] = (struct k_fold_seg){ dst + at, a + at, b ? b + at : NULL, n };
	}
	return count;
}

static void fold_and_norm_do_not_depend_on_the_cut(void **state)
{
	const uint32_t cuts[] = { 1, 3, 16, 17, CHUNKS };
	float *a = test_random(N, 1, 1.0), *b = test_random(N, 2, 1e-3), *dst = test_floats(N), *want = test_floats(N);
	struct k_fold_seg seg[CHUNKS];
	unsigned ran = 0;
	(void)state;

	for (size_t i = 0; i < N; i++)
		want[i] = a[i] + b[i];
	const struct exact_sum norm = square_reference(want, N);
	for (size_t p = 0; p < ARRAY_LEN(isas); p++)
		for (unsigned threads = 1; threads <= 3; threads++)
			for (size_t c = 0; c < ARRAY_LEN(cuts); c++) {
				struct fixture f;
				struct exact_sum sum;
				if (!fixture_open(&f, k_cpu_ops(), isas[p], threads, &no_dims))
					continue;
				ran++;
				exact_sum_clear(&sum);
				memset(dst, 0xff, N * sizeof(float));
				const struct k_fold fold = { seg, cut(seg, dst, a, b, cuts[c]), &sum };
				f.ops->fold(f.s, &fold);
				fixture_wait(&f);
				assert_bits("a + b", dst, want, N * sizeof(float));
				assert_bits("square sum", &sum, &norm, sizeof(sum));
				fixture_close(&f);
			}
	assert_true(ran >= 3 * ARRAY_LEN(cuts));
	free(a);
	free(b);
	free(dst);
	free(want);
}

static void fold_copies_adds_in_place_and_sums(void **state)
{
	float *a = test_random(N, 1, 1.0), *b = test_random(N, 2, 1.0), *dst = test_floats(N), *both = test_floats(N);
	struct k_fold_seg seg[CHUNKS];
	struct exact_sum sum, want;
	struct fixture f;
	(void)state;

	for (size_t i = 0; i < N; i++)
		both[i] = a[i] + b[i];
	assert_true(fixture_open(&f, k_cpu_ops(), "", 2, &no_dims));
	struct k_fold fold = { seg, cut(seg, dst, a, NULL, 5), NULL };
	f.ops->fold(f.s, &fold); /* dst = a */
	fixture_wait(&f);
	assert_bits("copy", dst, a, N * sizeof(float));
	cut(seg, dst, dst, b, 5);
	f.ops->fold(f.s, &fold); /* dst = dst + b */
	fixture_wait(&f);
	assert_bits("in place", dst, both, N * sizeof(float));
	/* Only the square sum, added to what is there. */
	cut(seg, dst, dst, NULL, 5);
	want = square_reference(both, N);
	exact_sum_merge(&want, &want);
	sum = square_reference(both, N);
	fold.square_sum = &sum;
	f.ops->fold(f.s, &fold);
	fixture_wait(&f);
	assert_bits("square sum", &sum, &want, sizeof(sum));
	dst[5] = NAN;
	f.ops->fold(f.s, &fold);
	fixture_wait(&f);
	assert_int_equal(sum.non_finite, 1);
	fixture_close(&f);
	free(a);
	free(b);
	free(dst);
	free(both);
}

static void adam_reference(const struct k_adam *a, float *p, float *m, float *v)
{
	const float scale = (float)a->grad_scale, b1 = (float)a->beta1, b2 = (float)a->beta2, eps = (float)a->eps;
	const float c1 = (float)(1.0 - a->beta1), c2 = (float)(1.0 - a->beta2), step = (float)(a->lr / a->bias1);
	const float root = (float)sqrt(a->bias2);
	const float decay = (float)(a->decoupled ? a->lr * a->weight_decay : a->weight_decay);

	for (uint64_t i = 0; i < a->n; i++) {
		float g = a->grad[i] * scale;
		if (!a->decoupled)
			g = g + decay * p[i];
		m[i] = b1 * m[i] + c1 * g;
		v[i] = b2 * v[i] + c2 * g * g;
		if (a->decoupled)
			p[i] = p[i] - decay * p[i];
		p[i] = p[i] - step * m[i] / (sqrtf(v[i]) / root + eps);
	}
}

static void check_adam(bool decoupled)
{
	float *g = test_random(N, 4, 5.0), *want[3], *got[3];
	struct k_adam a = { .grad = g,
			    .n = N,
			    .grad_scale = 1.0 / 12.0,
			    .lr = 3e-4,
			    .beta1 = 0.9,
			    .beta2 = 0.95,
			    .eps = 1e-8,
			    .weight_decay = 0.1,
			    .bias1 = 1.0 - 0.9,
			    .bias2 = 1.0 - 0.95,
			    .decoupled = decoupled };

	for (int i = 0; i < 3; i++) {
		want[i] = test_random(N, (uint64_t)i, 1.0);
		got[i] = test_floats(N);
	}
	for (size_t i = 0; i < N; i++)
		want[2][i] = fabsf(want[2][i]);
	float *before = test_floats(3 * N);
	for (int i = 0; i < 3; i++)
		memcpy(before + (size_t)i * N, want[i], N * sizeof(float));
	adam_reference(&a, want[0], want[1], want[2]);
	for (size_t p = 0; p < ARRAY_LEN(isas); p++)
		for (unsigned threads = 1; threads <= 3; threads++) {
			struct fixture f;
			if (!fixture_open(&f, k_cpu_ops(), isas[p], threads, &no_dims))
				continue;
			for (int i = 0; i < 3; i++)
				memcpy(got[i], before + (size_t)i * N, N * sizeof(float));
			/* In two calls: the cut does not matter. */
			a.p = got[0], a.m = got[1], a.v = got[2], a.n = 5 * K_CHUNK;
			f.ops->adam(f.s, &a);
			a.p += a.n, a.m += a.n, a.v += a.n, a.grad += a.n, a.n = N - a.n;
			f.ops->adam(f.s, &a);
			fixture_wait(&f);
			a.grad = g;
			for (int i = 0; i < 3; i++)
				assert_bits("p, m, v", got[i], want[i], N * sizeof(float));
			fixture_close(&f);
		}
	for (int i = 0; i < 3; i++) {
		free(want[i]);
		free(got[i]);
	}
	free(before);
	free(g);
}

static void adam_is_the_written_order(void **state)
{
	(void)state;
	check_adam(true);
	check_adam(false);
}

static struct hash128 hash_of(unsigned threads, float *const s[3], uint32_t unit, uint64_t first, uint64_t chunks)
{
	struct hash128 h = { 0 };
	struct fixture f;

	assert_true(fixture_open(&f, k_cpu_ops(), "portable", threads, &no_dims));
	const struct k_state_hash a = { s[0], s[1], s[2], chunks * K_CHUNK, first, unit, &h };
	f.ops->state_hash(f.s, &a);
	fixture_wait(&f);
	fixture_close(&f);
	return h;
}

static bool hash_equal(struct hash128 a, struct hash128 b)
{
	return a.lo == b.lo && a.hi == b.hi;
}

static void state_hash_sums_chunks_in_any_cut(void **state)
{
	float *const s[3] = { test_random(N, 1, 1.0), test_random(N, 2, 1.0), test_random(N, 3, 1.0) };
	struct hash128 whole = hash_of(1, s, 3, 10, CHUNKS), sum = { 0 }, want = { 0 };
	(void)state;

	for (uint64_t c = 0; c < CHUNKS; c++)
		for (uint64_t part = 0; part < 3; part++)
			want = hash128_add(want, hash128(s[part] + c * K_CHUNK, K_CHUNK * sizeof(float),
							 3ull << 40 | (10 + c) << 2 | part));
	assert_true(hash_equal(whole, want));
	for (unsigned threads = 2; threads <= 3; threads++)
		assert_true(hash_equal(whole, hash_of(threads, s, 3, 10, CHUNKS)));
	for (uint64_t c = 0; c < CHUNKS; c += 5) {
		float *const at[3] = { s[0] + c * K_CHUNK, s[1] + c * K_CHUNK, s[2] + c * K_CHUNK };
		sum = hash128_add(sum, hash_of(2, at, 3, 10 + c, CHUNKS - c < 5 ? CHUNKS - c : 5));
	}
	assert_true(hash_equal(whole, sum));
	/* Where the chunk stands, and which part it is, matters. */
	float *const swapped[3] = { s[0], s[2], s[1] };
	assert_false(hash_equal(whole, hash_of(1, s, 4, 10, CHUNKS)));
	assert_false(hash_equal(whole, hash_of(1, s, 3, 11, CHUNKS)));
	assert_false(hash_equal(whole, hash_of(1, swapped, 3, 10, CHUNKS)));
	for (int i = 0; i < 3; i++)
		free(s[i]);
}

static void copy_and_zero_take_any_length(void **state)
{
	const size_t sizes[] = { 0, 1, 100, (1u << 20) + 17, 5u << 20 };
	struct fixture f;
	(void)state;

	assert_true(fixture_open(&f, k_cpu_ops(), "", 2, &no_dims));
	for (size_t i = 0; i < ARRAY_LEN(sizes); i++) {
		size_t n = sizes[i];
		uint8_t *src = test_alloc(n + 1), *dst = test_alloc(n + 1), *zero = calloc(n + 1, 1);
		for (size_t k = 0; k < n; k++)
			src[k] = (uint8_t)(k * 7 + k / 256);
		f.ops->copy(f.s, dst, src, n);
		fixture_wait(&f);
		assert_bits("copy", dst, src, n);
		f.ops->zero(f.s, dst, n);
		fixture_wait(&f);
		assert_bits("zero", dst, zero, n);
		assert_int_equal(dst[n], 0xff);
		free(src);
		free(dst);
		free(zero);
	}
	fixture_close(&f);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(fold_and_norm_do_not_depend_on_the_cut),
		cmocka_unit_test(fold_copies_adds_in_place_and_sums),
		cmocka_unit_test(adam_is_the_written_order),
		cmocka_unit_test(state_hash_sums_chunks_in_any_cut),
		cmocka_unit_test(copy_and_zero_take_any_length),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
