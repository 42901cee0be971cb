/* SPDX-License-Identifier: Apache-2.0
 *
 * How it works: a request is WAITING, is put on the lane of its node (lane.h), and is DONE.
 */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>

#include <gmem/stats.h>

#include "lane.h"

#define BACKOFF_NS 5000000ull
#define BACKOFF_MAX_NS 250000000ull

static char *put_text(char *at, const char *text)
{
	size_t bytes = strlen(text);

	memcpy(at, text, bytes);
	return at + bytes;
}

static char *put_hex(char *at, const char *before, uint64_t number)
{
	int digits = number ? (67 - __builtin_clzll(number)) / 4 : 1;

	at = put_text(at, before);
	for (int i = digits; i-- > 0; number >>= 4)
		at[i] = "0123456789abcdef"[number & 15];
	return at + digits;
}

/* Twice for each page that is replaced: by hand, as snprintf() takes as long as a system call. */
void gmem_request_name(struct gmem_request *request, const char *tenant, const char *kind, const char *object,
		       uint64_t extent, uint64_t page, uint64_t version)
{
	char *at = put_text(put_text(request->name, "gmem:"), tenant);

	at = put_text(put_text(put_text(at, ":{"), kind), object);
	at = put_hex(put_hex(put_hex(at, ":", extent), "}:", page), ":", version);
	*at = '\0';
	request->name_bytes = (uint32_t)(at - request->name);
	request->slot = (uint16_t)gmem_resp_slot(request->name, request->name_bytes);
}

void gmem_request_finish(struct gmem_request *request, int result)
{
	request->state = GMEM_REQUEST_DONE;
	request->result = result;
}

void gmem_request_again(struct gmem_request *request, bool at_once)
{
	uint64_t pause = BACKOFF_NS << (request->tries < 6 ? request->tries : 6);

	request->state = GMEM_REQUEST_WAITING;
	request->not_before_ns = 0;
	if (at_once)
		return;
	if (request->tries < UINT8_MAX)
		request->tries++;
	request->not_before_ns = gmem_now_ns() + (pause < BACKOFF_MAX_NS ? pause : BACKOFF_MAX_NS);
}

/* ---- lanes ---- */

