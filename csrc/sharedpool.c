/* SPDX-License-Identifier: Apache-2.0
 *
 * Pools that several machines share: a published pool's pages go to the servers of a device as one version of a name, and
 * such a version is a pool here whose pages come from there. Which version of a name is the newest, who may write one, and
 * when one is dropped is not for the core to know.
 */
#include <errno.h>
#include <stdlib.h>
#include <time.h>

#include <gmem/crash.h>
#include <gmem/internal.h>
#include <gmem/migrate.h>
#include <gmem/pool.h>
#include <gmem/source.h>

#define GROUP_PAGES 16 /* pages of 4 KiB that go together */
#define BATCH_BYTES (16ull << 20)
#define BATCH_PAGES 256
#define AGAIN_TRIES 2000

static struct gmem_hnode *visit(struct gmem_core *core, int hnid)
{
	struct gmem_hnode *hnode = gmem_hnode_visit(core, hnid);

	if (!hnode || (hnode->ops && hnode->ops->pool_put && hnode->ops->pool_get && hnode->ops->pool_drop))
		return hnode;
	gmem_hnode_leave(hnode);
	return NULL;
}

/* ---- which pages ---- */

static int look_at_words(struct gmem_object *object, uint64_t *present)
{
	struct gmem_lpt *lpt = &object->core->lpt;
	uint64_t pn = object->pn, end = object->pn + object->pages, stop;

	for (; pn < end && !gmem_lpt_next_touched(lpt, &pn, end, &stop); pn = stop)
		for (uint64_t at = pn; at < stop; at++) {
			gmem_word_t word = atomic_load(&lpt->words[at]);
			uint64_t index = at - object->pn;

			if (gmem_word_state(word) == GMEM_POISONED)
				return -EIO;
			if (gmem_word_valid(word))
				present[index / 64] |= 1ull << index % 64;
		}
	return 0;
}

int gmem_pool_present(struct gmem_core *core, uint64_t pool, uint64_t *present)
{
	struct gmem_object *object = gmem_pool_object(core, pool);
	const struct gmem_pool_version *version;
	int err = 0;

	if (!object)
		return -ENOENT;
	version = gmem_remotesource_version(atomic_load(&object->source));
	for (uint64_t i = 0; i < (object->pages + 63) / 64; i++)
		present[i] = version ? version->present[i] : 0;
	if (!gmem_object_sealed(object) || (!version && atomic_load(&object->source)))
		err = -EBUSY;
	else if (!version)
		err = look_at_words(object, present);
	gmem_object_unref(object);
	return err;
}

/* ---- export ---- */

struct batch {
	struct gmem_object *object;
	struct gmem_hnode *hnode;
	const struct gmem_pool_version *version;
	uint8_t *alias;
	size_t count, room;
	struct gmem_page pages[BATCH_PAGES];
	struct gmem_peer_io io[BATCH_PAGES];
};

static void unlock_to(struct batch *batch, size_t count)
{
	while (batch->count > count) {
		struct gmem_page *page = &batch->pages[--batch->count];

		page->park = false;
		gmem_page_unlock(page);
	}
}

static uint64_t group_pages(const struct batch *batch)
{
	return batch->object->shift == GMEM_SHIFT_4K ? GROUP_PAGES : 1;
}

/* Its content is on the host, and stays there while it is locked. Waits for nobody who could wait for what is locked. */
static int add_page(struct batch *batch, uint64_t index)
{
	struct gmem_page *page = &batch->pages[batch->count];
	bool mapped;
	int err = 0;

	if (batch->count)
		err = gmem_page_trylock(batch->object, index, false, page) ? -EAGAIN : 0;
	else
		gmem_page_lock(batch->object, index, page);
	if (err)
		return err;
	batch->io[batch->count++] = (struct gmem_peer_io){
		.key = index, .memory = batch->alias + page->offset, .bytes = page->bytes,
	};
	if (gmem_page_poisoned(page))
		return -EIO;
	return gmem_page_fetch(page, GMEM_HOST, NULL, (struct gmem_range){ 0, 0 }, GMEM_WHY_HMEMCPY, &mapped);
}

static bool is_present(const struct batch *batch, uint64_t index)
{
	return batch->version->present[index / 64] >> index % 64 & 1;
}

static int add_group(struct batch *batch, uint64_t lead)
{
	size_t before = batch->count;
	int err = 0;

	for (uint64_t index = lead; !err && index < lead + group_pages(batch) && index < batch->object->pages; index++)
		if (is_present(batch, index))
			err = add_page(batch, index);
	if (err)
		unlock_to(batch, before);
	return err;
}

