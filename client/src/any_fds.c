/* SPDX-License-Identifier: Apache-2.0
 *
 * gmem's own descriptors in a program that knows nothing of them. They are moved to high numbers, out of the way of what
 * is opened next; closing them (daemons and children close whatever they find) fails as if they were not open; who wants
 * one of their numbers gets it, and they move again.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <sys/resource.h>
#include <unistd.h>

#include "any.h"
#include "interpose.h"
#include "ring.h"
#include "session.h"
#include "syscalls.h"

#define PLACE_MOST 1024 /* a table of descriptors is as long as its highest number */
#define PLACE_ROOM 64

static struct {
	int (*close)(int fd);
	int (*close_range)(unsigned first, unsigned last, int flags);
	int (*dup2)(int from, int to);
	int (*dup3)(int from, int to, int flags);
} next;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of moving them */
static pid_t owner;                                       /* a child of vfork() has other descriptors, and our memory */
static int lowest = INT_MAX;                              /* of ours */

__attribute__((constructor(101))) static void find_next(void)
{
	gmem_find_next("close", &next.close);
	gmem_find_next("close_range", &next.close_range);
	gmem_find_next("dup2", &next.dup2);
	gmem_find_next("dup3", &next.dup3);
}

/* The place of our descriptor number i; NULL behind the last. */
static int *ours(int i)
{
	struct gmem_link *link = gmem_any.session->link;
	int *const places[] = { &link->sock, &link->uffd, &link->uffd_dev, &link->files[0], &link->files[1],
				gmem_ring_bell(link->ring) };
	const int count = sizeof(places) / sizeof(places[0]);

	return i < count ? places[i] : gmem_any_fork_fd(i - count);
}

static int *find(int fd)
{
	int *place;

	if (fd < lowest)
		return NULL;
	for (int i = 0; (place = ours(i)); i++)
		if (*place == fd)
			return place;
	return NULL;
}

/* To a number of at least `least`; it stays where it is if there is none. */
static void move(int *place, int least)
{
	int before = *place, to = before < 0 ? -1 : fcntl(before, F_DUPFD_CLOEXEC, least);

	if (to < 0)
		return;
	*place = to;
	gmem_sys(SYS_close, before, 0, 0, 0, 0, 0);
}

static int high_place(void)
{
	struct rlimit limit;

	if (getrlimit(RLIMIT_NOFILE, &limit) || limit.rlim_cur > PLACE_MOST)
		limit.rlim_cur = PLACE_MOST;
	return limit.rlim_cur > 2 * PLACE_ROOM ? (int)limit.rlim_cur - PLACE_ROOM : PLACE_ROOM / 2;
}

void gmem_any_hide_fds(void)
{
	int least = high_place(), *place;

	pthread_mutex_lock(&lock);
	owner = getpid();
	lowest = INT_MAX;
	for (int i = 0; (place = ours(i)); i++) {
		if (*place >= 0 && *place < least)
			move(place, least);
		if (*place >= 0 && *place < lowest)
			lowest = *place;
	}
	pthread_mutex_unlock(&lock);
}

void gmem_any_lock_fds(void)
{
	pthread_mutex_lock(&lock);
}

void gmem_any_unlock_fds(void)
{
	pthread_mutex_unlock(&lock);
}

static bool is_ours(int fd)
{
	return LIKELY_NOT(fd >= lowest) && gmem_any_is_managed() && !gmem_inside && find(fd);
}

int in_close(int fd) IN_PLACE_OF("close");
int in_close(int fd)
{
	if (is_ours(fd)) {
		errno = EBADF;
		return -1;
	}
	return next.close ? next.close(fd) : (int)gmem_sys(SYS_close, fd, 0, 0, 0, 0, 0);
}

static int close_between(unsigned first, unsigned last, int flags)
{
	if (first > last)
		return 0;
	if (next.close_range)
		return next.close_range(first, last, flags);
	return (int)gmem_sys(SYS_close_range, first, last, flags, 0, 0, 0);
}

/* What lies between ours. */
int gmem_any_close_range(unsigned first, unsigned last, int flags)
{
	int err = 0;

	if (!gmem_any_is_managed() || gmem_inside || first > last)
		return next.close_range ? next.close_range(first, last, flags) :
					  (int)gmem_sys(SYS_close_range, first, last, flags, 0, 0, 0);
	while (!err && first <= last) {
		unsigned stop = last;
		bool found = false;
		int *place;

		for (int i = 0; (place = ours(i)); i++)
			if (*place >= 0 && (unsigned)*place >= first && (unsigned)*place <= stop) {
				stop = (unsigned)*place;
				found = true;
			}
		err = found ? stop > first && close_between(first, stop - 1, flags) : close_between(first, last, flags);
		if (!found || stop == UINT_MAX)
			break;
		first = stop + 1;
	}
	return err ? -1 : 0;
}

int in_close_range(unsigned first, unsigned last, int flags) IN_PLACE_OF("close_range");
int in_close_range(unsigned first, unsigned last, int flags)
{
	return gmem_any_close_range(first, last, flags);
}

void in_closefrom(int low) IN_PLACE_OF("closefrom");
void in_closefrom(int low)
{
	gmem_any_close_range(low < 0 ? 0 : (unsigned)low, UINT_MAX, 0);
}

/* In a vfork()'s child the number is free to be taken: ours close with its exec. */
static void give_way(int fd)
{
	struct gmem_visit visit;
	int *place;

	if (!is_ours(fd) || getpid() != owner || !gmem_enter(&visit))
		return;
	pthread_mutex_lock(&lock);
	place = find(fd);
	if (place)
		move(place, fd + 1);
	pthread_mutex_unlock(&lock);
	gmem_leave(&visit);
}

int in_dup2(int from, int to) IN_PLACE_OF("dup2");
int in_dup2(int from, int to)
{
	give_way(to);
	return next.dup2 ? next.dup2(from, to) : (int)gmem_sys(SYS_dup3, from, to, 0, 0, 0, 0);
}

int in_dup3(int from, int to, int flags) IN_PLACE_OF("dup3");
int in_dup3(int from, int to, int flags)
{
	give_way(to);
	return next.dup3 ? next.dup3(from, to, flags) : (int)gmem_sys(SYS_dup3, from, to, flags, 0, 0, 0);
}
