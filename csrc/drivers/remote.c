/* SPDX-License-Identifier: Apache-2.0
 *
 * remote: a tier whose pages are values of a Valkey or Redis server, or of a cluster of them. What it is asked and what
 * it says is here; values.h is what it has stored, nodes.h where servers are, exchange.h how they are spoken to.
 *
 * The order that keeps a page: its value is recorded, written under a name that nothing had before, confirmed by as many
 * replicas as are asked for, and only then do the entries of its pages name it. Values that nobody names any more are
 * dropped by a thread, later. Keys are gmem:TENANT:{OBJECT:EXTENT}:PAGE:VERSION: an extent, the pages of some MiB, is on
 * one node, so that what leaves or comes together is one exchange with few nodes, and a tier is spread over all.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <gmem/crash.h>
#include <gmem/driver.h>
#include <gmem/memfd.h>
#include <gmem/stats.h>

#include "entries.h"
#include "exchange.h"
#include "values.h"

#define TENANT_MAX 32
#define TIMEOUT_DEFAULT_MS 15000
#define TIMEOUT_MAX_MS 3600000
#define REPLICAS_MAX 8
#define CAPACITY_MIN (4ull << 20)
#define CAPACITY_MAX (8ull << 40)
#define PATIENCE_MIN_NS 200000000ull
#define PATIENCE_MAX_NS 2000000000ull
#define LOST_RETRY_NS 1000000000ull
#define SWEEP_MS 1000
#define SWEEPS_MAX 256
#define FAREWELL_NS 2000000000ull
#define MEASURE_READS 8

/* An entry's word: bit 0 set, page size 1..2, slot 3..6, value from 8 on. Its check: the page's checksum. */
struct gmem_device {
	char tenant[TENANT_MAX + 1];          /* (C) */
	unsigned replicas;                    /* (C) */
	uint64_t timeout_ns, capacity, key_count; /* (C) */
	uint64_t bandwidth, latency_ns;       /* (C) */
	int guard;                            /* (C) whoever watches it ends the server when nobody has it any more */
	struct gmem_quota quota;              /* of the entries; not limited */
	struct gmem_entries *entries;         /* (C) */
	struct gmem_values values;
	struct gmem_nodes nodes;
	pthread_t keeper;
	bool keeper_runs;                     /* (C) */
	int bell;                             /* (C) eventfd that wakes the keeper */
	atomic_bool stop;
	_Atomic uint64_t pages, page_bytes;
	_Atomic bool lost;                    /* nothing could be stored in the time that there is */
	_Atomic uint64_t tried_ns;            /* when a lost one was last tried */
	atomic_flag squeezing;                /* one thread at a time; it has what follows */
	uint32_t squeezed_to;
	uint8_t *squeezed;                    /* a value */
};

static int refuse(const struct gmem_driver_config *config, int err, const char *why)
{
	snprintf(config->message, GMEM_MESSAGE_MAX, "%s", why);
	return err;
}

/* ---- words and names ---- */

static uint64_t page_bytes_of(uint64_t word)
{
	static const uint64_t bytes[4] = { 1 << GMEM_SHIFT_4K, 1 << GMEM_SHIFT_64K, 1 << GMEM_SHIFT_2M };

	return bytes[word >> 1 & 3];
}

static unsigned slot_of(uint64_t word)
{
	return (unsigned)(word >> 3 & 15);
}

static uint32_t value_of(uint64_t word)
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

/* Extents of 2 MiB, 4 MiB and 32 MiB: large enough for a batch, small enough to spread an array over all nodes. */
static uint64_t extent_of(uint64_t key, uint32_t page_bytes)
{
	return key >> (page_bytes == 1u << GMEM_SHIFT_4K ? 9 : page_bytes == 1u << GMEM_SHIFT_64K ? 6 : 4);
}

/* False: there is no such value (any more). */
static bool name_value(struct gmem_device *tier, uint32_t value, struct gmem_request *request)
{
	const struct gmem_value *record = &tier->values.records[value];
	uint64_t version = atomic_load(&record->version), lead = record->keys[0];

	if (!version)
		return false;
	gmem_request_name(request, "gmem:%s:{t%016llx:%llx}:%llx:%llx", tier->tenant,
			  (unsigned long long)tier->values.header->object,
			  (unsigned long long)extent_of(lead, record->page_bytes), (unsigned long long)lead,
			  (unsigned long long)version);
	return true;
}

