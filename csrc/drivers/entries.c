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
#include <sys/stat.h>
#include <unistd.h>

#include <gmem/lockrank.h>
#include <gmem/memfd.h>

#include "entries.h"

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

struct gmem_entries {
	struct gmem_quota *quota;            /* (C) */
	struct gmem_file *file;              /* (C) */
	uint64_t key_count, bytes;           /* (C) */
	uint8_t *alias;                      /* (C) */
	struct slot *slots;                  /* (C) in alias, behind the head */
	_Atomic uint16_t *live;              /* (A) changed under the stripe's lock: entries, and room reserved, by frame */
	struct gmem_mutex stripes[STRIPES];
};

static struct gmem_mutex *stripe_of(struct gmem_entries *entries, uint64_t frame)
{
	return &entries->stripes[frame % STRIPES];
}

struct gmem_entry gmem_entries_get(struct gmem_entries *entries, uint64_t key)
{
	struct slot *slot = &entries->slots[key];
	struct gmem_entry entry = { 0, 0 };

	if (atomic_load_explicit(&entries->live[key / FRAME_KEYS], memory_order_acquire)) {
		entry.word = atomic_load_explicit(&slot->word, memory_order_acquire);
		entry.check = atomic_load_explicit(&slot->check, memory_order_relaxed);
	}
	return entry;
}

int gmem_entries_reserve(struct gmem_entries *entries, uint64_t key)
{
	uint64_t frame = key / FRAME_KEYS;
	int err = 0;

	gmem_mutex_lock(stripe_of(entries, frame));
	if (!atomic_load_explicit(&entries->live[frame], memory_order_relaxed)) {
		err = gmem_quota_charge(entries->quota, GMEM_FRAME_BYTES);
		if (!err) {
			err = gmem_file_populate(entries->file, (1 + frame) * GMEM_FRAME_BYTES, GMEM_FRAME_BYTES);
			if (err)
				gmem_quota_return(entries->quota, GMEM_FRAME_BYTES);
		}
	}
	if (!err)
		atomic_fetch_add_explicit(&entries->live[frame], 1, memory_order_release);
	gmem_mutex_unlock(stripe_of(entries, frame));
	return err;
}

void gmem_entries_release(struct gmem_entries *entries, uint64_t key)
{
	uint64_t frame = key / FRAME_KEYS;

	gmem_mutex_lock(stripe_of(entries, frame));
	if (atomic_fetch_sub_explicit(&entries->live[frame], 1, memory_order_relaxed) == 1 &&
	    !gmem_file_punch(entries->file, (1 + frame) * GMEM_FRAME_BYTES, GMEM_FRAME_BYTES))
		gmem_quota_return(entries->quota, GMEM_FRAME_BYTES);
	gmem_mutex_unlock(stripe_of(entries, frame));
}

uint64_t gmem_entries_put(struct gmem_entries *entries, uint64_t key, struct gmem_entry entry)
{
	struct slot *slot = &entries->slots[key];
	uint64_t old;

	/* none in between: a word must never be seen with the other's check, whatever ends this process */
	old = atomic_exchange_explicit(&slot->word, 0, memory_order_acq_rel);
	atomic_store_explicit(&slot->check, entry.check, memory_order_relaxed);
	atomic_store_explicit(&slot->word, entry.word, memory_order_release);
	if (old)
		gmem_entries_release(entries, key); /* its room */
	return old;
}

uint64_t gmem_entries_take(struct gmem_entries *entries, uint64_t key)
{
	uint64_t old = 0;

	if (atomic_load_explicit(&entries->live[key / FRAME_KEYS], memory_order_acquire))
		old = atomic_exchange_explicit(&entries->slots[key].word, 0, memory_order_acq_rel);
	if (old)
		gmem_entries_release(entries, key);
	return old;
}

bool gmem_entries_move(struct gmem_entries *entries, uint64_t key, uint64_t from, uint64_t to)
{
	uint64_t frame = key / FRAME_KEYS;
	bool moved = false;

	if (key >= entries->key_count)
		return false;
	gmem_mutex_lock(stripe_of(entries, frame)); /* keeps the frame */
	if (atomic_load_explicit(&entries->live[frame], memory_order_relaxed))
		moved = atomic_compare_exchange_strong(&entries->slots[key].word, &from, to);
	gmem_mutex_unlock(stripe_of(entries, frame));
	return moved;
}

int gmem_entries_fd(const struct gmem_entries *entries)
{
	return entries->file->fd;
}

int gmem_entries_next(struct gmem_entries *entries, uint64_t *key)
{
	for (uint64_t at = *key; at < entries->key_count; at++) {
		if (!atomic_load_explicit(&entries->live[at / FRAME_KEYS], memory_order_relaxed)) {
			at |= FRAME_KEYS - 1; /* nothing in that frame */
			continue;
		}
		if (atomic_load(&entries->slots[at].word)) {
			*key = at;
			return 0;
		}
	}
	return -ENOENT;
}

