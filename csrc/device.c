/* SPDX-License-Identifier: Apache-2.0
 *
 * Devices and contexts: attaching a driver as an hnode, opening it for a session, bringing everything home again.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <gmem/internal.h>
#include <gmem/reclaim.h>
#include <gmem/tier.h>
#include <gmem/uffd.h>

static int refuse(const struct gmem_driver_config *config, int err, const char *why)
{
	if (config->message && !config->message[0])
		snprintf(config->message, GMEM_MESSAGE_MAX, "%s", why);
	return err;
}

/* wanted: 0: any. */
static int free_hnid_locked(struct gmem_core *core, const char *name, int wanted)
{
	int free_hnid = wanted ? -EEXIST : -ENOSPC;

	for (int h = GMEM_HNODE_MAX - 1; h >= 0; h--) {
		struct gmem_hnode *hnode = gmem_core_hnode(core, h);

		if (hnode && !strcmp(hnode->name, name))
			return -EEXIST;
		if (!hnode && h != GMEM_HOST && (!wanted || h == wanted))
			free_hnid = h;
	}
	return free_hnid;
}

/* A batch of one is as good as the op for one. The table is the driver's own, perhaps of an older header. */
static bool can_store(const struct gmem_driver_ops *ops)
{
	struct gmem_driver_ops known = { 0 };

	memcpy(&known, ops, ops->size < sizeof(known) ? ops->size : sizeof(known));
	return (known.peer_map || known.peer_map_batch) && (known.peer_unmap || known.peer_unmap_batch);
}

static bool can_frame(const struct gmem_driver_ops *ops)
{
	return ops->size >= sizeof(*ops) && ops->mem_create && ops->mem_destroy && ops->mem_alloc && ops->mem_free &&
	       ops->mem_at && ops->pmap_open && ops->pmap_map && ops->pmap_flush && ops->pmap_protect &&
	       ops->pmap_release && ops->pmap_destroy && ops->copy;
}

static int check_info(const struct gmem_driver_config *config, const struct gmem_driver_ops *ops,
		      const struct gmem_device_info *info)
{
	if (info->capacity_bytes < 4096)
		return refuse(config, -EINVAL, "capacity: smaller than one page of 4096 bytes");
	if ((info->caps & GMEM_CAP_PEER) && !can_store(ops))
		return refuse(config, -EINVAL, "driver: a peer needs peer_map and peer_unmap, or their batches");
	if (info->assured_bytes > info->capacity_bytes)
		return refuse(config, -EINVAL, "driver: assures more than its capacity");
	if (!(info->caps & (GMEM_CAP_PEER | GMEM_CAP_CPU_VISIBLE | GMEM_CAP_OWN_FRAMES)))
		return refuse(config, -EINVAL, "driver: needs GMEM_CAP_PEER, GMEM_CAP_CPU_VISIBLE or GMEM_CAP_OWN_FRAMES");
	if ((info->caps & GMEM_CAP_OWN_FRAMES) && !can_frame(ops))
		return refuse(config, -EINVAL, "driver: one that makes its own frames needs mem_*, pmap_* and copy");
	return 0;
}

static int make_hnode(struct gmem_core *core, int hnid, const struct gmem_driver_ops *ops,
		      const struct gmem_driver_config *config, struct gmem_device *device, struct gmem_hnode **ret)
{
	struct gmem_device_info info = { 0 };
	struct gmem_hnode *hnode;
	int err = ops->info(device, &info);

	if (!err)
		err = check_info(config, ops, &info);
	if (!err)
		err = gmem_hnode_create(core, hnid, config->name, info.capacity_bytes, &hnode);
	if (err)
		return err;
	memcpy(&hnode->ops_copy, ops, ops->size < sizeof(*ops) ? ops->size : sizeof(*ops));
	hnode->ops = &hnode->ops_copy;
	hnode->device = device;
	hnode->info = info;
	atomic_init(&hnode->rank, GMEM_RANK_LAST);
	err = gmem_hnode_is_peer(hnode) || gmem_hnode_own_frames(hnode) ? gmem_hnode_relay_create(hnode) : 0;
	if (!err)
		err = gmem_reclaimer_start(hnode);
	if (err) {
		gmem_hnode_destroy(hnode);
		return err;
	}
	*ret = hnode;
	return 0;
}

