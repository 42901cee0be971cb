/* SPDX-License-Identifier: Apache-2.0
 *
 * Memory over a client's file: making a region of it, and writing back what was changed.
 */
#include <errno.h>
#include <unistd.h>

#include <gmem/internal.h>
#include <gmem/pages.h>
#include <gmem/source.h>

#define FILES_MAX 512 /* of one session: each is a descriptor of the daemon's */
#define FILE_PAGE_BYTES (64ull << 10)

/* Near enough: two at a time may make it one more. */
static int check_count(struct gmem_core *core, uint64_t id, const char **ret_why)
{
	struct gmem_session *session = gmem_session_get(core, id);
	bool full = session && atomic_load(&session->account->sources) >= FILES_MAX;

	gmem_session_unref(session);
	if (full)
		*ret_why = "this session has as many files mapped as it may";
	return full ? -EMFILE : 0;
}

int gmem_map_file(struct gmem_core *core, uint64_t session, int fd, const struct gmem_file_args *file,
		  const struct gmem_mmap_args *args, struct gmem_region_info *ret, const char **ret_why)
{
	struct gmem_mmap_args known = *args;
	int err;

	*ret_why = NULL;
	err = check_count(core, session, ret_why);
	if (!err)
		err = gmem_file_check(fd, file, ret_why);
	if (!err)
		err = gmem_filesource_create(fd, file, &known.source);
	if (err) {
		close(fd);
		return err;
	}
	/* read(2) fills small pages, and a page that is read whole should be no larger than a disk's request */
	known.small_only = true;
	known.bytes = file->bytes;
	known.uncharged = !file->private_;
	if (!known.page_bytes)
		known.page_bytes = file->bytes < FILE_PAGE_BYTES ? 4096 : FILE_PAGE_BYTES;
	return gmem_mmap(core, session, &known, ret);
}

/* A copy that the CPU can read; the page has none of its writers any more. */
static int readable(struct gmem_page *page, const uint8_t **ret)
{
	const struct gmem_range nowhere = { 0, 0 };
	uint8_t *alias;
	bool mapped;
	int err = gmem_page_downgrade(page);

	if (!err)
		err = gmem_page_fetch(page, GMEM_HOST, NULL, nowhere, GMEM_WHY_ADVICE, &mapped);
	if (!err)
		err = gmem_object_alias(page->object, GMEM_HOST, &alias);
	if (!err)
		*ret = alias + page->offset;
	return err;
}

static int write_back(struct gmem_request *request, struct gmem_page *page, struct gmem_range range)
{
	struct gmem_source *source = atomic_load(&page->object->source);
	const uint8_t *src;
	int err;

	(void)request;
	(void)range;
	if (!source || !source->ops->push || !(gmem_word_flags(page->word) & GMEM_PAGE_CHANGED))
		return 0;
	err = readable(page, &src);
	if (!err)
		err = source->ops->push(source, page->index, src, page->bytes);
	if (!err)
		page->word &= ~GMEM_WORD_FLAG(GMEM_PAGE_CHANGED);
	return err;
}

/* Each object's once, as far as the regions of a range follow each other. */
static int sync_range(struct gmem_session *session, uint64_t va, uint64_t end)
{
	struct gmem_object *last = NULL;
	struct gmem_place place;
	int err = 0;

	for (; !err && va < end && !gmem_as_lookup(&session->as, va, &place); va = place.region_va + place.region_bytes) {
		struct gmem_source *source = atomic_load(&place.object->source);

		if (place.object != last && source && source->ops->sync)
			err = source->ops->sync(source);
		gmem_object_unref(last);
		last = place.object;
	}
	gmem_object_unref(last);
	return err;
}

int gmem_flush(struct gmem_core *core, uint64_t session, uint64_t va, uint64_t bytes)
{
	struct gmem_request request;
	int err = gmem_request_init(core, session, -1, va, bytes, &request);

	if (err)
		return err;
	request.poisoned = true;
	err = gmem_for_pages(&request, va, bytes, false, true, write_back);
	if (!err)
		err = sync_range(request.session, va, va + bytes);
	gmem_request_deinit(&request);
	return err;
}
