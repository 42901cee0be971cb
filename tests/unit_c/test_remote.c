/* SPDX-License-Identifier: Apache-2.0
 *
 * The remote tier: its parts by themselves, then the driver through its ops against a server that misbehaves: what it
 * keeps, what it believes, what it says, and what it asks again. tests/integration/test_remote.py has real servers.
 */
#define _GNU_SOURCE
#include "harness.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <gmem/stats.h>

#include "../../csrc/drivers/nodes.h"
#include "../../csrc/drivers/resp.h"
#include "../../csrc/drivers/values.h"
#include "fakeserver.h"
#include "tierops.h"

#define KEYS 65536
#define BATCH 64
#define EIGHT 8u
#define FOR_EVER "timeout_ms=3600000" /* longer than a test may take */

static uint8_t *memory; /* BATCH * 2 MiB */

/* ---- helpers ---- */

static int attach(const char *options, struct gmem_device **ret)
{
	return tier_attach(options, KEYS, NULL, ret);
}

static struct gmem_device *attached(const struct fake_server *server, const char *options)
{
	char text[256];

	snprintf(text, sizeof(text), "address=%s %s", server->address, options);
	return tier_attached(text, KEYS, NULL);
}

static void refused(const char *options, int err, const char *why)
{
	tier_refused(options, KEYS, err, why);
}

static void says(struct gmem_device *device, const char *why)
{
	tier_says("last_error", tier_ops->last_error(device), why);
}

static int push(struct gmem_device *device, uint64_t key, size_t bytes, uint64_t version)
{
	tier_fill(memory, bytes, key, version);
	return tier_ops->peer_map(device, key, memory, bytes);
}

static int pull(struct gmem_device *device, uint64_t key, size_t bytes, uint64_t version)
{
	int err;

	memset(memory, 0xaa, bytes);
	err = tier_ops->peer_unmap(device, key, memory, bytes);
	if (!err)
		CHECK(tier_is_filled(memory, bytes, key, version));
	return err;
}

/* count pages from first on, step apart. */
static void push_batch(struct gmem_device *device, uint64_t first, unsigned count, unsigned step, size_t bytes,
		       uint64_t version, int expected)
{
	struct gmem_peer_io io[BATCH];

	for (unsigned i = 0; i < count; i++) {
		io[i] = (struct gmem_peer_io){ first + i * step, memory + i * bytes, bytes, 99 };
		tier_fill(io[i].memory, bytes, io[i].key, version);
	}
	CHECK_EQ(tier_ops->peer_map_batch(device, io, count), 0);
	for (unsigned i = 0; i < count; i++)
		CHECK_EQ(io[i].result, expected);
}

static void pull_batch(struct gmem_device *device, uint64_t first, unsigned count, unsigned step, size_t bytes,
		       uint64_t version)
{
	struct gmem_peer_io io[BATCH];

	memset(memory, 0xaa, count * bytes);
	for (unsigned i = 0; i < count; i++)
		io[i] = (struct gmem_peer_io){ first + i * step, memory + i * bytes, bytes, 99 };
	CHECK_EQ(tier_ops->peer_unmap_batch(device, io, count), 0);
	for (unsigned i = 0; i < count; i++) {
		CHECK_EQ(io[i].result, 0);
		CHECK(tier_is_filled(io[i].memory, bytes, io[i].key, version));
	}
}

/* What nobody wants is dropped by a thread. */
static void becomes(struct fake_server *server, unsigned count)
{
	for (int i = 0; i < 500 && fake_count(server) != count; i++)
		usleep(10000);
	CHECK_EQ(fake_count(server), count);
}

/* It knows of that a moment after the server. */
static void stores(struct gmem_device *device, uint64_t bytes)
{
	for (int i = 0; i < 500 && tier_usage(device).stored_bytes != bytes; i++)
		usleep(10000);
	CHECK_EQ(tier_usage(device).stored_bytes, bytes);
}

/* ---- parts ---- */

static void parses(const char *text, ssize_t taken, enum gmem_resp_type type, int64_t number)
{
	struct gmem_resp reply;

	CHECK_EQ(gmem_resp_parse(text, strlen(text), &reply), taken);
	if (taken <= 0)
		return;
	CHECK_EQ(reply.type, type);
	CHECK_EQ(reply.number, number);
	for (size_t bytes = 0; bytes < (size_t)taken; bytes++) /* whatever is cut off has to come */
		CHECK_EQ(gmem_resp_parse(text, bytes, &reply), 0);
}

static void test_replies(void)
{
	static char text[3000];
	struct gmem_resp reply;

	parses("+OK\r\n", 5, GMEM_RESP_STATUS, 0);
	parses("-ERR unknown\r\n+", 14, GMEM_RESP_ERROR, 0);
	parses(":-12\r\n", 6, GMEM_RESP_INTEGER, -12);
	parses("$-1\r\n", 5, GMEM_RESP_BULK, -1);
	parses("$65536\r\nabc", 8, GMEM_RESP_BULK, 65536);
	parses("$-2\r\n", -EPROTO, 0, 0);
	parses("$99999999\r\n", -EPROTO, 0, 0);             /* more than anything that we ask for */
	parses(":99999999999999999999999\r\n", -EPROTO, 0, 0);
	parses(":\r\n", -EPROTO, 0, 0);
	parses(":1x\r\n", -EPROTO, 0, 0);
	parses("+OK\rx", -EPROTO, 0, 0);
	parses("*2\r\n", -EPROTO, 0, 0);
	parses("HTTP/1.1 400\r\n", -EPROTO, 0, 0);
	memset(text, 'x', sizeof(text) - 1);
	text[0] = '-';
	CHECK_EQ(gmem_resp_parse(text, sizeof(text) - 1, &reply), -EPROTO); /* an error without an end */
	srand(1);
	for (int i = 0; i < 200000; i++) { /* nothing makes it read beyond what there is (ASan looks) */
		size_t bytes = (size_t)(rand() % 40);
		char *exact = malloc(bytes + 1);

		for (size_t b = 0; b < bytes; b++)
			exact[b] = rand() % 2 ? "+-:$\r\n0129"[rand() % 10] : (char)rand();
		CHECK(gmem_resp_parse(exact, bytes, &reply) <= (ssize_t)bytes);
		free(exact);
	}
}

