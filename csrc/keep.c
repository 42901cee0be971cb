/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <unistd.h>

#include <gmem/crash.h>
#include <gmem/keep.h>

#define HEADER_BYTES 4096
#define RECORDS_MAX (1u << 20)
#define STATE_BYTES (HEADER_BYTES + (uint64_t)RECORDS_MAX * sizeof(struct gmem_record))
#define SEND_TIMEOUT_S 5 /* whoever holds descriptors is not waited for longer */

/* ---- descriptors ---- */

static int send_message(struct gmem_keep *keep, const char *text, int fd)
{
	struct iovec part = { (void *)(uintptr_t)text, strlen(text) };
	union {
		struct cmsghdr head;
		char room[CMSG_SPACE(sizeof(int))];
	} control = { 0 };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1 };

	if (fd >= 0) {
		message.msg_control = &control;
		message.msg_controllen = sizeof(control.room);
		control.head = (struct cmsghdr){ .cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET,
						 .cmsg_type = SCM_RIGHTS };
		memcpy(CMSG_DATA(&control.head), &fd, sizeof(fd));
	}
	while (sendmsg(keep->socket, &message, MSG_NOSIGNAL) < 0)
		if (errno != EINTR)
			return -errno;
	return 0;
}

int gmem_keep_fd(struct gmem_keep *keep, int fd, const char *format, ...)
{
	char name[GMEM_KEEP_NAME], text[2 * GMEM_KEEP_NAME];
	va_list args;
	bool full;
	int err;

	if (!gmem_keeps(keep))
		return 0;
	va_start(args, format);
	vsnprintf(name, sizeof(name), format, args);
	va_end(args);
	gmem_mutex_lock(&keep->lock);
	full = keep->held_fds >= keep->max_fds;
	keep->held_fds += !full;
	gmem_mutex_unlock(&keep->lock);
	if (full)
		return -ENFILE;
	/* without FDPOLL=0 what polls an error or a hang-up is dropped, before its successor could learn of it */
	snprintf(text, sizeof(text), "FDSTORE=1\nFDNAME=%s\nFDPOLL=0\n", name);
	err = send_message(keep, text, fd);
	gmem_crash(GMEM_CRASH_FD_HELD);
	return err;
}

static void forget(struct gmem_keep *keep, const char *name)
{
	char text[2 * GMEM_KEEP_NAME];

	gmem_mutex_lock(&keep->lock);
	keep->held_fds -= keep->held_fds > 0;
	gmem_mutex_unlock(&keep->lock);
	snprintf(text, sizeof(text), "FDSTOREREMOVE=1\nFDNAME=%s\n", name);
	send_message(keep, text, -1);
}

void gmem_keep_forget(struct gmem_keep *keep, const char *format, ...)
{
	char name[GMEM_KEEP_NAME];
	va_list args;

	if (!gmem_keeps(keep))
		return;
	va_start(args, format);
	vsnprintf(name, sizeof(name), format, args);
	va_end(args);
	forget(keep, name);
}

int gmem_keep_take(struct gmem_keep *keep, const char *format, ...)
{
	char name[GMEM_KEEP_NAME];
	va_list args;
	int fd = -1;

	va_start(args, format);
	vsnprintf(name, sizeof(name), format, args);
	va_end(args);
	gmem_mutex_lock(&keep->lock);
	for (size_t i = 0; i < keep->left_count; i++)
		if (!strcmp(keep->left[i].name, name)) {
			fd = keep->left[i].fd;
			keep->left[i] = keep->left[--keep->left_count];
			break;
		}
	gmem_mutex_unlock(&keep->lock);
	return fd;
}

void gmem_keep_drop_left(struct gmem_keep *keep)
{
	for (size_t i = 0; i < keep->left_count; i++) {
		close(keep->left[i].fd);
		forget(keep, keep->left[i].name);
	}
	keep->left_count = 0;
}

/* ---- records ---- */

