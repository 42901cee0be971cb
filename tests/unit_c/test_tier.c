/* SPDX-License-Identifier: Apache-2.0
 *
 * Tiers below the host: a client whose memory is larger than the host's budget gets back what it wrote, wherever it has
 * been meanwhile, and whatever its tiers do.
 */
#include "shelf.h"

#include <errno.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "harness.h"

#include <gmem/internal.h>

#define MIB (1ul << 20)
#define BUDGET (8 * MIB)
#define DATA (32 * MIB)

struct shared {
	volatile int step;
	uint64_t page_bytes;
	volatile uint64_t va;
};

static struct shared *shared;

static void step_to(int step)
{
	shared->step = step;
}

static void wait_step(int step)
{
	while (shared->step != step)
		sleep_ms(1);
}

static struct gmem_hnode_stats stats_of(struct gmem_core *core, int hnid)
{
	struct gmem_hnode_stats all[GMEM_HNODE_MAX];
	size_t count;

	gmem_hnodes(core, all, &count);
	for (size_t i = 0; i < count; i++)
		if (all[i].hnid == hnid)
			return all[i];
	CHECK(!"such an hnode");
	return all[0];
}

static uint64_t word_at(uint64_t i, uint64_t round)
{
	return (i + 1) * 0x9e3779b97f4a7c15ull ^ round;
}

static void write_all(volatile uint64_t *p, uint64_t round)
{
	for (uint64_t i = 0; i < DATA / 8; i += 64)
		p[i] = word_at(i, round);
}

static void check_all(volatile uint64_t *p, uint64_t round)
{
	for (uint64_t i = 0; i < DATA / 8; i += 64)
		CHECK_EQ(p[i], word_at(i, round));
}

/* Forwards, then at random: what is read is read again later, in another order. */
static int oversubscribe(struct client *client, void *arg)
{
	volatile uint64_t *p = client_mmap(client, DATA, shared->page_bytes, GMEM_FORK_SHARE);
	uint64_t state = 1;

	(void)arg;
	write_all(p, 1);
	check_all(p, 1);
	for (int i = shared->page_bytes < MIB ? 2000 : 200; i; i--) {
		uint64_t at;

		state = state * 6364136223846793005ull + 1442695040888963407ull;
		at = (state >> 33) % (DATA / 8 / 64) * 64;
		CHECK_EQ(p[at], word_at(at, 1));
		p[at + 1] = at;
	}
	check_all(p, 1);
	step_to(1);
	wait_step(2);
	check_all(p, 1);
	return 0;
}

static void small_and_large(uint64_t page_bytes, bool batches, uint32_t caps)
{
	struct shelf near = { .capacity = DATA / 2, .batches = batches, .caps = caps };
	struct shelf far = { .capacity = 2 * DATA, .batches = batches, .caps = caps };
	struct gmem_core *core;
	struct client *client;
	int first, second;

	shared->page_bytes = page_bytes;
	step_to(0);
	core = core_start((struct gmem_core_config){ .host_limit_bytes = BUDGET });
	second = shelf_attach(core, &far, "far"); /* the chain is by rank, not by who came first */
	first = shelf_attach(core, &near, "near");
	CHECK(first > 0 && second > 0);
	CHECK_EQ(gmem_tier_rank(core, first, 1), 0);
	CHECK_EQ(gmem_tier_rank(core, second, 2), 0);
	CHECK_EQ(gmem_tier_rank(core, GMEM_HOST, 2), -EINVAL);
	CHECK_EQ(gmem_tier_rank(core, 9, 2), -ENODEV);
	client = client_start(core, oversubscribe, NULL);
	wait_step(1);
	CHECK(stats_of(core, GMEM_HOST).peak_bytes <= BUDGET);
	CHECK(near.pushes > 0 && far.pushes > 0);
	for (int i = 0; near.stored != stats_of(core, first).used_bytes; i++) { /* what is on its way is charged first */
		CHECK(i < 2000);
		sleep_ms(1);
	}
	if (batches && page_bytes < MIB)
		CHECK(near.largest > 1);
	CHECK(stats_of(core, GMEM_HOST).evicted_clean > 0); /* reading makes no copy dirty */
	/* a tier goes, and passes on what it has */
	CHECK_EQ(gmem_device_detach(core, first, false), 0);
	CHECK_EQ(near.pages, 0);
	CHECK_EQ(gmem_device_detach(core, second, false), -ENOMEM); /* nobody else can hold it */
	CHECK(stats_of(core, GMEM_HOST).used_bytes <= BUDGET);
	step_to(2);
	CHECK_EQ(client_wait(client), 0);
	core_settle(core);
	CHECK_EQ(far.pages, 0); /* all freed with the session */
	CHECK_EQ(far.stored, 0);
	gmem_core_destroy(core);
	printf("%llu KiB pages%s%s: %llu evictions\n", (unsigned long long)page_bytes >> 10, batches ? ", batches" : "",
	       caps & GMEM_CAP_SLOW ? ", slow" : "", (unsigned long long)near.pushes + far.pushes);
}

