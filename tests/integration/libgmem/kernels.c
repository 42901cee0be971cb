/* SPDX-License-Identifier: Apache-2.0
 *
 * Kernels of the tests, the bad ones included.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include <gmem.h>

gmem_kernel answer, add, double_list, crash, crash_outside, spin, leave, hold_still, take_channel, read_zero, pid_of;
gmem_kernel add_in_pages, read_byte;

int answer(void *const *args, size_t arg_count)
{
	(void)args;
	return 40 + (int)arg_count;
}

/* args: uint64_t *, count, addend */
int add(void *const *args, size_t arg_count)
{
	volatile uint64_t *words = args[0];

	if (arg_count != 3)
		return -EINVAL;
	for (size_t i = 0; i < (uintptr_t)args[1]; i++)
		words[i] += (uintptr_t)args[2];
	return 0;
}

/* args[0]: a list; in each node the next one's pointer, then a number, which is doubled. Gives the length. */
int double_list(void *const *args, size_t arg_count)
{
	int length = 0;

	for (uint64_t *node = arg_count == 1 ? args[0] : NULL; node; node = (uint64_t *)(uintptr_t)node[0]) {
		node[1] *= 2;
		length++;
	}
	return length;
}

int crash(void *const *args, size_t arg_count)
{
	volatile int *volatile nowhere = NULL;

	(void)args;
	(void)arg_count;
	return *nowhere;
}

/* args: an address of the window where no region is */
int crash_outside(void *const *args, size_t arg_count)
{
	(void)arg_count;
	return *(volatile int *)args[0];
}

int spin(void *const *args, size_t arg_count)
{
	(void)args;
	(void)arg_count;
	for (;;)
		pause();
}

int leave(void *const *args, size_t arg_count)
{
	(void)args;
	(void)arg_count;
	_exit(3);
}

/* args: milliseconds. Returns them. */
int hold_still(void *const *args, size_t arg_count)
{
	uintptr_t ms = arg_count ? (uintptr_t)args[0] : 100;
	struct timespec wait = { (time_t)(ms / 1000), (long)(ms % 1000) * 1000000 };

	while (nanosleep(&wait, &wait))
		;
	return (int)ms;
}

/* Closes every descriptor of its process, libgmem's among them. */
int take_channel(void *const *args, size_t arg_count)
{
	(void)args;
	(void)arg_count;
	for (int fd = 3; fd < 64; fd++)
		close(fd);
	return 0;
}

/* args: memory, bytes: read(2) into it. Returns the number of bytes read. */
int read_zero(void *const *args, size_t arg_count)
{
	int fd = open("/dev/zero", O_RDONLY | O_CLOEXEC);
	ssize_t n = arg_count == 2 && fd >= 0 ? read(fd, args[0], (uintptr_t)args[1]) : -EINVAL;

	close(fd);
	return n < 0 ? -errno : (int)n;
}

int pid_of(void *const *args, size_t arg_count)
{
	(void)args;
	(void)arg_count;
	return getpid();
}

int read_byte(void *const *args, size_t arg_count)
{
	return arg_count == 1 ? *(uint8_t *)args[0] : -EINVAL;
}

/* args: memory, its bytes, which word of each page of 4 KiB, what it was, addend. Gives how many were something else. */
int add_in_pages(void *const *args, size_t arg_count)
{
	uint8_t *at = args[0], *end = at + (uintptr_t)args[1];
	int wrong = 0;

	if (arg_count != 5)
		return -EINVAL;
	for (at += 8 * (uintptr_t)args[2]; at < end; at += 4096) {
		volatile uint64_t *word = (volatile uint64_t *)(void *)at;

		wrong += *word != (uintptr_t)args[3];
		*word += (uintptr_t)args[4];
	}
	return wrong;
}

/* args: words, how many: adds one to each. */
int pool_add(void *const *args, size_t arg_count)
{
	uint64_t *at = args[0];

	for (size_t i = 0; arg_count == 2 && i < (uintptr_t)args[1]; i++)
		at[i]++;
	return arg_count == 2 ? 0 : -EINVAL;
}
