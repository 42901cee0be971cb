/* SPDX-License-Identifier: Apache-2.0
 *
 * Streams: order, errors that are asked for later, many at a time.
 */
#include "compat.h"

#include <pthread.h>

#define PAGES 3
#define ROUNDS 60

static int hnid;

static void order(void)
{
	uint8_t *data = peer_memory(PAGES * PAGE);
	void *stream = &data;

	for (int round = 1; round <= ROUNDS; round++) {
		memset(data, round, PAGES * PAGE);
		CHECK(!gmemPrefetch(number(data), PAGES * PAGE, hnid, stream));
		CHECK(!gmemFreeEager(number(data) + PAGE, PAGE, stream));
		CHECK(!gmemPrefetch(number(data), PAGES * PAGE, 0, stream));
		CHECK(!gmemStreamSynchronize(stream));
		CHECK(all(data, PAGE, (uint8_t)round) && all(data + 2 * PAGE, PAGE, (uint8_t)round));
		CHECK(all(data + PAGE, PAGE, 0)); /* dropped between the two */
	}
	CHECK(!munmap(data, PAGES * PAGE));
}

static void errors(void)
{
	uint8_t *data = peer_memory(PAGE);
	int one, another;

	CHECK(!gmemStreamSynchronize(&one)); /* nothing was done on it */
	CHECK(!gmemStreamSynchronize(NULL));
	CHECK(!gmemPrefetch(number(data), PAGE, 99, &one)); /* only gmemd knows that there is no such hnode */
	CHECK(!gmemPrefetch(number(data), PAGE, hnid, &one));
	CHECK(!gmemPrefetch(number(data), PAGE, hnid, &another));
	CHECK(!gmemStreamSynchronize(&another));
	errno = 0;
	GIVES(gmemStreamSynchronize(&one), EINVAL);
	CHECK(errno == EINVAL);
	CHECK(!gmemStreamSynchronize(&one)); /* told once */
	/* what is wrong by itself is told at once */
	GIVES(gmemPrefetch(number(data), 2 * PAGE, hnid, &one), EINVAL);
	GIVES(gmemPrefetch(number(data), PAGE, -1, &one), EINVAL);
	GIVES(gmemFreeEager(~0ul, 2, &one), EINVAL);
	CHECK(!gmemFreeEager(number(data), 2, &one));
	CHECK(!gmemStreamSynchronize(&one));
	/* unmapped before its turn comes, or after: an error or none, and no harm */
	CHECK(!gmemPrefetch(number(data), PAGE, hnid, &one));
	CHECK(!munmap(data, PAGE));
	gmemStreamSynchronize(&one);
	CHECK(!gmemStreamSynchronize(&one));
}

static void *use(void *stream)
{
	uint8_t *data = peer_memory(PAGE);

	for (int round = 1; round <= ROUNDS; round++) {
		memset(data, round, PAGE);
		CHECK(!gmemPrefetch(number(data), PAGE, hnid, stream));
		if (round % 7 == 0)
			CHECK(!gmemPrefetch(number(data), PAGE, 99, stream));
		if (round % 3 == 0)
			CHECK(!gmemFreeEager(number(data), PAGE, stream));
		GIVES(gmemStreamSynchronize(stream), round % 7 == 0 ? EINVAL : 0);
		CHECK(all(data, PAGE, round % 3 == 0 ? 0 : (uint8_t)round));
	}
	CHECK(!munmap(data, PAGE));
	return NULL;
}

static void many(void)
{
	enum { THREADS = 6 };
	pthread_t threads[THREADS];

	for (uintptr_t i = 0; i < THREADS; i++)
		CHECK(!pthread_create(&threads[i], NULL, use, (void *)((i + 1) * 64)));
	for (int i = 0; i < THREADS; i++)
		CHECK(!pthread_join(threads[i], NULL));
}

int main(void)
{
	hnid = gmemGetNumaId();
	CHECK(hnid > 0);
	order();
	errors();
	many();
	return 0;
}
