/* SPDX-License-Identifier: Apache-2.0 */
#include "base/base.h"

#include <assert.h>
#include <string.h>

/* In brackets, which keep the macro of this name out. */
int(err_set)(struct err *e, int code, const char *fmt, ...)
{
	va_list ap;

	/* The macro builds on it. */
	assert(code < 0);
	if (!e)
		return code;
	e->code = code;
	va_start(ap, fmt);
	vsnprintf(e->text, sizeof(e->text), fmt, ap);
	va_end(ap);
	return code;
}

int err_prefix(struct err *e, const char *fmt, ...)
{
	char whole[sizeof(e->text)];
	va_list ap;
	size_t n;

	va_start(ap, fmt);
	vsnprintf(whole, sizeof(whole), fmt, ap);
	va_end(ap);
	n = strlen(whole);
	snprintf(whole + n, sizeof(whole) - n, ": %s", e->text);
	memcpy(e->text, whole, sizeof(whole));
	return e->code;
}
