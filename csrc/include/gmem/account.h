/* SPDX-License-Identifier: Apache-2.0
 *
 * Account: who is charged for memory, and whose files hold it: a session's part that outlives it while objects shared with
 * its children live. Tenant: the accounts of one user together. Both may have a quota on each hnode; who reaches his
 * quota makes room among his own pages.
 */
#ifndef GMEM_ACCOUNT_H
#define GMEM_ACCOUNT_H

#include <sys/types.h>

#include <gmem/kept.h>
#include <gmem/lockrank.h>
#include <gmem/memfd.h>
#include <gmem/types.h>

struct gmem_core;

/* On one hnode. */
struct gmem_share {
	_Atomic uint64_t resident_bytes; /* (A) changed under that hnode's lock */
	_Atomic uint64_t quota_bytes;    /* (A) 0: none */
};

struct gmem_tenant {
	unsigned refs;                           /* core->tenants_lock */
	uid_t uid;                               /* (C) */
	struct gmem_core *core;                  /* (C) */
	struct gmem_share shares[GMEM_HNODE_MAX];
	_Atomic uint64_t mapped_bytes;           /* (A) */
	_Atomic uint32_t unclaimed;              /* (A) forked children of his that have not shown themselves */
	struct gmem_tenant *next;                /* core->tenants_lock */
};

struct gmem_account {
	atomic_uint refs;                                /* (A) */
	uint64_t session_id;                             /* (C) */
	uint64_t file_bytes;                             /* (C) size of each file: the VA window */
	struct gmem_tenant *tenant;                      /* (C) */
	struct gmem_core *core;                          /* (C) */
	uint32_t record;                                 /* (C) */
	struct gmem_account *parent;                     /* (C) of the session it was forked from: its files stay open */
	struct gmem_mutex lock;                          /* guards the making of files */
	_Atomic(struct gmem_file *) files[GMEM_HNODE_MAX][GMEM_CLASS_COUNT]; /* (A) set once under lock */
	_Atomic(struct gmem_file *) mems[GMEM_HNODE_MAX][GMEM_CLASS_COUNT]; /* (A) changed under lock: of a device that makes its own frames */
	struct gmem_file *retired;                       /* lock; mems of devices that are gone */
	struct gmem_share shares[GMEM_HNODE_MAX];
	uint32_t mates[GMEM_HNODE_MAX];                  /* (H) its frames there, as a ring: the next to look at */
	uint64_t pressure_ns[GMEM_HNODE_MAX];            /* (H) when it last reached its quota; 0: never, or long ago */
	_Atomic uint64_t mapped_bytes;                   /* (A) */
	struct gmem_kept kept;
	_Atomic uint64_t host_faults, device_faults;     /* (A) */
	_Atomic uint32_t sources;                        /* (A) objects with a source: each may be a descriptor */
};

/* A predecessor's account has its record already: number, else 0. */
int gmem_account_create(struct gmem_core *core, uint64_t session_id, uid_t uid, struct gmem_account *parent,
			uint32_t record, struct gmem_account **ret);
struct gmem_account *gmem_account_ref(struct gmem_account *account);
void gmem_account_unref(struct gmem_account *account);
/* The file of that class on hnid, made on first use; borrowed. */
int gmem_account_file(struct gmem_account *account, int hnid, enum gmem_class class_, struct gmem_file **ret);
void gmem_account_map(struct gmem_account *account, int64_t bytes);
/* How many bytes more than it holds on hnid it may hold there; UINT64_MAX without a quota. */
uint64_t gmem_account_room(const struct gmem_account *account, int hnid);

#endif
