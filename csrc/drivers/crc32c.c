/* SPDX-License-Identifier: Apache-2.0
 *
 * The instruction has a latency of three cycles and a throughput of one, so three streams are run side by side and
 * then joined: the CRC of a stream is moved on over the bytes of the next by a linear map, four table look-ups.
 * (M. Adler's way; V. Gopal et al., "Fast CRC Computation for iSCSI Polynomial Using CRC32 Instruction", Intel 2011.)
 *
 * Carry-less multiplication does as much a cycle, in another unit of the CPU: where there is that for 256 bits, half of
 * what is long is folded by it (V. Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ
 * Instruction", Intel 2009) in the same loop. It goes over a block in order: what is folded, then three streams.
 */
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <pthread.h>
#include <stdbool.h>
#include <string.h>

#include "crc32c.h"

#define POLYNOMIAL 0x82f63b78u /* reflected */
#define STREAM_BYTES 1360      /* three are 4080 of a page's 4096 bytes */
#define ROUNDS 240             /* of a block: */
#define FOLD_ROUND 128         /* bytes that are folded in one, */
#define LONG_ROUND 48          /* and bytes of each of the three streams */
#define LONG_BYTES (ROUNDS * LONG_ROUND)
#define FOLD_BYTES (ROUNDS * FOLD_ROUND)
#define BLOCK_BYTES (FOLD_BYTES + 3 * LONG_BYTES) /* 65280 */

static uint32_t slices[8][256]; /* slicing by 8: [k][b] is byte b with k bytes behind it */
typedef uint32_t shift_table[4][256]; /* [k][b]: byte k of a CRC being b, moved on over so many zeros */
static shift_table shift, long_shift;   /* STREAM_BYTES, LONG_BYTES */
static uint64_t fold_low, fold_high;    /* what 64 bits of 128 are multiplied by to be FOLD_ROUND bytes further on */
static bool has_instruction, has_multiplication;

static void init_shift(shift_table ret, unsigned bytes)
{
	uint32_t basis[32];

	for (int bit = 0; bit < 32; bit++) {
		uint32_t crc = 1u << bit;

		for (unsigned i = 0; i < bytes; i++)
			crc = crc >> 8 ^ slices[0][crc & 255];
		basis[bit] = crc;
	}
	for (int k = 0; k < 4; k++)
		for (int b = 0; b < 256; b++)
			for (int bit = 0; bit < 8; bit++)
				if (b >> bit & 1)
					ret[k][b] ^= basis[8 * k + bit];
}

/* x to that power modulo the polynomial, reflected, as a factor: one bit further up. */
static uint64_t power_of_x(unsigned exponent)
{
	uint32_t power = 1u << 31;

	while (exponent--)
		power = power & 1 ? power >> 1 ^ POLYNOMIAL : power >> 1;
	return (uint64_t)power << 1;
}

static void init(void)
{
	for (uint32_t b = 0; b < 256; b++) {
		uint32_t crc = b;

		for (int bit = 0; bit < 8; bit++)
			crc = crc & 1 ? crc >> 1 ^ POLYNOMIAL : crc >> 1;
		slices[0][b] = crc;
	}
	for (int k = 1; k < 8; k++)
		for (int b = 0; b < 256; b++)
			slices[k][b] = slices[k - 1][b] >> 8 ^ slices[0][slices[k - 1][b] & 255];
	init_shift(shift, STREAM_BYTES);
	init_shift(long_shift, LONG_BYTES);
	fold_low = power_of_x(8 * FOLD_ROUND + 32);
	fold_high = power_of_x(8 * FOLD_ROUND - 32);
#if defined(__x86_64__)
	has_instruction = __builtin_cpu_supports("sse4.2");
	has_multiplication = has_instruction && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("vpclmulqdq");
#endif
}

static void init_once(void)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	pthread_once(&once, init);
}

static uint64_t load(const uint8_t *at)
{
	uint64_t word;

	memcpy(&word, at, sizeof(word));
	return word;
}

uint32_t gmem_crc32c_tables(uint32_t crc, const void *data, size_t bytes)
{
	const uint8_t *at = data;

	init_once();
	crc = ~crc;
	for (; bytes >= 8; at += 8, bytes -= 8) {
		uint64_t word = load(at) ^ crc; /* of little-endian machines, as all of gmem */

		crc = 0;
		for (int k = 0; k < 8; k++)
			crc ^= slices[7 - k][word >> 8 * k & 255];
	}
	for (; bytes; bytes--)
		crc = crc >> 8 ^ slices[0][(crc ^ *at++) & 255];
	return ~crc;
}

#if defined(__x86_64__)
static uint32_t move_on(shift_table by, uint32_t crc)
{
	return by[0][crc & 255] ^ by[1][crc >> 8 & 255] ^ by[2][crc >> 16 & 255] ^ by[3][crc >> 24];
}

