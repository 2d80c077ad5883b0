/* SPDX-License-Identifier: Apache-2.0 */
#include "worker/sample.h"

#include <assert.h>
#include <math.h>
#include <string.h>

/* det_exp's domain; what is further below the largest has no weight in a double anyway. */
#define EXP_MIN (-690.0)

static uint32_t largest(const float *v, uint32_t n)
{
	uint32_t best = 0;

	for (uint32_t i = 1; i < n; i++)
		if (v[i] > v[best])
			best = i;
	return best;
}

static void sift_down(float *heap, uint32_t n, uint32_t i)
{
	for (uint32_t child; (child = 2 * i + 1) < n; i = child) {
		float v = heap[i];

		if (child + 1 < n && heap[child + 1] < heap[child])
			child++;
		if (v <= heap[child])
			return;
		heap[i] = heap[child];
		heap[child] = v;
	}
}

/* The k-th largest (from 1): the root of a heap of the k largest, smallest on top. */
static float kth_largest(const float *v, uint32_t n, uint32_t k, float *heap)
{
	memcpy(heap, v, k * sizeof(*heap));
	for (uint32_t i = k / 2; i-- > 0;)
		sift_down(heap, k, i);
	for (uint32_t i = k; i < n; i++) {
		if (v[i] > heap[0]) {
			heap[0] = v[i];
			sift_down(heap, k, 0);
		}
	}
	return heap[0];
}

static double weight(float logit, float max, double temperature)
{
	double x = ((double)logit - (double)max) / temperature;

	return x < EXP_MIN ? 0 : det_exp(x);
}

/* How many of the tokens equal to the threshold are within the top k. */
static uint32_t ties_allowed(const float *logits, uint32_t n, uint32_t k, float threshold)
{
	uint32_t above = 0;

	for (uint32_t i = 0; i < n; i++)
		above += logits[i] > threshold;
	assert(above < k);
	return k - above;
}

/* What may be drawn: everything above the threshold, and the first `ties` tokens equal to it. */
struct cut {
	float threshold;
	uint32_t ties;
};

/*
 * Adds up the weights of what may be drawn, in token order, until the sum
 * exceeds `until`; the token it stopped at, or the last one that may be drawn.
 */
static uint32_t walk(const float *logits, uint32_t n, double temperature, float max, struct cut cut, double until,
		     double *sum)
{
	uint32_t seen = 0, last = 0;

	*sum = 0;
	for (uint32_t i = 0; i < n; i++) {
		if (logits[i] < cut.threshold || (logits[i] == cut.threshold && ++seen > cut.ties))
			continue;
		*sum += weight(logits[i], max, temperature);
		last = i;
		if (*sum > until)
			break;
	}
	return last;
}

uint32_t sample_token(const float *logits, uint32_t n, double temperature, uint32_t top_k, double uniform,
		      float *scratch)
{
	struct cut cut = { -INFINITY, n };
	uint32_t best = largest(logits, n);
	double total, sum;

	assert(n > 0);
	if (temperature <= 0 || !isfinite(logits[best]))
		return best;
	if (top_k > 0 && top_k < n) {
		cut.threshold = kth_largest(logits, n, top_k, scratch);
		cut.ties = ties_allowed(logits, n, top_k, cut.threshold);
	}
	walk(logits, n, temperature, logits[best], cut, INFINITY, &total);
	return walk(logits, n, temperature, logits[best], cut, uniform * total, &sum);
}