static int write_and_wait(struct client *client, void *arg)
{
	volatile uint64_t *p = client_mmap(client, DATA, shared->page_bytes, GMEM_FORK_SHARE);

	(void)arg;
	write_all(p, 7);
	shared->va = (uint64_t)p;
	step_to(1);
	wait_step(2);
	check_all(p, 7);
	return 0;
}

/* A tier that takes less than it said: the next one does, and without one writing stops, and nothing is lost. */
static void less_room_than_said(void)
{
	struct shelf near = { .capacity = DATA, .physical = 4 * MIB, .batches = true, .assured = 4 * MIB };
	struct shelf far = { .capacity = DATA };
	struct gmem_core *core;
	struct client *client;
	int first;

	shared->page_bytes = 65536;
	step_to(0);
	core = core_start((struct gmem_core_config){ .host_limit_bytes = BUDGET });
	first = shelf_attach(core, &near, "near");
	CHECK(first > 0 && shelf_attach(core, &far, "far") > 0);
	client = client_start(core, write_and_wait, NULL);
	wait_step(1);
	CHECK_EQ(stats_of(core, first).errors, 0); /* full is no error */
	CHECK(near.stored <= 4 * MIB && near.pushes > 0 && far.pushes > 0);
	step_to(2);
	CHECK_EQ(client_wait(client), 0);
	gmem_core_destroy(core);
	printf("less room than said: ok\n");
}

static int too_much(struct client *client, void *arg)
{
	(void)arg;
	(void)client_mmap(client, DATA, 65536, GMEM_FORK_SHARE); /* CHECKs that it gets it */
	return 0;
}

/* What could never be held is refused: a tier's promise counts, not its hope. */
static void strict_commit(void)
{
	struct shelf near = { .capacity = 4 * DATA, .assured = 4 * MIB };
	struct gmem_mmap_args args = { .bytes = DATA, .page_bytes = 65536 };
	struct gmem_region_info region;
	struct gmem_core *core = core_start((struct gmem_core_config){ .host_limit_bytes = BUDGET });
	uint64_t session;

	CHECK(shelf_attach(core, &near, "near") > 0);
	CHECK_EQ(gmem_session_create(core, getuid(), getpid(), &session), 0);
	CHECK_EQ(gmem_mmap(core, session, &args, &region), -ENOMEM);
	args.bytes = BUDGET + 4 * MIB;
	CHECK_EQ(gmem_mmap(core, session, &args, &region), 0);
	gmem_session_destroy(core, session);
	gmem_core_destroy(core);
	core = core_start((struct gmem_core_config){ .host_limit_bytes = BUDGET, .overcommit = true });
	CHECK_EQ(client_wait(client_start(core, too_much, NULL)), 0);
	gmem_core_destroy(core);
	printf("strict commit: ok\n");
}

/* Without a tier the host's pages go to a device, and as much as both hold for certain is all that is promised: touching it
 * is no SIGBUS. */