static void exchange(struct gmem_device *tier, struct gmem_request *requests, unsigned count, uint64_t ns)
{
	struct gmem_exchange x = { &tier->nodes, tier->replicas, gmem_now_ns() + ns };

	gmem_exchange(&x, requests, count);
}

/* ---- values that nobody wants ---- */

static void ring_bell(struct gmem_device *tier)
{
	uint64_t one = 1;

	(void)!write(tier->bell, &one, sizeof(one));
}

static void leave_page(struct gmem_device *tier, uint64_t word)
{
	if (!word)
		return;
	atomic_fetch_sub(&tier->pages, 1);
	atomic_fetch_sub(&tier->page_bytes, page_bytes_of(word));
	if (gmem_values_leave(&tier->values, value_of(word), slot_of(word)))
		ring_bell(tier);
}

/* Drops some; false if there was none, or the servers can't be had. */
static bool sweep(struct gmem_device *tier, uint64_t ns)
{
	struct gmem_request requests[GMEM_EXCHANGE_MAX];
	uint32_t dead[GMEM_EXCHANGE_MAX];
	unsigned count = gmem_values_dead(&tier->values, dead, GMEM_EXCHANGE_MAX), dropped = 0;

	for (unsigned i = 0; i < count; i++) {
		requests[i] = (struct gmem_request){ .kind = GMEM_DROP };
		name_value(tier, dead[i], &requests[i]);
	}
	if (count)
		exchange(tier, requests, count, ns);
	for (unsigned i = 0; i < count; i++) {
		if (requests[i].result)
			gmem_values_bury(&tier->values, dead[i]);
		else
			gmem_values_forget(&tier->values, dead[i]);
		dropped += !requests[i].result;
	}
	return dropped;
}

/* ---- push ---- */

struct batch {
	struct gmem_device *tier;
	struct gmem_peer_io *io;
	unsigned count, pages;
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
			gmem_values_leave(&tier->values, value_of(squeeze->words[s]), slot_of(squeeze->words[s]));
		else
			gmem_values_leave(&tier->values, value, s);
	}
}

static bool rewrite(struct gmem_device *tier, struct squeeze *squeeze)
{
	struct gmem_request put = { .kind = GMEM_PUT, .count = squeeze->count, .pieces = squeeze->pieces };
	uint32_t value;

	exchange(tier, squeeze->requests, squeeze->count, tier->timeout_ns);
	for (unsigned s = 0; s < squeeze->count; s++)
		if (squeeze->requests[s].result || squeeze->pieces[s].result)
			return false;
	if (gmem_values_add(&tier->values, squeeze->keys, squeeze->count, 4096, true, &value))
		return false;
	name_value(tier, value, &put);
	exchange(tier, &put, 1, tier->timeout_ns);
	move_pages(tier, squeeze, value, &put);
	return !put.result;
}

/* Brings the pages of some values that are at most half full into one; true: there is less now, once it is swept. */
static bool squeeze_some(struct gmem_device *tier)
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
		if (!sweep(tier, tier->timeout_ns) && !squeeze_some(tier) &&
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
				ring_bell(tier);
		}
		batch->io[batch->ios[piece - batch->pieces]].result = err;
	}
	gmem_crash(GMEM_CRASH_STORE_FLIPPED);
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
	batch.count = batch.pages = 0;
	for (uint8_t i = 0; i < count; i++) {
		io[i].result = !is_page(tier, &io[i]) ? -EINVAL : !tries ? -EIO : 0;
		if (io[i].result)
			continue;
		if (io[i].bytes != 1u << GMEM_SHIFT_4K) {
			start_or_fail(&batch, &i, 1);
			continue;
		}
		small[smalls++] = i;
		if (smalls == GMEM_VALUE_SLOTS) {
			start_or_fail(&batch, small, smalls);
			smalls = 0;
		}
	}
	if (smalls)
		start_or_fail(&batch, small, smalls);
	if (batch.count)
		exchange(tier, batch.requests, batch.count, tier->timeout_ns);
	for (unsigned v = 0; v < batch.count; v++)
		end_value(&batch, v);
}

static int remote_peer_map_batch(struct gmem_device *tier, struct gmem_peer_io *io, size_t count)
{
	for (size_t at = 0; at < count; at += GMEM_EXCHANGE_MAX)
		push_some(tier, io + at, (unsigned)(count - at < GMEM_EXCHANGE_MAX ? count - at : GMEM_EXCHANGE_MAX));
	return 0;
}

/* ---- pull ---- */

