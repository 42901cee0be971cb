/* SPDX-License-Identifier: Apache-2.0
 *
 * Frozen memory: one moment of it can be read at leisure, while a writer waits and pages move; afterwards it goes on.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <unistd.h>

#include "harness.h"

#define PAGES 6
#define ROUNDS 8
#define DEVICE 1

struct side {
	uint8_t *data;
	uint64_t page_bytes;
	_Atomic uint64_t count;
	_Atomic bool stop, wrote_fresh;
	_Atomic uint64_t *fresh;
};

/* ThreadSanitizer's own atomics hold a lock of the word's over the access: who waits in a store that faults, until the thaw,
 * would keep those from it who read the same word before that. */
__attribute__((no_sanitize("thread"), noinline)) static void put(_Atomic uint64_t *at, uint64_t value)
{
	atomic_store(at, value);
}

__attribute__((no_sanitize("thread"), noinline)) static uint64_t get(const _Atomic uint64_t *at)
{
	return atomic_load(at);
}

static _Atomic uint64_t *word(const struct side *side, int page)
{
	return (_Atomic uint64_t *)(side->data + (uint64_t)page * side->page_bytes);
}

/* In one page after the other: at every moment the first is as far as the last, or one ahead. */
static void *count(void *arg)
{
	struct side *side = arg;

	for (uint64_t n = 1; !side->stop; n++) {
		for (int i = 0; i < PAGES; i++)
			put(word(side, i), n);
		side->count = n;
	}
	return NULL;
}

static void *write_fresh(void *arg)
{
	struct side *side = arg;

	put(side->fresh, 1);
	side->wrote_fresh = true;
	return NULL;
}

static void look(const struct side *side, uint64_t *ret)
{
	for (int i = 0; i < PAGES; i++)
		ret[i] = get(word(side, i));
}

static void check_one_moment(const uint64_t *words)
{
	for (int i = 1; i < PAGES; i++)
		CHECK(words[i] <= words[i - 1] && words[i] + 1 >= words[0]);
}

static void freeze_once(struct client *client, struct side *side)
{
	uint64_t bytes = PAGES * side->page_bytes, before[PAGES], after[PAGES], counted = side->count;

	while (side->count == counted)
		sleep_ms(1); /* it counts */
	CHECK_EQ(client_advise(client, -1, side->data, bytes, GMEM_ADVISE_FREEZE), 0);
	look(side, before);
	check_one_moment(before);
	client_prefetch(client, DEVICE, side->data, 2 * side->page_bytes); /* it may be refused, but not write */
	sleep_ms(2);
	look(side, after);
	CHECK(!memcmp(before, after, sizeof(before)));
	CHECK_EQ(client_discard(client, side->data, bytes), -EAGAIN);
	CHECK_EQ(client_hmemcpy(client, 0, side->data, side->data + side->page_bytes, 64), -EBUSY);
	look(side, after);
	CHECK(!memcmp(before, after, sizeof(before)));
	CHECK_EQ(client_advise(client, -1, side->data, bytes, GMEM_ADVISE_THAW), 0);
}

static void first_touch(struct client *client, struct side *side)
{
	pthread_t thread;
	void *at = client_mmap(client, side->page_bytes, side->page_bytes, GMEM_FORK_SHARE);

	side->fresh = at;
	CHECK_EQ(client_advise(client, -1, at, side->page_bytes, GMEM_ADVISE_FREEZE), 0);
	CHECK(!pthread_create(&thread, NULL, write_fresh, side));
	sleep_ms(5);
	CHECK_EQ(get(side->fresh), 0); /* a read is served */
	CHECK(!side->wrote_fresh);
	CHECK_EQ(client_advise(client, -1, at, side->page_bytes, GMEM_ADVISE_THAW), 0);
	CHECK(!pthread_join(thread, NULL));
	CHECK_EQ(get(side->fresh), 1);
}

static int use(struct client *client, void *arg)
{
	struct side side = { .page_bytes = (uint64_t)(uintptr_t)arg };
	pthread_t thread;

	side.data = client_mmap(client, PAGES * side.page_bytes, side.page_bytes, GMEM_FORK_SHARE);
	CHECK(!pthread_create(&thread, NULL, count, &side));
	for (int i = 0; i < ROUNDS; i++)
		freeze_once(client, &side);
	side.stop = true;
	CHECK(!pthread_join(thread, NULL));
	first_touch(client, &side);
	CHECK_EQ(client_advise(client, -1, side.data, side.page_bytes, GMEM_ADVISE_FREEZE), 0);
	return 0; /* ends so */
}

int main(void)
{
	static const uint64_t sizes[] = { 4096, 65536, 2 << 20 };

	hugepages_reserve(32);
	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
		struct gmem_core *core = core_start((struct gmem_core_config){ .event_fork = true, .hugepages = true });

		CHECK_EQ(attach_simgpu(core, "simgpu0", "capacity=8M"), DEVICE);
		CHECK_EQ(client_wait(client_start(core, use, (void *)(uintptr_t)sizes[i])), 0);
		core_settle(core);
		gmem_core_destroy(core);
	}
	printf("freeze: ok\n");
	return 0;
}
