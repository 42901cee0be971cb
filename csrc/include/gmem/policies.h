/* SPDX-License-Identifier: Apache-2.0
 *
 * The algorithms of csrc/policies/, for policy.c.
 */
#ifndef GMEM_POLICIES_H
#define GMEM_POLICIES_H

#include <gmem/policy.h>

extern const struct gmem_policy_ops gmem_policy_lru;
extern const struct gmem_policy_ops gmem_policy_clock;
extern const struct gmem_policy_ops gmem_policy_sieve;
extern const struct gmem_policy_ops gmem_policy_s3fifo;
extern const struct gmem_policy_ops gmem_policy_lfu;
extern const struct gmem_policy_ops gmem_policy_acme;

#endif
