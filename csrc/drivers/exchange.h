/* SPDX-License-Identifier: Apache-2.0
 *
 * Exchange: requests for values, many at once, to whichever nodes have them. Each node gets its requests in one go, and
 * all nodes work at the same time. What is redirected, or was on a connection that broke, is asked again, until a time
 * is over.
 *
 * Pages of 64 KiB and more go straight from where they are to the socket and back, checksummed a chunk at a time while
 * that is in the cache; small ones, and all that is in TLS, are copied through the wire's buffers. The memory is a
 * client's: what it punches meanwhile has failed, and what it changes after the checksum is not believed when it is read.
 */
#ifndef GMEM_DRIVERS_EXCHANGE_H
#define GMEM_DRIVERS_EXCHANGE_H

#include "nodes.h"

#define GMEM_VALUE_PIECES 16
#define GMEM_EXCHANGE_MAX 64 /* requests at once */
#define GMEM_VALUE_NAME 176

/* A page of a value, or of the part of it that is read. */
struct gmem_piece {
	uint64_t key;   /* goes into the checksum */
	void *memory;   /* what is written, or where it is read to */
	uint32_t bytes;
	uint32_t crc;   /* PUT: set; GET: what it has to be */
	int result;     /* 0, -EBADMSG, -EFAULT; the request's error if that has one */
};

enum gmem_request_kind { GMEM_PUT, GMEM_GET, GMEM_DROP };

struct gmem_request {
	enum gmem_request_kind kind;
	char name[GMEM_VALUE_NAME];
	uint32_t name_bytes;
	bool part;             /* GET: less than the whole value */
	uint32_t offset;       /* of the first piece in the value; with part */
	uint32_t count;        /* of pieces; they follow each other */
	struct gmem_piece *pieces;
	/* 0; GET -ENOENT: there is no such value, -EBADMSG: another length; PUT -ENOSPC: the server is full, -ENODATA:
	 * too few replicas have it; -ETIMEDOUT; -EACCES, -EIO: refused. Nothing is known of a PUT that failed. */
	int result;
	/* the exchange's own */
	uint8_t state, tries;
	bool asking;
	uint16_t node, slot;
	uint64_t not_before_ns;
};

struct gmem_exchange {
	struct gmem_nodes *nodes;
	unsigned replicas;      /* that must have what is PUT */
	uint64_t deadline_ns;
	bool once;              /* a server that can't be connected to, or hangs up, is an answer, and not tried again */
};

/* count: at most GMEM_EXCHANGE_MAX. */
void gmem_exchange(const struct gmem_exchange *exchange, struct gmem_request *requests, unsigned count);

/* gmem:TENANT:{OBJECT:EXTENT}:PAGE:VERSION; what is in braces says which slot it is in. kind comes before the object. */
void gmem_request_name(struct gmem_request *request, const char *tenant, const char *kind, const char *object,
		       uint64_t extent, uint64_t page, uint64_t version);

#endif
