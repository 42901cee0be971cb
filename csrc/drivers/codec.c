/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <gmem/stats.h>

#include "codec.h"

#define POOL 64 /* more threads at a time than this make workers and end them */
#define BUFFER_BYTES GMEM_HUGE_BYTES
#define WORKER_BYTES (2 * BUFFER_BYTES + 4096)
#define ZSTD_LEVEL 100 /* ZSTD_c_compressionLevel of ZSTD_cParameter; part of the stable API */

/* Both libraries' ABIs are stable: these are the prototypes of zstd.h 1.4 and lz4.h 1.9. */
struct zstd {
	void *(*create_compress)(void);
	size_t (*free_compress)(void *);
	size_t (*set_parameter)(void *, int, int);
	size_t (*compress)(void *, void *, size_t, const void *, size_t);
	void *(*create_decompress)(void);
	size_t (*free_decompress)(void *);
	size_t (*decompress)(void *, void *, size_t, const void *, size_t);
	unsigned (*is_error)(size_t);
};
struct lz4 {
	int (*state_bytes)(void);
	int (*compress)(void *, const char *, char *, int, int, int);
	int (*decompress)(const char *, char *, int, int);
};

struct gmem_codec {
	enum gmem_algorithm algorithm; /* (C) */
	int level;                     /* (C) */
	void *library;                 /* (C) */
	union {
		struct zstd zstd;
		struct lz4 lz4;
	};                             /* (C) */
	_Atomic(struct gmem_codec_worker *) pool[POOL]; /* (A) taken and given back by exchange */
};

static const struct {
	const char *library, *package;
	struct {
		const char *name;
		size_t offset;
	} functions[9];
} algorithms[GMEM_ALGORITHM_COUNT] = {
	[GMEM_ALGORITHM_ZSTD] = { "libzstd.so.1", "libzstd1", {
		{ "ZSTD_createCCtx", offsetof(struct gmem_codec, zstd.create_compress) },
		{ "ZSTD_freeCCtx", offsetof(struct gmem_codec, zstd.free_compress) },
		{ "ZSTD_CCtx_setParameter", offsetof(struct gmem_codec, zstd.set_parameter) },
		{ "ZSTD_compress2", offsetof(struct gmem_codec, zstd.compress) },
		{ "ZSTD_createDCtx", offsetof(struct gmem_codec, zstd.create_decompress) },
		{ "ZSTD_freeDCtx", offsetof(struct gmem_codec, zstd.free_decompress) },
		{ "ZSTD_decompressDCtx", offsetof(struct gmem_codec, zstd.decompress) },
		{ "ZSTD_isError", offsetof(struct gmem_codec, zstd.is_error) },
	} },
	[GMEM_ALGORITHM_LZ4] = { "liblz4.so.1", "liblz4-1", {
		{ "LZ4_sizeofState", offsetof(struct gmem_codec, lz4.state_bytes) },
		{ "LZ4_compress_fast_extState", offsetof(struct gmem_codec, lz4.compress) },
		{ "LZ4_decompress_safe", offsetof(struct gmem_codec, lz4.decompress) },
	} },
};

static int load(struct gmem_codec *codec, const char *library, char *message)
{
	const char *package = algorithms[codec->algorithm].package;

	if (!library)
		library = algorithms[codec->algorithm].library;
	codec->library = dlopen(library, RTLD_NOW | RTLD_LOCAL);
	if (!codec->library) {
		snprintf(message, GMEM_MESSAGE_MAX, "algorithm: %s can't be loaded; it is in Debian's package %s", library,
			 package);
		return -ENOENT;
	}
	for (int i = 0; algorithms[codec->algorithm].functions[i].name; i++) {
		const char *name = algorithms[codec->algorithm].functions[i].name;
		void *function = dlsym(codec->library, name);

		if (!function) {
			snprintf(message, GMEM_MESSAGE_MAX, "algorithm: %s has no %s; Debian's package %s does", library,
				 name, package);
			return -ENOENT;
		}
		memcpy((char *)codec + algorithms[codec->algorithm].functions[i].offset, &function, sizeof(function));
	}
	return 0;
}

int gmem_codec_create(enum gmem_algorithm algorithm, int level, const char *library, char *message,
		      struct gmem_codec **ret)
{
	struct gmem_codec *codec = calloc(1, sizeof(*codec));
	int err;

	if (!codec)
		return -ENOMEM;
	codec->algorithm = algorithm;
	codec->level = level;
	err = load(codec, library, message);
	if (err)
		gmem_codec_destroy(codec);
	else
		*ret = codec;
	return err;
}

/* ---- workers ---- */

static void worker_destroy(struct gmem_codec *codec, struct gmem_codec_worker *worker)
{
	if (codec->algorithm == GMEM_ALGORITHM_ZSTD) {
		codec->zstd.free_compress(worker->compress); /* NULL is allowed */
		codec->zstd.free_decompress(worker->decompress);
	} else {
		free(worker->compress);
	}
	if (worker->page)
		munmap(worker->page, WORKER_BYTES);
	free(worker);
}

static int worker_contexts(struct gmem_codec *codec, struct gmem_codec_worker *worker)
{
	if (codec->algorithm == GMEM_ALGORITHM_LZ4) {
		worker->compress = malloc((size_t)codec->lz4.state_bytes());
		return worker->compress ? 0 : -ENOMEM;
	}
	worker->compress = codec->zstd.create_compress();
	worker->decompress = codec->zstd.create_decompress();
	if (!worker->compress || !worker->decompress)
		return -ENOMEM;
	return codec->zstd.is_error(codec->zstd.set_parameter(worker->compress, ZSTD_LEVEL, codec->level)) ? -EINVAL : 0;
}

