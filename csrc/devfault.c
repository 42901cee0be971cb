/* SPDX-License-Identifier: Apache-2.0
 *
 * Device faults that have no answer: what a real device would report as a fatal fault of the context.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <gmem/internal.h>

#define STRIKES 3 /* a context that catches the signal and goes on is killed */

bool gmem_devfault_refuse(struct gmem_core *core, struct gmem_view *view, uint64_t va, bool known)
{
	bool last = atomic_fetch_add(&view->strikes, 1) + 1 >= STRIKES;
	int sig = last ? SIGKILL : known ? SIGBUS : SIGSEGV;

	errno = 0;
	if (view->pidfd < 0 || syscall(SYS_pidfd_send_signal, view->pidfd, sig, NULL, 0))
		return errno == ESRCH;
	gmem_core_post(core, known ? GMEM_EVENT_NOT_ACQUIRED : GMEM_EVENT_SEGV, view->session_id, va, view->id,
		       view->hnid, 0);
	return true;
}
