/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include <gmem/stats.h>
#include <gmem/types.h>

#include "wire.h"

#define SECRET_MAX 512
#define LOW_WATER (192 << 10)
#define KEEPALIVE_IDLE_S 30
#define KEEPALIVE_INTERVAL_S 5
#define KEEPALIVE_PROBES 3

/* ---- addresses ---- */

static int parse_inet(const char *text, struct gmem_address *made)
{
	char host[64];
	const char *colon = strrchr(text, ':'), *begin = text, *end = colon;
	char *rest;
	unsigned long port;

	if (!colon || !colon[1])
		return -EINVAL;
	port = strtoul(colon + 1, &rest, 10);
	if (*rest || !port || port > 65535)
		return -EINVAL;
	if (*text == '[') {
		begin++;
		end--;
		if (*end != ']')
			return -EINVAL;
	}
	if (end <= begin || (size_t)(end - begin) >= sizeof(host))
		return -EINVAL;
	memcpy(host, begin, (size_t)(end - begin));
	host[end - begin] = '\0';
	memcpy(made->host, host, sizeof(host));
	if (inet_pton(AF_INET, host, &made->in.sin_addr) == 1) {
		made->in.sin_family = AF_INET;
		made->in.sin_port = htons((uint16_t)port);
		made->bytes = sizeof(made->in);
	} else if (inet_pton(AF_INET6, host, &made->in6.sin6_addr) == 1) {
		made->in6.sin6_family = AF_INET6;
		made->in6.sin6_port = htons((uint16_t)port);
		made->bytes = sizeof(made->in6);
	} else {
		return -EINVAL;
	}
	return 0;
}

int gmem_address_parse(const char *text, const char *name, struct gmem_address *ret)
{
	struct gmem_address made = { .bytes = 0 };
	int err = 0;

	if (!strncmp(text, "unix:", 5)) {
		if (text[5] != '/' || strlen(text + 5) >= sizeof(made.un.sun_path))
			return -EINVAL;
		made.un.sun_family = AF_UNIX;
		strcpy(made.un.sun_path, text + 5);
		made.bytes = sizeof(made.un);
	} else {
		err = parse_inet(text, &made);
	}
	if (!err && (size_t)snprintf(made.name, sizeof(made.name), "%s", name ? name : text) >= sizeof(made.name))
		err = -EINVAL;
	if (name)
		memcpy(made.host, made.name, sizeof(made.host));
	if (!err)
		*ret = made;
	return err;
}

bool gmem_address_equal(const struct gmem_address *a, const struct gmem_address *b)
{
	return a->bytes == b->bytes && !memcmp(&a->any, &b->any, a->bytes);
}

/* ---- commands ---- */

void gmem_wire_bytes(struct gmem_wire *wire, const void *data, size_t bytes)
{
	memcpy(wire->tx + wire->tx_end, data, bytes);
	wire->tx_end += bytes;
}

void gmem_wire_page(struct gmem_wire *wire, const void *data, size_t bytes, bool ends_line, bool goes_on)
{
	wire->goes_on = goes_on;
	wire->page = data;
	wire->page_bytes = bytes;
	wire->end_bytes = ends_line ? 2 : 0;
}

static void put_line(struct gmem_wire *wire, char type, size_t number)
{
	wire->tx_end += (size_t)sprintf((char *)wire->tx + wire->tx_end, "%c%zu\r\n", type, number);
}

void gmem_wire_command(struct gmem_wire *wire, unsigned count)
{
	put_line(wire, '*', count);
}

void gmem_wire_head(struct gmem_wire *wire, size_t bytes)
{
	put_line(wire, '$', bytes);
}

void gmem_wire_argument(struct gmem_wire *wire, const void *data, size_t bytes)
{
	gmem_wire_head(wire, bytes);
	gmem_wire_bytes(wire, data, bytes);
	gmem_wire_bytes(wire, "\r\n", 2);
}

void gmem_wire_text(struct gmem_wire *wire, const char *text)
{
	gmem_wire_argument(wire, text, strlen(text));
}

void gmem_wire_number(struct gmem_wire *wire, uint64_t number)
{
	char text[24];

	gmem_wire_argument(wire, text, (size_t)sprintf(text, "%llu", (unsigned long long)number));
}

/* ---- in and out ---- */

