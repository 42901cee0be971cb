/* SPDX-License-Identifier: Apache-2.0
 *
 * Where threads run. Two threads that wait for each other in turn, as one that faults and the one that answers, are
 * quickest on one CPU: waking a thread on another one that sleeps costs as much as all the rest of a fault.
 */
#ifndef GMEM_AFFINITY_H
#define GMEM_AFFINITY_H

#include <sched.h>
#include <stdint.h>
#include <sys/types.h>

/* The CPU a thread last ran on; -errno. tid as this process sees it. */
int gmem_thread_cpu(pid_t tid);
/* The CPUs the calling thread may use. -EINVAL: more than cpu_set_t can name. */
int gmem_cpus_get(cpu_set_t *ret);
int gmem_cpus_set(const cpu_set_t *cpus);
int gmem_cpu_stay(int cpu);

/* How often the calling thread has been given a CPU, and for how long it has waited for one that others had. */
struct gmem_waits {
	uint64_t ns, count;
};

int gmem_thread_waits(struct gmem_waits *ret);

#endif
