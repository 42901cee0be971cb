/* SPDX-License-Identifier: Apache-2.0
 *
 * Contexts in clients' processes: what is mapped there, and the channel to the thread that does it. Steps are queued and
 * sent in batches; batches are in flight while the next is made; a flush waits for the answers. A process that does not
 * answer within the device's patience, or fails, loses its context: its channel ends, which tells it to unmap everything,
 * and here it has nothing mapped any more.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <gmem/sparse.h>
#include <gmem/stats.h>

#include "cuda_pmap.h"

#define IN_FLIGHT_MAX 16 /* batches: their answers always fit the socket */

void gmem_cuda_pmap_unref(struct gmem_pmap *pmap)
{
	if (atomic_fetch_sub(&pmap->refs, 1) != 1)
		return;
	if (pmap->fd >= 0)
		close(pmap->fd);
	gmem_sparse_unmap(pmap->frame_at, (GMEM_CUDA_VA_END >> GMEM_CUDA_SHIFT) * sizeof(*pmap->frame_at));
	gmem_mutex_deinit(&pmap->lock);
	gmem_cuda_unref(pmap->gpu);
	free(pmap);
}

/* ---- imports ---- */

struct gmem_cuda_import *gmem_cuda_find_import(struct gmem_pmap *pmap, uint32_t frame)
{
	struct gmem_device *gpu = pmap->gpu;
	struct gmem_cuda_import *import;

	gmem_mutex_lock(&gpu->lock);
	for (import = gpu->frames[frame].imports; import && import->pmap != pmap; import = import->next)
		;
	gmem_mutex_unlock(&gpu->lock);
	return import;
}

struct gmem_cuda_import *gmem_cuda_add_import(struct gmem_pmap *pmap, uint32_t frame, uint64_t owner)
{
	struct gmem_cuda_import *import = malloc(sizeof(*import));
	struct gmem_device *gpu = pmap->gpu;

	if (!import)
		return NULL;
	*import = (struct gmem_cuda_import){ .pmap = pmap, .frame = frame };
	atomic_fetch_add(&pmap->refs, 1);
	gmem_mutex_lock(&gpu->lock);
	import->next = gpu->frames[frame].imports;
	gpu->frames[frame].imports = import;
	if (pmap->as_id != owner) {
		gpu->frames[frame].foreign = true;
		gmem_cuda_note_foreign(gpu, frame);
	}
	import->behind = pmap->imports;
	if (pmap->imports)
		pmap->imports->before = import;
	pmap->imports = import;
	gmem_mutex_unlock(&gpu->lock);
	return import;
}

/* With the device lock. The pmap has another reference. */
static void drop_import_locked(struct gmem_cuda_import *import)
{
	struct gmem_pmap *pmap = import->pmap;
	struct gmem_cuda_import **at = &pmap->gpu->frames[import->frame].imports;

	while (*at != import)
		at = &(*at)->next;
	*at = import->next;
	if (import->behind)
		import->behind->before = import->before;
	if (import->before)
		import->before->behind = import->behind;
	else
		pmap->imports = import->behind;
	free(import);
	atomic_fetch_sub(&pmap->refs, 1);
}

static void drop_import(struct gmem_pmap *pmap, struct gmem_cuda_import *import)
{
	gmem_mutex_lock(&pmap->gpu->lock);
	drop_import_locked(import);
	gmem_mutex_unlock(&pmap->gpu->lock);
}

/* ---- the channel ---- */

static void close_fds_locked(struct gmem_pmap *pmap)
{
	while (pmap->fd_count)
		close(pmap->fds[--pmap->fd_count]);
}

/* From here on every op says so. */
int gmem_cuda_pmap_fail_locked(struct gmem_pmap *pmap)
{
	if (!pmap->dead) {
		pmap->dead = true;
		shutdown(pmap->fd, SHUT_RDWR);
		close_fds_locked(pmap);
		pmap->batch.count = 0;
		gmem_mutex_lock(&pmap->gpu->lock);
		while (pmap->imports)
			drop_import_locked(pmap->imports);
		gmem_mutex_unlock(&pmap->gpu->lock);
	}
	return -EOWNERDEAD;
}

