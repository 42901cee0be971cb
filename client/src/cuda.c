/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <gmem_cuda_api.h>
#include <gmem_wire.h>

#include "cuda.h"
#include "syscalls.h"

#define PAGE (2ull << 20)
#define INVALID_CONTEXT 201 /* CUDA_ERROR_INVALID_CONTEXT */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;    /* guards what follows */
static pthread_mutex_t mapping = PTHREAD_MUTEX_INITIALIZER; /* gmem_cuda_lock() */
static struct gmem_cuda_api api;
static bool enabled, tried, forked;
static int status = -ENODEV;
static char why[GMEM_WIRE_MESSAGE_BYTES] = "device: no CUDA device was attached when the session was opened, and the "
					   "address window is in use: open it again";
static _Atomic uint64_t reserved_base, reserved_bytes;

static int fail(int err, const char *text, CUresult r)
{
	const char *name = NULL;

	if (r && (!api.error_name || api.error_name(r, &name)))
		name = NULL;
	snprintf(why, sizeof(why), "device: %s%s%s", text, r ? ": " : "", r ? (name ? name : "unknown error") : "");
	return err;
}

/* Where in the range something is mapped already: the first line of /proc/self/maps that is in it. */
static int range_in_use(uint64_t base, uint64_t bytes)
{
	FILE *maps = fopen("/proc/self/maps", "re");
	char line[512];
	unsigned long from = 0, to = 0;

	while (maps && fgets(line, sizeof(line), maps)) {
		if (sscanf(line, "%lx-%lx", &from, &to) == 2 && from < base + bytes && to > base)
			break;
		from = to = 0;
	}
	if (maps)
		fclose(maps);
	snprintf(why, sizeof(why), "device: the address window is in use at 0x%lx-0x%lx, so the GPU can't have it: open the "
		 "session before anything is mapped there", from, to);
	return -EEXIST;
}

static CUresult reserve_at(uint64_t base, uint64_t bytes, CUdeviceptr *ret)
{
	CUresult r = api.reserve(ret, bytes, PAGE, base, 0);
	CUcontext ctx, before = NULL;

	if (r != INVALID_CONTEXT)
		return r;
	/* a driver that wants a context for it */
	r = api.primary_retain(&ctx, 0);
	if (r)
		return r;
	api.ctx_get(&before);
	api.ctx_set(ctx);
	r = api.reserve(ret, bytes, PAGE, base, 0);
	api.ctx_set(before);
	return r;
}

static int reserve_locked(uint64_t base, uint64_t bytes)
{
	const char *missing = "";
	CUdeviceptr got = 0;
	CUresult r;
	int err = gmem_cuda_api_load(&api, &missing);

	if (err == -ENOENT)
		return fail(-ENODEV, "libcuda.so.1 can't be loaded in this process", 0);
	if (err)
		return fail(-ENOSYS, "libcuda.so.1 is too old", 0);
	r = api.init(0);
	if (r)
		return fail(-ENODEV, "cuInit", r);
	r = reserve_at(base, bytes, &got);
	if (r)
		return fail(-ENOMEM, "cuMemAddressReserve", r);
	if (got != base) {
		if (got)
			api.unreserve(got, bytes);
		return range_in_use(base, bytes);
	}
	/* A child has nothing of CUDA; what it maps there needs room. */
	gmem_sys_madvise((void *)(uintptr_t)base, bytes, MADV_DONTFORK);
	reserved_base = base;
	reserved_bytes = bytes;
	return 0;
}

void gmem_cuda_enable(void)
{
	pthread_mutex_lock(&lock);
	enabled = true;
	pthread_mutex_unlock(&lock);
}

void gmem_cuda_reserve(uint64_t base, uint64_t bytes)
{
	pthread_mutex_lock(&lock);
	if (!tried && enabled) {
		tried = true;
		status = reserve_locked(base, bytes);
	} else if (tried && !status && (reserved_base != base || reserved_bytes != bytes)) {
		status = fail(-EEXIST, "another gmemd's address window is reserved in this process", 0);
	}
	pthread_mutex_unlock(&lock);
}

bool gmem_cuda_reserved(uint64_t va, uint64_t bytes)
{
	return va >= reserved_base && va - reserved_base < reserved_bytes && bytes <= reserved_bytes - (va - reserved_base);
}

int gmem_cuda_usable(const struct gmem_cuda_api **ret, char *message)
{
	int err;

	pthread_mutex_lock(&lock);
	err = status;
	if (forked) {
		err = -ECANCELED;
		fail(err, "CUDA does not survive a fork: use it in the parent, or in a process that is started afresh", 0);
	}
	if (err)
		snprintf(message, GMEM_WIRE_MESSAGE_BYTES, "%s", why);
	else
		*ret = &api;
	pthread_mutex_unlock(&lock);
	return err;
}

int gmem_cuda_check(char *message)
{
	const struct gmem_cuda_api *calls;

	return gmem_cuda_usable(&calls, message);
}

void gmem_cuda_forked(void)
{
	pthread_mutex_init(&lock, NULL);
	pthread_mutex_init(&mapping, NULL);
	forked = tried && !status;
	tried |= forked;
	reserved_base = reserved_bytes = 0;
}

void gmem_cuda_lock(void)
{
	pthread_mutex_lock(&mapping);
}

void gmem_cuda_unlock(void)
{
	pthread_mutex_unlock(&mapping);
}
