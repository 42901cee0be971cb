/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <sched.h>
#include <string.h>

#include <gmem/internal.h>
#include <gmem/migrate.h>
#include <gmem/sparse.h>
#include <gmem/trace.h>

#define SLOTS_MIN 1024
#define SLOTS_MAX (1ull << 26)

void gmem_trace_init(struct gmem_trace *trace)
{
	memset(trace, 0, sizeof(*trace));
	gmem_mutex_init(&trace->lock, GMEM_RANK_TRACE);
}

void gmem_trace_deinit(struct gmem_trace *trace)
{
	gmem_trace_end(trace);
	gmem_trace_free(trace);
	gmem_mutex_deinit(&trace->lock);
}

static uint64_t slots_for(uint64_t bytes)
{
	uint64_t slots = SLOTS_MIN;

	while (slots < SLOTS_MAX && slots * 2 * sizeof(struct gmem_trace_slot) <= bytes)
		slots *= 2;
	return slots;
}

/* Each slot is written, so that no writer meets memory that is not there yet. */
static int make_slots_locked(struct gmem_trace *trace, uint64_t size)
{
	trace->slots = gmem_sparse_map(size * sizeof(*trace->slots));
	if (!trace->slots)
		return -ENOMEM;
	for (uint64_t i = 0; i < size; i++)
		atomic_store_explicit(&trace->slots[i].turn, i, memory_order_relaxed);
	trace->size = size;
	trace->read = 0;
	atomic_store(&trace->next, 0);
	atomic_store(&trace->lost, 0);
	return 0;
}

int gmem_trace_begin(struct gmem_trace *trace, const struct gmem_trace_config *config)
{
	int err;

	gmem_mutex_lock(&trace->lock);
	err = trace->slots ? -EBUSY : make_slots_locked(trace, slots_for(config->buffer_bytes));
	if (!err) {
		trace->session = config->session;
		trace->hnid = config->hnid;
		trace->start_ns = gmem_now_ns();
		atomic_store(&trace->on, true);
	}
	gmem_mutex_unlock(&trace->lock);
	return err;
}

/* Whoever has not counted himself among the writers by now finds it off. */
void gmem_trace_end(struct gmem_trace *trace)
{
	atomic_store(&trace->on, false);
	while (atomic_load(&trace->writers))
		sched_yield();
}

void gmem_trace_free(struct gmem_trace *trace)
{
	gmem_mutex_lock(&trace->lock);
	if (!atomic_load(&trace->on)) {
		gmem_sparse_unmap(trace->slots, trace->size * sizeof(*trace->slots));
		trace->slots = NULL;
	}
	gmem_mutex_unlock(&trace->lock);
}

size_t gmem_trace_take(struct gmem_trace *trace, struct gmem_access *accesses, size_t capacity, uint64_t *ret_lost)
{
	size_t count = 0;

	gmem_mutex_lock(&trace->lock);
	while (trace->slots && count < capacity) {
		struct gmem_trace_slot *slot = &trace->slots[trace->read & (trace->size - 1)];

		if (atomic_load_explicit(&slot->turn, memory_order_acquire) != trace->read + 1)
			break;
		accesses[count++] = slot->access;
		atomic_store_explicit(&slot->turn, trace->read + trace->size, memory_order_release);
		trace->read++;
	}
	*ret_lost = gmem_counter(&trace->lost);
	gmem_mutex_unlock(&trace->lock);
	return count;
}

/* What takes a page away from the hnode that is looked at belongs to its trace, too. */
static bool is_wanted(const struct gmem_trace *trace, uint64_t session, const struct gmem_access *access)
{
	if (trace->session && trace->session != session)
		return false;
	return trace->hnid < 0 || access->hnid == trace->hnid || access->kind == GMEM_ACCESS_GONE ||
	       gmem_access_takes(access);
}

static void put(struct gmem_trace *trace, const struct gmem_access *access)
{
	uint64_t at = atomic_load_explicit(&trace->next, memory_order_relaxed);

	for (;;) {
		struct gmem_trace_slot *slot = &trace->slots[at & (trace->size - 1)];
		uint64_t turn = atomic_load_explicit(&slot->turn, memory_order_acquire);

		if (turn < at) { /* not read yet, a whole turn ago */
			gmem_count(&trace->lost, 1);
			return;
		}
		if (turn > at) {
			at = atomic_load_explicit(&trace->next, memory_order_relaxed);
			continue;
		}
		if (atomic_compare_exchange_weak_explicit(&trace->next, &at, at + 1, memory_order_relaxed,
							  memory_order_relaxed)) {
			slot->access = *access;
			atomic_store_explicit(&slot->turn, at + 1, memory_order_release);
			return;
		}
	}
}

void gmem_trace_add(struct gmem_trace *trace, uint64_t session, struct gmem_access access)
{
	atomic_fetch_add(&trace->writers, 1);
	if (atomic_load(&trace->on) && is_wanted(trace, session, &access)) {
		access.time_ns = gmem_now_ns() - trace->start_ns;
		access.session = (uint32_t)session;
		put(trace, &access);
	}
	atomic_fetch_sub_explicit(&trace->writers, 1, memory_order_release);
}

/* ---- for the core's other files ---- */

void gmem_page_trace(const struct gmem_page *page, const struct gmem_use *use)
{
	uint32_t before = gmem_word_valid(use->before);
	struct gmem_access access = { .page = page->pn, .va = use->va, .hnid = (uint8_t)use->hnid,
				      .kind = (uint8_t)use->kind, .shift = page->object->shift };

	if (use->write)
		access.flags |= GMEM_ACCESS_WRITE;
	if (before >> use->hnid & 1)
		access.flags |= GMEM_ACCESS_RESIDENT;
	if (!before)
		access.flags |= GMEM_ACCESS_EMPTY;
	if (gmem_word_writer(page->word) == use->hnid)
		access.flags |= GMEM_ACCESS_OWNED;
	gmem_trace_add(&page->core->trace, use->session, access);
}

void gmem_object_trace_gone(const struct gmem_object *object, uint64_t index, uint64_t pages)
{
	struct gmem_access access = { .page = object->pn + index, .va = pages, .hnid = GMEM_ACCESS_NOWHERE,
				      .kind = GMEM_ACCESS_GONE, .shift = object->shift };

	gmem_trace_add(&object->core->trace, object->account->session_id, access);
}

/* ---- core.h ---- */

int gmem_trace_start(struct gmem_core *core, const struct gmem_trace_config *config)
{
	if (config->hnid >= 0 && !gmem_core_hnode(core, config->hnid))
		return -ENODEV;
	return gmem_trace_begin(&core->trace, config);
}

void gmem_trace_stop(struct gmem_core *core)
{
	gmem_trace_end(&core->trace);
}

size_t gmem_trace_read(struct gmem_core *core, struct gmem_access *accesses, size_t capacity, uint64_t *ret_lost)
{
	return gmem_trace_take(&core->trace, accesses, capacity, ret_lost);
}

void gmem_trace_close(struct gmem_core *core)
{
	gmem_trace_end(&core->trace);
	gmem_trace_free(&core->trace);
}
