/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include <gmem/crash.h>
#include <gmem/fork.h>
#include <gmem/internal.h>
#include <gmem/prefetch.h>
#include <gmem/service.h>
#include <gmem/uffd.h>

#define MESSAGES 16
#define CLOSE_NS 100000     /* faults so close together are worth a spin */
#define CLOSE_FAULTS 3      /* that many, before the first one */
#define LINGER_NS 40000
#define QUICK_NS 20000      /* a wake-up's time: whoever takes less to be through a window gains nothing from another CPU */
#define NO_FD_NAP_NS 1000000
#define FIRST_PAUSE 8       /* faults until it looks again where the client runs */
#define LAST_PAUSE 512
#define ROAM_PAUSE 256
#define CROWDED_NS 20000    /* waiting so long for a CPU, on average, is worse than to be woken on another one */
#define SHY_MOST 64
#define TURN_NS 2000000     /* then other views get their turn */
#define READ_SPINS 128      /* how long for another thread's read, a few microseconds */
#define STOP_TOKEN UINT64_MAX

/* ---- a descriptor in reserve: reading a fork event makes one, and without one it can't be read ---- */

static bool give_up_spare(struct gmem_faults *faults)
{
	int fd = atomic_exchange(&faults->spare_fd, -1);

	if (fd >= 0)
		close(fd);
	return fd >= 0;
}

static void keep_spare(struct gmem_faults *faults)
{
	int none = -1, fd;

	if (atomic_load_explicit(&faults->spare_fd, memory_order_relaxed) >= 0)
		return;
	fd = fcntl(faults->stop_fd, F_DUPFD_CLOEXEC, 0);
	if (fd >= 0 && !atomic_compare_exchange_strong(&faults->spare_fd, &none, fd))
		close(fd);
}

static void handle(struct gmem_core *core, struct gmem_view *view, const struct gmem_uffd_msg *msg)
{
	switch (msg->event) {
	case GMEM_UFFD_EVENT_PAGEFAULT: {
		struct gmem_fault fault = { view, msg->arg.pagefault.address, (uint32_t)msg->arg.pagefault.flags,
					    (pid_t)msg->arg.pagefault.ptid };

		gmem_duty_begin(GMEM_DOING_FAULT, view->session_id, fault.va);
		gmem_fault_resolve(core, &fault, true);
		break;
	}
	case GMEM_UFFD_EVENT_FORK:
		gmem_duty_begin(GMEM_DOING_EVENT, view->session_id, 0);
		gmem_session_forked(view->session, (int)msg->arg.fork.ufd);
		keep_spare(&core->faults);
		break;
	case GMEM_UFFD_EVENT_REMAP:
		gmem_crash(GMEM_CRASH_EVENT);
		gmem_duty_begin(GMEM_DOING_EVENT, view->session_id, msg->arg.remap.from);
		gmem_as_move(view->as, msg->arg.remap.from, msg->arg.remap.to, msg->arg.remap.len);
		break;
	case GMEM_UFFD_EVENT_UNMAP:
		gmem_crash(GMEM_CRASH_EVENT);
		gmem_duty_begin(GMEM_DOING_EVENT, view->session_id, msg->arg.remove.start);
		gmem_as_remove(view->as, msg->arg.remove.start, msg->arg.remove.end - msg->arg.remove.start,
			       gmem_session_release_piece, core);
		gmem_kept_forget(view->session->account, msg->arg.remove.start,
				 msg->arg.remove.end - msg->arg.remove.start);
		break;
	default:
		gmem_count(&core->stats.spurious_faults, 1);
	}
}

static void view_failed(struct gmem_core *core, struct gmem_view *view)
{
	if (atomic_exchange(&view->dead, true))
		return;
	epoll_ctl(core->faults.epoll_fd, EPOLL_CTL_DEL, view->uffd, NULL);
	gmem_core_post(core, GMEM_EVENT_VIEW_GONE, view->session_id, 0, view->id, view->hnid, 0);
}

