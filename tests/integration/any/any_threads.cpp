// SPDX-License-Identifier: Apache-2.0
//
// Threads that fill containers, pass them to each other and sum them up: the same output whatever the schedule.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

namespace {

constexpr int jobs = 12, words = 20000, numbers = 60000;

struct alignas(64) Result {
	uint64_t sum = 0;
};

std::mutex lock;
std::vector<std::unique_ptr<std::vector<std::string>>> left; // made by one thread, freed by another

uint64_t next(uint64_t &state)
{
	state ^= state << 13;
	state ^= state >> 7;
	return state ^= state << 17;
}

uint64_t job(int number)
{
	uint64_t state = 88172645463325252u + (uint64_t)number, sum = 0;
	std::unordered_map<uint64_t, std::string> map;
	std::vector<uint64_t> sorted;
	auto texts = std::make_unique<std::vector<std::string>>();

	for (int i = 0; i < words; i++) {
		map[next(state) % words] = std::to_string(next(state));
		texts->push_back(std::string(20 + i % 40, (char)('a' + i % 26)));
	}
	for (int i = 0; i < numbers; i++)
		sorted.push_back(next(state));
	std::sort(sorted.begin(), sorted.end());
	for (int i = 0; i < numbers; i += 1000)
		sum = sum * 31 + sorted[(size_t)i];
	for (uint64_t i = 0; i < words; i++)
		if (auto found = map.find(i); found != map.end())
			sum = sum * 31 + found->second.size();
	std::lock_guard<std::mutex> guard(lock);
	left.push_back(std::move(texts));
	if (left.size() > jobs / 2)
		left.erase(left.begin());
	return sum;
}

} // namespace

int main(int argc, char **argv)
{
	int thread_count = argc > 1 ? std::atoi(argv[1]) : 4;
	auto results = std::make_unique<Result[]>(jobs);
	std::vector<std::thread> threads;

	for (int t = 0; t < thread_count; t++)
		threads.emplace_back([&, t] {
			for (int number = t; number < jobs; number += thread_count)
				results[number].sum = job(number);
		});
	for (auto &thread : threads)
		thread.join();
	for (int number = 0; number < jobs; number++)
		std::printf("%d %016llx\n", number, (unsigned long long)results[number].sum);
	try {
		std::vector<char> huge((size_t)1 << 60);
		std::puts("allocated");
	} catch (const std::bad_alloc &) {
		std::puts("bad_alloc");
	}
}