static int attach(struct gmem_core *core, const struct gmem_driver_ops *ops, const struct gmem_driver_config *config,
		  int wanted, int *ret_hnid)
{
	struct gmem_driver_config known = *config;
	struct gmem_driver_keep *keep = NULL;
	struct gmem_hnode *hnode;
	struct gmem_device *device;
	int hnid, err;

	if (config->message)
		config->message[0] = '\0';
	if (!ops || ops->abi != GMEM_DRIVER_ABI || !ops->probe || !ops->info)
		return refuse(config, -EINVAL, "driver: wrong ABI version, or without probe and info");
	if (!config->name || !config->name[0] || strlen(config->name) >= GMEM_NAME_MAX)
		return refuse(config, -EINVAL, "name: empty or too long");
	gmem_mutex_lock(&core->devices_lock);
	hnid = free_hnid_locked(core, config->name, wanted);
	if (hnid < 0) {
		err = refuse(config, hnid, hnid == -EEXIST ? "name: already attached" : "too many devices");
		goto out;
	}
	known.key_count = core->lpt.pages;
	known.keep = keep = gmem_keeps(&core->keep) ? calloc(1, sizeof(*keep)) : NULL;
	if (keep) {
		gmem_driver_keep_init(keep, &core->keep, hnid);
		keep->takes_over = core->recovering;
	}
	err = ops->probe(&known, &device);
	if (err) {
		refuse(config, err, "the driver's probe failed");
		goto out;
	}
	err = make_hnode(core, hnid, ops, config, device, &hnode);
	if (err) {
		refuse(config, err, "the device could not be set up");
		if (ops->remove)
			ops->remove(device);
		goto out;
	}
	hnode->keep = keep;
	atomic_store(&core->hnodes[hnid], hnode);
	*ret_hnid = hnid;
out:
	if (err && keep && !core->recovering)
		gmem_driver_forget(keep);
	if (err) {
		gmem_driver_keep_deinit(keep);
		free(keep);
	}
	gmem_mutex_unlock(&core->devices_lock);
	return err;
}

int gmem_device_attach(struct gmem_core *core, const struct gmem_driver_ops *ops,
		       const struct gmem_driver_config *config, int *ret_hnid)
{
	return attach(core, ops, config, 0, ret_hnid);
}

int gmem_device_attach_at(struct gmem_core *core, const struct gmem_driver_ops *ops,
			  const struct gmem_driver_config *config, int hnid)
{
	return hnid > GMEM_HOST && hnid < GMEM_HNODE_MAX ? attach(core, ops, config, hnid, &hnid) : -EINVAL;
}

static struct gmem_view *context_on(struct gmem_core *core, int hnid)
{
	struct gmem_view *view = NULL;

	gmem_rwlock_read(&core->sessions_lock);
	for (size_t b = 0; b < GMEM_SESSION_BUCKETS && !view; b++)
		for (struct gmem_session *s = core->sessions[b]; s && !view; s = s->next)
			view = gmem_as_view(&s->as, hnid);
	gmem_rwlock_unlock(&core->sessions_lock);
	return view;
}

static void end_contexts(struct gmem_core *core, int hnid)
{
	struct gmem_view *view;

	while ((view = context_on(core, hnid))) {
		if (view->pidfd >= 0 && !view->pmap) /* else it is the client's own process, which hears of it */
			syscall(SYS_pidfd_send_signal, view->pidfd, SIGKILL, NULL, 0);
		gmem_session_unwatch(view->session, view);
		gmem_view_unref(view);
	}
}

static void set_draining(struct gmem_hnode *hnode, bool draining)
{
	atomic_store(&hnode->draining, draining);
}

int gmem_device_detach(struct gmem_core *core, int hnid, bool force)
{
	struct gmem_hnode *hnode;
	int err = 0;

	if (hnid <= GMEM_HOST || hnid >= GMEM_HNODE_MAX)
		return -EINVAL;
	gmem_mutex_lock(&core->devices_lock);
	hnode = gmem_core_hnode(core, hnid);
	if (!hnode)
		err = -ENOENT;
	else if (!force && (atomic_load(&hnode->contexts) || atomic_load(&core->imports[hnid])))
		err = -EBUSY;
	if (err)
		goto out;
	set_draining(hnode, true);
	end_contexts(core, hnid);
	err = gmem_reclaim_drain(hnode);
	if (err) {
		set_draining(hnode, false);
		goto out;
	}
	gmem_reclaimer_stop(hnode);
	atomic_store(&core->hnodes[hnid], NULL);
	gmem_hnode_await_visitors(hnode);
	if (hnode->ops->remove)
		hnode->ops->remove(hnode->device);
	gmem_driver_forget(hnode->keep);
	hnode->next_retired = core->retired;
	core->retired = hnode;
out:
	gmem_mutex_unlock(&core->devices_lock);
	return err;
}