__attribute__((target("sse4.2"))) static uint32_t crc_instruction(uint32_t crc, const uint8_t *at, size_t bytes)
{
	uint64_t a = ~crc;

	for (; bytes >= 3 * STREAM_BYTES; at += 3 * STREAM_BYTES, bytes -= 3 * STREAM_BYTES) {
		uint64_t b = 0, c = 0;

		for (size_t i = 0; i < STREAM_BYTES; i += 8) {
			a = __builtin_ia32_crc32di(a, load(at + i));
			b = __builtin_ia32_crc32di(b, load(at + STREAM_BYTES + i));
			c = __builtin_ia32_crc32di(c, load(at + 2 * STREAM_BYTES + i));
		}
		a = move_on(shift, move_on(shift, (uint32_t)a) ^ (uint32_t)b) ^ c;
	}
	for (; bytes >= 8; at += 8, bytes -= 8)
		a = __builtin_ia32_crc32di(a, load(at));
	for (; bytes; bytes--)
		a = __builtin_ia32_crc32qi((uint32_t)a, *at++);
	return ~(uint32_t)a;
}

__attribute__((target("avx2,vpclmulqdq"))) static inline __m256i fold(__m256i bits, __m256i factors, const uint8_t *at)
{
	__m256i low = _mm256_clmulepi64_epi128(bits, factors, 0x00), high = _mm256_clmulepi64_epi128(bits, factors, 0x11);

	return _mm256_xor_si256(_mm256_xor_si256(low, high), _mm256_loadu_si256((const void *)at));
}

/* Of the three streams. The compiler has to unroll it: then the two units of the CPU work side by side. */
__attribute__((target("sse4.2"))) static inline void round_of_streams(uint64_t crcs[3], const uint8_t *at)
{
#pragma GCC unroll 8
	for (int i = 0; i < LONG_ROUND; i += 8) {
		crcs[0] = __builtin_ia32_crc32di(crcs[0], load(at + i));
		crcs[1] = __builtin_ia32_crc32di(crcs[1], load(at + LONG_BYTES + i));
		crcs[2] = __builtin_ia32_crc32di(crcs[2], load(at + 2 * LONG_BYTES + i));
	}
}

/* A block; the CRC is not inverted. */
__attribute__((target("avx2,vpclmulqdq,sse4.2"))) static uint32_t crc_block(uint32_t crc, const uint8_t *at)
{
	const __m256i factors = _mm256_set_epi64x((long long)fold_high, (long long)fold_low, (long long)fold_high,
						  (long long)fold_low);
	const uint8_t *stream = at + FOLD_BYTES;
	__m256i bits[4] = { _mm256_set_epi64x(0, 0, 0, crc) }; /* of nothing, it is the first 32 of what comes */
	uint64_t words[FOLD_ROUND / 8], crcs[3] = { 0 }, folded = 0;

	bits[0] = _mm256_xor_si256(bits[0], _mm256_loadu_si256((const void *)at));
	for (int i = 1; i < 4; i++)
		bits[i] = _mm256_loadu_si256((const void *)(at + 32 * i));
	round_of_streams(crcs, stream);
	for (int round = 1; round < ROUNDS; round++) {
		at += FOLD_ROUND;
		stream += LONG_ROUND;
#pragma GCC unroll 4
		for (int i = 0; i < 4; i++)
			bits[i] = fold(bits[i], factors, at + 32 * i);
		round_of_streams(crcs, stream);
	}
	for (int i = 0; i < 4; i++)
		_mm256_storeu_si256((void *)(words + 4 * i), bits[i]);
	for (int i = 0; i < FOLD_ROUND / 8; i++)
		folded = __builtin_ia32_crc32di(folded, words[i]);
	for (int i = 0; i < 3; i++)
		folded = crcs[i] ^ move_on(long_shift, (uint32_t)folded);
	return (uint32_t)folded;
}

static uint32_t crc_blocks(uint32_t crc, const uint8_t *at, size_t bytes)
{
	crc = ~crc;
	for (; bytes >= BLOCK_BYTES; at += BLOCK_BYTES, bytes -= BLOCK_BYTES)
		crc = crc_block(crc, at);
	return crc_instruction(~crc, at, bytes);
}
#endif

uint32_t gmem_crc32c(uint32_t crc, const void *data, size_t bytes)
{
	init_once();
#if defined(__x86_64__)
	if (has_multiplication && bytes >= BLOCK_BYTES)
		return crc_blocks(crc, data, bytes);
	if (has_instruction)
		return crc_instruction(crc, data, bytes);
#endif
	return gmem_crc32c_tables(crc, data, bytes);
}
