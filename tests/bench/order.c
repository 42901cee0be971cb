/* SPDX-License-Identifier: Apache-2.0 */
#include "order.h"

#include <stdlib.h>

uint32_t *random_order(uint32_t count)
{
	static _Thread_local uint64_t random = 88172645463325252ull; /* xorshift64, Marsaglia 2003 */
	uint32_t *order = malloc(count * sizeof(*order));

	if (!order)
		abort();
	for (uint32_t i = 0; i < count; i++) {
		uint32_t other;

		random ^= random << 13;
		random ^= random >> 7;
		random ^= random << 17;
		other = (uint32_t)(random % (i + 1));
		order[i] = order[other];
		order[other] = i;
	}
	return order;
}
