/* SPDX-License-Identifier: Apache-2.0
 *
 * CRC-32C (Castagnoli), the checksum of iSCSI, ext4 and btrfs: x86 has an instruction for it.
 */
#ifndef GMEM_DRIVERS_CRC32C_H
#define GMEM_DRIVERS_CRC32C_H

#include <stddef.h>
#include <stdint.h>

/* crc: 0, or that of the bytes before, so that pieces can be chained. */
uint32_t gmem_crc32c(uint32_t crc, const void *data, size_t bytes);
/* The same without the instruction, for tests. */
uint32_t gmem_crc32c_tables(uint32_t crc, const void *data, size_t bytes);

#endif
