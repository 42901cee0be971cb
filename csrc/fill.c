/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>

#include <gmem/fill.h>
#include <gmem/internal.h>
#include <gmem/prefetch.h>

#define FILLERS 4 /* they sleep most of the time */

int gmem_work_post(struct gmem_core *core, const struct gmem_work *work)
{
	struct gmem_fillers *fillers = &core->fillers;
	int err = 0;

	gmem_mutex_lock(&fillers->lock);
	if (fillers->stop || (work->not_before_ns ? fillers->delayed_count == GMEM_WORK_DELAYED :
						    fillers->ring_count == GMEM_WORK_RING))
		err = -ENOBUFS;
	else if (work->not_before_ns)
		fillers->delayed[fillers->delayed_count++] = *work;
	else
		fillers->ring[(fillers->ring_head + fillers->ring_count++) % GMEM_WORK_RING] = *work;
	fillers->helped += !err && work->ahead;
	if (!err)
		pthread_cond_signal(&fillers->ready);
	gmem_mutex_unlock(&fillers->lock);
	return err;
}

static void do_work(struct gmem_core *core, struct gmem_work *work)
{
	if (work->object) {
		gmem_duty_begin(GMEM_DOING_AHEAD, work->object->account->session_id, 0);
		gmem_session_release_piece(work->object, work->offset, work->bytes, NULL);
		gmem_object_unref(work->object);
		return;
	}
	gmem_duty_begin(work->ahead ? GMEM_DOING_AHEAD : GMEM_DOING_FAULT, work->fault.view->session_id, work->fault.va);
	if (work->ahead)
		gmem_stream_help(core, work->fault.view);
	else
		gmem_fault_resolve(core, &work->fault, false);
	gmem_view_unref(work->fault.view);
}

/* What is due; false: nothing, and for how long (0: until somebody posts). At the end everything is due. */
static bool take_locked(struct gmem_fillers *fillers, struct gmem_work *ret, uint64_t *ret_wait_ns)
{
	uint64_t now = fillers->delayed_count ? gmem_now_ns() : 0, first = UINT64_MAX;

	for (size_t i = 0; i < fillers->delayed_count; i++) {
		uint64_t due = fillers->delayed[i].not_before_ns;

		if (due <= now || fillers->stop) {
			*ret = fillers->delayed[i];
			fillers->delayed[i] = fillers->delayed[--fillers->delayed_count];
			return true;
		}
		first = due < first ? due : first;
	}
	*ret_wait_ns = fillers->delayed_count ? first - now : 0;
	if (!fillers->ring_count)
		return false;
	*ret = fillers->ring[fillers->ring_head];
	fillers->ring_head = (fillers->ring_head + 1) % GMEM_WORK_RING;
	fillers->ring_count--;
	return true;
}

static void *filler_thread(void *arg)
{
	struct gmem_core *core = arg;
	struct gmem_fillers *fillers = &core->fillers;

	pthread_setname_np(pthread_self(), "gmem-fill");
	gmem_duty_enlist(core, GMEM_ROLE_FILL);
	gmem_mutex_lock(&fillers->lock);
	for (;;) {
		struct gmem_work work;
		uint64_t wait_ns;

		if (take_locked(fillers, &work, &wait_ns)) {
			if (fillers->delayed_count) /* somebody else is to keep the time */
				pthread_cond_signal(&fillers->ready);
			gmem_mutex_unlock(&fillers->lock);
			do_work(core, &work);
			gmem_duty_end();
			gmem_mutex_lock(&fillers->lock);
		} else if (fillers->stop) {
			break;
		} else {
			gmem_mutex_wait(&fillers->lock, &fillers->ready, wait_ns);
		}
	}
	gmem_mutex_unlock(&fillers->lock);
	gmem_duty_leave(core);
	return NULL;
}

static int start_filler(struct gmem_core *core)
{
	struct gmem_fillers *fillers = &core->fillers;
	uint32_t count = atomic_load(&fillers->count);
	int err = -pthread_create(&fillers->threads[count], NULL, filler_thread, core);

	if (!err)
		atomic_store(&fillers->count, count + 1);
	return err;
}

int gmem_fillers_start(struct gmem_core *core)
{
	int err = 0;

	gmem_mutex_init(&core->fillers.lock, GMEM_RANK_WORK);
	pthread_cond_init(&core->fillers.ready, NULL);
	while (!err && atomic_load(&core->fillers.count) < FILLERS)
		err = start_filler(core);
	return err;
}

void gmem_fillers_grow(struct gmem_core *core)
{
	if (atomic_load(&core->fillers.count) < GMEM_THREADS_MAX)
		start_filler(core);
}

void gmem_fillers_stop(struct gmem_core *core)
{
	struct gmem_fillers *fillers = &core->fillers;

	gmem_mutex_lock(&fillers->lock);
	fillers->stop = true;
	pthread_cond_broadcast(&fillers->ready);
	gmem_mutex_unlock(&fillers->lock);
	while (fillers->count)
		pthread_join(fillers->threads[--fillers->count], NULL);
	gmem_mutex_deinit(&fillers->lock);
	pthread_cond_destroy(&fillers->ready);
}