static enum gmem_resp_error means(const char *text, struct gmem_redirection *ret)
{
	return gmem_resp_error(text, strlen(text), ret);
}

static void test_errors_and_slots(void)
{
	struct gmem_redirection to;

	CHECK_EQ(means("MOVED 3999 127.0.0.1:6381", &to), GMEM_RESP_MOVED);
	CHECK(to.slot == 3999 && !strcmp(to.address, "127.0.0.1:6381"));
	CHECK_EQ(means("ASK 16383 :6381", &to), GMEM_RESP_ASK);
	CHECK_EQ(means("MOVED 16384 127.0.0.1:6381", &to), GMEM_RESP_REFUSED);
	CHECK_EQ(means("MOVED -1 127.0.0.1:6381", &to), GMEM_RESP_REFUSED);
	CHECK_EQ(means("MOVED 1", &to), GMEM_RESP_REFUSED);
	CHECK_EQ(means("MOVED 1 ", &to), GMEM_RESP_REFUSED);
	CHECK_EQ(means("OOM command not allowed when used memory > 'maxmemory'.", &to), GMEM_RESP_FULL);
	CHECK_EQ(means("LOADING Valkey is loading the dataset in memory", &to), GMEM_RESP_LATER);
	CHECK_EQ(means("CLUSTERDOWN Hash slot not served", &to), GMEM_RESP_LATER);
	CHECK_EQ(means("READONLY You can't write against a read only replica.", &to), GMEM_RESP_STALE);
	CHECK_EQ(means("NOAUTH Authentication required.", &to), GMEM_RESP_DENIED);
	CHECK_EQ(means("OOMPH", &to), GMEM_RESP_REFUSED);
	CHECK_EQ(gmem_resp_slot("123456789", 9), 0x31c3); /* the specification's example */
	CHECK_EQ(gmem_resp_slot("gmem:a:{t1:2}:3:4", 17), gmem_resp_slot("t1:2", 4));
	CHECK_EQ(gmem_resp_slot("{}x", 3), gmem_resp_slot("{}x", 3));
	CHECK(gmem_resp_slot("foo{}{bar}", 10) != gmem_resp_slot("bar", 3)); /* an empty tag is none */
}

static int map_of(struct gmem_nodes *nodes, int fd, const char *text)
{
	CHECK(send(fd, text, strlen(text), 0) == (ssize_t)strlen(text));
	return gmem_nodes_listen(nodes);
}

static void test_map(void)
{
	struct gmem_identity nobody = { .tls = NULL };
	struct gmem_redirection to = { .slot = 5, .address = "127.0.0.1:7002" };
	struct gmem_nodes nodes;
	char said[16];
	int pair[2];

	CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair));
	CHECK_EQ(gmem_nodes_init(&nodes, &nobody, NULL, pair[0], 1000000), 0);
	CHECK_EQ(gmem_nodes_listen(&nodes), -EAGAIN);
	CHECK_EQ(gmem_nodes_of_slot(&nodes, 0), GMEM_NODE_NONE);
	CHECK_EQ(map_of(&nodes, pair[1], "topology 2\nnode 127.0.0.1:7001 a\nnode [::1]:7002 b\nslots 0 8191 0\nslots 8192 16383 1\n"), 0);
	CHECK_EQ(gmem_nodes_of_slot(&nodes, 8191), 0);
	CHECK_EQ(gmem_nodes_of_slot(&nodes, 8192), 1);
	CHECK_EQ(map_of(&nodes, pair[1], "topology 1\nnode 127.0.0.1:7002 c\nslots 0 9 0\n"), 0);
	CHECK_EQ(gmem_nodes_of_slot(&nodes, 0), 2); /* numbers are not used again */
	CHECK_EQ(gmem_nodes_of_slot(&nodes, 10), GMEM_NODE_NONE);
	CHECK_EQ(gmem_nodes_redirect(&nodes, 0, &to, false), 2);
	CHECK_EQ(gmem_nodes_of_slot(&nodes, 5), 2);
	strcpy(to.address, ":7001"); /* another port of whoever says so */
	CHECK_EQ(gmem_nodes_redirect(&nodes, 2, &to, true), 0);
	CHECK_EQ(gmem_nodes_of_slot(&nodes, 5), 0);
	strcpy(to.address, "10.0.0.1:7001"); /* nobody whom we know */
	CHECK_EQ(gmem_nodes_redirect(&nodes, 0, &to, true), GMEM_NODE_NONE);
	CHECK_EQ(gmem_nodes_of_slot(&nodes, 5), 0);
	for (int i = 0; i < 9; i++) { /* dropped as a whole */
		static const char *const bad[] = {
			"", "topology 1\n", "topology 1\nnode localhost:1 a\n", "topology 300\n", "topology x\n",
			"topology 1\nnode 127.0.0.1:7009 a\nslots 0 16384 0\n", "topology 1\nnode 127.0.0.1:7009 a\nslots 0 1 1\n",
			"topology 1\nnode 127.0.0.1:7009 a\nslots 2 1 0\n", "topology 1\nnode 127.0.0.1:0 a\n",
		};

		if (*bad[i])
			CHECK_EQ(map_of(&nodes, pair[1], bad[i]), -EPROTO);
		CHECK_EQ(gmem_nodes_of_slot(&nodes, 5), 0);
	}
	gmem_nodes_stale(&nodes);
	gmem_nodes_stale(&nodes);
	CHECK_EQ(recv(pair[1], said, sizeof(said), MSG_DONTWAIT), 5);
	CHECK(!memcmp(said, "stale", 5));
	CHECK_EQ(recv(pair[1], said, sizeof(said), MSG_DONTWAIT), -1); /* not twice at once */
	close(pair[1]);
	CHECK_EQ(gmem_nodes_listen(&nodes), -EPIPE);
	gmem_nodes_deinit(&nodes);
}

/* ---- what is kept ---- */