static void overflow(uint64_t page_bytes)
{
	struct gmem_core *core = core_start((struct gmem_core_config){ .host_limit_bytes = BUDGET });
	struct gmem_mmap_args more = { .bytes = 2 * MIB, .page_bytes = page_bytes };
	struct gmem_region_info region;
	struct gmem_core_stats stats;
	struct client *client;

	shared->page_bytes = page_bytes;
	step_to(0);
	CHECK_EQ(attach_simgpu(core, "simgpu0", "capacity=56M"), 1); /* 32 MiB of it change places */
	client = client_start(core, oversubscribe, NULL);
	wait_step(1);
	CHECK_EQ(gmem_mmap(core, client->session, &more, &region), -ENOMEM);
	CHECK(stats_of(core, GMEM_HOST).peak_bytes <= BUDGET);
	CHECK(stats_of(core, 1).used_bytes >= DATA - BUDGET);
	CHECK_EQ(gmem_device_detach(core, 1, false), -ENOMEM);
	step_to(2);
	CHECK_EQ(client_wait(client), 0);
	core_settle(core);
	gmem_core_stats(core, &stats);
	CHECK_EQ(stats.poisoned_pages, 0);
	CHECK_EQ(stats_of(core, 1).used_bytes, 0);
	gmem_core_destroy(core);
	printf("%llu KiB pages: a device takes what the host can't\n", (unsigned long long)page_bytes >> 10);
}

static int touch_damaged(struct client *client, void *arg)
{
	volatile uint64_t *p = client_mmap(client, DATA, shared->page_bytes, GMEM_FORK_SHARE);
	uint64_t at = 0;

	(void)arg;
	write_all(p, 3);
	while (client_query(client, (void *)&p[at]).valid & 1)
		at += shared->page_bytes / 8;
	shared->va = (uint64_t)&p[at];
	step_to(1);
	wait_step(2);
	(void)p[at]; /* SIGBUS */
	return 0;
}

static int page_state(struct gmem_core *core, struct client *client)
{
	struct gmem_page_info info;
	size_t count;

	CHECK_EQ(gmem_query(core, client->session, shared->va, 8, &info, 1, &count), 0);
	return info.state;
}

/* Never zeros, never the wrong content. Damaged for good, or unreadable now. */
static void damage(int error, int state_behind)
{
	struct shelf near = { .capacity = DATA };
	struct gmem_core_stats stats;
	struct gmem_core *core;
	struct client *client;
	siginfo_t end;
	int tier;

	shared->page_bytes = 65536;
	step_to(0);
	core = core_start((struct gmem_core_config){ .host_limit_bytes = BUDGET });
	tier = shelf_attach(core, &near, "near");
	CHECK(tier > 0);
	client = client_start(core, touch_damaged, NULL);
	wait_step(1);
	CHECK_EQ(stats_of(core, tier).errors, 0);
	near.pull_error = error;
	step_to(2);
	CHECK(!waitid(P_PID, (id_t)client->pid, &end, WEXITED | WNOWAIT));
	CHECK_EQ(end.si_status, SIGBUS);
	CHECK_EQ(page_state(core, client), state_behind);
	CHECK_EQ(stats_of(core, tier).errors, 1); /* the tier's, whatever becomes of the page */
	gmem_core_stats(core, &stats);
	CHECK(stats.poisoned_pages > 0);
	near.pull_error = 0;
	CHECK(WIFSIGNALED(client_wait(client)));
	gmem_core_destroy(core);
	printf("%s: SIGBUS\n", strerror(-error));
}

static int pin_some(struct client *client, void *arg)
{
	volatile uint64_t *p = client_mmap(client, DATA, shared->page_bytes, GMEM_FORK_SHARE);

	(void)arg;
	CHECK_EQ(client_advise(client, GMEM_HOST, (void *)p, BUDGET / 2, GMEM_ADVISE_PINNED), 0);
	write_all(p, 5);
	step_to(1);
	wait_step(2);
	for (uint64_t at = 0; at < BUDGET / 2; at += shared->page_bytes)
		CHECK(client_query(client, (char *)p + at).valid & 1);
	check_all(p, 5);
	return 0;
}

