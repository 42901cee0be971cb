/* SPDX-License-Identifier: Apache-2.0
 *
 * libgmem's memory and device functions: each is a request or two to gmemd. Arguments are checked by gmemd, which names
 * them; here only what can't be told there, or would do harm before.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "adopt.h"
#include "adopted.h"
#include "context.h"
#include "copies.h"
#include "error.h"
#include "peer.h"
#include "session.h"
#include "syscalls.h"

#define SMALL_BYTES 4096ull
#define HUGE_BYTES (2ull << 20)
#define BUSY_RANGES_MAX 64
#define BUSY_TRIES 40
#define FAR_SHIFT 18
/* A request describes at most 65536 pages; this many bytes are never more, and always whole pages. */
#define QUERY_BYTES_MAX (65536 * SMALL_BYTES)

static uint64_t address(const void *va)
{
	return (uintptr_t)va;
}

static int check_session(const struct gmem *session)
{
	return session ? 0 : gmem_fail(-EINVAL, "session: is NULL");
}

static bool has_ring(const struct gmem *session)
{
	return gmem_link_has_ring(session->link);
}

static int call_range(struct gmem *session, const char *op, uint16_t ring_op, const int *hnid, const void *va,
		      size_t bytes)
{
	struct gmem_ring_sqe sqe = { .op = ring_op, .hnid = gmem_ring_hnid(hnid ? *hnid : 0), .va = address(va),
				     .bytes = bytes };
	struct gmem_request request;
	int err = check_session(session);

	if (err)
		return err;
	if (has_ring(session))
		return gmem_session_call(session, &sqe, NULL);
	gmem_request_init(&request, op, hnid ? 3 : 2);
	if (hnid)
		gmem_request_int(&request, "hnid", *hnid);
	gmem_request_uint(&request, "va", address(va));
	gmem_request_uint(&request, "bytes", bytes);
	return gmem_rpc_call(session->rpc, &request, NULL);
}

/* ---- mapping ---- */

struct grant {
	uint64_t va, bytes, offset;
	bool huge;
	bool kept; /* mapped already, and committed */
};

static int reserve_by_ring(struct gmem *session, size_t bytes, const struct gmem_mmap_options *options, uint64_t above,
			   struct grant *ret)
{
	struct gmem_ring_sqe sqe = { .op = GMEM_RING_MMAP, .bytes = bytes, .arg = options->page_bytes, .va = above };
	struct gmem_ring_cqe cqe;
	int err;

	sqe.flags |= options->flags & GMEM_MMAP_NO_INHERIT ? GMEM_RING_NO_INHERIT : 0;
	sqe.flags |= GMEM_RING_KEEP | (options->flags & GMEM_MMAP_SMALL ? GMEM_RING_SMALL : 0);
	err = gmem_session_call(session, &sqe, &cqe);
	if (!err)
		*ret = (struct grant){ cqe.values[GMEM_RING_VA], cqe.values[GMEM_RING_LENGTH],
				       cqe.values[GMEM_RING_OFFSET], cqe.values[GMEM_RING_HUGE],
				       cqe.values[GMEM_RING_KEPT] };
	return err;
}

static int reserve(struct gmem *session, size_t bytes, const struct gmem_mmap_options *options, uint64_t above,
		   struct grant *ret)
{
	struct gmem_request request;
	struct gmem_reply reply;
	const msgpack_object *root;
	int err;

	if (has_ring(session))
		return reserve_by_ring(session, bytes, options, above, ret);
	gmem_request_init(&request, "mmap", 5);
	gmem_request_uint(&request, "bytes", bytes);
	gmem_request_uint(&request, "page_bytes", options->page_bytes);
	gmem_request_str(&request, "fork", options->flags & GMEM_MMAP_NO_INHERIT ? "none" : "share");
	gmem_request_bool(&request, "small", options->flags & GMEM_MMAP_SMALL);
	gmem_request_uint(&request, "above", above);
	err = gmem_rpc_call(session->rpc, &request, &reply);
	if (err)
		return err;
	root = gmem_reply_root(&reply);
	ret->kept = false;
	if (gmem_map_uint(root, "va", &ret->va) || gmem_map_uint(root, "bytes", &ret->bytes) ||
	    gmem_map_uint(root, "offset", &ret->offset) || gmem_map_bool(root, "huge", &ret->huge))
		err = gmem_fail(-EPROTO, "mmap: gmemd's reply can't be read");
	gmem_reply_deinit(&reply);
	return err;
}