static void test_round_trips(void)
{
	static const size_t sizes[] = { KIB4, KIB64, MIB2 };
	struct fake_server *server = fake_start();
	struct gmem_device *device = attached(server, "capacity=16M tenant=a.b-c_1");
	struct gmem_device_info info;

	CHECK_EQ(tier_ops->info(device, &info), 0);
	CHECK_EQ(info.capacity_bytes, 16 << 20);
	CHECK_EQ(info.caps, GMEM_CAP_PEER | GMEM_CAP_SLOW | GMEM_CAP_REMOTE);
	CHECK(info.bandwidth_bytes_per_s > 1 << 20 && info.latency_ns > 100);
	CHECK_EQ(fake_count(server), 0); /* what it tried with is gone */
	for (uint64_t version = 1; version < 4; version++) /* replaced */
		for (int s = 0; s < 3; s++) {
			CHECK_EQ(push(device, 10 + s, sizes[s], version), 0);
			CHECK_EQ(pull(device, 10 + s, sizes[s], version), 0);
			CHECK_EQ(pull(device, 10 + s, sizes[s], version), 0); /* it stays */
		}
	becomes(server, 3);
	CHECK(!strncmp(server->values->name, "gmem:a.b-c_1:{t", 15));
	CHECK_EQ(tier_usage(device).pages, 3);
	CHECK_EQ(tier_usage(device).page_bytes, KIB4 + KIB64 + MIB2);
	stores(device, KIB4 + KIB64 + MIB2);
	CHECK_EQ(pull(device, 10, KIB64, 0), -EINVAL); /* another size */
	CHECK_EQ(pull(device, 10, 5000, 0), -EINVAL);
	CHECK_EQ(push(device, KEYS, KIB4, 0), -EINVAL);
	CHECK_EQ(push(device, 1, 8192, 0), -EINVAL);
	CHECK_EQ(pull(device, 1, KIB4, 0), -ENOENT);
	for (int s = 0; s < 3; s++) {
		CHECK_EQ(tier_ops->peer_free(device, 10 + s, sizes[s]), 0);
		CHECK_EQ(tier_ops->peer_free(device, 10 + s, sizes[s]), -ENOENT);
		CHECK_EQ(pull(device, 10 + s, sizes[s], 0), -ENOENT);
	}
	becomes(server, 0);
	for (int i = 0; i < 8; i++) /* all of the capacity again */
		CHECK_EQ(push(device, i, MIB2, 1), 0);
	CHECK_EQ(push(device, 99, KIB4, 1), -ENOSPC);
	CHECK_EQ(tier_ops->peer_free(device, 3, MIB2), 0);
	CHECK_EQ(push(device, 99, KIB4, 1), 0); /* what is free has been dropped first */
	CHECK_EQ(tier_ops->health(device), 0);
	for (int i = 0; i < 8; i++)
		tier_ops->peer_free(device, i, MIB2);
	tier_ops->peer_free(device, 99, KIB4);
	tier_ops->remove(device);
	CHECK_EQ(fake_count(server), 0);
	fake_stop(server);
}

/* Pages of 4 KiB that leave together are one value; holes are closed when there are too many of them. */
static void test_groups(void)
{
	struct fake_server *server = fake_start();
	struct gmem_device *device = attached(server, "capacity=4M");
	unsigned before;

	push_batch(device, 0, 64, 3, KIB4, 1, 0);
	CHECK_EQ(fake_count(server), 4);
	pull_batch(device, 0, 64, 3, KIB4, 1);
	push_batch(device, 1000, 3, 1, KIB4, 1, 0);
	CHECK_EQ(fake_count(server), 5);
	for (unsigned i = 0; i < 64; i++)
		if (i % 16)
			CHECK_EQ(tier_ops->peer_free(device, 3 * i, KIB4), 0);
	CHECK_EQ(tier_usage(device).page_bytes, 7 * KIB4);
	CHECK_EQ(tier_usage(device).stored_bytes, 67 * KIB4);
	pull_batch(device, 0, 4, 48, KIB4, 1);
	for (unsigned i = 0; i < 15; i++) /* the rest of the capacity, but for one value: whoever is last makes room */
		push_batch(device, 2000 + 64 * i, 64, 1, KIB4, 2, 0);
	before = fake_count(server);
	CHECK(before <= 65);
	pull_batch(device, 0, 4, 48, KIB4, 1);
	pull_batch(device, 1000, 3, 1, KIB4, 1);
	for (unsigned i = 0; i < 15; i++)
		pull_batch(device, 2000 + 64 * i, 64, 1, KIB4, 2);
	push_batch(device, 1100, 32, 1, KIB4, 3, 0);
	pull_batch(device, 1100, 32, 1, KIB4, 3);
	tier_ops->remove(device);
	fake_stop(server);
}

static void test_batches_of_all_sizes(void)
{
	static const size_t sizes[] = { KIB4, KIB64, KIB4, MIB2, KIB4 };
	struct fake_server *server = fake_start();
	struct gmem_device *device = attached(server, "capacity=128M");
	struct gmem_peer_io io[BATCH + 1];

	for (unsigned i = 0; i < BATCH; i++) {
		io[i] = (struct gmem_peer_io){ 7 * i, memory + i * MIB2, sizes[i % 5], 99 };
		tier_fill(io[i].memory, io[i].bytes, io[i].key, 1);
	}
	io[BATCH] = (struct gmem_peer_io){ KEYS, memory, KIB4, 99 };
	CHECK_EQ(tier_ops->peer_map_batch(device, io, BATCH + 1), 0);
	CHECK_EQ(io[BATCH].result, -EINVAL);
	memset(memory, 0, BATCH * MIB2);
	for (unsigned i = 0; i < BATCH; i++) {
		CHECK_EQ(io[i].result, 0);
		io[i].result = 99;
	}
	CHECK_EQ(tier_ops->peer_unmap_batch(device, io, BATCH + 1), 0);
	for (unsigned i = 0; i < BATCH; i++) {
		CHECK_EQ(io[i].result, 0);
		CHECK(tier_is_filled(io[i].memory, io[i].bytes, io[i].key, 1));
	}
	CHECK_EQ(atomic_load(&server->connections), 1);
	tier_ops->remove(device);
	fake_stop(server);
}

