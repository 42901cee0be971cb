/* SPDX-License-Identifier: Apache-2.0
 *
 * The remote tier over TLS: the fake server behind a proxy that speaks TLS and misbehaves when it is told to. What is
 * believed of certificates, what is said of those that are not, and that no page is lost by records that are small, cut or
 * damaged. tests/integration/test_tls.py has a real server.
 */
#define _GNU_SOURCE
#include "harness.h"

#ifndef GMEM_OPENSSL
int main(void)
{
	puts("built without OpenSSL");
	return 77;
}
#else

#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <openssl/ssl.h>
#include <openssl/x509v3.h>

#include <gmem/stats.h>

#include "fakeserver.h"
#include "tierops.h"

#define KEYS 65536
#define FOR_EVER "timeout_ms=3600000" /* longer than a test may take */
#define BATCH 16

static char folder[] = "/tmp/gmem-test-tls-XXXXXX";
static uint8_t *memory; /* BATCH * 2 MiB */

/* ---- certificates: each is its own authority ---- */

struct identity {
	X509 *certificate;
	EVP_PKEY *key;
	char path[64], key_path[64];
};

static struct identity identity_new(const char *name, const char *subject, long valid_s)
{
	struct identity made = { X509_new(), EVP_EC_gen("P-256"), "", "" };
	X509_NAME *x = X509_get_subject_name(made.certificate);
	X509_EXTENSION *alternative = X509V3_EXT_conf_nid(NULL, NULL, NID_subject_alt_name, subject);
	FILE *file;

	CHECK(made.certificate && made.key && alternative);
	X509_set_version(made.certificate, 2);
	ASN1_INTEGER_set(X509_get_serialNumber(made.certificate), 1);
	X509_gmtime_adj(X509_getm_notBefore(made.certificate), -86400);
	X509_gmtime_adj(X509_getm_notAfter(made.certificate), valid_s);
	X509_NAME_add_entry_by_txt(x, "CN", MBSTRING_ASC, (const uint8_t *)name, -1, -1, 0);
	X509_set_issuer_name(made.certificate, x);
	X509_set_pubkey(made.certificate, made.key);
	X509_add_ext(made.certificate, alternative, -1);
	X509_EXTENSION_free(alternative);
	CHECK(X509_sign(made.certificate, made.key, EVP_sha256()));
	snprintf(made.path, sizeof(made.path), "%s/%s.crt", folder, name);
	snprintf(made.key_path, sizeof(made.key_path), "%s/%s.key", folder, name);
	file = fopen(made.path, "w");
	CHECK(file && PEM_write_X509(file, made.certificate) && !fclose(file));
	file = fopen(made.key_path, "w");
	CHECK(file && PEM_write_PrivateKey(file, made.key, NULL, NULL, 0, NULL, NULL) && !fclose(file));
	return made;
}

static void identity_free(struct identity *identity)
{
	X509_free(identity->certificate);
	EVP_PKEY_free(identity->key);
}

/* ---- the proxy ---- */

struct proxy {
	struct fake_server *behind;
	char address[32];
	int listener;
	pthread_t thread;
	_Atomic(struct identity *) identity; /* whom it says it is */
	_Atomic(struct identity *) wants;    /* whose certificate a client has to have; NULL: none */
	_Atomic unsigned connections, open;
	_Atomic unsigned generation;         /* connections of older ones are closed */
	_Atomic int record;                  /* bytes of a record, at most; 0: as it comes */
	_Atomic int cut, garbage;            /* so many connections end after some bytes; or go on with what is no TLS */
	_Atomic bool silent;                 /* it never answers a handshake */
	_Atomic bool stop;
};

struct passage {
	struct proxy *proxy;
	int fd, server;
	SSL *ssl;
	unsigned generation;
	size_t passed;
};

static bool take_one(_Atomic int *times)
{
	int left = atomic_load(times);

	while (left > 0 && !atomic_compare_exchange_weak(times, &left, left - 1))
		;
	return left > 0;
}

static int accept_any(int ok, X509_STORE_CTX *context)
{
	(void)ok, (void)context;
	return 1;
}

