/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <gmem/internal.h>
#include <gmem/watch.h>

#define LOOK_NS 100000000ull
#define ASLEEP_LOOKS 2 /* that often in the same read */
#define HELD_LOOKS 10  /* that often at the same duty: another thread is wanted */
#define POKE SIGURG    /* ignored by default, used by nobody here */
#define STUCK_NS 5000000000ull

static _Thread_local struct gmem_duty *mine;

/* ---- the threads' side ---- */

static void on_poke(int sig)
{
	(void)sig; /* its only work is EINTR */
}

static void mask_signals(void)
{
	static const int wanted[] = { SIGBUS, SIGSEGV, SIGFPE, SIGILL, SIGABRT, SIGTRAP, SIGSYS, POKE };
	sigset_t set;

	sigfillset(&set);
	for (size_t i = 0; i < sizeof(wanted) / sizeof(wanted[0]); i++)
		sigdelset(&set, wanted[i]);
	pthread_sigmask(SIG_SETMASK, &set, NULL);
}

void gmem_duty_enlist(struct gmem_core *core, enum gmem_role role)
{
	struct gmem_watch *watch = &core->watch;

	mask_signals();
	gmem_mutex_lock(&watch->lock);
	for (size_t i = 0; i < GMEM_DUTIES_MAX && !mine; i++)
		if (!watch->duties[i].taken)
			mine = &watch->duties[i];
	if (mine) { /* without a place it is not watched, and serves all the same */
		uint64_t number = atomic_load(&mine->number);

		memset(mine, 0, sizeof(*mine));
		mine->taken = true;
		mine->number = number + 1;
		mine->hnid = -1;
		mine->role = role;
		mine->thread = pthread_self();
		mine->tid = (pid_t)syscall(SYS_gettid);
	}
	gmem_mutex_unlock(&watch->lock);
}

void gmem_duty_leave(struct gmem_core *core)
{
	gmem_mutex_lock(&core->watch.lock);
	if (mine)
		mine->taken = false;
	mine = NULL;
	gmem_mutex_unlock(&core->watch.lock);
}

void gmem_duty_begin(enum gmem_doing doing, uint64_t session, uint64_t va)
{
	if (!mine)
		return;
	atomic_store_explicit(&mine->session, session, memory_order_relaxed);
	atomic_store_explicit(&mine->va, va, memory_order_relaxed);
	atomic_store_explicit(&mine->doing, doing, memory_order_relaxed);
	atomic_store_explicit(&mine->number, atomic_load_explicit(&mine->number, memory_order_relaxed) + 1,
			      memory_order_release);
}

void gmem_duty_end(void)
{
	gmem_duty_begin(GMEM_DOING_NOTHING, 0, 0);
}

void gmem_duty_driver(int hnid, const char *op)
{
	if (!mine)
		return;
	atomic_store_explicit(&mine->hnid, op ? hnid : -1, memory_order_relaxed);
	atomic_store_explicit(&mine->op, op, memory_order_release);
}

bool gmem_duty_poked(void)
{
	return mine && atomic_exchange(&mine->poked, false);
}

/* ---- the watching thread's ---- */

/* Whether the kernel has it asleep: then it does not merely wait for a CPU. */
static bool sleeps(pid_t tid)
{
	char path[48], text[256], *at;
	size_t n;
	FILE *file;

	snprintf(path, sizeof(path), "/proc/self/task/%d/stat", (int)tid);
	file = fopen(path, "re");
	if (!file)
		return false;
	n = fread(text, 1, sizeof(text) - 1, file);
	fclose(file);
	text[n] = '\0';
	at = strrchr(text, ')');
	return at && at[1] && at[2] == 'S';
}

static void look_locked(struct gmem_duty *duty, uint64_t now)
{
	uint64_t number = atomic_load_explicit(&duty->number, memory_order_acquire);

	if (number == duty->seen) {
		duty->looks++;
		return;
	}
	duty->seen = number;
	duty->seen_ns = now;
	duty->looks = 0;
}

static void report_locked(struct gmem_core *core, struct gmem_duty *duty, size_t index, bool stuck)
{
	duty->told = stuck;
	if (stuck)
		gmem_count(&core->stats.stuck_reports, 1);
	gmem_core_post(core, stuck ? GMEM_EVENT_STUCK : GMEM_EVENT_UNSTUCK, atomic_load(&duty->session),
		       atomic_load(&duty->va), index, atomic_load(&duty->hnid), 0);
}

