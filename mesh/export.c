/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The result, streamed. The file's layout is known before the first byte: the
 * safetensors header follows from the unit table alone. So pieces are asked for
 * in the file's order, each within one run and hence of one owner, WINDOW of
 * them at a time over all owners, and each is written where it belongs when it
 * comes. What is held at once is one piece. model.tmp becomes model by a rename
 * when all is on disk: a model/ that is there is whole.
 */
#include "mesh/export.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define WINDOW 8
#define PIECE_MAX (512u << 10) /* bytes */

struct piece {
	uint64_t request; /* 0: this slot is free */
	uint32_t member, n;
	uint64_t at; /* bytes, in the file */
};

struct export
{
	struct export_config cfg;
	char tmp[PATH_MAX], final[PATH_MAX];
	int fd;
	struct unit_table table;
	struct page_map map;
	uint32_t *order;
	uint64_t file_at; /* where the next piece goes */
	/* the next piece: tensor order[tensor], from element `element` on */
	uint32_t tensor;
	uint64_t element;
	uint64_t requests;
	uint32_t in_flight;
	struct piece piece[WINDOW];
};

/* ---------------------------------------------------------------- the folder */

static int path_in(char out[PATH_MAX], const char *dir, const char *name)
{
	return snprintf(out, PATH_MAX, "%s/%s", dir, name) < PATH_MAX ? 0 : -ENAMETOOLONG;
}

static void remove_tmp(const char *tmp)
{
	static const char *const files[] = { "config.json", "model.safetensors", "tokenizer.json" };
	char path[PATH_MAX];

	for (size_t i = 0; i < ARRAY_LEN(files); i++)
		if (path_in(path, tmp, files[i]) == 0)
			unlink(path);
	rmdir(tmp);
}

static int sync_dir(const char *path)
{
	int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	int rc = 0;

	if (fd < 0)
		return -errno;
	if (fsync(fd) < 0)
		rc = -errno;
	close(fd);
	return rc;
}

/* Whoever generates text must know what a token is; Hugging Face's own loaders ignore keys they do not know. */
static int write_config(const struct export *x, struct err *e)
{
	json_t *o = json_loads(x->cfg.job->model.json, 0, NULL), *ours;
	char path[PATH_MAX], *text = NULL;
	int rc = path_in(path, x->tmp, "config.json");

	if (!o)
		return err_set(e, -EINVAL, "the model's config.json cannot be written");
	ours = json_object_get(o, "shardmesh");
	if (!json_is_object(ours)) {
		json_object_set_new(o, "shardmesh", json_object());
		ours = json_object_get(o, "shardmesh");
	}
	json_object_set_new(ours, "data_format", json_string(data_token_kind(&x->cfg.job->data)));
	text = json_dumps(o, JSON_INDENT(2) | JSON_SORT_KEYS);
	if (text && rc == 0)
		rc = file_write_atomic(path, text, strlen(text), 0644, e);
	else
		rc = err_set(e, rc < 0 ? rc : -ENOMEM, "the model's config.json cannot be written");
	free(text);
	json_decref(o);
	return rc;
}

/* The tokenizer that made the tokens goes with the model, as Hugging Face's directories have it. */
static int copy_tokenizer(const struct export *x, struct err *e)
{
	char to[PATH_MAX], *from, *text;
	size_t bytes;
	int rc = path_in(to, x->tmp, "tokenizer.json");

	if (rc < 0)
		return err_set(e, rc, "%s: %s", x->tmp, strerror(-rc));
	rc = tokenizer_path(x->cfg.job->data.tokenizer, &from, e);
	if (rc < 0)
		return rc;
	rc = file_read(from, TOKENIZER_BYTES_MAX, &text, &bytes, e);
	free(from);
	if (rc < 0)
		return rc;
	rc = file_write_atomic(to, text, bytes, 0644, e);
	free(text);
	return rc;
}

static int write_header(struct export *x, struct err *e)
{
	char path[PATH_MAX], *header;
	size_t bytes;
	int rc = path_in(path, x->tmp, "model.safetensors");

	if (rc < 0)
		return err_set(e, rc, "%s: %s", x->tmp, strerror(-rc));
	rc = st_header_for(&x->table, &header, &bytes, x->order, e);
	if (rc < 0)
		return rc;
	x->fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
	rc = x->fd < 0 ? -errno : pwrite_full(x->fd, header, bytes, 0);
	free(header);
	x->file_at = bytes;
	return rc < 0 ? err_set(e, rc, "%s: %s", path, strerror(-rc)) : 0;
}

static int open_folder(struct export *x, struct err *e)
{
	int rc = path_in(x->tmp, x->cfg.run_dir, "model.tmp");

	if (rc == 0)
		rc = path_in(x->final, x->cfg.run_dir, "model");
	if (rc < 0)
		return err_set(e, rc, "%s: %s", x->cfg.run_dir, strerror(-rc));
	remove_tmp(x->tmp);
	if (mkdir(x->tmp, 0777) < 0)
		return err_set(e, -errno, "%s: %s", x->tmp, strerror(errno));
	rc = write_config(x, e);
	if (rc == 0 && x->cfg.job->data.tokenizer)
		rc = copy_tokenizer(x, e);
	return rc < 0 ? rc : write_header(x, e);
}

