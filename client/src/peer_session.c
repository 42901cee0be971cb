/* SPDX-License-Identifier: Apache-2.0
 *
 * The session of openEuler's interface, and what it asks of gmemd that is not about memory.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <unistd.h>

#include "atfork.h"
#include "error.h"
#include "peer.h"
#include "session.h"

#define HNODES_MAX 32

static pthread_mutex_t session_lock = PTHREAD_MUTEX_INITIALIZER; /* of opening it */
static struct gmem *_Atomic default_session;

/* Past stdio, which a forked child shares with its parent. */
void gmem_peer_say(const char *what)
{
	dprintf(STDERR_FILENO, "libgmem: %s: %s\n", what, gmem_last_error());
}

/* Another thread of the parent may have been opening a session, which the child then does not have. */
static void forget_opening(void)
{
	pthread_mutex_init(&session_lock, NULL);
}

static void install_first(void)
{
	gmem_atfork(NULL, NULL, forget_opening);
}

void gmem_peer_warn_once(const char *what)
{
	static atomic_flag said = ATOMIC_FLAG_INIT;

	if (!atomic_flag_test_and_set(&said))
		gmem_peer_say(what);
}

struct gmem *gmem_peer_session_if_open(void)
{
	return default_session;
}

void gmem_peer_session_forget(void)
{
	default_session = NULL;
}

/* No private gmemd is started: it would have no devices. */
int gmem_peer_session(struct gmem **ret)
{
	static pthread_once_t first = PTHREAD_ONCE_INIT, handlers = PTHREAD_ONCE_INIT;
	const char *path = gmem_session_chosen_socket();
	int err = 0;

	pthread_once(&first, install_first);
	pthread_mutex_lock(&session_lock);
	if (!default_session) {
		struct gmem *session;

		err = gmem_peers.list ? 0 : gmem_pieces_init(&gmem_peers);
		if (!err)
			err = gmem_open(path ? path : GMEM_SYSTEM_SOCKET, NULL, &session);
		if (!err) {
			pthread_once(&handlers, gmem_peer_install_handlers);
			default_session = session;
		}
	}
	pthread_mutex_unlock(&session_lock);
	if (err) {
		gmem_peer_warn_once("no gmemd");
		return gmem_fail(-ENOTCONN, "no gmemd: %s", gmem_strerror(err));
	}
	*ret = default_session;
	return 0;
}

static int list_devices(struct gmem_device_info *ret, size_t *ret_count)
{
	struct gmem *session;
	int err = gmem_peer_session(&session);

	if (!err)
		err = gmem_devices(session, ret, sizeof(*ret), HNODES_MAX, ret_count);
	if (!err && *ret_count > HNODES_MAX)
		*ret_count = HNODES_MAX;
	return err;
}

int gmem_peer_device(void)
{
	struct gmem_device_info devices[HNODES_MAX];
	size_t count;
	int err = list_devices(devices, &count), first = -1;

	for (size_t i = 0; !err && i < count; i++)
		if ((devices[i].caps & GMEM_CAP_COMPUTE) && (first < 0 || devices[i].hnid < first))
			first = devices[i].hnid;
	if (!err && first < 0)
		err = gmem_fail(-ENODEV, "no device is attached");
	return err ? err : first;
}

int gmem_peer_check_hnid(int hnid)
{
	struct gmem_device_info devices[HNODES_MAX];
	size_t count;

	if (!list_devices(devices, &count))
		for (size_t i = 0; i < count; i++)
			if (devices[i].hnid == hnid)
				return 0;
	return gmem_fail(-EINVAL, "hnid: there is no hnode %d", hnid);
}

int gmem_peer_moved(uint64_t *ret_to_device, uint64_t *ret_to_host)
{
	struct gmem_device_info devices[HNODES_MAX];
	uint64_t in = 0, out = 0;
	size_t count;
	int err = list_devices(devices, &count);

	for (size_t i = 0; !err && i < count; i++) {
		if (devices[i].caps & GMEM_CAP_COMPUTE) {
			in += devices[i].in_bytes;
			out += devices[i].out_bytes;
		}
	}
	if (!err) {
		*ret_to_device = in / GMEM_PEER_PAGE;
		*ret_to_host = out / GMEM_PEER_PAGE;
	}
	return err;
}
