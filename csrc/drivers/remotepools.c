/* SPDX-License-Identifier: Apache-2.0
 *
 * Pools of several machines, on the servers of a remote tier. Names of values are gmem:TENANT:{p.POOL:EXTENT}:PAGE:STAMP, in
 * hexadecimal but for tenant and pool. A value is a page of 64 KiB or 2 MiB, or those that are present of 16 pages of 4 KiB,
 * one behind the other; PAGE is the first of the 16. Nothing is known here of what is stored: who asks knows.
 */
#include <errno.h>
#include <string.h>

#include <gmem/stats.h>

#include "remotepages.h"

#define PUT_PIECES (GMEM_EXCHANGE_MAX * GMEM_VALUE_PIECES)
#define READ_TRIES 2 /* a damaged value may have been so on the way */

_Static_assert(GMEM_VALUE_PIECES == 16, "pages of 4 KiB share a value by 16");

static uint32_t page_bytes_of(const struct gmem_pool_version *version)
{
	return 1u << version->shift;
}

/* Pages of one value. */
static uint64_t group_pages(const struct gmem_pool_version *version)
{
	return version->shift == GMEM_SHIFT_4K ? GMEM_VALUE_PIECES : 1;
}

static uint64_t lead_of(const struct gmem_pool_version *version, uint64_t index)
{
	return index & ~(group_pages(version) - 1);
}

static void name_value(struct gmem_device *tier, const struct gmem_pool_version *version, uint64_t lead,
		       struct gmem_request *request)
{
	gmem_request_name(request, tier->tenant, "p.", version->name, gmem_remote_extent(lead, page_bytes_of(version)), lead,
			  version->stamp);
}

/* What a checksum is of, beside the content: a value under another's name is damaged. */
static uint64_t salt(const struct gmem_pool_version *version, uint64_t index)
{
	return version->stamp * 0x9e3779b97f4a7c15ull + index;
}

static bool is_present(const struct gmem_pool_version *version, uint64_t index)
{
	return version->present[index / 64] >> index % 64 & 1;
}

/* Pages that are present from the first of a value up to index, which is a multiple of 16 at most 16 further. */
static unsigned slot_of(const struct gmem_pool_version *version, uint64_t lead, uint64_t index)
{
	uint64_t bits = version->present[lead / 64] >> lead % 64;
	uint64_t count = index - lead;

	return (unsigned)__builtin_popcountll(count ? bits & (~0ull >> (64 - count)) : 0);
}

static unsigned slots_of(const struct gmem_pool_version *version, uint64_t lead)
{
	return slot_of(version, lead, lead + group_pages(version));
}

static bool is_asked_well(const struct gmem_pool_version *version, const struct gmem_peer_io *io)
{
	return io->key < version->pages && io->bytes == page_bytes_of(version) && is_present(version, io->key);
}

static void fail_all(struct gmem_peer_io *io, size_t count, int err)
{
	for (size_t i = 0; i < count; i++)
		io[i].result = err;
}

/* ---- put ---- */

static int put_result(struct gmem_device *tier, int result)
{
	if (result == -ENODATA)
		gmem_nodes_note(&tier->nodes, "fewer than %u replicas have confirmed a pool's page", tier->replicas);
	return result;
}

/* As many whole values as one exchange takes; how many pages that is, 0: they are not whole. */
static size_t put_some(struct gmem_device *tier, const struct gmem_pool_version *version, struct gmem_peer_io *io, size_t count)
{
	struct gmem_request requests[GMEM_EXCHANGE_MAX];
	struct gmem_piece pieces[PUT_PIECES];
	size_t done = 0;
	unsigned some = 0;

	for (; some < GMEM_EXCHANGE_MAX && done < count; some++) {
		uint64_t lead = lead_of(version, io[done].key);
		unsigned slots = slots_of(version, lead);

		if (slots > count - done || !slots)
			break;
		requests[some] = (struct gmem_request){ .kind = GMEM_PUT, .count = slots, .pieces = pieces + done };
		name_value(tier, version, lead, &requests[some]);
		for (unsigned s = 0; s < slots; s++, done++) {
			if (lead_of(version, io[done].key) != lead || slot_of(version, lead, io[done].key) != s)
				return 0;
			pieces[done] = (struct gmem_piece){ .key = salt(version, io[done].key), .memory = io[done].memory,
							    .bytes = page_bytes_of(version) };
		}
	}
	gmem_remote_exchange(tier, requests, some, tier->timeout_ns);
	for (unsigned r = 0; r < some; r++)
		for (unsigned s = 0; s < requests[r].count; s++) {
			size_t i = (size_t)(requests[r].pieces + s - pieces);

			io[i].result = requests[r].result ? put_result(tier, requests[r].result) : pieces[i].result;
			version->checks[io[i].key] = pieces[i].crc;
		}
	return done;
}

