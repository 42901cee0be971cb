/* SPDX-License-Identifier: Apache-2.0
 *
 * What list.c and its kernels share.
 */
#ifndef LIST_H
#define LIST_H

#include <stddef.h>
#include <stdint.h>

struct node {
	struct node *next; /* the same pointer on the CPU and on the device */
	uint64_t value;
	char padding[4080]; /* every node is on a page of its own */
};

struct list {
	struct node *head;
	uint64_t length, sum; /* filled in by the kernel */
};

#endif
