/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "harness.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <gmem/source.h>
#include <gmem/uffd.h>

unsigned time_limit_s = 100; /* below that of tests/conftest.py */

enum op { OP_UFFD, OP_MMAP, OP_COMMIT, OP_MUNMAP, OP_PREFETCH, OP_DISCARD, OP_ADVISE, OP_HMEMCPY, OP_QUERY,
	  OP_KEEP, OP_MAP_FILE, OP_FLUSH };

struct message {
	enum op op;
	int hnid, err, advice;
	uint64_t va, src, bytes, page_bytes, offset;
	enum gmem_fork fork;
	enum gmem_class class_;
	struct gmem_page_info info;
	bool kept; /* MMAP: may it be, and is it */
};

static bool try_send(int sock, const struct message *m, int fd)
{
	char control[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec iov = { (void *)m, sizeof(*m) };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };

	if (fd >= 0) {
		struct cmsghdr *c;

		msg.msg_control = control;
		msg.msg_controllen = sizeof(control);
		c = CMSG_FIRSTHDR(&msg);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(c), &fd, sizeof(int));
	}
	return sendmsg(sock, &msg, MSG_NOSIGNAL) == sizeof(*m);
}

static void send_message(int sock, const struct message *m, int fd)
{
	CHECK(try_send(sock, m, fd));
}

static bool receive_message(int sock, struct message *m, int *ret_fd)
{
	char control[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec iov = { m, sizeof(*m) };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control,
			      .msg_controllen = sizeof(control) };
	struct cmsghdr *c;

	if (recvmsg(sock, &msg, MSG_CMSG_CLOEXEC) != sizeof(*m))
		return false;
	c = CMSG_FIRSTHDR(&msg);
	if (ret_fd)
		*ret_fd = -1;
	if (c && ret_fd)
		memcpy(ret_fd, CMSG_DATA(c), sizeof(int));
	return true;
}

static int call(struct client *client, struct message *m)
{
	send_message(client->sock, m, -1);
	CHECK(receive_message(client->sock, m, NULL));
	return m->err;
}

/* ---- daemon side ---- */

static int pidfd_of(pid_t pid)
{
	return (int)syscall(SYS_pidfd_open, pid, 0);
}

static void serve_one(struct client *client, struct message *m, int fd)
{
	struct gmem_core *core = client->core;
	struct gmem_region_info region = { 0 };
	struct gmem_mmap_args args = { .bytes = m->bytes, .page_bytes = m->page_bytes, .fork = m->fork,
					.kept = m->kept };
	uint64_t context = 0;
	const char *why;
	size_t count;

	switch (m->op) {
	case OP_UFFD:
		m->err = client->hnid ? gmem_context_attach(core, client->session, client->hnid, fd,
							    pidfd_of(client->pid), client->pid, &context) :
					gmem_session_attach(core, client->session, fd, pidfd_of(client->pid));
		if (client->hnid)
			client->context = context;
		break;
	case OP_MMAP:
		m->err = gmem_mmap(core, client->session, &args, &region);
		m->va = region.va;
		m->bytes = region.bytes;
		m->offset = region.offset;
		m->class_ = region.class_;
		m->kept = region.kept;
		break;
	case OP_MAP_FILE:
		m->err = gmem_map_file(core, client->session, dup(m->hnid),
				       &(struct gmem_file_args){ .bytes = m->bytes, .write = m->advice }, &args, &region, &why);
		m->va = region.va;
		m->bytes = region.bytes;
		m->offset = region.offset;
		m->class_ = region.class_;
		break;
	case OP_FLUSH:
		m->err = gmem_flush(core, client->session, m->va, m->bytes);
		break;
	case OP_COMMIT:
		m->err = gmem_mmap_commit(core, client->session, m->va);
		break;
	case OP_MUNMAP:
		m->err = gmem_munmap(core, client->session, m->va, m->bytes);
		break;
	case OP_KEEP:
		m->err = gmem_munmap_keep(core, client->session, m->va, m->bytes);
		break;
	case OP_PREFETCH:
		m->err = gmem_prefetch(core, client->session, m->hnid, m->va, m->bytes);
		break;
	case OP_DISCARD:
		m->err = gmem_discard(core, client->session, m->va, m->bytes);
		break;
	case OP_ADVISE:
		m->err = gmem_advise(core, client->session, m->hnid, m->va, m->bytes, (enum gmem_advice)m->advice);
		break;
	case OP_HMEMCPY:
		m->err = gmem_hmemcpy(core, client->session, m->hnid, m->va, m->src, m->bytes, false);
		break;
	case OP_QUERY:
		m->err = gmem_query(core, client->session, m->va, 1, &m->info, 1, &count);
		break;
	}
}