bool gmem_cuda_pmap_wait(struct gmem_pmap *pmap, short events, uint64_t until)
{
	struct pollfd socket = { .fd = pmap->fd, .events = events };
	uint64_t now = gmem_now_ns();
	int n;

	do { /* what is there already is, however late it is */
		n = poll(&socket, 1, now < until ? (int)((until - now) / 1000000) + 1 : 0);
		if (n < 0 && errno == EINTR)
			n = 0;
		now = gmem_now_ns();
	} while (!n && now < until);
	return n > 0;
}

static bool wait_for(struct gmem_pmap *pmap, short events)
{
	return gmem_cuda_pmap_wait(pmap, events, gmem_now_ns() + pmap->gpu->patience_ms * 1000000);
}

static int take_answer_locked(struct gmem_pmap *pmap)
{
	struct gmem_channel_done done;
	ssize_t n;

	if (!wait_for(pmap, POLLIN)) {
		gmem_cuda_say(pmap->gpu, "a context's process did not answer", 0);
		return gmem_cuda_pmap_fail_locked(pmap);
	}
	n = recv(pmap->fd, &done, sizeof(done), MSG_DONTWAIT);
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return 0;
	if (n != sizeof(done) || done.sequence != pmap->answered + 1)
		return gmem_cuda_pmap_fail_locked(pmap);
	if (done.status) {
		gmem_cuda_say(pmap->gpu, "a context's process", done.error);
		return gmem_cuda_pmap_fail_locked(pmap);
	}
	pmap->answered++;
	return 0;
}

static int send_batch_locked(struct gmem_pmap *pmap)
{
	struct iovec part = { &pmap->batch, offsetof(struct gmem_channel_batch, steps) +
						    pmap->batch.count * sizeof(struct gmem_channel_step) };
	union {
		struct cmsghdr head;
		char room[CMSG_SPACE(GMEM_CHANNEL_STEPS * sizeof(int))];
	} control;
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1 };
	int err = 0;

	if (!pmap->batch.count)
		return 0;
	while (!err && pmap->sent - pmap->answered >= IN_FLIGHT_MAX)
		err = take_answer_locked(pmap);
	if (err)
		return err;
	if (pmap->fd_count) {
		message.msg_control = &control;
		message.msg_controllen = CMSG_SPACE(pmap->fd_count * sizeof(int));
		memset(&control, 0, message.msg_controllen);
		control.head = (struct cmsghdr){ .cmsg_len = CMSG_LEN(pmap->fd_count * sizeof(int)),
						 .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS };
		memcpy(CMSG_DATA(&control.head), pmap->fds, pmap->fd_count * sizeof(int));
	}
	pmap->batch.sequence = pmap->sent + 1;
	while (sendmsg(pmap->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT) < 0) {
		if (errno == EINTR)
			continue;
		if (errno != EAGAIN || !wait_for(pmap, POLLOUT))
			return gmem_cuda_pmap_fail_locked(pmap);
	}
	pmap->sent++;
	pmap->batch.count = 0;
	close_fds_locked(pmap);
	return 0;
}

static int flush_locked(struct gmem_pmap *pmap)
{
	int err = pmap->dead ? -EOWNERDEAD : send_batch_locked(pmap);

	while (!err && pmap->answered < pmap->sent)
		err = take_answer_locked(pmap);
	return err;
}

int gmem_cuda_pmap_queue_locked(struct gmem_pmap *pmap, enum gmem_channel_op op, uint32_t frame, uint64_t va, bool writable)
{
	int err = pmap->dead ? -EOWNERDEAD : 0;

	if (!err && pmap->batch.count == GMEM_CHANNEL_STEPS)
		err = send_batch_locked(pmap);
	if (!err)
		pmap->batch.steps[pmap->batch.count++] = (struct gmem_channel_step){ .op = op, .frame = frame, .va = va,
										     .writable = writable };
	return err;
}

/* ---- mapping ---- */

static int unmap_locked(struct gmem_pmap *pmap, struct gmem_cuda_import *import)
{
	uint64_t va = import->va;

	*gmem_cuda_pmap_at(pmap, va) = 0;
	import->va = 0;
	return gmem_cuda_pmap_queue_locked(pmap, GMEM_CHANNEL_UNMAP, import->frame, va, false);
}

static struct gmem_cuda_import *mapped_at(struct gmem_pmap *pmap, uint64_t va)
{
	uint32_t frame = *gmem_cuda_pmap_at(pmap, va);

	return frame ? gmem_cuda_find_import(pmap, frame - 1) : NULL;
}