/* One call's worth, as far as there is room: the buffer, the page, the end of the line. */
static ssize_t send_some(struct gmem_wire *wire)
{
	struct iovec parts[] = {
		{ wire->tx + wire->tx_begin, wire->tx_end - wire->tx_begin },
		{ (void *)(uintptr_t)wire->page, wire->page_bytes },
		{ "\r\n" + 2 - wire->end_bytes, wire->end_bytes },
	};
	struct msghdr message = { .msg_iov = parts, .msg_iovlen = 3 };
	bool goes_on = wire->goes_on && parts[1].iov_len + parts[2].iov_len;
	ssize_t n;

	if (wire->tls) {
		wire->send_events = POLLOUT;
		return gmem_tls_write(wire->tls, parts[0].iov_base, parts[0].iov_len, &wire->send_events);
	}
	do {
		n = sendmsg(wire->fd, &message, MSG_NOSIGNAL | (goes_on ? MSG_MORE : 0));
	} while (n < 0 && errno == EINTR);
	return n < 0 ? -errno : n;
}

static size_t less(size_t a, size_t b)
{
	return a < b ? a : b;
}

int gmem_wire_send(struct gmem_wire *wire)
{
	while (gmem_wire_out(wire)) {
		ssize_t n = send_some(wire);
		size_t buffer, page;

		if (n < 0)
			return (int)n;
		buffer = less((size_t)n, wire->tx_end - wire->tx_begin);
		page = less((size_t)n - buffer, wire->page_bytes);
		wire->tx_begin += buffer;
		wire->page += page;
		wire->page_bytes -= page;
		wire->end_bytes -= (size_t)n - buffer - page;
	}
	wire->tx_begin = wire->tx_end = 0;
	return 0;
}

/* TLS gives a record at a time, and poll() knows only of what is not yet read from the socket: so on until it has no
 * more. An error behind something is told the next time. */
static int receive_tls(struct gmem_wire *wire)
{
	size_t before = wire->rx_end;

	wire->receive_events = POLLIN;
	while (wire->rx_end < GMEM_WIRE_BUFFER) {
		ssize_t n = gmem_tls_read(wire->tls, wire->rx + wire->rx_end, GMEM_WIRE_BUFFER - wire->rx_end,
					  &wire->receive_events);

		if (n < 0) {
			wire->more = n != -EAGAIN;
			return wire->rx_end == before ? (int)n : 0;
		}
		wire->rx_end += (size_t)n;
	}
	wire->more = true;
	return 0;
}

int gmem_wire_receive(struct gmem_wire *wire)
{
	ssize_t n;

	if (wire->rx_begin) { /* a line that has not come as a whole: it is short */
		memmove(wire->rx, wire->rx + wire->rx_begin, wire->rx_end - wire->rx_begin);
		wire->rx_end -= wire->rx_begin;
		wire->rx_begin = 0;
	}
	if (wire->tls)
		return receive_tls(wire);
	do {
		n = recv(wire->fd, wire->rx + wire->rx_end, GMEM_WIRE_BUFFER - wire->rx_end, 0);
	} while (n < 0 && errno == EINTR);
	if (n <= 0)
		return n ? -errno : -ECONNRESET;
	wire->rx_end += (size_t)n;
	return 0;
}

ssize_t gmem_wire_receive_to(struct gmem_wire *wire, void *memory, size_t bytes)
{
	struct iovec parts[] = { { memory, bytes }, { wire->rx, GMEM_WIRE_BUFFER } };
	struct msghdr message = { .msg_iov = parts, .msg_iovlen = 2 };
	ssize_t n;

	wire->rx_begin = wire->rx_end = 0;
	do {
		n = recvmsg(wire->fd, &message, 0);
	} while (n < 0 && errno == EINTR);
	if (n <= 0)
		return n ? -errno : -ECONNRESET;
	if ((size_t)n <= bytes)
		return n;
	wire->rx_end = (size_t)n - bytes;
	return (ssize_t)bytes;
}

const char *gmem_wire_why(const struct gmem_wire *wire)
{
	return wire->tls ? gmem_tls_why(wire->tls) : "";
}

