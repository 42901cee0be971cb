/* SPDX-License-Identifier: Apache-2.0
 *
 * A double of libcuda for tests without a GPU, loaded through GMEM_LIBCUDA. It keeps an address space of the device's apart
 * from the CPU's: a handle is a memfd, exported as a descriptor of it, imported by another process, mapped by number; the
 * CPU side of a reservation is PROT_NONE. Streams are threads, so what is asynchronous there is so here. Kernels are those
 * of kernels.ptx, by name. What it knows of the rules is what facts.c measured on a GPU: handles are mapped whole, access
 * has to be given, a kernel that touches what is not mapped breaks its context for good.
 *
 * A protocol error (unmapping what a kernel is running on, copying on an address whose CPU side is somebody's memory, freeing
 * what is mapped) ends the process with a line on stderr: the test fails.
 *
 * GMEM_CUDA_DOUBLE, a list of words: total=BYTES, of the device; room=BYTES, of it for all processes; used=PATH: a file in which all processes count what they
 * have made; fail=SYMBOL:N[:CODE]: the Nth call of that function, and those behind it, answer CODE (default 999);
 * once=SYMBOL:N[:CODE]: that one alone; slow=US: a kernel and a copy take so much longer; deaf: unmapping never returns.
 * gmem_double_calls(SYMBOL) says how often a function was called in this process.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <gmem_cuda_api.h>

#define EXPORT __attribute__((visibility("default")))
#define MIB (1ull << 20)
#define PAGE (2 * MIB)
#define HANDLES 65536
#define WORKS 4096
#define CUDA_ERROR_NOT_INITIALIZED 3
#define CUDA_ERROR_INVALID_CONTEXT 201
#define CUDA_ERROR_INVALID_HANDLE 400
#define CUDA_ERROR_NOT_FOUND 500

struct handle {
	int fd;
	size_t bytes;
	unsigned refs; /* the program's, and one for each mapping */
	bool held;     /* by the program */
	uint8_t *memory;
	bool imported;
	ino_t ino;
};

struct mapping {
	CUdeviceptr va;
	size_t bytes;
	uint32_t handle;
	int access;
	struct mapping *next;
};

struct reservation {
	CUdeviceptr va;
	size_t bytes;
	struct reservation *next;
};

enum kind { COPY, FILL8, EVENT, KERNEL, WAIT };

struct work {
	enum kind kind;
	CUdeviceptr dst, src;
	size_t bytes;
	unsigned char byte;
	CUevent event;
	uint64_t number; /* of the event */
	CUfunction kernel;
	uint64_t args[3];
};

struct CUstream_st {
	pthread_t thread;
	pthread_cond_t more, idle;
	struct work works[WORKS];
	uint64_t head, tail; /* done, queued */
	bool stop;
	struct CUstream_st *next;
};

struct CUevent_st {
	uint64_t recorded, reached;
	pthread_cond_t change;
};

struct CUfunc_st {
	char name[16];
};