static void arm(struct gmem_core *core, struct gmem_view *view)
{
	struct epoll_event event = { .events = EPOLLIN | EPOLLONESHOT, .data.u64 = view->token };

	epoll_ctl(core->faults.epoll_fd, EPOLL_CTL_MOD, view->uffd, &event);
}

/* ---- events are handled in the order in which they are read: an mremap is a REMAP and then an UNMAP of where it came from,
 * and its thread sends the second as soon as the first has been read. So whoever reads one keeps others from reading until
 * it is handled. They don't wait for that, but leave the uffd to be armed by who reads. ---- */

static bool begin_reading(struct gmem_view *view)
{
	for (int spins = 0; spins < READ_SPINS; spins++) {
		if (!atomic_load_explicit(&view->reading, memory_order_relaxed) && !atomic_exchange(&view->reading, true))
			return true;
		gmem_cpu_relax();
	}
	atomic_store(&view->rearm, true);
	return !atomic_exchange(&view->reading, true); /* else who reads sees it when it ends */
}

static void end_reading(struct gmem_core *core, struct gmem_view *view)
{
	atomic_store(&view->reading, false);
	if (atomic_load(&view->rearm) && atomic_exchange(&view->rearm, false))
		arm(core, view);
}

static bool any_event(const struct gmem_uffd_msg *messages, ssize_t n)
{
	for (ssize_t i = 0; i < n; i++)
		if (messages[i].event != GMEM_UFFD_EVENT_PAGEFAULT)
			return true;
	return false;
}

/* Whether to spin for the next fault instead of sleeping: a wake-up costs as much as the rest of a fault. */
static bool expects_more(struct gmem_core *core, struct gmem_view *view)
{
	return core->faults.linger &&
	       atomic_load_explicit(&view->close_faults, memory_order_relaxed) >= CLOSE_FAULTS;
}

static void note_faults(struct gmem_view *view)
{
	uint64_t now = gmem_now_ns(), before = atomic_load_explicit(&view->served_ns, memory_order_relaxed);
	uint32_t close_faults = atomic_load_explicit(&view->close_faults, memory_order_relaxed);

	if (now - before > CLOSE_NS)
		atomic_store_explicit(&view->close_faults, 0, memory_order_relaxed);
	else if (close_faults < CLOSE_FAULTS)
		atomic_store_explicit(&view->close_faults, close_faults + 1, memory_order_relaxed);
}

/* A client can make its userfaultfd blocking, and read it as well: so it is read only when it has just been said to have a
 * message, and a read that sleeps all the same is interrupted (watch.h) and was the last one. */
static ssize_t read_messages(struct gmem_core *core, struct gmem_view *view, bool ready, struct gmem_uffd_msg *messages)
{
	struct pollfd look = { .fd = view->uffd, .events = POLLIN };
	ssize_t n;

	if (!ready && poll(&look, 1, 0) <= 0)
		return 0;
	if (!ready && look.revents != POLLIN) {
		view_failed(core, view);
		return 0;
	}
	gmem_duty_begin(GMEM_DOING_READ, view->session_id, 0);
	n = read(view->uffd, messages, MESSAGES * sizeof(*messages));
	if (n < 0 && (errno == EMFILE || errno == ENFILE)) {
		const struct timespec nap = { 0, NO_FD_NAP_NS };

		if (!give_up_spare(&core->faults)) {
			nanosleep(&nap, NULL); /* the fork waits until there is one */
			return 0;
		}
		n = read(view->uffd, messages, MESSAGES * sizeof(*messages));
	}
	if (n < 0 && errno != EAGAIN && (errno != EINTR || gmem_duty_poked()))
		view_failed(core, view);
	return n < 0 ? 0 : n / (ssize_t)sizeof(*messages);
}

static void roam(struct gmem_service *service, uint32_t pause)
{
	if (service->cpu >= 0)
		gmem_cpus_set(&service->cpus);
	service->cpu = service->home = -1;
	service->pause = service->to_look = pause;
}

