/* SPDX-License-Identifier: Apache-2.0 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/base.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <pthread.h>
#include <regex.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct capture {
	struct log log;
	int fd, warn_fd;
	char text[1 << 20];
};

/* As a log file is opened: several writers append whole lines. */
static int open_file(void)
{
	char path[] = "/tmp/shardmesh-log-XXXXXX";
	int fd = mkostemp(path, O_APPEND);

	unlink(path);
	return fd;
}

static int open_capture(void **state)
{
	struct capture *c = calloc(1, sizeof(*c));

	c->fd = open_file();
	c->warn_fd = open_file();
	log_init(&c->log, c->fd, "worker-3");
	*state = c;
	return c->fd < 0 || c->warn_fd < 0;
}

static int close_capture(void **state)
{
	struct capture *c = *state;

	close(c->fd);
	close(c->warn_fd);
	free(c);
	return 0;
}

static const char *text_of(struct capture *c, int fd)
{
	ssize_t n = pread(fd, c->text, sizeof(c->text) - 1, 0);

	assert_true(n >= 0);
	c->text[n] = 0;
	return c->text;
}

static void assert_matches(const char *text, const char *pattern)
{
	regex_t re;

	assert_int_equal(regcomp(&re, pattern, REG_EXTENDED | REG_NOSUB), 0);
	if (regexec(&re, text, 0, NULL, 0) != 0)
		fail_msg("'%s' does not match '%s'", text, pattern);
	regfree(&re);
}

/* The one line in the log, parsed; the caller drops it. */
static json_t *only_line(struct capture *c)
{
	const char *text = text_of(c, c->fd);
	json_t *line = json_loads(text, 0, NULL);

	assert_non_null(line);
	assert_ptr_equal(strchr(text, '\n'), text + strlen(text) - 1);
	return line;
}

static void assert_member(json_t *line, const char *name, const char *want)
{
	assert_string_equal(json_string_value(json_object_get(line, name)), want);
}

static void test_json_line(void **state)
{
	struct capture *c = *state;
	json_t *line;

	log_info(&c->log, "step %d of %s", 7, "job");
	line = only_line(c);
	assert_int_equal(json_object_size(line), 5);
	assert_matches(json_string_value(json_object_get(line, "ts")),
		       "^20[0-9]{2}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]:[0-6][0-9]\\.[0-9]{6}Z$");
	assert_member(line, "level", "info");
	assert_member(line, "who", "worker-3");
	assert_matches(json_string_value(json_object_get(line, "at")), "^test_base_log\\.c:[0-9]+$");
	assert_member(line, "msg", "step 7 of job");
	json_decref(line);
}

static void assert_logs_as(const char *message, const char *want)
{
	void *state;
	struct capture *c;
	json_t *line;

	assert_int_equal(open_capture(&state), 0);
	c = state;
	log_info(&c->log, "%s", message);
	line = only_line(c);
	assert_member(line, "msg", want);
	json_decref(line);
	close_capture(&state);
}

static void test_whatever_the_message_the_line_parses(void **state)
{
	char longest[5000];
	(void)state;
	assert_logs_as("", "");
	assert_logs_as("a \"b\" \\ c", "a \"b\" \\ c");
	assert_logs_as("a\nb\tc\x01\x7f", "a\nb\tc\x01\x7f");
	assert_logs_as("grün € 🙂", "grün € 🙂");
	assert_logs_as("\xff|\xc3|\x80|\xe2\x82|\xed\xa0\x80|\xc0\x80|\xf4\x90\x80\x80",
		       "\xef\xbf\xbd|\xef\xbf\xbd|\xef\xbf\xbd|\xef\xbf\xbd\xef\xbf\xbd|"
		       "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd|\xef\xbf\xbd\xef\xbf\xbd|"
		       "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd");
	memset(longest, '\x02', sizeof(longest) - 1);
	longest[sizeof(longest) - 1] = 0;
	/* Every byte costs six; the message is cut before that, the line still closes. */
	longest[2047] = 0;
	assert_logs_as(longest, longest);
}