struct CUctx_st {
	unsigned retained;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pid_t initialized;
static struct CUctx_st primary;
static CUresult sticky;
static struct handle handles[HANDLES];
static struct mapping *mappings;
static struct reservation *reservations;
static struct CUstream_st *streams;
static struct CUstream_st *legacy;
static struct CUfunc_st functions[] = { { "fill" }, { "bump" }, { "sum" }, { "spin" } };
static size_t total_bytes = 1ull << 30, room_bytes = 1ull << 30;
static char counter_path[256];
static unsigned slow_us;
static bool deaf;
static _Thread_local CUcontext current;

struct failure {
	char symbol[40];
	unsigned long after, calls;
	CUresult code;
	bool once;
};
static struct failure failures[8];
static size_t failure_count;

__attribute__((format(printf, 1, 2), noreturn)) static void broken(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	fprintf(stderr, "libcuda double: ");
	vfprintf(stderr, format, args);
	fputc('\n', stderr);
	va_end(args);
	abort();
}

static void read_failure(const char *text, bool once)
{
	struct failure *f = &failures[failure_count];

	f->code = 999;
	f->once = once;
	if (failure_count < 8 && sscanf(text, "%39[^:]:%lu:%d", f->symbol, &f->after, &f->code) >= 2)
		failure_count++;
}

__attribute__((constructor)) static void read_words(void)
{
	const char *given = getenv("GMEM_CUDA_DOUBLE");
	char *copy = given ? strdup(given) : NULL, *save = NULL;

	for (char *word = copy ? strtok_r(copy, " ,", &save) : NULL; word; word = strtok_r(NULL, " ,", &save)) {
		if (!strncmp(word, "total=", 6))
			total_bytes = strtoull(word + 6, NULL, 10);
		else if (!strncmp(word, "room=", 5))
			room_bytes = strtoull(word + 5, NULL, 10);
		else if (!strncmp(word, "used=", 5))
			snprintf(counter_path, sizeof(counter_path), "%s", word + 5);
		else if (!strncmp(word, "fail=", 5))
			read_failure(word + 5, false);
		else if (!strncmp(word, "once=", 5))
			read_failure(word + 5, true);
		else if (!strncmp(word, "slow=", 5))
			slow_us = (unsigned)strtoul(word + 5, NULL, 10);
		else if (!strcmp(word, "deaf"))
			deaf = true;
		else
			broken("GMEM_CUDA_DOUBLE: %s?", word);
	}
	free(copy);
}

static CUresult injected(const char *symbol)
{
	for (size_t i = 0; i < failure_count; i++) {
		struct failure *f = &failures[i];

		if (!strcmp(f->symbol, symbol)) {
			unsigned long n = __atomic_add_fetch(&f->calls, 1, __ATOMIC_RELAXED);

			if (f->once ? n == f->after : n >= f->after)
				return f->code;
		}
	}
	return CUDA_SUCCESS;
}

/* How often each function has been called in this process, for tests that bound it. */
struct calls {
	const char *symbol;
	unsigned long count;
	struct calls *next;
};
static struct calls *called;

static void count_call(struct calls *calls)
{
	if (__atomic_fetch_add(&calls->count, 1, __ATOMIC_RELAXED))
		return;
	pthread_mutex_lock(&lock);
	calls->next = called;
	called = calls;
	pthread_mutex_unlock(&lock);
}

EXPORT unsigned long gmem_double_calls(const char *symbol)
{
	unsigned long count = 0;

	pthread_mutex_lock(&lock);
	for (struct calls *calls = called; calls; calls = calls->next)
		if (!strcmp(calls->symbol, symbol))
			count = __atomic_load_n(&calls->count, __ATOMIC_RELAXED);
	pthread_mutex_unlock(&lock);
	return count;
}

#define BEGIN() \
	do { \
		static struct calls calls_ = { .symbol = __func__ }; \
		CUresult r_ = injected(__func__); \
		count_call(&calls_); \
		if (r_ >= 700 || r_ == 999) \
			sticky = r_; \
		if (r_) \
			return r_; \
		if (initialized != getpid()) \
			return CUDA_ERROR_NOT_INITIALIZED; \
	} while (0)
/* and a context that still works */
#define BEGIN_IN_CONTEXT() \
	do { \
		BEGIN(); \
		if (!current) \
			return CUDA_ERROR_INVALID_CONTEXT; \
		if (sticky) \
			return sticky; \
	} while (0)

/* ---- memory ---- */

/* Of all processes together; false if there is no room. */
static bool count(long long change)
{
	unsigned long long used = 0;
	bool room = true;
	int fd;

	if (!counter_path[0])
		return true;
	fd = open(counter_path, O_RDWR | O_CLOEXEC);
	if (fd < 0) /* only then: nobody creates what is another's in /tmp */
		fd = open(counter_path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
	if (fd < 0)
		broken("%s: %s", counter_path, strerror(errno));
	flock(fd, LOCK_EX);
	if (pread(fd, &used, sizeof(used), 0) < 0)
		used = 0;
	room = change < 0 || used + (unsigned long long)change <= room_bytes;
	if (room) {
		used += (unsigned long long)change;
		if (pwrite(fd, &used, sizeof(used), 0) < 0)
			broken("counting");
	}
	close(fd);
	return room;
}

static struct mapping *find_locked(CUdeviceptr va)
{
	for (struct mapping *m = mappings; m; m = m->next)
		if (va >= m->va && va < m->va + m->bytes)
			return m;
	return NULL;
}

/* Host memory behind a device address, *ret_bytes of it in a row; NULL: a fault. */
static uint8_t *reach_locked(CUdeviceptr va, bool write, size_t *ret_bytes)
{
	struct mapping *m = find_locked(va);

	if (!m || !(write ? m->access == CU_MEM_ACCESS_FLAGS_PROT_READWRITE : m->access))
		return NULL;
	*ret_bytes = m->bytes - (va - m->va);
	return handles[m->handle].memory + (va - m->va);
}

static bool is_reserved_locked(CUdeviceptr va)
{
	for (struct reservation *r = reservations; r; r = r->next)
		if (va >= r->va && va < r->va + r->bytes)
			return true;
	return false;
}

static void unref_locked(uint32_t n)
{
	struct handle *h = &handles[n];

	if (--h->refs)
		return;
	munmap(h->memory, h->bytes);
	close(h->fd);
	if (!h->imported)
		count(-(long long)h->bytes);
	memset(h, 0, sizeof(*h));
}

static uint32_t new_handle_locked(int fd, size_t bytes, bool imported)
{
	struct stat st;

	for (uint32_t n = 1; n < HANDLES; n++) {
		if (handles[n].refs)
			continue;
		fstat(fd, &st);
		handles[n] = (struct handle){ .fd = fd, .bytes = bytes, .refs = 1, .held = true, .imported = imported,
					      .ino = st.st_ino };
		handles[n].memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		if (handles[n].memory == MAP_FAILED)
			broken("mmap: %s", strerror(errno));
		madvise(handles[n].memory, bytes, MADV_DONTFORK);
		return n;
	}
	broken("too many handles");
}

EXPORT CUresult cuMemGetAllocationGranularity(size_t *ret, const CUmemAllocationProp *prop, int option)
{
	BEGIN();
	(void)prop;
	(void)option;
	*ret = PAGE;
	return CUDA_SUCCESS;
}

EXPORT CUresult cuMemCreate(CUmemhandle *ret, size_t bytes, const CUmemAllocationProp *prop, unsigned long long flags)
{
	int fd;

	BEGIN();
	(void)flags;
	if (!bytes || bytes % PAGE || prop->type != CU_MEM_ALLOCATION_TYPE_PINNED ||
	    prop->location.type != CU_MEM_LOCATION_TYPE_DEVICE || prop->location.id)
		return CUDA_ERROR_INVALID_VALUE;
	if (!count((long long)bytes))
		return CUDA_ERROR_OUT_OF_MEMORY;
	fd = memfd_create("double", MFD_CLOEXEC);
	if (fd < 0 || ftruncate(fd, (off_t)bytes))
		broken("memfd: %s", strerror(errno));
	pthread_mutex_lock(&lock);
	*ret = new_handle_locked(fd, bytes, false);
	memset(handles[*ret].memory, 0xa5, bytes); /* somebody else's */
	pthread_mutex_unlock(&lock);
	return CUDA_SUCCESS;
}

EXPORT CUresult cuMemRelease(CUmemhandle n)
{
	CUresult r = CUDA_SUCCESS;

	BEGIN();
	pthread_mutex_lock(&lock);
	if (!n || n >= HANDLES || !handles[n].held) {
		r = CUDA_ERROR_INVALID_VALUE;
	} else {
		handles[n].held = false;
		unref_locked((uint32_t)n);
	}
	pthread_mutex_unlock(&lock);
	return r;
}

EXPORT CUresult cuMemExportToShareableHandle(void *ret, CUmemhandle n, int type, unsigned long long flags)
{
	int fd = -1;

	BEGIN();
	(void)flags;
	pthread_mutex_lock(&lock);
	if (n && n < HANDLES && handles[n].held && type == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR)
		fd = fcntl(handles[n].fd, F_DUPFD_CLOEXEC, 0);
	pthread_mutex_unlock(&lock);
	if (fd < 0)
		return CUDA_ERROR_INVALID_VALUE;
	*(int *)ret = fd;
	return CUDA_SUCCESS;
}

EXPORT CUresult cuMemImportFromShareableHandle(CUmemhandle *ret, void *given, int type)
{
	int fd = fcntl((int)(intptr_t)given, F_DUPFD_CLOEXEC, 0);
	struct stat st;

	BEGIN();
	if (fd < 0 || fstat(fd, &st) || type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR || !st.st_size) {
		if (fd >= 0)
			close(fd);
		return CUDA_ERROR_INVALID_VALUE;
	}
	pthread_mutex_lock(&lock);
	*ret = new_handle_locked(fd, (size_t)st.st_size, true);
	pthread_mutex_unlock(&lock);
	return CUDA_SUCCESS;
}

EXPORT CUresult cuMemAddressReserve(CUdeviceptr *ret, size_t bytes, size_t align, CUdeviceptr hint, unsigned long long flags)
{
	void *at = MAP_FAILED;
	struct reservation *r;

	BEGIN();
	(void)flags;
	if (!bytes || bytes % PAGE || hint % PAGE)
		return CUDA_ERROR_INVALID_VALUE;
	if (hint && bytes >= 64 * MIB) { /* small ones come from elsewhere */
		at = mmap((void *)(uintptr_t)hint, bytes, PROT_NONE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
		if (at == MAP_FAILED && errno == EEXIST) { /* as measured: ok, and nothing */
			*ret = 0;
			return CUDA_SUCCESS;
		}
	}
	if (at == MAP_FAILED) {
		uint8_t *wide = mmap(NULL, bytes + PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

		if (wide == MAP_FAILED)
			return CUDA_ERROR_OUT_OF_MEMORY;
		at = (void *)(((uintptr_t)wide + PAGE - 1) & ~(PAGE - 1));
	}
	(void)align;
	r = malloc(sizeof(*r));
	pthread_mutex_lock(&lock);
	*r = (struct reservation){ (CUdeviceptr)(uintptr_t)at, bytes, reservations };
	reservations = r;
	pthread_mutex_unlock(&lock);
	*ret = r->va;
	return CUDA_SUCCESS;
}

EXPORT CUresult cuMemAddressFree(CUdeviceptr va, size_t bytes)
{
	struct reservation **at, *gone = NULL;

	BEGIN();
	pthread_mutex_lock(&lock);
	for (at = &reservations; *at && ((*at)->va != va || (*at)->bytes != bytes); at = &(*at)->next)
		;
	for (struct mapping *m = mappings; *at && m; m = m->next)
		if (m->va >= va && m->va < va + bytes)
			broken("cuMemAddressFree: 0x%llx is mapped", (unsigned long long)m->va);
	if (*at) {
		gone = *at;
		*at = gone->next;
		munmap((void *)(uintptr_t)va, bytes);
		free(gone);
	}
	pthread_mutex_unlock(&lock);
	return gone ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuMemMap(CUdeviceptr va, size_t bytes, size_t offset, CUmemhandle n, unsigned long long flags)
{
	CUresult r = CUDA_SUCCESS;
	struct mapping *m;

	BEGIN();
	(void)flags;
	pthread_mutex_lock(&lock);
	if (!n || n >= HANDLES || !handles[n].held || va % PAGE || !is_reserved_locked(va) || find_locked(va))
		r = CUDA_ERROR_INVALID_VALUE;
	else if (offset || bytes != handles[n].bytes)
		r = CUDA_ERROR_NOT_SUPPORTED;
	if (!r) {
		m = malloc(sizeof(*m));
		*m = (struct mapping){ va, bytes, (uint32_t)n, CU_MEM_ACCESS_FLAGS_PROT_NONE, mappings };
		mappings = m;
		handles[n].refs++;
	}
	pthread_mutex_unlock(&lock);
	return r;
}

EXPORT CUresult cuMemSetAccess(CUdeviceptr va, size_t bytes, const CUmemAccessDesc *desc, size_t n)
{
	CUdeviceptr at = va;
	CUresult r = CUDA_SUCCESS;

	BEGIN();
	pthread_mutex_lock(&lock);
	while (!r && at < va + bytes) { /* whole handles only */
		struct mapping *m = find_locked(at);

		if (!m || m->va != at || m->bytes > va + bytes - at || n != 1)
			r = CUDA_ERROR_INVALID_VALUE;
		else
			at += m->bytes;
	}
	for (at = va; !r && at < va + bytes;) {
		struct mapping *m = find_locked(at);

		m->access = desc->flags;
		at += m->bytes;
	}
	pthread_mutex_unlock(&lock);
	return r;
}

/* ---- streams ---- */

static bool touches(const struct work *w, CUdeviceptr va, size_t bytes)
{
	if (w->kind == KERNEL)
		return strcmp(w->kernel->name, "spin") && w->args[0] < va + bytes && va < w->args[0] + w->args[1] * 8;
	if (w->kind == COPY)
		return (w->dst < va + bytes && va < w->dst + w->bytes) || (w->src < va + bytes && va < w->src + w->bytes);
	return w->kind == FILL8 && w->dst < va + bytes && va < w->dst + w->bytes;
}

EXPORT CUresult cuMemUnmap(CUdeviceptr va, size_t bytes)
{
	CUdeviceptr at = va;
	CUresult r = CUDA_SUCCESS;

	BEGIN();
	while (deaf && current) /* in a client's process; the daemon's aliases are its own */
		pause();
	pthread_mutex_lock(&lock);
	for (struct CUstream_st *s = streams; s; s = s->next)
		for (uint64_t i = s->head; i < s->tail; i++)
			if (touches(&s->works[i % WORKS], va, bytes))
				broken("cuMemUnmap: 0x%llx is in use", (unsigned long long)va);
	while (!r && at < va + bytes) {
		struct mapping *m = find_locked(at);

		if (!m || m->va != at || m->bytes > va + bytes - at)
			r = CUDA_ERROR_INVALID_VALUE;
		else
			at += m->bytes;
	}
	for (struct mapping **m = &mappings; !r && *m;) {
		struct mapping *gone = *m;

		if (gone->va < va || gone->va >= va + bytes) {
			m = &gone->next;
			continue;
		}
		*m = gone->next;
		unref_locked(gone->handle);
		free(gone);
	}
	pthread_mutex_unlock(&lock);
	return r;
}

/* A device address is one in a reservation; others are the CPU's. */
static uint8_t *side_locked(CUdeviceptr va, bool write, size_t *bytes)
{
	if (is_reserved_locked(va))
		return reach_locked(va, write, bytes);
	return (uint8_t *)(uintptr_t)va;
}

static void fault_locked(CUdeviceptr va)
{
	(void)va;
	sticky = CUDA_ERROR_ILLEGAL_ADDRESS;
}

static void copy_locked(CUdeviceptr dst, CUdeviceptr src, size_t bytes)
{
	while (bytes && !sticky) {
		size_t there = bytes, here = bytes, piece;
		uint8_t *to = side_locked(dst, true, &there), *from = side_locked(src, false, &here);

		if (!to || !from) {
			fault_locked(to ? src : dst);
			return;
		}
		piece = there < here ? there : here;
		piece = piece < bytes ? piece : bytes;
		memcpy(to, from, piece);
		dst += piece;
		src += piece;
		bytes -= piece;
	}
}

static uint64_t *word_locked(CUdeviceptr va, bool write)
{
	size_t bytes;
	uint8_t *at = reach_locked(va, write, &bytes);

	if (!at)
		fault_locked(va);
	return (uint64_t *)(void *)at;
}

static void kernel_locked(const struct work *w)
{
	const char *name = w->kernel->name;
	CUdeviceptr p = w->args[0];
	uint64_t n = w->args[1], v = w->args[2], total = 0, *at = NULL;
	bool is_sum = !strcmp(name, "sum");

	if (!strcmp(name, "spin")) {
		struct timespec nap = { (time_t)(v / 1000000000ull), (long)(v % 1000000000ull) };

		pthread_mutex_unlock(&lock);
		nanosleep(&nap, NULL);
		pthread_mutex_lock(&lock);
		return;
	}
	for (uint64_t i = 0; i < n && !sticky; i++, p += 8) {
		at = i && p % 4096 ? at + 1 : word_locked(p, !is_sum);
		if (!at)
			return;
		if (is_sum)
			total += *at;
		else
			*at = !strcmp(name, "fill") ? v + i : *at + v;
	}
	if (is_sum && !sticky && (at = word_locked(v, true)))
		*at += total;
}

static void do_locked(struct CUstream_st *stream, const struct work *w)
{
	if (slow_us && w->kind != EVENT && w->kind != WAIT) {
		pthread_mutex_unlock(&lock);
		usleep(slow_us);
		pthread_mutex_lock(&lock);
	}
	switch (w->kind) {
	case COPY:
		copy_locked(w->dst, w->src, w->bytes);
		break;
	case FILL8:
		for (size_t done = 0, bytes; done < w->bytes && !sticky; done += bytes) {
			uint8_t *at = reach_locked(w->dst + done, true, &bytes);

			if (!at) {
				fault_locked(w->dst);
				break;
			}
			bytes = bytes < w->bytes - done ? bytes : w->bytes - done;
			memset(at, w->byte, bytes);
		}
		break;
	case EVENT:
		w->event->reached = w->number;
		pthread_cond_broadcast(&w->event->change);
		break;
	case WAIT:
		while (w->event->reached < w->number && !sticky)
			pthread_cond_wait(&w->event->change, &lock);
		break;
	case KERNEL:
		if (!sticky)
			kernel_locked(w);
		break;
	}
	(void)stream;
}

static void *stream_thread(void *arg)
{
	struct CUstream_st *stream = arg;

	pthread_mutex_lock(&lock);
	while (!stream->stop || stream->head < stream->tail) {
		if (stream->head == stream->tail) {
			pthread_cond_wait(&stream->more, &lock);
			continue;
		}
		do_locked(stream, &stream->works[stream->head % WORKS]);
		stream->head++;
		pthread_cond_broadcast(&stream->idle);
	}
	pthread_mutex_unlock(&lock);
	return NULL;
}

static struct CUstream_st *new_stream_locked(void)
{
	struct CUstream_st *stream = calloc(1, sizeof(*stream));

	pthread_cond_init(&stream->more, NULL);
	pthread_cond_init(&stream->idle, NULL);
	if (!stream || pthread_create(&stream->thread, NULL, stream_thread, stream))
		broken("no thread");
	stream->next = streams;
	streams = stream;
	return stream;
}

static struct CUstream_st *stream_locked(CUstream given)
{
	if ((uintptr_t)given > 2)
		return given;
	if (!legacy)
		legacy = new_stream_locked();
	return legacy;
}

static CUresult queue(CUstream given, struct work work)
{
	struct CUstream_st *stream;

	pthread_mutex_lock(&lock);
	stream = stream_locked(given);
	while (stream->tail - stream->head == WORKS)
		pthread_cond_wait(&stream->idle, &lock);
	if (work.kind == EVENT)
		work.number = ++work.event->recorded;
	if (work.kind == WAIT)
		work.number = work.event->recorded;
	stream->works[stream->tail++ % WORKS] = work;
	pthread_cond_signal(&stream->more);
	pthread_mutex_unlock(&lock);
	return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamCreate(CUstream *ret, unsigned flags)
{
	BEGIN_IN_CONTEXT();
	(void)flags;
	pthread_mutex_lock(&lock);
	*ret = new_stream_locked();
	pthread_mutex_unlock(&lock);
	return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamDestroy_v2(CUstream stream)
{
	BEGIN();
	pthread_mutex_lock(&lock);
	stream->stop = true;
	pthread_cond_signal(&stream->more);
	pthread_mutex_unlock(&lock);
	pthread_join(stream->thread, NULL);
	pthread_mutex_lock(&lock);
	for (struct CUstream_st **at = &streams; *at; at = &(*at)->next)
		if (*at == stream) {
			*at = stream->next;
			break;
		}
	pthread_mutex_unlock(&lock);
	free(stream);
	return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamSynchronize(CUstream given)
{
	BEGIN_IN_CONTEXT();
	pthread_mutex_lock(&lock);
	for (struct CUstream_st *stream = stream_locked(given); stream->head < stream->tail;)
		pthread_cond_wait(&stream->idle, &lock);
	pthread_mutex_unlock(&lock);
	return sticky;
}

EXPORT CUresult cuStreamQuery(CUstream given)
{
	bool idle;

	BEGIN_IN_CONTEXT();
	pthread_mutex_lock(&lock);
	idle = stream_locked(given)->head == stream_locked(given)->tail;
	pthread_mutex_unlock(&lock);
	return sticky ? sticky : idle ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

EXPORT CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags)
{
	BEGIN_IN_CONTEXT();
	(void)flags;
	return queue(stream, (struct work){ .kind = WAIT, .event = event });
}

EXPORT CUresult cuCtxSynchronize(void)
{
	BEGIN_IN_CONTEXT();
	pthread_mutex_lock(&lock);
	for (struct CUstream_st *s = streams; s; s = s->next)
		while (s->head < s->tail)
			pthread_cond_wait(&s->idle, &lock);
	pthread_mutex_unlock(&lock);
	return sticky;
}

/* A program that copies with an address of the shared window means the GPU's side; a host pointer in a reservation of the
 * daemon's is a mistake that the CPU would not survive either. */
static CUresult copy(CUdeviceptr dst, CUdeviceptr src, size_t bytes, CUstream stream)
{
	return queue(stream, (struct work){ .kind = COPY, .dst = dst, .src = src, .bytes = bytes });
}

EXPORT CUresult cuMemcpyAsync(CUdeviceptr dst, CUdeviceptr src, size_t bytes, CUstream stream)
{
	BEGIN_IN_CONTEXT();
	return copy(dst, src, bytes, stream);
}

EXPORT CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr dst, const void *src, size_t bytes, CUstream stream)
{
	BEGIN_IN_CONTEXT();
	return copy(dst, (CUdeviceptr)(uintptr_t)src, bytes, stream);
}

EXPORT CUresult cuMemcpyDtoHAsync_v2(void *dst, CUdeviceptr src, size_t bytes, CUstream stream)
{
	BEGIN_IN_CONTEXT();
	return copy((CUdeviceptr)(uintptr_t)dst, src, bytes, stream);
}

EXPORT CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr dst, CUdeviceptr src, size_t bytes, CUstream stream)
{
	BEGIN_IN_CONTEXT();
	return copy(dst, src, bytes, stream);
}

EXPORT CUresult cuMemsetD8Async(CUdeviceptr dst, unsigned char byte, size_t bytes, CUstream stream)
{
	BEGIN_IN_CONTEXT();
	return queue(stream, (struct work){ .kind = FILL8, .dst = dst, .byte = byte, .bytes = bytes });
}

EXPORT CUresult cuMemHostRegister_v2(void *p, size_t bytes, unsigned flags)
{
	BEGIN_IN_CONTEXT();
	(void)flags;
	return p && bytes ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuMemHostUnregister(void *p)
{
	BEGIN_IN_CONTEXT();
	return p ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

/* ---- events ---- */

EXPORT CUresult cuEventCreate(CUevent *ret, unsigned flags)
{
	BEGIN_IN_CONTEXT();
	(void)flags;
	*ret = calloc(1, sizeof(**ret));
	pthread_cond_init(&(*ret)->change, NULL);
	return CUDA_SUCCESS;
}

EXPORT CUresult cuEventDestroy_v2(CUevent event)
{
	BEGIN();
	pthread_mutex_lock(&lock);
	while (event->reached < event->recorded)
		pthread_cond_wait(&event->change, &lock);
	pthread_mutex_unlock(&lock);
	free(event);
	return CUDA_SUCCESS;
}

EXPORT CUresult cuEventRecord(CUevent event, CUstream stream)
{
	BEGIN_IN_CONTEXT();
	return queue(stream, (struct work){ .kind = EVENT, .event = event });
}

EXPORT CUresult cuEventQuery(CUevent event)
{
	bool reached;

	BEGIN_IN_CONTEXT();
	pthread_mutex_lock(&lock);
	reached = event->reached == event->recorded;
	pthread_mutex_unlock(&lock);
	return sticky ? sticky : reached ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

EXPORT CUresult cuEventSynchronize(CUevent event)
{
	uint64_t number;

	BEGIN_IN_CONTEXT();
	pthread_mutex_lock(&lock);
	number = event->recorded;
	while (event->reached < number)
		pthread_cond_wait(&event->change, &lock);
	pthread_mutex_unlock(&lock);
	return sticky;
}

EXPORT CUresult cuEventElapsedTime(float *ret, CUevent from, CUevent to)
{
	BEGIN_IN_CONTEXT();
	(void)from;
	(void)to;
	*ret = 0;
	return CUDA_SUCCESS;
}

/* ---- devices and contexts ---- */

EXPORT CUresult cuInit(unsigned flags)
{
	CUresult r = injected("cuInit");

	if (r)
		return r;
	if (flags)
		return CUDA_ERROR_INVALID_VALUE;
	if (initialized && initialized != getpid()) /* CUDA does not survive a fork */
		return CUDA_ERROR_NOT_INITIALIZED;
	initialized = getpid();
	return CUDA_SUCCESS;
}

EXPORT CUresult cuDriverGetVersion(int *ret)
{
	*ret = 12000;
	return CUDA_SUCCESS;
}

EXPORT CUresult cuGetErrorName(CUresult error, const char **ret)
{
	static _Thread_local char text[32];

	snprintf(text, sizeof(text), "CUDA_ERROR_%d", error);
	*ret = error == CUDA_ERROR_ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS" :
	       error == CUDA_ERROR_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : text;
	return CUDA_SUCCESS;
}

EXPORT CUresult cuGetErrorString(CUresult error, const char **ret)
{
	return cuGetErrorName(error, ret);
}

EXPORT CUresult cuDeviceGetCount(int *ret)
{
	BEGIN();
	*ret = 1;
	return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGet(CUdevice *ret, int ordinal)
{
	BEGIN();
	if (ordinal)
		return CUDA_ERROR_INVALID_DEVICE;
	*ret = 0;
	return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetName(char *ret, int bytes, CUdevice device)
{
	BEGIN();
	(void)device;
	snprintf(ret, (size_t)bytes, "double of a GPU");
	return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetUuid_v2(unsigned char ret[16], CUdevice device)
{
	BEGIN();
	(void)device;
	memcpy(ret, "gmem test double", 16);
	return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetAttribute(int *ret, int attribute, CUdevice device)
{
	BEGIN();
	(void)device;
	*ret = attribute == CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING ||
	       attribute == CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED ||
	       attribute == CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED;
	return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceTotalMem_v2(size_t *ret, CUdevice device)
{
	BEGIN();
	(void)device;
	*ret = total_bytes;
	return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *ret, CUdevice device)
{
	BEGIN();
	(void)device;
	__atomic_add_fetch(&primary.retained, 1, __ATOMIC_RELAXED);
	*ret = &primary;
	return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device)
{
	BEGIN();
	(void)device;
	if (!__atomic_fetch_sub(&primary.retained, 1, __ATOMIC_RELAXED))
		broken("cuDevicePrimaryCtxRelease: not retained");
	return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxSetCurrent(CUcontext ctx)
{
	BEGIN();
	current = ctx;
	return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetCurrent(CUcontext *ret)
{
	BEGIN();
	*ret = current;
	return CUDA_SUCCESS;
}

EXPORT CUresult cuMemGetInfo_v2(size_t *ret_free, size_t *ret_total)
{
	BEGIN_IN_CONTEXT();
	*ret_free = *ret_total = total_bytes;
	return CUDA_SUCCESS;
}

/* ---- kernels ---- */

EXPORT CUresult cuModuleLoadData(CUmodule *ret, const void *image)
{
	BEGIN_IN_CONTEXT();
	(void)image;
	*ret = (CUmodule)functions;
	return CUDA_SUCCESS;
}

EXPORT CUresult cuModuleUnload(CUmodule module)
{
	BEGIN();
	(void)module;
	return CUDA_SUCCESS;
}

EXPORT CUresult cuModuleGetFunction(CUfunction *ret, CUmodule module, const char *name)
{
	BEGIN_IN_CONTEXT();
	(void)module;
	for (size_t i = 0; i < sizeof(functions) / sizeof(functions[0]); i++)
		if (!strcmp(functions[i].name, name)) {
			*ret = &functions[i];
			return CUDA_SUCCESS;
		}
	return CUDA_ERROR_NOT_FOUND;
}

EXPORT CUresult cuLaunchKernel(CUfunction fn, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
			       unsigned shared_bytes, CUstream stream, void **params, void **extra)
{
	struct work work = { .kind = KERNEL, .kernel = fn };

	BEGIN_IN_CONTEXT();
	(void)(gx + gy + gz + bx + by + bz + shared_bytes);
	(void)extra;
	for (int i = 0; i < 3; i++)
		memcpy(&work.args[i], params[i], 8);
	return queue(stream, work);
}
