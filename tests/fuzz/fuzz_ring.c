/* SPDX-License-Identifier: Apache-2.0
 *
 * libFuzzer: whatever a client writes into its ring, another client's is served, and nothing is left of the session.
 *
 * Input: one byte of how (bit 0: the queue's indices are wild, too; bit 1: the bell rings; bit 2: addresses are moved
 * into the window; bit 3: written twice, while it is being read), two 32-bit indices, then entries.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <gmem/core.h>
#include <gmem_wire.h>

#define PATIENCE_MS 20000
#define MMAP_BYTES_MAX (1ull << 20)
#define MUST(cond)                                                                                                     \
	do {                                                                                                           \
		if (!(cond)) {                                                                                         \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #cond);                                     \
			abort();                                                                                       \
		}                                                                                                      \
	} while (0)

struct ring {
	uint64_t session;
	struct gmem_ring_shared *shared;
	struct gmem_ring_sqe *sq;
	int bell;
};

static struct gmem_core *core;
static struct gmem_window window;
static struct ring honest;

static void pause_ms(long ms)
{
	const struct timespec t = { 0, ms * 1000000 };

	nanosleep(&t, NULL);
}

static struct ring ring_open(void)
{
	struct ring ring;
	int fds[2];

	MUST(!gmem_session_create(core, getuid(), getpid(), &ring.session));
	MUST(!gmem_session_ring(core, ring.session, fds));
	ring.shared = mmap(NULL, GMEM_RING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fds[0], 0);
	MUST(ring.shared != MAP_FAILED);
	ring.sq = (struct gmem_ring_sqe *)((char *)ring.shared + ring.shared->sq_offset);
	ring.bell = dup(fds[1]);
	return ring;
}

static void ring_close(struct ring *ring)
{
	MUST(!gmem_session_destroy(core, ring->session));
	munmap(ring->shared, GMEM_RING_BYTES);
	close(ring->bell);
}

static void honest_is_served(void)
{
	struct gmem_ring_shared *s = honest.shared;
	uint32_t tail = s->sq_tail;

	honest.sq[tail % GMEM_RING_SQ_ENTRIES] = (struct gmem_ring_sqe){ .op = GMEM_RING_NOP };
	__atomic_store_n(&s->sq_tail, tail + 1, __ATOMIC_SEQ_CST);
	eventfd_write(honest.bell, 1);
	for (int ms = 0; __atomic_load_n(&s->cq_tail, __ATOMIC_ACQUIRE) != tail + 1; ms++) {
		MUST(ms < PATIENCE_MS);
		pause_ms(1);
	}
	__atomic_store_n(&s->cq_head, tail + 1, __ATOMIC_SEQ_CST);
}

static void write_entries(struct ring *ring, const uint8_t *data, size_t size, int how)
{
	size_t count = size / sizeof(struct gmem_ring_sqe);

	if (count > GMEM_RING_SQ_ENTRIES)
		count = GMEM_RING_SQ_ENTRIES;
	for (size_t i = 0; i < count; i++) {
		struct gmem_ring_sqe sqe;

		memcpy(&sqe, data + i * sizeof(sqe), sizeof(sqe));
		if (how & 4) {
			sqe.op %= GMEM_RING_OP_COUNT + 1;
			sqe.va = window.base + sqe.va % window.bytes;
		}
		if (sqe.op == GMEM_RING_MMAP) /* what it may have is a matter of quotas, and not of this */
			sqe.bytes %= MMAP_BYTES_MAX;
		ring->sq[i] = sqe;
	}
}

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	const struct gmem_core_config config = {
		.feature_mask = ~0ull, .host_limit_bytes = 64 << 20, .fault_threads = 1,
#ifdef __SANITIZE_ADDRESS__
		.window_base = 0x7e9000000000, .window_bytes = 256ull << 30,
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
		.window_base = 0x7e9000000000, .window_bytes = 256ull << 30,
#endif
#endif
	};

	(void)argc, (void)argv;
	MUST(!gmem_core_create(&config, &core));
	gmem_core_window(core, &window);
	honest = ring_open();
	return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	uint32_t indices[2] = { 0, 0 };
	struct gmem_core_stats stats;
	struct ring ring;
	int how;

	if (size < 1 + sizeof(indices))
		return 0;
	how = data[0];
	memcpy(indices, data + 1, sizeof(indices));
	data += 1 + sizeof(indices);
	size -= 1 + sizeof(indices);
	ring = ring_open();
	write_entries(&ring, data, size, how);
	if (how & 1) {
		ring.shared->cq_head = indices[1];
		ring.shared->client_waits = indices[1];
	}
	__atomic_store_n(&ring.shared->sq_tail,
			 how & 1 ? indices[0] : (uint32_t)(size / sizeof(struct gmem_ring_sqe)) % GMEM_RING_SQ_ENTRIES,
			 __ATOMIC_SEQ_CST);
	if (how & 2)
		eventfd_write(ring.bell, 1);
	if (how & 8)
		write_entries(&ring, data, size, how ^ 4);
	honest_is_served();
	ring_close(&ring);
	gmem_core_stats(core, &stats);
	MUST(stats.sessions == 1);
	return 0;
}
