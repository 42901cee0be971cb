/* SPDX-License-Identifier: Apache-2.0
 *
 * Values: what a remote tier has on its servers. A value is one page of 64 KiB or 2 MiB, or up to 16 pages of 4 KiB that
 * left together, and is never changed: what is written is a value with a version of its own, and one that has no page
 * left that is wanted is dropped. A record of each value, from before it is written until it is known to be dropped, is
 * in a memfd without pointers; so whoever finds it after a crash knows each value that can exist.
 */
#ifndef GMEM_DRIVERS_VALUES_H
#define GMEM_DRIVERS_VALUES_H

#include <gmem/lockrank.h>
#include <gmem/memfd.h>

#define GMEM_VALUE_SLOTS 16
#define GMEM_VALUES_MAGIC 0x7365756c61766d67ull /* "gmvalues" */
#define GMEM_VALUES_VERSION 1
#define GMEM_VALUES_BEYOND (1ull << 20)

/* The first 4 KiB of the memfd. */
struct gmem_values_header {
	uint64_t magic;
	uint32_t version, record_bytes;
	uint64_t count;
	uint64_t object;               /* names this tier's values among those of others */
	_Atomic uint64_t next_version; /* below are used */
	_Atomic uint32_t bumped;       /* records that have ever had a version */
	uint32_t reserved;
	uint64_t bandwidth, latency_ns; /* as measured */
};

struct gmem_value {
	_Atomic uint64_t version;      /* 0: no value. (A) */
	uint32_t page_bytes, slots;    /* (C) while there is a version */
	uint64_t keys[GMEM_VALUE_SLOTS]; /* (C) the page in each slot */
};

struct gmem_values {
	struct gmem_file *file;             /* (C) */
	uint8_t *alias;                     /* (C) */
	struct gmem_values_header *header;  /* (C) pointer */
	struct gmem_value *records;         /* (C) pointer */
	uint64_t capacity;                  /* (C) bytes */
	uint32_t count;                     /* (C) */
	struct gmem_mutex lock;
	uint16_t *live;                     /* lock; bit s: the page of slot s is wanted */
	uint32_t *next;                     /* lock; of the lists */
	uint32_t bumped, free, dead;        /* lock; heads, + 1 */
	uint64_t stored_bytes;              /* lock; dead ones take their bytes until they are dropped */
	uint32_t taken;                     /* lock; dead ones that somebody is about to drop */
	pthread_cond_t given_back;          /* with lock: one of these has been */
};

/* fd: a predecessor's, taken over on success; -1: a new one. -EPROTO: it is none, or of another size. */
int gmem_values_init(struct gmem_values *values, uint64_t capacity, int fd);
void gmem_values_deinit(struct gmem_values *values);
int gmem_values_fd(const struct gmem_values *values);

/* A value to be, of slots pages; its record's number. All slots are live. -ENOSPC: over capacity; beyond: by more than
 * GMEM_VALUES_BEYOND, for who makes room by it. */
int gmem_values_add(struct gmem_values *values, const uint64_t *keys, unsigned slots, uint32_t page_bytes, bool beyond,
		    uint32_t *ret);
/* A page of it is not wanted any more; the last one makes it dead. Returns true for the first dead one there is. */
bool gmem_values_leave(struct gmem_values *values, uint32_t value, unsigned slot);
/* Takes up to count dead values off the list, which the caller drops and gives to forget() or back to bury(). */
unsigned gmem_values_dead(struct gmem_values *values, uint32_t *ret, unsigned count);
void gmem_values_forget(struct gmem_values *values, uint32_t value);
void gmem_values_bury(struct gmem_values *values, uint32_t value);
/* Until one that somebody has taken has been given back, or at most so long; false: nobody has any. */
bool gmem_values_await(struct gmem_values *values, uint64_t ns);
/* Values that are at most half full, among some that are looked at from *at on, with together pages live ones (the last
 * may have more); ret has room for so many. For moving their pages elsewhere. */
unsigned gmem_values_sparse(struct gmem_values *values, uint32_t *at, uint32_t *ret, unsigned pages);

/* After a crash: the page of a slot is wanted (for each there is), then what is not wanted is dead. -EPROTO: no such. */
int gmem_values_claim(struct gmem_values *values, uint32_t value, unsigned slot, uint64_t key);
void gmem_values_settle(struct gmem_values *values);

#endif