static void leave_for_a_while(struct gmem_service *service)
{
	if (service->cpu < 0)
		return;
	gmem_cpus_set(&service->cpus);
	service->home = service->cpu;
	service->cpu = -1;
}

static void come_home(struct gmem_service *service)
{
	if (service->home >= 0 && !gmem_cpu_stay(service->home))
		service->cpu = service->home;
	service->home = -1;
}

/* Whether this thread has had to wait for the CPU on which it stays. Where the kernel does not tell, it has. */
static bool crowded(struct gmem_service *service)
{
	struct gmem_waits before = service->waits;

	if (gmem_thread_waits(&service->waits))
		return true;
	return service->cpu >= 0 && service->waits.count > before.count &&
	       (service->waits.ns - before.ns) / (service->waits.count - before.count) > CROWDED_NS;
}

/* At a look: whether it may stay with its client. One that had to give way tries again later and later. */
static bool has_place(struct gmem_service *service)
{
	if (service->skip) {
		service->skip--;
		return false;
	}
	if (!crowded(service)) {
		if (service->cpu >= 0 && service->pause > FIRST_PAUSE)
			service->shy = 0;
		return true;
	}
	service->shy = service->shy < SHY_MOST / 2 ? 2 * service->shy + 1 : SHY_MOST;
	service->skip = service->shy;
	return false;
}

/* Soon for the first time, to see early whether staying was a good idea; then seldom: the client is kept from running
 * meanwhile. */
static void pause_looking(struct gmem_service *service)
{
	if (service->cpu < 0)
		service->pause = FIRST_PAUSE;
	else if (service->pause < LAST_PAUSE)
		service->pause *= 2;
	service->to_look = service->pause;
}

/* Faults of one thread are answered on its own CPU, which is free while it waits: a wake-up there is a switch from one thread
 * to another, where one on another CPU has to get that out of its idle state. What is fetched ahead is so while the client
 * runs, so on another one, unless all that it does is to wait for the next page; and if others want that CPU, too, we are
 * better off elsewhere. */
static void follow(struct gmem_view *view, struct gmem_service *service)
{
	int cpu;

	if (!service->can_stay || !service->client) {
		roam(service, 0);
		return;
	}
	if (gmem_stream_overtakes(view)) {
		leave_for_a_while(service);
		return;
	}
	come_home(service);
	if (service->to_look) {
		service->to_look--;
		return;
	}
	cpu = has_place(service) ? gmem_thread_cpu(service->client) : -1;
	if (cpu < 0) {
		roam(service, ROAM_PAUSE);
		return;
	}
	pause_looking(service);
	if (cpu != service->cpu && !gmem_cpu_stay(cpu))
		service->cpu = cpu;
}

/* Waits for the next fault of a view whose faults are close; false if there is none. */
static bool linger(struct gmem_view *view, struct gmem_service *service, uint64_t *idle_since)
{
	uint64_t now = gmem_now_ns();

	if (service->cpu >= 0) {
		struct pollfd next = { .fd = view->uffd, .events = POLLIN };
		const struct timespec patience = { 0, LINGER_NS };
		bool more = ppoll(&next, 1, &patience, NULL) > 0;

		if (gmem_now_ns() - now > QUICK_NS)
			gmem_stream_unhurried(view);
		return more;
	}
	*idle_since = *idle_since ? *idle_since : now;
	sched_yield();
	return now - *idle_since <= LINGER_NS;
}

/* The uffd is watched one-shot: who serves it alone looks for its next faults, spinning if they come fast, fetching
 * ahead meanwhile if they come in sequence. Once several come at a time, others may serve it too. */
