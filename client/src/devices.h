/* SPDX-License-Identifier: Apache-2.0 */
#ifndef GMEM_CLIENT_DEVICES_H
#define GMEM_CLIENT_DEVICES_H

#include <gmem.h>

/* The device of that name; -ENOENT naming "device". */
int gmem_device_find(struct gmem *session, const char *name, struct gmem_device_info *ret);

#endif
