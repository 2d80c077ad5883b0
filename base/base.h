/* SPDX-License-Identifier: Apache-2.0 */
/*
 * base: what every other folder may include, and which includes none of them.
 *
 * Conventions of the whole tree: functions return 0 or -Exxx, outputs are
 * written only on success; S_init does not allocate S, S_release frees what S
 * holds, S_free also frees S. Nothing here keeps global state.
 */
#ifndef SHARDMESH_BASE_H
#define SHARDMESH_BASE_H

#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define SHARDMESH_VERSION "0.1.0"

#define ARRAY_LEN(a) (sizeof(a) / sizeof((a)[0]))
#define CACHE_LINE 64
#define PRINTF_LIKE(f, a) __attribute__((format(printf, f, a)))

static inline uint64_t round_up_u64(uint64_t v, uint64_t to)
{
	return (v + to - 1) / to * to;
}

/* ------------------------------------------------------------------ errors */

/* Exit codes of every program (docs: "Programs"). 128+n: ended by signal n. */
enum exit_code {
	EXIT_OK = 0,
	EXIT_JOB_FAILED = 1, /* the last line says why */
	EXIT_USAGE = 2,
	EXIT_CONFIG = 42,
	EXIT_RETRY_LATER = 75,
	EXIT_DRAINED = 80,
};

/* Error with its text, for parsers and start-up. Data paths use bare -Exxx. */
struct err {
	int code; /* 0 or -Exxx; -EINVAL in a config means exit 42 */
	char text[1024];
};

/* Fills e (e may be NULL) with a formatted text; returns code (below 0), for `return err_set(...)`. */
int err_set(struct err *e, int code, const char *fmt, ...) PRINTF_LIKE(3, 4);
/* So that a compiler sees that what comes back is no success, and does not fear for outputs that are not written. */
#define err_set(e, code, ...)                         \
	({                                            \
		int err_code_ = (code);               \
		err_set((e), err_code_, __VA_ARGS__); \
		if (err_code_ >= 0)                   \
			__builtin_unreachable();      \
		err_code_;                            \
	})
/* Puts "prefix: " before the text that e holds; returns e->code. */
int err_prefix(struct err *e, const char *fmt, ...) PRINTF_LIKE(2, 3);

/* --------------------------------------------------------------------- log */

enum log_level { LOG_DEBUG, LOG_INFO, LOG_WARN, LOG_ERROR, LOG_LEVELS };
enum log_format { LOG_TEXT, LOG_JSON };

/* One per process, owned by main, handed down by pointer; a NULL log drops all. */
struct log {
	int fd;      /* where lines go */
	int warn_fd; /* -1, or a second fd for warnings and errors (the launcher's) */
	enum log_level level;
	enum log_format format;
	char who[64]; /* "worker-3": stands in every line */
	_Atomic uint64_t count[LOG_LEVELS];
};

/*
 * format: LOG_TEXT on a terminal, else LOG_JSON, unless the caller says. warn_fd:
 * what a launcher handed down as SHARDMESH_WARN_FD, else none. No allocation.
 */
void log_init(struct log *l, int fd, const char *who);
int log_level_parse(const char *name, enum log_level *out);
/*
 * Any thread; one write(2) a line, so lines do not interleave (a file is opened
 * with O_APPEND for that). `where` is "file.c:123". warn_fd gets text when it
 * is a terminal, else the log's own format. errno is kept, and %m works.
 */
void log_write(struct log *l, enum log_level level, const char *where, const char *fmt, ...) PRINTF_LIKE(4, 5);

#define LOG_STR2(x) #x
#define LOG_STR(x) LOG_STR2(x)
#define LOG_WHERE __FILE_NAME__ ":" LOG_STR(__LINE__)
#define log_debug(l, ...) log_write((l), LOG_DEBUG, LOG_WHERE, __VA_ARGS__)
#define log_info(l, ...) log_write((l), LOG_INFO, LOG_WHERE, __VA_ARGS__)
#define log_warn(l, ...) log_write((l), LOG_WARN, LOG_WHERE, __VA_ARGS__)
#define log_error(l, ...) log_write((l), LOG_ERROR, LOG_WHERE, __VA_ARGS__)

