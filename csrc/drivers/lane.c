/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <string.h>

#include <gmem/memfd.h>
#include <gmem/stats.h>

#include "crc32c.h"
#include "lane.h"

#define CHUNK 65536u        /* copied or looked at, then sent while it is in the cache */
#define DIRECT_MIN 16384u   /* of a page: more than that is worth a call of its own */
#define DIRECT_MAX (1u << 20)
#define COMMAND_ROOM 512    /* all of a command but the value */

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

/* ---- out ---- */

static void put_head(struct gmem_lane *lane, const struct gmem_request *request)
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

static bool ends_value(const struct gmem_lane *lane, const struct gmem_request *request, size_t bytes)
{
	return lane->piece + 1 == request->count && lane->done + bytes == request->pieces[lane->piece].bytes;
}

/* The next chunk is sent from the page itself, which is looked at first. Whoever writes to it meanwhile has spoiled his own
 * page: that is found out when it is read. False: it can't be, or is not worth it. */
static bool lend_chunk(struct gmem_lane *lane, struct gmem_request *request)
{
	struct gmem_piece *piece = &request->pieces[lane->piece];
	uint32_t bytes = piece->bytes - lane->done;
	const uint8_t *from = (const uint8_t *)piece->memory + lane->done;
	bool ends;

	bytes = bytes < DIRECT_MAX ? bytes : DIRECT_MAX;
	if (lane->wire->tls || piece->bytes < DIRECT_MIN || piece->result ||
	    gmem_look(gmem_crc32c, piece->crc, from, bytes, &piece->crc))
		return false;
	ends = ends_value(lane, request, bytes);
	gmem_wire_page(lane->wire, from, bytes, ends,
		       !ends || lane->sent + 1 < lane->queued || lane->wait == GMEM_WAIT_WANTED);
	lane->lent = bytes;
	return true;
}

static void advance(struct gmem_lane *lane, const struct gmem_request *request, uint32_t bytes)
{
	lane->done += bytes;
	if (lane->done == request->pieces[lane->piece].bytes) {
		lane->done = 0;
		lane->piece++;
	}
}

/* What was lent has been sent. */
static void take_back(struct gmem_lane *lane, const struct gmem_request *request)
{
	if (lane->lent)
		advance(lane, request, lane->lent);
	lane->lent = 0;
}

/* It is there no more, in the middle of it: what is left goes as zeros, and has failed. */
static void take_back_the_rest(struct gmem_lane *lane, struct gmem_request *request)
{
	request->pieces[lane->piece].result = -EFAULT;
	advance(lane, request, lane->lent - (uint32_t)lane->wire->page_bytes);
	lane->lent = 0;
	lane->wire->page_bytes = lane->wire->end_bytes = 0;
}

/* A chunk of a value. A page that can't be read is sent as zeros, for its length has been announced, and has failed. */
static void put_chunk(struct gmem_lane *lane, struct gmem_request *request)
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

static void put_wait(struct gmem_exchange_run *run, struct gmem_lane *lane)
{
	uint64_t now = gmem_now_ns(), left = run->x->deadline_ns > now ? run->x->deadline_ns - now : 0;
	uint64_t patience = run->x->nodes->connect_ns / 2;

	gmem_wire_command(lane->wire, 3);
	gmem_wire_text(lane->wire, "WAIT");
	gmem_wire_number(lane->wire, run->x->replicas);
	gmem_wire_number(lane->wire, (left < patience ? left : patience) / 1000000 + 1);
	lane->wait = GMEM_WAIT_ASKED;
}

/* Until there is enough for a call, or nothing left. */
static void fill(struct gmem_exchange_run *run, struct gmem_lane *lane)
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
	if (lane->sent == lane->queued && lane->wait == GMEM_WAIT_WANTED && gmem_wire_room(lane->wire) > COMMAND_ROOM)
		put_wait(run, lane);
}

static int end_loan(struct gmem_exchange_run *run, struct gmem_lane *lane, int err)
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

int gmem_lane_send(struct gmem_exchange_run *run, struct gmem_lane *lane)
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

static void answered(struct gmem_exchange_run *run, struct gmem_lane *lane, int result)
{
	struct gmem_request *request = &run->requests[lane->queue[lane->answered]];

	if (request->state == GMEM_REQUEST_ON_LANE) {
		gmem_request_finish(request, result);
		if (request->kind == GMEM_PUT && !result && run->x->replicas)
			request->state = GMEM_REQUEST_STORED;
	}
	lane->answered++;
}

/* The request whose reply has been read is this lane's business no more. */
static void leave(struct gmem_lane *lane)
{
	lane->queue[lane->answered++] = GMEM_LANE_NOBODY;
}