/* Reserves and maps. A range that is in use in this process is given back, and the next one is sought twice as far away:
 * what is there, another gmemd's with the same window, can be large. */
static int reserve_and_map(struct gmem *session, size_t bytes, const struct gmem_mmap_options *options,
			   struct grant *ret)
{
	bool inherit = !(options->flags & GMEM_MMAP_NO_INHERIT);
	struct grant got;
	uint64_t above = 0;
	int err;

	for (int tries = 0;; tries++) {
		err = reserve(session, bytes, options, above, &got);
		if (err)
			return err;
		err = got.kept ? gmem_link_reuse(session->link, got.va, got.bytes) :
				 gmem_link_map(session->link, got.va, got.bytes, got.offset, got.huge, inherit);
		if (!err)
			break;
		call_range(session, "munmap", GMEM_RING_MUNMAP, NULL, (void *)(uintptr_t)got.va, got.bytes);
		if (err != -EEXIST || tries == BUSY_TRIES)
			return gmem_fail(err, "bytes: %zu bytes can't be mapped at 0x%llx: %s", bytes,
					 (unsigned long long)got.va, strerror(-err));
		above = got.va + (got.bytes << (tries < FAR_SHIFT ? tries : FAR_SHIFT));
	}
	*ret = got;
	return 0;
}

int gmem_session_commit(struct gmem *session, uint64_t va)
{
	struct gmem_ring_sqe sqe = { .op = GMEM_RING_MMAP_COMMIT, .va = va };
	struct gmem_request request;

	if (has_ring(session))
		return gmem_session_call(session, &sqe, NULL);
	gmem_request_init(&request, "mmap_commit", 1);
	gmem_request_uint(&request, "va", va);
	return gmem_rpc_call(session->rpc, &request, NULL);
}

static int check_mmap(struct gmem *session, const struct gmem_mmap_options *options, void **ret)
{
	const uint32_t known = GMEM_MMAP_NO_INHERIT | GMEM_MMAP_SMALL;
	int err = check_session(session);

	if (!err && !ret)
		err = gmem_fail(-EINVAL, "ret: is NULL");
	if (!err)
		err = gmem_check_options(options->size, sizeof(*options), "gmem_mmap_options");
	if (!err && (options->flags & ~known))
		err = gmem_fail(-EINVAL, "options: flags 0x%x are not known", options->flags & ~known);
	if (!err && options->reserved)
		err = gmem_fail(-EINVAL, "options: reserved is not zero");
	return err;
}

/* What was mapped and can't be used: gone, with the words of the failure kept. */
static int undo(struct gmem *session, const struct grant *region, int err)
{
	char why[384];

	snprintf(why, sizeof(why), "%s", gmem_last_error());
	pthread_rwlock_wrlock(&session->mapping);
	gmem_link_unmap(session->link, region->va, region->bytes);
	call_range(session, "munmap", GMEM_RING_MUNMAP, NULL, (void *)(uintptr_t)region->va, region->bytes);
	pthread_rwlock_unlock(&session->mapping);
	return gmem_fail(err, "%s", why);
}

int gmem_mmap(struct gmem *session, size_t bytes, const struct gmem_mmap_options *options, void **ret)
{
	const struct gmem_mmap_options defaults = { .size = sizeof(defaults) };
	struct grant region;
	bool mapped;
	int err;

	options = options ? options : &defaults;
	err = check_mmap(session, options, ret);
	if (!err)
		err = gmem_check_bytes(bytes);
	if (err)
		return err;
	pthread_rwlock_rdlock(&session->mapping);
	err = reserve_and_map(session, bytes, options, &region);
	mapped = !err;
	if (mapped && !region.kept)
		err = gmem_session_commit(session, region.va);
	pthread_rwlock_unlock(&session->mapping);
	if (mapped && err)
		err = undo(session, &region, err);
	if (!err)
		*ret = (void *)(uintptr_t)region.va;
	return err;
}

