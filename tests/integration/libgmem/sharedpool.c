/* SPDX-License-Identifier: Apache-2.0
 *
 * sharedpool: a pool on the servers of the tier `far`, published and opened by one program, which may be on two machines.
 */
#include "check.h"

#define BYTES (1ul << 20)
#define WORDS (BYTES / sizeof(uint64_t))

static void publish(struct gmem *session, uint64_t first, uint64_t *ret_version)
{
	uint64_t *at;

	OK(gmem_pool_create(session, "c", BYTES, NULL, (void **)&at));
	for (size_t i = 0; i < WORDS; i++)
		at[i] = first + i;
	OK(gmem_pool_publish_remote(session, "c", "far", ret_version));
	OK(gmem_pool_unlink(session, "c"));
	OK(gmem_munmap(session, at, BYTES));
}

static void check_words(const uint64_t *at, uint64_t first)
{
	for (size_t i = 0; i < WORDS; i++)
		CHECK(at[i] == first + i);
}

int main(void)
{
	struct gmem_pool_options options = { .size = sizeof(options), .flags = GMEM_POOL_WRITE };
	uint64_t first, second, version = 0;
	struct gmem_range range, newer;
	struct gmem *session;

	OK(gmem_open(NULL, NULL, &session));
	REFUSED(gmem_pool_open_remote(session, "c", "far", NULL, &range, NULL), ENOENT, "name");
	REFUSED(gmem_pool_open_remote(session, "c", "near", NULL, &range, NULL), ENOENT, "remote");
	REFUSED(gmem_pool_open_remote(session, "c", NULL, NULL, &range, NULL), EINVAL, "remote");
	REFUSED(gmem_pool_open_remote(session, "c", "far", &options, &range, NULL), EINVAL, "flags");
	REFUSED(gmem_pool_publish_remote(session, "c", "far", NULL), ENOENT, "name");
	REFUSED(gmem_pool_publish_remote(session, "c", NULL, NULL), EINVAL, "remote");
	REFUSED(gmem_pool_unlink_remote(session, "c", "far"), ENOENT, "name");
	publish(session, 1000, &first);
	OK(gmem_pool_open_remote(session, "c", "far", NULL, &range, &version));
	CHECK(version == first && range.bytes == BYTES);
	check_words(range.va, 1000);
	publish(session, 5000, &second);
	CHECK(second > first);
	OK(gmem_pool_open_remote(session, "c", "far", NULL, &newer, &version));
	CHECK(version == second && newer.va != range.va);
	check_words(newer.va, 5000);
	check_words(range.va, 1000);
	OK(gmem_pool_open_remote(session, "c", "far", NULL, &range, NULL)); /* once more: where it is */
	CHECK(range.va == newer.va);
	OK(gmem_pool_unlink_remote(session, "c", "far"));
	REFUSED(gmem_pool_open_remote(session, "c", "far", NULL, &range, NULL), ENOENT, "name");
	check_words(newer.va, 5000);
	OK(gmem_close(session));
	return 0;
}