/* ------------------------------------------------------------------- clock */

uint64_t clock_now_ns(void);  /* CLOCK_MONOTONIC */
uint64_t clock_wall_ns(void); /* CLOCK_REALTIME */
static inline double clock_seconds(uint64_t ns)
{
	return (double)ns * 1e-9;
}

/* ------------------------------------------------------------------- arena */

/*
 * A planned piece of anonymous memory, cut from the front. All memory of a
 * process is planned before the first step: running out is a bug in the plan,
 * so arena_alloc reports it and the caller names the plan's line.
 */
struct arena {
	char name[32];
	uint8_t *base;
	size_t size, used;
};

/* mmaps size bytes, zeroed, transparent hugepages asked for. -ENOMEM. */
int arena_init(struct arena *a, const char *name, size_t size);
void arena_release(struct arena *a);
/* align: power of two, at most 4096. NULL when the plan's size is exceeded. */
void *arena_alloc(struct arena *a, size_t bytes, size_t align);

/* -------------------------------------------------------------------- ring */

/*
 * Single-producer single-consumer ring of fixed-size items. The consumer may
 * sleep on an eventfd; the producer writes it only when the consumer said it
 * sleeps (seq_cst flag, then re-check), so a busy pair makes no system calls.
 * Cache-line aligned: a structure that holds one is not for plain malloc.
 */
struct ring {
	uint8_t *slots;
	uint32_t item_bytes, capacity; /* capacity: power of two */
	int event_fd;
	_Alignas(CACHE_LINE) _Atomic uint32_t head; /* next to pop */
	_Alignas(CACHE_LINE) _Atomic uint32_t tail; /* next to push */
	_Alignas(CACHE_LINE) _Atomic uint32_t sleeping;
	_Atomic uint64_t wakeups; /* counted system calls */
};

int ring_init(struct ring *r, uint32_t item_bytes, uint32_t capacity);
void ring_release(struct ring *r);
/* Producer. False when full. */
bool ring_push(struct ring *r, const void *item);
/* Consumer. False when empty. */
bool ring_pop(struct ring *r, void *item);
/*
 * Consumer that is a plain thread: sleeps until something is there or
 * timeout_ns is over. True when an item is there.
 */
bool ring_wait(struct ring *r, uint64_t timeout_ns);
/*
 * Consumer that sleeps in an event loop on r->event_fd: call ring_arm before
 * going to sleep; false means items are there, so drain again instead.
 * ring_disarm after the fd fired (reads the eventfd).
 */
bool ring_arm(struct ring *r);
void ring_disarm(struct ring *r);

/* --------------------------------------------- counter-based random numbers */

/*
 * Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
 * SC'11). Everything random in a job is a pure function of (seed, stream,
 * counter), never of rank or thread.
 */
void rng_philox4x32(const uint32_t key[2], const uint32_t ctr[4], uint32_t out[4]);
/* 64 random bits for (seed, stream, i). */
uint64_t rng_u64(uint64_t seed, uint64_t stream, uint64_t i);
/* Uniform in (0,1): odd multiples of 2^-53. */
double rng_uniform(uint64_t seed, uint64_t stream, uint64_t i);
/*
 * Standard normal for (seed, stream, i): Box-Muller on one Philox block a pair
 * of elements, with det_log/det_sincos; same bits on every machine. Shares its
 * blocks with rng_u64, so a stream is used for one of the two.
 */
float rng_normal(uint64_t seed, uint64_t stream, uint64_t i);
/* out[k] = mean + std * rng_normal(seed, stream, first + k); fast for long spans. */
void rng_fill_normal(float *out, uint64_t n, uint64_t seed, uint64_t stream, uint64_t first, float mean, float std);
/* A permutation of 0..n-1 by a cycle-walking Feistel network; n >= 1, i < n. */
uint64_t rng_permute(uint64_t seed, uint64_t stream, uint64_t n, uint64_t i);

/* ------------------------------------------------ routines in written order */

/*
 * Double-precision routines made of + - * / sqrt only, in a written order and
 * without contraction, so that schedule, bias corrections and initialisation
 * have the same bits on every machine. Within 2 ulp of libm on their domain.
 */