/* What is read for a page; false: its result is known. */
static bool start_pull(struct gmem_device *tier, struct gmem_peer_io *io, struct gmem_entry entry,
		       struct gmem_request *request, struct gmem_piece *piece)
{
	const struct gmem_value *record;

	io->result = !entry.word ? -ENOENT : page_bytes_of(entry.word) != io->bytes ? -EINVAL : 0;
	if (io->result)
		return false;
	record = &tier->values.records[value_of(entry.word)];
	*piece = (struct gmem_piece){ .key = io->key, .memory = io->memory, .bytes = (uint32_t)io->bytes,
				      .crc = (uint32_t)entry.check };
	*request = (struct gmem_request){
		.kind = GMEM_GET, .count = 1, .pieces = piece, .part = record->slots > 1,
		.offset = slot_of(entry.word) * (uint32_t)io->bytes,
	};
	name_value(tier, value_of(entry.word), request);
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

	for (uint8_t i = 0; i < count; i++) {
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
		ios[started++] = i;
	}
	if (started)
		exchange(tier, requests, started, tier->timeout_ns);
	for (unsigned r = 0; r < started; r++)
		io[ios[r]].result = pull_result(tier, &io[ios[r]], words[r], &requests[r], tries);
}

static int remote_peer_unmap_batch(struct gmem_device *tier, struct gmem_peer_io *io, size_t count)
{
	for (size_t at = 0; at < count; at += GMEM_EXCHANGE_MAX) {
		unsigned some = (unsigned)(count - at < GMEM_EXCHANGE_MAX ? count - at : GMEM_EXCHANGE_MAX);

		for (unsigned tries = 0; tries < 4; tries++)
			pull_some(tier, io + at, some, tries);
		for (unsigned i = 0; i < some; i++)
			if (io[at + i].result == -EAGAIN)
				io[at + i].result = -EIO;
	}
	return 0;
}

static int remote_peer_map(struct gmem_device *tier, uint64_t key, const void *src, size_t bytes)
{
	struct gmem_peer_io io = { .key = key, .memory = (void *)(uintptr_t)src, .bytes = bytes };

	remote_peer_map_batch(tier, &io, 1);
	return io.result;
}

static int remote_peer_unmap(struct gmem_device *tier, uint64_t key, void *dst, size_t bytes)
{
	struct gmem_peer_io io = { .key = key, .memory = dst, .bytes = bytes };

	remote_peer_unmap_batch(tier, &io, 1);
	return io.result;
}

/* Never waits for a server. */
static int remote_peer_free(struct gmem_device *tier, uint64_t key, size_t bytes)
{
	uint64_t word = key < tier->key_count ? gmem_entries_take(tier->entries, key) : 0;

	(void)bytes;
	if (!word)
		return -ENOENT;
	leave_page(tier, word);
	return 0;
}

/* ---- the keeper ---- */

static bool is_sparse(struct gmem_device *tier)
{
	uint64_t stored;

	gmem_mutex_lock(&tier->values.lock);
	stored = tier->values.stored_bytes;
	gmem_mutex_unlock(&tier->values.lock);
	return stored > 2 * atomic_load(&tier->page_bytes) + (1 << 20);
}

/* Drops what nobody wants, brings together what is left over, and hears of a new map. */
static void *keeper_thread(void *arg)
{
	struct gmem_device *tier = arg;
	struct pollfd fds[] = { { .fd = tier->bell, .events = POLLIN }, { .fd = tier->nodes.control, .events = POLLIN } };
	uint64_t rings;

	pthread_setname_np(pthread_self(), "gmem-remote");
	while (!atomic_load(&tier->stop)) {
		bool more = false;

		poll(fds, 2, SWEEP_MS);
		if (fds[1].revents && gmem_nodes_listen(&tier->nodes) == -EPIPE)
			fds[1].fd = -1;
		if (fds[0].revents)
			(void)!read(tier->bell, &rings, sizeof(rings));
		while (!atomic_load(&tier->stop) && sweep(tier, tier->nodes.connect_ns))
			more = true;
		if (!atomic_load(&tier->stop) && is_sparse(tier))
			more |= squeeze_some(tier);
		if (more)
			ring_bell(tier); /* look again, but hear first */
	}
	return NULL;
}

/* ---- identity ---- */

