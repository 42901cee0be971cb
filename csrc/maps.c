/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <gmem/internal.h>
#include <gmem/maps.h>

static bool has_inode(const struct gmem_file *file, uint64_t inode)
{
	struct stat st;

	return file && !fstat(file->fd, &st) && st.st_ino == inode;
}

static struct gmem_file *pool_file_of(struct gmem_as *as, uint64_t inode)
{
	struct gmem_file *found = NULL;

	gmem_rwlock_read(&as->lock);
	for (size_t i = 0; !found && i < as->count; i++) {
		struct gmem_object *object = as->regions[i]->object;
		struct gmem_file *file = object->pooled ? atomic_load(&object->files->files[GMEM_HOST][object->class_]) : NULL;

		if (has_inode(file, inode))
			found = file;
	}
	gmem_rwlock_unlock(&as->lock);
	return found;
}

static struct gmem_file *file_of(struct gmem_session *session, uint64_t inode)
{
	struct gmem_account *account = session->account;

	for (; account; account = account->parent)
		for (int c = 0; c < GMEM_CLASS_COUNT; c++) {
			struct gmem_file *file = atomic_load(&account->files[GMEM_HOST][c]);

			if (has_inode(file, inode))
				return file;
		}
	return pool_file_of(&session->as, inode);
}

static int append(struct gmem_maps *maps, struct gmem_mapped piece)
{
	struct gmem_mapped *grown = maps->pieces;

	if (!(maps->count & (maps->count - 1)) || !maps->count)
		grown = realloc(maps->pieces, (maps->count ? 2 * maps->count : 1) * sizeof(*grown));
	if (!grown)
		return -ENOMEM;
	maps->pieces = grown;
	maps->pieces[maps->count++] = piece;
	return 0;
}

int gmem_maps_read(struct gmem_session *session, pid_t pid, int pidfd, struct gmem_maps *ret)
{
	struct gmem_maps maps = { 0 };
	char path[64], line[512];
	int err = 0;
	FILE *in;

	snprintf(path, sizeof(path), "/proc/%d/maps", pid);
	in = fopen(path, "re");
	if (!in)
		return errno == ENOENT ? -ESRCH : -errno;
	while (!err && fgets(line, sizeof(line), in)) {
		uint64_t start, end, offset, inode;
		struct gmem_file *file;
		char perms[5];

		if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %4s %" SCNx64 " %*s %" SCNu64, &start, &end, perms, &offset, &inode) != 5)
			continue;
		file = inode ? file_of(session, inode) : NULL;
		if (file)
			err = append(&maps, (struct gmem_mapped){ start, end, offset, file, perms[3] == 'p' });
	}
	if (!err && ferror(in))
		err = -ESRCH;
	fclose(in);
	/* the number was still that process's when its maps were read */
	if (!err && syscall(SYS_pidfd_send_signal, pidfd, 0, NULL, 0))
		err = errno == ESRCH ? -ESRCH : 0;
	if (err)
		gmem_maps_free(&maps);
	else
		*ret = maps;
	return err;
}

void gmem_maps_free(struct gmem_maps *maps)
{
	free(maps->pieces);
	*maps = (struct gmem_maps){ 0 };
}

bool gmem_maps_at(const struct gmem_maps *maps, uint64_t va, uint64_t offset, const struct gmem_file *file,
		  uint64_t *ret_end)
{
	for (size_t i = 0; i < maps->count; i++) {
		const struct gmem_mapped *piece = &maps->pieces[i];

		if (piece->end <= va)
			continue;
		if (piece->va > va) {
			if (piece->va < *ret_end)
				*ret_end = piece->va;
			return false;
		}
		if (piece->end < *ret_end)
			*ret_end = piece->end;
		return piece->file == file && piece->offset + (va - piece->va) == offset;
	}
	return false;
}
