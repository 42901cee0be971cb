/* SPDX-License-Identifier: Apache-2.0 */
#ifndef GMEM_CRC32C_H
#define GMEM_CRC32C_H

#include <stddef.h>
#include <stdint.h>

/* CRC-32C (Castagnoli), by the CPU's own instruction where there is one. crc: 0, or that of the bytes before. */
uint32_t gmem_crc32c(uint32_t crc, const void *data, size_t bytes);
/* The same by tables. */
uint32_t gmem_crc32c_portable(uint32_t crc, const void *data, size_t bytes);

#endif
