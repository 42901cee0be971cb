/* SPDX-License-Identifier: Apache-2.0
 *
 * Recovery: taking over from a predecessor that was killed at any instant, with what keep.h has of it. Loading makes
 * sessions, objects and regions again; resuming, once the devices are there, settles every page by the rule of lpt.h,
 * looks what the processes have mapped meanwhile, and wakes everybody.
 */
#ifndef GMEM_RECOVER_H
#define GMEM_RECOVER_H

struct gmem_core;

/* -EPROTO: the state makes no sense. */
int gmem_recover_load(struct gmem_core *core);

#endif
