/* SPDX-License-Identifier: Apache-2.0
 *
 * How it works: a request WAITS, is put on the LANE of its node (a connection of this exchange alone), and is DONE. A
 * lane sends its requests one behind the other and reads the replies as they come, which is in that order. With
 * replicas, a lane that has PUTs ends with WAIT, and takes no further request: what WAIT says is true of everything
 * that was sent on this connection before.
 */
#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <gmem/memfd.h>
#include <gmem/stats.h>

#include "crc32c.h"
#include "exchange.h"

#define LANES_MAX 16
#define CHUNK 65536u        /* copied or looked at, then sent while it is in the cache */
#define DIRECT_MIN 16384u   /* of a page: more than that is worth a call of its own */
#define DIRECT_MAX (256u << 10)
#define COMMAND_ROOM 512    /* all of a command but the value */
#define BACKOFF_NS 5000000ull
#define BACKOFF_MAX_NS 250000000ull

#define NOBODY GMEM_EXCHANGE_MAX /* in a lane's queue: who was there is to be asked for again, on this lane or another */

enum { WAITING, ON_LANE, STORED, DONE };
enum wait { NOT_WANTED, WANTED, ASKED };

struct lane {
	struct gmem_wire *wire;
	unsigned node;
	unsigned queue[GMEM_EXCHANGE_MAX], queued, sent, answered;
	enum wait wait;
	unsigned copies_known;      /* what WAIT has said */
	uint64_t progress_ns;
	/* of the request that is being sent */
	bool begun;
	uint32_t piece, done, crc;
	uint32_t lent;              /* of the piece, to the wire, which sends it from where it is */
	/* of the reply that is being read */
	bool asking;                /* the reply to ASKING comes first */
	bool in_body, fits, missing;
	int64_t left;               /* of the body, the line's end behind it included */
	uint32_t r_piece, r_done, r_crc;
};

struct run {
	const struct gmem_exchange *x;
	struct gmem_request *requests;
	unsigned count, lane_count;
	struct lane lanes[LANES_MAX];
};

void gmem_request_name(struct gmem_request *request, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	request->name_bytes = (uint32_t)vsnprintf(request->name, sizeof(request->name), format, args);
	va_end(args);
	request->slot = (uint16_t)gmem_resp_slot(request->name, request->name_bytes);
}

static uint32_t crc_begin(const struct gmem_piece *piece)
{
	return gmem_crc32c(0, &piece->key, sizeof(piece->key));
}

static uint32_t bytes_of(const struct gmem_request *request)
{
	uint32_t bytes = 0;

	for (uint32_t i = 0; i < request->count; i++)
		bytes += request->pieces[i].bytes;
	return bytes;
}

static void finish(struct gmem_request *request, int result)
{
	request->state = DONE;
	request->result = result;
}

/* Once more: at once, or after a pause that grows. */
static void again(struct gmem_request *request, bool at_once)
{
	uint64_t pause = BACKOFF_NS << (request->tries < 6 ? request->tries : 6);

	request->state = WAITING;
	request->not_before_ns = 0;
	if (at_once)
		return;
	if (request->tries < UINT8_MAX)
		request->tries++;
	request->not_before_ns = gmem_now_ns() + (pause < BACKOFF_MAX_NS ? pause : BACKOFF_MAX_NS);
}

/* ---- out ---- */

static void put_head(struct lane *lane, const struct gmem_request *request)
{
	static const char *const words[] = { "SET", "GET", "UNLINK" };
	struct gmem_wire *wire = lane->wire;

	if (request->asking) {
		gmem_wire_command(wire, 1);
		gmem_wire_text(wire, "ASKING");
	}
	gmem_wire_command(wire, request->kind == GMEM_PUT ? 3 : request->part ? 4 : 2);
	gmem_wire_text(wire, request->part ? "GETRANGE" : words[request->kind]);
	gmem_wire_argument(wire, request->name, request->name_bytes);
	if (request->kind == GMEM_PUT)
		gmem_wire_head(wire, bytes_of(request));
	if (request->part) {
		gmem_wire_number(wire, request->offset);
		gmem_wire_number(wire, request->offset + bytes_of(request) - 1);
	}
	lane->begun = true;
	lane->piece = lane->done = lane->lent = 0;
}

