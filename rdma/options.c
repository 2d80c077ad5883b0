/* SPDX-License-Identifier: Apache-2.0 */
/* What an operator says of networks, from words to values. */
#include "rdma/fabric.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static int set_number(const char *name, const char *value, unsigned max, unsigned *out, struct err *e)
{
	char *end;
	unsigned long long n;

	errno = 0;
	n = strtoull(value, &end, 10);
	if (errno || end == value || *end || *value == '-' || n > max)
		return err_set(e, -EINVAL, "%s: expected a number up to %u, found \"%s\"", name, max, value);
	*out = (unsigned)n;
	return 0;
}

static int set_connect(const char *value, enum fab_connect *out, struct err *e)
{
	static const char *const words[] = { "auto", "cm", "control" };

	for (size_t i = 0; i < ARRAY_LEN(words); i++) {
		if (!strcmp(value, words[i])) {
			*out = (enum fab_connect)i;
			return 0;
		}
	}
	return err_set(e, -EINVAL, "connect: expected auto, cm or control, found \"%s\"", value);
}

static int set_mtu(const char *value, unsigned *out, struct err *e)
{
	unsigned n;

	if (set_number("mtu", value, 4096, &n, e) || n < 256 || (n & (n - 1)))
		return err_set(e, -EINVAL, "mtu: expected 256, 512, 1024, 2048 or 4096, found \"%s\"", value);
	*out = n;
	return 0;
}

/* Zero is automatic inside, so the index itself is kept plus one. */
static int set_gid_index(const char *value, unsigned *out, struct err *e)
{
	unsigned n = 0;
	int rc = set_number("gid_index", value, 65535, &n, e);

	if (!rc)
		*out = n + 1;
	return rc;
}

static int set_numbered(struct fab_options *o, const char *name, const char *value, struct err *e)
{
	const struct {
		const char *name;
		unsigned *out, max;
	} known[] = {
		{ "queue_pairs", &o->queue_pairs, 64 },
		{ "pkey_index", &o->pkey_index, 65535 },
		{ "service_level", &o->service_level, 15 },
		{ "traffic_class", &o->traffic_class, 255 },
		{ "timeout", &o->timeout, 31 },
	};

	for (size_t i = 0; i < ARRAY_LEN(known); i++)
		if (!strcmp(name, known[i].name))
			return set_number(name, value, known[i].max, known[i].out, e);
	return err_set(e, -EINVAL, "there is no option \"%s\" of the fabric", name);
}

int fab_options_set(struct fab_options *o, const char *name, const char *value, struct err *e)
{
	if (!strcmp(value, "auto"))
		return 0;
	if (!strcmp(name, "connect"))
		return set_connect(value, &o->connect, e);
	if (!strcmp(name, "mtu"))
		return set_mtu(value, &o->mtu, e);
	if (!strcmp(name, "gid_index"))
		return set_gid_index(value, &o->gid_index, e);
	if (!strcmp(name, "devices"))
		o->devices = value;
	else if (!strcmp(name, "ofi_provider"))
		o->ofi_provider = value;
	else
		return set_numbered(o, name, value, e);
	return 0;
}

void fab_flags_settings(const struct fab_flags *f, struct fab_setting out[FAB_SETTINGS])
{
	const struct fab_setting all[] = {
		{ "connect", f->connect },
		{ "devices", f->devices },
		{ "queue_pairs", f->queue_pairs },
		{ "gid_index", f->gid_index },
		{ "mtu", f->mtu },
		{ "pkey_index", f->pkey_index },
		{ "service_level", f->service_level },
		{ "traffic_class", f->traffic_class },
		{ "timeout", f->timeout },
		{ "ofi_provider", f->ofi_provider },
	};

	_Static_assert(ARRAY_LEN(all) == FAB_SETTINGS, "all of them");
	memcpy(out, all, sizeof(all));
}

int fab_flags_apply(const struct fab_flags *f, struct fab_options *o, struct err *e)
{
	struct fab_setting s[FAB_SETTINGS];
	int rc = 0;

	fab_flags_settings(f, s);
	for (uint32_t i = 0; i < FAB_SETTINGS && !rc; i++)
		if (s[i].value)
			rc = fab_options_set(o, s[i].name, s[i].value, e);
	return rc;
}
