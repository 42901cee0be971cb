/* SPDX-License-Identifier: Apache-2.0
 *
 * Of each box there is a picture here of what is in its queue, in order: so a number's place is known without looking, and
 * what goes is known before anything is sent again.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <gmem/crash.h>
#include <gmem/driver.h>
#include <gmem/sparse.h>

#include "cuda_boxes.h"

#define MAGIC 0x4d415246u /* "FRAM" */
#define WRITER UINT32_MAX /* the number of the box's own sending socket */
#define ITEMS (2 * GMEM_BOX_ROOM)

struct item {
	uint32_t magic, number, generation, dead; /* dead: here alone; it is to go */
};

struct box {
	bool taken, ready;           /* boxes lock; its place is somebody's; it is there */
	bool full;                   /* boxes lock; its queue takes no more just now */
	int in, out;                 /* boxes lock; out -1: nothing can be added */
	uint32_t first, count, dead; /* boxes lock; of the ring of items */
	struct item items[ITEMS];    /* boxes lock; what is in the queue */
};

struct gmem_boxes {
	struct gmem_mutex lock;
	struct gmem_driver_config held; /* (C) its keep is all that counts */
	_Atomic uint32_t *made;         /* (C) */
	uint32_t most, box_max;         /* (C) */
	struct box *boxes;              /* (C) mapped sparse */
	uint32_t *box_of;               /* lock; by number, mapped sparse; box + 1 */
};

static struct item *item_at(struct box *box, uint32_t place)
{
	return &box->items[(box->first + place) % ITEMS];
}

/* ---- the queue ---- */

static int send_item(int out, const struct item *item, int fd)
{
	struct item told = { MAGIC, item->number, item->generation, 0 };
	struct iovec part = { &told, sizeof(told) };
	union {
		struct cmsghdr head;
		char room[CMSG_SPACE(sizeof(int))];
	} control = { 0 };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
				  .msg_controllen = sizeof(control.room) };

	control.head = (struct cmsghdr){ .cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS };
	memcpy(CMSG_DATA(&control.head), &fd, sizeof(fd));
	while (sendmsg(out, &message, MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
		if (errno != EINTR)
			return -errno;
	return 0;
}

/* What is at a place of the queue, which stays there; ret_fd NULL: without its descriptor. -ENODATA: there is nothing;
 * -EBADMSG: it is none of ours. */
static int peek(int in, uint32_t place, struct item *ret, int *ret_fd)
{
	int offset = (int)(place * sizeof(*ret));
	struct iovec part = { ret, sizeof(*ret) };
	union {
		struct cmsghdr head;
		char room[CMSG_SPACE(sizeof(int))];
	} control = { 0 };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1 };
	struct cmsghdr *c;
	ssize_t n;

	if (ret_fd) {
		message.msg_control = &control;
		message.msg_controllen = sizeof(control.room);
	}
	if (setsockopt(in, SOL_SOCKET, SO_PEEK_OFF, &offset, sizeof(offset)))
		return -errno;
	do {
		n = recvmsg(in, &message, MSG_PEEK | MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	} while (n < 0 && errno == EINTR);
	if (n < 0)
		return errno == EAGAIN ? -ENODATA : -errno;
	if (!n)
		return -ENODATA; /* nobody can send any more */
	if (n != sizeof(*ret) || ret->magic != MAGIC || (message.msg_flags & MSG_TRUNC))
		return -EBADMSG;
	if (!ret_fd)
		return 0;
	c = CMSG_FIRSTHDR(&message);
	if (!c || c->cmsg_len != CMSG_LEN(sizeof(int)) || c->cmsg_type != SCM_RIGHTS)
		return message.msg_flags & MSG_CTRUNC ? -EMFILE : -EBADMSG;
	memcpy(ret_fd, CMSG_DATA(c), sizeof(int));
	return 0;
}

/* Its descriptor is closed with that, wherever nobody else has it. */
static void take_first_locked(struct box *box)
{
	while (recv(box->in, NULL, 0, MSG_DONTWAIT) < 0 && errno == EINTR)
		;
	box->first = (box->first + 1) % ITEMS;
	box->count--;
	box->full = false;
}

static int add_locked(struct gmem_boxes *boxes, struct box *box, uint32_t number, uint32_t generation, int fd)
{
	struct item item = { MAGIC, number, generation, 0 };
	int err = send_item(box->out, &item, fd);

	box->full = err == -EAGAIN;
	if (err)
		return err;
	*item_at(box, box->count++) = item;
	if (number != WRITER)
		boxes->box_of[number] = (uint32_t)(box - boxes->boxes) + 1;
	return 0;
}

/* ---- boxes ---- */

static bool has_room(const struct box *box)
{
	return box->ready && box->out >= 0 && !box->full && box->count <= GMEM_BOX_ROOM; /* one is its writer */
}

static void name_of(uint32_t n, char ret[16])
{
	snprintf(ret, 16, "b%u", n);
}

static uint32_t unused_place_locked(const struct gmem_boxes *boxes)
{
	uint32_t n = 0;

	while (n < boxes->box_max && boxes->boxes[n].taken)
		n++;
	return n;
}

/* One that a predecessor left, and that can't be used, must not be given up when the new one has its name. */
static void clear_name(struct gmem_boxes *boxes, const char *name)
{
	int fd = gmem_driver_kept_fd(&boxes->held, name);

	if (fd < 0)
		return;
	gmem_driver_drop_fd(&boxes->held, name);
	close(fd);
}

/* Held before it can be used, so without our lock: that of the keep comes before it. */
static int make_box(struct gmem_boxes *boxes)
{
	uint32_t n;
	char name[16];
	int pair[2], err;

	gmem_mutex_lock(&boxes->lock);
	n = unused_place_locked(boxes);
	if (n < boxes->box_max)
		boxes->boxes[n].taken = true;
	if (n < boxes->box_max && atomic_load(boxes->made) <= n)
		atomic_store(boxes->made, n + 1);
	gmem_mutex_unlock(&boxes->lock);
	if (n == boxes->box_max)
		return -ENFILE;
	name_of(n, name);
	clear_name(boxes, name);
	err = socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) ? -errno : 0;
	if (!err && (err = gmem_driver_keep_fd(&boxes->held, name, pair[1]))) {
		close(pair[0]);
		close(pair[1]);
	}
	gmem_mutex_lock(&boxes->lock);
	boxes->boxes[n] = (struct box){ .taken = !err, .ready = !err };
	if (!err) {
		boxes->boxes[n].in = pair[1];
		boxes->boxes[n].out = pair[0];
		err = add_locked(boxes, &boxes->boxes[n], WRITER, 0, pair[0]);
	}
	gmem_mutex_unlock(&boxes->lock);
	return err;
}