/* A page that its owner has punched, or that can't be read, fails alone. */
__attribute__((unused)) static void test_memory_that_has_gone(void)
{
	struct fake_server *server = fake_start();
	struct gmem_device *device = attached(server, "capacity=16M");
	int fd = memfd_create("hole", MFD_CLOEXEC);
	uint8_t *hole = mmap(NULL, MIB2, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	struct gmem_peer_io io[] = { { 1, memory, KIB4, 99 }, { 2, hole, KIB4, 99 }, { 3, memory + KIB4, KIB4, 99 } };

	CHECK(hole != MAP_FAILED); /* a file of no length: SIGBUS */
	tier_fill(memory, KIB4, 1, 1);
	tier_fill(memory + KIB4, KIB4, 3, 1);
	CHECK_EQ(tier_ops->peer_map_batch(device, io, 3), 0);
	CHECK(io[0].result == 0 && io[1].result == -EFAULT && io[2].result == 0);
	CHECK_EQ(pull(device, 1, KIB4, 1), 0);
	CHECK_EQ(pull(device, 2, KIB4, 1), -ENOENT);
	CHECK_EQ(pull(device, 3, KIB4, 1), 0);
	CHECK_EQ(tier_ops->peer_unmap(device, 1, hole, KIB4), -EFAULT);
	CHECK_EQ(pull(device, 1, KIB4, 1), 0); /* the connection is still in step */
	CHECK_EQ(atomic_load(&server->connections), 1);
	tier_ops->remove(device);
	munmap(hole, MIB2);
	close(fd);
	fake_stop(server);
}

/* ---- servers that misbehave ---- */

static void test_errors_of_servers(void)
{
	struct fake_server *server = fake_start();
	struct gmem_device *device = attached(server, "capacity=16M timeout_ms=400");

	CHECK_EQ(push(device, 1, KIB64, 1), 0);
	fake_answer(server, "SET", "-OOM command not allowed when used memory > 'maxmemory'.\r\n", -1);
	CHECK_EQ(push(device, 1, KIB64, 2), -ENOSPC);
	says(device, "OOM");
	CHECK_EQ(tier_ops->health(device), 0); /* full is not lost */
	push_batch(device, 100, 64, 1, KIB4, 1, -ENOSPC);
	fake_answer(server, "SET", "", 0);
	CHECK_EQ(pull(device, 1, KIB64, 1), 0); /* the old one */
	fake_answer(server, "SET", "-LOADING Valkey is loading the dataset in memory\r\n", 3);
	CHECK_EQ(push(device, 1, KIB64, 3), 0);
	fake_answer(server, "GET", "-CLUSTERDOWN The cluster is down\r\n", 3);
	CHECK_EQ(pull(device, 1, KIB64, 3), 0);
	fake_answer(server, "GET", "-LOADING\r\n", -1);
	CHECK_EQ(pull(device, 1, KIB64, 3), -EIO);
	fake_answer(server, "GET", "-ERR something else\r\n", -1);
	CHECK_EQ(pull(device, 1, KIB64, 3), -EIO);
	says(device, "something else");
	fake_answer(server, "GET", "-NOPERM no permissions\r\n", -1);
	CHECK_EQ(pull(device, 1, KIB64, 3), -EIO);
	says(device, "NOPERM");
	fake_answer(server, "GET", "$-1\r\n", -1);
	CHECK_EQ(pull(device, 1, KIB64, 3), -EIO);
	says(device, "gone");
	fake_answer(server, "GET", "$5\r\nhello\r\n", -1);
	CHECK_EQ(pull(device, 1, KIB64, 3), -EBADMSG);
	fake_answer(server, "GET", "$5\r\nhello\r\n", 1); /* once, on the way */
	CHECK_EQ(pull(device, 1, KIB64, 3), 0);
	fake_answer(server, "SET", "-READONLY You can't write against a read only replica.\r\n", -1);
	CHECK_EQ(push(device, 1, KIB64, 4), -EIO);
	CHECK_EQ(tier_ops->health(device), -EIO);
	fake_answer(server, "SET", "", 0);
	usleep(1100000); /* once a second it is tried */
	CHECK_EQ(push(device, 1, KIB64, 4), 0);
	CHECK_EQ(tier_ops->health(device), 0);
	CHECK_EQ(pull(device, 1, KIB64, 4), 0);
	tier_ops->remove(device);
	fake_stop(server);
}

/* A batch of EIGHT pages, whose first few are to end otherwise than the rest; what has come is what it was. */
static void batch_ends(struct gmem_device *device, bool pushes, uint64_t first, size_t bytes, unsigned few, int expected)
{
	struct gmem_peer_io io[EIGHT];

	for (unsigned i = 0; i < EIGHT; i++) {
		io[i] = (struct gmem_peer_io){ first + i, memory + i * bytes, bytes, 99 };
		tier_fill(io[i].memory, bytes, pushes ? io[i].key : 0, 1);
	}
	CHECK_EQ((pushes ? tier_ops->peer_map_batch : tier_ops->peer_unmap_batch)(device, io, EIGHT), 0);
	for (unsigned i = 0; i < EIGHT; i++) {
		CHECK_EQ(io[i].result, i < few ? expected : 0);
		CHECK(pushes || io[i].result || tier_is_filled(io[i].memory, bytes, io[i].key, 1));
	}
}

/* Each kind of reply to the first few of a batch: each page has the result of its own reply, whatever came before it, and
 * the rest goes on over the same connection. What may be over soon is asked for again. */
static void test_replies_in_batches(void)
{
	static const struct {
		const char *answer;
		int put, get;
		bool breaks; /* it is no reply to that: the connection is closed, and all is asked for again */
	} kinds[] = {
		{ "-ERR something\r\n", -EIO, -EIO, false },
		{ "-NOPERM no permissions\r\n", -EIO, -EIO, false },
		{ "-NOAUTH Authentication required.\r\n", -EIO, -EIO, false },
		{ "-OOM command not allowed when used memory > 'maxmemory'.\r\n", -ENOSPC, -EIO, false },
		{ "-LOADING Valkey is loading the dataset in memory\r\n", 0, 0, false },
		{ "-CLUSTERDOWN Hash slot not served\r\n", 0, 0, false },
		{ "-TRYAGAIN Multiple keys request during rehashing of slot\r\n", 0, 0, false },
		{ "-MASTERDOWN Link with MASTER is down\r\n", 0, 0, false },
		{ "-READONLY You can't write against a read only replica.\r\n", 0, 0, false },
		{ "-MOVED 1 127.0.0.1:1\r\n", 0, 0, false }, /* to nobody whom we know */
		{ "-ASK 1 127.0.0.1:1\r\n", 0, 0, false },
		{ "-MOVED nonsense\r\n", -EIO, -EIO, false },
		{ "$-1\r\n", 0, -EIO, true },
		{ "*-1\r\n", 0, 0, true },
		{ "hello\r\n", 0, 0, true },
	};
	struct fake_server *server = fake_start();
	struct gmem_device *device = attached(server, "capacity=64M timeout_ms=5000");
	unsigned connections = 2; /* what has been replaced is dropped over another one, perhaps */

	for (unsigned i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
		uint64_t first = 1000 * (i + 1);
		bool get_breaks = kinds[i].breaks && !kinds[i].get;

		fake_answer(server, "SET", kinds[i].answer, kinds[i].breaks ? 1 : 3);
		batch_ends(device, true, first, KIB64, 3, kinds[i].put);
		fake_answer(server, NULL, "", 0);
		batch_ends(device, true, first, KIB64, 0, 0); /* what has failed is there now */
		fake_answer(server, "GET", kinds[i].answer, get_breaks ? 1 : 3);
		batch_ends(device, false, first, KIB64, 3, kinds[i].get);
		fake_answer(server, NULL, "", 0);
		batch_ends(device, false, first, KIB64, 0, 0);
		connections += 2u * kinds[i].breaks + 2u * get_breaks;
		CHECK(atomic_load(&server->connections) <= connections);
	}
	tier_ops->remove(device);
	fake_stop(server);
}

/* Those that are asked for again come to a connection that is still at work, which has had as many requests as it takes. */
static void test_a_full_batch_that_is_asked_for_again(void)
{
	struct fake_server *server = fake_start();
	struct gmem_device *device = attached(server, "capacity=160M timeout_ms=20000");

	fake_answer(server, "SET", "-LOADING Valkey is loading the dataset in memory\r\n", 20);
	push_batch(device, 0, BATCH, 1, MIB2, 1, 0);
	fake_answer(server, "GET", "-LOADING Valkey is loading the dataset in memory\r\n", 20);
	pull_batch(device, 0, BATCH, 1, MIB2, 1);
	tier_ops->remove(device);
	fake_stop(server);
}

static void test_rubbish(void)
{
	static const char *const rubbish[] = {
		"hello\r\n", "*1\r\n$1\r\nx\r\n", "$99999999999\r\n", ":1\r\n", "+OK\r\n+OK\r\n+OK\r\n", "\r\n", "-\r\n",
		"$70000\r\n", "+OK\r\n",
	};
	struct fake_server *server = fake_start();
	struct gmem_device *device = attached(server, "capacity=16M timeout_ms=5000");

	CHECK_EQ(push(device, 1, KIB64, 1), 0);
	for (unsigned i = 0; i < sizeof(rubbish) / sizeof(rubbish[0]); i++) {
		int err;

		fake_answer(server, "GET", rubbish[i], 1);
		err = pull(device, 1, KIB64, 1);
		CHECK(!err || (rubbish[i][0] == '-' && err == -EIO));
		fake_answer(server, "SET", rubbish[i], 1);
		err = push(device, 2, KIB64, i); /* +OK is what it says when it has stored it: it lies */
		CHECK(!err || err == -EIO);
		fake_answer(server, "", "", 0);
		usleep(err ? 1100000 : 0);
		CHECK_EQ(push(device, 2, KIB64, i + 1), 0);
		CHECK_EQ(pull(device, 2, KIB64, i + 1), 0);
	}
	tier_ops->remove(device);
	fake_stop(server);
}

static void test_damage(void)
{
	struct fake_server *server = fake_start();
	struct gmem_device *device = attached(server, "capacity=16M");

	CHECK_EQ(push(device, 1, KIB64, 1), 0);
	CHECK_EQ(push(device, 2, MIB2, 1), 0);
	push_batch(device, 100, 16, 1, KIB4, 1, 0);
	fake_damage(server);
	CHECK_EQ(pull(device, 1, KIB64, 1), -EBADMSG);
	says(device, "damaged");
	CHECK_EQ(pull(device, 2, MIB2, 1), -EBADMSG);
	CHECK_EQ(pull(device, 108, KIB4, 1), -EBADMSG); /* the middle of the value */
	CHECK_EQ(pull(device, 107, KIB4, 1), 0);        /* its neighbours are sound */
	fake_damage(server);
	CHECK_EQ(pull(device, 2, MIB2, 1), 0);
	fake_forget(server);
	CHECK_EQ(pull(device, 2, MIB2, 1), -EIO);
	CHECK_EQ(pull(device, 107, KIB4, 1), -EIO);
	tier_ops->remove(device);
	fake_stop(server);
}

static void test_connections_that_break(void)
{
	struct fake_server *server = fake_start();
	struct gmem_device *device = attached(server, "capacity=16M timeout_ms=1000");

	CHECK_EQ(push(device, 1, MIB2, 1), 0);
	atomic_store(&server->cut, 3);
	CHECK_EQ(pull(device, 1, MIB2, 1), 0);
	CHECK(atomic_load(&server->connections) >= 4);
	atomic_store(&server->hang, 2); /* no answer, and no end of the connection */
	CHECK_EQ(pull(device, 1, MIB2, 1), 0);
	atomic_store(&server->hang, 1);
	CHECK_EQ(push(device, 1, MIB2, 2), 0);
	CHECK_EQ(pull(device, 1, MIB2, 2), 0);
	atomic_store(&server->refuses, true);
	fake_answer(server, NULL, "+", 1); /* breaks the one that is open */
	CHECK_EQ(pull(device, 1, MIB2, 2), -EIO);
	CHECK_EQ(push(device, 1, MIB2, 3), -EIO);
	CHECK_EQ(tier_ops->health(device), -EIO);
	CHECK_EQ(push(device, 1, MIB2, 3), -EIO); /* at once: it is known to be lost */
	atomic_store(&server->refuses, false);
	fake_answer(server, NULL, "", 0);
	CHECK_EQ(pull(device, 1, MIB2, 2), 0); /* the old one: nothing has changed */
	tier_ops->remove(device);
	fake_stop(server);
}

static void test_replicas(void)
{
	struct fake_server *server = fake_start();
	struct gmem_device *device;
	char text[128];

	snprintf(text, sizeof(text), "address=%s replicas=2 timeout_ms=300", server->address);
	atomic_store(&server->replicas, 1);
	refused(text, -ENODATA, "replicas: fewer than 2");
	atomic_store(&server->replicas, 2);
	CHECK_EQ(attach(text, &device), 0);
	CHECK_EQ(push(device, 1, KIB64, 1), 0);
	push_batch(device, 100, 64, 1, KIB4, 1, 0);
	CHECK(atomic_load(&server->waits) >= 3);
	atomic_store(&server->replicas, 0); /* nobody knows: the page stays, and so does the old one */
	CHECK_EQ(push(device, 1, KIB64, 2), -EIO);
	says(device, "fewer than 2 replicas");
	CHECK_EQ(pull(device, 1, KIB64, 1), 0);
	usleep(1100000);
	push_batch(device, 100, 64, 1, KIB4, 2, -EIO);
	pull_batch(device, 100, 64, 1, KIB4, 1);
	atomic_store(&server->replicas, 5);
	usleep(1100000);
	CHECK_EQ(push(device, 1, KIB64, 3), 0);
	CHECK_EQ(pull(device, 1, KIB64, 3), 0);
	becomes(server, 5); /* what was not confirmed is dropped */
	tier_ops->remove(device);
	fake_stop(server);
}

static void test_passwords(void)
{
	struct fake_server *server = fake_start();
	struct gmem_device *device;
	char path[] = "/tmp/gmem-test-secret-XXXXXX", text[256];
	int fd = mkstemp(path);

	CHECK(fd >= 0);
	CHECK_EQ(write(fd, "wrong\n", 6), 6);
	atomic_store(&server->password, "right");
	snprintf(text, sizeof(text), "address=%s " FOR_EVER, server->address);
	refused(text, -EACCES, "NOAUTH");
	snprintf(text, sizeof(text), "address=%s " FOR_EVER " user=u password_file=%s", server->address, path);
	refused(text, -EACCES, "refuses user or password");
	CHECK(!strstr(tier_message, "wrong\n"));
	snprintf(text, sizeof(text), "address=%s timeout_ms=1500 user=u password_file=%s", server->address, path);
	CHECK_EQ(pwrite(fd, "right\n", 6, 0), 6);
	CHECK_EQ(attach(text, &device), 0);
	CHECK_EQ(push(device, 1, KIB64, 1), 0);
	CHECK_EQ(pull(device, 1, KIB64, 1), 0);
	atomic_store(&server->password, "other"); /* it is changed, on both sides: the file is read again */
	CHECK_EQ(pwrite(fd, "other\n", 6, 0), 6);
	fake_answer(server, NULL, "rubbish\r\n", 1);
	CHECK_EQ(pull(device, 1, KIB64, 1), 0);
	CHECK_EQ(atomic_load(&server->auths) >= 2, 1);
	tier_ops->remove(device);
	CHECK(!unlink(path));
	snprintf(text, sizeof(text), "address=%s " FOR_EVER " password_file=%s", server->address, path);
	refused(text, -EACCES, "password_file: can't be read");
	close(fd);
	fake_stop(server);
}

struct teller {
	int fd;
	char text[256];
};

static void *tell_when_asked(void *arg)
{
	struct teller *teller = arg;
	char asked[16];

	CHECK_EQ(recv(teller->fd, asked, sizeof(asked), 0), 5);
	CHECK(send(teller->fd, teller->text, strlen(teller->text), 0) > 0);
	return NULL;
}

/* Tells the map, and pushes until something has gone to that server by it. */
static void map_to(struct gmem_device *device, int control, const char *map, struct fake_server *server)
{
	unsigned before = atomic_load(&server->sets);

	CHECK(send(control, map, strlen(map), 0) > 0);
	for (int i = 0; i < 500 && atomic_load(&server->sets) == before; i++, usleep(10000))
		CHECK_EQ(push(device, 1, KIB64, 2), 0);
	CHECK(atomic_load(&server->sets) > before);
}

/* Half of a batch is somewhere else, this once; then all of it, for good. */
static void redirected_batches(struct gmem_device *device, struct fake_server *one, struct fake_server *two, int control,
			       uint64_t first, size_t bytes)
{
	unsigned sets, gets, askings = atomic_load(&two->askings), connections = atomic_load(&two->connections);
	char map[256], moved[96];

	snprintf(map, sizeof(map), "topology 2\nnode %s one\nnode %s two\nslots 0 16383 0\n", one->address, two->address);
	map_to(device, control, map, one);
	snprintf(moved, sizeof(moved), "-ASK @ %s\r\n", two->address);
	sets = atomic_load(&two->sets);
	gets = atomic_load(&two->gets);
	fake_answer(one, "SET", moved, 4);
	batch_ends(device, true, first, bytes, 0, 0);
	CHECK_EQ(atomic_load(&two->sets), sets + 4);
	fake_answer(one, "GET", moved, 4);
	batch_ends(device, false, first, bytes, 0, 0);
	CHECK_EQ(atomic_load(&two->gets), gets + 4);
	CHECK_EQ(atomic_load(&two->askings), askings + 8);
	CHECK_EQ(atomic_load(&two->connections), connections);
	snprintf(moved, sizeof(moved), "-MOVED @ %s\r\n", two->address);
	sets = atomic_load(&two->sets);
	fake_answer(one, "SET", moved, -1);
	batch_ends(device, true, first + EIGHT, bytes, 0, 0);
	CHECK_EQ(atomic_load(&two->sets), sets + EIGHT);
	fake_answer(one, NULL, "", 0);
	map_to(device, control, map, one); /* the old one once more */
	gets = atomic_load(&two->gets);
	fake_answer(one, "GET", moved, -1);
	batch_ends(device, false, first + EIGHT, bytes, 0, 0);
	CHECK_EQ(atomic_load(&two->gets), gets + EIGHT);
	fake_answer(one, NULL, "", 0);
}

/* A tier on two servers, of which the first has all slots; the other end of its control. */
static int attach_two(const struct fake_server *one, const struct fake_server *two, const char *options,
		      struct gmem_device **ret)
{
	char text[512];
	int pair[2];

	CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair));
	snprintf(text, sizeof(text), "topology 2\nnode %s one\nnode %s two\nslots 0 16383 0\n", one->address, two->address);
	CHECK(send(pair[1], text, strlen(text), 0) > 0);
	snprintf(text, sizeof(text), "control=%d %s", pair[0], options);
	CHECK_EQ(attach(text, ret), 0);
	close(pair[0]);
	return pair[1];
}

