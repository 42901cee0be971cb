/* SPDX-License-Identifier: Apache-2.0
 *
 * Compression of pages by libzstd or liblz4, which are opened when a device wants them: gmem is built without their
 * headers and runs without them. A worker has what one thread needs for a page (two buffers and the library's contexts,
 * 5 MiB at level 1, most of it touched by 2 MiB pages only); workers are kept in a pool without a lock, so that the page
 * path allocates nothing once as many as work at a time have been made.
 */
#ifndef GMEM_CODEC_H
#define GMEM_CODEC_H

#include <gmem/types.h>

#define GMEM_CODEC_HEADROOM 8 /* before packed, the caller's */

enum gmem_algorithm { GMEM_ALGORITHM_ZSTD, GMEM_ALGORITHM_LZ4, GMEM_ALGORITHM_COUNT };

struct gmem_codec;
struct gmem_codec_worker {
	uint8_t *page;   /* 2 MiB */
	uint8_t *packed; /* 2 MiB, and the headroom before it */
	void *compress, *decompress;
};

/* -ENOENT: the library can't be loaded; message (GMEM_MESSAGE_MAX) names it and its package. library: its file, or NULL. */
int gmem_codec_create(enum gmem_algorithm algorithm, int level, const char *library, char *message,
		      struct gmem_codec **ret);
void gmem_codec_destroy(struct gmem_codec *codec);

int gmem_codec_take(struct gmem_codec *codec, struct gmem_codec_worker **ret);
void gmem_codec_give(struct gmem_codec *codec, struct gmem_codec_worker *worker);

/* page to packed. 0: it does not fit into most bytes. */
size_t gmem_codec_pack(struct gmem_codec *codec, struct gmem_codec_worker *worker, size_t bytes, size_t most);
/* packed to page. -EBADMSG unless it becomes exactly that many bytes. */
int gmem_codec_unpack(struct gmem_codec *codec, struct gmem_codec_worker *worker, size_t packed, size_t bytes);

/* Decompression here and now, of a sample that is like text. */
int gmem_codec_measure(struct gmem_codec *codec, uint64_t *ret_bytes_per_s, uint64_t *ret_latency_ns);

#endif
