/* SPDX-License-Identifier: Apache-2.0 */
/*
 * libfabric, loaded when somebody asks whether it can be used.
 *
 * Linking it would make every program need it, and with it the libraries of all
 * fabrics it knows. One of those (InfiniPath's) takes over SIGSEGV, SIGTERM and
 * more in a constructor, before main, to write a file named after the program
 * and ".btr" into the working directory; only the environment keeps it from
 * that, so the environment is set before it is loaded. What is loaded stays.
 *
 * Only these few are real symbols. The rest of libfabric's calls are inline and
 * go through the tables of the objects that they are made on.
 */
#include "rdma/ofi/ofi.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define OFI_LIBRARY "libfabric.so.1"

/* NULL: no libfabric here. Rarely called, so nothing is remembered. */
static void *symbol(const char *name)
{
	void *lib, *at;

	(void)setenv("IPATH_NO_BACKTRACE", "1", 0);
	lib = dlopen(OFI_LIBRARY, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
	if (!lib)
		return NULL;
	at = dlsym(lib, name);
	dlclose(lib);
	return at;
}

int load_check(char reason[160])
{
	if (symbol("fi_getinfo"))
		return 0;
	snprintf(reason, 160, "libfabric is not installed (%s; Debian: libfabric1)", OFI_LIBRARY);
	return -ELIBACC;
}

int load_getinfo(uint32_t version, const char *node, uint64_t flags, const struct fi_info *hints, struct fi_info **out)
{
	int (*getinfo)(uint32_t, const char *, const char *, uint64_t, const struct fi_info *,
		       struct fi_info **) = (int (*)(uint32_t, const char *, const char *, uint64_t,
						     const struct fi_info *, struct fi_info **))symbol("fi_getinfo");

	return getinfo ? getinfo(version, node, NULL, flags, hints, out) : -ELIBACC;
}

struct fi_info *load_allocinfo(void)
{
	struct fi_info *(*dupinfo)(const struct fi_info *) = (struct fi_info * (*)(const struct fi_info *))
		symbol("fi_dupinfo");

	return dupinfo ? dupinfo(NULL) : NULL;
}

void load_freeinfo(struct fi_info *info)
{
	void (*freeinfo)(struct fi_info *) = (void (*)(struct fi_info *))symbol("fi_freeinfo");

	if (freeinfo)
		freeinfo(info);
}

int load_fabric(struct fi_fabric_attr *attr, struct fid_fabric **out)
{
	int (*fabric)(struct fi_fabric_attr *, struct fid_fabric **,
		      void *) = (int (*)(struct fi_fabric_attr *, struct fid_fabric **, void *))symbol("fi_fabric");

	return fabric ? fabric(attr, out, NULL) : -ELIBACC;
}

uint32_t load_version(void)
{
	uint32_t (*version)(void) = (uint32_t(*)(void))symbol("fi_version");

	return version ? version() : 0;
}

const char *load_strerror(int number)
{
	const char *(*text)(int) = (const char *(*)(int))symbol("fi_strerror");

	return text ? text(number) : strerror(number);
}
