/* SPDX-License-Identifier: Apache-2.0
 *
 * Pools: gmemd knows them by name; here they are regions whose file comes when it is asked for.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "context.h"
#include "error.h"
#include "session.h"

#define BUSY_RANGES_MAX 64

struct grant {
	uint64_t va, bytes;
	uint64_t version; /* of a pool on servers */
	bool mapped; /* this process has it already */
};

static int check(struct gmem *session, const char *name, const struct gmem_pool_options *options, uint32_t known)
{
	if (!session || !name)
		return gmem_fail(-EINVAL, "%s: is NULL", session ? "name" : "session");
	if (gmem_check_options(options->size, sizeof(*options), "gmem_pool_options"))
		return -EINVAL;
	if (options->flags & ~known)
		return gmem_fail(-EINVAL, "options: flags 0x%x are not known here", options->flags & ~known);
	if (options->reserved)
		return gmem_fail(-EINVAL, "options: reserved is not zero");
	return gmem_session_check(session);
}

static int call(struct gmem *session, struct gmem_request *request, struct grant *ret)
{
	struct gmem_reply reply;
	const msgpack_object *root;
	int err = gmem_rpc_call(session->rpc, request, &reply);

	if (err)
		return err;
	root = gmem_reply_root(&reply);
	if (gmem_map_uint(root, "va", &ret->va) || gmem_map_uint(root, "bytes", &ret->bytes) ||
	    gmem_map_bool(root, "mapped", &ret->mapped))
		err = gmem_fail(-EPROTO, "name: gmemd's reply can't be read");
	if (gmem_map_uint(root, "version", &ret->version))
		ret->version = 0;
	gmem_reply_deinit(&reply);
	return err;
}

static int ask_create(struct gmem *session, const char *name, size_t bytes, const struct gmem_pool_options *options,
		      struct grant *ret)
{
	struct gmem_request request;

	gmem_request_init(&request, "pool_create", 5);
	gmem_request_str(&request, "name", name);
	gmem_request_uint(&request, "bytes", bytes);
	gmem_request_uint(&request, "mode", options->mode);
	gmem_request_uint(&request, "page_bytes", options->page_bytes);
	gmem_request_bool(&request, "persistent", options->flags & GMEM_POOL_PERSISTENT);
	return call(session, &request, ret);
}

static int ask_open(struct gmem *session, const char *name, const char *remote, const struct gmem_pool_options *options,
		    struct grant *ret)
{
	bool owned = options->flags & GMEM_POOL_OF_UID;
	struct gmem_request request;

	gmem_request_init(&request, "pool_open", 2u + owned + (remote != NULL));
	gmem_request_str(&request, "name", name);
	if (remote)
		gmem_request_str(&request, "remote", remote);
	gmem_request_bool(&request, "write", options->flags & GMEM_POOL_WRITE);
	if (owned)
		gmem_request_uint(&request, "uid", options->uid);
	return call(session, &request, ret);
}

static int init_name(struct gmem *session, const char *op, const char *name, const char *remote, struct gmem_request *request)
{
	if (!session || !name)
		return gmem_fail(-EINVAL, "%s: is NULL", session ? "name" : "session");
	gmem_request_init(request, op, remote ? 2 : 1);
	gmem_request_str(request, "name", name);
	if (remote)
		gmem_request_str(request, "remote", remote);
	return 0;
}

static int call_name(struct gmem *session, const char *op, const char *name, const char *remote)
{
	struct gmem_request request;
	int err = init_name(session, op, name, remote, &request);

	return err ? err : gmem_rpc_call(session->rpc, &request, NULL);
}

/* As it was before: with the words of the failure kept. */
static void give_back(struct gmem *session, const struct grant *grant, bool mapped)
{
	struct gmem_request request;
	char why[384];

	snprintf(why, sizeof(why), "%s", gmem_last_error());
	if (mapped)
		gmem_link_unmap(session->link, grant->va, grant->bytes);
	gmem_request_init(&request, "munmap", 2);
	gmem_request_uint(&request, "va", grant->va);
	gmem_request_uint(&request, "bytes", grant->bytes);
	gmem_rpc_call(session->rpc, &request, NULL);
	gmem_fail(-EIO, "%s", why);
}

/* Maps and commits it, here and in the contexts. The caller holds session->mapping to write. */
static int map(struct gmem *session, const struct grant *grant)
{
	int err = gmem_link_map_file(session->link, grant->va, true);

	if (err)
		return gmem_fail(err, "name: can't be mapped at 0x%llx: %s", (unsigned long long)grant->va, strerror(-err));
	err = gmem_session_commit(session, grant->va);
	session->cover = gmem_contexts_cover;
	if (!err)
		err = gmem_contexts_cover(session, grant->va, 0);
	if (err) {
		give_back(session, grant, true);
		return err;
	}
	return 0;
}

