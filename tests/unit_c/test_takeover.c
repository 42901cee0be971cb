/* SPDX-License-Identifier: Apache-2.0
 *
 * What a killed gmemd leaves of a tier, and the next one finds: of the file tier all its pages and its room; what is of
 * another version, damaged or cut short is refused, and left to whoever can do something with it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../../csrc/drivers/index.h"
#include "harness.h"
#include "tierops.h"

#define KEYS 4096
#define PAGES 400
#define OPTIONS_FORMAT "path=%s capacity=32M engine=%s"

static char folder[64], options[256], path[80];
static uint8_t *page;

static size_t size_of(uint64_t key)
{
	return key % 100 == 0 ? MIB2 : key % 10 == 0 ? KIB64 : KIB4;
}

static int push(struct gmem_device *device, uint64_t key, uint64_t version)
{
	tier_fill(page, size_of(key), key, version);
	return tier_ops->peer_map(device, key, page, size_of(key));
}

static bool pull(struct gmem_device *device, uint64_t key, uint64_t version)
{
	memset(page, 0xee, size_of(key));
	return !tier_ops->peer_unmap(device, key, page, size_of(key)) && tier_is_filled(page, size_of(key), key, version);
}

/* Every third one is gone again, every fifth was replaced. */
static uint64_t version_of(uint64_t key)
{
	return key % 3 == 0 ? 0 : key % 5 == 0 ? 2 : 1;
}

static struct gmem_device *first_life(struct tier_held *held)
{
	struct gmem_device *device;

	tier_hold(held, NULL, 0);
	device = tier_attached(options, KEYS, &held->driver);
	CHECK(!held->driver.restored);
	for (uint64_t key = 0; key < PAGES; key++)
		CHECK_EQ(push(device, key, 1), 0);
	for (uint64_t key = 0; key < PAGES; key += 5)
		CHECK_EQ(push(device, key, 2), 0);
	for (uint64_t key = 0; key < PAGES; key += 3)
		CHECK_EQ(tier_ops->peer_free(device, key, size_of(key)), 0);
	return device;
}

static bool has_all(struct gmem_device *device)
{
	for (uint64_t key = 0; key < PAGES; key++)
		if (version_of(key) && !pull(device, key, version_of(key)))
			return false;
	return true;
}

/* The first one is left as it is, as by a kill; the second one has its pages, and its room. */
static void test_the_next_one_takes_over(void)
{
	struct gmem_device_usage before, after;
	struct gmem_device *first, *second;
	struct tier_held held, again;
	struct gmem_kept_fd left[8];
	struct stat st;

	first = first_life(&held);
	before = tier_usage(first);
	CHECK_EQ(tier_held_fds(&held, left), 2);
	tier_hold(&again, left, 2);
	second = tier_attached(options, KEYS, &again.driver);
	CHECK(again.driver.restored);
	after = tier_usage(second);
	CHECK_EQ(after.pages, before.pages);
	CHECK_EQ(after.page_bytes, before.page_bytes);
	CHECK_EQ(after.stored_bytes, before.stored_bytes);
	CHECK(has_all(second));
	/* what it stores now lies nowhere else than where nothing is, and it can fill the file to the end */
	for (uint64_t key = 0; key < PAGES; key += 3)
		CHECK_EQ(push(second, key, 3), 0);
	CHECK(has_all(second));
	for (uint64_t key = PAGES; key < KEYS && !push(second, key, 4);)
		key++;
	CHECK(has_all(second));
	for (uint64_t key = 0; key < PAGES; key += 3)
		CHECK(pull(second, key, 3));
	CHECK(tier_usage(second).page_bytes > (28 << 20));
	CHECK(!stat(path, &st));
	tier_ops->remove(second);
	CHECK(stat(path, &st) && errno == ENOENT); /* it was gmem that had made it */
	tier_let_go(&again);
	tier_ops->remove(first);
	tier_let_go(&held);
}

static int fd_of(const struct gmem_kept_fd *left, const char *name)
{
	for (size_t i = 0; i < 2; i++)
		if (strstr(left[i].name, name))
			return left[i].fd;
	fprintf(stderr, "%s is not held\n", name);
	exit(1);
}