static bool ends_value(const struct lane *lane, const struct gmem_request *request, size_t bytes)
{
	return lane->piece + 1 == request->count && lane->done + bytes == request->pieces[lane->piece].bytes;
}

/* The next chunk is sent from the page itself, which is looked at first. Whoever writes to it meanwhile has spoiled his own
 * page: that is found out when it is read. False: it can't be, or is not worth it. */
static bool lend_chunk(struct lane *lane, struct gmem_request *request)
{
	struct gmem_piece *piece = &request->pieces[lane->piece];
	uint32_t bytes = piece->bytes - lane->done;
	const uint8_t *from = (const uint8_t *)piece->memory + lane->done;

	bytes = bytes < DIRECT_MAX ? bytes : DIRECT_MAX;
	if (lane->wire->tls || piece->bytes < DIRECT_MIN || piece->result ||
	    gmem_look(gmem_crc32c, piece->crc, from, bytes, &piece->crc))
		return false;
	gmem_wire_page(lane->wire, from, bytes, ends_value(lane, request, bytes));
	lane->lent = bytes;
	return true;
}

static void advance(struct lane *lane, const struct gmem_request *request, uint32_t bytes)
{
	lane->done += bytes;
	if (lane->done == request->pieces[lane->piece].bytes) {
		lane->done = 0;
		lane->piece++;
	}
}

/* What was lent has been sent. */
static void take_back(struct lane *lane, const struct gmem_request *request)
{
	if (lane->lent)
		advance(lane, request, lane->lent);
	lane->lent = 0;
}

/* It is there no more, in the middle of it: what is left goes as zeros, and has failed. */
static void take_back_the_rest(struct lane *lane, struct gmem_request *request)
{
	request->pieces[lane->piece].result = -EFAULT;
	advance(lane, request, lane->lent - (uint32_t)lane->wire->page_bytes);
	lane->lent = 0;
	lane->wire->page_bytes = lane->wire->end_bytes = 0;
}

/* A chunk of a value. A page that can't be read is sent as zeros, for its length has been announced, and has failed. */
static void put_chunk(struct lane *lane, struct gmem_request *request)
{
	struct gmem_wire *wire = lane->wire;
	struct gmem_piece *piece = &request->pieces[lane->piece];
	size_t bytes = piece->bytes - lane->done, room = gmem_wire_room(wire) - 2;
	uint8_t *to = wire->tx + wire->tx_end;

	bytes = bytes < CHUNK ? bytes : CHUNK;
	bytes = bytes < room ? bytes : room;
	if (!lane->done) {
		piece->crc = crc_begin(piece);
		piece->result = 0;
	}
	if (lend_chunk(lane, request))
		return;
	if (piece->result || gmem_copy(to, (const uint8_t *)piece->memory + lane->done, bytes)) {
		piece->result = -EFAULT;
		memset(to, 0, bytes);
	}
	piece->crc = gmem_crc32c(piece->crc, to, bytes);
	wire->tx_end += bytes;
	if (ends_value(lane, request, bytes))
		gmem_wire_bytes(wire, "\r\n", 2); /* in the same packet: the server is not woken twice */
	advance(lane, request, (uint32_t)bytes);
}

static void put_wait(struct run *run, struct lane *lane)
{
	uint64_t now = gmem_now_ns(), left = run->x->deadline_ns > now ? run->x->deadline_ns - now : 0;
	uint64_t patience = run->x->nodes->connect_ns / 2;

	gmem_wire_command(lane->wire, 3);
	gmem_wire_text(lane->wire, "WAIT");
	gmem_wire_number(lane->wire, run->x->replicas);
	gmem_wire_number(lane->wire, (left < patience ? left : patience) / 1000000 + 1);
	lane->wait = ASKED;
}

