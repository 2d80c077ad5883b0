/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a config says of networks: "shardmesh.fabric" and the section
 * "shardmesh.rdma". This folder knows which words and numbers there are; what
 * they do is rdma's, which takes them by name, as text.
 */
#include "model/ds_keys.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define FAULT "fault:" /* --fabric fault:SPEC:NAME, for tests */

static const struct option {
	const char *name;
	uint64_t max;             /* of a number */
	const char *const *words; /* or one of these, */
	bool text;                /* or any text */
} options[] = {
	{ .name = "connect", .words = (const char *const[]){ "auto", "cm", "control", NULL } },
	{ .name = "devices", .text = true },
	{ .name = "queue_pairs", .max = 64 },
	{ .name = "gid_index", .max = 65535 },
	{ .name = "mtu", .max = 4096 },
	{ .name = "pkey_index", .max = 65535 },
	{ .name = "service_level", .max = 15 },
	{ .name = "traffic_class", .max = 255 },
	{ .name = "timeout", .max = 31 },
	{ .name = "ofi_provider", .text = true },
};
static_assert(ARRAY_LEN(options) == RDMA_SETTINGS_MAX, "a config has room for all of them");

static const struct option *find(const char *name)
{
	for (size_t i = 0; i < ARRAY_LEN(options); i++)
		if (!strcmp(options[i].name, name))
			return &options[i];
	return NULL;
}

static struct rdma_setting *place_of(struct job_config *c, const char *name)
{
	for (uint32_t i = 0; i < c->n_rdma; i++)
		if (!strcmp(c->rdma[i].name, name))
			return &c->rdma[i];
	return &c->rdma[c->n_rdma++];
}

int job_config_set_rdma(struct job_config *c, const char *name, const char *value)
{
	const struct option *o = find(name);
	struct rdma_setting *s;
	char *copy;

	if (!o)
		return -EINVAL;
	copy = strdup(value);
	if (!copy)
		return -ENOMEM;
	s = place_of(c, name);
	free(s->value);
	*s = (struct rdma_setting){ .name = o->name, .value = copy };
	return 0;
}

static int read_text(struct ds_parse *p, const struct json_path *path, const json_t *v, const struct option *o)
{
	char words[64];
	size_t i = 0;

	if (!json_is_string(v) || !json_string_length(v))
		return json_fail(&p->doc, path, p->e, "expected a string, found %s", json_words(v, words));
	while (o->words && o->words[i] && strcmp(o->words[i], json_string_value(v)) != 0)
		i++;
	if (o->words && !o->words[i])
		return json_fail(&p->doc, path, p->e, "expected \"auto\", \"cm\" or \"control\", found %s",
				 json_words(v, words));
	return job_config_set_rdma(p->c, o->name, json_string_value(v));
}

int ds_read_rdma(struct ds_parse *p, const struct json_path *path, const json_t *v)
{
	const struct option *o = find(path->key);
	char text[24];
	uint64_t n;
	int rc;

	if (json_is_auto(v))
		return 0;
	if (o->text || o->words)
		return read_text(p, path, v, o);
	rc = json_read_u64(&p->doc, path, v, 0, o->max, &n, p->e);
	if (rc)
		return rc;
	if (!strcmp(o->name, "mtu") && (n < 256 || (n & (n - 1))))
		return json_fail(&p->doc, path, p->e, "expected 256, 512, 1024, 2048 or 4096, found %llu",
				 (unsigned long long)n);
	snprintf(text, sizeof(text), "%llu", (unsigned long long)n);
	return job_config_set_rdma(p->c, o->name, text);
}

json_t *ds_rdma_json(const struct job_config *c)
{
	json_t *root = json_object();

	for (uint32_t i = 0; root && i < c->n_rdma; i++) {
		const struct rdma_setting *s = &c->rdma[i];
		bool number = find(s->name)->max > 0;
		json_t *v = number ? json_integer(strtoll(s->value, NULL, 10)) : json_string(s->value);

		if (json_object_set_new(root, s->name, v)) {
			json_decref(root);
			return NULL;
		}
	}
	return root;
}

void ds_rdma_release(struct job_config *c)
{
	for (uint32_t i = 0; i < c->n_rdma; i++)
		free(c->rdma[i].value);
}

bool ds_fabric_known(const char *name)
{
	static const char *const known[] = { "auto", "local", "local-copy", "verbs", "ofi" };

	if (!strncmp(name, FAULT, strlen(FAULT)) && strrchr(name, ':') >= name + strlen(FAULT))
		name = strrchr(name, ':') + 1;
	for (size_t i = 0; i < ARRAY_LEN(known); i++)
		if (!strcmp(name, known[i]))
			return true;
	return false;
}