/* Answers to one page and to the ASKING before the next come together, while that one is still on its way. */
static void test_asking_that_is_answered_early(void)
{
	struct fake_server *one = fake_start(), *two = fake_start();
	struct gmem_device *device;
	char moved[96];
	int control;

	control = attach_two(one, two, "timeout_ms=10000 capacity=64M", &device);
	atomic_store(&two->corks, true);
	snprintf(moved, sizeof(moved), "-ASK @ %s\r\n", two->address);
	fake_answer(one, "SET", moved, 4);
	batch_ends(device, true, 0, MIB2, 0, 0);
	CHECK_EQ(atomic_load(&two->sets), 4);
	CHECK_EQ(atomic_load(&two->connections), 1);
	fake_answer(one, NULL, "", 0);
	tier_ops->remove(device);
	close(control);
	fake_stop(one);
	fake_stop(two);
}

/* What one server's replica has is no word for what another one has, whoever was asked first. */
static void test_replicas_of_another_server(void)
{
	struct fake_server *one = fake_start(), *two = fake_start();
	struct gmem_device *device;
	char moved[96];
	int control;

	atomic_store(&one->replicas, 1);
	control = attach_two(one, two, "timeout_ms=500 replicas=1 capacity=64M", &device);
	snprintf(moved, sizeof(moved), "-ASK @ %s\r\n", two->address);
	fake_answer(one, "SET", moved, 4);
	batch_ends(device, true, 0, KIB64, 4, -EIO);
	says(device, "fewer than 1 replicas");
	fake_answer(one, NULL, "", 0);
	usleep(1100000); /* once a second it is tried */
	batch_ends(device, true, 0, KIB64, 0, 0);
	tier_ops->remove(device);
	close(control);
	fake_stop(one);
	fake_stop(two);
}

