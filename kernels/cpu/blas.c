/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The math libraries, loaded at run time: the environment that decides which of
 * their kernels they take is read when they are loaded, and must be the
 * profile's, not the user's. Both are held to one thread; the pool has the
 * threads. A library is never unloaded, since what it keeps per thread and in
 * its OpenMP runtime would be pulled from under the threads.
 */
#include "kernels/cpu/blas.h"

#include <assert.h>
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

enum { CBLAS_ROW_MAJOR = 101, CBLAS_NO_TRANS = 111, CBLAS_TRANS = 112 };

/* dnnl_version_t begins with these, in all its versions. */
struct dnnl_version_head {
	int major, minor, patch;
};

static const char *const
	openblas_core[] = { [K_ISA_PORTABLE] = "Prescott", [K_ISA_AVX2] = "Haswell", [K_ISA_AVX512] = "SkylakeX" };
static const char
	*const dnnl_isa_name[] = { [K_ISA_PORTABLE] = "SSE41", [K_ISA_AVX2] = "AVX2", [K_ISA_AVX512] = "AVX512_CORE" };
static const int dnnl_isa_code[] = { [K_ISA_PORTABLE] = 0x1, [K_ISA_AVX2] = 0x7, [K_ISA_AVX512] = 0x27 };

static void impose_environment(enum k_isa isa)
{
	setenv("OMP_NUM_THREADS", "1", 1);
	setenv("OPENBLAS_NUM_THREADS", "1", 1);
	setenv("OPENBLAS_CORETYPE", openblas_core[isa], 1);
	setenv("DNNL_MAX_CPU_ISA", dnnl_isa_name[isa], 1);
	setenv("ONEDNN_MAX_CPU_ISA", dnnl_isa_name[isa], 1);
}

