/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>

#include <gmem/types.h>

#include "values.h"

#define HEADER_BYTES 4096
#define LOOKED_AT 4096

_Static_assert(sizeof(struct gmem_value) == 144, "records are shared with other versions");

static uint64_t file_bytes(uint32_t count)
{
	return (HEADER_BYTES + (uint64_t)count * sizeof(struct gmem_value) + 4095) & ~4095ull;
}

static void *sparse_memory(uint64_t bytes)
{
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	return at == MAP_FAILED ? NULL : at;
}

static int make_file(struct gmem_values *values)
{
	uint64_t bytes = file_bytes(values->count), object;
	int err = gmem_file_create("gmem-remote-values", GMEM_CLASS_SMALL, bytes, 0, &values->file);

	if (!err && getrandom(&object, sizeof(object), 0) != sizeof(object))
		err = -errno;
	if (!err)
		err = gmem_alias_map(values->file, 0, bytes, &values->alias);
	if (!err)
		err = gmem_file_populate(values->file, 0, HEADER_BYTES);
	if (err)
		return err;
	values->header = (struct gmem_values_header *)values->alias;
	*values->header = (struct gmem_values_header){
		.magic = GMEM_VALUES_MAGIC, .version = GMEM_VALUES_VERSION, .record_bytes = sizeof(struct gmem_value),
		.count = values->count, .object = object, .next_version = 1,
	};
	return 0;
}

static int adopt_file(struct gmem_values *values, int fd)
{
	uint64_t bytes = file_bytes(values->count);
	struct stat st;
	int err = fstat(fd, &st) || (uint64_t)st.st_size != bytes ? -EPROTO : 0;

	if (!err)
		err = gmem_file_adopt(fd, GMEM_CLASS_SMALL, bytes, 0, &values->file);
	if (!err)
		err = gmem_alias_map(values->file, 0, bytes, &values->alias);
	if (err)
		return err;
	values->header = (struct gmem_values_header *)values->alias;
	if (values->header->magic != GMEM_VALUES_MAGIC || values->header->version != GMEM_VALUES_VERSION ||
	    values->header->record_bytes != sizeof(struct gmem_value) || values->header->count != values->count)
		return -EPROTO;
	values->bumped = atomic_load(&values->header->bumped);
	if (values->bumped > values->count)
		return -EPROTO;
	return 0;
}

int gmem_values_init(struct gmem_values *values, uint64_t capacity, int fd)
{
	int err;

	if (capacity / 4096 >= UINT32_MAX)
		return -EINVAL;
	*values = (struct gmem_values){ .capacity = capacity, .count = (uint32_t)((capacity + GMEM_VALUES_BEYOND) / 4096) };
	gmem_mutex_init(&values->lock, GMEM_RANK_TIER);
	pthread_cond_init(&values->given_back, NULL);
	values->live = sparse_memory(values->count * sizeof(*values->live));
	values->next = sparse_memory(values->count * sizeof(*values->next));
	if (!values->live || !values->next)
		err = -ENOMEM;
	else
		err = fd >= 0 ? adopt_file(values, fd) : make_file(values);
	if (err) {
		gmem_values_deinit(values);
		values->capacity = 0;
		return err;
	}
	values->records = (struct gmem_value *)(void *)(values->alias + HEADER_BYTES);
	return 0;
}

void gmem_values_deinit(struct gmem_values *values)
{
	if (values->alias)
		gmem_alias_unmap(values->alias, file_bytes(values->count));
	gmem_file_unref(values->file);
	if (values->live)
		munmap(values->live, values->count * sizeof(*values->live));
	if (values->next)
		munmap(values->next, values->count * sizeof(*values->next));
	pthread_cond_destroy(&values->given_back);
	gmem_mutex_deinit(&values->lock);
}

int gmem_values_fd(const struct gmem_values *values)
{
	return values->file->fd;
}

static uint64_t bytes_of(const struct gmem_value *record)
{
	return (uint64_t)record->page_bytes * record->slots;
}

static int take_record_locked(struct gmem_values *values, uint32_t *ret)
{
	uint64_t at = HEADER_BYTES + (uint64_t)values->bumped * sizeof(struct gmem_value);
	int err;

	if (values->free) {
		*ret = values->free - 1;
		values->free = values->next[*ret];
		return 0;
	}
	if (values->bumped == values->count)
		return -ENOSPC;
	/* memory that can't be had is an error, and no SIGBUS */
	err = gmem_file_populate(values->file, at & ~4095ull, ((at & 4095) + sizeof(struct gmem_value) + 4095) & ~4095ull);
	if (err)
		return err;
	*ret = values->bumped++;
	atomic_store(&values->header->bumped, values->bumped);
	return 0;
}

