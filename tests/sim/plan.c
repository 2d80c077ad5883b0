/* SPDX-License-Identifier: Apache-2.0 */
/* From a seed to a job and its troubles. */
#include "tests/sim/sim.h"

#include <inttypes.h>
#include <string.h>

uint32_t plan_pieces(const struct plan *p)
{
	return p->n_units + p->two_parts;
}

uint32_t piece_unit(const struct plan *p, uint32_t piece)
{
	return piece < p->n_units ? piece : 0;
}

uint32_t piece_part(const struct plan *p, uint32_t piece)
{
	return piece < p->n_units ? 0 : 1;
}

static uint64_t pick(struct chance *c, const uint64_t *of, uint32_t n)
{
	return of[chance_below(c, n)];
}
#define PICK(c, ...) pick(c, (const uint64_t[]){ __VA_ARGS__ }, ARRAY_LEN(((const uint64_t[]){ __VA_ARGS__ })))

/* Every unit has an owner and every owner something of a unit; a second part is on some of unit 0's pages. */
static void choose_owners(struct plan *p, struct chance *c)
{
	for (uint32_t u = 0; u < p->n_units; u++)
		p->owns[u] = (uint8_t)chance_range(c, 1, (1u << p->n_owners) - 1);
	for (uint32_t o = 0; o < p->n_owners; o++)
		p->owns[o % p->n_units] |= (uint8_t)(1u << o);
	if (!p->two_parts)
		return;
	p->owns[p->n_units] = p->owns[0] & (uint8_t)chance_u64(c);
	if (!p->owns[p->n_units])
		p->owns[p->n_units] = p->owns[0];
}

static void choose_size(struct plan *p, struct chance *c, const struct plan_options *o)
{
	p->n_owners = (uint32_t)(o->owners ? o->owners : chance_range(c, 1, 5));
	p->n_units = (uint32_t)(o->units ? o->units : chance_range(c, 1, 6));
	p->n_workers = (uint32_t)(o->workers ? o->workers : chance_range(c, 1, 9));
	p->two_parts = chance_of(c, 500);
	p->n_micro = (uint32_t)(o->micro ? o->micro : PICK(c, 1, 2, 3, 5, 8, 11, 12, 16, 23, 32, 40, 64, 64, 100, 150));
	p->steps = o->steps ? o->steps : chance_range(c, 1, 3);
	p->n_eval = chance_of(c, 500) ? (uint32_t)chance_range(c, 1, 9) : 0;
	p->eval_interval = chance_below(c, 3);
	p->hash_interval = chance_below(c, 3);
	p->max_held = (uint32_t)(o->held ? o->held : PICK(c, 1, 1, 2, 3, 8));
	p->pool = (uint32_t)PICK(c, 0, 0, 1, 2, 5, 64, 1000);
}

static void choose_trouble(struct plan *p, struct chance *c)
{
	uint64_t work;

	p->push_per_1000 = (uint32_t)PICK(c, 0, 500, 1000);
	p->max_span = (uint32_t)PICK(c, 0, 0, 1, 2, 4, 1000);
	p->latency_ns = PICK(c, 20 * SIM_US, 200 * SIM_US, 5 * SIM_MS);
	p->compute_ns = PICK(c, 100 * SIM_US, 2 * SIM_MS, 20 * SIM_MS);
	p->fold_ns = PICK(c, 2 * SIM_US, 100 * SIM_US, 5 * SIM_MS);
	p->slow_per_1000 = (uint32_t)PICK(c, 0, 0, 300);
	p->lag_per_1000 = (uint32_t)PICK(c, 0, 50, 300);
	p->repeat_per_1000 = (uint32_t)PICK(c, 0, 50, 300);
	p->defer_per_1000 = (uint32_t)PICK(c, 0, 0, 200);
	p->kills = (uint32_t)PICK(c, 0, 2, 5, 10);
	p->joins = p->kills ? (uint32_t)chance_below(c, p->kills + 3) : (uint32_t)chance_below(c, 2);
	p->freezes = (uint32_t)PICK(c, 0, 0, 1, 3);
	p->kill_per_1000 = (uint32_t)PICK(c, 0, 3, 30, 300);
	work = p->steps * p->n_micro * p->n_units * 3 * p->compute_ns / p->n_workers;
	p->stop_at_ns = chance_of(c, 100) ? chance_range(c, 1, 2 * work + 10 * SIM_MS) : 0;
}

