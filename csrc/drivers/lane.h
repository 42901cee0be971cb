/* SPDX-License-Identifier: Apache-2.0
 *
 * Lane: a connection of one exchange alone. It sends its requests one behind the other, and reads the replies as they come,
 * which is in that order. With replicas, a lane that has PUTs ends with WAIT, and takes no further request: what WAIT says
 * is true of everything that was sent on this connection before, and of nothing else.
 */
#ifndef GMEM_DRIVERS_LANE_H
#define GMEM_DRIVERS_LANE_H

#include "exchange.h"

#define GMEM_LANES_MAX 16
#define GMEM_LANE_NOBODY GMEM_EXCHANGE_MAX /* in a queue: who was there is to be asked for again, on this lane or another */

enum { GMEM_REQUEST_WAITING, GMEM_REQUEST_ON_LANE, GMEM_REQUEST_STORED, GMEM_REQUEST_DONE };
enum gmem_lane_wait { GMEM_WAIT_NOT_WANTED, GMEM_WAIT_WANTED, GMEM_WAIT_ASKED };

struct gmem_lane {
	struct gmem_wire *wire;
	unsigned node;
	unsigned queue[GMEM_EXCHANGE_MAX], queued, sent, answered;
	enum gmem_lane_wait wait;
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

struct gmem_exchange_run {
	const struct gmem_exchange *x;
	struct gmem_request *requests;
	unsigned count, lane_count;
	struct gmem_lane lanes[GMEM_LANES_MAX];
};

void gmem_request_finish(struct gmem_request *request, int result);
/* Once more: at once, or after a pause that grows. */
void gmem_request_again(struct gmem_request *request, bool at_once);

/* As far as it goes now; an error ends the lane. */
int gmem_lane_send(struct gmem_exchange_run *run, struct gmem_lane *lane);
int gmem_lane_receive(struct gmem_exchange_run *run, struct gmem_lane *lane);
bool gmem_lane_expects(const struct gmem_exchange_run *run, const struct gmem_lane *lane);
bool gmem_lane_is_over(const struct gmem_lane *lane);

#endif