static void limits(void)
{
	struct shelf near = { .capacity = DATA, .batches = true };
	struct gmem_core *core;
	struct client *client;
	int tier;

	shared->page_bytes = 65536;
	step_to(0);
	core = core_start((struct gmem_core_config){ .host_limit_bytes = BUDGET });
	tier = shelf_attach(core, &near, "near");
	client = client_start(core, pin_some, NULL);
	wait_step(1);
	CHECK_EQ(gmem_limit(core, GMEM_HOST, BUDGET / 4), -EBUSY); /* below what is pinned */
	CHECK_EQ(stats_of(core, GMEM_HOST).info.capacity_bytes, BUDGET);
	CHECK_EQ(gmem_limit(core, GMEM_HOST, MIB), -EINVAL);
	CHECK_EQ(gmem_limit(core, GMEM_HOST, 1ull << 60), -EINVAL);
	CHECK_EQ(gmem_limit(core, 12, BUDGET), -ENODEV);
	CHECK_EQ(gmem_limit(core, GMEM_HOST, 6 * MIB), 0);
	CHECK(stats_of(core, GMEM_HOST).used_bytes <= 6 * MIB);
	CHECK_EQ(gmem_limit(core, tier, 4 * MIB), -ENOMEM); /* nowhere for the rest to go: nothing has changed */
	CHECK_EQ(stats_of(core, tier).info.capacity_bytes, DATA);
	CHECK_EQ(gmem_limit(core, GMEM_HOST, 2 * DATA), 0);
	step_to(2);
	CHECK_EQ(client_wait(client), 0);
	gmem_core_destroy(core);
	printf("limits: ok\n");
}

static struct gmem_session_stats session_stats(struct gmem_core *core, const struct client *client)
{
	struct gmem_session_stats stats;

	CHECK_EQ(gmem_session_stats(core, client->session, &stats), 0);
	return stats;
}

static int neighbour(struct client *client, void *arg)
{
	volatile uint64_t *p = client_mmap(client, BUDGET, shared->page_bytes, GMEM_FORK_SHARE);

	(void)arg;
	for (uint64_t i = 0; i < BUDGET / 8; i += 64)
		p[i] = i;
	step_to(1);
	wait_step(3);
	for (uint64_t at = 0; at < BUDGET; at += shared->page_bytes) /* nobody has pushed it out */
		CHECK_EQ(client_query(client, (char *)p + at).valid, 1);
	return 0;
}

static int greedy(struct client *client, void *arg)
{
	(void)arg;
	wait_step(1);
	step_to(0);
	return write_and_wait(client, NULL);
}

/* Who has a quota makes room among his own pages, though the host has plenty. */
static void session_quota(uint64_t page_bytes)
{
	struct shelf near = { .capacity = 2 * DATA, .batches = true };
	struct gmem_core *core;
	struct client *other, *client;

	shared->page_bytes = page_bytes;
	step_to(0);
	core = core_start((struct gmem_core_config){ .host_limit_bytes = 4 * DATA });
	CHECK(shelf_attach(core, &near, "near") > 0);
	other = client_start(core, neighbour, NULL);
	client = client_start(core, greedy, NULL);
	CHECK_EQ(gmem_quota_session(core, client->session, 12, BUDGET), -ENODEV);
	CHECK_EQ(gmem_quota_session(core, 12345, GMEM_HOST, BUDGET), -ENOENT);
	CHECK_EQ(gmem_quota_session(core, client->session, GMEM_HOST, 4096), -EINVAL);
	CHECK_EQ(gmem_quota_session(core, client->session, GMEM_HOST, BUDGET), 0);
	while (shared->step != 1 || !near.pushes)
		sleep_ms(1);
	CHECK(session_stats(core, client).resident_bytes[GMEM_HOST] <= BUDGET);
	CHECK(session_stats(core, client).resident_bytes[GMEM_HOST] >= BUDGET / 2);
	CHECK_EQ(gmem_quota_session(core, client->session, GMEM_HOST, BUDGET / 2), 0);
	CHECK(session_stats(core, client).resident_bytes[GMEM_HOST] <= BUDGET / 2);
	step_to(2);
	CHECK_EQ(client_wait(client), 0);
	step_to(3);
	CHECK_EQ(client_wait(other), 0);
	gmem_core_destroy(core);
	printf("session's quota, %llu KiB pages: ok\n", (unsigned long long)page_bytes >> 10);
}

