/* SPDX-License-Identifier: Apache-2.0
 *
 * A CUDA context: two threads beside the program's. One does what gmemd's driver asks over the channel: it imports frames,
 * maps them at the session's addresses and takes them away again. The other looks at events: when one has been reached,
 * what was acquired for the work before it is released, over the session's ring. Neither needs an interpreter's lock: a
 * thread that has it may be waiting, in a page fault, for the memory that is to be released.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <gmem_cuda_api.h>

#include "cuda.h"
#include "cuda_maps.h"
#include "link.h"
#include "ring.h"

#define HELLO_MS 30000
#define CLOSE_S 10
#define FRAMES_MAX (1u << 20) /* 2 TiB */
#define LOOK_NS 30000         /* how often events are looked at while there are some */
#define NEVER UINT64_MAX

struct frame {
	CUmemhandle handle; /* 0: not imported */
	uint64_t va;        /* 0: not mapped */
	uint32_t writable;
};

struct waiting {
	struct waiting *next;
	CUevent event; /* NULL: at once */
	uint64_t ticket;
	size_t count;
	uint64_t ranges[]; /* address and length, in turn */
};

struct gmem_cuda {
	const struct gmem_cuda_api *cu;
	struct gmem_link *session, *context;
	uint64_t id;
	pid_t owner;
	CUdevice device;
	int ordinal;
	CUcontext ctx;
	uint32_t frame_count;
	uint64_t frame_bytes;
	struct frame *frames; /* the mapper's */
	pthread_t mapper, releaser;
	pthread_mutex_t lock; /* guards what follows */
	pthread_cond_t change;
	struct waiting *first;
	uint64_t tickets, done; /* given, and how many from the first are released */
	uint64_t failed_from;   /* tickets from here on have failed */
	bool stop;
	int status;
	char what[GMEM_WIRE_MESSAGE_BYTES];
};

static void set_status(struct gmem_cuda *cuda, int status, const char *call, CUresult r)
{
	const char *name = NULL;

	pthread_mutex_lock(&cuda->lock);
	if (!cuda->status) {
		if (r && (cuda->cu->error_name(r, &name) || !name))
			name = "unknown error";
		cuda->status = status;
		snprintf(cuda->what, sizeof(cuda->what), "%s%s%s", call, name ? ": " : "", name ? name : "");
	}
	pthread_cond_broadcast(&cuda->change);
	pthread_mutex_unlock(&cuda->lock);
}

/* ---- the mapper ---- */

/* Access for what is mapped in a row is given in one call. */
struct run {
	uint64_t va, bytes;
	uint32_t writable;
};

static CUresult give_access(struct gmem_cuda *cuda, struct run *run)
{
	const CUmemAccessDesc access = {
		.location = { CU_MEM_LOCATION_TYPE_DEVICE, cuda->device },
		.flags = run->writable ? CU_MEM_ACCESS_FLAGS_PROT_READWRITE : CU_MEM_ACCESS_FLAGS_PROT_READ,
	};
	CUresult r = run->bytes ? cuda->cu->set_access(run->va, run->bytes, &access, 1) : CUDA_SUCCESS;

	run->bytes = 0;
	return r;
}

static CUresult extend(struct gmem_cuda *cuda, struct run *run, const struct gmem_channel_step *step)
{
	CUresult r = CUDA_SUCCESS;

	if (run->bytes && (run->va + run->bytes != step->va || run->writable != step->writable))
		r = give_access(cuda, run);
	if (!run->bytes)
		*run = (struct run){ step->va, 0, step->writable };
	run->bytes += cuda->frame_bytes;
	return r;
}

static CUresult take_away(struct gmem_cuda *cuda, struct frame *frame)
{
	CUresult r = gmem_cuda_maps_remove(cuda->cu, cuda->device, frame->va, cuda->frame_bytes, frame->writable);

	frame->va = 0;
	return r;
}

static CUresult let_go(struct gmem_cuda *cuda, struct frame *frame)
{
	CUresult r = frame->va ? take_away(cuda, frame) : CUDA_SUCCESS;

	if (!r && frame->handle)
		r = cuda->cu->release(frame->handle);
	frame->handle = 0;
	return r;
}

