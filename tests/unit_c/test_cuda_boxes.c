/* SPDX-License-Identifier: Apache-2.0
 *
 * Boxes of descriptors: what is put into them is there for a successor, whenever its predecessor has been killed, and what
 * was dropped is let go of. Each life of a daemon is a process, and the test is the manager that holds the boxes. What is put
 * away are memfds with their own numbers in them.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <gmem/crash.h>

#include "../../csrc/drivers/cuda_boxes.h"
#include "fdstore.h"
#include "harness.h"

#define MOST 1000u
#define MANY 200u /* more than three boxes */
#define CASE_S 60

/* For all lives. */
static struct shared {
	_Atomic uint32_t made;
	uint32_t generation[MOST]; /* of what is put away; 0: nothing */
	bool doubtful[MOST];       /* it was being put or dropped when it ended: there, or not */
	int seen[MOST];
} *shared;
static struct fdstore store;

/* ---- a life ---- */

static struct gmem_keep keep;
static struct gmem_driver_keep driver;

static struct gmem_boxes *begin(uint32_t max_fds)
{
	struct gmem_kept_fd left[FDSTORE_MAX];
	struct gmem_boxes *boxes;

	fdstore_copy(&store, left);
	CHECK_EQ(gmem_keep_init(&keep, fcntl(store.daemons, F_DUPFD_CLOEXEC, 0), max_fds, left, store.count), 0);
	gmem_driver_keep_init(&driver, &keep, 1);
	CHECK_EQ(gmem_boxes_create(&driver, MOST, &shared->made, &boxes), 0);
	return boxes;
}

static int made_file(uint32_t number)
{
	int fd = memfd_create("boxed", MFD_CLOEXEC);

	CHECK(fd >= 0 && pwrite(fd, &number, sizeof(number), 0) == sizeof(number));
	return fd;
}

static bool is_file(int fd, uint32_t number)
{
	uint32_t found = MOST;

	return pread(fd, &found, sizeof(found), 0) == sizeof(found) && found == number;
}

static int put(struct gmem_boxes *boxes, uint32_t number, uint32_t generation)
{
	int fd = made_file(number), err;

	shared->doubtful[number] = true;
	err = gmem_boxes_put(boxes, number, generation, fd);
	shared->generation[number] = err ? 0 : generation;
	shared->doubtful[number] = false;
	close(fd);
	return err;
}

static void drop(struct gmem_boxes *boxes, const uint32_t *numbers, size_t count)
{
	for (size_t i = 0; i < count; i++)
		shared->doubtful[numbers[i]] = true;
	gmem_boxes_drop(boxes, numbers, count);
	for (size_t i = 0; i < count; i++) {
		shared->generation[numbers[i]] = 0;
		shared->doubtful[numbers[i]] = false;
	}
}

static void put_many(struct gmem_boxes *boxes, uint32_t first, uint32_t count)
{
	for (uint32_t n = first; n < first + count; n++)
		CHECK_EQ(put(boxes, n, 1000 + n), 0);
}

static void check_all(struct gmem_boxes *boxes)
{
	for (uint32_t n = 0; n < MOST; n++) {
		int fd = -1, err = gmem_boxes_get(boxes, n, &fd);

		CHECK_EQ(err, shared->generation[n] ? 0 : -ENOENT);
		if (err)
			continue;
		CHECK(is_file(fd, n));
		close(fd);
	}
}

static bool see(uint32_t number, uint32_t generation, int fd, void *arg)
{
	(void)arg;
	CHECK(number < MOST && is_file(fd, number));
	CHECK(shared->doubtful[number] || shared->generation[number] == generation);
	CHECK(!shared->seen[number]++);
	if (shared->doubtful[number])
		shared->generation[number] = generation;
	return true;
}

static bool refuse_odd(uint32_t number, uint32_t generation, int fd, void *arg)
{
	if (number % 2 && shared->seen[number])
		return false; /* it was just being moved */
	see(number, generation, fd, arg);
	if (number % 2) {
		shared->doubtful[number] = true; /* until it has been swept */
		shared->generation[number] = 0;
	}
	return number % 2 == 0;
}

