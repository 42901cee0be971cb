/* SPDX-License-Identifier: Apache-2.0
 *
 * One pointer on the CPU and an NVIDIA GPU, for more memory than the GPU may use: each array is acquired, a kernel is put on
 * a stream, and the array is let go when the stream has come so far. Nothing is copied by hand.
 *
 *	cc cuda.c $(pkg-config --cflags --libs gmem) -o cuda && ./cuda kernels.ptx cuda0:driver=cuda,capacity=64M
 *
 * The kernels are PTX, loaded with CUDA's driver API; tests/gpu/kernels.ptx has them.
 */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <gmem.h>

#define ARRAYS 12
#define WORDS (1u << 20) /* 8 MiB each */

/* What is used of CUDA; a program that has its headers includes <cuda.h>. */
static int (*cu_init)(unsigned);
static int (*cu_retain)(void **, int);
static int (*cu_set)(void *);
static int (*cu_stream)(void **, unsigned);
static int (*cu_load)(void **, const void *);
static int (*cu_function)(void **, void *, const char *);
static int (*cu_launch)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **, void **);

static int find_cuda(void)
{
	const char *name = getenv("GMEM_LIBCUDA");
	void *library = dlopen(name ? name : "libcuda.so.1", RTLD_NOW);
	struct {
		void *at;
		const char *name;
	} calls[] = {
		{ &cu_init, "cuInit" }, { &cu_retain, "cuDevicePrimaryCtxRetain" }, { &cu_set, "cuCtxSetCurrent" },
		{ &cu_stream, "cuStreamCreate" }, { &cu_load, "cuModuleLoadData" }, { &cu_function, "cuModuleGetFunction" },
		{ &cu_launch, "cuLaunchKernel" },
	};

	for (size_t i = 0; library && i < sizeof(calls) / sizeof(calls[0]); i++) {
		*(void **)calls[i].at = dlsym(library, calls[i].name);
		if (!*(void **)calls[i].at)
			return -1;
	}
	return library ? 0 : -1;
}

static int load(const char *path, void **stream, void **kernel)
{
	static char text[65536];
	FILE *in = fopen(path, "re");
	void *context, *module;
	int failed;

	if (!in || !fread(text, 1, sizeof(text) - 1, in))
		return -1;
	fclose(in);
	failed = cu_init(0) || cu_retain(&context, 0) || cu_set(context) || cu_stream(stream, 1) || cu_load(&module, text) ||
		 cu_function(kernel, module, "bump");
	return failed ? -1 : 0;
}

static int say(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, gmem_last_error());
	return 1;
}

/* Adds value to each word; asynchronous. */
static int add(struct gmem_context *context, void *stream, void *kernel, struct gmem_range *array, uint64_t value)
{
	uint64_t at = (uintptr_t)array->va, words = WORDS;
	void *params[] = { &at, &words, &value };

	if (gmem_acquire(context, array, 1, GMEM_ACQUIRE_WRITE))
		return say("gmem_acquire");
	if (cu_launch(kernel, 256, 1, 1, 256, 1, 1, 0, stream, params, NULL))
		fprintf(stderr, "the kernel can't be launched\n");
	return gmem_release_after(context, stream, array, 1) ? say("gmem_release_after") : 0;
}

int main(int argc, char **argv)
{
	const char *devices[] = { argc == 3 ? argv[2] : NULL };
	struct gmem_open_options options = { .size = sizeof(options), .devices = devices, .device_count = 1 };
	struct gmem_range arrays[ARRAYS];
	struct gmem_context *context;
	struct gmem *session;
	void *stream, *kernel;

	if (argc < 2 || find_cuda()) {
		fprintf(stderr, "%s\n", argc < 2 ? "usage: cuda KERNELS.ptx [DEVICE]" : "no CUDA here");
		return 2;
	}
	if (gmem_open(NULL, argc == 3 ? &options : NULL, &session)) /* first: it reserves addresses on the GPU */
		return say("gmem_open");
	if (load(argv[1], &stream, &kernel)) {
		fprintf(stderr, "%s can't be loaded\n", argv[1]);
		return 1;
	}
	if (gmem_context_open(session, "cuda0", NULL, &context))
		return say("gmem_context_open");
	for (uint64_t n = 0; n < ARRAYS; n++) {
		arrays[n].bytes = WORDS * sizeof(uint64_t);
		if (gmem_mmap(session, arrays[n].bytes, NULL, &arrays[n].va))
			return say("gmem_mmap");
		((uint64_t *)arrays[n].va)[7] = n;
	}
	for (uint64_t round = 1; round <= 3; round++)
		for (int n = 0; n < ARRAYS; n++)
			if (add(context, stream, kernel, &arrays[n], round))
				return 1;
	if (gmem_context_synchronize(context, GMEM_FOREVER))
		return say("gmem_context_synchronize");
	for (uint64_t n = 0; n < ARRAYS; n++)
		if (((uint64_t *)arrays[n].va)[7] != n + 6 || ((uint64_t *)arrays[n].va)[WORDS - 1] != 6) {
			fprintf(stderr, "array %d is wrong\n", (int)n);
			return 1;
		}
	if (gmem_context_close(context) || gmem_close(session))
		return say("closing");
	printf("ok: %d arrays of %u MiB\n", ARRAYS, (unsigned)(WORDS * sizeof(uint64_t) >> 20));
	return 0;
}
