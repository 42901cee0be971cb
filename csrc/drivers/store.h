/* SPDX-License-Identifier: Apache-2.0
 *
 * Store: pages by key in a file. A push writes to a slot that nobody has, then flips the index to it and frees the old
 * slot; so a page is the old one or the new one whatever fails. A checksum over key and content finds what a disk
 * damages, loses or returns from the wrong place.
 *
 * All calls may come from several threads at once. Two at once on one key are the caller's mistake: one of them wins, or
 * a pull finds damage; nothing else is harmed.
 */
#ifndef GMEM_DRIVERS_STORE_H
#define GMEM_DRIVERS_STORE_H

#include <gmem/driver.h>

#include "aio.h"
#include "index.h"
#include "scratch.h"
#include "slots.h"

#define GMEM_STORE_ERRORS_MAX 8 /* one after the other; then the device is called lost */

struct gmem_store {
	struct gmem_scratch scratch; /* (C) */
	struct gmem_slots slots;
	struct gmem_index index;
	struct gmem_aio *aio;
	_Atomic uint64_t pages, page_bytes;
	_Atomic uint64_t bad_bytes;  /* slots that could not be written, never used again */
	_Atomic unsigned errors;     /* of I/O, since the last that succeeded */
	_Atomic uint64_t tried_ns;   /* when a lost device was last tried */
	struct gmem_mutex lock;
	char error[GMEM_MESSAGE_MAX]; /* lock */
};

/* Takes over scratch, and closes it if it fails. */
int gmem_store_init(struct gmem_store *store, const struct gmem_scratch *scratch, uint64_t key_count,
		    enum gmem_aio_engine engine, unsigned depth);
/* The same with the index of a predecessor, taken over on success. -EPROTO: the two do not belong together. */
int gmem_store_adopt(struct gmem_store *store, const struct gmem_scratch *scratch, uint64_t key_count, int index_fd,
		     enum gmem_aio_engine engine, unsigned depth);
void gmem_store_deinit(struct gmem_store *store);

/* Set the result of each io. */
void gmem_store_push(struct gmem_store *store, struct gmem_peer_io *io, size_t count);
void gmem_store_pull(struct gmem_store *store, struct gmem_peer_io *io, size_t count);
int gmem_store_free(struct gmem_store *store, uint64_t key); /* -ENOENT */

bool gmem_store_is_lost(struct gmem_store *store);
/* A sentence for operators. */
void gmem_store_note(struct gmem_store *store, const char *format, ...) __attribute__((format(printf, 2, 3)));
void gmem_store_error(struct gmem_store *store, char *ret_text); /* GMEM_MESSAGE_MAX bytes */

#endif
