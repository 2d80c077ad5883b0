/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The floor of a training step: its matrix products and nothing else.
 *
 *   floor LIBRARY SPLIT SEQUENCE [RUNS [THREADS]]
 *
 * GPT-2 124M, 2 micro-batches of 2 sequences, fp32. For each of the 12 blocks'
 * four layers and for the tied vocabulary of 50257, and for each micro-batch:
 * the forward product as the weights are stored ([in][out], the vocabulary
 * [out][in]), the data gradient and the weight gradient; none of them twice, no
 * addition of the micro-batches' weight gradients, no bias, no activation. The
 * attention's own products (q k^T, p v and their gradients) are not in it: they
 * are no library calls here, and the step's time for them counts above the floor.
 * Operands lie where a step has them: weights and kept activations of each
 * layer in memory of their own, one gradient buffer that the layers share. A
 * tile of a weight gradient is computed for both micro-batches in turn, while
 * its place is in the cache.
 *
 * LIBRARY is dnnl or openblas. SPLIT is own, the library's own threads, a call a
 * product; or coarse, medium, fine: our threads take tiles of a grid, each a
 * single-threaded call with the whole inner dimension. The library is loaded
 * after its environment is set, so a process measures one library and split.
 * The threads spin, which a floor may.
 *
 * Prints one JSON object with the seconds of each run.
 */
#include <assert.h>
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "base/base.h"

enum { LAYERS = 12, CHANNELS = 768, VOCAB = 50257, MICRO = 2, MICRO_BATCH = 2, LINEARS = 4, THREADS_MAX = 256 };
enum { SPLITS = 4, RUNS_MAX = 1000, PRODUCTS_MAX = 1 + MICRO };

/* A block's layers in the order of the forward: columns in and out, in channels. */
static const struct {
	uint32_t in, out;
} linear[LINEARS] = { { 1, 3 }, { 1, 1 }, { 1, 4 }, { 4, 1 } };

/* Parts that a product's sides are cut into; the columns of a weight gradient into steps of about so many. */
struct split {
	const char *name;
	uint32_t cols, vocab_cols, weight_rows, vocab_weight_rows, weight_cols;
};
static const struct split splits[SPLITS] = {
	{ .name = "own",
	  .cols = 1,
	  .vocab_cols = 1,
	  .weight_rows = 1,
	  .vocab_weight_rows = 1,
	  .weight_cols = 4 * CHANNELS },
	{ "coarse", 2, 8, 2, 8, 1536 },
	{ "medium", 4, 32, 4, 32, 768 },
	{ "fine", 8, 64, 4, 64, 768 },
};

/* -------------------------------------------------------------------- library */

typedef int dnnl_fn(char ta, char tb, int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda,
		    const float *b, int64_t ldb, float beta, float *c, int64_t ldc);
typedef void cblas_fn(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda,
		      const float *b, int ldb, float beta, float *c, int ldc);

struct library {
	dnnl_fn *dnnl;
	cblas_fn *cblas;
	char version[64];
};

/* POSIX's way around the missing conversion from object to function pointer. */
static int symbol(void *lib, const char *name, void *fn, struct err *e)
{
	void *p = dlsym(lib, name);

	if (!p)
		return err_set(e, -ENOENT, "%s is missing", name);
	memcpy(fn, &p, sizeof(p));
	return 0;
}

/* OpenBLAS before 0.3.22 knows no processor newer than it is and takes a very old one's kernels; so it is told. */
static const char *openblas_core(void)
{
#if defined(__x86_64__)
	__builtin_cpu_init();
	if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl"))
		return "SkylakeX";
	if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
		return "Haswell";
#endif
	return NULL;
}

static void set_environment(unsigned threads)
{
	const char *core = openblas_core();
	char n[16];

	snprintf(n, sizeof(n), "%u", threads);
	setenv("OMP_NUM_THREADS", n, 1);
	setenv("OPENBLAS_NUM_THREADS", n, 1);
	if (core)
		setenv("OPENBLAS_CORETYPE", core, 1);
}

static int open_dnnl(struct library *l, struct err *e)
{
	static const char *const names[] = { "libdnnl.so.3", "libdnnl.so.2" };
	const int *(*version)(void) = NULL;
	void *lib = NULL;

	for (size_t i = 0; i < ARRAY_LEN(names) && !lib; i++)
		lib = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
	if (!lib)
		return err_set(e, -ENOENT, "%s", dlerror());
	if (symbol(lib, "dnnl_sgemm", &l->dnnl, e) || symbol(lib, "dnnl_version", &version, e))
		return e->code;
	/* dnnl_version_t begins with major, minor and patch, in all its versions. */
	snprintf(l->version, sizeof(l->version), "%d.%d.%d", version()[0], version()[1], version()[2]);
	return 0;
}

