/* SPDX-License-Identifier: Apache-2.0
 *
 * Device memory: the file of a (session, page class) on a device that makes its frames itself (GMEM_CAP_OWN_FRAMES).
 * gmem_file_populate(), gmem_file_punch() and gmem_object_at() serve it as they serve a memfd; what it has not is a
 * descriptor, an alias of several pages in a row, and anything for the CPU to read.
 */
#ifndef GMEM_DEVMEM_H
#define GMEM_DEVMEM_H

#include <gmem/memfd.h>

int gmem_devmem_create(struct gmem_hnode *hnode, enum gmem_class class_, uint64_t bytes, uint64_t owner,
		       struct gmem_file **ret);
void gmem_devmem_deinit(struct gmem_file *file);
int gmem_devmem_alloc(struct gmem_file *file, uint64_t offset, uint64_t bytes, bool zeroed);
int gmem_devmem_free(struct gmem_file *file, uint64_t offset, uint64_t bytes);
/* For copy engines: NULL if there is no frame. */
uint8_t *gmem_devmem_at(struct gmem_file *file, uint64_t offset);

#endif
