/* SPDX-License-Identifier: Apache-2.0 */
#include <stdlib.h>
#include <unistd.h>

#include <gmem/agent.h>
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
	close(view->uffd);
	if (view->pidfd >= 0)
		close(view->pidfd);
	gmem_session_unref(view->session);
	gmem_agent_destroy(atomic_load(&view->agent));
	free(view);
}
