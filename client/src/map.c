/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "beside.h"
#include "cuda.h"
#include "link.h"
#include "syscalls.h"
#include "vma.h"

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif

/* Read-only is private: such a descriptor can't be mapped otherwise to be served by gmemd. */
static int map_at(uint64_t va, uint64_t bytes, int fd, uint64_t offset, int how, bool read_only, bool inherit)
{
	void *want = (void *)(uintptr_t)va;
	void *at = gmem_sys_mmap(want, bytes, PROT_READ | (read_only ? 0 : PROT_WRITE),
				 (read_only ? MAP_PRIVATE : MAP_SHARED) | MAP_NORESERVE | how, fd, (off_t)offset);

	if (at == MAP_FAILED)
		return -errno;
	if (at != want) { /* a kernel that takes FIXED_NOREPLACE for a hint */
		gmem_sys_munmap(at, bytes);
		return -EEXIST;
	}
	gmem_sys_madvise(at, bytes, MADV_DONTDUMP);
	if (!inherit)
		gmem_sys_madvise(at, bytes, MADV_DONTFORK);
	return 0;
}

static int remember(struct gmem_link *link, uint64_t va, uint64_t bytes, bool inherit)
{
	if (link->region_count == link->region_capacity) {
		size_t capacity = link->region_capacity ? link->region_capacity * 2 : 16;
		struct gmem_link_region *grown = realloc(link->regions, capacity * sizeof(*grown));

		if (!grown)
			return -ENOMEM;
		link->regions = grown;
		link->region_capacity = capacity;
	}
	link->regions[link->region_count++] = (struct gmem_link_region){ .va = va, .bytes = bytes, .inherit = inherit };
	return 0;
}

int gmem_link_map(struct gmem_link *link, uint64_t va, uint64_t bytes, uint64_t offset, bool huge, bool inherit)
{
	return link->files[huge] < 0 ? -ENOTCONN :
	       gmem_link_map_fd(link, va, bytes, link->files[huge], offset, false, inherit);
}

int gmem_link_map_fd(struct gmem_link *link, uint64_t va, uint64_t bytes, int fd, uint64_t offset, bool read_only,
		     bool inherit)
{
	bool by_event = link->hello.flags & GMEM_WIRE_EVENT_FORK;
	bool reserved;
	int err;

	gmem_cuda_lock();
	reserved = gmem_cuda_reserved(va, bytes);
	if (reserved && gmem_link_any_maps(va, bytes)) {
		gmem_cuda_unlock();
		return -EEXIST;
	}
	pthread_mutex_lock(&link->lock);
	err = remember(link, va, bytes, inherit);
	if (!err) {
		/* Without fork events a child must not inherit the mapping: it would read silent zeros through it. */
		err = map_at(va, bytes, fd, offset, reserved ? MAP_FIXED : MAP_FIXED_NOREPLACE, read_only, inherit && by_event);
		link->region_count -= err != 0;
	}
	pthread_mutex_unlock(&link->lock);
	gmem_cuda_unlock();
	return err;
}

