/* SPDX-License-Identifier: Apache-2.0
 *
 * In place of rpc.c: libgmem-any.so has no ZeroMQ, and asks everything over the ring.
 */
#include <errno.h>

#include "error.h"
#include "rpc.h"

int gmem_rpc_create(struct gmem_link *link, struct gmem_rpc **ret)
{
	(void)link;
	*ret = NULL;
	return 0;
}

void gmem_rpc_destroy(struct gmem_rpc *rpc)
{
	(void)rpc;
}

int gmem_rpc_call(struct gmem_rpc *rpc, struct gmem_request *request, struct gmem_reply *ret)
{
	(void)rpc, (void)ret;
	return gmem_fail(-EOPNOTSUPP, "%s: only over the ring", request->op);
}

void gmem_request_init(struct gmem_request *request, const char *op, size_t arg_count)
{
	(void)arg_count;
	request->op = op;
}

void gmem_request_uint(struct gmem_request *request, const char *key, uint64_t value)
{
	(void)request, (void)key, (void)value;
}

void gmem_request_int(struct gmem_request *request, const char *key, int64_t value)
{
	(void)request, (void)key, (void)value;
}

void gmem_request_bool(struct gmem_request *request, const char *key, bool value)
{
	(void)request, (void)key, (void)value;
}

void gmem_request_str(struct gmem_request *request, const char *key, const char *value)
{
	(void)request, (void)key, (void)value;
}

void gmem_reply_deinit(struct gmem_reply *reply)
{
	(void)reply;
}

const msgpack_object *gmem_reply_root(const struct gmem_reply *reply)
{
	(void)reply;
	return NULL;
}

const msgpack_object *gmem_map_get(const msgpack_object *map, const char *key)
{
	(void)map, (void)key;
	return NULL;
}

int gmem_map_uint(const msgpack_object *map, const char *key, uint64_t *ret)
{
	(void)map, (void)key, (void)ret;
	return -EPROTO;
}

int gmem_map_bool(const msgpack_object *map, const char *key, bool *ret)
{
	(void)map, (void)key, (void)ret;
	return -EPROTO;
}
