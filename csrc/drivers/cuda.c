/* SPDX-License-Identifier: Apache-2.0
 *
 * cuda: an NVIDIA GPU through its driver API, found at run time. See docs/maintainer.md for the facts that it stands on.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cuda.h"

#define RESERVE_BYTES (64ull << 20)
#define THREADS_MAX 16
#define PATIENCE_MS 10000
#define HEADROOM_MIN (2ull << 30) /* what frameworks want for their own allocators, if capacity does not say */

void gmem_cuda_enter(struct gmem_device *gpu)
{
	static _Thread_local CUcontext current;

	if (current == gpu->ctx)
		return;
	if (gpu->cu.ctx_set(gpu->ctx) == CUDA_SUCCESS)
		current = gpu->ctx;
}

/* After these nothing works any more in this process's context. */
static bool is_fatal(CUresult result)
{
	return result == CUDA_ERROR_DEINITIALIZED || result == CUDA_ERROR_DEVICE_UNAVAILABLE ||
	       result == CUDA_ERROR_ECC_UNCORRECTABLE || result == CUDA_ERROR_ILLEGAL_ADDRESS ||
	       (result >= 702 && result <= 720) || result == 999;
}

void gmem_cuda_say(struct gmem_device *gpu, const char *what, int error)
{
	const char *name = NULL;

	if (gpu->cu.error_name(error, &name) || !name)
		name = "unknown error";
	gmem_mutex_lock(&gpu->lock);
	snprintf(gpu->error, sizeof(gpu->error), "%s: %s (%d)", what, name, error);
	gmem_mutex_unlock(&gpu->lock);
}

int gmem_cuda_failed(struct gmem_device *gpu, const char *call, CUresult result)
{
	gmem_cuda_say(gpu, call, result);
	if (is_fatal(result))
		atomic_store(&gpu->lost, true);
	return result == CUDA_ERROR_OUT_OF_MEMORY ? -ENOSPC : -EIO;
}

void gmem_cuda_ref(struct gmem_device *gpu)
{
	atomic_fetch_add(&gpu->refs, 1);
}

void gmem_cuda_unref(struct gmem_device *gpu)
{
	if (atomic_fetch_sub(&gpu->refs, 1) != 1)
		return;
	if (gpu->ctx)
		gmem_cuda_enter(gpu);
	gmem_cuda_frames_end(gpu);
	if (gpu->ctx)
		gpu->cu.primary_release(gpu->id);
	gmem_mutex_deinit(&gpu->lock);
	pthread_cond_destroy(&gpu->wanted);
	pthread_cond_destroy(&gpu->arrived);
	free(gpu);
}

/* ---- probe ---- */

static int refuse(const struct gmem_driver_config *config, int err, const char *format, const char *what)
{
	if (config->message)
		snprintf(config->message, GMEM_MESSAGE_MAX, format, what);
	return err;
}

static int call_failed(const struct gmem_driver_config *config, struct gmem_device *gpu, const char *call, CUresult result)
{
	gmem_cuda_say(gpu, call, result);
	return refuse(config, result == CUDA_ERROR_OUT_OF_MEMORY ? -ENOMEM : -EIO, "%s", gpu->error);
}

static int load(const struct gmem_driver_config *config, struct gmem_device *gpu)
{
	const char *missing = "";
	CUresult r;
	int err = gmem_cuda_api_load(&gpu->cu, &missing);

	if (err == -ENOENT)
		return refuse(config, -ENODEV, "libcuda.so.1 can't be loaded: no NVIDIA driver is installed%s", "");
	if (err)
		return refuse(config, -ENOSYS, "libcuda.so.1 has no %s: the NVIDIA driver is too old", missing);
	r = gpu->cu.init(0);
	return r ? call_failed(config, gpu, "cuInit", r) : 0;
}