/* Two servers, and a map that is told by somebody who is asked for it. */
static void test_redirections(void)
{
	struct fake_server *one = fake_start(), *two = fake_start();
	struct gmem_device *device;
	struct teller teller;
	pthread_t thread;
	char ask[96], moved[96]; /* what a server answers is its own until the end */
	int control;

	control = attach_two(one, two, "timeout_ms=3000 capacity=256M", &device);
	CHECK_EQ(push(device, 1, KIB64, 1), 0);
	CHECK_EQ(fake_count(two), 0);
	/* this once, and the key is there already */
	snprintf(ask, sizeof(ask), "-ASK 1 %s\r\n", two->address);
	fake_answer(one, "SET", ask, 1);
	CHECK_EQ(push(device, 2, KIB64, 1), 0);
	CHECK(fake_count(one) == 1 && fake_count(two) == 1 && atomic_load(&two->askings) == 1);
	fake_answer(one, "GET", ask, 1);
	CHECK_EQ(pull(device, 2, KIB64, 1), 0);
	/* for good: somebody is asked for a map, and tells it */
	snprintf(moved, sizeof(moved), "-MOVED 1 %s\r\n", two->address);
	fake_answer(one, "SET", moved, -1);
	snprintf(teller.text, sizeof(teller.text), "topology 2\nnode %s one\nnode %s two\nslots 0 16383 1\n", one->address,
		 two->address);
	teller.fd = control;
	CHECK(!pthread_create(&thread, NULL, tell_when_asked, &teller));
	push_batch(device, 1000, 64, 1, KIB4, 1, 0);
	pthread_join(thread, NULL);
	fake_answer(one, "SET", "", 0);
	CHECK_EQ(fake_count(two), 5);
	pull_batch(device, 1000, 64, 1, KIB4, 1);
	redirected_batches(device, one, two, control, 6400, KIB64);
	redirected_batches(device, one, two, control, 12800, MIB2);
	/* a server that nobody has named is not believed */
	fake_answer(two, "GET", "-MOVED 1 127.0.0.1:1\r\n", 2);
	CHECK_EQ(push(device, 3, KIB64, 1), 0);
	CHECK_EQ(pull(device, 3, KIB64, 1), 0);
	tier_ops->remove(device);
	close(control);
	fake_stop(one);
	fake_stop(two);
}

