/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stdlib.h>

#include <gmem/devmem.h>
#include <gmem/hnode.h>
#include <gmem/watch.h>

int gmem_devmem_create(struct gmem_hnode *hnode, enum gmem_class class_, uint64_t bytes, uint64_t owner,
		       struct gmem_file **ret)
{
	struct gmem_file *file = malloc(sizeof(*file));
	int err;

	if (!file)
		return -ENOMEM;
	*file = (struct gmem_file){ .refs = 1, .fd = -1, .class_ = class_, .bytes = bytes, .owner = owner, .hnode = hnode,
				    .lent = { -1, -1 } };
	err = hnode->ops->mem_create(hnode->device, owner, class_, bytes, &file->mem);
	if (err)
		free(file);
	else
		*ret = file;
	return err;
}

void gmem_devmem_deinit(struct gmem_file *file)
{
	file->hnode->ops->mem_destroy(file->mem);
}

int gmem_devmem_alloc(struct gmem_file *file, uint64_t offset, uint64_t bytes, bool zeroed)
{
	int err;

	gmem_duty_driver(file->hnode->hnid, "mem_alloc");
	err = file->hnode->ops->mem_alloc(file->mem, offset, bytes, zeroed);
	gmem_duty_driver(file->hnode->hnid, NULL);
	return err;
}

int gmem_devmem_free(struct gmem_file *file, uint64_t offset, uint64_t bytes)
{
	int err;

	gmem_duty_driver(file->hnode->hnid, "mem_free");
	err = file->hnode->ops->mem_free(file->mem, offset, bytes);
	gmem_duty_driver(file->hnode->hnid, NULL);
	return err;
}

uint8_t *gmem_devmem_at(struct gmem_file *file, uint64_t offset)
{
	return file->hnode->ops->mem_at(file->mem, offset);
}