static void *serve(void *arg)
{
	struct client *client = arg;
	struct message m;
	int fd;

	while (receive_message(client->sock, &m, &fd)) {
		serve_one(client, &m, fd);
		if (!try_send(client->sock, &m, -1))
			break; /* it has been killed */
	}
	return NULL;
}

int attach_builtin(struct gmem_core *core, const char *driver, const char *name, const char *options)
{
	const char *keys[8], *values[8];
	char message[GMEM_MESSAGE_MAX], *text = strdup(options), *save = NULL;
	struct gmem_driver_config config = { .name = name, .keys = keys, .values = values, .message = message };
	int hnid = -1, err;

	for (char *word = strtok_r(text, " ", &save); word; word = strtok_r(NULL, " ", &save)) {
		char *equals = strchr(word, '=');

		CHECK(equals);
		*equals = '\0';
		keys[config.count] = word;
		values[config.count++] = equals + 1;
	}
	err = gmem_device_attach(core, gmem_driver_builtin(driver), &config, &hnid);
	free(text);
	return err ? err : hnid;
}

int attach_simgpu(struct gmem_core *core, const char *name, const char *options)
{
	return attach_builtin(core, "simgpu", name, options);
}

static int run_process(struct client *client, client_fn fn, void *arg)
{
	struct message m = { .op = OP_UFFD };
	int dev = gmem_uffd_open_device(), uffd;

	if (!client->outlives)
		prctl(PR_SET_PDEATHSIG, SIGKILL);
	signal(SIGBUS, SIG_DFL); /* sanitizers catch these, and tests look for the signal */
	signal(SIGSEGV, SIG_DFL);
	alarm(time_limit_s);
	for (int c = 0; client->hnid && c < GMEM_CLASS_COUNT; c++)
		if (client->fds[c] >= 0)
			CHECK(mmap((void *)client->window.part_base[c], client->window.part_bytes[c],
				   PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE | MAP_NORESERVE,
				   client->fds[c], (off_t)(client->window.part_base[c] - client->window.base)) !=
			      MAP_FAILED);
	client->user_mode_only = dev < 0;
	uffd = gmem_uffd_new(dev);
	CHECK(uffd >= 0);
	send_message(client->sock, &m, uffd);
	CHECK(receive_message(client->sock, &m, NULL));
	CHECK_EQ(m.err, 0);
	return fn(client, arg);
}

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
/* Sanitizers want no fork of a process with threads: a lock of ASan's allocator (gcc 12) that one of them holds stays
 * locked in the child. A nursery, forked while there is one thread, forks the clients instead, twice each, so that they
 * become children of the test, which is their subreaper. What arg points to must be as old as the core, and shared. */
struct birth {
	struct client client;
	client_fn fn;
	void *arg;
};

static int nursery = -1;

static _Noreturn void bear(struct birth *birth, int sock, pid_t reaper)
{
	while (getppid() != reaper)
		sleep_ms(1);
	birth->client.pid = getpid();
	CHECK(write(sock, &birth->client.pid, sizeof(pid_t)) == sizeof(pid_t));
	_exit(run_process(&birth->client, birth->fn, birth->arg));
}

static _Noreturn void nursery_run(int sock, pid_t reaper)
{
	struct birth birth;
	struct message m;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	while (read(sock, &birth, sizeof(birth)) == sizeof(birth)) {
		pid_t between;

		CHECK(receive_message(sock, &m, &birth.client.sock));
		for (int c = 0; c < GMEM_CLASS_COUNT; c++)
			CHECK(receive_message(sock, &m, &birth.client.fds[c]));
		between = fork();
		if (!between) {
			if (!fork())
				bear(&birth, sock, reaper);
			_exit(0);
		}
		CHECK(waitpid(between, NULL, 0) == between);
		close(birth.client.sock);
		for (int c = 0; c < GMEM_CLASS_COUNT; c++)
			if (birth.client.fds[c] >= 0)
				close(birth.client.fds[c]);
	}
	_exit(0);
}

static void nursery_open(void)
{
	pid_t reaper = getpid();
	int pair[2];

	CHECK(!prctl(PR_SET_CHILD_SUBREAPER, 1));
	CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair));
	if (nursery >= 0)
		close(nursery); /* that of the core before ends */
	fflush(NULL);
	if (!fork()) {
		close(pair[0]);
		nursery_run(pair[1], reaper);
	}
	close(pair[1]);
	nursery = pair[0];
}

static pid_t start_process(struct client *client, int sock, client_fn fn, void *arg)
{
	struct birth birth = { *client, fn, arg };
	struct message m = { 0 };
	pid_t pid;

	CHECK(write(nursery, &birth, sizeof(birth)) == sizeof(birth));
	send_message(nursery, &m, sock);
	for (int c = 0; c < GMEM_CLASS_COUNT; c++)
		send_message(nursery, &m, client->fds[c]);
	CHECK(read(nursery, &pid, sizeof(pid)) == sizeof(pid) && pid > 0);
	return pid;
}
#else
static void nursery_open(void)
{
}

