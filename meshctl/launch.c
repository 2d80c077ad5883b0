/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Children of a local run. Nothing may outlive the launcher, however it ends:
 * each child asks the kernel for SIGKILL at its parent's death, and checks
 * afterwards that the parent had not died before it asked. Children live in a
 * process group of their own, so that a Ctrl-C on the terminal reaches only
 * the launcher, which knows what to do with it.
 */
#include "meshctl/meshctl.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHILD_ARGS_MAX 48
#define WARN_FD 3
#define WARN_FD_TEXT "3"

int launcher_init(struct launcher *l, const char *run_dir, struct err *e)
{
	const char *bin = getenv("SHARDMESH_BIN");
	char path[512];
	int rc;

	memset(l, 0, sizeof(*l));
	l->run_dir = run_dir;
	if (bin) {
		snprintf(l->bin_dir, sizeof(l->bin_dir), "%s", bin);
	} else {
		ssize_t n = readlink("/proc/self/exe", l->bin_dir, sizeof(l->bin_dir) - 1);
		if (n < 0)
			return err_set(e, -errno, "cannot read /proc/self/exe: %s; set SHARDMESH_BIN", strerror(errno));
		l->bin_dir[n] = '\0';
		*strrchr(l->bin_dir, '/') = '\0';
	}
	if ((size_t)snprintf(path, sizeof(path), "%s/log", run_dir) >= sizeof(path))
		return err_set(e, -ENAMETOOLONG, "run directory %s: the path is too long", run_dir);
	rc = make_dirs(path, e);
	return rc;
}

/* In the child, between fork and exec: nothing but system calls. */
static void become(const char *path, char *const argv[], int log_fd, pid_t parent, pid_t group)
{
	sigset_t none;
	int warn;

	if (prctl(PR_SET_PDEATHSIG, SIGKILL) || getppid() != parent)
		_exit(126);
	setpgid(0, group);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	/* The launcher's own standard error becomes fd 3: warnings go there too. The log's fd may be 3 until then. */
	warn = fcntl(STDERR_FILENO, F_DUPFD, 10);
	if (warn < 0 || dup2(log_fd, STDERR_FILENO) < 0 || dup2(log_fd, STDOUT_FILENO) < 0 || dup2(warn, WARN_FD) < 0)
		_exit(126);
	close(warn);
	execv(path, argv);
	_exit(127);
}

int launcher_start(struct launcher *l, const char *name, const char *program, const char *const *argv, struct err *e)
{
	char path[PATH_MAX], *args[CHILD_ARGS_MAX + 2];
	struct child *c = &l->child[l->n];
	pid_t pid, self = getpid();
	int log_fd, n = 0;

	if (l->n == CHILDREN_MAX)
		return err_set(e, -E2BIG, "more than %d processes in one local run", CHILDREN_MAX);
	memset(c, 0, sizeof(*c));
	snprintf(c->name, sizeof(c->name), "%s", name);
	snprintf(path, sizeof(path), "%s/%s", l->bin_dir, program);
	if (access(path, X_OK))
		return err_set(e, -errno, "cannot run %s: %s; set SHARDMESH_BIN to the folder of the programs", path,
			       strerror(errno));
	if ((size_t)snprintf(c->log, sizeof(c->log), "%s/log/%s.log", l->run_dir, name) >= sizeof(c->log))
		return err_set(e, -ENAMETOOLONG, "run directory %s: the path is too long", l->run_dir);
	log_fd = open(c->log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
	if (log_fd < 0)
		return err_set(e, -errno, "cannot write %s: %s", c->log, strerror(errno));
	args[n++] = path;
	while (argv[n - 1]) {
		if (n > CHILD_ARGS_MAX) {
			close(log_fd);
			return err_set(e, -E2BIG, "too many arguments for %s", program);
		}
		args[n] = (char *)(uintptr_t)argv[n - 1];
		n++;
	}
	args[n] = NULL;
	setenv("SHARDMESH_WARN_FD", WARN_FD_TEXT, 1);
	fflush(NULL);
	pid = fork();
	if (pid == 0)
		become(path, args, log_fd, self, l->group);
	close(log_fd);
	if (pid < 0)
		return err_set(e, -errno, "cannot start %s: %s", program, strerror(errno));
	if (!l->group)
		l->group = pid;
	setpgid(pid, l->group); /* both sides set it, so that neither order matters */
	c->pid = pid;
	l->n++;
	return 0;
}

struct child *launcher_reap(struct launcher *l)
{
	int status;
	pid_t pid;

	while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
		for (uint32_t i = 0; i < l->n; i++) {
			if (l->child[i].pid == pid) {
				l->child[i].pid = 0;
				l->child[i].status = status;
				return &l->child[i];
			}
		}
	}
	return NULL;
}

uint32_t launcher_alive(const struct launcher *l)
{
	uint32_t alive = 0;

	for (uint32_t i = 0; i < l->n; i++)
		alive += l->child[i].pid != 0;
	return alive;
}

void launcher_kill(struct launcher *l, int signal)
{
	for (uint32_t i = 0; i < l->n; i++) {
		if (l->child[i].pid)
			kill(l->child[i].pid, signal);
	}
}

/* The last line of a log, without its newline; "" when there is none. */
static void last_line(const char *path, char *out, size_t bytes)
{
	char buf[2048];
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	off_t size;
	ssize_t n;
	char *start;

	out[0] = '\0';
	if (fd < 0)
		return;
	size = lseek(fd, 0, SEEK_END);
	n = pread(fd, buf, sizeof(buf) - 1, size > (off_t)sizeof(buf) - 1 ? size - (off_t)sizeof(buf) + 1 : 0);
	close(fd);
	while (n > 0 && buf[n - 1] == '\n')
		n--;
	if (n <= 0)
		return;
	buf[n] = '\0';
	start = strrchr(buf, '\n');
	snprintf(out, bytes, "%s", start ? start + 1 : buf);
}

/* A structured line says in "msg" what people should read. */
static void message_of(char *line, size_t bytes)
{
	json_error_t je;
	json_t *j = json_loads(line, 0, &je);
	const char *msg = json_string_value(json_object_get(j, "msg"));

	if (msg)
		snprintf(line, bytes, "%s", msg);
	json_decref(j);
}

void child_epitaph(const struct child *c, char *out, size_t bytes)
{
	char line[512];

	if (WIFSIGNALED(c->status)) {
		snprintf(out, bytes, "%s was killed by signal %d (%s)", c->name, WTERMSIG(c->status),
			 strsignal(WTERMSIG(c->status)));
		return;
	}
	last_line(c->log, line, sizeof(line));
	message_of(line, sizeof(line));
	snprintf(out, bytes, "%s exited with code %d%s%s", c->name, WEXITSTATUS(c->status), line[0] ? ": " : "", line);
}
