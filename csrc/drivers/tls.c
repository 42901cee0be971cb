/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <gmem/lockrank.h>
#include <gmem/types.h>

#include "tls.h"

int gmem_tls_verify_parse(const char *text, enum gmem_tls_verify *ret)
{
	static const char *const names[] = { "full", "ca", "none" };

	for (unsigned i = 0; i < sizeof(names) / sizeof(names[0]); i++)
		if (!strcmp(text, names[i])) {
			*ret = (enum gmem_tls_verify)i;
			return 0;
		}
	return -EINVAL;
}

#ifdef GMEM_OPENSSL

#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>

#define NAME_MAX_BYTES 128
#define WHY_MAX GMEM_MESSAGE_MAX
#define FILES 3

enum file { CA, CERTIFICATE, KEY };

/* Tells one content of a file from another. */
struct stamp {
	dev_t device;
	ino_t inode;
	off_t bytes;
	struct timespec changed;
};

struct gmem_tls {
	char paths[FILES][256];           /* (C) */
	char server_name[NAME_MAX_BYTES]; /* (C) */
	enum gmem_tls_verify verify;      /* (C) */
	BIO_METHOD *method;               /* (C) */
	struct gmem_mutex lock;
	struct stamp stamps[FILES];       /* lock; of what context was made of */
	SSL_CTX *context;                 /* lock; sessions have references of their own */
};

struct gmem_tls_session {
	SSL *ssl;
	int fd;
	int error;      /* of the socket */
	bool verifies;
	char name[NAME_MAX_BYTES];
	char why[WHY_MAX];
};

static const char *const option_names[FILES] = { "tls_ca_file", "tls_cert_file", "tls_key_file" };

/* ---- the socket: OpenSSL's own would raise SIGPIPE ---- */

static int bio_write(BIO *bio, const char *from, size_t bytes, size_t *ret)
{
	struct gmem_tls_session *session = BIO_get_data(bio);
	ssize_t n;

	BIO_clear_retry_flags(bio);
	do {
		n = send(session->fd, from, bytes, MSG_NOSIGNAL);
	} while (n < 0 && errno == EINTR);
	if (n < 0 && errno == EAGAIN)
		BIO_set_retry_write(bio);
	else if (n < 0)
		session->error = errno;
	*ret = n > 0 ? (size_t)n : 0;
	return n > 0;
}

static int bio_read(BIO *bio, char *to, size_t bytes, size_t *ret)
{
	struct gmem_tls_session *session = BIO_get_data(bio);
	ssize_t n;

	BIO_clear_retry_flags(bio);
	do {
		n = recv(session->fd, to, bytes, 0);
	} while (n < 0 && errno == EINTR);
	if (n < 0 && errno == EAGAIN)
		BIO_set_retry_read(bio);
	else if (n <= 0)
		session->error = n ? errno : ECONNRESET;
	*ret = n > 0 ? (size_t)n : 0;
	return n > 0;
}

static long bio_control(BIO *bio, int command, long number, void *pointer)
{
	(void)bio, (void)number, (void)pointer;
	return command == BIO_CTRL_FLUSH;
}

/* ---- settings ---- */

/* Of the oldest error: later ones are what it led to. */
static const char *last_reason(void)
{
	unsigned long code = ERR_get_error();
	const char *reason = code ? ERR_reason_error_string(code) : NULL;

	if (code && ERR_SYSTEM_ERROR(code))
		reason = strerror(ERR_GET_REASON(code));
	ERR_clear_error();
	return reason ? reason : "unknown error";
}

/* Instead of asking at the terminal. */
static int no_passphrase(char *to, int bytes, int writes, void *data)
{
	(void)to, (void)bytes, (void)writes, (void)data;
	return -1;
}

static int stamp_files(const struct gmem_tls *tls, struct stamp *ret, char *why)
{
	struct stat st;

	memset(ret, 0, FILES * sizeof(*ret));
	for (int f = 0; f < FILES; f++) {
		if (!tls->paths[f][0])
			continue;
		if (stat(tls->paths[f], &st)) {
			int err = -errno;

			snprintf(why, GMEM_MESSAGE_MAX, "%s: can't be read: %s", option_names[f], strerror(-err));
			return err;
		}
		ret[f].device = st.st_dev;
		ret[f].inode = st.st_ino;
		ret[f].bytes = st.st_size;
		ret[f].changed = st.st_ctim;
	}
	return 0;
}