/* In any box with room. -EAGAIN: none has. */
static int put_locked(struct gmem_boxes *boxes, uint32_t number, uint32_t generation, int fd)
{
	uint32_t made = atomic_load(boxes->made);
	int err = -EAGAIN;

	for (uint32_t n = 0; err == -EAGAIN && n < made; n++)
		if (has_room(&boxes->boxes[n]))
			err = add_locked(boxes, &boxes->boxes[n], number, generation, fd);
	return err;
}

int gmem_boxes_put(struct gmem_boxes *boxes, uint32_t number, uint32_t generation, int fd)
{
	int err;

	for (bool made = false;; made = true) {
		gmem_mutex_lock(&boxes->lock);
		err = put_locked(boxes, number, generation, fd);
		gmem_mutex_unlock(&boxes->lock);
		if (err != -EAGAIN || made)
			break;
		err = make_box(boxes);
		if (err)
			break;
	}
	gmem_crash(GMEM_CRASH_BOX_PUT);
	return err;
}

static struct item *find_locked(struct gmem_boxes *boxes, uint32_t number, uint32_t *ret_place)
{
	struct box *box = boxes->box_of[number] ? &boxes->boxes[boxes->box_of[number] - 1] : NULL;

	for (uint32_t place = 0; box && place < box->count; place++) {
		struct item *item = item_at(box, place);

		if (item->number == number && !item->dead) {
			*ret_place = place;
			return item;
		}
	}
	return NULL;
}

int gmem_boxes_get(struct gmem_boxes *boxes, uint32_t number, int *ret_fd)
{
	struct item told;
	uint32_t place;
	int err = -ENOENT;

	gmem_mutex_lock(&boxes->lock);
	if (find_locked(boxes, number, &place))
		err = peek(boxes->boxes[boxes->box_of[number] - 1].in, place, &told, ret_fd);
	gmem_mutex_unlock(&boxes->lock);
	return err == -ENODATA ? -ENOENT : err;
}

/* ---- dropping ---- */

/* To the end of its box, or of another one if that takes no more. */
static int requeue_first_locked(struct gmem_boxes *boxes, struct box *box)
{
	struct item item = *item_at(box, 0), told;
	int fd, err = peek(box->in, 0, &told, &fd);

	if (err)
		return err;
	err = box->out >= 0 ? add_locked(boxes, box, item.number, item.generation, fd) : -EAGAIN;
	if (err && item.number == WRITER)
		err = 0; /* no room for it, which what is behind it needs now; a successor adds nothing to this box then */
	else if (err == -EAGAIN)
		err = put_locked(boxes, item.number, item.generation, fd);
	close(fd);
	if (err)
		return err;
	gmem_crash(GMEM_CRASH_BOX_REQUEUED);
	take_first_locked(box);
	return 0;
}

/* What can't be moved just now stays, and what is behind it: the next drop tries again. */
static int sweep_locked(struct gmem_boxes *boxes, struct box *box)
{
	int err = 0;

	while (!err && box->dead) {
		if (item_at(box, 0)->dead) {
			take_first_locked(box);
			box->dead--;
			gmem_crash(GMEM_CRASH_BOX_DROPPED);
		} else {
			err = requeue_first_locked(boxes, box);
		}
	}
	return err;
}

static bool sweep(struct gmem_boxes *boxes)
{
	bool no_room = false;

	gmem_mutex_lock(&boxes->lock);
	for (uint32_t n = 0; n < atomic_load(boxes->made); n++)
		no_room |= sweep_locked(boxes, &boxes->boxes[n]) == -EAGAIN;
	gmem_mutex_unlock(&boxes->lock);
	return !no_room;
}

