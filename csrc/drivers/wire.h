/* SPDX-License-Identifier: Apache-2.0
 *
 * Wire: one connection to a server, non-blocking, plain or in TLS, with a buffer for each direction. A wire belongs to
 * one thread at a time (nodes.h lends them). Pages pass through the buffers in pieces that stay in the CPU's cache.
 */
#ifndef GMEM_DRIVERS_WIRE_H
#define GMEM_DRIVERS_WIRE_H

#include <netinet/in.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "resp.h"
#include "tls.h"

#define GMEM_WIRE_BUFFER (256u << 10)

struct gmem_address {
	socklen_t bytes;
	union {
		struct sockaddr any;
		struct sockaddr_in in;
		struct sockaddr_in6 in6;
		struct sockaddr_un un;
	};
	char name[128]; /* for people */
	char host[128]; /* what its certificate has to be for */
};

/* "unix:/PATH", "1.2.3.4:6379", "[::1]:6379": numbers only, since a look-up of names blocks. name: of the
 * host; NULL: its number. */
int gmem_address_parse(const char *text, const char *name, struct gmem_address *ret);
bool gmem_address_equal(const struct gmem_address *a, const struct gmem_address *b);

/* Who we are to the servers. Files are read at each connect, so that they can be changed. */
struct gmem_identity {
	char user[64];
	char password_file[256]; /* "": no AUTH */
	struct gmem_tls *tls;    /* NULL: none */
};

struct gmem_wire {
	int fd;
	bool reused;                /* it has been lent before: that the server has closed it meanwhile is no failure */
	bool more;                  /* receiving has ended for want of room: poll() may know of nothing */
	struct gmem_tls_session *tls; /* NULL: plain */
	short send_events, receive_events; /* of poll(), that sending and receiving wait for; TLS may have to do the other first */
	int low_water;              /* poll() waits for so much */
	size_t tx_begin, tx_end, rx_begin, rx_end;
	uint8_t *tx, *rx;
	const uint8_t *page;        /* sent from where it is, behind what is in tx; plain wires only */
	size_t page_bytes;          /* left of it */
	size_t end_bytes;           /* left of the line's end behind it */
	bool goes_on;               /* something follows the page at once: the kernel may wait for it */
};

/* Connects and authenticates. -EACCES: refused by name, password or certificate, theirs or ours; -ETIMEDOUT,
 * -ECONNREFUSED, ...; why is a sentence (GMEM_MESSAGE_MAX). */
int gmem_wire_open(const struct gmem_address *address, const struct gmem_identity *identity, uint64_t deadline_ns,
		   char *why, struct gmem_wire **ret);
void gmem_wire_close(struct gmem_wire *wire);

/* Moves what is there between buffer and socket. -EAGAIN: not now; -EPIPE, -ECONNRESET, ...: it is over. While there is
 * more, receiving is to be called again before poll(). Sending, -EFAULT: what is left of the page can't be read. */
int gmem_wire_send(struct gmem_wire *wire);
int gmem_wire_receive(struct gmem_wire *wire);
/* Of a plain wire whose buffer is empty: so many bytes go to memory, what follows them to the buffer. Returns how many
 * came to memory; -EFAULT: it can't be written. */
ssize_t gmem_wire_receive_to(struct gmem_wire *wire, void *memory, size_t bytes);
/* What TLS had against it; "": nothing. */
const char *gmem_wire_why(const struct gmem_wire *wire);
/* So much is to come: who waits is not woken for each packet. */
void gmem_wire_expect(struct gmem_wire *wire, size_t bytes);
/* What poll() is to wait for. */
short gmem_wire_events(const struct gmem_wire *wire, bool wants_reply);

/* So much is still to be sent. */
static inline size_t gmem_wire_out(const struct gmem_wire *wire)
{
	return wire->tx_end - wire->tx_begin + wire->page_bytes + wire->end_bytes;
}

static inline size_t gmem_wire_room(const struct gmem_wire *wire)
{
	return GMEM_WIRE_BUFFER - wire->tx_end;
}

/* One argument after the other of a command of count arguments. The caller has looked for room. */
void gmem_wire_command(struct gmem_wire *wire, unsigned count);
void gmem_wire_argument(struct gmem_wire *wire, const void *data, size_t bytes);
void gmem_wire_text(struct gmem_wire *wire, const char *text);
void gmem_wire_number(struct gmem_wire *wire, uint64_t number);
/* The head of an argument whose bytes, and "\r\n" behind them, follow by gmem_wire_bytes(). */
void gmem_wire_head(struct gmem_wire *wire, size_t bytes);
void gmem_wire_bytes(struct gmem_wire *wire, const void *data, size_t bytes);
/* The same bytes of a page, which are sent from there, with an end of the line perhaps; nothing may follow before they have
 * been. goes_on: but will then, at once, and is to come to the server with them. */
void gmem_wire_page(struct gmem_wire *wire, const void *data, size_t bytes, bool ends_line, bool goes_on);

#endif