static int open_openblas(struct library *l, struct err *e)
{
	char *(*config)(void) = NULL, *(*core)(void) = NULL;
	void *lib = dlopen("libopenblas.so.0", RTLD_NOW | RTLD_LOCAL);

	if (!lib)
		return err_set(e, -ENOENT, "%s", dlerror());
	if (symbol(lib, "cblas_sgemm", &l->cblas, e) || symbol(lib, "openblas_get_config", &config, e) ||
	    symbol(lib, "openblas_get_corename", &core, e))
		return e->code;
	snprintf(l->version, sizeof(l->version), "%.*s %s", (int)strcspn(config() + strlen("OpenBLAS "), " "),
		 config() + strlen("OpenBLAS "), core());
	return 0;
}

static int library_open(const char *name, unsigned threads, struct library *l, struct err *e)
{
	set_environment(threads);
	if (!strcmp(name, "dnnl"))
		return open_dnnl(l, e);
	if (!strcmp(name, "openblas"))
		return open_openblas(l, e);
	return err_set(e, -EINVAL, "no library \"%s\": dnnl or openblas", name);
}

/* ------------------------------------------------------------------- products */

/* c[m][n] = a b, a stored [k][m] if ta, b stored [n][k] if tb; `times` products of operands that lie back to back. */
struct product {
	bool ta, tb;
	uint32_t m, n, k, times;
	const float *a, *b;
	float *c;
	uint32_t row_step, col_step; /* of the tile grid */
};

static void multiply(const struct library *l, const struct product *p, uint32_t row, uint32_t rows, uint32_t col,
		     uint32_t cols)
{
	enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };
	const uint32_t lda = p->ta ? p->m : p->k, ldb = p->tb ? p->k : p->n;
	const float *a = p->a + (p->ta ? row : (size_t)row * lda), *b = p->b + (p->tb ? (size_t)col * ldb : col);
	float *c = p->c + (size_t)row * p->n + col;

	for (uint32_t i = 0; i < p->times; i++, a += (size_t)p->m * p->k, b += (size_t)p->n * p->k) {
		if (l->dnnl) {
			int rc = l->dnnl(p->ta ? 'T' : 'N', p->tb ? 'T' : 'N', rows, cols, p->k, 1.0f, a, lda, b, ldb,
					 0.0f, c, p->n);
			assert(rc == 0);
			continue;
		}
		l->cblas(ROW_MAJOR, p->ta ? TRANS : NO_TRANS, p->tb ? TRANS : NO_TRANS, (int)rows, (int)cols, (int)p->k,
			 1.0f, a, (int)lda, b, (int)ldb, 0.0f, c, (int)p->n);
	}
}

/* Step that cuts n into at most `parts`, a whole number of the libraries' register tiles. */
static uint32_t step_of(uint32_t n, uint32_t parts)
{
	return (uint32_t)round_up_u64((n + parts - 1) / parts, 96);
}

static uint32_t tiles_of(uint32_t n, uint32_t step)
{
	return n > step ? n / step + (n % step != 0) : 1;
}

/* ----------------------------------------------------------------------- pool */

/* Products that do not wait for each other; threads take tiles of all of them from one counter. */
struct job {
	struct product p[PRODUCTS_MAX];
	uint32_t tile_end[PRODUCTS_MAX]; /* running count of tiles */
	uint32_t n;
};

struct pool {
	const struct library *library;
	unsigned threads;
	pthread_t thread[THREADS_MAX];
	struct job job;
	_Atomic uint32_t next;       /* tile to take */
	_Atomic uint64_t generation; /* jobs begun */
	_Atomic unsigned working;    /* threads that have not finished the job */
	_Atomic bool quit;
};

static void work(struct pool *w)
{
	const struct job *j = &w->job;
	uint32_t all = j->tile_end[j->n - 1], t;

	while ((t = atomic_fetch_add(&w->next, 1)) < all) {
		const struct product *p = j->p;
		uint32_t i = 0, row, col, wide;

		while (t >= j->tile_end[i])
			i++;
		p += i;
		t -= i ? j->tile_end[i - 1] : 0;
		wide = tiles_of(p->n, p->col_step);
		row = t / wide * p->row_step;
		col = t % wide * p->col_step;
		multiply(w->library, p, row, p->m - row < p->row_step ? p->m - row : p->row_step, col,
			 p->n - col < p->col_step ? p->n - col : p->col_step);
	}
}

