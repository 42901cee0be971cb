/* SPDX-License-Identifier: Apache-2.0
 *
 * A tier by itself, through its driver's ops: what the tests of the file, zstd and remote tiers have in common.
 */
#ifndef TIEROPS_H
#define TIEROPS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <gmem/driver.h>
#include <gmem/keep.h>

#define KIB4 4096ul
#define KIB64 65536ul
#define MIB2 (2ul << 20)

extern const struct gmem_driver_ops *tier_ops; /* of the driver that the test is about */
extern char tier_message[GMEM_MESSAGE_MAX];    /* why the last attach was refused */

/* options: "capacity=8M replicas=1". What the probe says. */
int tier_attach(const char *options, uint64_t key_count, struct gmem_driver_keep *keep, struct gmem_device **ret);
/* The same, and the test ends if it is refused. */
struct gmem_device *tier_attached(const char *options, uint64_t key_count, struct gmem_driver_keep *keep);
/* That it is refused with err, for a reason that contains why. */
void tier_refused(const char *options, uint64_t key_count, int err, const char *why);
/* That a sentence about something contains why. */
void tier_says(const char *about, const char *sentence, const char *why);

/* Words that nothing compresses, of a key and a version. */
void tier_fill(void *at, size_t bytes, uint64_t key, uint64_t version);
bool tier_is_filled(const void *at, size_t bytes, uint64_t key, uint64_t version);
struct gmem_device_usage tier_usage(struct gmem_device *device);

/* What outlives a tier, and who holds it. */
struct tier_held {
	struct gmem_keep keep;
	struct gmem_driver_keep driver; /* for its attach */
	int manager;
};

/* left: what one before had held; the descriptors are taken over. */
void tier_hold(struct tier_held *held, const struct gmem_kept_fd *left, size_t count);
/* What has been held since; the caller's. */
size_t tier_held_fds(struct tier_held *held, struct gmem_kept_fd *ret);
void tier_let_go(struct tier_held *held);

#endif