/* By chance of its own, so that whoever adds to the above gets other troubles but the same hosts. */
static void choose_hosts(struct plan *p, uint64_t seed, const struct plan_options *o)
{
	struct chance c = { .state = seed * 1000003 + 500 };

	p->per_host = (uint32_t)PICK(&c, 0, 0, 2, 3, 4, 8);
	p->per_host = o->per_host ? (uint32_t)o->per_host : p->per_host;
	p->host_wait_ns = PICK(&c, 0, 300 * SIM_US, 5 * SIM_MS, 100 * SIM_MS);
	p->add_ns = PICK(&c, 2 * SIM_US, 100 * SIM_US, 5 * SIM_MS, 50 * SIM_MS);
	p->at_sums = p->per_host && chance_of(&c, 700);
	if (p->at_sums) {
		p->kills = (uint32_t)PICK(&c, 2, 5, 10);
		p->kill_per_1000 = (uint32_t)PICK(&c, 10, 100, 300);
	}
	p->returned = p->per_host ? (uint32_t)PICK(&c, 0, 3, 10) : 0;
	p->stranger_per_1000 = (uint32_t)PICK(&c, 0, 0, 100);
	p->partings = p->per_host ? (uint32_t)PICK(&c, 0, 0, 1, 3) : 0;
	/* Who is read in place has nothing to add. */
	if (p->per_host)
		p->push_per_1000 = (uint32_t)PICK(&c, 500, 1000, 1000);
}

void plan_make(struct plan *p, uint64_t seed, const struct plan_options *o)
{
	struct chance c = { .state = seed * 1000003 };

	memset(p, 0, sizeof(*p));
	choose_size(p, &c, o);
	choose_owners(p, &c);
	choose_trouble(p, &c);
	choose_hosts(p, seed, o);
}

void plan_print(const struct plan *p)
{
	printf("plan: %u owners, %u units%s, %u workers, M %u, E %u every %" PRIu64 ", %" PRIu64
	       " steps, K %u, pool %u\n",
	       p->n_owners, p->n_units, p->two_parts ? " (unit 0 in two parts)" : "", p->n_workers, p->n_micro,
	       p->n_eval, p->eval_interval, p->steps, p->max_held, p->pool);
	printf("      push %u/1000, max span %u, latency %" PRIu64 " us, compute %" PRIu64 " us, fold %" PRIu64 " us\n",
	       p->push_per_1000, p->max_span, p->latency_ns / SIM_US, p->compute_ns / SIM_US, p->fold_ns / SIM_US);
	if (p->per_host)
		printf("      %u workers a host wait %" PRIu64 " us, add for %" PRIu64
		       " us%s, strangers %u/1000, %u partings, %u returned\n",
		       p->per_host, p->host_wait_ns / SIM_US, p->add_ns / SIM_US, p->at_sums ? " and die at it" : "",
		       p->stranger_per_1000, p->partings, p->returned);
	printf("      slow %u/1000, lag %u/1000, repeat %u/1000, defer %u/1000, %u kills (%u/1000), %u joins, %u freezes, stop at %" PRIu64
	       " us\n",
	       p->slow_per_1000, p->lag_per_1000, p->repeat_per_1000, p->defer_per_1000, p->kills, p->kill_per_1000,
	       p->joins, p->freezes, p->stop_at_ns / SIM_US);
}
