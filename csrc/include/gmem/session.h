/* SPDX-License-Identifier: Apache-2.0
 *
 * Session: one client process: its identity, its as, its device contexts.
 */
#ifndef GMEM_SESSION_H
#define GMEM_SESSION_H

#include <gmem/as.h>
#include <gmem/core.h>

struct gmem_session {
	atomic_uint refs;             /* (A) */
	struct gmem_core *core;       /* (C) */
	uint64_t id;                  /* (C) */
	uid_t uid;                    /* (C) */
	_Atomic pid_t pid;            /* (A) */
	struct gmem_as as;
	struct gmem_account *account; /* (C) */
	uint64_t parent;              /* (C) session id of the parent it was forked from, or 0 */
	atomic_bool stored;           /* (A) came by a fork event, and is served */
	atomic_bool bound;            /* (A) the process has shown itself */
	atomic_bool closed;           /* (A) */
	atomic_bool disowned;         /* (A) its process begins anew: it is not to find its memory poisoned */
	atomic_bool unclaimed;        /* (A) counted by its tenant */
	uint32_t record;              /* core->sessions_lock; 0 once destroyed */
	struct gmem_ring *ring;       /* core->rings->lock; NULL if it has none */
	struct gmem_session *next;    /* core->sessions_lock */
};

int gmem_session_new(struct gmem_core *core, uid_t uid, pid_t pid, struct gmem_session *parent,
		     struct gmem_session **ret);
/* One of a predecessor's, whose account is there. */
int gmem_session_adopt(struct gmem_core *core, const struct gmem_record *known, uint32_t record,
		       struct gmem_account *account, struct gmem_session **ret);
/* Keeps what has changed in it since. */
void gmem_session_record(struct gmem_session *session);
/* Referenced; NULL if unknown. */
struct gmem_session *gmem_session_get(struct gmem_core *core, uint64_t id);
struct gmem_session *gmem_session_ref(struct gmem_session *session);
void gmem_session_unref(struct gmem_session *session);
/* The session's files on hnid, by class; -1 where there is none. */
int gmem_session_borrow(struct gmem_session *session, int hnid, int ret_fds[GMEM_CLASS_COUNT]);
/* uffd features to ask for; events: of the process itself, which may unmap, move and fork. */
uint64_t gmem_session_features(struct gmem_core *core, bool events);
/* The view of a context; referenced; NULL if unknown. */
struct gmem_view *gmem_context_find(struct gmem_core *core, uint64_t context);
/* Makes the view of a process, known to movers; takes over the fds on success only. */
int gmem_session_view(struct gmem_session *session, int hnid, uint64_t context, int uffd, int pidfd, pid_t pid,
		      bool events, struct gmem_view **ret);
/* The same, kept and watched: from here on its faults are served. */
int gmem_session_watch(struct gmem_session *session, int hnid, uint64_t context, int uffd, int pidfd, pid_t pid,
		       bool events, struct gmem_view **ret);
/* The view of a context in the client's own process, known to movers; takes the pmap over on success. channel: the driver's, to
 * be held for a successor. ret: NULL is allowed. */
int gmem_session_view_pmap(struct gmem_session *session, struct gmem_hnode *hnode, uint64_t context, struct gmem_pmap *pmap,
			   int channel, pid_t pid, struct gmem_view **ret);
void gmem_session_unwatch(struct gmem_session *session, struct gmem_view *view);
/* Discards what nobody maps any more; the callback of gmem_as_remove. */
void gmem_session_release_piece(struct gmem_object *object, uint64_t offset, uint64_t bytes, void *arg);

#endif
