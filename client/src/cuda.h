/* SPDX-License-Identifier: Apache-2.0
 *
 * CUDA in this process: the window reserved in the GPU's address space (cuda.c), and contexts, whose pages a thread maps
 * there as gmemd's driver asks (cuda_context.c). Shared by libgmem and the Python package. libcuda is loaded when a session
 * is opened with a gmemd that has such a device, and never else.
 */
#ifndef GMEM_CLIENT_CUDA_H
#define GMEM_CLIENT_CUDA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct gmem_link;
struct gmem_cuda;
struct gmem_cuda_api;

/* ---- cuda.c ---- */

/* That this process may want contexts; without, nothing of CUDA is loaded. */
void gmem_cuda_enable(void);
/* Reserves [base, base + bytes) in the GPU's address space, which takes the CPU's as well: PROT_NONE, to be mapped over.
 * Once in a process; where it can't be had, opening a context says why. */
void gmem_cuda_reserve(uint64_t base, uint64_t bytes);
/* Whether what is mapped at the range replaces a reservation. */
bool gmem_cuda_reserved(uint64_t va, uint64_t bytes);
/* 0, and the calls; or -errno and why contexts can't be opened here. message: GMEM_WIRE_MESSAGE_BYTES. */
int gmem_cuda_usable(const struct gmem_cuda_api **ret, char *message);
/* The same, for callers that do not need the calls. */
int gmem_cuda_check(char *message);
/* In a forked child: CUDA stays the parent's. */
void gmem_cuda_forked(void);
/* Held over looking whether a range is free and mapping over it: MAP_FIXED does not look. */
void gmem_cuda_lock(void);
void gmem_cuda_unlock(void);

/* ---- cuda_context.c ---- */

/* The context that gmemd has opened on the connection context, of session; in this process's primary context on that GPU.
 * message: GMEM_WIRE_MESSAGE_BYTES, filled on failure. */
int gmem_cuda_open(struct gmem_link *session, struct gmem_link *context, uint64_t id, struct gmem_cuda **ret, char *message);
/* Waits for what was released after events; then nothing is mapped any more. */
void gmem_cuda_close(struct gmem_cuda *cuda);
/* The GPU's number here: device_id of DLPack. */
int gmem_cuda_ordinal(const struct gmem_cuda *cuda);
/* Lets ranges (address and length, in turn) go when everything that is on the stream by now is done; at once if that can't
 * be known. *ret_ticket: for gmem_cuda_wait(). */
int gmem_cuda_release(struct gmem_cuda *cuda, uint64_t stream, const uint64_t *ranges, size_t count, uint64_t *ret_ticket);
/* Until so many have been released. 0; -ETIMEDOUT; -EIO: the context is broken, and what it was doing has failed. */
int gmem_cuda_wait(struct gmem_cuda *cuda, uint64_t ticket, uint64_t timeout_ns);
/* 0; -EOWNERDEAD: gmemd has ended it; -EIO: CUDA calls fail. what: GMEM_WIRE_MESSAGE_BYTES. */
int gmem_cuda_status(struct gmem_cuda *cuda, char *what);

#endif
