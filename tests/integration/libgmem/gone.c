/* SPDX-License-Identifier: Apache-2.0
 *
 * gone DEVICE KERNELS.SO: says "ready"; when it reads a line, gmemd has been killed. Nothing hangs then.
 */
#include <unistd.h>

#include "check.h"

int main(int argc, char **argv)
{
	struct gmem_context *context;
	struct gmem_fence *fence;
	struct gmem *session;
	char line[8];
	void *at, *other = NULL;
	char *small;

	CHECK(argc == 3);
	OK(gmem_open(NULL, NULL, &session));
	OK(gmem_mmap(session, 1 << 20, NULL, &at));
	memset(at, 1, 1 << 20);
	small = gmem_malloc(session, 10);
	CHECK(small);
	*small = 1;
	OK(gmem_context_open(session, argv[1], NULL, &context));
	OK(gmem_context_launch(context, argv[2], "spin", NULL, 0, NULL, &fence));
	CHECK(write(STDOUT_FILENO, "ready\n", 6) == 6);
	CHECK(read(STDIN_FILENO, line, sizeof(line)) > 0);
	REFUSED(gmem_mmap(session, 1 << 20, NULL, &other), ECONNRESET, "gmemd");
	REFUSED(gmem_prefetch(session, 0, at, 1 << 20), ECONNRESET, "gmemd");
	REFUSED(gmem_munmap(session, at, 1 << 20), ECONNRESET, "gmemd");
	CHECK(!gmem_malloc(session, 100 << 20) && errno == ECONNRESET && strstr(gmem_last_error(), "gmemd"));
	gmem_free(session, small);
	OK(gmem_context_close(context));
	REFUSED(gmem_fence_wait(fence, GMEM_FOREVER, NULL), ECANCELED, "closed");
	gmem_fence_free(fence);
	OK(gmem_close(session));
	CHECK(!other);
	REFUSED(gmem_open(getenv("GMEM_SOCKET"), NULL, &session), ECONNREFUSED, "gmemd.sock");
	return 0;
}