void gmem_boxes_drop(struct gmem_boxes *boxes, const uint32_t *numbers, size_t count)
{
	gmem_mutex_lock(&boxes->lock);
	for (size_t i = 0; i < count; i++) {
		uint32_t place;
		struct item *item = find_locked(boxes, numbers[i], &place);

		if (!item)
			continue;
		item->dead = 1;
		boxes->boxes[boxes->box_of[numbers[i]] - 1].dead++;
		boxes->box_of[numbers[i]] = 0;
	}
	gmem_mutex_unlock(&boxes->lock);
	if (!sweep(boxes) && !make_box(boxes))
		sweep(boxes);
}

/* ---- a predecessor's ---- */

/* How many messages are in it; -EBADMSG: it is no box, or one of no use: empty, without a writer, as its maker was killed. */
static int count_items(const struct gmem_boxes *boxes, int in)
{
	int type = 0, err = 0, count = 0;
	socklen_t length = sizeof(type);
	struct item item;

	if (getsockopt(in, SOL_SOCKET, SO_TYPE, &type, &length) || type != SOCK_SEQPACKET)
		return -EBADMSG;
	while (!err && count < (int)ITEMS) {
		err = peek(in, (uint32_t)count, &item, NULL);
		if (!err && item.number != WRITER && item.number >= boxes->most)
			err = -EBADMSG;
		count += !err;
	}
	return err == -ENODATA && count ? count : -EBADMSG;
}

static void open_item(struct gmem_boxes *boxes, struct box *box, uint32_t place, gmem_box_fn fn, void *arg)
{
	struct item *item = item_at(box, place);
	int fd = -1, err = peek(box->in, place, item, &fd);
	bool stays = false;

	if (!err && item->number == WRITER && box->out < 0) {
		box->out = fd;
		fd = -1;
		stays = true;
	} else if (!err && item->number != WRITER && !boxes->box_of[item->number]) {
		stays = fn(item->number, item->generation, fd, arg);
		if (stays)
			boxes->box_of[item->number] = (uint32_t)(box - boxes->boxes) + 1;
	}
	if (fd >= 0)
		close(fd);
	item->dead = !stays;
	box->dead += !stays;
}

void gmem_boxes_open(struct gmem_boxes *boxes, gmem_box_fn fn, void *arg)
{
	for (uint32_t n = 0; n < atomic_load(boxes->made); n++) {
		struct box *box = &boxes->boxes[n];
		char name[16];
		int fd, count;

		name_of(n, name);
		fd = gmem_driver_kept_fd(&boxes->held, name);
		if (fd < 0)
			continue;
		count = count_items(boxes, fd);
		if (count < 0) {
			gmem_driver_drop_fd(&boxes->held, name);
			close(fd);
			continue;
		}
		*box = (struct box){ .taken = true, .ready = true, .in = fd, .out = -1 };
		while (box->count < (uint32_t)count)
			open_item(boxes, box, box->count++, fn, arg);
	}
	gmem_boxes_drop(boxes, NULL, 0); /* what does not stay */
}

/* ---- life ---- */

int gmem_boxes_create(struct gmem_driver_keep *keep, uint32_t most, _Atomic uint32_t *made, struct gmem_boxes **ret)
{
	struct gmem_boxes *boxes = calloc(1, sizeof(*boxes));

	if (!boxes)
		return -ENOMEM;
	boxes->held.keep = keep;
	boxes->most = most;
	boxes->made = made;
	boxes->box_max = 2 * (most / GMEM_BOX_ROOM + 1); /* some may have been left half empty */
	boxes->boxes = gmem_sparse_map(boxes->box_max * sizeof(*boxes->boxes));
	boxes->box_of = gmem_sparse_map(most * sizeof(*boxes->box_of));
	if (atomic_load(made) > boxes->box_max)
		atomic_store(made, boxes->box_max);
	if (!boxes->boxes || !boxes->box_of) {
		gmem_sparse_unmap(boxes->boxes, boxes->box_max * sizeof(*boxes->boxes));
		gmem_sparse_unmap(boxes->box_of, most * sizeof(*boxes->box_of));
		free(boxes);
		return -ENOMEM;
	}
	gmem_mutex_init(&boxes->lock, GMEM_RANK_BOXES);
	*ret = boxes;
	return 0;
}

void gmem_boxes_destroy(struct gmem_boxes *boxes)
{
	if (!boxes)
		return;
	for (uint32_t n = 0; n < atomic_load(boxes->made); n++) {
		if (boxes->boxes[n].ready)
			close(boxes->boxes[n].in);
		if (boxes->boxes[n].ready && boxes->boxes[n].out >= 0)
			close(boxes->boxes[n].out);
	}
	gmem_sparse_unmap(boxes->boxes, boxes->box_max * sizeof(*boxes->boxes));
	gmem_sparse_unmap(boxes->box_of, boxes->most * sizeof(*boxes->box_of));
	gmem_mutex_deinit(&boxes->lock);
	free(boxes);
}