static pid_t start_process(struct client *client, int sock, client_fn fn, void *arg)
{
	pid_t pid;

	fflush(NULL);
	pid = fork();
	CHECK(pid >= 0);
	if (!pid) {
		close(client->sock);
		client->sock = sock;
		_exit(run_process(client, fn, arg));
	}
	return pid;
}
#endif

/* The child inherits the daemon's aliases by accident of fork only: they are MADV_DONTFORK. */
static struct client *spawn(struct client *client, client_fn fn, void *arg)
{
	int pair[2];

	CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair));
	client->sock = pair[0];
	client->pid = start_process(client, pair[1], fn, arg);
	close(pair[1]);
	CHECK(!pthread_create(&client->thread, NULL, serve, client));
	return client;
}

static void limit_time(void);

struct gmem_core *core_start(struct gmem_core_config config)
{
	struct gmem_core *core;
	int err;

	limit_time();
	nursery_open();
	if (!config.feature_mask)
		config.feature_mask = ~0ull;
	err = gmem_core_create(&config, &core);
	if (err) {
		fprintf(stderr, "core: %s\n", strerror(-err));
		exit(1);
	}
	return core;
}

struct client *client_start(struct gmem_core *core, client_fn fn, void *arg)
{
	struct client *client = calloc(1, sizeof(*client));

	client->core = core;
	gmem_core_window(core, &client->window);
	CHECK_EQ(gmem_session_create(core, getuid(), getpid(), &client->session), 0);
	CHECK_EQ(gmem_session_files(core, client->session, client->fds), 0);
	return spawn(client, fn, arg);
}

struct client *context_start(struct client *of, int hnid, client_fn fn, void *arg)
{
	struct client *client = calloc(1, sizeof(*client));

	*client = *of;
	client->hnid = hnid;
	CHECK_EQ(gmem_context_files(of->core, of->session, hnid, client->fds), 0);
	return spawn(client, fn, arg);
}

void core_settle(struct gmem_core *core)
{
	struct gmem_core_stats stats;

	for (int i = 0; i < 2000; i++) {
		gmem_core_stats(core, &stats);
		if (!stats.objects)
			break;
		sleep_ms(1);
	}
}

void client_free(struct client *client)
{
	shutdown(client->sock, SHUT_RDWR);
	pthread_join(client->thread, NULL);
	close(client->sock);
	free(client);
}

int client_wait(struct client *client)
{
	int status;

	CHECK(waitpid(client->pid, &status, 0) == client->pid);
	if (client->hnid)
		gmem_context_detach(client->core, client->context);
	else
		CHECK_EQ(gmem_session_destroy(client->core, client->session), 0);
	client_free(client);
	return status;
}

/* ---- client side ---- */

static void *map_region(struct client *client, struct message m)
{
	void *at;

	CHECK_EQ(call(client, &m), 0);
	at = mmap((void *)m.va, m.bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE | MAP_NORESERVE,
		  client->fds[m.class_], (off_t)m.offset);
	CHECK(at == (void *)m.va);
	m.op = OP_COMMIT;
	CHECK_EQ(call(client, &m), 0);
	return at;
}

void *client_mmap(struct client *client, uint64_t bytes, uint64_t page_bytes, enum gmem_fork fork)
{
	return map_region(client, (struct message){ .op = OP_MMAP, .bytes = bytes, .page_bytes = page_bytes, .fork = fork });
}

void *client_mmap_file(struct client *client, int fd, uint64_t bytes, uint64_t page_bytes, bool write)
{
	return map_region(client, (struct message){ .op = OP_MAP_FILE, .hnid = fd, .bytes = bytes,
						    .page_bytes = page_bytes, .advice = write });
}

int client_flush(struct client *client, void *at, uint64_t bytes)
{
	struct message m = { .op = OP_FLUSH, .va = (uintptr_t)at, .bytes = bytes };

	return call(client, &m);
}

void *client_mmap_kept(struct client *client, uint64_t bytes, uint64_t page_bytes, enum gmem_fork fork)
{
	struct message m = { .op = OP_MMAP, .bytes = bytes, .page_bytes = page_bytes, .fork = fork, .kept = true };

	CHECK_EQ(call(client, &m), 0);
	if (m.kept)
		return (void *)m.va;
	m.op = OP_MUNMAP;
	CHECK_EQ(call(client, &m), 0);
	return NULL;
}

struct client *client_admit(struct gmem_core *core, int sock, pid_t pid, const struct client *of, int hnid)
{
	struct client *client = calloc(1, sizeof(*client));
	struct message m = { 0 };

