/* SPDX-License-Identifier: Apache-2.0
 *
 * A linked list built by the CPU, walked and changed by a kernel on a device, and read back: the pointers in it mean the
 * same on both sides, and only the pages that a side touches move there.
 *
 *	./list DEVICE ./kernel.so [NODES]
 */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <gmem.h>

#include "list.h"

static int say(const char *what, int err)
{
	fprintf(stderr, "%s: %s (%s)\n", what, gmem_last_error(), gmem_strerror(err));
	return 1;
}

/* Nodes are linked in a scattered order, as a list gets after a while. */
static void build(struct list *list, struct node *nodes, size_t count)
{
	struct node **tail = &list->head;

	for (size_t i = 0; i < count; i++) {
		struct node *node = &nodes[i * 7919 % count];

		node->value = i + 1;
		*tail = node;
		tail = &node->next;
	}
	*tail = NULL;
}

static int run(struct gmem_context *context, const char *library, const char *symbol, void *const *args, size_t count,
	       const struct gmem_range *memory, int *ret)
{
	struct gmem_launch_options options = { .size = sizeof(options), .timeout_ns = 60000000000ull,
					       .writes = memory, .write_count = memory ? 1 : 0 };
	struct gmem_fence *fence;
	int err = gmem_context_launch(context, library, symbol, args, count, &options, &fence);

	if (err)
		return say("gmem_context_launch", err);
	err = gmem_fence_wait(fence, GMEM_FOREVER, ret);
	gmem_fence_free(fence);
	return err ? say(symbol, err) : 0;
}

static bool check(const struct list *list, const struct node *fresh, size_t count)
{
	uint64_t expected = count, sum = 0;
	size_t length = 0;

	/* Reversed, squared, and the fresh node before (because after, then reversed) the square of 1. */
	for (const struct node *node = list->head; node; node = node->next) {
		if (node == fresh) {
			if (expected != 1 || node->value != 2)
				return false;
			continue;
		}
		if (node->value != expected * expected)
			return false;
		sum += node->value;
		length++;
		expected--;
	}
	return length == count && list->length == count && list->sum == sum;
}

int main(int argc, char **argv)
{
	size_t count = argc > 3 ? strtoul(argv[3], NULL, 0) : 1000, bytes;
	/* Scattered nodes: small pages, so that little else moves with each. */
	struct gmem_mmap_options scattered = { .size = sizeof(scattered), .page_bytes = 4096 };
	struct gmem_context *context;
	const struct gmem_range *held;
	struct gmem_range memory;
	struct gmem *session;
	struct node *nodes;
	struct list *list;
	int err, found = 0;
	void *args[3];

	if (argc < 3 || !count || count % 7919 == 0) {
		fprintf(stderr, "usage: list DEVICE KERNEL.SO [NODES, no multiple of 7919]\n");
		return 2;
	}
	if ((err = gmem_open(NULL, NULL, &session)))
		return say("gmem_open", err);
	bytes = (count + 2) * sizeof(*nodes);
	if ((err = gmem_mmap(session, bytes, &scattered, (void **)&nodes)))
		return say("gmem_mmap", err);
	list = (struct list *)&nodes[count + 1];
	build(list, nodes, count);
	if ((err = gmem_context_open(session, argv[1], NULL, &context)))
		return say("gmem_context_open", err);
	memory = (struct gmem_range){ nodes, bytes };
	args[0] = list;
	args[1] = &nodes[count];
	args[2] = (void *)(uintptr_t)1;
	/* Holding all of it is for devices that can't fault; where they can, it may be larger than the device. */
	held = getenv("LIST_ACQUIRE") ? &memory : NULL;
	if (run(context, argv[2], "list_square", args, 1, held, NULL) ||
	    run(context, argv[2], "list_append_after", args, 3, held, &found) ||
	    run(context, argv[2], "list_reverse", args, 1, held, NULL))
		return 1;
	if (found != 1 || !check(list, &nodes[count], count)) {
		fprintf(stderr, "the list is wrong\n");
		return 1;
	}
	if ((err = gmem_context_close(context)))
		return say("gmem_context_close", err);
	if ((err = gmem_munmap(session, nodes, bytes)))
		return say("gmem_munmap", err);
	if ((err = gmem_close(session)))
		return say("gmem_close", err);
	printf("ok: %zu nodes, sum of squares %llu\n", count,
	       (unsigned long long)count * (count + 1) * (2 * count + 1) / 6);
	return 0;
}
