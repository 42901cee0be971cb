/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>

#include <gmem_cuda_api.h>

#include "cuda_maps.h"

#define BUCKETS 4096

struct place {
	struct place *next;
	CUdevice device;
	uint64_t va;
	unsigned count, writers;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards what follows */
static struct place *buckets[BUCKETS];

static struct place **find(CUdevice device, uint64_t va)
{
	struct place **at = &buckets[(va >> 21 ^ (unsigned)device) % BUCKETS];

	while (*at && ((*at)->device != device || (*at)->va != va))
		at = &(*at)->next;
	return at;
}

void gmem_cuda_maps_lock(void)
{
	pthread_mutex_lock(&lock);
}

void gmem_cuda_maps_unlock(void)
{
	pthread_mutex_unlock(&lock);
}

CUresult gmem_cuda_maps_add(const struct gmem_cuda_api *cu, CUdevice device, uint64_t va, uint64_t bytes, CUmemhandle handle,
			    bool writable, bool *ret_access)
{
	struct place **at = find(device, va), *place = *at;
	CUresult r;

	if (place) {
		place->count++;
		*ret_access = writable && !place->writers;
		place->writers += writable;
		return CUDA_SUCCESS;
	}
	place = malloc(sizeof(*place));
	if (!place)
		return CUDA_ERROR_OUT_OF_MEMORY;
	r = cu->map(va, bytes, 0, handle, 0);
	if (r) {
		free(place);
		return r;
	}
	*place = (struct place){ NULL, device, va, 1, writable };
	*at = place;
	*ret_access = true;
	return CUDA_SUCCESS;
}

bool gmem_cuda_maps_change(CUdevice device, uint64_t va, bool was, bool is)
{
	struct place *place = *find(device, va);
	bool before;

	if (!place)
		return false;
	before = place->writers;
	place->writers += is;
	place->writers -= was;
	return before != (place->writers != 0);
}

static CUresult read_only(const struct gmem_cuda_api *cu, const struct place *place, uint64_t bytes)
{
	const CUmemAccessDesc access = { .location = { CU_MEM_LOCATION_TYPE_DEVICE, place->device },
					 .flags = CU_MEM_ACCESS_FLAGS_PROT_READ };

	return cu->set_access(place->va, bytes, &access, 1);
}

CUresult gmem_cuda_maps_remove(const struct gmem_cuda_api *cu, CUdevice device, uint64_t va, uint64_t bytes, bool writable)
{
	struct place **at = find(device, va), *place = *at;

	if (!place)
		return CUDA_ERROR_INVALID_VALUE;
	place->writers -= writable;
	if (--place->count)
		return writable && !place->writers ? read_only(cu, place, bytes) : CUDA_SUCCESS;
	*at = place->next;
	free(place);
	return cu->unmap(va, bytes);
}