/* Until there is enough for a call, or nothing left. */
static void fill(struct run *run, struct lane *lane)
{
	while (lane->sent < lane->queued && lane->wire->tx_end < CHUNK && gmem_wire_room(lane->wire) > COMMAND_ROOM) {
		struct gmem_request *request = &run->requests[lane->queue[lane->sent]];

		if (!lane->begun)
			put_head(lane, request);
		else
			put_chunk(lane, request);
		if (lane->lent)
			return;
		if (request->kind == GMEM_PUT && lane->piece < request->count)
			continue;
		lane->begun = false;
		lane->sent++;
	}
	if (lane->sent == lane->queued && lane->wait == WANTED && gmem_wire_room(lane->wire) > COMMAND_ROOM)
		put_wait(run, lane);
}

static int end_loan(struct run *run, struct lane *lane, int err)
{
	struct gmem_request *request = &run->requests[lane->queue[lane->sent]];

	if (err)
		take_back_the_rest(lane, request);
	else
		take_back(lane, request);
	if (lane->piece == request->count) {
		lane->begun = false;
		lane->sent++;
	}
	return 0;
}

static int push_out(struct run *run, struct lane *lane)
{
	for (;;) {
		size_t before;
		int err;

		if (!gmem_wire_out(lane->wire))
			fill(run, lane);
		if (!gmem_wire_out(lane->wire))
			return 0;
		before = gmem_wire_out(lane->wire);
		err = gmem_wire_send(lane->wire);
		if (gmem_wire_out(lane->wire) != before)
			lane->progress_ns = gmem_now_ns();
		if (lane->lent && (!err || err == -EFAULT))
			err = end_loan(run, lane, err);
		if (err)
			return err == -EAGAIN ? 0 : err;
	}
}

/* ---- in ---- */

static void answered(struct run *run, struct lane *lane, int result)
{
	struct gmem_request *request = &run->requests[lane->queue[lane->answered]];

	if (request->state == ON_LANE) {
		finish(request, result);
		if (request->kind == GMEM_PUT && !result && run->x->replicas)
			request->state = STORED;
	}
	lane->answered++;
}

/* The request whose reply has been read is this lane's business no more. */
static void leave(struct lane *lane)
{
	lane->queue[lane->answered++] = NOBODY;
}

static void redirected(struct run *run, struct lane *lane, struct gmem_request *request,
		       const struct gmem_redirection *to, bool moved)
{
	unsigned node = gmem_nodes_redirect(run->x->nodes, lane->node, to, moved);

	if (moved || node == GMEM_NODE_NONE)
		gmem_nodes_stale(run->x->nodes);
	again(request, node != GMEM_NODE_NONE && request->tries < 3);
	request->tries += request->tries < 3;
	request->asking = !moved && node != GMEM_NODE_NONE;
	request->node = request->asking ? (uint16_t)node : GMEM_NODE_NONE;
}

static int refused(struct run *run, struct lane *lane, const struct gmem_resp *reply)
{
	struct gmem_request *request = &run->requests[lane->queue[lane->answered]];
	struct gmem_nodes *nodes = run->x->nodes;
	struct gmem_redirection to;
	enum gmem_resp_error means = gmem_resp_error(reply->text, reply->text_bytes, &to);
	int text = (int)(reply->text_bytes < 80 ? reply->text_bytes : 80), result = -EIO;

	if (means == GMEM_RESP_MOVED || means == GMEM_RESP_ASK) {
		redirected(run, lane, request, &to, means == GMEM_RESP_MOVED);
		leave(lane);
		return 0;
	}
	gmem_nodes_note(nodes, "%.60s: %.*s", nodes->nodes[lane->node]->address.name, text, reply->text);
	if (means == GMEM_RESP_LATER || means == GMEM_RESP_STALE) {
		gmem_nodes_stale(nodes);
		again(request, false);
		leave(lane);
		return 0;
	}
	if (means == GMEM_RESP_FULL)
		result = -ENOSPC;
	if (means == GMEM_RESP_DENIED)
		result = -EACCES;
	answered(run, lane, result);
	return 0;
}

