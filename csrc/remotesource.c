/* SPDX-License-Identifier: Apache-2.0
 *
 * A version of a pool that another machine has published, as the source of an object: its pages come from the servers of a
 * device, once for all processes of this machine, and are what their checksums say. Which pages there are and what they
 * have to be (the manifest) is in a memfd without pointers, so that a successor knows it whether anybody answers or not.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <gmem/crash.h>
#include <gmem/internal.h>
#include <gmem/keep.h>
#include <gmem/memfd.h>
#include <gmem/run.h>
#include <gmem/source.h>

#define MAGIC 0x74736566696e616dull /* "manifest" */
#define VERSION 1
#define HEADER_BYTES 4096
#define NAME_MAX_BYTES 64

/* The first page of the memfd; present and checks follow. */
struct header {
	uint64_t magic;
	uint32_t version, shift;
	uint64_t stamp, pages;
	int32_t hnid;
	char name[NAME_MAX_BYTES + 1];
};

struct remotesource {
	struct gmem_source source;
	struct gmem_core *core;
	struct gmem_file *file;           /* (C) NULL: lost */
	uint8_t *alias;                   /* (C) */
	struct gmem_pool_version version; /* (C) points into alias */
	int hnid;                         /* (C) */
	_Atomic uint64_t fetched_bytes;
};

static uint64_t present_bytes(uint64_t pages)
{
	return (pages + 63) / 64 * 8;
}

static uint64_t file_bytes(uint64_t pages)
{
	return (HEADER_BYTES + present_bytes(pages) + pages * sizeof(uint32_t) + 4095) & ~4095ull;
}

static bool is_present(const struct gmem_pool_version *version, uint64_t index)
{
	return index < version->pages && version->present[index / 64] >> index % 64 & 1;
}

/* ---- pages ---- */

static void get_all(struct remotesource *remote, struct gmem_peer_io *io, size_t count)
{
	struct gmem_hnode *hnode = gmem_hnode_visit(remote->core, remote->hnid);

	for (size_t i = 0; i < count; i++)
		io[i].result = -EIO;
	if (!hnode)
		return;
	if (hnode->ops->pool_get) {
		gmem_duty_driver(hnode->hnid, "pool_get");
		hnode->ops->pool_get(hnode->device, &remote->version, io, count);
		gmem_duty_driver(hnode->hnid, NULL);
	}
	for (size_t i = 0; i < count; i++) {
		uint64_t bytes = io[i].result ? 0 : io[i].bytes;

		gmem_count(&hnode->out_bytes, bytes);
		gmem_count(&remote->fetched_bytes, bytes);
		gmem_count(&hnode->errors, io[i].result != 0);
	}
	gmem_hnode_leave(hnode);
}

/* What nobody has written is stored nowhere. */
static void pull_some(struct remotesource *remote, struct gmem_peer_io *io, size_t count)
{
	struct gmem_peer_io wanted[GMEM_RUN_PAGES];
	size_t from[GMEM_RUN_PAGES], n = 0;

	for (size_t i = 0; i < count; i++) {
		io[i].result = !remote->file ? -EIO : is_present(&remote->version, io[i].key) ? 0 : -ENODATA;
		if (!io[i].result) {
			from[n] = i;
			wanted[n++] = io[i];
		}
	}
	if (n)
		get_all(remote, wanted, n);
	for (size_t i = 0; i < n; i++)
		io[from[i]].result = wanted[i].result;
}

static void pull(struct gmem_source *source, struct gmem_peer_io *io, size_t count)
{
	for (size_t at = 0; at < count; at += GMEM_RUN_PAGES)
		pull_some((struct remotesource *)source, io + at, count - at < GMEM_RUN_PAGES ? count - at : GMEM_RUN_PAGES);
}

static void destroy(struct remotesource *remote)
{
	if (remote->alias)
		gmem_alias_unmap(remote->alias, file_bytes(remote->version.pages));
	gmem_file_unref(remote->file);
	free(remote);
}

static void release(struct gmem_source *source)
{
	struct remotesource *remote = (struct remotesource *)source;

	if (remote->file)
		atomic_fetch_sub(&remote->core->imports[remote->hnid], 1);
	destroy(remote);
}

static void describe(const struct gmem_source *source, struct gmem_record *record, int *ret_fd)
{
	const struct remotesource *remote = (const struct remotesource *)source;

	record->object.source = GMEM_RECORD_REMOTE;
	*ret_fd = remote->file ? remote->file->fd : -1;
}

const struct gmem_pool_version *gmem_remotesource_version(const struct gmem_source *source)
{
	const struct remotesource *remote = (const struct remotesource *)source;

	return source && source->ops->pull == pull && remote->file ? &remote->version : NULL;
}

uint64_t gmem_remotesource_fetched(const struct gmem_source *source)
{
	return source && source->ops->pull == pull ? atomic_load(&((const struct remotesource *)source)->fetched_bytes) : 0;
}

