/* SPDX-License-Identifier: Apache-2.0 */
#include <gmem/age.h>
#include <gmem/agent.h>
#include <gmem/internal.h>

#define BATCH 64
#define VIEWS 8

struct old {
	struct gmem_object *object; /* referenced */
	uint64_t index;
};

struct sweep {
	struct gmem_view *views[VIEWS]; /* asked, and not flushed; referenced */
	size_t view_count;
	struct old olds[BATCH];
	size_t count;
};

static void flush(struct sweep *sweep)
{
	while (sweep->view_count) {
		struct gmem_view *view = sweep->views[--sweep->view_count];

		gmem_agent_flush(atomic_load(&view->agent));
		gmem_view_unref(view);
	}
}

static void remember(struct sweep *sweep, struct gmem_view *view)
{
	for (size_t i = 0; i < sweep->view_count; i++)
		if (sweep->views[i] == view)
			return;
	if (sweep->view_count == VIEWS)
		flush(sweep);
	sweep->views[sweep->view_count++] = gmem_view_ref(view);
}

static int age_view(struct gmem_view *view, struct gmem_range range, void *arg)
{
	struct gmem_agent *agent = atomic_load(&view->agent);

	if (agent && view->replayable) { /* else the next use would be its last */
		gmem_agent_put(agent, range);
		remember(arg, view);
	}
	return 0;
}

/* What stays whether it is used or not is left alone: its next use would be a fault for nothing. */
static bool stays(const struct gmem_frame *frame)
{
	const struct gmem_object *object = frame->object;
	gmem_word_t word = atomic_load_explicit(&object->core->lpt.words[object->pn + frame->index], memory_order_relaxed);

	return gmem_word_flags(word) & GMEM_PAGE_PINNED;
}

/* The hand: what is marked as used is passed over, and loses its mark. */
static void gather(struct gmem_hnode *hnode, uint64_t steps, struct sweep *sweep)
{
	gmem_mutex_lock(&hnode->lock);
	for (; steps && hnode->frames_bumped > 1; steps--) {
		struct gmem_frame *frame;

		if (++hnode->age_hand >= hnode->frames_bumped)
			hnode->age_hand = 1;
		frame = &hnode->frames[hnode->age_hand];
		if (!frame->object || atomic_exchange_explicit(&frame->used, 0, memory_order_relaxed) ||
		    stays(frame) || !gmem_object_tryref(frame->object))
			continue;
		sweep->olds[sweep->count++] = (struct old){ frame->object, frame->index };
	}
	gmem_mutex_unlock(&hnode->lock);
}

void gmem_age(struct gmem_hnode *hnode, uint64_t evicted)
{
	uint64_t steps = evicted * GMEM_AGE_PACE;
	struct sweep sweep;

	sweep.view_count = 0;
	while (steps) {
		uint64_t some = steps < BATCH ? steps : BATCH;

		sweep.count = 0;
		gather(hnode, some, &sweep);
		for (size_t i = 0; i < sweep.count; i++) {
			struct gmem_object *object = sweep.olds[i].object;

			gmem_object_for_views(object, hnode->hnid, sweep.olds[i].index << object->shift,
					      1ull << object->shift, age_view, &sweep);
			gmem_object_unref(object);
		}
		gmem_count(&hnode->core->stats.aged_pages, sweep.count);
		steps -= some;
	}
	flush(&sweep);
}