static void begin_body(struct run *run, struct lane *lane, int64_t bytes)
{
	struct gmem_request *request = &run->requests[lane->queue[lane->answered]];

	lane->in_body = true;
	lane->left = bytes + 2;
	lane->fits = request->kind == GMEM_GET && bytes == bytes_of(request);
	lane->missing = request->part && !bytes; /* what GETRANGE says of a key that is not there */
	lane->r_piece = lane->r_done = 0;
	for (uint32_t i = 0; i < request->count; i++)
		request->pieces[i].result = 0;
	if (request->kind == GMEM_GET)
		lane->r_crc = crc_begin(&request->pieces[0]);
}

/* Some bytes of a piece are where they belong, or are not wanted; r_crc knows them. */
static void took(struct lane *lane, struct gmem_request *request, size_t bytes)
{
	struct gmem_piece *piece = &request->pieces[lane->r_piece];

	lane->left -= (int64_t)bytes;
	lane->r_done += (uint32_t)bytes;
	if (lane->r_done < piece->bytes)
		return;
	if (!piece->result && lane->r_crc != piece->crc)
		piece->result = -EBADMSG;
	lane->r_done = 0;
	if (++lane->r_piece < request->count)
		lane->r_crc = crc_begin(&request->pieces[lane->r_piece]);
}

static void take_piece(struct lane *lane, struct gmem_request *request, const uint8_t *data, size_t bytes)
{
	struct gmem_piece *piece = &request->pieces[lane->r_piece];

	if (gmem_copy((uint8_t *)piece->memory + lane->r_done, data, bytes))
		piece->result = -EFAULT;
	lane->r_crc = gmem_crc32c(lane->r_crc, data, bytes);
	took(lane, request, bytes);
}

/* What is to come of the page that is being read, if it can go there straight from the socket. */
static size_t direct_bytes(const struct run *run, const struct lane *lane)
{
	const struct gmem_request *request = &run->requests[lane->queue[lane->answered]];
	const struct gmem_piece *piece = &request->pieces[lane->r_piece];
	size_t bytes;

	if (!lane->in_body || !lane->fits || lane->left <= 2 || lane->wire->tls || lane->wire->rx_end != lane->wire->rx_begin)
		return 0;
	bytes = piece->bytes - lane->r_done;
	return piece->result || bytes < DIRECT_MIN ? 0 : bytes < DIRECT_MAX ? bytes : DIRECT_MAX;
}

/* Nobody maps the page before it is known to be what was stored. -EFAULT: not to there; nothing was read. */
static int take_directly(struct run *run, struct lane *lane, size_t bytes)
{
	struct gmem_request *request = &run->requests[lane->queue[lane->answered]];
	struct gmem_piece *piece = &request->pieces[lane->r_piece];
	uint8_t *to = (uint8_t *)piece->memory + lane->r_done;
	ssize_t n = gmem_wire_receive_to(lane->wire, to, bytes);

	if (n < 0) {
		piece->result = n == -EFAULT ? -EFAULT : 0;
		return (int)n;
	}
	if (gmem_look(gmem_crc32c, lane->r_crc, to, (size_t)n, &lane->r_crc))
		piece->result = -EFAULT;
	took(lane, request, (size_t)n);
	return 0;
}

static void take_body(struct run *run, struct lane *lane)
{
	struct gmem_request *request = &run->requests[lane->queue[lane->answered]];
	struct gmem_wire *wire = lane->wire;
	size_t bytes = wire->rx_end - wire->rx_begin;

	bytes = (int64_t)bytes < lane->left ? bytes : (size_t)lane->left;
	if (lane->left > 2 && (int64_t)bytes > lane->left - 2)
		bytes = (size_t)(lane->left - 2);
	while (lane->left > 2 && lane->fits && bytes) {
		size_t piece = request->pieces[lane->r_piece].bytes - lane->r_done, some = bytes < piece ? bytes : piece;

		some = some < CHUNK ? some : CHUNK;
		take_piece(lane, request, wire->rx + wire->rx_begin, some);
		wire->rx_begin += some;
		bytes -= some;
	}
	wire->rx_begin += bytes; /* what nobody wants, and the line's end */
	lane->left -= (int64_t)bytes;
	if (lane->left)
		return;
	lane->in_body = false;
	answered(run, lane, lane->fits ? 0 : lane->missing ? -ENOENT : -EBADMSG);
}

