/* SPDX-License-Identifier: Apache-2.0
 *
 * Keys are gmem:TENANT:{OBJECT:EXTENT}:PAGE:VERSION. An extent, the pages of some MiB, is on one node, so that what leaves
 * or comes together is an exchange with few nodes, and a tier is spread over all.
 */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include <gmem/crash.h>
#include <gmem/stats.h>

#include "remotepages.h"

#define LOST_RETRY_NS 1000000000ull
#define SWEEPS_MAX 256 /* for one value */

/* ---- words and names ---- */

uint64_t gmem_remote_page_bytes(uint64_t word)
{
	static const uint64_t bytes[4] = { 1 << GMEM_SHIFT_4K, 1 << GMEM_SHIFT_64K, 1 << GMEM_SHIFT_2M };

	return bytes[word >> 1 & 3];
}

unsigned gmem_remote_slot(uint64_t word)
{
	return (unsigned)(word >> 3 & 15);
}

uint32_t gmem_remote_value(uint64_t word)
{
	return (uint32_t)(word >> 8);
}

static uint64_t make_word(uint32_t page_bytes, unsigned slot, uint32_t value)
{
	unsigned size = page_bytes == 1u << GMEM_SHIFT_4K ? 0 : page_bytes == 1u << GMEM_SHIFT_64K ? 1 : 2;

	return 1 | size << 1 | slot << 3 | (uint64_t)value << 8;
}

static bool is_page(const struct gmem_device *tier, const struct gmem_peer_io *io)
{
	return io->key < tier->key_count &&
	       (io->bytes == 1u << GMEM_SHIFT_4K || io->bytes == 1u << GMEM_SHIFT_64K || io->bytes == 1u << GMEM_SHIFT_2M);
}

uint64_t gmem_remote_extent(uint64_t key, uint32_t page_bytes)
{
	return key >> (page_bytes == 1u << GMEM_SHIFT_4K ? 9 : page_bytes == 1u << GMEM_SHIFT_64K ? 6 : 2);
}

/* False: there is no such value (any more). */
static bool name_value(struct gmem_device *tier, uint32_t value, struct gmem_request *request)
{
	const struct gmem_value *record = &tier->values.records[value];
	uint64_t version = atomic_load(&record->version), lead = record->keys[0];

	if (!version)
		return false;
	gmem_request_name(request, tier->tenant, "t", tier->object, gmem_remote_extent(lead, record->page_bytes), lead, version);
	return true;
}

void gmem_remote_exchange(struct gmem_device *tier, struct gmem_request *requests, unsigned count, uint64_t ns)
{
	struct gmem_exchange x = { &tier->nodes, tier->replicas, gmem_now_ns() + ns, false };

	gmem_exchange(&x, requests, count);
}

/* ---- values that nobody wants ---- */

void gmem_remote_ring(struct gmem_device *tier)
{
	uint64_t one = 1;

	(void)!write(tier->bell, &one, sizeof(one));
}

static void leave_page(struct gmem_device *tier, uint64_t word)
{
	if (!word)
		return;
	atomic_fetch_sub(&tier->pages, 1);
	atomic_fetch_sub(&tier->page_bytes, gmem_remote_page_bytes(word));
	if (gmem_values_leave(&tier->values, gmem_remote_value(word), gmem_remote_slot(word)))
		gmem_remote_ring(tier);
}

static void end_drop(struct gmem_device *tier, uint32_t value, int result)
{
	if (result)
		gmem_values_bury(&tier->values, value);
	else
		gmem_values_forget(&tier->values, value);
}

bool gmem_remote_sweep(struct gmem_device *tier, uint64_t ns)
{
	struct gmem_request requests[GMEM_EXCHANGE_MAX];
	uint32_t dead[GMEM_EXCHANGE_MAX];
	unsigned count = gmem_values_dead(&tier->values, dead, GMEM_EXCHANGE_MAX), dropped = 0;

	for (unsigned i = 0; i < count; i++) {
		requests[i] = (struct gmem_request){ .kind = GMEM_DROP };
		name_value(tier, dead[i], &requests[i]);
	}
	if (count)
		gmem_remote_exchange(tier, requests, count, ns);
	for (unsigned i = 0; i < count; i++) {
		end_drop(tier, dead[i], requests[i].result);
		dropped += !requests[i].result;
	}
	return dropped;
}