static void *pool_main(void *arg)
{
	struct pool *w = arg;
	uint64_t seen = 0;

	for (;;) {
		for (uint32_t spins = 0; atomic_load(&w->generation) == seen; spins++)
			if (spins > 10000)
				sched_yield();
		seen++;
		if (atomic_load(&w->quit))
			return NULL;
		work(w);
		atomic_fetch_sub(&w->working, 1);
	}
}

static int pool_open(struct pool *w, const struct library *l, unsigned threads, struct err *e)
{
	w->library = l;
	w->threads = threads;
	for (unsigned i = 1; i < threads; i++) {
		int rc = pthread_create(&w->thread[i], NULL, pool_main, w);

		if (rc)
			return err_set(e, -rc, "cannot start a thread: %s", strerror(rc));
	}
	return 0;
}

static void pool_close(struct pool *w)
{
	atomic_store(&w->quit, true);
	atomic_fetch_add(&w->generation, 1);
	for (unsigned i = 1; i < w->threads; i++)
		pthread_join(w->thread[i], NULL);
}

static void run_tiles(struct pool *w)
{
	struct job *j = &w->job;

	for (uint32_t i = 0, end = 0; i < j->n; i++) {
		end += tiles_of(j->p[i].m, j->p[i].row_step) * tiles_of(j->p[i].n, j->p[i].col_step);
		j->tile_end[i] = end;
	}
	atomic_store(&w->next, 0);
	atomic_store(&w->working, w->threads - 1);
	atomic_fetch_add(&w->generation, 1);
	work(w);
	for (uint32_t spins = 0; atomic_load(&w->working); spins++)
		if (spins > 10000)
			sched_yield();
}

/* ----------------------------------------------------------------------- step */

struct step {
	const struct split *split; /* splits[0]: the library's own threads */
	struct pool pool;
	uint32_t rows; /* of a micro-batch */
	/* Weights and kept inputs of each layer; gradients that come in from behind, by their width in channels. */
	float *w[LAYERS][LINEARS], *x[LAYERS][LINEARS], *y[LAYERS][LINEARS];
	float *wte, *lnf, *logits, *dy[5], *dx, *dw;
	struct arena arena;
};

static void run_products(struct step *s)
{
	struct pool *w = &s->pool;

	if (s->split != &splits[0]) {
		run_tiles(w);
		return;
	}
	for (uint32_t i = 0; i < w->job.n; i++)
		multiply(w->library, &w->job.p[i], 0, w->job.p[i].m, 0, w->job.p[i].n);
}

/* An activation: a product a micro-batch. */
static void add_rows(struct step *s, const struct product *all, uint32_t cols)
{
	struct job *j = &s->pool.job;

	for (uint32_t k = 0; k < MICRO; k++) {
		struct product *p = &j->p[j->n++];

		*p = *all;
		p->times = 1;
		p->m = p->row_step = s->rows;
		p->a += (size_t)k * s->rows * p->k;
		p->c += (size_t)k * s->rows * p->n;
		p->col_step = step_of(p->n, cols);
	}
}

static void forward(struct step *s, const float *x, const float *w, float *y, uint32_t in, uint32_t out, bool vocab)
{
	s->pool.job.n = 0;
	add_rows(s, &(struct product){ .tb = vocab, .n = out, .k = in, .a = x, .b = w, .c = y },
		 vocab ? s->split->vocab_cols : s->split->cols);
	run_products(s);
}

/* The weight gradient, the longer tasks, first. The vocabulary's matrix is [out][in], the others [in][out]. */
static void backward(struct step *s, const float *x, const float *w, const float *dy, uint32_t in, uint32_t out,
		     bool vocab)
{
	const uint32_t m = vocab ? out : in, n = vocab ? in : out;

	s->pool.job.n = 1;
	s->pool.job.p[0] = (struct product){
		.ta = true,
		.m = m,
		.n = n,
		.k = s->rows,
		.times = MICRO,
		.a = vocab ? dy : x,
		.b = vocab ? x : dy,
		.c = s->dw,
		.row_step = step_of(m, vocab ? s->split->vocab_weight_rows : s->split->weight_rows),
		.col_step = step_of(n, tiles_of(n, s->split->weight_cols)),
	};
	add_rows(s, &(struct product){ .tb = !vocab, .n = in, .k = out, .a = dy, .b = w, .c = s->dx }, s->split->cols);
	run_products(s);
}