double det_log(double x);                        /* x > 0, normal */
double det_exp(double x);                        /* |x| < 700 */
double det_pow(double x, double y);              /* x > 0; exp(y * log x) with a compensated product */
double det_pow_u64(double x, uint64_t n);        /* by squaring, written order */
void det_sincos(double x, double *s, double *c); /* |x| <= 1e5 */

/* -------------------------------------------------------------------- hash */

struct hash128 {
	uint64_t lo, hi;
};

uint64_t hash64(const void *data, size_t bytes, uint64_t seed);        /* XXH3-64 */
struct hash128 hash128(const void *data, size_t bytes, uint64_t seed); /* XXH3-128 */
/* a + b mod 2^128. */
struct hash128 hash128_add(struct hash128 a, struct hash128 b);
/* Writes 32 hex digits and a NUL, high half first. */
void hash128_hex(struct hash128 h, char out[33]);

/* --------------------------------------------------------------- exact sum */

/*
 * Sum of non-negative finite doubles that no order and no partition changes:
 * each addend is truncated to a multiple of 2^-240 and added to a 512-bit
 * integer (little-endian words). A non-finite or negative addend sets the flag.
 */
#define EXACT_SUM_WORDS 8
#define EXACT_SUM_FRACTION_BITS 240
struct exact_sum {
	uint64_t w[EXACT_SUM_WORDS];
	uint64_t non_finite; /* 0 or 1 */
};

void exact_sum_clear(struct exact_sum *s);
void exact_sum_add(struct exact_sum *s, double x);
void exact_sum_merge(struct exact_sum *into, const struct exact_sum *from);
/* Nearest-below double (truncation of the integer to 53 bits); +inf if the flag is set. */
double exact_sum_value(const struct exact_sum *s);

/* ------------------------------------------------------------ command line */

/*
 * One table a program. A flag is accepted with dashes or underscores, as
 * "--flag value" or "--flag=value", and from the environment variable
 * SHARDMESH_<FLAG> (upper case, underscores; empty counts as not given) when it
 * is not on the line. "--" ends the flags.
 */
enum opt_kind { OPT_FLAG, OPT_STR, OPT_U64, OPT_F64 };
struct opt {
	const char *name; /* with dashes: "rdzv-endpoint" */
	enum opt_kind kind;
	void *out;       /* bool *, const char **, uint64_t *, double * */
	const char *arg; /* "HOST:PORT" for the help text */
	const char *help;
	bool set; /* written by opt_parse */
};

/*
 * Parses argv[1..argc) (argv[0] is skipped). Ends with a {0} entry. Strings
 * point into argv or the environment. *rest: index of the first operand (argv
 * is permuted so that operands come last). -EINVAL: e says which flag, what
 * was expected and the nearest known flag.
 */
int opt_parse(struct opt *opts, int argc, char **argv, int *rest, struct err *e);
void opt_help(FILE *f, const struct opt *opts);
/* Levenshtein-nearest of names (NULL-ended), or NULL when nothing is near. */
const char *nearest_name(const char *word, const char *const *names);

/* ------------------------------------------------------------------- files */

/* Reads a whole file (-EFBIG above max bytes); *out is malloced, NUL-ended. e names the file. */
int file_read(const char *path, size_t max, char **out, size_t *bytes, struct err *e);
/* Writes via temp file, fsync, rename. */
int file_write_atomic(const char *path, const void *data, size_t bytes, unsigned mode, struct err *e);
/* All of it or -errno; EINTR retried. pread_full: -ENODATA when the file ends before. */
int write_full(int fd, const void *data, size_t bytes);
int pwrite_full(int fd, const void *data, size_t bytes, uint64_t offset);
int pread_full(int fd, void *data, size_t bytes, uint64_t offset);
int make_dirs(const char *path, struct err *e);
/* "12.3 MiB", into buf; returns buf. */
const char *bytes_text(uint64_t bytes, char buf[24]);
/* Shortest decimal that reads back to the same double; returns buf. */
const char *double_text(double v, char buf[32]);

#endif
