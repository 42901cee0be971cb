/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "index.h"

#define HEADER_BYTES 4096

_Static_assert(sizeof(struct gmem_index_entry) == 16, "entries are shared with other versions");

static int map_index(struct gmem_index *index, uint64_t key_count, int fd)
{
	uint64_t bytes = HEADER_BYTES + key_count * sizeof(struct gmem_index_entry);
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);

	if (at == MAP_FAILED)
		return -errno;
	madvise(at, bytes, MADV_DONTDUMP);
	*index = (struct gmem_index){
		.fd = fd, .key_count = key_count, .bytes = bytes, .header = at,
		.entries = (struct gmem_index_entry *)(void *)((char *)at + HEADER_BYTES),
	};
	return 0;
}

int gmem_index_init(struct gmem_index *index, uint64_t key_count, uint64_t capacity_bytes)
{
	uint64_t bytes = HEADER_BYTES + key_count * sizeof(struct gmem_index_entry);
	int fd = memfd_create("gmem-file-index", MFD_CLOEXEC), err;

	if (fd < 0)
		return -errno;
	err = ftruncate(fd, (off_t)bytes) ? -errno : map_index(index, key_count, fd);
	if (err) {
		close(fd);
		return err;
	}
	*index->header = (struct gmem_index_header){
		.magic = GMEM_INDEX_MAGIC, .version = GMEM_INDEX_VERSION, .entry_bytes = sizeof(*index->entries),
		.entries_offset = HEADER_BYTES, .key_count = key_count, .capacity_bytes = capacity_bytes,
	};
	return 0;
}

int gmem_index_adopt(struct gmem_index *index, uint64_t key_count, int fd)
{
	struct stat st;
	int err;

	if (fstat(fd, &st) || (uint64_t)st.st_size != HEADER_BYTES + key_count * sizeof(struct gmem_index_entry))
		return -EPROTO;
	err = map_index(index, key_count, fd);
	if (err)
		return err;
	if (index->header->magic != GMEM_INDEX_MAGIC || index->header->key_count != key_count)
		err = -EPROTO;
	else if (index->header->version != GMEM_INDEX_VERSION || index->header->entry_bytes != sizeof(*index->entries))
		err = -EPROTONOSUPPORT;
	if (err)
		munmap(index->header, index->bytes);
	return err;
}

int gmem_index_next(struct gmem_index *index, uint64_t *key)
{
	uint64_t at = *key;

	while (at < index->key_count) {
		off_t offset = (off_t)(HEADER_BYTES + at * sizeof(struct gmem_index_entry));
		off_t data = lseek(index->fd, offset, SEEK_DATA), hole;
		uint64_t end;

		if (data < 0)
			return -ENOENT;
		hole = lseek(index->fd, data, SEEK_HOLE);
		if (data > offset)
			at = ((uint64_t)data - HEADER_BYTES) / sizeof(struct gmem_index_entry);
		end = ((uint64_t)hole - HEADER_BYTES) / sizeof(struct gmem_index_entry);
		for (; at < end && at < index->key_count; at++)
			if (atomic_load(&index->entries[at].place)) {
				*key = at;
				return 0;
			}
	}
	return -ENOENT;
}

void gmem_index_deinit(struct gmem_index *index)
{
	munmap(index->header, index->bytes);
	close(index->fd);
}

uint64_t gmem_index_get(struct gmem_index *index, uint64_t key, uint32_t *ret_crc)
{
	struct gmem_index_entry *entry = &index->entries[key];
	uint64_t place = atomic_load(&entry->place);

	if (place)
		*ret_crc = atomic_load_explicit(&entry->crc[!!(place & GMEM_PLACE_SECOND)], memory_order_relaxed);
	return place;
}

uint64_t gmem_index_set(struct gmem_index *index, uint64_t key, uint64_t offset, uint64_t bytes, uint32_t crc)
{
	struct gmem_index_entry *entry = &index->entries[key];
	bool second = !(atomic_load(&entry->place) & GMEM_PLACE_SECOND);

	atomic_store_explicit(&entry->crc[second], crc, memory_order_relaxed);
	return atomic_exchange(&entry->place, offset | (second ? GMEM_PLACE_SECOND : 0) | (uint64_t)__builtin_ctzll(bytes));
}

uint64_t gmem_index_clear(struct gmem_index *index, uint64_t key)
{
	return atomic_exchange(&index->entries[key].place, 0);
}
