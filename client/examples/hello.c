/* SPDX-License-Identifier: Apache-2.0
 *
 * Memory that moves to where it is used: filled by the CPU, sent to each device and home again, and where it was each
 * time.
 *
 *	cc hello.c $(pkg-config --cflags --libs gmem) -o hello && ./hello simgpu0:capacity=8M
 */
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <gmem.h>

#define BYTES (4u << 20)
#define DEVICES_MAX 16

static int say(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, gmem_last_error());
	return 1;
}

static int show(struct gmem *session, const char *when, const void *data)
{
	struct gmem_page pages[4];
	size_t count;

	if (gmem_query(session, data, BYTES, pages, 4, &count))
		return say("gmem_query");
	printf("%-20s", when);
	for (size_t i = 0; i < count && i < 4; i++)
		printf("  [%zu KiB: valid at 0x%x, %s]", (size_t)1 << (pages[i].page_shift - 10), pages[i].valid,
		       pages[i].state == GMEM_PAGE_RESIDENT ? "resident" : "not there");
	printf("\n");
	return 0;
}

static int visit(struct gmem *session, const struct gmem_device_info *device, unsigned char *data)
{
	printf("device %s (hnid %d, %s, %llu bytes)\n", device->name, device->hnid, device->driver,
	       (unsigned long long)device->capacity_bytes);
	if (device->hnid == GMEM_HOST)
		return 0;
	if (gmem_prefetch(session, device->hnid, data, BYTES))
		return say("gmem_prefetch");
	if (show(session, "after the prefetch", data))
		return 1;
	for (size_t i = 0; i < BYTES; i++) {
		if (data[i] != (unsigned char)(i % 251)) {
			fprintf(stderr, "byte %zu is wrong\n", i);
			return 1;
		}
	}
	return show(session, "read by the CPU", data);
}

int main(int argc, char **argv)
{
	struct gmem_open_options options = { .size = sizeof(options), .devices = (const char *const *)argv + 1,
					     .device_count = (size_t)argc - 1 };
	struct gmem_device_info devices[DEVICES_MAX];
	struct gmem *session;
	size_t count;
	void *data;
	int failed = 0;

	if (gmem_open(NULL, &options, &session))
		return say("gmem_open");
	if (gmem_mmap(session, BYTES, NULL, &data))
		return say("gmem_mmap");
	for (size_t i = 0; i < BYTES; i++)
		((unsigned char *)data)[i] = (unsigned char)(i % 251);
	if (show(session, "filled by the CPU", data))
		return 1;
	if (gmem_devices(session, devices, sizeof(devices[0]), DEVICES_MAX, &count))
		return say("gmem_devices");
	for (size_t i = 0; i < count && i < DEVICES_MAX && !failed; i++)
		failed = visit(session, &devices[i], data);
	if (gmem_munmap(session, data, BYTES))
		return say("gmem_munmap");
	if (gmem_close(session))
		return say("gmem_close");
	if (!failed)
		printf("ok\n");
	return failed;
}
