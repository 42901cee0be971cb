/* SPDX-License-Identifier: Apache-2.0
 *
 * The floor of heap.c: the allocator that libgmem-heap has inside, alone in a shared library.
 */
int gmem_je_atfork(void (*before)(void), void (*parent)(void), void (*child)(void));

/* Where it would register its fork handlers; nothing forks here. */
int gmem_je_atfork(void (*before)(void), void (*parent)(void), void (*child)(void))
{
	(void)before, (void)parent, (void)child;
	return 0;
}