static int worker_create(struct gmem_codec *codec, struct gmem_codec_worker **ret)
{
	struct gmem_codec_worker *worker = calloc(1, sizeof(*worker));
	int err;

	if (!worker)
		return -ENOMEM;
	worker->page = mmap(NULL, WORKER_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (worker->page == MAP_FAILED) {
		worker->page = NULL;
		err = -ENOMEM;
	} else {
		worker->packed = worker->page + BUFFER_BYTES + GMEM_CODEC_HEADROOM;
		err = worker_contexts(codec, worker);
	}
	if (err)
		worker_destroy(codec, worker);
	else
		*ret = worker;
	return err;
}

/* Where this thread found a worker last: its caches are warm, and threads keep out of each other's way. */
static _Thread_local unsigned home;

int gmem_codec_take(struct gmem_codec *codec, struct gmem_codec_worker **ret)
{
	for (unsigned i = 0; i < POOL; i++) {
		unsigned at = (home + i) % POOL;
		struct gmem_codec_worker *worker = NULL;

		if (atomic_load_explicit(&codec->pool[at], memory_order_relaxed))
			worker = atomic_exchange(&codec->pool[at], NULL);
		if (worker) {
			home = at;
			*ret = worker;
			return 0;
		}
	}
	return worker_create(codec, ret);
}

void gmem_codec_give(struct gmem_codec *codec, struct gmem_codec_worker *worker)
{
	for (unsigned i = 0; i < POOL; i++) {
		struct gmem_codec_worker *none = NULL;
		unsigned at = (home + i) % POOL;

		if (atomic_compare_exchange_strong(&codec->pool[at], &none, worker)) {
			home = at;
			return;
		}
	}
	worker_destroy(codec, worker);
}

void gmem_codec_destroy(struct gmem_codec *codec)
{
	for (unsigned i = 0; i < POOL; i++)
		if (codec->pool[i])
			worker_destroy(codec, codec->pool[i]);
	if (codec->library)
		dlclose(codec->library);
	free(codec);
}

/* ---- pages ---- */

size_t gmem_codec_pack(struct gmem_codec *codec, struct gmem_codec_worker *worker, size_t bytes, size_t most)
{
	size_t packed;

	if (codec->algorithm == GMEM_ALGORITHM_LZ4) {
		int n = codec->lz4.compress(worker->compress, (const char *)worker->page, (char *)worker->packed, (int)bytes,
					    (int)most, 1);

		return n > 0 ? (size_t)n : 0;
	}
	packed = codec->zstd.compress(worker->compress, worker->packed, most, worker->page, bytes);
	return codec->zstd.is_error(packed) ? 0 : packed;
}

int gmem_codec_unpack(struct gmem_codec *codec, struct gmem_codec_worker *worker, size_t packed, size_t bytes)
{
	size_t n;

	if (codec->algorithm == GMEM_ALGORITHM_LZ4)
		return codec->lz4.decompress((const char *)worker->packed, (char *)worker->page, (int)packed, (int)bytes) ==
				       (int)bytes ? 0 : -EBADMSG;
	n = codec->zstd.decompress(worker->decompress, worker->page, bytes, worker->packed, packed);
	return codec->zstd.is_error(n) || n != bytes ? -EBADMSG : 0;
}

/* ---- estimates ---- */

#define ROUNDS 5

/* Words of a small vocabulary in no order: compresses about as prose does. */
static void make_sample(uint8_t *page, size_t bytes)
{
	uint64_t random = 1;

	for (size_t at = 0; at < bytes;) {
		uint64_t word = 0;

		random = random * 6364136223846793005ull + 1442695040888963407ull;
		word = (random >> 33) % 600;
		for (size_t i = 0, length = 2 + word % 9; i < length && at < bytes; i++, at++)
			page[at] = (uint8_t)('a' + (word * 7 + i * i * (word | 1)) % 26);
		if (at < bytes)
			page[at++] = ' ';
	}
}

static int time_unpack(struct gmem_codec *codec, struct gmem_codec_worker *worker, size_t bytes, uint64_t *ret_ns)
{
	uint64_t best = UINT64_MAX;
	size_t packed;
	int err = 0;

	make_sample(worker->page, bytes);
	packed = gmem_codec_pack(codec, worker, bytes, bytes - bytes / 8);
	if (!packed)
		return -EIO;
	for (int i = 0; !err && i < ROUNDS; i++) {
		uint64_t start = gmem_now_ns(), ns;

		err = gmem_codec_unpack(codec, worker, packed, bytes);
		ns = gmem_now_ns() - start;
		best = ns < best ? ns : best;
	}
	if (!err)
		*ret_ns = best + 1;
	return err;
}

int gmem_codec_measure(struct gmem_codec *codec, uint64_t *ret_bytes_per_s, uint64_t *ret_latency_ns)
{
	const uint64_t small = 1 << GMEM_SHIFT_4K, large = 1 << GMEM_SHIFT_64K;
	struct gmem_codec_worker *worker;
	uint64_t small_ns = 0, large_ns = 0;
	int err = gmem_codec_take(codec, &worker);

	if (err)
		return err;
	err = time_unpack(codec, worker, small, &small_ns);
	if (!err)
		err = time_unpack(codec, worker, large, &large_ns);
	gmem_codec_give(codec, worker);
	if (err)
		return err;
	*ret_bytes_per_s = large * 1000000000ull / large_ns;
	*ret_latency_ns = small_ns;
	return 0;
}