static void run_step(struct step *s)
{
	const uint32_t c = CHANNELS;

	for (uint32_t l = 0; l < LAYERS; l++)
		for (uint32_t i = 0; i < LINEARS; i++)
			forward(s, s->x[l][i], s->w[l][i], s->y[l][i], c * linear[i].in, c * linear[i].out, false);
	forward(s, s->lnf, s->wte, s->logits, c, VOCAB, true);
	backward(s, s->lnf, s->wte, s->logits, c, VOCAB, true);
	for (uint32_t l = LAYERS; l-- > 0;)
		for (uint32_t i = LINEARS; i-- > 0;)
			backward(s, s->x[l][i], s->w[l][i], s->dy[linear[i].out], c * linear[i].in, c * linear[i].out,
				 false);
}

/* Values of a step's size: small enough that nothing overflows, none that is subnormal. */
static float *take(struct step *s, size_t n)
{
	float *f = arena_alloc(&s->arena, n * sizeof(*f), CACHE_LINE);
	uint32_t v = 1;

	assert(f);
	for (size_t i = 0; i < n; i++) {
		v = v * 1664525u + 1013904223u;
		f[i] = ((float)(v >> 8) * 0x1p-24f - 0.5f) * 0.1f;
	}
	return f;
}

static int step_open(struct step *s, uint32_t sequence, struct err *e)
{
	const size_t c = CHANNELS, rows = (size_t)MICRO * MICRO_BATCH * sequence, vocab = (size_t)VOCAB * c;
	int rc;

	s->rows = MICRO_BATCH * sequence;
	rc = arena_init(&s->arena, "floor",
			(LAYERS * (12 * c * c + 18 * rows * c) + 2 * vocab + rows * (20 * c + VOCAB)) * sizeof(float));
	if (rc)
		return err_set(e, rc, "no memory for the operands");
	for (uint32_t l = 0; l < LAYERS; l++)
		for (uint32_t i = 0; i < LINEARS; i++) {
			s->w[l][i] = take(s, c * c * linear[i].in * linear[i].out);
			s->x[l][i] = take(s, rows * c * linear[i].in);
			s->y[l][i] = take(s, rows * c * linear[i].out);
		}
	for (uint32_t i = 1; i < ARRAY_LEN(s->dy); i++)
		s->dy[i] = take(s, rows * c * i);
	s->wte = take(s, vocab);
	s->lnf = take(s, rows * c);
	s->dx = take(s, rows * c * 4);
	s->logits = take(s, rows * VOCAB);
	s->dw = take(s, vocab);
	return 0;
}

/* ----------------------------------------------------------------------- main */

static const struct split *find_split(const char *name)
{
	for (size_t i = 0; i < SPLITS; i++)
		if (!strcmp(splits[i].name, name))
			return &splits[i];
	return NULL;
}

static void measure(struct step *s, const char *library, uint32_t runs)
{
	run_step(s);
	printf("{\"library\": \"%s\", \"version\": \"%s\", \"split\": \"%s\", \"seconds\": [", library,
	       s->pool.library->version, s->split->name);
	for (uint32_t i = 0; i < runs; i++) {
		uint64_t begin = clock_now_ns();

		run_step(s);
		printf("%s%.6f", i ? ", " : "", clock_seconds(clock_now_ns() - begin));
	}
	printf("]}\n");
}

static unsigned cores(void)
{
	cpu_set_t set;

	return sched_getaffinity(0, sizeof(set), &set) ? 1 : (unsigned)CPU_COUNT(&set);
}

int main(int argc, char **argv)
{
	const struct split *split = argc > 2 ? find_split(argv[2]) : NULL;
	uint32_t sequence = argc > 3 ? (uint32_t)strtoul(argv[3], NULL, 10) : 0;
	uint32_t runs = argc > 4 ? (uint32_t)strtoul(argv[4], NULL, 10) : 5;
	unsigned threads = argc > 5 ? (unsigned)strtoul(argv[5], NULL, 10) : cores();
	struct library library = { 0 };
	struct step s = { .split = split };
	struct err e = { 0 };
	bool own = split == &splits[0];

	if (!split || !sequence || sequence > 1024 || !runs || runs > RUNS_MAX || !threads || threads > THREADS_MAX) {
		fprintf(stderr, "usage: floor dnnl|openblas own|coarse|medium|fine SEQUENCE [RUNS [THREADS]]\n");
		return EXIT_USAGE;
	}
	if (library_open(argv[1], own ? threads : 1, &library, &e) ||
	    pool_open(&s.pool, &library, own ? 1 : threads, &e) || step_open(&s, sequence, &e)) {
		fprintf(stderr, "floor: %s\n", e.text);
		return EXIT_JOB_FAILED;
	}
	measure(&s, argv[1], runs);
	pool_close(&s.pool);
	arena_release(&s.arena);
	return EXIT_OK;
}
