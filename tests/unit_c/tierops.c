/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "tierops.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "harness.h"

#define OPTIONS_MAX 20

const struct gmem_driver_ops *tier_ops;
char tier_message[GMEM_MESSAGE_MAX];

int tier_attach(const char *options, uint64_t key_count, struct gmem_driver_keep *keep, struct gmem_device **ret)
{
	char *text = strdup(options), *save = NULL;
	const char *keys[OPTIONS_MAX], *values[OPTIONS_MAX];
	struct gmem_driver_config config = { .name = "tier", .keys = keys, .values = values, .message = tier_message,
					     .key_count = key_count, .keep = keep };
	int err;

	tier_message[0] = '\0';
	for (char *word = strtok_r(text, " ", &save); word; word = strtok_r(NULL, " ", &save)) {
		char *equals = strchr(word, '=');

		CHECK(equals && config.count < OPTIONS_MAX);
		*equals = '\0';
		keys[config.count] = word;
		values[config.count++] = equals + 1;
	}
	err = tier_ops->probe(&config, ret);
	free(text);
	return err;
}

struct gmem_device *tier_attached(const char *options, uint64_t key_count, struct gmem_driver_keep *keep)
{
	struct gmem_device *device;

	if (tier_attach(options, key_count, keep, &device)) {
		fprintf(stderr, "%s: %s\n", options, tier_message);
		exit(1);
	}
	return device;
}

void tier_refused(const char *options, uint64_t key_count, int err, const char *why)
{
	struct gmem_device *device;

	CHECK_EQ(tier_attach(options, key_count, NULL, &device), err);
	tier_says(options, tier_message, why);
}

void tier_says(const char *about, const char *sentence, const char *why)
{
	if (strstr(sentence, why))
		return;
	fprintf(stderr, "%s: \"%s\" does not say \"%s\"\n", about, sentence, why);
	exit(1);
}

void tier_fill(void *at, size_t bytes, uint64_t key, uint64_t version)
{
	uint64_t *words = at, x = key * 0x9e3779b97f4a7c15ull + version * 0xbf58476d1ce4e5b9ull + 1;

	for (size_t i = 0; i < bytes / 8; i++) {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		words[i] = x;
	}
}

bool tier_is_filled(const void *at, size_t bytes, uint64_t key, uint64_t version)
{
	uint64_t *expected = malloc(bytes);
	bool same;

	CHECK(expected);
	tier_fill(expected, bytes, key, version);
	same = !memcmp(at, expected, bytes);
	free(expected);
	return same;
}

struct gmem_device_usage tier_usage(struct gmem_device *device)
{
	struct gmem_device_usage ret;

	CHECK_EQ(tier_ops->peer_usage(device, &ret), 0);
	return ret;
}

void tier_hold(struct tier_held *held, const struct gmem_kept_fd *left, size_t count)
{
	int pair[2];

	CHECK_EQ(socketpair(AF_UNIX, SOCK_DGRAM, 0, pair), 0);
	CHECK_EQ(gmem_keep_init(&held->keep, pair[0], 100, left, count), 0);
	gmem_driver_keep_init(&held->driver, &held->keep, 3);
	held->manager = pair[1];
}

size_t tier_held_fds(struct tier_held *held, struct gmem_kept_fd *ret)
{
	size_t count = 0;

	for (;;) {
		union { struct cmsghdr head; char room[CMSG_SPACE(sizeof(int))]; } control;
		char text[256] = { 0 }, *name;
		struct iovec part = { text, sizeof(text) - 1 };
		struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
					  .msg_controllen = sizeof(control) };

		if (recvmsg(held->manager, &message, MSG_DONTWAIT) < 0)
			return count;
		name = strstr(text, "FDNAME=");
		CHECK(strstr(text, "FDSTORE=1") && name);
		name += strlen("FDNAME=");
		*strchrnul(name, '\n') = '\0';
		snprintf(ret[count].name, sizeof(ret[count].name), "%s", name);
		memcpy(&ret[count++].fd, CMSG_DATA(&control.head), sizeof(int));
	}
}

void tier_let_go(struct tier_held *held)
{
	close(held->manager);
	gmem_driver_keep_deinit(&held->driver);
	gmem_keep_deinit(&held->keep);
}