/* ---- life ---- */

static struct remotesource *new_source(struct gmem_core *core)
{
	static const struct gmem_source_ops ops = { .pull = pull, .release = release, .describe = describe };
	struct remotesource *remote = calloc(1, sizeof(*remote));

	if (remote)
		*remote = (struct remotesource){ .source = { .ops = &ops, .slow = true }, .core = core };
	return remote;
}

static void point_into(struct remotesource *remote)
{
	const struct header *header = (const struct header *)(const void *)remote->alias;
	uint8_t *present = remote->alias + HEADER_BYTES;

	remote->hnid = header->hnid;
	remote->version = (struct gmem_pool_version){
		.name = header->name, .stamp = header->stamp, .pages = header->pages, .shift = (uint8_t)header->shift,
		.present = (const uint64_t *)(const void *)present,
		.checks = (uint32_t *)(void *)(present + present_bytes(header->pages)),
	};
}

static int fill(struct remotesource *remote, const struct gmem_manifest *manifest)
{
	const struct gmem_pool_version *version = &manifest->version;
	uint64_t bytes = file_bytes(version->pages), bits = present_bytes(version->pages);
	int err = gmem_file_create("gmem-manifest", GMEM_CLASS_SMALL, bytes, 0, &remote->file);
	struct header *header;

	if (!err)
		err = gmem_file_populate(remote->file, 0, bytes);
	if (!err)
		err = gmem_alias_map(remote->file, 0, bytes, &remote->alias);
	if (err)
		return err;
	header = (struct header *)(void *)remote->alias;
	*header = (struct header){ .version = VERSION, .shift = version->shift, .stamp = version->stamp,
				   .pages = version->pages, .hnid = manifest->hnid };
	memcpy(header->name, version->name, strlen(version->name));
	memcpy(remote->alias + HEADER_BYTES, version->present, bits);
	memcpy(remote->alias + HEADER_BYTES + bits, version->checks, version->pages * sizeof(uint32_t));
	header->magic = MAGIC;
	return 0;
}

int gmem_remotesource_create(struct gmem_core *core, const struct gmem_manifest *manifest, struct gmem_source **ret)
{
	struct gmem_hnode *hnode = gmem_core_hnode(core, manifest->hnid);
	struct remotesource *remote;
	int err;

	if (!hnode || !hnode->ops || !hnode->ops->pool_get)
		return hnode ? -EOPNOTSUPP : -ENODEV;
	if (strlen(manifest->version.name) > NAME_MAX_BYTES || !manifest->version.pages)
		return -EINVAL;
	remote = new_source(core);
	err = remote ? fill(remote, manifest) : -ENOMEM;
	if (err) {
		if (remote)
			destroy(remote);
		return err;
	}
	gmem_crash(GMEM_CRASH_FAR_FILLED);
	point_into(remote);
	atomic_fetch_add(&core->imports[remote->hnid], 1);
	*ret = &remote->source;
	return 0;
}

static bool is_sound(const struct header *header, uint64_t bytes)
{
	return header->magic == MAGIC && header->version == VERSION && header->pages <= bytes &&
	       file_bytes(header->pages) == bytes && header->hnid > 0 && header->hnid < GMEM_HNODE_MAX &&
	       memchr(header->name, '\0', sizeof(header->name)) &&
	       (header->shift == GMEM_SHIFT_4K || header->shift == GMEM_SHIFT_64K || header->shift == GMEM_SHIFT_2M);
}

static int adopt_file(struct remotesource *remote, int fd)
{
	struct stat st;
	int err = fstat(fd, &st) || st.st_size < HEADER_BYTES ? -EPROTO : 0;

	if (!err)
		err = gmem_file_adopt(fd, GMEM_CLASS_SMALL, (uint64_t)st.st_size, 0, &remote->file);
	if (err) {
		close(fd);
		return err;
	}
	err = gmem_alias_map(remote->file, 0, (uint64_t)st.st_size, &remote->alias);
	if (!err && is_sound((const struct header *)(const void *)remote->alias, (uint64_t)st.st_size))
		return 0;
	if (!err)
		gmem_alias_unmap(remote->alias, (uint64_t)st.st_size);
	gmem_file_unref(remote->file);
	remote->alias = NULL;
	remote->file = NULL;
	return -EPROTO;
}

int gmem_remotesource_adopt(struct gmem_core *core, int fd, struct gmem_source **ret)
{
	struct remotesource *remote = new_source(core);

	if (!remote) {
		if (fd >= 0)
			close(fd);
		return -ENOMEM;
	}
	if (fd >= 0 && !adopt_file(remote, fd)) {
		point_into(remote);
		atomic_fetch_add(&core->imports[remote->hnid], 1);
		gmem_crash(GMEM_CRASH_FAR_RECOVERED);
	}
	*ret = &remote->source;
	return 0;
}
