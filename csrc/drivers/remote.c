/* SPDX-License-Identifier: Apache-2.0
 *
 * remote: a tier whose pages are values of a Valkey or Redis server, or of a cluster of them. What it is asked and what
 * it says is here; remotepages.h is the pages, values.h what is stored, nodes.h where servers are, exchange.h how they are
 * spoken to.
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

#include <gmem/memfd.h>
#include <gmem/stats.h>

#include "remotepages.h"

#define TIMEOUT_DEFAULT_MS 15000
#define TIMEOUT_MAX_MS 3600000
#define REPLICAS_MAX 8
#define CAPACITY_MIN (4ull << 20)
#define CAPACITY_MAX (8ull << 40)
#define PATIENCE_MIN_NS 200000000ull
#define PATIENCE_MAX_NS 2000000000ull
#define SWEEP_MS 1000
#define GATHER_MS 30
#define FAREWELL_NS 2000000000ull
#define MEASURE_READS 8

static int refuse(const struct gmem_driver_config *config, int err, const char *why)
{
	snprintf(config->message, GMEM_MESSAGE_MAX, "%s", why);
	return err;
}

/* ---- pages ---- */

static int remote_peer_map_batch(struct gmem_device *tier, struct gmem_peer_io *io, size_t count)
{
	gmem_remote_push(tier, io, count);
	return 0;
}

static int remote_peer_unmap_batch(struct gmem_device *tier, struct gmem_peer_io *io, size_t count)
{
	gmem_remote_pull(tier, io, count);
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

static int remote_peer_free(struct gmem_device *tier, uint64_t key, size_t bytes)
{
	(void)bytes;
	return gmem_remote_free(tier, key);
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
		if (fds[0].revents && !atomic_load(&tier->stop)) {
			poll(fds + 1, 1, GATHER_MS); /* there will be more of them, and together they cost less */
			(void)!read(tier->bell, &rings, sizeof(rings));
		}
		while (!atomic_load(&tier->stop) && gmem_remote_sweep(tier, tier->nodes.connect_ns))
			more = true;
		if (!atomic_load(&tier->stop) && is_sparse(tier))
			more |= gmem_remote_squeeze(tier);
		if (more)
			gmem_remote_ring(tier); /* look again, but hear first */
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
		gmem_remote_ring(tier);
		pthread_join(tier->keeper, NULL);
		while (gmem_now_ns() < end && gmem_remote_sweep(tier, FAREWELL_NS))
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
	gmem_tls_destroy(tier->tls);
	free(tier);
}

/* ---- probe ---- */

struct options {
	const char *tenant, *user, *password_file, *address, *verify;
	struct gmem_tls_options tls;
	uint64_t with_tls, capacity, replicas, timeout_ms, control, guard;
};

#define UNSET UINT64_MAX

static bool is_tenant(const char *text)
{
	size_t bytes = strlen(text);

	for (size_t i = 0; i < bytes; i++)
		if (!isalnum((unsigned char)text[i]) && text[i] != '-' && text[i] != '_' && text[i] != '.')
			return false;
	return bytes && bytes <= GMEM_TENANT_MAX;
}

static int read_options(const struct gmem_driver_config *config, struct options *ret)
{
	const struct gmem_driver_option known[] = {
		{ "tenant", NULL, false, &ret->tenant }, { "capacity", &ret->capacity, false, NULL },
		{ "replicas", &ret->replicas, false, NULL }, { "timeout_ms", &ret->timeout_ms, false, NULL },
		{ "user", NULL, false, &ret->user }, { "password_file", NULL, false, &ret->password_file },
		{ "address", NULL, false, &ret->address }, { "control", &ret->control, false, NULL },
		{ "guard", &ret->guard, false, NULL }, { "tls", &ret->with_tls, true, NULL },
		{ "tls_ca_file", NULL, false, &ret->tls.ca_file }, { "tls_cert_file", NULL, false, &ret->tls.cert_file },
		{ "tls_key_file", NULL, false, &ret->tls.key_file },
		{ "tls_server_name", NULL, false, &ret->tls.server_name }, { "tls_verify", NULL, false, &ret->verify },
	};
	int err;

	*ret = (struct options){ .tenant = "default", .user = "", .password_file = "", .verify = "full",
				 .tls = { "", "", "", "", GMEM_TLS_FULL }, .capacity = 1ull << 30,
				 .timeout_ms = TIMEOUT_DEFAULT_MS, .control = UNSET, .guard = UNSET };
	err = gmem_driver_options(config, known, sizeof(known) / sizeof(known[0]));
	if (err)
		return err;
	if (gmem_tls_verify_parse(ret->verify, &ret->tls.verify))
		return refuse(config, -EINVAL, "tls_verify: full, ca or none");
	for (size_t i = 0; !ret->with_tls && i < config->count; i++)
		if (!strncmp(config->keys[i], "tls_", 4))
			return refuse(config, -EINVAL, "tls_...: needs tls=on");
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
	int control = -1, err = 0;

	if ((size_t)snprintf(identity.user, sizeof(identity.user), "%s", options->user) >= sizeof(identity.user))
		return refuse(config, -EINVAL, "user: too long");
	if ((size_t)snprintf(identity.password_file, sizeof(identity.password_file), "%s", options->password_file) >=
	    sizeof(identity.password_file))
		return refuse(config, -EINVAL, "password_file: too long");
	if (options->address && gmem_address_parse(options->address, NULL, &address))
		return refuse(config, -EINVAL, "address: IP:PORT, [IP6]:PORT or unix:/PATH");
	if (options->with_tls)
		err = gmem_tls_create(&options->tls, config->message, &tier->tls);
	if (err)
		return err;
	identity.tls = tier->tls;
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

		err = word & 1 ? gmem_values_claim(&tier->values, gmem_remote_value(word), gmem_remote_slot(word), key) : -EPROTO;
		atomic_fetch_add(&tier->pages, 1);
		atomic_fetch_add(&tier->page_bytes, gmem_remote_page_bytes(word));
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
		snprintf(tier->object, sizeof(tier->object), "%016llx", (unsigned long long)tier->values.header->object);
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
	struct gmem_exchange x = { &tier->nodes, tier->replicas, gmem_now_ns() + tier->timeout_ns, true };

	gmem_request_name(&request, tier->tenant, "t", tier->object, UINT64_MAX, 0, 0); /* there is no such extent */
	gmem_exchange(&x, &request, 1); /* who attaches is told why, and need not wait for what was refused */
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
	return err == -ENOENT ? -EIO : err; /* there is such a driver */
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
	.pool_put = gmem_remote_pool_put, .pool_get = gmem_remote_pool_get, .pool_drop = gmem_remote_pool_drop,
};