/* A GPU's reservation stays whole on the CPU's side, or what the program maps there later would be mapped over. */
static int unmap_at(uint64_t va, uint64_t bytes)
{
	void *at = (void *)(uintptr_t)va;

	if (!gmem_cuda_reserved(va, bytes))
		return gmem_sys_munmap(at, bytes) ? -errno : 0;
	if (gmem_sys_mmap(at, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED)
		return -errno;
	gmem_sys_madvise(at, bytes, MADV_DONTFORK);
	return 0;
}

/* Cuts [va, va + bytes) out of the table. */
static int forget(struct gmem_link *link, uint64_t va, uint64_t bytes)
{
	uint64_t end = va + bytes;

	for (size_t i = 0; i < link->region_count;) {
		struct gmem_link_region *region = &link->regions[i];
		uint64_t region_end = region->va + region->bytes;

		if (region->va >= end || region_end <= va) {
			i++;
		} else if (region->va >= va && region_end <= end) {
			*region = link->regions[--link->region_count];
		} else if (region->va < va) {
			region->bytes = va - region->va;
			if (region_end > end) {
				int err = remember(link, end, region_end - end, region->inherit);

				if (err)
					return err;
			}
			i++;
		} else {
			region->bytes = region_end - end;
			region->va = end;
			i++;
		}
	}
	return 0;
}

int gmem_link_forget(struct gmem_link *link, uint64_t va, uint64_t bytes)
{
	int err;

	pthread_mutex_lock(&link->lock);
	err = forget(link, va, bytes);
	pthread_mutex_unlock(&link->lock);
	return err;
}

int gmem_link_unmap(struct gmem_link *link, uint64_t va, uint64_t bytes)
{
	int err;

	gmem_beside_remove(link->beside, va, bytes);
	err = unmap_at(va, bytes); /* without the lock: it waits for the daemon to read its event */
	if (err)
		return err;
	return gmem_link_forget(link, va, bytes);
}

static struct gmem_link_region *entry(struct gmem_link_region *table, size_t count, uint64_t va, uint64_t bytes)
{
	for (size_t i = 0; i < count; i++)
		if (table[i].va == va && table[i].bytes == bytes)
			return &table[i];
	return NULL;
}

static struct gmem_link_region take_kept(struct gmem_link *link, size_t at)
{
	struct gmem_link_region taken = link->kept[at];

	memmove(&link->kept[at], &link->kept[at + 1], (--link->kept_count - at) * sizeof(taken));
	return taken;
}

bool gmem_link_may_keep(struct gmem_link *link, uint64_t va, uint64_t bytes)
{
	struct gmem_link_region oldest = { 0 };
	bool known;

	pthread_mutex_lock(&link->lock);
	known = entry(link->regions, link->region_count, va, bytes);
	if (known && link->kept_count == GMEM_LINK_KEPT)
		oldest = take_kept(link, 0);
	pthread_mutex_unlock(&link->lock);
	if (oldest.bytes)
		unmap_at(oldest.va, oldest.bytes); /* gmemd forgets it by the event */
	return known;
}

void gmem_link_kept(struct gmem_link *link, uint64_t va, uint64_t bytes)
{
	struct gmem_link_region *region;

	pthread_mutex_lock(&link->lock);
	region = entry(link->regions, link->region_count, va, bytes);
	if (region && link->kept_count < GMEM_LINK_KEPT) {
		link->kept[link->kept_count++] = *region;
		*region = link->regions[--link->region_count];
	}
	pthread_mutex_unlock(&link->lock);
}

int gmem_link_reuse(struct gmem_link *link, uint64_t va, uint64_t bytes)
{
	struct gmem_link_region *kept;
	int err = -EEXIST;

	pthread_mutex_lock(&link->lock);
	kept = entry(link->kept, link->kept_count, va, bytes);
	if (kept)
		err = remember(link, va, bytes, kept->inherit);
	if (!err)
		take_kept(link, (size_t)(kept - link->kept));
	pthread_mutex_unlock(&link->lock);
	return err;
}

void gmem_link_withhold_locked(struct gmem_link *link)
{
	for (size_t i = 0; i < link->region_count; i++)
		gmem_sys_madvise((void *)(uintptr_t)link->regions[i].va, link->regions[i].bytes, MADV_DONTFORK);
}

void gmem_link_unmap_all(struct gmem_link *link)
{
	for (;;) {
		struct gmem_link_region region;

		pthread_mutex_lock(&link->lock);
		if (!link->region_count && !link->kept_count) {
			pthread_mutex_unlock(&link->lock);
			return;
		}
		region = link->kept_count ? link->kept[--link->kept_count] : link->regions[--link->region_count];
		pthread_mutex_unlock(&link->lock);
		unmap_at(region.va, region.bytes);
	}
}

static bool in_window(const struct gmem_link *link, uint64_t va)
{
	return va - link->hello.window_base < link->hello.window_bytes;
}

static int check_ours(const struct gmem_vma *vma, void *arg)
{
	const struct gmem_link *link = arg;

	for (int i = 0; i < GMEM_FILES; i++)
		if (vma->inode && vma->inode == link->inodes[i])
			return 0;
	return 1;
}

/* What its client had adopted there once, and has freed, may be mapped there still. */
static int map_beside(struct gmem_link *link, uint64_t va, uint64_t bytes, int fd, uint64_t offset)
{
	int err = map_at(va, bytes, fd, offset, MAP_FIXED_NOREPLACE, false, false);

	if (err == -EEXIST && !gmem_vma_each(va, va + bytes, check_ours, link))
		err = map_at(va, bytes, fd, offset, MAP_FIXED, false, false);
	if (!err) { /* nobody else unmaps anything here */
		gmem_beside_remove(link->beside, va, bytes);
		gmem_beside_add(link->beside, va, bytes);
	}
	return err;
}

int gmem_link_map_region(struct gmem_link *link, const struct gmem_wire_region *region, int fd, bool inherit)
{
	/* What stands there is ours to replace: the window of a context, or what a fork left. But a context has things of its
	 * own where its client has adopted memory. */
	bool beside = link->context && !in_window(link, region->va);
	int err = beside ? map_beside(link, region->va, region->bytes, fd, region->offset) :
			   map_at(region->va, region->bytes, fd, region->offset, MAP_FIXED,
				  region->flags & GMEM_WIRE_REGION_READ_ONLY, inherit);

	close(fd);
	if (err == -EEXIST)
		snprintf(link->message, sizeof(link->message),
			 "adopted memory [0x%llx, 0x%llx) can't be mapped in the context: the address is in use there",
			 (unsigned long long)region->va, (unsigned long long)(region->va + region->bytes));
	return err;
}

int gmem_link_map_beside(struct gmem_link *link, uint64_t va, uint64_t bytes, uint64_t offset)
{
	return link->files[0] < 0 ? -ENOTCONN : map_beside(link, va, bytes, link->files[0], offset);
}

void gmem_link_unmap_window(struct gmem_link *link)
{
	const struct gmem_wire_welcome *hello = &link->hello;

	munmap((void *)(uintptr_t)hello->small_base, hello->small_bytes);
	munmap((void *)(uintptr_t)hello->huge_base, hello->huge_bytes);
}

int gmem_link_map_window(struct gmem_link *link)
{
	const struct gmem_wire_welcome *hello = &link->hello;
	int err = 0;

	if (link->files[0] >= 0)
		err = map_at(hello->small_base, hello->small_bytes, link->files[0],
			     hello->small_base - hello->window_base, MAP_FIXED_NOREPLACE, false, false);
	if (!err && link->files[1] >= 0)
		err = map_at(hello->huge_base, hello->huge_bytes, link->files[1],
			     hello->huge_base - hello->window_base, MAP_FIXED_NOREPLACE, false, false);
	return err;
}
