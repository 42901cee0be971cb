/* SPDX-License-Identifier: Apache-2.0
 *
 * Recovery: taking over from a predecessor that was killed at any instant, with what keep.h has of it. Loading makes
 * sessions, objects and regions again; resuming, once the devices are there, settles every page by the rule of lpt.h,
 * looks what the processes have mapped meanwhile, and wakes everybody.
 */
#ifndef GMEM_RECOVER_H
#define GMEM_RECOVER_H

#include <stddef.h>

struct gmem_core;
struct gmem_session;

/* What is referenced from the load to the resume: accounts by id, objects by first page number. */
struct gmem_recovery {
	struct gmem_account **accounts;
	struct gmem_object **objects;
	size_t account_count, object_count;
};

/* -EPROTO: the state makes no sense. */
int gmem_recover_load(struct gmem_core *core);
/* Of what the process had mapped, unmapped and moved, its regions say what it has by now. (reconcile.c) */
void gmem_reconcile(struct gmem_session *session, struct gmem_recovery *recovery);

#endif
