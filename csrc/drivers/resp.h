/* SPDX-License-Identifier: Apache-2.0
 *
 * RESP: the protocol of Valkey and Redis, version 2, as far as pages need it: commands are arrays of bulk strings,
 * replies a line each, and a body behind the line of a bulk string. What comes from the socket is not trusted: every
 * length is bounded, and what is no reply is -EPROTO.
 *
 * Source: https://valkey.io/topics/protocol, and the cluster specification for the hash slots and redirections.
 */
#ifndef GMEM_DRIVERS_RESP_H
#define GMEM_DRIVERS_RESP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define GMEM_RESP_LINE_MAX 1024        /* of a reply's first line; longer ones are no reply to what we send */
#define GMEM_RESP_BULK_MAX (64u << 20)
#define GMEM_RESP_ADDRESS_MAX 80
#define GMEM_SLOT_COUNT 16384u

enum gmem_resp_type { GMEM_RESP_STATUS = '+', GMEM_RESP_ERROR = '-', GMEM_RESP_INTEGER = ':', GMEM_RESP_BULK = '$' };

struct gmem_resp {
	enum gmem_resp_type type;
	int64_t number;   /* of an integer; of a bulk its bytes, -1: there is no such key */
	const char *text; /* of a status or an error, in the buffer; not terminated */
	size_t text_bytes;
};

/* The reply that begins at data. Returns what its first line takes, 0 if more has to come, -EPROTO. */
ssize_t gmem_resp_parse(const char *data, size_t bytes, struct gmem_resp *ret);

/* What an error asks of whoever sent the command. */
enum gmem_resp_error {
	GMEM_RESP_REFUSED,  /* no use in trying again */
	GMEM_RESP_MOVED,    /* elsewhere, from now on */
	GMEM_RESP_ASK,      /* elsewhere, this once, behind ASKING */
	GMEM_RESP_LATER,    /* LOADING, CLUSTERDOWN, TRYAGAIN, MASTERDOWN, BUSY, NOREPLICAS, UNBLOCKED */
	GMEM_RESP_STALE,    /* READONLY: a replica; the map of the cluster is old */
	GMEM_RESP_FULL,     /* OOM */
	GMEM_RESP_DENIED,   /* NOAUTH, WRONGPASS, NOPERM */
};

struct gmem_redirection {
	unsigned slot;
	char address[GMEM_RESP_ADDRESS_MAX]; /* HOST:PORT; no host: the one that was asked */
};

/* ret is set for MOVED and ASK; one that can't be read is REFUSED. */
enum gmem_resp_error gmem_resp_error(const char *text, size_t bytes, struct gmem_redirection *ret);

/* The hash slot of a key: of what is between its first { and the } behind it, if there is something. */
unsigned gmem_resp_slot(const char *key, size_t bytes);

#endif