static int map_state(struct gmem_keep *keep)
{
	uint8_t *at = mmap(NULL, STATE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, keep->file->fd, 0);

	if (at == MAP_FAILED)
		return -errno;
	madvise(at, STATE_BYTES, MADV_DONTFORK);
	keep->header = (struct gmem_state_header *)(void *)at;
	keep->records = (struct gmem_record *)(void *)(at + HEADER_BYTES);
	return 0;
}

static int make_state(struct gmem_keep *keep)
{
	int err = gmem_file_create("gmem-state", GMEM_CLASS_SMALL, STATE_BYTES, 0, &keep->file);

	if (!err)
		err = map_state(keep);
	if (err)
		return err;
	keep->bumped = 1;
	keep->header->version = GMEM_STATE_VERSION;
	keep->header->record_bytes = sizeof(struct gmem_record);
	return 0; /* magic comes when everything else has been filled in */
}

static bool is_ours(const struct gmem_state_header *header)
{
	return header->magic == GMEM_STATE_MAGIC && header->version == GMEM_STATE_VERSION &&
	       header->record_bytes == sizeof(struct gmem_record);
}

/* Of two that say the same thing, the newer one counts. */
static void settle_records(struct gmem_keep *keep)
{
	for (uint32_t n = 1; n < keep->bumped; n++) {
		struct gmem_record *record = &keep->records[n];

		if (atomic_load(&record->kind) && record->replaces && record->replaces < RECORDS_MAX)
			atomic_store(&keep->records[record->replaces].kind, GMEM_RECORD_FREE);
		record->replaces = 0;
	}
}

static int push_free_locked(struct gmem_keep *keep, uint32_t number)
{
	if (keep->free_count == keep->free_capacity) {
		uint32_t capacity = keep->free_capacity ? 2 * keep->free_capacity : 256;
		uint32_t *grown = realloc(keep->free, capacity * sizeof(*grown));

		if (!grown)
			return -ENOMEM; /* that number is not used again */
		keep->free = grown;
		keep->free_capacity = capacity;
	}
	keep->free[keep->free_count++] = number;
	return 0;
}

static int adopt_state(struct gmem_keep *keep, int fd)
{
	struct stat st;
	off_t end = HEADER_BYTES, data;
	int err = fstat(fd, &st) || (uint64_t)st.st_size != STATE_BYTES ? -EPROTO : 0;

	if (!err)
		err = gmem_file_adopt(fd, GMEM_CLASS_SMALL, STATE_BYTES, 0, &keep->file);
	if (err) {
		close(fd);
		return err;
	}
	err = map_state(keep);
	if (err)
		return err;
	if (!is_ours(keep->header))
		return -EPROTO;
	while ((data = lseek(fd, end, SEEK_DATA)) >= 0)
		end = lseek(fd, data, SEEK_HOLE);
	keep->bumped = (uint32_t)(((uint64_t)end - HEADER_BYTES + sizeof(struct gmem_record) - 1) /
				  sizeof(struct gmem_record));
	if (keep->bumped < 1)
		keep->bumped = 1;
	if (keep->bumped > RECORDS_MAX)
		keep->bumped = RECORDS_MAX;
	settle_records(keep);
	for (uint32_t n = 1; n < keep->bumped; n++)
		if (!atomic_load(&keep->records[n].kind))
			push_free_locked(keep, n);
	return 0;
}

