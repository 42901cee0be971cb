/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "beside.h"
#include "copies.h"
#include "link.h"
#include "ring.h"
#include "syscalls.h"
#include "vma.h"

#define NO_HNID (-1)
#define ADVISE_DISCARD 4
#define ADVISE_FREEZE 0x1020 /* of gmemd's enum gmem_advice */
#define ADVISE_THAW 0x1021
#define ADVISE_ZERO 0x1022

struct region {
	uint64_t va, bytes, page_bytes;
	bool huge, copied;
};

static int call(struct gmem_link *link, struct gmem_ring_sqe sqe, struct gmem_ring_cqe *ret)
{
	int err = gmem_ring_call(link, &sqe, ret);

	return err ? err : ret->result;
}

/* The region at va, or the next one behind it. -ENOENT: there is none. */
static int next_region(struct gmem_link *link, uint64_t va, struct region *ret)
{
	struct gmem_ring_cqe cqe;
	int err = call(link, (struct gmem_ring_sqe){ .op = GMEM_RING_REGION, .flags = GMEM_RING_NEXT, .va = va }, &cqe);

	if (err)
		return err == -EINVAL ? -ENOENT : err;
	*ret = (struct region){ cqe.values[GMEM_RING_VA], cqe.values[GMEM_RING_LENGTH], cqe.values[GMEM_RING_PAGE_BYTES],
				cqe.values[GMEM_RING_HUGE], cqe.values[GMEM_RING_COPIED] };
	return ret->va + ret->bytes > va ? 0 : -ENOENT;
}

static int advise_all(struct gmem_link *link, uint64_t advice)
{
	struct gmem_ring_sqe sqe = { .op = GMEM_RING_ADVISE, .hnid = NO_HNID, .arg = advice };
	struct gmem_ring_cqe cqe;
	struct region region;
	int err = 0, next;

	for (uint64_t va = 0; !(next = next_region(link, va, &region)); va = region.va + region.bytes) {
		int here;

		sqe.va = region.va;
		sqe.bytes = region.bytes;
		here = region.copied ? call(link, sqe, &cqe) : 0;
		err = err ? err : here;
	}
	return err || next == -ENOENT ? err : next;
}

int gmem_copies_freeze(struct gmem_link *link)
{
	int err = link->copies && link->ring ? advise_all(link, ADVISE_FREEZE) : 0;

	if (err)
		gmem_copies_thaw(link);
	return err;
}

/* The only way in which it fails is that the session has ended, and then nothing of it is frozen. */
void gmem_copies_thaw(struct gmem_link *link)
{
	if (link->copies && link->ring)
		advise_all(link, ADVISE_THAW);
}

/* ---- in the child ---- */

static int move(uint64_t to, uint64_t from, uint64_t bytes)
{
	void *at = gmem_sys_mremap((void *)(uintptr_t)from, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED,
				   (void *)(uintptr_t)to);

	return at == MAP_FAILED ? -errno : 0;
}

/* Through the window, as what is there has to stay until its copy is complete. */
static int make_copy(struct gmem_link *link, const struct region *region, const struct gmem_ring_cqe *fresh)
{
	uint64_t at = fresh->values[GMEM_RING_VA], whole = fresh->values[GMEM_RING_LENGTH];
	struct gmem_ring_sqe copy = { .op = GMEM_RING_HMEMCPY, .flags = GMEM_RING_TOUCHED, .hnid = NO_HNID, .va = at,
				      .bytes = region->bytes, .arg = region->va };
	struct gmem_ring_cqe cqe;
	int err = gmem_link_map(link, at, whole, fresh->values[GMEM_RING_OFFSET], fresh->values[GMEM_RING_HUGE], true);

	if (err)
		return err;
	err = call(link, (struct gmem_ring_sqe){ .op = GMEM_RING_MMAP_COMMIT, .va = at }, &cqe);
	if (!err)
		err = call(link, copy, &cqe);
	if (!err)
		err = move(region->va, at, region->bytes);
	if (err) {
		gmem_link_unmap(link, at, whole);
		return err;
	}
	gmem_link_forget(link, at, region->bytes);
	if (whole > region->bytes)
		gmem_link_unmap(link, at + region->bytes, whole - region->bytes);
	return 0;
}