int gmem_limit(struct gmem_core *core, int hnid, uint64_t bytes)
{
	struct gmem_hnode *hnode = gmem_core_hnode(core, hnid);
	uint64_t before, pinned;
	int err = 0;

	if (!hnode)
		return -ENODEV;
	if (bytes < GMEM_HUGE_BYTES || bytes > hnode->info.capacity_bytes)
		return -EINVAL;
	gmem_mutex_lock(&core->devices_lock);
	gmem_mutex_lock(&hnode->lock);
	before = gmem_counter(&hnode->limit_bytes);
	pinned = hnode->pinned_bytes;
	if (bytes >= pinned)
		gmem_hnode_set_limit(hnode, bytes);
	gmem_mutex_unlock(&hnode->lock);
	if (bytes < pinned)
		err = -EBUSY;
	else if (bytes < before)
		err = gmem_reclaim_patiently(hnode, NULL, gmem_counter(&hnode->low_bytes));
	if (err && err != -EBUSY)
		gmem_hnode_set_limit(hnode, before);
	gmem_mutex_unlock(&core->devices_lock);
	return err;
}

uint32_t gmem_device_caps(struct gmem_core *core, int hnid)
{
	struct gmem_hnode *hnode = gmem_core_hnode(core, hnid);

	return hnode ? hnode->info.caps : 0;
}

/* ---- contexts ---- */

static int context_device(struct gmem_core *core, int hnid)
{
	struct gmem_hnode *hnode = gmem_core_hnode(core, hnid);

	if (!hnode || hnid == GMEM_HOST)
		return -ENODEV;
	return hnode->info.caps & GMEM_CAP_COMPUTE ? 0 : -EOPNOTSUPP;
}

int gmem_context_files(struct gmem_core *core, uint64_t id, int hnid, int ret_fds[GMEM_CLASS_COUNT])
{
	struct gmem_session *session;
	int err = context_device(core, hnid);

	if (err)
		return err;
	session = gmem_session_get(core, id);
	if (!session)
		return -ENOENT;
	if (gmem_hnode_own_frames(gmem_core_hnode(core, hnid)))
		err = -ENOTSUP; /* gmem_context_channel() */
	else
		err = gmem_session_borrow(session, hnid, ret_fds);
	gmem_session_unref(session);
	return err;
}

/* The window, and what the process has mapped beside it. */
static int register_all(struct gmem_session *session, int uffd)
{
	const struct gmem_window *window = &session->core->window;
	int err = 0;

	for (int c = 0; !err && c < GMEM_CLASS_COUNT; c++)
		if (c == GMEM_CLASS_SMALL || session->core->hugepages)
			err = gmem_uffd_register(uffd, window->part_base[c], window->part_bytes[c]);
	gmem_rwlock_read(&session->as.lock);
	for (size_t i = 0; !err && i < session->as.count; i++) {
		const struct gmem_region *region = session->as.regions[i];

		if (region->va - window->base >= window->bytes)
			err = gmem_uffd_register(uffd, region->va, region->bytes);
	}
	gmem_rwlock_unlock(&session->as.lock);
	return err;
}

int gmem_context_attach(struct gmem_core *core, uint64_t id, int hnid, int uffd, int pidfd, pid_t pid,
			uint64_t *ret_context)
{
	struct gmem_session *session = gmem_session_get(core, id);
	struct gmem_hnode *hnode = gmem_core_hnode(core, hnid);
	uint64_t context = gmem_keep_next_id(&core->keep, &core->next_id);
	struct gmem_view *view;
	int err = !session ? -ENOENT : context_device(core, hnid);

	if (!err && gmem_hnode_own_frames(hnode))
		err = -ENOTSUP;
	if (!err)
		err = gmem_uffd_check(uffd);
	if (!err)
		err = gmem_uffd_api(uffd, gmem_session_features(core, false));
	if (!err)
		err = register_all(session, uffd);
	if (!err) {
		atomic_fetch_add(&core->context_count, 1);
		atomic_fetch_add(&hnode->contexts, 1);
		err = gmem_session_watch(session, hnid, context, uffd, pidfd, pid, false, &view);
		if (err) {
			atomic_fetch_sub(&core->context_count, 1);
			atomic_fetch_sub(&hnode->contexts, 1);
		}
	}
	if (err) {
		if (uffd >= 0)
			close(uffd);
		if (pidfd >= 0)
			close(pidfd);
	} else {
		*ret_context = context;
	}
	gmem_session_unref(session);
	return err;
}

