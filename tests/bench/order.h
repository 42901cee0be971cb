/* SPDX-License-Identifier: Apache-2.0 */
#ifndef BENCH_ORDER_H
#define BENCH_ORDER_H

#include <stdint.h>

/* 0 to count - 1 in an order without strides, so that nothing can guess the next page. The caller frees it. */
uint32_t *random_order(uint32_t count);

#endif