static int query_once(struct gmem *session, uint64_t va, uint64_t bytes, struct gmem_page *pages, size_t capacity,
		      uint64_t *ret_page_bytes, size_t *ret_count)
{
	struct gmem_request request;
	struct gmem_reply reply;
	const msgpack_object *data;
	int err;

	gmem_request_init(&request, "query", 2);
	gmem_request_uint(&request, "va", va);
	gmem_request_uint(&request, "bytes", bytes);
	err = gmem_rpc_call(session->rpc, &request, &reply);
	if (err)
		return err;
	data = gmem_map_get(gmem_reply_root(&reply), "pages");
	if (!data || data->type != MSGPACK_OBJECT_BIN || data->via.bin.size % sizeof(*pages) ||
	    gmem_map_uint(gmem_reply_root(&reply), "page_bytes", ret_page_bytes)) {
		err = gmem_fail(-EPROTO, "query: gmemd's reply can't be read");
	} else {
		size_t count = data->via.bin.size / sizeof(*pages);

		if (capacity)
			memcpy(pages, data->via.bin.ptr, (count < capacity ? count : capacity) * sizeof(*pages));
		*ret_count = count;
	}
	gmem_reply_deinit(&reply);
	return err;
}

static int page_bytes_at(struct gmem *session, uint64_t va, uint64_t *ret)
{
	struct gmem_ring_sqe sqe = { .op = GMEM_RING_REGION, .va = va };
	struct gmem_ring_cqe cqe;
	size_t count;
	int err;

	if (!has_ring(session))
		return query_once(session, va, 1, NULL, 0, ret, &count);
	err = gmem_session_call(session, &sqe, &cqe);
	if (!err)
		*ret = cqe.values[GMEM_RING_PAGE_BYTES];
	return err;
}

/* Whole pages go: the end is rounded up to the page size of the region that it lies in. */
static int round_end(struct gmem *session, uint64_t va, size_t bytes, uint64_t *ret_bytes)
{
	uint64_t end = va + bytes, page_bytes;
	int err = 0;

	if (end % HUGE_BYTES) { /* else it is right for every page size */
		err = page_bytes_at(session, end - 1, &page_bytes);
		if (!err)
			end = (end + page_bytes - 1) & ~(page_bytes - 1);
	}
	*ret_bytes = end - va;
	return err;
}

static bool in_window(const struct gmem *session, uint64_t va)
{
	return va - gmem_link_window_base(session->link) < gmem_link_window_bytes(session->link);
}

/* munmap(2) takes any range of this process: what is not ours must not get there. */
static int check_munmap(struct gmem *session, const void *va, size_t bytes)
{
	uint64_t base, window;
	int err = check_session(session);

	if (!err)
		err = gmem_check_bytes(bytes);
	if (err)
		return err;
	base = gmem_link_window_base(session->link);
	window = gmem_link_window_bytes(session->link);
	if (address(va) % SMALL_BYTES)
		return gmem_fail(-EINVAL, "va: %p is not a multiple of %llu", va, SMALL_BYTES);
	if (!in_window(session, address(va)) && gmem_copies_cover(session->link, address(va), bytes))
		return 0;
	if (address(va) < base || address(va) - base >= window || bytes > window - (address(va) - base))
		return gmem_fail(-EINVAL, "va: %p + %zu is not memory of gmem", va, bytes);
	return 0;
}

/* False: it has to be unmapped. */
static bool keep(struct gmem *session, uint64_t va, uint64_t bytes)
{
	struct gmem_ring_sqe sqe = { .op = GMEM_RING_MUNMAP, .flags = GMEM_RING_KEEP, .va = va, .bytes = bytes };

	if (!has_ring(session) || !gmem_link_may_keep(session->link, va, bytes) ||
	    gmem_session_call(session, &sqe, NULL))
		return false;
	gmem_link_kept(session->link, va, bytes);
	return true;
}

static int unmap(struct gmem *session, uint64_t va, uint64_t bytes)
{
	int err = gmem_link_unmap(session->link, va, bytes);

	if (err)
		return gmem_fail(err, "va: munmap of %p: %s", (void *)(uintptr_t)va, strerror(-err));
	if (!in_window(session, va)) /* adopted: the event says it all */
		return 0;
	return call_range(session, "munmap", GMEM_RING_MUNMAP, NULL, (void *)(uintptr_t)va, bytes);
}

