/* SPDX-License-Identifier: Apache-2.0
 *
 * Nodes: the servers of a cluster (or the only one), which hash slots each of them has, and connections to them that are
 * lent to one thread at a time.
 *
 * The map of the cluster is made by somebody else, who looks it up when he is asked to, over a socket (SOCK_SEQPACKET)
 * of messages in text:
 *
 *   to him      stale
 *   from him    topology N          N nodes follow, a line each, then ranges of slots
 *               node ADDRESS NAME   its number is its place in the message, from 0 on
 *               slots FIRST LAST NUMBER
 *
 * A message that is no such text is dropped as a whole. Without the socket all slots are at one address for ever.
 */
#ifndef GMEM_DRIVERS_NODES_H
#define GMEM_DRIVERS_NODES_H

#include <gmem/lockrank.h>
#include <gmem/types.h>

#include "wire.h"

#define GMEM_NODES_MAX 256       /* addresses ever seen */
#define GMEM_TOPOLOGY_MAX 196608 /* bytes of a message */
#define GMEM_NODE_WIRES 64       /* connections to one node at a time */
#define GMEM_NODE_IDLE 8         /* of them kept while nobody uses them */
#define GMEM_NODE_NONE 0xffffu

struct gmem_node {
	struct gmem_address address;             /* (C) */
	struct gmem_wire *idle[GMEM_NODE_IDLE];  /* lock */
	unsigned idle_count, lent;               /* lock */
	uint64_t refused_until_ns;               /* lock; it could not be connected to, and is not tried before */
};

struct gmem_nodes {
	struct gmem_identity identity;           /* (C) */
	int control;                             /* (C) -1: none */
	uint64_t connect_ns;                     /* (C) how long a connect may take */
	struct gmem_mutex lock;
	pthread_cond_t changed;                  /* with lock: the map is a new one */
	uint16_t slots[GMEM_SLOT_COUNT];         /* lock */
	struct gmem_node *nodes[GMEM_NODES_MAX]; /* lock; what is there once stays */
	unsigned count;                          /* lock */
	uint64_t epoch;                          /* lock */
	uint64_t asked_ns;                       /* lock; when stale was said last */
	char error[GMEM_MESSAGE_MAX];            /* lock; for operators */
};

/* address: of the only server, or NULL. Takes control over. */
int gmem_nodes_init(struct gmem_nodes *nodes, const struct gmem_identity *identity, const struct gmem_address *address,
		    int control, uint64_t connect_ns);
void gmem_nodes_deinit(struct gmem_nodes *nodes);

/* Reads one message; -EAGAIN: there is none, -EPIPE: there will be none any more, -EPROTO: it was dropped. */
int gmem_nodes_listen(struct gmem_nodes *nodes);
/* Asks for a new map; not more than some times a second. */
void gmem_nodes_stale(struct gmem_nodes *nodes);
/* Until the map is a new one, or at most so long. */
void gmem_nodes_wait(struct gmem_nodes *nodes, uint64_t ns);

/* Number of the node that has a slot; GMEM_NODE_NONE. */
unsigned gmem_nodes_of_slot(struct gmem_nodes *nodes, unsigned slot);
/* What MOVED and ASK say: a node that is known, else GMEM_NODE_NONE: what a server says of others is believed only if
 * the map has them as well. from: who said it. moved: it has the slot from now on. */
unsigned gmem_nodes_redirect(struct gmem_nodes *nodes, unsigned from, const struct gmem_redirection *to, bool moved);

/* Lends a connection. -EAGAIN: it was refused a moment ago, or all are lent; else what gmem_wire_open() says. */
int gmem_nodes_lend(struct gmem_nodes *nodes, unsigned node, uint64_t deadline_ns, struct gmem_wire **ret);
/* Takes it back; one that is broken, or in the middle of something, is closed. */
void gmem_nodes_return(struct gmem_nodes *nodes, unsigned node, struct gmem_wire *wire, bool broken);

void gmem_nodes_note(struct gmem_nodes *nodes, const char *format, ...) __attribute__((format(printf, 2, 3)));
void gmem_nodes_error(struct gmem_nodes *nodes, char *ret_text); /* GMEM_MESSAGE_MAX bytes */

#endif
