/* SPDX-License-Identifier: Apache-2.0
 *
 * private: a gmemd of this process tree's own, started by gmem_open(), shared by its sessions, and gone with the last.
 */
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

int main(void)
{
	const char *const devices[] = { "mine:capacity=4M,driver=simgpu" };
	const char *const wrong[] = { "mine:capacity=nonsense,driver=simgpu" };
	struct gmem_open_options options = { .size = sizeof(options), .devices = devices, .device_count = 1 };
	struct gmem *first, *second, *own;
	int *at, status;
	size_t count;
	pid_t pid;

	OK(gmem_open(NULL, NULL, &first));
	OK(gmem_open(NULL, NULL, &second));
	OK(gmem_open(NULL, &options, &own));
	OK(gmem_devices(first, NULL, 0, 0, &count));
	CHECK(count == 1);
	CHECK(device_of(own, "mine").capacity_bytes == 4 << 20);
	OK(gmem_mmap(first, 4096, NULL, (void **)&at));
	*at = 1;
	pid = fork();
	if (pid == 0) { /* the daemon lives on for a child */
		usleep(300000);
		*at = 2;
		OK(gmem_close(own));
		OK(gmem_close(second));
		OK(gmem_close(first));
		_exit(0);
	}
	CHECK(waitpid(pid, &status, 0) == pid && status == 0);
	CHECK(*at == 2);
	OK(gmem_close(first));
	OK(gmem_close(own));
	OK(gmem_mmap(second, 4096, NULL, (void **)&at));
	OK(gmem_close(second));
	options.devices = wrong;
	REFUSED(gmem_open(NULL, &options, &own), ECONNREFUSED, "capacity");
	setenv("PATH", "/nowhere", 1);
	REFUSED(gmem_open(NULL, NULL, &own), ENOENT, "PATH");
	return 0;
}
