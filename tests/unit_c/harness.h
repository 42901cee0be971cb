/* SPDX-License-Identifier: Apache-2.0
 *
 * Clients for tests of the core: the test process is the daemon, and forks the client and its device contexts, which
 * speak to it over a socket pair as the real ones do over theirs.
 */
#ifndef HARNESS_H
#define HARNESS_H

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>

#include <gmem/core.h>

#define CHECK(cond)                                                                                                    \
	do {                                                                                                           \
		if (!(cond)) {                                                                                         \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #cond);                                    \
			exit(1);                                                                                       \
		}                                                                                                      \
	} while (0)
#define CHECK_EQ(a, b)                                                                                                 \
	do {                                                                                                           \
		long long a_ = (long long)(a), b_ = (long long)(b);                                                    \
		if (a_ != b_) {                                                                                        \
			fprintf(stderr, "%s:%d: %s is %lld, not %lld (%s)\n", __FILE__, __LINE__, #a, a_, b_, #b);     \
			exit(1);                                                                                       \
		}                                                                                                      \
	} while (0)

struct client;
/* Runs in the client's or context's process; its return value is the exit status. */
typedef int (*client_fn)(struct client *client, void *arg);

struct client {
	struct gmem_core *core; /* daemon side only */
	uint64_t session;
	_Atomic uint64_t context; /* contexts: id */
	pid_t pid;
	int sock;               /* client side: requests to the daemon thread */
	struct gmem_window window;
	int fds[GMEM_CLASS_COUNT];
	int hnid;
	bool outlives;          /* it is not the daemon's child, and goes on when that is killed */
	bool user_mode_only;    /* client side: faults of system calls are not served */
	pthread_t thread;
};

/* How long a core, or a client, may take: a test that hangs is a test that fails. Set before core_start(). */
extern unsigned time_limit_s;

struct gmem_core *core_start(struct gmem_core_config config);
/* Waits until fault threads have let go of processes that have ended: no object is left (or 2 s have passed). */
void core_settle(struct gmem_core *core);
int attach_builtin(struct gmem_core *core, const char *driver, const char *name, const char *options); /* "capacity=8M bandwidth=..." */
int attach_simgpu(struct gmem_core *core, const char *name, const char *options);

/* Forks a client that runs fn; serves its requests from a thread. arg: a number, or memory older than the core. */
struct client *client_start(struct gmem_core *core, client_fn fn, void *arg);
/* Forks a context of the client's session on hnid that runs fn. */
struct client *context_start(struct client *client, int hnid, client_fn fn, void *arg);
/* Exit status as of waitpid; frees. A client's session is destroyed. */
int client_wait(struct client *client);
/* Frees a client whose process and session the test has ended itself. */
void client_free(struct client *client);

/* For processes that are older than the daemon, and outlive it: the daemon's side of the socket, for a session (of NULL)
 * or a context of one on hnid, and the process's, which runs fn. */
struct client *client_admit(struct gmem_core *core, int sock, pid_t pid, const struct client *of, int hnid);
int client_join(int sock, client_fn fn, void *arg);

/* ---- in the client's process ---- */
void *client_mmap(struct client *client, uint64_t bytes, uint64_t page_bytes, enum gmem_fork fork);
/* Over a file that the daemon's side has open at the same number. */
void *client_mmap_file(struct client *client, int fd, uint64_t bytes, uint64_t page_bytes, bool write);
int client_flush(struct client *client, void *at, uint64_t bytes);
/* Requests by name: the daemon side runs the core's function and answers with its result. */
int client_prefetch(struct client *client, int hnid, void *at, uint64_t bytes);
int client_discard(struct client *client, void *at, uint64_t bytes);
int client_advise(struct client *client, int hnid, void *at, uint64_t bytes, enum gmem_advice advice);
int client_hmemcpy(struct client *client, int hnid, void *dst, const void *src, uint64_t bytes);
int client_munmap(struct client *client, void *at, uint64_t bytes);
/* munmap of a range that stays mapped (kept.h), and a region in such a range: NULL if there is none. */
int client_keep(struct client *client, void *at, uint64_t bytes);
void *client_mmap_kept(struct client *client, uint64_t bytes, uint64_t page_bytes, enum gmem_fork fork);
struct gmem_page_info client_query(struct client *client, const void *at);

/* Memory shared by all test processes, for flags and results; not managed by the core. */
void *shared_bytes(size_t bytes);
void sleep_ms(int ms);
uint64_t now_ns(void);
/* Raises vm.nr_overcommit_hugepages for this process's life; false if that is not possible. */
bool hugepages_reserve(unsigned pages);

#endif