/* WAIT is no command, or none that we may use: nothing that was stored here will ever be confirmed. */
static int refused_to_wait(struct run *run, struct lane *lane, const struct gmem_resp *reply)
{
	struct gmem_redirection to;
	enum gmem_resp_error means = gmem_resp_error(reply->text, reply->text_bytes, &to);
	int text = (int)(reply->text_bytes < 80 ? reply->text_bytes : 80);

	if (means != GMEM_RESP_DENIED && means != GMEM_RESP_REFUSED)
		return -EAGAIN;
	gmem_nodes_note(run->x->nodes, "%.60s: %.*s", run->x->nodes->nodes[lane->node]->address.name, text, reply->text);
	for (unsigned i = 0; i < lane->queued; i++)
		if (lane->queue[i] != NOBODY && run->requests[lane->queue[i]].state == STORED)
			finish(&run->requests[lane->queue[i]], -EACCES);
	lane->wait = NOT_WANTED;
	return 0;
}

static int take_wait(struct run *run, struct lane *lane, const struct gmem_resp *reply)
{
	if (lane->wait == ASKED && reply->type == GMEM_RESP_ERROR)
		return refused_to_wait(run, lane, reply);
	if (lane->wait != ASKED || reply->type != GMEM_RESP_INTEGER)
		return -EPROTO;
	lane->copies_known = reply->number > 0 ? (unsigned)reply->number : 0;
	lane->wait = lane->copies_known >= run->x->replicas || gmem_now_ns() >= run->x->deadline_ns ? NOT_WANTED : WANTED;
	return 0;
}

static int take_line(struct run *run, struct lane *lane, const struct gmem_resp *reply)
{
	bool all = lane->answered == lane->queued;
	struct gmem_request *request = all ? NULL : &run->requests[lane->queue[lane->answered]];

	if (all)
		return take_wait(run, lane, reply);
	if (request->asking && !lane->asking) {
		lane->asking = true;
		return reply->type == GMEM_RESP_STATUS || reply->type == GMEM_RESP_ERROR ? 0 : -EPROTO;
	}
	lane->asking = false;
	request->asking = false;
	request->node = GMEM_NODE_NONE;
	if (reply->type == GMEM_RESP_ERROR)
		return refused(run, lane, reply);
	if (reply->type == GMEM_RESP_BULK && reply->number >= 0 && request->kind == GMEM_GET)
		begin_body(run, lane, reply->number);
	else if (reply->type == GMEM_RESP_BULK && request->kind == GMEM_GET)
		answered(run, lane, -ENOENT);
	else if (reply->type == (request->kind == GMEM_PUT ? GMEM_RESP_STATUS : GMEM_RESP_INTEGER) &&
		 request->kind != GMEM_GET)
		answered(run, lane, 0);
	else
		return -EPROTO;
	return 0;
}

/* The reply to ASKING may come before all of what follows it has gone. */
static bool expects(const struct run *run, const struct lane *lane)
{
	if (lane->answered < lane->sent || lane->wait == ASKED)
		return true;
	return lane->begun && run->requests[lane->queue[lane->sent]].asking && !lane->asking;
}

static bool is_over(const struct lane *lane)
{
	return lane->answered == lane->queued && lane->wait == NOT_WANTED;
}