static CUresult do_step(struct gmem_cuda *cuda, struct run *run, const struct gmem_channel_step *step, int *fds,
			size_t fd_count, size_t *fds_used)
{
	const struct gmem_cuda_api *cu = cuda->cu;
	struct frame *frame = step->frame < cuda->frame_count ? &cuda->frames[step->frame] : NULL;
	bool access;
	CUresult r;

	if (!frame)
		return CUDA_ERROR_INVALID_VALUE;
	switch (step->op) {
	case GMEM_CHANNEL_IMPORT:
		if (*fds_used == fd_count || frame->handle)
			return CUDA_ERROR_INVALID_VALUE;
		return cu->import_fd(&frame->handle, (void *)(intptr_t)fds[(*fds_used)++],
				     CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
	case GMEM_CHANNEL_MAP:
		r = gmem_cuda_maps_add(cu, cuda->device, step->va, cuda->frame_bytes, frame->handle, step->writable, &access);
		if (r)
			return r;
		frame->va = step->va;
		frame->writable = step->writable;
		return access ? extend(cuda, run, step) : CUDA_SUCCESS;
	case GMEM_CHANNEL_PROTECT:
		access = gmem_cuda_maps_change(cuda->device, step->va, frame->writable, step->writable);
		frame->writable = step->writable;
		return access ? extend(cuda, run, step) : CUDA_SUCCESS;
	case GMEM_CHANNEL_UNMAP:
		r = give_access(cuda, run);
		return r || frame->va != step->va ? (r ? r : CUDA_ERROR_INVALID_VALUE) : take_away(cuda, frame);
	case GMEM_CHANNEL_FORGET:
		r = give_access(cuda, run);
		return r ? r : let_go(cuda, frame);
	default:
		return CUDA_ERROR_INVALID_VALUE;
	}
}

static bool send_list(struct gmem_cuda *cuda, struct gmem_channel_list *list)
{
	size_t bytes = offsetof(struct gmem_channel_list, frames) + list->count * sizeof(list->frames[0]);
	bool sent = !list->count || send(cuda->context->channel, list, bytes, MSG_NOSIGNAL) == (ssize_t)bytes;

	list->count = 0;
	return sent;
}

/* For a gmemd that has taken over, and does not know what its predecessor has asked for. */
static CUresult list_frames(struct gmem_cuda *cuda, uint64_t sequence)
{
	struct gmem_channel_list list = { .sequence = sequence };
	bool sent = true;

	for (uint32_t n = 0; sent && n < cuda->frame_count; n++) {
		const struct frame *frame = &cuda->frames[n];

		if (!frame->handle)
			continue;
		list.frames[list.count++] = (struct gmem_channel_frame){ n, frame->writable, frame->va };
		if (list.count == GMEM_CHANNEL_STEPS)
			sent = send_list(cuda, &list);
	}
	return sent && send_list(cuda, &list) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

static CUresult do_batch(struct gmem_cuda *cuda, const struct gmem_channel_batch *batch, int *fds, size_t fd_count)
{
	struct run run = { 0, 0, 0 };
	CUresult r = CUDA_SUCCESS, last;
	size_t used = 0;

	if (batch->count == 1 && batch->steps[0].op == GMEM_CHANNEL_LIST)
		return list_frames(cuda, batch->sequence);
	gmem_cuda_maps_lock();
	for (uint32_t i = 0; !r && i < batch->count; i++)
		r = do_step(cuda, &run, &batch->steps[i], fds, fd_count, &used);
	last = give_access(cuda, &run);
	gmem_cuda_maps_unlock();
	return r ? r : last;
}

/* One batch and its descriptors; false at the end. */
static bool receive(struct gmem_cuda *cuda, struct gmem_channel_batch *batch, int *fds, size_t *ret_count)
{
	union {
		struct cmsghdr head;
		char room[CMSG_SPACE(GMEM_CHANNEL_STEPS * sizeof(int))];
	} control;
	struct iovec part = { batch, sizeof(*batch) };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
				  .msg_controllen = sizeof(control) };
	const size_t head = offsetof(struct gmem_channel_batch, steps);
	struct cmsghdr *c;
	ssize_t n;

	do {
		n = recvmsg(cuda->context->channel, &message, MSG_CMSG_CLOEXEC);
	} while (n < 0 && errno == EINTR);
	*ret_count = 0;
	if (n <= 0)
		return false;
	c = CMSG_FIRSTHDR(&message);
	if (c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
		*ret_count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		memcpy(fds, CMSG_DATA(c), *ret_count * sizeof(int));
	}
	return (size_t)n >= head && batch->count <= GMEM_CHANNEL_STEPS && (size_t)n == head + batch->count * sizeof(batch->steps[0]);
}

/* Whatever a kernel touches from here on is a fault, and not what was there once. */
static void unmap_everything(struct gmem_cuda *cuda)
{
	gmem_cuda_maps_lock();
	for (uint32_t i = 0; i < cuda->frame_count; i++)
		if (cuda->frames[i].handle)
			let_go(cuda, &cuda->frames[i]);
	gmem_cuda_maps_unlock();
}

static void *mapper_thread(void *arg)
{
	struct gmem_cuda *cuda = arg;
	struct gmem_channel_batch batch;
	int fds[GMEM_CHANNEL_STEPS];
	size_t count;

	pthread_setname_np(pthread_self(), "gmem-cuda-map");
	cuda->cu->ctx_set(cuda->ctx);
	while (receive(cuda, &batch, fds, &count)) {
		CUresult r = do_batch(cuda, &batch, fds, count);
		struct gmem_channel_done done = { .sequence = batch.sequence, .status = r ? -EIO : 0, .error = r };

		while (count)
			close(fds[--count]);
		if (r)
			set_status(cuda, -EIO, "mapping memory", r);
		if (send(cuda->context->channel, &done, sizeof(done), MSG_NOSIGNAL) < 0)
			break;
	}
	while (count)
		close(fds[--count]);
	set_status(cuda, -EOWNERDEAD, "gmemd has ended the context", 0);
	unmap_everything(cuda);
	return NULL;
}

/* ---- the releaser ---- */

static void release_ranges(struct gmem_cuda *cuda, const struct waiting *waiting)
{
	for (size_t i = 0; i < waiting->count; i++) {
		struct gmem_ring_sqe sqe = { .op = GMEM_RING_RELEASE, .va = waiting->ranges[2 * i],
					     .bytes = waiting->ranges[2 * i + 1], .arg = cuda->id };
		struct gmem_ring_cqe cqe;

		gmem_ring_call(cuda->session, &sqe, &cqe); /* a context that has ended holds nothing */
	}
}

/* 0; CUDA_ERROR_NOT_READY; else the context is broken. */
static CUresult look(struct gmem_cuda *cuda, const struct waiting *waiting)
{
	return waiting->event ? cuda->cu->event_query(waiting->event) : CUDA_SUCCESS;
}

/* Streams are not in each other's order. Called and returns with the lock held. */
static bool release_some_locked(struct gmem_cuda *cuda)
{
	struct waiting **at = &cuda->first;
	bool any = false;

	while (*at) {
		struct waiting *waiting = *at;
		CUresult r = look(cuda, waiting);

		if (r == CUDA_ERROR_NOT_READY) {
			at = &waiting->next;
			continue;
		}
		*at = waiting->next;
		pthread_mutex_unlock(&cuda->lock);
		if (r)
			set_status(cuda, -EIO, "a kernel", r);
		release_ranges(cuda, waiting);
		if (waiting->event)
			cuda->cu->event_destroy(waiting->event);
		pthread_mutex_lock(&cuda->lock);
		if (r && waiting->ticket < cuda->failed_from)
			cuda->failed_from = waiting->ticket;
		free(waiting);
		any = true;
		at = &cuda->first; /* the list may have changed */
	}
	return any;
}

/* All before the oldest that still waits. */
static void count_done_locked(struct gmem_cuda *cuda)
{
	uint64_t done = cuda->tickets;

	for (struct waiting *waiting = cuda->first; waiting; waiting = waiting->next)
		if (waiting->ticket - 1 < done)
			done = waiting->ticket - 1;
	if (done != cuda->done) {
		cuda->done = done;
		pthread_cond_broadcast(&cuda->change);
	}
}

static void *releaser_thread(void *arg)
{
	const struct timespec nap = { 0, LOOK_NS };
	struct gmem_cuda *cuda = arg;

	pthread_setname_np(pthread_self(), "gmem-cuda-free");
	cuda->cu->ctx_set(cuda->ctx);
	pthread_mutex_lock(&cuda->lock);
	while (cuda->first || !cuda->stop) {
		if (!cuda->first) {
			pthread_cond_wait(&cuda->change, &cuda->lock);
			continue;
		}
		if (!release_some_locked(cuda)) {
			pthread_mutex_unlock(&cuda->lock);
			nanosleep(&nap, NULL);
			pthread_mutex_lock(&cuda->lock);
		}
		count_done_locked(cuda);
	}
	pthread_mutex_unlock(&cuda->lock);
	return NULL;
}

/* ---- what the program asks ---- */

/* On the stream as the calling thread's, whatever context that has. */
static int record(struct gmem_cuda *cuda, uint64_t stream, CUevent *ret)
{
	const struct gmem_cuda_api *cu = cuda->cu;
	CUcontext before = NULL;
	CUresult r;

	cu->ctx_get(&before);
	r = cu->ctx_set(cuda->ctx);
	if (!r)
		r = cu->event_create(ret, CU_EVENT_DISABLE_TIMING);
	if (!r && (r = cu->event_record(*ret, (CUstream)(uintptr_t)stream)))
		cu->event_destroy(*ret);
	cu->ctx_set(before);
	if (r)
		set_status(cuda, -EIO, "cuEventRecord", r);
	return r ? -EIO : 0;
}

int gmem_cuda_release(struct gmem_cuda *cuda, uint64_t stream, const uint64_t *ranges, size_t count, uint64_t *ret_ticket)
{
	struct waiting *waiting = malloc(sizeof(*waiting) + 2 * count * sizeof(*ranges)), **last = &cuda->first;
	int err;

	if (!waiting)
		return -ENOMEM;
	if (cuda->owner != getpid()) {
		free(waiting);
		return -ECANCELED;
	}
	*waiting = (struct waiting){ .count = count };
	memcpy(waiting->ranges, ranges, 2 * count * sizeof(*ranges));
	err = record(cuda, stream, &waiting->event);
	if (err)
		waiting->event = NULL;
	pthread_mutex_lock(&cuda->lock);
	waiting->ticket = *ret_ticket = ++cuda->tickets;
	if (err && waiting->ticket < cuda->failed_from)
		cuda->failed_from = waiting->ticket;
	while (*last)
		last = &(*last)->next;
	*last = waiting;
	pthread_cond_broadcast(&cuda->change);
	pthread_mutex_unlock(&cuda->lock);
	return err;
}

int gmem_cuda_wait(struct gmem_cuda *cuda, uint64_t ticket, uint64_t timeout_ns)
{
	struct timespec until;
	int err = 0;

	clock_gettime(CLOCK_MONOTONIC, &until);
	if (timeout_ns != NEVER) {
		uint64_t ns = (uint64_t)until.tv_nsec + timeout_ns % 1000000000ull;

		until.tv_sec += (time_t)(timeout_ns / 1000000000ull + ns / 1000000000ull);
		until.tv_nsec = (long)(ns % 1000000000ull);
	}
	pthread_mutex_lock(&cuda->lock);
	while (cuda->done < ticket && err != ETIMEDOUT && (!cuda->stop || cuda->first))
		err = timeout_ns == NEVER ? pthread_cond_wait(&cuda->change, &cuda->lock) :
					    pthread_cond_clockwait(&cuda->change, &cuda->lock, CLOCK_MONOTONIC, &until);
	err = cuda->done < ticket ? -ETIMEDOUT : ticket >= cuda->failed_from ? -EIO : 0;
	pthread_mutex_unlock(&cuda->lock);
	return err;
}

int gmem_cuda_ordinal(const struct gmem_cuda *cuda)
{
	return cuda->ordinal;
}

int gmem_cuda_status(struct gmem_cuda *cuda, char *what)
{
	int status;

	pthread_mutex_lock(&cuda->lock);
	status = cuda->status;
	snprintf(what, GMEM_WIRE_MESSAGE_BYTES, "%s", cuda->what);
	pthread_mutex_unlock(&cuda->lock);
	return status;
}

/* ---- life ---- */

static int say(char *message, int err, const char *text)
{
	snprintf(message, GMEM_WIRE_MESSAGE_BYTES, "%s", text);
	return err;
}

static int hear_hello(struct gmem_cuda *cuda, struct gmem_channel_hello *ret, char *message)
{
	struct pollfd readable = { .fd = cuda->context->channel, .events = POLLIN };
	int n;

	do {
		n = poll(&readable, 1, HELLO_MS);
	} while (n < 0 && errno == EINTR);
	if (n != 1 || recv(cuda->context->channel, ret, sizeof(*ret), 0) != sizeof(*ret) || ret->magic != GMEM_CHANNEL_MAGIC ||
	    ret->version != GMEM_CHANNEL_VERSION || !ret->frame_count || ret->frame_count > FRAMES_MAX || !ret->frame_bytes)
		return say(message, -EPROTO, "device: gmemd speaks another protocol");
	return 0;
}

/* By its UUID: CUDA_VISIBLE_DEVICES counts as it likes. */
static int find_device(struct gmem_cuda *cuda, const uint8_t uuid[16], char *message)
{
	unsigned char other[16];
	int count = 0;

	if (cuda->cu->device_count(&count))
		count = 0;
	for (cuda->ordinal = 0; cuda->ordinal < count; cuda->ordinal++)
		if (!cuda->cu->device_get(&cuda->device, cuda->ordinal) && !cuda->cu->device_uuid(other, cuda->device) &&
		    !memcmp(other, uuid, sizeof(other)))
			return 0;
	return say(message, -ENODEV, "device: CUDA does not show it to this process (CUDA_VISIBLE_DEVICES?)");
}

static int start_threads(struct gmem_cuda *cuda)
{
	sigset_t all, before;
	int err;

	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &before); /* the program's handlers run on its own threads */
	err = -pthread_create(&cuda->mapper, NULL, mapper_thread, cuda);
	if (!err) {
		err = -pthread_create(&cuda->releaser, NULL, releaser_thread, cuda);
		if (err) {
			shutdown(cuda->context->channel, SHUT_RDWR);
			pthread_join(cuda->mapper, NULL);
		}
	}
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return err;
}

