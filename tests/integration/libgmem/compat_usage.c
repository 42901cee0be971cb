/* SPDX-License-Identifier: Apache-2.0
 *
 * openEuler's usage page: mmap, prefetch, free, munmap, /proc/gmemstat. usage: compat_usage BYTES
 */
#include "compat.h"

int main(int argc, char **argv)
{
	size_t bytes = argc > 1 ? strtoul(argv[1], NULL, 0) : 3 * PAGE;
	long to_device, to_host, before, before_home;
	int hnid = gmemGetNumaId();
	uint8_t *data;

	CHECK(hnid > 0);
	data = peer_memory(bytes);
	CHECK(all(data, bytes, 0));
	memset(data, 0x5a, bytes);
	moved(&before, &before_home);
	CHECK(!gmemPrefetch(number(data), bytes, hnid, NULL));
	moved(&to_device, &to_host);
	CHECK(to_device - before >= (long)(bytes / PAGE)); /* others may have moved some, too */
	CHECK(all(data, bytes, 0x5a));                     /* comes home */
	moved(&to_device, &to_host);
	CHECK(to_host > before_home);
	CHECK(!gmemPrefetch(number(data), bytes, hnid, NULL));
	CHECK(!gmemFreeEager(number(data), bytes, NULL));
	CHECK(all(data, bytes & ~(PAGE - 1), 0));
	CHECK(all(data + (bytes & ~(PAGE - 1)), bytes % PAGE, 0x5a)); /* no whole page */
	CHECK(!munmap(data, bytes));
	REFUSED(madvise(data, PAGE, MADV_NORMAL), ENOMEM); /* not mapped */
	return 0;
}