int gmem_session_munmap(struct gmem *session, void *va, size_t bytes, bool may_keep)
{
	uint64_t whole;
	int err = check_munmap(session, va, bytes);

	if (err)
		return err;
	pthread_rwlock_wrlock(&session->mapping);
	whole = (bytes + SMALL_BYTES - 1) & ~(SMALL_BYTES - 1); /* of what was adopted, every page is the program's choice */
	err = in_window(session, address(va)) ? round_end(session, address(va), bytes, &whole) : 0;
	if (!err)
		err = gmem_session_check(session); /* without gmemd, munmap(2) would not return */
	if (!err && session->cover && gmem_link_is_pooled(session->link, address(va), whole))
		err = session->cover(session, address(va), whole);
	if (!err && !(may_keep && keep(session, address(va), whole)))
		err = unmap(session, address(va), whole);
	pthread_rwlock_unlock(&session->mapping);
	return err;
}

int gmem_munmap(struct gmem *session, void *va, size_t bytes)
{
	return gmem_session_munmap(session, va, bytes, true);
}

/* ---- files ---- */

static int check_map_file(struct gmem *session, uint64_t offset, size_t bytes,
			  const struct gmem_map_file_options *options, void **ret)
{
	const uint32_t known = GMEM_MAP_FILE_WRITE | GMEM_MAP_FILE_PRIVATE | GMEM_MAP_FILE_NO_INHERIT;
	int err = check_session(session);

	if (!err && !ret)
		err = gmem_fail(-EINVAL, "ret: is NULL");
	if (!err)
		err = gmem_check_options(options->size, sizeof(*options), "gmem_map_file_options");
	if (!err && (options->flags & ~known))
		err = gmem_fail(-EINVAL, "options: flags 0x%x are not known", options->flags & ~known);
	if (!err && (options->flags & GMEM_MAP_FILE_WRITE) && (options->flags & GMEM_MAP_FILE_PRIVATE))
		err = gmem_fail(-EINVAL, "options: flags have both WRITE and PRIVATE");
	if (!err && options->reserved)
		err = gmem_fail(-EINVAL, "options: reserved is not zero");
	if (!err && offset % SMALL_BYTES)
		err = gmem_fail(-EINVAL, "offset: %llu is not a multiple of %llu", (unsigned long long)offset, SMALL_BYTES);
	if (!err)
		err = gmem_check_bytes(bytes);
	return err ? err : gmem_session_check(session);
}

/* Reserves and maps; see reserve_and_map(). */
static int give_and_map(struct gmem *session, int fd, uint64_t offset, size_t bytes,
			const struct gmem_map_file_options *options, struct grant *ret)
{
	bool inherit = !(options->flags & GMEM_MAP_FILE_NO_INHERIT);
	uint32_t flags = (options->flags & GMEM_MAP_FILE_WRITE ? GMEM_WIRE_FILE_WRITE : 0) |
			 (options->flags & GMEM_MAP_FILE_PRIVATE ? GMEM_WIRE_FILE_PRIVATE : 0) |
			 (inherit ? 0 : GMEM_WIRE_FILE_NO_INHERIT);
	char message[GMEM_WIRE_MESSAGE_BYTES] = "";
	struct gmem_wire_region busy[BUSY_RANGES_MAX], got;
	size_t count = 0;
	int err;

	do {
		err = gmem_link_give_file(session->link, fd, offset, bytes, (uint32_t)options->page_bytes, flags, &got, message);
		if (err)
			break;
		err = gmem_link_map(session->link, got.va, got.bytes, got.offset, false, inherit);
		if (err) {
			snprintf(message, sizeof(message), "bytes: %zu bytes can't be mapped at 0x%llx: %s", bytes,
				 (unsigned long long)got.va, strerror(-err));
			busy[count++] = got;
		}
	} while (err == -EEXIST && count < BUSY_RANGES_MAX);
	for (size_t i = 0; i < count; i++)
		call_range(session, "munmap", GMEM_RING_MUNMAP, NULL, (void *)(uintptr_t)busy[i].va, busy[i].bytes);
	if (err)
		return gmem_fail(err, "%s", message);
	*ret = (struct grant){ .va = got.va, .bytes = got.bytes, .offset = got.offset };
	return 0;
}