static int replace(struct gmem_link *link, const struct region *region)
{
	struct gmem_ring_sqe reserve = { .op = GMEM_RING_MMAP, .bytes = region->bytes, .arg = region->page_bytes,
					 .flags = GMEM_RING_COPY | (region->huge ? 0 : GMEM_RING_SMALL) };
	struct gmem_ring_cqe fresh, cqe;
	int err = call(link, reserve, &fresh);

	if (err)
		return err;
	err = make_copy(link, region, &fresh);
	/* nothing is there any more: it returns when gmemd has heard of the move */
	call(link, (struct gmem_ring_sqe){ .op = GMEM_RING_MUNMAP, .va = fresh.values[GMEM_RING_VA],
					   .bytes = fresh.values[GMEM_RING_LENGTH] }, &cqe);
	return err;
}

void gmem_copies_take(struct gmem_link *link)
{
	struct region region;
	int next;

	if (!link->copies)
		return;
	if (!link->ring) {
		gmem_copies_unmap(link);
		return;
	}
	for (uint64_t va = 0; !(next = next_region(link, va, &region)); va = region.va + region.bytes) {
		int err = !region.copied ? 0 : link->torn ? link->torn : replace(link, &region);

		if (!err)
			continue;
		dprintf(STDERR_FILENO, "gmem: [0x%llx, 0x%llx) could not be copied for a forked child, and is not mapped there: %s\n",
			(unsigned long long)region.va, (unsigned long long)(region.va + region.bytes), strerror(-err));
		gmem_link_unmap(link, region.va, region.bytes);
	}
	if (next == -ENOENT)
		return;
	dprintf(STDERR_FILENO, "gmem: memory could not be copied for a forked child, and is not mapped there: %s\n", strerror(-next));
	gmem_copies_unmap(link); /* what is its own by now, too: which that is nobody can tell any more */
}

/* ---- beside the window ---- */

static bool is_ours(const struct gmem_link *link, const struct gmem_vma *vma)
{
	uint64_t base = link->hello.window_base;

	if (vma->va < base + link->hello.window_bytes && vma->end > base)
		return false;
	for (int i = 0; i < GMEM_FILES; i++)
		if (vma->inode && vma->inode == link->inodes[i])
			return true;
	return false;
}

static int unmap_one(const struct gmem_vma *vma, void *arg)
{
	if (!is_ours(arg, vma))
		return 0;
	gmem_sys_munmap((void *)(uintptr_t)vma->va, vma->end - vma->va);
	return 1; /* the list has changed */
}

static int withhold_one(const struct gmem_vma *vma, void *arg)
{
	if (is_ours(arg, vma))
		gmem_sys_madvise((void *)(uintptr_t)vma->va, vma->end - vma->va, MADV_DONTFORK);
	return 0;
}

/* What has been unmapped meanwhile is no error. */
int gmem_copies_drop(struct gmem_link *link, uint64_t va, uint64_t bytes, bool zeroed)
{
	uint64_t base = link->hello.window_base, end = va + bytes;
	struct region region;
	int err = 0;

	if (!link->copies || !link->ring)
		return 0;
	for (; !err && va < end && !(err = next_region(link, va, &region)) && region.va < end; va = region.va + region.bytes) {
		uint64_t from = region.va > va ? region.va : va, stop = region.va + region.bytes;
		struct gmem_ring_sqe sqe = { .op = GMEM_RING_ADVISE, .hnid = NO_HNID, .va = from,
					     .bytes = (stop < end ? stop : end) - from,
					     .arg = zeroed ? ADVISE_ZERO : ADVISE_DISCARD };
		struct gmem_ring_cqe cqe;

		if (region.va < base + link->hello.window_bytes && stop > base)
			continue;
		err = call(link, sqe, &cqe);
		if (err == -EINVAL)
			err = 0;
	}
	return err == -ENOENT ? 0 : err;
}

struct cover {
	const struct gmem_link *link;
	uint64_t at;
};

static int cover_one(const struct gmem_vma *vma, void *arg)
{
	struct cover *cover = arg;

	if (vma->va > cover->at || !is_ours(cover->link, vma))
		return 1;
	cover->at = vma->end;
	return 0;
}

bool gmem_copies_cover(struct gmem_link *link, uint64_t va, uint64_t bytes)
{
	struct cover cover = { link, va };

	return va + bytes > va && !gmem_vma_each(va, va + bytes, cover_one, &cover) && cover.at >= va + bytes;
}

void gmem_copies_unmap(struct gmem_link *link)
{
	gmem_beside_remove(link->beside, 0, UINT64_MAX);
	while (link->copies && gmem_vma_each(0, UINT64_MAX, unmap_one, link) > 0)
		;
}

void gmem_copies_withhold(struct gmem_link *link)
{
	if (link->copies)
		gmem_vma_each(0, UINT64_MAX, withhold_one, link);
}
