/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "resp.h"

static bool number_of(const char *text, size_t bytes, int64_t *ret)
{
	bool negative = bytes && text[0] == '-';
	int64_t n = 0;

	if (bytes == negative || bytes - negative > 18)
		return false;
	for (size_t i = negative; i < bytes; i++) {
		if (text[i] < '0' || text[i] > '9')
			return false;
		n = 10 * n + (text[i] - '0');
	}
	*ret = negative ? -n : n;
	return true;
}

ssize_t gmem_resp_parse(const char *data, size_t bytes, struct gmem_resp *ret)
{
	size_t look = bytes < GMEM_RESP_LINE_MAX ? bytes : GMEM_RESP_LINE_MAX;
	const char *end = look ? memchr(data, '\r', look) : NULL;
	struct gmem_resp made = { .number = 0 };

	if (look && !strchr("+-:$", data[0]))
		return -EPROTO;
	if (!end || (size_t)(end - data) + 1 == bytes)
		return !end && look == GMEM_RESP_LINE_MAX ? -EPROTO : 0;
	if (end[1] != '\n' || !data[0])
		return -EPROTO;
	made.type = (enum gmem_resp_type)data[0];
	made.text = data + 1;
	made.text_bytes = (size_t)(end - data) - 1;
	if (made.type == GMEM_RESP_INTEGER || made.type == GMEM_RESP_BULK) {
		if (!number_of(made.text, made.text_bytes, &made.number))
			return -EPROTO;
		if (made.type == GMEM_RESP_BULK && (made.number < -1 || made.number > GMEM_RESP_BULK_MAX))
			return -EPROTO;
	}
	*ret = made;
	return end + 2 - data;
}

static bool begins(const char *text, size_t bytes, const char *word)
{
	size_t length = strlen(word);

	return bytes >= length && !memcmp(text, word, length) && (bytes == length || text[length] == ' ');
}

/* "MOVED 3999 127.0.0.1:6381" */
static bool redirection_of(const char *text, size_t bytes, struct gmem_redirection *ret)
{
	const char *slot = memchr(text, ' ', bytes), *end = text + bytes, *address;
	int64_t number;

	if (!slot)
		return false;
	slot++;
	address = memchr(slot, ' ', (size_t)(end - slot));
	if (!address || !number_of(slot, (size_t)(address - slot), &number) || number < 0 || number >= GMEM_SLOT_COUNT)
		return false;
	address++;
	if (address == end || (size_t)(end - address) >= sizeof(ret->address) || memchr(address, '\0', (size_t)(end - address)))
		return false;
	ret->slot = (unsigned)number;
	memcpy(ret->address, address, (size_t)(end - address));
	ret->address[end - address] = '\0';
	return true;
}

enum gmem_resp_error gmem_resp_error(const char *text, size_t bytes, struct gmem_redirection *ret)
{
	static const struct {
		const char *word;
		enum gmem_resp_error means;
	} known[] = {
		{ "MOVED", GMEM_RESP_MOVED }, { "ASK", GMEM_RESP_ASK }, { "OOM", GMEM_RESP_FULL },
		{ "LOADING", GMEM_RESP_LATER }, { "CLUSTERDOWN", GMEM_RESP_LATER }, { "TRYAGAIN", GMEM_RESP_LATER },
		{ "MASTERDOWN", GMEM_RESP_LATER }, { "BUSY", GMEM_RESP_LATER }, { "NOREPLICAS", GMEM_RESP_LATER },
		{ "UNBLOCKED", GMEM_RESP_LATER }, { "READONLY", GMEM_RESP_STALE }, { "NOAUTH", GMEM_RESP_DENIED },
		{ "WRONGPASS", GMEM_RESP_DENIED }, { "NOPERM", GMEM_RESP_DENIED },
	};

	for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++) {
		if (!begins(text, bytes, known[i].word))
			continue;
		if (known[i].means <= GMEM_RESP_ASK && !redirection_of(text, bytes, ret))
			return GMEM_RESP_REFUSED;
		return known[i].means;
	}
	return GMEM_RESP_REFUSED;
}

/* CRC-16/XMODEM. */
static uint16_t crc16(const char *data, size_t bytes)
{
	static const uint16_t of_four_bits[16] = {
		0x0000, 0x1021, 0x2042, 0x3063, 0x4084, 0x50a5, 0x60c6, 0x70e7, 0x8108, 0x9129, 0xa14a, 0xb16b, 0xc18c, 0xd1ad,
		0xe1ce, 0xf1ef,
	};
	uint16_t crc = 0;

	for (size_t i = 0; i < bytes; i++) {
		crc = (uint16_t)(crc << 4 ^ of_four_bits[crc >> 12 ^ (uint8_t)data[i] >> 4]);
		crc = (uint16_t)(crc << 4 ^ of_four_bits[crc >> 12 ^ ((uint8_t)data[i] & 15)]);
	}
	return crc;
}

unsigned gmem_resp_slot(const char *key, size_t bytes)
{
	const char *open = memchr(key, '{', bytes);
	const char *close = open ? memchr(open + 1, '}', bytes - (size_t)(open + 1 - key)) : NULL;

	if (close && close > open + 1)
		return crc16(open + 1, (size_t)(close - open - 1)) % GMEM_SLOT_COUNT;
	return crc16(key, bytes) % GMEM_SLOT_COUNT;
}
