/* SPDX-License-Identifier: Apache-2.0
 *
 * What is mapped in this process's primary contexts. Several contexts of gmem's may be open on one GPU, each with a mapper
 * and a channel of its own, but there is one address space: what two of them map at an address is the same frame, is mapped
 * once, and goes with the last of them. It can be written as long as one of them may.
 */
#ifndef GMEM_CLIENT_CUDA_MAPS_H
#define GMEM_CLIENT_CUDA_MAPS_H

#include <stdbool.h>
#include <stdint.h>

/* Held from the first step of a batch until access has been given: in between, what is mapped can't be used. */
void gmem_cuda_maps_lock(void);
void gmem_cuda_maps_unlock(void);
/* *ret_access: access has to be given, to write if writable. */
CUresult gmem_cuda_maps_add(const struct gmem_cuda_api *cu, CUdevice device, uint64_t va, uint64_t bytes, CUmemhandle handle,
			    bool writable, bool *ret_access);
/* Whether the access that all have together is another one then: it is what is says. */
bool gmem_cuda_maps_change(CUdevice device, uint64_t va, bool was, bool is);
CUresult gmem_cuda_maps_remove(const struct gmem_cuda_api *cu, CUdevice device, uint64_t va, uint64_t bytes, bool writable);

#endif
