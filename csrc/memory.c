/* SPDX-License-Identifier: Apache-2.0
 *
 * Regions as the control plane sees them: making, committing, removing, looking at them.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>

#include <gmem/freeze.h>
#include <gmem/internal.h>
#include <gmem/prefetch.h>
#include <gmem/tier.h>
#include <gmem/uffd.h>

#define BUSY_SPINS 2000
#define TAKEN_MAX 64
#define ADOPT_PAGE_BYTES (64ull << 10)
#define ADDRESS_END (1ull << 47)
#define SWAP_BYTES (16 * GMEM_HUGE_BYTES) /* as many threads may be about to take a page */

static int shift_of(uint64_t page_bytes, uint64_t bytes)
{
	switch (page_bytes) {
	case 0:
		return bytes >= GMEM_HUGE_BYTES ? GMEM_SHIFT_2M : GMEM_SHIFT_4K;
	case 1ull << GMEM_SHIFT_4K:
		return GMEM_SHIFT_4K;
	case 1ull << GMEM_SHIFT_64K:
		return GMEM_SHIFT_64K;
	case 1ull << GMEM_SHIFT_2M:
		return GMEM_SHIFT_2M;
	default:
		return -EINVAL;
	}
}

static uint64_t whole_pages(uint64_t bytes, int shift)
{
	return (bytes + (1ull << shift) - 1) & ~((1ull << shift) - 1);
}

/* What can be stored there for certain, whoever touches it. On devices some pages stay free, by way of which others change
 * places with the host's; what only its copy engine reaches does not hold the host's pages at all. */
static uint64_t assured_bytes(const struct gmem_hnode *hnode)
{
	uint64_t bytes = hnode->info.assured_bytes ? hnode->info.assured_bytes : gmem_counter(&hnode->limit_bytes);

	if (hnode->hnid == GMEM_HOST || gmem_hnode_is_peer(hnode))
		return bytes;
	return gmem_hnode_takes_overflow(hnode) && bytes > SWAP_BYTES ? bytes - SWAP_BYTES : 0;
}

/* What the host, tiers and devices could hold together, of everybody's or of one share's. */
static uint64_t capacity(struct gmem_core *core, const struct gmem_share *shares)
{
	uint64_t bytes = 0;

	for (int h = 0; h < GMEM_HNODE_MAX; h++) {
		struct gmem_hnode *hnode = gmem_core_hnode(core, h);
		uint64_t here = hnode ? assured_bytes(hnode) : 0, quota = shares ? gmem_counter(&shares[h].quota_bytes) : 0;

		bytes += quota && quota < here ? quota : here;
	}
	return bytes;
}

/* No more than its quotas allow in all. */
static int check_quotas(struct gmem_core *core, struct gmem_account *account, uint64_t bytes)
{
	if (core->overcommit)
		return 0;
	if (gmem_counter(&account->mapped_bytes) + bytes > capacity(core, account->shares) ||
	    gmem_counter(&account->tenant->mapped_bytes) + bytes > capacity(core, account->tenant->shares))
		return -EDQUOT;
	return 0;
}

/* Huge pages are used for a region only if every page of it that the host may hold, and every page a device may hold,
 * could be one: running out of them in the middle of a fault would be worse than slower pages. Other programs may have
 * taken some. Of what is not charged, any number of regions may share the host's. */
static bool huge_fits(struct gmem_core *core, uint64_t bytes)
{
	uint64_t need = bytes + atomic_load(&core->committed_bytes[GMEM_CLASS_HUGE]);
	uint64_t have, unused, most = gmem_counter(&gmem_core_hnode(core, GMEM_HOST)->limit_bytes);

	gmem_hugepages(&have, &unused);
	need = need < most ? need : most;
	for (int h = 1; h < GMEM_HNODE_MAX; h++) {
		struct gmem_hnode *hnode = gmem_core_hnode(core, h);

		if (hnode && (hnode->info.caps & GMEM_CAP_CPU_VISIBLE))
			need += gmem_counter(&hnode->limit_bytes);
	}
	return need <= have && need <= gmem_counter(&core->hugepages_used_bytes) + unused;
}

