/* SPDX-License-Identifier: Apache-2.0
 *
 * Fork: the session of a child, from its parent's fork event until it shows itself, or is seen to have ended.
 */
#ifndef GMEM_FORK_H
#define GMEM_FORK_H

struct gmem_session;

/* The parent's fork event: a child session that has regions and view, but no known process yet. */
void gmem_session_forked(struct gmem_session *parent, int uffd);
/* Its process has shown itself, or the session ends: it is not among its user's unclaimed ones any more. */
void gmem_session_claimed(struct gmem_session *child);

#endif