static SSL *ssl_accept(struct proxy *proxy, int fd)
{
	struct identity *identity = atomic_load(&proxy->identity), *wants = atomic_load(&proxy->wants);
	SSL_CTX *context = SSL_CTX_new(TLS_server_method());
	SSL *ssl;

	CHECK(context && SSL_CTX_use_certificate(context, identity->certificate) == 1 &&
	      SSL_CTX_use_PrivateKey(context, identity->key) == 1);
	if (wants) {
		SSL_CTX_set_verify(context, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL);
		X509_STORE_add_cert(SSL_CTX_get_cert_store(context), wants->certificate);
	} else {
		SSL_CTX_set_verify(context, SSL_VERIFY_NONE, accept_any);
	}
	ssl = SSL_new(context);
	SSL_CTX_free(context);
	SSL_set_fd(ssl, fd);
	if (SSL_accept(ssl) == 1)
		return ssl;
	SSL_free(ssl);
	return NULL;
}

static bool pass_in(struct passage *p)
{
	static _Thread_local uint8_t buffer[65536];

	do {
		int n = SSL_read(p->ssl, buffer, sizeof(buffer));

		if (n <= 0 || send(p->server, buffer, (size_t)n, MSG_NOSIGNAL) != n)
			return false;
	} while (SSL_pending(p->ssl));
	return true;
}

static bool pass_out(struct passage *p)
{
	static _Thread_local uint8_t buffer[65536];
	ssize_t n = recv(p->server, buffer, sizeof(buffer), 0);
	int most = atomic_load(&p->proxy->record);

	if (n <= 0)
		return false;
	for (ssize_t at = 0; at < n;) {
		int some = most && most < n - at ? most : (int)(n - at);

		if (p->passed > 20000 && take_one(&p->proxy->cut))
			return false;
		if (p->passed > 20000 && take_one(&p->proxy->garbage))
			return send(p->fd, "\x17\x03\x03\x00\x20 this is not what it says it is..", 37, MSG_NOSIGNAL) > 0;
		if (SSL_write(p->ssl, buffer + at, some) != some)
			return false;
		at += some;
		p->passed += (size_t)some;
	}
	return true;
}

static int connect_behind(struct fake_server *server)
{
	struct sockaddr_in at = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	at.sin_port = htons((uint16_t)atoi(strchr(server->address, ':') + 1));
	CHECK(!connect(fd, (struct sockaddr *)&at, sizeof(at)));
	return fd;
}

static void *passage_thread(void *arg)
{
	struct passage *p = arg;
	struct proxy *proxy = p->proxy;
	bool goes_on = true;

	while (atomic_load(&proxy->silent) && !atomic_load(&proxy->stop))
		sleep_ms(10);
	p->ssl = atomic_load(&proxy->stop) ? NULL : ssl_accept(proxy, p->fd);
	p->server = p->ssl ? connect_behind(proxy->behind) : -1;
	while (p->ssl && goes_on && !atomic_load(&proxy->stop) && atomic_load(&proxy->generation) == p->generation) {
		struct pollfd fds[] = { { p->fd, POLLIN, 0 }, { p->server, POLLIN, 0 } };

		poll(fds, 2, 20);
		if (fds[0].revents)
			goes_on = pass_in(p);
		if (goes_on && fds[1].revents)
			goes_on = pass_out(p);
	}
	if (p->ssl)
		SSL_free(p->ssl);
	if (p->server >= 0)
		close(p->server);
	close(p->fd);
	free(p);
	OPENSSL_thread_stop();
	atomic_fetch_sub(&proxy->open, 1);
	return NULL;
}

static void *proxy_thread(void *arg)
{
	struct proxy *proxy = arg;

	while (!atomic_load(&proxy->stop)) {
		struct pollfd p = { .fd = proxy->listener, .events = POLLIN };
		struct passage *made;
		pthread_t thread;

		if (poll(&p, 1, 20) <= 0)
			continue;
		made = calloc(1, sizeof(*made));
		*made = (struct passage){ .proxy = proxy, .fd = accept(proxy->listener, NULL, NULL),
					  .generation = atomic_load(&proxy->generation) };
		atomic_fetch_add(&proxy->connections, 1);
		atomic_fetch_add(&proxy->open, 1);
		CHECK(!pthread_create(&thread, NULL, passage_thread, made));
		pthread_detach(thread);
	}
	return NULL;
}

static struct proxy *proxy_start(struct identity *identity)
{
	struct sockaddr_in at = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	struct proxy *proxy = calloc(1, sizeof(*proxy));
	socklen_t bytes = sizeof(at);

