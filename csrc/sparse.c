/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <stddef.h>
#include <sys/mman.h>

#include <gmem/sparse.h>

/* NORESERVE so that its size is no commitment. */
void *gmem_sparse_map(uint64_t bytes)
{
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (at == MAP_FAILED)
		return NULL;
	madvise(at, bytes, MADV_DONTDUMP);
	return at;
}

void gmem_sparse_unmap(void *at, uint64_t bytes)
{
	if (at)
		munmap(at, bytes);
}