static void test_refusals(void)
{
	refused("capacity=16M", -EINVAL, "address");
	refused("address=localhost:1", -EINVAL, "address: IP:PORT");
	refused("address=unix:relative", -EINVAL, "address: IP:PORT");
	refused("address=127.0.0.1:70000", -EINVAL, "address: IP:PORT");
	refused("address=127.0.0.1:1 nope=1", -EINVAL, "nope: no such option");
	refused("address=127.0.0.1:1 tenant=a:b", -EINVAL, "tenant");
	refused("address=127.0.0.1:1 tenant={x}", -EINVAL, "tenant");
	refused("address=127.0.0.1:1 capacity=1", -EINVAL, "capacity");
	refused("address=127.0.0.1:1 replicas=9", -EINVAL, "replicas");
	refused("address=127.0.0.1:1 timeout_ms=1", -EINVAL, "timeout_ms");
	refused("address=127.0.0.1:1 user=x", -EINVAL, "password_file");
	refused("address=127.0.0.1:1 password_file=secret", -EINVAL, "absolute");
	refused("control=9999", -EBADF, "control");
	refused("address=127.0.0.1:1 " FOR_EVER, -ECONNREFUSED, "127.0.0.1:1");
	refused("address=unix:/nowhere/at/all " FOR_EVER, -EIO, "/nowhere");
}

