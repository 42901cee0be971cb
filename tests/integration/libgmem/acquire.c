/* SPDX-License-Identifier: Apache-2.0
 *
 * acquire DEVICE KERNELS.SO: a device that can't replay a fault. What a kernel touches is held there while it runs.
 */
#include "check.h"

#define MB ((size_t)1 << 20)
#define PATIENCE_NS 60000000000ull
#define REGIONS 6

static struct gmem *session;
static struct gmem_context *context;
static const char *device, *library;

static struct gmem_fence *add(void *va, size_t bytes, const struct gmem_range *writes)
{
	struct gmem_launch_options options = { .size = sizeof(options), .writes = writes,
					       .write_count = writes ? 1 : 0 };
	void *args[3] = { va, (void *)(bytes / 8), (void *)1 };
	struct gmem_fence *fence;

	OK(gmem_context_launch(context, library, "add", args, 3, &options, &fence));
	return fence;
}

static void finish(struct gmem_fence *fence)
{
	int value = -1;

	OK(gmem_fence_wait(fence, PATIENCE_NS, &value));
	CHECK(value == 0);
	gmem_fence_free(fence);
}

/* More than the device holds at once: a launch waits until earlier ones have let go. */
static void test_launches_take_turns(void)
{
	struct gmem_fence *fences[3 * REGIONS];
	struct gmem_range ranges[REGIONS];

	for (int i = 0; i < REGIONS; i++) {
		ranges[i].bytes = 3 * MB;
		OK(gmem_mmap(session, 3 * MB, NULL, &ranges[i].va));
	}
	for (int i = 0; i < 3 * REGIONS; i++)
		fences[i] = add(ranges[i % REGIONS].va, 3 * MB, &ranges[i % REGIONS]);
	for (int i = 0; i < 3 * REGIONS; i++)
		finish(fences[i]);
	for (int i = 0; i < REGIONS; i++) {
		for (size_t j = 0; j < 3 * MB / 8; j++)
			CHECK(((uint64_t *)ranges[i].va)[j] == 3);
		OK(gmem_munmap(session, ranges[i].va, 3 * MB));
	}
}

static void test_by_hand(void)
{
	struct gmem_range range = { .bytes = MB };
	size_t total = 32 * MB;
	struct gmem_range whole = { .bytes = total };
	struct gmem_range halves[2];

	OK(gmem_mmap(session, MB, NULL, &range.va));
	halves[0] = (struct gmem_range){ range.va, MB / 2 };
	halves[1] = (struct gmem_range){ (uint8_t *)range.va + MB / 2, MB / 2 };
	OK(gmem_acquire(context, &range, 1, GMEM_ACQUIRE_WRITE));
	finish(add(range.va, MB, NULL));
	finish(add(range.va, MB, NULL));
	OK(gmem_acquire(context, halves, 2, GMEM_ACQUIRE_WRITE)); /* as well */
	OK(gmem_release(context, &halves[1], 1));
	OK(gmem_release(context, &range, 1));
	OK(gmem_release(context, &halves[0], 1));
	REFUSED(gmem_release(context, &halves[0], 1), EINVAL, "ranges");
	REFUSED(gmem_release(context, &range, 1), EINVAL, "ranges");
	REFUSED(gmem_release(context, &range, 0), EINVAL, "ranges");
	CHECK(((uint64_t *)range.va)[0] == 2 && ((uint64_t *)range.va)[MB / 8 - 1] == 2);
	OK(gmem_mmap(session, total, NULL, &whole.va));
	CHECK(gmem_acquire(context, &whole, 1, GMEM_ACQUIRE_WRITE) < 0); /* four times what there is */
	REFUSED(gmem_acquire(context, &range, 1, 0x10), EINVAL, "flags");
	REFUSED(gmem_acquire(context, NULL, 1, 0), EINVAL, "ranges");
	REFUSED(gmem_acquire(context, &range, 0, 0), EINVAL, "ranges");
	OK(gmem_munmap(session, whole.va, total));
	OK(gmem_munmap(session, range.va, MB));
}

static void test_not_acquired(void)
{
	struct gmem_fence *fence;
	void *memory;

	OK(gmem_mmap(session, MB, NULL, &memory));
	fence = add(memory, MB, NULL);
	REFUSED(gmem_fence_wait(fence, PATIENCE_NS, NULL), EOWNERDEAD, "not acquired");
	gmem_fence_free(fence);
	CHECK(((uint64_t *)memory)[0] == 0);
	OK(gmem_munmap(session, memory, MB));
}

int main(int argc, char **argv)
{
	CHECK(argc == 3);
	device = argv[1];
	library = argv[2];
	OK(gmem_open(NULL, NULL, &session));
	OK(gmem_context_open(session, device, NULL, &context));
	CHECK(!(device_of(session, device).caps & GMEM_CAP_REPLAYABLE));
	test_launches_take_turns();
	test_by_hand();
	test_not_acquired();
	OK(gmem_context_close(context));
	CHECK(device_of(session, device).contexts == 0 && device_of(session, device).used_bytes == 0);
	OK(gmem_close(session));
	return 0;
}
