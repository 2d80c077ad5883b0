/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What is common to all providers: which there are, and progress words.
 *
 * A progress word is written by one owner and watched by many readers, of whom
 * the owner knows nothing: they map it read-only, so they cannot even say that
 * they sleep. So a publish always wakes, one system call a unit and owner; a
 * reader sleeps on `signal`, which changes with every publish, by a futex that
 * is shared between processes (the kernel finds it by file and offset). Lost
 * wake-ups: the reader takes signal first, then looks at the word; a publish
 * writes the word first, then signal. Either the reader sees the new word, or
 * the signal it holds is old and the futex refuses to sleep.
 */
#include "rdma/fabric.h"
#include "rdma/providers.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define SPINS_PER_CLOCK 64

static const struct fab_ops *const providers[] = {
	&fab_local_ops,
	&fab_local_copy_ops,
#ifdef SHARDMESH_VERBS
	&fab_verbs_ops,
#endif
#ifdef SHARDMESH_OFI
	&fab_ofi_ops,
#endif
};

const struct fab_ops *fab_provider(const char *name)
{
	for (size_t i = 0; i < ARRAY_LEN(providers); i++)
		if (!strcmp(providers[i]->name, name))
			return providers[i];
	return NULL;
}

struct candidates {
	const struct fab_options *o;
	struct fab_candidate *out;
	uint32_t n;
	void (*refused)(void *ctx, const char *provider, const char *reason);
	void *ctx;
	char last[160];
};

static void leave_out(struct candidates *c, const char *name, const char *reason)
{
	snprintf(c->last, sizeof(c->last), "%s", reason);
	if (c->refused)
		c->refused(c->ctx, name, reason);
}

static void try_provider(struct candidates *c, const struct fab_ops *ops)
{
	struct fab_candidate *out = &c->out[c->n];

	if (ops->probe(c->o, out->reason)) {
		leave_out(c, ops->name, out->reason);
		return;
	}
	out->ops = ops;
	c->n++;
}

static void try_auto(struct candidates *c, bool same_host)
{
	static const char *const networks[] = { "verbs", "ofi" };

	if (same_host)
		try_provider(c, &fab_local_ops);
	else
		leave_out(c, fab_local_ops.name, "another host");
	for (size_t i = 0; i < ARRAY_LEN(networks); i++) {
		const struct fab_ops *ops = fab_provider(networks[i]);

		if (ops)
			try_provider(c, ops);
		else
			leave_out(c, networks[i], "not in this build");
	}
}

/* "local, local-copy, verbs" */
static const char *provider_names(char out[80])
{
	size_t at = 0;

	for (size_t i = 0; i < ARRAY_LEN(providers); i++)
		at += (size_t)snprintf(out + at, 80 - at, "%s%s", i ? ", " : "", providers[i]->name);
	return out;
}

/* "fault:SPEC:want": those of `want`, with faults. */
static int faulty_candidates(const char *want, const struct fab_options *o, bool same_host,
			     struct fab_candidate out[FAB_CANDIDATES_MAX],
			     void (*refused)(void *ctx, const char *provider, const char *reason), void *ctx,
			     struct err *e)
{
	int n = fab_fault_check(want, e);

	if (n < 0)
		return n;
	n = fab_candidates(strrchr(want, ':') + 1, o, same_host, out, refused, ctx, e);
	for (int i = 0; i < n; i++)
		out[i].ops = fab_fault(out[i].ops);
	return n;
}

int fab_candidates(const char *want, const struct fab_options *o, bool same_host,
		   struct fab_candidate out[FAB_CANDIDATES_MAX],
		   void (*refused)(void *ctx, const char *provider, const char *reason), void *ctx, struct err *e)
{
	static const struct fab_options automatic;
	struct candidates c = { .o = o ? o : &automatic, .out = out, .refused = refused, .ctx = ctx };
	const struct fab_ops *ops = fab_provider(want);
	char names[80];

	if (!strncmp(want, FAULT_PREFIX, strlen(FAULT_PREFIX)))
		return faulty_candidates(want, o, same_host, out, refused, ctx, e);
	if (ops)
		try_provider(&c, ops);
	else if (!strcmp(want, "auto"))
		try_auto(&c, same_host);
	else
		return err_set(e, -ENOTSUP, "no fabric \"%s\" here: there are auto, %s", want, provider_names(names));
	if (c.n == 0)
		return err_set(e, -ENOTSUP, "the fabric \"%s\" cannot be used here: %s", want, c.last);
	return (int)c.n;
}

/* ---------------------------------------------------------- progress words */

enum fab_ready fab_progress_check(uint64_t word, uint16_t branch, uint32_t version, uint16_t unit)
{
	int64_t have = (int64_t)(word >> 16 & UINT32_MAX);

	if (word >> 48 != branch)
		return FAB_PASSED;
	if (unit >= (word & UINT16_MAX))
		have--;
	if (have == version)
		return FAB_READY;
	return have > version ? FAB_PASSED : FAB_NOT_YET;
}

static void futex_wake_all(const _Atomic uint32_t *word)
{
	syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

/* Returns when woken, when the word is not `seen`, after timeout_ns, or for no reason. */
static void futex_wait(const _Atomic uint32_t *word, uint32_t seen, uint64_t timeout_ns)
{
	struct timespec t = { .tv_sec = (time_t)(timeout_ns / 1000000000), .tv_nsec = (long)(timeout_ns % 1000000000) };

	syscall(SYS_futex, word, FUTEX_WAIT, seen, &t, NULL, 0);
}

void fab_progress_publish(struct fab_progress *p, uint64_t word)
{
	atomic_store_explicit(&p->word, word, memory_order_release);
	atomic_fetch_add_explicit(&p->signal, 1, memory_order_release);
	futex_wake_all(&p->signal);
}

static void cpu_relax(void)
{
#if defined(__x86_64__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield");
#endif
}

uint64_t fab_progress_wait(const struct fab_progress *p, uint64_t seen, uint64_t spin_ns, uint64_t timeout_ns)
{
	uint64_t start = clock_now_ns(), waited = 0;
	uint64_t word;

	for (;;) {
		uint32_t signal = atomic_load_explicit(&p->signal, memory_order_acquire);

		word = atomic_load_explicit(&p->word, memory_order_acquire);
		if (word != seen || waited >= timeout_ns)
			return word;
		if (waited >= spin_ns)
			futex_wait(&p->signal, signal, timeout_ns - waited);
		else
			for (int i = 0;
			     i < SPINS_PER_CLOCK && atomic_load_explicit(&p->word, memory_order_relaxed) == seen; i++)
				cpu_relax();
		waited = clock_now_ns() - start;
	}
}
