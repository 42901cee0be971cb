/* SPDX-License-Identifier: Apache-2.0
 *
 * simgpu: a simulated GPU with memory of its own. A context is a process with the session's addresses mapped from the
 * device's memory, so its MMU is the CPU's own: the MMU functions are those of pmap.h, shared with the host. What is
 * left to the driver is its options and its link: copies take latency + bytes / bandwidth, one after the other.
 */
#include <errno.h>
#include <stdlib.h>
#include <time.h>

#include <gmem/driver.h>
#include <gmem/memfd.h>
#include <gmem/pmap.h>
#include <gmem/stats.h>

struct gmem_device {
	uint64_t capacity, bandwidth, latency_ns, replayable;
	_Atomic uint64_t link_free_ns; /* when the link has finished all copies so far */
};

static int simgpu_probe(const struct gmem_driver_config *config, struct gmem_device **ret)
{
	struct gmem_device *gpu = calloc(1, sizeof(*gpu));
	const struct gmem_driver_option options[] = {
		{ "capacity", &gpu->capacity, false, NULL },
		{ "bandwidth", &gpu->bandwidth, false, NULL },   /* bytes a second; 0: memory speed */
		{ "latency", &gpu->latency_ns, false, NULL },    /* nanoseconds */
		{ "replayable", &gpu->replayable, true, NULL },
	};
	int err;

	if (!gpu)
		return -ENOMEM;
	*gpu = (struct gmem_device){ .capacity = 1ull << 30, .replayable = 1 };
	err = gmem_driver_options(config, options, sizeof(options) / sizeof(options[0]));
	if (err)
		free(gpu);
	else
		*ret = gpu;
	return err;
}

static void simgpu_remove(struct gmem_device *gpu)
{
	free(gpu);
}

static int simgpu_info(struct gmem_device *gpu, struct gmem_device_info *ret)
{
	*ret = (struct gmem_device_info){
		.capacity_bytes = gpu->capacity,
		.page_bytes_mask = 1ull << GMEM_SHIFT_4K | 1ull << GMEM_SHIFT_64K | 1ull << GMEM_SHIFT_2M,
		.caps = GMEM_CAP_COMPUTE | GMEM_CAP_SAME_VA | GMEM_CAP_CPU_VISIBLE |
			(gpu->replayable ? GMEM_CAP_REPLAYABLE : 0) | (gpu->bandwidth || gpu->latency_ns ? GMEM_CAP_SLOW : 0),
		.bandwidth_bytes_per_s = gpu->bandwidth, .latency_ns = gpu->latency_ns,
	};
	return 0;
}

static int simgpu_copy(struct gmem_device *gpu, const struct gmem_sg *sg, size_t count, gmem_fence_t after,
		       gmem_fence_t *ret)
{
	uint64_t busy_ns = gpu->latency_ns, done, free_ns = gpu->link_free_ns, now = gmem_now_ns();
	int err = 0;

	for (size_t i = 0; i < count; i++)
		busy_ns += gpu->bandwidth ? sg[i].bytes * 1000000000ull / gpu->bandwidth : 0;
	do {
		done = (free_ns > now ? free_ns : now) + busy_ns;
	} while (!atomic_compare_exchange_weak(&gpu->link_free_ns, &free_ns, done));
	for (size_t i = 0; !err && i < count; i++)
		err = gmem_copy(sg[i].dst, sg[i].src, sg[i].bytes);
	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME,
			       &(struct timespec){ (time_t)(done / 1000000000ull), (long)(done % 1000000000ull) },
			       NULL) == EINTR)
		;
	(void)after; /* copies are complete when this returns, in the order of the calls */
	*ret = 0;
	return err;
}

const struct gmem_driver_ops gmem_simgpu_ops = {
	.abi = GMEM_DRIVER_ABI, .size = sizeof(struct gmem_driver_ops), .name = "simgpu",
	.probe = simgpu_probe, .remove = simgpu_remove, .info = simgpu_info, .copy = simgpu_copy,
	.pmap_enter = gmem_uffd_pmap_enter, .pmap_protect = gmem_uffd_pmap_protect,
};
