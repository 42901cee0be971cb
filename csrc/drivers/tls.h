/* SPDX-License-Identifier: Apache-2.0
 *
 * TLS: what a wire is wrapped in, by OpenSSL, where the core was built with it (GMEM_OPENSSL). Who the server is has to be
 * proven, by a certificate for the name that it is known by, unless that is switched off.
 *
 * Settings are shared by all threads. The files are looked at for each connection and read again when they have changed,
 * so that certificates can be renewed under a daemon that runs. A session belongs to its wire's thread.
 */
#ifndef GMEM_DRIVERS_TLS_H
#define GMEM_DRIVERS_TLS_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

/* What a session may have read from its socket and not yet given out, at most. */
#define GMEM_TLS_AHEAD (64u << 10)

enum gmem_tls_verify {
	GMEM_TLS_FULL, /* the certificate is of a known authority, and for this name */
	GMEM_TLS_CA,   /* of a known authority, for whatever name */
	GMEM_TLS_NONE, /* whoever answers: no protection from one that is between */
};

/* Paths of PEM files; "": ca_file: the system's authorities, cert_file: no certificate of our own, key_file: it is in
 * cert_file, server_name: what the address is called. */
struct gmem_tls_options {
	const char *ca_file, *cert_file, *key_file, *server_name;
	enum gmem_tls_verify verify;
};

struct gmem_tls;
struct gmem_tls_session;

/* "full", "ca", "none". */
int gmem_tls_verify_parse(const char *text, enum gmem_tls_verify *ret);

/* why: a sentence that names the option (GMEM_MESSAGE_MAX). -EOPNOTSUPP: not built in; -EINVAL, -ENOENT, ... */
int gmem_tls_create(const struct gmem_tls_options *options, char *why, struct gmem_tls **ret);
void gmem_tls_destroy(struct gmem_tls *tls);

/* On a connected, non-blocking socket, which stays the caller's; name: what the address is called. */
int gmem_tls_begin(struct gmem_tls *tls, int fd, const char *name, char *why, struct gmem_tls_session **ret);
void gmem_tls_end(struct gmem_tls_session *session);

/* -EAGAIN: once poll() says ret_events. Else it is over: -EACCES: the certificate will not do, -ECONNRESET, -EPROTO. */
int gmem_tls_handshake(struct gmem_tls_session *session, short *ret_events);
ssize_t gmem_tls_read(struct gmem_tls_session *session, void *to, size_t bytes, short *ret_events);
ssize_t gmem_tls_write(struct gmem_tls_session *session, const void *from, size_t bytes, short *ret_events);
/* What was wrong, for people; "": nothing of TLS's own. */
const char *gmem_tls_why(const struct gmem_tls_session *session);

#endif