/* ---- push ---- */

struct batch {
	struct gmem_device *tier;
	struct gmem_peer_io *io;
	unsigned count, pages, drops; /* drops come behind the values */
	struct gmem_request requests[GMEM_EXCHANGE_MAX];
	uint32_t values[GMEM_EXCHANGE_MAX];
	struct gmem_piece pieces[GMEM_EXCHANGE_MAX]; /* a request's follow each other */
	uint8_t ios[GMEM_EXCHANGE_MAX];              /* whose they are */
};

/* Pushes to a tier that is lost would only take time: one a second finds out whether it is back. */
static bool worth_trying(struct gmem_device *tier)
{
	uint64_t now, before;

	if (!atomic_load(&tier->lost))
		return true;
	now = gmem_now_ns();
	before = atomic_load(&tier->tried_ns);
	return now - before >= LOST_RETRY_NS && atomic_compare_exchange_strong(&tier->tried_ns, &before, now);
}

/* ---- values that are mostly holes ---- */

struct squeeze {
	uint64_t keys[GMEM_VALUE_SLOTS], words[GMEM_VALUE_SLOTS];
	struct gmem_piece pieces[GMEM_VALUE_SLOTS];
	struct gmem_request requests[GMEM_VALUE_SLOTS];
	unsigned count;
};

static void gather_page(struct gmem_device *tier, struct squeeze *squeeze, uint32_t value, unsigned slot)
{
	uint64_t key = tier->values.records[value].keys[slot], word = make_word(1 << GMEM_SHIFT_4K, slot, value);
	struct gmem_entry entry = key < tier->key_count ? gmem_entries_get(tier->entries, key) : (struct gmem_entry){ 0, 0 };
	unsigned n = squeeze->count;

	if (entry.word != word)
		return;
	squeeze->keys[n] = key;
	squeeze->words[n] = word;
	squeeze->pieces[n] = (struct gmem_piece){ .key = key, .memory = tier->squeezed + n * 4096ul, .bytes = 4096,
						  .crc = (uint32_t)entry.check };
	squeeze->requests[n] = (struct gmem_request){ .kind = GMEM_GET, .part = true, .offset = slot * 4096, .count = 1,
						      .pieces = &squeeze->pieces[n] };
	name_value(tier, value, &squeeze->requests[n]);
	squeeze->count++;
}

/* The pages of a new value are moved to it in the index, but for those that have gone, or been replaced, meanwhile. */
static void move_pages(struct gmem_device *tier, struct squeeze *squeeze, uint32_t value, const struct gmem_request *put)
{
	for (unsigned s = 0; s < squeeze->count; s++) {
		uint64_t word = make_word(1 << GMEM_SHIFT_4K, s, value);
		bool moved = !put->result && gmem_entries_move(tier->entries, squeeze->keys[s], squeeze->words[s], word);

		if (moved)
			gmem_values_leave(&tier->values, gmem_remote_value(squeeze->words[s]), gmem_remote_slot(squeeze->words[s]));
		else
			gmem_values_leave(&tier->values, value, s);
	}
}

static bool rewrite(struct gmem_device *tier, struct squeeze *squeeze)
{
	struct gmem_request put = { .kind = GMEM_PUT, .count = squeeze->count, .pieces = squeeze->pieces };
	uint32_t value;

	gmem_remote_exchange(tier, squeeze->requests, squeeze->count, tier->timeout_ns);
	for (unsigned s = 0; s < squeeze->count; s++)
		if (squeeze->requests[s].result || squeeze->pieces[s].result)
			return false;
	if (gmem_values_add(&tier->values, squeeze->keys, squeeze->count, 4096, true, &value))
		return false;
	name_value(tier, value, &put);
	gmem_remote_exchange(tier, &put, 1, tier->timeout_ns);
	move_pages(tier, squeeze, value, &put);
	return !put.result;
}

