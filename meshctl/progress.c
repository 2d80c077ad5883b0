/* SPDX-License-Identifier: Apache-2.0 */
#include "meshctl/meshctl.h"

#include <math.h>
#include <string.h>
#include <unistd.h>

#define BAR_WIDTH 24
#define LINES_A_RUN 40 /* how many lines a run of any length prints when nothing was asked for */

void progress_init(struct progress_view *p, FILE *out, const struct job_config *c)
{
	memset(p, 0, sizeof(*p));
	p->out = out;
	p->terminal = isatty(fileno(out));
	p->steps = c->steps;
	p->print_every = c->steps_per_print;
	if (!p->print_every)
		p->print_every = c->steps / LINES_A_RUN ? c->steps / LINES_A_RUN : 1;
	p->started_ns = clock_now_ns();
}

void progress_clear(struct progress_view *p)
{
	if (p->bar_shown)
		fprintf(p->out, "\r\033[K");
	p->bar_shown = false;
}

static void duration_text(double seconds, char out[16])
{
	unsigned long s = seconds > 0 ? lround(seconds) : 0;

	if (s >= 3600)
		snprintf(out, 16, "%lu:%02lu:%02lu", s / 3600 % 100000, s / 60 % 60, s % 60);
	else
		snprintf(out, 16, "%lu:%02lu", s / 60, s % 60);
}

static void figures(struct progress_view *p, char *out, size_t bytes)
{
	int n = snprintf(out, bytes, "loss %.4f", p->loss);

	if (p->has_validation && n > 0 && (size_t)n < bytes)
		n += snprintf(out + n, bytes - (size_t)n, "  held-out %.4f", p->validation_loss);
	if (n > 0 && (size_t)n < bytes)
		snprintf(out + n, bytes - (size_t)n, "  %.0f tokens/s", p->tokens_per_second);
}

static void draw_bar(struct progress_view *p)
{
	uint64_t done = p->last_step - p->first_step + 1;
	double elapsed = clock_seconds(clock_now_ns() - p->started_ns);
	int filled = p->steps ? (int)(BAR_WIDTH * p->last_step / p->steps) : 0;
	char text[128], eta[16];

	if (filled > BAR_WIDTH)
		filled = BAR_WIDTH;
	figures(p, text, sizeof(text));
	duration_text(elapsed / (double)done * (double)(p->steps - p->last_step), eta);
	fprintf(p->out, "\r\033[K%lu/%lu [%.*s%.*s] %s  ETA %s", (unsigned long)p->last_step, (unsigned long)p->steps,
		filled, "########################", BAR_WIDTH - filled, "........................", text, eta);
	fflush(p->out);
	p->bar_shown = true;
}

static void print_line(struct progress_view *p)
{
	char text[128];

	figures(p, text, sizeof(text));
	fprintf(p->out, "step %lu/%lu  %s\n", (unsigned long)p->last_step, (unsigned long)p->steps, text);
	fflush(p->out);
}

void progress_summary(struct progress_view *p, json_t *summary)
{
	json_t *validation = json_object_get(summary, "validation_loss");

	if (!json_is_number(validation))
		return;
	p->validation_loss = json_number_value(validation);
	p->has_validation = true;
}

void progress_step(struct progress_view *p, json_t *step)
{
	double rate = json_number_value(json_object_get(step, "tokens_per_second"));

	p->last_step = (uint64_t)json_integer_value(json_object_get(step, "step"));
	if (!p->first_step)
		p->first_step = p->last_step;
	p->loss = json_number_value(json_object_get(step, "loss"));
	/* A running mean, so that the figure can be read: single steps jitter. */
	p->tokens_per_second = p->tokens_per_second > 0 ? p->tokens_per_second + 0.1 * (rate - p->tokens_per_second)
							: rate;
	progress_summary(p, step);
	if (p->terminal)
		draw_bar(p);
	else if (p->last_step == p->first_step || p->last_step == p->steps || p->last_step % p->print_every == 0)
		print_line(p);
}