/* What was on it is asked again; what was stored, but not confirmed, is stored again. */
static void end_lane(struct gmem_exchange_run *run, struct gmem_lane *lane, int err)
{
	bool at_once = err && lane->wire->reused && !lane->answered;
	bool durable = lane->copies_known >= run->x->replicas, concerned = false;

	for (unsigned i = 0; i < lane->queued; i++) {
		struct gmem_request *request = &run->requests[lane->queue[i]];
		bool stored, on_lane;

		if (lane->queue[i] == GMEM_LANE_NOBODY)
			continue;
		stored = request->state == GMEM_REQUEST_STORED;
		on_lane = request->state == GMEM_REQUEST_ON_LANE;
		concerned |= on_lane || stored;
		if (stored && durable)
			gmem_request_finish(request, 0);
		else if (stored && !err)
			gmem_request_finish(request, -ENODATA);
		else if ((on_lane || stored) && err && run->x->once && !at_once)
			gmem_request_finish(request, err == -EPIPE ? -ECONNRESET : err);
		else if (on_lane || stored)
			gmem_request_again(request, at_once);
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

static int lane_to(struct gmem_exchange_run *run, unsigned node, struct gmem_lane **ret)
{
	struct gmem_lane *lane;
	int err;

	for (unsigned i = 0; i < run->lane_count; i++)
		if (run->lanes[i].node == node && run->lanes[i].wait != GMEM_WAIT_ASKED && run->lanes[i].queued < GMEM_EXCHANGE_MAX) {
			*ret = &run->lanes[i];
			return 0;
		}
	if (run->lane_count == GMEM_LANES_MAX)
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

static void assign(struct gmem_exchange_run *run, unsigned index)
{
	struct gmem_request *request = &run->requests[index];
	unsigned node = request->node;
	struct gmem_lane *lane = NULL;
	int err = -EAGAIN;

	if (node == GMEM_NODE_NONE)
		node = gmem_nodes_of_slot(run->x->nodes, request->slot);
	if (node != GMEM_NODE_NONE)
		err = lane_to(run, node, &lane);
	else
		gmem_nodes_stale(run->x->nodes);
	if (err && err != -EAGAIN && run->x->once) {
		gmem_request_finish(request, err);
		return;
	}
	if (err) {
		request->asking = false;
		request->node = GMEM_NODE_NONE;
		gmem_request_again(request, false);
		return;
	}
	lane->queue[lane->queued++] = index;
	if (request->kind == GMEM_PUT && run->x->replicas)
		lane->wait = GMEM_WAIT_WANTED;
	request->state = GMEM_REQUEST_ON_LANE;
}

/* True while something is left to do. */
static bool assign_all(struct gmem_exchange_run *run, uint64_t now, uint64_t *ret_next_ns)
{
	bool left = false;

	*ret_next_ns = run->x->deadline_ns;
	for (unsigned i = 0; i < run->count; i++) {
		struct gmem_request *request = &run->requests[i];

		if (request->state == GMEM_REQUEST_WAITING && request->not_before_ns <= now)
			assign(run, i);
		if (request->state == GMEM_REQUEST_WAITING && request->not_before_ns < *ret_next_ns)
			*ret_next_ns = request->not_before_ns;
		left |= request->state != GMEM_REQUEST_DONE;
	}
	return left;
}

static void serve_lane(struct gmem_exchange_run *run, unsigned l, short revents, uint64_t now)
{
	struct gmem_lane *lane = &run->lanes[l];
	int err = 0;

	if (revents & (lane->wire->receive_events | POLLERR | POLLHUP))
		err = gmem_lane_receive(run, lane);
	if (!err)
		err = gmem_lane_send(run, lane);
	if (!err && now - lane->progress_ns > run->x->nodes->connect_ns && lane->progress_ns < now)
		err = -ETIMEDOUT; /* hung, or cut off: another node may have its slots by now */
	if (err || gmem_lane_is_over(lane))
		end_lane(run, lane, err);
}

static void wait_and_serve(struct gmem_exchange_run *run, uint64_t until_ns)
{
	struct pollfd fds[GMEM_LANES_MAX];
	uint64_t now = gmem_now_ns(), stalled_ns = now + run->x->nodes->connect_ns;
	unsigned count = run->lane_count;

	until_ns = until_ns < stalled_ns ? until_ns : stalled_ns;
	if (!count) {
		if (until_ns > now)
			gmem_nodes_wait(run->x->nodes, until_ns - now);
		return;
	}
	for (unsigned l = 0; l < count; l++) {
		struct gmem_lane *lane = &run->lanes[l];

		gmem_wire_expect(lane->wire, lane->in_body ? (size_t)lane->left : 0);
		fds[l] = (struct pollfd){ .fd = lane->wire->fd, .events = gmem_wire_events(lane->wire, gmem_lane_expects(run, lane)) };
	}
	poll(fds, count, until_ns > now ? (int)((until_ns - now) / 1000000 + 1) : 0);
	now = gmem_now_ns();
	for (unsigned l = count; l-- > 0;) /* the last takes the place of one that ends */
		serve_lane(run, l, fds[l].revents, now);
}

void gmem_exchange(const struct gmem_exchange *exchange, struct gmem_request *requests, unsigned count)
{
	struct gmem_exchange_run run = { .x = exchange, .requests = requests, .count = count };
	uint64_t next_ns, now = gmem_now_ns();

	for (unsigned i = 0; i < count; i++) {
		requests[i].state = GMEM_REQUEST_WAITING;
		requests[i].tries = 0;
		requests[i].asking = false;
		requests[i].node = GMEM_NODE_NONE;
		requests[i].not_before_ns = 0;
	}
	while (assign_all(&run, now, &next_ns) && now < exchange->deadline_ns) {
		for (unsigned l = run.lane_count; l-- > 0;) {
			int err = gmem_lane_send(&run, &run.lanes[l]);

			if (err)
				end_lane(&run, &run.lanes[l], err);
		}
		wait_and_serve(&run, next_ns);
		now = gmem_now_ns();
	}
	for (unsigned i = 0; i < count; i++)
		if (requests[i].state == GMEM_REQUEST_STORED)
			gmem_request_finish(&requests[i], -ENODATA);
	while (run.lane_count) {
		bool idle = run.lanes[0].answered == run.lanes[0].queued && run.lanes[0].wait != GMEM_WAIT_ASKED;

		end_lane(&run, &run.lanes[0], idle ? 0 : -ETIMEDOUT);
	}
	for (unsigned i = 0; i < count; i++)
		if (requests[i].state != GMEM_REQUEST_DONE)
			gmem_request_finish(&requests[i], -ETIMEDOUT);
}