/* With what is in the file of the index at that offset in place of what was there. */
static void refused_with(const struct gmem_kept_fd *left, const char *what, off_t offset, uint64_t value, size_t bytes, int err)
{
	struct gmem_kept_fd theirs[2] = { left[0], left[1] };
	struct gmem_device *device;
	struct tier_held again;
	uint64_t was = 0;
	struct stat st;
	int index = fd_of(left, "index"), other;

	CHECK(pread(index, &was, bytes, offset) == (ssize_t)bytes && was != value);
	CHECK(pwrite(index, &value, bytes, offset) == (ssize_t)bytes);
	for (int i = 0; i < 2; i++)
		theirs[i].fd = dup(left[i].fd);
	tier_hold(&again, theirs, 2);
	CHECK_EQ(tier_attach(options, KEYS, &again.driver, &device), err);
	tier_says(what, tier_message, "can't be taken over");
	tier_let_go(&again);
	CHECK(pwrite(index, &was, bytes, offset) == (ssize_t)bytes);
	CHECK(!stat(path, &st)); /* under its name, and nobody can take it meanwhile */
	other = open(path, O_RDWR);
	CHECK(other >= 0 && flock(other, LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK);
	close(other);
	for (int i = 0; i < 2; i++)
		CHECK(fcntl(theirs[i].fd, F_GETFD) < 0 && errno == EBADF); /* none is left open */
}

static off_t entry_at(uint64_t key)
{
	return (off_t)(4096 + key * sizeof(struct gmem_index_entry));
}

#define REFUSED(field, value, err)                                                                                     \
	refused_with(left, #field, offsetof(struct gmem_index_header, field), value,                            \
		     sizeof(((struct gmem_index_header *)0)->field), err)

static void test_what_does_not_fit_is_refused_and_left(void)
{
	struct gmem_device *first, *second;
	struct tier_held held, again;
	struct gmem_kept_fd left[8];
	uint64_t place;

	first = first_life(&held);
	CHECK_EQ(tier_held_fds(&held, left), 2);
	REFUSED(version, GMEM_INDEX_VERSION + 1, -EPROTONOSUPPORT);
	REFUSED(entry_bytes, 32, -EPROTONOSUPPORT);
	REFUSED(magic, 1, -EPROTO);
	REFUSED(key_count, KEYS - 1, -EPROTO);
	REFUSED(capacity_bytes, 1ull << 40, -EPROTO); /* more than the file has */
	/* two pages in one place, and one beyond the end */
	CHECK(pread(fd_of(left, "index"), &place, 8, entry_at(1)) == 8);
	refused_with(left, "twins", entry_at(2), place, 8, -EPROTO);
	refused_with(left, "outside", entry_at(2), (1ull << 40) | 12, 8, -EPROTO);
	refused_with(left, "header", entry_at(2), 4096 | 12, 8, -EPROTO); /* before the first page */
	CHECK(has_all(first));
	tier_hold(&again, left, 2);
	second = tier_attached(options, KEYS, &again.driver);
	CHECK(has_all(second));
	tier_ops->remove(second);
	tier_let_go(&again);
	tier_ops->remove(first);
	tier_let_go(&held);
}

static void remove_folder(void)
{
	unlink(path);
	rmdir(folder);
}

int main(void)
{
	static const char *const engines[] = { "sync", "io_uring" };

	alarm(time_limit_s);
	snprintf(folder, sizeof(folder), "%s", "/var/tmp/gmem-test-XXXXXX");
	CHECK(mkdtemp(folder));
	snprintf(path, sizeof(path), "%s/pages", folder);
	atexit(remove_folder);
	page = mmap(NULL, MIB2, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(page != MAP_FAILED);
	tier_ops = gmem_driver_builtin("file");
	for (size_t i = 0; i < 2; i++) {
		struct gmem_device *device;

		snprintf(options, sizeof(options), OPTIONS_FORMAT, path, engines[i]);
		if (tier_attach(options, KEYS, NULL, &device)) {
			CHECK(strstr(tier_message, "engine: "));
			printf("%s: not run: %s\n", engines[i], tier_message);
			continue;
		}
		tier_ops->remove(device);
		test_the_next_one_takes_over();
		test_what_does_not_fit_is_refused_and_left();
		printf("takeover, %s: ok\n", engines[i]);
	}
	return 0;
}
