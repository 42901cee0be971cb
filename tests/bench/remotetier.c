/* SPDX-License-Identifier: Apache-2.0
 *
 * The remote tier's driver beside bare sockets (sendmsg and recv straight to and from the page, no checksum, no index) that
 * do the same to the server: a new value for each page, under a name of the same form, and the old one dropped. With one
 * server on loopback that GMEM_BENCH_VALKEY names. The driver checks everything.
 */
#define _GNU_SOURCE
#include "bench.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <gmem/driver.h>

#define REPETITIONS 7
#define BATCH 32
#define ROUND_NS 120000000ull

struct shape {
	const char *name;
	uint64_t page_bytes;
	size_t batch;
};

static const struct shape shapes[] = {
	{ "4k", 4 * KIB, 1 }, { "64k", 64 * KIB, 1 }, { "2m", HUGE_BYTES, 1 },
	{ "4k_32", 4 * KIB, 32 }, { "64k_32", 64 * KIB, 32 }, { "2m_8", HUGE_BYTES, 8 },
};

static const struct gmem_driver_ops *ops;
static uint8_t *memory;
static int bare, port;
static unsigned bare_version; /* of the values that are there */

#define NAME "gmem:default:{t0123456789abcdef:0}:%02zu:%07u"
#define NAME_BYTES "45"
static pid_t server;

/* ---- bare sockets ---- */

static void send_vectors(struct iovec *vectors, size_t count)
{
	struct msghdr message = { .msg_iov = vectors, .msg_iovlen = count };

	while (message.msg_iovlen) {
		ssize_t n = sendmsg(bare, &message, MSG_NOSIGNAL);

		CHECK(n > 0);
		while (message.msg_iovlen && (size_t)n >= message.msg_iov->iov_len) {
			n -= (ssize_t)message.msg_iov->iov_len;
			message.msg_iov++;
			message.msg_iovlen--;
		}
		if (message.msg_iovlen) {
			message.msg_iov->iov_base = (char *)message.msg_iov->iov_base + n;
			message.msg_iov->iov_len -= (size_t)n;
		}
	}
}

static void receive(void *at, size_t bytes)
{
	CHECK_EQ(recv(bare, at, bytes, MSG_WAITALL), (ssize_t)bytes);
}

static void bare_put(const struct shape *shape)
{
	static char heads[BATCH][128], tails[BATCH][96], answer[9 * BATCH];
	static unsigned version = 1;
	struct iovec vectors[3 * BATCH];

	for (size_t i = 0; i < shape->batch; i++) {
		int head = snprintf(heads[i], sizeof(heads[i]), "*3\r\n$3\r\nSET\r\n$" NAME_BYTES "\r\n" NAME "\r\n$%lu\r\n", i,
				    version, shape->page_bytes);
		int tail = snprintf(tails[i], sizeof(tails[i]), "\r\n*2\r\n$6\r\nUNLINK\r\n$" NAME_BYTES "\r\n" NAME "\r\n", i,
				    version - 1);

		vectors[3 * i] = (struct iovec){ heads[i], (size_t)head };
		vectors[3 * i + 1] = (struct iovec){ memory + i * shape->page_bytes, shape->page_bytes };
		vectors[3 * i + 2] = (struct iovec){ tails[i], (size_t)tail };
	}
	send_vectors(vectors, 3 * shape->batch);
	receive(answer, 9 * shape->batch);
	CHECK(!memcmp(answer, "+OK\r\n:", 6));
	bare_version = version;
	version++;
}

static void bare_get(const struct shape *shape)
{
	static char commands[BATCH * 80];
	struct iovec vector = { commands, 0 };
	char head[16], end[2];
	int digits = snprintf(head, sizeof(head), "$%lu\r\n", shape->page_bytes);

	for (size_t i = 0; i < shape->batch; i++)
		vector.iov_len += (size_t)sprintf(commands + vector.iov_len, "*2\r\n$3\r\nGET\r\n$" NAME_BYTES "\r\n" NAME "\r\n", i,
						  bare_version);
	send_vectors(&vector, 1);
	for (size_t i = 0; i < shape->batch; i++) {
		receive(head, (size_t)digits);
		receive(memory + i * shape->page_bytes, shape->page_bytes);
		receive(end, 2);
	}
}

/* ---- the driver ---- */

static void tier_do(struct gmem_device *device, const struct shape *shape, bool write)
{
	struct gmem_peer_io io[BATCH];

	for (size_t i = 0; i < shape->batch; i++)
		io[i] = (struct gmem_peer_io){ i, memory + i * shape->page_bytes, shape->page_bytes, 0 };
	CHECK_EQ((write ? ops->peer_map_batch : ops->peer_unmap_batch)(device, io, shape->batch), 0);
	for (size_t i = 0; i < shape->batch; i++)
		CHECK_EQ(io[i].result, 0);
}

