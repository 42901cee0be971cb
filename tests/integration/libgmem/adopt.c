/* SPDX-License-Identifier: Apache-2.0
 *
 * adopt DEVICE KERNELS.SO: memory that the program has already comes under management while its threads use it.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/time.h>
#include <sys/wait.h>

#include "check.h"

#define PAGE 4096ul
#define MIB (1ul << 20)
#define PATIENCE_NS 60000000000ull
#define THREADS 4

static struct gmem *session;
static const char *device, *library;
static int hnid;

static uint8_t *anonymous(size_t bytes, int prot, int flags)
{
	uint8_t *at = mmap(NULL, bytes, prot, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);

	CHECK(at != MAP_FAILED);
	return at;
}

static struct gmem_range adopt(void *at, size_t bytes)
{
	struct gmem_range range;

	OK(gmem_adopt(session, at, bytes, NULL, &range));
	return range;
}

static void fill(uint8_t *at, size_t bytes, uint8_t seed)
{
	for (size_t i = 0; i < bytes; i++)
		at[i] = (uint8_t)(seed + i * 7 + i / PAGE);
}

static void check_filled(const uint8_t *at, size_t bytes, uint8_t seed)
{
	for (size_t i = 0; i < bytes; i++)
		if (at[i] != (uint8_t)(seed + i * 7 + i / PAGE))
			FAILED("byte %zu is %u", i, at[i]);
}

static int run(struct gmem_context *context, const char *symbol, void *const *args, size_t count)
{
	struct gmem_fence *fence;
	int value = -1;

	OK(gmem_context_launch(context, library, symbol, args, count, NULL, &fence));
	OK(gmem_fence_wait(fence, PATIENCE_NS, &value));
	gmem_fence_free(fence);
	return value;
}

static bool managed(const void *at)
{
	struct gmem_page page;
	size_t count;

	return !gmem_query(session, at, 1, &page, 1, &count);
}

/* ---- what is adopted, and what it is then ---- */

static void test_ranges(void)
{
	uint8_t *at = anonymous(16 * PAGE, PROT_READ | PROT_WRITE, 0);
	struct gmem_adopt_options edges = { .size = sizeof(edges), .page_bytes = PAGE, .flags = GMEM_ADOPT_EDGES };
	struct gmem_range range = { 0 };
	struct gmem_page page;
	size_t count;

	fill(at, 16 * PAGE, 3);
	range = adopt(at + 100, 4 * PAGE); /* four pages' length, but only three of them whole */
	CHECK(range.va == at + PAGE && range.bytes == 3 * PAGE);
	CHECK(!managed(at) && managed(at + PAGE) && managed(at + 4 * PAGE - 1) && !managed(at + 4 * PAGE));
	check_filled(at, 16 * PAGE, 3);
	range = adopt(at + 5 * PAGE + 1, PAGE);
	CHECK(range.bytes == 0 && !managed(at + 5 * PAGE) && !managed(at + 6 * PAGE));
	OK(gmem_adopt(session, at + 8 * PAGE + 1, PAGE, &edges, &range));
	CHECK(range.va == at + 8 * PAGE && range.bytes == 2 * PAGE && managed(at + 8 * PAGE) && managed(at + 9 * PAGE));
	OK(gmem_query(session, at + 8 * PAGE, PAGE, &page, 1, &count));
	CHECK(page.page_shift == 12 && page.valid == 1);
	fill(at, 16 * PAGE, 9);
	OK(gmem_prefetch(session, hnid, at + PAGE, 3 * PAGE));
	OK(gmem_query(session, at + PAGE, PAGE, &page, 1, &count));
	CHECK(page.valid == 1u << hnid);
	check_filled(at, 16 * PAGE, 9);
	OK(gmem_munmap(session, at + 2 * PAGE, PAGE)); /* both ways */
	CHECK(!munmap(at, 16 * PAGE));
	CHECK(!managed(at + PAGE) && !managed(at + 8 * PAGE));
}