	proxy->behind = fake_start();
	proxy->identity = identity;
	proxy->listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	CHECK(!bind(proxy->listener, (struct sockaddr *)&at, sizeof(at)) && !listen(proxy->listener, 64));
	CHECK(!getsockname(proxy->listener, (struct sockaddr *)&at, &bytes));
	snprintf(proxy->address, sizeof(proxy->address), "127.0.0.1:%u", ntohs(at.sin_port));
	CHECK(!pthread_create(&proxy->thread, NULL, proxy_thread, proxy));
	return proxy;
}

static void proxy_stop(struct proxy *proxy)
{
	atomic_store(&proxy->stop, true);
	pthread_join(proxy->thread, NULL);
	close(proxy->listener);
	for (int i = 0; i < 500 && atomic_load(&proxy->open); i++)
		sleep_ms(10);
	CHECK(!atomic_load(&proxy->open));
	fake_stop(proxy->behind);
	free(proxy);
}

/* Everybody has to come again. */
static void proxy_hang_up(struct proxy *proxy)
{
	atomic_fetch_add(&proxy->generation, 1);
	for (int i = 0; i < 500 && atomic_load(&proxy->open); i++)
		sleep_ms(10);
}

/* ---- the tier ---- */

static const char *options_for(const struct proxy *proxy, const struct identity *trusted, const char *more)
{
	static char text[400];

	snprintf(text, sizeof(text), "address=%s tls=on tls_ca_file=%s %s", proxy->address, trusted->path, more);
	return text;
}

static void push(struct gmem_device *tier, uint64_t first, unsigned count, size_t bytes, uint64_t version, int expected)
{
	struct gmem_peer_io io[BATCH];

	for (unsigned i = 0; i < count; i++) {
		io[i] = (struct gmem_peer_io){ first + i, memory + i * bytes, bytes, 99 };
		tier_fill(io[i].memory, bytes, io[i].key, version);
	}
	CHECK_EQ(tier_ops->peer_map_batch(tier, io, count), 0);
	for (unsigned i = 0; i < count; i++)
		CHECK_EQ(io[i].result, expected);
}

static void pull(struct gmem_device *tier, uint64_t first, unsigned count, size_t bytes, uint64_t version, int expected)
{
	struct gmem_peer_io io[BATCH];

	memset(memory, 0xaa, count * bytes);
	for (unsigned i = 0; i < count; i++)
		io[i] = (struct gmem_peer_io){ first + i, memory + i * bytes, bytes, 99 };
	CHECK_EQ(tier_ops->peer_unmap_batch(tier, io, count), 0);
	for (unsigned i = 0; i < count; i++) {
		CHECK_EQ(io[i].result, expected);
		if (!expected)
			CHECK(tier_is_filled(io[i].memory, bytes, io[i].key, version));
	}
}

static void all_sizes(struct gmem_device *tier, uint64_t version)
{
	push(tier, 0, 1, KIB4, version, 0);
	push(tier, 100, BATCH, KIB4, version, 0);
	push(tier, 200, BATCH, KIB64, version, 0);
	push(tier, 300, BATCH, MIB2, version, 0);
	pull(tier, 300, BATCH, MIB2, version, 0);
	pull(tier, 310, 1, MIB2, version, 0);
	pull(tier, 200, BATCH, KIB64, version, 0);
	pull(tier, 100, BATCH, KIB4, version, 0);
	pull(tier, 0, 1, KIB4, version, 0);
}

/* ---- tests ---- */

static struct identity server, client, stranger, expired, elsewhere;

static void test_round_trips(void)
{
	static const int records[] = { 0, 1000, 37 };
	struct proxy *proxy = proxy_start(&server);
	struct gmem_device *tier = tier_attached(options_for(proxy, &server, "capacity=256M"), KEYS, NULL);

	for (unsigned r = 0; r < 3; r++) {
		atomic_store(&proxy->record, records[r]);
		if (records[r] == 37)
			push(tier, 500, 1, MIB2, 1, 0), pull(tier, 500, 1, MIB2, 1, 0);
		else
			all_sizes(tier, r);
	}
	CHECK(atomic_load(&proxy->connections) < 8); /* they are kept */
	tier_ops->remove(tier);
	proxy_stop(proxy);
}