static void *load(const char *const *names, struct err *e)
{
	for (; *names; names++) {
		void *lib = dlopen(*names, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
		if (lib)
			return lib;
	}
	err_set(e, -ENOENT, "%s", dlerror());
	return NULL;
}

/* POSIX's way around the missing conversion from object to function pointer. */
static int symbol(void *lib, const char *name, void *fn, struct err *e)
{
	void *p = dlsym(lib, name);
	if (!p)
		return err_set(e, -ENOENT, "%s is missing", name);
	memcpy(fn, &p, sizeof(p));
	return 0;
}

static int open_dnnl(enum k_isa isa, struct blas *b, struct err *e)
{
	static const char *const names[] = { "libdnnl.so.3", "libdnnl.so.2", NULL };
	const struct dnnl_version_head *(*version)(void) = NULL;
	int (*effective_isa)(void) = NULL;

	void *lib = load(names, e);
	if (!lib)
		return -ENOENT;
	if (symbol(lib, "dnnl_sgemm", &b->dnnl, e) || symbol(lib, "dnnl_version", &version, e) ||
	    symbol(lib, "dnnl_get_effective_cpu_isa", &effective_isa, e))
		return err_prefix(e, "libdnnl");
	if (effective_isa() != dnnl_isa_code[isa])
		return err_set(e, -ENOTSUP, "libdnnl runs with instruction set 0x%x instead of %s in this process",
			       effective_isa(), dnnl_isa_name[isa]);
	const struct dnnl_version_head *v = version();
	snprintf(b->version, sizeof(b->version), "%d.%d.%d", v->major, v->minor, v->patch);
	/* Only there when oneDNN was built on OpenMP. */
	symbol(lib, "omp_set_num_threads", &b->omp_set_num_threads, NULL);
	return 0;
}

/* "OpenBLAS 0.3.21 NO_LAPACKE DYNAMIC_ARCH ..." */
static void openblas_version(const char *config, char out[32])
{
	const char *at = strncmp(config, "OpenBLAS ", 9) == 0 ? config + 9 : config;
	size_t n = strcspn(at, " ");

	snprintf(out, 32, "%.*s", n < 31 ? (int)n : 31, at);
}

static int open_openblas(enum k_isa isa, struct blas *b, struct err *e)
{
	static const char *const names[] = { "libopenblas.so.0", NULL };
	const char *(*config)(void) = NULL, *(*core)(void) = NULL;
	void (*set_threads)(int) = NULL;

	void *lib = load(names, e);
	if (!lib)
		return -ENOENT;
	if (symbol(lib, "cblas_sgemm", &b->cblas, e) || symbol(lib, "openblas_get_config", &config, e) ||
	    symbol(lib, "openblas_get_corename", &core, e) || symbol(lib, "openblas_set_num_threads", &set_threads, e))
		return err_prefix(e, "libopenblas");
	if (strcasecmp(core(), openblas_core[isa]) != 0)
		return err_set(e, -ENOTSUP, "libopenblas runs with the kernels of %s instead of %s in this process",
			       core(), openblas_core[isa]);
	set_threads(1);
	openblas_version(config(), b->version);
	symbol(lib, "omp_set_num_threads", &b->omp_set_num_threads, NULL);
	return 0;
}

void blas_thread_init(const struct blas *b)
{
	if (b->omp_set_num_threads)
		b->omp_set_num_threads(1);
}

void blas_gemm(const struct blas *b, const struct gemm *g)
{
	if (b->library == K_LIB_DNNL) {
		int rc = b->dnnl(g->ta ? 'T' : 'N', g->tb ? 'T' : 'N', g->m, g->n, g->k, 1.0f, g->a, (int64_t)g->lda,
				 g->b, (int64_t)g->ldb, g->beta, g->c, (int64_t)g->ldc);
		assert(rc == 0);
		return;
	}
	b->cblas(CBLAS_ROW_MAJOR, g->ta ? CBLAS_TRANS : CBLAS_NO_TRANS, g->tb ? CBLAS_TRANS : CBLAS_NO_TRANS, (int)g->m,
		 (int)g->n, (int)g->k, 1.0f, g->a, (int)g->lda, g->b, (int)g->ldb, g->beta, g->c, (int)g->ldc);
}

/* A weight gradient's layout: the first operand is stored transposed. */
static bool adds_one(const struct blas *b, uint32_t m, uint32_t n, uint32_t k, const float *in, float *out)
{
	const size_t all = (size_t)m * n;
	struct gemm g = { .ta = true, .m = m, .n = n, .k = k, .a = in, .lda = m, .b = in + 7, .ldb = n, .ldc = n };
	bool same = true;

	for (size_t i = 0; i < all; i++)
		out[i] = in[i % 1000];
	g.beta = 1.0f;
	g.c = out;
	blas_gemm(b, &g);
	g.beta = 0.0f;
	g.c = out + all;
	blas_gemm(b, &g);
	for (size_t i = 0; i < all; i++)
		same = same && out[i] == in[i % 1000] + out[all + i];
	return same;
}

static bool adds_products(const struct blas *b)
{
	static const uint32_t shape[][3] = { { 192, 400, 128 }, { 50, 97, 128 }, { 17, 16, 127 }, { 96, 48, 64 } };
	enum { IN = 7 + 400 * 128, OUT = 2 * 192 * 400 };
	float *in = malloc((IN + OUT) * sizeof(*in));
	bool same = in;

	if (in)
		rng_fill_normal(in, IN, 1, 0, 0, 0.0f, 1.0f);
	for (size_t i = 0; same && i < ARRAY_LEN(shape); i++)
		same = adds_one(b, shape[i][0], shape[i][1], shape[i][2], in, in + IN);
	free(in);
	return same;
}

int blas_open(enum k_library library, enum k_isa isa, struct blas *out, struct err *e)
{
	struct blas b = { .library = library };
	int rc = 0;

	if (library != K_LIB_PORTABLE)
		impose_environment(isa);
	if (library == K_LIB_DNNL)
		rc = open_dnnl(isa, &b, e);
	else if (library == K_LIB_OPENBLAS)
		rc = open_openblas(isa, &b, e);
	else
		snprintf(b.version, sizeof(b.version), "1");
	if (rc)
		return rc;
	blas_thread_init(&b);
	b.adds_products = library == K_LIB_PORTABLE || adds_products(&b);
	*out = b;
	return 0;
}