static int commit_charge(struct gmem_core *core, enum gmem_class class_, uint64_t bytes)
{
	uint64_t total = atomic_fetch_add(&core->committed_bytes[class_], bytes) + bytes;

	total += atomic_load(&core->committed_bytes[!class_]);
	if (core->overcommit || total <= capacity(core, NULL))
		return 0;
	atomic_fetch_sub(&core->committed_bytes[class_], bytes);
	return -ENOMEM;
}

/* A range that is free here and in this address space: what was moved in it by mremap, as a forked child's copies are, may
 * lie where another session's range has become free. */
static int take_range(struct gmem_core *core, struct gmem_as *as, enum gmem_class class_, const struct gmem_mmap_args *args,
		      uint64_t bytes, uint64_t align, uint64_t *ret)
{
	uint64_t taken[TAKEN_MAX], va;
	int count = 0, err;

	do {
		err = gmem_range_alloc_above(&core->va[class_], args->above, bytes, align, &va);
		if (err || gmem_as_next(as, va) >= va + bytes)
			break;
		taken[count++] = va;
		err = -ENOMEM;
	} while (count < TAKEN_MAX);
	while (count)
		gmem_range_free(&core->va[class_], taken[--count], bytes);
	if (!err)
		*ret = va;
	return err;
}

/* What a predecessor had reserved, and not told any more. */
static bool reserved_before(struct gmem_session *session, const struct gmem_mmap_args *args, uint64_t bytes,
			    struct gmem_region_info *ret)
{
	struct gmem_place place;
	struct gmem_file *file;
	uint64_t va;

	if (!args->again || !gmem_as_find_asked(&session->as, args->asked, bytes, &va) ||
	    gmem_as_lookup(&session->as, va, &place))
		return false;
	*ret = (struct gmem_region_info){ .va = va, .bytes = bytes, .offset = place.object->offset,
					  .page_bytes = 1ull << place.object->shift, .class_ = place.object->class_,
					  .fork = args->fork };
	if (!gmem_object_file(place.object, GMEM_HOST, &file))
		ret->fd = file->fd;
	gmem_object_unref(place.object);
	return true;
}

int gmem_object_reserve(struct gmem_session *session, const struct gmem_mmap_args *args, struct gmem_account *account,
			struct gmem_account *files, struct gmem_object **ret)
{
	int shift = shift_of(args->page_bytes, args->bytes), err;
	struct gmem_core *core = session->core;
	uint64_t bytes = args->bytes, align, va;
	struct gmem_file *file;
	enum gmem_class class_;
	bool uncharged = args->source && args->uncharged;
	bool kept = false;

	if (shift < 0 || !bytes || bytes > INT64_MAX || args->fork > GMEM_FORK_COPY)
		return -EINVAL;
	bytes = whole_pages(bytes, shift);
	class_ = shift == GMEM_SHIFT_2M && core->hugepages && !args->small_only && huge_fits(core, uncharged ? INT64_MAX : bytes) ?
			 GMEM_CLASS_HUGE : GMEM_CLASS_SMALL;
	align = bytes >= GMEM_HUGE_BYTES ? GMEM_HUGE_BYTES : 1ull << shift;
	err = uncharged ? 0 : commit_charge(core, class_, bytes);
	if (err)
		return err;
	err = uncharged ? 0 : check_quotas(core, account, bytes);
	if (!err)
		kept = args->kept && !args->above && !gmem_kept_take(account, class_, bytes, align, args->fork, &va);
	if (!err && !kept)
		err = take_range(core, &session->as, class_, args, bytes, align, &va);
	if (err)
		goto uncharge;
	err = gmem_account_file(files, GMEM_HOST, class_, &file);
	if (!err)
		err = gmem_object_create(core, account, files, class_, va - core->window.base, bytes, (uint8_t)shift,
					 account == files && account == session->account ? 0 : GMEM_OBJECT_POOLED, ret);
	if (!err) {
		(*ret)->reused = kept;
		return 0;
	}
	gmem_range_free(&core->va[class_], va, bytes);
uncharge:
	if (!uncharged)
		atomic_fetch_sub(&core->committed_bytes[class_], bytes);
	return err;
}