static void test_options(void)
{
	struct proxy *proxy = proxy_start(&server);
	char text[300];

	tier_refused("address=127.0.0.1:1 tls_verify=none", KEYS, -EINVAL, "tls_...: needs tls=on");
	tier_refused("address=127.0.0.1:1 tls=perhaps", KEYS, -EINVAL, "tls: \"perhaps\" is not on or off");
	tier_refused("address=127.0.0.1:1 tls=on tls_verify=some", KEYS, -EINVAL, "tls_verify: full, ca or none");
	tier_refused("address=127.0.0.1:1 tls=on tls_ca_file=ca.crt", KEYS, -EINVAL, "tls_ca_file: must be an absolute path");
	tier_refused("address=127.0.0.1:1 tls=on tls_ca_file=/none", KEYS, -ENOENT, "tls_ca_file: can't be read");
	tier_refused("address=127.0.0.1:1 tls=on tls_key_file=/none", KEYS, -EINVAL, "tls_key_file: needs a tls_cert_file");
	tier_refused("address=127.0.0.1:1 tls=on tls_ca_file=/dev/null", KEYS, -EINVAL, "tls_ca_file: can't be used");
	snprintf(text, sizeof(text), "address=127.0.0.1:1 tls=on tls_cert_file=%s tls_key_file=%s", client.path, server.key_path);
	tier_refused(text, KEYS, -EINVAL, "tls_key_file: can't be used: key values mismatch");
	proxy_stop(proxy);
}

/* Whatever is wrong, it is said, and nothing but a handshake was sent. */
static void will_not_do(struct identity *shown, struct identity *trusted, const char *more, const char *why)
{
	struct proxy *proxy = proxy_start(shown);
	char text[200];

	snprintf(text, sizeof(text), FOR_EVER " %s", more);
	tier_refused(options_for(proxy, trusted, text), KEYS, -EACCES, why);
	CHECK_EQ(atomic_load(&proxy->behind->commands), 0);
	proxy_stop(proxy);
}

static void will_do(struct identity *shown, struct identity *trusted, const char *more)
{
	struct proxy *proxy = proxy_start(shown);
	struct gmem_device *tier = tier_attached(options_for(proxy, trusted, more), KEYS, NULL);

	push(tier, 1, 2, KIB64, 1, 0);
	pull(tier, 1, 2, KIB64, 1, 0);
	tier_ops->remove(tier);
	proxy_stop(proxy);
}

static void test_certificates(void)
{
	will_not_do(&stranger, &server, "", "self-signed certificate");
	will_not_do(&expired, &expired, "tls_verify=ca", "certificate has expired");
	will_not_do(&elsewhere, &elsewhere, "", "mismatch");
	will_not_do(&elsewhere, &elsewhere, "tls_server_name=other.example", "hostname mismatch");
	will_do(&elsewhere, &elsewhere, "tls_server_name=pages.example");
	will_do(&elsewhere, &elsewhere, "tls_verify=ca");
	will_do(&expired, &stranger, "tls_verify=none");
}

static void test_our_certificate(void)
{
	struct proxy *proxy = proxy_start(&server);
	struct gmem_device *tier;
	char text[200];

	atomic_store(&proxy->wants, &client);
	tier_refused(options_for(proxy, &server, FOR_EVER), KEYS, -EACCES, "certificate required");
	snprintf(text, sizeof(text), "tls_cert_file=%s tls_key_file=%s", client.path, client.key_path);
	tier = tier_attached(options_for(proxy, &server, text), KEYS, NULL);
	push(tier, 1, 2, KIB64, 1, 0);
	pull(tier, 1, 2, KIB64, 1, 0);
	tier_ops->remove(tier);
	proxy_stop(proxy);
}

static void test_one_side_alone(void)
{
	struct proxy *proxy = proxy_start(&server);
	char text[200];

	snprintf(text, sizeof(text), "address=%s " FOR_EVER, proxy->address);
	tier_refused(text, KEYS, -ECONNRESET, ""); /* plain, to a port with TLS */
	atomic_store(&proxy->silent, true);
	tier_refused(options_for(proxy, &server, FOR_EVER), KEYS, -ETIMEDOUT, "does not answer as a server with TLS would");
	snprintf(text, sizeof(text), "address=%s tls=on " FOR_EVER, proxy->behind->address);
	tier_refused(text, KEYS, -ECONNRESET, "ends the connection in the handshake");
	proxy_stop(proxy);
}