/* Counts what a predecessor has stored; a frame that has nothing, because it was killed on the way, goes. */
static int count_frames(struct gmem_entries *entries)
{
	off_t at = GMEM_FRAME_BYTES;

	while ((at = lseek(entries->file->fd, at, SEEK_DATA)) >= 0 && (uint64_t)at < entries->bytes) {
		uint64_t frame = (uint64_t)at / GMEM_FRAME_BYTES - 1;
		uint16_t live = 0;

		for (uint64_t i = 0; i < FRAME_KEYS; i++)
			live += atomic_load(&entries->slots[frame * FRAME_KEYS + i].word) != 0;
		if (live)
			atomic_fetch_add(&entries->quota->used, GMEM_FRAME_BYTES);
		else
			gmem_file_punch(entries->file, (1 + frame) * GMEM_FRAME_BYTES, GMEM_FRAME_BYTES);
		atomic_store(&entries->live[frame], live);
		at += GMEM_FRAME_BYTES;
	}
	return 0;
}

static int adopt_file(struct gmem_entries *entries, int fd)
{
	const struct head *head;
	struct stat st;
	int err = fstat(fd, &st) || (uint64_t)st.st_size != entries->bytes ? -EPROTO : 0;

	if (!err)
		err = gmem_file_adopt(fd, GMEM_CLASS_SMALL, entries->bytes, 0, &entries->file);
	if (!err)
		err = gmem_alias_map(entries->file, 0, entries->bytes, &entries->alias);
	if (err)
		return err;
	madvise(entries->alias, entries->bytes, MADV_NOHUGEPAGE);
	head = (const struct head *)entries->alias;
	entries->slots = (struct slot *)(entries->alias + GMEM_FRAME_BYTES);
	if (head->magic != MAGIC || head->key_count != entries->key_count)
		return -EPROTO;
	if (head->version != VERSION || head->entry_bytes != sizeof(struct slot))
		return -EPROTONOSUPPORT;
	atomic_fetch_add(&entries->quota->used, GMEM_FRAME_BYTES);
	return count_frames(entries);
}

static int make_file(struct gmem_entries *entries, const char *name)
{
	int err = gmem_quota_charge(entries->quota, GMEM_FRAME_BYTES);

	if (!err)
		err = gmem_file_create(name, GMEM_CLASS_SMALL, entries->bytes, 0, &entries->file);
	if (!err)
		err = gmem_alias_map(entries->file, 0, entries->bytes, &entries->alias);
	if (!err)
		err = gmem_file_populate(entries->file, 0, GMEM_FRAME_BYTES);
	if (err)
		return err;
	madvise(entries->alias, entries->bytes, MADV_NOHUGEPAGE); /* a frame that is charged is one frame */
	*(struct head *)entries->alias = (struct head){ MAGIC, VERSION, entries->key_count, sizeof(struct slot) };
	entries->slots = (struct slot *)(entries->alias + GMEM_FRAME_BYTES);
	return 0;
}

int gmem_entries_create(const char *name, uint64_t key_count, struct gmem_quota *quota, int fd,
			struct gmem_entries **ret)
{
	struct gmem_entries *entries = calloc(1, sizeof(*entries));
	uint64_t frames = (key_count + FRAME_KEYS - 1) / FRAME_KEYS;
	int err;

	if (!entries)
		return -ENOMEM;
	entries->quota = quota;
	entries->key_count = key_count;
	entries->bytes = (1 + frames) * GMEM_FRAME_BYTES;
	for (int i = 0; i < STRIPES; i++)
		gmem_mutex_init(&entries->stripes[i], GMEM_RANK_TIER);
	entries->live = mmap(NULL, frames * sizeof(*entries->live), PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if ((void *)entries->live == MAP_FAILED) {
		entries->live = NULL;
		err = -ENOMEM;
	} else {
		err = fd >= 0 ? adopt_file(entries, fd) : make_file(entries, name);
	}
	if (err)
		gmem_entries_destroy(entries);
	else
		*ret = entries;
	return err;
}

void gmem_entries_destroy(struct gmem_entries *entries)
{
	uint64_t frames = entries->bytes / GMEM_FRAME_BYTES - 1;

	gmem_alias_unmap(entries->alias, entries->bytes);
	gmem_file_unref(entries->file);
	if (entries->live)
		munmap((void *)entries->live, frames * sizeof(*entries->live));
	for (int i = 0; i < STRIPES; i++)
		gmem_mutex_deinit(&entries->stripes[i]);
	free(entries);
}