/* *ret_taken: the source has become an object's. */
static int map(struct gmem_core *core, uint64_t id, const struct gmem_mmap_args *args, struct gmem_region_info *ret,
	       bool *ret_taken)
{
	int shift = shift_of(args->page_bytes, args->bytes), err;
	struct gmem_session *session;
	struct gmem_object *object;
	struct gmem_file *file;
	uint64_t va;

	if (shift < 0 || !args->bytes || args->bytes > INT64_MAX)
		return -EINVAL;
	session = gmem_session_get(core, id);
	if (!session)
		return -ENOENT;
	if (reserved_before(session, args, whole_pages(args->bytes, shift), ret)) {
		gmem_session_unref(session);
		return 0;
	}
	err = gmem_object_reserve(session, args, session->account, session->account, &object);
	if (err)
		goto out;
	va = core->window.base + object->offset;
	*ret_taken = args->source;
	if (args->source)
		err = gmem_object_set_source(object, args->source, args->uncharged);
	if (!err)
		err = gmem_as_insert(&session->as, object, va, 0, object->bytes, args->fork, object->reused);
	if (!err)
		err = gmem_object_file(object, GMEM_HOST, &file);
	if (!err && args->asked && gmem_keeps(&core->keep))
		gmem_as_asked(&session->as, va, args->asked);
	if (!err)
		*ret = (struct gmem_region_info){ .va = va, .bytes = object->bytes, .offset = object->offset,
						  .page_bytes = 1ull << shift, .class_ = object->class_,
						  .fork = args->fork, .kept = object->reused, .fd = file->fd };
	gmem_object_unref(object); /* on failure the last one: gives back range and charge */
out:
	gmem_session_unref(session);
	return err;
}

int gmem_mmap(struct gmem_core *core, uint64_t id, const struct gmem_mmap_args *args, struct gmem_region_info *ret)
{
	bool taken = false;
	int err = map(core, id, args, ret, &taken);

	if (err && args->source && !taken)
		gmem_source_release(args->source);
	return err;
}

int gmem_region_file(struct gmem_core *core, uint64_t id, uint64_t va, int hnid, struct gmem_region_info *ret)
{
	struct gmem_session *session = gmem_session_get(core, id);
	struct gmem_hnode *hnode = gmem_core_hnode(core, hnid);
	struct gmem_place place;
	struct gmem_file *file;
	int fd, err;

	if (!session)
		return -ENOENT;
	err = !hnode || gmem_hnode_is_peer(hnode) ? -ENODEV : gmem_as_lookup(&session->as, va, &place) ? -EINVAL : 0;
	gmem_session_unref(session);
	if (err)
		return err;
	err = place.region_va == va ? gmem_object_file(place.object, hnid, &file) : -EINVAL;
	if (!err)
		err = gmem_object_lend(place.object, file, place.read_only, &fd);
	if (!err && (fd = fcntl(fd, F_DUPFD_CLOEXEC, 0)) < 0)
		err = -errno;
	if (!err)
		*ret = (struct gmem_region_info){ .va = va, .bytes = place.region_bytes,
						  .offset = place.object->offset + place.region_offset,
						  .page_bytes = 1ull << place.object->shift, .class_ = place.object->class_,
						  .committed = place.committed, .read_only = place.read_only, .fd = fd };
	gmem_object_unref(place.object);
	return err;
}