/* An attach that a server refuses is over at once, and says why, however long servers may take. Pages wait instead. */
static void test_refused_at_once(void)
{
	static const struct {
		const char *word, *answer, *why;
		int err;
	} refusals[] = {
		{ "SET", "-NOPERM this user has no permissions to run the 'set' command\r\n", "NOPERM", -EACCES },
		{ "SET", "-ERR syntax error\r\n", "syntax error", -EIO },
		{ "SET", "-OOM command not allowed when used memory > 'maxmemory'.\r\n", "the server is full", -ENOSPC },
		{ "WAIT", "-NOPERM this user has no permissions to run the 'wait' command\r\n", "'wait'", -EACCES },
		{ "WAIT", "-ERR unknown command 'WAIT'\r\n", "unknown command", -EACCES },
		{ "GET", "-NOPERM this user has no permissions to run the 'get' command\r\n", "'get'", -EACCES },
		{ "SET", "HTTP/1.1 400 Bad Request\r\n", "is no reply", -EPROTO },
	};
	struct fake_server *server = fake_start();
	struct gmem_device *device;
	char text[128];

	atomic_store(&server->replicas, 1);
	snprintf(text, sizeof(text), "address=%s replicas=1 " FOR_EVER, server->address);
	for (unsigned i = 0; i < sizeof(refusals) / sizeof(refusals[0]); i++) {
		fake_answer(server, refusals[i].word, refusals[i].answer, -1);
		refused(text, refusals[i].err, refusals[i].why);
	}
	fake_answer(server, NULL, "", 0);
	atomic_store(&server->refuses, true); /* closes each connection */
	refused(text, -ECONNRESET, server->address);
	atomic_store(&server->refuses, false);
	fake_forget(server);
	snprintf(text, sizeof(text), "address=%s replicas=1 timeout_ms=400", server->address);
	CHECK_EQ(attach(text, &device), 0);
	fake_answer(server, "WAIT", refusals[3].answer, -1); /* later it is as if nobody answered */
	CHECK_EQ(push(device, 1, KIB64, 1), -EIO);
	says(device, "'wait'");
	fake_answer(server, NULL, "", 0);
	usleep(1100000); /* once a second it is tried */
	CHECK_EQ(push(device, 1, KIB64, 1), 0);
	tier_ops->remove(device);
	fake_stop(server);
}

/* ---- many threads ---- */

struct hammer {
	struct gmem_device *device;
	unsigned number;
};

static void *hammer_thread(void *arg)
{
	struct hammer *hammer = arg;
	static const size_t sizes[] = { KIB4, KIB4, KIB4, KIB64, MIB2 };
	enum { OWN = 96 };
	uint64_t versions[OWN] = { 0 }, size_of[OWN] = { 0 };
	uint8_t *page = malloc(16 * MIB2);
	unsigned seed = hammer->number;

	for (int round = 0; round < 1500; round++) {
		struct gmem_peer_io io[16];
		unsigned count = 1 + (unsigned)rand_r(&seed) % 16, used = 0, first = (unsigned)rand_r(&seed) % OWN;
		size_t bytes = sizes[rand_r(&seed) % 5];
		bool pushes = rand_r(&seed) % 2;

		for (unsigned i = 0; i < (bytes == MIB2 ? 1 : count); i++) {
			unsigned n = (first + i * 5) % OWN;
			uint64_t key = hammer->number * OWN + n;

			if (rand_r(&seed) % 8 == 0) {
				CHECK_EQ(tier_ops->peer_free(hammer->device, key, 0), versions[n] ? 0 : -ENOENT);
				versions[n] = 0;
			} else if (pushes) {
				versions[n] = (uint64_t)round + 1;
				size_of[n] = bytes;
				io[used] = (struct gmem_peer_io){ key, page + used * MIB2, bytes, 99 };
				tier_fill(io[used++].memory, bytes, key, versions[n]);
			} else if (versions[n]) {
				io[used] = (struct gmem_peer_io){ key, page + used * MIB2, size_of[n], 99 };
				used++;
			}
		}
		CHECK_EQ((pushes ? tier_ops->peer_map_batch : tier_ops->peer_unmap_batch)(hammer->device, io, used), 0);
		for (unsigned i = 0; i < used; i++) {
			unsigned n = (unsigned)(io[i].key % OWN);

			CHECK_EQ(io[i].result, 0);
			if (!pushes)
				CHECK(tier_is_filled(io[i].memory, io[i].bytes, io[i].key, versions[n]));
		}
	}
	for (unsigned n = 0; n < OWN; n++)
		if (versions[n])
			CHECK_EQ(tier_ops->peer_free(hammer->device, hammer->number * OWN + n, 0), 0);
	free(page);
	return NULL;
}

static void test_hammer(void)
{
	enum { THREADS = 4 };
	struct fake_server *server = fake_start();
	struct gmem_device *device = attached(server, "capacity=1G");
	struct hammer hammers[THREADS];
	pthread_t threads[THREADS];

	for (unsigned t = 0; t < THREADS; t++) {
		hammers[t] = (struct hammer){ device, t };
		CHECK(!pthread_create(&threads[t], NULL, hammer_thread, &hammers[t]));
	}
	for (unsigned t = 0; t < THREADS; t++)
		pthread_join(threads[t], NULL);
	CHECK_EQ(tier_usage(device).pages, 0);
	becomes(server, 0);
	stores(device, 0);
	tier_ops->remove(device);
	fake_stop(server);
}

#define RUN(test)                                                                                                      \
	do {                                                                                                           \
		uint64_t begin_ = gmem_now_ns();                                                                       \
		test();                                                                                                \
		printf("%6.2f s " #test "\n", (double)(gmem_now_ns() - begin_) / 1e9);                                 \
	} while (0)

int main(void)
{
	tier_ops = gmem_driver_builtin("remote");
	CHECK(tier_ops);
	memory = mmap(NULL, BATCH * MIB2, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(memory != MAP_FAILED);
	RUN(test_replies);
	RUN(test_errors_and_slots);
	RUN(test_map);
	RUN(test_refusals);
	RUN(test_refused_at_once);
	RUN(test_round_trips);
	RUN(test_groups);
	RUN(test_batches_of_all_sizes);
#ifndef __SANITIZE_THREAD__ /* see test_parts.c */
	RUN(test_memory_that_has_gone);
#endif
	RUN(test_errors_of_servers);
	RUN(test_replies_in_batches);
	RUN(test_a_full_batch_that_is_asked_for_again);
	RUN(test_rubbish);
	RUN(test_damage);
	RUN(test_connections_that_break);
	RUN(test_replicas);
	RUN(test_passwords);
	RUN(test_redirections);
	RUN(test_asking_that_is_answered_early);
	RUN(test_replicas_of_another_server);
	RUN(test_hammer);
	puts("ok");
	return 0;
}