static void serve(struct gmem_core *core, struct gmem_view *view, struct gmem_service *service)
{
	uint64_t start = gmem_now_ns(), idle_since = 0;
	struct gmem_uffd_msg messages[MESSAGES];
	bool armed = false, ready = true;

	service->client = 0;
	atomic_store(&service->view, (uintptr_t)view);
	while (!atomic_load_explicit(&view->dead, memory_order_relaxed)) {
		bool in_order;
		ssize_t n;

		if (!begin_reading(view)) {
			armed = true;
			break;
		}
		n = read_messages(core, view, ready, messages);
		in_order = any_event(messages, n);
		if (!in_order)
			end_reading(core, view);
		ready = false;
		if (n) {
			if (n > 1 && !armed) {
				arm(core, view);
				armed = true;
			}
			note_faults(view);
			for (ssize_t i = 0; i < n; i++)
				handle(core, view, &messages[i]);
			if (in_order)
				end_reading(core, view);
			if (messages[n - 1].event == GMEM_UFFD_EVENT_PAGEFAULT)
				service->client = (pid_t)messages[n - 1].arg.pagefault.ptid;
			atomic_store_explicit(&view->served_ns, gmem_now_ns(), memory_order_relaxed);
			idle_since = 0;
			follow(view, service);
		}
		/* In turns: a thread that faults again at once would otherwise always be ahead of us. */
		if (gmem_stream_step(core, view, false)) {
			atomic_store_explicit(&view->served_ns, gmem_now_ns(), memory_order_relaxed);
		} else if (!n) {
			if (!expects_more(core, view)) {
				gmem_stream_unhurried(view);
				break;
			}
			if (gmem_now_ns() - start > TURN_NS)
				break;
			if (!linger(view, service, &idle_since)) {
				atomic_store_explicit(&view->close_faults, 0, memory_order_relaxed);
				break;
			}
		}
		atomic_fetch_add(&service->turns, 1);
		gmem_duty_end();
		if (n && gmem_now_ns() - start > TURN_NS)
			break;
	}
	if (!armed)
		arm(core, view);
	atomic_store(&service->view, 0);
	atomic_fetch_add(&service->turns, 1);
}

void gmem_faults_quiesce(struct gmem_core *core, struct gmem_view *view)
{
	for (uint32_t i = 0; i < atomic_load(&core->faults.thread_count); i++) {
		struct gmem_service *service = &core->faults.services[i];
		uint64_t turns = atomic_load(&service->turns);

		while (atomic_load(&service->view) == (uintptr_t)view && atomic_load(&service->turns) == turns)
			sched_yield();
	}
}

static struct gmem_view *view_of(struct gmem_faults *faults, uint64_t token)
{
	struct gmem_slot *slot = &faults->slots[token & 0xffffffff];
	struct gmem_view *view = NULL;

	gmem_mutex_lock(&faults->slots_lock);
	if (slot->generation == token >> 32 && slot->view)
		view = gmem_view_ref(slot->view);
	gmem_mutex_unlock(&faults->slots_lock);
	return view;
}

static void *fault_thread(void *arg)
{
	struct gmem_service *service = arg;
	struct gmem_core *core = service->core;
	struct gmem_faults *faults = &core->faults;

	pthread_setname_np(pthread_self(), "gmem-fault");
	gmem_duty_enlist(core, GMEM_ROLE_FAULT);
	service->cpu = service->home = -1;
	service->can_stay = !gmem_cpus_get(&service->cpus);
	for (;;) {
		struct epoll_event event;
		struct gmem_view *view;
		int n = epoll_wait(faults->epoll_fd, &event, 1, -1);

		if (n <= 0)
			continue;
		if (event.data.u64 == STOP_TOKEN)
			break;
		view = view_of(faults, event.data.u64);
		if (!view)
			continue;
		if (event.events & (EPOLLERR | EPOLLHUP))
			view_failed(core, view);
		else
			serve(core, view, service);
		gmem_view_unref(view);
		gmem_duty_end();
	}
	gmem_duty_leave(core);
	return NULL;
}

