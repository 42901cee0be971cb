/* SPDX-License-Identifier: Apache-2.0
 *
 * What this machine's GPU, driver and kernel allow, step by step: the facts that the cuda driver stands on. Each step is
 * a process of its own, so that one that dies or hangs costs that step only. One line "step key value" a fact.
 *
 *   cc -Icsrc/include -Iclient/include tests/gpu/facts.c -o build/facts -ldl -pthread
 *   build/facts tests/gpu/kernels.ptx [STEP ...]
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <gmem/uapi.h>

#include <gmem_cuda_api.h>

#ifndef MFD_HUGETLB
#define MFD_HUGETLB 4u
#endif
#define WINDOW 0x660000000000ull
#define MIB (1ull << 20)
#define GIB (1ull << 30)
#define LENGTH(a) (sizeof(a) / sizeof((a)[0]))

static struct gmem_cuda_api api;
static const struct gmem_cuda_api *const cu = &api;
static const char *step, *ptx_path;
static CUfunction fill, bump, sum, spin;
static CUstream stream;

/* ---- reporting ---- */

static void fact(const char *key, const char *format, ...)
{
	char line[512];
	va_list args;
	int n = snprintf(line, sizeof(line), "%s %s ", step, key);

	va_start(args, format);
	n += vsnprintf(line + n, sizeof(line) - (size_t)n - 2, format, args);
	va_end(args);
	line[n++] = '\n';
	if (write(1, line, (size_t)n) != n)
		_exit(3);
}

static const char *name_of(CUresult r)
{
	const char *name = NULL;

	return r == CUDA_SUCCESS ? "ok" : cu->error_name(r, &name) || !name ? "unknown" : name;
}

#define MUST(call) do { CUresult r_ = (call); if (r_) { fact("FAILED", "%s: %s", #call, name_of(r_)); _exit(2); } } while (0)
#define NEED(condition) do { if (!(condition)) { fact("FAILED", "%s: %s", #condition, strerror(errno)); _exit(2); } } while (0)

