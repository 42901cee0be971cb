/* SPDX-License-Identifier: Apache-2.0
 *
 * How it is shared: the core lets one thread at a time work on a key, so an entry's two halves need not change as one;
 * the word alone says where memory is, and is exchanged atomically, so that whatever happens it is freed once. Frames
 * come and go under a lock for each stripe of them. Nobody reads a frame that may be absent: a read would allocate it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <gmem/lockrank.h>
#include <gmem/memfd.h>

#include "peerindex.h"

#define FRAME_KEYS (GMEM_FRAME_BYTES / sizeof(struct slot))
#define STRIPES 64
#define MAGIC 0x696e6467706d6531ull
#define VERSION 1

/* The first frame of the file, for whoever adopts it. */
struct head {
	uint64_t magic, version, key_count, entry_bytes;
};

struct slot {
	_Atomic uint64_t word, check; /* (A) */
};

struct gmem_index {
	struct gmem_quota *quota;            /* (C) */
	struct gmem_file *file;              /* (C) */
	uint64_t key_count, bytes;           /* (C) */
	uint8_t *alias;                      /* (C) */
	struct slot *slots;                  /* (C) in alias, behind the head */
	_Atomic uint16_t *live;              /* (A) changed under the stripe's lock: entries, and room reserved, by frame */
	struct gmem_mutex stripes[STRIPES];
};

static struct gmem_mutex *stripe_of(struct gmem_index *index, uint64_t frame)
{
	return &index->stripes[frame % STRIPES];
}

struct gmem_entry gmem_index_get(struct gmem_index *index, uint64_t key)
{
	struct slot *slot = &index->slots[key];
	struct gmem_entry entry = { 0, 0 };

	if (atomic_load_explicit(&index->live[key / FRAME_KEYS], memory_order_acquire)) {
		entry.word = atomic_load_explicit(&slot->word, memory_order_acquire);
		entry.check = atomic_load_explicit(&slot->check, memory_order_relaxed);
	}
	return entry;
}

int gmem_index_reserve(struct gmem_index *index, uint64_t key)
{
	uint64_t frame = key / FRAME_KEYS;
	int err = 0;

	gmem_mutex_lock(stripe_of(index, frame));
	if (!atomic_load_explicit(&index->live[frame], memory_order_relaxed)) {
		err = gmem_quota_charge(index->quota, GMEM_FRAME_BYTES);
		if (!err) {
			err = gmem_file_populate(index->file, (1 + frame) * GMEM_FRAME_BYTES, GMEM_FRAME_BYTES);
			if (err)
				gmem_quota_return(index->quota, GMEM_FRAME_BYTES);
		}
	}
	if (!err)
		atomic_fetch_add_explicit(&index->live[frame], 1, memory_order_release);
	gmem_mutex_unlock(stripe_of(index, frame));
	return err;
}

void gmem_index_release(struct gmem_index *index, uint64_t key)
{
	uint64_t frame = key / FRAME_KEYS;

	gmem_mutex_lock(stripe_of(index, frame));
	if (atomic_fetch_sub_explicit(&index->live[frame], 1, memory_order_relaxed) == 1 &&
	    !gmem_file_punch(index->file, (1 + frame) * GMEM_FRAME_BYTES, GMEM_FRAME_BYTES))
		gmem_quota_return(index->quota, GMEM_FRAME_BYTES);
	gmem_mutex_unlock(stripe_of(index, frame));
}

uint64_t gmem_index_put(struct gmem_index *index, uint64_t key, struct gmem_entry entry)
{
	struct slot *slot = &index->slots[key];
	uint64_t old;

	atomic_store_explicit(&slot->check, entry.check, memory_order_relaxed);
	old = atomic_exchange_explicit(&slot->word, entry.word, memory_order_acq_rel);
	if (old)
		gmem_index_release(index, key); /* its room */
	return old;
}

uint64_t gmem_index_take(struct gmem_index *index, uint64_t key)
{
	uint64_t old = 0;

	if (atomic_load_explicit(&index->live[key / FRAME_KEYS], memory_order_acquire))
		old = atomic_exchange_explicit(&index->slots[key].word, 0, memory_order_acq_rel);
	if (old)
		gmem_index_release(index, key);
	return old;
}

bool gmem_index_move(struct gmem_index *index, uint64_t key, uint64_t from, uint64_t to)
{
	uint64_t frame = key / FRAME_KEYS;
	bool moved = false;

	if (key >= index->key_count)
		return false;
	gmem_mutex_lock(stripe_of(index, frame)); /* keeps the frame */
	if (atomic_load_explicit(&index->live[frame], memory_order_relaxed))
		moved = atomic_compare_exchange_strong(&index->slots[key].word, &from, to);
	gmem_mutex_unlock(stripe_of(index, frame));
	return moved;
}

static int make_file(struct gmem_index *index, const char *name)
{
	int err = gmem_quota_charge(index->quota, GMEM_FRAME_BYTES);

	if (!err)
		err = gmem_file_create(name, GMEM_CLASS_SMALL, index->bytes, 0, &index->file);
	if (!err)
		err = gmem_alias_map(index->file, 0, index->bytes, &index->alias);
	if (!err)
		err = gmem_file_populate(index->file, 0, GMEM_FRAME_BYTES);
	if (err)
		return err;
	madvise(index->alias, index->bytes, MADV_NOHUGEPAGE); /* a frame that is charged is one frame */
	*(struct head *)index->alias = (struct head){ MAGIC, VERSION, index->key_count, sizeof(struct slot) };
	index->slots = (struct slot *)(index->alias + GMEM_FRAME_BYTES);
	return 0;
}

int gmem_index_create(const char *name, uint64_t key_count, struct gmem_quota *quota, struct gmem_index **ret)
{
	struct gmem_index *index = calloc(1, sizeof(*index));
	uint64_t frames = (key_count + FRAME_KEYS - 1) / FRAME_KEYS;
	int err;

	if (!index)
		return -ENOMEM;
	index->quota = quota;
	index->key_count = key_count;
	index->bytes = (1 + frames) * GMEM_FRAME_BYTES;
	for (int i = 0; i < STRIPES; i++)
		gmem_mutex_init(&index->stripes[i], GMEM_RANK_TIER);
	index->live = mmap(NULL, frames * sizeof(*index->live), PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if ((void *)index->live == MAP_FAILED) {
		index->live = NULL;
		err = -ENOMEM;
	} else {
		err = make_file(index, name);
	}
	if (err)
		gmem_index_destroy(index);
	else
		*ret = index;
	return err;
}

void gmem_index_destroy(struct gmem_index *index)
{
	uint64_t frames = index->bytes / GMEM_FRAME_BYTES - 1;

	gmem_alias_unmap(index->alias, index->bytes);
	gmem_file_unref(index->file);
	if (index->live)
		munmap((void *)index->live, frames * sizeof(*index->live));
	for (int i = 0; i < STRIPES; i++)
		gmem_mutex_deinit(&index->stripes[i]);
	free(index);
}
