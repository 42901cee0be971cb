/* SPDX-License-Identifier: Apache-2.0
 *
 * Boxes: many descriptors in few places. A manager that holds descriptors for us (keep.h) takes some thousands, a GPU has ten
 * times as many frames. So each place there is a box: a socket, in whose queue descriptors wait, one in a message with the
 * number that it goes by. The kernel keeps what is in a queue as long as anybody has the socket; a look (MSG_PEEK) gives a
 * descriptor without taking it out, at any place in the queue (SO_PEEK_OFF). They also take no place in this process's table
 * of descriptors, but count as in flight: of a user without CAP_SYS_RESOURCE at most RLIMIT_NOFILE may be.
 *
 * A number is out of its box when it has been dropped. What is in front of it in the queue goes to the end for that: sent
 * again first, and only then taken from the front; who finds it twice has found it once. The socket that sends is in the
 * queue as well, so that a successor who gets the one has both.
 */
#ifndef GMEM_DRIVER_CUDA_BOXES_H
#define GMEM_DRIVER_CUDA_BOXES_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <gmem/keep.h>

#define GMEM_BOX_ROOM 64u /* a queue takes some 270, as sockets come */

struct gmem_boxes;

/* Numbers are below most. keep: NULL: nobody holds them, and they end with this process. made: how many boxes there have ever
 * been, in memory that a successor finds. */
int gmem_boxes_create(struct gmem_driver_keep *keep, uint32_t most, _Atomic uint32_t *made, struct gmem_boxes **ret);
void gmem_boxes_destroy(struct gmem_boxes *boxes); /* NULL is allowed */

/* What is in a predecessor's boxes; once, before anything is put. true: it stays there. The descriptor is the caller's to
 * look at meanwhile. One that was just being moved is there twice: who has refused it is asked again. */
typedef bool (*gmem_box_fn)(uint32_t number, uint32_t generation, int fd, void *arg);
void gmem_boxes_open(struct gmem_boxes *boxes, gmem_box_fn fn, void *arg);

/* generation: told to a successor with the number. The descriptor stays the caller's. -ETOOMANYREFS: the user has as many in
 * flight as it may; -ENFILE: no more boxes are held. */
int gmem_boxes_put(struct gmem_boxes *boxes, uint32_t number, uint32_t generation, int fd);
/* A duplicate, the caller's. -ENOENT: it is in no box. */
int gmem_boxes_get(struct gmem_boxes *boxes, uint32_t number, int *ret_fd);
void gmem_boxes_drop(struct gmem_boxes *boxes, const uint32_t *numbers, size_t count);

#endif
