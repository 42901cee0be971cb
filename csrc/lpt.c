/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <gmem/lpt.h>

#define WORD_BYTES sizeof(gmem_word_t)
#define EXTENT_ALIGN 4096ull /* so that freeing an extent frees its memory */

int gmem_lpt_init(struct gmem_lpt *lpt, uint64_t pages, int fd)
{
	uint8_t *alias;
	int err;

	pages = (pages + EXTENT_ALIGN - 1) & ~(EXTENT_ALIGN - 1);
	err = fd >= 0 ? gmem_file_adopt(fd, GMEM_CLASS_SMALL, pages * WORD_BYTES, 0, &lpt->file) :
			gmem_file_create("gmem-lpt", GMEM_CLASS_SMALL, pages * WORD_BYTES, 0, &lpt->file);
	if (err)
		return err;
	err = gmem_alias_map(lpt->file, 0, pages * WORD_BYTES, &alias);
	if (!err) {
		lpt->words = (_Atomic gmem_word_t *)(void *)alias;
		lpt->pages = pages;
		err = gmem_range_init(&lpt->extents, 0, pages * WORD_BYTES);
		if (err)
			gmem_alias_unmap(alias, pages * WORD_BYTES);
	}
	if (err)
		gmem_file_unref(lpt->file);
	return err;
}

void gmem_lpt_deinit(struct gmem_lpt *lpt)
{
	gmem_range_deinit(&lpt->extents);
	gmem_alias_unmap((uint8_t *)lpt->words, lpt->pages * WORD_BYTES);
	gmem_file_unref(lpt->file);
}

static uint64_t extent_bytes(uint64_t pages)
{
	return (pages * WORD_BYTES + EXTENT_ALIGN - 1) & ~(EXTENT_ALIGN - 1);
}

int gmem_lpt_extent_alloc(struct gmem_lpt *lpt, uint64_t pages, uint64_t *ret_pn)
{
	uint64_t start;
	int err = gmem_range_alloc(&lpt->extents, extent_bytes(pages), EXTENT_ALIGN, &start);

	if (!err)
		*ret_pn = start / WORD_BYTES;
	return err;
}

int gmem_lpt_extent_take(struct gmem_lpt *lpt, uint64_t pn, uint64_t pages)
{
	return gmem_range_take(&lpt->extents, pn * WORD_BYTES, extent_bytes(pages));
}

void gmem_lpt_extent_free(struct gmem_lpt *lpt, uint64_t pn, uint64_t pages)
{
	/* If the hole can't be punched, stale words would outlive their object: then the extent is never reused. */
	if (!gmem_file_punch(lpt->file, pn * WORD_BYTES, extent_bytes(pages)))
		gmem_range_free(&lpt->extents, pn * WORD_BYTES, extent_bytes(pages));
}

int gmem_lpt_next_touched(struct gmem_lpt *lpt, uint64_t *pn, uint64_t end, uint64_t *ret_end)
{
	off_t data = lseek(lpt->file->fd, (off_t)(*pn * WORD_BYTES), SEEK_DATA), hole;

	if (data < 0 || (uint64_t)data >= end * WORD_BYTES)
		return -ENOENT;
	hole = lseek(lpt->file->fd, data, SEEK_HOLE);
	if (hole < 0 || (uint64_t)hole > end * WORD_BYTES)
		hole = (off_t)(end * WORD_BYTES);
	*pn = (uint64_t)data / WORD_BYTES;
	*ret_end = ((uint64_t)hole + WORD_BYTES - 1) / WORD_BYTES;
	return 0;
}

uint64_t gmem_lpt_bytes(struct gmem_lpt *lpt)
{
	struct stat st;

	return fstat(lpt->file->fd, &st) ? 0 : (uint64_t)st.st_blocks * 512;
}

bool gmem_word_is_valid(gmem_word_t w)
{
	uint32_t valid = gmem_word_valid(w);
	int writer = gmem_word_writer(w);

	if (writer >= GMEM_HNODE_MAX || gmem_word_dir(w) > GMEM_DIR_DISCARD)
		return false;
	switch (gmem_word_state(w)) {
	case GMEM_NOMAP:
	case GMEM_POISONED:
		return valid == 0 && writer < 0;
	case GMEM_RESIDENT:
		return valid != 0 && (writer < 0 || valid == 1u << writer);
	case GMEM_BUSY:
		return gmem_word_dir(w) != GMEM_DIR_NONE;
	}
	return false;
}