/* What munmap(2) has told by now is done, and will not be done to a region that comes to be there. */
static void hear_of_unmaps(struct gmem_session *session)
{
	struct gmem_view *view = gmem_as_view(&session->as, GMEM_HOST);

	if (view)
		gmem_faults_quiesce(session->core, view);
	gmem_view_unref(view);
}

static int check_adopt(const struct gmem_window *window, uint64_t at, uint64_t bytes)
{
	if ((at | bytes) & 4095 || !bytes || bytes > INT64_MAX || at + bytes < at || at + bytes > ADDRESS_END)
		return -EINVAL;
	return at < window->base + window->bytes && at + bytes > window->base ? -EINVAL : 0;
}

/* A request that was made twice, because its answer was lost, finds it there. */
static int insert_second(struct gmem_session *session, uint64_t at, uint64_t bytes, enum gmem_fork fork, uint64_t va)
{
	struct gmem_place first, second;
	int err = gmem_as_lookup(&session->as, va, &first);

	if (err)
		return err;
	err = gmem_as_insert(&session->as, first.object, at, 0, bytes, fork, false);
	if (err == -EEXIST && !gmem_as_lookup(&session->as, at, &second)) {
		if (second.object == first.object && second.region_va == at && second.region_bytes == bytes)
			err = 0;
		gmem_object_unref(second.object);
	}
	gmem_object_unref(first.object);
	return err;
}

int gmem_adopt(struct gmem_core *core, uint64_t id, uint64_t at, const struct gmem_mmap_args *args,
	       struct gmem_region_info *ret)
{
	struct gmem_mmap_args small = *args;
	struct gmem_region_info region;
	struct gmem_session *session;
	int err = check_adopt(&core->window, at, args->bytes);

	if (err)
		return err;
	/* Huge pages need an address and a length that are multiples of them; many small ones are what memory of others,
	 * whose use nobody has planned, is best moved in. */
	small.small_only = true;
	if (!small.page_bytes)
		small.page_bytes = small.bytes < ADOPT_PAGE_BYTES ? 4096 : ADOPT_PAGE_BYTES;
	session = gmem_session_get(core, id);
	if (!session)
		return -ENOENT;
	hear_of_unmaps(session); /* of what was adopted there before */
	err = gmem_mmap(core, id, &small, &region);
	if (!err) {
		err = insert_second(session, at, args->bytes, args->fork, region.va);
		if (err)
			gmem_as_remove(&session->as, region.va, region.bytes, NULL, NULL);
	}
	gmem_session_unref(session);
	if (!err)
		*ret = region;
	return err;
}

int gmem_mmap_commit(struct gmem_core *core, uint64_t id, uint64_t va)
{
	struct gmem_session *session = gmem_session_get(core, id);
	struct gmem_view *view;
	struct gmem_place place;
	int err;

	if (!session)
		return -ENOENT;
	err = gmem_as_lookup(&session->as, va, &place);
	if (err) {
		gmem_session_unref(session);
		return -EINVAL;
	}
	view = gmem_as_view(&session->as, GMEM_HOST);
	if (place.region_va != va)
		err = -EINVAL;
	else if (place.committed)
		err = 0; /* asked again, because the answer was lost */
	else if (!view)
		err = -ENOTCONN;
	else
		err = gmem_uffd_register(view->uffd, va, place.region_bytes);
	if (!err)
		gmem_as_commit(&session->as, va);
	gmem_view_unref(view);
	gmem_object_unref(place.object);
	gmem_session_unref(session);
	return err;
}

/* What comes to lie there later is not what the guesses were about. */
static void unmap(struct gmem_session *session, uint64_t va, uint64_t bytes)
{
	gmem_stream_cancel(session->core, &session->as, -1, va, bytes);
	gmem_as_remove(&session->as, va, bytes, gmem_session_release_piece, NULL);
}