static int take_some(struct run *run, struct lane *lane)
{
	struct gmem_wire *wire = lane->wire;
	size_t bytes = direct_bytes(run, lane);
	int err = bytes ? take_directly(run, lane, bytes) : -EFAULT;

	if (err == -EFAULT)
		err = gmem_wire_receive(wire);
	if (err)
		return err == -EAGAIN ? 0 : err;
	lane->progress_ns = gmem_now_ns();
	while (!err && wire->rx_begin < wire->rx_end) {
		struct gmem_resp reply;
		ssize_t n;

		if (lane->in_body) {
			take_body(run, lane);
			continue;
		}
		if (!expects(run, lane))
			return -EPROTO; /* nobody has asked for that */
		n = gmem_resp_parse((char *)wire->rx + wire->rx_begin, wire->rx_end - wire->rx_begin, &reply);
		if (n <= 0)
			return (int)n;
		wire->rx_begin += (size_t)n;
		err = take_line(run, lane, &reply);
	}
	return err;
}

static int take_in(struct run *run, struct lane *lane)
{
	int err;

	do {
		err = take_some(run, lane);
	} while (!err && lane->wire->more);
	return err;
}

/* ---- lanes ---- */

/* What was on it is asked again; what was stored, but not confirmed, is stored again. */
static void end_lane(struct run *run, struct lane *lane, int err)
{
	bool at_once = err && lane->wire->reused && !lane->answered;
	bool durable = lane->copies_known >= run->x->replicas, concerned = false;

	for (unsigned i = 0; i < lane->queued; i++) {
		struct gmem_request *request = &run->requests[lane->queue[i]];

		if (lane->queue[i] == NOBODY)
			continue;
		concerned |= request->state == ON_LANE || request->state == STORED;
		if (request->state == STORED && durable)
			finish(request, 0);
		else if (request->state == STORED && !err)
			finish(request, -ENODATA);
		else if ((request->state == ON_LANE || request->state == STORED) && err && run->x->once && !at_once)
			finish(request, err == -EPIPE ? -ECONNRESET : err);
		else if (request->state == ON_LANE || request->state == STORED)
			again(request, at_once);
	}
	if (gmem_wire_why(lane->wire)[0])
		gmem_nodes_note(run->x->nodes, "%s", gmem_wire_why(lane->wire));
	else if (err == -EPROTO || (err && concerned && run->x->once)) /* later notes would hide better ones */
		gmem_nodes_note(run->x->nodes, "%.80s: %s", run->x->nodes->nodes[lane->node]->address.name,
				err == -EPROTO ? "what it says is no reply" : strerror(-err));
	if (err)
		gmem_nodes_stale(run->x->nodes);
	gmem_nodes_return(run->x->nodes, lane->node, lane->wire, err);
	*lane = run->lanes[--run->lane_count];
}

static int lane_to(struct run *run, unsigned node, struct lane **ret)
{
	struct lane *lane;
	int err;

	for (unsigned i = 0; i < run->lane_count; i++)
		if (run->lanes[i].node == node && run->lanes[i].wait != ASKED && run->lanes[i].queued < GMEM_EXCHANGE_MAX) {
			*ret = &run->lanes[i];
			return 0;
		}
	if (run->lane_count == LANES_MAX)
		return -EAGAIN;
	lane = &run->lanes[run->lane_count];
	memset(lane, 0, sizeof(*lane));
	err = gmem_nodes_lend(run->x->nodes, node, run->x->deadline_ns, &lane->wire);
	if (err) {
		gmem_nodes_stale(run->x->nodes);
		return err;
	}
	lane->node = node;
	lane->progress_ns = gmem_now_ns();
	run->lane_count++;
	*ret = lane;
	return 0;
}

static void assign(struct run *run, unsigned index)
{
	struct gmem_request *request = &run->requests[index];
	unsigned node = request->node;
	struct lane *lane = NULL;
	int err = -EAGAIN;

	if (node == GMEM_NODE_NONE)
		node = gmem_nodes_of_slot(run->x->nodes, request->slot);
	if (node != GMEM_NODE_NONE)
		err = lane_to(run, node, &lane);
	else
		gmem_nodes_stale(run->x->nodes);
	if (err && err != -EAGAIN && run->x->once) {
		finish(request, err);
		return;
	}
	if (err) {
		request->asking = false;
		request->node = GMEM_NODE_NONE;
		again(request, false);
		return;
	}
	lane->queue[lane->queued++] = index;
	if (request->kind == GMEM_PUT && run->x->replicas)
		lane->wait = WANTED;
	request->state = ON_LANE;
}