int gmem_faults_watch(struct gmem_core *core, struct gmem_view *view)
{
	struct gmem_faults *faults = &core->faults;
	struct epoll_event event = { .events = EPOLLIN | EPOLLONESHOT };
	uint32_t index;
	int err = 0;

	gmem_mutex_lock(&faults->slots_lock);
	if (faults->slots_free) {
		index = faults->slots_free - 1;
		faults->slots_free = faults->slots[index].next_free;
	} else if (faults->slots_used < GMEM_VIEWS_MAX) {
		index = faults->slots_used++;
	} else {
		err = -ENFILE;
	}
	if (!err) {
		view->slot = index;
		faults->slots[index].view = gmem_view_ref(view);
		view->token = (uint64_t)faults->slots[index].generation << 32 | index;
		event.data.u64 = view->token;
	}
	gmem_mutex_unlock(&faults->slots_lock);
	if (!err && epoll_ctl(faults->epoll_fd, EPOLL_CTL_ADD, view->uffd, &event)) {
		err = -errno;
		gmem_faults_unwatch(core, view);
	}
	return err;
}

void gmem_faults_unwatch(struct gmem_core *core, struct gmem_view *view)
{
	struct gmem_faults *faults = &core->faults;
	struct gmem_slot *slot = &faults->slots[view->slot];
	bool mine;

	atomic_store(&view->dead, true);
	epoll_ctl(faults->epoll_fd, EPOLL_CTL_DEL, view->uffd, NULL);
	gmem_mutex_lock(&faults->slots_lock);
	mine = slot->view == view;
	if (mine) {
		slot->view = NULL;
		slot->generation++;
		slot->next_free = faults->slots_free;
		faults->slots_free = view->slot + 1;
	}
	gmem_mutex_unlock(&faults->slots_lock);
	if (mine)
		gmem_view_unref(view);
}

static int start_fault_thread(struct gmem_core *core)
{
	struct gmem_faults *faults = &core->faults;
	uint32_t count = atomic_load(&faults->thread_count);
	int err;

	faults->services[count].core = core;
	err = -pthread_create(&faults->threads[count], NULL, fault_thread, &faults->services[count]);
	if (!err)
		atomic_store(&faults->thread_count, count + 1);
	return err;
}

static int start_threads(struct gmem_core *core, uint32_t threads)
{
	int err = 0;

	while (!err && atomic_load(&core->faults.thread_count) < threads)
		err = start_fault_thread(core);
	return err;
}

void gmem_faults_grow(struct gmem_core *core, bool fault, bool filler)
{
	struct gmem_faults *faults = &core->faults;

	/* If none can be had, those that are there go on as they can; the next look tries again. */
	if (fault && atomic_load(&faults->thread_count) < GMEM_THREADS_MAX)
		start_fault_thread(core);
	if (filler)
		gmem_fillers_grow(core);
}

int gmem_faults_start(struct gmem_core *core, uint32_t threads)
{
	struct gmem_faults *faults = &core->faults;
	struct epoll_event event = { .events = EPOLLIN, .data.u64 = STOP_TOKEN };
	int err = gmem_fillers_start(core);

	gmem_mutex_init(&faults->slots_lock, GMEM_RANK_SLOTS);
	faults->linger = sysconf(_SC_NPROCESSORS_ONLN) > 1;
	faults->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	faults->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	faults->spare_fd = -1;
	if (!err && (faults->epoll_fd < 0 || faults->stop_fd < 0 ||
		     epoll_ctl(faults->epoll_fd, EPOLL_CTL_ADD, faults->stop_fd, &event)))
		err = -errno;
	if (!err) {
		keep_spare(faults);
		err = start_threads(core, threads);
	}
	if (err)
		gmem_faults_stop(core);
	return err;
}

void gmem_faults_stop(struct gmem_core *core)
{
	struct gmem_faults *faults = &core->faults;
	uint64_t one = 1;

	if (write(faults->stop_fd, &one, sizeof(one)) < 0) {
		/* the counter is not 0, so the threads stop all the same */
	}
	while (faults->thread_count)
		pthread_join(faults->threads[--faults->thread_count], NULL);
	gmem_fillers_stop(core);
	close(faults->epoll_fd);
	close(faults->stop_fd);
	give_up_spare(faults);
	gmem_mutex_deinit(&faults->slots_lock);
}
