/* SPDX-License-Identifier: Apache-2.0
 *
 * Between a client and the process of one of its device contexts (gmem-context.c): messages on a SEQPACKET socket pair
 * that both inherit nothing else through.
 *
 *   client                      device process
 *     HELLO ──────────────────►   joins gmemd as a context
 *           ◄────────────────── READY
 *     RUN, MAP, UNMAP ────────►   queued by the socket; one after the other:
 *           ◄────────────────── SAID started
 *           ◄────────────────── SAID done | no_library | no_symbol
 *
 * Either end's end is the context's end. Both are of one build: there is no version.
 */
#ifndef GMEM_CLIENT_LAUNCH_H
#define GMEM_CLIENT_LAUNCH_H

#include <gmem.h>
#include <gmem_wire.h>
#include <stdint.h>

#define GMEM_LAUNCH_FD 3 /* the device process's end */
#define GMEM_LAUNCH_LIBRARY_BYTES 4096
#define GMEM_LAUNCH_SYMBOL_BYTES 256
#define GMEM_LAUNCH_MESSAGE_BYTES 256

struct gmem_launch_hello {
	int32_t parent; /* ends when this process does */
	uint8_t token[GMEM_WIRE_TOKEN_BYTES];
	char socket[GMEM_WIRE_PATH_BYTES];
	char device[GMEM_WIRE_NAME_BYTES];
};

struct gmem_launch_ready {
	int32_t status;
	char message[GMEM_LAUNCH_MESSAGE_BYTES];
};

enum gmem_launch_kind {
	GMEM_LAUNCH_RUN = 0,
	GMEM_LAUNCH_MAP = 1,   /* args: va, bytes, offset in the small file; the value is 0 or -errno */
	GMEM_LAUNCH_UNMAP = 2, /* args: va, bytes */
	GMEM_LAUNCH_COVER = 3, /* args: va of a pool, or va, bytes: the window again; the value is 0 or -errno */
};

struct gmem_launch_run {
	uint64_t id;
	uint64_t kind;
	uint64_t arg_count;
	uint64_t args[GMEM_ARGS_MAX];
	char library[GMEM_LAUNCH_LIBRARY_BYTES];
	char symbol[GMEM_LAUNCH_SYMBOL_BYTES];
};

enum gmem_launch_what {
	GMEM_LAUNCH_STARTED = 1,
	GMEM_LAUNCH_DONE = 2,
	GMEM_LAUNCH_NO_LIBRARY = 3,
	GMEM_LAUNCH_NO_SYMBOL = 4,
};

struct gmem_launch_said {
	uint64_t id;
	uint32_t what;
	int32_t value; /* what the kernel returned */
	char message[GMEM_LAUNCH_MESSAGE_BYTES];
};

#endif