/* True while something is left to do. */
static bool assign_all(struct run *run, uint64_t now, uint64_t *ret_next_ns)
{
	bool left = false;

	*ret_next_ns = run->x->deadline_ns;
	for (unsigned i = 0; i < run->count; i++) {
		struct gmem_request *request = &run->requests[i];

		if (request->state == WAITING && request->not_before_ns <= now)
			assign(run, i);
		if (request->state == WAITING && request->not_before_ns < *ret_next_ns)
			*ret_next_ns = request->not_before_ns;
		left |= request->state != DONE;
	}
	return left;
}

static void serve_lane(struct run *run, unsigned l, short revents, uint64_t now)
{
	struct lane *lane = &run->lanes[l];
	int err = 0;

	if (revents & (lane->wire->receive_events | POLLERR | POLLHUP))
		err = take_in(run, lane);
	if (!err)
		err = push_out(run, lane);
	if (!err && now - lane->progress_ns > run->x->nodes->connect_ns && lane->progress_ns < now)
		err = -ETIMEDOUT; /* hung, or cut off: another node may have its slots by now */
	if (err || is_over(lane))
		end_lane(run, lane, err);
}

static void wait_and_serve(struct run *run, uint64_t until_ns)
{
	struct pollfd fds[LANES_MAX];
	uint64_t now = gmem_now_ns(), stalled_ns = now + run->x->nodes->connect_ns;
	unsigned count = run->lane_count;

	until_ns = until_ns < stalled_ns ? until_ns : stalled_ns;
	if (!count) {
		if (until_ns > now)
			gmem_nodes_wait(run->x->nodes, until_ns - now);
		return;
	}
	for (unsigned l = 0; l < count; l++) {
		struct lane *lane = &run->lanes[l];

		gmem_wire_expect(lane->wire, lane->in_body ? (size_t)lane->left : 0);
		fds[l] = (struct pollfd){ .fd = lane->wire->fd, .events = gmem_wire_events(lane->wire, expects(run, lane)) };
	}
	poll(fds, count, until_ns > now ? (int)((until_ns - now) / 1000000 + 1) : 0);
	now = gmem_now_ns();
	for (unsigned l = count; l-- > 0;) /* the last takes the place of one that ends */
		serve_lane(run, l, fds[l].revents, now);
}

void gmem_exchange(const struct gmem_exchange *exchange, struct gmem_request *requests, unsigned count)
{
	struct run run = { .x = exchange, .requests = requests, .count = count };
	uint64_t next_ns, now = gmem_now_ns();

	for (unsigned i = 0; i < count; i++) {
		requests[i].state = WAITING;
		requests[i].tries = 0;
		requests[i].asking = false;
		requests[i].node = GMEM_NODE_NONE;
		requests[i].not_before_ns = 0;
	}
	while (assign_all(&run, now, &next_ns) && now < exchange->deadline_ns) {
		for (unsigned l = run.lane_count; l-- > 0;) {
			int err = push_out(&run, &run.lanes[l]);

			if (err)
				end_lane(&run, &run.lanes[l], err);
		}
		wait_and_serve(&run, next_ns);
		now = gmem_now_ns();
	}
	for (unsigned i = 0; i < count; i++)
		if (requests[i].state == STORED)
			finish(&requests[i], -ENODATA);
	while (run.lane_count) {
		bool idle = run.lanes[0].answered == run.lanes[0].queued && run.lanes[0].wait != ASKED;

		end_lane(&run, &run.lanes[0], idle ? 0 : -ETIMEDOUT);
	}
	for (unsigned i = 0; i < count; i++)
		if (requests[i].state != DONE)
			finish(&requests[i], -ETIMEDOUT);
}
