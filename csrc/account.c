/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include <gmem/account.h>
#include <gmem/devmem.h>
#include <gmem/internal.h>
#include <gmem/reclaim.h>

static struct gmem_tenant *find_tenant_locked(struct gmem_core *core, uid_t uid)
{
	struct gmem_tenant *tenant;

	for (tenant = core->tenants; tenant && tenant->uid != uid; tenant = tenant->next)
		;
	return tenant;
}

static struct gmem_tenant *make_tenant_locked(struct gmem_core *core, uid_t uid)
{
	struct gmem_tenant *tenant = calloc(1, sizeof(*tenant));

	if (!tenant)
		return NULL;
	tenant->uid = uid;
	tenant->core = core;
	for (int h = 0; h < GMEM_HNODE_MAX; h++)
		atomic_init(&tenant->shares[h].quota_bytes, gmem_counter(&core->uid_quota[h]));
	tenant->next = core->tenants;
	core->tenants = tenant;
	return tenant;
}

static int get_tenant(struct gmem_core *core, uid_t uid, struct gmem_tenant **ret)
{
	gmem_mutex_lock(&core->tenants_lock);
	*ret = find_tenant_locked(core, uid);
	if (!*ret)
		*ret = make_tenant_locked(core, uid);
	if (*ret)
		(*ret)->refs++;
	gmem_mutex_unlock(&core->tenants_lock);
	return *ret ? 0 : -ENOMEM;
}

static void put_tenant(struct gmem_tenant *tenant)
{
	struct gmem_core *core = tenant->core;
	struct gmem_tenant **at = &core->tenants;

	gmem_mutex_lock(&core->tenants_lock);
	if (--tenant->refs == 0) {
		while (*at != tenant)
			at = &(*at)->next;
		*at = tenant->next;
		free(tenant);
	}
	gmem_mutex_unlock(&core->tenants_lock);
}

static int write_record(struct gmem_account *account)
{
	struct gmem_record record = { .kind = GMEM_RECORD_ACCOUNT, .id = account->session_id };

	record.account.parent = account->parent ? account->parent->session_id : 0;
	record.account.uid = account->tenant->uid;
	return gmem_record_put(&account->core->keep, &record, &account->record);
}

int gmem_account_create(struct gmem_core *core, uint64_t session_id, uid_t uid, struct gmem_account *parent,
			uint32_t record, struct gmem_account **ret)
{
	struct gmem_account *account = calloc(1, sizeof(*account));
	int err = account ? get_tenant(core, uid, &account->tenant) : -ENOMEM;

	if (err) {
		free(account);
		return err;
	}
	account->refs = 1;
	account->core = core;
	account->record = record;
	account->session_id = session_id;
	account->file_bytes = core->window.bytes;
	for (int h = 0; h < GMEM_HNODE_MAX; h++)
		atomic_init(&account->shares[h].quota_bytes, gmem_counter(&core->session_quota[h]));
	account->parent = parent ? gmem_account_ref(parent) : NULL;
	gmem_mutex_init(&account->lock, GMEM_RANK_ACCOUNT);
	gmem_kept_init(&account->kept);
	err = record ? 0 : write_record(account);
	if (err)
		gmem_account_unref(account);
	else
		*ret = account;
	return err;
}

struct gmem_account *gmem_account_ref(struct gmem_account *account)
{
	atomic_fetch_add(&account->refs, 1);
	return account;
}

static void drop_file(struct gmem_account *account, int hnid, int class_)
{
	struct gmem_file *file = atomic_load(&account->files[hnid][class_]);

	if (!file)
		return;
	gmem_keep_forget(&account->core->keep, "file.%llu.%d.%d", (unsigned long long)account->session_id, hnid, class_);
	gmem_file_unref(file);
}

void gmem_account_unref(struct gmem_account *account)
{
	while (account && atomic_fetch_sub(&account->refs, 1) == 1) {
		struct gmem_account *parent = account->parent;

		for (int h = 0; h < GMEM_HNODE_MAX; h++)
			for (int c = 0; c < GMEM_CLASS_COUNT; c++) {
				drop_file(account, h, c);
				gmem_file_unref(atomic_load(&account->mems[h][c]));
			}
		for (struct gmem_file *file = account->retired, *next; file; file = next) {
			next = file->next;
			gmem_file_unref(file);
		}
		gmem_record_drop(&account->core->keep, &account->record);
		gmem_kept_deinit(&account->kept);
	gmem_mutex_deinit(&account->lock);
		put_tenant(account->tenant);
		free(account);
		account = parent;
	}
}

/* The predecessor's, or a new one. */
static int make_file(struct gmem_account *account, int hnid, enum gmem_class class_, struct gmem_file **ret)
{
	struct gmem_keep *keep = &account->core->keep;
	unsigned long long id = account->session_id;
	int fd = gmem_keep_take(keep, "file.%llu.%d.%d", id, hnid, class_), err;
	char name[64];

	if (fd >= 0)
		return gmem_file_adopt(fd, class_, account->file_bytes, id, ret);
	snprintf(name, sizeof(name), "gmem-%llu-%d", id, hnid);
	err = gmem_file_create(name, class_, account->file_bytes, id, ret);
	if (err)
		return err;
	err = gmem_keep_fd(keep, (*ret)->fd, "file.%llu.%d.%d", id, hnid, class_);
	if (err)
		gmem_file_unref(*ret);
	return err;
}

