/* SPDX-License-Identifier: Apache-2.0
 *
 * LLNL UMap beside moves.c: data that is elsewhere (in a store that is warm memory), touched by the client, one byte a
 * page. usage: UMAP_PAGESIZE=BYTES umap PAGES REPETITIONS
 * A line for each repetition: GB/s of a sequence of touches, and the median of isolated touches in random order, in us.
 */
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <numeric>
#include <random>
#include <vector>

#include <umap/umap.h>

#define PAUSE_US 100

class MemoryStore : public Umap::Store {
public:
	explicit MemoryStore(size_t bytes) : content(bytes, 1) {}
	ssize_t read_from_store(char *buffer, size_t bytes, off_t offset) override
	{
		memcpy(buffer, content.data() + offset, bytes);
		return static_cast<ssize_t>(bytes);
	}
	ssize_t write_to_store(char *buffer, size_t bytes, off_t offset) override
	{
		memcpy(content.data() + offset, buffer, bytes);
		return static_cast<ssize_t>(bytes);
	}

private:
	std::vector<char> content;
};

static double now_us()
{
	timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return static_cast<double>(t.tv_sec) * 1e6 + static_cast<double>(t.tv_nsec) / 1e3;
}

static double touch(const char *at)
{
	double start = now_us();

	if (*static_cast<const volatile char *>(at) != 1)
		abort();
	return now_us() - start;
}

class Region {
public:
	Region(MemoryStore *store, size_t bytes) : bytes(bytes)
	{
		at = static_cast<char *>(
			Umap::umap_ex(nullptr, bytes, PROT_READ | PROT_WRITE, UMAP_PRIVATE, -1, 0, store));
		if (at == UMAP_FAILED)
			abort();
	}
	~Region() { uunmap(at, bytes); }
	char *at;

private:
	size_t bytes;
};

static double sequence(MemoryStore *store, size_t pages, size_t page_bytes)
{
	Region region(store, pages * page_bytes);
	double start = now_us();

	for (size_t i = 0; i < pages; i++)
		touch(region.at + i * page_bytes);
	return static_cast<double>(pages * page_bytes) / (now_us() - start) / 1e3;
}

static double isolated(MemoryStore *store, size_t pages, size_t page_bytes, std::mt19937 &random)
{
	Region region(store, pages * page_bytes);
	std::vector<size_t> order(pages);
	std::vector<double> times;
	const timespec pause = { 0, PAUSE_US * 1000 };

	std::iota(order.begin(), order.end(), 0);
	std::shuffle(order.begin(), order.end(), random);
	for (size_t page : order) {
		nanosleep(&pause, nullptr);
		times.push_back(touch(region.at + page * page_bytes));
	}
	std::nth_element(times.begin(), times.begin() + static_cast<long>(pages / 2), times.end());
	return times[pages / 2];
}

int main(int argc, char **argv)
{
	size_t page_bytes = umapcfg_get_umap_page_size();
	size_t pages = argc == 3 ? strtoul(argv[1], nullptr, 10) : 0;
	int repetitions = argc == 3 ? atoi(argv[2]) : 0;
	std::mt19937 random(1);

	if (!pages || !repetitions) {
		fprintf(stderr, "usage: UMAP_PAGESIZE=BYTES umap PAGES REPETITIONS\n");
		return 2;
	}
	MemoryStore store(pages * page_bytes);
	for (int i = -1; i < repetitions; i++) { /* the first one warms memory up */
		double gbps = sequence(&store, pages, page_bytes);
		double us = isolated(&store, pages, page_bytes, random);

		if (i >= 0)
			printf("%g %g\n", gbps, us);
	}
	fflush(stdout);
	_exit(0); /* its workers do not end by themselves */
}
