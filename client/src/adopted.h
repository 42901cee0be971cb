/* SPDX-License-Identifier: Apache-2.0 */
#ifndef GMEM_CLIENT_ADOPTED_H
#define GMEM_CLIENT_ADOPTED_H

/* From now on madvise(2) asks what is adopted. */
void gmem_adopted_some(void);

#endif
