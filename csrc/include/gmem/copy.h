/* SPDX-License-Identifier: Apache-2.0
 *
 * Copy: the content of pages from one hnode to another, by the CPU, a device's copy engine, or a tier's driver.
 */
#ifndef GMEM_COPY_H
#define GMEM_COPY_H

#include <gmem/hnode.h>

struct gmem_page;

/* The copy engine that stands between two hnodes, NULL if the CPU copies as fast as anything. */
struct gmem_hnode *gmem_copy_engine(struct gmem_hnode *from, struct gmem_hnode *to);
/* The content of pages (GMEM_COPY_PAGES at most) from one hnode to another, which has been charged for them, by the copy engine
 * between them or the CPU, in one go; it makes their memory there. */
#define GMEM_COPY_PAGES 64
int gmem_copy_pages(struct gmem_hnode *from, struct gmem_hnode *to, struct gmem_page *const *pages, size_t count);
int gmem_copy_by_engine(struct gmem_hnode *engine, const struct gmem_sg *sg, size_t count);
/* Whether one copy takes a page from the one to the other, or it has to be laid down on the way. */
bool gmem_copy_reaches(const struct gmem_hnode *from, const struct gmem_hnode *to);
/* FILL: the page's frame on to is made and filled from the copy on from; nobody maps it before the commit. */
int gmem_copy_fill(struct gmem_page *page, struct gmem_hnode *from, struct gmem_hnode *to);

#endif