void gmem_wire_expect(struct gmem_wire *wire, size_t bytes)
{
	size_t ahead = wire->tls ? GMEM_TLS_AHEAD : 0; /* of that much the socket may have been read already */
	int low_water = bytes >= LOW_WATER + ahead ? LOW_WATER : 1;

	if (low_water == wire->low_water)
		return;
	wire->low_water = low_water;
	setsockopt(wire->fd, SOL_SOCKET, SO_RCVLOWAT, &low_water, sizeof(low_water));
}

short gmem_wire_events(const struct gmem_wire *wire, bool wants_reply)
{
	return (short)((gmem_wire_out(wire) ? wire->send_events : 0) | (wants_reply ? wire->receive_events : 0));
}

static int await(struct gmem_wire *wire, short events, uint64_t deadline_ns)
{
	uint64_t now = gmem_now_ns();
	struct pollfd p = { .fd = wire->fd, .events = events };
	int n = poll(&p, 1, now < deadline_ns ? (int)((deadline_ns - now) / 1000000 + 1) : 0);

	return n > 0 || (n < 0 && errno == EINTR) ? 0 : n ? -errno : -ETIMEDOUT;
}

/* ---- opening ---- */

static int connect_to(struct gmem_wire *wire, const struct gmem_address *address, uint64_t deadline_ns)
{
	socklen_t bytes = sizeof(int);
	int err = 0;

	if (!connect(wire->fd, &address->any, address->bytes))
		return 0;
	if (errno != EINPROGRESS)
		return -errno;
	err = await(wire, POLLOUT, deadline_ns);
	if (!err && (getsockopt(wire->fd, SOL_SOCKET, SO_ERROR, &err, &bytes) || err))
		err = err ? -err : -errno;
	return err;
}

static void set_options(int fd, bool inet)
{
	int one = 1, idle = KEEPALIVE_IDLE_S, interval = KEEPALIVE_INTERVAL_S, probes = KEEPALIVE_PROBES;

	if (!inet)
		return;
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof(one));
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof(idle));
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof(interval));
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof(probes));
}

/* The first line of the file; the caller wipes it. */
static int read_secret(const char *path, char *ret, size_t *ret_bytes)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, ret, SECRET_MAX);
	int err = n < 0 ? -errno : n ? 0 : -ENODATA;
	char *end;

	if (fd >= 0)
		close(fd);
	if (n <= 0)
		return err;
	end = memchr(ret, '\n', (size_t)n);
	if (!end && n == SECRET_MAX)
		return -E2BIG;
	*ret_bytes = end ? (size_t)(end - ret) : (size_t)n;
	return *ret_bytes ? 0 : -ENODATA;
}

/* Who the server is has to be clear before it is told a password. */
static int begin_tls(struct gmem_wire *wire, const struct gmem_address *address, struct gmem_tls *tls,
		     uint64_t deadline_ns, char *why)
{
	short events = POLLIN;
	int err = gmem_tls_begin(tls, wire->fd, address->host, why, &wire->tls);

	if (err)
		return err;
	while ((err = gmem_tls_handshake(wire->tls, &events)) == -EAGAIN) {
		err = await(wire, events, deadline_ns);
		if (err)
			break;
	}
	if (err == -ETIMEDOUT)
		snprintf(why, GMEM_MESSAGE_MAX, "tls: %.80s does not answer as a server with TLS would", address->name);
	else if (err == -ECONNRESET && !gmem_wire_why(wire)[0])
		snprintf(why, GMEM_MESSAGE_MAX, "tls: %.80s ends the connection in the handshake", address->name);
	return err;
}

/* A few bytes on a new connection: it takes them, or it is none. */
static int send_first(struct gmem_wire *wire, uint64_t deadline_ns)
{
	int err;

	while ((err = gmem_wire_send(wire)) == -EAGAIN) {
		err = await(wire, wire->send_events, deadline_ns);
		if (err)
			break;
	}
	return err;
}

static int send_auth(struct gmem_wire *wire, const struct gmem_identity *identity, uint64_t deadline_ns, char *why)
{
	char secret[SECRET_MAX];
	size_t bytes = 0;
	int err = read_secret(identity->password_file, secret, &bytes);

	if (err) {
		snprintf(why, GMEM_MESSAGE_MAX, "password_file: can't be read: %s", strerror(-err));
		return -EACCES;
	}
	gmem_wire_command(wire, identity->user[0] ? 3 : 2);
	gmem_wire_text(wire, "AUTH");
	if (identity->user[0])
		gmem_wire_text(wire, identity->user);
	gmem_wire_argument(wire, secret, bytes);
	explicit_bzero(secret, sizeof(secret));
	err = send_first(wire, deadline_ns);
	explicit_bzero(wire->tx, SECRET_MAX + 256);
	return err;
}

