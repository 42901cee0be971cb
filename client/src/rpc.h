/* SPDX-License-Identifier: Apache-2.0
 *
 * Requests of libgmem to gmemd: msgpack maps over a ZeroMQ DEALER (docs/protocol.md has the ops).
 *
 *	struct gmem_request request;
 *	struct gmem_reply reply;
 *	gmem_request_init(&request, "munmap", 2);
 *	gmem_request_uint(&request, "va", va);
 *	gmem_request_uint(&request, "bytes", bytes);
 *	err = gmem_rpc_call(rpc, &request, &reply);     (deinits the request)
 *	if (!err) gmem_reply_deinit(&reply);
 */
#ifndef GMEM_CLIENT_RPC_H
#define GMEM_CLIENT_RPC_H

#include <msgpack.h>
#include <stdbool.h>
#include <stdint.h>
#include <zmq.h>

struct gmem_link;
struct gmem_range;
struct gmem_rpc;

struct gmem_request {
	const char *op;
	size_t arg_count;
	bool failed; /* out of memory */
	msgpack_sbuffer args; /* keys and values, in order */
	msgpack_packer packer;
};

struct gmem_reply {
	zmq_msg_t message; /* strings of unpacked lie in it */
	msgpack_unpacked unpacked;
};

/* One for each link; the link outlives it. */
int gmem_rpc_create(struct gmem_link *link, struct gmem_rpc **ret);
void gmem_rpc_destroy(struct gmem_rpc *rpc);

void gmem_request_init(struct gmem_request *request, const char *op, size_t arg_count);
void gmem_request_uint(struct gmem_request *request, const char *key, uint64_t value);
void gmem_request_int(struct gmem_request *request, const char *key, int64_t value);
void gmem_request_bool(struct gmem_request *request, const char *key, bool value);
void gmem_request_str(struct gmem_request *request, const char *key, const char *value);
void gmem_request_ranges(struct gmem_request *request, const char *key, const struct gmem_range *ranges, size_t count);
/* An array of one pair. */
void gmem_request_pair(struct gmem_request *request, const char *key, uint64_t first, uint64_t second);

/* Sends it and waits for its reply, for as long as gmemd lives. Takes the request in every case. ret: NULL if nothing in
 * the reply is of interest. An error reply is gmem_last_error() and its -errno. */
int gmem_rpc_call(struct gmem_rpc *rpc, struct gmem_request *request, struct gmem_reply *ret);
void gmem_reply_deinit(struct gmem_reply *reply);

/* A field of the reply, or of any map in it. NULL, or -EPROTO, if it is not there or of another type. */
const msgpack_object *gmem_reply_root(const struct gmem_reply *reply);
const msgpack_object *gmem_map_get(const msgpack_object *map, const char *key);
int gmem_map_uint(const msgpack_object *map, const char *key, uint64_t *ret);
int gmem_map_bool(const msgpack_object *map, const char *key, bool *ret);
/* Cut to fit; always terminated. */
int gmem_map_str(const msgpack_object *map, const char *key, char *ret, size_t capacity);

#endif