int gmem_map_file(struct gmem *session, int fd, uint64_t offset, size_t bytes, const struct gmem_map_file_options *options,
		  void **ret)
{
	const struct gmem_map_file_options defaults = { .size = sizeof(defaults) };
	struct grant region;
	bool mapped;
	int err;

	options = options ? options : &defaults;
	err = check_map_file(session, offset, bytes, options, ret);
	if (err)
		return err;
	pthread_rwlock_rdlock(&session->mapping);
	err = give_and_map(session, fd, offset, bytes, options, &region);
	mapped = !err;
	if (mapped)
		err = gmem_session_commit(session, region.va);
	if (!err && !(options->flags & (GMEM_MAP_FILE_WRITE | GMEM_MAP_FILE_PRIVATE)) &&
	    gmem_sys_mprotect((void *)(uintptr_t)region.va, region.bytes, PROT_READ))
		err = gmem_fail(-errno, "mprotect: %s", strerror(errno));
	pthread_rwlock_unlock(&session->mapping);
	if (mapped && err)
		err = undo(session, &region, err);
	if (!err)
		*ret = (void *)(uintptr_t)region.va;
	return err;
}

int gmem_flush(struct gmem *session, void *va, size_t bytes)
{
	struct gmem_request request;
	int err = check_session(session);

	if (err)
		return err;
	gmem_request_init(&request, "flush", 2);
	gmem_request_uint(&request, "va", address(va));
	gmem_request_uint(&request, "bytes", bytes);
	return gmem_rpc_call(session->rpc, &request, NULL);
}

/* ---- adopting ---- */

static int check_adopt(struct gmem *session, size_t bytes, const struct gmem_adopt_options *options,
		       struct gmem_range *ret)
{
	int err = check_session(session);

	if (!err && !ret)
		err = gmem_fail(-EINVAL, "ret: is NULL");
	if (!err)
		err = gmem_check_options(options->size, sizeof(*options), "gmem_adopt_options");
	if (!err && (options->flags & ~GMEM_ADOPT_EDGES))
		err = gmem_fail(-EINVAL, "options: flags 0x%x are not known", options->flags & ~GMEM_ADOPT_EDGES);
	if (!err && options->reserved)
		err = gmem_fail(-EINVAL, "options: reserved is not zero");
	if (!err)
		err = gmem_check_bytes(bytes);
	return err ? err : gmem_session_check(session);
}

int gmem_adopt(struct gmem *session, void *va, size_t bytes, const struct gmem_adopt_options *options,
	       struct gmem_range *ret)
{
	const struct gmem_adopt_options defaults = { .size = sizeof(defaults) };
	char message[GMEM_WIRE_MESSAGE_BYTES] = "";
	struct gmem_adoption adoption;
	int err;

	options = options ? options : &defaults;
	err = check_adopt(session, bytes, options, ret);
	if (err)
		return err;
	pthread_rwlock_wrlock(&session->mapping);
	err = gmem_link_adopt_begin(session->link, address(va), bytes, options->page_bytes,
				    options->flags & GMEM_ADOPT_EDGES, &adoption, message);
	if (err) {
		gmem_fail(err, "%s", message);
	} else {
		err = gmem_contexts_map(session, adoption.va, adoption.bytes, adoption.offset);
		if (err) {
			gmem_link_adopt_cancel(session->link, &adoption);
		} else {
			gmem_adopted_some();
			err = gmem_link_adopt_finish(session->link, &adoption, message);
			*ret = (struct gmem_range){ (void *)(uintptr_t)adoption.va, adoption.done };
			if (err)
				gmem_fail(err, "%s", message);
		}
	}
	pthread_rwlock_unlock(&session->mapping);
	return err;
}

/* ---- placement ---- */