void gmem_remote_pool_put(struct gmem_device *tier, const struct gmem_pool_version *version, struct gmem_peer_io *io,
			  size_t count)
{
	for (size_t i = 0; i < count; i++)
		if (!is_asked_well(version, &io[i])) {
			fail_all(io, count, -EINVAL);
			return;
		}
	for (size_t at = 0, some; at < count; at += some) {
		some = put_some(tier, version, io + at, count - at);
		if (!some) {
			fail_all(io + at, count - at, -EINVAL);
			return;
		}
	}
}

/* ---- get ---- */

struct reading {
	struct gmem_request requests[GMEM_EXCHANGE_MAX];
	struct gmem_piece pieces[GMEM_EXCHANGE_MAX]; /* a request's follow each other */
	struct gmem_peer_io *ios[GMEM_EXCHANGE_MAX]; /* whose they are */
	unsigned count, pages;
	uint64_t lead;       /* of the last request */
	unsigned next_slot;  /* behind its last piece */
};

static void add_page(struct gmem_device *tier, const struct gmem_pool_version *version, struct reading *reading,
		     struct gmem_peer_io *io)
{
	uint64_t lead = lead_of(version, io->key);
	unsigned slot = slot_of(version, lead, io->key);
	struct gmem_piece *piece = &reading->pieces[reading->pages];
	struct gmem_request *request;

	if (!reading->count || reading->lead != lead || reading->next_slot != slot) {
		request = &reading->requests[reading->count++];
		*request = (struct gmem_request){ .kind = GMEM_GET, .offset = slot * page_bytes_of(version), .pieces = piece };
		name_value(tier, version, lead, request);
	}
	request = &reading->requests[reading->count - 1];
	*piece = (struct gmem_piece){ .key = salt(version, io->key), .memory = io->memory, .bytes = page_bytes_of(version),
				      .crc = version->checks[io->key] };
	reading->ios[reading->pages++] = io;
	request->count++;
	request->part = request->count < slots_of(version, lead);
	reading->lead = lead;
	reading->next_slot = slot + 1;
}

static int get_result(struct gmem_device *tier, const struct gmem_request *request, const struct gmem_piece *piece)
{
	int err = request->result ? request->result : piece->result;

	if (err == -EBADMSG)
		gmem_nodes_note(&tier->nodes, "%.100s is damaged: its checksum differs", request->name);
	if (err == -ENOENT)
		gmem_nodes_note(&tier->nodes, "%.100s is gone from the server", request->name);
	return err && err != -ETIMEDOUT ? -EIO : err;
}

static void get_some(struct gmem_device *tier, const struct gmem_pool_version *version, struct gmem_peer_io *io, size_t count,
		     bool again)
{
	struct reading reading;

	reading.count = reading.pages = 0;
	for (size_t i = 0; i < count; i++) {
		if (again ? io[i].result == -EIO : is_asked_well(version, &io[i]))
			add_page(tier, version, &reading, &io[i]);
		else if (!again)
			io[i].result = -EINVAL;
	}
	if (reading.count)
		gmem_remote_exchange(tier, reading.requests, reading.count, tier->timeout_ns);
	for (unsigned r = 0; r < reading.count; r++)
		for (unsigned s = 0; s < reading.requests[r].count; s++) {
			const struct gmem_piece *piece = &reading.requests[r].pieces[s];

			reading.ios[piece - reading.pieces]->result = get_result(tier, &reading.requests[r], piece);
		}
}

void gmem_remote_pool_get(struct gmem_device *tier, const struct gmem_pool_version *version, struct gmem_peer_io *io,
			  size_t count)
{
	for (size_t at = 0; at < count; at += GMEM_EXCHANGE_MAX) {
		size_t some = count - at < GMEM_EXCHANGE_MAX ? count - at : GMEM_EXCHANGE_MAX;

		for (int tries = 0; tries < READ_TRIES; tries++)
			get_some(tier, version, io + at, some, tries);
	}
}

/* ---- drop ---- */

int gmem_remote_pool_drop(struct gmem_device *tier, const struct gmem_pool_version *version, uint64_t first, uint64_t count)
{
	uint64_t end = first + count, step = group_pages(version);
	int err = 0;

	if (end < first || end > version->pages)
		return -EINVAL;
	for (first = lead_of(version, first); !err && first < end;) {
		struct gmem_request requests[GMEM_EXCHANGE_MAX];
		unsigned some = 0;

		for (; some < GMEM_EXCHANGE_MAX && first < end; some++, first += step) {
			requests[some] = (struct gmem_request){ .kind = GMEM_DROP };
			name_value(tier, version, first, &requests[some]);
		}
		gmem_remote_exchange(tier, requests, some, tier->timeout_ns);
		for (unsigned r = 0; r < some; r++)
			err = requests[r].result ? requests[r].result : err;
	}
	return err;
}