int gmem_munmap(struct gmem_core *core, uint64_t id, uint64_t va, uint64_t bytes)
{
	struct gmem_session *session;

	if ((va & 4095) || !bytes || va + bytes < va)
		return -EINVAL;
	bytes = (bytes + 4095) & ~4095ull;
	session = gmem_session_get(core, id);
	if (!session)
		return -ENOENT;
	hear_of_unmaps(session);
	unmap(session, va, bytes);
	gmem_session_unref(session);
	return 0;
}

/* Its only region, and whole. */
static bool is_alone(struct gmem_object *object, enum gmem_fork *ret_fork)
{
	bool alone;

	gmem_mutex_lock(&object->lock);
	alone = object->regions && !object->regions->next && object->regions->bytes == object->bytes;
	if (alone)
		*ret_fork = object->regions->fork;
	gmem_mutex_unlock(&object->lock);
	return alone;
}

int gmem_munmap_keep(struct gmem_core *core, uint64_t id, uint64_t va, uint64_t bytes)
{
	struct gmem_session *session = gmem_session_get(core, id);
	struct gmem_object *object;
	struct gmem_place place;
	enum gmem_fork fork;
	int err = -EAGAIN;

	if (!session)
		return -ENOENT;
	if (gmem_as_lookup(&session->as, va, &place)) {
		gmem_session_unref(session);
		return -EINVAL;
	}
	object = place.object;
	if (place.region_va == va && place.region_bytes == bytes && place.committed &&
	    object->account == session->account && object->files == session->account &&
	    !atomic_load(&object->source) && va - core->window.base == object->offset &&
	    !gmem_object_frozen(object) && !atomic_load(&object->marked) && is_alone(object, &fork))
		err = gmem_kept_leave(object, va, fork);
	if (!err)
		unmap(session, va, bytes);
	gmem_object_unref(object);
	gmem_session_unref(session);
	return err;
}

static struct gmem_page_info info_of(gmem_word_t word, uint8_t shift)
{
	return (struct gmem_page_info){
		.state = (uint8_t)gmem_word_state(word), .writer = (int8_t)gmem_word_writer(word),
		.valid = (uint16_t)gmem_word_valid(word), .flags = gmem_word_flags(word), .page_shift = shift,
		.why = (uint16_t)gmem_word_why(word),
	};
}

/* A page is BUSY for a moment after the thread that touched it has been woken; that is not worth reporting. */
static gmem_word_t settled_word(struct gmem_core *core, uint64_t pn)
{
	gmem_word_t word = atomic_load(&core->lpt.words[pn]);

	for (int spins = 0; gmem_word_state(word) == GMEM_BUSY && spins < BUSY_SPINS; spins++) {
		gmem_cpu_relax();
		word = atomic_load(&core->lpt.words[pn]);
	}
	return word;
}

int gmem_query(struct gmem_core *core, uint64_t id, uint64_t va, uint64_t bytes, struct gmem_page_info *pages,
	       size_t capacity, size_t *ret_count)
{
	struct gmem_session *session;
	struct gmem_place place;
	uint64_t offset, last;
	int err;

	if (!bytes || va + bytes < va)
		return -EINVAL;
	session = gmem_session_get(core, id);
	if (!session)
		return -ENOENT;
	err = gmem_as_lookup(&session->as, va, &place);
	gmem_session_unref(session);
	if (err)
		return -EINVAL;
	if (va + bytes > place.region_va + place.region_bytes) {
		gmem_object_unref(place.object);
		return -EINVAL;
	}
	offset = place.region_offset + (va - place.region_va);
	last = (offset + bytes - 1) >> place.object->shift;
	for (uint64_t i = place.index; i <= last && i - place.index < capacity; i++)
		pages[i - place.index] = info_of(settled_word(core, place.object->pn + i), place.object->shift);
	*ret_count = last - place.index + 1;
	gmem_object_unref(place.object);
	return 0;
}