bool gmem_remote_squeeze(struct gmem_device *tier)
{
	uint32_t values[GMEM_VALUE_SLOTS];
	struct squeeze squeeze;
	unsigned found;
	bool done = false;

	if (atomic_flag_test_and_set(&tier->squeezing))
		return false;
	squeeze.count = 0;
	found = gmem_values_sparse(&tier->values, &tier->squeezed_to, values, GMEM_VALUE_SLOTS);
	for (unsigned v = 0; v < found; v++)
		for (unsigned s = 0; s < GMEM_VALUE_SLOTS && squeeze.count < GMEM_VALUE_SLOTS; s++)
			if (s < tier->values.records[values[v]].slots)
				gather_page(tier, &squeeze, values[v], s);
	if (squeeze.count)
		done = rewrite(tier, &squeeze);
	atomic_flag_clear(&tier->squeezing);
	return done;
}

static int add_value(struct gmem_device *tier, const uint64_t *keys, unsigned slots, uint32_t page_bytes, uint32_t *ret)
{
	int err = gmem_values_add(&tier->values, keys, slots, page_bytes, false, ret);

	for (int i = 0; err == -ENOSPC && i < SWEEPS_MAX; i++) {
		if (!gmem_remote_sweep(tier, tier->timeout_ns) && !gmem_remote_squeeze(tier) &&
		    !gmem_values_await(&tier->values, tier->timeout_ns / SWEEPS_MAX))
			break;
		err = gmem_values_add(&tier->values, keys, slots, page_bytes, false, ret);
	}
	return err;
}

/* The value of some pages. They get entries later; room for these is reserved now. */
static int start_value(struct batch *batch, const uint8_t *ios, unsigned slots)
{
	struct gmem_device *tier = batch->tier;
	struct gmem_request *request = &batch->requests[batch->count];
	uint32_t page_bytes = (uint32_t)batch->io[ios[0]].bytes;
	uint64_t keys[GMEM_VALUE_SLOTS];
	unsigned reserved = 0;
	int err = 0;

	for (; !err && reserved < slots; reserved += !err) {
		keys[reserved] = batch->io[ios[reserved]].key;
		err = gmem_entries_reserve(tier->entries, keys[reserved]);
	}
	if (!err)
		err = add_value(tier, keys, slots, page_bytes, &batch->values[batch->count]);
	if (err) {
		while (reserved)
			gmem_entries_release(tier->entries, keys[--reserved]);
		return err;
	}
	*request = (struct gmem_request){ .kind = GMEM_PUT, .count = slots, .pieces = batch->pieces + batch->pages };
	name_value(tier, batch->values[batch->count++], request);
	for (unsigned s = 0; s < slots; s++) {
		batch->ios[batch->pages] = ios[s];
		batch->pieces[batch->pages++] = (struct gmem_piece){
			.key = keys[s], .memory = batch->io[ios[s]].memory, .bytes = page_bytes,
		};
	}
	return 0;
}

static void publish_page(struct gmem_device *tier, uint32_t value, unsigned slot, const struct gmem_piece *piece)
{
	struct gmem_entry entry = { make_word(piece->bytes, slot, value), piece->crc };

	atomic_fetch_add(&tier->pages, 1);
	atomic_fetch_add(&tier->page_bytes, piece->bytes);
	leave_page(tier, gmem_entries_put(tier->entries, piece->key, entry));
}

static int push_result(struct gmem_device *tier, int result)
{
	if (result == -ENOSPC) /* an answer: it is there, and full */
		return result;
	atomic_store(&tier->lost, result != 0);
	if (!result)
		return 0;
	atomic_store(&tier->tried_ns, gmem_now_ns());
	if (result == -ENODATA)
		gmem_nodes_note(&tier->nodes, "fewer than %u replicas have confirmed a page: it stays on the host", tier->replicas);
	return -EIO;
}