static void redirected(struct gmem_exchange_run *run, struct gmem_lane *lane, struct gmem_request *request,
		       const struct gmem_redirection *to, bool moved)
{
	unsigned node = gmem_nodes_redirect(run->x->nodes, lane->node, to, moved);

	if (moved || node == GMEM_NODE_NONE)
		gmem_nodes_stale(run->x->nodes);
	gmem_request_again(request, node != GMEM_NODE_NONE && request->tries < 3);
	request->tries += request->tries < 3;
	request->asking = !moved && node != GMEM_NODE_NONE;
	request->node = request->asking ? (uint16_t)node : GMEM_NODE_NONE;
}

static int refused(struct gmem_exchange_run *run, struct gmem_lane *lane, const struct gmem_resp *reply)
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
		gmem_request_again(request, false);
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

static void begin_body(struct gmem_exchange_run *run, struct gmem_lane *lane, int64_t bytes)
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
static void took(struct gmem_lane *lane, struct gmem_request *request, size_t bytes)
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

static void take_piece(struct gmem_lane *lane, struct gmem_request *request, const uint8_t *data, size_t bytes)
{
	struct gmem_piece *piece = &request->pieces[lane->r_piece];

	if (gmem_copy((uint8_t *)piece->memory + lane->r_done, data, bytes))
		piece->result = -EFAULT;
	lane->r_crc = gmem_crc32c(lane->r_crc, data, bytes);
	took(lane, request, bytes);
}

/* What is to come of the page that is being read, if it can go there straight from the socket. */
static size_t direct_bytes(const struct gmem_exchange_run *run, const struct gmem_lane *lane)
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
static int take_directly(struct gmem_exchange_run *run, struct gmem_lane *lane, size_t bytes)
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

static void take_body(struct gmem_exchange_run *run, struct gmem_lane *lane)
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
static int refused_to_wait(struct gmem_exchange_run *run, struct gmem_lane *lane, const struct gmem_resp *reply)
{
	struct gmem_redirection to;
	enum gmem_resp_error means = gmem_resp_error(reply->text, reply->text_bytes, &to);
	int text = (int)(reply->text_bytes < 80 ? reply->text_bytes : 80);

	if (means != GMEM_RESP_DENIED && means != GMEM_RESP_REFUSED)
		return -EAGAIN;
	gmem_nodes_note(run->x->nodes, "%.60s: %.*s", run->x->nodes->nodes[lane->node]->address.name, text, reply->text);
	for (unsigned i = 0; i < lane->queued; i++)
		if (lane->queue[i] != GMEM_LANE_NOBODY && run->requests[lane->queue[i]].state == GMEM_REQUEST_STORED)
			gmem_request_finish(&run->requests[lane->queue[i]], -EACCES);
	lane->wait = GMEM_WAIT_NOT_WANTED;
	return 0;
}

static int take_wait(struct gmem_exchange_run *run, struct gmem_lane *lane, const struct gmem_resp *reply)
{
	if (lane->wait == GMEM_WAIT_ASKED && reply->type == GMEM_RESP_ERROR)
		return refused_to_wait(run, lane, reply);
	if (lane->wait != GMEM_WAIT_ASKED || reply->type != GMEM_RESP_INTEGER)
		return -EPROTO;
	lane->copies_known = reply->number > 0 ? (unsigned)reply->number : 0;
	lane->wait = GMEM_WAIT_WANTED;
	if (lane->copies_known >= run->x->replicas || gmem_now_ns() >= run->x->deadline_ns)
		lane->wait = GMEM_WAIT_NOT_WANTED;
	return 0;
}

static int take_line(struct gmem_exchange_run *run, struct gmem_lane *lane, const struct gmem_resp *reply)
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
bool gmem_lane_expects(const struct gmem_exchange_run *run, const struct gmem_lane *lane)
{
	if (lane->answered < lane->sent || lane->wait == GMEM_WAIT_ASKED)
		return true;
	return lane->begun && run->requests[lane->queue[lane->sent]].asking && !lane->asking;
}

bool gmem_lane_is_over(const struct gmem_lane *lane)
{
	return lane->answered == lane->queued && lane->wait == GMEM_WAIT_NOT_WANTED;
}

static int take_some(struct gmem_exchange_run *run, struct gmem_lane *lane)
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
		if (!gmem_lane_expects(run, lane))
			return -EPROTO; /* nobody has asked for that */
		n = gmem_resp_parse((char *)wire->rx + wire->rx_begin, wire->rx_end - wire->rx_begin, &reply);
		if (n <= 0)
			return (int)n;
		wire->rx_begin += (size_t)n;
		err = take_line(run, lane, &reply);
	}
	return err;
}

int gmem_lane_receive(struct gmem_exchange_run *run, struct gmem_lane *lane)
{
	int err;

	do {
		err = take_some(run, lane);
	} while (!err && lane->wire->more);
	return err;
}