static void watch_duty_locked(struct gmem_core *core, struct gmem_duty *duty, size_t index, uint64_t now)
{
	uint32_t doing;

	look_locked(duty, now);
	doing = atomic_load(&duty->doing);
	if (duty->told && !duty->looks)
		report_locked(core, duty, index, false);
	if (!duty->looks || doing == GMEM_DOING_NOTHING)
		return;
	if (doing == GMEM_DOING_READ && duty->looks >= ASLEEP_LOOKS && sleeps(duty->tid)) {
		atomic_store(&duty->poked, true);
		pthread_kill(duty->thread, POKE);
	}
	if (!duty->told && now - duty->seen_ns >= core->watch.stuck_ns)
		report_locked(core, duty, index, true);
}

/* Of a role, those that are there, and whether all of them have been at the same duty for long. */
static bool all_held_locked(struct gmem_watch *watch, enum gmem_role role)
{
	size_t there = 0, held = 0;

	for (size_t i = 0; i < GMEM_DUTIES_MAX; i++) {
		const struct gmem_duty *duty = &watch->duties[i];

		if (!duty->taken || duty->role != role)
			continue;
		there++;
		held += duty->looks >= HELD_LOOKS && atomic_load(&duty->doing) != GMEM_DOING_NOTHING;
	}
	return there && held == there;
}

static void *watching_thread(void *arg)
{
	struct gmem_core *core = arg;
	struct gmem_watch *watch = &core->watch;

	pthread_setname_np(pthread_self(), "gmem-watch");
	mask_signals();
	gmem_mutex_lock(&watch->lock);
	while (!watch->stop) {
		uint64_t now = gmem_now_ns();
		bool want[GMEM_ROLE_COUNT];

		for (size_t i = 0; i < GMEM_DUTIES_MAX; i++)
			if (watch->duties[i].taken)
				watch_duty_locked(core, &watch->duties[i], i, now);
		for (int role = 0; role < GMEM_ROLE_COUNT; role++)
			want[role] = all_held_locked(watch, role);
		gmem_mutex_unlock(&watch->lock);
		if (want[GMEM_ROLE_FAULT] || want[GMEM_ROLE_FILL])
			gmem_faults_grow(core, want[GMEM_ROLE_FAULT], want[GMEM_ROLE_FILL]);
		gmem_mutex_lock(&watch->lock);
		if (!watch->stop)
			gmem_mutex_wait(&watch->lock, &watch->ends, LOOK_NS);
	}
	gmem_mutex_unlock(&watch->lock);
	return NULL;
}

void gmem_watch_init(struct gmem_watch *watch, uint64_t stuck_ns)
{
	gmem_mutex_init(&watch->lock, GMEM_RANK_WATCH);
	pthread_cond_init(&watch->ends, NULL);
	watch->stuck_ns = stuck_ns ? stuck_ns : STUCK_NS;
}

void gmem_watch_deinit(struct gmem_watch *watch)
{
	gmem_mutex_deinit(&watch->lock);
	pthread_cond_destroy(&watch->ends);
}

int gmem_watch_start(struct gmem_core *core)
{
	struct sigaction action = { .sa_handler = on_poke }; /* no SA_RESTART */
	int err;

	sigemptyset(&action.sa_mask);
	if (sigaction(POKE, &action, NULL))
		return -errno;
	err = -pthread_create(&core->watch.thread, NULL, watching_thread, core);
	core->watch.running = !err;
	return err;
}

void gmem_watch_stop(struct gmem_core *core)
{
	struct gmem_watch *watch = &core->watch;

	if (!watch->running)
		return;
	gmem_mutex_lock(&watch->lock);
	watch->stop = true;
	pthread_cond_broadcast(&watch->ends);
	gmem_mutex_unlock(&watch->lock);
	pthread_join(watch->thread, NULL);
	watch->running = false;
}

void gmem_core_threads(struct gmem_core *core, struct gmem_thread_info *threads, size_t capacity, size_t *ret_count)
{
	static const char *const roles[] = { "fault", "fill", "ring", "reclaim" };
	static const char *const doings[] = { "nothing", "read", "fault", "event", "ahead", "requests", "reclaim" };
	struct gmem_watch *watch = &core->watch;
	uint64_t now = gmem_now_ns();
	size_t count = 0;

	gmem_mutex_lock(&watch->lock);
	for (size_t i = 0; i < GMEM_DUTIES_MAX; i++) {
		struct gmem_duty *duty = &watch->duties[i];
		uint32_t doing = atomic_load(&duty->doing);

		if (!duty->taken)
			continue;
		if (count < capacity)
			threads[count] = (struct gmem_thread_info){
				.index = i, .tid = duty->tid, .role = roles[duty->role], .doing = doings[doing],
				.op = atomic_load(&duty->op), .hnid = atomic_load(&duty->hnid),
				.session = atomic_load(&duty->session), .va = atomic_load(&duty->va),
				.held_ns = doing && duty->looks && atomic_load(&duty->number) == duty->seen ?
						   now - duty->seen_ns : 0,
				.stuck = duty->told,
			};
		count++;
	}
	gmem_mutex_unlock(&watch->lock);
	*ret_count = count;
}
