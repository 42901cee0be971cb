/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <gmem/affinity.h>

#define FIELD_AFTER_NAME 3 /* proc_pid_stat(5) counts from 1; the name may hold blanks */
#define FIELD_PROCESSOR 39

int gmem_thread_cpu(pid_t tid)
{
	char path[64], text[1024], *at;
	ssize_t n;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/stat", (int)tid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	n = read(fd, text, sizeof(text) - 1);
	close(fd);
	if (n <= 0)
		return -ESRCH;
	text[n] = '\0';
	at = strrchr(text, ')');
	for (int field = FIELD_AFTER_NAME; at && field <= FIELD_PROCESSOR; field++)
		at = strchr(at + 1, ' ');
	return at ? (int)strtol(at + 1, NULL, 10) : -EIO;
}

int gmem_cpus_get(cpu_set_t *ret)
{
	return sched_getaffinity(0, sizeof(*ret), ret) ? -errno : 0;
}

int gmem_cpus_set(const cpu_set_t *cpus)
{
	return sched_setaffinity(0, sizeof(*cpus), cpus) ? -errno : 0;
}

int gmem_cpu_stay(int cpu)
{
	cpu_set_t cpus;

	if (cpu < 0 || cpu >= CPU_SETSIZE)
		return -EINVAL;
	CPU_ZERO(&cpus);
	CPU_SET(cpu, &cpus);
	return gmem_cpus_set(&cpus);
}

int gmem_thread_waits(struct gmem_waits *ret)
{
	char text[96];
	unsigned long long ran, waited, count;
	int fd = open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
	ssize_t n;

	if (fd < 0)
		return -errno;
	n = read(fd, text, sizeof(text) - 1);
	close(fd);
	if (n <= 0)
		return -EIO;
	text[n] = '\0';
	if (sscanf(text, "%llu %llu %llu", &ran, &waited, &count) != 3)
		return -EIO;
	*ret = (struct gmem_waits){ waited, count };
	return 0;
}
