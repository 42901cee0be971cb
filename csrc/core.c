/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include <gmem/crash.h>
#include <gmem/internal.h>
#include <gmem/pool.h>
#include <gmem/reclaim.h>
#include <gmem/recover.h>
#include <gmem/ring.h>
#include <gmem/uffd.h>

/* DESIGN: one window for all sessions, above where programs map by themselves. ASan (gcc 12) has its shadow below
 * 0x7e90_0000_0000, so sanitizer builds use a smaller window there. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define WINDOW_BASE 0x7e9000000000ull
#define WINDOW_BYTES (256ull << 30)
#else
#define WINDOW_BASE 0x660000000000ull
#define WINDOW_BYTES (10ull << 40)
#endif
#define WINDOW_MAX 0x7f0000000000ull
#define LPT_PAGES (1ull << 33) /* 64 GiB of words, sparse: 32 TiB of 4 KiB pages */
#define DEFAULT_FAULT_THREADS 2
#define UFFD_NEEDED                                                                                                    \
	(GMEM_UFFD_FEAT_MISSING_SHMEM | GMEM_UFFD_FEAT_MINOR_SHMEM | GMEM_UFFD_FEAT_WP_HUGETLBFS_SHMEM |               \
	 GMEM_UFFD_FEAT_EVENT_UNMAP | GMEM_UFFD_FEAT_EVENT_REMAP)
#define UFFD_NEEDED_HUGE (GMEM_UFFD_FEAT_MISSING_HUGETLBFS | GMEM_UFFD_FEAT_MINOR_HUGETLBFS)

void gmem_core_post(struct gmem_core *core, enum gmem_event_type type, uint64_t session, uint64_t va, uint64_t value,
		    int hnid, int error)
{
	struct gmem_event event = { .type = type, .hnid = hnid, .error = error, .session = session, .va = va,
				    .value = value };

	gmem_events_post(&core->events, &event);
}

/* EVENT_FORK is given to CAP_SYS_PTRACE only, and only a try tells. */
static bool event_fork_works(int device_fd)
{
	int fd = gmem_uffd_new(device_fd), err;

	if (fd < 0)
		return false;
	err = gmem_uffd_api(fd, GMEM_UFFD_FEAT_EVENT_FORK);
	close(fd);
	return !err;
}

static int probe(struct gmem_core *core, const struct gmem_core_config *config)
{
	struct gmem_core_features *f = &core->features;
	int fd = gmem_uffd_open_device(), err;

	f->uffd_device = fd >= 0;
	f->uffd_device_fd = fd >= 0 ? fd : -1;
	err = gmem_uffd_probe(f->uffd_device_fd, &f->uffd);
	if (err)
		return err;
	f->uffd &= config->feature_mask;
	if ((f->uffd & UFFD_NEEDED) != UFFD_NEEDED)
		return -ENOSYS; /* before 5.19 */
	f->poison = f->uffd & GMEM_UFFD_FEAT_POISON;
	f->continue_wp = (config->feature_mask & GMEM_UFFD_FEAT_WP_UNPOPULATED) &&
			 gmem_uffd_probe_continue_wp(f->uffd_device_fd);
	f->event_fork = config->event_fork && (f->uffd & GMEM_UFFD_FEAT_EVENT_FORK) &&
			event_fork_works(f->uffd_device_fd);
	core->hugepages = config->hugepages && (f->uffd & UFFD_NEEDED_HUGE) == UFFD_NEEDED_HUGE;
	if (core->hugepages) { /* memfd_create(MFD_HUGETLB) fails on kernels without hugetlbfs */
		struct gmem_file *file;

		core->hugepages = !gmem_file_create("gmem-probe", GMEM_CLASS_HUGE, GMEM_HUGE_BYTES, 0, &file);
		if (core->hugepages)
			gmem_file_unref(file);
	}
	if (core->hugepages) { /* it opens files that stay open: now, and not for who happens to map first */
		uint64_t have, unused;

		gmem_hugepages(&have, &unused);
	}
	f->hugepages = core->hugepages;
	return 0;
}