/* A user's sessions together; what can't be within any quota is refused, what can't be moved gives SIGBUS. */
static void user_quota(void)
{
	struct gmem_mmap_args args = { .bytes = DATA, .page_bytes = 65536 };
	struct gmem_region_info region;
	struct shelf near = { .capacity = DATA };
	struct gmem_core_config config = { .host_limit_bytes = 4 * DATA };
	struct gmem_core *core = core_start(config);
	struct client *client;
	uint64_t session;
	int status;

	gmem_quota_default(core, GMEM_HOST, 0, BUDGET);
	CHECK_EQ(gmem_quota_uid(core, getuid() + 1, GMEM_HOST, BUDGET), -ENOENT);
	CHECK_EQ(gmem_session_create(core, getuid(), getpid(), &session), 0);
	CHECK_EQ(gmem_mmap(core, session, &args, &region), -EDQUOT);
	args.bytes = BUDGET;
	CHECK_EQ(gmem_mmap(core, session, &args, &region), 0);
	CHECK_EQ(gmem_quota_uid(core, getuid(), GMEM_HOST, 4 * DATA), 0);
	args.bytes = DATA;
	CHECK_EQ(gmem_mmap(core, session, &args, &region), 0);
	gmem_session_destroy(core, session);
	gmem_core_destroy(core);

	config.overcommit = true;
	core = core_start(config);
	gmem_quota_default(core, GMEM_HOST, 0, BUDGET);
	shared->page_bytes = 65536;
	step_to(0);
	client = client_start(core, write_and_wait, NULL);
	status = client_wait(client);
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
	CHECK(shelf_attach(core, &near, "near") > 0);
	client = client_start(core, write_and_wait, NULL);
	wait_step(1);
	CHECK(session_stats(core, client).resident_bytes[GMEM_HOST] <= BUDGET);
	step_to(2);
	CHECK_EQ(client_wait(client), 0);
	gmem_core_destroy(core);
	printf("user's quota: ok\n");
}

/* Where memory is best kept: the far tier though the near one has room, and the host for what leaves it last. */
static int keep_where_it_is_best(struct client *client, void *arg)
{
	uint64_t quarter = DATA / 4, page = shared->page_bytes, there = 0;
	uint8_t *p = client_mmap(client, DATA, page, GMEM_FORK_SHARE);
	int far = (int)(intptr_t)arg;

	CHECK_EQ(client_advise(client, 99, p, quarter, GMEM_ADVISE_PREFERRED), -ENODEV);
	CHECK_EQ(client_advise(client, -1, p, quarter, GMEM_ADVISE_ACCESSED_BY), -EINVAL);
	CHECK_EQ(client_advise(client, far, p, quarter, GMEM_ADVISE_PREFERRED), 0);
	CHECK_EQ(client_advise(client, GMEM_HOST, p + quarter, BUDGET / 2, GMEM_ADVISE_PREFERRED), 0);
	CHECK_EQ(client_advise(client, GMEM_HOST, p, DATA, GMEM_ADVISE_READ_MOSTLY), 0);
	write_all((volatile uint64_t *)p, 9);
	for (uint64_t at = 0; at < quarter; at += page) {
		int valid = client_query(client, p + at).valid;

		there += valid == 1 << far;
		CHECK(valid == 1 << far || valid & 1); /* the policy may keep one */
	}
	CHECK(there > quarter / page / 2);
	CHECK(client_query(client, p).flags & GMEM_PAGE_READ_MOSTLY);
	CHECK_EQ(client_advise(client, -1, p, DATA, GMEM_ADVISE_PREFERRED), 0);
	check_all((volatile uint64_t *)p, 9);
	return 0;
}

static void advice(void)
{
	struct shelf near = { .capacity = 2 * DATA, .batches = true }, far = { .capacity = 2 * DATA, .batches = true };
	struct gmem_core *core;
	int hnid;

	shared->page_bytes = 65536;
	core = core_start((struct gmem_core_config){ .host_limit_bytes = BUDGET });
	CHECK(shelf_attach(core, &near, "near") > 0);
	hnid = shelf_attach(core, &far, "far");
	CHECK_EQ(client_wait(client_start(core, keep_where_it_is_best, (void *)(intptr_t)hnid)), 0);
	CHECK(near.pushes > 0);
	gmem_core_destroy(core);
	printf("advice: ok\n");
}