static double now_us(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static double median(double *values, size_t n)
{
	qsort(values, n, sizeof(*values), by_value);
	return values[n / 2];
}

static void maps_of(const char *key, uint64_t from, uint64_t to)
{
	FILE *f = fopen("/proc/self/maps", "re");
	char line[400];
	int n = 0;

	while (f && fgets(line, sizeof(line), f)) {
		unsigned long a, b;

		if (sscanf(line, "%lx-%lx", &a, &b) != 2 || b <= from || a >= to || n++ > 6)
			continue;
		line[strcspn(line, "\n")] = '\0';
		fact(key, "%s", line);
	}
	if (!n)
		fact(key, "nothing mapped there");
	if (f)
		fclose(f);
}

/* ---- the GPU ---- */

static void open_gpu(bool context)
{
	CUcontext ctx;
	CUmodule module;
	FILE *f;
	static char text[1 << 16];

	MUST(cu->init(0));
	if (!context)
		return;
	MUST(cu->primary_retain(&ctx, 0));
	MUST(cu->ctx_set(ctx));
	f = fopen(ptx_path, "re");
	NEED(f && fread(text, 1, sizeof(text) - 1, f) > 0);
	fclose(f);
	MUST(cu->module_load(&module, text));
	MUST(cu->module_function(&fill, module, "fill"));
	MUST(cu->module_function(&bump, module, "bump"));
	MUST(cu->module_function(&sum, module, "sum"));
	MUST(cu->module_function(&spin, module, "spin"));
	MUST(cu->stream_create(&stream, CU_STREAM_NON_BLOCKING));
}

static CUresult run(CUfunction fn, uint64_t p, uint64_t n, uint64_t v)
{
	void *params[] = { &p, &n, &v };

	return cu->launch(fn, fn == spin ? 1 : 64, 1, 1, fn == spin ? 1 : 256, 1, 1, 0, stream, params, NULL);
}

static CUresult run_wait(CUfunction fn, uint64_t p, uint64_t n, uint64_t v)
{
	CUresult r = run(fn, p, n, v);

	return r ? r : cu->stream_synchronize(stream);
}

static CUmemAllocationProp prop_of(int type, int id)
{
	return (CUmemAllocationProp){ .type = CU_MEM_ALLOCATION_TYPE_PINNED,
				      .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
				      .location = { type, id } };
}

static CUmemhandle create(size_t bytes)
{
	CUmemAllocationProp prop = prop_of(CU_MEM_LOCATION_TYPE_DEVICE, 0);
	CUmemhandle handle;

	MUST(cu->create(&handle, bytes, &prop, 0));
	return handle;
}

static void allow(CUdeviceptr va, size_t bytes, int flags)
{
	CUmemAccessDesc desc = { { CU_MEM_LOCATION_TYPE_DEVICE, 0 }, flags };

	MUST(cu->set_access(va, bytes, &desc, 1));
}

static CUdeviceptr device_memory(size_t bytes)
{
	CUdeviceptr va;

	MUST(cu->reserve(&va, bytes, 0, 0, 0));
	MUST(cu->map(va, bytes, 0, create(bytes), 0));
	allow(va, bytes, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
	return va;
}

static CUdeviceptr reserve_at(uint64_t hint, size_t bytes)
{
	CUdeviceptr va = 0;
	CUresult r = cu->reserve(&va, bytes, 2 * MIB, hint, 0);

	if (r || va != hint)
		fact("reserve", "hint %#lx of %llu MiB: %s, got %#lx", (unsigned long)hint,
		     (unsigned long long)(bytes / MIB), name_of(r), (unsigned long)va);
	return r ? 0 : va;
}

static int memory_file(size_t bytes, bool huge)
{
	int fd = memfd_create("facts", MFD_CLOEXEC | (huge ? MFD_HUGETLB : 0));

	NEED(fd >= 0 && !ftruncate(fd, (off_t)bytes));
	return fd;
}

/* ---- 1: what there is ---- */

static void what_there_is(void)
{
	static const struct { const char *name; int attribute; } attributes[] = {
		{ "unified_addressing", CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING },
		{ "pageable_memory_access", CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS },
		{ "pageable_uses_host_page_tables", CU_DEVICE_ATTRIBUTE_PAGEABLE_USES_HOST_PAGE_TABLES },
		{ "concurrent_managed_access", CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS },
		{ "registered_memory_same_pointer", CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM },
		{ "host_register", CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED },
		{ "vmm", CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED },
		{ "posix_fd", CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED },
		{ "host_numa_id", CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID },
		{ "host_numa_vmm", CU_DEVICE_ATTRIBUTE_HOST_NUMA_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED },
	};
	CUmemAllocationProp prop = prop_of(CU_MEM_LOCATION_TYPE_DEVICE, 0);
	struct gmem_uffd_api api = { .api = GMEM_UFFD_API };
	int device_fd = open(GMEM_UFFD_DEVICE, O_RDWR | O_CLOEXEC), fd, value;
	struct utsname uts;
	char name[100];
	size_t bytes, free_bytes;

	uname(&uts);
	fact("kernel", "%s %s", uts.release, uts.machine);
	fact("userfaultfd_device", "%s", device_fd < 0 ? strerror(errno) : "ok");
	fd = device_fd < 0 ? -1 : ioctl(device_fd, GMEM_USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
	if (fd >= 0 && !ioctl(fd, GMEM_UFFDIO_API, &api))
		fact("userfaultfd_features", "%#llx", (unsigned long long)api.features);
	MUST(cu->driver_version(&value));
	fact("cuda_driver_api", "%d", value);
	open_gpu(true);
	MUST(cu->device_name(name, sizeof(name), 0));
	MUST(cu->device_total(&bytes, 0));
	fact("gpu", "%s, %llu MiB", name, (unsigned long long)(bytes / MIB));
	for (size_t i = 0; i < LENGTH(attributes); i++) {
		CUresult r = cu->device_attribute(&value, attributes[i].attribute, 0);

		fact(attributes[i].name, r ? "%d (%s)" : "%d", r ? -1 : value, name_of(r));
	}
	MUST(cu->granularity(&bytes, &prop, CU_MEM_ALLOC_GRANULARITY_MINIMUM));
	fact("granularity_minimum", "%zu", bytes);
	MUST(cu->granularity(&bytes, &prop, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED));
	fact("granularity_recommended", "%zu", bytes);
	MUST(cu->mem_info(&free_bytes, &bytes));
	fact("free_in_fresh_context", "%llu of %llu MiB", (unsigned long long)(free_bytes / MIB),
	     (unsigned long long)(bytes / MIB));
}

/* HMM: does a kernel read and write plain memory, and memory that a userfaultfd serves? */
static void pageable(void)
{
	int value = 0;
	uint64_t *p;

	open_gpu(true);
	MUST(cu->device_attribute(&value, CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS, 0));
	if (!value) {
		fact("skipped", "PAGEABLE_MEMORY_ACCESS is off");
		return;
	}
	p = mmap(NULL, 4 * MIB, PROT_READ | PROT_WRITE, MAP_SHARED, memory_file(4 * MIB, false), 0);
	NEED(p != MAP_FAILED);
	p[0] = 5;
	fact("kernel_on_memfd", "%s", name_of(run_wait(bump, (uint64_t)(uintptr_t)p, 1024, 3)));
	fact("memfd_word", "%lu (8 expected)", (unsigned long)p[0]);
}

/* ---- 2: reservations ---- */

static void reservations(void)
{
	static const uint64_t hints[] = { WINDOW, 0x6e0000000000ull, 0x100000000000ull,
					  0x7e9000000000ull, 0x200000000000ull };
	static const uint64_t sizes[] = { 2 * MIB, 1 * GIB, 64 * GIB, 1024 * GIB, 10240 * GIB };
	CUdeviceptr va, next;
	void *p;

	open_gpu(true);
	maps_of("maps_before", WINDOW, 0x700000000000ull);
	for (size_t h = 0; h < LENGTH(hints); h++) {
		for (size_t s = 0; s < LENGTH(sizes); s++) {
			CUresult r;
			double t = now_us();

			va = 0;
			r = cu->reserve(&va, sizes[s], 2 * MIB, hints[h], 0);
			t = now_us() - t;
			fact("hint", "%#lx %llu MiB: %s, got %#lx (%s), %.0f us", (unsigned long)hints[h],
			     (unsigned long long)(sizes[s] / MIB), name_of(r), (unsigned long)va,
			     va == hints[h] ? "as asked" : "elsewhere", t);
			if (!r && h == 0 && s == 1)
				maps_of("maps_reserved", WINDOW, WINDOW + sizes[s]);
			if (!r)
				MUST(cu->unreserve(va, sizes[s]));
		}
	}
	/* neighbours, as one region after another */
	va = reserve_at(WINDOW, 64 * MIB);
	next = reserve_at(WINDOW + 64 * MIB, 64 * MIB);
	fact("neighbours", "%s", va == WINDOW && next == WINDOW + 64 * MIB ? "ok" : "refused");
	/* where the CPU has something already */
	p = mmap((void *)(WINDOW + 4 * GIB), 64 * MIB, PROT_READ | PROT_WRITE,
		 MAP_SHARED | MAP_FIXED_NOREPLACE | MAP_NORESERVE, memory_file(64 * MIB, false), 0);
	NEED(p != MAP_FAILED);
	*(volatile uint64_t *)p = 7;
	{
		CUresult r = cu->reserve(&va, 64 * MIB, 2 * MIB, WINDOW + 4 * GIB, 0);

		fact("over_a_mapping", "%s got %#lx (asked %#lx)", name_of(r), (unsigned long)va, (unsigned long)(WINDOW + 4 * GIB));
	}
	fact("mapping_still_there", "%lu (7 expected)", *(volatile unsigned long *)p);
}

/* ---- 3: the CPU's side of a reservation ---- */

static void overlay_of(bool huge)
{
	const size_t bytes = 64 * MIB, words = bytes / 8;
	CUdeviceptr va = reserve_at(WINDOW, bytes), out = device_memory(2 * MIB);
	int fd = memory_file(bytes, huge);
	uint64_t *host, *alias, seen = 0, got = 0;
	double map_us[1000], access_us[1000], unmap_us[1000];
	CUmemhandle handle = create(bytes), small = create(2 * MIB);
	const char *kind = huge ? "hugetlb" : "shmem";

	NEED(va);
	host = mmap((void *)va, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
	fact("mmap_fixed", "%s: %s", kind, host == (void *)va ? "ok" : strerror(errno));
	NEED(host == (void *)va);
	alias = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	for (size_t i = 0; i < words; i++)
		host[i] = ~i;
	MUST(cu->map(va, bytes, 0, handle, 0));
	allow(va, bytes, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
	maps_of("maps_after_map", va, va + bytes);
	for (size_t i = 0; i < words; i++)
		seen += host[i] == ~i;
	fact("cpu_sees_memfd", "%s: %zu of %zu words", kind, (size_t)seen, words);
	fact("kernel_fill", "%s", name_of(run_wait(fill, va, words, 1000)));
	for (size_t i = seen = 0; i < words; i++)
		seen += host[i] == ~i;
	fact("cpu_sees_memfd_after_kernel", "%s: %zu of %zu words", kind, (size_t)seen, words);
	for (size_t i = 0; i < words; i++)
		host[i] = i * 3;
	MUST(cu->fill8(out, 0, 8, stream));
	fact("kernel_sum", "%s", name_of(run_wait(sum, va, words, out)));
	MUST(cu->copy_d2h(&got, out, 8, stream));
	MUST(cu->stream_synchronize(stream));
	fact("kernel_sees_its_own", "%s", got == words * 1000 + words * (words - 1) / 2 ? "yes" : "NO");
	{ /* which side does a copy take on the shared address? */
		CUdeviceptr to = device_memory(2 * MIB);
		uint64_t word = 0;

		fact("memcpyDtoD_from_shared", "%s", name_of(cu->copy_d2d(to, va, 8, stream)));
		cu->stream_synchronize(stream);
		cu->copy_d2h(&word, to, 8, stream);
		cu->stream_synchronize(stream);
		fact("memcpyDtoD_took", "%lu (1000: GPU, 0: CPU)", (unsigned long)word);
		fact("memcpyHtoD_from_shared", "%s", name_of(cu->copy_h2d(to, host, 8, stream)));
		cu->stream_synchronize(stream);
		word = 77;
		cu->copy_d2h(&word, to, 8, stream);
		cu->stream_synchronize(stream);
		fact("memcpyHtoD_took", "%lu (1000: GPU, 0: CPU)", (unsigned long)word);
	}
	MUST(cu->unmap(va, bytes));
	/* 1,000 times one page */
	for (size_t i = 0; i < 1000; i++) {
		CUdeviceptr at = va + (i % 32) * 2 * MIB;
		double t0 = now_us(), t1, t2;

		MUST(cu->map(at, 2 * MIB, 0, small, 0));
		t1 = now_us();
		allow(at, 2 * MIB, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
		t2 = now_us();
		if (i % 100 == 0)
			MUST(run_wait(bump, at, 2 * MIB / 8, 1));
		access_us[i] = t2 - t1;
		map_us[i] = t1 - t0;
		t0 = now_us();
		MUST(cu->unmap(at, 2 * MIB));
		unmap_us[i] = now_us() - t0;
	}
	for (size_t i = seen = 0; i < words; i++)
		seen += host[i] == i * 3 && alias[i] == i * 3;
	fact("after_1000_remaps", "%s: %zu of %zu words", kind, (size_t)seen, words);
	fact("remap_us", "map %.1f, set access %.1f, unmap %.1f (medians, 2 MiB)", median(map_us, 1000),
	     median(access_us, 1000), median(unmap_us, 1000));
	fact("unreserve", "%s", name_of(cu->unreserve(va, bytes)));
	maps_of("maps_after_unreserve", va, va + bytes);
}

static void overlay_shmem(void) { open_gpu(true); overlay_of(false); }
static void overlay_huge(void) { open_gpu(true); overlay_of(true); }

/* The window mapped first as one piece by the client, reservation later (attach at run time). */
static void overlay_late(void)
{
	const size_t bytes = 64 * MIB;
	int fd = memory_file(bytes, false);
	uint64_t *host;
	CUdeviceptr va = 0;
	CUresult r;

	open_gpu(true);
	host = mmap((void *)WINDOW, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE, fd, 0);
	NEED(host == (void *)WINDOW);
	host[0] = 42;
	/* move it aside, reserve, and put it back: what running threads would see in between is the question of the driver */
	NEED(mremap(host, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)(WINDOW + GIB)) != MAP_FAILED);
	r = cu->reserve(&va, bytes, 2 * MIB, WINDOW, 0);
	fact("reserve_after_mremap", "%s, %s", name_of(r), va == WINDOW ? "as asked" : "elsewhere");
	if (va != WINDOW)
		return;
	NEED(mremap((void *)(WINDOW + GIB), bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)WINDOW) == (void *)WINDOW);
	MUST(cu->map(va, bytes, 0, create(bytes), 0));
	allow(va, bytes, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
	fact("kernel", "%s", name_of(run_wait(fill, va, 1000, 9)));
	fact("cpu_word", "%lu (42 expected)", (unsigned long)host[0]);
}

/* ---- 4: a userfaultfd served by another process over the same addresses ---- */

static void send_fds(int channel, const int *fds, size_t n)
{
	char byte = 1, control[CMSG_SPACE(4 * sizeof(int))] = { 0 };
	struct iovec iov = { &byte, 1 };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = CMSG_SPACE(n * sizeof(int)) };
	struct cmsghdr *c = CMSG_FIRSTHDR(&msg);

	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(n * sizeof(int));
	memcpy(CMSG_DATA(c), fds, n * sizeof(int));
	NEED(sendmsg(channel, &msg, 0) == 1);
}

static void receive_fds(int channel, int *ret, size_t n)
{
	char byte, control[CMSG_SPACE(4 * sizeof(int))];
	struct iovec iov = { &byte, 1 };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control) };

	NEED(recvmsg(channel, &msg, MSG_CMSG_CLOEXEC) == 1 && CMSG_FIRSTHDR(&msg));
	memcpy(ret, CMSG_DATA(CMSG_FIRSTHDR(&msg)), n * sizeof(int));
}

/* The daemon's part: answers missing faults by COPY of a pattern, minor ones by CONTINUE, write-protect by lifting it. */
static void serve(int channel, size_t bytes, bool huge)
{
	struct gmem_uffd_api api = { .api = GMEM_UFFD_API, .features = GMEM_UFFD_FEAT_MISSING_HUGETLBFS | GMEM_UFFD_FEAT_MISSING_SHMEM |
		GMEM_UFFD_FEAT_MINOR_HUGETLBFS | GMEM_UFFD_FEAT_MINOR_SHMEM | GMEM_UFFD_FEAT_WP_HUGETLBFS_SHMEM };
	size_t page = huge ? 2 * MIB : 4096;
	uint64_t *source = aligned_alloc(2 * MIB, 2 * MIB);
	int fds[2];
	struct gmem_uffd_register reg = { .range = { WINDOW, bytes }, .mode = GMEM_UFFD_REGISTER_MISSING | GMEM_UFFD_REGISTER_WP | GMEM_UFFD_REGISTER_MINOR };
	char byte = 1;
	unsigned long missing = 0, minor = 0, wp = 0;

	receive_fds(channel, fds, 2);
	NEED(!ioctl(fds[0], GMEM_UFFDIO_API, &api));
	fact("register", "%s", ioctl(fds[0], GMEM_UFFDIO_REGISTER, &reg) ? strerror(errno) : "ok");
	NEED(write(channel, &byte, 1) == 1);
	for (;;) {
		struct pollfd polls[] = { { fds[0], POLLIN, 0 }, { channel, POLLIN, 0 } };
		struct gmem_uffd_msg msg;

		if (poll(polls, 2, 20000) <= 0)
			break;
		if (polls[1].revents) {
			if (read(channel, &byte, 1) != 1)
				break;
			if (byte == 'p') { /* punch all, as an eviction does */
				fact("punch", "%s", fallocate(fds[1], FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)bytes) ? strerror(errno) : "ok");
			} else if (byte == 'w') {
				struct gmem_uffd_writeprotect w = { { WINDOW, bytes }, GMEM_UFFD_WRITEPROTECT_WP };

				fact("writeprotect", "%s", ioctl(fds[0], GMEM_UFFDIO_WRITEPROTECT, &w) ? strerror(errno) : "ok");
			} else if (byte == 'q') {
				break;
			}
			NEED(write(channel, &byte, 1) == 1);
			continue;
		}
		if (read(fds[0], &msg, sizeof(msg)) != sizeof(msg) || msg.event != GMEM_UFFD_EVENT_PAGEFAULT)
			continue;
		uint64_t at = msg.arg.pagefault.address & ~(page - 1);

		if (msg.arg.pagefault.flags & GMEM_UFFD_FAULT_WP) {
			struct gmem_uffd_writeprotect w = { { at, page }, 0 };

			wp++;
			NEED(!ioctl(fds[0], GMEM_UFFDIO_WRITEPROTECT, &w));
		} else if (msg.arg.pagefault.flags & GMEM_UFFD_FAULT_MINOR) {
			struct gmem_uffd_continue c = { .range = { at, page } };

			minor++;
			NEED(!ioctl(fds[0], GMEM_UFFDIO_CONTINUE, &c) || errno == EEXIST);
		} else {
			struct gmem_uffd_copy c = { .dst = at, .src = (uint64_t)(uintptr_t)source, .len = page };

			missing++;
			for (size_t i = 0; i < page / 8; i++)
				source[i] = (at - WINDOW) / 8 + i + 5000;
			NEED(!ioctl(fds[0], GMEM_UFFDIO_COPY, &c) || errno == EEXIST);
		}
	}
	fact("served", "missing %lu, minor %lu, write-protect %lu", missing, minor, wp);
}

static void ask(int channel, char what)
{
	NEED(write(channel, &what, 1) == 1 && read(channel, &what, 1) == 1);
}

static void faults_of(bool huge)
{
	const size_t bytes = 64 * MIB, words = bytes / 8;
	int pair[2], fd, uffd, device_fd;
	uint64_t *host, good = 0;
	CUdeviceptr va, out;
	char byte;
	pid_t server;

	NEED(!socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	server = fork();
	if (!server) {
		close(pair[0]);
		serve(pair[1], bytes, huge);
		_exit(0);
	}
	close(pair[1]);
	open_gpu(true);
	out = device_memory(2 * MIB);
	va = reserve_at(WINDOW, bytes);
	NEED(va);
	fd = memory_file(bytes, huge);
	host = mmap((void *)va, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE, fd, 0);
	NEED(host == (void *)va);
	device_fd = open(GMEM_UFFD_DEVICE, O_RDWR | O_CLOEXEC);
	uffd = device_fd < 0 ? -1 : ioctl(device_fd, GMEM_USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
	NEED(uffd >= 0);
	send_fds(pair[0], (int[]){ uffd, fd }, 2);
	NEED(read(pair[0], &byte, 1) == 1);
	MUST(cu->map(va, bytes, 0, create(bytes), 0));
	allow(va, bytes, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
	MUST(run_wait(fill, va, words, 1));
	for (size_t i = 0; i < words; i += 512)
		good += host[i] == i + 5000;
	fact("missing", "%zu of %zu words right, GPU half mapped", (size_t)good, words / 512);
	MUST(run(spin, 0, 0, 300000000)); /* a kernel runs beside what follows */
	ask(pair[0], 'w');
	for (size_t i = good = 0; i < words; i += 512)
		host[i] += 1;
	for (size_t i = good = 0; i < words; i += 512)
		good += host[i] == i + 5001;
	fact("write_protected", "%zu of %zu words right, beside a kernel", (size_t)good, words / 512);
	ask(pair[0], 'p');
	for (size_t i = good = 0; i < words; i += 512)
		good += host[i] == i + 5000;
	fact("punched_and_again", "%zu of %zu words right", (size_t)good, words / 512);
	MUST(cu->stream_synchronize(stream));
	MUST(cu->fill8(out, 0, 8, stream));
	MUST(run_wait(sum, va, words, out));
	MUST(cu->copy_d2h(&good, out, 8, stream));
	MUST(cu->stream_synchronize(stream));
	fact("gpu_half", "%s", good == words + words * (words - 1) / 2 ? "untouched" : "CHANGED");
	fact("unmap_gpu", "%s", name_of(cu->unmap(va, bytes)));
	good = host[512];
	fact("cpu_after_unmap", "%lu (%d expected)", (unsigned long)good, 512 + 5000);
	byte = 'q';
	NEED(write(pair[0], &byte, 1) == 1);
	waitpid(server, NULL, 0);
}

static void faults_shmem(void) { faults_of(false); }
static void faults_huge(void) { faults_of(true); }

/* ---- 5: registered host memory ---- */

static double bandwidth(CUdeviceptr device, void *host, size_t bytes, bool to_device)
{
	double best[5];

	for (int i = 0; i < 5; i++) {
		double t = now_us();

		MUST(to_device ? cu->copy_h2d(device, host, bytes, stream) : cu->copy_d2h(host, device, bytes, stream));
		MUST(cu->stream_synchronize(stream));
		best[i] = (double)bytes / (now_us() - t) / 1e3;
	}
	return median(best, 5);
}

static void registered_of(bool huge)
{
	const size_t bytes = 256 * MIB;
	int fd = memory_file(bytes, huge);
	uint64_t *alias = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), word = 0;
	CUdeviceptr device;
	const char *kind = huge ? "hugetlb" : "shmem";
	double t;
	CUresult r;

	open_gpu(true);
	NEED(alias != MAP_FAILED);
	memset(alias, 3, bytes);
	device = device_memory(bytes);
	fact("pageable", "%s: H2D %.1f GB/s, D2H %.1f GB/s", kind, bandwidth(device, alias, bytes, true), bandwidth(device, alias, bytes, false));
	t = now_us();
	r = cu->host_register(alias, bytes, CU_MEMHOSTREGISTER_PORTABLE);
	fact("register", "%s: %s, %.0f us for 256 MiB", kind, name_of(r), now_us() - t);
	if (r)
		return;
	fact("registered", "%s: H2D %.1f GB/s, D2H %.1f GB/s", kind, bandwidth(device, alias, bytes, true), bandwidth(device, alias, bytes, false));
	fact("registered_2MiB", "%s: H2D %.1f GB/s, D2H %.1f GB/s", kind, bandwidth(device, alias, 2 * MIB, true), bandwidth(device, alias, 2 * MIB, false));
	alias[0] = 111;
	NEED(!fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 2 * MIB));
	alias[0] = 222;
	MUST(cu->copy_h2d(device, alias, MIB, stream)); /* a few words would travel with the command, by the CPU */
	MUST(cu->stream_synchronize(stream));
	MUST(cu->copy_d2h(&word, device, 8, stream));
	MUST(cu->stream_synchronize(stream));
	fact("punched_page", "%s: DMA reads %lu (111: the old page, 222: the new)", kind, (unsigned long)word);
	t = now_us();
	r = cu->host_unregister(alias);
	fact("unregister", "%s: %s, %.0f us", kind, name_of(r), now_us() - t);
	{ /* one staging buffer, a memcpy beside the DMA */
		void *staging = mmap(NULL, 64 * MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

		MUST(cu->host_register(staging, 64 * MIB, CU_MEMHOSTREGISTER_PORTABLE));
		t = now_us();
		memcpy(staging, alias, 64 * MIB);
		fact("memcpy", "%s: %.1f GB/s into a registered buffer", kind, 64 * MIB / (now_us() - t) / 1e3);
		fact("staging", "H2D %.1f GB/s, D2H %.1f GB/s", bandwidth(device, staging, 64 * MIB, true), bandwidth(device, staging, 64 * MIB, false));
	}
	t = now_us();
	MUST(cu->host_register(alias, 2 * MIB, CU_MEMHOSTREGISTER_PORTABLE));
	fact("register_2MiB", "%s: %.0f us", kind, now_us() - t);
	t = now_us();
	MUST(cu->host_unregister(alias));
	fact("unregister_2MiB", "%s: %.0f us", kind, now_us() - t);
}

static void registered_shmem(void) { registered_of(false); }
static void registered_huge(void) { registered_of(true); }

/* ---- 6: HOST_NUMA ---- */

static void host_numa(void)
{
	const size_t bytes = 64 * MIB, words = bytes / 8;
	CUmemAllocationProp prop = prop_of(CU_MEM_LOCATION_TYPE_HOST_NUMA, 0);
	CUmemAccessDesc both[] = { { { CU_MEM_LOCATION_TYPE_DEVICE, 0 }, CU_MEM_ACCESS_FLAGS_PROT_READWRITE },
				   { { CU_MEM_LOCATION_TYPE_HOST_NUMA, 0 }, CU_MEM_ACCESS_FLAGS_PROT_READWRITE } };
	CUmemhandle handle;
	CUdeviceptr va;
	uint64_t good = 0;
	CUresult r;
	double t;
	int fd = -1;

	open_gpu(true);
	r = cu->create(&handle, bytes, &prop, 0);
	fact("create", "%s", name_of(r));
	if (r)
		return;
	fact("export", "%s", name_of(cu->export_fd(&fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0)));
	va = reserve_at(WINDOW, bytes);
	NEED(va);
	MUST(cu->map(va, bytes, 0, handle, 0));
	fact("access_both", "%s", name_of(r = cu->set_access(va, bytes, both, 2)));
	if (r)
		return;
	maps_of("maps", va, va + bytes);
	MUST(run_wait(fill, va, words, 70));
	for (size_t i = 0; i < words; i++)
		good += ((volatile uint64_t *)va)[i] == i + 70;
	fact("cpu_sees_kernel", "%zu of %zu words, same address", (size_t)good, words);
	t = now_us();
	MUST(run_wait(fill, va, words, 71));
	fact("kernel_write", "%.1f GB/s over the link", (double)bytes / (now_us() - t) / 1e3);
}

/* ---- 7: what each call costs ---- */

static void costs_of(const char *when, bool busy)
{
	static const size_t sizes[] = { 2 * MIB, 16 * MIB, 64 * MIB, 256 * MIB };

	for (size_t s = 0; s < LENGTH(sizes); s++) {
		enum { CREATE, EXPORT, IMPORT, MAP, ACCESS, UNMAP, RELEASE, STEPS };
		double us[STEPS][15];
		CUdeviceptr va;

		MUST(cu->reserve(&va, sizes[s], 0, 0, 0));
		for (int i = 0; i < 15; i++) {
			CUmemhandle handle, imported;
			double t = now_us(), t2;
			int fd = -1;

			if (busy)
				MUST(run(spin, 0, 0, 20000000));
			t = now_us();
#define STEP(n, call) MUST(call); t2 = now_us(); us[n][i] = t2 - t; t = t2;
			handle = create(sizes[s]);
			t2 = now_us();
			us[CREATE][i] = t2 - t;
			t = t2;
			STEP(EXPORT, cu->export_fd(&fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0))
			STEP(IMPORT, cu->import_fd(&imported, (void *)(intptr_t)fd, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR))
			STEP(MAP, cu->map(va, sizes[s], 0, imported, 0))
			{
				CUmemAccessDesc desc = { { CU_MEM_LOCATION_TYPE_DEVICE, 0 }, CU_MEM_ACCESS_FLAGS_PROT_READWRITE };

				STEP(ACCESS, cu->set_access(va, sizes[s], &desc, 1))
			}
			STEP(UNMAP, cu->unmap(va, sizes[s]))
			close(fd);
			MUST(cu->release(imported));
			t = now_us();
			STEP(RELEASE, cu->release(handle))
			MUST(cu->stream_synchronize(stream));
		}
		fact(when, "%llu MiB: create %.0f, export %.0f, import %.0f, map %.1f, set access %.0f, unmap %.0f, release %.0f us",
		     (unsigned long long)(sizes[s] / MIB), median(us[CREATE], 15), median(us[EXPORT], 15), median(us[IMPORT], 15),
		     median(us[MAP], 15), median(us[ACCESS], 15), median(us[UNMAP], 15), median(us[RELEASE], 15));
		MUST(cu->unreserve(va, sizes[s]));
	}
}

static void costs(void)
{
	CUdeviceptr va;
	CUmemhandle big, pages[256];
	double t, t2;
	CUmemAccessDesc desc = { { CU_MEM_LOCATION_TYPE_DEVICE, 0 }, CU_MEM_ACCESS_FLAGS_PROT_READWRITE };
	CUresult r;

	open_gpu(true);
	costs_of("idle", false);
	costs_of("busy", true);
	/* parts of a handle */
	MUST(cu->reserve(&va, 512 * MIB, 0, 0, 0));
	big = create(64 * MIB);
	r = cu->map(va, 2 * MIB, 0, big, 0);
	fact("map_first_part", "%s", name_of(r));
	if (!r)
		MUST(cu->unmap(va, 2 * MIB));
	r = cu->map(va, 2 * MIB, 2 * MIB, big, 0);
	fact("map_with_offset", "%s", name_of(r));
	if (!r)
		MUST(cu->unmap(va, 2 * MIB));
	/* the same handle at two places */
	MUST(cu->map(va, 64 * MIB, 0, big, 0));
	r = cu->map(va + 64 * MIB, 64 * MIB, 0, big, 0);
	fact("map_twice", "%s", name_of(r));
	if (!r)
		MUST(cu->unmap(va + 64 * MIB, 64 * MIB));
	r = cu->set_access(va, 2 * MIB, &desc, 1);
	fact("access_to_a_part", "%s", name_of(r));
	MUST(cu->set_access(va, 64 * MIB, &desc, 1));
	desc.flags = CU_MEM_ACCESS_FLAGS_PROT_READ;
	t = now_us();
	r = cu->set_access(va, 64 * MIB, &desc, 1);
	fact("access_read_only", "%s, %.0f us", name_of(r), now_us() - t);
	if (!r)
		fact("kernel_reads_read_only", "%s", name_of(run_wait(sum, va, 100, device_memory(2 * MIB))));
	desc.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
	MUST(cu->unmap(va, 64 * MIB));
	/* a run of pages: one set access for all */
	for (int i = 0; i < 256; i++)
		pages[i] = create(2 * MIB);
	t = now_us();
	for (size_t i = 0; i < 256; i++)
		MUST(cu->map(va + i * 2 * MIB, 2 * MIB, 0, pages[i], 0));
	t2 = now_us();
	r = cu->set_access(va, 512 * MIB, &desc, 1);
	fact("run_of_256", "%s: map %.1f us a page, set access %.0f us in all", name_of(r), (t2 - t) / 256, now_us() - t2);
	t = now_us();
	r = cu->unmap(va, 512 * MIB);
	fact("unmap_256", "%s: %.0f us in one call", name_of(r), now_us() - t);
	if (r)
		for (size_t i = 0; i < 256; i++)
			cu->unmap(va + i * 2 * MIB, 2 * MIB);
	/* unmapping one page while a kernel works on another: does it wait for the kernel? */
	MUST(cu->map(va, 2 * MIB, 0, pages[0], 0));
	MUST(cu->map(va + 2 * MIB, 2 * MIB, 0, pages[1], 0));
	MUST(cu->set_access(va, 4 * MIB, &desc, 1));
	MUST(run(spin, 0, 0, 100000000));
	t = now_us();
	MUST(cu->unmap(va + 2 * MIB, 2 * MIB));
	t2 = now_us();
	MUST(cu->map(va + 2 * MIB, 2 * MIB, 0, pages[2], 0));
	MUST(cu->set_access(va + 2 * MIB, 2 * MIB, &desc, 1));
	fact("beside_a_kernel_of_100_ms", "unmap %.0f us, map and set access %.0f us", t2 - t, now_us() - t2);
	MUST(cu->stream_synchronize(stream));
}

/* ---- 8: who keeps the memory ---- */

static size_t free_now(void)
{
	size_t free_bytes, total;

	MUST(cu->mem_info(&free_bytes, &total));
	return free_bytes;
}

static void kills(void)
{
	const size_t bytes = 1 * GIB;
	int to_owner[2], fd = -1, ready[2];
	pid_t owner, client;
	char byte = 1;
	uint64_t word = 0;

	NEED(!socketpair(AF_UNIX, SOCK_STREAM, 0, to_owner) && !pipe(ready));
	owner = fork();
	if (!owner) { /* without a context */
		CUmemhandle handle;
		int exported = -1;

		open_gpu(false);
		handle = create(bytes);
		fact("create_without_context", "ok");
		MUST(cu->export_fd(&exported, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0));
		send_fds(to_owner[1], &exported, 1);
		pause();
	}
	receive_fds(to_owner[0], &fd, 1); /* this process has no CUDA yet: it is the descriptor store */
	client = fork();
	if (!client) {
		CUmemhandle handle;
		CUdeviceptr va;

		open_gpu(true);
		MUST(cu->import_fd(&handle, (void *)(intptr_t)fd, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR));
		MUST(cu->reserve(&va, bytes, 0, WINDOW, 0));
		MUST(cu->map(va, bytes, 0, handle, 0));
		allow(va, bytes, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
		MUST(run_wait(fill, va, bytes / 8, 4000));
		NEED(write(ready[1], &byte, 1) == 1);
		sleep(2);
		fact("client_after_owner_killed", "%s", name_of(run_wait(bump, va, bytes / 8, 1)));
		NEED(write(ready[1], &byte, 1) == 1);
		pause();
	}
	NEED(read(ready[0], &byte, 1) == 1);
	kill(owner, SIGKILL);
	waitpid(owner, NULL, 0);
	NEED(read(ready[0], &byte, 1) == 1);
	kill(client, SIGKILL);
	waitpid(client, NULL, 0);
	{ /* only a descriptor is left */
		size_t before, after;
		CUmemhandle handle;
		CUdeviceptr va;
		CUresult r;

		open_gpu(true);
		before = free_now();
		r = cu->import_fd(&handle, (void *)(intptr_t)fd, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
		fact("import_after_both_killed", "%s", name_of(r));
		if (!r) {
			MUST(cu->reserve(&va, bytes, 0, WINDOW, 0));
			MUST(cu->map(va, bytes, 0, handle, 0));
			allow(va, bytes, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
			MUST(cu->copy_d2h(&word, va + 8, 8, stream));
			MUST(cu->stream_synchronize(stream));
			fact("content_after_both_killed", "%lu (4002 expected)", (unsigned long)word);
			MUST(cu->unmap(va, bytes));
			MUST(cu->release(handle));
		}
		after = free_now();
		fact("free_with_descriptor", "%llu MiB, then %llu MiB", (unsigned long long)(before / MIB), (unsigned long long)(after / MIB));
		close(fd);
		for (int i = 0; i < 5; i++) {
			usleep(100000);
			fact("free_after_close", "%llu MiB, %d ms", (unsigned long long)(free_now() / MIB), 100 * (i + 1));
			if (free_now() > after + bytes / 2)
				break;
		}
	}
}

/* ---- 10: a kernel on an unmapped address ---- */

static void illegal(void)
{
	int ready[2];
	pid_t other;
	char byte = 1;

	NEED(!pipe(ready));
	other = fork();
	if (!other) {
		CUdeviceptr va;
		int n = 0;

		open_gpu(true);
		va = device_memory(64 * MIB);
		NEED(write(ready[1], &byte, 1) == 1);
		for (double end = now_us() + 3e6; now_us() < end; n++)
			MUST(run_wait(bump, va, 1000, 1));
		fact("other_process", "ran %d kernels without an error", n);
		_exit(0);
	}
	open_gpu(true);
	{
		CUdeviceptr va = reserve_at(WINDOW, 64 * MIB), ok = device_memory(2 * MIB);
		CUdevice unused;
		CUmemhandle handle;
		CUmemAllocationProp prop = prop_of(CU_MEM_LOCATION_TYPE_DEVICE, 0);

		NEED(read(ready[0], &byte, 1) == 1);
		fact("kernel", "%s", name_of(run_wait(bump, va, 1000, 1)));
		fact("next_kernel", "%s", name_of(run_wait(bump, ok, 1000, 1)));
		fact("next_create", "%s", name_of(cu->create(&handle, 2 * MIB, &prop, 0)));
		fact("next_reserve", "%s", name_of(cu->reserve(&va, 2 * MIB, 0, 0, 0)));
		fact("next_device_get", "%s", name_of(cu->device_get(&unused, 0)));
	}
	waitpid(other, NULL, 0);
}

/* ---- the list ---- */

static const struct { const char *name; void (*run)(void); unsigned limit_s; } steps[] = {
	{ "1", what_there_is, 60 }, { "1hmm", pageable, 20 }, { "2", reservations, 30 },
	{ "3shmem", overlay_shmem, 30 }, { "3hugetlb", overlay_huge, 30 }, { "3late", overlay_late, 30 },
	{ "4shmem", faults_shmem, 40 }, { "4hugetlb", faults_huge, 40 },
	{ "5shmem", registered_shmem, 30 }, { "5hugetlb", registered_huge, 30 }, { "6", host_numa, 30 },
	{ "7", costs, 60 }, { "8", kills, 40 }, { "10", illegal, 40 },
};

static void run_step(size_t i)
{
	pid_t pid;
	int status;
	double t = now_us();

	step = steps[i].name;
	pid = fork();
	if (!pid) {
		setpgid(0, 0);
		alarm(steps[i].limit_s);
		steps[i].run();
		_exit(0);
	}
	waitpid(pid, &status, 0);
	kill(-pid, SIGKILL); /* what it may have left */
	if (WIFSIGNALED(status))
		fact("FAILED", "signal %s", strsignal(WTERMSIG(status)));
	fact("took", "%.1f s", (now_us() - t) / 1e6);
}

int main(int argc, char **argv)
{
	const char *missing = NULL;
	int err;

	if (argc < 2) {
		fprintf(stderr, "usage: facts KERNELS.ptx [STEP ...]\n");
		return 2;
	}
	ptx_path = argv[1];
	err = gmem_cuda_api_load(&api, &missing);
	if (err) {
		fprintf(stderr, "libcuda: %s %s\n", strerror(-err), missing ? missing : "");
		return 1;
	}
	for (size_t i = 0; i < LENGTH(steps); i++) {
		bool wanted = argc == 2;

		for (int a = 2; a < argc; a++)
			wanted |= !strcmp(argv[a], steps[i].name);
		if (wanted)
			run_step(i);
	}
	return 0;
}
