/* SPDX-License-Identifier: Apache-2.0
 *
 * Source: where the content of an object's pages comes from that are nowhere here (NOMAP). Without one such a page reads
 * zero. With one, the first touch pulls it, and what was pulled and not written since leaves again by being dropped. A
 * pool's pages may so come from another object of this daemon (pool.h), or from another machine.
 *
 * A source is set before anybody can map the object, or with the object sealed, and stays for the object's life.
 */
#ifndef GMEM_SOURCE_H
#define GMEM_SOURCE_H

#include <stdatomic.h>

#include <gmem/driver.h>
#include <gmem/types.h>

struct gmem_object;
struct gmem_source;

struct gmem_source_ops {
	/* Fills io[i].memory with page io[i].key (its index in the object) and sets io[i].result: 0; -ENODATA: nobody has
	 * ever written to it, it is zeros (memory may be left as it was: it has been zeroed); -EAGAIN: not now, the access is
	 * tried again; any other -errno: it can't be had, the access gets SIGBUS. On any thread, several at a time; the pages
	 * are BUSY, no lock is held. It must not wait for another page of this daemon. */
	void (*pull)(struct gmem_source *source, struct gmem_peer_io *io, size_t count);
	/* The object is gone. */
	void (*release)(struct gmem_source *source);
};

struct gmem_source {
	const struct gmem_source_ops *ops;
	bool slow; /* (C) for fillers, who may wait, and never for fault threads */
};

/* Once, before anybody can map the object or with it sealed; takes the source over. */
void gmem_source_set(struct gmem_object *object, struct gmem_source *source);
void gmem_source_release(struct gmem_source *source); /* NULL is allowed */
/* Pages [index, index + count) to memory; the first failure. -ENODATA is none. */
int gmem_source_pull(struct gmem_object *object, uint64_t index, size_t count, uint8_t *memory);

/* Whose pages are copies of another object's at the same offsets. References it. */
int gmem_source_of_object(struct gmem_object *from, struct gmem_source **ret);

#endif
