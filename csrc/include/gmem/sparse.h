/* SPDX-License-Identifier: Apache-2.0
 *
 * Sparse arrays: zeroed memory that costs what is touched of it.
 */
#ifndef GMEM_SPARSE_H
#define GMEM_SPARSE_H

#include <stdint.h>

void *gmem_sparse_map(uint64_t bytes); /* NULL: no room */
void gmem_sparse_unmap(void *at, uint64_t bytes);

#endif
