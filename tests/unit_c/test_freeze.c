/* SPDX-License-Identifier: Apache-2.0
 *
 * Frozen memory: one moment of it can be read at leisure, while a writer waits and pages move; afterwards it goes on. So
 * it does if it could not be frozen.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <unistd.h>

#include <gmem/session.h>

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

/* ---- what fails leaves nothing frozen ---- */

#define STRANGER 999999ull /* a session that has frozen the middle one */
enum { BEGIN, FROZEN_BY_OTHER, DONE_WITH_OTHER, FREE };

struct three {
	uint8_t *at[3]; /* regions side by side */
	uint64_t page_bytes;
};

static _Atomic int *step;
static _Atomic uint64_t *middle;

static void await(int wanted)
{
	while (*step != wanted)
		sleep_ms(1);
}

/* Writes to the first and the last one. */
static void *write_around(void *arg)
{
	struct side *side = arg;

	while (!side->stop) {
		uint64_t n = side->count + 1;

		*word(side, 0) = n;
		*word(side, 2) = n;
		side->count = n;
	}
	return NULL;
}

static void check_it_goes_on(struct side *side)
{
	uint64_t counted = side->count;

	for (int i = 0; side->count < counted + 2; i++) {
		CHECK(i < 5000);
		sleep_ms(1);
	}
}

static void map_three(struct client *client, struct three *ret)
{
	for (int i = 0; i < 3; i++) {
		ret->at[i] = client_mmap(client, ret->page_bytes, ret->page_bytes, GMEM_FORK_SHARE);
		CHECK(!i || ret->at[i] == ret->at[i - 1] + ret->page_bytes);
	}
}

static int fail(struct client *client, void *arg)
{
	struct three three = { .page_bytes = (uint64_t)(uintptr_t)arg };
	uint64_t bytes = 3 * three.page_bytes;
	struct side side = { .page_bytes = three.page_bytes };
	pthread_t thread;

	map_three(client, &three);
	side.data = three.at[0];
	CHECK(!pthread_create(&thread, NULL, write_around, &side));
	check_it_goes_on(&side);
	*middle = (uint64_t)(uintptr_t)three.at[1];
	*step = FROZEN_BY_OTHER;
	await(DONE_WITH_OTHER);
	for (int i = 0; i < ROUNDS; i++) {
		CHECK_EQ(client_advise(client, -1, three.at[0], bytes, GMEM_ADVISE_FREEZE), -EBUSY);
		CHECK_EQ(client_discard(client, three.at[0], three.page_bytes), 0); /* of what is frozen: -EAGAIN */
		check_it_goes_on(&side);
	}
	*step = FREE;
	await(BEGIN);
	/* what is unmapped meanwhile does not keep the rest frozen */
	CHECK_EQ(client_advise(client, -1, three.at[0], bytes, GMEM_ADVISE_FREEZE), 0);
	CHECK_EQ(client_munmap(client, three.at[1], three.page_bytes), 0);
	CHECK_EQ(client_advise(client, -1, three.at[0], bytes, GMEM_ADVISE_FREEZE), -EINVAL);
	CHECK_EQ(client_advise(client, -1, three.at[0], bytes, GMEM_ADVISE_THAW), 0);
	check_it_goes_on(&side);
	side.stop = true;
	CHECK(!pthread_join(thread, NULL));
	return 0;
}

static void set_frozen_by(struct client *client, uint64_t by)
{
	struct gmem_session *session = gmem_session_get(client->core, client->session);
	struct gmem_place place;

	CHECK(session && !gmem_as_lookup(&session->as, *middle, &place));
	atomic_store(&place.object->frozen_by, by);
	gmem_object_unref(place.object);
	gmem_session_unref(session);
}

static void test_fails(struct gmem_core *core, uint64_t page_bytes)
{
	struct client *client;

	*step = BEGIN;
	client = client_start(core, fail, (void *)(uintptr_t)page_bytes);
	await(FROZEN_BY_OTHER);
	set_frozen_by(client, STRANGER);
	*step = DONE_WITH_OTHER;
	await(FREE);
	set_frozen_by(client, 0);
	*step = BEGIN;
	CHECK_EQ(client_wait(client), 0);
}

int main(void)
{
	static const uint64_t sizes[] = { 4096, 65536, 2 << 20 };

	hugepages_reserve(32);
	step = shared_bytes(4096);
	middle = (_Atomic uint64_t *)(void *)(step + 2);
	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
		struct gmem_core *core = core_start((struct gmem_core_config){ .event_fork = true, .hugepages = true });

		CHECK_EQ(attach_simgpu(core, "simgpu0", "capacity=8M"), DEVICE);
		CHECK_EQ(client_wait(client_start(core, use, (void *)(uintptr_t)sizes[i])), 0);
		test_fails(core, sizes[i]);
		core_settle(core);
		gmem_core_destroy(core);
	}
	printf("freeze: ok\n");
	return 0;
}