static int remote_info(struct gmem_device *tier, struct gmem_device_info *ret)
{
	*ret = (struct gmem_device_info){
		.capacity_bytes = tier->capacity,
		.page_bytes_mask = 1ull << GMEM_SHIFT_4K | 1ull << GMEM_SHIFT_64K | 1ull << GMEM_SHIFT_2M,
		.caps = GMEM_CAP_PEER | GMEM_CAP_SLOW | GMEM_CAP_REMOTE,
		.bandwidth_bytes_per_s = tier->bandwidth, .latency_ns = tier->latency_ns,
	};
	return 0;
}

static int remote_health(struct gmem_device *tier)
{
	return atomic_load(&tier->lost) ? -EIO : 0;
}

/* A copy for each thread: the sentence may be replaced while it is read. */
static const char *remote_last_error(struct gmem_device *tier)
{
	static _Thread_local char text[GMEM_MESSAGE_MAX];

	gmem_nodes_error(&tier->nodes, text);
	return text;
}

static int remote_peer_usage(struct gmem_device *tier, struct gmem_device_usage *ret)
{
	uint64_t pages = atomic_load(&tier->pages), stored;

	gmem_mutex_lock(&tier->values.lock);
	stored = tier->values.stored_bytes;
	gmem_mutex_unlock(&tier->values.lock);
	*ret = (struct gmem_device_usage){
		.pages = pages, .raw_pages = pages, .page_bytes = atomic_load(&tier->page_bytes), .stored_bytes = stored,
	};
	return 0;
}

static void remote_remove(struct gmem_device *tier)
{
	uint64_t end = gmem_now_ns() + FAREWELL_NS;

	if (tier->keeper_runs) {
		atomic_store(&tier->stop, true);
		ring_bell(tier);
		pthread_join(tier->keeper, NULL);
		while (gmem_now_ns() < end && sweep(tier, FAREWELL_NS))
			;
	}
	if (tier->nodes.connect_ns)
		gmem_nodes_deinit(&tier->nodes);
	if (tier->values.capacity)
		gmem_values_deinit(&tier->values);
	if (tier->entries)
		gmem_entries_destroy(tier->entries);
	free(tier->squeezed);
	if (tier->bell >= 0)
		close(tier->bell);
	if (tier->guard >= 0)
		close(tier->guard);
	free(tier);
}

/* ---- probe ---- */

struct options {
	const char *tenant, *user, *password_file, *address;
	uint64_t capacity, replicas, timeout_ms, control, guard;
};

#define UNSET UINT64_MAX

static bool is_tenant(const char *text)
{
	size_t bytes = strlen(text);

	for (size_t i = 0; i < bytes; i++)
		if (!isalnum((unsigned char)text[i]) && text[i] != '-' && text[i] != '_' && text[i] != '.')
			return false;
	return bytes && bytes <= TENANT_MAX;
}

static int read_options(const struct gmem_driver_config *config, struct options *ret)
{
	const struct gmem_driver_option known[] = {
		{ "tenant", NULL, false, &ret->tenant }, { "capacity", &ret->capacity, false, NULL },
		{ "replicas", &ret->replicas, false, NULL }, { "timeout_ms", &ret->timeout_ms, false, NULL },
		{ "user", NULL, false, &ret->user }, { "password_file", NULL, false, &ret->password_file },
		{ "address", NULL, false, &ret->address }, { "control", &ret->control, false, NULL },
		{ "guard", &ret->guard, false, NULL },
	};
	int err;

	*ret = (struct options){ .tenant = "default", .user = "", .password_file = "", .capacity = 1ull << 30,
				 .timeout_ms = TIMEOUT_DEFAULT_MS, .control = UNSET, .guard = UNSET };
	err = gmem_driver_options(config, known, sizeof(known) / sizeof(known[0]));
	if (err)
		return err;
	if (!is_tenant(ret->tenant))
		return refuse(config, -EINVAL, "tenant: 1 to 32 letters, digits, and - _ .");
	if (ret->capacity < CAPACITY_MIN || ret->capacity > CAPACITY_MAX)
		return refuse(config, -EINVAL, "capacity: must be 4M to 8T");
	if (ret->replicas > REPLICAS_MAX)
		return refuse(config, -EINVAL, "replicas: 0 to 8");
	if (ret->timeout_ms < 100 || ret->timeout_ms > TIMEOUT_MAX_MS)
		return refuse(config, -EINVAL, "timeout_ms: 100 to 3600000");
	if (ret->password_file[0] && ret->password_file[0] != '/')
		return refuse(config, -EINVAL, "password_file: must be an absolute path");
	if (ret->user[0] && !ret->password_file[0])
		return refuse(config, -EINVAL, "user: needs a password_file");
	if (!ret->address == (ret->control == UNSET))
		return refuse(config, -EINVAL, "address: the only server's, or control: a socket that the map comes from");
	if (!config->key_count)
		return refuse(config, -EINVAL, "driver: the core does not say how many keys there are");
	return 0;
}