static void end_value(struct batch *batch, unsigned v)
{
	struct gmem_device *tier = batch->tier;
	struct gmem_request *request = &batch->requests[v];
	int result = push_result(tier, request->result);

	gmem_crash(GMEM_CRASH_STORE_WRITTEN);
	for (unsigned s = 0; s < request->count; s++) {
		struct gmem_piece *piece = &request->pieces[s];
		int err = result ? result : piece->result;

		if (!err) {
			publish_page(tier, batch->values[v], s, piece);
		} else {
			gmem_entries_release(tier->entries, piece->key);
			if (gmem_values_leave(&tier->values, batch->values[v], s))
				gmem_remote_ring(tier);
		}
		batch->io[batch->ios[piece - batch->pieces]].result = err;
	}
	gmem_crash(GMEM_CRASH_STORE_FLIPPED);
}

/* Values that nobody wants go on the same way, if they are where something is sent to anyhow: the server has their memory
 * for what comes next, and nobody has to ask it for that. */
static void start_drops(struct batch *batch)
{
	struct gmem_device *tier = batch->tier;
	unsigned nodes[GMEM_EXCHANGE_MAX], room = GMEM_EXCHANGE_MAX - batch->count, found;
	uint32_t dead[GMEM_EXCHANGE_MAX];

	for (unsigned v = 0; v < batch->count; v++)
		nodes[v] = gmem_nodes_of_slot(&tier->nodes, batch->requests[v].slot);
	found = gmem_values_dead(&tier->values, dead, room < batch->count ? room : batch->count);
	for (unsigned d = 0; d < found; d++) {
		struct gmem_request *request = &batch->requests[batch->count + batch->drops];
		unsigned node, v = 0;

		*request = (struct gmem_request){ .kind = GMEM_DROP };
		name_value(tier, dead[d], request);
		node = gmem_nodes_of_slot(&tier->nodes, request->slot);
		while (v < batch->count && nodes[v] != node)
			v++;
		if (v == batch->count)
			gmem_values_bury(&tier->values, dead[d]);
		else
			batch->values[batch->count + batch->drops++] = dead[d];
	}
}

static int start_or_fail(struct batch *batch, const uint8_t *ios, unsigned slots)
{
	int err = start_value(batch, ios, slots);

	for (unsigned s = 0; err && s < slots; s++)
		batch->io[ios[s]].result = err;
	return err;
}

/* Up to GMEM_EXCHANGE_MAX pages. Those of 4 KiB share values. */
static void push_some(struct gmem_device *tier, struct gmem_peer_io *io, unsigned count)
{
	struct batch batch;
	uint8_t small[GMEM_VALUE_SLOTS];
	unsigned smalls = 0;
	bool tries = worth_trying(tier);

	batch.tier = tier;
	batch.io = io;
	batch.count = batch.pages = batch.drops = 0;
	for (unsigned i = 0; i < count; i++) {
		io[i].result = !is_page(tier, &io[i]) ? -EINVAL : !tries ? -EIO : 0;
		if (io[i].result)
			continue;
		if (io[i].bytes != 1u << GMEM_SHIFT_4K) {
			start_or_fail(&batch, &(uint8_t){ (uint8_t)i }, 1);
			continue;
		}
		small[smalls++] = (uint8_t)i;
		if (smalls == GMEM_VALUE_SLOTS) {
			start_or_fail(&batch, small, smalls);
			smalls = 0;
		}
	}
	if (smalls)
		start_or_fail(&batch, small, smalls);
	if (!batch.count)
		return;
	start_drops(&batch);
	gmem_remote_exchange(tier, batch.requests, batch.count + batch.drops, tier->timeout_ns);
	for (unsigned v = 0; v < batch.count; v++)
		end_value(&batch, v);
	for (unsigned d = 0; d < batch.drops; d++)
		end_drop(tier, batch.values[batch.count + d], batch.requests[batch.count + d].result);
}

void gmem_remote_push(struct gmem_device *tier, struct gmem_peer_io *io, size_t count)
{
	for (size_t at = 0; at < count; at += GMEM_EXCHANGE_MAX)
		push_some(tier, io + at, (unsigned)(count - at < GMEM_EXCHANGE_MAX ? count - at : GMEM_EXCHANGE_MAX));
}