/* Which option is wrong; -1: none. */
static int load_files(const struct gmem_tls *tls, SSL_CTX *context)
{
	const char *key = tls->paths[tls->paths[KEY][0] ? KEY : CERTIFICATE];

	if (tls->paths[CA][0] ? SSL_CTX_load_verify_file(context, tls->paths[CA]) != 1 :
				SSL_CTX_set_default_verify_paths(context) != 1)
		return CA;
	if (!tls->paths[CERTIFICATE][0])
		return -1;
	if (SSL_CTX_use_certificate_chain_file(context, tls->paths[CERTIFICATE]) != 1)
		return CERTIFICATE;
	if (SSL_CTX_use_PrivateKey_file(context, key, SSL_FILETYPE_PEM) != 1 || SSL_CTX_check_private_key(context) != 1)
		return tls->paths[KEY][0] ? KEY : CERTIFICATE;
	return -1;
}

static int make_context(const struct gmem_tls *tls, char *why, SSL_CTX **ret)
{
	SSL_CTX *context = SSL_CTX_new(TLS_client_method());
	int wrong;

	if (!context)
		return -ENOMEM;
	SSL_CTX_set_min_proto_version(context, TLS1_2_VERSION);
	SSL_CTX_set_options(context, SSL_OP_NO_COMPRESSION | SSL_OP_NO_RENEGOTIATION);
	SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
	SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
	SSL_CTX_set_default_passwd_cb(context, no_passphrase);
	SSL_CTX_set_read_ahead(context, 1); /* else two calls of recv() for each 16 KiB */
	SSL_CTX_set_default_read_buffer_len(context, GMEM_TLS_AHEAD);
	SSL_CTX_set_verify(context, tls->verify == GMEM_TLS_NONE ? SSL_VERIFY_NONE : SSL_VERIFY_PEER, NULL);
	ERR_clear_error();
	wrong = load_files(tls, context);
	if (wrong >= 0) {
		snprintf(why, GMEM_MESSAGE_MAX, "%s: can't be used: %s", option_names[wrong], last_reason());
		SSL_CTX_free(context);
		return -EINVAL;
	}
	*ret = context;
	return 0;
}

/* What is in the files by now; a reference. */
static int current_context(struct gmem_tls *tls, char *why, SSL_CTX **ret)
{
	struct stamp stamps[FILES];
	SSL_CTX *made = NULL;
	int err = stamp_files(tls, stamps, why);

	if (err)
		return err;
	gmem_mutex_lock(&tls->lock);
	if (!tls->context || memcmp(stamps, tls->stamps, sizeof(stamps))) {
		err = make_context(tls, why, &made);
		if (!err) {
			SSL_CTX_free(tls->context);
			tls->context = made;
			memcpy(tls->stamps, stamps, sizeof(stamps));
		}
	}
	if (!err) {
		SSL_CTX_up_ref(tls->context);
		*ret = tls->context;
	}
	gmem_mutex_unlock(&tls->lock);
	return err;
}

static int take_text(const char *text, char *to, size_t bytes, const char *option, char *why)
{
	if ((size_t)snprintf(to, bytes, "%s", text) < bytes)
		return 0;
	snprintf(why, GMEM_MESSAGE_MAX, "%s: too long", option);
	return -EINVAL;
}

static int take_options(struct gmem_tls *tls, const struct gmem_tls_options *options, char *why)
{
	const char *const paths[FILES] = { options->ca_file, options->cert_file, options->key_file };
	int err = take_text(options->server_name, tls->server_name, sizeof(tls->server_name), "tls_server_name", why);

	for (int f = 0; !err && f < FILES; f++) {
		err = take_text(paths[f], tls->paths[f], sizeof(tls->paths[f]), option_names[f], why);
		if (!err && paths[f][0] && paths[f][0] != '/') {
			snprintf(why, GMEM_MESSAGE_MAX, "%s: must be an absolute path", option_names[f]);
			err = -EINVAL;
		}
	}
	if (!err && tls->paths[KEY][0] && !tls->paths[CERTIFICATE][0]) {
		snprintf(why, GMEM_MESSAGE_MAX, "tls_key_file: needs a tls_cert_file");
		err = -EINVAL;
	}
	tls->verify = options->verify;
	return err;
}