static const char *advice_word(int advice)
{
	switch (advice) {
	case GMEM_ADVISE_DISCARD:
		return "discard";
	case GMEM_ADVISE_PREFETCH:
		return "prefetch";
	case GMEM_ADVISE_PINNED:
		return "pinned";
	case GMEM_ADVISE_UNPINNED:
		return "unpinned";
	case GMEM_ADVISE_READ_MOSTLY:
		return "read_mostly";
	case GMEM_ADVISE_NO_READ_MOSTLY:
		return "no_read_mostly";
	case GMEM_ADVISE_PREFERRED:
		return "preferred";
	case GMEM_ADVISE_COLD:
		return "cold";
	case GMEM_ADVISE_ACCESSED_BY:
		return "accessed_by";
	case GMEM_ADVISE_NOT_ACCESSED_BY:
		return "not_accessed_by";
	case GMEM_PEER_FREEZE:
		return "freeze";
	case GMEM_PEER_THAW:
		return "thaw";
	default:
		return NULL;
	}
}

int gmem_hmadvise(struct gmem *session, int hnid, void *va, size_t bytes, int advice)
{
	struct gmem_ring_sqe sqe = { .op = GMEM_RING_ADVISE, .hnid = gmem_ring_hnid(hnid), .va = address(va),
				     .bytes = bytes, .arg = (uint64_t)advice };
	struct gmem_request request;
	int err = check_session(session);

	if (err)
		return err;
	if (!advice_word(advice))
		return gmem_fail(-EINVAL, "advice: 0x%x is not known", (unsigned)advice);
	if (has_ring(session))
		return gmem_session_call(session, &sqe, NULL);
	gmem_request_init(&request, "advise", 4);
	gmem_request_int(&request, "hnid", hnid);
	gmem_request_uint(&request, "va", address(va));
	gmem_request_uint(&request, "bytes", bytes);
	gmem_request_str(&request, "advice", advice_word(advice));
	return gmem_rpc_call(session->rpc, &request, NULL);
}

int gmem_hmemcpy(struct gmem *session, int hnid, void *dst, const void *src, size_t bytes)
{
	struct gmem_ring_sqe sqe = { .op = GMEM_RING_HMEMCPY, .hnid = gmem_ring_hnid(hnid), .va = address(dst),
				     .bytes = bytes, .arg = address(src) };
	struct gmem_request request;
	int err = check_session(session);

	if (err)
		return err;
	if (has_ring(session))
		return gmem_session_call(session, &sqe, NULL);
	gmem_request_init(&request, "hmemcpy", 4);
	gmem_request_int(&request, "hnid", hnid);
	gmem_request_uint(&request, "dst", address(dst));
	gmem_request_uint(&request, "src", address(src));
	gmem_request_uint(&request, "bytes", bytes);
	return gmem_rpc_call(session->rpc, &request, NULL);
}

int gmem_prefetch(struct gmem *session, int hnid, void *va, size_t bytes)
{
	return call_range(session, "prefetch", GMEM_RING_PREFETCH, &hnid, va, bytes);
}

int gmem_discard(struct gmem *session, void *va, size_t bytes)
{
	return call_range(session, "discard", GMEM_RING_DISCARD, NULL, va, bytes);
}

int gmem_query(struct gmem *session, const void *va, size_t bytes, struct gmem_page *pages, size_t capacity,
	       size_t *ret)
{
	uint64_t at = address(va), end = at + bytes, page_bytes;
	size_t total = 0;
	int err = check_session(session);

	if (!err)
		err = gmem_check_bytes(bytes);
	if (!err && end < at)
		err = gmem_fail(-EINVAL, "bytes: %p + %zu ends beyond the address space", va, bytes);
	if (!err && (!ret || (capacity && !pages)))
		err = gmem_fail(-EINVAL, "%s: is NULL", ret ? "pages" : "ret");
	while (!err && at < end) {
		uint64_t stop = (at / QUERY_BYTES_MAX + 1) * QUERY_BYTES_MAX;
		size_t left = capacity > total ? capacity - total : 0, count;

		stop = stop < end ? stop : end;
		err = query_once(session, at, stop - at, left ? pages + total : NULL, left, &page_bytes, &count);
		total += err ? 0 : count;
		at = stop;
	}
	if (!err)
		*ret = total;
	return err;
}