static int import_locked(struct gmem_pmap *pmap, uint32_t frame, uint64_t owner, struct gmem_cuda_import **ret)
{
	int fd, err = gmem_cuda_frame_fd(pmap->gpu, frame, &fd);

	if (err)
		return err;
	err = gmem_cuda_pmap_queue_locked(pmap, GMEM_CHANNEL_IMPORT, frame, 0, false);
	if (err) {
		close(fd);
		return err;
	}
	pmap->fds[pmap->fd_count++] = fd;
	*ret = gmem_cuda_add_import(pmap, frame, owner);
	return *ret ? 0 : gmem_cuda_pmap_fail_locked(pmap);
}

static int map_locked(struct gmem_pmap *pmap, uint64_t va, struct gmem_mem *mem, uint64_t offset, bool writable)
{
	uint32_t frame = gmem_cuda_mem_frame(mem, offset);
	struct gmem_cuda_import *import, *other = mapped_at(pmap, va);
	int err = 0;

	if (frame == GMEM_CUDA_NONE)
		return -ENOENT;
	import = gmem_cuda_find_import(pmap, frame);
	if (other && other == import && (import->writable || !writable))
		return 0;
	if (other && other != import)
		err = unmap_locked(pmap, other);
	if (!err && import && import->va && import->va != va) /* it has moved */
		err = unmap_locked(pmap, import);
	if (!err && !import)
		err = import_locked(pmap, frame, mem->owner, &import);
	if (!err)
		err = gmem_cuda_pmap_queue_locked(pmap, import->va ? GMEM_CHANNEL_PROTECT : GMEM_CHANNEL_MAP, frame, va, writable);
	if (err)
		return err;
	import->va = va;
	import->writable = writable;
	*gmem_cuda_pmap_at(pmap, va) = frame + 1;
	return 0;
}

static int check_range(struct gmem_range range)
{
	return (range.va | range.bytes) & (GMEM_CUDA_BYTES - 1) || range.va >= GMEM_CUDA_VA_END || range.bytes > GMEM_CUDA_VA_END - range.va ?
		       -EOPNOTSUPP : 0;
}

int gmem_cuda_pmap_map(struct gmem_pmap *pmap, struct gmem_range range, struct gmem_mem *mem, uint64_t offset,
		       enum gmem_prot prot)
{
	int err = check_range(range);

	gmem_mutex_lock(&pmap->lock);
	if (!err && pmap->dead)
		err = -EOWNERDEAD;
	for (uint64_t done = 0; !err && done < range.bytes; done += GMEM_CUDA_BYTES)
		err = map_locked(pmap, range.va + done, mem, offset + done, prot == GMEM_PROT_WRITE);
	gmem_mutex_unlock(&pmap->lock);
	return err;
}

/* Those that are writable, or all. */
static int take_away_locked(struct gmem_pmap *pmap, struct gmem_range range, bool all)
{
	uint64_t va = range.va & ~(GMEM_CUDA_BYTES - 1), end = range.va + range.bytes;
	int err = pmap->dead ? -EOWNERDEAD : 0;

	for (; !err && va < end && va < GMEM_CUDA_VA_END; va += GMEM_CUDA_BYTES) {
		struct gmem_cuda_import *import = mapped_at(pmap, va);

		if (import && (all || import->writable))
			err = unmap_locked(pmap, import);
	}
	return err;
}

int gmem_cuda_pmap_release(struct gmem_pmap *pmap, struct gmem_range range)
{
	int err;

	gmem_mutex_lock(&pmap->lock);
	err = take_away_locked(pmap, range, true);
	gmem_mutex_unlock(&pmap->lock);
	return err;
}

/* Making a translation read-only costs what removing it does, and most that lose their write access are about to go. */
int gmem_cuda_pmap_protect(struct gmem_pmap *pmap, struct gmem_range range, enum gmem_prot prot)
{
	int err;

	if (prot != GMEM_PROT_READ)
		return -EOPNOTSUPP;
	gmem_mutex_lock(&pmap->lock);
	err = take_away_locked(pmap, range, false);
	if (!err)
		err = flush_locked(pmap);
	gmem_mutex_unlock(&pmap->lock);
	return err;
}

int gmem_cuda_pmap_flush(struct gmem_pmap *pmap)
{
	int err;

	gmem_mutex_lock(&pmap->lock);
	err = flush_locked(pmap);
	gmem_mutex_unlock(&pmap->lock);
	return err;
}