/* Each that was there is there, once. */
static struct gmem_boxes *take_over(gmem_box_fn fn)
{
	struct gmem_boxes *boxes = begin(FDSTORE_MAX);
	uint32_t had[MOST];

	memcpy(had, shared->generation, sizeof(had));
	memset(shared->seen, 0, sizeof(shared->seen));
	gmem_boxes_open(boxes, fn, NULL);
	for (uint32_t n = 0; n < MOST; n++) {
		CHECK(shared->seen[n] == (had[n] != 0) || shared->doubtful[n]);
		if (shared->doubtful[n] && !shared->seen[n])
			shared->generation[n] = 0;
		shared->doubtful[n] = false;
	}
	check_all(boxes);
	return boxes;
}

/* ---- the manager ---- */

/* Runs it to its end, in order or killed; true: killed. */
static bool live(void (*fn)(void))
{
	int status = 0;
	pid_t pid;

	fflush(NULL);
	pid = fork();
	CHECK(pid >= 0);
	if (!pid) {
		close(store.ours);
		alarm(CASE_S);
		gmem_crash_init();
		fn();
		_exit(0); /* and nothing is given up */
	}
	while (waitpid(pid, &status, WNOHANG) != pid) {
		fdstore_take_all(&store);
		usleep(100);
	}
	fdstore_take_all(&store);
	crash_at(NULL, 0);
	if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL)
		return true;
	if (status)
		exit(1);
	return false;
}

/* Descriptors in the queues of the boxes that are held, by the kernel's count. */
static unsigned in_flight(void)
{
	unsigned total = 0;

	for (size_t i = 0; i < store.count; i++) {
		char path[64], line[128];
		unsigned count;
		FILE *in;

		snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", store.kept[i].fd);
		in = fopen(path, "r");
		CHECK(in);
		while (fgets(line, sizeof(line), in))
			if (sscanf(line, "scm_fds: %u", &count) == 1)
				total += count;
		fclose(in);
	}
	return total;
}

static unsigned live_count(void)
{
	unsigned count = 0;

	for (uint32_t n = 0; n < MOST; n++)
		count += shared->generation[n] != 0;
	return count;
}

static void open_store(void)
{
	memset(shared, 0, sizeof(*shared));
	fdstore_open(&store);
}

/* ---- lives ---- */

static void life_fills(void)
{
	put_many(take_over(see), 0, MANY);
}

static void life_thins(void)
{
	struct gmem_boxes *boxes = take_over(see);
	uint32_t gone[MANY], count = 0;

	for (uint32_t n = 0; n < MANY; n++)
		if (n % 3 == 1 || n / 10 == 5)
			gone[count++] = n;
	drop(boxes, gone, count);
	check_all(boxes);
	drop(boxes, gone, count); /* they are nowhere */
	put_many(boxes, MANY, 30);
	CHECK_EQ(put(boxes, 55, 7), 0);
	check_all(boxes);
}

static void life_refuses(void)
{
	take_over(refuse_odd);
}

static void life_looks(void)
{
	take_over(see);
}

static void life_drops_all(void)
{
	struct gmem_boxes *boxes = take_over(see);

	for (uint32_t n = 0; n < MOST; n++)
		drop(boxes, &n, 1);
	check_all(boxes);
}

/* Between them every descriptor is held by the queues alone. */
static void test_lives(void)
{
	open_store();
	CHECK(!live(life_fills));
	CHECK_EQ(shared->made, 4);
	CHECK_EQ(in_flight(), MANY + 4); /* and each box's own writer */
	CHECK(!live(life_looks));
	CHECK(!live(life_thins));
	CHECK_EQ(in_flight(), live_count() + shared->made);
	CHECK(!live(life_refuses));
	CHECK_EQ(in_flight(), live_count() + shared->made);
	CHECK(!live(life_looks));
	CHECK(!live(life_drops_all));
	CHECK_EQ(in_flight(), shared->made);
	CHECK(!live(life_fills)); /* the boxes are used again */
	CHECK_EQ(in_flight(), MANY + shared->made);
	CHECK(shared->made <= 8);
	fdstore_close(&store);
}