static int set_window(struct gmem_core *core, const struct gmem_core_config *config)
{
	struct gmem_window *w = &core->window;
	uint64_t half;
	int err;

	w->base = config->window_base ? config->window_base : WINDOW_BASE;
	w->bytes = config->window_bytes ? config->window_bytes : WINDOW_BYTES;
	if (core->recovering) { /* its clients have it mapped */
		w->base = core->keep.header->window_base;
		w->bytes = core->keep.header->window_bytes;
	}
	if ((w->base | w->bytes) & (2 * GMEM_HUGE_BYTES - 1) || w->base + w->bytes > WINDOW_MAX + WINDOW_BYTES ||
	    w->base + w->bytes < w->base || !w->base)
		return -EINVAL;
	half = w->bytes / 2;
	w->part_base[GMEM_CLASS_SMALL] = w->base;
	w->part_base[GMEM_CLASS_HUGE] = w->base + half;
	w->part_bytes[GMEM_CLASS_SMALL] = w->part_bytes[GMEM_CLASS_HUGE] = half;
	err = gmem_range_init(&core->va[GMEM_CLASS_SMALL], w->base, w->base + half);
	if (err)
		return err;
	err = gmem_range_init(&core->va[GMEM_CLASS_HUGE], w->base + half, w->base + w->bytes);
	if (err)
		gmem_range_deinit(&core->va[GMEM_CLASS_SMALL]);
	return err;
}

static int make_lpt(struct gmem_core *core)
{
	int fd = gmem_keep_take(&core->keep, "lpt"), err;

	if (core->recovering && (fd < 0 || core->keep.header->lpt_pages != LPT_PAGES))
		err = -EPROTO;
	else
		err = gmem_lpt_init(&core->lpt, LPT_PAGES, fd);
	if (err && fd >= 0)
		close(fd);
	return err;
}

/* From here on a successor can take over. */
static int begin_state(struct gmem_core *core)
{
	struct gmem_keep *keep = &core->keep;
	int err;

	if (!gmem_keeps(keep) || core->recovering)
		return 0;
	keep->header->window_base = core->window.base;
	keep->header->window_bytes = core->window.bytes;
	keep->header->lpt_pages = core->lpt.pages;
	keep->header->magic = GMEM_STATE_MAGIC;
	err = gmem_keep_fd(keep, core->lpt.file->fd, "lpt");
	return err ? err : gmem_keep_fd(keep, keep->file->fd, "state");
}

