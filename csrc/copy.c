/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>

#include <gmem/copy.h>
#include <gmem/internal.h>
#include <gmem/migrate.h>
#include <gmem/tier.h>

int gmem_copy_by_engine(struct gmem_hnode *engine, const struct gmem_sg *sg, size_t count)
{
	gmem_fence_t fence = 0;
	int err;

	gmem_duty_driver(engine->hnid, "copy");
	err = engine->ops->copy(engine->device, sg, count, 0, &fence);
	if (!err && fence && engine->ops->fence_wait)
		err = engine->ops->fence_wait(engine->device, fence, 0);
	gmem_duty_driver(engine->hnid, NULL);
	if (err)
		gmem_hnode_failed(engine);
	return err;
}

/* The target's frame, to be written whole. */
static int reserve(struct gmem_page *page, struct gmem_hnode *to)
{
	struct gmem_file *file;
	int err;

	if (gmem_hnode_is_peer(to))
		return 0;
	err = gmem_object_file(page->object, to->hnid, &file);
	return err ? err : gmem_file_reserve(file, page->object->offset + page->offset, page->bytes);
}

static int reserve_all(struct gmem_page *const *pages, size_t count, struct gmem_hnode *to)
{
	int err = 0;

	for (size_t i = 0; !err && i < count; i++)
		err = reserve(pages[i], to);
	return err;
}

static int copy_by_cpu(const struct gmem_sg *sg, size_t count)
{
	int err = 0;

	for (size_t i = 0; !err && i < count; i++)
		err = gmem_copy(sg[i].dst, sg[i].src, sg[i].bytes);
	return err;
}

static int copy_reserved(struct gmem_hnode *from, struct gmem_hnode *to, struct gmem_page *const *pages, size_t count)
{
	struct gmem_hnode *engine = gmem_copy_engine(from, to);
	struct gmem_sg sg[GMEM_COPY_PAGES];
	size_t n = 0;

	for (size_t i = 0; i < count; i++) {
		struct gmem_sg *last = n ? &sg[n - 1] : NULL;
		uint8_t *dst, *src;
		int err = gmem_object_at(pages[i]->object, from->hnid, pages[i]->offset, &src);

		if (!err)
			err = gmem_object_at(pages[i]->object, to->hnid, pages[i]->offset, &dst);
		if (err)
			return err;
		if (last && (uint8_t *)last->dst + last->bytes == dst && (const uint8_t *)last->src + last->bytes == src)
			last->bytes += pages[i]->bytes;
		else
			sg[n++] = (struct gmem_sg){ dst, src, pages[i]->bytes };
	}
	return engine ? gmem_copy_by_engine(engine, sg, n) : copy_by_cpu(sg, n);
}

/* Several huge pages are made as they are filled, where that can be had (gmem_alias_fill): nobody zeroes them first. */
static bool copy_makes(struct gmem_hnode *from, struct gmem_hnode *to, struct gmem_page *const *pages, size_t count)
{
	if (!gmem_hnode_own_frames(from) || !(to->info.caps & GMEM_CAP_CPU_VISIBLE) || count < 2)
		return false;
	for (size_t i = 0; i < count; i++)
		if (pages[i]->object->class_ != GMEM_CLASS_HUGE)
			return false;
	return true;
}

int gmem_copy_pages(struct gmem_hnode *from, struct gmem_hnode *to, struct gmem_page *const *pages, size_t count)
{
	bool makes = copy_makes(from, to, pages, count);
	int err = makes ? 0 : reserve_all(pages, count, to);

	if (!err)
		err = copy_reserved(from, to, pages, count);
	if (err != -EFAULT || !makes)
		return err;
	err = reserve_all(pages, count, to);
	return err ? err : copy_reserved(from, to, pages, count);
}

bool gmem_copy_reaches(const struct gmem_hnode *from, const struct gmem_hnode *to)
{
	bool by_cpu = gmem_hnode_is_peer(from) || gmem_hnode_is_peer(to); /* their drivers read and write as the CPU does */

	return from == to || !((gmem_hnode_own_frames(from) && (by_cpu || gmem_hnode_own_frames(to))) ||
			       (gmem_hnode_own_frames(to) && by_cpu) || (gmem_hnode_is_peer(from) && gmem_hnode_is_peer(to)));
}

