/* SPDX-License-Identifier: Apache-2.0 */
#include "base/base.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define MESSAGE_MAX 2048
/* The longest escape is six bytes for one. */
#define LINE_MAX_BYTES (MESSAGE_MAX * 6 + 1024)

static const char *const level_name[LOG_LEVELS] = { "debug", "info", "warn", "error" };

struct line {
	char text[LINE_MAX_BYTES];
	size_t n;
};

static int inherited_warn_fd(void)
{
	const char *text = getenv("SHARDMESH_WARN_FD");
	char *end;
	long fd;

	if (!text)
		return -1;
	fd = strtol(text, &end, 10);
	return *text && !*end && fd > STDERR_FILENO && fcntl((int)fd, F_GETFD) >= 0 ? (int)fd : -1;
}

void log_init(struct log *l, int fd, const char *who)
{
	memset(l, 0, sizeof(*l));
	l->fd = fd;
	l->warn_fd = inherited_warn_fd();
	l->level = LOG_INFO;
	l->format = isatty(fd) ? LOG_TEXT : LOG_JSON;
	snprintf(l->who, sizeof(l->who), "%s", who);
}

int log_level_parse(const char *name, enum log_level *out)
{
	for (unsigned i = 0; i < LOG_LEVELS; i++) {
		if (strcmp(name, level_name[i]) == 0) {
			*out = (enum log_level)i;
			return 0;
		}
	}
	return -EINVAL;
}

static void put_char(struct line *line, char c)
{
	if (line->n < sizeof(line->text))
		line->text[line->n++] = c;
}

static void put(struct line *line, const char *s)
{
	while (*s)
		put_char(line, *s++);
}

static void put_escape(struct line *line, unsigned code)
{
	char escape[8];

	snprintf(escape, sizeof(escape), "\\u%04x", code);
	put(line, escape);
}

/* Bytes of the well-formed UTF-8 sequence at s, or 0 (RFC 3629: nothing overlong, no surrogates). */
static unsigned utf8_bytes(const unsigned char *s)
{
	unsigned n = s[0] < 0xc2 ? 0 : s[0] < 0xe0 ? 2 : s[0] < 0xf0 ? 3 : s[0] < 0xf5 ? 4 : 0;
	unsigned char low = s[0] == 0xe0 ? 0xa0 : s[0] == 0xf0 ? 0x90 : 0x80;
	unsigned char high = s[0] == 0xed ? 0x9f : s[0] == 0xf4 ? 0x8f : 0xbf;

	if (n == 0 || s[1] < low || s[1] > high)
		return 0;
	for (unsigned i = 2; i < n; i++)
		if ((s[i] & 0xc0) != 0x80)
			return 0;
	return n;
}

/* A JSON string. What is not UTF-8 becomes the replacement character, so that a line always parses. */
static void put_json(struct line *line, const char *text)
{
	const unsigned char *s = (const unsigned char *)text;

	put_char(line, '"');
	while (*s) {
		unsigned n = *s < 0x80 ? 1 : utf8_bytes(s);

		if (*s < 0x20 || *s == 0x7f || n == 0) {
			put_escape(line, n == 0 ? 0xfffd : *s);
			n = 1;
		} else {
			if (*s == '"' || *s == '\\')
				put_char(line, '\\');
			for (unsigned i = 0; i < n; i++)
				put_char(line, (char)s[i]);
		}
		s += n;
	}
	put_char(line, '"');
}

/* Control characters become spaces: a message is one line and cannot steer a terminal. */
static void put_plain(struct line *line, const char *s)
{
	for (; *s; s++)
		put_char(line, (unsigned char)*s < 0x20 || *s == 0x7f ? ' ' : *s);
}

static void format_json(struct line *line, const struct log *l, const char *level, const char *where, const char *msg)
{
	uint64_t now = clock_wall_ns();
	time_t seconds = (time_t)(now / 1000000000u);
	struct tm tm;
	char ts[64];

	gmtime_r(&seconds, &tm);
	snprintf(ts, sizeof(ts), "{\"ts\":\"%04d-%02d-%02dT%02d:%02d:%02d.%06uZ\",\"level\":\"", tm.tm_year + 1900,
		 tm.tm_mon + 1, tm.tm_mday, tm.tm_hour, tm.tm_min, tm.tm_sec, (unsigned)(now % 1000000000u / 1000));
	put(line, ts);
	put(line, level);
	put(line, "\",\"who\":");
	put_json(line, l->who);
	put(line, ",\"at\":");
	put_json(line, where);
	put(line, ",\"msg\":");
	put_json(line, msg);
	put(line, "}\n");
}

static void format_text(struct line *line, const struct log *l, const char *level, const char *msg)
{
	uint64_t now = clock_wall_ns();
	time_t seconds = (time_t)(now / 1000000000u);
	struct tm tm;
	char ts[64];

	localtime_r(&seconds, &tm);
	snprintf(ts, sizeof(ts), "%02d:%02d:%02d.%03u ", tm.tm_hour, tm.tm_min, tm.tm_sec,
		 (unsigned)(now % 1000000000u / 1000000));
	put(line, ts);
	put(line, level);
	put_char(line, ' ');
	put_plain(line, l->who);
	put(line, ": ");
	put_plain(line, msg);
	put_char(line, '\n');
}

static void write_line(const struct log *l, int fd, enum log_format format, enum log_level level, const char *where,
		       const char *msg)
{
	struct line line;

	line.n = 0;
	if (format == LOG_JSON)
		format_json(&line, l, level_name[level], where, msg);
	else
		format_text(&line, l, level_name[level], msg);
	/* A log that cannot be written has nowhere to say so. */
	(void)write_full(fd, line.text, line.n);
}

void log_write(struct log *l, enum log_level level, const char *where, const char *fmt, ...)
{
	int saved_errno = errno;
	char msg[MESSAGE_MAX];
	va_list ap;

	if (!l || level < l->level)
		return;
	va_start(ap, fmt);
	vsnprintf(msg, sizeof(msg), fmt, ap);
	va_end(ap);
	atomic_fetch_add_explicit(&l->count[level], 1, memory_order_relaxed);
	write_line(l, l->fd, l->format, level, where, msg);
	if (level >= LOG_WARN && l->warn_fd >= 0 && l->warn_fd != l->fd)
		write_line(l, l->warn_fd, isatty(l->warn_fd) ? LOG_TEXT : l->format, level, where, msg);
	errno = saved_errno;
}