/* ---- frames that go ---- */

/* The next context behind that one, by address, that has imported any of them; referenced. */
static struct gmem_pmap *next_pmap(struct gmem_device *gpu, const uint32_t *frames, size_t count, const struct gmem_pmap *last)
{
	struct gmem_pmap *next = NULL;

	gmem_mutex_lock(&gpu->lock);
	for (size_t i = 0; i < count; i++)
		for (struct gmem_cuda_import *import = gpu->frames[frames[i]].imports; import; import = import->next)
			if (import->pmap > last && (!next || import->pmap < next))
				next = import->pmap;
	if (next)
		atomic_fetch_add(&next->refs, 1);
	gmem_mutex_unlock(&gpu->lock);
	return next;
}

static void revoke_in(struct gmem_pmap *pmap, const uint32_t *frames, size_t count, bool forget)
{
	int err = 0;

	gmem_mutex_lock(&pmap->lock);
	for (size_t i = 0; !err && i < count; i++) {
		struct gmem_cuda_import *import = gmem_cuda_find_import(pmap, frames[i]);

		if (import && import->va)
			err = unmap_locked(pmap, import);
		if (import && !err && forget) {
			err = gmem_cuda_pmap_queue_locked(pmap, GMEM_CHANNEL_FORGET, frames[i], 0, false);
			if (!err)
				drop_import(pmap, import);
		}
	}
	flush_locked(pmap);
	gmem_mutex_unlock(&pmap->lock);
}

void gmem_cuda_revoke(struct gmem_device *gpu, const uint32_t *frames, size_t count, bool forget)
{
	struct gmem_pmap *pmap = NULL, *last;

	while (last = pmap, (pmap = next_pmap(gpu, frames, count, last))) {
		revoke_in(pmap, frames, count, forget);
		gmem_cuda_pmap_unref(pmap); /* its address is still good to go on from */
	}
}

/* ---- life ---- */

static int say_hello(struct gmem_pmap *pmap)
{
	struct gmem_channel_hello hello = { .magic = GMEM_CHANNEL_MAGIC, .version = GMEM_CHANNEL_VERSION,
					    .frame_count = pmap->gpu->frame_max, .frame_bytes = GMEM_CUDA_BYTES };

	memcpy(hello.uuid, pmap->gpu->uuid, sizeof(hello.uuid));
	return send(pmap->fd, &hello, sizeof(hello), MSG_NOSIGNAL | MSG_DONTWAIT) < 0 ? -errno : 0;
}

int gmem_cuda_pmap_make(struct gmem_device *gpu, uint64_t as_id, int channel, struct gmem_pmap **ret)
{
	struct gmem_pmap *pmap = calloc(1, sizeof(*pmap));

	if (!pmap)
		return -ENOMEM;
	*pmap = (struct gmem_pmap){ .refs = 1, .gpu = gpu, .as_id = as_id, .fd = channel };
	pmap->frame_at = gmem_sparse_map((GMEM_CUDA_VA_END >> GMEM_CUDA_SHIFT) * sizeof(*pmap->frame_at));
	if (!pmap->frame_at) {
		free(pmap);
		return -ENOMEM;
	}
	gmem_mutex_init(&pmap->lock, GMEM_RANK_CHANNEL);
	gmem_cuda_ref(gpu);
	*ret = pmap;
	return 0;
}

/* The channel stays the caller's. */
void gmem_cuda_pmap_unmake(struct gmem_pmap *pmap)
{
	pmap->fd = -1;
	gmem_cuda_pmap_unref(pmap);
}

int gmem_cuda_pmap_open(struct gmem_device *gpu, uint64_t as_id, int channel, struct gmem_pmap **ret)
{
	struct gmem_pmap *pmap;
	int err = gmem_cuda_pmap_make(gpu, as_id, channel, &pmap);

	if (err)
		return err;
	err = say_hello(pmap);
	if (err)
		gmem_cuda_pmap_unmake(pmap);
	else
		*ret = pmap;
	return err;
}

void gmem_cuda_pmap_destroy(struct gmem_pmap *pmap)
{
	gmem_mutex_lock(&pmap->lock);
	gmem_cuda_pmap_fail_locked(pmap);
	gmem_mutex_unlock(&pmap->lock);
	gmem_cuda_pmap_unref(pmap);
}
