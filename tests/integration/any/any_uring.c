/* SPDX-License-Identifier: Apache-2.0
 *
 * What the kernel writes past the page tables arrives, however scarce memory is meanwhile. usage: any_uring FILE
 */
#include "any.h"

#include <fcntl.h>
#include <liburing.h>

#define BYTES (1 * MIB)
#define OTHERS (40 * MIB)
#define ROUNDS 4

static char *buffer, *others;
static struct io_uring ring;

/* Whatever was used before these leaves. */
static void crowd_out(int value)
{
	memset(others, value, OTHERS);
}

static void direct(const char *path)
{
	int ends[2], fd = open(path, O_RDONLY | O_DIRECT), again = open(path, O_RDONLY);

	CHECK(fd >= 0 && !(fcntl(fd, F_GETFL) & O_DIRECT));
	CHECK(!fcntl(again, F_SETFL, O_DIRECT) && !(fcntl(again, F_GETFL) & O_DIRECT));
	CHECK(!pipe2(ends, O_DIRECT) && fcntl(ends[1], F_GETFL) & O_DIRECT); /* packets */
	crowd_out(1);
	CHECK(read(fd, buffer, BYTES) == BYTES && all(buffer, BYTES, 'x'));
	for (int i = 0; i < 2; i++)
		close(ends[i]);
	close(fd);
	close(again);
}

static void registered(const char *path)
{
	struct iovec vector = { buffer, BYTES };
	int fd = open(path, O_RDONLY);
	struct io_uring_cqe *cqe;

	CHECK(!io_uring_register_buffers(&ring, &vector, 1));
	for (int i = 0; i < ROUNDS; i++) {
		struct io_uring_sqe *sqe = io_uring_get_sqe(&ring);

		memset(buffer, i, BYTES);
		crowd_out(i);
		io_uring_prep_read_fixed(sqe, fd, buffer, BYTES, 0, 0);
		CHECK(io_uring_submit(&ring) == 1 && !io_uring_wait_cqe(&ring, &cqe) && cqe->res == BYTES);
		io_uring_cqe_seen(&ring, cqe);
		crowd_out(i + 1);
		CHECK(all(buffer, BYTES, 'x'));
	}
	CHECK(!io_uring_unregister_buffers(&ring));
	crowd_out(9);
	CHECK(all(buffer, BYTES, 'x'));
	close(fd);
}

int main(int argc, char **argv)
{
	CHECK(argc == 2);
	buffer = malloc(BYTES);
	others = malloc(OTHERS);
	CHECK(is_managed(buffer) && is_managed(others));
	direct(argv[1]);
	if (io_uring_queue_init(4, &ring, 0)) { /* containers often have none */
		puts("no io_uring");
		return 0;
	}
	registered(argv[1]);
	io_uring_queue_exit(&ring);
	puts("ok");
	return 0;
}
