/* SPDX-License-Identifier: Apache-2.0 */
#ifndef SHARDMESH_KERNELS_CPU_BLAS_H
#define SHARDMESH_KERNELS_CPU_BLAS_H

#include "kernels/cpu/isa/isa.h"

typedef int dnnl_sgemm_fn(char ta, char tb, int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda,
			  const float *b, int64_t ldb, float beta, float *c, int64_t ldc);
typedef void cblas_sgemm_fn(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda,
			    const float *b, int ldb, float beta, float *c, int ldc);

/*
 * With beta = 1 and at most so many inner products, is the result that of a product of its own that is added
 * afterwards, bit for bit? So it is where an element is summed in registers before it meets C, and not where C is what
 * the sum begins with. Tried out with products of several shapes when the library is opened: which kernels it takes is
 * not documented.
 */
#define BLAS_ADDED_INNER_MAX 128u

/* A loaded library for products; all of it zero for the portable one. */
struct blas {
	enum k_library library;
	char version[32];
	dnnl_sgemm_fn *dnnl;
	cblas_sgemm_fn *cblas;
	bool adds_products; /* as BLAS_ADDED_INNER_MAX says */
	void (*omp_set_num_threads)(int n);
};

/*
 * Loads the library after setting the environment that makes it take isa's
 * kernels on one thread. A loaded library stays loaded. -ENOENT: not installed;
 * -ENOTSUP: it was loaded before, in this process, with other kernels.
 */
int blas_open(enum k_library library, enum k_isa isa, struct blas *out, struct err *e);
/* Once on every thread that computes. */
void blas_thread_init(const struct blas *b);
/* Not for the portable library. */
void blas_gemm(const struct blas *b, const struct gemm *g);

#endif