static int start(struct gmem_cuda *cuda, char *message)
{
	struct gmem_channel_hello hello;
	CUresult r;
	int err = gmem_cuda_usable(&cuda->cu, message);

	if (!err && cuda->context->channel < 0)
		err = say(message, -EPROTO, "device: gmemd has opened no channel");
	if (!err && !gmem_link_has_ring(cuda->session))
		err = say(message, -EOPNOTSUPP, "device: needs the session's ring, which GMEM_RING=0 has turned off");
	if (!err)
		err = hear_hello(cuda, &hello, message);
	if (!err)
		err = find_device(cuda, hello.uuid, message);
	if (err)
		return err;
	cuda->frame_count = hello.frame_count;
	cuda->frame_bytes = hello.frame_bytes;
	cuda->frames = calloc(hello.frame_count, sizeof(*cuda->frames));
	if (!cuda->frames)
		return say(message, -ENOMEM, "out of memory");
	r = cuda->cu->primary_retain(&cuda->ctx, cuda->device);
	if (r) {
		cuda->ctx = NULL;
		return say(message, -EIO, "device: cuDevicePrimaryCtxRetain fails");
	}
	err = start_threads(cuda);
	return err ? say(message, err, "device: no thread can be started") : 0;
}

static void destroy(struct gmem_cuda *cuda)
{
	if (cuda->ctx)
		cuda->cu->primary_release(cuda->device);
	pthread_cond_destroy(&cuda->change);
	pthread_mutex_destroy(&cuda->lock);
	free(cuda->frames);
	free(cuda);
}