/* What is on a device that has gone is kept until the account ends: a late reader may look. Nothing is left in it. */
static int replace_mem_locked(struct gmem_account *account, struct gmem_hnode *hnode, enum gmem_class class_,
			      struct gmem_file **ret)
{
	_Atomic(struct gmem_file *) *at = &account->mems[hnode->hnid][class_];
	struct gmem_file *old = atomic_load(at);
	int err;

	if (old && old->hnode == hnode) {
		*ret = old;
		return 0;
	}
	err = gmem_devmem_create(hnode, class_, account->file_bytes, account->session_id, ret);
	if (err)
		return err;
	atomic_store(at, *ret);
	if (old) {
		old->next = account->retired;
		account->retired = old;
	}
	return 0;
}

static int account_mem(struct gmem_account *account, struct gmem_hnode *hnode, enum gmem_class class_,
		       struct gmem_file **ret)
{
	struct gmem_file *file = atomic_load(&account->mems[hnode->hnid][class_]);
	int err = 0;

	if (!file || file->hnode != hnode) {
		gmem_mutex_lock(&account->lock);
		err = replace_mem_locked(account, hnode, class_, &file);
		gmem_mutex_unlock(&account->lock);
	}
	if (!err)
		*ret = file;
	return err;
}

int gmem_account_file(struct gmem_account *account, int hnid, enum gmem_class class_, struct gmem_file **ret)
{
	struct gmem_hnode *hnode = atomic_load(&account->core->hnodes[hnid]);
	struct gmem_file *file = atomic_load(&account->files[hnid][class_]);
	int err = 0;

	if (hnode && gmem_hnode_own_frames(hnode))
		return account_mem(account, hnode, class_, ret);
	if (!file) {
		gmem_mutex_lock(&account->lock);
		file = atomic_load(&account->files[hnid][class_]);
		if (!file) {
			err = make_file(account, hnid, class_, &file);
			if (!err)
				atomic_store(&account->files[hnid][class_], file);
		}
		gmem_mutex_unlock(&account->lock);
	}
	if (!err)
		*ret = file;
	return err;
}

void gmem_account_map(struct gmem_account *account, int64_t bytes)
{
	atomic_fetch_add_explicit(&account->mapped_bytes, (uint64_t)bytes, memory_order_relaxed);
	atomic_fetch_add_explicit(&account->tenant->mapped_bytes, (uint64_t)bytes, memory_order_relaxed);
}

static uint64_t room(const struct gmem_share *share)
{
	uint64_t quota = gmem_counter(&share->quota_bytes), used = gmem_counter(&share->resident_bytes);

	return !quota ? UINT64_MAX : quota > used ? quota - used : 0;
}

uint64_t gmem_account_room(const struct gmem_account *account, int hnid)
{
	uint64_t mine = room(&account->shares[hnid]), ours = room(&account->tenant->shares[hnid]);

	return mine < ours ? mine : ours;
}

/* ---- quotas, as an operator sets them ---- */

void gmem_quota_default(struct gmem_core *core, int hnid, uint64_t session_bytes, uint64_t uid_bytes)
{
	if (hnid < 0 || hnid >= GMEM_HNODE_MAX)
		return;
	atomic_store(&core->session_quota[hnid], session_bytes);
	atomic_store(&core->uid_quota[hnid], uid_bytes);
	gmem_mutex_lock(&core->tenants_lock);
	for (struct gmem_tenant *tenant = core->tenants; tenant; tenant = tenant->next)
		atomic_store(&tenant->shares[hnid].quota_bytes, uid_bytes);
	gmem_mutex_unlock(&core->tenants_lock);
	gmem_rwlock_read(&core->sessions_lock);
	for (size_t b = 0; b < GMEM_SESSION_BUCKETS; b++)
		for (struct gmem_session *session = core->sessions[b]; session; session = session->next)
			atomic_store(&session->account->shares[hnid].quota_bytes, session_bytes);
	gmem_rwlock_unlock(&core->sessions_lock);
}

int gmem_quota_uid(struct gmem_core *core, uid_t uid, int hnid, uint64_t bytes)
{
	struct gmem_tenant *tenant;

	if (!gmem_core_hnode(core, hnid))
		return -ENODEV;
	gmem_mutex_lock(&core->tenants_lock);
	tenant = find_tenant_locked(core, uid);
	if (tenant)
		atomic_store(&tenant->shares[hnid].quota_bytes, bytes);
	gmem_mutex_unlock(&core->tenants_lock);
	return tenant ? 0 : -ENOENT;
}

int gmem_quota_session(struct gmem_core *core, uint64_t id, int hnid, uint64_t bytes)
{
	struct gmem_hnode *hnode = gmem_core_hnode(core, hnid);
	struct gmem_session *session;
	struct gmem_share *share;
	uint64_t before;
	int err = 0;

	if (!hnode)
		return -ENODEV;
	if (bytes && bytes < GMEM_HUGE_BYTES)
		return -EINVAL;
	session = gmem_session_get(core, id);
	if (!session)
		return -ENOENT;
	share = &session->account->shares[hnid];
	before = atomic_exchange(&share->quota_bytes, bytes);
	if (bytes && gmem_counter(&share->resident_bytes) > bytes)
		err = gmem_reclaim_patiently(hnode, session->account, 1);
	if (err)
		atomic_store(&share->quota_bytes, before);
	gmem_session_unref(session);
	return err;
}