/* ---- pull ---- */

/* What is read for a page; false: its result is known. */
static bool start_pull(struct gmem_device *tier, struct gmem_peer_io *io, struct gmem_entry entry,
		       struct gmem_request *request, struct gmem_piece *piece)
{
	const struct gmem_value *record;

	io->result = !entry.word ? -ENOENT : gmem_remote_page_bytes(entry.word) != io->bytes ? -EINVAL : 0;
	if (io->result)
		return false;
	record = &tier->values.records[gmem_remote_value(entry.word)];
	*piece = (struct gmem_piece){ .key = io->key, .memory = io->memory, .bytes = (uint32_t)io->bytes,
				      .crc = (uint32_t)entry.check };
	*request = (struct gmem_request){
		.kind = GMEM_GET, .count = 1, .pieces = piece, .part = record->slots > 1,
		.offset = gmem_remote_slot(entry.word) * (uint32_t)io->bytes,
	};
	name_value(tier, gmem_remote_value(entry.word), request);
	return true;
}

/* -EAGAIN: the page has moved meanwhile. */
static int pull_result(struct gmem_device *tier, const struct gmem_peer_io *io, uint64_t word,
		       const struct gmem_request *request, unsigned tries)
{
	int err = request->result ? request->result : request->pieces[0].result;

	if (!err || err == -EFAULT)
		return err;
	if (gmem_entries_get(tier->entries, io->key).word != word)
		return -EAGAIN;
	if (err == -EBADMSG && !tries)
		return -EAGAIN; /* perhaps on the way */
	if (err == -EBADMSG)
		gmem_nodes_note(&tier->nodes, "%.100s is damaged: its checksum differs", request->name);
	if (err == -ENOENT)
		gmem_nodes_note(&tier->nodes, "%.100s is gone from the server", request->name);
	return err == -EBADMSG ? err : -EIO;
}

static void pull_some(struct gmem_device *tier, struct gmem_peer_io *io, unsigned count, unsigned tries)
{
	struct gmem_request requests[GMEM_EXCHANGE_MAX];
	struct gmem_piece pieces[GMEM_EXCHANGE_MAX];
	uint64_t words[GMEM_EXCHANGE_MAX];
	uint8_t ios[GMEM_EXCHANGE_MAX];
	unsigned started = 0;

	for (unsigned i = 0; i < count; i++) {
		struct gmem_entry entry = { 0, 0 };

		if (tries && io[i].result != -EAGAIN)
			continue;
		if (!is_page(tier, &io[i])) {
			io[i].result = -EINVAL;
			continue;
		}
		entry = gmem_entries_get(tier->entries, io[i].key);
		if (!start_pull(tier, &io[i], entry, &requests[started], &pieces[started]))
			continue;
		words[started] = entry.word;
		ios[started++] = (uint8_t)i;
	}
	if (started)
		gmem_remote_exchange(tier, requests, started, tier->timeout_ns);
	for (unsigned r = 0; r < started; r++)
		io[ios[r]].result = pull_result(tier, &io[ios[r]], words[r], &requests[r], tries);
}

void gmem_remote_pull(struct gmem_device *tier, struct gmem_peer_io *io, size_t count)
{
	for (size_t at = 0; at < count; at += GMEM_EXCHANGE_MAX) {
		unsigned some = (unsigned)(count - at < GMEM_EXCHANGE_MAX ? count - at : GMEM_EXCHANGE_MAX);

		for (unsigned tries = 0; tries < 4; tries++)
			pull_some(tier, io + at, some, tries);
		for (unsigned i = 0; i < some; i++)
			if (io[at + i].result == -EAGAIN)
				io[at + i].result = -EIO;
	}
}

int gmem_remote_free(struct gmem_device *tier, uint64_t key)
{
	uint64_t word = key < tier->key_count ? gmem_entries_take(tier->entries, key) : 0;

	if (!word)
		return -ENOENT;
	leave_page(tier, word);
	return 0;
}
