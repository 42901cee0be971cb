/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_api.h"

static struct gmem_cuda_api api;
static const char *missing;
static int status;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void load(void)
{
	const char *name = secure_getenv("GMEM_LIBCUDA");
	void *library = dlopen(name && *name ? name : "libcuda.so.1", RTLD_NOW | RTLD_LOCAL);

	if (!library) {
		status = -ENOENT;
		return;
	}
#define X(member, symbol, parameters) \
	do { \
		void *found = dlsym(library, #symbol); \
		if (!found) \
			missing = #symbol; \
		memcpy(&api.member, &found, sizeof(found)); \
	} while (0);
	GMEM_CUDA_API(X)
#undef X
	status = missing ? -ENOSYS : 0;
}

int gmem_cuda_api_load(const struct gmem_cuda_api **ret, const char **ret_missing)
{
	pthread_once(&once, load);
	if (ret_missing)
		*ret_missing = missing;
	if (!status)
		*ret = &api;
	return status;
}
