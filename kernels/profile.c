/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The math profile: chosen by a table of processor features and installed
 * libraries, written as one line of text, and checked against this machine.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cpu/cpu.h"

static const char
	*const library_name[] = { [K_LIB_PORTABLE] = "portable", [K_LIB_DNNL] = "dnnl", [K_LIB_OPENBLAS] = "openblas" };
static const char
	*const isa_name[] = { [K_ISA_PORTABLE] = "portable", [K_ISA_AVX2] = "avx2", [K_ISA_AVX512] = "avx512" };

static int index_of(const char *word, size_t n, const char *const *names, size_t count)
{
	for (size_t i = 0; i < count; i++)
		if (strlen(names[i]) == n && memcmp(names[i], word, n) == 0)
			return (int)i;
	return -1;
}

static enum k_isa best_isa(void)
{
#if defined(__x86_64__)
	__builtin_cpu_init();
	if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
		return K_ISA_PORTABLE;
	if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
	    __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
		return K_ISA_AVX512;
	return K_ISA_AVX2;
#else
	return K_ISA_PORTABLE;
#endif
}

static void profile_fill(struct k_profile *p, enum k_library library, enum k_isa isa, unsigned grid,
			 const char *version)
{
	*p = (struct k_profile){ .library = library, .isa = isa, .grid = grid };
	snprintf(p->version, sizeof(p->version), "%s", version);
	snprintf(p->text, sizeof(p->text), "cpu %s %s %s grid%u fp32", library_name[library], p->version, isa_name[isa],
		 grid);
}

/* Tries one library; on success fills *out. */
static int profile_try(enum k_library library, enum k_isa isa, struct k_profile *out, struct err *e)
{
	struct blas b;
	int rc = blas_open(library, isa, &b, e);

	if (rc == 0)
		profile_fill(out, library, isa, GRID_VERSION, b.version);
	return rc;
}

/* The table. oneDNN needs AVX2 to be the faster one; what is not installed is passed over, and *reason says so. */
static int profile_table(enum k_isa isa, struct k_profile *out, char reason[160])
{
	struct err e = { 0 };

	if (isa >= K_ISA_AVX2) {
		if (profile_try(K_LIB_DNNL, isa, out, &e) == 0) {
			snprintf(reason, 160, "%s and oneDNN %s are there", isa_name[isa], out->version);
			return 0;
		}
		if (profile_try(K_LIB_OPENBLAS, isa, out, NULL) == 0) {
			snprintf(reason, 160, "oneDNN cannot be used (%.60s); OpenBLAS %s can", e.text, out->version);
			return 0;
		}
	} else if (profile_try(K_LIB_OPENBLAS, isa, out, &e) == 0) {
		snprintf(reason, 160, "no AVX2 here, for which OpenBLAS %s is the better one", out->version);
		return 0;
	}
	snprintf(reason, 160, "neither oneDNN nor OpenBLAS can be used (%.60s); own products", e.text);
	return profile_try(K_LIB_PORTABLE, isa, out, NULL);
}

static int parse_want(const char *want, enum k_library *library, enum k_isa *isa, struct err *e)
{
	size_t n = strcspn(want, ":");
	int lib = index_of(want, n, library_name, ARRAY_LEN(library_name));

	if (lib < 0)
		return err_set(e, -EINVAL,
			       "math \"%s\": expected portable, dnnl or openblas, and behind it nothing or :%s, :%s "
			       "or :%s",
			       want, isa_name[0], isa_name[1], isa_name[2]);
	*library = (enum k_library)lib;
	if (want[n] == '\0')
		return 0;
	int set = index_of(want + n + 1, strlen(want + n + 1), isa_name, ARRAY_LEN(isa_name));
	if (set < 0)
		return err_set(e, -EINVAL, "math \"%s\": unknown instruction set", want);
	if ((enum k_isa)set > *isa)
		return err_set(e, -ENOTSUP, "math \"%s\": this processor has no %s", want, isa_name[set]);
	*isa = (enum k_isa)set;
	return 0;
}

int k_profile_detect(const char *want, struct k_profile *out, char reason[160], struct err *e)
{
	enum k_isa isa = best_isa();
	enum k_library library = K_LIB_PORTABLE;
	char local[160];
	int rc;

	if (!reason)
		reason = local;
	if (!want || !*want)
		return profile_table(isa, out, reason);
	rc = parse_want(want, &library, &isa, e);
	if (rc)
		return rc;
	if (profile_try(library, isa, out, e))
		return err_prefix(e, "math \"%s\" cannot be used", want) ? -ENOTSUP : 0;
	snprintf(reason, 160, "\"%.100s\" is asked for", want);
	return 0;
}

int k_profile_parse(const char *text, struct k_profile *out, struct err *e)
{
	char library[16], version[32], isa[16], grid[16];
	int end = 0;

	if (sscanf(text, "cpu %15s %31s %15s grid%15s fp32%n", library, version, isa, grid, &end) != 4 || !end ||
	    text[end])
		return err_set(e, -EINVAL, "\"%.100s\" is no math profile", text);
	int lib = index_of(library, strlen(library), library_name, ARRAY_LEN(library_name));
	int set = index_of(isa, strlen(isa), isa_name, ARRAY_LEN(isa_name));
	if (lib < 0 || set < 0)
		return err_set(e, -EINVAL, "\"%.100s\": unknown %s", text, lib < 0 ? "library" : "instruction set");
	struct k_profile p;
	profile_fill(&p, (enum k_library)lib, (enum k_isa)set, (unsigned)strtoul(grid, NULL, 10), version);
	/* Whatever is not a plain number there comes back as something else. */
	if (strcmp(p.text, text) != 0)
		return err_set(e, -EINVAL, "\"%.100s\" is no math profile in its canonical form", text);
	*out = p;
	return 0;
}

int k_profile_check(const struct k_profile *p, struct err *e)
{
	struct k_profile own;
	struct err why = { 0 };

	if (p->isa > best_isa())
		snprintf(why.text, sizeof(why.text), "no %s", isa_name[p->isa]);
	else if (profile_try(p->library, p->isa, &own, &why) == 0 && strcmp(own.text, p->text) == 0)
		return 0;
	else if (why.code == 0)
		snprintf(why.text, sizeof(why.text), "it has \"%s\" instead", own.text);
	if (profile_table(best_isa(), &own, (char[160]){ 0 }))
		return err_set(e, -ENOTSUP, "this machine cannot run the math profile \"%s\": %s", p->text, why.text);
	return err_set(e, -ENOTSUP, "this machine cannot run the math profile \"%s\" (%s); its own would be \"%s\"",
		       p->text, why.text, own.text);
}