int gmem_context_channel(struct gmem_core *core, uint64_t id, int hnid, pid_t pid, uint64_t *ret_context, int *ret_fd)
{
	struct gmem_session *session = gmem_session_get(core, id);
	struct gmem_hnode *hnode = gmem_core_hnode(core, hnid);
	uint64_t context = gmem_keep_next_id(&core->keep, &core->next_id);
	struct gmem_pmap *pmap = NULL;
	int pair[2] = { -1, -1 }, err = !session ? -ENOENT : context_device(core, hnid);

	if (!err && !gmem_hnode_own_frames(hnode))
		err = -ENOTSUP;
	if (!err && socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
		err = -errno;
	if (!err)
		err = hnode->ops->pmap_open(hnode->device, id, pair[0], &pmap);
	if (!err) {
		atomic_fetch_add(&core->context_count, 1);
		atomic_fetch_add(&hnode->contexts, 1);
		err = gmem_session_view_pmap(session, hnode, context, pmap, pair[0], pid, NULL);
		if (err) {
			hnode->ops->pmap_destroy(pmap);
			atomic_fetch_sub(&core->context_count, 1);
			atomic_fetch_sub(&hnode->contexts, 1);
		}
	} else if (pair[0] >= 0) {
		close(pair[0]);
	}
	if (err && pair[1] >= 0)
		close(pair[1]);
	if (!err) {
		*ret_context = context;
		*ret_fd = pair[1];
	}
	gmem_session_unref(session);
	return err;
}

int gmem_context_detach(struct gmem_core *core, uint64_t context)
{
	struct gmem_view *view = gmem_context_find(core, context);

	if (!view)
		return -ENOENT;
	gmem_session_unwatch(view->session, view);
	gmem_view_unref(view);
	return 0;
}

/* ---- what there is ---- */

static void fill_stats(struct gmem_hnode *hnode, struct gmem_hnode_stats *ret)
{
	*ret = (struct gmem_hnode_stats){
		.hnid = hnode->hnid, .info = hnode->info, .contexts = atomic_load(&hnode->contexts),
		.faults = gmem_counter(&hnode->faults), .in_bytes = gmem_counter(&hnode->in_bytes),
		.out_bytes = gmem_counter(&hnode->out_bytes), .evictions = gmem_counter(&hnode->evictions),
		.evicted_clean = gmem_counter(&hnode->evicted_clean), .errors = gmem_counter(&hnode->errors),
		.policy = hnode->policy.ops->name,
	};
	ret->info.capacity_bytes = gmem_counter(&hnode->limit_bytes);
	memcpy(ret->name, hnode->name, sizeof(ret->name));
	snprintf(ret->driver, sizeof(ret->driver), "%s", hnode->ops ? hnode->ops->name : "host");
	gmem_mutex_lock(&hnode->lock);
	ret->used_bytes = hnode->used_bytes;
	ret->peak_bytes = hnode->peak_bytes;
	ret->pinned_bytes = hnode->pinned_bytes;
	gmem_mutex_unlock(&hnode->lock);
	if (hnode->ops && hnode->ops->peer_usage && hnode->ops->peer_usage(hnode->device, &ret->usage))
		ret->usage = (struct gmem_device_usage){ 0 };
	if (hnode->ops && hnode->ops->health)
		ret->health = hnode->ops->health(hnode->device);
	if (hnode->ops && hnode->ops->last_error)
		snprintf(ret->last_error, sizeof(ret->last_error), "%s", hnode->ops->last_error(hnode->device));
}

void gmem_hnodes(struct gmem_core *core, struct gmem_hnode_stats *hnodes, size_t *ret_count)
{
	*ret_count = 0;
	gmem_mutex_lock(&core->devices_lock); /* so that none is removed while its driver is asked */
	for (int h = 0; h < GMEM_HNODE_MAX; h++) {
		struct gmem_hnode *hnode = gmem_core_hnode(core, h);

		if (hnode)
			fill_stats(hnode, &hnodes[(*ret_count)++]);
	}
	gmem_mutex_unlock(&core->devices_lock);
}
