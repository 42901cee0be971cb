/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stdlib.h>

#include <gmem/internal.h>
#include <gmem/migrate.h>
#include <gmem/run.h>
#include <gmem/source.h>

void gmem_source_set(struct gmem_object *object, struct gmem_source *source)
{
	atomic_store(&object->source, source);
}

void gmem_source_release(struct gmem_source *source)
{
	if (source && source->ops->release)
		source->ops->release(source);
}

int gmem_source_pull(struct gmem_object *object, uint64_t index, size_t count, uint8_t *memory)
{
	struct gmem_source *source = atomic_load(&object->source);
	uint64_t page_bytes = 1ull << object->shift;
	struct gmem_peer_io io[GMEM_RUN_PAGES];
	int err = 0;

	for (size_t done = 0; !err && done < count;) {
		size_t n = count - done < GMEM_RUN_PAGES ? count - done : GMEM_RUN_PAGES;

		for (size_t i = 0; i < n; i++)
			io[i] = (struct gmem_peer_io){ .key = index + done + i, .memory = memory + (done + i) * page_bytes,
						       .bytes = page_bytes };
		source->ops->pull(source, io, n);
		for (size_t i = 0; i < n; i++)
			err = io[i].result && io[i].result != -ENODATA ? io[i].result : err;
		done += n;
	}
	return err;
}

/* ---- another object of ours ---- */

struct local {
	struct gmem_source source;
	struct gmem_object *from;
};

/* Both are sealed: a copy of it is as good as another, wherever it is. */
static int pull_one(struct gmem_object *from, uint64_t index, uint8_t *memory, uint64_t bytes)
{
	const struct gmem_range nowhere = { 0, 0 };
	struct gmem_hnode *hnode;
	struct gmem_page page;
	uint8_t *alias;
	bool mapped;
	int err = gmem_page_trylock(from, index, false, &page);

	if (err)
		return -EAGAIN;
	hnode = gmem_page_source(&page);
	if (gmem_page_poisoned(&page))
		err = -EIO;
	else if (!hnode && !atomic_load(&from->source))
		err = -ENODATA;
	else if (!hnode || gmem_hnode_is_peer(hnode)) {
		err = gmem_page_fetch(&page, GMEM_HOST, NULL, nowhere, GMEM_WHY_HOST_FAULT, &mapped);
		hnode = gmem_core_hnode(from->core, GMEM_HOST);
	}
	if (!err)
		err = gmem_object_alias(from, hnode->hnid, &alias);
	if (!err)
		err = gmem_copy(memory, alias + page.offset, bytes);
	page.park = false;
	gmem_page_unlock(&page);
	return err == -EBUSY ? -EAGAIN : err;
}

static void pull_from_object(struct gmem_source *source, struct gmem_peer_io *io, size_t count)
{
	struct local *local = (struct local *)source;

	for (size_t i = 0; i < count; i++)
		io[i].result = pull_one(local->from, io[i].key, io[i].memory, io[i].bytes);
}

static void release_object(struct gmem_source *source)
{
	struct local *local = (struct local *)source;

	gmem_object_unref(local->from);
	free(local);
}

int gmem_source_of_object(struct gmem_object *from, struct gmem_source **ret)
{
	static const struct gmem_source_ops ops = { .pull = pull_from_object, .release = release_object };
	struct local *local = malloc(sizeof(*local));

	if (!local)
		return -ENOMEM;
	*local = (struct local){ .source = { .ops = &ops }, .from = gmem_object_ref(from) };
	*ret = &local->source;
	return 0;
}