int gmem_keep_init(struct gmem_keep *keep, int socket, uint32_t max_fds, const struct gmem_kept_fd *left,
		   size_t left_count)
{
	const struct timeval timeout = { SEND_TIMEOUT_S, 0 };
	int fd, err;

	*keep = (struct gmem_keep){ .socket = socket, .max_fds = max_fds };
	gmem_mutex_init(&keep->lock, GMEM_RANK_KEEP);
	if (!gmem_keeps(keep))
		return 0;
	setsockopt(socket, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
	keep->left = left_count ? malloc(left_count * sizeof(*left)) : NULL;
	if (left_count && !keep->left)
		return -ENOMEM;
	if (left_count)
		memcpy(keep->left, left, left_count * sizeof(*left));
	keep->left_count = left_count;
	keep->held_fds = (uint32_t)left_count;
	fd = gmem_keep_take(keep, "state");
	if (fd < 0)
		return make_state(keep);
	err = adopt_state(keep, fd);
	return err;
}

bool gmem_keep_recovers(const struct gmem_keep *keep)
{
	return gmem_keeps(keep) && keep->header->magic == GMEM_STATE_MAGIC;
}

void gmem_keep_deinit(struct gmem_keep *keep)
{
	if (keep->header)
		munmap(keep->header, STATE_BYTES);
	gmem_file_unref(keep->file);
	for (size_t i = 0; i < keep->left_count; i++)
		close(keep->left[i].fd);
	free(keep->left);
	free(keep->free);
	if (gmem_keeps(keep))
		close(keep->socket);
	gmem_mutex_deinit(&keep->lock);
}

static uint32_t take_number(struct gmem_keep *keep)
{
	uint32_t number = 0;

	gmem_mutex_lock(&keep->lock);
	if (keep->free_count)
		number = keep->free[--keep->free_count];
	else if (keep->bumped < RECORDS_MAX)
		number = keep->bumped++;
	gmem_mutex_unlock(&keep->lock);
	return number;
}

static void free_number(struct gmem_keep *keep, uint32_t number)
{
	gmem_mutex_lock(&keep->lock);
	push_free_locked(keep, number);
	gmem_mutex_unlock(&keep->lock);
}

int gmem_record_put(struct gmem_keep *keep, const struct gmem_record *record, uint32_t *number)
{
	uint32_t fresh, old = *number;
	struct gmem_record *at;

	if (!gmem_keeps(keep))
		return 0;
	fresh = take_number(keep);
	if (!fresh)
		return -ENOSPC;
	at = &keep->records[fresh];
	at->replaces = old;
	memcpy((uint8_t *)at + offsetof(struct gmem_record, id), (const uint8_t *)record + offsetof(struct gmem_record, id),
	       sizeof(*at) - offsetof(struct gmem_record, id));
	gmem_crash(GMEM_CRASH_RECORD_WRITTEN);
	atomic_store_explicit(&at->kind, atomic_load(&record->kind), memory_order_release);
	gmem_crash(GMEM_CRASH_RECORD_PUBLISHED);
	*number = fresh;
	if (old) {
		atomic_store_explicit(&keep->records[old].kind, GMEM_RECORD_FREE, memory_order_release);
		gmem_crash(GMEM_CRASH_RECORD_REPLACED);
		at->replaces = 0; /* before that number may come to mean something else */
		atomic_thread_fence(memory_order_release);
		free_number(keep, old);
	}
	return 0;
}

void gmem_record_drop(struct gmem_keep *keep, uint32_t *number)
{
	if (!*number)
		return;
	atomic_store_explicit(&keep->records[*number].kind, GMEM_RECORD_FREE, memory_order_release);
	free_number(keep, *number);
	*number = 0;
}

uint32_t gmem_record_next(struct gmem_keep *keep, enum gmem_record_kind kind, uint32_t number, struct gmem_record *ret)
{
	for (number++; number < keep->bumped; number++)
		if (atomic_load(&keep->records[number].kind) == kind) {
			memcpy(ret, &keep->records[number], sizeof(*ret));
			return number;
		}
	return 0;
}

uint64_t gmem_keep_next_id(struct gmem_keep *keep, _Atomic uint64_t *next)
{
	uint64_t id = atomic_fetch_add(next, 1), seen;

	if (!gmem_keeps(keep))
		return id;
	seen = atomic_load(&keep->header->next_id);
	while (seen <= id && !atomic_compare_exchange_weak(&keep->header->next_id, &seen, id + 1))
		;
	return id;
}

void gmem_keep_end(struct gmem_keep *keep)
{
	static const char *const names[] = { "state", "lpt" };

	if (!gmem_keeps(keep))
		return;
	keep->header->magic = 0;
	for (size_t i = 0; i < sizeof(names) / sizeof(*names); i++)
		forget(keep, names[i]);
}