int gmem_values_add(struct gmem_values *values, const uint64_t *keys, unsigned slots, uint32_t page_bytes, bool beyond,
		    uint32_t *ret)
{
	struct gmem_value *record;
	uint32_t value = 0;
	int err;

	gmem_mutex_lock(&values->lock);
	err = values->stored_bytes + (uint64_t)slots * page_bytes > values->capacity + (beyond ? GMEM_VALUES_BEYOND : 0) ?
		      -ENOSPC : take_record_locked(values, &value);
	if (!err) {
		record = &values->records[value];
		record->page_bytes = page_bytes;
		record->slots = slots;
		memcpy(record->keys, keys, slots * sizeof(*keys));
		values->stored_bytes += bytes_of(record);
		values->live[value] = (uint16_t)((1u << slots) - 1);
		atomic_store(&record->version, atomic_fetch_add(&values->header->next_version, 1));
		*ret = value;
	}
	gmem_mutex_unlock(&values->lock);
	return err;
}

static void bury_locked(struct gmem_values *values, uint32_t value)
{
	values->next[value] = values->dead;
	values->dead = value + 1;
}

bool gmem_values_leave(struct gmem_values *values, uint32_t value, unsigned slot)
{
	bool first = false;

	gmem_mutex_lock(&values->lock);
	if (values->live[value] & 1u << slot) {
		values->live[value] &= (uint16_t)~(1u << slot);
		if (!values->live[value]) {
			first = !values->dead;
			bury_locked(values, value);
		}
	}
	gmem_mutex_unlock(&values->lock);
	return first;
}

unsigned gmem_values_dead(struct gmem_values *values, uint32_t *ret, unsigned count)
{
	unsigned n = 0;

	gmem_mutex_lock(&values->lock);
	while (n < count && values->dead) {
		ret[n] = values->dead - 1;
		values->dead = values->next[ret[n]];
		n++;
	}
	values->taken += n;
	gmem_mutex_unlock(&values->lock);
	return n;
}

void gmem_values_bury(struct gmem_values *values, uint32_t value)
{
	gmem_mutex_lock(&values->lock);
	bury_locked(values, value);
	values->taken--;
	pthread_cond_broadcast(&values->given_back);
	gmem_mutex_unlock(&values->lock);
}

void gmem_values_forget(struct gmem_values *values, uint32_t value)
{
	struct gmem_value *record = &values->records[value];

	gmem_mutex_lock(&values->lock);
	values->stored_bytes -= bytes_of(record);
	atomic_store(&record->version, 0);
	values->next[value] = values->free;
	values->free = value + 1;
	values->taken--;
	pthread_cond_broadcast(&values->given_back);
	gmem_mutex_unlock(&values->lock);
}

bool gmem_values_await(struct gmem_values *values, uint64_t ns)
{
	bool taken;

	gmem_mutex_lock(&values->lock);
	taken = values->taken;
	if (taken)
		gmem_mutex_wait(&values->lock, &values->given_back, ns);
	gmem_mutex_unlock(&values->lock);
	return taken;
}

unsigned gmem_values_sparse(struct gmem_values *values, uint32_t *at, uint32_t *ret, unsigned pages)
{
	unsigned found = 0, sum = 0;

	gmem_mutex_lock(&values->lock);
	for (uint32_t i = 0; i < LOOKED_AT && i < values->bumped && sum < pages; i++, ++*at) {
		uint32_t value = *at < values->bumped ? *at : (*at = 0);
		unsigned live = (unsigned)__builtin_popcount(values->live[value]);

		if (live && values->records[value].slots >= 2 * live) {
			ret[found++] = value;
			sum += live;
		}
	}
	gmem_mutex_unlock(&values->lock);
	return found;
}

/* ---- after a crash ---- */

int gmem_values_claim(struct gmem_values *values, uint32_t value, unsigned slot, uint64_t key)
{
	struct gmem_value *record;

	if (value >= values->bumped)
		return -EPROTO;
	record = &values->records[value];
	if (!atomic_load(&record->version) || slot >= record->slots || record->slots > GMEM_VALUE_SLOTS ||
	    record->keys[slot] != key)
		return -EPROTO;
	values->live[value] |= (uint16_t)(1u << slot);
	return 0;
}

void gmem_values_settle(struct gmem_values *values)
{
	for (uint32_t value = 0; value < values->bumped; value++) {
		struct gmem_value *record = &values->records[value];

		if (!atomic_load(&record->version)) {
			values->next[value] = values->free;
			values->free = value + 1;
			continue;
		}
		values->stored_bytes += bytes_of(record);
		if (!values->live[value])
			bury_locked(values, value);
	}
}