static void test_connections_that_break(void)
{
	struct proxy *proxy = proxy_start(&server);
	struct gmem_device *tier = tier_attached(options_for(proxy, &server, "capacity=256M"), KEYS, NULL);

	atomic_store(&proxy->record, 4000);
	for (int i = 0; i < 4; i++) {
		push(tier, 0, 8, KIB64, (uint64_t)i, 0);
		atomic_store(i % 2 ? &proxy->cut : &proxy->garbage, 2);
		pull(tier, 0, 8, KIB64, (uint64_t)i, 0);
		CHECK_EQ(atomic_load(i % 2 ? &proxy->cut : &proxy->garbage), 0); /* it did happen */
	}
	tier_says("last_error", tier_ops->last_error(tier), "tls: 127.0.0.1");
	proxy_hang_up(proxy); /* while it is idle: that is nobody's failure */
	pull(tier, 0, 8, KIB64, 3, 0);
	CHECK_EQ(tier_ops->health(tier), 0);
	tier_ops->remove(tier);
	proxy_stop(proxy);
}

static void test_a_server_that_becomes_another(void)
{
	struct proxy *proxy = proxy_start(&server);
	struct gmem_device *tier = tier_attached(options_for(proxy, &server, "timeout_ms=1500"), KEYS, NULL);
	unsigned commands;

	push(tier, 0, 8, KIB64, 1, 0);
	atomic_store(&proxy->identity, &stranger);
	proxy_hang_up(proxy);
	commands = atomic_load(&proxy->behind->commands);
	pull(tier, 0, 8, KIB64, 1, -EIO);
	push(tier, 20, 1, KIB64, 1, -EIO);
	tier_says("last_error", tier_ops->last_error(tier), "self-signed certificate");
	CHECK_EQ(atomic_load(&proxy->behind->commands), commands);
	atomic_store(&proxy->identity, &server);
	sleep_ms(150); /* who was refused is not asked at once */
	pull(tier, 0, 8, KIB64, 1, 0);
	tier_ops->remove(tier);
	proxy_stop(proxy);
}

static void test_files_that_are_renewed(void)
{
	struct proxy *proxy = proxy_start(&server);
	struct gmem_device *tier;
	struct identity trusted = identity_new("trusted", "IP:127.0.0.1", 3600);

	CHECK(!rename(server.path, trusted.path));
	tier = tier_attached(options_for(proxy, &trusted, "timeout_ms=1000"), KEYS, NULL);
	push(tier, 0, 8, KIB64, 1, 0);
	CHECK(!rename(stranger.path, trusted.path));
	atomic_store(&proxy->identity, &stranger);
	proxy_hang_up(proxy);
	pull(tier, 0, 8, KIB64, 1, 0);
	unlink(trusted.path);
	proxy_hang_up(proxy);
	pull(tier, 0, 8, KIB64, 1, -EIO);
	tier_says("last_error", tier_ops->last_error(tier), "tls_ca_file: can't be read");
	tier_ops->remove(tier);
	identity_free(&trusted);
	proxy_stop(proxy);
}

#define RUN(test)                                                                                                      \
	do {                                                                                                           \
		uint64_t begin_ = gmem_now_ns();                                                                       \
		test();                                                                                                \
		printf("%6.2f s " #test "\n", (double)(gmem_now_ns() - begin_) / 1e9);                                 \
	} while (0)

int main(void)
{
	signal(SIGPIPE, SIG_IGN); /* the proxy's: the tier has to do without */
	tier_ops = gmem_driver_builtin("remote");
	CHECK(tier_ops && mkdtemp(folder));
	memory = mmap(NULL, BATCH * MIB2, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(memory != MAP_FAILED);
	server = identity_new("server", "IP:127.0.0.1", 3600);
	client = identity_new("client", "DNS:client.example", 3600);
	stranger = identity_new("stranger", "IP:127.0.0.1", 3600);
	expired = identity_new("expired", "IP:127.0.0.1", -3600);
	elsewhere = identity_new("elsewhere", "DNS:pages.example", 3600);
	RUN(test_round_trips);
	RUN(test_options);
	RUN(test_certificates);
	RUN(test_our_certificate);
	RUN(test_one_side_alone);
	RUN(test_connections_that_break);
	RUN(test_a_server_that_becomes_another);
	RUN(test_files_that_are_renewed); /* takes files away: the last one */
	for (struct identity *const *i = (struct identity *[]){ &server, &client, &stranger, &expired, &elsewhere, NULL }; *i; i++) {
		unlink((*i)->path);
		unlink((*i)->key_path);
		identity_free(*i);
	}
	unlink("trusted.key");
	rmdir(folder);
	puts("ok");
	return 0;
}

#endif
