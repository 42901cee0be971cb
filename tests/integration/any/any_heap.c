/* SPDX-License-Identifier: Apache-2.0
 *
 * The malloc family, from before main() on, in signal handlers, in handlers of forks, and by many threads.
 */
#include "any.h"

#include <malloc.h>
#include <pthread.h>
#include <signal.h>

#define THREADS 8
#define ROUNDS 20000

void *__libc_malloc(size_t bytes);

static void *early, *earlier;
static char *by_handler;

__attribute__((constructor(101))) static void soon(void)
{
	early = malloc(100);
	memset(early, 1, 100);
}

/* Before libraries are initialised: the loader calls it for relocations. */
static int answer(void)
{
	return 42;
}

static int (*resolve(void))(void)
{
	return answer;
}

int resolved(void) __attribute__((ifunc("resolve")));

static void is_ours(void *at, size_t bytes)
{
	CHECK(at && is_managed(at));
	CHECK(malloc_usable_size(at) >= bytes);
	memset(at, 7, bytes);
}

static void family(void)
{
	void *at = malloc(1000), *more;

	is_ours(at, 1000);
	more = realloc(at, 100000);
	is_ours(more, 100000);
	more = realloc(more, 50);
	CHECK(all(more, 50, 7));
	free(more);
	at = calloc(1000, 1000);
	CHECK(is_managed(at) && all(at, 1000000, 0));
	free(at);
	at = aligned_alloc(4096, 8192);
	CHECK(!((uintptr_t)at & 4095));
	is_ours(at, 8192);
	free(at);
	CHECK(!posix_memalign(&at, 1 << 21, 100));
	CHECK(!((uintptr_t)at & ((1 << 21) - 1)));
	is_ours(at, 100);
	free(at);
	at = memalign(64, 10);
	is_ours(at, 10);
	free(at);
	at = valloc(10);
	is_ours(at, 10);
	free(at);
	at = pvalloc(10);
	is_ours(at, 4096);
	free(at);
	at = reallocarray(NULL, 30, 30);
	is_ours(at, 900);
	free(at);
	at = __libc_malloc(10);
	is_ours(at, 10);
	free(at);
	at = strdup("text");
	CHECK(is_managed(at) && !strcmp(at, "text"));
	free(at);
	at = strndup("text", 2);
	CHECK(is_managed(at) && !strcmp(at, "te"));
	free(at);
}

static void refusals(void)
{
	volatile size_t huge = SIZE_MAX / 2;
	void *at = malloc(10);

	errno = 0;
	CHECK(!malloc(huge) && errno == ENOMEM);
	CHECK(!calloc(huge, 4) && !reallocarray(at, huge, 4) && !realloc(at, huge));
	CHECK(posix_memalign(&at, 3, 10) == EINVAL && posix_memalign(&at, 64, huge) == ENOMEM);
	free(at);
	free(NULL);
	at = malloc(0);
	CHECK(at);
	free(at);
}

/* What the C library allocates for itself is plain, and may be freed, or made larger, by the program. */
static void libcs(void)
{
	char *line = NULL, *text;
	size_t capacity = 0;
	FILE *file = tmpfile();

	CHECK(file && !is_managed(file));
	CHECK(asprintf(&text, "%d", 12345) == 5 && !is_managed(text));
	fputs("a line\n", file);
	rewind(file);
	CHECK(getline(&line, &capacity, file) == 7);
	text = realloc(text, 1 << 20);
	CHECK(is_managed(text) && !strcmp(text, "12345"));
	free(text);
	free(line);
	fclose(file);
}

static void on_signal(int number)
{
	(void)number;
	by_handler = malloc(500); /* it interrupts no malloc here: no worse than plain */
}

static void *work(void *arg)
{
	unsigned seed = (unsigned)(uintptr_t)arg;
	unsigned char *kept[64] = { NULL };
	size_t sizes[64] = { 0 };

	for (int i = 0; i < ROUNDS; i++) {
		unsigned at = (unsigned)rand_r(&seed) % 64;

		if (kept[at])
			CHECK(kept[at][0] == at && kept[at][sizes[at] - 1] == at);
		free(kept[at]);
		sizes[at] = (size_t)rand_r(&seed) % (i % 16 ? 2000 : 300000) + 1;
		kept[at] = malloc(sizes[at]);
		CHECK(is_managed(kept[at]));
		kept[at][0] = kept[at][sizes[at] - 1] = (unsigned char)at;
	}
	for (int i = 0; i < 64; i++)
		free(kept[i]);
	return malloc(10); /* freed by another thread, after the end of this one */
}

static void threads(void)
{
	pthread_t running[THREADS];
	void *left;

	for (uintptr_t i = 0; i < THREADS; i++)
		CHECK(!pthread_create(&running[i], NULL, work, (void *)(i + 1)));
	for (int i = 0; i < THREADS; i++) {
		CHECK(!pthread_join(running[i], &left));
		free(left);
	}
}

static void *before_and_after;

static void prepare(void)
{
	before_and_after = malloc(3000);
}

static void after(void)
{
	free(before_and_after);
	before_and_after = malloc(5000);
	memset(before_and_after, 1, 5000);
}

int main(void)
{
	pid_t child;

	earlier = early;
	is_ours(malloc(1), 1);
	CHECK(resolved() == 42);
	early = realloc(early, 200000); /* from before main() */
	CHECK(all(early, 100, 1));
	free(early);
	family();
	refusals();
	libcs();
	signal(SIGUSR1, on_signal);
	raise(SIGUSR1);
	is_ours(by_handler, 500);
	threads();
	CHECK(!pthread_atfork(prepare, after, after));
	child = fork();
	if (!child) {
		family();
		threads();
		_exit(17);
	}
	CHECK(wait_for(child) == 17);
	puts("ok");
	return 0;
}