/* Pages that nobody has touched are adopted, and none of them made. */
static void test_sparse(void)
{
	size_t bytes = 1024 * MIB;
	uint8_t *at = anonymous(bytes, PROT_READ | PROT_WRITE, MAP_NORESERVE);
	struct gmem_page page;
	size_t count;
	struct gmem_range range;

	fill(at + 512 * MIB, 3 * PAGE, 1);
	CHECK(at[700 * MIB] == 0); /* the kernel's page of zeros */
	range = adopt(at, bytes);
	CHECK(range.bytes == bytes);
	OK(gmem_query(session, at + 100 * MIB, PAGE, &page, 1, &count));
	CHECK(page.state == GMEM_PAGE_NOMAP);
	check_filled(at + 512 * MIB, 3 * PAGE, 1);
	CHECK(at[700 * MIB] == 0 && at[800 * MIB] == 0);
	CHECK(!munmap(at, bytes));
}

static void test_program_unmaps_and_moves(void)
{
	uint8_t *at = anonymous(8 * MIB, PROT_READ | PROT_WRITE, 0), *to = anonymous(8 * MIB, PROT_NONE, 0);

	fill(at, 8 * MIB, 40);
	adopt(at, 8 * MIB);
	CHECK(!munmap(at + 2 * MIB, MIB));
	CHECK(managed(at) && !managed(at + 2 * MIB) && managed(at + 3 * MIB));
	CHECK(mremap(at + 4 * MIB, 4 * MIB, 4 * MIB, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to);
	for (size_t i = 0; i < 4 * MIB; i += 511)
		CHECK(to[i] == (uint8_t)(40 + (i + 4 * MIB) * 7 + (i + 4 * MIB) / PAGE));
	CHECK(!munmap(at, 4 * MIB));
	CHECK(!munmap(to, 8 * MIB));
	at = malloc(3 * MIB + 5); /* of the C library, with its notes in the first page */
	fill(at, 3 * MIB + 5, 8);
	adopt(at, 3 * MIB + 5);
	check_filled(at, 3 * MIB + 5, 8);
	at = realloc(at, 5 * MIB);
	check_filled(at, 3 * MIB + 5, 8);
	free(at);
}

/* ---- refusals ---- */

static void refuse(void *at, size_t bytes, int number, const char *what)
{
	struct gmem_range range = { (void *)1, 1 };

	REFUSED(gmem_adopt(session, at, bytes, NULL, &range), number, what);
	CHECK(range.va == (void *)1 && range.bytes == 1);
}

static void *hold_stack(void *arg)
{
	uint8_t mine[PAGE];
	void **shared = arg;

	__atomic_store_n(&shared[0], mine, __ATOMIC_RELEASE);
	while (!__atomic_load_n(&shared[1], __ATOMIC_ACQUIRE))
		usleep(1000);
	return NULL;
}

static void refuse_stacks(void)
{
	void *shared[2] = { NULL, NULL };
	pthread_attr_t attributes;
	pthread_t thread;
	uint8_t *stack = anonymous(MIB, PROT_READ | PROT_WRITE, 0);

	refuse((uint8_t *)__builtin_frame_address(0) - 2 * PAGE, 4 * PAGE, EBUSY, "stack");
	pthread_attr_init(&attributes);
	CHECK(!pthread_attr_setstack(&attributes, stack, MIB));
	CHECK(!pthread_create(&thread, &attributes, hold_stack, shared));
	while (!__atomic_load_n(&shared[0], __ATOMIC_ACQUIRE))
		usleep(1000);
	refuse(stack, MIB, EBUSY, "stack of thread");
	__atomic_store_n(&shared[1], stack, __ATOMIC_RELEASE);
	CHECK(!pthread_join(thread, NULL));
	CHECK(adopt(stack, MIB).bytes == MIB); /* it is one no longer */
	CHECK(!munmap(stack, MIB));
}

static void test_refusals(void)
{
	uint8_t *at = anonymous(16 * PAGE, PROT_READ | PROT_WRITE, 0), *ours, *other;
	struct gmem_adopt_options bad = { .size = sizeof(bad), .flags = 0x80 };
	struct gmem_range range;
	int fd = open("/proc/self/exe", O_RDONLY);

	fill(at, 16 * PAGE, 77);
	refuse(at, 0, EINVAL, "bytes: ");
	refuse(at, SIZE_MAX, EINVAL, "bytes: ");
	refuse((void *)(UINTPTR_MAX - PAGE), 2 * PAGE, EINVAL, "bytes: ");
	REFUSED(gmem_adopt(session, at, PAGE, NULL, NULL), EINVAL, "ret: ");
	REFUSED(gmem_adopt(NULL, at, PAGE, NULL, &range), EINVAL, "session: ");
	REFUSED(gmem_adopt(session, at, PAGE, &bad, &range), EINVAL, "options: flags 0x80");
	bad = (struct gmem_adopt_options){ .size = sizeof(bad), .page_bytes = 5 };
	REFUSED(gmem_adopt(session, at, PAGE, &bad, &range), EINVAL, "page_bytes: ");
	CHECK(!munmap(at + 8 * PAGE, PAGE));
	refuse(at, 16 * PAGE, ENOMEM, "is not mapped");
	CHECK(!mprotect(at + 4 * PAGE, PAGE, PROT_NONE));
	refuse(at, 6 * PAGE, EACCES, "can't be read and written");
	CHECK(!mprotect(at + 4 * PAGE, PAGE, PROT_READ));
	refuse(at, 6 * PAGE, EACCES, "can't be read and written");
	CHECK(!mprotect(at + 4 * PAGE, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC));
	refuse(at, 6 * PAGE, EACCES, "executable");
	CHECK(!mprotect(at + 4 * PAGE, PAGE, PROT_READ | PROT_WRITE));
	if (!mlock(at + 2 * PAGE, PAGE)) {
		refuse(at, 6 * PAGE, EBUSY, "locked");
		CHECK(!munlock(at + 2 * PAGE, PAGE));
	}
	other = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	CHECK(other != MAP_FAILED);
	refuse(other, PAGE, EOPNOTSUPP, "file");
	CHECK(!munmap(other, PAGE));
	other = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	refuse(other, PAGE, EOPNOTSUPP, "shared");
	CHECK(!munmap(other, PAGE));
	other = mmap(NULL, 2 * MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
	if (other != MAP_FAILED) {
		refuse(other, 2 * MIB, EOPNOTSUPP, "huge");
		CHECK(!munmap(other, 2 * MIB));
	}
	OK(gmem_mmap(session, 2 * PAGE, NULL, (void **)&ours));
	refuse(ours, PAGE, EEXIST, "managed");
	OK(gmem_munmap(session, ours, 2 * PAGE));
	adopt(at + 2 * PAGE, PAGE);
	refuse(at, 6 * PAGE, EEXIST, "managed");
	refuse_stacks();
	check_filled(at, 8 * PAGE, 77);
	CHECK(!managed(at) && !managed(at + 3 * PAGE));
	CHECK(!munmap(at, 16 * PAGE));
	close(fd);
}

static void test_no_descriptors(void)
{
	struct rlimit before, none;
	uint8_t *at = anonymous(2 * MIB, PROT_READ | PROT_WRITE, 0);
	int fd = dup(0);

	fill(at, 2 * MIB, 21);
	CHECK(!getrlimit(RLIMIT_NOFILE, &before));
	close(fd);
	for (int free_fds = 0; free_fds < 2; free_fds++) { /* one is needed to look what is mapped, two later */
		none = (struct rlimit){ (rlim_t)(fd + free_fds), before.rlim_max };
		CHECK(!setrlimit(RLIMIT_NOFILE, &none));
		refuse(at, 2 * MIB, EMFILE, "");
		CHECK(!setrlimit(RLIMIT_NOFILE, &before));
	}
	CHECK(!managed(at));
	check_filled(at, 2 * MIB, 21);
	adopt(at, 2 * MIB);
	check_filled(at, 2 * MIB, 21);
	CHECK(!munmap(at, 2 * MIB));
}

/* ---- threads and signals ---- */

struct side {
	uint8_t *at;
	size_t bytes;
	int index;
	int pipe[2];
	_Atomic uint64_t *rounds;
	atomic_bool *stop;
};

/* Each has a word in every page, and is the only one to write it: what it reads is what it wrote last. */
static void *count(void *arg)
{
	struct side *side = arg;
	uint64_t n = 0;

	while (!*side->stop) {
		for (size_t i = (size_t)side->index * 8; i < side->bytes; i += PAGE) {
			volatile uint64_t *word = (volatile uint64_t *)(void *)(side->at + i);

			if (*word != n)
				FAILED("thread %d: %llu instead of %llu at %zu", side->index, (unsigned long long)*word,
				       (unsigned long long)n, i);
			*word = n + 1;
		}
		n++;
		side->rounds[side->index] = n;
	}
	return NULL;
}

/* The same, by system calls. */
static void *count_by_pipe(void *arg)
{
	struct side *side = arg;
	uint64_t n = 0;

	while (!*side->stop) {
		for (size_t i = (size_t)side->index * 8; i < side->bytes; i += 16 * PAGE) {
			uint64_t got, next = n + 1;

			CHECK(write(side->pipe[1], side->at + i, 8) == 8 && read(side->pipe[0], &got, 8) == 8);
			if (got != n)
				FAILED("by pipe: %llu instead of %llu at %zu", (unsigned long long)got, (unsigned long long)n, i);
			CHECK(write(side->pipe[1], &next, 8) == 8 && read(side->pipe[0], side->at + i, 8) == 8);
		}
		n++;
		side->rounds[side->index] = n;
	}
	return NULL;
}

static uint8_t *signalled;
static volatile uint64_t signals;

static void on_alarm(int number)
{
	volatile uint64_t *word = (volatile uint64_t *)(void *)(signalled + 1024);

	(void)number;
	if (*word != signals)
		abort();
	signals++;
	*word = signals;
}

static void set_alarm(long period_us)
{
	struct itimerval timer = { { 0, period_us }, { 0, period_us } };
	struct sigaction action = { .sa_handler = on_alarm, .sa_flags = SA_RESTART };

	CHECK(!sigaction(SIGALRM, &action, NULL));
	CHECK(!setitimer(ITIMER_REAL, &timer, NULL));
}

/* So that all that is meant to meet has met: every thread once round since. */
static void await_rounds(_Atomic uint64_t *rounds, int threads)
{
	for (int i = 0; i < threads; i++)
		for (uint64_t seen = rounds[i]; rounds[i] < seen + 2;)
			usleep(500);
}

static void test_threads(struct gmem_context *context)
{
	size_t bytes = 6 * MIB;
	uint8_t *at = anonymous(bytes, PROT_READ | PROT_WRITE, 0);
	static _Atomic uint64_t rounds[THREADS + 1];
	struct side sides[THREADS + 1];
	pthread_t threads[THREADS + 1];
	atomic_bool stop = false;
	sigset_t alarm;
	void *args[5] = { at, (void *)bytes, (void *)(THREADS + 1ul), NULL, (void *)1 };

	signalled = at;
	sigemptyset(&alarm);
	sigaddset(&alarm, SIGALRM);
	CHECK(!pthread_sigmask(SIG_BLOCK, &alarm, NULL)); /* of this thread alone: it is the one that adopts */
	for (int i = 0; i <= THREADS; i++) {
		sides[i] = (struct side){ at, bytes, i, { -1, -1 }, rounds, &stop };
		CHECK(!pipe(sides[i].pipe));
		CHECK(!pthread_create(&threads[i], NULL, i < THREADS || !kernel_faults() ? count : count_by_pipe, &sides[i]));
	}
	CHECK(!pthread_sigmask(SIG_UNBLOCK, &alarm, NULL));
	set_alarm(700);
	await_rounds(rounds, THREADS);
	CHECK(adopt(at, bytes).bytes == bytes);
	await_rounds(rounds, THREADS);
	for (int round = 0; round < 6; round++) {
		int err = gmem_prefetch(session, round % 2 ? 0 : hnid, at, bytes);

		CHECK(!err || err == -ENOMEM || err == -EAGAIN); /* it was taken back meanwhile, or there is too little room */
		args[3] = (void *)(uintptr_t)round;
		CHECK(run(context, "add_in_pages", args, 5) == 0);
		await_rounds(rounds, THREADS);
	}
	set_alarm(0);
	stop = true;
	for (int i = 0; i <= THREADS; i++) {
		CHECK(!pthread_join(threads[i], NULL));
		close(sides[i].pipe[0]);
		close(sides[i].pipe[1]);
	}
	CHECK(signals > 0 && *(uint64_t *)(void *)(at + 1024) == signals);
	CHECK(!munmap(at, bytes));
}

/* ---- devices ---- */

static void test_devices(void)
{
	size_t bytes = 3 * MIB;
	uint8_t *at = anonymous(bytes, PROT_READ | PROT_WRITE, 0), *fresh;
	uint64_t *words = (uint64_t *)(void *)at;
	void *args[3] = { at, (void *)(bytes / 8), (void *)5 };
	struct gmem_context *early, *late;

	OK(gmem_context_open(session, device, NULL, &early));
	for (size_t i = 0; i < bytes / 8; i++)
		words[i] = i;
	adopt(at, bytes);
	OK(gmem_context_open(session, device, NULL, &late));
	CHECK(run(early, "add", args, 3) == 0);
	CHECK(run(late, "add", args, 3) == 0);
	for (size_t i = 0; i < bytes / 8; i++)
		CHECK(words[i] == i + 10);
	/* freed, and something else adopted at the same address */
	CHECK(!munmap(at, bytes));
	fresh = mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	CHECK(fresh == at);
	words[1] = 70;
	adopt(fresh, bytes);
	CHECK(run(early, "add", args, 3) == 0 && words[0] == 5 && words[1] == 75);
	CHECK(run(late, "add", args, 3) == 0 && words[0] == 10 && words[1] == 80);
	OK(gmem_context_close(early));
	OK(gmem_context_close(late));
	CHECK(!munmap(fresh, bytes));
}

/* An address that the context's process has in use, and we have not. */
static uint8_t *taken_in(pid_t pid)
{
	char path[64], line[512];
	uint8_t *at = MAP_FAILED;
	unsigned long start;
	FILE *in;

	snprintf(path, sizeof(path), "/proc/%d/maps", (int)pid);
	in = fopen(path, "r");
	CHECK(in);
	while (at == MAP_FAILED && fgets(line, sizeof(line), in))
		if (sscanf(line, "%lx-", &start) == 1 && strstr(line, "[heap]"))
			at = mmap((void *)start, PAGE, PROT_READ | PROT_WRITE, /* NOREPLACE */
				  MAP_PRIVATE | MAP_ANONYMOUS | 0x100000, -1, 0);
	fclose(in);
	CHECK(at != MAP_FAILED);
	return at;
}

static void test_address_taken_in_context(void)
{
	struct gmem_context *first, *second;
	void *args[1] = { NULL };
	uint8_t *at, *there;
	pid_t pid;

	OK(gmem_context_open(session, device, NULL, &first));
	OK(gmem_context_open(session, device, NULL, &second));
	pid = run(first, "pid_of", args, 0);
	there = at = taken_in(pid);
	*at = 5;
	refuse(at, PAGE, EEXIST, "in use in the context");
	CHECK(!managed(at) && *there == 5);
	OK(gmem_context_close(first));
	adopt(at, PAGE);
	CHECK(*at == 5 && run(second, "read_byte", (void *[]){ at }, 1) == 5);
	OK(gmem_context_close(second));
	CHECK(!munmap(at, PAGE));
}

/* ---- fork, exec ---- */

static void wait_for(pid_t child)
{
	int status;

	CHECK(child > 0 && waitpid(child, &status, 0) == child);
	if (!WIFEXITED(status) || WEXITSTATUS(status))
		FAILED("the child ended with status %#x", status);
}

struct moment {
	volatile uint64_t *first, *last;
	atomic_bool stop;
};

/* First is never behind last, and never two ahead. */
static void *write_in_order(void *arg)
{
	struct moment *moment = arg;

	for (uint64_t n = 1; !moment->stop; n++) {
		*moment->first = n;
		atomic_thread_fence(memory_order_seq_cst);
		*moment->last = n;
		atomic_thread_fence(memory_order_seq_cst);
	}
	return NULL;
}

static void in_child(uint8_t *at, size_t bytes, const struct moment *moment)
{
	uint64_t first = *moment->first, last = *moment->last;
	pid_t next;

	CHECK(first == last || first == last + 1);
	check_filled(at + MIB, bytes - 2 * MIB, 60);
	CHECK(managed(at + MIB));
	fill(at + MIB, bytes - 2 * MIB, 90);
	OK(gmem_prefetch(session, hnid, at + MIB, MIB));
	usleep(2000);
	CHECK(*moment->first == first && *moment->last == last); /* the parent's writes go elsewhere */
	next = fork();
	if (!next) {
		check_filled(at + MIB, bytes - 2 * MIB, 90);
		fill(at + MIB, bytes - 2 * MIB, 91);
		CHECK(!munmap(at, bytes));
		_exit(0);
	}
	wait_for(next);
	check_filled(at + MIB, bytes - 2 * MIB, 90);
	_exit(0);
}

static void test_fork(void)
{
	size_t bytes = 5 * MIB;
	uint8_t *at = anonymous(bytes, PROT_READ | PROT_WRITE, 0);
	struct moment moment = { (uint64_t *)(void *)at, (uint64_t *)(void *)(at + bytes - PAGE), false };
	pthread_t thread;
	pid_t child;

	fill(at + MIB, bytes - 2 * MIB, 60);
	adopt(at, bytes);
	CHECK(!pthread_create(&thread, NULL, write_in_order, &moment));
	for (int round = 0; round < 4; round++) {
		OK(gmem_prefetch(session, round % 2 ? hnid : 0, at + MIB, MIB));
		child = fork();
		if (!child)
			in_child(at, bytes, &moment);
		wait_for(child);
		check_filled(at + MIB, bytes - 2 * MIB, 60);
	}
	child = vfork();
	if (!child) {
		execl("/bin/true", "true", (char *)NULL);
		_exit(1);
	}
	wait_for(child);
	moment.stop = true;
	CHECK(!pthread_join(thread, NULL));
	CHECK(!munmap(at, bytes));
}

/* Without a descriptor the parent can't wait for the child, whose copy would be of no one moment: it gets none. */
static void test_fork_without_descriptors(void)
{
	static int fds[1 << 16];
	uint8_t *at = anonymous(MIB, PROT_READ | PROT_WRITE, 0);
	int count = 0, status;
	pid_t child;

	fill(at, MIB, 3);
	adopt(at, MIB);
	while (count < 1 << 16 && (fds[count] = dup(0)) >= 0)
		count++;
	CHECK(errno == EMFILE);
	child = fork();
	if (!child) {
		signal(SIGSEGV, SIG_DFL);
		_exit(at[0] == 3 ? 1 : 2);
	}
	while (count)
		close(fds[--count]);
	CHECK(child > 0 && waitpid(child, &status, 0) == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
	check_filled(at, MIB, 3);
	CHECK(!munmap(at, MIB));
}

/* The session ends, the memory does not: it is private again, and nobody has noticed. */
static void test_close(void)
{
	size_t bytes = 7 * MIB;
	uint8_t *at = anonymous(bytes, PROT_READ | PROT_WRITE, 0), *heap = malloc(64 * PAGE);
	static _Atomic uint64_t rounds[2];
	struct side sides[2];
	pthread_t threads[2];
	atomic_bool stop = false;
	char command[64];

	fill(heap, 64 * PAGE, 5);
	adopt(heap, 64 * PAGE);
	for (int i = 0; i < 2; i++) {
		sides[i] = (struct side){ at, bytes - MIB, i, { -1, -1 }, rounds, &stop };
		CHECK(!pthread_create(&threads[i], NULL, count, &sides[i]));
	}
	adopt(at, bytes);
	await_rounds(rounds, 2);
	gmem_prefetch(session, hnid, at, bytes - MIB);
	OK(gmem_prefetch(session, hnid, heap + PAGE, 8 * PAGE));
	OK(gmem_close(session));
	await_rounds(rounds, 2);
	stop = true;
	for (int i = 0; i < 2; i++)
		CHECK(!pthread_join(threads[i], NULL));
	for (size_t i = 0; i < bytes - MIB; i += PAGE)
		CHECK(*(uint64_t *)(void *)(at + i) == rounds[0] && *(uint64_t *)(void *)(at + i + 8) == rounds[1]);
	check_filled(heap, 64 * PAGE, 5);
	snprintf(command, sizeof(command), "grep -q memfd:gmem /proc/%d/maps >&2", (int)getpid());
	CHECK(WEXITSTATUS(system(command)) == 1); /* none */
	free(heap);
	CHECK(!munmap(at, bytes));
}

int main(int argc, char **argv)
{
	struct gmem_context *context;

	CHECK(argc == 3);
	device = argv[1];
	library = argv[2];
	OK(gmem_open(NULL, NULL, &session));
	hnid = hnid_of(session, device);
	test_ranges();
	test_sparse();
	test_program_unmaps_and_moves();
	test_refusals();
	test_no_descriptors();
	test_devices();
	test_address_taken_in_context();
	OK(gmem_context_open(session, device, NULL, &context));
	test_threads(context);
	OK(gmem_context_close(context));
	test_fork();
	test_fork_without_descriptors();
	test_close();
	printf("adopt: ok\n");
	return 0;
}