static int send(struct batch *batch)
{
	int err = 0;

	gmem_duty_driver(batch->hnode->hnid, "pool_put");
	batch->hnode->ops->pool_put(batch->hnode->device, batch->version, batch->io, batch->count);
	gmem_duty_driver(batch->hnode->hnid, NULL);
	for (size_t i = 0; i < batch->count; i++) {
		err = batch->io[i].result ? batch->io[i].result : err;
		gmem_count(&batch->hnode->in_bytes, batch->io[i].result ? 0 : batch->io[i].bytes);
	}
	gmem_count(&batch->hnode->errors, err != 0);
	gmem_crash(GMEM_CRASH_FAR_SENT);
	unlock_to(batch, 0);
	return err;
}

static void pause_for(int tries)
{
	const struct timespec pause = { 0, tries < 16 ? 1000 : 500000 };

	nanosleep(&pause, NULL);
}

/* What can't be had now, because there is no room beside what is locked or somebody is at it, is tried again without the others. */
static int export_pages(struct batch *batch, uint64_t first, uint64_t end)
{
	int err = 0, tries = 0;

	while (!err && first < end) {
		err = batch->count + group_pages(batch) <= batch->room ? add_group(batch, first) : -EAGAIN;
		if (!err) {
			first += group_pages(batch);
			tries = 0;
			continue;
		}
		if (batch->count) {
			err = send(batch);
		} else if (err != -EIO && tries++ < AGAIN_TRIES) {
			pause_for(tries);
			err = 0;
		}
	}
	if (!err && batch->count)
		err = send(batch);
	unlock_to(batch, 0);
	return err;
}

int gmem_pool_export(struct gmem_core *core, uint64_t pool, int hnid, const struct gmem_pool_version *version,
		     uint64_t first, uint64_t count)
{
	struct gmem_object *object = gmem_pool_object(core, pool);
	struct gmem_hnode *hnode = visit(core, hnid);
	struct batch *batch = malloc(sizeof(*batch));
	int err = !object ? -ENOENT : !hnode ? -EOPNOTSUPP : !batch ? -ENOMEM : 0;

	if (!err && !gmem_object_sealed(object))
		err = -EBUSY;
	if (!err && (first % GROUP_PAGES || version->pages != object->pages || version->shift != object->shift ||
		     first + count < first || first + count > object->pages))
		err = -EINVAL;
	if (!err) {
		uint64_t room = BATCH_BYTES >> object->shift;

		batch->object = object;
		batch->hnode = hnode;
		batch->version = version;
		batch->count = 0;
		batch->room = room < BATCH_PAGES ? room : BATCH_PAGES;
		err = gmem_object_alias(object, GMEM_HOST, &batch->alias);
	}
	if (!err)
		err = export_pages(batch, first, first + count);
	free(batch);
	if (hnode)
		gmem_hnode_leave(hnode);
	gmem_object_unref(object);
	return err;
}

/* ---- import ---- */

static int make_object(struct gmem_session *session, struct gmem_account *files, const struct gmem_manifest *manifest,
		       struct gmem_object **ret)
{
	const struct gmem_pool_version *version = &manifest->version;
	struct gmem_mmap_args args = { .bytes = version->pages << version->shift, .page_bytes = 1ull << version->shift,
				       .uncharged = true };
	struct gmem_object *object;
	int err = gmem_remotesource_create(session->core, manifest, &args.source);

	if (err)
		return err;
	err = gmem_object_reserve(session, &args, files, files, &object);
	if (err) {
		gmem_source_release(args.source);
		return err;
	}
	err = gmem_object_set_source(object, args.source, true);
	if (!err)
		err = gmem_object_seal(object, NULL);
	if (err)
		gmem_object_unref(object);
	else
		*ret = object;
	return err;
}

int gmem_pool_import(struct gmem_core *core, uint64_t id, int hnid, const struct gmem_pool_version *version, uint64_t *ret_pool)
{
	const struct gmem_manifest manifest = { *version, hnid };
	struct gmem_session *session = gmem_session_get(core, id);
	struct gmem_account *files = NULL;
	struct gmem_object *object = NULL;
	uint64_t pool;
	int err;

	if (!session)
		return -ENOENT;
	pool = gmem_keep_next_id(&core->keep, &core->next_id);
	err = version->pages > (uint64_t)INT64_MAX >> version->shift ? -EINVAL :
							      gmem_account_create(core, pool, session->uid, NULL, 0, &files);
	if (!err)
		err = make_object(session, files, &manifest, &object);
	gmem_crash(GMEM_CRASH_FAR_MADE);
	if (!err)
		err = gmem_pool_add(core, pool, object);
	gmem_crash(GMEM_CRASH_FAR_IMPORTED);
	gmem_object_unref(object);
	gmem_account_unref(files);
	gmem_session_unref(session);
	if (!err)
		*ret_pool = pool;
	return err;
}

int gmem_pool_erase(struct gmem_core *core, int hnid, const struct gmem_pool_version *version, uint64_t first, uint64_t count)
{
	struct gmem_hnode *hnode = visit(core, hnid);
	int err;

	if (!hnode)
		return -EOPNOTSUPP;
	err = hnode->ops->pool_drop(hnode->device, version, first, count);
	gmem_hnode_leave(hnode);
	return err;
}