/* A line that is no body. The text points into the buffer. */
static int read_line(struct gmem_wire *wire, uint64_t deadline_ns, struct gmem_resp *ret)
{
	for (;;) {
		ssize_t n = gmem_resp_parse((char *)wire->rx + wire->rx_begin, wire->rx_end - wire->rx_begin, ret);
		int err;

		if (n < 0)
			return (int)n;
		if (n) {
			wire->rx_begin += (size_t)n;
			return 0;
		}
		err = gmem_wire_receive(wire);
		if (err == -EAGAIN)
			err = await(wire, gmem_wire_events(wire, true), deadline_ns);
		if (err)
			return err;
	}
}

/* That the server wants a certificate of ours, or another one, it says behind the handshake. */
static int greet(struct gmem_wire *wire, uint64_t deadline_ns)
{
	struct gmem_resp reply;
	int err;

	gmem_wire_command(wire, 1);
	gmem_wire_text(wire, "PING");
	err = send_first(wire, deadline_ns);
	if (err && err != -EPIPE && err != -ECONNRESET) /* gone already: what it had said is still to be read */
		return err;
	return read_line(wire, deadline_ns, &reply);
}

static int authenticate(struct gmem_wire *wire, const struct gmem_identity *identity, uint64_t deadline_ns, char *why)
{
	struct gmem_resp reply;
	int err;

	if (!identity->password_file[0])
		return wire->tls ? greet(wire, deadline_ns) : 0;
	err = send_auth(wire, identity, deadline_ns, why);
	if (!err)
		err = read_line(wire, deadline_ns, &reply);
	if (!err && reply.type == GMEM_RESP_ERROR) {
		snprintf(why, GMEM_MESSAGE_MAX, "the server refuses user or password: %.*s",
			 (int)(reply.text_bytes < 100 ? reply.text_bytes : 100), reply.text);
		return -EACCES;
	}
	return err || reply.type == GMEM_RESP_STATUS ? err : -EPROTO;
}

static struct gmem_wire *new_wire(void)
{
	struct gmem_wire *wire = calloc(1, sizeof(*wire));

	if (!wire)
		return NULL;
	wire->fd = -1;
	wire->low_water = 1;
	wire->send_events = POLLOUT;
	wire->receive_events = POLLIN;
	wire->tx = mmap(NULL, 2 * GMEM_WIRE_BUFFER, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (wire->tx == MAP_FAILED) {
		free(wire);
		return NULL;
	}
	wire->rx = wire->tx + GMEM_WIRE_BUFFER;
	return wire;
}

int gmem_wire_open(const struct gmem_address *address, const struct gmem_identity *identity, uint64_t deadline_ns,
		   char *why, struct gmem_wire **ret)
{
	struct gmem_wire *wire = new_wire();
	int err = 0;

	if (!wire)
		return -ENOMEM;
	why[0] = '\0';
	wire->fd = socket(address->any.sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (wire->fd < 0)
		err = -errno;
	if (!err) {
		set_options(wire->fd, address->any.sa_family != AF_UNIX);
		err = connect_to(wire, address, deadline_ns);
	}
	if (!err && identity->tls)
		err = begin_tls(wire, address, identity->tls, deadline_ns, why);
	if (!err)
		err = authenticate(wire, identity, deadline_ns, why);
	if (err) {
		if (!why[0])
			snprintf(why, GMEM_MESSAGE_MAX, "%s", gmem_wire_why(wire));
		if (!why[0])
			snprintf(why, GMEM_MESSAGE_MAX, "%.80s: %s", address->name, strerror(-err));
		gmem_wire_close(wire);
		return err;
	}
	*ret = wire;
	return 0;
}

void gmem_wire_close(struct gmem_wire *wire)
{
	if (wire->tls)
		gmem_tls_end(wire->tls);
	if (wire->fd >= 0)
		close(wire->fd);
	munmap(wire->tx, 2 * GMEM_WIRE_BUFFER);
	free(wire);
}
