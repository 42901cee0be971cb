/* SPDX-License-Identifier: Apache-2.0
 *
 * Kernels: functions of a shared object, run in the device's process.
 *
 *	cc -shared -fPIC kernel.c $(pkg-config --cflags gmem) -o kernel.so
 */
#include <errno.h>

#include <gmem.h>

#include "list.h"

gmem_kernel list_square, list_reverse, list_append_after;

/* args[0]: struct list. Squares every value; length and sum go into the list. Returns 0, or -EINVAL without a list. */
int list_square(void *const *args, size_t arg_count)
{
	struct list *list;

	if (arg_count != 1 || !args[0])
		return -EINVAL;
	list = args[0];
	list->length = list->sum = 0;
	for (struct node *node = list->head; node; node = node->next) {
		node->value *= node->value;
		list->sum += node->value;
		list->length++;
	}
	return 0;
}

/* args[0]: struct list. The device writes pointers that the CPU then follows. */
int list_reverse(void *const *args, size_t arg_count)
{
	struct list *list;
	struct node *reversed = NULL;

	if (arg_count != 1 || !args[0])
		return -EINVAL;
	list = args[0];
	for (struct node *node = list->head, *next; node; node = next) {
		next = node->next;
		node->next = reversed;
		reversed = node;
	}
	list->head = reversed;
	return 0;
}

/* args[0]: struct list, args[1]: a fresh node, args[2]: the value after which it goes. Returns whether that was there. */
int list_append_after(void *const *args, size_t arg_count)
{
	struct node *fresh;

	if (arg_count != 3 || !args[0] || !args[1])
		return -EINVAL;
	fresh = args[1];
	for (struct node *node = ((struct list *)args[0])->head; node; node = node->next) {
		if (node->value == (uintptr_t)args[2]) {
			fresh->value = node->value + 1;
			fresh->next = node->next;
			node->next = fresh;
			return 1;
		}
	}
	return 0;
}
