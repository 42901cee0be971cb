/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <sched.h>

#include <gmem/pmap.h>
#include <gmem/uffd.h>

#define EAGAIN_RETRIES 64

int gmem_uffd_pmap_enter(struct gmem_pmap *pmap, struct gmem_range range, uint64_t frame, enum gmem_prot prot)
{
	struct gmem_view *view = gmem_pmap_view(pmap);
	bool read_only = prot == GMEM_PROT_READ;
	int err = gmem_uffd_continue(view->uffd, range.va, range.bytes, read_only, true);

	(void)frame;
	if (err != -EEXIST)
		return err;
	/* Someone mapped it before us, perhaps read-only; and EEXIST does not mean that the waiter was woken. */
	err = read_only ? 0 : gmem_uffd_protect(view->uffd, range.va, range.bytes, false, true);
	if (err)
		return err;
	return gmem_uffd_wake(view->uffd, range.va, range.bytes);
}

int gmem_uffd_pmap_protect(struct gmem_pmap *pmap, struct gmem_range range, enum gmem_prot prot)
{
	struct gmem_view *view = gmem_pmap_view(pmap);
	int err = -EAGAIN;

	/* EAGAIN lasts until the event is read and its thread has run: yield to it, then leave it to the caller. */
	for (int i = 0; err == -EAGAIN && i < EAGAIN_RETRIES; i++) {
		if (i)
			sched_yield();
		err = gmem_uffd_protect(view->uffd, range.va, range.bytes, prot == GMEM_PROT_READ, true);
	}
	return err;
}

int gmem_uffd_pmap_wake(struct gmem_pmap *pmap, struct gmem_range range)
{
	return gmem_uffd_wake(gmem_pmap_view(pmap)->uffd, range.va, range.bytes);
}

int gmem_uffd_pmap_poison(struct gmem_pmap *pmap, struct gmem_range range)
{
	struct gmem_view *view = gmem_pmap_view(pmap);
	int err;

	/* a write-protect marker would make it EEXIST */
	gmem_uffd_protect(view->uffd, range.va, range.bytes, false, false);
	err = gmem_uffd_poison(view->uffd, range.va, range.bytes);
	gmem_uffd_wake(view->uffd, range.va, range.bytes);
	return err;
}