static int close_folder(struct export *x, struct err *e)
{
	int rc = fsync(x->fd) < 0 ? -errno : 0;

	if (close(x->fd) < 0 && rc == 0)
		rc = -errno;
	x->fd = -1;
	if (rc == 0)
		rc = sync_dir(x->tmp);
	if (rc == 0 && rename(x->tmp, x->final) < 0)
		rc = -errno;
	if (rc == 0)
		rc = sync_dir(x->cfg.run_dir);
	return rc < 0 ? err_set(e, rc, "%s: %s", x->final, strerror(-rc)) : 1;
}

/* ---------------------------------------------------------------- the pieces */

static bool all_asked(const struct export *x)
{
	return x->tensor == x->table.n_tensors;
}

/* The run that an element of a unit lies in. */
static uint32_t run_of(const struct unit_table *t, uint32_t unit, uint64_t element)
{
	uint32_t run = 0;

	while (unit_run_begin(t, unit, run + 1) <= element)
		run++;
	assert(run < t->unit[unit].n_runs);
	return run;
}

static int ask_next(struct export *x, struct piece *slot, struct err *e)
{
	const struct tensor_info *t = &x->table.tensor[x->order[x->tensor]];
	uint64_t from = t->offset + x->element, left = t->n - x->element;
	uint32_t run = run_of(&x->table, t->unit, from);
	uint64_t of_run = unit_run_begin(&x->table, t->unit, run + 1) - from;
	struct msg_export_read m = { .request = ++x->requests, .unit = t->unit, .offset = from };
	int rc;

	left = left < of_run ? left : of_run;
	m.n = (uint32_t)(left < PIECE_MAX / sizeof(float) ? left : PIECE_MAX / sizeof(float));
	*slot = (struct piece){
		.request = m.request,
		.member = page_map_owner(&x->map, t->unit, run),
		.n = m.n,
		.at = x->file_at,
	};
	rc = x->cfg.send(x->cfg.ctx, slot->member, &m);
	if (rc < 0)
		return err_set(e, rc, "the model cannot be read from shard service %u: %s", slot->member,
			       strerror(-rc));
	x->in_flight++;
	x->file_at += m.n * sizeof(float);
	x->element += m.n;
	if (x->element == t->n) {
		x->element = 0;
		x->tensor++;
	}
	return 0;
}

static int fill_window(struct export *x, struct err *e)
{
	int rc = 0;

	for (unsigned i = 0; i < WINDOW && rc == 0 && !all_asked(x); i++)
		if (!x->piece[i].request)
			rc = ask_next(x, &x->piece[i], e);
	return rc;
}

static struct piece *find_piece(struct export *x, uint64_t request)
{
	for (unsigned i = 0; i < WINDOW; i++)
		if (request && x->piece[i].request == request)
			return &x->piece[i];
	return NULL;
}

int export_take(struct export *x, uint32_t member, const struct msg_export_data *m, struct err *e)
{
	struct piece *p = find_piece(x, m->request);
	int rc;

	if (!p || p->member != member || m->bytes.bytes != p->n * sizeof(float))
		return err_set(e, -EPROTO, "a piece of the model that was not asked for");
	rc = pwrite_full(x->fd, m->bytes.data, m->bytes.bytes, p->at);
	if (rc < 0)
		return err_set(e, rc, "%s/model.safetensors: %s", x->tmp, strerror(-rc));
	p->request = 0;
	x->in_flight--;
	rc = fill_window(x, e);
	if (rc < 0)
		return rc;
	return x->in_flight ? 0 : close_folder(x, e);
}

/* -------------------------------------------------------------------- lifetime */

int export_open(const struct export_config *cfg, struct export **out, struct err *e)
{
	struct export *x = calloc(1, sizeof(*x));
	int rc;

	if (!x)
		return err_set(e, -ENOMEM, "out of memory to write the model");
	x->cfg = *cfg;
	x->fd = -1;
	rc = unit_table_init(&x->table, &cfg->job->model, e);
	if (rc < 0)
		goto err_export;
	rc = page_map_init(&x->map, &x->table, cfg->shards, cfg->n_shards, cfg->job->max_owners_per_unit);
	if (rc < 0) {
		err_set(e, rc, "out of memory to write the model");
		goto err_table;
	}
	rc = -ENOMEM;
	x->order = calloc(x->table.n_tensors, sizeof(*x->order));
	if (!x->order) {
		err_set(e, rc, "out of memory to write the model");
		goto err_map;
	}
	rc = open_folder(x, e);
	if (rc == 0)
		rc = fill_window(x, e);
	if (rc < 0)
		goto err_order;
	*out = x;
	return 0;
err_order:
	if (x->fd >= 0)
		close(x->fd);
	remove_tmp(x->tmp);
	free(x->order);
err_map:
	page_map_release(&x->map);
err_table:
	unit_table_release(&x->table);
err_export:
	free(x);
	return rc;
}

void export_free(struct export *x)
{
	if (!x)
		return;
	if (x->fd >= 0)
		close(x->fd);
	/* After the rename there is nothing of that name. */
	remove_tmp(x->tmp);
	free(x->order);
	page_map_release(&x->map);
	unit_table_release(&x->table);
	free(x);
}