int gmem_pool_create(struct gmem *session, const char *name, size_t bytes, const struct gmem_pool_options *options,
		     void **ret)
{
	const struct gmem_pool_options defaults = { .size = sizeof(defaults), .mode = 0600 };
	struct grant busy[BUSY_RANGES_MAX], got;
	size_t count = 0;
	int err;

	options = options ? options : &defaults;
	err = check(session, name, options, GMEM_POOL_PERSISTENT);
	if (!err && !ret)
		err = gmem_fail(-EINVAL, "ret: is NULL");
	if (!err)
		err = gmem_check_bytes(bytes);
	if (err)
		return err;
	pthread_rwlock_wrlock(&session->mapping);
	do {
		err = ask_create(session, name, bytes, options, &got);
		if (err)
			break;
		err = map(session, &got);
		if (err) {
			char why[384];

			snprintf(why, sizeof(why), "%s", gmem_last_error());
			call_name(session, "pool_unlink", name, NULL);
			gmem_fail(err, "%s", why);
		}
		if (err == -EEXIST)
			busy[count++] = got; /* kept until the end, so that it is not offered again */
	} while (err == -EEXIST && count < BUSY_RANGES_MAX);
	for (size_t i = 0; i < count; i++)
		give_back(session, &busy[i], false);
	pthread_rwlock_unlock(&session->mapping);
	if (!err)
		*ret = (void *)(uintptr_t)got.va;
	return err;
}

static int open_pool(struct gmem *session, const char *name, const char *remote, const struct gmem_pool_options *options,
		     struct gmem_range *ret, uint64_t *ret_version)
{
	const struct gmem_pool_options defaults = { .size = sizeof(defaults) };
	struct grant got;
	int err;

	options = options ? options : &defaults;
	err = check(session, name, options, (remote ? 0 : GMEM_POOL_WRITE) | GMEM_POOL_OF_UID);
	if (!err && !ret)
		err = gmem_fail(-EINVAL, "ret: is NULL");
	if (err)
		return err;
	pthread_rwlock_wrlock(&session->mapping);
	err = ask_open(session, name, remote, options, &got);
	if (!err && !got.mapped) {
		err = map(session, &got);
		if (err == -EEXIST)
			give_back(session, &got, false);
	}
	pthread_rwlock_unlock(&session->mapping);
	if (err)
		return err;
	*ret = (struct gmem_range){ (void *)(uintptr_t)got.va, got.bytes };
	if (ret_version)
		*ret_version = got.version;
	return 0;
}

int gmem_pool_open(struct gmem *session, const char *name, const struct gmem_pool_options *options,
		   struct gmem_range *ret)
{
	return open_pool(session, name, NULL, options, ret, NULL);
}

int gmem_pool_publish(struct gmem *session, const char *name)
{
	return call_name(session, "pool_publish", name, NULL);
}

int gmem_pool_unlink(struct gmem *session, const char *name)
{
	return call_name(session, "pool_unlink", name, NULL);
}

/* ---- of several machines ---- */

int gmem_pool_open_remote(struct gmem *session, const char *name, const char *remote,
			  const struct gmem_pool_options *options, struct gmem_range *ret, uint64_t *ret_version)
{
	if (!remote)
		return gmem_fail(-EINVAL, "remote: is NULL");
	return open_pool(session, name, remote, options, ret, ret_version);
}

int gmem_pool_publish_remote(struct gmem *session, const char *name, const char *remote, uint64_t *ret_version)
{
	struct gmem_request request;
	struct gmem_reply reply;
	uint64_t version;
	int err = remote ? 0 : gmem_fail(-EINVAL, "remote: is NULL");

	if (!err)
		err = init_name(session, "pool_publish", name, remote, &request);
	if (!err)
		err = gmem_rpc_call(session->rpc, &request, &reply);
	if (err)
		return err;
	if (gmem_map_uint(gmem_reply_root(&reply), "version", &version))
		err = gmem_fail(-EPROTO, "name: gmemd's reply can't be read");
	else if (ret_version)
		*ret_version = version;
	gmem_reply_deinit(&reply);
	return err;
}

int gmem_pool_unlink_remote(struct gmem *session, const char *name, const char *remote)
{
	if (!remote)
		return gmem_fail(-EINVAL, "remote: is NULL");
	return call_name(session, "pool_unlink", name, remote);
}
