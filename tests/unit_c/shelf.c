/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "shelf.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "harness.h"

struct book {
	size_t bytes;
	uint8_t content[];
};

static struct shelf *probed; /* attaching is one at a time */

static struct shelf *of(struct gmem_device *device)
{
	return (struct shelf *)device;
}

static int shelf_probe(const struct gmem_driver_config *config, struct gmem_device **ret)
{
	struct shelf *shelf = probed;

	shelf->key_count = config->key_count;
	shelf->books = mmap(NULL, shelf->key_count * sizeof(void *), PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	CHECK(shelf->books != MAP_FAILED);
	pthread_mutex_init(&shelf->lock, NULL);
	*ret = (struct gmem_device *)shelf;
	return 0;
}

static void shelf_remove(struct gmem_device *device)
{
	munmap(of(device)->books, of(device)->key_count * sizeof(void *));
	pthread_mutex_destroy(&of(device)->lock);
}

static int shelf_info(struct gmem_device *device, struct gmem_device_info *ret)
{
	*ret = (struct gmem_device_info){ .capacity_bytes = of(device)->capacity, .caps = GMEM_CAP_PEER | of(device)->caps,
					  .assured_bytes = of(device)->assured };
	return 0;
}

static int put(struct shelf *shelf, uint64_t key, const void *src, size_t bytes)
{
	struct book *book = malloc(sizeof(*book) + bytes), *old;
	int err = 0;

	CHECK(key < shelf->key_count && book);
	for (; shelf->hold; sleep_ms(1), shelf->held++)
		shelf->held_key = key;
	book->bytes = bytes;
	memcpy(book->content, src, bytes);
	pthread_mutex_lock(&shelf->lock);
	old = shelf->books[key];
	if (shelf->stored + bytes - (old ? old->bytes : 0) > shelf->physical) {
		err = -ENOSPC;
		old = book;
	} else {
		shelf->stored += bytes - (old ? old->bytes : 0);
		shelf->pages += !old;
		shelf->pushes++;
		shelf->books[key] = book;
	}
	pthread_mutex_unlock(&shelf->lock);
	free(old);
	return err;
}

static int get(struct shelf *shelf, uint64_t key, void *dst, size_t bytes)
{
	if (shelf->hold_pulls)
		shelf->held_pulls++;
	while (shelf->hold_pulls)
		sleep_ms(1);
	if (shelf->pull_error)
		return shelf->pull_error;
	CHECK(shelf->books[key] && shelf->books[key]->bytes == bytes);
	memcpy(dst, shelf->books[key]->content, bytes);
	shelf->pulls++;
	return 0;
}

static int shelf_map(struct gmem_device *device, uint64_t key, const void *src, size_t bytes)
{
	return put(of(device), key, src, bytes);
}

static int shelf_unmap(struct gmem_device *device, uint64_t key, void *dst, size_t bytes)
{
	return get(of(device), key, dst, bytes);
}

static int shelf_free(struct gmem_device *device, uint64_t key, size_t bytes)
{
	struct shelf *shelf = of(device);
	struct book *book;

	pthread_mutex_lock(&shelf->lock);
	book = shelf->books[key];
	CHECK(book && book->bytes == bytes);
	shelf->books[key] = NULL;
	shelf->stored -= bytes;
	shelf->pages--;
	pthread_mutex_unlock(&shelf->lock);
	free(book);
	return 0;
}

static void count_call(struct shelf *shelf, size_t count)
{
	shelf->calls++;
	if (count > shelf->largest)
		shelf->largest = count;
}

static int shelf_map_batch(struct gmem_device *device, struct gmem_peer_io *io, size_t count)
{
	count_call(of(device), count);
	for (size_t i = 0; i < count; i++)
		io[i].result = put(of(device), io[i].key, io[i].memory, io[i].bytes);
	return 0;
}

static int shelf_unmap_batch(struct gmem_device *device, struct gmem_peer_io *io, size_t count)
{
	count_call(of(device), count);
	for (size_t i = 0; i < count; i++)
		io[i].result = get(of(device), io[i].key, io[i].memory, io[i].bytes);
	return 0;
}

int shelf_attach(struct gmem_core *core, struct shelf *shelf, const char *name)
{
	char message[GMEM_MESSAGE_MAX];
	struct gmem_driver_config config = { .name = name, .message = message };
	int hnid = -1, err;

	shelf->ops = (struct gmem_driver_ops){
		.abi = GMEM_DRIVER_ABI, .size = sizeof(shelf->ops), .name = "shelf", .probe = shelf_probe,
		.remove = shelf_remove, .info = shelf_info, .peer_free = shelf_free,
	};
	if (!shelf->physical)
		shelf->physical = shelf->capacity;
	if (shelf->batches) {
		shelf->ops.peer_map_batch = shelf_map_batch;
		shelf->ops.peer_unmap_batch = shelf_unmap_batch;
	} else {
		shelf->ops.peer_map = shelf_map;
		shelf->ops.peer_unmap = shelf_unmap;
	}
	probed = shelf;
	err = gmem_device_attach(core, &shelf->ops, &config, &hnid);
	if (err)
		fprintf(stderr, "%s: %s\n", name, message);
	return err ? err : hnid;
}