static void bare_do(const struct shape *shape, bool write)
{
	if (write)
		bare_put(shape);
	else
		bare_get(shape);
}

/* ---- rows ---- */

/* In turns, a few at a time, so that both have the same neighbours. */
static void measure(struct gmem_device *device, const struct shape *shape, bool write, struct times *tier, struct times *floor)
{
	uint64_t end = now_ns() + ROUND_NS;

	while (now_ns() < end)
		for (int which = 0; which < 2; which++)
			for (int i = 0; i < 4; i++) {
				uint64_t begin = now_ns();

				if (which)
					bare_do(shape, write);
				else
					tier_do(device, shape, write);
				times_add(which ? floor : tier, now_ns() - begin);
			}
}

static void shape_rows(struct gmem_device *device, const struct shape *shape, bool write)
{
	struct times tier = { 0 }, floor = { 0 };
	struct pairs p50 = { 0 }, p99 = { 0 }, rate = { 0 };
	double bytes = (double)(shape->page_bytes * shape->batch);
	struct row row = { NULL, "us", NULL, "bare sockets" };
	char id[64];

	tier_do(device, shape, true);
	bare_do(shape, true);
	for (int r = 0; r < REPETITIONS; r++) {
		measure(device, shape, write, &tier, &floor);
		pairs_add(&rate, bytes / times_mean(&tier), bytes / times_mean(&floor));
		pairs_add(&p50, times_percentile(&tier, 50) / 1e3, times_percentile(&floor, 50) / 1e3);
		pairs_add(&p99, times_percentile(&tier, 99) / 1e3, times_percentile(&floor, 99) / 1e3);
		times_clear(&tier);
		times_clear(&floor);
	}
	snprintf(id, sizeof(id), "remote_%s_%s_p50", write ? "put" : "get", shape->name);
	row.id = id;
	row.target = "ratio <= 1.15";
	row_print(&row, &p50, NULL);
	snprintf(id, sizeof(id), "remote_%s_%s_p99", write ? "put" : "get", shape->name);
	row_print(&row, &p99, NULL);
	snprintf(id, sizeof(id), "remote_%s_%s_rate", write ? "put" : "get", shape->name);
	row.unit = "GB/s";
	row.target = "ratio >= 0.87"; /* as little slower */
	row_print(&row, &rate, NULL);
	times_free(&tier);
	times_free(&floor);
}

static int connect_to_server(void)
{
	struct sockaddr_in at = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK), .sin_port = htons((uint16_t)port) };
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;

	CHECK(fd >= 0);
	for (int i = 0; i < 500; i++) {
		if (!connect(fd, (struct sockaddr *)&at, sizeof(at))) {
			CHECK(!setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)));
			return fd;
		}
		nap_us(10000);
	}
	close(fd);
	return -1;
}

static bool start_server(const char *program)
{
	char number[8];

	port = 17000 + getpid() % 1000;
	snprintf(number, sizeof(number), "%d", port);
	server = fork();
	if (!server) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		freopen("/dev/null", "w", stdout);
		execl(program, program, "--port", number, "--bind", "127.0.0.1", "--save", "", "--maxmemory", "512mb", (char *)NULL);
		_exit(127);
	}
	bare = connect_to_server();
	return bare >= 0;
}

void remote_tier(void)
{
	const char *program = getenv("GMEM_BENCH_VALKEY"), *keys[] = { "address", "capacity" };
	char address[32], message[GMEM_MESSAGE_MAX];
	const char *values[] = { address, "256M" };
	struct gmem_driver_config config = { .name = "r", .keys = keys, .values = values, .count = 2, .message = message,
					     .key_count = 1 << 20 };
	struct row missing = { "remote_put_4k_p50", "us", "ratio <= 1.15", "bare sockets" };
	struct gmem_device *device;

	if (!program || !start_server(program)) {
		row_print(&missing, NULL, "no server: pip install 'gmem[remote]'");
		return;
	}
	snprintf(address, sizeof(address), "127.0.0.1:%d", port);
	ops = gmem_driver_builtin("remote");
	memory = mmap(NULL, BATCH * HUGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(memory != MAP_FAILED);
	for (uint64_t i = 0; i < BATCH * HUGE_BYTES / 8; i++)
		((uint64_t *)memory)[i] = i * 0x9e3779b97f4a7c15ull;
	CHECK_EQ(ops->probe(&config, &device), 0);
	for (size_t s = 0; s < sizeof(shapes) / sizeof(shapes[0]); s++)
		for (int write = 1; write >= 0; write--)
			shape_rows(device, &shapes[s], write);
	ops->remove(device);
	close(bare);
	kill(server, SIGKILL);
	waitpid(server, NULL, 0);
}