struct gmem_hnode *gmem_copy_engine(struct gmem_hnode *from, struct gmem_hnode *to)
{
	struct gmem_hnode *ends[] = { to, from };

	for (int i = 0; i < 2; i++) /* nobody else reaches its memory */
		if (gmem_hnode_own_frames(ends[i]))
			return ends[i];
	for (int i = 0; i < 2; i++)
		if (ends[i]->ops && ends[i]->ops->copy &&
		    (ends[i]->info.bandwidth_bytes_per_s || ends[i]->info.latency_ns ||
		     !(ends[i]->info.caps & GMEM_CAP_CPU_VISIBLE)))
			return ends[i];
	return NULL;
}

static int pull(struct gmem_hnode *from, struct gmem_page *page, uint8_t *dst)
{
	struct gmem_peer_io io = { .key = page->pn, .memory = dst, .bytes = page->bytes };

	gmem_tier_pull(from, &io, 1);
	return io.result;
}

static int push(struct gmem_hnode *to, struct gmem_page *page, uint8_t *src)
{
	struct gmem_peer_io io = { .key = page->pn, .memory = src, .bytes = page->bytes };

	gmem_tier_push(to, &io, 1);
	return io.result;
}

static int engine_copy(struct gmem_hnode *engine, void *dst, const void *src, uint64_t bytes)
{
	const struct gmem_sg sg = { dst, src, bytes };

	return gmem_copy_by_engine(engine, &sg, 1);
}

/* From somewhere to the CPU's memory at middle, and on from there. */
static int by_relay(struct gmem_page *page, struct gmem_hnode *from, struct gmem_hnode *to, uint8_t *middle)
{
	uint8_t *at;
	int err;

	if (gmem_hnode_is_peer(from)) {
		err = pull(from, page, middle);
	} else {
		err = gmem_object_at(page->object, from->hnid, page->offset, &at);
		if (!err)
			err = engine_copy(from, middle, at, page->bytes);
	}
	if (err)
		return err;
	if (gmem_hnode_is_peer(to))
		return push(to, page, middle);
	err = gmem_object_at(page->object, to->hnid, page->offset, &at);
	return err ? err : engine_copy(to, at, middle, page->bytes);
}

static int fill_by_relay(struct gmem_page *page, struct gmem_hnode *from, struct gmem_hnode *to)
{
	struct gmem_hnode *relay = to->relay ? to : from;
	int err = reserve(page, to);

	if (err)
		return err;
	gmem_mutex_lock(&relay->relay_lock);
	err = by_relay(page, from, to, relay->relay);
	gmem_mutex_unlock(&relay->relay_lock);
	return err;
}

int gmem_copy_fill(struct gmem_page *page, struct gmem_hnode *from, struct gmem_hnode *to)
{
	struct gmem_hnode *engine = gmem_copy_engine(from, to);
	struct gmem_file *file;
	uint8_t *src = NULL, *dst;
	int err = 0;

	gmem_page_mark(page, GMEM_DIR_FILL, to->hnid);
	if (!gmem_copy_reaches(from, to))
		return fill_by_relay(page, from, to);
	if (!gmem_hnode_is_peer(from))
		err = gmem_object_at(page->object, from->hnid, page->offset, &src);
	if (err)
		return err;
	if (gmem_hnode_is_peer(to))
		return push(to, page, src);
	if (src && !engine) {
		err = gmem_object_file(page->object, to->hnid, &file);
		if (!err)
			err = gmem_object_at(page->object, to->hnid, page->offset, &dst);
		return err ? err : gmem_file_fill(file, page->object->offset + page->offset, dst, src, page->bytes);
	}
	err = reserve(page, to);
	if (!err)
		err = gmem_object_at(page->object, to->hnid, page->offset, &dst);
	if (err)
		return err;
	return src ? engine_copy(engine, dst, src, page->bytes) : pull(from, page, dst);
}