static int open_nodes(const struct gmem_driver_config *config, const struct options *options, struct gmem_device *tier)
{
	struct gmem_identity identity = { .tls = NULL };
	struct gmem_address address;
	uint64_t patience = tier->timeout_ns / 4;
	int control = -1, err;

	if ((size_t)snprintf(identity.user, sizeof(identity.user), "%s", options->user) >= sizeof(identity.user))
		return refuse(config, -EINVAL, "user: too long");
	if ((size_t)snprintf(identity.password_file, sizeof(identity.password_file), "%s", options->password_file) >=
	    sizeof(identity.password_file))
		return refuse(config, -EINVAL, "password_file: too long");
	if (options->address && gmem_address_parse(options->address, NULL, &address))
		return refuse(config, -EINVAL, "address: IP:PORT, [IP6]:PORT or unix:/PATH");
	patience = patience < PATIENCE_MIN_NS ? PATIENCE_MIN_NS : patience > PATIENCE_MAX_NS ? PATIENCE_MAX_NS : patience;
	if (options->control != UNSET && (control = fcntl((int)options->control, F_DUPFD_CLOEXEC, 3)) < 0)
		return refuse(config, -errno, "control: no descriptor");
	err = gmem_nodes_init(&tier->nodes, &identity, options->address ? &address : NULL, control, patience);
	if (!err && options->control != UNSET && gmem_nodes_listen(&tier->nodes))
		err = refuse(config, -EPROTO, "control: no map of the servers came");
	return err;
}

/* Everything that the entries say is stored is; other values are dropped. */
static int count_stored(struct gmem_device *tier)
{
	uint64_t key = 0;
	int err = 0;

	for (; !err && !gmem_entries_next(tier->entries, &key); key++) {
		uint64_t word = gmem_entries_get(tier->entries, key).word;

		err = word & 1 ? gmem_values_claim(&tier->values, value_of(word), slot_of(word), key) : -EPROTO;
		atomic_fetch_add(&tier->pages, 1);
		atomic_fetch_add(&tier->page_bytes, page_bytes_of(word));
	}
	if (!err)
		gmem_values_settle(&tier->values);
	return err;
}

static int open_memory(const struct gmem_driver_config *config, struct gmem_device *tier)
{
	int values = gmem_driver_kept_fd(config, "values"), entries = gmem_driver_kept_fd(config, "entries"), err;
	bool kept = values >= 0 && entries >= 0;

	err = gmem_values_init(&tier->values, tier->capacity, values);
	if (!err)
		err = gmem_entries_create("gmem-remote-entries", config->key_count, &tier->quota, entries, &tier->entries);
	if (!err && kept)
		err = count_stored(tier);
	if (!err && !kept)
		err = gmem_driver_keep_fd(config, "values", gmem_values_fd(&tier->values));
	if (!err && !kept)
		err = gmem_driver_keep_fd(config, "entries", gmem_entries_fd(tier->entries));
	if (!err && !kept && tier->guard >= 0)
		err = gmem_driver_keep_fd(config, "guard", tier->guard);
	if (!err && kept)
		tier->guard = gmem_driver_kept_fd(config, "guard");
	if (err)
		snprintf(config->message, GMEM_MESSAGE_MAX, "%s: %s", kept ? "what was left can't be taken over" : "memory",
			 strerror(-err));
	return err;
}

static int probe_once(struct gmem_device *tier, enum gmem_request_kind kind, void *memory, uint32_t bytes, bool part)
{
	struct gmem_piece piece = { .memory = memory, .bytes = bytes };
	struct gmem_request request = { .kind = kind, .part = part, .count = kind != GMEM_DROP, .pieces = &piece };

	gmem_request_name(&request, "gmem:%s:{t%016llx:probe}:0:0", tier->tenant,
			  (unsigned long long)tier->values.header->object);
	exchange(tier, &request, 1, tier->timeout_ns);
	return request.result; /* the checksum is not known here, and does not matter */
}

