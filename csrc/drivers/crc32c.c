/* SPDX-License-Identifier: Apache-2.0 */
#include <pthread.h>
#include <string.h>

#include "crc32c.h"

#define POLYNOMIAL 0x82f63b78u /* 0x1edc6f41, bits reversed */

static uint32_t tables[8][256]; /* tables[n]: of a byte with n bytes behind it */

static void make_tables(void)
{
	for (uint32_t i = 0; i < 256; i++) {
		uint32_t crc = i;

		for (int bit = 0; bit < 8; bit++)
			crc = crc >> 1 ^ (crc & 1 ? POLYNOMIAL : 0);
		tables[0][i] = crc;
	}
	for (int n = 1; n < 8; n++)
		for (uint32_t i = 0; i < 256; i++)
			tables[n][i] = tables[n - 1][i] >> 8 ^ tables[0][tables[n - 1][i] & 255];
}

uint32_t gmem_crc32c_portable(uint32_t crc, const void *data, size_t bytes)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	const uint8_t *at = data;

	pthread_once(&once, make_tables);
	crc = ~crc;
	for (; bytes >= 8; bytes -= 8, at += 8) {
		uint32_t next = 0;

		for (int n = 0; n < 8; n++)
			next ^= tables[7 - n][at[n] ^ (n < 4 ? crc >> 8 * n & 255 : 0)];
		crc = next;
	}
	for (; bytes; bytes--, at++)
		crc = crc >> 8 ^ tables[0][(crc ^ *at) & 255];
	return ~crc;
}

#ifdef __x86_64__
__attribute__((target("sse4.2"))) static uint32_t by_instruction(uint32_t crc, const void *data, size_t bytes)
{
	const uint8_t *at = data;
	uint64_t wide = ~crc;

	for (; bytes >= 8; bytes -= 8, at += 8) {
		uint64_t word;

		memcpy(&word, at, 8);
		wide = __builtin_ia32_crc32di(wide, word);
	}
	crc = (uint32_t)wide;
	for (; bytes; bytes--, at++)
		crc = __builtin_ia32_crc32qi(crc, *at);
	return ~crc;
}
#endif

uint32_t gmem_crc32c(uint32_t crc, const void *data, size_t bytes)
{
#ifdef __x86_64__
	if (__builtin_cpu_supports("sse4.2"))
		return by_instruction(crc, data, bytes);
#endif
	return gmem_crc32c_portable(crc, data, bytes);
}