int gmem_cuda_open(struct gmem_link *session, struct gmem_link *context, uint64_t id, struct gmem_cuda **ret, char *message)
{
	struct gmem_cuda *cuda = calloc(1, sizeof(*cuda));
	int err;

	if (!cuda)
		return say(message, -ENOMEM, "out of memory");
	cuda->session = session;
	cuda->context = context;
	cuda->id = id;
	cuda->owner = getpid();
	cuda->failed_from = NEVER;
	pthread_mutex_init(&cuda->lock, NULL);
	pthread_cond_init(&cuda->change, NULL);
	err = start(cuda, message);
	if (err)
		destroy(cuda);
	else
		*ret = cuda;
	return err;
}

void gmem_cuda_close(struct gmem_cuda *cuda)
{
	struct timespec until;

	if (cuda->owner != getpid())
		return; /* a forked child's copy: it has no threads, and nothing of CUDA */
	pthread_mutex_lock(&cuda->lock);
	cuda->stop = true;
	pthread_cond_broadcast(&cuda->change);
	pthread_mutex_unlock(&cuda->lock);
	pthread_join(cuda->releaser, NULL);
	shutdown(cuda->context->channel, SHUT_RDWR);
	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += CLOSE_S;
	if (!pthread_timedjoin_np(cuda->mapper, NULL, &until))
		destroy(cuda); /* else a call of CUDA's does not return, and what it uses stays */
}