/* Whether it can be used at all: rights, replicas, room; and how fast it is. */
static int measure(struct gmem_device *tier)
{
	uint8_t *page = calloc(1, GMEM_HUGE_BYTES);
	uint64_t begin, took, best = UINT64_MAX;
	bool stored;
	int err;

	if (!page)
		return -ENOMEM;
	err = probe_once(tier, GMEM_PUT, page, GMEM_HUGE_BYTES, false);
	stored = !err || err == -ENODATA;
	begin = gmem_now_ns();
	if (!err)
		err = probe_once(tier, GMEM_GET, page, GMEM_HUGE_BYTES, false);
	tier->bandwidth = (uint64_t)((double)GMEM_HUGE_BYTES * 1e9 / (double)(gmem_now_ns() - begin + 1));
	for (int i = 0; !err && i < MEASURE_READS; i++) {
		begin = gmem_now_ns();
		err = probe_once(tier, GMEM_GET, page, 4096, true);
		took = gmem_now_ns() - begin;
		best = took < best ? took : best;
	}
	tier->latency_ns = best;
	if (stored) {
		int dropped = probe_once(tier, GMEM_DROP, NULL, 0, false);

		err = err ? err : dropped;
	}
	free(page);
	return err;
}

static int try_it(const struct gmem_driver_config *config, struct gmem_device *tier)
{
	struct gmem_values_header *header = tier->values.header;
	char why[GMEM_MESSAGE_MAX];
	int err;

	if (header->latency_ns) { /* a predecessor's: its pages are there, whether the servers can be had just now or not */
		tier->bandwidth = header->bandwidth;
		tier->latency_ns = header->latency_ns;
		return 0;
	}
	err = measure(tier);
	if (!err) {
		header->bandwidth = tier->bandwidth;
		header->latency_ns = tier->latency_ns + !tier->latency_ns;
		return 0;
	}
	gmem_nodes_error(&tier->nodes, why);
	if (err == -ENODATA)
		snprintf(config->message, GMEM_MESSAGE_MAX, "replicas: fewer than %u confirm what is written", tier->replicas);
	else if (err == -ENOSPC)
		snprintf(config->message, GMEM_MESSAGE_MAX, "the server is full: %.100s", why);
	else
		snprintf(config->message, GMEM_MESSAGE_MAX, "a first write and read failed: %.100s", why[0] ? why : strerror(-err));
	return err;
}

static int open_tier(const struct gmem_driver_config *config, const struct options *options, struct gmem_device *tier)
{
	int err = gmem_copy_guard_init();

	strcpy(tier->tenant, options->tenant);
	tier->replicas = (unsigned)options->replicas;
	tier->timeout_ns = options->timeout_ms * 1000000;
	tier->capacity = options->capacity & ~(uint64_t)(GMEM_HUGE_BYTES - 1);
	tier->key_count = config->key_count;
	tier->quota.limit = UINT64_MAX;
	atomic_flag_clear(&tier->squeezing);
	tier->squeezed = malloc(GMEM_VALUE_SLOTS << GMEM_SHIFT_4K);
	tier->bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (!err && (!tier->squeezed || tier->bell < 0))
		err = -ENOMEM;
	if (!err)
		err = open_nodes(config, options, tier);
	if (!err)
		err = open_memory(config, tier);
	if (err)
		return err;
	err = -pthread_create(&tier->keeper, NULL, keeper_thread, tier);
	tier->keeper_runs = !err;
	return err ? err : try_it(config, tier);
}

static int remote_probe(const struct gmem_driver_config *config, struct gmem_device **ret)
{
	struct options options;
	struct gmem_device *tier;
	int err = read_options(config, &options);

	if (err)
		return err;
	tier = calloc(1, sizeof(*tier));
	if (!tier)
		return -ENOMEM;
	tier->bell = -1;
	tier->guard = options.guard == UNSET ? -1 : fcntl((int)options.guard, F_DUPFD_CLOEXEC, 3);
	err = open_tier(config, &options, tier);
	if (err)
		remote_remove(tier);
	else
		*ret = tier;
	return err;
}

const struct gmem_driver_ops gmem_remote_ops = {
	.abi = GMEM_DRIVER_ABI, .size = sizeof(struct gmem_driver_ops), .name = "remote",
	.probe = remote_probe, .remove = remote_remove, .info = remote_info, .health = remote_health,
	.last_error = remote_last_error, .peer_map = remote_peer_map, .peer_unmap = remote_peer_unmap,
	.peer_free = remote_peer_free, .peer_map_batch = remote_peer_map_batch,
	.peer_unmap_batch = remote_peer_unmap_batch, .peer_usage = remote_peer_usage,
};