static int find_device(const struct gmem_driver_config *config, struct gmem_device *gpu, uint64_t ordinal)
{
	static const struct {
		int attribute;
		const char *what;
	} needed[] = {
		{ CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING, "unified addressing" },
		{ CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, "virtual memory management" },
		{ CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, "memory handles as descriptors" },
	};
	char text[48];
	int count = 0, value;
	CUresult r = gpu->cu.device_count(&count);

	if (r)
		return call_failed(config, gpu, "cuDeviceGetCount", r);
	snprintf(text, sizeof(text), "device: there %s %d", count == 1 ? "is" : "are", count);
	if (ordinal >= (uint64_t)count)
		return refuse(config, -ENODEV, "%s of them, counted from 0", text);
	r = gpu->cu.device_get(&gpu->id, (int)ordinal);
	if (!r)
		r = gpu->cu.device_name(gpu->name, sizeof(gpu->name), gpu->id);
	if (!r)
		r = gpu->cu.device_uuid(gpu->uuid, gpu->id);
	if (r)
		return call_failed(config, gpu, "cuDeviceGet", r);
	for (size_t i = 0; i < sizeof(needed) / sizeof(needed[0]); i++)
		if (gpu->cu.device_attribute(&value, needed[i].attribute, gpu->id) || !value)
			return refuse(config, -ENOTSUP, "device: it has no %s", needed[i].what);
	return 0;
}

static int check_granularity(const struct gmem_driver_config *config, struct gmem_device *gpu)
{
	const CUmemAllocationProp prop = { .type = CU_MEM_ALLOCATION_TYPE_PINNED,
					   .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
					   .location = { CU_MEM_LOCATION_TYPE_DEVICE, gpu->id } };
	size_t bytes = 0;
	CUresult r = gpu->cu.granularity(&bytes, &prop, CU_MEM_ALLOC_GRANULARITY_MINIMUM);

	if (r)
		return call_failed(config, gpu, "cuMemGetAllocationGranularity", r);
	return !bytes || bytes > GMEM_CUDA_BYTES || GMEM_CUDA_BYTES % bytes ?
		       refuse(config, -ENOTSUP, "device: its pages are larger than 2 MiB%s", "") : 0;
}

/* What is free now, less the larger of 2 GiB and a tenth of all, if capacity does not say. */
static int choose_capacity(const struct gmem_driver_config *config, struct gmem_device *gpu)
{
	size_t unused, total;
	uint64_t headroom;
	CUresult r = gpu->cu.primary_retain(&gpu->ctx, gpu->id);

	if (r) {
		gpu->ctx = NULL;
		return call_failed(config, gpu, "cuDevicePrimaryCtxRetain", r);
	}
	gmem_cuda_enter(gpu);
	r = gpu->cu.mem_info(&unused, &total);
	if (r)
		return call_failed(config, gpu, "cuMemGetInfo", r);
	headroom = total / 10 > HEADROOM_MIN ? total / 10 : HEADROOM_MIN;
	if (!gpu->capacity)
		gpu->capacity = unused > 2 * headroom ? unused - headroom : unused / 2;
	gpu->capacity &= ~(GMEM_CUDA_BYTES - 1);
	if (gpu->capacity > total)
		return refuse(config, -EINVAL, "capacity: the device has less memory than that%s", "");
	if (gpu->capacity < GMEM_CUDA_BYTES)
		return refuse(config, -EINVAL, "capacity: smaller than one page of 2 MiB%s", "");
	gpu->frame_limit = (uint32_t)(gpu->capacity >> GMEM_CUDA_SHIFT);
	gpu->frame_max = (uint32_t)(total >> GMEM_CUDA_SHIFT); /* a successor's capacity may be another one */
	return 0;
}

static int check_options(const struct gmem_driver_config *config, const struct gmem_device *gpu)
{
	if (!gpu->threads || gpu->threads > THREADS_MAX)
		return refuse(config, -EINVAL, "threads: not a number of 1 to 16%s", "");
	if (!gpu->patience_ms || gpu->patience_ms > 3600000)
		return refuse(config, -EINVAL, "patience: not a number of milliseconds, 1 to an hour%s", "");
	return 0;
}

static uint64_t default_threads(void)
{
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);

	return cpus < 4 ? 2 : cpus > 16 ? 8 : (uint64_t)cpus / 2;
}