	*client = (struct client){ .core = core, .sock = sock, .pid = pid, .hnid = hnid, .outlives = true };
	gmem_core_window(core, &client->window);
	if (of) {
		client->session = of->session;
		CHECK_EQ(gmem_context_files(core, of->session, hnid, client->fds), 0);
	} else {
		CHECK_EQ(gmem_session_create(core, getuid(), pid, &client->session), 0);
		CHECK_EQ(gmem_session_files(core, client->session, client->fds), 0);
	}
	CHECK(write(sock, client, sizeof(*client)) == sizeof(*client));
	for (int c = 0; c < GMEM_CLASS_COUNT; c++)
		send_message(sock, &m, client->fds[c]);
	CHECK(!pthread_create(&client->thread, NULL, serve, client));
	return client;
}

int client_join(int sock, client_fn fn, void *arg)
{
	struct client client;
	struct message m;

	CHECK(read(sock, &client, sizeof(client)) == sizeof(client));
	client.sock = sock;
	for (int c = 0; c < GMEM_CLASS_COUNT; c++)
		CHECK(receive_message(sock, &m, &client.fds[c]));
	return run_process(&client, fn, arg);
}

int client_prefetch(struct client *client, int hnid, void *at, uint64_t bytes)
{
	struct message m = { .op = OP_PREFETCH, .hnid = hnid, .va = (uint64_t)at, .bytes = bytes };

	return call(client, &m);
}

int client_discard(struct client *client, void *at, uint64_t bytes)
{
	struct message m = { .op = OP_DISCARD, .va = (uint64_t)at, .bytes = bytes };

	return call(client, &m);
}

int client_advise(struct client *client, int hnid, void *at, uint64_t bytes, enum gmem_advice advice)
{
	struct message m = { .op = OP_ADVISE, .hnid = hnid, .va = (uint64_t)at, .bytes = bytes, .advice = (int)advice };

	return call(client, &m);
}

int client_hmemcpy(struct client *client, int hnid, void *dst, const void *src, uint64_t bytes)
{
	struct message m = { .op = OP_HMEMCPY, .hnid = hnid, .va = (uint64_t)dst, .src = (uint64_t)src, .bytes = bytes };

	return call(client, &m);
}

int client_munmap(struct client *client, void *at, uint64_t bytes)
{
	struct message m = { .op = OP_MUNMAP, .va = (uint64_t)at, .bytes = bytes };

	CHECK(!munmap(at, bytes));
	return call(client, &m);
}

int client_keep(struct client *client, void *at, uint64_t bytes)
{
	struct message m = { .op = OP_KEEP, .va = (uint64_t)at, .bytes = bytes };

	return call(client, &m);
}

struct gmem_page_info client_query(struct client *client, const void *at)
{
	struct message m = { .op = OP_QUERY, .va = (uint64_t)at };

	CHECK_EQ(call(client, &m), 0);
	return m.info;
}

void *shared_bytes(size_t bytes)
{
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	CHECK(at != MAP_FAILED);
	return at;
}

void sleep_ms(int ms)
{
	struct timespec t = { ms / 1000, (ms % 1000) * 1000000l };

	nanosleep(&t, NULL);
}

uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

#define OVERCOMMIT "/proc/sys/vm/nr_overcommit_hugepages"
static long overcommit_before = -1;
static pid_t overcommit_owner;

static bool set_overcommit(long pages)
{
	char text[24]; /* no stdio stream: a signal handler comes here, too */
	int fd = open(OVERCOMMIT, O_WRONLY | O_CLOEXEC), length = snprintf(text, sizeof(text), "%ld", pages);
	bool done = fd >= 0 && write(fd, text, (size_t)length) == length;

	if (fd >= 0)
		close(fd);
	return done;
}

static void restore_overcommit(void)
{
	if (overcommit_owner == getpid())
		set_overcommit(overcommit_before);
}

static void out_of_time(int number)
{
	static const char text[] = "hangs: out of time\n";

	(void)number;
	restore_overcommit();
	_exit(write(STDERR_FILENO, text, sizeof(text) - 1) ? 1 : 2);
}

static void limit_time(void)
{
	signal(SIGALRM, out_of_time);
	alarm(time_limit_s);
}

bool hugepages_reserve(unsigned pages)
{
	FILE *f = fopen(OVERCOMMIT, "re");
	long now;

	/* One user at a time, to the end of the process: two would share the pages of the one that asked for more. */
	if (!f || flock(fileno(f), LOCK_EX) || fscanf(f, "%ld", &now) != 1 || now < 0)
		return false;
	if (now >= (long)pages)
		return true;
	if (!set_overcommit(pages))
		return false;
	overcommit_before = now;
	overcommit_owner = getpid();
	atexit(restore_overcommit);
	return true;
}