int gmem_tls_create(const struct gmem_tls_options *options, char *why, struct gmem_tls **ret)
{
	struct gmem_tls *tls = calloc(1, sizeof(*tls));
	SSL_CTX *context;
	int err = tls ? 0 : -ENOMEM;

	if (err)
		return err;
	gmem_mutex_init(&tls->lock, GMEM_RANK_DRIVER);
	tls->method = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "gmem wire");
	if (!tls->method || !BIO_meth_set_write_ex(tls->method, bio_write) || !BIO_meth_set_read_ex(tls->method, bio_read) ||
	    !BIO_meth_set_ctrl(tls->method, bio_control))
		err = -ENOMEM;
	if (!err)
		err = take_options(tls, options, why);
	if (!err)
		err = current_context(tls, why, &context);
	if (err) {
		gmem_tls_destroy(tls);
		return err;
	}
	SSL_CTX_free(context);
	*ret = tls;
	return 0;
}

void gmem_tls_destroy(struct gmem_tls *tls)
{
	if (!tls)
		return;
	SSL_CTX_free(tls->context);
	BIO_meth_free(tls->method);
	gmem_mutex_deinit(&tls->lock);
	free(tls);
}

/* ---- sessions ---- */

static bool is_ip(const char *name)
{
	uint8_t address[16];

	return inet_pton(AF_INET, name, address) == 1 || inet_pton(AF_INET6, name, address) == 1;
}