static int cuda_probe(const struct gmem_driver_config *config, struct gmem_device **ret)
{
	struct gmem_device *gpu = calloc(1, sizeof(*gpu));
	uint64_t ordinal = 0;
	int err;

	if (!gpu)
		return -ENOMEM;
	gpu->refs = 1;
	gpu->held.keep = config->keep;
	gpu->reserve = RESERVE_BYTES;
	gpu->threads = default_threads();
	gpu->patience_ms = PATIENCE_MS;
	gmem_mutex_init(&gpu->lock, GMEM_RANK_DRIVER);
	pthread_cond_init(&gpu->wanted, NULL);
	pthread_cond_init(&gpu->arrived, NULL);
	const struct gmem_driver_option options[] = {
		{ "device", &ordinal, false, NULL },
		{ "capacity", &gpu->capacity, false, NULL },
		{ "reserve", &gpu->reserve, false, NULL },   /* bytes of frames made ahead */
		{ "threads", &gpu->threads, false, NULL },   /* that copy */
		{ "patience", &gpu->patience_ms, false, NULL }, /* how long a client's process may take to unmap */
	};
	err = gmem_driver_options(config, options, sizeof(options) / sizeof(options[0]));
	if (!err)
		err = check_options(config, gpu);
	if (!err)
		err = load(config, gpu);
	if (!err)
		err = find_device(config, gpu, ordinal);
	if (!err)
		err = check_granularity(config, gpu);
	if (!err)
		err = choose_capacity(config, gpu);
	if (!err && (err = gmem_cuda_copier_start(gpu)))
		refuse(config, err, "%s", gpu->error);
	if (!err && (err = gmem_cuda_frames_start(gpu))) {
		gmem_cuda_copier_stop(gpu);
		refuse(config, err, "%s", gpu->error);
	}
	if (err)
		gmem_cuda_unref(gpu);
	else
		*ret = gpu;
	return err;
}

static void cuda_remove(struct gmem_device *gpu)
{
	gmem_cuda_frames_stop(gpu);
	gmem_cuda_copier_stop(gpu);
	gmem_cuda_unref(gpu);
}

static int cuda_info(struct gmem_device *gpu, struct gmem_device_info *ret)
{
	*ret = (struct gmem_device_info){
		.capacity_bytes = gpu->capacity, .page_bytes_mask = GMEM_CUDA_BYTES,
		.caps = GMEM_CAP_COMPUTE | GMEM_CAP_EXPORT_FD | GMEM_CAP_SAME_VA | GMEM_CAP_SLOW | GMEM_CAP_OWN_FRAMES,
	};
	return 0;
}

static int cuda_health(struct gmem_device *gpu)
{
	return atomic_load(&gpu->lost) ? -EIO : 0;
}

static const char *cuda_last_error(struct gmem_device *gpu)
{
	static _Thread_local char text[sizeof(gpu->error)];

	gmem_mutex_lock(&gpu->lock); /* others are writing it, perhaps */
	memcpy(text, gpu->error, sizeof(text));
	gmem_mutex_unlock(&gpu->lock);
	return text;
}

const struct gmem_driver_ops gmem_cuda_ops = {
	.abi = GMEM_DRIVER_ABI, .size = sizeof(struct gmem_driver_ops), .name = "cuda",
	.probe = cuda_probe, .remove = cuda_remove, .info = cuda_info, .health = cuda_health, .last_error = cuda_last_error,
	.mem_create = gmem_cuda_mem_create, .mem_destroy = gmem_cuda_mem_destroy, .mem_alloc = gmem_cuda_mem_alloc,
	.mem_free = gmem_cuda_mem_free, .mem_at = gmem_cuda_mem_at, .copy = gmem_cuda_copy,
	.pmap_open = gmem_cuda_pmap_open, .pmap_destroy = gmem_cuda_pmap_destroy, .pmap_map = gmem_cuda_pmap_map,
	.pmap_release = gmem_cuda_pmap_release, .pmap_protect = gmem_cuda_pmap_protect, .pmap_flush = gmem_cuda_pmap_flush,
	.pmap_adopt = gmem_cuda_pmap_adopt, .settle = gmem_cuda_settle,
};