/* A request for pages that are on their way out stops their eviction. */
static int keep_writing(struct client *client, void *arg)
{
	volatile uint64_t *p = client_mmap(client, DATA, shared->page_bytes, GMEM_FORK_SHARE);

	(void)arg;
	for (uint64_t i = 0; i < BUDGET / 16; i += 64)
		p[i] = word_at(i, 3);
	shared->va = (uint64_t)p;
	step_to(1);
	wait_step(2);
	for (uint64_t i = 0; i < BUDGET / 16; i += 64)
		CHECK_EQ(p[i], word_at(i, 3));
	return 0;
}

struct call {
	struct gmem_core *core;
	uint64_t session;
	int result;
};

static void *lower_limit(void *arg)
{
	struct call *call = arg;

	call->result = gmem_limit(call->core, GMEM_HOST, 2 * MIB);
	return NULL;
}

static void *ask_for_all(void *arg)
{
	struct call *call = arg;

	call->result = gmem_prefetch(call->core, call->session, GMEM_HOST, shared->va, BUDGET / 2);
	return NULL;
}

static void will_need(uint64_t page_bytes, bool batches)
{
	struct shelf near = { .capacity = DATA, .batches = batches };
	struct gmem_core *core = core_start((struct gmem_core_config){ .host_limit_bytes = BUDGET });
	struct call lower = { .core = core, .result = 1 }, ask = lower;
	struct gmem_core_stats stats;
	struct gmem_hnode *host;
	struct client *client;
	pthread_t threads[2];
	uint64_t key;

	shared->page_bytes = page_bytes;
	step_to(0);
	CHECK(shelf_attach(core, &near, "near") > 0);
	client = client_start(core, keep_writing, NULL);
	wait_step(1);
	ask.session = client->session;
	host = gmem_core_hnode(core, GMEM_HOST);
	near.hold = true;
	CHECK(!pthread_create(&threads[0], NULL, lower_limit, &lower));
	while (!near.held) /* a page is on its way out */
		sleep_ms(1);
	key = near.held_key;
	CHECK(!pthread_create(&threads[1], NULL, ask_for_all, &ask));
	while (!atomic_load(&host->frames[host->frame_of[key]].wanted))
		sleep_ms(1);
	near.hold = false;
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	gmem_core_stats(core, &stats);
	CHECK(stats.evictions_stopped > 0);
	CHECK_EQ(ask.result, 0);
	CHECK(lower.result == 0 || lower.result == -EBUSY || lower.result == -EAGAIN);
	CHECK_EQ(stats.poisoned_pages, 0);
	step_to(2);
	CHECK_EQ(client_wait(client), 0);
	core_settle(core);
	CHECK_EQ(near.pages, 0);
	gmem_core_destroy(core);
	printf("%lu KiB%s: a request stopped %lu evictions\n", page_bytes >> 10, batches ? ", in batches" : "",
	       stats.evictions_stopped);
}

int main(void)
{
	const uint64_t sizes[] = { 4096, 65536, 2 * MIB };

	setvbuf(stdout, NULL, _IOLBF, 0);
	shared = shared_bytes(sizeof(*shared));
	for (int i = 0; i < 3; i++) {
		small_and_large(sizes[i], false, 0);
		small_and_large(sizes[i], true, 0);
		small_and_large(sizes[i], true, GMEM_CAP_SLOW);
	}
	if (hugepages_reserve(BUDGET / (2 * MIB) + 4))
		small_and_large(2 * MIB, true, 0);
	less_room_than_said();
	strict_commit();
	for (int i = 0; i < 3; i++)
		overflow(sizes[i]);
	damage(-EBADMSG, GMEM_POISONED);
	damage(-EIO, GMEM_RESIDENT);
	limits();
	session_quota(4096);
	session_quota(2 * MIB);
	user_quota();
	advice();
	for (int i = 0; i < 3; i++) {
		will_need(sizes[i], false);
		will_need(sizes[i], true);
	}
	printf("tier: ok\n");
	return 0;
}
