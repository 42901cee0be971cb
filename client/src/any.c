/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "any.h"
#include "error.h"
#include "interpose.h"
#include "session.h"
#include "syscalls.h"

#define EXIT_OURS 125 /* as timeout(1) and env(1) have it: not the program's */
#define PAGE_DEFAULT 65536
#define MMAP_DEFAULT (1ul << 20)

struct gmem_any gmem_any;
_Atomic int gmem_any_state = GMEM_ANY_STARTING;

static void say(const char *format, va_list args)
{
	char line[512] = "gmem: ";
	size_t length = strlen(line);

	vsnprintf(line + length, sizeof(line) - length - 1, format, args);
	length = strlen(line);
	line[length] = '\n';
	if (write(STDERR_FILENO, line, length + 1) < 0) {
		/* there is nobody to tell */
	}
}

void gmem_any_say(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	say(format, args);
	va_end(args);
}

void gmem_any_die(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	say(format, args);
	va_end(args);
	abort();
}

static size_t setting(const char *name, size_t otherwise)
{
	const char *text = secure_getenv(name);

	return text && *text ? strtoul(text, NULL, 10) : otherwise;
}

static int check(struct gmem *session)
{
	if (!gmem_link_has_ring(session->link))
		return gmem_fail(-EOPNOTSUPP, "this gmemd serves no rings");
	if (session->link->uffd_dev < 0)
		return gmem_fail(-EPERM, "gmemd may not open /dev/userfaultfd (see the udev rule 60-gmem.rules), and without "
				 "it system calls would fail on memory that is elsewhere");
	return 0;
}

static int connect_to(const char *path)
{
	struct gmem *session;
	int err = gmem_open(path, NULL, &session);

	if (err)
		return err;
	err = check(session);
	if (err) {
		char why[256];

		snprintf(why, sizeof(why), "%s", gmem_last_error());
		gmem_close(session);
		return gmem_fail(err, "%s", why);
	}
	gmem_any.session = session;
	gmem_any.base = gmem_link_window_base(session->link);
	gmem_any.window_bytes = gmem_link_window_bytes(session->link);
	gmem_any.page_bytes = setting("GMEM_RUN_PAGE_BYTES", PAGE_DEFAULT);
	gmem_any.mmap_bytes = setting("GMEM_RUN_MMAP_BYTES", MMAP_DEFAULT);
	return 0;
}

static int start(const char *path)
{
	int err = gmem_any_fork_first();

	if (!err)
		err = gmem_any_map_init();
	if (!err && path)
		err = connect_to(path);
	if (!err)
		err = gmem_any_heap_init();
	if (!err)
		err = gmem_any_fork_last();
	return err;
}

/* Before the program's own constructors, as a preloaded library that needs libc only. */
__attribute__((constructor(101))) static void start_any(void)
{
	const char *path = secure_getenv("GMEM_RUN_SOCKET");
	struct gmem_visit visit;
	int err;

	free(malloc(1)); /* jemalloc's fork handlers are known from now on */
	/* A program with one thread can tell when there are two: its rights are a thread's own. */
	gmem_link_may_start_agent = false;
	gmem_enter(&visit);
	err = start(path);
	if (err && gmem_any.session) {
		gmem_close(gmem_any.session);
		gmem_any.session = NULL;
	}
	gmem_leave(&visit);
	if (err) {
		bool required = setting("GMEM_RUN_REQUIRE", 0);

		if (required || !setting("GMEM_RUN_QUIET", 0))
			gmem_any_say("%s: %s: %s", program_invocation_short_name,
				     required ? "no managed memory" : "plain memory is used", gmem_last_error());
		if (required)
			_exit(EXIT_OURS);
		gmem_any_heap_init();
		gmem_any_fork_last();
	}
	if (gmem_any.session)
		gmem_any_hide_fds();
	atomic_store_explicit(&gmem_any_state, gmem_any.session ? GMEM_ANY_MANAGED : GMEM_ANY_PLAIN,
			      memory_order_release);
}