static void life_works(void)
{
	struct gmem_boxes *boxes = take_over(see);
	uint32_t x = 12345;

	for (int step = 0; step < 300; step++) {
		uint32_t numbers[8], count = 0;

		for (uint32_t i = 0; i < 8; i++) {
			x = x * 1664525 + 1013904223;
			numbers[count] = x >> 8 & 127;
			if (shared->generation[numbers[count]])
				count++;
			else
				CHECK_EQ(put(boxes, numbers[count], x | 1), 0);
		}
		if (step % 3 == 0)
			drop(boxes, numbers, count);
	}
	check_all(boxes);
}

/* Killed between any two steps, and again while its successor sweeps. */
static void test_crashes(void)
{
	static const char *const points[] = { "BOX_PUT", "BOX_REQUEUED", "BOX_DROPPED", "FD_HELD" };

	for (size_t p = 0; p < 4; p++)
		for (int passes = 1; passes < 400; passes = passes * 3 / 2 + 1) {
			bool died;

			open_store();
			crash_at(points[p], p == 3 ? 1 + passes % 2 : passes);
			died = live(life_works);
			CHECK(died || passes > 100);
			crash_at(points[p], 1 + passes % 5);
			live(life_refuses);
			CHECK(!live(life_looks));
			CHECK(!live(life_drops_all));
			CHECK_EQ(in_flight(), store.count); /* one writer each */
			fdstore_close(&store);
		}
}

/* ---- damage ---- */

static bool see_but_lost(uint32_t number, uint32_t generation, int fd, void *arg)
{
	CHECK(number >= GMEM_BOX_ROOM);
	return see(number, generation, fd, arg);
}

static void life_lost_first_box(void)
{
	struct gmem_boxes *boxes;

	for (uint32_t n = 0; n < GMEM_BOX_ROOM; n++)
		shared->generation[n] = 0;
	boxes = take_over(see_but_lost);
	put_many(boxes, 0, GMEM_BOX_ROOM); /* another box takes its place */
	check_all(boxes);
	_exit(0);
}

static int junk_box(int type, const void *text, size_t bytes)
{
	int pair[2];

	CHECK(!socketpair(AF_UNIX, type | SOCK_CLOEXEC, 0, pair));
	if (bytes)
		CHECK(send(pair[0], text, bytes, 0) == (ssize_t)bytes);
	close(pair[0]);
	return pair[1];
}

/* A box that is none: what was in it is lost, and nothing else. */
static void check_damage(int fd)
{
	open_store();
	CHECK(!live(life_fills));
	if (fd >= 0)
		fdstore_replace(&store, "driver.1.b0", fd);
	else
		fdstore_forget(&store, "driver.1.b0");
	CHECK(!live(life_lost_first_box));
	CHECK(!live(life_looks));
	CHECK_EQ(in_flight(), MANY + 4);
	fdstore_close(&store);
}

static void test_damage(void)
{
	const uint32_t foreign[4] = { 0x4d415246u, MOST, 1, 0 };

	check_damage(-1);
	check_damage(memfd_create("junk", MFD_CLOEXEC));
	check_damage(junk_box(SOCK_STREAM, "junk", 4));
	check_damage(junk_box(SOCK_SEQPACKET, "junk", 4));
	check_damage(junk_box(SOCK_SEQPACKET, "junk that is just so long or longer", 35));
	check_damage(junk_box(SOCK_SEQPACKET, foreign, sizeof(foreign)));
}

/* A message of ours without its descriptor is one that is not there. */
static void test_empty_message(void)
{
	const uint32_t bare[4] = { 0x4d415246u, 3, 1003, 0 };

	check_damage(junk_box(SOCK_SEQPACKET, bare, sizeof(bare)));
}

static void life_loses_writer(void)
{
	put_many(begin(FDSTORE_MAX), 0, 2 * GMEM_BOX_ROOM);
}

