/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "fdstore.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "harness.h"

static char crash_file[] = "/tmp/gmem-crash-XXXXXX";

void crash_open(void)
{
	int fd = mkstemp(crash_file);

	CHECK(fd >= 0);
	close(fd);
	CHECK(!setenv("GMEM_CRASH_FILE", crash_file, 1));
}

void crash_at(const char *point, int passes)
{
	FILE *file = fopen(crash_file, "w");

	CHECK(file);
	if (point)
		fprintf(file, "%s:%d\n", point, passes);
	fclose(file);
}

void crash_close(void)
{
	unlink(crash_file);
}

void fdstore_open(struct fdstore *store)
{
	int pair[2];

	*store = (struct fdstore){ .count = 0 };
	CHECK(!socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0, pair));
	store->ours = pair[0];
	store->daemons = pair[1];
}

void fdstore_close(struct fdstore *store)
{
	fdstore_take_all(store);
	for (size_t i = 0; i < store->count; i++)
		close(store->kept[i].fd);
	close(store->ours);
	close(store->daemons);
}

static size_t place_of(const struct fdstore *store, const char *name)
{
	size_t i = 0;

	while (i < store->count && strcmp(store->kept[i].name, name))
		i++;
	return i;
}

int fdstore_find(const struct fdstore *store, const char *name)
{
	size_t i = place_of(store, name);

	return i < store->count ? store->kept[i].fd : -1;
}

void fdstore_forget(struct fdstore *store, const char *name)
{
	size_t i;

	while ((i = place_of(store, name)) < store->count) {
		close(store->kept[i].fd);
		store->kept[i] = store->kept[--store->count];
	}
}

static void hold(struct fdstore *store, const char *name, int fd)
{
	CHECK(store->count < FDSTORE_MAX && name[0]);
	strcpy(store->kept[store->count].name, name);
	store->kept[store->count++].fd = fd;
}

void fdstore_replace(struct fdstore *store, const char *name, int fd)
{
	fdstore_forget(store, name);
	hold(store, name, fd);
}

bool fdstore_take(struct fdstore *store)
{
	char text[256] = "", name[GMEM_KEEP_NAME] = "";
	union {
		struct cmsghdr head;
		char room[CMSG_SPACE(sizeof(int))];
	} control = { 0 };
	struct iovec part = { text, sizeof(text) - 1 };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
				  .msg_controllen = sizeof(control) };
	struct cmsghdr *c;
	const char *at;
	int fd;

	if (recvmsg(store->ours, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC) <= 0)
		return false;
	at = strstr(text, "FDNAME=");
	if (at)
		sscanf(at, "FDNAME=%63[^\n]", name);
	if (strstr(text, "FDSTOREREMOVE=1"))
		fdstore_forget(store, name);
	c = CMSG_FIRSTHDR(&message);
	if (c) {
		memcpy(&fd, CMSG_DATA(c), sizeof(fd));
		hold(store, name, fd);
	}
	return true;
}

void fdstore_take_all(struct fdstore *store)
{
	while (fdstore_take(store))
		;
}

void fdstore_copy(const struct fdstore *store, struct gmem_kept_fd *ret)
{
	for (size_t i = 0; i < store->count; i++) {
		ret[i] = store->kept[i];
		ret[i].fd = fcntl(store->kept[i].fd, F_DUPFD_CLOEXEC, 0);
		CHECK(ret[i].fd >= 0);
	}
}