static uint64_t host_bytes(void)
{
	return (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
}

static int make_host(struct gmem_core *core, uint64_t limit)
{
	uint64_t all = limit > host_bytes() ? limit : host_bytes();
	struct gmem_hnode *host;
	int err = gmem_hnode_create(core, GMEM_HOST, "host", all, &host);

	if (err)
		return err;
	if (limit)
		gmem_hnode_set_limit(host, limit);
	host->info.page_bytes_mask = 1ull << GMEM_SHIFT_4K | 1ull << GMEM_SHIFT_64K | 1ull << GMEM_SHIFT_2M;
	host->info.caps = GMEM_CAP_REPLAYABLE | GMEM_CAP_COHERENT | GMEM_CAP_SAME_VA | GMEM_CAP_CPU_VISIBLE;
	atomic_store(&core->hnodes[GMEM_HOST], host);
	return 0;
}

/* Up to where the window is; what fails leaves no more than gmem_core_create() undoes at no_window. */
static int prepare(struct gmem_core *core, const struct gmem_core_config *config, uint32_t threads)
{
	int err;

	gmem_crash_init();
	core->overcommit = config->overcommit;
	core->policy = gmem_policy_find(config->policy);
	core->fault_ahead = !config->no_fault_ahead;
	core->next_id = 1;
	core->keep.socket = -1;
	core->hold_ns = config->hold_ns;
	gmem_watch_init(&core->watch, config->stuck_ns);
	gmem_trace_init(&core->trace);
	gmem_mutex_init(&core->devices_lock, GMEM_RANK_DEVICES);
	gmem_rwlock_init(&core->sessions_lock, GMEM_RANK_SESSIONS);
	gmem_mutex_init(&core->pools_lock, GMEM_RANK_POOLS);
	gmem_mutex_init(&core->tenants_lock, GMEM_RANK_TENANTS);
	err = threads > GMEM_THREADS_MAX || !core->policy ? -EINVAL : gmem_copy_guard_init();
	if (!err)
		err = gmem_keep_init(&core->keep, config->keep_socket ? config->keep_socket : -1, config->keep_max_fds, config->kept,
				     config->kept_count);
	if (!err && gmem_keep_recovers(&core->keep)) {
		core->recovering = true;
		core->next_id = atomic_load(&core->keep.header->next_id);
	}
	if (!err)
		err = probe(core, config);
	if (!err)
		err = set_window(core, config);
	return err;
}

int gmem_core_create(const struct gmem_core_config *config, struct gmem_core **ret)
{
	struct gmem_core *core = calloc(1, sizeof(*core));
	uint32_t threads = config->fault_threads ? config->fault_threads : DEFAULT_FAULT_THREADS;
	int err;

	if (!core)
		return -ENOMEM;
	err = prepare(core, config, threads);
	if (err)
		goto no_window;
	err = make_lpt(core);
	if (err)
		goto no_lpt;
	err = make_host(core, config->host_limit_bytes);
	if (err)
		goto no_host;
	err = gmem_events_init(&core->events);
	if (err)
		goto no_events;
	err = gmem_faults_start(core, threads);
	if (err)
		goto no_faults;
	err = gmem_rings_start(core);
	if (err)
		goto no_rings;
	err = gmem_reclaimer_start(core->hnodes[GMEM_HOST]);
	if (err)
		goto no_reclaimer;
	err = gmem_watch_start(core);
	if (err)
		goto no_watch;
	err = core->recovering ? gmem_recover_load(core) : begin_state(core);
	if (err)
		goto no_state;
	*ret = core;
	return 0;
no_state:
	if (core->recovering) /* nothing has been touched, and half of it is made: the process ends */
		return err;
	gmem_watch_stop(core);
no_watch:
	gmem_reclaimer_stop(core->hnodes[GMEM_HOST]);
no_reclaimer:
	gmem_rings_stop(core);
no_rings:
	gmem_faults_stop(core);
no_faults:
	gmem_events_deinit(&core->events);
no_events:
	gmem_hnode_destroy(core->hnodes[GMEM_HOST]);
no_host:
	gmem_lpt_deinit(&core->lpt);
no_lpt:
	gmem_range_deinit(&core->va[GMEM_CLASS_SMALL]);
	gmem_range_deinit(&core->va[GMEM_CLASS_HUGE]);
no_window:
	gmem_keep_deinit(&core->keep);
	gmem_watch_deinit(&core->watch);
	gmem_trace_deinit(&core->trace);
	if (core->features.uffd_device)
		close(core->features.uffd_device_fd);
	free(core);
	return err;
}

static uint64_t any_session(struct gmem_core *core)
{
	uint64_t id = 0;

	gmem_rwlock_read(&core->sessions_lock);
	for (size_t b = 0; b < GMEM_SESSION_BUCKETS && !id; b++)
		if (core->sessions[b])
			id = core->sessions[b]->id;
	gmem_rwlock_unlock(&core->sessions_lock);
	return id;
}

void gmem_core_destroy(struct gmem_core *core)
{
	struct gmem_hnode *host = core->hnodes[GMEM_HOST];
	uint64_t id;

	/* Not taken over: all of it is the next one's. The process ends. */
	if (core->recovering)
		return;

	/* everything has to come home now, whatever the limit */
	gmem_hnode_set_limit(host, host->info.capacity_bytes);
	for (int h = 1; h < GMEM_HNODE_MAX; h++)
		if (gmem_core_hnode(core, h) && gmem_device_detach(core, h, true))
			gmem_core_post(core, GMEM_EVENT_DEVICE_LOST, 0, 0, 0, h, -EIO);
	gmem_pools_complete(core);
	atomic_store(&core->stopping, true);
	gmem_pools_end(core);
	while ((id = any_session(core)))
		gmem_session_destroy(core, id);
	gmem_watch_stop(core);
	gmem_rings_stop(core);
	gmem_faults_stop(core);
	for (struct gmem_hnode *hnode = core->retired, *next; hnode; hnode = next) {
		next = hnode->next_retired;
		gmem_hnode_destroy(hnode);
	}
	for (int h = 0; h < GMEM_HNODE_MAX; h++)
		if (gmem_core_hnode(core, h)) {
			gmem_reclaimer_stop(core->hnodes[h]);
			gmem_hnode_destroy(core->hnodes[h]);
		}
	gmem_keep_end(&core->keep);
	gmem_events_deinit(&core->events);
	gmem_lpt_deinit(&core->lpt);
	gmem_keep_deinit(&core->keep);
	gmem_range_deinit(&core->va[GMEM_CLASS_SMALL]);
	gmem_range_deinit(&core->va[GMEM_CLASS_HUGE]);
	gmem_mutex_deinit(&core->devices_lock);
	gmem_rwlock_deinit(&core->sessions_lock);
	gmem_mutex_deinit(&core->pools_lock);
	gmem_mutex_deinit(&core->tenants_lock);
	gmem_watch_deinit(&core->watch);
	gmem_trace_deinit(&core->trace);
	if (core->features.uffd_device)
		close(core->features.uffd_device_fd);
	free(core);
}

void gmem_core_features(struct gmem_core *core, struct gmem_core_features *ret)
{
	*ret = core->features;
}

void gmem_core_window(struct gmem_core *core, struct gmem_window *ret)
{
	*ret = core->window;
}

void gmem_core_stats(struct gmem_core *core, struct gmem_core_stats *ret)
{
	const struct gmem_stats *s = &core->stats;

	*ret = (struct gmem_core_stats){
		.host_faults = gmem_counter(&s->host_faults), .device_faults = gmem_counter(&s->device_faults),
		.write_protect_faults = gmem_counter(&s->write_protect_faults),
		.spurious_faults = gmem_counter(&s->spurious_faults),
		.first_touches = gmem_counter(&s->first_touches), .h2d_bytes = gmem_counter(&s->h2d_bytes),
		.d2h_bytes = gmem_counter(&s->d2h_bytes), .d2d_bytes = gmem_counter(&s->d2d_bytes),
		.duplicates = gmem_counter(&s->duplicates), .invalidations = gmem_counter(&s->invalidations),
		.evictions = gmem_counter(&s->evictions), .evicted_clean = gmem_counter(&s->evicted_clean),
		.prefetched_pages = gmem_counter(&s->prefetched_pages),
		.ahead_pages = gmem_counter(&s->ahead_pages),
		.discarded_pages = gmem_counter(&s->discarded_pages),
		.poisoned_pages = gmem_counter(&s->poisoned_pages), .retries = gmem_counter(&s->retries),
		.leftovers = gmem_counter(&s->leftovers),
		.outside_faults = gmem_counter(&s->outside_faults),
		.evictions_stopped = gmem_counter(&s->evictions_stopped),
		.throttled_faults = gmem_counter(&s->throttled_faults),
		.parked_faults = gmem_counter(&s->parked_faults),
		.aged_pages = gmem_counter(&s->aged_pages), .migration_ns = gmem_counter(&s->migration_ns),
		.fault_ns = gmem_counter(&s->fault_ns), .sessions = gmem_counter(&core->session_count),
		.contexts = gmem_counter(&core->context_count), .regions = gmem_counter(&core->region_count),
		.objects = gmem_counter(&core->object_count), .lpt_bytes = gmem_lpt_bytes(&core->lpt),
		.ring_requests = gmem_counter(&s->ring_requests), .ring_errors = gmem_counter(&s->ring_errors),
		.stuck_reports = gmem_counter(&s->stuck_reports),
	};
	gmem_mutex_lock(&core->events.lock);
	ret->events_lost = core->events.lost;
	gmem_mutex_unlock(&core->events.lock);
}

int gmem_event_fd(struct gmem_core *core)
{
	return core->events.fd;
}

size_t gmem_event_read(struct gmem_core *core, struct gmem_event *events, size_t capacity)
{
	return gmem_events_read(&core->events, events, capacity);
}
