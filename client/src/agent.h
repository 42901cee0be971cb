/* SPDX-License-Identifier: Apache-2.0
 *
 * Agent: a thread that drops translations in this process when gmemd asks, so that idle pages can be told from used ones
 * (see gmem_wire.h).
 */
#ifndef GMEM_CLIENT_AGENT_H
#define GMEM_CLIENT_AGENT_H

#include <stdint.h>

struct gmem_agent;

/* For ranges that are not in the window, by the agent's thread. */
typedef void (*gmem_agent_fn)(void *arg, uint64_t va, uint64_t bytes);
/* Serves the file behind fd. beside: NULL to pass over what is not in the window. Closes fd in every case. */
int gmem_agent_start(int fd, uint64_t window_base, uint64_t window_bytes, gmem_agent_fn beside, void *arg,
		     struct gmem_agent **ret);
void gmem_agent_stop(struct gmem_agent *agent);
/* In a forked child, which has no such thread: only its memory is left to free. */
void gmem_agent_abandon(struct gmem_agent *agent);

#endif
