/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include <gmem/agent.h>
#include <gmem/internal.h>
#include <gmem/pmap.h>
#include <gmem/session.h>
#include <gmem/view.h>

struct gmem_view *gmem_view_ref(struct gmem_view *view)
{
	atomic_fetch_add(&view->refs, 1);
	return view;
}

void gmem_view_unref(struct gmem_view *view)
{
	if (!view || atomic_fetch_sub(&view->refs, 1) != 1)
		return;
	if (view->pmap)
		view->hnode->ops->pmap_destroy(view->pmap);
	if (view->uffd >= 0)
		close(view->uffd);
	if (view->pidfd >= 0)
		close(view->pidfd);
	gmem_session_unref(view->session);
	gmem_agent_destroy(atomic_load(&view->agent));
	free(view);
}

/* A context whose process does not answer is over; movers do without it. */
static int answered(struct gmem_view *view, int err)
{
	gmem_duty_driver(view->hnid, NULL);
	if (err == -EOWNERDEAD && !atomic_exchange(&view->dead, true))
		gmem_core_post(view->session->core, GMEM_EVENT_VIEW_GONE, view->session_id, 0, view->id, view->hnid, 0);
	return err;
}

int gmem_view_enter(struct gmem_view *view, struct gmem_range range, struct gmem_object *object, uint64_t offset,
		    enum gmem_prot prot)
{
	const struct gmem_window *window = &view->session->core->window;
	struct gmem_file *file;
	int err;

	if (!view->pmap)
		return gmem_uffd_pmap_enter(gmem_view_pmap(view), range, 0, prot);
	if (range.va < window->base || range.va - window->base > window->bytes - range.bytes)
		return -EOPNOTSUPP; /* its process has reserved nothing else for the device */
	err = gmem_object_file(object, view->hnid, &file);
	if (err)
		return err;
	gmem_duty_driver(view->hnid, "pmap_map");
	return answered(view, view->hnode->ops->pmap_map(view->pmap, range, file->mem, object->offset + offset, prot));
}

int gmem_view_protect(struct gmem_view *view, struct gmem_range range, enum gmem_prot prot)
{
	if (!view->pmap)
		return gmem_uffd_pmap_protect(gmem_view_pmap(view), range, prot);
	gmem_duty_driver(view->hnid, "pmap_protect");
	return answered(view, view->hnode->ops->pmap_protect(view->pmap, range, prot));
}

int gmem_view_release(struct gmem_view *view, struct gmem_range range)
{
	if (!view->pmap)
		return 0;
	gmem_duty_driver(view->hnid, "pmap_release");
	return answered(view, view->hnode->ops->pmap_release(view->pmap, range));
}

int gmem_view_flush(struct gmem_view *view)
{
	if (!view->pmap)
		return 0;
	gmem_duty_driver(view->hnid, "pmap_flush");
	return answered(view, view->hnode->ops->pmap_flush(view->pmap));
}

void gmem_view_wake(struct gmem_view *view, struct gmem_range range)
{
	if (!view->pmap)
		gmem_uffd_pmap_wake(gmem_view_pmap(view), range);
}