/* Whom it has to be, and to tell it by which of its names it was called. */
static bool expect_name(SSL *ssl, const char *name, enum gmem_tls_verify verify)
{
	X509_VERIFY_PARAM *param = SSL_get0_param(ssl);
	bool ip = is_ip(name);

	if (!ip && SSL_set_tlsext_host_name(ssl, name) != 1)
		return false;
	if (verify != GMEM_TLS_FULL)
		return true;
	X509_VERIFY_PARAM_set_hostflags(param, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
	return (ip ? X509_VERIFY_PARAM_set1_ip_asc(param, name) : X509_VERIFY_PARAM_set1_host(param, name, 0)) == 1;
}

int gmem_tls_begin(struct gmem_tls *tls, int fd, const char *name, char *why, struct gmem_tls_session **ret)
{
	struct gmem_tls_session *session;
	SSL_CTX *context;
	BIO *bio;
	int err = current_context(tls, why, &context);

	if (err)
		return err;
	session = calloc(1, sizeof(*session));
	bio = BIO_new(tls->method);
	if (session)
		session->ssl = SSL_new(context);
	SSL_CTX_free(context); /* the session has it */
	if (!session || !session->ssl || !bio) {
		BIO_free(bio);
		if (session)
			SSL_free(session->ssl);
		free(session);
		return -ENOMEM;
	}
	session->fd = fd;
	session->verifies = tls->verify != GMEM_TLS_NONE;
	snprintf(session->name, sizeof(session->name), "%s", tls->server_name[0] ? tls->server_name : name);
	BIO_set_data(bio, session);
	BIO_set_init(bio, 1);
	SSL_set_bio(session->ssl, bio, bio);
	SSL_set_connect_state(session->ssl);
	if (!expect_name(session->ssl, session->name, tls->verify)) {
		snprintf(why, GMEM_MESSAGE_MAX, "tls_server_name: %.80s can't be a server's name", session->name);
		gmem_tls_end(session);
		return -EINVAL;
	}
	*ret = session;
	return 0;
}

void gmem_tls_end(struct gmem_tls_session *session)
{
	ERR_clear_error();
	if (SSL_is_init_finished(session->ssl))
		SSL_shutdown(session->ssl); /* says goodbye if the socket takes it, and waits for no answer */
	ERR_clear_error();
	SSL_free(session->ssl);
	free(session);
}

/* The server's alert says that it does not want us: RFC 8446, section 6.2; OpenSSL counts alerts from 1000 on. */
static bool is_refusal(int reason)
{
	return (reason >= SSL_AD_REASON_OFFSET + SSL_AD_BAD_CERTIFICATE && reason <= SSL_AD_REASON_OFFSET + SSL_AD_ACCESS_DENIED) ||
	       reason == SSL_AD_REASON_OFFSET + SSL_AD_CERTIFICATE_REQUIRED;
}

/* A failure of TLS itself. */
static int broken(struct gmem_tls_session *session)
{
	long verdict = SSL_get_verify_result(session->ssl);
	unsigned long code = ERR_peek_error();
	int reason = ERR_GET_REASON(code);

	if (session->verifies && verdict != X509_V_OK) {
		snprintf(session->why, sizeof(session->why), "tls: the certificate of %.50s: %.60s", session->name,
			 X509_verify_cert_error_string(verdict));
		ERR_clear_error();
		return -EACCES;
	}
	if (session->error && (!code || reason == SSL_R_UNEXPECTED_EOF_WHILE_READING))
		return -session->error;
	if (reason == SSL_R_WRONG_VERSION_NUMBER && !SSL_is_init_finished(session->ssl)) {
		snprintf(session->why, sizeof(session->why), "tls: %.50s does not speak TLS on that port", session->name);
		ERR_clear_error();
	} else {
		snprintf(session->why, sizeof(session->why), "tls: %.50s: %.60s", session->name, last_reason());
	}
	return is_refusal(reason) ? -EACCES : -EPROTO;
}

static int result(struct gmem_tls_session *session, int r, short *ret_events)
{
	switch (SSL_get_error(session->ssl, r)) {
	case SSL_ERROR_WANT_READ:
		*ret_events = POLLIN;
		return -EAGAIN;
	case SSL_ERROR_WANT_WRITE:
		*ret_events = POLLOUT;
		return -EAGAIN;
	case SSL_ERROR_ZERO_RETURN:
		return -ECONNRESET;
	case SSL_ERROR_SYSCALL:
		return session->error ? -session->error : -ECONNRESET;
	default:
		return broken(session);
	}
}

int gmem_tls_handshake(struct gmem_tls_session *session, short *ret_events)
{
	int r;

	ERR_clear_error();
	r = SSL_do_handshake(session->ssl);
	return r == 1 ? 0 : result(session, r, ret_events);
}

ssize_t gmem_tls_read(struct gmem_tls_session *session, void *to, size_t bytes, short *ret_events)
{
	size_t n;
	int r;

	ERR_clear_error();
	r = SSL_read_ex(session->ssl, to, bytes, &n);
	return r == 1 ? (ssize_t)n : result(session, r, ret_events);
}

ssize_t gmem_tls_write(struct gmem_tls_session *session, const void *from, size_t bytes, short *ret_events)
{
	size_t n;
	int r;

	ERR_clear_error();
	r = SSL_write_ex(session->ssl, from, bytes, &n);
	return r == 1 ? (ssize_t)n : result(session, r, ret_events);
}

const char *gmem_tls_why(const struct gmem_tls_session *session)
{
	return session->why;
}

#else /* without OpenSSL there is no session, and nobody gets to the rest */

int gmem_tls_create(const struct gmem_tls_options *options, char *why, struct gmem_tls **ret)
{
	(void)options, (void)ret;
	snprintf(why, GMEM_MESSAGE_MAX, "tls: gmemd was built without it: libssl-dev was missing");
	return -EOPNOTSUPP;
}

void gmem_tls_destroy(struct gmem_tls *tls)
{
	(void)tls;
}

int gmem_tls_begin(struct gmem_tls *tls, int fd, const char *name, char *why, struct gmem_tls_session **ret)
{
	(void)tls, (void)fd, (void)name, (void)why, (void)ret;
	return -EOPNOTSUPP;
}

void gmem_tls_end(struct gmem_tls_session *session)
{
	(void)session;
}

int gmem_tls_handshake(struct gmem_tls_session *session, short *ret_events)
{
	(void)session, (void)ret_events;
	return -EOPNOTSUPP;
}

ssize_t gmem_tls_read(struct gmem_tls_session *session, void *to, size_t bytes, short *ret_events)
{
	(void)session, (void)to, (void)bytes, (void)ret_events;
	return -EOPNOTSUPP;
}

ssize_t gmem_tls_write(struct gmem_tls_session *session, const void *from, size_t bytes, short *ret_events)
{
	(void)session, (void)from, (void)bytes, (void)ret_events;
	return -EOPNOTSUPP;
}

const char *gmem_tls_why(const struct gmem_tls_session *session)
{
	(void)session;
	return "";
}

#endif