/* A box whose writer is gone keeps what it has; what has to be moved goes to another one. */
static void test_no_writer(void)
{
	open_store();
	CHECK(!live(life_loses_writer));
	CHECK(recv(fdstore_find(&store, "driver.1.b0"), NULL, 0, MSG_DONTWAIT) == 0);
	CHECK(!live(life_looks));
	CHECK_EQ(in_flight(), 2 * GMEM_BOX_ROOM + 1);
	CHECK(!live(life_thins));
	CHECK(!live(life_looks));
	CHECK(!live(life_drops_all));
	fdstore_close(&store);
}

/* ---- bounds ---- */

static void life_without_flight(void)
{
	const struct rlimit few = { 40, 40 };
	struct gmem_boxes *boxes = begin(FDSTORE_MAX);
	uint32_t n = 0, first = 0;
	int err;

	CHECK(!setrlimit(RLIMIT_NOFILE, &few) && !setresuid(65534, 65534, 65534));
	while (!(err = put(boxes, n, 1)))
		CHECK(n++ < 64);
	CHECK_EQ(err, -ETOOMANYREFS);
	CHECK(n > 30);
	check_all(boxes);
	drop(boxes, &first, 1);
	check_all(boxes);
}

static void life_without_places(void)
{
	struct gmem_boxes *boxes = begin(1);

	put_many(boxes, 0, GMEM_BOX_ROOM);
	CHECK_EQ(put(boxes, 900, 1), -ENFILE);
	check_all(boxes);
	drop(boxes, (uint32_t[]){ 5, 7 }, 2);
	CHECK_EQ(put(boxes, 900, 1), 0);
	check_all(boxes);
}

/* Queues that take less than they do as sockets come: there are more boxes, and what can't be moved within one is moved to
 * another. */
static void life_with_small_queues(void)
{
	struct gmem_boxes *boxes = begin(FDSTORE_MAX);
	uint32_t gone[30];
	int least = 1;

	CHECK_EQ(put(boxes, 999, 1), 0);
	for (int fd = 3; fd < 64; fd++)
		setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &least, sizeof(least));
	put_many(boxes, 0, 60);
	CHECK(shared->made > 1);
	for (uint32_t i = 0; i < 30; i++)
		gone[i] = 2 * i;
	drop(boxes, gone, 30);
	check_all(boxes);
}

static void life_without_descriptors(void)
{
	struct gmem_boxes *boxes = begin(FDSTORE_MAX);
	int fds[64], count = 0, fd;
	struct rlimit few = { 64, 64 };
	uint32_t third = 3;

	put_many(boxes, 0, 10);
	CHECK(!setrlimit(RLIMIT_NOFILE, &few));
	while ((fds[count] = open("/dev/null", O_RDONLY | O_CLOEXEC)) >= 0)
		count++;
	CHECK_EQ(gmem_boxes_get(boxes, 1, &fd), -EMFILE);
	gmem_boxes_drop(boxes, &third, 1); /* what is in front of it can't be moved now */
	shared->generation[third] = 0;
	while (count)
		close(fds[--count]);
	check_all(boxes);
	gmem_boxes_drop(boxes, NULL, 0);
	check_all(boxes);
}

static void test_bounds(void)
{
	open_store();
	CHECK(!live(life_without_flight));
	CHECK(!live(life_looks));
	fdstore_close(&store);
	open_store();
	CHECK(!live(life_without_places));
	CHECK(!live(life_looks));
	fdstore_close(&store);
	open_store();
	CHECK(!live(life_with_small_queues));
	CHECK(!live(life_looks));
	CHECK(!live(life_drops_all));
	fdstore_close(&store);
	open_store();
	CHECK(!live(life_without_descriptors));
	CHECK_EQ(in_flight(), 9 + 1);
	fdstore_close(&store);
}

int main(void)
{
	crash_open();
	shared = shared_bytes(sizeof(*shared));
	test_lives();
	test_crashes();
	test_damage();
	test_empty_message();
	test_no_writer();
	test_bounds();
	crash_close();
	printf("boxes: ok\n");
	return 0;
}
