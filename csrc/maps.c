/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <gmem/account.h>
#include <gmem/maps.h>

static struct gmem_file *file_of(struct gmem_account *account, uint64_t inode)
{
	for (; account; account = account->parent)
		for (int c = 0; c < GMEM_CLASS_COUNT; c++) {
			struct gmem_file *file = atomic_load(&account->files[GMEM_HOST][c]);
			struct stat st;

			if (file && !fstat(file->fd, &st) && st.st_ino == inode)
				return file;
		}
	return NULL;
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

int gmem_maps_read(struct gmem_account *account, pid_t pid, int pidfd, struct gmem_maps *ret)
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

		if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %*s %" SCNx64 " %*s %" SCNu64, &start, &end, &offset, &inode) != 4)
			continue;
		file = inode ? file_of(account, inode) : NULL;
		if (file)
			err = append(&maps, (struct gmem_mapped){ start, end, offset, file });
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

bool gmem_maps_at(const struct gmem_maps *maps, uint64_t va, uint64_t offset, uint64_t *ret_end)
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
		return piece->offset + (va - piece->va) == offset;
	}
	return false;
}