static void test_text_line(void **state)
{
	struct capture *c = *state;

	c->log.format = LOG_TEXT;
	log_error(&c->log, "lost\n\x1b[2Jshard %d", 5);
	assert_matches(text_of(c, c->fd),
		       "^[0-2][0-9]:[0-5][0-9]:[0-6][0-9]\\.[0-9]{3} error worker-3: lost  \\[2Jshard 5\n$");
}

static void test_levels_and_counts(void **state)
{
	struct capture *c = *state;

	log_debug(&c->log, "not at this level");
	assert_string_equal(text_of(c, c->fd), "");
	log_warn(&c->log, "first");
	c->log.level = LOG_ERROR;
	log_warn(&c->log, "second");
	assert_null(strstr(text_of(c, c->fd), "second"));
	c->log.level = LOG_DEBUG;
	log_debug(&c->log, "third");
	assert_non_null(strstr(text_of(c, c->fd), "third"));
	assert_int_equal(atomic_load(&c->log.count[LOG_DEBUG]), 1);
	assert_int_equal(atomic_load(&c->log.count[LOG_INFO]), 0);
	assert_int_equal(atomic_load(&c->log.count[LOG_WARN]), 1);
	log_info((struct log *)NULL, "to nobody");
}

static void test_warnings_go_to_the_launcher_too(void **state)
{
	struct capture *c = *state;

	c->log.warn_fd = c->warn_fd;
	log_info(&c->log, "quiet");
	log_warn(&c->log, "loud");
	assert_non_null(strstr(text_of(c, c->fd), "quiet"));
	assert_non_null(strstr(text_of(c, c->fd), "loud"));
	assert_null(strstr(text_of(c, c->warn_fd), "quiet"));
	assert_non_null(strstr(text_of(c, c->warn_fd), "\"msg\":\"loud\""));
}

static void test_errno(void **state)
{
	struct capture *c = *state;

	errno = ENOENT;
	log_info(&c->log, "%m");
	assert_int_equal(errno, ENOENT);
	assert_non_null(strstr(text_of(c, c->fd), "No such file or directory"));
	close(c->fd);
	errno = EAGAIN;
	log_info(&c->log, "to a closed file");
	assert_int_equal(errno, EAGAIN);
	c->fd = open_file();
}

static void test_parse_level(void **state)
{
	enum log_level level = LOG_DEBUG;

	(void)state;
	assert_int_equal(log_level_parse("warn", &level), 0);
	assert_int_equal(level, LOG_WARN);
	assert_int_equal(log_level_parse("loud", &level), -EINVAL);
	assert_int_equal(level, LOG_WARN);
}

#define THREADS 4
#define LINES 500

static void *write_lines(void *arg)
{
	struct log *l = arg;

	for (int i = 0; i < LINES; i++)
		log_info(l, "line %d of a message that is long enough to be torn apart %0200d", i, i);
	return NULL;
}

static void test_lines_do_not_interleave(void **state)
{
	struct capture *c = *state;
	pthread_t thread[THREADS];
	char *at, *end;
	int lines = 0;

	for (int t = 0; t < THREADS; t++)
		assert_int_equal(pthread_create(&thread[t], NULL, write_lines, &c->log), 0);
	for (int t = 0; t < THREADS; t++)
		pthread_join(thread[t], NULL);
	for (at = (char *)text_of(c, c->fd); (end = strchr(at, '\n')); at = end + 1) {
		json_t *line = json_loadb(at, (size_t)(end - at), 0, NULL);

		assert_non_null(line);
		json_decref(line);
		lines++;
	}
	assert_int_equal(lines, THREADS * LINES);
	assert_int_equal(atomic_load(&c->log.count[LOG_INFO]), THREADS * LINES);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(test_json_line, open_capture, close_capture),
		cmocka_unit_test(test_whatever_the_message_the_line_parses),
		cmocka_unit_test_setup_teardown(test_text_line, open_capture, close_capture),
		cmocka_unit_test_setup_teardown(test_levels_and_counts, open_capture, close_capture),
		cmocka_unit_test_setup_teardown(test_warnings_go_to_the_launcher_too, open_capture, close_capture),
		cmocka_unit_test_setup_teardown(test_errno, open_capture, close_capture),
		cmocka_unit_test(test_parse_level),
		cmocka_unit_test_setup_teardown(test_lines_do_not_interleave, open_capture, close_capture),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
